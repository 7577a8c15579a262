"""Splats for other programs show the frame; compact models are drawn like the model they were made from."""

import numpy as np
import pytest
import torch
from oblique_case import CAMERA, make_case
from plyfile import PlyData

import export
from arguments import model_options
from diff_gaussian_rasterization import GaussianRasterizer
from gaussian_renderer.editing import general_settings
from scene.checkpoint import load_checkpoint
from utils.errors import UserError
from utils.spherical_harmonics import C0
from viewer.case import Case


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_case(tmp_path_factory.mktemp("export"))


def opened(folder):
    return Case.open(model_options({"model_path": str(folder), "device": "cpu"}), say=lambda _: None)


def psnr(a, b):
    return -10 * np.log10(np.mean((a - b) ** 2))


def read_splats(path):
    """As a viewer of ordinary splats reads them: means, scales, quaternions, opacities, colours."""
    table = PlyData.read(path)["vertex"]

    def columns(*names):
        return torch.tensor(np.stack([table[name] for name in names], 1))

    return (
        columns("x", "y", "z"),
        columns("scale_0", "scale_1", "scale_2").exp(),
        columns("rot_0", "rot_1", "rot_2", "rot_3"),
        columns("opacity").sigmoid(),
        (C0 * columns("f_dc_0", "f_dc_1", "f_dc_2") + 0.5).clamp_min(0),
    )


@pytest.mark.parametrize(("position", "head"), [(0.0, "img"), (3.4, "img"), (3.4, "seg")])
def test_splats_show_the_frame(folder, tmp_path, position, head):
    """Read back and shuffled, since other programs sort by depth: the frame, up to the effect of a depth of 1e-3."""
    path = tmp_path / "s.ply"
    export.main(["-m", str(folder), "--at", str(position), "--head", head, "-o", str(path), "--quiet"])
    means, scales, quaternions, opacities, colours = read_splats(path)
    assert torch.allclose(quaternions.norm(dim=1), torch.ones(len(means)), atol=1e-5)
    assert (scales[:, 2] < 1e-6).all() and (scales[:, :2] > 1e-6).any(1).all()
    order = torch.randperm(len(means), generator=torch.Generator().manual_seed(0))
    image, _, _ = GaussianRasterizer(general_settings(CAMERA, torch.zeros(3)))(
        means3D=means[order],
        means2D=torch.zeros_like(means),
        opacities=opacities[order],
        colors_precomp=colours[order],
        scales=scales[order],
        rotations=quaternions[order],
    )
    images, masks = opened(folder).draw([position])
    expected = images[0, 0] if head == "img" else masks[0]
    assert psnr(image[0].clamp(0, 1).numpy(), expected) > 55
    # Scores against the frame itself therefore hardly change: 0.1 dB is promised.
    frame = opened(folder).inputs.images(int(position))[0, 0].numpy()
    assert psnr(image[0].numpy(), frame) == pytest.approx(psnr(expected, frame), abs=0.1)


def test_a_compact_model_is_drawn_as_its_original(folder, tmp_path, capsys):
    export.main(["-m", str(folder), "--compact", "-o", str(tmp_path / "kept")])
    assert "times smaller" in capsys.readouterr().out
    original, kept = opened(folder), opened(tmp_path / "kept")
    for position in (0.0, 2.5, 7.0):
        (images, masks), (again, inside) = original.draw([position]), kept.draw([position])
        assert psnr(images, again) > 50
        assert ((masks >= 0.5) != (inside >= 0.5)).mean() < 2e-3
    assert kept.geometry == original.geometry and kept.comparisons() == original.comparisons()
    # At most 13 two-byte numbers per Gaussian, plus the small file's overhead: torch.save's archive and extras.
    size = (tmp_path / "kept" / "chkpnt30.pth").stat().st_size
    assert size < len(original.model) * 2 * 19 + 8000


def test_damaged_compact_models_end_in_one_line(folder, tmp_path):
    export.main(["-m", str(folder), "--compact", "-o", str(tmp_path), "--quiet"])
    path = tmp_path / "chkpnt30.pth"
    state = torch.load(path, weights_only=True)

    def changed(**changes):
        torch.save({**state, **changes}, path)
        with pytest.raises(UserError, match="compact"):
            load_checkpoint(path)

    arrays = state["arrays"]
    changed(data=state["data"][:100])
    changed(data=state["data"].flip(0))
    changed(size=state["size"] + 1)
    changed(size=1 << 60)
    changed(medgs_compact=9)
    changed(arrays={name: about for name, about in arrays.items() if name != "m"})
    changed(arrays={**arrays, "m": {**arrays["m"], "shape": [10**9, 1]}})
    changed(arrays={**arrays, "m": {**arrays["m"], "start": 10**9}})
    changed(arrays={**arrays, "odd": arrays["m"]})
    changed(extras=3)


def test_mistakes_are_named(folder, tmp_path):
    for arguments, words in (
        ((), "either --at"),
        (("--at", "1", "--compact"), "either --at"),
        (("--at", "9"), "from 0 to 7"),
        (("--compact",), "-o FOLDER"),
        (("--compact", "-o", str(folder)), "own folder"),
    ):
        with pytest.raises(UserError, match=words):
            export.main(["-m", str(folder), *arguments])
