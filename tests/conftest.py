"""Which tests run, and on how many threads."""

import os
from collections.abc import Iterator

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")
    parser.addoption("--browser", action="store_true", help="also run the tests in Chromium")


def pytest_configure(config: pytest.Config) -> None:
    # Test scenes are small: beyond a few threads, starting them costs more than it gains. Workers of make test share.
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    torch.set_num_threads(min(4, max((os.cpu_count() or 1) // workers, 1)))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    skips = {}
    if not torch.cuda.is_available():
        skips["cuda"] = pytest.mark.skip(reason="needs an NVIDIA GPU")
    if not config.getoption("--browser"):
        skips["browser"] = pytest.mark.skip(reason="in Chromium: make test-browser")
    if not config.getoption("--slow"):
        skips["slow"] = pytest.mark.skip(reason="slow: run with --slow")
    for item in items:
        for marker, skip in skips.items():
            if marker in item.keywords:
                item.add_marker(skip)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For modules that train on small frames: `sequences.threads` says why."""
    from sequences import threads  # what it imports, other modules' tests may not need

    with threads(1):
        yield
