#!/usr/bin/env python3
"""Held-out frames: the presets beside classical interpolation.

    python -m benchmarks.presets CASE [CASE ...] --device cuda --out benchmarks/results/presets/NAME.json

CASE/img/original and CASE/seg/original (either may be missing) hold the frames and masks 0000.png, ...; every N-th is
trained on, those in between are scored, in 8 bits. Rows already in NAME.json are not measured again, so that it can
be filled step by step and on several machines; with nothing left to do, the same command prints its tables. Arguments
after -- go to train.py.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from arguments import PRESETS, TrainOptions, resolve_device
from benchmarks.common import describe, run_program
from benchmarks.heldout import (
    CLASSICAL,
    KINDS,
    Filled,
    HeldOutCase,
    fill,
    in_8_bits,
    read,
    read_case,
    scores_of,
)
from benchmarks.preset_tables import Row, tables
from gaussian_renderer import rasterizer
from pictures import figures as pictured
from scene.checkpoint import load_checkpoint, newest
from training.schedule import SCHEDULE, scaled
from utils.errors import ArgumentParser, UserError, positive, run
from utils.files import atomic_write
from utils.images import write_image
from utils.metrics import Scores

RENDERS = {"img": "render_img", "seg": "render_mask"}  # folders that render.py writes

FULL = TrainOptions.iterations
ABLATION: dict[str, dict[str, Any]] = {
    "all ingredients": {},
    "taught linear blends": {"ibfr_target": "linear"},
    "taught from iteration 10 000 of 30 000 on": {"ibfr_from_iter": 10_000},
    "taught at all times between frames": {"ibfr_alpha_min": 0.0, "ibfr_alpha_max": 1.0},
    "taught in every iteration": {"ibfr_skip": 0},
    "a tenth of the weight": {"lambda_ibfr": 0.35, "lambda_ibfr_dssim": 0.04},
    "four times the weight": {"lambda_ibfr": 14.0, "lambda_ibfr_dssim": 1.6},
    "without SSIM of in-betweens": {"lambda_ibfr_dssim": 0.0},
    "masks not taught in between": {"lambda_ibfr_seg": 0.0},
    "sigma regularised below a whole spacing": {"sigma_low_views": 2.0},
    "density threshold 2e-4": {"densify_grad_threshold": 2e-4},
    "parameters not averaged": {"average_from_iter": 0},
    "paths of degree 7 instead of 2": {"poly_degree": 7},
}
"""Ingredients of --preset best removed or changed one by one. Iterations are those of a run of 30 000."""

OUT = Path("output/benchmark/presets.json")
SHOWN = (1 / 3, 2 / 3)  # of the held-out frames, in montages
SHOWN_PRESETS = ("published", "best")
SHOWN_METHODS = {"img": ("linear", "flow"), "seg": ("sdf", "sdf along flow")}


# ---- what to run -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """A run of train.py. method: its name in tables. options: of train.py, besides data, model and device."""

    case: HeldOutCase = field(repr=False)
    keep: int
    method: str
    options: tuple[str, ...]

    @property
    def preset(self) -> str:
        return self.options[1]

    @property
    def key(self) -> tuple[Any, ...]:
        return self.case.name, self.keep, self.method, self.case.pipeline


def key(row: Row) -> tuple[Any, ...]:
    """The key of a row. Classical rows have no pipeline."""
    return row["case"], row["keep"], row["method"], row.get("pipeline")


def plans(cases: Sequence[HeldOutCase], given: argparse.Namespace, extra: Sequence[str]) -> Iterator[Plan]:
    """All requested runs, grouped by case and ``keep``."""
    if given.ablation:
        wanted = {f"best: {name}": ("best", changes) for name, changes in ABLATION.items()}
    else:
        wanted = {preset: (preset, {}) for preset in given.presets}
    changed = [f", {given.iterations} iterations"] if given.iterations else []
    suffix = "" if given.quick else "".join([*changed, *(f" {word}" for word in extra)])
    for case in cases:
        case = case.only(given.pipeline or case.pipeline)
        for keep in given.keep:
            for name, (preset, changes) in wanted.items():
                if "lambda_ibfr_seg" in changes and case.pipeline == "img":
                    continue
                options = train_options(case.pipeline, preset, changes, given.iterations)
                yield Plan(case, keep, name + suffix, (*options, *extra))


def train_options(
    pipeline: str, preset: str, changes: Mapping[str, Any], iterations: int | None = None
) -> list[str]:
    """Options of train.py: the preset's, except for ``changes``; ``iterations`` shrinks its schedule in proportion."""
    defaults = {name: getattr(TrainOptions, name) for name in ("iterations", *SCHEDULE)} | PRESETS[preset]
    length = defaults["iterations"]

    values = {} if pipeline != "seg" else {"poly_degree": 2}  # the published choice for masks
    for name, value in changes.items():
        values[name] = scaled(value, FULL, length) if name in SCHEDULE else value
    if iterations is not None:
        for name in SCHEDULE:
            values[name] = scaled(values.get(name, defaults[name]), length, iterations)
        values["iterations"] = iterations
    return [
        "--preset",
        preset,
        *(word for name, value in values.items() for word in (f"--{name}", str(value))),
    ]


# ---- measuring -------------------------------------------------------------------------------------------------------


def classical_rows(case: HeldOutCase, keep: int) -> list[Row]:
    """One row per method that needs no model."""
    kept, at = case.split(keep)
    start = time.perf_counter()
    filled = fill(case, kept, at)
    head = {"case": case.name, "keep": keep, "counts": {"training": len(kept), "heldout": len(at)}}
    about = describe(torch.device("cpu"))
    rows: list[Row] = [
        {**head, "method": method}
        | {k: {"heldout": scores_of(k, images, case.frames[k][at])} for k, images in found.items()}
        | {"about": about}
        for method, found in filled.items()
    ]
    print(f"{case.name}, every {keep}: classical rows in {time.perf_counter() - start:.0f} s", flush=True)
    return rows


def train_and_score(
    plan: Plan, device: str, about: Mapping[str, Any], jobs: int, models: Path | None
) -> tuple[Row, dict[str, np.ndarray]]:
    """Runs train.py and render.py; returns the row of scores, and by kind the frames for montages, uint8."""
    case, keep = plan.case, plan.keep
    kept, at = case.split(keep)
    with ExitStack() as stack:
        if models is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        else:
            folder = models / "_".join(
                [case.name, str(keep), "".join(c if c.isalnum() else "-" for c in plan.method)]
            )
            if folder.exists():
                raise UserError(f"{folder} is there already: remove it, or name another folder")
        case.copy_kept(keep, folder)
        model, first = folder / "model", next(iter(case.files))
        sources = ["-s", str(folder / first)]
        if case.pipeline == "joint":
            sources += ["--seg_source_path", str(folder / "seg")]
        shared = ["-m", str(model), "--device", device, "--quiet"]
        seconds = run_program("train.py", *sources, *shared, "--pipeline", case.pipeline, *plan.options)
        drawn = "both" if case.pipeline == "joint" else case.pipeline
        run_program("render.py", *shared, "--pipeline", drawn, "--interp", str(keep))

        saved = load_checkpoint(newest(model), "cpu")
        loop = json.loads((model / "time.json").read_text(encoding="utf-8"))["elapsed"]
        row: Row = {
            "case": case.name,
            "keep": keep,
            "method": plan.method,
            "pipeline": case.pipeline,
            "options": list(plan.options),
            "counts": {"training": len(kept), "heldout": len(at)},
        }
        shown = {}
        for kind, truth in case.frames.items():
            names = [f"{a // keep:05d}_{a % keep}.png" for a in range(kept[-1] + 1)]
            renders = read([model / RENDERS[kind] / name for name in names])
            row[kind] = {
                which: scores_of(kind, renders[frames], truth[frames])
                for which, frames in (("training", kept), ("heldout", at))
            }
            shown[kind] = np.rint(255 * renders[shown_frames(at)]).astype(np.uint8)
    row |= {
        "iterations": saved.iteration,
        "gaussians": len(saved.params["xyz"]),
        "seconds": seconds,
        "iterations_per_s": saved.iteration / loop,
        "jobs": jobs,
        "about": dict(about),
    }
    return row, shown


def compile_operators(device: torch.device) -> None:
    """Compiles the operators if needed: it is not training time, and two runs should not do it at once."""
    from simple_knn._C import distCUDA2

    rasterizer("compiled")
    distCUDA2(torch.rand(8, 3, device=device))


# ---- results ---------------------------------------------------------------------------------------------------------


class Results:
    """The file of rows, one per line; with a folder for montages, also the models' frames for these."""

    def __init__(self, path: Path, montages: Path | None) -> None:
        self.path, self.frames_path = path, montages and montages / "frames.npz"
        self.rows = read_rows(path) if path.exists() else []
        self.frames: dict[str, np.ndarray] = {}
        if self.frames_path and self.frames_path.exists():
            with np.load(self.frames_path) as file:
                self.frames = dict(file)

    def has(self, *wanted: Any) -> bool:
        return any(key(row) == wanted for row in self.rows)

    def add(self, rows: Sequence[Row], shown: Mapping[str, np.ndarray] | None = None) -> None:
        """Rows replace those with the same key. Written at once, so that no measurement is lost."""
        new = {key(row): row for row in rows}
        self.rows = [new.pop(key(row), row) for row in self.rows] + list(new.values())
        text = ",\n".join(json.dumps(row) for row in self.rows)
        with atomic_write(self.path) as unfinished:
            unfinished.write_text(f"[\n{text}\n]\n", encoding="utf-8")
        if self.frames_path and shown is not None:
            for kind, frames in shown.items():
                self.frames[frames_name(rows[0]["case"], rows[0]["keep"], rows[0]["method"], kind)] = frames
            with atomic_write(self.frames_path) as unfinished:
                np.savez_compressed(unfinished, **self.frames)


def read_rows(path: Path) -> list[Row]:
    """The rows written by a run of this program."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        for row in rows:
            key(row)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path} is not a file of this program's results: name another, or remove it"
        ) from error
    return rows


# ---- montages --------------------------------------------------------------------------------------------------------


def shown_frames(at: np.ndarray) -> np.ndarray:
    """Which held-out frames montages show."""
    return at[sorted({int(share * len(at)) for share in SHOWN})]


def frames_name(case: str, keep: int, method: str, kind: str) -> str:
    return f"{case} {keep} {method} {kind}"


def draw_montages(
    folder: Path, case: HeldOutCase, keep: int, frames: Mapping[str, np.ndarray], models: Mapping[str, str]
) -> None:
    """One picture per kind of frames: truth, classical methods, models (title -> method), and the error of each."""
    kept, at = case.split(keep)
    at = shown_frames(at)
    predictions: Filled = fill(case, kept, at, prediction=False)
    for title, method in models.items():
        keys = {kind: frames_name(case.name, keep, method, kind) for kind in case.frames}
        predictions[title] = {kind: frames[name] / 255 for kind, name in keys.items() if name in frames}
    for kind, every in case.frames.items():
        path, truth = folder / f"{case.name}_{keep}_{kind}.jpg", every[at]
        compared = {}
        for title in (*SHOWN_METHODS[kind], *models):
            if (images := predictions.get(title, {}).get(kind)) is None:
                continue
            images = in_8_bits(images)
            scores = Scores.of(*(torch.from_numpy(values)[:, None] for values in (images, truth)))
            figures = [
                f"Dice {dice:.4f}" if kind == "seg" else f"{psnr:.2f} dB, SSIM {ssim:.3f}"
                for psnr, ssim, dice in zip(scores.psnr, scores.ssim, scores.frame_dice, strict=True)
            ]
            compared[title] = ([image[:, :, None] for image in images], figures)
        rows = [
            pictured.Row(
                f"frame {a}",
                truth[k][:, :, None],
                {title: (images[k], figures[k]) for title, (images, figures) in compared.items()},
                case.spacing[1] / case.spacing[2],
            )
            for k, a in enumerate(at)
        ]
        mask = kind == "seg"
        pictured.draw_montage(path, pictured.cropped(rows) if mask else rows, mask, errors_below=True)
        missing = [title for title in models if title not in compared]
        print(f"drawn: {path}" + f" (without {', '.join(missing)}: no frames in {folder})" * bool(missing))


# ---- the command -----------------------------------------------------------------------------------------------------


def made_up_case(folder: Path) -> Path:
    """A small joint case: a disc that drifts and grows on a tilted background, 7 frames of 32 x 24 pixels."""
    rows, columns = np.mgrid[:24, :32]
    for k in range(7):
        inside = np.hypot(columns - 10 - 1.5 * k, rows - 12) < 5 + 0.5 * k
        write_image(folder / "seg" / "original" / f"{k:04d}.png", inside.astype(np.float32), 8)
        write_image(folder / "img" / "original" / f"{k:04d}.png", 0.2 + 0.5 * inside + columns / 160, 8)
    return folder


def parser() -> ArgumentParser:
    out = ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        usage="%(prog)s CASE [CASE ...] [options] [-- options of train.py]",
    )
    out.add_argument(
        "cases", type=Path, nargs="*", metavar="CASE", help="folders with img/original or seg/original"
    )
    out.add_argument(
        "--keep",
        type=positive,
        nargs="+",
        default=[2, 4],
        metavar="N",
        help="train on every N-th (default: 2 4)",
    )
    out.add_argument(
        "--presets", nargs="+", choices=PRESETS, default=list(PRESETS), help=f"default: {' '.join(PRESETS)}"
    )
    out.add_argument(
        "--ablation",
        action="store_true",
        help="instead of presets: best without each of its ingredients",
    )
    out.add_argument(
        "--iterations",
        type=positive,
        metavar="N",
        help="of every run; schedules shrink with it (default: the preset's)",
    )
    out.add_argument(
        "--pipeline",
        choices=KINDS,
        help="default: joint if there are images and masks, else img or seg",
    )
    out.add_argument("--classical", action="store_true", help="only what needs no model")
    out.add_argument("--device", default="auto", help="auto, cuda, cuda:N or cpu (default: auto)")
    out.add_argument(
        "--jobs",
        type=positive,
        default=1,
        metavar="N",
        help="runs side by side: for scores, not times (default: 1)",
    )
    out.add_argument(
        "--out", type=Path, metavar="FILE", help=f"results (default: {OUT}; with --quick none are kept)"
    )
    out.add_argument(
        "--montages", type=Path, metavar="FOLDER", help="draw held-out frames and their errors in this folder"
    )
    out.add_argument(
        "--models",
        type=Path,
        metavar="FOLDER",
        help="keep the trained models and their renders in this folder",
    )
    out.add_argument("--force", action="store_true", help="measure again what is already in the results")
    out.add_argument(
        "--quick",
        action="store_true",
        help="check that everything runs: a synthetic case, 40 iterations, a minute",
    )
    return out


def main() -> int:
    words = sys.argv[1:]
    ours = words.index("--") if "--" in words else len(words)
    extra = words[ours + 1 :]  # train.py's
    given = parser().parse_args(words[:ours])
    with tempfile.TemporaryDirectory() as temporary:
        if given.quick:
            if given.cases:
                raise UserError(f"--quick has a case of its own: leave out {given.cases[0]}")
            given.cases, given.keep, given.iterations = [made_up_case(Path(temporary, "made_up"))], [2], 40
            given.presets = [
                preset for preset in given.presets if preset != "fast"
            ]  # that is best, only shorter
            given.out = given.out or Path(temporary, "quick.json")
            extra = ["--num_pts", "200", *extra]
        given.out = given.out or OUT
        if not given.cases:
            raise UserError("no case: give folders with img/original or seg/original, or --quick")
        if given.ablation and given.montages:
            raise UserError("--montages shows presets, not their ablation: leave one of the two out")
        if min(given.keep) < 2:
            raise UserError("--keep 1 leaves no frame out; give 2 or more")
        cases = [read_case(folder) for folder in given.cases]
        for i, case in enumerate(cases):
            if case.name in [other.name for other in cases[:i]]:
                raise UserError(f"two cases are called {case.name}: rename the folder of one")
            for keep in given.keep:
                if not len(case.split(keep)[1]):
                    raise UserError(
                        f"{case.name}: {len(case)} frames are too few for --keep {keep}; give a smaller one"
                    )
        return measure(cases, given, extra)


def measure(cases: Sequence[HeldOutCase], given: argparse.Namespace, extra: Sequence[str]) -> int:
    """Fills the file of results, draws montages, prints tables. Returns 1 if a run failed."""
    results = Results(given.out, given.montages)
    for case in cases:
        for keep in given.keep:
            methods = [name for name, kinds in CLASSICAL.items() if set(kinds) <= set(case.files)]
            if given.force or not all(results.has(case.name, keep, name, None) for name in methods):
                results.add(classical_rows(case, keep))

    wanted = [] if given.classical else list(plans(cases, given, extra))
    todo = [plan for plan in wanted if given.force or not results.has(*plan.key)]
    failed = 0
    if todo:
        device = resolve_device(given.device)
        compile_operators(device)
        about = describe(device)
        with ThreadPoolExecutor(given.jobs) as pool:
            runs = {
                pool.submit(train_and_score, plan, str(device), about, given.jobs, given.models): plan
                for plan in todo
            }
            try:
                for done in as_completed(runs):
                    plan = runs[done]
                    name = f"{plan.case.name}, every {plan.keep}, {plan.method}"
                    try:
                        row, shown = done.result()
                    except UserError as error:
                        failed += 1
                        print(f"presets.py: failed: {name}: {error}", file=sys.stderr)
                        continue
                    results.add([row], shown)
                    print(f"{name}: {row['seconds']:.0f} s, {row['gaussians']} Gaussians", flush=True)
            finally:
                pool.shutdown(cancel_futures=True)
    if given.montages:
        models = {plan.preset: plan.method for plan in wanted if plan.preset in SHOWN_PRESETS}
        for case in cases:
            for keep in given.keep:
                draw_montages(given.montages, case, keep, results.frames, models)
    print("\n\n".join(tables(results.rows)))
    print(f"\n{len(results.rows)} rows: {given.out}")
    return 1 if failed else 0


if __name__ == "__main__":
    run(main)
