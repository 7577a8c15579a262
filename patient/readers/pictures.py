"""Files of several pictures that Pillow reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageSequence

from patient.readers.common import grey, reason, stacked
from patient.volumes import Choice, Volume
from utils.errors import UserError
from utils.images import check_pixels


def read(path: Path, choice: Choice) -> Volume:
    """An animated GIF, or another file of several pictures that Pillow reads."""
    frames = []
    try:
        with Image.open(path) as image:
            check_pixels(path, *image.size)
            for frame in ImageSequence.Iterator(image):
                known = frame.mode in ("L", "F", "I;16", "RGB") and path.suffix.lower() != ".gif"
                frames.append(np.array(frame if known else frame.convert("RGB")))
    except UserError:
        raise
    except Exception as error:  # each decoder has exceptions of its own for damaged bytes
        raise UserError(f"{path} cannot be read: {reason(error)}") from error
    if len({frame.shape for frame in frames}) > 1:
        raise UserError(f"{path} holds pictures of several sizes: frames have one")
    stack = np.stack(frames)
    return stacked(grey(stack) if stack.ndim == 4 else stack, path.name, [])
