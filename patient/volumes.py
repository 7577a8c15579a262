"""Volumes in: one function per kind of file, each giving the voxels as stored and where they lie.

Readers turn the LPS millimetres of ITK and DICOM to RAS; nothing behind them knows of another space.
"""

from __future__ import annotations

import importlib
import os
import re
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import tifffile
from PIL import Image, ImageSequence

from patient.geometry import check_affine, is_even, swap_ras_lps
from utils.errors import UserError
from utils.images import check_pixels, image_files, read_image

_MILLIMETRES = {"meter": 1000.0, "mm": 1.0, "micron": 0.001, "unknown": 1.0}  # NIfTI's units of length
_MAX_VIDEO = (
    4 << 30
)  # bytes of decoded frames: a quarter of an hour of ultrasound; a film would fill the memory
_SAME = 1e-3  # direction cosines of parallel slices agree to this; headers write 6 digits
_TILT = 0.1  # degrees off the slices' normal, under which rounding explains it


@dataclass(frozen=True)
class Volume:
    """Voxels and their place."""

    values: np.ndarray
    """(I, J, K), or (I, J, K, 3 or 4) for colours: numbers in the source's own scale."""
    affine: np.ndarray | None
    """Voxel indices to RAS millimetres (4, 4); None where the source does not say."""
    bits: int
    """8 where the source stores bytes, else 16: what frames need to keep it apart."""
    name: str
    index: int | None = None
    """Which volume of a 4-D source."""
    full_scale: tuple[float, float] | None = None
    """What 0 and 1 are, for sources that are pictures already."""
    depths: np.ndarray | None = None
    """Where the slices of axis 2 lie, as increasing indices of the affine; None where they are 0, 1, ..., K - 1."""
    lossy: bool = False
    """Whether the values are near what was measured or drawn, but not it (JPEG, video)."""
    notes: list[str] = field(default_factory=list)
    """What a user should know about how it was read."""


def read_volume(path: str | os.PathLike[str], index: int | None = None, series: str | None = None) -> Volume:
    """A volume from a file by its suffix (`READERS`), or from a folder of images or DICOM slices.

    index: which volume of a 4-D file; where there is one alone, it is read whatever the index. series: the UID of the
    DICOM series to take from a folder of several. Raises UserError that names the file and what is wrong with it.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist")
    if path.is_dir():
        dicoms = _dicom_files(path)
        if dicoms:
            if image_files(path):
                raise UserError(f"{path} holds DICOM files and images: give a folder of one kind")
            return _read_dicom(path, dicoms, series)
        if series is not None:
            raise UserError(f"{path} holds no DICOM files, so there is no --series to choose")
        return _read_folder(path)
    if series is not None:
        raise UserError(f"{path} is a file: --series chooses from a folder of DICOM files")
    for suffix, reader in READERS.items():
        if path.name.lower().endswith(suffix):
            return reader(path, index)
    raise UserError(
        f"{path} is not a kind that is read: {', '.join(READERS)}, or a folder of images or DICOM files"
    )


def nifti_grid(path: str | os.PathLike[str]) -> tuple[tuple[int, ...], np.ndarray]:
    """Shape and affine (RAS millimetres) of a NIfTI file, of which only the header is read."""
    image = _open_nifti(Path(path))
    return image.shape[:3], _nifti_affine(Path(path), image)


def _read_nifti(path: Path, index: int | None) -> Volume:
    image = _open_nifti(path)
    affine = _nifti_affine(path, image)
    stored = image.get_data_dtype()
    if stored.kind not in "uif":
        raise UserError(f"{path} holds {'colours' if stored.fields else stored}: a volume holds real numbers")

    chosen = _chosen(path, image.shape[3] if len(image.shape) == 4 else 1, index)
    try:
        values = np.asanyarray(image.dataobj[..., chosen or 0] if len(image.shape) == 4 else image.dataobj)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise UserError(f"{path} is damaged: {error}") from error

    notes = []
    if image.header["qform_code"] == 0 and image.header["sform_code"] == 0:
        notes.append(
            "its header gives voxel sizes but no orientation: left, posterior and the origin are NIfTI's default"
        )
    bits = 8 if stored.itemsize == 1 else 16
    return Volume(values, affine, bits, path.name, chosen, notes=notes)


def _open_nifti(path: Path) -> nibabel.Nifti1Image:
    """The image with its header read, 3-D or 4-D."""
    if not path.exists():
        raise UserError(f"{path} does not exist")
    try:
        image = nibabel.load(path)
    except (nibabel.filebasedimages.ImageFileError, OSError, EOFError, ValueError, zlib.error) as error:
        raise UserError(f"{path} is not a NIfTI file, or it is damaged: {error}") from error
    if not isinstance(image, nibabel.Nifti1Image):
        raise UserError(f"{path} is not a NIfTI file, but {type(image).__name__}")
    if len(image.shape) not in (3, 4):
        raise UserError(
            f"{path} is {len(image.shape)}-D, of shape {image.shape}: a volume has three axes, or four with time"
        )
    if 0 in image.shape:
        raise UserError(f"{path} is empty: its shape is {image.shape}")
    return image


def _nifti_affine(path: Path, image: nibabel.Nifti1Image) -> np.ndarray:
    affine = np.array(image.affine, np.float64)
    affine[:3] *= _MILLIMETRES[image.header.get_xyzt_units()[0]]
    try:
        check_affine(affine)
    except ValueError as error:
        raise UserError(f"{path} cannot be placed: {error}") from error
    return affine


def _read_folder(path: Path) -> Volume:
    """Images by their numbers, as (column, row, frame[, channel]); nothing is known of millimetres."""
    files = image_files(path)
    if not files:
        inside = next(
            (child for child in sorted(path.iterdir()) if child.is_dir() and _dicom_files(child)), None
        )
        hint = f", but {inside} has: give that" if inside else ""
        raise UserError(f"{path} has no images and no DICOM files{hint}")
    images = []
    for file in files:
        images.append(read_image(file))
        if (images[-1].shape, images[-1].dtype) != (images[0].shape, images[0].dtype):
            raise UserError(
                f"{file} is {_describe(images[-1])}, but {files[0].name} is {_describe(images[0])}:"
                " frames have one size and one kind"
            )
    notes: list[str] = []
    depths = _numbered_depths(files, notes)
    lossy = any(file.suffix.lower() in (".jpg", ".jpeg") for file in files)
    return _stack(np.stack(images), path.resolve().name, notes, lossy=lossy, depths=depths)


def _numbered_depths(files: list[Path], notes: list[str]) -> np.ndarray | None:
    """Depths by the last numbers in the names, where some are missing: a gap in the numbers is a gap in time."""
    found = [re.findall(r"\d+", file.stem) for file in files]
    numbers = np.array([int(parts[-1]) if parts else -1 for parts in found], np.float64)
    steps = np.diff(numbers)
    if len(numbers) < 3 or numbers.min() < 0 or steps.min() <= 0 or is_even(numbers):
        return None  # nothing is missing, or the names do not count
    step = float(np.median(steps))
    if (numbers[-1] - numbers[0]) / step + 1 > 2 * len(files):
        notes.append(
            "the numbers in the file names do not count the frames: their order is taken, evenly spaced"
        )
        return None
    present = set(numbers)
    missing = [
        f"{number:.0f}" for number in np.arange(numbers[0], numbers[-1], step) if number not in present
    ]
    if missing:
        notes.append(f"{_missing(missing, 'number')}: the other frames keep their times")
    else:
        notes.append("the numbers in the file names are unevenly spaced, and so are the frames in time")
    return (numbers - numbers[0]) / step


def _describe(image: np.ndarray) -> str:
    kind = {2: "grey", 3: "RGB" if image.shape[-1] == 3 else "RGBA"}[image.ndim]
    return f"{image.shape[1]} x {image.shape[0]} {kind} {image.dtype}"


def _stack(stack: np.ndarray, name: str, notes: list[str], **others: Any) -> Volume:
    """Pictures (frame, row, column[, channel]) as a Volume without millimetres."""
    values = stack.transpose(2, 1, 0, *range(3, stack.ndim))
    full_scale = None
    if values.dtype in (np.uint8, np.uint16):
        full_scale = 0.0, float(np.iinfo(values.dtype).max)
    elif values.dtype.kind == "f" and values.min() >= 0 and values.max() <= 1:
        full_scale = 0.0, 1.0
    bits = 8 if values.dtype.itemsize == 1 else 16
    return Volume(values, None, bits, name, full_scale=full_scale, notes=notes, **others)


def _grey(frames: np.ndarray) -> np.ndarray:
    """Decoded colours (frame, row, column, 3) uint8, or their one channel where all are grey."""
    # Two levels apart is rounding between the colour spaces, not colour.
    apart = max(int(np.ptp(frame.astype(np.int16), axis=-1).max()) for frame in frames)
    return np.ascontiguousarray(frames[..., 1]) if apart <= 2 else frames


# --- Stacks of frames in one file ---------------------------------------------------------------------------


def _read_tiff(path: Path, index: int | None) -> Volume:
    """A multi-page TIFF; of one with two axes of pages (ImageJ, OME), `index` chooses along the first."""
    try:
        with tifffile.TiffFile(path) as file:
            if len(file.series) != 1:
                sizes = _list([" x ".join(map(str, series.shape)) for series in file.series])
                raise UserError(
                    f"{path} holds pages of several kinds ({sizes}): frames have one size and one kind"
                )
            pages, page = file.series[0], file.pages.first
            check_pixels(path, page.imagewidth, page.imagelength)
            array, axes = pages.asarray(), pages.axes
            if page.photometric == tifffile.PHOTOMETRIC.PALETTE:
                array = _grey(np.moveaxis((page.colormap[:, array] // 257).astype(np.uint8), 0, -1))
            elif page.photometric == tifffile.PHOTOMETRIC.MINISWHITE:
                array = np.invert(array)
    except UserError:
        raise
    except Exception as error:  # damaged bytes raise whatever they meet
        if "imagecodecs" in str(error):
            return _read_pictures(path, index)  # LZW, JPEG and fax codes, which Pillow brings along
        raise UserError(f"{path} cannot be read: {_reason(error)}") from error
    if "S" in axes and array.ndim == len(axes):
        array, axes = np.moveaxis(array, axes.index("S"), -1), axes.replace("S", "") + "S"
    array = array.astype(np.uint8) * np.uint8(255) if array.dtype == np.bool_ else array
    paged = axes.replace("S", "")[:-2]
    chosen = None
    if len(paged) == 2:
        chosen = _chosen(path, array.shape[0], index)
        array = array[chosen or 0]
    elif len(paged) != 1:
        what = f"{len(paged) + 2}-D ({axes})" if paged else "one page"
        raise UserError(f"{path} holds {what}: a stack has two pages or more, along one axis")
    if array.dtype.kind not in "uif" or (array.ndim == 4 and array.shape[3] not in (3, 4)):
        raise UserError(
            f"{path} holds {array.dtype} of shape {array.shape}: frames are real numbers, grey or RGB"
        )
    return _stack(array, path.name, [], index=chosen)


def _read_pictures(path: Path, index: int | None) -> Volume:
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
        raise UserError(f"{path} cannot be read: {_reason(error)}") from error
    if len({frame.shape for frame in frames}) > 1:
        raise UserError(f"{path} holds pictures of several sizes: frames have one")
    stack = np.stack(frames)
    return _stack(_grey(stack) if stack.ndim == 4 else stack, path.name, [])


def _read_video(path: Path, index: int | None) -> Volume:
    """The frames of a video, 8-bit; grey where no pixel has colour."""
    ffmpeg = _optional("imageio_ffmpeg", "imageio-ffmpeg", f"reading {path}")
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
    return _stack(_grey(np.stack(frames)), path.name, [], lossy=True)


# --- ITK ----------------------------------------------------------------------------------------------------


def _read_itk(path: Path, index: int | None) -> Volume:
    """NRRD and MetaImage, 3-D or 4-D; the 4th axis may be one of components."""
    sitk = _simple_itk(f"reading {path}")
    if path.suffix.lower() in (".mhd", ".nhdr"):
        named = re.search(
            r"^(?:ElementDataFile *=|data ?file:) *(\S.*?) *$", path.read_text("latin-1"), re.M | re.I
        )
        if named and re.fullmatch(r"[^%\s]+\.\w+", named[1]) and not (path.parent / named[1]).exists():
            raise UserError(f"{path} is a header alone: {named[1]}, which it names, is not beside it")
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
        dimension = reader.GetDimension()
        if dimension not in (3, 4):
            shape = tuple(reader.GetSize())
            raise UserError(
                f"{path} is {dimension}-D, of shape {shape}: a volume has three axes, or four with time"
            )
        image = reader.Execute()
    except RuntimeError as error:
        raise UserError(f"{path} is damaged, or not what its name says: {_reason(error)}") from error
    values = sitk.GetArrayFromImage(image)  # ([t,] z, y, x[, component])
    components = image.GetNumberOfComponentsPerPixel()
    colours = components in (3, 4) and values.dtype == np.uint8 and dimension == 3
    if components > 1 and not colours:
        if dimension == 4:
            raise UserError(
                f"{path} is 5-D: time and {components} components a voxel; a volume has one number"
            )
        values = np.moveaxis(values, -1, 0)
    if values.dtype.kind not in "uif":
        raise UserError(f"{path} holds {values.dtype}: a volume holds real numbers")
    chosen = None
    if values.ndim - colours == 4:
        chosen = _chosen(path, values.shape[0], index)
        values = values[chosen or 0]
    affine = _from_lps(
        np.array(image.GetDirection()).reshape(dimension, dimension)[:3, :3] * image.GetSpacing()[:3],
        image.GetOrigin()[:3],
        path,
    )
    notes = []
    if path.suffix.lower() in (".nrrd", ".nhdr") and "NRRD_space" not in image.GetMetaDataKeys():
        notes.append("its header names no space: its axes are taken as left, posterior, superior")
    full_scale = (0.0, 255.0) if colours else None
    bits = 8 if values.dtype.itemsize == 1 else 16
    values = values.transpose(2, 1, 0, *range(3, values.ndim))
    return Volume(values, affine, bits, path.name, chosen, full_scale, notes=notes)


def _from_lps(columns: np.ndarray, origin: Iterable[float], path: Path) -> np.ndarray:
    """The RAS affine of index steps (3, 3), one a column, and an origin in LPS."""
    affine = np.eye(4)
    affine[:3, :3] = swap_ras_lps(columns.T).T
    affine[:3, 3] = swap_ras_lps(np.array(tuple(origin)))
    try:
        check_affine(affine)
    except ValueError as error:
        raise UserError(f"{path} cannot be placed: {error}") from error
    return affine + 0.0  # no negative zeros


def _simple_itk(purpose: str) -> Any:
    sitk = _optional("SimpleITK", "SimpleITK", purpose)
    sitk.ProcessObject.SetGlobalWarningDisplay(False)  # warnings go to stderr, past us: what matters is noted
    return sitk


# --- DICOM --------------------------------------------------------------------------------------------------

# SOP classes of files that hold a volume as frames: enhanced CT, MR, PET and ultrasound, and legacy conversions.
_ENHANCED = re.compile(r"1\.2\.840\.10008\.5\.1\.4\.1\.1\.(2\.[12]|4\.[14]|128\.1|130|6\.2)$")
_PIXELS = b"\xe0\x7f\x10\x00"  # the tag of pixel data, which reports and plans have not


@dataclass(frozen=True)
class _Slice:
    """Where one slice lies."""

    name: str
    position: np.ndarray
    """Of its first pixel's centre, LPS mm."""
    steps: np.ndarray
    """LPS millimetres from one column, and from one row, to the next, (3, 2)."""
    number: int | None
    """Its instance number."""


@dataclass(frozen=True)
class _File:
    """One DICOM file, its header read."""

    path: Path
    reader: Any  # sitk.ImageFileReader

    def tag(self, key: str) -> str:
        return self.reader.GetMetaData(key).strip(" \0") if self.reader.HasMetaDataKey(key) else ""

    @property
    def size(self) -> tuple[int, int, int]:
        """Columns, rows and frames."""
        columns, rows, *frames = self.reader.GetSize()
        return columns, rows, frames[0] if frames else 1

    @property
    def number(self) -> int | None:
        text = self.tag("0020|0013")
        return int(text) if re.fullmatch(r"[+-]?\d+", text) else None

    def slice(self) -> _Slice | None:
        """Where its one slice lies, if it says so."""
        if not (self.tag("0020|0032") and self.tag("0020|0037")):
            return None
        steps = np.array(self.reader.GetDirection()).reshape(3, 3)[:, :2] * self.reader.GetSpacing()[:2]
        return _Slice(self.path.name, np.array(self.reader.GetOrigin()), steps, self.number)

    def read(self, sitk: Any) -> np.ndarray:
        """Rescaled values (frame, row, column[, 3])."""
        try:
            image = self.reader.Execute()
        except RuntimeError as error:
            raise UserError(f"{self.path} is damaged: {_reason(error)}") from error
        array = sitk.GetArrayFromImage(image)
        return array if image.GetDimension() > 2 else array[None]


def _dicom_files(folder: Path) -> list[Path]:
    """Files of a folder that are DICOM by their name or their mark (part 10: DICM behind 128 bytes)."""

    def is_dicom(file: Path) -> bool:
        if not file.is_file() or file.name.startswith(".") or file.name.upper() == "DICOMDIR":
            return False
        if file.suffix.lower() in (".dcm", ".ima"):
            return True
        with file.open("rb") as stream:
            return stream.read(132)[128:] == b"DICM"

    return [file for file in sorted(folder.iterdir()) if is_dicom(file)]


def _read_dicom_file(path: Path, index: int | None) -> Volume:
    volume = _read_dicom(path, [path], None)
    if volume.values.shape[2] < 2:
        raise UserError(f"{path} is one slice: give -i the folder of its series")
    return volume


def _read_dicom(path: Path, files: list[Path], series: str | None) -> Volume:
    """One series, its slices sorted along their normal; a single file of many frames is a volume or a cine."""
    sitk = _simple_itk(f"reading the DICOM files of {path}")
    notes: list[str] = []
    found: dict[str, list[_File]] = {}
    unread = []
    for file in files:
        reader = sitk.ImageFileReader()
        reader.SetImageIO("GDCMImageIO")
        reader.SetFileName(str(file))
        try:
            reader.ReadImageInformation()
        except RuntimeError as error:
            if _PIXELS in file.read_bytes():
                raise UserError(f"{file} is damaged, or cut off: copy it again, or take it out") from error
            unread.append(file.name)
            continue
        header = _File(file, reader)
        found.setdefault(header.tag("0020|000e"), []).append(header)
    if not found:
        raise UserError(f"{path} has no DICOM image that can be read (tried {_list(unread)})")
    if unread:
        notes.append(f"left out, because there is no image in it: {_list(unread)}")
    if series is not None and series not in found:
        raise UserError(f"{path} has no series {series}: it has {_series(found)}")
    if series is None and len(found) > 1:
        raise UserError(
            f"{path} holds {len(found)} series: choose one for -i with --series UID, or give a folder of one:"
            f" {_series(found)}"
        )
    chosen = found[series or next(iter(found))]

    first = chosen[0]
    for other in chosen:
        if other.size[:2] != first.size[:2]:
            raise UserError(
                f"{other.path} has {other.size[0]} x {other.size[1]} pixels, but {first.path.name} {first.size[0]} x"
                f" {first.size[1]}: slices have one size"
            )
        if "MOSAIC" in other.tag("0008|0008"):
            raise UserError(
                f"{other.path} is a mosaic, all slices tiled in one image: convert it (dcm2niix) to NIfTI"
            )
        if len(chosen) > 1 and other.size[2] > 1:
            raise UserError(
                f"{other.path} holds {other.size[2]} frames beside other files: give -i this file alone"
            )

    affine, depths, order = None, None, list(range(max(len(chosen), first.size[2])))
    if first.size[2] > 1 and not _ENHANCED.match(first.tag("0008|0016")):
        notes.append("its frames do not say where they lie in the patient: they are taken in their order")
    else:
        slices = [file.slice() for file in chosen] if first.size[2] == 1 else _enhanced_slices(first.path)
        known = [place for place in slices if place is not None]
        if len(known) == len(order):
            order, affine, depths = _place(path, known, notes)
        else:
            order.sort(key=lambda k: -1 if (number := chosen[k].number) is None else number)
            notes.append(
                "the files do not say where slices lie: they are taken by their numbers, evenly spaced"
            )

    in_order = [chosen[k] for k in order] if len(chosen) > 1 else chosen
    stack = [file.read(sitk) for file in in_order]
    if len({array.shape[1:] for array in stack}) > 1:
        raise UserError(f"{path} mixes grey and colour slices: they have to be of one kind")
    values = np.concatenate(stack) if len(chosen) > 1 else stack[0][order]
    stored = first.tag("0028|0101")
    bits = 8 if values.dtype.itemsize == 1 or (stored.isdecimal() and int(stored) <= 8) else 16
    full_scale = (0.0, 255.0) if values.dtype == np.uint8 and (values.ndim == 4 or affine is None) else None
    values = values.transpose(2, 1, 0, *range(3, values.ndim))
    lossy = first.tag("0028|2110") == "01"
    return Volume(values, affine, bits, path.resolve().name, None, full_scale, depths, lossy, notes)


def _enhanced_slices(path: Path) -> list[_Slice]:
    """Where the frames of an enhanced file lie: each says it in a sequence of its own, which ITK does not show."""
    pydicom = _optional("pydicom", "pydicom", f"reading {path}, a volume in one file,")
    header = pydicom.dcmread(path, stop_before_pixels=True)
    shared = header.get("SharedFunctionalGroupsSequence") or [pydicom.Dataset()]
    slices, scales = [], set()
    try:
        for number, frame in enumerate(header.PerFrameFunctionalGroupsSequence):
            groups = {element.keyword: element.value for place in (shared[0], frame) for element in place}
            position = groups["PlanePositionSequence"][0].ImagePositionPatient
            cosines = np.array(groups["PlaneOrientationSequence"][0].ImageOrientationPatient, float)
            row, column = groups["PixelMeasuresSequence"][0].PixelSpacing  # from row to row, column to column
            steps = cosines.reshape(2, 3).T * (float(column), float(row))
            slices.append(_Slice(f"frame {number}", np.array(position, float), steps, None))
            for scale in groups.get("PixelValueTransformationSequence", []):
                scales.add((float(scale.RescaleSlope), float(scale.RescaleIntercept)))
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise UserError(f"{path} does not say where its frames lie ({error}): convert it to NIfTI") from error
    if len(scales) > 1:
        raise UserError(f"{path} rescales its frames differently, which is not read: convert it to NIfTI")
    return slices


def _place(
    path: Path, slices: list[_Slice], notes: list[str]
) -> tuple[list[int], np.ndarray, np.ndarray | None]:
    """The order of slices, their affine, and their depths where they are uneven; what is unusual is noted."""
    steps = slices[0].steps
    for other in slices:
        if np.abs(other.steps - steps).max() > _SAME * np.linalg.norm(steps, axis=0).max():
            raise UserError(
                f"{path}: {other.name} and {slices[0].name} differ in orientation or pixel size: a volume has parallel"
                " slices (is a localizer among them?)"
            )
    normal = np.cross(steps[:, 0], steps[:, 1])
    normal /= np.linalg.norm(normal)
    order = sorted(range(len(slices)), key=lambda k: float(slices[k].position @ normal))
    slices = [slices[k] for k in order]
    positions = np.array([place.position for place in slices])
    heights = positions @ normal
    gaps = np.diff(heights)
    if not gaps.size:
        return order, _from_lps(np.column_stack((steps, normal)), positions[0], path), None
    twins = np.flatnonzero(gaps <= 0.01 * np.median(gaps))
    if twins.size:
        a, b = slices[twins[0]].name, slices[twins[0] + 1].name
        raise UserError(
            f"{path}: {twins.size} slices lie where another one does ({a} and {b}): the series has several time points,"
            " echoes or copies; put those of one into a folder"
        )
    line = (positions[-1] - positions[0]) / (heights[-1] - heights[0])  # per mm along the normal
    astray = np.linalg.norm(positions - positions[0] - np.outer(heights - heights[0], line), axis=1)
    if astray.max() > 0.1 * np.linalg.norm(steps, axis=0).min():
        raise UserError(
            f"{path}: {slices[int(astray.argmax())].name} lies {astray.max():.3g} mm beside the line of the others:"
            " slices of a volume are stacked along one direction"
        )
    tilt = float(np.degrees(np.arccos(min(1.0, 1 / np.linalg.norm(line)))))
    if tilt > _TILT:
        notes.append(
            f"gantry tilt of {tilt:.1f} degrees: slices are shifted against each other, and the affine is sheared as"
            " they are; nothing is resampled"
        )
    numbers = sorted(place.number for place in slices if place.number is not None)
    missing = sorted(set(range(numbers[0], numbers[-1] + 1)) - set(numbers)) if numbers else []
    # Every second number of an even stack, say, is how some archives count.
    if missing and len(np.unique(np.diff(numbers))) > 1:
        notes.append(_missing(map(str, missing), "instance number"))

    even = is_even(heights)
    step = float(gaps.mean() if even else np.median(gaps))
    if not even:
        absent = np.rint(gaps / step).astype(int) - 1
        places = [f"{absent[k]} behind {slices[k].name}" for k in np.flatnonzero(absent)]
        if places and np.abs(gaps / step - absent - 1).max() < 0.05:
            count = int(absent.sum())
            what = f"{count} slice{'s are' if count > 1 else ' is'} missing ({_list(places)})"
        else:
            what = f"slices are unevenly spaced, {gaps.min():.4g} to {gaps.max():.4g} mm apart"
        notes.append(f"{what}: the others keep their true places and times")
    affine = _from_lps(np.column_stack((steps, line * step)), positions[0], path)
    return order, affine, None if even else (heights - heights[0]) / step


def _series(found: dict[str, list[_File]]) -> str:
    """Every series with the number of its slices and what it says of itself."""
    lines = []
    for uid, files in found.items():
        about = " ".join(filter(None, (files[0].tag("0008|0060"), files[0].tag("0008|103e"))))
        lines.append(f"{uid or 'without UID'} ({len(files)} files{', ' if about else ''}{about})")
    return "; ".join(lines)


# --- Words and choices --------------------------------------------------------------------------------------


def _chosen(path: Path, count: int, index: int | None) -> int | None:
    """Which of `count` volumes; None where there is no choice."""
    if count == 1:
        return None
    if index is None:
        raise UserError(f"{path} holds {count} volumes: choose one with --frame 0 ... {count - 1}")
    if not 0 <= index < count:
        raise UserError(f"{path} holds {count} volumes: there is no --frame {index}")
    return index


def _optional(module: str, package: str, purpose: str) -> Any:
    """A module that is asked for where it is needed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{purpose} needs {package}: pip install {package}") from error


def _reason(error: Exception) -> str:
    """The last line of what a library says, which is the one that says it, without its addresses."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return re.sub(r"^ITK ERROR: |\w+\(0x[0-9a-f]+\): ", "", lines[-1]) if lines else type(error).__name__


def _list(words: Iterable[str], most: int = 8) -> str:
    words = list(words)
    return ", ".join(words[:most]) + (f" and {len(words) - most} more" if len(words) > most else "")


def _missing(words: Iterable[str], noun: str) -> str:
    words = list(words)
    return f"{len(words)} {noun}{'s are' if len(words) > 1 else ' is'} missing ({_list(words)})"


READERS: dict[str, Callable[[Path, int | None], Volume]] = {
    **dict.fromkeys((".nii", ".nii.gz"), _read_nifti),
    **dict.fromkeys((".nrrd", ".nhdr", ".mha", ".mhd"), _read_itk),
    **dict.fromkeys((".dcm", ".ima"), _read_dicom_file),
    **dict.fromkeys((".tif", ".tiff"), _read_tiff),
    ".gif": _read_pictures,
    **dict.fromkeys((".mp4", ".avi", ".mov", ".mkv", ".webm"), _read_video),
}
"""File name endings and who reads them; a new kind of file is a function and a line here."""
