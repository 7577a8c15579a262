"""Readers: one module per kind of file, each giving the voxels as stored and where they lie (`Volume`).

They turn the LPS millimetres of ITK and DICOM to RAS; nothing behind them knows of another space. A new kind of file
is a module with a function `read(path, choice)` and a line in `READERS`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from patient.readers import dicom, image_folder, itk, nifti, pictures, tiff, video
from patient.volumes import Choice, Volume
from utils.errors import UserError
from utils.images import image_files

READERS: dict[str, Callable[[Path, Choice], Volume]] = {
    **dict.fromkeys((".nii", ".nii.gz"), nifti.read),
    **dict.fromkeys((".nrrd", ".nhdr", ".mha", ".mhd"), itk.read),
    **dict.fromkeys((".dcm", ".ima"), dicom.read_file),
    **dict.fromkeys((".tif", ".tiff"), tiff.read),
    ".gif": pictures.read,
    **dict.fromkeys((".mp4", ".avi", ".mov", ".mkv", ".webm"), video.read),
}
"""File name endings and who reads them."""


def read_volume(path: str | os.PathLike[str], index: int | None = None, series: str | None = None) -> Volume:
    """A volume from a file by its suffix (`READERS`), or from a folder of images or DICOM slices.

    index: which volume of a 4-D file; where there is one alone, it is read whatever the index. series: the UID of the
    DICOM series to take from a folder of several. Raises UserError that names the file and what is wrong with it.
    """
    path = Path(path)
    choice = Choice(frame=index, series=series)
    if not path.exists():
        raise UserError(f"{path} does not exist")
    if path.is_dir():
        if dicom.dicom_files(path):
            if image_files(path):
                raise UserError(f"{path} holds DICOM files and images: give a folder of one kind")
            return dicom.read_folder(path, choice)
        if series is not None:
            raise UserError(f"{path} holds no DICOM files, so there is no --series to choose")
        return image_folder.read(path, choice)
    if series is not None:
        raise UserError(f"{path} is a file: --series chooses from a folder of DICOM files")
    for suffix, read in READERS.items():
        if path.name.lower().endswith(suffix):
            return read(path, choice)
    raise UserError(
        f"{path} is not a kind that is read: {', '.join(READERS)}, or a folder of images or DICOM files"
    )
