"""Tables of the measurements of presets.py, and whether the presets reach their goals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.common import table
from benchmarks.heldout import CLASSICAL

Row = dict[str, Any]
Place = tuple[str, int]  # case, keep
Found = dict[Place, dict[str, Row]]  # by place and label, labels in the order of the columns

IMAGE_METHODS = ("linear", "cubic", "flow")
WIDEST = 9  # up to so many methods get a column each; more get a row each


def tables(rows: Sequence[Row]) -> list[str]:
    """Tables of images, masks, the cost of the models and goals: those that are not empty."""
    found = _labelled(rows)
    wide = len({label for methods in found.values() for label in methods}) <= WIDEST
    parts = [_scores(found, "img", wide), _scores(found, "seg", wide), _costs(found), _goals(found)]
    return [part for part in parts if part]


def _labelled(rows: Sequence[Row]) -> Found:
    """Classical methods first, then models, with their pipeline where a method has several."""
    order = list(CLASSICAL)
    found: Found = {}
    for row in sorted(
        rows, key=lambda row: order.index(row["method"]) if row["method"] in order else len(order)
    ):
        place = row["case"], row["keep"]
        same = [
            other
            for other in rows
            if (other["case"], other["keep"], other["method"]) == (*place, row["method"])
        ]
        label = f"{row['method']} ({row['pipeline']})" if len(same) > 1 else row["method"]
        found.setdefault(place, {})[label] = row
    return found


# ---- scores ----------------------------------------------------------------------------------------------------------


def _heldout(row: Row, kind: str) -> dict[str, float] | None:
    return row[kind]["heldout"] if kind in row else None


def _scores(found: Found, kind: str, wide: bool) -> str:
    """Scores of held-out frames, one row per place, or with many methods one row per method; the best is bold."""
    places = [place for place, rows in found.items() if any(kind in row for row in rows.values())]
    labels = list(
        dict.fromkeys(label for place in places for label, row in found[place].items() if kind in row)
    )
    if not places:
        return ""
    names = ["dice"] if kind == "seg" else ["psnr", "ssim"]
    if kind == "img" and any("lpips" in (_heldout(r, kind) or {}) for p in places for r in found[p].values()):
        names.append("lpips")
    cells: dict[tuple[Place, str], str | None] = {}
    for place in places:
        scored = {label: _heldout(found[place].get(label, {}), kind) for label in labels}
        best = max(values[names[0]] for values in scored.values() if values)
        for label, values in scored.items():
            text = values and " / ".join(
                f"{values[n]:.2f}" if n == "psnr" else f"{values[n]:.4f}" for n in names
            )
            cells[place, label] = f"**{text}**" if values and values[names[0]] == best else text
    title = "masks, Dice" if kind == "seg" else "images, " + " / ".join(name.upper() for name in names)
    if wide:
        rows = [
            [place[0], f"1/{place[1]}", *(cells[place, label] or "-" for label in labels)] for place in places
        ]
        return table([f"{title}: case", "kept", *labels], rows)
    rows = [[label, *(cells[place, label] or "-" for place in places)] for label in labels]
    return table([f"{title}: method", *(f"{case}, 1/{keep}" for case, keep in places)], rows)


def _costs(found: Found) -> str:
    rows = [
        [
            case,
            f"1/{keep}",
            label,
            row["pipeline"],
            f"{row['img']['training']['psnr']:.2f}" if "img" in row else "-",
            f"{row['seg']['training']['dice']:.4f}" if "seg" in row else "-",
            row["gaussians"],
            row["iterations"],
            f"{row['seconds']:.0f}" if row["seconds"] else "-",
            f"{row['iterations_per_s']:.0f}" if row["iterations_per_s"] else "-",
            row["jobs"],
            device(row),
        ]
        for (case, keep), methods in found.items()
        for label, row in methods.items()
        if "pipeline" in row
    ]
    headers = [
        "case",
        "kept",
        "model",
        "pipeline",
        "training frames, PSNR",
        "Dice",
        "Gaussians",
        "iterations",
    ]
    return table([*headers, "s", "it/s", "side by side", "on"], rows) if rows else ""


def device(row: Row) -> str:
    about = row["about"]
    return about["machine"] if about["device"] == "cpu" else about["device"]


# ---- goals -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Goal:
    """A figure for one place, and its least wanted value (or, if ``at_most``, the greatest)."""

    place: Place
    name: str
    value: float
    bound: float
    at_most: bool = False

    @property
    def met(self) -> bool:
        return self.value <= self.bound if self.at_most else self.value >= self.bound

    def __str__(self) -> str:
        shown = f"{self.value:.2f}" if self.at_most else f"{self.value:+.4f}" if "dB" not in self.name else ""
        shown = shown or f"{self.value:+.2f}"
        return shown if self.met else f"**{shown}, missed**"


def goals(rows: Sequence[Row]) -> list[Goal]:
    """The goals of --preset best and --preset fast, wherever the rows allow a verdict."""
    return [goal for place, methods in _labelled(rows).items() for goal in _goals_of(place, methods)]


def _goals_of(place: Place, methods: dict[str, Row]) -> Iterator[Goal]:
    best, published, fast = (methods.get(name) for name in ("best", "published", "fast"))
    if best and "img" in best:
        classical = [methods[name]["img"]["heldout"] for name in IMAGE_METHODS if name in methods]
        ours = best["img"]["heldout"]
        if len(classical) == len(IMAGE_METHODS):  # the strongest may be the missing one
            margin = ours["psnr"] - max(scores["psnr"] for scores in classical)
            yield Goal(place, "best: dB above classical, ≥ 0.5", margin, 0.5)
            margin = ours["ssim"] - max(scores["ssim"] for scores in classical)
            yield Goal(place, "its SSIM, ≥ 0", margin, 0)
    if best and "seg" in best:
        for name in ("sdf", "sdf along flow"):
            if name in methods:
                margin = best["seg"]["heldout"]["dice"] - methods[name]["seg"]["heldout"]["dice"]
                yield Goal(place, f"its Dice above {name}, > 0", margin, 1e-6)
    if best and published:
        kind = "img" if "img" in best else "seg"
        margin = best[kind]["training"]["psnr"] - published[kind]["training"]["psnr"]
        yield Goal(place, "its training frames, dB against published, ≥ -1", margin, -1)
        alone = all(row["jobs"] == 1 and row["seconds"] for row in (best, published))
        if alone and device(best) == device(published):
            ratio = best["seconds"] / published["seconds"]
            yield Goal(place, "its time / published, ≤ 1.5", ratio, 1.5, at_most=True)
    if fast and published:
        if "img" in fast:
            margin = fast["img"]["heldout"]["psnr"] - published["img"]["heldout"]["psnr"]
            yield Goal(place, "fast: dB against published, ≥ 0", margin, 0)
        if "seg" in fast:
            margin = fast["seg"]["heldout"]["dice"] - published["seg"]["heldout"]["dice"]
            yield Goal(place, "its Dice against published, ≥ 0", margin, 0)


def _goals(found: Found) -> str:
    reached = [goal for place, methods in found.items() for goal in _goals_of(place, methods)]
    if not reached:
        return ""
    names = list(dict.fromkeys(goal.name for goal in reached))
    cells = {(goal.place, goal.name): str(goal) for goal in reached}
    rows = [[name, *(cells.get((place, name), "-") for place in found)] for name in names]
    text = table(["goal", *(f"{case}, 1/{keep}" for case, keep in found)], rows)
    met = sum(goal.met for goal in reached)
    return f"{text}\n\n{met} of {len(reached)} are met. One run each: a rerun with another seed moves the last digits."
