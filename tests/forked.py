"""Runs of train.py as processes of their own, without a start of Python and torch for each of them.

As a script it is the process that they are forked from: it has imported all and computed nothing, so that no thread
is lost in a fork. It reads one JSON line {"arguments": [...], "log": ...} for each run to start, and answers with its
process id; an id alone waits for that run, and is answered with its exit status, negative for a signal.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Run:
    """One run. ``log``: what it printed, errors included."""

    server: Server
    pid: int
    log: Path

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)  # it stays a zombie until it is waited for: the number is still its own

    def wait(self) -> int:
        """The exit status, negative where a signal ended the run."""
        return self.server.ask(self.pid)


class Server:
    """Starts runs; a context manager that ends the process which they are forked from."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0
        path = os.pathsep.join([str(ROOT), *sys.path])
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)

    def ask(self, request: object) -> int:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())

    def start(self, arguments: list[str]) -> Run:
        """``python train.py ...``; ``arguments`` begin with the program's name."""
        self.count += 1
        log = self.folder / f"run{self.count}.log"
        return Run(self, self.ask({"arguments": arguments, "log": str(log)}), log)


def _child(arguments: list[str], log: str) -> None:
    from utils.errors import run

    file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
    for stream in (0, 1, 2):
        os.dup2(file if stream else os.open(os.devnull, os.O_RDONLY), stream)
    sys.argv = arguments
    run(train.main)


if __name__ == "__main__":
    import torch

    import diff_gaussian_rasterization  # noqa: F401 - so that no run has to
    import train

    torch.set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        if isinstance(request, int):
            answer = os.waitstatus_to_exitcode(os.waitpid(request, 0)[1])
        else:
            answer = os.fork()
            if answer == 0:
                _child(**request)
        print(answer, flush=True)
