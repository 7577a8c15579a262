"""A pipeline is data: which frames, seen by which head, under which weighted loss terms. One loop trains them all."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from arguments import OptimisationOptions, TrainOptions
from gaussian_renderer import ACTIVE, ACTIVE_SEGMENTATION, Render, rasterizer
from in_between.prediction import InBetween
from patient.labels import LabelTable
from scene.frames import Frames
from scene.parameters import IMAGE, SEGMENTATION
from utils import losses

CROSS_ENTROPY = 0.25
"""Weight of a label map's cross-entropy where a mask's L1 has the weight 1 (benchmarks/NOTES.md)."""


@dataclass(frozen=True)
class Task:
    """What the model should learn from one set of frames.

    name: "img" or "seg", in logs, plots and file names. head: whose opacity and colour are trained on them.
    test: bit of the activity mask. weight: of its loss in the total. terms: weight of each term, 0 leaves it out.
    between: the expected frames at alpha (B,) of the way from frame k (B,) to the next, (B, C, H, W); None for the two
        frames blended linearly. given: which frames the user gave, if others were filled in; they alone are scored.
    """

    name: str
    head: str
    frames: Frames
    test: int
    weight: float
    terms: Mapping[str, float]
    between: Callable[[Tensor, Tensor], Tensor] | None = None
    given: tuple[int, ...] | None = None

    @property
    def labels(self) -> LabelTable | None:
        """Of the label map that the frames are, if they are one."""
        return self.frames.labels

    @property
    def in_betweens(self) -> bool:
        """Are in-between frames rendered too, and compared with the expected ones (IBFR)?"""
        return bool(self.terms.get("ibfr") or self.terms.get("ibfr_ssim"))

    def render(self, view: int) -> Render:
        return Render(view, self.head, self.test)

    def targets(
        self, indices: Sequence[int] | Tensor, background: Tensor, mirrored: bool | Tensor = False
    ) -> Tensor:
        """Frames ``indices`` (B, C, H, W) with as many channels as ``background`` (C,), which grey ones repeat; of a
        label map, a channel per label."""
        frames = self.frames(indices, mirrored, background)
        return frames.expand(-1, self._channels(background), -1, -1)

    def _channels(self, background: Tensor) -> int:
        return len(background) if self.labels is None else len(self.labels)

    def shown(
        self, frames: Tensor, real: int, alphas: Tensor, background: Tensor, mirrored: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What renders should show: ``real`` frames, (B, C, H, W), and M positions between two frames (IBFR),
        (M, C, H, W): as published, the frames around each blended linearly, (1 - alpha) I_k + alpha I_{k+1}.

        frames: indices (B + 2 M,), of the real ones, then of those before and after each position. alphas: (M,).
        """
        extra = len(alphas)
        if self.between is None:  # all at once: each call costs a GPU several small kernels
            images, before, after = self.targets(frames, background, mirrored).split([real, extra, extra])
            return images, torch.lerp(before, after, alphas.view(-1, 1, 1, 1))
        between = self.between(frames[real : real + extra], alphas)
        between = torch.where(mirrored, between.flip(-1), between)
        return (
            self.targets(frames[:real], background, mirrored),
            between.expand(-1, self._channels(background), -1, -1),
        )


def tasks(
    options: TrainOptions,
    frames: Frames,
    masks: Frames | None = None,
    between: InBetween | None = None,
    painted: tuple[int, ...] | None = None,
) -> list[Task]:
    """The tasks of ``options.pipeline``. ``frames`` are the masks themselves in plain segmentation training.
    ``between``: the expected in-between frames, where they are not the linear blend. ``painted``: the frames whose mask
    was given, where not all are."""
    images_between, masks_between = (between.images, between.masks) if between else (None, None)
    image_terms = {
        "l1": options.lambda_l1,
        "ssim": options.lambda_dssim,
        "ibfr": options.lambda_ibfr,
        "ibfr_ssim": options.lambda_ibfr_dssim,
        "sigma": options.lambda_sigma,
    }
    mask_terms: dict[str, float] = {
        "l1": options.lambda_l1_seg,
        "ibfr": options.lambda_ibfr_seg,
        "sigma": options.lambda_sigma_seg,
    }
    if (frames if masks is None else masks).labels is not None:
        mask_terms = {
            "cross_entropy": CROSS_ENTROPY * options.lambda_l1_seg,
            "ibfr": CROSS_ENTROPY * options.lambda_ibfr_seg,
            "sigma": options.lambda_sigma_seg,
        }
    if options.pipeline == "img":
        return [Task("img", IMAGE, frames, ACTIVE, 1.0, image_terms, images_between)]
    if options.pipeline == "seg":
        if options.seg_head_only:  # the geometry is frozen, sigma with it
            frozen_terms = {
                name: value for name, value in mask_terms.items() if name not in ("ibfr", "sigma")
            }
            return [Task("seg", SEGMENTATION, frames, ACTIVE_SEGMENTATION, 1.0, frozen_terms)]
        return [Task("seg", IMAGE, frames, ACTIVE_SEGMENTATION, 1.0, mask_terms, masks_between)]
    assert masks is not None
    return [
        Task("img", IMAGE, frames, ACTIVE, options.lambda_img, image_terms, images_between),
        Task(
            "seg",
            SEGMENTATION,
            masks,
            ACTIVE_SEGMENTATION,
            options.lambda_seg,
            mask_terms,
            masks_between,
            painted,
        ),
    ]


def loss_terms(
    task: Task,
    images: Tensor,  # (views, C, H, W): the task's share of the renders
    targets: Tensor,  # (B, C, H, W): the frames of the real views, which come first
    blends: Tensor,  # (views - B, C, H, W): what the others should look like
    *,
    raw_sigma: Tensor,  # (N,), logs of the spreads in time
    num_views: int,
    iteration: int,
    options: OptimisationOptions,
    backend: str = "compiled",
) -> dict[str, Tensor]:
    """Each term of the task that applies at ``iteration``, unweighted."""
    ops = rasterizer(backend)
    at_frames, between = split(images, [len(targets), len(blends)])
    name, difference = ("l1", losses.l1)
    if task.labels is not None:
        name, difference = ("cross_entropy", losses.label_cross_entropy)  # type: ignore[assignment]
    if task.terms.get("ssim"):
        l1, ssim = ops.similarity(at_frames, targets)
        terms = {"l1": l1, "ssim": 1 - ssim}
    else:
        terms = {name: difference(at_frames, targets)}
    if len(blends) and task.terms.get("ibfr_ssim"):
        terms["ibfr"], ssim = ops.similarity(between, blends)
        terms["ibfr_ssim"] = 1 - ssim
    elif len(blends):
        terms["ibfr"] = difference(between, blends)
    if task.terms.get("sigma") and iteration < options.sigma_until_iter:
        low = options.sigma_low_views / num_views
        terms["sigma"] = ops.sigma_outside(raw_sigma, low, options.sigma_high)
    return terms


def split(images: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
    """``images.split(sizes)``; a single part is ``images`` itself, which saves assembling gradients."""
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
    """Each weighted term, under a readable name."""
    return {
        f"{name} loss of {task.name}": (task.weight * task.terms[name]) * value.detach()
        for task, values in zip(tasks, terms, strict=True)
        for name, value in values.items()
    }


@functools.cache
def _on_device(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device)
