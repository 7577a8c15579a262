"""Real spherical harmonics up to degree 3, in the order and with the signs of 3-D Gaussian splatting."""

from __future__ import annotations

import torch
from torch import Tensor

C0 = 0.28209479177387814
"""The harmonic of degree 0, the same in every direction: 1 / (2 sqrt(pi))."""


def to_colour(coefficients: Tensor) -> Tensor:
    """Coefficients of degree 0 -> colours, clamped at 0."""
    return (C0 * coefficients + 0.5).clamp_min(0)


def from_colour(colour: float) -> float:
    """The coefficient of degree 0 that gives ``colour``."""
    return (colour - 0.5) / C0


def basis(directions: Tensor, degree: int) -> Tensor:
    """Harmonics of degrees 1 .. ``degree`` (at most 3) in unit ``directions`` (N, 3) -> (N, (degree + 1)^2 - 1)."""
    x, y, z = directions.unbind(-1)
    xx, yy, zz = x * x, y * y, z * z
    harmonics = []
    if degree >= 1:
        harmonics += [-0.4886025119029199 * y, 0.4886025119029199 * z, -0.4886025119029199 * x]
    if degree >= 2:
        harmonics += [
            1.0925484305920792 * x * y,
            -1.0925484305920792 * y * z,
            0.31539156525252005 * (2 * zz - xx - yy),
            -1.0925484305920792 * x * z,
            0.5462742152960396 * (xx - yy),
        ]
    if degree >= 3:
        harmonics += [
            -0.5900435899266435 * y * (3 * xx - yy),
            2.890611442640554 * x * y * z,
            -0.4570457994644658 * y * (4 * zz - xx - yy),
            0.3731763325901154 * z * (2 * zz - 3 * xx - 3 * yy),
            -0.4570457994644658 * x * (4 * zz - xx - yy),
            1.445305721320277 * z * (xx - yy),
            -0.5900435899266435 * x * (xx - 3 * yy),
        ]
    return torch.stack(harmonics, -1)
