"""Every number of the in-between prediction, with its reason.

Unless a source is named, a value was chosen by its scores on held-out frames (every 2nd and every 4th frame kept) of an
abdominal CT, a brain MRI and an echocardiogram; docs and `benchmarks/NOTES.md` have the tables.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

STEPS = 4
"""Levels per gap: predictions are made at 1/4, 1/2 and 3/4 of the way from one frame to the next."""


@dataclass(frozen=True)
class FlowSettings:
    """How the motion between two frames is estimated."""

    estimates: tuple[tuple[bool, float], ...] = ((True, 20.0), (False, 5.0))
    """(contrast, weight) of each estimate: whether images are compared by local contrast or by brightness, and the
    weight of the images against smoothness. The two err in different places: their mean is better than either."""
    warps: int = 5
    """Linearisations per pyramid level, as in scikit-image's TV-L1."""
    iterations: int = 10
    """Primal-dual steps per linearisation."""
    shrink: float = 0.6
    """Size of a pyramid level over that of the next finer one."""
    smallest: int = 14
    """Pixels: least side of the coarsest level."""
    pixels_at_once: int = 2_000_000
    """Of all pairs of frames whose motion is estimated together on a GPU (at least one pair); each takes about 300
    bytes."""
    pixels_at_once_cpu: int = 200_000
    """The same on a CPU: more would not fit in its caches."""
    bend_blur: float = 2.0
    """Pixels: the bend of a path is a difference of two estimates, hence noisy."""


@dataclass(frozen=True)
class NetworkSettings:
    """How small networks are trained."""

    width: int
    """Channels."""
    depth: int
    """Convolutions."""
    iterations: int
    batch: int = 16
    """Patches per iteration."""
    rate: float = 3e-3
    """Highest learning rate of the first and the last layer, and of biases."""
    hidden_rate: float = 0.05
    """Highest learning rate of the weights between hidden layers (Muon); 0.02 and 0.1 learn slower."""


@dataclass(frozen=True)
class RowSettings:
    """How self super-resolution along the stack learns from rows of the frames."""

    network: NetworkSettings = NetworkSettings(width=48, depth=5, iterations=500)
    """Of its start, `rows.npz`; other widths and depths need another."""
    gain: float = 5.0
    """Images are multiplied by this on the way in, so that the network sees values of deviation about 1."""
    rows: int = 16
    """Kept rows per patch."""
    columns: int = 32
    """Columns per patch."""
    fewest_rows: int = 4
    """Frames with fewer kept rows than this teach nothing."""
    least_variance: float = 1e-4
    """Of a patch; below it is empty background."""
    widest_gap: int = 8
    """Pixels; frames farther apart than this are filled in by motion alone."""
    mirrors: tuple[tuple[int, ...], ...] = ((0,),)
    """Axes (frames, rows, columns) of the stack's mirror images over which predictions are averaged: none has a
    direction in time. Mirroring rows and columns too takes twice the time for less than 0.01 dB."""
    share: float = 0.6
    """Of self super-resolution in the mixture; the rest is the motion's."""
    excess: float = 0.3
    """The mixture is moved this far away from the linear blend: where unsure, each prediction leans towards it."""


@dataclass(frozen=True)
class ContourSettings:
    """How masks follow the image between frames."""

    network: NetworkSettings = NetworkSettings(width=16, depth=4, iterations=200)
    patch: int = 32
    """Pixels: side of a training patch."""
    trust: float = 1 / 3
    """Share of a correction learned at twice the distance, where errors are twice (noise) to four times (curvature)
    as large."""
    farthest: float = 16.0
    """Pixels: signed distances are clamped to this."""
    most_shift: float = 0.5
    """Pixels: how far the contours of a label map may be moved so that the area of a label changes linearly from frame
    to frame. 1 gives the same (benchmarks/NOTES.md)."""
    all_labels: int = 800
    """Iterations for all labels of a map together, which bounds their time."""
    fewest: int = 40
    """With fewer for each, networks learn nothing, and there are none."""

    def for_labels(self, count: int) -> ContourSettings:
        """For each of ``count`` labels and the background."""
        iterations = min(self.network.iterations, self.all_labels // (count + 1))
        network = replace(self.network, iterations=iterations if iterations >= self.fewest else 0)
        return replace(self, network=network)


@dataclass(frozen=True)
class Settings:
    """All of them."""

    margin: int = 12
    """Pixels around those that change from frame to frame: more than a network sees."""
    flow: FlowSettings = field(default_factory=FlowSettings)
    rows: RowSettings = field(default_factory=RowSettings)
    contours: ContourSettings = field(default_factory=ContourSettings)


DEFAULT = Settings()
"""The settings that the programs use."""
