"""Turn a volume, and its label if there is one, into frames to train on.

    python prepare.py -i volume.nii.gz -l label.nii.gz -o data/case
    python train.py -s data/case/img --pipeline joint --seg_source_path data/case/seg

writes data/case/img/original/0000.png ..., data/case/seg/original/0000.png ... (0 and 255) and data/case/frames.json,
which records where the frames lie (`utils.geometry.Geometry`), so that meshes come out in patient millimetres.

Frames show anatomy upright: columns and rows grow towards the patient's left, posterior or inferior. All is written
beside OUT first and renamed at the end: OUT is complete or untouched.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from nibabel.affines import apply_affine
from nibabel.orientations import aff2axcodes
from scipy.ndimage import affine_transform

from utils.errors import ArgumentParser, UserError, run
from utils.files import atomic_folder
from utils.geometry import FILE_NAME, Cut, Geometry, cut_geometry, upright_cut, voxel_sizes
from utils.images import MAX_PIXELS, limit_pixels, write_image
from utils.volumes import READERS, Volume, read_volume

Say = Callable[[str], None]


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    say: Say = (lambda line: None) if options.quiet else print
    limit_pixels(options.max_pixels)
    out = Path(options.output)
    _check_output(out, options.force)

    volume = read_volume(options.input, options.frame)
    if options.frame and volume.index is None:
        raise UserError(f"{options.input} holds one volume: there is no --frame {options.frame}")
    say(f"{options.input}: {_describe(volume)}")
    for note in volume.notes:
        say(f"  note: {note}")
    cut = upright_cut(volume.affine, _axis(options.axis, volume))
    finite = _count_finite(volume, say)
    window = _window(volume, finite, options.window, options.percentiles, say)
    geometry = cut_geometry(
        cut,
        volume.affine,
        volume.values.shape,
        options.keep_every,
        window=window,
        bits=options.bits or volume.bits,
        source=volume.name,
        volume=volume.index,
    )
    if len(geometry.slices) < 2:
        raise UserError(
            f"{options.input} gives {len(geometry.slices)} frame across axis {geometry.axis} of its shape"
            f" {volume.values.shape[:3]}: at least 2 are needed (see --axis and --keep_every)"
        )
    label = None
    if options.label is not None:
        label = _label(options.label, options.label_value, options.frame, volume, say)
        if not cut.frames(label)[:: options.keep_every].any():
            raise UserError(f"{options.label} has nothing labelled in the frames that --keep_every keeps")

    with atomic_folder(out) as folder:
        _write_frames(folder / "img" / "original", volume, cut, geometry)
        if label is not None:
            for number, frame in enumerate(cut.frames(label)[:: options.keep_every]):
                write_image(folder / "seg" / "original" / f"{number:04d}.png", frame)
        geometry.save(folder / FILE_NAME)

    say(_summary(geometry))
    say(
        f"  {out / 'img'}: {len(geometry.slices)} frames of {geometry.bits} bits; train with -s {out / 'img'}"
    )
    if label is not None:
        say(f"  {out / 'seg'}: their masks; train with --pipeline joint --seg_source_path {out / 'seg'}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(prog="prepare.py", description=(__doc__ or "").split("\n")[0])
    kinds = ", ".join(READERS)
    parser.add_argument("-i", "--input", required=True, help=f"volume ({kinds}), or a folder of images")
    parser.add_argument(
        "-l", "--label", help="its label, of the same kinds; another grid is resampled (nearest)"
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
    parser.add_argument(
        "--bits",
        type=int,
        choices=(8, 16),
        help="bits of a pixel (default: 16, or 8 where the source has no more)",
    )
    parser.add_argument(
        "--keep_every", type=_positive, default=1, metavar="N", help="keep one frame in N, the first on"
    )
    parser.add_argument("--frame", type=int, metavar="INDEX", help="which volume of a 4-D file, from 0")
    parser.add_argument(
        "--force", action="store_true", help="replace frames that prepare.py wrote to OUT earlier"
    )
    parser.add_argument(
        "--max_pixels",
        type=_positive,
        default=MAX_PIXELS,
        metavar="N",
        help="refuse image files of more pixels (default: %(default)s)",
    )
    parser.add_argument("--quiet", action="store_true", help="print errors only")
    parser.add_argument("--debug", action="store_true", help="print the traceback of an error too")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return int(text)


def _check_output(out: Path, force: bool) -> None:
    """Refuse to replace anything that this script did not write."""
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"{out} is a file: give -o a folder")
    ours = {"img", "seg", "img/original", "img/mirror", "seg/original", "seg/mirror", FILE_NAME}
    entries = [*out.iterdir(), *out.glob("img/*"), *out.glob("seg/*")]
    foreign = sorted(name for entry in entries if (name := entry.relative_to(out).as_posix()) not in ours)
    if foreign:
        raise UserError(f"{out} holds {foreign[0]}, which prepare.py did not write: give -o another folder")
    if entries and not force:
        raise UserError(f"{out} holds frames already: give another folder, or --force to replace them")


def _axis(wanted: str, volume: Volume) -> int:
    if wanted != "auto":
        return int(wanted)
    if volume.affine is None:
        return 2
    spacing = np.array(voxel_sizes(volume.affine))
    return int(
        np.flatnonzero(spacing > spacing.max() * (1 - 1e-3))[-1]
    )  # headers round: equal to a thousandth


def _count_finite(volume: Volume, say: Say) -> np.ndarray | None:
    """Mask of finite voxels, or None where all are."""
    if volume.values.dtype.kind != "f":
        return None
    finite = np.isfinite(volume.values)
    bad = finite.size - np.count_nonzero(finite)
    if bad == finite.size:
        raise UserError(f"{volume.name} has no finite voxel")
    if bad:
        say(f"  note: {bad:,} voxels are NaN or infinite; they get the low end of the window")
    return finite if bad else None


def _window(
    volume: Volume,
    finite: np.ndarray | None,
    window: Sequence[float] | None,
    percentiles: Sequence[float] | None,
    say: Say,
) -> tuple[float, float]:
    """The intensities that become 0 and 1."""
    if window is not None:
        low, high = window
        if not (np.isfinite(window).all() and low < high):
            raise UserError(f"--window {low:g} {high:g} is empty: LO has to be below HI")
        return low, high
    if percentiles is None and volume.full_scale is not None:
        return volume.full_scale
    first, last = percentiles or (0.5, 99.5)
    if not 0 <= first < last <= 100:
        raise UserError(
            f"--percentiles {first:g} {last:g} is empty: they go from 0 to 100, the lower one first"
        )
    values = volume.values if finite is None else volume.values[finite]
    low, high = (float(value) for value in np.percentile(values, (first, last)))
    if low < high:
        return low, high
    smallest, largest = float(values.min()), float(values.max())
    if smallest == largest:
        raise UserError(
            f"{volume.name} is {smallest:g} everywhere: its window is empty, and there is nothing to see"
        )
    say(f"  note: percentiles {first:g} and {last:g} are both {low:g}; the window is the whole range instead")
    return smallest, largest


def _label(
    path: str, wanted: Sequence[float] | None, index: int | None, volume: Volume, say: Say
) -> np.ndarray:  # (I, J, K) bool
    """The label on the volume's grid."""
    label = read_volume(path, index)
    shape = volume.values.shape[:3]
    values = (
        label.values if label.values.ndim == 3 else label.values[..., :3].max(axis=3)
    )  # colours, not opacity
    values = np.nan_to_num(values)
    if wanted:
        inside = np.isin(values, wanted)
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
    elif not _same_grid(volume.affine, label.affine, shape, inside.shape):
        to_label = np.linalg.inv(label.affine) @ volume.affine
        # grid-constant: the outer half of a border voxel belongs to it, and rounding errors do not cut it off
        resampled = affine_transform(
            inside.view(np.uint8), to_label[:3, :3], to_label[:3, 3], shape, order=0, mode="grid-constant"
        ).astype(bool)
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


def _same_grid(first: np.ndarray, second: np.ndarray, shape: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether two grids agree to a hundredth of a voxel in every corner."""
    corners = np.array(list(np.ndindex(2, 2, 2))) * (np.array(shape) - 1)
    apart = np.abs(apply_affine(first, corners) - apply_affine(second, corners)).max()
    return shape == other and bool(apart < 0.01 * min(voxel_sizes(first)))


def _write_frames(folder: Path, volume: Volume, cut: Cut, geometry: Geometry) -> None:
    low, high = geometry.window
    stack = cut.frames(volume.values)  # (frame, row, column[, channel])
    for number, index in enumerate(geometry.slices):
        stored = stack[index].astype(np.float64)
        unit = np.where(np.isfinite(stored), (stored - low) / (high - low), 0.0)
        if unit.shape[2:] == (4,) and volume.full_scale is not None:
            unit[:, :, 3] = stored[:, :, 3] / volume.full_scale[1]  # opacity is no intensity
        write_image(folder / f"{number:04d}.png", unit, geometry.bits)


def _describe(volume: Volume) -> str:
    shape = " x ".join(map(str, volume.values.shape[:3]))
    if volume.affine is None:
        return f"{shape} (columns, rows, frames), no millimetres known"
    spacing = " x ".join(f"{size:.4g}" for size in voxel_sizes(volume.affine))
    return f"{shape} voxels of {spacing} mm, axes to {''.join(aff2axcodes(volume.affine))}"


def _summary(geometry: Geometry) -> str:
    columns, rows = geometry.size
    place = (
        "" if geometry.affine is None or geometry.spacing is None else f", {geometry.spacing[2]:.4g} mm apart"
    )
    kept = f" of {geometry.slice_count} slices" if len(geometry.slices) < geometry.slice_count else ""
    return (
        f"{len(geometry.slices)} frames{kept} across axis {geometry.axis}, {columns} x {rows} pixels{place},"
        f" window {geometry.window[0]:.6g} to {geometry.window[1]:.6g}"
    )


if __name__ == "__main__":
    run(main)
