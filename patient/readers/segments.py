"""Segmentations by name and number: DICOM SEG and RTSTRUCT, 3D Slicer's .seg.nrrd, one layer per structure."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np

from patient.readers import dicom, itk, nifti, read_volume, reader_of
from patient.readers.common import listed, quiet_libraries, simple_itk
from patient.readers.dicom import segments as dicom_segments
from patient.readers.dicom import structures
from patient.readers.dicom.files import SEGMENTATIONS, STRUCTURE_SET, Header, read_header, readable
from patient.readers.itk_files import read_text_header
from patient.segments import Segment, Segments
from patient.volumes import Choice, Volume
from utils.errors import UserError
from utils.images import image_files


def read_segments(path: str | os.PathLike[str], reference: Volume | None = None) -> Segments | None:
    """The segments of a file that names them, or of a folder with one such DICOM file; None for any other.

    reference: the image that they belong to, which contours need and which DICOM's references are checked against.
    Raises UserError.
    """
    path = Path(path)
    if not path.exists():
        return None
    with quiet_libraries():
        header = _segmentation(path)
        if header is not None:
            read = structures.read if header.kind == STRUCTURE_SET else dicom_segments.read
            return read(header, reference)
        name = path.name.lower()
        if path.is_file() and name.endswith((".nrrd", ".nhdr")):
            return _of_nrrd(path)
    return None


def layers_as_segments(path: str | os.PathLike[str]) -> Segments | None:
    """A 4-D volume of masks, one layer per structure, as segments numbered from 1; None if it is not one.

    If layer 0 is exactly what no other layer holds, it is the background and not a segment.
    """
    path = Path(path)
    count = _layer_count(path)
    if count < 2:
        return None
    volumes = [read_volume(path, index) for index in range(count)]
    masks = []
    for volume in volumes:
        values = np.nan_to_num(volume.values)
        if values.ndim != 3 or not np.isin(values, (0, values.max())).all():
            return None
        masks.append((values != 0).astype(np.uint16))
    rest = bool((masks[0] == (np.sum(masks[1:], axis=0) == 0)).all())
    start = 1 if rest else 0
    notes = list(volumes[0].notes)
    if rest:
        notes.append("layer 0 is what no other layer holds: the background")
    found = tuple(
        Segment(layer + (0 if rest else 1), f"layer {layer}", layer, 1) for layer in range(start, count)
    )
    return Segments(str(path), found, tuple(masks), volumes[0].affine, None, notes)


def _layer_count(path: Path) -> int:
    name = path.name.lower()
    with quiet_libraries():
        if name.endswith((".nii", ".nii.gz", ".hdr", ".img")):
            return nifti.volume_count(path)
        if name.endswith((".nrrd", ".nhdr", ".mha", ".mhd")):
            return itk.volume_count(path)
    return 1


def _segmentation(path: Path) -> Header | None:
    """The header of a SEG or RTSTRUCT: of the file, or of the one such file in a folder."""
    if path.is_file():
        header = read_header(path) if reader_of(path) is dicom.read and dicom.is_dicom(path) else None
        return header if header is not None and header.kind in SEGMENTATIONS else None
    files = [] if image_files(path) else dicom.find(path, deep=False) or dicom.find(path, deep=True)
    found = [header for header in readable(files) if header.kind in SEGMENTATIONS]
    if len(found) > 1:
        names = listed([str(header.path.relative_to(path)) for header in found])
        raise UserError(
            f"{path} holds {len(found)} segmentations: give one of them, or several files ({names})"
        )
    return found[0] if found else None


def _of_nrrd(path: Path) -> Segments | None:
    """3D Slicer's segmentation: Segment<n>_Name, _Layer, _LabelValue and _Color in the header."""
    header = read_text_header(path)
    numbered = sorted(
        {
            int(match[1])
            for key in header.pairs
            if (match := re.match(r"Segment(\d+)_(?:ID|Name|LabelValue)$", key))
        }
    )
    if not numbered:
        return None
    volume, values = itk.read_layers(path, header, simple_itk(f"reading {path}"), Choice())
    if values.dtype.kind not in "ui" and not np.array_equal(values, np.rint(values)):
        raise UserError(f"{path} holds fractions: the labels of a segmentation are whole numbers")
    layers = tuple(values[..., layer] for layer in range(values.shape[3]))
    found = []
    taken: set[int] = set()
    single = len(layers) == 1
    for order, n in enumerate(numbered):
        pair = {
            key: header.pairs.get(f"Segment{n}_{key}", "").strip()
            for key in ("Name", "Layer", "LabelValue", "Color")
        }
        layer = int(pair["Layer"]) if pair["Layer"].isdecimal() else (0 if single else order)
        value = int(pair["LabelValue"]) if pair["LabelValue"].isdecimal() else 1
        if layer >= len(layers):
            raise UserError(f"{path} is damaged: segment {n} is in layer {layer}, of {len(layers)}")
        # In one layer, label values tell segments apart; with several layers, they restart in each.
        number = value if single and value not in taken and value > 0 else order + 1
        taken.add(number)
        found.append(Segment(number, pair["Name"] or f"segment {n}", layer, value, _colour(pair["Color"])))
    return Segments(str(path), tuple(found), layers, volume.affine, None, list(volume.notes))


def _colour(text: str) -> tuple[int, int, int] | None:
    try:
        red, green, blue = (round(255 * float(part)) for part in text.split())
    except ValueError:
        return None
    return red, green, blue
