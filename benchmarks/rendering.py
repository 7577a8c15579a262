#!/usr/bin/env python3
"""How many images a second render.py writes.

    python -m benchmarks.rendering                 # the writing alone, by 1, 2, 4, ... threads: images are ready
    python -m benchmarks.rendering -m output/case  # all of it: render.py --interp 8 of a trained model

The ready images are 233 x 197, smooth with noise, as renders of an MRI are; they go to a temporary folder.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn.functional import interpolate

import render

HEIGHT, WIDTH, FRAMES, DISTINCT = 233, 197, 120, 64


class Ready:
    """Stands in for render.Renderer: images that are there already."""

    camera = SimpleNamespace(width=WIDTH, height=HEIGHT)

    def __init__(self, folder: Path) -> None:
        self.outputs = [SimpleNamespace(folder=folder / "render_img")]
        self.model = torch.nn.ParameterList([torch.zeros(1)] * 100_000)
        self.model.num_frames, self.model.channels = FRAMES, 1
        generator = torch.Generator().manual_seed(0)
        coarse = torch.rand(DISTINCT, 1, 24, 20, generator=generator)
        smooth = interpolate(coarse, (HEIGHT, WIDTH), mode="bicubic").clamp(0, 1)
        row, column = torch.meshgrid(
            torch.linspace(-1, 1, HEIGHT), torch.linspace(-1, 1, WIDTH), indexing="ij"
        )
        body = (row**2 + column**2 < 0.7).float()  # about half of the frame is background
        noise = 0.004 * torch.randn(smooth.shape, generator=generator)
        self.images = ((smooth + noise).clamp(0, 1) * body)[None]  # (1, DISTINCT, 1, H, W)

    def __call__(self, positions: Sequence[float]) -> Tensor:
        return self.images[:, [int(position * 8) % DISTINCT for position in positions]]


def writing(interp: int, bits: int) -> None:
    """Images a second by the number of threads."""
    cores = os.cpu_count() or 1
    for writers in sorted({1, cores} | {2**k for k in range(1, 6) if 2**k < cores}):
        render.WRITERS = writers
        with tempfile.TemporaryDirectory() as folder:
            options = SimpleNamespace(interp=interp, extension=".png", chunks=1, quiet=True)
            start, busy = time.perf_counter(), time.process_time()
            render.write_images(Ready(Path(folder)), bits, [], options, lambda _: None)  # type: ignore[arg-type]
            wall, busy = time.perf_counter() - start, time.process_time() - busy
        print(
            f"{bits} bits, {writers} threads: {FRAMES * interp / wall:.0f} images/s, {busy / wall:.2f} cores busy"
        )


def rendering(model: str, interp: int) -> None:
    """render.py as a user runs it, from its start to its end, and its loop alone."""
    spent: list[tuple[int, float]] = []
    write_images = render.write_images

    def timed(*arguments: object) -> list[str]:
        start = time.perf_counter()
        names = write_images(*arguments)  # type: ignore[arg-type]
        spent.append((len(names), time.perf_counter() - start))
        return names

    render.write_images = timed
    sys.argv = ["render.py", "-m", model, "--interp", str(interp), "--quiet"]
    start = time.perf_counter()
    render.main()
    whole, (count, loop) = time.perf_counter() - start, spent[0]
    print(f"{count} images: {count / loop:.0f} images/s rendered and written; {whole:.1f} s with loading")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("-m", "--model", help="folder of a trained model; without one, the writing alone")
    parser.add_argument("--interp", type=int, default=8)
    options = parser.parse_args()
    if options.model:
        rendering(options.model, options.interp)
    else:
        for bits in (8, 16):
            writing(options.interp, bits)


if __name__ == "__main__":
    main()
