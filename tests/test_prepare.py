"""prepare.py as a user runs it: real and synthetic volumes in, frames and masks out, one line for every mistake."""

import gzip
import os
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
from nibabel.affines import apply_affine

import slices_to_ply
from patient.geometry import Geometry
from prepare import main
from scene.frames import write_mirror
from utils.errors import UserError
from utils.images import image_files, read_image, write_image

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(nibabel.__path__[0]) / "tests" / "data"
EXAMPLE_4D = DATA / "example4d.nii.gz"


def _save(path, values, affine=None, **header):
    image = nibabel.Nifti1Image(values, np.diag([1.0, 1.0, 2.5, 1.0]) if affine is None else affine)
    for name, value in header.items():
        image.header[name] = value
    nibabel.save(image, path)
    return str(path)


@pytest.fixture
def volume(tmp_path):
    """A RAS volume (6, 7, 5) int16 of distinct values with coarse axis 2."""
    values = np.random.default_rng(0).permutation(6 * 7 * 5).reshape(6, 7, 5).astype(np.int16)
    return _save(tmp_path / "volume.nii.gz", values)


def _frames(folder):
    return np.stack([read_image(path) for path in image_files(folder)])


def test_real_oblique_scan(tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["-i", str(EXAMPLE_4D), "-o", str(out), "--frame", "1"]) == 0
    frames, geometry = _frames(out / "img" / "original"), Geometry.load(out / "frames.json")
    image = nibabel.load(EXAMPLE_4D)
    source = image.get_fdata()[..., 1]
    assert frames.shape == (24, 96, 128) and frames.dtype == np.uint16
    assert geometry.axis == 2 and geometry.volume == 1 and geometry.source == "example4d.nii.gz"
    assert geometry.window == tuple(np.percentile(source, (0.5, 99.5)))

    # Every pixel, put back through the recorded affine and window, is its voxel to half a step of 16 bits.
    indices = np.random.default_rng(0).integers(0, (128, 96, 24), (500, 3))
    voxels = apply_affine(np.linalg.inv(image.affine) @ geometry.matrix, indices).round().astype(int)
    low, high = geometry.window
    restored = low + frames[indices[:, 2], indices[:, 1], indices[:, 0]] / 65535 * (high - low)
    expected = np.clip(source[tuple(voxels.T)], low, high)
    assert np.abs(restored - expected).max() <= 0.5 * (high - low) / 65535 * (1 + 1e-6)

    printed = capsys.readouterr().out
    assert "128 x 96 x 24" in printed and "24 frames" in printed and str(out / "img") in printed


@pytest.mark.parametrize("name", ["standard.nii.gz", "anatomical.nii", "example_nifti2.nii.gz"])
def test_other_real_files(tmp_path, name):
    index = ["--frame", "0"] if nibabel.load(DATA / name).ndim == 4 else []
    assert main(["-i", str(DATA / name), "-o", str(tmp_path / "out"), "--quiet", *index]) == 0
    geometry = Geometry.load(tmp_path / "out" / "frames.json")
    frames = _frames(tmp_path / "out" / "img" / "original")
    assert frames.shape == (len(geometry.slices), geometry.size[1], geometry.size[0])


def test_axes_and_bits(tmp_path, volume):
    values = nibabel.load(volume).get_fdata()
    turned = {  # RAS: what an axial, coronal and sagittal frame in radiological convention is
        "2": values[::-1, ::-1, 1].T,
        "1": values[::-1, 1, ::-1].T,
        "0": values[1, ::-1, ::-1].T,
    }
    for axis, expected in turned.items():
        out = tmp_path / axis
        main(["-i", volume, "-o", str(out), "--axis", axis, "--window", "0", "255", "--bits", "8", "--quiet"])
        frame = read_image(out / "img" / "original" / "0001.png")
        assert frame.dtype == np.uint8 and np.array_equal(frame, expected)


@pytest.mark.parametrize(
    "spacing, axis", [((1, 1, 2), 2), ((1, 3, 2), 1), ((2, 1, 1), 0), ((1, 1, 1), 2), ((2, 2, 1), 1)]
)
def test_auto_takes_the_coarsest_axis_and_the_last_of_equals(tmp_path, spacing, axis):
    path = _save(tmp_path / "a.nii", np.arange(60, dtype=np.uint8).reshape(3, 4, 5), np.diag([*spacing, 1.0]))
    main(["-i", path, "-o", str(tmp_path / "out"), "--quiet"])
    geometry = Geometry.load(tmp_path / "out" / "frames.json")
    assert geometry.axis == axis and geometry.bits == 8
    assert geometry.spacing[2] == max(spacing)


def test_keep_every(tmp_path, volume):
    main(["-i", volume, "-l", volume, "-o", str(tmp_path / "all"), "--quiet"])
    main(["-i", volume, "-l", volume, "-o", str(tmp_path / "some"), "--quiet", "--keep_every", "2"])
    for kind in ("img", "seg"):
        kept = _frames(tmp_path / "some" / kind / "original")
        assert np.array_equal(kept, _frames(tmp_path / "all" / kind / "original")[::2])
        heldout = tmp_path / "some" / kind / "heldout"
        assert sorted(os.listdir(heldout)) == ["0001.png", "0003.png"]  # by their source slice
        assert np.array_equal(_frames(heldout), _frames(tmp_path / "all" / kind / "original")[1::2])
        assert os.listdir(tmp_path / "all" / kind) == ["original"]
    geometry = Geometry.load(tmp_path / "some" / "frames.json")
    assert geometry.heldout_slices == (1, 3) and geometry.heldout_indices() == [0.5, 1.5]
    assert (
        geometry.slices == (0, 2, 4) and geometry.positions == (0.0, 5.0, 10.0) and geometry.spacing[2] == 5.0
    )


def test_masks_left_out_and_mirrored_are_no_cases_of_meshes(tmp_path, volume):
    label = np.zeros((6, 7, 5), np.uint8)
    label[2:4, 2:5, 1:4] = 1
    label = _save(tmp_path / "label.nii.gz", label)
    main(["-i", volume, "-l", label, "-o", str(tmp_path / "out"), "--keep_every", "2", "--quiet"])
    write_mirror(
        tmp_path / "out" / "seg" / "original", tmp_path / "out" / "seg" / "mirror"
    )  # as train.py does
    slices_to_ply.main(
        ["-i", str(tmp_path / "out" / "seg"), "-o", str(tmp_path / "mesh"), "--smoothing", "none"]
    )
    assert os.listdir(tmp_path / "mesh") == ["out.ply"]


def test_label_values(tmp_path, volume):
    labels = np.zeros((6, 7, 5), np.uint8)
    labels[1], labels[2], labels[3] = 1, 2, 3
    label = _save(tmp_path / "label.nii.gz", labels)
    for arguments, rows in ((["--label_value", "1", "3"], (1, 3)), ([], (1, 2, 3))):
        out = tmp_path / str(len(rows))
        main(["-i", volume, "-l", label, "-o", str(out), "--quiet", *arguments])
        masks = _frames(out / "seg" / "original")
        assert masks.dtype == np.uint8
        expected = np.zeros(6, int)
        expected[list(rows)] = 255
        assert np.array_equal(
            masks, np.broadcast_to(expected[::-1], (5, 7, 6))
        )  # columns run from right to left


def test_label_on_another_grid_is_resampled_and_that_is_said(tmp_path, volume, capsys):
    """A label at half the spacing, with flipped axes and a larger field of view: nearest neighbour is exact here."""
    inside = np.zeros((6, 7, 5), bool)
    inside[2:5, 1:6, 1:4] = True
    fine = inside.repeat(2, 0).repeat(2, 1).repeat(2, 2)
    fine = np.pad(fine, 3)[::-1, :, ::-1]
    affine = np.diag([1.0, 1.0, 2.5, 1.0]) @ np.diag([0.5, 0.5, 0.5, 1.0])
    affine[:3, 3] = np.array([1.0, 1.0, 2.5]) * (-0.25 - 1.5)
    flip = np.diag([-1.0, 1.0, -1.0, 1.0])
    flip[:3, 3] = fine.shape[0] - 1, 0, fine.shape[2] - 1
    label = _save(tmp_path / "fine.nii.gz", fine.astype(np.uint8), affine @ flip)
    same = _save(tmp_path / "same.nii.gz", inside.astype(np.uint8))
    main(["-i", volume, "-l", label, "-o", str(tmp_path / "a")])
    assert "nearest-neighbour resampling keeps 100.0% of its volume" in capsys.readouterr().out
    main(["-i", volume, "-l", same, "-o", str(tmp_path / "b")])
    assert "nearest" not in capsys.readouterr().out
    assert np.array_equal(
        _frames(tmp_path / "a" / "seg" / "original"), _frames(tmp_path / "b" / "seg" / "original")
    )


def test_what_is_odd_in_a_label_is_said(tmp_path, volume, capsys):
    labels = np.zeros((6, 7, 5), np.float32)
    labels[1, 2, 3], labels[2:4, 3, 3], labels[4, 4, 4] = np.nan, 2, np.inf
    label = _save(tmp_path / "label.nii", labels)
    main(["-i", volume, "-l", label, "-o", str(tmp_path / "out"), "--label_value", "2", "9"])
    said = capsys.readouterr().out
    assert f"2 voxels of {label} are NaN or infinite" in said and "has the value 9" in said
    assert (_frames(tmp_path / "out" / "seg" / "original") > 0).sum() == 2
    main(["-i", volume, "-l", label, "-o", str(tmp_path / "out"), "--force", "--quiet"])
    assert (_frames(tmp_path / "out" / "seg" / "original") > 0).sum() == 2


def test_a_label_with_millimetres_for_frames_without(tmp_path, capsys):
    for number in range(5):
        write_image(tmp_path / "in" / f"{number}.png", np.full((7, 6), number / 5))
    labels = np.zeros((6, 7, 5), np.uint8)
    labels[1, 2, 3] = 1
    label = _save(tmp_path / "label.nii", labels)
    main(["-i", str(tmp_path / "in"), "-l", label, "-o", str(tmp_path / "out")])
    assert "only one of them gives millimetres" in capsys.readouterr().out
    assert np.argwhere(_frames(tmp_path / "out" / "seg" / "original")).tolist() == [[3, 2, 1]]


def test_fractional_labels_are_cut_at_a_half(tmp_path, volume, capsys):
    label = _save(tmp_path / "label.nii", np.linspace(0, 1, 210, dtype=np.float32).reshape(6, 7, 5))
    main(["-i", volume, "-l", label, "-o", str(tmp_path / "out")])
    assert "0.5 and more" in capsys.readouterr().out
    assert (_frames(tmp_path / "out" / "seg" / "original") > 0).sum() == 105


def test_nan_and_infinity_get_the_low_end_and_are_counted(tmp_path, capsys):
    values = np.random.default_rng(0).random((4, 5, 6)).astype(np.float32) + 1
    values[0, 0, 0], values[1, 1, 1], values[2, 2, 2] = np.nan, np.inf, -np.inf
    path = _save(
        tmp_path / "a.nii", values, np.diag([-1.0, -1.0, 1.0, 1.0])
    )  # LPS: frames are slices transposed
    main(["-i", path, "-o", str(tmp_path / "out")])
    assert "3 voxels are NaN or infinite" in capsys.readouterr().out
    frames = _frames(tmp_path / "out" / "img" / "original")
    assert frames[0, 0, 0] == frames[1, 1, 1] == frames[2, 2, 2] == 0
    low, high = Geometry.load(tmp_path / "out" / "frames.json").window
    assert (low, high) == tuple(np.percentile(values[np.isfinite(values)], (0.5, 99.5)))


def test_rare_structures_widen_an_empty_default_window(tmp_path, capsys):
    values = np.zeros((10, 10, 10), np.uint8)
    values[5, 5, 5] = 200
    main(["-i", _save(tmp_path / "a.nii", values), "-o", str(tmp_path / "out")])
    assert "whole range" in capsys.readouterr().out
    assert Geometry.load(tmp_path / "out" / "frames.json").window == (0.0, 200.0)


def test_units_other_than_millimetres(tmp_path):
    for code, factor in ((1, 1000.0), (2, 1.0), (3, 0.001)):  # metres, millimetres, micrometres
        path = _save(
            tmp_path / f"{code}.nii", np.arange(60, dtype=np.uint8).reshape(3, 4, 5), xyzt_units=code
        )
        main(["-i", path, "-o", str(tmp_path / str(code)), "--quiet"])
        spacing = Geometry.load(tmp_path / str(code) / "frames.json").spacing
        assert spacing == pytest.approx((factor, factor, 2.5 * factor))


def test_a_header_without_orientation_is_mentioned(tmp_path, capsys):
    image = nibabel.Nifti1Image(np.arange(60, dtype=np.uint8).reshape(3, 4, 5), None)
    image.header.set_zooms((1, 1, 3))
    nibabel.save(image, tmp_path / "a.nii")
    main(["-i", str(tmp_path / "a.nii"), "-o", str(tmp_path / "out")])
    assert "no orientation" in capsys.readouterr().out


@pytest.mark.parametrize("shape, bits", [((5, 4), 8), ((5, 4), 16), ((5, 4, 3), 8), ((5, 4, 4), 16)])
def test_a_folder_of_images_goes_through_unchanged(tmp_path, shape, bits):
    levels = np.random.default_rng(0).integers(0, 2**bits, (12, *shape))
    for number, frame in enumerate(levels):
        write_image(tmp_path / "in" / f"{number + 1}.png", frame / (2**bits - 1), bits)  # 10.png after 9.png
    main(["-i", str(tmp_path / "in"), "-o", str(tmp_path / "out"), "--quiet"])
    frames = _frames(tmp_path / "out" / "img" / "original")
    assert np.array_equal(frames, levels) and frames.dtype == (np.uint8 if bits == 8 else np.uint16)
    geometry = Geometry.load(tmp_path / "out" / "frames.json")
    assert geometry.affine is None and geometry.size == (4, 5)


def test_a_label_folder_for_an_image_folder(tmp_path):
    masks = np.zeros((3, 5, 4))
    masks[1, 2, 3] = 1
    for number in range(3):
        write_image(tmp_path / "in" / f"{number}.png", np.full((5, 4), number / 3))
        write_image(tmp_path / "label" / f"{number}.png", np.dstack([masks[number]] * 3 + [np.ones((5, 4))]))
    main(["-i", str(tmp_path / "in"), "-l", str(tmp_path / "label"), "-o", str(tmp_path / "out"), "--quiet"])
    assert np.array_equal(_frames(tmp_path / "out" / "seg" / "original"), masks * 255)


def test_force_replaces_frames_and_nothing_else(tmp_path, volume):
    out = tmp_path / "out"
    command = ["-i", volume, "-o", str(out), "--quiet"]
    out.mkdir()  # an empty folder is no obstacle
    main([*command, "-l", volume])
    (out / "img" / "mirror").mkdir()
    with pytest.raises(UserError, match="--force"):
        main(command)
    main([*command, "--force", "--keep_every", "2"])
    assert sorted(os.listdir(out)) == ["frames.json", "img"]
    assert sorted(os.listdir(out / "img")) == ["heldout", "original"]
    main([*command, "--force", "--keep_every", "2"])  # heldout is ours too
    assert len(os.listdir(out / "img" / "original")) == 3
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"thesis\.tex"):
        main([*command, "--force"])
    assert (out / "thesis.tex").exists()


def _bad_inputs(folder):
    """name -> (arguments, what the error says)"""
    cube = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
    good = _save(folder / "good.nii.gz", cube)
    singular = nibabel.Nifti1Image(cube, np.eye(4))
    singular.header["sform_code"], singular.header["srow_x"] = 1, singular.header["srow_y"]
    nibabel.save(singular, folder / "singular.nii")
    raw = bytearray((folder / "singular.nii").read_bytes())
    raw[280:296] = raw[296:312]  # srow_x = srow_y
    (folder / "singular.nii").write_bytes(raw)
    (folder / "text.nii").write_text("hello")
    (folder / "text.nii.gz").write_text("hello")
    (folder / "text.doc").write_text("hello")
    (folder / "short.nii.gz").write_bytes(gzip.compress(gzip.decompress(Path(good).read_bytes())[:400]))
    (folder / "cut.nii.gz").write_bytes(Path(good).read_bytes()[:-30])
    (folder / "empty").mkdir()
    for number, side in enumerate((4, 5)):
        write_image(folder / "sizes" / f"{number}.png", np.zeros((side, 4)))
        write_image(folder / "pair" / f"{number}.png", np.zeros((4, 4)))
    far = np.eye(4)
    far[:3, 3] = 1000
    colours = np.zeros((3, 4, 5), [("R", "u1"), ("G", "u1"), ("B", "u1")])

    def label(name, values, affine=None):
        return ["-i", good, "-l", _save(folder / f"{name}.nii.gz", values, affine)]

    return {
        "missing": (["-i", str(folder / "none.nii.gz")], "does not exist"),
        "not a NIfTI": (["-i", str(folder / "text.nii")], "not a NIfTI file"),
        "not even gzip": (["-i", str(folder / "text.nii.gz")], "not a NIfTI file"),
        "another kind": (["-i", str(folder / "text.doc")], "is not a kind of file that can be read"),
        "truncated": (["-i", str(folder / "short.nii.gz")], "damaged"),
        "truncated gzip": (["-i", str(folder / "cut.nii.gz")], "damaged"),
        "2-D": (["-i", _save(folder / "2d.nii", cube[0])], "2-D"),
        "5-D": (["-i", _save(folder / "5d.nii", np.zeros((2, 3, 4, 2, 2), np.uint8))], "5-D"),
        "4-D without --frame": (["-i", str(EXAMPLE_4D)], "choose one with --frame 0 ... 1"),
        "no such volume": (["-i", str(EXAMPLE_4D), "--frame", "2"], "there is no --frame 2"),
        "negative volume": (["-i", str(EXAMPLE_4D), "--frame", "-1"], "there is no --frame -1"),
        "3-D with --frame": (["-i", good, "--frame", "1"], "holds one volume"),
        "singular affine": (["-i", str(folder / "singular.nii")], "singular"),
        "colours": (["-i", _save(folder / "rgb.nii", colours)], "colours"),
        "complex": (["-i", _save(folder / "complex.nii", cube.astype(np.complex64))], "complex"),
        "empty window": (["-i", good, "--window", "5", "5"], "--window 5 5 is empty"),
        "inverted window": (["-i", good, "--window", "5", "1"], "LO has to be below HI"),
        "empty percentiles": (["-i", good, "--percentiles", "50", "50"], "--percentiles 50 50 is empty"),
        "wild percentiles": (["-i", good, "--percentiles", "-1", "101"], "0 to 100"),
        "constant": (["-i", _save(folder / "flat.nii", cube * 0)], "everywhere"),
        "all NaN": (["-i", _save(folder / "nan.nii", np.full((3, 4, 5), np.nan, np.float32))], "no finite voxel"),
        "one slice": (["-i", good, "--keep_every", "9"], "at least 2"),
        "no such axis": (["-i", good, "--axis", "3"], "--axis"),
        "keep none": (["-i", good, "--keep_every", "0"], "--keep_every"),
        "no images": (["-i", str(folder / "empty")], "no images"),
        "images of two sizes": (["-i", str(folder / "sizes")], "1.png is 4 x 5 grey uint8, but 0.png is 4 x 4"),
        "label missing": (["-i", good, "-l", str(folder / "none.nii.gz")], "does not exist"),
        "label apart": (label("apart", cube, far), "does not overlap"),
        "label empty": (label("nothing", cube * 0), "is empty"),
        "label value absent": ([*label("few", cube % 3), "--label_value", "7"], "is of value 7 (it holds 0, 1, 2)"),
        "label shape": (["-i", str(folder / "pair"), "-l", good], "has shape (3, 4, 5), but pair (4, 4, 2)"),
        "unknown flag": (["-i", good, "--nope"], "unrecognized arguments: --nope"),
        "abbreviated flag": (["-i", good, "--keep", "2"], "unrecognized"),
        "out is a file": (["-i", good, "-o", good], "is a file"),
    }  # fmt: skip


def test_every_mistake_is_one_line_and_writes_nothing(tmp_path):
    (tmp_path / "in").mkdir()
    before = None
    for name, (arguments, message) in _bad_inputs(tmp_path / "in").items():
        before = before or sorted(tmp_path.rglob("*"))
        if "-o" not in arguments:
            arguments = [*arguments, "-o", str(tmp_path / "made" / "out")]
        with pytest.raises(UserError) as error:
            main(arguments)
            pytest.fail(f"{name}: no error")
        assert message in str(error.value), name
        assert "\n" not in str(error.value), name
        assert sorted(tmp_path.rglob("*")) == before, name


def test_a_failure_while_writing_leaves_the_old_frames(tmp_path, volume, monkeypatch):
    out = tmp_path / "out"
    main(["-i", volume, "-o", str(out), "--quiet"])
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    monkeypatch.setattr(Geometry, "save", lambda *_: (_ for _ in ()).throw(OSError(28, "disk full")))
    with pytest.raises(
        OSError, match=r"No space left on device: .*/out"
    ):  # a word and status 2: utils.errors.run
        main(["-i", volume, "-o", str(out), "--quiet", "--force", "--bits", "8"])
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert sorted(os.listdir(tmp_path)) == ["out", "volume.nii.gz"]


def test_as_a_script(tmp_path, volume):
    def run(*arguments):
        return subprocess.run(
            [sys.executable, ROOT / "prepare.py", *arguments], capture_output=True, text=True, cwd=tmp_path
        )

    done = run("-i", volume, "-o", "out")
    assert done.returncode == 0 and done.stderr == "" and "train with -s out/img" in done.stdout
    failed = run("-i", "none.nii", "-o", "out2")
    assert failed.returncode == 2 and failed.stdout == ""
    assert failed.stderr == "prepare.py: error: none.nii does not exist\n"
    assert run("--help").returncode == 0
