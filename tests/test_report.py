"""Single-file pages: what they contain, what they warn of, and that they request nothing else."""

import base64
import gzip
import json
import re
import sys

import nibabel
import numpy as np
import pytest
from nibabel.affines import apply_affine
from oblique_case import FRAMES, HEIGHT, LABELS, WIDTH, make_case, oblique
from sequences import blobs, masks, train_at, write

import render
import report
from arguments import model_options
from patient.meshes import read_mesh
from utils.errors import UserError
from viewer.case import Case
from viewer.pages import smaller
from viewer.report import warnings_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_case(tmp_path_factory.mktemp("report"))


def part(page, name):
    """A binary part of a page."""
    text = re.search(rf'<script type="application/gzip" id="part-{re.escape(name)}">([^<]*)</script>', page)
    return gzip.decompress(base64.b64decode(text[1]))


def test_the_report_holds_scores_pictures_volume_and_mesh(folder, tmp_path, capsys):
    assert report.main(["-m", str(folder), "-o", str(tmp_path / "r.html"), "--device", "cpu"]) == 0
    page = (tmp_path / "r.html").read_text()
    assert len(page) < 15e6 and "linear interpolation is better" in capsys.readouterr().out
    # The better method is marked, and ours is not where it lost.
    assert "<td class='best'>26.50 ✓</td>" in page and "<td>25.00</td>" in page
    assert page.count("data:image/webp") >= 2 * FRAMES and "SHA-256" in page and "oblique.nii.gz" in page
    (tmp_path / "image.nii").write_bytes(part(page, "image.nii"))
    image = nibabel.load(tmp_path / "image.nii")
    case = Case.open(model_options({"model_path": str(folder), "device": "cpu"}), say=lambda _: None)
    # A voxel of the packed volume lies where the frame lies, and has its intensity to half a level of 8 bits.
    expected = -200 + 500 * case.draw([3.0])[0][0, 0, 11, 7]
    index = np.linalg.inv(image.affine) @ [*oblique().to_patient(np.array([7.0, 11.0, 3.0])), 1]
    assert np.allclose(index, np.rint(index), atol=1e-3)
    assert image.get_fdata()[tuple(np.rint(index[:3]).astype(int))] == pytest.approx(expected, abs=500 / 255)
    (tmp_path / "mesh.ply").write_bytes(part(page, "mesh.ply"))
    mesh = read_mesh(tmp_path / "mesh.ply")
    assert mesh.metadata["space"] == "RAS" and mesh.volume > 0


def test_a_label_map_in_the_report(tmp_path, capsys):
    """Its ids, a mesh per label, the legend, and each label's scores by method."""
    folder = make_case(tmp_path, LABELS)
    rows = json.loads((folder / "evaluation.json").read_text())
    rows += [
        {"iteration": 30, "task": "seg", "frames": "heldout", "method": method, "count": 7, "l1": 0.02, "dice": dice,
         "psnr": 20.0, "ssim": None, "labels": {"2": dice, "300": other}}
        for method, dice, other in (("model", 0.91, 0.83), ("sdf", 0.87, 0.85))
    ]  # fmt: skip
    (folder / "evaluation.json").write_text(json.dumps(rows))
    assert report.main(["-m", str(folder), "-o", str(tmp_path / "r.html"), "--device", "cpu"]) == 0
    page = (tmp_path / "r.html").read_text()
    volume = nibabel.Nifti1Image.from_bytes(part(page, "mask.nii"))
    assert set(np.unique(np.asarray(volume.dataobj))) == {0, 2, 300}
    for name in ("mesh_2.ply", "mesh_300.ply"):
        (tmp_path / name).write_bytes(part(page, name))
        assert read_mesh(tmp_path / name).volume > 100
    assert "left lung</td><td class='best'>0.9100 ✓</td><td>0.8700</td>" in page
    assert "liver</td><td>0.8300</td><td class='best'>0.8500 ✓</td>" in page
    assert 'class="label" type="checkbox" checked data-id="300"' in page


def test_pages_name_no_other_address(folder, tmp_path):
    report.main(["-m", str(folder), "-o", str(tmp_path / "r.html"), "--device", "cpu", "--quiet"])
    page = (tmp_path / "r.html").read_text()
    for attribute in re.findall(
        r"""(?:src|href)=["']([^"']{0,40})""", re.sub(r"<svg.*?</svg>", "", page, flags=re.S)
    ):
        assert attribute.startswith("data:") or not attribute, attribute
    assert "default-src 'none'" in page


def test_render_writes_a_page(folder, monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", ["render.py", "-m", str(folder), "--html", "--interp", "2", "--device", "cpu"]
    )
    render.main()
    page = (folder / "render.html").read_text()
    assert "render.html" in capsys.readouterr().out
    assert np.prod(nibabel.Nifti1Image.from_bytes(part(page, "mask.nii")).shape) == WIDTH * HEIGHT * (
        2 * FRAMES - 1
    )
    monkeypatch.setattr(sys, "argv", ["render.py", "-m", str(folder), "--html", "--mask_path", "x"])
    with pytest.raises(UserError, match="--html"):
        render.main()


def test_training_ends_with_a_report(tmp_path):
    images, labels = write(tmp_path / "img", blobs()), write(tmp_path / "seg", masks())
    train_at(images, tmp_path / "out", "--pipeline", "joint", "--seg_source_path", labels, "--iterations", 4,
             "--test_iterations", 2, "--eval", "--eval_every", 2, "--report")  # fmt: skip
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Images between the frames" in page and "Masks between the frames" in page and "<svg" in page
    assert (tmp_path / "out" / "plots" / "cuts.png").stat().st_size > 1000
    assert "frames are few" in page and "voxels" in page


def test_what_is_unusual_is_said(folder, tmp_path):
    case = Case.open(model_options({"model_path": str(folder), "device": "cpu"}), say=lambda _: None)
    rows = json.loads((folder / "evaluation.json").read_text())
    said = warnings_of(case, rows)
    assert any("linear interpolation is better" in text for text in said)
    assert not any("linear" in text for text in warnings_of(case, [{**row, "psnr": 30.0} for row in rows]))
    assert any("Nothing was held out" in text for text in warnings_of(case, rows[-1:]))
    case.model.params["f_dc_seg"].data.fill_(-9)
    assert any("masks are empty" in text for text in warnings_of(case, rows))
    case.model.params["f_dc_seg"].data.fill_(9)
    case.model.params["scaling"].data.fill_(0)
    assert any("saturated" in text for text in warnings_of(case, rows))


def test_a_smaller_volume_keeps_places_and_intensities():
    generator = np.random.default_rng(0)
    values = generator.integers(0, 65536, (30, 20, 12), dtype=np.uint16)
    affine = np.array([[0, -2.0, 0, 5], [1.5, 0, 0, -7], [0, 0, 3.0, 1], [0, 0, 0, 1]])
    image = nibabel.Nifti1Image(values, affine)
    image.header.set_slope_inter(0.01, -300)
    small = nibabel.Nifti1Image.from_bytes(smaller(image, 1000).to_bytes())
    steps = np.round(np.linalg.norm(small.affine[:3, :3], axis=0) / [1.5, 2, 3]).astype(int)
    assert np.prod(small.shape) <= 1000 and (steps >= 1).all()
    inner = np.array([2, 3, 1])
    assert np.allclose(apply_affine(small.affine, inner), apply_affine(affine, inner * steps))
    there = -300 + 0.01 * values[tuple(inner * steps)]
    assert small.get_fdata()[tuple(inner)] == pytest.approx(there, abs=0.01 * 257)


def test_mistakes_are_named(folder, tmp_path):
    with pytest.raises(UserError, match=r"\.html"):
        report.main(["-m", str(folder), "-o", str(tmp_path / "report.pdf")])
    with pytest.raises(UserError, match="not a folder"):
        report.main(["-m", str(tmp_path / "none")])
