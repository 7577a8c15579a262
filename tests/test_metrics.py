"""Scores worked out by hand."""

import pytest
import torch

from utils.metrics import dice, psnr
from utils.reports import Evaluation


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
    assert Evaluation(0.0, [10.0, 20.0, 60.0], 1.0).mean_psnr == pytest.approx(30)


def test_dice_counts_over_all_images_at_one_half():
    images = torch.tensor([[0.5, 0.9, 0.49, 0.0], [0.6, 0.0, 0.0, 0.0]]).view(2, 1, 2, 2)
    truth = torch.tensor([[1.0, 0.0, 1.0, 0.0], [1.0, 1.0, 0.0, 0.0]]).view(2, 1, 2, 2)
    assert dice(images, truth).item() == pytest.approx(2 * 2 / (3 + 4))
    assert dice(images, truth, threshold=0.4).item() == pytest.approx(2 * 3 / (4 + 4))


@pytest.mark.parametrize(("predicted", "truth", "expected"), [(0, 0, 1), (1, 0, 0), (0, 1, 0), (1, 1, 1)])
def test_dice_of_empty_masks(predicted, truth, expected):
    images = torch.full((2, 1, 3, 3), float(predicted))
    assert dice(images, torch.full_like(images, float(truth))).item() == expected
