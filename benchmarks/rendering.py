#!/usr/bin/env python3
"""How many images per second render.py writes.

    python -m benchmarks.rendering                 # writing alone, of ready images, by 1, 2, 4, ... threads
    python -m benchmarks.rendering -m output/case  # everything: render.py --interp 8 on a trained model

The ready images are 233 x 197, smooth with noise, like renders of an MRI; they go to a temporary folder.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import interpolate

from benchmarks.common import run_program
from utils.images import write_levels

HEIGHT, WIDTH, IMAGES, DISTINCT = 233, 197, 960, 64


def ready(bits: int) -> list[np.ndarray]:
    """DISTINCT images (H, W, 1), in the levels of a file."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(DISTINCT, 1, 24, 20, generator=generator)
    smooth = interpolate(coarse, (HEIGHT, WIDTH), mode="bicubic").clamp(0, 1)
    row, column = torch.meshgrid(torch.linspace(-1, 1, HEIGHT), torch.linspace(-1, 1, WIDTH), indexing="ij")
    body = (row**2 + column**2 < 0.7).float()  # about half of the frame is background
    noise = 0.004 * torch.randn(smooth.shape, generator=generator)
    images = ((smooth + noise).clamp(0, 1) * body).movedim(1, -1).numpy()
    return list(np.rint(images * (2**bits - 1)).astype(np.uint8 if bits == 8 else np.uint16))


def writing(bits: int) -> None:
    """Images per second by the number of threads."""
    images, cores = ready(bits), os.cpu_count() or 1
    for threads in sorted({1, cores} | {2**k for k in range(1, 6) if 2**k < cores}):
        with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(threads) as writers:
            start, busy = time.perf_counter(), time.process_time()
            waiting = [
                writers.submit(write_levels, Path(folder, f"{k}.png"), images[k % DISTINCT])
                for k in range(IMAGES)
            ]
            for future in waiting:
                future.result()
            wall, busy = time.perf_counter() - start, time.process_time() - busy
        print(f"{bits} bits, {threads} threads: {IMAGES / wall:.0f} images/s, {busy / wall:.2f} cores busy")


def rendering(model: str, interp: int) -> None:
    """render.py as a user runs it; a short run separates the time of its start from that of its loop."""
    counts, seconds = [], []
    for number in (1, 1, interp):  # the first one warms the system's caches
        seconds.append(run_program("render.py", "-m", model, "--interp", str(number), "--quiet"))
        counts.append(sum(1 for _ in Path(model, "render_img").glob("*_*.*")))
    rate = (counts[2] - counts[1]) / (seconds[2] - seconds[1])
    print(f"{counts[2]} images: {rate:.0f} images/s rendered and written; {seconds[2]:.1f} s with loading")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("-m", "--model", help="folder of a trained model; without one, the writing alone")
    parser.add_argument("--interp", type=int, default=8, help="2 or more (default: %(default)s)")
    options = parser.parse_args()
    if options.model:
        rendering(options.model, options.interp)
    else:
        for bits in (8, 16):
            writing(bits)


if __name__ == "__main__":
    main()
