"""render.py as a user runs it, on small models made by hand and saved as checkpoints."""

import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import torch
from nibabel.affines import apply_affine
from PIL import Image, ImageSequence
from plyfile import PlyData
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

import prepare
import render
from gaussian_renderer import ACTIVE, editing, oracle
from patient.geometry import FrameCut, Geometry, cut_geometry
from scene.cameras import Camera
from scene.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from scene.gaussian_model import GaussianModel
from scene.parameters import IMAGE, SEGMENTATION
from utils.errors import UserError, run
from utils.images import read_image, to_unit, write_image
from utils.spherical_harmonics import from_colour, to_colour

WIDTH, HEIGHT, FRAMES = 40, 32, 4
CAMERA = Camera(WIDTH, HEIGHT)
EXAMPLE = Path(__file__).parents[1] / "examples" / "stretch.py"
# Two ways to compute an image in float32, with sums in different order; a level of an 8-bit image is 4e-3.
CLOSE = {"rtol": 0, "atol": 2e-4}


def gaussians(centres, scale, colour, opacity=0.9, m=0.5, sigma=100.0, velocity=(0.0, 0.0)):
    """Round Gaussians at ``centres`` (N, 2) with a path of degree 1; the same in all frames by default."""
    centres = torch.as_tensor(centres, dtype=torch.float32)
    n = len(centres)

    def column(value, *shape):
        return (
            torch.as_tensor(value, dtype=torch.float32).reshape(-1, 1).expand(n, 1).reshape(n, *shape).clone()
        )

    colour = torch.as_tensor(colour, dtype=torch.float32)
    return {
        "xyz": torch.stack([centres[:, 0], torch.zeros(n), centres[:, 1]], 1),
        "f_dc": from_colour(colour.reshape(1 if colour.ndim < 2 else n, 1, -1).expand(n, 1, -1).clone()),
        "f_rest": torch.zeros(n, 0, max(1, colour.shape[-1] if colour.ndim else 1)),
        "opacity": torch.logit(column(opacity, 1)),
        "scaling": torch.log(column(scale, 1)).repeat(1, 3),
        "rotation": torch.zeros(n, 1),
        "m": torch.logit(column(m, 1)),
        "sigma": torch.log(column(sigma, 1, 1)),
        "w1": -torch.tensor(velocity).expand(n, 2).clone(),
    }


def random_gaussians(n=60, channels=1, degree=2, seed=0):
    """Gaussians of all kinds, all over the frame and the sequence."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(shape, generator=generator)

    half = torch.tensor([CAMERA.half_width, 1.0, CAMERA.half_height])
    return {
        "xyz": uniform(-1, 1, n, 3) * half,
        "f_dc": uniform(-1.5, 1.5, n, 1, channels),
        "f_rest": torch.zeros(n, 0, channels),
        "opacity": uniform(-1, 3, n, 1),
        "scaling": torch.log(uniform(0.01, 0.08, n, 3)),
        "rotation": uniform(-2, 2, n, 1),
        "m": uniform(-2, 2, n, 1),
        "sigma": torch.log(uniform(0.1, 0.6, n, 1, 1)),
        "w1": uniform(-0.2, 0.2, n, 2 * degree),
    }


def with_head(params, seed=1):
    other = random_gaussians(len(params["xyz"]), params["f_dc"].shape[2], seed=seed)
    return {**params, **{f"{name}_seg": other[name] for name in ("f_dc", "f_rest", "opacity")}}


def save(folder, params, frames=FRAMES, iteration=7, bits=8, size=(WIDTH, HEIGHT), dff=False):
    """The checkpoint of a finished run, as train.py leaves it."""
    time_func = torch.linspace(-1, 1, frames - 1)[:, None] if dff else torch.full((frames,), 1 / frames)
    channels = params["f_dc"].shape[2]
    extras = {"width": size[0], "height": size[1], "distance": 1.0, "bits": bits}
    extras["background"] = torch.zeros(channels)
    path = Path(folder) / f"chkpnt{iteration}.pth"
    save_checkpoint(path, Checkpoint(iteration, params, time_func, 0, 1.1, extras=extras))
    return Path(folder)


def as_published(folder, iteration=7):
    """Removes from the checkpoint what other programs do not write."""
    path = Path(folder) / f"chkpnt{iteration}.pth"
    state, number = torch.load(path, weights_only=True)
    del state["medgs"]
    torch.save((state, number), path)


def source_frames(root, count=FRAMES, size=(WIDTH, HEIGHT), bits=8):
    for k in range(count):
        write_image(root / "original" / f"{k:04d}.png", np.full(size[::-1], k / 9), bits)
    return root


@pytest.fixture
def call(monkeypatch):
    """Runs render.py with these arguments."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["render.py", *map(str, arguments), "--device", "cpu"])
        render.main()

    return call


@pytest.fixture
def model(tmp_path):
    return save(tmp_path / "model", with_head(random_gaussians()))


def images(folder):
    """name -> values of all images of a folder."""
    return {path.name: read_image(path) for path in sorted(folder.iterdir())}


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def expected(folder, position, head=IMAGE, bit=ACTIVE):
    """The image (H, W, C) by the oracle."""
    saved = load_checkpoint(next(folder.glob("chkpnt*.pth")))
    model = GaussianModel(saved.params, saved.time_func)
    p = model.params
    with torch.no_grad():
        raw = p["xyz"], p["w1"], p["m"][:, 0], p["sigma"][:, 0, 0], p["scaling"], p["rotation"][:, 0]
        view = model.times([position]), torch.ones(1), CAMERA.pixels_per_unit, WIDTH, HEIGHT
        means2d, conics, _, active = oracle.fold(*raw, *view)
        colours = to_colour(model.raw_colours([head], CAMERA))
        looks = model.opacities([head]), colours, torch.zeros(1, model.channels)
        image, _ = oracle.blend(means2d, conics, active, *looks, [0], [0], [bit], WIDTH, HEIGHT)
    return image[0].permute(1, 2, 0).clamp(0, 1).numpy().squeeze()


# ---- images ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_frames_and_the_frames_between(tmp_path, call, channels):
    folder = save(tmp_path, random_gaussians(channels=channels))
    call("-m", folder, "--interp", 3, "--extension", ".npy")
    plain = images(folder / "render_img")
    call("-m", folder, "--interp", 3, "--extension", ".npy", "--beyond")
    made = images(folder / "render_img")
    assert list(plain) == list(made)[:-2], (
        "behind the last frame nothing was seen: drawn where it is asked for"
    )
    assert list(made) == [f"{k:05d}_{i}.npy" for k in range(FRAMES) for i in range(3)]
    for name in ("00000_0.npy", "00001_0.npy", "00002_1.npy", "00003_2.npy"):
        position = int(name[:5]) + int(name[6]) / 3
        np.testing.assert_allclose(made[name], expected(folder, position), **CLOSE)


def test_both_is_what_img_and_seg_are(model, call, capsys):
    arguments = "-m", model, "--extension", ".npy", "--quiet"
    call(*arguments, "--pipeline", "both")
    both = {name: images(model / name) for name in ("render_img", "render_mask")}
    for pipeline, name in (("img", "render_img"), ("seg", "render_mask")):
        call(*arguments, "--pipeline", pipeline)
        for file, image in images(model / name).items():
            # Rounding apart: an opacity's last bit may depend on its place in a vector of the processor.
            np.testing.assert_allclose(image, both[name][file], rtol=0, atol=2e-6)
    made = images(model / "render_mask")["00002_0.npy"]
    np.testing.assert_allclose(made, expected(model, 2, SEGMENTATION, 2), **CLOSE)
    assert "no segmentation head" not in capsys.readouterr().out


def test_masks_of_the_image_head_are_announced(tmp_path, call, capsys):
    folder = save(tmp_path, random_gaussians())
    call("-m", folder, "--pipeline", "seg", "--quiet", "--extension", ".npy")
    assert "no segmentation head: masks come from its image head" in capsys.readouterr().out
    np.testing.assert_allclose(
        images(folder / "render_mask")["00001_0.npy"], expected(folder, 1, IMAGE, 2), **CLOSE
    )


def test_masks_leave_out_what_is_too_thin(tmp_path, call):
    params = gaussians([[0, 0]], 0.1, 1.0)
    params["scaling"][:, 2] = math.log(1e-7)
    call("-m", save(tmp_path, params), "--pipeline", "both", "--quiet")
    assert images(tmp_path / "render_img")["00000_0.png"].max() > 100
    assert images(tmp_path / "render_mask")["00000_0.png"].max() == 0


@pytest.mark.parametrize("chunks", [2, 5, 1000])
def test_chunks_change_no_bit(model, call, chunks):
    arguments = "-m", model, "--interp", 5, "--pipeline", "both", "--quiet"
    call(*arguments)
    whole = contents(model / "render_img"), contents(model / "render_mask")
    call(*arguments, "--chunks", chunks)
    assert whole == (contents(model / "render_img"), contents(model / "render_mask"))


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("extension", [".png", ".tif", ".jpg", ".npy"])
def test_files_keep_the_depth_of_the_frames(tmp_path, call, capsys, bits, extension):
    folder = save(tmp_path, random_gaussians(), frames=2, bits=bits)
    call("-m", folder, "--extension", extension)
    made = images(folder / "render_img")
    assert list(made) == [f"0000{k}_0{extension}" for k in range(2)]
    dtype = {".npy": np.float32, ".jpg": np.uint8}.get(extension, np.uint8 if bits == 8 else np.uint16)
    full = {np.uint8: 255, np.uint16: 65535, np.float32: 1}[dtype]
    array = made["00000_0" + extension]
    assert array.dtype == dtype
    # A rounded level is off by at most half a level; JPEG adds its own error, about 3 levels of 255.
    tolerance = 0.04 if extension == ".jpg" else 0.5 / full + CLOSE["atol"]
    np.testing.assert_allclose(array / full, expected(folder, 0), rtol=0, atol=tolerance)
    assert ("JPEG holds 8 bits" in capsys.readouterr().out) == (extension == ".jpg" and bits == 16)


def test_images_of_an_earlier_render_do_not_stay_among_the_new(model, call, capsys):
    call("-m", model, "--interp", 4, "--beyond", "--quiet")
    for kept in ("00000_1.tif", "notes.txt", "overview.png"):
        (model / "render_img" / kept).write_text("mine")
    call("-m", model, "--interp", 2, "--beyond")
    names = {path.name for path in (model / "render_img").iterdir()}
    assert names == {f"{k:05d}_{i}.png" for k in range(FRAMES) for i in range(2)} | {
        "00000_1.tif",
        "notes.txt",
        "overview.png",
    }
    assert "8 of an earlier render removed" in capsys.readouterr().out


def test_a_file_that_cannot_be_written_ends_the_run(model, call, monkeypatch):
    def full(path, *_):
        if path.name == "00002_0.png":
            raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(render, "write_levels", full)
    with pytest.raises(OSError, match="No space"):
        call("-m", model, "--quiet")


def test_a_long_run_ends_soon_after_a_file_that_cannot_be_written(model, call, monkeypatch):
    tried = []

    def full(path, *_):
        tried.append(path.name)
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(render, "write_levels", full)
    monkeypatch.setattr(render, "WRITERS", 2)
    with pytest.raises(OSError, match="No space"):
        call("-m", model, "--quiet", "--interp", 20, "--chunks", 1000)
    assert len(tried) < 20, "of 80"


def test_the_oracle_needs_no_compiled_code(model, call, monkeypatch):
    call("-m", model, "--quiet", "--extension", ".npy")
    compiled = images(model / "render_img")
    monkeypatch.setitem(sys.modules, "diff_gaussian_rasterization", None)  # importing it fails
    arguments = "-m", model, "--quiet", "--extension", ".npy", "--rasterizer", "oracle"
    call(*arguments, "--generate_points_path", model / "points")
    for name, image in images(model / "render_img").items():
        np.testing.assert_allclose(image, compiled[name], **CLOSE)
    call(*arguments, "--mask_path", model / "points")
    with pytest.raises(UserError, match=r"--modify .* leave out --rasterizer oracle"):
        call(*arguments, "--modify", f"{EXAMPLE}:stretch")


# ---- options and checkpoints -----------------------------------------------------------------------------------------


def test_mistakes_end_in_one_line_before_anything_is_rendered(model, monkeypatch, capsys):
    save(model, random_gaussians(), iteration=30)
    for arguments, words in (
        (["--extension", ".gif"], r"--extension \.gif: images are written as \.png"),
        (["--iteration", "8"], r"holds no chkpnt8\.pth: there are iterations 7, 30"),
        (["--poly_degree", "5"], r"--poly_degree 5: .*chkpnt30\.pth has degree 2"),
        (["--mask_path", "nowhere"], r"--mask_path nowhere is not a folder"),
        (["--modify", "nowhere.py:f"], r"there is no file nowhere\.py"),
    ):
        monkeypatch.setattr(sys, "argv", ["render.py", "-m", str(model), *arguments])
        with pytest.raises(SystemExit) as exit:
            run(render.main)
        printed = capsys.readouterr()
        assert exit.value.code == 2
        assert re.fullmatch(f"render.py: error: .*{words}.*\n", printed.err)
        assert printed.out == ""
    assert not list(model.glob("render_*"))


def test_the_newest_checkpoint_unless_told_otherwise(model, call):
    save(model, random_gaussians(seed=5), iteration=30)
    call("-m", model, "--quiet")
    newest = contents(model / "render_img")
    call("-m", model, "--quiet", "--iteration", 7, "--poly_degree", 2)
    assert newest != contents(model / "render_img")
    call("-m", model, "--quiet", "--iteration", 30)
    assert newest == contents(model / "render_img")


def test_the_command_line_wins_over_the_run_and_the_run_over_defaults(tmp_path, call, capsys):
    folder = save(tmp_path, gaussians([[0.0, 0.0]], 0.05, 0.5))
    (folder / "cfg_args").write_text("Namespace(white_background=True, distance=9.0, source_path='/gone')")
    corner = lambda: images(folder / "render_img")["00000_0.png"][0, 0]  # noqa: E731
    call("-m", folder, "--quiet")
    assert corner() == 0, "our checkpoint holds the background"
    near = images(folder / "render_img")["00000_0.png"]
    call("-m", folder, "--quiet", "-w")
    assert corner() == 255
    call("-m", folder, "--distance", 2, "-s", "elsewhere")
    far = images(folder / "render_img")["00000_0.png"]
    assert 0 < far.sum(dtype=int) < 0.4 * near.sum(dtype=int), "twice as far away, a quarter of the area"
    assert "not needed: --source_path" in capsys.readouterr().out


@pytest.mark.parametrize("dff", [False, True])
def test_published_checkpoints_take_sizes_from_the_source_frames(tmp_path, call, dff):
    folder = save(tmp_path / "model", random_gaussians(), dff=dff)
    call("-m", folder, "--interp", 2, "--quiet")
    ours = contents(folder / "render_img")
    as_published(folder)
    root = source_frames(tmp_path / "data")
    (folder / "cfg_args").write_text(f"Namespace(source_path={str(root)!r}, images='images', use_dff=False)")
    call("-m", folder, "--interp", 2, "--quiet")
    assert contents(folder / "render_img") == ours
    call("-m", folder, "--quiet", "-s", source_frames(tmp_path / "deep", bits=16), "-r", 2)
    image = images(folder / "render_img")["00000_0.png"]
    assert (image.shape, image.dtype) == ((HEIGHT // 2, WIDTH // 2), np.uint16)


def test_published_checkpoints_without_their_frames(tmp_path, call):
    folder = save(tmp_path / "model", random_gaussians())
    as_published(folder)
    with pytest.raises(
        UserError, match=r"does not hold the frames' size, and no data root is known: give -s ROOT"
    ):
        call("-m", folder)
    with pytest.raises(UserError, match=r"and .*gone/original is not a folder: give -s ROOT"):
        call("-m", folder, "-s", tmp_path / "gone")
    with pytest.raises(UserError, match=r"has 3 frames, .*chkpnt7.pth was trained on 4: give -s"):
        call("-m", folder, "-s", source_frames(tmp_path / "data", count=3))


def test_the_geometry_of_the_source_frames_is_kept_beside_the_renders(tmp_path, call):
    folder = save(tmp_path / "model", random_gaussians())
    as_published(folder)
    root = source_frames(tmp_path / "data" / "img")
    geometry = cut_geometry(
        FrameCut((0, 1, 2), (False, False)),
        np.eye(4),
        (WIDTH, HEIGHT, FRAMES),
        window=(0.0, 1.0),
        bits=8,
        source="scan",
    )
    geometry.save(root.parent / "frames.json")
    call("-m", folder, "-s", root, "--quiet")
    assert geometry == geometry.load(folder / "frames.json")


# ---- points and masks ------------------------------------------------------------------------------------------------


def test_points_are_the_active_centres_of_every_frame(tmp_path, call):
    moving = gaussians([[0.1, -0.1], [0.0, 0.2]], 0.05, 0.5, m=0.25, velocity=(0.2, -0.1))
    passing = gaussians([[0.3, 0.0]], 0.05, 0.5, m=0.75, sigma=0.05)
    thin = gaussians([[-0.2, 0.0]], 1e-7, 0.5)
    params = {name: torch.cat([moving[name], passing[name], thin[name]]) for name in moving}
    folder, points = save(tmp_path / "model", params), tmp_path / "points"
    (points / "means3Dmasked").mkdir(parents=True)
    torch.save(torch.zeros(3, 3), points / "means3Dmasked" / "00004.pt")  # of a longer sequence
    call("-m", folder, "--generate_points_path", points, "--interp", 2, "--beyond", "--quiet")
    files = sorted((points / "means3Dmasked").iterdir())
    assert [file.name for file in files] == [f"{k:05d}.pt" for k in range(FRAMES)]
    assert len(images(folder / "render_img")) == 2 * FRAMES, "images are written too"
    for k, file in enumerate(files):
        t = k / FRAMES
        shift = [0.2 * (t - 0.25), 0.0, -0.1 * (t - 0.25)]
        centres = [[0.1 + shift[0], 0, -0.1 + shift[2]], [shift[0], 0, 0.2 + shift[2]]]
        centres += [[0.3, 0, 0]] if k == 3 else []
        found = torch.load(file, weights_only=True)
        torch.testing.assert_close(found, torch.tensor([*centres, [-0.2, 0.0, 0.0]]))
        assert (found[:, 1] == 0).all()
    call("-m", folder, "--pipeline", "seg", "--generate_points_path", points, "--quiet")
    assert [len(torch.load(file, weights_only=True)) for file in files] == [2, 2, 2, 3], "too thin for masks"


def save_points(folder, *frames):
    folder.mkdir(parents=True, exist_ok=True)
    for k, points in enumerate(frames):
        torch.save(torch.as_tensor(points, dtype=torch.float32).reshape(-1, 3), folder / f"{k:05d}.pt")
    return folder


def test_near_follows_its_definition(tmp_path):
    rng = np.random.default_rng(0)
    points, means = (rng.uniform(0, 0.05, (n, 3)) * [1, 0, 1] for n in (80, 500))
    near = editing.PointMask(save_points(tmp_path, points), 1).near(torch.tensor(means), 0)
    order = np.argsort(np.linalg.norm(means[:, None] - points.astype(np.float32), axis=2), axis=1)
    middles = points.astype(np.float32)[order[:, 1:10]].mean(1)
    expected = np.linalg.norm(means - middles, axis=1) < 0.005
    assert near.numpy().tolist() == expected.tolist()
    assert 50 < expected.sum() < 450


@pytest.mark.parametrize(("count", "drawn"), [(0, False), (10, False), (11, True)])
def test_fewer_than_11_points_draw_nothing(tmp_path, call, count, drawn):
    folder = save(tmp_path / "model", gaussians([[0.0, 0.0]], 0.05, 1.0), frames=2)
    points = save_points(tmp_path / "points", *[np.zeros((count, 3))] * 2)
    call("-m", folder, "--mask_path", points, "--quiet")
    assert (images(folder / "render_img")["00001_0.png"].max() > 0) == drawn


def test_in_between_frames_are_masked_by_the_points_of_both_neighbours(tmp_path, call):
    left, right = np.tile([-0.2, 0, 0], (11, 1)), np.tile([0.2, 0, 0], (11, 1))
    folder = save(tmp_path / "model", gaussians([[-0.2, 0.0], [0.2, 0.0]], 0.03, 1.0), frames=2)
    masked = "--mask_path", save_points(tmp_path / "points", left, right)
    call("-m", folder, *masked, "--interp", 2, "--beyond", "--quiet")
    halves = {
        name: (image[:, : WIDTH // 2].max() > 100, image[:, WIDTH // 2 :].max() > 100)
        for name, image in images(folder / "render_img").items()
    }
    assert halves == {
        "00000_0.png": (True, False),
        "00000_1.png": (True, True),
        "00001_0.png": (False, True),
        "00001_1.png": (False, True),  # there is no frame after the last
    }


def grid(spacing, half_width, half_height):
    """Points (N, 2) on a grid."""
    axes = (torch.arange(-half, half + spacing / 2, spacing) for half in (half_width, half_height))
    return torch.cartesian_prod(*axes)


@pytest.mark.parametrize("modified", [False, True])
def test_a_segmentation_cuts_an_organ_out_of_an_image(tmp_path, call, modified):
    """The points of a model of masks choose among the Gaussians of a model of images."""
    organ, radius = torch.tensor([0.06, -0.03]), 0.12
    everywhere = grid(0.01, CAMERA.half_width, CAMERA.half_height)
    shades = 0.3 + 0.6 * torch.rand(len(everywhere), 1, generator=torch.Generator().manual_seed(0))
    image_model = save(tmp_path / "image", gaussians(everywhere, 0.008, shades))
    dense = grid(0.003, CAMERA.half_width, CAMERA.half_height)
    dense = dense[(dense - organ).norm(dim=1) < radius]
    mask_model = save(tmp_path / "mask", gaussians(dense, 0.004, 1.0))

    call("-m", mask_model, "--pipeline", "seg", "--generate_points_path", tmp_path / "organ", "--quiet")
    call("-m", image_model, "--quiet", "--extension", ".npy")
    whole = images(image_model / "render_img")["00001_0.npy"]
    (tmp_path / "same.py").write_text(
        "def same(means, scales, quaternions, t):\n return means, scales, quaternions"
    )
    modify = ["--modify", f"{tmp_path}/same.py:same"] if modified else []
    call("-m", image_model, "--mask_path", tmp_path / "organ", "--quiet", "--extension", ".npy", *modify)
    cut = images(image_model / "render_img")["00001_0.npy"]

    v, u = np.mgrid[:HEIGHT, :WIDTH]
    x = (u - (WIDTH - 1) / 2) / CAMERA.pixels_per_unit
    z = -(v - (HEIGHT - 1) / 2) / CAMERA.pixels_per_unit
    distance = np.hypot(x - organ[0].item(), z - organ[1].item())
    # With the low-pass of 0.3 px^2 a scale of 0.008 is one of 0.0127, seen up to 3.3 times as far: 0.042. The mask
    # reaches 0.005 beyond its points.
    inside, outside = distance < radius - 0.05, distance > radius + 0.05
    np.testing.assert_allclose(cut[inside], whole[inside], **CLOSE)
    assert whole[outside].min() > 0.1
    assert cut[outside].max() == 0
    assert inside.sum() > 30


def test_masks_that_do_not_fit(tmp_path, model, call):
    def refused(words):
        with pytest.raises(UserError, match=words):
            call("-m", model, "--mask_path", tmp_path / "points", "--quiet")

    refused(r"points is not a folder: give the one of --generate_points_path")
    points = save_points(tmp_path / "points" / "means3Dmasked", *[np.zeros((11, 3))] * 3)
    refused(r"means3Dmasked has the points of 3 frames \(\*.pt\), the model has 4 frames")
    assert not (model / "render_img").exists()
    for content, words in (
        (torch.zeros(5, 2), r"00003.pt holds \(5, 2\), not points of shape \(M, 3\)"),
        ({"means": torch.zeros(5, 3)}, r"00003.pt holds dict, not points"),
        (torch.full((20, 3), torch.nan), r"00003.pt holds values that are not finite floats"),
    ):
        torch.save(content, points / "00003.pt")
        refused(words)
    (points / "00003.pt").write_bytes(b"nothing")
    refused(r"00003.pt is damaged, or not a tensor")


# ---- a user's function -----------------------------------------------------------------------------------------------


def function(folder, body, header=""):
    """FILE.py:FUNCTION of a function with this body."""
    path = folder / "change.py"
    path.write_text(f"import torch\n{header}\ndef change(means, scales, quaternions, t):\n {body}\n")
    return f"{path}:change"


@pytest.mark.parametrize("channels", [1, 3])
def test_a_function_that_changes_nothing_gives_the_same_images(tmp_path, call, channels):
    folder = save(tmp_path, with_head(random_gaussians(channels=channels)))
    arguments = "-m", folder, "--interp", 2, "--pipeline", "both", "--quiet", "--extension", ".npy"
    call(*arguments)
    plain = {name: images(folder / name) for name in ("render_img", "render_mask")}
    call(*arguments, "--modify", function(tmp_path, "return means, scales, quaternions"))
    for name, before in plain.items():
        for file, image in images(folder / name).items():
            np.testing.assert_allclose(image, before[file], **CLOSE)


def test_the_function_gets_all_gaussians_at_the_time(tmp_path, call):
    here = gaussians([[0.1, -0.1]], 0.05, 0.5, m=0.5, sigma=0.25, velocity=(0.2, 0.4))
    never = gaussians([[0.2, 0.0]], 0.03, 0.5, m=0.999, sigma=0.001)
    params = {name: torch.cat([here[name], never[name]]) for name in here}
    params["rotation"][0] = torch.logit(torch.tensor(1 / 12))  # of a turn: 30 degrees
    folder = save(tmp_path, params, frames=2)
    body = f"torch.save((means, scales, quaternions, t), f'{tmp_path}/{{t:.2f}}.pt'); return means, scales, quaternions"
    call("-m", folder, "--interp", 2, "--beyond", "--quiet", "--modify", function(tmp_path, body))
    assert {path.name for path in tmp_path.glob("0.*.pt")} == {f"{t:.2f}.pt" for t in (0, 0.25, 0.5, 0.75)}
    means, scales, quaternions, t = torch.load(tmp_path / "0.25.pt", weights_only=True)
    assert t == 0.25
    torch.testing.assert_close(means, torch.tensor([[0.1 - 0.2 / 4, 0, -0.1 - 0.4 / 4], [0.2, 0, 0]]))
    weight = math.exp(-0.5)  # a spread away from its centre in time
    torch.testing.assert_close(scales[0], torch.tensor([0.05 * weight, 1e-8, 0.05 * weight]))
    turn = math.radians(30) / 2
    torch.testing.assert_close(quaternions[0], torch.tensor([math.cos(turn), 0, math.sin(turn), 0]))
    assert not images(folder / "render_img")["00000_1.png"][:, WIDTH * 3 // 4 :].any(), (
        "inactive ones are not drawn"
    )


def test_activity_is_decided_before_the_function(tmp_path, call):
    folder = save(tmp_path, gaussians([[3.0, 0.0]], 0.05, 1.0))
    call("-m", folder, "--quiet")
    assert not images(folder / "render_img")["00000_0.png"].any(), "far outside the frame"
    call(
        "-m", folder, "--quiet", "--modify", function(tmp_path, "return 0 * means, scales / 100, quaternions")
    )
    assert images(folder / "render_img")["00000_0.png"].any(), "brought into it"


def test_depth_decides_where_the_plane_is_left(tmp_path, call):
    params = gaussians([[0.0, 0.0], [0.0, 0.0]], 0.1, [[0.2], [0.8]], opacity=0.99)
    folder = save(tmp_path, params)
    middle = HEIGHT // 2, WIDTH // 2

    def brightness(*modify):
        call("-m", folder, "--quiet", *modify)
        return images(folder / "render_img")["00000_0.png"][middle]

    lift = function(tmp_path, "means[1, 1] = -0.1; return means, scales, quaternions")
    assert brightness() < 60, "the first in the list is in front"
    assert brightness("--modify", lift) > 195, "the second came nearer"


def test_the_example_stretches_along_the_columns(tmp_path, call):
    """A stretched image is the image of the stretched Gaussians: seen on ellipses of several angles, well apart."""
    n = 4
    params = gaussians([[-0.12, 0.1], [-0.04, -0.1], [0.05, 0.1], [0.13, -0.1]], 0.02, 1.0, opacity=0.6)
    params["scaling"] = torch.log(torch.tensor([0.035, 1.0, 0.015])).repeat(n, 1)
    params["rotation"] = torch.logit(torch.tensor([0.02, 0.1, 0.2, 0.35]))[:, None]
    size = 240, 160
    folder = save(tmp_path, params, frames=1, size=size)
    call("-m", folder, "--quiet", "--extension", ".npy")
    plain = images(folder / "render_img")["00000_0.npy"]
    call("-m", folder, "--quiet", "--extension", ".npy", "--modify", f"{EXAMPLE}:stretch")
    stretched = images(folder / "render_img")["00000_0.npy"]
    centre, columns = (size[0] - 1) / 2, np.arange(size[0])
    at = centre + (columns - centre) / 1.3
    resampled = np.stack([np.interp(at, columns, row) for row in plain])
    # The low-pass of 0.3 px^2 is not stretched, against variances of 25 px^2 and more: a peak of 0.6 changes by 1 %.
    np.testing.assert_allclose(stretched, resampled, rtol=0, atol=0.012)
    assert stretched.max() > 0.5


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("return means", r"returned Tensor, not means, scales and quaternions"),
        ("return means, scales, None", r"returned quaternions as NoneType, not as a tensor"),
        ("return means[:5], scales, quaternions", r"returned means of shape \(5, 3\), not \(60, 3\)"),
        ("return means, scales, quaternions[:, :3]", r"quaternions of shape \(60, 3\), not \(60, 4\)"),
        ("return means / 0, scales, quaternions", r"means with values that are not finite floats"),
        ("return means.long(), scales, quaternions", r"means with values that are not finite floats"),
        ("return means, -scales, quaternions", r"scales below 0"),
        ("return means, scales, 0 * quaternions", r"quaternions that are 0"),
        ("return means @ scales, scales, quaternions", r"failed at t = 0: RuntimeError: .*\(change.py:4\)"),
        ("return missing", r"failed at t = 0: NameError: name 'missing' is not defined \(change.py:4\)"),
    ],
)
def test_what_a_function_must_not_do(tmp_path, model, call, body, words):
    source = function(tmp_path, body)
    with pytest.raises(UserError, match=words) as refused:
        call("-m", model, "--quiet", "--modify", source)
    assert source in str(refused.value)


def test_files_without_the_function(tmp_path, model, call):
    source = function(tmp_path, "return means, scales, quaternions", header="number = 1")
    for name, words in (("other", r"change.py defines no function other"), ("number", r"no function number")):
        with pytest.raises(UserError, match=words):
            call("-m", model, "--modify", source.replace(":change", f":{name}"))
    for header in ("import nothing_of_that_name", "def f(:"):
        with pytest.raises(UserError, match=r"change.py cannot be run: (ModuleNotFound|Syntax)Error"):
            call("-m", model, "--modify", function(tmp_path, "return 1", header))


# ---- a volume --------------------------------------------------------------------------------------------------------


def turned(*degrees):
    """A rotation about x, y and z."""
    out = np.eye(3)
    for axis, angle in enumerate(np.radians(degrees)):
        i, j = (other for other in range(3) if other != axis)
        turn = np.eye(3)
        turn[[i, j], [i, j]], turn[i, j], turn[j, i] = math.cos(angle), -math.sin(angle), math.sin(angle)
        out = out @ turn
    return out


AFFINES = {
    "straight": np.diag([0.8, 0.9, 3.0]),
    "flipped": np.diag([-0.8, 0.9, -3.0]),
    "oblique": turned(10, -25, 40) @ np.diag([0.8, -0.9, 3.0]),
    "permuted and oblique": turned(3, 8, -5) @ np.diag([0.8, 0.9, 3.0])[:, [2, 0, 1]],
}


def source_volume(folder, affine, shape=(14, 11, 6)):
    """A NIfTI volume of noise, its label, and what prepare.py makes of them: (volume, OUT)."""
    rng = np.random.default_rng(0)
    placed = np.eye(4)
    placed[:3, :3], placed[:3, 3] = affine, (12.0, -30.0, 55.0)
    values = rng.normal(100, 300, shape).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(values, placed), folder / "source.nii")
    label = (rng.random(shape) > 0.5).astype(np.uint8)
    nibabel.save(nibabel.Nifti1Image(label, placed), folder / "label.nii")
    return nibabel.load(folder / "source.nii"), nibabel.load(folder / "label.nii")


class FromFrames:
    """In place of a model: the frames themselves, and the blend of two between them."""

    def __init__(self, root):
        self.stacks = [
            torch.stack(
                [
                    torch.from_numpy(to_unit(read_image(f)))
                    for f in sorted((root / kind / "original").iterdir())
                ]
            )
            for kind in ("img", "seg")
        ]

    def __call__(self, renderer, positions):
        out = []
        for stack in self.stacks[: len(renderer.outputs)]:
            low = [min(int(p), len(stack) - 1) for p in positions]
            high = [min(k + 1, len(stack) - 1) for k in low]
            share = torch.tensor([p - k for p, k in zip(positions, low, strict=True)]).view(-1, 1, 1)
            out.append(torch.lerp(stack[low], stack[high], share.float())[:, None])
        return torch.stack(out)


def model_of(folder, root):
    """A model folder of the frames of prepare.py, as train.py would leave it."""
    geometry = Geometry.load(root / "frames.json")
    save(folder, with_head(random_gaussians(n=5)), frames=len(geometry.slices), size=geometry.size, bits=16)
    geometry.save(folder / "frames.json")
    return folder


def ras_grid(image):
    """(I, J, K, 3), positions of the voxels."""
    return apply_affine(image.affine, np.stack(np.meshgrid(*map(np.arange, image.shape), indexing="ij"), -1))


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("name", AFFINES)
def test_the_volume_lies_on_its_source(tmp_path, call, monkeypatch, name, axis):
    source, label = source_volume(tmp_path, AFFINES[name])
    arguments = ["-i", tmp_path / "source.nii", "-l", tmp_path / "label.nii", "-o", tmp_path / "case"]
    arguments += ["--axis", axis, "--window", -400, 500, "--quiet"]
    assert prepare.main(list(map(str, arguments))) == 0
    folder, frames = model_of(tmp_path / "model", tmp_path / "case"), FromFrames(tmp_path / "case")
    monkeypatch.setattr(render.Renderer, "__call__", lambda self, positions: frames(self, positions))
    call("-m", folder, "--interp", 3, "--pipeline", "both", "--nifti", "--quiet")

    image, mask = (nibabel.load(folder / f"render_{kind}.nii.gz") for kind in ("img", "mask"))
    expected = list(source.shape)
    expected[axis] = 3 * (expected[axis] - 1) + 1  # up to the last slice: beyond it nothing was seen
    assert image.shape == mask.shape == tuple(expected)
    each = [slice(None)] * 3
    each[axis] = slice(None, None, 3)
    each = tuple(each)
    # Micrometres: the header holds float32.
    for volume in (image, mask):
        np.testing.assert_allclose(ras_grid(volume)[each], ras_grid(source), atol=1e-3)
    step = 900 / 65535
    found, truth = image.get_fdata(), source.get_fdata().clip(-400, 500)
    np.testing.assert_allclose(found[each], truth, rtol=0, atol=1.01 * step)
    between = [slice(None)] * 3
    between[axis] = slice(1, None, 3)
    blend = (2 * np.delete(truth, -1, axis) + np.delete(truth, 0, axis)) / 3
    np.testing.assert_allclose(found[tuple(between)], blend, rtol=0, atol=2.01 * step)
    assert mask.get_data_dtype() == np.uint8 and np.array_equal(mask.get_fdata()[each], label.get_fdata())
    assert image.header.get_xyzt_units()[0] == "mm"
    assert image.header["sform_code"] == image.header["qform_code"] == 1
    np.testing.assert_allclose(image.get_qform(), image.affine, atol=1e-3)


def nifti_case(tmp_path, **changes):
    """A random model of 4 frames of a volume, its geometry changed."""
    folder = save(tmp_path / "model", with_head(random_gaussians()))
    affine = np.diag([0.5, 0.5, 2.0, 1.0])
    cut = FrameCut((0, 1, 2), (True, True))
    geometry = cut_geometry(
        cut, affine, (WIDTH, HEIGHT, FRAMES), window=(-100.0, 300.0), bits=8, source="scan"
    )
    replace(geometry, **changes).save(folder / "frames.json")
    return folder, replace(geometry, **changes)


def test_the_volume_holds_what_the_images_show(tmp_path, call):
    folder, _ = nifti_case(tmp_path)
    call("-m", folder, "--interp", 2, "--pipeline", "both", "--nifti", "--quiet")
    volume = nibabel.load(folder / "render_img.nii.gz").get_fdata()
    mask = nibabel.load(folder / "render_mask.nii.gz").get_fdata()
    assert volume.shape == mask.shape == (WIDTH, HEIGHT, 7)
    for slot in range(7):
        name = f"{slot // 2:05d}_{slot % 2}.png"
        frame = (
            read_image(folder / "render_img" / name)[::-1, ::-1].T / 255
        )  # columns and rows run against i and j
        np.testing.assert_allclose((volume[:, :, slot] + 100) / 400, frame, rtol=0, atol=0.51 / 255)
        level = read_image(folder / "render_mask" / name)[::-1, ::-1].T
        clear = level != 127  # 126.5 to 127.5 may be either
        assert np.array_equal(mask[:, :, slot][clear], (level >= 128)[clear])


def test_a_volume_of_smaller_renders_covers_the_same_field(tmp_path, call):
    folder, geometry = nifti_case(tmp_path, size=(2 * WIDTH, 2 * HEIGHT))
    call("-m", folder, "--nifti", "--quiet")
    image = nibabel.load(folder / "render_img.nii.gz")
    corner = apply_affine(image.affine, [[WIDTH - 0.5, HEIGHT - 0.5, 0], [-0.5, -0.5, 3]])
    expected = geometry.to_patient(np.array([[-0.5, -0.5, 0], [2 * WIDTH - 0.5, 2 * HEIGHT - 0.5, 3]]))
    np.testing.assert_allclose(corner, expected, atol=1e-4)


def test_a_volume_of_uneven_frames_has_even_slices(tmp_path, call, capsys):
    """Frames at 0, 2, 6 and 7 mm, two images each: slices every half millimetre, drawn at their positions."""
    folder, _ = nifti_case(
        tmp_path,
        slices=(0, 1, 3, 4),
        positions=(0.0, 2.0, 6.0, 7.0),
        affine=((-0.5, 0, 0, 20), (0, -0.5, 0, 16), (0, 0, 7 / 3, 5), (0, 0, 0, 1)),
    )
    call("-m", folder, "--interp", 2, "--beyond", "--nifti", "--extension", ".npy")
    assert "unevenly spaced: slices are drawn at even steps" in capsys.readouterr().out
    image = nibabel.load(folder / "render_img.nii.gz")
    assert image.shape == (WIDTH, HEIGHT, 15) and image.affine[2].tolist() == [0, 0, 0.5, 5]
    values = (image.get_fdata() + 100) / 400
    assert len(images(folder / "render_img")) == 2 * FRAMES, "the images stay as they were asked for"
    for slot, position in ((0, 0), (2, 0.5), (4, 1), (6, 1.25), (11, 1.875), (12, 2), (13, 2.5), (14, 3)):
        shown = expected(folder, position)[::-1, ::-1].T
        np.testing.assert_allclose(values[:, :, slot], shown, rtol=0, atol=CLOSE["atol"] + 1 / 65535)


def test_a_tilted_gantry_is_a_shear(tmp_path, call):
    tilted = ((-0.5, 0, 0, 20), (0, -0.5, 0.7, 16), (0, 0, 2, 5), (0, 0, 0, 1))
    folder, geometry = nifti_case(tmp_path, affine=tilted)
    call("-m", folder, "--interp", 4, "--nifti", "--quiet")
    image = nibabel.load(folder / "render_img.nii.gz")
    np.testing.assert_allclose(
        apply_affine(image.affine, [WIDTH - 4, HEIGHT - 6, 8]),
        geometry.to_patient(np.array([3.0, 5, 2])),
        atol=1e-4,
    )
    assert image.header["sform_code"] == 1 and image.header["qform_code"] == 0


def test_volumes_that_have_no_place(tmp_path, call):
    folder = save(tmp_path / "plain", random_gaussians())
    with pytest.raises(UserError, match=r"--nifti: there is no .*frames.json to say where the frames lie"):
        call("-m", folder, "--nifti", "--quiet")
    folder, geometry = nifti_case(tmp_path, affine=None)
    with pytest.raises(UserError, match=r"--nifti: scan had no affine"):
        call("-m", folder, "--nifti", "--quiet")
    replace(geometry, slices=(0, 1, 2), positions=(0.0, 1.0, 2.0)).save(folder / "frames.json")
    with pytest.raises(UserError, match=r"is for 3 frames, the model for 4"):
        call("-m", folder, "--nifti", "--quiet")
    folder, _ = nifti_case(tmp_path)
    with pytest.raises(UserError, match=r"--nifti: 60001 slices are more than the 32767 .* smaller --interp"):
        call("-m", folder, "--nifti", "--quiet", "--interp", 20000)
    save(folder, random_gaussians(channels=3))
    with pytest.raises(UserError, match=r"--nifti: .* colour model"):
        call("-m", folder, "--nifti", "--quiet")
    assert not (folder / "render_img").exists()


def test_a_volume_that_cannot_be_written_leaves_the_earlier_one(tmp_path, call, monkeypatch):
    folder, _ = nifti_case(tmp_path)
    call("-m", folder, "--nifti", "--quiet")
    before = (folder / "render_img.nii.gz").read_bytes()

    def full(self, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(nibabel.Nifti1Image, "to_stream", full)
    with pytest.raises(OSError, match="No space"):
        call("-m", folder, "--nifti", "--quiet", "--interp", 2)
    assert (folder / "render_img.nii.gz").read_bytes() == before
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


# ---- a video ---------------------------------------------------------------------------------------------------------


def shots_of(path):
    """The images of an MP4 or GIF as arrays (H, W, 3), and the frame rate."""
    if path.suffix == ".mp4":
        reader = pytest.importorskip("imageio_ffmpeg").read_frames(str(path))
        about = next(reader)
        width, height = about["size"]
        return [np.frombuffer(shot, np.uint8).reshape(height, width, 3) for shot in reader], about["fps"]
    with Image.open(path) as image:
        shots, spent = [], 0
        for shot in ImageSequence.Iterator(image):
            shots.append(np.asarray(shot.convert("RGB")))
            spent += shot.info["duration"]
        return shots, 1000 * len(shots) / spent


@pytest.mark.parametrize("kind", ["mp4", "gif"])
@pytest.mark.parametrize("pipeline", ["img", "both"])
def test_a_video_shows_the_sequence_and_marks_the_input(model, call, capsys, kind, pipeline):
    if kind == "mp4":
        pytest.importorskip("imageio_ffmpeg")
    call("-m", model, "--interp", 3, "--pipeline", pipeline, "--video", 20, "--video_format", kind)
    path = model / f"render_{pipeline}.{kind}"
    assert f"10 images, 0.5 s, in {path}" in capsys.readouterr().out
    shots, rate = shots_of(path)
    assert len(shots) == 3 * (FRAMES - 1) + 1 and rate == pytest.approx(20)
    height, width, _ = shots[0].shape
    side = height - 44  # the margin
    assert (width > 2 * side) == (pipeline == "both") and width % 2 == height % 2 == 0
    for k, shot in enumerate(shots):
        margin = shot[side:].astype(int)
        orange = ((margin[:, :, 0] - margin[:, :, 2]) > 80).sum()
        assert (orange > 100) == (k % 3 == 0), "input frames are marked"
        # The picture is the render, enlarged: the mean survives that, and coding changes it little.
        rendered = read_image(model / "render_img" / f"{k // 3:05d}_{k % 3}.png")
        assert shot[:side, :480].mean() == pytest.approx(rendered.mean(), abs=4)


def test_pixels_of_a_video_are_square(tmp_path, call):
    folder, _ = nifti_case(tmp_path, affine=((-0.5, 0, 0, 0), (0, -1.5, 0, 0), (0, 0, 2, 0), (0, 0, 0, 1)))
    call("-m", folder, "--video", "--video_format", "gif", "--quiet")
    shots, rate = shots_of(folder / "render_img.gif")
    height, width, _ = shots[0].shape
    assert (height - 44) / width == pytest.approx(3 * HEIGHT / WIDTH, rel=0.01)
    assert rate == pytest.approx(15, rel=0.02)  # the default, in hundredths of a second


@pytest.mark.parametrize(("extension", "channels"), [(".npy", 1), (".tif", 3)])
def test_a_video_of_other_files(tmp_path, call, extension, channels):
    folder = save(tmp_path, random_gaussians(channels=channels), bits=16)
    call("-m", folder, "--video", 10, "--video_format", "gif", "--extension", extension, "--quiet")
    shots, _ = shots_of(folder / "render_img.gif")
    assert len(shots) == FRAMES and shots[0][:-50].std() > 5


def test_without_ffmpeg_there_is_a_gif(model, call, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)  # importing it raises ImportError
    call("-m", model, "--video")
    assert (model / "render_img.gif").exists() and "pip install imageio-ffmpeg" in capsys.readouterr().out
    with pytest.raises(
        UserError, match=r"--video_format mp4 needs imageio-ffmpeg: pip install imageio-ffmpeg"
    ):
        call("-m", model, "--video", "--video_format", "mp4")
    monkeypatch.delitem(sys.modules, "imageio_ffmpeg")
    pytest.importorskip("imageio_ffmpeg")
    call("-m", model, "--video", "--quiet")
    assert (model / "render_img.mp4").exists()


# ---- speed and memory ------------------------------------------------------------------------------------------------


def test_views_at_once_follow_the_chunks_and_the_memory():
    renderer = SimpleNamespace(
        camera=CAMERA, model=GaussianModel(random_gaussians(), torch.ones(4)), outputs=[0]
    )
    assert render.views_at_once(renderer, 100, 1) == 64  # the most that the rasteriser draws per call
    assert [render.views_at_once(renderer, 100, chunks) for chunks in (3, 10, 30, 1000)] == [34, 10, 4, 1]
    renderer.outputs = [0, 1]
    assert render.views_at_once(renderer, 100, 1) == 32
    renderer.camera = Camera(4000, 4000)
    assert render.views_at_once(renderer, 100, 1) == 2  # 2 GiB of images would be 4
    renderer.camera = Camera(40000, 40000)
    assert render.views_at_once(renderer, 100, 1) == 1


# Not getrusage: its peak includes the process that started this one, before exec.
PEAK = """
import re, sys
import render

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])

sys.argv = ["render.py", *sys.argv[1:], "--device", "cpu", "--quiet"]
before = peak()
render.main()
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_more_chunks_take_less_memory(tmp_path):
    """The peak beyond what the program itself takes: at 64 views, at 16 and at 4, 100 000 Gaussians each."""
    params = random_gaussians(100_000)
    params["scaling"] = params["scaling"] - 2  # small ones: the lists of the tiles stay short
    folder = save(tmp_path, params, frames=16)

    def peak(chunks):
        arguments = ["-m", folder, "--interp", 4, "--chunks", chunks]
        run = subprocess.run(
            [sys.executable, "-c", PEAK, *map(str, arguments)], capture_output=True, text=True, check=True
        )
        return int(run.stdout)

    one, four, sixteen = peak(1), peak(4), peak(16)
    assert four < 0.6 * one and sixteen < 0.6 * four, (one, four, sixteen)


# ---- to the mesh -----------------------------------------------------------------------------------------------------


def test_masks_between_frames_make_one_closed_surface(tmp_path, call):
    """A ball of 12 frames, each a disc that fades into its neighbours, rendered 8 times as densely and meshed."""
    frames, radius, centre = 12, 0.15, (0.03, -0.02)
    spacing = 2 * radius / 8  # plane units per frame: the ball is 8 frames high
    heights = (torch.arange(frames) - 5.5) * spacing
    inside = heights.abs() < radius
    discs = (radius**2 - heights[inside] ** 2).sqrt()
    m = torch.arange(frames)[inside] / frames
    params = gaussians(
        torch.tensor(centre).repeat(len(discs), 1), discs / 1.25, 1.0, opacity=0.97, m=m, sigma=0.9 / frames
    )
    folder = save(tmp_path / "ball", params, frames=frames)
    call("-m", folder, "--pipeline", "seg", "--interp", 8, "--quiet")
    program = Path(render.__file__).with_name("slices_to_ply.py")
    arguments = ["-i", folder, "-o", tmp_path, "--quiet", "--thresh", "127.5"]
    subprocess.run([sys.executable, program, *map(str, arguments)], check=True)
    mesh = PlyData.read(tmp_path / "ball.ply")
    vertices = np.stack([mesh["vertex"][name] for name in "xyz"], 1).astype(np.float64)
    triangles = np.stack(mesh["face"][mesh["face"].properties[0].name])

    edges = np.concatenate([triangles[:, [0, 1]], triangles[:, [1, 2]], triangles[:, [2, 0]]])
    directed = edges.astype(np.int64) @ [2**31, 1]
    assert len(np.unique(directed)) == len(directed)
    assert set(directed) == set(edges.astype(np.int64) @ [1, 2**31]), "each edge has its twin: watertight"
    graph = coo_array((np.ones(len(edges)), edges.T), shape=(len(vertices), len(vertices)))
    assert connected_components(graph, directed=False)[0] == 1
    # Half-axes: radius, radius, 4 frames. Discs that fade into each other change it somewhat.
    voxels = 4 / 3 * math.pi * (radius * CAMERA.pixels_per_unit) ** 2 * 4 * 8
    first, second, third = vertices[triangles].transpose(1, 0, 2)
    volume = np.einsum("ij,ij->", first, np.cross(second, third)) / 6  # positive: triangles face outwards
    assert volume == pytest.approx(voxels, rel=0.25)
    # The outermost discs are drawn up to 1.93 frames from their centres (delta > 0.1), so 0.07 frames from the first
    # and the last one; where an end cuts the surface, it is closed half a sub-frame outside.
    last = 8 * (frames - 1)
    assert vertices[:, 2].min() > 0 and vertices[:, 2].max() < last, "no end of the stack cuts it"
