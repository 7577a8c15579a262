"""Pipelines: what is drawn, what it is compared with, how it is weighted, and which runs are equal."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from sequences import (
    FRAMES,
    BriefInBetween,
    assert_same,
    assert_same_state,
    blobs,
    checkpoint,
    colours,
    masks,
    refused,
    threads,
    train_at,
    write,
)

from arguments import OptimisationOptions, TrainOptions
from gaussian_renderer import ACTIVE, ACTIVE_SEGMENTATION, RASTERIZERS, Render
from scene.frames import Frames
from scene.parameters import IMAGE, SEGMENTATION, head_parameters
from train import train
from training.batches import Batch, Sampler, Views, requested_renders
from training.evaluation import evaluate
from training.pipelines import Task, loss_terms, tasks, total_loss
from training.run import Training
from utils.losses import ssim

OPTIONS = OptimisationOptions()


def run_options(**options):
    return TrainOptions(source_path="none", **options)


def frames_of(*arrays: np.ndarray, has_alpha: bool = False) -> Frames:
    levels = torch.from_numpy(np.stack([a if a.ndim == 3 else a[None] for a in arrays]))
    return Frames(levels, [f"{k:04d}.png" for k in range(len(arrays))], list(range(len(arrays))), has_alpha)


def flat(*values: int) -> Frames:
    """Frames of one grey level each."""
    return frames_of(*[np.full((12, 16), value, np.uint8) for value in values])


pytestmark = pytest.mark.usefixtures("one_thread")


# ---- tasks ---------------------------------------------------------------------------------------------------------

IMAGE_TERMS = {"l1": 2.0, "ssim": 0.25, "ibfr": 0.5, "ibfr_ssim": 0.0, "sigma": 0.25}


def test_the_published_weights():
    frames, seg = flat(0), flat(255)
    assert tasks(run_options(), frames) == [Task("img", IMAGE, frames, ACTIVE, 1.0, IMAGE_TERMS)]
    seg_terms = {"l1": 2.0, "ibfr": 0.0, "sigma": 0.5}
    plain = tasks(run_options(pipeline="seg"), frames)
    assert plain == [Task("seg", IMAGE, frames, ACTIVE_SEGMENTATION, 1.0, seg_terms)]
    joint = run_options(pipeline="joint", seg_source_path="masks", lambda_img=0.5, lambda_seg=3.0)
    assert tasks(joint, frames, seg) == [
        Task("img", IMAGE, frames, ACTIVE, 0.5, IMAGE_TERMS),
        Task("seg", SEGMENTATION, seg, ACTIVE_SEGMENTATION, 3.0, seg_terms),
    ]
    alone = run_options(pipeline="seg", seg_head_only=True, start_checkpoint="x.pth")
    assert tasks(alone, frames) == [Task("seg", SEGMENTATION, frames, ACTIVE_SEGMENTATION, 1.0, {"l1": 2.0})]


def test_each_weight_is_an_option():
    names = (
        "lambda_l1", "lambda_dssim", "lambda_ibfr", "lambda_ibfr_dssim", "lambda_sigma", "lambda_l1_seg",
        "lambda_ibfr_seg", "lambda_sigma_seg",
    )  # fmt: skip
    weights = dict(zip(names, map(float, range(3, 11)), strict=True))
    image, seg = tasks(run_options(pipeline="joint", seg_source_path="masks", **weights), flat(0), flat(0))
    assert image.terms == {"l1": 3, "ssim": 4, "ibfr": 5, "ibfr_ssim": 6, "sigma": 7}
    assert seg.terms == {"l1": 8, "ibfr": 9, "sigma": 10}
    assert tasks(run_options(pipeline="seg", **weights), flat(0))[0].terms == seg.terms


def test_the_published_schedule():
    o = OPTIONS
    assert (o.sigma_until_iter, o.sigma_low_views, o.sigma_high) == (20_000, 2, 1)
    assert (o.ibfr_from_iter, o.ibfr_alpha_min, o.ibfr_alpha_max, o.batch_size) == (10_000, 0.2, 0.8, 3)
    assert (o.densify_from_iter, o.densify_until_iter, o.densification_interval) == (500, 20_000, 100)
    assert (o.opacity_reset_interval, o.opacity_reset_value, o.prune_scale_from_iter) == (3000, 0.01, 3000)
    assert (o.densify_grad_threshold, o.percent_dense, o.prune_opacity, o.prune_scale) == (
        2e-4,
        0.01,
        0.01,
        0.11,
    )
    assert (o.split_sigma, o.split_children, o.split_shrink, o.extent_per_distance) == (1, 2, 1.6, 1.1)


# ---- batches -------------------------------------------------------------------------------------------------------


def drawn(batch_size, sides=2, num_frames=FRAMES, in_between=True, draws=600, seed=0):
    options = OptimisationOptions(batch_size=batch_size)
    sampler = Sampler(num_frames, sides, options, torch.Generator().manual_seed(seed))
    return [sampler.draw(in_between) for _ in range(draws)]


# The drawn frame -> the frames of the batch, and the first of each pair with a render in between. K = 5.
BATCHES = {
    1: {0: ([0], [0]), 1: ([1], [1]), 2: ([2], [2]), 3: ([3], [3]), 4: ([4], [])},
    2: {0: ([0, 1], [0]), 1: ([1, 2], [1]), 2: ([2, 3], [2]), 3: ([3, 4], [3]), 4: ([4], [])},
    3: {
        0: ([0, 1], [0]),
        1: ([0, 1, 2], [0, 1]),
        2: ([1, 2, 3], [1, 2]),
        3: ([2, 3, 4], [2, 3]),
        4: ([3, 4], [3]),
    },
    4: {
        0: ([0, 1, 2], [0, 1]),
        1: ([0, 1, 2, 3], [0, 1, 2]),
        2: ([1, 2, 3, 4], [1, 2, 3]),
        3: ([2, 3, 4], [2, 3]),
        4: ([3, 4], [3]),
    },
}


@pytest.mark.parametrize("size", BATCHES)
def test_batches_are_the_neighbours_of_the_drawn_frame(size):
    counts = Counter((tuple(b.frames), tuple(k for k, _ in b.between), b.mirrored) for b in drawn(size))
    expected = {(tuple(f), tuple(k), side) for f, k in BATCHES[size].values() for side in (False, True)}
    assert set(counts) == expected
    # Each of ten views 60 times of 600, give or take four standard deviations.
    assert min(counts.values()) > 60 - 30 and max(counts.values()) < 60 + 30


@pytest.mark.parametrize("size", BATCHES)
def test_real_views_are_the_same_without_in_betweens(size):
    found = {(tuple(b.frames), len(b.between)) for b in drawn(size, in_between=False)}
    assert found == {(tuple(f), 0) for f, _ in BATCHES[size].values()}


def test_one_camera_never_shows_the_mirror():
    batches = drawn(3, sides=1)
    assert not any(b.mirrored for b in batches)
    assert {tuple(b.frames) for b in batches} == {tuple(f) for f, _ in BATCHES[3].values()}


def test_the_number_of_views_counts_both_sides():
    generator = torch.Generator()
    assert [Sampler(5, sides, OPTIONS, generator).num_views for sides in (1, 2)] == [5, 10]


def test_alphas_are_uniform_and_each_render_has_its_own():
    pairs = [b.between for b in drawn(3, draws=3000) if len(b.between) == 2]
    a, b = (np.array([pair[i][1] for pair in pairs]) for i in (0, 1))
    for alpha in (a, b):
        assert 0.2 <= alpha.min() < 0.21 and 0.79 < alpha.max() <= 0.8
        assert alpha.mean() == pytest.approx(0.5, abs=4 * 0.6 / math.sqrt(12 * len(alpha)))
        assert alpha.std() == pytest.approx(0.6 / math.sqrt(12), rel=0.05)
    assert abs(np.corrcoef(a, b)[0, 1]) < 4 / math.sqrt(len(a))


@pytest.mark.parametrize("size", [1, 3, 4])
def test_one_frame_is_a_sequence(size):
    assert all(b.frames == [0] and b.between == [] for b in drawn(size, num_frames=1, draws=20))


def test_positions_put_the_real_views_first():
    assert Batch([2, 3], [(2, 0.25)], False).positions == [2.0, 3.0, 2.25]


def test_only_terms_with_in_betweens_render_them():
    batch, two = Batch([0, 1], [(0, 0.5)], False), flat(0, 51)
    joint = tasks(run_options(pipeline="joint", seg_source_path="masks"), two, two)
    image, seg = requested_renders(joint, Views.of(batch, torch.device("cpu")))
    assert image == [Render(v, IMAGE, ACTIVE) for v in range(3)]
    assert seg == [Render(v, SEGMENTATION, ACTIVE_SEGMENTATION) for v in range(2)]
    without = tasks(run_options(lambda_ibfr=0.0), two)
    assert len(requested_renders(without, Views.of(batch, torch.device("cpu")))[0]) == 2


# ---- losses --------------------------------------------------------------------------------------------------------

BACKGROUND = torch.zeros(1)
SPREADS = torch.tensor([0.1, 0.3, 2.0])


def terms_of(
    task,
    images,
    batch,
    iteration=15_000,
    views=10,
    backend="compiled",
    options=OPTIONS,
    background=BACKGROUND,
):
    targets, blends = Views.of(batch, background.device).shown(task, background)
    terms = loss_terms(
        task,
        images,
        targets,
        blends,
        raw_sigma=SPREADS.log(),
        num_views=views,
        iteration=iteration,
        options=options,
        backend=backend,
    )
    return terms, targets


def noise(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("backend", RASTERIZERS)
@pytest.mark.parametrize("pipeline", ["img", "seg"])
def test_the_loss_by_hand(pipeline, backend):
    # Frames of levels 0, 51, 255; the batch of frame 1 with two in-betweens. lo = 2/10.
    frames = flat(0, 51, 255)
    (task,) = tasks(run_options(pipeline=pipeline), frames)
    batch = Batch([0, 1, 2], [(0, 0.25), (1, 0.75)], False)
    images = noise(5 if pipeline == "img" else 3, 1, 12, 16)
    real = torch.tensor([0.0, 0.2, 1.0]).view(3, 1, 1, 1).expand(3, 1, 12, 16)
    between = torch.tensor([0.75 * 0.0 + 0.25 * 0.2, 0.25 * 0.2 + 0.75 * 1.0]).view(2, 1, 1, 1)
    sigma = (0.2 - 0.1) + (2.0 - 1.0)
    l1 = (images[:3] - real).abs().mean()
    if pipeline == "img":
        expected = (
            2 * l1
            + 0.25 * (1 - ssim(images[:3], real))
            + 0.5 * (images[3:] - between).abs().mean()
            + 0.25 * sigma
        )
    else:
        expected = 2 * l1 + 0.5 * sigma
    terms, targets = terms_of(task, images, batch, backend=backend)
    torch.testing.assert_close(targets, real)
    torch.testing.assert_close(total_loss([task], [terms]), expected, rtol=1e-5, atol=1e-6)


def test_joint_weighs_both_losses():
    frames, seg = flat(0, 51, 255), flat(255, 0, 255)
    both = tasks(
        run_options(pipeline="joint", seg_source_path="m", lambda_img=0.5, lambda_seg=3.0), frames, seg
    )
    batch = Batch([1, 2], [], False)
    images = noise(2, 1, 12, 16)
    terms = [terms_of(task, images, batch)[0] for task in both]
    alone = [
        float(total_loss(tasks(run_options(pipeline=name), data), [named]))
        for name, data, named in (("img", frames, terms[0]), ("seg", seg, terms[1]))
    ]
    assert float(total_loss(both, terms)) == pytest.approx(0.5 * alone[0] + 3 * alone[1], rel=1e-6)


def test_in_betweens_of_a_batch_of_one_need_a_frame_outside_it():
    (task,) = tasks(run_options(), flat(0, 51, 255))
    terms, targets = terms_of(task, torch.zeros(2, 1, 12, 16), Batch([1], [(1, 0.75)], False))
    assert targets.shape[0] == 1 and terms["ibfr"].item() == pytest.approx(0.25 * 0.2 + 0.75)


def test_the_mirror_shows_flipped_frames():
    ramp = np.tile(np.arange(0, 160, 10, dtype=np.uint8), (12, 1))
    (task,) = tasks(run_options(), frames_of(ramp, ramp // 2))
    flipped = torch.from_numpy(ramp[:, ::-1].copy()) / 255
    images = torch.stack([flipped, flipped / 2, 0.75 * flipped])[:, None]
    terms, targets = terms_of(task, images, Batch([0, 1], [(0, 0.5)], True))
    torch.testing.assert_close(targets[0, 0], flipped)
    assert terms["l1"].item() == pytest.approx(0, abs=3e-3) and terms["ibfr"].item() == pytest.approx(
        0, abs=3e-3
    )


def test_sigma_counts_before_iteration_20000_within_bounds_set_by_the_views():
    (task,) = tasks(run_options(), flat(0))
    images, batch = torch.zeros(1, 1, 12, 16), Batch([0], [], False)
    assert terms_of(task, images, batch, 19_999)[0]["sigma"].item() == pytest.approx(1.1)
    assert "sigma" not in terms_of(task, images, batch, 20_000)[0]
    assert terms_of(task, images, batch, views=5)[0]["sigma"].item() == pytest.approx((0.3 + 0.1) / 2 + 1)


def test_the_head_alone_has_l1_alone():
    (task,) = tasks(run_options(pipeline="seg", seg_head_only=True, start_checkpoint="x"), flat(51))
    terms, _ = terms_of(task, torch.zeros(1, 1, 12, 16), Batch([0], [], False))
    assert list(terms) == ["l1"] and float(total_loss([task], [terms])) == pytest.approx(0.4)


def test_transparent_frames_lie_on_the_background():
    rgba = np.zeros((2, 12, 16), np.uint8)  # black, transparent
    (task,) = tasks(run_options(), frames_of(rgba, has_alpha=True))
    assert (task.targets([0], torch.tensor([0.25])) == 0.25).all()


def test_grey_frames_suit_a_colour_model():
    (task,) = tasks(run_options(), flat(51, 255))
    terms, targets = terms_of(
        task, torch.zeros(3, 3, 12, 16), Batch([0, 1], [(0, 0.5)], False), background=torch.zeros(3)
    )
    assert targets.shape == (2, 3, 12, 16)
    assert terms["l1"].item() == pytest.approx(0.6) and terms["ibfr"].item() == pytest.approx(0.6)


# ---- runs ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    return write(root / "images", blobs()), write(root / "masks", masks())


CONTROL = (
    "--densify_from_iter", 5, "--densification_interval", 5, "--opacity_reset_interval", 20, "--ibfr_from_iter", 8,
)  # fmt: skip
NO_CONTROL = ("--densify_until_iter", 0)


def joint(seg):
    return "--pipeline", "joint", "--seg_source_path", seg


@pytest.mark.parametrize("side", ["img", "seg"])
def test_joint_with_one_weight_zero_is_that_pipeline(data, tmp_path, side):
    images, seg = data
    alone = ("--pipeline", side, *NO_CONTROL, "--iterations", 6, "--checkpoint_iterations", *range(1, 6))
    if side == "img":  # joint draws alphas of in-betweens, seg does not: then other views follow
        alone += ("--ibfr_from_iter", 3)
    train_at(images if side == "img" else seg, tmp_path / "alone", *alone)
    off = "--lambda_seg" if side == "img" else "--lambda_img"
    train_at(images, tmp_path / "joint", *alone, *joint(seg), off, 0)
    for iteration in range(1, 7):
        a, b = (checkpoint(tmp_path / name, iteration).params for name in ("alone", "joint"))
        for name in a:
            head = name in head_parameters(IMAGE)
            other = b[f"{name}_seg"] if head and side == "seg" else b[name]
            # Sums over heads and renders may round differently; Adam turns that into at most some 1e-5 of a step.
            torch.testing.assert_close(other, a[name], rtol=1e-4, atol=1e-5, msg=f"{name} at {iteration}")
        untouched = "" if side == "seg" else "_seg"
        for name in head_parameters(IMAGE):
            first = checkpoint(tmp_path / "joint", 1).params[f"{name}{untouched}"]
            assert torch.equal(b[f"{name}{untouched}"], first)


def test_the_head_alone_leaves_the_rest_bit_for_bit(data, tmp_path):
    images, seg = data
    train_at(images, tmp_path / "img", "--iterations", 12, *CONTROL, "--use_dff")
    start = tmp_path / "img" / "chkpnt12.pth"
    head = ("--pipeline", "seg", "--seg_head_only", "--start_checkpoint", start, *CONTROL)
    train_at(seg, tmp_path / "seg", *head, "--iterations", 21, "--checkpoint_iterations", 2)
    before, first, after = (
        checkpoint(tmp_path / "img", 12),
        *(checkpoint(tmp_path / "seg", i) for i in (2, 21)),
    )
    assert_same(before.time_func, after.time_func)
    for name, value in before.params.items():
        assert torch.equal(after.params[name], value), name
    assert not torch.equal(first.params["opacity_seg"], before.params["opacity"])  # the first step was taken
    assert not torch.equal(after.params["opacity_seg"], first.params["opacity_seg"])
    assert not torch.equal(after.params["f_dc_seg"], before.params["f_dc"])
    (group,) = after.optimizer["param_groups"]
    assert group["name"] == "seg_head" and group["lr"] == 2.5e-3
    assert all((value == 0).all() for value in after.statistics.values())
    # 20 steps of Adam at 2.5e-3 move no further than about that; no reset or density step struck at 5, 10, 20.
    assert (after.params["opacity_seg"] - before.params["opacity"]).abs().max() < 21 * 2.5e-3 * 1.5


def test_the_head_of_a_joint_model_is_kept_and_of_an_image_model_copied(data, tmp_path):
    """Either way with a fresh optimizer, from iteration 0; and from its own checkpoint where that stopped."""
    images, seg = data
    train_at(images, tmp_path / "joint", *joint(seg), *CONTROL, "--iterations", 9)
    train_at(images, tmp_path / "img", *CONTROL, "--iterations", 9)

    def head_alone(file):
        options = run_options(pipeline="seg", seg_head_only=True, start_checkpoint=str(file), device="cpu")
        said = []
        return Training.start(TrainOptions(**{**vars(options), "source_path": str(seg)}), said.append), said

    for name, source in (("joint", "_seg"), ("img", "")):
        before = checkpoint(tmp_path / name, 9).params
        training, said = head_alone(tmp_path / name / "chkpnt9.pth")
        assert training.iteration == 0 and training.optimizer.state_dict()["state"] == {}
        for parameter in head_parameters(IMAGE):
            assert torch.equal(training.model.params[f"{parameter}_seg"], before[f"{parameter}{source}"])
        (line,) = [line for line in said if "chkpnt9.pth" in line]
        assert ("a new segmentation head" in line) == (name == "img")
    different = checkpoint(tmp_path / "joint", 9).params
    assert not torch.equal(different["f_dc_seg"], different["f_dc"])

    flags = ("--pipeline", "seg", "--seg_head_only", "--iterations", 4)
    train_at(seg, tmp_path / "head", *flags, "--start_checkpoint", tmp_path / "joint" / "chkpnt9.pth")
    own, _ = head_alone(tmp_path / "head" / "chkpnt4.pth")
    assert own.iteration == 4 and own.optimizer.state_dict()["state"]


@pytest.mark.parametrize("colour", [False, True])
def test_published_checkpoints_are_gone_on_with(data, tmp_path, colour):
    """Its weights, moments, steps and iteration, with numpy numbers where that program has them."""
    images, seg = data
    root = write(tmp_path / "colours", colours()) if colour else images
    train_at(root, tmp_path, *joint(seg), *CONTROL, "--iterations", 12, "--checkpoint_iterations", 7)
    ours = checkpoint(tmp_path, 7)
    state, number = torch.load(tmp_path / "chkpnt7.pth", weights_only=True)
    del state["medgs"]
    state["spatial_lr_scale"] = np.float32(state["spatial_lr_scale"])
    for group in state["optimizer_state"]["param_groups"]:
        group["lr"] = np.float64(group["lr"])
    file = tmp_path / "published.pth"
    torch.save((state, number), file)
    options = {"pipeline": "joint", "seg_source_path": str(seg), "iterations": 9}
    training = start(root, tmp_path / "out", **options, start_checkpoint=str(file))
    assert training.iteration == 7
    for name, value in ours.params.items():
        assert torch.equal(training.model.params[name], value), name
    # Grey moments are a third, or a ninth, of theirs in each channel: three roundings.
    moments = training.optimizer.state_dict()["state"], ours.optimizer["state"]
    torch.testing.assert_close(*moments, rtol=1e-6, atol=0)
    train(training)
    assert training.iteration == 9


RESUMED = {
    "img": (),
    "img, colour": ("--sh_degree", 1, "--sh_degree_interval", 6),
    "img, random background, learned times": (
        "--random_background",
        "--use_dff",
        "--batch_size",
        2,
        "--camera",
        "one",
    ),
    "seg": ("--pipeline", "seg"),
    "joint": ("--lambda_seg", 2),
    "head": ("--pipeline", "seg", "--seg_head_only"),
}


@pytest.mark.parametrize("case", RESUMED)
def test_resumed_runs_go_on_bit_for_bit(data, tmp_path, case):
    images, seg = data
    root = {"seg": seg, "head": seg}.get(case, images)
    if "colour" in case:
        root = write(tmp_path / "colours", colours())
    flags = [*RESUMED[case], *CONTROL]
    if case == "joint":
        flags += joint(seg)
    start = ()
    if case == "head":
        train_at(images, tmp_path / "img", "--iterations", 8, *CONTROL)
        start = ("--start_checkpoint", tmp_path / "img" / "chkpnt8.pth")
    # The break falls between density steps at 15 and 20, with statistics gathered; 20 resets opacities.
    train_at(root, tmp_path / "whole", *flags, *start, "--iterations", 27, "--checkpoint_iterations", 17)
    start = ("--start_checkpoint", tmp_path / "whole" / "chkpnt17.pth")
    train_at(root, tmp_path / "second", *flags, *start, "--iterations", 27)
    whole, second = (checkpoint(tmp_path / name, 27) for name in ("whole", "second"))
    assert_same_state(whole, second)
    if case != "head":
        assert len(whole.params["xyz"]) != 150  # density steps did happen


def test_joint_from_images_takes_weights_and_makes_a_head(data, tmp_path):
    images, seg = data
    train_at(images, tmp_path / "img", "--iterations", 12, *CONTROL)
    said = []
    start = tmp_path / "img" / "chkpnt12.pth"
    options = run_options(
        pipeline="joint",
        seg_source_path=str(seg),
        start_checkpoint=str(start),
        device="cpu",
        model_path="unused",
    )
    options = TrainOptions(**{**vars(options), "source_path": str(images)})
    training = Training.start(options, said.append)
    before = checkpoint(tmp_path / "img", 12)
    assert training.iteration == 0 and training.optimizer.state_dict()["state"] == {}
    assert training.model.heads == (IMAGE, SEGMENTATION)
    for name, value in before.params.items():
        assert torch.equal(training.model.params[name], value)
    for name in head_parameters(IMAGE):
        assert torch.equal(training.model.params[f"{name}_seg"], before.params[name])
    assert all((value == 0).all() for value in training.control.statistics.values())
    (line,) = [line for line in said if "chkpnt12.pth" in line]
    assert "weights and a new segmentation head" in line and "iteration 0" in line

    train_at(
        images, tmp_path / "joint", *joint(seg), *CONTROL, "--iterations", 3, "--start_checkpoint", start
    )
    assert checkpoint(tmp_path / "joint", 3).has_seg_head


def test_resumed_in_betweens_start_at_once(data, tmp_path):
    images, _ = data
    quick = ("--iterations", 2, *NO_CONTROL, "--lambda_l1", 0, "--lambda_dssim", 0, "--lambda_sigma", 0)
    train_at(images, tmp_path / "first", *quick, "--ibfr_from_iter", 100)
    before = checkpoint(tmp_path / "first", 2)
    start = ("--start_checkpoint", tmp_path / "first" / "chkpnt2.pth", "--iterations", 4)
    train_at(images, tmp_path / "on", *quick, "--ibfr_from_iter", 1, *start)
    train_at(images, tmp_path / "off", *quick, "--ibfr_from_iter", 100, *start)
    assert not torch.equal(checkpoint(tmp_path / "on", 4).params["f_dc"], before.params["f_dc"])
    assert torch.equal(checkpoint(tmp_path / "off", 4).params["f_dc"], before.params["f_dc"])


def test_in_betweens_begin_and_pause(data, tmp_path, monkeypatch):
    drawn, draw = [], Sampler.draw

    def watched(sampler, in_between):
        drawn.append(in_between)
        return draw(sampler, in_between)

    monkeypatch.setattr(Sampler, "draw", watched)
    train_at(data[0], tmp_path, "--iterations", 7, *NO_CONTROL, "--ibfr_from_iter", 2, "--ibfr_skip", 3)
    assert drawn == [False, True, True, False, True, True, False]


def test_in_betweens_count_for_m_alone(data, tmp_path):
    # Nothing but IBFR in the loss: no screen gradient is counted, the gradient of m is.
    images, _ = data
    zero = ("--lambda_l1", 0, "--lambda_dssim", 0, "--lambda_sigma", 0)
    train_at(images, tmp_path, *zero, "--ibfr_from_iter", 1, "--iterations", 3, "--densify_from_iter", 50)
    s = checkpoint(tmp_path, 3).statistics
    assert (s["xyz_gradient_accum"] == 0).all() and (s["m_gradient_accum"] > 0).any()
    assert s["denom"].max() == 3 and torch.equal(s["denom"], s["m_denom"])


def test_joint_counts_twice_an_iteration(data, tmp_path):
    images, seg = data
    train_at(images, tmp_path, *joint(seg), "--iterations", 3, "--densify_from_iter", 50)
    assert checkpoint(tmp_path, 3).statistics["denom"].max() == 6


def test_learned_times_are_learned(data, tmp_path):
    images, _ = data
    train_at(images, tmp_path, "--use_dff", "--iterations", 10, *NO_CONTROL)
    time_func = checkpoint(tmp_path, 10).time_func
    assert time_func.shape == (FRAMES - 1, 1) and (time_func != 0).all()
    # nine steps of Adam at 1e-3
    assert time_func.abs().max() < 9.5e-3


def test_fixed_times_stay(data, tmp_path):
    images, _ = data
    train_at(images, tmp_path, "--iterations", 3)
    assert checkpoint(tmp_path, 3).time_func.tolist() == pytest.approx([1 / FRAMES] * FRAMES)


def test_same_seed_same_model(data, tmp_path):
    images, _ = data
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        with threads(2):
            train_at(images, tmp_path / name, "--iterations", 12, *CONTROL, "--seed", seed)
    a, b, c = (checkpoint(tmp_path / name, 12) for name in "abc")
    assert_same_state(a, b)
    assert a.params["xyz"].shape != c.params["xyz"].shape or not torch.equal(a.params["xyz"], c.params["xyz"])


def start(images, out, **options):
    options = {"num_pts": 150, "poly_degree": 3, "device": "cpu", "quiet": True, **options}
    return Training.start(
        TrainOptions(source_path=str(images), model_path=str(out), **options), lambda _: None
    )


def test_the_oracle_trains_alike(data, tmp_path):
    images, _ = data
    scores, models = [], []
    for name in RASTERIZERS:
        options = {"iterations": 8, "densify_until_iter": 0, "ibfr_from_iter": 5, "rasterizer": name}
        training = start(images, tmp_path / name, **options)
        train(training)
        scores.append(evaluate(training.objective, training.tasks[0])[0])
        models.append(training.model.params)
    # Where a gradient is nearly 0, Adam turns its rounding into a whole step: a few values differ, the images do not.
    assert scores[0].psnr == pytest.approx(scores[1].psnr, abs=0.02)
    for name, value in models[0].items():
        if value.numel() and name != "rotation":  # circles, as all are at the start, have no angle
            assert (value - models[1][name]).abs().quantile(0.9) < 1e-4, name


def test_evaluation_of_grey_masks_by_a_colour_model(tmp_path):
    images, seg = write(tmp_path / "images", colours()), write(tmp_path / "masks", masks())
    options = {"pipeline": "joint", "seg_source_path": str(seg), "iterations": 12, "densify_until_iter": 0}
    training = start(images, tmp_path / "out", **options)
    train(training)
    for task in training.tasks:
        scores, image = evaluate(training.objective, task, 0)
        assert image.shape == (3, 20, 24) and len(scores.psnr) == FRAMES
        assert 0 <= scores.dice <= 1 or (task.name == "img" and np.isnan(scores.dice)), (
            "dark images have no Dice"
        )
    train_at(seg, tmp_path / "reverse", *joint(images), "--iterations", 3)  # colour masks of grey images


# ---- refused -------------------------------------------------------------------------------------------------------


def assert_refused(capsys, out, words, *run):
    assert refused(run[0], out, *run[1:]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("train.py: error: ") and captured.out == ""
    for word in words:
        assert word in line
    assert not out.exists()


def test_masks_must_belong_to_the_frames(data, tmp_path, capsys):
    images, _ = data
    many = write(tmp_path / "many", masks(count=6))
    assert_refused(capsys, tmp_path / "out", ["6 masks for 5 frames"], images, *joint(many))
    wide = write(tmp_path / "wide", masks(width=30))
    assert_refused(capsys, tmp_path / "out", ["30 x 20", "24 x 20"], images, *joint(wide))
    shifted = write(tmp_path / "shifted", masks())
    (shifted / "original" / "0004.png").rename(shifted / "original" / "0009.png")
    assert refused(images, tmp_path / "out", *joint(shifted)) == 2
    assert "number" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_checkpoint_must_belong_to_the_frames(data, tmp_path, capsys):
    images, _ = data
    train_at(images, tmp_path / "img", "--iterations", 2)
    begin = ("--start_checkpoint", tmp_path / "img" / "chkpnt2.pth")
    capsys.readouterr()
    out = tmp_path / "out"
    assert_refused(capsys, out, ["5 frames", "has 4"], write(tmp_path / "few", blobs(4)), *begin)
    assert_refused(capsys, out, ["24 x 20", "30 x 20"], write(tmp_path / "wide", blobs(width=30)), *begin)
    assert_refused(capsys, out, ["grey", "coloured"], write(tmp_path / "colours", colours()), *begin)
    assert_refused(capsys, out, ["--distance 1.0"], images, *begin, "--distance", 2)
    assert_refused(capsys, out, ["already at iteration 2"], images, *begin, "--iterations", 2)
    assert_refused(
        capsys, out, ["chkpnt9.pth", "does not exist"], images, "--start_checkpoint", tmp_path / "chkpnt9.pth"
    )


# ---- motion between frames -------------------------------------------------------------------------------------------


def test_in_betweens_expect_what_moves_where_it_would_be():
    """A blob of 10 px that drifts by 1.5 px per frame: half-way in time, it is half-way in space; a blend smears it."""
    frames = torch.stack([torch.from_numpy(frame) for frame in blobs(5)])[:, None] / 255
    between = BriefInBetween(frames[::2])  # 3 px per gap
    plain, moving = (
        Task(
            "img",
            IMAGE,
            frames_of(*(f.numpy() for f in (frames[::2, 0] * 255).byte())),
            ACTIVE,
            1.0,
            {},
            images,
        )
        for images in (None, between.images)
    )
    around, background = torch.tensor([0, 1, 1, 2]), torch.zeros(1)  # at 0.5 and 1.5

    def expected(task, mirrored=False):
        return task.shown(around, 0, torch.tensor([0.5, 0.5]), background, torch.tensor(mirrored))[1]

    truth = frames[1::2]
    errors = [(expected(task) - truth).abs().mean() for task in (plain, moving)]
    assert errors[1] < 0.6 * errors[0]
    assert expected(moving, True).flip(-1).equal(expected(moving))


@pytest.mark.parametrize("pipeline", ["img", "seg", "joint"])
def test_what_is_expected_is_kept_for_a_run_that_goes_on(data, tmp_path, monkeypatch, pipeline):
    monkeypatch.setattr("training.data.InBetween", BriefInBetween)
    images, seg = data
    root = seg if pipeline == "seg" else images
    options = ["--ibfr_target", "motion", "--ibfr_from_iter", 1, "--lambda_ibfr_seg", 1]
    options += joint(seg) if pipeline == "joint" else ["--pipeline", pipeline]
    train_at(root, tmp_path / "out", *options, "--iterations", 3)
    made = (tmp_path / "out" / "in_between.pt").stat().st_mtime_ns
    train_at(root, tmp_path / "out", *options, "--iterations", 6, "--start_checkpoint", "auto")
    assert (tmp_path / "out" / "in_between.pt").stat().st_mtime_ns == made
    train_at(root, tmp_path / "whole", *options, "--iterations", 6)
    a, b = (checkpoint(tmp_path / name, 6).params for name in ("out", "whole"))
    assert all(torch.equal(a[name], b[name]) for name in a)
