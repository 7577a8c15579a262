"""Work beside the main thread: what nothing waits for yet."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

Result = TypeVar("Result")


class Beside:
    """Does work in threads of its own, in the order in which it came.

    scores = beside(compute, frames)
    ...
    scores.result()
    """

    def __init__(self, threads: int = 2) -> None:
        self._threads = ThreadPoolExecutor(threads, "beside")
        self._begun: list[Future[Any]] = []

    def __call__(self, work: Callable[..., Result], *arguments: Any) -> Future[Result]:
        future = self._threads.submit(work, *arguments)
        self._begun.append(future)
        return future

    def finish(self) -> None:
        """Waits for all of it, and raises the first error of any."""
        self._threads.shutdown()
        for future in self._begun:
            future.result()


def import_ahead(*modules: str) -> None:
    """Imports what will be needed later, and what is missing then says so there."""
    for name in modules:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
