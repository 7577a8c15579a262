"""The motion between frames, and images carried along it.

A symmetric optical flow, estimated as seen from the middle of two frames: total variation with a robust data term
(Zach, Pock and Bischof 2007). Paths are parabolas; their bend is the change of motion from the pair before to the
pair after.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from in_between.progress import Done, unheard
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
    """3 x 3 median, by a network of comparisons (Smith 1996): sorting is ten times slower, and torch.median is
    not deterministic on a GPU."""
    height, width = fields.shape[-2:]
    padded = F.pad(fields, (1, 1, 1, 1), mode="replicate")
    p = [padded[..., i : i + height, j : j + width] for i in range(3) for j in range(3)]

    def sort(*pairs: tuple[int, int]) -> None:
        for a, b in pairs:
            p[a], p[b] = torch.minimum(p[a], p[b]), torch.maximum(p[a], p[b])

    sort((1, 2), (4, 5), (7, 8), (0, 1), (3, 4), (6, 7), (1, 2), (4, 5), (7, 8))  # each row of three
    low = torch.maximum(torch.maximum(p[0], p[3]), p[6])
    high = torch.minimum(torch.minimum(p[2], p[5]), p[8])
    sort((1, 4))
    middle = torch.maximum(p[1], torch.minimum(p[4], p[7]))
    return torch.maximum(torch.minimum(low, high), torch.minimum(torch.maximum(low, high), middle))


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
    normalisation (mean 0, deviation 1 over about 8 px), which follows faint structure too; without it, brightness.
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
    px, py = torch.zeros_like(v), torch.zeros_like(v)  # the dual of v's differences along x and y
    for _ in range(settings.warps):
        a, b = carry(before, -v / 2, "bilinear"), carry(after, v / 2, "bilinear")
        rest, g = b[:, :1] - a[:, :1], (a[:, 1:] + b[:, 1:]) / 2
        v = _median(_descend(v, px, py, rest, g, contrast, weight, settings.iterations))
    return v


def _descend(
    v: Tensor, px: Tensor, py: Tensor, rest: Tensor, g: Tensor, contrast: bool, weight: float, iterations: int
) -> Tensor:
    """Primal-dual steps around the linearisation: images differ by rest (B, 1, H, W) at v, by rest + g (v' - v) at v'.

    v, g: (B, 2, H, W). px, py: the same, changed in place. All writes go into buffers allocated once: on a CPU,
    memory traffic dominates.
    """
    tau, sigma = 0.25, 0.5
    squared = (g * g).sum(1, keepdim=True)
    at_zero = rest - (g * v).sum(1, keepdim=True)
    if contrast:  # a reweighted quadratic suits fine contrast; the absolute difference, noise
        quadratic = tau * weight / (rest * rest + 0.02**2).sqrt()
        damping = -quadratic / (1 + quadratic * squared)
    else:
        damping = -1 / (squared + 1e-9)
    v, ahead, new, spare = v.clone(), v.clone(), torch.empty_like(v), torch.empty_like(v)
    single = torch.empty_like(rest)
    for _ in range(iterations):
        torch.sub(ahead[..., 1:], ahead[..., :-1], out=spare[..., 1:])
        px[..., :-1].add_(spare[..., 1:], alpha=sigma)
        torch.sub(ahead[..., 1:, :], ahead[..., :-1, :], out=spare[..., 1:, :])
        py[..., :-1, :].add_(spare[..., 1:, :], alpha=sigma)
        torch.mul(px, px, out=spare).addcmul_(py, py)
        torch.add(spare[:, :1], spare[:, 1:], out=single).sqrt_().clamp_(min=1)
        px.div_(single)
        py.div_(single)
        new.copy_(
            v
        )  # and the divergence of the dual, which is zero in the last column of px and the last row of py
        new.add_(px, alpha=tau).add_(py, alpha=tau)
        new[..., 1:].sub_(px[..., :-1], alpha=tau)
        new[..., 1:, :].sub_(py[..., :-1, :], alpha=tau)
        torch.mul(new, g, out=spare)
        torch.add(spare[:, :1], spare[:, 1:], out=single).add_(at_zero).mul_(damping)
        if not contrast:
            single.clamp_(-tau * weight, tau * weight)
        new.addcmul_(single, g)
        torch.lerp(v, new, 2.0, out=ahead)
        v, new = new, v
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

    flow: from one to the other. bend: the flow of the pair after minus that of the pair before, of the same tissue.
    """

    flow: Tensor
    bend: Tensor

    def part(self, pairs: slice, area: Any) -> Paths:
        """Those of some pairs, within an ``area`` (..., rows, columns)."""
        return Paths(self.flow[pairs][area], self.bend[pairs][area])

    def placed(self, area: Any, size: Sequence[int]) -> Paths:
        """As of whole frames (H, W), of which these are an ``area``: nothing moves outside of it."""
        whole = self.flow.new_zeros(2, *self.flow.shape[:2], *size)
        whole[0][area], whole[1][area] = self.flow, self.bend
        return Paths(*whole)

    def blend(self, before: Tensor, after: Tensor, alpha: float) -> Tensor:
        """The frames carried along and blended, at one alpha for all; sampled bilinearly, which smooths noise."""
        times = torch.full((len(before),), alpha, device=before.device)
        seen = flow_at(self.flow, times)
        bend = carry(self.bend, (0.5 - alpha) * seen, "bilinear")
        # parabolas through both ends: their velocity changes by bend / 2 on the way
        return blend_along(before, after, seen, times, "bilinear", alpha * (1 - alpha) / 4 * bend)


def find_paths(frames: Tensor, settings: FlowSettings, stride: int = 1, done: Done = unheard) -> list[Paths]:
    """Those of all pairs of frames (k, k + stride), by each of `settings.estimates`. frames: (K, C, H, W)."""
    grey = frames.mean(1, keepdim=True)
    at_once = settings.pixels_at_once_cpu if grey.device.type == "cpu" else settings.pixels_at_once
    chunk = max(1, at_once // grey[0].numel())
    pairs = torch.stack([grey[:-stride], grey[stride:]]).split(chunk, 1)  # each (2, b, 1, H, W)
    k = torch.arange(len(frames) - stride, device=frames.device)
    found = []
    for number, (contrast, weight) in enumerate(settings.estimates):
        parts = []
        for before, after in pairs:
            parts.append(estimate_flow(before, after, contrast, weight, settings))
            done((number + len(parts) / len(pairs)) / len(settings.estimates))
        flow = torch.cat(parts)
        # what moves here by flow is that far on in the next pair's middle, and that far back in the one before
        later = carry(flow[(k + stride).clamp_max(len(k) - 1)], flow, "bilinear")
        earlier = carry(flow[(k - stride).clamp_min(0)], -flow, "bilinear")
        # without such a pair, the change is unknown
        later = torch.where((k + stride < len(k)).view(-1, 1, 1, 1), later, flow)
        earlier = torch.where((k >= stride).view(-1, 1, 1, 1), earlier, flow)
        found.append(Paths(flow, blur(later - earlier, settings.bend_blur)))
    return found


def blend_paths(before: Tensor, after: Tensor, paths: list[Paths], alpha: float) -> Tensor:
    """Mean over all estimates of the motion: where they are wrong, they differ."""
    return torch.stack([path.blend(before, after, alpha) for path in paths]).mean(0)
