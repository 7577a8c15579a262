"""DICOM files: finding them, reading their headers, and what kind of object each is."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from patient.readers.common import damage, optional
from utils.errors import UserError

SUFFIXES = (".dcm", ".ima", ".dicom")
SEGMENTATIONS = {  # SOP classes that are read as labels
    "1.2.840.10008.5.1.4.1.1.66.4": "a segmentation (DICOM SEG)",
    "1.2.840.10008.5.1.4.1.1.66.7": "a label map (DICOM SEG)",
    "1.2.840.10008.5.1.4.1.1.481.3": "a structure set (RTSTRUCT)",
}
STRUCTURE_SET = "1.2.840.10008.5.1.4.1.1.481.3"
_WHOLE = 32 << 20  # bytes up to which a file is read at once


@dataclass(frozen=True)
class Header:
    """One DICOM file without its pixels, with the deciding tags converted."""

    path: Path
    dataset: Any
    """pydicom's, without pixel data."""
    kind: str
    """UID of its SOP class."""
    kind_name: str
    """In words."""
    series: str
    instance: str
    has_pixels: bool
    size: tuple[int, int, int]
    """Columns, rows and frames."""

    def text(self, keyword: str) -> str:
        return text(self.dataset, keyword)

    def numbers(self, keyword: str, count: int | None = None) -> np.ndarray | None:
        return numbers(self.dataset, keyword, count)

    def number(self, keyword: str) -> float | None:
        return number(self.dataset, keyword)


def numbers(dataset: Any, keyword: str, count: int | None = None) -> np.ndarray | None:
    """The finite values of a tag, or None if it is absent, empty, not numeric, or not `count` values."""
    try:
        value = dataset.get(keyword)
        if value is None or (isinstance(value, (str, bytes)) and not str(value).strip()):
            return None
        found = np.atleast_1d(np.array(value, np.float64))
    except Exception:  # pydicom converts on access: damaged text raises whatever it meets
        return None
    if found.ndim != 1 or not found.size or not np.isfinite(found).all() or count not in (None, found.size):
        return None
    return found


def text(dataset: Any, keyword: str) -> str:
    """A tag as text; empty if it is absent or damaged."""
    try:
        value = dataset.get(keyword)
    except Exception:  # as above
        return ""
    return "" if value is None else str(value).strip(" \0")


def number(dataset: Any, keyword: str) -> float | None:
    found = numbers(dataset, keyword, 1)
    return None if found is None else float(found[0])


def items(dataset: Any, keyword: str) -> list[Any]:
    """The items of a sequence; none if it is absent."""
    try:
        return list(dataset.get(keyword) or [])
    except Exception:
        return []


def pydicom_for(path: Path) -> Any:
    return optional("pydicom", "pydicom", f"reading {path}")


def load(path: Path) -> Any:
    """pydicom's dataset of a file. A small one is read whole, so that no damaged length asks for more than is there."""
    pydicom = pydicom_for(path)
    if path.stat().st_size <= _WHOLE:
        return pydicom.dcmread(io.BytesIO(path.read_bytes()), force=True)
    return pydicom.dcmread(path, force=True, defer_size=4096)


def read_header(path: Path) -> Header:
    """The header of one file. Raises UserError that says what else it is."""
    pydicom = pydicom_for(path)
    with damage(path, "is not a DICOM file, or its header is damaged"):
        dataset = load(path)
        meta = getattr(dataset, "file_meta", None)
        kind = str(dataset.get("SOPClassUID") or (meta.get("MediaStorageSOPClassUID") if meta else "") or "")
        name = pydicom.uid.UID(kind).name
        has_pixels = False
        for word in ("PixelData", "FloatPixelData", "DoubleFloatPixelData"):
            if word in dataset:
                has_pixels = True
                del dataset[word]  # read again when needed
        rows, columns = number(dataset, "Rows"), number(dataset, "Columns")
        frames = number(dataset, "NumberOfFrames")
        series, instance = (str(dataset.get(f"{what}InstanceUID") or "") for what in ("Series", "SOP"))
    if not len(dataset) or not (kind or (has_pixels and rows)):
        raise UserError(f"{path} is not a DICOM file, or its header is damaged: it names no kind of object")
    return Header(
        path,
        dataset,
        kind,
        name if name != kind else f"private kind {kind}",
        series,
        instance,
        has_pixels and bool(rows and columns),
        (int(columns or 0), int(rows or 0), max(int(frames or 1), 1)),
    )


def find(folder: Path, deep: bool) -> list[Path]:
    """Files of a folder, and if `deep` of the folders in it, that are DICOM by suffix, mark or first tag."""
    return [file for file in _files(folder, deep) if is_dicom(file)]


def is_dicom(file: Path) -> bool:
    if file.name.upper() == "DICOMDIR":
        return False  # an index of the others
    if file.suffix.lower() in SUFFIXES:
        return True
    try:
        with file.open("rb") as stream:
            start = stream.read(132)
    except OSError:
        return False
    # Part 10 has DICM after 128 bytes; older files begin with a tag of group 2 or 8, and its VR or a short length.
    if start[128:] == b"DICM":
        return True
    plain = start[:2] in (b"\x08\x00", b"\x02\x00") and start[3:4] == b"\x00"
    return plain and ((start[4:6].isalpha() and start[4:6].isupper()) or start[6:8] == b"\x00\x00")


def _files(folder: Path, deep: bool) -> Iterator[Path]:
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".")) if deep else []
        for name in sorted(names):
            file = Path(place, name)
            if not name.startswith(".") and file.is_file():
                yield file


def readable(files: Iterable[Path]) -> Iterator[Header]:
    """The headers of those files that have one."""
    for file in files:
        try:
            yield read_header(file)
        except UserError:
            continue


def read_headers(path: Path, files: Iterable[Path]) -> tuple[list[Header], list[str]]:
    """The headers of images, and descriptions of the files without one. Raises UserError where none is an image."""
    headers: list[Header] = []
    left_out: list[str] = []
    for file in files:
        try:
            header = read_header(file)
        except UserError:
            left_out.append(file.name)
            continue
        if header.has_pixels:
            headers.append(header)
        else:
            left_out.append(f"{file.name} ({header.kind_name.removesuffix(' Storage')})")
    return headers, left_out


def pixel_spacing(dataset: Any) -> tuple[tuple[float, float], str] | None:
    """Millimetres between columns and between rows, and the tag that says so; None if none does."""
    for keyword in ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing"):
        found = numbers(dataset, keyword, 2)
        if found is not None and (found > 0).all():
            return (float(found[1]), float(found[0])), keyword
    for region in items(dataset, "SequenceOfUltrasoundRegions"):
        units = number(region, "PhysicalUnitsXDirection"), number(region, "PhysicalUnitsYDirection")
        steps = number(region, "PhysicalDeltaX"), number(region, "PhysicalDeltaY")
        if units == (3, 3) and steps[0] and steps[1]:  # centimetres along both: a picture of tissue
            return (abs(steps[0]) * 10, abs(steps[1]) * 10), "SequenceOfUltrasoundRegions"
    return None


def thickness_of(header: Header) -> float | None:
    """Of a slice, mm: of the file, or of all its frames."""
    shared = items(header.dataset, "SharedFunctionalGroupsSequence")
    measures = [measure for group in shared for measure in items(group, "PixelMeasuresSequence")]
    known = (number(source, "SliceThickness") for source in (header.dataset, *measures))
    return next((value for value in known if value is not None and value > 0), None)
