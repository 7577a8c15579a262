"""Lay out a finished run on one sheet: input frames, their renders, frames in between, and the mesh.

python demo.py --data data/case --model output/case --mesh meshes/case.ply --out output/demo
"""

from __future__ import annotations

import utils.threads  # noqa: F401  # isort: skip  (before torch)

import argparse
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from skimage.transform import resize

from patient.geometry import Geometry
from patient.meshes import in_space, read_mesh
from pictures.shading import shade
from utils.errors import ArgumentParser, UserError, run
from utils.files import atomic_write
from utils.images import image_files, read_image, to_unit

matplotlib.use("Agg")  # before pyplot, which would look for a display
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from trimesh import Trimesh

COLUMNS = 5
GAP = 0.45  # inches between rows of frames, for their captions
BACKGROUND, TEXT, FAINT, ACCENT = "#101317", "#e9edf1", "#8d98a5", "#ffb454"
TO_VIEWER = np.array([0.55, -0.75, 0.38])  # LPS: from the patient's front left, a little above


@dataclass(frozen=True)
class Renders:
    """The files of render_img or render_mask, by frame and sub-frame."""

    files: dict[tuple[int, int], Path]

    @property
    def sub_frames(self) -> int:
        return max(sub_frame for _, sub_frame in self.files) + 1

    def read(self, frame: int, sub_frame: int) -> np.ndarray:
        if (frame, sub_frame) not in self.files:
            raise UserError(
                f"{next(iter(self.files.values())).parent} has no {frame:05d}_{sub_frame}: render again"
            )
        return _opaque(read_image(self.files[frame, sub_frame]))

    @classmethod
    def find(cls, folder: Path) -> Renders | None:
        if not folder.is_dir():
            return None
        named = ((re.fullmatch(r"(\d+)_(\d+)", path.stem), path) for path in image_files(folder))
        files = {(int(number[1]), int(number[2])): path for number, path in named if number}
        return cls(files) if files else None


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    data, model, out = Path(options.data), Path(options.model), Path(options.out)
    inputs = image_files(_original(data))
    renders, masks = Renders.find(model / "render_img"), Renders.find(model / "render_mask")
    if renders is None:
        raise UserError(f"{model / 'render_img'} has no renders: run render.py -m {model} --interp 8 first")
    if len(inputs) < 2 or renders.sub_frames < 2:
        raise UserError(
            f"{model / 'render_img'} has nothing between the frames: run render.py -m {model} --interp 8"
        )
    mesh = read_mesh(options.mesh)
    if mesh.metadata["space"] == "RAS":
        mesh = in_space(mesh, "LPS")

    psnrs = [_psnr(renders.read(k, 0), _opaque(read_image(path))) for k, path in enumerate(inputs)]
    geometry = Geometry.find(_original(data).parent)
    spacing = geometry.spacing if geometry is not None else None
    pixel_aspect = spacing[1] / spacing[0] if spacing else 1.0  # height of a pixel over its width

    # Inches. The frames take the left 62 % of the width; their shape decides the height of the sheet.
    width, header = 16.0, 1.25
    rows, columns = renders.read(0, 0).shape[:2]
    frame_width = 0.62 * width / COLUMNS
    frame_height = min(frame_width * rows * pixel_aspect / columns, 3.0)
    height = header + 3 * (frame_height + GAP)
    figure = plt.figure(figsize=(width, height), facecolor=BACKGROUND)

    name = geometry.source.split(".")[0] if geometry is not None else data.resolve().name
    summary = f"{len(inputs)} frames learned at {np.mean(psnrs):.2f} dB, rendered {renders.sub_frames} times as densely"
    summary += ", mask outlined" if masks else ""
    figure.text(0.03, 1 - 0.4 / height, name, color=TEXT, fontsize=20, weight="bold", va="center")
    figure.text(0.03, 1 - 0.72 / height, summary, color=FAINT, fontsize=13)
    _draw_frames(
        figure,
        (0.055 * width, height - header),
        (frame_width, frame_height),
        pixel_aspect,
        inputs,
        renders,
        masks,
        psnrs,
    )
    side = min(0.3 * width, height - header)
    middle = (height - header + 0.6) / 2
    _draw_mesh(_axes(figure, 0.69 * width, middle - side / 2, side, side), mesh)

    preview = out / "preview.png"
    with atomic_write(preview) as temporary:
        figure.savefig(temporary, dpi=120, facecolor=BACKGROUND)
    plt.close(figure)
    spread = f"{min(psnrs):.2f} to {max(psnrs):.2f}"
    print(f"PSNR on the {len(inputs)} training frames: {np.mean(psnrs):.2f} dB ({spread})")
    print(f"  {preview}  this sheet")
    print(f"  {options.mesh}  the mesh: 3D Slicer, MeshLab and Blender open it")
    print(f"  {model / 'render_img'}  {len(renders.files)} renders")
    print("Next: your own volume")
    print("  python prepare.py -i volume.nii.gz -l label.nii.gz -o data/case")
    print(
        "  python train.py -s data/case/img --pipeline joint --seg_source_path data/case/seg -m output/case"
    )
    print("  python render.py -m output/case --interp 8 --pipeline both")
    print("  python slices_to_ply.py -i output/case -o meshes")
    return 0


def _draw_frames(
    figure: Figure,
    corner: tuple[float, float],
    size: tuple[float, float],
    pixel_aspect: float,
    inputs: list[Path],
    renders: Renders,
    masks: Renders | None,
    psnrs: list[float],
) -> None:
    """Three rows of frames of `size` inches, below and right of `corner`: inputs, their renders, frames in between."""

    def cell(row: int, column: int, image: np.ndarray, caption: str, mask: np.ndarray | None = None) -> None:
        bottom = corner[1] - row * (size[1] + GAP) - size[1]
        axes = _axes(figure, corner[0] + column * size[0], bottom, 0.97 * size[0], size[1])
        _show(axes, image, pixel_aspect, caption, mask)
        if column == 0:
            name = ("input", "render", "in between")[row]
            middle = (bottom + size[1] / 2) / figure.get_figheight()
            figure.text(0.03, middle, name, color=ACCENT, fontsize=14, rotation=90, va="center")

    shown = (
        np.linspace(0, len(inputs) - 1, COLUMNS + 2).round().astype(int)[1:-1]
    )  # the first and last frames are often empty
    for column, k in enumerate(shown.tolist()):
        cell(0, column, _opaque(read_image(inputs[k])), f"frame {k}")
        cell(1, column, renders.read(k, 0), f"{psnrs[k]:.1f} dB", masks.read(k, 0) if masks else None)

    first, count = _liveliest(inputs), renders.sub_frames
    steps = np.linspace(0, count, min(COLUMNS, count + 1)).round().astype(int)
    for column, step in enumerate(steps.tolist()):
        k, i = first + step // count, step % count
        caption = f"{k} (a frame)" if i == 0 else f"{k + i / count:.2f}"
        cell(2, column, renders.read(k, i), caption, masks.read(k, i) if masks else None)


def _axes(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """Axes at a place in inches."""
    across, up = figure.get_size_inches()
    return figure.add_axes((left / across, bottom / up, width / across, height / up))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = ArgumentParser(prog="demo.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", required=True, help="folder of prepare.py, or a data root with original/")
    parser.add_argument("--model", required=True, help="model folder, rendered with render.py --interp")
    parser.add_argument("--mesh", required=True, help="PLY file of slices_to_ply.py")
    parser.add_argument("--out", default="output/demo", help="where preview.png goes (default: output/demo)")
    parser.add_argument("--debug", action="store_true", help="print the traceback of an error too")
    return parser


def _original(data: Path) -> Path:
    for folder in (data / "img" / "original", data / "original"):
        if folder.is_dir():
            return folder
    raise UserError(
        f"{data} has neither img/original nor original: give --data a folder that prepare.py wrote"
    )


def _opaque(image: np.ndarray) -> np.ndarray:
    """(H, W) or (H, W, 3), float32 in [0, 1]; colours that are all grey become one channel."""
    unit = to_unit(image)
    if unit.ndim == 2:
        return unit
    unit = unit[:, :, :3]
    return unit[:, :, 0] if (unit == unit[:, :, :1]).all() else unit


def _psnr(render: np.ndarray, frame: np.ndarray) -> float:
    """10 log10(1 / MSE), the MSE floored at 1e-10; the frame is resized if the model has another resolution."""
    if render.shape[:2] != frame.shape[:2]:
        frame = resize(frame, (*render.shape[:2], *frame.shape[2:]), order=1, anti_aliasing=True)
    if render.ndim != frame.ndim:
        render, frame = np.atleast_3d(render), np.atleast_3d(frame)
    return float(10 * np.log10(1 / max(np.mean((render.astype(np.float64) - frame) ** 2), 1e-10)))


def _liveliest(inputs: list[Path]) -> int:
    """The frame in the middle half that differs most from the next: where in-between frames show most."""
    first, last = len(inputs) // 4, max(len(inputs) * 3 // 4, len(inputs) // 4 + 1)
    frames = [_opaque(read_image(path)) for path in inputs[first : last + 1]]
    changes = [np.mean((now - then) ** 2) for then, now in itertools.pairwise(frames)]
    return first + int(np.argmax(changes))


def _show(axes: Axes, image: np.ndarray, aspect: float, caption: str, mask: np.ndarray | None = None) -> None:
    axes.imshow(image, cmap="gray", vmin=0, vmax=1, aspect=aspect, interpolation="lanczos")
    if mask is not None:
        mask = mask if mask.ndim == 2 else mask.mean(axis=2)
        if mask.min() < 0.5 < mask.max():
            axes.contour(mask, [0.5], colors=[ACCENT], linewidths=1.1)
    axes.set_title(caption, color=TEXT, fontsize=11, pad=4)
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
    axes.set_title(f"mesh, {len(mesh.faces):,} triangles", color=ACCENT, fontsize=14, pad=6)


def _round_number(length: float) -> float:
    """The largest of 1, 2, 5, 10, 20, ... that is at most `length`."""
    power = 10.0 ** np.floor(np.log10(length))
    return float(power * max(step for step in (1, 2, 5) if step * power <= length * (1 + 1e-9)))


if __name__ == "__main__":
    run(main)
