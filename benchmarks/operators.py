"""The operators against other ways to draw the same images, and how their time grows."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import ratios, table, times_headers, times_rows
from benchmarks.scenes import (
    CAMERA,
    DEGREE,
    GAUSSIANS,
    VIEWS,
    Bench,
    Drawing,
    largest_difference,
    model_in_training,
    neighbours,
    settle,
)
from gaussian_renderer import ACTIVE, editing
from scene.cameras import Camera
from scene.parameters import IMAGE
from utils.spherical_harmonics import to_colour


def oracle(bench: Bench) -> dict[str, Any]:
    """The compiled operators against the dense PyTorch form of the same mathematics, forward and backward."""
    gaussians, camera = (200, Camera(32, 24)) if bench.quick else (2000, Camera(64, 48))
    model = model_in_training(gaussians, camera, DEGREE, bench.device)
    drawings = {
        name: Drawing(model, camera, neighbours(model, VIEWS), name) for name in ("compiled", "oracle")
    }
    # Not in turns: whatever follows the oracle pays for freeing its hundreds of megabytes.
    times: dict[str, dict[str, float]] = {}
    for name, drawing in drawings.items():
        for kind, s in bench.times({name: drawing.forward_backward}, repeats=7).items():
            times.setdefault(kind, {}).update(s)
    difference = largest_difference(*(drawing.forward().images for drawing in drawings.values()))
    return _compared(gaussians, camera, times, "oracle", "compiled", difference)


def _compared(
    gaussians: int,
    camera: Camera,
    times: dict[str, dict[str, float]],
    theirs: str,
    ours: str,
    difference: float,
) -> dict[str, Any]:
    """Prints and returns the times of two ways to draw the same images."""
    size = f"{gaussians} Gaussians, {VIEWS} views of {camera.width} x {camera.height}"
    print(table([size, *times_headers(times)], times_rows(times, ours)))
    print(f"largest difference of any pixel: {difference:.1e}")
    return {"scene": size, **times, **ratios(times, [theirs], ours), "largest_difference": difference}


def operators(bench: Bench) -> dict[str, Any]:
    """The folded operator, once, against the general rasteriser, once per view."""
    model, camera = bench.model()
    positions = neighbours(model, VIEWS)
    folded = Drawing(model, camera, positions)
    # The path of --modify, with gradients, which it does not need.
    cut, draw = inspect.unwrap(editing.cut), inspect.unwrap(editing.draw)

    def one_by_one() -> Tensor:
        (opacities,), (colours,) = model.opacities([IMAGE]), to_colour(model.raw_colours([IMAGE], camera))
        images = []
        for position in positions:
            at = cut(model, position)
            images.append(draw(at, at.active(ACTIVE), opacities, colours, camera, folded.background))
        return torch.stack(images)

    def one_by_one_backward() -> None:
        leaves = [p for p in model.params.values() if p.numel()]
        torch.autograd.grad(one_by_one(), leaves, folded.v_images, allow_unused=True)

    times = bench.times({"folded": folded.forward_backward, "general": one_by_one_backward})
    difference = largest_difference(folded.forward().images, one_by_one())
    return _compared(len(model), camera, times, "general", "folded", difference)


def growth(bench: Bench) -> dict[str, Any]:
    """Forward and backward of one batch as one size grows and the others are fixed; the exponent is the last step's."""
    others = {"Gaussians": GAUSSIANS, "pixels": CAMERA.width, "views": VIEWS, "P": DEGREE}
    sizes: dict[str, list[int]] = {
        "Gaussians": [3000, 6000, 12_000, 24_000, 48_000, 96_000],
        "pixels": [32, 64, 128, 256, 512],  # width of a frame of 4 : 3
        "views": [1, 2, 3, 5, 8, 16],
        "P": [0, 1, 2, 4, 7, 14, 28],
    }
    if bench.device.type == "cuda":  # milliseconds at the end of each, more than a kernel launch takes
        others |= {"Gaussians": 400_000, "pixels": 256}
        sizes["Gaussians"] += [200_000, 400_000, 800_000, 1_600_000, 3_200_000]
        sizes["pixels"] += [1024, 2048]
        sizes["views"] += [32, 64]
    if bench.quick:
        others["Gaussians"] //= 8
        sizes = {name: values[:3] for name, values in sizes.items()}
    result: dict[str, Any] = {}
    for name, values in sizes.items():
        drawings, xs = {}, []
        for value in values:
            size = others | {name: value}
            camera = Camera(size["pixels"], size["pixels"] * 3 // 4)
            model = model_in_training(size["Gaussians"], camera, size["P"], bench.device)
            drawings[str(value)] = Drawing(model, camera, neighbours(model, size["views"])).forward_backward
            xs.append(camera.width * camera.height if name == "pixels" else value)
        times = {kind: list(s.values()) for kind, s in bench.times(drawings, repeats=9).items()}
        del drawings
        result[name] = {
            "sizes": xs,
            **times,
            "exponent": last_exponent(xs, times.get("device_seconds", times["seconds"])),
        }
        print(growth_table(name, result[name]))
        print()
        settle(bench.device)
    return result


def last_exponent(xs: Sequence[float], seconds: Sequence[float]) -> float | None:
    """d log(time) / d log(size) of the last step."""
    return math.log(seconds[-1] / seconds[-2]) / math.log(xs[-1] / xs[-2]) if xs[-2] > 0 else None


def growth_table(name: str, curve: Mapping[str, Any]) -> str:
    """One curve; the exponent is that of its last row."""
    kinds = {"ms on the clock": curve["seconds"]}
    if "device_seconds" in curve:
        kinds["ms on the device"] = curve["device_seconds"]
    exponents = [None] * (len(kinds) - 1) + [curve["exponent"]]
    rows = [
        [kind, *(1e3 * s for s in seconds), exponent]
        for (kind, seconds), exponent in zip(kinds.items(), exponents, strict=True)
    ]
    return table([name, *map(str, curve["sizes"]), "exponent"], rows)
