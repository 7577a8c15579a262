"""Which frames make one volume, in what order, and where it lies."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from patient.geometry import is_even
from patient.readers.common import NO_ORIENTATION, from_lps, listed, missing_words
from patient.readers.dicom.frames import Frame
from patient.volumes import Choice, Sizes
from utils.errors import UserError

_SAME = 1e-3  # direction cosines of parallel slices agree to this; headers write 6 digits
_TILT = 0.1  # degrees off the slices' normal, below which rounding explains it
_OPTIONS = {"acquisition": "--acquisition", "echo": "--echo", "time": "--time"}
_TELL_APART = (  # beyond the options, in the order in which volumes at one place are sorted
    "echo time",
    "stack",
    "segment",
    "image type",
    "b-value",
    "energy window",
    "detector",
    "phase",
    "rotation",
    "trigger time",
    "time offset",
    "acquisition time",
    "content time",
)


def one_volume(
    path: Path, frames: list[Frame], choice: Choice, notes: list[str]
) -> tuple[list[Frame], int | None]:
    """The frames of the volume that `choice` names, and its index if the series is 4-D.

    Raises UserError that lists the acquisitions, echoes, times or volumes if several are left.
    """
    frames = _number_echoes(frames)
    for key, option in _OPTIONS.items():
        groups = _groups(frames, key)
        wanted = getattr(choice, key)
        if wanted is not None:
            if float(wanted) not in groups:
                there = f"it has {_counts(groups)}" if groups else "it does not number them"
                raise UserError(f"{path} has no {key} {wanted}: {there}")
            frames = groups[float(wanted)]
        elif len(groups) > 1 and _are_volumes(groups):
            if choice.frame is not None and key == "time":
                return _nth(path, groups, choice.frame)
            also = " (or --frame 0, 1, ...)" if key == "time" else ""
            raise UserError(
                f"{path} holds {len(groups)} {_plural(key)}: {_counts(groups)}: choose one with {option} N{also}"
            )
        elif len(groups) > 1:
            words = f"{len(groups)} {_plural(key)} ({_counts(groups)})"
            if len(groups) <= len(frames) // 2:
                notes.append(f"{words} follow each other evenly: they are read as one volume")
    return _told_apart(path, frames, choice)


def _plural(key: str) -> str:
    return "echoes" if key == "echo" else f"{key}s"


def _number_echoes(frames: list[Frame]) -> list[Frame]:
    """Number echoes without numbers from 1 by echo time, if that distinguishes images of one place."""
    times = sorted({frame.keys["echo time"] for frame in frames if "echo time" in frame.keys}, key=float)
    numbers = {frame.keys.get("echo") for frame in frames}
    if len(times) < 2 or len(numbers) > 1:
        return frames
    for frame in frames:
        if "echo time" in frame.keys:
            frame.keys["echo"] = float(times.index(frame.keys["echo time"]) + 1)
    return frames


def _groups(frames: Sequence[Frame], key: str) -> dict[float, list[Frame]]:
    """Frames by the value of a key, in increasing order; empty unless all have it."""
    groups: dict[float, list[Frame]] = defaultdict(list)
    for frame in frames:
        value = frame.keys.get(key)
        if not isinstance(value, float):
            return {}
        groups[value].append(frame)
    return {value: groups[value] for value in sorted(groups)}


def _counts(groups: dict[float, list[Frame]]) -> str:
    return listed((f"{value:g} ({len(of)} slices)" for value, of in groups.items()), 12)


def _are_volumes(groups: dict[float, list[Frame]]) -> bool:
    """Whether each group of frames is a volume, not a part of one: parts lie end to end, evenly spaced."""
    if all(len(of) == 1 for of in groups.values()):
        places = _heights([of[0] for of in groups.values()])
        return places is not None and len(np.unique(np.round(places, 3))) < len(places)
    spans = []
    for of in groups.values():
        heights = _heights(of)
        if heights is None:
            return True  # nothing says that they belong together
        spans.append((heights.min(), heights.max()))
    spans.sort()
    apart = all(second[0] > first[1] for first, second in itertools.pairwise(spans))
    if not apart:
        return True
    together = _heights([frame for of in groups.values() for frame in of])
    return together is None or not is_even(np.sort(together))


def _heights(frames: Sequence[Frame]) -> np.ndarray | None:
    """Places along the first frame's normal, or slice locations, of frames that all have them; else None."""
    if all(frame.placed for frame in frames):
        steps = frames[0].orientation
        assert steps is not None
        return np.array([frame.position @ np.cross(steps[:, 0], steps[:, 1]) for frame in frames])
    if all(frame.location is not None for frame in frames):
        return np.array([frame.location for frame in frames], float)
    return None


def _nth(path: Path, groups: dict[float, list[Frame]], index: int) -> tuple[list[Frame], int]:
    if not 0 <= index < len(groups):
        raise UserError(f"{path} holds {len(groups)} volumes: there is no --frame {index}")
    return list(groups.values())[index], index


def _told_apart(path: Path, frames: list[Frame], choice: Choice) -> tuple[list[Frame], int | None]:
    """Of several frames at each place, those of one volume; volumes are sorted by what distinguishes them."""
    if not all(frame.placed for frame in frames):
        return frames, None
    places: dict[tuple[float, ...], list[Frame]] = defaultdict(list)
    for frame in frames:
        where = np.concatenate((np.ravel(frame.position), np.ravel(frame.orientation)))  # type: ignore[arg-type]
        places[tuple((np.round(where, 2) + 0.0).tolist())].append(frame)
    counts = {len(of) for of in places.values()}
    if counts == {1}:
        return frames, None
    if len(counts) > 1:
        most, least = max(counts), min(counts)
        raise UserError(
            f"{path} has {least} to {most} images per place: its volumes are incomplete, or several are mixed; put"
            " the files of one into a folder"
        )
    count = counts.pop()
    told = [
        key
        for key in _TELL_APART
        if all(len({frame.keys.get(key) for frame in of}) > 1 for of in places.values())
    ]
    numbered = all(len({frame.number for frame in of}) == count for of in places.values())

    def order(frame: Frame) -> tuple[tuple[str, float | str], ...]:
        values = [frame.keys.get(key, "") for key in told]
        return (*((str(type(value)), value) for value in values), ("", frame.number or 0.0))

    if not told and not numbered:
        some = next(iter(places.values()))
        raise UserError(
            f"{path}: {len(frames) - len(places)} slices lie where another one does ({some[0].name} and"
            f" {some[1].name}), and nothing in them tells volumes apart: put the files of one into a folder"
        )
    volumes: list[list[Frame]] = [[] for _ in range(count)]
    for of in places.values():
        for volume, frame in zip(volumes, sorted(of, key=order), strict=True):
            volume.append(frame)
    if choice.frame is None:
        by = f"by {' and '.join(told[:2])}" if told else "by instance number"
        raise UserError(
            f"{path} holds {count} volumes of {len(places)} slices, told apart {by}: choose one with --frame 0 ..."
            f" {count - 1}"
        )
    return _nth(path, dict(enumerate(volumes)), choice.frame)


def in_order(path: Path, frames: list[Frame], notes: list[str]) -> list[Frame]:
    """Frames without places, ordered by slice location, else by distinct instance numbers. Raises UserError."""
    lacking = [frame for frame in frames if not frame.placed]
    if lacking and len(lacking) < len(frames):
        what = "position" if lacking[0].position is None else "orientation"
        raise UserError(
            f"{path}: no {what} in the patient for {listed(frame.name for frame in lacking)}, but for the other"
            f" {len(frames) - len(lacking)}: remove those without"
        )
    locations = [frame.location for frame in frames]
    if None not in locations and len(set(locations)) == len(frames):
        notes.append("no positions in the patient: slices are ordered by their slice locations")
        return sorted(frames, key=lambda frame: frame.location)  # type: ignore[arg-type, return-value]
    numbers: dict[float | None, Frame] = {}
    for frame in frames:
        twin = numbers.setdefault(frame.number, frame)
        if twin is not frame:
            what = "no instance number" if frame.number is None else f"instance number {frame.number:g}"
            raise UserError(
                f"{path}: nothing says in which order its slices lie: no positions, no distinct slice locations, and"
                f" {twin.name} and {frame.name} have {what}"
            )
    notes.append("no positions in the patient: slices are taken by their numbers, evenly spaced")
    return sorted(frames, key=lambda frame: frame.number)  # type: ignore[arg-type, return-value]


def place_by_location(
    frames: list[Frame], path: Path, notes: list[str]
) -> tuple[np.ndarray | None, np.ndarray | None, Sizes | None]:
    """Affine, depths and voxel sizes of ordered frames without positions."""
    spacing = frames[0].spacing
    if any(frame.spacing != spacing for frame in frames):
        spacing = None
    locations = [frame.location for frame in frames]
    if len(frames) < 2 or None in locations or len(set(locations)) < len(frames):
        return None, None, (*spacing, None) if spacing else None
    heights = np.array(locations, float)
    depths, step = _depths(heights, [frame.name for frame in frames], notes)
    if spacing is None:
        return None, depths, (None, None, step)
    notes.append(NO_ORIENTATION)
    return from_lps(np.diag([*spacing, step]), (0.0, 0.0, 0.0), path), depths, None


def place(
    path: Path, frames: list[Frame], notes: list[str]
) -> tuple[list[Frame], np.ndarray | None, np.ndarray | None, Sizes | None]:
    """Frames in order along their normal, the affine, depths if they are uneven, and sizes without an affine.

    Anything unusual is noted.
    """
    steps = np.array(frames[0].orientation)
    scaled = steps if frames[0].spacing is None else steps * frames[0].spacing
    for other in frames:
        theirs = np.array(other.orientation)
        theirs = theirs if other.spacing is None else theirs * other.spacing
        if np.abs(theirs - scaled).max() > _SAME * np.linalg.norm(scaled, axis=0).max():
            raise UserError(
                f"{path}: {other.name} and {frames[0].name} differ in orientation or pixel size: a volume has parallel"
                " slices (is a localizer among them?)"
            )
    normal = np.cross(steps[:, 0], steps[:, 1])
    normal /= np.linalg.norm(normal)
    frames = sorted(frames, key=lambda frame: float(frame.position @ normal))
    positions = np.array([frame.position for frame in frames])
    heights = positions @ normal
    gaps = np.diff(heights)
    spacing = frames[0].spacing
    if not gaps.size:
        if spacing is None:
            return frames, None, None, None
        return frames, from_lps(np.column_stack((scaled, normal)), positions[0], path), None, None
    twins = np.flatnonzero(gaps <= 0.01 * np.median(gaps))
    if twins.size:
        a, b = frames[twins[0]].name, frames[twins[0] + 1].name
        raise UserError(
            f"{path}: {twins.size} slices lie where another one does ({a} and {b}): the series has several time points,"
            " echoes or copies; put those of one into a folder"
        )
    line = (positions[-1] - positions[0]) / (heights[-1] - heights[0])  # per mm along the normal
    astray = np.linalg.norm(positions - positions[0] - np.outer(heights - heights[0], line), axis=1)
    if astray.max() > 0.1 * np.linalg.norm(scaled, axis=0).min():
        raise UserError(
            f"{path}: {frames[int(astray.argmax())].name} lies {astray.max():.3g} mm off the line of the others:"
            " slices of a volume are stacked along one direction"
        )
    tilt = float(np.degrees(np.arccos(min(1.0, 1 / np.linalg.norm(line)))))
    if tilt > _TILT:
        notes.append(
            f"gantry tilt of {tilt:.1f} degrees: slices are shifted against each other, and the affine is sheared"
            " accordingly; nothing is resampled"
        )
    if len({frame.header.path for frame in frames}) == len(frames):
        numbers = sorted(frame.number for frame in frames if frame.number is not None)
        missing = (
            sorted(set(range(int(numbers[0]), int(numbers[-1]) + 1)) - set(numbers)) if _few(numbers) else []
        )
        # Some archives number evenly spaced slices by twos, say.
        if missing and len(np.unique(np.diff(numbers))) > 1 and not is_even(heights):
            notes.append(missing_words(map(str, missing), "instance number"))
    depths, step = _depths(heights, [frame.name for frame in frames], notes)
    if spacing is None:
        return frames, None, depths, (None, None, float(step * np.linalg.norm(line)))
    affine = from_lps(np.column_stack((scaled, line * step)), positions[0], path)
    return frames, affine, depths, None


def _few(numbers: Sequence[float]) -> bool:
    return bool(numbers) and numbers[-1] - numbers[0] < 100_000


def _depths(heights: np.ndarray, names: list[str], notes: list[str]) -> tuple[np.ndarray | None, float]:
    """Depths in steps of the increasing heights, None if they are even, and the step; gaps are noted."""
    gaps = np.diff(heights)
    even = is_even(heights)
    step = float(gaps.mean() if even else np.median(gaps))
    if even:
        return None, step
    absent = np.rint(gaps / step).astype(int) - 1
    places = [f"{absent[k]} after {names[k]}" for k in np.flatnonzero(absent)]
    if places and np.abs(gaps / step - absent - 1).max() < 0.05:
        count = int(absent.sum())
        what = f"{count} slice{'s are' if count > 1 else ' is'} missing ({listed(places)})"
    else:
        what = f"slices are unevenly spaced, {gaps.min():.4g} to {gaps.max():.4g} mm apart"
    notes.append(f"{what}: the others keep their true places and times")
    return (heights - heights[0]) / step, step
