"""Cases as jobs of a real Slurm on this machine: `make test-slurm`."""

import os
import shutil
import subprocess
import sys
import time
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
import slurm_cluster
import torch
from test_medgs import ROOT, command, steps, write_table

PROFILE = ROOT / "workflow" / "profiles" / "slurm"
OPTIONS = ["--preset", "published", "--device", "cpu", "--keep_every", 2]
OPTIONS += ["--train.iterations", 1000, "--train.num_pts", 200]


@pytest.fixture
def cluster(tmp_path):
    lacking = slurm_cluster.missing()
    if not (find_spec("snakemake") or shutil.which("snakemake")):
        lacking.append("snakemake")
    if lacking:
        reason = (
            f"Slurm is NOT tested here: {', '.join(lacking)} missing (make test-slurm installs them as root)"
        )
        warnings.warn(reason, stacklevel=1)
        pytest.skip(reason)
    with slurm_cluster.slurm(tmp_path, os.cpu_count() or 1) as environment:
        yield environment


def job_of(case: str, stage: str) -> str | None:
    """The Slurm job in which a case's program runs."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            line = (process / "cmdline").read_bytes().decode().split("\0")
            variables = dict(
                part.split("=", 1)
                for part in (process / "environ").read_bytes().decode().split("\0")
                if "=" in part
            )
        except (OSError, UnicodeDecodeError):
            continue
        if any(word.endswith(stage) for word in line) and any(f"/{case}/" in word for word in line):
            return variables.get("SLURM_JOB_ID")
    return None


@pytest.mark.slow
def test_a_cancelled_job_resumes_and_a_broken_case_is_named(tmp_path, cluster):
    table = write_table(tmp_path / "in")  # a, b (broken), c
    table.write_text(table.read_text().replace("--train.iterations 5", ""))
    out = tmp_path / "out"
    profile = tmp_path / "profile"
    profile.mkdir()
    quick = "slurm-init-seconds-before-status-checks: 2\nseconds-between-status-checks: 2\n"  # not 40 and 10
    (profile / "config.yaml").write_text(quick + (PROFILE / "config.yaml").read_text())
    words = ["--cases", table, "-o", out, *OPTIONS, "--jobs", 3, "--profile", profile]
    line = [sys.executable, str(ROOT / "medgs.py"), *map(str, words)]
    with (tmp_path / "first.log").open("wb") as log:
        first = subprocess.Popen(line, env=cluster, stdout=log, stderr=log)
        deadline = time.monotonic() + 400
        while not (out / "c" / "model" / "cfg_args").exists() or (job := job_of("c", "train.py")) is None:
            assert first.poll() is None and time.monotonic() < deadline, (tmp_path / "first.log").read_text()
            time.sleep(0.05)
        subprocess.run(["scancel", job], env=cluster, check=True)
        assert first.wait(500) == 1
    ran = command(*words, env=cluster)
    log_text = (tmp_path / "first.log").read_text() + ran.stdout + ran.stderr
    assert ran.returncode == 1 and "2 of 3 cases done" in ran.stdout, log_text
    assert "b failed: prepare: " in ran.stderr
    assert steps(out / "c")["train"]["attempts"] == 2  # the requeue is counted

    alone = tmp_path / "alone"
    ran = command("--cases", table, "-o", alone, "--case", "a", "c", *OPTIONS)
    assert ran.returncode == 0, ran.stderr
    for name in "ac":
        queued, direct = (
            torch.load(folder / name / "model" / "chkpnt1000.pth", weights_only=True)[0]
            for folder in (out, alone)
        )
        for key in ("_xyz", "_opacity", "_features_dc", "_w1", "m", "sigma"):
            assert torch.equal(queued[key], direct[key]), (name, key)
