"""Which views an iteration renders: drawn at random on the CPU, and sent to the device as one tensor."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from arguments import OptimisationOptions
from gaussian_renderer import Render
from scene.gaussian_model import GaussianModel
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
    """A batch on the model's device: all that an iteration reads besides the model and the frames.

    What can be computed from the batch alone is, on the CPU: on a GPU, every small tensor of it would cost a kernel.
    """

    packed: Tensor  # (bytes,) uint8: all of it, hence one copy to the device
    count: int  # V
    real: int  # B: that many are of frames, the others lie between two
    timed: bool  # whether it holds `clock`

    @classmethod
    def of(cls, batch: Batch, device: torch.device, model: GaussianModel | None = None) -> Views:
        """model: whose times the views have, where these are not learned."""
        positions = batch.positions
        count, real = len(positions), len(batch.frames)
        before = [int(position) for position in positions]
        between = before[real:]
        times = None if model is None else model.fixed_times(positions)
        numbers = (
            *positions,
            *before,
            *(k + 1 for k in between),
            *([0.0] * count if times is None else times),
            *[-1.0 if batch.mirrored else 1.0] * count,
            *[float(batch.mirrored)] * count,
            *(position - k for position, k in zip(positions[real:], between, strict=True)),
            batch.mirrored,
        )
        layout = f"={count}d{count}q{count - real}q{count}f{count}f{count}f{count - real}f?"
        packed = torch.frombuffer(bytearray(struct.pack(layout, *numbers)), dtype=torch.uint8)
        return cls(packed.to(device, non_blocking=True), count, real, times is not None)

    def _part(self, dtype: torch.dtype, first: int, count: int) -> Tensor:
        """``count`` numbers that begin at byte ``first``."""
        return self.packed[first : first + count * dtype.itemsize].view(dtype)

    @property
    def _floats(self) -> int:
        """The byte at which the float32 numbers begin."""
        return 8 * (3 * self.count - self.real)

    def __len__(self) -> int:
        """V."""
        return self.count

    @property
    def positions(self) -> Tensor:
        """(V,) float64, in the sequence; real ones first."""
        return self._part(torch.float64, 0, self.count)

    @property
    def mirrored(self) -> Tensor:
        """(V,) float32, 1 where the mirror side is shown, else 0."""
        return self._part(torch.float32, self._floats + 8 * self.count, self.count)

    @property
    def clock(self) -> tuple[Tensor, Tensor] | None:
        """Times (V,) and signs (V,), +1 or -1 for the mirror side; None where times are learned."""
        if not self.timed:
            return None
        signs = self._part(torch.float32, self._floats + 4 * self.count, self.count)
        return self._part(torch.float32, self._floats, self.count), signs

    def shown(self, task: Task, background: Tensor) -> tuple[Tensor, Tensor]:
        """What the task's renders should show: (B, C, H, W) at the real views, and (V - B, C, H, W) at those between,
        none where the task has no IBFR."""
        flipped = self.packed[-1:].view(torch.bool)[0]  # a batch is of one side
        extra = self.count - self.real
        if not task.in_betweens or not extra:
            targets = task.targets(self._part(torch.int64, 8 * self.count, self.real), background, flipped)
            return targets, targets[:0]
        frames = self._part(torch.int64, 8 * self.count, self.count + extra)
        alphas = self._part(torch.float32, self._floats + 12 * self.count, extra)
        return task.shown(frames, self.real, alphas, background, flipped)


def requested_renders(tasks: Sequence[Task], views: Views) -> list[list[Render]]:
    """For each task the renders it needs: of the real views, then, where it has IBFR, of those between."""
    return [
        [task.render(view) for view in range(len(views) if task.in_betweens else views.real)]
        for task in tasks
    ]
