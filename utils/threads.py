"""What torch reads when it is loaded, so this is imported first: how many threads its operators use, how they wait, and
how a GPU's memory is allotted.

Threads that spin while waiting take the processor from other programs' threads: on a busy machine, training was 10 to
18 times slower. Settings made by the user are kept.
"""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path


def container_share() -> int | None:
    """How many processors a control group (version 2) leaves this process, at least 1; None where none bounds it."""
    try:  # microseconds of processor time, and the period in microseconds
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, round(int(quota) / int(period)))
    except (OSError, ValueError):  # no such system, or "max"
        return None


def slurm_share() -> int | None:
    """The processors that a Slurm job has per task (`--cpus-per-task`); None outside a job, or where it is not set."""
    given = os.environ.get("SLURM_CPUS_PER_TASK", "")
    return int(given) if given.isdecimal() and int(given) else None


def processors() -> int:
    """How many processors this process is to keep busy."""
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(there, *(share for share in (slurm_share(), container_share()) if share), there)


def spare_processors() -> int:
    """The same for threads of our own; 1 in one of several worker processes, which share the processors."""
    return processors() if multiprocessing.parent_process() is None else 1


os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if "PYTORCH_ALLOC_CONF" not in os.environ:  # the newer name of the same variable
    # Memory grows in place: without gaps that no tensor fits into, as the number of Gaussians changes.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
if (_asked := slurm_share()) is not None:
    os.environ.setdefault("OMP_NUM_THREADS", str(_asked))
if (_share := container_share()) is not None and _share < (os.cpu_count() or 1):
    os.environ.setdefault("OMP_NUM_THREADS", str(_share))  # otherwise one thread per processor of the host
