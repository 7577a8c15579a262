"""Whole training runs, through the loop of train.py itself: the time and memory of an iteration and its stages."""

from __future__ import annotations

import functools
import math
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.profiler import profile

from arguments import TrainOptions
from benchmarks.common import kernels_of, start_trace, synchronise, table
from benchmarks.scenes import CAMERA, GAUSSIANS, Bench, Unavailable, settle, write_phantom, write_resampled
from scene.cameras import Camera
from training.batches import Views
from training.iteration import IterationResult, forward_backward
from training.loop import train
from training.run import Training
from utils.stages import watched

NEVER = 10**6  # iterations
STAGES = {
    "fold": "fold",
    "blend": "blend",
    "loss": "loss",
    "backward": "backward",
    "statistics": "statistics and density",
    "density": "statistics and density",
    "optimizer": "optimiser",
}
"""Stages announced by the loop -> their names in tables."""


@contextmanager
def training_run(bench: Bench, data: Camera | Path, **options: Any) -> Iterator[MeasuredTraining]:
    """A run of train.py in a temporary folder: on synthetic frames of a camera, or on those of a data root."""
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(data, Camera):
            write_phantom(Path(folder, "data", "original"), data.width, data.height)
            data = Path(folder, "data")
        defaults: dict[str, Any] = {
            "source_path": str(data),
            "model_path": f"{folder}/model",
            "device": str(bench.device),
            "quiet": True,
            "test_iterations": (),
            "save_iterations": (),
        }
        options = {**defaults, **options}
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(options.get("deterministic", False))  # as main() of train.py does
        try:
            yield MeasuredTraining.start(TrainOptions(**options), lambda _: None)
        finally:
            torch.use_deterministic_algorithms(before)


class Stop:
    """Asks train.py to stop after a given iteration, so that its schedules remain those of a whole run."""

    def __init__(self, training: Training, after: int) -> None:
        self.training, self.after = training, after

    def __bool__(self) -> bool:
        return self.training.iteration >= self.after


class MeasuredTraining(Training):
    """A run that saves nothing, and whose iterations are ``plain``, not recorded, where stages are timed separately:
    a recording has none."""

    plain = False

    def stepper(self) -> Callable[[Views, int, bool], IterationResult]:
        return functools.partial(forward_backward, self.objective) if self.plain else super().stepper()

    def save_checkpoint(self) -> None:
        pass


class Stopwatch:
    """Times the training loop through the stages it announces (`utils.stages`).

    ``stages``: wait for the device around every stage, to time each; otherwise only iterations are timed.
    ``timed``: how many iterations count. ``traced``: how many follow under torch's profiler, on a GPU, whose kernels
    separate the phases of a replayed iteration. The last iteration is neither.
    """

    def __init__(self, device: torch.device, timed: int, traced: int = 0, stages: bool = False) -> None:
        self.device, self.timed, self.stages = device, timed, stages
        self.traced = traced if device.type == "cuda" else 0
        self.starts: list[float] = []  # of the iterations
        self.spent: list[dict[str, float]] = []  # seconds of each stage, one entry per iteration
        self.kernels: dict[str, float] = {}  # seconds per iteration, by the functions' names
        self.last = 0  # the number of the run's last iteration
        self._trace: profile | None = None

    def run(self, training: MeasuredTraining, before: int) -> None:
        """``before`` iterations that do not count, then those that do."""
        self.last = before + self.timed + self.traced + 1
        if self.traced:  # the first use of the profiler takes seconds
            trace = start_trace()
            torch.zeros(1, device=self.device).add_(1)
            kernels_of(trace, self.device)
        training.plain = self.stages
        with watched(self._watch):
            train(training, Stop(training, self.last))

    def _watch(self, name: str) -> AbstractContextManager[object]:
        if name == "rates":  # the first stage of an iteration
            self._begin()
        measured = STAGES.get(name)
        return self._stage(measured) if measured and self.stages and self.starts else nullcontext()

    def _begin(self) -> None:
        begun = len(self.starts)
        over = self.last - self.traced - 1  # iterations, at the end of those that count
        if self.stages or begun in (over - self.timed, over):
            synchronise(self.device)
        self.starts.append(time.perf_counter())
        self.spent.append(defaultdict(float))
        if self.traced and begun == over:
            self._trace = start_trace()
        if self._trace is not None and begun == self.last - 1:
            kernels = kernels_of(self._trace, self.device)
            self.kernels = {name: s / self.traced for name, s in kernels.items()}
            self._trace = None

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        synchronise(self.device)
        start = time.perf_counter()
        try:
            yield
        finally:
            synchronise(self.device)
            self.spent[-1][name] += time.perf_counter() - start

    @property
    def _window(self) -> slice:
        """The iterations that count, as indices into ``spent``."""
        end = len(self.starts) - 1 - self.traced
        return slice(end - self.timed, end)

    @property
    def seconds(self) -> float:
        """Mean seconds per iteration."""
        window = self._window
        return (self.starts[window.stop] - self.starts[window.start]) / self.timed

    def medians(self) -> dict[str, float]:
        """Mean seconds of each stage, and of the remainder as "rest"."""
        window = self._window
        starts = self.starts[window.start : window.stop + 1]
        totals = [b - a for a, b in pairwise(starts)]
        spent = self.spent[window]
        names = dict.fromkeys(name for entry in spent for name in entry)
        out = {name: statistics.median(entry[name] for entry in spent) for name in names}
        rests = [total - sum(entry.values()) for total, entry in zip(totals, spent, strict=True)]
        return out | {"rest": statistics.median(rests)}

    def phases(self) -> dict[str, float]:
        """Seconds per iteration that the device spends in each phase; empty if nothing was traced."""
        return by_phase(self.kernels)


PHASES: dict[str, tuple[str, ...]] = {
    "fold": ("fold_kernel",),
    "binning": (
        "count_pairs",
        "DeviceScan",
        "emit_pairs",
        "DeviceRadixSort",
        "find_tiles",
        "find_gaussians",
        "list_segments",
    ),
    "blend": ("blend_segments_kernel", "join_segments_kernel", "stop_pixels_kernel"),
    "loss": ("compare", "differentiate"),
    "blend backward": ("blend_backward_kernel",),
    "records": ("sum_records_kernel",),
    "fold backward": ("fold_backward_kernel",),
    "statistics": ("observe_kernel", "sigma_sums", "sigma_gradient"),
    "Adam": ("adam_kernel",),
}
"""Names of our kernels, and of the CUB kernels that binning calls, by phase."""
OTHER = "PyTorch's kernels and copies"


def by_phase(kernels: Mapping[str, float]) -> dict[str, float]:
    """Seconds of the kernels by name, summed per phase."""
    out: dict[str, float] = {}
    for name, seconds in kernels.items():
        phase = next((phase for phase, names in PHASES.items() if name.startswith(names)), OTHER)
        out[phase] = out.get(phase, 0.0) + seconds
    return {phase: out[phase] for phase in [*PHASES, OTHER] if phase in out}


# ---- sections --------------------------------------------------------------------------------------------------------


def iteration(bench: Bench) -> dict[str, Any]:
    """An iteration of train.py (img): its stages, after enough iterations for the model to have taken shape."""
    before, timed = (5, 5) if bench.quick else (600, 99)
    points = 2000 if bench.quick else GAUSSIANS
    result: dict[str, Any] = {}
    for name, ibfr_from in (("img", NEVER), ("img with IBFR", 0)):
        options = {"num_pts": points, "ibfr_from_iter": ibfr_from}
        seconds = []
        for stages in (False, True):
            watch = Stopwatch(bench.device, timed, stages=stages)
            with training_run(bench, CAMERA, **options) as run_of_it:
                watch.run(run_of_it, before)
            seconds.append(watch.seconds)
        medians = watch.medians()
        total = sum(medians.values())
        gaussians = len(run_of_it.model)
        rows = [[stage, 1e3 * s, 100 * s / total] for stage, s in medians.items()]
        print(table([f"{name}, {gaussians} Gaussians", "ms", "%"], rows))
        print(
            f"together {1e3 * total:.3g} ms, waiting for the device between stages; without, {1e3 * seconds[0]:.3g} ms "
            f"per iteration: {1 / seconds[0]:.3g} it/s\n"
        )
        result[name] = {
            "gaussians": gaussians,
            "stages_s": medians,
            "iteration_s": seconds[0],
            "iterations_per_s": 1 / seconds[0],
        }
        settle(bench.device)
    return result


def measured_run(
    bench: Bench, data: Camera | Path, before: int, timed: int, traced: int = 0, **options: Any
) -> dict[str, Any]:
    """One run: sizes, iterations per second, phases on the device, peak memory."""
    settle(bench.device)
    watch = Stopwatch(bench.device, timed, traced)
    with training_run(bench, data, **options) as run_of_it:
        watch.run(run_of_it, before)
        camera = run_of_it.camera
        out = {
            "gaussians": len(run_of_it.model),
            "width": camera.width,
            "height": camera.height,
            "frames": len(run_of_it.tasks[0].frames),
            "options": options,
            "iteration_s": watch.seconds,
            "iterations_per_s": 1 / watch.seconds,
            "phases_s": watch.phases(),
            **peak_memory(bench.device),
        }
    return out


def peak_memory(device: torch.device) -> dict[str, float]:
    """Peak GB of torch's tensors, of what torch reserved for them, and of the whole process (counted by the driver,
    with nothing else on the device). Empty on a CPU."""
    if device.type != "cuda":
        return {}
    reserved = torch.cuda.max_memory_reserved(device)
    return {
        "allocated_GB": torch.cuda.max_memory_allocated(device) / 1e9,
        "reserved_GB": reserved / 1e9,
        "process_GB": (outside_torch(device) + reserved) / 1e9,
    }


def outside_torch(device: torch.device) -> int:
    """Bytes that the process takes on the device besides what torch keeps for tensors: the context and the kernels."""
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device)


def runs(bench: Bench) -> dict[str, Any]:
    """Whole runs of train.py (img) at sizes of the demo and of published runs: time, phases, memory, determinism."""
    if bench.device.type != "cuda":
        raise Unavailable("it needs a CUDA device (iteration has the stages of a run on this one)")
    sizes = [(GAUSSIANS, CAMERA), (100_000, Camera(197, 233)), (430_000, Camera(197, 233))]
    # Every kind of batch is recorded by then: the first one at an end of the sequence causes all to be recorded again.
    before, timed = (50, 20) if bench.quick else (300, 1000)
    kinds = [
        (gaussians, camera, {"ibfr_from_iter": ibfr_from})
        for gaussians, camera in (sizes[:1] if bench.quick else sizes)
        for ibfr_from in (NEVER, 0)
    ]
    kinds.append((*kinds[-1][:2], {"ibfr_from_iter": 0, "deterministic": True}))
    result = [
        # Without density steps the number of Gaussians is constant.
        measured_run(bench, camera, before, timed, 50, num_pts=gaussians, densify_from_iter=NEVER, **options)
        for gaussians, camera, options in kinds
    ]
    print(runs_table(result))
    price = result[-1]["iteration_s"] / result[-2]["iteration_s"]
    print(f"\n--deterministic takes {price:.3g} times as long\n")
    print(phases_table(result))
    return {"runs": result, "price_of_deterministic": price}


def runs_table(result: list[dict[str, Any]]) -> str:
    headers = [
        "Gaussians",
        "frame",
        "IBFR",
        "--deterministic",
        "it/s",
        "allocated, GB",
        "reserved",
        "process",
    ]
    rows = [
        [
            run["gaussians"],
            f"{run['width']} x {run['height']}",
            "yes" if run["options"]["ibfr_from_iter"] == 0 else "no",
            "yes" if run["options"].get("deterministic") else "no",
            run["iterations_per_s"],
            *(run[f"{name}_GB"] for name in ("allocated", "reserved", "process")),
        ]
        for run in result
    ]
    return table(headers, rows)


def phases_table(result: list[dict[str, Any]]) -> str:
    """Shares of the device's time, one column per run."""
    names = dict.fromkeys(name for run in result for name in run["phases_s"])
    if not names:
        return "The profiler saw no kernels."
    labels = [
        f"{run['gaussians']}{', IBFR' if run['options']['ibfr_from_iter'] == 0 else ''}" for run in result
    ]
    labels = [
        label + (", det." if run["options"].get("deterministic") else "")
        for label, run in zip(labels, result, strict=True)
    ]
    rows: list[list[object]] = [
        [
            f"{name}, %",
            *(100 * run["phases_s"].get(name, 0.0) / sum(run["phases_s"].values()) for run in result),
        ]
        for name in names
    ]
    rows.append(["device busy, % of the time", *(busy(run) for run in result)])
    return table(["phase", *labels], rows)


def busy(run: Mapping[str, Any]) -> float:
    """Percentage of an iteration during which kernels run. Its time is that without the profiler."""
    return 100 * sum(run["phases_s"].values()) / run["iteration_s"]


def large(bench: Bench) -> dict[str, Any]:
    """Large frames and many Gaussians, under a hard limit of 16 GB on a GPU: does it train, and how does time grow?"""
    on_gpu = bench.device.type == "cuda"
    sizes = [(128, 100_000), (256, 400_000), (512, 1_500_000)]
    frames, before, timed = 400, 250, 100
    if not on_gpu:  # an eighth of the width, a sixty-fourth of everything else
        sizes, frames, before, timed = [(side // 8, n // 64) for side, n in sizes], 16, 20, 40
    if bench.quick:
        sizes, frames, before, timed = [(16, 100), (32, 400)], 4, 2, 3
    limit_GB = 16
    result: dict[str, Any] = {"resampled": bench.frames, "limit_GB": limit_GB if on_gpu else None, "runs": []}
    with ExitStack() as limits:
        if on_gpu:
            total = torch.cuda.get_device_properties(bench.device).total_memory
            share = (limit_GB * 1e9 - outside_torch(bench.device)) / total
            torch.cuda.set_per_process_memory_fraction(min(share, 1.0), bench.device)
            limits.callback(torch.cuda.set_per_process_memory_fraction, 1.0, bench.device)
        for side, gaussians in sizes:
            kept_on = ["auto"] if (side, gaussians) != sizes[-1] or not on_gpu else ["auto", "cpu"]
            with tempfile.TemporaryDirectory() as folder:
                write_resampled(Path(folder, "original"), side, frames, bench.case)
                for data_device in kept_on:
                    options = {
                        "num_pts": gaussians,
                        "max_gaussians": gaussians,
                        "densify_from_iter": 0,  # density steps prune, and grow up to the bound
                        "ibfr_from_iter": 0,
                        "data_device": data_device,
                    }
                    result["runs"].append(measured_run(bench, Path(folder), before, timed, **options))
    print(large_table(result))
    here = [run for run in result["runs"] if run["options"]["data_device"] == "auto"]
    work = [run["width"] * run["height"] + run["gaussians"] for run in here]
    result["growth"] = [
        {
            "work": b / a,
            "time": last["iteration_s"] / first["iteration_s"],
            "exponent": math.log(last["iteration_s"] / first["iteration_s"]) / math.log(b / a),
        }
        for (a, first), (b, last) in [
            *zip(zip(work, here, strict=True), zip(work[1:], here[1:], strict=True), strict=False),
            ((work[0], here[0]), (work[-1], here[-1])),
        ]
    ]
    print("\n" + growth_line(result))
    return result


def large_table(section: Mapping[str, Any]) -> str:
    on_gpu = section["limit_GB"] is not None
    headers = [f"{section['resampled']}, resampled", "kept on", "Gaussians", "ms per iteration"]
    headers += ["allocated, GB", "reserved", f"process (limit {section['limit_GB']})"] if on_gpu else []
    rows = [
        [
            f"{run['frames']} of {run['width']} x {run['height']}",
            "the device" if run["options"]["data_device"] == "auto" else run["options"]["data_device"],
            run["gaussians"],
            1e3 * run["iteration_s"],
            *(run[f"{name}_GB"] for name in ("allocated", "reserved", "process") if on_gpu),
        ]
        for run in section["runs"]
    ]
    return table(headers, rows)


def growth_line(section: Mapping[str, Any]) -> str:
    whole = section["growth"][-1]
    return (
        f"From the smallest to the largest, pixels and Gaussians grow {whole['work']:.3g} times, iteration time "
        f"{whole['time']:.3g} times: exponent {whole['exponent']:.2f}"
    )
