"""Masks on some frames only: carried to all others along the images' own motion."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from in_between.contours import distances_of
from in_between.exclusive import masks_of, ranked
from in_between.flow import carry, find_paths, flow_at
from in_between.progress import Done, unheard
from in_between.settings import DEFAULT, Settings


@torch.no_grad()
def dense_distances(
    frames: Tensor,
    masks: Tensor,
    painted: Sequence[int],
    gap: float = 1.0,
    settings: Settings = DEFAULT,
    done: Done = unheard,
) -> Tensor:
    """Signed distances of masks at all frames, from masks on some of them, (K, 1, H, W) in pixels, inside above 0.

    frames: (K, C, H, W) in [0, 1], evenly spaced. masks: (M, 1, H, W) of the frames ``painted``, increasing, inside
    where >= 0.5. gap: pixels from a frame to the next.

    Each frame between two painted ones takes both their masks, carried along the motion from frame to frame. Its weight
    falls with its distance, and where the path forward and backward does not return to its start: there, the motion
    is unknown, and the mask is taken from the same pixel. Before the first painted frame and after the last
    there is only one mask. Raises ValueError where masks and ``painted`` do not fit.
    """
    _check(frames, masks, painted)
    return _distances(masks, painted, _Steps.of(frames, settings, done), gap)


@torch.no_grad()
def dense_labels(
    frames: Tensor,
    index: Tensor,
    count: int,
    painted: Sequence[int],
    gap: float = 1.0,
    settings: Settings = DEFAULT,
    done: Done = unheard,
) -> Tensor:
    """The same for label maps: indices of all frames, (K, 1, H, W), from those of some, (M, 1, H, W), 0 the background.
    count: of labels. Distances of each label and of the background are carried, and the largest decides."""
    _check(frames, index, painted)
    steps = _Steps.of(frames, settings, done)
    fields = (
        (number, _distances(inside.float(), painted, steps, gap, background=number == 0))
        for number, inside in masks_of(index, count)
    )
    return ranked(fields, count).first


def _check(frames: Tensor, masks: Tensor, painted: Sequence[int]) -> None:
    if len(masks) != len(painted) or not painted or list(painted) != sorted(set(painted)):
        raise ValueError(
            f"{len(masks)} masks of the frames {list(painted)}: one per frame is needed, in order"
        )
    if painted[0] < 0 or painted[-1] >= len(frames):
        raise ValueError(f"frames {painted[0]} to {painted[-1]} are painted, of {len(frames)}")


def _distances(
    masks: Tensor, painted: Sequence[int], steps: _Steps, gap: float, background: bool = False
) -> Tensor:
    distances = distances_of(masks, gap * (painted[-1] - painted[0]) / max(len(painted) - 1, 1), background)
    out = distances.new_zeros(steps.frames, *distances.shape[1:])
    for number, frame in enumerate(painted):
        out[frame] = distances[number]
    for k in range(painted[0]):
        out[k] = steps.carried(distances[0], painted[0], k)[0]
    for k in range(painted[-1] + 1, steps.frames):
        out[k] = steps.carried(distances[-1], painted[-1], k)[0]
    for number, (first, last) in enumerate(pairwise(painted)):
        for k in range(first + 1, last):
            t = (k - first) / (last - first)
            before, trust_before = steps.carried(distances[number], first, k)
            after, trust_after = steps.carried(distances[number + 1], last, k)
            weights = (1 - t) * trust_before, t * trust_after
            moved = (weights[0] * before + weights[1] * after) / (weights[0] + weights[1])
            still = torch.lerp(distances[number], distances[number + 1], t)
            out[k] = torch.lerp(still, moved, (1 - t) * trust_before + t * trust_after)
    return out


class _Steps:
    """The motion from each frame to its neighbours, as seen from it."""

    def __init__(self, onwards: Tensor, back: Tensor) -> None:
        """onwards: (K - 1, 2, H, W), from frame k to k + 1, seen from k. back: from k + 1 to k, seen from k + 1."""
        self.onwards, self.back = onwards, back
        self._ways: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    @classmethod
    def of(cls, frames: Tensor, settings: Settings, done: Done) -> _Steps:
        """Those of the images (K, C, H, W)."""
        paths = find_paths(frames, settings.flow, done=done)
        flow = torch.stack([path.flow for path in paths]).mean(0)
        at = flow.new_zeros(len(flow))
        return cls(flow_at(flow, at), -flow_at(flow, at + 1))

    @property
    def frames(self) -> int:
        return len(self.onwards) + 1

    def way(self, start: int, end: int) -> Tensor:
        """How far what is seen at frame ``start`` has moved at frame ``end``, (1, 2, H, W)."""
        moved = torch.zeros_like(self.onwards[:1])
        if end > start:
            for k in range(start, end):
                moved = moved + carry(self.onwards[k : k + 1], moved, "bilinear")
        else:
            for k in range(start - 1, end - 1, -1):
                moved = moved + carry(self.back[k : k + 1], moved, "bilinear")
        return moved

    def carried(self, distances: Tensor, source: int, k: int) -> tuple[Tensor, Tensor]:
        """The distances (1, H, W) of frame ``source`` as they are at frame k, and the trust in them, in (0, 1]."""
        if (k, source) not in self._ways:
            there = self.way(k, source)
            again = there + carry(self.way(source, k), there, "bilinear")
            error = again.square().sum(1)  # (1, H, W) in px^2
            self._ways[k, source] = there, 1 / (1 + error)
        there, trust = self._ways[k, source]
        return carry(distances[None], there, "bilinear")[0], trust
