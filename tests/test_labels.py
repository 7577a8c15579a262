"""What a mask's numbers mean, and that all programs use one rule: label maps, soft masks, names of labels."""

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.ndimage import gaussian_filter
from sequences import threads, train_at

import evaluate
import prepare
import slices_to_ply
from patient.geometry import Geometry
from patient.labels import Label, LabelTable, meaning_of, read_segmentation
from patient.meshes import read_mesh
from scene.frames import Frames
from utils.errors import UserError
from utils.images import image_files, read_image

SIZE = (8, 30, 40)  # frames, rows, columns


def ball(row=14.0, column=16.0, radius=8.0, frame=3.5):
    z, y, x = np.mgrid[: SIZE[0], : SIZE[1], : SIZE[2]]
    return np.linalg.norm((2 * (z - frame), y - row, x - column), axis=0) < radius


def organs():
    """Three touching structures of a label map, ids 1, 2 and 5."""
    numbers = np.zeros(SIZE, np.uint8)
    numbers[ball()] = 1
    numbers[ball(column=24.0, radius=6.0) & (numbers == 0)] = 2
    numbers[ball(row=22.0, column=20.0, radius=4.0) & (numbers == 0)] = 5
    return numbers


def save(folder, stack, mode=None, palette=None, suffix=".png"):
    folder.mkdir(parents=True, exist_ok=True)
    for number, frame in enumerate(stack):
        image = Image.fromarray(frame) if mode is None else Image.fromarray(frame, mode)
        if palette is not None:
            image.putpalette(palette)
        image.save(folder / f"{number:04d}{suffix}")
    return folder


def save_volume(path, stack, spacing=(1.0, 1.0, 2.0), kind=None):
    """(frame, row, column) as a NIfTI volume whose frames along axis 2 are upright as they are."""
    values = stack.transpose(2, 1, 0) if kind is None else stack.transpose(2, 1, 0).astype(kind)
    affine = np.diag([-spacing[0], -spacing[1], spacing[2], 1.0])
    nibabel.save(nibabel.Nifti1Image(values, affine), path)
    return path


def score(tmp_path, *arguments):
    words = ["masks", *map(str, arguments), "--json", str(tmp_path / "s.json"), "--quiet"]
    assert evaluate.main(words) == 0
    return json.loads((tmp_path / "s.json").read_text())["rows"][0]


def kept(folder):
    return np.stack([read_image(path) for path in image_files(folder)])


# ---- the rule --------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(value=st.integers(1, 65535), wide=st.booleans(), empty=st.booleans())
def test_not_zero_is_inside_whatever_the_other_value_is(value, wide, empty):
    inside = ball() & (np.arange(SIZE[0]) != 2)[:, None, None]  # a frame without anything in it
    stack = (inside & (not empty)) * (np.uint16(value) if wide or value > 255 else np.uint8(value))
    meaning = meaning_of(stack, "m")
    assert meaning.kind == "mask" and np.array_equal(meaning.inside(stack), inside & (not empty))
    assert np.array_equal(meaning.shares(stack) == 1, meaning.inside(stack))
    assert any("empty" in note for note in meaning.notes) == empty


def test_the_decision_is_taken_over_all_frames():
    """One frame holds 7 alone, another 0 alone: each by itself would be full or empty."""
    stack = np.zeros(SIZE, np.uint8)
    stack[4] = 7
    meaning = meaning_of(stack, "m")
    assert meaning.inside(stack[4]).all() and not meaning.inside(stack[0]).any() and not meaning.notes


@pytest.mark.parametrize("bits", [8, 16])
def test_soft_borders_are_a_soft_mask(bits):
    """Blurred, antialiased and noisy masks of 0 and full scale: inside from half of it."""
    top, kind = 2**bits - 1, np.uint8 if bits == 8 else np.uint16
    mask = ball().astype(float)
    fine = np.repeat(np.repeat(ball(), 4, 1), 4, 2)
    y, x = np.mgrid[: 4 * SIZE[1], : 4 * SIZE[2]] / 4
    fine = np.stack([np.hypot(y - 14, x - 16) < 8 - abs(k - 3.5) for k in range(SIZE[0])])
    cases = {
        "blurred": gaussian_filter(mask, (0, 1.2, 1.2)),
        "antialiased": fine.reshape(SIZE[0], SIZE[1], 4, SIZE[2], 4).mean((2, 4)),
    }
    for name, shares in cases.items():
        stack = np.rint(shares * top).astype(kind)
        meaning = meaning_of(stack, name)
        assert meaning.kind == "soft" and "half of" in meaning.notes[0], name
        assert np.array_equal(meaning.inside(stack), stack >= top / 2), name


def test_label_maps_are_low_numbers_in_solid_regions():
    for stack in (organs(), organs().astype(np.uint16), organs() * np.uint8(23)):
        meaning = meaning_of(stack, "m")
        assert meaning.kind == "labels" and meaning.ids == tuple(np.unique(stack)[1:].tolist())
        assert np.array_equal(meaning.numbers(stack), stack)
    scaled = organs() / 0.73 * 0.73001  # as a slope in a header leaves them
    meaning = meaning_of(scaled, "m")
    assert meaning.ids == (1, 2, 5) and "rounded" in meaning.notes[0]
    assert np.array_equal(meaning.numbers(scaled), organs())


@pytest.mark.parametrize(
    ("stack", "message"),
    [
        (ball() * np.uint8(1) + np.uint8(1), "no 0 for what is outside"),
        (ball() * np.uint8(127) + ball(column=28.0) * np.uint8(128), "--labels.*--soft"),
        (np.random.default_rng(0).integers(40, 90, SIZE).astype(np.uint8), "picture"),
        (organs() * 1.3, "fractions from 0 to 6.5"),
        (organs().astype(np.int16) - 2, "--labels"),
    ],
    ids=["no zero", "three values to full scale", "picture", "fractions", "negative"],
)
def test_what_may_be_either_is_an_error(stack, message):
    with pytest.raises(UserError, match=message):
        meaning_of(stack, "m")


def test_full_and_nearly_full_masks_are_told():
    full = np.full(SIZE, 255, np.uint8)
    assert "full" in meaning_of(full, "m").notes[0]
    assert "what is outside" in meaning_of(full * ~ball(radius=5.0), "m").notes[0]


def test_pictures_of_masks(tmp_path):
    """Palettes are indices, opacity counts where it is all there is, one colour on black is a mask, JPEG is near it."""
    inside, byte = ball(), ball() * np.uint8(255)
    black = np.zeros_like(byte)
    folders = {
        "zero and one": save(tmp_path / "a", inside.astype(np.uint8)),
        "16 bits": save(tmp_path / "b", inside.astype(np.uint16)),
        "palette": save(tmp_path / "c", inside.astype(np.uint8), "P", [0, 0, 0, 90, 10, 10]),
        "dark palette": save(tmp_path / "d", inside.astype(np.uint8), "P", [200, 200, 200, 0, 0, 0]),
        "opacity alone": save(tmp_path / "e", np.stack([black, black, black, byte], 3)),
        "opaque": save(tmp_path / "f", np.stack([byte, byte, byte, black + 255], 3)),
        "shaded": save(tmp_path / "g", np.stack([byte, byte, byte, black + 128], 3)),
        "red": save(tmp_path / "h", np.stack([inside * np.uint8(90), black, black], 3)),
        "JPEG": save(tmp_path / "i", byte, suffix=".jpg"),
        "one bit": save(tmp_path / "j", inside),
    }
    for name, folder in folders.items():
        found = read_segmentation(image_files(folder))
        got = np.stack([found.meaning.inside(frame) for frame in found.frames])
        assert np.array_equal(got, inside), name
    voc = read_segmentation(
        image_files(save(tmp_path / "voc", organs() * np.uint8(51), "P", list(range(256)) * 3))
    )
    assert voc.meaning.kind == "labels" and voc.meaning.ids == (51, 102, 255)
    few = np.stack([organs() * np.uint8(40), byte, black], 3)
    with pytest.raises(UserError, match="holds 4 colours"):
        read_segmentation(image_files(save(tmp_path / "few", few)))


# ---- every program ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beside", ["volume", "folder"])
def test_palette_label_maps_are_their_indices_beside_any_image(tmp_path, beside):
    if beside == "volume":
        image = save_volume(tmp_path / "a.nii", organs().astype(np.int16))
    else:
        image = save(tmp_path / "a", organs().astype(np.uint8))
    label = save(tmp_path / "l", organs() * np.uint8(51), "P", np.random.default_rng(0).bytes(768))
    out = tmp_path / "out"
    words = ["-i", image, "-l", label, "--labels", "all", "-o", out, "--quiet"]
    assert prepare.main(list(map(str, words))) == 0
    assert Geometry.load(out / "frames.json").labels.ids == (51, 102, 255)
    assert np.array_equal(kept(out / "seg" / "original"), organs() * 51)


def test_scores_of_masks_of_zero_and_one(tmp_path):
    """Disjoint masks of 0 and 1 have Dice 0, and a mask is itself whatever its values are; nothing has no Dice."""
    one = save(tmp_path / "one" / "original", ball().astype(np.uint8))
    elsewhere = save(tmp_path / "elsewhere", ball(row=24, column=34, radius=4).astype(np.uint8))
    bright = save(tmp_path / "bright", ball() * np.uint8(255))
    empty = save(tmp_path / "empty", np.zeros(SIZE, np.uint8))
    assert score(tmp_path, elsewhere, one)["dice"] == 0
    assert score(tmp_path, bright, one)["dice"] == 1
    assert score(tmp_path, bright, one.parent)["dice"] == 1
    row = score(tmp_path, empty, empty)
    assert row["dice"] is None and row["iou"] is None and "undefined" in row["notes"][-1]
    assert score(tmp_path, empty, one)["dice"] == 0


def test_training_and_meshes_see_the_same_mask(tmp_path, capsys):
    folders = {
        "0001": save(tmp_path / "a" / "original", ball().astype(np.uint8)),
        "0255": save(tmp_path / "b" / "original", ball() * np.uint8(255)),
        "palette": save(tmp_path / "c" / "original", ball().astype(np.uint8), "P", [0, 0, 0, 128, 0, 0]),
    }
    read = [Frames.read(folder, masks=True) for folder in folders.values()]
    for frames in read:
        assert np.array_equal(frames.levels, read[1].levels) and frames.channels == 1
    meshes = []
    for folder in folders.values():
        out = str(tmp_path / "mesh")
        assert slices_to_ply.main(["-i", str(folder), "-o", out, "--quiet"]) == 0
        meshes.append(read_mesh(next(Path(out).iterdir())))
    for mesh in meshes:
        assert np.array_equal(mesh.vertices, meshes[1].vertices)
    with threads(1):
        capsys.readouterr()
        train_at(
            tmp_path / "a", tmp_path / "out", "--pipeline", "seg", "--iterations", 2, "--test_iterations", 2
        )
    rows = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert rows[-1]["dice"] < 0.9, "two iterations teach nothing: a Dice of 1 would be one of nothing"


def test_what_may_be_either_is_asked_for(tmp_path):
    """Three values up to full scale: prepare and evaluate ask, and do as they are told."""
    stack = np.where(ball(), 255, np.where(ball(column=28.0), 120, 0)).astype(np.uint8)
    images = save(tmp_path / "img", np.random.default_rng(0).integers(0, 255, SIZE).astype(np.uint8))
    label = save(tmp_path / "label", stack)
    words = ["-i", str(images), "-l", str(label), "-o", str(tmp_path / "out"), "--quiet", "--force"]
    with pytest.raises(UserError, match=r"--labels all, --label_value V or --soft"):
        prepare.main(words)
    seg = tmp_path / "out" / "seg" / "original"
    prepare.main([*words, "--soft"])
    assert np.array_equal(kept(seg) == 255, ball())
    prepare.main([*words, "--label_value", "120"])
    assert np.array_equal(kept(seg) == 255, stack == 120)
    prepare.main([*words, "--labels", "all"])
    assert np.array_equal(kept(seg), stack)
    mask = save(tmp_path / "mask", ball() * np.uint8(255))
    with pytest.raises(UserError, match="--soft"):
        evaluate.main(["masks", str(label), str(label)])
    assert score(tmp_path, label, label, "--soft")["dice"] == 1
    row = score(tmp_path, label, mask)
    assert row["dice"] == 1 and "half of full scale" in row["notes"][-1], "beside a mask it can only be soft"


def test_labels_that_are_kept_apart(tmp_path, capsys):
    """Numbers survive, names and colours go to frames.json, and what is merged without --labels is named."""
    image = save_volume(tmp_path / "image.nii.gz", np.random.default_rng(0).random(SIZE).astype(np.float32))
    label = save_volume(tmp_path / "label.nii.gz", organs())
    table = tmp_path / "names.csv"
    table.write_text("id,name,colour\n1,liver,#c08040\n2,left kidney,\n5,spleen,\n9,other,\n")
    out = tmp_path / "out"
    words = ["-i", str(image), "-l", str(label), "-o", str(out), "--label_names", str(table), "--force"]
    prepare.main(words)
    assert "labels 1 liver, 2 left kidney, 5 spleen count as one mask" in capsys.readouterr().out
    assert np.array_equal(kept(out / "seg" / "original") == 255, organs() != 0)
    for labels, ids in ((["all"], (1, 2, 5)), (["1", "spleen"], (1, 5)), (["left_kidney"], (2,))):
        prepare.main([*words, "--labels", *labels])
        stack = kept(out / "seg" / "original")
        assert stack.dtype == np.uint8 and np.array_equal(
            stack, np.where(np.isin(organs(), ids), organs(), 0)
        )
        known = Geometry.load(out / "frames.json").labels
        assert known.ids == ids and known == LabelTable.read(table).of(ids)
    assert known[2].name == "left kidney"
    for labels, message in (
        (["7"], "has no label 7: it holds 1, 2, 5"),
        (["other"], "has no label other"),
        (["lung"], "--labels lung: no label has that name: there are 1 liver"),
    ):
        with pytest.raises(UserError, match=message):
            prepare.main([*words, "--labels", *labels])
    wide = save_volume(tmp_path / "wide.nii.gz", organs().astype(np.int32) * 1000)
    prepare.main([*words[:3], str(wide), *words[4:], "--labels", "all"])
    assert kept(out / "seg" / "original").dtype == np.uint16
    assert Geometry.load(out / "frames.json").labels.ids == (1000, 2000, 5000)
    huge = save_volume(tmp_path / "huge.nii.gz", organs().astype(np.int32) * 20000)
    with pytest.raises(UserError, match="label 100000: frames hold labels from 1 to 65535"):
        prepare.main([*words[:3], str(huge), *words[4:], "--labels", "all"])
    with pytest.raises(UserError, match="fractions"):
        off = save_volume(tmp_path / "off.nii.gz", organs() * 1.3)
        prepare.main([*words[:3], str(off), *words[4:], "--labels", "all"])


def test_a_mask_for_each_structure(tmp_path, capsys):
    """Names come from the files; voxels in two of them belong to the first, and are counted."""
    image = save_volume(tmp_path / "image.nii.gz", np.random.default_rng(0).random(SIZE).astype(np.float32))
    first, second = ball(), ball(column=22.0)
    save_volume(tmp_path / "liver.nii.gz", first.astype(np.uint8))
    save_volume(tmp_path / "kidney_left.nii.gz", second * np.uint8(255))
    files = [str(tmp_path / "liver.nii.gz"), str(tmp_path / "kidney_left.nii.gz")]
    prepare.main(["-i", str(image), "-l", *files, "-o", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert f"{(first & second).sum():,} voxels are in several files: the one named first gets them" in said
    expected = np.where(first, 1, np.where(second, 2, 0))
    assert np.array_equal(kept(tmp_path / "out" / "seg" / "original"), expected)
    labels = Geometry.load(tmp_path / "out" / "frames.json").labels
    assert [(label.id, label.name) for label in labels] == [(1, "liver"), (2, "kidney_left")]


def test_a_label_of_several_layers(tmp_path):
    """One-hot: the label's layer is chosen apart from the image's frame."""
    values = np.random.default_rng(0).random((*SIZE[::-1], 2)).astype(np.float32)
    layers = np.stack([(organs() == number).transpose(2, 1, 0) for number in (1, 2, 5)], 3).astype(np.uint8)
    for name, array in (("image", values), ("label", layers)):
        nibabel.save(nibabel.Nifti1Image(array, np.diag([-1.0, -1, 2, 1])), tmp_path / f"{name}.nii.gz")
    words = ["-i", str(tmp_path / "image.nii.gz"), "-l", str(tmp_path / "label.nii.gz"), "--frame", "0"]
    words += ["-o", str(tmp_path / "out"), "--quiet"]
    with pytest.raises(UserError, match=r"holds 3 layers: choose one with --label_frame 0 \.\.\. 2"):
        prepare.main(words)
    prepare.main([*words, "--label_frame", "2"])
    assert np.array_equal(kept(tmp_path / "out" / "seg" / "original") == 255, organs() == 5)


def test_masks_on_some_slices(tmp_path, capsys):
    """Every third slice painted is seen, taken or left as told; a folder of fewer masks goes by their numbers."""
    image = save_volume(tmp_path / "image.nii.gz", np.random.default_rng(0).random(SIZE).astype(np.float32))
    sparse = ball(radius=14.0) & (np.arange(SIZE[0]) % 3 == 0)[:, None, None]
    label = save_volume(tmp_path / "label.nii.gz", sparse.astype(np.uint8))
    out = tmp_path / "out"
    words = ["-i", str(image), "-l", str(label), "-o", str(out), "--force", "--label_slices"]

    def names():
        return [int(path.stem) for path in image_files(out / "seg" / "original")]

    for told, expected in (
        ("auto", [0, 3, 6]),
        ("all", list(range(8))),
        ("0,3", [0, 3]),
        ("0:7:2", [0, 2, 4, 6]),
    ):
        prepare.main([*words, told])
        said = capsys.readouterr().out
        assert names() == expected
        assert (f"masks on {len(expected)} of 8 slices" in said) == (len(expected) < 8)
        assert ("count as painted" in said) == (told == "auto")
    for told, message in (
        ("every", "give auto"),
        ("9", "slices 0 to 7"),
        ("1", "nothing is labelled in these"),
    ):
        with pytest.raises(UserError, match=message):
            prepare.main([*words, told])
    prepare.main(
        [
            *words[:3],
            str(save_volume(tmp_path / "dense.nii.gz", ball(radius=14.0) * np.uint8(1))),
            *words[4:],
            "auto",
        ]
    )
    assert names() == list(range(8)), "slices of a structure have neighbours: those without are empty"

    images = save(tmp_path / "frames", np.random.default_rng(0).integers(0, 255, SIZE).astype(np.uint8))
    masks = save(tmp_path / "masks", ball() * np.uint8(255))
    for number in (0, 1, 2, 5, 7):
        (masks / f"{number:04d}.png").unlink()
    prepare.main(["-i", str(images), "-l", str(masks), "-o", str(out), "--force"])
    assert names() == [3, 4, 6] and np.array_equal(kept(out / "seg" / "original") == 255, ball()[[3, 4, 6]])
    (masks / "0006.png").rename(masks / "0016.png")
    with pytest.raises(UserError, match="there is no frame 16"):
        prepare.main(["-i", str(images), "-l", str(masks), "-o", str(out), "--force"])


def test_label_maps_are_scored_label_by_label(tmp_path):
    truth = organs()
    predicted = truth.copy()
    predicted[:, :, 26:] = np.where(predicted[:, :, 26:] == 2, 0, predicted[:, :, 26:])
    first, second = save(tmp_path / "p", predicted), save(tmp_path / "t", truth)
    row = score(tmp_path, first, second)
    dice = {
        i: 2 * ((predicted == i) & (truth == i)).sum() / ((predicted == i).sum() + (truth == i).sum())
        for i in (1, 2, 5)
    }
    assert row["labels"] == 3 and row["dice"] == pytest.approx(np.mean(list(dice.values())))
    assert [row[f"dice {i}"] for i in (1, 2, 5)] == pytest.approx(list(dice.values()))
    table = tmp_path / "dataset.json"
    table.write_text(
        json.dumps({"labels": {"background": 0, "liver": 1, "kidney": 2, "spleen": 5, "lung": 7}})
    )
    row = score(tmp_path, first, second, "--labels", "kidney", "5", "--label_names", table)
    assert row["dice kidney"] == pytest.approx(dice[2]) and "dice liver" not in row
    one = save(tmp_path / "one", (truth != 0).astype(np.uint8))
    row = score(tmp_path, one, second)
    assert row["dice"] == 1 and any("labels 1, 2, 5 count as one mask" in note for note in row["notes"])
    volumes = [save_volume(tmp_path / f"{k}.nii.gz", stack) for k, stack in enumerate((predicted, truth))]
    row = score(tmp_path, *volumes, "--surfaces")
    assert row["asd 1"] == pytest.approx(0, abs=1e-6) and row["asd 2"] > 0.1 and row["hd95"] > 0


# ---- names and colours -----------------------------------------------------------------------------------------------


def test_tables_of_labels(tmp_path):
    """The formats in which programs of this field write what a number means."""
    liver, left = Label(1, "liver", (200, 100, 50)), Label(2, "left kidney", (10, 20, 30))
    texts = {
        "list.json": json.dumps([{"id": 1, "name": "liver", "colour": [200, 100, 50]},
                                 {"id": 2, "name": "left kidney", "color": "#0a141e"}]),
        "ours.json": json.dumps({"labels": LabelTable((liver, left)).to_json()}),
        "plain.csv": 'id,name,colour\n1,liver,"200,100,50"\n2,left kidney,0a141e\n',
        "slicer.csv": "LabelValue,Name,Color_R,Color_G,Color_B,Color_A\n0,background,0,0,0,0\n"
        "1,liver,200,100,50,255\n2,left kidney,10,20,30,255\n",
        "slicer.ctbl": "# Color table file\n0 Background 0 0 0 0\n1 liver 200 100 50 255\n2 left_kidney 10 20 30 255\n",
        "snap.txt": '# ITK-SnAP\n0 0 0 0 0 0 0 "Clear Label"\n1 200 100 50 1 1 1 "liver"\n'
        '2 10 20 30 1 1 1 "left kidney"\n',
    }  # fmt: skip
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
        assert LabelTable.read(tmp_path / name) == LabelTable((liver, left)), name
    for name, text in {
        "new.json": json.dumps({"labels": {"background": 0, "liver": 1, "left kidney": 2}}),
        "old.json": json.dumps({"labels": {"0": "background", "1": "liver", "2": "left kidney"}}),
        "total.csv": "Index,TotalSegmentator_name,TA2_name\n1,liver,\n2,left kidney,kidney\n",
    }.items():
        (tmp_path / name).write_text(text)
        assert [(i.id, i.name) for i in LabelTable.read(tmp_path / name)] == [
            (1, "liver"),
            (2, "left kidney"),
        ]
    for name, text, message in (
        ("a.json", "[1", "is not a table"),
        ("b.csv", "name,colour\nliver,red\n", "columns id and name"),
        ("c.csv", "id,name\n1,liver\n1,spleen\n", "id 1 is there twice"),
        ("d.json", json.dumps({"labels": {"tumour": [1, 2]}}), "region"),
        ("e.csv", "id,name\n0,background\n", "names no label"),
        ("f.txt", "hello\n", "is not"),
        ("g.csv", "id,name,colour\n1,liver,300 0 0\n", "three bytes"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=message):
            LabelTable.read(tmp_path / name)


@settings(max_examples=30, deadline=None)
@given(st.sets(st.integers(1, 65535), min_size=1, max_size=20), st.text(min_size=1, max_size=8))
def test_a_table_survives_json(ids, name):
    table = LabelTable(tuple(Label.of(number, name) for number in sorted(ids)))
    assert LabelTable.from_json(json.loads(json.dumps(table.to_json()))) == table
