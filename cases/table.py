"""Many cases: a table, a BIDS folder, nnU-Net's folders, or a folder of volumes."""

from __future__ import annotations

import csv
import hashlib
import re
import shlex
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from utils.errors import UserError

VOLUMES = (".nii", ".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd", ".dcm", ".tif", ".tiff")
_PERHAPS = (".dcm", ".tif", ".tiff")  # volumes, or slices of one
PICTURES = (".png", ".jpg", ".jpeg", ".bmp")
COLUMNS = ("case", "image", "label", "options")
_NAME = re.compile(r"[\w.+=@-]+")  # what is safe as a folder's name everywhere


@dataclass(frozen=True)
class Row:
    """One case of many. options: of its own, as on medgs.py's command line."""

    name: str
    image: Path
    labels: tuple[Path, ...] = ()
    options: tuple[str, ...] = ()


def read_cases(source: Path) -> list[Row]:
    """The cases of a CSV or TSV table, or those found in a folder, in order. Raises `UserError` where there are none, a
    column is missing, or two have one name."""
    rows = list(_found(source) if source.is_dir() else _tabled(source))
    if not rows:
        raise UserError(
            f"{source} holds no cases: give a table with the columns {', '.join(COLUMNS)}, a BIDS or nnU-Net folder, "
            "or a folder of volumes or of DICOM folders"
        )
    seen: set[str] = set()
    for row in rows:
        if not _NAME.fullmatch(row.name) or row.name.startswith("."):
            raise UserError(
                f"{source}: the case {row.name!r} names a folder: use letters, digits and . _ + = @ -"
            )
        if row.name in seen:
            raise UserError(f"{source}: two cases are named {row.name}")
        seen.add(row.name)
    return rows


def part(rows: Sequence[Row], num_parts: int, part_id: int) -> list[Row]:
    """Every num_parts-th case from part_id on, as nnU-Net has it."""
    if not 0 <= part_id < num_parts:
        raise UserError(f"-part_id {part_id}: parts of -num_parts {num_parts} go from 0 to {num_parts - 1}")
    return list(rows[part_id::num_parts])


def fingerprint(row: Row) -> str:
    """Changes with any file of a case: from their names, sizes and times, as engines look at files."""
    total = hashlib.sha256()
    for path in (row.image, *row.labels):
        for file in sorted(_files_of(path)):
            about = file.stat()
            total.update(f"{file}\0{about.st_size}\0{about.st_mtime_ns}\n".encode())
    return total.hexdigest()[:16]


def _files_of(path: Path) -> list[Path]:
    """All that is in a folder, whose own time says nothing of it; a file, and the voxels beside a header."""
    kind = path.suffix.lower()
    if path.is_dir():
        found = list(path.rglob("*"))
    elif kind in (".mhd", ".nhdr"):  # its voxels may have any name
        found = list(path.parent.iterdir())
    else:
        found = [
            path,
            *(path.with_suffix(other) for other in {".hdr": [".img"], ".img": [".hdr"]}.get(kind, [])),
        ]
    return [file for file in found if file.is_file()]


# ---- tables ----------------------------------------------------------------------------------------------------------


def _tabled(path: Path) -> Iterator[Row]:
    delimiter = "\t" if path.suffix.lower() in (".tsv", ".tab") else ","
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter=delimiter)
            header = [name.strip().lower() for name in reader.fieldnames or ()]
            if "image" not in header:
                raise UserError(f"{path} has no column image: its first line names {', '.join(COLUMNS)}")
            if unknown := sorted(set(header) - {*COLUMNS, ""}):
                raise UserError(f"{path} has a column {unknown[0]}: there are {', '.join(COLUMNS)}")
            reader.fieldnames = header
            for number, line in enumerate(reader, 2):
                yield from _row(path, number, line)
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is no table of text: {error}") from error


def _row(path: Path, number: int, line: dict[str, str | None]) -> Iterator[Row]:
    if None in line:
        raise UserError(f"{path}, line {number}: more values than columns (paths with a comma need quotes)")
    values = {name: (value or "").strip() for name, value in line.items()}
    if not any(values.values()):
        return
    if not values["image"]:
        raise UserError(f"{path}, line {number}: no image")
    image = path.parent / values["image"]
    labels = tuple(path.parent / label for label in values.get("label", "").split(";") if label.strip())
    for file in (image, *labels):
        if not file.exists():
            raise UserError(f"{path}, line {number}: {file} does not exist")
    try:
        options = tuple(shlex.split(values.get("options", "")))
    except ValueError as error:
        raise UserError(f"{path}, line {number}: options {values['options']}: {error}") from error
    yield Row(values.get("case") or stem(image), image, labels, options)


# ---- folders ---------------------------------------------------------------------------------------------------------


def _found(folder: Path) -> Iterator[Row]:
    if any(folder.glob("sub-*/anat")) or any(folder.glob("sub-*/ses-*/anat")):
        return _bids(folder)
    if (folder / "imagesTr").is_dir():
        return _nnunet(folder)
    return _loose(folder)


def _bids(folder: Path) -> Iterator[Row]:
    """`sub-*/[ses-*/]anat/*_T1w.nii.gz` (any suffix but masks), with the label that a derivative of the same
    subject has: `derivatives/*/sub-*/[ses-*/]anat/*_dseg.nii.gz` or `*_mask.nii.gz`; not one in another space, such as
    a template's (`space-MNI152`)."""
    images = sorted([*folder.glob("sub-*/anat/*.nii*"), *folder.glob("sub-*/ses-*/anat/*.nii*")])
    for image in images:
        if image.name.split(".")[0].endswith(("_dseg", "_mask")):
            continue
        entities = stem(image).rsplit("_", 1)[0]
        place = image.parent.relative_to(folder)
        known = sorted(folder.glob(f"derivatives/*/{place}/{entities}_*.nii*"))
        spaces = {f"space-{stem(image).rsplit('_', 1)[-1]}", "space-orig", "space-individual"}
        known = [path for path in known if {e for e in path.name.split("_") if e[:6] == "space-"} <= spaces]
        dseg = [path for path in known if path.name.split(".")[0].endswith("_dseg")]
        mask = [path for path in known if path.name.split(".")[0].endswith("_mask")]
        yield Row(stem(image), image, tuple((dseg or mask)[:1]))


def _nnunet(folder: Path) -> Iterator[Row]:
    """`imagesTr/CASE_0000.nii.gz`, the first channel, with `labelsTr/CASE.nii.gz`."""
    for image in _volumes(folder / "imagesTr"):
        match = re.fullmatch(r"(.+)_0000", stem(image))
        if match:
            labels = [path for path in _volumes(folder / "labelsTr") if stem(path) == match[1]]
            yield Row(match[1], image, tuple(labels[:1]))


def _loose(folder: Path) -> Iterator[Row]:
    """Volumes in the folder itself (`CASE_label` or `CASE_mask` beside them are labels); else a folder per case, with
    `image` or `volume` and perhaps `label` or `mask` in it, or a series."""
    if slices := _slices(folder):
        raise UserError(
            f"{folder} holds {slices} of one volume, not volumes: for that case alone, give it as -i; for many cases, "
            "give the folder of their folders"
        )
    volumes = {stem(path): path for path in _volumes(folder)}
    if volumes:
        labels = {name for name in volumes if re.search(r"[_-](label|labels|mask|seg)$", name)}
        for name in sorted(volumes.keys() - labels):
            own = [volumes[label] for label in sorted(labels) if re.sub(r"[_-][^_-]+$", "", label) == name]
            yield Row(name, volumes[name], tuple(own[:1]))
        return
    for child in sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] not in "._"):
        inside = {stem(path).lower(): path for path in _volumes(child)}
        image = next((inside[name] for name in ("image", "volume", "img") if name in inside), None)
        label = next((inside[name] for name in ("label", "labels", "mask", "seg") if name in inside), None)
        if image is not None:
            yield Row(child.name, image, () if label is None else (label,))
        elif any(path.is_file() for path in child.rglob("*")):
            yield Row(child.name, child)


def _slices(folder: Path) -> str:
    """What a folder holds if it is one volume's slices: images, pages of TIFF or single slices of DICOM; else ""."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name[0] != ".")
    if any(
        path.name.lower().endswith(VOLUMES) and not path.name.lower().endswith(_PERHAPS) for path in files
    ):
        return ""
    kinds = {
        "images": [path for path in files if path.suffix.lower() in PICTURES],
        "TIFF files of one page": [path for path in files if _is_page(path)],
        "DICOM slices": [path for path in files if _is_dicom_slice(path)],
    }
    return next((kind for kind, found in kinds.items() if len(found) > 1), "")


def _is_page(path: Path) -> bool:
    """Whether a TIFF has one page, and is no stack of ImageJ's, which lists one too."""
    if path.suffix.lower() not in (".tif", ".tiff"):
        return False
    with path.open("rb") as file:
        start = file.read(8)
        order = {b"II*\0": "<", b"MM\0*": ">"}.get(start[:4])
        if order is None or len(start) < 8:  # BigTIFF, for large stacks; or damaged: prepare.py names it
            return False
        (directory,) = struct.unpack(f"{order}I", start[4:])
        file.seek(directory)
        (entries,) = struct.unpack(f"{order}H", file.read(2).ljust(2, b"\0"))
        tags = file.read(12 * entries)
        following = file.read(4)
        file.seek(0)
        return following == bytes(4) and not re.search(
            rb"ImageJ=.{0,40}images=", file.read(1 << 20) + tags, re.S
        )


def _is_dicom_slice(path: Path) -> bool:
    """Whether a file is DICOM of one frame, by its first bytes: workflow/Snakefile may have no pydicom."""
    with path.open("rb") as file:
        start = file.read(1 << 16)
    if start[128:132] != b"DICM" and path.suffix.lower() not in (".dcm", ".ima"):
        return False
    frames = re.search(rb"\x28\0\x08\0(?:IS..|....) ?(\d+)", start, re.S)
    return frames is None or int(frames[1]) < 2


def _volumes(folder: Path) -> list[Path]:
    found: Iterable[Path] = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in found if path.name.lower().endswith(VOLUMES) and path.name[0] != ".")


def stem(path: Path) -> str:
    """A file's name without its suffix, `.nii.gz` being one."""
    return re.sub(r"\.(nii\.gz|[A-Za-z0-9]+)$", "", path.name) if path.is_file() else path.name
