"""Masks as a DICOM segmentation (SEG), by highdicom: one binary segment per structure."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from patient.labels import LabelTable
from patient.readers.common import optional
from patient.readers.dicom.files import text
from patient.writers.anatomy import Code, anatomy
from patient.writers.identity import (
    MANUFACTURER,
    MODEL,
    Identity,
    equipment,
    new_uid,
    series_number,
)
from utils.files import atomic_write
from utils.version import VERSION

_KEEP_EMPTY = 64 << 20  # bytes of masks up to which empty frames are written too
_CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2"
_SOURCE = Code("121322", "Source image for image processing operation", "DCM")


@dataclass(frozen=True)
class Instance:
    """An image that another one was made from."""

    kind: str
    """UID of its SOP class."""
    uid: str
    frame: int | None = None
    """Its frame from 1, if it has several."""


@dataclass(frozen=True)
class Slices:
    """Parallel slices of one size, and the images that lie there."""

    size: tuple[int, int]
    """Columns and rows."""
    orientation: np.ndarray
    """(3, 2) unit vectors along a slice's columns and rows, LPS."""
    spacing: tuple[float, float]
    """Millimetres from column to column and from row to row."""
    positions: Sequence[np.ndarray]
    """(3,) LPS millimetres each, the centre of the first pixel."""
    thickness: float
    """Millimetres."""
    images: Sequence[Sequence[Instance]]
    """What each slice was made from; UIDs as they are to be written."""
    series: str
    """UID of the series of those images, as it is to be written."""
    aligned: bool
    """Whether a slice's pixels lie on those of its image, if that is one."""

    @property
    def regular(self) -> bool:
        """Whether they are a stack of even steps along their normal."""
        steps = np.diff(np.array(self.positions), axis=0)
        across = np.cross(self.orientation[:, 0], self.orientation[:, 1]) * self.thickness
        return bool(np.abs(steps - across).max(initial=0) < 1e-2 * self.thickness)

    def preserved(self, number: int) -> str:
        """DICOM's Spatial Locations Preserved of a slice."""
        return "YES" if self.aligned and len(self.images[number]) == 1 else "NO"


def write_segmentation(
    path: str | os.PathLike[str],
    values: np.ndarray,
    slices: Slices,
    labels: LabelTable,
    source: Any,
    identity: Identity,
    description: str,
) -> LabelTable:
    """Write label numbers (slice, row, column) as segments; returns the labels that have voxels, which are written.

    labels: names and colours. source: pydicom's dataset of an image of the series. Segments are numbered from 1 in the
    order of the labels. Of large files, slices without any voxel are left out.
    """
    hd = optional("highdicom", "highdicom", "--dicom-seg")
    pydicom = optional("pydicom", "pydicom", "--dicom-seg")
    present = np.flatnonzero(np.bincount(values.ravel(), minlength=1)[1:]) + 1
    shown = labels.of(present.tolist() or labels.ids[:1])
    numbers = np.zeros(int(max(shown.ids)) + 1, np.uint16)  # label -> segment
    numbers[list(shown.ids)] = np.arange(1, len(shown) + 1)
    small = np.uint8 if len(shown) < 256 else np.uint16
    # Along the slices' normal: some readers take that for granted.
    normal = np.cross(slices.orientation[:, 0], slices.orientation[:, 1])
    order = np.argsort([position @ normal for position in slices.positions], kind="stable")
    templates = _templates(pydicom, slices, source, identity)
    bits = len(shown) * values.size
    made = hd.seg.Segmentation(
        source_images=[templates[k] for k in order],
        pixel_array=numbers[values[order]].astype(small),
        segmentation_type="BINARY",
        segment_descriptions=_descriptions(hd, shown),
        series_instance_uid=new_uid(),
        series_number=series_number(source, 2),
        sop_instance_uid=new_uid(),
        instance_number=1,
        manufacturer=MANUFACTURER,
        manufacturer_model_name=MODEL,
        software_versions=VERSION,
        device_serial_number=VERSION,
        content_description=description[:64],
        content_label="SEGMENTATION",
        series_description=description[:64],
        specific_character_set="ISO_IR 192",
        omit_empty_frames=bits // 8 > _KEEP_EMPTY,
    )
    equipment(made)
    _refer(pydicom, made, templates, slices)
    with atomic_write(path) as temporary:
        made.save_as(temporary, enforce_file_format=True)
    return shown


def _templates(pydicom: Any, slices: Slices, source: Any, identity: Identity) -> list[Any]:
    """A single image per slice for highdicom, which reads place, patient and study from it."""
    templates = []
    for position in slices.positions:
        image = pydicom.Dataset()
        image.file_meta = pydicom.dataset.FileMetaDataset()
        image.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        identity.describe(source, image)
        image.SOPClassUID, image.SOPInstanceUID = _CT_IMAGE, new_uid()
        image.SeriesInstanceUID = slices.series
        image.FrameOfReferenceUID = identity.frame_of_reference(source)
        image.PositionReferenceIndicator = text(source, "PositionReferenceIndicator")
        image.Modality = text(source, "Modality") or "OT"
        image.Columns, image.Rows = slices.size
        image.PixelSpacing = [decimal(slices.spacing[1]), decimal(slices.spacing[0])]
        image.SliceThickness = decimal(slices.thickness)
        image.ImageOrientationPatient = [*map(decimal, slices.orientation.T.ravel())]
        image.ImagePositionPatient = [*map(decimal, position)]
        for keyword in ("LossyImageCompression", "LossyImageCompressionRatio", "LossyImageCompressionMethod"):
            if text(source, keyword):
                setattr(image, keyword, source.get(keyword))
        templates.append(image)
    return templates


def _descriptions(hd: Any, shown: LabelTable) -> list[Any]:
    algorithm = hd.AlgorithmIdentificationSequence(
        name=MANUFACTURER,
        family=_concept(hd, Code("123110", "Artificial Intelligence", "DCM")),
        version=VERSION,
    )
    described = []
    for number, label in enumerate(shown, 1):
        told = anatomy(label.name)
        item = hd.seg.SegmentDescription(
            segment_number=number,
            segment_label=label.name[:64],
            segmented_property_category=_concept(hd, told.category),
            segmented_property_type=_concept(hd, told.kind),
            algorithm_type="AUTOMATIC",
            algorithm_identification=algorithm,
            display_color=hd.color.CIELabColor.from_rgb(*label.colour),
        )
        if told.side is not None:
            kind = item.SegmentedPropertyTypeCodeSequence[0]
            kind.SegmentedPropertyTypeModifierCodeSequence = [_concept(hd, told.side)]
        described.append(item)
    return described


def _concept(hd: Any, code: Code) -> Any:
    return hd.sr.CodedConcept(value=code.value, scheme_designator=code.scheme, meaning=code.meaning)


def _refer(pydicom: Any, made: Any, templates: list[Any], slices: Slices) -> None:
    """Put the real images in the place of the templates."""
    numbers = {template.SOPInstanceUID: number for number, template in enumerate(templates)}
    for group in made.PerFrameFunctionalGroupsSequence:
        for derivation in group.get("DerivationImageSequence", []):
            (item,) = derivation.SourceImageSequence
            number = numbers[item.ReferencedSOPInstanceUID]
            derivation.SourceImageSequence = source_images(pydicom, slices, number)
    made.ReferencedSeriesSequence = [referenced_series(pydicom, slices)]


def source_images(pydicom: Any, slices: Slices, number: int) -> list[Any]:
    """The Source Image Sequence of a slice."""
    made = []
    for image in slices.images[number]:
        item = _reference(pydicom, image)
        if image.frame is not None:
            item.ReferencedFrameNumber = image.frame
        purpose = pydicom.Dataset()
        purpose.CodeValue, purpose.CodingSchemeDesignator = _SOURCE.value, _SOURCE.scheme
        purpose.CodeMeaning = _SOURCE.meaning
        item.PurposeOfReferenceCodeSequence = [purpose]
        item.SpatialLocationsPreserved = slices.preserved(number)
        made.append(item)
    return made


def referenced_series(pydicom: Any, slices: Slices, sequence: str = "ReferencedInstanceSequence") -> Any:
    """The series of the images of `slices`, each named once."""
    item = pydicom.Dataset()
    item.SeriesInstanceUID = slices.series
    once = {image.uid: image for of in slices.images for image in of}
    setattr(item, sequence, [_reference(pydicom, image) for image in once.values()])
    return item


def _reference(pydicom: Any, image: Instance) -> Any:
    item = pydicom.Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = image.kind, image.uid
    return item


def decimal(value: float) -> str:
    """A decimal string, which has at most 16 characters."""
    value = float(value) + 0.0
    for digits in range(16, 0, -1):
        told = f"{value:.{digits}g}"
        if len(told) <= 16:
            return told
    raise ValueError(f"{value} has no decimal string")
