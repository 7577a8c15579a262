"""The layers: which folder may import which, without cycles. docs/architecture.md shows the same order."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = (  # a folder may import from those before it, and from itself
    "utils",
    "arguments",
    "patient",
    "pictures",
    "in_between",
    "scene",
    "gaussian_renderer",
    "training",
    "viewer",
    "cases",
)
MODULES = sorted(path for folder in FLOORS for path in (ROOT / folder).rglob("*.py"))


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


NAMES = {dotted(path) for path in MODULES}


def imports(path: Path) -> Iterator[str]:
    """Dotted names of everything that a file imports, wherever it does so, under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: a relative import"
            for name in (f"{node.module}.{name.name}" for name in node.names):
                yield (
                    name if name in NAMES else node.module
                )  # a module of a package, or something in a module


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_import_runs_upward(path):
    floor = FLOORS.index(path.relative_to(ROOT).parts[0])
    programs = {"benchmarks", *(script.stem for script in ROOT.glob("*.py"))}
    for name in imports(path):
        top = name.split(".")[0]
        assert top not in programs, f"{name}: a library imports a program"
        assert top not in FLOORS or FLOORS.index(top) <= floor, f"{name} lies above"


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.name)
def test_benchmarks_import_libraries_and_run_programs_as_users_do(path):
    programs = {script.stem for script in ROOT.glob("*.py")}
    assert not programs & {name.split(".")[0] for name in imports(path)}


def test_no_modules_import_in_a_circle():
    graph = {dotted(path): NAMES & set(imports(path)) - {dotted(path)} for path in MODULES}
    assert any(graph.values())
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the modules
