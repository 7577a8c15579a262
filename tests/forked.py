"""Runs of a program in their own processes, without starting Python and torch for each of them.

As a script, followed by the program's module, it is the process that they are forked from: it has imported everything
and computed nothing, so that no thread is lost in a fork. It reads one JSON line {"arguments": [...], "log": ...,
"errors": ..., "die_at": ...} per run to start, and answers with its process id; an id alone waits for that run, and is
answered with its exit status (negative: a signal).
"""

from __future__ import annotations

import importlib
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Run:
    """One run. ``log``: what it printed, errors included unless they are kept apart, in ``errors``."""

    server: Server
    pid: int
    log: Path
    errors: Path | None = None

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)  # it stays a zombie until waited for: the process id is still its own

    def wait(self) -> int:
        """The exit status, negative if a signal ended the run."""
        return self.server.ask(self.pid)


class Server:
    """Starts runs of ``program``; a context manager that ends the process they are forked from."""

    def __init__(self, folder: Path, program: str = "train") -> None:
        self.folder, self.program, self.count = folder, program, 0
        path = os.pathsep.join([str(ROOT), *sys.path])
        self.process = subprocess.Popen(
            [sys.executable, __file__, program],
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

    def start(self, arguments: list[str], die_at: int = 0, apart: bool = False) -> Run:
        """``python train.py ...``; ``arguments`` begin with the program's name. The run kills itself at step
        ``die_at`` of its saving, if that is not 0: a checkpoint half written, a file flushed, a file renamed.
        ``apart``: errors go to a file of their own."""
        self.count += 1
        log = self.folder / f"run{self.count}.log"
        errors = log.with_suffix(".errors") if apart else log
        request = {"arguments": arguments, "log": str(log), "errors": str(errors), "die_at": die_at}
        return Run(self, self.ask(request), log, errors)


def _die_at(step: int) -> None:
    """SIGKILL at that step of saving, counted over all of the run."""
    import torch

    count = 0

    def counted(function: Callable[..., Any], instead: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any) -> Any:
            nonlocal count
            count += 1
            if count == step:
                instead(*arguments)
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments)

        return wrapped

    def half(state: Any, file: BinaryIO) -> None:
        whole = io.BytesIO()
        save(state, whole)
        file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
        file.flush()

    save = torch.save
    torch.save = counted(save, half)
    os.fsync = counted(os.fsync, lambda descriptor: None)
    os.replace = counted(os.replace, lambda source, target: None)


def _child(program: ModuleType, arguments: list[str], log: str, errors: str, die_at: int) -> None:
    from utils.errors import run

    if die_at:
        _die_at(die_at)

    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for path, stream in ((log, 1), (errors, 2)):
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644), stream)
    sys.argv = arguments
    try:
        run(program.main)
    except SystemExit as ended:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(ended.code if isinstance(ended.code, int) else 1)  # tearing down all modules takes a second


if __name__ == "__main__":
    # Everything that a run would import on its way, which can take seconds.
    for name in (
        "diff_gaussian_rasterization",
        "matplotlib.backends.backend_agg",
        "matplotlib.figure",
        "scipy.spatial",
        "simple_knn._C",
        "torch._dynamo",
        "torch.utils.tensorboard",
    ):
        importlib.import_module(name)
    import torch
    from PIL import Image

    module = importlib.import_module(sys.argv[1])
    Image.init()
    torch.set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        if isinstance(request, int):
            answer = os.waitstatus_to_exitcode(os.waitpid(request, 0)[1])
        else:
            answer = os.fork()
            if answer == 0:
                _child(module, **request)
        print(answer, flush=True)
