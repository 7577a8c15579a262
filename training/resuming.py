"""Where a run starts: from nothing or from a checkpoint, which is checked against the options and the frames."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from arguments import AUTO, TrainOptions
from patient.labels import LabelTable
from scene.checkpoint import Checkpoint, all_of, load_checkpoint, newest_readable
from scene.frames import Frames
from utils.errors import UserError

# Options that do not affect what a run computes.
_OF_NO_CONSEQUENCE = {
    "source_path", "seg_source_path", "model_path", "start_checkpoint", "quiet", "debug", "debug_from", "num_pts",
    "start", "report", "time",
}  # fmt: skip
# Options that a run cannot change half-way: its result would belong to neither setting.
_FIXED = ("pipeline", "distance", "white_background", "random_background")


def starting_point(
    options: TrainOptions, device: torch.device, say: Callable[[str], object]
) -> tuple[TrainOptions, Checkpoint | None]:
    """The checkpoint to start from, and ``options`` that name its file; None for a new model."""
    folder = Path(options.model_path)
    if options.start_checkpoint != AUTO:
        if options.start_checkpoint:
            return options, load_checkpoint(options.start_checkpoint, device)
        if there := all_of(folder):
            say(
                f"{folder} holds checkpoints of an earlier run, up to iteration {max(there)}: this run starts over "
                f"among them (--start_checkpoint {AUTO} continues it)"
            )
        return options, None
    found = newest_readable(folder, device)
    if found is not None:
        return replace(options, start_checkpoint=str(found[0])), found[1]
    if options.seg_head_only:
        raise UserError(
            f"{folder} holds no checkpoint that can be read, and --seg_head_only needs a model: name one"
        )
    say(f"{folder} holds no checkpoint that can be read: starting anew")
    return replace(options, start_checkpoint=None), None


def as_saved(options: TrainOptions) -> dict[str, Any]:
    values = {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(options).items()}
    return {name: value for name, value in values.items() if name != "given"}


def changes(before: Mapping[Any, Any], now: Mapping[str, Any]) -> list[str]:
    """The options that affect the result and differ from the checkpoint's, in words."""
    return [
        f"--{name} {value} (was {before[name]})"
        for name, value in now.items()
        if name in before and name not in _OF_NO_CONSEQUENCE and before[name] != value
    ]


def check_continues(options: TrainOptions, saved: Checkpoint, pixels: str) -> None:
    """Checks that the options and frames are still those of the saved run. Raises `UserError` where continuing it would
    be meaningless."""
    path, before = options.start_checkpoint, saved.extras.get("options", {})
    for name in _FIXED:
        if name in before and before[name] != getattr(options, name):
            raise UserError(
                f"--{name} {getattr(options, name)}: the run of {path} had {before[name]}, which cannot change: "
                "give that, or start a new run"
            )
    if saved.extras.get("pixels", pixels) != pixels:
        raise UserError(
            f"{path} was trained on other frames than those of {options.source_path} (equally many, of the same size, "
            "with other pixels): give those, or start a new run"
        )


def check_fits(
    options: TrainOptions, saved: Checkpoint, frames: Frames, labels: LabelTable | None = None
) -> None:
    """Checks that the checkpoint's model was trained on these frames. labels: of the label map, if that is what is to
    be learned."""
    path = options.start_checkpoint
    _check_heads(options, saved, labels)
    if saved.num_frames != len(frames):
        raise UserError(
            f"{path} was trained on {saved.num_frames} frames, {options.source_path} has {len(frames)}: "
            "give the frames that it was trained on"
        )
    size = saved.extras.get("width", frames.width), saved.extras.get("height", frames.height)
    if size != (frames.width, frames.height):
        raise UserError(
            f"{path} was trained on frames of {size[0]} x {size[1]} pixels, these are {frames.width} x "
            f"{frames.height}: check -s and --resolution"
        )
    numbers = saved.extras.get("numbers", frames.numbers)
    if numbers != frames.numbers:
        pair = next(pair for pair in zip(numbers, frames.numbers, strict=True) if pair[0] != pair[1])
        raise UserError(
            f"{path} was trained on frame number {pair[0]} where {options.source_path} has number {pair[1]}: give the "
            "frames that it was trained on"
        )
    if saved.extras.get("distance", options.distance) != options.distance:
        raise UserError(f"{path} was trained with --distance {saved.extras['distance']}: give it again")
    if frames.labels is None and max(frames.channels, saved.channels) != saved.channels:
        raise UserError(f"{path} is a grey model, and the frames of {options.source_path} are coloured")


def _check_heads(options: TrainOptions, saved: Checkpoint, labels: LabelTable | None) -> None:
    """Checks that the checkpoint's heads show what is to be learned: images, a mask, or these labels."""
    path = options.start_checkpoint
    if (
        saved.labels is not None
        and not saved.has_seg_head
        and (options.pipeline != "seg" or options.seg_head_only)
    ):
        raise UserError(
            f"{path} shows a label map ({saved.labels.words()}) and no images: continue it with --pipeline seg, or "
            "start a new run"
        )
    if options.pipeline == "img":
        return
    if options.pipeline == "seg" and not options.seg_head_only:
        there, shown = True, None if saved.has_seg_head else saved.labels
    else:
        there, shown = saved.has_seg_head, saved.labels
    if there and (shown and shown.ids) != (labels and labels.ids):
        raise UserError(
            f"{path} shows {_words(shown)}, and the masks are {_words(labels)}: give the masks that it was trained on, "
            "or start from a model of the images alone"
        )


def _words(labels: LabelTable | None) -> str:
    return "one mask" if labels is None else f"{len(labels)} labels ({labels.words(4)})"


def with_model_of(options: TrainOptions, saved: Checkpoint) -> TrainOptions:
    """``options`` with those of the checkpoint's model, so that what the run saves is true.

    Raises `UserError` where the command line asks for another model.
    """
    actual = replace(
        options,
        poly_degree=saved.poly_degree,
        sh_degree=saved.sh_degree,
        use_dff=saved.uses_dff,
        num_pts=len(saved.params["xyz"]),
        antialiasing=options.antialiasing if saved.antialiasing is None else saved.antialiasing,
    )
    for name in options.given & {"poly_degree", "sh_degree", "use_dff", "antialiasing"}:
        wanted, there = getattr(options, name), getattr(actual, name)
        if wanted != there:
            raise UserError(
                f"--{name} {wanted}: the model of {options.start_checkpoint} has {there}; leave it out"
            )
    return actual
