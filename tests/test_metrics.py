"""Scores worked out by hand."""

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity

from utils.metrics import Scores, psnr, ssim


def test_psnr_of_each_image():
    targets = torch.full((3, 1, 4, 5), 0.5)
    images = targets + torch.tensor([0.1, 0.01, -0.5]).view(3, 1, 1, 1)
    assert psnr(images, targets).tolist() == pytest.approx([20, 40, 6.0206], abs=1e-3)


def test_psnr_is_of_the_mean_square_over_channels_and_pixels():
    images = torch.zeros(1, 3, 2, 2)
    images[0, 1, 0, 0] = 1  # one of twelve values is off by one
    assert psnr(images, torch.zeros_like(images)).item() == pytest.approx(10.7918, abs=1e-3)


def test_psnr_clamps_renders():
    images = torch.tensor([1.7, -0.4]).view(1, 1, 1, 2)
    assert psnr(images, torch.tensor([1.0, 0.0]).view(1, 1, 1, 2)).item() == pytest.approx(100)


@pytest.mark.parametrize("error", [0.0, 1e-6, 1e-5])
def test_psnr_of_exact_images_is_100_db(error):
    targets = torch.zeros(1, 1, 3, 3, dtype=torch.float64)
    assert psnr(targets + error, targets).item() == pytest.approx(100)


def test_a_sequence_scores_the_mean_of_its_frames():
    targets = torch.full((3, 1, 9, 9), 0.5)
    images = targets + torch.tensor([0.1, 0.01, -0.5]).view(3, 1, 1, 1)
    scores = Scores.of(images[:1], targets[:1]) + Scores.of(images[1:], targets[1:])
    assert len(scores) == 3
    assert scores.psnr == pytest.approx([20, 40, 6.0206], abs=1e-3)
    assert scores.mean_psnr == pytest.approx(66.0206 / 3, abs=1e-3)
    assert scores.mean_l1 == pytest.approx(0.61 / 3)


@pytest.mark.parametrize("channels", [1, 3])
def test_ssim_is_that_of_scikit_image(channels):
    rng = np.random.default_rng(0)
    truth, image = rng.random((2, 2, channels, 12, 20))
    found = ssim(torch.from_numpy(image), torch.from_numpy(truth))
    expected = [
        np.mean([structural_similarity(t, p, data_range=1.0) for t, p in zip(*frames, strict=True)])
        for frames in zip(truth, image, strict=True)
    ]
    assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("side", [1, 2, 5, 7])
def test_ssim_of_frames_smaller_than_its_window(side):
    frame = torch.rand(1, 1, side, 30, generator=torch.Generator().manual_seed(0))
    assert ssim(frame, frame) == pytest.approx([1])
    assert ssim(1 - frame, frame)[0] < 0.99


def masks(*rows):
    return torch.tensor(rows).view(len(rows), 1, 2, -1)


def test_dice_is_pooled_over_the_frames_and_counts_from_one_half():
    images = masks([0.5, 0.9, 0.49, 0.0], [0.6, 0.0, 0.0, 0.0])
    truth = masks([1.0, 0.0, 1.0, 0.0], [1.0, 1.0, 0.0, 0.0])
    scores = Scores.of(images, truth)
    assert scores.dice == pytest.approx(2 * 2 / (3 + 4 + 0))
    assert scores.frame_dice == pytest.approx([2 * 1 / 4, 2 * 1 / 3])


@pytest.mark.parametrize(
    ("predicted", "truth", "expected"), [(0, 0, np.nan), (1, 0, 0), (0, 1, 0), (1, 1, 1)]
)
def test_dice_of_empty_masks(predicted, truth, expected):
    """Dice of two empty masks is undefined: NaN, and not 1."""
    images = torch.full((2, 1, 3, 3), float(predicted))
    scores = Scores.of(images, torch.full_like(images, float(truth)))
    assert scores.dice == pytest.approx(expected, nan_ok=True)
    assert scores.iou == pytest.approx(expected, nan_ok=True)


def test_masks_in_colour_count_by_the_mean_of_their_channels():
    images = torch.zeros(1, 3, 2, 2)
    images[0, :2, 0, 0] = 1  # a mean of 2/3
    images[0, 0, 1, 1] = 1  # of 1/3
    assert Scores.of(images, images).sizes == [2]
