"""Frames of DICOM files: where each lies, how its values are scaled, and what distinguishes it from others."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from patient.readers.common import damage
from patient.readers.dicom.files import Header, items, number, numbers, pixel_spacing, text

_PLACES = (  # functional groups of a place in the patient, and of one in the frame of the ultrasound's own volume
    ("PlanePositionSequence", "ImagePositionPatient", "PlaneOrientationSequence", "ImageOrientationPatient"),
    (
        "PlanePositionVolumeSequence",
        "ImagePositionVolume",
        "PlaneOrientationVolumeSequence",
        "ImageOrientationVolume",
    ),
)


@dataclass(frozen=True)
class Frame:
    """One image of a file, as its tags describe it."""

    header: Header
    index: int
    """In its file, from 0."""
    position: np.ndarray | None
    """(3,) LPS mm, the centre of its first pixel."""
    orientation: np.ndarray | None
    """(3, 2) unit vectors along its columns' and its rows' index, LPS."""
    spacing: tuple[float, float] | None
    """Millimetres from column to column and from row to row."""
    scale: tuple[float, float] = (1.0, 0.0)
    """Slope and intercept."""
    keys: dict[str, float | str] = field(default_factory=dict)
    """What may distinguish it from another image of the same place: acquisition, echo, time, and more."""
    number: float | None = None
    """Instance number of its file, or its number in the stack."""
    location: float | None = None
    """Slice location, mm."""
    spacing_source: str = ""
    in_volume: bool = False
    """Whether its place is in the frame of reference of an ultrasound volume, not of the patient."""

    @property
    def name(self) -> str:
        return self.header.path.name if self.header.size[2] == 1 else f"frame {self.index}"

    @property
    def placed(self) -> bool:
        return self.position is not None and self.orientation is not None


def frames_of(header: Header, notes: list[str]) -> list[Frame]:
    """Every frame of a file; anything unusual is noted."""
    with damage(header.path):
        per_frame = items(header.dataset, "PerFrameFunctionalGroupsSequence")
        count = header.size[2]
        if per_frame and len(per_frame) < count:
            notes.append(
                f"{header.path.name} describes {len(per_frame)} of its {count} frames: the description is ignored"
            )
            per_frame = []
        if per_frame:
            shared = items(header.dataset, "SharedFunctionalGroupsSequence")
            return [
                _grouped(header, shared[:1], group, k, notes) for k, group in enumerate(per_frame[:count])
            ]
        if count > 1:
            return _of_vectors(header, notes)
        return [_classic(header)]


def _unit(cosines: np.ndarray | None) -> np.ndarray | None:
    """Six direction cosines as (3, 2) unit vectors; None if they are not two directions at a right angle."""
    if cosines is None:
        return None
    steps = cosines.reshape(2, 3).T
    lengths = np.linalg.norm(steps, axis=0)
    if not (np.abs(lengths - 1) < 0.01).all():
        return None
    steps = steps / lengths
    return steps if abs(steps[:, 0] @ steps[:, 1]) < 0.01 else None


def _scale(dataset: Any) -> tuple[float, float] | None:
    slope, intercept = number(dataset, "RescaleSlope"), number(dataset, "RescaleIntercept")
    if slope is None and intercept is None:
        return None
    return 1.0 if slope is None or slope == 0 else slope, intercept or 0.0


def _dose(header: Header) -> tuple[float, float] | None:
    scaling = header.number("DoseGridScaling")
    return None if not scaling else (scaling, 0.0)


def _time(told: str) -> float | str:
    """A DICOM time, HHMMSS.F, as seconds; the text itself if it is none."""
    whole, _, part = told.partition(".")
    if len(whole) == 6 and whole.isdecimal():
        return int(whole[:2]) * 3600 + int(whole[2:4]) * 60 + int(whole[4:]) + float(f"0.{part or 0}")
    return told


def _keys(header: Header) -> dict[str, float | str]:
    """What distinguishes images of one place, as far as a single-frame file says."""
    keys: dict[str, float | str] = {}
    for name, keywords in (
        ("acquisition", ("AcquisitionNumber",)),
        ("echo", ("EchoNumbers",)),
        ("echo time", ("EchoTime",)),
        ("time", ("TemporalPositionIdentifier",)),
        ("trigger time", ("TriggerTime", "NominalCardiacTriggerDelayTime")),
        ("phase", ("NominalPercentageOfCardiacPhase",)),
        ("b-value", ("DiffusionBValue",)),
    ):
        value = next((found for word in keywords if (found := header.number(word)) is not None), None)
        if value is not None:
            keys[name] = value
    kind = header.text("ImageType")
    if kind:
        keys["image type"] = kind
    for name, word in (("acquisition time", "AcquisitionTime"), ("content time", "ContentTime")):
        if told := header.text(word):
            keys[name] = _time(told)
    return keys


def _classic(header: Header) -> Frame:
    """The one frame of a file without functional groups."""
    spacing = pixel_spacing(header.dataset)
    detector = items(header.dataset, "DetectorInformationSequence")[:1]
    position, orientation = (
        header.numbers("ImagePositionPatient", 3),
        header.numbers("ImageOrientationPatient", 6),
    )
    if position is None and detector:
        position = numbers(detector[0], "ImagePositionPatient", 3)
        orientation = (
            orientation if orientation is not None else numbers(detector[0], "ImageOrientationPatient", 6)
        )
    return Frame(
        header,
        0,
        position,
        _unit(orientation),
        spacing[0] if spacing else None,
        _scale(header.dataset) or _dose(header) or (1.0, 0.0),
        _keys(header),
        header.number("InstanceNumber"),
        header.number("SliceLocation"),
        spacing[1] if spacing else "",
    )


def _grouped(header: Header, shared: list[Any], group: Any, index: int, notes: list[str]) -> Frame:
    """A frame whose functional groups, its own before the shared ones, describe it."""

    def first(sequence: str) -> Any:
        for place in (group, *shared):
            if found := items(place, sequence):
                return found[0]
        return {}

    base = _classic(header)
    position = orientation = None
    in_volume = False
    for at, where, turned, how in _PLACES:
        position = numbers(first(at), where, 3)
        orientation = _unit(numbers(first(turned), how, 6))
        if position is not None:
            in_volume = where == "ImagePositionVolume"
            break
    spacing = pixel_spacing(first("PixelMeasuresSequence"))
    content = first("FrameContentSequence")
    scale = _scale(first("PixelValueTransformationSequence"))
    if scale is None and (world := items_of_first(group, shared, "RealWorldValueMappingSequence")):
        slope, intercept = (
            number(world[0], "RealWorldValueSlope"),
            number(world[0], "RealWorldValueIntercept"),
        )
        if slope:
            scale = slope, intercept or 0.0
            words = "numbers are scaled by the file's real-world value mapping"
            if words not in notes:
                notes.append(words)
    keys: dict[str, float | str] = {}
    for name, dataset, keyword in (
        ("acquisition", content, "FrameAcquisitionNumber"),
        ("echo time", first("MREchoSequence"), "EffectiveEchoTime"),
        ("time", content, "TemporalPositionIndex"),
        ("trigger time", first("CardiacSynchronizationSequence"), "NominalCardiacTriggerDelayTime"),
        ("time offset", first("TemporalPositionSequence"), "TemporalPositionTimeOffset"),
        ("b-value", first("MRDiffusionSequence"), "DiffusionBValue"),
        ("segment", first("SegmentIdentificationSequence"), "ReferencedSegmentNumber"),
    ):
        value = number(dataset, keyword)
        if value is not None:
            keys[name] = value
    for name, dataset, keyword in (
        ("stack", content, "StackID"),
        ("image type", first("MRImageFrameTypeSequence") or first("CTImageFrameTypeSequence"), "FrameType"),
    ):
        if dataset and (said := text(dataset, keyword)):
            keys[name] = said
    for name in ("acquisition", "echo", "time"):  # a volume split over files, one of each
        if name in base.keys and name not in keys:
            keys[name] = base.keys[name]
    in_stack = number(content, "InStackPositionNumber")
    return Frame(
        header,
        index,
        position if position is not None else base.position if header.size[2] == 1 else None,
        orientation if orientation is not None else base.orientation,
        spacing[0] if spacing else base.spacing,
        scale or base.scale,
        keys,
        in_stack if header.size[2] > 1 else base.number,
        base.location if header.size[2] == 1 else None,
        "PixelSpacing" if spacing else base.spacing_source,
        in_volume,
    )


def items_of_first(group: Any, shared: list[Any], sequence: str) -> list[Any]:
    """The sequence of a frame's own groups, else of the shared ones."""
    return next((found for place in (group, *shared) if (found := items(place, sequence))), [])


def _of_vectors(header: Header, notes: list[str]) -> list[Frame]:
    """Frames of a file without functional groups: dose grids, nuclear medicine, or a cine in time."""
    first, count = _classic(header), header.size[2]
    vectors = {
        name: values
        for name, keyword in (
            ("energy window", "EnergyWindowVector"),
            ("detector", "DetectorVector"),
            ("phase", "PhaseVector"),
            ("rotation", "RotationVector"),
            ("time", "TimeSlotVector"),
            ("slice", "SliceVector"),
            ("angle", "AngularViewVector"),
        )
        if (values := header.numbers(keyword, count)) is not None
    }
    offsets = header.numbers("GridFrameOffsetVector", count)
    positions: list[np.ndarray | None] = [None] * count
    if first.placed:
        normal = np.cross(first.orientation[:, 0], first.orientation[:, 1])  # type: ignore[index]
        if offsets is not None:
            # Either offsets along the normal, or the patient's z itself (PS3.3 C.8.8.3.2).
            absolute = offsets[0] != 0 and abs(offsets[0] - first.position[2]) < 1e-3  # type: ignore[index]
            along = np.array([0.0, 0.0, 1.0]) if absolute else normal
            positions = [first.position + along * (offset - offsets[0]) for offset in offsets]
        elif "slice" in vectors and (step := header.number("SpacingBetweenSlices")):
            # Its sign says whether slices go along the normal or against it (PS3.3 C.8.4.15).
            positions = [first.position + normal * step * (place - 1) for place in vectors.pop("slice")]
    frames = []
    for k in range(count):
        keys: dict[str, float | str] = {name: float(values[k]) for name, values in vectors.items()}
        frames.append(
            Frame(
                header,
                k,
                positions[k],
                first.orientation if positions[k] is not None else None,
                first.spacing,
                first.scale,
                keys if positions[k] is not None else {},
                float(k),
                None,
                first.spacing_source,
            )
        )
    return frames


def frame_times(header: Header) -> np.ndarray | None:
    """Milliseconds from the first frame of a cine to each, if the file gives them; else None."""
    count = header.size[2]
    steps = header.numbers("FrameTimeVector", count)
    if steps is not None and count > 1 and (steps[1:] > 0).all():
        return np.concatenate(([0.0], np.cumsum(steps[1:])))
    return None
