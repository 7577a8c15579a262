"""How a script ends: 0 done, 1 partly done or the machine said no, 2 the user's input is wrong, 130 interrupted."""

from __future__ import annotations

import argparse
import errno
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

_DISK_FULL = {errno.ENOSPC, errno.EDQUOT}


class UserError(Exception):
    """A mistake that the user can mend. The message is one line: what is wrong, where, and what to do about it."""

    def __init__(self, message: str) -> None:
        super().__init__(
            " ".join(line.strip() for line in message.splitlines())
        )  # libraries' reasons have several


class ArgumentParser(argparse.ArgumentParser):
    """argparse whose usage errors are `UserError`s: one line and exit status 2, like every other mistake.

    Abbreviated options are off, because a new option would change what an old command line means.
    """

    def __init__(self, *args: object, **kwargs: object) -> None:
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the options)")


def run(main: Callable[[], int | None]) -> NoReturn:
    """Call `main` and exit the process with its status (None means 0).

    What a user can cause ends in one line on stderr, `<script>: error: ...`; `--debug` on the command line adds
    the traceback. Anything else is a bug of ours and keeps its traceback.
    """
    try:
        status = main() or 0
        sys.stdout.flush()  # a closed pipe or a full disk shows here, not in the interpreter's own shutdown
    except UserError as error:
        status = _fail(str(error), 2)
    except BrokenPipeError:  # `prepare.py ... | head`: the reader has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except OSError as error:
        if error.errno is None:
            raise
        if error.errno in _DISK_FULL:
            where = f" for {error.filename}" if error.filename else ""
            status = _fail(f"no space left on the disk{where}: free some, or write elsewhere", 1)
        else:
            where = f": {error.filename}" if error.filename else ""
            status = _fail(f"{os.strerror(error.errno)}{where}", 1)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        status = _fail(
            "out of memory: take fewer Gaussians, smaller frames or fewer at once, or free some", 1
        )
    except KeyboardInterrupt:
        status = _fail("interrupted", 130)
    sys.exit(status)


def _is_out_of_memory(error: Exception) -> bool:
    """torch has a RuntimeError for it on the CPU, and a subclass on a GPU: their words are alike."""
    words = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in words or "can't allocate memory" in words


def _fail(message: str, status: int) -> int:
    if "--debug" in sys.argv:
        traceback.print_exc()
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    return status
