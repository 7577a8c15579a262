"""How well a model shows the frames it was trained on, and those held out between them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gaussian_renderer import render_frames
from patient.label_channels import colours_of, colours_of_index, index_of
from patient.labels import LabelTable
from pictures.figures import montage_choice
from scene.heldout import HeldOut
from training.iteration import Objective
from training.pipelines import Task
from utils.metrics import LabelScores, Scores, psnr

_AT_ONCE = 4  # frames rendered together: as much memory as an iteration takes

CLASSICAL = {"img": ("linear", "cubic"), "seg": ("sdf", "cubic sdf", "linear")}
"""Methods that interpolate a task's held-out frames for comparison; the first is the one to beat."""


@dataclass(frozen=True)
class Comparison:
    """Some held-out frames and their interpolations; (M, C, H, W) each, on the CPU, in [0, 1]; label maps in the
    labels' colours."""

    places: list[int]  # of the M among the held-out frames
    frames: Tensor
    model: Tensor
    classical: Tensor
    method: str  # that made ``classical``
    aspect: float  # height of a pixel over its width


@dataclass(frozen=True)
class HeldOutScores:
    """Scores on held-out frames."""

    slices: list[int]  # of the source
    by_method: dict[str, Scores]  # "model" first, then the task's `CLASSICAL` ones
    comparison: Comparison | None


@dataclass(frozen=True)
class TaskScores:
    """The scores of one task."""

    task: str
    labels: LabelTable | None  # whose scores they are
    scores: Scores  # of the training frames
    rendered: Tensor  # (C, H, W), the frame in the middle, and
    frame: Tensor  # what it should show
    heldout: HeldOutScores | None


class Evaluation:
    """Scores a model repeatedly; whatever does not depend on it is computed once."""

    def __init__(self, heldout: Mapping[str, HeldOut]) -> None:
        self.heldout = heldout  # by task
        self._classical: dict[str, dict[str, Scores]] = {}

    def __call__(self, objective: Objective, compare: bool) -> Iterator[TaskScores]:
        """The scores of each task of ``objective``; with ``compare`` also pictures of held-out frames."""
        for task in objective.tasks:
            middle = len(task.frames) // 2
            scores, rendered = evaluate(objective, task, middle)
            assert rendered is not None
            frame = task.targets([middle], objective.background)[0]
            if task.labels is not None:
                rendered, frame = (colours_of(image, task.labels) for image in (rendered, frame))
            held = self.heldout.get(task.name)
            heldout = None if held is None else self._heldout(objective, task, held, compare)
            yield TaskScores(task.name, task.labels, scores, rendered, frame, heldout)

    def _heldout(self, objective: Objective, task: Task, test: HeldOut, compare: bool) -> HeldOutScores:
        if task.name not in self._classical:
            self._classical[task.name] = evaluate_classical(task, test, objective.background)
        model = evaluate_heldout(objective, task, test)
        scores = {"model": model, **self._classical[task.name]}
        comparison = _compare(objective, task, test, model) if compare else None
        return HeldOutScores(test.slices, scores, comparison)


@torch.no_grad()
def evaluate(objective: Objective, task: Task, sample: int | None = None) -> tuple[Scores, Tensor | None]:
    """Renders all frames of ``task`` and scores them; also returns the render (C, H, W) of frame ``sample``."""
    scores, kept = _no_scores(task), None
    for index in _chunks(len(task.frames)):
        images = _render(objective, task, [float(k) for k in index])
        scores += _scores(task, images, task.targets(index, objective.background))
        if sample in index:
            kept = images[index.index(sample)]
    return scores, kept


@torch.no_grad()
def evaluate_heldout(objective: Objective, task: Task, test: HeldOut) -> Scores:
    """Renders the frames held out of ``task`` and scores them, quantised to the frames' bits as in an image file."""
    scores = _no_scores(task)
    for index in _chunks(len(test)):
        images = _render(objective, task, [test.indices[k] for k in index])
        targets = _targets(task, test, index, objective.background)
        scores += _scores(task, quantised(images, test.frames.bits), targets)
    return scores


@torch.no_grad()
def evaluate_classical(task: Task, test: HeldOut, background: Tensor) -> dict[str, Scores]:
    """Scores of classical interpolation on the frames held out of ``task``, method -> scores."""
    out = {}
    for method in CLASSICAL[task.name]:
        predicted = test.classical(method, background)  # (M, c, H, W)
        out[method] = _no_scores(task)
        for index in _chunks(len(test)):
            if task.labels is not None:
                truth = test.frames.index(index)[:, 0].cpu()
                found = torch.from_numpy(predicted[index, 0])
                out[method] += LabelScores.of_labels(found, truth, len(task.labels))
                continue
            targets = _targets(task, test, index, background).cpu()
            images = torch.from_numpy(predicted[index]).expand_as(targets)
            out[method] += Scores.of(images, targets)
    return out


def _no_scores(task: Task) -> Scores:
    """To add to."""
    return Scores() if task.labels is None else LabelScores()


def _scores(task: Task, images: Tensor, targets: Tensor) -> Scores:
    """Of renders and what they should show, (B, C, H, W) each."""
    if task.labels is None:
        return Scores.of(images, targets)
    index, truth = index_of(images), index_of(targets)
    return LabelScores.of_labels(index, truth, len(task.labels), psnr(images, targets))


def quantised(images: Tensor, bits: int) -> Tensor:
    """Values in [0, 1] rounded to the levels of ``bits`` 8 or 16; floats (32) are kept."""
    top = 2**bits - 1 if bits <= 16 else 0
    return (images.clamp(0, 1) * top).round() / top if top else images.clamp(0, 1)


def _compare(objective: Objective, task: Task, test: HeldOut, scores: Scores) -> Comparison:
    method = CLASSICAL[task.name][0]
    places = montage_choice(scores.sizes if task.name == "seg" else [1] * len(test))
    at = [test.indices[k] for k in places]
    if task.labels is not None:
        labels = task.labels
        shown, ours, theirs = (
            colours_of_index(index.cpu(), labels)
            for index in (
                test.frames.index(places)[:, 0],
                index_of(_render(objective, task, at)),
                torch.from_numpy(test.classical(method, objective.background, places))[:, 0],
            )
        )
        return Comparison(places, shown, ours, theirs, method, test.spacing[0] / test.spacing[1])
    frames = _targets(task, test, places, objective.background).cpu()
    return Comparison(
        places,
        frames,
        _render(objective, task, at).cpu(),
        torch.from_numpy(test.classical(method, objective.background, places)).expand_as(frames),
        method,
        test.spacing[0] / test.spacing[1],
    )


def _targets(task: Task, test: HeldOut, indices: Sequence[int], background: Tensor) -> Tensor:
    """Frames ``indices`` held out of ``task``, (B, C, H, W) with the channels of the model."""
    return replace(task, frames=test.frames).targets(indices, background)


def _render(objective: Objective, task: Task, positions: list[float]) -> Tensor:
    return render_frames(
        objective.model,
        objective.camera,
        positions,
        objective.background,
        task.head,
        task.test,
        objective.options.rasterizer,
        objective.options.antialiasing,
    )


def _chunks(count: int) -> list[list[int]]:
    indices = list(range(count))
    return [indices[first : first + _AT_ONCE] for first in range(0, count, _AT_ONCE)]
