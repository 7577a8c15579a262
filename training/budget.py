"""How long a run takes: measured before it begins, and kept within --time where that is given."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from training.batches import Batch, Views
from training.density_control import bytes_per_gaussian
from utils.memory import peak_memory
from utils.timing import BEGUN, Clock, in_words

if TYPE_CHECKING:
    from collections.abc import Callable

    from training.iteration import IterationResult
    from training.run import Training

GROWTH = 1.3
"""How much longer an iteration takes on average than at the start, as Gaussians are added and the optimizer steps."""
DENSER = {"published": 5.5, "best": 12.0, "fast": 1.5, "quick": 1.0}
"""How many times as many Gaussians density control has left at most, on the cases in benchmarks/results/presets."""
PATIENCE = 600.0
"""Seconds from which a faster preset is worth mentioning on a CPU."""

# ---- what it will take -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Forecast:
    """rate: iterations per second. seconds: what the iterations that are left take. memory: bytes, the most that they
    are likely to need."""

    rate: float
    seconds: float
    memory: int

    def line(self, training: Training) -> str:
        """The line printed before the first iteration."""
        options, device = training.options, training.model.device
        count = options.iterations - training.iteration
        text = (
            f"about {in_words(self.seconds)} for {count} iterations on {device.type} ({self.rate:.3g} per second), "
            f"{self.memory / 1e9:.1f} GB of memory at most"
        )
        slow = device.type == "cpu" and options.preset in ("published", "best") and self.seconds > PATIENCE
        return text + ("; --preset quick takes minutes on a CPU" if slow else "")


def forecast(training: Training, step: Callable[[Views, int, bool], IterationResult]) -> Forecast:
    """Times iterations of each kind, which change nothing: neither model nor random numbers."""
    options, device = training.options, training.model.device
    frames = len(training.tasks[0].frames)
    size = min(options.batch_size, frames)
    first = (frames - size) // 2
    real = list(range(first, first + size))
    between = [(k, 0.5) for k in real[:-1]] or [(k, 0.5) for k in real if k + 1 < frames]
    taught = any(task.in_betweens for task in training.tasks)

    def seconds(batch: Batch, repeats: int) -> float:
        for k in range(repeats + 2):  # the first ones load kernels, and are recorded on a GPU
            if k == 2:
                _wait(device)
                start = time.perf_counter()
            training.optimizer.zero_grad(
                set_to_none=True
            )  # as before every iteration: gradients would accumulate
            step(Views.of(batch, device, training.model), training.iteration + 1, training.controlled)
        _wait(device)
        return (time.perf_counter() - start) / repeats

    repeats = 1 if device.type == "cpu" else 5
    plain = seconds(Batch(real, [], False), repeats)
    with_between = seconds(Batch(real, between, False), repeats) if taught else plain
    training.optimizer.zero_grad(set_to_none=True)
    training.release()

    left = range(training.iteration + 1, options.iterations + 1)
    begun = max(len(left) - max(options.ibfr_from_iter - left.start, 0), 0) if taught else 0
    share = 1 - 1 / options.ibfr_skip if options.ibfr_skip else 1.0
    in_all = GROWTH * (begun * share * with_between + (len(left) - begun * share) * plain)
    gaussians = len(training.model)
    most = max(DENSER[options.preset] * options.num_pts, gaussians) if training.controlled else gaussians
    most = min(most, max(options.max_gaussians, gaussians))
    each = bytes_per_gaussian(options, len(training.background))
    return Forecast(len(left) / in_all, in_all, peak_memory(device) + int((most - gaussians) * each))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---- no longer than that ---------------------------------------------------------------------------------------------


class Budget:
    """Fits a whole run into the time given: reading, motion, iterations, evaluation and files.

    minutes: counted from ``begun`` on ``clock``, both in seconds. rest: the cost of the rendering after the last
    iteration, in iterations. Before each iteration, `plan` says how many there should be in all. The schedule stretches
    to that, so the plan follows the pace until parameters are averaged; from then on, it only ends the run on time.
    """

    FIRST = 10  # iterations to time before planning
    WINDOW = 50  # iterations over which the pace is averaged
    ENDING = 3.0  # seconds for what comes after the last iteration, besides rendering
    WORTH = 0.02  # share of the plan; smaller changes are not made
    SCANT = (
        100  # iterations after which a model that starts from the frames is about as good as linear blending
    )

    def __init__(
        self, minutes: float, rest: float = 0.0, begun: float = BEGUN, clock: Clock = time.perf_counter
    ) -> None:
        self.end, self.rest, self.clock = begun + 60 * minutes, rest, clock
        self.ticks: deque[float] = deque(maxlen=self.WINDOW + 1)
        self.first: int | None = None

    @property
    def pace(self) -> float:
        """Seconds per iteration, recently."""
        return (self.ticks[-1] - self.ticks[0]) / max(len(self.ticks) - 1, 1)

    def note(self, minutes: float, iteration: int) -> str:
        """The note at the end of a run that had hardly any time, or ""."""
        if iteration >= self.SCANT:
            return ""
        return (
            f"note: --time {minutes:g} left room for {iteration} iterations besides reading, motion and files, too few "
            "for a useful model: give more time, or use interpolate.py, which trains none"
        )

    @property
    def left(self) -> float:
        """Seconds left until the last iteration must be over."""
        return self.end - self.clock() - self.ENDING - self.rest * self.pace

    def plan(self, iteration: int, total: int, averaging_from: int) -> int:
        """How many iterations there should be in all, where ``iteration`` comes next of ``total`` as planned: that one
        is the last if time is up."""
        self.ticks.append(self.clock())
        self.first = iteration if self.first is None else self.first
        if self.left <= self.pace:
            return iteration
        if iteration - self.first < self.FIRST:
            return max(total, iteration + 1)
        fits = iteration + int(self.left / self.pace)
        if averaging_from and iteration >= averaging_from:
            return min(total, fits)
        ahead = 1 + (GROWTH - 1) * max(1 - iteration / averaging_from, 0) if averaging_from else 1.0
        fits = iteration + int(
            self.left / (self.pace * ahead)
        )  # later iterations are slower than those timed
        return fits if abs(fits - total) > self.WORTH * total else total


def budget_of(training: Training, minutes: float) -> Budget:
    """The budget of a run; the images that are rendered after its last iteration are those of an evaluation."""
    images = sum(len(task.frames) + len(training.heldout.get(task.name, ())) for task in training.tasks)
    size = min(training.options.batch_size, len(training.tasks[0].frames))
    per_iteration = sum(2 * size - 1 if task.in_betweens else size for task in training.tasks)
    return Budget(minutes, 0.4 * images / per_iteration)  # without gradients, but scored
