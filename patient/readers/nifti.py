"""NIfTI, versions 1 and 2, in one file or a pair."""

from __future__ import annotations

import gzip
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from patient.geometry import check_affine, voxel_sizes
from patient.readers.common import DEFLATE, check_claim, chosen_volume, damage, quiet_libraries
from patient.volumes import Choice, Volume
from utils.errors import UserError

_MILLIMETRES = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}  # by NIfTI's code of the unit of length; 0 is unknown
_HEADERS = {
    348: (nibabel.Nifti1Header, nibabel.Nifti1Image),
    540: (nibabel.Nifti2Header, nibabel.Nifti2Image),
}
_DIFFER = 0.01  # of a voxel: how far the two forms may place a corner apart, because headers round


@dataclass(frozen=True)
class _Place:
    """Where a header says the volume lies."""

    affine: np.ndarray
    other: np.ndarray | None
    """The form that is not used, if it differs."""
    notes: list[str]


def read(path: Path, choice: Choice) -> Volume:
    with quiet_libraries():
        image = _open(path)
        place = _place(path, image, choice.form)
        stored = image.get_data_dtype()
        if stored.kind not in "uif":
            kind = "colours" if stored.fields else stored
            raise UserError(f"{path} holds {kind}: a volume holds real numbers")
        shape = image.shape
        count = int(np.prod(shape[3:]))
        chosen = chosen_volume(path, count, choice.frame)
        try:
            proxy = image.dataobj
            where = (
                tuple(int(at) for at in np.unravel_index(chosen or 0, shape[3:])) if len(shape) > 3 else ()
            )
            chosen_voxels = (slice(None), slice(None), slice(None), *where)
            values = np.asanyarray(proxy[chosen_voxels] if where else proxy)
        except MemoryError:
            raise
        except (OSError, EOFError, ValueError, zlib.error, OverflowError, TypeError) as error:
            raise UserError(f"{path} is damaged: {error}") from error
    bits = 8 if stored.itemsize == 1 else 16
    return Volume(values, place.affine, bits, path.name, chosen, notes=place.notes, other_affine=place.other)


def volume_count(path: Path) -> int:
    """How many volumes a file holds, by its header."""
    return int(np.prod(_open(path).shape[3:]))


def nifti_grid(path: str | os.PathLike[str]) -> tuple[tuple[int, ...], np.ndarray]:
    """Shape and affine (RAS millimetres) of a NIfTI file; only the header is read."""
    with quiet_libraries():
        image = _open(Path(path))
        return image.shape[:3], _place(Path(path), image, None).affine


def _open(path: Path) -> nibabel.Nifti1Pair:
    """The image with its header read and checked, 3-D or more."""
    if not path.exists():
        raise UserError(f"{path} does not exist")
    header_path, data_path = _pair(path)
    packed = _is_packed(header_path)
    try:
        with gzip.open(header_path, "rb") if packed else header_path.open("rb") as stream:
            start = stream.read(540)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} is not a NIfTI file, or it is damaged: {error}") from error
    order, kind = _kind(path, start)
    header_class, image_class = _HEADERS[kind]
    with damage(path, "is not a NIfTI file, or it is damaged"):
        header = header_class(start[: header_class.template_dtype.itemsize], order, check=False)
    single = _check_header(path, header)
    if not single and header_path == data_path:
        raise UserError(f"{path} is one of a pair: its other half, .hdr or .img, is not beside it")
    stored = data_path.stat().st_size
    claimed = int(np.prod([int(size) for size in header["dim"][1 : int(header["dim"][0]) + 1]], dtype=object))
    claimed = claimed * header.get_data_dtype().itemsize
    offset = int(header["vox_offset"]) if single else 0
    packed_data = _is_packed(data_path)
    check_claim(data_path, claimed + (0 if packed_data else offset), stored, DEFLATE if packed_data else 1)
    with damage(path, "is not a NIfTI file, or it is damaged"):
        if single:
            # By content, not by name: .nii.gz may be unpacked, and .nii packed.
            stream = gzip.open(path, "rb") if packed else path.open("rb")  # noqa: SIM115 - read lazily
            image = image_class.from_file_map({"image": nibabel.FileHolder(fileobj=stream)})
        else:
            pair = nibabel.Nifti2Pair if kind == 540 else nibabel.Nifti1Pair
            image = pair.from_filename(str(header_path))
    return image


def _pair(path: Path) -> tuple[Path, Path]:
    """The file of the header and that of the voxels."""
    name = path.name.lower()
    for ending in (".hdr", ".img"):
        for packed in ("", ".gz"):
            if name.endswith(ending + packed):
                stem = path.name[: -len(ending + packed)]
                halves = []
                for half in (".hdr", ".img"):
                    there = [path.parent / (stem + half + suffix) for suffix in ("", ".gz")]
                    halves.append(next((file for file in there if file.exists()), path))
                return halves[0], halves[1]
    return path, path


def _is_packed(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(2) == b"\x1f\x8b"


def _kind(path: Path, start: bytes) -> tuple[str, int]:
    """Byte order and size of the header. Raises UserError that says what else it is."""
    for order, name in (("<", "little"), (">", "big")):
        size = int.from_bytes(start[:4], name)  # type: ignore[arg-type]
        if size in _HEADERS and len(start) >= size:
            magic = start[344:348] if size == 348 else start[4:8]
            if magic[:2] in (b"n+", b"ni"):
                return order, size
            if size == 348:
                raise UserError(
                    f"{path} is not a NIfTI file, but Analyze 7.5 or damaged: Analyze does not say which way is left;"
                    " convert it to NIfTI"
                )
    raise UserError(f"{path} is not a NIfTI file, or it is damaged: its first bytes are no NIfTI header")


def _check_header(path: Path, header: Any) -> bool:
    """Refuse a header with impossible numbers. Returns whether header and voxels are in one file."""
    count = int(header["dim"][0])
    sizes = [int(size) for size in header["dim"][1 : max(count, 0) + 1]]
    while len(sizes) > 3 and sizes[-1] == 1:  # (x, y, z, 1, 1)
        sizes.pop()
    if not 1 <= count <= 7 or any(size < 0 for size in sizes):
        raise UserError(f"{path} is damaged: its header gives the shape {tuple(sizes)} in {count} dimensions")
    varying = [size for size in sizes[3:] if size > 1]
    if len(sizes) < 3 or len(varying) > 1:
        raise UserError(
            f"{path} is {len(sizes)}-D, of shape {tuple(sizes)}: a volume has three axes, or four with time"
        )
    if 0 in sizes:
        raise UserError(f"{path} is empty: its shape is {tuple(sizes)}")
    code, unit = int(header["datatype"]), int(header["xyzt_units"]) & 7
    try:
        header.get_data_dtype()
    except Exception as error:  # nibabel's HeaderDataError derives from Exception directly
        raise UserError(
            f"{path} is damaged: its header's data type, code {code}, is none of NIfTI's"
        ) from error
    if unit not in _MILLIMETRES:
        raise UserError(
            f"{path} is damaged: its header's unit of length, code {unit}, is none of NIfTI's (1 metres, 2"
            " millimetres, 3 micrometres): set xyzt_units"
        )
    offset = float(header["vox_offset"])
    if not 0 <= offset < 1 << 40:
        raise UserError(f"{path} is damaged: its header puts the voxels at byte {offset:g}")
    return bytes(np.asarray(header["magic"]).tobytes())[:2] == b"n+"


def _place(path: Path, image: nibabel.Nifti1Pair, form: str | None) -> _Place:
    """The affine by the form asked for, else the sform, else the qform."""
    header = image.header
    notes: list[str] = []
    scale = np.diag([*[_MILLIMETRES[int(header["xyzt_units"]) & 7]] * 3, 1.0])
    with damage(path, "cannot be placed"), np.errstate(all="ignore"):
        forms = {}
        troubles = {}
        for name, get in (("s", image.get_sform), ("q", image.get_qform)):
            try:
                affine, code = get(coded=True)
                if code == 0 or affine is None:
                    continue
                affine = scale @ np.array(affine, np.float64)
                check_affine(affine)
                forms[name] = affine
            except Exception as error:
                troubles[name] = str(error)
        if form is not None and form not in forms:
            why = troubles.get(form, "its code is 0")
            raise UserError(f"{path} has no {form}form to place it by ({why}): leave --form out")
        if not forms and troubles:
            name, why = next(iter(troubles.items()))
            raise UserError(f"{path} cannot be placed: its {name}form: {why}")
        if not forms:
            affine = scale @ np.array(header.get_base_affine(), np.float64)
            check_affine(affine)
            notes.append(
                "its header gives voxel sizes but no orientation: left, posterior and the origin are NIfTI's default"
            )
            return _Place(affine, None, notes)
    used = form or ("s" if "s" in forms else "q")
    for name in troubles:
        notes.append(f"its {name}form is no affine ({troubles[name]}): the {used}form is used")
    other = {"s": "q", "q": "s"}[used]
    if other not in forms:
        return _Place(forms[used], None, notes)
    corners = np.array(list(np.ndindex(2, 2, 2))) * (np.array(image.shape[:3]) - 1)
    apart = [corners @ (forms[used] - forms[other])[:3, :3].T + (forms[used] - forms[other])[:3, 3]]
    millimetres = float(np.linalg.norm(apart, axis=-1).max())
    if millimetres <= _DIFFER * min(voxel_sizes(forms[used])):
        return _Place(forms[used], None, notes)
    notes.append(
        f"its qform and sform place it up to {millimetres:.4g} mm apart: the {used}form is used; --form"
        f" {other} takes the other"
    )
    return _Place(forms[used], forms[other], notes)
