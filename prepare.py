"""Turn a volume, and its label if there is one, into frames to train on.

    python prepare.py -i volume.nii.gz -l label.nii.gz -o data/case
    python train.py -s data/case/img --pipeline joint --seg_source_path data/case/seg

writes data/case/img/original/0000.png ..., data/case/seg/original/0000.png ... (0 and 255) and data/case/frames.json,
which records where the frames lie (`patient.geometry.Geometry`), so that meshes come out in patient millimetres. With
--keep_every, the frames left out between the others go to img/heldout and seg/heldout, named by their source slice.

Frames show anatomy upright: columns and rows grow towards the patient's left, posterior or inferior. All is written
beside OUT first and renamed at the end: OUT is complete or untouched.
"""

from __future__ import annotations

import utils.threads  # noqa: F401  # isort: skip  (before torch)

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from nibabel.affines import apply_affine
from nibabel.orientations import aff2axcodes
from scipy.ndimage import find_objects

from patient.geometry import FILE_NAME, HELDOUT, FrameCut, Geometry, cut_geometry, upright_cut, voxel_sizes
from patient.meshes import otsu
from patient.readers import READERS, read_volume
from patient.volumes import Choice, Volume
from utils.errors import ArgumentParser, UserError, positive, run
from utils.files import atomic_folder
from utils.images import MAX_PIXELS, limit_pixels, write_image

Say = Callable[[str], None]

# Level and width in Hounsfield units, as customary: Radiopaedia, "Windowing (CT)", https://radiopaedia.org/articles/windowing-ct
CT_WINDOWS = {
    "brain": (40, 80),
    "bone": (400, 1800),
    "lung": (-600, 1500),
    "soft_tissue": (50, 400),
}
MARGIN = 10.0  # of --crop: millimetres, or pixels and slices where the source knows none
KINDS = {
    "original": "slices",
    HELDOUT: "heldout_slices",
}  # folders of frames, and the field that lists theirs


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    say: Say = (lambda line: None) if options.quiet else print
    limit_pixels(options.max_pixels)
    out = Path(options.output)
    _check_output(out, options.force)

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
    window = _window(volume, measured, options, say)
    label = None
    if options.label is not None:
        label = _label(options.label, options.label_value, options.frame, volume, say)
    geometry = cut_geometry(
        cut,
        volume.affine,
        volume.values.shape,
        options.keep_every,
        None if options.crop is None else _box(cut, volume, label, window, options.crop),
        volume.depths if cut.axes[2] == 2 else None,
        window=window,
        bits=options.bits or volume.bits,
        source=volume.name,
        volume=volume.index,
        sizes=volume.sizes and tuple(volume.sizes[axis] for axis in cut.axes),
    )
    if len(geometry.slices) < 2:
        raise UserError(
            f"{options.input} gives {len(geometry.slices)} frame across axis {geometry.axis} of its shape"
            f" {volume.values.shape[:3]}: at least 2 are needed (see --axis and --keep_every)"
        )
    masks = None if label is None else cut.frames(label)
    if masks is not None and not masks[list(geometry.slices)].any():
        raise UserError(f"{options.label} has nothing labelled in the frames that --keep_every keeps")

    with atomic_folder(out) as folder:
        _write_frames(folder / "img", cut.frames(volume.values), volume.full_scale, geometry)
        if masks is not None:
            _write_frames(folder / "seg", masks, None, geometry, mask=True)
        geometry.save(folder / FILE_NAME)

    say(_summary(geometry))
    if geometry.durations() is not None:
        say("  unevenly spaced: frames.json has their positions, and train.py takes true times from them")
    say(
        f"  {out / 'img'}: {len(geometry.slices)} frames of {geometry.bits} bits; train with -s {out / 'img'}"
    )
    if masks is not None:
        say(f"  {out / 'seg'}: their masks; train with --pipeline joint --seg_source_path {out / 'seg'}")
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = ArgumentParser(prog="prepare.py", description=(__doc__ or "").split("\n")[0])
    kinds = ", ".join(READERS)
    parser.add_argument(
        "-i", "--input", required=True, help=f"volume ({kinds}), or a folder of DICOM files or images"
    )
    parser.add_argument(
        "-l", "--label", help="its label, of the same kinds; another grid is resampled (nearest)"
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
        "--label_value", type=float, nargs="+", metavar="V", help="which labels count (default: all but 0)"
    )
    parser.add_argument("-o", "--output", required=True, help="folder to write")
    parser.add_argument(
        "--axis",
        choices=("auto", "0", "1", "2"),
        default="auto",
        help="array axis to cut across; auto: the one of the coarsest spacing, the last of equals",
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
        help="the window, as percentiles of the volume (default: 0.5 99.5; images keep their full scale)",
    )
    window.add_argument(
        "--ct_window",
        choices=CT_WINDOWS,
        help="a customary window of CT in Hounsfield units, as level and width: "
        + ", ".join(f"{name} {level} {width}" for name, (level, width) in CT_WINDOWS.items()),
    )
    parser.add_argument(
        "--bits",
        type=int,
        choices=(8, 16),
        help="bits of a pixel (default: 16, or 8 where the source has no more)",
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
        f" {MARGIN:g} mm; pixels and slices where no millimetres are known)",
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
    )  # headers round: equal to a thousandth


def _measured(volume: Volume, say: Say) -> np.ndarray | None:
    """Mask of the voxels that the window is made of, or None of all: finite, and not marked as padding."""
    inside = None if volume.padded is None else ~volume.padded
    if inside is not None:
        share = np.count_nonzero(volume.padded) / inside.size
        if not inside.any():
            raise UserError(f"{volume.name} is padding everywhere: nothing was measured")
        say(f"  note: {share:.1%} of the voxels are padding (PixelPaddingValue), and left out of percentiles")
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
    volume: Volume, measured: np.ndarray | None, options: argparse.Namespace, say: Say
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
                f"the window {low:g} to {high:g} shows nothing: {volume.name} goes from {smallest:g} to {largest:g}"
            )
        if options.ct_window is not None and smallest > -200:
            say(f"  note: no value is under {smallest:g}: are these Hounsfield units, where air is -1000?")
        return low, high
    if options.percentiles is None and volume.full_scale is not None:
        return volume.full_scale
    first, last = options.percentiles or (0.5, 99.5)
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
    """Columns, rows and slices that hold the label, or else what is not background, and the margin around it.

    Background is what is darker in the window than half of Otsu's threshold: the threshold itself would cut off dim
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


def _label(
    path: str, wanted: Sequence[float] | None, index: int | None, volume: Volume, say: Say
) -> np.ndarray:  # (I, J, K) bool
    """The label on the volume's grid."""
    label = read_volume(path, index)
    for note in label.notes:
        say(f"  note on {path}: {note}")
    shape = volume.values.shape[:3]
    if label.lossy:
        raise UserError(
            f"{path} is compressed like a video or JPEG, which does not keep labels exactly: give PNG, TIFF or a volume"
        )
    values = label.values
    if values.ndim == 4:
        if np.ptp(values[..., :3], axis=3).any():  # opacity is no label
            raise UserError(f"{path} holds colours: a label holds one number a voxel")
        values = values[..., 0]
    if bad := values.size - np.count_nonzero(np.isfinite(values)):
        say(f"  note: {bad:,} voxels of {path} are NaN or infinite; they count as background")
        values = np.nan_to_num(values, posinf=0, neginf=0)
    if wanted:
        inside = np.isin(values, wanted)
        absent = [f"{value:g}" for value in wanted if not (values == value).any()]
        if absent and inside.any():
            say(f"  note: no voxel of {path} has the value {' or '.join(absent)}")
    elif values.dtype.kind == "f" and not np.array_equal(values, np.rint(values)):
        say("  note: the label has fractions; voxels of 0.5 and more count as inside")
        inside = values >= 0.5
    else:
        inside = values != 0
    count = np.count_nonzero(inside)
    if not count:
        present = ", ".join(f"{value:g}" for value in np.unique(values)[:12])
        what = f"of value {' or '.join(f'{value:g}' for value in wanted)}" if wanted else "labelled"
        raise UserError(f"{path} is empty: nothing is {what} (it holds {present})")

    if volume.affine is None or label.affine is None:
        if inside.shape != shape:
            raise UserError(f"{path} has shape {inside.shape}, but {volume.name} {shape}: they have to agree")
        if not np.array_equal(_depths(volume), _depths(label)):
            raise UserError(
                f"{path} and {volume.name} are numbered differently: a mask has the number of its frame"
            )
        if (volume.affine is None) != (label.affine is None):
            say(
                f"  note: only one of them knows millimetres; [:, :, k] of {path} is taken as the mask of frame k"
            )
    elif not _same_grid(volume, label):
        to_label = np.linalg.inv(label.affine) @ volume.affine
        resampled = _resample(inside, _depths(label), to_label, shape, _depths(volume))
        if not resampled.any():
            raise UserError(
                f"{path} of shape {inside.shape} does not overlap {volume.name} of shape {shape}: their affines place"
                " them apart"
            )
        kept = np.count_nonzero(resampled) * abs(np.linalg.det(to_label)) / count
        say(
            f"  note: {path} lies on another grid; nearest-neighbour resampling keeps {kept:.1%} of its volume"
        )
        inside, count = resampled, np.count_nonzero(resampled)
    say(f"{path}: {count:,} voxels inside, {count / inside.size:.2%} of the volume")
    return inside


def _same_grid(first: Volume, second: Volume) -> bool:
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
    inside: np.ndarray, depths: np.ndarray, to_label: np.ndarray, shape: tuple[int, ...], targets: np.ndarray
) -> np.ndarray:
    """A label's mask on a volume's grid of `shape`: each voxel takes the one that it lies in, if any.

    inside: (I, J, K) bool, with slices at `depths`. to_label: indices of the volume to the label's. targets: where the
    volume's slices lie.
    """
    resampled = np.zeros(shape, bool)
    plane = np.stack(np.meshgrid(np.arange(shape[0]), np.arange(shape[1]), indexing="ij"), -1)  # (I, J, 2)
    for k, depth in enumerate(targets):
        at = plane @ to_label[:3, :2].T + (to_label[:3, 2] * depth + to_label[:3, 3])  # (I, J, 3)
        before, after = np.minimum(at[..., 2], 0), np.maximum(at[..., 2] - depths[-1], 0)
        at[..., 2] = np.interp(at[..., 2], depths, np.arange(len(depths))) + before + after  # to slices
        nearest = np.floor(at + (0.5 + 1e-6)).astype(int)  # rounding errors do not cut off a border
        there = ((nearest >= 0) & (nearest < inside.shape)).all(axis=-1)
        resampled[:, :, k][there] = inside[tuple(nearest[there].T)]
    return resampled


def _write_frames(
    root: Path,
    stack: np.ndarray,
    full_scale: tuple[float, float] | None,
    geometry: Geometry,
    mask: bool = False,
) -> None:
    """The kept and the held-out frames of stack (frame, row, column[, channel]) as PNG files."""
    low, high = (0.0, 1.0) if mask else geometry.window
    (left, top), (columns, rows) = geometry.offset, geometry.size
    for folder, field in KINDS.items():
        for number, index in enumerate(getattr(geometry, field)):
            stored = stack[index, top : top + rows, left : left + columns].astype(np.float64)
            unit = np.where(np.isfinite(stored), (stored - low) / (high - low), 0.0)
            if unit.shape[2:] == (4,) and full_scale is not None:
                unit[:, :, 3] = stored[:, :, 3] / full_scale[1]  # opacity is no intensity
            name = number if folder == "original" else index
            write_image(root / folder / f"{name:04d}.png", unit, 8 if mask else geometry.bits)


def _describe(volume: Volume) -> str:
    shape = " x ".join(map(str, volume.values.shape[:3]))
    if volume.affine is None:
        return f"{shape} (columns, rows, frames), {_known_sizes(volume)}"
    spacing = " x ".join(f"{size:.4g}" for size in voxel_sizes(volume.affine))
    return f"{shape} voxels of {spacing} mm, axes to {''.join(aff2axcodes(volume.affine))}"


def _known_sizes(volume: Volume) -> str:
    """What is known of millimetres without a place in a patient."""
    if volume.sizes is None or not any(volume.sizes):
        return "no millimetres known"
    sizes = ["?" if size is None else f"{size:.4g}" for size in volume.sizes]
    return f"of {' x '.join(sizes)} mm, no place in a patient known"


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
