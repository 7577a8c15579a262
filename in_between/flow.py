"""The motion between frames, and images carried along it.

A symmetric optical flow, estimated as seen from the middle of two frames: total variation with a robust data term
(Zach, Pock and Bischof 2007). Paths are parabolas, whose bend is how the motion changes from the pair before to the
pair after.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from in_between.settings import DEFAULT, FlowSettings

# ---- images ----------------------------------------------------------------------------------------------------------


def carry(images: Tensor, shift: Tensor, mode: str = "bicubic") -> Tensor:
    """Images (B, C, H, W) sampled at x + shift(x); shift: (B, 2, H, W), (x, y) in pixels. Edges are continued."""
    height, width = images.shape[-2:]
    x = torch.arange(width, dtype=shift.dtype, device=shift.device)
    y = torch.arange(height, dtype=shift.dtype, device=shift.device)[:, None]
    where = torch.stack(
        [(x + shift[:, 0]) * (2 / max(width - 1, 1)) - 1, (y + shift[:, 1]) * (2 / max(height - 1, 1)) - 1],
        -1,
    )
    return F.grid_sample(images, where, mode=mode, padding_mode="border", align_corners=True)


def blur(images: Tensor, sigma: float) -> Tensor:
    """Gaussian filter of images (B, C, H, W), sigma in pixels; edges are continued."""
    radius = max(1, round(3 * sigma))
    x = torch.arange(-radius, radius + 1, dtype=images.dtype, device=images.device)
    kernel = torch.exp(-(x**2) / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    flat = images.reshape(-1, 1, *images.shape[-2:])
    flat = F.conv2d(F.pad(flat, (0, 0, radius, radius), mode="replicate"), kernel.view(1, 1, -1, 1))
    flat = F.conv2d(F.pad(flat, (radius, radius, 0, 0), mode="replicate"), kernel.view(1, 1, 1, -1))
    return flat.reshape(images.shape)


def _resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(images, size=size, mode="bilinear", align_corners=True)


def _gradients(images: Tensor) -> tuple[Tensor, Tensor]:
    """Central differences along x and y."""
    p = F.pad(images, (1, 1, 1, 1), mode="replicate")
    return (p[..., 1:-1, 2:] - p[..., 1:-1, :-2]) / 2, (p[..., 2:, 1:-1] - p[..., :-2, 1:-1]) / 2


def _median(fields: Tensor) -> Tensor:
    """3 x 3 median."""
    height, width = fields.shape[-2:]
    p = F.pad(fields, (1, 1, 1, 1), mode="replicate")
    around = [p[..., i : i + height, j : j + width] for i in range(3) for j in range(3)]
    return torch.stack(around).sort(0).values[4]  # torch.median is not deterministic on a GPU


# ---- flow ------------------------------------------------------------------------------------------------------------


def estimate_flow(
    before: Tensor,
    after: Tensor,
    contrast: bool = True,
    weight: float = 20.0,
    settings: FlowSettings = DEFAULT.flow,
) -> Tensor:
    """The motion v between pairs of grey images, seen from the middle: before(x - v/2) looks like after(x + v/2).

    before, after: (B, 1, H, W) in [0, 1]. Returns (B, 2, H, W), (x, y) in pixels.

    Minimises the total variation of v plus a robust difference of the images by a primal-dual method (Chambolle and
    Pock 2011), from coarse to fine. Swapping the images reverses v. contrast: compare the images after local
    normalisation (mean 0, deviation 1 over some 8 px), which follows faint structure too; without it, brightness.
    weight: of the images against smoothness.
    """
    shrink = settings.shrink
    sizes = [(before.shape[-2], before.shape[-1])]
    while min(sizes[-1]) * shrink >= settings.smallest:
        sizes.append((round(sizes[-1][0] * shrink), round(sizes[-1][1] * shrink)))
    pyramid = [torch.cat([before, after])]
    for size in sizes[1:]:
        pyramid.append(_resize(blur(pyramid[-1], 0.6 * math.sqrt(shrink**-2 - 1)), size))
    v = before.new_zeros(before.shape[0], 2, *sizes[-1])
    for (height, width), images in zip(reversed(sizes), reversed(pyramid), strict=True):
        scale = torch.tensor([width / v.shape[3], height / v.shape[2]], dtype=v.dtype, device=v.device)
        v = _resize(v, (height, width)) * scale.view(1, 2, 1, 1)
        images = blur(images, 0.6)
        if contrast:
            mean = blur(images, 8)
            images = 0.15 * (images - mean) / (blur((images - mean) ** 2, 8) + 0.05**2).sqrt()
        v = _refine_flow(v, torch.cat([images, *_gradients(images)], 1), contrast, weight, settings)
    return v


def _refine_flow(v: Tensor, images: Tensor, contrast: bool, weight: float, settings: FlowSettings) -> Tensor:
    """One level of the pyramid. images: (2B, 3, H, W), value and gradients, of the pairs' first images, then of their
    second."""
    before, after = images.chunk(2)
    tau, sigma = 0.25, 0.5
    px, py = torch.zeros_like(v), torch.zeros_like(v)
    for _ in range(settings.warps):
        a, b = carry(before, -v / 2, "bilinear"), carry(after, v / 2, "bilinear")
        rest, g = b[:, :1] - a[:, :1], (a[:, 1:] + b[:, 1:]) / 2
        squared = (g * g).sum(1, keepdim=True)
        start, ahead = v, v
        # A reweighted quadratic follows fine contrast better, the absolute difference noise.
        quadratic = tau * weight / (rest * rest + 0.02**2).sqrt()
        for _ in range(settings.iterations):
            px = px + sigma * F.pad(ahead[..., 1:] - ahead[..., :-1], (0, 1))
            py = py + sigma * F.pad(ahead[..., 1:, :] - ahead[..., :-1, :], (0, 0, 0, 1))
            norm = (px * px + py * py).sum(1, keepdim=True).sqrt().clamp_min(1)
            px, py = px / norm, py / norm
            divergence = F.pad(px[..., :-1], (0, 1)) - F.pad(px[..., :-1], (1, 0))
            divergence = (
                divergence + F.pad(py[..., :-1, :], (0, 0, 0, 1)) - F.pad(py[..., :-1, :], (0, 0, 1, 0))
            )
            free = v + tau * divergence
            residual = rest + (g * (free - start)).sum(1, keepdim=True)
            if contrast:
                step = -residual * quadratic / (1 + quadratic * squared)
            else:
                step = (-residual / (squared + 1e-9)).clamp(-tau * weight, tau * weight)
            new = free + step * g
            ahead, v = 2 * new - v, new
        v = _median(v)
    return v


def flow_at(flow: Tensor, alpha: Tensor) -> Tensor:
    """The motion as seen at alpha (B,) of the way, from that seen in the middle; (B, 2, H, W) each."""
    late = (0.5 - alpha).view(-1, 1, 1, 1)
    seen = flow
    for _ in range(2):  # what is at x at alpha was in the middle at x + (1/2 - alpha) v
        seen = carry(flow, late * seen, "bilinear")
    return seen


def blend_along(
    before: Tensor,
    after: Tensor,
    seen: Tensor,
    alpha: Tensor,
    mode: str = "bicubic",
    aside: Tensor | float = 0.0,
) -> Tensor:
    """Both images, (B, C, H, W), carried along `seen`, the motion at alpha (B,), and blended.

    aside: (B, 2, H, W), added to where both are sampled, for paths that bend.
    """
    a = alpha.view(-1, 1, 1, 1)
    return (1 - a) * carry(before, aside - a * seen, mode) + a * carry(after, aside + (1 - a) * seen, mode)


# ---- paths through a sequence ----------------------------------------------------------------------------------------


class Paths(NamedTuple):
    """The motion from frame k to frame k + stride, seen in the middle, in pixels: (K - stride, 2, H, W) each.

    flow: from one to the other. bend: the flow of the pair after minus that of the pair before, of the same matter.
    """

    flow: Tensor
    bend: Tensor

    def blend(self, before: Tensor, after: Tensor, alpha: float) -> Tensor:
        """The frames carried along and blended, at one alpha for all; bilinearly, which smooths noise."""
        times = torch.full((len(before),), alpha, device=before.device)
        seen = flow_at(self.flow, times)
        bend = carry(self.bend, (0.5 - alpha) * seen, "bilinear")
        # parabolas through both ends: their velocity changes by bend / 2 on the way
        return blend_along(before, after, seen, times, "bilinear", alpha * (1 - alpha) / 4 * bend)


def find_paths(frames: Tensor, settings: FlowSettings, stride: int = 1) -> list[Paths]:
    """Those of all pairs of frames (k, k + stride), by each of `settings.estimates`. frames: (K, C, H, W)."""
    grey = frames.mean(1, keepdim=True)
    chunk = max(1, settings.pixels_at_once // grey[0].numel())
    pairs = torch.stack([grey[:-stride], grey[stride:]]).split(chunk, 1)
    k = torch.arange(len(frames) - stride, device=frames.device)
    found = []
    for contrast, weight in settings.estimates:
        flow = torch.cat([estimate_flow(a, b, contrast, weight, settings) for a, b in pairs])
        # what moves here by flow is that much farther in the next pair's middle, and was as far behind before
        later = carry(flow[(k + stride).clamp_max(len(k) - 1)], flow, "bilinear")
        earlier = carry(flow[(k - stride).clamp_min(0)], -flow, "bilinear")
        # where there is no such pair, nothing is known of a change
        later = torch.where((k + stride < len(k)).view(-1, 1, 1, 1), later, flow)
        earlier = torch.where((k >= stride).view(-1, 1, 1, 1), earlier, flow)
        found.append(Paths(flow, blur(later - earlier, settings.bend_blur)))
    return found


def blend_paths(before: Tensor, after: Tensor, paths: list[Paths], alpha: float) -> Tensor:
    """Mean over all estimates of the motion: where they are wrong, they differ."""
    return torch.stack([path.blend(before, after, alpha) for path in paths]).mean(0)
