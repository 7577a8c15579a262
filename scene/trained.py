"""A trained model as it is drawn: read from its checkpoint, with the camera and background of its training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from arguments import RenderOptions, resolve_device
from scene.cameras import Camera
from scene.checkpoint import Checkpoint, find, load_checkpoint
from scene.frames import Frames
from scene.gaussian_model import GaussianModel
from utils.errors import UserError


@dataclass(frozen=True, eq=False)
class Trained:
    """A model, and everything else that its images depend on."""

    path: Path
    """The checkpoint."""
    iteration: int
    model: GaussianModel
    camera: Camera
    bits: int
    """Of the frames: 8, 16, or 32 for floats."""
    background: Tensor  # (C,), on the model's device
    antialiasing: bool

    @classmethod
    def load(cls, options: RenderOptions, say: Callable[[str], object]) -> Trained:
        """The checkpoint that ``options`` name. The command line overrides the settings of the training.

        Raises `UserError`: no checkpoint, a damaged one, another degree than ``--poly_degree`` says, or a published
        one, which does not hold the frames' size, without its source frames.
        """
        path = find(options.model_path, options.iteration)
        saved = load_checkpoint(path, resolve_device(options.device))
        if options.poly_degree is not None and options.poly_degree != saved.poly_degree:
            raise UserError(
                f"--poly_degree {options.poly_degree}: {path} has degree {saved.poly_degree}; leave it out"
            )
        camera, bits = _camera(saved, path, options, say)
        model = GaussianModel(saved.params, saved.time_func, saved.active_sh_degree, saved.labels)
        background = _background(saved, options).to(model.device)
        return cls(path, saved.iteration, model, camera, bits, background, _antialiasing(saved, options))


def _camera(
    saved: Checkpoint, path: Path, options: RenderOptions, say: Callable[[str], object]
) -> tuple[Camera, int]:
    """The camera, and the bits of the frames. Our checkpoints know both, published ones need the source frames."""
    extras = saved.extras
    if "width" in extras:
        unused = sorted(options.given & {"source_path", "images", "resolution"})
        if unused:
            say(f"not needed: --{', --'.join(unused)} ({path} knows its frames)")
        distance = options.distance if "distance" in options.given else extras["distance"]
        return Camera(extras["width"], extras["height"], distance), extras["bits"]
    if not options.source_path or not options.frames_folder.is_dir():
        missing = (
            f"{options.frames_folder} is not a folder" if options.source_path else "no data root is known"
        )
        raise UserError(
            f"{path} does not hold the frames' size, and {missing}: give -s ROOT, with ROOT/original/"
        )
    frames = Frames.read(options.frames_folder, options.resolution, say=say)
    if len(frames) != saved.num_frames:
        raise UserError(
            f"{options.frames_folder} has {len(frames)} frames, {path} was trained on {saved.num_frames}: "
            "give -s the data root of this model"
        )
    return Camera(frames.width, frames.height, options.distance), frames.bits


def _background(saved: Checkpoint, options: RenderOptions) -> Tensor:
    """(C,), what was behind the frames in training, unless the command line says otherwise."""
    if "background" in saved.extras and "white_background" not in options.given:
        background: Tensor = saved.extras["background"]
        return background
    white = options.white_background and (
        saved.labels is None or saved.has_seg_head
    )  # not behind a label map
    return torch.full((saved.channels,), 1.0 if white else 0.0)


def _antialiasing(saved: Checkpoint, options: RenderOptions) -> bool:
    """As in training, unless the command line says otherwise. Published checkpoints do not record it; ``cfg_args``
    may."""
    if saved.antialiasing is None or "antialiasing" in options.given:
        return options.antialiasing
    return saved.antialiasing
