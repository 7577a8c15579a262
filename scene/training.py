"""Everything a training run consists of: made from options, resumed from a checkpoint, saved as one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from arguments import TrainOptions, resolve_device, write_cfg_args
from gaussian_renderer import rasterizer
from scene.cameras import Camera
from scene.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from scene.density_control import DensityControl
from scene.frames import Frames, write_mirror
from scene.gaussian_model import SEGMENTATION, GaussianModel, make_optimizer
from scene.heldout import HeldOut, hold_out
from scene.pipelines import Sampler, Task, tasks
from scene.point_cloud import write_point_cloud, write_points
from utils.errors import UserError
from utils.files import atomic_write
from utils.geometry import FILE_NAME, Geometry
from utils.spherical_harmonics import to_colour

_MAX_RENDERS = 64  # in one call of the compiled rasteriser: kMaxRenders in csrc/common/arguments.h


@dataclass
class Training:
    """A run between two iterations."""

    options: TrainOptions
    camera: Camera
    tasks: list[Task]
    model: GaussianModel
    optimizer: torch.optim.Adam
    control: DensityControl
    sampler: Sampler
    generator: torch.Generator  # on the CPU; all that is random comes from it
    background: Tensor  # (C,)
    geometry: Geometry | None = None  # of the frames, where prepare.py wrote it
    heldout: dict[str, HeldOut] = field(default_factory=dict)  # by task, where there are such frames
    iteration: int = 0

    @classmethod
    def start(cls, options: TrainOptions, say: Callable[[str], object]) -> Training:
        """Reads the frames, then makes a new model or takes the one of ``options.start_checkpoint``."""
        device = resolve_device(options.device)
        frames, masks, geometry, tests = _read_data(options, device, say)
        todo = tasks(options, frames, masks)
        _check_batch(options, todo)
        saved = load_checkpoint(options.start_checkpoint, device) if options.start_checkpoint else None
        camera = Camera(frames.width, frames.height, options.distance)
        generator = torch.Generator().manual_seed(options.seed)
        channels = saved.channels if saved else max(f.channels for f in (frames, masks) if f is not None)
        background = torch.full((channels,), 1.0 if options.white_background else 0.0)
        if options.random_background:
            background = torch.rand(channels, generator=generator)

        if saved is None:
            durations = geometry.durations() if geometry else None
            model = GaussianModel.random(options, camera, len(frames), channels, generator, device, durations)
        else:
            _check_fits(options, saved, frames)
            model = GaussianModel(saved.params, saved.time_func, saved.active_sh_degree)
            options = _with_model_of(options, model)
        needs_head = options.pipeline == "joint" or options.seg_head_only
        if needs_head and SEGMENTATION not in model.heads:
            model.add_segmentation_head()
        optimizer = make_optimizer(model, options, options.seg_head_only, rasterizer(options.rasterizer).Adam)
        training = cls(
            options,
            camera,
            todo,
            model,
            optimizer,
            DensityControl(model),
            Sampler(len(frames), 2 if options.camera == "mirror" else 1, options, generator),
            generator,
            background.to(device),
            geometry,
            {task.name: test for task, test in zip(todo, tests, strict=True) if test is not None},
        )
        if saved is not None:
            training._resume(saved, say)
        return training

    def _resume(self, saved: Checkpoint, say: Callable[[str], object]) -> None:
        """Goes on where ``saved`` stopped, if it was optimising the same parameters; else takes its weights only."""
        wanted = [group["name"] for group in self.optimizer.param_groups]
        there = [group.get("name") for group in saved.optimizer["param_groups"]] if saved.optimizer else []
        if wanted != there:
            added = "" if saved.has_seg_head or len(self.model.heads) == 1 else " and a new segmentation head"
            say(
                f"{self.options.start_checkpoint}: its weights{added}, with a fresh optimizer, from iteration 0 "
                "(it was not optimising these parameters)"
            )
            return
        groups = self.optimizer.state_dict()["param_groups"]  # rates come from the options
        assert saved.optimizer is not None
        self.optimizer.load_state_dict({"state": saved.optimizer["state"], "param_groups": groups})
        if "m_denom" in saved.statistics:
            self.control = DensityControl(self.model, saved.statistics)
        if "random" in saved.extras:
            self.generator.set_state(saved.extras["random"])
            self.background = saved.extras["background"].to(self.model.device)
        self.iteration = saved.iteration
        say(f"resuming {self.options.start_checkpoint} at iteration {saved.iteration}")

    @property
    def extent(self) -> float:
        """E: what learning rates and density control are relative to, plane units."""
        return self.options.extent_per_distance * self.camera.distance

    # ---- files -------------------------------------------------------------------------------------------------------

    @property
    def folder(self) -> Path:
        return Path(self.options.model_path)

    def write_inputs(self, say: Callable[[str], object]) -> None:
        """What describes the run: ``cfg_args``, ``cameras.json``, ``input.ply`` and the frames' geometry; and the
        mirrored frames of the published layout, where they are absent."""
        if self.options.camera == "mirror":
            for root in filter(None, (self.options.source_path, self.options.seg_source_path)):
                write_mirror(self.options.folder_of(root), Path(root) / "mirror", say)
        frames = self.tasks[0].frames
        write_cfg_args(self.folder / "cfg_args", self.options)
        with atomic_write(self.folder / "cameras.json") as temporary:
            temporary.write_text(json.dumps(self.camera.entries(frames.names)), encoding="utf-8")
        colours = to_colour(self.model.params["f_dc"].detach()[:, 0]).expand(-1, 3)
        write_points(self.folder / "input.ply", self.model.params["xyz"].detach(), colours)
        if self.geometry:
            self.geometry.save(self.folder / FILE_NAME)

    def save_point_cloud(self) -> None:
        path = self.folder / "point_cloud" / f"iteration_{self.iteration}" / "point_cloud.ply"
        write_point_cloud(path, self.model.params, self.model.time_func)

    def save_checkpoint(self) -> None:
        frames = self.tasks[0].frames
        extras = {
            "width": self.camera.width,
            "height": self.camera.height,
            "distance": self.camera.distance,
            "bits": frames.bits,
            "names": frames.names,
            "pipeline": self.options.pipeline,
            "background": self.background.cpu(),
            "random": self.generator.get_state(),
        }
        checkpoint = Checkpoint(
            self.iteration,
            {name: parameter.detach() for name, parameter in self.model.params.items()},
            self.model.time_func.detach(),
            self.model.active_sh_degree,
            self.extent,
            self.control.statistics,
            self.optimizer.state_dict(),
            extras,
        )
        save_checkpoint(self.folder / f"chkpnt{self.iteration}.pth", checkpoint)

    def save_xyz(self) -> None:
        with atomic_write(self.folder / "xyz" / f"{self.iteration}.pt") as temporary:
            torch.save(self.model.params["xyz"].detach().cpu(), temporary)


def _read_data(
    options: TrainOptions, device: torch.device, say: Callable[[str], object]
) -> tuple[Frames, Frames | None, Geometry | None, list[HeldOut | None]]:
    """The frames of ``-s``, for joint training the masks that belong to them, the frames' geometry, and for each of
    the two what is held out of it."""
    data_device = device if options.data_device == "auto" else resolve_device(options.data_device)

    def read(root: str) -> Frames:
        return Frames.read(options.folder_of(root), options.resolution, device, data_device, say)

    def read_heldout(folder: Path) -> Frames:
        return Frames.read(folder, options.resolution, device, data_device, say, consecutive=False)

    sequences = [(options.source_path, read(options.source_path))]
    geometry = Geometry.find(options.source_path)
    if geometry is not None and len(geometry.slices) != len(sequences[0][1]):
        raise UserError(
            f"{options.source_path} has {len(sequences[0][1])} frames, its {FILE_NAME} has {len(geometry.slices)}: "
            "run prepare.py again, or remove that file"
        )
    if options.pipeline == "joint":
        assert options.seg_source_path is not None
        masks = read(options.seg_source_path)
        _check_masks(f"{options.seg_source_path} against {options.source_path}", sequences[0][1], masks)
        sequences.append((options.seg_source_path, masks))
    (frames, *others), geometry, tests = hold_out(options, sequences, geometry, read_heldout, say)
    return frames, others[0] if others else None, geometry, tests


def _check_masks(where: str, frames: Frames, masks: Frames) -> None:
    """Do the masks belong to the frames?"""
    if len(masks) != len(frames):
        raise UserError(f"{where}: {len(masks)} masks for {len(frames)} frames; each frame needs its mask")
    for frame, mask in zip(frames.numbers, masks.numbers, strict=True):
        if frame != mask:
            raise UserError(f"{where}: frame number {frame} meets mask number {mask}; number them alike")
    if (masks.width, masks.height) != (frames.width, frames.height):
        raise UserError(
            f"{where}: masks of {masks.width} x {masks.height} pixels for frames of {frames.width} x {frames.height}"
        )


def _check_batch(options: TrainOptions, todo: list[Task]) -> None:
    """Can the rasteriser draw an iteration's images at once?"""
    real = min(options.batch_size, len(todo[0].frames))
    renders = sum(2 * real - 1 if task.terms.get("ibfr") else real for task in todo)
    if renders > _MAX_RENDERS and options.rasterizer == "compiled":
        raise UserError(
            f"--batch_size {options.batch_size} asks for {renders} images in an iteration, those in between "
            f"included: {_MAX_RENDERS} is the most; give a smaller one"
        )


def _check_fits(options: TrainOptions, saved: Checkpoint, frames: Frames) -> None:
    """Do the checkpoint's model and these frames belong together?"""
    path = options.start_checkpoint
    if saved.num_frames != len(frames):
        raise UserError(
            f"{path} was trained on {saved.num_frames} frames, {options.source_path} has {len(frames)}: "
            "give the frames that it was trained on"
        )
    size = saved.extras.get("width", frames.width), saved.extras.get("height", frames.height)
    if size != (frames.width, frames.height):
        raise UserError(
            f"{path} was trained on frames of {size[0]} x {size[1]} pixels, these are {frames.width} x "
            f"{frames.height}: check -s and --resolution"
        )
    if saved.extras.get("distance", options.distance) != options.distance:
        raise UserError(f"{path} was trained with --distance {saved.extras['distance']}: give it again")
    if max(frames.channels, saved.channels) != saved.channels:
        raise UserError(f"{path} is a grey model, and the frames of {options.source_path} are coloured")


def _with_model_of(options: TrainOptions, model: GaussianModel) -> TrainOptions:
    """``options`` whose model is the one of the checkpoint, so that what is saved of the run is true.

    Raises `UserError` where the command line asks for another.
    """
    actual = replace(
        options,
        poly_degree=model.poly_degree,
        sh_degree=model.sh_degree,
        use_dff=model.uses_dff,
        num_pts=len(model),
    )
    for name in options.given & {"poly_degree", "sh_degree", "use_dff"}:
        wanted, there = getattr(options, name), getattr(actual, name)
        if wanted != there:
            raise UserError(
                f"--{name} {wanted}: the model of {options.start_checkpoint} has {there}; leave it out"
            )
    return actual


def fresh_folder(path: str | os.PathLike[str]) -> Path:
    """Makes the output folder. Raises `UserError` where that cannot be."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"-m {folder}: a file of that name is in the way") from error
    return folder
