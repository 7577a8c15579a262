"""Parameters in few bytes: quantised as finely as pictures need, and packed."""

from __future__ import annotations

import lzma
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scene.parameters import PARAMETERS

# Bits of a stored value. Positions need sub-pixel precision, so they keep a 65535th of the frame; a 255th of
# an opacity or colour is fine enough for the eye and the mask. Measured in benchmarks/NOTES.md.
_BITS = {"xyz": 16, "m": 16, "w1": 12, "scaling": 10, "rotation": 10, "sigma": 10}
_OTHER_BITS = 10
_LOGITS = ("opacity", "opacity_seg", "rotation", "m")
_CLIP = 12.0  # of logits: a sigmoid is within 1e-5 of its end there
_MOST_BYTES = 1 << 34  # of a claimed array, before anything is allocated


def pack(params: Mapping[str, Tensor]) -> dict[str, Any]:
    """Raw parameters (named and shaped as in `Checkpoint.params`) as plain values and one tensor of bytes."""
    arrays: dict[str, dict[str, Any]] = {}
    blob = bytearray()
    for name, value in params.items():
        values = value.detach().float().cpu().flatten(1).numpy()  # (N, k)
        if name in ("xyz", "scaling"):
            values = values[:, [0, 2]]  # the middle one is not read
        if name in _LOGITS:
            values = values.clip(-_CLIP, _CLIP)
        bits = _BITS.get(name, _OTHER_BITS)
        low, high = (values.min(0), values.max(0)) if len(values) else (np.zeros(values.shape[1]),) * 2
        levels = (values - low) / np.maximum(high - low, 1e-12) * (2**bits - 1)
        stored = np.rint(levels).astype(np.uint16)  # (N, k)
        # High bytes first, then low ones, column by column: similar bytes lie together, and pack better.
        start = len(blob)
        blob += (stored >> 8).astype(np.uint8).T.tobytes() + (stored & 255).astype(np.uint8).T.tobytes()
        arrays[name] = {
            "shape": list(value.shape),
            "bits": bits,
            "low": low.tolist(),
            "high": high.tolist(),
            "start": start,
        }
    packed = bytearray(lzma.compress(bytes(blob), preset=6))
    return {"arrays": arrays, "size": len(blob), "data": torch.frombuffer(packed, dtype=torch.uint8).clone()}


def unpack(packed: Mapping[str, Any]) -> dict[str, Tensor]:
    """The parameters that `pack` packed. Raises ValueError, or whatever a missing or odd value raises."""
    size = int(packed["size"])
    if not 0 <= size <= _MOST_BYTES:
        raise ValueError("its size")
    try:
        blob = lzma.LZMADecompressor().decompress(packed["data"].numpy().tobytes(), max_length=size + 1)
    except lzma.LZMAError as error:
        raise ValueError(str(error)) from error
    if len(blob) != size:
        raise ValueError("its length")
    params = {name: _unpacked(name, about, blob) for name, about in packed["arrays"].items()}
    if (
        len({len(value) for value in params.values()}) != 1
        or not {"xyz", "m", "sigma", "w1"} <= params.keys()
    ):
        raise ValueError("its parameters")
    return params


def _unpacked(name: str, about: dict[str, Any], blob: bytes) -> Tensor:
    """One parameter, in its shape."""
    shape, start = [int(side) for side in about["shape"]], int(about["start"])
    if name not in PARAMETERS or len(shape) < 1 or min(shape) < 0:
        raise ValueError(f"the parameter {name}")
    low, high = (np.array(about[end], np.float64) for end in ("low", "high"))
    columns, rows = len(low), shape[0]
    count = rows * columns
    high_bytes, low_bytes = (
        np.frombuffer(blob, np.uint8, count, start + part * count).reshape(columns, rows).astype(np.float64)
        for part in (0, 1)
    )
    levels = (256 * high_bytes + low_bytes).T
    values = low + levels / (2 ** int(about["bits"]) - 1) * (high - low)
    if name in ("xyz", "scaling"):
        middle = np.zeros(rows) if name == "xyz" else values[:, 0]
        values = np.stack([values[:, 0], middle, values[:, 1]], 1)
    if math.prod(shape) != values.size:
        raise ValueError(f"the shape of {name}")
    return torch.from_numpy(values.astype(np.float32)).reshape(shape)
