"""A folder of images, one per frame."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from patient.geometry import is_even
from patient.readers.common import listed, missing_words, stacked
from patient.volumes import Choice, Volume
from utils.errors import UserError
from utils.images import image_files, read_image


def read(path: Path, choice: Choice) -> Volume:
    """Images ordered by number, as (column, row, frame[, channel]), without millimetres."""
    notes: list[str] = []
    files = in_order(path, image_files(path), notes)
    images = []
    for file in files:
        images.append(read_image(file))
        if (images[-1].shape, images[-1].dtype) != (images[0].shape, images[0].dtype):
            raise UserError(
                f"{file} is {_describe(images[-1])}, but {files[0].name} is {_describe(images[0])}:"
                " frames have one size and one kind"
            )
    depths = numbered_depths(files, notes)
    lossy = any(file.suffix.lower() in (".jpg", ".jpeg") for file in files)
    return stacked(np.stack(images), path.resolve().name, notes, lossy=lossy, depths=depths)


def _number(file: Path) -> int | None:
    """The last number in a name."""
    found = re.findall(r"[0-9]+", file.stem)
    return int(found[-1]) if found else None


def in_order(folder: Path, files: list[Path], notes: list[str]) -> list[Path]:
    """Files by the last number in their names, by name if some have none. Raises UserError if two are equal."""
    negative = [file for file in files if re.search(r"(^|[^0-9A-Za-z])-[0-9]+[^0-9]*$", file.stem)]
    if negative:
        raise UserError(
            f"{folder} has negative numbers in its names ({listed([file.name for file in negative], 3)}), which would"
            " be taken without their sign: number frames from 0"
        )
    numbers = [_number(file) for file in files]
    if None in numbers:
        if len(files) > 1:
            notes.append("not every name has a number: frames are ordered by name")
        return files
    by_number: dict[int | None, Path] = {}
    for number, file in zip(numbers, files, strict=True):
        if number in by_number:
            raise UserError(
                f"{by_number[number]} and {file.name} have the same number, {number}, which says which frame it is:"
                " remove one, or rename it"
            )
        by_number[number] = file
    return [by_number[number] for number in sorted(by_number)]  # type: ignore[type-var]


def numbered_depths(files: list[Path], notes: list[str]) -> np.ndarray | None:
    """Depths by the last numbers in the names, if some are missing: a gap in the numbers is a gap in time."""
    found = [_number(file) for file in files]
    numbers = np.array([-1 if number is None else number for number in found], np.float64)
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
