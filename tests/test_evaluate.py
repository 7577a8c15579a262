"""evaluate.py as a user runs it: rows per case, mean and deviation, and what it refuses to compare."""

import csv
import dataclasses
import json
import subprocess
import sys
import types
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
import trimesh

import evaluate
import prepare
import utils.lpips
from evaluate import main
from patient.meshes import in_space, surface, write_mesh
from utils.errors import UserError
from utils.images import image_files, read_image, write_image

ROOT = Path(__file__).resolve().parent.parent
AFFINE = np.array([[-1.0, 0, 0, 30], [0, -1.0, 0, 20], [0, 0, 2.5, -10], [0, 0, 0, 1]])


def _ball(radius=6.0, shape=(10, 20, 24), shift=0.0):
    """(frame, row, column) float32, 2.5 mm per frame."""
    z, y, x = np.meshgrid(*map(np.arange, shape), indexing="ij")
    return (np.linalg.norm((2.5 * (z - 4.5), y - 9.5, x - 11.5 - shift), axis=0) < radius).astype(np.float32)


def _write(folder, frames, names=None):
    for number, frame in enumerate(frames):
        write_image(folder / f"{names[number] if names else f'{number:04d}'}.png", frame.astype(float))
    return folder


def _volume(path, frames, affine=AFFINE):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(frames.T.astype(np.uint8), affine), path)
    return path


def _mesh(path, frames, space="LPS"):
    mesh = surface(frames, 0.5, AFFINE)
    write_mesh(path, in_space(mesh, space) if space else mesh)
    return path


def _results(tmp_path, *arguments, status=0):
    words = [
        *map(str, arguments),
        "--json",
        str(tmp_path / "s.json"),
        "--csv",
        str(tmp_path / "s.csv"),
        "--quiet",
    ]
    assert main(words) == status
    return json.loads((tmp_path / "s.json").read_text())


# ---- frames ----------------------------------------------------------------------------------------------------------


def test_frames(tmp_path):
    truth = np.random.default_rng(0).uniform(0.2, 0.7, (4, 12, 16))
    _write(tmp_path / "truth", truth)
    _write(tmp_path / "render", truth + 0.1)
    row = _results(tmp_path, "frames", tmp_path / "render", tmp_path / "truth")["rows"][0]
    assert row["frames"] == 4
    assert row["psnr"] == pytest.approx(20, abs=0.15)  # 0.1 off, rounded to 8 bits twice
    assert 0.7 < row["ssim"] < 1


def test_colours_and_grey(tmp_path):
    colours = np.random.default_rng(0).uniform(0.2, 0.7, (2, 12, 16, 3))
    _write(tmp_path / "colours", colours)
    _write(tmp_path / "grey", colours.mean(axis=3))
    same = _results(tmp_path, "frames", tmp_path / "colours", tmp_path / "colours")["rows"][0]
    assert same["psnr"] == pytest.approx(100)
    mixed = _results(tmp_path, "frames", tmp_path / "grey", tmp_path / "colours")["rows"][0]
    assert mixed["psnr"] > 50, "compared as grey: rounding alone is left"


def _held_out_case(tmp_path):
    """OUT of prepare.py --keep_every 2, and a model whose frames are exact, and those between 0.1 too bright."""
    rng = np.random.default_rng(0)
    _volume(tmp_path / "v.nii.gz", rng.integers(20, 200, (9, 12, 16)))
    out = tmp_path / "out"
    arguments = [
        "-i",
        str(tmp_path / "v.nii.gz"),
        "-o",
        str(out),
        "--keep_every",
        "2",
        "--axis",
        "2",
        "--quiet",
    ]
    prepare.main(arguments)
    frames = {2 * number: path for number, path in enumerate(image_files(out / "img" / "original"))}
    frames |= {int(path.stem): path for path in image_files(out / "img" / "heldout")}
    for slice_, path in frames.items():
        name = f"{slice_ // 2:05d}_{slice_ % 2}.png"
        image = read_image(path) / np.iinfo(read_image(path).dtype).max
        write_image(tmp_path / "model" / "render_img" / name, image + 0.1 * (slice_ % 2), 16)
    write_image(
        tmp_path / "model" / "render_img" / "00004_1.png", np.zeros((12, 16)), 16
    )  # beyond the last frame
    return out, tmp_path / "model", [frames[slice_] for slice_ in range(9)]


def test_held_out_frames_by_what_frames_json_says(tmp_path):
    out, model, _ = _held_out_case(tmp_path)
    (model / "frames.json").write_bytes((out / "frames.json").read_bytes())
    every = _results(tmp_path, "frames", model, out)["rows"][0]
    assert (every["case"], every["frames"]) == ("model", 9)
    held_out = _results(tmp_path, "frames", model, out, "--held_out")["rows"][0]
    assert held_out["frames"] == 4
    assert held_out["psnr"] == pytest.approx(20, abs=1.5)  # bright pixels are clamped at 1
    assert every["psnr"] == pytest.approx((4 * held_out["psnr"] + 5 * 100) / 9, abs=1)
    assert _results(tmp_path, "frames", model, out / "img" / "heldout", "--held_out")["rows"][0] == held_out


def test_held_out_frames_by_keep_every(tmp_path):
    out, model, files = _held_out_case(tmp_path)
    expected = None
    (tmp_path / "all").mkdir()
    for number, path in enumerate(files):
        (tmp_path / "all" / f"{number:04d}.png").write_bytes(path.read_bytes())
    with pytest.raises(UserError, match="which were trained on with --keep_every N"):
        main(["frames", str(model), str(tmp_path / "all")])
    row = _results(tmp_path, "frames", model, tmp_path / "all", "--keep_every", 2, "--held_out")["rows"][0]
    assert row["frames"] == 4
    (model / "frames.json").write_bytes((out / "frames.json").read_bytes())
    expected = _results(tmp_path, "frames", model, out, "--held_out")["rows"][0]
    assert row == expected


def test_lpips_is_named_where_it_is_missing(tmp_path, monkeypatch, capsys):
    _write(tmp_path / "a", np.full((2, 8, 8), 0.5))
    arguments = ["frames", str(tmp_path / "a"), str(tmp_path / "a")]
    for missing in ("torchvision", "lpips"):
        monkeypatch.setattr(
            utils.lpips, "find_spec", lambda name, missing=missing: None if name == missing else name
        )
        assert main(arguments) == 0
        assert f"lpips: left out: {missing} is not installed" in capsys.readouterr().out
    monkeypatch.setattr(utils.lpips, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    assert main(arguments) == 0
    assert "weights are not at" in capsys.readouterr().out


def test_lpips_is_a_column_where_it_is_there(tmp_path, monkeypatch):
    """A stand-in for the network: the mean difference, called as lpips expects (three channels, [0, 1])."""

    class Network:
        def __init__(self, net, verbose):
            assert net == "alex"

        def eval(self):
            return self

        def __call__(self, a, b, normalize):
            assert a.shape == b.shape == (1, 3, 8, 8) and normalize
            return (a - b).abs().mean()

    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=Network))
    monkeypatch.setattr(utils.lpips, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    weights = tmp_path / "hub" / "checkpoints" / utils.lpips.WEIGHTS
    weights.parent.mkdir(parents=True)
    weights.touch()
    _write(tmp_path / "a", np.full((2, 8, 8), 0.2))
    _write(tmp_path / "b", np.full((2, 8, 8), 0.6))
    row = _results(tmp_path, "frames", tmp_path / "a", tmp_path / "b")["rows"][0]
    assert row["lpips"] == pytest.approx(0.4, abs=1e-3)


# ---- masks -----------------------------------------------------------------------------------------------------------


def test_masks_by_hand(tmp_path):
    truth = np.zeros((2, 4, 8))
    truth[0, :2] = 1  # 16 pixels
    predicted = np.zeros((2, 4, 8))
    predicted[0, 1:3] = 0.6  # 8 of them, and 8 others
    predicted[1, 0, 0] = 0.4  # under one half
    _write(tmp_path / "truth", truth)
    _write(tmp_path / "predicted", predicted)
    row = _results(tmp_path, "masks", tmp_path / "predicted", tmp_path / "truth")["rows"][0]
    assert row["dice"] == pytest.approx(2 * 8 / 32) and row["iou"] == pytest.approx(8 / 24)


@pytest.mark.parametrize("axis", ["0", "1", "2"])
def test_masks_against_a_label_volume_on_any_axis(tmp_path, axis):
    """prepare.py turns and crops frames; frames.json tells how, so the same label is found again."""
    frames = _ball(shift=2.0).astype(np.uint8) * 3
    frames[4, 5, 5] = 7
    label = _volume(tmp_path / "label.nii.gz", frames)
    for extra in ([], ["--crop", "2"], ["--keep_every", "2"]):
        arguments = [
            "-i",
            str(label),
            "-l",
            str(label),
            "-o",
            str(tmp_path / "out"),
            "--axis",
            axis,
            "--force",
        ]
        prepare.main([*arguments, "--label_value", "3", "--quiet", *extra])
        row = _results(tmp_path, "masks", tmp_path / "out" / "seg" / "original", label, "--label_value", 3)[
            "rows"
        ][0]
        assert row["dice"] == 1 and row["case"] == "out", extra
        worse = _results(tmp_path, "masks", tmp_path / "out" / "seg" / "original", label)["rows"][0]
        assert worse["dice"] < 1 or extra, "the other label counts too"


def test_masks_of_volumes(tmp_path):
    first, second = _volume(tmp_path / "a.nii.gz", _ball()), _volume(tmp_path / "b.nii.gz", _ball(shift=1.0))
    row = _results(tmp_path, "masks", first, second)["rows"][0]
    both = (_ball() * _ball(shift=1.0)).sum()
    assert row["dice"] == pytest.approx(2 * both / (_ball().sum() + _ball(shift=1.0).sum()))
    for other, message in (
        (_volume(tmp_path / "c.nii.gz", _ball()[:8]), "resample"),
        (_volume(tmp_path / "d.nii.gz", _ball(), AFFINE @ np.diag([1, 1, 1.1, 1])), "different grids"),
        (_volume(tmp_path / "e.nii.gz", _ball() * 0), "is empty"),
    ):
        with pytest.raises(UserError, match=message):
            main(["masks", str(first), str(other)])
    for flag in (["--held_out"], ["--keep_every", "2"]):
        with pytest.raises(UserError, match="for renders, not for volumes"):
            main(["masks", str(first), str(second), *flag])
    with pytest.raises(UserError, match="has to be one too"):
        main(["masks", str(first), str(_write(tmp_path / "folder", _ball()))])


# ---- meshes ----------------------------------------------------------------------------------------------------------


def test_a_mesh_of_the_label_is_right_in_every_space(tmp_path):
    """Against the label volume, a mesh, and masks with their geometry: the same surface, whatever a file's space."""
    label = _volume(tmp_path / "label.nii.gz", _ball())
    prepare.main(["-i", str(label), "-l", str(label), "-o", str(tmp_path / "out"), "--axis", "2", "--quiet"])
    other = _mesh(tmp_path / "other.stl", _ball(), "RAS")
    for space in ("LPS", "RAS"):
        mesh = _mesh(tmp_path / f"{space}.ply", _ball(), space)
        for reference in (label, tmp_path / "out", other):
            row = _results(tmp_path, "meshes", mesh, reference, "--samples", 2000)["rows"][0]
            assert row["unit"] == "mm" and row["hd"] < 1e-4


def test_a_shift_is_measured_and_only_forgiven_when_asked(tmp_path):
    mesh = in_space(surface(_ball(), 0.5, AFFINE), "LPS")
    write_mesh(tmp_path / "right.ply", mesh)
    mesh.apply_translation((0, 0, 2))
    write_mesh(tmp_path / "off.ply", mesh)
    files = tmp_path / "off.ply", tmp_path / "right.ply"
    plain = _results(tmp_path, "meshes", *files, "--samples", 2000)
    assert plain["rows"][0]["hd"] == pytest.approx(2, abs=0.01) and "align" not in plain["rows"][0]
    assert plain["settings"]["alignment"].startswith("none")
    aligned = _results(tmp_path, "meshes", *files, "--samples", 2000, "--align", "icp")
    row = aligned["rows"][0]
    assert row["asd"] < 0.3 * plain["rows"][0]["asd"]
    assert row["align"] == "icp" and row["shift"] == pytest.approx(2, abs=0.3)
    assert np.array(row["matrix"]).shape == (4, 4) and aligned["settings"]["alignment"].startswith("icp")
    header = next(csv.reader((tmp_path / "s.csv").open()))
    assert "align" in header and "matrix" not in header


def test_points_are_drawn_by_their_seed(tmp_path):
    mesh = _mesh(tmp_path / "a.ply", _ball(), "LPS")
    larger = in_space(surface(_ball(), 0.5, AFFINE), "LPS").apply_scale(1.1)
    write_mesh(tmp_path / "b.ply", larger)

    def asd(*extra):
        return _results(tmp_path, "meshes", mesh, tmp_path / "b.ply", "--samples", 200, *extra)["rows"][0][
            "asd"
        ]

    assert asd() == asd("--seed", 0) != asd("--seed", 1) == pytest.approx(asd(), rel=0.2)


def test_a_space_that_nobody_tells_is_asked_for(tmp_path):
    label = _volume(tmp_path / "label.nii.gz", _ball())
    mesh = in_space(surface(_ball(), 0.5, AFFINE), "LPS")
    trimesh.Trimesh(mesh.vertices, mesh.faces).export(tmp_path / "bare.ply")
    with pytest.raises(UserError, match=r"bare.ply does not say whether it is LPS or RAS"):
        main(["meshes", str(tmp_path / "bare.ply"), str(label)])
    scores = {}
    for space in ("lps", "ras"):
        arguments = ("meshes", tmp_path / "bare.ply", label, "--samples", 500, "--space", space)
        scores[space] = _results(tmp_path, *arguments)["rows"][0]["asd"]
    assert scores["lps"] < 1e-4 and scores["ras"] > 20


def test_a_label_of_unevenly_spaced_slices_is_placed_slice_by_slice(tmp_path, monkeypatch):
    """As can occur in a DICOM series: the last two slices are twice as far apart."""
    depths = np.array([0.0, 1, 2, 3, 4, 5, 6, 7, 8, 10])
    label = _volume(tmp_path / "label.nii.gz", np.ones((10, 20, 24)))
    volume = dataclasses.replace(evaluate.read_volume(label), depths=depths)
    monkeypatch.setattr(evaluate, "read_volume", lambda path: volume)
    mesh = surface(np.ones((10, 20, 24), np.float32), 0.5, AFFINE, depths)
    assert mesh.extents[2] == pytest.approx(2.5 * (0.5 + 10 + 1))  # half a slice beyond either end
    write_mesh(tmp_path / "mesh.ply", mesh)
    row = _results(tmp_path, "meshes", tmp_path / "mesh.ply", label, "--samples", 500)["rows"][0]
    assert row["hd"] < 1e-4


def test_voxels_and_millimetres_are_not_compared(tmp_path):
    write_mesh(tmp_path / "voxels.ply", surface(_ball(), 0.5))
    with pytest.raises(UserError, match=r"voxels\.ply is in voxels, the other in millimetres"):
        main(["meshes", str(tmp_path / "voxels.ply"), str(_mesh(tmp_path / "mm.ply", _ball()))])
    masks = _write(tmp_path / "masks", _ball())  # without geometry
    row = _results(tmp_path, "meshes", tmp_path / "voxels.ply", masks, "--samples", 500)["rows"][0]
    assert row["unit"] == "voxels" and row["hd"] < 1e-4


# ---- many cases, and their table -------------------------------------------------------------------------------------


def test_many_cases(tmp_path, capsys):
    """Two cases off by 1 and 2 mm: mean 1.5, deviation 0.71; a third without reference, a fourth without prediction."""
    for name, off in (("a", 1.0), ("b", 2.0), ("c", 0.0)):
        mesh = in_space(surface(_ball(), 0.5, AFFINE), "LPS")
        write_mesh(tmp_path / "meshes" / f"{name}.ply", mesh.apply_translation((0, 0, off)))
    for name in ("a", "b", "d"):
        _volume(tmp_path / "truth" / f"{name}.nii.gz", _ball())
    results = _results(
        tmp_path, "meshes", tmp_path / "meshes", tmp_path / "truth", "--samples", 1000, status=1
    )
    assert [row["case"] for row in results["rows"]] == ["a", "b"]
    mean, deviation = results["summary"]
    assert mean["hd"] == pytest.approx(1.5, abs=0.02) and deviation["hd"] == pytest.approx(
        np.sqrt(0.5), abs=0.02
    )
    assert results["failed"].keys() == {"c", "d"}
    assert "no reference of that name" in results["failed"]["c"]
    assert "no prediction of that name" in results["failed"]["d"]
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[2].strip() for line in lines] == ["c", "d"]
    with (tmp_path / "s.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["case"] for row in table] == ["a", "b", "mean", "deviation"]
    assert float(table[1]["hd"]) == results["rows"][1]["hd"]

    assert main(["meshes", str(tmp_path / "meshes"), str(tmp_path / "truth"), "--samples", "100"]) == 1
    screen = capsys.readouterr().out
    assert screen.splitlines()[0].split()[:4] == ["case", "unit", "chamfer", "asd"]
    assert "deviation" in screen and "100 drawn by area on each surface, seed 0" in screen


def test_cases_of_frames_and_masks(tmp_path):
    for name in ("a", "b"):
        _write(tmp_path / "models" / name / "render_mask", _ball(), [f"{k:05d}_0" for k in range(10)])
        _write(tmp_path / "truth" / name / "seg" / "original", _ball())
        _write(tmp_path / "truth" / name / "img" / "original", _ball())
    (tmp_path / "models" / "plots").mkdir()
    for what, models in (("masks", tmp_path / "models"), ("frames", tmp_path / "truth")):
        if what == "frames":
            models = tmp_path / "images"
            for name in ("a", "b"):
                _write(models / name / "render_img", _ball(), [f"{k:05d}_0" for k in range(10)])
        results = _results(tmp_path, what, models, tmp_path / "truth")
        assert [row["case"] for row in results["rows"]] == ["a", "b"] and not results["failed"]
    one = _results(tmp_path, "masks", tmp_path / "models" / "b", tmp_path / "truth")
    assert [row["case"] for row in one["rows"]] == ["b"], "one case finds its reference by name"


def test_a_bad_case_leaves_the_others(tmp_path):
    for name in ("a", "b"):
        _mesh(tmp_path / "meshes" / f"{name}.ply", _ball())
        _volume(tmp_path / "truth" / f"{name}.nii.gz", _ball())
    (tmp_path / "meshes" / "b.ply").write_bytes(b"ply")
    results = _results(
        tmp_path, "meshes", tmp_path / "meshes", tmp_path / "truth", "--samples", 100, status=1
    )
    assert [row["case"] for row in results["rows"]] == ["a"] and "not a PLY file" in results["failed"]["b"]


def test_refusals(tmp_path):
    frames = _write(tmp_path / "frames", _ball())
    small = _write(tmp_path / "small", _ball()[:, :8])
    label = _volume(tmp_path / "label.nii.gz", _ball())
    mesh = _mesh(tmp_path / "mesh.ply", _ball())
    (tmp_path / "bare").mkdir()
    _write(tmp_path / "short", _ball()[:4])
    _write(tmp_path / "unnumbered", _ball()[:1], ["frame"])
    for name in ("x.ply", "x.stl"):
        _mesh(tmp_path / "twice" / name, _ball())
    for arguments, message in (
        ([], "required"),
        (["volumes", frames, frames], "invalid choice"),
        (["frames", frames], "REF"),
        (["frames", tmp_path / "none", frames], "does not exist"),
        (["frames", frames, tmp_path / "none"], "does not exist"),
        (["frames", tmp_path / "bare", frames], "no frames to score"),
        (["frames", frames, tmp_path / "bare"], "is no reference for frames, and has none named frames"),
        (["frames", frames, small], "differ in size: 24 x 20 and 24 x 8"),
        (["masks", frames, small], "24 x 8"),
        (["frames", frames, tmp_path / "short"], "has no frame 4"),
        (["frames", tmp_path / "unnumbered", frames], "no number in its name"),
        (["frames", frames, frames, "--keep_every", "0"], "--keep_every: 0 is not a positive"),
        (["frames", frames, frames, "--held_out"], "no frame that was held out"),
        (["frames", frames, label], "no images"),
        (["masks", small, label], "slice 0 of 24 x 8 pixels, is not of"),
        (["meshes", frames, mesh], "no meshes to score"),
        (["meshes", mesh, mesh, "--samples", "0"], "--samples: 0 is not a positive"),
        (["meshes", mesh, _volume(tmp_path / "empty.nii.gz", _ball() * 0)], "is empty"),
        (["meshes", mesh, label, "--label_value", "9"], r"it holds 0, 1"),
        (["meshes", tmp_path / "twice", tmp_path / "twice"], "both named x"),
        (["meshes", mesh.parent, label], "is one file: give a folder"),
        (["meshes", mesh, mesh, "--json", tmp_path], "is a folder"),
        (["meshes", mesh, mesh, "--align", "scale"], "--align"),
    ):
        with pytest.raises(UserError, match=message):
            main([*map(str, arguments), *(["--quiet"] if arguments else [])])
    done = subprocess.run(
        [sys.executable, ROOT / "evaluate.py", "meshes", "none.ply", mesh], capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr == "evaluate.py: error: none.ply does not exist\n"
