"""Readers: one module per kind of file, each returning the voxels as stored and where they lie (`Volume`).

They convert the LPS millimetres of ITK and DICOM to RAS; callers see no other space. A new kind of file is a module
with a function `read(path, choice)` and a line in `READERS`.
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
    **dict.fromkeys((".nii", ".nii.gz", ".hdr", ".img", ".hdr.gz", ".img.gz"), nifti.read),
    **dict.fromkeys((".nrrd", ".nhdr", ".mha", ".mhd"), itk.read),
    **dict.fromkeys((".dcm", ".ima"), dicom.read),
    **dict.fromkeys((".tif", ".tiff"), tiff.read),
    ".gif": pictures.read,
    **dict.fromkeys((".mp4", ".avi", ".mov", ".mkv", ".webm"), video.read),
}
"""Readers by file name ending."""
_OTHER_KINDS = {  # what people try, and what to do instead
    ".png": "one picture: give the folder of its frames",
    ".jpg": "one picture: give the folder of its frames",
    ".jpeg": "one picture: give the folder of its frames",
    ".bmp": "one picture: give the folder of its frames",
    ".npy": "an array without a place: save it as NIfTI, or give a folder of frames",
    ".npz": "arrays without a place: save them as NIfTI",
    ".mgz": "a FreeSurfer volume: convert it (mri_convert) to NIfTI",
    ".mgh": "a FreeSurfer volume: convert it (mri_convert) to NIfTI",
    ".mnc": "a MINC volume: convert it (mnc2nii) to NIfTI",
    ".par": "a Philips PAR/REC volume: convert it (dcm2niix) to NIfTI",
    ".rec": "a Philips PAR/REC volume: convert it (dcm2niix) to NIfTI",
    ".zip": "an archive: unpack it first",
    ".tar": "an archive: unpack it first",
    ".stl": "a mesh, not a volume",
    ".ply": "a mesh, not a volume",
}


def read_volume(
    path: str | os.PathLike[str],
    index: int | None = None,
    series: str | None = None,
    choice: Choice | None = None,
) -> Volume:
    """A volume from a file by its suffix (`READERS`), or from a folder of images or DICOM slices.

    choice: which volume of a source that holds several; `index` and `series` are shorthand for its first two fields.
    Raises UserError that names the file and what is wrong with it.
    """
    path = Path(path)
    choice = choice or Choice(frame=index, series=series)
    if not path.exists():
        raise UserError(f"{path} does not exist")
    if path.is_dir():
        return _read_folder(path, choice)
    read = reader_of(path)
    of_dicom = {"--series": choice.series, "--acquisition": choice.acquisition, "--echo": choice.echo}
    for option, given in {**of_dicom, "--time": choice.time}.items():
        if given is not None and (read is not dicom.read or option == "--series"):
            kind = "a folder of DICOM files" if option == "--series" else "DICOM"
            raise UserError(f"{path} is a file: {option} chooses from {kind}")
    if read is None:
        kind = _OTHER_KINDS.get(path.suffix.lower(), "not a kind of file that can be read")
        raise UserError(f"{path} is {kind} ({', '.join(READERS)}, or a folder of images or DICOM files)")
    return read(path, choice)


def reader_of(path: Path) -> Callable[[Path, Choice], Volume] | None:
    """The reader of a file, by its suffix; without a known suffix, DICOM's if it is DICOM."""
    for suffix, read in READERS.items():
        if path.name.lower().endswith(suffix):
            return read
    if path.suffix.lower() not in _OTHER_KINDS and (path.name.upper() == "DICOMDIR" or dicom.is_dicom(path)):
        return dicom.read
    return None


def _read_folder(path: Path, choice: Choice) -> Volume:
    images = image_files(path)
    if dicom.find(path, deep=False):
        if images:
            raise UserError(f"{path} holds DICOM files and images: give a folder of one kind")
        return dicom.read(path, choice)
    if not images and dicom.find(path, deep=True):
        return dicom.read(path, choice)
    for option in ("series", "acquisition", "echo", "time"):
        if getattr(choice, option) is not None:
            raise UserError(f"{path} holds no DICOM files, so there is no --{option} to choose")
    if not images:
        inside = [file for file in sorted(path.iterdir()) if file.is_file() and reader_of(file) is not None]
        hint = f": give one file of it, such as {inside[0]}" if inside else ""
        deeper = next(
            (child for child in sorted(path.iterdir()) if child.is_dir() and image_files(child)), None
        )
        hint = hint or (f", but {deeper} has: give that" if deeper else "")
        raise UserError(f"{path} has no images and no DICOM files{hint}")
    return image_folder.read(path, choice)
