"""Installs diff_gaussian_rasterization: compiled now where torch can be imported, else at its first import."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

NAME = "diff_gaussian_rasterization"
DESCRIPTION = (
    "Differentiable Gaussian splatting on CPU and CUDA: planes cut from a time sequence, and 3-D scenes"
)
REQUIRES = ["torch>=2.4", "numpy", "ninja", "setuptools", "filelock"]

os.chdir(Path(__file__).resolve().parent)  # the paths below are relative, as setuptools wants them
_spec = importlib.util.spec_from_file_location("_library", f"{NAME}/_library.py")
_library = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_library)


class FreshBuildPy(build_py):
    """Starts from an empty folder: else a source file deleted here would be installed from an older build."""

    def run(self) -> None:
        shutil.rmtree(Path(self.build_lib, NAME), ignore_errors=True)
        super().run()


def compiled_part(target: str) -> dict:
    """The arguments of setup() that compile the operators and name the library as _library.py looks for it."""
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    try:
        from setuptools.command.bdist_wheel import bdist_wheel
    except ImportError:  # before setuptools 70.1
        from wheel.bdist_wheel import bdist_wheel

    class AnyPython(bdist_wheel):
        """The library calls torch and not Python: one wheel serves every version of Python."""

        def get_tag(self) -> tuple[str, str, str]:
            return "py3", "none", super().get_tag()[2]

    class BuildLibrary(BuildExtension):
        def get_ext_filename(self, ext_name: str) -> str:
            return os.path.join(*ext_name.split(".")[:-1], _library.installed_library(target).name)

        def run(self) -> None:
            super().run()
            for library in self.get_outputs():
                if problem := _library.check(Path(library)):
                    raise SystemExit(f"{NAME} was compiled, but {problem}")

    cuda = target != "cpu"
    flags = {"cxx": [*_library.CXX_FLAGS], "nvcc": [*_library.NVCC_FLAGS]}
    extension = (CUDAExtension if cuda else CppExtension)(
        f"{NAME}._ops",
        [os.path.relpath(path) for path in _library.sources(target)],
        include_dirs=[os.path.abspath(f"{NAME}/csrc")],
        extra_compile_args=flags if cuda else flags["cxx"],
        extra_link_args=[*_library.link_flags(), *(["-Wl,-S"] if sys.platform == "linux" else [])],
    )
    commands = {"build_py": FreshBuildPy, "build_ext": BuildLibrary, "bdist_wheel": AnyPython}
    return {"ext_modules": [extension], "cmdclass": commands}


try:
    target = _library.build_target()
except ModuleNotFoundError:  # no torch here: pip's build isolation
    target = None
compiling = target is not None and bool(_library.sources(target))
with _library.build_environment(target) if compiling else contextlib.nullcontext():
    setup(
        name=NAME,
        version="0.1.0",
        description=DESCRIPTION,
        license="Apache-2.0",
        python_requires=">=3.10",
        install_requires=REQUIRES,
        packages=[NAME],
        package_data={
            NAME: [
                "py.typed",
                *(str(p.relative_to(_library.PACKAGE)) for p in sorted(_library.CSRC.rglob("*.*"))),
            ]
        },
        **(compiled_part(target) if compiling else {"cmdclass": {"build_py": FreshBuildPy}}),
    )
