"""A GPU for each of several trainings side by side on one machine."""

from __future__ import annotations

import fcntl
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

_WAIT = 0.2  # seconds between two looks for a free place


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them; Slurm sets it within a job."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name for name in given.split(",") if name.strip() and name.strip() != "-1"]
    return list(_ask("index"))


def gpu_names() -> list[str]:
    """What is written on them: "NVIDIA H100 80GB HBM3"."""
    return [name for gpu in visible_gpus() for name in _ask("name", "-i", gpu)]


@cache
def _ask(what: str, *words: str) -> list[str]:
    """One line per GPU from nvidia-smi. Not torch: it would hold memory on a GPU that another process is to use, and no
    fork of this process could use one."""
    try:
        listed = subprocess.run(
            ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader", *words],
            capture_output=True,
            text=True,
            check=True,
        )
    except (FileNotFoundError, subprocess.CalledProcessError):
        return []
    return listed.stdout.splitlines()


@contextmanager
def one_gpu(side_by_side: int = 1, folder: Path | None = None) -> Iterator[str | None]:
    """Wait for a place on one of the visible GPUs, `side_by_side` of them on each, and hold it; None without a GPU.

    A place is a lock of the system's on a file, so that a process that dies leaves it. The emptiest GPU is taken first.
    """
    gpus = visible_gpus()
    if not gpus:
        yield None
        return
    # Jobs of Slurm have GPUs of their own, and each may call its first one 0.
    whose = "-".join(filter(None, (str(os.getuid()), os.environ.get("SLURM_JOB_ID"))))
    where = folder or Path(tempfile.gettempdir(), f"medgs-gpus-{whose}")
    where.mkdir(parents=True, exist_ok=True)
    while True:
        for place in range(side_by_side):
            for gpu in gpus:
                descriptor = os.open(
                    where / f"{gpu.replace('/', '_')}.{place}", os.O_RDWR | os.O_CREAT, 0o600
                )
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    os.close(descriptor)
                    continue
                try:
                    yield gpu
                finally:
                    os.close(descriptor)
                return
        time.sleep(_WAIT)
