"""Scores of images against frames."""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from skimage.metrics import structural_similarity
from torch import Tensor

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
    """
    side = min(images.shape[-2:])
    window = min(_SSIM_WINDOW, side - 1 + side % 2)  # odd, and no larger than the frame

    def of_frame(image: np.ndarray, target: np.ndarray) -> float:
        options = {"win_size": window, "use_sample_covariance": window > 1, "data_range": 1.0}
        return float(structural_similarity(target, image, channel_axis=0, **options))

    frames = (values.double().cpu().numpy() for values in (images.clamp(0, 1), targets))
    with ThreadPoolExecutor(
        min(8, os.cpu_count() or 1)
    ) as threads:  # its filters release the interpreter lock
        return list(threads.map(of_frame, *frames))


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
        return Scores(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

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


def _dice(overlap: int, size: int) -> float:
    return 2 * overlap / size if size else math.nan
