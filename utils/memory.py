"""How much memory is free, and how much was taken."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

import torch


def free_memory(device: torch.device) -> int:
    """Free bytes on `device`; on the CPU, what the system can give without swapping."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # not Linux
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([free, *_left_to_the_container()])


def peak_memory(device: torch.device) -> int:
    """The most that this process has taken on the device so far, in bytes; on a GPU, what torch has asked it for."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most << 10  # other systems count in KiB


def _left_to_the_container() -> list[int]:
    """Bytes left to the control group (version 2) of this process, if there is a bound."""
    group = Path("/sys/fs/cgroup")
    try:
        most = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
    except (OSError, ValueError):
        return []
    return [max(int(most) - used, 0)] if most.isdecimal() else []
