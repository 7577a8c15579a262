#!/usr/bin/env python3
"""Does a whole case, or a thousand: prepare, train, render, mesh and report, in one command.

    python medgs.py -i volume.nii.gz -l labels.nii.gz -o out/case
    python medgs.py --cases cases.csv -o out --jobs 4

A case's folder holds images/, masks/, meshes/, report.html and run.json. The command may be given again: what is there
and current is skipped, and a training that was stopped goes on. From Python: `from medgs import run_case`.
"""

from __future__ import annotations

import utils.threads  # noqa: F401  # isort: skip  (before torch)

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

import prepare
import report
import slices_to_ply
from arguments import PRESETS, render_parser, train_options
from cases.case import STEPS, Case, CaseResult, Place, as_file, do_case, plan, tell_plan
from cases.gpus import one_gpu, visible_gpus
from cases.processes import Forked, PassedOn, Spawned, Start
from cases.steps import STOPPED
from cases.summary import SummaryRow, summarise
from cases.table import Row, part, read_cases
from utils.errors import ArgumentParser, UserError, positive, run
from utils.files import atomic_write, own_folder
from utils.threads import processors
from utils.timing import in_words

__all__ = ["CaseResult", "run_case"]

ROOT = Path(__file__).resolve().parent
SNAKEFILE = ROOT / "workflow" / "Snakefile"
_STEP_OPTION = re.compile(rf"--({'|'.join(STEPS)})\.(.+)")
_OWN = {  # options of the steps that medgs.py itself gives
    "prepare": {"input", "label", "output", "keep_every", "force"},
    "train": {
        "source_path",
        "seg_source_path",
        "model_path",
        "pipeline",
        "preset",
        "device",
        "start_checkpoint",
        "time",
    },
    "render": {"model_path", "interp", "pipeline", "device"},
    "mesh": {"input", "output", "inter"},
    "report": {"model_path", "output", "mesh", "device"},
}


def main(arguments: Sequence[str] | None = None) -> int:
    given, steps = split_steps(sys.argv[1:] if arguments is None else arguments)
    options = parser().parse_args(given)
    check(steps)
    if bool(options.input) == bool(options.cases):
        raise UserError("give either -i VOLUME, for one case, or --cases TABLE, for many")
    return many_cases(options, steps) if options.cases else one_case(options, steps)


def parser() -> argparse.ArgumentParser:
    """The command line, without the options of single steps."""
    parser = ArgumentParser(
        prog="medgs.py",
        description=(__doc__ or "").split("\n")[0],
        epilog="Options of one step pass through: --train.lambda_seg 2, --prepare.ct_window bone, "
        f"--mesh.smoothing none. Steps: {', '.join(STEPS)}.",
    )
    one = parser.add_argument_group("one case")
    one.add_argument(
        "-i", "--input", metavar="VOLUME", help="volume, DICOM folder or frames: all that prepare.py reads"
    )
    one.add_argument(
        "-l", "--label", nargs="+", metavar="LABEL", help="its label; several files: one per structure"
    )
    parser.add_argument(
        "-o", "--output", required=True, help="the case's folder; of many cases, the folder of theirs"
    )
    parser.add_argument(
        "--preset",
        choices=("auto", *PRESETS),
        default="auto",
        help="of train.py; auto takes the one that suits this machine, and says which (default: auto)",
    )
    parser.add_argument(
        "--time",
        type=minutes,
        metavar="MINUTES",
        help="that training may take: as many iterations as fit",
    )
    parser.add_argument(
        "--keep_every",
        type=positive,
        default=1,
        metavar="N",
        help="train on one slice in N, and score the others",
    )
    parser.add_argument(
        "--interp",
        type=positive,
        default=4,
        metavar="N",
        help="rendered slices per frame (default: %(default)s)",
    )
    parser.add_argument("--device", default="auto", help="auto, cuda, cuda:N or cpu (default: auto)")
    parser.add_argument(
        "--only", nargs="+", choices=STEPS, default=list(STEPS), metavar="STEP", help="do these steps"
    )
    parser.add_argument("--dry_run", action="store_true", help="print the plan and do nothing")
    parser.add_argument("--quiet", action="store_true", help="print errors only")
    parser.add_argument("--debug", action="store_true", help="print the traceback of an error too")
    many = parser.add_argument_group("many cases")
    many.add_argument(
        "--cases",
        metavar="TABLE",
        help="CSV or TSV (case, image, label, options), or a folder of cases (BIDS, nnU-Net)",
    )
    many.add_argument("--case", nargs="+", metavar="NAME", help="of the table, these alone")
    many.add_argument(
        "--jobs",
        type=positive,
        metavar="N",
        help="cases side by side, by Snakemake (default: 1, without it; with --profile, as that says)",
    )
    many.add_argument(
        "--per_gpu",
        type=positive,
        default=1,
        metavar="N",
        help="trainings side by side on each GPU (default: 1)",
    )
    many.add_argument(
        "--profile", metavar="FOLDER", help="a Snakemake profile, such as workflow/profiles/slurm"
    )
    many.add_argument(
        "--summary", action="store_true", help="write the summary of what is there, and do nothing else"
    )
    many.add_argument(
        "-num_parts", type=positive, default=1, metavar="N", help="with -part_id: split into N parts ..."
    )
    many.add_argument(
        "-part_id", type=int, default=0, metavar="K", help="... and do the K-th, from 0 (as nnU-Net)"
    )
    return parser


def minutes(text: str) -> float:
    """The type of --time."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number of minutes")
    return value


def split_steps(arguments: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """The command line without the options of single steps; and those, by step."""
    rest: list[str] = []
    steps: dict[str, list[str]] = {}
    into = rest
    for token in arguments:
        match = _STEP_OPTION.fullmatch(token)
        if match:
            into = steps.setdefault(match[1], [])
            into.append(f"--{match[2]}")
        else:
            if token.startswith("-") and not re.fullmatch(r"-\.?\d.*", token):
                into = rest
            into.append(token)
    return rest, steps


def check(steps: Mapping[str, Sequence[str]]) -> None:
    """Refuse options of a step that its program would refuse, before anything starts."""
    if unknown := sorted(set(steps) - set(STEPS)):
        raise UserError(f"there is no step {unknown[0]}: the steps are {', '.join(STEPS)}")
    parsers = {
        "prepare": (prepare.parser, "-i x -o x"),
        "mesh": (slices_to_ply.parser, "-i x -o x"),
        "report": (report.parser, "-m x"),
    }
    for name, given in steps.items():
        own = [token for token in given if token.split("=")[0].removeprefix("--") in _OWN[name]]
        if own:
            raise UserError(f"--{name}.{own[0].removeprefix('--')}: medgs.py gives that option itself")
        try:
            if name == "train":
                train_options(["-s", "x", "-m", "x", *given])
            elif name == "render":
                render_parser().parse_args(["-m", "x", *given])
            elif name in parsers:
                of_step, needed = parsers[name]
                of_step().parse_args([*needed.split(), *given])
        except UserError as error:
            raise UserError(f"--{name}.…: {error}") from error


def preset_for(name: str, device: str = "auto") -> str:
    """`auto` as a preset: best with a GPU, quick without one, with `--device cpu`, or with a torch that knows none."""
    if name != "auto":
        return name
    return "best" if device != "cpu" and torch.backends.cuda.is_built() and visible_gpus() else "quick"


# ---- one case --------------------------------------------------------------------------------------------------------


def run_case(
    image: str | os.PathLike[str] | np.ndarray,
    label: str | os.PathLike[str] | np.ndarray | Sequence[str | os.PathLike[str] | np.ndarray] | None = None,
    output: str | os.PathLike[str] = "output/case",
    *,
    affine: np.ndarray | None = None,
    name: str | None = None,
    preset: str = "auto",
    time: float | None = None,
    keep_every: int = 1,
    interp: int = 4,
    device: str = "auto",
    options: Mapping[str, Sequence[str]] | None = None,
    only: Sequence[str] = STEPS,
    say: Callable[[str], object] = print,
    start: Start = Spawned,
    place: Place | None = None,
) -> CaseResult:
    """Do a whole case: prepare, train, render, mesh and report, in one folder.

    image, label: a path that prepare.py reads, or an array (columns, rows, slices) whose `affine` (4, 4) maps indices
    to RAS+ millimetres; several labels are one per structure. output: the case's folder; name: of the case, the
    folder's if None. preset: of train.py, or "auto", which suits this machine. time: minutes that training may take.
    keep_every: train on one slice in N, and score the others. interp: rendered slices per frame. options: of single
    steps, `{"train": ["--lambda_seg", "2"]}`. only: the steps to do; those that are there and current are skipped. say:
    gets a line at a time. start, place: how the steps' programs are started, and on which GPU (`cases.case.do_case`).

    Returns what came out, also where a step failed or was stopped: see `CaseResult.record.failure`. Raises `UserError`
    where the input does not exist or an option cannot be, before anything starts.
    """
    folder, steps = Path(output), dict(options or {})
    check_case(preset, time, keep_every, interp, device, steps, only)
    labels = label if isinstance(label, (list, tuple)) else [] if label is None else [label]
    for given in (image, *labels):
        if not isinstance(given, np.ndarray) and not Path(given).exists():
            raise UserError(f"{given} does not exist")
    with own_folder(folder, "-o"):
        case = Case(
            name or folder.resolve().name,
            as_file(image, affine, folder / "input" / "image.nii.gz"),
            tuple(
                as_file(one, affine, folder / "input" / f"label_{k}.nii.gz") for k, one in enumerate(labels)
            ),
            preset_for(preset, device),
            keep_every,
            interp,
            device,
            time,
            steps,
        )
        say(_headline(case, preset))
        return do_case(case, folder, only, say=say, start=start, place=place)


def check_case(
    preset: str,
    time: float | None,
    keep_every: int,
    interp: int,
    device: str,
    steps: Mapping[str, Sequence[str]],
    only: Sequence[str],
) -> None:
    """Refuse what the command line would refuse."""
    words = [
        "-o",
        "x",
        "--preset",
        preset,
        "--keep_every",
        keep_every,
        "--interp",
        interp,
        "--device",
        device,
    ]
    words += [] if time is None else ["--time", time]
    parser().parse_args([*map(str, words), "--only", *only])
    check(steps)


def _headline(case: Case, asked: str) -> str:
    labels = f" with {', '.join(map(str, case.labels))}" if case.labels else ""
    chosen = "" if asked != "auto" else f" (for {'a GPU' if case.preset == 'best' else 'a CPU'})"
    return f"{case.name}: {case.image}{labels}; preset {case.preset}{chosen}"


def one_case(options: argparse.Namespace, steps: dict[str, list[str]]) -> int:
    row = Row(Path(options.output).resolve().name, Path(options.input), tuple(map(Path, options.label or ())))
    return _do(row, Path(options.output), options, steps)


def _do(
    row: Row,
    folder: Path,
    options: argparse.Namespace,
    steps: dict[str, list[str]],
    place: Place | None = None,
) -> int:
    """Run one case; its exit status, the reason already printed by the step itself."""

    def say(line: str) -> None:
        if not options.quiet:
            print(line, flush=True)

    quiet = {name: ["--quiet", *steps.get(name, ())] for name in STEPS} if options.quiet else dict(steps)
    if options.dry_run:
        preset = preset_for(options.preset, options.device)
        case = Case(
            row.name,
            row.image,
            row.labels,
            preset,
            options.keep_every,
            options.interp,
            options.device,
            options.time,
            quiet,
        )
        for path in (case.image, *case.labels):
            if not path.exists():
                raise UserError(f"{path} does not exist")
        say(_headline(case, options.preset))
        tell_plan(plan(case, folder), options.only, case, folder, say, forked=True)
        return 0
    result = run_case(
        row.image,
        row.labels,
        folder,
        name=row.name,
        preset=options.preset,
        time=options.time,
        keep_every=options.keep_every,
        interp=options.interp,
        device=options.device,
        options=quiet,
        only=options.only,
        say=say,
        start=Forked if sys.platform == "linux" else Spawned,
        place=place,
    )
    ran = result.record.steps
    failed = [ran[name] for name in options.only if name in ran and ran[name].status not in (0, None)]
    if failed:
        return failed[0].status or 1
    seconds = sum(step.seconds for step in result.record.steps.values())
    if not result.missing:
        say(f"done in {in_words(seconds)}: {folder} (open {folder / 'report.html'})")
    return 0


# ---- many cases ------------------------------------------------------------------------------------------------------


def many_cases(options: argparse.Namespace, steps: dict[str, list[str]]) -> int:
    source, out = Path(options.cases), Path(options.output)
    rows = whole = read_cases(source)
    if options.case:
        known = {row.name: row for row in rows}
        if unknown := [name for name in options.case if name not in known]:
            raise UserError(f"{source} has no case {unknown[0]}: there are {', '.join(list(known)[:8])}")
        rows = [known[name] for name in options.case]
    if options.only != list(STEPS) and ((options.jobs or 1) > 1 or options.profile):
        raise UserError("--only goes without --jobs and --profile, which do whole cases")
    rows = part(rows, options.num_parts, options.part_id)
    for row in rows:  # before anything starts
        _options_of(row, options, steps)
    alone = options.case is not None and len(rows) == 1
    if options.summary:
        status = 0
    elif options.dry_run or ((options.jobs or 1) == 1 and not options.profile):
        status = 0
        for row in rows:
            own, own_steps = _options_of(row, options, steps)
            came = _attempt(row, out, own, own_steps)
            if came in STOPPED:
                status = came
                break
            status = max(status, came)
        if alone or options.dry_run:
            return status
    else:
        status = _snakemake(rows, options, steps)
    found = summarise(out, [row.name for row in whole])  # all of the table's: other parts are done elsewhere
    own_names = {row.name for row in rows}
    return _tell([row for row in found if row.name in own_names], out, status)


def _options_of(
    row: Row, options: argparse.Namespace, steps: dict[str, list[str]]
) -> tuple[argparse.Namespace, dict[str, list[str]]]:
    """The command's options with those of a row of the table, which win. Raises `UserError`, naming the row."""
    try:
        rest, own_steps = split_steps(row.options)
        own = parser().parse_args([*rest, "-o", options.output], argparse.Namespace(**vars(options)))
        own.output, own.cases, own.input = options.output, options.cases, None
        check(own_steps)
    except UserError as error:
        raise UserError(f"{options.cases}, case {row.name}: {error}") from error
    merged = {name: [*steps.get(name, ()), *own_steps.get(name, ())] for name in {*steps, *own_steps}}
    return own, merged


def _attempt(row: Row, out: Path, options: argparse.Namespace, steps: dict[str, list[str]]) -> int:
    """A case among others: what goes wrong is its own."""
    place = partial(one_gpu, options.per_gpu) if options.device == "auto" else None
    try:
        return _do(row, out / row.name, options, steps, place)
    except UserError as error:
        print(f"medgs.py: {row.name}: error: {error}", file=sys.stderr)
        return 2


def _snakemake(rows: Sequence[Row], options: argparse.Namespace, steps: dict[str, list[str]]) -> int:
    engine = (
        [sys.executable, "-m", "snakemake"] if find_spec("snakemake") else [shutil.which("snakemake") or ""]
    )
    if not engine[0]:
        raise UserError(
            "--jobs and --profile need Snakemake: pip install snakemake snakemake-executor-plugin-slurm, or leave "
            "them out"
        )
    out = Path(options.output).resolve()
    out.mkdir(parents=True, exist_ok=True)
    passed = ["--preset", options.preset, "--keep_every", options.keep_every, "--interp", options.interp]
    passed += ["--time", options.time] if options.time is not None else []
    passed += [
        "--device",
        options.device,
        "--per_gpu",
        options.per_gpu,
        *(["--quiet"] if options.quiet else []),
    ]
    for name, given in steps.items():
        passed += [token if not token.startswith("--") else f"--{name}.{token[2:]}" for token in given]
    threads = max(processors() // (options.jobs or 1), 1)
    config = out / "workflow.json"
    with atomic_write(config) as temporary:
        values = {
            "cases": str(Path(options.cases).resolve()),
            "out": str(out),
            "names": [row.name for row in rows],
            "python": sys.executable,
            "gpu": options.device != "cpu",  # what a login node has says nothing of where jobs run
            **({} if options.profile else dict.fromkeys(("train_threads", "finish_threads"), threads)),
            "options": shlex.join(map(str, passed)),
        }
        temporary.write_text(json.dumps(values, indent=1))
    gpus = len(visible_gpus()) * options.per_gpu
    command = [*engine, "--snakefile", str(SNAKEFILE), "--configfile", str(config)]
    command += ["--directory", str(out), "--keep-going", "--rerun-incomplete", "cases"]
    if options.profile:
        command += ["--profile", str(Path(options.profile).resolve())]
        command += ["--jobs", str(options.jobs)] if options.jobs else []
    else:
        command += ["--cores", str(processors())]
        command += ["--resources", f"cases={options.jobs}", f"gpu={gpus or options.jobs}"]
    if options.quiet:
        command += ["--quiet", "all"]
    with PassedOn(group=True) as asked:  # it lets its jobs save, and its folder is not left locked
        process = subprocess.Popen(command, start_new_session=True)
        asked.to(process)
        status = process.wait()
    return 128 + asked.signal if asked.signal else status


def _tell(rows: Sequence[SummaryRow], out: Path, status: int) -> int:
    done = [row for row in rows if row.state == "done"]
    others = [row for row in rows if row.state != "done"]
    print(f"{len(done)} of {len(rows)} cases done; {out / 'summary.html'}, {out / 'summary.csv'}")
    for row in others:
        print(f"  {row.name} {row.state}{f': {row.reason}' if row.reason else ''}", file=sys.stderr)
    if others:
        print("  the same command again does what is left", file=sys.stderr)
    return status if status in STOPPED else int(bool(others) or status != 0)


if __name__ == "__main__":
    run(main)
