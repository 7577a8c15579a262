"""The demonstration: a mask for a volume that has none, and a sheet of what was learned from every second slice.

    python demo.py mask -i volume.nii.gz -o mask.nii.gz
    python demo.py sheet -m output/case --mesh meshes/case.ply -o output/demo/preview.png

make demo runs both, and the programs between them.
"""

from __future__ import annotations

import utils.threads  # noqa: F401  # isort: skip  (before torch)

import argparse
import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import nibabel
import numpy as np
from scipy.ndimage import binary_fill_holes

from patient.meshes import in_space, largest, otsu
from patient.readers import read_volume
from patient.side_views import middle_of, side_views
from pictures.shading import shade
from utils.errors import ArgumentParser, UserError, run
from utils.files import atomic_write

matplotlib.use("Agg")  # before pyplot, which else looks for a display
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from trimesh import Trimesh

SLICES = 2  # held-out slices on the sheet
GAP = 0.2  # inches between rows of pictures
BACKGROUND, TEXT, FAINT, ACCENT, GOOD = "#101317", "#e9edf1", "#8d98a5", "#e69f00", "#56b4e9"
TO_VIEWER = np.array([0.55, -0.75, 0.38])  # LPS: from the patient's front left, a little above


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    return write_mask(options) if options.what == "mask" else write_sheet(options)


def parser() -> argparse.ArgumentParser:
    line = ArgumentParser(prog="demo.py", description=(__doc__ or "").split("\n")[0])
    kinds = line.add_subparsers(dest="what", required=True, metavar="{mask,sheet}")
    mask = kinds.add_parser(
        "mask", help="a mask of a volume: what is bright, its largest body, without holes"
    )
    mask.add_argument("-i", "--input", required=True, help="the volume: NIfTI, DICOM, NRRD, ...")
    mask.add_argument("-o", "--output", required=True, help="the mask, a NIfTI file")
    mask.add_argument("--frame", type=int, help="which volume of a 4-D file")
    sheet = kinds.add_parser(
        "sheet", help="slices held out, linear interpolation, ours, a cut across them, the mesh"
    )
    sheet.add_argument(
        "-m", "--model_path", required=True, help="a model that train.py scored on held-out slices"
    )
    sheet.add_argument("--mesh", help="a mesh of slices_to_ply.py (default: made of the model's masks)")
    sheet.add_argument("-o", "--output", required=True, help="the sheet, a PNG")
    sheet.add_argument("--device", default="auto", help="auto, cuda, cuda:N or cpu (default: auto)")
    for kind in (mask, sheet):
        kind.add_argument("--debug", action="store_true", help="print the traceback of an error too")
    return line


# ---- the mask --------------------------------------------------------------------------------------------------------


def write_mask(options: argparse.Namespace) -> int:
    """What reaches Otsu's threshold, its largest body, without holes in any slice."""
    volume = read_volume(options.input, options.frame)
    if volume.values.ndim != 3 or volume.affine is None:
        raise UserError(f"{options.input} is no grey volume with a place in the patient: give a NIfTI file")
    values = np.asarray(volume.values, np.float32)
    try:
        level = otsu(values)
    except ValueError as error:
        raise UserError(f"{options.input} has nothing to tell from the rest: {error}") from error
    body = largest((values >= level).astype(np.float32), 0.5) >= 0.5
    filled = np.stack([binary_fill_holes(body[:, :, k]) for k in range(body.shape[2])], -1)
    with atomic_write(options.output) as temporary:
        data = nibabel.Nifti1Image(filled.astype(np.uint8), volume.affine).to_bytes()
        temporary.write_bytes(gzip.compress(data, mtime=0) if options.output.endswith(".gz") else data)
    print(f"{options.output}: what is {level:.4g} or brighter, {filled.mean():.0%} of the volume")
    return 0


# ---- the sheet -------------------------------------------------------------------------------------------------------


def write_sheet(options: argparse.Namespace) -> int:
    from arguments import model_options  # with torch, which masks do without
    from viewer.case import Case
    from viewer.report import cut_stacks

    case = Case.open(
        model_options({"model_path": options.model_path, "device": options.device}), mesh=options.mesh
    )
    stacks, masks, spacing = cut_stacks(case)
    if not stacks:
        raise UserError(
            f"{options.model_path} has no held-out slices to show: prepare with --keep_every 2, and train on that"
        )
    mesh = case.mesh
    if mesh is None:
        raise UserError("give a mesh of slices_to_ply.py: --mesh FILE")
    if mesh.metadata["space"] == "RAS":
        mesh = in_space(mesh, "LPS")
    numbers = _numbers(Path(options.model_path))

    # Inches. Pictures take the left two thirds of the width; what their shape needs in height decides the sheet's.
    width, header = 16.0, 1.3
    depth = len(next(iter(stacks.values())))
    kept, hidden = case.model.num_frames, len(case.heldout_positions)
    ordered = sorted([*map(float, range(kept)), *case.heldout_positions])
    held = [ordered.index(place) for place in case.heldout_positions]
    places = np.linspace(0, depth - 1, SLICES + 2).round().astype(int)[1:-1]
    shown = [min(held, key=lambda other: abs(other - k)) for k in places.tolist()]
    inside = masks.get("ours", np.zeros_like(next(iter(stacks.values()))))
    _, row, column = middle_of(inside >= 0.5)
    matrix = None if case.geometry is None else case.geometry.matrix
    lines = [(f"slice {k}", lambda stack, k=k: stack[k], spacing[1] / spacing[0]) for k in shown]
    lines += [
        (view.name, lambda stack, view=view: view.cut(stack, row, column), view.aspect(spacing))
        for view in side_views(matrix)
    ]
    cell = 0.66 * width / len(stacks)
    talls = []
    for _, cut, aspect in lines:
        tall, wide = cut(inside).shape
        talls.append(min(max(cell * tall * aspect / wide, 0.7), 3.2))
    height = header + sum(talls) + GAP * len(lines) + 0.1
    figure = plt.figure(figsize=(width, height), facecolor=BACKGROUND)
    name = case.geometry.source.split(".")[0] if case.geometry is not None else case.name
    title = f"{name}: {kept} slices seen, the {hidden} between them hidden"
    figure.text(0.025, 1 - 0.4 / height, title, color=TEXT, fontsize=20, weight="bold", va="center")
    figure.text(0.025, 1 - 0.8 / height, numbers, color=FAINT, fontsize=14, va="center")

    left = 0.05 * width
    for place, (words, stack) in enumerate(stacks.items()):
        top = height - header
        for number, ((aside, cut, aspect), tall) in enumerate(zip(lines, talls, strict=True)):
            axes = _axes(figure, left + place * cell, top - tall, 0.97 * cell, tall)
            _show(axes, cut(stack), cut(masks[words]) if words in masks else None, aspect)
            if number == 0:
                heading = "hidden slice" if words == "every slice" else words
                colour = GOOD if words == "ours" else TEXT
                axes.set_title(heading, color=colour, fontsize=14, weight="bold", pad=6)
            if place == 0:
                _aside(figure, left, top - tall / 2, aside)
            top -= tall + GAP
    across = 0.3 * width
    _draw_mesh(_axes(figure, 0.69 * width, (height - header - across) / 2, across, across), mesh)

    with atomic_write(options.output) as temporary:
        figure.savefig(temporary, dpi=110, facecolor=BACKGROUND)
    plt.close(figure)
    print(numbers)
    return 0


def _numbers(folder: Path) -> str:
    """Scores on held-out slices in a line: ours, and the classical method that comes closest."""
    try:
        rows: list[dict[str, Any]] = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / 'evaluation.json'} has no scores: train with train.py") from error
    newest = max((row["iteration"] for row in rows), default=0)
    words = []
    for task, key, template in (("img", "psnr", "{:.2f} dB"), ("seg", "dice", "Dice {:.4f}")):
        found = {
            row["method"]: row[key]
            for row in rows
            if (row["iteration"], row["task"], row["frames"]) == (newest, task, "heldout")
        }
        if "model" in found and len(found) > 1:
            ours = found.pop("model")
            rival = max(found, key=lambda method: found[method])
            names = {
                "cubic": "cubic splines",
                "sdf": "signed distances",
                "cubic sdf": "cubic signed distances",
            }
            kind = "images" if task == "img" else "mask"
            rest = f"{names.get(rival, rival + ' interpolation')} {template.format(found[rival])}"
            words.append(f"{kind} {template.format(ours)}, {rest}")
    return "On the hidden slices: " + "; ".join(words)


def _axes(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """Axes at a place in inches."""
    across, up = figure.get_size_inches()
    return figure.add_axes((left / across, bottom / up, width / across, height / up))


def _aside(figure: Figure, left: float, middle: float, words: str) -> None:
    across, up = figure.get_size_inches()
    place = (left - 0.2) / across, middle / up
    figure.text(*place, words, color=ACCENT, fontsize=13, rotation=90, va="center", ha="center")


def _show(axes: Axes, image: np.ndarray, mask: np.ndarray | None, aspect: float) -> None:
    axes.imshow(image, cmap="gray", vmin=0, vmax=1, aspect=aspect, interpolation="bilinear")
    if mask is not None and mask.min() < 0.5 < mask.max():
        axes.contour(mask, [0.5], colors=[ACCENT], linewidths=1.3)
    axes.axis("off")


def _draw_mesh(axes: Axes, mesh: Trimesh) -> None:
    """The shaded mesh with its size, volume and a scale bar."""
    side = 700
    unit = mesh.metadata["unit"] or "mm"
    picture, scale = shade(mesh, TO_VIEWER, side)
    axes.imshow(picture, interpolation="lanczos")
    axes.axis("off")
    axes.set_ylim(side * 1.12, 0)
    length = _round_number(side / scale / 4)
    left, bottom = side * 0.06, side * 1.04
    axes.plot(
        [left, left + length * scale], [bottom, bottom], color=TEXT, linewidth=2.5, solid_capstyle="butt"
    )
    axes.text(
        left + length * scale / 2, bottom - 12, f"{length:g} {unit}", color=TEXT, fontsize=11, ha="center"
    )
    sizes = " x ".join(f"{size:.0f}" for size in mesh.extents)
    text = f"{mesh.volume / 1000:,.1f} ml" if unit == "mm" else f"{mesh.volume:,.0f} voxels"
    axes.text(
        side * 0.96, bottom, f"{sizes} {unit}, {text}", color=FAINT, fontsize=11, ha="right", va="center"
    )
    axes.set_title(f"mesh of our mask, {len(mesh.faces):,} triangles", color=ACCENT, fontsize=14, pad=6)


def _round_number(length: float) -> float:
    """The largest of 1, 2, 5, 10, 20, ... that is at most `length`."""
    power = 10.0 ** np.floor(np.log10(length))
    return float(power * max(step for step in (1, 2, 5) if step * power <= length * (1 + 1e-9)))


if __name__ == "__main__":
    run(main)
