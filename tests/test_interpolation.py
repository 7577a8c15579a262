"""Classical interpolation: values that can be computed by hand, with even and uneven spacing."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import in_between.classical
from in_between.classical import interpolate, interpolate_masks, signed_distances
from in_between.exclusive import interpolate_labels

POSITIONS = np.array([0.0, 1.0, 3.0, 4.0, 7.5])
AT = np.array([0.25, 2.0, 3.5, 7.0])


def test_linear_is_between_the_two_neighbours():
    values = np.array([0.0, 2.0, 4.0, 0.0, 7.0])[:, None]
    assert interpolate(values, POSITIONS, AT)[:, 0] == pytest.approx([0.5, 3.0, 2.0, 6.0])


@pytest.mark.parametrize(("method", "degree"), [("linear", 1), ("cubic", 3)])
def test_polynomials_come_back(method, degree):
    """A not-a-knot spline is exact for cubics, whatever the spacing; values are frames (H, W, C)."""
    coefficients = np.random.default_rng(0).normal(size=(degree + 1, 3, 4, 2))

    def polynomial(x):
        return sum(c * x[:, None, None, None] ** d for d, c in enumerate(coefficients))

    found = interpolate(polynomial(POSITIONS), POSITIONS, AT, method)
    # float32 holds 7 digits of values up to 7.5^3 = 400.
    np.testing.assert_allclose(found, polynomial(AT), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("method", ["linear", "cubic"])
def test_pixels_in_blocks_are_the_same_pixels(method, monkeypatch):
    values = np.random.default_rng(0).random((5, 6, 7))
    whole = interpolate(values, POSITIONS, AT, method)
    monkeypatch.setattr(in_between.classical, "_VALUES_AT_ONCE", 20)  # 4 pixels of 42
    assert np.array_equal(interpolate(values, POSITIONS, AT, method), whole)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.floats(0.1, 5), min_size=1, max_size=6),
    st.sampled_from(["linear", "cubic"]),
    st.integers(0, 99),
)
def test_at_a_frame_it_is_the_frame(gaps, method, seed):
    positions = np.cumsum([0.0, *gaps])
    values = np.random.default_rng(seed).random((len(positions), 3))
    np.testing.assert_allclose(interpolate(values, positions, positions, method), values, atol=1e-5)


def disc(radius, size=41):
    row, column = np.mgrid[:size, :size] - size // 2
    return np.hypot(row, column) <= radius


def test_distances_run_from_the_outline():
    mask = np.zeros((1, 5, 9), bool)
    mask[0, :, 3:6] = True
    row = signed_distances(mask)[0, 2]
    assert row.tolist() == [-2.5, -1.5, -0.5, 0.5, 1.5, 0.5, -0.5, -1.5, -2.5]
    row = signed_distances(mask, spacing=(9.0, 2.0))[0, 2]  # half the smaller side is half a column
    assert row.tolist() == [-5, -3, -1, 1, 3, 1, -1, -3, -5]


@pytest.mark.parametrize("method", ["linear", "cubic"])
def test_a_cone_is_filled_in(method):
    """Discs whose radius grows evenly: so it does between them, also where frames are unevenly far apart."""
    positions, at = np.array([0.0, 2.0, 5.0, 8.0]), np.array([1.0, 3.0, 4.0, 6.5])
    found = interpolate_masks(np.stack([disc(5 + p) for p in positions]), positions, at, (1.0, 1.0), method)
    for mask, p in zip(found, at, strict=True):
        # Outlines on a grid are known to half a pixel: a share of 1 / radius of the area, at most.
        assert mask.sum() == pytest.approx(np.pi * (5 + p) ** 2, rel=0.5 / 5)


def test_shapes_end_between_a_mask_and_an_empty_frame():
    masks = np.stack([np.zeros((41, 41), bool), disc(10), disc(10)])
    positions = np.array([0.0, 4.0, 8.0])
    found = interpolate_masks(masks, positions, np.array([0.5, 3.5, 6.0]))
    assert not found[0].any() and 0 < found[1].sum() < disc(10).sum() and np.array_equal(found[2], disc(10))


@pytest.mark.parametrize("method", ["sdf", "cubic sdf"])
def test_labels_that_end_are_filled_in_as_a_mask_is(method):
    """A ball in a long stack, as a mask and as the only label of a map, where most frames are all background."""
    z = np.arange(24.0)
    ball = np.stack([disc(np.sqrt(max(0.0, 100 - (3 * (k - 11.5)) ** 2)) or -1) for k in z])
    at = z[:-2:2] + 0.9  # not midway, where distances of 0 may be of either
    mask = interpolate_masks(ball[::2], z[::2], at, method="cubic" if "cubic" in method else "linear")
    labels = interpolate_labels(ball[::2].astype(np.uint8), z[::2], at, 1, method=method)
    np.testing.assert_array_equal(labels > 0, mask)


def test_nothing_and_everything():
    empty, full = np.zeros((2, 4, 4), bool), np.ones((2, 4, 4), bool)
    ends, middle = np.array([0.0, 1.0]), np.array([0.5])
    assert not interpolate_masks(empty, ends, middle).any()
    assert interpolate_masks(full, ends, middle).all()
