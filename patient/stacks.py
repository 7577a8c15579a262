"""Stacks of frames on disk with their place in the patient: what meshes are made from and compared with."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from patient.geometry import HELDOUT, FrameCut, Geometry, cut_geometry, voxel_sizes
from patient.labels import Kind, LabelTable, Meaning, segmentation
from utils.errors import UserError
from utils.images import frame_number, image_files, read_image, read_levels, to_grey
from utils.threads import spare_processors

FRAME_FOLDERS = ("render_mask", "render_img", "render")
INNER = ("original", HELDOUT)  # folders of a data root
GENERIC = (*FRAME_FOLDERS, *INNER, "img", "seg", "mirror")  # folders within a case, which do not name it
_SAME_TIME = 5.0  # seconds between folders written one after the other
NIFTI = (".nii.gz", ".nii")
PUBLISHED_INTER = 8


@dataclass(frozen=True)
class Stack:
    """Frames and where they lie."""

    values: np.ndarray
    """(frame, row, column) float32 in [0, 1], 0 or 1 for masks; with in-betweens, `inter` frames per slice."""
    affine: np.ndarray | None
    """(column, row, frame) to RAS millimetres (4, 4), as for evenly spaced frames; None if unknown."""
    heights: np.ndarray | None
    """The frame coordinate of each frame, (frames,), if slices are unevenly spaced; else None."""
    inter: int
    """Frames per slice."""
    meaning: Meaning | None
    """What the files' numbers mean; None for grey levels, such as renders of images."""
    numbers: np.ndarray | None
    """(frame, row, column) int32 labels, if it is a label map."""
    labels: LabelTable | None
    """Names and colours that frames.json gives the labels."""
    found: int
    """Frames in the folder, including those beyond the last slice, which are left out."""
    place: str
    """Where their place comes from, in words."""

    @property
    def spacing(self) -> tuple[float, float, float]:
        """From one column, row and slice (not in-between frame) to the next: mm, or voxels without an affine."""
        column, row, frame = (1.0, 1.0, 1.0) if self.affine is None else voxel_sizes(self.affine)
        return column, row, frame * self.inter

    def volume(self, shares: np.ndarray) -> float:
        """Volume, given the share of each voxel that is inside (frame, row, column), 0 to 1: mm^3, or voxels."""
        thickness = np.ones(len(shares)) if self.heights is None else np.gradient(self.heights)
        voxel = 1.0 if self.affine is None else abs(float(np.linalg.det(self.affine[:3, :3])))
        return float(shares.sum(axis=(1, 2), dtype=np.float64) @ thickness) * voxel


def frame_paths(folder: Path, extension: str = ".png") -> list[Path]:
    """The frames of a case folder in order: those of render_mask/, render_img/, render/ or the folder itself."""
    return rendered_paths(folder, extension) or loose_paths(folder, extension)


def rendered_paths(folder: Path, extension: str = ".png") -> list[Path]:
    """The frames of the first folder of renders that has any."""
    for name in FRAME_FOLDERS:
        if (folder / name).is_dir() and (frames := loose_paths(folder / name, extension)):
            return frames
    return []


def check_newest(folder: Path, extension: str = ".png") -> None:
    """Raise UserError if the renders that `rendered_paths` takes are older than those of another folder beside them.

    A model that was trained further then has new images but old masks. If its checkpoint is older than both, they were
    rendered one after the other, and belong together.
    """
    dates = {
        name: [path.stat().st_mtime for path in loose_paths(folder / name, extension)]
        for name in FRAME_FOLDERS
        if (folder / name).is_dir()
    }
    dates = {name: times for name, times in dates.items() if times}
    if len(dates) < 2:
        return
    first, *others = dates
    trained = max((path.stat().st_mtime for path in folder.glob("chkpnt*.pth")), default=np.inf)
    for other in others:
        if max(dates[first]) + _SAME_TIME < min(dates[other]) and min(dates[first]) < trained:
            raise UserError(
                f"{folder / first} is older than {folder / other}: render both again"
                f" (python render.py -m {shlex.quote(str(folder))} --pipeline both), or remove the older one"
            )


def case_name(folder: Path) -> str:
    """A case's name: that of its folder, or of the parent of folders in which programs put frames."""
    place = folder.resolve()
    while place.name in GENERIC and place.parent != place:
        place = place.parent
    return place.name


def loose_paths(folder: Path, extension: str = ".png") -> list[Path]:
    """The frames in the folder itself."""
    return image_files(folder, [extension if extension.startswith(".") else f".{extension}"])


def read_stack(
    folder: Path,
    extension: str = ".png",
    nifti: str | os.PathLike[str] | None = None,
    inter: int | None = None,
    kind: Kind | None = None,
) -> Stack:
    """The frames of a case folder (`frame_paths`), read and placed.

    Their place comes from frames.json in the folder or its parent; else from `<case>.nii.gz` in the folder `nifti`,
    or a NIfTI file in the case folder, which say that frame k is volume[:, :, k].T. inter: frames per slice, needed
    only if neither names nor geometry tell. kind: "labels" or "soft" if the user says so. Raises UserError.
    """
    paths = frame_paths(folder, extension)
    if not paths:
        raise UserError(f"{folder} has no {extension} frames")
    geometry, place = _geometry(folder, nifti)
    own = geometry or case_geometry(folder)
    labels = None if own is None else own.labels
    found, slices = len(paths), None
    if geometry is not None and inter is None and (slices := _painted_slices(paths, geometry)) is not None:
        inter = 1
    else:
        inter = _inter(paths, geometry, inter)
        paths = _to_the_last_slice(paths, geometry, inter)
    values, numbers, meaning = read_frames(paths, kind, () if labels is None else labels.ids)
    if min(values.shape) < 2:
        rows, columns = values.shape[1:]
        raise UserError(f"{len(paths)} frame of {columns} x {rows} pixels encloses no volume")
    affine, heights = None, None
    if geometry is not None:
        if slices is None and len(paths) != inter * (len(geometry.slices) - 1) + 1:
            raise UserError(
                f"{found} frames are not {len(geometry.slices)} slices times {inter}, which {place} and"
                " --inter require"
            )
        places = np.arange(len(values)) if slices is None else np.array(slices)
        affine, heights = _placed(geometry, (values.shape[2], values.shape[1]), places, inter)
    return Stack(values, affine, heights, inter, meaning, numbers, labels, found, place)


def _painted_slices(paths: list[Path], geometry: Geometry) -> list[int] | None:
    """By number, the frames that have a mask, if only some do; None if every frame has one."""
    if sub_frames(paths) is not None or len(paths) >= len(geometry.slices):
        return None
    if paths[0].parent.name in FRAME_FOLDERS:
        return None
    numbers = [frame_number(path) for path in paths]
    return numbers if len(set(numbers)) == len(numbers) and max(numbers) < len(geometry.slices) else None


def _to_the_last_slice(paths: list[Path], geometry: Geometry | None, inter: int) -> list[Path]:
    """The frames without those beyond the last slice, where nothing was observed."""
    found = sub_frames(paths)
    if found is not None:
        last = max(frame for frame, _ in found)
        return [path for (frame, sub_frame), path in found.items() if frame < last or sub_frame == 0]
    if geometry is not None and len(paths) == inter * len(geometry.slices):
        return paths[: len(paths) - inter + 1]
    return paths


def read_frames(
    paths: list[Path], kind: Kind | None = None, known: Iterable[int] = ()
) -> tuple[np.ndarray, np.ndarray | None, Meaning | None]:
    """Values (frame, row, column) float32 in [0, 1], labels of a label map, and what the numbers mean.

    Renders, even of masks, have intermediate levels; they, and ambiguous files, get no meaning: a threshold separates
    inside from outside. known: ids that frames.json names. Raises UserError.
    """
    rendered = paths[0].parent.name in FRAME_FOLDERS and kind is None
    if not rendered or known:
        stored = _read_all(paths, read_levels)
        try:
            found = segmentation(paths, stored, soft=kind == "soft", labels=kind == "labels", known=known)
        except UserError:
            if kind is not None:
                raise
        else:
            meaning = found.meaning
            if meaning.kind == "labels" or not rendered:
                labelled = meaning.kind == "labels"
                numbers = np.stack([meaning.numbers(f) for f in found.frames]) if labelled else None
                return np.stack([meaning.shares(frame) for frame in found.frames]), numbers, meaning
    return np.stack(_read_all(paths, lambda path: to_grey(read_image(path)))), None, None


def _read_all(paths: list[Path], read: Callable[[Path], np.ndarray]) -> list[np.ndarray]:
    """Frames of one size, read by several threads: decoding releases the interpreter lock."""
    with ThreadPoolExecutor(spare_processors()) as threads:
        frames = list(threads.map(read, paths))
    rows, columns = frames[0].shape[:2]
    for path, frame in zip(paths, frames, strict=True):
        if frame.shape[:2] != (rows, columns):
            raise UserError(
                f"{path} is {frame.shape[1]} x {frame.shape[0]} pixels, {paths[0].name} {columns} x {rows}: frames have"
                " one size"
            )
    return frames


def beside(folder: Path, masks: Stack, extension: str = ".png") -> np.ndarray | None:
    """The images (frame, row, column) in [0, 1] that belong to ``masks`` of a case folder (`read_stack`): renders of
    the same positions, else frames beside the masks of a data root. None unless there is one for each, of its size."""
    paths = frame_paths(folder, extension)
    place = paths[0].parent
    pairs = {"render_mask": folder / "render_img", "original": place.parents[1] / "img" / "original"}
    images = pairs.get(place.name)
    if images is None or images == place or not images.is_dir():
        return None
    own = {path.stem: path for path in loose_paths(images, extension)}
    shown = [own[path.stem] for path in paths[: len(masks.values)] if path.stem in own]
    if len(shown) != len(masks.values):
        return None
    values = [to_grey(read_image(path)) for path in shown]
    same = all(value.shape == masks.values.shape[1:] for value in values)
    return np.stack(values) if same else None


def case_geometry(folder: Path) -> Geometry | None:
    """frames.json of a case: in its folder or the parent; for OUT/seg/original of prepare.py, in OUT."""
    return Geometry.find(folder.parent if folder.name in (*INNER, *FRAME_FOLDERS) else folder)


def _geometry(folder: Path, nifti: str | os.PathLike[str] | None) -> tuple[Geometry | None, str]:
    """Where the frames lie, and what says so."""
    name = case_name(folder)
    geometry = case_geometry(folder)
    if geometry is not None and geometry.affine is not None:
        return geometry, f"place from frames.json of {geometry.source}"
    from patient.readers.nifti import nifti_grid  # training never gets here, and would wait for nibabel

    candidates = [Path(nifti) / f"{name}{suffix}" for suffix in NIFTI] if nifti else []
    candidates += sorted(path for path in folder.iterdir() if path.name.endswith(NIFTI))
    for path in candidates:
        if path.is_file():
            shape, affine = nifti_grid(path)
            plain = FrameCut((0, 1, 2), (False, False))
            geometry = cut_geometry(plain, affine, shape, window=(0.0, 1.0), bits=8, source=path.name)
            return geometry, f"place from {path}, as volume[:, :, k].T"
    missing = "no frames.json" if geometry is None else f"no millimetres in frames.json of {geometry.source}"
    missing += f", no {name}.nii.gz in {nifti}" if nifti else ""
    return None, f"{missing}, no NIfTI file: units are voxels, not millimetres"


def sub_frames(paths: list[Path]) -> dict[tuple[int, int], Path] | None:
    """Renders by (frame, sub-frame), from names such as 00003_1.png; None if any is named otherwise."""
    numbers = [re.fullmatch(r"(\d+)_(\d+)", path.stem) for path in paths]
    if not all(numbers):
        return None
    return {(int(n[1]), int(n[2])): path for n, path in zip(numbers, paths, strict=True) if n}


def _inter(paths: list[Path], geometry: Geometry | None, wanted: int | None) -> int:
    """Frames per slice. Raises UserError if any is missing, which would make the spacing wrong."""
    found = sub_frames(paths)
    if found is None:  # plain numbers: other programs' renders, or frames and masks, one per slice
        renders = paths[0].parent.name in FRAME_FOLDERS
        slices = len(geometry.slices) if geometry is not None else len(paths) + 1
        told = len(paths) // slices if len(paths) % slices == 0 else PUBLISHED_INTER if renders else 1
        return wanted or told
    frames, inter = [max(numbers) + 1 for numbers in zip(*found, strict=True)]
    first = min(frame for frame, _ in found)
    for frame in range(first, frames):
        for sub_frame in range(inter if frame < frames - 1 else 1):
            if (frame, sub_frame) not in found:
                raise UserError(
                    f"frame {frame:05d}_{sub_frame} is missing in {paths[0].parent}: render again"
                )
    if wanted not in (None, inter):
        raise UserError(
            f"{paths[0].parent} holds {inter} sub-frames per frame, which is not --inter {wanted}"
        )
    return inter


def _placed(
    geometry: Geometry, size: tuple[int, int], places: np.ndarray, inter: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """The affine of (column, row, frame) that is exact for the first and the last frame, and heights for the others.

    places: of the frames, in sub-frames, increasing.
    """
    frames = len(places)
    indices = np.zeros((frames + 2, 3))
    indices[:frames, 2] = places
    indices[frames:, 2] = places[0]
    indices[frames:, :2] = np.eye(2)
    points = geometry.to_patient(indices, size, inter)
    assert points is not None  # the caller has checked that there is an affine
    affine = np.eye(4)
    affine[:3, 3] = points[0]
    affine[:3, :2] = (points[frames:] - points[0]).T
    affine[:3, 2] = (points[frames - 1] - points[0]) / (frames - 1)
    heights = np.linalg.norm(points[:frames] - points[0], axis=1) / np.linalg.norm(affine[:3, 2])
    return affine, None if np.allclose(heights, np.arange(frames), atol=1e-3) else heights
