"""Differentiable rasterisation of Folded-Gaussians and of general 3-D Gaussians, on CPU and CUDA."""

from .general import (
    RETURNS,
    GaussianRasterizationSettings,
    GaussianRasterizer,
    mark_visible,
    rasterize_gaussians,
    returning,
)
from .ops import ACTIVE, ACTIVE_SEGMENTATION, Adam, blend, fold, observe, sigma_outside, similarity
from .sparse_adam import SparseGaussianAdam

__all__ = [
    "ACTIVE",
    "ACTIVE_SEGMENTATION",
    "RETURNS",
    "Adam",
    "GaussianRasterizationSettings",
    "GaussianRasterizer",
    "SparseGaussianAdam",
    "blend",
    "fold",
    "mark_visible",
    "observe",
    "rasterize_gaussians",
    "returning",
    "sigma_outside",
    "similarity",
]
