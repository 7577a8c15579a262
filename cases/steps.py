"""One step of a case: a program of this project, run as a process, and what `run.json` remembers of it."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from cases.processes import PassedOn, Spawned, Start
from utils.errors import UserError
from utils.files import atomic_write
from utils.version import VERSION

RECORD = "run.json"
STOPPED = (130, 143)
"""Exit statuses of a program that was asked to stop, by Ctrl-C or SIGTERM; others above 128 are failures."""
LOG = "log.txt"
PROGRAMS = Path(__file__).resolve().parents[1]
"""Where the programs lie: a checkout's root, or the installed package's folder."""
_LAST_WORDS = 4096  # bytes of stderr in which the one line of an error stands


@dataclass
class StepRecord:
    """What `run.json` keeps of a step."""

    key: str
    """Hash of the command and of all that went into it; another key means that the step has to run again."""
    command: list[str]
    status: int | None = None
    """Exit status; None while it runs, or where it never came to an end."""
    reason: str = ""
    """The one line with which it failed."""
    seconds: float = 0.0
    """Wall-clock time, of all attempts together."""
    attempts: int = 0
    finished: str = ""
    """Local time, ISO 8601."""


@dataclass
class Record:
    """The contents of `run.json`: inputs, options, versions, and every step. Written after each change."""

    path: Path
    case: str = ""
    inputs: dict[str, str] = field(default_factory=dict)
    """Path -> SHA-256 of the file, or of the names and bytes of all files in a folder; then of a header's voxels."""
    options: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    steps: dict[str, StepRecord] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path) -> Record:
        """The record of a case's folder, empty where there is none. Raises `UserError` where it is damaged."""
        path = folder / RECORD
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            steps = {name: StepRecord(**step) for name, step in stored.pop("steps").items()}
            return cls(path, steps=steps, **stored)
        except FileNotFoundError:
            return cls(path)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(
                f"{path} is damaged: move the case's folder away, and the case starts anew"
            ) from error

    def save(self) -> None:
        values = asdict(self)
        del values["path"]
        with atomic_write(self.path) as temporary:
            temporary.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")

    @property
    def failure(self) -> str:
        """The step that failed and its reason, or "" where none did."""
        for name, step in self.steps.items():
            if step.status not in (0, None):
                return f"{name}: {step.reason or f'exit status {step.status}'}"
        return ""


@dataclass(frozen=True)
class Step:
    """A program to run for a case.

    name: "prepare", "train", ... program: its file. arguments: its command line. outputs: files that are there when it
    is done. before: key of the step before, which this one depends on. folder: the case's.
    """

    name: str
    program: str
    arguments: Sequence[str]
    outputs: Sequence[Path]
    inputs: Mapping[str, str]
    before: str = ""
    folder: Path = Path()

    @property
    def key(self) -> str:
        """Not of what changes no result: where the folder and the inputs lie, how their paths are written, --quiet."""
        words = [word for word in self.arguments if word not in ("--quiet", "--debug")]
        words = [self.inputs.get(word, word).removeprefix(f"{self.folder}/") for word in words]
        parts = [self.program, *words, self.before]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]

    def is_current(self, record: Record) -> bool:
        """Whether it was run with the same command on the same inputs, and what it wrote is still there."""
        known = record.steps.get(self.name)
        return (
            known is not None
            and (known.key, known.status) == (self.key, 0)
            and all(path.exists() for path in self.outputs)
        )

    def run(
        self, record: Record, start: Start = Spawned, environment: Mapping[str, str] | None = None
    ) -> StepRecord:
        """Run the program, showing what it prints and keeping it in `log.txt`; returns what came of it.

        SIGTERM and Ctrl-C are passed on, and the program's own end is waited for: train.py saves a checkpoint. Where it
        came to a good end all the same, the signal is raised here, so that no further step starts.
        """
        known = record.steps.get(self.name)
        again = known is not None and known.key == self.key
        entry = StepRecord(self.key, [self.program, *self.arguments])
        if again and known is not None:
            entry.seconds, entry.attempts = known.seconds, known.attempts
        entry.attempts += 1
        record.steps[self.name] = entry
        record.save()
        started = time.monotonic()
        with PassedOn() as asked:
            entry.status, entry.reason = _process(
                self, record.path.with_name(LOG), start, environment or {}, asked
            )
        entry.seconds = round(entry.seconds + time.monotonic() - started, 2)
        entry.finished = datetime.now().astimezone().isoformat(timespec="milliseconds")
        record.save()
        if asked.signal and entry.status == 0:
            signal.raise_signal(asked.signal)
        return entry


def _process(
    step: Step, log: Path, start: Start, environment: Mapping[str, str], asked: PassedOn
) -> tuple[int, str]:
    """(exit status, the line of the error if there was one)."""
    command = [str(PROGRAMS / step.program), *step.arguments]
    with log.open("ab") as kept:
        kept.write(f"\n$ {shlex.join([sys.executable, *command])}\n".encode())
        kept.flush()
        process = start(command, environment)
        asked.to(process)
        last_words = bytearray()
        readers = [
            threading.Thread(target=_copy, args=(process.stdout_pipe, 1, kept.fileno(), None)),
            threading.Thread(target=_copy, args=(process.stderr_pipe, 2, kept.fileno(), last_words)),
        ]
        for reader in readers:
            reader.start()
        status = process.wait()
        for reader in readers:
            reader.join()
    if status < 0:  # killed by a signal
        status = 128 - status
    return status, "" if status == 0 else _reason(bytes(last_words), status)


def _copy(source: int, shown: int, kept: int, last_words: bytearray | None) -> None:
    """Everything from one descriptor to two others, as it comes; `last_words` keeps the end of it."""
    while data := os.read(source, 65536):
        for target in (shown, kept):
            try:
                os.write(target, data)
            except OSError:  # the reader of our own output went away: the log still has it
                continue
        if last_words is not None:
            last_words += data
            del last_words[:-_LAST_WORDS]
    os.close(source)


def _reason(last_words: bytes, status: int) -> str:
    lines = last_words.decode("utf-8", "replace").replace("\r", "\n").splitlines()
    said = [line.strip() for line in lines if line.strip()]
    for line in reversed(said):
        if ": error: " in line:
            return line.split(": error: ", 1)[1]
    if status == 128 + signal.SIGKILL:
        return "it was killed, for want of memory most likely"
    if status > 128:
        return f"stopped by signal {status - 128}"
    return said[-1] if said else f"exit status {status}"


# ---- what went in ----------------------------------------------------------------------------------------------------


def digest(path: Path) -> str:
    """SHA-256 of a file, or of a folder: the names and digests of all files in it."""
    total = hashlib.sha256()
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            if file.is_file():
                total.update(f"{file.relative_to(path)}\0{digest(file)}\n".encode())
        return total.hexdigest()
    try:
        with path.open("rb") as source:
            while block := source.read(1 << 20):
                total.update(block)
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except IsADirectoryError as error:
        raise UserError(f"{path} cannot be read") from error
    return total.hexdigest()


def versions() -> dict[str, str]:
    """What results may depend on, beside the GPU."""
    import torch

    return {"medgs": VERSION, "python": platform.python_version(), "torch": torch.__version__}
