"""What a person sees of a run: the progress bar, evaluations, TensorBoard, plots."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from gaussian_renderer import render_frames
from pictures.figures import draw_montage, montage_choice, plot_scores
from utils.errors import UserError
from utils.files import atomic_write
from utils.metrics import Scores, psnr

if TYPE_CHECKING:
    from training.iteration import Outcome
    from training.pipelines import Task
    from training.run import Training

EVALUATION_FILE = "evaluation.json"
BAR_INTERVAL = 10  # iterations between two looks at the loss: each waits for the device
_EVALUATED_AT_ONCE = 4  # frames: as much memory as an iteration takes
_HISTOGRAM_INTERVAL = 1000  # iterations


CLASSICAL = {"img": ("linear", "cubic"), "seg": ("sdf", "cubic sdf", "linear")}
"""What a task's held-out frames are interpolated with for comparison; the first is the one to beat."""

NAMES = {"model": "ours", "linear": "linear", "cubic": "cubic spline", "sdf": "signed distance"}
NAMES["cubic sdf"] = "cubic signed distance"


@torch.no_grad()
def evaluate(training: Training, task: Task, sample: int | None = None) -> tuple[Scores, Tensor | None]:
    """Renders all frames of ``task`` and scores them; also returns the render (C, H, W) of frame ``sample``."""
    scores, kept = Scores(), None
    for index in _batches(len(task.frames)):
        images = _render(training, task, [float(k) for k in index])
        scores += Scores.of(images, task.targets(index, training.background))
        if sample in index:
            kept = images[index.index(sample)]
    return scores, kept


@torch.no_grad()
def evaluate_heldout(training: Training, task: Task) -> Scores:
    """Renders what was held out of ``task`` and scores it, rounded to the frames' bits as in an image file."""
    test = training.heldout[task.name]
    scores = Scores()
    for index in _batches(len(test)):
        images = _render(training, task, [test.indices[k] for k in index])
        scores += Scores.of(rounded(images, test.frames.bits), heldout_targets(training, task, index))
    return scores


@torch.no_grad()
def evaluate_classical(training: Training, task: Task) -> dict[str, Scores]:
    """Scores of classical interpolation on what was held out of ``task``, method -> scores."""
    test = training.heldout[task.name]
    out = {}
    for method in CLASSICAL[task.name]:
        predicted = test.classical(method, training.background)  # (M, c, H, W)
        out[method] = Scores()
        for index in _batches(len(test)):
            targets = heldout_targets(training, task, index).cpu()
            images = torch.from_numpy(predicted[index]).expand_as(targets)
            out[method] += Scores.of(images, targets)
    return out


def heldout_targets(training: Training, task: Task, indices: Sequence[int]) -> Tensor:
    """Held-out frames ``indices`` (B, C, H, W) with the channels of the model."""
    frames = training.heldout[task.name].frames(indices, background=training.background)
    return frames.expand(-1, len(training.background), -1, -1)


def rounded(images: Tensor, bits: int) -> Tensor:
    """Values in [0, 1] on the levels of ``bits`` 8 or 16; floats (32) stay."""
    top = 2**bits - 1 if bits <= 16 else 0
    return (images.clamp(0, 1) * top).round() / top if top else images.clamp(0, 1)


def _render(training: Training, task: Task, positions: list[float]) -> Tensor:
    return render_frames(
        training.shown,
        training.camera,
        positions,
        training.background,
        task.head,
        task.test,
        training.options.rasterizer,
        training.options.antialiasing,
    )


def _batches(count: int) -> list[list[int]]:
    indices = list(range(count))
    return [indices[first : first + _EVALUATED_AT_ONCE] for first in range(0, count, _EVALUATED_AT_ONCE)]


class _Look:
    """Numbers of one iteration on their way from the device."""

    def __init__(self, training: Training, outcome: Outcome) -> None:
        self.iteration, self.time = training.iteration, time.perf_counter()
        terms = {
            f"{task.name}/{name}_loss": value
            for task, values in zip(training.tasks, outcome.terms, strict=True)
            for name, value in values.items()
        }
        quality = {"PSNR": psnr(outcome.images, outcome.targets).mean()}
        named = outcome.losses(training.tasks) | training.magnitudes() | quality | terms
        self.names, self.logged = list(named), ["loss", *terms]
        values = torch.stack([value.detach().float() for value in named.values()])
        self.event = torch.cuda.Event() if values.is_cuda else None
        self.values = torch.empty(values.shape, pin_memory=values.is_cuda).copy_(values, non_blocking=True)
        if self.event:
            self.event.record()

    def numbers(self) -> dict[str, float]:
        """Each by its name; waits for the device if they are still on their way."""
        if self.event:
            self.event.synchronize()
        return dict(zip(self.names, self.values.tolist(), strict=True))

    def scalars(self, numbers: Mapping[str, float]) -> dict[str, float]:
        """What TensorBoard keeps of them."""
        return {"total_loss" if name == "loss" else name: numbers[name] for name in self.logged}


class Report:
    """Follows a run: a bar that shows loss, PSNR and points, and what TensorBoard and the plots keep."""

    def __init__(self, training: Training) -> None:
        options, first = training.options, training.iteration
        self.training = training
        self.folder, self.quiet = training.folder, options.quiet
        self.started = time.perf_counter()
        self.bar = tqdm(
            total=options.iterations, initial=first, desc="training", unit="it", disable=self.quiet
        )
        self.writer = _tensorboard(self.folder, self.say)
        self.smoothed: float | None = None
        self.pending: _Look | None = None
        self.last_shown = self.started, first
        self.rows = _earlier_rows(self.folder / EVALUATION_FILE, first)
        self.classical: dict[str, dict[str, Scores]] = {}  # by task; computed once

    def say(self, message: str) -> None:
        """One line, above the bar."""
        if not self.quiet:
            tqdm.write(message)

    def iteration(self, outcome: Outcome) -> None:
        """Moves the bar, and looks at the numbers every BAR_INTERVAL iterations. What a GPU computes is shown at the
        next look, so that nobody waits for it. Raises `UserError` where a loss, gradient or parameter is not finite."""
        self.bar.update(1)
        training = self.training
        last = training.iteration == training.options.iterations
        if training.iteration % BAR_INTERVAL and not last:
            return
        if self.pending:
            self._show(self.pending)
        self.pending = _Look(training, outcome)
        if last or training.model.device.type == "cpu":
            self._show(self.pending)
            self.pending = None

    def _show(self, look: _Look) -> None:
        numbers = look.numbers()
        for name, value in numbers.items():
            if not math.isfinite(value) and name != "PSNR":
                raise self.training.not_finite(name, look.iteration)
        loss = numbers["loss"]
        self.smoothed = loss if self.smoothed is None else 0.6 * self.smoothed + 0.4 * loss
        figures = {
            "loss": f"{self.smoothed:.5f}",
            "PSNR": f"{numbers['PSNR']:.2f}",
            "points": len(self.training.model),
        }
        self.bar.set_postfix(figures, refresh=False)
        if self.writer is None:
            return
        then, before = self.last_shown
        self.last_shown = look.time, look.iteration
        milliseconds = 1000 * (look.time - then) / max(look.iteration - before, 1)
        for name, value in look.scalars(numbers).items():
            self.writer.add_scalar(name, value, look.iteration)
        self.writer.add_scalar("points", len(self.training.model), look.iteration)
        self.writer.add_scalar("iteration_ms", milliseconds, look.iteration)
        if look.iteration % _HISTOGRAM_INTERVAL == 0:
            self.writer.add_histogram("sigma", self.training.model.spreads().detach().cpu(), look.iteration)

    def evaluation(self) -> None:
        """Scores every task on its frames and on those held out; prints, logs, plots and saves the scores."""
        training = self.training
        iteration = training.iteration
        training.release()
        for task in training.tasks:
            middle = len(task.frames) // 2
            scores, image = evaluate(training, task, middle)
            also = f", Dice {scores.dice:.4f}" if task.name == "seg" else ""
            self.say(
                f"[{iteration}] {task.name}: L1 {scores.mean_l1:.5f}, PSNR {scores.mean_psnr:.2f} dB, "
                f"SSIM {scores.mean_ssim:.4f}{also} on {len(task.frames)} frames"
            )
            self._record(iteration, task.name, "training", "model", scores)
            plot_scores(
                self._plot(task.name, iteration),
                f"{task.name}, iteration {iteration}",
                range(len(scores)),
                {"ours": scores.psnr},
            )
            if self.writer is not None and image is not None:
                self.writer.add_scalar(f"{task.name}/l1", scores.mean_l1, iteration)
                target = task.targets([middle], training.background)[0]
                pair = torch.stack([image.cpu(), target.cpu()])
                self.writer.add_images(f"{task.name}/render_and_frame", pair, iteration)
            if task.name in training.heldout:
                self._heldout(training, task)
        rows = "[\n" + ",\n".join(f" {json.dumps(row)}" for row in self.rows) + "\n]\n"
        with atomic_write(self.folder / EVALUATION_FILE) as temporary:
            temporary.write_text(rows, encoding="utf-8")

    def _heldout(self, training: Training, task: Task) -> None:
        """The model's scores on held-out frames beside those of classical interpolation."""
        iteration, test, mask = training.iteration, training.heldout[task.name], task.name == "seg"
        if task.name not in self.classical:
            self.classical[task.name] = evaluate_classical(training, task)
        everyone = {"model": evaluate_heldout(training, task), **self.classical[task.name]}

        def words(scores: Scores) -> str:
            return (
                f"Dice {scores.dice:.4f}" if mask else f"{scores.mean_psnr:.2f} dB / {scores.mean_ssim:.4f}"
            )

        ours, *others = (f"{NAMES[method]} {words(scores)}" for method, scores in everyone.items())
        what = "" if mask else " (PSNR / SSIM)"
        self.say(
            f"[{iteration}] {task.name} on {len(test)} held-out frames{what}: {ours}; {', '.join(others)}"
        )
        for method, scores in everyone.items():
            self._record(iteration, task.name, "heldout", method, scores)
        plot_scores(
            self._plot(f"{task.name}_heldout", iteration),
            f"{task.name}, held-out frames, iteration {iteration}",
            test.slices,
            {NAMES[m]: scores.frame_dice if mask else scores.psnr for m, scores in everyone.items()},
            "Dice" if mask else "PSNR (dB)",
        )
        if iteration == training.options.iterations:
            self._montage(training, task, everyone)

    def _montage(self, training: Training, task: Task, everyone: Mapping[str, Scores]) -> None:
        """Held-out frames beside the classical method to beat, ours, and what each gets wrong."""
        test, mask, method = training.heldout[task.name], task.name == "seg", CLASSICAL[task.name][0]
        shown = montage_choice(everyone["model"].sizes if mask else [1] * len(test))
        renders = _render(training, task, [test.indices[k] for k in shown])
        targets = heldout_targets(training, task, shown).cpu()
        theirs = torch.from_numpy(test.classical(method, training.background, shown)).expand_as(targets)

        def figures(scores: Scores) -> list[str]:
            return [
                f"Dice {scores.frame_dice[k]:.4f}"
                if mask
                else f"{scores.psnr[k]:.2f} dB, SSIM {scores.ssim[k]:.3f}"
                for k in shown
            ]

        draw_montage(
            self.folder / "plots" / f"{task.name}_montage.png",
            [f"slice {test.slices[k]}" for k in shown],
            [image.permute(1, 2, 0).numpy() for image in targets],
            {
                NAMES[name]: ([image.permute(1, 2, 0).numpy() for image in images], figures(everyone[name]))
                for name, images in ((method, theirs), ("model", renders.cpu()))
            },
            test.spacing[0] / test.spacing[1],
            mask,
        )

    def _plot(self, name: str, iteration: int) -> Path:
        return self.folder / "plots" / f"{name}_{iteration}.png"

    def _record(self, iteration: int, task: str, frames: str, method: str, scores: Scores) -> None:
        """A row of ``evaluation.json``, and TensorBoard's."""
        means = {"l1": scores.mean_l1, "psnr": scores.mean_psnr, "ssim": scores.mean_ssim}
        if task == "seg":
            means["dice"] = scores.dice
        about = {"iteration": iteration, "task": task, "frames": frames, "method": method}
        self.rows.append({**about, "count": len(scores), **means})
        if self.writer is not None:
            place = "/".join([task] + [frames] * (frames != "training") + [method] * (method != "model"))
            for name in means.keys() - {"l1"}:
                self.writer.add_scalar(f"{place}/{name}", means[name], iteration)

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


def _earlier_rows(path: Path, iteration: int) -> list[dict[str, Any]]:
    """What a run that is resumed at ``iteration`` in its own folder has evaluated up to there."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8")) if iteration else []
        return [row for row in rows if row["iteration"] <= iteration]
    except FileNotFoundError:
        return []
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is damaged: move it out of the way") from error


def _tensorboard(folder: Path, say: Any) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        say("tensorboard is not installed: no event files (pip install tensorboard)")
        return None
    return SummaryWriter(str(folder))
