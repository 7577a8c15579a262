"""``fold`` and ``blend``: against the dense reference, numbers worked out by hand, and bad input."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import scenes
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scenes import Scene, draw, random_scene

import diff_gaussian_rasterization
from diff_gaussian_rasterization import (
    ACTIVE,
    ACTIVE_SEGMENTATION,
    GaussianRasterizationSettings,
    GaussianRasterizer,
    blend,
    fold,
)
from gaussian_renderer import oracle
from scene.cameras import Camera

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
OPS = torch.ops.diff_gaussian_rasterization
# Examples are the same in every run: a failure comes from the code, not from chance.
examples = settings(derandomize=True, deadline=None, max_examples=60, database=None)

# ------------------------------------------------------------------------------------------------- against the oracle


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tolerance: float) -> None:
    """Integers equal; numbers within ``tolerance`` of the largest, or of 0.1: a small sum may have large terms."""
    assert ours.keys() == theirs.keys()
    for name, our in ours.items():
        their = theirs[name]
        assert our.shape == their.shape, name
        if not their.is_floating_point():
            assert our.dtype == their.dtype and our.equal(their), name
            continue
        if name in ("means2d", "conics"):  # what is not visible may be anything
            our, their = our[theirs["radii"] > 0], their[theirs["radii"] > 0]
        if their.numel():
            error, scale = (our.double() - their).abs().max().item(), max(their.abs().max().item(), 0.1)
            assert error <= tolerance * scale, f"{name}: off by {error / scale:.1e} of its largest entry"


def assert_same_but_for_flips(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """float32 against the oracle in float64, on the same rounded input.

    Three decisions may fall either way within rounding, so a bounded share of the results may jump: a radius is
    rounded up (by 1 px); an alpha meets 1/255 (and moves the pixel by that much of a colour, which is at most 1.2);
    a transmittance meets 1e-4, coming from at most 1e-2 (and moves it by 1e-2 of a colour). Elsewhere, q of a long
    Gaussian is what is left of terms of up to (80 px)^2 / 0.3 px^2 = 2e4 that each carry 6e-8 of themselves.
    """
    assert ours["active"].equal(theirs["active"])
    steps = (ours["radii"] - theirs["radii"]).abs()
    assert not (steps > 1).any() and steps.sum() <= 1 + 0.01 * steps.numel()
    for name in ("images", "transmittance"):
        assert ours[name].dtype == torch.float32
        error = (ours[name] - theirs[name]).abs()
        assert error.max() < 0.013, name
        assert (error > 1e-4).double().mean() < 2e-3, name
    for name in (name for name in theirs if name.startswith("v_")):
        assert ours[name].dtype == torch.float32 and ours[name].isfinite().all()
        error, size = (ours[name] - theirs[name]).norm().item(), max(theirs[name].norm().item(), 0.1)
        assert error <= 1e-3 * size, f"{name}: off by {error / size:.1e} of its norm"


CASES = {
    "one pixel": {"width": 1, "height": 1},
    "17 x 5": {"width": 17, "height": 5},
    "37 x 23": {"width": 37, "height": 23},
    "64 x 48": {"width": 64, "height": 48},
    "one column": {"width": 1, "height": 40},
    "one Gaussian": {"n": 1},
    "no Gaussian": {"n": 0},
    "no Gaussian active": {"kind": "inactive"},
    "opaque front": {"kind": "opaque", "n": 60},
    "centres outside": {"kind": "outside", "n": 40},
    "covering the image": {"kind": "covering", "n": 30},
    "very elongated": {"kind": "elongated", "n": 40},
    "at the segmentation scale": {"kind": "tiny", "n": 60, "renders": [(0, 0, 1), (0, 0, 2)]},
    "hundreds in a tile": {"width": 8, "height": 8, "n": 300},
    "lists of a thousand, faint": {
        "width": 19,
        "height": 11,
        "n": 1100,
        "kind": "faint",
        "heads": 2,
        "channels": 1,
        "renders": [(0, 0, 1), (0, 1, 1)],
    },
    "raw": {"raw": True, "heads": 2, "renders": [(0, 1, 1), (0, 0, 1)]},
    "four channels": {"channels": 4},
    "five channels": {"channels": 5},
    "ten channels, raw": {"channels": 10, "raw": True},
    "seventeen channels, two heads": {"channels": 17, "heads": 2, "renders": [(0, 0, 1), (0, 1, 1)]},
    "forty channels, in slices": {"channels": 40, "heads": 2, "renders": [(0, 1, 1), (0, 0, 1)]},
    "one channel, straight": {"channels": 1, "degree": 0},
    "several heads of one view": {"heads": 3, "renders": [(0, 2, 1), (0, 0, 2), (0, 1, 1), (0, 2, 2)]},
    "a view that no render draws": {"views": 3, "renders": [(2, 0, 1), (0, 0, 1)]},
    "six views, two heads, degree 9": {"views": 6, "heads": 2, "degree": 9, "channels": 2},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("device", DEVICES)
def test_float64_agrees_with_the_reference(device, case):
    # Rounding, amplified by 1 / (1 - alpha) <= 100 where a gradient divides by it.
    scene = random_scene(seed=1, **CASES[case])
    assert_same(draw(diff_gaussian_rasterization, scene, device=device), draw(oracle, scene), 1e-10)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("device", DEVICES)
def test_float32_agrees_with_the_reference_but_for_flips(device, case):
    scene = random_scene(seed=1, **CASES[case]).rounded(torch.float32)
    ours = draw(diff_gaussian_rasterization, scene, torch.float32, device)
    assert_same_but_for_flips(ours, draw(oracle, scene))


@st.composite
def any_scene(pick):
    """Structure from hypothesis; numbers from a seed, so that none falls on a threshold such as 1/255."""
    views, heads = pick(st.integers(1, 3)), pick(st.integers(1, 3))
    render = st.tuples(st.integers(0, views - 1), st.integers(0, heads - 1), st.integers(1, 3))
    return random_scene(
        seed=pick(st.integers(0, 10**6)),
        width=pick(st.integers(1, 40)),
        height=pick(st.integers(1, 40)),
        n=pick(st.integers(0, 50)),
        degree=pick(st.integers(0, 9)),
        channels=pick(st.integers(1, 4)),
        views=views,
        heads=heads,
        renders=pick(st.lists(render, min_size=1, max_size=4)),
        kind=pick(st.sampled_from(scenes.KINDS)),
        raw=pick(st.booleans()),
    )


@pytest.mark.parametrize("device", DEVICES)
def test_any_scene_agrees_with_the_reference(device):
    @examples
    @given(any_scene())
    def check(scene):
        assert_same(draw(diff_gaussian_rasterization, scene, device=device), draw(oracle, scene), 1e-10)

    check()


def footprints(seed, views=2, n=20, heads=2, channels=3, size=24):
    """Arguments of ``blend`` not made by ``fold``, float64: any mask, any definite conic."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.rand(*shape, dtype=torch.float64, generator=generator)

    a, c = 0.02 + rand(2, views, n) ** 3
    b = torch.sqrt(a * c) * (1.98 * rand(views, n) - 0.99)
    return [
        (1.4 * rand(views, n, 2) - 0.2) * size,
        torch.stack([a, b, c], -1),
        torch.randint(256, (views, n), dtype=torch.uint8, generator=generator),
        rand(heads, n),
        rand(heads, n, channels),
    ]


@pytest.mark.parametrize("channels", [1, 7, 10, 17, 20])
@pytest.mark.parametrize("device", DEVICES)
def test_large_splats_as_the_reference_draws_them(device, channels):
    """On a CPU their tiles grow: 60 splats as large as the image would be in 60 x 450 tiles of 4 px."""
    size, generator = 95, torch.Generator().manual_seed(4)
    means2d, _, _, opacities, colours = footprints(2, n=60, heads=1, size=size, channels=channels)
    conics = torch.tensor([2e-4, 5e-5, 3e-4], dtype=torch.float64).expand(2, 60, 3).contiguous()
    active = torch.ones(2, 60, dtype=torch.uint8)
    weights = torch.randn(2, channels, size, size, dtype=torch.float64, generator=generator)
    renders, backgrounds = ([0, 1], [0, 0], [1, 1]), torch.rand(2, channels, dtype=torch.float64)

    def gradients_of(draw, device):
        leaves = [
            t.to(device).requires_grad_() for t in (means2d.clone(), conics.clone(), opacities * 0.2, colours)
        ]
        given = (*leaves[:2], active.to(device), *leaves[2:], backgrounds.to(device))
        images, transmittance = draw(*given, *renders, size, size)
        loss = (images * weights.to(device)).sum() + (transmittance**2).sum()
        return [images, transmittance, *torch.autograd.grad(loss, leaves)]

    for ours, theirs in zip(gradients_of(blend, device), gradients_of(oracle.blend, "cpu"), strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-10, atol=1e-10)
    if device == "cpu":
        drawn = OPS.blend(
            means2d, conics, active, opacities, colours, backgrounds, None, *renders, size, size, False
        )
        tiles = drawn[3].shape[1] - 1
        assert tiles <= 36 and drawn[4].numel() <= 2 * 60 * tiles


@pytest.mark.parametrize("device", DEVICES)
def test_what_the_backward_pass_needs_is_kept_for_one_alone(device):
    means2d, *given = (t.to(device) for t in footprints(5, n=400))
    backgrounds, renders = torch.zeros(2, 3, dtype=torch.float64, device=device), ([0, 1], [0, 1], [255, 255])
    arguments = (means2d, *given, backgrounds, None, *renders, 24, 24, False, 0)
    kept, dropped = OPS.blend(*arguments, True), OPS.blend(*arguments, False)
    assert dropped[7].numel() == 0
    for ours, theirs in zip(dropped[:7], kept[:7], strict=True):
        assert ours.equal(theirs)


@pytest.mark.cuda
def test_memory_of_a_large_image_is_that_of_its_pixels():
    """What is kept in front of segments grows with the pairs, not with the tiles."""
    side, n = 8192, 100
    means2d, conics = side * torch.rand(1, n, 2), torch.tensor([0.01, 0, 0.01]).expand(1, n, 3)
    given = means2d, conics, torch.ones(1, n, dtype=torch.uint8), torch.rand(1, n), torch.rand(1, n, 1)
    for gradient in (False, True):
        leaves = [t.cuda() for t in given]
        leaves[4].requires_grad_(gradient)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = blend(*leaves, torch.zeros(1, 1).cuda(), [0], [0], [1], side, side)
        pixels = 3 * 4 * side**2  # image, transmittance, stop
        assert out[0].isfinite().all() and torch.cuda.max_memory_allocated() - before < 1.3 * pixels


@pytest.mark.cuda
def test_refused_call_leaves_no_error_behind():
    (cut, size), _ = arguments(smooth_scene(), torch.float32, "cuda")
    for k in range(len(cut)):
        mixed = [t.cpu() if i == k else t for i, t in enumerate(cut)]
        with pytest.raises(ValueError, match="must be on"):
            OPS.fold(*mixed, *size)
        assert OPS.fold(*cut, *size)[0].isfinite().all()


@pytest.mark.cuda
def test_lists_that_disagree_stay_within_bounds_on_a_gpu():
    """There they are not looked at beforehand, which would wait for the device: gradients are meaningless, nothing else
    happens. On a CPU they are refused."""
    means2d, *given = (t.cuda() for t in footprints(5, n=400))
    renders = ([0, 1], [0, 1], [255, 255], 24, 24)
    drawn = OPS.blend(means2d, *given, torch.zeros(2, 3).double().cuda(), None, *renders, False)
    incoming = torch.ones_like(drawn[0]), torch.ones_like(drawn[1])
    for wrong in (3, 4, 5, 6):
        for number in (-(2**31), -1, 10**6, 2**31 - 1):
            lists = [t.clone() for t in drawn]
            lists[wrong].fill_(number)
            OPS.blend_backward(*incoming, *lists, means2d, *given, *renders, False)
            torch.cuda.synchronize()


@pytest.mark.parametrize("device", DEVICES)
def test_any_bit_of_a_mask_selects(device):
    renders = [0, 1, 1, 0], [0, 0, 1, 1], [4, 128, 3, 255]
    given = footprints(0)
    backgrounds = torch.rand(4, 3, dtype=torch.float64)
    expected = oracle.blend(*given, backgrounds, *renders, 24, 24)
    images, transmittance = blend(*(t.to(device) for t in given), backgrounds.to(device), *renders, 24, 24)
    torch.testing.assert_close(images.cpu(), expected[0], rtol=0, atol=1e-13)
    torch.testing.assert_close(transmittance.cpu(), expected[1], rtol=0, atol=1e-13)


@pytest.mark.parametrize("device", DEVICES)
def test_room_for_the_pairs_may_be_given(device):
    # 20 Gaussians of several px in 24 x 24 px: each reaches some tiles, so there are more than a handful of pairs.
    means2d, *given = (t.to(device) for t in footprints(5))
    backgrounds, renders = torch.zeros(2, 3, dtype=torch.float64, device=device), ([0, 1], [0, 1], [255, 255])
    counted = torch.zeros(1, dtype=torch.int32)
    leaf = means2d.clone().requires_grad_()
    expected, _ = blend(leaf, *given, backgrounds, *renders, 24, 24, counted=counted)
    (gradient,) = torch.autograd.grad((expected**2).sum(), leaf)
    pairs = int(counted)
    assert pairs > 40
    for room in (
        pairs,
        3 * pairs,
        1,
    ):  # with too little, the images are meaningless, and nothing else happens
        images, _ = blend(leaf, *given, backgrounds, *renders, 24, 24, capacity=room, counted=counted)
        (other,) = torch.autograd.grad((images**2).sum(), leaf)
        assert int(counted) == pairs
        if room >= pairs:
            assert images.equal(expected) and other.equal(gradient)
    with pytest.raises(ValueError, match="capacity"):
        blend(means2d, *given, backgrounds, *renders, 24, 24, capacity=-1)


@pytest.mark.parametrize("device", DEVICES)
def test_screen_gradient_is_each_heads_share_of_that_of_the_centres(device):
    means2d, *given = (t.to(device) for t in footprints(1))
    means2d.requires_grad_()
    screen = torch.zeros(2, *means2d.shape, dtype=torch.float64, device=device, requires_grad=True)
    backgrounds = torch.zeros(3, 3, dtype=torch.float64, device=device)
    weights = torch.randn(3, 3, 24, 24, dtype=torch.float64).to(device)
    images, _ = blend(means2d, *given, backgrounds, [0, 0, 1], [0, 1, 1], [255] * 3, 24, 24, screen)
    (weights * images).sum().backward()
    torch.testing.assert_close(screen.grad.sum(0), means2d.grad)
    alone, _ = blend(means2d, *given, backgrounds[:1], [0], [0], [255], 24, 24)
    (expected,) = torch.autograd.grad((weights[:1] * alone).sum(), means2d)
    torch.testing.assert_close(screen.grad[0], expected)
    plain, _ = blend(means2d, *given, backgrounds, [0, 0, 1], [0, 1, 1], [255] * 3, 24, 24)
    assert plain.equal(images), "screen is never read"


@pytest.mark.parametrize("device", DEVICES)
def test_each_output_alone_has_its_gradient(device):
    """torch hands undefined gradients of the other outputs to the backward pass."""
    scene = random_scene(3)
    raw = {name: scene.tensors[name].to(device).requires_grad_() for name in scenes.RAW}
    rest = [scene.tensors[name].to(device) for name in ("times", "signs")]
    size = scene.pixels_per_unit, scene.width, scene.height
    theirs = {name: t.detach().cpu().requires_grad_() for name, t in raw.items()}
    for output in (0, 1):
        ours = fold(*raw.values(), *rest, *size)
        expected = oracle.fold(*theirs.values(), *(t.cpu() for t in rest), *size)
        seen = (expected[2] > 0)[..., None]
        for our, their in zip(
            torch.autograd.grad((ours[output] ** 2).sum(), list(raw.values())),
            torch.autograd.grad(
                (torch.where(seen, expected[output], 0) ** 2).sum(), list(theirs.values()), allow_unused=True
            ),
            strict=True,
        ):
            torch.testing.assert_close(
                our.cpu(), torch.zeros_like(our.cpu()) if their is None else their, rtol=1e-9, atol=1e-9
            )

    means2d, *given = (t.to(device) for t in footprints(2, heads=1, views=1))
    theirs, ours = means2d.cpu().requires_grad_(), means2d.requires_grad_()
    render = [0], [0], [255], 24, 24
    background = torch.ones(1, 3, dtype=torch.float64)
    for output in (0, 1):
        (our,) = torch.autograd.grad(
            (blend(ours, *given, background.to(device), *render)[output] ** 2).sum(), ours
        )
        expected = oracle.blend(theirs, *(t.cpu() for t in given), background, *render)
        (their,) = torch.autograd.grad((expected[output] ** 2).sum(), theirs)
        torch.testing.assert_close(our.cpu(), their, rtol=1e-9, atol=1e-11)


# ------------------------------------------------------------------------------------ finite differences, torch's rules


def smooth_scene() -> Scene:
    """Where finite differences work: everything moves smoothly.

    Gaussians are wide and faint, so that at every pixel alpha lies above 1/255 and under 0.99 and T above 1e-4; their
    spread in time is so large that delta is far from 0.1; and squares of their radius cover the whole tile grid.
    """
    scene = random_scene(
        5, width=5, height=4, n=3, channels=2, views=2, heads=2, renders=[(0, 0, 1), (1, 1, 2), (0, 1, 1)]
    )
    n = (3,)
    return scene.with_tensors(
        xyz=0.2 * scene.tensors["xyz"],
        sigma=torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64),
        scaling=torch.log(
            torch.tensor([[6.0, 1.0, 3.0], [3.0, 1.0, 4.0], [5.0, 1.0, 5.5]]).double() / scene.pixels_per_unit
        ),
        rotation=torch.tensor([0.3, -0.6, 0.1], dtype=torch.float64).reshape(n),
        opacities=torch.tensor([[0.4, 0.6, 0.5], [0.7, 0.2, 0.8]], dtype=torch.float64),
        signs=torch.tensor([1.0, -1.0], dtype=torch.float64),
    )


def arguments(scene: Scene, dtype=torch.float64, device="cpu"):
    """Of ``fold``; and the differentiable and other arguments of ``blend`` behind the first three."""
    t = {name: tensor.to(device, dtype) for name, tensor in scene.tensors.items()}
    cut = (
        [t[name] for name in (*scenes.RAW, "times", "signs")],
        (scene.pixels_per_unit, scene.width, scene.height),
    )
    renders = *(list(numbers) for numbers in zip(*scene.renders, strict=True)), scene.width, scene.height
    return cut, ([t[name] for name in ("opacities", "colours", "backgrounds")], renders)


@pytest.mark.parametrize("device", DEVICES)
def test_gradcheck_of_the_whole(device):
    (cut, size), (looks, renders) = arguments(smooth_scene(), device=device)
    signs = cut.pop()
    count = len(cut)

    def images(*values):
        means2d, conics, _, active = fold(*values[:count], signs, *size)
        assert (active == ACTIVE + ACTIVE_SEGMENTATION).all()
        return blend(means2d, conics, active, *values[count:], *renders)

    out, transmittance = images(*cut, *looks)
    assert out.shape == (3, 2, 4, 5) and transmittance.min() > 0.01
    assert torch.autograd.gradcheck(
        images, [t.requires_grad_() for t in (*cut, *looks)], eps=1e-6, atol=1e-7, rtol=1e-5
    )


@pytest.mark.parametrize("device", DEVICES)
def test_second_derivatives_are_an_error_and_not_zero(device):
    (cut, size), (looks, renders) = arguments(smooth_scene(), device=device)
    xyz = cut[0].requires_grad_()
    means2d, conics, _, active = fold(*cut, *size)
    (v_xyz,) = torch.autograd.grad((means2d**2).sum(), xyz, create_graph=True)
    with pytest.raises(NotImplementedError, match="once"):
        v_xyz.sum().backward()
    means2d = means2d.detach().requires_grad_()
    images, _ = blend(means2d, conics.detach(), active, *looks, *renders)
    (v_means2d,) = torch.autograd.grad((images**2).sum(), means2d, create_graph=True)
    with pytest.raises(NotImplementedError, match="once"):
        v_means2d.sum().backward()


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    (cut, size), (looks, renders) = arguments(smooth_scene(), torch.float32, device)
    torch.library.opcheck(OPS.fold.default, (*(t.clone().requires_grad_() for t in cut[:7]), cut[7], *size))
    means2d, conics, radii, active = OPS.fold(*cut, *size)
    torch.library.opcheck(
        OPS.fold_backward.default, (torch.ones_like(means2d), torch.ones_like(conics), radii, *cut, *size)
    )

    views, heads, bits, *image = renders
    footprint = [means2d, conics, active, *looks[:2]]
    leaves = [t.clone().requires_grad_(t.is_floating_point()) for t in (*footprint, looks[2])]
    for screen in (None, torch.zeros(2, *means2d.shape, device=device, requires_grad=True)):
        torch.library.opcheck(OPS.blend.default, (*leaves, screen, views, heads, bits, *image, True))
    saved = OPS.blend(*footprint, looks[2], None, views, heads, bits, *image, False)
    incoming = torch.ones_like(saved[0]), torch.ones_like(saved[1])
    torch.library.opcheck(
        OPS.blend_backward.default, (*incoming, *saved, *footprint, views, heads, bits, *image, False)
    )


@pytest.mark.parametrize("device", DEVICES)
def test_compiles_without_a_graph_break(device):
    (cut, size), (looks, renders) = arguments(random_scene(6, views=2), torch.float32, device)

    def loss(xyz, opacities):
        means2d, conics, _, active = fold(xyz, *cut[1:], *size)
        images, transmittance = blend(means2d, conics, active, opacities, *looks[1:], *renders)
        return (images**2).sum() + transmittance.sum()

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = cut[0].clone().requires_grad_(), looks[0].clone().requires_grad_()
        value = function(*leaves)
        results.append((value.detach(), *torch.autograd.grad(value, leaves)))
    torch.testing.assert_close(results[1], results[0])


# ------------------------------------------------------------------------------------------------------ by hand: fold


def logit(p):
    return math.log(p / (1 - p))


def cut_one(
    t=0.5,
    m=0.5,
    sigma=1.0,
    centre=(0.0, 0.0),
    path=(),
    scales=(0.1, 0.1),
    turns=0.5,
    sign=1.0,
    pixels_per_unit=10.0,
    width=101,
    height=61,
    device="cpu",
):
    """``fold`` of one Gaussian given by its active values, at time t: mean [u, v], conic [a, b, c], radius, active."""

    def tensor(*values):
        return torch.tensor(values, dtype=torch.float64, device=device)

    means2d, conics, radii, active = fold(
        tensor(centre[0], math.nan, centre[1])[None],
        tensor(*(x for w in path for x in w)).reshape(1, -1),
        tensor(logit(m)),
        tensor(math.log(sigma)),
        tensor(math.log(scales[0]), math.nan, math.log(scales[1]))[None],
        tensor(logit(turns)),
        tensor(t),
        tensor(sign),
        pixels_per_unit,
        width,
        height,
    )
    return means2d[0, 0].tolist(), conics[0, 0].tolist(), radii.item(), active.item()


def close(*values):
    return pytest.approx(values, rel=1e-12, abs=1e-12)


PATH = ((1.0, 2.0), (4.0, 8.0), (16.0, -8.0))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("m", "t", "x", "z"),
    [
        (0.75, 0.25, 0.1 + 0.5 + 4 * 0.25 + 16 * 0.125, -0.2 + 2 * 0.5 + 8 * 0.25 - 8 * 0.125),
        (0.25, 0.75, 0.1 - 0.5 + 4 * 0.25 - 16 * 0.125, -0.2 - 2 * 0.5 + 8 * 0.25 + 8 * 0.125),
        (0.5, 0.5, 0.1, -0.2),
    ],
)
def test_the_centre_follows_its_polynomial_in_m_minus_t(m, t, x, z, device):
    # f / d = 10, and the middle of 101 x 61 pixels is pixel (50, 30): u to the right with x, v down against z.
    mean, *_ = cut_one(t=t, m=m, centre=(0.1, -0.2), path=PATH, device=device)
    assert mean == close(50 + 10 * x, 30 - 10 * z)
    mirrored, *_ = cut_one(t=t, m=m, centre=(0.1, -0.2), path=PATH, sign=-1.0, device=device)
    assert mirrored == close(50 - 10 * x, 30 - 10 * z)


@pytest.mark.parametrize("device", DEVICES)
def test_the_origin_is_the_middle_of_the_image(device):
    assert cut_one(width=4, height=7, device=device)[0] == close(1.5, 3.0)


@pytest.mark.parametrize("device", DEVICES)
def test_the_highest_degree_is_32(device):
    path = [(0.0, 0.0)] * 31 + [(2.0**32, -(2.0**32))]
    assert cut_one(m=0.75, t=0.25, path=path, device=device)[0] == close(50 + 10, 30 + 10)


@pytest.mark.parametrize("device", DEVICES)
def test_scales_shrink_with_the_time_weight_and_are_filtered(device):
    # delta = exp(-0.5^2 / (2 * 0.5^2)) = exp(-1/2); variances (f/d)^2 delta^2 s^2 = 4 / e, 1 / e, each plus 0.3 px^2.
    for m, t in ((0.75, 0.25), (0.25, 0.75)):
        _, conic, _, _ = cut_one(t=t, m=m, sigma=0.5, scales=(0.2, 0.1), device=device)
        assert conic == close(1 / (4 / math.e + 0.3), 0, 1 / (1 / math.e + 0.3))


@pytest.mark.parametrize("device", DEVICES)
def test_active_while_the_time_weight_exceeds_a_tenth(device):
    # delta = 0.1 at |m - t| = sigma sqrt(2 ln 10) = 2.14597 sigma.
    for offset, drawn in ((0.21459, True), (-0.21459, True), (0.21460, False), (-0.21460, False)):
        _, _, radius, active = cut_one(t=0.5 - offset, sigma=0.1, device=device)
        assert ((radius > 0), active) == (drawn, 3 * drawn), offset


@pytest.mark.parametrize("device", DEVICES)
def test_active_for_segmentation_while_both_scales_exceed_a_millionth(device):
    for scales, expected in (
        ((1.001e-6, 1.001e-6), 3),
        ((0.999e-6, 1.0), 1),
        ((1.0, 0.999e-6), 1),
        ((1.0, 1.001e-6), 3),
    ):
        assert cut_one(scales=scales, device=device)[3] == expected, scales
    # It is the scale at time t that counts: delta = exp(-1/2) = 0.607.
    at_half = {"m": 0.75, "t": 0.25, "sigma": 0.5}
    assert cut_one(scales=(1.0, 1.6e-6), **at_half, device=device)[3] == 1
    assert cut_one(scales=(1.0, 1.7e-6), **at_half, device=device)[3] == 3
    assert cut_one(scales=(1.0, 1.0), t=5.0, device=device)[3] == 0
    assert (ACTIVE, ACTIVE_SEGMENTATION) == (1, 2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_angle_turns_x_towards_down(sign, device):
    """By 1/8, 1/4 and 1/12 turn, of a needle of variance 4 px^2 along x (and 1e-30 across)."""
    for turns, xx, xy, yy in (
        (1 / 8, 2, 2, 2),
        (1 / 4, 0, 0, 4),
        (1 / 12, 3, math.sqrt(3), 1),
        (11 / 12, 3, -math.sqrt(3), 1),
    ):
        _, conic, _, _ = cut_one(scales=(0.2, 1e-16), turns=turns, sign=sign, device=device)
        determinant = 4.3 * 0.3
        assert conic == close((yy + 0.3) / determinant, -sign * xy / determinant, (xx + 0.3) / determinant)


@pytest.mark.parametrize("device", DEVICES)
def test_the_radius_is_three_standard_deviations_rounded_up(device):
    for variances, radius in (
        ((16, 1), 13),  # 3 sqrt(16.3) = 12.1
        ((1, 16), 13),
        ((0, 0), 3),  # 3 sqrt(0.3 + sqrt(0.1)) = 2.4
        ((0.38, 0.38), 3),  # 3 sqrt(0.68 + sqrt(0.1)) = 2.994: the floor under mid^2 - det
        ((0.41, 0.37), 4),  # 3.009
        ((8.65, 0), 9),  # 3 sqrt(8.95) = 8.97
        ((8.75, 0), 10),  # 3 sqrt(9.05) = 9.02
    ):
        scales = tuple(math.sqrt(max(v, 1e-30)) / 10 for v in variances)
        assert cut_one(scales=scales, device=device)[2] == radius, variances


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("size", "grid"), [(20, 32), (32, 32), (33, 48)])
def test_visible_where_the_square_of_the_radius_touches_the_tile_grid(size, grid, device):
    needle = {"scales": (1e-9, 1e-9), "pixels_per_unit": 1.0, "width": size, "height": size, "device": device}
    middle = (size - 1) / 2
    for pixel, visible in ((-2.999, True), (-3.001, False), (grid + 2.999, True), (grid + 3.001, False)):
        for centre in ((pixel - middle, 0.0), (0.0, middle - pixel)):
            _, _, radius, active = cut_one(centre=centre, **needle)
            assert (radius, active > 0) == (3 * visible, visible), (pixel, centre)


@pytest.mark.parametrize("device", DEVICES)
def test_float32_activations_are_right_however_large_the_raw_value(device):
    """The CPU kernels have their own exponential and sine."""
    scene = random_scene(10, n=2000, degree=2)
    spread = torch.linspace(-1, 1, 2000, dtype=torch.float64)
    scene = scene.with_tensors(
        m=60 * spread,
        rotation=20 * spread.flip(0),
        sigma=5 + 5 * spread,
        scaling=torch.stack([15 * spread - 5, spread, 10 * spread.flip(0)], 1),
        signs=torch.ones(1),
        times=torch.zeros(1),
    ).rounded(torch.float32)
    given = [scene.tensors[name] for name in (*scenes.RAW, "times", "signs")]
    size = scene.pixels_per_unit, 37, 23
    means2d, conics, _, active = fold(*(t.to(device, torch.float32) for t in given), *size)
    expected_means, expected_conics, _, expected_active = oracle.fold(*given, *size)
    assert active.cpu().equal(expected_active) and active.any()
    # For a centre within 100 px; the entries of a conic are sums, so errors are relative to the largest of them.
    torch.testing.assert_close(means2d.cpu().double(), expected_means, rtol=0, atol=1e-4)
    error = (conics.cpu() - expected_conics).abs().amax(2) / expected_conics.abs().amax(2)
    assert error.max() < 1e-5


@pytest.mark.parametrize("device", DEVICES)
def test_y_is_never_read(device):
    scene = random_scene(8)
    changed = scene.with_tensors(**{name: scene.tensors[name].clone() for name in ("xyz", "scaling")})
    changed.tensors["xyz"][:, 1] = math.nan
    changed.tensors["scaling"][:, 1] = -math.inf
    ours, theirs = (draw(diff_gaussian_rasterization, s, device=device) for s in (changed, scene))
    assert all(ours[name].equal(theirs[name]) for name in ours)
    assert not ours["v_xyz"][:, 1].any() and not ours["v_scaling"][:, 1].any()


@pytest.mark.parametrize("device", DEVICES)
def test_the_mirror_view_is_the_left_right_flip(device):
    scene = random_scene(9, n=30, views=2, width=37)
    time = scene.tensors["times"][:1].expand(2)
    both = scene.with_tensors(times=time, signs=torch.tensor([1.0, -1.0]), backgrounds=torch.zeros(2, 3))
    images = draw(diff_gaussian_rasterization, both, device=device)["images"]
    assert images[0].std() > 0.1
    torch.testing.assert_close(images[1], images[0].flip(-1), rtol=0, atol=1e-12)


# ------------------------------------------------------------------------------------------------------ by hand: blend


def blend_some(
    alphas,
    colours=None,
    background=0.0,
    mean=(2.0, 2.0),
    conic=(0.5, 0.1, 0.25),
    size=(5, 5),
    dtype=torch.float64,
    device="cpu",
):
    """Gaussians at one place, grey, front to back: image (H, W), transmittance (H, W), leaves (opacities, means)."""
    n = len(alphas)
    like = {"dtype": dtype, "device": device}
    opacities = torch.tensor([alphas], **like, requires_grad=True)
    means = torch.tensor([mean], **like).repeat(1, n, 1).requires_grad_()
    image, transmittance = blend(
        means,
        torch.tensor([conic], **like).expand(1, n, 3),
        torch.ones(1, n, dtype=torch.uint8, device=device),
        opacities,
        torch.tensor(colours or [1.0] * n, **like).reshape(1, n, 1),
        torch.full((1, 1), background, **like),
        [0],
        [0],
        [1],
        *size,
    )
    return image[0, 0], transmittance[0], (opacities, means)


@pytest.mark.parametrize("device", DEVICES)
def test_alpha_falls_off_with_the_conic(device):
    image, transmittance, _ = blend_some([0.5], device=device)
    for (dx, dy), q in {
        (0, 0): 0,
        (1, 0): 0.5,
        (0, -2): 1.0,
        (1, 1): 0.95,
        (1, -1): 0.55,
        (-1, 1): 0.55,
    }.items():
        alpha = 0.5 * math.exp(-q / 2)
        assert image[2 + dy, 2 + dx].item() == pytest.approx(alpha, rel=1e-12)
        assert transmittance[2 + dy, 2 + dx].item() == pytest.approx(1 - alpha, rel=1e-12)


@pytest.mark.parametrize("device", DEVICES)
def test_a_negative_quadratic_form_is_skipped(device):
    image, _, _ = blend_some([0.5], conic=(0.1, 0.5, 0.1), device=device)
    assert image[1, 3] == 0 and image[3, 1] == 0, "q = 0.2 - 1 across"
    assert image[3, 3].item() == pytest.approx(0.5 * math.exp(-0.6)), "q = 0.2 + 1 along"
    assert image[2, 2] == 0.5


@pytest.mark.parametrize("device", DEVICES)
def test_alpha_is_clamped_and_has_no_gradient_there(device):
    for opacity, alpha, passes in ((1.0, 0.99, False), (0.9901, 0.99, False), (0.9899, 0.9899, True)):
        image, transmittance, (opacities, means) = blend_some(
            [opacity], colours=[0.8], mean=(2.01, 2.0), conic=(1e-3, 0, 1e-3), device=device
        )
        assert transmittance[2, 2].item() == pytest.approx(1 - alpha, rel=1e-4)
        v_opacities, v_means = torch.autograd.grad(image[2, 2], [opacities, means])
        assert v_opacities.item() == pytest.approx(0.8 * passes, rel=1e-4)
        assert bool(v_means.any()) == passes


@pytest.mark.parametrize("device", DEVICES)
def test_a_contribution_under_1_in_255_is_skipped(device):
    for opacity, drawn in ((1.0001 / 255, True), (0.9999 / 255, False)):
        image, _, _ = blend_some([opacity], device=device)
        assert bool(image.any()) == drawn
        assert bool(image[2, 2]) == drawn
    # 0.5 exp(-d^2 / 2) = 1/255 at a distance of sqrt(2 ln 127.5) = 3.11390 px, whichever tile that is in.
    reach = math.sqrt(2 * math.log(127.5))
    for pixel in range(6, 18):
        for nearer, drawn in ((1e-4, True), (-1e-4, False)):
            for direction in (1, -1):
                place = pixel + direction * (reach - nearer)
                image, _, _ = blend_some(
                    [0.5], mean=(place, 12.0), conic=(1, 0, 1), size=(24, 24), device=device
                )
                assert bool(image[12, pixel]) == drawn
                image, _, _ = blend_some(
                    [0.5], mean=(12.0, place), conic=(1, 0, 1), size=(24, 24), device=device
                )
                assert bool(image[pixel, 12]) == drawn


@pytest.mark.parametrize("device", DEVICES)
def test_raw_opacities_are_logits_and_raw_colours_coefficients(device):
    """colour = max(0, 0.28209 f + 0.5)."""
    means2d, conics = torch.zeros(1, 1, 2).double().to(device), torch.ones(1, 1, 3).double().to(device)
    active = torch.ones(1, 1, dtype=torch.uint8, device=device)
    opacities = torch.full(
        (1, 1), math.log(0.6 / 0.4), dtype=torch.float64, device=device, requires_grad=True
    )
    colours = torch.tensor([[[0.0, 1.0, -1.0, -2.0]]], dtype=torch.float64, device=device, requires_grad=True)
    background = torch.zeros(1, 4, dtype=torch.float64, device=device)
    image, _ = blend(means2d, conics, active, opacities, colours, background, [0], [0], [1], 1, 1, raw=True)
    harmonic = 0.28209479177387814
    assert image.flatten().tolist() == close(0.3, 0.6 * (0.5 + harmonic), 0.6 * (0.5 - harmonic), 0)
    v_opacities, v_colours = torch.autograd.grad(image.sum(), [opacities, colours])
    assert v_opacities.item() == pytest.approx(0.6 * 0.4 * 1.5)
    assert v_colours.flatten().tolist() == close(*[0.6 * harmonic] * 3, 0)


@pytest.mark.parametrize("device", DEVICES)
def test_a_pixel_stops_before_its_transmittance_falls_under_1e_4(device):
    # T = 0.01, then 0.01 * 0.02 = 2e-4, then 2e-4 * (1 - alpha).
    colours = [0.1, 0.2, 0.4, 0.8]
    front = 0.99 * 0.1 + 0.01 * 0.98 * 0.2
    image, transmittance, _ = blend_some([0.99, 0.98, 0.499], colours[:3], device=device)
    assert transmittance[2, 2].item() == pytest.approx(2e-4 * 0.501)
    assert image[2, 2].item() == pytest.approx(front + 2e-4 * 0.499 * 0.4)
    # The third would leave 0.998e-4: it is not drawn, nor is the fourth behind it, which alone would leave more.
    image, transmittance, (opacities, _) = blend_some(
        [0.99, 0.98, 0.501, 0.1], colours, background=0.5, device=device
    )
    assert transmittance[2, 2].item() == pytest.approx(2e-4)
    assert image[2, 2].item() == pytest.approx(front + 2e-4 * 0.5)
    (gradient,) = torch.autograd.grad(image[2, 2], opacities)
    assert gradient[0, :2].all() and not gradient[0, 2:].any()


@pytest.mark.parametrize("device", DEVICES)
def test_front_to_back_by_index_over_the_background(device):
    image, transmittance, _ = blend_some([0.5, 0.25, 0.2], [0.8, 0.4, 1.0], background=0.3, device=device)
    expected = 0.5 * 0.8 + 0.5 * 0.25 * 0.4 + 0.5 * 0.75 * 0.2 * 1.0 + 0.5 * 0.75 * 0.8 * 0.3
    assert image[2, 2].item() == pytest.approx(expected)
    assert transmittance[2, 2].item() == pytest.approx(0.5 * 0.75 * 0.8)
    swapped, _, _ = blend_some([0.2, 0.25, 0.5], [1.0, 0.4, 0.8], background=0.3, device=device)
    assert swapped[2, 2].item() == pytest.approx(0.2 + 0.8 * 0.25 * 0.4 + 0.8 * 0.75 * 0.5 * 0.8 + 0.3 * 0.3)


@pytest.mark.parametrize("device", DEVICES)
def test_each_render_has_its_own_background_and_nothing_else_where_nothing_is(device):
    means2d, conics, active, opacities, colours = (t.to(device) for t in footprints(3))
    backgrounds = torch.tensor(
        [[0.1, 0.2, 0.3], [0.7, 0.5, 0.0]], dtype=torch.float64, device=device, requires_grad=True
    )
    images, transmittance = blend(
        means2d, conics, 0 * active, opacities, colours, backgrounds, [1, 0], [0, 1], [1, 1], 9, 6
    )
    assert images.equal(backgrounds[:, :, None, None].expand(2, 3, 6, 9)) and (transmittance == 1).all()
    images[1].sum().backward()
    assert backgrounds.grad.tolist() == [[0.0] * 3, [54.0] * 3]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mirrored", [False, True])
def test_a_cut_is_what_the_general_rasteriser_draws_of_flat_gaussians(mirrored, device):
    """Depths are equal, so it keeps index order too."""
    camera = Camera(45, 31, distance=1.5)
    n, t = 60, 0.4
    scene = random_scene(11, width=45, height=31, n=n, degree=4)
    p = scene.tensors
    like = {"mirrored": mirrored, "dtype": torch.float64}
    cut = fold(
        *(p[name].to(device) for name in scenes.RAW),
        torch.tensor([t], dtype=torch.float64, device=device),
        torch.tensor([-1.0 if mirrored else 1.0], dtype=torch.float64, device=device),
        camera.pixels_per_unit,
        camera.width,
        camera.height,
    )
    means2d, conics, radii, active = cut
    background = torch.tensor([[0.2, 0.1, 0.4]], dtype=torch.float64)
    looks = p["opacities"].to(device), p["colours"].to(device), background.to(device)
    images, _ = blend(means2d, conics, active, *looks, [0], [0], [ACTIVE], camera.width, camera.height)

    offset = torch.sigmoid(p["m"]) - t  # (N,)
    weight = torch.exp(-(offset**2) / (2 * torch.exp(2 * p["sigma"])))  # (N,)
    powers = offset[:, None] ** torch.arange(1, 5)  # (N, P)
    x, z = (p["xyz"][:, axis] + (powers * p["w1"][:, i::2]).sum(1) for i, axis in ((0, 0), (1, 2)))
    scales = torch.exp(p["scaling"]) * weight[:, None]
    scales[:, 1] = 1e-8
    half_angle, zero = math.pi * torch.sigmoid(p["rotation"]), torch.zeros(n, dtype=torch.float64)
    rasterizer = GaussianRasterizer(
        GaussianRasterizationSettings(
            camera.height,
            camera.width,
            camera.tan_fov_x,
            camera.tan_fov_y,
            background[0].to(device),
            1.0,
            camera.view_matrix(**like).to(device),
            camera.projection_matrix(**like).to(device),
            0,
            camera.position(**like).to(device),
            False,
            False,
        )
    )
    flat = {
        "means3D": torch.stack([x, zero, z], 1),
        "means2D": torch.zeros(n, 3, dtype=torch.float64),
        "opacities": p["opacities"][0, :, None],
        "colors_precomp": p["colours"][0],
        "scales": scales,
        "rotations": torch.stack([torch.cos(half_angle), zero, torch.sin(half_angle), zero], 1),
    }
    kept = weight > 0.1
    assert 10 < kept.sum() < n
    expected, expected_radii, _ = rasterizer(**{name: value[kept].to(device) for name, value in flat.items()})
    # The general rasteriser's conic inverts a covariance, which loses some digits for a thin Gaussian.
    torch.testing.assert_close(images[0], expected, rtol=0, atol=1e-8)
    assert radii[0, kept.to(device)].equal(expected_radii) and not radii[0, ~kept.to(device)].any()


# ------------------------------------------------------------------------------------ kernels of every kind, repeatable

IN_ANOTHER_PROCESS = """
import sys, torch
import diff_gaussian_rasterization, scenes
torch.set_num_threads(1)
results = {str(dtype): [scenes.draw(diff_gaussian_rasterization, s.rounded(dtype), dtype) for s in scenes.every_kind()]
           for dtype in (torch.float32, torch.float64)}
torch.save((torch.ops.diff_gaussian_rasterization.cpu_kernels(), results), sys.argv[1])
"""


def start(kernels: str, *command: str) -> subprocess.Popen:
    """A process with kernels of that kind: the choice is made once per process."""
    paths = [str(Path(__file__).parent), *filter(None, sys.path)]
    environment = os.environ | {"MEDGS_CPU_KERNELS": kernels, "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.Popen(
        [sys.executable, "-c", *command], env=environment, stderr=subprocess.PIPE, text=True
    )


def test_portable_avx2_and_avx512_kernels_agree(tmp_path):
    processes = {
        name: start(name, IN_ANOTHER_PROCESS, str(tmp_path / name)) for name in ("portable", "avx2", "avx512")
    }
    results = {}
    for name, process in processes.items():
        _, error = process.communicate(timeout=120)
        if process.returncode != 0:
            assert name != "portable" and "not for this processor" in error, error
            continue
        ran, results[name] = torch.load(tmp_path / name)
        assert ran == name
    for ours in results.values():
        for our, their in zip(ours["torch.float64"], results["portable"]["torch.float64"], strict=True):
            assert_same(our, their, 1e-10)
        for scene, our in zip(scenes.every_kind(), ours["torch.float32"], strict=True):
            assert_same_but_for_flips(our, draw(oracle, scene.rounded(torch.float32)))


def test_an_unknown_set_of_kernels_is_an_error():
    process = start(
        "sse9",
        "import torch, diff_gaussian_rasterization\ntorch.ops.diff_gaussian_rasterization.cpu_kernels()",
    )
    assert "MEDGS_CPU_KERNELS=sse9: not one of portable, avx2, avx512" in process.communicate(timeout=120)[1]
    assert process.returncode == 1


@pytest.fixture
def threads():
    """Sets torch's number of threads until the end of the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_same_bits_on_any_number_of_threads(dtype, threads):
    # Enough Gaussians and pixels that every loop, and torch's own sums, are distributed over the threads.
    scene = random_scene(
        12,
        width=300,
        height=220,
        n=5000,
        channels=1,
        views=2,
        heads=2,
        renders=[(0, 0, 1), (1, 1, 2), (1, 0, 1)],
    )
    alone = scene.with_renders([(0, 0, 1)])
    for drawn in (scene, alone):
        results = []
        for count in (1, 2, 3, 2):
            threads(count)
            results.append(draw(diff_gaussian_rasterization, drawn, dtype))
        for other in results[1:]:
            for name, value in results[0].items():
                assert value.equal(other[name]), name


@pytest.mark.cuda
def test_the_same_bits_in_every_run_on_a_gpu():
    scene = random_scene(12, width=300, height=220, n=5000, views=2, heads=2)
    first, second = (draw(diff_gaussian_rasterization, scene, torch.float32, "cuda") for _ in range(2))
    for name, value in first.items():
        assert value.equal(second[name]), name


# ---------------------------------------------------------------------------------------------------------- bad input


def fold_arguments(device="cpu", **changes):
    scene = random_scene(13, n=5, degree=2, views=2)
    given = {name: scene.tensors[name].to(device) for name in (*scenes.RAW, "times", "signs")}
    given |= {"pixels_per_unit": 10.0, "width": 8, "height": 6}
    return given | changes


def blend_arguments(device="cpu", **changes):
    names = "means2d", "conics", "active", "opacities", "colours"
    given = dict(zip(names, (t.to(device) for t in footprints(4, n=5)), strict=True))
    given["backgrounds"] = torch.zeros(2, 3, dtype=torch.float64, device=device)
    given |= {"views": [0, 1], "heads": [0, 1], "bits": [1, 2], "width": 8, "height": 6}
    return given | changes


def zeros(*shape, dtype=torch.float64):
    return torch.zeros(*shape, dtype=dtype)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"xyz": zeros(5, 2)}, ValueError, r"xyz must have shape \[5, 3\], got \[5, 2\]"),
        ({"xyz": zeros(5)}, ValueError, "xyz must have shape"),
        ({"w1": zeros(5, 3)}, ValueError, r"w1 must have shape \(N, 2 P\)"),
        ({"w1": zeros(4, 4)}, ValueError, "w1 must have shape"),
        ({"w1": zeros(5, 66)}, ValueError, "polynomial degree may be at most 32, got 33"),
        ({"m": zeros(5, 1)}, ValueError, "m must have shape"),
        ({"sigma": zeros(5, 1, 1)}, ValueError, "sigma must have shape"),
        ({"scaling": zeros(5, 2)}, ValueError, "scaling must have shape"),
        ({"rotation": zeros(6)}, ValueError, "rotation must have shape"),
        ({"times": zeros(2, 1)}, ValueError, "times must have shape"),
        ({"signs": zeros(3)}, ValueError, "signs must have shape"),
        ({"xyz": zeros(5, 3, dtype=torch.int64)}, TypeError, "xyz must be float32 or float64"),
        ({"xyz": zeros(5, 3, dtype=torch.float16)}, TypeError, "xyz must be float32 or float64"),
        ({"m": zeros(5, dtype=torch.float32)}, TypeError, "m must be"),
        ({"times": zeros(2, dtype=torch.float32)}, TypeError, "times must be"),
        ({"width": 0}, ValueError, "width and height must be"),
        ({"height": -3}, ValueError, "width and height must be"),
        ({"width": 10**12}, ValueError, "width and height must be"),
    ],
)
def test_fold_names_what_does_not_fit(changes, error, message):
    with pytest.raises(error, match=message):
        fold(**fold_arguments(**changes))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"means2d": zeros(2, 5, 3)}, ValueError, "means2d must have shape"),
        ({"means2d": zeros(5, 2)}, ValueError, "means2d must have shape"),
        ({"conics": zeros(2, 5, 2)}, ValueError, "conics must have shape"),
        ({"conics": zeros(1, 5, 3)}, ValueError, "conics must have shape"),
        ({"active": zeros(2, 5)}, TypeError, "active must be uint8"),
        ({"active": torch.ones(2, 5, dtype=torch.bool)}, TypeError, "active must be uint8"),
        ({"active": torch.ones(2, 4, dtype=torch.uint8)}, ValueError, "active must have shape"),
        ({"opacities": zeros(5)}, ValueError, "opacities must have shape"),
        ({"opacities": zeros(1, 5)}, ValueError, "opacities must have shape"),
        ({"colours": zeros(5, 3)}, ValueError, "colours must have shape"),
        ({"colours": zeros(2, 5, 5)}, ValueError, r"backgrounds must have shape \[2, 5\]"),
        ({"colours": zeros(2, 5, 0)}, ValueError, "at least 1 channel, got 0"),
        ({"backgrounds": zeros(1, 3)}, ValueError, "backgrounds must have shape"),
        ({"backgrounds": zeros(2, 1)}, ValueError, "backgrounds must have shape"),
        ({"screen": zeros(2, 5, 2)}, ValueError, "screen must have shape"),
        ({"screen": zeros(2, 2, 5, 2, dtype=torch.float32)}, TypeError, "screen must be"),
        ({"colours": zeros(2, 5, 3, dtype=torch.float32)}, TypeError, "colours must be"),
        ({"means2d": zeros(2, 5, 2, dtype=torch.float16)}, TypeError, "means2d must be float32 or float64"),
        ({"views": [0, 2]}, ValueError, r"views\[1\] = 2 is not one of the 2 views"),
        ({"views": [-1, 0]}, ValueError, r"views\[0\] = -1"),
        ({"heads": [0, 2]}, ValueError, r"heads\[1\] = 2 is not one of the 2 heads"),
        ({"heads": [0, -1]}, ValueError, r"heads\[1\] = -1"),
        ({"bits": [0, 1]}, ValueError, r"bits\[0\] = 0"),
        ({"bits": [1, 256]}, ValueError, r"bits\[1\] = 256"),
        ({"heads": [0]}, ValueError, "must be equally long"),
        ({"bits": [1, 1, 1]}, ValueError, "must be equally long"),
        ({"width": 0}, ValueError, "width and height must be"),
        ({"height": 32769}, ValueError, "width and height must be"),
        (
            {"views": [0] * 65, "heads": [0] * 65, "bits": [1] * 65, "backgrounds": zeros(65, 3)},
            ValueError,
            "at most 64 views and renders",
        ),
    ],
)
def test_blend_names_what_does_not_fit(changes, error, message):
    with pytest.raises(error, match=message):
        blend(**blend_arguments(**changes))


@pytest.mark.cuda
def test_tensors_of_two_devices_are_an_error():
    with pytest.raises(ValueError, match="m must be on cuda"):
        fold(**fold_arguments("cuda", m=zeros(5)))
    with pytest.raises(ValueError, match="opacities must be on cuda"):
        blend(**blend_arguments("cuda", opacities=zeros(2, 5)))


@pytest.mark.parametrize("device", DEVICES)
def test_no_render_no_view_and_no_head_give_empty_results(device):
    none = {"views": [], "heads": [], "bits": [], "backgrounds": zeros(0, 3).to(device)}
    assert blend(**blend_arguments(device, **none))[0].shape == (0, 3, 6, 8)
    no_view = {
        "means2d": zeros(0, 5, 2),
        "conics": zeros(0, 5, 3),
        "active": torch.ones(0, 5, dtype=torch.uint8),
    }
    no_view = {name: tensor.to(device) for name, tensor in no_view.items()}
    assert blend(**blend_arguments(device, **none, **no_view))[0].shape == (0, 3, 6, 8)
    no_head = {"opacities": zeros(0, 5).to(device), "colours": zeros(0, 5, 3).to(device)}
    headless = blend_arguments(device, **none, **no_head)
    conics = headless["conics"].requires_grad_()
    images, _ = blend(**headless)
    assert images.shape == (0, 3, 6, 8)
    assert not torch.autograd.grad(images.sum(), conics)[0].any(), "written even so"
    means2d, _, radii, _ = fold(
        **fold_arguments(device, times=zeros(0).to(device), signs=zeros(0).to(device))
    )
    assert means2d.shape == (0, 5, 2) and radii.shape == (0, 5)


@pytest.mark.parametrize("device", DEVICES)
def test_no_gaussian_gives_the_background_and_its_gradient(device):
    scene = random_scene(14, n=0)
    results = draw(diff_gaussian_rasterization, scene, device=device)
    assert (results["transmittance"] == 1).all()
    assert results["v_backgrounds"].any() and results["v_w1"].shape == (0, 6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", [*scenes.RAW, "opacities"])
def test_not_a_number_hides_its_gaussian_and_no_other(name, dtype, device):
    scene = random_scene(15, n=20, heads=2, renders=[(0, 0, 1), (0, 1, 2)])
    broken = scene.with_tensors(**{name: scene.tensors[name].clone()})
    without = scene.with_tensors(opacities=scene.tensors["opacities"].clone())
    where = (slice(None), 3) if name == "opacities" else 3
    broken.tensors[name][where] = math.nan
    without.tensors["opacities"][:, 3] = 0
    ours, expected = (draw(diff_gaussian_rasterization, s, dtype, device) for s in (broken, without))
    assert ours["images"].equal(expected["images"])
    assert ours["transmittance"].equal(expected["transmittance"])
    others = torch.arange(20) != 3
    for parameter in scenes.RAW:
        assert ours["v_" + parameter][others].equal(expected["v_" + parameter][others]), parameter


@pytest.mark.parametrize("device", DEVICES)
def test_an_opacity_that_is_no_number_hides_its_head_alone(device):
    given = blend_arguments(device, views=[0, 0], bits=[255, 255])
    given["opacities"][0] = math.nan
    images, transmittance = blend(**given)
    assert (transmittance[0] == 1).all() and not images[0].any()
    alone = {
        "opacities": given["opacities"][1:],
        "colours": given["colours"][1:],
        "backgrounds": given["backgrounds"][1:],
    }
    expected, _ = blend(**given | alone | {"views": [0], "heads": [0], "bits": [255]})
    assert expected.any() and images[1:].equal(expected)


@pytest.mark.parametrize("device", DEVICES)
def test_a_colour_that_is_no_number_stays_in_the_tiles_of_its_gaussian(device):
    scene = random_scene(15, width=64, height=48, n=20)
    means2d, radii = (draw(oracle, scene, gradients=False)[name][0] for name in ("means2d", "radii"))
    n = min(range(20), key=lambda i: radii[i].item() or math.inf)  # the smallest that is visible
    broken = scene.with_tensors(colours=scene.tensors["colours"].clone())
    broken.tensors["colours"][0, n] = math.nan
    ours, expected = (
        draw(diff_gaussian_rasterization, s, device=device)["images"][0] for s in (broken, scene)
    )
    y, x = torch.meshgrid(torch.arange(48), torch.arange(64), indexing="ij")
    distance = torch.maximum((x - means2d[n, 0]).abs(), (y - means2d[n, 1]).abs())
    far = (
        distance > 4 / 3 * radii[n] + 8
    )  # alpha of an opacity of 1 is under 1/255 from 3.33 deviations; tiles: 8 px
    assert far.double().mean() > 0.3
    assert ours[:, far].equal(expected[:, far])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("value", [math.inf, -math.inf])
@pytest.mark.parametrize("name", scenes.RAW)
def test_infinite_parameters_are_drawn_as_the_reference_does(name, value, device):
    """Some are meaningful: m = inf is the end of time, sigma = inf is always present, scaling = -inf is a point."""
    scene = random_scene(15, n=20)
    broken = scene.with_tensors(**{name: scene.tensors[name].clone()})
    broken.tensors[name][3] = value
    ours = draw(diff_gaussian_rasterization, broken, device=device)
    theirs = draw(oracle, broken, gradients=False)
    assert ours["images"].isfinite().all()
    torch.testing.assert_close(ours["images"], theirs["images"], rtol=0, atol=1e-12)
    in_float32 = draw(diff_gaussian_rasterization, broken, torch.float32, device)
    assert in_float32["images"].isfinite().all()
    others = torch.arange(20) != 3
    assert all(
        results["v_" + parameter][others].isfinite().all()
        for results in (ours, in_float32)
        for parameter in scenes.RAW
    )


@pytest.mark.parametrize("device", DEVICES)
def test_times_that_are_no_numbers_draw_nothing(device):
    scene = random_scene(16, views=3)
    scene.tensors["times"][:] = torch.tensor([math.nan, math.inf, -math.inf])
    results = draw(diff_gaussian_rasterization, scene, device=device)
    assert (results["transmittance"] == 1).all() and not results["active"].any()
    assert results["images"].isfinite().all() and not results["v_xyz"].any()


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers, at every second place in memory, with dimensions in reverse order."""
    reverse = list(range(tensor.dim()))[::-1]
    spread = torch.full((*tensor.permute(reverse).shape, 2), 77, dtype=tensor.dtype, device=tensor.device)
    spread[..., 0] = tensor.permute(reverse)
    out = spread[..., 0].permute(reverse)
    assert out.equal(tensor) and not out.is_contiguous()
    return out


@pytest.mark.parametrize("device", DEVICES)
def test_inputs_need_not_be_contiguous(device):
    scene = random_scene(17, n=20, views=2, heads=2)
    results = []
    for layout in (strided, torch.Tensor.contiguous):
        (cut, size), (looks, renders) = arguments(scene, device=device)
        cut, looks = (
            [layout(t).detach().requires_grad_() for t in cut],
            [layout(t).detach().requires_grad_() for t in looks],
        )
        means2d, conics, _, active = fold(*cut, *size)
        images, transmittance = blend(layout(means2d), layout(conics), layout(active), *looks, *renders)
        # The gradient of a sum has strides of 0.
        loss = images.sum() + (layout(transmittance) * 2).sum()
        results.append([images.detach(), *torch.autograd.grad(loss, [*cut[:7], *looks])])
    for ours, expected in zip(*results, strict=True):
        assert ours.equal(expected)
