#!/usr/bin/env python3
"""Many cases: how many an hour, on one GPU and on several, with one training and with several on each.

    python -m benchmarks.cohort 1x1:4 1x2:8 1x4 2x4 --out benchmarks/results/cohort/NAME.json

GxP:N is N cases (default: --cases) on G GPUs with P places on each. medgs.py does whole cases, from a volume and its
label to the report, in parts that run side by side and share the GPUs by its own locks (`-num_parts`, `--per_gpu`).
There are twice as many parts as places, so that one case's mesh is made while another trains. The cases are phantoms:
ellipsoids of their own sizes and textures.

The rate counts while the GPUs are in use: from the first training's start to the last rendering's end. The wall time
also has Python, torch and prepare.py of the first cases, and mesh and report of the last. Arguments after -- go to
medgs.py.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

import nibabel
import numpy as np
import torch

from benchmarks.common import ROOT, describe, table
from cases.case import ON_GPU, STEPS, CaseResult
from cases.gpus import visible_gpus
from utils.errors import ArgumentParser, UserError, positive, run
from utils.files import atomic_write

SIZE = (112, 112, 36)
OUT = Path("output/benchmark/cohort.json")


@dataclass(frozen=True)
class Shared:
    """How the machine is shared: GPUs, places on each, and cases."""

    gpus: int
    places: int
    cases: int

    @classmethod
    def read(cls, text: str, cases: int) -> Shared:
        match = re.fullmatch(r"(\d+)x(\d+)(?::(\d+))?", text)
        if not match or "0" in match.groups():
            raise UserError(f"{text} is not GPUSxPLACES or GPUSxPLACES:CASES, such as 2x4:16")
        return cls(int(match[1]), int(match[2]), int(match[3] or cases))


@dataclass(frozen=True)
class Measured:
    """done: cases of `shared` that were done in time. rate: cases an hour. wall, busy: seconds in all, and while the
    GPUs are in use. steps: median seconds of each. held: mean number of places in use."""

    shared: Shared
    done: int
    rate: float
    wall: float
    busy: float
    held: float
    steps: dict[str, float]


# ---- cases -----------------------------------------------------------------------------------------------------------


def write_cases(folder: Path, count: int, size: Sequence[int]) -> Path:
    """Phantoms and their table."""
    lines = ["case,image,label"]
    for number in range(count):
        image, label = phantom(np.random.default_rng(number), size)
        for name, values in (("image", image), ("label", label)):
            nibabel.save(
                nibabel.Nifti1Image(values, np.diag([1.0, 1.0, 3.0, 1.0])), folder / f"{name}{number}.nii.gz"
            )
        lines.append(f"case{number:02},image{number}.nii.gz,label{number}.nii.gz")
    (folder / "cases.csv").write_text("\n".join(lines) + "\n")
    return folder / "cases.csv"


def phantom(random: np.random.Generator, size: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Twelve textured ellipsoids (int16) in a body, and a mask of the largest (uint8)."""
    axes = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in size), indexing="ij"))

    def inside(centre: np.ndarray, radii: np.ndarray) -> np.ndarray:
        return (((axes - centre[:, None, None, None]) / radii[:, None, None, None]) ** 2).sum(0) < 1

    image = 200.0 * inside(np.zeros(3), np.array([0.9, 0.8, 1.2]))
    label = inside(random.uniform(-0.2, 0.2, 3), random.uniform(0.35, 0.5, 3))
    image[label] += 300
    for _ in range(11):
        spot = inside(random.uniform(-0.6, 0.6, 3), random.uniform(0.08, 0.25, 3))
        image[spot] += random.uniform(-150, 400)
    waves = np.sin((axes * random.uniform(4, 12, 3)[:, None, None, None]).sum(0))
    return (image * (1 + 0.1 * waves) + random.normal(0, 5, image.shape)).astype(np.int16), label.astype(
        np.uint8
    )


# ---- measuring -------------------------------------------------------------------------------------------------------


def measure(
    table_of_cases: Path, out: Path, shared: Shared, words: Sequence[str], threads: int, deadline: float
) -> Measured:
    gpus = visible_gpus()
    if len(gpus) < shared.gpus:
        raise UserError(f"{shared.gpus} GPUs: there are {len(gpus)} here")
    parts = min(2 * shared.gpus * shared.places, shared.cases)
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": ",".join(gpus[: shared.gpus]),
        "OMP_NUM_THREADS": str(threads),
    }
    command = [
        sys.executable,
        str(ROOT / "medgs.py"),
        "--cases",
        str(table_of_cases),
        "-o",
        str(out),
        "--quiet",
    ]
    command += ["--per_gpu", str(shared.places), "-num_parts", str(parts), *words]
    start, told = time.time(), 0.0
    log = out.with_suffix(".log")
    with log.open("wb") as kept:
        running = [
            subprocess.Popen([*command, "-part_id", str(part)], env=environment, stdout=kept, stderr=kept)
            for part in range(parts)
        ]
    while any(process.poll() is None for process in running):
        if time.time() - told > 10:
            told = time.time()
            print(f"  {told - start:.0f} s: {len(list(out.glob('*/report.html')))} cases", flush=True)
        if told > deadline:
            for process in running:
                process.terminate()
            break
        time.sleep(0.2)
    for process in running:
        process.wait()
    wall = time.time() - start
    results = [CaseResult(folder.parent) for folder in sorted(out.glob("*/run.json"))]
    records = [result.record.steps for result in results if "render" not in result.missing]
    failed = [result.record.failure for result in results if result.record.failure]
    if not records or (failed and told < deadline):
        raise UserError(f"{len(records)} of {shared.cases} cases done: {failed} {log.read_text()[-2000:]}")
    ended = [{name: datetime.fromisoformat(s.finished).timestamp() for name, s in r.items()} for r in records]
    first = min(end["train"] - record["train"].seconds for end, record in zip(ended, records, strict=True))
    busy = max(end["render"] for end in ended) - first
    held = sum(record[name].seconds for record in records for name in ON_GPU) / busy
    steps = {
        name: statistics.median(record[name].seconds for record in records if name in record)
        for name in STEPS
    }
    return Measured(shared, len(records), 3600 * len(records) / busy, wall, busy, held, steps)


def shown(rows: Sequence[Measured]) -> str:
    """A line per row, with the gain over the first."""
    lines = [
        [
            f"{row.shared.gpus} x {row.shared.places}",
            f"{row.done} of {row.shared.cases}",
            f"{row.rate:.0f}",
            f"{row.rate / rows[0].rate:.2f}",
            f"{row.wall:.0f}",
            f"{row.busy:.0f}",
            f"{row.held:.1f}",
            ", ".join(f"{name} {seconds:.1f}" for name, seconds in row.steps.items()),
        ]
        for row in rows
    ]
    return table(
        ["GPUs x places", "cases", "an hour", "gain", "wall, s", "busy, s", "in use", "medians, s"], lines
    )


def main(arguments: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    at = words.index("--") if "--" in words else len(words)
    parser = ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        usage="%(prog)s GxP[:N] ... [options] [-- options of medgs.py]",
    )
    parser.add_argument(
        "shared", nargs="+", metavar="GxP[:N]", help="N cases on G GPUs, with P places on each"
    )
    parser.add_argument("--cases", type=positive, default=16, help="N where it is not given (default: 16)")
    parser.add_argument(
        "--size", type=positive, nargs=3, default=SIZE, metavar="N", help="voxels of a phantom"
    )
    parser.add_argument("--threads", type=positive, default=2, help="processors of each case (default: 2)")
    parser.add_argument(
        "--seconds", type=positive, default=100_000, help="stop after so long, with what is done"
    )
    parser.add_argument("--out", type=Path, default=OUT, help=f"JSON to write (default: {OUT})")
    given = parser.parse_args(words[:at])
    extra = words[at + 1 :] or ["--preset", "fast"]
    asked = [Shared.read(text, given.cases) for text in given.shared]
    deadline, rows = time.time() + given.seconds, list[Measured]()
    for shared in asked:
        print(f"{shared.cases} cases on {shared.gpus} GPUs, {shared.places} on each", flush=True)
        if time.time() > deadline:
            print(f"  left out, as {given.seconds} s are over", flush=True)
            continue
        with tempfile.TemporaryDirectory() as temporary:
            cases = write_cases(Path(temporary), shared.cases, given.size)
            try:
                rows.append(measure(cases, Path(temporary, "out"), shared, extra, given.threads, deadline))
            except UserError as error:  # what was measured before is kept
                print(f"  {error}", flush=True)
                continue
        print(shown(rows), flush=True)
        about = describe(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        about |= {"size": list(given.size), "options": extra}
        with atomic_write(given.out) as unfinished:
            text = json.dumps({"about": about, "rows": [asdict(row) for row in rows]}, indent=1)
            unfinished.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    run(main)
