"""Where the in-between prediction guesses: its expected absolute error, pixel by pixel.

The error of a pixel is likely to be large where ways to predict it disagree: the frame before and the one after,
carried along the motion; motion and self super-resolution; the prediction and the linear blend. How large, the given
frames tell themselves: every second one is predicted from the others, at twice the distance, by the whole method, and
the observed errors are fitted as a non-negative combination of these signs. The fit is then used at the frames' own
distance, where the signs are smaller because the errors are; how much faster errors fall than signs is found by
predicting from every fourth frame, too. No other truth is needed.

`benchmarks/uncertainty.py` compares it with true errors of frames that were held out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor

from in_between.flow import blend_along, blur, carry, flow_at
from in_between.prediction import InBetween
from in_between.progress import Report, silent
from in_between.settings import DEFAULT, Settings

FEWEST = 5
"""Frames: with fewer, every second one of them teaches nothing."""
_FEWEST_TWICE = 9  # frames, for a second look at four times the distance
_RATIOS = (0.3, 1.2)  # between errors and signs, from one distance to its half: what is taken seriously
_REACH = 1.5  # px: an expected error is that of a neighbourhood
_SAMPLES = 200_000  # pixels of a fit; more change nothing
_FLAT = 0.1  # px: the narrowest band around a contour in which it may lie
_NARROWEST = np.array([0.0, 0.1, 0.2, 0.4, 0.7, 1.0, 1.5, 2.0])  # px, of a contour's band; tried
_GROWING = np.array([0.0, 0.1, 0.2, 0.3, 0.5, 0.8, 1.2])  # per px of disagreement; tried


@dataclass(frozen=True)
class ExpectedError:
    """The expected absolute error of a prediction between frames (K, C, H, W), and of its masks where it has some."""

    between: InBetween
    frames: Tensor
    weights: Tensor  # of `_signs`
    band: tuple[float, float] | None  # of contours: least width, and growth per pixel of disagreement

    @torch.no_grad()
    def images(self, k: Tensor, alpha: Tensor) -> Tensor:
        """Mean over the channels, (B, 1, H, W) in [0, 1], at alpha (B,) of the way from frame k (B,) to the next; 0 at
        the frames themselves."""
        signs, _ = _signs(self.between, self.frames, k, alpha)
        return torch.einsum("s,sbchw->bchw", self.weights, signs).clamp(0, 1)

    @torch.no_grad()
    def masks(self, k: Tensor, alpha: Tensor) -> Tensor:
        """The probability that a pixel of the mask is wrong, (B, 1, H, W) in [0, 0.5], likewise."""
        if self.band is None:
            raise ValueError("the prediction has no masks")
        distance, apart = _contours(self.between, k, alpha)
        return _wrong(distance, apart, *self.band) * _share_of_gap(alpha)

    def of_others(self, others: Tensor, k: Tensor, alpha: Tensor) -> Tensor:
        """The expected absolute error of other images there, (B, C, H, W): of a model's renders.

        If the error e of the prediction has a Laplace distribution with E|e| = b, and they deviate from it by d, then
        theirs has E|e - d| = |d| + b exp(-|d| / b).
        """
        expected = self.images(k, alpha)
        apart = (others - self.between.images(k, alpha)).abs().mean(1, keepdim=True)
        return (apart + expected * torch.exp(-apart / expected.clamp_min(1e-6))).clamp(0, 1)


@torch.no_grad()
def expected_error(
    between: InBetween,
    frames: Tensor,
    masks: Tensor | None = None,
    seed: int = 0,
    settings: Settings = DEFAULT,
    report: Report = silent,
) -> ExpectedError:
    """Calibrates the expected error of ``between``, which was made from the same frames (K, C, H, W) and masks
    (K, 1, H, W). Takes up to twice as long as that did. Raises ValueError with fewer than `FEWEST` frames."""
    if len(frames) < FEWEST:
        raise ValueError(f"{len(frames)} frames: {FEWEST} are needed")
    frames = frames.float()
    parts = 2 if len(frames) >= _FEWEST_TWICE else 1

    def observed(step: int) -> _Observed:
        part = parts - 1 if step == 2 else 0
        coarse = InBetween(
            frames[::step],
            None if masks is None else masks[::step],
            step * between.gap,
            seed,
            settings,
            lambda name, share: report(name, (part + share) / parts),
        )
        return _observe(coarse, frames, masks, step)

    farther = observed(4) if parts > 1 else None
    found = observed(2)
    weights = found.fit(seed)
    if farther is not None:
        # Errors fall faster than the signs do: by how much, the step from four frames to two tells.
        ratio = found.errors.mean() / max(float((farther.fit(seed) @ found.signs).mean()), 1e-9)
        weights = weights * float(np.clip(ratio, *_RATIOS))
    band = None
    if found.distances is not None:
        assert found.apart is not None and found.misses is not None
        band = _fitted_band(found.distances, found.apart, found.misses)
    return ExpectedError(between, frames, torch.from_numpy(weights).to(frames), band)


@dataclass(frozen=True)
class _Observed:
    """Predictions in the middle between two frames, against the frames there, pixel by pixel."""

    signs: np.ndarray  # (S, P)
    errors: np.ndarray  # (P,)
    distances: Tensor | None  # (P,), and of the same pixels:
    apart: Tensor | None
    misses: Tensor | None

    def fit(self, seed: int) -> np.ndarray:
        """(S,): the non-negative weights of the signs."""
        chosen = np.random.default_rng(seed).permutation(len(self.errors))[:_SAMPLES]
        weights: np.ndarray = nnls(self.signs[:, chosen].T, self.errors[chosen])[0]
        return weights


def _observe(coarse: InBetween, frames: Tensor, masks: Tensor | None, step: int) -> _Observed:
    """Of ``coarse``, which was made from every ``step``-th frame, at the frames half-way between those."""
    given, asked = frames[::step], frames[step // 2 :: step]
    k = torch.arange(min(len(asked), len(given) - 1), device=frames.device)
    signs, errors, distances, apart, misses = [], [], [], [], []
    for some in k.split(8):
        half = torch.full((len(some),), 0.5, device=frames.device)
        found, images = _signs(coarse, given, some, half)
        signs.append(found.flatten(1))
        errors.append((images - asked[some]).abs().mean(1).flatten())
        if masks is not None:
            distance, disagreement = _contours(coarse, some, half)
            truth = masks[step // 2 :: step][some] >= 0.5
            distances.append(distance.flatten())
            apart.append(disagreement.flatten())
            misses.append(((distance > 0) != truth).float().flatten())
    table, error = (values.cpu().double().numpy() for values in (torch.cat(signs, 1), torch.cat(errors)))
    if masks is None:
        return _Observed(table, error, None, None, None)
    return _Observed(table, error, torch.cat(distances), torch.cat(apart), torch.cat(misses))


def _signs(between: InBetween, frames: Tensor, k: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """What goes with large errors, (S, B, 1, H, W), and the prediction, (B, C, H, W)."""
    before, after = frames[k], frames[k + 1]
    seen, a = flow_at(between.flow[k], alpha), alpha.view(-1, 1, 1, 1)
    images = between.images(k, alpha)
    carried = carry(before, -a * seen, "bilinear"), carry(after, (1 - a) * seen, "bilinear")
    moved = (1 - a) * carried[0] + a * carried[1]
    steepness = (_slope(images, -1).square() + _slope(images, -2).square()).sqrt()
    signs = [
        (carried[0] - carried[1]).abs(),  # forward against backward
        (images - moved).abs(),  # motion against self super-resolution
        (images - torch.lerp(before, after, a)).abs(),  # the prediction against the linear blend
        (before - after).abs(),
        steepness,  # of edges, whose place is uncertain
        images,  # noise grows with brightness
    ]
    share = _share_of_gap(alpha)
    return torch.stack([blur(sign.mean(1, keepdim=True), _REACH) * share for sign in signs]), images


def _slope(images: Tensor, axis: int) -> Tensor:
    slope: Tensor = torch.gradient(images, dim=axis)[0]
    return slope


def _share_of_gap(alpha: Tensor) -> Tensor:
    """(B, 1, 1, 1): errors grow from a frame to the middle between two like the deviation of a random walk that ends at
    both."""
    return (4 * alpha * (1 - alpha)).clamp_min(0).sqrt().view(-1, 1, 1, 1)


def _contours(between: InBetween, k: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """The signed distance of each pixel from the predicted contour, and how far apart the two frames' contours are
    there after the motion, px: (B, 1, H, W) each."""
    distance = between.distances(k, alpha)
    start, zero = between.distances(k, torch.zeros_like(alpha)), torch.zeros_like(alpha)
    end = between.distances(k, torch.ones_like(alpha))
    seen = flow_at(between.flow[k], alpha)
    apart = blend_along(start, -end, seen, torch.full_like(zero, 0.5), "bilinear").abs() * 2
    return distance, apart


def _wrong(distance: Tensor, apart: Tensor, least: float, growth: float) -> Tensor:
    """Half at the contour, falling exponentially with the distance from it, over a band that is wider where the two
    frames disagree."""
    return 0.5 * torch.exp(-distance.abs() / (least + growth * apart + _FLAT))


def _fitted_band(distance: Tensor, apart: Tensor, misses: Tensor) -> tuple[float, float]:
    """The band with the least squared error of `_wrong`."""
    near = distance.abs() < 12  # farther off, nothing is wrong
    distance, apart, misses = (values[near] for values in (distance, apart, misses))
    tried = [(least, growth) for least in _NARROWEST for growth in _GROWING]
    losses = [
        float((_wrong(distance, apart, least, growth) - misses).square().mean()) for least, growth in tried
    ]
    least, growth = tried[int(np.argmin(losses))] if len(distance) else (_NARROWEST[2], 0.0)
    return float(least), float(growth)
