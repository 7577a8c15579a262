"""Classical interpolation between frames, pixel by pixel: what a model's in-between frames have to beat."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from utils.threads import spare_processors

_VALUES_AT_ONCE = 2_000_000  # a spline's coefficients take five times the memory of its values, in float64
_FULL_DISTANCE = (
    1e3  # of every pixel where there is no outline: the mask fills its frame, or all masks are empty
)


def interpolate(
    values: np.ndarray, positions: np.ndarray, at: np.ndarray, method: str = "linear"
) -> np.ndarray:
    """``values`` (K, ...) at increasing ``positions`` (K,), interpolated at ``at`` (M,) between them.

    method: "linear", between the two neighbours, or "cubic", the spline through all (not-a-knot). Returns
    (M, ...) float32.
    """
    if method == "cubic":
        from scipy.interpolate import CubicSpline  # slow to import, and rarely asked for

    flat = values.reshape(len(values), -1)
    out = np.empty((len(at), flat.shape[1]), np.float32)
    step = max(1, _VALUES_AT_ONCE // len(values))
    for first in range(0, flat.shape[1], step):
        block = flat[:, first : first + step].astype(np.float64)
        out[:, first : first + step] = (
            CubicSpline(positions, block, axis=0)(at) if method == "cubic" else _linear(block, positions, at)
        )
    return out.reshape(len(at), *values.shape[1:])


def interpolate_masks(
    masks: np.ndarray,
    positions: np.ndarray,
    at: np.ndarray,
    spacing: tuple[float, float] = (1.0, 1.0),
    method: str = "linear",
) -> np.ndarray:
    """``masks`` (K, H, W) bool interpolated at ``at`` (M,) by signed distances, the usual method between slices.

    spacing: of rows and columns, in any unit. Returns (M, H, W) bool.
    """
    gap = float(np.mean(np.diff(positions)))
    return interpolate(signed_distances(masks, spacing, gap), positions, at, method) > 0


def signed_distances(
    masks: np.ndarray,
    spacing: tuple[float, float] = (1.0, 1.0),
    gap: float = 1.0,
    background: bool = False,
) -> np.ndarray:
    """How far each pixel's centre lies inside (above 0) or outside the outline of its mask: (K, H, W) bool -> float32.

    The outline runs half a pixel from the centres. A frame without a mask gets the distances of the nearest frame
    with one, all of them outside, and ``gap`` farther: shapes end between the two.

    background: the masks are of what no label holds. Where they fill a frame, labels end there as shapes do.
    """
    from scipy.ndimage import distance_transform_edt

    if background:
        return -signed_distances(~masks, spacing, gap)

    half = min(spacing) / 2
    out = np.empty(masks.shape, np.float32)
    filled = [k for k, mask in enumerate(masks) if mask.any()]

    def fill(k: int) -> None:
        mask = masks[k]
        if mask.all():
            out[k] = _FULL_DISTANCE
        else:
            inside, outside = distance_transform_edt(mask, spacing), distance_transform_edt(~mask, spacing)
            out[k] = np.where(mask, inside - half, half - outside)

    with ThreadPoolExecutor(spare_processors()) as threads:  # the transform releases the interpreter lock
        list(threads.map(fill, filled))
    for k in sorted(set(range(len(masks))) - set(filled)):
        nearest = min(filled, key=lambda other: abs(other - k), default=None)
        out[k] = -_FULL_DISTANCE if nearest is None else -np.abs(out[nearest]) - gap
    return out


def _linear(values: np.ndarray, positions: np.ndarray, at: np.ndarray) -> np.ndarray:
    before = np.clip(np.searchsorted(positions, at, "right") - 1, 0, len(positions) - 2)
    weights = ((at - positions[before]) / (positions[before + 1] - positions[before]))[:, None]
    return values[before] * (1 - weights) + values[before + 1] * weights
