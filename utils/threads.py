"""How many threads torch's operators use and how they wait; imported first, as OpenMP reads it when torch is loaded.

Threads that spin while they wait take the processor from those that others run: on a busy machine, training was 10 to
18 times slower. What the user set stands.
"""

from __future__ import annotations

import os
from pathlib import Path


def container_share() -> int | None:
    """How many processors a control group (version 2) leaves this process, at least 1; None where none bounds it."""
    try:  # microseconds of processor time, and in how many of the clock
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, round(int(quota) / int(period)))
    except (OSError, ValueError):  # no such system, or "max"
        return None


os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if (_share := container_share()) is not None and _share < (os.cpu_count() or 1):
    os.environ.setdefault("OMP_NUM_THREADS", str(_share))  # otherwise one thread for each of the host's
