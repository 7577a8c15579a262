"""train.py as a user runs it: what it prints and writes, the order within an iteration, and what it refuses."""

import json
import math
import os
import subprocess
import sys
from dataclasses import fields
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from plyfile import PlyData
from sequences import (
    FAST,
    FRAMES,
    arguments,
    blobs,
    checkpoint,
    colours,
    masks,
    refused,
    train_at,
    write,
)

import train
from arguments import OptimisationOptions, read_cfg_args
from gaussian_renderer import render_frames
from patient.geometry import Geometry
from scene.cameras import Camera
from scene.frames import Frames
from scene.gaussian_model import GaussianModel
from scene.point_cloud import read_point_cloud
from training import loop
from utils.images import read_image
from utils.metrics import psnr

ROOT = Path(train.__file__).parent
# A small schedule: density steps at 10, 20, 30.
CONTROL = (
    "--densify_from_iter", 5, "--densification_interval", 10, "--opacity_reset_interval", 25, "--ibfr_from_iter", 12,
)  # fmt: skip


GEOMETRY = Geometry(
    (0, 1, 2),
    (False, False),
    (24, 20),
    None,
    tuple(range(5)),
    5,
    (0.0, 1.0, 2.0, 3.0, 4.0),
    (0.0, 255.0),
    8,
    "x.nii",
)


pytestmark = pytest.mark.usefixtures("one_thread")


def script(*flags: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *map(str, flags)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


# ---- what it writes ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def joint(tmp_path_factory):
    """A joint run, as a process: (data root of the images, output folder, the finished process)."""
    case = tmp_path_factory.mktemp("case")
    GEOMETRY.save(case / "frames.json")
    images, seg = write(case / "img", colours()), write(case / "seg", masks())
    out = case / "deep" / "out"
    quick = [flag for flag in FAST if flag != "--quiet"]
    run = script(
        "-s", images, "-m", out, *quick, "--pipeline", "joint", "--seg_source_path", seg, *CONTROL,
        "--iterations", 34, "--test_iterations", 15, "--save_iterations", 20, "--checkpoint_iterations", 25,
        "--save_xyz",
    )  # fmt: skip
    return images, out, run


def test_a_run_says_what_it_does(joint):
    _, out, run = joint
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert f"output: {out}" in lines
    assert "frames: 5 of 24 x 20, 8 bit, colour; on cpu" in lines
    assert "Gaussians: 150" in lines
    for iteration in (15, 34):
        for name in ("img", "seg"):
            (line,) = [line for line in lines if line.startswith(f"[{iteration}] {name}: ")]
            assert "L1 0." in line and " dB" in line and ("Dice" in line) == (name == "seg")
    assert lines[-1].startswith(f"done: {out}")
    for word in ("34/34", "loss=", "PSNR=", "points="):
        assert word in run.stderr  # the bar
    assert "Traceback" not in run.stderr and "Warning" not in run.stderr


def test_a_run_leaves_exactly_these_files(joint):
    _, out, _ = joint
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    (events,) = (name for name in files if name.startswith("events.out.tfevents"))
    assert files - {events} == {
        "cfg_args", "cameras.json", "input.ply", "time.json", "frames.json",
        "chkpnt25.pth", "chkpnt34.pth", "xyz/1.pt", "xyz/34.pt",
        "evaluation.json", "point_cloud/iteration_20/point_cloud.ply", "point_cloud/iteration_34/point_cloud.ply",
        "plots/img_15.png", "plots/seg_15.png", "plots/img_34.png", "plots/seg_34.png",
    }  # fmt: skip


def test_cfg_args_is_a_namespace_of_literals(joint):
    images, out, _ = joint
    values = read_cfg_args(out / "cfg_args")
    assert (out / "cfg_args").read_text().startswith("Namespace(")
    assert values["source_path"] == str(images.resolve()) and Path(values["seg_source_path"]).is_absolute()
    assert (values["pipeline"], values["iterations"], values["num_pts"], values["poly_degree"]) == (
        "joint",
        34,
        150,
        3,
    )
    assert values["test_iterations"] == [15] and values["white_background"] is False
    for option in fields(OptimisationOptions):
        assert option.name in values


def test_relative_paths_are_written_absolute(tmp_path, monkeypatch):
    write(tmp_path / "data", blobs())
    monkeypatch.chdir(tmp_path)
    train_at(Path("data"), Path("out"), "--iterations", 1)
    assert read_cfg_args(tmp_path / "out" / "cfg_args")["source_path"] == str(tmp_path / "data")


def test_cameras(joint):
    _, out, _ = joint
    entries = json.loads((out / "cameras.json").read_text())
    assert [entry["img_name"] for entry in entries] == [f"{k:04d}.png" for k in range(FRAMES)]
    assert [entry["id"] for entry in entries] == list(range(FRAMES))
    assert entries[0]["width"] == 24 and entries[0]["height"] == 20
    assert entries[0]["fx"] == pytest.approx(24 / (2 * math.tan(0.6911112070083618 / 2)))


def test_the_frames_geometry_goes_along(joint):
    _, out, _ = joint
    assert Geometry.load(out / "frames.json") == GEOMETRY


def test_a_geometry_that_is_damaged_is_refused_before_anything_is_written(tmp_path, capsys):
    (tmp_path / "case").mkdir()
    (tmp_path / "case" / "frames.json").write_text('{"spacing": 1}')
    images = write(tmp_path / "case" / "img", blobs())
    assert refused(images, tmp_path / "out", "--iterations", 1) == 2
    assert "frames.json" in one_line(capsys.readouterr().err) and not (tmp_path / "out").exists()


def test_input_points(joint):
    _, out, _ = joint
    vertex = PlyData.read(out / "input.ply")["vertex"]
    half = math.tan(0.6911112070083618 / 2)
    assert len(vertex) == 150 and (vertex["y"] == 0).all()
    assert np.abs(vertex["x"]).max() <= half and np.abs(vertex["z"]).max() <= half * 20 / 24
    assert {int(v) for name in ("red", "green", "blue") for v in vertex[name]} == {127}


def test_the_point_cloud_is_the_checkpoints(joint):
    _, out, _ = joint
    saved = checkpoint(out, 34)
    params, time_func = read_point_cloud(out / "point_cloud" / "iteration_34" / "point_cloud.ply")
    for name, value in saved.params.items():
        if value.numel() and not name.startswith("f_"):  # channels are folded where they are equal
            assert torch.equal(params[name], value), name
    assert torch.equal(time_func, saved.time_func)


def test_checkpoints_hold_the_run(joint):
    _, out, _ = joint
    saved = checkpoint(out, 25)
    assert saved.iteration == 25 and saved.has_seg_head and saved.channels == 3
    assert saved.spatial_lr_scale == pytest.approx(1.1)
    assert {key: saved.extras[key] for key in ("width", "height", "distance", "bits")} == {
        "width": 24, "height": 20, "distance": 1.0, "bits": 8,
    }  # fmt: skip
    assert saved.extras["numbers"] == list(range(FRAMES))
    assert saved.extras["options"]["pipeline"] == "joint"


def test_centres(joint):
    _, out, _ = joint
    first = torch.load(out / "xyz" / "1.pt", weights_only=True)
    last = torch.load(out / "xyz" / "34.pt", weights_only=True)
    assert first.shape == (150, 3) and torch.equal(last, checkpoint(out, 34).params["xyz"])


def test_centres_are_saved_every_5000(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "XYZ_INTERVAL", 4)
    images = write(tmp_path / "data", blobs())
    train_at(images, tmp_path / "out", "--iterations", 10, "--save_xyz")
    assert sorted(int(path.stem) for path in (tmp_path / "out" / "xyz").iterdir()) == [1, 5, 9, 10]
    assert loop.XYZ_INTERVAL == 4


def test_the_interval_of_the_centres():
    assert loop.XYZ_INTERVAL == 5000


def test_plots_are_pictures(joint):
    _, out, _ = joint
    picture = read_image(out / "plots" / "img_34.png")
    assert picture.ndim == 3 and picture.std() > 0


def test_time_is_measured(joint):
    _, out, _ = joint
    spent = json.loads((out / "time.json").read_text())
    parts = spent.pop("parts")
    assert set(spent) == {"time", "elapsed", "memory"} and all(value > 0 for value in spent.values())
    assert all(value >= 0 for value in parts.values())
    assert parts["iterations"] + parts["evaluation"] + parts["saving"] == pytest.approx(
        spent["elapsed"], abs=0.01
    )


def test_tensorboard(joint):
    _, out, _ = joint
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out))
    events.Reload()
    tags = events.Tags()
    scalars = {
        "img/l1_loss",
        "img/ssim_loss",
        "img/ibfr_loss",
        "img/sigma_loss",
        "seg/l1_loss",
        "seg/sigma_loss",
    }
    scalars |= {
        "img/psnr",
        "seg/psnr",
        "img/l1",
        "seg/l1",
        "seg/dice",
        "total_loss",
        "points",
        "iteration_ms",
    }
    assert scalars <= set(tags["scalars"])
    assert {"img/render_and_frame", "seg/render_and_frame"} <= {
        tag.rsplit("/", 1)[0] for tag in tags["images"]
    } | set(tags["images"])
    assert [event.step for event in events.Scalars("img/psnr")] == [15, 34]
    assert events.Scalars("points")[-1].value == len(checkpoint(out, 34).params["xyz"])
    named = {tag: events.Scalars(tag)[-1].value for tag in scalars if tag.endswith("_loss")}
    image = 2 * named["img/l1_loss"] + 0.25 * named["img/ssim_loss"] + 0.5 * named["img/ibfr_loss"]
    image += 0.25 * named["img/sigma_loss"]
    seg = 2 * named["seg/l1_loss"] + 0.5 * named["seg/sigma_loss"]
    assert named["total_loss"] == pytest.approx(image + seg, rel=1e-5)


def test_the_histogram_of_sigma(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    import training.reports

    monkeypatch.setattr(training.reports, "_HISTOGRAM_INTERVAL", 10)
    train_at(write(tmp_path / "data", blobs()), tmp_path / "out", "--iterations", 10)
    events = EventAccumulator(str(tmp_path / "out"))
    events.Reload()
    assert events.Tags()["histograms"] == ["sigma"]


def test_the_mirror_folder_is_made_and_one_camera_needs_none(tmp_path):
    frames = blobs()
    root = write(tmp_path / "two", frames)
    train_at(root, tmp_path / "out2", "--iterations", 1)
    assert (read_image(root / "mirror" / "0002.png") == frames[2][:, ::-1]).all()
    root = write(tmp_path / "one", frames)
    train_at(root, tmp_path / "out1", "--iterations", 1, "--camera", "one")
    assert not (root / "mirror").exists()


def test_quiet_prints_nothing(tmp_path, capsys):
    train_at(write(tmp_path / "data", blobs()), tmp_path / "out", "--iterations", 12, "--test_iterations", 5)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_without_m_there_is_a_fresh_folder(tmp_path, monkeypatch):
    images = write(tmp_path / "data", blobs())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", "-s", str(images), *FAST, "--iterations", "1"])
    train.main()
    train.main()
    assert len([path for path in (tmp_path / "output").iterdir() if (path / "chkpnt1.pth").is_file()]) == 2


def test_without_tensorboard_it_says_so_and_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # importing it raises ImportError
    images, out = write(tmp_path / "data", blobs()), tmp_path / "out"
    monkeypatch.setattr(
        sys, "argv", [a for a in arguments(images, out, "--iterations", 10) if a != "--quiet"]
    )
    train.main()
    assert "tensorboard is not installed" in capsys.readouterr().out
    assert (out / "chkpnt10.pth").is_file() and not list(out.glob("events*"))


# ---- the order within an iteration ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """Checkpoints 1..14 of a run in which density steps replace all tensors but change no Gaussian: each holds what
    its iteration rendered, before the update."""
    folder = tmp_path_factory.mktemp("steps")
    still = ("--densify_grad_threshold", 1e9, "--prune_opacity", 0, "--use_dff", "--white_background")
    schedule = ("--densify_from_iter", 4, "--densification_interval", 3, "--densify_until_iter", 12)
    train_at(
        write(folder / "data", blobs()), folder / "out", *still, *schedule, "--opacity_reset_interval", 8,
        "--iterations", 14, "--checkpoint_iterations", *range(1, 14),
    )  # fmt: skip
    return {i: checkpoint(folder / "out", i) for i in range(1, 15)}


def changed(steps, iteration):
    before, after = steps[iteration].params, steps[iteration + 1].params
    return {name for name in before if not torch.equal(before[name], after[name])}


MOVING = {"xyz", "f_dc", "opacity", "scaling", "rotation", "m", "sigma", "w1"}


@pytest.mark.parametrize(
    ("iteration", "expected"),
    [
        (3, MOVING),  # not yet
        (4, MOVING),  # the white background's reset, which changes the opacities otherwise
        (5, MOVING),
        (6, set()),  # the exchange
        (7, MOVING),
        (9, set()),
        (11, MOVING),
        (12, MOVING),  # no longer
    ],
)
def test_an_exchange_costs_the_step(steps, iteration, expected):
    assert changed(steps, iteration) == expected


def test_learned_times_are_exchanged_by_nothing(steps):
    times = [steps[i].time_func for i in range(1, 15)]
    assert all(not torch.equal(a, b) for a, b in pairwise(times))


def test_steps_are_counted_through_exchanges(steps):
    saved = steps[14].optimizer
    names = [group["name"] for group in saved["param_groups"]]
    counts = {names[i]: int(entry["step"]) for i, entry in saved["state"].items()}
    # 13 updates but for those of 6 and 9; opacity also misses its resets, at 4 and 8.
    assert counts == dict.fromkeys(MOVING, 11) | {"opacity": 9, "time_func": 13}


@pytest.mark.parametrize("iteration", [4, 8])  # the white background's, and the interval's
def test_opacity_resets(steps, iteration):
    before, after = (torch.sigmoid(steps[i].params["opacity"]) for i in (iteration, iteration + 1))
    torch.testing.assert_close(after, before.clamp_max(0.01))
    saved = steps[iteration + 1].optimizer
    index = [group["name"] for group in saved["param_groups"]].index("opacity")
    assert (saved["state"][index]["exp_avg"] == 0).all()


def test_no_other_iteration_resets_opacities(steps):
    for iteration in set(range(1, 14)) - {4, 8}:
        moved = (steps[iteration + 1].params["opacity"] - steps[iteration].params["opacity"]).abs().max()
        assert moved < 0.1, iteration  # a few steps at 2.5e-2; a reset moves 0.1 to 0.01, 2.4 in logits


def test_density_steps_start_the_statistics_anew(steps):
    counts = {i: int(steps[i].statistics["denom"].max()) for i in steps}
    assert counts == {1: 1, 2: 2, 3: 3, 4: 4, 5: 5, 6: 6, 7: 1, 8: 2, 9: 3, 10: 1, 11: 2, 12: 2, 13: 2, 14: 2}


def test_a_black_background_is_not_reset_early(tmp_path):
    train_at(write(tmp_path / "data", blobs()), tmp_path / "out", "--densify_from_iter", 3, "--iterations", 5)
    assert torch.sigmoid(checkpoint(tmp_path / "out", 5).params["opacity"]).max() > 0.09


def test_density_control_grows_and_stops(tmp_path):
    flags = ("--densify_from_iter", 5, "--densification_interval", 5, "--densify_until_iter", 15)
    train_at(
        write(tmp_path / "data", blobs()), tmp_path / "out", *flags, "--iterations", 20,
        "--checkpoint_iterations", 5, 6, 10, 11, 15,
    )  # fmt: skip
    counts = [len(checkpoint(tmp_path / "out", i).params["xyz"]) for i in (5, 6, 10, 11, 15, 20)]
    assert counts[:3] == [150] * 3  # 5 is not after 5
    assert 150 < counts[3] == counts[4] == counts[5]  # 15 is not before 15


def test_what_is_scored_is_what_is_saved(tmp_path):
    # A density step is due in the iteration that is scored, and in the last: both come after.
    out = tmp_path / "out"
    train_at(
        write(tmp_path / "data", blobs()), out, "--densify_from_iter", 5, "--densification_interval", 10,
        "--densify_until_iter", 100, "--densify_grad_threshold", 0, "--iterations", 20, "--test_iterations", 10,
        "--save_iterations", 10, "--checkpoint_iterations", 10,
    )  # fmt: skip
    rows = json.loads((out / "evaluation.json").read_text())
    for iteration in (10, 20):
        saved = checkpoint(out, iteration)
        cloud, _ = read_point_cloud(out / "point_cloud" / f"iteration_{iteration}" / "point_cloud.ply")
        for name, value in saved.params.items():
            assert torch.equal(cloud[name], value), name
        model = GaussianModel(saved.params, saved.time_func, saved.active_sh_degree)
        frames = Frames.read(tmp_path / "data" / "original", say=str)
        images = render_frames(
            model, Camera(frames.width, frames.height, 1), range(len(frames)), torch.zeros(1)
        )
        scored = next(row for row in rows if row["iteration"] == iteration)
        assert psnr(images, frames(range(len(frames)))).mean() == pytest.approx(scored["psnr"], abs=1e-3)


def test_the_last_parameters_are_averaged(tmp_path):
    # From the update of iteration 15 on; a reset of the opacities at 17 begins anew.
    flags = ("--average_from_iter", 15, "--average_decay", 0.75, "--opacity_reset_interval", 17, "--use_dff")
    root, stills = write(tmp_path / "data", blobs()), range(14, 21)
    train_at(root, tmp_path / "a", *flags, "--iterations", 21, "--checkpoint_iterations", *stills)
    train_at(root, tmp_path / "raw", *flags[4:], "--iterations", 21, "--checkpoint_iterations", *stills)
    saved = {i: checkpoint(tmp_path / "a", i) for i in range(14, 22)}
    raw = {i: checkpoint(tmp_path / "raw", i) for i in range(14, 22)}
    assert [i for i in saved if "trained" in saved[i].extras] == [16, 17, 18, 19, 20, 21]
    for name, last in raw[21].params.items():
        assert torch.equal(saved[15].params[name], raw[15].params[name])
        assert torch.equal(saved[21].extras["trained"][name], last), (
            name
        )  # averages change nothing of the training
        mean = raw[18].params[name]  # after the reset
        for i in (19, 20, 21):
            mean = 0.75 * mean + 0.25 * raw[i].params[name]
        torch.testing.assert_close(saved[21].params[name], mean)
    assert not torch.equal(saved[21].time_func, raw[21].time_func)


def test_rates_decay_over_the_run(tmp_path):
    flags = ("--iterations", 4, "--position_lr_max_steps", 4, "--distance", 2, "--checkpoint_iterations", 2)
    train_at(write(tmp_path / "data", blobs()), tmp_path / "out", *flags)
    for iteration, rate in ((2, 1.6e-5), (4, 1.6e-6)):
        group = checkpoint(tmp_path / "out", iteration).optimizer["param_groups"][0]
        assert group["name"] == "xyz" and group["lr"] == pytest.approx(2.2 * rate)


def test_the_extent_is_an_option(tmp_path):
    train_at(
        write(tmp_path / "data", blobs()), tmp_path / "out", "--iterations", 1, "--extent_per_distance", 3
    )
    saved = checkpoint(tmp_path / "out", 1)
    assert saved.spatial_lr_scale == 3
    assert saved.optimizer["param_groups"][0]["lr"] == pytest.approx(3 * 1.6e-4, rel=1e-3)


def test_pruning_everything_ends_the_run_with_a_word(tmp_path, capsys):
    images, flags = (
        write(tmp_path / "data", blobs()),
        ("--densify_from_iter", 1, "--densification_interval", 2),
    )
    assert refused(images, tmp_path / "out", *flags, "--prune_opacity", 0.99, "--iterations", 4) == 2
    assert "iteration 2: every Gaussian was pruned" in capsys.readouterr().err


# ---- backgrounds, sizes and other options --------------------------------------------------------------------------


def test_a_random_background_is_drawn_once_and_kept(tmp_path):
    images = write(tmp_path / "data", colours())
    train_at(images, tmp_path / "out", "--random_background", "--iterations", 3, "--checkpoint_iterations", 1)
    first, last = (checkpoint(tmp_path / "out", i).extras["background"] for i in (1, 3))
    assert torch.equal(first, last) and first.shape == (3,) and len(set(first.tolist())) == 3
    start = tmp_path / "out" / "chkpnt3.pth"
    train_at(
        images,
        tmp_path / "on",
        "--random_background",
        "--seed",
        9,
        "--start_checkpoint",
        start,
        "--iterations",
        4,
    )
    assert torch.equal(
        checkpoint(tmp_path / "on", 4).extras["background"], first
    )  # a resumed run keeps its own
    train_at(images, tmp_path / "white", "--white_background", "--iterations", 1)
    assert checkpoint(tmp_path / "white", 1).extras["background"].tolist() == [1, 1, 1]


def test_resolution_and_images(tmp_path):
    images = write(tmp_path / "data", blobs())
    (images / "original").rename(images / "slices")
    train_at(images, tmp_path / "out", "-i", "slices", "-r", 2, "--iterations", 1)
    assert (
        checkpoint(tmp_path / "out", 1).extras["width"],
        checkpoint(tmp_path / "out", 1).extras["height"],
    ) == (12, 10)


@pytest.mark.parametrize(
    "flags",
    [("--batch_size", 1), ("--batch_size", 4), ("--poly_degree", 0), ("--sh_degree", 3), ("--num_pts", 1)],
)
def test_odd_sizes_train(tmp_path, flags):
    train_at(write(tmp_path / "data", blobs()), tmp_path / "out", *CONTROL, "--iterations", 14, *flags)
    params = checkpoint(tmp_path / "out", 14).params
    assert all(value.isfinite().all() for value in params.values())


@pytest.mark.parametrize("flags", [(), ("--use_dff",), ("--camera", "one", "--batch_size", 1)])
def test_one_frame_trains(tmp_path, flags):
    train_at(write(tmp_path / "data", blobs(1)), tmp_path / "out", *CONTROL, "--iterations", 14, *flags)


@pytest.mark.parametrize("flag", [("--debug",), ("--debug_from", 2)])
def test_debug_stops_at_values_that_are_not_finite(tmp_path, capsys, flag):
    images, out = write(tmp_path / "data", blobs()), tmp_path / "out"
    assert refused(images, out, *flag, "--iterations", 4, "--feature_lr", 1e38) == 2
    assert "is not finite" in capsys.readouterr().err.splitlines()[-1]


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, capsys):
    images, out = write(tmp_path / "data", blobs()), tmp_path / "out"
    assert refused(images, out, "--iterations", 30, "--lambda_l1", 1e39) == 2  # more than float32 holds
    assert "iteration 10: the l1 loss of img is not finite" in capsys.readouterr().err.splitlines()[-1]
    assert not list(out.glob("chkpnt*"))


def test_a_batch_of_more_images_than_one_call_draws_is_refused(tmp_path, capsys):
    images, out = write(tmp_path / "data", blobs(40)), tmp_path / "out"
    assert refused(images, out, "--batch_size", 64, "--ibfr_from_iter", 1) == 2
    assert "--batch_size" in capsys.readouterr().err.splitlines()[-1]
    assert not out.exists()


# ---- refused -------------------------------------------------------------------------------------------------------


def one_line(process_err: str) -> str:
    (line,) = process_err.splitlines()
    assert line.startswith("train.py: error: ")
    return line


def test_a_missing_folder_as_a_script(tmp_path):
    run = script("-s", tmp_path / "nowhere", "-m", tmp_path / "out")
    assert (run.returncode, run.stdout) == (2, "")
    assert "nowhere" in one_line(run.stderr) and not (tmp_path / "out").exists()


def broken(root):
    (root / "original" / "0002.png").write_bytes(b"\x89PNG\r\n\x1a\nno image")


def odd(root):
    from PIL import Image

    Image.fromarray(blobs(width=30)[0]).save(root / "original" / "0002.png")


def empty(root):
    for file in (root / "original").iterdir():
        file.unlink()


@pytest.mark.parametrize(
    ("spoil", "word"),
    [(broken, "0002.png"), (odd, "30 x 20"), (empty, "holds no frames")],
    ids=["broken", "odd", "empty"],
)
def test_frames_that_will_not_do(tmp_path, capsys, spoil, word):
    root = write(tmp_path / "data", blobs())
    spoil(root)
    assert refused(root, tmp_path / "out") == 2
    captured = capsys.readouterr()
    assert word in one_line(captured.err) and captured.out == ""
    assert not (tmp_path / "out").exists() and not (root / "mirror").exists()


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (("--pipeline", "both"), "both"),
        (("--iterations", "many"), "many"),
        (("--iterations", 0), "--iterations"),
        (("--no_such_flag",), "no_such_flag"),
        (("--use_dff", "perhaps"), "perhaps"),
        (("--pipeline", "joint"), "--seg_source_path"),
        (("--seg_head_only",), "--start_checkpoint"),
        (("--resolution", 0), "--resolution"),
        (("--device", "tpu"), "--device"),
        (("--device", "cuda:99"), "cuda:99"),
    ],
)
def test_flags_that_will_not_do(tmp_path, capsys, flags, word):
    assert refused(write(tmp_path / "data", blobs()), tmp_path / "out", *flags) == 2
    assert word in one_line(capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_an_output_folder_that_is_a_file(tmp_path, capsys):
    (tmp_path / "out").write_text("mine")
    images = write(tmp_path / "data", blobs())
    for out in (tmp_path / "out", tmp_path / "out" / "below"):
        assert refused(images, out, "--iterations", 1) == 2
        assert "in the way" in one_line(capsys.readouterr().err)
    assert (tmp_path / "out").read_text() == "mine"


def test_options_without_meaning_are_accepted_and_said(tmp_path, capsys):
    train_at(
        write(tmp_path / "data", blobs()),
        tmp_path / "out",
        "--train_test_exp",
        "-d",
        "depths",
        "--iterations",
        1,
    )
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ignored: ") and "--train_test_exp" in line


# ---- it learns -----------------------------------------------------------------------------------------------------


def psnr_at(iteration, name, out):
    (line,) = [line for line in out.splitlines() if line.startswith(f"[{iteration}] {name}: ")]
    return float(line.split("PSNR ")[1].split(" dB")[0])


@pytest.mark.parametrize("pipeline", ["img", "seg"])
def test_it_learns(tmp_path, capsys, monkeypatch, pipeline):
    images = write(tmp_path / "data", blobs() if pipeline == "img" else masks())
    rate = ("--feature_lr", 0.05)  # colours reach black and white in time
    flags = (
        "--pipeline",
        pipeline,
        "--iterations",
        300,
        "--test_iterations",
        1,
        "--densify_until_iter",
        0,
        *rate,
    )
    loud = [flag for flag in arguments(images, tmp_path / "out", *flags) if flag != "--quiet"]
    monkeypatch.setattr(sys, "argv", loud)
    train.main()
    out = capsys.readouterr().out
    start, end = (psnr_at(i, pipeline, out) for i in (1, 300))
    assert end > start + 4, (start, end)
    if pipeline == "seg":
        assert float(out.split("Dice ")[-1].split()[0]) > 0.5


def test_it_learns_well(tmp_path, capsys, monkeypatch):
    images = write(tmp_path / "data", blobs())
    flags = ("--num_pts", 500, "--iterations", 900, "--test_iterations", 1, "--ibfr_from_iter", 300)
    loud = [flag for flag in arguments(images, tmp_path / "out", *flags) if flag != "--quiet"]
    monkeypatch.setattr(sys, "argv", loud)
    train.main()
    out = capsys.readouterr().out
    start, end = (psnr_at(i, "img", out) for i in (1, 900))
    assert end > max(start + 8, 22), (start, end)
