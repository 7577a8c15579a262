"""Distances between surfaces, against shapes whose distances are known."""

import numpy as np
import pytest
import trimesh
from hypothesis import given, settings
from hypothesis import strategies as st

from patient.surfaces import point_distances, rigid_alignment, surface_scores


def test_concentric_balls():
    """Radii 10 and 12: every distance is 2, up to the facets of the finer mesh (0.02 for these subdivisions)."""
    inner, outer = (trimesh.creation.icosphere(subdivisions=4, radius=radius) for radius in (10.0, 12.0))
    scores = surface_scores(inner, outer, samples=3000)
    for name in ("asd", "hd", "hd95", "to_reference", "to_prediction"):
        assert getattr(scores, name) == pytest.approx(2, abs=0.03), name
    assert scores.chamfer == pytest.approx(4, abs=0.06)


def test_a_body_too_much_shows_on_one_side_alone():
    ball = trimesh.creation.icosphere(subdivisions=3, radius=10.0)
    far = trimesh.creation.icosphere(subdivisions=3, radius=10.0).apply_translation((100, 0, 0))
    both = trimesh.util.concatenate([ball, far])
    scores = surface_scores(both, ball, samples=4000)
    assert scores.to_prediction < 1e-9
    # Half of the points lie on the far ball, whose distances are about 90 on average (100 less the radius, and curved).
    assert scores.to_reference == pytest.approx(90.6 / 2, rel=0.05)
    assert scores.hd == pytest.approx(100, abs=0.1) and scores.hd95 == pytest.approx(98, abs=2)
    turned = surface_scores(ball, both, samples=4000)
    assert (turned.to_prediction, turned.to_reference) == pytest.approx(
        (scores.to_reference, scores.to_prediction), rel=0.1
    )


def test_a_shift_is_not_forgiven():
    box = trimesh.creation.box(extents=(20, 20, 20))
    moved = box.copy().apply_translation((0, 0, 3))
    scores = surface_scores(moved, box, samples=2000)
    assert scores.hd == pytest.approx(3)  # of the corners: vertices are asked too
    grown = box.copy().apply_scale(1.5)
    assert surface_scores(grown, box, samples=2000).asd > 4


def test_the_farthest_point_may_be_a_corner_that_no_sample_hits():
    base = trimesh.creation.box(extents=(20, 20, 2))
    needle = trimesh.creation.cone(radius=0.1, height=30.0)  # from z = 0 to its tip
    both = trimesh.util.concatenate([base, needle])
    assert surface_scores(both, base, samples=300).hd == pytest.approx(29)


def test_scores_repeat_and_depend_on_the_seed():
    one = trimesh.creation.icosphere(subdivisions=2, radius=10.0)
    other = one.copy().apply_translation((1, 2, 0.5))
    first = surface_scores(one, other, samples=500, seed=3)
    assert first == surface_scores(one, other, samples=500, seed=3)
    assert first != surface_scores(one, other, samples=500, seed=4)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), triangles=st.integers(1, 60), reach=st.floats(0.01, 100))
def test_distances_are_exact(seed, triangles, reach):
    """Against checking every triangle one by one: triangles of all sizes, points near and far."""
    rng = np.random.default_rng(seed)
    sizes = np.exp(rng.uniform(-4, 3, (triangles, 1, 1)))
    corners = rng.normal(size=(triangles, 1, 3)) * 5 + rng.normal(size=(triangles, 3, 3)) * sizes
    mesh = trimesh.Trimesh(corners.reshape(-1, 3), np.arange(3 * triangles).reshape(-1, 3), process=False)
    points = rng.normal(size=(40, 3)) * reach
    closest = [
        trimesh.triangles.closest_point(np.repeat(corners[number : number + 1], len(points), axis=0), points)
        for number in range(triangles)
    ]
    expected = np.min([np.linalg.norm(points - near, axis=1) for near in closest], axis=0)
    assert np.allclose(point_distances(points, mesh), expected, rtol=1e-6, atol=1e-9)


def test_points_far_away_and_a_giant_triangle_cost_no_memory():
    """A cube of 12 triangles around 5000 small ones, queried from 300 mm away."""
    ball = trimesh.creation.icosphere(subdivisions=4, radius=10.0)
    mesh = trimesh.util.concatenate([ball, trimesh.creation.box(extents=(100, 100, 100))])
    points = np.random.default_rng(0).normal(size=(300, 3)) + np.array([300, 0, 0])
    assert np.allclose(point_distances(points, mesh), points[:, 0] - 50)


def test_alignment_turns_and_shifts_and_keeps_the_size():
    """A box of three different sides, turned by 0.2 rad and shifted, comes back to a few hundredths of a millimetre."""
    box = trimesh.creation.box(extents=(10, 20, 35)).subdivide().subdivide()
    away = trimesh.transformations.rotation_matrix(0.2, (1, 2, 3), (3, 0, 0))
    away[:3, 3] += (1, -1.5, 0.5)
    matrix = rigid_alignment(box.copy().apply_transform(away), box)
    assert np.allclose(matrix[:3, :3] @ matrix[:3, :3].T, np.eye(3), atol=1e-9)
    assert np.linalg.det(matrix[:3, :3]) == pytest.approx(1)
    assert np.abs(trimesh.transform_points(box.vertices, matrix @ away) - box.vertices).max() < 0.2
    grown = rigid_alignment(box.copy().apply_scale(1.2), box)
    assert np.linalg.norm(grown[:3, :3], axis=0) == pytest.approx(1)
