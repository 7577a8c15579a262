"""What programs of 3-D Gaussian splatting pass to the rasteriser and expect of it, each from its own interface."""

import math

import general_oracle
import pytest
import torch
from general_oracle import rotation_matrices
from test_general_rasterizer import camera, gradients, leaves, rasterize, scene

import diff_gaussian_rasterization as package
from diff_gaussian_rasterization import (
    GaussianRasterizationSettings,
    GaussianRasterizer,
    SparseGaussianAdam,
    blend,
    fold,
    rasterize_gaussians,
    returning,
    sigma_outside,
    similarity,
)
from diff_gaussian_rasterization.general import RETURNS_VARIABLE

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


def images_of(settings, gaussians=None, **changes):
    gaussians = scene(camera()) if gaussians is None else gaussians
    return rasterize(gaussians, settings, **changes)


# ---- arguments -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_setup_camera_with_a_batch_of_one(device):
    """SplaTAM, Dynamic 3D Gaussians, 4DGaussians: (1, 4, 4) matrices, and no `debug`."""
    width, height, focal, near, far = 64, 48, 60.0, 0.01, 100.0
    w2c = torch.eye(4, device=device)
    w2c[2, 3] = 4
    centre = torch.inverse(w2c)[:3, 3]
    w2c = w2c.unsqueeze(0).transpose(1, 2)
    projection = torch.tensor(
        [
            [2 * focal / width, 0, 0, 0],
            [0, 2 * focal / height, 0, 0],
            [0, 0, far / (far - near), -(far * near) / (far - near)],
            [0, 0, 1.0, 0],
        ],
        device=device,
    )
    full = w2c.bmm(projection.unsqueeze(0).transpose(1, 2))
    given = {
        "image_height": height, "image_width": width, "tanfovx": width / (2 * focal), "tanfovy": height / (2 * focal),
        "bg": torch.zeros(3, device=device), "scale_modifier": 1.0, "sh_degree": 0, "campos": centre,
        "prefiltered": False,
    }  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(20, 3, generator=generator).to(device)
    gaussians = {
        "means3D": means, "means2D": torch.zeros_like(means, requires_grad=True) + 0,
        "colors_precomp": torch.rand(20, 3, generator=generator).to(device),
        "rotations": torch.nn.functional.normalize(torch.randn(20, 4, generator=generator)).to(device),
        "opacities": torch.rand(20, 1, generator=generator).to(device), "scales": torch.full_like(means, 0.1),
    }  # fmt: skip
    batched = GaussianRasterizer(
        raster_settings=GaussianRasterizationSettings(**given, viewmatrix=w2c, projmatrix=full)
    )
    plain = GaussianRasterizer(
        GaussianRasterizationSettings(**given, viewmatrix=w2c[0], projmatrix=full[0], debug=False)
    )
    ours, expected = batched(**gaussians), plain(**gaussians)
    assert ours[0].any()
    for our, their in zip(ours, expected, strict=True):
        assert our.equal(their)
    assert batched.markVisible(means).all()


@pytest.mark.parametrize("shape", [(-1,), (-1, 1), (1, -1, 1)])
def test_opacities_in_each_shape(shape):
    gaussians = scene(camera())
    expected = images_of(camera(), gaussians)
    ours = images_of(camera(), gaussians, opacities=gaussians["opacities"].reshape(shape))
    assert ours[0].equal(expected[0])


@pytest.mark.parametrize("device", DEVICES)
def test_values_of_means2d_are_never_read(device):
    settings = camera(device=device)
    gaussians = {name: value.to(device) for name, value in scene(camera()).items()}
    expected = rasterize(gaussians, settings)
    for values in (math.nan, math.inf, 3.0):
        screen = torch.full_like(gaussians["means3D"], values).requires_grad_()
        ours = rasterize(gaussians, settings, screen)
        assert ours[0].equal(expected[0])
        (gradient,) = torch.autograd.grad(ours[0].sum(), screen)
        assert gradient.isfinite().all() and gradient[:, :2].any() and not gradient[:, 2].any()
    given = {name: value for name, value in gaussians.items() if name != "means3D"}
    assert GaussianRasterizer(settings)(gaussians["means3D"], None, **given)[0].equal(expected[0])


@pytest.mark.parametrize("device", DEVICES)
def test_absolute_gradient_is_the_sum_of_each_pixels_magnitude(device):
    """AbsGS, GOF: four columns of means2D. The reference differentiates one pixel at a time."""
    settings = camera(width=9, height=7, device=device)
    gaussians = {name: value.to(device) for name, value in scene(camera(width=9, height=7)).items()}
    n = len(gaussians["means3D"])
    screen = torch.zeros(n, 4, dtype=torch.float64, device=device, requires_grad=True)
    generator = torch.Generator().manual_seed(3)
    weights = torch.randn(4, 7, 9, dtype=torch.float64, generator=generator).to(device)

    def weighted(given):
        colour, _, depth = rasterize(gaussians, settings, given)
        return (torch.cat([colour, depth]) * weights).sum(0)

    (ours,) = torch.autograd.grad(weighted(screen).sum(), screen)
    plain = torch.zeros(n, 3, dtype=torch.float64, requires_grad=True, device=device)
    colour, _, depth = general_oracle.rasterize_gaussians(
        gaussians["means3D"], plain, gaussians["shs"], None, gaussians["opacities"], gaussians["scales"],
        gaussians["rotations"], None, settings,
    )  # fmt: skip
    pixels = (torch.cat([colour, depth]) * weights).sum(0).flatten()
    each = torch.stack([torch.autograd.grad(pixel, plain, retain_graph=True)[0] for pixel in pixels])
    torch.testing.assert_close(ours[:, :2], each.sum(0)[:, :2], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ours[:, 2:], each.abs().sum(0)[:, :2], rtol=1e-9, atol=1e-9)
    assert (ours[:, 2:] > 1.01 * ours[:, :2].abs()).any()


@pytest.mark.parametrize("device", DEVICES)
def test_touched_counts_the_pixels_that_a_gaussian_is_seen_at(device):
    """MonoGS: drawn, and more than half of the transmittance left. The reference adds one Gaussian at a time."""
    settings = camera(device=device)
    gaussians = {name: value.to(device) for name, value in scene(camera(), n=30).items()}
    with returning("touched"):
        colour, radii, depth, alpha, touched = rasterize(gaussians, settings)
    with returning("depth_alpha"):
        for our, their in zip((colour, radii, depth, alpha), rasterize(gaussians, settings), strict=True):
            assert our.equal(their)
        z = gaussians["means3D"] @ settings.viewmatrix[:3, 2] + settings.viewmatrix[3, 2]
        order = torch.argsort(z)
        before = torch.ones_like(alpha)
        expected = torch.zeros_like(touched)
        for k, n in enumerate(order.tolist()):
            first = {name: value[order[: k + 1]] for name, value in gaussians.items()}
            after = 1 - rasterize(first, settings)[3]
            expected[n] = ((after < before) & (before > 0.5)).sum()
            before = after
    assert touched.dtype == torch.int32 and touched.equal(expected)
    assert touched.max() > 50 and (touched == 0).any()


def test_dc_apart_from_the_rest():
    """graphdeco's training with `separate_sh`, which the presence of SparseGaussianAdam switches on."""
    settings = camera()
    gaussians = scene(settings)
    expected = rasterize(gaussians, settings)
    shs = gaussians.pop("shs")
    ours = GaussianRasterizer(settings)(means2D=None, dc=shs[:, :1], shs=shs[:, 1:], **gaussians)
    assert ours[0].equal(expected[0])
    only = GaussianRasterizer(settings._replace(sh_degree=0))(
        means2D=None, dc=shs[:, :1], shs=None, **gaussians
    )
    assert only[0].any()


def test_visible_filter():
    """Scaffold-GS: which anchors are worth decoding."""
    settings = camera()
    gaussians = scene(settings)
    gaussians["means3D"][3] = settings.campos.double()  # not in front
    radii = GaussianRasterizer(settings).visible_filter(
        means3D=gaussians["means3D"], scales=gaussians["scales"], rotations=gaussians["rotations"],
        cov3D_precomp=None,
    )  # fmt: skip
    assert radii.equal(rasterize(gaussians, settings)[1]) and radii[3] == 0 and (radii > 0).sum() == 9


def test_compiled_module_by_its_usual_name():
    from diff_gaussian_rasterization import _C

    settings = camera()
    points = scene(settings)["means3D"]
    seen = _C.mark_visible(points, settings.viewmatrix, settings.projmatrix)
    assert seen.equal(GaussianRasterizer(settings).markVisible(points))
    with pytest.raises(AttributeError, match="GaussianRasterizer"):
        _ = _C.rasterize_gaussians_filter


# ---- what comes back -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["settings", "context", "environment"])
@pytest.mark.parametrize("form", list(package.RETURNS))
def test_forms_of_the_result(form, how, monkeypatch):
    gaussians = leaves(scene(camera()))
    colour, radii, inverse_depth = rasterize(gaussians, camera())
    settings = camera(returns=form if how == "settings" else None)
    if how == "environment":
        monkeypatch.setenv(RETURNS_VARIABLE, form)
    if how == "context":
        with returning(form):
            out = rasterize(gaussians, settings)
        assert len(rasterize(gaussians, settings)) == 3
    else:
        out = rasterize(gaussians, settings)
    assert len(out) == {"radii": 2, "depth_alpha": 4, "touched": 5}.get(form, 3)
    assert out[0].equal(colour) and out[1].equal(radii)
    if form == "inverse_depth":
        assert out[2].equal(inverse_depth)
    if form == "depth_alpha":
        black, _, depth, alpha = rasterize(gaussians, settings._replace(bg=torch.zeros(3), returns=form))
        assert alpha.shape == depth.shape == (1, 28, 40)
        torch.testing.assert_close(black + (1 - alpha) * settings.bg[:, None, None], colour)


def test_depth_and_alpha_have_gradients():
    settings = camera(width=9, height=7, returns="depth_alpha")
    gaussians = scene(settings, n=3)
    gaussians["scales"] = gaussians["scales"] + 1.5
    inputs = leaves({name: gaussians[name] for name in ("means3D", "opacities", "scales")})

    def images(*values):
        return rasterize(gaussians | dict(zip(inputs, values, strict=True)), settings)[2:]

    assert torch.autograd.gradcheck(images, tuple(inputs.values()), eps=1e-6, atol=1e-5)


def test_unknown_form_is_named(monkeypatch):
    with pytest.raises(ValueError, match=r"settings\.returns: 'rgbd' is not one of radii, inverse_depth"):
        images_of(camera(returns="rgbd"))
    monkeypatch.setenv(RETURNS_VARIABLE, "all")
    with pytest.raises(ValueError, match=f"{RETURNS_VARIABLE}: 'all'"):
        images_of(camera())


# ---- options -------------------------------------------------------------------------------------------------------


def test_quaternions_as_given():
    """Deformable-3D-Gaussians, 4DGaussians: get_rotation + d_rotation is not normalised, and scales with its length."""
    settings = camera(normalise_rotations=False)
    gaussians = scene(settings)
    units = torch.nn.functional.normalize(gaussians["rotations"], dim=1)
    expected = images_of(camera(), gaussians)
    ours = images_of(settings, gaussians, rotations=units)
    torch.testing.assert_close(ours[0], expected[0], rtol=1e-10, atol=1e-10)
    longer = images_of(settings, gaussians, rotations=1.1 * units)
    # R(q) of a quaternion as long as s is I + s^2 (R(u) - I).
    turned = torch.eye(3).double() + 1.1**2 * (rotation_matrices(units) - torch.eye(3).double())
    factors = turned * (1.3 * gaussians["scales"])[:, None, :]
    covariance = (factors @ factors.mT).reshape(-1, 9)[:, [0, 1, 2, 4, 5, 8]]
    theirs = images_of(camera(), gaussians, scales=None, rotations=None, cov3D_precomp=covariance)
    torch.testing.assert_close(longer[0], theirs[0], rtol=1e-10, atol=1e-10)
    assert (longer[0] - expected[0]).abs().max() > 1e-3


def test_kernel_size_is_the_low_pass_filter():
    """Mip-Splatting's settings."""
    gaussians = scene(camera())
    assert images_of(camera(kernel_size=0.3), gaussians)[0].equal(images_of(camera(), gaussians)[0])
    wide = images_of(camera(kernel_size=3.0), gaussians)
    assert (wide[1] >= images_of(camera(), gaussians)[1]).all()
    assert (wide[0] - images_of(camera(), gaussians)[0]).abs().max() > 1e-3
    with pytest.raises(ValueError, match="kernel_size must not be negative"):
        images_of(camera(kernel_size=-1.0))
    offset = torch.zeros(28, 40, 2)
    assert images_of(camera(subpixel_offset=offset), gaussians)[0].equal(images_of(camera(), gaussians)[0])
    one = images_of(camera(subpixel_offset=offset + torch.tensor([1.0, 0.0])), gaussians)[0]
    torch.testing.assert_close(one[:, :, :-1], images_of(camera(), gaussians)[0][:, :, 1:])
    offset[3, 4] = 0.5
    with pytest.raises(ValueError, match="the same at every pixel"):
        images_of(camera(subpixel_offset=offset))


# ---- poses ---------------------------------------------------------------------------------------------------------


def smooth(n=3):
    """A scene without jumps, as in test_gradcheck_of_the_whole_call, and its camera."""
    settings = camera(width=9, height=7)
    gaussians = scene(settings, n=n)
    gaussians["scales"] = gaussians["scales"] + 1.5
    return settings, gaussians


def test_gradients_by_the_camera():
    settings, gaussians = smooth()
    projection = torch.linalg.inv(settings.viewmatrix) @ settings.projmatrix

    def images(view, centre):  # the projection is derived from the view, as in the field's cameras
        given = settings._replace(viewmatrix=view, projmatrix=view @ projection, campos=centre)
        return rasterize(gaussians, given)[::2]

    view, centre = settings.viewmatrix.clone().requires_grad_(), settings.campos.clone().requires_grad_()
    # Only the first three columns of a view matter.
    mask = torch.ones(4, 4, dtype=torch.float64)
    mask[:, 3] = 0
    last = settings.viewmatrix * (1 - mask)
    assert torch.autograd.gradcheck(
        lambda v, c: images(v * mask + last, c), (view, centre), eps=1e-6, atol=1e-5
    )
    # A projection without its own gradient moves along.
    fixed = settings._replace(viewmatrix=view, campos=centre)
    (along,) = gradients(rasterize(gaussians, fixed)[::2], [view])
    (whole,) = gradients(images(view, centre), [view])
    torch.testing.assert_close(along[:, :3], whole[:, :3], rtol=1e-8, atol=1e-8)
    plain = rasterize(gaussians, settings)
    for ours, theirs in zip(rasterize(gaussians, fixed), plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_theta_and_rho_are_a_small_motion_of_the_camera():
    """MonoGS: the pose's tangent space, whose values are never read."""
    settings, gaussians = smooth()
    theta, rho = (torch.full((3,), 5.0, dtype=torch.float64, requires_grad=True) for _ in range(2))
    out = GaussianRasterizer(settings)(means2D=None, theta=theta, rho=rho, **gaussians)
    torch.testing.assert_close(out[0], rasterize(gaussians, settings)[0], rtol=1e-10, atol=1e-10)
    by_theta, by_rho = gradients(out[::2], [theta, rho])
    projection = torch.linalg.inv(settings.viewmatrix) @ settings.projmatrix

    def loss(axis, step, turn):
        w2c = settings.viewmatrix.T.clone()
        tangent = torch.zeros(4, 4, dtype=torch.float64)
        if turn:
            i, j = (axis + 1) % 3, (axis + 2) % 3
            tangent[i, j], tangent[j, i] = -step, step
        else:
            tangent[axis, 3] = step
        view = (torch.matrix_exp(tangent) @ w2c).T
        moved = settings._replace(
            viewmatrix=view,
            projmatrix=view @ projection,
            campos=-view[3, :3] @ torch.linalg.inv(view[:3, :3]),
        )
        generator = torch.Generator().manual_seed(2)
        return sum(
            (o * torch.randn(o.shape, dtype=torch.float64, generator=generator)).sum()
            for o in rasterize(gaussians, moved)[::2]
        ).item()

    for gradient, turn in ((by_theta, True), (by_rho, False)):
        numeric = [(loss(axis, 1e-5, turn) - loss(axis, -1e-5, turn)) / 2e-5 for axis in range(3)]
        torch.testing.assert_close(gradient, torch.tensor(numeric).double(), rtol=1e-5, atol=1e-5)


# ---- the optimiser -------------------------------------------------------------------------------------------------


def test_sparse_adam_moves_the_visible():
    parameter = torch.nn.Parameter(torch.zeros(6, 2))
    optimizer = SparseGaussianAdam([{"params": [parameter], "lr": 0.1, "name": "xyz"}], lr=0.0, eps=1e-15)
    visible = torch.tensor([True, False, True, True, False, False])
    parameter.grad = torch.ones(6, 2)
    optimizer.step(visible, 6)
    # Without bias correction: lr (1 - beta1) / sqrt(1 - beta2), 3.16 times the first step of torch.optim.Adam.
    assert (
        parameter[visible].allclose(torch.tensor(-0.1 * 0.1 / 0.001**0.5)) and not parameter[~visible].any()
    )
    state = optimizer.state[parameter]
    assert state["exp_avg"][visible].allclose(torch.tensor(0.1)) and not state["exp_avg"][~visible].any()
    with pytest.raises(ValueError, match="visibility must have shape"):
        optimizer.step(visible, 7)


# ---- autograd ------------------------------------------------------------------------------------------------------


def test_forward_mode_is_an_error_and_not_zero():
    settings = camera()
    gaussians = scene(settings)

    def colour(means):
        return rasterize(gaussians | {"means3D": means}, settings)[0]

    means = gaussians["means3D"]
    with pytest.raises(NotImplementedError, match="no forward-mode"):
        torch.func.jvp(colour, (means,), (torch.ones_like(means),))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="no forward-mode"):
        colour(torch.autograd.forward_ad.make_dual(means, torch.ones_like(means)))
    images = torch.rand(1, 1, 12, 12)
    with pytest.raises(NotImplementedError, match="similarity has"):
        torch.func.jvp(lambda x: similarity(x, images)[0], (images,), (images,))


@pytest.mark.parametrize("name", ["fold", "blend", "projection", "similarity", "sigma_outside"])
def test_differentiated_twice_says_which(name):
    x = torch.rand(5, 3, dtype=torch.float64).requires_grad_()
    n, ones = 5, torch.ones(5, dtype=torch.float64)
    if name == "fold":
        scale = torch.full((n, 3), -3.0).double()
        times = torch.tensor([0.5]).double()
        out = fold(x, x.new_zeros(n, 2), 0 * ones, ones, scale, 0 * ones, times, times / times, 20.0, 9, 9)[0]
    elif name == "blend":
        conics = torch.tensor([0.1, 0, 0.1]).double().expand(1, n, 3)
        active = torch.ones(1, n, dtype=torch.uint8)
        out = blend(
            9 * x[None, :, :2], conics, active, 0.5 * ones[None], ones[None, :, None], ones[None, :1],
            [0], [0], [1], 9, 9,
        )[0]  # fmt: skip
    elif name == "projection":
        settings = camera()
        given = scene(settings, n=n)
        x = given["means3D"].requires_grad_()
        out = torch.ops.diff_gaussian_rasterization.project(
            x, given["scales"], given["rotations"], None, given["shs"], settings.viewmatrix, settings.projmatrix,
            settings.campos, 0.8, 0.5, 1.0, 40, 28, 3, False,
        )[1]  # fmt: skip
    elif name == "similarity":
        x = torch.rand(1, 1, 12, 12).requires_grad_()
        out = similarity(x, torch.rand(1, 1, 12, 12))[1]
    else:
        x = torch.randn(50).requires_grad_()
        out = sigma_outside(x, 0.5, 1.0)
    (gradient,) = torch.autograd.grad((out**2).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=f"{name} can be differentiated once"):
        gradient.sum().backward()


@pytest.mark.parametrize("device", DEVICES)
def test_a_harmonic_that_is_no_number_stays_with_its_colour(device):
    settings = camera(device=device)
    gaussians = leaves(scene(camera()), device=device)
    with torch.no_grad():
        gaussians["shs"][2, 1, 0] = math.nan
    colour, _, _ = rasterize(gaussians, settings)
    assert colour.isfinite().all()
    means, shs = gradients([colour], [gaussians["means3D"], gaussians["shs"]])
    assert means.isfinite().all() and shs.isfinite().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"opacities": torch.ones(10, 1).numpy()}, "opacities must be a torch.Tensor, got numpy.ndarray"),
        (
            {"scales": torch.ones(10, 3).float()},
            "scales must be torch.float64 as means3D is, got torch.float32",
        ),
        ({"means2D": torch.ones(10, 3).float()}, "means2D must be torch.float64"),
        ({"opacities": None}, "opacities must be a torch.Tensor, got builtins.NoneType"),
    ],
)
def test_what_is_of_another_type_is_named(changes, message):
    settings = camera()
    gaussians = scene(settings) | changes
    screen = gaussians.pop("means2D", None)
    names = ("shs", "colors", "opacities", "scales", "rotations", "cov")
    with pytest.raises(TypeError, match=message):
        rasterize_gaussians(gaussians["means3D"], screen, *(gaussians.get(name) for name in names), settings)
