"""Frames in between, without a model: where the anatomy moves between neighbouring frames, what it looks like there.

Two predictions are made for each quarter of the way from a frame to the next, mixed, and taken some way farther from
the linear blend of the two frames, towards which both are drawn where they are unsure:

- *motion*: a symmetric optical flow (total variation, robust data term: Zach, Pock, Bischof 2007, estimated at the
  middle of the two frames) along which both frames are carried to the time asked for, and blended; paths are
  parabolas, whose bend is how the motion changes from the pair before to the pair after;
- *self super-resolution* (after Zhao et al., SMORE, 2021): tissue looks alike along all axes, so a small network that
  learns to fill in left-out rows of the frames also fills in the frames left out of the stack, seen from the side.

Masks are carried along the same flow as signed distances, and then corrected by a small network that has learned, on
the frames between two others, how contours follow the image.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import pickle
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from in_between import classical
from utils.files import atomic_write

_PREDICTION = 3  # raised when what is predicted becomes another: what earlier code kept is not taken for it
STEPS = 4
"""Levels a gap is divided in: predictions are made at 1/4, 1/2 and 3/4."""

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
    return torch.stack(around).sort(0).values[4]  # torch.median is not deterministic on a GPU


# ---- flow ------------------------------------------------------------------------------------------------------------

WARPS, ITERATIONS, SHRINK, SMALLEST = 5, 10, 0.6, 14
FLOWS = ((True, 20.0), (False, 5.0))
"""How motion is estimated: by contrast or by brightness, and the weight of the images against smoothness."""
PIXELS_AT_ONCE = 2_000_000
"""Of all pairs whose motion is estimated together, but one pair at least; it takes some 700 bytes for each."""
BEND_BLUR = 2.0
"""Pixels; how a path bends is the difference of two estimates, and noisy."""


def estimate_flow(before: Tensor, after: Tensor, contrast: bool = True, weight: float = 20.0) -> Tensor:
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
        v = _refine_flow(v, torch.cat([images, *_gradients(images)], 1), contrast, weight)
    return v


def _refine_flow(v: Tensor, images: Tensor, contrast: bool, weight: float) -> Tensor:
    """One level of the pyramid. images: (2B, 3, H, W), value and gradients, the pairs' first and then their second."""
    before, after = images.chunk(2)
    tau, sigma = 0.25, 0.5
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
    """The motion as seen at alpha (B,) of the way, from that seen in the middle, (B, 2, H, W) each."""
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
    """Both images carried along `seen`, the motion at alpha, and blended, (B, C, H, W). alpha: (B,). aside:
    (B, 2, H, W), added to where both are sampled, for paths that bend."""
    a = alpha.view(-1, 1, 1, 1)
    return (1 - a) * carry(before, aside - a * seen, mode) + a * carry(after, aside + (1 - a) * seen, mode)


class _Paths(NamedTuple):
    """The motion from frame k to frame k + stride, seen in the middle, in pixels: (K - stride, 2, H, W) each.

    flow: from one to the other. bend: the flow of the pair after less that of the pair before, of the same matter.
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


def _paths(frames: Tensor, stride: int = 1) -> list[_Paths]:
    """By each of FLOWS, of all pairs of frames (k, k + stride)."""
    grey = frames.mean(1, keepdim=True)
    chunk = max(1, PIXELS_AT_ONCE // grey[0].numel())
    pairs = torch.stack([grey[:-stride], grey[stride:]]).split(chunk, 1)
    k = torch.arange(len(frames) - stride, device=frames.device)
    found = []
    for contrast, weight in FLOWS:
        flow = torch.cat([estimate_flow(a, b, contrast, weight) for a, b in pairs])
        # what moves here by flow is that much farther in the next pair's middle, and was as far behind before
        later = carry(flow[(k + stride).clamp_max(len(k) - 1)], flow, "bilinear")
        earlier = carry(flow[(k - stride).clamp_min(0)], -flow, "bilinear")
        # where there is no such pair, nothing is known of a change
        later = torch.where((k + stride < len(k)).view(-1, 1, 1, 1), later, flow)
        earlier = torch.where((k >= stride).view(-1, 1, 1, 1), earlier, flow)
        found.append(_Paths(flow, blur(later - earlier, BEND_BLUR)))
    return found


def _blend_paths(before: Tensor, after: Tensor, paths: list[_Paths], alpha: float) -> Tensor:
    """Mean over all estimates of the motion: where they are wrong they differ."""
    return torch.stack([path.blend(before, after, alpha) for path in paths]).mean(0)


# ---- small networks --------------------------------------------------------------------------------------------------

BATCH, RATE = 16, 3e-3
Network = TypeVar("Network", bound=nn.Module)


@contextlib.contextmanager
def _recorded(network: nn.Module, shapes: Sequence[tuple[int, ...]], device: torch.device) -> Iterator[None]:
    """On a GPU, `network`'s small kernels are recorded, and meanwhile replayed for calls with tensors of `shapes`:
    started one by one, they would wait for Python."""
    if device.type != "cuda":
        yield
        return
    # What records kernels does so on the current GPU, whichever the tensors are on.
    with torch.cuda.device(device), warnings.catch_warnings():
        # Gradients are summed on another stream than recorded on: torch waits where it must, and says so.
        warnings.filterwarnings("ignore", "The AccumulateGrad node's stream does not match")
        torch.cuda.make_graphed_callables(
            network, tuple(torch.zeros(shape, device=device) for shape in shapes)
        )
        yield
        torch.cuda.synchronize()  # a recording's memory must not go while it is being replayed
        vars(network).pop("forward", None)


def _trained(
    make: Callable[[], Network],
    loss: Callable[[Network, int], Tensor],
    shapes: Sequence[tuple[int, ...]],
    iterations: int,
    device: torch.device,
    generator: torch.Generator,
) -> Network:
    """`make`'s network after AdamW on `loss(network, i)`, which calls it once with tensors of `shapes`; all that is
    random comes from `generator`."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(int(torch.randint(2**31, (1,), generator=generator)))
        network = make().to(device)
        with _recorded(network, shapes, device):
            fused = device.type == "cuda"
            optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=1e-4, fused=fused)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=iterations)
            for i in range(iterations):
                optimizer.zero_grad()
                loss(network, i).backward()
                optimizer.step()
                schedule.step()
    return network.requires_grad_(False)


class _ContinuedEdges(nn.Module):
    """A pixel more on each side, as the outermost one: torch's own has no deterministic gradient on a GPU."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x[..., :1], x, x[..., -1:]], -1)
        return torch.cat([x[..., :1, :], x, x[..., -1:, :]], -2)


def _convolutions(inputs: int, width: int, depth: int, last: nn.Conv2d) -> nn.Sequential:
    """depth - 1 convolutions of 3 x 3, and `last`, which starts as the zero function."""
    layers: list[nn.Module] = []
    for channels in [inputs] + [width] * (depth - 2):
        layers += [_ContinuedEdges(), nn.Conv2d(channels, width, 3), nn.LeakyReLU(0.1)]
    assert last.bias is not None
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(*layers, last)


def _flipped(patches: Tensor, generator: torch.Generator) -> Tensor:
    """(B, H, W, ...) turned over in H and W, or not."""
    bits = int(torch.randint(4, (1,), generator=generator))
    return patches.flip([axis for axis in (1, 2) if bits & axis])


# ---- self super-resolution -------------------------------------------------------------------------------------------

WIDTH, DEPTH, GAIN = 48, 5, 5.0
TRAINING, ROWS, COLUMNS, FEWEST_ROWS = 1200, 16, 32, 4
LEAST_VARIANCE = 1e-4
SHARE = 0.6
"""Of self super-resolution in the prediction, against the motion's."""
EXCESS = 0.3
"""Of what both find beyond the linear blend, added once more: each, where unsure, falls short towards that blend."""
MIRRORS = ((0,), (1, 2), (0, 1, 2))
"""Axes of the stack that are turned round: frames, rows, columns."""
WIDEST_GAP = 8
"""Pixels; frames that lie farther apart are filled in by their motion alone."""


def matching_gap(frames: Tensor) -> float:
    """How many pixels apart rows and columns lie that predict what is between them as badly as frames (K, C, H, W) do.

    The error of the mean of two neighbours, along the stack and within frames; with two frames alone their difference.
    """
    largest = max(1, min(24, (min(frames.shape[-2:]) - 1) // 2))
    if len(frames) > 2:
        between = (frames[1:-1] - (frames[:-2] + frames[2:]) / 2).abs().mean()
        within = [_error_between(frames, s) for s in range(1, largest + 1)]
    else:
        between = (frames[1] - frames[0]).abs().mean()
        within = [
            (
                (frames[..., s:, :] - frames[..., :-s, :]).abs().mean()
                + (frames[..., s:] - frames[..., :-s]).abs().mean()
            )
            / 2
            for s in range(1, largest + 1)
        ]
    errors = np.maximum.accumulate(np.r_[0, torch.stack(within).cpu().numpy()])
    return float(np.interp(float(between), errors, np.arange(largest + 1)))


def _error_between(frames: Tensor, s: int) -> Tensor:
    rows = frames[..., s:-s, :] - (frames[..., : -2 * s, :] + frames[..., 2 * s :, :]) / 2
    columns = frames[..., s:-s] - (frames[..., : -2 * s] + frames[..., 2 * s :]) / 2
    return (rows.abs().mean() + columns.abs().mean()) / 2


class _RowsBetween(nn.Module):
    """Fills in rows: images (B, 1, R, W) of every gap-th row -> (B, STEPS - 1, R - 1, W), those in between."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = _convolutions(1, WIDTH, DEPTH, nn.Conv2d(WIDTH, STEPS - 1, (2, 3), padding=(0, 1)))

    def forward(self, rows: Tensor) -> Tensor:
        steps = torch.arange(1, STEPS, device=rows.device).view(1, -1, 1, 1) / STEPS
        linear = (1 - steps) * rows[:, :, :-1] + steps * rows[:, :, 1:]
        return linear + self.layers(GAIN * (rows - 0.3)) / GAIN


def _learn_rows(frames: Tensor, gap: int, generator: torch.Generator) -> _RowsBetween | None:
    """Trains on rows and columns of `frames` (N, H, W), of which every gap-th is seen; None where all is empty."""
    height, width = frames.shape[1:]
    side = min(height, width)
    count = min(ROWS, (side - 1) // gap + 1)
    extent, columns = (count - 1) * gap + 1, min(COLUMNS, side)
    upright, turned = frames, frames.transpose(1, 2).contiguous()
    sources = []
    for images in (upright, turned):
        mean = F.avg_pool2d(images[:, None], (extent, columns), 1)
        variance = F.avg_pool2d(images[:, None] ** 2, (extent, columns), 1) - mean**2
        corners = (variance[:, 0] > LEAST_VARIANCE).nonzero().cpu()  # empty background teaches nothing
        if not len(corners):
            return None
        sources.append((images, corners))
    matrix = _between_matrix(count, gap).to(frames)
    down, across = torch.arange(extent, device=frames.device), torch.arange(columns, device=frames.device)

    def loss(network: _RowsBetween, i: int) -> Tensor:
        images, corners = sources[i % 2]
        pick = corners[torch.randint(len(corners), (BATCH,), generator=generator)].to(frames.device)
        k, y, x = pick[:, :, None, None].unbind(1)
        patch = _flipped(images[k, y + down[:, None], x + across], generator)  # (B, extent, columns)
        truth = torch.einsum("srl,blw->bsrw", matrix, patch)
        return 1000 * (network(patch[:, None, ::gap]) - truth).square().mean()

    return _trained(_RowsBetween, loss, [(BATCH, 1, count, columns)], TRAINING, frames.device, generator)


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


def _fill_stack(network: _RowsBetween, frames: Tensor) -> Tensor:
    """The stack (K, H, W) filled in, (K - 1, STEPS - 1, H, W): mean of what is made of it and of its mirror images."""
    filled = _fill_cuts(network, frames)
    for axes in MIRRORS:
        mirrored = _fill_cuts(network, frames.flip(axes))
        later = (0, 1) if 0 in axes else ()
        filled = filled + mirrored.flip([*later, *(axis + 1 for axis in axes if axis)])
    return filled / (1 + len(MIRRORS))


def _fill_cuts(network: _RowsBetween, frames: Tensor, chunk: int = 32) -> Tensor:
    """As `_fill_stack`, of the stack as it is: mean of its cuts along x and along y."""
    k, height, width = frames.shape
    total = frames.new_zeros(k - 1, STEPS - 1, height, width)
    for first in range(0, height, chunk):  # cuts along x: (rows of the cut: frames, columns: x)
        cuts = frames[:, first : first + chunk].transpose(0, 1)[:, None]
        total[:, :, first : first + chunk] += network(cuts).permute(2, 1, 0, 3)
    for first in range(0, width, chunk):
        cuts = frames[:, :, first : first + chunk].permute(2, 0, 1)[:, None]
        total[..., first : first + chunk] += network(cuts).permute(2, 1, 3, 0)
    return total / 2


# ---- masks -----------------------------------------------------------------------------------------------------------

FARTHEST = 16.0
"""Pixels; signed distances are cut off there."""


def signed_distances(masks: Tensor, gap: float = 1.0) -> Tensor:
    """`in_between.classical.signed_distances` in pixels, of masks (K, 1, H, W), inside where >= 0.5."""
    inside = (masks[:, 0] >= 0.5).cpu().numpy()
    return torch.from_numpy(classical.signed_distances(inside, gap=gap))[:, None].to(masks.device)


MASK_WIDTH, MASK_DEPTH, MASK_TRAINING, MASK_PATCH = 16, 4, 400, 32
TRUST = 1 / 3
"""Of a correction learned at twice the distance: errors there are twice (noise) to four times (curvature) as large."""


class _Contours(nn.Module):
    """What to add to signed distances (B, 1, H, W), predicted along the motion, by what the image shows."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        *layers, last = _convolutions(2 + channels, MASK_WIDTH, MASK_DEPTH, nn.Conv2d(MASK_WIDTH, 1, 3))
        self.layers = nn.Sequential(*layers, _ContinuedEdges(), last)

    def forward(self, moved: Tensor, still: Tensor, images: Tensor) -> Tensor:
        seen = [moved.clamp(-8, 8) / 4, still.clamp(-8, 8) / 4, 4 * (images - 0.3)]
        return 4 * self.layers(torch.cat(seen, 1))


def _learn_contours(
    moved: Tensor, still: Tensor, images: Tensor, masks: Tensor, generator: torch.Generator
) -> _Contours | None:
    """Trains on the frames between two others, whose masks are known; None where none shows a contour."""
    channels, height, width = images.shape[1:]
    size = min(MASK_PATCH, height, width)
    near = (moved.abs().minimum(still.abs()) < 2)[:, 0].nonzero().cpu()  # the pixels in question
    if not len(near):
        return None
    everything = torch.cat([moved, still, images, masks], 1).permute(0, 2, 3, 1)
    limits = torch.tensor([height - size, width - size])
    window = torch.arange(size, device=images.device)

    def loss(network: _Contours, _: int) -> Tensor:
        pick = near[torch.randint(len(near), (BATCH,), generator=generator)]
        pick[:, 1:] = (pick[:, 1:] - size // 2).clamp_min(0).minimum(limits)
        k, y, x = pick.to(images.device)[:, :, None, None].unbind(1)
        patch = _flipped(everything[k, y + window[:, None], x + window], generator).permute(0, 3, 1, 2)
        moved, still, seen, truth = patch.split([1, 1, channels, 1], 1)
        logits = 4 * (moved + network(moved, still, seen))
        return F.binary_cross_entropy_with_logits(logits, truth)

    shapes = [(BATCH, c, size, size) for c in (1, 1, channels)]
    return _trained(lambda: _Contours(channels), loss, shapes, MASK_TRAINING, images.device, generator)


# ---- in between ------------------------------------------------------------------------------------------------------


class InBetween:
    """What lies between the frames of a sequence, computed once (minutes on two cores for 70 frames of 200 x 200, much
    less on a GPU), then looked up at any time.

    frames: (K, C, H, W) in [0, 1], K >= 2, evenly spaced; on the device where everything is computed and kept.
    masks: (K, 1, H, W) of the same frames, inside where >= 0.5.
    gap: how many pixels apart two neighbouring frames are, where that is known; otherwise the frames tell how far apart
        they look.
    seed: of the small networks' training.

    flow: (K - 1, 2, H, W), the motion from frame k to k + 1 in pixels (x, y), as seen in the middle of the two.
    """

    flow: Tensor

    def __init__(
        self, frames: Tensor, masks: Tensor | None = None, gap: float | None = None, seed: int = 0
    ) -> None:
        if frames.ndim != 4 or len(frames) < 2:
            raise ValueError(f"frames of shape {tuple(frames.shape)}: (K, C, H, W) with K >= 2 is needed")
        if masks is not None and masks.shape != (len(frames), 1, *frames.shape[2:]):
            raise ValueError(
                f"masks of shape {tuple(masks.shape)} do not belong to frames of {tuple(frames.shape)}"
            )
        self.seed = seed
        generator = torch.Generator().manual_seed(seed)
        frames = frames.float()
        with torch.no_grad():
            self._build(frames, masks, gap, generator)

    def _build(
        self, frames: Tensor, masks: Tensor | None, gap: float | None, generator: torch.Generator
    ) -> None:
        count = len(frames)
        self.gap = matching_gap(frames) if gap is None else gap
        paths = _paths(frames)
        self.flow = torch.stack([path.flow for path in paths]).mean(0)
        stack = frames.new_zeros((count - 1) * STEPS + 1, *frames.shape[1:])
        stack[::STEPS] = frames
        for s in range(1, STEPS):
            stack[s::STEPS] = _blend_paths(frames[:-1], frames[1:], paths, s / STEPS)
        pixels = max(2, round(self.gap))
        if pixels <= WIDEST_GAP and (min(frames.shape[2:]) - 1) // pixels + 1 >= FEWEST_ROWS:
            planes = frames.transpose(0, 1)  # channel by channel
            network = _learn_rows(planes.reshape(-1, *frames.shape[2:]), pixels, generator)
            if network is not None:
                filled = torch.stack([_fill_stack(network, plane) for plane in planes], 2)
                for s in range(1, STEPS):
                    linear = torch.lerp(frames[:-1], frames[1:], s / STEPS)
                    mixture = torch.lerp(stack[s::STEPS], filled[:, s - 1], SHARE)
                    stack[s::STEPS] = torch.lerp(linear, mixture, 1 + EXCESS)
        self._images = stack.clamp_(0, 1).half()
        self._distances = None if masks is None else self._carry_masks(frames, masks, paths, generator)

    def _carry_masks(
        self, frames: Tensor, masks: Tensor, paths: list[_Paths], generator: torch.Generator
    ) -> Tensor:
        """Signed distances at all levels, ((K - 1) STEPS + 1, 1, H, W), half precision."""
        distances = signed_distances(masks, self.gap)
        network = None
        if len(frames) > 2:  # learn on each frame that lies between two others
            before, after = distances[:-2], distances[2:]
            network = _learn_contours(
                _blend_paths(before, after, _paths(frames, 2), 0.5),
                (before + after) / 2,
                frames[1:-1],
                (masks[1:-1] >= 0.5).float(),
                generator,
            )
        levels = distances.new_zeros(len(self._images), 1, *distances.shape[2:])
        levels[::STEPS] = distances
        for s in range(1, STEPS):
            alpha = s / STEPS
            moved = _blend_paths(distances[:-1], distances[1:], paths, alpha)
            still = torch.lerp(distances[:-1], distances[1:], alpha)
            if network is not None:
                moved = moved + TRUST * network(moved, still, self._images[s::STEPS].float())
            levels[s::STEPS] = moved
        return levels.clamp_(-FARTHEST, FARTHEST).half()

    def save(self, path: Path, frames: Tensor, masks: Tensor | None) -> None:
        """Keeps what was computed of ``frames`` and ``masks``, for `load`."""
        contents = {
            "key": _digest(frames, masks, self.seed),
            "gap": self.gap,
            "flow": self.flow.cpu(),
            "images": self._images.cpu(),
            "distances": None if self._distances is None else self._distances.cpu(),
        }
        with atomic_write(path, sync=False) as temporary:
            torch.save(contents, temporary)

    @classmethod
    def load(
        cls, path: Path, frames: Tensor, masks: Tensor | None = None, gap: float | None = None, seed: int = 0
    ) -> InBetween | None:
        """What `save` kept of the same frames, masks, gap and seed; None where there is no such thing."""
        try:
            contents = torch.load(path, map_location=frames.device, weights_only=True)
            same = contents["key"] == _digest(frames, masks, seed) and gap in (None, contents["gap"])
            kept = [contents[name] for name in ("gap", "flow", "images", "distances")]
        except (OSError, RuntimeError, pickle.UnpicklingError, KeyError, TypeError, EOFError):
            return None  # absent or torn: it can be computed again
        if not same:
            return None
        made = cls.__new__(cls)
        made.gap, made.flow, made._images, made._distances = kept
        made.seed = seed
        return made

    def images(self, k: Tensor, alpha: Tensor) -> Tensor:
        """Images at alpha of the way from frame k to k + 1, (B, C, H, W) in [0, 1]; k: (B,) integers in [0, K - 2],
        alpha: (B,) in [0, 1], both on the frames' device. Never waits for the device; shapes depend on B alone."""
        return self._look_up(self._images, k, alpha)

    def masks(self, k: Tensor, alpha: Tensor) -> Tensor:
        """Masks at those times, (B, 1, H, W) in [0, 1], with an edge of one pixel. As `images`."""
        if self._distances is None:
            raise ValueError("masks in between: none were given")
        return (self._look_up(self._distances, k, alpha) + 0.5).clamp(0, 1)

    def _look_up(self, levels: Tensor, k: Tensor, alpha: Tensor) -> Tensor:
        step = (alpha * STEPS).floor().clamp(0, STEPS - 1)
        index = k * STEPS + step.long()
        seen = flow_at(self.flow[k], alpha) / STEPS
        return blend_along(levels[index].float(), levels[index + 1].float(), seen, alpha * STEPS - step)


def _digest(frames: Tensor, masks: Tensor | None, seed: int) -> str:
    digest = hashlib.blake2b(f"{_PREDICTION} {seed}".encode(), digest_size=16)
    for values in (frames, masks):
        if values is not None:
            digest.update(str(tuple(values.shape)).encode())
            digest.update(values.float().cpu().contiguous().numpy().data)
    return digest.hexdigest()
