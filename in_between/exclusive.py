"""Several labels at once: of fields, one per label and one for the background, the two largest at each pixel.

Whatever the fields are made of (signed distances, shares), the largest one's label is the pixel's: no gaps, no overlap.
They are compared one after another, so that memory does not grow with the number of labels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from in_between.classical import interpolate, signed_distances


@dataclass(frozen=True)
class Ranked:
    """Which labels lead, tensors of one shape. Labels are indices (`patient.label_channels`), 0 the background."""

    first: Tensor
    """The label with the largest field: uint8, or int16 where there are more than 255."""
    second: Tensor
    """That with the second largest."""
    lead: Tensor
    """Half the difference between the two, at least 0, float16. Of signed distances: pixels to where they meet."""

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.first, self.second, self.lead

    def __getitem__(self, at: Tensor) -> Ranked:
        return Ranked(self.first[at], self.second[at], self.lead[at])

    def channels(self, count: int) -> Tensor:
        """Shares of ``count`` labels, (B, 1, H, W) -> (B, K, H, W) in [0, 1]: the two that lead share a pixel that
        their border runs through; borders are one pixel wide."""
        labels = torch.arange(1, count + 1, dtype=self.first.dtype, device=self.first.device).view(
            1, -1, 1, 1
        )
        share = (self.lead.float() + 0.5).clamp_max(1)
        return torch.where(self.first == labels, share, 0.0) + torch.where(
            self.second == labels, 1 - share, 0.0
        )


def ranked(fields: Iterable[tuple[int, Tensor]], count: int) -> Ranked:
    """Of (index, field) pairs, two or more, with fields of one shape. Of equal fields the one that comes first leads.
    count: of labels."""
    kind = torch.uint8 if count <= 255 else torch.int16
    best: Tensor | None = None
    for index, field in fields:
        if best is None:
            best, next_best = field.clone(), torch.full_like(field, -torch.inf)
            first = torch.full(field.shape, index, dtype=kind, device=field.device)
            second = first.clone()
            continue
        leads, follows = field > best, field > next_best
        second = torch.where(leads, first, torch.where(follows, index, second)).to(kind)
        next_best = torch.where(leads, best, torch.where(follows, field, next_best))
        first = torch.where(leads, index, first).to(kind)
        best = torch.where(leads, field, best)
    assert best is not None
    return Ranked(first, second, ((best - next_best) / 2).half())


Map = TypeVar("Map", np.ndarray, Tensor)


def masks_of(index: Map, count: int) -> Iterator[tuple[int, Map]]:
    """Each label of a label map and its mask, bool, the background last: where fields are equal, labels lead."""
    for number in (*range(1, count + 1), 0):
        yield number, index == number


def interpolate_labels(
    index: np.ndarray,
    positions: np.ndarray,
    at: np.ndarray,
    count: int,
    spacing: tuple[float, float] = (1.0, 1.0),
    method: str = "sdf",
) -> np.ndarray:
    """A label map ``index`` (K, H, W) at ``positions`` (K,), interpolated at ``at`` (M,) between them: (M, H, W).

    method: "sdf" and "cubic sdf", signed distances of each label and of the background, linearly or by splines, or
    "linear", their shares. The largest one's label is taken. spacing: of rows and columns, in any unit.
    """
    gap = float(np.mean(np.diff(positions)))
    how = "cubic" if method.startswith("cubic") else "linear"

    def fields() -> Iterator[tuple[int, Tensor]]:
        for number, mask in masks_of(index, count):
            values = (
                signed_distances(mask, spacing, gap, background=number == 0)
                if method.endswith("sdf")
                else mask.astype(np.float32)
            )
            yield number, torch.from_numpy(interpolate(values, positions, at, how))

    return ranked(fields(), count).first.numpy()
