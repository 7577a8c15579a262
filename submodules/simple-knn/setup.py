"""Installs simple_knn: compiled now where torch can be imported, else by the package itself on first use.

With MEDGS_WHEEL=cpu or MEDGS_WHEEL=cuda the library is one for every torch (`make wheels` sets it): of CUDA it has the
kernels of all current GPUs.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # before setuptools 70.1
    from wheel.bdist_wheel import bdist_wheel

NAME = "simple_knn"
DESCRIPTION = "Exact mean squared distance to the three nearest neighbours, on CPU and CUDA"
REQUIRES = ["torch>=2.10", "numpy", "scipy", "filelock"]

os.chdir(Path(__file__).resolve().parent)  # the paths below are relative, as setuptools wants them
_spec = importlib.util.spec_from_file_location("_library", f"{NAME}/_library.py")
_library = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_library)


def libraries() -> dict[str, tuple[str, str | None]]:
    """What to compile: the name of each library, with its target and the GPUs to compile for; none without torch."""
    try:
        target = _library.build_target()
    except ModuleNotFoundError:  # pip's build isolation
        return {}
    wheel = os.environ.get("MEDGS_WHEEL")
    if not wheel:
        found = {_library.installed_library(target).name: (target, None)}
    else:
        found = {_library.wheel_library("cpu").name: ("cpu", None)}
        if wheel == "cuda":
            cuda = "cu" + "".join(_library.toolkit())
            found[_library.wheel_library(cuda).name] = (cuda, _library.ARCHITECTURES)
    return {name: of for name, of in found.items() if _library.sources(of[0])}


class BuildLibraries(build_py):
    """Starts from an empty folder: else a source file deleted here would be installed from an older build."""

    def run(self) -> None:
        package = Path(self.build_lib, NAME)
        shutil.rmtree(package, ignore_errors=True)
        super().run()
        for name, (target, architectures) in COMPILED.items():
            try:
                _library.build(target, package / name, architectures)
            except (ImportError, RuntimeError) as error:
                raise SystemExit(str(error)) from None
            if problem := _library.check(package / name):
                raise SystemExit(f"{NAME} was compiled, but {problem}")


class AnyPython(bdist_wheel):
    """A library calls torch and not Python: one wheel serves every version of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


class Binary(Distribution):
    def has_ext_modules(self) -> bool:
        return bool(COMPILED)


COMPILED = libraries()
setup(
    name=NAME,
    version="0.1.0" + (f"+cu{_library.toolkit()[0]}" if os.environ.get("MEDGS_WHEEL") == "cuda" else ""),
    description=DESCRIPTION,
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    install_requires=REQUIRES,
    packages=[NAME],
    package_data={
        NAME: [
            "py.typed",
            *(str(p.relative_to(_library.PACKAGE)) for p in sorted(_library.CSRC.rglob("*.*"))),
        ]
    },
    distclass=Binary,
    cmdclass={"build_py": BuildLibraries, "bdist_wheel": AnyPython},
)
