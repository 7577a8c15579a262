"""The fixed camera: the formulas of the image plane, against the general rasteriser's projection."""

import json
import math

import pytest
import torch

from diff_gaussian_rasterization import fold
from scene.cameras import Camera

CAMERAS = [Camera(233, 197), Camera(64, 100, distance=2.5)]


def project(camera, mirrored, means, scales, quaternions):
    """(means2d, conics, depths, radii) of the general rasteriser, float64."""
    like = {"mirrored": mirrored, "dtype": torch.float64}
    means2d, conics, _, depths, _, radii = torch.ops.diff_gaussian_rasterization.project(
        means,
        scales,
        quaternions,
        None,
        None,
        camera.view_matrix(**like),
        camera.projection_matrix(**like),
        camera.position(**like),
        camera.tan_fov_x,
        camera.tan_fov_y,
        1.0,
        camera.width,
        camera.height,
        0,
        False,
    )
    return means2d, conics, depths, radii


def flat_gaussians(camera, n=50, seed=0):
    """Means in the plane (N, 3), scales (N, 3) and in-plane angles (N,), float64."""
    generator = torch.Generator().manual_seed(seed)
    means, scales = torch.rand(2, n, 3, dtype=torch.float64, generator=generator)
    half = torch.tensor([camera.half_width, 0.0, camera.half_height], dtype=torch.float64)
    scales = 0.1 * camera.distance * scales
    scales[:, 1] = 1e-8
    angles = 2 * math.pi * torch.rand(n, dtype=torch.float64, generator=generator)
    return (2 * means - 1) * half, scales, angles


def about_y(angles):
    """Quaternions w x y z (N, 4) of rotations about +y."""
    zero = torch.zeros_like(angles)
    return torch.stack([torch.cos(angles / 2), zero, torch.sin(angles / 2), zero], 1)


@pytest.mark.parametrize("camera", CAMERAS)
@pytest.mark.parametrize("mirrored", [False, True])
def test_centres_follow_the_formula_of_the_image_plane(camera, mirrored):
    means, scales, angles = flat_gaussians(camera)
    means2d, _, depths, radii = project(camera, mirrored, means, scales, about_y(angles))
    scale, side = camera.focal / camera.distance, -1 if mirrored else 1
    u = side * scale * means[:, 0] + (camera.width - 1) / 2
    v = -scale * means[:, 2] + (camera.height - 1) / 2
    torch.testing.assert_close(means2d, torch.stack([u, v], 1), rtol=0, atol=1e-10)
    torch.testing.assert_close(depths, torch.full_like(depths, camera.distance))
    assert (radii > 0).all()


@pytest.mark.parametrize("camera", CAMERAS)
@pytest.mark.parametrize("mirrored", [False, True])
def test_flat_gaussians_turn_by_their_angle_in_image_axes(camera, mirrored):
    means, scales, angles = flat_gaussians(camera)
    _, conics, _, _ = project(camera, mirrored, means, scales, about_y(angles))
    a, b, c = conics.unbind(1)
    covariance = torch.linalg.inv(torch.stack([a, b, b, c], 1).reshape(-1, 2, 2))

    cos, sin = torch.cos(angles), torch.sin(angles)
    rotation = torch.stack([cos, -sin, sin, cos], 1).reshape(-1, 2, 2)
    expected = camera.pixels_per_unit**2 * rotation @ torch.diag_embed(scales[:, [0, 2]] ** 2) @ rotation.mT
    flip = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64) if mirrored else 1.0
    expected = flip * expected + 0.3 * torch.eye(2, dtype=torch.float64)
    # The thickness of 1e-8 adds 1e-16 of a unit; inverting the conic costs the rest.
    torch.testing.assert_close(covariance, expected, rtol=1e-9, atol=1e-9)


def test_a_quarter_and_an_eighth_turn_by_hand():
    camera = Camera(100, 100)
    means = torch.zeros(2, 3, dtype=torch.float64)
    scales = torch.tensor([[0.1, 1e-8, 0.01]], dtype=torch.float64).expand(2, 3)
    _, conics, _, _ = project(
        camera, False, means, scales, about_y(torch.tensor([math.pi / 2, math.pi / 4]).double())
    )
    assert conics[0, 0] > conics[0, 2], "long along x becomes long along z: thin along u"
    assert conics[1, 1] < 0, "+x turns about +y towards -z, which is down: u and v grow together"


@pytest.mark.parametrize("camera", CAMERAS)
@pytest.mark.parametrize("mirrored", [False, True])
def test_the_fold_projects_as_the_general_rasteriser_does(camera, mirrored):
    """At t = m, where time weight is 1 and displacement 0, the two project the same Gaussian."""
    means, scales, angles = flat_gaussians(camera)
    n = len(means)
    expected_means, expected_conics, _, expected_radii = project(
        camera, mirrored, means, scales, about_y(angles)
    )
    means2d, conics, radii, _ = fold(
        means,
        torch.zeros(n, 4, dtype=torch.float64),
        torch.zeros(n, dtype=torch.float64),
        torch.zeros(n, dtype=torch.float64),
        torch.log(scales),
        torch.logit(angles / (2 * math.pi)),
        torch.tensor([0.5], dtype=torch.float64),
        torch.tensor([-1.0 if mirrored else 1.0], dtype=torch.float64),
        camera.pixels_per_unit,
        camera.width,
        camera.height,
    )
    torch.testing.assert_close(means2d[0], expected_means, rtol=0, atol=1e-10)
    torch.testing.assert_close(conics[0], expected_conics, rtol=1e-9, atol=1e-12)
    assert radii[0].equal(expected_radii)


def test_the_plane_that_the_image_shows():
    camera = Camera(200, 100, distance=2.0)
    assert camera.tan_fov_x == pytest.approx(0.36, abs=1e-3)
    assert camera.half_width == pytest.approx(2 * camera.tan_fov_x)
    assert camera.half_height == pytest.approx(camera.half_width / 2)
    assert camera.half_width * camera.pixels_per_unit == pytest.approx(100)


def test_position_is_the_origin_of_the_view():
    for mirrored in (False, True):
        camera = CAMERAS[1]
        origin = torch.cat([camera.position(mirrored), torch.ones(1)]) @ camera.view_matrix(mirrored)
        assert origin.tolist() == [0.0, 0.0, 0.0, 1.0]


def test_matrices_come_in_the_dtype_asked_for():
    camera = Camera(8, 8)
    assert camera.projection_matrix().dtype == torch.get_default_dtype()
    assert camera.projection_matrix(True, torch.float64, "cpu").dtype == torch.float64


def test_entries_are_those_of_cameras_json():
    camera = Camera(40, 30)
    entries = json.loads(json.dumps(camera.entries(["0000.png", "0001.png"])))
    assert [entry["id"] for entry in entries] == [0, 1]
    assert [entry["img_name"] for entry in entries] == ["0000.png", "0001.png"]
    first = entries[0]
    assert (first["width"], first["height"]) == (40, 30)
    assert first["fx"] == first["fy"] == pytest.approx(camera.focal)
    assert first["position"] == [0.0, -1.0, 0.0]
    rotation = torch.tensor(first["rotation"])
    assert (rotation @ torch.tensor([0.0, 0.0, 1.0])).tolist() == [0.0, 1.0, 0.0], "forward is +y"
    assert torch.linalg.det(rotation).item() == pytest.approx(1.0)


@pytest.mark.parametrize("size", [(0, 4, 1.0), (4, -1, 1.0), (4, 4, 0.0), (4, 4, math.nan)])
def test_a_camera_needs_a_size_and_a_distance(size):
    with pytest.raises(ValueError, match="positive width, height and distance"):
        Camera(*size)
