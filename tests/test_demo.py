"""The contact sheet: it is drawn, says what it measured, and shows the mesh where it is."""

import numpy as np
import pytest

from demo import main
from patient.meshes import surface, write_mesh
from pictures.shading import shade
from utils.errors import UserError
from utils.images import read_image, write_image


@pytest.fixture
def run_of_a_blob(tmp_path):
    """data/original, model/render_img and render_mask at 2 sub-frames, and a mesh; renders are 0.1 too bright."""
    z, y, x = np.mgrid[:16, :20, :24]
    blob = np.exp(-((z / 2 - 4) ** 2 + (y - 10) ** 2 / 9 + (x - 12) ** 2 / 16) / 2) * 0.9
    for number, frame in enumerate(blob):
        if number % 2 == 0:
            write_image(tmp_path / "data" / "original" / f"{number // 2:04d}.png", frame, 16)
        name = f"{number // 2:05d}_{number % 2}.png"
        write_image(tmp_path / "model" / "render_img" / name, frame + 0.1, 16)
        write_image(tmp_path / "model" / "render_mask" / name, frame > 0.4)
    write_mesh(tmp_path / "blob.ply", surface(blob.astype(np.float32), 0.4))
    return [
        "--data",
        str(tmp_path / "data"),
        "--model",
        str(tmp_path / "model"),
        "--mesh",
        str(tmp_path / "blob.ply"),
    ]


def test_the_sheet(tmp_path, run_of_a_blob, capsys):
    assert main([*run_of_a_blob, "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "PSNR on the 8 training frames: 20.00 dB" in printed  # 10 log10(1 / 0.1^2), whatever 16 bits round
    assert str(tmp_path / "out" / "preview.png") in printed and "Next:" in printed
    sheet = read_image(tmp_path / "out" / "preview.png")
    assert sheet.shape[1] == 1920 and sheet[:, :1200].std() > 10 and sheet[:, 1300:].std() > 10


def test_what_is_missing_is_named(tmp_path, run_of_a_blob):
    def replaced(flag, value):
        place = run_of_a_blob.index(flag) + 1
        return [*run_of_a_blob[:place], value, *run_of_a_blob[place + 1 :], "--out", str(tmp_path / "out")]

    for flag, message in (("--data", "img/original"), ("--model", "render.py"), ("--mesh", "does not exist")):
        with pytest.raises(UserError, match=message):
            main(replaced(flag, str(tmp_path / "none")))
    (tmp_path / "model" / "render_img" / "00003_0.png").unlink()
    with pytest.raises(UserError, match="00003_0"):
        main([*run_of_a_blob, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_shade_fills_the_outline_and_hides_what_is_behind():
    """A cube of 8 seen from in front (LPS: from -y) is an even square of 8 without holes."""
    values = np.zeros((12, 12, 12), np.float32)
    values[2:10, 2:10, 2:10] = 1
    picture, scale = shade(surface(values, 0.5), np.array([0.0, -1.0, 0.0]), side=100)
    covered = picture[:, :, 3] > 0.5
    rows, columns = np.nonzero(covered)
    assert (
        covered[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].mean() > 0.98
    )  # but for the corners
    assert abs((np.ptp(rows) + 1) / scale - 8) < 0.2 and abs((np.ptp(columns) + 1) / scale - 8) < 0.2
    face = picture[30:70, 30:70, :3]
    assert face.std(axis=(0, 1)).max() < 0.05 and face.mean() > 0.3


def test_shade_lights_the_inside_of_an_open_mesh():
    """A bowl, seen from outside and into it: neither is left in the ambient light alone (0.16 of the skin's colour)."""
    _, y, x = np.mgrid[:8, :16, :16]
    tube = surface((np.hypot(y - 7.5, x - 7.5) < 6).astype(np.float32), 0.5, closed=False)
    tube.update_faces(tube.triangles_center[:, 1] > 7.5)  # half of it: hollow towards -y
    for side in (-1.0, 1.0):
        picture, _ = shade(tube, np.array([0.0, side, 0.0]), side=60)
        assert picture[picture[:, :, 3] > 0.5][:, 0].mean() > 0.3
