"""slices_to_ply.py as a user runs it: masks in, closed meshes of the right size in the right place out."""

import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
from nibabel.affines import apply_affine
from skimage.filters import threshold_otsu

import prepare
from slices_to_ply import main
from utils.errors import UserError
from utils.geometry import swap_ras_lps
from utils.images import write_image
from utils.meshes import otsu, read_ply, signed_volume, surface, write_ply

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
        write_image(folder / f"{name}.png", frame)


def _round_frames(count=16, side=24, radius=8.0):
    z, y, x = np.mgrid[:count, :side, :side]
    return ((z - count / 2) ** 2 + (y - side / 2) ** 2 + (x - side / 2) ** 2 < radius**2).astype(float)


def _is_closed(triangles):
    """Every directed edge has exactly one twin that runs the other way: closed, and consistently wound."""
    edges = np.concatenate([triangles[:, [0, 1]], triangles[:, [1, 2]], triangles[:, [2, 0]]]).astype(
        np.int64
    )
    keys, twins = edges @ [2**31, 1], edges @ [1, 2**31]
    return len(np.unique(keys)) == len(keys) and np.array_equal(np.sort(keys), np.sort(twins))


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
    vertices, triangles, comments = read_ply(tmp_path / "out" / "case.ply")
    assert f"SPACE={space.upper()}" in comments
    if space == "lps":
        vertices = swap_ras_lps(vertices)
    assert _is_closed(triangles)
    expected = ball.sum() * np.prod(SPACING)
    assert signed_volume(vertices, triangles) == pytest.approx(
        expected, rel=0.03
    )  # positive: triangles face outwards
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
    vertices, triangles, _ = read_ply(tmp_path / "case.ply")
    assert np.abs((vertices.min(0) + vertices.max(0)) / 2 - centre).max() < 0.08
    # Many sub-frames leave the voxels' corners in the plane alone: 3 % as above.
    assert signed_volume(vertices, triangles) == pytest.approx(
        fine.sum() * np.prod(SPACING) / inter, rel=0.03
    )


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
    assert main([*arguments, "--quiet"]) == 0
    vertices, triangles, _ = read_ply(tmp_path / "out" / "case.ply")
    assert _is_closed(triangles)
    assert np.abs((vertices.min(0) + vertices.max(0)) / 2 - centre).max() < 0.15
    assert signed_volume(vertices, triangles) == pytest.approx(4 / 3 * np.pi * 16**3, rel=0.1)


def test_a_mask_that_touches_the_border_is_closed_half_a_voxel_outside():
    """All of a block but its first frame: faces lie between voxels, so the volume is a count, less cut edges."""
    values = np.ones((5, 6, 7), np.float32)
    values[0] = 0
    vertices, triangles = surface(values, 0.5)
    assert _is_closed(triangles)
    assert vertices.min(0).tolist() == [-0.5, -0.5, 0.5] and vertices.max(0).tolist() == [6.5, 5.5, 4.5]
    # The 12 edges are bevelled by triangles of area 1/8, the 8 corners by a little more: at most all lengths / 8.
    assert 4 * 6 * 7 - 4 * (4 + 6 + 7) / 8 <= signed_volume(vertices, triangles) < 4 * 6 * 7


def test_caps_do_not_depend_on_how_bright_the_object_is():
    _, y, x = np.mgrid[:6, :9, :9].astype(np.float32)
    values = np.clip(3.5 - np.hypot(y - 4, x - 4), 0, 1)
    boxes = []
    for brightness in (0.6, 1.0):
        vertices, triangles = surface(values * brightness, 0.3)
        assert _is_closed(triangles)
        boxes.append((vertices[:, 2].min(), vertices[:, 2].max()))
    assert np.allclose(boxes, (-0.5, 5.5), atol=1e-3)  # values at the level are moved by 1e-4 of the range


@pytest.mark.parametrize("handedness", [1, -1])
def test_triangles_face_outwards_in_either_handedness(handedness):
    affine = np.diag([handedness * 2.0, 1.0, 3.0, 1.0])
    values = _round_frames().astype(np.float32)
    vertices, triangles = surface(values, 0.5, affine)
    assert signed_volume(vertices, triangles) == pytest.approx(values.sum() * 6, rel=0.03)


def test_values_that_equal_the_level_leave_the_mesh_closed():
    values = np.random.default_rng(0).integers(0, 3, (8, 8, 8)).astype(np.float32) / 2
    for level in (0.5, 1.0):
        _, triangles = surface(values, level)
        assert _is_closed(triangles)


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


def test_the_level(tmp_path):
    """A ball of grey 0.4 in a haze of 0.2: a level above, between and below."""
    frames = _round_frames() * 0.2 + 0.2
    _write_frames(tmp_path / "case", frames)
    arguments = ["-i", str(tmp_path / "case"), "-o", str(tmp_path / "out"), "--smoothing", "none", "--quiet"]
    volumes = {}
    for thresh in ("0", "76.5", "25"):
        assert main([*arguments, "--thresh", thresh]) == 0
        volumes[thresh] = signed_volume(*read_ply(tmp_path / "out" / "case.ply")[:2])
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
        vertices, triangles, comments = read_ply(tmp_path / extension / "case.ply")
        assert signed_volume(vertices, triangles) == pytest.approx(frames.sum(), rel=0.03)
        assert comments == ["units are voxels"]


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
    assert main([*arguments, "--smoothing", "none", "--quiet"]) == 1
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


def test_ply_round_trip(tmp_path):
    vertices, triangles = surface(_round_frames().astype(np.float32), 0.5)
    write_ply(tmp_path / "a.ply", vertices, triangles, ["SPACE=LPS"])
    back = read_ply(tmp_path / "a.ply")
    assert (
        np.abs(back[0] - vertices).max() < 1e-5
        and np.array_equal(back[1], triangles)
        and back[2] == ["SPACE=LPS"]
    )
    with pytest.raises(UserError, match="does not exist"):
        read_ply(tmp_path / "b.ply")
    for content in (b"", b"ply", b"hello\n", (tmp_path / "a.ply").read_bytes()[:-5]):
        (tmp_path / "b.ply").write_bytes(content)
        with pytest.raises(UserError, match="not a PLY file"):
            read_ply(tmp_path / "b.ply")
