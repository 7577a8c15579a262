"""NIfTI, versions 1 and 2."""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import nibabel
import numpy as np

from patient.geometry import check_affine
from patient.readers.common import chosen_volume
from patient.volumes import Choice, Volume
from utils.errors import UserError

_MILLIMETRES = {"meter": 1000.0, "mm": 1.0, "micron": 0.001, "unknown": 1.0}  # NIfTI's units of length


def nifti_grid(path: str | os.PathLike[str]) -> tuple[tuple[int, ...], np.ndarray]:
    """Shape and affine (RAS millimetres) of a NIfTI file, of which only the header is read."""
    image = _open_nifti(Path(path))
    return image.shape[:3], _nifti_affine(Path(path), image)


def read(path: Path, choice: Choice) -> Volume:
    image = _open_nifti(path)
    affine = _nifti_affine(path, image)
    stored = image.get_data_dtype()
    if stored.kind not in "uif":
        raise UserError(f"{path} holds {'colours' if stored.fields else stored}: a volume holds real numbers")

    chosen = chosen_volume(path, image.shape[3] if len(image.shape) == 4 else 1, choice.frame)
    try:
        values = np.asanyarray(image.dataobj[..., chosen or 0] if len(image.shape) == 4 else image.dataobj)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise UserError(f"{path} is damaged: {error}") from error

    notes = []
    if image.header["qform_code"] == 0 and image.header["sform_code"] == 0:
        notes.append(
            "its header gives voxel sizes but no orientation: left, posterior and the origin are NIfTI's default"
        )
    bits = 8 if stored.itemsize == 1 else 16
    return Volume(values, affine, bits, path.name, chosen, notes=notes)


def _open_nifti(path: Path) -> nibabel.Nifti1Image:
    """The image with its header read, 3-D or 4-D."""
    if not path.exists():
        raise UserError(f"{path} does not exist")
    try:
        image = nibabel.load(path)
    except (nibabel.filebasedimages.ImageFileError, OSError, EOFError, ValueError, zlib.error) as error:
        raise UserError(f"{path} is not a NIfTI file, or it is damaged: {error}") from error
    if not isinstance(image, nibabel.Nifti1Image):
        raise UserError(f"{path} is not a NIfTI file, but {type(image).__name__}")
    if len(image.shape) not in (3, 4):
        raise UserError(
            f"{path} is {len(image.shape)}-D, of shape {image.shape}: a volume has three axes, or four with time"
        )
    if 0 in image.shape:
        raise UserError(f"{path} is empty: its shape is {image.shape}")
    return image


def _nifti_affine(path: Path, image: nibabel.Nifti1Image) -> np.ndarray:
    affine = np.array(image.affine, np.float64)
    affine[:3] *= _MILLIMETRES[image.header.get_xyzt_units()[0]]
    try:
        check_affine(affine)
    except ValueError as error:
        raise UserError(f"{path} cannot be placed: {error}") from error
    return affine
