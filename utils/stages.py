"""Named stages of a long computation, to be timed: a hook that costs nothing while nobody watches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

Watch = Callable[[str], AbstractContextManager[object]]
_nobody: AbstractContextManager[object] = nullcontext()
_watch: Watch | None = None


def stage(name: str) -> AbstractContextManager[object]:
    """The context that a stage's work runs in: ``with stage("loss"): ...``."""
    return _watch(name) if _watch else _nobody


@contextmanager
def watched(watch: Watch) -> Iterator[None]:
    """Within it every stage runs in the context that ``watch`` returns for its name. One watch at a time."""
    global _watch
    if _watch is not None:
        raise RuntimeError("the stages are already being watched")
    _watch = watch
    try:
        yield
    finally:
        _watch = None
