"""DICOM: series of slices, files of many frames, and videos; segmentations are in `patient.readers.dicom.segments`.

Tags are read by name (pydicom), so that no place, spacing or scale is a library's default.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from patient.geometry import is_even
from patient.readers.common import NO_ORIENTATION, listed, quiet_libraries
from patient.readers.dicom import pixels
from patient.readers.dicom.files import (
    SEGMENTATIONS,
    Header,
    find,
    is_dicom,
    pydicom_for,
    read_header,
    read_headers,
    thickness_of,
)
from patient.readers.dicom.frames import Frame, frame_times, frames_of
from patient.readers.dicom.places import in_order, one_volume, place, place_by_location
from patient.volumes import Choice, Sizes, Volume
from utils.errors import UserError

_ODD_SPACINGS = {
    "ImagerPixelSpacing": "pixel sizes are those at the detector (ImagerPixelSpacing), not in the patient",
    "NominalScannedPixelSpacing": "pixel sizes are those of the scanner of films (NominalScannedPixelSpacing)",
}


@dataclass(frozen=True)
class Slices:
    """The slices of one volume, in order, without their pixels."""

    path: Path
    frames: list[Frame]
    index: int | None
    """Which volume of a series that is 4-D."""
    affine: np.ndarray | None
    """Voxel (column, row, slice) indices to RAS millimetres (4, 4)."""
    depths: np.ndarray | None
    """As `Volume.depths`."""
    sizes: Sizes | None
    """As `Volume.sizes`."""
    notes: list[str]


def read(path: Path, choice: Choice) -> Volume:
    """A file of several frames, or one series of a folder, or of its subfolders if the folder itself holds none."""
    with quiet_libraries():
        return _with_pixels(_slices(path, choice))


def read_slices(path: Path, choice: Choice) -> Slices:
    """Where the slices of the volume lie that `read` reads. Raises UserError, as that does."""
    with quiet_libraries():
        return _slices(path, choice)


def _slices(path: Path, choice: Choice) -> Slices:
    if path.name.upper() == "DICOMDIR":
        path = path.resolve().parent
    if path.is_dir():
        return _of_folder(path, find(path, deep=False) or find(path, deep=True), choice)
    header = read_header(path)
    if not header.has_pixels or header.kind in SEGMENTATIONS:
        raise _not_an_image(header)
    _refuse_mosaic(header)
    if header.size[2] < 2 and not pixels.is_video(header):
        raise UserError(f"{path} is one slice: give -i the folder of its series")
    return _of_headers(path, [header], choice, [])


def _not_an_image(header: Header) -> UserError:
    name = header.kind_name.removesuffix(" Storage")
    if header.kind in SEGMENTATIONS:
        return UserError(
            f"{header.path} is {SEGMENTATIONS[header.kind]}, not an image: give it as the label, -l"
        )
    return UserError(f"{header.path} is of DICOM kind {name}, and holds no image")


def _refuse_mosaic(header: Header) -> None:
    if "MOSAIC" in header.text("ImageType"):
        raise UserError(
            f"{header.path} is a mosaic, all slices tiled in one image: convert it (dcm2niix) to NIfTI"
        )


def _of_folder(path: Path, files: list[Path], choice: Choice) -> Slices:
    pydicom_for(path)
    headers, left_out = read_headers(path, files)
    images = [header for header in headers if header.kind not in SEGMENTATIONS]
    if not images and headers:
        raise _not_an_image(headers[0])
    if not images:
        raise UserError(f"{path} has no DICOM image that can be read (tried {listed(left_out)})")
    left_out += [
        f"{header.path.name} ({header.kind_name.removesuffix(' Storage')})"
        for header in headers
        if header.kind in SEGMENTATIONS
    ]
    notes = [f"left out, because they hold no image: {listed(left_out)}"] if left_out else []
    found: dict[str, list[Header]] = defaultdict(list)
    for header in images:
        found[header.series].append(header)
    if choice.series is not None and choice.series not in found:
        raise UserError(f"{path} has no series {choice.series}: it has {_series(found)}")
    if choice.series is None and len(found) > 1:
        raise UserError(
            f"{path} holds {len(found)} series: choose one for -i with --series UID, or give a folder of one:"
            f" {_series(found)}"
        )
    return _of_headers(path, _without_copies(found[choice.series or next(iter(found))], notes), choice, notes)


def _without_copies(headers: list[Header], notes: list[str]) -> list[Header]:
    """Drop files that have the instance UID and pixels of another, with a note of how many."""
    kept: dict[str, Header] = {}
    others, dropped = [], 0
    for header in headers:
        first = kept.setdefault(header.instance, header) if header.instance else header
        if first is header:
            if not header.instance:
                others.append(header)
        elif _same_pixels(first, header):
            dropped += 1
        else:
            others.append(header)
    if dropped:
        copies = "copies of other files are" if dropped > 1 else "copy of another file is"
        notes.append(f"{dropped} {copies} left out (the same SOP instance UID)")
    return [*kept.values(), *others]


def _same_pixels(first: Header, second: Header) -> bool:
    a, b = (header.path.read_bytes() for header in (first, second))
    return a == b or (
        first.size == second.size and np.array_equal(pixels.decode(first), pixels.decode(second))
    )


def _of_headers(path: Path, headers: list[Header], choice: Choice, notes: list[str]) -> Slices:
    """The slices of the chosen volume of a series."""
    first = headers[0]
    for other in headers:
        if other.size[:2] != first.size[:2]:
            raise UserError(
                f"{other.path} has {other.size[0]} x {other.size[1]} pixels, but {first.path.name} {first.size[0]} x"
                f" {first.size[1]}: slices have one size"
            )
        _refuse_mosaic(other)
    if not first.kind_name[0].isupper():
        notes.append(f"its kind is not one of DICOM's ({first.kind_name}): read by its tags")
    frames = [frame for header in headers for frame in frames_of(header, notes)]
    cine = len(headers) == 1 and len(frames) > 1 and not any(frame.placed for frame in frames)
    if (
        not cine
        and any(header.size[2] > 1 for header in headers)
        and not all(frame.placed for frame in frames)
    ):
        many = next(header for header in headers if header.size[2] > 1)
        if len(headers) > 1:
            raise UserError(
                f"{many.path} holds {many.size[2]} frames beside other files: give -i this file alone"
            )
    index = None
    affine, depths, sizes = None, None, None
    if cine or pixels.is_video(first):
        frames, depths, sizes = _cine(first, frames, notes)
    else:
        frames, index = one_volume(path, frames, choice, notes)
        if all(frame.placed for frame in frames):
            frames, affine, depths, sizes = place(path, frames, notes)
        else:
            frames = in_order(path, frames, notes)
            affine, depths, sizes = place_by_location(frames, path, notes)
    _say_spacing(frames[0], notes)
    return Slices(path, frames, index, affine, depths, sizes, notes)


def _cine(
    header: Header, frames: list[Frame], notes: list[str]
) -> tuple[list[Frame], np.ndarray | None, Sizes | None]:
    """Frames of a file that have no place: in file order, and at their times if those are uneven."""
    notes.append("its frames do not say where they lie in the patient: they are taken in file order")
    times, depths = frame_times(header), None
    if times is not None and not is_even(times):
        depths = times / float(np.median(np.diff(times)))
        notes.append("its frames are unevenly spaced in time, and keep their times")
    spacing = frames[0].spacing
    return frames, depths, (*spacing, None) if spacing else None


def _say_spacing(frame: Frame, notes: list[str]) -> None:
    if frame.spacing is None:
        notes.append("no tag says how large a pixel is: sizes are in pixels, not in millimetres")
    elif frame.spacing_source in _ODD_SPACINGS:
        notes.append(_ODD_SPACINGS[frame.spacing_source])
    if frame.in_volume:
        notes.append(f"places are those in the ultrasound's own volume, not in the patient: {NO_ORIENTATION}")


def _with_pixels(slices: Slices) -> Volume:
    path, frames, notes = slices.path, slices.frames, slices.notes
    affine, depths, sizes = slices.affine, slices.depths, slices.sizes
    first = frames[0].header
    slots: dict[Path, list[int]] = defaultdict(list)
    for slot, frame in enumerate(frames):
        slots[frame.header.path].append(slot)
    parts: list[np.ndarray] = [np.empty(0)] * len(frames)
    padded: list[np.ndarray] = [np.empty(0)] * len(frames)
    some_padded, turned = False, 0
    bits, lossy = 8, False
    for of in slots.values():
        header = frames[of[0]].header
        stored = pixels.decode(header)
        if pixels.is_video(header) and len(stored) != len(frames):
            notes.append(f"its video has {len(stored)} frames, where the header says {len(frames)}")
            frames = [frames[0]] * len(stored)
            of, parts, padded = (
                list(range(len(stored))),
                [np.empty(0)] * len(stored),
                [np.empty(0)] * len(stored),
            )
            depths = None
        order = (
            [frames[slot].index for slot in of] if not pixels.is_video(header) else list(range(len(stored)))
        )
        stored = stored[order]
        outside = pixels.padding(stored, header)
        if header.text("PhotometricInterpretation") == "MONOCHROME1" and stored.ndim == 3:
            stored, turned = pixels.turn_monochrome1(stored, header), turned + 1
        if stored.ndim == 3:
            stored = pixels.rescaled(stored, [frames[slot].scale for slot in of], header)
        for number, slot in enumerate(of):
            parts[slot] = stored[number]
            padded[slot] = np.zeros(stored.shape[1:3], bool) if outside is None else outside[number]
        some_padded |= outside is not None
        low, high = pixels.stored_range(header)
        bits = max(bits, 8 if stored.dtype.itemsize == 1 or high - low < 256 else 16)
        lossy |= header.text("LossyImageCompression") == "01" or pixels.is_video(header)
    if len({part.shape[2:] for part in parts}) > 1:
        raise UserError(f"{path} mixes grey and colour slices: they must be of one kind")
    if turned:
        notes.append("MONOCHROME1, which shows small numbers white: black and white are swapped")
    if pixels.has_modality_lut(first):
        notes.append("its modality LUT is not applied: values are as stored")
    if first.text("DoseUnits"):
        notes.append(f"numbers are dose in {first.text('DoseUnits').capitalize()}, scaled by DoseGridScaling")
    values = np.stack(parts)
    full_scale = (0.0, 255.0) if values.dtype == np.uint8 and (values.ndim == 4 or affine is None) else None
    return Volume(
        values.transpose(2, 1, 0, *range(3, values.ndim)),
        affine,
        bits,
        path.resolve().name,
        slices.index,
        full_scale,
        depths,
        lossy,
        notes,
        sizes,
        np.stack(padded).transpose(2, 1, 0) if some_padded else None,
        instances=tuple(frame.header.instance for frame in frames),
        frame_of_reference=first.text("FrameOfReferenceUID") or None,
        thickness=thickness_of(first),
    )


def _series(found: dict[str, list[Header]]) -> str:
    """Every series with its number of files and its description."""
    lines = []
    for uid, headers in found.items():
        about = " ".join(filter(None, (headers[0].text("Modality"), headers[0].text("SeriesDescription"))))
        lines.append(f"{uid or 'without UID'} ({len(headers)} files{', ' if about else ''}{about})")
    return "; ".join(lines)


__all__ = ["Slices", "find", "is_dicom", "read", "read_slices"]
