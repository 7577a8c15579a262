"""Image files in and out at their own depth: 8 or 16 bits, grey, RGB or RGBA, and float arrays (.npy, .tif)."""

from __future__ import annotations

import os
import re
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from utils.errors import UserError
from utils.files import atomic_write

MAX_PIXELS = 8192 * 8192
"""A PNG of a few kB can claim any size. This exceeds any scanner's frame, and is 1 GiB as float RGBA."""
_limit = MAX_PIXELS
Image.MAX_IMAGE_PIXELS = None  # Pillow's own guard: a warning on stderr first, and no file name

READABLE = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".npy")
WRITABLE = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".npy")

_AnyPath = TypeVar("_AnyPath", str, Path)


def limit_pixels(limit: int) -> None:
    """Refuse image files of more pixels from now on; before any call, `MAX_PIXELS` is the limit."""
    global _limit
    _limit = limit


def natural_order(paths: Iterable[_AnyPath]) -> list[_AnyPath]:
    """Paths sorted by the numbers in their file names: 2.png before 10.png, 00003_2.png before 00003_10.png."""

    def key(path: _AnyPath) -> tuple[list[tuple[int, int, str]], str]:
        name = os.path.basename(path)
        parts = re.split(r"([0-9]+)", os.path.splitext(name)[0])
        # The two kinds of part never meet in a comparison of values: the leading 0 or 1 tells them apart first.
        return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts if part], name

    return sorted(paths, key=key)


def image_files(folder: str | os.PathLike[str], extensions: Iterable[str] = READABLE) -> list[Path]:
    """The image files of a folder in natural order; hidden files and other file types are left out."""
    wanted = {extension.lower() for extension in extensions}
    try:
        return natural_order(
            path
            for path in Path(folder).iterdir()
            if path.suffix.lower() in wanted and not path.name.startswith(".") and path.is_file()
        )
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder} is not a folder") from None


def frame_number(file: Path) -> int:
    """The last number in a file's name, which says which frame it is. Raises UserError where there is none."""
    groups = re.findall(r"[0-9]+", file.stem)
    if not groups:
        raise UserError(f"{file} has no number in its name: frames are ordered by it, as in 0000.png")
    return int(groups[-1])


def read_image(path: str | os.PathLike[str]) -> np.ndarray:
    """One frame as (H, W) grey, (H, W, 3) RGB or (H, W, 4) RGBA: uint8, uint16, or float32 as stored.

    Palettes become the colours they stand for, 1-bit images 0 and 255, grey with transparency RGBA. Raises UserError
    for a missing or damaged file, a kind of image that is not a frame, and more pixels than `limit_pixels` said.
    """
    return _read(Path(path))


def _read(path: Path, levels: bool = False) -> np.ndarray:
    """`read_image`, or `read_levels`."""
    suffix = path.suffix.lower()
    try:
        if suffix == ".npy":
            array = _read_npy(path, levels)
        elif suffix in (".tif", ".tiff"):
            array = _read_tiff(path, levels)
        else:
            array = _read_pillow(path, levels)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except PermissionError:
        raise UserError(f"{path} may not be read: check its permissions") from None
    except Exception as error:  # each decoder raises its own exceptions for damaged bytes
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else f"damaged ({error})"
        raise UserError(f"{path} cannot be read: {reason}") from error
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim != 2 and not (array.ndim == 3 and array.shape[2] in (3, 4)):
        raise UserError(
            f"{path} holds an array of shape {array.shape}: a frame is (H, W), (H, W, 3) or (H, W, 4)"
        )
    if array.size == 0:
        raise UserError(f"{path} is empty: its shape is {array.shape}")
    return (
        array if array.flags.writeable else array.copy()
    )  # torch.from_numpy warns about Pillow's own buffers


def read_levels(path: str | os.PathLike[str]) -> np.ndarray:
    """One mask or label map as stored numbers: (H, W), or (H, W, 3 or 4) where it has colours.

    Palette images give their indices, 1-bit ones 0 and 1; integers of any width and sign, and any finite floats, are
    returned as they are. Raises UserError as `read_image` does.
    """
    return _read(Path(path), levels=True)


def is_indexed(path: str | os.PathLike[str]) -> bool:
    """Whether an image file holds palette indices, by its header."""
    try:
        with Image.open(path) as image:
            return image.mode in ("P", "PA")
    except (OSError, ValueError, SyntaxError):  # kinds that Pillow does not know have no palette
        return False


def to_unit(array: np.ndarray) -> np.ndarray:
    """Stored values to float32 in [0, 1] by their type's full range; floats are assumed to be in it already."""
    if array.dtype == np.bool_:
        return array.astype(np.float32)
    if np.issubdtype(array.dtype, np.unsignedinteger):
        return array.astype(np.float32) / np.float32(np.iinfo(array.dtype).max)
    if np.issubdtype(array.dtype, np.floating):
        return array.astype(np.float32)
    raise TypeError(f"no full range for {array.dtype}: images are unsigned integers, booleans or floats")


def to_grey(array: np.ndarray) -> np.ndarray:
    """(H, W), (H, W, 3) or (H, W, 4) to (H, W), float32 in [0, 1]: the mean of the colours, alpha left out."""
    unit = to_unit(array)
    return unit if unit.ndim == 2 else unit[:, :, :3].mean(axis=2)


def write_image(path: str | os.PathLike[str], array: np.ndarray, bits: int = 8) -> None:
    """Write values in [0, 1], (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), by the suffix of `path`.

    .png and .tif round to `bits` (8 or 16), .jpg to 8; .npy keeps float32, whatever `bits`. Values outside [0, 1]
    are clamped, NaN becomes 0. The file is complete or not there.
    """
    if bits not in (8, 16):
        raise ValueError(f"bits is 8 or 16, not {bits}")
    values = np.clip(np.nan_to_num(np.asarray(array, np.float64), nan=0.0), 0.0, 1.0)
    if Path(path).suffix.lower() == ".npy":
        values = _without_axis(values)
        with atomic_write(path, sync=False) as temporary:
            np.save(temporary, values.astype(np.float32))
    else:
        write_levels(path, np.rint(values * (2**bits - 1)).astype(np.uint8 if bits == 8 else np.uint16))


def write_levels(path: str | os.PathLike[str], levels: np.ndarray) -> None:
    """Write levels uint8 or uint16, of the shapes of `write_image`, as they are: .png, .tif, and of uint8 .jpg."""
    path = Path(path)
    suffix = path.suffix.lower()
    levels = _without_axis(levels)
    if suffix not in WRITABLE:
        raise UserError(
            f"images are written as {', '.join(WRITABLE)}, not as {suffix or 'a file without a suffix'}"
        )
    if suffix in (".jpg", ".jpeg") and (levels.dtype != np.uint8 or levels.shape[2:] == (4,)):
        raise UserError(
            f"{path}: JPEG holds 8-bit grey or RGB; write .png or .tif for 16 bits or transparency"
        )
    with atomic_write(path, sync=False) as temporary:
        if suffix == ".png":
            temporary.write_bytes(_encode_png(levels))
        elif suffix in (".tif", ".tiff"):
            import tifffile  # most frames are PNG

            extra = ["unassalpha"] if levels.shape[2:] == (4,) else None
            photometric = "minisblack" if levels.ndim == 2 else "rgb"
            tifffile.imwrite(
                temporary, levels, photometric=photometric, extrasamples=extra, compression="zlib"
            )
        else:
            Image.fromarray(levels).save(temporary, format="JPEG", quality=95)


def _without_axis(array: np.ndarray) -> np.ndarray:
    """(H, W, 1) as (H, W); the other shapes of an image as they are."""
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim != 2 and not (array.ndim == 3 and array.shape[2] in (3, 4)):
        raise ValueError(f"an image is (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), not {array.shape}")
    return array


def check_pixels(path: Path, width: int, height: int) -> None:
    """Raise UserError where an image of that size exceeds the limit of `limit_pixels`; called before decoding."""
    if width * height > _limit:
        raise UserError(
            f"{path} is {width} x {height} pixels, over the limit of {_limit:,}: make it smaller, or raise the limit "
            "with --max_pixels"
        )


def _read_npy(path: Path, levels: bool) -> np.ndarray:
    array = np.load(
        path, mmap_mode="r", allow_pickle=False
    )  # a header only: sizes are checked before any reading
    if array.ndim >= 2:
        check_pixels(path, array.shape[1], array.shape[0])
    return _frame_type(path, np.array(array), levels)


def _read_tiff(path: Path, levels: bool) -> np.ndarray:
    import tifffile

    with tifffile.TiffFile(path) as file:
        if len(file.pages) != 1:
            raise UserError(f"{path} holds {len(file.pages)} pages: write each frame into a file of its own")
        page = file.pages.first
        check_pixels(path, page.imagewidth, page.imagelength)
        photometric, planar = page.photometric, page.planarconfig
        try:
            array = page.asarray()
        except ValueError as error:
            if "imagecodecs" not in str(error):
                raise
            return _read_pillow(path, levels)  # LZW, JPEG and fax codecs, which come with Pillow
        if photometric == tifffile.PHOTOMETRIC.PALETTE and not levels:
            return (page.colormap[:, array] // 257).astype(np.uint8).transpose(1, 2, 0)
    if planar == tifffile.PLANARCONFIG.SEPARATE and array.ndim == 3:
        array = array.transpose(1, 2, 0)
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * np.uint8(255)
    if photometric == tifffile.PHOTOMETRIC.MINISWHITE:
        array = np.invert(array)
    if array.ndim == 3 and array.shape[2] == 2:
        array = array[:, :, (0, 0, 0, 1)]
    return _frame_type(path, array, levels)


def _frame_type(path: Path, array: np.ndarray, levels: bool) -> np.ndarray:
    if levels and array.dtype.kind in "iuf":
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise UserError(f"{path} holds NaN or infinite values: a mask has a number for each pixel")
        kind = array.dtype.newbyteorder("=")
        return np.ascontiguousarray(array, np.float32 if kind == np.float16 else kind)
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * np.uint8(255)
    if array.dtype in (np.uint8, np.uint16):
        return np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))
    if np.issubdtype(array.dtype, np.floating):
        if not np.isfinite(array).all() or array.min(initial=0) < 0 or array.max(initial=0) > 1:
            raise UserError(f"{path} holds floats outside [0, 1]: scale them into it first")
        return array.astype(np.float32)
    raise UserError(f"{path} holds {array.dtype}: frames are uint8, uint16 or floats in [0, 1]")


def _read_pillow(path: Path, levels: bool) -> np.ndarray:
    with Image.open(path) as image:
        check_pixels(path, *image.size)
        if getattr(image, "n_frames", 1) > 1:
            raise UserError(f"{path} holds {image.n_frames} images: write each frame into a file of its own")
        if image.format == "JPEG":
            return _read_jpeg(image)
        raw_mode = image.tile[0][3] if image.format == "PNG" and image.tile else ""
        if raw_mode in ("RGB;16B", "RGBA;16B", "LA;16B"):
            return _read_png16(path, raw_mode)
        if levels and image.mode in ("P", "PA"):
            return np.asarray(image if image.mode == "P" else image.getchannel("P"))
        if levels and image.mode in ("1", "I", "F"):
            return np.asarray(image).astype(np.uint8) if image.mode == "1" else np.asarray(image)
        if image.mode.startswith("I"):
            array = np.asarray(image)
            if array.min() < 0 or array.max() > 65535:
                raise UserError(f"{path} has 32-bit pixels: frames have 8 or 16 bits")
            return array.astype(np.uint16)
        if "transparency" in image.info or image.mode in ("LA", "PA", "La", "RGBa"):
            return np.asarray(image.convert("RGBA"))
        if image.mode == "P":
            colours = np.asarray(image.convert("RGB"))
            grey = (colours == colours[:, :, :1]).all()
            return np.ascontiguousarray(colours[:, :, 0]) if grey else colours
        if image.mode == "1":
            return np.asarray(image.convert("L"))
        return np.asarray(image if image.mode in ("L", "RGB", "RGBA") else image.convert("RGB"))


def _read_jpeg(image: Image.Image) -> np.ndarray:
    """A JPEG rotated as its EXIF orientation says."""
    upright = ImageOps.exif_transpose(image)
    return np.asarray(upright if upright.mode in ("L", "RGB") else upright.convert("RGB"))


def _read_png16(path: Path, raw_mode: str) -> np.ndarray:
    """A 16-bit colour PNG, of which Pillow keeps 8 bits: asked for the other byte order, it keeps the other 8."""

    def decode(mode: str) -> np.ndarray:
        with Image.open(path) as image:
            tile = image.tile[0]
            image.tile = [tile._replace(args=mode) if hasattr(tile, "_replace") else (*tile[:3], mode)]
            return np.asarray(image).astype(np.uint16)

    if raw_mode == "LA;16B":
        quads = decode("RGBA")  # the same four bytes per pixel: grey high, grey low, alpha high, alpha low
        grey, alpha = quads[:, :, 0] << 8 | quads[:, :, 1], quads[:, :, 2] << 8 | quads[:, :, 3]
        return np.stack((grey, grey, grey, alpha), axis=2)
    return decode(raw_mode) << 8 | decode(raw_mode.replace("16B", "16L"))


def _encode_png(levels: np.ndarray) -> bytes:
    """A PNG of levels (H, W), (H, W, 3) or (H, W, 4), uint8 or uint16.

    Rows are stored as differences from the row above, and packed as runs of equal bytes. On medical frames that is as
    small as Pillow's default and four times as fast; zlib also releases the interpreter lock, which Pillow's encoder
    does not; and Pillow cannot write 16-bit colour.
    """
    height, width = levels.shape[:2]
    rows = np.ascontiguousarray(levels, levels.dtype.newbyteorder(">")).view(np.uint8).reshape(height, -1)
    filtered = np.empty((height, rows.shape[1] + 1), np.uint8)
    filtered[:, 0] = 2  # the filter "up"
    filtered[0, 1:] = rows[0]
    np.subtract(rows[1:], rows[:-1], out=filtered[1:, 1:])  # wraps modulo 256, as the format requires
    packer = zlib.compressobj(6, zlib.DEFLATED, zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL, zlib.Z_RLE)
    data = packer.compress(filtered.data) + packer.flush()

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    colour_type = {1: 0, 3: 2, 4: 6}[1 if levels.ndim == 2 else levels.shape[2]]
    header = struct.pack(">IIBBBBB", width, height, 8 * levels.dtype.itemsize, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
