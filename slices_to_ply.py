"""Turn rendered masks into surface meshes, in patient millimetres where the geometry is known.

    python slices_to_ply.py -i output -o meshes

makes meshes/<case>.ply of every folder output/<case>. Where the frames lie comes from, in this order: frames.json of
prepare.py in the case folder, `<case>.nii.gz` in the folder given by -n, a NIfTI file in the case folder. A NIfTI file
alone says that frame k is volume[:, :, k].T. With none of them the mesh is in voxels, and that is printed.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.ndimage import gaussian_filter
from skimage.restoration import denoise_tv_chambolle
from tqdm import tqdm

from utils.errors import ArgumentParser, UserError, run
from utils.geometry import Cut, Geometry, cut_geometry, swap_ras_lps
from utils.images import MAX_PIXELS, image_files, limit_pixels, read_image, to_grey
from utils.meshes import MILLIMETRES, VOXELS, otsu, signed_volume, surface, write_ply
from utils.volumes import nifti_grid

NOT_CASES = (
    "mirror",
    "heldout",
)  # beside original/: flipped copies from training, frames that prepare.py left out
FRAME_FOLDERS = ("render_mask", "render_img", "render")
PUBLISHED_INTER = 8
# The published smoothing: strong along the interpolated slices, 6 of which are 3/4 of a slice at --inter 8.
TV_WEIGHT = 0.5
SIGMA = (6.0, 1.3, 1.3)  # interpolated slices, rows, columns

Say = Callable[[str], None]


@dataclass(frozen=True)
class Case:
    """The frames of one mesh."""

    name: str
    folder: Path
    frames: list[Path]


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    say: Say = (lambda line: None) if options.quiet else print
    limit_pixels(options.max_pixels)
    out = Path(options.output)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: give -o a folder")
    if options.nifti is not None and not Path(options.nifti).is_dir():
        raise UserError(f"{options.nifti} is not a folder: -n takes the folder of <case>.nii.gz")
    if options.inter is not None and options.inter < 1:
        raise UserError(f"--inter {options.inter} is not a positive number")
    if not 0 <= options.thresh < 255:
        raise UserError(f"--thresh {options.thresh:g} is not an intensity from 0 to 255")
    cases = _cases(Path(options.input), options.extension)

    failures = []
    for case in cases:
        try:
            _mesh(case, out / f"{case.name}.ply", options, say)
        except UserError as error:
            failures.append(f"{case.name}: {error}")
    for failure in failures:
        print(f"slices_to_ply.py: failed: {failure}", file=sys.stderr)
    if failures and len(cases) > 1:
        print(f"slices_to_ply.py: {len(failures)} of {len(cases)} cases failed", file=sys.stderr)
    return 1 if failures else 0


def _parser() -> argparse.ArgumentParser:
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
        type=int,
        help=f"sub-frames per frame (default: what the file names say, else {PUBLISHED_INTER})",
    )
    parser.add_argument(
        "--smoothing",
        choices=("published", "none"),
        default="published",
        help=f"published: total variation per frame, then a Gaussian of sigma {SIGMA} (slice, row, column) voxels",
    )
    parser.add_argument(
        "--space", choices=("lps", "ras"), default="lps", help="of the vertices (default: lps)"
    )
    parser.add_argument("--extension", default=".png", help="of the frames (default: .png)")
    parser.add_argument(
        "--max_pixels",
        type=int,
        default=MAX_PIXELS,
        metavar="N",
        help="refuse image files of more pixels (default: %(default)s)",
    )
    parser.add_argument("--quiet", action="store_true", help="print errors only")
    parser.add_argument("--debug", action="store_true", help="print the traceback of an error too")
    return parser


def _cases(folder: Path, extension: str) -> list[Case]:
    """One case if the folder has renders; else its case folders; else one case of the frames in the folder itself."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give -i a folder of case folders, or a case folder")
    name = folder.resolve().name
    rendered = _renders(folder, extension)
    if rendered:
        return [Case(name, folder, rendered)]
    if any(folder.glob("chkpnt*.pth")):
        raise UserError(f"{folder} is a model without renders: run render.py -m {folder} first")
    children = sorted(
        child
        for child in folder.iterdir()
        if child.is_dir() and not child.name.startswith(".") and child.name not in NOT_CASES
    )
    cases = [
        Case(child.name, child, _renders(child, extension) or _loose(child, extension)) for child in children
    ]
    if any(case.frames for case in cases):
        return cases
    if _loose(folder, extension):
        return [Case(name, folder, _loose(folder, extension))]
    raise UserError(
        f"{folder} has no {extension} frames in {', '.join(FRAME_FOLDERS)}, itself or a case folder"
    )


def _renders(folder: Path, extension: str) -> list[Path]:
    for name in FRAME_FOLDERS:
        if (folder / name).is_dir() and (frames := _loose(folder / name, extension)):
            return frames
    return []


def _loose(folder: Path, extension: str) -> list[Path]:
    return image_files(folder, [extension if extension.startswith(".") else f".{extension}"])


def _mesh(case: Case, path: Path, options: argparse.Namespace, say: Say) -> None:
    if not case.frames:
        raise UserError(f"{case.folder} has no {options.extension} frames")
    geometry, source = _geometry(case, options.nifti)
    inter = _inter(case, geometry, options.inter)
    values = _read_frames(case.frames)  # (sub-frame, row, column) float32 in [0, 1]
    say(f"{case.name}: {len(case.frames)} frames of {case.frames[0].parent}, {inter} per slice; {source}")

    affine = None
    if geometry is not None:
        if len(case.frames) != inter * len(geometry.slices):
            raise UserError(
                f"{len(case.frames)} frames are not {len(geometry.slices)} slices times {inter}, which {source} and"
                " --inter ask for"
            )
        affine = geometry.for_renders((values.shape[2], values.shape[1]), inter)
    if options.smoothing == "published":
        if inter < SIGMA[0]:
            say(
                f"  note: the published smoothing is made for {PUBLISHED_INTER} sub-frames per slice; its sigma is"
            )
            say(
                f"        {SIGMA[0] / inter:.2g} slices here. Render with --interp 8, or give --smoothing none"
            )
        _smooth(values, options.quiet)
    try:
        level = options.thresh / 255 if options.thresh else otsu(values)
        vertices, triangles = surface(values, level, affine)
    except ValueError as error:
        raise UserError(f"the frames hold no surface: {error}") from error

    unit, comments = "voxels", [VOXELS]
    if affine is not None:
        unit, comments = "mm", [f"SPACE={options.space.upper()}", MILLIMETRES]
        if options.space == "lps":
            vertices = swap_ras_lps(vertices)  # a half turn about z: triangles keep facing outwards
    write_ply(path, vertices, triangles, comments)
    box = "; ".join(
        f"{low:.1f} to {high:.1f}" for low, high in zip(vertices.min(0), vertices.max(0), strict=True)
    )
    volume = signed_volume(vertices, triangles)
    say(f"  level {level * 255:.1f}, {len(vertices):,} vertices, {len(triangles):,} triangles")
    say(f"  volume {volume:,.1f} {unit}{'^3' if unit == 'mm' else ''}, box {box} {unit}")
    say(f"  {path}{f' ({options.space.upper()})' if affine is not None else ''}")


def _geometry(case: Case, nifti: str | None) -> tuple[Geometry | None, str]:
    """Where the case's frames lie, and who says so."""
    # Frames that prepare.py wrote (OUT/seg/original) are a case too: then frames.json is two folders up.
    geometry = Geometry.find(case.folder.parent if case.folder.name == "original" else case.folder)
    if geometry is not None and geometry.affine is not None:
        return geometry, f"place from frames.json of {geometry.source}"
    candidates = [Path(nifti) / f"{case.name}{suffix}" for suffix in (".nii.gz", ".nii")] if nifti else []
    candidates += sorted(path for path in case.folder.iterdir() if path.name.endswith((".nii.gz", ".nii")))
    for path in candidates:
        if path.is_file():
            shape, affine = nifti_grid(path)
            plain = Cut((0, 1, 2), (False, False))
            geometry = cut_geometry(plain, affine, shape, window=(0.0, 1.0), bits=8, source=path.name)
            return geometry, f"place from {path}, as volume[:, :, k].T"
    missing = "no frames.json" if geometry is None else f"no millimetres in frames.json of {geometry.source}"
    missing += f", no {case.name}.nii.gz in {nifti}" if nifti else ""
    return None, f"{missing}, no NIfTI file: units are voxels, not millimetres"


def _inter(case: Case, geometry: Geometry | None, wanted: int | None) -> int:
    """Sub-frames per frame, which have to be all there for the spacing to be right."""
    numbers = [re.fullmatch(r"(\d+)_(\d+)", path.stem) for path in case.frames]
    if not all(numbers):  # plain numbers: other programs' frames, or input frames
        slices = len(geometry.slices) if geometry is not None else len(case.frames) + 1
        told = len(case.frames) // slices if len(case.frames) % slices == 0 else PUBLISHED_INTER
        return wanted or told
    found = {(int(number[1]), int(number[2])) for number in numbers if number}
    frames, inter = [max(numbers) + 1 for numbers in zip(*found, strict=True)]
    first = min(frame for frame, _ in found)
    for frame in range(first, frames):
        for sub_frame in range(inter):
            if (frame, sub_frame) not in found:
                raise UserError(
                    f"frame {frame:05d}_{sub_frame} is missing in {case.frames[0].parent}: render again"
                )
    if wanted not in (None, inter):
        raise UserError(
            f"{case.frames[0].parent} holds {inter} sub-frames per frame, which is not --inter {wanted}"
        )
    return inter


def _read_frames(paths: list[Path]) -> np.ndarray:  # (frame, row, column) float32
    first = to_grey(read_image(paths[0]))
    values = np.empty((len(paths), *first.shape), np.float32)
    for number, path in enumerate(paths):
        frame = to_grey(read_image(path))
        if frame.shape != first.shape:
            raise UserError(
                f"{path} is {frame.shape[1]} x {frame.shape[0]} pixels, {paths[0].name} {first.shape[1]} x"
                f" {first.shape[0]}: frames have one size"
            )
        values[number] = frame
    if min(values.shape) < 2:
        raise UserError(
            f"{len(paths)} frame of {first.shape[1]} x {first.shape[0]} pixels encloses no volume"
        )
    return values


def _smooth(values: np.ndarray, quiet: bool) -> None:
    """The published smoothing, in place. Beyond the border the outermost voxels go on."""

    def denoise(number: int) -> None:
        if np.ptp(values[number]):  # an empty frame stays as it is
            values[number] = denoise_tv_chambolle(values[number], weight=TV_WEIGHT)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        progress = tqdm(
            pool.map(denoise, range(len(values))),
            "smoothing",
            len(values),
            leave=False,
            disable=quiet or None,
        )
        for _ in progress:
            pass
    gaussian_filter(values, SIGMA, mode="nearest", output=values)


if __name__ == "__main__":
    run(main)
