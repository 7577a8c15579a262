"""What programs of 3-D Gaussian splatting import as the compiled module, where they do so."""

from __future__ import annotations

from torch import Tensor

from .general import mark_visible as _mark_visible


def mark_visible(means3D: Tensor, viewmatrix: Tensor, projmatrix: Tensor | None = None) -> Tensor:
    """Which of the centres (N, 3) lie beyond the near plane: bool (N,). The projection does not matter."""
    return _mark_visible(means3D, viewmatrix)


def __getattr__(name: str) -> object:
    raise AttributeError(
        f"diff_gaussian_rasterization._C has no {name}: call GaussianRasterizer, whose operators are in "
        "torch.ops.diff_gaussian_rasterization"
    )
