"""The reference: ``fold`` and ``blend`` in dense PyTorch, pixel by Gaussian, from the published equations.

Same contracts as the compiled operators of ``diff_gaussian_rasterization`` and no compiled code: every pixel looks at
every Gaussian, autograd gives the gradients. For tests, and for tiny inputs on a machine without a compiler.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from utils import losses
from utils.spherical_harmonics import to_colour

MIN_ALPHA = 1 / 255
MAX_ALPHA = 0.99
MIN_TRANSMITTANCE = 1e-4
LOW_PASS = 0.3
MIN_TIME_WEIGHT = 0.1
MIN_SEGMENTATION_SCALE = 1e-6
TILE = 16


def fold(
    xyz: Tensor,  # (N, 3)
    w1: Tensor,  # (N, 2P)
    m: Tensor,  # (N,)
    sigma: Tensor,  # (N,)
    scaling: Tensor,  # (N, 3)
    rotation: Tensor,  # (N,)
    times: Tensor,  # (V,)
    signs: Tensor,  # (V,)
    pixels_per_unit: float,
    width: int,
    height: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Contract of ``diff_gaussian_rasterization.fold``."""
    n, degree = xyz.shape[0], w1.shape[1] // 2
    offset = torch.sigmoid(m) - times[:, None]  # (V, N)
    weight = torch.exp(-(offset**2) / (2 * torch.exp(sigma) ** 2))  # (V, N), delta(t)
    centre = xyz[:, [0, 2]]  # (N, 2)
    for j, w in enumerate(w1.reshape(n, degree, 2).unbind(1)):
        centre = centre + w * offset[..., None] ** (j + 1)  # (V, N, 2)
    centre = centre.expand(len(times), n, 2)
    u = signs[:, None] * pixels_per_unit * centre[..., 0] + (width - 1) / 2
    v = -pixels_per_unit * centre[..., 1] + (height - 1) / 2
    means2d = torch.stack([u, v], -1)  # (V, N, 2)

    scales = weight[..., None] * torch.exp(scaling[:, [0, 2]])  # (V, N, 2)
    variances = (pixels_per_unit * scales) ** 2  # (V, N, 2) px^2
    angle = 2 * math.pi * torch.sigmoid(rotation)  # (N,)
    cos, sin = torch.cos(angle), torch.sin(angle)
    turn = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)  # (N, 2, 2)
    mirror = torch.stack([signs, torch.ones_like(signs)], -1)  # (V, 2)
    covariance = turn @ torch.diag_embed(variances) @ turn.transpose(-1, -2)  # (V, N, 2, 2)
    covariance = covariance * mirror[:, None, :, None] * mirror[:, None, None, :]
    xx, xy, yy = covariance[..., 0, 0] + LOW_PASS, covariance[..., 0, 1], covariance[..., 1, 1] + LOW_PASS
    determinant = (variances + LOW_PASS).prod(-1)  # the eigenvalues' product: no cancellation
    conics = torch.stack([yy, -xy, xx], -1) / determinant[..., None]  # (V, N, 3)

    with torch.no_grad():
        half_gap = (variances[..., 0] - variances[..., 1]) / 2
        larger = variances.mean(-1) + LOW_PASS + torch.sqrt((half_gap**2).clamp_min(0.1))
        radius = torch.ceil(3 * torch.sqrt(larger))
        grid = TILE * math.ceil(width / TILE), TILE * math.ceil(height / TILE)
        touches = (u + radius >= 0) & (u - radius < grid[0]) & (v + radius >= 0) & (v - radius < grid[1])
        visible = touches & (weight > MIN_TIME_WEIGHT) & (conics[..., 0] >= 0)  # false where the cut is NaN
        segmented = visible & (scales > MIN_SEGMENTATION_SCALE).all(-1)
        radii = torch.where(visible, radius, torch.zeros_like(radius)).to(torch.int32)
        active = visible.to(torch.uint8) + 2 * segmented.to(torch.uint8)
    return means2d, conics, radii, active


def alphas(
    means2d: Tensor,  # (N, 2)
    conics: Tensor,  # (N, 3)
    opacities: Tensor,  # (N,)
    x: Tensor,  # (Q,) px
    y: Tensor,  # (Q,) px
) -> Tensor:
    """(N, Q): what each Gaussian covers of each pixel, 0 where the blending skips it; gradient 0 where clamped."""
    dx, dy = x - means2d[:, :1], y - means2d[:, 1:]  # (N, Q)
    a, b, c = conics[:, :, None].unbind(1)
    power = -0.5 * (a * dx**2 + c * dy**2) - b * dx * dy
    alpha = (opacities[:, None] * torch.exp(power)).clamp_max(MAX_ALPHA)
    return torch.where((power <= 0) & (alpha >= MIN_ALPHA), alpha, torch.zeros_like(alpha))


def blend(
    means2d: Tensor,  # (V, N, 2)
    conics: Tensor,  # (V, N, 3)
    active: Tensor,  # (V, N) uint8
    opacities: Tensor,  # (heads, N)
    colours: Tensor,  # (heads, N, C)
    backgrounds: Tensor,  # (R, C)
    views: Sequence[int],
    heads: Sequence[int],
    bits: Sequence[int],
    width: int,
    height: int,
    screen: Tensor | None = None,  # (heads, V, N, 2)
    raw: bool = False,
) -> tuple[Tensor, Tensor]:
    """Contract of ``diff_gaussian_rasterization.blend``."""
    if raw:
        opacities, colours = torch.sigmoid(opacities), to_colour(colours)
    x = torch.arange(width, dtype=means2d.dtype, device=means2d.device).repeat(height)  # (H W,)
    y = torch.arange(height, dtype=means2d.dtype, device=means2d.device).repeat_interleave(width)
    images, transmittances = [], []
    for r, (view, head, bit) in enumerate(zip(views, heads, bits, strict=True)):
        drawn = (active[view] & bit) != 0
        means = means2d[view] if screen is None else means2d[view] + (screen - screen.detach())[head, view]
        alpha = alphas(means[drawn], conics[view, drawn], opacities[head, drawn], x, y)  # (M, H W)
        # A pixel stops before the Gaussian that takes T under 1e-4; T never grows, so what is kept is a prefix.
        kept = torch.cumprod(1 - alpha.detach(), 0) >= MIN_TRANSMITTANCE
        alpha = torch.where(kept, alpha, torch.zeros_like(alpha))
        after = torch.cumprod(1 - alpha, 0)  # (M, H W)
        before = torch.cat([torch.ones_like(after[:1]), after[:-1]]) if len(after) else after
        remaining = after[-1] if len(after) else torch.ones_like(x)  # (H W,)
        image = colours[head, drawn].T @ (alpha * before) + backgrounds[r][:, None] * remaining  # (C, H W)
        images.append(image.reshape(-1, height, width))
        transmittances.append(remaining.reshape(height, width))
    return torch.stack(images), torch.stack(transmittances)


def similarity(images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Contract of ``diff_gaussian_rasterization.similarity``."""
    return losses.l1(images, targets), losses.ssim(images, targets)


def sigma_outside(raw: Tensor, low: float, high: float) -> Tensor:
    """Contract of ``diff_gaussian_rasterization.sigma_outside``."""
    return losses.sigma_outside(torch.exp(raw), low, high)


def observe(
    radii: Tensor,  # (V, N)
    active: Tensor,  # (V, N)
    screen_gradients: Tensor,  # (V, N, 2)
    m_gradients: Tensor,  # (N, 1)
    bit: int,
    width: int,
    height: int,
    statistics: Mapping[str, Tensor],
) -> None:
    """Contract of ``diff_gaussian_rasterization.observe``."""
    visible = (active & bit) != 0
    seen = visible.any(0)[:, None]  # (N, 1)
    ndc = screen_gradients * screen_gradients.new_tensor([width / 2, height / 2])
    largest = (ndc.norm(dim=2) * visible).amax(0)[:, None]  # (N, 1)
    s = statistics
    torch.maximum(s["max_radii2D"], (radii * visible).amax(0), out=s["max_radii2D"])
    s["xyz_gradient_accum"] += largest * seen
    s["m_gradient_accum"] += m_gradients.abs() * seen
    s["denom"] += seen
    s["m_denom"] += seen


Adam = torch.optim.Adam
"""Contract of ``diff_gaussian_rasterization.Adam``."""
