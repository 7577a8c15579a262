"""Random scenes for the folded rasteriser, and a way to draw them with any of its implementations.

Shared by test modules and the processes they start: it imports neither, nor the oracle.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import ModuleType

import torch
from torch import Tensor

RAW = ("xyz", "w1", "m", "sigma", "scaling", "rotation")
DIFFERENTIABLE = (*RAW, "times", "opacities", "colours", "backgrounds", "screen")
HARMONIC_0 = 0.28209479177387814
KINDS = ("plain", "opaque", "covering", "elongated", "outside", "inactive", "tiny", "faint")


@dataclass(frozen=True)
class Scene:
    """What ``fold`` and ``blend`` take, by name; every tensor float64 until ``rounded``."""

    width: int
    height: int
    pixels_per_unit: float
    renders: Sequence[tuple[int, int, int]]  # (view, head, bit) each
    raw: bool  # opacities are logits, colours coefficients
    # RAW, times (V,), signs (V,), opacities (H, N), colours (H, N, C), backgrounds (R, C)
    tensors: dict[str, Tensor]

    def rounded(self, dtype: torch.dtype) -> Scene:
        """The scene as a kernel of that dtype sees it, in float64 for the oracle."""
        return replace(self, tensors={name: t.to(dtype).double() for name, t in self.tensors.items()})

    def with_renders(self, renders: Sequence[tuple[int, int, int]]) -> Scene:
        backgrounds = self.tensors["backgrounds"][: len(renders)]
        return replace(self, renders=renders, tensors=self.tensors | {"backgrounds": backgrounds})

    def with_tensors(self, **tensors: Tensor) -> Scene:
        return replace(self, tensors=self.tensors | tensors)


def random_scene(
    seed: int,
    width: int = 37,
    height: int = 23,
    n: int = 12,
    degree: int = 3,
    channels: int = 3,
    views: int = 1,
    heads: int = 1,
    renders: Sequence[tuple[int, int, int]] | None = None,
    kind: str = "plain",
    raw: bool = False,
) -> Scene:
    """``kind`` is one of KINDS. Without ``renders`` each view is drawn once, with each head in turn."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, dtype=torch.float64, generator=generator)

    side = max(width, height)
    pixels_per_unit = side / 0.72
    smallest, largest = {
        "opaque": (side, 4.0 * side),
        "covering": (3.0 * side, 10.0 * side),
        "tiny": (1e-7 * pixels_per_unit, 1e-5 * pixels_per_unit),
    }.get(kind, (0.3, 1 + side / 4))
    sizes = torch.exp(uniform(math.log(smallest), math.log(largest), n, 3))  # px
    if kind == "elongated":
        sizes[:, 0], sizes[:, 2] = uniform(20, 80, n), uniform(0.01, 0.1, n)
    opacities = uniform(0.0, 1.0, heads, n)
    if kind == "opaque":
        opacities[:, : 1 + n // 2] = uniform(0.985, 1.0, heads, n)[:, : 1 + n // 2]
    if kind == "covering":
        opacities *= 0.3
    if kind == "faint":  # pixels stop, each at a different place
        opacities *= torch.linspace(0.02, 0.8, n, dtype=torch.float64)
    half = torch.tensor([width, 1, height], dtype=torch.float64) / (2 * pixels_per_unit)
    xyz = uniform(-1.3, 1.3, n, 3) * half
    if kind == "outside":
        xyz = torch.where(xyz < 0, xyz - half, xyz + half)
    inactive = kind == "inactive"
    m, times = (
        (uniform(0.8, 0.99, n), uniform(0.0, 0.2, views))
        if inactive
        else (uniform(0, 1, n), uniform(0, 1, views))
    )
    renders = [(v, v % heads, 1) for v in range(views)] if renders is None else renders
    tensors = {
        "xyz": xyz,
        "w1": uniform(-0.3, 0.3, n, 2 * degree),
        "m": torch.logit(m),
        "sigma": torch.log(uniform(0.01, 0.02, n) if inactive else uniform(0.1, 1.0, n)),
        "scaling": torch.log(sizes / pixels_per_unit),
        "rotation": torch.logit(uniform(0, 1, n)),
        "times": times,
        "signs": 1 - 2 * torch.randint(2, (views,), generator=generator).double(),
        "opacities": opacities,
        "colours": uniform(0, 1.2, heads, n, channels),
        "backgrounds": uniform(0, 1, len(renders), channels),
    }
    if raw:  # in a fifth of the channels max(0, ...) holds the colour at 0
        tensors["opacities"] = torch.logit(opacities)
        tensors["colours"] = uniform(-0.3, 1.2, heads, n, channels).sub(0.5).div(HARMONIC_0)
    return Scene(width, height, pixels_per_unit, renders, raw, tensors)


def draw(
    ops: ModuleType,
    scene: Scene,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    gradients: bool = True,
) -> dict[str, Tensor]:
    """All outputs of ``ops.fold`` and ``ops.blend`` for the scene, and the gradient of each input as "v_" + name.

    What is differentiated is a fixed random weighting of all images and transmittances, so that nothing cancels.
    """
    given = {name: t.to(device, dtype) for name, t in scene.tensors.items()}
    heads, n = given["opacities"].shape
    given["screen"] = torch.zeros(heads, len(given["times"]), n, 2, device=device, dtype=dtype)
    for name in DIFFERENTIABLE:
        given[name].requires_grad_(gradients)
    means2d, conics, radii, active = ops.fold(
        *(given[name] for name in (*RAW, "times", "signs")), scene.pixels_per_unit, scene.width, scene.height
    )
    images, transmittance = ops.blend(
        means2d,
        conics,
        active,
        *(given[name] for name in ("opacities", "colours", "backgrounds")),
        *(list(numbers) for numbers in zip(*scene.renders, strict=True)),
        scene.width,
        scene.height,
        given["screen"],
        scene.raw,
    )
    out = {"means2d": means2d, "conics": conics, "radii": radii, "active": active}
    out |= {"images": images, "transmittance": transmittance}
    if gradients:
        generator = torch.Generator().manual_seed(0)
        loss = sum(
            (o * torch.randn(o.shape, dtype=torch.float64, generator=generator).to(o)).sum()
            for o in (images, transmittance)
        )
        grads = torch.autograd.grad(loss, [given[name] for name in DIFFERENTIABLE], allow_unused=True)
        for name, grad in zip(DIFFERENTIABLE, grads, strict=True):
            out["v_" + name] = torch.zeros_like(given[name]) if grad is None else grad
    return {name: o.detach().cpu() for name, o in out.items()}


def every_kind(n: int = 40) -> list[Scene]:
    """One scene of each kind, with two views, two heads and both activity bits."""
    renders = [(0, 0, 1), (1, 0, 1), (1, 1, 2)]
    return [
        random_scene(i, n=n, views=2, heads=2, renders=renders, kind=kind) for i, kind in enumerate(KINDS)
    ]
