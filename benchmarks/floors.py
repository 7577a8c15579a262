"""A training iteration on a GPU, phase by phase: the bytes and operations it needs, and the time it takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import table
from benchmarks.iterations import OTHER, Stopwatch, training_run
from benchmarks.scenes import Bench, Unavailable
from benchmarks.workload import CUDA, Attainable, Recorder, count, floors
from gaussian_renderer import render
from scene.cameras import Camera
from training.batches import Views, requested_renders

ITERATIONS = 6050  # of the run whose state this is: half an interval behind a density step
# A whole interval with its density step and what is recorded anew after it; replayed iterations, without either.
TIMED, TRACED = 100, 20


def floors_on_cuda(bench: Bench) -> dict[str, Any]:
    """Bytes and operations of each phase of an iteration (img, IBFR), their least time, and the time measured."""
    if bench.device.type != "cuda":
        raise Unavailable("it needs a CUDA device (throughput has the floors of a CPU)")
    before = 50 if bench.quick else ITERATIONS - TIMED - TRACED - 1
    watch = Stopwatch(bench.device, TIMED, TRACED)
    data = Path(bench.case) if bench.case else Camera(197, 233)
    with training_run(bench, data, ibfr_from_iter=0) as run_of_it:
        watch.run(run_of_it, before)
        draws = [run_of_it.sampler.draw(in_between=True) for _ in range(20)]
        batch = max(draws, key=lambda batch: len(batch.positions))  # one at an end has fewer views
        views = Views.of(batch, bench.device)
        model, camera, (task,) = run_of_it.model, run_of_it.camera, run_of_it.tasks
        (requested,) = requested_renders([task], views)
        with Recorder() as recorder, torch.no_grad():
            at = views.positions, views.mirrored
            images = render(model, camera, *at, requested, run_of_it.background).images
        work = count(recorder.calls["blend"], CUDA)
        learned = sum(state["exp_avg"].numel() for state in run_of_it.optimizer.state.values())
        needed = floors(recorder.calls, work, images[: views.real].numel(), learned)
        gaussians = len(model)
    can = Attainable.measured(bench.device, 1, bench.quick)
    measured = watch.phases()
    if not measured:
        raise Unavailable("torch's profiler saw no kernels")
    result = {
        "scene": {
            "frames": bench.frames,
            "gaussians": gaussians,
            "views": len(views),
            "width": camera.width,
            "height": camera.height,
        },
        "pairs": asdict(work),
        "attainable": asdict(can),
        "iteration_s": watch.seconds,
        "phases": {
            name: asdict(floor) | {"floor_s": floor.seconds(can), "measured_s": measured.get(name)}
            for name, floor in needed.items()
        }
        | {OTHER: {"bytes": None, "operations": None, "floor_s": None, "measured_s": measured.get(OTHER)}},
        "kernels_s": dict(sorted(watch.kernels.items(), key=lambda item: -item[1])),
    }
    print(floors_table(result))
    print("\n" + floors_note(result))
    return result


def floors_table(section: Mapping[str, Any]) -> str:
    scene, phases = section["scene"], section["phases"]
    views = f"{scene['views']} views of {scene['width']} x {scene['height']}"
    size = f"{scene['frames']}: {scene['gaussians']} Gaussians, {views}"
    rows = [
        [
            name,
            None if row["bytes"] is None else row["bytes"] / 1e6,
            None if row["operations"] is None else row["operations"] / 1e9,
            None if row["floor_s"] is None else 1e6 * row["floor_s"],
            None if row["measured_s"] is None else 1e6 * row["measured_s"],
            row["measured_s"] / row["floor_s"] if row["measured_s"] and row["floor_s"] else None,
        ]
        for name, row in phases.items()
    ]
    floor, measured = (sum(row[key] or 0.0 for row in phases.values()) for key in ("floor_s", "measured_s"))
    rows.append(["on the device", None, None, 1e6 * floor, 1e6 * measured, measured / floor])
    rows.append(
        [
            "on the clock",
            None,
            None,
            1e6 * floor,
            1e6 * section["iteration_s"],
            section["iteration_s"] / floor,
        ]
    )
    return table([size, "MB", "G operations", "floor, us", "measured, us", "measured / floor"], rows)


def floors_note(section: Mapping[str, Any]) -> str:
    """What the floors are computed from."""
    can, pairs = section["attainable"], {name: n / 1e6 for name, n in section["pairs"].items()}
    return (
        f"{pairs['listed']:.3g} million pairs of Gaussian and tile ({CUDA.tile} x {CUDA.tile} px), "
        f"{pairs['consumed']:.3g} in front of where the tile saturates; {pairs['forward']:.3g} million pairs of "
        f"Gaussian and pixel to evaluate forward, {pairs['backward']:.3g} backward, {pairs['useful']:.3g} of them "
        f"useful. Attainable: {can['lane_operations'] / 1e12:.3g} T lane operations/s ({can['source']}; a matrix "
        f"product of float32: {can['matrix_product'] / 1e12:.3g}), copying {can['bytes'] / 1e12:.3g} TB/s."
    )
