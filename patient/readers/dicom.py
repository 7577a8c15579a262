"""DICOM: series of slices, and files of many frames."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from patient.geometry import is_even
from patient.readers.common import from_lps, listed, missing_words, optional, reason, simple_itk
from patient.volumes import Choice, Volume
from utils.errors import UserError

_SAME = 1e-3  # direction cosines of parallel slices agree to this; headers write 6 digits
_TILT = 0.1  # degrees off the slices' normal, under which rounding explains it


_ENHANCED = re.compile(r"1\.2\.840\.10008\.5\.1\.4\.1\.1\.(2\.[12]|4\.[14]|128\.1|130|6\.2)$")
_PIXELS = b"\xe0\x7f\x10\x00"  # the tag of pixel data, which reports and plans have not


@dataclass(frozen=True)
class _Slice:
    """Where one slice lies."""

    name: str
    position: np.ndarray
    """Of its first pixel's centre, LPS mm."""
    steps: np.ndarray
    """LPS millimetres from one column, and from one row, to the next, (3, 2)."""
    number: int | None
    """Its instance number."""


@dataclass(frozen=True)
class _File:
    """One DICOM file, its header read."""

    path: Path
    reader: Any  # sitk.ImageFileReader

    def tag(self, key: str) -> str:
        return self.reader.GetMetaData(key).strip(" \0") if self.reader.HasMetaDataKey(key) else ""

    @property
    def size(self) -> tuple[int, int, int]:
        """Columns, rows and frames."""
        columns, rows, *frames = self.reader.GetSize()
        return columns, rows, frames[0] if frames else 1

    @property
    def number(self) -> int | None:
        text = self.tag("0020|0013")
        return int(text) if re.fullmatch(r"[+-]?\d+", text) else None

    def slice(self) -> _Slice | None:
        """Where its one slice lies, if it says so."""
        if not (self.tag("0020|0032") and self.tag("0020|0037")):
            return None
        steps = np.array(self.reader.GetDirection()).reshape(3, 3)[:, :2] * self.reader.GetSpacing()[:2]
        return _Slice(self.path.name, np.array(self.reader.GetOrigin()), steps, self.number)

    def read(self, sitk: Any) -> np.ndarray:
        """Rescaled values (frame, row, column[, 3])."""
        try:
            image = self.reader.Execute()
        except RuntimeError as error:
            raise UserError(f"{self.path} is damaged: {reason(error)}") from error
        array = sitk.GetArrayFromImage(image)
        return array if image.GetDimension() > 2 else array[None]


def dicom_files(folder: Path) -> list[Path]:
    """Files of a folder that are DICOM by their name or their mark (part 10: DICM behind 128 bytes)."""

    def is_dicom(file: Path) -> bool:
        if not file.is_file() or file.name.startswith(".") or file.name.upper() == "DICOMDIR":
            return False
        if file.suffix.lower() in (".dcm", ".ima"):
            return True
        with file.open("rb") as stream:
            return stream.read(132)[128:] == b"DICM"

    return [file for file in sorted(folder.iterdir()) if is_dicom(file)]


def read_folder(path: Path, choice: Choice) -> Volume:
    """One series of a folder."""
    return _read(path, dicom_files(path), choice.series)


def read_file(path: Path, choice: Choice) -> Volume:
    volume = _read(path, [path], None)
    if volume.values.shape[2] < 2:
        raise UserError(f"{path} is one slice: give -i the folder of its series")
    return volume


def _read(path: Path, files: list[Path], series: str | None) -> Volume:
    """One series, its slices sorted along their normal; a single file of many frames is a volume or a cine."""
    sitk = simple_itk(f"reading the DICOM files of {path}")
    notes: list[str] = []
    found: dict[str, list[_File]] = {}
    unread = []
    for file in files:
        reader = sitk.ImageFileReader()
        reader.SetImageIO("GDCMImageIO")
        reader.SetFileName(str(file))
        try:
            reader.ReadImageInformation()
        except RuntimeError as error:
            if _PIXELS in file.read_bytes():
                raise UserError(f"{file} is damaged, or cut off: copy it again, or take it out") from error
            unread.append(file.name)
            continue
        header = _File(file, reader)
        found.setdefault(header.tag("0020|000e"), []).append(header)
    if not found:
        raise UserError(f"{path} has no DICOM image that can be read (tried {listed(unread)})")
    if unread:
        notes.append(f"left out, because there is no image in it: {listed(unread)}")
    if series is not None and series not in found:
        raise UserError(f"{path} has no series {series}: it has {_series(found)}")
    if series is None and len(found) > 1:
        raise UserError(
            f"{path} holds {len(found)} series: choose one for -i with --series UID, or give a folder of one:"
            f" {_series(found)}"
        )
    chosen = found[series or next(iter(found))]

    first = chosen[0]
    for other in chosen:
        if other.size[:2] != first.size[:2]:
            raise UserError(
                f"{other.path} has {other.size[0]} x {other.size[1]} pixels, but {first.path.name} {first.size[0]} x"
                f" {first.size[1]}: slices have one size"
            )
        if "MOSAIC" in other.tag("0008|0008"):
            raise UserError(
                f"{other.path} is a mosaic, all slices tiled in one image: convert it (dcm2niix) to NIfTI"
            )
        if len(chosen) > 1 and other.size[2] > 1:
            raise UserError(
                f"{other.path} holds {other.size[2]} frames beside other files: give -i this file alone"
            )

    affine, depths, order = None, None, list(range(max(len(chosen), first.size[2])))
    if first.size[2] > 1 and not _ENHANCED.match(first.tag("0008|0016")):
        notes.append("its frames do not say where they lie in the patient: they are taken in their order")
    else:
        slices = [file.slice() for file in chosen] if first.size[2] == 1 else _enhanced_slices(first.path)
        known = [place for place in slices if place is not None]
        if len(known) == len(order):
            order, affine, depths = _place(path, known, notes)
        else:
            order.sort(key=lambda k: -1 if (number := chosen[k].number) is None else number)
            notes.append(
                "the files do not say where slices lie: they are taken by their numbers, evenly spaced"
            )

    in_order = [chosen[k] for k in order] if len(chosen) > 1 else chosen
    stack = [file.read(sitk) for file in in_order]
    if len({array.shape[1:] for array in stack}) > 1:
        raise UserError(f"{path} mixes grey and colour slices: they have to be of one kind")
    values = np.concatenate(stack) if len(chosen) > 1 else stack[0][order]
    stored = first.tag("0028|0101")
    bits = 8 if values.dtype.itemsize == 1 or (stored.isdecimal() and int(stored) <= 8) else 16
    full_scale = (0.0, 255.0) if values.dtype == np.uint8 and (values.ndim == 4 or affine is None) else None
    values = values.transpose(2, 1, 0, *range(3, values.ndim))
    lossy = first.tag("0028|2110") == "01"
    return Volume(values, affine, bits, path.resolve().name, None, full_scale, depths, lossy, notes)


def _enhanced_slices(path: Path) -> list[_Slice]:
    """Where the frames of an enhanced file lie: each says it in a sequence of its own, which ITK does not show."""
    pydicom = optional("pydicom", "pydicom", f"reading {path}, a volume in one file,")
    header = pydicom.dcmread(path, stop_before_pixels=True)
    shared = header.get("SharedFunctionalGroupsSequence") or [pydicom.Dataset()]
    slices, scales = [], set()
    try:
        for number, frame in enumerate(header.PerFrameFunctionalGroupsSequence):
            groups = {element.keyword: element.value for place in (shared[0], frame) for element in place}
            position = groups["PlanePositionSequence"][0].ImagePositionPatient
            cosines = np.array(groups["PlaneOrientationSequence"][0].ImageOrientationPatient, float)
            row, column = groups["PixelMeasuresSequence"][0].PixelSpacing  # from row to row, column to column
            steps = cosines.reshape(2, 3).T * (float(column), float(row))
            slices.append(_Slice(f"frame {number}", np.array(position, float), steps, None))
            for scale in groups.get("PixelValueTransformationSequence", []):
                scales.add((float(scale.RescaleSlope), float(scale.RescaleIntercept)))
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise UserError(f"{path} does not say where its frames lie ({error}): convert it to NIfTI") from error
    if len(scales) > 1:
        raise UserError(f"{path} rescales its frames differently, which is not read: convert it to NIfTI")
    return slices


def _place(
    path: Path, slices: list[_Slice], notes: list[str]
) -> tuple[list[int], np.ndarray, np.ndarray | None]:
    """The order of slices, their affine, and their depths where they are uneven; what is unusual is noted."""
    steps = slices[0].steps
    for other in slices:
        if np.abs(other.steps - steps).max() > _SAME * np.linalg.norm(steps, axis=0).max():
            raise UserError(
                f"{path}: {other.name} and {slices[0].name} differ in orientation or pixel size: a volume has parallel"
                " slices (is a localizer among them?)"
            )
    normal = np.cross(steps[:, 0], steps[:, 1])
    normal /= np.linalg.norm(normal)
    order = sorted(range(len(slices)), key=lambda k: float(slices[k].position @ normal))
    slices = [slices[k] for k in order]
    positions = np.array([place.position for place in slices])
    heights = positions @ normal
    gaps = np.diff(heights)
    if not gaps.size:
        return order, from_lps(np.column_stack((steps, normal)), positions[0], path), None
    twins = np.flatnonzero(gaps <= 0.01 * np.median(gaps))
    if twins.size:
        a, b = slices[twins[0]].name, slices[twins[0] + 1].name
        raise UserError(
            f"{path}: {twins.size} slices lie where another one does ({a} and {b}): the series has several time points,"
            " echoes or copies; put those of one into a folder"
        )
    line = (positions[-1] - positions[0]) / (heights[-1] - heights[0])  # per mm along the normal
    astray = np.linalg.norm(positions - positions[0] - np.outer(heights - heights[0], line), axis=1)
    if astray.max() > 0.1 * np.linalg.norm(steps, axis=0).min():
        raise UserError(
            f"{path}: {slices[int(astray.argmax())].name} lies {astray.max():.3g} mm beside the line of the others:"
            " slices of a volume are stacked along one direction"
        )
    tilt = float(np.degrees(np.arccos(min(1.0, 1 / np.linalg.norm(line)))))
    if tilt > _TILT:
        notes.append(
            f"gantry tilt of {tilt:.1f} degrees: slices are shifted against each other, and the affine is sheared as"
            " they are; nothing is resampled"
        )
    numbers = sorted(place.number for place in slices if place.number is not None)
    missing = sorted(set(range(numbers[0], numbers[-1] + 1)) - set(numbers)) if numbers else []
    # Every second number of an even stack, say, is how some archives count.
    if missing and len(np.unique(np.diff(numbers))) > 1:
        notes.append(missing_words(map(str, missing), "instance number"))

    even = is_even(heights)
    step = float(gaps.mean() if even else np.median(gaps))
    if not even:
        absent = np.rint(gaps / step).astype(int) - 1
        places = [f"{absent[k]} behind {slices[k].name}" for k in np.flatnonzero(absent)]
        if places and np.abs(gaps / step - absent - 1).max() < 0.05:
            count = int(absent.sum())
            what = f"{count} slice{'s are' if count > 1 else ' is'} missing ({listed(places)})"
        else:
            what = f"slices are unevenly spaced, {gaps.min():.4g} to {gaps.max():.4g} mm apart"
        notes.append(f"{what}: the others keep their true places and times")
    affine = from_lps(np.column_stack((steps, line * step)), positions[0], path)
    return order, affine, None if even else (heights - heights[0]) / step


def _series(found: dict[str, list[_File]]) -> str:
    """Every series with the number of its slices and what it says of itself."""
    lines = []
    for uid, files in found.items():
        about = " ".join(filter(None, (files[0].tag("0008|0060"), files[0].tag("0008|103e"))))
        lines.append(f"{uid or 'without UID'} ({len(files)} files{', ' if about else ''}{about})")
    return "; ".join(lines)
