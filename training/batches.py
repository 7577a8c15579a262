"""Which views an iteration renders: drawn at random on the CPU, and sent to the device as one tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from arguments import OptimisationOptions
from gaussian_renderer import Render
from training.pipelines import Task


@dataclass(frozen=True)
class Batch:
    """One iteration's views, all of one side: neighbouring real frames, and positions between two of them."""

    frames: list[int]
    between: list[tuple[int, float]]  # (k, alpha): at t_k + alpha (t_{k+1} - t_k)
    mirrored: bool

    @property
    def positions(self) -> list[float]:
        """Positions of all views, the real ones first."""
        return [float(k) for k in self.frames] + [k + alpha for k, alpha in self.between]


class Sampler:
    """Draws batches from a random generator on the CPU, whose state is all that a resumed run needs."""

    def __init__(
        self, num_frames: int, sides: int, options: OptimisationOptions, generator: torch.Generator
    ) -> None:
        self.num_frames, self.sides = num_frames, sides
        self.options, self.generator = options, generator

    @property
    def num_views(self) -> int:
        return self.num_frames * self.sides

    def draw(self, in_between: bool) -> Batch:
        """A random view with its neighbours: B frames around it, of an even B one more after it than before. With
        ``in_between`` also a position between each two neighbours (IBFR)."""
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


@dataclass(frozen=True)
class Views:
    """A batch on the model's device: all that an iteration reads besides the model and the frames."""

    packed: Tensor  # (2, V) float64: `positions` and `mirrored` in one tensor, hence one copy to the device
    real: int  # B: that many are of frames, the others lie between two

    @classmethod
    def of(cls, batch: Batch, device: torch.device) -> Views:
        mirrored = [float(batch.mirrored)] * len(batch.positions)
        packed = torch.tensor([batch.positions, mirrored], dtype=torch.float64)
        return cls(packed.to(device, non_blocking=True), len(batch.frames))

    def __len__(self) -> int:
        """V."""
        return self.packed.shape[1]

    @property
    def positions(self) -> Tensor:
        """(V,), in the sequence; real ones first."""
        return self.packed[0]

    @property
    def mirrored(self) -> Tensor:
        """(V,), 1 where the mirror side is shown, else 0."""
        return self.packed[1]

    def shown(self, task: Task, background: Tensor) -> tuple[Tensor, Tensor]:
        """What the task's renders should show: (B, C, H, W) at the real views, and (V - B, C, H, W) at those between,
        none where the task has no IBFR."""
        flipped = self.mirrored[0] > 0  # () bool: a batch is of one side
        targets = task.targets(self.positions[: self.real].long(), background, flipped)
        if not task.in_betweens or len(self) == self.real:
            return targets, targets[:0]
        return targets, task.expected(self.positions[self.real :], background, flipped)


def requested_renders(tasks: Sequence[Task], views: Views) -> list[list[Render]]:
    """For each task the renders it needs: of the real views, then, where it has IBFR, of those between."""
    return [
        [task.render(view) for view in range(len(views) if task.in_betweens else views.real)]
        for task in tasks
    ]
