#!/usr/bin/env python3
"""Meshes from every N-th slice, against the surface from all slices, in mm.

    python -m benchmarks.meshes CASE --keep 2 --interp 4 --model MODEL --out benchmarks/results/meshes.jsonl

CASE/seg/original holds the masks of all slices, 0000.png ...; where they lie comes from CASE/frames.json or a NIfTI
file in CASE (then frame k is volume[:, :, k].T). MODEL was trained on every N-th of them (0, N, 2N ...) and drawn with
`render.py --interp n --pipeline both` (or seg). Methods without a model stand beside it: marching cubes on the kept
slices alone, on the signed distances interpolated between them, and on their linear blend. Each goes through
slices_to_ply.py without smoothing and with the default. Nothing is aligned.

Surfaces are compared between the first and the last kept slice, cut open there: caps say nothing about anatomy.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from trimesh import Trimesh
from trimesh.intersections import slice_faces_plane

from benchmarks.common import describe, run_program, surface_table
from in_between.classical import interpolate, signed_distances
from patient.meshes import in_space, read_mesh, surface
from patient.readers.nifti import nifti_grid
from patient.stacks import FRAME_FOLDERS, read_stack, sub_frames
from patient.surfaces import SAMPLES, surface_scores
from utils.errors import ArgumentParser, UserError, run
from utils.files import atomic_write
from utils.images import image_files, read_image, to_grey, write_image

SMOOTHING = {"none": ["--smoothing", "none"], "default": []}
EDGE = 4.0  # pixels over which signed distances become grey levels: 16 bits then hold them to 1e-4 of a pixel


def main() -> None:
    parser = ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("case", type=Path, metavar="CASE", help="folder with seg/original and its geometry")
    parser.add_argument(
        "--keep", type=int, default=2, metavar="N", help="every N-th slice is known (default: 2)"
    )
    parser.add_argument(
        "--interp", type=int, default=4, metavar="n", help="frames per kept slice (default: 4)"
    )
    parser.add_argument("--model", type=Path, help="model folder with renders of --interp n")
    parser.add_argument("--samples", type=int, default=SAMPLES, help=f"points per mesh (default: {SAMPLES})")
    parser.add_argument(
        "--out", type=Path, default=Path("output/benchmark/meshes.jsonl"), help="of the results"
    )
    parser.add_argument("--meshes", type=Path, help="keep the meshes in this folder")
    given = parser.parse_args()
    for name in ("keep", "interp", "samples"):
        if getattr(given, name) < 1:
            raise UserError(f"--{name} {getattr(given, name)} is not a positive number")
    masks, affine = full_masks(given.case)
    kept = np.arange(0, len(masks), given.keep)
    if len(kept) < 2:
        raise UserError(f"{given.case}: {len(masks)} slices are too few for --keep {given.keep}")

    reference = between(surface(masks.astype(np.float32), 0.5, affine, closed=False), affine, kept[-1])
    line: dict[str, Any] = {
        "about": describe(torch.device("cpu")),
        "case": given.case.resolve().name,
        "keep": given.keep,
        "interp": given.interp,
        "samples": given.samples,
        "model": given.model and str(given.model.resolve().name),
        "surfaces": [],
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.meshes or Path(temporary, "meshes")
        for name, frames, inter in methods(masks[kept], affine, given):
            case = Path(temporary, name.replace(" ", "_"))
            place(case, frames, affine @ np.diag([1.0, 1.0, given.keep, 1.0]), inter)
            for smoothing, options in SMOOTHING.items():
                out = folder / smoothing
                words = ["-i", str(case), "-o", str(out), "--open", "--thresh", "127.5", "--quiet", *options]
                run_program("slices_to_ply.py", *words)
                mesh = between(in_space(read_mesh(out / f"{case.name}.ply"), "RAS"), affine, kept[-1])
                scores = asdict(surface_scores(mesh, reference, given.samples))
                line["surfaces"].append({"method": name, "smoothing": smoothing, **scores})
    text = given.out.read_text(encoding="utf-8") if given.out.exists() else ""
    with atomic_write(given.out) as unfinished:
        unfinished.write_text(text + json.dumps(line) + "\n", encoding="utf-8")
    print(surface_table([line]))
    print(f"{given.samples} points per surface; written to {given.out}")


def full_masks(case: Path) -> tuple[np.ndarray, np.ndarray]:
    """All masks (frame, row, column) bool, and (column, row, frame) to RAS mm (4, 4)."""
    stack = read_stack(case / "seg" / "original")
    masks, affine = stack.values >= 0.5, stack.affine
    if stack.heights is not None:
        raise UserError(f"{case} has unevenly spaced slices: taking every N-th is not a fair test")
    for path in sorted(case.glob("*.nii*")) if affine is None else ():
        shape, affine = nifti_grid(path)
        if shape != masks.shape[::-1]:
            raise UserError(
                f"{path} has shape {shape}, its frames {masks.shape[::-1]}: they do not belong together"
            )
        break
    if affine is None:
        raise UserError(f"{case} has neither frames.json nor a NIfTI file: nothing is known in mm")
    return masks, affine


def methods(masks: np.ndarray, affine: np.ndarray, given: Any) -> Iterator[tuple[str, np.ndarray, int]]:
    """Name, frames (F, H, W) in [0, 1], and their number per kept slice. masks: the kept ones, (K, H, W) bool."""
    yield "kept slices", masks.astype(np.float32), 1
    column, row, _ = np.linalg.norm(affine[:3, :3], axis=0).tolist()
    at = np.arange((len(masks) - 1) * given.interp + 1) / given.interp
    slices = np.arange(len(masks), dtype=np.float64)
    distances = signed_distances(masks, (row, column), given.keep * float(np.linalg.norm(affine[:3, 2])))
    edge = EDGE * min(row, column)
    yield "signed distances", np.clip(0.5 + interpolate(distances, slices, at) / edge, 0, 1), given.interp
    yield "linear blend", interpolate(masks.astype(np.float32), slices, at), given.interp
    if given.model is None:
        return
    for name in FRAME_FOLDERS:
        renders = sub_frames(image_files(given.model / name)) if (given.model / name).is_dir() else None
        if renders:
            wanted = [divmod(number, given.interp) for number in range((len(masks) - 1) * given.interp + 1)]
            missing = sorted({*wanted} - {*renders}) or sorted(n for n in renders if n[0] >= len(masks))
            if missing:
                raise UserError(
                    f"{given.model / name} is not of {len(masks)} frames with --interp {given.interp}: see frame"
                    f" {missing[0][0]:05d}_{missing[0][1]}"
                )
            frames = np.stack([to_grey(read_image(renders[place_])) for place_ in wanted])
            if frames.shape[1:] != masks.shape[1:]:
                raise UserError(f"{given.model / name} has frames of another size than the case")
            yield "model", frames, given.interp
            return
    raise UserError(
        f"{given.model} has no renders: run render.py -m {given.model} --interp {given.interp} first"
    )


def place(case: Path, frames: np.ndarray, affine: np.ndarray, inter: int) -> None:
    """A case folder for slices_to_ply.py: 16-bit frames, and a NIfTI file of the kept slices' grid."""
    for number, frame in enumerate(frames):
        write_image(case / "render_mask" / f"{number // inter:05d}_{number % inter}.png", frame, 16)
    shape = (frames.shape[2], frames.shape[1], -(-len(frames) // inter))
    nibabel.save(nibabel.Nifti1Image(np.zeros(shape, np.uint8), affine), case / "grid.nii.gz")


def between(mesh: Trimesh, affine: np.ndarray, last: int) -> Trimesh:
    """The mesh (RAS) between the planes of frame 0 and frame `last`, open where they cut it."""
    upwards = np.linalg.inv(affine)[2, :3]  # where the frame index grows
    upwards /= np.linalg.norm(upwards)
    vertices, triangles = np.asarray(mesh.vertices), np.asarray(mesh.faces)
    for frame, normal in ((0, upwards), (last, -upwards)):
        vertices, triangles, _ = slice_faces_plane(vertices, triangles, normal, affine[:3] @ (0, 0, frame, 1))
    return Trimesh(vertices, triangles, process=False)


if __name__ == "__main__":
    run(main)
