"""Files of several pictures, read by Pillow."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageSequence

from patient.geometry import is_even
from patient.readers.common import damage, grey, quiet_libraries, stacked
from patient.volumes import Choice, Volume
from utils.errors import UserError
from utils.images import check_pixels

_LARGE = 256 << 20  # bytes of decoded pictures that a file under 1 MB may hold
_LARGEST = 4 << 30


def read(path: Path, choice: Choice) -> Volume:
    """An animated GIF, or another file of several pictures that Pillow reads."""
    frames: list[np.ndarray] = []
    times = [0.0]
    limit = _LARGE if path.stat().st_size < 1 << 20 else _LARGEST
    with quiet_libraries(), damage(path, "cannot be read"), Image.open(path) as image:
        check_pixels(path, *image.size)
        for frame in ImageSequence.Iterator(image):
            if (len(frames) + 1) * frame.size[0] * frame.size[1] * 3 > limit:
                raise UserError(
                    f"{path} claims pictures of {frame.size[0]} x {frame.size[1]} pixels, of which {len(frames) + 1} do"
                    " not fit: it is damaged, or too large"
                )
            known = frame.mode in ("L", "F", "I;16", "RGB") and path.suffix.lower() != ".gif"
            frames.append(np.array(frame if known else frame.convert("RGB")))
            times.append(times[-1] + float(frame.info.get("duration") or 0))
    if len({frame.shape for frame in frames}) > 1:
        raise UserError(f"{path} holds pictures of several sizes: frames have one size")
    stack = np.stack(frames)
    notes: list[str] = []
    depths, starts = None, np.array(times[:-1])
    if len(starts) > 2 and (np.diff(starts) > 0).all() and not is_even(starts):
        depths = starts / float(np.median(np.diff(starts)))
        notes.append("its pictures are shown for unequal times, which are kept")
    return stacked(grey(stack) if stack.ndim == 4 else stack, path.name, notes, depths=depths)
