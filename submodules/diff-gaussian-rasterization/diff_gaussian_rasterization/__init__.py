"""Differentiable rasterisation of Folded-Gaussians and of general 3-D Gaussians, on CPU and CUDA."""

from .general import GaussianRasterizationSettings, GaussianRasterizer, mark_visible, rasterize_gaussians
from .ops import ACTIVE, ACTIVE_SEGMENTATION, blend, fold

__all__ = [
    "ACTIVE",
    "ACTIVE_SEGMENTATION",
    "GaussianRasterizationSettings",
    "GaussianRasterizer",
    "blend",
    "fold",
    "mark_visible",
    "rasterize_gaussians",
]
