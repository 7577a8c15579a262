"""What a segmentation's numbers mean: the one rule of "inside", and the labels' names and colours.

Segmentations come as masks of 0 and any other value, as label maps with one number per organ, and as probabilities.
`meaning_of` looks at the whole segmentation and says which it is; prepare, training, meshes and scores all use it.
Ambiguous numbers are never guessed: the user is asked.
"""

from __future__ import annotations

import colorsys
import csv
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from utils.errors import UserError
from utils.images import is_indexed, read_levels

Kind = Literal["mask", "soft", "labels"]

ROUNDING = 0.01
"""How far a stored label may lie from a whole number: a scale factor in a header may turn 3 into 2.9999."""
MAX_ID = 65535
"""The largest label that a 16-bit frame holds."""
_MOST_IDS = 1000  # distinct numbers in a volume; more are intensities
_FEW = 16  # this many low numbers are labels even if no region is large enough to have an inside
_SATURATED = 0.95  # share of pixels inside above which a note is due
_SOLID = 0.1  # share of middle-level pixels amid equal neighbours: regions have insides, soft borders do not
_JPEG_BAND = 0.15  # of full scale around 0 and 1: where JPEG leaves a mask's levels

_MOST_COLOURS = 64  # in a label map; more are a picture

ASK = "say which: --labels for a label map, --soft for a mask that is inside from half of full scale"


# ---- what numbers mean -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Meaning:
    """How to read the stored numbers of one segmentation."""

    kind: Kind
    ids: tuple[int, ...] = ()
    """The nonzero numbers that occur, increasing; empty for a soft mask."""
    scale: float = 1.0
    """The stored value of 1 in a soft mask."""
    notes: tuple[str, ...] = ()
    """What a user should know about it, one line each."""

    def inside(self, stored: np.ndarray) -> np.ndarray:
        """Where it is inside, bool: not 0, or for a soft mask at least half of full scale."""
        if self.kind == "soft":
            return stored >= 0.5 * self.scale
        return whole(stored) != 0

    def shares(self, stored: np.ndarray) -> np.ndarray:
        """How much of each pixel is inside, float32 in [0, 1]; 0 or 1 except for a soft mask."""
        if self.kind == "soft":
            return np.clip(stored.astype(np.float32) / np.float32(self.scale), 0, 1)
        return self.inside(stored).astype(np.float32)

    def numbers(self, stored: np.ndarray) -> np.ndarray:
        """Labels as whole numbers, int32; for a mask, 0 and 1."""
        return (
            self.inside(stored).astype(np.int32) if self.kind != "labels" else whole(stored).astype(np.int32)
        )


def whole(stored: np.ndarray) -> np.ndarray:
    """Stored numbers, rounded to whole ones if a scale factor moved them."""
    return np.rint(stored) if stored.dtype.kind == "f" else stored


def meaning_of(
    frames: Sequence[np.ndarray] | np.ndarray,
    name: str | os.PathLike[str],
    *,
    soft: bool = False,
    labels: bool = False,
    indexed: bool = False,
    lossy: bool = False,
    picture: bool = True,
    known: Iterable[int] = (),
    ask: str = ASK,
) -> Meaning:
    """What the numbers of a whole segmentation mean, (rows, columns) each or (frames, rows, columns), finite.

    Two values, one of them 0: a mask, whatever the other is. Else a label map if `labels` says so or the frames are
    indices of a palette (`indexed`); a soft mask if `soft` says so, or if fractions or a JPEG (`lossy`) leave no other
    choice. Else the numbers decide: few low numbers in solid regions are labels; levels up to full scale with thin
    borders in between are a soft mask.

    picture: whether whole numbers have a full scale, as in image files. known: ids that frames.json names; if no others
    occur, it is a label map. Raises UserError that names `name` and ends with `ask` if the numbers are ambiguous.
    """
    if soft and labels:
        raise UserError("--labels and --soft exclude each other: a number is a label or a probability")
    kind = frames[0].dtype
    if kind.kind == "f":
        low, high, off = 0.0, 0.0, 0.0
        for frame in frames:
            low, high = min(low, float(frame.min())), max(high, float(frame.max()))
            off = max(off, float(np.abs(frame - np.rint(frame)).max()))
        if off > ROUNDING:
            if labels:
                raise UserError(
                    f"{name} holds fractions ({off:.2g} off whole numbers): labels are whole numbers"
                )
            if low < -ROUNDING or high > 1 + ROUNDING:
                raise UserError(
                    f"{name} holds fractions from {low:g} to {high:g}: labels are whole numbers, probabilities lie in"
                    " [0, 1]"
                )
            note = f"{name} has fractions, so it is a soft mask: pixels of 0.5 and more are inside"
            return _checked(Meaning("soft", notes=(note,)), frames, name)
    counts = _counts(frames)
    levels = np.array(sorted(counts), np.int64)
    ids = tuple(levels[levels != 0].tolist())
    notes = []
    if kind.kind == "f" and off > 1e-6:
        notes.append(
            f"{name} holds numbers up to {off:.1g} off whole ones, probably from a scale factor: rounded"
        )
    if known and not soft and set(ids) <= set(known):
        labels = True
    full = _full_scale(kind, levels, picture, soft)
    if soft:
        if levels[0] < 0 or full is None:
            raise UserError(f"{name} holds {levels[0]} to {levels[-1]}, which are not probabilities")
        return _checked(Meaning("soft", scale=full, notes=tuple(notes)), frames, name)
    if len(levels) == 1 or (len(levels) == 2 and levels.min() == 0):
        return _checked(
            Meaning("labels" if labels or indexed else "mask", ids, notes=tuple(notes)), frames, name
        )
    if labels or indexed:
        return _checked(Meaning("labels", ids, notes=tuple(notes)), frames, name)
    if lossy:
        return _checked(_of_jpeg(counts, name, ask), frames, name)
    if len(levels) == 2:
        raise UserError(f"{name} holds {levels[0]} and {levels[1]}, and no 0 for what is outside: {ask}")
    sort = _sort(frames, levels, full, picture)
    if sort == "labels":
        return _checked(Meaning("labels", ids, notes=tuple(notes)), frames, name)
    if sort == "soft":
        assert full is not None
        notes.append(
            f"{name} holds {len(levels)} levels up to {levels[-1]} with soft borders: inside from half of {full:g}"
        )
        return _checked(Meaning("soft", scale=full, notes=tuple(notes)), frames, name)
    raise UserError(
        f"{name} holds {_listed(levels.tolist())}, which may be labels, a soft mask or a picture: {ask}"
    )


def _sort(
    frames: Sequence[np.ndarray] | np.ndarray, levels: np.ndarray, full: float | None, picture: bool
) -> Kind | None:
    """Label map or soft mask, given more than two levels; None if they may be either."""
    if levels[0] < 0:
        return None
    if full is None:
        return "labels" if len(levels) <= _MOST_IDS else None
    middle = levels[(levels > 0.1 * full) & (levels < 0.9 * full)]
    low = levels[-1] < 0.5 * full
    solid = _solid_share(frames, levels[1:] if low else middle) >= _SOLID
    if levels[0] == 0 and solid and (low or not picture):
        return "labels"
    if not low and len(middle) >= 3 and not solid:
        return "soft"
    return "labels" if levels[0] == 0 and len(levels) <= _FEW and (low or not picture) else None


def _solid_share(frames: Sequence[np.ndarray] | np.ndarray, levels: np.ndarray) -> float:
    """Among the pixels with one of `levels`, the share whose four neighbours have the same level."""
    solid = count = 0
    for frame in frames:
        among = np.isin(frame, levels)
        count += int(np.count_nonzero(among))
        same = among.copy()
        down, right = frame[1:] == frame[:-1], frame[:, 1:] == frame[:, :-1]
        same[1:] &= down
        same[:-1] &= down
        same[:, 1:] &= right
        same[:, :-1] &= right
        solid += int(np.count_nonzero(same))
    return solid / count if count else 0.0


def _counts(frames: Sequence[np.ndarray] | np.ndarray) -> dict[int, int]:
    """How often each whole number occurs."""
    counts: dict[int, int] = {}
    for frame in frames:
        if frame.dtype in (np.uint8, np.uint16, np.bool_):
            found = np.bincount(frame.ravel())
            values = np.flatnonzero(found)
            numbers = found[values]
        else:
            values, numbers = np.unique(whole(frame), return_counts=True)
        for value, number in zip(values.tolist(), numbers.tolist(), strict=True):
            counts[int(value)] = counts.get(int(value), 0) + number
    return counts


def _full_scale(kind: np.dtype, levels: np.ndarray, picture: bool, soft: bool) -> float | None:
    """The value of 1 in a soft mask of whole numbers; None if unknown. soft: whether the user says that it is one."""
    if soft and kind != np.uint8 and not (kind == np.uint16 and picture):
        return next((top for top in (1.0, 255.0, 65535.0) if levels[-1] <= top), None)
    if kind.kind in "fb":
        return 1.0 if levels[-1] <= 1 else None
    return 255.0 if kind == np.uint8 else 65535.0 if kind == np.uint16 and picture else None


def _of_jpeg(counts: Mapping[int, int], name: str | os.PathLike[str], ask: str) -> Meaning:
    """The mask that a lossy picture was, if it was one: nearly all of its levels are near black or white."""
    total = sum(counts.values())
    near = sum(n for level, n in counts.items() if not _JPEG_BAND * 255 < level < (1 - _JPEG_BAND) * 255)
    if near < 0.8 * total or max(counts) <= 127:
        raise UserError(
            f"{name} is compressed like a video or JPEG, which does not keep labels exactly: give PNG, TIFF or a volume"
        )
    note = f"{name} is compressed with losses: taken as a mask of 0 and 255, inside from half of it"
    return Meaning("soft", scale=255.0, notes=(note,))


def _checked(
    meaning: Meaning, frames: Sequence[np.ndarray] | np.ndarray, name: str | os.PathLike[str]
) -> Meaning:
    """The meaning, with a note if nothing, everything or nearly everything is inside."""
    count = sum(int(np.count_nonzero(meaning.inside(frame))) for frame in frames)
    share = count / max(sum(frame.size for frame in frames), 1)
    note = None
    if not count:
        note = f"{name} is empty: nothing is inside"
    elif share == 1:
        note = f"{name} is full: every pixel is inside"
    elif share > _SATURATED:
        note = f"{name} is nearly full: {share:.1%} is inside (is it the mask of what is outside?)"
    return meaning if note is None else replace(meaning, notes=(*meaning.notes, note))


def _listed(values: Sequence[int], most: int = 12) -> str:
    """Numbers for a message, or their range if there are many."""
    if len(values) <= most:
        return ", ".join(map(str, values))
    return f"{len(values)} values from {values[0]} to {values[-1]}"


# ---- masks in image files --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Segmentation:
    """A sequence of masks or label maps, as stored, and what its numbers mean."""

    frames: list[np.ndarray]
    """(rows, columns) each, of one type."""
    meaning: Meaning


def read_segmentation(
    files: Sequence[Path],
    meaning: Meaning | None = None,
    soft: bool = False,
    labels: bool = False,
    known: Iterable[int] = (),
    ask: str = ASK,
) -> Segmentation:
    """Image files as one segmentation; its kind is that of all of them together. Raises UserError.

    Opacity is ignored, unless the colour is the same everywhere: then opacity is the mask. Palette images are read as
    their indices. meaning: that of a sequence that these belong to.
    """
    return segmentation(files, [read_levels(file) for file in files], meaning, soft, labels, known, ask)


def segmentation(
    files: Sequence[Path],
    stored: Sequence[np.ndarray],
    meaning: Meaning | None = None,
    soft: bool = False,
    labels: bool = False,
    known: Iterable[int] = (),
    ask: str = ASK,
) -> Segmentation:
    """`read_segmentation` of files that were already read."""
    where = files[0].parent
    frames, notes = plain_numbers(stored, where, ask)
    indexed = all(is_indexed(file) for file in files)
    lossy = any(file.suffix.lower() in (".jpg", ".jpeg") for file in files)
    if meaning is None:
        hints: dict[str, bool] = {"soft": soft, "labels": labels, "indexed": indexed, "lossy": lossy}
        meaning = meaning_of(frames, where, known=known, ask=ask, **hints)
        meaning = replace(meaning, notes=(*notes, *meaning.notes))
    return Segmentation(frames, meaning)


def plain_numbers(
    frames: Sequence[np.ndarray], name: str | os.PathLike[str], ask: str = ASK
) -> tuple[list[np.ndarray], list[str]]:
    """One number per pixel of (rows, columns[, 3 or 4]), and notes on how. Raises UserError for label colours."""
    if all(frame.ndim == 2 for frame in frames):
        return _one_type(frames), []
    colours = [frame if frame.ndim == 3 else np.repeat(frame[:, :, None], 3, 2) for frame in frames]
    if all(frame.shape[2] == 4 for frame in colours):
        first = colours[0][0, 0, :3]
        plain = all((frame[:, :, :3] == first).all() for frame in colours)
        alpha = [np.ascontiguousarray(frame[:, :, 3]) for frame in colours]
        if plain and any((plane != alpha[0].flat[0]).any() for plane in alpha):
            return _one_type(alpha), [f"{name} has one colour throughout: its opacity is the mask"]
    colours = [frame[:, :, :3] for frame in colours]
    if all((frame == frame[:, :, :1]).all() for frame in colours):
        return _one_type([np.ascontiguousarray(frame[:, :, 0]) for frame in colours]), []
    found: set[tuple[int, ...]] = set()
    for frame in colours:
        found |= {tuple(colour) for colour in np.unique(frame.reshape(-1, 3), axis=0).tolist()}
        if len(found) > _MOST_COLOURS:
            note = f"{name} holds coloured pictures: their mean over red, green and blue counts"
            means = [np.asarray(frame.astype(np.float32).mean(2) / _top(frame.dtype)) for frame in colours]
            return means, [note]
    if len(found) == 2 and (0, 0, 0) in found:
        return [np.asarray(frame.any(axis=2), np.uint8) for frame in colours], []
    raise UserError(
        f"{name} holds {len(found)} colours: a mask holds one number per pixel; write label numbers"
        " (grey or palette images)"
    )


def _one_type(frames: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Frames in the widest type among them, numbers unchanged."""
    kind = np.result_type(*{frame.dtype for frame in frames})
    return [frame.astype(kind, copy=False) for frame in frames]


def _top(kind: np.dtype) -> np.float32:
    return np.float32(1 if kind.kind == "f" else np.iinfo(kind).max)


# ---- names and colours -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Label:
    """One structure of a label map."""

    id: int
    """The number that its pixels have, 1 to MAX_ID."""
    name: str
    colour: tuple[int, int, int]
    """Red, green, blue, 0 to 255."""

    def __post_init__(self) -> None:
        if not 0 < self.id <= MAX_ID:
            raise ValueError(f"label {self.id} is not a number from 1 to {MAX_ID}")
        if len(self.colour) != 3 or not all(0 <= level <= 255 for level in self.colour):
            raise ValueError(f"label {self.id} has the colour {self.colour}, which is not three bytes")

    @classmethod
    def of(cls, number: int, name: str | None = None, colour: Sequence[int] | None = None) -> Label:
        """A label with what is known of it; the rest is derived from its number."""
        red, green, blue = _colour(number) if colour is None else (int(level) for level in colour)
        return cls(int(number), name or str(number), (red, green, blue))


def _colour(number: int) -> tuple[int, int, int]:
    """A colour for a label that has none: hues a golden ratio apart, in three brightnesses."""
    hue, value = number * 0.618034 % 1, (0.95, 0.8, 0.65)[number % 3]
    red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(hue, 0.65, value))
    return red, green, blue


@dataclass(frozen=True)
class LabelTable:
    """The labels of a label map by increasing id, shared by training, rendering and meshes."""

    labels: tuple[Label, ...] = ()

    def __post_init__(self) -> None:
        ids = [label.id for label in self.labels]
        if sorted(set(ids)) != ids:
            raise ValueError("labels have increasing ids, each once")

    def __len__(self) -> int:
        return len(self.labels)

    def __iter__(self) -> Iterator[Label]:
        return iter(self.labels)

    def __getitem__(self, number: int) -> Label:
        """The label of an id; a label without a name of its own if the table lacks it."""
        return next((label for label in self.labels if label.id == number), None) or Label.of(number)

    @property
    def ids(self) -> tuple[int, ...]:
        return tuple(label.id for label in self.labels)

    @property
    def dtype(self) -> type[np.uint8] | type[np.uint16]:
        """The smaller of the types of label maps in files that holds all ids."""
        return np.uint8 if max(self.ids) < 256 else np.uint16

    def of(self, ids: Iterable[int]) -> LabelTable:
        """The table of these ids alone."""
        return LabelTable(tuple(self[number] for number in sorted(set(ids))))

    def find(self, word: str) -> int | None:
        """The id that a user means by a number or a name; None if there is no such name."""
        if re.fullmatch(r"[+-]?\d+", word.strip()):
            return int(word)
        fold = _folded(word)
        return next((label.id for label in self.labels if _folded(label.name) == fold), None)

    def file_names(self) -> dict[int, str]:
        """By id, the name in a form that file names can have; with the id where two would be the same."""
        names = {label.id: re.sub(r"[^\w.+-]+", "_", label.name) for label in self.labels}
        every = list(names.values())
        return {i: name if every.count(name) == 1 else f"{name}_{i}" for i, name in names.items()}

    def words(self, most: int = 12) -> str:
        """Ids and names for a message."""
        shown = [str(i.id) if i.name == str(i.id) else f"{i.id} {i.name}" for i in self.labels[:most]]
        more = len(self) - len(shown)
        return ", ".join(shown) + (f" and {more} more" if more > 0 else "")

    def to_json(self) -> list[dict[str, Any]]:
        return [{"id": i.id, "name": i.name, "colour": list(i.colour)} for i in self.labels]

    @classmethod
    def from_json(cls, told: Any) -> LabelTable:
        """The table that `to_json` wrote. Raises ValueError for anything else."""
        try:
            return cls(tuple(Label(i["id"], i["name"], tuple(i["colour"])) for i in told))
        except (TypeError, KeyError) as error:
            raise ValueError(f"a label is not of id, name and colour ({error})") from error

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> LabelTable:
        """Names and colours from a file. Raises UserError.

        JSON: a list of id, name and colour; id -> name; name -> id; nnU-Net's dataset.json; our frames.json. CSV with a
        header: id (or Index, LabelValue, ...), name, colour (or Color_R, ...), as from TotalSegmentator and 3D Slicer.
        Else lines of id, name, R G B A (3D Slicer's .ctbl, .txt), or ITK-SNAP's lines, which have the name last.
        """
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8-sig")
        except FileNotFoundError:
            raise UserError(f"{path} does not exist") from None
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path} cannot be read as a table of labels: {error}") from error
        try:
            if path.suffix.lower() == ".json":
                rows = _json_rows(json.loads(text))
            elif "," in _first_line(text) or "\t" in _first_line(text):
                rows = _csv_rows(text)
            else:
                rows = _plain_rows(text)
            table: dict[int, Label] = {}
            for number, name, colour in rows:
                if number in table:
                    raise ValueError(f"id {number} is there twice")
                if number:
                    table[number] = Label.of(number, name, colour)
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise UserError(f"{path} is not a table of labels (id, name, colour): {error}") from error
        if not table:
            raise UserError(f"{path} names no label")
        return cls(tuple(table[number] for number in sorted(table)))


_Row = tuple[int, str, "Sequence[int] | None"]


def _folded(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()


def _first_line(text: str) -> str:
    return next((line for line in text.splitlines() if line.strip() and not line.startswith("#")), "")


def _json_rows(told: Any) -> list[_Row]:
    told = told.get("labels", told) if isinstance(told, dict) else told
    if isinstance(told, list):
        return [
            (int(row["id"]), str(row["name"]), _levels(row.get("colour", row.get("color")))) for row in told
        ]
    rows: list[_Row] = []
    for key, value in told.items():
        if isinstance(value, list):  # nnU-Net's regions are made of several labels
            raise ValueError(f"{key} is a region of labels {value}: a table names single labels")
        number, name = (value, key) if not re.fullmatch(r"\d+", str(key)) else (key, value)
        rows.append((int(number), str(name), None))
    return rows


_COLUMNS = {
    "id": ("id", "index", "labelvalue", "label", "value", "number", "labelid"),
    "name": ("name", "totalsegmentatorname", "labelname", "structure", "text", "organ"),
    "colour": ("colour", "color", "rgb", "dicomrgbcolor", "hex"),
    "r": ("r", "red", "colorr"),
    "g": ("g", "green", "colorg"),
    "b": ("b", "blue", "colorb"),
}


def _csv_rows(text: str) -> list[_Row]:
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    table = csv.reader(lines, delimiter="\t" if "\t" in lines[0] and "," not in lines[0] else ",")
    header = [re.sub(r"[^a-z]", "", cell.lower()) for cell in next(table)]
    where = {
        column: next((header.index(name) for name in names if name in header), None)
        for column, names in _COLUMNS.items()
    }
    if where["id"] is None or where["name"] is None or where["id"] == where["name"]:
        raise ValueError("its first line must name the columns id and name")
    rows: list[_Row] = []
    for cells in table:
        colour: Sequence[int] | None = None
        if where["colour"] is not None:
            colour = _levels(cells[where["colour"]])
        elif None not in (where["r"], where["g"], where["b"]):
            colour = _levels([cells[where[part]] for part in "rgb"])  # type: ignore[index]
        rows.append((int(cells[where["id"]]), cells[where["name"]].strip(), colour))
    return rows


def _plain_rows(text: str) -> list[_Row]:
    rows: list[_Row] = []
    for line in text.splitlines():
        if not line.strip() or line.lstrip().startswith(("#", "//")):
            continue
        quoted = re.fullmatch(r'\s*(\d+)\s+(\d+)\s+(\d+)\s+(\d+)\s.*"(.*)"\s*', line)  # ITK-SNAP
        if quoted:
            number, *levels, name = quoted.groups()
            rows.append((int(number), name, _levels(levels)))
            continue
        cells = re.fullmatch(r"\s*(\d+)\s+(.+?)((?:\s+\d+){3,4})?\s*", line)
        if cells is None:
            raise ValueError(f"'{line.strip()[:40]}' is not: id, name, red, green, blue")
        colour = _levels(cells[3].split()[:3] if cells[3] else None)
        rows.append((int(cells[1]), cells[2].strip().replace("_", " ").strip('"'), colour))
    return rows


def _levels(told: Any) -> tuple[int, int, int] | None:
    """A colour as three bytes, from numbers, "r,g,b" or "#rrggbb"."""
    if told is None or told == "":
        return None
    if isinstance(told, str):
        code = re.fullmatch(r"#?([0-9a-fA-F]{6})", told.strip())
        told = bytes.fromhex(code[1]) if code else re.findall(r"[\d.]+", told)
    red, green, blue, *_ = (int(float(level)) for level in told)
    return red, green, blue
