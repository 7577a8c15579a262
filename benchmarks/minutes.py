#!/usr/bin/env python3
"""From a volume to a mesh: how long each program takes, and the resulting scores.

    python -m benchmarks.minutes CASE [CASE ...] --device cpu --presets quick --out benchmarks/results/minutes/NAME.json

CASE/volume.nii.gz and CASE/label.nii.gz (which may be missing) are prepared with every N-th slice kept, trained on,
rendered N times as densely and, with a label, meshed. The slices left out are scored by train.py itself. Arguments
after -- go to train.py. On a shared machine, compare processor seconds, not wall time. --upsample gives a small case
the size of a hospital's, for time and memory.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from torch.nn.functional import interpolate

from arguments import PRESETS, resolve_device
from benchmarks.common import ROOT, describe, table
from scene.checkpoint import load_checkpoint, newest
from utils.errors import ArgumentParser, UserError, positive, run
from utils.files import atomic_write

Row = dict[str, Any]
OUT = Path("output/benchmark/minutes.json")


@dataclass
class Stopwatch:
    """Runs the project's programs, and keeps the wall and processor seconds of each."""

    clock: dict[str, float] = field(default_factory=dict)
    processors: dict[str, float] = field(default_factory=dict)

    def run(self, program: str, *words: object) -> None:
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        command = [sys.executable, str(ROOT / program), *map(str, words)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            raise UserError(f"{program} ended with status {done.returncode}: {done.stdout[-2000:].strip()}")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        self.clock[program] = time.perf_counter() - start
        self.processors[program] = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def upsampled(case: Path, size: Sequence[int], folder: Path) -> Path:
    """The case at ``size`` (columns, rows, slices), interpolated linearly, in ``folder``."""
    for name in ("volume.nii.gz", "label.nii.gz"):
        if (case / name).is_file():
            image = nibabel.load(case / name)
            values = torch.from_numpy(np.asarray(image.dataobj, np.float32).copy())
            steps = [old / new for old, new in zip(values.shape, size, strict=True)]
            values = interpolate(values[None, None], size=tuple(size), mode="trilinear")[0, 0]
            if name == "label.nii.gz":
                values = (values >= float(values.max()) / 2).float()
            affine = image.affine @ np.diag([*steps, 1.0])
            nibabel.save(nibabel.Nifti1Image(values.numpy(), affine), folder / name)
    return folder


def measure(
    case: Path,
    preset: str,
    keep: int,
    images_only: bool,
    device: str,
    size: Sequence[int] | None,
    extra: Sequence[str],
) -> Row:
    """One case from its volume to its mesh."""
    joint = (case / "label.nii.gz").is_file() and not images_only
    described = case / "case.json"
    window = json.loads(described.read_text())["window"] if described.is_file() else None
    watch = Stopwatch()
    with tempfile.TemporaryDirectory() as temporary:
        data, model = Path(temporary) / "data", Path(temporary) / "model"
        source = upsampled(case, size, Path(temporary)) if size else case
        label = source / "label.nii.gz"
        watch.run(
            "prepare.py", "-i", source / "volume.nii.gz", *(("-l", label) if joint else ()), "-o", data,
            "--keep_every", keep, "--bits", 8, *(("--window", *window) if window else ()),
        )  # fmt: skip
        masks = ("--pipeline", "joint", "--seg_source_path", data / "seg") if joint else ()
        shared = ("-m", model, "--device", device, "--quiet")
        watch.run("train.py", "-s", data / "img", *shared, *masks, "--preset", preset, *extra)
        watch.run("render.py", *shared, "--interp", keep, "--pipeline", "both" if joint else "img")
        if joint:
            watch.run("slices_to_ply.py", "-i", model, "-o", Path(temporary) / "mesh", "--inter", keep)
        scores = json.loads((model / "evaluation.json").read_text())
        saved = load_checkpoint(newest(model), "cpu")
        spent = json.loads((model / "time.json").read_text())
    last = [row for row in scores if row["iteration"] == saved.iteration and row["method"] == "model"]
    return {
        "case": case.name,
        "upsampled": list(size) if size else None,
        "keep": keep,
        "preset": preset,
        "pipeline": "joint" if joint else "img",
        "options": list(extra),
        "iterations": saved.iteration,
        "gaussians": len(saved.params["xyz"]),
        "clock": watch.clock,
        "processors": watch.processors,
        "train.py": spent["parts"],
        "memory": spent["memory"],
        "scores": last,
        "load": os.getloadavg()[0],
    }


def shown(rows: Sequence[Row]) -> str:
    """One line per row: scores of held-out frames (with --keep 1, of training frames), seconds in total and by
    program."""

    def score(row: Row, task: str, name: str, form: str) -> str:
        frames = "heldout" if row["keep"] > 1 else "training"
        found = [r for r in row["scores"] if (r["task"], r["frames"]) == (task, frames)]
        return format(found[0][name], form) if found else "-"

    lines = [
        [
            f"{row['case']}{_size(row)}, 1/{row['keep']}, {row['pipeline']}",
            " ".join([row["preset"], *row["options"]]),
            f"{score(row, 'img', 'psnr', '.2f')} / {score(row, 'img', 'ssim', '.4f')}",
            score(row, "seg", "dice", ".4f"),
            f"{sum(row['clock'].values()):.0f}",
            f"{sum(row['processors'].values()):.0f}",
            ", ".join(f"{name.removesuffix('.py')} {s:.0f}" for name, s in row["processors"].items()),
            f"{row['train.py']['whole process']:.1f}",
            f"{row['train.py'].get('motion', 0):.1f}",
            f"{row['memory'] / 1e9:.2f}" if "memory" in row else "-",
            row["about"]["machine"] if row["about"]["device"] == "cpu" else row["about"]["device"],
            f"{row['load']:.1f}",
        ]
        for row in rows
    ]
    headers = [
        "case",
        "preset",
        "held out",
        "Dice",
        "s",
        "processor s",
        "of these",
        "train.py, s",
        "motion, s",
        "GB",
        "on",
        "load",
    ]
    return table(headers, lines)


def _size(row: Row) -> str:
    return " at " + " x ".join(map(str, row["upsampled"])) if row.get("upsampled") else ""


def save(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = ",\n".join(json.dumps(row) for row in rows)
    with atomic_write(path) as unfinished:
        unfinished.write_text(f"[\n{text}\n]\n", encoding="utf-8")


def parser() -> ArgumentParser:
    out = ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        usage="%(prog)s CASE [CASE ...] [options] [-- options of train.py]",
    )
    out.add_argument("cases", nargs="+", type=Path, metavar="CASE", help="folder with volume.nii.gz")
    out.add_argument("--presets", nargs="+", choices=PRESETS, default=["quick"])
    out.add_argument("--keep", type=positive, default=2, help="every N-th slice is kept (default: 2)")
    out.add_argument("--images_only", action="store_true", help="leave labels out")
    out.add_argument(
        "--upsample",
        nargs=3,
        type=positive,
        metavar="N",
        help="columns, rows and slices to interpolate to first",
    )
    out.add_argument("--device", default="auto", help="auto, cuda, cuda:N or cpu")
    out.add_argument("--out", type=Path, default=OUT, help=f"rows are appended to this file (default: {OUT})")
    return out


def main(arguments: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    at = words.index("--") if "--" in words else len(words)
    given: argparse.Namespace = parser().parse_args(words[:at])
    extra = words[at + 1 :]
    device = resolve_device(given.device)
    rows: list[Row] = json.loads(given.out.read_text()) if given.out.exists() else []
    for case in given.cases:
        if not (case / "volume.nii.gz").is_file():
            raise UserError(f"{case} has no volume.nii.gz: give the folder of a case")
        for preset in given.presets:
            row = measure(case, preset, given.keep, given.images_only, str(device), given.upsample, extra)
            rows.append(row | {"about": describe(device)})
            save(given.out, rows)
    print(shown(rows))
    print(f"\n{len(rows)} rows: {given.out}")
    return 0


if __name__ == "__main__":
    run(main)
