"""The training loop. Pipelines differ only in the run's tasks."""

from __future__ import annotations

from training.batches import Views
from training.budget import budget_of, forecast
from training.recording import side_stream
from training.reports import Report
from training.run import Training
from utils.memory import peak_memory
from utils.stages import stage

XYZ_INTERVAL = 5000  # iterations between two files of --save_xyz


def train(training: Training, stop: object = None) -> None:
    """Trains until ``options.iterations``. ``stop`` is checked in every iteration; once true, the run ends after
    that iteration, with a checkpoint."""
    options, parts = training.options, training.parts
    report = Report(training.folder, training.iteration, options.iterations, options.quiet)
    with side_stream(training.model.device):
        step = training.stepper()
        report.say(forecast(training, step).line(training))
        budget = budget_of(training, options.time) if options.time else None
        while training.iteration < training.options.iterations:
            iteration = training.iteration = training.iteration + 1
            if budget:
                planned = budget.plan(iteration, options.iterations, options.average_from_iter)
                if planned != options.iterations:
                    training.replan(planned)
                    report.replan(planned)
                    options = training.options
            last = iteration == options.iterations
            with stage("rates"):
                training.set_rates()

            batch = training.sampler.draw(in_between=training.regularised)
            result = step(
                Views.of(batch, training.model.device, training.model), iteration, training.controlled
            )
            if options.debug or 0 <= options.debug_from <= iteration:
                training.check_finite(result.losses(training.tasks))
            if report.advance(iteration):
                report.metrics(iteration, training.metrics(result))
            with stage("statistics"):
                training.observe(result, len(batch.frames))

            # What is evaluated, saved and kept is one model, before it changes: new Gaussians, and those whose
            # opacity was reset, have learned nothing yet.
            stopping = bool(stop)
            if iteration in options.test_iterations or last:
                with parts("evaluation"):
                    report.evaluation(iteration, training.evaluate())
            with parts("saving"):
                if iteration in options.save_iterations or last:
                    training.save_point_cloud()
                if options.save_xyz and (iteration % XYZ_INTERVAL == 1 or last):
                    training.save_xyz()
                regular = options.checkpoint_interval and iteration % options.checkpoint_interval == 0
                if iteration in options.checkpoint_iterations or regular or stopping or last:
                    training.save_checkpoint()
            if stopping or last:
                break
            training.update()
    with parts("waiting"):
        report.end()
        training.beside.finish()
    report.close(parts.seconds, peak_memory(training.model.device))
    if budget and options.time and not stop and (note := budget.note(options.time, training.iteration)):
        report.say(note)
