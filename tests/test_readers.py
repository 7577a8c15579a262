"""NIfTI, NRRD, MetaImage, TIFF, pictures and videos by their own headers: what they state, and what they leave out."""

import gzip
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import tifffile
from nibabel.affines import apply_affine, voxel_sizes
from PIL import Image

from patient.readers import read_volume
from patient.volumes import Choice
from prepare import main
from utils.errors import UserError
from utils.images import image_files, read_image

ROOT = Path(__file__).parents[1]
SHAPE = (9, 7, 6)
VALUES = np.random.default_rng(0).permutation(int(np.prod(SHAPE))).reshape(SHAPE).astype(np.int16)
AFFINE = np.array([[-0.8, 0, 0, 90], [0, 0.9, 0, -120], [0, 0, 3, -70], [0, 0, 0, 1]], float)


def said(volume):
    return " | ".join(volume.notes)


# --- NIfTI --------------------------------------------------------------------------------------------------


def _image(sform=None, qform=None, values=VALUES):
    """A NIfTI image with these forms; a form that is None has code 0."""
    image = nibabel.Nifti1Image(values, None)
    image.header.set_zooms((*voxel_sizes(AFFINE), *[1.0] * (values.ndim - 3)))
    image.set_sform(sform, 0 if sform is None else 2)
    image.set_qform(qform, 0 if qform is None else 1)
    return image


MOVED = AFFINE + np.array([[0, 0, 0, 10], [0, 0, 0, -20], [0, 0, 0, 15], [0, 0, 0, 0]])


@pytest.mark.parametrize(
    "form, used, other", [(None, MOVED, AFFINE), ("s", MOVED, AFFINE), ("q", AFFINE, MOVED)]
)
def test_forms_that_differ_are_said_with_by_how_much(tmp_path, form, used, other):
    nibabel.save(_image(MOVED, AFFINE), tmp_path / "a.nii")
    volume = read_volume(tmp_path / "a.nii", choice=Choice(form=form))
    assert np.allclose(volume.affine, used, atol=1e-5) and np.allclose(volume.other_affine, other, atol=1e-5)
    assert "26.93 mm apart" in said(volume)  # |(10, -20, 15)|
    nibabel.save(_image(MOVED, MOVED), tmp_path / "b.nii")
    assert read_volume(tmp_path / "b.nii").notes == []


def test_a_form_that_is_not_there_is_refused(tmp_path):
    nibabel.save(_image(AFFINE, None), tmp_path / "a.nii")
    with pytest.raises(UserError, match=r"no qform to place it by \(its code is 0\)"):
        read_volume(tmp_path / "a.nii", choice=Choice(form="q"))


def test_a_zero_sform_beside_a_good_qform(tmp_path):
    path = _patched(tmp_path / "a.nii", 280, bytes(48))  # srow_x, srow_y, srow_z
    volume = read_volume(path)
    assert np.allclose(volume.affine, AFFINE, atol=1e-5) and "the qform is used" in said(volume)


@pytest.mark.parametrize("whose", ["image", "label"])
def test_a_label_written_with_the_other_form_meets_its_image(tmp_path, whose, capsys):
    """As ITK writes it, which reads the qform: where the image's other form puts it, it is the image's grid."""
    small = AFFINE + np.array([[0, 0, 0, 2.4], [0, 0, 0, -1.8], [0, 0, 0, 3], [0, 0, 0, 0]])
    label = (VALUES > 100).astype(np.uint8)
    two, one = _image(small, AFFINE), _image(AFFINE, AFFINE)
    if whose == "label":
        two, one = _image(AFFINE, AFFINE), _image(small, AFFINE)
    nibabel.save(two, tmp_path / "a.nii")
    nibabel.save(nibabel.Nifti1Image(label, None, one.header), tmp_path / "l.nii")
    main(["-i", str(tmp_path / "a.nii"), "-l", str(tmp_path / "l.nii"), "-o", str(tmp_path / "out")])
    assert "other form" in capsys.readouterr().out
    masks = [read_image(file) for file in image_files(tmp_path / "out" / "seg" / "original")]
    assert sum(np.count_nonzero(mask) for mask in masks) == label.sum()


@pytest.mark.parametrize(
    "kind", ["pair", "packed pair", "plain .nii.gz", "packed .nii", "(x, y, z, 1, 1)", "NIfTI-2"]
)
def test_other_ways_to_store_it(tmp_path, kind):
    path = tmp_path / "a.nii"
    image = _image(AFFINE, AFFINE)
    if kind.endswith("pair"):
        path = tmp_path / ("a.img.gz" if kind.startswith("packed") else "a.img")
        nibabel.save(nibabel.Nifti1Pair(VALUES, AFFINE), path)
    elif kind == "plain .nii.gz":
        nibabel.save(image, path)
        path = path.rename(tmp_path / "a.nii.gz")
    elif kind == "packed .nii":
        nibabel.save(image, path)
        path.write_bytes(gzip.compress(path.read_bytes()))
    elif kind == "NIfTI-2":
        nibabel.save(nibabel.Nifti2Image(VALUES, AFFINE), path)
    else:
        nibabel.save(nibabel.Nifti1Image(VALUES[..., None, None], AFFINE), path)
    volume = read_volume(path)
    assert np.array_equal(volume.values, VALUES) and np.allclose(volume.affine, AFFINE, atol=1e-5)


def _patched(path, offset, value):
    nibabel.save(_image(AFFINE, AFFINE), path)
    data = bytearray(path.read_bytes())
    data[offset : offset + len(value)] = value
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    "offset, value, words",
    [
        (42, struct.pack("<3h", 30000, 30000, 30000), r"claims 5.4e\+04 GB"),
        (42, struct.pack("<h", -224), r"gives the shape \(-224, 7, 6\)"),
        (40, struct.pack("<h", 9), "in 9 dimensions"),
        (70, struct.pack("<h", -32764), "data type, code -32764, is none of NIfTI's"),
        (123, bytes([5]), "unit of length, code 5, is none of NIfTI's"),
        (108, struct.pack("<f", float("nan")), "puts the voxels at byte nan"),
        (0, b"\0\0\0\0", "its first bytes are no NIfTI header"),
        (344, b"\0\0\0\0", "Analyze 7.5"),
        (280, struct.pack("<4f", float("nan"), 0, 0, 0), "qform is used|cannot be placed"),
    ],
)
def test_damaged_headers_are_one_line(tmp_path, offset, value, words):
    path = _patched(tmp_path / "a.nii", offset, value)
    try:
        told = said(read_volume(path))
    except UserError as error:
        told = str(error)
    assert re.search(words, told), told


def test_no_allocation_because_a_header_claims_it(tmp_path):
    """18 GB and more in 18 kB, in a process that may use 1 GiB more than at its start."""
    paths = [_patched(tmp_path / "a.nii", 42, struct.pack("<3h", 3000, 3000, 1000))]
    lines = [
        "NRRD0004",
        "type: short",
        "dimension: 3",
        "sizes: 3000 3000 1000",
        "spacings: 1 1 1",
        "encoding: raw",
        "endian: little",
        "",
        "",
    ]
    (tmp_path / "a.nrrd").write_bytes("\n".join(lines).encode() + bytes(18000))
    meta = "ObjectType = Image\nNDims = 3\nDimSize = 3000 3000 1000\nElementSpacing = 1 1 1\nElementType = MET_SHORT\n"
    (tmp_path / "a.mha").write_bytes(f"{meta}ElementDataFile = LOCAL\n".encode() + bytes(18000))
    script = (
        "import resource, sys; from patient.readers import read_volume; from utils.errors import UserError\n"
        "import SimpleITK\n"
        "size = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize() + (1 << 30)\n"
        "resource.setrlimit(resource.RLIMIT_AS, (size, size))\n"
        "for path in sys.argv[1:]:\n"
        "    try: read_volume(path); print('read')\n"
        "    except UserError as error: print(error)\n"
    )
    command = [sys.executable, "-c", script, *map(str, (*paths, tmp_path / "a.nrrd", tmp_path / "a.mha"))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    told = done.stdout.splitlines()
    assert len(told) == 3 and all("claims 18 GB" in line for line in told), done.stdout + done.stderr


# --- NRRD and MetaImage -------------------------------------------------------------------------------------


def _nrrd(path, *lines, values=VALUES, sizes=None):
    kind = {"int16": "short", "uint8": "uchar"}[values.dtype.name]
    sizes = " ".join(map(str, sizes or values.shape))
    head = [
        "NRRD0005",
        f"type: {kind}",
        f"dimension: {values.ndim}",
        f"sizes: {sizes}",
        "encoding: raw",
        "endian: little",
    ]
    path.write_bytes("\n".join([*head, *lines, "", ""]).encode("utf-8") + values.tobytes(order="F"))
    return path


@pytest.mark.parametrize(
    "unit, factor", [("um", 1e-3), ("µm", 1e-3), ("cm", 10), ("mm", 1), ("micron", 1e-3)]
)
def test_units_of_nrrd(tmp_path, unit, factor):
    pytest.importorskip("SimpleITK")
    path = _nrrd(
        tmp_path / "a.nrrd",
        "space: left-posterior-superior",
        f'space units: "{unit}" "{unit}" "{unit}"',
        "space directions: (800,0,0) (0,900,0) (0,0,3000)",
        "space origin: (1000,2000,3000)",
    )
    volume = read_volume(path)
    assert voxel_sizes(volume.affine) == pytest.approx(np.array([800, 900, 3000]) * factor)
    assert apply_affine(volume.affine, (0, 0, 0)) == pytest.approx(np.array([-1000, -2000, 3000]) * factor)
    assert ("converted to millimetres" in said(volume)) == (factor != 1)


def test_an_unknown_unit_is_said(tmp_path):
    pytest.importorskip("SimpleITK")
    units = ['space units: "inches" "inches" "inches"', "space directions: (1,0,0) (0,1,0) (0,0,1)"]
    volume = read_volume(_nrrd(tmp_path / "a.nrrd", "space: left-posterior-superior", *units))
    assert "is unknown: taken as millimetres" in said(volume)


def test_missing_spacing_is_said_and_no_millimetre_is_invented(tmp_path):
    pytest.importorskip("SimpleITK")
    for path in (_nrrd(tmp_path / "a.nrrd"), _nrrd(tmp_path / "b.nrrd", "spacings: nan nan nan")):
        volume = read_volume(path)
        assert volume.affine is None and "sizes are in voxels" in said(volume)
    meta = (
        "ObjectType = Image\nNDims = 3\nDimSize = 9 7 6\nElementType = MET_SHORT\nElementDataFile = LOCAL\n"
    )
    (tmp_path / "a.mha").write_bytes(meta.encode() + VALUES.tobytes(order="F"))
    volume = read_volume(tmp_path / "a.mha")
    assert volume.affine is None and "sizes are in voxels" in said(volume)
    assert np.array_equal(volume.values, VALUES)


@pytest.mark.parametrize("count", [3, 4])
def test_a_list_is_no_colour(tmp_path, count):
    pytest.importorskip("SimpleITK")
    series = np.stack([(VALUES + n).astype(np.uint8) for n in range(count)])
    lines = ["space: left-posterior-superior", "space directions: none (0.8,0,0) (0,0.9,0) (0,0,3)"]
    path = _nrrd(tmp_path / "a.seq.nrrd", *lines, "kinds: list domain domain domain", values=series)
    assert np.array_equal(read_volume(path, 1).values, series[1])
    with pytest.raises(UserError, match=f"{count} volumes: choose one with --frame"):
        read_volume(path)
    colour = "RGB-color" if count == 3 else "RGBA-color"
    path = _nrrd(tmp_path / "c.nrrd", *lines, f"kinds: {colour} domain domain domain", values=series)
    assert read_volume(path).values.shape == (*SHAPE, count)


@pytest.mark.parametrize("suffix", ["mha", "nrrd"])
def test_a_tracked_sequence_is_recognised(tmp_path, suffix):
    poses = {
        f"Seq_Frame{k:04d}_ProbeToTrackerTransform": f"1 0 0 {2.5 * k} 0 1 0 0 0 0 1 0 0 0 0 1"
        for k in range(6)
    }
    if suffix == "nrrd":
        path = _nrrd(
            tmp_path / "a.nrrd", "spacings: 1 1 1", *(f"{key}:={value}" for key, value in poses.items())
        )
    else:
        meta = "ObjectType = Image\nNDims = 3\nDimSize = 9 7 6\nElementSpacing = 1 1 1\n"
        meta += "".join(f"{key} = {value}\n" for key, value in poses.items())
        path = tmp_path / "a.igs.mha"
        path.write_bytes(
            f"{meta}ElementType = MET_SHORT\nElementDataFile = LOCAL\n".encode() + VALUES.tobytes(order="F")
        )
    pytest.importorskip("SimpleITK")
    with pytest.raises(UserError, match=r"tracked sequence: .*ProbeToTrackerTransform.*--resample MM"):
        read_volume(path)


@pytest.mark.parametrize("spacing", [1.0, 0.5])
def test_a_tracked_sequence_is_resampled(tmp_path, spacing):
    """Frames 2 mm apart of a pattern that is linear along the sweep: the volume is that pattern, holes filled."""
    pytest.importorskip("SimpleITK")
    i, j, k = np.indices((9, 7, 6))
    values = (10 + 3 * i + 5 * j + 8 * k).astype(np.uint8)
    meta = "ObjectType = Image\nNDims = 3\nDimSize = 9 7 6\nElementSpacing = 1 1 1\n"
    for n in range(6):
        status = "INVALID" if n == 2 else "OK"
        meta += f"Seq_Frame{n:04d}_ProbeToTrackerTransform = 1 0 0 4 0 1 0 5 0 0 1 {2 * n} 0 0 0 1\n"
        meta += f"Seq_Frame{n:04d}_ProbeToTrackerTransformStatus = {status}\n"
    path = tmp_path / "a.mha"
    path.write_bytes(
        f"{meta}ElementType = MET_UCHAR\nElementDataFile = LOCAL\n".encode() + values.tobytes(order="F")
    )
    volume = read_volume(path, choice=Choice(resample=spacing))
    assert voxel_sizes(volume.affine) == pytest.approx((spacing,) * 3)
    assert apply_affine(volume.affine, (0, 0, 0)) == pytest.approx((-4, -5, 0))
    x, y, z = np.indices(volume.values.shape) * spacing
    expected = 10 + 3 * np.rint(x) + 5 * np.rint(y) + 4 * z  # 8 levels in 2 mm
    # Half a pixel in the plane and half a voxel along the sweep is where a sample may have come from.
    assert np.abs(volume.values - expected).max() <= 1.5 + 2.5 + 4 * spacing / 2 + 0.5
    assert volume.padded is None and "1 of 6 frames have no valid pose" in said(volume)
    assert "are interpolated" in said(volume)


def test_affines_are_those_of_simple_itk(tmp_path):
    sitk = pytest.importorskip("SimpleITK")
    image = sitk.GetImageFromArray(VALUES.transpose(2, 1, 0))
    image.SetSpacing((0.8, 0.9, 3))
    image.SetOrigin((12.5, -30, 101))
    image.SetDirection((0.8, 0.6, 0, -0.6, 0.8, 0, 0, 0, 1))
    for name in ("a.nrrd", "a.mha", "a.nii.gz"):
        sitk.WriteImage(image, str(tmp_path / name))
        volume = read_volume(tmp_path / name)
        theirs = np.array(image.TransformIndexToPhysicalPoint((8, 6, 5))) * (-1, -1, 1)
        assert apply_affine(volume.affine, (8, 6, 5)) == pytest.approx(theirs, abs=1e-4)  # float32 in NIfTI
        assert np.array_equal(volume.values, VALUES)


# --- Pictures and videos ------------------------------------------------------------------------------------


def test_voxel_sizes_of_imagej_and_ome(tmp_path):
    frames = np.ascontiguousarray(VALUES.transpose(2, 1, 0).astype(np.uint8))
    metadata = {"axes": "ZYX", "spacing": 2.0, "unit": "um"}
    tifffile.imwrite(tmp_path / "a.tif", frames, imagej=True, resolution=(2.0, 4.0), metadata=metadata)
    volume = read_volume(tmp_path / "a.tif")
    assert voxel_sizes(volume.affine) == pytest.approx((0.0005, 0.00025, 0.002))
    assert "which way is left" in said(volume)
    sizes = {f"PhysicalSize{axis}": size for axis, size in zip("XYZ", (0.8, 0.9, 3.0), strict=True)}
    units = {f"PhysicalSize{axis}Unit": "mm" for axis in "XYZ"}
    tifffile.imwrite(tmp_path / "a.ome.tif", frames, metadata={"axes": "ZYX", **sizes, **units})
    assert voxel_sizes(read_volume(tmp_path / "a.ome.tif").affine) == pytest.approx((0.8, 0.9, 3))
    tifffile.imwrite(
        tmp_path / "t.tif", frames, imagej=True, resolution=(2.0, 4.0), metadata={"axes": "TYX", "unit": "mm"}
    )
    assert read_volume(tmp_path / "t.tif").sizes == (pytest.approx(0.5), pytest.approx(0.25), None)
    tifffile.imwrite(tmp_path / "dpi.tif", frames, resolution=(72, 72))
    assert read_volume(tmp_path / "dpi.tif").sizes is None  # of a printer


def test_exif_orientation_of_a_jpeg(tmp_path):
    frame = np.zeros((8, 16), np.uint8)
    frame[:, 8:] = 200  # right half bright
    picture = Image.fromarray(frame)
    exif = picture.getexif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to show it
    picture.save(tmp_path / "0.jpg", exif=exif, quality=95)
    shown = read_image(tmp_path / "0.jpg")
    assert shown.shape == (16, 8) and shown[12:].mean() > 150 and shown[:4].mean() < 50


def test_equal_and_negative_numbers_are_refused(tmp_path):
    for name in ("0.png", "1.png", "2.png"):
        Image.new("L", (5, 4)).save(tmp_path / name)
    Image.new("L", (5, 4)).save(tmp_path / "01.jpg")
    with pytest.raises(UserError, match="have the same number, 1"):
        read_volume(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    for k in range(-2, 3):
        Image.new("L", (5, 4)).save(other / f"slice_{k}mm.png")
    with pytest.raises(UserError, match="negative numbers"):
        read_volume(other)
    for k in range(3):
        Image.new("L", (5, 4)).save(tmp_path / f"case-{k}.png")  # a hyphen between words is no sign
    with pytest.raises(UserError, match="same number"):
        read_volume(tmp_path)


def test_frames_are_ordered_by_their_last_number(tmp_path):
    for k, name in enumerate(("b_1", "a_2", "c_3")):
        Image.new("L", (5, 4), 50 * k).save(tmp_path / f"{name}.png")
    assert read_volume(tmp_path).values[0, 0].tolist() == [0, 50, 100]


def test_twelve_bits_in_sixteen_are_said(tmp_path):
    for k in range(3):
        Image.fromarray(np.full((4, 5), 1500 + 1000 * k, np.uint16)).save(tmp_path / f"{k}.png")
    assert "12 bits in 16-bit pictures" in said(read_volume(tmp_path))


def test_a_video_keeps_its_true_frames_and_times(tmp_path):
    ffmpeg = pytest.importorskip("imageio_ffmpeg")
    (tmp_path / "pictures").mkdir()
    times, lines = (0.0, 0.08, 0.16, 0.64, 0.72), []  # at 25 frames per second
    for k in range(len(times)):
        Image.new("RGB", (64, 48), (40 * k + 20,) * 3).save(tmp_path / "pictures" / f"{k}.png")
    for k, lasts in enumerate((*np.diff(times), 0.08)):
        lines += [f"file 'pictures/{k}.png'", f"duration {lasts:.3f}"]
    (tmp_path / "list.txt").write_text("\n".join([*lines, ""]))
    command = [ffmpeg.get_ffmpeg_exe(), "-v", "error", "-f", "concat", "-i", str(tmp_path / "list.txt")]
    subprocess.run(
        [*command, "-fps_mode", "vfr", "-c:v", "mpeg4", "-q:v", "2", str(tmp_path / "a.mkv")], check=True
    )
    volume = read_volume(tmp_path / "a.mkv")
    assert volume.values.shape[2] == 5 and "keep their times" in said(volume)
    assert volume.depths == pytest.approx([0, 1, 2, 8, 9], abs=0.05)  # milliseconds of the container
    assert np.abs(volume.values.mean(axis=(0, 1)) - (40 * np.arange(5) + 20)).max() < 5


# --- Paths and kinds ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".nrrd", ".mha", ".mp4", ".nii", ".tif", ".gif", ".dcm"])
def test_a_path_that_is_not_utf8_is_no_crash(tmp_path, suffix):
    pytest.importorskip("SimpleITK")
    name = os.fsencode(tmp_path) + b"/a\xff" + suffix.encode()
    with open(name, "wb") as file:
        file.write(b"NRRD0004\n\n" if suffix == ".nrrd" else b"hello")
    command = [sys.executable, "prepare.py", "-i", os.fsdecode(name), "-o", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, cwd=ROOT)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr


@pytest.mark.parametrize(
    "name, words",
    [("a.mgz", "FreeSurfer"), ("a.png", "one picture"), ("a.stl", "a mesh"), ("a.zip", "an archive")],
)
def test_what_is_not_read_is_named_by_its_kind(tmp_path, name, words):
    (tmp_path / name).write_bytes(b"hello")
    with pytest.raises(UserError, match=words):
        read_volume(tmp_path / name)
