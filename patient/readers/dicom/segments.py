"""DICOM segmentations (SEG): binary, fractional and label map, placed where their frames or referenced slices lie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from nibabel.affines import apply_affine
from skimage.color import lab2rgb

from patient.geometry import swap_ras_lps
from patient.readers.common import damage, from_lps
from patient.readers.dicom import pixels
from patient.readers.dicom.files import Header, items, number, numbers, text
from patient.readers.dicom.frames import Frame, frames_of
from patient.segments import Segment, Segments, layered
from patient.volumes import Volume
from utils.errors import UserError

LABEL_MAP = "1.2.840.10008.5.1.4.1.1.66.7"
_MOST = 65535  # the largest segment number


def read(header: Header, reference: Volume | None) -> Segments:
    """The segments of a SEG file, on the reference's slices if it lies on them, else on its own even grid."""
    path = header.path
    notes: list[str] = []
    named = _named(header)
    check_reference(header, reference, _referenced(header), notes)
    frames = frames_of(header, notes)
    with damage(path):
        stored = pixels.decode(header)
    if stored.ndim != 3:
        raise UserError(f"{path} holds colours: a segmentation has one number per pixel")
    if header.kind == LABEL_MAP or header.text("SegmentationType") == "LABELMAP":
        present = np.unique(stored)
        parts = [
            (int(value), frame, stored[k] == value)
            for k, frame in enumerate(frames)
            for value in present
            if value
        ]
    else:
        parts = []
        for k, frame in enumerate(frames):
            if "segment" not in frame.keys:
                raise UserError(f"{path} is damaged: frame {k} does not say which segment it belongs to")
            parts.append((int(frame.keys["segment"]), frame, stored[k]))
        if header.text("SegmentationType") == "FRACTIONAL":
            whole = number(header.dataset, "MaximumFractionalValue") or 255
            parts = [(segment, frame, values >= 0.5 * whole) for segment, frame, values in parts]
            notes.append(f"its segments are fractional: inside from half of {whole:g}")
        else:
            parts = [(segment, frame, values != 0) for segment, frame, values in parts]
    grid = _Grid.of(path, [frame for _, frame, _ in parts] or frames, reference, notes)
    masks: dict[int, np.ndarray] = {}
    for segment, frame, mask in parts:
        if not 0 < segment <= _MOST:
            raise UserError(f"{path} is damaged: a frame belongs to segment {segment}")
        masks.setdefault(segment, np.zeros(grid.shape, bool))[:, :, grid.slot(frame)] |= mask.T
    empty = [str(which) for which in named if which not in masks]
    if empty:
        notes.append(f"segments without any voxel: {', '.join(empty)}")
    layers, where = layered(sorted(masks.items()), grid.shape)
    found = []
    for (which, _), layer in zip(sorted(masks.items()), where, strict=True):
        name, colour = named.get(which, (f"segment {which}", None))
        found.append(Segment(which, name, layer, which, colour))
    return Segments(str(path), tuple(found), tuple(layers), grid.affine, grid.depths, notes)


def _named(header: Header) -> dict[int, tuple[str, tuple[int, int, int] | None]]:
    """Label and colour of each segment by its number."""
    named = {}
    for item in items(header.dataset, "SegmentSequence"):
        which = number(item, "SegmentNumber")
        if which is None or which == 0:  # 0 is the background of a label map
            continue
        kinds = items(item, "SegmentedPropertyTypeCodeSequence")
        name = text(item, "SegmentLabel") or (text(kinds[0], "CodeMeaning") if kinds else "")
        named[int(which)] = name or f"segment {which:g}", _colour(item)
    return named


def _colour(item: Any) -> tuple[int, int, int] | None:
    """The recommended display colour, stored as 16 bits each of L in [0, 100], a and b in [-128, 127]."""
    lab = numbers(item, "RecommendedDisplayCIELabValue", 3)
    if lab is None:
        return None
    unit = lab / 65535
    red, green, blue = lab2rgb([unit[0] * 100, unit[1] * 255 - 128, unit[2] * 255 - 128])
    return round(red * 255), round(green * 255), round(blue * 255)


def _referenced(header: Header) -> set[str]:
    """Instance UIDs of the images that a segmentation was made from."""
    found = set()
    for series in items(header.dataset, "ReferencedSeriesSequence"):
        for keyword in ("ReferencedInstanceSequence", "ReferencedImageSequence"):
            found |= {text(item, "ReferencedSOPInstanceUID") for item in items(series, keyword)}
    return found


def check_reference(header: Header, reference: Volume | None, referenced: set[str], notes: list[str]) -> None:
    """Refuse a segmentation in another frame of reference than its image; note one made from other images."""
    if reference is None or not reference.instances:
        return
    theirs, ours = header.text("FrameOfReferenceUID"), reference.frame_of_reference
    same_images = bool(referenced & set(reference.instances))
    if theirs and ours and theirs != ours and not same_images:
        raise UserError(
            f"{header.path} was made from other images than {reference.name}, in another frame of reference: it is"
            " unknown where it lies on them"
        )
    if referenced and not same_images:
        notes.append(f"it was made from other images than {reference.name}, in the same frame of reference")


class _Grid:
    """Slices that frames lie on."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        affine: np.ndarray,
        depths: np.ndarray | None,
        slots: dict[int, int],
    ) -> None:
        self.shape, self.affine, self.depths, self._slots = shape, affine, depths, slots

    def slot(self, frame: Frame) -> int:
        return self._slots[frame.index]

    @classmethod
    def of(cls, path: Path, frames: list[Frame], reference: Volume | None, notes: list[str]) -> _Grid:
        columns, rows, _ = frames[0].header.size
        if not all(frame.placed for frame in frames):
            return cls._by_instance(path, frames, reference)
        orientation, spacing = frames[0].orientation, frames[0].spacing
        if spacing is None or orientation is None:
            raise UserError(f"{path} does not say how large its pixels are")
        if any(
            np.abs(np.array(f.orientation) - orientation).max() > 1e-3 or f.spacing != spacing for f in frames
        ):
            raise UserError(
                f"{path}: its frames differ in orientation or pixel size: they do not form a volume"
            )
        if reference is not None and reference.affine is not None:
            slots = _on_slices_of(reference, frames, (columns, rows))
            if slots is not None:
                return cls(
                    (columns, rows, reference.values.shape[2]), reference.affine, reference.depths, slots
                )
        normal = np.cross(orientation[:, 0], orientation[:, 1])
        heights = np.array([frame.position @ normal for frame in frames])
        levels = _distinct(heights)
        told = _between_slices(frames[0])
        gaps = np.diff(levels)
        step = float(gaps.min()) if gaps.size else told or 1.0
        if (
            told
            and gaps.size
            and np.abs(gaps / told - np.rint(gaps / told)).max() < 0.05
            and (gaps > 0.5 * told).all()
        ):
            step = told  # omitted empty frames may leave wider gaps only
        places = (levels - levels[0]) / step
        if np.abs(places - np.rint(places)).max() > 0.05:
            raise UserError(
                f"{path}: its frames are unevenly spaced ({gaps.min():.4g} to {gaps.max():.4g} mm) and lie on no"
                " slices of the image"
            )
        first = frames[int(heights.argmin())]
        steps = np.column_stack((orientation * spacing, normal * step))
        affine = from_lps(steps, first.position, path)  # type: ignore[arg-type]
        slots = {f.index: int(np.rint((h - levels[0]) / step)) for f, h in zip(frames, heights, strict=True)}
        # An empty slice at each end: beyond the first and the last frame is outside.
        affine[:3, 3] -= affine[:3, 2]
        count = int(np.rint(places[-1])) + 3
        return cls((columns, rows, count), affine, None, {index: slot + 1 for index, slot in slots.items()})

    @classmethod
    def _by_instance(cls, path: Path, frames: list[Frame], reference: Volume | None) -> _Grid:
        """Frames without places, which each name the image that they were made from."""
        where = {uid: k for k, uid in enumerate(reference.instances)} if reference is not None else {}
        slots = {}
        for frame in frames:
            group = items(frame.header.dataset, "PerFrameFunctionalGroupsSequence")[frame.index]
            sources = [
                text(source, "ReferencedSOPInstanceUID")
                for item in items(group, "DerivationImageSequence")
                for source in items(item, "SourceImageSequence")
            ]
            slot = next((where[uid] for uid in sources if uid in where), None)
            if slot is None:
                raise UserError(f"{path} does not say where its frames lie, nor on which slices of the image")
            slots[frame.index] = slot
        assert reference is not None
        columns, rows, _ = frames[0].header.size
        if (columns, rows) != reference.values.shape[:2]:
            raise UserError(
                f"{path} has {columns} x {rows} pixels, but {reference.name} {reference.values.shape[:2]}"
            )
        affine = np.eye(4) if reference.affine is None else reference.affine
        return cls((columns, rows, reference.values.shape[2]), affine, reference.depths, slots)


def _between_slices(frame: Frame) -> float | None:
    shared = items(frame.header.dataset, "SharedFunctionalGroupsSequence")
    groups = items(frame.header.dataset, "PerFrameFunctionalGroupsSequence")[frame.index : frame.index + 1]
    for place in (*groups, *shared):
        for measures in items(place, "PixelMeasuresSequence"):
            if step := number(measures, "SpacingBetweenSlices"):
                return abs(step)
    return None


def _distinct(heights: np.ndarray) -> np.ndarray:
    """Increasing heights, merging those within a thousandth of a millimetre."""
    levels = np.sort(heights)
    return levels[np.concatenate(([True], np.diff(levels) > 1e-3))]


def _on_slices_of(reference: Volume, frames: list[Frame], size: tuple[int, int]) -> dict[int, int] | None:
    """The reference's slice of each frame, if every frame lies pixel for pixel on one; else None."""
    assert reference.affine is not None
    if reference.values.shape[:2] != size:
        return None
    inverse = np.linalg.inv(reference.affine)
    depths = np.arange(reference.values.shape[2]) if reference.depths is None else reference.depths
    slots = {}
    for frame in frames:
        assert frame.position is not None and frame.orientation is not None and frame.spacing is not None
        ends = [np.zeros(3), np.array([size[0] - 1.0, 0, 0]), np.array([0, size[1] - 1.0, 0])]
        corners = [frame.position + frame.orientation @ (end[:2] * frame.spacing) for end in ends]
        at = apply_affine(inverse, swap_ras_lps(np.array(corners)))
        slot = int(np.abs(depths - at[0, 2]).argmin())
        expected = np.array(ends)
        expected[:, 2] = depths[slot]
        if np.abs(at - expected).max() > 0.05:
            return None
        slots[frame.index] = slot
    return slots
