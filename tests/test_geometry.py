"""Frames and where they lie: exact through files, right for every orientation."""

import itertools
import json

import nibabel
import numpy as np
import pytest
from nibabel.affines import apply_affine
from nibabel.orientations import aff2axcodes

from patient.geometry import Geometry, check_affine, cut_geometry, swap_ras_lps, upright_cut, voxel_sizes
from patient.side_views import side_views, slice_name
from utils.errors import UserError

SHAPE = (5, 6, 7)
ORIENTATIONS = [
    [(axis, sign) for axis, sign in zip(order, signs, strict=True)]
    for order in itertools.permutations(range(3))
    for signs in itertools.product((-1, 1), repeat=3)
]


def _affine(orientation=((0, 1), (1, 1), (2, 1)), spacing=(0.5, 0.75, 2.0), tilt=0.0):
    """An affine: orientation[s] is the patient axis and sign of source axis s, then all is tilted by `tilt` radians."""
    affine = np.eye(4)
    affine[:3, :3] = 0
    for source, (patient, sign) in enumerate(orientation):
        affine[patient, source] = sign * spacing[source]
    c, s = np.cos(tilt), np.sin(tilt)
    turn = np.array([[1, 0, 0], [0, c, -s], [0, s, c]]) @ np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    affine[:3, :3] = turn @ affine[:3, :3]
    affine[:3, 3] = 11.0, -7.5, 101.25
    return affine


def _geometry(affine, axis=2, keep_every=1, shape=SHAPE):
    cut = upright_cut(affine, axis)
    return cut, cut_geometry(
        cut, affine, shape, keep_every, window=(-1.5, 1e-3), bits=16, source="a.nii.gz", volume=3
    )


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("orientation", ORIENTATIONS, ids=str)
def test_frames_are_upright_and_every_pixel_is_where_its_voxel_is(orientation, axis):
    """All 48 orientations, tilted by 10 degrees, cut across each axis."""
    affine = _affine(orientation, tilt=np.radians(10))
    cut, geometry = _geometry(affine, axis, keep_every=2)

    # Upright: columns grow to L or P, rows to P or I; the order of frames is the source's.
    column, row, frame = aff2axcodes(geometry.matrix)
    assert (column, row) in (("L", "P"), ("L", "I"), ("P", "I"))
    assert frame == aff2axcodes(affine)[axis]

    # Exact: the pixel at an index is the voxel at the same position in mm. Errors are rounding of numbers near 100.
    volume = np.arange(np.prod(SHAPE)).reshape(SHAPE)
    frames = cut.frames(volume)[::2]
    assert frames.shape == (len(geometry.slices), geometry.size[1], geometry.size[0])
    indices = np.array(list(np.ndindex(frames.shape)))[:, ::-1]  # column, row, frame
    voxels = apply_affine(np.linalg.inv(affine), apply_affine(geometry.matrix, indices))
    assert np.abs(voxels - voxels.round()).max() < 1e-9
    found = volume[tuple(voxels.round().astype(int).T)]
    assert np.array_equal(found, frames.transpose(2, 1, 0)[tuple(indices.T)])


def test_spacing_positions_and_slices():
    _, geometry = _geometry(
        _affine(((2, 1), (0, -1), (1, 1)), spacing=(3.0, 0.5, 0.75)), axis=0, keep_every=2
    )
    assert geometry.axis == 0
    assert geometry.slices == (0, 2, 4) and geometry.slice_count == 5
    assert geometry.positions == (0.0, 6.0, 12.0)
    assert geometry.spacing == pytest.approx((0.5, 0.75, 6.0), abs=1e-12)
    assert geometry.size == (6, 7)


def test_frames_left_out_are_known_between_the_kept_ones():
    _, geometry = _geometry(_affine(), keep_every=3, shape=(5, 6, 12))
    assert geometry.slices == (0, 3, 6, 9) and geometry.heldout_slices == (
        1,
        2,
        4,
        5,
        7,
        8,
    )  # 10, 11 follow the last
    assert geometry.heldout_positions == (2.0, 4.0, 8.0, 10.0, 14.0, 16.0)
    thirds = [1 / 3, 2 / 3, 4 / 3, 5 / 3, 7 / 3, 8 / 3]
    assert geometry.heldout_indices() == pytest.approx(thirds, abs=1e-12)
    assert geometry.evenly_spaced and geometry.durations() is None
    told = json.loads(geometry.to_json())
    assert told["heldout_indices"] == geometry.heldout_indices() and told["durations"] is None
    assert Geometry.from_json(geometry.to_json()) == geometry


def test_uneven_slices_have_true_times_and_places():
    cut = upright_cut(affine := _affine(tilt=0.2), 2)
    depths = [0, 1, 2, 4, 5, 6, 7]  # slice 3 of 8 is missing; steps are 2 mm
    others = {"window": (0, 1), "bits": 16, "source": "a", "depths": depths}
    every = cut_geometry(cut, affine, SHAPE, **others)
    assert every.positions == (0, 2, 4, 8, 10, 12, 14) and not every.evenly_spaced
    assert every.durations() == pytest.approx(np.array([1, 1, 2, 1, 1, 1, 1]) / 8)
    with pytest.raises(UserError, match="unevenly spaced"):
        every.for_renders(every.size, 2)
    for sub_frames in (1, 4):
        points = np.array([(2.0, 3.0, index * sub_frames) for index in (0, 2, 2.5, 3, 6, 6.5)])
        expected = apply_affine(affine @ cut.matrix(SHAPE), [(2, 3, depth) for depth in (0, 2, 3, 4, 7, 7.5)])
        assert np.allclose(every.to_patient(points, every.size, sub_frames), expected, atol=1e-9)

    part = cut_geometry(cut, affine, SHAPE, box=(slice(1, 5), slice(0, 6), slice(3, 7)), **others)
    assert part.positions == (8, 10, 12, 14) and part.evenly_spaced  # the gap is cropped away
    expected = apply_affine(affine @ cut.matrix(SHAPE), [(1 + 2, 3, depth) for depth in (4, 7)])
    assert np.allclose(apply_affine(part.matrix, [(2, 3, 0), (2, 3, 3)]), expected, atol=1e-9)

    other = cut_geometry(cut, affine, SHAPE, 2, **others)
    assert other.slices == (0, 2, 5 - 1, 6) and other.positions == (0, 4, 10, 14)
    assert other.heldout_slices == (1, 3, 5) and other.heldout_positions == (2, 8, 12)
    assert other.heldout_indices() == pytest.approx([0.5, 1 + 4 / 6, 2.5])
    assert other.durations() == pytest.approx(np.array([4, 6, 4, 4]) / 18)
    assert Geometry.from_json(other.to_json()) == other


def test_headers_that_round_are_even():
    """Positions to a hundredth of a gap: equal steps of 0.625 mm written with two decimals."""
    depths = [round(index * 0.625, 2) / 0.625 for index in range(7)]
    others = {"window": (0, 1), "bits": 16, "source": "a"}
    geometry = cut_geometry(upright_cut(None, 2), None, SHAPE, depths=depths, **others)
    assert geometry.durations() is None


def test_crop_follows_exactly():
    affine = _affine(((1, -1), (2, 1), (0, 1)), tilt=0.3)
    cut = upright_cut(affine, 2)
    others = {"window": (0, 1), "bits": 16, "source": "a"}
    box = (slice(1, 4), slice(2, 5), slice(3, 7))
    whole, part = (cut_geometry(cut, affine, SHAPE, **more) for more in (others, {**others, "box": box}))
    assert part.size == (3, 3) and part.offset == (1, 2) and part.slices == (3, 4, 5, 6)
    assert part.positions == whole.positions[3:]
    at = apply_affine(whole.matrix, (1 + 2, 2 + 1, 3 + 3))
    assert np.allclose(apply_affine(part.matrix, (2, 1, 3)), at, atol=1e-9)


def test_without_an_affine_nothing_is_turned():
    cut, geometry = _geometry(None)
    volume = np.arange(np.prod(SHAPE)).reshape(SHAPE)
    assert np.array_equal(cut.frames(volume)[4], volume[:, :, 4].T)
    assert geometry.spacing is None and geometry.matrix is None and geometry.for_renders((5, 6), 8) is None
    assert geometry.positions == tuple(range(7))


def test_colours_are_carried_along():
    volume = np.random.default_rng(0).random((*SHAPE, 3))
    cut = upright_cut(_affine(), 1)  # RAS, coronal: both in-plane axes turn round
    assert np.array_equal(cut.frames(volume)[2], volume[::-1, 2, ::-1].transpose(1, 0, 2))


@pytest.mark.parametrize("affine", [None, _affine(tilt=0.3)], ids=["unknown", "known"])
def test_json_is_exact(tmp_path, affine):
    _, geometry = _geometry(affine, keep_every=3)
    assert Geometry.from_json(geometry.to_json()) == geometry
    geometry.save(tmp_path / "frames.json")
    assert Geometry.load(tmp_path / "frames.json") == geometry
    fields = json.loads((tmp_path / "frames.json").read_text())
    assert fields["axis"] == 2 and (affine is None) == (fields["spacing"] is None)


def test_find_looks_in_the_data_root_and_above(tmp_path):
    _, geometry = _geometry(_affine())
    (tmp_path / "case" / "img").mkdir(parents=True)
    assert Geometry.find(tmp_path / "case" / "img") is None
    geometry.save(tmp_path / "case" / "frames.json")
    assert Geometry.find(tmp_path / "case" / "img") == geometry
    assert Geometry.find(tmp_path / "case") == geometry


@pytest.mark.parametrize(
    "change",
    [
        lambda fields: fields.pop("affine"),
        lambda fields: fields.update(version=99),
        lambda fields: fields.update(affine=[[1, 0], [0, 1]]),
        lambda fields: fields.update(affine=np.zeros((4, 4)).tolist()),
        lambda fields: fields.update(slices=[]),
        lambda fields: fields.update(heldout_slices=[1]),
        lambda fields: fields.update(positions=fields["positions"][::-1]),
    ],
)
def test_other_files_are_refused(tmp_path, change):
    fields = json.loads(_geometry(_affine())[1].to_json())
    change(fields)
    (tmp_path / "frames.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match=r"frames\.json"):
        Geometry.load(tmp_path / "frames.json")


def test_refused_files_that_are_no_json(tmp_path):
    for content in ("", "[]", '"a"', "\0"):
        (tmp_path / "frames.json").write_text(content)
        with pytest.raises(UserError, match=r"frames\.json"):
            Geometry.load(tmp_path / "frames.json")


def test_renders_at_another_size_cover_the_same_field_of_view():
    _, geometry = _geometry(_affine(), shape=(100, 61, 7))
    full = geometry.matrix
    assert np.allclose(geometry.for_renders((100, 61), 1), full, atol=1e-12)
    half = geometry.for_renders((50, 30), 8)  # 61 / 2 is rounded: rows are a little taller
    for edge, small in (((-0.5, -0.5, 1), (-0.5, -0.5, 8)), ((99.5, 60.5, 2), (49.5, 29.5, 16))):
        assert np.allclose(apply_affine(half, small), apply_affine(full, edge), atol=1e-9)
    with pytest.raises(UserError, match="50 x 50"):
        geometry.for_renders((50, 50), 8)


def test_ras_and_lps():
    points = np.array([[1.0, 2.0, 3.0]])
    assert swap_ras_lps(points).tolist() == [[-1, -2, 3]]
    assert np.array_equal(swap_ras_lps(swap_ras_lps(points)), points)


def test_affines_of_no_volume():
    check_affine(_affine(spacing=(1e-4, 1e-4, 1e-4)))  # microscopy is fine
    for bad in (np.zeros((4, 4)), np.full((4, 4), np.nan), np.eye(3)):
        with pytest.raises(ValueError, match="affine"):
            check_affine(bad)
    flat = _affine()
    flat[:3, 1] = flat[:3, 0]
    with pytest.raises(ValueError, match="singular"):
        check_affine(flat)


def test_agrees_with_nibabel_on_a_real_oblique_scan():
    path = f"{nibabel.__path__[0]}/tests/data/example4d.nii.gz"
    image = nibabel.load(path)
    _, geometry = _geometry(image.affine, shape=image.shape[:3])
    voxel = (10, 20, 5)
    column, row = 10, image.shape[1] - 1 - 20  # axes to LAS: rows turn round, columns do not
    assert np.allclose(
        apply_affine(geometry.matrix, (column, row, 5)), apply_affine(image.affine, voxel), atol=1e-9
    )


# ---- cuts across the slices ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("upwards", [True, False])
def test_side_views_show_superior_anterior_and_right_first(axis, upwards):
    """Each pixel of a stack holds a patient coordinate: it falls downwards or to the right."""
    signs = np.where(np.arange(3) == axis, 1.0 if upwards else -1.0, 1.0)
    affine = np.diag([*signs * [2.0, 3.0, 4.0], 1.0])
    cut = upright_cut(affine, axis)
    matrix = affine @ cut.matrix((7, 8, 9))
    depth, height, width = cut.frames(np.zeros((7, 8, 9))).shape
    column, row, frame = np.meshgrid(np.arange(width), np.arange(height), np.arange(depth), indexing="ij")
    places = np.stack([column, row, frame, np.ones_like(frame)], -1) @ matrix.T  # (W, H, D, 4)
    names = []
    for view in side_views(matrix):
        normal = {"sagittal": 0, "coronal": 1, "axial": 2}[view.name]
        names.append(view.name)
        pictures = [view.cut(places[..., k].transpose(2, 1, 0), 3, 2) for k in range(3)]
        assert np.ptp(pictures[normal]) == 0
        down, right = (max(range(3), key=lambda k, i=i: np.ptp(pictures[k], axis=i).max()) for i in (0, 1))
        if axis != 0:  # sagittal slices lie on their side in the axial view
            assert (down, right) in {(2, 0), (2, 1), (1, 0)}
        # R falls to the right or downwards, A to the right or downwards, S downwards: as radiologists look.
        assert (np.diff(pictures[down], axis=0) < 0).all() and (np.diff(pictures[right], axis=1) < 0).all()
        sizes = [abs(np.diff(pictures[down], axis=0)).max(), abs(np.diff(pictures[right], axis=1)).max()]
        assert view.aspect(voxel_sizes(matrix)) == pytest.approx(sizes[0] / sizes[1])
        mark = np.zeros((depth, height, width))
        mark[5, 3, 4] = 1
        u, v = view.place(np.array([4 if view.along_row else 3]), np.array([5]), depth)
        assert view.cut(mark, 3, 4)[v[0], u[0]] == 1
    assert {*names, slice_name(matrix)} == {"sagittal", "coronal", "axial"}
