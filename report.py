#!/usr/bin/env python3
"""Writes the report of a trained model: one file with scores, pictures, the volume and the mesh, to open and to send.

    python report.py -m OUTPUT

writes OUTPUT/report.html; --help lists every option.
"""

from __future__ import annotations

import utils.threads  # noqa: F401  # isort: skip  (before torch)

import argparse
from collections.abc import Sequence
from pathlib import Path

from arguments import model_options
from utils.errors import ArgumentParser, UserError, run
from viewer.case import Case
from viewer.report import write_report


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)

    def say(message: str) -> None:
        if not options.quiet:
            print(message, flush=True)

    given = {
        name: value
        for name in ("model_path", "iteration", "source_path", "device", "quiet")
        if (value := getattr(options, name)) is not None
    }
    path = Path(options.output or Path(options.model_path) / "report.html")
    if path.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"-o {path}: a report is a page, so give a name that ends in .html")
    case = Case.open(model_options(given), mesh=options.mesh, say=say)
    for warning in write_report(case, path):
        say(f"note: {warning}")
    say(f"{path}: {path.stat().st_size / 1e6:.1f} MB, to open in a browser and to send")
    return 0


def parser() -> argparse.ArgumentParser:
    line = ArgumentParser(prog="report.py", description=(__doc__ or "").split("\n")[0])
    line.add_argument("-m", "--model_path", required=True, help="the trained model's folder")
    line.add_argument("-o", "--output", help="the page (default: report.html in that folder)")
    line.add_argument("--iteration", type=int, default=-1, help="of the checkpoint (default -1: the newest)")
    line.add_argument(
        "-s", "--source_path", help="data root of the input frames, where it is not where it was in training"
    )
    line.add_argument("--mesh", help="a mesh of slices_to_ply.py (default: made of the model's masks)")
    line.add_argument("--device", default="auto", help="auto, cuda, cuda:N or cpu (default: auto)")
    line.add_argument("--quiet", action="store_true", help="print errors only")
    line.add_argument("--debug", action="store_true", help="print the traceback of an error too")
    return line


if __name__ == "__main__":
    run(main)
