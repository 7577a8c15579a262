"""How a script ends: 0 done, 1 partly done or a system error, 2 something for the user to fix (wrong input, a full
disk), 130 interrupted, 143 terminated (SIGTERM)."""

from __future__ import annotations

import argparse
import difflib
import errno
import io
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from utils.version import VERSION

_DISK_FULL = {errno.ENOSPC, errno.EDQUOT}


class UserError(Exception):
    """An error that the user can fix. Its message is one line: what is wrong, where, and what to do about it."""

    def __init__(self, message: str) -> None:
        super().__init__(
            " ".join(line.strip() for line in message.splitlines())
        )  # messages from libraries may have several lines


class ArgumentParser(argparse.ArgumentParser):
    """argparse whose usage errors are `UserError`s: one line and exit status 2, like every other mistake.

    Abbreviated options are off, because a new option would change what an old command line means.
    """

    def __init__(self, *args: object, **kwargs: object) -> None:
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self.add_argument(
            "--version", action="version", version=f"MedGS {VERSION}", help="print the version and exit"
        )

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self._words = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}{self._meant()} (--help lists the options)")

    def _meant(self) -> str:
        """A hint for unknown options, by the closest known ones: ": did you mean --output?"."""
        known = _options(self)
        found = {}
        for word in getattr(self, "_words", []):
            option = word.split("=")[0]
            if not re.fullmatch(r"--[A-Za-z]\S*", option) or option in known:
                continue
            plain = option.replace("-", "_").replace("__", "--", 1)
            near = [name for name in known if name == plain] or [
                name for name in known if name.startswith(plain) or plain.startswith(name + "_")
            ]
            near = near or difflib.get_close_matches(plain, known, n=1, cutoff=0.7)
            if near:
                found[option] = near[0]
        if not found:
            return ""
        if len(found) == 1:
            return f": did you mean {next(iter(found.values()))}?"
        return ": did you mean " + ", ".join(f"{name} for {word}" for word, name in found.items()) + "?"

    def add_shared(self, max_pixels: int) -> None:
        """The options common to all programs that read images; max_pixels: their default limit."""
        self.add_argument(
            "--max_pixels",
            type=positive,
            default=max_pixels,
            metavar="N",
            help="refuse image files of more pixels (default: %(default)s)",
        )
        self.add_argument("--quiet", action="store_true", help="print errors only")
        self.add_argument("--debug", action="store_true", help="print the traceback of an error too")


def _options(parser: argparse.ArgumentParser) -> list[str]:
    """The long options of a parser and of its subcommands."""
    names: dict[str, None] = {}
    for action in parser._actions:
        names |= dict.fromkeys(name for name in action.option_strings if name.startswith("--"))
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                names |= dict.fromkeys(_options(child))
    return list(names)


def positive(text: str) -> int:
    """The type of an option that counts something."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return int(text)


class StopRequest:
    """Within it, SIGTERM and the first Ctrl-C set a flag that the body checks; the second stops it at once.

    with StopRequest() as stop:
        while not stop:
            ...
    return stop.status
    """

    def __init__(self) -> None:
        self.signal = 0
        self._before: dict[int, Any] = {}

    def __bool__(self) -> bool:
        return self.signal != 0

    @property
    def status(self) -> int:
        """Exit status of a process that was asked to stop: 130 after Ctrl-C, 143 after SIGTERM; 0 if it was not."""
        return 128 + self.signal if self.signal else 0

    def __enter__(self) -> StopRequest:
        self._before = {
            number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _: FrameType | None) -> None:
        if self.signal:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            sys.exit(128 + number)
        self.signal = number
        # Not print: the signal may arrive in the middle of another print.
        os.write(2, b"\nstopping: finishing the iteration, then saving (again to stop at once)\n")


def run(
    main: Callable[[], int | None], if_out_of_memory: str = "take smaller images or fewer at once"
) -> NoReturn:
    """Call `main` and exit the process with its status (None means 0). `if_out_of_memory`: advice for that case.

    What a user can cause ends in one line on stderr, `<script>: error: ...`; `--debug` on the command line adds
    the traceback. Anything else is a bug of ours and keeps its traceback.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(
            errors="backslashreplace"
        )  # a path that is not valid text must not crash a message
    try:
        status = main() or 0
        sys.stdout.flush()  # so that a closed pipe or a full disk fails here, not in the interpreter's shutdown
    except UserError as error:
        status = _fail(str(error), 2)
    except BrokenPipeError:  # `prepare.py ... | head`: the reader has all it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except OSError as error:
        if error.errno is None:
            raise
        if error.errno in _DISK_FULL:
            where = f" for {error.filename}" if error.filename else ""
            status = _fail(f"no space left on the disk{where}: free some, or write elsewhere", 2)
        else:
            where = f": {error.filename}" if error.filename else ""
            status = _fail(f"{os.strerror(error.errno)}{where}", 1)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        where = "GPU memory" if type(error).__name__ == "OutOfMemoryError" else "memory"
        status = _fail(f"out of {where}: {if_out_of_memory}, or free some", 1)
    except KeyboardInterrupt:
        status = _fail("interrupted", 130)
    sys.exit(status)


def _is_out_of_memory(error: Exception) -> bool:
    """torch raises a RuntimeError on the CPU, and a subclass of it on a GPU; the messages are similar."""
    words = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in words or "can't allocate memory" in words


def _fail(message: str, status: int) -> int:
    if "--debug" in sys.argv:
        traceback.print_exc()
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    return status
