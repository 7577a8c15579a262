"""Videos, decoded by ffmpeg in a separate process."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import numpy as np

from patient.geometry import is_even
from patient.readers.common import check_path_is_text, grey, optional, quiet_libraries, stacked
from patient.volumes import Choice, Volume
from utils.errors import UserError
from utils.images import check_pixels

_MAX_VIDEO = 4 << 30
"""Most bytes of decoded frames: a quarter of an hour of ultrasound; a film would fill the memory."""
_MAX_SMALL = 256 << 20
"""The same for a file under 1 MB."""


def read(path: Path, choice: Choice) -> Volume:
    """The frames of a video, 8-bit, at their times; grey if no pixel has colour."""
    with quiet_libraries():
        frames, times = decode(path, str(path))
    notes: list[str] = []
    depths = None
    if times is not None and not is_even(times):
        depths = (times - times[0]) / float(np.median(np.diff(times)))
        notes.append(
            f"its frames are unevenly spaced in time, {np.diff(times).min():.4g} to {np.diff(times).max():.4g} s"
            " apart, and keep their times"
        )
    return stacked(frames, path.name, notes, lossy=True, depths=depths)


def decode(path: Path, name: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Frames (frame, row, column[, 3]) uint8, none doubled or dropped, and their times (s) if the file has them."""
    check_path_is_text(path, "ffmpeg")
    ffmpeg = optional("imageio_ffmpeg", "imageio-ffmpeg", f"reading {name}")
    limit = _MAX_SMALL if path.stat().st_size < 1 << 20 else _MAX_VIDEO
    frames: list[np.ndarray] = []
    try:
        decoder = ffmpeg.read_frames(path, output_params=["-fps_mode", "passthrough"])
        width, height = next(decoder)["size"]
        check_pixels(path, width, height)
        for data in decoder:
            frames.append(np.frombuffer(data, np.uint8).reshape(height, width, 3))
            if len(frames) * len(data) > limit:
                decoder.close()
                raise UserError(
                    f"{name} is longer than the {len(frames) - 1} frames of {width} x {height} that fit: cut out"
                    " the part that you need (ffmpeg -ss START -t SECONDS -i ...)"
                )
    except (OSError, RuntimeError, KeyError, ValueError, IndexError) as error:
        raise UserError(f"{name} cannot be read: not a video, or damaged") from error
    if not frames:
        raise UserError(f"{name} has no frames that ffmpeg can decode")
    return grey(np.stack(frames)), _times(ffmpeg.get_ffmpeg_exe(), path, len(frames))


def _times(ffmpeg: str, path: Path, count: int) -> np.ndarray | None:
    """Time of each decoded frame in seconds; None if they do not increase, or a frame has none."""
    command = [ffmpeg, "-v", "error", "-i", os.fspath(path), "-map", "0:v:0", "-fps_mode", "passthrough"]
    done = subprocess.run([*command, "-f", "framecrc", "-"], capture_output=True, text=True, errors="replace")
    base = re.search(r"^#tb 0: (\d+)/(\d+)", done.stdout, re.M)
    rows = [line.split(",") for line in done.stdout.splitlines() if not line.startswith("#")]
    stamps = [row[2].strip() for row in rows if len(row) > 3]
    if base is None or len(stamps) != count or not all(re.fullmatch(r"-?\d+", stamp) for stamp in stamps):
        return None
    times = np.array(stamps, float) * int(base[1]) / int(base[2])
    return times if (np.diff(times) > 0).all() else None
