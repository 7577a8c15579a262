"""Stretches the anatomy along the columns of the frames, about their middle:

    python render.py -m OUTPUT --modify examples/stretch.py:stretch

Copy this file as a starting point for other deformations. They get and return all N Gaussians at time t,
in plane units: x to the right and z up from the middle of the frame, which shows x in [-0.36, 0.36] at the default
--distance; y away from the camera, 0 for all of them. Scales are standard deviations along the Gaussian's own axes.
"""

import torch
from torch import Tensor

FACTOR = 1.3


def stretch(means: Tensor, scales: Tensor, quaternions: Tensor, t: float) -> tuple[Tensor, Tensor, Tensor]:
    """x -> FACTOR x, of the centres and of the ellipses around them.

    means: (N, 3). scales: (N, 3), nearly 0 along y. quaternions: (N, 4), w x y z, turns about y.
    t: time in [0, 1], for deformations that change from frame to frame.
    """
    # An ellipse stretched along x is again an ellipse, in general at another angle: see its covariance in (x, z).
    angle = 2 * torch.atan2(quaternions[:, 2], quaternions[:, 0])  # about +y, which takes x towards -z
    cos, sin = torch.cos(angle), torch.sin(angle)
    long, _, wide = (scales**2).unbind(1)  # variances along the Gaussian's own axes
    xx = FACTOR**2 * (cos**2 * long + sin**2 * wide)
    xz = FACTOR * cos * sin * (wide - long)
    zz = sin**2 * long + cos**2 * wide

    # Its axes: eigenvectors and eigenvalues of a symmetric 2 x 2 matrix, the smaller one by the determinant.
    angle = torch.atan2(-2 * xz, xx - zz) / 2
    largest = (xx + zz) / 2 + torch.hypot((xx - zz) / 2, xz)
    smallest = (FACTOR * scales[:, 0] * scales[:, 2]) ** 2 / largest.clamp_min(1e-30)
    zero = torch.zeros_like(angle)
    return (
        means * means.new_tensor([FACTOR, 1, 1]),
        torch.stack([largest.sqrt(), scales[:, 1], smallest.sqrt()], 1),
        torch.stack([torch.cos(angle / 2), zero, torch.sin(angle / 2), zero], 1),
    )
