"""MedGS, installed: medical slices as Folded-Gaussians, rendered anywhere between the slices.

The programs lie in `programs/`, as in a checkout, and run as processes; `scene`, `utils` and the like are packages of
theirs and no one else's. Their commands are `medgs`, `medgs-train`, `medgs-render` and so on.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

PROGRAMS = Path(__file__).parent / "programs"

if TYPE_CHECKING:
    from cases.case import CaseResult

    run_case: Any

__all__ = ["CaseResult", "run_case"]


def __getattr__(name: str) -> Any:
    """`run_case` and `CaseResult`, loaded when they are asked for: the programs' folder joins the import path then."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if str(PROGRAMS) not in sys.path:
        sys.path.append(str(PROGRAMS))
    spec = importlib.util.spec_from_file_location("medgs.program", PROGRAMS / "medgs.py")
    assert spec is not None and spec.loader is not None
    program = sys.modules.setdefault(spec.name, importlib.util.module_from_spec(spec))
    if not hasattr(program, name):
        spec.loader.exec_module(program)
    return getattr(program, name)
