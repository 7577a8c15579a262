"""Gaussians taken from the frames: most of them where there is most to see, each with its pixel's colour.

A random start spends its first thousand iterations on what the frames show plainly. The numbers below were chosen on
held-out frames (benchmarks/NOTES.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from scipy.ndimage import gaussian_gradient_magnitude
from torch import Tensor

from arguments import ModelOptions
from scene.cameras import Camera
from scene.frames import Frames
from scene.gaussian_model import GaussianModel
from scene.parameters import IMAGE, SEGMENTATION, head_parameters
from utils.spherical_harmonics import C0
from utils.threads import spare_processors

EDGE_BLUR = 1.0
"""Pixels: how far from an edge its gradient attracts Gaussians."""
FLOOR = 0.1
"""Share of Gaussians spread evenly, relative to the share that follows the frames' gradient."""
CONTOURS = 0.3
"""Share of Gaussians that follow the contours of masks beside images, likewise."""
SCALE = 0.4
"""Scale of a Gaussian over the distance to its neighbours in the frame."""
SPREAD = 1.0
"""Spread in time, in gaps between frames."""
OPACITY = 0.7
_LEAST_TIME = 1e-4  # the logit of 0, where the first frame sits, is not finite


@torch.no_grad()
def image_start(
    options: ModelOptions,
    camera: Camera,
    sequences: Sequence[Frames],
    background: Tensor,
    generator: torch.Generator,
    device: torch.device | str = "cpu",
    durations: Sequence[float] | None = None,
) -> GaussianModel:
    """N = ``options.num_pts`` Gaussians at pixels drawn in proportion to the frames' gradient there plus a floor.

    sequences: the K frames, or the frames and their masks: then the model has a segmentation head, and contours
        attract Gaussians too. Each may be a label map if it is the last one.
    background: (C,) in [0, 1], behind transparent frames. durations: (K,) of the frames, as in `GaussianModel.random`.

    Nothing moves (w1 = 0), colours are those of the pixels. All is drawn on the CPU, so that a seed means the same
    model everywhere.
    """
    first, n = sequences[0], options.num_pts
    model = GaussianModel.random(
        options, camera, len(first), len(background), generator, device, durations, first.labels, spaced=False
    )
    if len(sequences) > 1:
        model.add_segmentation_head(sequences[1].labels)
    heads = (IMAGE, SEGMENTATION)[: len(sequences)]

    interest = _interest(sequences, background)  # (K, H, W)
    totals = interest.sum((1, 2), dtype=np.float64)  # (K,)
    ends = totals.cumsum()
    share = (torch.arange(n) + torch.rand(n, generator=generator)).double().numpy() / n  # (N,), ascending
    drawn = share * ends[-1]
    frame = np.searchsorted(ends[:-1], drawn, side="right")  # (N,)
    pixel = np.empty(n, np.int64)
    values = {head: torch.empty(n, model.channels_of(head)) for head in heads}
    for k in range(len(first)):
        here = frame == k
        within = interest[k].ravel().cumsum(dtype=np.float64)
        pixel[here] = np.searchsorted(within, drawn[here] - (ends[k] - totals[k])).clip(0, len(within) - 1)
        for head, frames in zip(heads, sequences, strict=True):
            image = _shown(frames, k, background).expand(model.channels_of(head), -1, -1)
            values[head][here] = image.flatten(1).T[pixel[here]]

    # Gaussians are drawn in index order, the first in front: the scan's order must not decide which one that is.
    order = torch.randperm(n, generator=generator)
    density = n * interest[frame, pixel // first.width, pixel % first.width] / ends[-1]  # Gaussians per pixel
    spacing = torch.from_numpy(density**-0.5)[order]  # px
    at = torch.from_numpy(np.stack([pixel % first.width, pixel // first.width], 1))[
        order
    ]  # (N, 2): column, row
    at = at + torch.rand(n, 2, generator=generator) - 0.5
    when = torch.from_numpy(frame)[order]

    p, unit = model.params, camera.pixels_per_unit
    starts = model.times([float(k) for k in range(len(first))]).cpu()  # (K,)
    gaps = model.durations().cpu()  # (K,)
    if model.uses_dff:
        gaps[-1] = gaps[-2]
    new = {
        "xyz": torch.stack(
            [
                (at[:, 0] - (camera.width - 1) / 2) / unit,
                torch.zeros(n),
                ((camera.height - 1) / 2 - at[:, 1]) / unit,
            ],
            1,
        ),
        "w1": torch.zeros(p["w1"].shape),
        "m": torch.logit(starts[when], eps=_LEAST_TIME)[:, None],
        "sigma": torch.log(SPREAD * gaps[when])[:, None, None],
        "scaling": torch.log(SCALE * spacing / unit)[:, None].expand(-1, 3),
    }
    for head in heads:
        names = head_parameters(head)
        new[names.colour] = ((values[head][order] - 0.5) / C0)[:, None]
        new[names.opacity] = torch.full((n, 1), math.log(OPACITY / (1 - OPACITY)))
    for name, value in new.items():
        p[name].copy_(value)
    return model


def _interest(sequences: Sequence[Frames], background: Tensor) -> np.ndarray:
    """How many Gaussians pixels should have, up to a factor, (K, H, W) float32."""
    first = sequences[0]
    total = np.full((len(first), first.height, first.width), FLOOR, np.float32)
    for frames, share in zip(sequences, (1.0, CONTOURS), strict=False):
        with ThreadPoolExecutor(spare_processors()) as threads:  # the filter releases the interpreter lock
            edges = np.stack(list(threads.map(lambda k: _edges(frames, k, background), range(len(frames)))))  # noqa: B023
        mean = float(edges.mean(dtype=np.float64))
        if mean > 0:
            edges *= share / mean
            total += edges
    return total


def _edges(frames: Frames, k: int, background: Tensor) -> np.ndarray:
    """Gradient of frame k, (H, W); of a label map the sum over the labels, so that all their contours count."""
    if frames.labels is None:
        grey = _shown(frames, k, background).mean(0).numpy()
        return gaussian_gradient_magnitude(grey, EDGE_BLUR, mode="nearest")
    index = frames.levels[k, 0].cpu().numpy()
    total = np.zeros(index.shape, np.float32)
    for number in np.unique(index[index > 0]):
        total += gaussian_gradient_magnitude((index == number).astype(np.float32), EDGE_BLUR, mode="nearest")
    return total


def _shown(frames: Frames, k: int, background: Tensor) -> Tensor:
    """Frame k as the losses see it, (C, H, W) in [0, 1], on the CPU."""
    return frames([k], background=background.to(frames.device))[0].cpu()
