"""The forecast of a run's duration, and that --time ends it on time: on a simulated clock, and as a program."""

import json
import re
import time

import pytest
import torch
from sequences import arguments, blobs, checkpoint, masks, train_at, write

import train
import training.loop
from arguments import TrainOptions
from training.budget import Budget, Forecast, forecast
from training.run import Training
from training.schedule import replan
from utils.timing import Parts, in_words


class Simulation:
    """A run on its own clock. pace: seconds of iteration i of n."""

    def __init__(self, minutes, pace, total=600, rest=0.0, started=0.0):
        self.now, self.averaged_at = started, []
        budget = Budget(minutes, rest, begun=0.0, clock=lambda: self.now)
        iteration = 0
        while iteration < total:
            iteration += 1
            total = budget.plan(iteration, total, total * 5 // 6)
            if iteration >= total * 5 // 6:
                self.averaged_at.append(iteration)
            self.now += pace(iteration, total)
        self.iterations = total
        self.end = self.now + rest * pace(total, total) + budget.ENDING


@pytest.mark.parametrize("minutes", [1, 5, 60])
@pytest.mark.parametrize(
    "pace",
    [
        lambda i, n: 0.1,
        lambda i, n: 0.05 + 0.1 * min(i / n, 2 / 3),  # Gaussians are added up to two thirds
        lambda i, n: 1.5 if i < 5 else 0.08,  # the first iterations are slow
        lambda i, n: 0.1 if i % 40 else 2.0,  # density steps
        lambda i, n: 0.3 - 0.2 * i / n,  # the machine becomes free
        lambda i, n: 0.1 + 0.2 * (i > n / 2),  # or busy
    ],
    ids=["steady", "growing", "slow start", "bumpy", "free", "busy"],
)
def test_the_time_is_kept_and_used(minutes, pace):
    run = Simulation(minutes, pace, rest=4.0)
    assert run.end <= 60 * minutes + 3.0  # one bump at the end is unpredictable
    assert run.end >= 0.85 * 60 * minutes
    # Averages were not started and dropped repeatedly: the result at the end is an average of the last iterations.
    assert run.averaged_at and run.iterations - run.averaged_at[0] >= 0.1 * run.iterations


def test_no_time_is_left_by_the_motion():
    run = Simulation(1, lambda i, n: 0.1, started=100.0)
    assert run.iterations == 1


def test_a_run_much_shorter_than_its_preset_adds_no_gaussians():
    options = TrainOptions(source_path="data", preset="fast", iterations=1200, max_gaussians=10**6)
    assert replan(options, 300, 5000).max_gaussians == 5000
    assert replan(options, 1100, 5000).max_gaussians == 10**6
    assert replan(options, 300, 5000).average_from_iter == 250


@pytest.fixture
def data(tmp_path):
    return write(tmp_path / "img", blobs()), write(tmp_path / "seg", masks())


def test_a_program_ends_on_time(data, tmp_path, monkeypatch):
    """Counted from the start of the loop: how long a busy machine takes to get there is unpredictable."""
    begun = []

    def from_here(training, minutes):
        begun.append(time.perf_counter())
        return Budget(minutes, begun=begun[0])

    monkeypatch.setattr(training.loop, "budget_of", from_here)
    budgeted = ("--preset", "fast", "--iterations", 10**6, "--ibfr_target", "linear", "--time", 6 / 60)
    train_at(data[0], tmp_path / "out", *budgeted)
    assert time.perf_counter() - begun[0] < 6 + 20  # without --time, hours
    parts = json.loads((tmp_path / "out" / "time.json").read_text())["parts"]
    names = {"imports", "reading", "motion", "iterations", "evaluation", "saving", "whole process"}
    assert names <= set(parts)
    saved = [int(path.stem.removeprefix("chkpnt")) for path in (tmp_path / "out").glob("chkpnt*.pth")]
    assert len(saved) == 1 and saved[0] > 20
    assert "trained" in checkpoint(tmp_path / "out", saved[0]).extras  # at its best: an average


def test_a_time_too_short_for_a_model_is_said(data, tmp_path, monkeypatch, capsys):
    options = ("--preset", "fast", "--ibfr_target", "linear", "--time", 0.001)
    words = arguments(data[0], tmp_path / "out", *options)
    monkeypatch.setattr("sys.argv", [word for word in words if word != "--quiet"])
    train.main()
    assert "left room for 1 iterations" in capsys.readouterr().out


def test_a_forecast_changes_nothing_and_is_near(data, tmp_path):
    words = arguments(data[0], tmp_path / "out", "--iterations", 40, "--ibfr_from_iter", 20)
    run = Training.start(train.train_options(words[1:]), lambda _: None)
    state = run.generator.get_state()
    before = {name: p.detach().clone() for name, p in run.model.named_parameters().items()}
    foreseen = forecast(run, run.stepper())
    assert torch.equal(run.generator.get_state(), state)
    assert all(torch.equal(p, before[name]) for name, p in run.model.named_parameters().items())
    assert all(p.grad is None for p in run.model.named_parameters().values())
    assert foreseen.seconds == pytest.approx(40 / foreseen.rate) and foreseen.memory > 10**7


def test_what_it_will_take_is_said_before_the_first_iteration(data, tmp_path, monkeypatch, capsys):
    words = [w for w in arguments(data[0], tmp_path / "out", "--iterations", 3) if w != "--quiet"]
    monkeypatch.setattr("sys.argv", words)
    train.main()
    out = capsys.readouterr().out
    assert re.search(r"about \d+ s for 3 iterations on cpu \(.+ per second\), \d+\.\d GB", out)
    assert "quick" not in out.split("about", 1)[1]


def test_a_slow_preset_on_a_cpu_gets_a_hint(data, tmp_path):
    words = arguments(data[0], tmp_path / "out", "--iterations", 3)
    run = Training.start(train.train_options(words[1:]), lambda _: None)
    assert "--preset quick" in Forecast(0.1, 3600.0, 10**9).line(run)
    assert "--preset quick" not in Forecast(10.0, 30.0, 10**9).line(run)


def test_seconds_in_words():
    assert [in_words(s) for s in (0.2, 40, 240, 7800)] == ["1 s", "40 s", "4 min", "2 h 10 min"]


def test_parts_add_up():
    now = iter([0.0, 2.0, 5.0, 9.0])
    parts = Parts(lambda: next(now))
    for _ in range(2):
        with parts("saving"):
            pass
    assert parts.seconds == {"saving": 6.0}
