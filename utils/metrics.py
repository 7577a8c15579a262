"""Scores of images against frames."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from utils.losses import SSIM_C1, SSIM_C2

MIN_MSE = 1e-10
"""Floor of the mean squared error: empty masks are frequent, and rendered exactly. 100 dB."""

_SSIM_WINDOW = 7  # px


def psnr(images: Tensor, targets: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each image, (B, C, H, W) in [0, 1] each -> (B,)."""
    mse = (images.clamp(0, 1) - targets).square().flatten(1).mean(1)
    return -10 * mse.clamp_min(MIN_MSE).log10()


def ssim(images: Tensor, targets: Tensor) -> list[float]:
    """Structural similarity of each image, (B, C, H, W) in [0, 1] each, with scikit-image's defaults: windows of
    7 x 7 pixels, evenly weighted, that lie inside the frame; the mean over channels.

    Evaluations report this figure. The loss has a different one: 11 x 11 pixels, Gaussian weights, zero padding.
    Computed where the images are, in double precision, as differences of squares need it.
    """
    side = min(images.shape[-2:])
    window = min(_SSIM_WINDOW, side - 1 + side % 2)  # odd, and no larger than the frame
    x, y = images.clamp(0, 1).double(), targets.double()
    stacked = torch.cat([x, y, x * x, y * y, x * y])  # (5 B, C, H, W)
    means = avg_pool2d(avg_pool2d(stacked, (window, 1), 1), (1, window), 1)
    mean_x, mean_y, xx, yy, xy = means.chunk(5)
    sample = window**2 / max(window**2 - 1, 1)  # of variances, by n - 1
    variances = sample * (xx - mean_x**2 + yy - mean_y**2)
    covariance = sample * (xy - mean_x * mean_y)
    similarity = ((2 * mean_x * mean_y + SSIM_C1) * (2 * covariance + SSIM_C2)) / (
        (mean_x**2 + mean_y**2 + SSIM_C1) * (variances + SSIM_C2)
    )
    return similarity.flatten(1).mean(1).tolist()


@dataclass(frozen=True)
class Scores:
    """Scores of a sequence, one entry per frame; ``a + b`` concatenates two sequences."""

    l1: list[float] = field(default_factory=list)
    psnr: list[float] = field(default_factory=list)  # dB
    ssim: list[float] = field(default_factory=list)
    overlaps: list[int] = field(default_factory=list)
    """Pixels inside both masks: where the mean of the channels is 0.5 or more."""
    sizes: list[int] = field(default_factory=list)
    """Pixels inside one mask, plus pixels inside the other."""

    @classmethod
    def of(cls, images: Tensor, targets: Tensor) -> Scores:
        """Of each image, (B, C, H, W) in [0, 1] each."""
        predicted, truth = images.mean(1) >= 0.5, targets.mean(1) >= 0.5
        return cls(
            (images - targets).abs().flatten(1).mean(1).tolist(),
            psnr(images, targets).tolist(),
            ssim(images, targets),
            (predicted & truth).flatten(1).sum(1).tolist(),
            (predicted.flatten(1).sum(1) + truth.flatten(1).sum(1)).tolist(),
        )

    def __add__(self, other: Scores) -> Scores:
        return type(self)(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    def __len__(self) -> int:
        return len(self.psnr)

    @property
    def mean_l1(self) -> float:
        return float(np.mean(self.l1))

    @property
    def mean_psnr(self) -> float:
        return float(np.mean(self.psnr))

    @property
    def mean_ssim(self) -> float:
        return float(np.mean(self.ssim))

    @property
    def dice(self) -> float:
        """Pooled over all frames, as of one volume; NaN, undefined, where both are empty."""
        return _dice(sum(self.overlaps), sum(self.sizes))

    @property
    def iou(self) -> float:
        """Intersection over union (Jaccard), pooled as `dice`."""
        overlap, size = sum(self.overlaps), sum(self.sizes)
        return overlap / (size - overlap) if size else math.nan

    @property
    def frame_dice(self) -> list[float]:
        """Of each frame; NaN where both are empty."""
        return [_dice(*counts) for counts in zip(self.overlaps, self.sizes, strict=True)]


@dataclass(frozen=True)
class LabelScores(Scores):
    """Scores of a sequence of label maps. `l1` is the share of a frame's pixels that is labelled wrongly, `psnr` that
    of the labels' channels, `ssim` undefined; a Dice is the mean over the labels, without the background."""

    by_label: list[np.ndarray] = field(default_factory=list)
    """(K, 2) int64 of each frame: pixels with the label in both, and in one plus in the other."""

    @classmethod
    def of_labels(
        cls, index: Tensor, truth: Tensor, count: int, decibels: Tensor | None = None
    ) -> LabelScores:
        """Of label maps (B, H, W), indices with 0 for the background and ``count`` labels. decibels: (B,) `psnr` of the
        channels that ``index`` was taken from, if it was taken from any."""
        wrong = (index != truth).flatten(1).float().mean(1)
        counts = []
        for drawn, true in zip(index.flatten(1).cpu(), truth.flatten(1).cpu(), strict=True):
            both, first, second = (
                torch.bincount(values.long(), minlength=count + 1)[1:]
                for values in (drawn[drawn == true], drawn, true)
            )
            counts.append(torch.stack([both, first + second], 1).numpy())
        return cls(
            wrong.tolist(),
            [math.nan] * len(index) if decibels is None else decibels.tolist(),
            [math.nan] * len(index),
            [int(of_frame[:, 0].sum()) for of_frame in counts],
            [int(of_frame[:, 1].sum()) for of_frame in counts],
            counts,
        )

    @property
    def label_dice(self) -> list[float]:
        """Of each label, pooled over all frames; NaN where no frame has it."""
        return [_dice(*of_label) for of_label in np.sum(self.by_label, 0).tolist()]

    @property
    def dice(self) -> float:
        return _mean(self.label_dice)

    @property
    def iou(self) -> float:
        return _mean([dice / (2 - dice) for dice in self.label_dice])

    @property
    def frame_dice(self) -> list[float]:
        return [_mean([_dice(*of_label) for of_label in of_frame.tolist()]) for of_frame in self.by_label]


def _mean(values: list[float]) -> float:
    """Of those that are defined."""
    defined = [value for value in values if not math.isnan(value)]
    return sum(defined) / len(defined) if defined else math.nan


def _dice(overlap: int, size: int) -> float:
    return 2 * overlap / size if size else math.nan
