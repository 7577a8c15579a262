"""A rendered sequence as a video that marks which images are input frames and which lie between."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from patient.labels import LabelTable
from utils.errors import UserError
from utils.files import atomic_write
from utils.images import read_image, read_levels, to_unit

_SIDE = 480  # px: smaller pictures are enlarged to it
_GAP, _STRIP = 8, 44  # px: between pictures, and the margin below them
_ACCENT, _FAINT, _WHITE = (255, 176, 59), (150, 150, 150), (235, 235, 235)
_MOST_GIF = 50  # images per second; browsers slow down anything faster


@dataclass(frozen=True)
class Shot:
    """One image of the video: the files shown side by side, and its place in the sequence."""

    files: Sequence[Path]
    frame: int
    sub_frame: int
    sub_frames: int
    labels: Sequence[LabelTable | None] = ()
    """Of each file, if it is a label map."""

    @property
    def position(self) -> float:
        return self.frame + self.sub_frame / self.sub_frames


def video_format(wanted: str) -> str:
    """ "mp4" or "gif" for "auto", "mp4" or "gif". Raises `UserError` if MP4 is requested and cannot be written."""
    if wanted == "gif" or (wanted == "auto" and _ffmpeg() is None):
        return "gif"
    if _ffmpeg() is None:
        raise UserError(
            "--video_format mp4 needs imageio-ffmpeg: pip install imageio-ffmpeg, or take --video_format gif"
        )
    return "mp4"


def write_video(path: Path, shots: Sequence[Shot], rate: float, pixel_aspect: float = 1.0) -> None:
    """``shots`` at ``rate`` images per second, as MP4 or GIF by the suffix of ``path``; complete or absent.

    pixel_aspect: height of a pixel over its width. An MP4 needs one shot in memory at a time.
    """
    pictures = _pictures(shots, pixel_aspect)
    with atomic_write(path) as temporary:
        if path.suffix == ".mp4":
            first = next(pictures)
            writer = _ffmpeg().write_frames(
                str(temporary),
                first.size,
                fps=rate,
                quality=None,
                macro_block_size=2,
                output_params=["-crf", "17", "-movflags", "+faststart"],
            )
            writer.send(None)
            try:
                writer.send(np.asarray(first).tobytes())
                for picture in pictures:
                    writer.send(np.asarray(picture).tobytes())
            finally:
                writer.close()
        else:
            # Hundredths of a second, rounded so that the total duration is right.
            ends = np.rint(np.arange(len(shots) + 1) * 100 / min(rate, _MOST_GIF))
            palette = _palette([table for table in shots[0].labels if table is not None])
            first, *others = (
                picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures
            )
            first.save(
                temporary,
                format="GIF",
                save_all=True,
                append_images=others,
                duration=(10 * np.diff(ends)).astype(int).tolist(),
                loop=0,
            )


def _ffmpeg() -> Any:
    try:
        return importlib.import_module("imageio_ffmpeg")
    except ImportError:
        return None


def _pictures(shots: Sequence[Shot], pixel_aspect: float) -> Iterator[Image.Image]:
    """Each shot as shown: RGB with even width and height, which encoders need."""
    last = max(shot.frame for shot in shots)
    font = _font(17)
    for shot in shots:
        tables = shot.labels or [None] * len(shot.files)
        images = [
            _displayed(read_image(file), pixel_aspect)
            if labels is None
            else _displayed(_coloured(read_levels(file), labels), pixel_aspect, Image.Resampling.NEAREST)
            for file, labels in zip(shot.files, tables, strict=True)
        ]
        width = sum(image.width for image in images) + _GAP * (len(images) - 1)
        height = images[0].height + _STRIP
        picture = Image.new("RGB", (width + width % 2, height + height % 2))
        left = 0
        for image in images:
            picture.paste(image, (left, 0))
            left += image.width + _GAP
        _mark(ImageDraw.Draw(picture), (width, images[0].height), shot, last, font)
        yield picture


def _coloured(ids: np.ndarray, labels: LabelTable) -> np.ndarray:
    """Ids (H, W) in the labels' colours, (H, W, 3) uint8."""
    palette = np.zeros((max(int(ids.max()), *labels.ids) + 1, 3), np.uint8)
    for label in labels:
        palette[label.id] = label.colour
    return palette[ids]


def _displayed(
    array: np.ndarray, pixel_aspect: float, how: Image.Resampling = Image.Resampling.BICUBIC
) -> Image.Image:
    """An image with square pixels, enlarged if it is small."""
    unit = to_unit(array)[..., :3] if array.ndim == 3 else to_unit(array)
    image = Image.fromarray(np.rint(unit * 255).astype(np.uint8)).convert("RGB")
    width, height = image.width * max(1.0, 1 / pixel_aspect), image.height * max(1.0, pixel_aspect)
    scale = max(1.0, _SIDE / max(width, height))
    return image.resize((round(width * scale), round(height * scale)), how)


def _mark(
    draw: ImageDraw.ImageDraw, corner: tuple[int, int], shot: Shot, last: int, font: ImageFont.FreeTypeFont
) -> None:
    """Below the pictures: which frame this is, or which two it lies between, and a timeline with a cursor."""
    width, top = corner
    is_input = shot.sub_frame == 0
    words = f"frame {shot.frame}" if is_input else f"{shot.frame} + {shot.sub_frame}/{shot.sub_frames}"
    middle = top + 16
    radius = 5
    box = (8, middle - radius, 8 + 2 * radius, middle + radius)
    draw.ellipse(box, fill=_ACCENT if is_input else None, outline=_ACCENT if is_input else _FAINT, width=2)
    draw.text((26, middle), words, font=font, fill=_ACCENT if is_input else _FAINT, anchor="lm")
    draw.text(
        (width - 8, middle),
        "input frame" if is_input else "in between",
        font=font,
        fill=_ACCENT if is_input else _FAINT,
        anchor="rm",
    )
    line, start, length = top + 35, 8, width - 17
    draw.line((start, line, start + length, line), fill=_FAINT)
    if 0 < last < length // 4:
        for k in range(last + 1):
            x = start + length * k / last
            draw.line((x, line - 3, x, line + 3), fill=_ACCENT if is_input and k == shot.frame else _FAINT)
    x = start + length * shot.position / max(last, 1)
    draw.line((x, line - 6, x, line + 6), fill=_ACCENT if is_input else _WHITE, width=3)


def _font(size: int) -> ImageFont.FreeTypeFont:
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)


def _palette(tables: Sequence[LabelTable]) -> Image.Image:
    """For GIF: greys, the accent's shades, the labels' colours, and a coarse cube of colours."""
    greys = [(v, v, v) for v in np.linspace(0, 255, 128).astype(int)]
    shades = [tuple(int(c * share) for c in _ACCENT) for share in (0.25, 0.5, 0.75, 1)]
    cube = [(r, g, b) for r in range(0, 256, 64) for g in range(0, 256, 51) for b in range(0, 256, 64)]
    labels = [label.colour for table in tables for label in table]
    colours = (greys + shades + labels + cube)[:256]
    palette = Image.new("P", (1, 1))
    palette.putpalette([int(channel) for colour in colours for channel in colour])
    return palette
