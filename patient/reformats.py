"""Planes across the frames: what a model shows on any plane in the patient, or at isotropic spacing.

A reformat wants renders at positions close together along the frames, and takes from each what lies near it: linear
between two positions and between pixels, so that its values are those of the continuous model to within the distance
of half a pixel. Label maps are taken from the nearest of both.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

import nibabel
import numpy as np
from nibabel.affines import apply_affine
from scipy.ndimage import map_coordinates

from patient.geometry import Geometry, voxel_sizes
from patient.labels import LabelTable
from patient.rendered_volume import write_nifti
from utils.errors import UserError

ISOTROPIC = "isotropic"
_RIGHT = 1e-3  # cosine between the two directions, up to which they count as perpendicular
_MOST = 8192  # pixels along a side, and positions
_EDGE = 1e-6  # of a frame: rounding at the first and the last frame


@dataclass(frozen=True)
class Plane:
    """Points in the patient, on one plane or on several parallel ones."""

    affine: np.ndarray
    """(column, row, slice) to RAS millimetres (4, 4)."""
    shape: tuple[int, int, int]
    """Columns, rows and slices."""

    @classmethod
    def parse(cls, told: str, geometry: Geometry, spacing: float | None) -> Plane:
        """`isotropic`, the frames' volume with cubic voxels; or nine numbers, RAS millimetres: a point of the plane,
        the direction of its columns' index (to the right) and that of its rows' (down).

        The plane shows all of the volume that it cuts. spacing: millimetres between its points (default: the frames'
        smaller pixel side). Raises UserError.
        """
        if geometry.affine is None or geometry.spacing is None:
            raise UserError(f"--plane: {geometry.source} had no affine, so no plane in the patient is known")
        spacing = spacing or min(geometry.spacing[:2])
        if told.strip().casefold() == ISOTROPIC:
            return cls._isotropic(geometry, spacing)
        words = re.split(r"[\s,;]+", told.strip(" ()[]"))
        try:
            numbers = np.array([float(word) for word in words])
        except ValueError:
            numbers = np.empty(0)
        if numbers.size != 9 or not np.isfinite(numbers).all():
            raise UserError(
                f"--plane {told!r}: give {ISOTROPIC}, or nine numbers in RAS millimetres: a point, the direction to the"
                ' right and that down, such as "0,-20,35 1,0,0 0,0,-1"'
            )
        point, right, down = numbers.reshape(3, 3)
        lengths = np.linalg.norm(right), np.linalg.norm(down)
        if min(lengths) == 0 or abs(right @ down) > _RIGHT * lengths[0] * lengths[1]:
            raise UserError(f"--plane {told!r}: the two directions have to be perpendicular")
        return cls._through(geometry, point, right / lengths[0], down / lengths[1], spacing)

    @classmethod
    def _isotropic(cls, geometry: Geometry, spacing: float) -> Plane:
        columns, rows = geometry.size
        matrix = geometry.matrix
        assert matrix is not None
        extent = np.array([columns, rows, len(geometry.slices)]) - 1
        sizes = np.array(voxel_sizes(matrix))
        shape = np.floor(extent * sizes / spacing + 1e-6).astype(int) + 1
        _check(shape)
        step = np.diag([*(spacing / sizes), 1.0])
        return cls(matrix @ step, (int(shape[0]), int(shape[1]), int(shape[2])))

    @classmethod
    def _through(
        cls, geometry: Geometry, point: np.ndarray, right: np.ndarray, down: np.ndarray, spacing: float
    ) -> Plane:
        """The plane's part that holds its cut through the frames' volume."""
        corners = _corners(geometry)
        normal = np.cross(right, down)
        heights = (corners - point) @ normal
        cut = []
        for a in range(8):
            for axis in range(3):
                b = a | 1 << axis
                if b == a or heights[a] * heights[b] > 0 or heights[a] == heights[b]:
                    continue
                share = heights[a] / (heights[a] - heights[b])
                cut.append(corners[a] + share * (corners[b] - corners[a]))
        cut += [corner for corner, height in zip(corners, heights, strict=True) if abs(height) < 1e-9]
        if not cut:
            middle = ", ".join(f"{value:.4g}" for value in corners.mean(axis=0))
            raise UserError(
                f"--plane: the plane misses the frames, whose middle is {middle} (RAS mm), by"
                f" {np.abs(heights).min():.4g} mm"
            )
        # Points lie a whole number of steps from the given one.
        at = (np.array(cut) - point) @ np.column_stack((right, down)) / spacing
        low, high = np.ceil(at.min(axis=0) - 1e-6), np.floor(at.max(axis=0) + 1e-6)
        shape = np.maximum(high - low, 0).astype(int) + 1
        _check(shape)
        affine = np.eye(4)
        affine[:3, :3] = np.column_stack((right, down, normal)) * spacing
        affine[:3, 3] = point + spacing * (low[0] * right + low[1] * down)
        return cls(affine, (int(shape[0]), int(shape[1]), 1))

    def points(self, number: int) -> np.ndarray:
        """(row, column, 3), the points of one slice in RAS millimetres."""
        columns, rows, _ = self.shape
        row, column = np.mgrid[:rows, :columns].astype(float)
        index = np.stack((column, row, np.full_like(row, number)), axis=-1)
        return index @ self.affine[:3, :3].T + self.affine[:3, 3]


def _corners(geometry: Geometry) -> np.ndarray:
    """(8, 3) outermost pixel centres of the first and the last frame, RAS mm; bit i of the index is along axis i."""
    columns, rows = geometry.size
    ends = (0, columns - 1), (0, rows - 1), (0, len(geometry.slices) - 1)
    found = geometry.to_patient(
        np.array([[ends[axis][corner >> axis & 1] for axis in range(3)] for corner in range(8)], float)
    )
    assert found is not None
    return found


def _check(shape: np.ndarray) -> None:
    if shape.max() > _MOST:
        size = " x ".join(map(str, shape.tolist()))
        raise UserError(f"--plane: {size} points are too many: take a larger --plane_spacing")


class Reformat:
    """Collects the renders that a plane, or the planes of a volume, need.

    size: columns and rows of a render. labels: of a label map. mask: inside from half.
    """

    def __init__(
        self,
        plane: Plane,
        geometry: Geometry,
        size: tuple[int, int],
        labels: LabelTable | None = None,
        mask: bool = False,
    ) -> None:
        self.plane, self.labels, self.mask = plane, labels, mask
        self._geometry, self._size = geometry, size
        columns, rows, slices = plane.shape
        self.values = np.zeros((slices, rows, columns), np.float32 if labels is None else np.uint16)
        """(slice, row, column), in [0, 1], or label numbers; 0 outside the frames."""
        at, position = self._at(0)
        inside = np.isfinite(position)
        self._sub_frames = 0  # of an oblique plane: positions from frame to frame
        if not inside.any() or np.ptp(position[inside]) < _EDGE:  # parallel to the frames
            firsts = geometry.from_patient(apply_affine(plane.affine, [(0, 0, k) for k in range(slices)]))
            assert firsts is not None
            self.positions = firsts[:, 2].clip(0, len(geometry.slices) - 1).tolist()
        else:
            gaps = np.diff(geometry.positions)
            longest = voxel_sizes(np.array(geometry.affine))[2] * gaps.max() / gaps.mean()
            step = voxel_sizes(plane.affine)[0] / 2
            self._sub_frames = int(np.clip(np.ceil(longest / step), 1, _MOST // len(gaps)))
            low = int(np.floor(position[inside].min() * self._sub_frames))
            high = int(np.ceil(position[inside].max() * self._sub_frames))
            self.positions = [k / self._sub_frames for k in range(low, high + 1)]
            self._places = at[inside], position[inside], np.flatnonzero(inside)

    def _at(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Of a slice's points: (row, column) in renders, (rows, columns, 2), and position, NaN outside the frames."""
        at = self._geometry.from_patient(self.plane.points(number), self._size)
        assert at is not None
        nearest = np.rint(at[..., 2])
        position = np.where(np.abs(at[..., 2] - nearest) < _EDGE, nearest, at[..., 2])
        inside = (position >= 0) & (position <= len(self._geometry.slices) - 1)
        for axis in range(2):
            inside &= (at[..., axis] >= -0.5 - _EDGE) & (at[..., axis] <= self._size[axis] - 0.5 + _EDGE)
        return at[..., 1::-1], np.where(inside, position, np.nan)

    def put(self, slot: int, image: np.ndarray) -> None:
        """image (H, W), float in [0, 1], or label numbers, is the render at ``positions[slot]``."""
        if not self._sub_frames:
            at, position = self._at(slot)
            inside = np.isfinite(position)
            self.values[slot][inside] = self._sampled(image, at[inside])
            return
        at, position, where = self._places
        weights = 1 - np.abs(position - self.positions[slot]) * self._sub_frames
        near = weights >= 0.5 if self.labels is not None else weights > 0
        found = self._sampled(image, at[near])
        flat = self.values[0].reshape(-1)
        if self.labels is not None:
            flat[where[near]] = found
        else:
            flat[where[near]] += (weights[near] * found).astype(np.float32)

    def _sampled(self, image: np.ndarray, at: np.ndarray) -> np.ndarray:
        return map_coordinates(image, at.T, order=0 if self.labels is not None else 1, mode="nearest")

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write a NIfTI file of one or more slices: intensities, inside (1) and outside, or label numbers."""
        low, high = self._geometry.window
        values = self.values.transpose(2, 1, 0)
        if self.labels is None:
            values = (values >= 0.5).astype(np.uint8) if self.mask else values * (high - low) + low
        image = nibabel.Nifti1Image(values, self.plane.affine)
        image.header.set_xyzt_units("mm")
        image.set_sform(self.plane.affine, "scanner")
        write_nifti(path, image)
