"""Runs that are stopped, killed and resumed: nothing is lost, and the result is that of an undisturbed run."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from forked import ROOT, Run, Server
from sequences import (
    arguments,
    assert_same_state,
    blobs,
    checkpoint,
    masks,
    refused,
    train_at,
    write,
)

import train
import training.density_control
import training.iteration
import training.run
from scene.checkpoint import all_of, load_checkpoint
from scene.point_cloud import read_point_cloud
from utils.files import LOCK, own_folder

# Density steps at 10, 15, 20, ... that add and prune; resets of the opacities at 12, 24, ...; in-betweens from 8 on.
CONTROL = (
    "--densify_from_iter", 5, "--densification_interval", 5, "--densify_until_iter", 1000, "--ibfr_from_iter", 8,
    "--ibfr_skip", 3, "--opacity_reset_interval", 12, "--prune_opacity", 0.005, "--max_gaussians", 400,
)  # fmt: skip
AUTO = ("--start_checkpoint", "auto")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Data roots of images and of their masks."""
    folder = tmp_path_factory.mktemp("data")
    return write(folder / "img", blobs()), write(folder / "seg", masks())


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with Server(tmp_path_factory.mktemp("logs")) as server:
        yield server


def until(condition, seconds=60):
    """Waits for it."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.001)


def said(capsys):
    captured = capsys.readouterr()
    return captured.out + captured.err


def loud(root, out, *more):
    """A run in this process that is not --quiet."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [a for a in arguments(root, out, *more) if a != "--quiet"])
        return train.main()


# ---- exactly -------------------------------------------------------------------------------------------------------

PIPELINES = {
    "img": (),
    "img, colours with directions, learned times": ("--sh_degree", 3, "--sh_degree_interval", 6, "--use_dff"),
    "seg": ("--pipeline", "seg"),
    "joint": ("--pipeline", "joint"),
}


# 9: between steps; 10: a density step, so that no gradient is left; 12: a reset; 14: in-betweens and statistics.
@pytest.mark.parametrize("stop", [9, 10, 12, 14])
@pytest.mark.parametrize("case", PIPELINES)
def test_a_run_that_was_over_goes_on_as_a_longer_one(data, tmp_path, case, stop):
    """N iterations are over, their last without a step, as published; N + M are those of a run of N + M."""
    images, seg = data
    root = seg if case == "seg" else images
    flags = [*PIPELINES[case], *CONTROL, *(("--seg_source_path", seg) if case == "joint" else ())]
    train_at(root, tmp_path / "whole", *flags, "--iterations", 21)
    train_at(root, tmp_path / "parts", *flags, "--iterations", stop)
    over = (tmp_path / "parts" / f"chkpnt{stop}.pth").read_bytes()
    train_at(root, tmp_path / "parts", *flags, "--iterations", 21, *AUTO)
    whole, parts = (checkpoint(tmp_path / name, 21) for name in ("whole", "parts"))
    assert_same_state(whole, parts)
    for name, gradient in whole.extras["gradients"].items():
        assert torch.equal(parts.extras["gradients"][name], gradient)
    clouds = [
        tmp_path / name / "point_cloud" / "iteration_21" / "point_cloud.ply" for name in ("whole", "parts")
    ]
    assert clouds[0].read_bytes() == clouds[1].read_bytes()
    assert (tmp_path / "parts" / f"chkpnt{stop}.pth").read_bytes() == over
    params, _ = read_point_cloud(clouds[0])  # what is saved is what was drawn: the step is kept, not taken
    assert torch.equal(params["xyz"], whole.params["xyz"])


def test_averages_go_on_too(data, tmp_path):
    images, _ = data
    flags = [*CONTROL, "--densify_until_iter", 13, "--average_from_iter", 11, "--average_decay", 0.7]
    flags += ["--sh_degree", 2, "--sh_degree_interval", 14]  # raised in an iteration in which a run stops
    train_at(images, tmp_path / "whole", *flags, "--iterations", 21)
    for stop in (11, 12, 14, 18):  # before there are any; one; a density step between them and the end; later
        out = tmp_path / f"parts{stop}"
        train_at(images, out, *flags, "--iterations", stop)
        train_at(images, out, *flags, "--iterations", 21, *AUTO)
        whole, parts = checkpoint(tmp_path / "whole", 21), checkpoint(out, 21)
        assert_same_state(whole, parts)
        for name, value in whole.extras["trained"].items():
            assert torch.equal(parts.extras["trained"][name], value), name


def test_it_goes_on_from_any_iteration(data, tmp_path):
    flags = (*CONTROL, "--iterations", 16)
    train_at(data[0], tmp_path / "whole", *flags, "--checkpoint_interval", 1)
    whole = checkpoint(tmp_path / "whole", 16)
    for start in range(1, 16):
        file = tmp_path / "whole" / f"chkpnt{start}.pth"
        train_at(data[0], tmp_path / f"from{start}", *flags, "--start_checkpoint", file)
        assert_same_state(whole, checkpoint(tmp_path / f"from{start}", 16))


def test_nothing_random_but_the_generator_of_the_run(data, tmp_path):
    """Why the states of Python's, NumPy's and torch's own generators need not be in a checkpoint."""
    results = []
    for seed in (1, 2):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
        train_at(data[0], tmp_path / str(seed), *CONTROL, "--iterations", 12)
        after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
        assert before[:2] == after[:2] and torch.equal(before[2], after[2])
        results.append(checkpoint(tmp_path / str(seed), 12))
    assert_same_state(*results)


# ---- auto ----------------------------------------------------------------------------------------------------------


def test_auto_starts_anew_where_there_is_nothing(data, tmp_path, capsys):
    assert loud(data[0], tmp_path / "out", *AUTO, "--iterations", 3) == 0
    assert "no checkpoint that can be read: starting anew" in said(capsys)
    train_at(data[0], tmp_path / "fresh", "--iterations", 3)
    assert_same_state(checkpoint(tmp_path / "out", 3), checkpoint(tmp_path / "fresh", 3))


def test_auto_needs_a_folder(data, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "-s", str(data[0]), "--start_checkpoint", "auto"])
    with pytest.raises(SystemExit) as ended:
        train.run(train.main)
    assert ended.value.code == 2 and "-m FOLDER" in capsys.readouterr().err


def test_auto_where_all_is_done_does_nothing(data, tmp_path, capsys):
    train_at(data[0], tmp_path / "out", "--iterations", 3)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert loud(data[0], tmp_path / "out", *AUTO, "--iterations", 3) == 0
    assert "chkpnt3.pth is already at iteration 3: nothing to do" in said(capsys)
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*") if p.is_file()}
    start = ("--start_checkpoint", tmp_path / "out" / "chkpnt3.pth")  # by name it is a mistake
    assert refused(data[0], tmp_path / "out", *start, "--iterations", 3) == 2


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_torn_newest_checkpoint_is_reported_and_the_one_before_used(data, tmp_path, capsys, share):
    flags = (*CONTROL, "--iterations", 14)
    train_at(data[0], tmp_path / "out", *flags, "--checkpoint_iterations", 9)
    whole = checkpoint(tmp_path / "out", 14)
    torn = tmp_path / "out" / "chkpnt14.pth"
    torn.write_bytes(torn.read_bytes()[: int(share * torn.stat().st_size)])
    assert loud(data[0], tmp_path / "out", *flags, *AUTO, "--keep_checkpoints", 2) == 0
    words = said(capsys)
    assert "passed over" in words and "chkpnt14.pth is damaged" in words
    assert "chkpnt9.pth at iteration 9" in words
    assert_same_state(whole, checkpoint(tmp_path / "out", 14))


def test_where_all_are_torn_it_starts_anew_and_says_so(data, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "chkpnt5.pth").write_bytes(b"torn")
    assert loud(data[0], out, *AUTO, "--iterations", 2) == 0
    words = said(capsys)
    assert "passed over" in words and "starting anew" in words


def test_a_head_alone_has_nothing_to_start_anew_from(data, tmp_path, capsys):
    assert refused(data[1], tmp_path / "out", "--pipeline", "seg", "--seg_head_only", *AUTO) == 2
    assert "needs a model" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_auto_does_not_begin_another_training(data, tmp_path, capsys):
    train_at(data[0], tmp_path / "out", "--iterations", 2)
    joint = ("--pipeline", "joint", "--seg_source_path", data[1], "--iterations", 4)
    assert refused(data[0], tmp_path / "out", *joint, *AUTO) == 2
    assert "give that file to --start_checkpoint by its name" in capsys.readouterr().err


def test_a_run_among_older_checkpoints_says_so(data, tmp_path, capsys):
    train_at(data[0], tmp_path / "out", "--iterations", 4)
    loud(data[0], tmp_path / "out", "--iterations", 2)
    assert "holds checkpoints of an earlier run, up to iteration 4" in said(capsys)
    assert set(all_of(tmp_path / "out")) == {2, 4}


# ---- the same run? -------------------------------------------------------------------------------------------------


def test_options_that_changed_are_listed(data, tmp_path, capsys):
    train_at(data[0], tmp_path / "out", "--iterations", 2, "--save_iterations", 1)
    flags = ("--lambda_l1", 3, "--opacity_lr", 0.01, "--iterations", 4)
    loud(data[0], tmp_path / "out", *AUTO, *flags)
    (line,) = [line for line in said(capsys).splitlines() if line.startswith("options that changed")]
    assert line.split(": ")[1].split(", ") == [
        "--iterations 4 (was 2)",
        "--save_iterations [30000] (was [1])",
        "--lambda_l1 3.0 (was 2.0)",
        "--opacity_lr 0.01 (was 0.025)",
    ]
    loud(data[0], tmp_path / "out", *AUTO, *flags[:-1], 4, "--iterations", 5, "--debug_from", 100)
    (line,) = [line for line in said(capsys).splitlines() if line.startswith("options that changed")]
    assert line.endswith(": --iterations 5 (was 4)")  # what does not matter is not listed


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (("--pipeline", "seg"), "--pipeline seg: the run of"),
        (("--white_background",), "--white_background True"),
        (("--random_background",), "--random_background True"),
        (("--distance", 2), "--distance 1.0"),
        (("--resolution", 12), "24 x 20 pixels, these are 12 x 10"),
        (("--poly_degree", 2), "--poly_degree 2"),
        (("--sh_degree", 1), "--sh_degree 1"),
        (("--use_dff",), "--use_dff True"),
    ],
)
def test_changes_that_make_resuming_meaningless_are_refused(data, tmp_path, capsys, flags, word):
    train_at(data[0], tmp_path / "out", "--iterations", 2)
    before = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert refused(data[0], tmp_path / "out", *AUTO, "--iterations", 4, *flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert word in line
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == before


def test_other_frames_are_refused(data, tmp_path, capsys):
    train_at(data[0], tmp_path / "out", "--iterations", 2)
    others = write(tmp_path / "other", [255 - frame for frame in blobs()])
    assert refused(others, tmp_path / "out", *AUTO, "--iterations", 4) == 2
    assert "other frames" in capsys.readouterr().err
    gap = write(tmp_path / "gap", blobs())
    (gap / "original" / "0004.png").rename(gap / "original" / "0007.png")
    assert refused(gap, tmp_path / "out", *AUTO, "--iterations", 4) == 2
    assert "frame number 4 where" in capsys.readouterr().err
    fewer = write(tmp_path / "fewer", blobs(4))
    assert refused(fewer, tmp_path / "out", *AUTO, "--iterations", 4) == 2
    assert "5 frames" in capsys.readouterr().err
    moved = shutil.copytree(data[0], tmp_path / "moved")  # the same frames at another place
    train_at(moved, tmp_path / "out", *AUTO, "--iterations", 4)


def test_what_cannot_start_is_refused_before_motion_is_computed(data, tmp_path, capsys, monkeypatch):
    """It takes minutes."""

    def never(*_, **__):
        raise AssertionError("it went on")

    out = tmp_path / "out"
    train_at(data[0], out, "--iterations", 2)
    monkeypatch.setattr("training.data.InBetween", SimpleNamespace(load=never))
    best = ("--preset", "best", "--iterations", 2)
    for options, words in (
        (("--start_checkpoint", tmp_path / "missing.pth"), "missing.pth does not exist"),
        (("--start_checkpoint", out / "chkpnt2.pth", "--resolution", 2), "was trained on frames of"),
        (("--start_checkpoint", out / "chkpnt2.pth"), "give more --iterations"),
    ):
        assert refused(data[0], out, *best, *options) == 2
        assert words in capsys.readouterr().err
    assert refused(write(tmp_path / "many", blobs(40)), tmp_path / "anew", *best, "--batch_size", 40) == 2
    assert "--batch_size 40 asks for 79 images" in capsys.readouterr().err
    with pytest.raises(AssertionError, match="went on"):
        train_at(data[0], tmp_path / "anew", *best)


# ---- killed --------------------------------------------------------------------------------------------------------

KILLED = ("--iterations", 60, "--checkpoint_interval", 4, "--keep_checkpoints", 2, "--test_iterations", 30)


def kill_often(server: Server, root: Path, out: Path, moments: int, seed: int) -> dict[str, int]:
    """Runs with auto that are killed, every other one in the midst of a save; what was found afterwards."""
    chance, counts = random.Random(seed), {"killed": 0, "during a save": 0, "files read": 0}
    while counts["killed"] < moments:
        saving = counts["killed"] % 2
        flags = arguments(root, out, *CONTROL, *KILLED, *AUTO)
        run = server.start(flags, die_at=chance.randrange(10, 50) if saving else 0)
        if not saving:
            time.sleep(chance.uniform(0.0, 0.4))
            run.kill()
        status = run.wait()
        assert status in (0, -signal.SIGKILL), run.log.read_text()
        counts["killed"] += status != 0
        counts["during a save"] += status != 0 and saving
        for file in [*out.glob("*.pth"), *out.glob("*.json"), *out.glob("cfg_args"), *out.rglob("*.ply")]:
            if file.name.startswith("."):
                continue  # a temporary, which no one reads
            if file.suffix == ".pth":
                load_checkpoint(file)
            elif file.name == "point_cloud.ply":
                read_point_cloud(file)
            else:
                assert file.stat().st_size > 0
            counts["files read"] += 1
        assert len(all_of(out)) <= 3  # two, and for an instant the one that pushes the oldest out
        if status == 0:  # it came to its end: all over again
            shutil.rmtree(out)
    return counts


@pytest.mark.parametrize(
    ("moments", "seed"), [(20, 0), pytest.param(100, 1, marks=pytest.mark.slow)], ids=["20", "100"]
)
def test_killed_at_random_moments_it_ends_as_if_left_alone(data, server, tmp_path, moments, seed):
    train_at(data[0], tmp_path / "whole", *CONTROL, *KILLED)
    out = tmp_path / "out"
    counts = kill_often(server, data[0], out, moments, seed)
    assert counts["killed"] == moments and counts["during a save"] == moments // 2
    last = server.start(arguments(data[0], out, *CONTROL, *KILLED, *AUTO))
    assert last.wait() == 0, last.log.read_text()
    assert_same_state(checkpoint(tmp_path / "whole", 60), checkpoint(out, 60))
    # What the dead left behind is gone.
    assert not [path for path in out.rglob(".*") if path.is_file()]


# ---- asked to stop -------------------------------------------------------------------------------------------------

LONG = ("--iterations", 100_000, *CONTROL)


def started(server: Server, root: Path, out: Path, *more: object) -> Run:
    """A run that is in its loop."""
    flags = [a for a in arguments(root, out, *LONG, "--checkpoint_interval", 5, *more) if a != "--quiet"]
    run = server.start(flags)
    until(lambda: all_of(out))
    return run


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_asked_to_stop_it_saves_and_says_how_to_go_on(data, server, tmp_path, number, status):
    out = tmp_path / "out"
    run = started(server, data[0], out)
    run.kill(number)
    assert run.wait() == status, run.log.read_text()
    words = run.log.read_text()
    newest = max(all_of(out))
    assert "finishing the iteration, then saving" in words and "Traceback" not in words
    assert f"stopped at iteration {newest} of 100000" in words
    assert f"-m {out} --start_checkpoint auto" in words
    assert not (out / LOCK).exists() and (out / "time.json").is_file()
    end = newest + 3
    train_at(data[0], out, *CONTROL, *AUTO, "--iterations", end)
    train_at(data[0], tmp_path / "whole", *CONTROL, "--iterations", end)
    assert_same_state(checkpoint(tmp_path / "whole", end), checkpoint(out, end))


def test_the_second_ctrl_c_stops_at_once(data, tmp_path, monkeypatch, capfd):
    """Also in the middle of the save that the first one led to: what was there before is untouched."""

    def slow(path, *_):
        path.with_name(".chkpnt.deadbeef.pth").write_bytes(b"half of it")
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
        raise AssertionError("it went on")

    monkeypatch.setattr(training.run, "save_checkpoint", slow)
    step = training.iteration.named_losses

    def press_once(*things):
        os.kill(os.getpid(), signal.SIGINT)
        return step(*things)

    monkeypatch.setattr(training.iteration, "named_losses", press_once)
    before = signal.getsignal(signal.SIGINT)
    assert refused(data[0], tmp_path / "out", "--iterations", 30) == 130
    words = capfd.readouterr().err
    assert "again to stop at once" in words and "interrupted" in words
    assert not all_of(tmp_path / "out") and signal.getsignal(signal.SIGINT) is before


# ---- one run a folder ----------------------------------------------------------------------------------------------


def test_the_second_run_in_a_folder_is_refused_while_the_first_lives(data, server, tmp_path, capsys):
    out = tmp_path / "out"
    run = started(server, data[0], out)
    before = (out / "cfg_args").stat().st_mtime_ns
    assert refused(data[0], out, *AUTO, "--iterations", 1) == 2
    line = capsys.readouterr().err
    assert f"process {run.pid} on " in line and "in use by another run" in line
    assert (out / "cfg_args").stat().st_mtime_ns == before
    run.kill()
    run.wait()
    assert (out / LOCK).is_file()  # stale
    end = max(all_of(out)) + 1
    train_at(data[0], out, *CONTROL, *AUTO, "--iterations", end)
    assert not (out / LOCK).exists()


def test_a_lock_is_let_go_of_and_empty_folders_go(tmp_path):
    out = tmp_path / "new" / "deep" / "out"
    with pytest.raises(RuntimeError), own_folder(out):
        assert (out / LOCK).is_file()
        raise RuntimeError
    assert not (tmp_path / "new").exists()
    with own_folder(out):
        (out / "mine").touch()
    assert [path.name for path in out.iterdir()] == ["mine"]
    with own_folder(out):
        pass
    assert out.is_dir()  # it was there before


# ---- checkpoints are bounded ---------------------------------------------------------------------------------------


def test_keep_checkpoints_bounds_their_number(data, tmp_path):
    flags = ("--iterations", 11, "--checkpoint_interval", 3, "--checkpoint_iterations", 4)
    train_at(data[0], tmp_path / "all", *flags)
    assert list(all_of(tmp_path / "all")) == [3, 4, 6, 9, 11]
    train_at(data[0], tmp_path / "some", *flags, "--keep_checkpoints", 2)
    assert list(all_of(tmp_path / "some")) == [9, 11]


# ---- full disks ----------------------------------------------------------------------------------------------------


def intact(out: Path, iteration: int) -> None:
    """Checkpoint ``iteration`` and all others can be read, and nothing is half-written."""
    load_checkpoint(out / f"chkpnt{iteration}.pth")
    assert not [path for path in out.rglob(".*") if path.is_file()]
    for file in out.rglob("point_cloud.ply"):
        read_point_cloud(file)


def test_a_file_that_the_system_cuts_short_ends_the_run_with_a_word(data, server, tmp_path, capsys):
    """As on a full disk: writing fails in the middle of the file, here at a bound on its size."""
    out = tmp_path / "out"
    flags = (*CONTROL, "--save_iterations", -1, "--test_iterations", 1)
    train_at(data[0], out, *flags, "--iterations", 9)
    size = (out / "chkpnt9.pth").stat().st_size
    script = (
        f"import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({size // 2}, {size // 2}))\n"
        f"sys.argv = {arguments(data[0], out, *flags, *AUTO, '--iterations', 11, '--checkpoint_interval', 1)}\n"
        "import train; train.run(train.main)"
    )
    run = python(script)
    assert run.returncode == 1, run.stderr
    (line,) = run.stderr.splitlines()
    assert line.endswith(f"File too large: {out / 'chkpnt10.pth'}")
    intact(out, 9)


def python(script: str, *before: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), *sys.path])
    return subprocess.run(
        [*before, sys.executable, "-c", script], capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def can_mount() -> bool:
    command = ["unshare", "--mount", "--map-root-user", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not can_mount(), reason="mounting a file system is not allowed here")
def test_a_full_disk_ends_the_run_with_a_word_and_loses_nothing(data, tmp_path):
    """A disk of 1 MB, which holds a few checkpoints."""
    disk = tmp_path / "disk"
    disk.mkdir()
    flags = arguments(data[0], disk / "out", *CONTROL, "--iterations", 100, "--checkpoint_interval", 5)
    script = (
        f"import os, shutil, sys; sys.argv = {flags}\n"
        "import train\n"
        "try: train.run(train.main)\n"
        f"finally: shutil.copytree({str(disk / 'out')!r}, {str(tmp_path / 'copy')!r})"
    )
    mount = f"mount -t tmpfs -o size=1m tmpfs '{disk}' && exec \"$@\""
    run = python(script, "unshare", "--mount", "--map-root-user", "sh", "-c", mount, "sh")
    assert run.returncode == 2, run.stderr
    (line,) = run.stderr.splitlines()
    assert "no space left on the disk for" in line and "free some" in line
    saved = all_of(tmp_path / "copy")
    assert saved
    intact(tmp_path / "copy", max(saved))
    end = max(saved) + 1
    train_at(data[0], tmp_path / "copy", *CONTROL, *AUTO, "--iterations", end)
    train_at(data[0], tmp_path / "whole", *CONTROL, "--iterations", end)
    assert_same_state(checkpoint(tmp_path / "whole", end), checkpoint(tmp_path / "copy", end))


# ---- numbers that go wrong -----------------------------------------------------------------------------------------


def poison(monkeypatch, iteration, name, where, value=float("nan")):
    """From its step on, ``iteration`` has a gradient or a parameter that is not finite."""
    adam = train.Training.start

    def start(*things):
        training = adam(*things)
        step = training.optimizer.step

        def spoiled():
            if training.iteration == iteration:
                parameter = training.model.params[name]
                (parameter.grad if where == "gradient" else parameter.data).view(-1)[3] = value
            step()

        training.optimizer.step = spoiled
        return training

    monkeypatch.setattr(train.Training, "start", start)


@pytest.mark.parametrize("where", ["gradient", "parameter"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["xyz", "sigma", "opacity"])
def test_what_is_not_finite_stops_the_run_within_the_interval(
    data, tmp_path, capsys, monkeypatch, where, value, name
):
    """A Gaussian that is not finite is not drawn: the loss alone would never show it."""
    flags = ("--iterations", 40, "--checkpoint_iterations", 9)
    poison(monkeypatch, 13, name, where, value)
    assert refused(data[0], tmp_path / "out", *flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "iteration 20: the " in line and name in line and "chkpnt9.pth is kept" in line
    assert list(all_of(tmp_path / "out")) == [9]
    checkpoint(tmp_path / "out", 9)


def test_a_checkpoint_that_is_not_finite_is_not_written(data, tmp_path, capsys, monkeypatch):
    """Not even over an older one of the same iteration, and not even between two checks."""
    out = tmp_path / "out"
    train_at(data[0], out, "--iterations", 16, "--checkpoint_iterations", 13)
    good = (out / "chkpnt13.pth").read_bytes()
    poison(monkeypatch, 12, "xyz", "parameter")
    assert refused(data[0], out, "--iterations", 16, "--checkpoint_iterations", 13) == 2
    assert "iteration 13: the xyz is not finite" in capsys.readouterr().err
    assert (out / "chkpnt13.pth").read_bytes() == good


@pytest.mark.parametrize("pipeline", ["img", "seg"])
@pytest.mark.parametrize("term", ["l1", "ssim", "ibfr", "sigma"])
def test_the_term_that_went_wrong_is_named(data, tmp_path, capsys, monkeypatch, pipeline, term):
    if pipeline == "seg" and term in ("ssim", "ibfr"):
        pytest.skip("masks have no such term")
    real = training.iteration.loss_terms

    def spoiled(task, *images, iteration, **more):
        terms = real(task, *images, iteration=iteration, **more)
        if task.name == pipeline and iteration >= 14:
            terms[term] = terms[term] * float("nan")
        return terms

    monkeypatch.setattr(training.iteration, "loss_terms", spoiled)
    joint = ("--pipeline", "joint", "--seg_source_path", data[1], "--ibfr_from_iter", 1)
    assert refused(data[0], tmp_path / "out", *joint, "--iterations", 40) == 2
    assert f"iteration 20: the {term} loss of {pipeline} is not finite" in capsys.readouterr().err
    assert refused(data[0], tmp_path / "out", *joint, "--iterations", 40, "--debug") == 2
    assert f"iteration 14: the {term} loss of {pipeline} is not finite" in capsys.readouterr().err


# ---- memory --------------------------------------------------------------------------------------------------------


def test_densification_stops_at_the_bound_and_says_so_once(data, tmp_path, capsys):
    flags = (
        "--densify_from_iter",
        1,
        "--densification_interval",
        2,
        "--iterations",
        20,
        "--prune_opacity",
        0,
    )
    loud(data[0], tmp_path / "out", *flags, "--max_gaussians", 170, "--checkpoint_interval", 1)
    (line,) = [line for line in said(capsys).splitlines() if "--max_gaussians" in line]
    assert "of --max_gaussians 170" in line
    counts = [len(checkpoint(tmp_path / "out", i).params["xyz"]) for i in range(1, 21)]
    assert 169 <= max(counts) <= 170  # one that is cloned and split at once needs room for two


def test_the_bound_comes_from_the_free_memory_and_stays_the_runs(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(training.density_control, "free_memory", lambda device: 4_000_000)
    out = tmp_path / "out"
    train_at(data[0], out, "--iterations", 2)
    bound = checkpoint(out, 2).extras["options"]["max_gaussians"]
    assert 150 < bound < 2000
    monkeypatch.setattr(training.density_control, "free_memory", lambda device: 400_000_000)
    train_at(data[0], out, *AUTO, "--iterations", 3)
    assert checkpoint(out, 3).extras["options"]["max_gaussians"] == bound
    train_at(data[0], out, *AUTO, "--iterations", 4, "--max_gaussians", 777)
    assert checkpoint(out, 4).extras["options"]["max_gaussians"] == 777
    monkeypatch.setattr(training.density_control, "free_memory", lambda device: 40_000)
    assert refused(data[0], tmp_path / "other", "--iterations", 1) == 2
    assert "--max_gaussians" in capsys.readouterr().err and not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "out of GPU memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "out of memory"),
        (MemoryError(), "out of memory"),
    ],
)
def test_out_of_memory_names_what_would_help(data, tmp_path, capsys, monkeypatch, error, words):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(training.iteration, "render", fail)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", arguments(data[0], tmp_path / "out", "--iterations", 1))
        train.run(train.main, train.IF_OUT_OF_MEMORY)
    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
    for option in ("--max_gaussians", "--num_pts", "--batch_size", "--resolution", "--data_device cpu"):
        assert option in line
