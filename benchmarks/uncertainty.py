#!/usr/bin/env python3
"""Expected against true errors of frames held out, of `interpolate.py --uncertainty` (in_between/uncertainty.py).

    python -m benchmarks.uncertainty CASE [CASE ...] --out benchmarks/results/between/uncertainty.json --plot PNG

Every N-th frame is given; the expected error of those in between is calibrated on the given ones alone. Reported, over
all their pixels: the correlation with the true absolute error, of pixels and of means over 8 x 8 pixels; the mean
expected error over the mean true one; and both in ten classes of equal size, by the expected one. Of masks: the
correlation with the pixels that are wrong, and the number of wrong pixels expected over the true one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from arguments import resolve_device
from benchmarks.common import describe, table
from benchmarks.heldout import read_case
from benchmarks.interpolators import coarser
from benchmarks.problems import Problem, problem
from in_between.prediction import InBetween
from in_between.uncertainty import expected_error
from utils.errors import ArgumentParser, positive, run
from utils.files import atomic_write

CLASSES = 10
PATCH = 8  # px


def measure(posed: Problem, device: torch.device) -> dict[str, Any]:
    given = {kind: torch.from_numpy(f).float()[:, None].to(device) for kind, f in posed.given.items()}
    frames, masks = given.get("img", given.get("seg")), given.get("seg")
    assert frames is not None
    between = InBetween(frames, masks)
    expected = expected_error(between, frames, masks)
    k, alpha = posed.between()
    parts = list(
        zip(
            torch.from_numpy(k).to(device).split(16),
            torch.from_numpy(alpha).float().to(device).split(16),
            strict=True,
        )
    )
    row: dict[str, Any] = {"case": posed.case.name, "problem": posed.name}
    for kind, truth in posed.truth.items():
        predict, doubt = (
            (between.images, expected.images) if kind == "img" else (between.masks, expected.masks)
        )
        found = torch.cat([predict(*part)[:, 0] for part in parts]).cpu().numpy()
        guess = torch.cat([doubt(*part)[:, 0] for part in parts]).cpu().numpy()
        wrong = (found >= 0.5) != (truth >= 0.5)
        error = np.abs(found - truth) if kind == "img" else wrong.astype(float)
        row[kind] = figures(guess, error)
    return row | {"weights": expected.weights.tolist(), "band": expected.band, "about": describe(device)}


def figures(guess: np.ndarray, error: np.ndarray) -> dict[str, Any]:
    """Of two (M, H, W)."""
    rows, columns = (side // PATCH * PATCH for side in guess.shape[1:])
    coarse = [
        values[:, :rows, :columns]
        .reshape(len(values), rows // PATCH, PATCH, columns // PATCH, PATCH)
        .mean((2, 4))
        for values in (guess, error)
    ]
    order = np.argsort(guess, axis=None)
    classes = [
        [float(values.ravel()[some].mean()) for values in (guess, error)]
        for some in np.array_split(order, CLASSES)
    ]
    return {
        "correlation": correlation(guess, error),
        "of_patches": correlation(*coarse),
        "mean_ratio": float(guess.mean() / error.mean()),
        "reliability": classes,
    }


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


def tables(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        [row["case"], row["problem"], {"img": "images", "seg": "masks"}[kind]]
        + [f"{row[kind][name]:.2f}" for name in ("correlation", "of_patches", "mean_ratio")]
        for row in rows
        for kind in ("img", "seg")
        if kind in row
    ]
    return table(["case", "given", "kind", "correlation", "of 8 x 8 px", "expected / true"], lines)


def plot(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Reliability: the true error of each class, by the expected one."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    for row in rows:
        if "img" in row:
            points = np.array(row["img"]["reliability"]) * 255
            axes.plot(*points.T, "o-", markersize=3, linewidth=1, label=f"{row['case']}, {row['problem']}")
    most = axes.get_xlim()[1]
    axes.plot([0, most], [0, most], color="0.6", linewidth=0.8)
    axes.set(xlabel="expected absolute error, grey levels of 255", ylabel="true absolute error")
    axes.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cases", type=Path, nargs="+", metavar="CASE", help="folders with img/original")
    parser.add_argument(
        "--keep", type=positive, nargs="+", default=[2, 4], metavar="N", help="(default: 2 4)"
    )
    parser.add_argument(
        "--stride", type=positive, default=1, metavar="N", help="every N-th row and column alone"
    )
    parser.add_argument("--device", default="auto", help="auto, cuda, cuda:N or cpu (default: auto)")
    parser.add_argument("--out", type=Path, help="JSON file for the rows")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="reliability plot")
    given = parser.parse_args()
    device, rows = resolve_device(given.device), []
    for folder in given.cases:
        case = coarser(read_case(folder), given.stride)
        for keep in given.keep:
            rows.append(measure(problem(case, f"every {keep}"), device))
            print(tables(rows[-1:]), flush=True)
    print(tables(rows))
    if given.out is not None:
        with atomic_write(given.out) as unfinished:
            text = ",\n".join(json.dumps(row) for row in rows)
            unfinished.write_text(f"[\n{text}\n]\n", encoding="utf-8")
    if given.plot is not None:
        plot(given.plot, rows)


if __name__ == "__main__":
    run(main)
