"""Files and folders that are either complete or not there: written beside their place, then renamed into it."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_FULL = 4096  # bytes: a disk with less has no room for another block


@contextmanager
def atomic_write(path: str | os.PathLike[str], sync: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `path`; what the body writes there becomes `path` in one step at the end.

        with atomic_write("model.pth") as temporary:
            torch.save(state, temporary)

    The temporary name keeps the suffix, so libraries that choose a format by it (or append one) work, and so do
    `temporary.write_text` and `temporary.open("wb")`. Missing parent folders are made, a symbolic link is written
    through. When the body raises, the temporary file is removed and an earlier `path` stays as it was; on a full disk
    the exception is an OSError that names `path`.

    `sync=False` leaves the flushing to the system: still all or nothing when the program dies, not when the power
    does. Meant for images by the thousand.
    """
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _sibling(target)
    try:
        yield temporary
        if sync:
            _sync(temporary)
        os.replace(temporary, target)
    except BaseException as error:
        full = _is_full(error, target)
        temporary.unlink(missing_ok=True)
        if full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target)) from error
        raise
    if sync:
        _sync(target.parent)


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; it becomes `path` at the end, replacing the folder that was there.

    Missing parents are made; those are left when the body raises, the temporary folder is not. Whether an earlier
    folder may be replaced is the caller's question to ask first.
    """
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _sibling(target)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _sync(file)
        if target.exists():
            old = _sibling(target)
            os.rename(target, old)
            try:
                os.rename(temporary, target)
            except BaseException:
                os.rename(old, target)
                raise
            shutil.rmtree(old)
        else:
            os.rename(temporary, target)
    except BaseException as error:
        full = _is_full(error, target)
        shutil.rmtree(temporary, ignore_errors=True)
        if full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target)) from error
        raise
    _sync(target.parent)


def _sibling(target: Path) -> Path:
    return target.with_name(f".{target.stem}.{secrets.token_hex(4)}{target.suffix}")


def _is_full(error: BaseException, target: Path) -> bool:
    """Whether writing failed for want of space, to be asked before the half-written file goes.

    Libraries raise exceptions of their own then (torch a RuntimeError), so the disk is asked too.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno == errno.ENOSPC
    return isinstance(error, Exception) and shutil.disk_usage(target.parent).free < _FULL


def _sync(path: Path) -> None:
    """Put a file's bytes, or a folder's list of names, on the disk before anything is renamed over it."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open a folder
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # some network file systems refuse to sync a folder, which loses nothing
            raise
    finally:
        os.close(descriptor)
