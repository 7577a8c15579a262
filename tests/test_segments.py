"""Segmentations in: DICOM SEG, RTSTRUCT, layered NRRD, one layer per structure. Every voxel keeps its position."""

import shutil

import numpy as np
import pytest
from dicom_files import functional_groups, pydicom, write_frames, write_series, write_structures
from nibabel.affines import apply_affine

from patient.readers import read_volume
from patient.readers.segments import layers_as_segments, read_segments
from utils.errors import UserError

SHAPE = (12, 10, 8)
AFFINE = np.array([[-0.8, 0, 0, 12.5], [0, -0.9, 0, -30.25], [0, 0, 3, 101], [0, 0, 0, 1]], float)
GRID = np.indices(SHAPE)
BALL = (
    (GRID - np.array([5, 4, 4])[:, None, None, None]) ** 2 / np.array([9, 9, 5])[:, None, None, None]
).sum(0) <= 1
CORNER = (GRID[0] > 7) & (GRID[2] > 5)
OVERLAP = (GRID[0] < 6) & (GRID[2] > 2)
SEG = "1.2.840.10008.5.1.4.1.1.66.4"
LABEL_MAP = "1.2.840.10008.5.1.4.1.1.66.7"


@pytest.fixture
def image(tmp_path):
    write_series(tmp_path / "ct", np.arange(np.prod(SHAPE)).reshape(SHAPE).astype(np.int16), AFFINE)
    return read_volume(tmp_path / "ct")


def _sources(tmp_path):
    return [pydicom.dcmread(file) for file in sorted((tmp_path / "ct").iterdir())]


def _highdicom(tmp_path, masks, kind="BINARY", **options):
    """A SEG of masks (n, I, J, K) by highdicom, on the source's slices."""
    hd = pytest.importorskip("highdicom")
    code = hd.sr.CodedConcept("123037004", "SCT", "Anatomical Structure")
    described = [
        hd.seg.SegmentDescription(n, f"organ {n}", code, code, "MANUAL") for n in range(1, len(masks) + 1)
    ]
    sources = sorted(_sources(tmp_path), key=lambda header: header.ImagePositionPatient[2])
    for header in sources:
        header.FrameOfReferenceUID, header.StudyInstanceUID = "1.2.3.4", "1.2.3.5"
        header.PatientName, header.SliceThickness = "Nobody^", "3"
        for word in (
            "PatientBirthDate",
            "PatientSex",
            "StudyDate",
            "StudyTime",
            "AccessionNumber",
            "StudyID",
        ):
            setattr(header, word, "")
        header.ReferringPhysicianName = ""
        header.save_as(header.filename)
    pixels = np.stack([mask.transpose(2, 1, 0) for mask in masks], -1)
    if kind == "LABELMAP":
        pixels = (pixels * np.arange(1, len(masks) + 1)).max(-1).astype(np.uint8)
    else:
        pixels = pixels.astype(np.float32 if kind == "FRACTIONAL" else np.uint8)
    seg = hd.seg.Segmentation(
        sources, pixels, kind, described, hd.UID(), 2, hd.UID(), 1, "us", "test", "1", "1", **options
    )
    seg.save_as(tmp_path / "seg.dcm")
    return tmp_path / "seg.dcm"


@pytest.mark.parametrize("kind", ["BINARY", "FRACTIONAL", "LABELMAP"])
@pytest.mark.parametrize("omit", [True, False])
def test_segments_lie_on_the_slices_that_they_were_made_of(tmp_path, image, kind, omit):
    path = _highdicom(tmp_path, [BALL, CORNER], kind, omit_empty_frames=omit)
    image = read_volume(tmp_path / "ct")
    segments = read_segments(path, image)
    assert [(s.number, s.name) for s in segments.segments] == [(1, "organ 1"), (2, "organ 2")]
    for segment, mask in zip(segments.segments, (BALL, CORNER), strict=True):
        assert np.array_equal(segments.mask(segment), mask)
    assert np.array_equal(segments.affine, image.affine)
    assert ("fractional" in " ".join(segments.notes)) == (kind == "FRACTIONAL")


def test_overlapping_segments_keep_their_voxels(tmp_path, image):
    segments = read_segments(_highdicom(tmp_path, [BALL, OVERLAP]), image)
    assert np.array_equal(segments.mask(segments.find(["organ 2"])[0]), OVERLAP)
    numbers, overlap = segments.label_map(segments.segments)
    assert overlap == (BALL & OVERLAP).sum() and np.array_equal(numbers == 1, BALL)
    with pytest.raises(UserError, match="no segment liver: it has 1 organ 1, 2 organ 2"):
        segments.find(["liver"])
    assert segments.find(["all"]) == segments.segments and segments.find([2.0])[0].name == "organ 2"


def _write_seg(path, masks, order, **more):
    """A SEG of 8-bit frames in any order of slices, empty ones left out; masks by number."""
    frames, slices, numbers = [], [], []
    for number, mask in masks.items():
        for k in order:
            if mask[:, :, k].any():
                frames.append(mask[:, :, k])
                slices.append(k)
                numbers.append(number)
    own = [[_item(ReferencedSegmentNumber=n)] for n in numbers]
    tags = functional_groups(AFFINE, slices, SegmentIdentificationSequence=own)
    described = [_item(SegmentNumber=n, SegmentLabel=f"organ {n}") for n in masks]
    tags |= {"SegmentSequence": described, "SegmentationType": "BINARY", "Modality": "SEG"}
    write_frames(path, np.stack(frames, 2).astype(np.uint8), SEG, **{**tags, **more})
    return path


def _item(**tags):
    item = pydicom.Dataset()
    for name, value in tags.items():
        setattr(item, name, value)
    return item


@pytest.mark.parametrize("order", [range(8), range(7, -1, -1), [3, 0, 5, 1, 4, 2, 7, 6]])
@pytest.mark.parametrize("alone", [False, True])
def test_any_order_of_frames_and_gaps_between_them(tmp_path, image, order, alone):
    """With its image and without: an omitted slice is empty, not the nearest one."""
    gappy = BALL.copy()
    gappy[:, :, 4] = False
    path = _write_seg(tmp_path / "s.dcm", {1: gappy, 3: CORNER}, list(order))
    segments = read_segments(path, None if alone else image)
    for number, mask in ((1, gappy), (3, CORNER)):
        found = segments.mask(segments.find([number])[0])
        places = apply_affine(segments.affine, np.argwhere(found))
        theirs = apply_affine(AFFINE, np.argwhere(mask))
        assert sorted(map(tuple, places.round(3))) == sorted(map(tuple, theirs.round(3)))


def test_a_segmentation_of_another_patient_is_refused(tmp_path):
    write_series(tmp_path / "ct", np.zeros(SHAPE, np.int16), AFFINE, FrameOfReferenceUID="1.2.3")
    image = read_volume(tmp_path / "ct")
    series = _item(ReferencedInstanceSequence=[_item(ReferencedSOPInstanceUID="1.9")])
    path = _write_seg(
        tmp_path / "s.dcm",
        {1: BALL},
        range(8),
        FrameOfReferenceUID="1.2.4",
        ReferencedSeriesSequence=[series],
    )
    with pytest.raises(UserError, match="another frame of reference"):
        read_segments(path, image)
    path = _write_seg(
        tmp_path / "s.dcm",
        {1: BALL},
        range(8),
        FrameOfReferenceUID="1.2.3",
        ReferencedSeriesSequence=[series],
    )
    assert "made from other images" in " ".join(read_segments(path, image).notes)


def test_colours_of_segments(tmp_path, image):
    path = _write_seg(tmp_path / "s.dcm", {1: BALL}, range(8))
    header = pydicom.dcmread(path)
    header.SegmentSequence[0].RecommendedDisplayCIELabValue = [
        34885,
        53485,
        50171,
    ]  # pure red, L 53.2 a 80.1 b 67.2
    header.save_as(path)
    assert np.abs(np.array(read_segments(path, image).segments[0].colour) - (255, 0, 0)).max() <= 2


# --- RTSTRUCT -----------------------------------------------------------------------------------------------


def _contour(corners, k):
    """Corners (column, row) on slice k, LPS."""
    at = apply_affine(AFFINE, [(*corner, k) for corner in corners])
    return at * (-1, -1, 1)


def _square(low, high, k):
    return _contour([(low, low), (high, low), (high, high), (low, high)], k)


def test_contours_are_filled_by_the_odd_rule(tmp_path, image):
    ring = [_square(0.6, 7.4, k) for k in (2, 3)] + [_square(2.6, 5.4, k) for k in (2, 3)]
    keyhole = _contour(
        [(0.6, 0.6), (7.4, 0.6), (7.4, 7.4), (0.6, 7.4), (0.6, 3.5), (2.6, 3.5), (2.6, 5.4), (5.4, 5.4), (5.4, 2.6),
         (2.6, 2.6), (2.6, 3.5), (0.6, 3.5)], 2)  # fmt: skip
    write_structures(
        tmp_path / "rs.dcm", {"ring": ring, "keyhole": [keyhole], "block": [_square(1.6, 4.4, 6)]}
    )
    segments = read_segments(tmp_path / "rs.dcm", image)
    hollow = np.zeros(SHAPE, bool)
    hollow[1:8, 1:8, 2:4] = True
    hollow[3:6, 3:6, 2:4] = False
    assert np.array_equal(segments.mask(segments.find(["ring"])[0]), hollow)
    assert segments.mask(segments.find(["keyhole"])[0]).sum() == hollow[:, :, 2].sum()
    block = segments.mask(segments.find(["Block"])[0])
    assert block.sum() == 9 and block[2:5, 2:5, 6].all()
    assert segments.segments[0].colour == (255, 10, 0)


def test_contours_off_the_slices_and_without_an_image(tmp_path, image):
    contours = [_square(1.6, 4.4, 2), _square(1.6, 4.4, 2.3), _square(1.6, 4.4, 40)]
    write_structures(tmp_path / "rs.dcm", {"a": contours, "empty": []})
    segments = read_segments(tmp_path / "rs.dcm", image)
    notes = " ".join(segments.notes)
    assert segments.mask(segments.segments[0]).sum() == 9
    assert (
        "1 contours lie on no slice" in notes
        and "1 contours lie between slices" in notes
        and "empty" in notes
    )
    with pytest.raises(UserError, match="need an image with a place"):
        read_segments(tmp_path / "rs.dcm", None)


def test_contours_a_little_off_their_plane(tmp_path, image):
    """Writers round, and draw on planes that are turned a little: points are projected, islands of one slice kept."""
    up = np.array([0, 0, 1])
    turned = _square(0.6, 3.4, 2) + np.outer((0.3, -0.2, 0.3, -0.3), up)
    near = _square(4.6, 6.4, 2) + 0.1 * up
    write_structures(tmp_path / "rs.dcm", {"a": [turned, near]})
    segments = read_segments(tmp_path / "rs.dcm", image)
    assert "slices apart: they are projected on one" in " ".join(segments.notes)
    mask = segments.mask(segments.segments[0])
    assert mask[1:4, 1:4, 2].all() and mask[5:7, 5:7, 2].all() and mask.sum() == 9 + 4
    write_structures(tmp_path / "rs.dcm", {"a": [_square(0.6, 3.4, 2) + np.outer(range(4), 5 * up)]})
    with pytest.raises(UserError, match="do not lie in planes"):
        read_segments(tmp_path / "rs.dcm", image)


# --- Layers -------------------------------------------------------------------------------------------------


def _seg_nrrd(path, layers, named):
    """3D Slicer's file: layers (n, I, J, K), and per segment its name, layer, value and colour."""
    lines = ["NRRD0004", "type: uchar", "space: left-posterior-superior"]
    many = len(layers) > 1
    sizes = " ".join(map(str, ((len(layers),) if many else ()) + SHAPE))
    lines += [f"dimension: {4 if many else 3}", f"sizes: {sizes}", "encoding: raw", "space origin: (1,2,3)"]
    lines += [f"space directions: {'none ' if many else ''}(0.8,0,0) (0,0.9,0) (0,0,3)"]
    lines += [f"kinds: {'list ' if many else ''}domain domain domain"]
    for n, (name, layer, value, colour) in enumerate(named):
        lines += [f"Segment{n}_ID:=s{n}", f"Segment{n}_Name:={name}", f"Segment{n}_Layer:={layer}"]
        lines += [f"Segment{n}_LabelValue:={value}", f"Segment{n}_Color:={colour}"]
    data = np.stack(layers) if many else layers[0]
    path.write_bytes("\n".join([*lines, "", ""]).encode() + data.astype(np.uint8).tobytes(order="F"))
    return path


@pytest.mark.parametrize("count", [2, 3, 4])
def test_layers_of_a_slicer_segmentation(tmp_path, count):
    """Three and four 8-bit layers are no colours."""
    pytest.importorskip("SimpleITK")
    masks = [BALL, CORNER, OVERLAP, ~BALL][:count]
    named = [(f"organ{n}", n, 1, "1 0.5 0") for n in range(count)]
    path = _seg_nrrd(tmp_path / "a.seg.nrrd", masks, named)
    segments = read_segments(path)
    for n, mask in enumerate(masks):
        assert np.array_equal(segments.mask(segments.find([f"organ{n}"])[0]), mask)
    assert segments.segments[0].colour == (255, 128, 0)
    with pytest.raises(UserError, match=f"holds {count} volumes"):
        read_volume(path)


def test_a_single_layer_has_labels_as_numbers(tmp_path):
    pytest.importorskip("SimpleITK")
    both = np.where(BALL, 3, np.where(CORNER, 7, 0))
    path = _seg_nrrd(tmp_path / "a.seg.nrrd", [both], [("ball", 0, 3, "1 0 0"), ("corner", 0, 7, "0 1 0")])
    segments = read_segments(path)
    assert [(s.number, s.name) for s in segments.segments] == [(3, "ball"), (7, "corner")]
    assert np.array_equal(segments.mask(segments.segments[1]), CORNER)


@pytest.mark.parametrize("background", [False, True])
def test_one_layer_per_structure(tmp_path, background):
    import nibabel

    layers = [BALL, CORNER]
    if background:
        layers = [~BALL & ~CORNER, *layers]
    nibabel.save(nibabel.Nifti1Image(np.stack(layers, -1).astype(np.uint8), AFFINE), tmp_path / "a.nii.gz")
    segments = layers_as_segments(tmp_path / "a.nii.gz")
    assert [s.number for s in segments.segments] == [1, 2]
    assert np.array_equal(segments.mask(segments.find([2])[0]), CORNER)
    nibabel.save(
        nibabel.Nifti1Image(np.arange(1920, dtype=np.int16).reshape(*SHAPE, 2), AFFINE), tmp_path / "b.nii"
    )
    assert layers_as_segments(tmp_path / "b.nii") is None


def test_other_files_have_no_segments(tmp_path, image):
    assert read_segments(tmp_path / "ct", image) is None
    assert read_segments(tmp_path / "none", image) is None


def test_a_segmentation_in_a_folder(tmp_path, image):
    """As archives store it: a folder of its own, a name without suffix, or among the images."""
    found = _highdicom(tmp_path, [BALL])
    place = tmp_path / "deep" / "er"
    place.mkdir(parents=True)
    shutil.copy(found, place / "1.2.840.4")
    image = read_volume(tmp_path / "ct")
    for path in (tmp_path / "deep", place / "1.2.840.4"):
        assert len(read_segments(path, image).segments) == 1
    shutil.copy(found, place / "second.dcm")
    with pytest.raises(
        UserError, match=r"holds 2 segmentations: give one of them.*1\.2\.840\.4.*second\.dcm"
    ):
        read_segments(tmp_path / "deep", image)
