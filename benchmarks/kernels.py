#!/usr/bin/env python3
"""Seconds of each compiled operator by itself, on scenes as large as in training.

python -m benchmarks.kernels --device cpu --out output/benchmark/kernels.json

Only the operators' package is imported, so that an older copy of it (PYTHONPATH) can be timed by the same file:
run both in alternation and compare.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from diff_gaussian_rasterization import (
    Adam,
    GaussianRasterizationSettings,
    GaussianRasterizer,
    blend,
    fold,
    observe,
    sigma_outside,
    similarity,
)


def scene(n: int, views: int, degree: int, device: torch.device) -> dict[str, Tensor]:
    """Folded-Gaussians as in training: half a pixel to a few pixels wide, many nearly transparent."""
    generator = torch.Generator().manual_seed(0)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.empty(shape).uniform_(low, high, generator=generator)

    tensors = {
        "xyz": uniform(-1, 1, n, 3),
        "w1": uniform(-0.3, 0.3, n, 2 * degree),
        "m": torch.logit(uniform(0.01, 0.99, n)),
        "sigma": torch.log(uniform(0.01, 1, n)),
        "scaling": torch.log(torch.tensor(0.011)) + 0.6 * torch.randn(n, 3, generator=generator),
        "rotation": torch.logit(uniform(0.01, 0.99, n)),
        "times": torch.linspace(0.4, 0.6, views),
    }
    return {name: value.to(device).requires_grad_() for name, value in tensors.items()} | {
        "signs": torch.ones(views, device=device)
    }


def calls(
    device: torch.device, n: int, side: int, views: int, channels: int
) -> dict[str, Callable[[], object]]:
    """Each operator, forward and backward, as a call without arguments."""
    raw = scene(n, views, 7, device)
    size = (side / 2, side, side)
    generator = torch.Generator().manual_seed(1)
    opacities = torch.sigmoid(2.3 * torch.randn(1, n, generator=generator) - 1.6).to(device).requires_grad_()
    colours = torch.rand(1, n, channels, generator=generator).to(device).requires_grad_()
    backgrounds = torch.zeros(views, channels, device=device)
    with torch.no_grad():
        means2d, conics, radii, active = fold(*raw.values(), *size)
    means2d.requires_grad_()
    conics.requires_grad_()
    renders = list(range(views)), [0] * views, [1] * views
    v_means2d, v_conics = torch.randn_like(means2d), torch.randn_like(conics)
    v_images = torch.randn(views, channels, side, side, generator=generator).to(device)
    leaves = [t for t in raw.values() if t.requires_grad]

    def draw() -> Tensor:
        return blend(means2d, conics, active, opacities, colours, backgrounds, *renders, side, side)[0]

    folded = fold(*raw.values(), *size)
    drawn = draw()
    targets = torch.rand(views, channels, side, side, generator=generator).to(device)
    images = torch.rand(views, channels, side, side, generator=generator).to(device).requires_grad_()
    parameters = [torch.nn.Parameter(t.detach().clone()) for t in leaves]
    for p in parameters:
        p.grad = torch.randn_like(p)
    optimizer = Adam(parameters, lr=1e-6)
    statistics_ = {
        name: torch.zeros(n, *(() if name == "max_radii2D" else (1,)), device=device)
        for name in ("max_radii2D", "xyz_gradient_accum", "m_gradient_accum", "denom", "m_denom")
    }
    m_gradients = torch.randn(n, 1, generator=generator).to(device)

    view = torch.eye(4)
    view[3, 2] = 4
    projection = torch.tensor([[2.0, 0, 0, 0], [0, 2, 0, 0], [0, 0, 1, 1], [0, 0, -0.01, 0]])
    camera = GaussianRasterizationSettings(
        side, side, 0.5, 0.5, torch.zeros(3, device=device), 1.0, view.to(device), (view @ projection).to(device),
        3, torch.tensor([0.0, 0, -4], device=device), False, False,
    )  # fmt: skip
    solid = {
        "means3D": torch.randn(n, 3, generator=generator),
        "shs": torch.randn(n, 16, 3, generator=generator) * 0.3,
        "opacities": torch.rand(n, 1, generator=generator),
        "scales": 0.02 * torch.rand(n, 3, generator=generator),
        "rotations": torch.randn(n, 4, generator=generator),
    }
    solid = {name: value.to(device).requires_grad_() for name, value in solid.items()}
    screen = torch.zeros(n, 3, device=device, requires_grad=True)

    def general() -> None:
        colour, _, depth = GaussianRasterizer(camera)(means2D=screen, **solid)
        torch.autograd.grad((colour.sum(), depth.sum()), [*solid.values(), screen])

    def without_gradients(function: Callable[[], object]) -> Callable[[], object]:
        def call() -> None:
            with torch.no_grad():
                function()

        return call

    grad = torch.autograd.grad
    return {
        "fold": without_gradients(lambda: fold(*raw.values(), *size)),
        "fold backward": lambda: grad(folded[:2], leaves, [v_means2d, v_conics], retain_graph=True),
        "blend": without_gradients(draw),
        "blend backward": lambda: grad(drawn, [means2d, conics, opacities, colours], v_images, retain_graph=True),
        "similarity": lambda: grad(sum(similarity(images, targets)), images),
        "sigma_outside": lambda: grad(sigma_outside(raw["sigma"], 0.05, 0.5), raw["sigma"]),
        "observe": lambda: observe(radii, active, v_means2d, m_gradients, 1, side, side, statistics_),
        "adam": optimizer.step,
        "general rasteriser": general,
    }  # fmt: skip


def milliseconds(
    device: torch.device, functions: dict[str, Callable[[], object]], repeats: int
) -> dict[str, float]:
    """Median of each: on a GPU between two device events, on a CPU the processor time of all threads."""
    spent: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(2 + repeats):
        for name, function in functions.items():
            if device.type == "cuda":
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                function()
                end.record()
                torch.cuda.synchronize(device)
                ms = begin.elapsed_time(end)
            else:
                start = time.process_time()
                function()
                ms = 1e3 * (time.process_time() - start)
            if turn >= 2:
                spent[name].append(ms)
    return {name: statistics.median(times) for name, times in spent.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--gaussians", type=int, help="default: 24000 on a CPU, 400000 on a GPU")
    parser.add_argument("--side", type=int, default=128, help="px")
    parser.add_argument("--views", type=int, default=3)
    parser.add_argument("--channels", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    device = torch.device(given.device)
    n = given.gaussians or (400_000 if device.type == "cuda" else 24_000)
    result = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "gaussians": n, "side": given.side, "views": given.views, "channels": given.channels,
        "milliseconds": milliseconds(device, calls(device, n, given.side, given.views, given.channels), given.repeats),
    }  # fmt: skip
    print(json.dumps(result))
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
