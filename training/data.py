"""What a run trains on: frames, masks, those held out, and the prediction between them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from arguments import TrainOptions, resolve_device
from gaussian_renderer import MAX_RENDERS
from in_between.masks import dense_distances, dense_labels
from in_between.prediction import InBetween, pixel_gap
from in_between.progress import Done, shown, unheard
from in_between.rows import matching_gap
from patient.geometry import FILE_NAME, HELDOUT, Geometry, relative_thickness
from scene.frames import Frames
from scene.heldout import HeldOut, hold_out, of_masks, read_test
from training.pipelines import Task
from utils.beside import Beside
from utils.errors import UserError


@dataclass(frozen=True)
class Data:
    """What was read for a run."""

    frames: Frames  # of ``-s``: images, or in plain segmentation training masks
    masks: Frames | None  # of joint training, one per frame
    painted: (
        tuple[int, ...] | None
    )  # the frames whose masks were given; None for all: the others' were filled in
    geometry: Geometry | None  # of the frames, where prepare.py wrote it
    heldout: list[HeldOut | None]  # of the frames and of the masks

    @property
    def channels(self) -> int:
        """The C that a model's image head needs to show them all, except for label maps beside images."""
        joint = self.masks is not None and self.masks.labels is None
        return max(f.channels for f in (self.frames, self.masks if joint else None) if f is not None)


def read_data(
    options: TrainOptions, device: torch.device, say: Callable[[str], object], fill_in: bool = True
) -> Data:
    """Reads the frames of ``-s``, and for joint training the masks that belong to them. fill_in: if only some frames
    have a mask, carry these to the others, which takes a while; else the others' are empty."""
    data_device = device if options.data_device == "auto" else resolve_device(options.data_device)

    def read(root: str, masks: bool) -> Frames:
        folder = options.folder_of(root)
        return Frames.read(folder, options.resolution, device, data_device, say, masks=masks)

    def read_heldout(folder: Path, kept: Frames) -> Frames:
        masks = kept.meaning is not None
        return Frames.read(
            folder, options.resolution, device, data_device, say, False, masks=masks, meaning=kept.meaning
        )

    sequences = [(options.source_path, read(options.source_path, options.pipeline == "seg"))]
    geometry = Geometry.find(options.source_path)
    if geometry is not None and len(geometry.slices) != len(sequences[0][1]):
        raise UserError(
            f"{options.source_path} has {len(sequences[0][1])} frames, its {FILE_NAME} has {len(geometry.slices)}: "
            "run prepare.py again, or remove that file"
        )
    if options.pipeline == "joint":
        assert options.seg_source_path is not None
        masks = read(options.seg_source_path, True)
        _check_masks(f"{options.seg_source_path} against {options.source_path}", sequences[0][1], masks)
        if len(masks) < len(sequences[0][1]):
            return _sparse(options, sequences[0], masks, geometry, read_heldout, say, fill_in)
        sequences.append((options.seg_source_path, masks))
    (frames, *others), geometry, tests = hold_out(options, sequences, geometry, read_heldout, say)
    return Data(frames, others[0] if others else None, None, geometry, tests)


def _sparse(
    options: TrainOptions,
    images: tuple[str, Frames],
    masks: Frames,
    geometry: Geometry | None,
    read_heldout: Callable[[Path, Frames], Frames],
    say: Callable[[str], object],
    fill_in: bool,
) -> Data:
    """What to train on if only some frames have a mask: the others' are carried there along the images' motion."""
    assert options.seg_source_path is not None
    (frames,), rest, (test,) = hold_out(options, [images], geometry, read_heldout, say)
    place = {number: k for k, number in enumerate(frames.numbers)}
    given = masks.take([k for k, number in enumerate(masks.numbers) if number in place])
    if not len(given):
        raise UserError(
            f"{options.seg_source_path}: --eval holds out every frame that has a mask; choose another N"
        )
    painted = [place[number] for number in given.numbers]
    if fill_in:
        gap = pixel_gap(rest, frames.width)
        with shown("masks of the other frames", options.quiet) as report:
            filled = fill(frames, given, painted, gap, lambda share: report("motion", share))
    else:
        levels = given.levels.new_zeros(len(frames), *given.levels.shape[1:])
        levels[painted] = given.levels
        filled = replace(given, levels=levels, names=frames.names, numbers=frames.numbers)
    say(
        f"masks: {len(given)} of {len(frames)} frames have one; the others' are carried there along the motion of the "
        "images, and taught like these"
    )
    if (Path(options.seg_source_path) / HELDOUT).is_dir():
        tests = [test, read_test(Path(options.seg_source_path), filled, rest, read_heldout, say)]
    else:
        tests = [test, None if test is None or rest is None else of_masks(masks, filled, test, rest)]
    tests = [
        test and replace(test, given=tuple(painted) if number else None) for number, test in enumerate(tests)
    ]
    return Data(frames, filled, tuple(painted), rest, tests)


def fill(
    frames: Frames, masks: Frames, painted: Sequence[int], gap: float | None = None, done: Done = unheard
) -> Frames:
    """Masks of all frames, from those of the frames ``painted`` (indices, increasing): these as they are, the others
    carried along the motion of the images (`in_between.masks`). gap: pixels from a frame to the next; None if unknown.
    """
    images = frames(range(len(frames)))
    known = matching_gap(images) if gap is None else gap
    if masks.labels is not None:
        index = masks.index().to(images.device)
        levels = dense_labels(images, index, len(masks.labels), painted, known, done=done)
    else:
        inside = masks(range(len(masks))).to(images.device).mean(1, keepdim=True)
        distances = dense_distances(images, inside, painted, known, done=done)
        shares = (distances + 0.5).clamp(0, 1)
        shares[list(painted)] = inside
        levels = (255 * shares).round().byte()
    levels = levels.to(masks.levels.device)
    return replace(masks, levels=levels, names=frames.names, numbers=frames.numbers, has_alpha=False)


def _check_masks(where: str, frames: Frames, masks: Frames) -> None:
    """Checks that the masks belong to the frames, by their numbers: to all, or to some."""
    if len(masks) > len(frames):
        raise UserError(f"{where}: {len(masks)} masks for {len(frames)} frames; number them alike")
    if len(masks) == len(frames):
        for frame, mask in zip(frames.numbers, masks.numbers, strict=True):
            if frame != mask:
                raise UserError(
                    f"{where}: frame number {frame} is paired with mask number {mask}; number them alike"
                )
    elif unknown := sorted(set(masks.numbers) - set(frames.numbers)):
        raise UserError(
            f"{where}: {len(masks)} masks for {len(frames)} frames, and mask number {unknown[0]} has no frame; a mask "
            "has the number of its frame"
        )
    if (masks.width, masks.height) != (frames.width, frames.height):
        raise UserError(
            f"{where}: masks of {masks.width} x {masks.height} pixels for frames of {frames.width} x {frames.height}"
        )


def expected_between(
    options: TrainOptions, data: Data, say: Callable[[str], object], beside: Beside
) -> InBetween | None:
    """The expected in-between frames for --ibfr_target motion: read from the output folder if an earlier run left
    them, else computed, which takes minutes, and from a GPU saved beside the training."""
    frames, masks, geometry = data.frames, data.masks, data.geometry
    of_images, of_masks = options.lambda_ibfr + options.lambda_ibfr_dssim, options.lambda_ibfr_seg
    weights = {"img": (of_images,), "seg": (of_masks,)}
    wanted = weights.get(options.pipeline, (of_images, of_masks))
    if options.ibfr_target != "motion" or not any(wanted) or options.seg_head_only or len(frames) < 2:
        return None
    last = frames if options.pipeline == "seg" else masks
    labels = None if last is None or last.labels is None else (last.index(), len(last.labels))
    if options.pipeline == "seg" and labels is not None:
        images = (labels[0] / labels[1]).float()  # a label map has no motion but its own: ids as grey levels
    else:
        images = frames(range(len(frames)))
    truth = None
    if last is not None and labels is None:
        truth = (images if last is frames else last(range(len(last)))).mean(1, keepdim=True)
    gap = pixel_gap(geometry, images.shape[-1])
    path = Path(options.model_path) / "in_between.pt"
    thickness = relative_thickness(options.slice_thickness, geometry)
    kept = InBetween.load(path, images, truth, gap, options.seed, labels=labels, thickness=thickness)
    if kept is not None:
        return kept
    start = time.perf_counter()
    with shown("motion between the frames", options.quiet) as report:
        made = InBetween(images, truth, gap, options.seed, report=report, labels=labels, thickness=thickness)
    if images.is_cuda:
        beside(made.save, path, images, truth, labels)
    else:
        made.save(path, images, truth, labels)
    say(f"motion between the frames: {time.perf_counter() - start:.0f} s")
    return made


def check_batch(options: TrainOptions, todo: Sequence[Task]) -> None:
    """Checks that the rasteriser can draw an iteration's images at once."""
    real = min(options.batch_size, len(todo[0].frames))
    renders = sum(2 * real - 1 if task.in_betweens else real for task in todo)
    if renders > MAX_RENDERS and options.rasterizer == "compiled":
        raise UserError(
            f"--batch_size {options.batch_size} asks for {renders} images per iteration, those in between "
            f"included: {MAX_RENDERS} is the most; give a smaller one"
        )
