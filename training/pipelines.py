"""A pipeline is data: which frames, seen by which head, under which weighted loss terms. One loop trains them all."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from arguments import OptimisationOptions, TrainOptions
from gaussian_renderer import ACTIVE, ACTIVE_SEGMENTATION, Render, rasterizer
from in_between.motion import InBetween
from scene.frames import Frames
from scene.gaussian_model import IMAGE, SEGMENTATION
from utils import losses


@dataclass(frozen=True)
class Task:
    """What one set of frames asks of the model.

    name: "img" or "seg", in logs, plots and file names. head: whose opacity and colour are trained on them.
    test: bit of the activity mask. weight: of its loss in the total. terms: weight of each term, 0 leaves it out.
    between: what to expect at alpha (B,) of the way from frame k (B,) to the next, as (B, C, H, W); None for the two
        frames blended linearly.
    """

    name: str
    head: str
    frames: Frames
    test: int
    weight: float
    terms: Mapping[str, float]
    between: Callable[[Tensor, Tensor], Tensor] | None = None

    @property
    def in_betweens(self) -> bool:
        """Is what lies between frames rendered too, and compared with what is expected there (IBFR)?"""
        return bool(self.terms.get("ibfr") or self.terms.get("ibfr_ssim"))

    def render(self, view: int) -> Render:
        return Render(view, self.head, self.test)

    def targets(
        self, indices: Sequence[int] | Tensor, background: Tensor, mirrored: bool | Tensor = False
    ) -> Tensor:
        """Frames ``indices`` (B, C, H, W) with the channels of ``background`` (C,): grey ones suit a colour model."""
        return self.frames(indices, mirrored, background).expand(-1, len(background), -1, -1)

    def expected(self, positions: Tensor, background: Tensor, mirrored: Tensor) -> Tensor:
        """What ``positions`` (B,) between frames should show (IBFR), (B, C, H, W): as published, the frames around each
        blended linearly, (1 - alpha) I_k + alpha I_{k+1} at k + alpha."""
        before = positions.long()
        alphas = (positions - before).float()
        if self.between is None:
            first, second = self.targets(torch.cat([before, before + 1]), background, mirrored).chunk(2)
            return torch.lerp(first, second, alphas.view(-1, 1, 1, 1))
        images = self.between(before, alphas)
        return torch.where(mirrored, images.flip(-1), images).expand(-1, len(background), -1, -1)


def tasks(
    options: TrainOptions, frames: Frames, masks: Frames | None = None, between: InBetween | None = None
) -> list[Task]:
    """The tasks of ``options.pipeline``. ``frames`` are the masks themselves in plain segmentation training.
    ``between``: what in-between frames are expected to show, where that is not the linear blend."""
    images_between, masks_between = (between.images, between.masks) if between else (None, None)
    image_terms = {
        "l1": options.lambda_l1,
        "ssim": options.lambda_dssim,
        "ibfr": options.lambda_ibfr,
        "ibfr_ssim": options.lambda_ibfr_dssim,
        "sigma": options.lambda_sigma,
    }
    mask_terms = {
        "l1": options.lambda_l1_seg,
        "ibfr": options.lambda_ibfr_seg,
        "sigma": options.lambda_sigma_seg,
    }
    if options.pipeline == "img":
        return [Task("img", IMAGE, frames, ACTIVE, 1.0, image_terms, images_between)]
    if options.pipeline == "seg":
        if options.seg_head_only:  # the geometry is frozen, sigma with it
            return [
                Task("seg", SEGMENTATION, frames, ACTIVE_SEGMENTATION, 1.0, {"l1": options.lambda_l1_seg})
            ]
        return [Task("seg", IMAGE, frames, ACTIVE_SEGMENTATION, 1.0, mask_terms, masks_between)]
    assert masks is not None
    return [
        Task("img", IMAGE, frames, ACTIVE, options.lambda_img, image_terms, images_between),
        Task("seg", SEGMENTATION, masks, ACTIVE_SEGMENTATION, options.lambda_seg, mask_terms, masks_between),
    ]


@dataclass(frozen=True)
class Batch:
    """One iteration's views, all of one side: neighbouring real frames, and positions between two of them."""

    frames: list[int]
    between: list[tuple[int, float]]  # (k, alpha): at t_k + alpha (t_{k+1} - t_k)
    mirrored: bool

    @property
    def positions(self) -> list[float]:
        """Of all views: the real ones first."""
        return [float(k) for k in self.frames] + [k + alpha for k, alpha in self.between]


class Sampler:
    """Draws batches from a random generator on the CPU; its state is all that a resumed run needs."""

    def __init__(
        self, num_frames: int, sides: int, options: OptimisationOptions, generator: torch.Generator
    ) -> None:
        self.num_frames, self.sides = num_frames, sides
        self.options, self.generator = options, generator

    @property
    def num_views(self) -> int:
        return self.num_frames * self.sides

    def draw(self, in_between: bool) -> Batch:
        """A view at random with its neighbours: B frames around it, the odd one out after it; and with
        ``in_between`` a position between each two neighbours (IBFR)."""
        view = int(torch.randint(self.num_views, (), generator=self.generator))
        drawn, size = view % self.num_frames, self.options.batch_size
        around = range(drawn - (size - 1) // 2, drawn + size // 2 + 1)
        frames = [k for k in around if 0 <= k < self.num_frames]
        between: list[tuple[int, float]] = []
        if in_between:
            first = frames if size > 1 else [drawn, drawn + 1]
            low, high = self.options.ibfr_alpha_min, self.options.ibfr_alpha_max
            for k in first[:-1]:
                alpha = low + (high - low) * float(torch.rand((), generator=self.generator))
                if k + 1 < self.num_frames:
                    between.append((k, alpha))
        return Batch(frames, between, mirrored=view >= self.num_frames)


@dataclass(frozen=True)
class Inputs:
    """A batch as a tensor on the model's device: all that an iteration reads besides the model and the frames."""

    views: Tensor  # (2, V) float64: position in the sequence, real ones first, and 1 where the mirror side is shown
    real: int  # B

    @classmethod
    def of(cls, batch: Batch, device: torch.device) -> Inputs:
        mirrored = [float(batch.mirrored)] * len(batch.positions)
        views = torch.tensor([batch.positions, mirrored], dtype=torch.float64)
        return cls(views.to(device, non_blocking=True), len(batch.frames))

    @property
    def mirrored(self) -> Tensor:
        return self.views[1, 0] > 0

    def shown(self, task: Task, background: Tensor) -> tuple[Tensor, Tensor]:
        """What the task's renders should show: (B, C, H, W) at the real views, and (V - B, C, H, W) at those between,
        none where the task has no IBFR."""
        targets = task.targets(self.views[0, : self.real].long(), background, self.mirrored)
        if not task.in_betweens or self.views.shape[1] == self.real:
            return targets, targets[:0]
        return targets, task.expected(self.views[0, self.real :], background, self.mirrored)


def requested_renders(tasks: Sequence[Task], inputs: Inputs) -> list[list[Render]]:
    """For each task the renders it needs: of the real views, then, where it has IBFR, of those between."""
    views = inputs.views.shape[1]
    return [
        [task.render(view) for view in range(views if task.in_betweens else inputs.real)] for task in tasks
    ]


def loss_terms(
    task: Task,
    images: Tensor,  # (views, C, H, W): the task's share of the renders
    targets: Tensor,  # (B, C, H, W): the frames of the real views, which come first
    blends: Tensor,  # (views - B, C, H, W): what the others should look like
    raw_sigma: Tensor,  # (N,), logs of the spreads in time
    num_views: int,
    iteration: int,
    options: OptimisationOptions,
    backend: str = "compiled",
) -> dict[str, Tensor]:
    """Each term of the task that applies at ``iteration``, unweighted."""
    ops = rasterizer(backend)
    at_frames, between = split(images, [len(targets), len(blends)])
    if task.terms.get("ssim"):
        l1, ssim = ops.similarity(at_frames, targets)
        terms = {"l1": l1, "ssim": 1 - ssim}
    else:
        terms = {"l1": losses.l1(at_frames, targets)}
    if len(blends) and task.terms.get("ibfr_ssim"):
        terms["ibfr"], ssim = ops.similarity(between, blends)
        terms["ibfr_ssim"] = 1 - ssim
    elif len(blends):
        terms["ibfr"] = losses.l1(between, blends)
    if task.terms.get("sigma") and iteration < options.sigma_until_iter:
        low = options.sigma_low_views / num_views
        terms["sigma"] = ops.sigma_outside(raw_sigma, low, options.sigma_high)
    return terms


def split(images: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
    """``images.split(sizes)``; where one part is all of them, it is they themselves: no gradients to put together."""
    if len(images) in sizes:
        return [images if size else images[:0].detach() for size in sizes]
    return images.split(list(sizes))


def total_loss(tasks: Sequence[Task], terms: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """The weighted sum of all terms of all tasks."""
    weights = tuple(
        task.weight * task.terms[name] for task, values in zip(tasks, terms, strict=True) for name in values
    )
    values = torch.stack([value for named in terms for value in named.values()])
    return (values * _on_device(weights, values.device)).sum()


def named_losses(tasks: Sequence[Task], terms: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Each weighted term, by what a person would call it."""
    return {
        f"{name} loss of {task.name}": (task.weight * task.terms[name]) * value.detach()
        for task, values in zip(tasks, terms, strict=True)
        for name, value in values.items()
    }


@functools.cache
def _on_device(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device)
