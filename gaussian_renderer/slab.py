"""Thick slices: the mean over time of what each Gaussian shows, in closed form.

A scanner's slice shows the mean of the anatomy over its thickness. A Folded-Gaussian's share of that mean is close to
another Gaussian. At time u its footprint has the covariance d(u)^2 S + L, with d(u) = exp(-(m - u)^2 / (2 sigma^2)), S
its own at u = m and L the low-pass filter. Over a rectangular profile of width W around t, what is needed has closed
forms:

- the integral of d^2, a difference of error functions (sigma convolved with the profile), and the share of the slice in
  which d > 0.1: the mean of the covariance while the Gaussian lives;
- the mean of u weighted by d^2, from differences of exponentials: the path is followed up to there;
- the variance of u so weighted: times the velocity squared, it smears the footprint along the path.

The opacity falls with the share of the slice in which the Gaussian lives, and as the smear widens it. What is left is
that footprints which shrink are not one Gaussian, and that opacities blend one over another: `tests/test_slab.py`
compares with the mean of many thin cuts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from gaussian_renderer.oracle import LOW_PASS, MIN_SEGMENTATION_SCALE, MIN_TIME_WEIGHT, TILE
from scene.cameras import Camera

_LIFE = math.sqrt(-2 * math.log(MIN_TIME_WEIGHT))  # sigmas, of either half of a Gaussian's time
_LEAST = 1e-4  # of a slice: a Gaussian that lives for less of it is not shown


def fold_slab(
    params: Mapping[str, Tensor], times: Tensor, signs: Tensor, camera: Camera, width: Tensor | float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What ``fold`` gives, of slices of ``width`` in time around ``times`` (V,), and factors of opacities, (V, N) in
    [0, 1]. signs: (V,), -1 for mirrored views."""
    xyz, scaling = params["xyz"], params["scaling"]
    scale = camera.pixels_per_unit
    m, sigma = torch.sigmoid(params["m"].flatten()), torch.exp(params["sigma"].flatten())  # (N,)
    before, after = (
        times[:, None] + side * width / 2 - m for side in (-1, 1)
    )  # (V, N), from m to the slice's faces

    # integrals over the slice, divided by its width
    squared = _mean_of_bell(before, after, sigma, width)  # of d^2
    life = _LIFE * sigma
    alive = (after.minimum(life) - before.maximum(-life)).clamp_min(0) / width  # the share of it with d > 0.1
    bells = [torch.exp(-((edge / sigma) ** 2)) for edge in (before, after)]
    weight = squared.clamp_min(_LEAST)
    late = (sigma**2 / (2 * width)) * (bells[0] - bells[1]) / weight  # mean of u - m
    late = late.maximum(before).minimum(after)
    spread = (
        sigma**2 / 2 - (sigma**2 / (2 * width)) * (after * bells[1] - before * bells[0]) / weight - late**2
    )
    spread = spread.clamp_min(0).clamp_max(width**2 / 4)  # variance of u

    path = params["w1"].reshape(len(m), -1, 2)  # (N, P, 2)
    centre, velocity = xyz[:, [0, 2]], torch.zeros_like(xyz[:, [0, 2]])
    for j in range(path.shape[1]):
        centre = centre + path[:, j] * (-late)[..., None] ** (j + 1)
        velocity = velocity - (j + 1) * path[:, j] * (-late)[..., None] ** j
    flip = torch.stack([signs, -torch.ones_like(signs)], -1)[:, None]  # (V, 1, 2), to pixels right and down
    # Filled on the device: a copy from the CPU could not be recorded in a CUDA graph.
    middle = torch.cat([xyz.new_full((1,), (side - 1) / 2) for side in (camera.width, camera.height)])  # (2,)
    means2d = flip * scale * centre + middle
    velocity = (flip * scale * velocity).expand_as(means2d)  # (V, N, 2) px per unit of time

    sizes = (scale * torch.exp(scaling[:, [0, 2]])) ** 2  # (N, 2) px^2, S along its own axes
    some = alive > _LEAST
    living = torch.where(some, alive, torch.ones_like(alive))
    own = sizes * (squared / living)[..., None] + LOW_PASS  # (V, N, 2), while it lives
    angle = 2 * math.pi * torch.sigmoid(params["rotation"].flatten())
    cos, sin = torch.cos(angle), torch.sin(angle)
    xx = cos**2 * own[..., 0] + sin**2 * own[..., 1] + spread * velocity[..., 0] ** 2
    yy = sin**2 * own[..., 0] + cos**2 * own[..., 1] + spread * velocity[..., 1] ** 2
    xy = signs[:, None] * cos * sin * (own[..., 0] - own[..., 1]) + spread * velocity.prod(-1)
    determinant = (xx * yy - xy**2).clamp_min(LOW_PASS**2 / 4)
    conics = torch.stack([yy, -xy, xx], -1) / determinant[..., None]
    factors = alive * (own.prod(-1) / determinant).clamp_max(1).sqrt()

    with torch.no_grad():
        mid = (xx + yy) / 2
        radius = torch.ceil(3 * torch.sqrt(mid + torch.sqrt((mid**2 - determinant).clamp_min(0.1))))
        u, v = means2d.unbind(-1)
        columns, rows = (TILE * math.ceil(side / TILE) for side in (camera.width, camera.height))
        touches = (u + radius >= 0) & (u - radius < columns) & (v + radius >= 0) & (v - radius < rows)
        visible = touches & some
        segmented = visible & (torch.exp(scaling[:, [0, 2]]) > MIN_SEGMENTATION_SCALE).all(-1)
        radii = torch.where(visible, radius, torch.zeros_like(radius)).to(torch.int32)
        active = visible.to(torch.uint8) + 2 * segmented.to(torch.uint8)
    return means2d.contiguous(), conics.contiguous(), radii, active, factors


def _mean_of_bell(before: Tensor, after: Tensor, sigma: Tensor, width: Tensor | float) -> Tensor:
    """The integral of exp(-u^2 / sigma^2) from ``before`` to ``after``, over ``width``."""
    return (math.sqrt(math.pi) / (2 * width)) * sigma * (torch.erf(after / sigma) - torch.erf(before / sigma))
