"""The reference of the general rasteriser: ``project`` and the whole drop-in call in plain PyTorch.

Written from the equations with matrix products and library routines where the kernels have expanded sums, so
that a mistake in one is not a mistake in the other. Autograd gives the gradients.
"""

import math

import numpy as np
import torch
from numpy.polynomial import Legendre, Polynomial
from torch import Tensor

from gaussian_renderer import oracle

NEAR_PLANE = 0.2
VIEW_MARGIN = 1.3
MIN_COMPENSATION = 0.000025


def spherical_harmonics(directions: Tensor, degree: int) -> Tensor:
    """(N, (degree + 1)^2): real spherical harmonics, Condon-Shortley phase, from Legendre polynomials."""
    x, y, z = directions.unbind(-1)  # (N,), unit vectors
    columns = []
    for order in range(degree + 1):
        for m in range(-order, order + 1):
            k = abs(m)
            norm = (2 * order + 1) / (4 * math.pi) * math.factorial(order - k) / math.factorial(order + k)
            norm = math.sqrt(norm * (1 if m == 0 else 2)) * (-1) ** k
            # P_l^k = (1 - z^2)^(k/2) d^k P_l / dz^k, and (1 - z^2)^(k/2) cos or sin (k phi) = Re or Im (x + i
            # y)^k.
            powers = Legendre.basis(order).deriv(k).convert(kind=Polynomial).coef
            legendre = sum(c * z**j for j, c in enumerate(np.asarray(powers).tolist()))
            real, imaginary = torch.ones_like(x), torch.zeros_like(x)
            for _ in range(k):
                real, imaginary = real * x - imaginary * y, real * y + imaginary * x
            columns.append(norm * legendre * (imaginary if m < 0 else real))
    return torch.stack(columns, -1)


def rotation_matrices(quaternions: Tensor) -> Tensor:
    """(N, 3, 3) of quaternions w x y z (N, 4): R = I + 2 w K + 2 K^2, K the matrix of the cross product."""
    w, x, y, z = torch.nn.functional.normalize(quaternions, dim=-1).unbind(-1)
    o = torch.zeros_like(x)
    k = torch.stack([o, -z, y, z, o, -x, -y, x, o], -1).reshape(-1, 3, 3)
    return torch.eye(3, dtype=k.dtype, device=k.device) + 2 * w[:, None, None] * k + 2 * k @ k


def project(
    means3d: Tensor,  # (N, 3)
    scales: Tensor | None,  # (N, 3)
    quaternions: Tensor | None,  # (N, 4)
    covariances: Tensor | None,  # (N, 6)
    shs: Tensor | None,  # (N, K, 3)
    viewmatrix: Tensor,  # (4, 4)
    projmatrix: Tensor,  # (4, 4)
    campos: Tensor,  # (3,)
    tanfovx: float,
    tanfovy: float,
    scale_modifier: float,
    width: int,
    height: int,
    sh_degree: int,
    antialiasing: bool,
) -> tuple[Tensor, ...]:
    """Contract of the operator ``project``: means2d, conics, colours, depths, compensations, radii."""
    n = len(means3d)
    homogeneous = torch.cat([means3d, torch.ones_like(means3d[:, :1])], -1)  # (N, 4)
    in_front = (homogeneous @ viewmatrix)[:, 2] > NEAR_PLANE
    # What is culled is replaced by a point in front, so that its gradient is 0 and not 0 times infinity.
    stand_in = torch.linalg.solve(viewmatrix.T, viewmatrix.new_tensor([0.0, 0.0, 1.0, 1.0]))
    homogeneous = torch.where(in_front[:, None], homogeneous, stand_in)
    view = homogeneous @ viewmatrix  # (N, 4)
    clip = homogeneous @ projmatrix  # (N, 4)
    ndc = clip[:, :2] / clip[:, 3:]
    size = means3d.new_tensor([width, height])
    means2d = ((ndc + 1) * size - 1) / 2  # (N, 2)

    if covariances is not None:
        entries = [0, 1, 2, 1, 3, 4, 2, 4, 5]
        sigma = covariances[:, entries].reshape(n, 3, 3)
    else:
        factor = rotation_matrices(quaternions) @ torch.diag_embed(scale_modifier * scales)
        sigma = factor @ factor.mT  # (N, 3, 3)
    z = view[:, 2]
    limit = VIEW_MARGIN * means3d.new_tensor([tanfovx, tanfovy])
    ratio = (view[:, :2] / z[:, None]).clamp(-limit, limit)  # (N, 2)
    focal = size / (2 * means3d.new_tensor([tanfovx, tanfovy]))
    jacobian = torch.cat([torch.diag_embed(focal / z[:, None]), -(focal * ratio / z[:, None])[..., None]], -1)
    to_image = jacobian @ viewmatrix[:3, :3].T  # (N, 2, 3)
    covariance = to_image @ sigma @ to_image.mT  # (N, 2, 2)
    filtered = covariance + oracle.LOW_PASS * torch.eye(2, dtype=sigma.dtype, device=sigma.device)
    inverse = torch.linalg.inv(filtered)
    conics = torch.stack([inverse[:, 0, 0], inverse[:, 0, 1], inverse[:, 1, 1]], -1)  # (N, 3)

    compensations = torch.ones_like(z)
    if antialiasing:
        compensations = (
            (torch.linalg.det(covariance) / torch.linalg.det(filtered)).clamp_min(MIN_COMPENSATION).sqrt()
        )
    colours = means3d.new_empty(0, 3)
    if shs is not None:
        directions = torch.nn.functional.normalize(homogeneous[:, :3] - campos, dim=-1)
        basis = spherical_harmonics(directions, sh_degree)  # (N, k)
        colours = (torch.einsum("nk,nkc->nc", basis, shs[:, : basis.shape[1]]) + 0.5).clamp_min(0)

    with torch.no_grad():
        determinant, mid = torch.linalg.det(filtered), (filtered[:, 0, 0] + filtered[:, 1, 1]) / 2
        radii = torch.ceil(3 * torch.sqrt(mid + torch.sqrt((mid**2 - determinant).clamp_min(0.1))))
        grid = oracle.TILE * torch.ceil(size / oracle.TILE)
        touches = ((means2d + radii[:, None] >= 0) & (means2d - radii[:, None] < grid)).all(-1)
        visible = in_front & touches & (determinant > 0) & (mid > 0)
        radii = torch.where(visible, radii, torch.zeros_like(radii)).to(torch.int32)

    def seen(tensor: Tensor) -> Tensor:
        return torch.where(visible.reshape(n, *[1] * (tensor.dim() - 1)), tensor, torch.zeros_like(tensor))

    colours = seen(colours) if shs is not None else colours
    return seen(means2d), seen(conics), colours, seen(z), seen(compensations), radii


def rasterize_gaussians(
    means3d, means2d, shs, colours, opacities, scales, rotations, covariances, settings
) -> tuple[Tensor, Tensor, Tensor]:
    """Contract of ``diff_gaussian_rasterization.rasterize_gaussians``."""
    width, height = settings.image_width, settings.image_height
    centres, conics, sh_colours, depths, compensations, radii = project(
        means3d,
        scales,
        rotations,
        covariances,
        shs,
        settings.viewmatrix,
        settings.projmatrix,
        settings.campos,
        settings.tanfovx,
        settings.tanfovy,
        settings.scale_modifier,
        width,
        height,
        settings.sh_degree,
        settings.antialiasing,
    )
    # Only its gradient counts, never its values.
    centres = centres + (means2d - means2d.detach())[:, :2] * means3d.new_tensor([width / 2, height / 2])
    order = [n for n in sorted(range(len(depths)), key=lambda n: depths[n].item()) if radii[n] > 0]
    colours = sh_colours if shs is not None else colours
    images, _ = oracle.blend(
        centres[order][None],
        conics[order][None],
        torch.ones(1, len(order), dtype=torch.uint8, device=means3d.device),
        (opacities.reshape(-1) * compensations)[order][None],
        torch.cat([colours[order], 1 / depths[order, None]], -1)[None],
        torch.cat([settings.bg, settings.bg.new_zeros(1)])[None],
        [0],
        [0],
        [1],
        width,
        height,
    )
    return images[0, :3], radii, images[0, 3:]
