"""NRRD and MetaImage: voxels read by SimpleITK, place and kind from the text of the header."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from patient.readers.common import (
    NO_ORIENTATION,
    chosen_volume,
    from_lps,
    quiet_libraries,
    simple_itk,
)
from patient.readers.itk_files import TextHeader, pixels, read_text_header
from patient.readers.tracked import resampled
from patient.volumes import Choice, Sizes, Volume
from utils.errors import UserError

_UNITS = {
    **dict.fromkeys(("mm", "millimeter", "millimeters"), 1.0),
    **dict.fromkeys(("um", "micron", "microns", "micrometer", "micrometers"), 1e-3),
    **dict.fromkeys(("cm", "centimeter"), 10.0),
    **dict.fromkeys(("m", "meter"), 1000.0),
    "nm": 1e-6,
}
"""Units of length in millimetres."""
_COLOURS = ("rgb-color", "rgba-color", "3-color", "4-color", "xyz-color", "hsv-color")
_LISTS = (
    "list",
    "point",
    "covariant-vector",
    "normal",
    "3-gradient",
    "3-normal",
    "4-vector",
    "quaternion",
    "stub",
)


def read(path: Path, choice: Choice) -> Volume:
    """NRRD and MetaImage, 3-D or 4-D; the 4th axis may be one of components, layers or times."""
    with quiet_libraries():
        return _read(path, choice)


def _read(path: Path, choice: Choice) -> Volume:
    sitk = simple_itk(f"reading {path}")
    header = read_text_header(path)
    if header.poses:
        if choice.resample is None:
            raise UserError(
                f"{path} is a tracked sequence: each of its frames has its own pose"
                f" ({header.poses[0].split('_', 2)[-1]}), so it is not an even volume. Reconstruct it (PLUS"
                " VolumeReconstructor, or SlicerIGT), or give --resample MM"
            )
        return resampled(path, header, choice.resample)
    array, image = pixels(path, header, sitk)
    values, axis = _spatial_first(array, header, image)
    dimension = image.GetDimension()
    colours = axis is None and values.ndim == 4
    chosen = None
    if values.ndim == 4 and not colours:
        chosen = chosen_volume(path, values.shape[3], choice.frame)
        values = values[..., chosen or 0]
    if values.dtype.kind not in "uif":
        raise UserError(f"{path} holds {values.dtype}: a volume holds real numbers")
    affine, sizes, notes = _place(path, header, image, dimension)
    full_scale = (0.0, 255.0) if colours else None
    bits = 8 if values.dtype.itemsize == 1 else 16
    return Volume(values, affine, bits, path.name, chosen, full_scale, notes=notes, sizes=sizes)


def read_layers(path: Path, header: TextHeader, sitk: Any, choice: Choice) -> tuple[Volume, np.ndarray]:
    """The place of a file, as a Volume without voxels, and all its layers (I, J, K, layers)."""
    array, image = pixels(path, header, sitk)
    values, _ = _spatial_first(array, header, image)
    affine, sizes, notes = _place(path, header, image, image.GetDimension())
    bits = 8 if values.dtype.itemsize == 1 else 16
    place = Volume(np.empty((0, 0, 0)), affine, bits, path.name, notes=notes, sizes=sizes)
    return place, values if values.ndim == 4 else values[..., None]


def volume_count(path: Path) -> int:
    """How many volumes a file holds, by its header; 1 for colours."""
    header = read_text_header(path)
    if header.poses:
        return 1
    array, image = pixels(path, header, simple_itk(f"reading {path}"))
    values, axis = _spatial_first(array, header, image)
    return values.shape[3] if axis is not None else 1


def _spatial_first(array: np.ndarray, header: TextHeader, image: Any) -> tuple[np.ndarray, str | None]:
    """Values (x, y, z) or (x, y, z, n), and what the last axis is; None for colours, or if there is none."""
    components = image.GetNumberOfComponentsPerPixel()
    dimension = image.GetDimension()
    if components > 1 and dimension == 4:
        raise UserError(f"it is 5-D: time and {components} components per voxel; a volume has one number")
    if components > 1:  # (z, y, x, component)
        values = array.transpose(2, 1, 0, 3)
        kinds = [kind for kind in header.kinds if kind not in ("domain", "space")]
        named = kinds[0] if kinds else ""
        is_colour = components in (3, 4) and array.dtype == np.uint8
        is_colour = is_colour and (named in _COLOURS or not header.nrrd or named not in _LISTS)
        return values, None if is_colour else "component"
    if dimension == 4:
        return array.transpose(3, 2, 1, 0), "time"
    return array.transpose(2, 1, 0), None


def _place(
    path: Path, header: TextHeader, image: Any, dimension: int
) -> tuple[np.ndarray | None, Sizes | None, list[str]]:
    """Affine, or the known sizes without one, and notes on it."""
    notes: list[str] = []
    directions = np.array(image.GetDirection()).reshape(dimension, dimension)[:3, :3]
    spacing, origin = np.array(image.GetSpacing()[:3]), np.array(image.GetOrigin()[:3])
    if not _states_spacing(header):
        notes.append("its header gives no voxel size: sizes are in voxels, not in millimetres")
        return None, None, notes
    scale = _unit(header, notes)
    affine = from_lps(directions * spacing * scale, origin * scale, path)
    if header.nrrd and "space" not in header.fields:
        words = "its header names no space"
        words += (
            ": its axes are taken as left, posterior, superior"
            if "space directions" in header.fields
            else f": {NO_ORIENTATION}"
        )
        notes.append(words)
    return affine, None, notes


def _states_spacing(header: TextHeader) -> bool:
    if header.nrrd:
        found = header.fields.get("space directions", "") + " " + header.fields.get("spacings", "")
    else:
        found = header.fields.get("elementspacing", "") + " " + header.fields.get("elementsize", "")
    numbers = re.findall(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?", found)
    return len(numbers) >= 3


def _unit(header: TextHeader, notes: list[str]) -> float:
    """Millimetres per unit of the header's lengths."""
    if header.nrrd:
        told = header.fields.get("space units", "") or header.fields.get("units", "")
        units = [unit for unit in re.findall(r'"([^"]*)"', told) if unit.strip()]
    else:
        units = [header.fields["distanceunits"]] if "distanceunits" in header.fields else []
    names = [
        unit.strip().replace("\u00b5", "u").replace("\u00c2", "").replace("\u03bc", "u") for unit in units
    ]
    spatial = [name for name in names[:3] if name not in ("s", "ms", "second", "?")]
    if not spatial or all(name.lower() == "mm" for name in spatial):
        return 1.0
    known = {_UNITS.get(name.lower()) for name in spatial}
    if len(known) > 1 or None in known:
        notes.append(f"its unit of length ({', '.join(spatial)}) is unknown: taken as millimetres")
        return 1.0
    notes.append(f"its lengths are in {spatial[0]}: converted to millimetres")
    return float(known.pop() or 1.0)
