"""The demonstration: its mask, its sheet with the numbers, and the shading of meshes."""

import nibabel
import numpy as np
import pytest
from oblique_case import make_case

from demo import main
from patient.meshes import surface, write_mesh
from pictures.shading import shade
from utils.errors import UserError
from utils.images import read_image


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_case(tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="module")
def blob(tmp_path_factory):
    z, y, x = np.mgrid[:16, :20, :24]
    path = tmp_path_factory.mktemp("mesh") / "blob.ply"
    values = np.exp(-((z / 2 - 4) ** 2 + (y - 10) ** 2 / 9 + (x - 12) ** 2 / 16) / 2) * 0.9
    write_mesh(path, surface(values.astype(np.float32), 0.4))
    return path


def test_the_sheet(folder, blob, tmp_path, capsys):
    sheet = tmp_path / "out" / "preview.png"
    assert main(["sheet", "-m", str(folder), "--mesh", str(blob), "-o", str(sheet), "--device", "cpu"]) == 0
    # The numbers of evaluation.json, with the best of the classical methods.
    assert "images 25.00 dB, linear interpolation 26.50 dB" in capsys.readouterr().out
    picture = read_image(sheet)
    assert picture.shape[1] == 1760
    for left in (100, 500, 850):  # slices, what is linear between them, ours
        assert picture[150:500, left : left + 250].std() > 10
    assert picture[:, 1250:].std() > 10  # the mesh


def test_a_mask_is_the_largest_body_without_holes(tmp_path, capsys):
    values = np.zeros((20, 18, 6), np.int16)
    values[3:12, 4:14, 1:5] = 900
    values[6:8, 8:10, 2] = 0  # a hole in a slice
    values[16:18, 2:4, 1:3] = 950  # another body
    affine = np.diag([2.0, 2.0, 3.0, 1.0])
    nibabel.save(nibabel.Nifti1Image(values, affine), tmp_path / "volume.nii.gz")
    assert main(["mask", "-i", str(tmp_path / "volume.nii.gz"), "-o", str(tmp_path / "mask.nii.gz")]) == 0
    mask = nibabel.load(tmp_path / "mask.nii.gz")
    expected = np.zeros(values.shape, bool)
    expected[3:12, 4:14, 1:5] = True
    assert np.array_equal(np.asarray(mask.dataobj) == 1, expected) and np.array_equal(mask.affine, affine)
    assert "17% of the volume" in capsys.readouterr().out


def test_what_is_missing_is_named(folder, blob, tmp_path):
    out = tmp_path / "out" / "preview.png"

    def sheet(*more):
        main(["sheet", "-o", str(out), "--device", "cpu", *map(str, more)])

    with pytest.raises(UserError, match="not a folder"):
        sheet("-m", tmp_path / "none", "--mesh", blob)
    with pytest.raises(UserError, match="does not exist"):
        sheet("-m", folder, "--mesh", tmp_path / "none.ply")
    with pytest.raises(UserError, match="--mesh"):
        sheet("-m", folder)
    heldout = folder.parent / "data" / "img" / "heldout"
    heldout.rename(heldout.with_name("away"))
    try:
        with pytest.raises(UserError, match="--keep_every 2"):
            sheet("-m", folder, "--mesh", blob)
    finally:
        heldout.with_name("away").rename(heldout)
    assert not out.parent.exists()
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 4, 4), np.int16), np.eye(4)), tmp_path / "empty.nii.gz")
    with pytest.raises(UserError, match="nothing to tell"):
        main(["mask", "-i", str(tmp_path / "empty.nii.gz"), "-o", str(tmp_path / "mask.nii.gz")])


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
    """A bowl, seen from outside and from inside: neither is lit by ambient light alone (0.16 of the skin's colour)."""
    _, y, x = np.mgrid[:8, :16, :16]
    tube = surface((np.hypot(y - 7.5, x - 7.5) < 6).astype(np.float32), 0.5, closed=False)
    tube.update_faces(tube.triangles_center[:, 1] > 7.5)  # half of it: hollow towards -y
    for side in (-1.0, 1.0):
        picture, _ = shade(tube, np.array([0.0, side, 0.0]), side=60)
        assert picture[picture[:, :, 3] > 0.5][:, 0].mean() > 0.3
