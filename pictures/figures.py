"""Pictures of scores: a plot by frame, and frames side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from patient.labels import LabelTable
from patient.side_views import SideView, middle_of
from utils.files import atomic_write

_MOST_ROWS = 5
_DPI = 110
_MISSING, _SURPLUS, _BOTH = (0.27, 0.55, 1.0), (1.0, 0.45, 0.2), (0.5, 0.5, 0.5)  # of masks
_OTHER = (0.8, 0.47, 0.65)
ACCENT = "#e69f00"


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


@dataclass(frozen=True)
class Row:
    """One line of a montage: a frame, or a cut across the slices."""

    name: str
    truth: np.ndarray
    """(H, W, C) in [0, 1]; of a label map the indices of its labels, (H, W, 1)."""
    predictions: Mapping[str, tuple[np.ndarray, str]]
    """Name -> a picture like the truth, and its figures."""
    aspect: float = 1.0
    """Height of a pixel over its width."""
    outlines: Mapping[str, np.ndarray] = field(default_factory=dict)
    """TRUTH or the name of a prediction -> what to `outline` on its picture, (H, W)."""


TRUTH = "held out"


def draw_montage(
    path: Path,
    rows: Sequence[Row],
    mask: bool = False,
    errors_below: bool = False,
    labels: LabelTable | None = None,
) -> None:
    """Each row's truth and predictions with their figures, and beside or below these each one's error.

    Errors of images are absolute differences (the mean over channels) on one scale for all; errors of masks are in
    colours. labels: of indices in pictures and outlines.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(rows[0].predictions)
    errors = [
        {name: _error(image, row.truth, mask, labels) for name, (image, _) in row.predictions.items()}
        for row in rows
    ]
    worst = 1.0 if mask else max(float(np.percentile(e, 99.8)) for found in errors for e in found.values())
    worst = max(worst, 1e-3)
    columns, scale_column = (1 + len(names), 1) if errors_below else (1 + 2 * len(names), 1 + len(names))
    cell = 2.4  # inches wide
    gap, head, foot = 0.3, 0.35, 0.55  # inches, for captions, titles and the scale
    talls = [min(max(cell * row.truth.shape[0] * row.aspect / row.truth.shape[1], 0.6), 4.0) for row in rows]
    lines = 2 if errors_below else 1
    size = columns * cell, lines * sum(tall + gap for tall in talls) + head + foot
    figure = Figure(figsize=size, facecolor="black")
    FigureCanvasAgg(figure)

    def show(
        top: float, tall: float, column: int, picture: np.ndarray, caption: str, aspect: float, **looks: Any
    ) -> Any:
        place = column * cell / size[0], (top - tall) / size[1], 0.97 * cell / size[0], tall / size[1]
        axes = figure.add_axes(place)
        shown = axes.imshow(picture, aspect=aspect, interpolation="nearest", **looks)
        axes.axis("off")
        axes.set_title(caption, color="0.8", fontsize=9, pad=3)
        return shown

    def title(column: int, words: str) -> None:
        middle = (column + 0.485) * cell / size[0]
        figure.text(middle, 1 - 0.2 / size[1], words, color="white", ha="center", va="center", fontsize=11)

    grey: dict[str, Any] = {"cmap": "gray", "vmin": 0, "vmax": 1}
    looks: dict[str, Any] = {} if mask else {"cmap": "inferno", "vmin": 0, "vmax": worst}
    heat: Any = None
    top = size[1] - head
    for row, tall, found in zip(rows, talls, errors, strict=True):
        top -= gap - 0.05
        pictures = {TRUTH: (row.truth, row.name), **row.predictions}
        for column, (name, (image, caption)) in enumerate(pictures.items()):
            shown = show(top, tall, column, _picture(image, mask, labels), caption, row.aspect, **grey)
            if name in row.outlines:
                outline(shown.axes, row.outlines[name], labels)
        if errors_below:
            top -= tall + gap
        for column, error in enumerate(found.values(), scale_column):
            heat = show(top, tall, column, error, "its error" if errors_below else "", row.aspect, **looks)
        top -= tall + 0.05
    for column, name in enumerate((TRUTH, *names)):
        title(column, name)
    for column, name in enumerate(() if errors_below else names, scale_column):
        title(column, f"error of {name}")

    first = scale_column * cell
    if mask:
        meanings = [(_MISSING, "missed"), (_SURPLUS, "too much"), (_BOTH, "both")]
        for order, (colour, words) in enumerate(
            meanings + [(_OTHER, "another label")] * (labels is not None)
        ):
            x = (first + 0.05 + order * 1.08) / size[0]
            figure.text(x, 0.3 / size[1], "■ " + words, color=colour, fontsize=10, va="center")
    else:
        bar = figure.add_axes(
            (first / size[0], 0.32 / size[1], (len(names) - 0.03) * cell / size[0], 0.09 / size[1])
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


def outline(axes: Any, mask: np.ndarray, labels: LabelTable | None = None, **where: Any) -> None:
    """Draws the edge of a mask (H, W) in [0, 1], or of each of ``labels``, given indices (H, W)."""
    if mask.dtype.kind == "f":
        if mask.min() < 0.5 <= mask.max():
            axes.contour(mask, [0.5], colors=[ACCENT], linewidths=1.0, **where)
        return
    for number in np.unique(mask[mask > 0]).tolist():
        colour = ACCENT if labels is None else np.array(labels.labels[number - 1].colour) / 255
        axes.contour((mask == number).astype(np.float32), [0.5], colors=[colour], linewidths=1.0, **where)


def cropped(rows: Sequence[Row]) -> list[Row]:
    """Rows of masks of one size without most of what surrounds the masks."""
    box = _box(
        [image for row in rows for image in (row.truth, *(image for image, _ in row.predictions.values()))]
    )
    return [
        replace(
            row,
            truth=row.truth[box],
            predictions={name: (image[box], words) for name, (image, words) in row.predictions.items()},
            outlines={name: mask[box] for name, mask in row.outlines.items()},
        )
        for row in rows
    ]


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


def _picture(image: np.ndarray, mask: bool, labels: LabelTable | None) -> np.ndarray:
    """(H, W) or (H, W, 3) in [0, 1]: an image, a mask's inside, or the colours of a label map."""
    image = np.asarray(image, np.float32)
    if not mask:
        return image[:, :, 0] if image.shape[2] == 1 else image
    index = _index(image, labels)
    if labels is None:
        return index.astype(np.float32)
    palette = np.array([(0, 0, 0), *(label.colour for label in labels)], np.float32) / 255
    picture: np.ndarray = palette[index]
    return picture


def _index(mask: np.ndarray, labels: LabelTable | None) -> np.ndarray:
    """(H, W): 1 inside a mask (H, W, C); indices of labels (H, W, 1) as they are."""
    return (mask.mean(2) >= 0.5).astype(np.uint8) if labels is None else mask[:, :, 0].astype(int)


def _error(image: np.ndarray, frame: np.ndarray, mask: bool, labels: LabelTable | None) -> np.ndarray:
    """Absolute differences (H, W); of masks the colours of what they have in common and what not, (H, W, 3)."""
    if not mask:
        return np.abs(image - frame).mean(2)
    predicted, truth = _index(image, labels), _index(frame, labels)
    out = np.zeros((*truth.shape, 3), np.float32)
    for where, colour in (
        ((predicted == truth) & (truth > 0), _BOTH),
        ((truth > 0) & (predicted == 0), _MISSING),
        ((predicted > 0) & (truth == 0), _SURPLUS),
        ((predicted > 0) & (truth > 0) & (predicted != truth), _OTHER),
    ):
        out[where] = colour
    return out


def draw_cuts(
    path: Path,
    stacks: Mapping[str, np.ndarray],
    masks: Mapping[str, np.ndarray],
    spacing: tuple[float, float, float],
    views: Sequence[SideView],
    window: tuple[float, float] = (0.0, 1.0),
    labels: LabelTable | None = None,
) -> None:
    """Stacks of slices from the side, where in-betweens show.

    stacks: name -> (D, H, W) in [0, 1]; masks: the same names, (D, H, W), what to `outline` where there is something.
    spacing: of column, row and slice. window: the values that are black and white. The cuts run through the middle of
    the first mask, else of the stack.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shape = next(iter(stacks.values())).shape
    inside = next(iter(masks.values()), np.zeros(shape, np.uint8))
    _, row, column = middle_of(inside >= 0.5)
    cell, gap = 4.0, 0.3  # inches: width of a picture, space above it
    pictures = {
        view: {name: view.cut(stack, row, column) for name, stack in stacks.items()} for view in views
    }
    talls = []
    for view in views:
        height, width = next(iter(pictures[view].values())).shape
        talls.append(min(max(cell * height * view.aspect(spacing) / width, 0.7), 4.5))
    total = len(stacks) * cell, sum(talls) + gap * len(views) + 0.45
    figure = Figure(figsize=total, facecolor="black")
    FigureCanvasAgg(figure)
    bottom = total[1] - 0.35
    for place, name in enumerate(stacks):
        middle = (place + 0.5) * cell / total[0]
        figure.text(middle, 1 - 0.2 / total[1], name, color="white", fontsize=12, ha="center", va="center")
    for view, tall in zip(views, talls, strict=True):
        bottom -= tall + gap
        for place, (name, picture) in enumerate(pictures[view].items()):
            axes = figure.add_axes(
                (place * cell / total[0], bottom / total[1], 0.98 * cell / total[0], tall / total[1])
            )
            axes.imshow(
                picture,
                cmap="gray",
                vmin=window[0],
                vmax=window[1],
                aspect=view.aspect(spacing),
                interpolation="nearest",
            )
            if name in masks:
                outline(axes, view.cut(masks[name], row, column), labels)
            axes.axis("off")
            axes.set_title(view.name, color="0.8", fontsize=10, pad=3)
    with atomic_write(path, sync=False) as temporary:
        figure.savefig(temporary, dpi=_DPI, facecolor="black")
