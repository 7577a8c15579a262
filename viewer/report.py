"""The report of a case in one file: the model, its data, its scores and pictures."""

from __future__ import annotations

import hashlib
import io
import json
import platform
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.ndimage import binary_erosion, zoom

from arguments import TrainOptions
from patient.meshes import in_space
from patient.side_views import side_views
from pictures.figures import draw_cuts
from pictures.pages import document, escape, picture, picture_file
from pictures.shading import shade_all
from scene.checkpoint import load_checkpoint
from training.reports import EVALUATION_FILE, NAMES
from utils.errors import UserError
from utils.files import atomic_write
from utils.version import VERSION
from viewer.case import Case, meshes_of, train_options_of
from viewer.pages import STYLE, solid

_MOST_PICTURES = 90  # of the slider
_SHOWN_WIDE = 420  # px of a picture in the slider
_FEW_FRAMES = 8
_LINES = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#000000")  # Okabe and Ito's
_UNDECIDED = 0.2  # share of a mask's area that is neither in nor out, above which the report warns

_STYLE = (
    STYLE
    + """
main { max-width: 1080px; margin: 0 auto; padding: 24px 22px 60px; }
h1 { font-size: 24px; margin: 0 0 4px; }
h2 { font-size: 16px; margin: 34px 0 10px; border-bottom: 1px solid var(--line); padding-bottom: 4px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 14px 4px 0; text-align: left; border-bottom: 1px solid var(--line); font-weight: normal; }
th { color: var(--faint); font-size: 12.5px; }
.spot { display: inline-block; width: 11px; height: 11px; border-radius: 2px; margin-right: 7px; }
td.best { color: var(--good); font-weight: 700; }
.warnings { border-left: 4px solid var(--warn); background: var(--panel); padding: 8px 14px; margin: 14px 0; }
.warnings li { margin: 4px 0; }
.well { border-color: var(--good); }
.summary { font-size: 15px; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 12px; }
.pair figure { margin: 0; background: #000; text-align: center; border-radius: 4px; overflow: hidden; }
.pair img { width: 100%; max-height: 460px; object-fit: contain; }
figcaption { background: var(--panel); font-size: 13px; padding: 4px; color: var(--text); }
#slider input { width: 100%; }
img.wide { max-width: 100%; border-radius: 4px; }
.curves svg { max-width: 100%; height: auto; background: #fff; border-radius: 4px; }
.options { columns: 3 240px; font-size: 12.5px; overflow-wrap: anywhere; }
.options div { break-inside: avoid; }
.theme { float: right; }
.printed { display: none; }
@media print {
  .theme, #slider input { display: none; }
  .printed { display: block; }
  h2 { break-after: avoid; }
  figure, img, table, .warnings { break-inside: avoid; }
}
"""
)


def write_report(case: Case, path: Path) -> list[str]:
    """Writes the page; returns the run's warnings."""
    folder = Path(case.options.model_path)
    rows = _rows(folder)
    warned = warnings_of(case, rows)
    body = [
        "<main><button class='theme' onclick=\"document.documentElement.classList.toggle('light')\">"
        "Dark or light</button>",
        f"<h1>{escape(case.name)}</h1>",
        f"<p class='summary'>{escape(_summary(case, rows))}</p>",
        _warnings(warned),
        _table(case, rows),
        *_slider(case),
    ]
    cuts = folder / "plots" / "cuts.png"
    if write_cuts(case, cuts):
        body.append(
            "<h2>From the side</h2><p class='faint'>Cuts across the frames show what lies between them.</p>"
            f"<img class='wide' src='{picture_file(cuts)}' alt='Cuts across the frames'>"
        )
    markup, parts, script = solid(case)
    body += ["<h2>Three planes and 3-D</h2>", markup, _printed_mesh(case)]
    for montage in sorted((folder / "plots").glob("*_montage.png")):
        what = "Masks held out" if montage.name.startswith("seg") else "Frames held out"
        body.append(f"<h2>{what}</h2><img class='wide' src='{picture_file(montage)}' alt='{what}'>")
    body += [_curves(folder, rows), _provenance(case), "</main>"]
    frames = json.dumps(_frames(case))
    scripts = [f"mountSlider(document.getElementById('slider'), {frames});", script]
    with atomic_write(path) as temporary:
        temporary.write_text(
            document(f"{case.name} – MedGS", "\n".join(body), parts, scripts, _STYLE), encoding="utf-8"
        )
    return warned


# ---- text ------------------------------------------------------------------------------------------------------------


def _rows(folder: Path) -> list[dict[str, Any]]:
    """The newest scores of ``evaluation.json`` first; none where there is no such file."""
    path = folder / EVALUATION_FILE
    try:
        rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
        return sorted(rows, key=lambda row: -row["iteration"])
    except FileNotFoundError:
        return []
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is damaged: move it out of the way") from error


def _last(rows: list[dict[str, Any]], task: str, frames: str) -> dict[str, dict[str, Any]]:
    """method -> scores at the last iteration."""
    newest = max((row["iteration"] for row in rows), default=0)
    return {
        row["method"]: row
        for row in rows
        if (row["iteration"], row["task"], row["frames"]) == (newest, task, frames)
    }


def _measure(task: str) -> tuple[str, str, str]:
    return ("dice", "Dice", ".4f") if task == "seg" else ("psnr", "PSNR (dB)", ".2f")


def _summary(case: Case, rows: list[dict[str, Any]]) -> str:
    (width, height), model = case.size, case.model
    heldout = len(case.heldout_positions)
    words = [
        f"{model.num_frames} frames of {width} × {height}" + (f", {heldout} held out" if heldout else "")
    ]
    if case.inputs.painted is not None:
        words.append(f"masks given on {len(case.inputs.painted)} of them")
    words += [f"iteration {case.trained.iteration:,}", f"{len(model):,} Gaussians"]
    elapsed = _elapsed(Path(case.options.model_path))
    words += [f"{elapsed:.0f} s of training"] if elapsed else []
    for task, name in (("img", "images"), ("seg", "masks")):
        key, _, digits = _measure(task)
        found = _last(rows, task, "heldout").get("model")
        if found:
            value = f"{found[key]:{digits}}"
            words.append(f"{name} between the frames: {'Dice ' + value if task == 'seg' else value + ' dB'}")
    return "; ".join(words) + "."


def _elapsed(folder: Path) -> float | None:
    try:
        return float(json.loads((folder / "time.json").read_text(encoding="utf-8"))["elapsed"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def warnings_of(case: Case, rows: list[dict[str, Any]]) -> list[str]:
    """What a careful reader should know before trusting the pictures, one sentence each."""
    out = []
    for task, name in (("img", "images"), ("seg", "masks")):
        scores = _last(rows, task, "heldout")
        key, _, digits = _measure(task)
        others = {method: row[key] for method, row in scores.items() if method != "model"}
        if "model" in scores and others:
            best = max(others, key=lambda method: others[method])
            if scores["model"][key] < others[best]:
                out.append(
                    f"Between the frames, {NAMES[best]} interpolation is better on the {name} "
                    f"({others[best]:{digits}} against {scores['model'][key]:{digits}}): train longer, or use that."
                )
    if rows and not any(row["frames"] == "heldout" for row in rows):
        out.append(
            "Nothing was held out, so no score says how good it is between the frames (prepare.py --keep_every 2)."
        )
    trained, tested = _last(rows, "img", "training").get("model"), _last(rows, "img", "heldout").get("model")
    if trained and tested and trained["psnr"] - tested["psnr"] > 10:
        out.append(
            f"The frames it was trained on are {trained['psnr'] - tested['psnr']:.0f} dB better than those held out: "
            "it has memorised them, and guesses in between."
        )
    count = case.model.num_frames
    if count < _FEW_FRAMES:
        out.append(f"{count} frames are few: what lies between them is mostly guessed.")
    if case.has_masks:
        out += _mask_warnings(case)
    if case.unit != "mm":
        out.append("The frames' position in the patient is unknown: positions and volumes are in voxels.")
    if case.inputs.missing:
        out.append(f"The input frames could not be shown: {case.inputs.missing}.")
    return out


def _mask_warnings(case: Case) -> list[str]:
    positions = np.linspace(0, case.model.num_frames - 1, min(case.model.num_frames, 15)).tolist()
    _, masks = case.draw(positions)
    assert masks is not None
    if case.table is not None:
        absent = [label.name for label in case.table if not (masks == label.id).any()]
        words = f"No frame shows {', '.join(absent[:6])}{', ...' if len(absent) > 6 else ''}."
        return [words] if absent else []
    inside, undecided = masks >= 0.5, (masks > 0.2) & (masks < 0.8)
    if not inside.any():
        return ["The masks are empty: no pixel reaches one half."]
    out = []
    if inside.mean() > 0.9:
        out.append(f"The masks are saturated: {inside.mean():.0%} of all pixels are inside.")
    if undecided.sum() > _UNDECIDED * inside.sum():
        out.append(
            "Much of the masks is neither in nor out (between 0.2 and 0.8): their edges are soft. Train longer."
        )
    return out


def _warnings(warned: list[str]) -> str:
    if not warned:
        return "<div class='warnings well'>No warnings: nothing about this run looks unusual.</div>"
    return (
        "<div class='warnings'><ul>" + "".join(f"<li>{escape(text)}</li>" for text in warned) + "</ul></div>"
    )


# ---- pictures --------------------------------------------------------------------------------------------------------


def _table(case: Case, rows: list[dict[str, Any]]) -> str:
    """Scores on held-out frames beside classical methods, the best of each column marked."""
    out = []
    for task, name in (("img", "Images"), ("seg", "Masks")):
        scores = _last(rows, task, "heldout")
        if "model" not in scores:
            continue
        columns = [("psnr", "PSNR (dB)", ".2f"), ("ssim", "SSIM", ".4f"), ("l1", "L1", ".4f")]
        columns = [("dice", "Dice", ".4f"), ("l1", "L1", ".4f")] if task == "seg" else columns
        best = {
            key: (min if key == "l1" else max)(row[key] for row in scores.values()) for key, _, _ in columns
        }
        cells = []
        for method, row in scores.items():
            marks = {
                key: ("<td class='best'>", " ✓") if row[key] == best[key] else ("<td>", "") for key in best
            }
            values = "".join(
                f"{marks[key][0]}{row[key]:{digits}}{marks[key][1]}</td>" for key, _, digits in columns
            )
            cells.append(f"<tr><td>{escape(NAMES[method])}</td>{values}</tr>")
        heads = "".join(f"<th>{title}</th>" for _, title, _ in columns)
        count = scores["model"]["count"]
        out.append(
            f"<h2>{name} between the frames</h2><p class='faint'>{count} frames that training did not see; ✓ marks the "
            f"best of each column.</p><table><tr><th>method</th>{heads}</tr>{''.join(cells)}</table>"
            f"{_label_table(case, scores)}"
        )
    return "".join(out)


def _label_table(case: Case, scores: dict[str, dict[str, Any]]) -> str:
    """The Dice of each label by each method."""
    if case.table is None or "labels" not in scores["model"]:
        return ""
    lines = []
    for label in case.labels:
        values = {method: row["labels"].get(str(label["id"])) for method, row in scores.items()}
        best = max((value for value in values.values() if value is not None), default=None)
        cells = "".join(
            "<td>–</td>"
            if v is None
            else f"<td class='best'>{v:.4f} ✓</td>"
            if v == best
            else f"<td>{v:.4f}</td>"
            for v in values.values()
        )
        spot = f"<i class='spot' style='background: {label['colour']}'></i>"
        lines.append(f"<tr><td>{spot}{escape(label['name'])}</td>{cells}</tr>")
    heads = "".join(f"<th>{escape(NAMES[method])}</th>" for method in scores)
    return (
        f"<p class='faint'>Dice of each label; in the table above it is their mean.</p>"
        f"<table><tr><th>label</th>{heads}</tr>{''.join(lines)}</table>"
    )


def _slider(case: Case) -> list[str]:
    if case.inputs.images is None:
        words = "The rendered sequence."
    else:
        words = "Ours beside the frame at that position, if there is one; the mask is outlined."
    return [
        f"<h2>The sequence</h2><p class='faint'>{words}</p><div id='slider'><div class='pair'>"
        "<figure><img alt='Rendered'><figcaption></figcaption></figure>"
        "<figure><img alt='Input'><figcaption></figcaption></figure></div>"
        "<input type='range' min='0' value='0' step='1' aria-label='Position in the sequence'></div>"
    ]


def _positions(case: Case) -> list[float]:
    """Training frames, held-out frames and positions half-way: as many as a page may hold."""
    last = case.model.num_frames - 1
    places = {float(k) for k in range(last + 1)} | set(case.heldout_positions)
    if len(places) < _MOST_PICTURES / 2:
        places |= {k / 2 for k in range(2 * last + 1)}
    ordered = sorted(place for place in places if place <= last)
    step = max(1, -(-len(ordered) // _MOST_PICTURES))
    return ordered[::step]


def _frames(case: Case) -> list[dict[str, Any]]:
    """What the slider shows: pictures and their captions."""
    out, low, high = [], *_shown_window(case)
    for position in _positions(case):
        images, masks = case.draw([position])
        scores = case.scores(position, images[0])
        entry: dict[str, Any] = {
            "ours": picture(_shown(case, images[0], masks[0] if masks is not None else None, low, high)),
            "caption": f"ours at {position:g}" + (f": {scores['psnr']:.2f} dB" if scores else ", in between"),
            "theirs": None,
            "other": "",
        }
        if scores:
            kind = "heldout" if scores["of"].startswith("held out") else "frame"
            truth, place, words = case.against(kind, position)
            mask = case.mask_at(place)
            entry |= {"theirs": picture(_shown(case, truth, mask, low, high)), "other": words}
        out.append(entry)
    return out


def _shown_window(case: Case) -> tuple[float, float]:
    """The values shown as black and white in pictures, on the scale of renders."""
    low, high = case.placed.window
    black, white = case.shown_window
    return (black - low) / (high - low), (white - low) / (high - low)


def _shown(case: Case, image: np.ndarray, mask: np.ndarray | None, low: float, high: float) -> np.ndarray:
    """(C, H, W) -> (h, w, 3), enlarged, with square pixels and the mask outlined."""
    spacing = case.placed.spacing
    assert spacing is not None
    width, height = case.size
    factor = max(1.0, _SHOWN_WIDE / width)
    pixel = spacing[0] * case.placed.size[0] / width, spacing[1] * case.placed.size[1] / height
    factors = factor * pixel[1] / pixel[0], factor
    planes = [zoom(plane, factors, order=1) for plane in image]
    grey = np.stack(planes if len(planes) == 3 else planes * 3, -1)
    shown: np.ndarray = ((grey - low) / (high - low)).clip(0, 1)
    if mask is not None:
        for label in case.labels:
            share = mask if case.table is None else (mask == label["id"]).astype(np.float32)
            if not share.any():
                continue
            inside = zoom(share, factors, order=1) >= 0.5
            edge = inside & ~binary_erosion(inside, iterations=2, border_value=1)
            shown[edge] = [int(label["colour"][at : at + 2], 16) / 255 for at in (1, 3, 5)]
    return shown


def write_cuts(case: Case, path: Path) -> bool:
    """Cuts across the frames: the held-out truth, linear interpolation, ours. False if nothing was held out."""
    stacks, masks, spacing = cut_stacks(case)
    if not stacks:
        return False
    matrix = None if case.geometry is None else case.geometry.matrix
    if case.table is not None:
        masks = {name: np.searchsorted([0, *case.table.ids], ids) for name, ids in masks.items()}
    draw_cuts(path, stacks, masks, spacing, side_views(matrix), _shown_window(case), case.table)
    return True


def cut_stacks(
    case: Case,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], tuple[float, float, float]]:
    """At all slices of the source, kept and held out: name -> (D, H, W) images, and masks if there are any; spacing."""
    task = "seg" if case.pipeline == "seg" else "img"
    test, kept = case.inputs.heldout.get(task), case.inputs.images
    spacing = case.placed.spacing
    assert spacing is not None
    if test is None or kept is None:
        return {}, {}, spacing
    places = sorted([(float(k), True) for k in range(len(kept))] + [(place, False) for place in test.indices])
    slices: dict[str, list[np.ndarray]] = {"every slice": [], "linear interpolation": [], "ours": []}
    inside: list[np.ndarray] = []
    truth: list[np.ndarray] = []
    for place, of_kept in places:
        images, masks = case.draw([place])
        slices["every slice"].append(case.against("frame" if of_kept else "heldout", place)[0].mean(0))
        slices["linear interpolation"].append(case.against("linear", place)[0].mean(0))
        slices["ours"].append(images[0].mean(0))
        if masks is not None:
            inside.append(masks[0])
            if (given := case.mask_at(place)) is not None:
                truth.append(given)
    width, height = case.size
    depth = spacing[2] * (case.model.num_frames - 1) / max(len(places) - 1, 1)
    pixel = spacing[0] * case.placed.size[0] / width, spacing[1] * case.placed.size[1] / height
    drawn = {"ours": np.stack(inside)} if inside else {}
    if len(truth) == len(places):
        drawn["every slice"] = np.stack(truth)
    return {name: np.stack(stack) for name, stack in slices.items()}, drawn, (*pixel, depth)


def _printed_mesh(case: Case) -> str:
    """The mesh as a picture, for printing."""
    meshes = {1: case.mesh} if case.mesh is not None else {}
    if not meshes and case.has_masks:
        _, masks = case.volumes(1)
        meshes = {} if masks is None else meshes_of(masks.image, case.table)
    if not meshes:
        return ""
    colours = None
    if case.mesh is None and case.table is not None:
        colours = [np.array(case.table[number].colour) / 255 for number in meshes]
    placed = [in_space(mesh, "LPS") if mesh.metadata["space"] else mesh for mesh in meshes.values()]
    shaded, _ = shade_all(placed, np.array([0.55, -0.75, 0.38]), 500, colours=colours)
    white = shaded[:, :, :3] * shaded[:, :, 3:] + 1 - shaded[:, :, 3:]
    return f"<img class='printed' src='{picture(white)}' alt='The mesh' width='380'>"


def _curves(folder: Path, rows: list[dict[str, Any]]) -> str:
    """Losses over the iterations, from TensorBoard's files, and scores, as one figure."""
    import matplotlib
    from cycler import cycler
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    logged = _logged(folder)
    losses = {name: curve for name, curve in logged.items() if name.endswith("loss")}
    if not losses and not rows:
        return ""
    scored = [("img", "PSNR of images (dB)")] * any(row["task"] == "img" for row in rows)
    scored += [("seg", "Dice of masks")] * any(row["task"] == "seg" for row in rows)
    with matplotlib.rc_context({"axes.prop_cycle": cycler(color=_LINES)}):
        figure = Figure(figsize=(4.2 * (1 + len(scored)), 3.6), layout="constrained")
        FigureCanvasSVG(figure)
        left, *others = figure.subplots(1, 1 + len(scored), squeeze=False)[0]
        for number, (name, (steps, values)) in enumerate(losses.items()):
            looks = {"linewidth": 1.1, "linestyle": "--" if number >= len(_LINES) else "-"}
            left.plot(steps, values, label=name.removesuffix("_loss").replace("_", " "), **looks)
        left.set(xlabel="iteration", title="losses", yscale="log")
        for axes, (task, title) in zip(others, scored, strict=True):
            if task == "img" and "batch_psnr" in logged:
                axes.plot(*logged["batch_psnr"], color="0.75", linewidth=1, label="ours, on each batch")
            for frames in ("training", "heldout"):
                for method in dict.fromkeys(row["method"] for row in rows):
                    points = _points(rows, task, frames, method)
                    words = f"{NAMES[method]}, {'trained on' if frames == 'training' else 'held out'}"
                    if points:
                        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=words)
            axes.set(xlabel="iteration", title=title)
            if task == "seg":
                axes.set_ylim(max(axes.get_ylim()[0] - 0.01, 0), 1)
        for axes in (left, *others):
            if axes.lines:
                axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2)
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    return f"<h2>Training</h2><div class='curves'>{text[text.index('<svg') :]}</div>"


def _points(rows: list[dict[str, Any]], task: str, frames: str, method: str) -> list[tuple[int, float]]:
    """(iteration, score) of a method on frames of a task, where it is defined."""
    key = _measure(task)[0]
    return sorted(
        (row["iteration"], row[key])
        for row in rows
        if (row["task"], row["frames"], row["method"]) == (task, frames, method) and row[key] is not None
    )


def _logged(folder: Path) -> dict[str, tuple[list[int], list[float]]]:
    """Losses and PSNR of TensorBoard's files in ``folder``, thinned; none where there are none or no TensorBoard."""
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError:
        return {}
    events = EventAccumulator(str(folder), size_guidance={"scalars": 400})
    events.Reload()
    out = {}
    for name in events.Tags()["scalars"]:
        found = [event for event in events.Scalars(name) if 0 < event.value < np.inf]
        if found and (name.endswith("loss") or name == "batch_psnr"):
            out[name] = [event.step for event in found], [event.value for event in found]
    return out


def _provenance(case: Case) -> str:
    """Provenance: program, versions, files with their digests, options."""
    folder, path = Path(case.options.model_path), case.trained.path
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    extras = load_checkpoint(path).extras
    facts: dict[str, Any] = {"checkpoint": f"{path.name}, SHA-256 {digest.hexdigest()}"}
    if "pixels" in extras:
        facts["input frames"] = f"BLAKE2b {extras['pixels']}"
    if case.geometry is not None:
        geometry = case.geometry
        facts["source"] = geometry.source
        if geometry.spacing:
            facts["spacing"] = (
                " × ".join(f"{size:.3g}" for size in geometry.spacing) + " mm (column, row, frame)"
            )
        facts["window"] = f"{geometry.window[0]:g} to {geometry.window[1]:g}"
    elapsed = _elapsed(folder)
    if elapsed:
        facts["training"] = f"{elapsed:.1f} s"
    facts["versions"] = (
        f"MedGS {VERSION}, Python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}"
    )
    facts["machine"] = f"{platform.machine()}, {platform.system()} {platform.release()}"
    table = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in facts.items()
    )
    return f"<h2>What made it</h2><table>{table}</table>{_options(folder)}"


def _options(folder: Path) -> str:
    """The run's options, those that differ from the defaults first."""
    try:
        run = train_options_of(folder)
    except UserError:
        return ""
    values = {
        option.name: (getattr(run, option.name), option.default)
        for option in fields(TrainOptions)
        if option.metadata
    }
    return _listed(
        "Options that differ from the defaults", {n: v for n, (v, d) in values.items() if v != d}
    ) + (
        "<details><summary class='faint'>All other options</summary>"
        + _listed("", {n: v for n, (v, d) in values.items() if v == d})
        + "</details>"
    )


def _listed(title: str, values: Mapping[str, Any]) -> str:
    items = "".join(f"<div>--{escape(name)} {escape(value)}</div>" for name, value in values.items())
    return (f"<p class='faint'>{title}</p>" if title else "") + f"<div class='options number'>{items}</div>"
