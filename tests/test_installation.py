"""The compiled operators: found, or compiled once, never stale; and what a user reads when that fails.

Most tests run the loader on a toy package, whose one source is plain C++ and compiles in a second.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SUBMODULES = {
    "diff_gaussian_rasterization": ROOT / "submodules/diff-gaussian-rasterization",
    "simple_knn": ROOT / "submodules/simple-knn",
}
LOADER = SUBMODULES["simple_knn"] / "simple_knn/_library.py"

needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "c++").split()[0]) is None, reason="needs a C++ compiler"
)


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with the loader, one source and its own extension cache; compiled for the CPU."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("MEDGS_FORCE_CPU", "1")
    package = tmp_path / "toy"
    (package / "csrc/cpu").mkdir(parents=True)
    # The path makes every test's source unique: torch builds a name only once per process.
    (package / "csrc/cpu/answer.cpp").write_text(f'// {tmp_path}\nextern "C" int answer() {{ return 42; }}\n')
    shutil.copy(LOADER, package)
    return package


def loader_of(package: Path) -> ModuleType:
    """The loader as a fresh process would see it: nothing loaded yet."""
    spec = importlib.util.spec_from_file_location("toy_library", package / "_library.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess:
    done = subprocess.run(
        [str(part) for part in command],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_both_packages_have_the_same_loader() -> None:
    copies = {(folder / name / "_library.py").read_bytes() for name, folder in SUBMODULES.items()}
    assert len(copies) == 1


@needs_compiler
def test_compiles_once_and_says_so(toy: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    assert loader_of(toy).load() == "cpu"
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith(f"toy: compiling for torch {torch.__version__} (CPU), once, about ")
    (library,) = (tmp_path / "cache").rglob("*.so")
    made = library.stat().st_mtime_ns

    assert loader_of(toy).load() == "cpu"
    assert capfd.readouterr().err == ""
    assert library.stat().st_mtime_ns == made


@needs_compiler
def test_changed_source_is_compiled_again(toy: Path, tmp_path: Path) -> None:
    loader_of(toy).load()
    with (toy / "csrc/cpu/answer.cpp").open("a") as source:
        source.write('extern "C" int question() { return 6 * 9; }\n')
    loader_of(toy).load()
    assert len(list((tmp_path / "cache").rglob("*.so"))) == 2


def test_library_of_another_torch_has_another_name(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = loader_of(toy)
    here = loader.installed_library("cpu")
    assert here != loader.installed_library("cu130")
    monkeypatch.setattr(torch, "__version__", "2.4.0")
    assert here != loader.installed_library("cpu")


def test_library_of_other_flags_has_another_name(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = loader_of(toy)
    monkeypatch.setenv("MEDGS_CXX_FLAGS", "-O1 -fsanitize=address")
    other = loader_of(toy)
    assert here.installed_library("cpu") != other.installed_library("cpu")
    assert "-fsanitize=address" in other.CXX_FLAGS and "-fsanitize=address" in other.LINK_FLAGS
    assert "-O1" not in other.LINK_FLAGS


@needs_compiler
def test_library_made_at_install_is_preferred(toy: Path, tmp_path: Path) -> None:
    loader_of(toy).load()
    (library,) = (tmp_path / "cache").rglob("*.so")
    loader = loader_of(toy)
    shutil.copy(library, loader.installed_library("cpu"))
    shutil.rmtree(tmp_path / "cache")
    loader.load()
    assert not (tmp_path / "cache").exists()


@needs_compiler
def test_library_of_a_wheel_serves_any_torch(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    loader_of(toy).load()
    (library,) = (tmp_path / "cache").rglob("*.so")
    loader = loader_of(toy)
    shutil.copy(library, loader.wheel_library("cpu"))
    shutil.rmtree(tmp_path / "cache")
    monkeypatch.setattr(torch, "__version__", "2.10.0")
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert loader.load() == "cpu"
    # For a torch with CUDA it is the last resort.
    monkeypatch.delenv("MEDGS_FORCE_CPU")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    (tmp_path / "cuda/bin").mkdir(parents=True)
    (tmp_path / "cuda/bin/nvcc").touch()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    capfd.readouterr()
    assert loader_of(toy).load() == "cpu"
    assert "toy: on the CPU alone, as toy has to be compiled" in capfd.readouterr().err
    monkeypatch.setattr(torch, "__version__", "2.9.1")
    with pytest.raises(ImportError, match=r"needs torch 2\.10 or newer, and this is 2\.9\.1"):
        loader_of(toy).load()


def test_missing_compiler_is_named_with_a_way_out(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ImportError, match=r"no C\+\+ compiler \(no-such-compiler\).*--rasterizer oracle"):
        loader_of(toy).load(instead="run with --rasterizer oracle")


def test_cache_that_cannot_be_written_says_what_to_set(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file"))
    with pytest.raises(ImportError, match=r"cannot be written .*TORCH_EXTENSIONS_DIR"):
        loader_of(toy).load()


def test_nvcc_of_another_major_version_is_refused(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvcc = tmp_path / "cuda/bin/nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text('#!/bin/sh\necho "Cuda compilation tools, release 12.4, V12.4.131"\n')
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    loader = loader_of(toy)
    with pytest.raises(ImportError, match=r"nvcc is of CUDA 12\.4, torch of CUDA 13\.0.*CUDA_HOME"):
        loader.build("cu130", tmp_path / "library.so")
    assert loader.other_cuda("cu128") is None


def test_tensor_on_a_gpu_meets_one_sentence_without_kernels() -> None:
    from diff_gaussian_rasterization.ops import without_kernels

    with pytest.raises(RuntimeError, match=r"blend: .* compiled for the CPU alone.*CUDA_HOME"):
        without_kernels("blend")()


@needs_compiler
def test_compiler_error_is_quoted_and_logged(toy: Path, tmp_path: Path) -> None:
    (toy / "csrc/cpu/answer.cpp").write_text("#error not today\n")
    with pytest.raises(ImportError, match=r"#error not today.*--rasterizer oracle"):
        loader_of(toy).load(instead="run with --rasterizer oracle")
    (log,) = (tmp_path / "cache").rglob("*.log")
    assert "not today" in log.read_text()
    assert not list((tmp_path / "cache").rglob("*.so"))


@needs_compiler
@pytest.mark.slow
def test_processes_that_start_together_compile_once(toy: Path, tmp_path: Path) -> None:
    (toy / "__init__.py").touch()
    command = [sys.executable, "-c", "from toy import _library; _library.load()"]
    started = [subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    said = [process.communicate()[1] for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], said
    assert sum("compiling" in text for text in said) == 1


@needs_compiler
def test_library_that_ends_its_process_is_refused(toy: Path, tmp_path: Path) -> None:
    (toy / "csrc/cpu/answer.cpp").write_text(
        f"// {tmp_path}\n#include <cstdlib>\n"
        'static int end = std::getenv("TOY_ENDS") ? (std::abort(), 0) : 0;\n'
    )
    loader_of(toy).load()
    (library,) = (tmp_path / "cache").rglob("*.so")
    loader = loader_of(toy)
    assert loader.check(library) is None
    os.environ["TOY_ENDS"] = "1"
    try:
        problem = loader.check(library)
    finally:
        del os.environ["TOY_ENDS"]
    assert problem is not None and "ends the process (signal 6)" in problem and "CXX=" in problem
    assert "fails its self-test" in str(loader.check(tmp_path / "missing.so"))


REFUSING = """
#include <torch/csrc/stable/library.h>
#include <sstream>
#include <stdexcept>
static int64_t self_test(int64_t number) {
  std::ostringstream message;
  message << "must not be negative, got " << number;
  if (number < 0) throw std::invalid_argument(message.str());
  return number;
}
STABLE_TORCH_LIBRARY(toy, m) { m.def("self_test(int number) -> int"); }
STABLE_TORCH_LIBRARY_IMPL(toy, CompositeImplicitAutograd, m) { m.impl("self_test", TORCH_BOX(&self_test)); }
"""


@needs_compiler
@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="about the shared libstdc++ of Linux")
def test_compiler_with_a_runtime_of_its_own(toy: Path, tmp_path: Path) -> None:
    """As a compiler copied to another folder: its static libstdc++ must not join the one that torch loaded."""
    compiler = tmp_path / "g++"
    compiler.write_text('#!/bin/sh\nexec g++ -static-libstdc++ "$@"\n')
    compiler.chmod(0o755)
    (toy / "csrc/cpu/answer.cpp").write_text(f"// {tmp_path}\n{REFUSING}")
    (toy / "__init__.py").touch()
    load = "from toy import _library; _library.load()"
    environment = {"CXX": str(compiler), "PYTHONPATH": str(tmp_path)}
    # What happened before the loaded runtime was named to the linker: the first number in a message ended the process,
    # or was lost. The loader's own test sees it.
    without = "from toy import _library; _library.link_flags = lambda: []; _library.load()"
    done = subprocess.run(
        [sys.executable, "-c", without],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done
    assert "It is not used" in done.stderr.splitlines()[-1], done.stderr
    assert not list((tmp_path / "cache").glob("toy/*.so"))
    run(sys.executable, "-c", load, **environment)
    (library,) = (tmp_path / "cache").glob("toy/*.so")
    assert loader_of(toy).check(library) is None


PROBE = """
import torch, diff_gaussian_rasterization
print(diff_gaussian_rasterization.__file__, torch.ops.diff_gaussian_rasterization.blend)
"""


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("isolation", [True, False], ids=["isolated", "no-build-isolation"])
def test_pip_installs_the_rasterizer(isolation: bool, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(
        SUBMODULES["diff_gaussian_rasterization"],
        source,
        ignore=shutil.ignore_patterns("build", "*.egg-info", "*.so", "__pycache__"),
    )
    site = tmp_path / "site"
    flags = [] if isolation else ["--no-build-isolation"]
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", *flags, "--target", site, source)
    built = [path.name for path in (site / "diff_gaussian_rasterization").glob("*.so")]
    assert len(built) == (0 if isolation else 1)

    cache = tmp_path / "cache"
    done = run(sys.executable, "-c", PROBE, PYTHONPATH=str(site), TORCH_EXTENSIONS_DIR=str(cache))
    assert str(site) in done.stdout
    assert len(list(cache.rglob("*.so"))) == (1 if isolation else 0)
