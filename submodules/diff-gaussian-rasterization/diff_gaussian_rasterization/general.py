"""The drop-in rasteriser of 3-D Gaussians: any pinhole, spherical harmonics, antialiasing, inverse depth.

Two compiled operators with plain PyTorch between them: ``project`` turns 3-D Gaussians into footprints in the
image (EWA splatting, Zwicker et al. 2001, with the conventions of Kerbl et al. 2023), and ``blend``, shared
with the folded rasteriser, draws footprints front to back. Names and shapes of the interface are those that
programs of the field use.

Conventions: matrices are in the row-vector (transposed) convention, ``p_view = [p, 1] @ viewmatrix``; the
view looks along +z with x right and y down; pixel centres lie on integers; float32 or float64, on CPU or
CUDA.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .ops import ACTIVE, blend, one_device

NEAR_PLANE = 0.2  # what is at this view-space depth or nearer is not drawn; kNearPlane in csrc/common


class GaussianRasterizationSettings(NamedTuple):
    """A camera and how to draw through it."""

    image_height: int
    image_width: int
    tanfovx: float  # tan of half the horizontal field of view
    tanfovy: float
    bg: Tensor  # (3,) background colour
    scale_modifier: float  # factor on all scales; covariances that are given are taken as they are
    viewmatrix: Tensor  # (4, 4) world to view
    projmatrix: Tensor  # (4, 4) world to clip: the view and the projection in one
    sh_degree: int  # 0 to 3, of the coefficients in use
    campos: Tensor  # (3,) camera centre, world
    prefiltered: bool  # part of the field's interface; changes nothing, what is not visible is always culled
    debug: bool  # part of the field's interface; changes nothing
    antialiasing: bool = False  # opacity makes up for the 0.3 px^2 that every footprint is widened by


class GaussianRasterizer(nn.Module):
    """Draws 3-D Gaussians as one camera sees them."""

    def __init__(self, raster_settings: GaussianRasterizationSettings) -> None:
        super().__init__()
        self.raster_settings = raster_settings

    def markVisible(self, positions: Tensor) -> Tensor:
        """Which of ``positions`` (N, 3) lie beyond the near plane: bool (N,)."""
        return mark_visible(positions, self.raster_settings.viewmatrix)

    def forward(
        self,
        means3D: Tensor,
        means2D: Tensor,
        opacities: Tensor,
        shs: Tensor | None = None,
        colors_precomp: Tensor | None = None,
        scales: Tensor | None = None,
        rotations: Tensor | None = None,
        cov3D_precomp: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See :func:`rasterize_gaussians`, which has the shapes."""
        return rasterize_gaussians(
            means3D,
            means2D,
            shs,
            colors_precomp,
            opacities,
            scales,
            rotations,
            cov3D_precomp,
            self.raster_settings,
        )


def mark_visible(positions: Tensor, viewmatrix: Tensor) -> Tensor:
    """Which of ``positions`` (N, 3) lie beyond the near plane of ``viewmatrix`` (4, 4): bool (N,)."""
    with torch.no_grad():
        viewmatrix = viewmatrix.to(positions)
        return positions @ viewmatrix[:3, 2] + viewmatrix[3, 2] > NEAR_PLANE


def rasterize_gaussians(
    means3D: Tensor,
    means2D: Tensor,
    sh: Tensor | None,
    colors_precomp: Tensor | None,
    opacities: Tensor,
    scales: Tensor | None,
    rotations: Tensor | None,
    cov3Ds_precomp: Tensor | None,
    raster_settings: GaussianRasterizationSettings,
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw N Gaussians. An argument that does not apply is None or ``torch.Tensor([])``.

    Args:
        means3D: (N, 3) centres, world.
        means2D: (N, 3) or (N, 2) offsets of the projected centres in NDC, zeros in general: its gradient is
            that with respect to the screen position in NDC. A third column has no effect and gets gradient 0.
        sh: (N, K, 3) spherical harmonics, K >= (sh_degree + 1)^2: colour = max(0, sum + 0.5), seen from
            ``campos``.
        colors_precomp: (N, 3) colours, instead of ``sh``.
        opacities: (N, 1) or (N,) in [0, 1].
        scales: (N, 3) standard deviations.
        rotations: (N, 4) quaternions w x y z. They are normalised here, and so is their gradient.
        cov3Ds_precomp: (N, 6) covariances xx xy xz yy yz zz, instead of ``scales`` and ``rotations``.
        raster_settings: the camera.

    Returns:
        colour (3, H, W); radii (N,) int32 in px, 0 for a Gaussian that is not visible; inverse depth (1, H,
        W), blended as a colour is over a background of 0. Both images pass gradients on to every Gaussian
        argument.

    Raises:
        ValueError: not exactly one form of colour and one of covariance, or a shape or device that does not
            fit.
        TypeError: Gaussians of different dtypes.
    """
    settings = raster_settings
    sh, colors_precomp, scales, rotations, cov3Ds_precomp = (
        None if argument is None or argument.shape == (0,) else argument
        for argument in (sh, colors_precomp, scales, rotations, cov3Ds_precomp)
    )
    if (sh is None) == (colors_precomp is None):
        raise ValueError("give exactly one of shs and colors_precomp")
    n = len(means3D)
    if colors_precomp is not None and colors_precomp.shape != (n, 3):
        raise ValueError(f"colors_precomp must have shape ({n}, 3), got {tuple(colors_precomp.shape)}")
    if opacities.shape not in ((n,), (n, 1)):
        raise ValueError(f"opacities must have shape ({n}, 1), got {tuple(opacities.shape)}")
    if means2D.shape not in ((n, 3), (n, 2)):
        raise ValueError(f"means2D must have shape ({n}, 3), got {tuple(means2D.shape)}")

    width, height = int(settings.image_width), int(settings.image_height)
    means2d, conics, colours, depths, compensations, radii = torch.ops.diff_gaussian_rasterization.project(
        means3D,
        scales,
        rotations,
        cov3Ds_precomp,
        sh,
        settings.viewmatrix.to(means3D),
        settings.projmatrix.to(means3D),
        settings.campos.to(means3D).reshape(3),
        float(settings.tanfovx),
        float(settings.tanfovy),
        float(settings.scale_modifier),
        width,
        height,
        settings.sh_degree,
        settings.antialiasing,
    )
    means2d = means2d + 0.5 * means2D[:, :2] * means2d.new_tensor([width, height])  # [N, 2] px
    opacities = opacities.reshape(n) * compensations  # [N]
    if colors_precomp is not None:
        colours = colors_precomp

    visible = radii.nonzero().squeeze(1)
    # `blend` draws in the order of the index: nearest first, and equal depths in the order they were given.
    order = visible[torch.argsort(depths.detach()[visible], stable=True)]  # [M]
    inverse_depths = depths[order].reciprocal()
    images, _ = blend(
        means2d[order][None],  # [1, M, 2]
        conics[order][None],  # [1, M, 3]
        torch.full((1, len(order)), ACTIVE, dtype=torch.uint8, device=means3D.device),
        opacities[order][None],  # [1, M]
        torch.cat([colours[order], inverse_depths[:, None]], dim=1)[None],  # [1, M, 4]
        torch.cat([settings.bg.to(means3D).reshape(3), means3D.new_zeros(1)])[None],  # [1, 4]
        [0],
        [0],
        [ACTIVE],
        width,
        height,
    )
    return images[0, :3], radii, images[0, 3:]


# The operator `project` to autograd and to tracing. Its inputs, in the order of the schema: means3d, scales,
# quaternions, covariances, shs, viewmatrix, projmatrix, campos, then numbers. Cameras get no gradient.


@torch.library.register_fake("diff_gaussian_rasterization::project")
def _project_fake(means3d, scales, quaternions, covariances, shs, viewmatrix, projmatrix, campos, *_):
    one_device(means3d, scales, quaternions, covariances, shs, viewmatrix, projmatrix, campos)
    n = means3d.shape[0]
    return (
        means3d.new_empty(n, 2),
        means3d.new_empty(n, 3),
        means3d.new_empty(0 if shs is None else n, 3),
        means3d.new_empty(n),
        means3d.new_empty(n),
        means3d.new_empty(n, dtype=torch.int32),
    )


@torch.library.register_fake("diff_gaussian_rasterization::project_backward")
def _project_backward_fake(v_means2d, v_conics, v_colours, v_depths, v_compensations, radii, means3d, *rest):
    gaussians = (means3d, *rest[:4])
    return tuple(means3d.new_empty(0) if g is None else means3d.new_empty(g.shape) for g in gaussians)


def _project_setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs[:8], output[-1])
    ctx.numbers = inputs[8:]


def _project_backward(ctx, v_means2d, v_conics, v_colours, v_depths, v_compensations, _v_radii):
    *tensors, radii = ctx.saved_tensors
    gradients = torch.ops.diff_gaussian_rasterization.project_backward(
        v_means2d, v_conics, v_colours, v_depths, v_compensations, radii, *tensors, *ctx.numbers
    )
    gaussians = [None if given is None else v for given, v in zip(tensors[:5], gradients, strict=True)]
    return (*gaussians, *[None] * (3 + len(ctx.numbers)))


torch.library.register_autograd(
    "diff_gaussian_rasterization::project", _project_backward, setup_context=_project_setup_context
)
