"""The DICOM series that frames came from: found again, and which of its voxels the frames cover."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from skimage.transform import resize

from patient.geometry import Geometry, swap_ras_lps
from patient.readers import dicom
from patient.readers.dicom.frames import Frame
from patient.volumes import Choice
from utils.errors import UserError

_NEAR = 0.1  # of a voxel: how far frames may lie from the series' voxels, because headers round
GIVE = "give their series with --dicom_source FOLDER"


@dataclass(frozen=True)
class Series:
    """One volume of a DICOM series: its slices in order, and where they lie."""

    path: Path
    frames: tuple[Frame, ...]
    affine: np.ndarray
    """Voxel (column, row, slice) indices to RAS millimetres (4, 4)."""
    places: np.ndarray
    """Where the slices lie, as increasing indices of the affine (slices,)."""
    notes: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, int, int]:
        """Columns, rows and slices."""
        columns, rows, _ = self.frames[0].header.size
        return columns, rows, len(self.frames)

    @property
    def header(self) -> Any:
        """pydicom's dataset of the first slice, without pixels."""
        return self.frames[0].header.dataset

    @cached_property
    def whole_numbers(self) -> bool:
        """Whether its intensities are whole numbers."""
        stored = (self.frames[0].header.number("BitsAllocated") or 16) <= 16  # else floats
        return stored and all(float(part).is_integer() for frame in self.frames for part in frame.scale)

    def position(self, index: int) -> np.ndarray:
        """(3,) LPS millimetres, the centre of a slice's first pixel."""
        return swap_ras_lps(self.affine[:3, 2] * self.places[index] + self.affine[:3, 3])

    @classmethod
    def find(cls, geometry: Geometry, folder: str | None, option: str) -> Series:
        """The series that frames were cut from, or the one in `folder`. Raises UserError that begins with `option`."""
        source = geometry.dicom
        if folder is None and source is None:
            raise UserError(
                f"{option}: nothing says that {geometry.source} is DICOM, and a DICOM file belongs to a series: leave"
                f" it out, or, if these frames were made from one, {GIVE}"
            )
        path = Path(folder if folder is not None else source.path)  # type: ignore[union-attr]
        if not path.exists():
            known = "" if folder is not None else ", where the frames came from,"
            raise UserError(f"{option}: {path}{known} does not exist: {GIVE}")
        if not path.is_dir() and not dicom.is_dicom(path):
            raise UserError(f"{option}: {path} is not DICOM: {GIVE}")
        choice = Choice() if source is None else source.choice
        slices = dicom.read_slices(path, choice)
        notes = []
        if source is not None and source.digest != source.digest_of(f.header.instance for f in slices.frames):
            if folder is None:
                raise UserError(
                    f"{option}: {path} has changed since the frames were made from it: it has other slices or"
                    f" identifiers; {GIVE}"
                )
            notes.append(
                f"{path} is not the series that the frames were made from, or it has new identifiers"
            )
        if slices.affine is None or slices.frames[0].in_volume or not slices.frames[0].placed:
            raise UserError(
                f"{option}: {path} does not say where its slices lie in the patient: leave it out"
            )
        if not all(frame.header.instance and frame.header.kind for frame in slices.frames):
            raise UserError(
                f"{option}: {path} has slices without an identifier (SOP instance UID), which a DICOM file"
                " that is made from them must name: leave it out"
            )
        places = np.arange(len(slices.frames)) if slices.depths is None else np.array(slices.depths)
        return cls(path, tuple(slices.frames), slices.affine, places.astype(float), tuple(notes))


@dataclass(frozen=True)
class Placement:
    """Which voxels of a series the frames of a geometry cover."""

    series: Series
    geometry: Geometry
    axes: tuple[int, int, int]
    """The series' axes along which (column, row, frame) run."""
    flips: tuple[bool, bool]
    """Whether (column, row) run against them."""
    start: tuple[int, int]
    """The first voxel along the axes of column and row."""
    depths: np.ndarray
    """Where each frame lies along its axis (frames,): indices of the series' affine."""

    @classmethod
    def of(cls, series: Series, geometry: Geometry, option: str) -> Placement:
        """Raises UserError if frames do not lie voxel for voxel on the series."""
        refusal = UserError(
            f"{option}: the frames of {geometry.source} do not lie on the voxels of {series.path}: {GIVE}"
        )
        if geometry.affine is None:
            raise UserError(
                f"{option}: {geometry.source} had no affine, so it is unknown where its frames lie"
            )
        columns, rows = geometry.size
        count = len(geometry.slices)
        to_voxels = np.linalg.inv(series.affine)

        def at(*points: tuple[float, float, float]) -> np.ndarray:
            placed = geometry.to_patient(np.array(points))
            assert placed is not None
            return placed @ to_voxels[:3, :3].T + to_voxels[:3, 3]

        first, right, below = at((0, 0, 0), (columns - 1, 0, 0), (0, rows - 1, 0))
        steps = right - first, below - first
        axes = [int(np.abs(step).argmax()) for step in steps]
        if axes[0] == axes[1]:
            raise refusal
        across = 3 - sum(axes)
        start = []
        for axis, step, extent in zip(axes, steps, (columns, rows), strict=True):
            expected = np.zeros(3)
            expected[axis] = np.copysign(extent - 1, step[axis])
            low = min(first[axis], first[axis] + step[axis])
            # Off the plane, indices count slices, which may be far apart.
            if np.abs(step - expected).max() > _NEAR or abs(low - round(low)) > _NEAR:
                raise refusal
            start.append(round(low))
            if low < -_NEAR or round(low) + extent > series.shape[axis]:
                raise refusal
        middle = ((columns - 1) / 2, (rows - 1) / 2)
        points = at(*((*middle, float(k)) for k in range(count)))
        drift = points - points[0]
        drift[:, across] = 0
        if np.abs(drift).max() > _NEAR:
            raise refusal
        flips = bool(steps[0][axes[0]] < 0), bool(steps[1][axes[1]] < 0)
        depths = points[:, across]
        placement = cls(series, geometry, (axes[0], axes[1], across), flips, (start[0], start[1]), depths)
        if not placement.slots:
            raise refusal
        return placement

    @cached_property
    def _places(self) -> np.ndarray:
        """Where the series' voxels lie along the frames' axis."""
        across = self.axes[2]
        return self.series.places if across == 2 else np.arange(self.series.shape[across], dtype=float)

    @cached_property
    def slots(self) -> dict[int, float]:
        """The series' voxels along the frames' axis, from the first frame to the last -> position (index and fraction).

        A position within a thousandth of a frame's is the frame's.
        """
        order = np.argsort(self.depths)
        low, high = self.depths[order[0]] - 0.01, self.depths[order[-1]] + 0.01
        found = {}
        for index, place in enumerate(self._places):
            if low <= place <= high:
                position = float(np.interp(place, self.depths[order], order.astype(float)))
                found[index] = float(round(position)) if abs(position - round(position)) < 1e-3 else position
        return found

    def sources(self, position: float) -> list[int]:
        """The series' slices of the frames next to a position; none if frames cross the slices."""
        if self.axes[2] != 2:
            return []
        beside = {int(np.floor(position)), min(int(np.ceil(position)), len(self.depths) - 1)}
        return sorted({int(np.abs(self._places - self.depths[k]).argmin()) for k in beside})


class SeriesVolume:
    """Collects renders of masks on a series' own voxels.

    values: (column, row, slice) label numbers, 0 outside and where no frames lie.
    """

    def __init__(self, placement: Placement) -> None:
        self.placement = placement
        self.values = np.zeros(placement.series.shape, np.uint16)
        axes, flips = placement.axes, placement.flips
        view = self.values.transpose(axes[2], axes[1], axes[0])  # (across, row, column)
        columns, rows = placement.geometry.size
        view = view[
            :,
            placement.start[1] : placement.start[1] + rows,
            placement.start[0] : placement.start[0] + columns,
        ]
        self._view = view[:, :: -1 if flips[1] else 1, :: -1 if flips[0] else 1]
        order = sorted(placement.slots.items(), key=lambda item: item[1])
        self._indices = [index for index, _ in order]
        self.positions = [position for _, position in order]
        """Positions in the sequence at which a render is wanted, increasing."""

    def put(self, slot: int, image: np.ndarray) -> None:
        """image (H, W) at `positions[slot]`: shares in [0, 1], inside from half; or whole numbers, which are labels.

        An image of another size than the frames' covers the same field of view.
        """
        columns, rows = self.placement.geometry.size
        labels = image.dtype.kind in "ui"
        if image.shape != (rows, columns):
            order = 0 if labels else 1
            image = resize(
                image, (rows, columns), order=order, mode="edge", preserve_range=True, anti_aliasing=False
            ).astype(image.dtype)
        self._view[self._indices[slot]] = image if labels else image >= 0.5
