"""Malformed files, frames, options and arguments: a correct result, or an error that says what is wrong.

Reading a file raises `UserError` and nothing else, whatever the bytes; an error of numpy or torch would be a
traceback to a user.
"""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sequences import blobs, write
from test_checkpoint import make_checkpoint
from test_point_cloud import make_params

import evaluate
import interpolate
import prepare
import render
import slices_to_ply
import train
from arguments import read_cfg_args, render_options, train_options, train_parser
from benchmarks import fuzz_files
from patient.geometry import FILE_NAME, Geometry
from scene.checkpoint import load_checkpoint, save_checkpoint
from scene.frames import Frames
from scene.point_cloud import read_point_cloud, write_point_cloud
from utils.errors import UserError, run
from utils.images import MAX_PIXELS, limit_pixels, read_image, write_image

ROOT = Path(__file__).resolve().parent.parent
quick = settings(
    max_examples=150, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


# ---- operators -----------------------------------------------------------------------------------------------------


def test_the_operators_survive_what_they_are_given(tmp_path):
    """In its own process, which a crash would end."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-W",
            "ignore",
            "-p",
            "no:cacheprovider",
            "tests/operators_fuzz.py",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "FUZZ_EXAMPLES": os.environ.get("FUZZ_EXAMPLES", "150")},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert re.search(r"7 passed", done.stdout)


# ---- bytes ---------------------------------------------------------------------------------------------------------


@st.composite
def damage(draw):
    """Changes to a file's bytes: flipped, inserted, removed, cut off."""
    return draw(
        st.lists(
            st.tuples(
                st.sampled_from(["flip", "insert", "remove", "cut"]),
                st.floats(0, 1, exclude_max=True),  # where
                st.binary(min_size=1, max_size=8),
            ),
            min_size=1,
            max_size=4,
        )
    )


def damaged(data: bytes, changes: list[tuple[str, float, bytes]]) -> bytes:
    for kind, share, what in changes:
        at = int(share * len(data))
        if kind == "flip":
            data = data[:at] + what + data[at + len(what) :]
        elif kind == "insert":
            data = data[:at] + what + data[at:]
        elif kind == "remove":
            data = data[:at] + data[at + len(what) :]
        else:
            data = data[:at]
    return data


def survives(read, path, data):
    path.write_bytes(data)
    try:
        return read(path)
    except UserError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return None


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """A file of each kind, as bytes, and the function that reads it."""
    folder = tmp_path_factory.mktemp("samples")
    save_checkpoint(folder / "a.pth", make_checkpoint(1, seg=True))
    write_point_cloud(folder / "a.ply", make_params(1, seg=True), torch.full((3,), 1 / 3))
    values = np.random.default_rng(0).random((9, 7))
    for suffix in (".png", ".tif", ".npy", ".jpg"):
        write_image(folder / f"a{suffix}", values)
    write_image(folder / "b.png", np.stack([values] * 3, 2), 16)
    (folder / "cfg_args").write_text("Namespace(a=1, b='x', c=[1, 2], d=None, e=-1.5)")
    frames = Geometry((0, 1, 2), (False, True), (7, 9), None, (0, 1), 2, (0.0, 1.0), (0.0, 255.0), 8, "x.nii")
    frames.save(folder / FILE_NAME)
    readers = {".pth": load_checkpoint, ".ply": read_point_cloud, "": read_cfg_args, ".json": Geometry.load}
    return {file.name: (file.read_bytes(), readers.get(file.suffix, read_image)) for file in folder.iterdir()}


KINDS = ["a.pth", "a.ply", "a.png", "b.png", "a.tif", "a.npy", "a.jpg", "cfg_args", FILE_NAME]


@pytest.mark.parametrize("name", KINDS)
@quick
@given(changes=damage())
def test_damaged_files_are_user_errors(samples, tmp_path_factory, name, changes):
    data, read = samples[name]
    folder = tmp_path_factory.getbasetemp() / "damaged"
    folder.mkdir(exist_ok=True)
    survives(read, folder / name, damaged(data, changes))


@pytest.mark.parametrize("name", KINDS)
@quick
@given(data=st.binary(max_size=300))
def test_bytes_of_no_kind_are_user_errors(samples, tmp_path_factory, name, data):
    folder = tmp_path_factory.getbasetemp() / "bytes"
    folder.mkdir(exist_ok=True)
    survives(samples[name][1], folder / name, data)


@quick
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=8,
    ),
    st.data(),
)
def test_checkpoints_of_other_values_are_user_errors(samples, tmp_path_factory, value, data):
    """Well-formed files with one value replaced, at any depth of what an exact resume reads."""
    path = tmp_path_factory.getbasetemp() / "chkpnt1.pth"
    contents = torch.load(io.BytesIO(samples["a.pth"][0]), weights_only=True)
    at: object = contents[0]
    keys: list[object] = []
    while isinstance(at, dict) and at:
        key = data.draw(st.sampled_from(sorted(at, key=str)))
        keys.append(key)
        if isinstance(at[key], dict) and data.draw(st.booleans()):
            at = at[key]
        else:
            at[key] = value
            break
    torch.save(contents, path)
    try:
        load_checkpoint(path)
    except UserError as error:
        assert str(path) in str(error), keys


def test_mutated_volumes_are_one_line(tmp_path):
    """Some of each kind; `python -m benchmarks.fuzz_files` reads 20,000 of them."""
    told = fuzz_files.fuzz(int(os.environ.get("FUZZ_EXAMPLES", "20")) * 16, seed=0, keep=tmp_path / "bad")
    assert told["bad"] == []


# ---- frames --------------------------------------------------------------------------------------------------------


@st.composite
def frame_sets(draw):
    """Names and pictures: with sizes, depths, kinds and numbers that may or may not match."""
    size = st.tuples(st.integers(1, 9), st.integers(1, 9))
    common = draw(size)
    frames = []
    for k in range(draw(st.integers(0, 4))):
        height, width = draw(size) if draw(st.integers(0, 9)) == 0 else common
        channels = draw(st.sampled_from([0, 0, 1, 3, 4]))
        bits = draw(st.sampled_from([8, 8, 16]))
        suffix = draw(st.sampled_from([".png", ".png", ".tif", ".npy"]))
        number = draw(st.sampled_from([f"{k:04d}", f"{k:04d}", f"slice{2 * k}", "0001", "none", str(10**30)]))
        shape = (height, width, channels) if channels else (height, width)
        frames.append((number + suffix, np.linspace(0, 1, int(np.prod(shape))).reshape(shape), bits))
    return frames


@quick
@given(frame_sets(), st.sampled_from([-1, 1, 2, 4, 8, 3, 100]))
def test_any_frames_are_read_or_refused(tmp_path_factory, frames, resolution):
    folder = tmp_path_factory.mktemp("frames")
    for name, values, bits in frames:
        write_image(folder / name, values, bits)
    try:
        read = Frames.read(folder, resolution, say=lambda _: None)
    except UserError as error:
        assert "\n" not in str(error)
        return
    assert len(read) == len({name for name, *_ in frames}) > 0
    images = read(range(len(read)), background=torch.zeros(read.channels))
    assert images.shape == (len(read), read.channels, read.height, read.width)
    assert images.isfinite().all() and images.min() >= 0 and images.max() <= 1


# ---- options -------------------------------------------------------------------------------------------------------

OPTIONS = sorted({flag for action in train_parser()._actions for flag in action.option_strings})
WORDS = st.one_of(
    st.sampled_from(OPTIONS),
    st.sampled_from(
        ["-1", "0", "1", "1e400", "nan", "inf", "True", "no", "auto", "img", "", " ", "--", "-", "8"]
    ),
    st.integers().map(str),
    st.floats().map(str),
    st.text(max_size=8),
)


@pytest.mark.parametrize("parse", [train_options, render_options])
@settings(quick, max_examples=300)
@given(words=st.lists(WORDS, max_size=6))
def test_any_words_are_options_or_user_errors(parse, words):
    if {"--help", "-h", "--version"} & set(words):
        return  # they print and end
    try:
        parse(["-s", "data", "-m", "out", *words] if parse is train_options else ["-m", "out", *words])
    except UserError as error:
        assert str(error) and "\n" not in str(error)


@quick
@given(
    st.dictionaries(
        st.sampled_from(
            ["source_path", "images", "resolution", "white_background", "distance", "max_pixels"]
        ),
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats()
        | st.text(max_size=5)
        | st.lists(st.integers()),
    )
)
def test_any_cfg_args_are_options_or_user_errors(tmp_path_factory, values):
    folder = tmp_path_factory.getbasetemp() / "cfg"
    folder.mkdir(exist_ok=True)
    words = ", ".join(f"{name}={value!r}" for name, value in values.items())
    (folder / "cfg_args").write_text(f"Namespace({words})", encoding="utf-8")
    try:
        render_options(["-m", str(folder)])
    except UserError as error:
        assert str(folder) in str(error)


# ---- files that mean harm ------------------------------------------------------------------------------------------


class Harm:
    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


PROGRAMS = {
    "train.py": train,
    "render.py": render,
    "prepare.py": prepare,
    "interpolate.py": interpolate,
    "slices_to_ply.py": slices_to_ply,
    "evaluate.py": evaluate,
}


@pytest.fixture
def call(monkeypatch, capsys):
    """A program as a user runs it, in this process: (exit status, stderr)."""

    def called(program, *arguments):
        monkeypatch.setattr(sys, "argv", [program, *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            run(PROGRAMS[program].main)
        return ended.value.code, capsys.readouterr().err

    return called


@pytest.mark.parametrize("program", ["train.py", "render.py"])
def test_programs_execute_nothing_in_a_checkpoint(tmp_path, call, program):
    out, marker = tmp_path / "out", tmp_path / "executed"
    out.mkdir()
    torch.save(({"version": 2, "_xyz": Harm(marker)}, 7), out / "chkpnt7.pth")
    data = write(tmp_path / "data", blobs(2))
    arguments = {"train.py": ["-s", data, "--start_checkpoint", out / "chkpnt7.pth"], "render.py": []}[
        program
    ]
    status, said = call(program, "-m", out, *arguments, "--device", "cpu")
    assert status == 2 and not marker.exists()
    assert "mkdir" in said and len(said.splitlines()) == 1


def test_programs_execute_nothing_in_cfg_args(tmp_path, call):
    out, marker = tmp_path / "out", tmp_path / "executed"
    out.mkdir()
    (out / "cfg_args").write_text(f"Namespace(source_path=__import__('os').mkdir({str(marker)!r}))")
    status, said = call("render.py", "-m", out)
    assert status == 2 and not marker.exists()
    assert "never executed" in said and len(said.splitlines()) == 1


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_mistake_has_a_traceback_with_debug_alone(tmp_path, call, program):
    none = tmp_path / "none"
    arguments = {
        "train.py": ["-s", none],
        "render.py": ["-m", none],
        "prepare.py": ["-i", tmp_path / "none.nii", "-o", tmp_path / "out"],
        "interpolate.py": ["-i", tmp_path / "none.nii", "-o", tmp_path / "out"],
        "slices_to_ply.py": ["-i", none, "-o", tmp_path / "out"],
        "evaluate.py": ["masks", none, none],
    }[program]
    (status, plain), (again, debug) = call(program, *arguments), call(program, *arguments, "--debug")
    assert status == again == 2
    assert len(plain.splitlines()) == 1 and plain.startswith(f"{program}: error: ")
    assert "Traceback" in debug and plain in debug


def test_a_point_cloud_of_a_billion_claimed_vertices_allocates_nothing(tmp_path):
    path = tmp_path / "a.ply"
    write_point_cloud(path, make_params(1), torch.full((3,), 1 / 3))
    path.write_bytes(path.read_bytes().replace(b"element vertex 4", b"element vertex 1000000000"))
    script = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_DATA, (1 << 31, 1 << 31))\n"  # 2 GiB; 120 claimed
        "from scene.point_cloud import read_point_cloud\n"
        f"read_point_cloud({str(path)!r})"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert "UserError" in done.stderr and "claims" in done.stderr, done.stderr


def test_text_where_a_binary_point_cloud_should_be(tmp_path):
    path = tmp_path / "a.ply"
    path.write_text("ply\nformat ascii 1.0\nelement vertex 1\nproperty float x\nend_header\n1.0\n")
    with pytest.raises(UserError, match="not binary little endian but ascii"):
        read_point_cloud(path)


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_limit_of_pixels_is_stated_and_can_be_raised(tmp_path, call, program):
    """Frames of 480 pixels, under a limit of 100 and of 480."""
    data, out = write(tmp_path / "data", blobs(3)), tmp_path / "out"
    folder = data / "original"
    arguments = {
        "train.py": ["-s", data, "--iterations", 1, "--num_pts", 20, "-m", out, "--device", "cpu"],
        "prepare.py": ["-i", folder, "-o", out],
        "interpolate.py": ["-i", folder, "-o", out, "--method", "linear"],
        "slices_to_ply.py": ["-i", folder, "-o", out, "--thresh", 100],
        "evaluate.py": ["frames", folder, folder],
        "render.py": ["-m", out, "-s", data, "--device", "cpu"],
    }[program]
    if program == "render.py":  # which looks at the frames of published checkpoints alone
        out.mkdir()
        save_checkpoint(out / "chkpnt1.pth", published(make_checkpoint()))
    status, said = call(program, *arguments, "--max_pixels", 100)
    assert status == (1 if program == "slices_to_ply.py" else 2)  # the one case of one failed
    assert "24 x 20 pixels, over the limit of 100" in said and "--max_pixels" in said
    status, said = call(program, *arguments, "--max_pixels", 480)
    assert status == 0, said
    limit_pixels(MAX_PIXELS)


def published(checkpoint):
    checkpoint.extras = {}
    checkpoint.time_func = torch.full((3,), 1 / 3)
    return checkpoint


def test_json_is_read_as_data(tmp_path):
    (tmp_path / FILE_NAME).write_text(json.dumps({"affine": "__import__('os')"}))
    with pytest.raises(UserError, match=re.escape(FILE_NAME)):
        Geometry.load(tmp_path / FILE_NAME)
