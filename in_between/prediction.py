"""The in-between prediction: images and masks at any time between the frames of a sequence, computed once.

Two predictions are made at each quarter of the way from one frame to the next. They are mixed, and the mixture is moved
slightly away from the linear blend of the two frames, towards which both lean where they are unsure:

- *motion*: both frames are carried along the optical flow to the time asked for, and blended (`in_between.flow`);
- *self super-resolution*: a network that learned to fill in rows of the frames fills in the stack seen from the side
  (`in_between.rows`).

Frames that are thick slices are means over their thickness. The network then learns from rows that are means, too, to
make thin ones, and what is made is changed so that its means are the frames.

Masks are carried along the same flow as signed distances, then corrected by a network that has learned, on frames
between two others, how contours follow the image (`in_between.contours`). Of a label map, so is each label and the
background; the largest distance decides (`in_between.exclusive`).
"""

from __future__ import annotations

import hashlib
import math
import pickle
from collections.abc import Iterator
from pathlib import Path
from types import EllipsisType

import torch
from torch import Tensor

from in_between.contours import Contours, distances_of, learn_contours, with_areas
from in_between.exclusive import Ranked, masks_of, ranked
from in_between.flow import Paths, blend_along, blend_paths, find_paths, flow_at
from in_between.progress import Done, Progress, Report, part_of, silent
from in_between.rows import fill_stack, joined, learn_rows, matching_gap
from in_between.settings import DEFAULT, STEPS, ContourSettings, Settings
from patient.geometry import Geometry
from utils.files import atomic_write

Box = tuple[EllipsisType, slice, slice]
_ROUNDS = 4  # of making the means right and cutting off what is beyond black and white
_RIDGE = 0.01  # keeps means over slices that overlap from being undone to the last bit, noise included
_VERSION = 6  # incremented when the prediction changes, so that caches of earlier code are not reused


class InBetween:
    """What lies between the frames of a sequence: computed once (minutes on two cores for 70 frames of 200 x 200, much
    less on a GPU), then looked up at any time.

    frames: (K, C, H, W) in [0, 1], K >= 2, evenly spaced; on the device where everything is computed and kept.
    masks: (K, 1, H, W) of the same frames, inside where >= 0.5.
    labels: instead of masks, a label map (K, 1, H, W) of indices, 0 the background, and the number of labels.
    gap: the distance between neighbouring frames in pixels, where known; otherwise it is estimated from the
        frames (`rows.matching_gap`).
    thickness: of a frame, over that distance: 1 for slices that touch. Each frame is then taken for a mean over it
        (a rectangular slice profile), and what is predicted is a pixel thin, at the frames' own places too. 0, or less
        than a pixel: frames are thin themselves.
    seed: of the small networks' training.
    report: called with the progress.

    flow: (K - 1, 2, H, W), the motion from frame k to k + 1 in pixels (x, y), as seen in the middle of the two.
    """

    flow: Tensor

    def __init__(
        self,
        frames: Tensor,
        masks: Tensor | None = None,
        gap: float | None = None,
        seed: int = 0,
        settings: Settings = DEFAULT,
        report: Report = silent,
        labels: tuple[Tensor, int] | None = None,
        thickness: float = 0.0,
    ) -> None:
        if frames.ndim != 4 or len(frames) < 2:
            raise ValueError(f"frames of shape {tuple(frames.shape)}: (K, C, H, W) with K >= 2 is needed")
        if masks is not None and masks.shape != (len(frames), 1, *frames.shape[2:]):
            raise ValueError(
                f"masks of shape {tuple(masks.shape)} do not belong to frames of {tuple(frames.shape)}"
            )
        self._asked, self._asked_thickness = (gap, seed, settings), thickness
        self.settings = settings
        frames = frames.float()
        self.gap = matching_gap(frames) if gap is None else gap
        self.thickness = thickness if thickness * self.gap > 1 else 0.0
        self.count = 0 if labels is None else labels[1]
        progress = Progress(report, self._costs(frames, masks is not None or labels is not None))
        with torch.no_grad():
            self._build(
                frames, masks if labels is None else labels[0], torch.Generator().manual_seed(seed), progress
            )
        report("done", 1.0)

    def _costs(self, frames: Tensor, with_masks: bool) -> dict[str, float]:
        """The rough cost of each part: seconds of a CPU core."""
        rows, contours = self.settings.rows.network.iterations, self.settings.contours.network.iterations
        contours *= self.count + 1
        pixels = frames.numel() / frames.shape[1] / 1e6
        costs = {"motion": 2.5 * pixels, "rows": 0.035 * rows, "filling": 8 * pixels}
        return costs | (
            {"contours' motion": 2.5 * pixels, "contours": 0.012 * contours} if with_masks else {}
        )

    def _build(
        self, frames: Tensor, masks: Tensor | None, generator: torch.Generator, progress: Progress
    ) -> None:
        """Predicts where frames change from one to another; elsewhere there is nothing to predict."""
        count, settings = len(frames), self.settings.rows
        box = _changing(frames, self.settings.margin)
        everywhere, frames = frames, frames[box]
        paths = find_paths(frames, self.settings.flow, done=progress.part("motion"))
        self.flow = frames.new_zeros(count - 1, 2, *everywhere.shape[2:])
        self.flow[box] = torch.stack([path.flow for path in paths]).mean(0)
        stack = frames.new_zeros((count - 1) * STEPS + 1, *frames.shape[1:])
        stack[::STEPS] = frames
        for s in range(1, STEPS):
            stack[s::STEPS] = blend_paths(frames[:-1], frames[1:], paths, s / STEPS)
        given = stack.clone()
        for s in range(1, STEPS):
            given[s::STEPS] = torch.lerp(frames[:-1], frames[1:], s / STEPS)
        pixels = max(2, round(self.gap))
        if (
            pixels <= settings.widest_gap
            and (min(frames.shape[2:]) - 1) // pixels + 1 >= settings.fewest_rows
        ):
            planes = frames.transpose(0, 1)  # channel by channel
            rows = planes.reshape(-1, *frames.shape[2:])
            network = learn_rows(
                rows, pixels, settings, generator, progress.part("rows"), self.thickness * self.gap
            )
            if network is not None:
                done = progress.part("filling")
                filled = torch.stack(
                    [
                        joined(fill_stack(network, plane, settings, part_of(done, c, len(planes))), plane)
                        for c, plane in enumerate(planes)
                    ],
                    1,
                )
                stack = torch.lerp(given, torch.lerp(stack, filled, settings.share), 1 + settings.excess)
        if self.thickness:
            for _ in range(_ROUNDS):
                stack = with_means(stack, frames, self.thickness).clamp(0, 1)
        self._images = everywhere[[0]].half().repeat(len(stack), 1, 1, 1)
        self._images[box] = stack.clamp_(0, 1).half()
        self._distances, self._ranked = None, None
        if masks is not None:
            wide = []
            if len(frames) > 2:  # to learn on each frame that lies between two others
                wide = find_paths(frames, self.settings.flow, 2, progress.part("contours' motion"))
            done = progress.part("contours")
            if not self.count:
                self._distances = self._carry_mask(frames, masks, box, paths, wide, generator, done).half()
            else:
                self._ranked = self._carry_labels(everywhere, masks, box, paths, wide, generator, done)

    def _carry_mask(
        self,
        frames: Tensor,
        masks: Tensor,
        box: Box,
        paths: list[Paths],
        wide: list[Paths],
        generator: torch.Generator,
        done: Done,
    ) -> Tensor:
        """Signed distances at all levels, ((K - 1) STEPS + 1, 1, H, W). frames, paths: of the box. wide: the paths from
        each frame to the next but one, if there are any."""
        settings = self.settings.contours
        distances = distances_of(masks, self.gap)
        levels = distances.new_zeros(len(self._images), 1, *masks.shape[2:])
        levels[::STEPS] = distances
        for s in range(1, STEPS):
            levels[s::STEPS] = torch.lerp(distances[:-1], distances[1:], s / STEPS)
        network = self._network(distances[box], masks[box], frames, wide, settings, generator, done)
        levels[box] = self._carried(distances[box], self._images[box], paths, network)
        return levels.clamp_(-settings.farthest, settings.farthest)

    def _carry_labels(
        self,
        frames: Tensor,
        index: Tensor,
        box: Box,
        paths: list[Paths],
        wide: list[Paths],
        generator: torch.Generator,
        done: Done,
    ) -> Ranked:
        """Which labels lead at all levels, ((K - 1) STEPS + 1, 1, H, W). paths, wide: of the box; outside, nothing
        moves."""
        paths, wide = ([path.placed(box, frames.shape[2:]) for path in some] for some in (paths, wide))

        def fields() -> Iterator[tuple[int, Tensor]]:
            for place, (number, inside) in enumerate(masks_of(index, self.count)):
                part = part_of(done, place, self.count + 1)
                yield number, self._carry_label(frames, inside, paths, wide, generator, part, number == 0)

        return ranked(fields(), self.count)

    def _carry_label(
        self,
        frames: Tensor,
        inside: Tensor,
        paths: list[Paths],
        wide: list[Paths],
        generator: torch.Generator,
        done: Done,
        background: bool,
    ) -> Tensor:
        """Signed distances of one label, or of the ``background``, at all levels, as of a mask, computed where they are
        not far outside. Carrying flattens the ridges of thin structures, which would then vanish: so areas are kept."""
        settings = self.settings.contours
        levels = frames.new_full((len(self._images), 1, *frames.shape[2:]), -settings.farthest)
        window = _window(inside, math.ceil(settings.farthest) + self.settings.margin)
        if window is None:
            return levels
        (first, last), area = window
        masks = inside[first : last + 1][area].float()
        distances = distances_of(masks, self.gap, background)
        here = slice(first * STEPS, last * STEPS + 1)
        network = self._network(
            distances,
            masks,
            frames[first : last + 1][area],
            [path.part(slice(first, last - 1), area) for path in wide] if last - first > 1 else [],
            settings.for_labels(self.count),
            generator,
            done,
        )
        along = [path.part(slice(first, last), area) for path in paths]
        found = self._carried(distances, self._images[here][area], along, network)
        areas = masks.sum((1, 2, 3))
        for s in range(1, STEPS):
            wanted = torch.lerp(areas[:-1], areas[1:], s / STEPS)
            found[s::STEPS] = with_areas(found[s::STEPS], wanted, settings.most_shift)
        levels[here][area] = found.clamp_(-settings.farthest, settings.farthest)
        return levels

    def _network(
        self,
        distances: Tensor,
        masks: Tensor,
        frames: Tensor,
        wide: list[Paths],
        settings: ContourSettings,
        generator: torch.Generator,
        done: Done,
    ) -> Contours | None:
        """What corrects distances (K, 1, H, W) carried to between the frames: it learns on each frame that lies between
        two others."""
        if not wide or not settings.network.iterations:
            return None
        before, after = distances[:-2], distances[2:]
        return learn_contours(
            blend_paths(before, after, wide, 0.5),
            (before + after) / 2,
            frames[1:-1],
            (masks[1:-1] >= 0.5).float(),
            settings,
            generator,
            done,
        )

    def _carried(
        self, distances: Tensor, images: Tensor, paths: list[Paths], network: Contours | None
    ) -> Tensor:
        """Distances (K, 1, H, W) at all levels, ((K - 1) STEPS + 1, 1, H, W). images: there, (..., C, H, W)."""
        levels = distances.new_zeros(len(images), *distances.shape[1:])
        levels[::STEPS] = distances
        for s in range(1, STEPS):
            alpha = s / STEPS
            moved = blend_paths(distances[:-1], distances[1:], paths, alpha)
            if network is not None:
                still = torch.lerp(distances[:-1], distances[1:], alpha)
                moved = moved + self.settings.contours.trust * network(moved, still, images[s::STEPS].float())
            levels[s::STEPS] = moved
        return levels

    def save(
        self,
        path: Path,
        frames: Tensor,
        masks: Tensor | None,
        labels: tuple[Tensor, int] | None = None,
    ) -> None:
        """Saves what was computed from ``frames`` and ``masks`` or ``labels``, for `load`."""
        contents = {
            "key": _digest(frames, masks, *self._asked, labels, self._asked_thickness),
            "gap": self.gap,
            "flow": self.flow.cpu(),
            "images": self._images.cpu(),
            "distances": None if self._distances is None else self._distances.cpu(),
            "ranked": None if self._ranked is None else [part.cpu() for part in self._ranked.parts],
        }
        with atomic_write(path, sync=False) as temporary:
            torch.save(contents, temporary)

    @classmethod
    def load(
        cls,
        path: Path,
        frames: Tensor,
        masks: Tensor | None = None,
        gap: float | None = None,
        seed: int = 0,
        settings: Settings = DEFAULT,
        labels: tuple[Tensor, int] | None = None,
        thickness: float = 0.0,
    ) -> InBetween | None:
        """The prediction that `save` wrote for the same arguments; None where there is none.

        ``gap=None`` counts as an argument: a prediction made for a known gap does not match one that estimates it.
        """
        try:
            contents = torch.load(path, map_location=frames.device, weights_only=True)
            same = contents["key"] == _digest(frames, masks, gap, seed, settings, labels, thickness)
            kept = [contents[name] for name in ("gap", "flow", "images", "distances", "ranked")]
        except (OSError, RuntimeError, pickle.UnpicklingError, KeyError, TypeError, EOFError):
            return None  # missing or truncated: it can be computed again
        if not same:
            return None
        made = cls.__new__(cls)
        made.gap, made.flow, made._images, made._distances, parts = kept
        made._ranked = None if parts is None else Ranked(*parts)
        made.count = 0 if labels is None else labels[1]
        made._asked, made.settings = (gap, seed, settings), settings
        made._asked_thickness = thickness
        made.thickness = thickness if thickness * made.gap > 1 else 0.0
        return made

    def images(self, k: Tensor, alpha: Tensor) -> Tensor:
        """Images at alpha of the way from frame k to k + 1, (B, C, H, W) in [0, 1].

        k: (B,) integers in [0, K - 2]; alpha: (B,) in [0, 1], both on the frames' device. Never waits for the device;
        shapes depend on B alone."""
        return self._look_up(self._images, k, alpha)

    def masks(self, k: Tensor, alpha: Tensor) -> Tensor:
        """Masks at those times, (B, 1, H, W) in [0, 1], whose edge is one pixel wide; of a label map, the shares of the
        labels (B, labels, H, W), likewise. As `images`."""
        if self._ranked is not None:
            index, seen, late = self._around(k, alpha)
            before, after = (self._ranked[at].channels(self.count) for at in (index, index + 1))
            return blend_along(before, after, seen, late, "bilinear")
        return (self.distances(k, alpha) + 0.5).clamp(0, 1)

    def distances(self, k: Tensor, alpha: Tensor) -> Tensor:
        """Signed distances from the masks' contours in pixels, inside above 0, (B, 1, H, W). As `images`."""
        if self._distances is None:
            raise ValueError("masks in between: none were given")
        return self._look_up(self._distances, k, alpha)

    def _look_up(self, levels: Tensor, k: Tensor, alpha: Tensor) -> Tensor:
        index, seen, late = self._around(k, alpha)
        return blend_along(levels[index].float(), levels[index + 1].float(), seen, late)

    def _around(self, k: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The level before those times (B,), the motion from it to the next one, and how far after it they are, 0 to
        1 (B,)."""
        step = (alpha * STEPS).floor().clamp(0, STEPS - 1)
        return k * STEPS + step.long(), flow_at(self.flow[k], alpha) / STEPS, alpha * STEPS - step


def with_means(stack: Tensor, frames: Tensor, thickness: float) -> Tensor:
    """The stack ((K - 1) STEPS + 1, C, H, W), changed as little as possible (in square) so that its means over slices
    are the frames (K, C, H, W). thickness: of a slice, in gaps.

    The first and the last slice reach beyond the stack, so their means are not known.
    """
    count = len(frames)
    places = torch.arange(len(stack), device=stack.device) / STEPS
    distance = (places - torch.arange(count, device=stack.device)[:, None]).abs()
    shares = (STEPS * (thickness / 2 - distance) + 0.5).clamp(0, 1)  # of each level, 1 / STEPS thick
    means = shares / shares.sum(1, keepdim=True)  # (K, levels)
    reach = math.ceil(thickness / 2)
    means = means[reach : count - reach]
    if not len(means):
        return stack
    square = means @ means.T
    square = square + _RIDGE * square.diagonal().mean() * torch.eye(len(square), device=stack.device)
    back = torch.linalg.solve(square, means).T  # (levels, K')
    missing = frames[reach : count - reach] - torch.einsum("kl,lchw->kchw", means, stack)
    return stack + torch.einsum("lk,kchw->lchw", back, missing)


def _changing(frames: Tensor, margin: int) -> Box:
    """An index that cuts out, of (K, C, H, W), the pixels that are not the same in all frames, and a margin."""
    changing = (frames.amax(0) > frames.amin(0)).any(0)  # (H, W)
    if not changing.any():
        return ..., slice(None), slice(None)
    sides = []
    for other, count in ((1, changing.shape[0]), (0, changing.shape[1])):
        found = changing.any(other).nonzero()
        sides.append(slice(max(0, int(found[0]) - margin), min(count, int(found[-1]) + 1 + margin)))
    return ..., sides[0], sides[1]


def _window(inside: Tensor, margin: int) -> tuple[tuple[int, int], Box] | None:
    """The first and the last frame in reach of a mask (K, 1, H, W) bool, and an index that cuts out its pixels and a
    margin; None where it is empty."""
    (frames,) = inside.flatten(1).any(1).nonzero(as_tuple=True)
    if not len(frames):
        return None
    sides = []
    for other, count in ((1, inside.shape[2]), (0, inside.shape[3])):
        (found,) = inside.any(0)[0].any(other).nonzero(as_tuple=True)
        sides.append(slice(max(0, int(found[0]) - margin), min(count, int(found[-1]) + 1 + margin)))
    first, last = max(0, int(frames[0]) - 1), min(len(inside) - 1, int(frames[-1]) + 1)
    return (first, last), (..., sides[0], sides[1])


def pixel_gap(geometry: Geometry | None, columns: int) -> float | None:
    """The distance in pixels between neighbouring frames of `columns` columns; None where it is unknown or not the
    same everywhere."""
    if geometry is None or geometry.spacing is None or not geometry.evenly_spaced:
        return None
    column, row, frame = geometry.spacing
    return frame / math.sqrt(column * row) * columns / geometry.size[0]  # --resolution changes pixels


def _digest(
    frames: Tensor,
    masks: Tensor | None,
    gap: float | None,
    seed: int,
    settings: Settings,
    labels: tuple[Tensor, int] | None = None,
    thickness: float = 0.0,
) -> str:
    index, count = labels or (None, 0)
    asked = f"{_VERSION} {gap} {seed} {settings} {count} {thickness}"
    digest = hashlib.blake2b(asked.encode(), digest_size=16)
    for values in (frames, masks, index):
        if values is not None:
            digest.update(str(tuple(values.shape)).encode())
            digest.update(values.float().cpu().contiguous().numpy().data)
    return digest.hexdigest()
