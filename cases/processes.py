"""Programs of this project as processes: started anew, or forked from this one, which has imported what they need."""

from __future__ import annotations

import atexit
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, Protocol

from utils import timing

_ENDING = (signal.SIGINT, signal.SIGTERM)


class Process(Protocol):
    """A running program. stdout, stderr: descriptors of pipes, read here and closed by the reader."""

    pid: int
    stdout_pipe: int
    stderr_pipe: int

    def poll(self) -> int | None:
        """The exit status, negative if a signal ended it; None while it runs."""

    def wait(self) -> int: ...


Start = Callable[[Sequence[str], Mapping[str, str]], Process]
"""Starts a program, given its path and arguments, and variables to add to this process's environment."""


class Spawned(subprocess.Popen[bytes]):
    """A program in a Python of its own. It leads a session: a terminal's Ctrl-C reaches it once, through us."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        super().__init__(
            [sys.executable, *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
            start_new_session=True,
        )
        assert self.stdout is not None and self.stderr is not None
        self.stdout_pipe, self.stderr_pipe = os.dup(self.stdout.fileno()), os.dup(self.stderr.fileno())
        self.stdout.close()
        self.stderr.close()


class Forked:
    """A program in a fork of this process: it starts without importing torch again, which takes seconds.

    Only for a process of ours that has one thread, has computed nothing with torch and never asked for a GPU, which no
    fork could use.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        (self.stdout_pipe, out), (self.stderr_pipe, err) = os.pipe(), os.pipe()
        self.status: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        before = signal.pthread_sigmask(
            signal.SIG_BLOCK, _ENDING
        )  # none is lost to our own handlers in the fork
        with warnings.catch_warnings():  # of threads of numpy's BLAS, which know about forks
            warnings.simplefilter("ignore", DeprecationWarning)
            self.pid = os.fork()
        if self.pid == 0:
            os.close(self.stdout_pipe)
            os.close(self.stderr_pipe)
            _become(command, environment, out, err, before)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        os.close(out)
        os.close(err)

    def poll(self) -> int | None:
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if pid else None
        return self.status

    def wait(self) -> int:
        try:
            if self.status is None:
                self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        except ChildProcessError:  # a signal's handler has waited for it meanwhile
            if self.status is None:
                raise
        assert self.status is not None
        return self.status


def _become(
    command: Sequence[str],
    environment: Mapping[str, str],
    out: int,
    err: int,
    mask: set[int | signal.Signals],
) -> NoReturn:
    """Run a program in this process, just forked, as if it had been started anew; ends the process."""
    status = 1
    try:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        atexit._clear()  # what is registered is the parent's to do
        for source, target in ((os.open(os.devnull, os.O_RDONLY), 0), (out, 1), (err, 2)):
            os.dup2(source, target)
            os.close(source)
        sys.stdin = open(0, closefd=False)  # noqa: SIM115
        sys.stdout, sys.stderr = (open(k, "w", buffering=1, closefd=False) for k in (1, 2))  # noqa: SIM115
        os.environ.update(environment)
        sys.argv = list(command)
        timing.BEGUN = time.perf_counter()
        runpy.run_path(command[0], run_name="__main__")
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


class PassedOn:
    """Within it, SIGTERM and SIGINT go to a process, or to the group that it leads; a third one kills it."""

    def __init__(self, group: bool = False) -> None:
        self.process: Process | subprocess.Popen[bytes] | None = None
        self.group = group
        self.signal, self.count = 0, 0
        self.before: dict[int, Any] = {}

    def to(self, process: Process | subprocess.Popen[bytes]) -> None:
        self.process = process
        if self.signal:  # it came while the process was started
            self._send(self.signal)

    def __enter__(self) -> PassedOn:
        if threading.current_thread() is threading.main_thread():
            for number in _ENDING:
                self.before[number] = signal.signal(number, self._pass)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _pass(self, number: int, _: Any) -> None:
        self.signal, self.count = number, self.count + 1
        self._send(number if self.count < 3 else signal.SIGKILL)

    def _send(self, number: int) -> None:
        if self.process is not None and self.process.poll() is None:
            (os.killpg if self.group else os.kill)(self.process.pid, number)
