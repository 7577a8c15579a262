"""The named terms of the losses (method: MedGS, section 3.3; weights are options)."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

SSIM_WINDOW = 11
SSIM_SIGMA = 1.5
SSIM_C1, SSIM_C2 = 0.01**2, 0.03**2


def l1(images: Tensor, targets: Tensor) -> Tensor:
    """Mean absolute difference."""
    return (images - targets).abs().mean()


LABEL_FLOOR = 1e-2
"""Added to each share before its logarithm is taken, so that a label that is nowhere yet can grow."""


def label_cross_entropy(channels: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of the labels' shares and the background's, what they leave of 1, with what they should be; mean
    over pixels. (B, K, H, W) each, K labels."""
    background = (1 - channels.sum(1, keepdim=True)).clamp_min(0) + LABEL_FLOOR
    labels = channels + LABEL_FLOOR
    total = background + labels.sum(1, keepdim=True)
    expected = 1 - targets.sum(1, keepdim=True)
    each = total.log() - expected * background.log() - (targets * labels.log()).sum(1, keepdim=True)
    return each.mean()


@functools.lru_cache
def _window(dtype: torch.dtype, device: torch.device) -> Tensor:
    x = torch.arange(SSIM_WINDOW, dtype=dtype, device=device) - SSIM_WINDOW // 2
    window = torch.exp(-(x**2) / (2 * SSIM_SIGMA**2))
    return window / window.sum()


def ssim_map(images: Tensor, targets: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004) of each pixel, (B, C, H, W) each: 11 x 11 Gaussian window of sigma 1.5,
    zero padding."""
    b, c, h, w = images.shape
    stacked = torch.stack([images, targets, images * images, targets * targets, images * targets])
    window = _window(images.dtype, images.device)
    flat = stacked.reshape(-1, 1, h, w)
    flat = F.conv2d(flat, window.view(1, 1, -1, 1), padding=(SSIM_WINDOW // 2, 0))
    flat = F.conv2d(flat, window.view(1, 1, 1, -1), padding=(0, SSIM_WINDOW // 2))
    mean_x, mean_y, xx, yy, xy = flat.reshape(5, b, c, h, w)
    variance_x, variance_y = xx - mean_x**2, yy - mean_y**2
    covariance = xy - mean_x * mean_y
    return ((2 * mean_x * mean_y + SSIM_C1) * (2 * covariance + SSIM_C2)) / (
        (mean_x**2 + mean_y**2 + SSIM_C1) * (variance_x + variance_y + SSIM_C2)
    )


def ssim(images: Tensor, targets: Tensor) -> Tensor:
    """Mean structural similarity."""
    return ssim_map(images, targets).mean()


def sigma_outside(spreads: Tensor, low: float, high: float) -> Tensor:
    """L_sigma: mean of (low - sigma) over the Gaussians below ``low`` plus mean of (sigma - high) over those above.

    spreads: (N,), active. A side without Gaussians adds 0.
    """
    below, above = F.relu(low - spreads), F.relu(spreads - high)
    return below.sum() / (below > 0).sum().clamp_min(1) + above.sum() / (above > 0).sum().clamp_min(1)
