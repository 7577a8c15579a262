"""What a person sees of a run: the progress bar, evaluations, TensorBoard, plots."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from patient.labels import LabelTable
from pictures.figures import TRUTH, Row, cropped, draw_montage, plot_scores
from training.evaluation import Comparison, HeldOutScores, Shown, TaskScores
from training.finite import not_finite
from utils.beside import Beside
from utils.errors import UserError
from utils.files import atomic_write
from utils.metrics import LabelScores, Scores
from utils.timing import BEGUN

EVALUATION_FILE = "evaluation.json"
BAR_INTERVAL = 10  # iterations between two readings of the loss: each waits for the device
_HISTOGRAM_INTERVAL = 1000  # iterations
_MOST_LABELS = 12  # whose scores are printed

NAMES = {"model": "ours", "linear": "linear", "cubic": "cubic spline", "sdf": "signed distance"}
NAMES["cubic sdf"] = "cubic signed distance"


@dataclass(frozen=True)
class Metrics:
    """Numbers of one iteration, () each, on the device."""

    losses: Mapping[str, Tensor]  # weighted, under readable names; their sum is "loss"
    magnitudes: Mapping[str, Tensor]  # the largest absolute value of every gradient and parameter
    psnr: Tensor  # dB, of the first task's renders
    terms: Mapping[str, Tensor]  # unweighted, by TensorBoard tag
    spreads: Tensor  # (N,), of the Gaussians in time


class _PendingMetrics:
    """Metrics of one iteration, being copied from the device."""

    def __init__(self, iteration: int, metrics: Metrics) -> None:
        self.iteration, self.time = iteration, time.perf_counter()
        named = {**metrics.losses, **metrics.magnitudes, "PSNR": metrics.psnr, **metrics.terms}
        self.names, self.logged = list(named), ["loss", *metrics.terms]
        self.points = len(metrics.spreads)
        self.spreads = metrics.spreads.cpu() if iteration % _HISTOGRAM_INTERVAL == 0 else None
        values = torch.stack([value.detach().float() for value in named.values()])
        self.event = torch.cuda.Event() if values.is_cuda else None
        self.values = torch.empty(values.shape, pin_memory=values.is_cuda).copy_(values, non_blocking=True)
        if self.event:
            self.event.record()

    def numbers(self) -> dict[str, float]:
        """Each by its name; waits for the device if they have not arrived yet."""
        if self.event:
            self.event.synchronize()
        return dict(zip(self.names, self.values.tolist(), strict=True))

    def scalars(self, numbers: Mapping[str, float]) -> dict[str, float]:
        """What TensorBoard keeps of them."""
        kept = {"total_loss" if name == "loss" else name: numbers[name] for name in self.logged}
        return {**kept, "batch_psnr": numbers["PSNR"]}


class Report:
    """Follows a run: a bar with loss, PSNR and points, and what TensorBoard and the plots keep.

    folder: of the run's output. first, last: the iteration that the run starts after, and its last one.
    """

    def __init__(self, folder: Path, first: int, last: int, quiet: bool) -> None:
        self.folder, self.last, self.quiet = folder, last, quiet
        self.started = self.ended = time.perf_counter()
        self.bar = tqdm(total=last, initial=first, desc="training", unit="it", disable=quiet)
        self.writer = _tensorboard(folder, self.say)
        self.drawing = Beside(
            1
        )  # in one thread, as matplotlib wants, while the model is saved or trained further
        self.smoothed: float | None = None
        self.pending: _PendingMetrics | None = None
        self.last_shown = self.started, first
        self.rows = _earlier_rows(folder / EVALUATION_FILE, first)

    def say(self, message: str) -> None:
        """One line, above the bar."""
        if not self.quiet:
            tqdm.write(message)

    def replan(self, last: int) -> None:
        """Changes the run's last iteration."""
        self.last = self.bar.total = last

    def advance(self, iteration: int) -> bool:
        """Moves the bar; returns whether `metrics` is due for this iteration, every BAR_INTERVAL."""
        self.bar.update(1)
        return iteration % BAR_INTERVAL == 0 or iteration == self.last

    def metrics(self, iteration: int, metrics: Metrics) -> None:
        """Shows and logs the metrics of an iteration, those from a GPU at the next call, so that nothing waits for it.
        Raises `UserError` where a loss, gradient or parameter is not finite."""
        if self.pending:
            self._show(self.pending)
        self.pending = _PendingMetrics(iteration, metrics)
        if iteration == self.last or self.pending.event is None:
            self._show(self.pending)
            self.pending = None

    def _show(self, pending: _PendingMetrics) -> None:
        numbers, iteration = pending.numbers(), pending.iteration
        for name, value in numbers.items():
            if not math.isfinite(value) and name != "PSNR":
                raise not_finite(self.folder, name, iteration)
        loss = numbers["loss"]
        self.smoothed = loss if self.smoothed is None else 0.6 * self.smoothed + 0.4 * loss
        figures = {
            "loss": f"{self.smoothed:.5f}",
            "PSNR": f"{numbers['PSNR']:.2f}",
            "points": pending.points,
        }
        self.bar.set_postfix(figures, refresh=False)
        if self.writer is None:
            return
        then, before = self.last_shown
        self.last_shown = pending.time, iteration
        milliseconds = 1000 * (pending.time - then) / max(iteration - before, 1)
        for name, value in pending.scalars(numbers).items():
            self.writer.add_scalar(name, value, iteration)
        self.writer.add_scalar("points", pending.points, iteration)
        self.writer.add_scalar("iteration_ms", milliseconds, iteration)
        if pending.spreads is not None:
            self.writer.add_histogram("sigma", pending.spreads, iteration)

    def evaluation(self, iteration: int, tasks: Iterable[TaskScores]) -> None:
        """Prints, logs, plots and saves the scores of an evaluation."""
        for evaluated in tasks:
            name, scores = evaluated.task, evaluated.scores
            labels = evaluated.labels
            if labels is None:
                also = f", Dice {_dice(scores.dice)}" if name == "seg" else ""
                words = f"L1 {scores.mean_l1:.5f}, PSNR {scores.mean_psnr:.2f} dB, SSIM {scores.mean_ssim:.4f}{also}"
            else:
                words = f"wrong {scores.mean_l1:.2%}, mean Dice of {len(labels)} labels {_dice(scores.dice)}"
            self.say(f"[{iteration}] {name}: {words} on {len(scores)} frames")
            self._record(iteration, name, "training", "model", scores, labels)
            self.drawing(
                plot_scores,
                self._plot(name, iteration),
                f"{name}, iteration {iteration}",
                range(len(scores)),
                {"ours": scores.psnr},
            )
            if self.writer is not None:
                self.writer.add_scalar(f"{name}/l1", scores.mean_l1, iteration)
                pair = torch.stack([evaluated.rendered.cpu(), evaluated.frame.cpu()])
                self.writer.add_images(f"{name}/render_and_frame", pair, iteration)
            if evaluated.heldout is not None:
                self._heldout(iteration, name, evaluated.heldout, labels)
        rows = "[\n" + ",\n".join(f" {json.dumps(row)}" for row in self.rows) + "\n]\n"
        with atomic_write(self.folder / EVALUATION_FILE) as temporary:
            temporary.write_text(rows, encoding="utf-8")

    def _heldout(
        self, iteration: int, task: str, heldout: HeldOutScores, labels: LabelTable | None = None
    ) -> None:
        """The model's scores on held-out frames beside those of classical interpolation."""
        mask, everyone = task == "seg", heldout.by_method

        def words(scores: Scores) -> str:
            return (
                f"{'Dice' if labels is None else 'mean Dice'} {_dice(scores.dice)}"
                if mask
                else f"{scores.mean_psnr:.2f} dB / {scores.mean_ssim:.4f}"
            )

        ours, *others = (f"{NAMES[method]} {words(scores)}" for method, scores in everyone.items())
        what = "" if mask else " (PSNR / SSIM)"
        count = len(heldout.slices)
        self.say(f"[{iteration}] {task} on {count} held-out frames{what}: {ours}; {', '.join(others)}")
        for place, label in enumerate(labels or ()):
            if place == _MOST_LABELS:
                self.say(f"  and {len(labels or ()) - place} more labels in {EVALUATION_FILE}")
                break
            each = (
                f"{NAMES[method]} {_dice(scores.label_dice[place])}"
                for method, scores in everyone.items()
                if isinstance(scores, LabelScores)
            )
            self.say(f"  {label.id} {label.name}: {', '.join(each)}")
        for method, scores in everyone.items():
            self._record(iteration, task, "heldout", method, scores, labels)
        self.drawing(
            plot_scores,
            self._plot(f"{task}_heldout", iteration),
            f"{task}, held-out frames, iteration {iteration}",
            heldout.slices,
            {NAMES[m]: scores.frame_dice if mask else scores.psnr for m, scores in everyone.items()},
            "Dice" if mask else "PSNR (dB)",
        )
        if heldout.comparison is not None:
            self.drawing(self._montage, task, heldout, heldout.comparison)

    def _montage(self, task: str, heldout: HeldOutScores, pictures: Comparison) -> None:
        """Held-out frames and the sequence from the side: the classical method to beat, ours, and the error of each."""
        mask = task == "seg"
        methods = {"classical": pictures.method, "model": "model"}

        def figures(method: str, k: int) -> str:
            scores = heldout.by_method[method]
            return (
                f"Dice {_dice(scores.frame_dice[k])}"
                if mask
                else f"{scores.psnr[k]:.2f} dB, SSIM {scores.ssim[k]:.3f}"
            )

        def row(shown: Shown, k: int | None) -> Row:
            names = {"truth": TRUTH, **{version: NAMES[method] for version, method in methods.items()}}
            return Row(
                shown.name,
                shown.images["truth"],
                {
                    names[version]: (shown.images[version], "" if k is None else figures(method, k))
                    for version, method in methods.items()
                },
                shown.aspect,
                {names[version]: inside for version, inside in shown.masks.items()},
            )

        frames = [row(frame, k) for frame, k in zip(pictures.frames, pictures.places, strict=True)]
        sides = [row(side, None) for side in pictures.sides]
        path = self.folder / "plots" / f"{task}_montage.png"
        draw_montage(path, [*(cropped(frames) if mask else frames), *sides], mask, labels=pictures.labels)

    def _plot(self, name: str, iteration: int) -> Path:
        return self.folder / "plots" / f"{name}_{iteration}.png"

    def _record(
        self,
        iteration: int,
        task: str,
        frames: str,
        method: str,
        scores: Scores,
        labels: LabelTable | None = None,
    ) -> None:
        """A row of ``evaluation.json``, and TensorBoard's. Of ``labels``, "labels" has the Dice of each, by its id."""
        means = {"l1": scores.mean_l1, "psnr": scores.mean_psnr, "ssim": scores.mean_ssim}
        if task == "seg":
            means["dice"] = scores.dice
        about = {"iteration": iteration, "task": task, "frames": frames, "method": method}
        stated: dict[str, Any] = _stated(means)
        if labels is not None and isinstance(scores, LabelScores):
            stated["labels"] = _stated(dict(zip(map(str, labels.ids), scores.label_dice, strict=True)))
        self.rows.append({**about, "count": len(scores), **stated})
        if self.writer is not None:
            place = "/".join([task] + [frames] * (frames != "training") + [method] * (method != "model"))
            for name in stated.keys() & means.keys() - {"l1"}:
                self.writer.add_scalar(f"{place}/{name}", means[name], iteration)

    def end(self) -> None:
        """The loop is over: what its pictures still take is waited for, and is not counted with its iterations."""
        self.ended = time.perf_counter()
        self.drawing.finish()

    def close(self, parts: Mapping[str, float], memory: int) -> None:
        """Ends the bar and writes ``time.json``. parts: seconds that parts of the process took, by name; evaluation and
        saving are within the loop's. memory: bytes, the most that was taken."""
        self.bar.close()
        if self.writer is not None:
            self.writer.close()
        elapsed = self.ended - self.started
        within = sum(parts.get(name, 0.0) for name in ("evaluation", "saving"))
        seconds = {**parts, "iterations": elapsed - within, "whole process": time.perf_counter() - BEGUN}
        spent = {
            "time": time.process_time(),
            "elapsed": elapsed,
            "memory": memory,
            "parts": {name: round(value, 3) for name, value in seconds.items()},
        }
        with atomic_write(self.folder / "time.json") as temporary:
            temporary.write_text(json.dumps(spent), encoding="utf-8")


def _stated(values: Mapping[str, float]) -> dict[str, float | None]:
    """JSON has no NaN."""
    return {name: None if math.isnan(value) else value for name, value in values.items()}


def _dice(value: float) -> str:
    return "undefined (nothing is inside)" if math.isnan(value) else f"{value:.4f}"


def _earlier_rows(path: Path, iteration: int) -> list[dict[str, Any]]:
    """The evaluations up to ``iteration`` of a run that is resumed there in its own folder."""
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
