"""The viewer without a browser: what it draws, what it reports, what it refuses, and what it drops."""

import asyncio
import dataclasses
import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import nibabel
import numpy as np
import pytest
from oblique_case import FRAMES, HEIGHT, LABELS, WIDTH, make_case, oblique, save_model

from arguments import model_options
from gaussian_renderer.editing import subset
from utils.errors import UserError
from viewer.case import Case, meshes_of
from viewer.server import Latest, describe, packed, picture, slice_nifti

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_case(tmp_path_factory.mktemp("viewer"))


@pytest.fixture(scope="module")
def case(folder):
    return Case.open(model_options({"model_path": str(folder), "device": "cpu"}), say=lambda _: None)


def unpacked(data):
    length = int.from_bytes(data[:4], "little")
    header, at, arrays = json.loads(data[4 : 4 + length]), 4 + length, {}
    for about in header["arrays"]:
        count = int(np.prod(about["shape"]))
        array = np.frombuffer(data, about["dtype"], count, at)
        arrays[about["name"]] = array.reshape(about["shape"])
        at += -(-array.nbytes // 4) * 4
    return header, arrays


def test_arrays_survive_packing():
    arrays = {
        "a": np.arange(5, dtype=np.uint8),
        "b": np.ones((2, 3), np.float32),
        "c": np.zeros((0, 7), np.float32),
    }
    header, back = unpacked(packed({"t": 1.5}, arrays))
    assert header["t"] == 1.5
    for name, array in arrays.items():
        assert np.array_equal(back[name], array) and back[name].dtype == array.dtype


def test_a_picture_holds_what_was_asked_for(case):
    header, arrays = unpacked(picture(case, 2.0, "linear", 50))
    assert arrays["image"].shape == (1, HEIGHT, WIDTH) and arrays["mask"].shape == (HEIGHT, WIDTH)
    # At a frame, the interpolation is that frame, and is scored against it.
    assert np.array_equal(arrays["other"], case.inputs.images(2)[0].numpy())
    mse = np.mean((arrays["image"] - arrays["other"]) ** 2)
    assert header["scores"]["psnr"] == pytest.approx(-10 * np.log10(mse), abs=1e-3)
    assert arrays["ellipses"].shape == (50, 8) and header["gaussians"]["total"] == 400
    assert 0 < header["active"] <= 400
    between, _ = unpacked(picture(case, 2.25, "", 0))
    assert between["scores"] is None and "gaussians" not in between
    hidden, arrays = unpacked(picture(case, 2.5, "heldout", 0))
    assert hidden["scores"]["of"] == "held out, slice 5" and hidden["against"]["t"] == 2.5
    assert np.array_equal(arrays["other"], case.inputs.heldout["img"].frames(2)[0].numpy())


def test_ellipses_lie_where_their_gaussians_are_drawn(case):
    """One Gaussian that is alone in the frame: its ellipse has the mean and the covariance of what it draws."""
    n = len(case.model)
    found = case.ellipses(3.0, n)["values"]
    inner = next(
        k
        for k, (u, v, _, b, *_) in enumerate(found)
        if 12 < u < WIDTH - 12 and 12 < v < HEIGHT - 12 and b > 1
    )
    chosen = (case.model.opacities(["img"]).flatten() == float(found[inner][5])) & (
        case.model.spreads() == float(found[inner][6])
    )
    assert chosen.sum() == 1
    one = subset(case.model, chosen)
    one.params["f_dc"].data.fill_(1.7)  # white
    one.params["opacity"].data.fill_(-1.5)  # far from where alpha is clamped
    alone = dataclasses.replace(case.trained, model=one)
    lone = Case(case.options, alone, case.geometry, case.inputs, "img")
    image = lone.draw([3.0])[0][0, 0].astype(np.float64)
    weights = image / image.sum()
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    u, v, a, b, angle, *_ = found[inner]
    assert (weights * columns).sum() == pytest.approx(u, abs=0.05)
    assert (weights * rows).sum() == pytest.approx(v, abs=0.05)
    along = (columns - u) * np.cos(angle) + (rows - v) * np.sin(angle)
    across = -(columns - u) * np.sin(angle) + (rows - v) * np.cos(angle)
    # The low-pass filter adds 0.3 px^2; tails under alpha 1/255 are cut off, which takes some percent.
    assert (weights * along**2).sum() == pytest.approx(a**2 + 0.3, rel=0.2)
    assert (weights * across**2).sum() == pytest.approx(b**2 + 0.3, rel=0.2)


def test_places_of_the_page_are_those_of_the_frames(case):
    about = describe(case)
    points = np.array([[5.0, 7.0, 2.5], [0, 0, 0], [WIDTH - 1, HEIGHT - 1, FRAMES - 1]])
    expected = oblique().to_patient(points)
    origins = np.array(about["origins"])
    for (u, v, t), place in zip(points, expected, strict=True):
        k = min(int(t), FRAMES - 2)
        origin = origins[k] + (origins[k + 1] - origins[k]) * (t - k)
        assert np.allclose(origin + u * np.array(about["column"]) + v * np.array(about["row"]), place)


def test_a_slice_is_written_in_its_place(case, tmp_path):
    (tmp_path / "slice.nii").write_bytes(slice_nifti(case, 2.5))
    image = nibabel.load(tmp_path / "slice.nii")
    assert image.shape == (WIDTH, HEIGHT, 1)
    place = image.affine @ [5, 7, 0, 1]
    assert np.allclose(place[:3], oblique().to_patient(np.array([5.0, 7.0, 2.5])), atol=1e-3)
    expected = -200 + 500 * case.draw([2.5])[0][0, 0, 7, 5]
    assert image.get_fdata()[5, 7, 0] == pytest.approx(expected, abs=1e-3)


@pytest.fixture(scope="module")
def organs(tmp_path_factory):
    folder = make_case(tmp_path_factory.mktemp("organs"), LABELS)
    return Case.open(model_options({"model_path": str(folder), "device": "cpu"}), say=lambda _: None)


def test_a_label_map_is_drawn_by_its_ids(organs):
    """Ids beyond a byte, in pictures, volume and meshes; neighbours share their surface."""
    assert [(label["id"], label["name"], label["colour"]) for label in describe(organs)["labels"]] == [
        (2, "left lung", "#56b4e9"), (300, "liver", "#e69f00"),
    ]  # fmt: skip
    images, masks = organs.draw([3.0, 3.5])
    assert images.shape == (2, 1, HEIGHT, WIDTH) and masks.shape == (2, HEIGHT, WIDTH)
    assert set(np.unique(masks)) == {0, 2, 300}
    header, arrays = unpacked(picture(organs, 3.0, "", 0))
    assert arrays["mask"].dtype == np.uint16 and np.array_equal(arrays["mask"], masks[0])
    # Dice by hand, against the frame's own map.
    given = organs.mask_at(3.0)
    assert set(np.unique(given)) == {0, 2, 300}
    both = [
        2 * ((masks[0] == i) & (given == i)).sum() / ((masks[0] == i).sum() + (given == i).sum())
        for i in (2, 300)
    ]
    assert header["scores"]["dice"] == pytest.approx(np.mean(both))
    assert organs.mask_at(3.25) is None
    _, volume = organs.volumes(1)
    assert set(np.unique(volume.values)) == {0, 2, 300}
    meshes = meshes_of(volume.image, organs.table)
    assert list(meshes) == [2, 300]
    shared = {tuple(p) for p in meshes[2].vertices.round(4)} & {
        tuple(p) for p in meshes[300].vertices.round(4)
    }
    assert len(shared) > 20


def test_the_reference_of_a_4d_source_is_the_volume_that_was_trained_on(tmp_path):
    folder = make_case(tmp_path)
    dataclasses.replace(oblique(), volume=1).save(folder / "frames.json")
    values = np.stack([np.full((WIDTH, HEIGHT, 15), level, np.int16) for level in (100, 200)], -1)
    nibabel.save(nibabel.Nifti1Image(values, oblique().matrix), tmp_path / "two.nii.gz")
    options = model_options({"model_path": str(folder), "device": "cpu"})
    case = Case.open(options, reference=str(tmp_path / "two.nii.gz"), say=lambda _: None)
    assert (case.reference.values == 200).all() and case.against("reference", 1.0)[0].shape == (
        1,
        HEIGHT,
        WIDTH,
    )
    oblique().save(folder / "frames.json")
    with pytest.raises(UserError, match="holds 2 volumes"):
        Case.open(options, reference=str(tmp_path / "two.nii.gz"), say=lambda _: None)


def test_masks_of_some_frames_are_compared_where_they_are(tmp_path, monkeypatch):
    """Opening such a case carries no masks to the other frames, which takes a while; there, nothing is compared."""
    folder = make_case(tmp_path)
    for k in range(FRAMES):
        if k % 3:
            (tmp_path / "data" / "seg" / "original" / f"{k:04d}.png").unlink()
    monkeypatch.setattr("training.data.fill", None)
    case = Case.open(model_options({"model_path": str(folder), "device": "cpu"}), say=lambda _: None)
    assert case.inputs.painted == (0, 3, 6)
    header, _ = unpacked(picture(case, 3.0, "", 0))
    assert header["scores"]["dice"] is not None and case.mask_at(3.0).max() == 1
    header, _ = unpacked(picture(case, 4.0, "", 0))
    assert header["scores"]["psnr"] > 0 and header["scores"]["dice"] is None


def test_requests_that_are_overtaken_are_dropped():
    async def rush():
        latest, drawn = Latest(), []
        work = [latest("page", n, lambda n=n: (time.sleep(0.05), drawn.append(n))) for n in range(1, 11)]
        await asyncio.gather(*work, latest("another page", 1, lambda: drawn.append("other")))
        return drawn, latest.dropped

    drawn, dropped = asyncio.run(rush())
    assert (drawn == [1, 10, "other"] and dropped == 8) or (drawn == [10, "other"] and dropped == 9)


def test_the_newest_checkpoint_is_taken_when_asked(tmp_path):
    folder = make_case(tmp_path)
    case = Case.open(model_options({"model_path": str(folder), "device": "cpu"}), say=lambda _: None)
    before = case.draw([1.0])[0]
    save_model(folder, 60, opacity=case.model.params["opacity"].detach() - 2)
    case.reload()
    assert case.trained.iteration == 60 and not np.array_equal(case.draw([1.0])[0], before)


def test_without_its_input_frames_a_model_is_still_shown(tmp_path):
    folder, said = make_case(tmp_path), []
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    options = {"model_path": str(folder), "device": "cpu"}
    case = Case.open(model_options(options), say=said.append)
    assert case.comparisons() == [] and "without input frames" in said[0]
    assert describe(case)["masks"] and case.draw([0.5])[0].shape == (1, 1, HEIGHT, WIDTH)
    given = {**options, "source_path": str(tmp_path / "elsewhere" / "img")}
    assert (
        "frame" not in Case.open(model_options(given), say=said.append).comparisons()
    )  # its masks are gone too


def view(*arguments):
    command = [sys.executable, "view.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_mistakes_end_in_one_line(folder, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for arguments, words in (
            (("-m", tmp_path / "none"), "is not a folder"),
            (("-m", folder, "--port", port), f"--port {port}"),
            (("-m", folder, "--mesh", tmp_path / "none.ply"), "does not exist"),
            (("-m", folder, "--port", "99999"), "no port"),
        ):
            ended = view(*arguments, "--device", "cpu")
            lines = ended.stderr.strip().splitlines()
            assert ended.returncode == 2 and len(lines) == 1 and words in lines[0], ended.stderr
