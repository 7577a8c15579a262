"""What readers share: choices among volumes, optional libraries, words, and stacks of pictures."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from patient.geometry import check_affine, swap_ras_lps
from patient.volumes import Volume
from utils.errors import UserError


def stacked(stack: np.ndarray, name: str, notes: list[str], **others: Any) -> Volume:
    """Pictures (frame, row, column[, channel]) as a Volume without millimetres."""
    values = stack.transpose(2, 1, 0, *range(3, stack.ndim))
    full_scale = None
    if values.dtype in (np.uint8, np.uint16):
        full_scale = 0.0, float(np.iinfo(values.dtype).max)
    elif values.dtype.kind == "f" and values.min() >= 0 and values.max() <= 1:
        full_scale = 0.0, 1.0
    bits = 8 if values.dtype.itemsize == 1 else 16
    return Volume(values, None, bits, name, full_scale=full_scale, notes=notes, **others)


def grey(frames: np.ndarray) -> np.ndarray:
    """Decoded colours (frame, row, column, 3) uint8, or their one channel where all are grey."""
    # Two levels apart is rounding between the colour spaces, not colour.
    apart = max(int(np.ptp(frame.astype(np.int16), axis=-1).max()) for frame in frames)
    return np.ascontiguousarray(frames[..., 1]) if apart <= 2 else frames


def from_lps(columns: np.ndarray, origin: Iterable[float], path: Path) -> np.ndarray:
    """The RAS affine of index steps (3, 3), one a column, and an origin in LPS."""
    affine = np.eye(4)
    affine[:3, :3] = swap_ras_lps(columns.T).T
    affine[:3, 3] = swap_ras_lps(np.array(tuple(origin)))
    try:
        check_affine(affine)
    except ValueError as error:
        raise UserError(f"{path} cannot be placed: {error}") from error
    return affine + 0.0  # no negative zeros


def simple_itk(purpose: str) -> Any:
    sitk = optional("SimpleITK", "SimpleITK", purpose)
    sitk.ProcessObject.SetGlobalWarningDisplay(False)  # warnings go to stderr, past us: what matters is noted
    return sitk


def chosen_volume(path: Path, count: int, index: int | None) -> int | None:
    """Which of `count` volumes; None where there is no choice."""
    if count == 1:
        return None
    if index is None:
        raise UserError(f"{path} holds {count} volumes: choose one with --frame 0 ... {count - 1}")
    if not 0 <= index < count:
        raise UserError(f"{path} holds {count} volumes: there is no --frame {index}")
    return index


def optional(module: str, package: str, purpose: str) -> Any:
    """A module that is asked for where it is needed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{purpose} needs {package}: pip install {package}") from error


def reason(error: Exception) -> str:
    """The last line of what a library says, which is the one that says it, without its addresses."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return re.sub(r"^ITK ERROR: |\w+\(0x[0-9a-f]+\): ", "", lines[-1]) if lines else type(error).__name__


def listed(words: Iterable[str], most: int = 8) -> str:
    words = list(words)
    return ", ".join(words[:most]) + (f" and {len(words) - most} more" if len(words) > most else "")


def missing_words(words: Iterable[str], noun: str) -> str:
    words = list(words)
    return f"{len(words)} {noun}{'s are' if len(words) > 1 else ' is'} missing ({listed(words)})"
