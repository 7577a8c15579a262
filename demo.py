"""Lay out a finished run on one sheet: input frames, their renders, frames in between, and the mesh.

python demo.py --data data/case --model output/case --mesh meshes/case.ply --out output/demo
"""

from __future__ import annotations

import argparse
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from scipy.ndimage import gaussian_filter
from skimage.transform import resize

from utils.errors import ArgumentParser, UserError, run
from utils.files import atomic_write
from utils.geometry import Geometry, swap_ras_lps
from utils.images import image_files, read_image, to_unit
from utils.meshes import VOXELS, read_ply, signed_volume

matplotlib.use("Agg")  # before pyplot, which else looks for a display
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLUMNS = 5
GAP = 0.45  # inches between rows of frames, for their captions
BACKGROUND, TEXT, FAINT, ACCENT = "#101317", "#e9edf1", "#8d98a5", "#ffb454"
SKIN = np.array([0.93, 0.67, 0.52])  # the mesh
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
    options = _parser().parse_args(arguments)
    data, model, out = Path(options.data), Path(options.model), Path(options.out)
    inputs = image_files(_original(data))
    renders, masks = Renders.find(model / "render_img"), Renders.find(model / "render_mask")
    if renders is None:
        raise UserError(f"{model / 'render_img'} has no renders: run render.py -m {model} --interp 8 first")
    if len(inputs) < 2 or renders.sub_frames < 2:
        raise UserError(
            f"{model / 'render_img'} has nothing in between frames: run render.py -m {model} --interp 8"
        )
    vertices, triangles, unit = _mesh_in_lps(Path(options.mesh))

    psnrs = [_psnr(renders.read(k, 0), _opaque(read_image(path))) for k, path in enumerate(inputs)]
    geometry = Geometry.find(_original(data).parent)
    spacing = geometry.spacing if geometry is not None else None
    pixel_aspect = spacing[1] / spacing[0] if spacing else 1.0  # height of a pixel over its width

    # Inches. The frames take the left 62 % of the width; what their shape needs in height decides the sheet's.
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
    _draw_mesh(_axes(figure, 0.69 * width, middle - side / 2, side, side), vertices, triangles, unit)

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
    """Three rows of frames of `size` inches below and right of `corner`: inputs, their renders, frames in between."""

    def cell(row: int, column: int, image: np.ndarray, caption: str, mask: np.ndarray | None = None) -> None:
        bottom = corner[1] - row * (size[1] + GAP) - size[1]
        axes = _axes(figure, corner[0] + column * size[0], bottom, 0.97 * size[0], size[1])
        _show(axes, image, pixel_aspect, caption, mask)
        if column == 0:
            name = ("input", "render", "in between")[row]
            middle = (bottom + size[1] / 2) / figure.get_figheight()
            figure.text(0.03, middle, name, color=ACCENT, fontsize=14, rotation=90, va="center")

    shown = np.linspace(0, len(inputs) - 1, COLUMNS + 2).round().astype(int)[1:-1]  # the ends are often empty
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


def _parser() -> argparse.ArgumentParser:
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
    """10 log10(1 / MSE), the MSE floored at 1e-10; a frame trained at another resolution is resized to the render."""
    if render.shape[:2] != frame.shape[:2]:
        frame = resize(frame, (*render.shape[:2], *frame.shape[2:]), order=1, anti_aliasing=True)
    if render.ndim != frame.ndim:
        render, frame = np.atleast_3d(render), np.atleast_3d(frame)
    return float(10 * np.log10(1 / max(np.mean((render.astype(np.float64) - frame) ** 2), 1e-10)))


def _liveliest(inputs: list[Path]) -> int:
    """The frame of the middle half that differs most from its next one: where in-between frames have most to show."""
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


def _mesh_in_lps(path: Path) -> tuple[np.ndarray, np.ndarray, str]:
    """Vertices, triangles and the unit of length of a mesh of slices_to_ply.py."""
    vertices, triangles, comments = read_ply(path)
    if len(triangles) == 0:
        raise UserError(f"{path} has no triangles")
    unit = "voxels" if VOXELS in comments else "mm"
    return (swap_ras_lps(vertices) if "SPACE=RAS" in comments else vertices), triangles, unit


def _draw_mesh(axes: Axes, vertices: np.ndarray, triangles: np.ndarray, unit: str) -> None:
    """The shaded mesh with its size, volume and a scale bar."""
    side = 700
    picture, scale = shade(vertices, triangles, TO_VIEWER, side)
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
    volume = signed_volume(vertices, triangles)
    sizes = " x ".join(f"{size:.0f}" for size in np.ptp(vertices, axis=0))
    text = f"{volume / 1000:,.1f} ml" if unit == "mm" else f"{volume:,.0f} voxels"
    axes.text(
        side * 0.96, bottom, f"{sizes} {unit}, {text}", color=FAINT, fontsize=11, ha="right", va="center"
    )
    axes.set_title(f"mesh, {len(triangles):,} triangles", color=ACCENT, fontsize=14, pad=6)


def _round_number(length: float) -> float:
    """The largest of 1, 2, 5, 10, 20, ... that is at most `length`."""
    power = 10.0 ** np.floor(np.log10(length))
    return float(power * max(step for step in (1, 2, 5) if step * power <= length * (1 + 1e-9)))


def shade(
    vertices: np.ndarray, triangles: np.ndarray, to_viewer: np.ndarray, side: int
) -> tuple[np.ndarray, float]:
    """A picture of a mesh from afar (no perspective): RGBA (side, side, 4) in [0, 1], and pixels per unit of length.

    vertices (V, 3) with z up; to_viewer (3,) points from the mesh to the eye.
    """
    back = to_viewer / np.linalg.norm(to_viewer)
    right = np.cross([0, 0, 1.0], back)
    right /= np.linalg.norm(right)
    view = np.stack((right, np.cross(back, right), back))  # rows: picture right, picture up, towards the eye

    fine = 2 * side  # supersampled twice in each direction, which smooths the edges
    points = (vertices - (vertices.min(0) + vertices.max(0)) / 2) @ view.T
    scale = 0.94 * fine / np.ptp(points[:, :2], axis=0).max()
    middle = (points.min(0) + points.max(0)) / 2
    points = (points - middle) * scale * np.array([1, -1, 1]) + np.array(
        [fine / 2, fine / 2, 0]
    )  # column, row, depth

    first, second, third = vertices[triangles].transpose(1, 0, 2)
    facing = np.cross(second - first, third - first) @ view.T
    normals = np.zeros_like(vertices)
    for corner in range(3):
        np.add.at(normals, triangles[:, corner], facing)  # weighted by area: the cross product's length
    normals /= np.linalg.norm(normals, axis=1, keepdims=True) + 1e-12
    front = triangles[facing[:, 2] > 0]  # of a closed mesh the others are hidden

    depths, picked = _nearest(points[front].astype(np.float32), normals[front].astype(np.float32), fine)
    seen = np.isfinite(depths)
    picked /= np.linalg.norm(picked, axis=2, keepdims=True) + 1e-12

    # Light: a key from the upper left, a weak fill from the right, a highlight; crevices are darker, since a pixel that
    # lies deeper than its surroundings sees less of the sky.
    key, fill = _unit(-0.45, 0.65, 0.65), _unit(0.8, -0.1, 0.4)
    diffuse = np.clip(picked @ key, 0, 1) * 0.78 + np.clip(picked @ fill, 0, 1) * 0.2 + 0.16
    highlight = np.clip(picked @ _unit(*(key + np.array([0, 0, 1]))), 0, 1) ** 40 * 0.22
    crevice = np.zeros_like(depths)
    for radius in (fine / 120, fine / 40):
        weight = gaussian_filter(seen.astype(np.float64), radius) + 1e-9
        around = gaussian_filter(np.where(seen, depths, 0), radius) / weight
        crevice += np.clip((around - depths) / (3 * radius), 0, 1) * 0.45
    colours = SKIN * (diffuse * (1 - np.where(seen, crevice, 0)))[:, :, None] + highlight[:, :, None]
    picture = np.where(seen[:, :, None], np.dstack((np.clip(colours, 0, 1), np.ones_like(depths))), 0)
    small = picture.reshape(side, 2, side, 2, 4).mean(axis=(1, 3))
    small[:, :, :3] /= np.maximum(small[:, :, 3:], 1e-9)  # colours of the covered part alone
    return np.clip(small, 0, 1), scale / 2


def _nearest(corners: np.ndarray, normals: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Depths (side, side), -inf where nothing is, and normals (side, side, 3) of what lies nearest to the eye.

    corners: (T, 3 corners, column row depth) in pixels; normals: (T, 3 corners, 3). Triangles are sampled more densely
    than pixels, each by the length of its longest edge, and the samples compete.
    """
    depths = np.full(side * side, -np.inf, np.float32)
    picked = np.zeros((side * side, 3), np.float32)
    edges = np.linalg.norm(corners[:, :, :2] - np.roll(corners[:, :, :2], 1, axis=1), axis=2).max(axis=1)
    counts = 2 ** np.ceil(np.log2(np.maximum(edges * 1.2, 1))).astype(
        int
    )  # steps along an edge, under a pixel each
    for count in np.unique(counts):
        i, j = np.meshgrid(np.arange(count + 1), np.arange(count + 1))
        inside = i + j <= count
        shares = (
            np.stack((i[inside], j[inside], (count - i - j)[inside]), axis=1) / count
        )  # (samples, 3 corners)
        shares = shares.astype(np.float32)
        chosen = np.flatnonzero(counts == count)
        for part in np.array_split(chosen, len(chosen) * len(shares) // 2_000_000 + 1):
            points = (shares @ corners[part]).reshape(-1, 3)
            pixels = np.clip(points[:, :2].astype(int), 0, side - 1) @ np.array([1, side])
            order = np.argsort(points[:, 2])
            best = np.full(side * side, -1)
            best[pixels[order]] = order  # of several writes the last stays: the nearest
            won = np.flatnonzero(best >= 0)
            won = won[points[best[won], 2] > depths[won]]
            samples = best[won]
            depths[won] = points[samples, 2]
            triangle, share = np.divmod(samples, len(shares))
            picked[won] = np.einsum("sc,scx->sx", shares[share], normals[part[triangle]])
    return depths.reshape(side, side), picked.reshape(side, side, 3)


def _unit(*direction: float) -> np.ndarray:
    return np.array(direction) / np.linalg.norm(direction)


if __name__ == "__main__":
    run(main)
