"""Atomic files, image files at their own depth, and how scripts end."""

import errno
import os
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from utils.errors import UserError
from utils.files import atomic_folder, atomic_write
from utils.images import (
    MAX_PIXELS,
    image_files,
    natural_order,
    read_image,
    to_grey,
    to_unit,
    write_image,
    write_levels,
)

ROOT = Path(__file__).resolve().parent.parent


# ---------------------------------------------------------------------------------------------------- atomic_write


def test_atomic_write_makes_folders_and_leaves_only_the_file(tmp_path):
    path = tmp_path / "new" / "folder" / "a.json"
    with atomic_write(path) as temporary:
        assert temporary.parent == path.parent and temporary.suffix == ".json"
        temporary.write_text("{}")
        assert not path.exists()
    assert path.read_text() == "{}"
    assert os.listdir(path.parent) == ["a.json"]


def test_atomic_write_serves_libraries_that_want_a_path(tmp_path):
    with atomic_write(tmp_path / "a.npy") as temporary:
        np.save(temporary, np.arange(3))  # appends .npy to any other suffix
    assert np.load(tmp_path / "a.npy").tolist() == [0, 1, 2]


@pytest.mark.parametrize("sync", [True, False])
def test_atomic_write_flushes_the_file_before_it_is_renamed_and_the_folder_after(tmp_path, monkeypatch, sync):
    """Otherwise a power cut can leave an empty file under the final name, or lose the new name."""
    happened = []
    fsync, replace = os.fsync, os.replace

    def flushed(descriptor):
        happened.append(("flushed", os.fstat(descriptor).st_ino))
        fsync(descriptor)

    def renamed(source, target):
        happened.append(("renamed", os.stat(source).st_ino))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", renamed)
    with atomic_write(tmp_path / "a.bin", sync) as temporary:
        temporary.write_bytes(b"new")
        assert happened == []
    file, folder = (path.stat().st_ino for path in (tmp_path / "a.bin", tmp_path))
    wanted = [("flushed", file), ("renamed", file), ("flushed", folder)]
    assert happened == (wanted if sync else [("renamed", file)])


def test_atomic_write_keeps_the_old_file_when_the_body_fails(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError), atomic_write(path) as temporary:
        temporary.write_bytes(b"half of the n")
        raise RuntimeError
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_atomic_write_follows_links_and_respects_the_umask(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link.txt").symlink_to(tmp_path / "real" / "a.txt")
    old = os.umask(0o027)
    try:
        with atomic_write(tmp_path / "link.txt") as temporary:
            temporary.write_text("x")
    finally:
        os.umask(old)
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "real" / "a.txt").read_text() == "x"
    assert (tmp_path / "real" / "a.txt").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), RuntimeError("file write failed")])
def test_a_full_disk_is_named_whatever_the_library_raises(tmp_path, monkeypatch, error):
    full = shutil.disk_usage(tmp_path)._replace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    with pytest.raises(OSError) as raised, atomic_write(tmp_path / "a.pth") as temporary:
        temporary.write_bytes(b"half")
        raise error
    assert raised.value.errno == errno.ENOSPC and raised.value.filename == str(tmp_path / "a.pth")
    assert os.listdir(tmp_path) == []


def test_atomic_folder_replaces_whole_or_not_at_all(tmp_path):
    out = tmp_path / "out"
    with atomic_folder(out) as temporary:
        (temporary / "a").write_text("1")
    with pytest.raises(RuntimeError), atomic_folder(out) as temporary:
        (temporary / "b").write_text("2")
        raise RuntimeError
    assert os.listdir(out) == ["a"]
    with atomic_folder(out) as temporary:
        (temporary / "b").write_text("2")
    assert os.listdir(out) == ["b"] and os.listdir(tmp_path) == ["out"]


# ---------------------------------------------------------------------------------------------------------- images


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1), (5, 7, 3), (5, 7, 4)])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_images_round_trip_at_their_depth(tmp_path, suffix, shape, bits):
    top = 2**bits - 1
    levels = np.random.default_rng(0).integers(0, top + 1, shape)
    path = tmp_path / f"a{suffix}"
    write_image(path, levels / top, bits)
    back = read_image(path)
    assert back.dtype == (np.uint8 if bits == 8 else np.uint16)
    assert np.array_equal(back, levels.reshape(back.shape))
    assert back.ndim == (2 if shape[2:] in ((), (1,)) else 3)
    assert (
        np.abs(to_unit(back) * top - levels.reshape(back.shape)).max() < 1e-2
    )  # float32 keeps 24 bits of 16


def test_npy_keeps_floats_and_clamps(tmp_path):
    write_image(tmp_path / "a.npy", np.array([[0.1, -1.0], [np.nan, 2.0]]))
    back = read_image(tmp_path / "a.npy")
    assert back.dtype == np.float32
    assert np.array_equal(back, np.array([[0.1, 0], [0, 1]], np.float32))


def test_jpeg_is_8_bit_without_alpha(tmp_path):
    write_image(tmp_path / "a.jpg", np.full((8, 8), 0.5))
    assert read_image(tmp_path / "a.jpg").shape == (8, 8)
    for array, bits in ((np.zeros((4, 4)), 16), (np.zeros((4, 4, 4)), 8)):
        with pytest.raises(UserError, match="JPEG"):
            write_image(tmp_path / "b.jpg", array, bits)
    with pytest.raises(UserError, match=r"\.gif"):
        write_image(tmp_path / "b.gif", np.zeros((4, 4)))
    assert os.listdir(tmp_path) == ["a.jpg"]


@pytest.mark.parametrize("colour_type, channels", [(2, 3), (6, 4), (4, 2)])
def test_16_bit_colour_png_with_every_filter(tmp_path, colour_type, channels):
    """All five PNG row filters, encoded here by definition: Pillow itself would keep only the high byte."""
    height, width, step = 10, 6, 2 * channels
    levels = np.random.default_rng(1).integers(0, 65536, (height, width, channels)).astype(">u2")
    rows = levels.view(np.uint8).reshape(height, -1).astype(int)
    data = b""
    for y, row in enumerate(rows):
        kind, above = y % 5, rows[y - 1] if y else np.zeros_like(row)
        left = np.concatenate((np.zeros(step, int), row[:-step]))
        corner = np.concatenate((np.zeros(step, int), above[:-step]))
        estimate = left + above - corner
        near = np.abs(np.stack((estimate - left, estimate - above, estimate - corner)))
        paeth = np.choose(near.argmin(axis=0), (left, above, corner))
        predicted = (0 * row, left, above, (left + above) // 2, paeth)[kind]
        data += bytes([kind]) + ((row - predicted) % 256).astype(np.uint8).tobytes()

    def chunk(name, content):
        return (
            struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        )

    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    png = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(data))
        + chunk(b"IEND", b"")
    )
    (tmp_path / "a.png").write_bytes(png)
    expected = levels[:, :, (0, 0, 0, 1)] if channels == 2 else levels
    assert np.array_equal(read_image(tmp_path / "a.png"), expected)


def test_odd_kinds_become_grey_rgb_or_rgba(tmp_path):
    def read(image, **options):
        image.save(tmp_path / "a.png", **options)
        return read_image(tmp_path / "a.png")

    bilevel = np.eye(4, dtype=bool)
    assert np.array_equal(read(Image.fromarray(bilevel)), bilevel * 255)

    colours = np.random.default_rng(0).integers(0, 256, (4, 4, 3)).astype(np.uint8)
    palette = Image.fromarray(colours).quantize(256)
    assert np.array_equal(read(palette), np.asarray(palette.convert("RGB")))
    grey = Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4))
    assert np.array_equal(read(grey.convert("P")), np.asarray(grey))
    assert read(palette, transparency=0).shape == (4, 4, 4)

    with_alpha = read(Image.merge("LA", (grey, grey)))
    assert np.array_equal(with_alpha, np.asarray(grey)[:, :, None].repeat(4, axis=2))

    Image.fromarray(colours).convert("CMYK").save(tmp_path / "b.jpg")
    assert read_image(tmp_path / "b.jpg").shape == (4, 4, 3)


def test_odd_tiffs(tmp_path):
    levels = np.arange(12, dtype=np.uint16).reshape(3, 4) * 5000
    tifffile.imwrite(tmp_path / "big.tif", levels, byteorder=">")
    assert np.array_equal(read_image(tmp_path / "big.tif"), levels)
    tifffile.imwrite(tmp_path / "white.tif", levels, photometric="miniswhite")
    assert np.array_equal(read_image(tmp_path / "white.tif"), 65535 - levels)
    tifffile.imwrite(
        tmp_path / "planes.tif", np.stack([levels] * 3), photometric="rgb", planarconfig="separate"
    )
    assert np.array_equal(read_image(tmp_path / "planes.tif"), np.stack([levels] * 3, axis=2))
    Image.fromarray(levels.astype(np.uint8)).save(tmp_path / "lzw.tif", compression="tiff_lzw")
    assert np.array_equal(read_image(tmp_path / "lzw.tif"), levels.astype(np.uint8))
    tifffile.imwrite(tmp_path / "pages.tif", np.stack([levels] * 2), photometric="minisblack")
    with pytest.raises(UserError, match="2 pages"):
        read_image(tmp_path / "pages.tif")


def test_unreadable_files_say_what_is_wrong(tmp_path):
    png = tmp_path / "good.png"
    write_image(png, np.random.default_rng(0).random((64, 64)))
    for name, content, message in (
        ("text.png", b"hello", "not an image"),
        ("empty.png", b"", "not an image"),
        ("short.png", png.read_bytes()[:2000], "damaged"),
        ("text.tif", b"hello", "cannot be read"),
        ("text.npy", b"hello", "cannot be read"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message) as error:
            read_image(tmp_path / name)
        assert name in str(error.value)
    with pytest.raises(UserError, match="does not exist"):
        read_image(tmp_path / "none.png")
    np.save(tmp_path / "deep.npy", np.zeros((2, 2, 2, 2)))
    with pytest.raises(UserError, match="shape"):
        read_image(tmp_path / "deep.npy")
    np.save(tmp_path / "wide.npy", np.full((2, 2), 300.0))
    with pytest.raises(UserError, match=r"outside \[0, 1\]"):
        read_image(tmp_path / "wide.npy")


def test_pickles_in_npy_are_not_run(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="cannot be read"):
        read_image(tmp_path / "a.npy")


def test_decompression_bombs_are_refused_before_they_are_read(tmp_path):
    side = int(MAX_PIXELS**0.5) + 1
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n"
    for kind, content in ((b"IHDR", header), (b"IDAT", zlib.compress(b"0")), (b"IEND", b"")):
        png += (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )
    (tmp_path / "bomb.png").write_bytes(png)
    with pytest.raises(UserError, match="over the limit of 67,108,864"):
        read_image(tmp_path / "bomb.png")


def test_grey_of_colours():
    assert np.allclose(to_grey(np.array([[[255, 0, 0]]], np.uint8)), 1 / 3)
    assert np.allclose(to_grey(np.array([[[0, 255, 255, 7]]], np.uint8)), 2 / 3)
    with pytest.raises(TypeError, match="int32"):
        to_unit(np.zeros((2, 2), np.int32))


def test_natural_order():
    names = ["10.png", "9.png", "00003_10.png", "00003_2.png", "slice2.png", "slice10.png", "00002_0.png"]
    assert natural_order(names) == [
        "00002_0.png", "00003_2.png", "00003_10.png", "9.png", "10.png", "slice2.png", "slice10.png",
    ]  # fmt: skip
    assert natural_order([Path("b/1.png"), Path("a/01.png")]) == [Path("a/01.png"), Path("b/1.png")]


def test_image_files(tmp_path):
    for name in ("10.png", "2.PNG", ".3.png", "4.txt", "5.tif"):
        (tmp_path / name).touch()
    (tmp_path / "6.png").mkdir()
    assert [path.name for path in image_files(tmp_path)] == ["2.PNG", "5.tif", "10.png"]
    assert [path.name for path in image_files(tmp_path, [".png"])] == ["2.PNG", "10.png"]
    with pytest.raises(UserError, match="not a folder"):
        image_files(tmp_path / "none")


# ------------------------------------------------------------------------------------------------- how scripts end


@pytest.mark.parametrize(
    "body, status, message",
    [
        ("pass", 0, ""),
        ("return 1", 1, ""),
        ("raise UserError('no frames in\\n here')", 2, "script.py: error: no frames in here\n"),
        ("ArgumentParser().parse_args(['--nope'])", 2, "script.py: error: unrecognized arguments: --nope"),
        (
            f"raise OSError({errno.ENOSPC}, 'x', '/a/b')",
            2,
            "script.py: error: no space left on the disk for /a/b",
        ),
        (f"raise OSError({errno.EACCES}, 'x', '/a/b')", 1, "script.py: error: Permission denied: /a/b"),
        ("raise KeyboardInterrupt", 130, "script.py: error: interrupted"),
        ("raise BrokenPipeError", 1, ""),
    ],
)
def test_exit_status_and_one_line(tmp_path, body, status, message):
    script = tmp_path / "script.py"
    script.write_text(
        f"from utils.errors import ArgumentParser, UserError, run\ndef main():\n    {body}\nrun(main)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment)
    assert done.returncode == status
    assert done.stderr.startswith(message) and done.stderr.count("\n") == bool(message)
    if message:
        debug = subprocess.run(
            [sys.executable, script, "--debug"], capture_output=True, text=True, env=environment
        )
        assert debug.returncode == status and "Traceback" in debug.stderr


def test_bugs_keep_their_traceback(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("from utils.errors import run\nrun(lambda: 1 / 0)\n")
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([np.uint8, np.uint16]),
    st.sampled_from([(), (1,), (3,), (4,)]),
    st.integers(1, 20),
    st.integers(1, 20),
    st.booleans(),
    st.integers(0, 99),
)
def test_png_files_hold_the_levels_exactly(tmp_path_factory, dtype, channels, height, width, strided, seed):
    """Read back by `read_image`, and by Pillow itself if it supports the kind of image."""
    rng = np.random.default_rng(seed)
    levels = rng.integers(0, np.iinfo(dtype).max + 1, (height, width, *channels), dtype)
    levels[: height // 2] //= 200  # runs of equal bytes too
    if strided:
        levels = levels[::-1, ::-1]
    path = tmp_path_factory.getbasetemp() / "levels.png"
    write_levels(path, levels)
    expected = levels[:, :, 0] if channels == (1,) else levels
    found = read_image(path)
    assert found.dtype == dtype and np.array_equal(found, expected)
    with Image.open(path) as image:
        image.load()
        if dtype == np.uint8:
            assert np.array_equal(np.asarray(image), expected)


@pytest.mark.parametrize(("suffix", "dtype"), [(".tif", np.uint16), (".tif", np.uint8), (".jpg", np.uint8)])
def test_levels_are_written_as_they_are(tmp_path, suffix, dtype):
    levels = np.full((8, 8), 77, dtype)
    write_levels(tmp_path / f"a{suffix}", levels)
    found = read_image(tmp_path / f"a{suffix}")
    assert found.dtype == dtype and (found == levels).all()
