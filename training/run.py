"""The state of a training run: made from options, resumed from a checkpoint, saved as one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from arguments import AUTO, TrainOptions, resolve_device, write_cfg_args
from gaussian_renderer import rasterizer
from patient.geometry import FILE_NAME, Geometry, relative_thickness
from patient.label_channels import colours_of
from scene.cameras import Camera
from scene.checkpoint import Checkpoint, all_of, save_checkpoint
from scene.frames import write_mirror
from scene.gaussian_model import GaussianModel
from scene.heldout import HeldOut
from scene.image_start import image_start
from scene.parameters import IMAGE, SEGMENTATION
from scene.point_cloud import write_point_cloud, write_points
from training.batches import Sampler, Views
from training.data import check_batch, expected_between, read_data
from training.density_control import DensityControl, reset_opacity, with_bound
from training.evaluation import Evaluation, TaskScores
from training.finite import magnitudes, moments, not_finite
from training.iteration import IterationResult, Objective, forward_backward
from training.optimizer import make_optimizer, set_rates
from training.pipelines import Task, tasks
from training.recording import RecordedStep
from training.reports import Metrics
from training.resuming import as_saved, changes, check_continues, check_fits, starting_point, with_model_of
from training.schedule import fitted, replan, warn, with_iterations
from utils.beside import Beside, import_ahead
from utils.errors import UserError
from utils.files import atomic_write, remove_temporaries
from utils.metrics import psnr
from utils.spherical_harmonics import to_colour
from utils.stages import stage
from utils.timing import Parts

Run = TypeVar("Run", bound="Training")

LATER = (
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "torch.utils.tensorboard",
    "scipy.interpolate",
)
"""Modules that evaluation and reports import, and that take a while."""


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
    generator: torch.Generator  # on the CPU; the source of all random numbers
    background: Tensor  # (C,)
    geometry: Geometry | None = None  # of the frames, where prepare.py wrote it
    heldout: dict[str, HeldOut] = field(default_factory=dict)  # by task, where there are such frames
    iteration: int = 0
    found: bool = False  # whether it continues from a checkpoint that was found, not named
    bounded: bool = False  # whether the bound on the number of Gaussians was reached
    averaged: GaussianModel | None = None  # running averages of the model's parameters, while there are any
    say: Callable[[str], object] = print  # one line to the user
    parts: Parts = field(default_factory=Parts)  # where its time goes
    beside: Beside = field(default_factory=Beside)  # what nothing waits for before the end
    _recorded: RecordedStep | None = None

    @classmethod
    def start(cls: type[Run], options: TrainOptions, say: Callable[[str], object]) -> Run:
        """Reads the frames, then makes a new model or takes the one of ``options.start_checkpoint``."""
        device = resolve_device(options.device)
        asked, beside = options, Beside()
        if device.type == "cuda":  # on a CPU, threads would take turns with the main one
            beside(import_ahead, *LATER)
        options, saved = starting_point(options, device, say)
        parts = Parts()
        with parts("reading"):
            data = read_data(options, device, say)
        frames, geometry = data.frames, data.geometry
        if thickness := relative_thickness(options.slice_thickness, geometry):
            say(f"frames drawn as slices {thickness:.3g} times as thick as they are far apart")
        options = fitted(options, len(frames) * frames.height * frames.width)
        if saved is not None and options.time:  # its length was set by its pace
            before = saved.extras.get("options", {}).get("iterations", options.iterations)
            options = with_iterations(options, max(before, options.iterations))
        todo = tasks(options, frames, data.masks, painted=data.painted)
        check_batch(options, todo)
        warn(options, any(task.in_betweens for task in todo), say)
        labels = todo[-1].labels
        if saved is not None:
            check_fits(options, saved, frames, labels)
        camera = Camera(frames.width, frames.height, options.distance)
        generator = torch.Generator().manual_seed(options.seed)
        channels = saved.channels if saved else data.channels
        background = torch.full((channels,), 1.0 if options.white_background else 0.0)
        if options.random_background:
            background = torch.rand(channels, generator=generator)
        if labels is not None and todo[-1].head == IMAGE:
            background = torch.zeros(channels)  # nothing is labelled behind a label map

        options = with_bound(options, saved, device, channels, len(labels) if labels else None)
        with parts("start"):
            if saved is None:
                durations = geometry.durations() if geometry else None
                if options.start == "frames":
                    sequences = [task.frames for task in todo]
                    model = image_start(options, camera, sequences, background, generator, device, durations)
                else:
                    of_images = labels if todo[-1].head == IMAGE else None
                    model = GaussianModel.random(
                        options, camera, len(frames), channels, generator, device, durations, of_images
                    )
            else:
                model = GaussianModel(saved.params, saved.time_func, saved.active_sh_degree, saved.labels)
                options = with_model_of(options, saved)
        needs_head = options.pipeline == "joint" or options.seg_head_only
        if needs_head and SEGMENTATION not in model.heads:
            model.add_segmentation_head(labels)
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
            {task.name: test for task, test in zip(todo, data.heldout, strict=True) if test is not None},
            say=say,
            parts=parts,
            beside=beside,
        )
        if saved is not None:
            training.found = asked.start_checkpoint == AUTO
            training._resume(saved, say)
        if device.type == "cuda":
            training._evaluation.begin(training.objective, beside)
        if training.iteration < options.iterations:  # last, as it takes minutes
            with parts("motion"):
                between = expected_between(options, data, say, beside)
            training.tasks = tasks(options, frames, data.masks, between, data.painted)
        return training

    def _resume(self, saved: Checkpoint, say: Callable[[str], object]) -> None:
        """Continues where ``saved`` stopped, if it optimised the same parameters; otherwise takes its weights only, or
        refuses, where the checkpoint was found and not named."""
        options, path = self.options, self.options.start_checkpoint
        wanted = [group["name"] for group in self.optimizer.param_groups]
        there = [group.get("name") for group in saved.optimizer["param_groups"]] if saved.optimizer else []
        if wanted != there:
            if self.found:
                raise UserError(
                    f"{path} is of a run that trained other parameters, which auto cannot continue: give that "
                    "file to --start_checkpoint by its name, and another -m"
                )
            added = "" if saved.has_seg_head or len(self.model.heads) == 1 else " and a new segmentation head"
            say(
                f"{path}: its weights{added}, with a fresh optimizer, from iteration 0 "
                "(it was not optimising these parameters)"
            )
            return
        check_continues(options, saved, self.pixels)
        groups = self.optimizer.state_dict()["param_groups"]  # rates come from the options
        assert saved.optimizer is not None
        self.optimizer.load_state_dict({"state": saved.optimizer["state"], "param_groups": groups})
        if "m_denom" in saved.statistics:
            self.control = DensityControl(self.model, saved.statistics)
        if "random" in saved.extras:
            self.generator.set_state(saved.extras["random"])
            self.background = saved.extras["background"].to(self.model.device)
        self.iteration = saved.iteration
        say(f"resuming {path} at iteration {saved.iteration}")
        if changed := changes(saved.extras.get("options", {}), as_saved(options)):
            say(f"options that changed since then: {', '.join(changed)}")
        if "trained" in saved.extras:
            self.averaged = GaussianModel(saved.params, saved.time_func, saved.active_sh_degree, saved.labels)
            with torch.no_grad():
                for name, parameter in self.model.named_parameters().items():
                    parameter.copy_(saved.extras["trained"][name])
        if "gradients" in saved.extras and self.iteration < options.iterations:
            self._end_iteration(saved.extras["gradients"])

    def _end_iteration(self, gradients: Mapping[str, Tensor]) -> None:
        """Makes the update that the checkpoint's iteration still had to make."""
        degree = self.model.active_sh_degree  # the schedule raised it before the checkpoint was written
        self.set_rates()
        self.model.active_sh_degree = degree
        for name, parameter in self.model.named_parameters().items():
            if name in gradients:
                parameter.grad = gradients[name].to(parameter.device)
        self.update()

    @property
    def thickness(self) -> float:
        """Of a frame, in mean distances between frames."""
        return relative_thickness(self.options.slice_thickness, self.geometry)

    @property
    def objective(self) -> Objective:
        """What an iteration needs of the run."""
        return Objective(
            self.model,
            self.camera,
            self.tasks,
            self.background,
            self.options,
            self.sampler.num_views,
            self.thickness,
        )

    def replan(self, iterations: int) -> None:
        """Changes the number of iterations, with the schedule to match."""
        self.options = replan(self.options, iterations, len(self.model))
        if self._recorded is not None:
            self._recorded.objective = self.objective

    def set_rates(self) -> None:
        """The learning rates of this iteration, and the degree of the harmonics."""
        set_rates(self.model, self.optimizer, self.iteration, self.options, self.extent)

    @property
    def regularised(self) -> bool:
        """Whether this iteration renders in-between frames too (IBFR)."""
        options = self.options
        skipped = options.ibfr_skip and self.iteration % options.ibfr_skip == 1
        begun = self.iteration >= options.ibfr_from_iter
        return begun and not skipped and any(task.in_betweens for task in self.tasks)

    @property
    def controlled(self) -> bool:
        """Whether density control is active in this iteration."""
        return self.iteration < self.options.densify_until_iter and not self.options.seg_head_only

    @torch.no_grad()
    def observe(self, result: IterationResult, real: int) -> None:
        """Adds the ``real`` views of an iteration to the statistics of density control."""
        if not self.controlled:
            return
        m_gradients = self.model.params["m"].grad
        assert result.screen_gradients is not None and m_gradients is not None
        for head, task in enumerate(self.tasks):
            self.control.observe(
                result.radii[:real],
                result.active[:real],
                task.test,
                result.screen_gradients[head, :real],
                m_gradients,
                self.camera,
                self.options.rasterizer,
            )

    @torch.no_grad()
    def update(self) -> None:
        """Ends an iteration: the density step and the reset of opacities where due, then the optimizer's step."""
        if self.controlled:
            with stage("density"):
                self._control_density()
        with stage("optimizer"):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._average()

    def _average(self) -> None:
        if not 0 < self.options.average_from_iter <= self.iteration:
            self.averaged = None
        elif self.averaged is None:
            self.averaged = GaussianModel(
                self.model.params, self.model.time_func, self.model.active_sh_degree, self.model.labels
            )
        else:
            means, values = self.averaged.named_parameters(), self.model.named_parameters()
            some = [name for name, value in values.items() if value.numel()]
            torch._foreach_lerp_(
                [means[name] for name in some],
                [values[name] for name in some],
                1 - self.options.average_decay,
            )
            self.averaged.active_sh_degree = self.model.active_sh_degree

    @property
    def shown(self) -> GaussianModel:
        """The model that is scored and saved: the averaged one, where there is one."""
        return self.model if self.averaged is None else self.averaged

    def _control_density(self) -> None:
        options, model, iteration = self.options, self.model, self.iteration
        if iteration > options.densify_from_iter and iteration % options.densification_interval == 0:
            self.release(keep_memory=True)
            self.averaged = None
            held_back = self.control.step(
                model, self.optimizer, iteration, options, self.extent, self.generator
            )
            if held_back and not self.bounded:
                self.bounded = True
                self.say(
                    f"[{iteration}] {len(model)} Gaussians of --max_gaussians {options.max_gaussians}: "
                    "from here on, only as many are added as that allows"
                )
            if len(model) == 0:
                raise UserError(
                    f"iteration {iteration}: every Gaussian was pruned; lower --prune_opacity or the learning rates"
                )
        at_start = options.white_background and iteration == options.densify_from_iter
        if iteration % options.opacity_reset_interval == 0 or at_start:
            reset_opacity(model, self.optimizer, options.opacity_reset_value)
            self.averaged = None

    @cached_property
    def pixels(self) -> str:
        """A digest of all frames: those of another patient may have the same names and sizes."""
        digest = hashlib.blake2b(digest_size=16)
        for task in self.tasks:
            levels = task.frames.levels if task.given is None else task.frames.levels[list(task.given)]
            digest.update(levels.cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def metrics(self, result: IterationResult) -> Metrics:
        """The numbers of this iteration, on the device."""
        terms = {
            f"{task.name}/{name}_loss": value
            for task, values in zip(self.tasks, result.terms, strict=True)
            for name, value in values.items()
        }
        return Metrics(
            losses=result.losses(self.tasks),
            magnitudes=magnitudes(self.model),
            psnr=psnr(result.images, result.targets).mean(),
            terms=terms,
            spreads=self.model.spreads().detach(),
        )

    def check_finite(self, values: Mapping[str, Tensor], with_moments: bool = False) -> None:
        """Raises `UserError` that names what is not finite: one of ``values``, of the gradients, or of the parameters,
        where an earlier iteration may have left it; with ``with_moments`` also of the optimizer's. Waits for the
        device."""
        named = {**values, **magnitudes(self.model)}
        if with_moments:
            named |= moments(self.model, self.optimizer)
        finite = torch.stack([value.isfinite().to(self.model.device) for value in named.values()]).tolist()
        for name, good in zip(named, finite, strict=True):
            if not good:
                raise not_finite(self.folder, name, self.iteration)

    @cached_property
    def _evaluation(self) -> Evaluation:
        return Evaluation(self.heldout, self.geometry)

    def evaluate(self) -> Iterator[TaskScores]:
        """Scores of what is `shown`, task by task; in the last iteration with pictures of held-out frames."""
        self.release()
        last = self.iteration == self.options.iterations
        return self._evaluation(replace(self.objective, model=self.shown), compare=last)

    def stepper(self) -> Callable[[Views, int, bool], IterationResult]:
        """The function that runs an iteration up to its gradients: replayed as CUDA graphs where possible."""
        options = self.options
        plain = options.debug or options.debug_from >= 0 or options.detect_anomaly
        # Those have a blend for each view, and a replay counts the pairs of one.
        plain = plain or options.antialiasing or self.thickness > 0
        here = all(task.frames.levels.device == self.model.device for task in self.tasks)
        if self.model.device.type == "cuda" and here and options.rasterizer == "compiled" and not plain:
            self._recorded = RecordedStep(self.objective)
            return self._recorded
        return lambda views, iteration, gradients: forward_backward(
            self.objective, views, iteration, gradients
        )

    def release(self, keep_memory: bool = False) -> None:
        """Frees recorded iterations, before the parameters are replaced (when their memory can be kept for the next) or
        much else is rendered."""
        if self._recorded is not None:
            self._recorded.forget(keep_memory)

    @property
    def extent(self) -> float:
        """E, in plane units: the scale of learning rates and density control."""
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
                self.beside(write_mirror, self.options.folder_of(root), Path(root) / "mirror", say)
        frames = self.tasks[0].frames
        write_cfg_args(self.folder / "cfg_args", self.options)
        with atomic_write(self.folder / "cameras.json") as temporary:
            temporary.write_text(json.dumps(self.camera.entries(frames.names)), encoding="utf-8")
        colours = to_colour(self.model.params["f_dc"].detach()[:, 0])  # (N, C)
        if self.model.label_head == IMAGE:
            assert self.model.labels is not None
            colours = colours_of(colours.T[:, :, None], self.model.labels)[:, :, 0].T
        else:
            colours = colours.expand(-1, 3)
        write_points(self.folder / "input.ply", self.model.params["xyz"].detach(), colours)
        if self.geometry:
            self.geometry.save(self.folder / FILE_NAME)

    def save_point_cloud(self) -> None:
        self.check_finite({})
        path = self.folder / "point_cloud" / f"iteration_{self.iteration}" / "point_cloud.ply"
        write_point_cloud(path, self.shown.params, self.shown.time_func, self.shown.labels)

    def save_checkpoint(self) -> None:
        """Writes ``chkpnt<iteration>.pth``; of older ones, ``options.keep_checkpoints`` - 1 are kept.

        The iteration's `update` comes later: the gradients are saved too, and a resumed run begins with it.
        Where averages are shown, the parameters still being trained are saved beside them.
        Raises `UserError`, and writes nothing, where something of the run is not finite.
        """
        self.check_finite({}, with_moments=True)
        frames = self.tasks[0].frames
        extras = {
            "width": self.camera.width,
            "height": self.camera.height,
            "distance": self.camera.distance,
            "bits": frames.bits,
            "numbers": frames.numbers,
            "pixels": self.pixels,
            "options": as_saved(self.options),
            "background": self.background.cpu(),
            "random": self.generator.get_state(),
            "gradients": {
                name: parameter.grad
                for name, parameter in self.model.named_parameters().items()
                if parameter.grad is not None
            },
        }
        if self.averaged is not None:
            extras["trained"] = {
                name: parameter.detach() for name, parameter in self.model.named_parameters().items()
            }
        checkpoint = Checkpoint(
            self.iteration,
            {name: parameter.detach() for name, parameter in self.shown.params.items()},
            self.shown.time_func.detach(),
            self.model.active_sh_degree,
            self.extent,
            self.control.statistics,
            self.optimizer.state_dict(),
            extras,
            self.model.labels,
        )
        save_checkpoint(self.folder / f"chkpnt{self.iteration}.pth", checkpoint)
        self._remove_older()

    def _remove_older(self) -> None:
        """Keeps as many checkpoints as the options say. Later iterations belong to another run, or are damaged: they do
        not count."""
        if self.options.keep_checkpoints:
            there = [file for n, file in all_of(self.folder).items() if n <= self.iteration]
            for file in there[: -self.options.keep_checkpoints]:
                file.unlink()

    def save_xyz(self) -> None:
        path = self.folder / "xyz" / f"{self.iteration}.pt"
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            torch.save(self.shown.params["xyz"].detach().cpu(), file)

    def tidy(self) -> None:
        """Removes what an earlier run in the folder was writing or removing when it was killed."""
        self._remove_older()
        below = (self.folder / "xyz", self.folder / "plots", *self.folder.glob("point_cloud/*"))
        for folder in (self.folder, *below):
            remove_temporaries(folder)
