"""The size and the schedule of a run, in proportion to its data and to its iterations.

The presets' numbers are for PIXELS of data and the preset's iterations; values from the command line are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from arguments import PRESETS, TrainOptions

SCHEDULE = (
    "position_lr_max_steps",
    "sigma_until_iter",
    "ibfr_from_iter",
    "densify_from_iter",
    "densify_until_iter",
    "prune_scale_from_iter",
    "average_from_iter",
)
"""Options that say when: they scale with the iterations. Intervals between two events do not."""

PIXELS = 69 * 197 * 233
"""The amount of data that sizes are given for: every second slice of the brain that presets were chosen on."""


@dataclass(frozen=True)
class Size:
    """A number that grows with the data, ``at`` for PIXELS in proportion to their number to the power ``power``, and is
    at least ``least``."""

    at: int
    power: float
    least: int = 1

    def of(self, pixels: int) -> int:
        return max(round(self.at * (pixels / PIXELS) ** self.power), self.least)


SIZES: dict[str, dict[str, Size]] = {
    # The number of points on surfaces grows as the power 2/3 of the volume; small ones train as fast with all of them.
    "best": {"num_pts": Size(100_000, 2 / 3, least=100_000), "iterations": Size(6000, 1 / 4, least=6000)},
    "fast": {"num_pts": Size(100_000, 2 / 3, least=100_000), "iterations": Size(1200, 0.3, least=1200)},
    # For minutes on a CPU, where time grows with the number of Gaussians.
    "quick": {"num_pts": Size(100_000, 1 / 2)},
}
"""What presets size by the data, beside the numbers in `arguments.PRESETS`."""


MASKS_ALONE = 2.0
"""Times the iterations of fast where masks are trained alone, without images that help (benchmarks/NOTES.md)."""


def fitted(options: TrainOptions, pixels: int) -> TrainOptions:
    """``options`` sized for ``pixels`` in all frames, with the schedule for their iterations."""
    sizes = SIZES.get(options.preset, {})
    grown: dict[str, Any] = {
        name: size.of(pixels) for name, size in sizes.items() if name not in options.given
    }
    most = options.max_gaussians if "max_gaussians" in options.given else 0
    if most and "num_pts" in grown:
        grown["num_pts"] = min(grown["num_pts"], most)
    iterations = grown.pop("iterations", options.iterations)
    if options.preset == "fast" and options.pipeline == "seg" and "iterations" not in options.given:
        iterations = round(MASKS_ALONE * iterations)
    return with_iterations(replace(options, **grown), iterations)


def with_iterations(options: TrainOptions, iterations: int) -> TrainOptions:
    """``options`` for that many iterations, with the SCHEDULE scaled in proportion.

    The published preset keeps its absolute numbers unless --scale_schedule or --time asks otherwise; 0 stays 0.
    """
    changes: dict[str, Any] = {"iterations": iterations}
    if options.preset != "published" or options.scale_schedule or options.time:
        defaults = {name: getattr(TrainOptions, name) for name in ("iterations", *SCHEDULE)}
        defaults |= PRESETS[options.preset]
        for name in SCHEDULE:
            if name not in options.given:
                changes[name] = scaled(defaults[name], defaults["iterations"], iterations)
    return replace(options, **changes)


def replan(options: TrainOptions, iterations: int, gaussians: int) -> TrainOptions:
    """``options`` of a run that has ``gaussians`` now and time for so many iterations: in less than half of its
    preset's, Gaussians added later would learn nothing."""
    usual = PRESETS[options.preset].get("iterations", TrainOptions.iterations)
    if 2 * iterations < usual:
        options = replace(options, max_gaussians=min(options.max_gaussians or gaussians, gaussians))
    return with_iterations(options, iterations)


def scaled(iteration: int, of: int, to: int) -> int:
    """``iteration`` of a run of ``of`` iterations, scaled to one of ``to``; only 0 becomes 0."""
    return max(min(iteration, 1), iteration * to // of)


def warn(options: TrainOptions, in_betweens: bool, say: Callable[[str], object]) -> None:
    """Warns where a run would end before it begins to learn in-between frames."""
    if in_betweens and options.ibfr_from_iter >= options.iterations:
        say(
            f"warning: frames in between are never taught: that begins at iteration {options.ibfr_from_iter} "
            f"(--ibfr_from_iter), and this run has {options.iterations}. They will look wrong; add --scale_schedule, "
            "or take --preset quick or fast, whose schedules follow --iterations"
        )
