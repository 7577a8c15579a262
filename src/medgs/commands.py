"""What `medgs`, `medgs-train` and the other commands start: a program, in this process's place."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NoReturn

from medgs import PROGRAMS

COMMANDS = {
    "medgs": "medgs.py",
    "medgs-prepare": "prepare.py",
    "medgs-train": "train.py",
    "medgs-render": "render.py",
    "medgs-mesh": "slices_to_ply.py",
    "medgs-evaluate": "evaluate.py",
    "medgs-interpolate": "interpolate.py",
    "medgs-view": "view.py",
    "medgs-report": "report.py",
    "medgs-export": "export.py",
}


def main() -> NoReturn:
    program = COMMANDS[Path(sys.argv[0]).stem]
    os.execv(sys.executable, [sys.executable, str(PROGRAMS / program), *sys.argv[1:]])
