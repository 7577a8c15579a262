"""The stages that an iteration announces for measurements."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
from sequences import blobs, train_at, write

from utils.stages import stage, watched


def test_an_iteration_announces_its_stages_in_order(tmp_path):
    announced = []

    @contextmanager
    def watch(name):
        announced.append(name)
        yield
        assert announced[-1] == name  # none within another

    with watched(watch):
        train_at(write(tmp_path / "data", blobs()), tmp_path / "out", "--iterations", 2)
    announced = announced[announced.index("rates") :]  # before it, the forecast tries a few iterations
    first = ["rates", "fold", "blend", "loss", "backward", "statistics", "density", "optimizer"]
    assert announced[:8] == first
    assert announced[8:14] == ["rates", "fold", "blend", "loss", "backward", "statistics"]
    assert set(announced[14:]) == {"fold", "blend"}  # the evaluation; a run's last iteration takes no step


def test_nobody_watches_afterwards_even_when_it_failed():
    seen = []

    @contextmanager
    def watch(name):
        seen.append(name)
        yield

    with pytest.raises(ZeroDivisionError), watched(watch), stage("one"):
        raise ZeroDivisionError
    with stage("two"):
        pass
    assert seen == ["one"]


def test_one_watch_at_a_time():
    @contextmanager
    def watch(name):
        yield

    with watched(watch), pytest.raises(RuntimeError, match="already being watched"), watched(watch):
        pass
