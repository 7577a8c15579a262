#!/usr/bin/env python3
"""How long the viewer takes for a frame.

    python -m benchmarks.viewing -m MODEL [MODEL ...] [--device cuda]

draws each model at random positions, as view.py does: the drawing alone, what a request of the page takes in all (with
scores and the answer's bytes), and the same with ellipses of Gaussians. Medians, and what 90 % stay below, in ms.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from arguments import model_options
from benchmarks.common import describe
from utils.errors import ArgumentParser, positive, run
from viewer.case import Case
from viewer.server import picture

_ELLIPSES = 4000  # as the page asks for


def main(arguments: Sequence[str] | None = None) -> int:
    line = ArgumentParser(prog="benchmarks.viewing", description=(__doc__ or "").split("\n")[0])
    line.add_argument("-m", "--model_path", nargs="+", required=True, help="folders of trained models")
    line.add_argument("--frames", type=positive, default=200, help="positions to draw (default: 200)")
    line.add_argument("--device", default="auto", help="auto, cuda, cuda:N or cpu (default: auto)")
    options = line.parse_args(arguments)
    for folder in options.model_path:
        case = Case.open(model_options({"model_path": folder, "device": options.device}))
        about = describe(case.model.device)
        machine = f"{about['device']}, {about['machine']}, {about['cores']} cores, torch {about['torch']}"
        print(f"{folder}: {len(case.model):,} Gaussians, {case.size[0]} x {case.size[1]}; {machine}")
        works: dict[str, Callable[[float], object]] = {
            "drawing": lambda t, case=case: case.drawn([t]),  # type: ignore[misc]
            "request": lambda t, case=case: picture(case, t, "", 0),  # type: ignore[misc]
            "with ellipses": lambda t, case=case: picture(case, t, "", _ELLIPSES),  # type: ignore[misc]
        }
        for name, work in works.items():
            times = measured(work, case.model.num_frames - 1, options.frames)
            print(f"  {name}: median {np.median(times):.2f} ms, 90 % below {np.quantile(times, 0.9):.2f} ms")
    return 0


def measured(work: Callable[[float], object], last: int, frames: int) -> np.ndarray:
    """ms of ``work`` at random positions from 0 to ``last``, after ten that do not count."""
    times = []
    for t in np.random.default_rng(0).uniform(0, last, frames + 10).tolist():
        start = time.perf_counter()
        work(t)
        times.append(1000 * (time.perf_counter() - start))
    return np.array(times[10:])


if __name__ == "__main__":
    run(main)
