"""The drop-in rasteriser of 3-D Gaussians: any pinhole, spherical harmonics, antialiasing, depth, poses that learn.

Two compiled operators: ``project`` turns 3-D Gaussians into footprints in the image (EWA splatting, Zwicker et al.
2001, with the conventions of Kerbl et al. 2023), and ``splat`` sorts footprints by depth and draws them front to back,
with the kernels of the folded rasteriser. Names and shapes of the interface are those that programs of the field use;
the README lists which program needs which option.

Conventions: matrices are in the row-vector (transposed) convention, ``p_view = [p, 1] @ viewmatrix``; the
view looks along +z with x right and y down; pixel centres lie on integers; float32 or float64, on CPU or
CUDA.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .ops import differentiated_twice, no_forward_mode, one_device, wants_gradient

NEAR_PLANE = 0.2  # what is at this view-space depth or nearer is not drawn; kNearPlane in csrc/common
LOW_PASS = 0.3  # px^2, kLowPass in csrc/common

RETURNS = {
    "radii": "(colour, radii), as in 2023",
    "inverse_depth": "(colour, radii, inverse depth), as since October 2024: the default",
    "depth": "(colour, radii, depth)",
    "depth_alpha": "(colour, radii, depth, alpha)",
    "touched": "(colour, radii, depth, alpha, touched), as MonoGS has it",
}
RETURNS_VARIABLE = "DIFF_GAUSSIAN_RASTERIZATION_RETURNS"
_returns: list[str] = []  # what `returning` set, innermost last


class GaussianRasterizationSettings(NamedTuple):
    """A camera and how to draw through it. Matrices may have a leading 1, as (1, 4, 4)."""

    image_height: int
    image_width: int
    tanfovx: float  # tan of half the horizontal field of view
    tanfovy: float
    bg: Tensor  # (3,) background colour
    scale_modifier: float  # factor on all scales; covariances that are given are taken as they are
    viewmatrix: Tensor  # (4, 4) world to view; gets a gradient where it requires one
    projmatrix: Tensor  # (4, 4) world to clip: the view and the projection in one
    sh_degree: int  # 0 to 3, of the coefficients in use
    campos: Tensor  # (3,) camera centre, world; gets a gradient where it requires one
    prefiltered: bool = (
        False  # part of the field's interface; changes nothing, the invisible is always culled
    )
    debug: bool = False  # part of the field's interface; changes nothing
    antialiasing: bool = False  # opacity makes up for the low-pass filter that every footprint is widened by
    returns: str | None = None  # one of RETURNS; None: what `returning` or the environment says
    normalise_rotations: bool = True  # False: quaternions of any length scale, as in the published kernel
    kernel_size: float = LOW_PASS  # px^2, the low-pass filter (Mip-Splatting's 2D filter, with antialiasing)
    subpixel_offset: Tensor | None = None  # (H, W, 2) px, the same at every pixel


@contextlib.contextmanager
def returning(form: str) -> Iterator[None]:
    """Within it rasterisers return that form of RETURNS, unless their settings say otherwise."""
    _returns.append(_known_form(form, "returning"))
    try:
        yield
    finally:
        _returns.pop()


def _known_form(form: str, where: str) -> str:
    if form not in RETURNS:
        raise ValueError(f"{where}: {form!r} is not one of {', '.join(RETURNS)}")
    return form


def _form(settings: GaussianRasterizationSettings) -> str:
    """Settings before `returning` before the environment before the default."""
    if settings.returns is not None:
        return _known_form(settings.returns, "settings.returns")
    if _returns:
        return _returns[-1]
    return _known_form(os.environ.get(RETURNS_VARIABLE) or "inverse_depth", RETURNS_VARIABLE)


class GaussianRasterizer(nn.Module):
    """Draws 3-D Gaussians as one camera sees them."""

    def __init__(self, raster_settings: GaussianRasterizationSettings) -> None:
        super().__init__()
        self.raster_settings = raster_settings

    def markVisible(self, positions: Tensor) -> Tensor:
        """Which of ``positions`` (N, 3) lie beyond the near plane: bool (N,)."""
        return mark_visible(positions, self.raster_settings.viewmatrix)

    def visible_filter(
        self,
        means3D: Tensor,
        scales: Tensor | None = None,
        rotations: Tensor | None = None,
        cov3D_precomp: Tensor | None = None,
    ) -> Tensor:
        """The radii (N,) int32 in px that drawing these Gaussians would give, 0 for the invisible; nothing is drawn."""
        with torch.no_grad():
            scene = _Scene.of(means3D, None, scales, rotations, cov3D_precomp, self.raster_settings)
            return _project(scene, self.raster_settings)[5]

    def forward(
        self,
        means3D: Tensor,
        means2D: Tensor | None,
        opacities: Tensor,
        shs: Tensor | None = None,
        colors_precomp: Tensor | None = None,
        scales: Tensor | None = None,
        rotations: Tensor | None = None,
        cov3D_precomp: Tensor | None = None,
        theta: Tensor | None = None,
        rho: Tensor | None = None,
        dc: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """See :func:`rasterize_gaussians`, which has the shapes.

        Also ``dc`` (N, 1, 3), the first coefficients where ``shs`` (N, K - 1, 3) holds the rest; ``theta`` and ``rho``
        (3,), a turn and a shift of the camera's frame after the view, of which only the gradients at 0 are used.
        """
        settings = self.raster_settings
        if theta is not None or rho is not None:
            settings = _moved(settings, theta, rho)
        if dc is not None:
            shs = dc if shs is None or _absent(shs) else torch.cat([dc, shs], dim=1)
        return rasterize_gaussians(
            means3D, means2D, shs, colors_precomp, opacities, scales, rotations, cov3D_precomp, settings
        )


def mark_visible(positions: Tensor, viewmatrix: Tensor) -> Tensor:
    """Which of ``positions`` (N, 3) lie beyond the near plane of ``viewmatrix`` (4, 4): bool (N,)."""
    with torch.no_grad():
        viewmatrix = viewmatrix.to(positions).reshape(4, 4)
        return positions @ viewmatrix[:3, 2] + viewmatrix[3, 2] > NEAR_PLANE


def rasterize_gaussians(
    means3D: Tensor,
    means2D: Tensor | None,
    sh: Tensor | None,
    colors_precomp: Tensor | None,
    opacities: Tensor,
    scales: Tensor | None,
    rotations: Tensor | None,
    cov3Ds_precomp: Tensor | None,
    raster_settings: GaussianRasterizationSettings,
) -> tuple[Tensor, ...]:
    """Draw N Gaussians. An argument that does not apply is None or ``torch.Tensor([])``.

    Args:
        means3D: (N, 3) centres, world.
        means2D: (N, 3) or (N, 2): its gradient is that with respect to the screen position in NDC, 0 in a third
            column. (N, 4): the third and fourth column get the absolute gradient, the sum of the magnitudes of what
            each pixel adds to the first two (AbsGS, GOF). Its values are never read. None where no one asks for it.
        sh: (N, K, 3) spherical harmonics, K >= (sh_degree + 1)^2: colour = max(0, sum + 0.5), seen from
            ``campos``.
        colors_precomp: (N, 3) colours, instead of ``sh``.
        opacities: (N, 1), (N,) or (1, N, 1) in [0, 1].
        scales: (N, 3) standard deviations.
        rotations: (N, 4) quaternions w x y z. They are normalised here, and so is their gradient, unless
            ``normalise_rotations`` is False.
        cov3Ds_precomp: (N, 6) covariances xx xy xz yy yz zz, instead of ``scales`` and ``rotations``.
        raster_settings: the camera. ``viewmatrix``, ``projmatrix`` and ``campos`` get gradients where they require
            them; where ``projmatrix`` does not, it is taken to move with the view.

    Returns:
        colour (3, H, W); radii (N,) int32 in px, 0 for a Gaussian that is not visible; inverse depth (1, H, W),
        blended as a colour is over a background of 0. Other forms, see RETURNS: depth likewise, and alpha (1, H, W),
        one minus the transmittance. All images pass gradients on to every Gaussian argument. Touched (N,) int32 counts
        the pixels that a Gaussian is drawn at while more than half of the transmittance is left in front of it.

    Raises:
        ValueError: not exactly one form of colour and one of covariance, or a shape or device that does not
            fit.
        TypeError: Gaussians of different dtypes, or something that is no tensor.
        NotImplementedError: forward-mode derivatives, and derivatives of derivatives.
    """
    settings, form = raster_settings, _form(raster_settings)
    sh, colors_precomp, scales, rotations, cov3Ds_precomp = (
        None if _absent(argument) else argument
        for argument in (sh, colors_precomp, scales, rotations, cov3Ds_precomp)
    )
    if (sh is None) == (colors_precomp is None):
        raise ValueError("give exactly one of shs and colors_precomp")
    given = {"means3D": means3D, "means2D": means2D, "shs": sh, "colors_precomp": colors_precomp}
    given |= {
        "opacities": opacities,
        "scales": scales,
        "rotations": rotations,
        "cov3D_precomp": cov3Ds_precomp,
    }
    for name, value in given.items():
        if value is None and name not in ("means3D", "opacities"):
            continue
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{name} must be a torch.Tensor, got {type(value).__module__}.{type(value).__name__}"
            )
        if value.dtype != means3D.dtype:
            raise TypeError(f"{name} must be {means3D.dtype} as means3D is, got {value.dtype}")
    no_forward_mode("the rasteriser", *(value for value in given.values() if value is not None))
    n = len(means3D)
    if colors_precomp is not None and colors_precomp.shape != (n, 3):
        raise ValueError(f"colors_precomp must have shape ({n}, 3), got {tuple(colors_precomp.shape)}")
    if opacities.shape not in ((n,), (n, 1), (1, n, 1)):
        raise ValueError(f"opacities must have shape ({n}, 1), got {tuple(opacities.shape)}")
    if means2D is not None and means2D.shape not in ((n, 3), (n, 2), (n, 4)):
        raise ValueError(f"means2D must have shape ({n}, 3), got {tuple(means2D.shape)}")

    width, height = int(settings.image_width), int(settings.image_height)
    scene = _Scene.of(means3D, sh, scales, rotations, cov3Ds_precomp, settings)
    means2d, conics, colours, depths, compensations, radii = _project(scene, settings)
    if settings.subpixel_offset is not None:
        means2d = means2d - _one_offset(settings.subpixel_offset, width, height).to(means2d)
    if colors_precomp is not None:
        colours = colors_precomp
    background = settings.bg.to(means3D).reshape(3)
    screen = means2D if means2D is not None and means2D.requires_grad else None
    inputs = (means2d, conics, colours, depths, compensations, radii, opacities, background, screen)
    colour, depth, transmittance, touched, *_ = torch.ops.diff_gaussian_rasterization.splat(
        *inputs, width, height, form in ("inverse_depth", "radii"), form == "touched", wants_gradient(*inputs)
    )
    if form == "radii":
        return colour, radii
    if form == "depth_alpha":
        return colour, radii, depth, 1 - transmittance
    if form == "touched":
        return colour, radii, depth, 1 - transmittance, touched
    return colour, radii, depth


def _absent(argument: Tensor | None) -> bool:
    return argument is None or (isinstance(argument, Tensor) and argument.shape == (0,))


@functools.lru_cache(maxsize=16)
def _half(width: int, height: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """px in one unit of NDC: (2,). Kept, as to make one waits for the device."""
    return torch.tensor([width / 2, height / 2], dtype=dtype, device=device)


def _one_offset(offset: Tensor, width: int, height: int) -> Tensor:
    """The offset that all pixels share."""
    if offset.shape != (height, width, 2):
        raise ValueError(f"subpixel_offset must have shape ({height}, {width}, 2), got {tuple(offset.shape)}")
    if not bool((offset == offset[:1, :1]).all()):
        raise ValueError("subpixel_offset must be the same at every pixel")
    return offset[0, 0]


class _Scene(NamedTuple):
    """Gaussians and the camera that sees them, as ``project`` takes them."""

    means: Tensor  # (N, 3)
    scales: Tensor | None
    rotations: Tensor | None
    covariances: Tensor | None
    shs: Tensor | None
    viewmatrix: Tensor  # (4, 4)
    projmatrix: Tensor  # (4, 4)
    campos: Tensor  # (3,)

    @staticmethod
    def of(
        means: Tensor,
        shs: Tensor | None,
        scales: Tensor | None,
        rotations: Tensor | None,
        covariances: Tensor | None,
        settings: GaussianRasterizationSettings,
    ) -> _Scene:
        view, projection = (
            matrix.to(means).reshape(4, 4) if matrix.numel() == 16 else matrix
            for matrix in (settings.viewmatrix, settings.projmatrix)
        )
        scene = _Scene(
            means, scales, rotations, covariances, shs, view, projection, settings.campos.to(means).reshape(3)
        )
        if not settings.normalise_rotations and scales is not None and rotations is not None:
            factors = (
                _rotation_matrices(rotations) * (settings.scale_modifier * scales)[:, None, :]
            )  # [N, 3, 3]
            scene = scene._replace(scales=None, rotations=None, covariances=_six(factors @ factors.mT))
        return scene


def _project(scene: _Scene, settings: GaussianRasterizationSettings) -> tuple[Tensor, ...]:
    """``project``, with gradients by the camera where it requires them."""
    if not any(matrix.requires_grad for matrix in (scene.viewmatrix, scene.projmatrix, scene.campos)):
        return _project_seen(scene, settings)
    # The camera stays where it is, and the Gaussians are brought before it: what moves them is differentiable.
    view, projection = scene.viewmatrix, scene.projmatrix
    turn, shift = view[:3, :3], view[3, :3]
    covariances = scene.covariances
    if scene.scales is not None and scene.rotations is not None:
        units = torch.nn.functional.normalize(scene.rotations, dim=1)
        factors = _rotation_matrices(units) * (settings.scale_modifier * scene.scales)[:, None, :]
        covariances = _six(factors @ factors.mT)
    if covariances is None:
        raise ValueError("give exactly one of scales with rotations and cov3D_precomp")
    full = covariances[:, [0, 1, 2, 1, 3, 4, 2, 4, 5]].reshape(-1, 3, 3)
    fixed = projection.detach()
    in_view = _Scene(
        scene.means @ turn + shift, None, None, _six(turn.T @ full @ turn), None,
        torch.eye(4, dtype=view.dtype, device=view.device),
        torch.linalg.solve(view.detach(), fixed), torch.zeros_like(scene.campos),
    )  # fmt: skip
    means2d, conics, colours, depths, compensations, radii = _project_seen(in_view, settings)
    if projection.requires_grad:  # a matrix of its own: the place on the screen comes from it
        clip = scene.means @ projection[:3] + projection[3]  # [N, 4]
        size = 2 * _half(settings.image_width, settings.image_height, clip.dtype, clip.device)
        ndc = clip[:, :2] / torch.where(radii > 0, clip[:, 3], 1)[:, None]
        means2d = torch.where((radii > 0)[:, None], ((ndc + 1) * size - 1) / 2, 0)
    if scene.shs is not None:  # of the direction, which the centre and the camera's centre share
        still = view.detach()
        here = torch.eye(4, dtype=view.dtype, device=view.device)
        here[3, :3] = scene.campos.detach()
        centred = scene._replace(
            means=scene.means - scene.campos, viewmatrix=here @ still, projmatrix=here @ fixed,
            campos=torch.zeros_like(scene.campos),
        )  # fmt: skip
        colours = _project_seen(centred, settings)[2]
    return means2d, conics, colours, depths, compensations, radii


def _project_seen(scene: _Scene, settings: GaussianRasterizationSettings) -> tuple[Tensor, ...]:
    return torch.ops.diff_gaussian_rasterization.project(
        *scene[:5],
        *scene[5:],
        float(settings.tanfovx),
        float(settings.tanfovy),
        float(settings.scale_modifier),
        int(settings.image_width),
        int(settings.image_height),
        settings.sh_degree,
        bool(settings.antialiasing),
        float(settings.kernel_size),
    )


def _rotation_matrices(quaternions: Tensor) -> Tensor:
    """(N, 3, 3) of quaternions w x y z (N, 4), by the formula for units whatever their length."""
    w, x, y, z = quaternions.unbind(1)
    rows = [
        1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y),
    ]  # fmt: skip
    return torch.stack(rows, 1).reshape(-1, 3, 3)


def _six(matrices: Tensor) -> Tensor:
    """(N, 6) entries xx xy xz yy yz zz of symmetric matrices (N, 3, 3)."""
    return matrices.reshape(-1, 9)[:, [0, 1, 2, 4, 5, 8]]


def _moved(
    settings: GaussianRasterizationSettings, theta: Tensor | None, rho: Tensor | None
) -> GaussianRasterizationSettings:
    """The camera after a turn ``theta`` and a shift ``rho`` of its own frame, of which only the gradients count: both
    are taken at 0, where p_view' = p_view + theta x p_view + rho."""
    view = settings.viewmatrix.reshape(4, 4)
    zero = view.new_zeros(3)
    a, b, c = (zero if theta is None else (theta - theta.detach()).to(view)).reshape(3).unbind()
    shift = zero if rho is None else (rho - rho.detach()).to(view).reshape(3)
    o = torch.zeros_like(a)
    turn = torch.stack([o, c, -b, -c, o, a, b, -a, o]).reshape(3, 3)  # p @ turn = theta x p
    moved = view[:, :3] + view[:, :3] @ turn + torch.cat([torch.zeros_like(view[:3, :3]), shift[None]])
    view = torch.cat([moved, view[:, 3:]], dim=1)
    campos = -view[3, :3] @ torch.linalg.inv(view[:3, :3])
    return settings._replace(viewmatrix=view, campos=campos)


# The operator `project` to autograd and to tracing. Its inputs, in the order of the schema: means3d, scales,
# quaternions, covariances, shs, viewmatrix, projmatrix, campos, then numbers. Cameras get
# their gradients from _project, above.


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
torch.library.register_autograd(
    "diff_gaussian_rasterization::project_backward", differentiated_twice("the projection")
)
