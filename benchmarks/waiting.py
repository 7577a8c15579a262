#!/usr/bin/env python3
"""How OpenMP's threads wait, spinning (active) or not (passive): a short training run on a quiet and on a busy CPU.

    python -m benchmarks.waiting DATA_ROOT --out benchmarks/results/waiting.json

A busy CPU is one on which as many other processes compute as it has cores. The programs wait passively unless
OMP_WAIT_POLICY says otherwise (utils/threads.py). "Quiet" is only as quiet as the machine was: see the load.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import ROOT, describe, table
from utils.errors import ArgumentParser, positive, run
from utils.files import atomic_write
from utils.threads import processors

OUT = Path("output/benchmark/waiting.json")


def _compute() -> None:
    while True:
        pass


@contextmanager
def busy(others: int) -> Iterator[None]:
    """Within it, so many other processes compute."""
    running = [
        multiprocessing.get_context("spawn").Process(target=_compute, daemon=True) for _ in range(others)
    ]
    for process in running:
        process.start()
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.join()


def measure(data: Path, policy: str, iterations: int, others: int) -> dict[str, Any]:
    """One run of train.py on the images of a data root, beside ``others`` processes."""
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder, busy(others):
        command = [sys.executable, str(ROOT / "train.py"), "-s", str(data), "-m", folder, "--device", "cpu"]
        command += [
            "--preset",
            "quick",
            "--ibfr_target",
            "linear",
            "--iterations",
            str(iterations),
            "--quiet",
        ]
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run(command, env={**os.environ, "OMP_WAIT_POLICY": policy}, check=True)
        clock, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
        loop = json.loads(Path(folder, "time.json").read_text())["parts"]["iterations"]
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "policy": policy,
        "others": others,
        "iterations": iterations,
        "clock": clock,
        "loop": loop,
        "processors": spent,
        "load": load,
    }


def shown(rows: list[dict[str, Any]]) -> str:
    lines: list[list[object]] = [
        [
            "busy" if row["others"] else "quiet",
            row["policy"],
            f"{row['loop']:.1f}",
            f"{row['clock']:.1f}",
            f"{row['processors']:.1f}",
            f"{row['load']:.1f}",
        ]
        for row in rows
    ]
    return table(
        ["CPU", "OMP_WAIT_POLICY", "iterations, s", "whole process, s", "processor s", "load before"], lines
    )


def main() -> int:
    parser = ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path, metavar="DATA_ROOT", help="holds original/ with the frames")
    parser.add_argument("--iterations", type=positive, default=40, metavar="N", help="(default: 40)")
    parser.add_argument("--out", type=Path, default=OUT, help=f"results (default: {OUT})")
    given = parser.parse_args()
    rows = [
        measure(given.data, policy, given.iterations, others)
        for others in (0, processors())
        for policy in ("active", "passive")
    ]
    given.out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(given.out) as unfinished:
        about = describe(torch.device("cpu"))
        unfinished.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    print(shown(rows))
    return 0


if __name__ == "__main__":
    run(main)
