"""Surfaces of a label map, shared between neighbours: one net of vertices for all labels.

A voxel has one label, so two neighbouring labels have one surface between them. Marching cubes on each label alone
leaves gaps along the lines where three labels meet. A surface net (Gibson 1998, Constrained Elastic Surface Nets) has a
vertex in every cell of 2 x 2 x 2 voxels that holds several labels, and a quadrangle for every two neighbouring voxels
of different labels; the mesh of a label is its quadrangles, facing out of it. So neighbours have exactly the same
triangles, facing the opposite way, and each mesh is closed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.ndimage import find_objects, gaussian_filter
from trimesh import Trimesh

from patient.meshes import frame_heights

_TOLERANCE = 0.003  # of a label's volume
_STEPS = 12
_MOST_BIAS = 0.45
_OUTSIDE = -1  # the label of what lies beyond the stack


def label_surfaces(
    numbers: np.ndarray,
    ids: Sequence[int],
    sigma: tuple[float, float, float] | None = None,
    volumes: Mapping[int, float] | None = None,
    affine: np.ndarray | None = None,
    heights: np.ndarray | None = None,
    closed: bool = True,
) -> dict[int, Trimesh]:
    """A mesh for each of `ids` in numbers (frame, row, column), 0 outside; labels that vanish have none.

    sigma: standard deviation in voxels (frame, row, column) of the Gaussian that each label's share is smoothed by; a
    voxel then belongs to the largest share. None smooths nothing. volumes: what each label should enclose, in cubic
    millimetres (voxels without an affine): shares are raised or lowered until it does, to 0.3 % if possible.
    affine, heights: as of `patient.meshes.surface`. closed: cap what the border of the stack cuts.
    """
    everything = sorted({int(number) for number in np.unique(numbers)} - {0})
    shares = {0: _Share.of(numbers, 0, sigma)} | {i: _Share.of(numbers, i, sigma) for i in everything}
    bias = dict.fromkeys(shares, 0.0)
    best: tuple[float, dict[int, Trimesh]] | None = None
    for _ in range(_STEPS if sigma is not None and volumes else 1):
        owners, margins = _exclusive(numbers.shape, shares, bias)
        meshes = _net(owners, margins, everything, affine, heights, closed)
        if sigma is None or not volumes:
            return {i: meshes[i] for i in ids if i in meshes}
        off = {i: float(meshes[i].volume) / volumes[i] - 1 if i in meshes else -1.0 for i in everything}
        worst = max((abs(value) for value in off.values()), default=0.0)
        if best is None or worst < best[0]:
            best = worst, meshes
        if worst <= _TOLERANCE:
            break
        slope = 2 / (np.sqrt(2 * np.pi) * np.mean(sigma))  # of the difference of two shares, per voxel
        step = 1.0 if affine is None else abs(float(np.linalg.det(affine[:3, :3]))) ** (1 / 3)
        for i in everything:
            area = float(meshes[i].area) if i in meshes else 0.0
            missing = -off[i] * volumes[i] / area / step * slope if area else 0.1
            bias[i] = float(np.clip(bias[i] + np.clip(0.8 * missing, -0.1, 0.1), -_MOST_BIAS, _MOST_BIAS))
    assert best is not None
    return {i: best[1][i] for i in ids if i in best[1]}


class _Share:
    """How much of each voxel a label has, 0 to 1, within the box where it has any."""

    def __init__(self, box: tuple[slice, slice, slice], values: np.ndarray) -> None:
        self.box, self.values = box, values

    @classmethod
    def of(cls, numbers: np.ndarray, number: int, sigma: tuple[float, float, float] | None) -> _Share:
        inside = numbers == number
        found = find_objects(inside.astype(np.uint8))
        box = found[0] if found else (slice(0, 0),) * 3
        reach = (0, 0, 0) if sigma is None else tuple(int(np.ceil(4 * s)) for s in sigma)
        box = tuple(
            slice(max(part.start - more, 0), min(part.stop + more, count))
            for part, more, count in zip(box, reach, numbers.shape, strict=True)
        )
        values = inside[box].astype(np.float32)
        if sigma is not None and values.size:
            values = gaussian_filter(values, sigma, mode="nearest", truncate=4.0)
        return cls(box, values)


def _exclusive(
    shape: tuple[int, ...], shares: Mapping[int, _Share], bias: Mapping[int, float]
) -> tuple[np.ndarray, np.ndarray]:
    """The label with the largest share of each voxel, and by how much it is ahead of the next."""
    owners = np.full(shape, 0, np.int32)
    first = np.full(shape, -2.0, np.float32)
    second = np.full(shape, -2.0, np.float32)
    for number, share in shares.items():
        values = share.values + np.float32(bias[number])
        owner, ahead, behind = owners[share.box], first[share.box], second[share.box]
        wins = values > ahead
        np.maximum(behind, np.minimum(values, ahead), out=behind)
        ahead[wins] = values[wins]
        owner[wins] = number
    # Where only one label has a share, the others' share is 0.
    return owners, np.clip(first - np.maximum(second, 0), 1e-4, None)


def _net(
    owners: np.ndarray,
    margins: np.ndarray,
    ids: Sequence[int],
    affine: np.ndarray | None,
    heights: np.ndarray | None,
    closed: bool,
) -> dict[int, Trimesh]:
    """The surface net of labels (frame, row, column), as a mesh for each label that has one."""
    labels = np.pad(owners, 1, constant_values=_OUTSIDE)
    ahead = np.pad(
        margins, 1, mode="edge"
    )  # the same on both sides: the cap lies halfway, on the outer faces
    shape = labels.shape
    cells = tuple(count - 1 for count in shape)
    total = np.zeros((*cells, 3), np.float64)
    count = np.zeros(cells, np.int32)
    quads: list[np.ndarray] = []
    pairs: list[np.ndarray] = []
    numbering = np.arange(int(np.prod(cells))).reshape(cells)
    for axis in range(3):
        low = tuple(slice(None, -1) if a == axis else slice(None) for a in range(3))
        high = tuple(slice(1, None) if a == axis else slice(None) for a in range(3))
        # There is no surface between the background and what lies beyond the stack.
        a, b = labels[low], labels[high]
        crossing = np.argwhere((a != b) & ((a > 0) | (b > 0)))
        where = tuple(crossing.T)
        own, next_ = ahead[low][where].astype(np.float64), ahead[high][where].astype(np.float64)
        points = crossing.astype(np.float64)
        points[:, axis] += own / (own + next_)
        others = [other for other in range(3) if other != axis]
        around = []
        for first, second in ((-1, -1), (0, -1), (0, 0), (-1, 0)):
            cell = crossing.copy()
            cell[:, others[0]] += first
            cell[:, others[1]] += second
            around.append(cell)
        for cell in around:  # borders of the padded stack hold no crossing, so every cell exists
            np.add.at(total, tuple(cell.T), points)
            np.add.at(count, tuple(cell.T), 1)
        corners = np.stack(
            [numbering[tuple(cell.T)] for cell in around], axis=1
        )  # (n, 4), a turn about +axis
        if axis == 1:  # (frame, column) turns the opposite way
            corners = corners[:, ::-1]
        quads.append(corners)
        pairs.append(np.stack([a[where], b[where]], axis=1))
    every, sides = np.concatenate(quads), np.concatenate(pairs)
    used = np.flatnonzero(count.ravel())
    vertices = (
        total.reshape(-1, 3)[used] / count.ravel()[used, None] - 1
    )  # (frame, row, column), without padding
    index = np.full(count.size, -1)
    index[used] = np.arange(len(used))
    every = index[every]

    vertices = vertices[:, ::-1]  # (column, row, frame)
    if heights is not None:
        vertices[:, 2] = np.interp(vertices[:, 2], *frame_heights(heights))
    # A turn about +axis in (frame, row, column) is one about -axis in (column, row, frame).
    flip = affine is None or np.linalg.det(affine[:3, :3]) > 0
    if affine is not None:
        vertices = vertices @ affine[:3, :3].T + affine[:3, 3]
    triangles = np.concatenate((every[:, [0, 1, 2]], every[:, [0, 2, 3]]))
    sides = np.concatenate((sides, sides))
    meshes = {}
    for number in ids:
        outwards, inwards = sides[:, 0] == number, sides[:, 1] == number
        if not closed:
            beyond = (sides == _OUTSIDE).any(axis=1)
            outwards, inwards = outwards & ~beyond, inwards & ~beyond
        faces = np.concatenate((triangles[outwards], triangles[inwards][:, ::-1]))
        if not len(faces):
            continue
        mesh = Trimesh(vertices, faces[:, ::-1] if flip else faces, process=False)
        mesh.remove_unreferenced_vertices()
        mesh.metadata.update(
            unit="voxels" if affine is None else "mm", space=None if affine is None else "RAS"
        )
        meshes[number] = mesh
    return meshes
