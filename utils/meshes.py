"""Surfaces of voxel stacks, and triangle meshes in PLY files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import plyfile
from skimage.measure import marching_cubes

from utils.errors import UserError
from utils.files import atomic_write

# Header comments of our PLY files, beside SPACE=LPS or SPACE=RAS, which 3D Slicer reads.
MILLIMETRES, VOXELS = "units are millimetres", "units are voxels"


def otsu(values: np.ndarray) -> float:
    """The level that parts values best into two classes (Otsu 1979), on 256 bins. Raises ValueError if all are equal.

    Where a whole gap does equally well, as between the 0 and 1 of a mask, it is the middle of the gap.
    """
    low, high = float(values.min()), float(values.max())
    if not low < high:
        raise ValueError(f"all values are {low:g}")
    counts, edges = np.histogram(values, bins=256, range=(low, high))
    centres = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)[:-1]
    above = counts.sum() - below
    sums = np.cumsum(counts * centres)
    means = (
        sums[:-1] / below,
        (sums[-1] - sums[:-1]) / above,
    )  # the lowest and the highest bin are never empty
    between = below.astype(np.float64) * above * (means[0] - means[1]) ** 2
    best = np.flatnonzero(between >= between.max() * (1 - 1e-9))
    return float(edges[1:-1][best].mean())


def surface(
    values: np.ndarray, level: float, affine: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The closed surface around values of `level` and more: vertices (V, 3) float64 and triangles (T, 3) int32.

    values: (frame, row, column) float32, at least two of each. affine: (column, row, frame) indices to the space of
    the vertices, (4, 4); without one they are those indices. Triangles are counter-clockwise seen from outside,
    whatever the handedness of the affine. Where the border of the stack cuts the object, a flat cap closes it half
    a voxel outside, on the outer faces of the border voxels. Raises ValueError where no value reaches `level`.
    """
    if values.max() < level:
        raise ValueError(f"nothing reaches the level {level:.4g}: the highest value is {values.max():.4g}")
    padded = np.pad(values, 1, mode="edge")
    # Marching cubes leaves holes where values equal the level: they are moved off it, to the inside.
    margin = 1e-4 * max(float(np.ptp(values)), abs(level), 1e-3)
    padded[np.abs(padded - level) < margin] = level + margin
    for axis in range(3):
        for side in (0, -1):
            layer = np.moveaxis(padded, axis, 0)[side]
            layer[...] = level - np.abs(
                layer - level
            )  # mirrored below the level: interpolation puts the cap halfway
    vertices, triangles, _, _ = marching_cubes(padded, level)
    vertices = vertices[:, ::-1].astype(np.float64) - 1  # (column, row, frame), without the padding
    if affine is not None:
        vertices = vertices @ affine[:3, :3].T + affine[:3, 3]
    if signed_volume(vertices, triangles) < 0:
        triangles = triangles[:, ::-1]
    return vertices, np.ascontiguousarray(triangles, np.int32)


def signed_volume(vertices: np.ndarray, triangles: np.ndarray) -> float:
    """Volume that a closed mesh encloses, negative when its triangles face inwards (divergence theorem)."""
    corners = (vertices - vertices.mean(axis=0))[
        triangles
    ]  # (T, 3 corners, xyz), near 0 for the sake of rounding
    return float(np.einsum("ij,ij->", corners[:, 0], np.cross(corners[:, 1], corners[:, 2])) / 6)


def write_ply(
    path: str | os.PathLike[str], vertices: np.ndarray, triangles: np.ndarray, comments: Sequence[str] = ()
) -> None:
    """A binary PLY of vertices (V, 3), stored as float32, and triangles (T, 3), with one header line per comment."""
    header = ["ply", "format binary_little_endian 1.0", *(f"comment {comment}" for comment in comments)]
    header += [f"element vertex {len(vertices)}", *(f"property float {name}" for name in "xyz")]
    header += [f"element face {len(triangles)}", "property list uchar int vertex_indices", "end_header", ""]
    faces = np.empty(
        len(triangles), [("count", "u1"), ("vertices", "<i4", 3)]
    )  # plyfile takes minutes for a million
    faces["count"] = 3
    faces["vertices"] = triangles
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        file.write("\n".join(header).encode("ascii", "replace"))
        file.write(np.ascontiguousarray(vertices, "<f4").tobytes())
        file.write(faces.tobytes())


def read_ply(path: str | os.PathLike[str]) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Vertices (V, 3) float64, triangles (T, 3) int32 and the header's comments of a PLY of triangles."""
    if not Path(path).is_file():
        raise UserError(f"{path} does not exist")
    try:
        data = plyfile.PlyData.read(str(path), known_list_len={"face": {"vertex_indices": 3}})
        vertices = np.stack([data["vertex"][name] for name in "xyz"], axis=1).astype(np.float64)
        corners = data["face"]["vertex_indices"]  # (T, 3); from a text file T arrays
        triangles = np.array(corners.tolist() if corners.dtype == object else corners, np.int32).reshape(
            -1, 3
        )
    except (plyfile.PlyParseError, KeyError, ValueError) as error:
        raise UserError(f"{path} is not a PLY file of triangles: {error}") from error
    return vertices, triangles, list(data.comments)
