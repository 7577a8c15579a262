"""Volumes in: one function per kind of file, each giving the voxels as stored and where they lie."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import nibabel
import numpy as np

from utils.errors import UserError
from utils.geometry import check_affine
from utils.images import image_files, read_image

_MILLIMETRES = {"meter": 1000.0, "mm": 1.0, "micron": 0.001, "unknown": 1.0}  # NIfTI's units of length


@dataclass(frozen=True)
class Volume:
    """Voxels and their place."""

    values: np.ndarray
    """(I, J, K), or (I, J, K, 3 or 4) for colours: numbers in the source's own scale."""
    affine: np.ndarray | None
    """Voxel indices to RAS millimetres (4, 4); None where the source does not say."""
    bits: int
    """8 where the source stores bytes, else 16: what frames need to keep it apart."""
    name: str
    index: int | None = None
    """Which volume of a 4-D source."""
    full_scale: tuple[float, float] | None = None
    """What 0 and 1 are, for sources that are pictures already."""
    notes: list[str] = field(default_factory=list)
    """What a user should know about how it was read."""


def read_volume(path: str | os.PathLike[str], index: int | None = None) -> Volume:
    """A volume from a NIfTI file or a folder of images, by its name. index: which volume of a 4-D file; where there is
    one alone, it is read whatever the index.

    Raises UserError that names the file and what is wrong with it.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist")
    if path.is_dir():
        return _read_folder(path)
    for suffix, reader in READERS.items():
        if path.name.lower().endswith(suffix):
            return reader(path, index)
    raise UserError(f"{path} is not a kind that is read: {', '.join(READERS)}, or a folder of images")


def nifti_grid(path: str | os.PathLike[str]) -> tuple[tuple[int, ...], np.ndarray]:
    """Shape and affine (RAS millimetres) of a NIfTI file, of which only the header is read."""
    image = _open_nifti(Path(path))
    return image.shape[:3], _nifti_affine(Path(path), image)


def _read_nifti(path: Path, index: int | None) -> Volume:
    image = _open_nifti(path)
    affine = _nifti_affine(path, image)
    stored = image.get_data_dtype()
    if stored.kind not in "uif":
        raise UserError(f"{path} holds {'colours' if stored.fields else stored}: a volume holds real numbers")

    count = image.shape[3] if len(image.shape) == 4 else 1
    if count > 1 and index is None:
        raise UserError(f"{path} holds {count} volumes: choose one with --frame 0 ... {count - 1}")
    chosen = index if count > 1 else None
    if chosen is not None and not 0 <= chosen < count:
        raise UserError(f"{path} holds {count} volumes: there is no --frame {chosen}")
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


def _read_folder(path: Path) -> Volume:
    """Images by their numbers, as (column, row, frame[, channel]); nothing is known of millimetres."""
    files = image_files(path)
    if not files:
        raise UserError(
            f"{path} has no images (or is a DICOM folder, which is not read: convert it to NIfTI)"
        )
    images = []
    for file in files:
        images.append(read_image(file))
        if (images[-1].shape, images[-1].dtype) != (images[0].shape, images[0].dtype):
            raise UserError(
                f"{file} is {_describe(images[-1])}, but {files[0].name} is {_describe(images[0])}:"
                " frames have one size and one kind"
            )
    stack = np.stack(images)  # (frame, row, column[, channel])
    values = stack.transpose(2, 1, 0, *range(3, stack.ndim))
    top = 1.0 if values.dtype == np.float32 else float(np.iinfo(values.dtype).max)
    bits = 8 if values.dtype == np.uint8 else 16
    return Volume(values, None, bits, path.name, full_scale=(0.0, top))


def _describe(image: np.ndarray) -> str:
    kind = {2: "grey", 3: "RGB" if image.shape[-1] == 3 else "RGBA"}[image.ndim]
    return f"{image.shape[1]} x {image.shape[0]} {kind} {image.dtype}"


READERS: dict[str, Callable[[Path, int | None], Volume]] = {
    ".nii": _read_nifti,
    ".nii.gz": _read_nifti,
}
"""File name endings and who reads them; a new kind of file is a function and a line here."""
