"""NRRD and MetaImage, read by SimpleITK."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from patient.readers.common import chosen_volume, from_lps, reason, simple_itk
from patient.volumes import Choice, Volume
from utils.errors import UserError


def read(path: Path, choice: Choice) -> Volume:
    """NRRD and MetaImage, 3-D or 4-D; the 4th axis may be one of components."""
    sitk = simple_itk(f"reading {path}")
    if path.suffix.lower() in (".mhd", ".nhdr"):
        named = re.search(
            r"^(?:ElementDataFile *=|data ?file:) *(\S.*?) *$", path.read_text("latin-1"), re.M | re.I
        )
        if named and re.fullmatch(r"[^%\s]+\.\w+", named[1]) and not (path.parent / named[1]).exists():
            raise UserError(f"{path} is a header alone: {named[1]}, which it names, is not beside it")
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
        dimension = reader.GetDimension()
        if dimension not in (3, 4):
            shape = tuple(reader.GetSize())
            raise UserError(
                f"{path} is {dimension}-D, of shape {shape}: a volume has three axes, or four with time"
            )
        image = reader.Execute()
    except RuntimeError as error:
        raise UserError(f"{path} is damaged, or not what its name says: {reason(error)}") from error
    values = sitk.GetArrayFromImage(image)  # ([t,] z, y, x[, component])
    components = image.GetNumberOfComponentsPerPixel()
    colours = components in (3, 4) and values.dtype == np.uint8 and dimension == 3
    if components > 1 and not colours:
        if dimension == 4:
            raise UserError(
                f"{path} is 5-D: time and {components} components a voxel; a volume has one number"
            )
        values = np.moveaxis(values, -1, 0)
    if values.dtype.kind not in "uif":
        raise UserError(f"{path} holds {values.dtype}: a volume holds real numbers")
    chosen = None
    if values.ndim - colours == 4:
        chosen = chosen_volume(path, values.shape[0], choice.frame)
        values = values[chosen or 0]
    affine = from_lps(
        np.array(image.GetDirection()).reshape(dimension, dimension)[:3, :3] * image.GetSpacing()[:3],
        image.GetOrigin()[:3],
        path,
    )
    notes = []
    if path.suffix.lower() in (".nrrd", ".nhdr") and "NRRD_space" not in image.GetMetaDataKeys():
        notes.append("its header names no space: its axes are taken as left, posterior, superior")
    full_scale = (0.0, 255.0) if colours else None
    bits = 8 if values.dtype.itemsize == 1 else 16
    values = values.transpose(2, 1, 0, *range(3, values.ndim))
    return Volume(values, affine, bits, path.name, chosen, full_scale, notes=notes)
