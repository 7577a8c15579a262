"""Describes this installation, for bug reports: versions, devices, compilers, compiled operators, folders.

    python -m training.doctor

Compiles nothing and changes nothing. Exit status 1 where something that every run needs is missing.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch.utils import cpp_extension

from utils.errors import ArgumentParser, run
from utils.memory import free_memory
from utils.version import VERSION

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("diff_gaussian_rasterization", "simple_knn")
_ENVIRONMENT = (
    "CC", "CXX", "CUDA_HOME", "CUDA_VISIBLE_DEVICES", "MAX_JOBS", "MEDGS_CXX_FLAGS", "MEDGS_FORCE_CPU",
    "OMP_NUM_THREADS", "TORCH_CUDA_ARCH_LIST", "TORCH_EXTENSIONS_DIR",
)  # fmt: skip
MISSING = "MISSING"
"""Ends the line of anything missing that every run needs."""


def lines() -> Iterator[tuple[str, str]]:
    """What to report, as (name, finding)."""
    yield "MedGS", VERSION
    yield "Python", f"{platform.python_version()} ({sys.executable})"
    yield "system", f"{platform.platform()}, {_libc()}"
    yield "torch", f"{torch.__version__}, for {'CUDA ' + torch.version.cuda if torch.version.cuda else 'CPU'}"
    yield from _devices()
    yield "C++ compiler", _tool(os.environ.get("CXX", "c++").split()[0])
    yield (
        "nvcc",
        _tool(str(Path(cpp_extension.CUDA_HOME, "bin", "nvcc")) if cpp_extension.CUDA_HOME else "nvcc"),
    )
    yield "ninja", "found" if cpp_extension.is_ninja_available() else "not found"
    for package in PACKAGES:
        yield package, _operators(package)
    yield "cache", os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()
    yield "temporary files", tempfile.gettempdir()
    for name, version in _requirements(ROOT / "requirements.txt"):
        yield name, version or MISSING
    for name, version in _requirements(ROOT / "requirements-optional.txt"):
        yield name, version or "not installed (optional)"
    for name in _ENVIRONMENT:
        if name in os.environ:
            yield f"${name}", os.environ[name]


def _devices() -> Iterator[tuple[str, str]]:
    free = free_memory(torch.device("cpu")) / 2**30
    threads = torch.get_num_threads()
    yield "CPU", f"{_cpu()}, {os.cpu_count()} cores, {threads} threads, {free:.1f} GiB free"
    if not torch.cuda.is_available():
        yield "GPU", "none that torch can use"
        return
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        memory = about.total_memory / 2**30
        yield (
            f"GPU {index}",
            f"{about.name}, compute capability {about.major}.{about.minor}, {memory:.0f} GiB",
        )
    yield (
        "driver",
        _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "unknown",
    )


def _cpu() -> str:
    """The processor's name, where the system reports it."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def _libc() -> str:
    return " ".join(platform.libc_ver()).strip() or "unknown C library"


def _tool(name: str) -> str:
    """The version line of a compiler, and where it is."""
    path = shutil.which(name)
    if path is None:
        return "not found"
    version = _first_line(path, "--version")
    if "nvcc" in Path(path).name:
        output = _output(path, "--version")
        version = next((line for line in output.splitlines() if "release" in line), version)
    return f"{version or 'no version'} ({path})"


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout


def _first_line(*command: str) -> str:
    return next(iter(_output(*command).strip().splitlines()), "")


def _operators(package: str) -> str:
    """The version of a package and which library it would load."""
    try:
        library = importlib.import_module(f"{package}._library")
    except ImportError:
        folder = f"submodules/{package.replace('_', '-')}"
        return (
            f"{MISSING}: make setup, or pip3 install ./{folder}; where medgs came as a wheel, "
            "pip3 install --force-reinstall medgs"
        )
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # the sources within medgs, or on the path
        version = "not installed by itself"
    target = library.build_target()
    installed, wheel = library.installed_library(target), library.wheel_library(target)
    cached = sorted((library.extension_cache() / package).glob(f"{library.library_name(target)}*.so"))
    if installed.exists():
        state = f"compiled on installing ({installed})"
    elif wheel.exists():
        state = f"came with the wheel ({wheel})"
    elif cached:
        state = f"compiled on first use ({cached[0]})"
    else:
        state = "to be compiled on first use" if library.sources(target) else "nothing to compile"
    return f"{version}, for {target}, {state}; from {library.PACKAGE}"


def _requirements(path: Path) -> Iterator[tuple[str, str | None]]:
    """The distributions that a requirements file names, with their installed versions."""
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        if name := re.match(r"[A-Za-z0-9][\w.-]*", line):
            try:
                yield name[0], importlib.metadata.version(name[0])
            except importlib.metadata.PackageNotFoundError:
                yield name[0], None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(prog="python -m training.doctor", description=(__doc__ or "").split("\n")[0])
    parser.parse_args(arguments)
    found = list(lines())
    width = max(len(name) for name, _ in found)
    for name, finding in found:
        print(f"{name:{width}}  {finding}")
    missing = [name for name, finding in found if finding.startswith(MISSING)]
    if missing:
        print(f"\nmissing: {', '.join(missing)}", file=sys.stderr)
    return 1 if missing else 0


if __name__ == "__main__":
    run(main)
