"""The compiled operators of this package: found, or compiled on first use, and loaded into torch.

A library is named after all that went into it (sources, flags, torch, CUDA or not), so one that was made for another
torch, or of other sources, is never loaded: under the name looked for it is not there. The places, in this order:

1. beside this file, where an install that sees torch (`pip install --no-build-isolation`) compiles it;
2. torch's extension cache (TORCH_EXTENSIONS_DIR, else ~/.cache/torch_extensions), where the first import compiles it.

A library that was just compiled must prove itself in a process of its own before it is used: an error raised in it has
to arrive in Python (`check`). Where the compiler brings a C++ runtime of its own, it would end the process instead.

The environment variable MEDGS_FORCE_CPU=1 leaves the CUDA kernels out, MEDGS_CXX_FLAGS adds flags for the C++ compiler
and linker (a library compiled with other flags has another name); TORCH_CUDA_ARCH_LIST and MAX_JOBS are torch's.
This file is the same in both packages (a test compares them), and setup.py reads it too: it imports torch late.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
NAME = PACKAGE.name
CSRC = PACKAGE / "csrc"

# -fno-math-errno lets the compiler inline sqrt and its kind; results stay IEEE. Apple's clang has no OpenMP.
CXX_FLAGS = ["-O3", "-fno-math-errno"] + ([] if sys.platform == "darwin" else ["-fopenmp"])
CXX_FLAGS += os.environ.get("MEDGS_CXX_FLAGS", "").split()
LINK_FLAGS = [flag for flag in CXX_FLAGS if flag.startswith(("-fopenmp", "-fsanitize"))]
NVCC_FLAGS = ["-O3"]


def link_flags() -> list[str]:
    """Flags of the linker. On Linux they name the C++ runtime that torch has loaded, before the compiler's own.

    A compiler that finds no shared libstdc++ of its own (one copied to another folder, one built without it) links the
    static one, without a word. Two runtimes in one process share some of their symbols and not others, and the first
    number that is written into an error message then calls into nothing. Named first, the loaded runtime provides all
    that it has; what a newer compiler needs beyond that still comes from its own archive, and stays private.
    """
    import torch  # noqa: F401  (it loads the runtime)

    if not sys.platform.startswith("linux"):
        return LINK_FLAGS
    maps = Path("/proc/self/maps").read_text().splitlines()
    loaded = {line.split(maxsplit=5)[5] for line in maps if "/" in line}
    runtime = [p for p in sorted(loaded) if Path(p).name.startswith(("libstdc++.so", "libgcc_s.so"))]
    return [*LINK_FLAGS, *runtime, "-Wl,--exclude-libs,libstdc++.a:libgcc_eh.a"]


@functools.cache
def load(instead: str | None = None) -> str:
    """Make the operators known to torch, once; later calls return at once.

    Args:
        instead: what a user who cannot compile may do; the end of the error message.

    Returns:
        What they were compiled for: "cpu", or CUDA's version as in "cu130". Also "cpu" where there is nothing to
        compile for it.

    Raises:
        ImportError: a compiler or ninja is missing, or compiling failed; the text says what to do.
    """
    import torch

    target = torch_target()
    library = installed_library(target)
    if not library.exists():
        target = build_target()
        library = installed_library(target)
    if not library.exists() and sources(target):
        try:
            library = _cached_library(target)
        except ImportError as error:
            raise ImportError(f"{error}, or {instead}" if instead else str(error)) from error.__cause__
    if library.exists():
        try:
            torch.ops.load_library(str(library))
        except OSError as error:
            raise ImportError(
                f"{library} does not load ({error}): remove it, and it is compiled anew"
            ) from error
    return target


def torch_target() -> str:
    """What the torch at hand could run: "cpu", or CUDA's version as in "cu130"."""
    import torch

    if torch.version.cuda is None or os.environ.get("MEDGS_FORCE_CPU", "0") not in ("", "0"):
        return "cpu"
    return "cu" + torch.version.cuda.replace(".", "")


def build_target() -> str:
    """What can be compiled here: the same, but "cpu" where torch finds no CUDA toolkit with nvcc."""
    target = torch_target()
    if target != "cpu":
        from torch.utils.cpp_extension import CUDA_HOME

        if not CUDA_HOME or not Path(CUDA_HOME, "bin", "nvcc").exists():
            return "cpu"
    return target


def sources(target: str) -> list[Path]:
    """The files to compile."""
    patterns = ["cpu/*.cpp"] + ([] if target == "cpu" else ["cuda/*.cpp", "cuda/*.cu"])
    return sorted(path for pattern in patterns for path in CSRC.glob(pattern))


def library_name(target: str) -> str:
    """A name no library of other sources, other flags or another torch has."""
    import torch

    parts = [torch.__version__, str(torch.version.git_version), sys.platform, platform.machine()]
    digest = hashlib.sha256("\0".join([*parts, *CXX_FLAGS, *NVCC_FLAGS]).encode())
    for path in sorted(path for path in CSRC.rglob("*") if path.suffix in (".h", ".cpp", ".cu", ".cuh")):
        digest.update(b"\0" + path.relative_to(CSRC).as_posix().encode() + b"\0" + path.read_bytes())
    return f"_ops_{target}_{digest.hexdigest()[:16]}"


def installed_library(target: str) -> Path:
    """Where an install that sees torch puts the library."""
    return PACKAGE / f"{library_name(target)}.so"


@contextlib.contextmanager
def build_environment(target: str) -> Iterator[None]:
    """For torch's build tools: finds ninja where no virtual environment is activated, and chooses GPUs to compile for.

    The latter are the visible ones, as always with torch. Where none is visible, as in a container's build or on a
    cluster's front end, torch would refuse or guess: then all current ones, with PTX for those to come.
    """
    import torch

    if problem := _other_cuda(target):
        raise ImportError(f"{NAME} cannot be compiled for torch {torch.__version__}: {problem}")
    changes = {}
    with contextlib.suppress(ImportError):
        import ninja

        changes["PATH"] = os.pathsep.join([ninja.BIN_DIR, os.environ.get("PATH", os.defpath)])
    if target != "cpu" and "TORCH_CUDA_ARCH_LIST" not in os.environ and not torch.cuda.is_available():
        volta = [] if int(target[2:-1]) >= 13 else ["7.0"]  # CUDA 13 dropped it
        changes["TORCH_CUDA_ARCH_LIST"] = ";".join([*volta, "7.5", "8.0", "8.6", "8.9", "9.0+PTX"])
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _cached_library(target: str) -> Path:
    """The library in torch's extension cache, compiled now if it is not there."""
    import torch
    from filelock import FileLock
    from torch.utils import cpp_extension

    name = library_name(target)
    if target != "cpu":  # a cache may be shared by machines whose GPUs differ
        visible = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        name += "".join(f"_sm{major}{minor}" for major, minor in sorted(visible))
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root())
    folder = root / NAME
    library = folder / f"{name}.so"
    if library.exists():
        return library
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.lock").touch()
    except OSError as error:
        raise ImportError(
            f"{NAME} has to be compiled once, and {folder} cannot be written ({error.strerror}): name a folder that "
            "can be with TORCH_EXTENSIONS_DIR"
        ) from error
    with FileLock(folder / f"{name}.lock"):
        if not library.exists():  # else another process compiled it while this one waited
            _compile(target, name, library)
    return library


def _compile(target: str, name: str, library: Path) -> None:
    import torch
    from torch.utils import cpp_extension

    build = library.with_suffix(".build")
    shutil.rmtree(build, ignore_errors=True)  # half a build, of a process that was stopped
    build.mkdir()
    with build_environment(target):
        if problem := _missing_tool():
            raise ImportError(f"{NAME} has to be compiled once for torch {torch.__version__}, and {problem}")
        files = sources(target)
        print(
            f"{NAME}: compiling for torch {torch.__version__} ({_describe(target)}), once, about {_seconds(files)} s",
            file=sys.stderr,
            flush=True,
        )
        try:
            cpp_extension.load(
                name=name,
                sources=[str(path) for path in files],
                extra_cflags=[*CXX_FLAGS],
                extra_cuda_cflags=[*NVCC_FLAGS],
                extra_ldflags=link_flags(),
                extra_include_paths=[str(CSRC)],
                build_directory=str(build),
                with_cuda=target != "cpu",
                is_python_module=False,
            )
        except (RuntimeError, OSError, subprocess.SubprocessError) as error:
            log = library.with_suffix(".log")
            log.write_text(str(error))
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            reason = next((line for line in lines if "error:" in line), lines[0] if lines else repr(error))
            raise ImportError(f"compiling {NAME} failed: {reason} (full output in {log})") from error
    if problem := check(build / f"{name}.so"):
        raise ImportError(f"{NAME} was compiled with {_compiler()}, but {problem}")
    # Under its name only once whole. torch has loaded it already: the same file again is no second load.
    os.replace(build / f"{name}.so", library)
    shutil.rmtree(build)


def check(library: Path) -> str | None:
    """What is wrong with a library that was just compiled, None where it may be used.

    Every library has an operator `self_test` that refuses its argument; a process of its own asks for that, so that
    the end of it is seen.
    """
    done = subprocess.run(
        [sys.executable, "-c", _SELF_TEST, str(library), NAME], capture_output=True, text=True, check=False
    )
    if done.returncode == 0:
        return None
    if done.returncode > 0:
        how = f"fails its self-test: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}"
    else:
        how = f"ends the process (signal {-done.returncode}) where it should raise an error"
    return (
        f"it {how}. It is not used: its C++ runtime may not go with torch's. Name another compiler (CXX=/usr/bin/g++), "
        "or install the shared libstdc++ of this one"
    )


_SELF_TEST = """
import sys
import torch
library, name = sys.argv[1:]
torch.ops.load_library(library)
test = getattr(getattr(torch.ops, name), "self_test", None)
if test is not None:
    try:
        test(-1)
    except ValueError as error:
        assert "got -1" in str(error), error
    else:
        raise AssertionError("self_test(-1) was not refused")
"""


def _compiler() -> str:
    return os.environ.get("CXX", "c++").split()[-1]


def _missing_tool() -> str | None:
    from torch.utils.cpp_extension import is_ninja_available

    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        return (
            f"there is no C++ compiler ({compiler}): install one (apt-get install g++, dnf install gcc-c++, "
            "conda install cxx-compiler)"
        )
    if not is_ninja_available():
        return "there is no ninja: pip3 install ninja"
    return None


def _other_cuda(target: str) -> str | None:
    """What to do where nvcc is of another major version than the CUDA that torch was built with."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if target == "cpu" or CUDA_HOME is None or torch.version.cuda is None:
        return None
    nvcc = Path(CUDA_HOME, "bin", "nvcc")
    said = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True, check=False).stdout
    release = re.search(r"release (\d+)\.(\d+)", said)
    wanted = torch.version.cuda.split(".")[0]
    if release is None or release[1] == wanted:
        return None
    return (
        f"{nvcc} is of CUDA {release[1]}.{release[2]}, torch of CUDA {torch.version.cuda}. Install the toolkit of CUDA "
        f"{wanted} and name its folder with CUDA_HOME, or do without the GPU (MEDGS_FORCE_CPU=1)"
    )


def _describe(target: str) -> str:
    import torch

    if target != "cpu":
        return f"CPU and CUDA {torch.version.cuda}"
    return "CPU" if torch_target() == "cpu" else "CPU alone: no nvcc found, set CUDA_HOME"


def _seconds(files: list[Path]) -> int:
    """A rough guess from a common machine's seconds for a file, most of them spent in torch's and CUDA's headers; what
    else the machine does now takes its share."""
    work = sum(30 if path.suffix == ".cu" else 12 for path in files)
    cores = os.cpu_count() or 1
    busy = 1 + (os.getloadavg()[0] / cores if hasattr(os, "getloadavg") else 0)
    return round(max(work / min(cores, len(files)), 20) * busy)
