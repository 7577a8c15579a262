"""A trained case made by hand: every second slice of an oblique stack, with masks, as train.py leaves it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from arguments import TrainOptions, write_cfg_args
from patient.geometry import FILE_NAME, FrameCut, Geometry, cut_geometry
from patient.labels import Label, LabelTable
from scene.cameras import Camera
from scene.checkpoint import Checkpoint, save_checkpoint
from utils.images import write_image, write_levels
from utils.spherical_harmonics import from_colour

WIDTH, HEIGHT, FRAMES = 48, 40, 8
CAMERA = Camera(WIDTH, HEIGHT)
LABELS = LabelTable((Label(2, "left lung", (86, 180, 233)), Label(300, "liver", (230, 159, 0))))


def oblique() -> Geometry:
    """Frames of 0.8 x 0.8 mm, 3 mm apart, turned about all axes, far from the scanner's centre."""
    angles = np.radians([20.0, -15.0, 30.0])
    turn = np.eye(3)
    for axis, angle in enumerate(angles):
        others = [i for i in range(3) if i != axis]
        about = np.eye(3)
        about[np.ix_(others, others)] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
        turn = turn @ about
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([0.8, 0.8, 1.5])  # of all slices; every second one is held out
    affine[:3, 3] = 40.0, -70.0, 25.0
    shape = (WIDTH, HEIGHT, 2 * FRAMES - 1)
    return cut_geometry(
        FrameCut((0, 1, 2), (True, True)),
        affine,
        shape,
        keep_every=2,
        window=(-200.0, 300.0),
        bits=8,
        source="oblique.nii.gz",
    )


def parameters(labels: bool = False) -> dict[str, torch.Tensor]:
    """Gaussians everywhere, and a drifting body in the segmentation head; of two ``labels`` if these are wanted."""
    generator = torch.Generator().manual_seed(3)

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator)

    n = 400
    half = torch.tensor([CAMERA.half_width, 1.0, CAMERA.half_height])
    xyz = uniform(-1, 1, n, 3) * half
    inside = ((xyz[:, [0, 2]] / half[[0, 2]] - torch.tensor([0.2, -0.1])).norm(dim=1) < 0.45)[:, None]
    right = (xyz[:, 0] > 0.2 * half[0])[:, None]
    shown = torch.cat([inside & ~right, inside & right], 1) if labels else inside
    return {
        "xyz": xyz,
        "f_dc": from_colour(uniform(0.05, 0.9, n, 1, 1)),
        "f_rest": torch.zeros(n, 0, 1),
        "opacity": uniform(0, 3, n, 1),
        "scaling": torch.log(uniform(0.02, 0.05, n, 3)),
        "rotation": uniform(-2, 2, n, 1),
        "m": uniform(-2, 2, n, 1),
        "sigma": torch.log(uniform(0.2, 0.6, n, 1, 1)),
        "w1": uniform(-0.1, 0.1, n, 4),
        "opacity_seg": torch.full((n, 1), 3.0),
        "f_dc_seg": from_colour(shown.float()[:, None]),
        "f_rest_seg": torch.zeros(n, 0, shown.shape[1]),
    }


def save_model(
    folder: Path, iteration: int = 30, labels: LabelTable | None = None, **changes: torch.Tensor
) -> None:
    extras = {"width": WIDTH, "height": HEIGHT, "distance": 1.0, "bits": 8, "background": torch.zeros(1)}
    times = torch.full((FRAMES,), 1 / FRAMES)
    params = {**parameters(labels is not None), **changes}
    state = Checkpoint(iteration, params, times, 0, 1.1, extras=extras, labels=labels)
    save_checkpoint(folder / f"chkpnt{iteration}.pth", state)


def make_case(root: Path, labels: LabelTable | None = None) -> Path:
    """The model's folder under ``root``, with its input frames in ``root``/data; with ``labels`` of two organs."""
    folder, data = root / "case", root / "data"
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    for k in range(2 * FRAMES - 1):
        blob = np.exp(-(((columns - 20 - k / 2) / 9) ** 2) - ((rows - 18) / 8) ** 2)
        place = f"original/{k // 2:04d}.png" if k % 2 == 0 else f"heldout/{k:04d}.png"
        write_image(data / "img" / place, blob.astype(np.float32), 8)
        if labels is None:
            write_image(data / "seg" / place, (blob > 0.5).astype(np.float32), 8)
        else:
            ids = np.where(blob > 0.5, np.where(columns < 20 + k / 2, *labels.ids), 0)
            write_levels(data / "seg" / place, ids[:, :, None].astype(np.uint16))
    geometry = replace(oblique(), labels=labels)
    geometry.save(data / FILE_NAME)
    geometry.save(folder / FILE_NAME)
    options = TrainOptions(
        source_path=str(data / "img"),
        seg_source_path=str(data / "seg"),
        pipeline="joint",
        model_path=str(folder),
        iterations=30,
    )
    write_cfg_args(folder / "cfg_args", options)
    save_model(folder, labels=labels)
    scores = [
        {"iteration": 30, "task": "img", "frames": "heldout", "method": method, "count": 7, "l1": 0.02, "psnr": psnr,
         "ssim": 0.9}
        for method, psnr in (("model", 25.0), ("linear", 26.5), ("cubic", 24.0))
    ]  # fmt: skip
    scores.append({**scores[0], "frames": "training", "psnr": 33.0})
    (folder / "evaluation.json").write_text(json.dumps(scores))
    (folder / "time.json").write_text(json.dumps({"time": 61.0, "elapsed": 33.0}))
    return folder
