"""Builds the wheel `medgs`: the programs and their packages within one of its own, so that no `scene` or `utils` lands
in site-packages, and the operators' sources, compiled at first use unless they are installed already."""

from __future__ import annotations

import ast
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
NOT_PROGRAMS = {"benchmarks", "docs", "tests"}
FOLDERS = [*sorted({path.parent.name for path in ROOT.glob("*/__init__.py")} - NOT_PROGRAMS), "workflow"]
OPERATORS = (
    "submodules/diff-gaussian-rasterization/diff_gaussian_rasterization",
    "submodules/simple-knn/simple_knn",
)
NOT_INSTALLED = ("setup.py", "demo.py")
LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.so", "*.pyc")


class BuildPrograms(build_py):
    """Adds the programs to the package, and a .pth file that puts the operators' sources last on the import path."""

    def run(self) -> None:
        super().run()
        package = Path(self.build_lib, "medgs")
        for path in ("programs", "operators"):
            shutil.rmtree(package / path, ignore_errors=True)
        (package / "programs").mkdir(parents=True)
        for script in ROOT.glob("*.py"):
            if script.name not in NOT_INSTALLED:
                shutil.copy(script, package / "programs")
        for folder in FOLDERS:
            shutil.copytree(ROOT / folder, package / "programs" / folder, ignore=LEFT_OUT)
        for folder in OPERATORS:
            shutil.copytree(ROOT / folder, package / "operators" / Path(folder).name, ignore=LEFT_OUT)
        Path(self.build_lib, "medgs-operators.pth").write_text("medgs/operators\n")


def requirements(name: str) -> list[str]:
    lines = (line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
    return [line for line in lines if line and not line.startswith("-")]


def commands() -> list[str]:
    """The console commands of src/medgs/commands.py, which cannot be imported before the package is there."""
    tree = ast.parse((ROOT / "src" / "medgs" / "commands.py").read_text())
    tables = (node for node in tree.body if isinstance(node, ast.Assign))
    (table,) = [node.value for node in tables if ast.unparse(node.targets[0]) == "COMMANDS"]
    return [
        f"{name} = medgs.commands:main"
        for name, file in ast.literal_eval(table).items()
        if (ROOT / file).exists()
    ]


def version() -> str:
    (line,) = [
        line
        for line in (ROOT / "utils" / "version.py").read_text().splitlines()
        if line.startswith("VERSION")
    ]
    return ast.literal_eval(line.split("=")[1].strip())


setup(
    name="medgs",
    version=version(),
    description="Medical slices as Folded-Gaussians: frames in between, segmentations and meshes",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    install_requires=["torch>=2.4", "setuptools", "filelock", *requirements("requirements.txt")],
    extras_require={
        "all": requirements("requirements-optional.txt"),
        "cluster": requirements("requirements-cluster.txt"),
    },
    packages=["medgs"],
    package_dir={"": "src"},
    entry_points={"console_scripts": commands()},
    cmdclass={"build_py": BuildPrograms},
)
