"""Iterations recorded as CUDA graphs: what they train is bit-identical to the loop without them."""

from __future__ import annotations

import subprocess
import sys
import weakref

import pytest
import torch
from sequences import arguments, blobs, masks, train_at, write

import train
from scene.checkpoint import load_checkpoint
from training import recording

pytestmark = pytest.mark.cuda

GPU = ("--device", "cuda")
# Density steps, a reset of the opacities, in-betweens and the end of L_sigma all fall into 45 iterations.
CONTROL = (
    "--densify_from_iter", 5, "--densification_interval", 5, "--opacity_reset_interval", 20, "--ibfr_from_iter", 8,
    "--densify_until_iter", 30, "--sigma_until_iter", 35, "--iterations", 45,
)  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    return write(root / "images", blobs()), write(root / "masks", masks())


def trained(root, folder, *options):
    train_at(root, folder, *CONTROL, *options, *GPU)
    return load_checkpoint(folder / "chkpnt45.pth")


def assert_same(first, second):
    assert first.params.keys() == second.params.keys()
    for name, value in first.params.items():
        assert torch.equal(value, second.params[name]), name
    assert torch.equal(first.time_func, second.time_func)
    for name, value in first.statistics.items():
        assert torch.equal(value, second.statistics[name]), name


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--use_dff",),
        ("--batch_size", 1),
        ("--sh_degree", 1, "--sh_degree_interval", 15),
        ("--antialiasing",),  # which is not recorded
    ],
)
def test_images_train_alike(data, tmp_path, options):
    eager = trained(data[0], tmp_path / "eager", *options, "--debug")
    assert_same(trained(data[0], tmp_path / "replayed", *options), eager)


@pytest.mark.parametrize("pipeline", ["seg", "joint"])
def test_masks_train_alike(data, tmp_path, pipeline):
    options = ["--pipeline", pipeline]
    if pipeline == "joint":
        options += ["--seg_source_path", data[1]]
    root = data[0] if pipeline == "joint" else data[1]
    eager = trained(root, tmp_path / "eager", *options, "--debug")
    assert_same(trained(root, tmp_path / "replayed", *options), eager)


def test_too_little_room_is_noticed(data, tmp_path, monkeypatch):
    # Without spare room every recording is too small for some views, and must be remade.
    recorded = []

    def record(self, *more, capacity):
        recorded.append(capacity)
        return original(self, *more, capacity=min(capacity, 40) if len(recorded) % 2 else capacity)

    original = recording.RecordedStep._capture
    eager = trained(data[0], tmp_path / "eager", "--debug")
    monkeypatch.setattr(recording.RecordedStep, "_capture", record)
    assert_same(trained(data[0], tmp_path / "replayed"), eager)
    assert len(recorded) > 10 and max(recorded) > 40


def test_where_memory_is_short_a_recording_is_made_with_what_the_others_had(data, tmp_path, monkeypatch):
    original, attempts = recording.RecordedStep._capture, []

    def capture(self, *arguments, capacity):
        large = torch.zeros(1000)  # of the attempt: gone when the next one begins
        assert not attempts or attempts[-1]() is None
        attempts.append(weakref.ref(large))
        if len(attempts) in (1, 3, 7):
            raise torch.cuda.OutOfMemoryError
        return original(self, *arguments, capacity=capacity)

    eager = trained(data[0], tmp_path / "eager", "--debug")
    monkeypatch.setattr(recording.RecordedStep, "_capture", capture)
    assert_same(trained(data[0], tmp_path / "replayed"), eager)


def test_motion_is_found_deterministically(data, tmp_path):
    options = ("--preset", "fast", "--deterministic", "--pipeline", "joint", "--seg_source_path", data[1])
    first, second = (trained(data[0], tmp_path / name, *options) for name in ("first", "second"))
    torch.use_deterministic_algorithms(False)
    assert_same(first, second)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_second_gpu_trains_alike_and_leaves_the_first_alone(data, tmp_path):
    options = ("--preset", "fast", "--deterministic")
    before = torch.cuda.memory_allocated(0)
    torch.cuda.reset_peak_memory_stats(0)
    train_at(data[0], tmp_path / "second", *CONTROL, *options, "--device", "cuda:1")
    assert torch.cuda.max_memory_allocated(0) == before
    train_at(data[0], tmp_path / "first", *CONTROL, *options, "--device", "cuda:0")
    torch.use_deterministic_algorithms(False)
    second, first = (load_checkpoint(tmp_path / name / "chkpnt45.pth") for name in ("second", "first"))
    assert_same(second, first)


def test_memory_of_a_recording_outlives_its_last_replay(tmp_path):
    # Large enough for the GPU to be behind when a density step gives the memory back. In its own process, as
    # reading freed memory makes the GPU unusable for the rest of a process.
    root = write(tmp_path / "data", masks(count=9, width=200, height=200))
    schedule = ("--densify_from_iter", 5, "--densification_interval", 5, "--iterations", 300)
    command = arguments(
        root, tmp_path / "out", "--pipeline", "seg", "--num_pts", 100_000, *schedule, "--quiet", *GPU
    )
    done = subprocess.run([sys.executable, train.__file__, *command[1:]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
