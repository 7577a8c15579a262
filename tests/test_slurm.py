"""Cases as jobs of a real Slurm on this machine: `make test-slurm`."""

import os
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import slurm_cluster
import torch
from test_medgs import ROOT, command, forked, server, steps, write_table  # noqa: F401  (server: a fixture)

from cases.case import CaseResult

PROFILE = ROOT / "workflow" / "profiles" / "slurm"
OPTIONS = ["--preset", "published", "--device", "cpu", "--keep_every", 2]
OPTIONS += ["--train.iterations", 1000, "--train.num_pts", 200]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    lacking = slurm_cluster.missing()
    if not (find_spec("snakemake") or shutil.which("snakemake")):
        lacking.append("snakemake")
    if lacking:
        reason = (
            f"Slurm is NOT tested here: {', '.join(lacking)} missing (make test-slurm installs them as root)"
        )
        warnings.warn(reason, stacklevel=1)
        pytest.skip(reason)
    with slurm_cluster.slurm(tmp_path_factory.mktemp("cluster"), os.cpu_count() or 1) as environment:
        yield environment


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Cases a, b (broken) and c."""
    path = write_table(tmp_path_factory.mktemp("in"))
    path.write_text(path.read_text().replace("--train.iterations 5", ""))
    return path


@pytest.fixture(scope="module")
def alone(server, table, tmp_path_factory):  # noqa: F811
    """The models of a and c as they are without a queue."""
    out = tmp_path_factory.mktemp("alone")
    ran = forked(
        server, "--cases", table, "-o", out, "--case", "a", "c", "--only", "prepare", "train", *OPTIONS
    )
    assert ran.returncode == 1 and not ran.stderr.count("failed"), ran.stderr  # of whole cases, none is done
    return out


def check_equal(out: Path, alone: Path) -> None:
    for name in "ac":
        queued, direct = (
            torch.load(folder / name / "model" / "chkpnt1000.pth", weights_only=True)[0]
            for folder in (out, alone)
        )
        for key in ("_xyz", "_opacity", "_features_dc", "_w1", "m", "sigma"):
            assert torch.equal(queued[key], direct[key]), (name, key)


def job_in_training(folder: Path, *words: str) -> str | None:
    """The Slurm job that trains the case of that folder, by words of medgs.py's command line; None before it does."""
    if not (folder / "model" / "cfg_args").exists():
        return None
    for process in Path("/proc").glob("[0-9]*"):
        try:
            line = (process / "cmdline").read_bytes().decode().split("\0")
            variables = (process / "environ").read_bytes().decode().split("\0")
        except (OSError, UnicodeDecodeError):
            continue
        if any(word.endswith("medgs.py") for word in line) and {*words} <= {*line}:
            found = dict(part.split("=", 1) for part in variables if "=" in part)
            if "SLURM_JOB_ID" in found:
                return found["SLURM_JOB_ID"]
    return None


def until(found: Callable[[], object], told: Callable[[], str], seconds: float = 400) -> object:
    deadline = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < deadline, told()
        time.sleep(0.1)
    return value


@pytest.mark.slow
def test_a_cancelled_job_resumes_and_a_broken_case_is_named(tmp_path, cluster, table, alone):
    out, log, profile = tmp_path / "out", tmp_path / "log", tmp_path / "profile"
    profile.mkdir()
    quick = "slurm-init-seconds-before-status-checks: 2\nseconds-between-status-checks: 2\n"  # not 40 and 10
    (profile / "config.yaml").write_text(quick + (PROFILE / "config.yaml").read_text())
    words = ["--cases", table, "-o", out, *OPTIONS, "--jobs", 3, "--profile", profile]
    line = [sys.executable, str(ROOT / "medgs.py"), *map(str, words)]
    with log.open("wb") as file:
        first = subprocess.Popen(line, env=cluster, stdout=file, stderr=file)
        job = until(lambda: job_in_training(out / "c", "--case", "c"), log.read_text)
        subprocess.run(["scancel", str(job)], env=cluster, check=True)
        assert first.wait(500) == 1
    ran = command(*words, env=cluster)
    told = log.read_text() + ran.stdout + ran.stderr
    assert ran.returncode == 1 and "2 of 3 cases done" in ran.stdout, told
    assert "b failed: prepare: " in ran.stderr
    assert steps(out / "c")["train"]["attempts"] == 2  # the requeue is counted
    assert steps(out / "b")["prepare"]["attempts"] == 2, (
        told
    )  # once a start: what is broken is not tried again
    check_equal(out, alone)


@pytest.mark.slow
def test_an_array_saves_before_its_time_is_up_and_queues_again(tmp_path, cluster, table, alone):
    out = tmp_path / "out"
    script = ["sbatch", "--parsable", "--array=0-1", "--gres=none", "--mem=2G", "--cpus-per-task=1"]
    script += [
        str(ROOT / "workflow" / "array.sbatch"),
        str(table),
        str(out),
        "--case",
        "c",
        "a",
        *map(str, OPTIONS),
    ]
    environment = {**cluster, "MEDGS": f"{sys.executable} {ROOT / 'medgs.py'}"}
    sent = subprocess.run(
        script, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout.strip()

    def told() -> str:
        return "\n".join(path.read_text() for path in tmp_path.glob("medgs-*.log"))

    def trained(name: str) -> dict[str, Any]:
        return steps(out / name).get("train", {}) if (out / name / "run.json").exists() else {}

    until(lambda: job_in_training(out / "c", "-part_id", "0"), told)
    # As --signal=B:TERM@60 does it, whose times are whole minutes: to the script alone. Not to the last
    # task, whose job has the array's own number: slurmd would signal all.
    subprocess.run(["scancel", "--batch", "--signal=TERM", f"{sent}_0"], env=cluster, check=True)
    until(lambda: trained("c").get("status") == 143, told)
    assert list((out / "c" / "model").glob("chkpnt*.pth")), told()

    def waits() -> bool:  # requeued, for some two minutes
        told = subprocess.run(
            ["squeue", "-h", "-o", "%t", "-j", f"{sent}_0"], env=cluster, capture_output=True, text=True
        )
        return told.stdout.strip() == "PD"

    until(waits, told)
    time.sleep(3)  # no node takes a job back in the second in which it ended there
    subprocess.run(["scontrol", "update", f"JobId={sent}_0", "StartTime=now"], env=cluster, check=True)
    until(lambda: all(steps_done(out / name) for name in "ac"), told)
    assert trained("c")["attempts"] == 2 and trained("a")["attempts"] == 1
    check_equal(out, alone)


def steps_done(folder: Path) -> bool:
    return (folder / "run.json").exists() and CaseResult(folder).complete
