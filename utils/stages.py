"""Named stages of a long computation, for whoever measures them: a hook that costs nothing while nobody does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

Watch = Callable[[str], AbstractContextManager[object]]
_nobody: AbstractContextManager[object] = nullcontext()
_watch: Watch | None = None


def stage(name: str) -> AbstractContextManager[object]:
    """What the work of a stage runs in: ``with stage("loss"): ...``."""
    return _watch(name) if _watch else _nobody


@contextmanager
def watched(watch: Watch) -> Iterator[None]:
    """Within it every stage runs in the context that ``watch`` returns for its name. One watch at a time."""
    global _watch
    if _watch is not None:
        raise RuntimeError("the stages are watched already")
    _watch = watch
    try:
        yield
    finally:
        _watch = None
