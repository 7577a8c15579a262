"""Cuts across a stack of slices: what lies between the slices shows best from the side."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from patient.geometry import patient_axes

_PLANES = ("sagittal", "coronal", "axial")  # by the patient axis (x, y, z) that they are normal to


@dataclass(frozen=True)
class SideView:
    """One of the two cuts that stand on the slices: along a row or along a column of each of them."""

    name: str
    """sagittal, coronal or axial, whichever is closest; else what it runs across."""
    along_row: bool
    """Whether it holds the same row of every slice; else the same column."""
    sideways: bool
    """Whether slices run from left to right in pictures; else from top to bottom."""
    last_first: bool
    """Whether pictures begin with the last slice. On top or to the left is superior, anterior or right."""

    def cut(self, stack: np.ndarray, row: int, column: int) -> np.ndarray:
        """The picture out of a stack (D, H, W, ...)."""
        return self.picture(stack[:, row] if self.along_row else stack[:, :, column])

    def picture(self, cut: np.ndarray) -> np.ndarray:
        """The picture of a cut (D, W or H, ...), whose first axis counts slices."""
        ordered = cut[::-1] if self.last_first else cut
        return ordered.swapaxes(0, 1) if self.sideways else ordered

    def place(self, along: np.ndarray, slices: np.ndarray, depth: int) -> tuple[np.ndarray, np.ndarray]:
        """Columns and rows in the picture of a stack of ``depth`` slices: from places along slices."""
        ordered = depth - 1 - slices if self.last_first else slices
        return (ordered, along) if self.sideways else (along, ordered)

    def aspect(self, spacing: tuple[float, float, float]) -> float:
        """The height of a pixel of the picture over its width. spacing: of columns, rows and slices."""
        along = spacing[0] if self.along_row else spacing[1]
        return along / spacing[2] if self.sideways else spacing[2] / along


def side_views(matrix: np.ndarray | None) -> tuple[SideView, SideView]:
    """The two cuts across slices that lie by ``matrix``, (column, row, slice) to RAS (4, 4); None if unknown: then the
    first slice is below."""
    if matrix is None:
        return SideView("across the rows", True, False, True), SideView(
            "across the columns", False, False, True
        )
    column, row, frame = patient_axes(matrix)
    last_first = bool(matrix[frame, 2] > 0)
    return (
        SideView(_PLANES[row], True, column == 2, last_first),
        SideView(_PLANES[column], False, row == 2, last_first),
    )


def slice_name(matrix: np.ndarray | None) -> str:
    """The plane that the slices themselves are closest to, or "slice"."""
    return "slice" if matrix is None else _PLANES[patient_axes(matrix)[2]]


def middle_of(masks: np.ndarray) -> tuple[int, int, int]:
    """(slice, row, column) in the middle of what is inside (D, H, W), else of the whole."""
    inside = np.nonzero(masks)
    if not len(inside[0]):
        depth, height, width = masks.shape
        return depth // 2, height // 2, width // 2
    return tuple(int(np.median(places)) for places in inside)  # type: ignore[return-value]
