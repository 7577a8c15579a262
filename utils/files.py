"""Files and folders that are complete or absent: written under a temporary name, then renamed. And folders that only
one run at a time may write to."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from utils.errors import UserError

LOCK = ".lock"
_WRITE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}
_FULL = 4096  # bytes: a disk with less has no room for another block


@contextmanager
def atomic_write(path: str | os.PathLike[str], sync: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `path`; what the body writes there becomes `path` in one step at the end.

        with atomic_write("model.pth") as temporary:
            torch.save(state, temporary)

    The temporary name keeps the suffix, so libraries that choose a format by it (or append one) work, and so do
    `temporary.write_text` and `temporary.open("wb")`. Missing parent folders are created; a symbolic link is followed.
    If the body raises, the temporary file is removed and an earlier `path` is left as it was. If the disk is full or
    the system refuses to write, the exception is an OSError that names `path`.

    `sync=False` leaves flushing to the system: still all or nothing if the program dies, but not if the power fails.
    Meant for images by the thousand.
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
        number = _system_error(error, target)
        temporary.unlink(missing_ok=True)
        if number:
            raise OSError(number, os.strerror(number), str(target)) from error
        raise
    if sync:
        _sync(target.parent)


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; at the end it becomes `path`, replacing any earlier folder.

    Missing parents are created. If the body raises, they stay and the temporary folder is removed. The caller decides
    beforehand whether an earlier folder may be replaced.
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
        number = _system_error(error, target)
        shutil.rmtree(temporary, ignore_errors=True)
        if number:
            raise OSError(number, os.strerror(number), str(target)) from error
        raise
    _sync(target.parent)


@contextmanager
def own_folder(path: str | os.PathLike[str], option: str = "-m") -> Iterator[Path]:
    """Create the folder `path` if it is missing, and lock it against other runs while the body runs.

    The lock is the operating system's, on the file `.lock`: it is released however the process ends, and the file left
    behind blocks nobody. Folders created here that are still empty at the end are removed. option: which one named it,
    for messages.

    Raises `UserError` if another run holds the folder, or a file of that name is in the way.
    """
    folder = Path(path)
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"{option} {folder}: a file of that name is in the way") from error
    try:
        descriptor = _lock(folder, option)
        try:
            yield folder
        finally:
            (folder / LOCK).unlink(
                missing_ok=True
            )  # while held: otherwise, a waiting run would lock a deleted file
            os.close(descriptor)
    finally:
        for place in made:
            with suppress(OSError):  # no longer empty
                place.rmdir()


def is_owned(folder: Path) -> bool:
    """Whether a run on this machine holds ``folder`` now, judging by its lock file; the lock itself is not touched."""
    try:
        _, process, _, host = (folder / LOCK).read_text().split()
        os.kill(int(process), 0)
    except PermissionError:  # another user's process, so alive
        return True
    except (OSError, ValueError):
        return False
    return host == socket.gethostname()


def remove_temporaries(folder: Path) -> None:
    """Remove the files that `atomic_write` left half-written in `folder` when its process was killed."""
    for file in folder.iterdir() if folder.is_dir() else ():
        if _TEMPORARY.fullmatch(file.name) and file.is_file():
            file.unlink(missing_ok=True)


_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}(\.[^.]*)?")


def _sibling(target: Path) -> Path:
    return target.with_name(f".{target.stem}.{secrets.token_hex(4)}{target.suffix}")


def _lock(folder: Path, option: str) -> int:
    """The descriptor of the lock file, locked. Raises `UserError` if another process holds it."""
    file = folder / LOCK
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 200, 0).decode("utf-8", "replace").strip() or "another process"
            os.close(descriptor)
            raise UserError(
                f"{folder} is in use by another run ({holder}): wait for it, stop it, or give another {option}"
            ) from None
        except OSError as error:
            if error.errno not in (
                errno.ENOLCK,
                errno.ENOTSUP,
            ):  # on a file system without locks, go on without one
                os.close(descriptor)
                raise
        # Between opening and locking, the run that held the file may have removed it.
        if file.exists() and os.path.samestat(os.fstat(descriptor), file.stat()):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
            return descriptor
        os.close(descriptor)


def _system_error(error: BaseException, target: Path) -> int:
    """The errno with which writing failed, or 0 if it failed for another reason. Call it before the half-written file
    is removed.

    Libraries raise their own exceptions (torch a RuntimeError). The system's error may be among their causes; if not,
    ask whether the disk is full.
    """
    behind: BaseException | None = error
    while behind is not None:
        if isinstance(behind, OSError) and behind.errno in _WRITE_ERRORS:
            return behind.errno
        behind = behind.__cause__ or behind.__context__
    full = not isinstance(error, OSError) and shutil.disk_usage(target.parent).free < _FULL
    return errno.ENOSPC if full and isinstance(error, Exception) else 0


def _sync(path: Path) -> None:
    """Flush a file's bytes, or a folder's entries, to the disk before anything depends on them."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open a folder
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # some network file systems refuse to sync a folder, which is harmless
            raise
    finally:
        os.close(descriptor)
