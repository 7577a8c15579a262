"""The operators behind every render, registered with torch (schema, CPU and CUDA kernels, fake kernels, autograd).

``fold`` cuts Folded-Gaussians at V times and projects them; ``blend`` draws projected Gaussians front to back by index.
The general rasteriser of :mod:`.general` ends in ``splat``, the same kernels behind a sort by depth.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ._library import load

_ops = torch.ops.diff_gaussian_rasterization


def without_kernels(name: str) -> Callable[..., None]:
    """What a CUDA tensor meets where the library was compiled for the CPU alone."""

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError(
            f"{name}: this library was compiled for the CPU alone, and the tensors are on a GPU. Install the wheel "
            f"with CUDA, or the toolkit of CUDA {torch.version.cuda} (with nvcc), name its folder with CUDA_HOME, "
            "unset MEDGS_FORCE_CPU, and import again"
        )

    return refuse


if load() == "cpu" and torch.version.cuda is not None:
    for _name in ("fold", "blend", "project", "splat", "similarity", "sigma_outside", "observe", "adam_step"):
        torch.library.impl(f"diff_gaussian_rasterization::{_name}", "CUDA", without_kernels(_name))

ACTIVE = 1
"""Bit of ``active``: the time weight delta(t) exceeds 0.1 and the Gaussian is visible."""
ACTIVE_SEGMENTATION = 2
"""Bit of ``active``: the same, and both scales at time t exceed 1e-6 plane units."""


def fold(
    xyz: Tensor,
    w1: Tensor,
    m: Tensor,
    sigma: Tensor,
    scaling: Tensor,
    rotation: Tensor,
    times: Tensor,
    signs: Tensor,
    pixels_per_unit: float,
    width: int,
    height: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cuts N Folded-Gaussians at V times and projects them into V images (MedGS, section 3).

    Args:
        xyz: (N, 3), in-plane centre at t = m in entries 0 and 2, plane units; entry 1 is not read.
        w1: (N, 2 P), coefficients (x, z) of (m - t)^(j+1), j = 0 .. P-1; P = 0 .. 32.
        m, sigma, rotation: (N,), raw: logit of the centre in time, log of the spread in time, logit of the turn.
        scaling: (N, 3), logs of the scales in entries 0 and 2; entry 1 is not read.
        times: (V,), where to cut.
        signs: (V,), +1 for the original side and -1 for the mirror side.
        pixels_per_unit: focal length over the camera's distance.
        width, height: of the images, px.

    Returns:
        means2d (V, N, 2) px; conics (V, N, 3), (a, b, c) of q = a du^2 + 2 b du dv + c dv^2; radii (V, N) int32 px,
        0 where the Gaussian is not visible; active (V, N) uint8, bits :data:`ACTIVE` and :data:`ACTIVE_SEGMENTATION`.
        Gradients flow from means2d and conics to everything raw and to ``times``.

    Raises:
        ValueError, TypeError: a shape, device or dtype that does not fit.
    """
    no_forward_mode("fold", xyz, w1, m, sigma, scaling, rotation, times)
    return _ops.fold(xyz, w1, m, sigma, scaling, rotation, times, signs, pixels_per_unit, width, height)


def blend(
    means2d: Tensor,
    conics: Tensor,
    active: Tensor,
    opacities: Tensor,
    colours: Tensor,
    backgrounds: Tensor,
    views: Sequence[int],
    heads: Sequence[int],
    bits: Sequence[int],
    width: int,
    height: int,
    screen: Tensor | None = None,
    raw: bool = False,
    capacity: int = 0,
    counted: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Draws R renders of V views, front to back by index (Kerbl et al. 2023, equation 3).

    Render r shows view ``views[r]`` with the opacities and colours of head ``heads[r]``, and only Gaussians whose
    ``active`` mask has the bit ``bits[r]``. Heads of one view share its binning.

    Args:
        means2d: (V, N, 2) px, pixel centres are integers.
        conics: (V, N, 3).
        active: (V, N) uint8.
        opacities: (heads, N) in [0, 1].
        colours: (heads, N, C), any number of channels C >= 1 on one opacity per Gaussian: grey, RGB, one per
            label. Up to 18 are blended in one walk over the lists, more in several walks over the same lists.
        backgrounds: (R, C), seen through what transmittance is left.
        screen: (heads, V, N, 2), never read: its gradient is each head's own share of that of ``means2d``, which
            density control asks for.
        raw: ``opacities`` are logits, and ``colours`` coefficients x of max(0, C0 x + 0.5), C0 = 0.28209.
        capacity: on CUDA, make room for that many pairs of Gaussian and tile instead of asking the device how many
            there are, which waits for it. Where there are more, the result is wrong: look at ``counted``.
        counted: (1,) int32, on any device, gets how many pairs there are; pinned, without waiting for the device.

    Returns:
        images (R, C, height, width) and the transmittance left at each pixel (R, height, width). Gradients flow to
        means2d, conics, opacities, colours and backgrounds.
    """
    inputs = (means2d, conics, opacities, colours, backgrounds)
    no_forward_mode("blend", *inputs)
    renders = list(views), list(heads), list(bits)
    keep = wants_gradient(*inputs, screen)
    out = _ops.blend(
        means2d,
        conics,
        active,
        opacities,
        colours,
        backgrounds,
        screen,
        *renders,
        width,
        height,
        raw,
        capacity,
        keep,
    )
    if counted is not None:
        counted.copy_(out[6][-1:], non_blocking=True)
    return out[0], out[1]


def similarity(images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Mean absolute difference, and mean structural similarity (Wang et al. 2004: an 11 x 11 Gaussian window of sigma
    1.5, zero padding, C1 = 0.01^2, C2 = 0.03^2), in one pass. (B, C, H, W) each -> two scalars; gradients to images.
    """
    no_forward_mode("similarity", images, targets)
    l1, ssim, _ = _ops.similarity(images, targets, images.requires_grad)
    return l1, ssim


def sigma_outside(raw: Tensor, low: float, high: float) -> Tensor:
    """Mean of (low - sigma) over the Gaussians with sigma < low, plus mean of (sigma - high) over those with sigma >
    high; a side without Gaussians adds 0. raw: (N,), logs of sigma -> scalar; gradient to raw.
    """
    no_forward_mode("sigma_outside", raw)
    return _ops.sigma_outside(raw, low, high)[0]


def observe(
    radii: Tensor,
    active: Tensor,
    screen_gradients: Tensor,
    m_gradients: Tensor,
    bit: int,
    width: int,
    height: int,
    statistics: Mapping[str, Tensor],
) -> None:
    """Adds V views to the statistics of density control, in place.

    A Gaussian that any view sees (``active`` has ``bit``) counts once: with its largest radius, the largest norm over
    the views of its screen gradient in NDC units, and |m_gradients|.

    Args:
        radii (V, N) int32 px; active (V, N) uint8; screen_gradients (V, N, 2) by px; m_gradients (N, 1).
        width, height: of the images, px.
        statistics: max_radii2D (N,), xyz_gradient_accum, m_gradient_accum, denom and m_denom (N, 1).
    """
    names = ("max_radii2D", "xyz_gradient_accum", "m_gradient_accum", "denom", "m_denom")
    written = [statistics[name] for name in names]
    if any(tensor.is_neg() or tensor.is_conj() for tensor in written):
        # Torch ends the process where an operator without results would write to one.
        raise ValueError("statistics must be plain tensors, not negated or conjugated views")
    _ops.observe(radii, active, screen_gradients, m_gradients, bit, width / 2, height / 2, *written)


class Adam(torch.optim.Adam):
    """torch.optim.Adam, same state and same state_dict, whose step is one call for all parameters."""

    def __init__(
        self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps)

    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        lists: dict[tuple, list[list]] = {}
        for group in self.param_groups:
            constants = (*group["betas"], group["eps"])
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float32)
                    state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
                    state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
                row = (
                    parameter,
                    parameter.grad,
                    state["exp_avg"],
                    state["exp_avg_sq"],
                    state["step"],
                    group["lr"],
                )
                for column, value in zip(lists.setdefault(constants, [[] for _ in row]), row, strict=True):
                    column.append(value)
        with torch.no_grad():
            for constants, columns in lists.items():
                _ops.adam_step(*columns, *constants)
        return loss

    # torch would wrap it for its profiler and for hooks, at a third of what a step costs the host.
    step.hooked = True  # type: ignore[attr-defined]


# ---- shapes, for torch.compile and opcheck ---------------------------------------------------------------------------


def one_device(*tensors: Tensor | None) -> None:
    """The kernels check it for themselves; torch asks for shapes alone where any tensor is on the meta device."""
    devices = {str(tensor.device) for tensor in tensors if tensor is not None}
    if len(devices) > 1:
        raise ValueError(f"all tensors must be on one device, got {' and '.join(sorted(devices))}")


@torch.library.register_fake("diff_gaussian_rasterization::fold")
def _(xyz, w1, m, sigma, scaling, rotation, times, signs, pixels_per_unit, width, height):
    one_device(xyz, w1, m, sigma, scaling, rotation, times, signs)
    v, n = times.shape[0], xyz.shape[0]
    return (
        xyz.new_empty(v, n, 2),
        xyz.new_empty(v, n, 3),
        xyz.new_empty(v, n, dtype=torch.int32),
        xyz.new_empty(v, n, dtype=torch.uint8),
    )


@torch.library.register_fake("diff_gaussian_rasterization::fold_backward")
def _(
    v_means2d,
    v_conics,
    radii,
    xyz,
    w1,
    m,
    sigma,
    scaling,
    rotation,
    times,
    signs,
    pixels_per_unit,
    width,
    height,
):
    return tuple(torch.empty_like(p) for p in (xyz, w1, m, sigma, scaling, rotation, times))


@torch.library.register_fake("diff_gaussian_rasterization::blend")
def _(
    means2d,
    conics,
    active,
    opacities,
    colours,
    backgrounds,
    screen,
    views,
    heads,
    bits,
    width,
    height,
    raw,
    capacity=0,
    keep=True,
):
    one_device(means2d, conics, active, opacities, colours, backgrounds, screen)
    v, n, _ = means2d.shape
    r, c = len(views), colours.shape[2]
    pairs = torch.library.get_ctx().new_dynamic_size()
    ints = {"dtype": torch.int32}
    return (
        means2d.new_empty(r, c, height, width),
        means2d.new_empty(r, height, width),
        means2d.new_empty(r, height, width, **ints),
        means2d.new_empty(v, torch.library.get_ctx().new_dynamic_size(), **ints),
        means2d.new_empty(pairs, **ints),
        means2d.new_empty(pairs, **ints),
        means2d.new_empty(v * n + 1, **ints),
        means2d.new_empty(torch.library.get_ctx().new_dynamic_size() if keep else 0),
    )


@torch.library.register_fake("diff_gaussian_rasterization::blend_backward")
def _(
    v_images,
    v_transmittance,
    images,
    transmittance,
    stops,
    tile_offsets,
    pair_gaussians,
    pair_slots,
    gaussian_offsets,
    starts,
    means2d,
    conics,
    active,
    opacities,
    colours,
    views,
    heads,
    bits,
    width,
    height,
    raw,
):
    v_means2d = means2d.new_empty(opacities.shape[0], *means2d.shape)
    return v_means2d, *(torch.empty_like(p) for p in (conics, opacities, colours))


@torch.library.register_fake("diff_gaussian_rasterization::splat")
def _(
    means2d,
    conics,
    colours,
    depths,
    compensations,
    radii,
    opacities,
    background,
    screen,
    width,
    height,
    inverse,
    count,
    keep=True,
):
    one_device(means2d, conics, colours, depths, compensations, radii, opacities, background, screen)
    n, ints = means2d.shape[0], {"dtype": torch.int32}
    pairs = torch.library.get_ctx().new_dynamic_size()
    return (
        means2d.new_empty(3, height, width),
        means2d.new_empty(1, height, width),
        means2d.new_empty(1, height, width),
        means2d.new_empty(n if count else 0, **ints),
        means2d.new_empty(1, height, width, **ints),
        means2d.new_empty(1, torch.library.get_ctx().new_dynamic_size(), **ints),
        means2d.new_empty(pairs, **ints),
        means2d.new_empty(pairs, **ints),
        means2d.new_empty(n + 1, **ints),
        means2d.new_empty(torch.library.get_ctx().new_dynamic_size() if keep else 0),
        means2d.new_empty(n, **ints),
    )


@torch.library.register_fake("diff_gaussian_rasterization::splat_backward")
def _(
    v_colour,
    v_depth,
    v_transmittance,
    colour,
    depth,
    transmittance,
    stops,
    tile_offsets,
    pair_gaussians,
    pair_slots,
    gaussian_offsets,
    starts,
    order,
    means2d,
    conics,
    colours,
    depths,
    compensations,
    radii,
    opacities,
    width,
    height,
    inverse,
    columns,
):
    of = (means2d, conics, colours, depths, compensations, opacities)
    screen = means2d.new_empty(means2d.shape[0] if columns else 0, columns)
    return *(torch.empty_like(p, memory_format=torch.contiguous_format) for p in of), screen


@torch.library.register_fake("diff_gaussian_rasterization::similarity")
def _(images, targets, with_gradient):
    one_device(images, targets)
    return (
        images.new_empty(()),
        images.new_empty(()),
        images.new_empty(images.shape if with_gradient else (0,)),
    )


@torch.library.register_fake("diff_gaussian_rasterization::sigma_outside")
def _(raw, low, high):
    return raw.new_empty(()), torch.empty_like(raw)


@torch.library.register_fake("diff_gaussian_rasterization::observe")
def _(*arguments):
    one_device(*(argument for argument in arguments if isinstance(argument, Tensor)))


@torch.library.register_fake("diff_gaussian_rasterization::adam_step")
def _(parameters, gradients, first_moments, second_moments, *_):
    one_device(*parameters, *gradients, *first_moments, *second_moments)


# ---- gradients -------------------------------------------------------------------------------------------------------


def differentiated_twice(name: str) -> Callable[..., None]:
    """The gradient of a gradient: an error that says whose, where torch alone would warn and give zeros."""

    def refuse(*_: object) -> None:
        raise NotImplementedError(f"{name} can be differentiated once, not twice")

    return refuse


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether a backward pass may follow."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def no_forward_mode(name: str, *tensors: Tensor | None) -> None:
    """An error where forward-mode derivatives are asked for, which torch would take to be 0."""
    if torch.compiler.is_compiling():
        return
    functorch = torch._C._functorch
    transform = functorch.peek_interpreter_stack()
    asked = transform is not None and transform.key() == functorch.TransformType.Jvp
    if not asked and forward_ad._current_level >= 0:
        asked = any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)
    if asked:
        raise NotImplementedError(f"{name} has reverse-mode gradients only, no forward-mode ones (jvp)")


# Gradients of outputs that nothing used come as None: filling the larger ones with zeros would cost more than some
# kernels do.


def _fold_setup(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:8], output[2])
    ctx.image = inputs[8:]


def _fold_backward(ctx, v_means2d, v_conics, _v_radii, _v_active):
    *inputs, radii = ctx.saved_tensors
    if v_means2d is None and v_conics is None:
        return (None,) * 11
    v, n = radii.shape
    v_means2d = inputs[0].new_zeros(v, n, 2) if v_means2d is None else v_means2d
    v_conics = inputs[0].new_zeros(v, n, 3) if v_conics is None else v_conics
    grads = _ops.fold_backward(v_means2d, v_conics, radii, *inputs, *ctx.image)
    return *grads, None, None, None, None


torch.library.register_autograd(
    "diff_gaussian_rasterization::fold", _fold_backward, setup_context=_fold_setup
)


def _blend_setup(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:5], *output)
    ctx.renders = inputs[7:13]


def _blend_backward(ctx, v_images, v_transmittance, *_):
    inputs, (images, transmittance, *lists) = ctx.saved_tensors[:5], ctx.saved_tensors[5:]
    if v_images is None and v_transmittance is None:
        return (None,) * 15
    v_images = torch.zeros_like(images) if v_images is None else v_images
    v_transmittance = torch.zeros_like(transmittance) if v_transmittance is None else v_transmittance
    v_means2d, v_conics, v_opacities, v_colours = _ops.blend_backward(
        v_images, v_transmittance, images, transmittance, *lists, *inputs, *ctx.renders
    )
    v_backgrounds = None
    if ctx.needs_input_grad[5]:
        # In two steps torch adds in one order, whatever the number of threads.
        v_backgrounds = (v_images * transmittance[:, None]).sum(3).sum(2)
    v_screen = v_means2d if ctx.needs_input_grad[6] else None
    v_means2d = v_means2d[0] if len(v_means2d) == 1 else v_means2d.sum(0)
    return v_means2d, v_conics, None, v_opacities, v_colours, v_backgrounds, v_screen, *[None] * 8


torch.library.register_autograd(
    "diff_gaussian_rasterization::blend", _blend_backward, setup_context=_blend_setup
)


def _splat_setup(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    colour, depth, transmittance, _, *lists = output
    ctx.save_for_backward(colour, depth, transmittance, *lists, *inputs[:7])
    screen = inputs[8]
    ctx.columns = 0 if screen is None else screen.shape[1]
    ctx.image = inputs[9:12]


def _splat_backward(ctx, v_colour, v_depth, v_transmittance, *_):
    if v_colour is None and v_depth is None and v_transmittance is None:
        return (None,) * 14
    columns = ctx.columns if ctx.needs_input_grad[8] else 0
    *gradients, v_screen = _ops.splat_backward(
        v_colour, v_depth, v_transmittance, *ctx.saved_tensors, *ctx.image, columns
    )
    v_means2d, v_conics, v_colours, v_depths, v_compensations, v_opacities = gradients
    v_background = None
    if ctx.needs_input_grad[7] and v_colour is not None:
        # In two steps torch adds in one order, whatever the number of threads.
        v_background = (v_colour * ctx.saved_tensors[2]).sum(2).sum(1)
    return (
        v_means2d, v_conics, v_colours, v_depths, v_compensations, None, v_opacities, v_background,
        v_screen if columns else None, *[None] * 5,
    )  # fmt: skip


torch.library.register_autograd(
    "diff_gaussian_rasterization::splat", _splat_backward, setup_context=_splat_setup
)


for _name in ("fold", "blend"):
    torch.library.register_autograd(
        f"diff_gaussian_rasterization::{_name}_backward", differentiated_twice(_name)
    )
torch.library.register_autograd(
    "diff_gaussian_rasterization::splat_backward", differentiated_twice("the rasteriser")
)


def _similarity_setup(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:2], output[2])


def _similarity_backward(ctx, v_l1, v_ssim, v_gradient):
    if v_gradient is not None:
        raise NotImplementedError("similarity can be differentiated once, not twice")
    images, targets, gradient = ctx.saved_tensors
    v_images = None
    if v_l1 is not None:
        v_images = (images - targets).sign_().mul_(v_l1 / images.numel())
    if v_ssim is not None:
        share = gradient * (v_ssim / images.numel())
        v_images = share if v_images is None else v_images.add_(share)
    return v_images, None, None


torch.library.register_autograd(
    "diff_gaussian_rasterization::similarity", _similarity_backward, setup_context=_similarity_setup
)


def _sigma_setup(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1])


def _sigma_backward(ctx, v_loss, v_gradient):
    if v_gradient is not None:
        raise NotImplementedError("sigma_outside can be differentiated once, not twice")
    (gradient,) = ctx.saved_tensors
    return None if v_loss is None else gradient * v_loss, None, None


torch.library.register_autograd(
    "diff_gaussian_rasterization::sigma_outside", _sigma_backward, setup_context=_sigma_setup
)
