"""Frames that training does not see, and where they lie among those it does: the test of in-between frames."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from torch import Tensor

from arguments import TrainOptions
from in_between.classical import interpolate, interpolate_masks
from in_between.exclusive import interpolate_labels
from patient.geometry import HELDOUT, Geometry
from scene.frames import Frames
from utils.errors import UserError


@dataclass(frozen=True, eq=False)
class HeldOut:
    """M frames left out of a sequence of K.

    frames: M of them. slices: (M,) their numbers in the source. positions: (M,), and kept_positions: (K,) where the
    held-out frames and the others lie along the sequence, increasing. spacing: of rows and columns, in the unit of
    the positions. kept: the K frames. given: which of them classical methods may know, if not all: the others were
    filled in.
    """

    frames: Frames
    slices: list[int]
    positions: np.ndarray
    kept_positions: np.ndarray
    spacing: tuple[float, float]
    kept: Frames
    given: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.frames)

    @cached_property
    def indices(self) -> list[float]:
        """(M,) where they lie in the sequence of the kept frames: 0.5 is half-way from frame 0 to frame 1."""
        return np.interp(self.positions, self.kept_positions, np.arange(len(self.kept_positions))).tolist()

    def classical(self, method: str, background: Tensor, only: Sequence[int] | None = None) -> np.ndarray:
        """The held-out frames (or ``only`` some of them) interpolated from the kept ones, (M, C, H, W) in [0, 1]:
        method "linear" or "cubic", or "sdf" and "cubic sdf" for masks, through signed distances (0 and 1). Label maps
        are (M, 1, H, W), indices of the labels.

        Like an image file's, values are rounded to the frames' levels, halves to even; on levels, halves are exact.
        """
        at = self.positions if only is None else self.positions[list(only)]
        places, known = self.kept_positions, list(range(len(self.kept)))
        if self.given is not None:
            places, known = places[list(self.given)], list(self.given)
            at = at.clip(places[0], places[-1])  # beyond the first and the last of them, these are repeated
        if self.kept.labels is not None:
            index, count = self.kept.index(known)[:, 0].cpu().numpy(), len(self.kept.labels)
            return interpolate_labels(index, places, at, count, self.spacing, method)[:, None]
        values = self.kept(known, background=background).cpu().numpy()
        if not method.endswith("sdf"):
            top = 2**self.kept.bits - 1 if self.kept.bits <= 16 else None
            levels = values if top is None else np.rint(values * np.float64(top))
            between = interpolate(levels, places, at, method)
            return between.clip(0, 1) if top is None else np.rint(between).clip(0, top) / np.float32(top)
        masks = values.mean(1) >= 0.5
        how = "cubic" if method.startswith("cubic") else "linear"
        filled = interpolate_masks(masks, places, at, self.spacing, how)
        return filled[:, None].astype(np.float32)


def hold_out(
    options: TrainOptions,
    sequences: Sequence[tuple[str, Frames]],
    geometry: Geometry | None,
    read: Callable[[Path, Frames], Frames],
    say: Callable[[str], object],
) -> tuple[list[Frames], Geometry | None, list[HeldOut | None]]:
    """What to train on, its geometry, and for each sequence what to test on.

    sequences: data root and frames of the images, or the masks, or both; they are numbered alike. geometry: of the
    frames. read: a folder's frames, held out of a sequence. A root's folder ``heldout/`` is the test, where there is
    one; else ``--eval`` takes every N-th frame out of the sequence.
    """
    frames = [sequence for _, sequence in sequences]
    tests = [read_test(Path(root), kept, geometry, read, say) for root, kept in sequences]
    if any(tests):
        if options.eval:
            say(f"--eval: {HELDOUT}/ is evaluated, and no frame of the others is held out")
        return frames, geometry, tests
    if not options.eval:
        return frames, geometry, tests

    count = len(frames[0])
    test = list(range(options.eval_every - 1, count - 1, options.eval_every))
    if not test:
        raise UserError(
            f"--eval holds out frame {options.eval_every} of each {options.eval_every}, but not the last one: "
            f"{count} frames are too few; give a smaller --eval_every"
        )
    every = geometry or _plain_geometry(options.source_path, frames[0])
    rest = every.hold_out(test)
    kept_indices = [k for k in range(count) if k not in set(test)]
    kept = [sequence.take(kept_indices) for sequence in frames]
    positions = np.array(every.positions)[test]
    slices = [every.slices[k] for k in test]
    return (
        kept,
        rest,
        [
            _test(sequence.take(test), slices, positions, rest, remaining)
            for sequence, remaining in zip(frames, kept, strict=True)
        ],
    )


def of_masks(masks: Frames, filled: Frames, images: HeldOut, geometry: Geometry) -> HeldOut | None:
    """What to test masks of some frames only on: those of the held-out images that have a mask. filled: masks of the
    frames that training sees; geometry: of these."""
    there = {number: k for k, number in enumerate(masks.numbers)}
    places = [k for k, number in enumerate(images.frames.numbers) if number in there]
    if not places:
        return None
    test = masks.take([there[images.frames.numbers[k]] for k in places])
    slices = [images.slices[k] for k in places]
    return _test(test, slices, images.positions[places], geometry, filled)


def read_test(
    root: Path,
    kept: Frames,
    geometry: Geometry | None,
    read: Callable[[Path, Frames], Frames],
    say: Callable[[str], object],
) -> HeldOut | None:
    """The frames of ``root/heldout``, whose numbers are slices that the geometry says were left out."""
    folder = root / HELDOUT
    if not folder.is_dir():
        return None
    if geometry is None:
        say(f"{folder} is not evaluated: no frames.json says where its frames lie (prepare.py writes one)")
        return None
    frames = read(folder, kept)
    places = dict(zip(geometry.heldout_slices, geometry.heldout_positions, strict=True))
    unknown = [
        name for name, number in zip(frames.names, frames.numbers, strict=True) if number not in places
    ]
    if unknown:
        raise UserError(
            f"{folder / unknown[0]} is not one of the slices that frames.json says were left out: "
            "run prepare.py again, or remove the folder"
        )
    if (frames.width, frames.height) != (kept.width, kept.height):
        raise UserError(
            f"{folder} holds frames of {frames.width} x {frames.height} pixels, {root} others of {kept.width} x "
            f"{kept.height}: run prepare.py again"
        )
    positions = np.array([places[number] for number in frames.numbers])
    return _test(frames, frames.numbers, positions, geometry, kept)


def _test(
    frames: Frames, slices: list[int], positions: np.ndarray, geometry: Geometry, kept: Frames
) -> HeldOut:
    columns, rows, _ = geometry.spacing or (1.0, 1.0, 1.0)
    spacing = rows * geometry.size[1] / kept.height, columns * geometry.size[0] / kept.width
    return HeldOut(frames, slices, positions, np.array(geometry.positions), spacing, kept)


def _plain_geometry(root: str, frames: Frames) -> Geometry:
    """For frames of which only the order is known, as prepare.py does for a folder of images."""
    count = len(frames)
    top = {8: 255.0, 16: 65535.0}.get(frames.bits, 1.0)
    return Geometry(
        axes=(0, 1, 2),
        flips=(False, False),
        size=(frames.width, frames.height),
        affine=None,
        slices=tuple(range(count)),
        slice_count=count,
        positions=tuple(map(float, range(count))),
        window=(0.0, top),
        bits=8 if frames.bits == 8 else 16,
        source=Path(root).absolute().name,
    )
