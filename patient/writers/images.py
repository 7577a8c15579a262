"""Rendered slices as one DICOM file of many frames, derived from a series.

CT and MR become the enhanced kind of their modality, which viewers open as a volume of it: 3D Slicer, OHIF, Weasis and
readers by GDCM or dcm2niix take place and scale from its functional groups. Enhanced PET asks for facts of a scan that
never was, and its legacy-converted kind does not. Other modalities have no such kind and become a multi-frame secondary
capture, with the same places.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from patient.readers.common import optional
from patient.readers.dicom.files import text
from patient.writers.identity import Identity, equipment, new_uid, series_number
from patient.writers.segmentation import Instance, Slices, decimal, referenced_series, source_images
from utils.errors import UserError
from utils.files import atomic_write

_CAPTURE = "1.2.840.10008.5.1.4.1.1.7.3"  # Multi-frame Grayscale Word Secondary Capture
_ENHANCED = {
    "CT": "1.2.840.10008.5.1.4.1.1.2.1",
    "MR": "1.2.840.10008.5.1.4.1.1.4.1",
    "PT": "1.2.840.10008.5.1.4.1.1.128.1",  # legacy-converted,
}
_MOST = 2**32 - 2  # bytes of pixels
_DERIVATION = (
    "drawn from a model that was trained on the source's slices (MedGS, https://arxiv.org/abs/2509.16806):"
    " interpolated, not measured"
)
_RESAMPLING = ("113085", "DCM", "Spatial resampling")
_KIND = ["DERIVED", "PRIMARY", "VOLUME", "RESAMPLED"]


@dataclass(frozen=True)
class Scale:
    """How intensities are stored: stored = (intensity - intercept) / slope, 16 bits without sign."""

    slope: float
    intercept: float
    window: tuple[float, float]
    """The intensities that show black and white."""

    @classmethod
    def of(cls, window: tuple[float, float], whole_numbers: bool) -> Scale:
        """whole_numbers: steps of 1, if the window has more than a byte's; else 65535 steps of the window."""
        low, high = window
        if whole_numbers and 255 <= high - low <= 65534:
            return cls(1.0, float(np.floor(low)), window)
        return cls(float(decimal((high - low) / 65535)), float(decimal(low)), window)


def write_images(
    path: str | os.PathLike[str],
    images: Iterable[np.ndarray],
    slices: Slices,
    scale: Scale,
    source: Any,
    identity: Identity,
    description: str,
) -> Slices:
    """Write images (H, W) of intensities, one per slice, in order along the slices' normal; returns them as slices.

    source: pydicom's dataset of an image of the series.
    """
    pydicom = optional("pydicom", "pydicom", "--dicom")
    check_size(slices)
    columns, rows = slices.size
    count = len(slices.positions)
    modality = text(source, "Modality") or "OT"
    made = _dataset(pydicom, _ENHANCED.get(modality, _CAPTURE))
    identity.describe(source, made)
    _series(pydicom, made, modality, source, identity, description)
    _common(pydicom, made, slices, source)
    _of_modality(pydicom, made, slices, scale, modality, source)
    made.SharedFunctionalGroupsSequence = [_shared(pydicom, slices, scale, modality, source, identity)]
    made.PerFrameFunctionalGroupsSequence = [
        _frame(pydicom, slices, number, modality) for number in range(count)
    ]
    pixels = np.empty((count, rows, columns), "<u2")
    for stored, image in zip(pixels, images, strict=True):
        np.rint(((image - scale.intercept) / scale.slope).clip(0, 65535), out=stored, casting="unsafe")
    made.PixelData = pixels.tobytes()
    with atomic_write(path) as temporary:
        made.save_as(temporary, enforce_file_format=True)
    written = [[Instance(made.SOPClassUID, made.SOPInstanceUID, number + 1)] for number in range(count)]
    return replace(slices, images=written, series=made.SeriesInstanceUID, aligned=True)


def check_size(slices: Slices) -> None:
    """Raise UserError if images are more than a file can hold."""
    columns, rows = slices.size
    count = len(slices.positions)
    if 2 * columns * rows * count > _MOST:
        raise UserError(
            f"--dicom: {count} slices are more than one file holds (4 GB): take a smaller --interp"
        )


def _dataset(pydicom: Any, kind: str) -> Any:
    made = pydicom.Dataset()
    made.file_meta = pydicom.dataset.FileMetaDataset()
    made.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    made.SOPClassUID, made.SOPInstanceUID = kind, new_uid()
    made.file_meta.MediaStorageSOPClassUID = kind
    made.file_meta.MediaStorageSOPInstanceUID = made.SOPInstanceUID
    made.SpecificCharacterSet = "ISO_IR 192"
    return made


def _series(
    pydicom: Any, made: Any, modality: str, source: Any, identity: Identity, description: str
) -> None:
    now = datetime.datetime.now()
    made.ContentDate = made.InstanceCreationDate = now.strftime("%Y%m%d")
    made.ContentTime = made.InstanceCreationTime = now.strftime("%H%M%S")
    made.Modality = modality
    made.SeriesInstanceUID, made.InstanceNumber = new_uid(), 1
    made.SeriesNumber = series_number(source, 1)
    made.SeriesDescription = description[:64]
    made.PatientPosition = text(source, "PatientPosition")
    equipment(made)
    made.FrameOfReferenceUID = identity.frame_of_reference(source)
    made.PositionReferenceIndicator = text(source, "PositionReferenceIndicator")


def _common(pydicom: Any, made: Any, slices: Slices, source: Any) -> None:
    """Modules about the image as a whole."""
    made.NumberOfFrames = len(slices.positions)
    made.Columns, made.Rows = slices.size
    made.SamplesPerPixel, made.PhotometricInterpretation = 1, "MONOCHROME2"
    made.BitsAllocated = made.BitsStored = 16
    made.HighBit, made.PixelRepresentation = 15, 0
    made.ImageType = _KIND
    made.PresentationLUTShape = "IDENTITY"
    # Scanners burn nothing in; of other images nothing is known, and tools that share images ask.
    scanned = text(source, "Modality") in _ENHANCED
    made.BurnedInAnnotation = text(source, "BurnedInAnnotation") or ("NO" if scanned else "YES")
    made.LossyImageCompression = text(source, "LossyImageCompression") or "00"
    for keyword in ("LossyImageCompressionRatio", "LossyImageCompressionMethod"):
        if made.LossyImageCompression == "01" and text(source, keyword):
            setattr(made, keyword, source.get(keyword))
    made.ReferencedSeriesSequence = [referenced_series(pydicom, slices)]


def _of_modality(pydicom: Any, made: Any, slices: Slices, scale: Scale, modality: str, source: Any) -> None:
    """Attributes that the kind of image asks for."""
    if modality not in _ENHANCED:
        made.ConversionType, made.PatientOrientation = "WSD", ""
        made.FrameIncrementPointer = pydicom.tag.Tag("SliceLocationVector")
        normal = np.cross(slices.orientation[:, 0], slices.orientation[:, 1])
        made.SliceLocationVector = [decimal(float(position @ normal)) for position in slices.positions]
        made.DerivationDescription = _DERIVATION
        made.DerivationCodeSequence = [_code(pydicom, *_RESAMPLING)]
        once = {image.uid: number for number, of in enumerate(slices.images) for image in of if len(of) == 1}
        made.SourceImageSequence = [
            item for number in once.values() for item in source_images(pydicom, slices, number)
        ]
        made.Laterality = ""
        for keyword, value in _transformation(scale, modality).items():
            setattr(made, keyword, value)
        return
    organisation = new_uid()
    made.DimensionOrganizationSequence = [_item(pydicom, DimensionOrganizationUID=organisation)]
    if slices.regular:
        made.DimensionOrganizationType = "3D"
    made.DimensionIndexSequence = [
        _item(
            pydicom,
            DimensionOrganizationUID=organisation,
            DimensionIndexPointer=pydicom.tag.Tag(keyword),
            FunctionalGroupPointer=pydicom.tag.Tag("FrameContentSequence"),
            DimensionDescriptionLabel=label,
        )
        for keyword, label in (("StackID", "stack"), ("InStackPositionNumber", "slice"))
    ]
    evidence = _item(pydicom, StudyInstanceUID=made.StudyInstanceUID)
    evidence.ReferencedSeriesSequence = [referenced_series(pydicom, slices, "ReferencedSOPSequence")]
    made.SourceImageEvidenceSequence = [evidence]
    made.AcquisitionContextSequence = []
    made.PixelPresentation, made.VolumetricProperties = "MONOCHROME", "VOLUME"
    made.VolumeBasedCalculationTechnique = "MPR"
    made.ContentQualification = "RESEARCH"
    if modality == "MR":
        made.ComplexImageComponent, made.AcquisitionContrast = "MAGNITUDE", "UNKNOWN"
        # IEC 60601-2-33 is the standard for all MR scanners.
        made.ApplicableSafetyStandardAgency = text(source, "ApplicableSafetyStandardAgency") or "IEC"


def _shared(
    pydicom: Any, slices: Slices, scale: Scale, modality: str, source: Any, identity: Identity
) -> Any:
    spacing = np.linalg.norm(np.diff(np.array(slices.positions), axis=0), axis=1)
    measures = _item(
        pydicom,
        PixelSpacing=[decimal(slices.spacing[1]), decimal(slices.spacing[0])],
        SliceThickness=decimal(slices.thickness),
    )
    if spacing.size:
        measures.SpacingBetweenSlices = decimal(float(spacing.mean()))
    shared = _item(
        pydicom,
        PixelMeasuresSequence=[measures],
        PlaneOrientationSequence=[
            _item(pydicom, ImageOrientationPatient=[*map(decimal, slices.orientation.T.ravel())])
        ],
    )
    kind = {"CT": "CTImageFrameTypeSequence", "MR": "MRImageFrameTypeSequence", "PT": "PETFrameTypeSequence"}
    if modality in _ENHANCED:
        told = _transformation(scale, modality)
        window = {name: told.pop(name) for name in ("WindowCenter", "WindowWidth")}
        shared.PixelValueTransformationSequence = [_item(pydicom, **told)]
        shared.FrameVOILUTSequence = [_item(pydicom, **window)]
        frame_type = _item(
            pydicom,
            FrameType=_KIND,
            PixelPresentation="MONOCHROME",
            VolumetricProperties="VOLUME",
            VolumeBasedCalculationTechnique="MPR",
        )
        if modality == "MR":
            frame_type.ComplexImageComponent, frame_type.AcquisitionContrast = "MAGNITUDE", "UNKNOWN"
        setattr(shared, kind[modality], [frame_type])
        region = _code(pydicom, "38266002", "SCT", "Entire body")
        event = _item(pydicom, IrradiationEventUID=identity.event(source))
        if modality == "CT":
            shared.IrradiationEventIdentificationSequence = [event]
        shared.FrameAnatomySequence = [_item(pydicom, FrameLaterality="U", AnatomicRegionSequence=[region])]
    return shared


def _transformation(scale: Scale, modality: str) -> dict[str, str]:
    """What makes intensities of stored numbers, and shows them."""
    low, high = scale.window
    return {
        "RescaleSlope": decimal(scale.slope),
        "RescaleIntercept": decimal(scale.intercept),
        "RescaleType": "HU" if modality == "CT" else "US",
        "WindowCenter": decimal((low + high) / 2),
        "WindowWidth": decimal(max(high - low, 1e-6)),
    }


def _frame(pydicom: Any, slices: Slices, number: int, modality: str) -> Any:
    position = _item(pydicom, ImagePositionPatient=[*map(decimal, slices.positions[number])])
    frame = _item(pydicom, PlanePositionSequence=[position])
    if modality in _ENHANCED:
        content = _item(
            pydicom, StackID="1", InStackPositionNumber=number + 1, DimensionIndexValues=[1, number + 1]
        )
        frame.FrameContentSequence = [content]
        derivation = _item(
            pydicom,
            DerivationDescription=_DERIVATION,
            DerivationCodeSequence=[_code(pydicom, *_RESAMPLING)],
            SourceImageSequence=source_images(pydicom, slices, number),
        )
        frame.DerivationImageSequence = [derivation]
    if modality == "PT":
        frame.UnassignedPerFrameConvertedAttributesSequence = [pydicom.Dataset()]
    return frame


def _code(pydicom: Any, value: str, scheme: str, meaning: str) -> Any:
    return _item(pydicom, CodeValue=value, CodingSchemeDesignator=scheme, CodeMeaning=meaning)


def _item(pydicom: Any, **tags: object) -> Any:
    item = pydicom.Dataset()
    for keyword, value in tags.items():
        setattr(item, keyword, value)
    return item
