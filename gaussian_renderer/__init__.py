"""Cut the model at times and splat the cuts: the only path from a model to images, in training and rendering."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from gaussian_renderer.oracle import LOW_PASS
from gaussian_renderer.slab import fold_slab
from scene.cameras import Camera
from scene.gaussian_model import GaussianModel
from scene.parameters import IMAGE
from utils.errors import UserError
from utils.spherical_harmonics import to_colour
from utils.stages import stage

ACTIVE = 1
"""Bit of the activity mask: delta(t) > 0.1, and visible."""
ACTIVE_SEGMENTATION = 2
"""Bit of the activity mask: the same, and both scales at time t above 1e-6; the test of segmentation renders."""

MIN_COMPENSATION = 2.5e-5  # floor under the ratio in `compensations`; kMinCompensation in the operators
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
class Rendered:
    """What `render` returns."""

    images: Tensor
    """(R, C, H, W), C that of the head with the most channels; a head's own come first."""
    screen: Tensor | None
    """(heads, V, N, 2); its gradient is each head's dL/d(centre in px), for density control."""
    radii: Tensor  # (V, N) int32 px, 0 where not visible
    active: Tensor  # (V, N) uint8, bits ACTIVE and ACTIVE_SEGMENTATION


def rasterizer(name: str) -> ModuleType:
    """The module with ``fold``, ``blend`` and all else a step needs: "compiled", or "oracle", without a compiler."""
    try:
        return importlib.import_module(RASTERIZERS[name])
    except ImportError as error:  # its text says what is missing and what to do
        raise UserError(
            f"{error}, or run with --rasterizer oracle, the slow form in plain PyTorch"
        ) from error


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
    antialiasing: bool = False,
    clock: tuple[Tensor, Tensor] | None = None,
    thickness: float = 0.0,
    thick: int | None = None,
) -> Rendered:
    """Draws ``renders`` of the views at ``positions`` (frame index plus fraction), each original or ``mirrored``.

    background: (C,) in [0, 1], behind the image head; nothing is behind a label map. All views share one fold and one
    blend; heads of one view share its binning. The heads of ``screen`` are in the order of their first render.
    ``capacity`` and ``counted``: see ``blend``.

    antialiasing: opacities are multiplied by `compensations`. They then differ from view to view, so each view has
    its own blend; ``capacity`` and ``counted`` belong to a single blend, and cannot be given.

    clock: the views' times (V,) and signs (V,), -1 for the mirror side, where the caller has them already.

    thickness: draws the first ``thick`` views (default: all) as slices of this thickness, in mean distances between
    frames (`slab.fold_slab`); each view has its own blend then, too.
    """
    if counted is not None and (antialiasing or thickness):
        raise ValueError("counted is for a single blend, and antialiasing and thickness need one per view")
    ops = rasterizer(backend)
    heads = tuple(dict.fromkeys(r.head for r in renders))
    p = model.params
    if not isinstance(mirrored, Tensor):
        mirrored = torch.tensor(mirrored, dtype=torch.float32).to(model.device, non_blocking=True)
    with stage("fold"):
        times, signs = clock or (model.times(positions), 1 - 2 * mirrored.to(p["xyz"].dtype))
        means2d, conics, radii, active = ops.fold(
            p["xyz"],
            p["w1"],
            p["m"].flatten(),
            p["sigma"].flatten(),
            p["scaling"],
            p["rotation"].flatten(),
            times,
            signs,
            camera.pixels_per_unit,
            camera.width,
            camera.height,
        )
        weights = compensations(conics) if antialiasing else None
        if thickness:
            slabs = fold_slab(
                p,
                times[:thick],
                signs[:thick],
                camera,
                thickness * model.durations()[:-1].mean().detach(),
            )
            thin = means2d, conics, radii, active
            means2d, conics, radii, active = (
                torch.cat([slab, cut[len(slab) :]]) for slab, cut in zip(slabs[:4], thin, strict=True)
            )
            factors = slabs[4] if weights is None else slabs[4] * weights[: len(slabs[4])]
            others = torch.ones_like(means2d[..., 0]) if weights is None else weights
            weights = torch.cat([factors, others[len(factors) :]])
    screen = None
    if screen_gradients:
        screen = means2d.new_zeros(()).expand(len(heads), *means2d.shape).requires_grad_()  # never read

    def blend(
        cut: Sequence[Tensor],
        opacities: Tensor,
        colours: Tensor,
        shown: Sequence[Render],
        screen: Tensor | None,
        **more: Any,
    ) -> Tensor:
        with stage("blend"):
            images, _ = ops.blend(
                *cut,
                opacities,
                colours,
                _backgrounds(model, background, shown, colours.shape[2]),
                [r.view for r in shown],
                [heads.index(r.head) for r in shown],
                [r.test for r in shown],
                camera.width,
                camera.height,
                screen,
                **more,
            )
        return images

    cuts = means2d, conics, active
    raw_opacities, raw_colours = model.raw_opacities(heads), model.raw_colours(heads, camera)
    if weights is None:
        room = {"capacity": capacity, "counted": counted} if counted is not None else {}
        images = blend(cuts, raw_opacities, raw_colours, renders, screen, raw=True, **room)
        return Rendered(images, screen, radii, active)

    opacities, colours = torch.sigmoid(raw_opacities), to_colour(raw_colours)
    screens = [None] * len(means2d) if screen is None else screen.split(1, dim=1)
    views = zip(*(tensor.split(1) for tensor in cuts), strict=True)
    drawn: dict[int, Tensor] = {}  # place in ``renders`` -> (C, H, W)
    for view, (cut, factors, own) in enumerate(zip(views, weights, screens, strict=True)):
        shown = {place: replace(r, view=0) for place, r in enumerate(renders) if r.view == view}
        if shown:
            own_images = blend(cut, opacities * factors, colours, list(shown.values()), own)
            drawn.update(zip(shown, own_images, strict=True))
    return Rendered(torch.stack([drawn[place] for place in range(len(renders))]), screen, radii, active)


def _backgrounds(
    model: GaussianModel, background: Tensor, renders: Sequence[Render], channels: int
) -> Tensor:
    """(R, C), behind each render."""
    if model.labels is None:
        return background.expand(len(renders), -1)
    behind = [model.background_of(r.head, background) for r in renders]
    return torch.stack([pad(own, (0, channels - len(own))) for own in behind])


def compensations(conics: Tensor) -> Tensor:
    """What opacities are multiplied by to make up for the low-pass filter, which widens a footprint so that small
    Gaussians cover more than they should: sqrt(max(2.5e-5, det(Cov) / det(Cov + 0.3 I))). (..., 3) -> (...) in (0, 1].

    conics: entries a, b, c of (Cov + 0.3 I)^-1, as ``fold`` gives them. The ratio is det(I - 0.3 (Cov + 0.3 I)^-1): no
    covariance to invert, and an error of a few roundings of 1, where the least ratio is 2.5e-5.
    """
    a, b, c = (LOW_PASS * conics).unbind(-1)
    # NaN is not drawn, and would make its gradient NaN too.
    ratio = ((1 - a) * (1 - c) - b * b).nan_to_num(0)
    return ratio.clamp_min(MIN_COMPENSATION).sqrt()


@torch.no_grad()
def render_frames(
    model: GaussianModel,
    camera: Camera,
    positions: Sequence[float],
    background: Tensor,
    head: str = IMAGE,
    test: int = ACTIVE,
    backend: str = "compiled",
    antialiasing: bool = False,
    thickness: float = 0.0,
) -> Tensor:
    """Images (V, C, H, W) in [0, 1] at ``positions``, seen from the front, without gradients; C of the ``head``."""
    renders = [Render(v, head, test) for v in range(len(positions))]
    originals = [False] * len(positions)
    drawn = render(
        model,
        camera,
        positions,
        originals,
        renders,
        background,
        backend,
        antialiasing=antialiasing,
        thickness=thickness,
    )
    return drawn.images.clamp(0, 1)
