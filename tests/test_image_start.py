"""Gaussians taken from the frames: where they are, what they look like, and that training begins near the frames."""

import numpy as np
import pytest
import torch
from sequences import blobs, checkpoint, colours, masks, train_at, write

from arguments import ModelOptions
from gaussian_renderer import render_frames
from scene.cameras import Camera
from scene.frames import Frames
from scene.gaussian_model import GaussianModel
from scene.image_start import image_start
from scene.parameters import IMAGE, SEGMENTATION
from utils.metrics import Scores
from utils.spherical_harmonics import to_colour

SIZE = {"count": 6, "width": 40, "height": 30}
N = 3000


@pytest.fixture
def read(tmp_path):
    def read(arrays, name="img"):
        return Frames.read(write(tmp_path / name, arrays) / "original")

    return read


def started(sequences, n=N, seed=0, durations=None, background=(0.0,), **options) -> GaussianModel:
    first = sequences[0]
    return image_start(
        ModelOptions(num_pts=n, poly_degree=2, **options),
        Camera(first.width, first.height),
        sequences,
        torch.tensor(background),
        torch.Generator().manual_seed(seed),
        durations=durations,
    )


def pixels(model: GaussianModel, frames: Frames) -> tuple[torch.Tensor, ...]:
    """(N,) each: the frame, row and column of the pixel that a Gaussian was taken from."""
    camera, p = Camera(frames.width, frames.height), model.params
    column = p["xyz"][:, 0] * camera.pixels_per_unit + (camera.width - 1) / 2
    row = (camera.height - 1) / 2 - p["xyz"][:, 2] * camera.pixels_per_unit
    frame = torch.sigmoid(p["m"][:, 0]) * len(frames)
    return tuple(value.detach().round().long() for value in (frame, row, column))


def test_every_gaussian_has_the_colour_of_its_pixel(read):
    frames = read(colours(**SIZE))
    model = started([frames], background=(0.0, 0.0, 0.0))
    k, row, column = pixels(model, frames)
    here = frames(range(len(frames))).permute(0, 2, 3, 1)[k, row, column]  # (N, 3)
    assert torch.allclose(to_colour(model.params["f_dc"][:, 0]), here, atol=1e-5)
    assert (model.params["w1"] == 0).all() and model.heads == (IMAGE,)


def test_masks_beside_the_images_have_a_head_of_their_own(read):
    frames, labels = read(blobs(**SIZE)), read(masks(**SIZE), "seg")
    model = started([frames, labels])
    k, row, column = pixels(model, labels)
    inside = labels(range(len(labels)))[:, 0][k, row, column]
    assert model.heads == (IMAGE, SEGMENTATION)
    assert torch.allclose(to_colour(model.params["f_dc_seg"][:, 0, 0]), inside, atol=1e-5)
    assert 0.1 < inside.mean() < 0.9


def test_they_gather_where_the_frames_change(read):
    """Half of the frame is black, half white: the edge gets most, the middles few, but some."""
    frame = np.zeros((30, 40), np.uint8)
    frame[:, 20:] = 255
    _, _, column = pixels(started([frames := read([frame] * 4)]), frames)
    near = ((column - 19.5).abs() < 3).float().mean()
    assert 0.8 < near < 0.99
    assert len(column[column < 10].unique()) == 10  # the floor reaches every column


def test_contours_draw_gaussians_that_the_images_do_not(read):
    grey = read([np.full((30, 40), 128, np.uint8)] * 4)
    labels = read([frame[:30, :40] for frame in masks(count=4, width=40, height=30)], "seg")
    edges = np.abs(np.diff(labels([0])[0, 0].numpy(), axis=1)).astype(bool)
    alone, both = started([grey]), started([grey, labels])

    def share(model: GaussianModel) -> float:
        """Of those in frame 0, how many lie beside a contour."""
        k, row, column = pixels(model, grey)
        here = k == 0
        return float(edges[row[here], column[here].clamp_max(38)].mean())

    assert share(both) > 5 * share(alone)


def test_even_frames_get_an_even_start(read):
    frames = read([np.full((30, 40), 77, np.uint8)] * 5)
    k, row, column = pixels(started([frames]), frames)
    for values, bins in ((k, 5), (row, 30), (column, 40)):
        counts = torch.bincount(values, minlength=bins).double()
        assert counts.min() > 0.6 * counts.mean() and counts.max() < 1.4 * counts.mean()


def test_a_seed_means_one_model(read):
    frames = read(blobs(**SIZE))
    first, again, other = (started([frames], seed=seed).params for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["xyz"], other["xyz"])


def test_uneven_frames_have_their_own_times_and_spreads(read):
    durations = [0.1, 0.4, 0.1, 0.1, 0.2, 0.1]
    model = started([read(blobs(**SIZE))], durations=durations)
    starts = torch.tensor([0, *np.cumsum(durations)[:-1]], dtype=torch.float32)
    times = torch.sigmoid(model.params["m"][:, 0])
    nearest = (times[:, None] - starts).abs()
    assert nearest.min(1).values.max() < 2e-4
    gaps = torch.tensor(durations)[nearest.argmin(1)]
    assert torch.allclose(model.spreads(), gaps)


@pytest.mark.parametrize("count", [1, 2, 6])
def test_learned_times_and_short_sequences(read, count):
    model = started([read(blobs(count=count))], use_dff=True)
    assert all(value.isfinite().all() for value in model.params.values())


def test_the_first_render_resembles_the_frames(read):
    frames = read(blobs(**SIZE))
    camera, targets = Camera(frames.width, frames.height), frames(range(len(frames)))

    def quality(model: GaussianModel) -> float:
        with torch.no_grad():
            images = render_frames(model, camera, list(map(float, range(6))), torch.zeros(1), IMAGE)
        return Scores.of(images, targets).mean_psnr

    options = ModelOptions(num_pts=N, poly_degree=2)
    random = GaussianModel.random(options, camera, len(frames), 1, torch.Generator().manual_seed(0))
    ours = quality(started([frames]))
    assert ours > 22 and ours > quality(random) + 8


def test_training_begins_there(tmp_path):
    """From the command line, with images and masks; the same seed gives the same run."""
    img, seg = write(tmp_path / "img", blobs()), write(tmp_path / "seg", masks())
    joint = ("--pipeline", "joint", "--seg_source_path", seg, "--start", "frames", "--iterations", 2)
    for out in ("a", "b"):
        train_at(img, tmp_path / out, *joint)
    train_at(seg, tmp_path / "seg_alone", "--pipeline", "seg", "--start", "frames", "--iterations", 2)
    a, b = (checkpoint(tmp_path / out, 2) for out in ("a", "b"))
    assert torch.equal(a.params["f_dc_seg"], b.params["f_dc_seg"])
    values = to_colour(a.params["f_dc_seg"]).flatten()
    assert ((values < 0.1) | (values > 0.9)).float().mean() > 0.9  # not the grey of a random start
    assert checkpoint(tmp_path / "seg_alone", 2).params["f_dc"].std() > 1
