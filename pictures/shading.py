"""Pictures of meshes: one shaded view, and a sheet of three views with axes, and its outline on the slices."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from scipy.ndimage import gaussian_filter
from trimesh import Trimesh
from trimesh.intersections import mesh_plane

from patient.geometry import swap_ras_lps, voxel_sizes
from patient.meshes import is_closed
from patient.side_views import side_views, slice_name
from utils.files import atomic_write

SKIN = np.array([0.93, 0.67, 0.52])
BACKGROUND, TEXT, FAINT, ACCENT = "#101317", "#e9edf1", "#8d98a5", "#ffb454"
VOXEL_AXES = ("column", "row", "frame")
# Direction to the eye in LPS, then what runs right and what runs up: (axis, its sign, names of the ends).
VIEWS = (
    ("from the front", (0, -1, 0), (0, 1, "R", "L"), (2, 1, "I", "S")),
    ("from the left", (1, 0, 0), (1, 1, "A", "P"), (2, 1, "I", "S")),
    ("from the feet", (0, -1e-3, -1), (0, 1, "R", "L"), (1, -1, "P", "A")),
)


@dataclass(frozen=True)
class Slices:
    """The slices that a mesh was made from, to draw its outline on."""

    values: np.ndarray
    """(D, H, W) in [0, 1]: images, or masks where there are none."""
    affine: np.ndarray | None
    """(column, row, slice) to RAS millimetres (4, 4); None for meshes in voxels."""
    heights: np.ndarray | None = None
    """(D,) slice coordinates of unevenly spaced ones."""

    @property
    def spacing(self) -> tuple[float, float, float]:
        return (1.0, 1.0, 1.0) if self.affine is None else voxel_sizes(self.affine)


def write_preview(
    path: str | os.PathLike[str],
    meshes: Sequence[Trimesh],
    title: str,
    slices: Slices | None = None,
    colours: Sequence[np.ndarray] | None = None,
) -> None:
    """Write a PNG of meshes (all in RAS, LPS or voxels) from the front, the left and the feet, at one scale, with axes;
    below them their outlines on a slice and on two cuts across the slices.

    Axes show the coordinates of the mesh files. R, A, S ... mark the patient's directions; voxels have none. colours:
    of the meshes, (3,) in [0, 1] each.
    """
    mesh = _joined(meshes)
    painted = _painted(meshes, colours)
    under = 0.0 if slices is None else 4.6  # inches
    tall = 5.9 + under
    placed = mesh.metadata["space"] is not None
    turned = np.array([-1, -1, 1]) if mesh.metadata["space"] == "RAS" else np.ones(3)  # pictures are of LPS
    shown = Trimesh(mesh.vertices * turned, mesh.faces, process=False)
    middle, across = shown.bounds.mean(axis=0), 1.12 * float(shown.extents.max())
    figure = Figure(figsize=(15, tall), facecolor=BACKGROUND)
    unit = mesh.metadata["unit"] or "units"
    names = [f"{name}, {unit}" for name in (("x", "y", "z") if placed else VOXEL_AXES)]
    for number, (view, to_viewer, *ends) in enumerate(VIEWS):
        place = 0.05 + number * 0.325, (under + 0.65) / tall, 0.275, 4.13 / tall
        axes = figure.add_axes(place, facecolor=BACKGROUND)
        picture, _ = shade(shown, np.array(to_viewer, float), 480, across, painted)
        limits = []  # of the picture, in the file's coordinates
        for axis, sign, _, _ in ends:
            limits += list((middle[axis] + np.array([-0.5, 0.5]) * across * sign) * turned[axis])
        axes.imshow(picture, extent=tuple(limits), interpolation="lanczos")
        axes.set_title(
            view if placed else " and ".join(f"{VOXEL_AXES[end[0]]}s" for end in ends), color=ACCENT, pad=8
        )
        axes.set_xlabel(names[ends[0][0]], color=FAINT)
        axes.set_ylabel(names[ends[1][0]], color=FAINT)
        axes.tick_params(colors=FAINT)
        axes.grid(color=FAINT, alpha=0.18, linewidth=0.6)
        axes.set_axisbelow(True)
        for spine in axes.spines.values():
            spine.set_color("#343b44")
        if placed:
            (_, _, left, right), (_, _, below, above) = ends
            for x, y, text in ((0.03, 0.5, left), (0.97, 0.5, right), (0.5, 0.03, below), (0.5, 0.97, above)):
                axes.text(x, y, text, transform=axes.transAxes, color=TEXT, ha="center", va="center")
    top = 1 - 0.41 / tall
    figure.text(0.05, top, title, color=TEXT, fontsize=17, weight="bold", va="center")
    size = " x ".join(f"{extent:.4g}" for extent in mesh.extents)
    enclosed = f"{mesh.volume / 1000:,.4g} ml" if unit == "mm" else f"{mesh.volume:,.0f} {unit}"
    text = f"{size} {unit}, {enclosed if is_closed(mesh) else 'open'}, {len(mesh.faces):,} triangles"
    text += f", {mesh.metadata['space']}" if placed else ""
    figure.text(0.975, top, text, color=FAINT, fontsize=12, ha="right", va="center")
    if slices is not None:
        lines = colours or [np.array(to_rgb(ACCENT))] * len(meshes)
        _draw_outlines(figure, under / tall, list(zip(meshes, lines, strict=True)), slices)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=110, facecolor=BACKGROUND)


def shade_all(
    meshes: Sequence[Trimesh],
    to_viewer: np.ndarray,
    side: int,
    across: float | None = None,
    colours: Sequence[np.ndarray] | None = None,
) -> tuple[np.ndarray, float]:
    """`shade` of several meshes in one space, each in its colour, (3,) in [0, 1]."""
    return shade(_joined(meshes), to_viewer, side, across, _painted(meshes, colours))


def _painted(meshes: Sequence[Trimesh], colours: Sequence[np.ndarray] | None) -> np.ndarray:
    """The colour of each vertex of all meshes."""
    skins = colours or [SKIN] * len(meshes)
    return np.concatenate(
        [np.tile(skin, (len(m.vertices), 1)) for m, skin in zip(meshes, skins, strict=True)]
    )


def _joined(meshes: Sequence[Trimesh]) -> Trimesh:
    """One mesh of several in the same space."""
    if len(meshes) == 1:
        return meshes[0]
    starts = np.cumsum([0, *(len(mesh.vertices) for mesh in meshes)])
    faces = [mesh.faces + start for mesh, start in zip(meshes, starts[:-1], strict=True)]
    vertices = np.concatenate([mesh.vertices for mesh in meshes])
    return Trimesh(vertices, np.concatenate(faces), process=False, metadata=meshes[0].metadata)


def _draw_outlines(
    figure: Figure, share: float, parts: Sequence[tuple[Trimesh, np.ndarray]], slices: Slices
) -> None:
    """The slice and the two cuts through the middle of the meshes, in the lowest ``share`` of the figure."""
    inner = [_in_slices(mesh, slices.affine) for mesh, _ in parts]
    bounds = np.stack([mesh.bounds for mesh in inner])
    depth, height, width = slices.values.shape
    heights = np.arange(depth, dtype=float) if slices.heights is None else slices.heights
    column, row, level = (bounds[:, 0].min(0) + bounds[:, 1].max(0)) / 2
    k = int(np.abs(heights - level).argmin())
    row, column = int(np.clip(round(row), 0, height - 1)), int(np.clip(round(column), 0, width - 1))

    def section(mesh: Trimesh, axis: int, at: float) -> np.ndarray:  # (n, 2 ends, 3)
        lines: np.ndarray = mesh_plane(mesh, np.eye(3)[axis], np.eye(3)[axis] * (at + 1e-4))
        if slices.heights is not None:
            lines[:, :, 2] = np.interp(lines[:, :, 2], heights, np.arange(depth))
        return lines

    matrix, spacing = slices.affine, slices.spacing
    flat = [section(mesh, 2, heights[k])[:, :, :2] for mesh in inner]
    pictures = [(f"{slice_name(matrix)} {k}", slices.values[k], spacing[1] / spacing[0], flat)]
    for view in side_views(matrix):
        axis, at = (1, row) if view.along_row else (0, column)
        cuts = [section(mesh, axis, at) for mesh in inner]
        ends = [np.stack(view.place(cut[:, :, 1 - axis], cut[:, :, 2], depth), -1) for cut in cuts]
        pictures.append((view.name, view.cut(slices.values, row, column), view.aspect(spacing), ends))
    for number, (name, picture, aspect, ends) in enumerate(pictures):
        axes: Axes = figure.add_axes((0.03 + number * 0.325, 0.05 * share, 0.3, 0.85 * share))
        axes.imshow(picture, cmap="gray", vmin=0, vmax=1, aspect=aspect, interpolation="nearest")
        for lines, (_, colour) in zip(ends, parts, strict=True):
            axes.add_collection(LineCollection(list(lines), colors=[colour], linewidths=1.3))
        axes.set(xlim=(-0.5, picture.shape[1] - 0.5), ylim=(picture.shape[0] - 0.5, -0.5))
        axes.axis("off")
        axes.set_title(name, color=ACCENT, pad=6)


def _in_slices(mesh: Trimesh, affine: np.ndarray | None) -> Trimesh:
    """The mesh in (column, row, slice)."""
    points = np.asarray(mesh.vertices)
    if affine is not None:
        inverse = np.linalg.inv(affine)
        points = swap_ras_lps(points) if mesh.metadata["space"] == "LPS" else points
        points = points @ inverse[:3, :3].T + inverse[:3, 3]
    return Trimesh(points, mesh.faces, process=False)


def shade(
    mesh: Trimesh,
    to_viewer: np.ndarray,
    side: int,
    across: float | None = None,
    colours: np.ndarray | None = None,
) -> tuple[np.ndarray, float]:
    """A picture of a mesh in orthographic projection: RGBA (side, side, 4) in [0, 1], and pixels per unit of length.

    The mesh has z up; to_viewer (3,) points from it to the eye. across: the length that the side of the picture shows,
    in the mesh's unit; by default what the mesh needs. colours: (vertices, 3) in [0, 1], `SKIN` by default.
    """
    vertices, triangles = np.asarray(mesh.vertices), np.asarray(mesh.faces)
    back = to_viewer / np.linalg.norm(to_viewer)
    right = np.cross([0, 0, 1.0], back)
    right /= np.linalg.norm(right)
    view = np.stack((right, np.cross(back, right), back))  # rows: picture right, picture up, towards the eye

    fine = 2 * side  # supersampled twice in each direction, which smooths the edges
    points = (vertices - (vertices.min(0) + vertices.max(0)) / 2) @ view.T
    scale = fine / (across or np.ptp(points[:, :2], axis=0).max() / 0.94)
    middle = (points.min(0) + points.max(0)) / 2
    points = (points - middle) * scale * np.array([1, -1, 1]) + np.array(
        [fine / 2, fine / 2, 0]
    )  # column, row, depth

    normals, facing = mesh.vertex_normals @ view.T, mesh.face_normals @ view.T
    # The far side of a closed mesh is hidden; an open one may show its inside.
    front = triangles[facing[:, 2] > 0] if is_closed(mesh) else triangles

    carried = np.hstack([normals, np.tile(SKIN, (len(vertices), 1)) if colours is None else colours])
    depths, picked = _nearest(points[front].astype(np.float32), carried[front].astype(np.float32), fine)
    seen = np.isfinite(depths)
    picked, skin = picked[:, :, :3], picked[:, :, 3:]
    picked /= np.linalg.norm(picked, axis=2, keepdims=True) + 1e-12
    picked[picked[:, :, 2] < 0] *= -1

    # Light: a key from the upper left, a weak fill from the right, a highlight; crevices are darker, since a pixel
    # that lies deeper than its surroundings sees less of the sky.
    key, fill = _unit(-0.45, 0.65, 0.65), _unit(0.8, -0.1, 0.4)
    diffuse = np.clip(picked @ key, 0, 1) * 0.78 + np.clip(picked @ fill, 0, 1) * 0.2 + 0.16
    highlight = np.clip(picked @ _unit(*(key + np.array([0, 0, 1]))), 0, 1) ** 40 * 0.22
    crevice = np.zeros_like(depths)
    for radius in (fine / 120, fine / 40):
        weight = gaussian_filter(seen.astype(np.float64), radius) + 1e-9
        around = gaussian_filter(np.where(seen, depths, 0), radius) / weight
        crevice += np.clip((around - depths) / (3 * radius), 0, 1) * 0.45
    lit = skin * (diffuse * (1 - np.where(seen, crevice, 0)))[:, :, None] + highlight[:, :, None]
    picture = np.where(seen[:, :, None], np.dstack((np.clip(lit, 0, 1), np.ones_like(depths))), 0)
    small = picture.reshape(side, 2, side, 2, 4).mean(axis=(1, 3))
    small[:, :, :3] /= np.maximum(small[:, :, 3:], 1e-9)  # colours of the covered part alone
    return np.clip(small, 0, 1), scale / 2


def _nearest(corners: np.ndarray, carried: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Depths (side, side), -inf where nothing is, and what is ``carried``, (side, side, n), of the surface nearest to
    the eye.

    corners: (T, 3 corners, column row depth) in pixels; carried: (T, 3 corners, n) at them. Triangles are sampled more
    densely than pixels, each by its longest edge, and the nearest sample of a pixel wins.
    """
    depths = np.full(side * side, -np.inf, np.float32)
    picked = np.zeros((side * side, carried.shape[2]), np.float32)
    edges = np.linalg.norm(corners[:, :, :2] - np.roll(corners[:, :, :2], 1, axis=1), axis=2).max(axis=1)
    counts = 2 ** np.ceil(np.log2(np.maximum(edges * 1.2, 1))).astype(
        int
    )  # steps along an edge, each below a pixel
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
            best[pixels[order]] = order  # of several writes the last one stays: the nearest
            won = np.flatnonzero(best >= 0)
            won = won[points[best[won], 2] > depths[won]]
            samples = best[won]
            depths[won] = points[samples, 2]
            triangle, share = np.divmod(samples, len(shares))
            picked[won] = np.einsum("sc,scx->sx", shares[share], carried[part[triangle]])
    return depths.reshape(side, side), picked.reshape(side, side, -1)


def _unit(*direction: float) -> np.ndarray:
    return np.array(direction) / np.linalg.norm(direction)
