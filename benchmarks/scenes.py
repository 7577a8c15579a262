"""Inputs of the speed measurements: a model in the midst of training, and frames to train on."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import kernel_seconds, measure, measure_on_device, synchronise
from gaussian_renderer import ACTIVE, Render, Rendered, render
from scene.cameras import Camera
from scene.checkpoint import load_checkpoint
from scene.frames import Frames
from scene.gaussian_model import GaussianModel
from utils.errors import UserError
from utils.images import write_image
from utils.spherical_harmonics import from_colour

CAMERA = Camera(128, 96)
GAUSSIANS, VIEWS, DEGREE = 24_000, 3, 7
FRAMES = 24  # of the sequence
# Of the demo's model after 600 iterations: medians and spreads of its Gaussians, and of their logarithms and logits.
MEDIAN_SCALE, LOG_SCALE_SPREAD = 0.64, 0.6  # px at 128 px width; the two axes apart
MEDIAN_LOGIT, LOGIT_SPREAD = -1.6, 2.3  # of the opacity: many nearly transparent, some nearly opaque


class Unavailable(Exception):
    """The measurement cannot run on this machine; the message says why."""


@dataclass(frozen=True)
class Bench:
    """Settings shared by all sections."""

    device: torch.device
    quick: bool
    checkpoint: str | None  # draw this model
    case: str | None  # train on the frames of this data root

    @property
    def frames(self) -> str:
        """What runs that respect ``case`` train on, in words."""
        return "/".join(Path(self.case).resolve().parts[-2:]) if self.case else "made-up frames"

    def measure(self, functions: Mapping[str, Callable[[], object]], repeats: int = 20) -> dict[str, float]:
        """Median seconds of each."""
        return measure(self.device, functions, *self._turns(repeats))

    def times(
        self, functions: Mapping[str, Callable[[], object]], repeats: int = 20
    ) -> dict[str, dict[str, float]]:
        """Of each: median "seconds" on the clock and, on a GPU, mean "device_seconds" of its kernels. On the clock, a
        small scene takes as long as Python needs to launch it, whatever the kernels do."""
        out = {"seconds": self.measure(functions, repeats)}
        on_device = measure_on_device(self.device, functions, *self._turns(repeats))
        return out | ({"device_seconds": on_device} if on_device else {})

    def kernels(self, function: Callable[[], object], repeats: int = 20) -> dict[str, float]:
        """Mean seconds of one call's kernels, by name."""
        seconds = kernel_seconds(self.device, function, *self._turns(repeats))
        if not seconds:
            raise Unavailable("torch's profiler saw no kernels")
        return seconds

    def _turns(self, repeats: int) -> tuple[int, int]:
        """Number of timed calls, and of warm-up calls."""
        return (2, 1) if self.quick else (repeats, 3)

    def model(self) -> tuple[GaussianModel, Camera]:
        """The trained model, or one in the midst of training."""
        if self.checkpoint:
            return trained_model(self.checkpoint, self.device)
        count = 4000 if self.quick else GAUSSIANS
        return model_in_training(count, CAMERA, DEGREE, self.device), CAMERA


def largest_difference(images: Tensor, others: Tensor) -> float:
    return float((images - others).detach().abs().max())


def model_in_training(
    count: int, camera: Camera, degree: int = 7, device: torch.device | str = "cpu"
) -> GaussianModel:
    """``count`` grey Gaussians of polynomial degree ``degree``, distributed as in the demo during training."""
    generator = torch.Generator().manual_seed(0)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.empty(shape).uniform_(low, high, generator=generator)

    def normal(mean: float, spread: float, *shape: int) -> Tensor:
        return mean + spread * torch.randn(shape, generator=generator)

    xyz = torch.zeros(count, 3)
    xyz[:, 0] = uniform(-camera.half_width, camera.half_width, count)
    xyz[:, 2] = uniform(-camera.half_height, camera.half_height, count)
    median = (
        MEDIAN_SCALE / Camera(128, 96, camera.distance).pixels_per_unit
    )  # plane units: resolution is free
    params = {
        "xyz": xyz,
        "w1": uniform(-1, 1, count, 2 * degree),
        "m": torch.logit(uniform(0, 1, count, 1), eps=1e-6),
        "sigma": torch.log(uniform(0.01, 1, count, 1, 1)),
        "scaling": normal(math.log(median), LOG_SCALE_SPREAD, count, 3),
        "rotation": torch.logit(uniform(0, 1, count, 1), eps=1e-6),
        "opacity": normal(MEDIAN_LOGIT, LOGIT_SPREAD, count, 1),
        "f_dc": from_colour(1.0) * uniform(-1, 1, count, 1, 1),  # colours from 0 to 1
        "f_rest": torch.zeros(count, 0, 1),
    }
    params = {name: value.to(device) for name, value in params.items()}
    return GaussianModel(params, torch.full((FRAMES,), 1 / FRAMES, device=device))


def trained_model(path: str, device: torch.device) -> tuple[GaussianModel, Camera]:
    """The model of a checkpoint that train.py wrote, and its camera."""
    saved = load_checkpoint(path, device)
    if "width" not in saved.extras:
        raise UserError(f"{path} does not hold the size of its frames: give a checkpoint of this train.py")
    camera = Camera(saved.extras["width"], saved.extras["height"], saved.extras["distance"])
    return GaussianModel(saved.params, saved.time_func, saved.active_sh_degree), camera


def neighbours(model: GaussianModel, views: int) -> list[float]:
    """Positions of ``views`` consecutive frames around the middle of the sequence, as in a training batch; if there
    are more views than frames, spread over the whole sequence."""
    last = model.num_frames - 1
    if views > model.num_frames:
        return [last * v / (views - 1) for v in range(views)]
    return [float((model.num_frames - views) // 2 + v) for v in range(views)]


class Drawing:
    """A model drawn at some positions, forward and backward, through the renderer that training uses."""

    def __init__(
        self, model: GaussianModel, camera: Camera, positions: Sequence[float], backend: str = "compiled"
    ) -> None:
        self.model, self.camera, self.positions, self.backend = model, camera, positions, backend
        self.background = torch.zeros(model.channels, device=model.device)
        generator = torch.Generator().manual_seed(1)
        shape = len(positions), model.channels, camera.height, camera.width
        # As large as for a mean over the batch, so that nothing is denormal.
        self.v_images = (torch.randn(shape, generator=generator) / math.prod(shape)).to(model.device)

    def forward(self) -> Rendered:
        renders = [Render(view, test=ACTIVE) for view in range(len(self.positions))]
        originals = [False] * len(self.positions)
        return render(
            self.model, self.camera, self.positions, originals, renders, self.background, self.backend
        )

    def forward_backward(self) -> None:
        leaves = [p for p in self.model.params.values() if p.numel()]
        torch.autograd.grad(self.forward().images, leaves, self.v_images, allow_unused=True)


def phantom(width: int, height: int, frames: int = FRAMES) -> np.ndarray:
    """A synthetic anatomy (frames, height, width) in [0, 1]: a textured ellipse that turns and bends, three organs."""
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    volume = np.empty((frames, height, width), np.float32)
    for k in range(frames):
        t = k / max(frames - 1, 1)
        image = 0.35 * (x**2 / 0.8 + y**2 / (0.5 + 0.3 * t) < 1)
        image += 0.06 * np.sin(17 * x + 3 * t) * np.cos(13 * y - 5 * t) * (image > 0)
        for i in range(3):
            angle = 2.1 * i + 1.5 * t
            distance = np.hypot(x - 0.45 * np.cos(angle), (y - 0.4 * np.sin(angle)) * (1 + 0.4 * i))
            image += 0.3 / (1 + np.exp(40 * (distance - 0.12 - 0.08 * np.sin(3 * t + i))))
        volume[k] = image.clip(0, 1)
    return volume


def write_phantom(folder: Path, width: int, height: int, frames: int = FRAMES) -> None:
    """Frames 0000.png ... of `phantom`."""
    for k, image in enumerate(phantom(width, height, frames)):
        write_image(folder / f"{k:04d}.png", image)


def write_resampled(folder: Path, side: int, frames: int, case: str | None) -> None:
    """``frames`` grey frames 0000.npy ... of side x side px and 16 bits: those of a data root ``case``, or a synthetic
    anatomy, resampled (trilinear)."""
    volume = torch.from_numpy(phantom(CAMERA.width, CAMERA.height))
    if case is not None:
        sequence = Frames.read(Path(case, "original"))
        volume = sequence(range(len(sequence))).mean(1)
    folder.mkdir(parents=True)
    size = frames, side, side
    resampled = torch.nn.functional.interpolate(
        volume[None, None], size, mode="trilinear", align_corners=True
    )[0, 0]
    levels = np.rint(resampled.numpy() * 65535).astype(np.uint16)
    for k, image in enumerate(levels):  # PNG would take longer to compress than the measured run
        np.save(folder / f"{k:04d}.npy", image)


def settle(device: torch.device) -> None:
    """Waits for the device and frees its cached memory, so that one measurement does not affect the next."""
    synchronise(device)
    if device.type == "cuda":
        gc.collect()  # a run and its recordings refer to each other
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
