#!/usr/bin/env python3
"""Renders the frames of a trained model, and frames between them.

    python render.py -m OUTPUT --interp 4

writes OUTPUT/render_img/00000_0.png, 00000_1.png, ...; --help lists every option.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tqdm import tqdm

from arguments import RenderOptions, render_options, resolve_device
from gaussian_renderer import ACTIVE, ACTIVE_SEGMENTATION, render_frames
from scene.cameras import Camera
from scene.checkpoint import Checkpoint, find, load_checkpoint
from scene.frames import Frames
from scene.gaussian_model import IMAGE, SEGMENTATION, GaussianModel
from utils.errors import UserError, run
from utils.images import write_image

VIEWS_AT_ONCE = 8
WRITERS = 4  # threads that encode images while the next are rendered

OUTPUTS = {"img": ("render_img",), "seg": ("render_mask",), "both": ("render_img", "render_mask")}


def camera_of(saved: Checkpoint, options: RenderOptions) -> tuple[Camera, int]:
    """The camera and the bits of the images: from our checkpoint; a published one needs the source frames."""
    extras = saved.extras
    if "width" in extras:
        return Camera(extras["width"], extras["height"], extras["distance"]), extras["bits"]
    frames = Frames.read(options.frames_folder, options.resolution)
    if len(frames) != saved.num_frames:
        raise UserError(f"{options.frames_folder} has {len(frames)} frames, the model {saved.num_frames}: check -s")
    return Camera(frames.width, frames.height, options.distance), frames.bits


def background_of(saved: Checkpoint, options: RenderOptions) -> torch.Tensor:
    if "background" in saved.extras and "white_background" not in options.given:
        return saved.extras["background"]
    return torch.full((saved.channels,), 1.0 if options.white_background else 0.0)


def main() -> None:
    options = render_options()
    device = resolve_device(options.device)
    path = find(options.model_path, options.iteration)
    saved = load_checkpoint(path, device)
    if options.poly_degree is not None and options.poly_degree != saved.poly_degree:
        raise UserError(f"--poly_degree {options.poly_degree}: {path} has degree {saved.poly_degree}; leave it out")
    camera, bits = camera_of(saved, options)
    background = background_of(saved, options).to(device)
    model = GaussianModel(saved.params, saved.time_func, saved.active_sh_degree)
    positions = [k + i / options.interp for k in range(model.num_frames) for i in range(options.interp)]
    names = [f"{k:05d}_{i}{options.extension}" for k in range(model.num_frames) for i in range(options.interp)]

    def say(message: str) -> None:
        if not options.quiet:
            print(message, flush=True)

    for folder in OUTPUTS[options.pipeline]:
        head, test = IMAGE, ACTIVE
        if folder == "render_mask":
            head, test = SEGMENTATION, ACTIVE_SEGMENTATION
            if SEGMENTATION not in model.heads:
                say(f"{path} has no segmentation head: masks come from its image head")
                head = IMAGE
        out = Path(options.model_path) / folder
        step = min(VIEWS_AT_ONCE, -(-len(positions) // options.chunks))
        with (
            ThreadPoolExecutor(WRITERS) as writers,
            tqdm(total=len(positions), desc=folder, unit="image", disable=options.quiet) as bar,
        ):
            for first in range(0, len(positions), step):
                chunk = positions[first : first + step]
                images = render_frames(model, camera, chunk, background, head, test, options.rasterizer)
                arrays = images.permute(0, 2, 3, 1).cpu().numpy()  # (V, H, W, C)
                jobs = [
                    writers.submit(write_image, out / name, array, 8 if bits == 8 else 16)
                    for name, array in zip(names[first:], arrays, strict=False)
                ]
                for job in jobs:
                    job.result()
                bar.update(len(chunk))
        say(f"{len(positions)} images in {out}")


if __name__ == "__main__":
    run(main)
