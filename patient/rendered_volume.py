"""A rendered sequence as one NIfTI volume that lies on its source."""

from __future__ import annotations

import gzip
import os
from dataclasses import dataclass, field
from functools import cached_property

import nibabel
import numpy as np

from patient.geometry import Geometry
from patient.labels import LabelTable
from utils.errors import UserError
from utils.files import atomic_write

_MOST = 32767  # entries along an axis


@dataclass(frozen=True)
class Grid:
    """Slices between the first frame and the last, evenly spaced, and where they lie in the patient.

    For evenly spaced frames, these are the frames and the ``sub_frames`` - 1 images between each two. For unevenly
    spaced ones, which NIfTI cannot hold, slices are as far apart as the sub-frames of the closest two frames, and are
    rendered where they lie.

    size: columns and rows of a render. option: what the user asked for, to begin messages with.
    """

    geometry: Geometry
    size: tuple[int, int]
    sub_frames: int
    option: str = "--nifti"

    def __post_init__(self) -> None:
        if self.geometry.affine is None:
            raise UserError(
                f"{self.option}: {self.geometry.source} had no affine, so it is unknown where these frames lie; leave"
                " it out"
            )
        if len(self.positions) > _MOST:
            raise UserError(
                f"{self.option}: {len(self.positions)} slices are more than the {_MOST} that a NIfTI volume holds;"
                " take a smaller --interp"
            )

    @cached_property
    def positions(self) -> list[float]:
        """(D,) positions of the slices, frame index plus fraction."""
        last = len(self.geometry.positions) - 1
        if self.geometry.evenly_spaced:
            return [k + i / self.sub_frames for k in range(last) for i in range(self.sub_frames)] + [
                float(last)
            ]
        places = np.array(self.geometry.positions)
        count = int((places[-1] - places[0]) / self._step + 1e-6) + 1
        return np.interp(places[0] + self._step * np.arange(count), places, np.arange(last + 1)).tolist()

    @property
    def _step(self) -> float:
        """From slice to slice, in the unit of the geometry's positions."""
        return float(np.diff(self.geometry.positions).min()) / self.sub_frames

    @property
    def affine(self) -> np.ndarray:
        """(4, 4), voxels of `RenderedVolume.values` to RAS millimetres: the source's axes and directions."""
        geometry, count = self.geometry, len(self.positions)
        to_render = np.zeros((4, 4))  # voxel indices to (column, row, slice)
        to_render[3, 3] = 1
        for index, (axis, flip, extent) in enumerate(
            zip(geometry.axes, (*geometry.flips, False), (*self.size, count), strict=True)
        ):
            to_render[index, axis] = -1 if flip else 1
            to_render[index, 3] = extent - 1 if flip else 0
        corners = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]], np.float64)
        corners[3, 2] = self.positions[1] - self.positions[0] if count > 1 else 1.0
        placed = geometry.to_patient(corners, self.size)
        assert placed is not None
        render_to_patient = np.eye(4)
        render_to_patient[:3, :3] = (placed[1:] - placed[0]).T
        render_to_patient[:3, 3] = placed[0]
        return render_to_patient @ to_render


@dataclass
class RenderedVolume:
    """Collects slices, two bytes per voxel (one for a mask and for ids below 256), and writes them.

    mask: hold 1 where a value is 0.5 or more, else 0. labels: hold the ids of a label map. Otherwise values in [0, 1]
    become intensities of the geometry's window, in steps of 1/65535 of it; with a ``span``, differences from 0 to that.
    """

    grid: Grid
    mask: bool
    labels: LabelTable | None = None
    span: float | None = None
    values: np.ndarray = field(init=False)
    """In the source's axes and directions."""

    def __post_init__(self) -> None:
        geometry = self.grid.geometry
        shape = [0, 0, 0]
        extents = (*self.grid.size, len(self.grid.positions))
        for axis, extent in zip(geometry.axes, extents, strict=True):
            shape[axis] = extent
        dtype = np.uint8 if self.mask else np.uint16 if self.labels is None else self.labels.dtype
        self.values = np.zeros(shape, dtype, order="F")
        flips = [slice(None, None, -1 if flip else 1) for flip in geometry.flips]
        self.slices = self.values.transpose(geometry.axes[::-1])[:, flips[1], flips[0]]
        """The same as renders show them: (slice, row, column), a view."""

    @property
    def holds_masks(self) -> bool:
        return self.mask or self.labels is not None

    @property
    def positions(self) -> list[float]:
        """Of the slices, in the sequence of frames."""
        return self.grid.positions

    def put(self, slot: int, image: np.ndarray) -> None:
        """image (H, W), float in [0, 1], or ids of a label map, is slice ``slot``."""
        if self.labels is not None:
            self.slices[slot] = image
        else:
            self.slices[slot] = image >= 0.5 if self.mask else np.rint(image * np.float32(65535))

    @property
    def image(self) -> nibabel.Nifti1Image:
        """The volume as nibabel has it."""
        image = nibabel.Nifti1Image(self.values, self.grid.affine)
        image.header.set_xyzt_units("mm")
        image.set_sform(self.grid.affine, "scanner")
        image.set_qform(self.grid.affine, "scanner")
        if not np.allclose(image.get_qform(), self.grid.affine, atol=1e-3):  # a gantry tilt is not a rotation
            image.set_qform(None, "unknown")
        if not self.holds_masks:  # stored levels, with their scale in the header: half the size of floats
            low, high = self.grid.geometry.window if self.span is None else (0.0, self.span)
            image.header.set_slope_inter((high - low) / 65535, low)
        return image

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the NIfTI file, complete or not at all."""
        write_nifti(path, self.image)


def write_nifti(path: str | os.PathLike[str], image: nibabel.Nifti1Image) -> None:
    """Write a compressed NIfTI file, complete or not at all."""
    # Compression levels above 1 gain little. Without a time stamp, the same volume gives the same file.
    with (
        atomic_write(path) as temporary,
        gzip.GzipFile(temporary, "wb", compresslevel=1, mtime=0) as file,
    ):
        image.to_stream(file)
