"""interpolate.py, as a user calls it: dense volumes and folders, where they lie, what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
from sequences import BriefInBetween

import interpolate
import prepare
import slices_to_ply
from patient.meshes import read_mesh
from utils.errors import UserError
from utils.images import read_image

ROOT = Path(__file__).resolve().parents[1]
AFFINE = np.array([[-2.0, 0, 0, 10], [0, 2, 0, -20], [0, 0, 6, 5], [0, 0, 0, 1]])
SHAPE = (30, 26, 9)


def rod(k: np.ndarray) -> np.ndarray:
    """A soft rod of 6 px radius that leans by 1.5 px per slice, on a tilted ground, at slices k: some -400 to 500."""
    i, j = np.mgrid[: SHAPE[0], : SHAPE[1]]
    away = np.hypot(i[..., None] - 10 - 1.5 * k, j[..., None] - 13)
    return -400 + 5 * j[..., None] + 700 / (1 + np.exp(away - 6))


def save(path: Path, values: np.ndarray) -> str:
    nibabel.save(nibabel.Nifti1Image(values, AFFINE), path)
    return str(path)


@pytest.fixture
def case(tmp_path: Path) -> tuple[str, str]:
    values = np.rint(rod(np.arange(9.0))).astype(np.int16)
    values[1:5, 1:5, :] = 3000  # a pin far beyond the rest: it is not cut off
    return (
        save(tmp_path / "v.nii.gz", values),
        save(tmp_path / "l.nii.gz", (rod(np.arange(9.0)) > 0).astype(np.uint8)),
    )


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpolate, "InBetween", BriefInBetween)


@pytest.mark.parametrize("method", interpolate.METHODS)
def test_a_dense_volume_holds_the_slices_in_their_place(tmp_path, case, method):
    out = tmp_path / "dense.nii.gz"
    arguments = ["-i", case[0], "-l", case[1], "--interp", "4", "-o", str(out), "--method", method, "--quiet"]
    assert interpolate.main(arguments) == 0
    dense, source = nibabel.load(out), nibabel.load(case[0])
    assert dense.shape == (30, 26, 33)
    np.testing.assert_allclose(dense.affine, AFFINE @ np.diag([1, 1, 0.25, 1]), atol=1e-4)
    # The slices themselves are reproduced, in steps of 1/65535 of the range of 3400.
    np.testing.assert_allclose(dense.get_fdata()[..., ::4], source.get_fdata(), atol=0.06)
    assert dense.get_fdata()[2:4, 2:4].min() > 2900
    masks = nibabel.load(tmp_path / "dense_mask.nii.gz")
    assert np.array_equal(np.asarray(masks.dataobj)[..., ::4], np.asarray(nibabel.load(case[1]).dataobj))
    assert masks.get_data_dtype() == np.uint8 and set(np.unique(np.asarray(masks.dataobj))) == {0, 1}


class MotionAlone(BriefInBetween):
    """Without a network that has learned nothing."""

    settings_of_tests = replace(
        BriefInBetween.settings_of_tests,
        rows=replace(BriefInBetween.settings_of_tests.rows, share=0.0, excess=0.0),
    )


def test_motion_beats_blending_between_the_slices(tmp_path, case, monkeypatch):
    """Of the rod, which is known everywhere."""
    monkeypatch.setattr(interpolate, "InBetween", MotionAlone)
    at = np.arange(33) / 4
    truth, inside, between = rod(at), rod(at) > 0, np.arange(33) % 4 > 0
    errors, misses = {}, {}
    for method in ("motion", "linear"):
        out = tmp_path / f"{method}.nii.gz"
        interpolate.main(["-i", case[0], "-l", case[1], "-o", str(out), "--method", method, "--quiet"])
        found = nibabel.load(out).get_fdata()
        wrong = np.square(found - truth)[..., between]
        wrong[:6, :6] = 0
        errors[method] = wrong.mean()
        mask = np.asarray(nibabel.load(tmp_path / f"{method}_mask.nii.gz").dataobj)
        misses[method] = ((mask > 0) != inside)[..., between].sum()
    assert errors["motion"] < 0.5 * errors["linear"]
    assert misses["motion"] < misses["linear"]


def sharp(k: np.ndarray) -> np.ndarray:
    return np.clip(10 * rod(k), -400, 500)


def test_thick_slices_are_made_thin(tmp_path):
    """Slices that are means over the 6 mm between them: told so, it comes closer to what lies in them, at the slices'
    own places too, and the means of what it makes are the slices. Not told, it returns the slices."""
    fine = sharp(np.arange(-0.5 + 1 / 16, 8.5, 1 / 8))
    values = fine.reshape(*SHAPE[:2], 9, 8).mean(3)
    source = save(tmp_path / "v.nii.gz", values.astype(np.float32))
    at, errors, deviations = np.arange(33) / 4, {}, {}
    for name, words in {"thin": ["--slice_thickness", "6"], "thick": []}.items():
        out = tmp_path / f"{name}.nii.gz"
        interpolate.main(["-i", source, "-o", str(out), "--quiet", *words])
        found = nibabel.load(out).get_fdata()
        errors[name] = np.square(found - sharp(at)).mean((0, 1))
        shares = np.array([0.5, 1, 1, 1, 0.5]) / 4
        means = np.stack([found[..., 4 * k - 2 : 4 * k + 3] @ shares for k in range(1, 8)], -1)
        deviations[name] = np.abs(means - values[..., 1:8]).mean()
    assert deviations["thin"] < 0.5 * deviations["thick"]  # not 0, as black and white are never exceeded
    assert errors["thin"][4:-4:4].mean() < 0.8 * errors["thick"][4:-4:4].mean()
    assert errors["thin"][4:-4].mean() < errors["thick"][4:-4].mean()
    for words in (["--slice_thickness", "header"], ["--slice_thickness", "-2"], ["--slice_thickness", "600"],
                  ["--slice_thickness", "6", "--method", "linear"]):  # fmt: skip
        with pytest.raises(UserError, match="slice_thickness"):
            interpolate.main(["-i", source, "-o", str(tmp_path / "no.nii.gz"), *words])
        assert not (tmp_path / "no.nii.gz").exists()


def test_a_folder_is_laid_out_as_render_does_and_meshed(tmp_path, case):
    out = tmp_path / "dense"
    interpolate.main(
        ["-i", case[0], "-l", case[1], "--interp", "3", "-o", str(out), "--method", "sdf", "--quiet"]
    )
    assert sorted(os.listdir(out)) == [
        "frames.json",
        "render_img",
        "render_img.nii.gz",
        "render_mask",
        "render_mask.nii.gz",
    ]
    names = sorted(os.listdir(out / "render_mask"))
    assert names[:4] == ["00000_0.png", "00000_1.png", "00000_2.png", "00001_0.png"]
    assert names[-1] == "00008_0.png" and len(names) == 25, "nothing beyond the last slice"
    slices_to_ply.main(["-i", str(out), "-o", str(tmp_path / "mesh"), "--quiet"])
    mesh = read_mesh(tmp_path / "mesh" / "dense.ply")
    voxels = np.asarray(nibabel.load(out / "render_mask.nii.gz").dataobj).sum() * 2 * 2 * 2
    assert mesh.volume == pytest.approx(voxels, rel=0.01)
    # LPS; the rod's middle is voxel (16, 13, 4)
    np.testing.assert_allclose(mesh.bounds.mean(0), [-(10 - 32), -(-20 + 26), 5 + 24], atol=1)


def test_frames_of_prepare_and_their_held_out_slices(tmp_path, case, capsys):
    prepare.main(
        ["-i", *case[:1], "-l", case[1], "-o", str(tmp_path / "data"), "--keep_every", "2", "--quiet"]
    )
    roots = ["-s", str(tmp_path / "data" / "img"), "--seg_source_path", str(tmp_path / "data" / "seg")]
    interpolate.main([*roots, "--interp", "2", "-o", str(tmp_path / "out.nii.gz"), "--method", "linear"])
    printed = capsys.readouterr().out
    assert "4 held-out slices: " in printed and "4 held-out masks: Dice " in printed
    dense = nibabel.load(tmp_path / "out.nii.gz")
    assert dense.shape == SHAPE
    np.testing.assert_allclose(dense.affine, AFFINE, atol=1e-4)
    # masks alone, and the same with --keep_every of the volume itself
    interpolate.main([*roots[2:], "--interp", "2", "-o", str(tmp_path / "m.nii.gz"), "--method", "sdf"])
    alone = capsys.readouterr().out
    interpolate.main(
        ["-i", case[1], "-o", str(tmp_path / "k.nii.gz"), "--method", "linear", "--keep_every", "2"]
    )
    assert "held-out masks" in alone and "4 held-out slices: " in capsys.readouterr().out
    assert np.asarray(nibabel.load(tmp_path / "m.nii.gz").dataobj).max() == 1


def test_slices_of_a_folder_without_a_place(tmp_path, capsys):
    from utils.images import write_image

    for number in (0, 1, 3):  # in colour, and unevenly far apart
        write_image(tmp_path / "in" / f"{number}.png", np.full((12, 10, 3), number / 4) * [1, 0.5, 0], 8)
    out = tmp_path / "out"
    interpolate.main(["-i", str(tmp_path / "in"), "--interp", "2", "-o", str(out), "--method", "linear"])
    assert "no NIfTI volume" in capsys.readouterr().out
    frames = [read_image(out / "render_img" / name) for name in sorted(os.listdir(out / "render_img"))]
    assert np.stack(frames)[:, 0, 0, 0].tolist() == pytest.approx(
        [0, 0.125 * 65535, 0.25 * 65535, 0.5 * 65535, 0.75 * 65535], abs=130
    )  # of 8 bits
    with pytest.raises(UserError, match="give a folder instead"):
        interpolate.main(["-i", str(tmp_path / "in"), "-o", str(tmp_path / "x.nii.gz"), "--quiet"])


@pytest.mark.parametrize("method", ["motion", "sdf"])
def test_masks_on_some_slices_only(tmp_path, case, capsys, method):
    """The rod leans by 1.5 px per slice, and every fourth slice is painted; its mask is known in all of them."""
    arguments = ["-i", case[0], "-l", case[1], "--label_slices", "0,4,8", "--interp", "1", "--method", method]
    interpolate.main([*arguments, "-o", str(tmp_path / "dense.nii.gz")])
    assert "masks of 3 of 9 frames" in capsys.readouterr().out
    found = np.asarray(nibabel.load(tmp_path / "dense_mask.nii.gz").dataobj) > 0
    truth = np.asarray(nibabel.load(case[1]).dataobj) > 0
    assert np.array_equal(found[..., ::4], truth[..., ::4])
    dice = 2 * (found & truth).sum() / (found.sum() + truth.sum())
    assert dice > (0.97 if method == "motion" else 0.9)


@pytest.mark.parametrize("method", interpolate.METHODS)
def test_label_maps_on_some_slices_keep_their_ids(tmp_path, case, capsys, method):
    """The rod's left and right half, 3 and 700, on every fourth slice: filled in at once, each voxel one label."""
    i = np.arange(SHAPE[0])[:, None, None]
    inside, truth = rod(np.arange(9.0)) > 0, np.zeros(SHAPE, np.int16)
    truth[inside & (i < 10 + 1.5 * np.arange(9))] = 3
    truth[inside & (i >= 10 + 1.5 * np.arange(9))] = 700
    (tmp_path / "names.json").write_text('{"3": "left", "700": "right"}')
    arguments = ["-i", case[0], "-l", save(tmp_path / "ids.nii.gz", truth), "--labels", "all", "--label_names",
                 str(tmp_path / "names.json"), "--label_slices", "0,4,8", "--method", method]  # fmt: skip
    interpolate.main([*arguments, "--interp", "1", "-o", str(tmp_path / "dense.nii.gz")])
    found = np.asarray(nibabel.load(tmp_path / "dense_mask.nii.gz").dataobj)
    assert set(np.unique(found)) == {0, 3, 700} and np.array_equal(found[..., ::4], truth[..., ::4])
    least = {"motion": 0.93, "linear": 0.5, "cubic": 0.75, "sdf": 0.75}[method]
    for label in (3, 700):
        both = (found == label) & (truth == label)
        assert 2 * both.sum() / ((found == label).sum() + (truth == label).sum()) > least
    if method != "sdf":
        return
    # Frames of prepare.py, held-out ones scored by label, and meshed.
    prepare.main([*arguments[:8], "-o", str(tmp_path / "data"), "--keep_every", "2", "--quiet"])
    roots = ["-s", str(tmp_path / "data" / "img"), "--seg_source_path", str(tmp_path / "data" / "seg")]
    interpolate.main([*roots, "--interp", "2", "-o", str(tmp_path / "folder"), "--method", method])
    printed = capsys.readouterr().out
    assert "4 held-out masks: mean Dice of 2 labels 0." in printed and "  700 right: 0." in printed
    slices_to_ply.main(["-i", str(tmp_path / "folder"), "-o", str(tmp_path / "mesh"), "--quiet"])
    names = {"folder.glb", "folder_left.ply", "folder_right.ply"}
    assert names <= set(os.listdir(tmp_path / "mesh"))


def test_refusals(tmp_path, case):
    out = str(tmp_path / "o.nii.gz")
    for arguments, words in (
        (["-o", out], "give -i VOLUME, or -s ROOT"),
        (["-i", case[0], "-s", "x", "-o", out], "not both"),
        (["-s", str(tmp_path), "-l", case[1], "-o", out], "--seg_source_path"),
        (["-s", str(tmp_path), "--axis", "1", "-o", out], "--axis is no option for frames"),
        (["-s", str(tmp_path), "-o", out], "no folder original"),
        (["-i", case[0], "-o", out, "--nonsense"], "nonsense"),
        (["-i", case[0], "-o", str(tmp_path / "o.png")], "NAME.nii.gz"),
        (["-i", case[0], "-o", str(tmp_path)], "did not write"),
        (["-i", str(tmp_path / "none.nii.gz"), "-o", out], "does not exist"),
        (
            ["-i", case[0], "-l", save(tmp_path / "empty.nii.gz", np.zeros(SHAPE, np.uint8)), "-o", out],
            "empty",
        ),
    ):
        with pytest.raises(UserError, match=words):
            interpolate.main([*arguments, "--quiet"])
    assert not Path(out).exists()


def test_nothing_is_replaced_unasked(tmp_path, case):
    out, again = tmp_path / "o.nii.gz", tmp_path / "folder"
    for place in (out, again):
        arguments = ["-i", case[0], "-o", str(place), "--method", "linear", "--interp", "2", "--quiet"]
        interpolate.main(arguments)
        with pytest.raises(UserError, match="--force"):
            interpolate.main(arguments)
        assert interpolate.main([*arguments, "--force"]) == 0


def test_as_a_script(tmp_path, case):
    command = [sys.executable, str(ROOT / "interpolate.py")]
    done = subprocess.run(
        [*command, "-i", case[0], "-o", str(tmp_path / "a.nii.gz"), "--method", "linear"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "100%" in done.stderr and "a.nii.gz" in done.stdout
    done = subprocess.run([*command, "-i", "nowhere.nii", "-o", "x.nii.gz"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.strip().splitlines() == [
        "interpolate.py: error: nowhere.nii does not exist"
    ]
