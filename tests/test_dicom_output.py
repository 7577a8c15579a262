"""DICOM files that render.py writes: read back by pydicom, highdicom, SimpleITK and our own reader."""

import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import nibabel
import numpy as np
import pytest
from dicom_files import pydicom, write_enhanced, write_series
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nibabel.affines import apply_affine
from scipy.spatial.transform import Rotation
from test_render import FromFrames, call, model_of  # noqa: F401

import prepare
import render
from patient.geometry import Geometry
from patient.label_volumes import Wanted, read_labels
from patient.labels import Label, LabelTable
from patient.readers import read_volume
from patient.rendered_volume import Grid, RenderedVolume
from patient.writers import DicomCase
from patient.writers.anatomy import LEFT, TISSUE, _table, anatomy
from utils.errors import UserError
from utils.images import read_levels

highdicom = pytest.importorskip("highdicom")
sitk = pytest.importorskip("SimpleITK")

SHAPE = (16, 9, 7)  # whole bytes per frame: GDCM misreads the last bits of others
PERSON = {
    "PatientName": "Müller^Jörg",
    "PatientID": "4711-Kennung",
    "PatientBirthDate": "19610203",
    "PatientSex": "M",
    "PatientAge": "058Y",
    "StudyDate": "20190807",
    "StudyTime": "101112",
    "StudyID": "Befund77",
    "StudyDescription": "Leberkontrolle",
    "AccessionNumber": "ACC991",
    "ReferringPhysicianName": "Arzt^Berta",
    "SpecificCharacterSet": "ISO_IR 100",
}
OTHERS = {"InstitutionName": "Klinikum", "StationName": "SCANNER9", "OperatorsName": "Tech^Nik"}
MASK = LabelTable((Label.of(1, "mask"),))
PLACED = np.diag([-0.8, -0.9, 3.0, 1.0])


def affine_of(angles=(0, 0, 0), sizes=(0.8, 0.9, 3.0), back=False):
    """Slices turned by `angles`; numbered against their normal if `back`."""
    affine = np.eye(4)
    steps = np.diag([-sizes[0], -sizes[1], -sizes[2] if back else sizes[2]])
    affine[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() @ steps
    affine[:3, 3] = 12, -30, 55
    return affine


def series_of(folder, affine, values=None, **tags):
    """A series with a person in it, and what its values are (column, row, slice)."""
    if values is None:
        values = np.random.default_rng(0).integers(-900, 1100, SHAPE).astype(np.int16)
    uids = {"StudyInstanceUID": pydicom.uid.generate_uid(), "FrameOfReferenceUID": pydicom.uid.generate_uid()}
    told = {**PERSON, **OTHERS, **uids, "SeriesNumber": "4", **tags}
    absent = [name for name in PERSON if told[name] is None] + ["FrameOfReferenceUID"] * (
        told["FrameOfReferenceUID"] is None
    )
    write_series(folder, values, affine, **{name: told[name] for name in told if name not in absent})
    return values


def label_of(path, affine, values):
    nibabel.save(nibabel.Nifti1Image(values.astype(np.uint8), affine), path)
    return path


def prepared(root, *arguments, source=None, label=True):
    """Geometry of what prepare.py makes of root/series and root/label.nii."""
    arguments = ["-i", source or root / "series", *(["-l", root / "label.nii"] if label else []), *arguments]
    assert prepare.main([*map(str, arguments), "-o", str(root / "case"), "--quiet", "--force"]) == 0
    return Geometry.load(root / "case" / "frames.json")


def frame_at(root, geometry, position, kind="seg"):
    """What prepare.py wrote for a position in the sequence: a kept frame or a held-out one."""
    if position == int(position):
        return read_levels(root / "case" / kind / "original" / f"{int(position):04d}.png")
    index = geometry.heldout_slices[int(np.abs(np.array(geometry.heldout_indices()) - position).argmin())]
    return read_levels(root / "case" / kind / "heldout" / f"{index:04d}.png")


def write_masks(root, geometry, path, labels=False, **options):
    """The masks of the prepared frames as if a model had rendered them; the labels that were written."""
    named = LabelTable((Label.of(1, options.get("name", "mask")),))
    case = DicomCase(
        geometry,
        options.get("folder"),
        options.get("anonymous", False),
        geometry.labels if labels else named,
        "--dicom-seg",
    )
    volume = case.masks()
    for slot, position in enumerate(volume.positions):
        frame = frame_at(root, geometry, position)
        volume.put(slot, frame if labels else (frame / 255).astype(np.float32))
    return case.write_masks(path, volume)


def by_position(path, affine, shape, segment=1):
    """(column, row, slice) of a segment, by pydicom alone: each frame goes where its own tags say."""
    made = pydicom.dcmread(path)
    frames = made.pixel_array if made.pixel_array.ndim == 3 else made.pixel_array[None]
    shared = made.SharedFunctionalGroupsSequence[0]
    out = np.zeros(shape, np.uint8)
    for frame, group in zip(frames, made.PerFrameFunctionalGroupsSequence, strict=True):
        identification = group.get("SegmentIdentificationSequence") or shared.get(
            "SegmentIdentificationSequence"
        )
        if identification[0].ReferencedSegmentNumber != segment:
            continue
        cosines = np.array(shared.PlaneOrientationSequence[0].ImageOrientationPatient, float).reshape(2, 3)
        rows_apart, columns_apart = map(float, shared.PixelMeasuresSequence[0].PixelSpacing)
        corner = np.array(group.PlanePositionSequence[0].ImagePositionPatient, float)
        for row, column in np.argwhere(frame):
            place = corner + cosines[0] * columns_apart * column + cosines[1] * rows_apart * row
            index = apply_affine(np.linalg.inv(affine), place * (-1, -1, 1))
            assert np.abs(index - np.rint(index)).max() < 1e-3
            out[tuple(np.rint(index).astype(int))] = 1
    return out


def by_simple_itk(path, affine, shape):
    """The same by SimpleITK, which reads the file as a volume: one segment, all slices."""
    image = sitk.ReadImage(str(path))
    values = sitk.GetArrayFromImage(image).transpose(2, 1, 0) > 0
    out = np.zeros(shape, np.uint8)
    for index in np.argwhere(values):
        place = np.array(image.TransformContinuousIndexToPhysicalPoint(index.astype(float))) * (-1, -1, 1)
        there = apply_affine(np.linalg.inv(affine), place)
        assert np.abs(there - np.rint(there)).max() < 1e-2
        out[tuple(np.rint(there).astype(int))] = 1
    return out


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    angles=st.tuples(*[st.floats(-180, 180)] * 3),
    back=st.booleans(),
    keep=st.sampled_from([1, 2, 3]),
    axis=st.sampled_from([0, 1, 2, 2]),
    crop=st.booleans(),
)
def test_masks_come_back_on_the_slices_of_their_source(angles, back, keep, axis, crop):
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        affine = affine_of(angles, back=back)
        values = series_of(root / "series", affine)
        label = np.zeros(SHAPE, np.uint8)
        label[3:9, 2:7, 1:6] = np.random.default_rng(1).random((6, 5, 5)) > 0.4
        label[3:9, 2:7, 1:6][::5, ::4, ::4] = 1  # the box is full size
        label_of(root / "label.nii", affine, label)
        options = ["--axis", axis, "--keep_every", keep, *(["--crop", "2"] if crop else [])]
        geometry = prepared(root, *options)
        shown = write_masks(root, geometry, root / "seg.dcm")
        assert shown.words() == "1 mask"

        # Slices after the last kept frame are not rendered.
        expected = np.zeros(SHAPE, np.uint8)
        index = [slice(None)] * 3
        # The reader sorts slices along their normal, so that slice 0 of it may be the last of `label`.
        read = read_volume(root / "series")
        own = np.rint(apply_affine(np.linalg.inv(affine), read.affine[:3, 3])).astype(int)
        flipped = axis == 2 and own[2] > 0
        first, last = geometry.slices[0], geometry.slices[-1]
        if flipped:
            first, last = SHAPE[2] - 1 - last, SHAPE[2] - 1 - first
        index[axis] = slice(first, last + 1)
        expected[tuple(index)] = label[tuple(index)]
        assert np.array_equal(by_position(root / "seg.dcm", affine, SHAPE), expected)
        assert np.array_equal(by_simple_itk(root / "seg.dcm", affine, SHAPE), expected)

        made = highdicom.seg.segread(root / "seg.dcm")
        by_uid = {}
        for file in (root / "series").iterdir():
            source = pydicom.dcmread(file)
            by_uid[source.SOPInstanceUID] = int(source.InstanceNumber) - 1
        stack = made.get_pixels_by_source_instance(list(by_uid), combine_segments=True)
        for frame, k in zip(stack, by_uid.values(), strict=True):
            assert np.array_equal(frame.T, expected[:, :, k])
        own = read_labels([str(root / "seg.dcm")], read, "series", Wanted(), 2, lambda line: None)
        there = np.flip(expected, 2) if own is not None and not np.allclose(read.affine, affine) else expected
        assert np.array_equal(own.numbers != 0, there)
        assert np.array_equal(values.shape, made.get_volume().spatial_shape[::-1])
        assert made.FrameOfReferenceUID == source.FrameOfReferenceUID
        assert made.StudyInstanceUID == source.StudyInstanceUID
        assert made.SeriesInstanceUID != source.SeriesInstanceUID


@pytest.fixture
def case(tmp_path):
    """A series with a label map of three structures, prepared."""
    series_of(tmp_path / "series", PLACED)
    label = np.random.default_rng(2).choice([0, 0, 5, 7, 11], SHAPE)
    label_of(tmp_path / "label.nii", PLACED, label)
    (tmp_path / "names.json").write_text('{"liver": 5, "kidney_left": 7, "Höhle 3": 11}')
    prepared(tmp_path, "--labels", "all", "--label_names", tmp_path / "names.json")
    return tmp_path, label


def test_label_maps_become_coded_segments(case):
    root, label = case
    geometry = Geometry.load(root / "case" / "frames.json")
    shown = write_masks(root, geometry, root / "seg.dcm", labels=True)
    assert [one.id for one in shown] == [5, 7, 11]
    for segment, number in enumerate((5, 7, 11), 1):
        assert np.array_equal(by_position(root / "seg.dcm", PLACED, SHAPE, segment), label == number)
    made = highdicom.seg.segread(root / "seg.dcm")
    liver, kidney, other = made.SegmentSequence
    assert [item.SegmentLabel for item in made.SegmentSequence] == ["liver", "kidney_left", "Höhle 3"]
    kinds = [item.SegmentedPropertyTypeCodeSequence[0] for item in (liver, kidney, other)]
    assert [kind.CodeValue for kind in kinds] == ["10200004", "64033007", TISSUE.value]
    assert kinds[1].SegmentedPropertyTypeModifierCodeSequence[0].CodeValue == LEFT.value
    for item, one in zip(made.SegmentSequence, shown, strict=True):
        colour = highdicom.color.CIELabColor.from_dicom_value(item.RecommendedDisplayCIELabValue).to_rgb()
        assert np.abs(np.subtract(colour, one.colour)).max() <= 1
    # And back as labels by name.
    read = read_volume(root / "series")
    back = read_labels(
        [str(root / "seg.dcm")], read, "series", Wanted(labels=["kidney_left"]), 2, lambda line: None
    )
    assert np.array_equal(back.numbers != 0, label == 7) and back.table.labels[0].name == "kidney_left"


def test_every_code_is_a_concept_of_that_name():
    known = {}
    for concepts in pydicom.sr._concepts_dict.concepts["SCT"].values():
        for code, (meaning, _) in concepts.items():
            known.setdefault(code, set()).add(meaning.casefold())
    # Not in pydicom's dictionary, but in use by 3D Slicer for the same structures.
    others = {"rib 1", "iliopsoas", *(f"gluteus {name}" for name in ("maximus", "medius", "minimus"))}
    others |= {f"rib {number}" for number in range(1, 13)}
    for name, (_, code) in _table().items():
        assert name in others or code.meaning.casefold() in known[code.value], name
    assert anatomy("Left_Kidney") == anatomy("kidney-l") == anatomy("kidney left") != anatomy("kidney_right")
    assert anatomy("vertebrae_T12").kind.meaning == "T12 vertebra"
    assert anatomy("rib_left_3").kind.meaning == "Third rib" and anatomy("rib_left_3").side == LEFT
    assert anatomy("heart_atrium_left").side is None
    assert anatomy("whatever").category == TISSUE


def dense(root, interp, label=False, **options):
    """The derived images, and masks, of a case whose renders are its frames and the blends of neighbours."""
    geometry = Geometry.load(root / "case" / "frames.json")
    case = DicomCase(
        geometry,
        options.get("folder"),
        options.get("anonymous", False),
        MASK,
        "--dicom",
    )
    grid = Grid(geometry, options.get("size", geometry.size), interp)
    image, mask = RenderedVolume(grid, mask=False), RenderedVolume(grid, mask=True)
    for slot, position in enumerate(grid.positions):
        low, share = int(position), position - int(position)
        high = min(low + 1, len(geometry.slices) - 1)
        full = 255.0 if geometry.bits == 8 else 65535.0
        frames = [frame_at(root, geometry, float(k), "img") / full for k in (low, high)]
        image.put(slot, ((1 - share) * frames[0] + share * frames[1]).astype(np.float32))
        if label:
            mask.put(slot, (frame_at(root, geometry, float(low)) / 255).astype(np.float32))
    case.write_dense((root / "img.dcm", image), (root / "mask.dcm", mask) if label else None)
    return (pydicom.dcmread(root / "img.dcm") if options.get("read", True) else None), image


@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(angles=st.tuples(*[st.floats(-180, 180)] * 3), back=st.booleans(), axis=st.sampled_from([0, 1, 2, 2]))
def test_slices_between_lie_on_their_source_with_its_intensities(angles, back, axis):
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        affine = affine_of(angles, back=back)
        values = series_of(root / "series", affine, slope=2, intercept=-1024) * 2 - 1024
        label_of(root / "label.nii", affine, np.ones(SHAPE))
        window = (int(values.min()), int(values.max()))
        prepared(root, "--axis", axis, "--window", *window)
        made, _ = dense(root, 3, label=True)
        image = sitk.ReadImage(str(root / "img.dcm"))
        found = sitk.GetArrayFromImage(image).transpose(2, 1, 0)
        count = 3 * (SHAPE[axis] - 1) + 1
        assert found.size == values.size // SHAPE[axis] * count == made.pixel_array.size
        step = np.eye(4)
        step[axis, axis] = 1 / 3
        to_voxels = np.linalg.inv(affine)
        for index in np.ndindex(found.shape):
            if any(k not in (0, 1, 2, n - 1) for k, n in zip(index, found.shape, strict=True)):
                continue  # corners say enough
            place = np.array(image.TransformContinuousIndexToPhysicalPoint([float(k) for k in index]))
            at = apply_affine(to_voxels, place * (-1, -1, 1))
            whole = np.rint(np.delete(at, axis))
            assert np.abs(np.delete(at, axis) - whole).max() < 1e-2
            assert abs(3 * at[axis] - round(3 * at[axis])) < 3e-2
            low = int(np.floor(at[axis] + 0.01))
            share = round(3 * (at[axis] - low)) / 3
            ends = []
            for k in (low, min(low + 1, SHAPE[axis] - 1)):
                ends.append(values[tuple(np.insert(whole, axis, k).astype(int))])
            assert abs(found[index] - ((1 - share) * ends[0] + share * ends[1])) <= 0.6  # rounded to 1
        own = read_volume(root / "img.dcm")
        assert own.values.shape == found.shape and own.frame_of_reference == made.FrameOfReferenceUID
        masks = highdicom.seg.segread(root / "mask.dcm")
        assert masks.get_volume().array.all() and masks.NumberOfFrames == made.NumberOfFrames
        referred = masks.PerFrameFunctionalGroupsSequence[1].DerivationImageSequence[0].SourceImageSequence[0]
        assert referred.ReferencedSOPInstanceUID == made.SOPInstanceUID
        assert referred.SpatialLocationsPreserved == "YES"


def all_text(path):
    """Every value of a file, those in sequences too, and what is in its bytes."""
    found = []
    pydicom.dcmread(path).walk(lambda _, element: found.append((element.keyword, str(element.value))))
    return dict(found), path.read_bytes()


def test_patient_and_study_are_the_sources_and_nothing_else_is(case):
    root, _ = case
    geometry = Geometry.load(root / "case" / "frames.json")
    made, _ = dense(root, 2)
    write_masks(root, geometry, root / "seg.dcm", labels=True)
    source = pydicom.dcmread(next((root / "series").iterdir()))
    for path in (root / "img.dcm", root / "seg.dcm"):
        told = all_text(path)[0]
        for keyword in PERSON.keys() - {"SpecificCharacterSet"}:
            assert told[keyword] == PERSON[keyword], keyword
        assert told["PatientName"] == "Müller^Jörg" and told["PatientID"] == PERSON["PatientID"]
        assert told["StudyInstanceUID"] == source.StudyInstanceUID
        assert told["FrameOfReferenceUID"] == source.FrameOfReferenceUID
        assert told["SeriesInstanceUID"] != source.SeriesInstanceUID
        assert not OTHERS.keys() & told.keys()
    assert made.ImageType[0] == "DERIVED" and made.Modality == "CT"
    group = made.PerFrameFunctionalGroupsSequence[1]
    derivation = group.DerivationImageSequence[0]
    assert derivation.DerivationCodeSequence[0].CodeMeaning == "Spatial resampling"
    assert "interpolated" in derivation.DerivationDescription
    beside = {item.ReferencedSOPInstanceUID for item in derivation.SourceImageSequence}
    by_number = {
        int(one.InstanceNumber): one.SOPInstanceUID
        for one in map(pydicom.dcmread, (root / "series").iterdir())
    }
    assert beside == {by_number[1], by_number[2]}
    assert {item.SpatialLocationsPreserved for item in derivation.SourceImageSequence} == {"NO"}


def test_anonymous_leaves_no_trace_of_who_it_is(case):
    root, label = case
    geometry = Geometry.load(root / "case" / "frames.json")
    dense(root, 2, anonymous=True)
    write_masks(root, geometry, root / "seg.dcm", labels=True, anonymous=True)
    sources = list(map(pydicom.dcmread, (root / "series").iterdir()))
    secrets = [value for key, value in PERSON.items() if key not in ("SpecificCharacterSet", "PatientSex")]
    secrets += [str(source[name].value) for source in sources for name in ("SOPInstanceUID",)]
    secrets += [sources[0][name].value for name in ("StudyInstanceUID", "SeriesInstanceUID")]
    secrets += [sources[0].FrameOfReferenceUID, *OTHERS.values()]
    told = []
    for path in (root / "img.dcm", root / "seg.dcm"):
        values, content = all_text(path)
        assert not [secret for secret in secrets if secret.encode() in content]
        assert not [secret for secret in secrets if secret in "".join(values.values())]
        assert values["PatientIdentityRemoved"] == "YES" and values["PatientSex"] == ""
        told.append(values)
    # The files still belong together, and lie where they did.
    for name in ("StudyInstanceUID", "FrameOfReferenceUID", "PatientID"):
        assert told[0][name] == told[1][name] != ""
    assert np.array_equal(by_position(root / "seg.dcm", PLACED, SHAPE, 1), label == 5)


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="dicom3tools is not installed")
@pytest.mark.parametrize("modality", ["CT", "MR", "PT", "US"])
def test_the_files_are_valid(tmp_path, modality):
    kinds = {
        "CT": "CTImage",
        "MR": "MRImage",
        "PT": "PositronEmissionTomographyImage",
        "US": "UltrasoundImage",
    }
    kind = getattr(pydicom.uid, f"{kinds[modality]}Storage")
    series_of(tmp_path / "series", affine_of((10, -25, 40)), Modality=modality, SOPClassUID=kind)
    label_of(tmp_path / "label.nii", affine_of((10, -25, 40)), np.ones(SHAPE))
    geometry = prepared(tmp_path)
    write_masks(tmp_path, geometry, tmp_path / "seg.dcm", name="liver")
    dense(tmp_path, 2, label=True)
    for name in ("seg", "img", "mask"):
        done = subprocess.run(["dciodvfy", tmp_path / f"{name}.dcm"], capture_output=True, text=True)
        wrong = [line for line in done.stderr.splitlines() if line.startswith("Error")]
        assert not wrong, (modality, name)


def test_frames_of_one_file_are_named(tmp_path):
    values = np.random.default_rng(0).integers(0, 1000, SHAPE).astype(np.int16)
    order = [3, 0, 1, 2, 6, 5, 4]
    (tmp_path / "series").mkdir()
    write_enhanced(tmp_path / "series" / "one.dcm", values, PLACED, order, [1.0] * len(order))
    label = np.random.default_rng(1).random(SHAPE) > 0.5
    label_of(tmp_path / "label.nii", PLACED, label)
    geometry = prepared(tmp_path, source=tmp_path / "series" / "one.dcm")
    write_masks(tmp_path, geometry, tmp_path / "seg.dcm")
    assert np.array_equal(by_position(tmp_path / "seg.dcm", PLACED, SHAPE), label)
    made = pydicom.dcmread(tmp_path / "seg.dcm")
    source = pydicom.dcmread(tmp_path / "series" / "one.dcm")
    for group in made.PerFrameFunctionalGroupsSequence:
        item = group.DerivationImageSequence[0].SourceImageSequence[0]
        assert item.ReferencedSOPInstanceUID == source.SOPInstanceUID
        there = source.PerFrameFunctionalGroupsSequence[item.ReferencedFrameNumber - 1]
        places = [one.PlanePositionSequence[0].ImagePositionPatient for one in (group, there)]
        np.testing.assert_allclose(*places, atol=1e-6)
    (evidence,) = made.ReferencedSeriesSequence
    assert [one.ReferencedSOPInstanceUID for one in evidence.ReferencedInstanceSequence] == [
        source.SOPInstanceUID
    ]


def test_uneven_slices_keep_their_places(tmp_path):
    depths = np.array([0, 1, 2, 4, 5, 6, 9])
    values = np.random.default_rng(0).integers(0, 1000, SHAPE).astype(np.int16)
    series_of(tmp_path / "series", PLACED, values, depths=depths)
    label = np.random.default_rng(1).random(SHAPE) > 0.5
    wide = np.zeros((*SHAPE[:2], 10))
    wide[:, :, depths] = label
    label_of(tmp_path / "label.nii", PLACED, wide)
    geometry = prepared(tmp_path)
    assert geometry.durations() is not None
    write_masks(tmp_path, geometry, tmp_path / "seg.dcm")
    assert np.array_equal(by_position(tmp_path / "seg.dcm", PLACED, wide.shape), wide)


def test_a_nifti_finds_its_series(tmp_path):
    """Converted frames, flipped and permuted on the way, lie on the series that is given."""
    values = series_of(tmp_path / "series", PLACED)
    flip = np.eye(4)
    flip[1, 1], flip[1, 3] = -1, SHAPE[1] - 1
    image = nibabel.Nifti1Image(values[:, ::-1].copy(), PLACED @ flip)
    label = np.random.default_rng(1).random(SHAPE) > 0.5
    for name, array in (("volume", image.get_fdata()), ("label", label[:, ::-1])):
        nibabel.save(
            nibabel.Nifti1Image(array.astype(np.int16), PLACED @ flip).as_reoriented(
                [[1, 1], [0, -1], [2, 1]]
            ),
            tmp_path / f"{name}.nii",
        )
    geometry = prepared(tmp_path, source=tmp_path / "volume.nii")
    assert geometry.dicom is None
    with pytest.raises(
        UserError, match=r"--dicom-seg: nothing says that volume.nii is DICOM.*--dicom_source"
    ):
        write_masks(tmp_path, geometry, tmp_path / "seg.dcm")
    write_masks(tmp_path, geometry, tmp_path / "seg.dcm", folder=tmp_path / "series")
    assert np.array_equal(by_position(tmp_path / "seg.dcm", PLACED, SHAPE), label)
    series_of(tmp_path / "other", affine_of((5, 0, 0)))
    with pytest.raises(UserError, match=r"the frames of volume.nii do not lie on the voxels of .*other"):
        write_masks(tmp_path, geometry, tmp_path / "seg.dcm", folder=tmp_path / "other")


def test_smaller_renders_cover_the_source(tmp_path):
    series_of(tmp_path / "series", PLACED)
    label = np.zeros(SHAPE)
    label[4:12, 3:7, 2:5] = 1
    label_of(tmp_path / "label.nii", PLACED, label)
    geometry = prepared(tmp_path)
    case = DicomCase(geometry, None, False, MASK, "--dicom-seg")
    volume = case.masks()
    for slot, position in enumerate(volume.positions):
        frame = frame_at(tmp_path, geometry, position)
        volume.put(slot, np.kron(frame, np.ones((2, 2))).astype(np.float32) / 255)
    case.write_masks(tmp_path / "seg.dcm", volume)
    assert np.array_equal(by_position(tmp_path / "seg.dcm", PLACED, SHAPE), label)


def test_series_that_are_not_there_any_more(case):
    root, _ = case
    geometry = Geometry.load(root / "case" / "frames.json")
    (root / "series").rename(root / "moved")
    with pytest.raises(UserError, match=r"--dicom-seg: .*series, where the frames came from, does not exist"):
        write_masks(root, geometry, root / "seg.dcm")
    write_masks(root, geometry, root / "seg.dcm", labels=True, folder=root / "moved")
    series_of(root / "series", PLACED)
    with pytest.raises(UserError, match=r"series has changed since the frames were made from it"):
        write_masks(root, geometry, root / "seg.dcm")
    other = DicomCase(geometry, root / "series", False, MASK, "--dicom-seg")
    assert "is not the series that the frames were made from" in other.series.notes[0]
    series_of(root / "unplaced", PLACED, ImagePositionPatient=None)
    with pytest.raises(UserError, match="does not say where its slices lie"):
        write_masks(root, geometry, root / "seg.dcm", folder=root / "unplaced")
    with pytest.raises(UserError, match=r"label.nii is not DICOM"):
        write_masks(root, geometry, root / "seg.dcm", folder=root / "label.nii")
    assert not list(root.glob("*.tmp*"))


def test_odd_patients_are_written_all_the_same(tmp_path):
    """Attributes that DICOM does not allow are left empty; missing ones too."""
    odd = {"PatientSex": "U", "PatientBirthDate": "1961", "PatientName": "no caret"}
    odd |= {
        "PatientID": "P" * 100,
        "StudyDescription": "2019.08.07" * 9,
        "AccessionNumber": None,
        "StudyID": None,
        "StudyTime": "morning",
        "FrameOfReferenceUID": None,
    }
    with pydicom.config.disable_value_validation():
        series_of(tmp_path / "series", PLACED, **odd)
    label_of(tmp_path / "label.nii", PLACED, np.ones(SHAPE))
    geometry = prepared(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # none reaches the user
        write_masks(tmp_path, geometry, tmp_path / "seg.dcm")
        dense(tmp_path, 1, read=False)
    made = pydicom.dcmread(tmp_path / "img.dcm")
    seg = pydicom.dcmread(tmp_path / "seg.dcm")
    for one in (made, seg):
        assert one.PatientSex == one.PatientBirthDate == one.StudyTime == "" and one.PatientName == "no caret"
    assert made.FrameOfReferenceUID == seg.FrameOfReferenceUID


def test_an_empty_mask_is_written(tmp_path):
    series_of(tmp_path / "series", PLACED)
    geometry = prepared(tmp_path, label=False)
    case = DicomCase(geometry, None, False, LabelTable((Label.of(1, "liver"),)), "--dicom-seg")
    shown = case.write_masks(tmp_path / "seg.dcm", case.masks())
    made = highdicom.seg.segread(tmp_path / "seg.dcm")
    assert shown == LabelTable((Label.of(1, "liver"),)) and not made.pixel_array.any()


def test_render_writes_dicom(tmp_path, call, monkeypatch, capsys):  # noqa: F811
    series_of(tmp_path / "series", PLACED)
    label = np.random.default_rng(1).random(SHAPE) > 0.5
    label_of(tmp_path / "label.nii", PLACED, label)
    prepared(tmp_path, "--keep_every", 2)
    folder, frames = model_of(tmp_path / "model", tmp_path / "case"), FromFrames(tmp_path / "case")
    monkeypatch.setattr(render.Renderer, "__call__", lambda self, positions: frames(self, positions))
    call("-m", folder, "--interp", 2, "--pipeline", "both", "--dicom", "--dicom-seg", "spleen")
    said = capsys.readouterr().out
    assert "7 slices in" in said and "masks on 7 slices of" in said and "1 spleen" in said
    found = by_position(folder / "render_seg.dcm", PLACED, SHAPE)
    assert np.array_equal(found[:, :, ::2], label[:, :, ::2])  # the kept slices; between them is a blend
    assert np.array_equal(found, by_position(folder / "render_mask.dcm", PLACED, SHAPE))
    assert read_volume(folder / "render_img.dcm").values.shape == SHAPE
    for words, message in (
        (["--dicom-seg"], "--dicom-seg writes masks: add --pipeline both"),
        (["--anonymous"], "--anonymous is about --dicom and --dicom-seg"),
        (["--dicom_source", folder], "--dicom_source is about --dicom"),
    ):
        with pytest.raises(UserError, match=message):
            call("-m", folder, *words)
    monkeypatch.setitem(sys.modules, "highdicom", None)
    for option in ("--dicom-seg", "--dicom"):
        with pytest.raises(UserError, match=f"{option} needs highdicom: pip install highdicom"):
            call("-m", folder, "--pipeline", "seg", option)
    call("-m", folder, "--pipeline", "img", "--dicom")


def test_gantry_tilt(tmp_path):
    """Slices that are shifted against each other keep their places; frames across them have no right angles."""
    affine = affine_of((10, 5, 3))
    affine[:3, 2] += 0.6 * affine[:3, 1]
    series_of(tmp_path / "series", affine)
    label = np.random.default_rng(1).random(SHAPE) > 0.5
    label_of(tmp_path / "label.nii", affine, label)
    write_masks(tmp_path, prepared(tmp_path), tmp_path / "seg.dcm")
    assert np.array_equal(by_position(tmp_path / "seg.dcm", affine, SHAPE), label)
    made, _ = dense(tmp_path, 2)
    assert "DimensionOrganizationType" not in made  # no stack along its normal
    own = read_volume(tmp_path / "img.dcm")
    np.testing.assert_allclose(own.affine, affine @ np.diag([1, 1, 0.5, 1]), atol=1e-6)
    prepared(tmp_path, "--axis", 0)
    with pytest.raises(UserError, match="columns and rows of these frames are not at a right angle"):
        dense(tmp_path, 2)
