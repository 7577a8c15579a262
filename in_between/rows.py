"""Self super-resolution (after Zhao et al., SMORE, 2021): missing frames of a stack, filled in like its rows.

Tissue looks alike along all axes, so a small network that learns to fill in left-out rows of the frames also fills in
the frames left out of the stack, seen from the side.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from in_between.networks import convolutions, corners_of, pixels_of, trained
from in_between.progress import Done, unheard
from in_between.settings import STEPS, RowSettings

START = Path(__file__).with_name("rows.npz")
"""Where the network starts: it has learned to fill in rows of photographs (`benchmarks/pretrain_rows.py`)."""


def matching_gap(frames: Tensor) -> float:
    """The spacing in pixels at which rows and columns predict what is between them as badly as frames (K, C, H, W) do.

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


def levels_of(thick: bool) -> range:
    """Where rows are made, in parts of STEPS of a gap."""
    return range(STEPS + 1) if thick else range(1, STEPS)


class RowsBetween(nn.Module):
    """Fills in rows: images (B, 1, R, W) of every gap-th row -> (B, levels, R - 1, W), those in between.

    thick: rows are means over a slice's thickness, and those made are thin: at 0, 1/STEPS, ... 1 of each gap, as a
    thick row is no answer at its own place. Otherwise they are made at 1/STEPS, ... alone.
    """

    def __init__(self, settings: RowSettings, start: Path | None = START, thick: bool = False) -> None:
        """start: a file of weights for these settings; None: random weights."""
        super().__init__()
        self.gain, width, self.thick = settings.gain, settings.network.width, thick
        last = nn.Conv2d(width, len(levels_of(thick)), (2, 3), padding=(0, 1))
        self.layers = convolutions(1, settings.network, last)
        if start is not None:
            with np.load(start) as file:
                weights = {name: torch.from_numpy(file[name]).float() for name in file.files}
            if thick:  # those at the rows themselves start from the linear blend
                for name in list(weights)[-2:]:
                    ends = weights[name].new_zeros(1, *weights[name].shape[1:])
                    weights[name] = torch.cat([ends, weights[name], ends])
            self.load_state_dict(weights)

    def forward(self, rows: Tensor) -> Tensor:
        levels = levels_of(self.thick)
        steps = torch.arange(levels.start, levels.stop, device=rows.device).view(1, -1, 1, 1) / STEPS
        linear = (1 - steps) * rows[:, :, :-1] + steps * rows[:, :, 1:]
        return linear + self.layers(self.gain * (rows - 0.3)) / self.gain


def learn_rows(
    frames: Tensor,
    gap: int,
    settings: RowSettings,
    generator: torch.Generator,
    done: Done = unheard,
    thickness: float = 0.0,
) -> RowsBetween | None:
    """Trains on rows and columns of `frames` (N, H, W), of which every gap-th is seen; None where all is empty.

    thickness: pixels; the rows seen are means over this, as slices are over theirs, and those learned are thin.
    """
    thick = thickness > 1
    margin = math.ceil((thickness - 1) / 2) if thick else 0  # of a patch, for the means at its ends
    height, width = frames.shape[1:]
    batch = settings.network.batch
    side = min(height, width)
    count = min(settings.rows, (side - 1 - 2 * margin) // gap + 1)
    extent, columns = (count - 1) * gap + 1 + 2 * margin, min(settings.columns, side)
    sources = []  # of upright and of turned patches: first pixels in the flattened frames, and the strides
    for images, strides in ((frames, (width, 1)), (frames.transpose(1, 2), (1, width))):
        mean = F.avg_pool2d(images[:, None], (extent, columns), 1)
        variance = F.avg_pool2d(images[:, None] ** 2, (extent, columns), 1) - mean**2
        corners = (
            (variance[:, 0] > settings.least_variance).nonzero().cpu()
        )  # empty background teaches nothing
        if not len(corners):
            return None
        k, down, across = corners.unbind(1)
        sources.append((k * height * width + down * strides[0] + across * strides[1], strides))
    matrix = between_matrix(count, gap, thick, margin).to(frames)
    means = profile_matrix(count, gap, thickness, margin).to(frames)
    flat = frames.flatten()
    down, across = torch.arange(extent, device=frames.device), torch.arange(columns, device=frames.device)

    def draw(i: int) -> Tensor:
        first, strides = sources[i % 2]
        chosen = first[torch.randint(len(first), (batch,), generator=generator)]
        return corners_of(chosen, (extent, columns), strides, generator)

    def loss(network: RowsBetween, drawn: Tensor) -> Tensor:
        patch = flat[pixels_of(drawn, down, across)]  # (B, extent, columns)
        truth = torch.einsum("srl,blw->bsrw", matrix, patch)
        seen = torch.einsum("rl,blw->brw", means, patch) if thick else patch[:, ::gap]
        return 1000 * (network(seen[:, None]) - truth).square().mean()

    return trained(
        lambda: RowsBetween(settings, thick=thick),
        draw,
        loss,
        settings.network,
        frames.device,
        generator,
        done,
    )


def profile_matrix(count: int, gap: int, thickness: float, margin: int) -> Tensor:
    """(count, L): weights on L rows that give every gap-th, from that at ``margin`` on, as the mean over ``thickness``
    pixels around it: a rectangular slice profile."""
    rows = np.arange((count - 1) * gap + 1 + 2 * margin)
    distance = np.abs(rows - margin - gap * np.arange(count)[:, None])
    shares = np.clip(thickness / 2 + 0.5 - distance, 0, 1) if thickness > 1 else distance == 0
    return torch.from_numpy(shares / shares.sum(1, keepdims=True))


def between_matrix(count: int, gap: int, thick: bool = False, margin: int = 0) -> Tensor:
    """(levels, count - 1, L): weights on L rows that give those at each level (`levels_of`) of each gap, by a cubic
    where that is between two rows. The first row seen is that at ``margin``."""
    length = (count - 1) * gap + 1 + 2 * margin
    levels = levels_of(thick)
    matrix = np.zeros((len(levels), count - 1, length))
    for number, s in enumerate(levels):
        for r in range(count - 1):
            at = (r + s / STEPS) * gap + margin
            base = math.floor(at)
            t = at - base
            cubic = (
                t * (-0.5 + t * (1 - 0.5 * t)),
                1 + t * t * (-2.5 + 1.5 * t),
                t * (0.5 + t * (2 - 1.5 * t)),
                t * t * (-0.5 + 0.5 * t),
            )
            for offset, weight in zip((-1, 0, 1, 2), cubic, strict=True):
                matrix[number, r, min(max(base + offset, 0), length - 1)] += weight
    return torch.from_numpy(matrix)


def fill_stack(network: RowsBetween, frames: Tensor, settings: RowSettings, done: Done = unheard) -> Tensor:
    """The stack (K, H, W) filled in, (K - 1, levels, H, W): the mean over it and its mirror images.

    On a GPU the network computes in half precision, whose 11 bits are those of the tensor cores' float32 (TF32).
    """
    if frames.is_cuda:
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    passes = 1 + len(settings.mirrors)
    filled = _fill_cuts(network, frames)
    for number, axes in enumerate(settings.mirrors):
        done((number + 1) / passes)
        mirrored = _fill_cuts(network, frames.flip(axes))
        later = (0, 1) if 0 in axes else ()
        filled = filled + mirrored.flip([*later, *(axis + 1 for axis in axes if axis)])
    done(1.0)
    return filled / passes


def joined(filled: Tensor, frames: Tensor) -> Tensor:
    """What `fill_stack` makes of frames (K, H, W), as one stack ((K - 1) STEPS + 1, H, W). At the frames' places: the
    frames, or what was made there from the gaps before and after."""
    stack = frames.new_empty((len(frames) - 1) * STEPS + 1, *frames.shape[1:])
    if filled.shape[1] == STEPS - 1:
        stack[::STEPS] = frames
        for s in range(1, STEPS):
            stack[s::STEPS] = filled[:, s - 1]
        return stack
    for s in range(STEPS + 1):
        stack[s : len(stack) - STEPS + s : STEPS] = filled[:, s]
    stack[STEPS:-1:STEPS] = (filled[:-1, -1] + filled[1:, 0]) / 2
    return stack


def _fill_cuts(network: RowsBetween, frames: Tensor, chunk: int = 32) -> Tensor:
    """As `fill_stack`, of the stack as it is: mean of its cuts along x and along y."""
    k, height, width = frames.shape
    total = frames.new_zeros(k - 1, len(levels_of(network.thick)), height, width)
    with torch.autocast(frames.device.type, torch.float16, enabled=frames.is_cuda):
        for first in range(0, height, chunk):  # cuts along x: (rows of the cut: frames, columns: x)
            cuts = frames[:, first : first + chunk].transpose(0, 1)[:, None]
            total[:, :, first : first + chunk] += network(cuts).permute(2, 1, 0, 3)
        for first in range(0, width, chunk):
            cuts = frames[:, :, first : first + chunk].permute(2, 0, 1)[:, None]
            total[..., first : first + chunk] += network(cuts).permute(2, 1, 3, 0)
    return total / 2
