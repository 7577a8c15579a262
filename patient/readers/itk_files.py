"""NRRD and MetaImage files: the text of the header, and voxels by SimpleITK once its claims are checked."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from patient.readers.common import check_claim, check_path_is_text, reason
from utils.errors import UserError

_LONGEST = 4 << 20  # bytes of a header: a tracked sequence has a dozen lines per frame


@dataclass(frozen=True)
class TextHeader:
    """The lines of an NRRD or MetaImage header, by their lower-case key."""

    nrrd: bool
    fields: dict[str, str] = field(default_factory=dict)
    pairs: dict[str, str] = field(default_factory=dict)
    """NRRD's own key:=value lines, and all of MetaImage's fields, by their key as written."""

    @property
    def kinds(self) -> list[str]:
        return self.fields.get("kinds", "").lower().split()

    @property
    def poses(self) -> list[str]:
        """Keys of the transforms of each frame of a tracked sequence."""
        return [key for key in self.pairs if re.fullmatch(r"Seq_Frame\d+_\w*Transform", key)]


def read_text_header(path: Path) -> TextHeader:
    """The header's text. Raises UserError if the file does not begin with one."""
    with path.open("rb") as stream:
        start = stream.read(_LONGEST)
    nrrd = path.suffix.lower() in (".nrrd", ".nhdr")
    if nrrd and not start.startswith(b"NRRD"):
        raise UserError(f"{path} is damaged, or not what its name says: it does not begin with NRRD")
    fields: dict[str, str] = {}
    pairs: dict[str, str] = {}
    for raw in start.split(b"\n"):
        line = raw.decode("latin-1").strip("\r")
        if nrrd:
            if not line:
                break
            if ":=" in line:
                key, value = line.split(":=", 1)
                pairs[key] = value
            elif ":" in line and not line.startswith("#"):
                key, value = line.split(":", 1)
                fields[key.strip().lower()] = value.strip()
        else:
            if "=" not in line:
                break
            key, value = (part.strip() for part in line.split("=", 1))
            fields[key.lower()] = value
            pairs[key] = value
            if key.lower() == "elementdatafile":
                break
    if not nrrd and "elementdatafile" not in fields:
        raise UserError(f"{path} is damaged, or not what its name says: it has no MetaImage header")
    return TextHeader(nrrd, fields, pairs)


def pixels(path: Path, header: TextHeader, sitk: Any) -> tuple[np.ndarray, Any]:
    """Voxels ([t,] z, y, x[, component]) and ITK's image; sizes are checked before anything is allocated."""
    check_path_is_text(path, "ITK")
    stored = _stored(path, header)
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
        voxels = int(np.prod(reader.GetSize(), dtype=object)) * reader.GetNumberOfComponents()
        check_claim(path, voxels * _bytes_of(sitk.GetPixelIDValueAsString(reader.GetPixelIDValue())), stored)
        image = reader.Execute()
    except RuntimeError as error:
        raise UserError(f"{path} is damaged, or not what its name says: {reason(error)}") from error
    return sitk.GetArrayFromImage(image), image


def _bytes_of(kind: str) -> int:
    bits = re.search(r"(\d+)[- ]bit", kind)
    return int(bits[1]) // 8 if bits else 1


def _stored(path: Path, header: TextHeader) -> int:
    """Bytes of the files that hold the voxels. Raises UserError if one is missing."""
    named = header.fields.get("data file" if header.nrrd else "elementdatafile", "") or header.fields.get(
        "datafile", ""
    )
    if (header.nrrd and not named) or named.upper() == "LOCAL":
        return path.stat().st_size
    if named.upper().startswith("LIST") or "%" in named or " " in named:
        return sum(file.stat().st_size for file in path.parent.iterdir() if file.is_file())
    data = path.parent / named
    if not data.is_file():
        raise UserError(f"{path} is a header alone: {named}, which it names, is not beside it")
    return data.stat().st_size
