"""Losses against numbers worked out by hand, scikit-image, and the textbook definition in a few lines."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from skimage.metrics import structural_similarity

from arguments import OptimisationOptions, TrainOptions
from gaussian_renderer import RASTERIZERS, rasterizer
from scene.frames import Frames
from training.pipelines import loss_terms, tasks, total_loss
from utils.losses import l1, sigma_outside, ssim, ssim_map

C1, C2 = 0.0001, 0.0009


def pair(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(shape, dtype=torch.float64, generator=generator)
    return x, (x + 0.3 * torch.randn(shape, dtype=torch.float64, generator=generator)).clamp(0, 1)


def plain_ssim(x, y):
    """11 x 11 window of sigma 1.5 over zero-padded images, straight from Wang et al. 2004."""
    line = torch.tensor([math.exp(-(k**2) / (2 * 1.5**2)) for k in range(-5, 6)], dtype=x.dtype)
    window = torch.outer(line, line) / line.sum() ** 2
    channels = x.shape[1]

    def mean(z):
        return F.conv2d(z, window.expand(channels, 1, 11, 11), padding=5, groups=channels)

    mx, my = mean(x), mean(y)
    vx, vy, cov = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    return (2 * mx * my + C1) * (2 * cov + C2) / ((mx**2 + my**2 + C1) * (vx + vy + C2))


def test_l1_is_the_mean_absolute_difference():
    images = torch.tensor([0.0, 0.5, 1.0, 0.25], requires_grad=True)
    loss = l1(images, torch.tensor([0.1, 0.5, 0.6, 0.5]))
    assert loss.item() == pytest.approx((0.1 + 0 + 0.4 + 0.25) / 4)
    loss.backward()
    assert images.grad.tolist() == [-0.25, 0, 0.25, -0.25]


@pytest.mark.parametrize("shape", [(2, 3, 20, 24), (1, 1, 7, 40), (3, 1, 1, 1)])
def test_ssim_equals_the_textbook_definition_borders_included(shape):
    x, y = pair(*shape)
    torch.testing.assert_close(ssim_map(x, y), plain_ssim(x, y), rtol=1e-10, atol=1e-12)
    assert ssim(x, y).item() == pytest.approx(plain_ssim(x, y).mean().item(), abs=1e-12)


def test_ssim_equals_scikit_image_away_from_the_borders():
    # scikit-image reflects at the borders, where the method pads with zeros: only the inside compares.
    x, y = pair(1, 1, 30, 26)
    _, expected = structural_similarity(
        x[0, 0].numpy(),
        y[0, 0].numpy(),
        data_range=1,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        full=True,
    )
    np.testing.assert_allclose(ssim_map(x, y)[0, 0, 5:-5, 5:-5].numpy(), expected[5:-5, 5:-5], atol=1e-10)


def test_ssim_of_one_pixel_by_hand():
    # All but the window's centre falls on the padding.
    w = 1 / sum(math.exp(-(k**2) / 4.5) for k in range(-5, 6)) ** 2
    x, y = 0.8, 0.3
    mx, my = w * x, w * y
    top = (2 * mx * my + C1) * (2 * (w * x * y - mx * my) + C2)
    bottom = (mx**2 + my**2 + C1) * (w * x * x - mx**2 + w * y * y - my**2 + C2)
    value = ssim(torch.full((1, 1, 1, 1), x).double(), torch.full((1, 1, 1, 1), y).double())
    assert value.item() == pytest.approx(top / bottom, rel=1e-6)


def test_ssim_of_equal_images_is_one_and_of_black_and_white_almost_nothing():
    x, _ = pair(1, 1, 23, 23)
    assert ssim(x, x).item() == pytest.approx(1, abs=1e-12)
    inside = ssim_map(torch.zeros(1, 1, 23, 23), torch.ones(1, 1, 23, 23))[0, 0, 11, 11]
    assert inside.item() == pytest.approx(C1 / (1 + C1), rel=1e-3)


@pytest.mark.parametrize("name", RASTERIZERS)
@pytest.mark.parametrize("shape", [(3, 1, 20, 24), (2, 3, 33, 9)])
def test_both_rasterizers_give_l1_and_ssim_and_their_gradients(name, shape):
    x, y = pair(*shape)
    x = x.requires_grad_()
    expected = l1(x, y), ssim(x, y)
    (wanted,) = torch.autograd.grad(2 * expected[0] - 0.25 * expected[1], x)
    value = rasterizer(name).similarity(x, y)
    (given,) = torch.autograd.grad(2 * value[0] - 0.25 * value[1], x)
    torch.testing.assert_close(torch.stack(value), torch.stack(expected), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(given, wanted, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("name", RASTERIZERS)
def test_both_rasterizers_give_sigma_from_the_raw_values(name):
    raw = torch.linspace(-3, 2, 41, dtype=torch.float64, requires_grad=True)
    expected = sigma_outside(raw.exp(), 0.2, 1.0)
    (wanted,) = torch.autograd.grad(3 * expected, raw)
    value = rasterizer(name).sigma_outside(raw, 0.2, 1.0)
    (given,) = torch.autograd.grad(3 * value, raw)
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(given, wanted, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", RASTERIZERS)
@pytest.mark.parametrize(("spread", "expected"), [(0.5, 0), (0.1, 0.2), (1.75, 0.75)])
def test_both_rasterizers_let_empty_sides_of_sigma_be(name, spread, expected):
    raw = torch.full((3,), math.log(spread), requires_grad=True)
    value = rasterizer(name).sigma_outside(raw, 0.3, 1.0)
    value.backward()
    assert value.item() == pytest.approx(expected, abs=1e-6) and raw.grad.isfinite().all()


def test_sigma_pays_below_and_above_its_bounds_and_nothing_between():
    spreads = torch.tensor([0.05, 0.15, 0.25, 0.7, 1.0, 1.5, 2.5, 4.0], requires_grad=True)
    loss = sigma_outside(spreads, 0.25, 1.0)
    assert loss.item() == pytest.approx((0.2 + 0.1) / 2 + (0.5 + 1.5 + 3.0) / 3)
    loss.backward()
    torch.testing.assert_close(spreads.grad, torch.tensor([-0.5, -0.5, 0, 0, 0, 1 / 3, 1 / 3, 1 / 3]))


@pytest.mark.parametrize(
    ("spreads", "expected"),
    [([0.5, 0.6], 0), ([0.1, 0.5], 0.2), ([0.5, 1.75], 0.75), ([0.1], 0.2), ([3.0], 2)],
)
def test_sigma_sides_without_gaussians_add_nothing(spreads, expected):
    assert sigma_outside(torch.tensor(spreads), 0.3, 1.0).item() == pytest.approx(expected, abs=1e-7)


# ---- the terms of each pipeline ------------------------------------------------------------------------------------

VIEWS = 10


def plain_terms(images, targets, blends, raw_sigma):
    """Every term of the method, unweighted: the real views come first, then those in between."""
    real, between = images[: len(targets)], images[len(targets) :]
    sigma, low = raw_sigma.exp(), 2 / VIEWS
    below, above = sigma[sigma < low], sigma[sigma > 1]
    return {
        "l1": (real - targets).abs().mean(),
        "ssim": 1 - plain_ssim(real, targets).mean(),
        "ibfr": (between - blends).abs().mean(),
        "sigma": (low - below).mean() + (above - 1).mean(),
    }


# The published weights of each loss (spec of the method, section 7); joint weighs the two.
WEIGHTS = {"img": {"l1": 2, "ssim": 0.25, "ibfr": 0.5, "sigma": 0.25}, "seg": {"l1": 2, "sigma": 0.5}}
PIPELINES = {
    "img": [("img", 1.0)],
    "seg": [("seg", 1.0)],
    "joint": [("img", 0.5), ("seg", 3.0)],
}


@pytest.mark.parametrize("backend", RASTERIZERS)
@pytest.mark.parametrize("pipeline", PIPELINES)
def test_each_term_its_gradient_and_the_whole_in_plain_pytorch(pipeline, backend):
    raw_sigma = torch.linspace(-4, 2, 30, dtype=torch.float64, requires_grad=True)
    options = TrainOptions(
        source_path="x", pipeline=pipeline, seg_source_path="y", lambda_img=0.5, lambda_seg=3.0
    )
    blank = Frames(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), ["0.png", "1.png"], [0, 1])
    todo = tasks(options, blank, blank)
    assert [task.name for task in todo] == [name for name, _ in PIPELINES[pipeline]]
    plain_total, leaves, ours = 0.0, [raw_sigma], []
    for seed, (task, (name, weight)) in enumerate(zip(todo, PIPELINES[pipeline], strict=True)):
        images, goals = (x.requires_grad_(i == 0) for i, x in enumerate(pair(5, 1, 20, 24, seed=seed)))
        between = 2 if name == "img" else 0  # masks have no in-betweens
        given = images[: 3 + between], goals[:3], goals[3 : 3 + between]
        terms = loss_terms(
            task,
            *given,
            raw_sigma=raw_sigma,
            num_views=VIEWS,
            iteration=15_000,
            options=OptimisationOptions(),
            backend=backend,
        )
        plain = plain_terms(*given, raw_sigma)
        assert set(terms) == set(WEIGHTS[name])
        for key, value in terms.items():
            torch.testing.assert_close(value, plain[key], rtol=1e-9, atol=1e-12, msg=key)
            wanted, got = (
                torch.autograd.grad(v, (images, raw_sigma), retain_graph=True, materialize_grads=True)
                for v in (plain[key], value)
            )
            for a, b in zip(got, wanted, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-12, msg=f"gradient of {key}")
            assert any(g.any() for g in wanted)
        plain_total = plain_total + weight * sum(w * plain[key] for key, w in WEIGHTS[name].items())
        leaves.append(images)
        ours.append(terms)
    total = total_loss(todo, [{key: value.float() for key, value in terms.items()} for terms in ours])
    # The weighted sum is computed in float32.
    torch.testing.assert_close(total.double(), plain_total, rtol=1e-6, atol=1e-7)
    for a, b in zip(
        torch.autograd.grad(total, leaves), torch.autograd.grad(plain_total, leaves), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-9)
