"""Frames in between, without a model: where the anatomy moves between neighbouring frames, what it looks like on the way.

Two predictions are made for each quarter of the way from a frame to the next, and mixed with weights that the frames
themselves decide:

- *motion*: a symmetric optical flow (total variation, robust data term: Zach, Pock, Bischof 2007, estimated at the
  middle of the two frames) along which both frames are carried to the time asked for, and blended;
- *self super-resolution* (after Zhao et al., SMORE, 2021): tissue looks alike along all axes, so a small network that
  learns to fill in left-out rows of the frames also fills in the frames left out of the stack, seen from the side.

The weights are those that predict each frame best from its two neighbours, at twice the distance. Masks are carried
along the same flow as signed distances, and then corrected by a small network that has learned, on the frames, how the
contour follows the image.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import distance_transform_edt
from torch import Tensor, nn

STEPS = 4
"""Levels a gap is divided in: predictions are made at 1/4, 1/2 and 3/4."""

# ---- images ----------------------------------------------------------------------------------------------------------


def carry(images: Tensor, shift: Tensor, mode: str = "bicubic") -> Tensor:
    """Images (B, C, H, W) sampled at x + shift(x); shift: (B, 2, H, W), (x, y) in pixels. Edges are continued."""
    height, width = images.shape[-2:]
    x = torch.arange(width, dtype=shift.dtype, device=shift.device)
    y = torch.arange(height, dtype=shift.dtype, device=shift.device)[:, None]
    where = torch.stack(
        [(x + shift[:, 0]) * (2 / max(width - 1, 1)) - 1, (y + shift[:, 1]) * (2 / max(height - 1, 1)) - 1], -1
    )
    return F.grid_sample(images, where, mode=mode, padding_mode="border", align_corners=True)


def blur(images: Tensor, sigma: float) -> Tensor:
    """Gaussian filter, (B, C, H, W); edges are continued."""
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
    return torch.stack(around).median(0).values


# ---- flow ------------------------------------------------------------------------------------------------------------

WARPS, ITERATIONS, SHRINK, SMALLEST = 5, 10, 0.6, 14


def estimate_flow(before: Tensor, after: Tensor, contrast: bool = True) -> Tensor:
    """The motion v between pairs of grey images, seen from the middle: before(x - v/2) looks like after(x + v/2).

    before, after: (B, 1, H, W) in [0, 1]. Returns (B, 2, H, W), (x, y) in pixels.

    Total variation of v plus a robust difference of the images, minimised by a primal-dual method (Chambolle, Pock
    2011) from coarse to fine. Swapping the images turns v round. contrast: compare the images after local
    normalisation (mean 0, deviation 1 over some 8 px), which follows faint structure too; without it, brightness.
    """
    sizes = [(before.shape[-2], before.shape[-1])]
    while min(sizes[-1]) * SHRINK >= SMALLEST:
        sizes.append((round(sizes[-1][0] * SHRINK), round(sizes[-1][1] * SHRINK)))
    pyramid = [torch.cat([before, after])]
    for size in sizes[1:]:
        pyramid.append(_resize(blur(pyramid[-1], 0.6 * math.sqrt(SHRINK**-2 - 1)), size))
    v = before.new_zeros(before.shape[0], 2, *sizes[-1])
    for (height, width), images in zip(reversed(sizes), reversed(pyramid), strict=True):
        scale = torch.tensor([width / v.shape[3], height / v.shape[2]], dtype=v.dtype, device=v.device)
        v = _resize(v, (height, width)) * scale.view(1, 2, 1, 1)
        images = blur(images, 0.6)
        if contrast:
            mean = blur(images, 8)
            images = 0.15 * (images - mean) / (blur((images - mean) ** 2, 8) + 0.05**2).sqrt()
        v = _refine_flow(v, torch.cat([images, *_gradients(images)], 1), contrast)
    return v


def _refine_flow(v: Tensor, images: Tensor, contrast: bool) -> Tensor:
    """One level of the pyramid. images: (2B, 3, H, W), value and gradients, the pairs' first and then their second."""
    before, after = images.chunk(2)
    tau, sigma, weight = 0.25, 0.5, 20.0 if contrast else 10.0
    px, py = torch.zeros_like(v), torch.zeros_like(v)
    for _ in range(WARPS):
        a, b = carry(before, -v / 2, "bilinear"), carry(after, v / 2, "bilinear")
        rest, g = b[:, :1] - a[:, :1], (a[:, 1:] + b[:, 1:]) / 2
        squared = (g * g).sum(1, keepdim=True)
        start, ahead = v, v
        # A reweighted quadratic follows fine contrast better, the absolute difference noise.
        quadratic = tau * weight / (rest * rest + 0.02**2).sqrt()
        for _ in range(ITERATIONS):
            px = px + sigma * F.pad(ahead[..., 1:] - ahead[..., :-1], (0, 1))
            py = py + sigma * F.pad(ahead[..., 1:, :] - ahead[..., :-1, :], (0, 0, 0, 1))
            norm = (px * px + py * py).sum(1, keepdim=True).sqrt().clamp_min(1)
            px, py = px / norm, py / norm
            divergence = F.pad(px[..., :-1], (0, 1)) - F.pad(px[..., :-1], (1, 0))
            divergence = divergence + F.pad(py[..., :-1, :], (0, 0, 0, 1)) - F.pad(py[..., :-1, :], (0, 0, 1, 0))
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
    """The motion as seen at alpha (B,) of the way, from that seen in the middle, (B, 2, H, W) each."""
    late = (0.5 - alpha).view(-1, 1, 1, 1)
    seen = flow
    for _ in range(2):  # what is at x at alpha was in the middle at x + (1/2 - alpha) v
        seen = carry(flow, late * seen, "bilinear")
    return seen


def blend_along(before: Tensor, after: Tensor, seen: Tensor, alpha: Tensor) -> Tensor:
    """Both images carried along `seen`, the motion at alpha, and blended, (B, C, H, W). alpha: (B,)."""
    a = alpha.view(-1, 1, 1, 1)
    return (1 - a) * carry(before, -a * seen) + a * carry(after, (1 - a) * seen)


# ---- self super-resolution -------------------------------------------------------------------------------------------

WIDTH, DEPTH, GAIN = 32, 5, 5.0
BATCH, COLUMNS, TRAINING, RATE = 16, 32, 800, 3e-3
ROWS, FEWEST_ROWS = 16, 4
WIDEST_GAP = 8
"""Pixels; where neighbouring frames differ more than rows so far apart, motion has to do it alone."""


def matching_gap(frames: Tensor) -> float:
    """How many pixels apart two rows or columns are that differ as much as two neighbouring frames. (K, C, H, W)."""
    between = (frames[1:] - frames[:-1]).abs().mean()
    largest = min(24, *(n - 1 for n in frames.shape[-2:]))
    within = [
        ((frames[..., s:, :] - frames[..., :-s, :]).abs().mean() + (frames[..., s:] - frames[..., :-s]).abs().mean()) / 2
        for s in range(1, largest + 1)
    ]
    return float(np.interp(float(between), np.r_[0, torch.stack(within).cpu().numpy()], np.arange(largest + 1)))


class _RowsBetween(nn.Module):
    """Fills in rows: images (B, 1, R, W) of every gap-th row -> (B, STEPS - 1, R - 1, W), those in between."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [2] + [WIDTH] * (DEPTH - 1)
        layers: list[nn.Module] = []
        for a, b in zip(sizes[:-1], sizes[1:], strict=True):
            layers += [nn.Conv2d(a, b, 3, padding=1, padding_mode="replicate"), nn.LeakyReLU(0.1)]
        last = nn.Conv2d(WIDTH, STEPS - 1, (2, 3), padding=(0, 1))
        assert last.bias is not None
        nn.init.zeros_(last.weight)  # begins as the linear blend
        nn.init.zeros_(last.bias)
        self.layers = nn.Sequential(*layers, last)

    def forward(self, rows: Tensor, gap: float) -> Tensor:
        gap_plane = torch.full_like(rows, math.log2(gap) / 2)
        steps = torch.arange(1, STEPS, device=rows.device).view(1, -1, 1, 1) / STEPS
        linear = (1 - steps) * rows[:, :, :-1] + steps * rows[:, :, 1:]
        return linear + self.layers(torch.cat([GAIN * (rows - 0.3), gap_plane], 1)) / GAIN


def _learn_rows(frames: Tensor, gaps: list[int], generator: torch.Generator) -> _RowsBetween:
    """Trains on rows and columns of `frames` (N, H, W), left out gap by gap."""
    device = frames.device
    height, width = frames.shape[1:]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**31, (1,), generator=generator)))
        network = _RowsBetween().to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=TRAINING)
    both = [frames, frames.transpose(1, 2).contiguous()]
    side = min(height, width)
    patches = {}
    for gap in gaps:
        count = min(ROWS, (side - 1) // gap + 1)
        extent, columns = (count - 1) * gap + 1, min(COLUMNS, side)
        # empty background teaches nothing: only patches that vary
        corners = []
        for images in both:
            x = images[:, None]
            mean = F.avg_pool2d(x, (extent, columns), 1)
            corners.append(((F.avg_pool2d(x * x, (extent, columns), 1) - mean**2)[:, 0] > 1e-4).nonzero().cpu())
        patches[gap] = count, extent, columns, corners, _between_matrix(count, gap).to(frames)
    for i in range(TRAINING):
        gap = gaps[1] if len(gaps) > 1 and i % 3 == 2 else gaps[0]
        _, extent, columns, corners, matrix = patches[gap]
        turn = i % 2 if len(corners[i % 2]) else 1 - i % 2
        pick = corners[turn][torch.randint(len(corners[turn]), (BATCH,), generator=generator)]
        pick = pick.to(device)
        y = pick[:, 1, None, None] + torch.arange(extent, device=device)[:, None]
        x = pick[:, 2, None, None] + torch.arange(columns, device=device)
        patch = both[turn][pick[:, 0, None, None], y, x]  # (B, extent, columns)
        flips = torch.randint(4, (1,), generator=generator).item()
        patch = patch.flip([axis for axis, bit in ((1, 1), (2, 2)) if int(flips) & bit])
        truth = torch.einsum("srl,blw->bsrw", matrix, patch)
        loss = (network(patch[:, None, ::gap], gap) - truth).square().mean()
        optimizer.zero_grad()
        (1000 * loss).backward()
        optimizer.step()
        schedule.step()
    return network.requires_grad_(False)


def _between_matrix(count: int, gap: int) -> Tensor:
    """(STEPS - 1, count - 1, L): weights on L rows that give those at 1/STEPS, ... of each gap, by a cubic where that
    is between two rows."""
    length = (count - 1) * gap + 1
    matrix = np.zeros((STEPS - 1, count - 1, length))
    for s in range(1, STEPS):
        for r in range(count - 1):
            at = (r + s / STEPS) * gap
            base = math.floor(at)
            t = at - base
            cubic = (
                t * (-0.5 + t * (1 - 0.5 * t)),
                1 + t * t * (-2.5 + 1.5 * t),
                t * (0.5 + t * (2 - 1.5 * t)),
                t * t * (-0.5 + 0.5 * t),
            )
            for offset, weight in zip((-1, 0, 1, 2), cubic, strict=True):
                matrix[s - 1, r, min(max(base + offset, 0), length - 1)] += weight
    return torch.from_numpy(matrix)


def _fill_stack(network: _RowsBetween, frames: Tensor, gap: float, chunk: int = 32) -> Tensor:
    """The stack (K, H, W) seen from its two sides, filled in: (K - 1, STEPS - 1, H, W)."""
    k, height, width = frames.shape
    total = frames.new_zeros(k - 1, STEPS - 1, height, width)
    for first in range(0, height, chunk):  # cuts along x: (rows of the cut: frames, columns: x)
        cuts = frames[:, first : first + chunk].transpose(0, 1)[:, None]
        total[:, :, first : first + chunk] += network(cuts, gap).permute(2, 1, 0, 3)
    for first in range(0, width, chunk):
        cuts = frames[:, :, first : first + chunk].permute(2, 0, 1)[:, None]
        total[..., first : first + chunk] += network(cuts, gap).permute(2, 1, 3, 0)
    return total / 2


# ---- masks -----------------------------------------------------------------------------------------------------------

FARTHEST = 16.0
"""Pixels; signed distances are cut off there."""


def signed_distances(masks: Tensor, gap: float = 1.0) -> Tensor:
    """Distance in pixels from the contour, which runs half a pixel off the outermost centres; positive inside.

    masks: (K, 1, H, W), inside where >= 0.5. An empty mask takes the nearest other one's contour as lying wholly between
    the two frames, `gap` pixels apart each: that distance from it, and nothing inside.
    """
    inside = (masks[:, 0] >= 0.5).cpu().numpy()
    far = float(sum(inside.shape[1:]))
    distances = np.full(inside.shape, -far, dtype=np.float32)
    for k, mask in enumerate(inside):
        if mask.all():
            distances[k] = far
        elif mask.any():
            distances[k] = np.where(
                mask, distance_transform_edt(mask) - 0.5, 0.5 - distance_transform_edt(~mask)
            )
    filled = inside.any((1, 2)).nonzero()[0]
    for k in range(len(inside)) if len(filled) else ():
        if not inside[k].any():
            nearest = filled[np.abs(filled - k).argmin()]
            distances[k] = -np.abs(distances[nearest]) - gap * abs(int(nearest) - k)
    return torch.from_numpy(distances)[:, None].to(masks.device)
