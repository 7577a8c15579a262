"""One version for everything, and the report of an installation."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import training.doctor
from utils.errors import ArgumentParser
from utils.version import VERSION

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = sorted(path.name for path in ROOT.glob("*.py") if "__main__" in path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("file", "pattern"),
    [
        ("submodules/diff-gaussian-rasterization/setup.py", r'version="([^"]+)"'),
        ("submodules/simple-knn/setup.py", r'version="([^"]+)"'),
        ("CITATION.cff", r"(?m)^version: (\S+)$"),
    ],
)
def test_every_version_is_the_projects(file, pattern):
    assert re.findall(pattern, (ROOT / file).read_text(encoding="utf-8")) == [VERSION]


def test_the_changelog_knows_the_version():
    headings = re.findall(r"(?m)^## \[([^]]+)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"))
    assert headings[0] == "Unreleased" and headings[1] == VERSION


def test_programs_exist():
    assert {"train.py", "render.py", "prepare.py", "slices_to_ply.py", "evaluate.py", "demo.py"} <= {
        *PROGRAMS
    }


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_prints_it(program):
    done = subprocess.run(
        [sys.executable, str(ROOT / program), "--version"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, f"MedGS {VERSION}\n", "")


def test_our_parsers_have_it(capsys):
    with pytest.raises(SystemExit) as ended:
        ArgumentParser().parse_args(["--version"])
    assert ended.value.code == 0 and capsys.readouterr().out == f"MedGS {VERSION}\n"


def test_the_doctor_reports_what_a_bug_report_needs(capsys):
    assert training.doctor.main([]) == 0
    found = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert found["MedGS"] == VERSION
    for name in ("Python", "system", "torch", "CPU", "C++ compiler", "nvcc", "ninja", "cache", "numpy"):
        assert found[name]
    assert any(name.startswith("GPU") for name in found)
    for package in training.doctor.PACKAGES:
        assert VERSION in found[package]


def test_the_doctor_names_what_is_missing(capsys, monkeypatch, tmp_path):
    (tmp_path / "requirements.txt").write_text("no-such-distribution>=1  # of this name\nnumpy>=1.26\n")
    monkeypatch.setattr(training.doctor, "ROOT", tmp_path)
    monkeypatch.setattr(training.doctor, "PACKAGES", ("no_such_package",))
    assert training.doctor.main([]) == 1
    captured = capsys.readouterr()
    assert re.search(r"no-such-distribution\s+MISSING", captured.out)
    assert re.search(r"no_such_package\s+MISSING: .*no-such-package", captured.out)
    assert captured.err == "\nmissing: no_such_package, no-such-distribution\n"


def test_the_doctor_compiles_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("MEDGS_CXX_FLAGS", "-DANOTHER")  # a library of another name
    assert training.doctor.main([]) == 0
    out = capsys.readouterr().out
    assert str(tmp_path / "cache") in out and "-DANOTHER" in out
    assert not (tmp_path / "cache").exists()
