"""The programs make OpenMP threads wait without spinning, before torch is loaded, unless the user chose."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAMS = sorted(
    path
    for path in ROOT.glob("*.py")
    if path.name != "setup.py" and ("torch" in path.read_text() or "patient" in path.read_text())
)


@pytest.mark.parametrize("given", [None, "active"])
def test_threads_wait_as_the_user_says_or_passively(given):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    if given:
        environment["OMP_WAIT_POLICY"] = given
    code = "import utils.threads, os, sys; assert 'torch' not in sys.modules; print(os.environ['OMP_WAIT_POLICY'])"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == (given or "passive")


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.name)
def test_every_program_sets_them_first(program):
    imports = [n for n in ast.parse(program.read_text()).body if isinstance(n, (ast.Import, ast.ImportFrom))]
    first = next(n for n in imports if not (isinstance(n, ast.ImportFrom) and n.module == "__future__"))
    assert isinstance(first, ast.Import) and first.names[0].name == "utils.threads"


def test_a_containers_share_is_respected(tmp_path, monkeypatch):
    import utils.threads as threads

    file = tmp_path / "cpu.max"
    monkeypatch.setattr(threads, "Path", lambda _: file)
    assert threads.container_share() is None
    for text, share in (("200000 100000\n", 2), ("50000 100000", 1), ("max 100000", None), ("", None)):
        file.write_text(text)
        assert threads.container_share() == share


def test_a_slurm_jobs_processors_are_respected():
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    code = "import utils.threads as t, os; print(os.environ.get('OMP_NUM_THREADS'), t.processors())"
    command = [sys.executable, "-c", code]
    environment["SLURM_CPUS_PER_TASK"] = "1"
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "1"]
    environment["OMP_NUM_THREADS"] = "3"  # as the user says
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["3", "1"]
