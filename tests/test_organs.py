"""Several organs in one model: label maps in, a channel per label, and files that carry their ids and names."""

import json
import sys

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image
from plyfile import PlyData
from sequences import (
    BriefInBetween,
    assert_same_state,
    blobs,
    checkpoint,
    masks,
    refused,
    train_at,
    write,
)

import export
import render
import slices_to_ply
from arguments import render_options
from in_between.contours import with_areas
from in_between.prediction import InBetween
from patient.label_channels import colours_of, ids_of, index_of, index_of_ids, one_hot, with_background
from patient.labels import Label, LabelTable
from scene.checkpoint import load_checkpoint, save_compact
from scene.frames import Frames
from scene.parameters import SEGMENTATION_HEAD
from scene.point_cloud import labels_of_point_cloud, read_point_cloud
from scene.trained import Trained
from training.data import fill
from utils.errors import run
from utils.losses import LABEL_FLOOR, label_cross_entropy
from utils.metrics import LabelScores
from utils.spherical_harmonics import C0

IDS = (2, 7, 300)
TABLE = LabelTable(
    (Label(2, "core", (255, 0, 0)), Label(7, "rim", (0, 255, 0)), Label(300, "bed", (0, 0, 255)))
)


def label_maps() -> list[np.ndarray]:
    """A core in a rim that drifts to the right above a bed that stays: 16-bit ids."""
    out = []
    for frame in blobs():
        ids = np.zeros(frame.shape, np.uint16)
        ids[frame > 60] = 7
        ids[frame > 150] = 2
        ids[-4:] = 300
        out.append(ids)
    return out


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    folder = tmp_path_factory.mktemp("organs")
    for name, frames in (("img", blobs()), ("labels", label_maps()), ("mask", masks())):
        write(folder / name, frames)
    return folder


@pytest.fixture(scope="module")
def joint(roots):
    """A brief joint run, with a checkpoint midway."""
    out = roots / "joint"
    more = (
        "--start",
        "frames",
        "--iterations",
        130,
        "--checkpoint_iterations",
        70,
        "--densify_from_iter",
        50,
    )
    train_at(roots / "img", out, "--pipeline", "joint", "--seg_source_path", roots / "labels", *more)
    return out


# ---- channels --------------------------------------------------------------------------------------------------------


def test_ids_become_channels_and_ids_again(roots):
    frames = Frames.read(roots / "labels" / "original", masks=True, say=lambda _: None)
    assert frames.labels.ids == IDS and frames.channels == 3 and frames.levels.dtype == torch.uint8
    channels = frames([1, 3])
    assert channels.shape == (2, 3, 20, 24) and set(channels.unique().tolist()) == {0.0, 1.0}
    truth = np.stack([label_maps()[k] for k in (1, 3)])
    assert np.array_equal(ids_of(channels, frames.labels).numpy(), truth)
    mirrored = ids_of(frames([1], mirrored=True), frames.labels)[0].numpy()
    assert np.array_equal(mirrored, truth[0][:, ::-1])


def test_smaller_label_maps_hold_the_same_labels(roots):
    small = Frames.read(roots / "labels" / "original", 2, masks=True, say=lambda _: None)
    ids = ids_of(small([2]), small.labels)[0].numpy()
    assert ids.shape == (10, 12) and set(np.unique(ids)) <= {0, *IDS}
    truth = label_maps()[2]
    solid = (truth.reshape(10, 2, 12, 2) == truth[::2, ::2][:, None, :, None]).all((1, 3))
    agreeing = (ids == truth[::2, ::2])[solid].mean()
    assert agreeing > 0.95  # bicubic weights reach past blocks of one label


def test_more_labels_than_a_byte_counts():
    index = torch.arange(300, dtype=torch.int16).view(1, 1, 15, 20)
    channels = one_hot(index, 299)
    assert torch.equal(index_of(channels)[0], index[0, 0].long())
    table = LabelTable(tuple(Label.of(3 * k) for k in range(1, 300)))
    assert torch.equal(ids_of(channels, table)[0], 3 * index[0, 0].int())
    assert (
        torch.equal(index_of_ids(3 * index, table), index.long())
        and index_of_ids(torch.tensor([1, 898]), table).sum() == 0
    )


def test_the_largest_share_wins_and_the_rest_is_background():
    channels = torch.tensor([[0.5, 0.49, 0.3, 0.4], [0.0, 0.0, 0.3, 0.35]]).view(2, 1, 4)
    assert index_of(channels)[0].tolist() == [1, 0, 0, 1]
    assert torch.allclose(with_background(channels)[0, 0], torch.tensor([0.5, 0.51, 0.4, 0.25]))
    two = LabelTable(TABLE.labels[:2])
    picture = colours_of(channels, two)
    assert picture.shape == (3, 1, 4)
    assert torch.allclose(picture[:, 0, 3], torch.tensor([0.4, 0.35, 0.0]), atol=1e-6)


def test_the_loss_is_the_cross_entropy_of_the_shares():
    targets = one_hot(torch.randint(0, 4, (2, 1, 5, 6)), 3)
    drawn = (0.9 * targets + 0.02).requires_grad_()  # sums to 0.96 where there is a label, else to 0.06
    shares = with_background(drawn) + LABEL_FLOOR
    index = with_background(targets).argmax(1)
    expected = torch.nn.functional.nll_loss((shares / shares.sum(1, keepdim=True)).log(), index)
    loss = label_cross_entropy(drawn, targets)
    assert torch.allclose(loss, expected)
    loss.backward()
    assert (drawn.grad[targets > 0] < 0).all()  # more of the right label is better
    behind = (targets.sum(1, keepdim=True) == 0).expand_as(targets)
    assert (drawn.grad[behind] > 0).all()  # and less of any where there should be none
    nowhere = torch.zeros(1, 3, 1, 1, requires_grad=True)
    label_cross_entropy(nowhere, one_hot(torch.tensor([[[[2]]]]), 3)).backward()
    assert nowhere.grad[0, 1] < 0  # a label that is nowhere yet can grow


# ---- training and its files ------------------------------------------------------------------------------------------


def test_a_joint_model_has_a_channel_per_label_and_its_files_name_them(joint):
    saved = checkpoint(joint, 130)
    assert saved.labels.ids == IDS and saved.channels == 1
    assert saved.params["f_dc_seg"].shape[1:] == (1, 3) and saved.params["opacity_seg"].shape[1:] == (1,)
    cloud = next(joint.glob("point_cloud/*/point_cloud.ply"))
    params, _ = read_point_cloud(cloud)
    assert labels_of_point_cloud(cloud) == saved.labels
    assert all(torch.equal(value, saved.params[name]) for name, value in params.items())
    save_compact(joint / "compact.pth", saved)
    assert load_checkpoint(joint / "compact.pth").labels == saved.labels
    trained = Trained.load(render_options(["-m", str(joint), "--device", "cpu"]), lambda _: None)
    assert trained.model.labels == saved.labels and trained.model.label_head == "seg"


def test_a_resumed_run_is_the_same_run(joint, roots):
    out = roots / "resumed"
    more = ("--start_checkpoint", joint / "chkpnt70.pth", "--iterations", 130, "--densify_from_iter", 50)
    train_at(roots / "img", out, "--pipeline", "joint", "--seg_source_path", roots / "labels", *more)
    assert_same_state(checkpoint(joint, 130), checkpoint(out, 130))


@pytest.mark.parametrize("start", ["random", "frames"])
def test_label_maps_alone(roots, start):
    out = roots / f"alone_{start}"
    train_at(roots / "labels", out, "--pipeline", "seg", "--iterations", 12, "--start", start)
    saved = checkpoint(out, 12)
    assert saved.labels.ids == IDS and saved.channels == 3 and not saved.has_seg_head
    cloud = next(out.glob("point_cloud/*/point_cloud.ply"))
    assert torch.equal(read_point_cloud(cloud)[0]["f_dc"], saved.params["f_dc"])
    words = ["-m", str(out), "--device", "cpu", "--white_background"]
    trained = Trained.load(render_options(words), lambda _: None)
    assert trained.background.tolist() == [0, 0, 0]  # nothing is labelled behind a label map


def test_a_label_head_is_added_to_a_model_of_images(roots):
    image = roots / "image"
    train_at(roots / "img", image, "--iterations", 10)
    out = roots / "head_only"
    more = (
        "--pipeline",
        "seg",
        "--seg_head_only",
        "--start_checkpoint",
        image / "chkpnt10.pth",
        "--iterations",
        20,
    )
    train_at(roots / "labels", out, *more)
    before, after = checkpoint(image, 10), checkpoint(out, 20)
    assert after.labels.ids == IDS and after.params["f_dc_seg"].shape[2] == 3
    for name, value in before.params.items():
        assert torch.equal(value, after.params[name])
    assert any(after.params[name].std() > 0 for name in SEGMENTATION_HEAD)


def test_heads_of_other_labels_are_refused(roots, joint, capsys):
    model, seg = joint / "chkpnt130.pth", ("--pipeline", "joint", "--seg_source_path")
    out = roots / "refused"
    assert refused(roots / "img", out, *seg, roots / "mask", "--start_checkpoint", model) == 2
    assert "shows 3 labels" in (text := capsys.readouterr().err) and "one mask" in text
    head_only = ("--pipeline", "seg", "--seg_head_only", "--start_checkpoint", model)
    assert refused(roots / "mask", out, *head_only) == 2
    assert "3 labels" in capsys.readouterr().err
    mask_model = roots / "mask_model"
    train_at(roots / "img", mask_model, *seg, roots / "mask", "--iterations", 5)
    assert (
        refused(roots / "img", out, *seg, roots / "labels", "--start_checkpoint", mask_model / "chkpnt5.pth")
        == 2
    )
    assert "shows one mask" in capsys.readouterr().err


def test_names_and_colours_come_from_frames_json(roots, tmp_path):
    from patient.geometry import FILE_NAME
    from patient.stacks import case_geometry

    write(tmp_path / "case" / "seg", label_maps())
    geometry = _geometry()
    geometry.save(tmp_path / "case" / FILE_NAME)
    assert case_geometry(tmp_path / "case" / "seg" / "original").labels == TABLE
    frames = Frames.read(tmp_path / "case" / "seg" / "original", masks=True, say=lambda _: None)
    assert frames.labels == TABLE
    assert json.loads((tmp_path / "case" / FILE_NAME).read_text())["labels"][0]["name"] == "core"


def _geometry():
    from patient.geometry import Geometry

    affine = ((1.0, 0.0, 0.0, 0.0), (0.0, 1.0, 0.0, 0.0), (0.0, 0.0, 3.0, 0.0), (0.0, 0.0, 0.0, 1.0))
    return Geometry(
        axes=(0, 1, 2), flips=(False, False), size=(24, 20), affine=affine, slices=tuple(range(5)), slice_count=5,
        positions=(0.0, 3.0, 6.0, 9.0, 12.0), window=(0.0, 255.0), bits=8, source="case.nii.gz", labels=TABLE,
    )  # fmt: skip


def test_one_label_is_a_mask_as_before(roots, tmp_path):
    ones = [np.where(mask > 0, np.uint8(5), np.uint8(0)) for mask in masks()]
    for name, frames in (("five", ones), ("mask", masks())):
        write(tmp_path / name, frames)
        train_at(tmp_path / name, tmp_path / f"{name}_out", "--pipeline", "seg", "--iterations", 8)
    five, mask = (checkpoint(tmp_path / f"{name}_out", 8) for name in ("five", "mask"))
    assert five.labels is None
    assert_same_state(five, mask)
    assert Image.open(tmp_path / "five" / "original" / "0000.png").getextrema()[1] == 5


# ---- rendering -------------------------------------------------------------------------------------------------------


def rendered(model, *more):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sys, "argv", ["render.py", "-m", str(model), "--device", "cpu", "--quiet", *map(str, more)]
        )
        render.main()


@pytest.fixture(scope="module")
def placed(roots):
    """A joint model of label maps with a place in a patient, trained until it shows them, and its renders."""
    case = roots / "case"
    write(case / "img", blobs())
    write(case / "seg", label_maps())
    _geometry().save(case / "frames.json")
    out = roots / "placed"
    more = ("--start", "frames", "--num_pts", 600, "--iterations", 150, "--test_iterations", 150)
    train_at(case / "img", out, "--pipeline", "joint", "--seg_source_path", case / "seg", *more)
    rendered(
        out,
        "--pipeline",
        "both",
        "--interp",
        2,
        "--nifti",
        "--probabilities",
        "--video",
        10,
        "--video_format",
        "gif",
    )
    return out


def test_renders_are_label_maps_with_the_ids_of_the_source(placed):
    files = sorted((placed / "render_mask").glob("*.png"))
    assert [file.stem for file in files[:3]] == ["00000_0", "00000_1", "00001_0"] and len(files) == 9
    shown = np.stack([np.array(Image.open(file)) for file in files[::2]])
    truth = np.stack(label_maps())
    assert set(np.unique(shown)) == {0, *IDS} and (shown == truth).mean() > 0.97
    volume = nibabel.load(placed / "render_mask.nii.gz")
    values = np.asarray(volume.dataobj)
    assert values.dtype == np.uint16 and values.shape == (24, 20, 9)
    assert np.array_equal(values.transpose(2, 1, 0)[::2], shown)
    assert np.allclose(volume.affine, np.diag([1, 1, 1.5, 1]))
    shares = [
        np.array(Image.open(placed / "render_probabilities" / name / "00002_0.png"))
        for name in ("core", "rim", "bed")
    ]
    index = index_of(torch.from_numpy(np.stack(shares) / 255.0)).numpy()
    assert (np.array((0, *IDS))[index] == shown[2]).mean() > 0.99  # but for halves, which files round
    soft = nibabel.load(placed / "render_probabilities" / "rim.nii.gz")
    assert np.allclose(np.asarray(soft.dataobj).transpose(2, 1, 0)[4], shares[1] / 255, atol=3e-3)


def test_label_maps_are_coloured_in_videos(placed):
    picture = np.array(Image.open(placed / "render_both.gif").convert("RGB"))
    right = picture[:, picture.shape[1] // 2 :].reshape(-1, 3).astype(int)
    for label in TABLE:
        assert (right == label.colour).all(1).any(), label


def test_splats_are_in_the_labels_colours(placed, tmp_path):
    words = [
        "-m",
        str(placed),
        "--at",
        "2",
        "--head",
        "seg",
        "-o",
        str(tmp_path / "splats.ply"),
        "--device",
        "cpu",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["export.py", *words])
        export.main()
    splats = PlyData.read(tmp_path / "splats.ply")["vertex"]
    colours = 255 * (C0 * np.stack([splats[f"f_dc_{i}"] for i in range(3)], 1) + 0.5)
    top = splats["opacity"] > 0
    for label in TABLE:
        assert np.abs(colours[top] - label.colour).max(1).min() < 40


def test_exact_numbers_are_asked_for(placed, roots, capsys):
    with pytest.raises(SystemExit), pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sys, "argv", ["render.py", "-m", str(placed), "--pipeline", "seg", "--extension", ".jpg"]
        )
        run(render.main)
    assert "a label map needs exact numbers" in capsys.readouterr().err
    with pytest.raises(SystemExit), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["render.py", "-m", str(placed), "--probabilities"])
        run(render.main)
    assert "--probabilities is for models of label maps" in capsys.readouterr().err


def test_a_mesh_per_organ(placed, tmp_path):
    assert slices_to_ply.main(["-i", str(placed), "-o", str(tmp_path), "--quiet", "--jobs", "1"]) == 0
    assert {file.name for file in tmp_path.iterdir()} == {f"placed_{label.name}.ply" for label in TABLE} | {
        "placed.glb"
    }


def test_scores_are_per_label(placed):
    (row,) = [row for row in json.loads((placed / "evaluation.json").read_text()) if row["task"] == "seg"]
    assert set(row["labels"]) == set(map(str, IDS))
    assert row["dice"] == pytest.approx(np.mean(list(row["labels"].values())))
    assert row["dice"] > 0.9 and row["ssim"] is None
    truth = torch.from_numpy(np.stack(label_maps()).astype(np.int32))
    index = index_of_ids(truth, TABLE)
    worse = torch.where(index == 2, 1, index)
    scores = LabelScores.of_labels(worse, index, 3)
    core, rim = (int((index == number).sum()) for number in (1, 2))
    assert scores.label_dice == pytest.approx([2 * core / (2 * core + rim), 0.0, 1.0])


# ---- masks of some frames only ---------------------------------------------------------------------------------------


def only(root, numbers):
    """Removes the other frames of a data root."""
    for file in (root / "original").iterdir():
        if int(file.stem) not in numbers:
            file.unlink()
    return root


@pytest.mark.parametrize("kind", ["mask", "labels"])
def test_masks_of_some_frames_are_carried_to_the_others(roots, tmp_path, kind, capsys):
    every = (
        masks(count=7)
        if kind == "mask"
        else [np.where(f > 150, 2, np.where(f > 60, 7, 0)).astype(np.uint8) for f in blobs(7)]
    )
    images = write(tmp_path / "img", blobs(7))
    few = only(write(tmp_path / "few", every), (0, 3, 6))
    frames = Frames.read(images / "original", say=lambda _: None)
    given = Frames.read(few / "original", masks=True, consecutive=False, say=lambda _: None)
    filled = fill(frames, given, (0, 3, 6))
    assert filled.numbers == frames.numbers and torch.equal(filled.levels[[0, 3, 6]], given.levels)
    truth = Frames.read(write(tmp_path / "all", every) / "original", masks=True, say=lambda _: None)
    moved = [k for k in range(7) if k not in (0, 3, 6)]
    errors = (filled(moved) - truth(moved)).abs().sum((1, 2, 3))
    still = (
        (truth([k - k % 3 for k in moved]) - truth(moved)).abs().sum((1, 2, 3))
    )  # the mask before, repeated
    assert (errors < 0.5 * still).all()

    more = ("--pipeline", "joint", "--seg_source_path", few, "--iterations", 12)
    train_at(images, tmp_path / "out", *more, "--start", "frames", "--num_pts", 300)
    rows = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert {row["task"]: row["count"] for row in rows} == {
        "img": 7,
        "seg": 3,
    }  # what was not given is not scored
    train_at(images, tmp_path / "eval", *more, "--eval", "--eval_every", 3)  # frames 2 and 5 are held out
    assert not [
        row
        for row in json.loads((tmp_path / "eval" / "evaluation.json").read_text())
        if row["task"] == "seg" and row["frames"] == "heldout"
    ]
    train_at(images, tmp_path / "eval4", *more, "--eval", "--eval_every", 4)  # frame 3 is, which has a mask
    rows = json.loads((tmp_path / "eval4" / "evaluation.json").read_text())
    (sdf,) = [row for row in rows if (row["task"], row["frames"], row["method"]) == ("seg", "heldout", "sdf")]
    assert sdf["count"] == 1


def test_masks_without_a_frame_are_refused(roots, tmp_path, capsys):
    few = only(write(tmp_path / "few", masks()), (0, 4))
    (few / "original" / "0004.png").rename(few / "original" / "0007.png")
    assert refused(roots / "img", tmp_path / "out", "--pipeline", "joint", "--seg_source_path", few) == 2
    assert "mask number 7 has no frame" in capsys.readouterr().err


# ---- in between ------------------------------------------------------------------------------------------------------


def test_labels_in_between_are_exclusive_and_keep_their_areas():
    """A thin bar that moves two pixels per frame, beside a block that stays."""
    index = torch.zeros(6, 1, 24, 40, dtype=torch.uint8)
    index[:, :, 14:, :] = 2
    for k in range(6):
        index[k, :, 4:10, 6 + 2 * k : 8 + 2 * k] = 1
    images = (
        0.2
        + 0.3 * index.float()
        + 0.02 * torch.rand(1, 1, 24, 40, generator=torch.Generator().manual_seed(1))
    )
    between = InBetween(images, gap=1.0, labels=(index, 2), settings=BriefInBetween.settings_of_tests)
    k, half = torch.arange(5), torch.full((5,), 0.5)
    shares = between.masks(k, half)
    assert shares.shape == (5, 2, 24, 40) and shares.min() >= 0 and shares.sum(1).max() <= 1 + 1e-5
    found = index_of(shares)
    assert torch.equal(found[:, 14:], index[:5, 0, 14:].long())  # what stays is untouched
    areas = (found == 1).sum((1, 2))
    assert (areas >= 8).all() and (areas <= 16).all()  # of 12
    assert torch.equal(index_of(between.masks(k, 0 * half)), index[:5, 0].long())  # at the frames, the frames


def test_areas_are_kept():
    distances = torch.linspace(-2, 2, 40).view(1, 1, 5, 8).repeat(3, 1, 1, 1)
    moved = with_areas(distances, torch.tensor([20.0, 23.0, 0.0]), 0.5)
    assert (moved > 0).sum((1, 2, 3)).tolist() == [
        20,
        23,
        20,
    ]  # where there should be nothing, nothing is moved
    assert (with_areas(distances, torch.tensor([1.0, 40.0, 20.0]), 0.5) - distances).abs().max() <= 0.5 + 1e-6


def test_a_prediction_of_labels_is_kept_and_found_again(tmp_path):
    images, index = torch.rand(3, 1, 16, 16), torch.randint(0, 3, (3, 1, 16, 16)).byte()
    settings = BriefInBetween.settings_of_tests
    made = InBetween(images, gap=1.0, labels=(index, 2), settings=settings)
    made.save(tmp_path / "kept.pt", images, None, (index, 2))
    k, alpha = torch.tensor([0, 1]), torch.tensor([0.3, 0.6])
    again = InBetween.load(tmp_path / "kept.pt", images, gap=1.0, settings=settings, labels=(index, 2))
    assert again is not None and torch.equal(again.masks(k, alpha), made.masks(k, alpha))
    other = index.clone()
    other[0, 0, 0, 0] = (index[0, 0, 0, 0] + 1) % 3
    assert InBetween.load(tmp_path / "kept.pt", images, gap=1.0, settings=settings, labels=(other, 2)) is None
