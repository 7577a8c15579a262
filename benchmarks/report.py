"""The contents of results/ as tables: all of it for the documentation, two headline tables for README.md.

python -m benchmarks.report    # writes the two into README.md
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import interpolators, label_cost, organs, uncertainty
from benchmarks.against_gsplat import scenes_table
from benchmarks.common import RESULTS, ROOT, surface_table, table
from benchmarks.floors import floors_note, floors_table
from benchmarks.iterations import growth_line, large_table, phases_table, runs_table
from benchmarks.preset_tables import device, tables
from benchmarks.presets import PRESETS, read_rows
from utils.errors import UserError, run

README = ROOT / "README.md"
PUBLISHED, CURRENT = (RESULTS / "presets" / name for name in ("h200.json", "h100.json"))
PREDICTION = RESULTS / "interpolators.json"
WHOLE = {"cpu.json": "2 CPU cores", "h100.json": "NVIDIA H100"}
"""Files of minutes/."""
SUBJECTS = {  # of the cases that were measured: images, masks
    "mri_mni152_wm": ("T1 brain", "white matter of the brain"),
    "ct_abdomen_liver30": ("CT abdomen", "liver, CT"),
    "us_echo_cine30": ("cardiac ultrasound", ""),
    "us_prostate_mask": ("", "prostate"),
}


def speed(results: list[dict[str, Any]]) -> Iterator[str]:
    """Paragraphs: where it was measured, then a table for each section measured."""
    for result in results:
        about = result["about"]
        sections = {name: entry for name, entry in result["sections"].items() if "skipped" not in entry}
        cores = f"{about['machine']}, {about['cores']} cores"
        gpu = f"{about['device']}, driver {about['driver']}, on " if about["device"] != "cpu" else ""
        yield f"**{gpu}{cores}**; torch {about['torch']}, commit {about['commit']}, {about['date']}"
        if "throughput" in sections:
            yield _throughput(sections["throughput"])
        yield _ratios(sections)
        if "iteration" in sections:
            yield _iteration(sections["iteration"])
        if "growth" in sections:
            yield _growth(sections["growth"])
        for name, parts in SECTIONS.items():
            if name in sections:
                yield from (part(sections[name]) for part in parts)


SECTIONS: dict[str, tuple[Callable[[dict[str, Any]], str], ...]] = {
    "gsplat": (scenes_table,),
    "floors": (floors_table, floors_note),
    "training": (
        lambda section: runs_table(section["runs"]),
        lambda section: phases_table(section["runs"]),
        lambda section: f"`--deterministic` takes {section['price_of_deterministic']:.3g} times as long.",
    ),
    "large": (large_table, lambda section: growth_line(section) + "."),
}
"""Paragraphs of each."""


def _throughput(section: dict[str, Any]) -> str:
    runs, scene = section["runs"], section["scene"]
    labels = [f"{r['threads']} thread(s)" if r["threads"] else "GPU" for r in runs]
    size = f"{scene['gaussians']} Gaussians, {scene['views']} views of {scene['width']} x {scene['height']}"
    rows: list[list[object]] = [
        [f"{phase}, ms", *(1e3 * r["phases_s"][phase] for r in runs)] for phase in runs[0]["phases_s"]
    ]
    for name, key in (("blend and its backward", "blend"), ("all", "all")):
        rows.append(
            [
                f"useful pairs per second and core, {name}, M",
                *(r[f"useful_per_s_core_{key}"] / 1e6 for r in runs),
            ]
        )
    if all("floor_share_blend" in r for r in runs):
        for name, key in (("blend and its backward", "blend"), ("all", "all")):
            rows.append([f"floor, % of {name}", *(100 * r[f"floor_share_{key}"] for r in runs)])
    return table([size, *labels], rows)


def _ratios(sections: dict[str, Any]) -> str:
    rows: list[list[object]] = []
    for name, what in (
        ("oracle", "dense oracle / compiled"),
        ("operators", "general, once per view / folded"),
    ):
        if name in sections:
            section = sections[name]
            on_device = [section["device_ratio"]] if "device_ratio" in section else []
            rows.append([what, section["scene"], section["ratio"], *on_device])
    headers = ["time of / time of", "scene", "ratio on the clock", "on the device"]
    return table(headers[: len(rows[0])], rows) if rows else ""


def _iteration(section: dict[str, Any]) -> str:
    stages = list(next(iter(section.values()))["stages_s"])
    rows: list[list[object]] = []
    for stage in stages:
        shares = (100 * r["stages_s"][stage] / sum(r["stages_s"].values()) for r in section.values())
        rows.append([f"{stage}, %", *shares])
    rows.append(["Gaussians", *(r["gaussians"] for r in section.values())])
    rows.append(["it/s", *(r["iterations_per_s"] for r in section.values())])
    return table(["iteration of train.py", *section], rows)


def _growth(section: dict[str, Any]) -> str:
    kind = "device_seconds" if all("device_seconds" in c for c in section.values()) else "seconds"
    rows = [
        [name, f"{curve['sizes'][0]} to {curve['sizes'][-1]}"]
        + [1e3 * curve[kind][i] for i in (0, -1)]
        + [curve["exponent"]]
        for name, curve in section.items()
    ]
    ms = "ms on the device" if kind == "device_seconds" else "ms"
    return table(["forward and backward over", "from, to", ms, "to", "last exponent"], rows)


def presets(path: Path) -> Iterator[str]:
    """Paragraphs: where a file of presets.py was measured, then its tables."""
    rows = read_rows(path)
    abouts = [row["about"] for row in rows if "pipeline" in row] or [row["about"] for row in rows]
    of = sorted({", ".join(str(about[k]) for k in ("torch", "commit", "date")) for about in abouts})
    on = sorted({device(row) for row in rows})
    yield f"**presets/{path.name}**, on {', '.join(on)}; torch, commit, date: {'; '.join(of)}"
    yield from tables(rows)


def refusals(result: dict[str, Any]) -> str:
    """How many invalid calls each operator refused, by device."""
    devices = [name for name in ("cpu", "cuda") if name in result]
    rows = [
        [operator, *(str(result[name]["by_operator"].get(operator, 0)) for name in devices)]
        for operator in result[devices[0]]["by_operator"]
    ]
    rows.append(
        ["refused / tried", *(f"{result[name]['refused']} / {result[name]['tried']}" for name in devices)]
    )
    return table(["invalid calls refused", *(result[name]["device"] for name in devices)], rows)


def recorded() -> str:
    """Every table, as Markdown."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))]
    results = [result for result in found if "sections" in result]
    lines = [
        json.loads(line)
        for path in sorted(RESULTS.glob("*.jsonl"))
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    parts = [part for part in speed(results) if part]
    for path in sorted((RESULTS / "presets").glob("*.json")):
        parts += presets(path)
    for path in sorted((RESULTS / "organs").glob("*.json")):
        parts += several_organs(path)
    for path in sorted((RESULTS / "between").glob("*.json")):
        parts += between(path)
    meshed = [line for line in lines if "surfaces" in line]
    if meshed:
        parts.append(surface_table(meshed))
    parts += [refusals(result) for result in found if "refused" in result.get("cpu", {})]
    return "\n\n".join(parts or ["Nothing is recorded yet."])


def between(path: Path) -> Iterator[str]:
    """Paragraphs: where a file of interpolators.py or uncertainty.py was measured, then its tables."""
    rows = json.loads(path.read_text(encoding="utf-8"))
    places = {}
    for row in rows:
        about = row["about"]
        on = about["device"] if about["device"] != "cpu" else f"{about['machine']}, {about['cores']} cores"
        places[f"{on}, commit {about['commit']}, {about['date']}"] = None
    program = "interpolators" if "method" in rows[0] else "uncertainty"
    yield f"**between/{path.name}**, by `python -m benchmarks.{program}`, on {'; '.join(places)}"
    yield from interpolators.tables(rows) if program == "interpolators" else [uncertainty.tables(rows)]


def several_organs(path: Path) -> Iterator[str]:
    """Paragraphs: where a file of organs.py or label_cost.py was measured, then its tables."""
    told = json.loads(path.read_text(encoding="utf-8"))
    about, rows = told["about"], told["rows"]
    on = about["device"] if about["device"] != "cpu" else f"{about['machine']}, {about['cores']} cores"
    yield f"**organs/{path.name}**, on {on}; torch {about['torch']}, {about['date']}: `{told['command']}`"
    yield from organs.tables(rows) if "dice" in rows[0] else [label_cost.cost_table(rows)]


# ---- the two tables of README.md -------------------------------------------------------------------------------------


def quality() -> str:
    """Held-out frames: the best classical method, `interpolate.py` and the presets; PSNR in dB, Dice for masks."""
    found: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
    current = read_rows(CURRENT)
    measured = {(row["case"], row["keep"]) for row in current if row["method"] == "best"}
    published = [row for row in read_rows(PUBLISHED) if row["method"] == "published"]
    for row in [*published, *current]:
        if (row["case"], row["keep"]) in measured and row["method"] != "prediction":
            found.setdefault((row["case"], row["keep"]), {})[row["method"]] = row
    models = [name for name in PRESETS if any(name in methods for methods in found.values())]
    untrained = json.loads(PREDICTION.read_text(encoding="utf-8"))["rows"]
    predicted = {
        (row["case"], row["keep"], kind): row[kind]
        for row in untrained
        for kind in ("img", "seg")
        if row["method"] == "ours" and kind in row
    }
    rows = []
    for kind, score in (("img", "psnr"), ("seg", "dice")):
        for (case, keep), methods in found.items():
            subject = SUBJECTS[case][kind == "seg"]
            values = {name: row[kind]["heldout"][score] for name, row in methods.items() if kind in row}
            if not subject or not values:
                continue
            classical = max((value, name) for name, value in values.items() if name not in PRESETS)
            values["interpolate.py"] = predicted[case, keep, kind][score]
            shown = [f"{value:.2f}" if kind == "img" else f"{value:.4f}" for value in values.values()]
            text = dict(zip(values, shown, strict=True))
            best = max(("interpolate.py", *models), key=values.__getitem__)
            text[best] = f"**{text[best]}**"
            what = f"{subject}, {'dB' if kind == 'img' else 'Dice'}"
            strongest = f"{text[classical[1]]} ({classical[1]})"
            ours = map(text.get, ("interpolate.py", *models))
            rows.append([what, {2: "2nd", 4: "4th"}[keep], text["linear"], strongest, *ours])
    headers = ["held-out frames of", "kept", "linear", "best classical", "interpolate.py", *models]
    return table(headers, rows)


def pace() -> str:
    """What each preset gives, and when: whole processes, on a CPU and on a GPU."""
    found: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for name in WHOLE:
        path = RESULTS / "minutes" / name
        for row in json.loads(path.read_text(encoding="utf-8")) if path.exists() else ():
            if not row["options"]:
                found.setdefault((_what(row), row["preset"]), {})[name] = row
    order = [*reversed(PRESETS)]
    rows = [
        [what, preset, *(_when(rows.get(name)) for name in WHOLE)]
        for (what, preset), rows in sorted(found.items(), key=lambda one: order.index(one[0][1]))
    ]
    return table(["train.py, whole process", "preset", *WHOLE.values()], rows)


_BUSY = 1.5  # load per core above which seconds on the clock mean little
_KEPT_BUSY = 0.8  # of the cores on a quiet CPU: measured with quick


def _what(row: dict[str, Any]) -> str:
    image, _ = SUBJECTS[row["case"]]
    size = f", {' × '.join(map(str, row['upsampled']))}" if row.get("upsampled") else ""
    taught = "images and masks" if row["pipeline"] == "joint" else "images"
    return f"{image}{size}, {'every' if row['keep'] == 1 else 'every 2nd slice'}, {taught}".replace(
        ", every,", ", all slices,"
    )


def _when(row: dict[str, Any] | None) -> str:
    """Seconds, and what they gave: on slices left out, where there are any."""
    if row is None:
        return ""
    frames = "heldout" if row["keep"] > 1 else "training"
    scores = {score["task"]: score for score in row["scores"] if score["frames"] == frames}
    found = [f"{scores['img']['psnr']:.1f} dB"]
    if "seg" in scores:
        found.append(f"Dice {scores['seg']['dice']:.4f}")
    seconds, about = row["train.py"]["whole process"], ""
    if row["about"]["device"] == "cpu" and row["load"] > _BUSY * row["about"]["cores"]:
        seconds, about = row["processors"]["train.py"] / (_KEPT_BUSY * row["about"]["cores"]), "about "
    return f"{about}{seconds:.0f} s: {', '.join(found)}"


TABLES = {"quality": quality, "speed": pace}


def with_tables(text: str) -> str:
    """README.md's text with its tables from the current results."""
    for name, make in TABLES.items():
        begin, end = f"<!-- {name}: written by benchmarks/report.py -->\n", "<!-- end -->"
        head, found, rest = text.partition(begin)
        _, ended, tail = rest.partition(end)
        if not found or not ended:
            raise UserError(f"README.md has lost its markers: put back {begin.strip()} and {end.strip()}")
        text = f"{head}{begin}\n{make()}\n\n{end}{tail}"
    return text


def main() -> None:
    README.write_text(with_tables(README.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    run(main)
