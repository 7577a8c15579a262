#!/usr/bin/env python3
"""Renders the frames of a trained model, and frames between them.

    python render.py -m OUTPUT --interp 4

writes OUTPUT/render_img/00000_0.png, 00000_1.png, ...; --help lists every option.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from arguments import RenderOptions, render_options, resolve_device
from gaussian_renderer import ACTIVE, ACTIVE_SEGMENTATION, Render, editing, render
from scene.cameras import Camera
from scene.checkpoint import Checkpoint, find, load_checkpoint
from scene.frames import Frames
from scene.gaussian_model import IMAGE, SEGMENTATION, GaussianModel
from utils.errors import UserError, run
from utils.geometry import FILE_NAME, Geometry
from utils.images import WRITABLE, limit_pixels, write_image
from utils.spherical_harmonics import to_colour

VIEWS_AT_ONCE = 8
WRITERS = min(8, os.cpu_count() or 1)  # threads that encode images while the next are rendered

Say = Callable[[str], object]


@dataclass(frozen=True)
class Output:
    """A folder of images: whose opacity and colour they show, by which activity test."""

    folder: Path
    head: str
    test: int


@dataclass(frozen=True)
class Renderer:
    """Positions in the sequence -> images of every output."""

    model: GaussianModel
    camera: Camera
    background: Tensor  # (C,)
    outputs: Sequence[Output]
    rasterizer: str
    mask: editing.PointMask | None
    modify: editing.Modification | None

    @torch.no_grad()
    def __call__(self, positions: Sequence[float]) -> Tensor:
        """Images (outputs, V, C, H, W) at ``positions`` (frame index plus fraction)."""
        if self.mask is None and self.modify is None:
            return self._splat(self.model, positions)
        return torch.cat([self._edited(position) for position in positions], dim=1)

    def _splat(self, model: GaussianModel, positions: Sequence[float]) -> Tensor:
        """All outputs from one fold and one blend."""
        views = len(positions)
        renders = [Render(view, out.head, out.test) for out in self.outputs for view in range(views)]
        images = render(
            model, self.camera, positions, [False] * views, renders, self.background, self.rasterizer
        ).images
        return images.unflatten(0, (-1, views))

    def _edited(self, position: float) -> Tensor:
        """One view, (outputs, 1, C, H, W), of the Gaussians that the mask leaves, as the user's function has them."""
        cut = editing.cut(self.model, position)
        drawn = torch.stack([cut.active(out.test) for out in self.outputs])  # (outputs, N)
        if self.mask is not None:
            some = drawn.any(0)
            some = some.masked_scatter(some, self.mask.near(cut.means[some], position))
            if self.modify is None:
                return self._splat(editing.subset(self.model, some), [position])
            drawn &= some
        assert self.modify is not None
        cut = self.modify(cut)
        heads = [out.head for out in self.outputs]
        opacities = self.model.opacities(heads)
        colours = to_colour(self.model.raw_colours(heads, self.camera))
        images = [
            editing.draw(cut, *gaussians, self.camera, self.background)
            for gaussians in zip(drawn, opacities, colours, strict=True)
        ]
        return torch.stack(images)[:, None]


def main() -> None:
    options = render_options()
    limit_pixels(options.max_pixels)
    check(options)

    def say(message: str) -> None:
        if not options.quiet:
            print(message, flush=True)

    modify = editing.Modification(options.modify) if options.modify else None
    path = find(options.model_path, options.iteration)
    saved = load_checkpoint(path, resolve_device(options.device))
    if options.poly_degree is not None and options.poly_degree != saved.poly_degree:
        raise UserError(
            f"--poly_degree {options.poly_degree}: {path} has degree {saved.poly_degree}; leave it out"
        )
    camera, bits = camera_of(saved, path, options, say)
    mask = editing.PointMask(options.mask_path, saved.num_frames) if options.mask_path else None
    model = GaussianModel(saved.params, saved.time_func, saved.active_sh_degree)
    outputs = outputs_of(options, model)
    if outputs[-1].test == ACTIVE_SEGMENTATION and SEGMENTATION not in model.heads:
        print(f"{path} has no segmentation head: masks come from its image head", flush=True)
    keep_geometry(options, saved.num_frames, say)

    background = background_of(saved, options).to(model.device)
    renderer = Renderer(model, camera, background, outputs, options.rasterizer, mask, modify)
    write_images(renderer, bits, options, say)
    if options.generate_points_path:
        folder = editing.write_points(model, options.generate_points_path, outputs[-1].test)
        say(f"active centres of {model.num_frames} frames in {folder}")


def check(options: RenderOptions) -> None:
    """What can be refused before anything is read."""
    if options.extension.lower() not in WRITABLE:
        raise UserError(f"--extension {options.extension}: images are written as {', '.join(WRITABLE)}")
    if options.modify and options.rasterizer == "oracle":
        raise UserError("--modify is drawn by the compiled rasteriser alone: leave out --rasterizer oracle")


def camera_of(saved: Checkpoint, path: Path, options: RenderOptions, say: Say) -> tuple[Camera, int]:
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


def background_of(saved: Checkpoint, options: RenderOptions) -> Tensor:
    """(C,), what was behind the frames in training, unless the command line says otherwise."""
    if "background" in saved.extras and "white_background" not in options.given:
        return saved.extras["background"]
    return torch.full((saved.channels,), 1.0 if options.white_background else 0.0)


def outputs_of(options: RenderOptions, model: GaussianModel) -> list[Output]:
    """What ``--pipeline`` asks for. Masks come from the segmentation head, or where there is none from the image's."""
    folder = Path(options.model_path)
    images = Output(folder / "render_img", IMAGE, ACTIVE)
    masks = Output(folder / "render_mask", model.heads[-1], ACTIVE_SEGMENTATION)
    return {"img": [images], "seg": [masks], "both": [images, masks]}[options.pipeline]


def keep_geometry(options: RenderOptions, num_frames: int, say: Say) -> None:
    """Where train.py of another program left no frames.json beside the model, take that of the source frames."""
    kept = Path(options.model_path) / FILE_NAME
    if kept.exists() or not options.source_path:
        return
    geometry = Geometry.find(options.source_path)
    if geometry is not None and len(geometry.slices) == num_frames:
        geometry.save(kept)
        say(f"the frames' place in the patient: {kept}")


def write_images(renderer: Renderer, bits: int, options: RenderOptions, say: Say) -> None:
    """Renders chunk after chunk, while threads write the chunk before; no more than two are in memory."""
    numbers = [(k, i) for k in range(renderer.model.num_frames) for i in range(options.interp)]
    names = [f"{k:05d}_{i}{options.extension}" for k, i in numbers]
    positions = [k + i / options.interp for k, i in numbers]
    bits = 8 if bits == 8 else 16
    if bits > 8 and options.extension.lower() in (".jpg", ".jpeg"):
        say("JPEG holds 8 bits a channel: the 16 of these frames are rounded to them")
        bits = 8

    step = min(VIEWS_AT_ONCE, -(-len(positions) // options.chunks))
    folders = [out.folder for out in renderer.outputs]
    jobs: list[Future[None]] = []
    with (
        ThreadPoolExecutor(WRITERS) as writers,
        tqdm(total=len(names) * len(folders), desc="rendering", unit="image", disable=options.quiet) as bar,
    ):
        for first in range(0, len(positions), step):
            images = (
                renderer(positions[first : first + step]).movedim(2, -1).cpu().numpy()
            )  # (outputs, V, H, W, C)
            wait(jobs)
            jobs = [
                writers.submit(write_image, folder / name, array, bits)
                for folder, arrays in zip(folders, images, strict=True)
                for name, array in zip(names[first : first + step], arrays, strict=True)
            ]
            bar.update(len(jobs))
        wait(jobs)
    for folder in folders:
        removed = remove_older(folder, set(names), options.extension)
        say(
            f"{len(names)} images in {folder}"
            + (f" ({removed} of an earlier render removed)" if removed else "")
        )


def wait(jobs: Sequence[Future[None]]) -> None:
    for job in jobs:
        job.result()  # raises what the thread raised


def remove_older(folder: Path, names: set[str], extension: str) -> int:
    """Removes the images of an earlier render that are not among ``names``: with other sub-frames left between
    these, the sequence would be a mixture of two models."""
    older = [
        file
        for file in folder.iterdir()
        if re.fullmatch(r"\d{5,}_\d+", file.stem) and file.suffix == extension and file.name not in names
    ]
    for file in older:
        file.unlink()
    return len(older)


if __name__ == "__main__":
    run(main)
