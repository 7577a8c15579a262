"""How well a model shows the frames it was trained on, and those held out between them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from gaussian_renderer import render_frames
from patient.geometry import Geometry
from patient.label_channels import colours_of, index_of
from patient.labels import LabelTable
from patient.side_views import side_views
from pictures.figures import montage_choice
from scene.frames import Frames
from scene.heldout import HeldOut
from training.iteration import Objective
from training.pipelines import Task
from utils.beside import Beside
from utils.metrics import LabelScores, Scores, psnr

_AT_ONCE = 4  # frames rendered together: as much memory as an iteration takes

CLASSICAL = {"img": ("linear", "cubic"), "seg": ("sdf", "cubic sdf", "linear")}
"""Methods that interpolate a task's held-out frames for comparison; the first is the one to beat."""


@dataclass(frozen=True)
class Shown:
    """One of a comparison's pictures, of a frame or of a cut across all slices, in three versions."""

    name: str
    aspect: float  # height of a pixel over its width
    images: dict[str, np.ndarray]
    """"truth", "classical" and "model" -> (H, W, C) in [0, 1]; of label maps indices (H, W, 1)."""
    masks: dict[str, np.ndarray] = field(default_factory=dict)
    """In joint training what to outline on those of the images: (H, W) in [0, 1], or indices of labels."""


@dataclass(frozen=True)
class Comparison:
    """Some held-out frames and their interpolations, and the sequence from the side."""

    places: list[int]  # of the M frames among the held-out ones
    frames: list[Shown]  # M
    sides: list[Shown]
    method: str  # that made the classical ones
    labels: LabelTable | None  # of the masks


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

    def __init__(self, heldout: Mapping[str, HeldOut], geometry: Geometry | None = None) -> None:
        self.heldout = heldout  # by task
        self.geometry = geometry  # of the frames, where it is known
        self._classical: dict[str, Future[dict[str, Scores]]] = {}

    def begin(self, objective: Objective, beside: Beside) -> None:
        """Has the classical interpolation of held-out frames scored in a thread, before it is needed."""
        for task in objective.tasks:
            if task.name in self.heldout:
                test, background = self.heldout[task.name], objective.background
                self._classical[task.name] = beside(evaluate_classical, task, test, background)

    def __call__(self, objective: Objective, compare: bool) -> Iterator[TaskScores]:
        """The scores of each task of ``objective``; with ``compare`` also pictures of held-out frames."""
        for task in objective.tasks:
            scored = _scored(task)
            middle = scored[len(scored) // 2]
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
            self._classical[task.name] = Future()
            self._classical[task.name].set_result(evaluate_classical(task, test, objective.background))
        model = evaluate_heldout(objective, task, test)
        scores = {"model": model, **self._classical[task.name].result()}
        comparison = self._compare(objective, task, test, model) if compare else None
        return HeldOutScores(test.slices, scores, comparison)

    @torch.no_grad()
    def _compare(self, objective: Objective, task: Task, test: HeldOut, scores: Scores) -> Comparison:
        places = montage_choice(scores.sizes if task.name == "seg" else [1] * len(test))
        names = [f"slice {test.slices[place]}" for place in places]
        masks = next((other for other in objective.tasks if other.name == "seg"), None)
        outlined = None if masks is task else masks
        frames = _versions(objective, task, test, places)
        aspect = test.spacing[0] / test.spacing[1]
        shown = [Shown(name, aspect, _arrays(frames, k)) for k, name in enumerate(names)]

        views = side_views(None if self.geometry is None else self.geometry.matrix)
        row, column = _middle((masks or task).frames, masks is not None)
        positions = np.sort([*test.kept_positions, *test.positions])
        spacing = test.spacing[1], test.spacing[0], float(np.diff(positions).mean())
        cuts = _cuts(objective, task, test, row, column)
        sides = [
            Shown(view.name, view.aspect(spacing), {name: view.picture(cut[k]) for name, cut in cuts.items()})
            for k, view in enumerate(views)
        ]
        if outlined is not None and (inner := self.heldout.get(outlined.name)) is not None:
            inside = _versions(objective, outlined, inner, places)
            for k, frame in enumerate(shown):
                frame.masks.update(_outlines(_arrays(inside, k), outlined.labels))
            cuts = _cuts(objective, outlined, inner, row, column)
            for k, (view, side) in enumerate(zip(views, sides, strict=True)):
                pictures = {name: view.picture(cut[k]) for name, cut in cuts.items()}
                side.masks.update(_outlines(pictures, outlined.labels))
        labels = None if masks is None else masks.labels
        return Comparison(places, shown, sides, CLASSICAL[task.name][0], labels)


@torch.no_grad()
def evaluate(objective: Objective, task: Task, sample: int | None = None) -> tuple[Scores, Tensor | None]:
    """Renders all frames of ``task`` that were given, and scores them; also returns the render (C, H, W) of frame
    ``sample``, one of these."""
    scores, kept = _no_scores(task), None
    for index in _chunks(_scored(task)):
        images = _render(objective, task, [float(k) for k in index])
        scores += _scores(task, images, task.targets(index, objective.background))
        if sample in index:
            kept = images[index.index(sample)]
    return scores, kept


@torch.no_grad()
def evaluate_heldout(objective: Objective, task: Task, test: HeldOut) -> Scores:
    """Renders the frames held out of ``task`` and scores them, quantised to the frames' bits as in an image file."""
    scores = _no_scores(task)
    for index in _chunks(range(len(test))):
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
        for index in _chunks(range(len(test))):
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


def _versions(objective: Objective, task: Task, test: HeldOut, places: Sequence[int]) -> dict[str, Tensor]:
    """Held-out frames, and as interpolated classically and by the model: (M, C, H, W) each, on the CPU; of label maps
    indices (M, 1, H, W)."""
    classical = torch.from_numpy(test.classical(CLASSICAL[task.name][0], objective.background, places))
    model = _drawn(objective, task, [test.indices[k] for k in places])
    if task.labels is not None:
        return {"truth": test.frames.index(places).cpu(), "classical": classical, "model": model}
    frames = _targets(task, test, places, objective.background).cpu()
    return {"truth": frames, "classical": classical.expand_as(frames), "model": model}


def _drawn(objective: Objective, task: Task, positions: list[float]) -> Tensor:
    """`_render`, of label maps the indices (V, 1, H, W); on the CPU."""
    images = _render(objective, task, positions)
    return (images if task.labels is None else index_of(images)[:, None]).cpu()


def _cuts(
    objective: Objective, task: Task, test: HeldOut, row: int, column: int
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The sequence, kept and held-out frames, from the side: one row of each, (D, W, C), and one column, (D, H, C)."""
    places, rows, columns = [], defaultdict(list), defaultdict(list)

    def keep(at: list[float], versions: Mapping[str, Tensor]) -> None:
        places.extend(at)
        for name, images in versions.items():
            rows[name].append(images[:, :, row])
            columns[name].append(images[:, :, :, column])

    for index in _chunks(range(len(task.frames))):
        at = [float(k) for k in index]
        frames = (
            task.targets(index, objective.background) if task.labels is None else task.frames.index(index)
        ).cpu()
        keep(at, {"truth": frames, "classical": frames, "model": _drawn(objective, task, at)})
    for index in _chunks(range(len(test))):
        keep([test.indices[k] for k in index], _versions(objective, task, test, index))
    order = np.argsort(places, kind="stable")

    def stack(found: list[Tensor]) -> np.ndarray:
        every: np.ndarray = torch.cat(found).movedim(1, 2).numpy()[order]
        return every

    return {name: (stack(rows[name]), stack(columns[name])) for name in rows}


def _middle(frames: Frames, masks: bool) -> tuple[int, int]:
    """Row and column in the middle of what masks show, else of the frames."""
    if not masks:
        return frames.height // 2, frames.width // 2
    inside = np.zeros((frames.height, frames.width))
    for index in _chunks(range(len(frames))):
        shown = frames(index).mean(1) if frames.labels is None else (frames.index(index)[:, 0] > 0).float()
        inside += shown.sum(0).cpu().numpy()
    ends = [inside.sum(axis).cumsum() for axis in (1, 0)]
    row, column = (int(np.searchsorted(end, end[-1] / 2)) for end in ends)
    return row, column


def _arrays(versions: Mapping[str, Tensor], k: int) -> dict[str, np.ndarray]:
    """(M, C, H, W) each -> the k-th, (H, W, C)."""
    return {name: images[k].permute(1, 2, 0).numpy() for name, images in versions.items()}


def _outlines(masks: Mapping[str, np.ndarray], labels: LabelTable | None) -> dict[str, np.ndarray]:
    """What to outline of masks (H, W, C), or of indices of labels (H, W, 1): (H, W)."""
    return {name: mask.mean(2) if labels is None else mask[:, :, 0] for name, mask in masks.items()}


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
        objective.thickness,
    )


def _scored(task: Task) -> Sequence[int]:
    """The frames of ``task`` whose truth is known."""
    return range(len(task.frames)) if task.given is None else task.given


def _chunks(indices: Sequence[int]) -> list[list[int]]:
    indices = list(indices)
    return [indices[first : first + _AT_ONCE] for first in range(0, len(indices), _AT_ONCE)]
