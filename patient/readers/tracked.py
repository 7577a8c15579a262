"""Tracked sequences (PLUS, SlicerIGT), whose frames each have a pose, resampled to one even volume.

Poses and pixels of consecutive frames that lie more than half a voxel apart are interpolated linearly: the space
between two frames is filled from both. Each voxel is the mean of the pixels that fall into it.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import numpy as np

from patient.readers.common import NO_ORIENTATION, from_lps, simple_itk
from patient.readers.itk_files import TextHeader, pixels
from patient.volumes import Volume
from utils.errors import UserError

_MOST_VOXELS = 512**3
_PREFERRED = ("ImageToReference", "ImageToTracker", "ImageToWorld", "ProbeToReference", "ProbeToTracker")


def resampled(path: Path, header: TextHeader, spacing: float) -> Volume:
    """The volume that the frames sweep, with voxels of `spacing` mm; voxels outside are 0 and `padded`."""
    if spacing <= 0:
        raise UserError(f"--resample {spacing:g}: give a voxel size in millimetres")
    array, image = pixels(path, header, simple_itk(f"reading {path}"))
    if array.ndim != 3:
        raise UserError(
            f"{path} holds frames of shape {array.shape[1:]}: a tracked sequence of grey frames is resampled"
        )
    notes: list[str] = []
    kept, poses = _poses(path, header, len(array), np.array(image.GetSpacing()[:2]), notes)
    frames = array[kept].astype(np.float64)
    rows, columns = frames.shape[1:]
    basis, low, shape = _grid(path, poses, (columns, rows), spacing)

    total, count = np.zeros(shape), np.zeros(shape)
    steps = [
        max(int(np.ceil(2 * _apart(a, b, (columns, rows)) / spacing)), 1)
        for a, b in itertools.pairwise(poses)
    ]
    measured = np.zeros(shape, bool)
    # Within the plane too, each pixel gives as many samples as needed to leave no hole.
    size = max(np.linalg.norm(poses[0][:3, 0]), np.linalg.norm(poses[0][:3, 1]))
    factor = max(int(np.ceil(2 * size / spacing)), 1)
    along, down = ((np.arange(n * factor) + 0.5) / factor - 0.5 for n in (columns, rows))
    grid = np.stack(
        (*np.meshgrid(along, down), *np.broadcast_arrays(0.0, np.ones((len(down), len(along))))), -1
    )
    fine = (
        np.rint(down).astype(int).clip(0, rows - 1)[:, None],
        np.rint(along).astype(int).clip(0, columns - 1),
    )

    def put(pose: np.ndarray, values: np.ndarray, where: np.ndarray | None) -> None:
        at = np.rint(((grid @ pose.T)[..., :3] @ basis - low) / spacing).astype(int).reshape(-1, 3)
        flat = np.ravel_multi_index(tuple(at.clip(0, np.array(shape) - 1).T), shape)
        free = np.ones(len(flat), bool) if where is None else ~where.ravel()[flat]
        total.ravel()[:] += np.bincount(flat[free], values[fine].ravel()[free], total.size)
        count.ravel()[:] += np.bincount(flat[free], minlength=total.size)

    for pose, frame in zip(poses, frames, strict=True):
        put(pose, frame, None)
    measured = count > 0
    for k, step in enumerate(steps):
        for i in range(1, step):
            share = i / step
            between = (1 - share) * frames[k] + share * frames[k + 1]
            put((1 - share) * poses[k] + share * poses[k + 1], between, measured)
    filled = int(np.count_nonzero((count > 0) & ~measured))
    values = np.divide(total, count, out=np.zeros(shape), where=count > 0)
    values = np.rint(values).astype(array.dtype) if array.dtype.kind in "ui" else values.astype(array.dtype)
    notes.append(
        f"{len(poses)} tracked frames are resampled to {spacing:g} mm; {filled / values.size:.1%} of the voxels lie"
        f" between frames and are interpolated, {np.count_nonzero(count == 0) / values.size:.1%} are outside the sweep"
    )
    notes.append(f"places are the tracker's, not the patient's: {NO_ORIENTATION}")
    affine = from_lps(basis * spacing, basis @ low, path)
    bits = 8 if array.dtype.itemsize == 1 else 16
    outside = count == 0
    return Volume(values, affine, bits, path.name, notes=notes, padded=outside if outside.any() else None)


def _poses(
    path: Path, header: TextHeader, count: int, spacing: np.ndarray, notes: list[str]
) -> tuple[list[int], list[np.ndarray]]:
    """Which frames have a valid pose, and the (4, 4) matrices from (column, row, 0, 1) to millimetres."""
    names = {key.split("_", 2)[2].removesuffix("Transform") for key in header.poses}
    name = next((name for name in _PREFERRED if name in names), None)
    if name is None and len(names) == 1:
        name = names.pop()
    if name is None:
        raise UserError(
            f"{path} has poses {', '.join(sorted(names))}: none of them is known to place the image"
        )
    pixels_to = np.diag([1.0, 1.0, 1.0, 1.0])
    if not name.startswith("Image"):
        calibration = _matrix(header.pairs.get("ImageToProbeTransform", ""))
        if calibration is None:
            notes.append(
                "it has no ImageToProbeTransform: the image is taken to lie at the probe's origin, by its pixel size"
            )
            calibration = np.diag([*spacing, 1.0, 1.0])
        pixels_to = calibration
    kept, poses, lost = [], [], 0
    for k in range(count):
        prefix = next(
            (
                f"Seq_Frame{k:0{width}d}_{name}"
                for width in (4, 1, 3, 5, 6)
                if f"Seq_Frame{k:0{width}d}_{name}Transform" in header.pairs
            ),
            "",
        )
        matrix = _matrix(header.pairs.get(f"{prefix}Transform", ""))
        valid = header.pairs.get(f"{prefix}TransformStatus", "OK").strip().upper() == "OK"
        if matrix is None or not valid:
            lost += 1
            continue
        kept.append(k)
        poses.append(matrix @ pixels_to)
    if lost:
        notes.append(f"{lost} of {count} frames have no valid pose and are left out")
    if len(kept) < 2:
        raise UserError(f"{path} has {len(kept)} frames with a valid pose: at least 2 are needed")
    return kept, poses


def _matrix(text: str) -> np.ndarray | None:
    numbers = re.findall(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?", text)
    if len(numbers) != 16:
        return None
    matrix = np.array(numbers, float).reshape(4, 4)
    return matrix if np.isfinite(matrix).all() and np.linalg.matrix_rank(matrix[:3, :2]) == 2 else None


def _corners(pose: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    ends = [(i, j, 0, 1) for i in (0, size[0] - 1) for j in (0, size[1] - 1)]
    return (np.array(ends, float) @ pose.T)[:, :3]


def _apart(first: np.ndarray, second: np.ndarray, size: tuple[int, int]) -> float:
    """How far a corner moves from one frame to the next."""
    return float(np.linalg.norm(_corners(first, size) - _corners(second, size), axis=1).max())


def _grid(
    path: Path, poses: list[np.ndarray], size: tuple[int, int], spacing: float
) -> tuple[np.ndarray, np.ndarray, tuple[int, int, int]]:
    """Directions of the volume's axes (3, 3), one per column, the smallest place along each, and its shape."""
    across, down = (
        np.mean([pose[:3, axis] / np.linalg.norm(pose[:3, axis]) for pose in poses], axis=0)
        for axis in (0, 1)
    )
    across = across / np.linalg.norm(across)
    down = down - across * (down @ across)
    down = down / np.linalg.norm(down)
    normal = np.cross(across, down)
    if (poses[-1][:3, 3] - poses[0][:3, 3]) @ normal < 0:
        normal = -normal
    basis = np.column_stack((across, down, normal))
    places = np.concatenate([_corners(pose, size) for pose in poses]) @ basis
    low, high = places.min(0), places.max(0)
    shape = np.floor((high - low) / spacing + 1.5)
    if shape.min() < 2:
        raise UserError(
            f"{path}: its frames move within their own plane, and sweep no volume of {spacing:g} mm"
        )
    if shape.prod() > _MOST_VOXELS:
        raise UserError(
            f"{path} sweeps {' x '.join(f'{n:.0f}' for n in shape)} voxels of {spacing:g} mm: give a larger size"
        )
    i, j, k = shape.astype(int).tolist()
    return basis, low, (i, j, k)
