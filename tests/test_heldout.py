"""Frames left out of training and scored: what train.py reports on them, and their positions in time."""

import json
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.interpolate import CubicSpline
from sequences import arguments, blobs, checkpoint, colours, masks, refused, train_at, write
from skimage.metrics import structural_similarity

import train
from arguments import TrainOptions
from gaussian_renderer import ACTIVE, ACTIVE_SEGMENTATION, render_frames
from patient.geometry import FrameCut, Geometry, cut_geometry
from scene.parameters import IMAGE, SEGMENTATION
from training.run import Training
from utils.images import read_image

COUNT = 9  # frames of a source, of which every second is held out: 0 2 4 6 8 are kept


pytestmark = pytest.mark.usefixtures("one_thread")


def prepared(folder, image=None, mask=None, kept=range(0, COUNT, 2), depths=None):
    """The output of prepare.py --keep_every 2: OUT/img and OUT/seg with original/ and heldout/, and OUT/frames.json."""
    image, mask = image or blobs(count=COUNT), mask or masks(count=COUNT)
    kept = list(kept)
    for kind, frames in (("img", image), ("seg", mask)):
        write(folder / kind, [frames[k] for k in kept])
        (folder / kind / "heldout").mkdir(exist_ok=True)
        for k in sorted(set(range(kept[-1])) - set(kept)):
            Image.fromarray(frames[k]).save(folder / kind / "heldout" / f"{k:04d}.png")
    geometry = cut_geometry(
        FrameCut((0, 1, 2), (False, False)),
        np.diag([1.0, 2.0, 3.0, 1.0]),
        (24, 20, COUNT),
        depths=depths,
        window=(0.0, 255.0),
        bits=8,
        source="x.nii",
    )
    if len(kept) < COUNT:
        geometry = geometry.hold_out([k for k in range(COUNT) if k not in kept])
    geometry.save(folder / "frames.json")
    return folder


def run(root, out, *more):
    """train.py, aloud."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [flag for flag in arguments(root, out, *more) if flag != "--quiet"])
        train.main()


def start(root, out, **options):
    options = {"num_pts": 50, "poly_degree": 1, "device": "cpu", "quiet": True, **options}
    return Training.start(TrainOptions(source_path=str(root), model_path=str(out), **options), lambda _: None)


def rows_of(out):
    return json.loads((out / "evaluation.json").read_text())


# ---- what it reports -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def joint(tmp_path_factory):
    case = prepared(tmp_path_factory.mktemp("case"))
    out = case / "out"
    with pytest.MonkeyPatch.context() as patch:
        import io

        patch.setattr(sys, "stdout", printed := io.StringIO())
        more = ("--pipeline", "joint", "--seg_source_path", case / "seg")
        run(case / "img", out, *more, "--iterations", 20, "--test_iterations", 10)
    return out, printed.getvalue()


def test_lines_that_one_can_read(joint):
    _, printed = joint
    assert "held out: 4 frames" in printed
    for iteration in (10, 20):
        assert re.search(
            rf"\[{iteration}\] img on 4 held-out frames \(PSNR / SSIM\): ours \d+\.\d\d dB / 0\.\d{{4}}; "
            r"linear \d+\.\d\d dB / 0\.\d{4}, cubic spline \d+\.\d\d dB / 0\.\d{4}\n",
            printed,
        )
        assert re.search(
            rf"\[{iteration}\] seg on 4 held-out frames: ours Dice [01]\.\d{{4}}; signed distance Dice 0\.\d{{4}}, "
            r"cubic signed distance Dice 0\.\d{4}, linear Dice 0\.\d{4}\n",
            printed,
        )
        assert re.search(rf"\[{iteration}\] img: L1 .* PSNR .* dB, SSIM 0\.\d{{4}} on 5 frames\n", printed)


def test_rows_that_programs_can_read(joint):
    out, _ = joint
    rows = rows_of(out)
    named = [(row["iteration"], row["task"], row["frames"], row["method"]) for row in rows]
    each = [
        ("img", "training", "model"),
        *(("img", "heldout", method) for method in ("model", "linear", "cubic")),
        ("seg", "training", "model"),
        *(("seg", "heldout", method) for method in ("model", "sdf", "cubic sdf", "linear")),
    ]
    assert named == [(iteration, *row) for iteration in (10, 20) for row in each]
    for row in rows:
        assert row["count"] == (5 if row["frames"] == "training" else 4)
        assert 0 <= row["ssim"] <= 1 and row["psnr"] > 0 and row["l1"] > 0
        assert ("dice" in row) == (row["task"] == "seg")
    classical = [row for row in rows if row["method"] != "model"]
    half = len(classical) // 2
    assert [{**row, "iteration": 20} for row in classical[:half]] == classical[half:]


def test_tensorboard_has_them_too(joint):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out, _ = joint
    events = EventAccumulator(str(out))
    events.Reload()
    for row in rows_of(out):
        tag = row["task"] + {"training": "", "heldout": "/heldout"}[row["frames"]]
        tag += "" if row["method"] == "model" else f"/{row['method']}"
        for name in row.keys() & {"psnr", "ssim", "dice"}:
            values = {event.step: event.value for event in events.Scalars(f"{tag}/{name}")}
            assert values[row["iteration"]] == pytest.approx(row[name], rel=1e-6)


def test_pictures_of_them(joint):
    out, _ = joint
    names = {path.name for path in (out / "plots").iterdir()}
    assert {"img_heldout_10.png", "seg_heldout_20.png", "img_montage.png", "seg_montage.png"} <= names
    for name in ("img_heldout_20.png", "img_montage.png", "seg_montage.png"):
        assert read_image(out / "plots" / name).std() > 5
    assert read_image(out / "plots" / "img_montage.png").shape[1] > 1000  # five columns


def test_montages_show_the_sequence_from_the_side_with_the_outlined_mask(tmp_path):
    """A row and a column of every slice, through the middle of the masks; slices run upwards, so the last is on top."""
    root = prepared(tmp_path / "data")
    training = start(
        root / "img", tmp_path / "out", pipeline="joint", seg_source_path=str(root / "seg"), iterations=1
    )
    training.iteration = 1
    (img, seg) = [scored.heldout.comparison for scored in training.evaluate()]
    images, inside = np.stack(blobs(count=COUNT)) / 255, np.stack(masks(count=COUNT)) / 255
    _, rows, columns = np.nonzero(inside[::2])
    row, column = int(np.median(rows)), int(np.median(columns))
    for shown, stack in ((img, images), (seg, inside)):
        coronal, sagittal = shown.sides
        assert (coronal.name, coronal.aspect, sagittal.name, sagittal.aspect) == (
            "coronal",
            3,
            "sagittal",
            1.5,
        )
        assert np.allclose(coronal.images["truth"][:, :, 0], stack[::-1, row], atol=1e-6)
        assert np.allclose(sagittal.images["truth"][:, :, 0], stack[::-1, :, column], atol=1e-6)
        drawn = render_frames(
            training.model,
            training.camera,
            [k / 2 for k in range(COUNT)],
            training.background,
            *((IMAGE, ACTIVE) if shown is img else (SEGMENTATION, ACTIVE_SEGMENTATION)),
        )
        assert np.allclose(coronal.images["model"][:, :, 0], drawn[:, 0, row].flip(0), atol=1e-6)
    assert np.array_equal(img.sides[0].masks["truth"] >= 0.5, inside[::-1, row] >= 0.5)
    assert np.array_equal(img.frames[0].masks["truth"] >= 0.5, inside[2 * img.places[0] + 1] >= 0.5)
    assert not seg.sides[0].masks


def test_the_classical_scores_are_those_of_scikit_image_and_scipy(joint):
    out, _ = joint
    truth = np.stack(blobs(count=COUNT)).astype(float)
    kept, at = np.arange(0, COUNT, 2), np.arange(1, COUNT, 2)
    for method, between in (
        ("linear", (truth[at - 1] + truth[at + 1]) / 2),
        ("cubic", CubicSpline(kept, truth[kept], axis=0)(at)),
    ):
        between = np.rint(between.clip(0, 255))
        psnr = 10 * np.log10(255**2 / ((between - truth[at]) ** 2).mean((1, 2)))
        ssim = [structural_similarity(t, b, data_range=255) for t, b in zip(truth[at], between, strict=True)]
        (row,) = [r for r in rows_of(out) if (r["iteration"], r["task"], r["method"]) == (20, "img", method)]
        assert row["psnr"] == pytest.approx(psnr.mean(), abs=1e-4)  # float32 images
        assert row["ssim"] == pytest.approx(np.mean(ssim), abs=1e-6)


def test_our_scores_are_those_of_the_rendered_files(joint):
    """The model's held-out scores, of the images that render.py writes half-way between frames."""
    import render

    out, _ = joint
    with pytest.MonkeyPatch.context() as patch:
        call = [
            "render.py",
            "-m",
            str(out),
            "--interp",
            "2",
            "--pipeline",
            "both",
            "--quiet",
            "--device",
            "cpu",
        ]
        patch.setattr(sys, "argv", call)
        render.main()
    image = {k: read_image(out / "render_img" / f"{k:05d}_1.png").astype(float) for k in range(4)}
    mask = {k: read_image(out / "render_mask" / f"{k:05d}_1.png") >= 127.5 for k in range(4)}
    truth, organ = blobs(count=COUNT), np.stack(masks(count=COUNT)[1::2]) > 127
    psnr = [
        10 * np.log10(255**2 / ((image[k] - truth[2 * k + 1].astype(float)) ** 2).mean()) for k in range(4)
    ]
    ssim = [structural_similarity(truth[2 * k + 1].astype(float), image[k], data_range=255) for k in range(4)]
    found = np.stack([mask[k] for k in range(4)])
    dice = 2 * (found & organ).sum() / (found.sum() + organ.sum())
    # The last iteration evaluates after its optimizer step is left out: the checkpoint is what was evaluated.
    rows = {r["task"]: r for r in rows_of(out)[9:] if (r["frames"], r["method"]) == ("heldout", "model")}
    # The two render in different batches: a value between two levels may round either way.
    assert rows["img"]["psnr"] == pytest.approx(np.mean(psnr), abs=0.01)
    assert rows["img"]["ssim"] == pytest.approx(np.mean(ssim), abs=1e-3)
    assert rows["seg"]["dice"] == pytest.approx(dice, abs=0.02)


def test_16_bits_and_colours_are_scored_at_their_own_depth(tmp_path):
    deep = [(frame.astype(np.uint16) * 257) for frame in blobs(count=COUNT)]
    case = prepared(tmp_path / "deep", deep)
    train_at(case / "img", tmp_path / "a", "--iterations", 1)
    shallow = {r["method"]: r for r in rows_of(tmp_path / "a") if r["frames"] == "heldout"}
    kept, at = np.arange(0, COUNT, 2), np.arange(1, COUNT, 2)
    truth = np.stack(deep).astype(float) / 65535
    between = (truth[at - 1] + truth[at + 1]) / 2  # half of 1/65535 is an invisible rounding error
    psnr = -10 * np.log10(((between - truth[at]) ** 2).mean((1, 2)))
    assert shallow["linear"]["psnr"] == pytest.approx(psnr.mean(), abs=1e-3)
    assert len(kept) == 5
    case = prepared(tmp_path / "colour", colours(count=COUNT))
    train_at(case / "img", tmp_path / "b", "--iterations", 1)
    assert {r["method"] for r in rows_of(tmp_path / "b")} == {"model", "linear", "cubic"}


def test_masks_of_a_colour_model(tmp_path):
    case = prepared(tmp_path / "case", colours(count=COUNT))
    more = ("--pipeline", "joint", "--seg_source_path", case / "seg", "--iterations", 1)
    train_at(case / "img", tmp_path / "out", *more)
    by_method = {r["method"]: r["dice"] for r in rows_of(tmp_path / "out") if r["task"] == "seg"}
    assert by_method["sdf"] > 0.8 > by_method["model"]


def test_a_resumed_run_goes_on_with_its_rows_and_a_new_one_does_not(tmp_path):
    case, out = prepared(tmp_path / "case"), tmp_path / "out"
    train_at(case / "img", out, "--iterations", 4, "--test_iterations", 2, "--checkpoint_iterations", 2)
    again = ("--start_checkpoint", out / "chkpnt2.pth", "--iterations", 6, "--test_iterations")
    train_at(case / "img", out, *again)
    assert sorted({row["iteration"] for row in rows_of(out)}) == [2, 6]  # 4 was not on this run's way
    train_at(case / "img", out, "--iterations", 3, "--test_iterations")
    assert {row["iteration"] for row in rows_of(out)} == {3}


# ---- where frames lie ----------------------------------------------------------------------------------------------


def test_uneven_frames_have_their_true_times(tmp_path):
    """Slices 0, 1, 4 and 8 of nine, 3 mm apart: gaps of 1, 3 and 4, and behind the last one their median, 3."""
    case = prepared(tmp_path / "case", kept=(0, 1, 4, 8))
    train_at(case / "img", tmp_path / "out", "--iterations", 1)
    saved = checkpoint(tmp_path / "out", 1)
    assert saved.time_func.tolist() == pytest.approx([1 / 11, 3 / 11, 4 / 11, 3 / 11])
    training = start(case / "img", tmp_path / "two")
    assert training.heldout["img"].indices == pytest.approx([1 + 1 / 3, 1 + 2 / 3, 2.25, 2.5, 2.75])
    times = training.model.times(training.heldout["img"].indices)
    assert times.tolist() == pytest.approx([2 / 11, 3 / 11, 5 / 11, 6 / 11, 7 / 11])


def test_learned_times_start_from_the_true_ones(tmp_path):
    case = prepared(tmp_path / "case", kept=(0, 1, 4, 8))
    model = start(case / "img", tmp_path / "out", use_dff=True).model
    assert model.times([0, 1, 2, 3]).tolist() == pytest.approx([0, 1 / 8, 4 / 8, 1])


def test_even_frames_keep_even_times(tmp_path):
    case = prepared(tmp_path / "case")
    train_at(case / "img", tmp_path / "out", "--iterations", 1)
    assert checkpoint(tmp_path / "out", 1).time_func.tolist() == pytest.approx([0.2] * 5)


def test_interpolation_knows_the_true_places_too(tmp_path):
    """Frames that change evenly along the source are interpolated without error, however they are spaced."""
    ramp = [np.full((20, 24), 20 * k, np.uint8) for k in range(COUNT)]
    case = prepared(tmp_path / "case", ramp, kept=(0, 1, 4, 8))
    train_at(case / "img", tmp_path / "out", "--iterations", 1)
    found = {r["method"]: r["psnr"] for r in rows_of(tmp_path / "out") if r["frames"] == "heldout"}
    assert found["linear"] == found["cubic"] == 100 and found["model"] < 50


def test_pixels_of_other_heights_than_widths_count_in_the_distances(tmp_path):
    training = start(prepared(tmp_path / "case") / "seg", tmp_path / "out", pipeline="seg", resolution=2)
    test = training.heldout["seg"]
    assert test.spacing == (4.0, 2.0)  # rows of 2 mm, columns of 1 mm, at half the resolution
    assert np.diff(test.kept_positions).tolist() == [6, 6, 6, 6]


# ---- --eval --------------------------------------------------------------------------------------------------------


def test_eval_holds_out_every_eighth(tmp_path, capsys):
    root = write(tmp_path / "data", blobs(count=20))
    run(root, tmp_path / "out", "--eval", "--iterations", 1)
    assert "img on 2 held-out frames" in capsys.readouterr().out
    saved = checkpoint(tmp_path / "out", 1)
    kept = [k for k in range(20) if k not in (7, 15)]
    assert saved.extras["numbers"] == kept
    assert saved.num_frames == 18
    gaps = np.append(np.diff(kept), 1)  # the gap of a frame that is held out is twice as long
    assert saved.time_func.tolist() == pytest.approx((gaps / gaps.sum()).tolist())
    geometry = Geometry.load(tmp_path / "out" / "frames.json")
    assert geometry.slices == tuple(kept) and geometry.heldout_slices == (7, 15) and geometry.affine is None


def test_held_out_frames_are_not_trained_on(tmp_path):
    frames = blobs()
    root = write(tmp_path / "data", frames)
    run = ("--eval", "--eval_every", 2, "--iterations", 5)
    train_at(root, tmp_path / "a", *run)
    Image.fromarray(255 - frames[1]).save(root / "original" / "0001.png")
    train_at(root, tmp_path / "b", *run)
    a, b = checkpoint(tmp_path / "a", 5), checkpoint(tmp_path / "b", 5)
    assert all(torch.equal(value, b.params[name]) for name, value in a.params.items())
    scores = [[r["psnr"] for r in rows_of(tmp_path / n) if r["frames"] == "heldout"] for n in "ab"]
    assert scores[0] != scores[1]


def test_without_eval_all_frames_are_trained_on(tmp_path):
    root = write(tmp_path / "data", blobs())
    train_at(root, tmp_path / "out", "--eval", "False", "--iterations", 1)
    assert checkpoint(tmp_path / "out", 1).num_frames == 5
    assert [row["frames"] for row in rows_of(tmp_path / "out")] == ["training"]


def test_eval_leaves_the_place_of_the_frames_true(tmp_path):
    case = prepared(tmp_path / "case", kept=range(COUNT))
    for folder in case.glob("*/heldout"):
        folder.rmdir()
    more = ("--pipeline", "joint", "--seg_source_path", case / "seg", "--eval", "--eval_every", 3)
    train_at(case / "img", tmp_path / "out", *more, "--iterations", 1)
    full, part = (Geometry.load(folder / "frames.json") for folder in (case, tmp_path / "out"))
    assert part.slices == (0, 1, 3, 4, 6, 7, 8) and part.heldout_slices == (2, 5)
    for k, index in enumerate(part.slices):
        assert part.to_patient(np.array([3.0, 4.0, k])) == pytest.approx(
            full.to_patient(np.array([3.0, 4.0, index]))
        )
    assert {row["task"] for row in rows_of(tmp_path / "out") if row["frames"] == "heldout"} == {"img", "seg"}
    assert checkpoint(tmp_path / "out", 1).num_frames == 7


def test_a_heldout_folder_goes_before_eval(tmp_path, capsys):
    case = prepared(tmp_path / "case")
    run(case / "img", tmp_path / "out", "--eval", "--eval_every", 2, "--iterations", 1)
    assert "--eval: heldout/ is evaluated, and no frame of the others is held out" in capsys.readouterr().out
    assert checkpoint(tmp_path / "out", 1).num_frames == 5


# ---- refused -------------------------------------------------------------------------------------------------------


def one_line(capsys, out):
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert captured.out == "" and not out.exists()
    return line


def test_too_few_frames_to_hold_any_out(tmp_path, capsys):
    root, out = write(tmp_path / "data", blobs()), tmp_path / "out"
    assert refused(root, out, "--eval") == 2
    assert "5 frames are too few; give a smaller --eval_every" in one_line(capsys, out)
    assert refused(root, out, "--eval", "--eval_every", 1) == 2
    assert "--eval_every is 1: give a number of at least 2" in one_line(capsys, out)


def test_held_out_frames_that_do_not_belong(tmp_path, capsys):
    case, out = prepared(tmp_path / "case"), tmp_path / "out"
    folder = case / "img" / "heldout"
    (folder / "0001.png").rename(folder / "0004.png")
    assert refused(case / "img", out) == 2
    assert "0004.png is not one of the slices that frames.json says were left out" in one_line(capsys, out)
    (folder / "0004.png").unlink()
    Image.fromarray(blobs(width=30)[0]).save(folder / "0001.png")
    for file in folder.glob("000[357].png"):
        file.unlink()
    assert refused(case / "img", out) == 2
    assert "frames of 30 x 20 pixels" in one_line(capsys, out)


def test_a_frames_json_of_other_frames(tmp_path, capsys):
    case, out = prepared(tmp_path / "case"), tmp_path / "out"
    (case / "img" / "original" / "0004.png").unlink()
    assert refused(case / "img", out) == 2
    assert "has 4 frames, its frames.json has 5: run prepare.py again" in one_line(capsys, out)


def test_held_out_frames_of_unknown_place_are_said_and_left(tmp_path, capsys):
    case, out = prepared(tmp_path / "case"), tmp_path / "out"
    (case / "frames.json").unlink()
    run(case / "img", out, "--iterations", 1)
    assert "heldout is not evaluated: no frames.json says where its frames lie" in capsys.readouterr().out
    assert {row["frames"] for row in rows_of(out)} == {"training"}


def test_a_damaged_evaluation_file_is_named_before_training(tmp_path, capsys):
    case, out = prepared(tmp_path / "case"), tmp_path / "out"
    train_at(case / "img", out, "--iterations", 2, "--checkpoint_iterations", 1)
    (out / "evaluation.json").write_text("{")
    capsys.readouterr()
    assert refused(case / "img", out, "--start_checkpoint", out / "chkpnt1.pth", "--iterations", 3) == 2
    assert "evaluation.json is damaged: move it out of the way" in capsys.readouterr().err
    assert not (out / "chkpnt3.pth").exists()


# ---- geometry ------------------------------------------------------------------------------------------------------


def test_holding_out_keeps_what_was_held_out_before(tmp_path):
    geometry = Geometry.load(prepared(tmp_path / "case") / "frames.json")
    part = geometry.hold_out([1])
    assert part.slices == (0, 4, 6, 8) and part.heldout_slices == (1, 2, 3, 5, 7)
    assert part.heldout_positions == (3, 6, 9, 15, 21) and part.positions == (0, 12, 18, 24)
    assert part.spacing[2] == pytest.approx(8)  # the mean
    for end in (0, 4):
        with pytest.raises(ValueError, match="first and the last"):
            geometry.hold_out([end])
    assert replace(geometry, affine=None).hold_out([1]).affine is None
