"""Surfaces of voxel stacks, and meshes in files. A mesh is a `trimesh.Trimesh` that knows its unit and its space.

`mesh.metadata["unit"]` is "mm", "voxels" or None, `mesh.metadata["space"]` is "RAS", "LPS" or None: None if a file
does not say. Coordinates are RAS inside this project and are written as LPS unless the user asks otherwise.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import trimesh
from scipy.ndimage import gaussian_filter
from skimage.measure import label, marching_cubes
from skimage.segmentation import expand_labels
from trimesh import Trimesh
from trimesh.exchange.gltf import export_glb
from trimesh.exchange.obj import export_obj
from trimesh.exchange.ply import export_ply
from trimesh.exchange.stl import export_stl
from trimesh.intersections import slice_faces_plane
from trimesh.visual import TextureVisuals
from trimesh.visual.material import PBRMaterial

from patient.geometry import swap_ras_lps
from patient.labels import Label
from utils.errors import UserError
from utils.files import atomic_write
from utils.threads import spare_processors

FORMATS = ("ply", "stl", "obj", "glb")
UNITS = {"mm": "units are millimetres", "voxels": "units are voxels"}
"""What the header of a mesh file says, beside SPACE=LPS or SPACE=RAS, which 3D Slicer reads."""

# glTF is in metres with y up and the front of an object towards +z: left, superior and anterior for a patient.
_TO_GLTF = (
    np.array([[1, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0], [0, 0, 0, 1000]]) / 1000
)  # from LPS millimetres
_HEADER = 1 << 16  # bytes that hold the comments of a file

_GREY_BAND = 8 / 255  # of values near a level that rounding to 8 bits may have put on either side
_VOLUME_TOLERANCE = 1e-3
_VOLUME_STEPS = 20
_TRIANGLES_AT_ONCE = 50_000  # whose corners fit into a processor's caches


def otsu(values: np.ndarray) -> float:
    """The level that best separates values into two classes (Otsu 1979), on 256 bins. ValueError if all are equal.

    If a whole gap does equally well, as between the 0 and 1 of a mask, it is the middle of the gap; scikit-image takes
    the lower end.
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
    values: np.ndarray,
    level: float,
    affine: np.ndarray | None = None,
    heights: np.ndarray | None = None,
    closed: bool = True,
) -> Trimesh:
    """The surface around values of at least `level` (marching cubes), triangles counter-clockwise from outside.

    values: (frame, row, column) float32, at least two along each axis. affine: (column, row, frame) indices to the
    space of the vertices, (4, 4), of either handedness; without one vertices are indices, in voxels. heights: the frame
    coordinate of each frame if these are not 0, 1, 2 ..., (frames,) increasing.

    Where the border of the stack cuts the object, a flat cap closes the mesh half a voxel outside, on the outer faces
    of the border voxels; with closed=False the mesh ends there, open. Raises ValueError if there is no surface.
    """
    low, high = float(values.min()), float(values.max())
    if high < level:
        raise ValueError(f"nothing reaches the level {level:.4g}: the highest value is {high:.4g}")
    margin = 1e-4 * max(high - low, abs(level), 1e-3)
    box = _box(values > level - margin)
    padded = np.pad(values[box], 1, mode="edge")
    # Marching cubes leaves holes where values equal the level: move them off it, to the inside.
    padded[(padded > level - margin) & (padded < level + margin)] = level + margin
    if closed:
        for axis in range(3):
            for side in (0, -1):
                layer = np.moveaxis(padded, axis, 0)[side]
                layer[...] = level - np.abs(layer - level)  # mirrored: interpolation puts the cap halfway
    elif padded.min() > level:
        raise ValueError("the object fills the stack: without caps it has no surface")
    vertices, triangles, _, _ = marching_cubes(padded, level)
    vertices = vertices[:, ::-1].astype(np.float64)  # (column, row, frame)
    vertices += [part.start - 1 for part in box[::-1]]  # without the padding
    if not closed:
        for normal in np.eye(3):
            for inwards, face in ((normal, -0.5), (-normal, normal @ values.shape[::-1] - 0.5)):
                vertices, triangles, _ = slice_faces_plane(vertices, triangles, inwards, face * normal)

    # scikit-image's triangles face inwards in (frame, row, column), so outwards in (column, row, frame), unless the
    # affine mirrors. The sign of the volume would also tell, but open meshes have none.
    outwards = affine is None or np.linalg.det(affine[:3, :3]) > 0
    if heights is not None:
        vertices[:, 2] = np.interp(vertices[:, 2], *frame_heights(heights))
    if affine is not None:
        # Not by BLAS, whose last digits depend on the row: equal coordinates stay equal, and flat walls flat.
        vertices = np.einsum("ij,kj->ik", vertices, affine[:3, :3]) + affine[:3, 3]
    mesh = Trimesh(vertices, triangles if outwards else triangles[:, ::-1], process=False)
    mesh.remove_unreferenced_vertices()
    mesh.metadata.update(unit="voxels" if affine is None else "mm", space=None if affine is None else "RAS")
    return mesh


def _box(inside: np.ndarray, around: Sequence[int] = (1, 1, 1)) -> tuple[slice, slice, slice]:
    """Where there is something, and so many voxels around it."""
    sides = []
    for axis, (size, more) in enumerate(zip(inside.shape, around, strict=True)):
        filled = np.flatnonzero(inside.any(axis=tuple(other for other in range(3) if other != axis)))
        sides.append(slice(max(int(filled[0]) - more, 0), min(int(filled[-1]) + 1 + more, size)))
    return sides[0], sides[1], sides[2]


def frame_heights(heights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices and heights of frames, with one more at each end for the caps."""
    steps = np.diff(heights)
    longer = np.concatenate(([heights[0] - steps[0]], heights, [heights[-1] + steps[-1]]))
    return np.arange(-1, len(heights) + 1), longer


def smooth(values: np.ndarray, sigma: tuple[float, float, float]) -> np.ndarray:
    """values (frame, row, column) smoothed by a Gaussian of `sigma` voxels per axis; border values are repeated."""
    low = values.min()
    if values.max() == low:
        return values.copy()
    reach = [int(4.0 * own + 0.5) for own in sigma]  # voxels, as the filter has it
    out = np.full_like(values, low)
    box = _box(values > low, reach)  # elsewhere, nothing changes
    source, target = values[box], out[box]

    def part(first: int, last: int) -> None:
        below, above = max(first - reach[0], 0), min(last + reach[0], len(source))
        smoothed = gaussian_filter(source[below:above], sigma, mode="nearest", truncate=4.0)
        target[first:last] = smoothed[first - below : last - below]

    count = min(max(len(source) // 32, spare_processors()), len(source))  # small ones need little memory
    ends = np.linspace(0, len(source), count + 1).astype(int).tolist()
    with ThreadPoolExecutor(spare_processors()) as threads:  # the filter releases the interpreter lock
        list(threads.map(part, ends[:-1], ends[1:]))
    return out


def inside_shares(values: np.ndarray, level: float) -> np.ndarray:
    """How much of each voxel is inside at `level`, 0 to 1 (float32): all or none except near the level.

    Frames halfway between two are full of values that equal it. Counted as inside, they would swell the object.
    """
    width = min(_GREY_BAND, 2 * (float(values.max()) - level), 2 * (level - float(values.min())))
    if width <= 0:
        return (values >= level).astype(np.float32)
    shares = values - np.float32(level)
    shares *= np.float32(1 / width)  # in place: a stack may have hundreds of millions of voxels
    shares += np.float32(0.5)
    return np.clip(shares, 0, 1, out=shares)


def surface_of_volume(
    values: np.ndarray,
    volume: float,
    affine: np.ndarray | None = None,
    heights: np.ndarray | None = None,
    closed: bool = True,
) -> tuple[Trimesh, float]:
    """`surface` at the level where it encloses `volume`, and that level: smoothing shrinks convex and thin shapes.

    volume: in voxels, or in cubic millimetres with an affine. The volume is met to 0.1 % if some level meets it:
    single voxels that merge across diagonals make it jump. Raises ValueError if all values are equal.
    """
    low, high = float(values.min()), float(values.max())
    if not low < high:
        raise ValueError(f"all values are {low:g}")
    filled = values[values > low + 1e-3 * (high - low)]
    voxel = 1.0 if affine is None else abs(float(np.linalg.det(affine[:3, :3])))
    level = _of_rank(filled, volume / voxel)  # a smooth surface encloses about as many voxels
    # Then false position (Illinois), between the levels where everything and nothing is inside.
    ends = [[low, values.size * voxel - volume], [high, -volume]]  # level and excess volume
    best, found, least, last = level, Trimesh(), np.inf, -1
    for _ in range(_VOLUME_STEPS):
        mesh = surface(values, level, affine, heights)
        excess = enclosed_volume(mesh) - volume
        if abs(excess) < least:
            best, found, least = level, mesh, abs(excess)
        if least <= _VOLUME_TOLERANCE * volume:
            break
        side = 0 if excess > 0 else 1
        ends[side] = [level, excess]
        if side == last:
            ends[1 - side][1] /= 2
        last = side
        (below, surplus), (above, lack) = ends
        level = below + (above - below) * surplus / (surplus - lack)
    return found if closed else surface(values, best, affine, heights, closed), best


def _of_rank(values: np.ndarray, rank: float) -> float:
    """The level that about ``rank`` of the values reach, which is between two of them."""
    place = min(max(len(values) - rank - 0.5, 0), len(values) - 1)  # in ascending order
    at = int(place), min(int(place) + 1, len(values) - 1)
    lower, upper = np.partition(values, at)[list(at)].tolist()
    return lower + (upper - lower) * (place - at[0])


def enclosed_volume(mesh: Trimesh) -> float:
    """Volume of a closed mesh (the divergence theorem), without the other properties that trimesh computes with it."""
    points, faces, total = np.asarray(mesh.vertices - mesh.vertices.mean(0)), np.asarray(mesh.faces), 0.0
    for first in range(0, len(faces), _TRIANGLES_AT_ONCE):
        part = faces[first : first + _TRIANGLES_AT_ONCE]
        (ax, ay, az), (bx, by, bz), (cx, cy, cz) = (points[corner].T for corner in part.T)
        total += float((ax * (by * cz - bz * cy) + ay * (bz * cx - bx * cz) + az * (bx * cy - by * cx)).sum())
    return total / 6


def is_closed(mesh: Trimesh) -> bool:
    """Whether every edge has a twin in the opposite direction, so that the mesh has an inside and faces out of it.

    trimesh's `is_watertight` is stricter: it fails where voxels touch along an edge, which four triangles then share.
    """
    ways = np.array([len(mesh.vertices), 1])
    return np.array_equal(np.sort(mesh.edges @ ways), np.sort(mesh.edges @ ways[::-1]))


def largest(values: np.ndarray, level: float) -> np.ndarray:
    """A copy with the largest body of voxels that reach `level` (neighbours share faces), and none of the others.

    Voxels outside all bodies belong to the nearest one, so the grey rim of a body is removed with it.
    """
    bodies = label(values >= level, connectivity=1)
    sizes = np.bincount(bodies.ravel())[1:]
    if len(sizes) < 2:
        return values.copy()
    owners = expand_labels(bodies, distance=sum(values.shape))
    return np.where(owners == sizes.argmax() + 1, values, values.min())


def decimate(mesh: Trimesh, fraction: float) -> Trimesh:
    """The mesh with `fraction` (0 to 1) of its triangles removed where that changes it least (quadric errors).

    Raises UserError if fast-simplification is not installed, ValueError if a closed mesh would be opened.
    """
    try:
        simple = mesh.simplify_quadric_decimation(percent=fraction)
    except ImportError:
        raise UserError("--decimate needs fast-simplification: pip install fast-simplification") from None
    if not len(simple.faces) or (is_closed(mesh) and not is_closed(simple)):
        raise ValueError(f"without {fraction:g} of its {len(mesh.faces)} triangles the mesh is not closed")
    simple.metadata.update(mesh.metadata)
    return simple


def in_space(mesh: Trimesh, space: str) -> Trimesh:
    """A copy in "RAS" or "LPS": half a turn about z, so triangles keep facing outwards."""
    moved = mesh.copy()
    if mesh.metadata["space"] != space:
        moved.vertices = swap_ras_lps(mesh.vertices)
        moved.metadata["space"] = space
    return moved


def write_mesh(path: str | os.PathLike[str], mesh: Trimesh) -> None:
    """Write a mesh in the format given by the suffix of `path` (see `mesh_bytes`)."""
    data = mesh_bytes(mesh, Path(path).suffix.lower().removeprefix("."))
    with atomic_write(path) as temporary:
        temporary.write_bytes(data)


def mesh_bytes(mesh: Trimesh, kind: str) -> bytes:
    """A mesh as a file of a `kind` in FORMATS, binary if the format allows it, with unit and space in its header.

    GLB is in metres with y up, as its standard requires; there, a voxel counts as a millimetre.
    """
    comments = [f"SPACE={mesh.metadata['space']}"] if mesh.metadata["space"] else []
    comments += [UNITS[mesh.metadata["unit"]]] if mesh.metadata["unit"] else []
    if kind == "ply":
        data = export_ply(mesh, vertex_normal=False)
        start = data.index(b"comment ")  # trimesh writes one comment, its URL, and accepts no others
        lines = "".join(f"comment {comment}\n" for comment in comments).encode()
        data = data[:start] + lines + data[data.index(b"\n", start) + 1 :]
    elif kind == "stl":
        data = export_stl(mesh)
        data = "; ".join(comments).encode().ljust(80) + data[80:]
    elif kind == "obj":
        text = export_obj(mesh, include_normals=False, header=None)
        data = ("".join(f"# {comment}\n" for comment in comments) + text).encode()
    elif kind == "glb":
        lps = in_space(mesh, "LPS") if mesh.metadata["space"] else mesh
        plain = Trimesh(lps.vertices, lps.faces, process=False, metadata={"comment": "; ".join(comments)})
        data = export_glb(trimesh.Scene([plain]).apply_transform(_TO_GLTF))
    else:
        raise UserError(
            f"meshes are written as {', '.join(FORMATS)}, not as {kind or 'a file without suffix'}"
        )
    return data


def write_scene(path: str | os.PathLike[str], meshes: Mapping[Label, Trimesh]) -> None:
    """Write meshes of labels as one GLB, each with its name and colour."""
    scene = trimesh.Scene()
    for part_of, mesh in meshes.items():
        lps = in_space(mesh, "LPS") if mesh.metadata["space"] else mesh
        material = PBRMaterial(name=part_of.name, baseColorFactor=[*part_of.colour, 255], roughnessFactor=0.6)
        visual = TextureVisuals(material=material)
        part = Trimesh(lps.vertices, lps.faces, visual=visual, process=False)
        scene.add_geometry(part, node_name=part_of.name, geom_name=part_of.name)
    with atomic_write(path) as temporary:
        temporary.write_bytes(export_glb(scene.apply_transform(_TO_GLTF)))


def read_mesh(path: str | os.PathLike[str]) -> Trimesh:
    """The triangles of a mesh file (FORMATS), with the unit and space that its header gives. Raises UserError."""
    path = Path(path)
    kind = path.suffix.lower().removeprefix(".")
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    if kind not in FORMATS:
        raise UserError(f"{path} is not a mesh format that can be read: {', '.join(FORMATS)}")
    try:
        mesh = trimesh.load_mesh(path, process=False)
        vertices, triangles = np.array(mesh.vertices, np.float64), np.array(mesh.faces)
    except Exception as error:  # trimesh's readers raise all kinds of exceptions for damaged bytes
        raise UserError(f"{path} is not a {kind.upper()} file of triangles: {error}") from error
    if not len(triangles) or triangles.max() >= len(vertices) or not np.isfinite(vertices).all():
        raise UserError(f"{path} is not a {kind.upper()} file of triangles: it has none, or they are damaged")
    if kind == "glb":
        vertices = trimesh.transform_points(vertices, np.linalg.inv(_TO_GLTF))
    mesh = Trimesh(vertices, triangles, process=False)
    mesh.merge_vertices()  # STL stores every corner of every triangle
    with path.open("rb") as file:
        header = file.read(_HEADER)
    space = re.search(rb"SPACE=(RAS|LPS)", header)
    units = [unit for unit, comment in UNITS.items() if comment.encode() in header]
    mesh.metadata.clear()
    mesh.metadata.update(space=space[1].decode() if space else None, unit=units[0] if units else None)
    return mesh
