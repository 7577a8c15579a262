"""Tiny sequences of frames, and runs of train.py on them: a blob that drifts to the right, 24 x 20 px."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import train
from in_between.prediction import InBetween
from in_between.settings import DEFAULT
from scene.checkpoint import Checkpoint, load_checkpoint
from utils.errors import run

WIDTH, HEIGHT, FRAMES = 24, 20, 5


def blobs(count: int = FRAMES, width: int = WIDTH, height: int = HEIGHT) -> list[np.ndarray]:
    """Frames (height, width) uint8."""
    rows, columns = np.mgrid[:height, :width]
    out = []
    for k in range(count):
        squares = ((columns - width / 3 - 1.5 * k) / 5) ** 2 + ((rows - height / 2) / 4) ** 2
        out.append((10 + 220 * np.exp(-squares)).astype(np.uint8))
    return out


def masks(**size: int) -> list[np.ndarray]:
    return [np.where(frame > 120, 255, 0).astype(np.uint8) for frame in blobs(**size)]


def colours(**size: int) -> list[np.ndarray]:
    return [np.stack([frame, frame // 2, 255 - frame], 2) for frame in blobs(**size)]


def write(root: Path, frames: list[np.ndarray]) -> Path:
    """``frames`` as a data root."""
    (root / "original").mkdir(parents=True, exist_ok=True)
    for k, frame in enumerate(frames):
        Image.fromarray(frame).save(root / "original" / f"{k:04d}.png")
    return root


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Frames this small are done before a second thread starts; on a busy machine, waiting for it takes long."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


FAST = ("--num_pts", "150", "--poly_degree", "3", "--device", "cpu", "--quiet")


def arguments(root: Path, out: Path, *more: object) -> list[str]:
    return ["train.py", "-s", str(root), "-m", str(out), *FAST, *map(str, more)]


def train_at(root: Path, out: Path, *more: object) -> None:
    """``python train.py -s root -m out ...``, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", arguments(root, out, *more))
        train.main()


class BriefInBetween(InBetween):
    """Trains its networks for two iterations, for tests in which it does not matter what they learn."""

    settings_of_tests = replace(
        DEFAULT,
        rows=replace(DEFAULT.rows, network=replace(DEFAULT.rows.network, iterations=2)),
        contours=replace(DEFAULT.contours, network=replace(DEFAULT.contours.network, iterations=2)),
    )

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named, settings=self.settings_of_tests)

    @classmethod
    def load(cls, *arguments: Any, **named: Any) -> InBetween | None:
        return super().load(*arguments, **named, settings=cls.settings_of_tests)


def refused(root: Path, out: Path, *more: object) -> int:
    """The exit status of a run that fails like a script."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", arguments(root, out, *more))
        run(train.main)
    assert isinstance(ended.value.code, int)
    return ended.value.code


def checkpoint(out: Path, iteration: int) -> Checkpoint:
    return load_checkpoint(out / f"chkpnt{iteration}.pth")


def assert_same(a: object, b: object, where: str = "") -> None:
    """Bit-identical, through containers."""
    if isinstance(a, torch.Tensor):
        assert isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b), where
    elif isinstance(a, dict):
        assert isinstance(b, dict) and a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert isinstance(b, (list, tuple)) and len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


def assert_same_state(a: Checkpoint, b: Checkpoint) -> None:
    """All state that carries over: parameters, moments, statistics, times, random state."""
    for part in ("iteration", "params", "time_func", "active_sh_degree", "statistics", "optimizer"):
        assert_same(getattr(a, part), getattr(b, part), part)
    assert_same(a.extras["random"], b.extras["random"], "random")
