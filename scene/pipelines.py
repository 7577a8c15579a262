"""A pipeline is data: which frames, seen by which head, under which weighted loss terms. One loop trains them all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from arguments import OptimisationOptions, TrainOptions
from gaussian_renderer import ACTIVE, ACTIVE_SEGMENTATION, Render, Renders
from scene.frames import Frames
from scene.gaussian_model import IMAGE, SEGMENTATION
from utils import losses


@dataclass(frozen=True)
class Task:
    """What one set of frames asks of the model.

    name: "img" or "seg", in logs, plots and file names. head: whose opacity and colour are trained on them.
    test: bit of the activity mask. weight: of its loss in the total. terms: weight of each term, 0 leaves it out.
    """

    name: str
    head: str
    frames: Frames
    test: int
    weight: float
    terms: Mapping[str, float]

    def render(self, view: int) -> Render:
        return Render(view, self.head, self.test)


def tasks(options: TrainOptions, frames: Frames, masks: Frames | None = None) -> list[Task]:
    """The tasks of ``options.pipeline``. ``frames`` are the masks themselves in plain segmentation training."""
    image_terms = {
        "l1": options.lambda_l1,
        "ssim": options.lambda_dssim,
        "ibfr": options.lambda_ibfr,
        "sigma": options.lambda_sigma,
    }
    mask_terms = {"l1": options.lambda_l1_seg, "sigma": options.lambda_sigma_seg}
    if options.pipeline == "img":
        return [Task("img", IMAGE, frames, ACTIVE, 1.0, image_terms)]
    if options.pipeline == "seg":
        if options.seg_head_only:  # the geometry is frozen, sigma with it
            return [Task("seg", SEGMENTATION, frames, ACTIVE_SEGMENTATION, 1.0, {"l1": options.lambda_l1_seg})]
        return [Task("seg", IMAGE, frames, ACTIVE_SEGMENTATION, 1.0, mask_terms)]
    assert masks is not None
    return [
        Task("img", IMAGE, frames, ACTIVE, options.lambda_img, image_terms),
        Task("seg", SEGMENTATION, masks, ACTIVE_SEGMENTATION, options.lambda_seg, mask_terms),
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

    def __init__(self, num_frames: int, sides: int, options: OptimisationOptions, generator: torch.Generator) -> None:
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


def requested_renders(tasks: Sequence[Task], batch: Batch) -> list[list[Render]]:
    """For each task the renders it needs: of the real views, then, where it has IBFR, of those between."""
    views = len(batch.positions)
    return [
        [task.render(v) for v in range(views if task.terms.get("ibfr") else len(batch.frames))] for task in tasks
    ]


def loss_terms(
    task: Task,
    images: Tensor,  # (views, C, H, W): the task's share of the renders
    batch: Batch,
    background: Tensor,  # (C,)
    spreads: Tensor,  # (N,), active sigma
    num_views: int,
    iteration: int,
    options: OptimisationOptions,
) -> tuple[dict[str, Tensor], Tensor]:
    """Each term of the task that applies at ``iteration``, unweighted; and the frames that its real views showed."""
    real = len(batch.frames)
    targets = task.frames(batch.frames, batch.mirrored, background)
    terms = {"l1": losses.l1(images[:real], targets)}
    if task.terms.get("ssim"):
        terms["ssim"] = 1 - losses.ssim(images[:real], targets)
    if task.terms.get("ibfr") and batch.between:
        neighbours = [k + step for k, _ in batch.between for step in (0, 1)]
        pairs = task.frames(neighbours, batch.mirrored, background).unflatten(0, (-1, 2))
        alphas = torch.tensor([alpha for _, alpha in batch.between]).to(images.device, non_blocking=True)
        blends = torch.lerp(pairs[:, 0], pairs[:, 1], alphas.view(-1, 1, 1, 1))
        terms["ibfr"] = losses.l1(images[real:], blends)
    if task.terms.get("sigma") and iteration < options.sigma_until_iter:
        terms["sigma"] = losses.sigma_outside(spreads, options.sigma_low_views / num_views, options.sigma_high)
    return terms, targets


def total_loss(tasks: Sequence[Task], terms: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """The weighted sum of all terms of all tasks."""
    parts = [
        task.weight * task.terms[name] * value
        for task, values in zip(tasks, terms, strict=True)
        for name, value in values.items()
    ]
    return torch.stack(parts).sum()


def screen_gradients(tasks: Sequence[Task], renders: Renders, real: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """For each task, over its ``real`` views: radii (V, N), visible (V, N) and dL/d(centre in px) (V, N, 2)."""
    assert renders.screen is not None and renders.screen.grad is not None
    radii, active = renders.radii[:real], renders.active[:real]
    return [
        (radii, (active & task.test) != 0, renders.screen.grad[head, :real]) for head, task in enumerate(tasks)
    ]
