#!/usr/bin/env python3
"""What labels cost: an iteration of joint training with 1, 10 and 104 labels on the same geometry, time and memory.

    python -m benchmarks.label_cost CASE --out benchmarks/results/organs/cost_cpu.json

CASE holds volume.nii.gz of a head without its skull. Its middle 104 slices, at 128 x 128 pixels, are cut into 104
labels: seeds are spread over the brain, each as far from the others as can be, and every voxel of the brain gets the
label of its nearest seed. Fewer labels are these, merged. Each number of labels is measured in a process of its own,
side by side with nothing; what they have in common (frames, Gaussians, views) is the same.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from scipy.ndimage import zoom
from scipy.spatial import cKDTree

from arguments import PRESETS, TrainOptions, resolve_device
from benchmarks.common import describe, synchronise, table, write_json
from training.batches import Views
from training.recording import side_stream
from training.run import Training
from utils.errors import ArgumentParser, positive, run
from utils.images import write_levels

SHAPE = (104, 128, 128)  # slices, rows, columns
MOST = 104  # labels


def main() -> None:
    parser = ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("case", type=Path, metavar="CASE")
    parser.add_argument("--labels", type=positive, nargs="+", default=[1, 10, 104], metavar="K")
    parser.add_argument("--gaussians", type=positive, default=100_000, metavar="N")
    parser.add_argument("--repeats", type=positive, default=20, help="iterations that count (default: 20)")
    parser.add_argument("--device", default="auto", help="auto, cuda, cuda:N or cpu (default: auto)")
    parser.add_argument("--out", type=Path, default=Path("output/benchmark/label_cost.json"))
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure(given.case, given.labels[0], given)))
        return
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        images, seeds = write_frames(given.case, Path(temporary))
        for count in given.labels:
            root = write_labels(images, seeds, count, Path(temporary, str(count)))
            words = [str(root), "--one", "--labels", str(count), "--gaussians", str(given.gaussians)]
            words += [
                "--repeats",
                str(given.repeats),
                "--device",
                given.device,
                "--out",
                f"{temporary}/one.json",
            ]
            rows.append(json.loads(_own_process(words)))
            print(
                f"{count} labels: {1e3 * rows[-1]['seconds']:.0f} ms, {rows[-1]['memory_MB']:.0f} MB",
                flush=True,
            )
    device = resolve_device(given.device)
    command = " ".join(["python -m benchmarks.label_cost", *sys.argv[1:]])
    write_json(given.out, {"command": command, "about": describe(device), "rows": rows})
    print(cost_table(rows))


def cost_table(rows: list[dict[str, Any]]) -> str:
    first = rows[0]
    cells = [
        [
            row["labels"],
            1e3 * row["seconds"],
            row["seconds"] / first["seconds"],
            row["memory_MB"],
            row["memory_MB"] / first["memory_MB"],
        ]
        for row in rows
    ]
    return table(["labels", "ms per iteration", "ratio", "peak memory, MB", "ratio of memory"], cells)


def _own_process(words: list[str]) -> str:
    command = [sys.executable, "-m", "benchmarks.label_cost", *words]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]


def write_frames(case: Path, folder: Path) -> tuple[Path, np.ndarray]:
    """The folder of image frames, and the label of each voxel, (slices, rows, columns) uint8, 1 to 104."""
    values = np.asarray(nibabel.load(case / "volume.nii.gz").dataobj, np.float32).transpose(2, 1, 0)
    first = (values.shape[0] - SHAPE[0]) // 2
    values = values[first : first + SHAPE[0]]
    values = zoom(values, [wanted / own for wanted, own in zip(SHAPE, values.shape, strict=True)], order=1)
    levels = np.rint(255 * (values / values.max()).clip(0, 1)).astype(np.uint8)
    for number, frame in enumerate(levels):
        write_levels(folder / "img" / "original" / f"{number:04d}.png", frame)
    places = np.argwhere(levels > 0)
    seeds = [places[0]]
    distance = np.full(len(places), np.inf)
    while len(seeds) < MOST:
        distance = np.minimum(distance, ((places - seeds[-1]) ** 2).sum(1))
        seeds.append(places[distance.argmax()])
    labels = np.zeros(levels.shape, np.uint8)
    labels[tuple(places.T)] = 1 + cKDTree(np.array(seeds)).query(places)[1]
    return folder / "img", labels


def write_labels(images: Path, labels: np.ndarray, count: int, folder: Path) -> Path:
    """A folder with the images, and the labels merged to ``count``."""
    merged = np.where(labels > 0, 1 + (labels.astype(int) - 1) % count, 0).astype(np.uint8)
    for number, frame in enumerate(merged):
        write_levels(folder / "seg" / "original" / f"{number:04d}.png", frame)
    (folder / "img").symlink_to(images)
    return folder


def measure(root: Path, count: int, given: argparse.Namespace) -> dict[str, Any]:
    """Iterations of train.py's own, with in-between frames: median seconds, and the peak of memory."""
    device = resolve_device(given.device)
    changes = PRESETS["quick"] | {"num_pts": given.gaussians, "batch_size": 3, "ibfr_target": "linear"}
    with tempfile.TemporaryDirectory() as folder:
        options = TrainOptions(
            source_path=str(root / "img"),
            seg_source_path=str(root / "seg"),
            model_path=folder,
            pipeline="joint",
            preset="quick",
            device=str(device),
            quiet=True,
            given=frozenset(changes),
            **changes,
        )
        training = Training.start(options, lambda _: None)
        with side_stream(device):
            spent = _iterations(training, given.repeats)
        seconds = statistics.median(np.diff(spent[5:]).tolist())
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(device) / 1e6
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    return {"labels": count, "gaussians": len(training.model), "seconds": seconds, "memory_MB": memory}


def _iterations(training: Training, repeats: int) -> list[float]:
    """Processor seconds, on a GPU seconds, after each of some iterations with always the same views: the middle frame,
    its neighbours, and what lies between. The first five warm up."""
    step, spent = training.stepper(), []
    for iteration in range(1, repeats + 6):
        training.iteration = iteration
        training.set_rates()
        batch = replace(
            training.sampler.draw(in_between=True),
            frames=[SHAPE[0] // 2 + k for k in (-1, 0, 1)],
            between=[(SHAPE[0] // 2 + k, 0.5) for k in (-1, 0)],
            mirrored=False,
        )
        step(Views.of(batch, training.model.device), iteration, False)
        training.update()
        synchronise(training.model.device)
        spent.append(time.perf_counter() if training.model.device.type == "cuda" else time.process_time())
    return spent


if __name__ == "__main__":
    run(main)
