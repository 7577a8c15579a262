"""slices_to_ply.py as a user runs it: masks in, closed meshes of the right size in the right place out."""

import os
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import trimesh
from matplotlib.collections import LineCollection
from nibabel.affines import apply_affine

import prepare
import slices_to_ply
from patient.geometry import FILE_NAME, Geometry, voxel_sizes
from patient.meshes import FORMATS, in_space, is_closed, read_mesh, surface
from patient.stacks import beside, read_stack
from patient.surfaces import point_distances, surface_scores
from slices_to_ply import main
from utils.errors import UserError
from utils.images import read_image, write_image

ROOT = Path(__file__).resolve().parent.parent
RADIUS = 10.0  # mm, of the ball in most tests
SPACING = (0.8, 1.0, 2.5)


def _affine(axes=(0, 1, 2), signs=(1, 1, 1), tilt=0.0):
    """Source axis s along patient axis axes[s], in steps of SPACING[s] mm, all turned by `tilt` radians about z."""
    affine = np.eye(4)
    affine[:3, :3] = 0
    for source in range(3):
        affine[axes[source], source] = signs[source] * SPACING[source]
    turn = np.array([[np.cos(tilt), -np.sin(tilt), 0], [np.sin(tilt), np.cos(tilt), 0], [0, 0, 1]])
    affine[:3, :3] = turn @ affine[:3, :3]
    affine[:3, 3] = 12.0, -30.0, 55.0
    return affine


def _ball(shape, affine, centre, radius=RADIUS):
    """Voxels whose centre lies in the ball; centre in RAS mm."""
    indices = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    return (np.linalg.norm(apply_affine(affine, indices) - centre, axis=-1) < radius).astype(np.uint8)


def _write_frames(folder, values, inter=None):
    """values (frame, row, column) in [0, 1] as 0000.png ..., or as 00000_0.png ... of `inter` per slice."""
    for number, frame in enumerate(values):
        name = f"{number:04d}" if inter is None else f"{number // inter:05d}_{number % inter}"
        write_image(folder / f"{name}.png", frame.astype(float))


def _round_frames(count=16, side=24, radius=8.0):
    z, y, x = np.mgrid[:count, :side, :side]
    return ((z - count / 2) ** 2 + (y - side / 2) ** 2 + (x - side / 2) ** 2 < radius**2).astype(float)


@pytest.mark.parametrize("axis", ["auto", "0", "1"])
@pytest.mark.parametrize(
    "affine",
    [
        _affine(),
        _affine(signs=(-1, -1, 1)),
        _affine(signs=(1, -1, -1), tilt=0.4),
        _affine(axes=(2, 0, 1), signs=(-1, 1, 1)),
    ],
    ids=["ras", "lps", "oblique", "permuted"],
)
@pytest.mark.parametrize("space", ["ras", "lps"])
def test_a_ball_comes_back_in_place_and_size(tmp_path, affine, axis, space):
    """Volume in, prepare.py, masks to a mesh: centre to a tenth of the finest voxel, volume to 3 %.

    The mask itself misses the ball's volume by about 1 % at this spacing, and marching cubes cuts the corners of its
    voxels: 3 % holds for both together.
    """
    shape = (42, 34, 16)
    centre = apply_affine(affine, (np.array(shape) - 1) / 2)
    ball = _ball(shape, affine, centre)
    nibabel.save(nibabel.Nifti1Image(ball, affine), tmp_path / "ball.nii.gz")
    volume = str(tmp_path / "ball.nii.gz")
    prepare.main(["-i", volume, "-l", volume, "-o", str(tmp_path / "case"), "--axis", axis, "--quiet"])
    (tmp_path / "case" / "seg" / "original").rename(tmp_path / "case" / "render_mask")

    arguments = [
        "-i",
        str(tmp_path / "case"),
        "-o",
        str(tmp_path / "out"),
        "--smoothing",
        "none",
        "--space",
        space,
    ]
    assert main([*arguments, "--quiet"]) == 0
    mesh = read_mesh(tmp_path / "out" / "case.ply")
    assert mesh.metadata == {"space": space.upper(), "unit": "mm"}
    mesh = in_space(mesh, "RAS")
    assert is_closed(mesh)
    vertices = mesh.vertices
    expected = ball.sum() * np.prod(SPACING)
    assert mesh.volume == pytest.approx(expected, rel=0.03)  # positive: triangles face outwards
    assert np.abs((vertices.min(0) + vertices.max(0)) / 2 - centre).max() < 0.08
    assert np.abs(np.linalg.norm(vertices - centre, axis=1) - RADIUS).max() < np.linalg.norm(SPACING) / 2


@pytest.mark.parametrize("inter", [1, 4, 8])
def test_sub_frames_divide_the_slice_spacing(tmp_path, inter):
    """Renders of the same ball, `inter` per slice, have the same millimetres; the centre shows no shift by a slice."""
    affine, shape = _affine(signs=(-1, -1, 1)), (42, 34, 16)
    centre = apply_affine(affine, (np.array(shape) - 1) / 2)
    nibabel.save(nibabel.Nifti1Image(_ball(shape, affine, centre), affine), tmp_path / "v.nii.gz")
    prepare.main(["-i", str(tmp_path / "v.nii.gz"), "-o", str(tmp_path / "case"), "--quiet"])
    step = np.diag([1, 1, 1 / inter, 1])
    fine = _ball((*shape[:2], shape[2] * inter), affine @ step, centre)
    _write_frames(tmp_path / "case" / "render_mask", fine.transpose(2, 1, 0), inter)
    main(
        [
            "-i",
            str(tmp_path / "case"),
            "-o",
            str(tmp_path),
            "--smoothing",
            "none",
            "--quiet",
            "--space",
            "ras",
        ]
    )
    mesh = read_mesh(tmp_path / "case.ply")
    assert np.abs(mesh.bounds.mean(axis=0) - centre).max() < 0.08
    # Many sub-frames leave the voxels' corners in the plane alone: 3 % as above.
    assert mesh.volume == pytest.approx(fine.sum() * np.prod(SPACING) / inter, rel=0.03)


def test_published_smoothing_keeps_a_ball_where_it_is(tmp_path):
    """Blurred by 0.75 slices along and 1.3 pixels across, a 16 mm ball keeps its centre, and its volume to 10 %."""
    affine, shape, inter = _affine(signs=(-1, -1, 1)), (56, 46, 20), 8
    centre = apply_affine(affine, (np.array(shape) - 1) / 2)
    nibabel.save(nibabel.Nifti1Image(_ball(shape, affine, centre, 16), affine), tmp_path / "case.nii.gz")
    fine = _ball((*shape[:2], shape[2] * inter), affine @ np.diag([1, 1, 1 / inter, 1]), centre, 16)
    _write_frames(tmp_path / "in" / "case" / "render_mask", fine.transpose(2, 1, 0), inter)
    arguments = [
        "-i",
        str(tmp_path / "in"),
        "-o",
        str(tmp_path / "out"),
        "-n",
        str(tmp_path),
        "--space",
        "ras",
    ]
    assert main([*arguments, "--smoothing", "published", "--quiet"]) == 0
    mesh = read_mesh(tmp_path / "out" / "case.ply")
    assert is_closed(mesh)
    assert np.abs(mesh.bounds.mean(axis=0) - centre).max() < 0.15
    assert mesh.volume == pytest.approx(4 / 3 * np.pi * 16**3, rel=0.1)


def test_the_level(tmp_path):
    """A ball of grey 0.4 in a haze of 0.2: a level above, between and below."""
    frames = _round_frames() * 0.2 + 0.2
    _write_frames(tmp_path / "case", frames)
    arguments = ["-i", str(tmp_path / "case"), "-o", str(tmp_path / "out"), "--smoothing", "none", "--quiet"]
    volumes = {}
    for thresh in ("0", "76.5", "25"):
        assert main([*arguments, "--thresh", thresh]) == 0
        volumes[thresh] = read_mesh(tmp_path / "out" / "case.ply").volume
    assert volumes["0"] == pytest.approx(volumes["76.5"], rel=0.01)
    assert volumes["0"] == pytest.approx(_round_frames().sum(), rel=0.03)
    assert volumes["25"] == pytest.approx(frames.size, rel=0.05)
    (tmp_path / "out" / "case.ply").unlink()
    assert main([*arguments, "--thresh", "128"]) == 1
    assert not (tmp_path / "out" / "case.ply").exists()


def test_folders_are_taken_in_their_order(tmp_path):
    """render_mask before render_img before render before loose frames, a whole ball in the first and none in others."""
    names = ("render_mask", "render_img", "render", "")
    for first in range(4):
        case = tmp_path / "in" / f"case{first}"
        for number, name in enumerate(names[first:]):
            _write_frames(case / name, _round_frames() if number == 0 else np.zeros((2, 24, 24)))
        (case / "plots").mkdir()
    assert (
        main(["-i", str(tmp_path / "in"), "-o", str(tmp_path / "out"), "--smoothing", "none", "--quiet"]) == 0
    )
    assert len({path.read_bytes() for path in (tmp_path / "out").iterdir()}) == 1
    assert len(list((tmp_path / "out").iterdir())) == 4


def test_frames_of_other_kinds_and_unpadded_numbers(tmp_path):
    frames = _round_frames()
    for number, frame in enumerate(frames):
        for extension in (".npy", ".tif"):
            write_image(tmp_path / "case" / f"{number}{extension}", frame, 16)  # 10 follows 9
    for extension in (".npy", "tif"):
        arguments = ["-i", str(tmp_path / "case"), "-o", str(tmp_path / extension), "--extension", extension]
        assert main([*arguments, "--smoothing", "none", "--quiet"]) == 0
        mesh = read_mesh(tmp_path / extension / "case.ply")
        assert mesh.volume == pytest.approx(frames.sum(), rel=0.03)
        assert mesh.metadata == {"space": None, "unit": "voxels"}


def test_what_is_printed(tmp_path, capsys):
    frames = _round_frames()
    _write_frames(tmp_path / "in" / "unknown", frames, inter=8)
    _write_frames(tmp_path / "in" / "known", frames, inter=8)
    known = nibabel.Nifti1Image(np.zeros((24, 24, 2), np.uint8), np.diag([-1.0, -1.0, 8.0, 1.0]))
    nibabel.save(
        known, tmp_path / "in" / "known" / "anything.nii.gz"
    )  # a NIfTI file in the case folder serves
    assert main(["-i", str(tmp_path / "in"), "-o", str(tmp_path / "out"), "--smoothing", "none"]) == 0
    text = capsys.readouterr().out
    known, unknown = text[: text.index("unknown:")], text[text.index("unknown:") :]
    assert "units are voxels" in unknown and "(LPS)" not in unknown
    assert "anything.nii.gz" in known and "mm^3" in known and "(LPS)" in known
    for part in (known, unknown):
        for word in ("16 frames", "8 per slice", "vertices", "triangles", "volume", "box", ".ply"):
            assert word in part


def test_one_bad_case_does_not_stop_the_others(tmp_path, capsys):
    folder = tmp_path / "in"
    frames = _round_frames()
    for name in ("a_good", "c_good"):
        _write_frames(folder / name, frames)
    (folder / "b_bare").mkdir()
    _write_frames(folder / "d_damaged", frames)
    (folder / "d_damaged" / "0003.png").write_bytes(b"no image")
    _write_frames(folder / "e_empty", frames * 0)
    _write_frames(folder / "f_gap", frames, inter=8)
    (folder / "f_gap" / "00000_3.png").unlink()
    _write_frames(folder / "g_sizes", frames)
    write_image(folder / "g_sizes" / "0099.png", np.zeros((9, 9)))
    _write_frames(folder / "h_inter", frames, inter=4)
    _write_frames(folder / "i_nifti", frames, inter=8)
    wrong = nibabel.Nifti1Image(np.zeros((24, 24, 7), np.uint8), np.eye(4))
    nibabel.save(wrong, tmp_path / "i_nifti.nii.gz")
    _write_frames(folder / "j_single", frames[:1])

    arguments = ["-i", str(folder), "-o", str(tmp_path / "out"), "--inter", "8", "-n", str(tmp_path)]
    assert main([*arguments, "--smoothing", "none", "--quiet", "--jobs", "1"]) == 1
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a_good.ply", "c_good.ply"]
    lines = capsys.readouterr().err.splitlines()
    reasons = {
        "b_bare": "has no .png frames",
        "d_damaged": "0003.png cannot be read",
        "e_empty": "all values are 0",
        "f_gap": "frame 00000_3 is missing",
        "g_sizes": "0099.png is 9 x 9 pixels",
        "h_inter": "4 sub-frames per frame, which is not --inter 8",
        "i_nifti": "16 frames are not 7 slices times 8",
        "j_single": "encloses no volume",
    }
    assert len(lines) == len(reasons) + 1
    for line, (name, reason) in zip(lines, reasons.items(), strict=False):
        assert line.startswith(f"slices_to_ply.py: failed: {name}: ") and reason in line
    assert lines[-1] == "slices_to_ply.py: 8 of 10 cases failed"


# ---- the round trip that trains nothing ------------------------------------------------------------------------------


def _organ(shape, affine, fill=0.55):
    """A bent body with a lobe, in voxels of a volume: no symmetry hides a flip."""
    size = np.array(voxel_sizes(affine))
    points = (
        np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1) - (np.array(shape) - 1) / 2
    ) * size
    half = fill * np.array(shape) * size / 2
    x, y, z = np.moveaxis(points / half, -1, 0)
    body = (x - 0.25 * y * y) ** 2 + y**2 + (z + 0.2 * x) ** 2 < 0.8
    lobe = (x - 0.7) ** 2 + (y - 0.45) ** 2 + (z - 0.5) ** 2 < 0.16
    return (body | lobe).astype(np.uint8)


AFFINES = {
    "ras": _affine(),
    "flipped": _affine(signs=(-1, 1, -1)),
    "oblique": _affine(signs=(1, -1, -1), tilt=0.4),
    "permuted": _affine(axes=(2, 0, 1), signs=(-1, 1, 1), tilt=-0.3),
}


@pytest.mark.parametrize("axis", ["0", "1", "2"])
@pytest.mark.parametrize("affine", AFFINES.values(), ids=AFFINES.keys())
def test_masks_to_frames_to_mesh_is_the_surface_of_the_label(tmp_path, affine, axis):
    """Label volume -> prepare.py -> slices_to_ply.py against marching cubes on the label volume itself.

    Unsmoothed, it is the same surface up to how diagonal voxels are cut: the farthest point within half the finest
    voxel. Smoothed, the corners of voxels go: on average and for 95 % of the surface within half a voxel.
    """
    label = _organ((30, 26, 14), affine)
    nibabel.save(nibabel.Nifti1Image(label, affine), tmp_path / "v.nii.gz")
    volume = str(tmp_path / "v.nii.gz")
    case = tmp_path / "case"
    prepare.main(["-i", volume, "-l", volume, "-o", str(case), "--axis", axis, "--quiet"])
    direct = surface(label.T.astype(np.float32), 0.5, affine)
    assert direct.volume > 0
    for smoothing, farthest in (("none", 0.5), (None, np.inf)):
        arguments = ["-i", str(case / "seg" / "original"), "-o", str(tmp_path), "--quiet"]
        assert main([*arguments, *(["--smoothing", smoothing] if smoothing else [])]) == 0
        mesh = in_space(read_mesh(tmp_path / "case.ply"), "RAS")
        scores = surface_scores(mesh, direct, samples=5000)
        half = min(SPACING) / 2
        assert mesh.is_watertight and mesh.volume > 0
        assert scores.hd <= farthest * 2 * half and scores.asd < half
        # Thick slices have steps of a slice, which smoothing is there to take away.
        assert scores.hd95 < (half if smoothing else max(SPACING) / 2)


# ---- what the options do ---------------------------------------------------------------------------------------------


def _placed(tmp_path, values, spacing=SPACING, inter=1, name="case"):
    """A case folder of values (frame, row, column) with a NIfTI file for its place."""
    _write_frames(tmp_path / name / "render_mask", values, inter)
    shape = (values.shape[2], values.shape[1], len(values) // inter)
    header = nibabel.Nifti1Image(
        np.zeros(shape, np.uint8), np.diag([-spacing[0], -spacing[1], spacing[2], 1.0])
    )
    nibabel.save(header, tmp_path / name / "place.nii.gz")
    return tmp_path / name


@pytest.mark.parametrize("smoothing", [None, "1.5"])
@pytest.mark.parametrize(
    ("spacing", "inter"), [((1, 1, 1), 1), ((0.7, 0.7, 5), 1), ((0.8, 0.8, 3), 4), ((2.0, 1.0, 0.5), 1)]
)
def test_smoothing_keeps_the_volume(tmp_path, spacing, inter, smoothing):
    """Thin, small and anisotropic: a sheet one voxel thick, a vessel two voxels wide, a body and a single voxel."""
    z, y, x = np.mgrid[: 12 * inter, :24, :24]
    shapes = {
        "sheet": (y == 11) & (x > 4) & (x < 19) & (z > 2) & (z < 10 * inter),
        "vessel": (abs(y - 12 - 3 * np.sin(z / 3 / inter)) < 1.1) & (abs(x - 11) < 1.1),
        "body": ((z / inter - 6) / 4) ** 2 + ((y - 12) / 8) ** 2 + ((x - 12) / 6) ** 2 < 1,
        "voxel": (z == 5 * inter) & (y == 12) & (x == 9),
    }
    for name, inside in shapes.items():
        _placed(tmp_path / "in", inside.astype(float), spacing, inter, name)
    arguments = ["-i", str(tmp_path / "in"), "-o", str(tmp_path / "out"), "--quiet", "--jobs", "1"]
    assert main([*arguments, *(["--smoothing", smoothing] if smoothing else [])]) == 0
    for name, inside in shapes.items():
        mesh = read_mesh(tmp_path / "out" / f"{name}.ply")
        assert mesh.is_watertight
        inside = inside[: len(inside) - inter + 1]  # up to the last slice: nothing was seen behind it
        assert mesh.volume == pytest.approx(inside.sum() * np.prod(spacing) / inter, rel=0.01), name


def test_a_volume_that_no_level_gives_back_is_told(tmp_path, capsys):
    """Eight single voxels, blurred: where two grow together across a diagonal, the volume of marching cubes jumps."""
    values = np.zeros((12, 11, 13))
    voxels = "1 0 6, 1 8 1, 3 9 5, 6 5 6, 8 7 4, 9 6 0, 10 4 12, 11 7 6"  # frame, row, column
    for voxel in voxels.split(", "):
        values[tuple(map(int, voxel.split()))] = 1
    _placed(tmp_path / "in", values, (1, 1, 1), name="specks")
    _placed(tmp_path / "in", _round_frames(), (1, 1, 1), name="whole")
    assert main(["-i", str(tmp_path / "in"), "-o", str(tmp_path), "--jobs", "1"]) == 0
    specks, whole = capsys.readouterr().out.split("whole:")
    assert "note: no level preserves the mask's volume of 8.0" in specks and "note:" not in whole


def test_the_default_smoothing_takes_steps_away(tmp_path):
    """A ball of 12 mm in voxels of 1 mm: nearer to the ball than without smoothing, and its millimetres are printed."""
    z, y, x = np.mgrid[:32, :32, :32]
    case = _placed(tmp_path, np.linalg.norm((z - 15.3, y - 15.6, x - 15.1), axis=0) < 12, (1, 1, 1))
    centre, rough = np.array([15.1, 15.6, 15.3]), {}
    for smoothing in ([], ["--smoothing", "none"]):
        assert main(["-i", str(case), "-o", str(tmp_path), "--quiet", *smoothing]) == 0
        vertices = read_mesh(tmp_path / "case.ply").vertices
        rough[bool(smoothing)] = np.linalg.norm(vertices - centre, axis=1).std()
    assert rough[False] < 0.6 * rough[True]


@pytest.mark.parametrize(
    ("spacing", "inter", "sigma"),
    [
        ((1, 1, 1), 1, "0.7, 0.7, 0.7"),
        ((1, 1, 5), 1, "0.7, 0.7, 1.25"),
        ((1, 1, 5), 4, "0.7, 0.7, 1.25"),
        ((2, 4, 1), 1, "0.7, 1, 0.7"),
    ],
)
def test_the_default_smoothing_by_axis(tmp_path, capsys, spacing, inter, sigma):
    case = _placed(tmp_path, _round_frames(), spacing, inter)
    assert main(["-i", str(case), "-o", str(tmp_path)]) == 0
    assert f"smoothed by {sigma} mm (column, row, slice)" in capsys.readouterr().out


def test_grey_edges_are_smoothed_less(tmp_path, capsys):
    """Frames in between whose edges say where they lie within a pixel: half the smoothing, and nearer to the ball."""
    z, y, x = np.mgrid[:29, :24, :24]
    distance = 8 - np.linalg.norm(((z - 14) / 2, y - 11.4, x - 11.7), axis=0)
    off = {}
    for name, values in (("grey", np.clip(distance + 0.5, 0, 1)), ("hard", distance > 0)):
        case = _placed(
            tmp_path, np.concatenate([values.astype(float), np.zeros((3, 24, 24))]), (1, 1, 2), 4, name
        )
        assert main(["-i", str(case), "-o", str(tmp_path)]) == 0
        said = capsys.readouterr().out
        assert (
            "smoothed by 0.35, 0.35, 0.35 mm" if name == "grey" else "smoothed by 0.7, 0.7, 0.7 mm"
        ) in said
        vertices = read_mesh(tmp_path / f"{name}.ply").vertices
        off[name] = np.abs(np.linalg.norm(vertices - (11.7, 11.4, 7), axis=1) - 8).mean()
    assert off["grey"] < 0.75 * off["hard"]


def test_millimetres_mean_millimetres_on_every_axis(tmp_path, capsys):
    """One block on three grids, smoothed by 2 mm, gives one surface: to a tenth of a millimetre on average.

    All grids have voxel borders where the block ends, so only the smoothing could make them differ. The
    third is the first, as 4 sub-frames of slices 4 mm apart.
    """
    meshes = []
    for number, (spacing, inter) in enumerate((((1, 1, 1), 1), ((0.5, 1, 2), 1), ((1, 1, 4), 4))):
        steps = np.array(spacing) / (1, 1, inter)
        places = [(np.arange(32 / step) + 0.5) * step for step in steps]
        column, row, slice_ = (((at > 8) & (at < 24)).astype(float) for at in places)
        case = _placed(
            tmp_path, np.einsum("i,j,k->ijk", slice_, row, column), spacing, inter, f"grid{number}"
        )
        assert main(["-i", str(case), "-o", str(tmp_path), "--smoothing", "2"]) == 0
        assert "smoothed by 2, 2, 2 mm" in capsys.readouterr().out
        mesh = read_mesh(tmp_path / f"grid{number}.ply")
        meshes.append(mesh.apply_translation(steps / 2))  # from voxel centres to the corner of the grid
    assert surface_scores(meshes[0], meshes[1], samples=3000).asd < 0.1
    assert surface_scores(meshes[0], meshes[2], samples=3000).hd < 1e-3


@pytest.mark.parametrize("format_", FORMATS)
def test_formats(tmp_path, format_):
    case = _placed(tmp_path, _round_frames())
    arguments = ["-i", str(case), "-o", str(tmp_path / "out"), "--quiet"]
    assert main(arguments) == 0 and main([*arguments, "--format", format_]) == 0
    expected, mesh = (read_mesh(tmp_path / "out" / f"case.{kind}") for kind in ("ply", format_))
    assert mesh.metadata == {"space": "LPS", "unit": "mm"}
    assert mesh.is_watertight and mesh.volume == pytest.approx(expected.volume, rel=1e-5)
    assert np.allclose(mesh.bounds, expected.bounds, atol=1e-4)


def test_slicer_finds_the_space_in_the_header(tmp_path):
    case = _placed(tmp_path, _round_frames())
    for space in ("lps", "ras"):
        for kind, start in (("ply", b"ply\n"), ("stl", b"SPACE="), ("obj", b"# SPACE=")):
            assert (
                main(["-i", str(case), "-o", str(tmp_path), "--format", kind, "--space", space, "--quiet"])
                == 0
            )
            head = (tmp_path / f"case.{kind}").read_bytes()[:80]
            assert head.startswith(start) and f"SPACE={space.upper()}".encode() in head


def test_open_leaves_the_caps_out_and_the_rest_as_it_is(tmp_path):
    """A column through all slices: the caps are two discs, the wall stays, and the volume is that of the closed one."""
    _, y, x = np.mgrid[:10, :24, :24]
    case = _placed(tmp_path, np.hypot(y - 11.5, x - 11.5) < 7, (1, 1, 2))
    meshes = []
    for extra in ([], ["--open"]):
        assert main(["-i", str(case), "-o", str(tmp_path), "--quiet", *extra]) == 0
        meshes.append(read_mesh(tmp_path / "case.ply"))
    closed, opened = meshes
    assert closed.is_watertight and not opened.is_watertight
    assert np.allclose(closed.bounds, opened.bounds) and closed.bounds[:, 2].tolist() == [-1, 19]
    assert opened.area == pytest.approx(2 * np.pi * 7 * 20, rel=0.03), (
        "steps of the circle, smoothed, add a little"
    )
    assert np.abs(opened.face_normals[:, 2]).max() < 1e-6, "no cap is left, nor its bevel"
    outwards = opened.triangles_center[:, :2] - 11.5
    assert ((opened.face_normals[:, :2] * outwards).sum(axis=1) > 0).all(), "and the wall faces outwards"


def test_largest_keeps_one_body_and_its_cavity(tmp_path):
    z, y, x = np.mgrid[:24, :24, :40]
    shell = (abs(z - 12) < 8) & (abs(y - 12) < 8) & (abs(x - 12) < 8)
    shell &= ~((abs(z - 12) < 4) & (abs(y - 12) < 4) & (abs(x - 12) < 4))
    crumb = np.linalg.norm((z - 12, y - 12, x - 32), axis=0) < 4
    case = _placed(tmp_path, shell | crumb, (1, 1, 1))
    for smoothing in ([], ["--smoothing", "none"]):
        assert main(["-i", str(case), "-o", str(tmp_path), "--largest", "--quiet", *smoothing]) == 0
        mesh = read_mesh(tmp_path / "case.ply")
        assert mesh.bounds[1, 0] < 21 and mesh.body_count == 2, "the wall's outside and inside"
        assert mesh.volume == pytest.approx(shell.sum(), rel=0.01 if not smoothing else 0.03)


def test_largest_drops_what_smoothing_took_off(tmp_path):
    """Two balls on a thread: one body of voxels, but two once the thread is smoothed away."""
    z, y, x = np.mgrid[:20, :20, :44]
    balls = [np.linalg.norm((z - 10, y - 10, x - at), axis=0) < radius for at, radius in ((11, 7), (34, 5))]
    case = _placed(tmp_path, balls[0] | balls[1] | ((z == 10) & (y == 10) & (x > 11) & (x < 34)), (1, 1, 1))
    bodies = []
    for extra in ([], ["--largest"]):
        assert main(["-i", str(case), "-o", str(tmp_path), "--smoothing", "1", "--quiet", *extra]) == 0
        bodies.append(read_mesh(tmp_path / "case.ply").body_count)
    assert bodies == [2, 1]


def test_decimate(tmp_path):
    pytest.importorskip("fast_simplification")
    case = _placed(tmp_path, _round_frames(28, 36, 12.0), (1, 1, 1))
    meshes = []
    for extra in ([], ["--decimate", "0.8"]):
        assert main(["-i", str(case), "-o", str(tmp_path), "--quiet", *extra]) == 0
        meshes.append(read_mesh(tmp_path / "case.ply"))
    full, simple = meshes
    assert len(simple.faces) == pytest.approx(0.2 * len(full.faces), rel=0.02)
    assert simple.is_watertight and simple.volume == pytest.approx(full.volume, rel=0.01)
    assert point_distances(np.asarray(simple.vertices), full).max() < 0.5


def test_label_maps(tmp_path, capsys):
    """Two organs in one stack: a mesh for each value, or for those asked for."""
    z, y, x = np.mgrid[:16, :24, :48]
    left, right = (np.linalg.norm((z - 8, y - 12, x - at), axis=0) < 6 for at in (12, 34))
    values = left * 3.0 + right * 200.0
    case = _placed(tmp_path, values / 255, (1, 1, 1))
    arguments = ["-i", str(case), "-o", str(tmp_path / "out"), "--smoothing", "none", "--quiet"]
    assert main([*arguments, "--labels"]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["case_200.ply", "case_3.ply"]
    for value, at in ((3, 12), (200, 34)):
        mesh = read_mesh(tmp_path / "out" / f"case_{value}.ply")
        assert np.allclose(mesh.bounds.mean(axis=0), (at, 12, 8)) and mesh.body_count == 1
    assert main([*arguments[:3], str(tmp_path / "one"), "--labels", "3", "--quiet"]) == 0
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["case_3.ply"]
    assert main([*arguments, "--labels", "3", "7"]) == 1
    assert "no pixel has the value 7: there are 0, 3, 200" in capsys.readouterr().err
    _write_frames(tmp_path / "grey", np.linspace(0, 1, 8 * 24 * 24).reshape(8, 24, 24))
    assert main(["-i", str(tmp_path / "grey"), "-o", str(tmp_path / "no"), "--labels"]) == 1
    assert "different values, so they are not label maps" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_a_preview_of_each_mesh(tmp_path):
    for name, frames in (("placed", _round_frames()), ("unplaced", _round_frames())):
        if name == "placed":
            _placed(tmp_path / "in", frames, name=name)
        else:
            _write_frames(tmp_path / "in" / name, frames)
    arguments = ["-i", str(tmp_path / "in"), "-o", str(tmp_path / "out"), "--space", "ras", "--jobs", "1"]
    assert main([*arguments, "--preview", "--quiet"]) == 0
    for name in ("placed", "unplaced"):
        picture = read_image(tmp_path / "out" / f"{name}.png")
        assert picture.shape[1] > 1000
        for panel in np.array_split(picture[200:500], 3, axis=1):
            assert panel.std() > 10, "a mesh in each of the three views"
        for panel in np.array_split(picture[700:1100].astype(int), 3, axis=1):
            orange = (panel[:, :, 0] > 200) & (panel[:, :, 2] < 150)
            assert orange.sum() > 100, "its outline on a slice and two cuts"


def test_the_outline_lies_on_the_mask_that_the_mesh_was_made_of(tmp_path, monkeypatch):
    """The outline on the middle slice and on both cuts spans what the mask spans there, to a pixel."""
    drawn = []
    monkeypatch.setattr(
        "pictures.shading.LineCollection",
        lambda ends, **looks: drawn.append(ends) or LineCollection(ends, **looks),
    )
    frames = _round_frames()
    _placed(tmp_path / "in", frames, name="case")
    images = np.linspace(0, 1, frames.size).reshape(frames.shape)
    _write_frames(tmp_path / "in" / "case" / "render_img", images, 1)
    assert (
        main(["-i", str(tmp_path / "in"), "-o", str(tmp_path / "out"), "--preview", "--quiet", "--jobs", "1"])
        == 0
    )
    for ends, mask in zip(drawn, (frames.max(0), frames.max(1), frames.max(2)), strict=True):
        _, columns = np.nonzero(mask >= 0.5)
        low, high = np.concatenate(ends).min(0), np.concatenate(ends).max(0)
        assert np.allclose([low[0], high[0]], [columns.min(), columns.max()], atol=1)
    stack = read_stack(tmp_path / "in" / "case")
    assert np.allclose(beside(tmp_path / "in" / "case", stack), images, atol=1 / 255)


def test_unevenly_spaced_slices_land_where_they_were_taken(tmp_path):
    """Slices at 0, 2, 3, 7, 9 and 10 mm: a block of the middle three reaches half-way to its neighbours."""
    positions = (0.0, 2.0, 3.0, 7.0, 9.0, 10.0)
    values = np.zeros((6, 8, 8))
    values[2:5, 2:6, 2:6] = 1
    _write_frames(tmp_path / "case" / "render_mask", values)
    geometry = Geometry(
        axes=(0, 1, 2),
        flips=(False, False),
        size=(8, 8),
        affine=((1.0, 0.0, 0.0, 0.0), (0.0, 1.0, 0.0, 0.0), (0.0, 0.0, 2.0, 5.0), (0.0, 0.0, 0.0, 1.0)),
        slices=tuple(range(6)),
        slice_count=6,
        positions=positions,
        window=(0.0, 1.0),
        bits=8,
        source="uneven",
    )
    geometry.save(tmp_path / "case" / FILE_NAME)
    arguments = ["-i", str(tmp_path / "case"), "-o", str(tmp_path), "--smoothing", "none", "--space", "ras"]
    assert main([*arguments, "--quiet"]) == 0
    assert read_mesh(tmp_path / "case.ply").bounds[:, 2].tolist() == pytest.approx([5 + 2.5, 5 + 9.5])
    stack = read_stack(tmp_path / "case")
    assert stack.volume(values > 0) == pytest.approx(16 * 7), "each slice counts half-way to its neighbours"


# ---- several cases ---------------------------------------------------------------------------------------------------


def test_cases_side_by_side_give_the_same_files(tmp_path, capsys):
    for name in ("a", "b", "c"):
        _placed(tmp_path / "in", _round_frames(radius=6.0 if name == "b" else 8.0), name=name)
    (tmp_path / "in" / "b" / "render_mask" / "00003_0.png").write_bytes(b"no image")
    for jobs in ("1", "2"):
        assert main(["-i", str(tmp_path / "in"), "-o", str(tmp_path / jobs), "--jobs", jobs]) == 1
    one, two = capsys.readouterr().out.split("a: 16 frames")[1:]
    assert one.replace(str(tmp_path / "1"), "") == two.replace(str(tmp_path / "2"), "")
    for name in ("a", "c"):
        assert (tmp_path / "1" / f"{name}.ply").read_bytes() == (tmp_path / "2" / f"{name}.ply").read_bytes()
    assert len(list((tmp_path / "2").iterdir())) == 2


def test_whatever_a_case_dies_of_the_others_are_done(tmp_path, capsys, monkeypatch):
    """A full disk, no memory, a bug: the case is named, and the next one goes on."""
    for name in "abcd":
        _write_frames(tmp_path / "in" / name, _round_frames())
    written = slices_to_ply.write_mesh
    raised = {
        "a": OSError(28, "No space left on device", "a.ply"),
        "b": MemoryError(),
        "c": RuntimeError("surprise"),
    }

    def failing(path, mesh):
        if path.stem in raised:
            raise raised[path.stem]
        written(path, mesh)

    monkeypatch.setattr(slices_to_ply, "write_mesh", failing)
    assert main(["-i", str(tmp_path / "in"), "-o", str(tmp_path / "out"), "--jobs", "1", "--quiet"]) == 1
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["d.ply"]
    text = capsys.readouterr().err
    for reason in ("a: No space left on device: a.ply", "b: out of memory", "c: RuntimeError: surprise"):
        assert f"slices_to_ply.py: failed: {reason}" in text
    assert "Traceback" in text, "a bug of ours keeps its traceback"


def test_a_killed_process_costs_its_case_alone(tmp_path, monkeypatch):
    """Process b is killed; its pool breaks, and unfinished cases are redone one at a time."""
    for name in "abc":
        _write_frames(tmp_path / name, _round_frames())
    options = slices_to_ply.parser().parse_args(["-i", "x", "-o", str(tmp_path / "out"), "--jobs", "2"])
    cases = [slices_to_ply.Case(name, tmp_path / name) for name in "abc"]
    monkeypatch.setattr(slices_to_ply, "_attempt", _die_on_b)
    outcomes = list(slices_to_ply._outcomes(cases, options))
    assert [outcome.failure for outcome in outcomes[::2]] == [None, None]
    assert "was killed" in outcomes[1].failure


def _die_on_b(case, options):
    if case.name == "b":
        os._exit(9)
    return slices_to_ply.Outcome(case, [])


def test_usage_errors(tmp_path):
    _write_frames(tmp_path / "case", _round_frames())
    (tmp_path / "file").touch()
    (tmp_path / "bare").mkdir()
    case, out = str(tmp_path / "case"), str(tmp_path / "out")
    for arguments, message in (
        (["-i", str(tmp_path / "none"), "-o", out], "is not a folder"),
        (["-i", str(tmp_path / "bare"), "-o", out], "has no .png frames"),
        (["-i", case, "-o", str(tmp_path / "file")], "is a file"),
        (["-i", case, "-o", out, "-n", str(tmp_path / "none")], "is not a folder"),
        (["-i", case, "-o", out, "--inter", "0"], "--inter"),
        (["-i", case, "-o", out, "--thresh", "300"], "--thresh"),
        (["-i", case, "-o", out, "--jobs", "0"], "--jobs"),
        (["-i", case, "-o", out, "--labels", "--thresh", "9"], "leave --thresh out"),
        (["-i", case, "-o", out, "--decimate", "1"], "not a fraction"),
        (["-i", case, "-o", out, "--format", "glb", "--space", "ras"], "GLB"),
        (["-i", case, "-o", out, "--format", "vtk"], "--format"),
        (["-i", case, "-o", out, "--smoothing", "much"], "neither millimetres"),
        (["-i", case, "-o", out, "--smoothing", "-1"], "neither millimetres|expected one argument"),
        (["-i", case, "-o", out, "--smoothing", "nan"], "neither millimetres"),
        (["-i", case], "-o/--output"),
    ):
        with pytest.raises(UserError, match=message):
            main(arguments)
    assert not Path(out).exists()
    done = subprocess.run(
        [sys.executable, ROOT / "slices_to_ply.py", "-i", "none", "-o", out],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 2
    assert (
        done.stderr.startswith("slices_to_ply.py: error: none is not a folder")
        and done.stderr.count("\n") == 1
    )


def test_a_missing_simplifier_is_named_before_anything_is_done(tmp_path, monkeypatch):
    _write_frames(tmp_path / "case", _round_frames())
    monkeypatch.setattr(slices_to_ply, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install fast-simplification"):
        main(["-i", str(tmp_path / "case"), "-o", str(tmp_path / "out"), "--decimate", "0.5"])
    assert not (tmp_path / "out").exists()


def test_a_model_without_renders(tmp_path):
    (tmp_path / "chkpnt10.pth").touch()
    with pytest.raises(UserError, match=r"run render\.py"):
        main(["-i", str(tmp_path), "-o", str(tmp_path / "out")])


# ---- which frames, of which case -------------------------------------------------------------------------------------


def _prepared(folder, shape=(12, 24, 24), radius=7.0, keep=()):
    """OUT of prepare.py with the masks of a ball, 2 mm per slice, made without it."""
    z, y, x = np.mgrid[: shape[0], : shape[1], : shape[2]]
    ball = np.linalg.norm((2 * (z - 5.5), y - 11.5, x - 11.5), axis=0) < radius
    for number, frame in enumerate(ball):
        if not keep or number in keep:
            write_image(folder / "seg" / "original" / f"{number:04d}.png", frame.astype(float))
    Geometry(
        axes=(0, 1, 2),
        flips=(False, False),
        size=(shape[2], shape[1]),
        affine=((-1.0, 0, 0, 0), (0, -1.0, 0, 0), (0, 0, 2.0, 0), (0, 0, 0, 1.0)),
        slices=tuple(range(shape[0])),
        slice_count=shape[0],
        positions=tuple(2.0 * k for k in range(shape[0])),
        window=(0.0, 1.0),
        bits=8,
        source="ball",
    ).save(folder / FILE_NAME)
    return ball


def test_every_level_of_a_case_is_that_case(tmp_path, capsys):
    """The folder of masks, those around it, and the parent of all: meshes are named by the case, and none is lost."""
    for name in ("a", "b"):
        _prepared(tmp_path / "data" / name)
    for number, below in enumerate(("", "a", "a/seg", "a/seg/original")):
        out = tmp_path / f"out{number}"
        assert main(["-i", str(tmp_path / "data" / below), "-o", str(out), "--quiet", "--jobs", "1"]) == 0
        assert sorted(path.name for path in out.iterdir()) == (["a.ply"] if below else ["a.ply", "b.ply"])
        assert (out / "a.ply").read_bytes() == (tmp_path / "out0" / "a.ply").read_bytes()
    assert read_mesh(out / "a.ply").metadata["unit"] == "mm"
    for name in ("a", "b"):
        assert (
            main(["-i", str(tmp_path / "data" / name / "seg" / "original"), "-o", str(tmp_path / "both")])
            == 0
        )
    assert len(list((tmp_path / "both").iterdir())) == 2
    with pytest.raises(UserError, match=r"but .*data has cases: give -i .*data"):
        main(["-i", str(tmp_path), "-o", str(tmp_path / "none")])
    model = tmp_path / "a model"
    model.mkdir()
    (model / "chkpnt10.pth").touch()
    with pytest.raises(UserError, match=r"python render\.py -m '.*/a model' --pipeline both"):
        main(["-i", str(model), "-o", str(tmp_path / "none")])


def test_a_folder_of_plain_masks_has_one_frame_per_slice(tmp_path, capsys):
    _write_frames(tmp_path / "case", _round_frames())
    assert main(["-i", str(tmp_path / "case"), "-o", str(tmp_path / "out")]) == 0
    assert "16 frames" in (said := capsys.readouterr().out) and "1 per slice" in said
    _write_frames(tmp_path / "other" / "render_mask", _round_frames())
    assert main(["-i", str(tmp_path / "other"), "-o", str(tmp_path / "out")]) == 0
    assert "8 per slice" in capsys.readouterr().out, "renders keep the published number"


def test_frames_behind_the_last_slice_are_not_meshed(tmp_path, capsys):
    """Renders of another program go on behind it, where nothing was seen: the mesh is as without them."""
    inter, values = 4, np.zeros((16, 20, 20))
    values[:, 5:15, 5:15] = 1
    values[13:] = 0
    values[13:, :, :] = np.random.default_rng(0).integers(0, 2, (3, 20, 20))
    with_them = _placed(tmp_path, values, (1, 1, 4), inter, "with")
    without = _placed(tmp_path, values, (1, 1, 4), inter, "without")
    for sub_frame in (1, 2, 3):
        (without / "render_mask" / f"00003_{sub_frame}.png").unlink()
    for case in (with_them, without):
        assert main(["-i", str(case), "-o", str(tmp_path)]) == 0
        assert ("3 behind the last slice are left out" in capsys.readouterr().out) == (case == with_them)
    meshes = [read_mesh(tmp_path / f"{name}.ply") for name in ("with", "without")]
    assert np.array_equal(meshes[0].vertices, meshes[1].vertices)
    assert meshes[0].volume == pytest.approx(13 * 100, rel=0.01)


def test_masks_older_than_the_images_beside_them_are_refused(tmp_path, capsys):
    case = _placed(tmp_path, _round_frames())
    _write_frames(case / "render_img", _round_frames(), 1)
    arguments = ["-i", str(case), "-o", str(tmp_path / "out"), "--quiet"]
    assert main(arguments) == 0
    for path in (case / "render_mask").iterdir():
        os.utime(path, (1000, 1000))
    assert main(arguments) == 1
    assert "render_mask is older than" in (said := capsys.readouterr().err) and "python render.py -m" in said
    (case / "chkpnt1.pth").touch()
    os.utime(case / "chkpnt1.pth", (900, 900))
    assert main(arguments) == 0, "rendered one after the other, from one model"


def test_masks_on_some_frames_lie_where_their_numbers_say(tmp_path):
    """Every second slice painted: the ball is as large, and where it was."""
    _prepared(tmp_path / "full")
    _prepared(tmp_path / "some", keep=(1, 3, 5, 7, 9))
    for name in ("full", "some"):
        assert main(["-i", str(tmp_path / name), "-o", str(tmp_path / "out"), "--quiet"]) == 0
    full, some = (read_mesh(tmp_path / "out" / f"{name}.ply") for name in ("full", "some"))
    assert some.bounds[:, 2] == pytest.approx(full.bounds[:, 2], abs=2) and some.volume == pytest.approx(
        full.volume, rel=0.1
    )


def _cubes():
    """Touching blocks of labels 1, 2 and 7 that meet along a line, 2 reaching the border of the stack."""
    numbers = np.zeros((12, 20, 24), np.uint8)
    numbers[3:9, 5:15, 4:12], numbers[3:12, 5:15, 12:20], numbers[1:3, 5:15, 4:20] = 1, 2, 7
    return numbers


@pytest.mark.parametrize("smoothing", [None, "none", "1.2"])
def test_neighbours_share_their_surface(tmp_path, smoothing):
    """No gap and no overlap: two meshes share the very same triangles, with opposite orientation."""
    numbers = _cubes()
    case = _placed(tmp_path, numbers / 255, (1, 1, 2))
    arguments = ["-i", str(case), "-o", str(tmp_path / "out"), "--quiet", "--labels", "--format", "obj"]
    assert main([*arguments, *(["--smoothing", smoothing] if smoothing else [])]) == 0
    meshes = {i: read_mesh(tmp_path / "out" / f"case_{i}.obj") for i in (1, 2, 7)}
    faces = {}
    for number, mesh in meshes.items():
        assert is_closed(mesh) and mesh.volume > 0
        if smoothing != "none":
            assert mesh.volume == pytest.approx(2 * (numbers == number).sum(), rel=0.01), number
        corners = np.round(mesh.triangles, 4)
        faces[number] = {frozenset(map(tuple, triangle)): triangle for triangle in corners}
    shared = {pair: faces[pair[0]].keys() & faces[pair[1]].keys() for pair in ((1, 2), (1, 7), (2, 7))}
    for (one, other), common in shared.items():
        assert len(common) > 50
        for corners in common:
            normals = [np.cross(*np.diff(faces[i][corners], axis=0)) for i in (one, other)]
            assert np.allclose(normals[0], -normals[1], atol=1e-6)
    together = sum(mesh.volume for mesh in meshes.values())
    between = set().union(*shared.values())
    hull = np.array([corners for own in faces.values() for key, corners in own.items() if key not in between])
    enclosed = np.einsum("ij,ij->i", hull[:, 0], np.cross(hull[:, 1], hull[:, 2])).sum() / 6
    assert enclosed == pytest.approx(together, rel=1e-4), "what is between them is enclosed once"


def test_meshes_of_labels_have_their_names_and_colours(tmp_path, capsys):
    """prepare.py's names become file names, and one scene holds all organs."""
    numbers = _cubes()
    affine = np.diag([-1.0, -1.0, 2.0, 1.0])
    for name, values in (("image", np.random.default_rng(0).random(numbers.shape)), ("label", numbers)):
        nibabel.save(nibabel.Nifti1Image(values.transpose(2, 1, 0), affine), tmp_path / f"{name}.nii.gz")
    (tmp_path / "names.csv").write_text(
        "id,name,colour\n1,liver,#ff0000\n2,left kidney,#00ff00\n7,spleen,#0000ff\n"
    )
    volumes = ["-i", str(tmp_path / "image.nii.gz"), "-l", str(tmp_path / "label.nii.gz")]
    names = ["--label_names", str(tmp_path / "names.csv"), "--labels", "all"]
    prepare.main([*volumes, *names, "-o", str(tmp_path / "case"), "--axis", "2", "--quiet"])
    out = tmp_path / "out"
    assert main(["-i", str(tmp_path / "case"), "-o", str(out)]) == 0
    written = ["case.glb", "case_left_kidney.ply", "case_liver.ply", "case_spleen.ply"]
    assert sorted(path.name for path in out.iterdir()) == written
    scene = trimesh.load_scene(out / "case.glb")
    assert set(scene.geometry) == {"liver", "left kidney", "spleen"}
    assert scene.geometry["liver"].visual.material.baseColorFactor[:3].tolist() == [255, 0, 0]
    liver = read_mesh(out / "case_liver.ply")
    assert liver.metadata == {"space": "LPS", "unit": "mm"}
    assert (
        main(
            ["-i", str(tmp_path / "case"), "-o", str(tmp_path / "one"), "--labels", "left kidney", "--quiet"]
        )
        == 0
    )
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == ["case.glb", "case_left_kidney.ply"]
    assert (tmp_path / "one" / written[1]).read_bytes() == (out / written[1]).read_bytes()
    assert (
        main(["-i", str(tmp_path / "case"), "-o", str(tmp_path / "no"), "--labels", "lung", "--quiet"]) == 1
    )
    assert "no pixel has the value lung: there are 0, 1, 2, 7" in capsys.readouterr().err


def test_mistyped_options_are_guessed(tmp_path):
    for word, meant in (
        ("--smoothin", "--smoothing"),
        ("--extention", "--extension"),
        ("--out-put", "--output"),
    ):
        with pytest.raises(UserError, match=f"did you mean {meant}\\?"):
            main(["-i", "x", "-o", "y", word, "z"])
    with pytest.raises(UserError, match=r"required: -o/--output: did you mean --output\?"):
        main(["-i", "x", "--ouput", "y"])
    with pytest.raises(UserError) as error:
        main(["-i", "x", "-o", "y", "--nothing_like_it"])
    assert "did you mean" not in str(error.value)
