"""Multi-page TIFF."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import tifffile

from patient.readers import pictures
from patient.readers.common import (
    DEFLATE,
    NO_ORIENTATION,
    check_claim,
    chosen_volume,
    from_lps,
    grey,
    listed,
    quiet_libraries,
    reason,
    stacked,
)
from patient.volumes import Choice, Sizes, Volume
from utils.errors import UserError
from utils.images import check_pixels

_MOST_TAGS = 1000  # per page: writers use about twenty
_UNITS = {
    "nm": 1e-6, "nanometer": 1e-6, "um": 1e-3, "micron": 1e-3, "microns": 1e-3, "micrometer": 1e-3, "mm": 1.0,
    "millimeter": 1.0, "cm": 10.0, "centimeter": 10.0, "m": 1000.0, "meter": 1000.0, "inch": 25.4, "in": 25.4,
}  # fmt: skip
"""Units of ImageJ and OME in millimetres."""


def read(path: Path, choice: Choice) -> Volume:
    """A multi-page TIFF; of one with two axes of pages (ImageJ, OME), `index` chooses along the first."""
    _check_directories(path)
    try:
        with quiet_libraries(), tifffile.TiffFile(path) as file:
            if not file.series:
                raise UserError(f"{path} holds no pages, or is damaged")
            if len(file.series) != 1:
                kinds = listed([" x ".join(map(str, series.shape)) for series in file.series])
                raise UserError(
                    f"{path} holds pages of several kinds ({kinds}): frames have one size and one kind"
                )
            pages, page = file.series[0], file.pages.first
            check_pixels(path, page.imagewidth, page.imagelength)
            plain = page.compression == tifffile.COMPRESSION.NONE
            check_claim(
                path,
                int(np.prod(pages.shape, dtype=object)) * pages.dtype.itemsize,
                None,
                1 if plain else DEFLATE,
            )
            for each in file.pages:  # a frame of a series has only counts
                check_claim(path, max(each.databytecounts, default=0), None, 1)
            array, axes = pages.asarray(), pages.axes
            sizes = _voxel_sizes(file, page)
            if page.photometric == tifffile.PHOTOMETRIC.PALETTE:
                array = grey(np.moveaxis((page.colormap[:, array] // 257).astype(np.uint8), 0, -1))
            elif page.photometric == tifffile.PHOTOMETRIC.MINISWHITE:
                array = np.invert(array)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # damaged bytes raise whatever they meet
        if "imagecodecs" in str(error):
            return pictures.read(path, choice)  # LZW, JPEG and fax codes, which Pillow decodes
        raise UserError(f"{path} cannot be read: {reason(error)}") from error
    if "S" in axes and array.ndim == len(axes):
        array, axes = np.moveaxis(array, axes.index("S"), -1), axes.replace("S", "") + "S"
    array = array.astype(np.uint8) * np.uint8(255) if array.dtype == np.bool_ else array
    paged = axes.replace("S", "")[:-2]
    chosen = None
    if len(paged) == 2:
        chosen = chosen_volume(path, array.shape[0], choice.frame)
        array = array[chosen or 0]
    elif len(paged) != 1:
        what = f"{len(paged) + 2}-D ({axes})" if paged else "one page"
        raise UserError(f"{path} holds {what}: a stack has two pages or more, along one axis")
    if array.dtype.kind not in "uif" or (array.ndim == 4 and array.shape[3] not in (3, 4)):
        raise UserError(
            f"{path} holds {array.dtype} of shape {array.shape}: frames are real numbers, grey or RGB"
        )
    volume = stacked(array, path.name, [], index=chosen)
    if sizes is not None and paged[-1:] == "T":  # pages in time have no thickness
        sizes = (*sizes[:2], None)
    if sizes is None or None in sizes:
        return replace(volume, sizes=sizes)
    volume.notes.append(NO_ORIENTATION)
    return replace(
        volume, affine=from_lps(np.diag([float(size or 0) for size in sizes]), (0.0, 0.0, 0.0), path)
    )


def _check_directories(path: Path) -> None:
    """Refuse a file whose chain of directories loops or leaves the file.

    A damaged count can make a directory of millions of entries, which take minutes to follow.
    """
    with path.open("rb") as file:
        start = file.read(16)
        order = {b"II": "<", b"MM": ">"}.get(start[:2])
        if order is None or len(start) < 16:
            raise UserError(f"{path} cannot be read: it is not a TIFF file")
        big = struct.unpack(order + "H", start[2:4])[0] == 43
        count_code, entry, next_code, (offset,) = (
            ("Q", 20, "Q", struct.unpack(order + "Q", start[8:16]))
            if big
            else ("H", 12, "I", struct.unpack(order + "I", start[4:8]))
        )
        size, seen = path.stat().st_size, set[int]()
        count_size, next_size = struct.calcsize(order + count_code), struct.calcsize(order + next_code)
        while offset:
            file.seek(offset)
            head = file.read(count_size)
            tags = struct.unpack(order + count_code, head)[0] if len(head) == count_size else 0
            end = offset + count_size + tags * entry
            if offset in seen or not 0 < tags <= _MOST_TAGS or end > size:
                raise UserError(
                    f"{path} cannot be read: the list of its pages is damaged after page {len(seen)}"
                )
            seen.add(offset)
            file.seek(end)
            follows = file.read(next_size)
            offset = struct.unpack(order + next_code, follows)[0] if len(follows) == next_size else 0


def _voxel_sizes(file: tifffile.TiffFile, page: Any) -> Sizes | None:
    """Millimetres of a voxel as ImageJ or OME wrote them; a resolution in dots per inch alone is for printers."""
    if file.is_ome and file.ome_metadata:
        pixels = ElementTree.fromstring(file.ome_metadata).find(".//{*}Pixels")
        if pixels is None:
            return None
        found = [
            _length(pixels.get(f"PhysicalSize{axis}"), pixels.get(f"PhysicalSize{axis}Unit", "\u00b5m"))
            for axis in "XYZ"
        ]
        return None if found[0] is None or found[1] is None else (found[0], found[1], found[2])
    told = file.imagej_metadata
    if not told or "unit" not in told:
        return None
    unit = str(told["unit"])
    steps = []
    for tag in ("XResolution", "YResolution"):
        value = page.tags[tag].value if tag in page.tags else (0, 1)
        steps.append(_length(value[1] / value[0] if value[0] else None, unit))
    if None in steps:
        return None
    return steps[0], steps[1], _length(told.get("spacing"), unit)


def _length(value: object, unit: str) -> float | None:
    """A positive length in millimetres; None if it is not one, or its unit is not of length."""
    name = unit.replace("\\u00B5", "u").replace("\u00b5", "u").replace("\u03bc", "u").strip().lower()
    try:
        length = float(value) * _UNITS[name]  # type: ignore[arg-type]
    except (TypeError, ValueError, KeyError):
        return None
    return length if 0 < length < np.inf else None
