"""What many cases came to: one row each in `summary.csv` and `summary.html`, then the cohort's mean and spread."""

from __future__ import annotations

import base64
import csv
import html
import io
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from cases.case import REPORT, CaseResult
from cases.steps import STOPPED
from utils.errors import UserError
from utils.files import atomic_write

THUMBNAIL = (160, 120)  # px
_SCORES = {
    "img/heldout/model/psnr": ("PSNR held out, dB", 2),
    "img/heldout/model/ssim": ("SSIM held out", 4),
    "seg/heldout/model/dice": ("Dice held out", 4),
    "img/training/model/psnr": ("PSNR of frames, dB", 2),
}
_CLASSICAL = {"img": "psnr", "seg": "dice"}  # by which score a model is held against classical interpolation


@dataclass
class SummaryRow:
    """One case. state: done, failed, stopped or waiting. seconds: of all its steps and attempts."""

    name: str
    state: str
    reason: str
    seconds: float
    attempts: int
    scores: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def summarise(out: Path, names: Sequence[str]) -> list[SummaryRow]:
    """Read every case's folder, and write both summaries into `out`."""
    rows = [_row(out / name, name) for name in names]
    _write_csv(out / "summary.csv", rows)
    _write_html(out / "summary.html", out, rows)
    return rows


def _row(folder: Path, name: str) -> SummaryRow:
    result = CaseResult(folder)
    try:
        record, scores = result.record, result.scores
    except (UserError, ValueError, KeyError) as error:
        return SummaryRow(name, "failed", str(error), 0.0, 0)
    steps = record.steps.values()
    stopped = any(step.status in STOPPED for step in steps)
    state = "waiting"
    if record.failure:
        state = "stopped" if stopped else "failed"
    elif steps and not result.missing:
        state = "done"
    seconds, attempts = sum(step.seconds for step in steps), max((step.attempts for step in steps), default=0)
    return SummaryRow(name, state, record.failure, seconds, attempts, scores, _warnings(scores))


def _warnings(scores: dict[str, float]) -> list[str]:
    """Where a model is worse than what needs no training."""
    found = []
    for task, score in _CLASSICAL.items():
        ours = scores.get(f"{task}/heldout/model/{score}")
        others = {
            place.split("/")[2]: value
            for place, value in scores.items()
            if place.startswith(f"{task}/heldout/") and place.endswith(f"/{score}") and "/model/" not in place
        }
        better = [method for method, value in others.items() if ours is not None and value > ours]
        if better:
            found.append(f"{task}: {', '.join(better)} is better on held-out slices")
    return found


def _cohort(rows: Sequence[SummaryRow], place: str) -> tuple[float, float] | None:
    values = [row.scores[place] for row in rows if place in row.scores]
    if not values:
        return None
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def _write_csv(path: Path, rows: Sequence[SummaryRow]) -> None:
    places = sorted({place for row in rows for place in row.scores})
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["case", "state", "reason", "seconds", "attempts", "warnings", *places])
        for row in rows:
            scores = [row.scores.get(place, "") for place in places]
            told = "; ".join(row.warnings)
            writer.writerow(
                [row.name, row.state, row.reason, f"{row.seconds:.1f}", row.attempts, told, *scores]
            )
        found = [_cohort(rows, place) for place in places]
        for label, which in (("mean", 0), ("standard deviation", 1)):
            writer.writerow([label, *[""] * 5, *(one[which] if one else "" for one in found)])


def _write_html(path: Path, out: Path, rows: Sequence[SummaryRow]) -> None:
    shown = [place for place in _SCORES if any(place in row.scores for row in rows)]
    head = "".join(f"<th>{html.escape(_SCORES[place][0])}</th>" for place in shown)
    body = "\n".join(_html_row(out, row, shown) for row in rows)
    cohort = ""
    if shown:
        cells = []
        for place in shown:
            found = _cohort(rows, place)
            digits = _SCORES[place][1]
            cells.append(f"<td>{found[0]:.{digits}f} ± {found[1]:.{digits}f}</td>" if found else "<td></td>")
        name = "mean ± standard deviation"
        cohort = f"<tr class=cohort><td></td><td>{name}</td><td></td>{''.join(cells)}<td></td><td></td></tr>"
    done = sum(row.state == "done" for row in rows)
    page = f"""<!doctype html><html lang=en><meta charset=utf-8><title>MedGS: {len(rows)} cases</title>
<style>
body{{font:15px/1.45 system-ui,sans-serif;margin:2rem;color:#1b1f24;background:#fff}}
table{{border-collapse:collapse}} th,td{{padding:.35rem .8rem;text-align:left;border-bottom:1px solid #d8dde3}}
td.number{{font-variant-numeric:tabular-nums}} img{{display:block;border-radius:3px}}
.failed,.stopped{{color:#a33a00;font-weight:600}} .done{{color:#0b6e4f}} .cohort td{{border-top:2px solid #1b1f24}}
</style>
<h1>{done} of {len(rows)} cases done</h1>
<table><thead><tr><th></th><th>case</th><th>state</th>{head}<th>minutes</th><th>notes</th></tr></thead>
<tbody>
{body}
{cohort}</tbody></table></html>
"""
    with atomic_write(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _html_row(out: Path, row: SummaryRow, shown: Sequence[str]) -> str:
    name, picture = html.escape(row.name), _thumbnail(out / row.name)
    if (out / row.name / REPORT).exists():
        link = f'<a href="{html.escape(row.name)}/{REPORT}">'
        name, picture = f"{link}{name}</a>", f"{link}{picture}</a>"
    scores = "".join(
        f"<td class=number>{row.scores[place]:.{_SCORES[place][1]}f}</td>"
        if place in row.scores
        else "<td></td>"
        for place in shown
    )
    notes = "<br>".join(html.escape(note) for note in ([row.reason] if row.reason else []) + row.warnings)
    return (
        f"<tr><td>{picture}</td><td>{name}</td><td class={row.state}>{row.state}</td>{scores}"
        f"<td class=number>{row.seconds / 60:.1f}</td><td>{notes}</td></tr>"
    )


def _thumbnail(folder: Path) -> str:
    """The middle render as a small JPEG within the page."""
    files = sorted((folder / "images").glob("*.png"))
    if not files:
        return ""
    try:
        with Image.open(files[len(files) // 2]) as image:
            if image.mode.startswith("I;16"):
                image = image.point(lambda value: value / 256).convert("L")
            small = image.convert("RGB")
    except OSError:  # cut short: the page of the other cases does without
        return ""
    small.thumbnail(THUMBNAIL)
    packed = io.BytesIO()
    small.save(packed, "JPEG", quality=80)
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(packed.getvalue()).decode()}">'
