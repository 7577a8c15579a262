"""Volumes of every kind through prepare.py: the same volume gives the same frames at the same position."""

import itertools
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import tifffile
from dicom_files import write_cine, write_enhanced, write_series
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nibabel.affines import apply_affine
from PIL import Image

from patient.geometry import Geometry
from patient.readers import read_volume
from prepare import CT_WINDOWS, main
from utils.errors import UserError
from utils.images import image_files, read_image, write_image

sitk = pytest.importorskip("SimpleITK")
pydicom = pytest.importorskip("pydicom")

SHAPE = (9, 7, 6)
VALUES = np.random.default_rng(0).permutation(int(np.prod(SHAPE))).reshape(SHAPE).astype(np.int16) - 100


def _affine(signs=(1, 1, 1), order=(0, 1, 2), spacing=(0.7, 0.9, 2.5), turn=0.3, shear=0.0):
    """RAS: axes `order` with `signs`, turned by `turn` radians about two axes, slices shifted by `shear` mm each."""
    c, s = np.cos(turn), np.sin(turn)
    rotation = np.array([[1, 0, 0], [0, c, -s], [0, s, c]]) @ np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = rotation @ np.eye(3)[:, list(order)] @ np.diag(np.multiply(signs, spacing))
    affine[:3, 2] += shear * affine[:3, 1] / spacing[1]
    affine[:3, 3] = 12.5, -30.25, 101.125
    return affine


def _right_handed_in_lps(affine):
    """The order of a DICOM series' slices is that of their normal, columns cross rows: then k grows along it."""
    return np.linalg.det(affine[:3, :3]) > 0  # turning R and A to L and P keeps the handedness


def _nifti(path, values=VALUES, affine=None):
    nibabel.save(nibabel.Nifti1Image(values, _affine() if affine is None else affine), path)
    return str(path)


def _itk(path, values=VALUES, affine=None):
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ (_affine() if affine is None else affine)
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image = sitk.GetImageFromArray(
        values.transpose(2, 1, 0, *range(3, values.ndim)), isVector=values.ndim > 3
    )
    image.SetSpacing(spacing.tolist())
    image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    sitk.WriteImage(image, str(path), useCompression=True)
    return str(path)


def _prepare(out, *arguments):
    """Frames, masks (or None) and geometry that prepare.py makes."""
    assert main([*map(str, arguments), "-o", str(out)]) == 0
    masks = _frames(out / "seg" / "original") if (out / "seg").exists() else None
    return _frames(out / "img" / "original"), masks, Geometry.load(out / "frames.json")


def _frames(folder):
    return np.stack([read_image(path) for path in image_files(folder)])


# --- The same volume in every format ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nrrd", "nhdr", "mha", "mhd", "dicom"])
@pytest.mark.parametrize("axis", ["auto", "0", "1"])
@pytest.mark.parametrize(
    "order, signs", [((0, 1, 2), (-1, -1, 1)), ((1, 2, 0), (1, -1, -1)), ((2, 0, 1), (1, 1, 1))]
)
def test_equals_the_nifti_of_the_same_volume(tmp_path, kind, axis, order, signs):
    affine = _affine(signs, order)
    assert _right_handed_in_lps(affine)
    if kind == "dicom":
        write_series(tmp_path / "dicom", VALUES, affine)
        source = tmp_path / "dicom"
    else:
        source = _itk(tmp_path / f"a.{kind}", affine=affine)
    frames, _, geometry = _prepare(tmp_path / "a", "-i", source, "--axis", axis)
    expected, _, truth = _prepare(
        tmp_path / "b", "-i", _nifti(tmp_path / "a.nii", affine=affine), "--axis", axis
    )
    assert np.array_equal(frames, expected) and frames.dtype == np.uint16
    # NIfTI keeps its affine in float32, DICOM in 10 digits here: 1e-5 of numbers about 100
    assert np.abs(geometry.matrix - truth.matrix).max() < 1e-4
    assert geometry.positions == pytest.approx(truth.positions, abs=1e-4)
    assert geometry.window == truth.window and geometry.axes == truth.axes


def test_dicom_slices_that_run_against_their_normal(tmp_path):
    """A left-handed grid: the series comes out in the order of the normal, every voxel still where it was."""
    affine = _affine((1, 1, -1))
    write_series(tmp_path / "dicom", VALUES, affine)
    volume = read_volume(tmp_path / "dicom")
    assert np.array_equal(volume.values, VALUES[:, :, ::-1])
    assert np.allclose(apply_affine(volume.affine, (1, 2, 0)), apply_affine(affine, (1, 2, 5)), atol=1e-6)


def test_dicom_rescale_gives_hounsfield_units(tmp_path):
    write_series(tmp_path / "a", VALUES, _affine(), slope=2.0, intercept=-1024.0)
    assert np.array_equal(read_volume(tmp_path / "a").values, VALUES * 2.0 - 1024)
    write_series(tmp_path / "pet", VALUES, _affine(), RescaleSlope=[f"{1 + k / 2}" for k in range(6)])
    assert np.array_equal(read_volume(tmp_path / "pet").values, VALUES * (1 + np.arange(6) / 2))


def test_gantry_tilt_is_kept_exactly_and_said(tmp_path, capsys):
    affine = _affine(shear=0.5)
    write_series(tmp_path / "dicom", VALUES, affine)
    frames, _, geometry = _prepare(tmp_path / "out", "-i", tmp_path / "dicom")
    assert "gantry tilt of 11.3 degrees" in capsys.readouterr().out  # atan(0.5 / 2.5)
    _same_voxels(frames, geometry, VALUES, affine)
    column, _, frame = geometry.matrix[:3, :3].T
    assert geometry.spacing[2] == pytest.approx(np.hypot(2.5, 0.5), abs=1e-6)
    assert (
        abs(column @ frame) < 1e-6 and abs(geometry.matrix[:3, 1] @ frame) > 0.1
    )  # rows and frames are oblique


def test_missing_slices_are_named_and_keep_their_times(tmp_path, capsys):
    affine = _affine()
    kept = [0, 1, 2, 5]
    write_series(
        tmp_path / "d", VALUES[:, :, kept], affine, depths=kept, InstanceNumber=[k + 1 for k in kept]
    )
    frames, _, geometry = _prepare(tmp_path / "out", "-i", tmp_path / "d")
    said = capsys.readouterr().out
    assert "2 slices are missing (2 after slice014.dcm)" in said and "2.5 to 7.5 mm apart" in said
    assert "2 instance numbers are missing (4, 5)" in said
    assert geometry.positions == pytest.approx((0, 2.5, 5, 12.5), abs=1e-6)
    assert geometry.durations() == pytest.approx(np.array([1, 1, 3, 1]) / 6)
    _same_voxels(frames, geometry, VALUES[:, :, kept], affine, kept)
    with pytest.raises(UserError, match="--axis 2"):
        main(["-i", str(tmp_path / "d"), "-o", str(tmp_path / "other"), "--axis", "0"])


def test_uneven_slices_are_named(tmp_path, capsys):
    depths = [0, 1, 2.2, 3.1, 4, 5]
    write_series(tmp_path / "d", VALUES, _affine(), depths=depths)
    frames, _, geometry = _prepare(tmp_path / "out", "-i", tmp_path / "d", "--keep_every", "2")
    assert "unevenly spaced, 2.25 to 3 mm apart" in capsys.readouterr().out
    assert geometry.positions == pytest.approx((0, 2.2 * 2.5, 4 * 2.5), abs=1e-6)
    assert geometry.heldout_indices() == pytest.approx([1 / 2.2, 1.5])
    _same_voxels(frames, geometry, VALUES[:, :, ::2], _affine(), depths[::2])


def test_a_label_on_an_even_grid_meets_uneven_slices(tmp_path, capsys):
    kept = [0, 1, 2, 5]
    write_series(tmp_path / "d", VALUES[:, :, kept], _affine(), depths=kept)
    label = (VALUES > 50).astype(np.uint8)
    _, masks, geometry = _prepare(
        tmp_path / "a", "-i", tmp_path / "d", "-l", _nifti(tmp_path / "l.nii", label)
    )
    assert "another grid" in capsys.readouterr().out
    _same_voxels(masks > 0, geometry, label[:, :, kept] > 0, _affine(), kept)
    # of as many slices, but elsewhere: nothing is known of the last frame
    short = _nifti(tmp_path / "s.nii", label[:, :, :4])
    _, masks, geometry = _prepare(tmp_path / "c", "-i", tmp_path / "d", "-l", short)
    expected = np.where(np.arange(4) < 3, label[:, :, kept], 0)
    _same_voxels(masks > 0, geometry, expected > 0, _affine(), kept)
    # and back: an uneven label on an even volume, where slices 3 and 4 take the nearest one
    write_series(tmp_path / "l", label[:, :, kept], _affine(), depths=kept)
    _, masks, geometry = _prepare(tmp_path / "b", "-i", _nifti(tmp_path / "v.nii"), "-l", tmp_path / "l")
    _same_voxels(masks > 0, geometry, label[:, :, [0, 1, 2, 2, 5, 5]] > 0, _affine())


def _same_voxels(frames, geometry, values, affine, depths=None):
    """Every pixel lies where its voxel does, and is as bright among the others; masks are equal."""
    indices = np.array(list(np.ndindex(frames.shape)))[:, ::-1]  # column, row, frame
    at = apply_affine(np.linalg.inv(affine), geometry.to_patient(indices.astype(float)))
    depths = np.arange(values.shape[2]) if depths is None else np.array(depths)
    slices = np.abs(at[:, 2, None] - depths).argmin(1)
    assert (
        np.abs(at[:, :2] - at[:, :2].round()).max() < 1e-4 and np.abs(at[:, 2] - depths[slices]).max() < 1e-4
    )
    found = values[at[:, 0].round().astype(int), at[:, 1].round().astype(int), slices]
    pixels = frames[indices[:, 2], indices[:, 1], indices[:, 0]]
    assert (np.diff(pixels[np.argsort(found, kind="stable")].astype(int)) >= 0).all()
    if frames.dtype == bool:
        assert np.array_equal(pixels, found)


def test_series_are_chosen_by_uid(tmp_path, capsys):
    folder = tmp_path / "two"
    first = write_series(folder, VALUES, _affine(), SeriesDescription="thin")
    second = write_series(folder, VALUES[:, :, :4], _affine(), prefix="b", Modality="MR")
    with pytest.raises(UserError, match=r"holds 2 series: choose one for -i with --series UID, ") as error:
        read_volume(folder)
    assert f"{first} (6 files, CT thin)" in str(error.value) and f"{second} (4 files, MR test)" in str(
        error.value
    )
    frames, _, _ = _prepare(tmp_path / "out", "-i", folder, "--series", second)
    assert len(frames) == 4


def test_dicom_cine_in_grey_and_colour(tmp_path, capsys):
    frames = np.random.default_rng(0).integers(0, 256, (4, 6, 8, 3), dtype=np.uint8)
    for name, stack in (("grey", frames[..., 0]), ("colour", frames)):
        write_cine(tmp_path / f"{name}.dcm", stack)
        found, _, geometry = _prepare(tmp_path / name, "-i", tmp_path / f"{name}.dcm")
        assert np.array_equal(found, stack) and geometry.affine is None
        assert "do not say where they lie" in capsys.readouterr().out


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5], [3, 0, 5, 1, 4, 2], [0, 1, 5, 4]])
def test_enhanced_dicom(tmp_path, order):
    """A volume in one file, frames in any order, two slices missing."""
    write_enhanced(tmp_path / "a.dcm", VALUES, _affine(), order, [2.0] * len(order))
    volume = read_volume(tmp_path / "a.dcm")
    assert np.array_equal(volume.values, VALUES[:, :, sorted(order)] * 2.0 - 5)
    assert np.abs(volume.affine - _affine()).max() < 1e-6
    assert volume.thickness == 1
    if len(order) < 6:
        assert volume.depths.tolist() == pytest.approx([0, 1, 4, 5]) and "2 after frame 1" in volume.notes[0]
    else:
        assert volume.depths is None and not volume.notes


def test_dicom_files_without_positions_are_taken_by_number(tmp_path, capsys):
    write_series(
        tmp_path / "d", VALUES, _affine(), ImagePositionPatient=None, InstanceNumber=[6, 5, 4, 3, 2, 1]
    )
    volume = read_volume(tmp_path / "d")
    assert volume.affine is None and np.array_equal(volume.values, VALUES[:, :, ::-1])
    assert "by their numbers" in volume.notes[0]
    write_series(tmp_path / "none", VALUES, _affine(), ImagePositionPatient=None, InstanceNumber=None)
    with pytest.raises(UserError, match=r"slice000.dcm and slice\d+.dcm have no instance number"):
        read_volume(tmp_path / "none")


def test_dicom_names_without_suffix_and_other_files(tmp_path):
    folder = tmp_path / "d"
    write_series(folder, VALUES, _affine())
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(folder / f"IM{number}")
    (folder / "DICOMDIR").write_text("index")
    (folder / "notes.txt").write_text("good scan")
    volume = read_volume(folder)
    assert np.array_equal(volume.values, VALUES) and not volume.notes
    (folder / "report.dcm").write_text("no image")
    assert "report.dcm" in read_volume(folder).notes[0]


# --- ITK's other shapes -------------------------------------------------------------------------------------


def test_itk_time_series_components_and_colours(tmp_path):
    series = np.stack([VALUES, VALUES + 1])
    image = sitk.JoinSeries([sitk.GetImageFromArray(each.transpose(2, 1, 0)) for each in series])
    sitk.WriteImage(image, str(tmp_path / "t.nrrd"))
    sitk.WriteImage(
        sitk.GetImageFromArray(np.stack(series, -1).transpose(2, 1, 0, 3), isVector=True), tmp_path / "c.mha"
    )
    for path in (tmp_path / "t.nrrd", tmp_path / "c.mha"):
        volume = read_volume(path, 1)
        assert np.array_equal(volume.values, VALUES + 1) and volume.index == 1
        assert np.array_equal(volume.affine, np.diag([-1, -1, 1, 1]))
        with pytest.raises(UserError, match="choose one with --frame 0"):
            read_volume(path)
    colours = np.random.default_rng(0).integers(0, 256, (*SHAPE, 3), dtype=np.uint8)
    volume = read_volume(_itk(tmp_path / "rgb.mha", colours))
    assert np.array_equal(volume.values, colours) and volume.full_scale == (0, 255) and volume.bits == 8


def test_nrrd_without_space_is_mentioned(tmp_path):
    header = "NRRD0004\ntype: uchar\ndimension: 3\nsizes: 2 3 4\nspacings: 1 1 2\nencoding: raw\n\n"
    (tmp_path / "a.nrrd").write_bytes(header.encode() + bytes(range(24)))
    volume = read_volume(tmp_path / "a.nrrd")
    assert "no space" in volume.notes[0] and np.array_equal(volume.affine, np.diag([-1, -1, 2, 1]))
    assert read_volume(_itk(tmp_path / "b.nrrd")).notes == []


def test_nrrd_in_another_space(tmp_path):
    header = (
        "NRRD0005\ntype: uchar\ndimension: 3\nspace: right-anterior-superior\nsizes: 2 3 4\nencoding: raw\n"
    )
    header += "space directions: (1,0,0) (0,1,0) (0,0,2)\nspace origin: (5,6,7)\n\n"
    (tmp_path / "a.nrrd").write_bytes(header.encode() + bytes(range(24)))
    expected = np.diag([1.0, 1, 2, 1])
    expected[:3, 3] = 5, 6, 7
    assert np.array_equal(read_volume(tmp_path / "a.nrrd").affine, expected)


# --- Stacks of frames ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("channels", [(), (3,)], ids=["grey", "colour"])
def test_multi_page_tiff(tmp_path, dtype, channels):
    frames = np.random.default_rng(0).integers(0, 250, (5, 6, 8, *channels)).astype(dtype)
    photometric = "rgb" if channels else "minisblack"
    tifffile.imwrite(tmp_path / "a.tif", frames, photometric=photometric, compression="zlib")
    volume = read_volume(tmp_path / "a.tif")
    assert np.array_equal(volume.values.transpose(2, 1, 0, *range(3, frames.ndim)), frames)
    assert volume.affine is None and volume.bits == (8 if dtype == np.uint8 else 16)
    if dtype != np.float32:  # pictures keep their full scale: they go through unchanged
        found, _, _ = _prepare(tmp_path / "out", "-i", tmp_path / "a.tif")
        assert np.array_equal(found, frames) and found.dtype == dtype


def test_other_tiffs(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (2, 5, 6, 8), dtype=np.uint8)
    tifffile.imwrite(tmp_path / "time.tif", frames, imagej=True, metadata={"axes": "TZYX"})
    assert np.array_equal(read_volume(tmp_path / "time.tif", 1).values, frames[1].transpose(2, 1, 0))
    pages = [Image.fromarray(frame) for frame in frames[0]]
    pages[0].save(tmp_path / "lzw.tif", save_all=True, append_images=pages[1:], compression="tiff_lzw")
    assert np.array_equal(read_volume(tmp_path / "lzw.tif").values, frames[0].transpose(2, 1, 0))
    tifffile.imwrite(tmp_path / "white.tif", frames[0], photometric="miniswhite")
    assert np.array_equal(read_volume(tmp_path / "white.tif").values, 255 - frames[0].transpose(2, 1, 0))
    palette = np.random.default_rng(1).integers(0, 256, (3, 256)).astype(np.uint16) * 257
    tifffile.imwrite(tmp_path / "palette.tif", frames[0], photometric="palette", colormap=palette)
    expected = (palette[:, frames[0]] // 257).transpose(3, 2, 1, 0)
    assert np.array_equal(read_volume(tmp_path / "palette.tif").values, expected)


def test_gif(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (4, 6, 8), dtype=np.uint8)
    pages = [Image.fromarray(frame) for frame in frames]
    pages[0].save(tmp_path / "a.gif", save_all=True, append_images=pages[1:])
    found, _, _ = _prepare(tmp_path / "out", "-i", tmp_path / "a.gif")
    assert np.array_equal(found, frames)


@pytest.mark.parametrize("colour", [False, True])
@pytest.mark.parametrize("suffix", ["mp4", "avi"])
def test_video(tmp_path, colour, suffix):
    imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")
    ramp = np.linspace(40, 200, 64 * 48).reshape(48, 64, 1)
    frames = np.stack([np.repeat(ramp + 5 * k, 3, axis=2) for k in range(6)])
    frames[..., 0] += 40 * colour
    frames = frames.round().astype(np.uint8)
    writer = imageio_ffmpeg.write_frames(str(tmp_path / f"a.{suffix}"), (64, 48), quality=9)
    writer.send(None)
    for frame in frames:
        writer.send(frame.tobytes())
    writer.close()
    found, _, geometry = _prepare(tmp_path / "out", "-i", tmp_path / f"a.{suffix}")
    assert found.shape == (frames.shape if colour else frames.shape[:3]) and found.dtype == np.uint8
    # lossy, and colours are rounded to the video's range: a few levels of 255
    assert np.abs(found.astype(int) - (frames if colour else frames[..., 0])).mean() < 4
    assert geometry.affine is None and geometry.slice_count == 6


def test_a_file_that_is_no_video(tmp_path):
    pytest.importorskip("imageio_ffmpeg")
    (tmp_path / "text.mp4").write_text("hello")
    with pytest.raises(UserError, match=r"text\.mp4 cannot be read: not a video, or damaged"):
        read_volume(tmp_path / "text.mp4")


def test_missing_frame_numbers_are_named(tmp_path, capsys):
    for number in (3, 4, 5, 8, 9):
        write_image(tmp_path / "in" / f"frame_{number:03d}.png", np.full((5, 4), number / 10))
    _, _, geometry = _prepare(tmp_path / "out", "-i", tmp_path / "in")
    assert "2 numbers are missing (6, 7)" in capsys.readouterr().out
    assert geometry.positions == (0, 1, 2, 5, 6) and geometry.slices == (0, 1, 2, 3, 4)
    assert geometry.durations() == pytest.approx(np.array([1, 1, 3, 1, 1]) / 7)


def test_numbers_that_do_not_count_frames_are_left_aside(tmp_path, capsys):
    for seconds in (0, 1, 100, 101, 60 * 60 * 24 * 365):
        write_image(tmp_path / "in" / f"2024{seconds:010d}.png", np.full((5, 4), 0.5))
    _, _, geometry = _prepare(tmp_path / "out", "-i", tmp_path / "in")
    assert "do not count" in capsys.readouterr().out and geometry.durations() is None
    for number in (0, 2, 4, 6):  # every second one is even
        write_image(tmp_path / "even" / f"{number}.png", np.full((5, 4), 0.5))
    _, _, geometry = _prepare(tmp_path / "out2", "-i", tmp_path / "even")
    assert "note" not in capsys.readouterr().out and geometry.positions == (0, 1, 2, 3)


# --- Windows and crops --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CT_WINDOWS)
def test_ct_windows(tmp_path, name):
    values = np.linspace(-1024, 2000, int(np.prod(SHAPE))).reshape(SHAPE).astype(np.int16)
    _, _, geometry = _prepare(tmp_path / "out", "-i", _nifti(tmp_path / "a.nii", values), "--ct_window", name)
    level, width = CT_WINDOWS[name]
    assert geometry.window == (level - width / 2, level + width / 2)
    page = (Path(__file__).parents[1] / "docs/how-to/prepare.md").read_text()
    assert f"| `{name}` | {level} | {width} |" in page.replace("−", "-")


def test_a_window_below_zero(tmp_path):
    _, _, geometry = _prepare(tmp_path / "out", "-i", _nifti(tmp_path / "a.nii"), "--window", "-50", "-10.5")
    assert geometry.window == (-50, -10.5)


def test_a_ct_window_on_something_else_is_mentioned(tmp_path, capsys):
    _prepare(
        tmp_path / "out", "-i", _nifti(tmp_path / "a.nii", VALUES - VALUES.min()), "--ct_window", "brain"
    )
    assert "Hounsfield" in capsys.readouterr().out


def test_crop_to_the_label_and_its_margin(tmp_path):
    labels = np.zeros(SHAPE, np.uint8)
    labels[3:6, 4, 2:4] = 1
    image, label = _nifti(tmp_path / "a.nii"), _nifti(tmp_path / "l.nii", labels)
    whole, all_masks, truth = _prepare(tmp_path / "all", "-i", image, "-l", label)
    for margin, box in (("0", (3, 1, 2)), ("0.7", (5, 3, 4)), ("1000", SHAPE)):
        out = tmp_path / margin
        frames, masks, geometry = _prepare(out, "-i", image, "-l", label, "--crop", margin)
        # 0.7 mm are a column, and not more than a row or a slice
        assert (geometry.size[0], geometry.size[1], len(frames)) == box
        assert np.count_nonzero(masks) == 6
        (left, top), first = geometry.offset, geometry.slices[0]
        part = (slice(first, first + box[2]), slice(top, top + box[1]), slice(left, left + box[0]))
        assert np.array_equal(frames, whole[part]) and np.array_equal(masks, all_masks[part])
        corner = apply_affine(truth.matrix, (left, top, first))
        assert np.allclose(apply_affine(geometry.matrix, (0, 0, 0)), corner, atol=1e-9)


def test_crop_without_label_leaves_the_background(tmp_path, capsys):
    values = np.random.default_rng(0).integers(0, 5, (30, 24, 20)).astype(np.int16)
    values[8:15, 9:20, 4:12] += 100
    image = _nifti(tmp_path / "a.nii", values, np.diag([-1, -1, 1, 1]))
    frames, _, geometry = _prepare(tmp_path / "a", "-i", image, "--crop", "1")
    assert (
        frames.shape == (10, 13, 9) and geometry.offset == (7, 8) and geometry.slices == tuple(range(3, 13))
    )
    frames, _, _ = _prepare(tmp_path / "b", "-i", image, "--crop")
    assert frames.shape == (20, 24, 25)  # 10 mm: columns 0 to 24, all else


ORIENTATIONS = [
    (order, signs)
    for order in itertools.permutations(range(3))
    for signs in itertools.product((-1, 1), repeat=3)
]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_every_voxel_is_where_it_was_after_cut_crop_and_keep_every(tmp_path_factory, data):
    """Kept and held-out frames of any orientation, axis, shear, crop and step: masks to frames to millimetres."""
    folder = tmp_path_factory.mktemp("case")
    draw = data.draw
    shape = tuple(draw(st.integers(3, 7)) for _ in range(3))
    order, signs = draw(st.sampled_from(ORIENTATIONS))
    turn, shear = draw(st.floats(-0.6, 0.6)), draw(st.sampled_from([0.0, 0.3]))
    affine = _affine(signs, order, [draw(st.floats(0.3, 4)) for _ in range(3)], turn, shear)
    labels = np.zeros(shape, np.uint8)
    for axis in range(3):  # never empty, and two slices or more along every axis
        first, last = sorted(draw(st.sampled_from(list(itertools.combinations(range(shape[axis]), 2)))))
        labels[tuple(slice(first, last + 1) if other == axis else slice(1, 3) for other in range(3))] = 1
    values = np.arange(np.prod(shape), dtype=np.int16).reshape(shape)  # its own index
    arguments = ["--axis", draw(st.sampled_from("012")), "--window", "0", "65535", "--bits", "16", "--quiet"]
    arguments += ["--keep_every", str(step := draw(st.integers(1, 2)))]
    if draw(st.booleans()):
        arguments += ["--crop", str(draw(st.floats(0, 3)))]
    image, label = _nifti(folder / "a.nii", values, affine), _nifti(folder / "l.nii", labels, affine)
    out = folder / "out"
    try:
        _prepare(out, "-i", image, "-l", label, *arguments)
    except UserError as error:
        assert step == 2 and ("at least 2" in str(error) or "nothing labelled" in str(error))
        return
    geometry = Geometry.load(out / "frames.json")
    stored = nibabel.load(image).affine  # float32
    seen = 0
    for kind, indices in (("original", range(len(geometry.slices))), ("heldout", geometry.heldout_indices())):
        if not indices:
            assert not (out / "img" / kind).exists()
            continue
        frames, masks = _frames(out / "img" / kind), _frames(out / "seg" / kind)
        assert len(frames) == len(indices) and frames.shape[1:] == geometry.size[::-1]
        for frame, index in enumerate(indices):
            rows, columns = np.indices(frames.shape[1:])
            points = np.stack((columns, rows, np.full(rows.shape, index)), -1).astype(float)
            voxels = apply_affine(np.linalg.inv(stored), apply_affine(geometry.matrix, points))
            assert np.abs(voxels - voxels.round()).max() < 1e-6
            at = tuple(np.moveaxis(voxels.round().astype(int), -1, 0))
            assert np.array_equal(frames[frame], values[at]) and np.array_equal(
                masks[frame], labels[at] * 255
            )
            seen += np.count_nonzero(masks[frame])
    if step == 1:
        assert seen == np.count_nonzero(labels)  # the crop took nothing of the label


# --- Refusals -----------------------------------------------------------------------------------------------


def _refusals(folder):
    """name -> (arguments, what the error says)"""
    affine, good = _affine(), _nifti(folder / "good.nii.gz")
    write_series(folder / "twice", VALUES, affine)
    write_series(folder / "twice", VALUES, affine, prefix="again")
    series = [file for file in (folder / "twice").iterdir() if file.name.startswith("again")]
    uid = pydicom.dcmread(folder / "twice" / "slice000.dcm").SeriesInstanceUID
    for file in series:
        header = pydicom.dcmread(file)
        header.SeriesInstanceUID = uid
        header.save_as(file)
    turned = [[1, 0, 0, 0, 1, 0]] * 5 + [[1, 0, 0, 0, 0, 1]]
    write_series(folder / "localizer", VALUES, np.diag([-1, -1, 2, 1]), ImageOrientationPatient=turned)
    places = [[0, 0, k] for k in range(5)] + [[3, 0, 5]]
    write_series(folder / "astray", VALUES, np.diag([-1, -1, 1, 1]), ImagePositionPatient=places)
    write_series(folder / "both", VALUES, affine)
    write_image(folder / "both" / "preview.png", np.zeros((4, 4)))
    write_series(folder / "short", VALUES, affine)
    cut = folder / "short" / "slice014.dcm"
    cut.write_bytes(cut.read_bytes()[:-60])
    write_series(folder / "lossy", VALUES, affine, LossyImageCompression="01")
    write_series(folder / "sizes", VALUES[:, :, :3], affine)
    uid = pydicom.dcmread(folder / "sizes" / "slice000.dcm").SeriesInstanceUID
    write_series(folder / "sizes", VALUES[:5, :, 3:], affine, prefix="b", SeriesInstanceUID=uid)
    write_enhanced(folder / "copies.dcm", VALUES, affine, [0, 1, 2, 0, 1, 2], [1.0] * 6)
    (folder / "junk").mkdir()
    (folder / "junk" / "a.dcm").write_text("hello")
    Image.new("L", (4, 4)).save(folder / "vast.gif")
    vast = bytearray((folder / "vast.gif").read_bytes())
    vast[6:10] = b"\xff\xff\xff\xff"  # the size of its screen
    (folder / "vast.gif").write_bytes(vast)
    for name in ("text.nrrd", "text.mha", "text.tif", "text.gif"):
        (folder / name).write_text("hello")
    sitk.WriteImage(sitk.GetImageFromArray(VALUES[0]), str(folder / "flat.nrrd"))
    sitk.WriteImage(sitk.GetImageFromArray(VALUES[None, None]), str(folder / "5d.mha"))
    Path(_itk(folder / "lost.mhd")).with_suffix(".zraw").unlink()
    Path(_itk(folder / "lost.nhdr")).with_suffix(".raw.gz").unlink()
    tifffile.imwrite(folder / "one.tif", np.zeros((4, 5), np.uint8))
    with tifffile.TiffWriter(folder / "kinds.tif") as writer:
        writer.write(np.zeros((4, 5), np.uint8))
        writer.write(np.zeros((5, 5), np.uint8))
    singular = "ObjectType = Image\nNDims = 3\nTransformMatrix = 1 0 0 1 0 0 0 0 1\nDimSize = 2 2 2\n"
    (folder / "singular.mha").write_bytes(
        f"{singular}ElementType = MET_UCHAR\nElementDataFile = LOCAL\n".encode() + bytes(8)
    )
    colours = np.zeros((4, 6, 7, 3), np.uint8)
    for number in range(6):
        colours[0, 0, 0, 0] = 255
        write_image(folder / "pictures" / f"{number}.png", np.full((7, 9), number / 6))
        write_image(
            folder / "coloured" / f"{number}.png", np.linspace(0, 1, 63).reshape(7, 9, 1) * [1.0, 0, 0]
        )
        write_image(folder / "jpegs" / f"{number}.jpg", np.linspace(0, 1, 63).reshape(7, 9))
        write_image(folder / "numbered" / f"{number + (number > 2)}.png", np.eye(9)[:7])
    pictures = str(folder / "pictures")
    return {
        "duplicate positions": (["-i", folder / "twice"], "6 slices lie where another one does"),
        "a localizer": (["-i", folder / "localizer"], "differ in orientation or pixel size"),
        "a slice astray": (["-i", folder / "astray"], "off the line of the others"),
        "DICOM and images": (["-i", folder / "both"], "holds DICOM files and images"),
        "a truncated slice": (["-i", folder / "short"], "slice014.dcm is damaged"),
        "slices of two sizes": (["-i", folder / "sizes"], "slices have one size"),
        "frames twice": (["-i", folder / "copies.dcm"], "3 slices lie where another one does (frame 0 and frame 3)"),
        "a mosaic": (["-i", Path(nibabel.__path__[0]) / "nicom/tests/data/0.dcm"], "is a mosaic"),
        "no DICOM image": (["-i", folder / "junk"], "no DICOM image that can be read (tried a.dcm)"),
        "one DICOM file": (["-i", folder / "localizer" / "slice000.dcm"], "give -i the folder of its series"),
        "no such series": (["-i", folder / "localizer", "--series", "1.2"], "has no series 1.2"),
        "series of a file": (["-i", good, "--series", "1.2"], "--series chooses from a folder"),
        "series of images": (["-i", pictures, "--series", "1.2"], "no --series to choose"),
        "no NRRD": (["-i", folder / "text.nrrd"], "damaged, or not what its name says"),
        "no MetaImage": (["-i", folder / "text.mha"], "damaged, or not what its name says"),
        "no TIFF": (["-i", folder / "text.tif"], "cannot be read"),
        "no GIF": (["-i", folder / "text.gif"], "cannot be read"),
        "a vast GIF": (["-i", folder / "vast.gif"], "65535 x 65535 pixels, over the limit"),
        "2-D NRRD": (["-i", folder / "flat.nrrd"], "is 2-D"),
        "5-D MetaImage": (["-i", folder / "5d.mha"], "is 5-D"),
        "lost data file": (["-i", folder / "lost.mhd"], "is a header alone: lost.zraw"),
        "lost data file of NRRD": (["-i", folder / "lost.nhdr"], "is a header alone: lost.raw.gz"),
        "singular": (["-i", folder / "singular.mha"], "singular.mha"),
        "one page": (["-i", folder / "one.tif"], "holds one page"),
        "pages of two sizes": (["-i", folder / "kinds.tif"], "pages of several kinds (4 x 5, 5 x 5)"),
        "a window beside the values": (["-i", good, "--window", "5000", "6000"], "shows nothing: good.nii.gz"),
        "a margin of words": (["-i", good, "--crop", "much"], "much is not a number of millimetres"),
        "a negative margin": (["-i", good, "--crop", "-1"], "-1 is not a number of millimetres"),
        "two windows": (["-i", good, "--window", "0", "1", "--ct_window", "brain"], "not allowed with"),
        "a JPEG label": (["-i", pictures, "-l", folder / "jpegs"], "does not keep labels exactly"),
        "a label of lossy DICOM": (["-i", good, "-l", folder / "lossy"], "does not keep labels exactly"),
        "a coloured label": (["-i", pictures, "-l", folder / "coloured"], "63 colours: a mask holds one number"),
        "another numbering": (["-i", pictures, "-l", folder / "numbered"], "numbered differently"),
    }  # fmt: skip


def test_every_mistake_is_one_line_and_writes_nothing(tmp_path, capfd):
    (tmp_path / "in").mkdir()
    refusals = _refusals(tmp_path / "in")
    before = sorted(tmp_path.rglob("*"))
    for name, (arguments, message) in refusals.items():
        with pytest.raises(UserError) as error:
            main([*map(str, arguments), "-o", str(tmp_path / "made" / "out"), "--quiet"])
            pytest.fail(f"{name}: no error")
        assert message in str(error.value), f"{name}: {error.value}"
        assert "\n" not in str(error.value), name
        assert sorted(tmp_path.rglob("*")) == before, name
    assert capfd.readouterr() == ("", "")  # libraries are silent too


@pytest.mark.parametrize(
    "module, name",
    [("SimpleITK", "a.nrrd"), ("pydicom", "a.dcm"), ("imageio_ffmpeg", "a.mp4")],
)
def test_a_missing_library_is_asked_for_by_name(tmp_path, monkeypatch, module, name):
    write_enhanced(tmp_path / name, VALUES, _affine(), [0, 1], [1.0, 1.0])
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=f"{name}.* needs {module.replace('_', '-')}: pip install "):
        read_volume(tmp_path / name)
