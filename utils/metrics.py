"""Scores of renders against frames."""

from __future__ import annotations

from torch import Tensor

MIN_MSE = 1e-10
"""Floor of the mean squared error: empty masks are frequent, and rendered exactly. 100 dB."""


def psnr(images: Tensor, targets: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each image, (B, C, H, W) in [0, 1] each -> (B,)."""
    mse = (images.clamp(0, 1) - targets).square().flatten(1).mean(1)
    return -10 * mse.clamp_min(MIN_MSE).log10()


def dice(images: Tensor, targets: Tensor, threshold: float = 0.5) -> Tensor:
    """Dice coefficient over all images together, at ``threshold``; 1 where both are empty. (B, C, H, W) each -> ()."""
    predicted, truth = images >= threshold, targets >= threshold
    total = predicted.sum() + truth.sum()
    return (2 * (predicted & truth).sum() + (total == 0)) / total.clamp_min(1)


def iou(images: Tensor, targets: Tensor, threshold: float = 0.5) -> Tensor:
    """Intersection over union (Jaccard) as `dice` counts it; 1 where both are empty. (B, C, H, W) each -> ()."""
    predicted, truth = images >= threshold, targets >= threshold
    union = (predicted | truth).sum()
    return ((predicted & truth).sum() + (union == 0)) / union.clamp_min(1)
