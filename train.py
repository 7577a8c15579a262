#!/usr/bin/env python3
"""Trains a Folded-Gaussian model on a sequence of frames (img), on masks (seg), or on both (joint).

    python train.py -s DATA_ROOT -m OUTPUT

DATA_ROOT/original/ holds the frames 0000.png, 0001.png, ...; --help lists every option.
"""

from __future__ import annotations

import utils.threads  # isort: skip  (before torch)
import utils.timing  # isort: skip

import os
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from arguments import AUTO, TrainOptions, model_options, train_options
from training.loop import train
from training.run import Training
from utils.errors import StopRequest, UserError, run
from utils.files import own_folder
from utils.images import limit_pixels

IF_OUT_OF_MEMORY = (
    "lower --max_gaussians, --num_pts, --batch_size or --resolution, or keep the frames elsewhere with "
    "--data_device cpu"
)


def main() -> int:
    options = train_options()
    torch.autograd.set_detect_anomaly(options.detect_anomaly)
    if options.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch asks for it
    if (
        options.deterministic != torch.are_deterministic_algorithms_enabled()
    ):  # the call imports torch's compiler
        torch.use_deterministic_algorithms(options.deterministic)
    limit_pixels(options.max_pixels)

    def say(message: str) -> None:
        if not options.quiet:
            print(message, flush=True)

    imports = time.perf_counter() - utils.timing.BEGUN
    with own_folder(options.model_path):
        training = Training.start(options, say)
        training.parts.seconds["imports"] = imports
        training.tidy()
        options = training.options  # with what the checkpoint says
        if training.iteration >= options.iterations:
            done = f"{options.start_checkpoint} is already at iteration {training.iteration}"
            if training.found:
                say(f"{done}: nothing to do")
                return 0
            raise UserError(f"{done}: give more --iterations")
        training.write_inputs(say)
        frames = training.tasks[0].frames
        say(f"output: {options.model_path}")
        what = f"{frames.bits} bit, {'grey' if frames.channels == 1 else 'colour'}"
        if frames.labels is not None:
            what = f"{len(frames.labels)} labels"
        say(f"frames: {len(frames)} of {frames.width} x {frames.height}, {what}; on {training.model.device}")
        if training.heldout:
            say(f"held out: {max(map(len, training.heldout.values()))} frames")
        say(f"Gaussians: {len(training.model)}")
        with StopRequest() as stop:
            train(training, stop)
        planned = training.options.iterations
        if stop and training.iteration < planned:
            print(
                f"stopped at iteration {training.iteration} of {planned}; to continue, run the same command "
                f"with -m {shlex.quote(str(options.model_path))} --start_checkpoint {AUTO}",
                file=sys.stderr,
            )
            return stop.status
    if options.report:
        write_the_report(options, say)
    say(
        f"done: {options.model_path} (next: python render.py -m {shlex.quote(str(options.model_path))} --interp 4)"
    )
    return 0


def write_the_report(options: TrainOptions, say: Callable[[str], object]) -> None:
    from viewer.case import Case  # matplotlib and others take a while to import
    from viewer.report import write_report

    case = Case.open(
        model_options(
            {"model_path": options.model_path, "device": options.device, "rasterizer": options.rasterizer}
        ),
        say=say,
    )
    path = Path(options.model_path) / "report.html"
    for warning in write_report(case, path):
        say(f"note: {warning}")
    say(f"report: {path} ({path.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    run(main, IF_OUT_OF_MEMORY)
