"""Cut the model at times and splat the cuts: the one way from a model to images, in training and rendering."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from scene.cameras import Camera
from scene.gaussian_model import IMAGE, GaussianModel
from utils.errors import UserError

ACTIVE = 1
"""Bit of the activity mask: delta(t) > 0.1, and visible."""
ACTIVE_SEGMENTATION = 2
"""Bit of the activity mask: the same, and both scales at time t above 1e-6; the test of segmentation renders."""

MAX_RENDERS = 64
"""In one call of the compiled rasteriser: kMaxRenders in csrc/common/arguments.h."""

RASTERIZERS = {"compiled": "diff_gaussian_rasterization", "oracle": "gaussian_renderer.oracle"}


@dataclass(frozen=True)
class Render:
    """One image to draw: which of the views, with the colours and opacities of which head, by which activity test."""

    view: int
    head: str = IMAGE
    test: int = ACTIVE


@dataclass(frozen=True)
class Renders:
    images: Tensor  # (R, C, H, W)
    screen: (
        Tensor | None
    )  # (heads, V, N, 2); its gradient is each head's dL/d(centre in px), for density control
    radii: Tensor  # (V, N) int32 px, 0 where not visible
    active: Tensor  # (V, N) uint8, bits ACTIVE and ACTIVE_SEGMENTATION


def rasterizer(name: str) -> ModuleType:
    """The module with ``fold``, ``blend`` and what else a step needs: "compiled", or "oracle", without a compiler."""
    try:
        return importlib.import_module(RASTERIZERS[name])
    except ImportError as error:  # its text says what is missing and what to do
        raise UserError(str(error)) from error


def render(
    model: GaussianModel,
    camera: Camera,
    positions: Sequence[float] | Tensor,
    mirrored: Sequence[bool] | Tensor,
    renders: Sequence[Render],
    background: Tensor,
    backend: str = "compiled",
    screen_gradients: bool = False,
    capacity: int = 0,
    counted: Tensor | None = None,
) -> Renders:
    """Draws ``renders`` of the views at ``positions`` (frame index plus fraction), each original or ``mirrored``.

    background: (C,) in [0, 1]. All views share one fold and one blend; heads of one view share its binning. The heads
    of ``screen`` are in the order of their first render. ``capacity`` and ``counted``: see ``blend``.
    """
    ops = rasterizer(backend)
    heads = tuple(dict.fromkeys(r.head for r in renders))
    p = model.params
    if not isinstance(mirrored, Tensor):
        mirrored = torch.tensor(mirrored, dtype=torch.float32).to(model.device, non_blocking=True)
    means2d, conics, radii, active = ops.fold(
        p["xyz"],
        p["w1"],
        p["m"].flatten(),
        p["sigma"].flatten(),
        p["scaling"],
        p["rotation"].flatten(),
        model.times(positions),
        1 - 2 * mirrored.to(p["xyz"].dtype),
        camera.pixels_per_unit,
        camera.width,
        camera.height,
    )
    screen = None
    if screen_gradients:
        screen = means2d.new_zeros(()).expand(len(heads), *means2d.shape).requires_grad_()  # never read
    images, _ = ops.blend(
        means2d,
        conics,
        active,
        model.raw_opacities(heads),
        model.raw_colours(heads, camera),
        background.expand(len(renders), -1),
        [r.view for r in renders],
        [heads.index(r.head) for r in renders],
        [r.test for r in renders],
        camera.width,
        camera.height,
        screen,
        raw=True,
        **({"capacity": capacity, "counted": counted} if counted is not None else {}),
    )
    return Renders(images, screen, radii, active)


@torch.no_grad()
def render_frames(
    model: GaussianModel,
    camera: Camera,
    positions: Sequence[float],
    background: Tensor,
    head: str = IMAGE,
    test: int = ACTIVE,
    backend: str = "compiled",
) -> Tensor:
    """Images (V, C, H, W) in [0, 1] at ``positions``, original side, without gradients."""
    renders = [Render(v, head, test) for v in range(len(positions))]
    images = render(model, camera, positions, [False] * len(positions), renders, background, backend).images
    return images.clamp(0, 1)
