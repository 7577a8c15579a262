"""How sharp images are beside the truth: gradient energy, and power by spatial frequency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

BANDS = 16
"""From zero to half a cycle per pixel."""


def gradient_energy(images: np.ndarray) -> float:
    """Mean squared difference of neighbouring pixels, of (M, H, W)."""
    down, across = np.diff(images, axis=1), np.diff(images, axis=2)
    return float((down**2).mean() + (across**2).mean())


def sharpness(images: np.ndarray, truth: np.ndarray) -> float:
    """The gradient energy of images over that of the truth, (M, H, W) each: under 1 if they are smoother."""
    return gradient_energy(images) / gradient_energy(truth)


def spectrum(images: np.ndarray) -> np.ndarray:
    """(BANDS,): mean power of (M, H, W) in rings of equal width, from zero to half a cycle per pixel. A Hann window
    keeps the frames' edges out."""
    height, width = images.shape[1:]
    window = np.hanning(height + 2)[1:-1, None] * np.hanning(width + 2)[1:-1]
    centred = images - images.mean((1, 2), keepdims=True)
    power = (np.abs(np.fft.fft2(centred * window)) ** 2).mean(0)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width))
    ring = np.minimum((2 * BANDS * frequency).astype(int), BANDS)
    sums, counts = (
        np.bincount(ring.ravel(), weights, BANDS + 1)[:BANDS] for weights in (power.ravel(), None)
    )
    return sums / counts


def draw_spectra(path: Path, panels: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    """One panel per title: each method's power over that of the truth, (BANDS,), by frequency."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(panels), 3.4), layout="constrained")
    centres = (np.arange(BANDS) + 0.5) / (2 * BANDS)
    for axes, (title, methods) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        for name, ratio in methods.items():
            axes.plot(centres, ratio, label=name, linewidth=1.4)
        axes.axhline(1, color="0.6", linewidth=0.8)
        axes.set(title=title, xlabel="cycles per pixel", yscale="log", ylim=(0.02, 2))
        axes.legend(fontsize=7)
    figure.axes[0].set_ylabel("power over that of the frames")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
