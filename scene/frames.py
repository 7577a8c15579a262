"""The input: a sequence of 2-D frames of one size, read once and kept at the depth it was stored with.

Frames are images, masks (one channel, 1 is inside), or label maps: then they are handed out with a channel per label.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from patient.label_channels import index_of_ids, one_hot
from patient.labels import LabelTable, Meaning, read_segmentation
from patient.stacks import case_geometry
from utils.errors import UserError
from utils.files import atomic_folder
from utils.images import READABLE, WRITABLE, frame_number, image_files, read_image, to_unit, write_image
from utils.threads import spare_processors

WIDEST = 1600  # pixels; resolution -1 scales wider frames down to this
DIVISORS = (1, 2, 4, 8)  # values of `resolution` that divide; others are a width in pixels

_ASK = "prepare.py -l makes masks of it: with --label_value of some labels, with --soft of probabilities"

# A sequence takes the widest type of its frames, in this order.
_DTYPES = (np.dtype(np.uint8), np.dtype(np.uint16), np.dtype(np.float32))
_BITS = {torch.uint8: 8, torch.int16: 16, torch.float32: 32}


@dataclass(frozen=True, eq=False)
class Frames:
    """K frames, compact in memory; call it to get some of them as floats.

    levels: (K, C, H, W), or (K, C + 1, H, W) with alpha last, where C is 1 for grey and 3 for colour. uint8
        levels are kept as they are, and floats in [0, 1] too. A uint16 level v is kept as the int16
        v - 32768: two bytes, in a type that every device and PyTorch version can index, unlike torch.uint16.
        Of a label map (K, 1, H, W), indices of `labels`: uint8, or int16 where there are more than 255 labels.
    names, numbers: of the files, in order.
    """

    levels: Tensor
    names: list[str]
    numbers: list[int]
    has_alpha: bool = False
    device: torch.device | str = "cpu"
    """Where frames are handed out; `levels.device` is where they are kept."""
    meaning: Meaning | None = None
    """Of masks, what their files' numbers mean; here inside is 1."""
    labels: LabelTable | None = None
    """Of a label map, which has two labels or more."""

    @classmethod
    def read(
        cls,
        folder: str | os.PathLike[str],
        resolution: int = -1,
        device: torch.device | str = "cpu",
        data_device: torch.device | str | None = None,
        say: Callable[[str], object] = print,
        consecutive: bool = True,
        masks: bool = False,
        meaning: Meaning | None = None,
    ) -> Frames:
        """Read all image files of `folder`, in the order of the number that ends their names.

        resolution: 1, 2, 4, 8 divide the size, another positive number is a width in pixels, -1 leaves frames
            up to WIDEST as they are.
        device: where frames are handed out. data_device: where they are kept (None: there too).
        say: called with each line that the user should see, such as a gap in the numbering.
        consecutive: whether numbers should be consecutive, so that a gap is worth a line.
        masks: read them by the rule of `patient.labels`: one channel, 1 is inside; a soft mask keeps its levels. A
            label map of two labels or more keeps them apart, with the names and colours of ``frames.json`` beside it.
        meaning: of masks, that of the sequence they were taken from.

        RGB frames that are all grey become one channel, and an alpha channel that is opaque throughout is dropped.
        Raises `UserError`: no folder, no frames, no or equal numbers, different sizes, unreadable files.
        """
        files = frame_files(folder)
        if consecutive:
            _report_gaps([frame_number(file) for file in files], say)
        planes: list[np.ndarray] = []
        alphas: list[np.ndarray | None] = []
        arrays: Iterable[np.ndarray] = map(read_image, files)
        labels = None
        if masks:
            arrays, meaning, labels = _masks(files, meaning, say)
        for file, array in zip(files, arrays, strict=True):
            height, width = array.shape[:2]
            if not planes:
                first = height, width
                size = _resized(height, width, resolution)
                if resolution == -1 and size != first:
                    say(f"frames are {width} wide: scaled to {size[1]} (--resolution {width} leaves them)")
            elif (height, width) != first:
                raise UserError(
                    f"frames differ in size (width x height): {files[0]} is {first[1]} x {first[0]}, "
                    f"{file.name} is {width} x {height}; make them equal"
                )
            if labels is not None:
                planes.append(_resize_labels(array, size)[None])
                alphas.append(None)
                continue
            colours, alpha = _resize(*_split(array), size)
            planes.append(colours)
            alphas.append(alpha)

        data_device = torch.device(device if data_device is None else data_device)
        device = torch.device(device)
        stored = np.stack(planes) if labels is not None else _with_alpha(planes, alphas)
        levels = torch.from_numpy(stored).to(data_device)
        has_alpha = any(alpha is not None for alpha in alphas)
        numbers = [frame_number(file) for file in files]
        return cls(levels, [file.name for file in files], numbers, has_alpha, device, meaning, labels)

    def __len__(self) -> int:
        return self.levels.shape[0]

    def take(self, indices: Sequence[int]) -> Frames:
        """Frames ``indices`` as a sequence of their own."""
        levels = self.levels[list(indices)]
        return replace(
            self,
            levels=levels.pin_memory() if self.levels.is_pinned() else levels,
            names=[self.names[k] for k in indices],
            numbers=[self.numbers[k] for k in indices],
        )

    @property
    def channels(self) -> int:
        """C: 1 for grey, 3 for colour, else one per label; alpha does not count."""
        return self.levels.shape[1] - self.has_alpha if self.labels is None else len(self.labels)

    @property
    def height(self) -> int:
        return self.levels.shape[2]

    @property
    def width(self) -> int:
        return self.levels.shape[3]

    @property
    def bits(self) -> int:
        """8 or 16 bits per channel; 32 for floats."""
        return _BITS[self.levels.dtype]

    def __call__(
        self,
        indices: int | Sequence[int] | Tensor,
        mirrored: bool | Tensor = False,
        background: Tensor | None = None,
    ) -> Tensor:
        """Frames `indices` as floats in [0, 1], (B, C, H, W), on `device`; of a label map 0 and 1, made on request.

        indices, mirrored: as tensors (B,) and () on `device`, nothing waits for them where frames are kept there too.
        mirrored: flip them left-right, as the mirror camera sees them.
        background: (C,) in [0, 1], behind transparent frames; None is black.
        """
        if not isinstance(indices, Tensor):
            indices = torch.tensor([indices] if isinstance(indices, int) else list(indices), dtype=torch.long)
            for k in indices.tolist():
                if not 0 <= k < len(self):  # a frame before the first is never the last one
                    raise IndexError(f"frame {k} of {len(self)}")
        frames = _send(self.levels[_send(indices, self.levels.device)], self.device)
        if self.labels is not None:
            return one_hot(_flipped(frames, mirrored), len(self.labels))
        if frames.dtype == torch.uint8:
            frames = frames / 255
        elif frames.dtype == torch.int16:
            frames = (frames.float() + 32768) / 65535
        if self.has_alpha:
            frames, alpha = frames[:, :-1], frames[:, -1:]
            frames = frames * alpha
            if background is not None:
                frames = frames + (1 - alpha) * background.view(1, -1, 1, 1)
        return _flipped(frames, mirrored)

    def index(self, indices: Sequence[int] | slice = slice(None)) -> Tensor:
        """Frames `indices` of a label map as indices of `labels`, (B, 1, H, W) uint8 or int16, on `device`."""
        if self.labels is None:
            raise ValueError("these frames are no label map")
        return _send(self.levels[indices], self.device)


def _flipped(frames: Tensor, mirrored: bool | Tensor) -> Tensor:
    if isinstance(mirrored, Tensor):
        return torch.where(mirrored, frames.flip(-1), frames)
    return frames.flip(-1) if mirrored else frames


def _send(tensor: Tensor, device: torch.device | str) -> Tensor:
    """``tensor`` on ``device``. Only copies to a GPU need not wait: what is read from one must have arrived."""
    return tensor.to(device, non_blocking=torch.device(device).type == "cuda")


def frame_files(folder: str | os.PathLike[str]) -> list[Path]:
    """The image files of `folder` in the order of the number that ends their names.

    Raises `UserError` where there are none, where a name has no number, and where two have the same.
    """
    if not Path(folder).is_dir():
        raise UserError(f"{folder} is not a folder: the frames belong there, as 0000.png, 0001.png, ...")
    files = image_files(folder)
    if not files:
        raise UserError(
            f"{folder} holds no frames: put 0000.png, 0001.png, ... there ({', '.join(READABLE)})"
        )
    by_number: dict[int, Path] = {}
    for file in files:
        other = by_number.setdefault(frame_number(file), file)
        if other is not file:
            raise UserError(f"{other} and {file.name} have the same number: remove or rename one of them")
    return [by_number[number] for number in sorted(by_number)]


def _masks(
    files: list[Path], known: Meaning | None, say: Callable[[str], object]
) -> tuple[list[np.ndarray], Meaning, LabelTable | None]:
    """Masks in full scale of their type: bytes 0 and 255, or soft ones as they are. Of a label map of two labels or
    more, indices and the labels."""
    geometry = case_geometry(files[0].parent)
    names = LabelTable() if geometry is None or geometry.labels is None else geometry.labels
    found = read_segmentation(files, known, known=names.ids, ask=_ASK)
    meaning = found.meaning
    if known is None:
        for note in meaning.notes:
            say(note)
    try:
        labels = names.of({*names.ids, *meaning.ids}) if meaning.kind == "labels" else LabelTable()
    except ValueError as error:
        raise UserError(f"{files[0].parent}: {error}") from error
    if len(labels) > 1:
        if known is None:
            say(f"{files[0].parent}: {len(labels)} labels: {labels.words()}")
        kind = np.uint8 if len(labels) <= 255 else np.int16
        ids = (torch.from_numpy(meaning.numbers(frame)) for frame in found.frames)
        return [index_of_ids(frame, labels).numpy().astype(kind) for frame in ids], meaning, labels
    full = (
        [np.uint8(255) * meaning.inside(frame) for frame in found.frames] if meaning.kind != "soft" else None
    )
    if full is None:
        kept = all(frame.dtype in _DTYPES and _full(frame.dtype) == meaning.scale for frame in found.frames)
        full = found.frames if kept else [meaning.shares(frame) for frame in found.frames]
    return full, meaning, None


def write_mirror(
    folder: str | os.PathLike[str], mirror: str | os.PathLike[str], say: Callable[[str], object] = print
) -> None:
    """Write the left-right flipped frames of `folder` to `mirror`, unless that is there.

    It is part of the published layout, and other programs may look for it. Nothing here reads it, so failing to
    write it is only a notice.
    """
    if os.path.lexists(mirror):
        return
    try:
        with atomic_folder(mirror) as temporary, ThreadPoolExecutor(spare_processors()) as threads:

            def flip(file: Path) -> None:
                array = read_image(file)
                name = file.name if file.suffix.lower() in WRITABLE else f"{file.stem}.png"
                write_image(temporary / name, to_unit(array[:, ::-1]), 8 if array.dtype == np.uint8 else 16)

            list(threads.map(flip, frame_files(folder)))
    except OSError as error:
        say(f"{mirror} cannot be written ({error.strerror}): going on, as only other programs need it")


def _report_gaps(numbers: list[int], say: Callable[[str], object]) -> None:
    for before, after in pairwise(numbers):
        if after != before + 1:
            say(
                f"frame numbers have gaps (the first after {before}): the order is used, "
                "and frames count as evenly spaced"
            )
            return


def _resized(height: int, width: int, resolution: int) -> tuple[int, int]:
    """The frames' (height, width) under the option `resolution`."""
    if resolution in DIVISORS:
        return max(1, round(height / resolution)), max(1, round(width / resolution))
    target = min(width, WIDEST) if resolution == -1 else resolution
    return max(1, round(height * target / width)), target


def _split(array: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """(H, W), (H, W, 3) or (H, W, 4) -> colours (1 or 3, H, W), one where all are equal, and alpha (H, W) or None."""
    alpha = array[:, :, 3] if array.shape[2:] == (4,) else None
    if alpha is not None and (alpha == _full(alpha.dtype)).all():
        alpha = None
    colours = array[None] if array.ndim == 2 else np.moveaxis(array[:, :, :3], 2, 0)
    if (colours == colours[:1]).all():
        colours = colours[:1]
    return np.ascontiguousarray(colours), alpha


def _resize(
    colours: np.ndarray, alpha: np.ndarray | None, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray | None]:
    """Antialiased bicubic to (height, width) in the same type, at its full depth: 16 bits stay 16 bits."""
    if colours.shape[1:] == size:
        return colours, alpha
    full = _full(colours.dtype)
    values = torch.from_numpy(colours.astype(np.float32) / np.float32(full))
    if alpha is not None:  # transparent pixels have no colour to give to their neighbours
        opacity = torch.from_numpy(alpha.astype(np.float32) / np.float32(full))
        values = torch.cat((values * opacity, opacity[None]))
    values = interpolate(values[None], size, mode="bicubic", antialias=True)[0].clamp(0, 1)

    def stored(values: Tensor) -> np.ndarray:
        levels = values.numpy()
        return levels if full == 1 else np.rint(levels * full).astype(colours.dtype)

    if alpha is None:
        return stored(values), None
    opacity = values[-1]
    return stored((values[:-1] / opacity.clamp(min=1e-6)).clamp(0, 1)), stored(opacity)


def _resize_labels(index: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Indices (H, W) at another (height, width): each pixel gets the label that covers most of it."""
    if index.shape == size:
        return index
    out, most = np.zeros(size, index.dtype), np.full(size, -np.inf, np.float32)
    for number in np.unique(index):
        share = torch.from_numpy((index == number).astype(np.float32))[None, None]
        covered = interpolate(share, size, mode="bicubic", antialias=True)[0, 0].numpy()
        out[covered > most] = number
        most = np.maximum(most, covered)
    return out


def _full(dtype: np.dtype) -> int:
    return 1 if dtype == np.float32 else int(np.iinfo(dtype).max)


def _with_alpha(planes: list[np.ndarray], alphas: list[np.ndarray | None]) -> np.ndarray:
    """The frames as one array (K, C [+ 1], H, W) in the type that `Frames.levels` describes."""
    dtype = max((plane.dtype for plane in planes), key=_DTYPES.index)
    channels = max(plane.shape[0] for plane in planes)
    has_alpha = any(alpha is not None for alpha in alphas)
    levels = np.empty((len(planes), channels + has_alpha, *planes[0].shape[1:]), dtype)
    for frame, plane, alpha in zip(levels, planes, alphas, strict=True):
        frame[:channels] = _convert(plane, dtype)
        if has_alpha:
            frame[channels] = _full(dtype) if alpha is None else _convert(alpha, dtype)
    return (levels ^ np.uint16(0x8000)).view(np.int16) if dtype == np.uint16 else levels


def _convert(levels: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Levels in a type at least as wide, where full scale stays full scale."""
    if levels.dtype == dtype:
        return levels
    if dtype == np.float32:
        return to_unit(levels)
    return levels.astype(dtype) * np.uint16(_full(dtype) // _full(levels.dtype))
