"""A volume's labels on its grid: from one label map, one mask, or one mask per structure."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from nibabel.affines import apply_affine

from patient.geometry import voxel_sizes
from patient.labels import MAX_ID, Label, LabelTable, Meaning, meaning_of, plain_numbers, read_segmentation
from patient.readers import image_folder, read_volume
from patient.readers.segments import layers_as_segments, read_segments
from patient.segments import Segments
from patient.volumes import Volume
from utils.errors import UserError
from utils.images import frame_number, image_files

_LAYERED = (".nrrd", ".nhdr", ".mha", ".mhd")  # several numbers per voxel are layers there, not colours


@dataclass(frozen=True)
class Wanted:
    """What the user wants from a label."""

    values: Sequence[float] | None = None
    """Values to merge into one mask."""
    labels: Sequence[str] | None = None
    """Ids or names to keep apart; ("all",) for every one."""
    names: LabelTable | None = None
    soft: bool = False
    layer: int | None = None
    """Which volume of a 4-D label."""
    slices: str = "auto"
    """Which slices are painted: "auto", "all", or a list such as "0,5,10" or "0:50:5"."""


@dataclass(frozen=True)
class LabelVolume:
    """Labels on the grid of their image."""

    numbers: np.ndarray
    """(I, J, K) uint16, 0 outside; for one mask, 1 inside."""
    table: LabelTable | None
    """Names and colours; None for one mask."""
    painted: np.ndarray
    """(K,) bool, which slices along `axis` of `numbers` were annotated; the others are unknown, not empty."""
    axis: int = 2

    @property
    def inside(self) -> np.ndarray:
        return self.numbers != 0


def read_labels(
    paths: Sequence[str], volume: Volume, image: str, wanted: Wanted, axis: int, say: Callable[[str], None]
) -> LabelVolume:
    """The labels of files, or a folder of images, on the grid of `volume`. image: the path that it was read from.

    axis: along which frames are cut. Of several files, the first that claims a voxel gets it. Raises UserError.
    """
    if wanted.soft and wanted.labels:
        raise UserError("--labels and --soft exclude each other: a number is a label or a probability")
    if len(paths) == 1:
        numbers, table, seen = _one(paths[0], volume, image, wanted, say)
    else:
        numbers, table = _several(paths, volume, image, wanted, say)
        seen = None
    count = int(np.count_nonzero(numbers))
    what = " and ".join(paths) if len(paths) < 3 else f"{len(paths)} labels"
    say(f"{what}: {count:,} voxels inside, {count / numbers.size:.2%} of the volume")
    if table is not None:
        found = np.bincount(numbers.ravel(), minlength=2)
        say(f"  labels: {table.words()}")
        for label in table:
            present = np.flatnonzero((numbers == label.id).any(tuple({0, 1, 2} - {axis})))
            if found[label.id : label.id + 1].sum() and len(present) == 1:
                say(f"  note: label {label.id} ({label.name}) is in slice {present[0]} only")
    painted = _painted(numbers, wanted.slices, seen, axis, say)
    return LabelVolume(numbers, table, painted, axis)


def _several(
    paths: Sequence[str], volume: Volume, image: str, wanted: Wanted, say: Callable[[str], None]
) -> tuple[np.ndarray, LabelTable]:
    """One mask per structure, as one label map."""
    numbers = np.zeros(volume.values.shape[:3], np.uint16)
    taken: dict[int, Label] = {}
    overlap = 0
    for order, path in enumerate(paths, 1):
        name = _stem(Path(path))
        number = (wanted.names.find(name) if wanted.names else None) or order
        if number in taken:
            raise UserError(f"{path} and another file are both label {number}: give each a name of its own")
        taken[number] = replace(wanted.names[number] if wanted.names else Label.of(number), name=name)
        own = replace(wanted, labels=None, names=None)
        mask, _, _ = _one(path, volume, image, own, say)
        inside = mask != 0
        overlap += int(np.count_nonzero(inside & (numbers != 0)))
        numbers[inside & (numbers == 0)] = number
    table = LabelTable(tuple(taken[number] for number in sorted(taken)))
    if overlap:
        say(f"  note: {overlap:,} voxels are in several files: the one named first gets them")
    if wanted.labels and tuple(wanted.labels) != ("all",):
        ids = _ids(wanted.labels, table, table.ids, "the files")
        numbers[~np.isin(numbers, ids)] = 0
        table = table.of(ids)
    return numbers, table


def _one(
    path: str, volume: Volume, image: str, wanted: Wanted, say: Callable[[str], None]
) -> tuple[np.ndarray, LabelTable | None, np.ndarray | None]:
    """Numbers on the volume's grid (I, J, K), the labels kept apart, and which slices have a file."""
    segments = _segments(path, volume, wanted)
    if segments is not None:
        numbers, table = _of_segments(segments, volume, wanted, say)
        return numbers, table, None
    label, meaning, seen = _read(path, volume, image, wanted)
    for note in (*label.notes, *meaning.notes):
        say(f"  note: {note}" if path in note else f"  note on {path}: {note}")
    values, table = label.values, None
    names = wanted.names or LabelTable()
    if wanted.values:
        chosen = np.isin(np.rint(values) if meaning.kind != "soft" else values, wanted.values)
        absent = [f"{value:g}" for value in wanted.values if value not in meaning.ids]
        if absent and chosen.any():
            say(f"  note: no voxel of {path} has the value {' or '.join(absent)}")
        numbers = chosen.astype(np.uint16)
    elif wanted.labels:
        found = meaning.numbers(values)
        outside = [i for i in meaning.ids if not 0 < i <= MAX_ID]
        every = tuple(i for i in meaning.ids if 0 < i <= MAX_ID)
        ids = every if tuple(wanted.labels) == ("all",) else _ids(wanted.labels, names, meaning.ids, path)
        if outside and (tuple(wanted.labels) == ("all",) or set(ids) & set(outside)):
            raise UserError(f"{path} has label {outside[0]}: frames hold labels from 1 to {MAX_ID}")
        numbers = np.where(np.isin(found, ids), found, 0).astype(np.uint16)
        table = names.of(ids)
    else:
        numbers = meaning.inside(values).astype(np.uint16)
        if meaning.kind == "labels" and len(meaning.ids) > 1:
            merged = (
                names.of(meaning.ids).words() if min(meaning.ids) > 0 else ", ".join(map(str, meaning.ids))
            )
            say(f"  note: labels {merged} count as one mask (--labels all keeps them apart)")
    count = int(np.count_nonzero(numbers))
    if not count:
        present = ", ".join(f"{value:g}" for value in np.unique(values)[:12])
        what = f"of value {' or '.join(f'{v:g}' for v in wanted.values)}" if wanted.values else "labelled"
        raise UserError(f"{path} is empty: nothing is {what} (it holds {present})")
    return _on_grid(path, label, numbers, volume, say), table, seen


def _segments(path: str, volume: Volume, wanted: Wanted) -> Segments | None:
    """The segments of a file that names them: DICOM's, 3D Slicer's, or layers that are asked for."""
    if wanted.layer is not None:
        return None
    segments = read_segments(path, volume)
    if segments is None and (wanted.labels or wanted.values):
        segments = layers_as_segments(path)
    return segments


def _of_segments(
    segments: Segments, volume: Volume, wanted: Wanted, say: Callable[[str], None]
) -> tuple[np.ndarray, LabelTable | None]:
    """Numbers of the wanted segments on the volume's grid, and their names if they are kept apart."""
    path = segments.path
    for note in segments.notes:
        say(f"  note on {path}: {note}")
    chosen = segments.find(wanted.labels or wanted.values)
    numbers, overlap = segments.label_map(chosen)
    if not numbers.any():
        raise UserError(f"{path} is empty: none of its segments ({segments.words()}) has a voxel")
    table = None
    if wanted.labels:
        labels = sorted((Label.of(s.number, s.name, s.colour) for s in chosen), key=lambda label: label.id)
        table = LabelTable(tuple(labels))
        if overlap:
            say(f"  note: {overlap:,} voxels are in several segments: the one named first gets them")
    else:
        numbers = (numbers != 0).astype(np.uint16)
        if len(chosen) > 1:
            named = ", ".join(f"{s.number} {s.name}" for s in chosen)
            say(f"  note: segments {named} count as one mask (--labels all keeps them apart)")
    label = Volume(numbers, segments.affine, 8, Path(path).name, depths=segments.depths)
    return _on_grid(path, label, numbers, volume, say), table


def _read(path: str, volume: Volume, image: str, wanted: Wanted) -> tuple[Volume, Meaning, np.ndarray | None]:
    """A label as one number per voxel, what they mean, and for a folder with fewer files than frames, which it has."""
    place = Path(path)
    if place.is_dir() and (files := image_files(place)):
        notes: list[str] = []
        found = _folder(place, image_folder.in_order(place, files, notes), volume, Path(image), wanted)
        return replace(found[0], notes=notes), *found[1:]
    label = read_volume(path, wanted.layer if wanted.layer is not None else _only_layer(path, wanted))
    values, notes = label.values, list(label.notes)
    if values.ndim == 4 and place.name.lower().endswith(_LAYERED):
        if wanted.layer is None or not 0 <= wanted.layer < values.shape[3]:
            raise UserError(_layers(path, values.shape[3]))
        values = values[..., wanted.layer]
    if values.ndim == 4:
        planes, more = plain_numbers(list(np.moveaxis(values, 2, 0)), path)
        values, notes = np.stack(planes, axis=2), [*notes, *more]
    if bad := values.size - np.count_nonzero(np.isfinite(values)):
        notes.append(f"{bad:,} voxels of {path} are NaN or infinite; they count as background")
        values = np.nan_to_num(values, posinf=0, neginf=0)
    named = wanted.labels is not None or wanted.values is not None
    meaning = meaning_of(
        np.moveaxis(values, 2, 0),
        path,
        soft=wanted.soft,
        labels=named and not wanted.soft,
        lossy=label.lossy,
        picture=label.full_scale is not None,
        known=wanted.names.ids if wanted.names else (),
        ask="say which: --labels all, --label_value V or --soft",
    )
    return replace(label, values=values, notes=notes), meaning, None


def _stem(path: Path) -> str:
    return path.name if path.is_dir() else re.sub(r"(\.seg)?\.[A-Za-z]\w*(\.gz)?$", "", path.name)


def _only_layer(path: str, wanted: Wanted) -> int | None:
    """None for a 3-D label. For a 4-D one, raises UserError that says how to choose."""
    first = read_volume(path, 0)
    if first.index is None:
        return None
    count = 1
    while True:
        try:
            read_volume(path, count)
        except UserError:
            raise UserError(_layers(path, count)) from None
        count += 1


def _layers(path: str, count: int) -> str:
    return f"{path} holds {count} layers: choose one with --label_frame 0 ... {count - 1}"


def _folder(
    place: Path, files: list[Path], volume: Volume, image: Path, wanted: Wanted
) -> tuple[Volume, Meaning, np.ndarray | None]:
    """A folder of mask images, matched by number with a folder of images if it has fewer. image: of the volume."""
    named = wanted.labels is not None or wanted.values is not None
    known = wanted.names.ids if wanted.names else ()
    found = read_segmentation(
        files,
        soft=wanted.soft,
        labels=named and not wanted.soft,
        known=known,
        ask="say which: --labels all, --label_value V or --soft",
    )
    for file, frame in zip(files, found.frames, strict=True):
        if frame.shape != found.frames[0].shape:
            rows, columns = found.frames[0].shape
            raise UserError(
                f"{file} is {frame.shape[1]} x {frame.shape[0]} pixels, {files[0].name} {columns} x {rows}: masks have"
                " one size"
            )
    values = np.stack(found.frames).transpose(2, 1, 0)
    count = volume.values.shape[2]
    numbers = [frame_number(file) for file in files]
    frames = [frame_number(file) for file in image_files(image)] if image.is_dir() else []
    seen = None
    if len(frames) == count and numbers != frames:
        if len(files) == count and np.array_equal(np.diff(numbers), np.diff(frames)):
            pass  # numbered from a different start
        elif set(numbers) <= set(frames):
            seen = np.isin(frames, numbers)
            every = np.zeros((*values.shape[:2], count), values.dtype)
            every[:, :, seen] = values
            values = every
        else:
            absent = sorted(set(numbers) - set(frames))
            raise UserError(
                f"{place} and {volume.name} are numbered differently: a mask has the number of its frame (there is no"
                f" frame {absent[0]})"
            )
    bits = 8 if values.dtype.itemsize == 1 else 16
    depths = volume.depths if image.is_dir() else image_folder.numbered_depths(files, [])
    label = Volume(values, None, bits, place.name, depths=depths)
    return label, found.meaning, seen


def _ids(words: Sequence[str], names: LabelTable, present: Iterable[int], where: str) -> tuple[int, ...]:
    """The ids of numbers and names, all of which occur."""
    present, ids = set(present), []
    for word in words:
        number = names.find(word)
        if number is None:
            raise UserError(
                f"--labels {word}: no label has that name"
                + (f": there are {names.words()}" if len(names) else " (--label_names FILE gives names)")
            )
        if number not in present:
            there = ", ".join(map(str, sorted(present)[:12])) + (" ..." if len(present) > 12 else "")
            raise UserError(f"{where} has no label {word}: it holds {there}")
        ids.append(number)
    return tuple(sorted(set(ids)))


def _painted(
    numbers: np.ndarray, slices: str, seen: np.ndarray | None, axis: int, say: Callable[[str], None]
) -> np.ndarray:
    """Which slices along `axis` were annotated."""
    count = numbers.shape[axis]
    filled = numbers.any(tuple({0, 1, 2} - {axis}))
    if slices == "all":
        painted = np.ones(count, bool)
    elif slices == "auto":
        there = np.flatnonzero(filled)
        # A structure in a slice is also in one of its neighbours, unless those were not annotated.
        apart = len(there) > 1 and np.diff(there).min() > 1
        painted = filled.copy() if apart and seen is None else np.ones(count, bool) if seen is None else seen
        if apart and seen is None:
            say(
                f"  note: no two neighbouring slices are labelled: the {len(there)} that are count as painted, the"
                " others as unknown (--label_slices all: as empty)"
            )
    else:
        painted = np.zeros(count, bool)
        for part in slices.split(","):
            span = re.fullmatch(r"\s*(\d+)\s*(?::\s*(\d*)\s*(?::\s*(\d+)\s*)?)?", part)
            if span is None or span[3] == "0":
                raise UserError(
                    f"--label_slices {slices}: give auto, all, or slices such as 0,5,10 or 0:50:5 (without 50)"
                )
            first = int(span[1])
            if first >= count:
                raise UserError(f"--label_slices {slices}: there are slices 0 to {count - 1}")
            if ":" in part:
                painted[first : int(span[2]) if span[2] else count : int(span[3] or 1)] = True
            else:
                painted[first] = True
        lost = int(np.count_nonzero(filled & ~painted))
        if lost:
            say(f"  note: {lost} labelled slices are not in --label_slices, and are left out")
    if not painted.all():
        say(f"  masks on {int(painted.sum())} of {count} slices")
    if not (filled & painted).any():
        raise UserError(f"--label_slices {slices}: nothing is labelled in these slices")
    return painted


def _on_grid(
    path: str, label: Volume, numbers: np.ndarray, volume: Volume, say: Callable[[str], None]
) -> np.ndarray:
    """The numbers on the volume's grid, by nearest neighbour if they lie on another."""
    shape = volume.values.shape[:3]
    if volume.affine is None or label.affine is None:
        if numbers.shape != shape:
            raise UserError(f"{path} has shape {numbers.shape}, but {volume.name} {shape}: they must agree")
        if not np.array_equal(_depths(volume), _depths(label)):
            raise UserError(
                f"{path} and {volume.name} are numbered differently: a mask has the number of its frame"
            )
        if (volume.affine is None) != (label.affine is None):
            say(
                f"  note: only one of them gives millimetres; [:, :, k] of {path} is taken as the mask of frame k"
            )
        return numbers
    if same_grid(volume, label):
        return numbers
    for first, second, whose in (
        (replace(volume, affine=volume.other_affine), label, f"{volume.name}'s"),
        (volume, replace(label, affine=label.other_affine), "its own"),
    ):
        if same_grid(first, second):
            say(f"  note: {path} lies where {whose} other form, which is not used, puts it: the grids agree")
            return numbers
    to_label = np.linalg.inv(label.affine) @ volume.affine
    resampled = _resample(numbers, _depths(label), to_label, shape, _depths(volume))
    if not resampled.any():
        raise UserError(
            f"{path} of shape {numbers.shape} does not overlap {volume.name} of shape {shape}: their affines place"
            " them apart"
        )
    kept = np.count_nonzero(resampled) * abs(np.linalg.det(to_label)) / np.count_nonzero(numbers)
    say(f"  note: {path} lies on another grid; nearest-neighbour resampling keeps {kept:.1%} of its volume")
    return resampled


def same_grid(first: Volume, second: Volume) -> bool:
    """Whether two grids agree to a hundredth of a voxel in every corner, and so do their slices."""
    shape = first.values.shape[:3]
    if first.affine is None or second.affine is None or shape != second.values.shape[:3]:
        return False
    indices = np.array(list(np.ndindex(2, 2, 2))) * (np.array(shape) - 1)
    apart = np.abs(apply_affine(first.affine, indices) - apply_affine(second.affine, indices)).max()
    depths = np.abs(_depths(first) - _depths(second)).max()
    return bool(apart < 0.01 * min(voxel_sizes(first.affine)) and depths < 0.01)


def _depths(volume: Volume) -> np.ndarray:  # (K,)
    return np.arange(volume.values.shape[2], dtype=float) if volume.depths is None else volume.depths


def _resample(
    numbers: np.ndarray, depths: np.ndarray, to_label: np.ndarray, shape: tuple[int, ...], targets: np.ndarray
) -> np.ndarray:
    """Labels on a volume's grid of `shape`: each voxel takes that of the label voxel it lies in, if any.

    numbers: (I, J, K), with slices at `depths`. to_label: indices of the volume to the label's. targets: where the
    volume's slices lie.
    """
    resampled = np.zeros(shape, numbers.dtype)
    plane = np.stack(np.meshgrid(np.arange(shape[0]), np.arange(shape[1]), indexing="ij"), -1)  # (I, J, 2)
    for k, depth in enumerate(targets):
        at = plane @ to_label[:3, :2].T + (to_label[:3, 2] * depth + to_label[:3, 3])  # (I, J, 3)
        before, after = np.minimum(at[..., 2], 0), np.maximum(at[..., 2] - depths[-1], 0)
        at[..., 2] = np.interp(at[..., 2], depths, np.arange(len(depths))) + before + after  # to slices
        nearest = np.floor(at + (0.5 + 1e-6)).astype(int)  # so that rounding errors do not cut off a border
        there = ((nearest >= 0) & (nearest < numbers.shape)).all(axis=-1)
        resampled[:, :, k][there] = numbers[tuple(nearest[there].T)]
    return resampled
