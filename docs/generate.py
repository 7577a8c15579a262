"""What the documentation takes from the code rather than repeating it.

A page asks for it with a comment, which the build replaces with Markdown:

    <!-- generated: options train.py -->
"""

from __future__ import annotations

import argparse
import ast
import importlib
import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
REQUEST = re.compile(r"<!-- generated: (\w+) ?(.*?) -->")


def expand(text: str) -> str:
    """The text of a page, with every request in it answered. Raises KeyError for one that nobody knows."""
    return REQUEST.sub(lambda request: GENERATORS[request[1]](*request[2].split()), text)


def table(headers: list[str], rows: list[list[str]]) -> str:
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in (headers, *rows)]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([lines[0], "|" + "---|" * len(headers), *lines[1:]])


# ---- options ---------------------------------------------------------------------------------------------------------


def programs() -> list[str]:
    """The root scripts, in the order in which one meets them."""
    order = [
        "medgs.py",
        "interpolate.py",
        "prepare.py",
        "train.py",
        "render.py",
        "slices_to_ply.py",
        "evaluate.py",
    ]
    found = sorted(path.name for path in ROOT.glob("*.py") if path.name != "setup.py")
    return [name for name in order if name in found] + [name for name in found if name not in order]


def parser_of(program: str) -> argparse.ArgumentParser:
    name = program.removesuffix(".py")
    module: Any = importlib.import_module("arguments")
    make = getattr(module, f"{name}_parser", None)
    if make is None:
        module = importlib.import_module(name)
        make = module.parser
    return make()


def options(program: str = "") -> str:
    """Tables of a program's options, or of every program's, a heading each."""
    if program:
        return "\n\n".join(_groups(parser_of(program)))
    return "\n\n".join(f"## {name}\n\n{_described(parser_of(name))}" for name in programs())


def _described(parser: argparse.ArgumentParser) -> str:
    return "\n\n".join(filter(None, [parser.description or "", *_groups(parser)]))


def _groups(parser: argparse.ArgumentParser) -> Iterator[str]:
    for group in parser._action_groups:
        rows = []
        for action in group._group_actions:
            if isinstance(action, argparse._SubParsersAction):
                for name, command in action.choices.items():
                    yield f"### {parser.prog} {name}\n\n{_described(command)}"
            elif action.help != argparse.SUPPRESS and not isinstance(action, argparse._HelpAction):
                rows.append(_row(action))
        if rows:
            title = group.title or ""
            if title not in ("options", "positional arguments"):
                yield f"**{title[:1].upper()}{title[1:]}**"
            yield table(["option", "default", "meaning"], rows)


def _row(action: argparse.Action) -> list[str]:
    """Flags with their values, the default where the help states one, and the rest of the help."""
    formatter = argparse.HelpFormatter("")
    text = formatter._expand_help(action) if action.help else ""
    stated = re.search(r"\s*\(default:? (.*)\)$", text) or re.search(r"\s*\(default: ([^()]*)\)", text)
    default = stated[1] if stated else "required" if action.required and action.option_strings else ""
    if stated:
        text = text[: stated.start()] + text[stated.end() :]
    values = formatter._format_args(action, action.dest.upper()) if action.nargs != 0 else ""
    flags = ", ".join(f"`{flag}`" for flag in action.option_strings) or f"`{action.metavar or action.dest}`"
    shown = f" `{values}`" if values and action.option_strings else ""
    return [flags + shown, default, text]


def presets() -> str:
    """What each preset sets, one row per option."""
    from arguments import PRESETS, TrainOptions

    names = [name for name in PRESETS if name != "published"]
    fields = TrainOptions.__dataclass_fields__
    set_here = [name for name in fields if any(name in PRESETS[preset] for preset in names)]
    rows = [
        [f"`--{name}`", f"{fields[name].default}"]
        + [f"{PRESETS[preset].get(name, fields[name].default)}" for preset in names]
        for name in set_here
    ]
    return table(["option", "published", *names], rows)


# ---- files -----------------------------------------------------------------------------------------------------------


def fields(module: str, name: str) -> str:
    """The fields of a dataclass, and the docstring under each."""
    source = ast.parse((ROOT / module).read_text(encoding="utf-8"))
    body = next(node for node in source.body if isinstance(node, ast.ClassDef) and node.name == name).body
    rows = [
        [f"`{field.target.id}`", " ".join(text.value.value.split())]
        for field, text in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
    ]
    return table(["field", "meaning"], rows)


def parameters() -> str:
    """The table of per-Gaussian parameters: where each lies in a checkpoint and in a point cloud, and its rate."""
    from scene.parameters import PARAMETERS

    def columns(parameter: Any) -> str:
        named = parameter.columns
        return f"`{named}_*`" if isinstance(named, str) else " ".join(f"`{name}`" for name in named)

    def rate(parameter: Any) -> str:
        if parameter.rate is None:
            return "`--position_lr_*`, times E"
        return f"`--{parameter.rate}`" + (f" / `--{parameter.divisor}`" if parameter.divisor else "")

    rows = [
        [f"`{p.name}`", f"({', '.join(map(str, ('N', *p.shape)))})", f"`{p.key}`", columns(p), rate(p)]
        for p in PARAMETERS.values()
    ]
    return table(["parameter", "shape", "checkpoint key", "PLY columns", "learning rate"], rows)


# ---- measurements ----------------------------------------------------------------------------------------------------


def recorded() -> str:
    """Every table of benchmarks/results."""
    from benchmarks import report

    return report.recorded()


GENERATORS: dict[str, Callable[..., str]] = {
    "options": options,
    "presets": presets,
    "fields": fields,
    "parameters": parameters,
    "recorded": recorded,
}
