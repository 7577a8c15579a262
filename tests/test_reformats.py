"""Planes across the frames, on volumes whose values are known everywhere."""

import nibabel
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nibabel.affines import apply_affine
from scipy.spatial.transform import Rotation
from test_render import call, random_gaussians, save, with_head  # noqa: F401

from patient.geometry import FrameCut, cut_geometry
from patient.labels import Label, LabelTable
from patient.reformats import Plane, Reformat
from utils.errors import UserError

SIZE, COUNT = (24, 20), 9
SLOPES = np.array([0.006, -0.004, 0.005])  # of the known value, per millimetre of the patient
MIDDLE = np.array([5.0, -12.0, 40.0])


def known(points):
    """A value in [0, 1] at points in RAS millimetres: linear, so that interpolation is exact."""
    return 0.5 + (points - MIDDLE) @ SLOPES


def geometry_of(angles=(0, 0, 0), depths=None, spacing=(1.5, 1.0, 4.0), window=(0.0, 1.0)):
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() @ np.diag(spacing)
    extent = np.array([*SIZE, COUNT]) - 1
    affine[:3, 3] = MIDDLE - affine[:3, :3] @ (extent / 2)
    cut = FrameCut((0, 1, 2), (False, False))
    return cut_geometry(cut, affine, (*SIZE, COUNT), depths=depths, window=window, bits=16, source="known")


def frame(geometry, position, value=known, size=SIZE):
    """What a model that knows the values renders at a position."""
    row, column = np.mgrid[: size[1], : size[0]]
    points = np.stack((column, row, np.full_like(row, position, float)), -1).astype(float)
    return value(geometry.to_patient(points, size)).astype(np.float32)


def filled(plane, geometry, value=known, size=SIZE, **options):
    made = Reformat(plane, geometry, size, **options)
    for slot, position in enumerate(made.positions):
        assert 0 <= position <= COUNT - 1
        made.put(slot, frame(geometry, position, value, size))
    return made


UNEVEN = np.array([0, 1, 2, 3.5, 4, 5, 6, 7, 8])


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    angles=st.tuples(*[st.floats(-180, 180)] * 3),
    turn=st.tuples(*[st.floats(-180, 180)] * 3),
    offset=st.tuples(*[st.floats(-3, 3)] * 3),
    uneven=st.booleans(),
    smaller=st.booleans(),
)
def test_any_plane_shows_the_known_values(angles, turn, offset, uneven, smaller):
    geometry = geometry_of(angles, UNEVEN if uneven else None)
    size = (12, 10) if smaller else SIZE
    right, down = Rotation.from_euler("xyz", turn, degrees=True).as_matrix()[:2]
    told = " ".join(f"{x:.17g}" for x in (*(MIDDLE + offset), *(3 * right), *down))
    plane = Plane.parse(told, geometry, None)
    made = filled(plane, geometry, size=size)
    points = plane.points(0)
    # It lies where it was asked for, at the pixels' spacing, and covers the cut.
    np.testing.assert_allclose((points - MIDDLE - offset) @ np.cross(right, down), 0, atol=1e-9)
    across = (plane.shape[0] - 1) * right
    np.testing.assert_allclose(points[:, -1] - points[:, 0], np.tile(across, (plane.shape[1], 1)), atol=1e-9)
    at = geometry.from_patient(points)
    inside = np.all((at >= 0) & (at <= (*np.subtract(SIZE, 1), COUNT - 1)), axis=-1)
    border = 0.5 if smaller else 1e-9  # outer pixels of smaller renders lie inside those of the frames
    clear = np.all((at >= border) & (at <= np.subtract((*SIZE, COUNT), 1) - (border, border, 0)), axis=-1)
    assert inside.any()
    np.testing.assert_allclose(made.values[0][clear], known(points)[clear], rtol=0, atol=2e-6)
    outside = np.any((at < -0.51) | (at > np.subtract((*SIZE, COUNT), 0.49)), axis=-1)
    assert not made.values[0][outside].any()


def test_what_the_model_shows_between_frames_is_on_the_plane():
    """A wave with two frames per period, which frames alone do not show."""
    geometry = geometry_of((10, 20, 30))
    along = geometry.matrix[:3, 2] / 4.0

    def wave(points):
        return 0.5 + 0.4 * np.sin(2 * np.pi * (points - MIDDLE) @ along / 8.0)

    plane = Plane.parse("5,-12,40 1,0,0 0,0.8,0.6", geometry, None)
    made = filled(plane, geometry, wave)
    inside = np.isfinite(made._at(0)[1])
    # Steps of half a millimetre: their linear interpolation is off by the second derivative times h^2 / 8.
    bound = 0.4 * (2 * np.pi / 8) ** 2 * 0.5**2 / 8
    np.testing.assert_allclose(
        made.values[0][inside], wave(plane.points(0))[inside], rtol=0, atol=bound + 1e-5
    )
    assert np.ptp(made.values[0][inside]) > 0.75


@pytest.mark.parametrize("uneven", [False, True])
def test_isotropic_voxels(tmp_path, uneven):
    geometry = geometry_of((20, -10, 5), UNEVEN if uneven else None, window=(-100.0, 300.0))
    plane = Plane.parse("isotropic", geometry, 0.8)
    made = filled(plane, geometry)
    made.write(tmp_path / "v.nii.gz")
    image = nibabel.load(tmp_path / "v.nii.gz")
    assert image.shape == (44, 24, 41) and np.allclose(image.header.get_zooms(), 0.8)
    points = apply_affine(
        image.affine, np.stack(np.meshgrid(*map(np.arange, image.shape), indexing="ij"), -1)
    )
    np.testing.assert_allclose(image.get_fdata(), known(points) * 400 - 100, rtol=0, atol=1e-2)


def test_masks_and_label_maps(tmp_path):
    geometry = geometry_of((10, 20, 30))
    plane = Plane.parse("5,-12,40 1,0,0 0,0.6,0.8", geometry, None)
    above = known(plane.points(0)) > 0.5
    inside = np.isfinite(Reformat(plane, geometry, SIZE)._at(0)[1])
    clear = inside & (np.abs(known(plane.points(0)) - 0.5) > 0.012)  # half a pixel and half a step
    mask = filled(plane, geometry, lambda p: np.where(known(p) > 0.5, 1.0, 0.0), mask=True)
    mask.write(tmp_path / "m.nii.gz")
    stored = np.asarray(nibabel.load(tmp_path / "m.nii.gz").dataobj)[:, :, 0].T
    assert np.array_equal(stored[clear], above[clear]) and set(np.unique(stored)) == {0, 1}
    labels = LabelTable((Label.of(7), Label.of(300)))
    made = Reformat(plane, geometry, SIZE, labels)
    for slot, position in enumerate(made.positions):
        made.put(slot, np.where(frame(geometry, position) > 0.5, 300, 7).astype(np.int32))
    assert np.array_equal(made.values[0][clear], np.where(above, 300, 7)[clear])
    assert not made.values[0][~inside].any()


def test_planes_that_cannot_be():
    geometry = geometry_of()
    for told, message in (
        ("1,2,3", "give isotropic, or nine numbers"),
        ("a b c d e f g h i", "give isotropic, or nine numbers"),
        ("0,0,0 1,0,0 1,0,0", "have to be perpendicular"),
        ("0,0,0 0,0,0 1,0,0", "have to be perpendicular"),
        ("5,-12,99 1,0,0 0,1,0", r"misses the frames, whose middle is 5, -12, 40 \(RAS mm\), by 43 mm"),
    ):
        with pytest.raises(UserError, match=message):
            Plane.parse(told, geometry, None)
    with pytest.raises(UserError, match="too many: take a larger --plane_spacing"):
        Plane.parse("isotropic", geometry, 1e-3)
    bare = cut_geometry(
        FrameCut((0, 1, 2), (False, False)), None, (4, 4, 4), window=(0, 1), bits=8, source="x"
    )
    with pytest.raises(UserError, match="x had no affine"):
        Plane.parse("isotropic", bare, None)


def test_render_writes_planes(tmp_path, call, capsys):  # noqa: F811
    """A plane through a frame's own pixels is that frame; one across meets every frame's line."""
    geometry = cut_geometry(
        FrameCut((0, 1, 2), (False, False)), np.diag([1.0, 1.0, 3.0, 1.0]), (40, 32, 4), window=(0, 1), bits=8,
        source="scan",
    )  # fmt: skip
    folder = save(tmp_path / "model", with_head(random_gaussians()))
    geometry.save(folder / "frames.json")
    call("-m", folder, "--pipeline", "both", "--extension", ".npy", "--plane", "0,0,3 1,0,0 0,1,0", "--quiet")
    frame = np.load(folder / "render_img" / "00001_0.npy")
    shown = nibabel.load(folder / "render_plane_img.nii.gz").get_fdata()[:, :, 0].T
    np.testing.assert_allclose(shown, frame, rtol=0, atol=1e-6)
    assert (folder / "render_plane_mask.png").exists() and (folder / "render_plane_mask.nii.gz").exists()
    call("-m", folder, "--extension", ".npy", "--plane", "0,15,0 1,0,0 0,0,1", "--plane_spacing", 1.5)
    assert "27 x 7 points of 1.5 mm in" in capsys.readouterr().out
    shown = nibabel.load(folder / "render_plane_img.nii.gz").get_fdata()[:, :, 0].T
    for k in range(4):
        frame = np.load(folder / "render_img" / f"{k:05d}_0.npy")
        line = np.interp(1.5 * np.arange(27), np.arange(40), frame[15])
        np.testing.assert_allclose(shown[2 * k], line, rtol=0, atol=1e-6)
