"""Where the time of a process goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

BEGUN = time.perf_counter()
"""When this module was imported; the programs do so before torch, which takes seconds itself."""

Clock = Callable[[], float]


class Parts:
    """Wall-clock seconds that the parts of a run took, by name.

    with parts("evaluation"):
        ...
    """

    def __init__(self, clock: Clock = time.perf_counter) -> None:
        self.clock = clock
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = self.clock()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + self.clock() - start


def in_words(seconds: float) -> str:
    """In readable form: "40 s", "4 min", "2 h 10 min"."""
    if seconds < 99.5:
        return f"{max(seconds, 1):.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
