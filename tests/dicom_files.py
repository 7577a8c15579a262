"""DICOM files for tests, written by pydicom, so that the reader is not tested against its own library."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pydicom = pytest.importorskip("pydicom")  # if it is missing, the tests that import this file are skipped


def write_series(
    folder: Path,
    values: np.ndarray,
    affine: np.ndarray,
    *,
    depths: np.ndarray | None = None,
    slope: float = 1.0,
    intercept: float = 0.0,
    prefix: str = "slice",
    **tags: object,
) -> str:
    """Slices values[:, :, k], int16 as stored, of a volume with a RAS affine, at `depths` (default: k); its UID.

    File names are not in slice order. tags: further ones by keyword; a list has one value per slice, None removes the
    tag.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    spacing = np.linalg.norm(lps[:3, :2], axis=0)
    series = pydicom.uid.generate_uid()
    for k in range(values.shape[2]):
        header = _header(pydicom.uid.CTImageStorage, series)
        header.Modality, header.SeriesDescription = "CT", "test"
        header.ImageOrientationPatient = [*map(_ds, [*(lps[:3, 0] / spacing[0]), *(lps[:3, 1] / spacing[1])])]
        header.PixelSpacing = [_ds(spacing[1]), _ds(spacing[0])]  # between rows, between columns
        depth = k if depths is None else depths[k]
        header.ImagePositionPatient = [*map(_ds, lps[:3, 2] * depth + lps[:3, 3])]
        header.InstanceNumber = k + 1
        header.RescaleSlope, header.RescaleIntercept = _ds(slope), _ds(intercept)
        _pixels(header, values[:, :, k].T.astype(np.int16))
        for name, value in tags.items():
            value = value[k] if isinstance(value, list) else value
            if value is None:
                delattr(header, name)
            else:
                setattr(header, name, value)
        # 7 is coprime to the number of slices in all tests, so names are not in slice order.
        header.save_as(folder / f"{prefix}{k * 7 % 101:03d}.dcm", enforce_file_format=True)
    return series


def write_enhanced(
    path: Path, values: np.ndarray, affine: np.ndarray, order: list[int], slopes: list[float]
) -> None:
    """One enhanced CT file of slices values[:, :, k] for k in `order`, whose positions are only in its sequences."""
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    spacing = np.linalg.norm(lps[:3, :2], axis=0)
    header = _header(pydicom.uid.EnhancedCTImageStorage, pydicom.uid.generate_uid())
    header.Modality, header.NumberOfFrames = "CT", len(order)
    shared, frames = pydicom.Dataset(), []
    orientation = [*map(_ds, [*(lps[:3, 0] / spacing[0]), *(lps[:3, 1] / spacing[1])])]
    shared.PlaneOrientationSequence = [dataset(ImageOrientationPatient=orientation)]
    shared.PixelMeasuresSequence = [
        dataset(PixelSpacing=[_ds(spacing[1]), _ds(spacing[0])], SliceThickness="1")
    ]
    for k, slope in zip(order, slopes, strict=True):
        frames.append(
            dataset(
                PlanePositionSequence=[
                    dataset(ImagePositionPatient=[*map(_ds, lps[:3, 2] * k + lps[:3, 3])])
                ],
                PixelValueTransformationSequence=[
                    dataset(RescaleSlope=_ds(slope), RescaleIntercept="-5", RescaleType="HU")
                ],
            )
        )
    header.SharedFunctionalGroupsSequence, header.PerFrameFunctionalGroupsSequence = [shared], frames
    _pixels(header, values[:, :, order].transpose(2, 1, 0))
    header.save_as(path, enforce_file_format=True)


def dataset(**tags: object) -> pydicom.Dataset:
    dataset = pydicom.Dataset()
    for name, value in tags.items():
        setattr(dataset, name, value)
    return dataset


def write_cine(path: Path, frames: np.ndarray) -> None:
    """One ultrasound file of frames (frame, row, column[, 3]) uint8."""
    header = _header(pydicom.uid.UltrasoundMultiFrameImageStorage, pydicom.uid.generate_uid())
    header.Modality, header.NumberOfFrames = "US", len(frames)
    _pixels(header, frames)
    header.save_as(path, enforce_file_format=True)


def _header(kind: str, series: str) -> pydicom.Dataset:
    header = pydicom.Dataset()
    header.file_meta = pydicom.dataset.FileMetaDataset()
    header.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    header.file_meta.MediaStorageSOPClassUID = header.SOPClassUID = kind
    header.file_meta.MediaStorageSOPInstanceUID = header.SOPInstanceUID = pydicom.uid.generate_uid()
    header.SeriesInstanceUID, header.StudyInstanceUID = series, pydicom.uid.generate_uid()
    header.PatientName, header.PatientID = "Nobody", "0"
    return header


def _pixels(header: pydicom.Dataset, array: np.ndarray) -> None:
    colour = array.ndim > 2 and array.shape[-1] == 3
    header.Rows, header.Columns = array.shape[-3:-1] if colour else array.shape[-2:]
    header.SamplesPerPixel = 3 if colour else 1
    header.PhotometricInterpretation = "RGB" if colour else "MONOCHROME2"
    if colour:
        header.PlanarConfiguration = 0
    header.BitsAllocated = header.BitsStored = 8 * array.dtype.itemsize
    header.HighBit = header.BitsStored - 1
    header.PixelRepresentation = int(array.dtype.kind == "i")
    header.PixelData = array.tobytes()


def _ds(value: float) -> str:
    """A decimal string, which has at most 16 characters."""
    return f"{value:.10g}"[:16]


def write_frames(path: Path, values: np.ndarray, kind: str, **tags: object) -> None:
    """One file of frames values[:, :, k], uint16 or uint8 as they are, with these tags; `kind` is its SOP class."""
    header = _header(kind, pydicom.uid.generate_uid())
    header.NumberOfFrames = values.shape[2]
    _pixels(header, np.ascontiguousarray(values.transpose(2, 1, 0)))
    for name, value in tags.items():
        setattr(header, name, value)
    header.save_as(path, enforce_file_format=True)


def functional_groups(
    affine: np.ndarray,
    order: list[int],
    *,
    volume: bool = False,
    scales: list[tuple[float, float]] | None = None,
    **own: list[list[pydicom.Dataset]],
) -> dict[str, object]:
    """Tags that place frames k in `order` of a volume with a RAS affine, in the patient or an ultrasound's volume.

    own: further sequences, one per frame.
    """
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    spacing = np.linalg.norm(lps[:3, :2], axis=0)
    cosines = [*(lps[:3, 0] / spacing[0]), *(lps[:3, 1] / spacing[1])]
    measures = [dataset(PixelSpacing=[_ds(spacing[1]), _ds(spacing[0])], SliceThickness="1")]
    if volume:
        orientation = {"PlaneOrientationVolumeSequence": [dataset(ImageOrientationVolume=cosines)]}
    else:
        orientation = {"PlaneOrientationSequence": [dataset(ImageOrientationPatient=[*map(_ds, cosines)])]}
    frames = []
    for at, k in enumerate(order):
        position = lps[:3, 2] * k + lps[:3, 3]
        if volume:
            frame = dataset(PlanePositionVolumeSequence=[dataset(ImagePositionVolume=[*position])])
        else:
            frame = dataset(PlanePositionSequence=[dataset(ImagePositionPatient=[*map(_ds, position)])])
        if scales is not None:
            slope, intercept = scales[at]
            frame.PixelValueTransformationSequence = [
                dataset(RescaleSlope=_ds(slope), RescaleIntercept=_ds(intercept), RescaleType="US")
            ]
        for name, of in own.items():
            setattr(frame, name, of[at])
        frames.append(frame)
    shared = dataset(PixelMeasuresSequence=measures, **orientation)
    return {"SharedFunctionalGroupsSequence": [shared], "PerFrameFunctionalGroupsSequence": frames}


def write_structures(path: Path, structures: dict[str, list[np.ndarray]], **tags: object) -> None:
    """An RTSTRUCT of closed contours, (points, 3) LPS mm each, by the name of their structure."""
    header = _header(pydicom.uid.RTStructureSetStorage, pydicom.uid.generate_uid())
    header.Modality = "RTSTRUCT"
    header.StructureSetROISequence = [
        dataset(ROINumber=n, ROIName=name) for n, name in enumerate(structures, 1)
    ]
    header.ROIContourSequence = [
        dataset(
            ReferencedROINumber=n,
            ROIDisplayColor=[255, 10 * n, 0],
            ContourSequence=[
                dataset(
                    ContourGeometricType="CLOSED_PLANAR",
                    NumberOfContourPoints=len(contour),
                    ContourData=[*map(_ds, contour.ravel())],
                )
                for contour in contours
            ],
        )
        for n, contours in enumerate(structures.values(), 1)
    ]
    for name, value in tags.items():
        setattr(header, name, value)
    header.save_as(path, enforce_file_format=True)
