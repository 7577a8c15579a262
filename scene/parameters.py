"""The table of per-Gaussian parameters. The model, its optimizer, checkpoints, point clouds and the bound on memory are
derived from it: a new parameter is a row here, an initial value in `scene.gaussian_model`, and its use in rendering."""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

IMAGE, SEGMENTATION = "img", "seg"
"""Names of the heads. Plain segmentation training uses the image head; a segmentation head lies beside it."""


@dataclass(frozen=True)
class Parameter:
    """One raw tensor with a row for each Gaussian.

    name: in `GaussianModel.params`, and of its optimizer group.
    shape: of a row. Letters are sizes that parameters share: W = 2P coefficients of the path, R = (D + 1)^2 - 1
        harmonics above degree 0, C channels of the image head's colours, S of the segmentation head's: as many for
        a mask, one per label for a label map.
    key: in a published checkpoint.
    columns: in a point cloud: names, or the prefix of numbered ones.
    rate: the option with its learning rate, divided by the one named ``divisor``; None where `set_rates` schedules it.
    head: whose appearance it is; None for the geometry, which heads share.
    """

    name: str
    shape: tuple[int | str, ...]
    key: str
    columns: str | tuple[str, ...]
    rate: str | None
    divisor: str | None = None
    head: str | None = None

    @property
    def is_colour(self) -> bool:
        """Whether the last axis holds channels, of which published files have three."""
        return self.shape[-1] in ("C", "S")

    def column_names(self, count: int) -> list[str]:
        """Of its ``count`` columns in a point cloud."""
        if isinstance(self.columns, tuple):
            return list(self.columns)
        return [f"{self.columns}_{i}" for i in range(count)]

    def size(self, sizes: Mapping[str, int]) -> int:
        """Numbers per Gaussian, given those of the letters."""
        return math.prod(sizes[n] if isinstance(n, str) else n for n in self.shape)


PARAMETERS = {
    parameter.name: parameter
    for parameter in (
        Parameter("xyz", (3,), "_xyz", ("x", "y", "z"), None),
        Parameter("f_dc", (1, "C"), "_features_dc", "f_dc", "feature_lr", head=IMAGE),
        Parameter(
            "f_rest", ("R", "C"), "_features_rest", "f_rest", "feature_lr", "feature_rest_divisor", head=IMAGE
        ),
        Parameter("opacity", (1,), "_opacity", ("opacity",), "opacity_lr", head=IMAGE),
        Parameter("scaling", (3,), "_scaling", "scale", "scaling_lr"),
        Parameter("rotation", (1,), "_rotation", "rot", "rotation_lr"),
        Parameter("m", (1,), "m", "m", "m_lr"),
        Parameter("sigma", (1, 1), "sigma", "sigma", "sigma_lr"),
        Parameter("w1", ("W",), "_w1", "w1", "w1_lr"),
        Parameter("f_dc_seg", (1, "S"), "_features_dc_seg", "seg_f_dc", "feature_lr", head=SEGMENTATION),
        Parameter(
            "f_rest_seg", ("R", "S"), "_features_rest_seg", "seg_f_rest", "feature_lr", "feature_rest_divisor",
            head=SEGMENTATION,
        ),
        Parameter(
            "opacity_seg", (1,), "_opacity_seg", ("seg_opacity",), "opacity_lr", head=SEGMENTATION
        ),
    )
}  # fmt: skip
"""By name, in the order of the published optimizer's groups."""

GEOMETRY = tuple(name for name, parameter in PARAMETERS.items() if parameter.head is None)
COLOURS = frozenset(name for name, parameter in PARAMETERS.items() if parameter.is_colour)

SEGMENTATION_HEAD = ("opacity_seg", "f_dc_seg", "f_rest_seg")
"""The segmentation head in the order of its columns in a point cloud, and of its group where it is trained alone."""


class HeadParameters(NamedTuple):
    """Names of the parameters of one head."""

    colour: str
    harmonics: str  # above degree 0
    opacity: str


@functools.cache
def head_parameters(head: str) -> HeadParameters:
    return HeadParameters(*(name for name, parameter in PARAMETERS.items() if parameter.head == head))


def numbers_per_gaussian(sizes: Mapping[str, int], heads: Collection[str]) -> int:
    """Of the geometry and the ``heads``, given the letters' sizes."""
    return sum(p.size(sizes) for p in PARAMETERS.values() if p.head is None or p.head in heads)


def sizes_of(params: Mapping[str, Tensor]) -> dict[str, int]:
    """The letters of the table, and N, as ``params`` have them. Raises `ValueError` where a name is unknown or a shape
    does not fit."""
    sizes: dict[str, int] = {}
    for name, value in params.items():
        if name not in PARAMETERS:
            raise ValueError(f"{name} is not a parameter of a Gaussian")
        wanted: tuple[int | str, ...] = ("N", *PARAMETERS[name].shape)
        fits = value.ndim == len(wanted) and all(
            size == (sizes.setdefault(n, size) if isinstance(n, str) else n)
            for n, size in zip(wanted, value.shape, strict=True)
        )
        if not fits:
            expected = ", ".join(str(sizes.get(n, n) if isinstance(n, str) else n) for n in wanted)
            raise ValueError(f"{name} has the shape {tuple(value.shape)}, not ({expected})")
    return sizes
