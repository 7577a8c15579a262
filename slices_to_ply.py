"""Turn rendered masks into surface meshes, in patient millimetres where the geometry is known.

    python slices_to_ply.py -i output -o meshes

makes meshes/<case>.ply from every folder output/<case>. Where the frames lie comes from, in this order: frames.json of
prepare.py in the case folder or its parent, `<case>.nii.gz` in the folder given by -n, a NIfTI file in the case folder.
A NIfTI file alone says that frame k is volume[:, :, k].T. With none of them the mesh is in voxels, with a notice.

Several organs in one run: a case folder for each, or one stack of label maps, which gives meshes/<case>_<label>.ply,
neighbours sharing their surfaces, and meshes/<case>.glb of all in their colours.
"""

from __future__ import annotations

import utils.threads  # noqa: F401  # isort: skip  (before torch)

import argparse
import multiprocessing
import shlex
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from skimage.restoration import denoise_tv_chambolle
from tqdm import tqdm
from trimesh import Trimesh

from patient.geometry import HELDOUT
from patient.label_surfaces import label_surfaces
from patient.labels import Kind, Label, LabelTable
from patient.meshes import (
    FORMATS,
    decimate,
    enclosed_volume,
    in_space,
    inside_shares,
    is_closed,
    largest,
    otsu,
    smooth,
    surface,
    surface_of_volume,
    write_mesh,
    write_scene,
)
from patient.stacks import (
    FRAME_FOLDERS,
    GENERIC,
    PUBLISHED_INTER,
    Stack,
    beside,
    case_name,
    check_newest,
    frame_paths,
    loose_paths,
    read_stack,
    rendered_paths,
)
from utils.errors import ArgumentParser, UserError, positive, run
from utils.images import MAX_PIXELS, limit_pixels
from utils.threads import processors, spare_processors

NOT_CASES = (
    "mirror",
    HELDOUT,
)  # beside original/: flipped copies made by training, and held-out frames of prepare.py
# The published smoothing: strong along the interpolated slices, 6 of which are 3/4 of a slice at --inter 8.
TV_WEIGHT = 0.5
SIGMA = (6.0, 1.3, 1.3)  # interpolated slices, rows, columns
# The default smoothing. On exactly known shapes, cut at several spacings with and without in-between frames, these
# factors gave the surfaces nearest to the true ones: less leaves voxel steps, more blurs thin structures.
OF_FINEST, OF_OWN = 0.7, 0.25
# For in-between frames with grey edges, which say where the edge lies within a pixel: there are no steps to smooth.
# The liver from every 2nd slice, predicted in between (mm, ASD and HD95): 0.316 and 1.04 without, 0.325 and 1.04 with
# this, 0.412 and 1.21 with OF_FINEST; of signed distances 0.351, 0.371, 0.491 (ASD).
OF_GREY = 0.35
GREY_EDGES = 0.3  # grey pixels per inside-outside step along a row, above which edges count as grey
MAX_LABELS = 200  # more distinct values than this are grey levels


@dataclass(frozen=True)
class Case:
    """The frames of one mesh, or of one mesh per label."""

    name: str
    folder: Path


@dataclass(frozen=True)
class Outcome:
    """The result of a case: lines to print, and why it failed if it did."""

    case: Case
    lines: list[str]
    failure: str | None = None
    trace: str | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    _check(options)
    cases = _cases(Path(options.input), options.extension)

    failures = []
    for outcome in _outcomes(cases, options):
        if not options.quiet:
            for line in outcome.lines:
                print(line, flush=True)
        if outcome.failure is not None:
            failures.append(outcome)
    for outcome in failures:
        if outcome.trace is not None:
            print(outcome.trace, file=sys.stderr)
        print(f"slices_to_ply.py: failed: {outcome.case.name}: {outcome.failure}", file=sys.stderr)
    if failures and len(cases) > 1:
        print(f"slices_to_ply.py: {len(failures)} of {len(cases)} cases failed", file=sys.stderr)
    return 1 if failures else 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = ArgumentParser(prog="slices_to_ply.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "-i", "--input", required=True, help="parent folder of case folders, or one case folder"
    )
    parser.add_argument("-o", "--output", required=True, help="folder of the meshes, <case>.ply")
    parser.add_argument("-n", "--nifti", help="folder of <case>.nii.gz, for spacing and affine")
    parser.add_argument(
        "--thresh", type=float, default=0.0, help="iso-level, 0 to 255 (default 0: chosen by Otsu's method)"
    )
    parser.add_argument(
        "--inter",
        type=positive,
        metavar="N",
        help=f"sub-frames per frame (default: what the file names say, else {PUBLISHED_INTER})",
    )
    parser.add_argument(
        "--labels",
        nargs="*",
        metavar="V",
        help="frames are label maps: one mesh <case>_<name> per value or name (default: all but 0), and"
        " <case>.glb of all where frames.json has their names and colours",
    )
    parser.add_argument(
        "--scene", action="store_true", help="always write <case>.glb of all labels of a label map"
    )
    parser.add_argument(
        "--smoothing",
        metavar="MM|none|published",
        help=f"standard deviation in mm of a Gaussian; none; or published: total variation per frame, then a Gaussian"
        f" of sigma {SIGMA} (slice, row, column) voxels. Default per axis: {OF_FINEST:g} of the finest spacing,"
        f" at least {OF_OWN:g} of the axis' own; {OF_GREY:g} of the finest for in-between frames with grey edges."
        " Except with none and published, the mask's volume is preserved",
    )
    parser.add_argument("--largest", action="store_true", help="keep only the largest connected body")
    parser.add_argument(
        "--open", action="store_true", help="no caps where the border of the stack cuts the object"
    )
    parser.add_argument(
        "--decimate",
        type=float,
        default=0.0,
        metavar="FRACTION",
        help="remove this fraction of the triangles: 0.9 leaves a tenth (needs fast-simplification)",
    )
    parser.add_argument("--format", choices=FORMATS, default="ply", help="mesh format (default: ply)")
    parser.add_argument(
        "--space", choices=("lps", "ras"), default="lps", help="space of the vertices (default: lps)"
    )
    parser.add_argument(
        "--preview", action="store_true", help="also a picture <case>.png: three views, axes in mm"
    )
    parser.add_argument(
        "--jobs",
        type=positive,
        metavar="N",
        help="cases at once, one process each (default: one per processor)",
    )
    parser.add_argument("--extension", default=".png", help="file extension of the frames (default: .png)")
    parser.add_shared(MAX_PIXELS)
    return parser


def _check(options: argparse.Namespace) -> None:
    """Refuse options that are wrong whatever the cases are."""
    if Path(options.output).exists() and not Path(options.output).is_dir():
        raise UserError(f"{options.output} is a file: give -o a folder")
    if options.nifti is not None and not Path(options.nifti).is_dir():
        raise UserError(f"{options.nifti} is not a folder: -n takes the folder of <case>.nii.gz")
    if not 0 <= options.thresh < 255:
        raise UserError(f"--thresh {options.thresh:g} is not an intensity from 0 to 255")
    if options.labels is not None and options.thresh:
        raise UserError("--labels takes pixels of exactly those values: leave --thresh out")
    if not 0 <= options.decimate < 1:
        raise UserError(f"--decimate {options.decimate:g} is not a fraction from 0 to below 1")
    if options.decimate and find_spec("fast_simplification") is None:
        raise UserError("--decimate needs fast-simplification: pip install fast-simplification")
    if options.format == "glb" and options.space == "ras":
        raise UserError(
            "--space ras is not for GLB, whose standard has a space of its own: leave one of them out"
        )
    if options.smoothing not in (None, "none", "published"):
        try:
            millimetres = float(options.smoothing)
        except ValueError:
            millimetres = np.nan
        if not 0 < millimetres < 1000:
            raise UserError(
                f"--smoothing {options.smoothing} is neither millimetres, nor none, nor published"
            )
        options.smoothing = millimetres


def _cases(folder: Path, extension: str) -> list[Case]:
    """One case if the folder has renders; else its case folders; else one case of the frames in the folder itself.

    A folder of prepare.py, or one within a case, is that case. For a folder one level too high, the error names where
    the cases are.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give -i a folder of case folders, or a case folder")
    if (own := _case(folder, extension)) is not None:
        return [own]
    if any(folder.glob("chkpnt*.pth")):
        command = f"python render.py -m {shlex.quote(str(folder))} --pipeline both --interp {PUBLISHED_INTER}"
        raise UserError(f"{folder} is a model without renders: run render.py first ({command})")
    children = sorted(
        child
        for child in folder.iterdir()
        if child.is_dir() and not child.name.startswith(".") and child.name not in NOT_CASES
    )
    cases = [_case(child, extension) or Case(child.name, child) for child in children]
    if any(frame_paths(case.folder, extension) for case in cases):
        return cases
    if loose_paths(folder, extension):
        return [Case(case_name(folder), folder)]
    below = [child for child in children if any(_case(c, extension) for c in child.iterdir() if c.is_dir())]
    hint = f", but {below[0]} has cases: give -i {shlex.quote(str(below[0]))}" if below else ""
    raise UserError(
        f"{folder} has no {extension} frames in {', '.join(FRAME_FOLDERS)}, itself or a case folder{hint}"
    )


def _case(folder: Path, extension: str) -> Case | None:
    """The case of a folder that has renders, or lies within a case; in a folder of prepare.py, the masks."""
    if rendered_paths(folder, extension):
        return Case(case_name(folder), folder)
    for inner in ("original", "seg/original"):
        if (folder / inner).is_dir() and loose_paths(folder / inner, extension):
            return Case(case_name(folder), folder / inner)
    inside = folder.resolve().name in GENERIC and loose_paths(folder, extension)
    return Case(case_name(folder), folder) if inside else None


# ---- cases in parallel -----------------------------------------------------------------------------------------------


def _outcomes(cases: list[Case], options: argparse.Namespace) -> Iterator[Outcome]:
    """The result of each case in order, `--jobs` of them at once."""
    jobs = min(options.jobs or processors(), len(cases))
    if jobs == 1:
        yield from (_attempt(case, options) for case in cases)
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy threads' locks
    with ProcessPoolExecutor(jobs, context) as pool:
        running = [pool.submit(_attempt, case, options) for case in cases]
        for case, future in zip(cases, running, strict=True):
            outcome = _result(case, future)
            if outcome is None:  # one process died and broke the pool: maybe not this case's
                with ProcessPoolExecutor(1, context) as alone:
                    outcome = _result(case, alone.submit(_attempt, case, options))
            yield outcome or Outcome(
                case, [], "its process was killed, most likely for lack of memory: try --jobs 1"
            )


def _result(case: Case, future: Future[Outcome]) -> Outcome | None:
    try:
        return future.result()
    except BrokenProcessPool:
        return None


def _attempt(case: Case, options: argparse.Namespace) -> Outcome:
    """Mesh a case; whatever goes wrong belongs to this case alone."""
    lines: list[str] = []
    limit_pixels(options.max_pixels)  # of this process
    try:
        _mesh(case, options, lines)
    except UserError as error:
        return Outcome(case, lines, str(error), traceback.format_exc() if options.debug else None)
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        return Outcome(case, lines, f"{error.strerror or error}{where}")
    except MemoryError:
        return Outcome(
            case, lines, "out of memory: take fewer at once (--jobs), fewer in-betweens, or smaller frames"
        )
    except Exception as error:  # a bug: shown, without costing the other cases
        return Outcome(case, lines, f"{type(error).__name__}: {error}", traceback.format_exc())
    return Outcome(case, lines)


# ---- one case --------------------------------------------------------------------------------------------------------


def _mesh(case: Case, options: argparse.Namespace, lines: list[str]) -> None:
    """Read, smooth, mesh and write a case; messages go to `lines`."""
    kind: Kind | None = None if options.labels is None else "labels"
    check_newest(case.folder, options.extension)
    stack = read_stack(case.folder, options.extension, options.nifti, options.inter, kind)
    frames = frame_paths(case.folder, options.extension)
    beyond = stack.found - len(stack.values)
    lines.append(
        f"{case.name}: {stack.found} frames of {frames[0].parent}, {stack.inter} per slice"
        f"{f' (the {beyond} behind the last slice are left out)' if beyond else ''}; {stack.place}"
    )
    for note in stack.meaning.notes if stack.meaning else ():
        lines.append(f"  note: {note}")
    if stack.numbers is None or (
        options.labels is None and stack.labels is None and len(np.unique(stack.numbers)) < 3
    ):
        _write(case, case.name, stack, *_mesh_of(stack, stack.values, options, lines), options, lines)
        return
    _mesh_labels(case, stack, _labels(stack, options.labels), options, lines)


def _mesh_labels(
    case: Case, stack: Stack, labels: LabelTable, options: argparse.Namespace, lines: list[str]
) -> None:
    """One mesh per label, neighbours sharing their surfaces, and a scene of all."""
    numbers = stack.numbers
    assert numbers is not None  # checked by the caller
    if options.largest:
        kept = np.zeros_like(numbers)
        for number in np.unique(numbers[numbers > 0]).tolist():
            kept[largest((numbers == number).astype(np.float32), 0.5) > 0.5] = number
        numbers = kept
    sigma, volumes = None, None
    if options.smoothing == "published":
        sigma = SIGMA
    elif options.smoothing != "none":
        millimetres = _sigma(stack.spacing, options.smoothing)
        column, row, frame = (own / step for own, step in zip(millimetres, stack.spacing, strict=True))
        sigma = frame * stack.inter, row, column
        lines.append(_smoothed(stack, millimetres))
        every = np.unique(numbers[numbers > 0]).tolist()
        volumes = {number: stack.volume((numbers == number).astype(np.float32)) for number in every}
    meshes = label_surfaces(
        numbers, labels.ids, sigma, volumes, stack.affine, stack.heights, not options.open
    )
    scene, names = {}, labels.file_names()
    for label in labels:
        if label.id not in meshes:
            lines.append(
                f"  note: label {label.id} ({label.name}) is lost in smoothing: try --smoothing none"
            )
            continue
        mesh = meshes[label.id]
        if volumes and not options.open and abs(mesh.volume / volumes[label.id] - 1) > 0.01:
            lines.append(
                f"  note: {label.name} encloses {mesh.volume:,.1f} instead of {volumes[label.id]:,.1f}, which"
                " happens to specks: try --smoothing none"
            )
        if options.decimate:
            try:
                mesh = decimate(mesh, options.decimate)
            except ValueError as error:
                raise UserError(f"{label.name}: {error}") from error
        _write(case, f"{case.name}_{names[label.id]}", stack, mesh, None, options, lines, label)
        scene[label] = mesh
    if options.decimate:
        lines.append("  note: decimated meshes no longer share their surfaces")
    if scene and (options.scene or stack.labels is not None):
        path = Path(options.output) / f"{case.name}.glb"
        write_scene(path, scene)
        lines.append(f"  {path}: all {len(scene)} in their colours")
    if len(scene) > 1 and options.preview:
        _preview(case, case.name, stack, scene, options, lines)


def _labels(stack: Stack, wanted: list[str] | None) -> LabelTable:
    """The labels to mesh, all of which occur."""
    present = np.unique(stack.numbers).tolist() if stack.numbers is not None else []
    names = stack.labels or LabelTable()
    if len(present) > MAX_LABELS:
        raise UserError(
            f"the frames hold {len(present)} different values, so they are not label maps: leave --labels out, and"
            " give each organ a case folder of its own masks"
        )
    if present == [0]:
        raise UserError("no pixel has the value of a label: there are 0")
    ids = []
    for word in wanted or []:
        number = names.find(word)
        if number is None or number not in present:
            raise UserError(f"no pixel has the value {word}: there are {', '.join(map(str, present))}")
        ids.append(number)
    return names.of(ids or [value for value in present if value])


def _mesh_of(
    stack: Stack, values: np.ndarray, options: argparse.Namespace, lines: list[str]
) -> tuple[Trimesh, float]:
    """The mesh of values (frame, row, column) and its level."""
    try:
        mesh, level = _surface(stack, values, options, lines)
        return decimate(mesh, options.decimate) if options.decimate else mesh, level
    except ValueError as error:
        raise UserError(f"the frames hold no surface: {error}") from error


def _write(
    case: Case,
    name: str,
    stack: Stack,
    mesh: Trimesh,
    level: float | None,
    options: argparse.Namespace,
    lines: list[str],
    label: Label | None = None,
) -> None:
    """Write one mesh, and its picture."""
    if mesh.metadata["space"]:
        mesh = in_space(mesh, options.space.upper())
    path = Path(options.output) / f"{name}.{options.format}"
    write_mesh(path, mesh)

    unit = mesh.metadata["unit"]
    box = "; ".join(f"{low:.1f} to {high:.1f}" for low, high in mesh.bounds.T)
    volume = f"volume {enclosed_volume(mesh):,.1f} {unit}{'^3' if unit == 'mm' else ''}"
    enclosed = volume if is_closed(mesh) else "open"
    cut = "" if level is None else f"level {level * 255:.1f}, "
    lines.append(f"  {cut}{len(mesh.vertices):,} vertices, {len(mesh.faces):,} triangles")
    lines.append(f"  {enclosed}, box {box} {unit}")
    lines.append(f"  {path}{f' ({options.space.upper()})' if unit == 'mm' else ''}")
    if options.preview:
        _preview(case, name, stack, {label: mesh}, options, lines)


def _preview(
    case: Case,
    name: str,
    stack: Stack,
    meshes: Mapping[Any, Trimesh],
    options: argparse.Namespace,
    lines: list[str],
) -> None:
    """A picture of meshes, by `Label` or None, and of their outlines on the images or masks."""
    from pictures.shading import Slices, write_preview  # matplotlib takes a while to import

    shown = beside(case.folder, stack, options.extension)
    if shown is None:
        shown = stack.values if stack.numbers is None else (stack.numbers > 0).astype(np.float32)
    colours = [np.array(label.colour) / 255 for label in meshes if label is not None]
    path = Path(options.output) / f"{name}.png"
    slices = Slices(shown, stack.affine, stack.heights)
    space = options.space.upper()
    placed = [in_space(mesh, space) if mesh.metadata["space"] else mesh for mesh in meshes.values()]
    write_preview(path, placed, name, slices, colours or None)
    lines.append(f"  {path}")


def _surface(
    stack: Stack, values: np.ndarray, options: argparse.Namespace, lines: list[str]
) -> tuple[Trimesh, float]:
    """The mesh and its level. Raises ValueError where there is none.

    --thresh tells the mask from the rest. Without smoothing it is the level of the surface. With the
    published smoothing, the level is chosen, or applied, after it. With smoothing in millimetres, the level is the one
    that preserves the volume of the mask's voxels.
    """
    published = options.smoothing == "published"
    if published:
        if stack.inter < SIGMA[0]:
            lines.append(
                f"  note: the published smoothing was made for {PUBLISHED_INTER} sub-frames per slice; its sigma is"
                f" {SIGMA[0] / stack.inter:.2g} slices here. Render with --interp 8, or leave it out"
            )
        values = smooth(_denoise(values, options.quiet), SIGMA)
    level = options.thresh / 255 if options.thresh else otsu(values)
    if options.largest:
        values = largest(values, level)
    if published or options.smoothing == "none":
        return surface(values, level, stack.affine, stack.heights, not options.open), level

    if values.max() < level:
        raise ValueError(f"nothing reaches the level {level:.4g}: the highest value is {values.max():.4g}")
    shares = inside_shares(values, level)
    volume = stack.volume(shares)
    grey = stack.inter > 1 and grey_edges(values, shares) > GREY_EDGES
    del shares  # as large as the stack
    millimetres = _sigma(stack.spacing, options.smoothing, grey)
    column, row, frame = (sigma / step for sigma, step in zip(millimetres, stack.spacing, strict=True))
    lines.append(_smoothed(stack, millimetres))
    smoothed = smooth(values, (frame * stack.inter, row, column))
    mesh, level = surface_of_volume(smoothed, volume, stack.affine, stack.heights, not options.open)
    if options.largest:  # smoothing may have detached weakly connected parts
        smoothed = largest(smoothed, level)
        mesh, level = surface_of_volume(smoothed, volume, stack.affine, stack.heights, not options.open)
    if not options.open and abs(enclosed_volume(mesh) - volume) > 0.01 * volume:
        lines.append(
            f"  note: no level preserves the mask's volume of {volume:,.1f}, which happens to specks: try"
            " --smoothing none"
        )
    return mesh, level


def _smoothed(stack: Stack, sigma: tuple[float, float, float]) -> str:
    unit = "voxels" if stack.affine is None else "mm"
    return f"  smoothed by {', '.join(f'{own:.3g}' for own in sigma)} {unit} (column, row, slice)"


def _sigma(
    spacing: tuple[float, float, float], wanted: float | None, grey: bool = False
) -> tuple[float, float, float]:
    """Standard deviations of the smoothing along column, row and slice in the unit of `spacing`.

    grey: whether in-between frames have grey edges, so that neither pixels nor slices make steps.
    """
    if wanted is not None:
        return wanted, wanted, wanted
    if grey:
        return (OF_GREY * min(spacing),) * 3
    column, row, slice_ = (max(OF_FINEST * min(spacing), OF_OWN * own) for own in spacing)
    return column, row, slice_


def grey_edges(values: np.ndarray, shares: np.ndarray) -> float:
    """Pixels (frame, row, column) that are neither inside nor outside, per step between the two along a row.

    shares: of each pixel that is inside (`inside_shares`).
    """
    inside = shares > 0.5
    steps = np.count_nonzero(inside[:, :, 1:] != inside[:, :, :-1])
    low, high = float(values.min()), float(values.max())
    grey = np.count_nonzero((values > low + 0.05 * (high - low)) & (values < high - 0.05 * (high - low)))
    return grey / steps if steps else 0.0


def _denoise(values: np.ndarray, quiet: bool) -> np.ndarray:
    """The published total variation of each frame (frame, row, column)."""

    def denoise(frame: np.ndarray) -> np.ndarray:
        return denoise_tv_chambolle(frame, weight=TV_WEIGHT) if np.ptp(frame) else frame  # empty frames stay

    alone = multiprocessing.parent_process() is None  # one of several workers draws no bar
    with ThreadPoolExecutor(spare_processors()) as pool:
        frames = pool.map(denoise, values)
        progress = tqdm(frames, "smoothing", len(values), leave=False, disable=quiet or not alone or None)
        return np.stack(list(progress))


if __name__ == "__main__":
    run(main)
