"""What the benchmarks share: timing, a description of the machine, tables, files."""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


# ---- timing ----------------------------------------------------------------------------------------------------------


def synchronise(device: torch.device) -> None:
    """Waits until all work queued on ``device`` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(
    device: torch.device, functions: Mapping[str, Callable[[], object]], repeats: int, warmup: int = 2
) -> dict[str, float]:
    """Median seconds of one call of each function, over ``repeats`` calls.

    The functions take turns, so that whatever else the machine does affects all of them alike: their ratios are more
    reliable than their times.
    """
    spent: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(warmup + repeats):
        for name, function in functions.items():
            synchronise(device)
            start = time.perf_counter()
            function()
            synchronise(device)
            if turn >= warmup:
                spent[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in spent.items()}


def start_trace() -> profile:
    """Starts tracing CUDA devices, until `kernels_of`."""
    trace = profile(activities=[ProfilerActivity.CUDA])
    with warnings.catch_warnings():  # that it forgets an earlier trace: there is none
        warnings.filterwarnings("ignore", message=".*Profiler clears events")
        trace.start()
    return trace


def kernels_of(trace: profile, device: torch.device) -> dict[str, float]:
    """Ends a trace. Seconds on the device in each kernel, copy and fill, by the functions' names."""
    synchronise(device)
    trace.stop()
    out: dict[str, float] = {}
    for event in trace.events() or []:
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation:
            name = function_name(event.name)
            out[name] = out.get(name, 0.0) + 1e-6 * event.time_range.elapsed_us()
    return out


def function_name(kernel: str) -> str:
    """``void ns::(anonymous namespace)::name<float, 7>(Arguments)`` -> ``name``."""
    plain = kernel.removeprefix("void ")
    for unnamed in ("(anonymous namespace)", "<unnamed>"):
        plain = plain.replace(unnamed, "")
    return re.split(r"[<(]", plain, maxsplit=1)[0].split("::")[-1].strip()


def kernel_seconds(
    device: torch.device, function: Callable[[], object], repeats: int, warmup: int = 2
) -> dict[str, float]:
    """Mean seconds on the device of one call's kernels, copies and fills, by name. Empty on a CPU, and where torch's
    profiler sees none."""
    if device.type != "cuda":
        return {}
    for _ in range(warmup):
        function()
    synchronise(device)
    trace = start_trace()
    for _ in range(repeats):
        function()
    return {name: s / repeats for name, s in kernels_of(trace, device).items()}


def measure_on_device(
    device: torch.device, functions: Mapping[str, Callable[[], object]], repeats: int, warmup: int = 2
) -> dict[str, float]:
    """Mean seconds for which one call of each function keeps the device busy: the sum of its kernels, without the
    gaps in which the device waits for Python to launch the next. Empty where `kernel_seconds` is."""
    out = {
        name: sum(kernel_seconds(device, function, repeats, warmup).values())
        for name, function in functions.items()
    }
    return out if all(out.values()) else {}


# ---- the machine -----------------------------------------------------------------------------------------------------


def describe(device: torch.device) -> dict[str, Any]:
    """Machine, device and versions, for the head of a result; None for what is unknown."""
    commit = output("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD")
    changed = output("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")
    about: dict[str, Any] = {
        "commit": commit and commit + ("+changes" if changed else ""),
        "date": time.strftime("%Y-%m-%d"),
        "machine": _processor(),
        "cores": available_cores(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": "cpu",
        "driver": None,
    }
    if device.type == "cuda":
        query = "--query-gpu=driver_version", "--format=csv,noheader"
        driver = output("nvidia-smi", *query)
        about |= {
            "device": torch.cuda.get_device_name(device),
            "device_memory_GB": torch.cuda.get_device_properties(device).total_memory / 1e9,
            "cuda": torch.version.cuda,
            "driver": driver and driver.splitlines()[0],
        }
    return about


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def output(*command: str) -> str | None:
    """What a command prints; None if there is no such command, or it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


# ---- results ---------------------------------------------------------------------------------------------------------


def table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """An aligned Markdown table: numbers right-aligned, with three digits. None is a dash."""
    cells = [list(headers), *([shown(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    left = [all(isinstance(row[i], str) for row in rows) for i in range(len(headers))]

    def line(values: Sequence[str]) -> str:
        padded = (
            v.ljust(w) if to_left else v.rjust(w) for v, w, to_left in zip(values, widths, left, strict=True)
        )
        return f"| {' | '.join(padded)} |"

    rule = (
        "-" * (w + 2) if to_left else "-" * (w + 1) + ":" for w, to_left in zip(widths, left, strict=True)
    )
    return "\n".join([line(cells[0]), f"|{'|'.join(rule)}|", *map(line, cells[1:])])


def shown(value: object) -> str:
    """A cell: three significant digits, and no exponent where it can be avoided."""
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def times_headers(times: Mapping[str, Any]) -> list[str]:
    """Column headings of `times_rows`, except for the name."""
    return ["ms on the clock", "ratio", *(["ms on the device", "ratio"] if "device_seconds" in times else [])]


def times_rows(times: Mapping[str, Any], ours: str) -> list[list[Any]]:
    """One row per entry of `Bench.times`: its name, milliseconds, and how many times longer it takes than ``ours``."""
    kinds = [times[kind] for kind in ("seconds", "device_seconds") if kind in times]
    return [
        [name, *(value for s in kinds for value in (1e3 * s[name], s[name] / s[ours]))] for name in kinds[0]
    ]


def ratios(times: Mapping[str, Any], theirs: Sequence[str], ours: str) -> dict[str, float]:
    """The least time of ``theirs`` over that of ``ours``: on the clock, "ratio", and on the device, "device_ratio"."""
    return {
        name: min(times[kind][other] for other in theirs) / times[kind][ours]
        for name, kind in (("ratio", "seconds"), ("device_ratio", "device_seconds"))
        if kind in times
    }


def surface_table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Distances in mm measured by meshes.py, one row per method, for each smoothing."""
    headers = ["case", "kept", "interp", "mesh of", "smoothing", "ASD, mm", "HD95, mm", "HD, mm"]
    rows = [
        [line["case"], f"1/{line['keep']}", line["interp"], _mesh_of(row, line), row["smoothing"]]
        + [f"{row[name]:.3f}" for name in ("asd", "hd95", "hd")]
        for line in lines
        for row in line["surfaces"]
    ]
    distinct = [
        row for i, row in enumerate(rows) if row not in rows[:i]
    ]  # models of one case share the others
    return table(headers, distinct)


def _mesh_of(row: Mapping[str, Any], line: Mapping[str, Any]) -> str:
    return f"model: {line['model']}" if row["method"] == "model" else str(row["method"])


def write_json(path: Path, result: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def run_program(name: str, *arguments: str) -> float:
    """Runs one of the project's programs as a user does; returns its seconds. Raises `UserError` with its output."""
    start = time.perf_counter()
    command = [sys.executable, str(ROOT / name), *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise UserError(f"{name} ended with status {done.returncode}: {done.stdout[-2000:].strip()}")
    return time.perf_counter() - start
