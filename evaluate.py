"""Score renders, masks or meshes against a reference: one row per case, then mean and deviation.

    python evaluate.py frames output/case data/full/img --keep_every 2 --held_out
    python evaluate.py masks output/case label.nii.gz
    python evaluate.py meshes meshes references --csv scores.csv --json scores.json

PRED and REF are one case each, or folders of cases with the same names. Nothing is moved, scaled or rotated to fit,
unless `--align icp` asks for it; the scores then say so.
"""

from __future__ import annotations

import utils.threads  # noqa: F401  # isort: skip  (before torch)

import argparse
import csv
import io
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from trimesh import Trimesh

from patient.geometry import HELDOUT, FrameCut, Geometry
from patient.labels import LabelTable, Meaning, meaning_of, plain_numbers, segmentation, whole
from patient.meshes import FORMATS, in_space, read_mesh, surface
from patient.readers import read_volume
from patient.stacks import INNER, case_geometry, read_stack, sub_frames
from patient.surfaces import SAMPLES, rigid_alignment, surface_scores
from patient.volumes import Volume
from utils.errors import ArgumentParser, UserError, positive, run
from utils.files import atomic_write
from utils.images import (
    MAX_PIXELS,
    READABLE,
    frame_number,
    image_files,
    is_indexed,
    limit_pixels,
    read_image,
    read_levels,
    to_unit,
)
from utils.lpips import lpips_distance
from utils.metrics import Scores

THRESHOLD = 0.5  # of masks, in [0, 1]
RENDERS = {"frames": ("render_img", "render"), "masks": ("render_mask", "render_img", "render")}
INPUTS = {"frames": "img", "masks": "seg", "meshes": "seg"}  # folders that prepare.py writes
NOT_NAMES = (
    "original",
    "img",
    "seg",
    "render_img",
    "render_mask",
    "render",
)  # folders that do not name a case

Row = dict[str, Any]


@dataclass(frozen=True)
class Pair:
    """A case: prediction and reference; None where a folder has no counterpart."""

    name: str
    predicted: Path | None
    reference: Path | None


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    limit_pixels(options.max_pixels)
    score, settings = _scorer(options)
    rows, failed = [], {}
    for pair in _pairs(options.what, Path(options.prediction), Path(options.reference)):
        try:
            if pair.predicted is None or pair.reference is None:
                side, folder = (
                    ("prediction", options.prediction)
                    if pair.predicted is None
                    else ("reference", options.reference)
                )
                raise UserError(f"{folder} has no {side} of that name")
            rows.append({"case": pair.name, **score(pair.predicted, pair.reference)})
        except UserError as error:
            failed[pair.name] = str(error)
    if not rows and len(failed) == 1:
        raise UserError(next(iter(failed.values())))

    summary = _summary(rows)
    if rows and not options.quiet:
        print(_table([*rows, *summary]))
        for row in rows:
            for note in row.get("notes", ()):
                print(f"{row['case']}: {note}")
        print("\n".join(f"{name}: {text}" for name, text in settings.items()))
    if options.csv:
        text = io.StringIO()
        table = csv.DictWriter(text, _columns(rows), extrasaction="ignore", lineterminator="\n")
        table.writeheader()
        table.writerows([*rows, *summary])
        _write(options.csv, text.getvalue())
    if options.json:
        about = {"what": options.what, "prediction": options.prediction, "reference": options.reference}
        lines = [[_stated(row) for row in part] for part in (rows, summary)]
        results = {**about, "settings": settings, "rows": lines[0], "summary": lines[1], "failed": failed}
        _write(options.json, json.dumps(results, indent=1, allow_nan=False) + "\n")
    for name, reason in failed.items():
        print(f"evaluate.py: failed: {name}: {reason}", file=sys.stderr)
    return 1 if failed else 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = ArgumentParser(prog="evaluate.py", description=(__doc__ or "").split("\n")[0])
    kinds = parser.add_subparsers(dest="what", required=True, metavar="{frames,masks,meshes}")
    for what, text in (
        ("frames", "PSNR, SSIM and, if installed, LPIPS of images"),
        ("masks", "Dice and IoU of masks, over all frames together"),
        ("meshes", "Chamfer, ASD, Hausdorff and HD95 of surfaces, in mm"),
    ):
        kind = kinds.add_parser(what, help=text, description=text)
        kind.add_argument(
            "prediction", metavar="PRED", help="prediction to score: a case, or a folder of cases"
        )
        kind.add_argument("reference", metavar="REF", help="reference: a case, or a folder of cases")
        if what != "meshes":
            kind.add_argument(
                "--keep_every",
                type=positive,
                metavar="N",
                help="the model was trained on every N-th frame (default: as frames.json says, else all)",
            )
            kind.add_argument("--held_out", action="store_true", help="only frames that were not trained on")
        if what != "frames":
            kind.add_argument(
                "--label_value",
                type=float,
                nargs="+",
                metavar="V",
                help="labels to merge into one mask (default: all but 0)",
            )
        if what == "masks":
            kind.add_argument(
                "--labels",
                nargs="+",
                metavar="ID",
                help="score these labels one by one: numbers, names, or all",
            )
            kind.add_argument(
                "--label_names", metavar="FILE", help="names of labels, as prepare.py reads them"
            )
            kind.add_argument("--soft", action="store_true", help="inside from half of full scale")
            kind.add_argument(
                "--surfaces", action="store_true", help="ASD and HD95 of the surfaces too, in mm"
            )
        else:
            kind.set_defaults(labels=None, label_names=None, soft=False, surfaces=False)
        if what == "masks":
            kind.set_defaults(samples=SAMPLES, seed=0)
        if what == "meshes":
            kind.add_argument(
                "--samples",
                type=positive,
                default=SAMPLES,
                metavar="N",
                help="points per surface (default: %(default)s)",
            )
            kind.add_argument("--seed", type=int, default=0, help="random seed of the points (default: 0)")
            kind.add_argument(
                "--space",
                choices=("lps", "ras"),
                help="space of meshes whose header does not say (otherwise an error)",
            )
            kind.add_argument(
                "--align",
                choices=("none", "icp"),
                default="none",
                help="move the prediction first (default: none)",
            )
        kind.add_argument("--csv", help="write the table there")
        kind.add_argument("--json", help="write table and settings there")
        kind.add_shared(MAX_PIXELS)
    return parser


def _scorer(options: argparse.Namespace) -> tuple[Callable[[Path, Path], Row], dict[str, str]]:
    """The function that scores a pair, and its settings in words."""
    for path in (options.csv, options.json):
        if path is not None and Path(path).is_dir():
            raise UserError(f"{path} is a folder: name a file for the scores")
    if options.what == "meshes":
        settings = {
            "points": f"{options.samples} drawn by area on each surface, seed {options.seed}; exact distances",
            "alignment": "icp: the prediction was rotated and shifted, not scaled"
            if options.align == "icp"
            else "none: the prediction lies where it was",
            "scores": "chamfer = sum, asd = mean of the two directed mean distances; hd95 = the larger percentile",
        }
        return lambda predicted, reference: _score_meshes(predicted, reference, options), settings
    if options.what == "masks":
        settings = {
            "inside": "nonzero in masks and label maps, half of full scale and above in soft masks",
            "scores": "over the pixels of all frames together; the mean over labels if there are several",
        }
        return lambda predicted, reference: _score_masks(predicted, reference, options), settings
    perceptual, word = lpips_distance()
    settings = {
        "scores": "means over frames; PSNR in dB, at most 100; SSIM with even windows of 7 pixels",
        "lpips": word,
    }
    return lambda predicted, reference: _score_frames(predicted, reference, options, perceptual), settings


# ---- pairs of cases --------------------------------------------------------------------------------------------------


def _pairs(what: str, predicted: Path, reference: Path) -> list[Pair]:
    """PRED and REF as one case, or matched case by case."""
    for path in (predicted, reference):
        if not path.exists():
            raise UserError(f"{path} does not exist")
    if _is_case(what, predicted):
        place = predicted.resolve()
        while place.name in NOT_NAMES:
            place = place.parent
        name = _stem(place)
        if reference.is_file() or _input_folder(what, reference) is not None:
            return [Pair(name, predicted, reference)]
        found = _named(what, reference)
        if name not in found:
            raise UserError(f"{reference} is no reference for {what}, and has none named {name}")
        return [Pair(name, predicted, found[name])]
    cases = _named(what, predicted, _is_case)
    if not cases:
        raise UserError(f"{predicted} has no {what} to score, itself or by case")
    if not reference.is_dir():
        raise UserError(f"{predicted} holds {len(cases)} cases, and {reference} is one file: give a folder")
    references = _named(what, reference)
    return [Pair(name, cases.get(name), references.get(name)) for name in sorted({*cases, *references})]


def _is_case(what: str, path: Path) -> bool:
    """Whether a path is one case to score."""
    if path.is_file():
        mesh = path.suffix.lower().removeprefix(".") in FORMATS
        return (
            mesh if what == "meshes" else what == "masks" and not mesh and path.suffix.lower() not in READABLE
        )
    return what != "meshes" and _frames_folder(what, path) is not None


def _named(what: str, folder: Path, accept: Callable[[str, Path], bool] | None = None) -> dict[str, Path]:
    """Files and folders in a folder by case name; in REF, those that could be references."""

    def is_reference(what: str, path: Path) -> bool:
        if path.is_dir():
            return _input_folder(what, path) is not None
        picture = path.suffix.lower() in READABLE or path.suffix.lower() in (".json", ".csv", ".txt", ".md")
        return what != "frames" and not picture

    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if not path.name.startswith(".") and (accept or is_reference)(what, path):
            if _stem(path) in found:
                raise UserError(
                    f"{found[_stem(path)]} and {path} are both named {_stem(path)}: which one is meant?"
                )
            found[_stem(path)] = path
    return found


def _stem(path: Path) -> str:
    name = path.name
    if path.is_dir():
        return name
    return name[: -len(".nii.gz")] if name.lower().endswith(".nii.gz") else path.stem


def _frames_folder(what: str, folder: Path) -> Path | None:
    """Where a case has its renders: in a model's render_... folder, or in the folder itself."""
    for place in (*(folder / name for name in RENDERS[what]), folder):
        if place.is_dir() and image_files(place):
            return place
    return None


def _input_folder(what: str, folder: Path) -> Path | None:
    """Where a reference has its frames: the folder itself, original/, or img/ or seg/original/ of prepare.py."""
    if not folder.is_dir():
        return None
    for place in (folder, folder / "original", folder / INPUTS[what] / "original"):
        if place.is_dir() and image_files(place):
            return place
    return None


def _matches(renders: Path, options: argparse.Namespace) -> list[tuple[Path, int]]:
    """Renders, each with the source slice that it shows; those that show none are left out.

    Render k_i of n lies i / n of the way from frame k to the next. frames.json says where all slices lie in the
    sequence, held-out ones too; without it, frame k is slice k times --keep_every.
    """
    paths = image_files(renders)
    named = sub_frames(paths) or {(frame_number(path), 0): path for path in paths}
    inter = max(sub_frame for _, sub_frame in named) + 1
    geometry = case_geometry(renders if renders.name in INNER else renders.parent)
    if geometry is not None and options.keep_every is None:
        trained = dict(enumerate(geometry.slices))
        left_out = dict(zip(geometry.heldout_indices(), geometry.heldout_slices, strict=True))
    else:
        step = options.keep_every or 1
        last = max(frame for frame, _ in named)
        trained = {frame: frame * step for frame in range(last + 1)}
        left_out = {at / step: at for at in range(last * step) if at % step}
    slices = {
        round(at, 3): slice_ for at, slice_ in (left_out if options.held_out else trained | left_out).items()
    }
    places = {path: round(frame + sub_frame / inter, 3) for (frame, sub_frame), path in named.items()}
    matched = [(path, slices[place]) for path, place in places.items() if place in slices]
    if not matched:
        what = (
            "frame that was held out: render with --interp, or give --keep_every N"
            if options.held_out
            else "frames"
        )
        raise UserError(f"{renders} has no {what}")
    return matched


def _frame_pairs(
    what: str, predicted: Path, reference: Path, options: argparse.Namespace
) -> list[tuple[Path, Path]]:
    """Files of renders, each with the frame that it should equal."""
    renders, inputs = _frames_folder(what, predicted), _input_folder(what, reference)
    if renders is None or inputs is None:
        raise UserError(f"{predicted if renders is None else reference} has no images")
    frames = {frame_number(path): path for path in image_files(inputs)}
    geometry = case_geometry(inputs)
    if geometry is not None and inputs.name == "original":  # numbered by frame; held-out ones by slice
        frames = {geometry.slices[k]: path for k, path in frames.items() if k < len(geometry.slices)}
        left_out = inputs.with_name(HELDOUT)
        frames |= {frame_number(path): path for path in image_files(left_out)} if left_out.is_dir() else {}
    matched = _matches(renders, options)
    missing = [slice_ for _, slice_ in matched if slice_ not in frames]
    if missing:
        raise UserError(f"{reference} has no frame {missing[0]}, which {renders} shows")
    last = max(slice_ for _, slice_ in matched)
    known = options.keep_every is not None or case_geometry(renders.parent) is not None
    if not known and max(frames) > last:
        raise UserError(
            f"{renders} ends at frame {last}, {inputs} at {max(frames)}: say which were trained on with --keep_every N"
        )
    return [(path, frames[slice_]) for path, slice_ in matched]


# ---- frames ----------------------------------------------------------------------------------------------------------


def _score_frames(
    predicted: Path, reference: Path, options: argparse.Namespace, perceptual: Callable[..., float] | None
) -> Row:
    scores, lpips = Scores(), []
    for render, frame in _frame_pairs("frames", predicted, reference, options):
        image, truth = (_image(path) for path in (render, frame))  # (H, W, C) in [0, 1]
        if image.shape[2] != truth.shape[2]:
            image, truth = (array.mean(axis=2, keepdims=True) for array in (image, truth))
        if image.shape != truth.shape:
            raise UserError(f"{render} and {frame} differ in size: {_size(image)} and {_size(truth)} pixels")
        a, b = (torch.from_numpy(array).permute(2, 0, 1)[None] for array in (image, truth))
        scores += Scores.of(a, b)
        if perceptual is not None:
            lpips.append(perceptual(a, b))
    row: Row = {"frames": len(scores), "psnr": scores.mean_psnr, "ssim": scores.mean_ssim}
    return row | ({"lpips": float(np.mean(lpips))} if lpips else {})


def _image(path: Path) -> np.ndarray:
    """(H, W, 1 or 3) float64 in [0, 1]; opacity is left out."""
    unit = np.atleast_3d(to_unit(read_image(path)))[:, :, :3].astype(np.float64)
    return unit[:, :, :1] if (unit == unit[:, :, :1]).all() else unit


def _size(image: np.ndarray) -> str:
    return f"{image.shape[1]} x {image.shape[0]}"


# ---- masks -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Side:
    """Prediction or reference: numbers as stored, and what they mean."""

    name: str
    frames: list[np.ndarray]
    """(row, column) each."""
    meaning: Meaning | None
    """None if they may be labels, a soft mask or a picture; `question` then asks which."""
    question: str = ""
    table: LabelTable = field(default_factory=LabelTable)
    affine: np.ndarray | None = None
    """(column, row, frame) to RAS millimetres, if known."""
    volume: bool = False


def _score_masks(predicted: Path, reference: Path, options: argparse.Namespace) -> Row:
    sides = _resolved(*_mask_sides(predicted, reference, options))
    meanings = [side.meaning for side in sides]
    notes = [note for meaning in meanings if meaning is not None for note in meaning.notes]
    table = _labels(sides, options)
    if table is None:
        masks, truth = (_inside(side, options.label_value, notes) for side in sides)
        return _row([("", masks, truth)], sides, options, notes)
    numbers = [np.stack([side.meaning.numbers(f) for f in side.frames]) for side in sides if side.meaning]
    parts = [(label.name, *(stack == label.id for stack in numbers)) for label in table]
    return _row(parts, sides, options, notes)


def _row(
    parts: list[tuple[str, np.ndarray, np.ndarray]],
    sides: tuple[Side, Side],
    options: argparse.Namespace,
    notes: list[str],
) -> Row:
    """Scores of masks (frame, row, column) by name; for several, also the means of the defined ones."""
    columns: dict[str, list[float]] = {"dice": [], "iou": []}
    by_label: Row = {}
    for name, masks, truth in parts:
        scores = Scores(overlaps=[int((masks & truth).sum())], sizes=[int(masks.sum() + truth.sum())])
        own = {"dice": scores.dice, "iou": scores.iou}
        if options.surfaces:
            own |= _surface_distances(masks, truth, sides, options)
        if np.isnan(scores.dice):
            notes.append(f"{name or 'both'}: nothing is inside in either, so the scores are undefined")
        for column, value in own.items():
            columns.setdefault(column, []).append(value)
            if name:
                by_label[f"{column} {name}"] = value
    row: Row = {"frames": len(parts[0][1])}
    if parts[0][0]:
        row["labels"] = len(parts)
    row |= {column: _mean(values) for column, values in columns.items()}
    return row | by_label | ({"notes": notes} if notes else {})


def _mean(values: Sequence[float]) -> float:
    """Mean of the defined values; NaN if there are none."""
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")


def _surface_distances(
    masks: np.ndarray, truth: np.ndarray, sides: tuple[Side, Side], options: argparse.Namespace
) -> Row:
    """ASD and HD95 of the surfaces of two masks; undefined where one is empty."""
    affine = sides[1].affine if sides[1].affine is not None else sides[0].affine
    if affine is None:
        raise UserError(
            "--surfaces: it is unknown where these frames lie: score volumes, or frames of prepare.py"
        )
    if not (masks.any() and truth.any()):
        return {"asd": float("nan"), "hd95": float("nan")}
    predicted, true = (surface(stack.astype(np.float32), THRESHOLD, affine) for stack in (masks, truth))
    scores = surface_scores(predicted, true, options.samples, options.seed)
    return {"asd": scores.asd, "hd95": scores.hd95}


def _labels(sides: tuple[Side, Side], options: argparse.Namespace) -> LabelTable | None:
    """The labels to score one by one: those asked for, or all if both sides are label maps."""
    kinds = {side.meaning.kind for side in sides if side.meaning is not None}
    ids = sorted({i for side in sides if side.meaning is not None for i in side.meaning.ids})
    names = (
        LabelTable.read(options.label_names)
        if options.label_names
        else max((side.table for side in sides), key=len)
    )
    if options.labels:
        if kinds != {"labels"}:
            raise UserError(
                "--labels scores label maps, and one of the two is a mask: leave it out, or --label_value V"
            )
        if tuple(options.labels) == ("all",):
            return names.of(ids)
        chosen = []
        for word in options.labels:
            number = names.find(word)
            if number is None or number not in ids:
                raise UserError(f"--labels {word}: there is no such label; there are {names.of(ids).words()}")
            chosen.append(number)
        return names.of(chosen)
    several = kinds == {"labels"} and len(ids) > 1 and not options.label_value
    return names.of(ids) if several else None


def _inside(side: Side, wanted: Sequence[float] | None, notes: list[str]) -> np.ndarray:
    """(frame, row, column) bool; of a label map, the labels of --label_value or all of them."""
    meaning = side.meaning
    assert meaning is not None  # _resolved saw to it
    chosen = bool(wanted) and meaning.kind != "soft" and (side.volume or meaning.kind == "labels")
    if chosen:
        inside = np.stack([np.isin(whole(frame), list(wanted or ())) for frame in side.frames])
    else:
        inside = np.stack([meaning.inside(frame) for frame in side.frames])
        if meaning.kind == "labels" and len(meaning.ids) > 1:
            notes.append(f"{side.name}: labels {', '.join(map(str, meaning.ids))} count as one mask")
    if chosen and not inside.any():
        present = ", ".join(f"{value:g}" for value in np.unique(np.stack(side.frames))[:12])
        raise UserError(f"{side.name} is empty: nothing is labelled as asked (it holds {present})")
    return inside


def _resolved(first: Side, second: Side) -> tuple[Side, Side]:
    """Both sides with a meaning: compared with a mask, intermediate levels can only be a soft mask."""
    sides = []
    for side, other in ((first, second), (second, first)):
        if side.meaning is None:
            if other.meaning is None or other.meaning.kind == "labels":
                raise UserError(side.question)
            meaning = meaning_of(side.frames, side.name, soft=True)
            note = f"{side.name} has intermediate levels, and {other.name} is a mask: inside from half of full scale"
            side = replace(side, meaning=replace(meaning, notes=(*meaning.notes, note)))
        sides.append(side)
    empty = [
        side
        for side in sides
        if side.volume and not (side.meaning and (side.meaning.ids or side.meaning.kind == "soft"))
    ]
    if len(empty) == 1:
        raise UserError(f"{empty[0].name} is empty: nothing is labelled as asked (it holds 0)")
    return sides[0], sides[1]


def _volume_side(volume: Volume, options: argparse.Namespace, frames: np.ndarray | None = None) -> Side:
    """A label volume. frames: (frame, row, column) as cut (default: volume[:, :, k].T)."""
    values = np.nan_to_num(volume.values)
    if values.ndim != 3:
        raise UserError(f"{volume.name} holds colours: a label volume holds one number per voxel")
    frames = values.transpose(2, 1, 0) if frames is None else np.nan_to_num(frames)
    picture = volume.full_scale is not None
    meaning, question = _meaning(list(frames), volume.name, options, lossy=volume.lossy, picture=picture)
    return Side(volume.name, list(frames), meaning, question, affine=volume.affine, volume=True)


def _files_side(files: list[Path], options: argparse.Namespace) -> Side:
    """Frames in files; renders are soft masks unless frames.json says that they are label maps."""
    folder = files[0].parent
    geometry = case_geometry(folder if folder.name in INNER else folder.parent)
    table = LabelTable() if geometry is None or geometry.labels is None else geometry.labels
    stored = [read_levels(file) for file in files]
    for file, frame in zip(files, stored, strict=True):
        if frame.shape[:2] != stored[0].shape[:2]:
            raise UserError(f"{file} is {_size(frame)} pixels, the others {_size(stored[0])}")
    found: Meaning | None = None
    frames, question = stored, ""
    lossy = any(file.suffix.lower() in (".jpg", ".jpeg") for file in files)
    if options.soft or (folder.name in RENDERS["masks"] and not table.ids and not options.labels):
        segmented = segmentation(files, stored, soft=True)
        frames, found = segmented.frames, segmented.meaning
    else:
        frames, notes = plain_numbers(stored, folder)
        indexed = all(is_indexed(file) for file in files)
        found, question = _meaning(frames, folder, options, known=table.ids, lossy=lossy, indexed=indexed)
        if found is not None and notes:
            found = replace(found, notes=(*notes, *found.notes))
        if folder.name in RENDERS["masks"] and (found is None or found.kind != "labels"):
            found = meaning_of(frames, folder, soft=True)
    affine = None
    if options.surfaces and geometry is not None and len(files) == len(geometry.slices):
        affine = geometry.for_renders((stored[0].shape[1], stored[0].shape[0]), 1)
    return Side(str(folder), frames, found, question, table, affine)


def _meaning(
    frames: list[np.ndarray], name: Path | str, options: argparse.Namespace, **hints: Any
) -> tuple[Meaning | None, str]:
    """What the numbers mean, or what the options say where that is ambiguous; else None, and the question."""
    try:
        return meaning_of(frames, name, soft=options.soft, labels=bool(options.labels), **hints), ""
    except UserError as error:
        if options.label_value and not options.labels:
            return meaning_of(frames, name, labels=True, **hints), ""
        if options.soft or options.labels:
            raise
        return None, str(error)


def _mask_sides(predicted: Path, reference: Path, options: argparse.Namespace) -> tuple[Side, Side]:
    """Prediction and reference on the same frames."""
    if predicted.is_file():
        if not reference.is_file():
            raise UserError(f"{predicted} is a volume, so {reference} has to be one too")
        if options.held_out or options.keep_every:
            raise UserError("--held_out and --keep_every are for renders, not for volumes")
        first, second = (read_volume(path) for path in (predicted, reference))
        _check_same_grid(first, second)
        return _volume_side(first, options), _volume_side(second, options)
    if reference.is_dir():
        pairs = _frame_pairs("masks", predicted, reference, options)
        sides = [_files_side(list(files), options) for files in zip(*pairs, strict=True)]
        sizes = [side.frames[0].shape for side in sides]
        if sizes[0] != sizes[1]:
            raise UserError(
                f"{pairs[0][1]} is {_size(sides[1].frames[0])} pixels, the others {_size(sides[0].frames[0])}"
            )
        return sides[0], sides[1]

    renders = _frames_folder("masks", predicted)
    assert renders is not None  # _pairs saw images there
    geometry = case_geometry(renders if renders.name in INNER else renders.parent)
    volume = read_volume(reference)
    if volume.values.ndim != 3:
        raise UserError(f"{volume.name} holds colours: a label volume holds one number per voxel")
    cut = _cut(volume.values, geometry)
    matched = _matches(renders, options)
    masks = _files_side([path for path, _ in matched], options)
    for (path, slice_), mask in zip(matched, masks.frames, strict=True):
        if slice_ >= len(cut) or mask.shape != cut.shape[1:]:
            rows, columns = cut.shape[1:]
            raise UserError(
                f"{path}, slice {slice_} of {_size(mask)} pixels, is not of {reference}, which has {len(cut)}"
                f" slices of {columns} x {rows}"
            )
    truth = _volume_side(replace(volume, affine=None), options, cut)
    return masks, replace(truth, frames=[truth.frames[slice_] for _, slice_ in matched])


def _cut(volume: np.ndarray, geometry: Geometry | None) -> np.ndarray:
    """A volume as upright frames (frame, row, column) as prepare.py cuts it; without geometry volume[:, :, k].T."""
    if geometry is None:
        return FrameCut((0, 1, 2), (False, False)).frames(volume)
    (left, top), (columns, rows) = geometry.offset, geometry.size
    frames = FrameCut(geometry.axes, geometry.flips).frames(volume)
    return frames[:, top : top + rows, left : left + columns]


def _check_same_grid(first: Volume, second: Volume) -> None:
    if first.values.shape != second.values.shape:
        raise UserError(
            f"{first.name} has shape {first.values.shape}, {second.name} {second.values.shape}: resample one"
        )
    if first.affine is None or second.affine is None:
        return
    if not np.allclose(first.affine, second.affine, atol=1e-2):
        raise UserError(f"{first.name} and {second.name} lie on different grids: resample one")


# ---- meshes ----------------------------------------------------------------------------------------------------------


def _score_meshes(predicted: Path, reference: Path, options: argparse.Namespace) -> Row:
    meshes = [_mesh(path, options) for path in (predicted, reference)]
    units = {mesh.metadata["unit"] or "mm" for mesh in meshes}
    if len(units) > 1:
        in_voxels = predicted if meshes[0].metadata["unit"] == "voxels" else reference
        raise UserError(f"{in_voxels} is in voxels, the other in millimetres: they cannot be compared")
    row: Row = {"unit": units.pop()}
    first, second = meshes
    if options.align == "icp":
        matrix = rigid_alignment(first, second, options.seed)
        moved = first.copy().apply_transform(matrix)
        shift = float(np.linalg.norm(moved.centroid - first.centroid))
        row |= {"align": "icp", "shift": shift, "matrix": matrix.tolist()}
        first = moved
    return row | asdict(surface_scores(first, second, options.samples, options.seed))


def _mesh(path: Path, options: argparse.Namespace) -> Trimesh:
    """A mesh, or the surface of a label volume or of a folder of masks; in RAS unless it is in voxels."""
    if path.is_dir():
        folder = _input_folder("meshes", path)
        assert folder is not None  # _pairs saw images there
        extension = image_files(folder)[0].suffix
        stack = read_stack(folder, extension)
        return _surface(stack.values, THRESHOLD, stack.affine, path, stack.heights)
    if path.suffix.lower().removeprefix(".") not in FORMATS:
        volume = read_volume(path)
        side = _volume_side(volume, options)
        if side.meaning is None:
            raise UserError(side.question)
        inside = _inside(side, options.label_value, [])
        if not inside.any():
            raise UserError(f"{path.name} is empty: nothing is inside")
        return _surface(inside.astype(np.float32), THRESHOLD, volume.affine, path, volume.depths)
    mesh = read_mesh(path)
    if mesh.metadata["unit"] == "voxels":
        return mesh
    if mesh.metadata["space"] is None:
        if options.space is None:
            raise UserError(f"{path} does not say whether it is LPS or RAS: give --space lps or --space ras")
        mesh.metadata["space"] = options.space.upper()
    return in_space(mesh, "RAS")


def _surface(
    values: np.ndarray, level: float, affine: np.ndarray | None, path: Path, heights: np.ndarray | None = None
) -> Trimesh:
    try:
        return surface(values, level, affine, heights)
    except ValueError as error:
        raise UserError(f"{path} holds no surface: {error}") from error


# ---- results ---------------------------------------------------------------------------------------------------------


def _summary(rows: list[Row]) -> list[Row]:
    """Mean and standard deviation (n - 1) over the cases; the latter if there are two or more."""
    if not rows:
        return []
    names = [name for name in _columns(rows) if any(isinstance(row.get(name), float) for row in rows)]
    columns = {name: [row[name] for row in rows if name in row and not np.isnan(row[name])] for name in names}
    summary = [{"case": "mean", **{name: _mean(column) for name, column in columns.items()}}]
    if len(rows) > 1:
        deviations = {
            name: float(np.std(column, ddof=1)) if len(column) > 1 else float("nan")
            for name, column in columns.items()
        }
        summary.append({"case": "deviation", **deviations})
    return summary


def _stated(row: Row) -> Row:
    """A row for JSON, which has no NaN: undefined scores become null."""
    return {
        name: None if isinstance(value, float) and np.isnan(value) else value for name, value in row.items()
    }


def _columns(rows: list[Row]) -> list[str]:
    """Columns of the table; matrices and notes go to JSON alone."""
    names = dict.fromkeys(name for row in rows for name, value in row.items() if not isinstance(value, list))
    return list(names) or ["case"]


def _table(rows: list[Row]) -> str:
    """Rows under a header, numbers aligned right."""

    def shown(value: object) -> str:
        if isinstance(value, float):
            return "undefined" if np.isnan(value) else f"{value:.4f}"
        return "" if value is None else str(value)

    names = _columns(rows)
    cells = [names, *([shown(row.get(name)) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip()
        for line in cells
    )


def _write(path: str, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    run(main)
