#!/usr/bin/env python3
"""Fill in the frames of a volume, and of its label, without training: dense slices in minutes on a CPU.

    python interpolate.py -i volume.nii.gz -l label.nii.gz --interp 4 -o dense.nii.gz

writes dense.nii.gz and dense_mask.nii.gz, in the source's space, with 3 slices between each two. If -o is a folder,
it gets what `render.py --nifti` writes: render_img/00000_0.png, ..., render_img.nii.gz, the same of render_mask, and
frames.json, so that `slices_to_ply.py -i FOLDER` meshes it. Nothing is made beyond the last slice.

-i takes what prepare.py takes, and all its other options (--axis, --label_value, --series, --window, ...) work here
too. Frames of prepare.py are given with -s instead. Held-out slices (prepare.py --keep_every N, or --keep_every N
here) are compared with what is made in their place.

Label maps are filled in all labels at once, each voxel one label; masks may be on some slices only.

Methods: motion (optical flow and self super-resolution along the stack, what `train.py --ibfr_target motion` trains
its in-betweens on), linear and cubic (pixel by pixel), sdf (masks through signed distances, images linearly).
"""

from __future__ import annotations

import utils.threads  # noqa: F401  # isort: skip  (before torch)

import argparse
import shlex
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import prepare
from arguments import resolve_device
from in_between.classical import interpolate, interpolate_masks
from in_between.exclusive import interpolate_labels
from in_between.flow import blend_along, flow_at
from in_between.masks import dense_distances, dense_labels
from in_between.prediction import InBetween, pixel_gap
from in_between.progress import Report, shown
from in_between.rows import matching_gap
from in_between.uncertainty import FEWEST, expected_error
from patient.geometry import FILE_NAME, HELDOUT, Geometry, relative_thickness
from patient.label_channels import colours_of_index, ids_of, index_of_ids
from patient.labels import LabelTable
from patient.rendered_volume import Grid, RenderedVolume
from scene.frames import Frames
from utils.errors import ArgumentParser, UserError, positive, run
from utils.files import atomic_folder
from utils.images import MAX_PIXELS, limit_pixels, write_image, write_levels
from utils.metrics import LabelScores, Scores

METHODS = ("motion", "linear", "cubic", "sdf")
NIFTI = (".nii.gz", ".nii")
RENDERS = {"img": "render_img", "seg": "render_mask"}
ERRORS = {"img": "uncertainty_img", "seg": "uncertainty_mask"}
AT_ONCE = 8_000_000  # pixels looked up together
CONTRAST = (0.005, 0.995)
"""Quantiles of a volume that are 0 and 1 to the prediction, as in prepare.py: its networks expect images whose tissue
fills the range. Values beyond are carried along the motion separately, so that nothing is cut off."""
MOTION = 0.9  # share of the progress bar; the rest is for looking up and writing slices

Say = Callable[[str], None]
Predict = Callable[[Sequence[float]], Tensor]
"""Positions (frame index plus fraction) -> (V, C, H, W) in [0, 1]; of label maps ids, (V, 1, H, W)."""


@dataclass(frozen=True)
class Sequences:
    """What to fill in.

    frames: by kind, img or seg: K images, and masks of some or all of them. painted: the frames that have a mask.
    heldout: those left out between the frames, and their positions (frame index plus fraction). window: which
    of the images' [0, 1] is black and white to the prediction and in scores; values beyond it are kept.
    """

    frames: dict[str, Frames]
    geometry: Geometry | None
    painted: list[int]
    heldout: dict[str, tuple[Frames, list[float]]]
    window: tuple[float, float] = (0.0, 1.0)

    @property
    def first(self) -> Frames:
        return next(iter(self.frames.values()))

    @property
    def labels(self) -> LabelTable | None:
        """Of the masks, where these are a label map."""
        return self.frames["seg"].labels if "seg" in self.frames else None

    def __len__(self) -> int:
        return len(self.first)


def main(arguments: Sequence[str] | None = None) -> int:
    options, others = parser().parse_known_args(arguments)
    limit_pixels(options.max_pixels)

    def say(message: str) -> None:
        if not options.quiet:
            print(message, flush=True)

    check(options, others)
    device = resolve_device(options.device)
    with ExitStack() as stack:
        if options.input:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            sequences = from_volume(options, others, folder, say)
        else:
            sequences = from_frames(options.source_path, options.seg_source_path, say)
        grid = grid_of(sequences, options)
        with shown(f"interpolating ({options.method})", options.quiet) as report:
            thickness = relative_thickness(options.slice_thickness, sequences.geometry)
            predictions, errors = predict(
                sequences, options.method, device, report, thickness, options.uncertainty
            )
            names = {} if is_volume(Path(options.output)) else image_names(len(sequences), options.interp)
            slices = len(names) + (len(grid.positions) if grid else 0)
            predictions = counted(predictions, sequences, slices, report)
            scores = score(sequences, predictions)
            written = write(sequences, predictions, grid, names, Path(options.output))
            written += write_errors(sequences, errors, grid, names, Path(options.output))
    for line in written + scores:
        say(line)
    return 0


def parser() -> ArgumentParser:
    """The command line."""
    out = ArgumentParser(
        prog="interpolate.py",
        description=(__doc__ or "").splitlines()[0],
        epilog="With -i, all options of prepare.py work too: see prepare.py --help.",
    )
    out.add_argument("-i", "--input", help="volume, or folder of slices: whatever prepare.py reads")
    out.add_argument("-l", "--label", help="its label, of the same kinds")
    out.add_argument(
        "-s", "--source_path", metavar="ROOT", help="frames of prepare.py instead (ROOT/original/)"
    )
    out.add_argument("--seg_source_path", metavar="ROOT", help="masks of the same frames, or masks alone")
    out.add_argument(
        "-o",
        "--output",
        required=True,
        help="NAME.nii.gz (masks: NAME_mask.nii.gz), or a folder for what render.py --nifti writes",
    )
    out.add_argument(
        "--interp",
        type=positive,
        default=4,
        metavar="N",
        help="slices per slice: N - 1 between each two (default: %(default)s)",
    )
    out.add_argument(
        "--slice_thickness",
        default="",
        metavar="MM",
        help="of the source's slices, in mm (in distances between frames where those are unknown in mm), or header, "
        "for what the DICOM files say: what is made is then thin, at the slices' own places too (method motion)",
    )
    out.add_argument("--method", choices=METHODS, default="motion", help="(default: %(default)s)")
    out.add_argument(
        "--uncertainty",
        action="store_true",
        help="also write the expected absolute error of every pixel, calibrated on the slices themselves: beside "
        "NAME.nii.gz as NAME_uncertainty.nii.gz (of masks, the probability to be wrong: NAME_mask_uncertainty.nii.gz), "
        "in a folder as uncertainty_img and uncertainty_mask (method motion; takes up to three times as long)",
    )
    out.add_argument("--device", default="auto", help="auto, cuda, cuda:N or cpu (default: auto)")
    out.add_argument("--force", action="store_true", help="replace what an earlier run wrote to -o")
    out.add_shared(MAX_PIXELS)
    return out


def check(options: argparse.Namespace, others: Sequence[str]) -> None:
    """Refuse wrong options before anything is read."""
    roots = options.source_path or options.seg_source_path
    if options.slice_thickness and options.method != "motion":
        raise UserError(f"--slice_thickness is not for --method {options.method}: leave one of them out")
    if options.uncertainty and (options.method != "motion" or options.slice_thickness):
        with_ = "--slice_thickness" if options.slice_thickness else f"--method {options.method}"
        raise UserError(
            f"--uncertainty is calibrated for thin slices and --method motion: leave it or {with_} out"
        )
    if bool(options.input) == bool(roots):
        raise UserError("give -i VOLUME, or -s ROOT (a folder of prepare.py), and not both")
    if options.label and not options.input:
        raise UserError("-l is the label of a volume, -i: masks of frames are given with --seg_source_path")
    if others and not options.input:
        raise UserError(f"{others[0]} is no option for frames (--help lists the options)")
    out = Path(options.output)
    if is_volume(out):
        for path in volume_paths(out).values():
            if path.is_dir():
                raise UserError(f"{path} is a folder: give -o another name")
            if path.exists() and not options.force:
                raise UserError(f"{path} is there already: give another name, or --force to replace it")
        return
    if out.suffix and not out.is_dir():
        raise UserError(f"-o {out}: give NAME.nii.gz, or the name of a folder (without a dot)")
    if out.is_file():
        raise UserError(f"{out} is a file: give -o a folder or NAME.nii.gz")
    if out.exists() and any(out.iterdir()):
        folders = [*RENDERS.values(), *ERRORS.values()]
        ours = {FILE_NAME, *folders, *(f"{name}.nii.gz" for name in folders)}
        foreign = sorted(entry.name for entry in out.iterdir() if entry.name not in ours)
        if foreign:
            raise UserError(
                f"{out} holds {foreign[0]}, which interpolate.py did not write: give -o another folder"
            )
        if not options.force:
            raise UserError(f"{out} holds frames already: give another folder, or --force to replace them")


def is_volume(out: Path) -> bool:
    return out.name.lower().endswith(NIFTI)


def volume_paths(out: Path, second: str = "_mask") -> dict[str, Path]:
    """Paths of images and masks, and what is added to the name of the second."""
    suffix = next(suffix for suffix in NIFTI if out.name.lower().endswith(suffix))
    return {"img": out, "seg": out.with_name(f"{out.name[: -len(suffix)]}{second}{out.name[-len(suffix) :]}")}


# ---- what to fill in -------------------------------------------------------------------------------------------------


def from_volume(options: argparse.Namespace, others: Sequence[str], folder: Path, say: Say) -> Sequences:
    """The frames that prepare.py makes of -i and -l, through files in ``folder``."""
    command = ["-i", options.input, "-o", str(folder / "case"), *others]
    command += ["-l", options.label] if options.label else []
    asked = prepare.parser().parse_args(command)
    if asked.bits is None:
        asked.bits = 16  # finer than the steps of any source
    # the whole range, unless a window is asked for
    prepare.read_case(asked, say, percentiles=(0.0, 100.0)).write(folder)
    sequences = from_frames(folder / "img", folder / "seg" if options.label else None, say, known=True)
    if asked.window or asked.percentiles or asked.ct_window:
        return sequences
    return replace(sequences, window=contrast(sequences.frames["img"]))


def from_frames(
    root: str | Path | None, seg_root: str | Path | None, say: Say, known: bool = False
) -> Sequences:
    """The frames in data roots. known: prepare.py has already said what they are."""
    frames, heldout = {}, {}
    roots = {kind: Path(path) for kind, path in (("img", root), ("seg", seg_root)) if path}
    geometry = Geometry.find(next(iter(roots.values())))
    for kind, path in roots.items():
        if not (path / "original").is_dir():
            raise UserError(f"{path} has no folder original/: give the folder of prepare.py that holds it")
        mask = kind == "seg"
        hear: Say = (lambda _: None) if known else say
        frames[kind] = Frames.read(path / "original", say=hear, masks=mask)
        if (path / HELDOUT).is_dir() and geometry is not None:
            meaning = frames[kind].meaning
            left_out = Frames.read(path / HELDOUT, say=hear, consecutive=False, masks=mask, meaning=meaning)
            places = dict(zip(geometry.heldout_slices, geometry.heldout_indices(), strict=True))
            if unknown := [number for number in left_out.numbers if number not in places]:
                raise UserError(
                    f"{path / HELDOUT} holds slice {unknown[0]}, which frames.json does not say was left out: run "
                    "prepare.py again, or remove the folder"
                )
            heldout[kind] = left_out, [places[number] for number in left_out.numbers]
    first, *rest = frames.values()
    if min(map(len, frames.values())) < 2:
        raise UserError(f"{next(iter(roots.values()))} has one frame or one mask: at least 2 are needed")
    painted = list(range(len(first)))
    for other in rest:
        index = {number: k for k, number in enumerate(first.numbers)}
        if set(other.numbers) - set(index) or (other.width, other.height) != (first.width, first.height):
            raise UserError(
                f"{seg_root}: its {len(other)} masks of {other.width} x {other.height} pixels do not match the "
                f"{len(first)} frames of {first.width} x {first.height} pixels of {root}: use the same numbers and size"
            )
        painted = [index[number] for number in other.numbers]
        if len(painted) < len(first):
            say(f"masks of {len(painted)} of {len(first)} frames: the others are filled in too")
    if geometry is not None and len(geometry.slices) != len(first):
        raise UserError(
            f"{next(iter(roots.values()))} has {len(first)} frames, its {FILE_NAME} has {len(geometry.slices)}: run "
            "prepare.py again, or remove that file"
        )
    return Sequences(frames, geometry, painted, heldout)


# ---- filling in ------------------------------------------------------------------------------------------------------


def predict(
    sequences: Sequences,
    method: str,
    device: torch.device,
    report: Report,
    thickness: float = 0.0,
    with_errors: bool = False,
) -> tuple[dict[str, Predict], dict[str, Predict]]:
    """By kind, a function that gives images at any position, and if asked for one that gives their expected absolute
    error. thickness: of a slice, in distances between frames."""
    if method == "motion":
        part_of_all = MOTION / 2 if with_errors else MOTION
        return by_motion(
            sequences, device, lambda part, share: report(part, part_of_all * share), thickness, with_errors
        )
    return {kind: classically(sequences, kind, method) for kind in sequences.frames}, {}


def counted(
    predictions: dict[str, Predict], sequences: Sequences, slices: int, report: Report
) -> dict[str, Predict]:
    """The same predictions, reporting what share of all positions is done. slices: how many of each kind will be
    written."""
    todo = slices * len(predictions) + sum(len(positions) for _, positions in sequences.heldout.values())
    done = 0

    def watched(predict: Predict) -> Predict:
        def of(positions: Sequence[float]) -> Tensor:
            nonlocal done
            found = predict(positions)
            done += len(positions)
            report("slices", MOTION + (1 - MOTION) * done / todo)
            return found

        return of

    return {kind: watched(predict) for kind, predict in predictions.items()}


def by_motion(
    sequences: Sequences,
    device: torch.device,
    report: Report,
    thickness: float = 0.0,
    with_errors: bool = False,
) -> tuple[dict[str, Predict], dict[str, Predict]]:
    """The in-between prediction of images, and of masks along their motion (or their own, where there are no
    images). Thick slices are predicted thin, at their own places too."""
    values = {
        kind: (frames.index() if frames.labels else frames(range(len(frames)))).to(device)
        for kind, frames in sequences.frames.items()
    }
    labels = sequences.labels
    masks = None
    if "seg" in values:
        masks = values["seg"].mean(1, keepdim=True) if labels is None else values["seg"]
    frames = values.get("img", masks if labels is None else colours_of_index(values["seg"][:, 0], labels))
    assert frames is not None
    gap = pixel_gap(sequences.geometry, frames.shape[-1])
    low, high = sequences.window if "img" in values else (0.0, 1.0)
    seen = ((frames - low) / (high - low)).clamp(0, 1)
    beyond = frames - low - (high - low) * seen
    if masks is not None and len(masks) < len(frames):
        known = matching_gap(seen) if gap is None else gap
        if labels is None:
            masks = (dense_distances(seen, masks, sequences.painted, known) > 0).float()
        else:
            masks = dense_labels(seen, masks, len(labels), sequences.painted, known)
    thickness = thickness if "img" in values else 0.0
    if labels is None:
        between = InBetween(seen, masks, gap, report=report, thickness=thickness)
    else:
        assert masks is not None
        between = InBetween(seen, None, gap, report=report, labels=(masks, len(labels)), thickness=thickness)
        masks = _ids(masks, labels)
    last = len(sequences) - 1

    def where(positions: Sequence[float]) -> tuple[Tensor, Tensor]:
        at = torch.tensor(positions, dtype=torch.float64, device=device)
        k = at.floor().long().clamp(max=last - 1)
        return k, (at - k).float()

    def images(positions: Sequence[float]) -> Tensor:
        k, alpha = where(positions)
        found = low + (high - low) * between.images(k, alpha)
        if (low, high) != (0.0, 1.0):
            seen_there = flow_at(between.flow[k], alpha)
            found += blend_along(beyond[k], beyond[k + 1], seen_there, alpha, "bilinear")
        return found if between.thickness else _with_frames(found, frames, positions)

    def inside(positions: Sequence[float]) -> Tensor:
        found = between.masks(*where(positions))
        if labels is not None:
            found = ids_of(found, labels)[:, None]
        return _with_frames(found, masks, positions)

    functions: dict[str, Predict] = {"img": images, "seg": inside}
    predictions = {kind: functions[kind] for kind in sequences.frames}
    if not with_errors:
        return predictions, {}
    if len(seen) < FEWEST:
        raise UserError(f"--uncertainty: {len(seen)} slices; at least {FEWEST} are needed to calibrate it")
    single = masks if labels is None else None  # not of a label map
    expected = expected_error(between, seen, single, report=lambda part, share: report(part, 1 + share))
    errors: dict[str, Predict] = {}
    if "img" in values:
        errors["img"] = lambda positions: (high - low) * expected.images(*where(positions))
    if single is not None:
        errors["seg"] = lambda positions: expected.masks(*where(positions))
    if not errors:
        raise UserError(
            "--uncertainty: label maps have no expected error yet: give images too, or leave it out"
        )
    return predictions, errors


def _ids(index: Tensor, labels: LabelTable) -> Tensor:
    """Indices of labels (..., H, W) as ids, int32."""
    return torch.tensor([0, *labels.ids], dtype=torch.int32, device=index.device)[index.long()]


def contrast(images: Frames) -> tuple[float, float]:
    """The quantiles of CONTRAST, or 0 and 1 if those coincide."""
    low, high = np.quantile(images(range(len(images))).numpy(), CONTRAST).tolist()
    return (low, high) if high > low else (0.0, 1.0)


def _with_frames(found: Tensor, frames: Tensor | None, positions: Sequence[float]) -> Tensor:
    """Predictions, with the frames themselves at whole positions: no rounding, no filter."""
    assert frames is not None
    for number, position in enumerate(positions):
        if position == int(position):
            found[number] = frames[int(position)]
    return found


def classically(sequences: Sequences, kind: str, method: str) -> Predict:
    """Pixel by pixel (linear, cubic), or masks through signed distances (sdf; cubic takes them too)."""
    frames, geometry = sequences.frames[kind], sequences.geometry
    labels = frames.labels
    values = (frames.index() if labels else frames(range(len(frames)))).numpy()
    places = np.arange(len(sequences), dtype=float) if geometry is None else np.array(geometry.positions)
    everywhere = places
    if kind == "seg":
        places = places[sequences.painted]
    columns, rows, _ = (geometry.spacing if geometry else None) or (1.0, 1.0, 1.0)

    def of(positions: Sequence[float]) -> Tensor:
        at = np.interp(positions, np.arange(len(everywhere)), everywhere)
        at = at.clip(places[0], places[-1])  # beyond the first and the last mask, these are repeated
        if labels is not None:
            named = {"cubic": "cubic sdf"}.get(method, method)
            first, last = _around(places, at) if named != "cubic sdf" else (0, len(places))
            index = values[first:last, 0]
            found = interpolate_labels(index, places[first:last], at, len(labels), (rows, columns), named)
            return _ids(torch.from_numpy(found)[:, None], labels)
        if kind == "seg" and method in ("sdf", "cubic"):
            how = "cubic" if method == "cubic" else "linear"
            # Linear needs neighbours alone: distances of all masks would be computed anew for every batch.
            first, last = _around(places, at) if how == "linear" else (0, len(places))
            inside = values[first:last].mean(1) >= 0.5
            filled = interpolate_masks(inside, places[first:last], at, (rows, columns), how)
            return torch.from_numpy(filled[:, None].astype(np.float32))
        how = "cubic" if method == "cubic" else "linear"
        return torch.from_numpy(interpolate(values, places, at, how)).clamp(0, 1)

    return of


def _around(places: np.ndarray, at: np.ndarray) -> tuple[int, int]:
    """Index of the first of the places around ``at``, and one past the last; at least two places."""
    first = min(max(0, int(np.searchsorted(places, at.min(), "right")) - 1), len(places) - 2)
    return first, max(first + 2, int(np.searchsorted(places, at.max(), "left")) + 1)


# ---- scores ----------------------------------------------------------------------------------------------------------


def score(sequences: Sequences, predictions: dict[str, Predict]) -> list[str]:
    """One line per kind that has held-out slices."""
    lines = []
    for kind, (truth, positions) in sequences.heldout.items():
        labels = truth.labels
        scores = Scores() if labels is None else LabelScores()
        number = {position: index for index, position in enumerate(positions)}
        for some in batches(positions, truth):
            places = [number[position] for position in some]
            if labels is not None:
                index = index_of_ids(predictions[kind](some).cpu(), labels)[:, 0]
                scores += LabelScores.of_labels(index, truth.index(places)[:, 0].cpu(), len(labels))
                continue
            chosen = truth(places)
            low, high = sequences.window if kind == "img" else (0.0, 1.0)
            pair = (predictions[kind](some).cpu(), chosen)
            scores += Scores.of(*(((images - low) / (high - low)).clamp(0, 1) for images in pair))
        what = (
            f"{'Dice' if labels is None else f'mean Dice of {len(labels)} labels'} {scores.dice:.4f}"
            if kind == "seg"
            else f"{scores.mean_psnr:.2f} dB, SSIM {scores.mean_ssim:.4f}"
        )
        lines.append(f"{len(positions)} held-out {'masks' if kind == 'seg' else 'slices'}: {what}")
        if labels is not None and isinstance(scores, LabelScores):
            each = zip(labels, scores.label_dice, strict=True)
            lines += [f"  {label.id} {label.name}: {dice:.4f}" for label, dice in each]
    return lines


def batches(positions: Sequence[float], frames: Frames) -> Iterator[Sequence[float]]:
    """A few positions at a time."""
    step = max(1, AT_ONCE // (frames.width * frames.height * frames.channels))
    for first in range(0, len(positions), step):
        yield positions[first : first + step]


# ---- writing ---------------------------------------------------------------------------------------------------------


def grid_of(sequences: Sequences, options: argparse.Namespace) -> Grid | None:
    """Where the slices of a volume lie. None for a folder output whose frames have no place, or are in colour."""
    geometry = sequences.geometry
    wanted = is_volume(Path(options.output))
    coloured = "img" in sequences.frames and sequences.frames["img"].channels != 1
    if geometry is None or geometry.affine is None or coloured:
        if wanted:
            why = (
                "a volume holds one intensity, and these frames are in colour"
                if coloured
                else "it is unknown where these frames lie in the patient"
            )
            raise UserError(f"-o {options.output}: {why}; give a folder instead")
        return None
    return Grid(geometry, (sequences.first.width, sequences.first.height), options.interp)


def image_names(count: int, interp: int) -> dict[float, str]:
    """File names by position, as render.py names them, up to the last frame."""
    return {
        k + i / interp: f"{k:05d}_{i}.png"
        for k in range(count)
        for i in range(interp if k < count - 1 else 1)
    }


def write(
    sequences: Sequences,
    predictions: dict[str, Predict],
    grid: Grid | None,
    names: dict[float, str],
    out: Path,
) -> list[str]:
    """Write the volumes or the folder, complete or not at all. Returns the lines to print."""
    volumes = {}
    if grid is not None:
        for kind, predict in predictions.items():
            labels = sequences.labels if kind == "seg" else None
            volumes[kind] = RenderedVolume(grid, kind == "seg" and labels is None, labels)
            fill(volumes[kind], predict, sequences.frames[kind])
    if is_volume(out):
        paths = volume_paths(out) if len(volumes) > 1 else dict.fromkeys(volumes, out)
        for kind, volume in volumes.items():
            volume.write(paths[kind])
        return [
            f"{' x '.join(map(str, v.values.shape))} voxels in {paths[kind]}" for kind, v in volumes.items()
        ]
    with atomic_folder(out) as folder:
        for kind, predict in predictions.items():
            frames = sequences.frames[kind]
            bits = 8 if kind == "seg" or frames.bits == 8 else 16
            for some in batches(list(names), frames):
                for position, image in zip(some, _in_range(predict(some)).cpu(), strict=True):
                    if frames.labels is not None:
                        ids = image.movedim(0, -1).numpy()
                        write_levels(
                            folder / RENDERS[kind] / names[position], ids.astype(frames.labels.dtype)
                        )
                        continue
                    image = image if kind == "img" else (image >= 0.5).float()
                    write_image(folder / RENDERS[kind] / names[position], image.movedim(0, -1).numpy(), bits)
            if kind in volumes:
                volumes[kind].write(folder / f"{RENDERS[kind]}.nii.gz")
        if sequences.geometry is not None:
            sequences.geometry.save(folder / FILE_NAME)
    lines = [f"{len(names)} images in {out / RENDERS[kind]}" for kind in predictions]
    if grid is None:
        lines.append("  no NIfTI volume: the frames have no place in a patient, or are in colour")
    return [*lines, f"next: python slices_to_ply.py -i {shlex.quote(str(out))} -o meshes"]


def write_errors(
    sequences: Sequences,
    errors: dict[str, Predict],
    grid: Grid | None,
    names: dict[float, str],
    out: Path,
) -> list[str]:
    """Write the expected absolute errors as volumes, in the source's intensities, or as 16-bit images whose full scale
    is that of the frames; of masks, probabilities. Returns the lines to print."""
    lines = []
    for kind, predict in errors.items():
        frames, name = sequences.frames[kind], ERRORS[kind]
        if grid is not None:
            low, high = grid.geometry.window if kind == "img" else (0.0, 1.0)
            volume = RenderedVolume(grid, False, span=high - low)
            fill(volume, predict, frames)
            path = out / f"{name}.nii.gz"
            if is_volume(out):
                own = volume_paths(out)["seg" if kind == "seg" and len(sequences.frames) > 1 else "img"]
                path = volume_paths(own, "_uncertainty")["seg"]
            volume.write(path)
            lines.append(f"expected absolute error in {path}")
        if names:
            with atomic_folder(out / name) as folder:
                for some in batches(list(names), frames):
                    for position, image in zip(some, predict(some).cpu(), strict=True):
                        write_image(folder / names[position], image.movedim(0, -1).numpy(), 16)
            lines.append(f"expected absolute error as {len(names)} images in {out / name}")
    return lines


def _in_range(images: Tensor) -> Tensor:
    """Images in [0, 1]; ids as they are."""
    return images.clamp(0, 1) if images.is_floating_point() else images


def fill(volume: RenderedVolume, predict: Predict, frames: Frames) -> None:
    """Put every slice in its place."""
    slot = 0
    for some in batches(volume.grid.positions, frames):
        for image in _in_range(predict(some)).cpu().numpy():
            volume.put(slot, image[0])
            slot += 1


if __name__ == "__main__":
    run(main, "take smaller frames (prepare.py --crop), or --device cpu")
