"""How much work the rasteriser does on a scene, and the least time in which this machine could do that arithmetic."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import measure, output
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gaussian_renderer.oracle import MAX_ALPHA, MIN_ALPHA, MIN_TRANSMITTANCE

TILE = 4  # side of the CPU kernels' tile, px; a Gaussian that reaches a tile is evaluated at its 16 pixels at once

# Arithmetic instructions per pixel evaluated with one colour channel, counted in csrc/cpu/kernels_body.h. A sum, a
# product, a fused product and sum, a comparison, a selection or a division of a whole vector is one; a mask on an
# instruction is free. Logic of masks, loads and the loop itself are left out: the floor is a lower bound.
CONTRIBUTION = {"offset and quadratic form": 9, "exponential": 16, "opacity, clamp, hit": 4}
FORWARD = {
    **CONTRIBUTION,
    "next transmittance": 2,
    "saturation": 1,
    "weight": 1,
    "colour": 1,
    "selections": 2,
}
BACKWARD = {
    **CONTRIBUTION,
    "used": 1,
    "weight": 1,
    "gradient of the colour": 2,
    "behind": 1,
    "gradient of alpha": 3,  # one of them a division
    "transmittance": 1,
    "gradient of the power": 2,
    "moments": 8,
}
REDUCTION = (
    24  # instructions that sum eight vectors over their lanes, once a touched pair of Gaussian and tile
)


@dataclass(frozen=True)
class Workload:
    """Counts of one forward and one backward pass."""

    # pairs of a Gaussian and a pixel
    useful: int  # alpha >= 1/255, and in front of where the pixel saturates
    forward: int  # evaluated by the forward pass
    backward: int  # evaluated by the backward pass
    # pairs of a Gaussian and a tile
    listed: int  # in the tiles' lists
    consumed: int  # of those, looked at before the tile's last pixel saturated
    touched: int  # of those, useful to some pixel

    def floor(self, rate: float) -> dict[str, float]:
        """Seconds that the arithmetic of each pass takes at ``rate`` lane operations a second."""
        reduced = self.touched * REDUCTION * TILE * TILE
        return {
            "blend": self.forward * sum(FORWARD.values()) / rate,
            "blend backward": (self.backward * sum(BACKWARD.values()) + reduced) / rate,
        }


class Recorder(TorchDispatchMode):
    """Keeps what the rasteriser's operators take and return, by the names of their schemas."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, dict[str, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace == "diff_gaussian_rasterization":
            names = [argument.name for argument in func._schema.arguments]
            returned = [value.name for value in func._schema.returns]
            call = dict(zip(names, args, strict=False)) | (kwargs or {})
            self.calls[func._schema.name.partition("::")[2]] = call | dict(zip(returned, out, strict=True))
        return out


def count(call: dict[str, Any]) -> Workload:
    """Replays a recorded ``blend`` of the CPU, step by step along the lists of all tiles at once."""
    opacities = torch.sigmoid(call["opacities"]) if call["raw"] else call["opacities"]
    width, height = call["width"], call["height"]
    columns, rows = -(-width // TILE), -(-height // TILE)
    offsets = call["tile_offsets"].long()  # (V, tiles + 1)
    if offsets.shape[1] != columns * rows + 1:
        raise ValueError(f"the lists are not those of tiles of {TILE} x {TILE} pixels")
    tile = torch.arange(columns * rows)
    inner = torch.arange(TILE * TILE)
    x = tile[:, None] % columns * TILE + inner % TILE  # (tiles, 16) px
    y = tile[:, None] // columns * TILE + inner // TILE
    inside = (x < width) & (y < height)

    useful = forward = backward = listed = consumed = touched = 0
    for view, head, bit in zip(call["views"], call["heads"], call["bits"], strict=True):
        start, length = offsets[view, :-1], offsets[view].diff()
        drawn = (call["active"][view] & bit) != 0
        transmittance = torch.ones(x.shape)
        running = inside.clone()
        deepest = torch.zeros_like(length)  # the last pair that some pixel used, plus one
        seen = torch.zeros_like(length)  # pairs that the forward pass looks at
        for depth in range(int(length.max())):
            at = ((length > depth) & running.any(1)).nonzero()[:, 0]  # tiles that go on
            if not len(at):
                break
            n = call["pair_gaussians"][start[at] + depth].long()
            gaussians = call["means2d"][view, n], call["conics"][view, n], opacities[head, n]
            hit, alpha = _contribution(*gaussians, x[at], y[at])
            hit &= drawn[n][:, None]
            after = transmittance[at] * (1 - alpha)
            ends = running[at] & hit & (after < MIN_TRANSMITTANCE)
            running[at] &= ~ends
            used = running[at] & hit
            transmittance[at] = torch.where(used, after, transmittance[at])
            deepest[at] = torch.where(used.any(1), depth + 1, deepest[at])
            seen[at] = depth + 1
            useful += int(used.sum())
            touched += int(used.any(1).sum())
        listed += int(length.sum())
        consumed += int(seen.sum())
        forward += int(seen.sum()) * TILE * TILE
        backward += int(deepest.sum()) * TILE * TILE
    return Workload(useful, forward, backward, listed, consumed, touched)


def _contribution(
    mean: Tensor, conic: Tensor, opacity: Tensor, x: Tensor, y: Tensor
) -> tuple[Tensor, Tensor]:
    """What a Gaussian for each tile, (tiles, 2), (tiles, 3) and (tiles,), gives its pixels (tiles, 16): hit, alpha."""
    a, b, c = conic[:, :, None].unbind(1)
    dx, dy = x - mean[:, :1], y - mean[:, 1:]
    power = -0.5 * (a * dx**2 + c * dy**2) - b * dx * dy
    alpha = (opacity[:, None] * torch.exp(power)).clamp_max(MAX_ALPHA)
    return (power <= 0) & (alpha >= MIN_ALPHA), alpha


@dataclass(frozen=True)
class Attainable:
    """What this machine's CPU can do with some number of threads."""

    source: str  # of the rate: "peak.cpp" or "matrix product"
    lane_operations: float  # a second; a fused product and sum of one float counts as one
    matrix_product: float  # the same, of the product of two float32 matrices in torch
    bytes: float  # copied a second: read and written

    @classmethod
    def measured(cls, threads: int, quick: bool) -> Attainable:
        """Vector units by peak.cpp, or where there is no compiler by the matrix product; memory by a copy."""
        size = 512 if quick else 1536
        left, right = torch.rand(size, size), torch.rand(size, size)
        source = torch.rand(1 << (20 if quick else 25))
        target = torch.empty_like(source)
        functions = {"product": lambda: left @ right, "copy": lambda: target.copy_(source)}
        seconds = measure(torch.device("cpu"), functions, 3 if quick else 9)
        product = size**3 / seconds["product"]
        peak = _peak(threads)
        copied = 2 * source.numel() * source.element_size() / seconds["copy"]
        return cls("peak.cpp" if peak else "matrix product", peak or product, product, copied)


def _peak(threads: int) -> float | None:
    compiler = os.environ.get("CXX", "c++").split()
    with tempfile.TemporaryDirectory() as folder:
        program = str(Path(folder, "peak"))
        source = str(Path(__file__).with_name("peak.cpp"))
        options = "-O3", "-march=native", "-pthread"
        if output(*compiler, *options, source, "-o", program) is None:
            return None
        printed = output(program, str(threads))
        return float(printed) if printed else None
