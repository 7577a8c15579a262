"""What a person sees of a run: the progress bar, evaluations, TensorBoard, plots."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from gaussian_renderer import render_frames
from utils.files import atomic_write
from utils.metrics import dice, psnr

if TYPE_CHECKING:
    from scene.pipelines import Task
    from scene.training import Training

BAR_INTERVAL = 10  # iterations between two looks at the loss: each waits for the device
_EVALUATED_AT_ONCE = 8  # frames
_HISTOGRAM_INTERVAL = 1000  # iterations


@dataclass(frozen=True)
class Evaluation:
    """Scores of one task on its frames."""

    l1: float
    psnr: list[float]  # dB, one a frame
    dice: float

    @property
    def mean_psnr(self) -> float:
        return sum(self.psnr) / len(self.psnr)


@torch.no_grad()
def evaluate(training: Training, task: Task, sample: int | None = None) -> tuple[Evaluation, Tensor | None]:
    """Renders all frames of ``task`` and scores them; also returns the render (C, H, W) of frame ``sample``."""
    l1, scores, pairs, kept = [], [], [], None
    for first in range(0, len(task.frames), _EVALUATED_AT_ONCE):
        index = list(range(first, min(first + _EVALUATED_AT_ONCE, len(task.frames))))
        images = render_frames(
            training.model,
            training.camera,
            [float(k) for k in index],
            training.background,
            task.head,
            task.test,
            training.options.rasterizer,
        )
        targets = task.targets(index, training.background)
        l1.append((images - targets).abs().flatten(1).mean(1))
        scores.append(psnr(images, targets))
        pairs.append((images >= 0.5, targets >= 0.5))
        if sample in index:
            kept = images[index.index(sample)]
    predicted, truth = (torch.cat(masks) for masks in zip(*pairs, strict=True))
    return Evaluation(
        float(torch.cat(l1).mean()), torch.cat(scores).tolist(), float(dice(predicted, truth))
    ), kept


class Report:
    """Follows a run: a bar that shows loss, PSNR and points, and what TensorBoard and the plots keep."""

    def __init__(self, training: Training, first: int) -> None:
        options = training.options
        self.folder, self.quiet = training.folder, options.quiet
        self.started = time.perf_counter()
        self.bar = tqdm(
            total=options.iterations, initial=first, desc="training", unit="it", disable=self.quiet
        )
        self.writer = _tensorboard(self.folder, self.say)
        self.smoothed: float | None = None
        self.last_look = self.started, first

    def say(self, message: str) -> None:
        """One line, above the bar."""
        if not self.quiet:
            tqdm.write(message)

    def iteration(
        self,
        iteration: int,
        tasks: Sequence[Task],
        loss: Tensor,
        terms: Sequence[Mapping[str, Tensor]],
        images: Tensor,
        targets: Tensor,
        training: Training,
    ) -> None:
        """Moves the bar; now and then looks at the numbers, which waits for the device."""
        self.bar.update(1)
        if iteration % BAR_INTERVAL and iteration != training.options.iterations:
            return
        shown = float(loss.detach())
        self.smoothed = shown if self.smoothed is None else 0.6 * self.smoothed + 0.4 * shown
        batch_psnr = float(psnr(images.detach(), targets).mean())
        figures = {"loss": f"{self.smoothed:.5f}", "PSNR": f"{batch_psnr:.2f}", "points": len(training.model)}
        self.bar.set_postfix(figures, refresh=False)
        if self.writer is None:
            return
        now = time.perf_counter()
        then, before = self.last_look
        self.last_look = now, iteration
        for task, values in zip(tasks, terms, strict=True):
            for name, value in values.items():
                self.writer.add_scalar(f"{task.name}/{name}_loss", float(value.detach()), iteration)
        self.writer.add_scalar("total_loss", shown, iteration)
        self.writer.add_scalar("points", len(training.model), iteration)
        self.writer.add_scalar("iteration_ms", 1000 * (now - then) / max(iteration - before, 1), iteration)
        if iteration % _HISTOGRAM_INTERVAL == 0:
            self.writer.add_histogram("sigma", training.model.spreads().detach().cpu(), iteration)

    def evaluation(self, training: Training) -> dict[str, Evaluation]:
        """Scores every task on its frames; prints, logs and plots the scores."""
        out = {}
        iteration = training.iteration
        for task in training.tasks:
            middle = len(task.frames) // 2
            scores, image = evaluate(training, task, middle)
            out[task.name] = scores
            also = f", Dice {scores.dice:.4f}" if task.name == "seg" else ""
            self.say(
                f"[{iteration}] {task.name}: L1 {scores.l1:.5f}, PSNR {scores.mean_psnr:.2f} dB{also} "
                f"on {len(task.frames)} frames"
            )
            plot_psnr(
                self.folder / "plots" / f"{task.name}_{iteration}.png", task.name, iteration, scores.psnr
            )
            if self.writer is not None and image is not None:
                self.writer.add_scalar(f"{task.name}/l1", scores.l1, iteration)
                self.writer.add_scalar(f"{task.name}/psnr", scores.mean_psnr, iteration)
                if task.name == "seg":
                    self.writer.add_scalar("seg/dice", scores.dice, iteration)
                target = task.targets([middle], training.background)[0]
                pair = torch.stack([image.cpu(), target.cpu()])
                self.writer.add_images(f"{task.name}/render_and_frame", pair, iteration)
        return out

    def close(self) -> None:
        """Ends the bar and writes ``time.json``."""
        self.bar.close()
        if self.writer is not None:
            self.writer.close()
        spent = {
            "time": time.process_time(),
            "elapsed": time.perf_counter() - self.started,
        }
        with atomic_write(self.folder / "time.json") as temporary:
            temporary.write_text(json.dumps(spent), encoding="utf-8")


def _tensorboard(folder: Path, say: Any) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        say("tensorboard is not installed: no event files (pip install tensorboard)")
        return None
    return SummaryWriter(str(folder))


def plot_psnr(path: Path, name: str, iteration: int, scores: Sequence[float]) -> None:
    """PSNR of each frame, as a picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(range(len(scores)), scores, marker=".", linewidth=1)
    mean = math.fsum(scores) / len(scores)
    axes.axhline(mean, color="0.5", linestyle="--", linewidth=1, label=f"mean {mean:.2f} dB")
    axes.set(xlabel="frame", ylabel="PSNR (dB)", title=f"{name}, iteration {iteration}")
    axes.legend()
    with atomic_write(path, sync=False) as temporary:
        figure.savefig(temporary, dpi=100)
