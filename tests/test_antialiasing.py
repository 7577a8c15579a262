"""--antialiasing: opacities that compensate for the low-pass filter, in training, evaluation and all ways to render."""

import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sequences import FRAMES, blobs, checkpoint, masks, refused, threads, train_at, write

import render as program
from arguments import TrainOptions, read_cfg_args
from diff_gaussian_rasterization import GaussianRasterizationSettings, GaussianRasterizer
from gaussian_renderer import (
    ACTIVE,
    ACTIVE_SEGMENTATION,
    RASTERIZERS,
    Render,
    compensations,
    render,
    render_frames,
)
from scene.cameras import Camera
from scene.gaussian_model import GaussianModel
from scene.parameters import IMAGE, SEGMENTATION
from training.evaluation import evaluate
from training.run import Training
from utils.images import read_image

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
CAMERA = Camera(45, 31, distance=1.5)
GEOMETRY = ("xyz", "w1", "m", "sigma", "scaling", "rotation")


# ---- the factor ----------------------------------------------------------------------------------------------------


def conics_of(*deviations: tuple[float, float]) -> torch.Tensor:
    """Conics (N, 3), float64, of footprints with these standard deviations in px, along axes turned by 0.3."""
    c, s = math.cos(0.3), math.sin(0.3)
    turn = torch.tensor([[c, -s], [s, c]], dtype=torch.float64)
    widened = torch.tensor(deviations, dtype=torch.float64) ** 2 + 0.3
    inverse = turn @ torch.diag_embed(1 / widened) @ turn.T
    return torch.stack([inverse[:, 0, 0], inverse[:, 0, 1], inverse[:, 1, 1]], -1)


# From far below a pixel to far above; round, long and thin.
SIZES = [
    (1e-9, 1e-9),
    (0.01, 0.01),
    (0.05, 0.06),
    (0.2, 0.2),
    (1.0, 1.0),
    (50.0, 50.0),
    (30.0, 0.01),
    (2.0, 0.3),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_factor_by_its_definition(dtype):
    variances = torch.tensor(SIZES, dtype=torch.float64) ** 2  # eigenvalues: their products are determinants
    expected = (variances.prod(1) / (variances + 0.3).prod(1)).clamp_min(2.5e-5).sqrt()
    assert expected[0] == 0.005 and expected[5] > 0.999
    got = compensations(conics_of(*SIZES).to(dtype))
    # A few rounding errors eps in the ratio; in a root r they become eps / 2r, with r at least 0.005.
    atol = 400 * torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=atol)


def test_the_factor_is_differentiable_and_flat_where_it_is_clamped():
    conics = conics_of(*SIZES[2:]).requires_grad_()
    assert torch.autograd.gradcheck(compensations, conics)
    tiny = torch.tensor([[1 / 0.3, 0.0, 1 / 0.3], [math.nan] * 3]).requires_grad_()
    compensations(tiny).sum().backward()
    assert (tiny.grad[0] == 0).all()


# ---- images and gradients ------------------------------------------------------------------------------------------


def random_model(n=60, seed=3, device="cpu", dtype=torch.float64, smallest=0.15):
    """Two heads; from ``smallest`` px to some px, so that the factor is anything between its floor and 1."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(*shape, generator=generator, dtype=torch.float64)

    half = torch.tensor([CAMERA.half_width, 1.0, CAMERA.half_height], dtype=torch.float64)
    sizes = uniform(math.log(smallest), math.log(5), n, 3) - math.log(CAMERA.pixels_per_unit)
    params = {
        "xyz": uniform(-1, 1, n, 3) * half, "f_dc": uniform(-1, 2, n, 1, 3), "f_rest": torch.zeros(n, 0, 3),
        "opacity": uniform(-2, 2, n, 1), "scaling": sizes, "rotation": uniform(-2, 2, n, 1),
        "m": uniform(-2, 2, n, 1), "sigma": uniform(-1, 0, n, 1, 1), "w1": uniform(-0.2, 0.2, n, 4),
        "f_dc_seg": uniform(-1, 2, n, 1, 3), "f_rest_seg": torch.zeros(n, 0, 3), "opacity_seg": uniform(-2, 2, n, 1),
    }  # fmt: skip
    params = {name: value.to(device, dtype) for name, value in params.items()}
    return GaussianModel(params, torch.full((FRAMES,), 1 / FRAMES, dtype=dtype, device=device))


# Views out of order, one with both heads, one with none.
RENDERS = [
    Render(2, SEGMENTATION, ACTIVE_SEGMENTATION),
    Render(0, IMAGE, ACTIVE),
    Render(2, IMAGE, ACTIVE),
    Render(1, SEGMENTATION, ACTIVE),
]


def drawn(model, backend, renders=RENDERS, antialiasing=True):
    """Images, and the gradients of a fixed weighting of them by everything."""
    background = torch.tensor([0.2, 0.1, 0.4]).to(model.params["xyz"])
    view = [0.5, 2.0, 3.25, 1.0], [False, True, True, False]
    made = render(
        model, CAMERA, *view, renders, background, backend, screen_gradients=True, antialiasing=antialiasing
    )
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(made.images.shape, generator=generator, dtype=torch.float64).to(made.images)
    leaves = {name: value for name, value in model.params.items() if value.numel()} | {"screen": made.screen}
    gradients = torch.autograd.grad(
        (made.images * weights).sum(), list(leaves.values()), materialize_grads=True
    )
    return {"images": made.images.detach(), **dict(zip(leaves, gradients, strict=True))}


@pytest.mark.parametrize("device", DEVICES)
def test_both_rasterizers_agree(device):
    model = random_model(device=device)
    with threads(1):
        compiled, oracle = (drawn(model, name) for name in RASTERIZERS)
    for name, value in oracle.items():
        # Sums in a different order, in float64; gradients reach about 1e3.
        torch.testing.assert_close(compiled[name], value, rtol=1e-8, atol=1e-8, msg=name)
        assert value.abs().max() > 0, name
    plain = drawn(model, "oracle", antialiasing=False)
    assert (plain["images"] - oracle["images"]).abs().mean() > 0.01


def test_the_order_of_the_renders_is_kept():
    model = random_model()
    whole = drawn(model, "compiled")["images"]
    for place, one in enumerate(RENDERS):
        assert drawn(model, "compiled", [one])["images"][0].equal(whole[place])


def test_large_gaussians_are_drawn_as_without_it():
    model = random_model(smallest=4.9)
    model.params["sigma"].data.fill_(3.0)  # no view makes them small
    # 1 - sqrt(ratio) is up to 0.3 / 4.9^2 of an alpha, and likewise of what is behind.
    images = [drawn(model, "compiled", antialiasing=on)["images"] for on in (False, True)]
    torch.testing.assert_close(*images, rtol=0, atol=0.05)


def flat_gaussians(model, t):
    """The arguments of the general rasteriser: the Gaussians at time t, in the plane y = 0. Differentiable."""
    p = model.params
    offset = torch.sigmoid(p["m"]) - t  # (N, 1)
    weight = torch.exp(-(offset**2) / (2 * torch.exp(2 * p["sigma"][:, :, 0])))  # (N, 1)
    powers = torch.cat([offset, offset**2], 1)  # (N, P)
    x, z = (p["xyz"][:, axis] + (powers * p["w1"][:, i::2]).sum(1) for i, axis in ((0, 0), (1, 2)))
    zero, half_angle = torch.zeros_like(x), math.pi * torch.sigmoid(p["rotation"][:, 0])
    scales = torch.exp(p["scaling"]) * weight
    thin = torch.full_like(zero, 1e-8)
    arguments = {
        "means3D": torch.stack([x, zero, z], 1),
        "means2D": torch.zeros(len(x), 3, dtype=torch.float64),
        "opacities": torch.sigmoid(p["opacity"]),
        "colors_precomp": (0.28209479177387814 * p["f_dc"][:, 0] + 0.5).clamp_min(0),
        "scales": torch.stack([scales[:, 0], thin, scales[:, 2]], 1),
        "rotations": torch.stack([torch.cos(half_angle), zero, torch.sin(half_angle), zero], 1),
    }
    kept = weight[:, 0] > 0.1
    assert 10 < kept.sum() < len(kept)
    return {name: value[kept] for name, value in arguments.items()}


@pytest.mark.parametrize("mirrored", [False, True])
def test_values_and_gradients_are_those_of_the_general_rasteriser(mirrored):
    model, position = random_model(seed=5), 1.5
    model.params["sigma"].data -= 0.7
    background = torch.tensor([0.2, 0.1, 0.4], dtype=torch.float64)
    like = {"mirrored": mirrored, "dtype": torch.float64}
    rasterise = GaussianRasterizer(
        GaussianRasterizationSettings(
            CAMERA.height,
            CAMERA.width,
            CAMERA.tan_fov_x,
            CAMERA.tan_fov_y,
            background,
            1.0,
            CAMERA.view_matrix(**like),
            CAMERA.projection_matrix(**like),
            0,
            CAMERA.position(**like),
            False,
            False,
            antialiasing=True,
        )
    )
    theirs, _, _ = rasterise(**flat_gaussians(model, position / FRAMES))
    ours = render(model, CAMERA, [position], [mirrored], [Render(0)], background, antialiasing=True).images[0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-8)

    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    leaves = [model.params[name] for name in (*GEOMETRY, "opacity", "f_dc")]
    gradients = [torch.autograd.grad((image * weights).sum(), leaves) for image in (ours, theirs)]
    for name, a, b in zip((*GEOMETRY, "opacity", "f_dc"), *gradients, strict=True):
        # The general rasteriser's conic inverts a covariance, which loses some digits for a thin Gaussian.
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 * float(b.abs().max()), msg=name)


# ---- runs ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A joint run with --antialiasing: the data, and the model's folder."""
    root = tmp_path_factory.mktemp("run")
    images, seg = write(root / "img", blobs()), write(root / "seg", masks())
    flags = ("--pipeline", "joint", "--seg_source_path", seg, "--iterations", 12, "--densify_from_iter", 3)
    with threads(1):
        train_at(
            images,
            root / "out",
            *flags,
            "--densification_interval",
            4,
            "--ibfr_from_iter",
            5,
            "--antialiasing",
        )
    return images, seg, root / "out"


def call(monkeypatch, folder, *flags):
    """render.py; the images of both heads."""
    command = ["render.py", "-m", folder, "--pipeline", "both", "--extension", ".npy", "--quiet", *flags]
    monkeypatch.setattr(sys, "argv", [*map(str, command), "--device", "cpu"])
    program.main()
    return {
        f"{kind}/{file.name}": read_image(file)
        for kind in ("render_img", "render_mask")
        for file in sorted((folder / kind).iterdir())
    }


def same(a, b, atol=2e-4):  # float32 sums in a different order
    return a.keys() == b.keys() and all(np.allclose(a[name], b[name], rtol=0, atol=atol) for name in a)


def by_hand(folder, antialiasing):
    saved = checkpoint(folder, 12)
    model = GaussianModel(saved.params, saved.time_func)
    camera = Camera(saved.extras["width"], saved.extras["height"])
    positions, made = [float(k) for k in range(FRAMES)], {}
    for kind, head, test in (("img", IMAGE, ACTIVE), ("mask", SEGMENTATION, ACTIVE_SEGMENTATION)):
        frames = render_frames(
            model, camera, positions, torch.zeros(1), head, test, "oracle", antialiasing
        ).numpy()
        made |= {f"render_{kind}/{k:05d}_0.npy": frame[0] for k, frame in enumerate(frames)}
    return made


def test_a_model_is_drawn_as_it_was_trained(trained, monkeypatch, tmp_path):
    _, _, folder = trained
    assert checkpoint(folder, 12).antialiasing is True
    assert read_cfg_args(folder / "cfg_args")["antialiasing"] is True
    with_it, without = by_hand(folder, True), by_hand(folder, False)
    assert not same(with_it, without, atol=0.02)
    assert same(call(monkeypatch, folder), with_it)
    assert same(call(monkeypatch, folder, "--antialiasing", "False"), without), "the command line wins"
    # A published checkpoint does not say, its cfg_args may.
    state, number = torch.load(folder / "chkpnt12.pth", weights_only=True)
    del state["medgs"]
    published = tmp_path / "published"
    published.mkdir()
    torch.save((state, number), published / "chkpnt12.pth")
    data = f"source_path={str(trained[0])!r}"
    as_grey = {name: value.mean(2) if value.ndim == 3 else value for name, value in with_it.items()}
    for text, expected in (
        (", antialiasing=True", with_it),
        (", antialiasing=False", without),
        ("", without),
    ):
        (published / "cfg_args").write_text(f"Namespace({data}{text})")
        made = call(monkeypatch, published)
        assert same(
            {name: image.reshape(*as_grey[name].shape, -1)[..., 0] for name, image in made.items()}, expected
        )
    made = call(monkeypatch, published, "--antialiasing")
    assert same(
        {name: image.reshape(*as_grey[name].shape, -1)[..., 0] for name, image in made.items()}, with_it
    )


def test_edited_and_selected_gaussians_are_drawn_so_too(trained, monkeypatch, tmp_path):
    _, _, folder = trained
    plain = by_hand(folder, True)
    (tmp_path / "same.py").write_text(
        "def same(means, scales, quaternions, t):\n return means, scales, quaternions"
    )
    assert same(call(monkeypatch, folder, "--modify", f"{tmp_path}/same.py:same"), plain)
    # Points on a grid so fine that every Gaussian is close to one: nothing is left out.
    axis = torch.arange(-1.5, 1.5, 0.004)
    x, z = torch.meshgrid(axis, axis, indexing="ij")
    points = torch.stack([x.flatten(), torch.zeros(x.numel()), z.flatten()], 1)
    (tmp_path / "points").mkdir()
    for k in range(FRAMES):
        torch.save(points, tmp_path / "points" / f"{k:05d}.pt")
    assert same(call(monkeypatch, folder, "--mask_path", tmp_path / "points"), plain)


def begin(images, out, **options):
    values = {"num_pts": 150, "poly_degree": 3, "device": "cpu", "quiet": True, "given": frozenset(options)}
    options = TrainOptions(source_path=str(images), model_path=str(out), **{**values, **options})
    return Training.start(options, lambda _: None)


def test_evaluation_is_of_what_is_rendered(trained, tmp_path):
    images, seg, folder = trained
    more = {
        "pipeline": "joint",
        "seg_source_path": str(seg),
        "start_checkpoint": str(folder / "chkpnt12.pth"),
    }
    training = begin(images, tmp_path, iterations=20, **more)
    training.model = GaussianModel(checkpoint(folder, 12).params, training.model.time_func)
    wanted = by_hand(folder, True)
    for task, kind in zip(training.tasks, ("img", "mask"), strict=True):
        _, shown = evaluate(training.objective, task, 2)
        np.testing.assert_allclose(shown[0].numpy(), wanted[f"render_{kind}/00002_0.npy"], atol=5e-3)


def test_what_starts_from_a_model_goes_on_as_the_model_was_trained(trained, tmp_path, capsys):
    images, seg, folder = trained
    more = {
        "pipeline": "joint",
        "seg_source_path": str(seg),
        "start_checkpoint": str(folder / "chkpnt12.pth"),
    }
    resumed = begin(images, tmp_path, iterations=20, **more)
    assert resumed.iteration == 12 and resumed.options.antialiasing
    head = begin(
        seg,
        tmp_path,
        iterations=20,
        pipeline="seg",
        seg_head_only=True,
        start_checkpoint=more["start_checkpoint"],
    )
    assert head.iteration == 0 and head.options.antialiasing
    flags = ("--pipeline", "joint", "--seg_source_path", seg, "--start_checkpoint", more["start_checkpoint"])
    assert refused(images, tmp_path / "out", *flags, "--antialiasing", "False", "--iterations", 13) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--antialiasing False" in line and "has True; leave it out" in line
    assert not (tmp_path / "out").exists()


def test_a_resumed_run_is_the_run(trained, tmp_path):
    images, _, _ = trained
    flags = ("--densify_from_iter", 3, "--densification_interval", 4, "--ibfr_from_iter", 5)
    with threads(1):
        train_at(
            images, tmp_path / "a", *flags, "--antialiasing", "--iterations", 14, "--checkpoint_iterations", 9
        )
        start = ("--start_checkpoint", tmp_path / "a" / "chkpnt9.pth")
        train_at(images, tmp_path / "b", *flags, "--iterations", 14, *start)
    whole, second = (checkpoint(tmp_path / name, 14).params for name in "ab")
    assert all(torch.equal(whole[name], second[name]) for name in whole)


def test_recordings_count_the_pairs_of_one_blend(trained, tmp_path, monkeypatch):
    """So iterations are not recorded, even on a GPU."""
    images, _, _ = trained
    on_gpu = SimpleNamespace(device=torch.device("cuda"))
    monkeypatch.setattr("training.run.RecordedStep", lambda _: "recorded")
    for antialiasing in (False, True):
        training = begin(images, tmp_path, antialiasing=antialiasing)
        model, training.model = training.model, on_gpu
        training.tasks = [SimpleNamespace(frames=SimpleNamespace(levels=on_gpu))]
        assert (training.stepper() == "recorded") == (not antialiasing)
    counted = torch.zeros(1, dtype=torch.int32)
    views = [0.0], [False], [Render(0)], training.background
    with pytest.raises(ValueError, match="counted"):
        render(model, training.camera, *views, counted=counted, antialiasing=True)
