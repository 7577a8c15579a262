"""The operators against other ways to the same images, and how their time grows."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from common import table
from scenes import (
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
from torch import Tensor

from gaussian_renderer import ACTIVE, editing
from scene.cameras import Camera
from scene.gaussian_model import IMAGE
from utils.spherical_harmonics import to_colour


def oracle(bench: Bench) -> dict[str, Any]:
    """The compiled operators against the dense PyTorch form of the same mathematics, forward and backward."""
    gaussians, camera = (200, Camera(32, 24)) if bench.quick else (2000, Camera(64, 48))
    model = model_in_training(gaussians, camera, DEGREE, bench.device)
    drawings = {
        name: Drawing(model, camera, neighbours(model, VIEWS), name) for name in ("compiled", "oracle")
    }
    # Not in turns: whoever follows the oracle pays for giving back its hundreds of megabytes.
    s: dict[str, float] = {}
    for name, drawing in drawings.items():
        s |= bench.measure({name: drawing.forward_backward}, repeats=7)
    difference = largest_difference(*(drawing.forward().images for drawing in drawings.values()))
    ratio = s["oracle"] / s["compiled"]
    size = f"{gaussians} Gaussians, {VIEWS} views of {camera.width} x {camera.height}"
    rows = [["compiled", 1e3 * s["compiled"], 1.0], ["oracle", 1e3 * s["oracle"], ratio]]
    print(table([size, "ms", "ratio"], rows))
    print(f"largest difference of a pixel: {difference:.1e}")
    return {"scene": size, "seconds": s, "ratio": ratio, "largest_difference": difference}


def operators(bench: Bench) -> dict[str, Any]:
    """The folded operator, once, against the general rasteriser, once a view."""
    model, camera = bench.model()
    positions = neighbours(model, VIEWS)
    folded = Drawing(model, camera, positions)
    # What --modify goes through, with the gradients that it has no use for.
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

    s = bench.measure({"folded": folded.forward_backward, "general": one_by_one_backward})
    difference = largest_difference(folded.forward().images, one_by_one())
    ratio = s["general"] / s["folded"]
    size = f"{len(model)} Gaussians, {VIEWS} views of {camera.width} x {camera.height}"
    rows = [["folded, once", 1e3 * s["folded"], 1.0], ["general, once a view", 1e3 * s["general"], ratio]]
    print(table([size, "ms", "ratio"], rows))
    print(f"largest difference of a pixel: {difference:.1e}")
    return {"scene": size, "seconds": s, "ratio": ratio, "largest_difference": difference}


def growth(bench: Bench) -> dict[str, Any]:
    """Forward and backward of one batch as one size grows and the others stay; the exponent is the last step's."""
    sizes: dict[str, list[int]] = {
        "Gaussians": [3000, 6000, 12_000, 24_000, 48_000, 96_000],
        "pixels": [32, 64, 128, 256, 512],  # width of a frame of 4 : 3
        "views": [1, 2, 3, 5, 8, 16],
        "P": [0, 1, 2, 4, 7, 14, 28],
    }
    if bench.device.type == "cuda":
        sizes["Gaussians"] += [200_000, 400_000, 800_000]
        sizes["pixels"] += [1024]
    if bench.quick:
        sizes = {name: values[:3] for name, values in sizes.items()}
    result: dict[str, Any] = {}
    for name, values in sizes.items():
        drawings, xs = {}, []
        for value in values:
            gaussians = value if name == "Gaussians" else GAUSSIANS // (8 if bench.quick else 1)
            width = value if name == "pixels" else CAMERA.width
            camera = Camera(width, width * 3 // 4)
            model = model_in_training(gaussians, camera, value if name == "P" else DEGREE, bench.device)
            views = neighbours(model, value if name == "views" else VIEWS)
            drawings[str(value)] = Drawing(model, camera, views).forward_backward
            xs.append(camera.width * camera.height if name == "pixels" else value)
        seconds = list(bench.measure(drawings, repeats=9).values())
        exponent = None
        if xs[-2] > 0:
            exponent = math.log(seconds[-1] / seconds[-2]) / math.log(xs[-1] / xs[-2])
        result[name] = {"sizes": xs, "seconds": seconds, "exponent": exponent}
        print(table([name, *map(str, xs), "exponent"], [["ms", *(1e3 * s for s in seconds), exponent]]))
        print()
        settle(bench.device)
    return result
