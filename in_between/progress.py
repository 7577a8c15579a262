"""Progress of a computation of several parts, as one share of the whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

from tqdm import tqdm

Report = Callable[[str, float], object]
"""Called with what is being done and the share of all work done so far: from 0 to 1, never decreasing."""
Done = Callable[[float], object]
"""Called with the share of one part that is done, from 0 to 1."""


class Progress:
    """Adds up the parts of a computation.

    report: called with the sum. costs: of each part, in order, in any common unit.
    """

    def __init__(self, report: Report, costs: Mapping[str, float]) -> None:
        self._report, self._costs = report, dict(costs)
        self._before, self._all = 0.0, sum(costs.values()) or 1.0

    def part(self, name: str) -> Done:
        """Begins the next part. Parts before it that were not needed count as done."""
        names = list(self._costs)
        self._before = sum(self._costs[other] for other in names[: names.index(name)])
        done = partial(self._add, name)
        done(0.0)
        return done

    def _add(self, name: str, share: float) -> None:
        self._report(name, min(1.0, (self._before + self._costs[name] * share) / self._all))


def part_of(done: Done, number: int, count: int) -> Done:
    """For the share of the part ``number`` of ``count`` equal ones."""
    return lambda share: done((number + share) / count)


def silent(_: str, __: float) -> None:
    """Reports nothing."""


def unheard(_: float) -> None:
    """Progress that nobody watches."""


@contextmanager
def shown(what: str, quiet: bool = False) -> Iterator[Report]:
    """A bar from 0 to 100 %, with the current part's name."""
    with tqdm(
        total=100.0,
        desc=what,
        disable=quiet,
        bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}, {remaining} left{postfix}",
    ) as bar:

        def report(part: str, share: float) -> None:
            bar.set_postfix_str(part, refresh=False)
            bar.update(100 * share - bar.n)

        yield report
