"""DICOM as in hospitals: order, position, spacing and scale from the files' own tags, or a refusal that says why."""

import importlib.util
import itertools
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
from dicom_files import dataset, functional_groups, pydicom, write_cine, write_frames, write_series
from nibabel.affines import apply_affine

from patient.readers import read_volume
from patient.readers.dicom import files, pixels
from patient.volumes import Choice
from prepare import main
from utils.errors import UserError

uid = pydicom.uid
SHAPE = (9, 7, 6)
VALUES = np.random.default_rng(0).permutation(int(np.prod(SHAPE))).reshape(SHAPE).astype(np.int16)
UNSIGNED = VALUES.astype(np.uint16)
# Columns to the left, rows to the back, slices up: slices are ordered along their normal.
AFFINE = np.array([[-0.8, 0, 0, 12.5], [0, -0.9, 0, -30.25], [0, 0, 3, 101], [0, 0, 0, 1]], float)
TURNED = np.array([[0, -0.9, 0, 30], [-0.8, 0, 0, 20], [0, 0, -3, -50], [0, 0, 0, 1]], float)


def said(volume):
    return " | ".join(volume.notes)


# --- Spacing ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    [
        uid.CTImageStorage,
        uid.ComputedRadiographyImageStorage,
        uid.DigitalMammographyXRayImageStorageForPresentation,
        uid.XRayAngiographicImageStorage,
        uid.XRayRadiofluoroscopicImageStorage,
        uid.NuclearMedicineImageStorage,
        "1.2.840.10008.5.1.4.1.1.999.1",
    ],
)
def test_pixel_spacing_is_read_whatever_the_class(tmp_path, kind):
    write_series(tmp_path / "d", VALUES, AFFINE, SOPClassUID=kind)
    assert np.allclose(read_volume(tmp_path / "d").affine, AFFINE, atol=1e-6)


def test_imager_pixel_spacing_is_the_next_best_and_said(tmp_path):
    write_series(tmp_path / "d", VALUES, AFFINE, PixelSpacing=None, ImagerPixelSpacing=[["0.9", "0.8"]] * 6)
    volume = read_volume(tmp_path / "d")
    assert np.allclose(volume.affine, AFFINE, atol=1e-6) and "at the detector" in said(volume)


@pytest.mark.parametrize("spacing", [None, "", [["0", "0"]] * 6, [["0.9"]] * 6])
def test_without_spacing_sizes_are_pixels_and_never_one_millimetre(tmp_path, spacing, capsys):
    write_series(tmp_path / "d", VALUES, AFFINE, PixelSpacing=spacing)
    volume = read_volume(tmp_path / "d")
    assert volume.affine is None and volume.sizes == (None, None, pytest.approx(3))
    assert "sizes are in pixels" in said(volume) and np.array_equal(volume.values, VALUES)
    main(["-i", str(tmp_path / "d"), "-o", str(tmp_path / "out")])
    assert "? x ? x 3 mm" in capsys.readouterr().out


def test_the_spacing_of_an_ultrasound_region(tmp_path):
    region = dataset(
        PhysicalUnitsXDirection=3, PhysicalUnitsYDirection=3, PhysicalDeltaX=0.05, PhysicalDeltaY=0.04
    )
    frames = np.zeros((3, 6, 8), np.uint8)
    write_cine(tmp_path / "a.dcm", frames)
    header = pydicom.dcmread(tmp_path / "a.dcm")
    header.SequenceOfUltrasoundRegions = [region]
    header.save_as(tmp_path / "a.dcm")
    assert read_volume(tmp_path / "a.dcm").sizes == (pytest.approx(0.5), pytest.approx(0.4), None)
    region.PhysicalUnitsXDirection = 4  # seconds: a Doppler trace
    header.save_as(tmp_path / "a.dcm")
    assert read_volume(tmp_path / "a.dcm").sizes is None


# --- Order --------------------------------------------------------------------------------------------------


def test_slice_locations_order_what_has_no_position(tmp_path):
    places = [30.0, 5.0, 10.0, 25.0, 15.0, 20.0]
    write_series(
        tmp_path / "d", VALUES, AFFINE, ImagePositionPatient=None, InstanceNumber=1, SliceLocation=places
    )
    volume = read_volume(tmp_path / "d")
    assert np.array_equal(volume.values, VALUES[:, :, np.argsort(places)])
    assert "by their slice locations" in said(volume) and "which way is left" in said(volume)
    assert nibabel.affines.voxel_sizes(volume.affine) == pytest.approx((0.8, 0.9, 5))


def test_instance_numbers_order_where_locations_tie(tmp_path):
    tags = {"ImagePositionPatient": None, "SliceLocation": "0", "InstanceNumber": [3, 1, 2, 6, 5, 4]}
    write_series(tmp_path / "d", VALUES, AFFINE, **tags)
    volume = read_volume(tmp_path / "d")
    assert np.array_equal(volume.values, VALUES[:, :, [1, 2, 0, 5, 4, 3]]) and "by their numbers" in said(
        volume
    )


def test_no_order_is_refused_with_the_files_that_tie(tmp_path):
    write_series(tmp_path / "d", VALUES, AFFINE, ImagePositionPatient=None, InstanceNumber=[1, 2, 3, 4, 4, 5])
    with pytest.raises(UserError, match=r"slice028.dcm and slice021.dcm|slice021.dcm and slice028.dcm"):
        read_volume(tmp_path / "d")


def test_the_slice_without_position_is_named(tmp_path):
    write_series(tmp_path / "d", VALUES, AFFINE)
    file = tmp_path / "d" / "slice021.dcm"
    header = pydicom.dcmread(file)
    del header.ImagePositionPatient
    header.save_as(file)
    with pytest.raises(UserError, match=r"no position in the patient for slice021.dcm, but for the other 5"):
        read_volume(tmp_path / "d")


# --- Several volumes in one series --------------------------------------------------------------------------


def _second(folder, series, values, affine, **tags):
    """Another volume in the same series."""
    write_series(folder, values, affine, prefix="z", SeriesInstanceUID=series, **tags)


@pytest.mark.parametrize("shift", [1.0, 1.5, 16.5, 0.0])
def test_acquisitions_are_listed_and_chosen(tmp_path, shift):
    series = write_series(tmp_path / "d", VALUES, AFFINE, AcquisitionNumber=1)
    moved = AFFINE.copy()
    moved[2, 3] += shift
    _second(tmp_path / "d", series, VALUES[:, :, :4] + 1000, moved, AcquisitionNumber=2)
    with pytest.raises(
        UserError, match=r"2 acquisitions: 1 \(6 slices\), 2 \(4 slices\): .* --acquisition N"
    ):
        read_volume(tmp_path / "d")
    first, second = (read_volume(tmp_path / "d", choice=Choice(acquisition=n)) for n in (1, 2))
    assert np.array_equal(first.values, VALUES) and np.array_equal(second.values, VALUES[:, :, :4] + 1000)
    assert np.allclose(second.affine, moved, atol=1e-6) and "missing" not in said(first)
    with pytest.raises(UserError, match=r"no acquisition 3: it has 1 \(6 slices\)"):
        read_volume(tmp_path / "d", choice=Choice(acquisition=3))


def test_acquisitions_that_make_one_even_stack_are_one_volume(tmp_path):
    write_series(tmp_path / "d", VALUES, AFFINE, AcquisitionNumber=[1, 1, 2, 2, 3, 3])
    volume = read_volume(tmp_path / "d")
    assert np.array_equal(volume.values, VALUES) and "3 acquisitions" in said(volume)


@pytest.mark.parametrize("numbered", [True, False])
def test_echoes(tmp_path, numbered):
    tags = [
        {"EchoTime": str(time), **({"EchoNumbers": n} if numbered else {})}
        for n, time in ((1, 5.0), (2, 12.5))
    ]
    series = write_series(tmp_path / "d", VALUES, AFFINE, **tags[0])
    _second(tmp_path / "d", series, VALUES + 1000, AFFINE, **tags[1])
    with pytest.raises(
        UserError, match=r"2 echoes: 1 \(6 slices\), 2 \(6 slices\): choose one with --echo N"
    ):
        read_volume(tmp_path / "d")
    assert np.array_equal(read_volume(tmp_path / "d", choice=Choice(echo=2)).values, VALUES + 1000)


def test_times_by_their_identifier_or_by_frame(tmp_path):
    series = write_series(tmp_path / "d", VALUES, AFFINE, TemporalPositionIdentifier=1)
    _second(tmp_path / "d", series, VALUES + 1000, AFFINE, TemporalPositionIdentifier=2)
    with pytest.raises(UserError, match="--time N"):
        read_volume(tmp_path / "d")
    for choice in (Choice(time=2), Choice(frame=1)):
        assert np.array_equal(read_volume(tmp_path / "d", choice=choice).values, VALUES + 1000)


def test_what_has_no_option_is_chosen_by_frame(tmp_path):
    series = write_series(tmp_path / "d", VALUES, AFFINE, AcquisitionTime="101500.5")
    _second(tmp_path / "d", series, VALUES + 1000, AFFINE, AcquisitionTime="101400.0")
    with pytest.raises(
        UserError, match=r"2 volumes of 6 slices, told apart by acquisition time: .* --frame 0 ... 1"
    ):
        read_volume(tmp_path / "d")
    assert np.array_equal(read_volume(tmp_path / "d", 0).values, VALUES + 1000)  # the earlier one


def test_copies_are_dropped_with_a_count(tmp_path):
    write_series(tmp_path / "d", VALUES, AFFINE)
    for file in sorted((tmp_path / "d").iterdir())[:2]:
        shutil.copy(file, file.with_name(f"copy_{file.name}"))
    volume = read_volume(tmp_path / "d")
    assert np.array_equal(volume.values, VALUES) and "2 copies" in said(volume)


# --- Files of many frames -----------------------------------------------------------------------------------

CLASSES = [
    uid.BreastTomosynthesisImageStorage,
    uid.XRay3DAngiographicImageStorage,
    uid.EnhancedXAImageStorage,
    uid.MultiFrameGrayscaleWordSecondaryCaptureImageStorage,
    uid.OphthalmicTomographyImageStorage,
    uid.ParametricMapStorage,
    "1.2.840.10008.5.1.4.1.1.999.2",
]


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("order", [range(6), [5, 4, 3, 2, 1, 0], [3, 0, 5, 1, 4, 2]])
def test_functional_groups_place_frames_of_any_class(tmp_path, kind, order):
    order = list(order)
    tags = functional_groups(AFFINE, order, scales=[(2.0, -1024.0)] * 6)
    write_frames(tmp_path / "a.dcm", UNSIGNED[:, :, order], kind, **tags)
    volume = read_volume(tmp_path / "a.dcm")
    assert np.array_equal(volume.values, VALUES * 2.0 - 1024)
    assert np.allclose(volume.affine, AFFINE, atol=1e-6)


def test_slopes_of_frames_differ(tmp_path):
    scales = [(1 + k / 2, -5.0 * k) for k in range(6)]
    write_frames(
        tmp_path / "a.dcm", UNSIGNED, CLASSES[0], **functional_groups(AFFINE, list(range(6)), scales=scales)
    )
    slopes, intercepts = np.array(scales).T
    assert np.allclose(read_volume(tmp_path / "a.dcm").values, UNSIGNED * slopes + intercepts, rtol=1e-6)


@pytest.mark.parametrize("count", [1, 2])
def test_one_volume_split_over_files(tmp_path, count):
    """One frame in each file, and two."""
    (tmp_path / "d").mkdir()
    for part in range(0, 6, count):
        slices = list(range(part, part + count))
        tags = functional_groups(AFFINE, slices, scales=[(1.0, 10.0)] * count)
        path = tmp_path / "d" / f"{9 - part}.dcm"
        write_frames(
            path, UNSIGNED[:, :, slices], uid.EnhancedCTImageStorage, **tags, SeriesInstanceUID="1.2.3"
        )
    volume = read_volume(tmp_path / "d")
    assert np.array_equal(volume.values, UNSIGNED + 10) and np.allclose(volume.affine, AFFINE, atol=1e-6)


def test_an_ultrasound_volume_in_its_own_frame_of_reference(tmp_path):
    tags = functional_groups(AFFINE, list(range(6)), volume=True)
    write_frames(tmp_path / "a.dcm", UNSIGNED.astype(np.uint8), uid.EnhancedUSVolumeStorage, **tags)
    volume = read_volume(tmp_path / "a.dcm")
    assert np.allclose(volume.affine, AFFINE, atol=1e-6) and "not in the patient" in said(volume)


@pytest.mark.parametrize("affine", [AFFINE, TURNED])
@pytest.mark.parametrize("kind", ["dose", "absolute dose", "nm", "nm against the normal"])
def test_offsets_along_the_normal(tmp_path, affine, kind):
    """PS3.3 C.8.8.3.2 and C.8.4.15: along columns cross rows, or the patient's z itself."""
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    spacing = np.linalg.norm(lps[:3, :2], axis=0)
    orientation = [*(lps[:3, 0] / spacing[0]), *(lps[:3, 1] / spacing[1])]
    place = {"ImagePositionPatient": [*lps[:3, 3]], "ImageOrientationPatient": orientation}
    tags = {"PixelSpacing": [0.9, 0.8]}
    values, scale = UNSIGNED, 1.0
    if kind.endswith("dose"):
        if kind.startswith("absolute") and affine is TURNED:
            pytest.skip("patient z is for transverse grids alone")
        start = lps[2, 3] if kind.startswith("absolute") else 0
        tags |= {**place, "GridFrameOffsetVector": [start + 3 * k for k in range(6)], "DoseUnits": "GY"}
        tags["DoseGridScaling"], scale = "0.001", 0.001
        write_frames(tmp_path / "a.dcm", values, uid.RTDoseStorage, **tags)
    else:
        against = "against" in kind
        if against:
            place["ImagePositionPatient"] = [*(lps[:3, 3] + 5 * lps[:3, 2])]
            values = values[:, :, ::-1]
        tags |= {"DetectorInformationSequence": [dataset(**place)], "SliceVector": list(range(1, 7))}
        tags["SpacingBetweenSlices"] = "-3" if against else "3"
        write_frames(tmp_path / "a.dcm", values, uid.NuclearMedicineImageStorage, **tags)
    volume = read_volume(tmp_path / "a.dcm")
    assert np.allclose(volume.affine, affine, atol=1e-6)
    assert np.allclose(volume.values, UNSIGNED * scale, rtol=1e-6)
    assert ("Gy" in said(volume)) == kind.endswith("dose")


def test_times_of_an_enhanced_file(tmp_path):
    content = [[dataset(TemporalPositionIndex=1 + k // 6)] for k in range(12)]
    tags = functional_groups(AFFINE, [*range(6), *range(6)], FrameContentSequence=content)
    both = np.concatenate((UNSIGNED, UNSIGNED + 1000), axis=2)
    write_frames(tmp_path / "a.dcm", both, uid.EnhancedMRImageStorage, **tags)
    with pytest.raises(UserError, match="2 times"):
        read_volume(tmp_path / "a.dcm")
    assert np.array_equal(read_volume(tmp_path / "a.dcm", choice=Choice(time=2)).values, UNSIGNED + 1000)


def test_uneven_times_of_a_cine(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (4, 6, 8), dtype=np.uint8)
    write_cine(tmp_path / "a.dcm", frames)
    header = pydicom.dcmread(tmp_path / "a.dcm")
    header.FrameTimeVector = [0, 20, 20, 60]
    header.save_as(tmp_path / "a.dcm")
    volume = read_volume(tmp_path / "a.dcm")
    assert volume.depths.tolist() == [0, 1, 2, 5] and "keep their times" in said(volume)


# --- Numbers ------------------------------------------------------------------------------------------------


def test_padding_is_left_out_of_percentiles(tmp_path, capsys):
    values = VALUES.copy()
    values[:4] = -2000
    write_series(tmp_path / "d", values, AFFINE, PixelPaddingValue=-2000, PixelRepresentation=1)
    volume = read_volume(tmp_path / "d")
    assert np.array_equal(volume.padded, values == -2000) and np.array_equal(volume.values, values)
    main(["-i", str(tmp_path / "d"), "-o", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    low, high = np.percentile(values[values != -2000], (0.5, 99.5))
    assert f"window {low:.6g} to {high:.6g}" in printed and "44.4% of the voxels are padding" in printed


def test_monochrome1_is_turned_and_said(tmp_path):
    write_series(tmp_path / "d", VALUES, AFFINE, PhotometricInterpretation="MONOCHROME1")
    volume = read_volume(tmp_path / "d")
    assert np.array_equal(volume.values, -1 - VALUES) and "MONOCHROME1" in said(
        volume
    )  # -32768 + 32767 - stored


def test_a_modality_lut_is_said(tmp_path):
    lut = dataset(LUTDescriptor=[2, 0, 16], ModalityLUTType="US", LUTData=bytes(4))
    write_series(tmp_path / "d", VALUES, AFFINE, ModalityLUTSequence=[[lut]] * 6)
    assert "modality LUT is not applied" in said(read_volume(tmp_path / "d"))


@pytest.mark.parametrize(
    "syntax",
    [
        "RLELossless",
        "JPEGLSLossless",
        "ExplicitVRBigEndian",
        "ImplicitVRLittleEndian",
        "DeflatedExplicitVRLittleEndian",
    ],
)
def test_transfer_syntaxes(tmp_path, syntax):
    write_series(tmp_path / "d", VALUES, AFFINE)
    for file in (tmp_path / "d").iterdir():
        header = pydicom.dcmread(file)
        if syntax in ("RLELossless", "JPEGLSLossless"):
            header.compress(getattr(uid, syntax))
            header.save_as(file)
        else:
            if "Big" in syntax:
                header.PixelData = header.pixel_array.astype(">i2").tobytes()
            header.file_meta.TransferSyntaxUID = getattr(uid, syntax)
            pydicom.dcmwrite(
                file,
                header,
                implicit_vr="Implicit" in syntax,
                little_endian="Big" not in syntax,
                force_encoding=True,
            )
    volume = read_volume(tmp_path / "d")
    assert np.array_equal(volume.values, VALUES) and np.allclose(volume.affine, AFFINE, atol=1e-6)


def test_intensities_and_affine_are_those_of_other_readers(tmp_path):
    """Slopes as pydicom applies them, places as SimpleITK gives them: to float32's rounding."""
    sitk = pytest.importorskip("SimpleITK")
    write_series(tmp_path / "d", VALUES, AFFINE, slope=0.37, intercept=-12.5)
    volume = read_volume(tmp_path / "d")
    series = sitk.ReadImage(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(tmp_path / "d")))
    for index in itertools.product((0, 8), (0, 6), (0, 5)):
        theirs = np.array(series.TransformIndexToPhysicalPoint(index)) * (-1, -1, 1)
        assert apply_affine(volume.affine, index) == pytest.approx(theirs, abs=1e-5)
    for file in (tmp_path / "d").iterdir():
        header = pydicom.dcmread(file)
        theirs = pydicom.pixels.apply_rescale(header.pixel_array, header).T
        assert np.allclose(volume.values[:, :, header.InstanceNumber - 1], theirs, rtol=1e-6)


BUNDLED = Path(pydicom.__path__[0]) / "data" / "test_files"


def _alone(tmp_path, name):
    """A bundled file of one slice in its own folder."""
    (tmp_path / name).mkdir()
    shutil.copy(BUNDLED / name, tmp_path / name)
    return read_volume(tmp_path / name)


@pytest.mark.parametrize(
    "syntax", ["RLE", "bigendian", "expb", "implicit", "jp2klossless", "jpeg_ls_lossless", "padded"]
)
def test_one_real_slice_in_every_syntax(tmp_path, syntax):
    plain = _alone(tmp_path, "MR_small.dcm")
    assert np.array_equal(plain.values[:, :, 0].T, pydicom.dcmread(BUNDLED / "MR_small.dcm").pixel_array)
    volume = _alone(tmp_path, f"MR_small_{syntax}.dcm")
    assert np.array_equal(volume.values, plain.values) and np.array_equal(volume.affine, plain.affine)


@pytest.mark.parametrize(
    "name",
    [
        "SC_rgb_jpeg_dcmtk.dcm",
        "SC_rgb_rle.dcm",
        "SC_rgb_dcmtk_+eb+cr.dcm",
        "SC_ybr_full_422_uncompressed.dcm",
        "examples_rgb_color.dcm",
    ],
)
def test_real_colours(tmp_path, name):
    volume = _alone(tmp_path, name)
    theirs = pydicom.pixels.pixel_array(BUNDLED / name)
    assert np.array_equal(volume.values[:, :, 0].transpose(1, 0, 2), theirs) and volume.full_scale == (0, 255)


def test_what_no_decoder_knows_is_said(tmp_path):
    with pytest.raises(UserError, match=r"compressed \(JPEG Extended.*cannot be decoded here"):
        _alone(tmp_path, "JPEG-lossy.dcm")


def test_jpeg_of_12_bits_needs_a_decoder_of_its_own(tmp_path, monkeypatch):
    pytest.importorskip("libjpeg")
    truth = pydicom.dcmread(BUNDLED / "JPGExtended.dcm")
    assert truth.BitsStored == 12
    header = files.read_header(BUNDLED / "JPGExtended.dcm")
    assert np.array_equal(pixels.decode(header)[0], truth.pixel_array)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"12 bits\): reading it needs pylibjpeg: pip install pylibjpeg"):
        _alone(tmp_path, "JPEG-lossy.dcm")


def test_hounsfield_units_take_no_more_memory_than_stored(tmp_path):
    write_series(tmp_path / "d", VALUES, AFFINE, slope=1.0, intercept=-1024.0)
    volume = read_volume(tmp_path / "d")
    assert volume.values.dtype == np.int16 and np.array_equal(volume.values, VALUES - 1024)


def test_a_real_dose_grid():
    volume = read_volume(BUNDLED / "rtdose.dcm")
    header = pydicom.dcmread(BUNDLED / "rtdose.dcm")
    theirs = header.pixel_array * float(header.DoseGridScaling)
    assert np.allclose(volume.values, theirs.transpose(2, 1, 0), rtol=1e-9)
    offsets = np.array(header.GridFrameOffsetVector, float)
    assert nibabel.affines.voxel_sizes(volume.affine)[2] == pytest.approx(abs(offsets[1] - offsets[0]))


# --- What else lies in folders ------------------------------------------------------------------------------


def test_trees_dicomdirs_and_files_without_suffix_or_preamble(tmp_path):
    write_series(tmp_path / "study" / "a" / "b", VALUES, AFFINE)
    for k, file in enumerate(sorted((tmp_path / "study" / "a" / "b").iterdir())):
        header = pydicom.dcmread(file)
        header.preamble = None
        plain = file.with_name(f"IM{k}")
        pydicom.dcmwrite(plain, header, enforce_file_format=False)
        plain.write_bytes(plain.read_bytes().removeprefix(b"\0" * 128 + b"DICM"))
        file.unlink()
    (tmp_path / "study" / "DICOMDIR").write_bytes(b"\0" * 128 + b"DICM")
    for source in (tmp_path / "study", tmp_path / "study" / "DICOMDIR", tmp_path / "study" / "a"):
        assert np.array_equal(read_volume(source).values, VALUES)


@pytest.mark.parametrize(
    "kind, words",
    [
        (uid.BasicTextSRStorage, "of DICOM kind Basic Text SR, and holds no image"),
        (uid.RTPlanStorage, "of DICOM kind RT Plan, and holds no image"),
        (uid.EncapsulatedPDFStorage, "of DICOM kind Encapsulated PDF, and holds no image"),
        (uid.RTStructureSetStorage, "a structure set .RTSTRUCT., not an image: give it as the label"),
    ],
)
def test_what_is_no_image_is_named_by_its_kind(tmp_path, kind, words):
    write_series(tmp_path / "d", VALUES, AFFINE)
    header = pydicom.dcmread(tmp_path / "d" / "slice000.dcm")
    for word in ("PixelData", "Rows", "Columns"):
        delattr(header, word)
    header.SOPClassUID = header.file_meta.MediaStorageSOPClassUID = kind
    header.save_as(tmp_path / "other.dcm")
    with pytest.raises(UserError, match=words):
        read_volume(tmp_path / "other.dcm")
    shutil.copy(tmp_path / "other.dcm", tmp_path / "d" / "other.dcm")
    volume = read_volume(tmp_path / "d")
    assert np.array_equal(volume.values, VALUES) and "other.dcm (" in said(volume)
    only = tmp_path / "only"
    only.mkdir()
    shutil.copy(tmp_path / "other.dcm", only)
    with pytest.raises(UserError, match=r"no DICOM image that can be read \(tried other.dcm"):
        read_volume(only)


def test_video_inside_dicom(tmp_path):
    ffmpeg = pytest.importorskip("imageio_ffmpeg")
    writer = ffmpeg.write_frames(str(tmp_path / "a.mp4"), (64, 48), quality=9)
    writer.send(None)
    levels = np.arange(8) * 20 + 40
    for level in levels:
        writer.send(np.full((48, 64, 3), level, np.uint8).tobytes())
    writer.close()
    write_cine(tmp_path / "a.dcm", np.zeros((8, 48, 64, 3), np.uint8))
    header = pydicom.dcmread(tmp_path / "a.dcm")
    header.PixelData = pydicom.encaps.encapsulate([(tmp_path / "a.mp4").read_bytes()])
    header["PixelData"].is_undefined_length = True
    header.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.102"
    header.save_as(tmp_path / "a.dcm")
    volume = read_volume(tmp_path / "a.dcm")
    assert volume.lossy and volume.values.shape == (64, 48, 8)
    assert np.abs(volume.values.mean(axis=(0, 1)) - levels).max() < 5  # a lossy codec's few levels of 255


@pytest.mark.parametrize(
    "body, status", [("while True: pass", -signal.SIGPROF), ("bytearray(8 << 30)", 1)], ids=["time", "memory"]
)
def test_decoders_that_never_end_are_ended(body, status):
    program = f"from patient.readers.dicom import codec\ncodec._SECONDS = 0.2\ncodec._limit(1000)\n{body}"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True).returncode == status
