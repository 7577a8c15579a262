"""Density control on states made by hand: what is counted, what is cloned, split and pruned, and the surgery."""

import math
from types import SimpleNamespace

import pytest
import torch

from arguments import OptimisationOptions, TrainOptions
from gaussian_renderer import RASTERIZERS, rasterizer
from gaussian_renderer.oracle import LOW_PASS, fold
from scene.cameras import Camera
from scene.gaussian_model import GaussianModel
from scene.parameters import IMAGE, SEGMENTATION
from training.density_control import DensityControl, reset_opacity
from training.iteration import IterationResult
from training.optimizer import make_optimizer
from training.run import Training

OPTIONS = OptimisationOptions()
OPTIONS_OF_A_RUN = TrainOptions(source_path="none")
CAMERA = Camera(24, 20)
EXTENT = 1.1
LOW, HIGH = 1e-4, 3e-4  # mean gradients below and above the threshold, 2e-4
SMALL, LARGE = 0.010, 0.012  # scales below and above 0.01 E


class Case:
    """N Gaussians to which nothing would happen, an optimizer that has taken three steps, and full statistics."""

    def __init__(self, n: int = 4, heads: int = 1, **changes: torch.Tensor):
        # Row i has i in the first column of w1, so that rows can be followed.
        w1 = torch.zeros(n, 4)
        w1[:, 0] = torch.arange(n)
        params = {
            "xyz": torch.randn(n, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 0, 1]),
            "f_dc": torch.linspace(0, 1, n).view(n, 1, 1),
            "f_rest": torch.zeros(n, 0, 1),
            "opacity": torch.zeros(n, 1),
            "scaling": torch.full((n, 3), math.log(SMALL)),
            "rotation": torch.linspace(-1, 1, n).view(n, 1),
            "m": torch.zeros(n, 1),
            "sigma": torch.full((n, 1, 1), math.log(0.5)),
            "w1": w1,
        } | changes
        self.model = GaussianModel(params, torch.full((4,), 0.25))
        if heads == 2:
            self.model.add_segmentation_head()
        self.before = {name: p.detach().clone() for name, p in self.model.params.items()}
        self.optimizer = make_optimizer(self.model, OPTIONS)
        trained = {name: p for name, p in self.model.params.items() if p.numel()}
        for step in (1, 2, 3):
            for p in trained.values():
                p.grad = torch.full_like(p, 0.1 * step) * (1 + torch.arange(n).view(-1, *[1] * (p.ndim - 1)))
            self.optimizer.step()
        self.optimizer.zero_grad()
        for name, p in trained.items():  # moments, without a change of the values
            p.data.copy_(self.before[name])
        self.moments = {name: self.moment(name) for name in trained}
        self.control = DensityControl(self.model)
        self.position_gradient(torch.full((n,), LOW))
        self.m_gradient(torch.full((n,), LOW))

    def moment(self, name: str) -> torch.Tensor:
        return self.optimizer.state[self.model.params[name]]["exp_avg"].clone()

    def position_gradient(self, means, times: float = 1) -> None:
        s = self.control.statistics
        s["xyz_gradient_accum"] = torch.as_tensor(means).view(-1, 1) * times
        s["denom"] = torch.full_like(s["xyz_gradient_accum"], times)

    def m_gradient(self, means, times: float = 1) -> None:
        s = self.control.statistics
        s["m_gradient_accum"] = torch.as_tensor(means).view(-1, 1) * times
        s["m_denom"] = torch.full_like(s["m_gradient_accum"], times)

    def step(self, iteration: int = 600) -> list[int]:
        """One density step; returns the parent of each Gaussian in the new list."""
        generator = torch.Generator().manual_seed(1)
        self.control.step(self.model, self.optimizer, iteration, OPTIONS, EXTENT, generator)
        return self.model.params["w1"][:, 0].int().tolist()


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def at(n: int, index: int, value: float, other: float) -> torch.Tensor:
    values = torch.full((n,), other)
    values[index] = value
    return values


# ---- statistics ----------------------------------------------------------------------------------------------------


@pytest.fixture(params=RASTERIZERS)
def observed(request):
    def observe(*iterations):
        control = DensityControl(Case(3).model)
        for radii, active, test, gradients, m in iterations:
            control.observe(
                torch.tensor(radii, dtype=torch.int32),
                torch.tensor(active, dtype=torch.uint8),
                test,
                torch.tensor(gradients),
                torch.tensor(m),
                CAMERA,
                request.param,
            )
        return {name: value.flatten().tolist() for name, value in control.statistics.items()}

    return observe


VIEWS = (
    [[5, 3, 8], [7, 2, 9]],  # radii of two views of three Gaussians
    [[3, 3, 0], [1, 0, 0]],  # bits of activity
    1,
    [[[0.1, 0.0], [0.3, 0.4], [8.0, 8.0]], [[0.0, 0.11], [7.0, 7.0], [8.0, 8.0]]],
    [[-0.5], [0.25], [4.0]],
)


def test_each_gaussian_counts_once_with_its_largest_view(observed):
    s = observed(VIEWS)
    assert s["max_radii2D"] == [7, 3, 0]
    # Pixel gradients times (W/2, H/2) = (12, 10): norms 1.2 and 1.1; (3.6, 4); the unseen adds nothing.
    assert s["xyz_gradient_accum"] == pytest.approx([1.2, math.hypot(3.6, 4), 0])
    assert s["m_gradient_accum"] == pytest.approx([0.5, 0.25, 0])
    assert s["denom"] == [1, 1, 0]
    assert s["m_denom"] == [1, 1, 0]


def test_what_is_seen_is_a_matter_of_the_test(observed):
    s = observed((*VIEWS[:2], 2, *VIEWS[3:]))  # of segmentation renders
    assert s["max_radii2D"] == [5, 3, 0]
    assert s["denom"] == [1, 1, 0]


def test_iterations_and_heads_add_up_and_radii_only_grow(observed):
    other = ([[6, 4, 2]], [[1, 1, 1]], 1, [[[0.0, 0.1], [0.0, 0.0], [1.0, 0.0]]], [[0.1], [-0.1], [0.2]])
    s = observed(VIEWS, other)
    assert s["max_radii2D"] == [7, 4, 2]
    assert s["xyz_gradient_accum"] == pytest.approx([2.2, math.hypot(3.6, 4), 12])
    assert s["m_gradient_accum"] == pytest.approx([0.6, 0.35, 0.2])
    assert s["denom"] == s["m_denom"] == [2, 2, 1]


def test_each_head_brings_its_own_gradients_and_visibility_and_in_betweens_bring_none():
    case = Case(2, heads=2)
    case.model.params["m"].grad = torch.tensor([[0.5], [-0.25]])
    screen = torch.zeros(2, 3, 2, 2)  # heads, views, Gaussians
    screen[0, 0, 0, 0] = 1.0  # image head
    screen[0, 1, 0, 0] = 2.0
    screen[1, 0, 0, 1] = 3.0  # segmentation head
    screen[:, 2] = 100.0  # between two frames
    active = torch.tensor([[3, 1], [3, 1], [3, 3]], dtype=torch.uint8)
    radii = torch.tensor([[4, 5], [6, 7], [90, 90]], dtype=torch.int32)
    nothing = torch.zeros(0)
    result = IterationResult(nothing, [], nothing, nothing, radii, active, screen)
    control = DensityControl(case.model)
    training = SimpleNamespace(
        options=OPTIONS_OF_A_RUN, model=case.model, controlled=True, control=control, camera=CAMERA,
        tasks=[SimpleNamespace(test=1), SimpleNamespace(test=2)],
    )  # fmt: skip
    Training.observe(training, result, 2)
    s = {name: value.flatten().tolist() for name, value in control.statistics.items()}
    assert s["max_radii2D"] == [6, 7]
    assert s["xyz_gradient_accum"] == pytest.approx([2.0 * 12 + 3.0 * 10, 0])
    assert s["m_gradient_accum"] == pytest.approx([0.5 + 0.5, 0.25])
    assert s["denom"] == s["m_denom"] == [2, 1]  # the second is too thin for segmentation renders


# ---- the rules -----------------------------------------------------------------------------------------------------


def test_nothing_happens_below_the_threshold():
    case = Case()
    assert case.step() == [0, 1, 2, 3]
    for name, value in case.model.params.items():
        assert torch.equal(value, case.before[name]), name


@pytest.mark.parametrize("times", [1, 7])
def test_small_gaussians_of_high_gradient_are_cloned(times):
    case = Case()
    case.position_gradient(at(4, 1, HIGH, LOW), times)
    assert case.step() == [0, 1, 2, 3, 1]
    for name, value in case.model.params.items():
        assert torch.equal(value[:4], case.before[name]) and torch.equal(value[4], case.before[name][1]), name


def test_large_gaussians_of_high_gradient_are_split():
    scaling = torch.full((4, 3), math.log(SMALL))
    scaling[1, 2] = math.log(LARGE)  # one axis is enough
    case = Case(scaling=scaling)
    case.position_gradient(at(4, 1, HIGH, LOW))
    assert case.step() == [0, 2, 3, 1, 1]
    shrunk = torch.exp(case.before["scaling"][1]) / 1.6
    for child in (3, 4):
        torch.testing.assert_close(torch.exp(case.model.params["scaling"][child]), shrunk)
        for name, value in case.model.params.items():
            if name not in ("xyz", "scaling"):
                assert torch.equal(value[child], case.before[name][1]), name


def test_the_y_scale_does_not_count():
    scaling = torch.full((4, 3), math.log(SMALL))
    scaling[1, 1] = 3.0
    case = Case(scaling=scaling)
    case.position_gradient(at(4, 1, HIGH, LOW))
    assert case.step(iteration=3100) == [0, 1, 2, 3, 1]  # neither split nor pruned


@pytest.mark.parametrize(
    ("spread", "expected"), [(0.5, [0, 1, 2, 3, 1]), (1.5, [0, 2, 3, 1, 1]), (1.0, [0, 2, 3, 1, 1, 1])]
)
@pytest.mark.parametrize("scale", [SMALL, LARGE])
def test_by_the_gradient_of_m_the_spread_decides(spread, expected, scale):
    # At sigma = 1 both rules hold: the clone stays whole, and the parent is split.
    sigma = torch.full((4, 1, 1), 0.5)
    sigma[1] = math.log(spread)
    case = Case(sigma=sigma, scaling=torch.full((4, 3), math.log(scale)))
    case.m_gradient(at(4, 1, HIGH, LOW), 5)
    assert case.step() == expected
    if spread == 1.0:
        scales = torch.exp(case.model.params["scaling"][3:, 0])
        torch.testing.assert_close(scales, torch.tensor([scale, scale / 1.6, scale / 1.6]))


def test_the_thresholds_themselves_count():
    case = Case(scaling=torch.full((4, 3), math.log(0.011)))
    small = case.model.scales()[0, 0].item()
    case.position_gradient(at(4, 0, 2e-4, LOW))
    case.m_gradient(at(4, 2, 2e-4, LOW))
    generator = torch.Generator().manual_seed(0)
    case.control.step(case.model, case.optimizer, 600, OPTIONS, small / OPTIONS.percent_dense, generator)
    assert case.model.params["w1"][:, 0].int().tolist() == [0, 1, 2, 3, 0, 2]


def test_the_two_gradients_have_their_own_counts_and_what_was_never_seen_has_none():
    case = Case()
    case.position_gradient(torch.full((4,), LOW), times=8)  # the sum is above the threshold, the mean is not
    case.m_gradient(at(4, 3, HIGH, LOW), times=2)
    case.control.statistics["m_denom"][0] = 0
    case.control.statistics["m_gradient_accum"][0] = 0
    assert case.step() == [0, 1, 2, 3, 3]


def test_a_gaussian_may_be_cloned_by_place_and_split_by_time():
    sigma = torch.full((4, 1, 1), math.log(2.0))
    case = Case(sigma=sigma)
    case.position_gradient(at(4, 1, HIGH, LOW))
    case.m_gradient(at(4, 1, HIGH, LOW))
    assert case.step() == [0, 2, 3, 1, 1, 1]


def test_new_gaussians_go_to_the_end_kept_clones_first_and_second_children():
    scaling = torch.full((6, 3), math.log(SMALL))
    scaling[[1, 4]] = math.log(LARGE)
    case = Case(6, scaling=scaling)
    case.position_gradient(torch.tensor([LOW, HIGH, HIGH, LOW, HIGH, HIGH]))
    assert case.step() == [0, 2, 3, 5, 2, 5, 1, 4, 1, 4]
    xyz = case.model.params["xyz"]
    assert not torch.equal(xyz[6], xyz[8]) and not torch.equal(
        xyz[7], xyz[9]
    )  # each child has a place of its own


def test_faint_gaussians_are_pruned():
    opacity = torch.tensor([[logit(0.5)], [logit(0.0099)], [logit(0.0101)], [logit(1e-4)]])
    assert Case(opacity=opacity).step() == [0, 2]


def test_new_gaussians_are_pruned_like_the_others():
    opacity = torch.tensor([[0.0], [logit(0.005)], [0.0], [0.0]])
    case = Case(opacity=opacity)
    case.position_gradient(at(4, 1, HIGH, LOW))
    assert case.step() == [0, 2, 3]


def test_with_two_heads_both_must_be_faint():
    case = Case(heads=2)
    case.model.params["opacity"].data[:] = torch.tensor([logit(0.005), logit(0.5), logit(0.005), 0]).view(
        4, 1
    )
    case.model.params["opacity_seg"].data[:] = torch.tensor([logit(0.5), logit(0.005), logit(0.005), 0]).view(
        4, 1
    )
    assert case.step() == [0, 1, 3]


@pytest.mark.parametrize(
    ("iteration", "expected"), [(600, [0, 1, 2, 3]), (3000, [0, 1, 2, 3]), (3100, [0, 2, 3])]
)
def test_large_gaussians_are_pruned_late(iteration, expected):
    scaling = torch.full((4, 3), math.log(0.109))
    scaling[1, 0] = math.log(0.111)
    assert Case(scaling=scaling).step(iteration) == expected


def test_split_children_are_measured_after_the_split():
    case = Case(scaling=torch.tensor([0.05, 0.17, 0.18, 0.05]).log().view(4, 1).expand(4, 3))
    case.position_gradient(torch.tensor([LOW, HIGH, HIGH, LOW]))
    assert case.step(3100) == [0, 3, 1, 1]  # 0.17 / 1.6 < 0.11 < 0.18 / 1.6


def test_large_radii_prune_nothing():
    case = Case()
    case.control.statistics["max_radii2D"][:] = 1000
    assert case.step(6000) == [0, 1, 2, 3]


def test_children_are_distributed_as_their_parent():
    # One Gaussian 20 000 times. Its covariance is the renderer's own: that of the dense reference at t = m.
    n, scales, turn = 20_000, (0.05, 0.02), 0.7
    case = Case(
        n,
        scaling=torch.tensor([scales[0], 1.0, scales[1]]).log().expand(n, 3),
        rotation=torch.full((n, 1), logit(turn / (2 * math.pi))),
        xyz=torch.tensor([0.1, 0.0, -0.2]).expand(n, 3),
    )
    case.position_gradient(torch.full((n,), HIGH))
    case.step()
    p = case.model.params
    assert len(case.model) == 2 * n and (p["xyz"][:, 1] == 0).all()
    offsets = (p["xyz"].detach() - torch.tensor([0.1, 0.0, -0.2]))[:, [0, 2]].double() * torch.tensor(
        [1, -1]
    )  # u, v
    raw = {name: value[:1].detach().double() for name, value in p.items()}
    _, conics, _, _ = fold(
        raw["xyz"], raw["w1"] * 0, raw["m"][:, 0], raw["sigma"][:, 0, 0], raw["scaling"] + math.log(1.6),
        raw["rotation"][:, 0], torch.tensor([0.5]).double(), torch.ones(1).double(), 1000.0, 24, 20,
    )  # fmt: skip
    a, b, c = conics[0, 0]
    expected = torch.linalg.inv(
        torch.stack([torch.stack([a, b]), torch.stack([b, c])])
    ) - LOW_PASS * torch.eye(2)
    # Standard errors of 2n draws: 0.5 % of a deviation for the mean, 0.7 % of a variance.
    assert offsets.mean(0).abs().max() < 4 * 0.005 * scales[0]
    assert (torch.cov(offsets.T) - expected / 1000**2).abs().max() < 4 * 0.007 * scales[0] ** 2
    first, second = offsets[:n], offsets[n:]
    assert (first.T @ second / n).abs().max() < 4 * 0.007 * scales[0] ** 2  # siblings are independent


# ---- the surgery ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [1, 2])
def test_model_and_optimizer_stay_in_step(heads):
    scaling = torch.full((6, 3), math.log(SMALL))
    scaling[1] = math.log(LARGE)
    opacity = torch.zeros(6, 1)
    opacity[3] = logit(0.001)
    case = Case(6, heads, scaling=scaling, opacity=opacity)
    case.position_gradient(torch.tensor([LOW, HIGH, HIGH, LOW, LOW, LOW]))
    rows = case.step()
    assert rows == [0, 2, 4, 5, 2, 1, 1]
    params = case.model.params
    assert all(len(value) == len(rows) and value.requires_grad and value.is_leaf for value in params.values())
    assert all(value.grad is None for value in params.values())
    assert {group["name"] for group in case.optimizer.param_groups} == set(params)
    for group in case.optimizer.param_groups:
        assert len(group["params"]) == 1 and group["params"][0] is params[group["name"]]
    known = {id(value) for value in params.values()}
    assert all(id(key) in known for key in case.optimizer.state)
    for name, before in case.moments.items():
        state = case.optimizer.state[params[name]]
        assert state["step"].item() == 3
        assert torch.equal(state["exp_avg"][:4], before[rows[:4]]), name
        assert state["exp_avg_sq"][:4].abs().min() > 0
        for moment in ("exp_avg", "exp_avg_sq"):
            assert state[moment].shape == params[name].shape and (state[moment][4:] == 0).all(), name

    # The optimizer goes on with the new parameters.
    for value in params.values():
        value.grad = torch.ones_like(value)
    values = params["w1"].detach().clone()
    case.optimizer.step()
    assert (params["w1"] < values).all()
    assert case.optimizer.state[params["w1"]]["step"].item() == 4


def test_statistics_start_anew():
    case = Case()
    case.position_gradient(at(4, 1, HIGH, LOW))
    case.control.statistics["max_radii2D"][:] = 3
    case.step()
    shapes = {name: tuple(value.shape) for name, value in case.control.statistics.items()}
    columns = dict.fromkeys(("xyz_gradient_accum", "denom", "m_gradient_accum", "m_denom"), (5, 1))
    assert shapes == {"max_radii2D": (5,)} | columns
    assert all((value == 0).all() for value in case.control.statistics.values())


def test_opacity_reset_lowers_both_heads_and_forgets_their_moments():
    case = Case(heads=2)
    case.model.params["opacity"].data[:] = torch.tensor(
        [logit(0.9), logit(0.004), logit(0.01), logit(0.02)]
    ).view(4, 1)
    case.model.params["opacity_seg"].data[:] = torch.tensor([logit(0.005), logit(0.5), -9.0, 9.0]).view(4, 1)
    others = {name: value for name, value in case.model.params.items() if not name.startswith("opacity")}
    reset_opacity(case.model, case.optimizer, OPTIONS.opacity_reset_value)
    opacities = case.model.opacities([IMAGE, SEGMENTATION]).flatten().tolist()
    faint = 1 / (1 + math.exp(9))
    assert opacities == pytest.approx([0.01, 0.004, 0.01, 0.01, 0.005, 0.01, faint, 0.01], rel=1e-5)
    for name in ("opacity", "opacity_seg"):
        parameter = case.model.params[name]
        state = case.optimizer.state[parameter]
        assert (
            (state["exp_avg"] == 0).all() and (state["exp_avg_sq"] == 0).all() and state["step"].item() == 3
        )
        assert next(g for g in case.optimizer.param_groups if g["name"] == name)["params"][0] is parameter
        assert parameter.grad is None and parameter.requires_grad
    assert all(case.model.params[name] is value for name, value in others.items())
    assert torch.equal(case.moment("m"), case.moments["m"])


def test_statistics_that_cannot_be_written_in_place_are_refused():
    views, n = 2, 5
    strided = torch.zeros(2 * n)[::2]
    statistics = {"max_radii2D": strided} | {
        name: torch.zeros(n, 1) for name in ("xyz_gradient_accum", "m_gradient_accum", "denom", "m_denom")
    }
    radii, active = torch.ones(views, n, dtype=torch.int32), torch.ones(views, n, dtype=torch.uint8)
    with pytest.raises(ValueError, match="contiguous"):
        rasterizer("compiled").observe(
            radii, active, torch.zeros(views, n, 2), torch.zeros(n, 1), 1, 16, 16, statistics
        )


def test_a_refused_adam_step_leaves_the_steps_where_they_were():
    parameters = [torch.zeros(3), torch.zeros(4)]
    steps = [torch.tensor(7.0), torch.tensor(7.0)]
    wrong = [torch.zeros(3), torch.zeros(5)]  # the second gradient does not fit
    moments = [torch.zeros(3), torch.zeros(4)]
    rasterizer("compiled")
    with pytest.raises(ValueError, match="gradients"):
        torch.ops.diff_gaussian_rasterization.adam_step(
            parameters, wrong, moments, moments, steps, [0.1, 0.1], 0.9, 0.999, 1e-15
        )
    assert [float(step) for step in steps] == [7.0, 7.0]


@pytest.mark.parametrize("room", [0, 1, 2, 3, 4, 5])
def test_a_bound_leaves_room_for_the_strongest(room):
    """Of four that would be cloned (or split, if large), as many as there is room for."""
    case = Case(6)
    case.model.params["scaling"].data[1] = math.log(LARGE)
    case.position_gradient([LOW, 5e-4, 3e-4, 6e-4, 4e-4, LOW])
    options = OptimisationOptions(max_gaussians=6 + room)
    generator = torch.Generator().manual_seed(1)
    held_back = case.control.step(case.model, case.optimizer, 600, options, EXTENT, generator)
    rows = case.model.params["w1"][:, 0].int().tolist()
    assert held_back == (room < 4) and len(rows) == 6 + min(room, 4)
    twice = {row for row in rows if rows.count(row) == 2}
    assert twice == set([3, 1, 4, 2][:room])  # by descending gradient


def test_a_bound_that_is_exceeded_already_adds_none():
    case = Case(6)
    case.position_gradient(torch.full((6,), HIGH))
    assert case.control.step(
        case.model,
        case.optimizer,
        600,
        OptimisationOptions(max_gaussians=3),
        EXTENT,
        torch.Generator().manual_seed(1),
    )
    assert len(case.model) == 6
