#!/usr/bin/env python3
"""Measures the speed of the rasteriser and of training on this machine.

docs/explanation/benchmarks.md explains the numbers.

python -m benchmarks.run --device cuda --out output/benchmark/speed.json
"""

from __future__ import annotations

import math
import os
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from arguments import resolve_device
from benchmarks.against_gsplat import against_gsplat
from benchmarks.common import available_cores, describe, write_json
from benchmarks.floors import floors_on_cuda
from benchmarks.iterations import iteration, large, runs
from benchmarks.operators import growth, operators, oracle
from benchmarks.scenes import Bench, Unavailable, settle
from benchmarks.throughput import throughput
from utils.errors import ArgumentParser, UserError, run

SECTIONS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "throughput": throughput,
    "oracle": oracle,
    "iteration": iteration,
    "operators": operators,
    "gsplat": against_gsplat,
    "growth": growth,
    "floors": floors_on_cuda,
    "training": runs,
    "large": large,
}


def plot(path: Path, result: Mapping[str, Any]) -> None:
    """The growth curves, and the phases as bars, with their floors if any; what was not measured is left out."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, StrMethodFormatter

    sections = result["sections"]
    curves: dict[str, tuple[Sequence[float], dict[str, Sequence[float]]]] = {
        name: (curve["sizes"], clock_and_device(curve)) for name, curve in sections.get("growth", {}).items()
    }
    if sizes := [
        run for run in sections.get("large", {}).get("runs", []) if run["options"]["data_device"] == "auto"
    ]:
        curves["pixels + Gaussians"] = (
            [run["width"] * run["height"] + run["gaussians"] for run in sizes],
            {"on the clock": [run["iteration_s"] for run in sizes]},
        )
    bars = _bars(sections)
    panels = len(bars) + len(curves)
    if not panels:
        return
    columns = min(4, panels)
    figure = Figure(figsize=(4.6 * columns, 3.2 * -(-panels // columns)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = iter(figure.subplots(-(-panels // columns), columns, squeeze=False).flat)
    for name, (xs, kinds) in curves.items():
        ax = next(axes)
        for kind, seconds in kinds.items():
            ax.plot(xs, [1e3 * s for s in seconds], marker="o", label=kind)
        ms = [1e3 * s for seconds in kinds.values() for s in seconds]
        if len(kinds) > 1:
            ax.legend()
        training = name == "pixels + Gaussians"
        ax.set(xlabel=name, ylabel=f"ms, {'per training iteration' if training else 'forward and backward'}")
        if name == "P":  # begins at 0
            ax.set_ylim(0, 1.1 * max(ms))
        else:
            ax.set(xscale="log", yscale="log")
            # Whole decades: each axis has a readable number, and noise does not fill the panel.
            ax.set_ylim(10 ** math.floor(math.log10(min(ms))), 10 ** math.ceil(math.log10(max(ms))))
            ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            for axis in (ax.xaxis, ax.yaxis):
                axis.set_minor_formatter(NullFormatter())
        ax.grid(alpha=0.3)
    for name, series in bars.items():
        ax = next(axes)
        for i, (label, phases) in enumerate(series.items()):
            places = [place + 0.4 * i for place in range(len(phases))]
            ax.barh(places, [1e3 * s for s in phases.values()], 0.8 / len(series), label=label)
        ax.set_yticks([place + 0.2 * (len(series) - 1) for place in range(len(phases))], list(phases))
        ax.invert_yaxis()
        ax.set_title(name, fontsize=9, wrap=True)
        ax.set_xlabel("ms")
        if len(series) > 1:
            ax.legend()
    for ax in axes:
        ax.remove()
    about = result["about"]
    device = about["machine"] if about["device"] == "cpu" else about["device"]
    figure.suptitle(f"{device}, torch {about['torch']}, commit {about['commit']}")
    figure.savefig(path, dpi=120)


def _bars(sections: Mapping[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    """Panels of bars, by title: seconds of each phase."""
    out: dict[str, dict[str, dict[str, float]]] = {}
    for row in sections.get("throughput", {}).get("runs", []):
        name = f"rasteriser, {row['threads']} thread(s)" if row["threads"] else "rasteriser"
        out[name] = {"measured": row["phases_s"]}
    for name, entry in sections.get("iteration", {}).items():
        out[f"iteration, {name}, eager"] = {"measured": entry["stages_s"]}
    if phases := sections.get("floors", {}).get("phases"):
        out["iteration, replayed"] = {
            label: {name: row[key] or 0.0 for name, row in phases.items()}
            for label, key in (("measured", "measured_s"), ("floor", "floor_s"))
        }
    for scene in sections.get("gsplat", {}).get("scenes", []):
        for kind, seconds in clock_and_device(scene).items():
            name = scene["scene"].replace(", ", ",\n")
            out[f"{name}, {kind}"] = {"measured": seconds}
    return out


def clock_and_device(times: Mapping[str, Any]) -> dict[str, Any]:
    """The times that `Bench.times` returned, on the clock and on the device."""
    names = {"on the clock": "seconds", "on the device": "device_seconds"}
    return {kind: times[key] for kind, key in names.items() if key in times}


def main() -> int:
    parser = ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="auto", help="auto, cuda, cuda:N or cpu (default: auto)")
    parser.add_argument(
        "--out", default="output/benchmark/speed.json", help="the result; the plot is written beside it"
    )
    parser.add_argument("--checkpoint", help="draw this trained model, not a synthetic one (chkpnt<n>.pth)")
    parser.add_argument(
        "--case", help="floors and large: train on this data root, as train.py -s, not on synthetic frames"
    )
    parser.add_argument(
        "--quick", action="store_true", help="check that everything runs: tiny sizes, two repeats"
    )
    parser.add_argument(
        "--only", choices=SECTIONS, action="append", help="only this section; may be repeated"
    )
    arguments = parser.parse_args()
    out = Path(arguments.out)
    if out.suffix != ".json":
        raise UserError(f"--out {out}: give a file name that ends in .json")
    os.environ.setdefault(
        "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
    )  # --deterministic asks for it, before any CUDA
    device = resolve_device(arguments.device)
    if device.type == "cuda" and device.index is None:  # some of torch's functions need the index
        device = torch.device("cuda", torch.cuda.current_device())
    torch.set_num_threads(available_cores())
    bench = Bench(device, arguments.quick, arguments.checkpoint, arguments.case)
    result: dict[str, Any] = {"about": describe(device) | {"quick": bench.quick}, "sections": {}}
    print(", ".join(f"{name} {value}" for name, value in result["about"].items() if value is not None))
    failed: list[str] = []
    for name in arguments.only or SECTIONS:
        section = SECTIONS[name]
        print(f"\n## {name}\n{(section.__doc__ or '').splitlines()[0]}\n", flush=True)
        settle(device)
        start = time.perf_counter()
        try:
            measured = section(bench)
        except Unavailable as reason:
            print(f"skipped: {reason}")
            measured = {"skipped": str(reason)}
        except UserError:
            raise
        except Exception as error:  # what the others measure is kept
            traceback.print_exc()
            measured = {"skipped": f"it failed: {type(error).__name__}: {error}"}
            failed.append(name)
        result["sections"][name] = measured
        print(f"({name}: {time.perf_counter() - start:.0f} s)", flush=True)
        write_json(out, result)  # what is measured is kept, whatever happens next
    plot(out.with_suffix(".png"), result)
    print(f"\n{out}, {out.with_suffix('.png')}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    run(main)
