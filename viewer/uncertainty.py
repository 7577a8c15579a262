"""Where a trained model guesses: the expected absolute error of its images, from the frames it was trained on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from in_between.prediction import InBetween, pixel_gap
from in_between.progress import shown
from in_between.uncertainty import FEWEST, ExpectedError, expected_error
from utils.errors import UserError
from viewer.case import Case


class ModelError:
    """The expected absolute error of a model's images, and the probability that its mask is wrong, at any position.

    The prediction from the frames has an expected error (`in_between.uncertainty`); the model's own grows with its
    distance from that.
    """

    def __init__(self, expected: ExpectedError, count: int) -> None:
        self.expected, self.count = expected, count

    @property
    def has_masks(self) -> bool:
        return self.expected.band is not None

    def images(self, drawn: Tensor, positions: list[float]) -> Tensor:
        """Of renders (V, C, H, W) in [0, 1] at ``positions`` (frame index plus fraction): (V, 1, H, W)."""
        return self.expected.of_others(drawn, *self._where(positions, drawn))

    def masks(self, drawn: Tensor, positions: list[float]) -> Tensor:
        """Of masks (V, C, H, W), inside where the mean of the channels is 0.5 or more: (V, 1, H, W). Where the
        prediction's differs, it is wrong as likely as that one is right."""
        where = self._where(positions, drawn)
        wrong = self.expected.masks(*where)
        same = (drawn.mean(1, keepdim=True) >= 0.5) == (self.expected.between.masks(*where) >= 0.5)
        return torch.where(same, wrong, 1 - wrong)

    def _where(self, positions: list[float], like: Tensor) -> tuple[Tensor, Tensor]:
        at = torch.tensor(positions, dtype=torch.float64, device=like.device)
        k = at.floor().long().clamp(max=self.count - 2)
        return k, (at - k).float()


def model_error(case: Case, say: Callable[[str], object] = print, quiet: bool = False) -> ModelError:
    """Calibrates it on the frames of ``case``; takes minutes on a CPU. The prediction is the one that the run was
    taught, if it is still there. Raises UserError where the frames are gone or too few, or the model is of masks
    alone."""
    frames = case.inputs.images
    if frames is None or case.pipeline == "seg":
        why = case.inputs.missing or "the model shows masks alone"
        raise UserError(f"--uncertainty needs the images that the model was trained on: {why}")
    if len(frames) < FEWEST:
        raise UserError(f"--uncertainty: {len(frames)} frames; at least {FEWEST} are needed to calibrate it")
    device = case.trained.model.device
    images = frames(range(len(frames))).to(device)
    kept = case.inputs.masks
    masks = None
    if kept is not None and kept.labels is None and case.inputs.painted is None:
        masks = kept(range(len(kept))).to(device).mean(1, keepdim=True)
    gap = pixel_gap(case.geometry, images.shape[-1])
    between = InBetween.load(Path(case.options.model_path) / "in_between.pt", images, masks, gap)
    with shown("expected errors", quiet) as report:
        if between is None:
            between = InBetween(images, masks, gap, report=lambda part, share: report(part, share / 2))
        expected = expected_error(
            between, images, masks, report=lambda part, share: report(part, 0.5 + share / 2)
        )
    return ModelError(expected, len(frames))
