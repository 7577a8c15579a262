"""Frames: order, depth, channels, transparency, sizes, and what the user is told."""

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from scene.frames import Frames, frame_files, write_mirror
from utils.errors import UserError
from utils.images import read_image, write_image


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "original"
    path.mkdir()
    return path


def save(folder, name, array):
    array = np.asarray(array)
    if array.dtype == np.uint16 and array.ndim == 3:
        write_image(folder / name, array / 65535, bits=16)
    else:
        Image.fromarray(array).save(folder / name)
    return array


def noise(shape, dtype=np.uint8, seed=0):
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max + 1, shape, dtype=dtype)


def read(folder, **options):
    said = []
    frames = Frames.read(folder, say=said.append, **options)
    return frames, said


def test_grey_frames_stay_bytes(folder):
    stack = [save(folder, f"{k:04d}.png", noise((5, 7), seed=k)) for k in range(3)]
    frames, said = read(folder)
    assert said == []
    assert (len(frames), frames.channels, frames.height, frames.width, frames.bits) == (3, 1, 5, 7, 8)
    assert frames.levels.dtype == torch.uint8 and frames.levels.shape == (3, 1, 5, 7)
    assert frames.names == ["0000.png", "0001.png", "0002.png"] and frames.numbers == [0, 1, 2]
    got = frames([2, 0])
    assert got.shape == (2, 1, 5, 7) and got.dtype == torch.float32
    assert torch.equal(got[0, 0], torch.from_numpy(stack[2].astype(np.float32) / 255))
    assert torch.equal(frames(0), frames([0]))


def test_mirrored_frames_are_flipped_left_right(folder):
    array = save(folder, "0.png", noise((4, 6)))
    frames, _ = read(folder)
    assert torch.equal(frames([0], mirrored=True)[0, 0], torch.from_numpy(array[:, ::-1] / np.float32(255)))


def test_a_frame_outside_is_an_error(folder):
    save(folder, "0.png", noise((4, 6)))
    frames, _ = read(folder)
    for k in (-1, 1):
        with pytest.raises(IndexError, match=f"frame {k} of 1"):
            frames([k])


def test_some_frames_are_a_sequence_of_their_own(folder):
    stack = [save(folder, f"{k:04d}.png", noise((4, 6, 4), seed=k)) for k in range(4)]
    frames, _ = read(folder)
    part = frames.take([1, 3])
    assert (len(part), part.names, part.numbers, part.has_alpha) == (
        2,
        ["0001.png", "0003.png"],
        [1, 3],
        True,
    )
    assert torch.equal(part([0, 1]), frames([1, 3])) and stack[3].shape == (4, 6, 4)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_survive_in_two_bytes(folder, suffix):
    array = noise((8, 8), np.uint16)
    array[0, :3] = 0, 1, 65535
    if suffix == "png":
        Image.fromarray(array).save(folder / "0.png")
    else:
        tifffile.imwrite(folder / "0.tif", array)
    frames, _ = read(folder)
    assert frames.bits == 16 and frames.levels.element_size() == 2
    got = frames([0])[0, 0]
    assert (got[0, 0], got[0, 2]) == (0, 1)
    # float32 has 24 bits: all 65536 levels survive.
    assert np.array_equal(np.rint(got.numpy().astype(np.float64) * 65535).astype(np.uint16), array)


def test_sixteen_bits_survive_resizing(folder):
    # A ramp over 256 of 65536 levels would be one grey of 8 bits.
    ramp = np.tile(np.linspace(30000, 30256, 64).astype(np.uint16), (64, 1))
    save(folder, "0.png", ramp)
    frames, _ = read(folder, resolution=2)
    assert (frames.height, frames.width, frames.bits) == (32, 32, 16)
    row = frames([0])[0, 0, 16] * 65535
    assert row.diff().min() > 0
    assert torch.allclose(
        row[4:28], torch.linspace(30002, 30254, 32)[4:28], atol=2
    )  # rounding, and the ramp's own


def test_colour_sixteen_bits(folder):
    array = save(folder, "0.png", noise((4, 5, 3), np.uint16))
    frames, _ = read(folder)
    assert (frames.channels, frames.bits) == (3, 16)
    assert np.array_equal(np.rint(frames([0])[0].numpy() * np.float64(65535)), array.transpose(2, 0, 1))


def test_rgb_that_is_grey_becomes_one_channel(folder):
    grey = noise((4, 5))
    save(folder, "0.png", np.repeat(grey[:, :, None], 3, axis=2))
    save(folder, "1.png", np.dstack([grey, grey, grey, np.full_like(grey, 255)]))
    frames, _ = read(folder)
    assert frames.channels == 1 and not frames.has_alpha
    assert torch.equal(frames.levels[1, 0], torch.from_numpy(grey))


def test_one_colour_frame_makes_all_colour(folder):
    grey, colour = save(folder, "0.png", noise((4, 5))), save(folder, "1.png", noise((4, 5, 3)))
    frames, _ = read(folder)
    assert frames.channels == 3
    assert torch.equal(frames.levels[0, 2], torch.from_numpy(grey))
    assert torch.equal(frames.levels[1], torch.from_numpy(colour.transpose(2, 0, 1).copy()))


def test_depths_mix_at_full_scale(folder):
    save(folder, "0.png", np.array([[0, 255]], np.uint8))
    save(folder, "1.png", np.array([[0, 65535]], np.uint16))
    np.save(folder / "2.npy", np.array([[0.25, 1.0]], np.float32))
    frames, _ = read(folder)
    assert frames.bits == 32
    assert frames([0, 1, 2]).flatten().tolist() == [0, 1, 0, 1, 0.25, 1]


def test_transparent_frames_lie_on_the_background(folder):
    array = noise((4, 5, 4))
    array[0, 0], array[0, 1, 3] = (10, 20, 30, 0), 255
    save(folder, "0.png", array)
    save(folder, "1.png", noise((4, 5, 3), seed=1))  # opaque
    frames, _ = read(folder)
    assert frames.has_alpha and frames.channels == 3
    background = torch.tensor([1.0, 0.5, 0.25])
    got = frames([0, 1], background=background)
    colours = torch.from_numpy(array.transpose(2, 0, 1) / np.float32(255))
    assert torch.equal(got[0, :, 0, 0], background)
    assert torch.equal(got[0, :, 0, 1], colours[:3, 0, 1])
    expected = colours[:3] * colours[3] + (1 - colours[3]) * background.view(3, 1, 1)
    assert torch.allclose(got[0], expected, atol=1e-6)
    assert torch.equal(got[1], frames([1])[0])
    assert frames([0])[0, :, 0, 0].tolist() == [0, 0, 0]  # black without one


def test_resizing_keeps_the_colour_of_hidden_pixels_out(folder):
    array = np.zeros((8, 8, 4), np.uint8)
    array[:, :, 0] = 255  # all red, but what shows is green
    array[:, 3:] = (0, 255, 0, 255)
    save(folder, "0.png", array)
    frames, _ = read(folder, resolution=2)
    assert frames([0])[0, 0].max() <= 1 / 255  # red, up to rounding


@pytest.mark.parametrize(
    ("resolution", "size"),
    [(-1, (20, 30)), (1, (20, 30)), (2, (10, 15)), (4, (5, 8)), (8, (2, 4)), (60, (40, 60))],
)
def test_resolution(folder, resolution, size):
    save(folder, "0.png", np.full((20, 30), 77, np.uint8))
    frames, said = read(folder, resolution=resolution)
    assert (frames.height, frames.width) == size
    assert (frames.levels == 77).all()
    assert said == []


def test_wide_frames_are_scaled_and_it_is_said(folder):
    save(folder, "0.png", np.zeros((4, 3200), np.uint8))
    frames, said = read(folder)
    assert (frames.height, frames.width) == (2, 1600)
    assert len(said) == 1 and "3200" in said[0] and "1600" in said[0]
    assert read(folder, resolution=1)[0].width == 3200


def test_order_is_by_number(folder):
    for number in (10, 9, 2):
        save(folder, f"slice{number}.png", np.full((2, 2), number, np.uint8))
    frames, said = read(folder)
    assert frames.numbers == [2, 9, 10]
    assert frames.levels[:, 0, 0, 0].tolist() == [2, 9, 10]
    assert len(said) == 1 and "after 2" in said[0] and "order" in said[0]


def test_a_first_number_other_than_zero_is_no_gap(folder):
    for number in (5, 6):
        save(folder, f"{number}.png", np.zeros((2, 2), np.uint8))
    assert read(folder)[1] == []


def test_gaps_that_are_expected_are_not_worth_a_line(folder):
    for number in (1, 3):
        save(folder, f"{number}.png", np.zeros((2, 2), np.uint8))
    frames, said = read(folder, consecutive=False)
    assert frames.numbers == [1, 3] and said == []


def test_equal_numbers_are_an_error(folder):
    save(folder, "1.png", np.zeros((2, 2), np.uint8))
    save(folder, "0001.jpg", np.zeros((2, 2), np.uint8))
    with pytest.raises(UserError, match=r"0001\.jpg") as error:
        read(folder)
    assert "1.png" in str(error.value)


def test_other_files_are_no_frames(folder):
    save(folder, "0.png", np.zeros((2, 2), np.uint8))
    (folder / "notes.txt").write_text("0")
    (folder / "._1.png").write_bytes(b"a Mac's own")
    assert [file.name for file in frame_files(folder)] == ["0.png"]


def test_sizes_that_differ_are_named(folder):
    save(folder, "0.png", np.zeros((4, 6), np.uint8))
    save(folder, "1.png", np.zeros((4, 7), np.uint8))
    with pytest.raises(UserError, match=r"0\.png is 6 x 4, 1\.png is 7 x 4"):
        read(folder)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder.rmdir(), "0000.png, 0001.png"),
        (lambda folder: None, "no frames"),
        (lambda folder: save(folder, "first.png", np.zeros((2, 2), np.uint8)), "first.png has no number"),
        (lambda folder: (folder / "0.png").write_bytes(b"not a picture"), "0.png cannot be read"),
    ],
)
def test_mistakes_are_user_errors(folder, make, message):
    make(folder)
    with pytest.raises(UserError) as error:
        read(folder)
    assert message in str(error.value) and str(folder) in str(error.value)


def test_a_torn_png_is_named(folder):
    save(folder, "0.png", noise((64, 64)))
    data = (folder / "0.png").read_bytes()
    (folder / "0.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"0\.png"):
        read(folder)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_mirror_folder_holds_flipped_copies(folder, dtype):
    array = save(folder, "0007.png", noise((4, 6), dtype))
    mirror = folder.parent / "mirror"
    write_mirror(folder, mirror)
    copy = read_image(mirror / "0007.png")
    assert copy.dtype == dtype and np.array_equal(copy, array[:, ::-1])
    (mirror / "0007.png").unlink()
    write_mirror(folder, mirror)  # there already: left alone
    assert list(mirror.iterdir()) == []


def test_a_mirror_folder_that_cannot_be_made_is_only_said(folder, monkeypatch):
    save(folder, "0.png", noise((4, 6)))
    (folder.parent / "file").write_text("")  # nobody, not even root, can make a folder inside a file
    said = []
    write_mirror(folder, folder.parent / "file" / "mirror", said.append)
    assert len(said) == 1 and "mirror cannot be written" in said[0]


@pytest.mark.cuda
@pytest.mark.parametrize("data_device", ["cpu", "cuda"])
def test_frames_reach_the_gpu_without_waiting(folder, data_device):
    for k in range(3):
        Image.fromarray(noise((16, 16), np.uint16, seed=k)).save(folder / f"{k}.png")
    here, _ = read(folder)
    frames, _ = read(folder, device="cuda", data_device=data_device)
    background = torch.ones(1, device="cuda")
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = frames([0, 2], mirrored=True, background=background)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    assert torch.equal(got.cpu(), here([0, 2], mirrored=True))
