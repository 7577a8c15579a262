"""Videos, decoded by ffmpeg."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from patient.readers.common import grey, optional, stacked
from patient.volumes import Choice, Volume
from utils.errors import UserError
from utils.images import check_pixels

_MAX_VIDEO = (
    4 << 30
)  # bytes of decoded frames: a quarter of an hour of ultrasound; a film would fill the memory


def read(path: Path, choice: Choice) -> Volume:
    """The frames of a video, 8-bit; grey where no pixel has colour."""
    ffmpeg = optional("imageio_ffmpeg", "imageio-ffmpeg", f"reading {path}")
    frames = []
    try:
        decoder = ffmpeg.read_frames(path)
        width, height = next(decoder)["size"]
        check_pixels(path, width, height)
        for data in decoder:
            frames.append(np.frombuffer(data, np.uint8).reshape(height, width, 3))
            if len(frames) * len(data) > _MAX_VIDEO:
                raise UserError(
                    f"{path} is longer than {len(frames) - 1} frames of {width} x {height}, which is what fits: cut out"
                    " the part that you need (ffmpeg -ss START -t SECONDS -i ...)"
                )
    except (OSError, RuntimeError, KeyError) as error:
        raise UserError(f"{path} cannot be read: not a video, or damaged") from error
    if not frames:
        raise UserError(f"{path} has no frames that ffmpeg can decode")
    return stacked(grey(np.stack(frames)), path.name, [], lossy=True)
