"""Ordinary splats: point clouds of 3-D Gaussian splatting programs, as SuperSplat and other viewers open them."""

from __future__ import annotations

import os

import numpy as np
from torch import Tensor

from utils.files import atomic_write

_COLUMNS = (
    *("x", "y", "z", "nx", "ny", "nz", "f_dc_0", "f_dc_1", "f_dc_2", "opacity"),
    *("scale_0", "scale_1", "scale_2", "rot_0", "rot_1", "rot_2", "rot_3"),
)


def write_splats(
    path: str | os.PathLike[str],
    means: Tensor,  # (M, 3)
    scales: Tensor,  # (M, 3), standard deviations along the Gaussian's axes, the third of them the flat one
    quaternions: Tensor,  # (M, 4) w x y z
    opacities: Tensor,  # (M,) in (0, 1)
    colours: Tensor,  # (M, 3), x of the colour C0 x + 0.5
    comments: list[str],
) -> None:
    """Binary little endian, float32: logarithms of scales, logits of opacities, harmonics of degree 0."""
    count = len(means)
    table = np.zeros((count, len(_COLUMNS)), "<f4")
    opacities = opacities.double().clamp(1e-6, 1 - 1e-6)
    for start, values in (
        (0, means),
        (6, colours.expand(-1, 3)),
        (9, (opacities / (1 - opacities)).log()[:, None]),
        (10, scales.double().clamp_min(1e-12).log()),
        (13, quaternions),
    ):
        table[:, start : start + values.shape[1]] = values.cpu().numpy()
    header = ["ply", "format binary_little_endian 1.0", *(f"comment {text}" for text in comments)]
    header += [f"element vertex {count}", *(f"property float {name}" for name in _COLUMNS), "end_header"]
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        file.write(("\n".join(header) + "\n").encode("ascii", "replace"))
        table.tofile(file)
