"""Sizes follow the data and schedules the iterations; the published preset stays as published."""

import pytest
from sequences import arguments, blobs, checkpoint, train_at, write

import train
from arguments import PRESETS, train_options
from training.schedule import PIXELS, SCHEDULE, SIZES, Size, fitted, scaled, warn

OURS = sorted(set(PRESETS) - {"published"})


def options(*words):
    return train_options(["-s", "data", "-m", "out", *map(str, words)])


def schedule(options):
    return {name: getattr(options, name) for name in SCHEDULE}


@pytest.mark.parametrize("preset", OURS)
def test_what_begins_and_ends_goes_with_the_iterations(preset):
    whole = fitted(options("--preset", preset), PIXELS)
    assert schedule(whole) == schedule(
        options("--preset", preset)
    )  # the presets' own numbers are those of PIXELS
    half = fitted(options("--preset", preset, "--iterations", whole.iterations // 2), PIXELS)
    for name, value in schedule(half).items():
        assert value == scaled(schedule(whole)[name], 2, 1), name
    assert half.densify_until_iter < half.average_from_iter < half.iterations
    assert half.densification_interval == whole.densification_interval


@pytest.mark.parametrize("preset", OURS)
def test_what_is_given_stands(preset):
    given = fitted(
        options("--preset", preset, "--iterations", 500, "--average_from_iter", 77, "--num_pts", 9),
        7 * PIXELS,
    )
    assert (given.iterations, given.average_from_iter, given.num_pts) == (500, 77, 9)
    bounded = fitted(options("--preset", preset, "--max_gaussians", 1000), 7 * PIXELS)
    assert bounded.num_pts == bounded.max_gaussians == 1000


def test_the_published_schedule_is_absolute_unless_asked():
    short = fitted(options("--iterations", 3000), 7 * PIXELS)
    assert short == options("--iterations", 3000)
    asked = fitted(options("--iterations", 3000, "--scale_schedule"), 7 * PIXELS)
    assert (asked.ibfr_from_iter, asked.densify_until_iter, asked.densify_from_iter) == (1000, 2000, 50)
    assert (
        asked.average_from_iter == 0 and asked.num_pts == short.num_pts
    )  # 0 is never, and only times change


def test_presets_grow_with_the_data():
    for preset in OURS:
        small, brain, large = (
            fitted(options("--preset", preset), n) for n in (PIXELS // 17, PIXELS, 13 * PIXELS)
        )
        assert small.num_pts <= brain.num_pts < large.num_pts
        assert small.iterations <= brain.iterations <= large.iterations
    small, large = (fitted(options("--preset", "quick"), n) for n in (PIXELS // 17, 13 * PIXELS))
    assert small.num_pts < 30_000 and large.num_pts < 400_000  # a CPU's sizes
    assert fitted(large, 13 * PIXELS) == large  # sizes do not add up where a run goes on


def test_sizes():
    assert Size(100, 0.5).of(4 * PIXELS) == 200
    assert Size(100, 0.5, least=80).of(1) == 80
    assert all(set(sizes) <= {"num_pts", "iterations"} for sizes in SIZES.values())
    assert (scaled(0, 100, 10), scaled(1, 100, 10), scaled(50, 100, 10)) == (0, 1, 5)


def test_a_run_that_never_teaches_in_betweens_says_so(tmp_path, monkeypatch, capsys):
    """Published numbers and few iterations: the bar looks good, but frames rendered in between do not."""
    root = write(tmp_path / "data", blobs())

    def said(out, *more):
        words = [w for w in arguments(root, tmp_path / out, "--iterations", 3, *more) if w != "--quiet"]
        monkeypatch.setattr("sys.argv", words)
        train.main()
        return capsys.readouterr().out

    warning = "frames in between are never taught"
    text = said("plain")
    assert warning in text and "--scale_schedule" in text and text.index(warning) < text.index("[3] img")
    assert warning not in said("scaled", "--scale_schedule")
    assert warning not in said("fast", "--preset", "fast", "--ibfr_target", "linear")
    assert warning not in said("without", "--lambda_ibfr", 0)


def test_warnings_are_for_those_who_expect_in_betweens():
    lines = []
    warn(options("--iterations", 100), False, lines.append)
    warn(options("--iterations", 10_001), True, lines.append)
    assert not lines
    warn(options("--iterations", 10_000), True, lines.append)
    assert len(lines) == 1


def test_a_scaled_run_is_the_one_with_its_numbers_written_out(tmp_path):
    root = write(tmp_path / "data", blobs())
    short = ("--preset", "fast", "--ibfr_target", "linear", "--iterations", 30)
    train_at(root, tmp_path / "short", *short)
    words = [w for name, n in schedule(fitted(options(*short), 2400)).items() for w in (f"--{name}", n)]
    train_at(root, tmp_path / "long", *short, *words)
    a, b = (checkpoint(tmp_path / name, 30) for name in ("short", "long"))
    assert all((a.params[name] == b.params[name]).all() for name in a.params)
