#!/usr/bin/env python3
"""Render the frames of a trained model, and frames between them.

    python render.py -m OUTPUT --interp 4

writes OUTPUT/render_img/00000_0.png, 00000_1.png, ...; --help lists every option.
"""

from __future__ import annotations

import utils.threads  # noqa: F401  # isort: skip  (before torch)

import os
import re
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from arguments import RenderOptions, render_options
from gaussian_renderer import ACTIVE, ACTIVE_SEGMENTATION, MAX_RENDERS, Render, editing, render
from patient.geometry import FILE_NAME, Geometry
from patient.rendered_volume import Grid, RenderedVolume
from pictures.video import Shot, video_format, write_video
from scene.cameras import Camera
from scene.gaussian_model import GaussianModel
from scene.parameters import IMAGE, SEGMENTATION
from scene.trained import Trained
from utils.errors import UserError, run
from utils.images import WRITABLE, limit_pixels, write_image, write_levels
from utils.spherical_harmonics import to_colour

# What the views that are rendered together may take, unless one alone takes more. A view takes the output of `fold` for
# each Gaussian, a few entries per Gaussian in the tiles' lists, and the image, as floats, levels and bytes.
MEMORY = 2**30  # bytes
BYTES_PER_GAUSSIAN, BYTES_PER_VALUE = 100, 16
WRITERS = min(32, os.cpu_count() or 1)  # threads that encode images while the next ones are rendered

Say = Callable[[str], object]


@dataclass(frozen=True)
class Output:
    """A folder of images: which head they show, by which activity test."""

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
    antialiasing: bool
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
        drawn = render(
            model,
            self.camera,
            positions,
            [False] * views,
            renders,
            self.background,
            self.rasterizer,
            antialiasing=self.antialiasing,
        )
        return drawn.images.unflatten(0, (-1, views))

    def _edited(self, position: float) -> Tensor:
        """One view, (outputs, 1, C, H, W), of the Gaussians that the mask keeps, changed by the user's function."""
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
            editing.draw(cut, *gaussians, self.camera, self.background, self.antialiasing)
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

    kind = video_format(options.video_format) if options.video else None
    modify = editing.Modification(options.modify) if options.modify else None
    trained = Trained.load(options, say)
    model, path = trained.model, trained.path
    mask = editing.PointMask(options.mask_path, model.num_frames) if options.mask_path else None
    outputs = outputs_of(options, model)
    if outputs[-1].test == ACTIVE_SEGMENTATION and SEGMENTATION not in model.heads:
        print(f"{path} has no segmentation head: masks come from its image head", flush=True)
    keep_geometry(options, model.num_frames, say)

    renderer = Renderer(
        model,
        trained.camera,
        trained.background,
        outputs,
        options.rasterizer,
        trained.antialiasing,
        mask,
        modify,
    )
    volumes = volumes_of(renderer, options)
    names = write_images(renderer, trained.bits, volumes, options, say)
    write_volumes(renderer, volumes, say)
    if kind is not None:
        write_sequence(renderer, names, kind, options, say)
    if options.html:
        write_page(options, say)
    if options.generate_points_path:
        folder = editing.write_points(model, options.generate_points_path, outputs[-1].test)
        say(f"active centres of {model.num_frames} frames in {folder}")


def check(options: RenderOptions) -> None:
    """Refuse what can be refused before anything is read."""
    if options.extension.lower() not in WRITABLE:
        raise UserError(f"--extension {options.extension}: images are written as {', '.join(WRITABLE)}")
    if options.modify and options.rasterizer == "oracle":
        raise UserError("--modify needs the compiled rasteriser: leave out --rasterizer oracle")
    if options.html and (options.modify or options.mask_path):
        raise UserError("--html shows the model as it was trained: leave out --modify and --mask_path, or it")


def outputs_of(options: RenderOptions, model: GaussianModel) -> list[Output]:
    """The outputs of ``--pipeline``. Masks come from the segmentation head, or without one from the image head."""
    folder = Path(options.model_path)
    images = Output(folder / "render_img", IMAGE, ACTIVE)
    masks = Output(folder / "render_mask", model.heads[-1], ACTIVE_SEGMENTATION)
    return {"img": [images], "seg": [masks], "both": [images, masks]}[options.pipeline]


def keep_geometry(options: RenderOptions, num_frames: int, say: Say) -> None:
    """If another program's train.py left no frames.json in the model folder, copy that of the source frames."""
    kept = Path(options.model_path) / FILE_NAME
    if kept.exists() or not options.source_path:
        return
    geometry = Geometry.find(options.source_path)
    if geometry is not None and len(geometry.slices) == num_frames:
        geometry.save(kept)
        say(f"where the frames lie in the patient: {kept}")


def volumes_of(renderer: Renderer, options: RenderOptions) -> list[RenderedVolume]:
    """For ``--nifti``: an empty volume for each output. Refuses models without a place in a patient, or in colour."""
    if not options.nifti:
        return []
    path = Path(options.model_path) / FILE_NAME
    if not path.exists():
        raise UserError(
            f"--nifti: there is no {path} to say where the frames lie; train on a folder of prepare.py, or give it "
            "here with -s"
        )
    geometry, model = Geometry.load(path), renderer.model
    if len(geometry.slices) != model.num_frames:
        raise UserError(
            f"--nifti: {path} is for {len(geometry.slices)} frames, the model for {model.num_frames}: put the "
            "frames.json of these frames there"
        )
    if model.channels != 1:
        raise UserError(
            "--nifti: a volume holds one intensity, and this is a colour model: leave out --nifti"
        )
    grid = Grid(geometry, (renderer.camera.width, renderer.camera.height), options.interp)
    return [RenderedVolume(grid, mask=out.folder.name == "render_mask") for out in renderer.outputs]


def views_at_once(renderer: Renderer, positions: int, chunks: int) -> int:
    """How many views to render together: what --chunks asks for, as far as MEMORY allows."""
    camera, model, outputs = renderer.camera, renderer.model, len(renderer.outputs)
    pixels = outputs * model.channels * camera.width * camera.height
    fitting = MEMORY // (BYTES_PER_GAUSSIAN * len(model) + BYTES_PER_VALUE * pixels)
    return max(1, min(-(-positions // chunks), fitting, MAX_RENDERS // outputs))


def write_images(
    renderer: Renderer, bits: int, volumes: Sequence[RenderedVolume], options: RenderOptions, say: Say
) -> list[str]:
    """Render chunk after chunk while threads write what is done; at most two chunks are in memory, or one image per
    thread. Fills ``volumes`` too. Returns the names of the files in each output's folder, in order."""
    last = renderer.model.num_frames - 1
    numbers = [(k, i) for k in range(last) for i in range(options.interp)]
    numbers += [(last, i) for i in range(options.interp if options.beyond else 1)]
    names = {k + i / options.interp: f"{k:05d}_{i}{options.extension}" for k, i in numbers}
    slots = {position: slot for slot, position in enumerate(volumes[0].grid.positions)} if volumes else {}
    positions = sorted(names.keys() | slots.keys())
    bits = 8 if bits == 8 else 16
    if bits > 8 and options.extension.lower() in (".jpg", ".jpeg"):
        say("JPEG holds 8 bits per channel: these frames' 16 bits are rounded")
        bits = 8

    floats = options.extension.lower() == ".npy"
    write: Callable[[Path, np.ndarray], None] = write_image if floats else write_levels
    step = views_at_once(renderer, len(positions), options.chunks)
    folders = [out.folder for out in renderer.outputs]
    waiting: deque[Future[None]] = deque()
    most = max(step * len(folders), WRITERS)
    with (
        ThreadPoolExecutor(WRITERS) as writers,
        tqdm(total=len(names) * len(folders), desc="rendering", unit="image", disable=options.quiet) as bar,
    ):
        for first in range(0, len(positions), step):
            batch = positions[first : first + step]
            images = renderer(batch).clamp_(0, 1)  # (outputs, V, C, H, W)
            for volume, own in zip(volumes, images, strict=bool(volumes)):
                for position, image in zip(batch, own.cpu().numpy(), strict=True):
                    if position in slots:
                        volume.put(slots[position], image[0])
            stored = images if floats else levels_of(images, bits)
            arrays = stored.movedim(2, -1).cpu().numpy()
            for folder, own in zip(folders, arrays, strict=True):
                for position, array in zip(batch, own, strict=True):
                    if position in names:
                        array = array.astype(np.uint16) if array.dtype == np.int32 else array
                        waiting.append(writers.submit(write, folder / names[position], array))
            while len(waiting) > most:
                waiting.popleft().result()  # raises what the thread raised
                bar.update()
        while waiting:
            waiting.popleft().result()
            bar.update()
    for folder in folders:
        removed = remove_older(folder, set(names.values()), options.extension)
        say(
            f"{len(names)} images in {folder}"
            + (f" ({removed} of an earlier render removed)" if removed else "")
        )
    return list(names.values())


def levels_of(images: Tensor, bits: int) -> Tensor:
    """Values in [0, 1] as a file's levels: uint8, or int32 for 16 bits, since not every device has uint16."""
    levels = (images.nan_to_num(0) * (2**bits - 1)).round_()
    return levels.to(torch.uint8 if bits == 8 else torch.int32)


def write_volumes(renderer: Renderer, volumes: Sequence[RenderedVolume], say: Say) -> None:
    for out, volume in zip(renderer.outputs, volumes, strict=bool(volumes)):
        path = out.folder.with_name(f"{out.folder.name}.nii.gz")
        volume.write(path)
        shape = " x ".join(map(str, volume.values.shape))
        say(f"{shape} voxels in {path}")
    if volumes and not volumes[0].grid.geometry.evenly_spaced:
        say("  the frames are unevenly spaced: slices are drawn at even steps between them")


def write_sequence(
    renderer: Renderer, names: Sequence[str], kind: str, options: RenderOptions, say: Say
) -> None:
    """Write the video of the rendered images, up to the last frame."""
    assert options.video is not None
    folders = [out.folder for out in renderer.outputs]
    shots = [
        Shot([folder / name for folder in folders], *divmod(k, options.interp), options.interp)
        for k, name in enumerate(names[: (renderer.model.num_frames - 1) * options.interp + 1])
    ]
    geometry_file = Path(options.model_path) / FILE_NAME
    spacing = Geometry.load(geometry_file).spacing if geometry_file.exists() else None
    what = "both" if len(folders) > 1 else folders[0].name.removeprefix("render_")
    path = Path(options.model_path) / f"render_{what}.{kind}"
    write_video(path, shots, options.video, spacing[1] / spacing[0] if spacing else 1.0)
    say(f"{len(shots)} images, {len(shots) / options.video:.1f} s, in {path}")
    if kind == "gif" and options.video_format == "auto":
        say("  (pip install imageio-ffmpeg for MP4)")


def write_page(options: RenderOptions, say: Say) -> None:
    """The dense volume, its mask and its surface as one page."""
    from viewer.case import Case
    from viewer.pages import write_volume_page

    path = Path(options.model_path) / "render.html"
    write_volume_page(Case.open(options, say=say), path, options.interp if options.interp > 1 else None)
    say(f"{path}: {path.stat().st_size / 1e6:.1f} MB, to open in a browser and to send")


def remove_older(folder: Path, names: set[str], extension: str) -> int:
    """Remove images of an earlier render that are not among ``names``: left between the new ones, they would make the
    sequence a mixture of two models."""
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
