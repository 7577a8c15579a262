"""Turn a volume, and its label if there is one, into frames to train on.

    python prepare.py -i volume.nii.gz -l label.nii.gz -o data/case
    python train.py -s data/case/img --pipeline joint --seg_source_path data/case/seg

writes data/case/img/original/0000.png ..., data/case/seg/original/0000.png ... (0 and 255) and data/case/frames.json,
which records where the frames lie (`patient.geometry.Geometry`), so that meshes come out in patient millimetres. With
--keep_every, the frames left out in between go to img/heldout and seg/heldout, named by their source slice.

Frames show anatomy upright: columns and rows grow towards the patient's left, posterior or inferior. Output is
written beside OUT and renamed at the end: OUT is complete or untouched.
"""

from __future__ import annotations

import utils.threads  # noqa: F401  # isort: skip  (before torch)

import argparse
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from nibabel.orientations import aff2axcodes
from scipy.ndimage import find_objects

from patient.geometry import (
    FILE_NAME,
    HELDOUT,
    DicomSource,
    FrameCut,
    Geometry,
    cut_geometry,
    upright_cut,
    voxel_sizes,
)
from patient.label_volumes import LabelVolume, Wanted, read_labels
from patient.labels import LabelTable
from patient.meshes import otsu
from patient.readers import READERS, read_volume
from patient.volumes import Choice, Volume
from utils.errors import ArgumentParser, UserError, positive, run
from utils.files import atomic_folder
from utils.images import MAX_PIXELS, limit_pixels, write_image, write_levels

Say = Callable[[str], None]

# Usual level and width in Hounsfield units: Radiopaedia, "Windowing (CT)", https://radiopaedia.org/articles/windowing-ct
CT_WINDOWS = {
    "brain": (40, 80),
    "bone": (400, 1800),
    "lung": (-600, 1500),
    "soft_tissue": (50, 400),
}
PERCENTILES = (0.5, 99.5)  # of the volume: the default window
MARGIN = 10.0  # of --crop: millimetres, or pixels and slices where the source gives none
KINDS = {
    "original": "slices",
    HELDOUT: "heldout_slices",
}  # folders of frames, and the Geometry field that lists their slices


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    say: Say = (lambda line: None) if options.quiet else print
    limit_pixels(options.max_pixels)
    out = Path(options.output)
    _check_output(out, options.force)

    case = read_case(options, say)
    with atomic_folder(out) as folder:
        case.write(folder)
    geometry = case.geometry

    say(_summary(geometry))
    if geometry.durations() is not None:
        say("  unevenly spaced: frames.json has their positions, and train.py takes true times from them")
    root = shlex.quote(str(out / "img"))
    say(f"  {out / 'img'}: {len(geometry.slices)} frames of {geometry.bits} bits; train with -s {root}")
    if case.label is not None:
        kept = [index for index in geometry.slices if case.label.painted[index]]
        some = "" if len(kept) == len(geometry.slices) else f" (of {len(kept)} frames)"
        what = "label maps" if geometry.labels is not None else "masks"
        root = shlex.quote(str(out / "seg"))
        say(f"  {out / 'seg'}: their {what}{some}; train with --pipeline joint --seg_source_path {root}")
    return 0


@dataclass(frozen=True, eq=False)
class PreparedCase:
    """A volume and its label as frames, including those between the kept ones.

    frames: (slice, row, column[, channel]), as stored. full_scale: for pictures, the values of 0 and 1. masks: (slice,
    row, column) label numbers, valid on the slices that ``label`` calls painted. geometry: which slices are kept.
    """

    frames: np.ndarray
    full_scale: tuple[float, float] | None
    masks: np.ndarray | None
    label: LabelVolume | None
    geometry: Geometry

    def write(self, folder: Path) -> None:
        """img/, seg/ and frames.json."""
        _write_frames(folder / "img", self.frames, self.full_scale, self.geometry)
        if self.masks is not None:
            assert self.label is not None
            _write_masks(folder / "seg", self.masks, self.label, self.geometry)
        self.geometry.save(folder / FILE_NAME)


def read_case(
    options: argparse.Namespace, say: Say, percentiles: tuple[float, float] = PERCENTILES
) -> PreparedCase:
    """The volume and the label that ``options`` (of `parser`) name.

    say: gets a line for each thing that was read, and for anything unusual about it. percentiles: of the window if
    ``options`` choose none. Raises UserError.
    """
    choice = Choice(
        options.frame,
        options.series,
        options.acquisition,
        options.echo,
        options.time,
        options.form,
        options.resample,
    )
    volume = read_volume(options.input, choice=choice)
    if options.frame and volume.index is None:
        raise UserError(f"{options.input} holds one volume: there is no --frame {options.frame}")
    say(f"{options.input}: {_describe(volume)}")
    for note in volume.notes:
        say(f"  note: {note}")
    cut = upright_cut(volume.affine, _axis(options.axis, volume))
    measured = _measured(volume, say)
    window = _window(volume, measured, options, percentiles, say)
    label = None
    if options.label is not None:
        wanted = Wanted(
            options.label_value,
            options.labels,
            None if options.label_names is None else LabelTable.read(options.label_names),
            options.soft,
            options.label_frame,
            options.label_slices,
        )
        label = read_labels(options.label, volume, options.input, wanted, cut.axes[2], say)
    geometry = cut_geometry(
        cut,
        volume.affine,
        volume.values.shape,
        options.keep_every,
        None
        if options.crop is None
        else _box(cut, volume, None if label is None else label.inside, window, options.crop),
        volume.depths if cut.axes[2] == 2 else None,
        window=window,
        bits=options.bits or volume.bits,
        source=volume.name,
        volume=volume.index,
        sizes=volume.sizes and tuple(volume.sizes[axis] for axis in cut.axes),
        labels=None if label is None else label.table,
        dicom=DicomSource.of(options.input, volume.instances, choice),
        thickness=volume.thickness if cut.axes[2] == 2 else None,
    )
    if len(geometry.slices) < 2:
        raise UserError(
            f"{options.input} gives {len(geometry.slices)} frame across axis {geometry.axis} of its shape"
            f" {volume.values.shape[:3]}: at least 2 are needed (see --axis and --keep_every)"
        )
    masks = None if label is None else cut.frames(label.numbers)
    if label is not None and masks is not None:
        kept = [index for index in geometry.slices if label.painted[index]]
        if not masks[kept].any():
            raise UserError(
                f"{' '.join(options.label)} has nothing labelled in the frames that --keep_every keeps"
            )

    return PreparedCase(cut.frames(volume.values), volume.full_scale, masks, label, geometry)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = ArgumentParser(prog="prepare.py", description=(__doc__ or "").split("\n")[0])
    kinds = ", ".join(READERS)
    parser.add_argument(
        "-i", "--input", required=True, help=f"volume ({kinds}), or a folder of DICOM files or images"
    )
    parser.add_argument(
        "-l",
        "--label",
        nargs="+",
        help="its label, of the same kinds, or a mask for each structure; resampled (nearest) if on another grid",
    )
    parser.add_argument("--series", metavar="UID", help="which series of a DICOM folder that holds several")
    parser.add_argument(
        "--acquisition", type=int, metavar="N", help="which acquisition of a DICOM series, by its number"
    )
    parser.add_argument("--echo", type=int, metavar="N", help="which echo of a DICOM series, by its number")
    parser.add_argument(
        "--time", type=int, metavar="N", help="which temporal position of a DICOM series, by its number"
    )
    parser.add_argument(
        "--form",
        choices=("q", "s"),
        help="which of NIfTI's two affines places the volume (default: the sform, where there is one)",
    )
    parser.add_argument(
        "--resample",
        type=_margin,
        metavar="MM",
        help="make an even volume of a tracked sequence (PLUS, SlicerIGT), with voxels of this size",
    )
    parser.add_argument(
        "--label_value",
        type=float,
        nargs="+",
        metavar="V",
        help="labels to merge into one mask (default: all but 0)",
    )
    parser.add_argument(
        "--labels", nargs="+", metavar="ID", help="labels to keep apart: numbers, names, or all"
    )
    parser.add_argument(
        "--label_names",
        metavar="FILE",
        help="names and colours of labels: JSON, CSV, nnU-Net's dataset.json, 3D Slicer's or ITK-SNAP's table",
    )
    parser.add_argument(
        "--soft", action="store_true", help="the label is a probability: inside from half of full scale"
    )
    parser.add_argument("--label_frame", type=int, metavar="INDEX", help="which layer of a 4-D label, from 0")
    parser.add_argument(
        "--label_slices",
        default="auto",
        metavar="auto|all|LIST",
        help="slices that were annotated, such as 0,5,10 or 0:50:5; auto: all, or only the labelled ones if no two"
        " neighbours are labelled",
    )
    parser.add_argument("-o", "--output", required=True, help="folder to write")
    parser.add_argument(
        "--axis",
        choices=("auto", "0", "1", "2"),
        default="auto",
        help="array axis to cut across; auto: the one with the coarsest spacing, the last if several are equal",
    )
    window = parser.add_mutually_exclusive_group()
    window.add_argument(
        "--window", type=float, nargs=2, metavar=("LO", "HI"), help="intensities that become black and white"
    )
    window.add_argument(
        "--percentiles",
        type=float,
        nargs=2,
        metavar=("LO", "HI"),
        help=f"the window, as percentiles of the volume (default: {PERCENTILES[0]:g} {PERCENTILES[1]:g}; images keep"
        " their full scale)",
    )
    window.add_argument(
        "--ct_window",
        choices=CT_WINDOWS,
        help="a standard CT window in Hounsfield units, as level and width: "
        + ", ".join(f"{name} {level} {width}" for name, (level, width) in CT_WINDOWS.items()),
    )
    parser.add_argument(
        "--bits",
        type=int,
        choices=(8, 16),
        help="bits per pixel (default: 16, or 8 if the source has no more)",
    )
    parser.add_argument(
        "--keep_every",
        type=positive,
        default=1,
        metavar="N",
        help="train on one frame in N; the others are held out",
    )
    parser.add_argument(
        "--crop",
        type=_margin,
        nargs="?",
        const=MARGIN,
        metavar="MM",
        help="keep the box of the label, or else of what is not background, and this margin around it (default:"
        f" {MARGIN:g} mm; pixels and slices if millimetres are unknown)",
    )
    parser.add_argument("--frame", type=int, metavar="INDEX", help="which volume of a 4-D file, from 0")
    parser.add_argument(
        "--force", action="store_true", help="replace frames that prepare.py wrote to OUT earlier"
    )
    parser.add_shared(MAX_PIXELS)
    return parser


def _margin(text: str) -> float:
    try:
        margin = float(text)
    except ValueError:
        margin = -1.0
    if not 0 <= margin < np.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number of millimetres")
    return margin


def _check_output(out: Path, force: bool) -> None:
    """Refuse to replace anything that this script did not write."""
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"{out} is a file: give -o a folder")
    ours = {"img", "seg", FILE_NAME}
    ours |= {f"{root}/{folder}" for root in ("img", "seg") for folder in (*KINDS, "mirror")}
    entries = [*out.iterdir(), *out.glob("img/*"), *out.glob("seg/*")]
    foreign = sorted(name for entry in entries if (name := entry.relative_to(out).as_posix()) not in ours)
    if foreign:
        raise UserError(f"{out} holds {foreign[0]}, which prepare.py did not write: give -o another folder")
    if entries and not force:
        raise UserError(f"{out} holds frames already: give another folder, or --force to replace them")


def _axis(wanted: str, volume: Volume) -> int:
    if wanted != "auto":
        if volume.depths is not None and wanted != "2":
            raise UserError(
                f"the slices of {volume.name} are unevenly spaced: cut along them, with --axis 2 (frames across axis"
                f" {wanted} would have uneven pixels)"
            )
        return int(wanted)
    if volume.affine is None or volume.depths is not None:
        return 2
    spacing = np.array(voxel_sizes(volume.affine))
    return int(
        np.flatnonzero(spacing > spacing.max() * (1 - 1e-3))[-1]
    )  # equal to a thousandth, because headers round


def _measured(volume: Volume, say: Say) -> np.ndarray | None:
    """Mask of the voxels that the window is computed from (finite, not padding); None for all of them."""
    inside = None
    if volume.padded is not None:
        inside = ~volume.padded
        share = np.count_nonzero(volume.padded) / inside.size
        if not inside.any():
            raise UserError(f"{volume.name} is padding everywhere: nothing was measured")
        say(f"  note: {share:.1%} of the voxels are padding, and are left out of percentiles")
    if volume.values.dtype.kind != "f":
        return inside
    finite = np.isfinite(volume.values)
    bad = finite.size - np.count_nonzero(finite)
    if bad == finite.size:
        raise UserError(f"{volume.name} has no finite voxel")
    if not bad:
        return inside
    say(f"  note: {bad:,} voxels are NaN or infinite; they get the low end of the window")
    return finite if inside is None else finite & inside


def _window(
    volume: Volume,
    measured: np.ndarray | None,
    options: argparse.Namespace,
    percentiles: tuple[float, float],
    say: Say,
) -> tuple[float, float]:
    """The intensities that become 0 and 1."""
    values = volume.values if measured is None else volume.values[measured]
    smallest, largest = float(values.min()), float(values.max())
    low, high = options.window or (0.0, 0.0)
    if options.ct_window is not None:
        level, width = CT_WINDOWS[options.ct_window]
        low, high = level - width / 2, level + width / 2
    elif options.window is not None and not (np.isfinite(options.window).all() and low < high):
        raise UserError(f"--window {low:g} {high:g} is empty: LO has to be below HI")
    if low < high:
        if largest <= low or smallest >= high:
            raise UserError(
                f"the window {low:g} to {high:g} shows nothing: {volume.name} ranges from {smallest:g} to {largest:g}"
            )
        if options.ct_window is not None and smallest > -200:
            say(f"  note: no value is below {smallest:g}: are these Hounsfield units, where air is -1000?")
        return low, high
    if options.percentiles is None and volume.full_scale is not None:
        return volume.full_scale
    first, last = options.percentiles or percentiles
    if not 0 <= first < last <= 100:
        raise UserError(
            f"--percentiles {first:g} {last:g} is empty: they go from 0 to 100, the lower one first"
        )
    low, high = (float(value) for value in np.percentile(values, (first, last)))
    if low < high:
        return low, high
    if smallest == largest:
        raise UserError(
            f"{volume.name} is {smallest:g} everywhere: its window is empty, and there is nothing to see"
        )
    say(f"  note: percentiles {first:g} and {last:g} are both {low:g}; the window is the whole range instead")
    return smallest, largest


def _box(
    cut: FrameCut, volume: Volume, label: np.ndarray | None, window: tuple[float, float], margin: float
) -> tuple[slice, slice, slice]:
    """Columns, rows and slices that hold the label, or else what is not background, plus the margin.

    Background is darker than half of Otsu's threshold, within the window: the threshold itself would cut off dim
    borders.
    """
    if label is None:
        values = np.nan_to_num(volume.values.astype(np.float32), nan=window[0])
        unit = np.clip((values - window[0]) / np.ptp(window), 0, 1)
        unit = unit if unit.ndim == 3 else unit[..., :3].max(axis=3)
        inside = unit > otsu(unit) / 2
    else:
        inside = label
    found = find_objects(cut.frames(inside).astype(np.uint8))[0]  # frame, row, column
    steps = (1.0, 1.0, 1.0) if volume.affine is None else voxel_sizes(volume.affine)
    box = []
    for axis, kept in zip(cut.axes, reversed(found), strict=True):
        more = int(np.ceil(margin / steps[axis] - 1e-6))
        box.append(slice(max(kept.start - more, 0), min(kept.stop + more, inside.shape[axis])))
    return box[0], box[1], box[2]


def _write_frames(
    root: Path,
    stack: np.ndarray,
    full_scale: tuple[float, float] | None,
    geometry: Geometry,
) -> None:
    """The kept and the held-out frames of stack (frame, row, column[, channel]) as PNG files."""
    low, high = geometry.window
    (left, top), (columns, rows) = geometry.offset, geometry.size
    for folder, field in KINDS.items():
        for number, index in enumerate(getattr(geometry, field)):
            stored = stack[index, top : top + rows, left : left + columns].astype(np.float64)
            unit = np.where(np.isfinite(stored), (stored - low) / (high - low), 0.0)
            if unit.shape[2:] == (4,) and full_scale is not None:
                unit[:, :, 3] = stored[:, :, 3] / full_scale[1]  # opacity is not an intensity
            name = number if folder == "original" else index
            write_image(root / folder / f"{name:04d}.png", unit, geometry.bits)


def _write_masks(root: Path, masks: np.ndarray, label: LabelVolume, geometry: Geometry) -> None:
    """The painted frames of masks (frame, row, column): 0 and 255, or label numbers of 8 or 16 bits."""
    (left, top), (columns, rows) = geometry.offset, geometry.size
    dtype = np.uint8 if label.table is None else label.table.dtype
    for folder, field in KINDS.items():
        for number, index in enumerate(getattr(geometry, field)):
            if not label.painted[index]:
                continue
            levels = masks[index, top : top + rows, left : left + columns]
            if label.table is None:
                levels = (levels != 0) * np.uint8(255)
            name = number if folder == "original" else index
            write_levels(root / folder / f"{name:04d}.png", levels.astype(dtype))


def _describe(volume: Volume) -> str:
    shape = " x ".join(map(str, volume.values.shape[:3]))
    if volume.affine is None:
        return f"{shape} (columns, rows, frames), {_known_sizes(volume)}"
    spacing = " x ".join(f"{size:.4g}" for size in voxel_sizes(volume.affine))
    return f"{shape} voxels of {spacing} mm, axes to {''.join(aff2axcodes(volume.affine))}"


def _known_sizes(volume: Volume) -> str:
    """The known voxel sizes of a volume without an affine."""
    if volume.sizes is None or not any(volume.sizes):
        return "unknown size in millimetres"
    sizes = ["?" if size is None else f"{size:.4g}" for size in volume.sizes]
    return f"of {' x '.join(sizes)} mm, unknown place in the patient"


def _summary(geometry: Geometry) -> str:
    columns, rows = geometry.size
    place = ""
    if geometry.affine is not None:
        gaps = np.diff(geometry.positions)
        uneven = geometry.durations() is not None
        place = (
            f", {gaps.min():.4g} to {gaps.max():.4g} mm apart" if uneven else f", {gaps.mean():.4g} mm apart"
        )
    kept = f" of {geometry.slice_count} slices" if len(geometry.slices) < geometry.slice_count else ""
    kept += f", {len(geometry.heldout_slices)} held out" if geometry.heldout_slices else ""
    return (
        f"{len(geometry.slices)} frames{kept} across axis {geometry.axis}, {columns} x {rows} pixels{place},"
        f" window {geometry.window[0]:.6g} to {geometry.window[1]:.6g}"
    )


if __name__ == "__main__":
    run(main)
