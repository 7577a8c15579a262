"""How much work an iteration is: bytes, operations, and the least time in which this machine could do them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.common import measure, measure_on_device, output
from gaussian_renderer.oracle import MAX_ALPHA, MIN_ALPHA, MIN_TRANSMITTANCE


@dataclass(frozen=True)
class Kernels:
    """How a backend's kernels blend: whole tiles at once, at a number of arithmetic instructions per pixel.

    A sum, a product, a fused product and sum, a comparison, a selection or a division is one instruction. Loads, logic
    of masks and the loop itself are left out: what is computed from the counts is a lower bound. One colour channel.
    """

    tile: int  # side, px; a Gaussian that reaches a tile is evaluated at all of its pixels
    forward: Mapping[str, int]  # instructions per pixel evaluated, by purpose
    backward: Mapping[str, int]
    reduction: int  # lane operations that sum the contributions of a tile's pixels to one Gaussian


# Counted in csrc/cpu/kernels_body.h; a mask on an instruction is free.
_CPU_CONTRIBUTION = {"offset and quadratic form": 9, "exponential": 16, "opacity, clamp, hit": 4}
CPU = Kernels(
    tile=4,
    forward={
        **_CPU_CONTRIBUTION,
        "next transmittance": 2,
        "saturation": 1,
        "weight": 1,
        "colour": 1,
        "selections": 2,
    },
    backward={
        **_CPU_CONTRIBUTION,
        "used": 1,
        "weight": 1,
        "gradient of the colour": 2,
        "behind": 1,
        "gradient of alpha": 3,  # one of them a division
        "transmittance": 1,
        "gradient of the power": 2,
        "moments": 8,
    },
    reduction=24 * 16,  # instructions that sum eight vectors over their 16 lanes
)
# Counted in the machine code of csrc/cuda/blend.cu for sm_90, without the guard of the exponential against denormals. A
# lane's two pixels share a column, and what depends on it alone.
_CUDA_CONTRIBUTION = {"offset and quadratic form": 7, "exponential": 2, "opacity, clamp, hit": 4}
CUDA = Kernels(
    tile=8,
    forward={
        **_CUDA_CONTRIBUTION,
        "next transmittance": 2,
        "saturation": 1,
        "weight": 1,
        "colour": 1,
    },
    backward={
        **_CUDA_CONTRIBUTION,
        "used": 1,
        "weight": 1,
        "gradient of the colour": 2,
        "behind": 1,
        "gradient of alpha": 4,  # a reciprocal and a product for the division
        "transmittance": 1,
        "gradient of the power": 3,
        "moments": 8,
    },
    reduction=32 * 32,  # nine exchanges, nine sums and fourteen selections by a warp
)


@dataclass(frozen=True)
class Workload:
    """Counts of one forward and one backward pass."""

    # pairs of Gaussian and pixel
    useful: int  # alpha >= 1/255, and in front of where the pixel saturates
    forward: int  # evaluated by the forward pass
    backward: int  # evaluated by the backward pass
    # pairs of Gaussian and tile
    listed: int  # in the tiles' lists
    consumed: int  # of those, processed before the tile's last pixel saturated
    touched: int  # of those, useful to some pixel

    def operations(self, kernels: Kernels) -> dict[str, float]:
        """Lane operations of each pass."""
        return {
            "blend": self.forward * sum(kernels.forward.values()),
            "blend backward": self.backward * sum(kernels.backward.values())
            + self.touched * kernels.reduction,
        }


class Recorder(TorchDispatchMode):
    """Records the inputs and outputs of the rasteriser's operators, by the names in their schemas."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, dict[str, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace == "diff_gaussian_rasterization":
            names = [argument.name for argument in func._schema.arguments]
            returned = [value.name for value in func._schema.returns]
            call = dict(zip(names, args, strict=False)) | (kwargs or {})
            results = out if isinstance(out, tuple) else (out,) if returned else ()
            self.calls[func._schema.name.partition("::")[2]] = call | dict(
                zip(returned, results, strict=True)
            )
        return out


def count(call: dict[str, Any], kernels: Kernels) -> Workload:
    """Replays a recorded ``blend``, step by step along the lists of all tiles at once, where its tensors are."""
    side = kernels.tile
    device = call["means2d"].device
    opacities = torch.sigmoid(call["opacities"]) if call["raw"] else call["opacities"]
    width, height = call["width"], call["height"]
    columns, rows = -(-width // side), -(-height // side)
    offsets = call["tile_offsets"].long()  # (V, tiles + 1)
    if offsets.shape[1] != columns * rows + 1:
        raise ValueError(f"the lists are not those of tiles of {side} x {side} pixels")
    tile = torch.arange(columns * rows, device=device)
    inner = torch.arange(side * side, device=device)
    x = tile[:, None] % columns * side + inner % side  # (tiles, pixels of a tile) px
    y = tile[:, None] // columns * side + inner // side
    inside = (x < width) & (y < height)

    sums = torch.zeros(6, dtype=torch.int64, device=device)  # in the order of Workload's fields
    for view, head, bit in zip(call["views"], call["heads"], call["bits"], strict=True):
        start, length = offsets[view, :-1], offsets[view].diff()
        drawn = (call["active"][view] & bit) != 0
        transmittance = torch.ones(x.shape, device=device)
        running = inside.clone()
        deepest = torch.zeros_like(length)  # the last pair that some pixel used, plus one
        seen = torch.zeros_like(length)  # pairs that the forward pass processes
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
            touched = used.any(1)
            deepest[at] = torch.where(touched, depth + 1, deepest[at])
            seen[at] = depth + 1
            sums[0] += used.sum()
            sums[5] += touched.sum()
        pixels = side * side
        sums[1:5] += torch.stack([pixels * seen.sum(), pixels * deepest.sum(), length.sum(), seen.sum()])
    return Workload(*sums.tolist())


def _contribution(
    mean: Tensor, conic: Tensor, opacity: Tensor, x: Tensor, y: Tensor
) -> tuple[Tensor, Tensor]:
    """Hit and alpha at a tile's pixels of one Gaussian per tile, (tiles, 2), (tiles, 3) and (tiles,)."""
    a, b, c = conic[:, :, None].unbind(1)
    dx, dy = x - mean[:, :1], y - mean[:, 1:]
    power = -0.5 * (a * dx**2 + c * dy**2) - b * dx * dy
    alpha = (opacity[:, None] * torch.exp(power)).clamp_max(MAX_ALPHA)
    return (power <= 0) & (alpha >= MIN_ALPHA), alpha


# ---- floors of a training iteration on CUDA --------------------------------------------------------------------------


@dataclass(frozen=True)
class Floor:
    """The least work of a phase: bytes of device memory read and written, lane operations."""

    bytes: float
    operations: float

    def seconds(self, can: Attainable) -> float:
        return max(self.bytes / can.bytes, self.operations / can.lane_operations)


# Lane operations, roughly: all of these phases are bound by bytes.
_FOLD, _FOLD_BACKWARD = 60, 120  # per Gaussian and view, besides its path
_BOUNDS, _EMIT = 40, 10  # per Gaussian and view; per pair listed
_SIMILARITY = 206  # per value: eight separable sums over 11 + 11 pixels, and 30 more
_ADAM = 12  # a value
_FLOAT, _RECORD = 4, 8  # bytes; floats that the backward pass keeps per pair (one channel)


def floors(
    calls: Mapping[str, dict[str, Any]], work: Workload, compared: int, learned: int
) -> dict[str, Floor]:
    """The floor of each phase of one iteration with density statistics, from the inputs of ``fold`` and ``blend``
    (`Recorder.calls`): a phase reads its inputs once and writes its outputs once.

    compared: values (pixels and channels) that SSIM compares. learned: values that Adam updates.
    """
    fold, blend = calls["fold"], calls["blend"]
    means2d, active = blend["means2d"], blend["active"]
    rows = active.numel()  # of Gaussian and view
    drawn = int((active != 0).sum())
    heads, gaussians = blend["opacities"].shape
    channels = blend["colours"].shape[2]
    values = blend["images"].numel()
    renders = blend["transmittance"].numel()  # pixels of all renders
    layers = len(blend["views"]) / means2d.shape[0]  # renders of a view
    pairs = work.listed
    raw = _FLOAT * sum(t.numel() for name, t in fold.items() if name in _RAW)
    path = fold["w1"].shape[1]
    look = heads * gaussians * (1 + channels) * _FLOAT
    footprints = 5 * _FLOAT * drawn  # centre and conic
    records = pairs * layers * (_RECORD - 1 + channels) * _FLOAT
    blending = work.operations(CUDA)
    return {
        "fold": Floor(raw + rows * 25, rows * (_FOLD + path)),
        "binning": Floor(
            rows + footprints + _FLOAT * (heads * gaussians + 2 * pairs), rows * _BOUNDS + pairs * _EMIT
        ),
        "blend": Floor(
            footprints + look + _FLOAT * (pairs + values + 2 * renders),
            blending["blend"],
        ),
        "blend backward": Floor(
            footprints + look + _FLOAT * (2 * pairs + 2 * values + 2 * renders) + records,
            blending["blend backward"],
        ),
        "records": Floor(records + 5 * _FLOAT * (drawn + rows) + look, pairs * layers * _RECORD),
        "fold backward": Floor(
            2 * raw + rows * _FLOAT + 5 * _FLOAT * drawn, drawn * (_FOLD_BACKWARD + 2 * path)
        ),
        "loss": Floor(3 * _FLOAT * values, compared * _SIMILARITY),
        # five statistics read and written, the gradient of m, sigma and its gradient; radii, activity, screen gradients
        "statistics": Floor(_FLOAT * (13 * gaussians + 2 * drawn) + 5 * rows, 0),
        "Adam": Floor(7 * _FLOAT * learned, _ADAM * learned),
    }


_RAW = ("xyz", "w1", "m", "sigma", "scaling", "rotation")


# ---- what this machine can do ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attainable:
    """What a CPU with a number of threads can do, or a GPU."""

    source: str  # of the rate: where it was taken from
    lane_operations: float  # per second; a fused product and sum of one float counts as one
    matrix_product: float  # the same, for the product of two float32 matrices in torch
    bytes: float  # copied per second: read and written

    @classmethod
    def measured(cls, device: torch.device, threads: int, quick: bool) -> Attainable:
        """Memory from a copy; the CPU's vector units from peak.cpp, a GPU's from its issue rate at the highest clock,
        or from the matrix product if neither is available."""
        on_gpu = device.type == "cuda"
        size = 512 if quick else 8192 if on_gpu else 1536
        left, right = torch.rand(2, size, size, device=device)
        source = torch.rand(1 << (20 if quick else 28 if on_gpu else 25), device=device)
        target = torch.empty_like(source)
        functions = {"product": lambda: left @ right, "copy": lambda: target.copy_(source)}
        repeats = 3 if quick else 9
        seconds = measure_on_device(device, functions, repeats) or measure(device, functions, repeats)
        product = size**3 / seconds["product"]
        copied = 2 * source.numel() * source.element_size() / seconds["copy"]
        peak, peak_from = (
            (_issued(device), "issue at the highest clock") if on_gpu else (_peak(threads), "peak.cpp")
        )
        return cls(peak_from if peak else "matrix product", peak or product, product, copied)


def _issued(device: torch.device) -> float | None:
    """Lane operations per second: each multiprocessor issues four warps of 32 lanes per clock (Volta and later)."""
    index = str(torch.cuda.current_device() if device.index is None else device.index)
    query = "nvidia-smi", "-i", index, "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits"
    megahertz = (output(*query) or "").strip()
    if not megahertz.isdecimal():
        return None
    return torch.cuda.get_device_properties(device).multi_processor_count * 4 * 32 * float(megahertz) * 1e6


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
