"""Pixels of DICOM files: decoded, and converted from stored numbers to measured values."""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path

import numpy as np

from patient.readers import video
from patient.readers.common import DEFLATE, check_claim, damage, reason
from patient.readers.dicom.codec import decoder
from patient.readers.dicom.files import Header, items, load, pydicom_for
from utils.errors import UserError
from utils.images import check_pixels

_MPEG = "1.2.840.10008.1.2.4.10"  # followed by a digit: MPEG-2, MPEG-4 and HEVC inside DICOM


def is_video(header: Header) -> bool:
    return _syntax(header).startswith(_MPEG)


def decode(header: Header) -> np.ndarray:
    """Stored values (frame, row, column[, 3]), colours as RGB. Raises UserError."""
    path = header.path
    columns, rows, frames = header.size
    check_pixels(path, columns, rows)
    if is_video(header):
        return _decode_video(header)
    samples = int(header.number("SamplesPerPixel") or 1)
    bits = int(header.number("BitsAllocated") or 8)
    claimed = columns * rows * frames * samples * max(bits, 8) // 8
    pydicom = pydicom_for(path)
    with damage(path, "is damaged, or cut off"):
        native = _syntax(header) in ("", *pydicom.uid.UncompressedTransferSyntaxes)
        stored = 1 if native and _syntax(header) != pydicom.uid.DeflatedExplicitVRLittleEndian else DEFLATE
        check_claim(
            path, int(columns * rows * frames * _samples_stored(header, samples) * bits) // 8, None, stored
        )
        check_claim(path, claimed)
        dataset = load(path)
        if not getattr(dataset.file_meta, "TransferSyntaxUID", None):
            little, implicit = dataset.original_encoding[1], dataset.original_encoding[0]
            names = {(True, True): "ImplicitVRLittleEndian", (False, True): "ExplicitVRLittleEndian"}
            dataset.file_meta.TransferSyntaxUID = getattr(
                pydicom.uid, names.get((implicit, little), "ExplicitVRBigEndian")
            )
        if native or _syntax(header) == pydicom.uid.RLELossless:
            array = dataset.pixel_array if bits == 1 else pydicom.pixels.pixel_array(dataset)
        else:
            array = _decompress(header, claimed, pydicom.uid.UID(_syntax(header)).name)
        if dataset.get("PhotometricInterpretation") == "PALETTE COLOR":
            colours = pydicom.pixels.apply_color_lut(array, dataset)
            array = (colours >> 8).astype(np.uint8) if colours.dtype == np.uint16 else colours
            array = array[..., :3]
    if frames == 1 and array.ndim == 2 + (array.shape[-1] == 3 and samples == 3):
        array = array[None]
    elif frames == 1 and array.ndim == 3 and array.shape[0] != 1:
        array = array[None]  # a palette's colours
    if array.shape[:3] != (frames, rows, columns):
        raise UserError(
            f"{path} is damaged, or cut off: {frames} frames of {columns} x {rows} are {array.shape[:3]}"
        )
    return array


def _samples_stored(header: Header, samples: int) -> float:
    """Numbers per pixel in the file; two for 4:2:2 colours."""
    return 2 if header.text("PhotometricInterpretation").endswith("422") else samples


def _decompress(header: Header, claimed: int, syntax: str) -> np.ndarray:
    """Compressed pixels by pydicom's decoders, some of which must be installed."""
    try:
        return decoder.decode(str(header.path.resolve()), claimed)
    except RuntimeError as error:
        if "12-bit" in str(error) and importlib.util.find_spec("libjpeg") is None:
            raise UserError(
                f"{header.path} is compressed ({syntax}, 12 bits): reading it needs pylibjpeg: pip install pylibjpeg"
                " pylibjpeg-libjpeg"
            ) from error
        if "missing dependencies" in str(error) or ("plugins" in str(error) and "missing" in str(error)):
            raise UserError(
                f"{header.path} is compressed ({syntax}): reading it needs python-gdcm: pip install python-gdcm"
            ) from error
        raise UserError(
            f"{header.path} is compressed ({syntax}), and cannot be decoded here, or is damaged: {reason(error)}"
        ) from error


def _decode_video(header: Header) -> np.ndarray:
    """Frames of an MPEG stream, (frame, row, column[, 3])."""
    pydicom = pydicom_for(header.path)
    with damage(header.path), tempfile.TemporaryDirectory() as folder:
        dataset = load(header.path)
        stream = Path(folder, "stream.mp4")
        pieces = pydicom.encaps.generate_frames(dataset.PixelData, number_of_frames=1)
        stream.write_bytes(b"".join(pieces))
        frames, _ = video.decode(stream, f"{header.path}, a video inside DICOM,")
    return frames


def _syntax(header: Header) -> str:
    return str(header.dataset.file_meta.get("TransferSyntaxUID", "")) if header.dataset.file_meta else ""


def stored_range(header: Header) -> tuple[int, int]:
    """The smallest and the largest number that the stored bits can hold."""
    bits = int(header.number("BitsStored") or header.number("BitsAllocated") or 8)
    if header.number("PixelRepresentation"):
        return -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    return 0, (1 << bits) - 1


def has_modality_lut(header: Header) -> bool:
    return bool(items(header.dataset, "ModalityLUTSequence"))


def turn_monochrome1(stored: np.ndarray, header: Header) -> np.ndarray:
    """Invert MONOCHROME1 values, whose small ones show white, so that small ones show black."""
    low, high = stored_range(header)
    if stored.dtype.kind == "f":
        return stored.max() + stored.min() - stored
    return (low + high - stored.astype(np.int64)).astype(stored.dtype)


def padding(stored: np.ndarray, header: Header) -> np.ndarray | None:
    """Where stored values are padding (PixelPaddingValue, up to PixelPaddingRangeLimit), or None if none is."""
    value = header.number("PixelPaddingValue")
    if value is None or stored.ndim != 3 or stored.dtype.kind == "f":
        return None
    limit = header.number("PixelPaddingRangeLimit")
    ends = [value, value if limit is None else limit]
    if header.number("PixelRepresentation"):  # some write signed values as unsigned
        bits = int(header.number("BitsAllocated") or 16)
        ends = [end - (1 << bits) if end >= 1 << (bits - 1) else end for end in ends]
    padded = (stored >= min(ends)) & (stored <= max(ends))
    return padded if padded.any() else None


def rescaled(stored: np.ndarray, scales: list[tuple[float, float]], header: Header) -> np.ndarray:
    """Frames times their slope plus their intercept, in the smallest number type that holds the result.

    stored: (frame, row, column). scales: slope and intercept of each frame.
    """
    if all(scale == (1.0, 0.0) for scale in scales):
        return stored
    slopes, intercepts = np.array(scales).T
    if (
        stored.dtype.kind != "f"
        and (slopes == np.rint(slopes)).all()
        and (intercepts == np.rint(intercepts)).all()
    ):
        ends = np.outer((int(stored.min()), int(stored.max())), slopes) + intercepts
        kind: np.dtype = next(
            (
                np.dtype(kind)
                for kind in ("u1", "i2", "u2", "i4", "i8")
                if _holds(kind, ends.min(), ends.max())
            ),
            np.dtype("f8"),
        )
    else:
        kind = np.dtype("f8" if stored.dtype.itemsize > 2 else "f4")
    out = np.empty(stored.shape, kind)
    for k, (slope, intercept) in enumerate(scales):
        out[k] = stored[k].astype(np.float64) * slope + intercept
    return out


def _holds(kind: str, low: float, high: float) -> bool:
    limits = np.iinfo(kind)
    return limits.min <= low and high <= limits.max
