"""A folder of images, one per frame."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from patient.geometry import is_even
from patient.readers.common import missing_words, stacked
from patient.readers.dicom import dicom_files
from patient.volumes import Choice, Volume
from utils.errors import UserError
from utils.images import image_files, read_image


def read(path: Path, choice: Choice) -> Volume:
    """Images by their numbers, as (column, row, frame[, channel]); nothing is known of millimetres."""
    files = image_files(path)
    if not files:
        inside = next(
            (child for child in sorted(path.iterdir()) if child.is_dir() and dicom_files(child)), None
        )
        hint = f", but {inside} has: give that" if inside else ""
        raise UserError(f"{path} has no images and no DICOM files{hint}")
    images = []
    for file in files:
        images.append(read_image(file))
        if (images[-1].shape, images[-1].dtype) != (images[0].shape, images[0].dtype):
            raise UserError(
                f"{file} is {_describe(images[-1])}, but {files[0].name} is {_describe(images[0])}:"
                " frames have one size and one kind"
            )
    notes: list[str] = []
    depths = _numbered_depths(files, notes)
    lossy = any(file.suffix.lower() in (".jpg", ".jpeg") for file in files)
    return stacked(np.stack(images), path.resolve().name, notes, lossy=lossy, depths=depths)


def _numbered_depths(files: list[Path], notes: list[str]) -> np.ndarray | None:
    """Depths by the last numbers in the names, where some are missing: a gap in the numbers is a gap in time."""
    found = [re.findall(r"\d+", file.stem) for file in files]
    numbers = np.array([int(parts[-1]) if parts else -1 for parts in found], np.float64)
    steps = np.diff(numbers)
    if len(numbers) < 3 or numbers.min() < 0 or steps.min() <= 0 or is_even(numbers):
        return None  # nothing is missing, or the names do not count
    step = float(np.median(steps))
    if (numbers[-1] - numbers[0]) / step + 1 > 2 * len(files):
        notes.append(
            "the numbers in the file names do not count the frames: their order is taken, evenly spaced"
        )
        return None
    present = set(numbers)
    missing = [
        f"{number:.0f}" for number in np.arange(numbers[0], numbers[-1], step) if number not in present
    ]
    if missing:
        notes.append(f"{missing_words(missing, 'number')}: the other frames keep their times")
    else:
        notes.append("the numbers in the file names are unevenly spaced, and so are the frames in time")
    return (numbers - numbers[0]) / step


def _describe(image: np.ndarray) -> str:
    kind = {2: "grey", 3: "RGB" if image.shape[-1] == 3 else "RGBA"}[image.ndim]
    return f"{image.shape[1]} x {image.shape[0]} {kind} {image.dtype}"
