"""Differentiable rasterisation of Folded-Gaussians and of general 3-D Gaussians, on CPU and CUDA."""

from .general import GaussianRasterizationSettings, GaussianRasterizer, mark_visible, rasterize_gaussians
from .ops import ACTIVE, ACTIVE_SEGMENTATION, Adam, blend, fold, observe, sigma_outside, similarity

__all__ = [
    "ACTIVE",
    "ACTIVE_SEGMENTATION",
    "Adam",
    "GaussianRasterizationSettings",
    "GaussianRasterizer",
    "blend",
    "fold",
    "mark_visible",
    "observe",
    "rasterize_gaussians",
    "sigma_outside",
    "similarity",
]
