"""How far apart two surfaces are: exact distances from points on one to the triangles of the other, in their unit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import trimesh
from scipy.spatial import cKDTree
from trimesh import Trimesh

SAMPLES = 100_000
"""Points drawn on each surface."""
_AT_ONCE = 20_000  # points times candidates per query: about 100 MB
_ICP_SAMPLES, _ICP_STEPS = 5000, 100


@dataclass(frozen=True)
class SurfaceScores:
    """Distances between a predicted surface P and a reference R, in their unit.

    p are the distances of points drawn evenly by area on P to the surface R, r those of points on R to P.
    """

    chamfer: float
    """mean(p) + mean(r)."""
    asd: float
    """Average symmetric surface distance, (mean(p) + mean(r)) / 2."""
    hd: float
    """Hausdorff distance, the largest of p and r, vertices included."""
    hd95: float
    """The larger of the 95th percentiles of p and of r."""
    to_reference: float
    """mean(p): what is there but should not be."""
    to_prediction: float
    """mean(r): what should be there but is not."""


def surface_scores(
    predicted: Trimesh, reference: Trimesh, samples: int = SAMPLES, seed: int = 0
) -> SurfaceScores:
    """Scores of `predicted` as it lies: nothing is moved, rotated or scaled. Both in the same space and unit."""
    means, percentiles, farthest = [], [], []
    for number, (one, other) in enumerate(((predicted, reference), (reference, predicted))):
        points, _ = trimesh.sample.sample_surface(one, samples, seed=seed + number)
        distances = point_distances(points, other)
        means.append(float(distances.mean()))
        percentiles.append(float(np.percentile(distances, 95)))
        corners = point_distances(np.asarray(one.vertices), other)  # the farthest point is usually a corner
        farthest.append(float(max(distances.max(), corners.max())))
    return SurfaceScores(sum(means), sum(means) / 2, max(farthest), max(percentiles), *means)


def point_distances(points: np.ndarray, mesh: Trimesh) -> np.ndarray:
    """Exact distances from points (n, 3) to the triangles of a mesh, (n,).

    No triangle reaches farther from its centre than the largest one. So the nearest triangle is among those with the
    nearest centres, as soon as the next centre is farther than the best distance plus that reach.
    """
    mesh = _without_giants(mesh)
    corners = np.asarray(mesh.triangles)  # (T, 3, 3)
    centres = corners.mean(axis=1)
    reach = float(np.linalg.norm(corners - centres[:, None], axis=2).max())
    tree = cKDTree(centres)
    distances = np.full(len(points), np.inf)
    left, count = np.arange(len(points)), 8
    while len(left):
        count = min(count, len(corners))
        undecided = []
        for part in np.array_split(left, len(left) * count // (_AT_ONCE * 8) + 1):
            far, near = tree.query(points[part], count)
            far, near = far.reshape(len(part), count), near.reshape(len(part), count)
            asked = np.repeat(points[part], count, axis=0)
            closest = trimesh.triangles.closest_point(corners[near.ravel()], asked)
            distances[part] = np.linalg.norm(closest - asked, axis=1).reshape(len(part), count).min(axis=1)
            undecided.append(part[far[:, -1] < distances[part] + reach])
        left = np.concatenate(undecided) if count < len(corners) else left[:0]
        count *= 4
    return distances


def _without_giants(mesh: Trimesh) -> Trimesh:
    """The same surface with giant triangles divided: a single one would make all triangles candidates."""
    longest = np.linalg.norm(np.diff(mesh.triangles[:, [0, 1, 2, 0]], axis=1), axis=2).max(axis=1)
    limit = max(4 * float(np.median(longest)), float(longest.max()) / 64)
    if longest.max() <= limit:
        return mesh
    vertices, triangles = trimesh.remesh.subdivide_to_size(mesh.vertices, mesh.faces, limit)
    return Trimesh(vertices, triangles, process=False)


def rigid_alignment(predicted: Trimesh, reference: Trimesh, seed: int = 0) -> np.ndarray:
    """The rigid transform (4, 4) of `predicted` onto `reference`, by iterative closest points; no scaling."""
    moving, _ = trimesh.sample.sample_surface(predicted, _ICP_SAMPLES, seed=seed)
    fixed, _ = trimesh.sample.sample_surface(reference, 20 * _ICP_SAMPLES, seed=seed + 1)
    matrix, _, _ = trimesh.registration.icp(
        moving, fixed, threshold=1e-9, max_iterations=_ICP_STEPS, reflection=False, scale=False
    )
    return matrix
