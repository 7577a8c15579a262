"""in_between/uncertainty.py and --uncertainty: expected errors, against true ones."""

import sys

import nibabel
import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from sequences import BriefInBetween, train_at

import interpolate
import render
from in_between import uncertainty
from in_between.uncertainty import expected_error
from utils.errors import UserError
from utils.images import read_image, to_grey, write_image
from viewer import uncertainty as of_models

K = 13


@pytest.fixture(scope="module", autouse=True)
def brief():
    with pytest.MonkeyPatch.context() as patch:
        for module in (interpolate, uncertainty, of_models):
            patch.setattr(module, "InBetween", BriefInBetween)
        patch.setattr(uncertainty, "DEFAULT", BriefInBetween.settings_of_tests)
        patch.setattr(BriefInBetween, "__init__", brief_init)
        yield


def brief_init(self, frames, masks=None, gap=None, seed=0, settings=None, report=None, **named):
    super(BriefInBetween, self).__init__(
        frames, masks, gap, seed, BriefInBetween.settings_of_tests, report or (lambda *_: None), **named
    )


def moving(count: int) -> tuple[np.ndarray, np.ndarray]:
    """A still ground with texture, and a disc whose own texture changes from frame to frame: images and masks."""
    rng = np.random.default_rng(3)
    ground = gaussian_filter(rng.normal(size=(40, 44)), 3)
    changing = gaussian_filter(rng.normal(size=(count, 40, 44)), (1.5, 1.5, 1.5))
    row, column = np.mgrid[:40, :44]
    inside = np.stack([np.hypot(row - 20, column - 14 - 0.5 * k) < 9 for k in range(count)])
    images = 0.4 + 0.8 * ground + np.where(inside, 0.1 + 1.5 * changing, 0)
    return images.clip(0, 1).astype(np.float32), inside


@pytest.fixture(scope="module")
def case():
    """Every second frame given, and what is expected of the others."""
    images, inside = moving(2 * K - 1)
    frames, masks = (torch.from_numpy(v[::2]).float()[:, None] for v in (images, inside))
    between = BriefInBetween(frames, masks)
    return images, inside, between, expected_error(between, frames, masks)


def test_errors_are_expected_where_they_are(case):
    images, inside, between, expected = case
    k, half = torch.arange(K - 1), torch.full((K - 1,), 0.5)
    error = (between.images(k, half)[:, 0].numpy() - images[1::2]).__abs__()
    guess = expected.images(k, half)[:, 0].numpy()
    # Even where the expected error is right, a pixel's own error is chance: 0.45 here, 0.6 of anatomy.
    assert np.corrcoef(guess.ravel(), error.ravel())[0, 1] > 0.4
    means = [values.reshape(K - 1, 8, 5, 11, 4).mean((2, 4)).ravel() for values in (guess, error)]
    assert np.corrcoef(*means)[0, 1] > 0.7
    assert 0.6 < guess.mean() / error.mean() < 1.8
    wrong = (between.masks(k, half)[:, 0].numpy() >= 0.5) != inside[1::2]
    doubt = expected.masks(k, half)[:, 0].numpy()
    assert doubt.max() <= 0.5 and doubt[wrong].mean() > 5 * doubt.mean()


def test_nothing_is_expected_to_be_wrong_at_the_frames(case):
    *_, expected = case
    for at in (0.0, 1.0):
        assert not expected.images(torch.tensor([4]), torch.tensor([at])).any()
        assert not expected.masks(torch.tensor([4]), torch.tensor([at])).any()


def test_other_images_are_doubted_more_the_farther_they_are_from_the_prediction(case):
    _, _, between, expected = case
    k, half = torch.tensor([3]), torch.tensor([0.5])
    prediction, own = between.images(k, half), expected.images(k, half)
    torch.testing.assert_close(expected.of_others(prediction, k, half), own)
    far = expected.of_others((prediction + 0.5).clamp(0, 2), k, half)
    torch.testing.assert_close(far, (0.5 + own * torch.exp(-0.5 / own.clamp_min(1e-6))).clamp(0, 1))


def test_too_few_frames(case):
    *_, between, _ = case
    with pytest.raises(ValueError, match="5 are needed"):
        expected_error(between, torch.rand(4, 1, 20, 20))


def test_interpolate_writes_it_beside_the_volume(tmp_path):
    images, inside = moving(7)
    affine = np.diag([1.0, 1, 4, 1])
    for name, values in (("v", 1000 * images - 300), ("l", inside.astype(np.uint8))):
        nibabel.save(nibabel.Nifti1Image(values.transpose(2, 1, 0), affine), tmp_path / f"{name}.nii.gz")
    words = ["-i", str(tmp_path / "v.nii.gz"), "-l", str(tmp_path / "l.nii.gz"), "--interp", "2", "--quiet"]
    interpolate.main([*words, "-o", str(tmp_path / "d.nii.gz"), "--uncertainty"])
    dense, doubt, of_mask = (
        nibabel.load(tmp_path / f"d{name}.nii.gz") for name in ("", "_uncertainty", "_mask_uncertainty")
    )
    assert doubt.shape == dense.shape == of_mask.shape and np.array_equal(doubt.affine, dense.affine)
    values = doubt.get_fdata()
    assert not values[..., ::2].any() and 1 < values[..., 1::2].mean() < 100  # in the source's intensities
    assert 0 < of_mask.get_fdata().max() <= 0.5
    interpolate.main([*words, "-o", str(tmp_path / "d"), "--uncertainty"])
    assert len(list((tmp_path / "d" / "uncertainty_img").glob("*.png"))) == 13
    assert (tmp_path / "d" / "uncertainty_mask.nii.gz").exists()
    with pytest.raises(UserError, match="leave it or --method linear out"):
        interpolate.main([*words, "-o", str(tmp_path / "no.nii.gz"), "--uncertainty", "--method", "linear"])


def test_render_writes_it_of_a_model(tmp_path, monkeypatch):
    """The error of a model that has hardly learned is large at the frames too, where it is known exactly."""
    images, inside = moving(7)
    for kind, frames in (("img", images), ("seg", inside.astype(np.float32))):
        for k, frame in enumerate(frames):
            write_image(tmp_path / kind / "original" / f"{k:04d}.png", frame, 8)
    out = tmp_path / "model"
    masks = ("--pipeline", "joint", "--seg_source_path", tmp_path / "seg", "--iterations", 30)
    train_at(tmp_path / "img", out, *masks)
    words = ["render.py", "-m", str(out), "--interp", "2", "--pipeline", "both", "--uncertainty", "--quiet"]
    monkeypatch.setattr(sys, "argv", words)
    render.main()
    for name in ("img", "mask"):
        assert len(list((out / f"uncertainty_{name}").glob("*.png"))) == 13
    drawn, doubt = (
        to_grey(read_image(out / f"{name}_img" / "00003_0.png")) for name in ("render", "uncertainty")
    )
    assert np.abs(np.abs(drawn - images[3]) - doubt).max() < 0.01  # 8 bits of the frame and of the render
    monkeypatch.setattr(sys, "argv", [*words, "--mask_path", "somewhere"])
    with pytest.raises(UserError, match="leave out --modify and --mask_path"):
        render.main()
