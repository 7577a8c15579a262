"""The two operators behind every render, registered with torch (schema, CPU and CUDA kernels, fake kernels, autograd).

``fold`` cuts Folded-Gaussians at V times and projects them; ``blend`` draws projected Gaussians front to back by index.
The general rasteriser of :mod:`.general` ends in the same ``blend``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._library import load

load()
_ops = torch.ops.diff_gaussian_rasterization

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
) -> tuple[Tensor, Tensor]:
    """Draws R renders of V views, front to back by index (Kerbl et al. 2023, equation 3).

    Render r shows view ``views[r]`` with the opacities and colours of head ``heads[r]``, and only Gaussians whose
    ``active`` mask has the bit ``bits[r]``. Heads of one view share its binning.

    Args:
        means2d: (V, N, 2) px, pixel centres are integers.
        conics: (V, N, 3).
        active: (V, N) uint8.
        opacities: (heads, N) in [0, 1].
        colours: (heads, N, C), C = 1 .. 4.
        backgrounds: (R, C), seen through what transmittance is left.
        screen: (heads, V, N, 2), never read: its gradient is each head's own share of that of ``means2d``, which
            density control asks for.

    Returns:
        images (R, C, height, width) and the transmittance left at each pixel (R, height, width). Gradients flow to
        means2d, conics, opacities, colours and backgrounds.
    """
    renders = list(views), list(heads), list(bits)
    out = _ops.blend(means2d, conics, active, opacities, colours, backgrounds, screen, *renders, width, height)
    return out[0], out[1]


# ---- shapes, for torch.compile and opcheck ---------------------------------------------------------------------------


@torch.library.register_fake("diff_gaussian_rasterization::fold")
def _(xyz, w1, m, sigma, scaling, rotation, times, signs, pixels_per_unit, width, height):
    v, n = times.shape[0], xyz.shape[0]
    return (
        xyz.new_empty(v, n, 2),
        xyz.new_empty(v, n, 3),
        xyz.new_empty(v, n, dtype=torch.int32),
        xyz.new_empty(v, n, dtype=torch.uint8),
    )


@torch.library.register_fake("diff_gaussian_rasterization::fold_backward")
def _(v_means2d, v_conics, radii, xyz, w1, m, sigma, scaling, rotation, times, signs, pixels_per_unit, width, height):
    return tuple(torch.empty_like(p) for p in (xyz, w1, m, sigma, scaling, rotation, times))


@torch.library.register_fake("diff_gaussian_rasterization::blend")
def _(means2d, conics, active, opacities, colours, backgrounds, screen, views, heads, bits, width, height):
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
):
    v_means2d = means2d.new_empty(opacities.shape[0], *means2d.shape)
    return v_means2d, *(torch.empty_like(p) for p in (conics, opacities, colours))


# ---- gradients -------------------------------------------------------------------------------------------------------


def _fold_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:8], output[2])
    ctx.image = inputs[8:]


def _fold_backward(ctx, v_means2d, v_conics, _v_radii, _v_active):
    *inputs, radii = ctx.saved_tensors
    v, n = radii.shape
    v_means2d = inputs[0].new_zeros(v, n, 2) if v_means2d is None else v_means2d
    v_conics = inputs[0].new_zeros(v, n, 3) if v_conics is None else v_conics
    grads = _ops.fold_backward(v_means2d, v_conics, radii, *inputs, *ctx.image)
    return *grads, None, None, None, None


torch.library.register_autograd("diff_gaussian_rasterization::fold", _fold_backward, setup_context=_fold_setup)


def _blend_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:5], *output)
    ctx.renders = inputs[7:]


def _blend_backward(ctx, v_images, v_transmittance, *_):
    *inputs, images, transmittance, stops, tile_offsets, gaussians, slots, offsets = ctx.saved_tensors
    v_images = torch.zeros_like(images) if v_images is None else v_images
    v_transmittance = torch.zeros_like(transmittance) if v_transmittance is None else v_transmittance
    state = (images, transmittance, stops, tile_offsets, gaussians, slots, offsets)
    v_means2d, v_conics, v_opacities, v_colours = _ops.blend_backward(
        v_images, v_transmittance, *state, *inputs, *ctx.renders
    )
    v_backgrounds = None
    if ctx.needs_input_grad[5]:
        v_backgrounds = (v_images * transmittance[:, None]).sum((2, 3))
    v_screen = v_means2d if ctx.needs_input_grad[6] else None
    v_means2d = v_means2d[0] if len(v_means2d) == 1 else v_means2d.sum(0)
    return v_means2d, v_conics, None, v_opacities, v_colours, v_backgrounds, v_screen, *[None] * 5


torch.library.register_autograd("diff_gaussian_rasterization::blend", _blend_backward, setup_context=_blend_setup)
