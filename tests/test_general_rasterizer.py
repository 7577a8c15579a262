"""The drop-in rasteriser: its dense reference, finite differences, and the promises of its interface."""

import math

import general_oracle
import pytest
import torch

from diff_gaussian_rasterization import (
    GaussianRasterizationSettings,
    GaussianRasterizer,
    mark_visible,
    rasterize_gaussians,
)

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
OPS = torch.ops.diff_gaussian_rasterization
OUTPUTS = ("means2d", "conics", "colours", "depths", "compensations")


def camera(width=40, height=28, dtype=torch.float64, device="cpu", seed=0, **options):
    """A camera of general position and direction, with a wider view along x than the aspect asks for."""
    generator = torch.Generator().manual_seed(seed)
    rotation = general_oracle.rotation_matrices(torch.randn(1, 4, dtype=torch.float64, generator=generator))[
        0
    ]
    position = torch.randn(3, dtype=torch.float64, generator=generator)
    view = torch.eye(4, dtype=torch.float64)
    view[:3, :3] = rotation
    view[3, :3] = -position @ rotation
    tanfovx, tanfovy, near, far = 0.8, 0.5, 0.1, 50.0
    perspective = torch.zeros(4, 4, dtype=torch.float64)
    perspective[0, 0], perspective[1, 1] = 1 / tanfovx, 1 / tanfovy
    perspective[2, 2], perspective[3, 2], perspective[2, 3] = (
        far / (far - near),
        -far * near / (far - near),
        1.0,
    )
    settings = {
        "image_height": height,
        "image_width": width,
        "tanfovx": tanfovx,
        "tanfovy": tanfovy,
        "bg": torch.tensor([0.1, 0.7, 0.4]).to(device, dtype),
        "scale_modifier": 1.3,
        "viewmatrix": view.to(device, dtype),
        "projmatrix": (view @ perspective).to(device, dtype),
        "sh_degree": 3,
        "campos": position.to(device, dtype),
        "prefiltered": False,
        "debug": False,
    }
    return GaussianRasterizationSettings(**(settings | options))


def to_world(view_points, settings):
    """World points of view-space ones (N, 3)."""
    view = settings.viewmatrix.to(view_points)
    return (view_points - view[3, :3]) @ torch.linalg.inv(view[:3, :3])


def scene(settings, n=10, seed=1):
    """Random Gaussians before that camera, float64, away from what finite differences cannot cross.

    The tests differentiate projections only where they are smooth: view-space x / z and y / z are far from
    the clamp at 1.3 tan(fov / 2) (most inside it, the last two beyond), depths far from the near plane,
    squares far from the edge of the tile grid, and the ratio that antialiasing roots far above its floor.
    Colours lie exactly at their clamp at 0 with probability 0, and both sides of it occur.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(*shape, dtype=torch.float64, generator=generator)

    ratio = uniform(-0.9, 0.9, n, 2)
    ratio[-2:, 0] = torch.tensor([-1.6, 1.5])
    ratio[-1, 1] = 1.7
    z = uniform(2.0, 5.0, n, 1)
    tangents = torch.tensor([settings.tanfovx, settings.tanfovy], dtype=torch.float64)
    return {
        "means3D": to_world(torch.cat([ratio * tangents * z, z], 1), settings),
        "shs": torch.randn(n, 16, 3, dtype=torch.float64, generator=generator) * 0.4,
        "opacities": uniform(0.2, 0.9, n, 1),
        "scales": uniform(0.3, 0.8, n, 3),
        "rotations": torch.randn(n, 4, dtype=torch.float64, generator=generator),
    }


def covariances_of(gaussians, scale_modifier):
    factor = general_oracle.rotation_matrices(gaussians["rotations"]) @ torch.diag_embed(
        scale_modifier * gaussians["scales"]
    )
    sigma = factor @ factor.mT
    rows, columns = torch.triu_indices(3, 3)
    return sigma[:, rows, columns]


def project_arguments(gaussians, settings, covariances=None):
    """The operator's arguments, in order."""
    factors = (gaussians["scales"], gaussians["rotations"]) if covariances is None else (None, None)
    return (
        gaussians["means3D"],
        *factors,
        covariances,
        gaussians["shs"],
        settings.viewmatrix,
        settings.projmatrix,
        settings.campos,
        settings.tanfovx,
        settings.tanfovy,
        settings.scale_modifier,
        settings.image_width,
        settings.image_height,
        settings.sh_degree,
        settings.antialiasing,
    )


def rasterize(gaussians, settings, means2D=None, function=rasterize_gaussians, **changes):
    given = {"colors_precomp": None, "cov3D_precomp": None} | gaussians | changes
    means = given["means3D"]
    means2D = torch.zeros_like(means) if means2D is None else means2D
    names = ("shs", "colors_precomp", "opacities", "scales", "rotations", "cov3D_precomp")
    return function(means, means2D, *[given[name] for name in names], settings)


def leaves(gaussians, dtype=torch.float64, device="cpu"):
    return {name: value.detach().to(device, dtype).requires_grad_() for name, value in gaussians.items()}


def gradients(outputs, inputs, seed=2):
    """Gradients of a random weighting of all outputs, so that none cancels another."""
    generator = torch.Generator().manual_seed(seed)
    loss = sum(
        (out * torch.randn(out.shape, dtype=torch.float64, generator=generator).to(out)).sum()
        for out in outputs
    )
    return torch.autograd.grad(loss, inputs)


def assert_close(ours, theirs, tolerance, what):
    """Within ``tolerance`` of the largest entry: small entries of a gradient are sums of large ones."""
    error = (ours.cpu().double() - theirs.cpu().double()).abs().max().item()
    scale = max(theirs.abs().max().item(), 1e-12)
    assert error <= tolerance * scale, f"{what}: off by {error / scale:.2e} of its largest entry"


# ---------------------------------------------------------------------------------------------------- project


# float64 differs by the order of the sums. In float32 (6e-8) a conic is the inverse of a difference of
# products.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-4)])
@pytest.mark.parametrize("covariances", [False, True], ids=["scales", "covariances"])
@pytest.mark.parametrize("antialiasing", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_project_and_its_gradients_match_the_reference(device, antialiasing, covariances, dtype, tolerance):
    reference_settings = camera(antialiasing=antialiasing)
    settings = camera(antialiasing=antialiasing, dtype=dtype, device=device)
    gaussians = scene(reference_settings)
    if covariances:
        gaussians["cov3D_precomp"] = covariances_of(gaussians, 1.3)
    theirs_in, ours_in = leaves(gaussians), leaves(gaussians, dtype, device)
    theirs = general_oracle.project(
        *project_arguments(theirs_in, reference_settings, theirs_in.get("cov3D_precomp"))
    )
    ours = OPS.project(*project_arguments(ours_in, settings, ours_in.get("cov3D_precomp")))

    assert ours[5].cpu().equal(theirs[5])
    assert (theirs[5] > 0).all(), "the scene is meant to be visible"
    assert bool((theirs[4] < 1).all()) == antialiasing
    for name, our, their in zip(OUTPUTS, ours, theirs, strict=False):
        assert our.dtype == dtype
        assert_close(our, their, tolerance, name)

    factors = ["cov3D_precomp"] if covariances else ["scales", "rotations"]
    names = ["means3D", "shs", *factors]
    ours_grad = gradients(ours[:5], [ours_in[name] for name in names])
    theirs_grad = gradients(theirs[:5], [theirs_in[name] for name in names])
    for name, our, their in zip(names, ours_grad, theirs_grad, strict=True):
        assert_close(our, their, 10 * tolerance, f"gradient of {name}")


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_colours_are_spherical_harmonics_up_to_the_degree(degree):
    settings = camera(sh_degree=degree)
    gaussians = scene(settings)
    colours = OPS.project(*project_arguments(gaussians, settings))[2]
    expected = general_oracle.project(*project_arguments(gaussians, settings))[2]
    torch.testing.assert_close(colours, expected, rtol=0, atol=1e-14)
    fewer = gaussians | {"shs": gaussians["shs"][:, : (degree + 1) ** 2]}
    assert OPS.project(*project_arguments(fewer, settings))[2].equal(colours)


@pytest.mark.parametrize("covariances", [False, True], ids=["scales", "covariances"])
@pytest.mark.parametrize("device", DEVICES)
def test_project_gradcheck(device, covariances):
    settings = camera(antialiasing=True, device=device)
    gaussians = scene(settings, n=4)
    if covariances:
        gaussians["cov3D_precomp"] = covariances_of(gaussians, 1.3)
        del gaussians["scales"], gaussians["rotations"]
    names = [name for name in gaussians if name != "opacities"]
    inputs = leaves({name: gaussians[name] for name in names}, device=device)

    def outputs(*values):
        given = dict(zip(names, values, strict=True))
        return OPS.project(*project_arguments(given, settings, given.get("cov3D_precomp")))[:5]

    assert torch.autograd.gradcheck(outputs, tuple(inputs.values()), eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    settings = camera(dtype=torch.float32, device=device)
    gaussians = leaves(scene(settings, n=4), torch.float32, device)
    torch.library.opcheck(OPS.project.default, project_arguments(gaussians, settings))
    without_shs = project_arguments(gaussians | {"shs": None}, settings, torch.rand(4, 6, device=device))
    torch.library.opcheck(OPS.project.default, without_shs)

    arguments = [
        a.detach() if isinstance(a, torch.Tensor) else a for a in project_arguments(gaussians, settings)
    ]
    outputs = OPS.project(*arguments)
    torch.library.opcheck(OPS.project_backward.default, (*outputs, *arguments))


def test_the_length_of_a_quaternion_does_not_matter():
    settings = camera()
    gaussians = scene(settings)
    longer = gaussians | {"rotations": 7 * gaussians["rotations"]}
    for ours, theirs in zip(
        OPS.project(*project_arguments(longer, settings)),
        OPS.project(*project_arguments(gaussians, settings)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


# ------------------------------------------------------------------------------------------- what can be seen


def test_what_is_not_in_front_of_the_near_plane_is_culled():
    settings = camera()
    depths = torch.tensor([3.0, 0.2001, 0.1999, 0.0, -2.0], dtype=torch.float64)
    gaussians = scene(settings, n=5)
    gaussians["means3D"] = to_world(torch.stack([0 * depths, 0 * depths, depths], 1), settings)
    gaussians = leaves(gaussians)
    *outputs, radii = OPS.project(*project_arguments(gaussians, settings))
    assert (radii > 0).tolist() == [True, True, False, False, False]
    assert mark_visible(gaussians["means3D"], settings.viewmatrix).tolist() == [
        True,
        True,
        False,
        False,
        False,
    ]
    marked = GaussianRasterizer(settings).markVisible(gaussians["means3D"])
    assert marked.dtype == torch.bool and marked.sum() == 2
    for output in outputs:
        assert not output[2:].any()
    for gradient in gradients(
        outputs, [gaussians[name] for name in ("means3D", "shs", "scales", "rotations")]
    ):
        assert gradient.isfinite().all()
        assert not gradient[2:].any() and gradient[:2].any()


def test_visible_where_the_square_of_the_radius_touches_the_grid_of_tiles():
    # 40 x 28 px are covered by tiles up to 48 x 32. A point's footprint is the low-pass filter: radius 3.
    settings = camera()
    u = torch.tensor([-2.99, -3.01, 50.99, 51.01, 20.0, 20.0, 20.0, 20.0], dtype=torch.float64)
    v = torch.tensor([10.0, 10.0, 10.0, 10.0, -2.99, -3.01, 34.99, 35.01], dtype=torch.float64)
    z = 2.0
    x = ((2 * u + 1) / 40 - 1) * settings.tanfovx * z
    y = ((2 * v + 1) / 28 - 1) * settings.tanfovy * z
    gaussians = scene(settings, n=8)
    gaussians["means3D"] = to_world(torch.stack([x, y, torch.full_like(x, z)], 1), settings)
    gaussians["scales"] = torch.full_like(gaussians["scales"], 1e-9)
    means2d, *_, radii = OPS.project(*project_arguments(gaussians, settings))
    assert radii.tolist() == [3, 0] * 4
    torch.testing.assert_close(means2d[::2], torch.stack([u, v], 1)[::2])


def test_not_a_number_is_not_drawn():
    settings = camera()
    gaussians = scene(settings, n=4)
    gaussians["means3D"][0, 1] = math.nan
    gaussians["scales"][1, 1] = math.nan
    gaussians["rotations"][2, 1] = math.inf
    colour, radii, _ = rasterize(gaussians, settings)
    assert (radii > 0).tolist() == [False, False, False, True]
    assert colour.isfinite().all()


def test_nothing_visible_gives_the_background():
    settings = camera()
    gaussians = leaves(scene(settings, n=3))
    behind = gaussians | {
        "means3D": to_world(torch.tensor([[0.0, 0.0, -1.0]] * 3).double(), settings).requires_grad_()
    }
    for given in (behind, {name: value[:0] for name, value in gaussians.items()}):
        colour, radii, inverse_depth = rasterize(given, settings)
        assert colour.equal(settings.bg[:, None, None].expand(3, 28, 40))
        assert not inverse_depth.any() and not radii.any()
        assert len(radii) == len(given["means3D"])
        for gradient in gradients([colour, inverse_depth], list(given.values())):
            assert not gradient.any()


# --------------------------------------------------------------------------------------------- the whole call


@pytest.mark.parametrize("antialiasing", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_images_and_all_gradients_match_the_reference(device, antialiasing):
    reference_settings, settings = (
        camera(antialiasing=antialiasing),
        camera(antialiasing=antialiasing, device=device),
    )
    gaussians = scene(reference_settings, n=30)
    gaussians["means2D"] = 0.02 * scene(reference_settings, n=30, seed=5)["rotations"][:, :3]
    theirs_in, ours_in = leaves(gaussians), leaves(gaussians, device=device)
    theirs = rasterize(
        theirs_in, reference_settings, theirs_in["means2D"], general_oracle.rasterize_gaussians
    )
    ours = rasterize(ours_in, settings, ours_in["means2D"])
    assert [tuple(out.shape) for out in ours] == [(3, 28, 40), (30,), (1, 28, 40)]
    assert ours[1].dtype == torch.int32 and ours[1].cpu().equal(theirs[1])
    # In float64 no alpha is within rounding of its cut-off, so no pixel may differ.
    assert_close(ours[0], theirs[0], 1e-11, "colour")
    assert_close(ours[2], theirs[2], 1e-11, "inverse depth")
    ours_grad = gradients(ours[::2], list(ours_in.values()))
    theirs_grad = gradients(theirs[::2], list(theirs_in.values()))
    for name, our, their in zip(gaussians, ours_grad, theirs_grad, strict=True):
        assert_close(our, their, 1e-9, f"gradient of {name}")


@pytest.mark.parametrize("device", DEVICES)
def test_float32_images_match_but_for_flips_at_the_cut_off(device):
    gaussians = scene(camera(), n=30)
    theirs = rasterize(gaussians, camera())
    ours = rasterize(leaves(gaussians, torch.float32, device), camera(dtype=torch.float32, device=device))
    for our, their in zip(ours[::2], theirs[::2], strict=True):
        error = (our.detach().cpu().double() - their).abs()
        # An alpha at 1/255 that rounding moves across the cut-off changes a pixel by at most that times a
        # colour.
        assert error.max() < 3 / 255
        assert (error > 1e-4).float().mean() < 0.002


def test_gradcheck_of_the_whole_call():
    """Wide, faint Gaussians: alpha is above 1/255 and under 0.99 everywhere, and no pixel ever saturates.

    Together with what `scene` avoids, these are all the places where the image jumps or its gradient does.
    Depths differ by more than the step, so that the order is kept.
    """
    settings = camera(width=9, height=7, antialiasing=True)
    gaussians = scene(settings, n=3)
    ratio = torch.tensor([[-0.3, 0.2], [0.1, -0.2], [0.2, 0.3]], dtype=torch.float64)
    z = torch.tensor([[3.0], [2.0], [4.0]], dtype=torch.float64)
    gaussians["means3D"] = to_world(torch.cat([ratio * z * settings.tanfovy, z], 1), settings)
    gaussians["scales"] = gaussians["scales"] + 1.5
    inputs = leaves(gaussians)

    def images(*values):
        given = dict(zip(inputs, values, strict=True))
        colour, _, inverse_depth = rasterize(given, settings)
        return colour, inverse_depth

    assert torch.autograd.gradcheck(images, tuple(inputs.values()), eps=1e-6, atol=1e-5)


def test_covariances_serve_as_well_as_scales_and_rotations():
    settings = camera(scale_modifier=1.0)
    gaussians = scene(settings)
    expected = rasterize(gaussians, settings)
    given = rasterize(
        gaussians, settings, scales=None, rotations=None, cov3D_precomp=covariances_of(gaussians, 1.0)
    )
    for ours, theirs in zip(given, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_colours_serve_as_well_as_spherical_harmonics():
    settings = camera()
    gaussians = scene(settings)
    colours = OPS.project(*project_arguments(gaussians, settings))[2]
    empty = torch.Tensor([])  # how programs of the field say None
    given = rasterize(gaussians, settings, shs=empty, colors_precomp=colours, cov3D_precomp=empty)
    assert given[0].equal(rasterize(gaussians, settings)[0])


def test_screen_gradient_is_in_ndc():
    """Compared with moving the whole picture by a step in NDC, through the projection matrix."""
    settings = camera()
    gaussians = scene(settings, n=4)
    means2D = torch.zeros_like(gaussians["means3D"]).requires_grad_()
    weights = torch.randn(3, 28, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    def loss(step, axis):
        projmatrix = settings.projmatrix.clone()
        projmatrix[:, axis] += step * projmatrix[:, 3]  # clip_x + step clip_w
        return (weights * rasterize(gaussians, settings._replace(projmatrix=projmatrix), means2D)[0]).sum()

    loss(0.0, 0).backward()
    assert not means2D.grad[:, 2].any()
    for axis in (0, 1):
        with torch.no_grad():
            difference = (loss(1e-7, axis) - loss(-1e-7, axis)) / 2e-7
        # The footprints' edges at alpha = 1/255 pass no pixel centre in so short a step.
        assert means2D.grad[:, axis].sum().item() == pytest.approx(difference.item(), rel=1e-5)


def test_inverse_depth_is_blended_over_zero():
    settings = camera()
    means = to_world(torch.tensor([[0.0, 0.0, 4.0]], dtype=torch.float64), settings).requires_grad_()
    gaussian = {
        "means3D": means,
        "colors_precomp": torch.ones(1, 3, dtype=torch.float64),
        "opacities": torch.tensor([[0.6]], dtype=torch.float64),
        "scales": torch.full((1, 3), 100.0, dtype=torch.float64),  # flat over the image
        "rotations": torch.tensor([[1.0, 0, 0, 0]], dtype=torch.float64),
        "shs": None,
    }
    _, _, inverse_depth = rasterize(gaussian, settings)
    assert inverse_depth[0, 14, 20].item() == pytest.approx(0.6 / 4, rel=1e-4)
    (gradient,) = torch.autograd.grad(inverse_depth[0, 14, 20], means)
    along = gradient[0] @ settings.viewmatrix[:3, 2]
    assert along.item() == pytest.approx(-0.6 / 16, rel=1e-3)


def test_the_nearer_is_in_front_whatever_its_index():
    settings = camera()
    gaussians = scene(settings, n=20)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(4))
    colour, radii, inverse_depth = rasterize(gaussians, settings)
    shuffled = rasterize({name: value[order] for name, value in gaussians.items()}, settings)
    assert shuffled[0].equal(colour)
    assert shuffled[1].equal(radii[order])
    assert shuffled[2].equal(inverse_depth)

    means = to_world(torch.tensor([[0.0, 0.0, 3.0], [0.0, 0.0, 2.0]], dtype=torch.float64), settings)
    red_then_green = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
    pair = {name: value[:1].expand(2, *value.shape[1:]) for name, value in gaussians.items() if name != "shs"}
    pair |= {"means3D": means, "shs": None, "colors_precomp": red_then_green}
    opaque = torch.full((2, 1), 0.99, dtype=torch.float64)
    centre = rasterize(pair, settings, opacities=opaque)[0][:, 14, 20]
    assert centre[1] > 0.9 and centre[0] < 0.1
    same_depth = rasterize(pair, settings, opacities=opaque, means3D=means[:1].expand(2, 3))[0][:, 14, 20]
    assert same_depth[0] > 0.9 and same_depth[1] < 0.1, "of equal depths the first is in front"


# ----------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shs": None}, "exactly one of shs and colors_precomp"),
        ({"colors_precomp": torch.zeros(4, 3).double()}, "exactly one of shs and colors_precomp"),
        ({"scales": None, "rotations": None}, "exactly one of scales with rotations and cov3D_precomp"),
        ({"rotations": None}, "exactly one of scales with rotations and cov3D_precomp"),
        (
            {"cov3D_precomp": torch.zeros(4, 6).double()},
            "exactly one of scales with rotations and cov3D_precomp",
        ),
        ({"scales": torch.ones(3, 3).double()}, "scales must have shape"),
        ({"rotations": torch.ones(4, 3).double()}, "rotations must have shape"),
        ({"means3D": torch.ones(4, 2).double()}, "means3D must have shape|means2D must have shape"),
        ({"opacities": torch.ones(4, 2).double()}, "opacities must have shape"),
        ({"shs": None, "colors_precomp": torch.ones(4, 1).double()}, "colors_precomp must have shape"),
        ({"shs": torch.ones(4, 9, 3).double()}, "at least 16 coefficients for sh_degree 3, got 9"),
        ({"shs": torch.ones(4, 48).double()}, "shs must have shape"),
    ],
)
def test_what_does_not_fit_is_named(changes, message):
    settings = camera()
    with pytest.raises(ValueError, match=message):
        rasterize(scene(settings, n=4), settings, **changes)


def test_screen_points_must_fit():
    settings = camera()
    with pytest.raises(ValueError, match="means2D must have shape"):
        rasterize(scene(settings, n=4), settings, torch.zeros(3, 3).double())


def test_mixed_precision_is_an_error():
    settings = camera()
    gaussians = scene(settings, n=4)
    with pytest.raises(TypeError, match="scales must be"):
        rasterize(gaussians, settings, scales=gaussians["scales"].float())


def test_module_is_the_function():
    settings = camera()
    gaussians = scene(settings)
    means2D = torch.zeros_like(gaussians["means3D"])
    module = GaussianRasterizer(raster_settings=settings)
    for ours, theirs in zip(
        module(means2D=means2D, **gaussians), rasterize(gaussians, settings), strict=True
    ):
        assert ours.equal(theirs)
