"""Pictures of scores: a plot by frame, and frames side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from utils.files import atomic_write

_MOST_ROWS = 5
_DPI = 110
_MISSING, _SURPLUS, _BOTH = (0.27, 0.55, 1.0), (1.0, 0.45, 0.2), (0.5, 0.5, 0.5)  # of masks


def plot_scores(
    path: Path,
    title: str,
    frames: Sequence[int],
    scores: Mapping[str, Sequence[float]],
    unit: str = "PSNR (dB)",
) -> None:
    """Scores of each frame, a line for each entry, with their means in the legend."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    digits = 2 if "dB" in unit else 4
    for order, (name, values) in enumerate(scores.items()):
        known = [value for value in values if np.isfinite(value)]  # Dice of nothing against nothing is none
        mean = float(np.mean(known)) if known else float("nan")
        style: dict[str, Any] = (
            {"marker": ".", "linewidth": 1.2} if order == 0 else {"linestyle": "--", "linewidth": 1}
        )
        axes.plot(frames, values, label=f"{name}, mean {mean:.{digits}f}", zorder=9 - order, **style)
        if len(scores) == 1:
            axes.axhline(mean, color="0.5", linestyle="--", linewidth=1)
    axes.set(xlabel="frame" if len(scores) == 1 else "slice", ylabel=unit, title=title)
    axes.legend(fontsize=8)
    with atomic_write(path, sync=False) as temporary:
        figure.savefig(temporary, dpi=100)


def montage_choice(weights: Sequence[int]) -> list[int]:
    """Which frames to show: up to five, spread evenly over those that hold something."""
    filled = [k for k, weight in enumerate(weights) if weight] or list(range(len(weights)))
    steps = np.linspace(0, len(filled) - 1, min(_MOST_ROWS, len(filled)) + 2)[1:-1]
    return sorted({filled[round(step)] for step in steps})


def draw_montage(
    path: Path,
    names: Sequence[str],
    truth: Sequence[np.ndarray],
    predictions: Mapping[str, tuple[Sequence[np.ndarray], Sequence[str]]],
    pixel_aspect: float = 1.0,
    mask: bool = False,
    errors_below: bool = False,
) -> None:
    """A row for each frame: the truth, each prediction with its figures, and beside or below these each one's error.

    names: of the frames. truth: (H, W, C) in [0, 1] each. predictions: name -> images like them, and a line of figures
    for each. pixel_aspect: height of a pixel over its width. Errors of images are absolute differences (the mean over
    channels) on one scale for all; errors of masks are in colours, and what surrounds the masks is cut off.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if mask:
        box = _box([*truth, *(image for images, _ in predictions.values() for image in images)])
        truth = [frame[box] for frame in truth]
        predictions = {
            name: ([image[box] for image in images], figures)
            for name, (images, figures) in predictions.items()
        }
    errors = {
        name: [
            _disagreement(image, frame) if mask else np.abs(image - frame).mean(2)
            for image, frame in zip(images, truth, strict=True)
        ]
        for name, (images, _) in predictions.items()
    }
    worst = 1.0 if mask else max(float(np.percentile(e, 99.8)) for rows in errors.values() for e in rows)
    worst = max(worst, 1e-3)
    if errors_below:
        rows, columns, scale_column = 2 * len(truth), 1 + len(predictions), 1
    else:
        rows, columns, scale_column = len(truth), 1 + 2 * len(predictions), 1 + len(predictions)
    height, width = truth[0].shape[:2]
    cell = 2.4  # inches wide
    tall = min(max(cell * height * pixel_aspect / width, 0.8), 4.0)
    foot = 0.55  # inches, for the scale
    size = columns * cell, rows * (tall + 0.3) + 0.35 + foot
    figure = Figure(figsize=size, facecolor="black")
    FigureCanvasAgg(figure)

    def show(row: int, column: int, picture: np.ndarray, title: str, caption: str, **looks: Any) -> Any:
        bottom = size[1] - 0.35 - (row + 1) * (tall + 0.3) + 0.05
        place = column * cell / size[0], bottom / size[1], 0.97 * cell / size[0], tall / size[1]
        axes = figure.add_axes(place)
        shown = axes.imshow(picture, aspect=pixel_aspect, interpolation="nearest", **looks)
        axes.axis("off")
        axes.set_title(caption, color="0.8", fontsize=9, pad=3)
        if row == 0:
            middle = (column + 0.485) * cell / size[0]
            figure.text(
                middle, 1 - 0.2 / size[1], title, color="white", ha="center", va="center", fontsize=11
            )
        return shown

    heat: Any = None
    for k, frame in enumerate(truth):
        row = 2 * k if errors_below else k
        show(row, 0, _picture(frame), "held out", names[k], cmap="gray", vmin=0, vmax=1)
        for column, (name, (images, figures)) in enumerate(predictions.items(), 1):
            picture = _picture(images[k] >= 0.5 if mask else images[k])
            show(row, column, picture, name, figures[k], cmap="gray", vmin=0, vmax=1)
        for column, (name, pictures) in enumerate(errors.items(), scale_column):
            looks: dict[str, Any] = {} if mask else {"cmap": "inferno", "vmin": 0, "vmax": worst}
            title, caption = ("", "its error") if errors_below else (f"error of {name}", "")
            heat = show(row + errors_below, column, pictures[k], title, caption, **looks)

    first = scale_column * cell
    if mask:
        for order, (colour, words) in enumerate(
            ((_MISSING, "missed"), (_SURPLUS, "too much"), (_BOTH, "both"))
        ):
            x = (first + 0.1 + order * 1.2) / size[0]
            figure.text(x, 0.3 / size[1], "■ " + words, color=colour, fontsize=10, va="center")
    else:
        bar = figure.add_axes(
            (first / size[0], 0.32 / size[1], (len(errors) - 0.03) * cell / size[0], 0.09 / size[1])
        )
        scale = figure.colorbar(heat, cax=bar, orientation="horizontal")
        scale.outline.set_visible(False)
        bar.tick_params(colors="0.8", labelsize=8, length=2)
        words = "absolute error of [0, 1]"
        figure.text(
            (first - 0.1) / size[0], 0.365 / size[1], words, color="0.8", fontsize=9, ha="right", va="center"
        )
    with atomic_write(path, sync=False) as temporary:
        figure.savefig(temporary, dpi=_DPI, facecolor="black")


def _box(masks: Sequence[np.ndarray]) -> tuple[slice, slice]:
    """The rows and columns of everything in the masks, and some around."""
    inside = np.any([mask.mean(2) >= 0.5 for mask in masks], axis=0)
    sides = []
    for axis in (1, 0):
        (filled,) = np.nonzero(inside.any(axis))
        count = inside.shape[1 - axis]
        first, last = (filled[0], filled[-1]) if len(filled) else (0, count - 1)
        margin = (last - first) // 8 + 4
        sides.append(slice(max(first - margin, 0), min(last + margin, count - 1) + 1))
    return sides[0], sides[1]


def _picture(image: np.ndarray) -> np.ndarray:
    image = np.asarray(image, np.float32)
    return image[:, :, 0] if image.shape[2] == 1 else image


def _disagreement(image: np.ndarray, frame: np.ndarray) -> np.ndarray:
    """Two masks in colours: in both, in the frame alone, in the image alone; (H, W, 3)."""
    predicted, truth = image.mean(2) >= 0.5, frame.mean(2) >= 0.5
    out = np.zeros((*truth.shape, 3), np.float32)
    for where, colour in (
        (predicted & truth, _BOTH),
        (truth & ~predicted, _MISSING),
        (predicted & ~truth, _SURPLUS),
    ):
        out[where] = colour
    return out


def draw_cuts(
    path: Path,
    stacks: Mapping[str, np.ndarray],
    masks: Mapping[str, np.ndarray],
    spacing: tuple[float, float, float],
    window: tuple[float, float] = (0.0, 1.0),
) -> None:
    """A coronal and a sagittal cut, or what corresponds to them, through stacks of slices: where in-betweens show.

    stacks: name -> (D, H, W) in [0, 1]; masks: the same names, (D, H, W), outlined where there is one. spacing: of
    column, row and slice. window: the values that are black and white. The cuts run through the middle of the first
    mask, else of the stack; the first slice is below, as the feet are where slices run upwards.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    depth, height, width = next(iter(stacks.values())).shape
    row, column = height // 2, width // 2
    inside = next(iter(masks.values()), None)
    if inside is not None and (inside >= 0.5).any():
        _, rows, columns = np.nonzero(inside >= 0.5)
        row, column = int(np.median(rows)), int(np.median(columns))
    cell = 4.0  # inches wide
    sizes = [(width * spacing[0], depth * spacing[2]), (height * spacing[1], depth * spacing[2])]
    talls = [min(max(cell * up / across, 0.7), 4.0) for across, up in sizes]
    total = len(stacks) * cell, sum(talls) + 0.35 * 3
    figure = Figure(figsize=total, facecolor="black")
    FigureCanvasAgg(figure)
    bottom = total[1] - 0.4
    for tall, (across, up), cut, name in zip(
        talls,
        sizes,
        ((slice(None), row), (slice(None), slice(None), column)),
        ("across the rows", "across the columns"),
        strict=True,
    ):
        bottom -= tall
        for place, (title, stack) in enumerate(stacks.items()):
            axes = figure.add_axes(
                (place * cell / total[0], bottom / total[1], 0.98 * cell / total[0], tall / total[1])
            )
            extent = (0.0, across, 0.0, up)
            axes.imshow(
                stack[cut], cmap="gray", vmin=window[0], vmax=window[1], origin="lower", extent=extent, aspect="auto",
                interpolation="nearest",
            )  # fmt: skip
            mask = masks.get(title)
            if mask is not None and mask[cut].min() < 0.5 <= mask[cut].max():
                axes.contour(mask[cut], [0.5], colors=["#e69f00"], linewidths=1.2, extent=extent)
            axes.axis("off")
            axes.set_title(title if name == "across the rows" else "", color="white", fontsize=12, pad=4)
        bottom -= 0.3
    with atomic_write(path, sync=False) as temporary:
        figure.savefig(temporary, dpi=_DPI, facecolor="black")
