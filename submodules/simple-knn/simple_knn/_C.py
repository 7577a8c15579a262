"""`distCUDA2` under the name and at the place where 3D Gaussian splatting programs import it."""

from __future__ import annotations

import functools
import sys

import torch
from torch import Tensor

from . import _library

NEIGHBOURS = 3


def distCUDA2(points: Tensor) -> Tensor:
    """Mean of the squared distances from every point to its three nearest others.

    Exact, and not differentiable. "Others" goes by index: a point that occurs twice has a neighbour at distance 0.
    With fewer than four points the mean is over the neighbours there are; a lone point gets 0.

    Runs where the points are: CUDA points in our kernel, compiled at the first such call where no install has done so,
    all others in scipy's k-d tree, which also serves CUDA points where no kernel can be compiled.

    Args:
        points: (N, 3), float32 or float64, finite, N > 0.

    Returns:
        (N,), in the squared unit of the points, on their device and in their dtype.

    Raises:
        ValueError: for another shape, no points at all, or coordinates that are not finite.
        TypeError: for another dtype.
    """
    if points.ndim != 2 or points.shape[1] != 3 or points.shape[0] == 0:
        raise ValueError(f"points must have shape (N, 3) with N > 0, not {tuple(points.shape)}")
    if points.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"points must be float32 or float64, not {points.dtype}")
    points = points.detach()
    if not bool(torch.isfinite(points).all()):
        raise ValueError("points must be finite: some coordinates are NaN or infinite")
    if points.is_cuda and _has_kernel():
        return torch.ops.simple_knn.mean_squared_distances(points)
    return _mean_squared_distances(points)


@functools.cache
def _has_kernel() -> bool:
    """Whether torch.ops.simple_knn serves CUDA tensors. Tried once: what failed to compile will not compile later."""
    try:
        return _library.load(instead="let scipy find them on the CPU, as happens now") != "cpu"
    except ImportError as error:
        print(f"warning: {error}", file=sys.stderr)
        return False


def _mean_squared_distances(points: Tensor) -> Tensor:
    from scipy.spatial import cKDTree  # where a kernel serves, starting needs no scipy

    found = min(NEIGHBOURS, points.shape[0] - 1)
    if found == 0:
        return torch.zeros_like(points[:, 0])
    coordinates = points.cpu().double().numpy()
    distances, _ = cKDTree(coordinates).query(
        coordinates, k=found + 1, workers=-1
    )  # [N, found + 1], ascending
    # The first is the point itself or, at the same distance 0, its double: what remains is the same either way.
    means = (distances[:, 1:] ** 2).mean(axis=1)
    return torch.from_numpy(means).to(points)
