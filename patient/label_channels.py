"""A label map as channels, one per label of a table, and back: what a model of labels is taught, and what it draws.

K channels hold each label's share of a pixel, 0 to 1; what they leave of 1 is the background's. An *index* counts
labels in the order of their table: 0 is the background, i + 1 the table's label i. An *id* is the number in the user's
files.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from patient.labels import LabelTable

BACKGROUND = (0, 0, 0)
"""Red, green, blue of what is no label, in pictures of label maps."""


def one_hot(index: Tensor, count: int) -> Tensor:
    """Indices (B, 1, H, W) of any whole type -> the channels of ``count`` labels, (B, K, H, W) float32 of 0 and 1."""
    labels = torch.arange(1, count + 1, dtype=index.dtype, device=index.device).view(1, -1, 1, 1)
    return (index == labels).float()


def with_background(channels: Tensor) -> Tensor:
    """Channels (..., K, H, W) with the background's in front, (..., K + 1, H, W): 1 minus their sum, at least 0."""
    rest = (1 - channels.sum(-3, keepdim=True)).clamp_min(0)
    return torch.cat([rest, channels], -3)


def index_of(channels: Tensor) -> Tensor:
    """The index with the largest share, (..., K, H, W) -> (..., H, W) int64; of equal ones a label, then the first.

    Of one channel, labelled is where it is 0.5 or more, as of a mask.
    """
    share, index = channels.max(-3)
    return torch.where(share >= 1 - channels.sum(-3), index + 1, 0)


def ids_of(channels: Tensor, table: LabelTable) -> Tensor:
    """The id with the largest share, (..., K, H, W) -> (..., H, W) int32, 0 for the background."""
    return _ids(table, channels.device)[index_of(channels)]


def index_of_ids(ids: Tensor, table: LabelTable) -> Tensor:
    """Indices (int64) of ids of any shape; what the table lacks is background."""
    known = _ids(table, ids.device)
    at = torch.searchsorted(known, ids.to(known.dtype).contiguous()).clamp_max(len(table))
    return torch.where(known[at] == ids, at, 0)


def colours_of(channels: Tensor, table: LabelTable) -> Tensor:
    """A picture of the shares, each label in its colour: (..., K, H, W) -> (..., 3, H, W) in [0, 1]."""
    shares = with_background(channels.clamp(0, 1))
    shares = shares / shares.sum(-3, keepdim=True)
    return torch.einsum("...khw,kc->...chw", shares, _palette(table, channels.device).to(channels.dtype))


def colours_of_index(index: Tensor, table: LabelTable) -> Tensor:
    """A picture of a label map, given indices: (..., H, W) -> (..., 3, H, W) in [0, 1]."""
    return _palette(table, index.device)[index.long()].movedim(-1, -3)


@functools.lru_cache(maxsize=8)
def _ids(table: LabelTable, device: torch.device) -> Tensor:
    """(K + 1,) int32, increasing: by index, the background's first."""
    return torch.tensor([0, *table.ids], dtype=torch.int32, device=device)


@functools.lru_cache(maxsize=8)
def _palette(table: LabelTable, device: torch.device) -> Tensor:
    """(K + 1, 3) in [0, 1], by index."""
    return torch.tensor([BACKGROUND, *(label.colour for label in table)], device=device) / 255
