"""Our rasterisers against gsplat (PyPI), the CUDA kernels of the field, on the same scenes with matched settings."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import ratios, table, times_headers, times_rows
from benchmarks.scenes import (
    DEGREE,
    Bench,
    Drawing,
    Unavailable,
    largest_difference,
    model_in_training,
    neighbours,
    settle,
)
from gaussian_renderer import ACTIVE, editing
from scene.cameras import Camera
from scene.parameters import IMAGE
from utils.spherical_harmonics import to_colour

VIEWS = 5  # of the folded scene: what an iteration with in-between frames draws
MOST_OPACITY = 0.98  # alpha is clamped at 0.99 here and at 0.999 there: nothing gets that far
# Of a pixel in [0, 1]; another filter, half a pixel or another order gives ten times that.
LARGEST_MEAN_DIFFERENCE = 1e-3


def against_gsplat(bench: Bench) -> dict[str, Any]:
    """Ours against gsplat, forward and backward: a general scene, and the folded kind, several views at once."""
    gsplat = _importable(bench)
    sizes = [5000] if bench.quick else [100_000, 400_000]
    scenes = [general_scene(bench, gsplat)]
    for n in sizes:
        settle(bench.device)
        scenes.append(folded_scene(bench, gsplat, n))
    result = {"version": gsplat.__version__, "scenes": scenes}
    print(scenes_table(result))
    return result


def scenes_table(section: Mapping[str, Any]) -> str:
    """One row per way to draw each scene; ratios to ours."""
    scenes = section["scenes"]
    headers = [f"forward and backward; gsplat {section['version']}", "drawn by", *times_headers(scenes[0])]
    rows = [[scene["scene"], *row] for scene in scenes for row in times_rows(scene, scene["ours"])]
    fastest = [
        f"- {scene['scene']}: the faster way of gsplat takes "
        + ", ".join(
            f"{scene[key]:.3g} times ours on the {where}"
            for key, where in (("ratio", "clock"), ("device_ratio", "device"))
            if key in scene
        )
        for scene in scenes
    ]
    differences = [
        f"- {scene['scene']}, ours against gsplat: "
        + ", ".join(f"{name} {value:.1e}" for name, value in scene["differences"].items())
        for scene in scenes
    ]
    return "\n".join([table(headers, rows), "", *fastest, *differences])


def _importable(bench: Bench) -> ModuleType:
    if bench.device.type != "cuda":
        raise Unavailable("it needs a CUDA device")
    try:
        import gsplat
        from gsplat.cuda._backend import _C  # compiled now if it came without a binary
    except (ImportError, OSError, RuntimeError) as error:
        raise Unavailable(f"gsplat cannot be imported ({str(error).strip().splitlines()[0]})") from None
    if _C is None:
        raise Unavailable("gsplat has no compiled kernels, and found no CUDA toolkit to compile them")
    return gsplat


def drawer(
    gsplat: ModuleType, camera: Camera, device: torch.device, views: int | None = None
) -> Callable[..., Tensor]:
    """A function that draws Gaussians with gsplat as ``camera`` sees them, (C, H, W), or ``views`` views in one call,
    each with its own Gaussians, (views, C, H, W).

    The low-pass filter and the near plane are ours, the tiles of 16 pixels its own. Its pixel centres lie at halves,
    ours at whole numbers: the same ray for half the width there.
    """
    batch = () if views is None else (views,)
    view = camera.view_matrix(device=device).T.expand(*batch, 1, 4, 4).contiguous()
    middle = camera.width / 2, camera.height / 2
    rows = [[camera.focal, 0, middle[0]], [0, camera.focal, middle[1]], [0, 0, 1]]
    intrinsics = torch.tensor(rows, device=device).expand(*batch, 1, 3, 3).contiguous()

    def draw(
        means: Tensor,  # (..., N, 3)
        quaternions: Tensor,  # (..., N, 4)
        scales: Tensor,  # (..., N, 3)
        opacities: Tensor,  # (..., N)
        colours: Tensor,  # (..., N, C)
        packed: bool = False,
        depth: bool = False,  # as one more channel
    ) -> Tensor:
        images, _, _ = gsplat.rasterization(
            means,
            quaternions,
            scales,
            opacities,
            colours,
            view,
            intrinsics,
            camera.width,
            camera.height,
            near_plane=0.2,
            eps2d=0.3,
            packed=packed,
            tile_size=16,
            render_mode="RGB+D" if depth else "RGB",
        )
        return images.squeeze(-4).movedim(-1, -3)

    return draw


def general_scene(bench: Bench, gsplat: ModuleType) -> dict[str, Any]:
    """A cloud of 3-D Gaussians of all depths and orientations, one view: three colours and a depth (inverse depth)."""
    from diff_gaussian_rasterization import rasterize_gaussians

    n, camera = (5000, Camera(128, 128)) if bench.quick else (200_000, Camera(512, 512))
    device, generator = bench.device, torch.Generator().manual_seed(0)
    means = (2 * torch.rand(n, 3, generator=generator) - 1) * camera.half_width
    quaternions = torch.nn.functional.normalize(torch.randn(n, 4, generator=generator))
    scales = torch.exp(math.log(0.003) + 0.6 * torch.randn(n, 3, generator=generator))
    opacities = torch.sigmoid(-1.6 + 2.3 * torch.randn(n, generator=generator)).clamp_max(MOST_OPACITY)
    colours = torch.rand(n, 3, generator=generator)
    leaves = [t.to(device).requires_grad_() for t in (means, quaternions, scales, opacities, colours)]
    settings = editing.general_settings(camera, torch.zeros(3, device=device))
    offsets = torch.zeros(n, 3, device=device)

    def ours() -> Tensor:
        means, quaternions, scales, opacities, colours = leaves
        image, _, depth = rasterize_gaussians(
            means, offsets, None, colours, opacities, scales, quaternions, None, settings
        )
        return torch.cat([image, depth])  # (4, H, W)

    theirs = drawer(gsplat, camera, device)
    draws = {
        "general": ours,
        "gsplat": lambda: theirs(*leaves, depth=True),
        "gsplat, packed": lambda: theirs(*leaves, packed=True, depth=True),
    }
    shape = 4, camera.height, camera.width
    v_images = torch.randn(shape, generator=generator).to(device)
    coloured = v_images * v_images.new_tensor([1, 1, 1, 0])[:, None, None]  # the two depths are not the same
    differences = _compared(
        ours()[:3],
        draws["gsplat"]()[:3],
        torch.autograd.grad(ours(), leaves, coloured),
        torch.autograd.grad(draws["gsplat"](), leaves, coloured),
    )
    times = bench.times({name: _backward(draw, leaves, v_images) for name, draw in draws.items()})
    size = f"{n} 3-D Gaussians, one view of {camera.width} x {camera.height}"
    return _scene(size, "general", times, differences)


def folded_scene(bench: Bench, gsplat: ModuleType, n: int) -> dict[str, Any]:
    """Small flat Gaussians at one depth, several views of a small image.

    From the model's raw parameters: the folded operator, once, and gsplat behind the cut in PyTorch. From the cut on:
    gsplat, all views in one call, one channel, and our general rasteriser, once per view.
    """
    camera = Camera(64, 48) if bench.quick else Camera(197, 233)
    model = model_in_training(n, camera, DEGREE, bench.device)
    with torch.no_grad():
        model.params["opacity"].clamp_(max=math.log(MOST_OPACITY / (1 - MOST_OPACITY)))
    positions = neighbours(model, VIEWS)
    folded = Drawing(model, camera, positions)
    cut, draw = inspect.unwrap(editing.cut), inspect.unwrap(editing.draw)
    theirs = drawer(gsplat, camera, bench.device, VIEWS)
    raw = [p for p in model.params.values() if p.numel()]

    def activated() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Means, quaternions, scales and a mask of those drawn, (V, N, ...); opacities and colours, (N, ...)."""
        cuts = [cut(model, position) for position in positions]
        (opacities,), (colours,) = model.opacities([IMAGE]), to_colour(model.raw_colours([IMAGE], camera))
        means, quaternions, scales = (
            torch.stack([getattr(at, name) for at in cuts]) for name in ("means", "quaternions", "scales")
        )
        return means, quaternions, scales, torch.stack([at.active(ACTIVE) for at in cuts]), opacities, colours

    def all_views(
        means: Tensor,
        quaternions: Tensor,
        scales: Tensor,
        drawn: Tensor,
        opacities: Tensor,
        colours: Tensor,
        packed: bool = False,
    ) -> Tensor:
        seen = opacities * drawn  # Gaussians without opacity are culled first of all
        return theirs(means, quaternions, scales, seen, colours.expand(VIEWS, -1, -1), packed)

    scene = [t.detach().requires_grad_(t.is_floating_point()) for t in activated()]
    leaves = [t for t in scene if t.requires_grad]

    def one_by_one() -> Tensor:
        means, quaternions, scales, drawn, opacities, colours = scene
        images = []
        for v, position in enumerate(positions):
            weights = drawn[v].float()  # not read by the renderer
            at = editing.Cut(position, means[v], scales[v], quaternions[v], weights)
            images.append(draw(at, drawn[v], opacities, colours, camera, folded.background))
        return torch.stack(images)

    def cut_and_drawn() -> Tensor:
        return all_views(*activated())

    v_images = folded.v_images
    differences = _compared(
        folded.forward().images,
        cut_and_drawn(),
        torch.autograd.grad(folded.forward().images, raw, v_images),
        torch.autograd.grad(cut_and_drawn(), raw, v_images),
    )
    differences["pixel of general"] = largest_difference(folded.forward().images, one_by_one())
    times = bench.times(
        {
            "folded": folded.forward_backward,
            "cut and gsplat": _backward(cut_and_drawn, raw, v_images),
            "gsplat": _backward(lambda: all_views(*scene), leaves, v_images),
            "gsplat, packed": _backward(lambda: all_views(*scene, packed=True), leaves, v_images),
            "general, once a view": _backward(one_by_one, leaves, v_images),
        }
    )
    size = f"{n} flat Gaussians, {VIEWS} views of {camera.width} x {camera.height}"
    return _scene(size, "folded", times, differences)


def _backward(draw: Callable[[], Tensor], leaves: Sequence[Tensor], v_images: Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(draw(), leaves, v_images)


def _compared(
    images: Tensor, others: Tensor, gradients: Sequence[Tensor], other_gradients: Sequence[Tensor]
) -> dict[str, float]:
    """How far the two images differ. Raises `Unavailable` if they are not the same: times would then mean nothing.

    Rounding alone makes a few pixels differ: two Gaussians at nearly the same depth swap, one at alpha 1/255 is cut.
    """
    mean = float((images - others).detach().abs().mean())
    if not mean <= LARGEST_MEAN_DIFFERENCE:
        raise Unavailable(f"gsplat's image is different: pixels differ by {mean:.2g} on average")
    relative = [
        float((g - h).norm() / h.norm())
        for g, h in zip(gradients, other_gradients, strict=True)
        if h.norm() > 0
    ]
    return {
        "mean of a pixel": mean,
        "largest of a pixel": largest_difference(images, others),
        "gradients, relative": max(relative),
    }


def _scene(
    size: str, ours: str, times: Mapping[str, Mapping[str, float]], differences: Mapping[str, float]
) -> dict[str, Any]:
    theirs = [name for name in times["seconds"] if name.startswith("gsplat")]
    return {
        "scene": size,
        "ours": ours,
        **times,
        "differences": dict(differences),
        **ratios(times, theirs, ours),
    }
