"""How long the steps of a case will take, before it is read: a model of their cost, by the size of the data.

Its numbers come from whole runs on two cores of an AMD EPYC (benchmarks/results/minutes) and on an NVIDIA H100
(benchmarks/NOTES.md), which it meets within a quarter. Expect half on another machine. train.py measures its own pace
before the first iteration.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from arguments import TrainOptions
from patient.geometry import Geometry
from patient.readers import dicom
from patient.readers.itk_files import read_text_header
from patient.readers.nifti import nifti_grid
from training.schedule import fitted
from utils.errors import UserError
from utils.images import image_files
from utils.threads import processors

CORES = 2  # that the CPU's numbers are for


@dataclass(frozen=True)
class Load:
    """The size of a case: frames to train on, all slices, pixels per frame, and images per frame, 2 with a label;
    rendered: slices that render.py writes."""

    frames: int
    slices: int
    pixels: int
    images: int
    rendered: int


@dataclass(frozen=True)
class Costs:
    """Seconds of one kind of machine.

    start: of a program, until it begins. motion: of predicting frames in between, and per pixel of all frames.
    iteration: of any, and per pixel of all its renders. scored, drawn: per pixel of a rendered image, with its scores
    and classical interpolation, or written to a file. report: its pictures. meshed: per pixel of a dense mask.
    """

    start: float
    motion: tuple[float, float]
    iteration: tuple[float, float]
    scored: float
    drawn: float
    report: float
    meshed: float


CPU = Costs(2.0, (10.0, 7e-6), (8e-3, 1.1e-7), 3e-7, 8e-8, 8.0, 2e-7)
GPU = Costs(3.0, (2.0, 4e-7), (1.2e-3, 8e-10), 5e-9, 5e-8, 6.0, 2e-7)
IMPORTS = 1.7  # of the start: what a fork of a program that has imported torch does not repeat


def seconds_of(step: str, load: Load, options: TrainOptions, on_gpu: bool, forked: bool) -> float:
    """What a step will take. options: of train.py. forked: whether it starts with torch imported."""
    costs = GPU if on_gpu else CPU
    faster = 1.0 if on_gpu else CORES / min(processors(), 8)  # more cores than that hardly help
    start = costs.start - (IMPORTS if forked else 0.0)
    if step == "train":
        return _training(load, options, costs, start, faster)
    work = {
        "prepare": 1e-7 * load.slices * load.pixels * load.images,
        "render": costs.drawn * load.rendered * load.pixels * load.images,
        "mesh": costs.meshed * load.rendered * load.pixels,
        "report": costs.report,
    }
    return start + work[step]


def _training(load: Load, options: TrainOptions, costs: Costs, start: float, faster: float) -> float:
    if options.time is not None:
        return 60 * options.time
    options = fitted(options, load.frames * load.pixels)
    size = min(options.batch_size, load.frames)
    taught = options.lambda_ibfr > 0
    motion = costs.motion[0] + costs.motion[1] * load.frames * load.pixels
    iteration = costs.iteration[0]
    iteration += costs.iteration[1] * faster * (2 * size - 1 if taught else size) * load.pixels * load.images
    return (
        start
        + (motion * faster if taught and options.ibfr_target == "motion" else 0.0)
        + options.iterations * iteration
        + costs.scored * load.slices * load.pixels * load.images
    )


# ---- size ------------------------------------------------------------------------------------------------------------


def load_of(image: Path, prepared: Path, keep_every: int, interp: int, labels: int) -> Load | None:
    """The size of a case, from the headers of its files alone; None where they do not tell. prepared: its frames.json,
    which knows best where it is there."""
    try:
        shape = _prepared(prepared) if prepared.exists() else _shape(image)
    except (UserError, OSError, ValueError, KeyError):  # prepare.py names what is wrong
        return None
    if shape is None:
        return None
    slices, pixels = shape
    frames = -(-slices // keep_every)
    return Load(frames, slices, pixels, 1 + (labels > 0), frames * interp)


def _prepared(path: Path) -> tuple[int, int]:
    """(slices, pixels of each)."""
    geometry = Geometry.load(path)
    return len(geometry.slices) + len(geometry.heldout_slices), geometry.size[0] * geometry.size[1]


def _shape(path: Path) -> tuple[int, int] | None:
    """(slices, pixels of each), as prepare.py cuts: across the axis of the coarsest spacing."""
    if path.is_dir():
        return _folder(path)
    name = path.name.lower()
    if name.endswith((".nii", ".nii.gz", ".hdr", ".img")):
        shape, affine = nifti_grid(path)
        return _cut(shape, np.linalg.norm(affine[:3, :3], axis=0))
    if name.endswith((".nrrd", ".nhdr", ".mha", ".mhd")):
        fields = read_text_header(path).fields
        sizes = [int(word) for word in fields.get("sizes", fields.get("dimsize", "")).split()]
        return _cut(sizes[-3:], np.ones(3)) if len(sizes) >= 3 else None
    return None


def _cut(shape: Any, spacing: np.ndarray) -> tuple[int, int]:
    axis = 2 - int(np.argmax(np.round(spacing[::-1], 3)))  # the last one of equals
    return int(shape[axis]), int(np.prod(shape)) // int(shape[axis])


def _folder(folder: Path) -> tuple[int, int] | None:
    images = image_files(folder)
    if images:
        with Image.open(images[0]) as image:
            return len(images), image.width * image.height
    found = dicom.find(folder, deep=True)
    size = max((path.stat().st_size for path in found), default=0)
    return (
        (len(found), size // 2) if len(found) > 1 else None
    )  # 16 bits per pixel, where it is not compressed
