"""The compiled operators of this package: found, or compiled on first use, and loaded into torch.

A library is named after all that went into it (sources, flags, torch, CUDA or not), so one of other sources is never
loaded: under the name looked for it is not there. The places, in this order:

1. beside this file, where an install that sees torch (`pip install --no-build-isolation`) compiles it;
2. beside this file, where a wheel brings it (`make wheels`). The operators call torch through its stable ABI, so this
   one serves every torch from 2.10 on and every Python, and needs neither compiler nor CUDA toolkit;
3. torch's extension cache (TORCH_EXTENSIONS_DIR, else ~/.cache/torch_extensions), where the first import compiles it.

A library that was just compiled must prove itself in a process of its own before it is used: an error raised in it has
to arrive in Python (`check`). Where the compiler brings a C++ runtime of its own, it would end the process instead.

The environment variable MEDGS_FORCE_CPU=1 leaves the CUDA kernels out, MEDGS_CXX_FLAGS adds flags for the C++ compiler
and linker (a library compiled with other flags has another name); TORCH_CUDA_ARCH_LIST and MAX_JOBS are as torch's.
This file is the same in both packages (a test compares them), and setup.py reads it too: it imports torch late.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
NAME = PACKAGE.name
CSRC = PACKAGE / "csrc"

OLDEST_TORCH = (2, 10)  # the first with all of the stable ABI that the operators call
# -fno-math-errno lets the compiler inline sqrt and its kind; results stay IEEE. Apple's clang has no OpenMP.
CXX_FLAGS = ["-O3", "-fno-math-errno"] + ([] if sys.platform == "darwin" else ["-fopenmp"])
CXX_FLAGS += os.environ.get("MEDGS_CXX_FLAGS", "").split()
LINK_FLAGS = [flag for flag in CXX_FLAGS if flag.startswith(("-fopenmp", "-fsanitize"))]
NVCC_FLAGS = ["-O3"]
COMMON_FLAGS = ["-std=c++17", f"-DTORCH_TARGET_VERSION={OLDEST_TORCH[0] << 56 | OLDEST_TORCH[1] << 48:#x}"]
ARCHITECTURES = "7.5;8.0;8.6;8.9;9.0+PTX"  # where no GPU is visible; PTX is for those to come


@functools.cache
def load(instead: str | None = None) -> str:
    """Make the operators known to torch, once; later calls return at once.

    Args:
        instead: what a user who cannot compile may do; the end of the error message.

    Returns:
        What they were compiled for: "cpu", or CUDA's version as in "cu130". Also "cpu" where there is nothing to
        compile for it.

    Raises:
        ImportError: a compiler is missing, or compiling failed; the text says what to do.
    """
    import torch

    if torch_version() < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise ImportError(f"{NAME} needs torch {oldest} or newer, and this is {torch.__version__}")
    target = torch_target()
    if _loaded(target):
        return target
    wanted, target = target, build_target()
    if target != wanted and _loaded(target):
        return target
    if sources(target):
        try:
            library = _cached_library(target)
        except ImportError as error:
            if target != "cpu" and _loaded("cpu"):  # of a wheel, for want of what compiles for the GPU
                print(f"{NAME}: on the CPU alone, as {error}", file=sys.stderr)
                return "cpu"
            raise ImportError(f"{error}, or {instead}" if instead else str(error)) from error.__cause__
        torch.ops.load_library(str(library))
    return target


def _loaded(target: str) -> bool:
    """Whether a library beside this file serves the target, which it then does. One of a wheel that does not load,
    where the C library is older, say, is passed over, and compiling remains."""
    import torch

    for library in (installed_library(target), wheel_library(target)):
        if not library.exists():
            continue
        try:
            torch.ops.load_library(str(library))
        except OSError as error:
            if library == installed_library(target):
                raise ImportError(
                    f"{library} does not load ({error}): remove it, and it is compiled anew"
                ) from error
            print(f"{NAME}: {library.name} does not load ({error})", file=sys.stderr)
            continue
        return True
    return False


def torch_version() -> tuple[int, int]:
    """Of the torch at hand: (2, 13)."""
    import torch

    major, minor = re.match(r"(\d+)\.(\d+)", torch.__version__).groups()  # type: ignore[union-attr]
    return int(major), int(minor)


def torch_target() -> str:
    """What the torch at hand could run: "cpu", or CUDA's version as in "cu130"."""
    import torch

    if torch.version.cuda is None or os.environ.get("MEDGS_FORCE_CPU", "0") not in ("", "0"):
        return "cpu"
    return "cu" + torch.version.cuda.replace(".", "")


def build_target() -> str:
    """What can be compiled here: the same, but "cpu" where there is no CUDA toolkit with nvcc."""
    target = torch_target()
    return target if target == "cpu" or _nvcc() is not None else "cpu"


def sources(target: str) -> list[Path]:
    """The files to compile."""
    patterns = ["cpu/*.cpp"] + ([] if target == "cpu" else ["cuda/*.cpp", "cuda/*.cu"])
    return sorted(path for pattern in patterns for path in CSRC.glob(pattern))


def library_name(target: str) -> str:
    """A name no library of other sources, other flags or another torch has."""
    import torch

    return f"_ops_{target}_{_digest(torch.__version__, str(torch.version.git_version))}"


def installed_library(target: str) -> Path:
    """Where an install that sees torch puts the library."""
    return PACKAGE / f"{library_name(target)}.so"


def wheel_library(target: str) -> Path:
    """Where a wheel has the library that serves any torch; that of CUDA 13 is for every CUDA 13."""
    family = target if target == "cpu" else target[:4]
    return PACKAGE / f"_ops_{family}_{_digest()}.so"


def _digest(*torch: str) -> str:
    digest = hashlib.sha256(
        "\0".join([*torch, sys.platform, platform.machine(), *COMMON_FLAGS, *CXX_FLAGS, *NVCC_FLAGS]).encode()
    )
    for path in sorted(path for path in CSRC.rglob("*") if path.suffix in (".h", ".cpp", ".cu", ".cuh")):
        digest.update(b"\0" + path.relative_to(CSRC).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


# ---- compiling -----------------------------------------------------------------------------------------------------


def build(target: str, library: Path, architectures: str | None = None) -> None:
    """Compile and link the operators, a file on each processor (MAX_JOBS).

    Args:
        target: "cpu", or CUDA's version as in "cu130".
        library: the file to write.
        architectures: GPUs to compile for, as in TORCH_CUDA_ARCH_LIST; by default those that are visible.

    Raises:
        ImportError: there is no compiler, or nvcc is not of torch's CUDA.
        RuntimeError: with what the compiler said.
    """
    import torch

    if problem := _missing_tool() or other_cuda(target):
        raise ImportError(f"{NAME} has to be compiled once for torch {torch.__version__}, and {problem}")
    home, nvcc = Path(torch.__file__).parent, _nvcc()
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    headers = [f"-I{CSRC}", "-isystem", str(home / "include")]
    if nvcc is not None and target != "cpu":
        headers += ["-isystem", str(nvcc.parents[1] / "include")]

    def command(source: Path, output: Path) -> list[str]:
        if source.suffix == ".cu":
            host = ["-ccbin", compiler[-1]] if "CXX" in os.environ else []
            flags = [*COMMON_FLAGS, *NVCC_FLAGS, *_architecture_flags(architectures), f"-I{CSRC}"]
            return [str(nvcc), *host, "-c", str(source), "-o", str(output), *flags,
                    "--compiler-options", "-fPIC,-fvisibility=hidden"]  # fmt: skip
        flags = [*COMMON_FLAGS, *CXX_FLAGS, "-fPIC", "-fvisibility=hidden", *headers]
        return [*compiler, "-c", str(source), "-o", str(output), *flags]

    with tempfile.TemporaryDirectory(dir=library.parent, prefix="build") as folder:
        files = sources(target)
        objects = [Path(folder, f"{i}_{path.name}.o") for i, path in enumerate(files)]
        jobs = int(os.environ.get("MAX_JOBS", 0)) or os.cpu_count() or 1
        with ThreadPoolExecutor(jobs) as pool:  # the long ones first: those of nvcc
            pairs = sorted(zip(files, objects, strict=True), key=lambda pair: pair[0].suffix != ".cu")
            list(pool.map(lambda pair: _run(command(*pair)), pairs))
        whole = Path(folder, "whole.so")
        link = [*compiler, "-shared", *map(str, objects), "-o", str(whole), *link_flags()]
        _run([*link, f"-L{home / 'lib'}", *_libraries(target, nvcc)])
        os.replace(whole, library)  # under its name only once whole


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")


def _libraries(target: str, nvcc: Path | None) -> list[str]:
    """What is linked: torch by name only, as it is loaded before; CUDA's runtime whole, so that any torch will do."""
    if not sys.platform.startswith("linux"):
        return ["-ltorch_cpu", "-lc10", "-undefined", "dynamic_lookup"]
    libraries = ["-Wl,--as-needed", "-Wl,-S", "-ltorch_cpu", "-lc10"]
    if nvcc is not None and target != "cpu":
        home = nvcc.parents[1]
        folders = [home / "lib64", home / "lib", *home.glob("targets/*/lib")]
        folder = next((f for f in folders if (f / "libcudart_static.a").exists()), None)
        static = [str(folder / "libcudart_static.a")] if folder else [f"-L{home / 'lib64'}", "-lcudart"]
        libraries += [*static, "-ldl", "-lrt", "-lpthread"]
    return libraries


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


def _architecture_flags(architectures: str | None) -> list[str]:
    import torch

    wanted = architectures or os.environ.get("TORCH_CUDA_ARCH_LIST")
    if not wanted and torch.cuda.is_available():
        devices = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        wanted = ";".join(f"{major}.{minor}" for major, minor in sorted(devices))
    flags = []
    for name in re.split(r"[;\s]+", (wanted or ARCHITECTURES).strip()):
        number = name.removesuffix("+PTX").replace(".", "")
        flags += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
        if name.endswith("+PTX"):
            flags += ["-gencode", f"arch=compute_{number},code=compute_{number}"]
    return flags


def _cached_library(target: str) -> Path:
    """The library in torch's extension cache, compiled now if it is not there."""
    import torch

    name = library_name(target)
    if target != "cpu":  # a cache may be shared by machines whose GPUs differ
        visible = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        name += "".join(f"_sm{major}{minor}" for major, minor in sorted(visible))
    folder = extension_cache() / NAME
    library = folder / f"{name}.so"
    if library.exists():
        return library
    from filelock import FileLock

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
            _compile(target, library)
    return library


def extension_cache() -> Path:
    """torch's extension cache."""
    if folder := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(folder)
    if sys.platform == "darwin":
        return Path.home() / "Library/Caches/torch_extensions"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torch_extensions"


def _compile(target: str, library: Path) -> None:
    import torch

    if problem := _missing_tool() or other_cuda(target):
        raise ImportError(f"{NAME} has to be compiled once for torch {torch.__version__}, and {problem}")
    print(
        f"{NAME}: compiling for torch {torch.__version__} ({_describe(target)}), once, about {_seconds(target)} s",
        file=sys.stderr,
        flush=True,
    )
    new = library.with_suffix(".new")
    try:
        build(target, new)
    except (RuntimeError, OSError) as error:
        log = library.with_suffix(".log")
        log.write_text(str(error))
        lines = [line.strip() for line in str(error).splitlines()[1:] if line.strip()]
        reason = next((line for line in lines if "error:" in line), lines[0] if lines else repr(error))
        raise ImportError(f"compiling {NAME} failed: {reason} (full output in {log})") from error
    if problem := check(new):
        new.unlink()
        raise ImportError(f"{NAME} was compiled with {_compiler()}, but {problem}")
    os.replace(new, library)


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
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        return (
            f"there is no C++ compiler ({compiler}): install one (apt-get install g++, dnf install gcc-c++, "
            "conda install cxx-compiler)"
        )
    return None


def _nvcc() -> Path | None:
    """nvcc of the CUDA toolkit: of CUDA_HOME, else the one on the PATH or in the usual folder that has headers too."""
    if home := os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        folders = [Path(home)]
    else:
        found = shutil.which("nvcc")
        folders = [Path(found).resolve().parents[1]] if found else []
        folders = [
            f for f in [*folders, Path("/usr/local/cuda")] if (f / "include/cuda_runtime_api.h").exists()
        ]
    return next((f / "bin/nvcc" for f in folders if (f / "bin/nvcc").exists()), None)


def toolkit() -> tuple[str, str]:
    """Major and minor number of the CUDA toolkit that is here."""
    nvcc = _nvcc()
    said = (
        subprocess.run([str(nvcc), "--version"], capture_output=True, text=True, check=False).stdout
        if nvcc
        else ""
    )
    release = re.search(r"release (\d+)\.(\d+)", said)
    if release is None:
        raise ImportError(
            "there is no CUDA toolkit with nvcc: install one and name its folder with CUDA_HOME"
        )
    return release[1], release[2]


def other_cuda(target: str) -> str | None:
    """What to do where nvcc is of another major version than the target's CUDA, that of torch."""
    if target == "cpu":
        return None
    found, wanted = toolkit(), target[2:4]
    if found[0] == wanted:
        return None
    return (
        f"{_nvcc()} is of CUDA {'.'.join(found)}, torch of CUDA {wanted}.{target[4:]}. Install the toolkit of CUDA "
        f"{wanted} and name its folder with CUDA_HOME, or do without the GPU (MEDGS_FORCE_CPU=1)"
    )


def _describe(target: str) -> str:
    import torch

    if target != "cpu":
        return f"CPU and CUDA {torch.version.cuda}"
    return "CPU" if torch_target() == "cpu" else "CPU alone: no nvcc found, set CUDA_HOME"


def _seconds(target: str) -> int:
    """A guess from a common machine's processor seconds per file; what else the machine does now takes its share."""
    files = sources(target)
    gpus = len(_architecture_flags(None)) // 2 if target != "cpu" else 0
    work = sum(5 * gpus if path.suffix == ".cu" else 3.5 for path in files)
    cores = os.cpu_count() or 1
    busy = 1 + (os.getloadavg()[0] / cores if hasattr(os, "getloadavg") else 0)
    return round(max(work / min(cores, len(files)), 7 + 8 * gpus) * busy)  # no less than the longest file
