#!/usr/bin/env python3
"""Trains a Folded-Gaussian model on a sequence of frames (img), on masks (seg), or on both (joint).

    python train.py -s DATA_ROOT -m OUTPUT

DATA_ROOT/original/ holds the frames 0000.png, 0001.png, ...; --help lists every option.
"""

from __future__ import annotations

import torch

from arguments import train_options
from gaussian_renderer import Renders
from scene.density_control import reset_opacity
from scene.gaussian_model import set_rates
from scene.iteration import on_side_stream
from scene.pipelines import Inputs
from scene.training import Training, fresh_folder
from utils.errors import UserError, run
from utils.reports import Report

XYZ_INTERVAL = 5000  # iterations between two files of --save_xyz


@on_side_stream
def train(training: Training) -> None:
    """The loop. Pipelines differ in ``training.tasks`` only."""
    options, tasks = training.options, training.tasks
    report = Report(training, training.iteration)
    step = training.stepper()
    for iteration in range(training.iteration + 1, options.iterations + 1):
        model, optimizer = training.model, training.optimizer
        training.iteration = iteration
        last = iteration == options.iterations
        set_rates(model, optimizer, iteration, options, training.extent)

        regularised = iteration >= options.ibfr_from_iter and any(task.terms.get("ibfr") for task in tasks)
        batch = training.sampler.draw(in_between=regularised)
        controlled = iteration < options.densify_until_iter and not options.seg_head_only
        outcome = step(Inputs.of(batch, model.device), controlled)
        if options.debug or 0 <= options.debug_from <= iteration:
            check_finite(training, outcome.loss)

        with torch.no_grad():
            if controlled:
                control_density(training, outcome.renders, len(batch.frames))
            if not last:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        report.iteration(iteration, tasks, outcome, training)
        if iteration in options.test_iterations or last:
            report.evaluation(training)
        if iteration in options.save_iterations or last:
            training.save_point_cloud()
        if iteration in options.checkpoint_iterations or last:
            training.save_checkpoint()
        if options.save_xyz and (iteration % XYZ_INTERVAL == 1 or last):
            training.save_xyz()
    report.close()


def control_density(training: Training, renders: Renders, real: int) -> None:
    """Statistics over the ``real`` views, then the density step and the opacity reset where they are due."""
    options, model, iteration = training.options, training.model, training.iteration
    for head, task in enumerate(training.tasks):
        training.control.observe(
            renders.radii[:real],
            renders.active[:real],
            task.test,
            renders.screen.grad[head, :real],
            model.params["m"].grad,
            training.camera,
            options.rasterizer,
        )
    if iteration > options.densify_from_iter and iteration % options.densification_interval == 0:
        training.control.step(
            model, training.optimizer, iteration, options, training.extent, training.generator
        )
        if len(model) == 0:
            raise UserError(
                f"iteration {iteration}: every Gaussian was pruned; lower --prune_opacity or the learning rates"
            )
    at_start = options.white_background and iteration == options.densify_from_iter
    if iteration % options.opacity_reset_interval == 0 or at_start:
        reset_opacity(model, training.optimizer, options.opacity_reset_value)


def check_finite(training: Training, loss: torch.Tensor) -> None:
    """Raises `UserError` naming the iteration's first value that is not finite: the loss, or a gradient."""
    values = {"loss": loss} | {f"gradient of {name}": p.grad for name, p in training.model.params.items()}
    for name, value in values.items():
        if value is not None and not bool(value.isfinite().all()):
            raise UserError(
                f"iteration {training.iteration}: the {name} is not finite; lower the learning rates"
            )


def main() -> None:
    options = train_options()
    torch.autograd.set_detect_anomaly(options.detect_anomaly)

    def say(message: str) -> None:
        if not options.quiet:
            print(message, flush=True)

    training = Training.start(options, say)
    frames = training.tasks[0].frames
    if training.iteration >= options.iterations:
        raise UserError(
            f"{options.start_checkpoint} is already at iteration {training.iteration}: give more --iterations"
        )
    fresh_folder(options.model_path)
    training.write_inputs(say)
    say(f"output: {options.model_path}")
    say(
        f"frames: {len(frames)} of {frames.width} x {frames.height}, {frames.bits} bit, "
        f"{'grey' if frames.channels == 1 else 'colour'}; on {training.model.device}"
    )
    if training.heldout:
        say(f"held out: {max(map(len, training.heldout.values()))} frames")
    say(f"Gaussians: {len(training.model)}")
    train(training)
    say(f"done: {options.model_path} (next: python render.py -m {options.model_path} --interp 4)")


if __name__ == "__main__":
    run(main)
