"""Writers of what hospitals read: DICOM segmentations, and series derived from a series."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from patient.geometry import Geometry, swap_ras_lps
from patient.labels import LabelTable
from patient.readers.common import optional, quiet_libraries
from patient.rendered_volume import RenderedVolume
from patient.writers.identity import Identity, series_uid
from patient.writers.images import Scale, check_size, write_images
from patient.writers.segmentation import Instance, Slices, write_segmentation
from patient.writers.series import Placement, Series, SeriesVolume
from utils.errors import UserError

_SQUARE = 1e-3  # cosine of the angle between columns and rows, below which DICOM can hold them


class DicomCase:
    """What is written beside the DICOM series that a geometry's frames came from.

    folder: that series, if it is not where the geometry says. anonymous: leave out who the patient is. labels: of the
    masks, 1 where they are no label maps; none if there are no masks. option: what the user asked for, to begin
    messages with.
    Raises UserError if the series is not found, or frames do not lie on it.
    """

    def __init__(
        self, geometry: Geometry, folder: str | None, anonymous: bool, labels: LabelTable, option: str
    ) -> None:
        optional("pydicom", "pydicom", option)
        if labels:
            optional("highdicom", "highdicom", option)
        self.geometry, self.option = geometry, option
        self.series = Series.find(geometry, folder, option)
        self.placement = Placement.of(self.series, geometry, option)
        self.identity = Identity(anonymous)
        self.labels = labels

    def masks(self) -> SeriesVolume:
        """An empty volume of masks on the series' own slices."""
        return SeriesVolume(self.placement)

    @quiet_libraries()  # which warn of what the source has
    def write_masks(self, path: str | os.PathLike[str], volume: SeriesVolume) -> LabelTable:
        """Write the masks on the series' slices as a segmentation; returns the labels that have voxels."""
        frames, series = self.series.frames, self.series
        positions = [_known(frame.position) for frame in frames]
        slices = Slices(
            series.shape[:2],
            _known(frames[0].orientation),
            frames[0].spacing or (1.0, 1.0),
            positions,
            frames[0].header.number("SliceThickness") or _step(positions),
            [[self._instance(k)] for k in range(len(frames))],
            series_uid(series.header, self.identity),
            aligned=True,
        )
        return write_segmentation(
            path,
            volume.values.transpose(2, 1, 0),
            slices,
            self.labels,
            series.header,
            self.identity,
            "MedGS: masks on the source's slices",
        )

    @quiet_libraries()
    def write_dense(
        self, image: tuple[Path, RenderedVolume] | None, mask: tuple[Path, RenderedVolume] | None
    ) -> LabelTable | None:
        """Write the slices on and between the frames: images, and masks that refer to them; returns their labels.

        image, mask: where to, and the volume.
        """
        labels = None
        given = image or mask
        assert given is not None
        turned, order, slices = self._dense(given[1])
        if image is not None:
            path, volume = image
            low, high = self.geometry.window
            stack = turned(volume.slices)
            slices = write_images(
                path,
                (stack[k] * ((high - low) / 65535) + low for k in order),
                slices,
                Scale.of(self.geometry.window, self.series.whole_numbers),
                self.series.header,
                self.identity,
                "MedGS: slices between slices",
            )
        if mask is not None:
            path, volume = mask
            labels = write_segmentation(
                path,
                turned(volume.slices)[order],
                slices,
                self.labels,
                self.series.header,
                self.identity,
                "MedGS: masks between slices",
            )
        return labels

    def check_dense(self, volume: RenderedVolume) -> None:
        """Raise UserError where `write_dense` would, before anything is rendered."""
        *_, slices = self._dense(volume)
        check_size(slices)

    def _dense(self, volume: RenderedVolume) -> tuple[_Turn, np.ndarray, Slices]:
        """How a render becomes an image as the series has them, the order of slices, and where they then lie."""
        size, placement = volume.grid.size, self.placement
        turn = _Turn(placement)
        columns, rows = turn.size(size)
        corner = turn.pixel(0, 0, size)
        points = [(*corner, position) for position in volume.positions]
        points += [(*turn.pixel(1, 0, size), 0.0), (*turn.pixel(0, 1, size), 0.0), (*corner, 0.0)]
        placed = self.geometry.to_patient(np.array(points, float), size)
        assert placed is not None
        placed = swap_ras_lps(placed)
        right, below = placed[-3] - placed[-1], placed[-2] - placed[-1]
        spacing = float(np.linalg.norm(right)), float(np.linalg.norm(below))
        orientation = np.column_stack((right / spacing[0], below / spacing[1]))
        if abs(orientation[:, 0] @ orientation[:, 1]) > _SQUARE:
            raise UserError(
                f"{self.option}: columns and rows of these frames are not at a right angle (gantry tilt), and DICOM has"
                " no such images: cut the volume along its own slices"
            )
        normal = np.cross(orientation[:, 0], orientation[:, 1])
        order = np.argsort(placed[:-3] @ normal, kind="stable")
        positions = [placed[k] for k in order]
        sources = [self.placement.sources(volume.positions[k]) for k in order]
        slices = Slices(
            (columns, rows),
            orientation,
            spacing,
            positions,
            _step(positions),
            [[self._instance(k) for k in of] for of in sources],
            series_uid(self.series.header, self.identity),
            aligned=(columns, rows) == self.series.shape[:2],
        )
        return turn, order, slices

    def _instance(self, index: int) -> Instance:
        frame = self.series.frames[index]
        number = frame.index + 1 if frame.header.size[2] > 1 else None
        return Instance(frame.header.kind, self.identity.uid(frame.header.instance), number)


class _Turn:
    """From upright renders (slice, row, column) to the series' directions of columns and rows."""

    def __init__(self, placement: Placement) -> None:
        self._flips = placement.flips
        self._swap = placement.axes[0] > placement.axes[1]

    def __call__(self, stack: np.ndarray) -> np.ndarray:
        turned = stack[:, :: -1 if self._flips[1] else 1, :: -1 if self._flips[0] else 1]
        return turned.transpose(0, 2, 1) if self._swap else turned

    def size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Columns and rows afterwards."""
        return size[::-1] if self._swap else size

    def pixel(self, column: int, row: int, size: tuple[int, int]) -> tuple[int, int]:
        """Column and row before, of those afterwards."""
        column, row = (row, column) if self._swap else (column, row)
        return (
            size[0] - 1 - column if self._flips[0] else column,
            size[1] - 1 - row if self._flips[1] else row,
        )


def _known(array: np.ndarray | None) -> np.ndarray:
    assert array is not None  # Series.find takes placed slices only
    return array


def _step(positions: list[np.ndarray]) -> float:
    """Millimetres from slice to slice."""
    return float(np.median(np.linalg.norm(np.diff(positions, axis=0), axis=1))) if len(positions) > 1 else 1.0


__all__ = ["DicomCase", "SeriesVolume"]
