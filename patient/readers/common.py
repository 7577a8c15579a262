"""What readers share: choices among volumes, optional libraries, limits, words, and stacks of pictures."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from patient.geometry import check_affine, swap_ras_lps
from patient.volumes import Volume
from utils.errors import UserError

DEFLATE = 1032
"""Most bytes that one byte of a deflate stream can become; other codecs of medical images reach less."""
_SMALL_CLAIM = 64 << 20  # bytes that any file may claim
NO_ORIENTATION = (
    "nothing in it says which way is left or up: axes are taken in order as left, posterior, superior"
)


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep the libraries' own messages, even those of C++, off stderr; with --debug let them through."""
    if "--debug" in sys.argv:
        yield
        return
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        kept = os.dup(2)
    except OSError:  # no stderr: nothing to silence
        kept = -1
    if kept >= 0:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
        if kept >= 0:
            os.dup2(kept, 2)
            os.close(kept)


@contextlib.contextmanager
def damage(path: Path, what: str = "is damaged") -> Iterator[None]:
    """Around calls of a library that decodes bytes: whatever damaged ones raise becomes a UserError."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        raise UserError(f"{path} {what}: {reason(error)}") from error


def check_claim(path: Path, claimed: int, stored: int | None = None, ratio: float = DEFLATE) -> None:
    """Refuse a header that asks for more memory than its file's bytes can fill, before anything is allocated.

    claimed: bytes of voxels. stored: bytes that hold them (default: the file's). ratio: most bytes per stored byte.
    """
    stored = path.stat().st_size if stored is None else stored
    if claimed > stored * ratio and (claimed > _SMALL_CLAIM or ratio == 1):
        raise UserError(
            f"{path} is damaged or cut off: its header claims {_bytes(claimed)} of voxels, which its"
            f" {_bytes(stored)} cannot hold"
        )


def _bytes(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:,.4g} {unit}" if count < 10**15 else f"{count / size:.3g} {unit}"
    return f"{count} bytes"


def check_path_is_text(path: Path, library: str) -> None:
    """Refuse a path that is not UTF-8, for libraries that crash on it."""
    try:
        os.fspath(path).encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(
            f"{os.fspath(path)!a}: its name is not UTF-8, which {library} cannot open: rename it"
        ) from None


def stacked(stack: np.ndarray, name: str, notes: list[str], **others: Any) -> Volume:
    """Pictures (frame, row, column[, channel]) as a Volume without a place in a patient."""
    if not stack.size:
        raise UserError(f"{name} is empty: its frames are {stack.shape[2]} x {stack.shape[1]} pixels")
    values = stack.transpose(2, 1, 0, *range(3, stack.ndim))
    full_scale = None
    if values.dtype in (np.uint8, np.uint16):
        full_scale = 0.0, float(np.iinfo(values.dtype).max)
    elif values.dtype.kind == "f" and values.min() >= 0 and values.max() <= 1:
        full_scale = 0.0, 1.0
    if values.dtype == np.uint16 and 255 < (largest := int(values.max())) < 4096:
        bits = 10 if largest < 1024 else 12
        notes.append(
            f"no pixel is above {largest}: {bits} bits in 16-bit pictures, which show dark; --window 0"
            f" {2**bits - 1} brightens them"
        )
    bits = 8 if values.dtype.itemsize == 1 else 16
    return Volume(values, None, bits, name, full_scale=full_scale, notes=notes, **others)


def grey(frames: np.ndarray) -> np.ndarray:
    """Decoded colours (frame, row, column, 3) uint8, or one channel if all are grey."""
    # A difference of two levels is rounding between colour spaces, not colour.
    apart = max(int(np.ptp(frame.astype(np.int16), axis=-1).max()) for frame in frames)
    return np.ascontiguousarray(frames[..., 1]) if apart <= 2 else frames


def from_lps(columns: np.ndarray, origin: Iterable[float], path: Path) -> np.ndarray:
    """The RAS affine of index steps (3, 3), one per column, and an origin in LPS."""
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
    sitk.ProcessObject.SetGlobalWarningDisplay(False)  # warnings would go to stderr; we note what matters
    return sitk


def chosen_volume(path: Path, count: int, index: int | None) -> int | None:
    """Which of `count` volumes; None if there is only one."""
    if count == 1:
        return None
    if index is None:
        raise UserError(f"{path} holds {count} volumes: choose one with --frame 0 ... {count - 1}")
    if not 0 <= index < count:
        raise UserError(f"{path} holds {count} volumes: there is no --frame {index}")
    return index


def optional(module: str, package: str, purpose: str) -> Any:
    """Import an optional module, or raise UserError that says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{purpose} needs {package}: pip install {package}") from error


def reason(error: Exception) -> str:
    """The last line of a library's message, which holds the reason, without memory addresses."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return re.sub(r"^ITK ERROR: |\w+\(0x[0-9a-f]+\): ", "", lines[-1]) if lines else type(error).__name__


def listed(words: Iterable[str], most: int = 8) -> str:
    words = list(words)
    return ", ".join(words[:most]) + (f" and {len(words) - most} more" if len(words) > most else "")


def missing_words(words: Iterable[str], noun: str) -> str:
    words = list(words)
    return f"{len(words)} {noun}{'s are' if len(words) > 1 else ' is'} missing ({listed(words)})"
