"""Surfaces of voxel stacks, and mesh files."""

import numpy as np
import pytest
import trimesh
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter
from skimage.filters import threshold_otsu

from patient.meshes import (
    FORMATS,
    decimate,
    in_space,
    inside_shares,
    is_closed,
    largest,
    otsu,
    read_mesh,
    smooth,
    surface,
    surface_of_volume,
    write_mesh,
)
from utils.errors import UserError


def _ball(side=20, radius=7.0):
    z, y, x = np.mgrid[:side, :side, :side]
    return (np.linalg.norm((z - side / 2, y - side / 2, x - side / 2), axis=0) < radius).astype(np.float32)


# ---- surfaces --------------------------------------------------------------------------------------------------------


def test_a_mask_that_touches_the_border_is_closed_half_a_voxel_outside():
    """All of a block but its first frame: faces lie between voxels, so the volume is a count, less cut edges."""
    values = np.ones((5, 6, 7), np.float32)
    values[0] = 0
    mesh = surface(values, 0.5)
    assert is_closed(mesh)
    assert mesh.bounds.tolist() == [[-0.5, -0.5, 0.5], [6.5, 5.5, 4.5]]
    # The 12 edges are bevelled by triangles of area 1/8, the 8 corners by a little more: at most all lengths / 8.
    assert 4 * 6 * 7 - 4 * (4 + 6 + 7) / 8 <= mesh.volume < 4 * 6 * 7


def test_caps_do_not_depend_on_how_bright_the_object_is():
    _, y, x = np.mgrid[:6, :9, :9].astype(np.float32)
    values = np.clip(3.5 - np.hypot(y - 4, x - 4), 0, 1)
    boxes = []
    for brightness in (0.6, 1.0):
        mesh = surface(values * brightness, 0.3)
        assert is_closed(mesh)
        boxes.append(mesh.bounds[:, 2])
    assert np.allclose(boxes, (-0.5, 5.5), atol=1e-3)  # values at the level are moved by 1e-4 of the range


def test_a_stack_that_is_full_is_a_box_and_without_caps_nothing():
    values = np.ones((3, 4, 5), np.float32)
    assert surface(values, 0.5).bounds.tolist() == [[-0.5, -0.5, -0.5], [4.5, 3.5, 2.5]]
    with pytest.raises(ValueError, match="fills the stack"):
        surface(values, 0.5, closed=False)
    with pytest.raises(ValueError, match="nothing reaches the level 2"):
        surface(values, 2.0)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.tuples(*[st.integers(2, 9)] * 3),
    levels=st.integers(2, 5),
    affine=st.tuples(*[st.floats(-1, 1)] * 9),
)
def test_every_surface_is_closed_and_faces_outwards(seed, shape, levels, affine):
    """Values of few levels, so that many equal the iso-level; affines of either handedness, sheared ones too."""
    values = np.random.default_rng(seed).integers(0, levels, shape).astype(np.float32) / (levels - 1)
    values.flat[0] = 1
    matrix = np.eye(4)
    matrix[:3, :3] = np.array(affine).reshape(3, 3) + np.diag([2, -2, 2] if seed % 2 else [2, 2, 2])
    if abs(np.linalg.det(matrix[:3, :3])) < 0.1:
        return
    plain, mesh = surface(values, 0.5), surface(values, 0.5, matrix)
    assert is_closed(mesh)
    assert plain.volume > 0
    assert mesh.volume == pytest.approx(plain.volume * abs(np.linalg.det(matrix[:3, :3])), rel=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    share=st.floats(0.05, 0.6),
    grain=st.tuples(*[st.floats(0.8, 2.0)] * 3),
    sigma=st.tuples(*[st.floats(0.3, 2.0)] * 3),
)
def test_any_mask_keeps_its_volume_through_smoothing(seed, share, grain, sigma):
    """Ragged bodies with holes, threads and crumbs, cut by the border: within 1 %.

    Marching cubes itself sets the limit: where two bodies touch across a voxel's diagonal, its volume jumps.
    """
    noise = gaussian_filter(np.random.default_rng(seed).normal(size=(12, 11, 13)), grain)
    inside = noise > np.quantile(noise, 1 - share)
    mesh, _ = surface_of_volume(smooth(inside.astype(np.float32), sigma), float(inside.sum()))
    assert is_closed(mesh)
    assert mesh.volume == pytest.approx(inside.sum(), rel=0.01)


def test_shares_inside():
    values = np.array([0, 0.2, 0.5, 0.8, 1], np.float32)
    assert inside_shares(values, 0.5).tolist() == [0, 0, 0.5, 1, 1]
    # A level close to the end leaves it whole, up to rounding of a narrow band.
    assert inside_shares(values, 0.999).tolist() == pytest.approx([0, 0, 0, 0, 1], abs=1e-4)
    assert inside_shares(np.array([0.0, 1.0]), 1.0).tolist() == [0, 1]
    # A frame half-way between two masks, in 8 bits: 128 of 255 lies a little above one half.
    assert inside_shares(np.array([0, 127, 128, 255], np.float32) / 255, 0.5).sum() == pytest.approx(
        2, abs=1e-5
    )


def test_closed_means_that_every_edge_has_its_twin():
    """Two voxels that touch along an edge share an edge of four triangles: closed, but not a manifold."""
    ball = surface(_ball(), 0.5)
    assert is_closed(ball)
    for damaged in (ball.faces[1:], np.vstack((ball.faces[1:], ball.faces[:1, ::-1]))):
        assert not is_closed(trimesh.Trimesh(ball.vertices, damaged, process=False))
    cubes = [trimesh.creation.box(bounds=((at, at, 0), (at + 1, at + 1, 1))) for at in (0, 1)]
    touching = trimesh.util.concatenate(cubes)
    touching.merge_vertices()
    assert is_closed(touching) and not touching.is_watertight


def test_smoothing_goes_by_axis_and_lets_the_border_be():
    line = np.zeros((9, 9, 9), np.float32)
    line[4, 4] = 1  # along the columns, from border to border
    assert np.allclose(smooth(line, (1.0, 0.01, 3.0))[:, 4, 0], smooth(line, (1.0, 0.01, 3.0))[:, 4, 4])
    assert smooth(line, (1.0, 0.01, 3.0))[4, 4, 4] == pytest.approx(0.399, abs=1e-3)  # 1 / sqrt(2 pi)


def test_largest():
    values = np.zeros((6, 6, 12), np.float32)
    values[2:5, 2:5, 1:5] = 1
    values[2:5, 2:5, 5] = 0.3  # a rim below the level, nearer to the large body: stays
    values[3, 3, 9:11] = 0.9
    values[3, 3, 8] = 0.3  # this one goes with the small body
    kept = largest(values, 0.5)
    assert kept[:, :, 8:].max() == 0 and np.array_equal(kept[:, :, :7], values[:, :, :7])
    assert np.array_equal(largest(kept, 0.5), kept)
    touching = np.zeros((4, 4, 4), np.float32)
    touching[0, 0, :3] = touching[1, 1, 0] = 1  # an edge in common is not enough
    assert largest(touching, 0.5).sum() == 3


def test_decimation_that_would_open_a_mesh_is_refused(monkeypatch):
    pytest.importorskip("fast_simplification")
    ball = surface(_ball(), 0.5)
    with pytest.raises(ValueError, match="not closed"):
        decimate(ball, 0.9995)  # nothing is left

    def torn(mesh, percent):
        return trimesh.Trimesh(mesh.vertices, mesh.faces[1:], process=False)

    monkeypatch.setattr(trimesh.Trimesh, "simplify_quadric_decimation", torn)
    with pytest.raises(ValueError, match="not closed"):
        decimate(ball, 0.5)


def test_otsu():
    rng = np.random.default_rng(0)
    two = np.concatenate([rng.normal(0.2, 0.15, 5000), rng.normal(0.8, 0.2, 3000)]).astype(np.float32)
    bin_width = float(np.ptp(two)) / 256  # ours is a bin's edge, scikit-image's its centre
    assert otsu(two) == pytest.approx(float(threshold_otsu(two)), abs=bin_width)
    assert otsu(np.array([0.0, 0, 0, 1])) == pytest.approx(
        0.5, abs=1e-3
    )  # the middle of the gap, not its start
    with pytest.raises(ValueError, match=r"all values are 0\.3"):
        otsu(np.full(9, 0.3))


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FORMATS)
def test_round_trip(tmp_path, kind):
    placed = in_space(surface(_ball(), 0.5, np.diag([-0.8, 1.0, 2.5, 1.0])), "LPS")
    for mesh in (placed, surface(_ball(), 0.5)):
        write_mesh(tmp_path / f"a.{kind}", mesh)
        back = read_mesh(tmp_path / f"a.{kind}")
        assert back.metadata == {"space": mesh.metadata["space"], "unit": mesh.metadata["unit"]}
        # Corners may come back in another order: STL stores triangles alone. float32 of some 30 mm is good to 2e-6.
        assert np.allclose(np.sort(back.vertices, axis=0), np.sort(mesh.vertices, axis=0), atol=1e-5)
        assert is_closed(back) and back.volume == pytest.approx(mesh.volume, rel=1e-6)


def test_spaces_are_half_a_turn_apart():
    mesh = surface(_ball(), 0.5, np.diag([-0.8, 1.0, 2.5, 1.0]))
    turned = in_space(mesh, "LPS")
    assert np.allclose(turned.vertices, mesh.vertices * [-1, -1, 1])
    assert turned.volume == pytest.approx(mesh.volume) and mesh.metadata["space"] == "RAS"
    assert np.array_equal(in_space(turned, "RAS").vertices, mesh.vertices)


def test_gltf_is_in_metres_and_upright(tmp_path):
    """As other programs read it: superior is +y, anterior +z, left +x."""
    affine = np.diag([1.0, 1.0, 1.0, 1.0])  # RAS: columns to the right, rows to the front, frames upwards
    values = np.zeros((10, 8, 6), np.float32)
    values[1:9, 1:4, 1:3] = 1
    write_mesh(tmp_path / "a.glb", surface(values, 0.5, affine))
    bounds = trimesh.load_mesh(tmp_path / "a.glb").bounds
    assert np.allclose(bounds, np.array([[-2.5, 0.5, 0.5], [-0.5, 8.5, 3.5]]) / 1000, atol=1e-6)


def test_other_programs_files(tmp_path):
    """Text PLY without a word on space, polygons of four corners, comments of 3D Slicer."""
    (tmp_path / "text.ply").write_text(
        "ply\nformat ascii 1.0\ncomment SPACE=RAS\nelement vertex 4\nproperty float x\nproperty float y\n"
        "property float z\nelement face 1\nproperty list uchar int vertex_indices\nend_header\n"
        "0 0 0\n1 0 0\n1 1 0\n0 1 0\n4 0 1 2 3\n"
    )
    mesh = read_mesh(tmp_path / "text.ply")
    assert len(mesh.faces) == 2 and mesh.area == pytest.approx(1)
    assert mesh.metadata == {"space": "RAS", "unit": None}


def test_what_is_no_mesh_is_refused(tmp_path):
    mesh = surface(_ball(), 0.5)
    write_mesh(tmp_path / "a.ply", mesh)
    whole = (tmp_path / "a.ply").read_bytes()
    with pytest.raises(UserError, match="does not exist"):
        read_mesh(tmp_path / "b.ply")
    with pytest.raises(UserError, match="not a mesh format"):
        (tmp_path / "b.vtk").touch()
        read_mesh(tmp_path / "b.vtk")
    claimed = whole.replace(
        b"element vertex ", b"element vertex 9999999", 1
    )  # ten billion of them, and no more bytes
    for content in (b"", b"ply", b"hello\n", whole[:-5], whole[: len(whole) // 2], claimed):
        (tmp_path / "b.ply").write_bytes(content)
        with pytest.raises(UserError, match=r"b\.ply is not a PLY file"):
            read_mesh(tmp_path / "b.ply")
    for kind in ("stl", "obj", "glb"):
        (tmp_path / f"b.{kind}").write_bytes(b"hello\n")
        with pytest.raises(UserError, match=f"not a {kind.upper()} file"):
            read_mesh(tmp_path / f"b.{kind}")
    with pytest.raises(UserError, match=r"written as ply, stl, obj, glb, not as vtk"):
        write_mesh(tmp_path / "c.vtk", mesh)
    assert not (tmp_path / "c.vtk").exists()


def test_a_corner_that_is_not_there_or_not_a_number_is_refused(tmp_path):
    head = (
        "ply\nformat ascii 1.0\nelement vertex 3\nproperty float x\nproperty float y\nproperty float z\n"
        "element face 1\nproperty list uchar int vertex_indices\nend_header\n"
    )
    for body in ("0 0 0\n1 0 0\n0 1 0\n3 0 1 7\n", "0 0 nan\n1 0 0\n0 1 0\n3 0 1 2\n"):
        (tmp_path / "a.ply").write_text(head + body)
        with pytest.raises(UserError, match="not a PLY file"):
            read_mesh(tmp_path / "a.ply")
