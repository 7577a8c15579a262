"""The model's numbers: initial values, times, activations, rates and their schedule."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from arguments import ModelOptions, OptimisationOptions
from gaussian_renderer import RASTERIZERS, rasterizer
from scene.cameras import Camera
from scene.gaussian_model import GaussianModel
from scene.parameters import IMAGE, SEGMENTATION
from training.optimizer import make_optimizer, set_rates
from utils.spherical_harmonics import basis, to_colour

N = 4000
CAMERA = Camera(24, 20, distance=2.0)
HALF_WIDTH = 2.0 * math.tan(0.6911112070083618 / 2)


def random_model(channels=1, num_frames=5, seed=0, camera=CAMERA, **options):
    options = ModelOptions(**{"num_pts": N, "poly_degree": 3, **options})
    return GaussianModel.random(options, camera, num_frames, channels, torch.Generator().manual_seed(seed))


def made(**changes: Tensor) -> GaussianModel:
    """Three Gaussians, all raw values 0, but for ``changes``."""
    shapes = {
        "xyz": (3, 3), "f_dc": (3, 1, 1), "f_rest": (3, 3, 1), "opacity": (3, 1), "scaling": (3, 3),
        "rotation": (3, 1), "m": (3, 1), "sigma": (3, 1, 1), "w1": (3, 4),
    }  # fmt: skip
    time_func = changes.pop("time_func", torch.full((4,), 0.25))
    return GaussianModel({name: torch.zeros(shape) for name, shape in shapes.items()} | changes, time_func)


def colours(model: GaussianModel) -> Tensor:
    """(N, C) of the image head."""
    return to_colour(model.raw_colours([IMAGE], CAMERA))[0].detach()


def assert_uniform(values: Tensor, low: float, high: float) -> None:
    """Kolmogorov-Smirnov at about the 1 % level; seeds are fixed, so this passes always or never."""
    values = values.detach().double().flatten().sort().values
    assert values[0] >= low - 1e-6 and values[-1] <= high + 1e-6
    cdf = (values - low) / (high - low)
    n = len(values)
    assert (cdf - (torch.arange(n) + 0.5) / n).abs().max() < 1.63 / math.sqrt(n)


# ---- initial values ------------------------------------------------------------------------------------------------


def test_initial_places_paths_and_times_are_uniform():
    p = random_model().params
    assert_uniform(p["xyz"][:, 0], -HALF_WIDTH, HALF_WIDTH)
    assert_uniform(p["xyz"][:, 2], -HALF_WIDTH * 20 / 24, HALF_WIDTH * 20 / 24)
    assert (p["xyz"][:, 1] == 0).all()
    assert_uniform(p["w1"], -1, 1)
    assert_uniform(torch.sigmoid(p["m"]), 0, 1)
    assert_uniform(torch.exp(p["sigma"]), 0.01, 1.0)
    assert_uniform(torch.sigmoid(p["rotation"]), 0, 1)
    assert all(value.isfinite().all() for value in p.values())


def test_initial_values_are_drawn_independently():
    p = random_model().params
    columns = [
        p["xyz"][:, 0],
        p["xyz"][:, 2],
        p["m"][:, 0],
        p["sigma"][:, 0, 0],
        p["rotation"][:, 0],
        *p["w1"].T,
    ]
    correlation = torch.corrcoef(torch.stack(columns).detach())
    assert (correlation - torch.eye(len(columns))).abs().max() < 4 / math.sqrt(N)


def test_initial_scale_is_the_distance_to_the_nearest_three():
    p = random_model(num_pts=200).params
    squared = (
        torch.cdist(p["xyz"].double(), p["xyz"].double(), compute_mode="donot_use_mm_for_euclid_dist") ** 2
    )
    nearest = (
        squared.topk(4, largest=False).values[:, 1:].mean(1)
    )  # the nearest neighbour is the point itself
    expected = nearest.sqrt().log().float()[:, None].expand(-1, 3)
    torch.testing.assert_close(p["scaling"].detach(), expected.detach(), rtol=1e-4, atol=1e-4)


def test_initial_scale_has_a_floor():
    p = random_model(num_pts=50, camera=Camera(24, 20, distance=1e-6)).params
    torch.testing.assert_close(p["scaling"].detach(), torch.full((50, 3), 0.5 * math.log(1e-7)))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("degree", [0, 2])
def test_initial_appearance(channels, degree):
    model = random_model(channels, num_pts=10, sh_degree=degree)
    assert model.params["f_dc"].shape == (10, 1, channels)
    assert model.params["f_dc"].unique().tolist() == pytest.approx([-0.00695], abs=2e-6)
    assert model.params["f_rest"].shape == (10, (degree + 1) ** 2 - 1, channels)
    assert (model.params["f_rest"] == 0).all()
    assert model.params["opacity"].unique().tolist() == pytest.approx([-math.log(9)], rel=1e-6)
    torch.testing.assert_close(colours(model), torch.full((10, channels), 127 / 255))
    torch.testing.assert_close(model.opacities([IMAGE]).detach(), torch.full((1, 10), 0.1))


def test_initial_shapes_and_sizes():
    model = random_model(num_pts=10, poly_degree=7, sh_degree=3)
    shapes = {name: tuple(value.shape) for name, value in model.params.items()}
    assert shapes == {
        "xyz": (10, 3), "f_dc": (10, 1, 1), "f_rest": (10, 15, 1), "opacity": (10, 1), "scaling": (10, 3),
        "rotation": (10, 1), "m": (10, 1), "sigma": (10, 1, 1), "w1": (10, 14),
    }  # fmt: skip
    assert (len(model), model.poly_degree, model.sh_degree, model.active_sh_degree) == (10, 7, 3, 0)
    assert (model.num_frames, model.uses_dff, model.channels, model.heads) == (5, False, 1, (IMAGE,))
    assert model.time_func.tolist() == pytest.approx([0.2] * 5)
    assert not model.time_func.requires_grad


def test_the_seed_decides_everything():
    a, b, c = random_model(seed=3), random_model(seed=3), random_model(seed=4)
    assert all(torch.equal(a.params[name], b.params[name]) for name in a.params)
    assert not torch.equal(a.params["xyz"], c.params["xyz"])


@pytest.mark.parametrize("n", [1, 2, 3])
def test_few_gaussians_are_finite(n):
    assert random_model(num_pts=n).params["scaling"].isfinite().all()


def test_the_segmentation_head_is_a_copy_of_its_own():
    model = random_model(num_pts=10, sh_degree=1)
    model.params["f_rest"].data.normal_()
    model.add_segmentation_head()
    assert model.heads == (IMAGE, SEGMENTATION)
    for name in ("f_dc", "f_rest", "opacity"):
        copy = model.params[f"{name}_seg"]
        assert torch.equal(copy, model.params[name]) and copy.data_ptr() != model.params[name].data_ptr()
        assert copy.requires_grad and copy.is_leaf


# ---- times ---------------------------------------------------------------------------------------------------------


def test_frames_lie_at_k_over_K_and_the_last_reaches_towards_1():
    times = made().times([0, 1, 2, 3, 1.5, 3.25, 3.75])
    assert times.tolist() == pytest.approx([0, 0.25, 0.5, 0.75, 0.375, 0.8125, 0.9375])


def test_times_follow_the_durations():
    model = made(time_func=torch.tensor([0.1, 0.2, 0.3, 0.4]))
    assert model.times([0, 1, 2, 3, 0.5, 2.5, 3.5]).tolist() == pytest.approx(
        [0, 0.1, 0.3, 0.6, 0.05, 0.45, 0.8]
    )


def test_times_of_long_sequences_are_exact_enough():
    frames = 1000
    model = made(time_func=torch.full((frames,), 1 / frames))
    times = model.times([float(k) for k in range(frames)])
    torch.testing.assert_close(times, torch.arange(frames) / frames, rtol=0, atol=2e-5)  # 1/50 of a frame


def test_learned_times_run_from_0_to_1():
    logits = torch.tensor([[0.0], [math.log(3)]])
    model = made(time_func=logits)
    assert model.uses_dff and model.num_frames == 3 and model.time_func.requires_grad
    times = model.times([0, 1, 2, 0.5, 1.5, 2.5])
    assert times.tolist() == pytest.approx([0, 0.25, 1, 0.125, 0.625, 1])
    times[1].backward()
    # dt_1/dlogits of the softmax: p0 (1 - p0), -p0 p1
    assert model.time_func.grad.flatten().tolist() == pytest.approx([3 / 16, -3 / 16])


def test_learned_times_start_evenly():
    model = random_model(num_pts=4, use_dff=True, num_frames=5)
    assert tuple(model.time_func.shape) == (4, 1)
    assert model.times([0, 1, 2, 3, 4]).tolist() == pytest.approx([0, 0.25, 0.5, 0.75, 1])


# ---- activations ---------------------------------------------------------------------------------------------------


def test_activations():
    model = made(
        opacity=torch.tensor([[0.0], [math.log(3)], [-math.log(3)]]),
        sigma=torch.log(torch.tensor([0.5, 1.0, 2.0])).view(3, 1, 1),
        scaling=torch.log(torch.tensor([[0.1, 9.0, 0.2], [0.3, 9.0, 0.4], [0.5, 9.0, 0.6]])),
        f_dc=torch.tensor([0.0, 1.0, -2.0]).view(3, 1, 1),
    )
    model.add_segmentation_head()
    model.params["opacity_seg"].data.fill_(math.log(4))
    opacities = model.opacities([SEGMENTATION, IMAGE])
    torch.testing.assert_close(opacities, torch.tensor([[0.8, 0.8, 0.8], [0.5, 0.75, 0.25]]))
    torch.testing.assert_close(model.spreads(), torch.tensor([0.5, 1.0, 2.0]))
    torch.testing.assert_close(model.scales(), torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]]))
    assert colours(model)[:, 0].tolist() == pytest.approx([0.5, 0.5 + 0.28209479177387814, 0])


def test_harmonics_look_from_the_camera_to_the_raw_centre():
    # y is read as 0, and neither m nor the path changes the direction.
    model = made(
        xyz=torch.tensor([[0.3, 5.0, -0.4]]).expand(3, 3),
        f_rest=torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]])[:, :, None],
        w1=torch.ones(3, 4),
        m=torch.full((3, 1), 2.0),
    )
    assert colours(model)[:, 0].tolist() == [0.5] * 3  # degree 0 is in use
    model.active_sh_degree = 1
    length = math.sqrt(0.3**2 + 2.0**2 + 0.4**2)
    k = 0.4886025119029199 / length
    expected = [max(0.0, 0.5 - k * 2.0), 0.5 - k * 0.4, 0.5 - k * 0.3]
    assert colours(model)[:, 0].tolist() == pytest.approx(expected, abs=1e-6)


def test_each_head_has_its_own_harmonics():
    model = made(f_rest=torch.randn(3, 3, 1, generator=torch.Generator().manual_seed(0)))
    model.add_segmentation_head()
    model.active_sh_degree = 1
    model.params["f_dc_seg"].data += 1
    model.params["f_rest_seg"].data *= 2
    image, seg = model.raw_colours([IMAGE, SEGMENTATION], CAMERA).detach()
    torch.testing.assert_close(seg, 2 * image + 1)  # f_dc is 0
    assert torch.equal(model.raw_colours([SEGMENTATION], CAMERA)[0], seg)


def test_the_colours_sum_is_clamped_once():
    model = made(
        f_dc=torch.full((3, 1, 1), -3.0), f_rest=torch.tensor([0.0, 0, -2]).view(1, 3, 1).expand(3, 3, 1)
    )
    model.params["xyz"].data[:] = torch.tensor([3.0, 0, 0])
    model.active_sh_degree = 1
    expected = 0.5 - 3 * 0.28209479177387814 + 2 * 0.4886025119029199 * 3 / math.sqrt(13)
    assert colours(model)[0, 0].item() == pytest.approx(expected, abs=1e-6)


def test_harmonics_are_orthonormal():
    # Midpoints in the azimuth and Gauss points in z integrate these polynomials exactly.
    z, weight = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(8))
    azimuth = (torch.arange(16).double() + 0.5) * 2 * math.pi / 16
    z, azimuth = (grid.flatten() for grid in torch.meshgrid(z, azimuth, indexing="ij"))
    r = torch.sqrt(1 - z**2)
    values = basis(torch.stack([r * azimuth.cos(), r * azimuth.sin(), z], 1), 3)  # (128, 15)
    values = torch.cat([torch.full((128, 1), 0.28209479177387814, dtype=torch.float64), values], 1)
    weight = weight.repeat_interleave(16) * 2 * math.pi / 16
    torch.testing.assert_close(
        values.T @ (weight[:, None] * values), torch.eye(16).double(), rtol=0, atol=1e-9
    )


def test_signs_of_the_harmonics():
    # Orders -l .. l of each degree, with the sign (-1)^m: those of published models.
    x, y, z = 0.48, 0.6, 0.64
    signs = [-y, z, -x, x * y, -y * z, 3 * z * z - 1, -x * z, x * x - y * y]
    signs += [
        -y * (3 * x * x - y * y),
        x * y * z,
        -y * (5 * z * z - 1),
        z * (5 * z * z - 3),
        -x * (5 * z * z - 1),
    ]
    signs += [z * (x * x - y * y), -x * (x * x - 3 * y * y)]
    values = basis(torch.tensor([[x, y, z]]), 3)[0]
    assert torch.equal(values.sign(), torch.tensor(signs).sign())
    for degree in (1, 2, 3):
        assert torch.equal(basis(torch.tensor([[x, y, z]]), degree)[0], values[: (degree + 1) ** 2 - 1])


# ---- the optimizer -------------------------------------------------------------------------------------------------

RATES = {
    "f_dc": 2.5e-3, "f_rest": 1.25e-4, "opacity": 2.5e-2, "scaling": 5e-3, "rotation": 1e-3,
    "m": 1e-3, "sigma": 1e-3, "w1": 1e-3,
}  # fmt: skip


@dataclass
class Group:
    names: list[str]
    rates: list[float]

    @classmethod
    def of(cls, optimizer):
        groups = optimizer.param_groups
        return cls([g["name"] for g in groups], [g["lr"] for g in groups])


def test_one_group_a_parameter_in_the_published_order():
    model = random_model(num_pts=4, use_dff=True)
    model.add_segmentation_head()
    optimizer = make_optimizer(model, OptimisationOptions())
    set_rates(model, optimizer, 0, OptimisationOptions(), extent=2.2)
    groups = Group.of(optimizer)
    seg = ["f_dc_seg", "f_rest_seg", "opacity_seg"]
    assert groups.names == ["xyz", *RATES, "time_func", *seg]
    expected = [2.2 * 1.6e-4, *RATES.values(), 1e-3, 2.5e-3, 1.25e-4, 2.5e-2]
    assert groups.rates == pytest.approx(expected)
    for group in optimizer.param_groups:
        assert (group["eps"], group["betas"], group["weight_decay"]) == (1e-15, (0.9, 0.999), 0)
        assert not group["amsgrad"] and not group["maximize"] and len(group["params"]) == 1
        name = group["name"]
        assert group["params"][0] is (model.time_func if name == "time_func" else model.params[name])


def test_fixed_times_and_one_head_have_no_groups():
    assert Group.of(make_optimizer(random_model(num_pts=4), OptimisationOptions())).names == ["xyz", *RATES]


def test_seg_head_only_trains_one_group_and_freezes_the_rest():
    model = random_model(num_pts=4, use_dff=True)
    model.add_segmentation_head()
    optimizer = make_optimizer(model, OptimisationOptions(), head_only=True)
    (group,) = optimizer.param_groups
    assert (group["name"], group["lr"]) == ("seg_head", 2.5e-3)
    names = ["opacity_seg", "f_dc_seg", "f_rest_seg"]
    assert all(p is model.params[name] for p, name in zip(group["params"], names, strict=True))
    assert {name for name, value in model.params.items() if value.requires_grad} == set(names)
    assert not model.time_func.requires_grad


@pytest.mark.parametrize("name", RASTERIZERS)
def test_steps_are_those_of_torch_adam(name):
    # Rates from large to none, gradients that vanish, and eps of 1e-15: a first step is the rate, however small.
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator) for shape in ((37, 3), (37, 1), (37, 4, 1), (0, 3))]
    rates = [1e-1, 1e-3, 0.0, 1e-2]
    ours, theirs = ([torch.nn.Parameter(v.clone()) for v in values] for _ in range(2))
    groups = [[{"params": [p], "lr": lr} for p, lr in zip(own, rates, strict=True)] for own in (ours, theirs)]
    optimizers = (
        rasterizer(name).Adam(groups[0], lr=0.0, eps=1e-15),
        torch.optim.Adam(groups[1], lr=0.0, eps=1e-15),
    )
    for step in range(5):
        for a, b in zip(ours, theirs, strict=True):
            gradient = torch.randn(a.shape, generator=generator) * 10 ** (-3.0 * step)
            gradient[::4] = 0
            a.grad, b.grad = gradient, gradient.clone()
        if step == 3:
            ours[1].grad = theirs[1].grad = None  # as after an exchange: no step, and no count
        for optimizer in optimizers:
            optimizer.step()
    # Steps are about as large as the rate; betas in float32 cost them 1e-5 of that, five times.
    for a, b, rate in zip(ours, theirs, rates, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=5e-5 * rate)
    a, b = (optimizer.state_dict()["state"] for optimizer in optimizers)
    for index in a:
        for key in ("step", "exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(a[index][key], b[index][key], rtol=5e-5, atol=1e-30)


@pytest.mark.parametrize(
    ("iteration", "rate"),
    [(0, 1.6e-4), (15_000, 1.6e-5), (7_500, 1.6e-4 / 10**0.5), (30_000, 1.6e-6), (40_000, 1.6e-6)],
)
def test_the_rate_of_xyz_decays_log_linearly(iteration, rate):
    model = random_model(num_pts=4)
    optimizer = make_optimizer(model, OptimisationOptions())
    set_rates(model, optimizer, iteration, OptimisationOptions(), extent=1.1)
    assert Group.of(optimizer).rates == pytest.approx([1.1 * rate, *RATES.values()])


def test_the_degree_of_the_harmonics_grows_every_1000_iterations():
    model = random_model(num_pts=4, sh_degree=2)
    optimizer = make_optimizer(model, OptimisationOptions())
    seen = {}
    for iteration in (1, 999, 1000, 1001, 1999, 2000, 2500, 3000, 4000):
        set_rates(model, optimizer, iteration, OptimisationOptions(), extent=1.1)
        seen[iteration] = model.active_sh_degree
    assert seen == {1: 0, 999: 0, 1000: 1, 1001: 1, 1999: 1, 2000: 2, 2500: 2, 3000: 2, 4000: 2}
