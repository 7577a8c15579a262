"""Where frames lie in the patient: one typed object, kept from the volume to the mesh.

Conventions. Voxel (i, j, k) of a volume is `volume[i, j, k]`; its affine maps indices to RAS+ millimetres, voxel
centres on integers (NIfTI, nibabel). Frame index (column, row, frame) is pixel `frames[frame][row, column]`.
Everything inside this project is RAS; `swap_ras_lps` is the only place where that changes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from patient.labels import LabelTable
from patient.volumes import Choice
from utils.errors import UserError
from utils.files import atomic_write

FILE_NAME = "frames.json"
HELDOUT = "heldout"
"""Folder beside original/: frames that prepare.py --keep_every left out, named by their slice."""
_VERSION = 1
_EVEN = 0.01  # of a gap: how far a frame may lie from even spacing, because headers round

Affine = tuple[tuple[float, float, float, float], ...]  # 4 rows


def swap_ras_lps(points: np.ndarray) -> np.ndarray:
    """Points (..., 3) in RAS millimetres to LPS, or back: x and y change sign. DICOM, ITK and Slicer files are LPS."""
    return points * np.array([-1.0, -1.0, 1.0])


@dataclass(frozen=True)
class DicomSource:
    """The DICOM files that frames were cut from, to find them again when DICOM is written."""

    path: str
    """The folder or file, absolute."""
    digest: str
    """Of the SOP instance UIDs of its slices, in order: tells whether it has changed."""
    choice: Choice
    """Which of its volumes."""

    @staticmethod
    def digest_of(instances: Iterable[str]) -> str:
        return hashlib.sha256("\n".join(instances).encode()).hexdigest()[:32]

    @classmethod
    def of(cls, path: str | os.PathLike[str], instances: Sequence[str], choice: Choice) -> DicomSource | None:
        """None if the slices have no SOP instance UIDs, because they are not DICOM."""
        return cls(os.path.abspath(path), cls.digest_of(instances), choice) if instances else None


@dataclass(frozen=True)
class Geometry:
    """How a stack of frames was cut from its source, and where it lies. Written to `frames.json`.

    Frames show anatomy upright (radiological convention): columns and rows grow towards the patient's left, posterior
    or inferior, whichever their axis runs along. The transpose and flips that this takes are recorded here and are
    part of the affine, so nothing is lost. The order of frames is the order of the source's slices.
    """

    axes: tuple[int, int, int]
    """Source axes along which (column, row, frame) run."""
    flips: tuple[bool, bool]
    """Whether (column, row) run against their source axis."""
    size: tuple[int, int]
    """Columns and rows of a frame, pixels."""
    affine: Affine | None
    """(column, row, frame) indices to RAS millimetres; None where the source does not say (a folder of images).

    Columns need not be orthogonal: a gantry tilt is a shear. For unevenly spaced frames it is exact for the first
    and the last; `to_patient` is exact for all."""
    slices: tuple[int, ...]
    """Source slice of each frame."""
    slice_count: int
    """Slices of the source, including those left out."""
    positions: tuple[float, ...]
    """Place of each frame along the frame axis, from the source's first slice: mm, or slices without an affine.
    Increasing."""
    window: tuple[float, float]
    """Source intensities that became 0 and 1."""
    bits: int
    """Bits of a stored pixel, 8 or 16."""
    source: str
    """File or folder name of the source."""
    volume: int | None = None
    """Which volume of a 4-D source."""
    offset: tuple[int, int] = (0, 0)
    """Columns and rows that were cropped before the first one, pixels."""
    heldout_slices: tuple[int, ...] = ()
    """Source slices between the frames that were held out (`--keep_every`)."""
    heldout_positions: tuple[float, ...] = ()
    """Their places, in the unit of `positions`."""
    sizes: tuple[float | None, float | None, float | None] | None = None
    """Without an affine: millimetres from one (column, row, frame) to the next, as far as the source gives them."""
    labels: LabelTable | None = None
    """Names and colours of the label map that the masks are; None where they are masks of one structure."""
    dicom: DicomSource | None = None
    """Where the source lies (path), its volume (choice) and a digest of its slices' identifiers, if it is DICOM."""
    thickness: float | None = None
    """Of a slice, mm, as the source's header gives it; None where it does not, or frames are cut across its slices."""

    @property
    def axis(self) -> int:
        """The source axis that the frames cut."""
        return self.axes[2]

    @property
    def matrix(self) -> np.ndarray | None:
        """The affine as a (4, 4) float64 array."""
        return None if self.affine is None else np.array(self.affine, np.float64)

    @property
    def spacing(self) -> tuple[float, float, float] | None:
        """Millimetres from one (column, row, frame) to the next; the mean if frames are unevenly spaced."""
        return None if self.matrix is None else voxel_sizes(self.matrix)

    @property
    def evenly_spaced(self) -> bool:
        """Whether the frames are evenly spaced, to a hundredth of a gap."""
        return is_even(self.positions)

    def heldout_indices(self) -> list[float]:
        """Where held-out frames lie in the sequence of frames: 0.5 is halfway from frame 0 to frame 1."""
        return np.interp(self.heldout_positions, self.positions, np.arange(len(self.positions))).tolist()

    def durations(self) -> list[float] | None:
        """Each frame's share of time; they sum to 1, and frame k sits at the sum of the first k.

        Proportional to the gap after each frame, and to the median gap for the last one. None if the frames are evenly
        spaced, where each has 1 / K.
        """
        if self.evenly_spaced:
            return None
        gaps = np.diff(self.positions)
        gaps = np.append(gaps, np.median(gaps))
        return (gaps / gaps.sum()).tolist()

    def hold_out(self, frames: Sequence[int]) -> Geometry:
        """The geometry of the other frames, with ``frames`` (indices, neither the first nor the last) left out."""
        left = set(frames)
        kept = [k for k in range(len(self.slices)) if k not in left]
        if not kept or (kept[0], kept[-1]) != (0, len(self.slices) - 1):
            raise ValueError("the first and the last frame stay")
        places = dict(zip(self.heldout_slices, self.heldout_positions, strict=True))
        places |= {self.slices[k]: self.positions[k] for k in left}
        affine = self.matrix
        if affine is not None:
            affine[:, 2] *= (len(self.slices) - 1) / (len(kept) - 1)  # exact for the first frame and the last
        return replace(
            self,
            affine=None if affine is None else _tuples(affine.tolist()),
            slices=tuple(self.slices[k] for k in kept),
            positions=tuple(self.positions[k] for k in kept),
            heldout_slices=tuple(sorted(places)),
            heldout_positions=tuple(places[index] for index in sorted(places)),
        )

    def for_renders(self, size: tuple[int, int], sub_frames: int) -> np.ndarray | None:
        """The affine of (column, row, sub-frame) of renders: `sub_frames` per frame, `size` columns and rows.

        Renders of a model that was trained at another resolution cover the same field of view. Raises UserError if no
        single factor leads from the frames' size to `size`, because they then show something else, or if frames are
        unevenly spaced, because there is then no such affine (see `to_patient`).
        """
        if self.affine is None:
            return None
        if not self.evenly_spaced:
            raise UserError(f"the frames of {self.source} are unevenly spaced: no affine places all of them")
        return self.matrix @ self._from_renders(size, sub_frames)

    def to_patient(
        self, points: np.ndarray, size: tuple[int, int] | None = None, sub_frames: int = 1
    ) -> np.ndarray | None:
        """Points (..., 3), as (column, row, sub-frame) of renders, in RAS millimetres; exact for uneven spacing too.

        size: columns and rows of a render (default: the frames'). Between two frames depth is linear, as render.py
        spaces sub-frames; beyond the last one it continues by the median gap. Raises UserError as `for_renders`.
        """
        matrix = self.matrix
        if matrix is None:
            return None
        indices = points @ (step := self._from_renders(size or self.size, sub_frames))[:3, :3].T + step[:3, 3]
        gaps = np.diff(self.positions)
        if not self.evenly_spaced:
            first, frames = self.positions[0], indices[..., 2]
            before, after = np.minimum(frames, 0), np.maximum(frames - len(gaps), 0)
            depth = np.interp(frames, np.arange(len(gaps) + 1), self.positions) - first
            indices[..., 2] = (depth + (before + after) * np.median(gaps)) / gaps.mean()
        return indices @ matrix[:3, :3].T + matrix[:3, 3]

    def from_patient(self, points: np.ndarray, size: tuple[int, int] | None = None) -> np.ndarray | None:
        """The inverse of `to_patient`: (column, row, frame) of points (..., 3) in RAS millimetres."""
        matrix = self.matrix
        if matrix is None:
            return None
        inverse = np.linalg.inv(matrix)
        indices = points @ inverse[:3, :3].T + inverse[:3, 3]
        gaps = np.diff(self.positions)
        if not self.evenly_spaced:
            depth = indices[..., 2] * gaps.mean()
            end = self.positions[-1] - self.positions[0]
            before, after = np.minimum(depth, 0), np.maximum(depth - end, 0)
            frames = np.interp(depth + self.positions[0], self.positions, np.arange(len(gaps) + 1))
            indices[..., 2] = frames + (before + after) / np.median(gaps)
        step = np.linalg.inv(self._from_renders(size or self.size, 1))
        return indices @ step[:3, :3].T + step[:3, 3]

    def _from_renders(self, size: tuple[int, int], sub_frames: int) -> np.ndarray:
        """(column, row, sub-frame) of renders to (column, row, frame), as a (4, 4) array."""
        factors = np.array(self.size) / np.array(size)  # frame pixels per render pixel
        # Sizes are rounded to whole pixels, so each factor is known to one part in its side.
        if abs(factors[0] / factors[1] - 1) > 1 / min(size) + 1e-9:
            raise UserError(
                f"renders of {size[0]} x {size[1]} pixels do not come from frames of {self.size[0]} x {self.size[1]}"
                f" ({self.source}): give the geometry that belongs to them"
            )
        step = np.diag([*factors, 1 / sub_frames, 1.0])
        step[:2, 3] = (factors - 1) / 2  # pixel centres are on integers, and the outer pixel edges coincide
        return step

    def to_json(self) -> str:
        """Every field on a line of its own, and derived values (axis, spacing, ...) for people and other programs."""
        told = {"version": _VERSION, "axis": self.axis, "spacing": self.spacing, **asdict(self)}
        told["labels"] = None if self.labels is None else self.labels.to_json()
        told |= {"heldout_indices": self.heldout_indices(), "durations": self.durations()}
        return "{\n" + ",\n".join(f' "{name}": {json.dumps(value)}' for name, value in told.items()) + "\n}"

    @classmethod
    def from_json(cls, text: str) -> Geometry:
        """The geometry that `to_json` wrote, exactly. Raises ValueError for anything else."""
        try:
            told = json.loads(text)
            if told["version"] != _VERSION:
                raise ValueError(
                    f"its version is {told['version']}, and this program reads version {_VERSION}"
                )
            needed = [field.name for field in fields(cls) if field.name in told or field.default is MISSING]
            given = {name: _tuples(told[name]) for name in needed}
            if told.get("labels") is not None:
                given["labels"] = LabelTable.from_json(told["labels"])
            if (source := told.get("dicom")) is not None:
                given["dicom"] = DicomSource(source["path"], source["digest"], Choice(**source["choice"]))
            geometry = cls(**given)
            if len(geometry.slices) != len(geometry.positions) or not geometry.slices:
                raise ValueError("slices and positions disagree")
            if len(geometry.heldout_slices) != len(geometry.heldout_positions):
                raise ValueError("heldout_slices and heldout_positions disagree")
            if not (np.diff(np.array(geometry.positions, np.float64)) > 0).all():
                raise ValueError("positions do not increase")
            if geometry.affine is not None:
                check_affine(np.array(geometry.affine, np.float64))
        except (KeyError, TypeError) as error:
            raise ValueError(f"a field is missing or of another kind ({error})") from error
        return geometry

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write frames.json."""
        with atomic_write(path) as temporary:
            temporary.write_text(self.to_json() + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Geometry:
        """Read frames.json. Raises UserError that names the file."""
        try:
            return cls.from_json(Path(path).read_text())
        except FileNotFoundError:
            raise UserError(f"{path} does not exist") from None
        except (ValueError, OSError) as error:
            raise UserError(f"{path} is not a frames.json of prepare.py: {error}") from error

    @classmethod
    def find(cls, folder: str | os.PathLike[str]) -> Geometry | None:
        """The frames.json of a data root or of its parent (`prepare.py -o OUT` writes OUT/frames.json and OUT/img)."""
        for place in (Path(folder), Path(folder).absolute().parent):
            if (place / FILE_NAME).is_file():
                return cls.load(place / FILE_NAME)
        return None


@dataclass(frozen=True)
class FrameCut:
    """How a volume is cut into frames."""

    axes: tuple[int, int, int]  # source axes of (column, row, frame)
    flips: tuple[bool, bool]  # whether (column, row) run against theirs

    def frames(self, volume: np.ndarray) -> np.ndarray:
        """volume (I, J, K) or (I, J, K, channels) as a view (frame, row, column[, channels])."""
        columns, rows, frames = self.axes
        stack = volume.transpose(frames, rows, columns, *range(3, volume.ndim))
        steps = [-1 if flip else 1 for flip in self.flips]
        return stack[:, :: steps[1], :: steps[0]]

    def matrix(self, shape: tuple[int, ...]) -> np.ndarray:
        """(column, row, slice) indices to voxel indices (i, j, k) of a volume of `shape`, as a (4, 4) array."""
        to_voxels = np.zeros((4, 4))
        to_voxels[3, 3] = 1
        for index, (axis, flip) in enumerate(zip(self.axes, (*self.flips, False), strict=True)):
            to_voxels[axis, index] = -1 if flip else 1
            to_voxels[axis, 3] = shape[axis] - 1 if flip else 0
        return to_voxels


def upright_cut(affine: np.ndarray | None, axis: int) -> FrameCut:
    """Cut across source axis `axis` so that columns and rows grow towards left, posterior or inferior.

    Axial and coronal frames have left along the columns, sagittal ones posterior; the other direction goes down. Each
    source axis counts as the patient axis that it runs closest to, so oblique volumes are cut along their own grid.
    Without an affine nothing is known about the patient: columns and rows are the remaining axes in order.
    """
    first, second = (other for other in range(3) if other != axis)
    if affine is None:
        return FrameCut((first, second, axis), (False, False))
    patient = patient_axes(
        affine
    )  # source axis -> 0 (left-right), 1 (posterior-anterior), 2 (inferior-superior)
    column, row = sorted((first, second), key=lambda source: patient[source])
    flips = tuple(
        bool(affine[patient[source], source] > 0) for source in (column, row)
    )  # they grow towards R, A or S: flip
    return FrameCut((column, row, axis), (flips[0], flips[1]))


def cut_geometry(
    cut: FrameCut,
    affine: np.ndarray | None,
    shape: tuple[int, ...],
    keep_every: int = 1,
    box: tuple[slice, slice, slice] | None = None,
    depths: Sequence[float] | np.ndarray | None = None,
    **others: Any,
) -> Geometry:
    """The Geometry of every `keep_every`-th frame of a volume of `shape` with `affine`, cut by `cut`.

    box: the columns, rows and slices of it to take, with start and stop (default: all). depths: where the slices lie,
    as increasing indices along their axis of the affine (default: 0, 1, ...). others: window, bits, source, volume.
    """
    whole = tuple(shape[axis] for axis in cut.axes)
    columns, rows, kept = box or tuple(slice(0, count) for count in whole)
    slices = tuple(range(kept.start, kept.stop, keep_every))
    heldout = tuple(index for index in range(slices[0], slices[-1]) if index not in slices)
    depth = np.arange(whole[2], dtype=np.float64) if depths is None else np.array(depths, np.float64)
    matrix = None
    if affine is not None:
        step = np.eye(4)
        step[:3, 3] = columns.start, rows.start, depth[slices[0]]
        step[2, 2] = (depth[slices[-1]] - depth[slices[0]]) / max(len(slices) - 1, 1) or 1.0
        matrix = affine @ cut.matrix(shape) @ step
        depth *= voxel_sizes(affine)[cut.axes[2]]
    return Geometry(
        axes=cut.axes,
        flips=cut.flips,
        size=(columns.stop - columns.start, rows.stop - rows.start),
        affine=None if matrix is None else _tuples(matrix.tolist()),
        slices=slices,
        slice_count=whole[2],
        positions=tuple(depth[list(slices)].tolist()),
        offset=(columns.start, rows.start),
        heldout_slices=heldout,
        heldout_positions=tuple(depth[list(heldout)].tolist()),
        **others,
    )


def relative_thickness(asked: str, geometry: Geometry | None) -> float:
    """The thickness of a slice over the mean distance between frames, from what --slice_thickness says.

    asked: "header", or millimetres; distances between frames where these are not known in mm; "" for none. Raises
    UserError for anything else, and where the header does not say.
    """
    if not asked:
        return 0.0
    distance = geometry.spacing[2] if geometry is not None and geometry.spacing is not None else None
    if asked == "header":
        if geometry is None or geometry.thickness is None or distance is None:
            raise UserError(
                "--slice_thickness header: the source does not say (DICOM does, NIfTI cannot): give it in mm"
            )
        return geometry.thickness / distance
    try:
        number = float(asked)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise UserError(f"--slice_thickness {asked}: give millimetres, or header")
    if distance is not None and number > 20 * distance:
        raise UserError(
            f"--slice_thickness {asked}: frames are {distance:.3g} mm apart, so no slice can be that thick"
        )
    return number / distance if distance is not None else number


def is_even(positions: Sequence[float] | np.ndarray) -> bool:
    """Whether every position lies within a hundredth of a gap of where even spacing would put it."""
    places = np.array(positions, np.float64)
    even = np.linspace(places[0], places[-1], len(places))
    return bool(np.abs(places - even).max() <= _EVEN * abs(places[-1] - places[0]) / max(len(places) - 1, 1))


def voxel_sizes(affine: np.ndarray) -> tuple[float, float, float]:
    """Millimetres along each index axis."""
    x, y, z = np.linalg.norm(affine[:3, :3], axis=0).tolist()
    return x, y, z


def check_affine(affine: np.ndarray) -> None:
    """Raise ValueError unless the affine is (4, 4), finite and gives voxels a volume."""
    if affine.shape != (4, 4) or not np.isfinite(affine).all():
        raise ValueError("its affine is not a 4 x 4 matrix of numbers")
    sizes = np.prod(voxel_sizes(affine))
    if sizes == 0 or abs(np.linalg.det(affine[:3, :3])) < 1e-6 * sizes:
        raise ValueError("its affine is singular: voxels would have no volume")


def patient_axes(affine: np.ndarray) -> tuple[int, int, int]:
    """For each source axis the patient axis (0, 1, 2 = x, y, z of RAS) it runs along, each used once."""
    directions = np.abs(affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0))  # [patient, source] cosines
    orders = ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))
    return max(orders, key=lambda order: sum(directions[order[source], source] for source in range(3)))


def _tuples(value: Any) -> Any:
    """JSON lists as the tuples that they were."""
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
