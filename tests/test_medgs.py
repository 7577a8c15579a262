"""medgs.py: whole cases and many of them, through the command line, on volumes of a few voxels."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import nibabel
import numpy as np
import pytest
import tifffile
import torch
from forked import Run, Server
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import medgs
from cases.case import Case, plan
from cases.gpus import one_gpu
from cases.steps import Record, Step, StepRecord
from cases.summary import summarise
from cases.table import Row, fingerprint, part, read_cases
from medgs import run_case
from utils.errors import UserError

ROOT = Path(__file__).parents[1]
AFFINE = np.diag([1.0, 1.0, 3.0, 1.0])
TINY = ["--train.iterations", "12", "--train.num_pts", "200", "--preset", "published", "--device", "cpu"]


def ball(shift: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """A blurred ball of 16 x 14 x 6 voxels, and its mask."""
    x, y, z = np.mgrid[:16, :14, :6]
    distance = np.sqrt((x - 8 - shift) ** 2 + (y - 7) ** 2 + (3 * (z - 2.5)) ** 2)
    return (1000 / (1 + np.exp(distance - 5))).astype(np.int16), (distance < 5).astype(np.uint8)


def write_case(folder: Path, shift: float = 0.0) -> tuple[Path, Path]:
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in zip(("image", "label"), ball(shift), strict=True):
        nibabel.save(nibabel.Nifti1Image(values, AFFINE), folder / f"{name}.nii.gz")
    return folder / "image.nii.gz", folder / "label.nii.gz"


def command(*words: object, **options: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, str(ROOT / "medgs.py"), *map(str, words)]
    return subprocess.run(line, capture_output=True, text=True, **options)  # type: ignore[call-overload]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Starts medgs.py as `command` does, without importing torch again."""
    with Server(tmp_path_factory.mktemp("runs"), "medgs") as started:
        yield started


def start(server: Server, *words: object) -> Run:
    return server.start(["medgs.py", *map(str, words)], apart=True)


def forked(server: Server, *words: object) -> subprocess.CompletedProcess[str]:
    run = start(server, *words)
    status = run.wait()
    assert run.errors is not None
    texts = [path.read_text() if path.exists() else "" for path in (run.log, run.errors)]
    return subprocess.CompletedProcess(words, status, *texts)


@pytest.fixture(scope="module")
def done(server, tmp_path_factory):
    """A case that was done, with every second slice held out: its folder and its command."""
    folder = tmp_path_factory.mktemp("done")
    image, label = write_case(folder / "in")
    words = ["-i", image, "-l", label, "-o", folder / "ball", "--keep_every", 2, *TINY]
    ran = forked(server, *words)
    assert ran.returncode == 0, ran.stderr
    return folder / "ball", words


def steps(folder: Path) -> dict[str, dict]:
    return json.loads((folder / "run.json").read_text())["steps"]


def test_a_case_is_one_folder(done):
    folder, _ = done
    assert {step["status"] for step in steps(folder).values()} == {0}
    record = json.loads((folder / "run.json").read_text())
    assert len(record["inputs"]) == 2 and record["versions"]["torch"] == torch.__version__
    assert (folder / "images" / "00000_0.png").exists() and (folder / "masks" / "00000_0.png").exists()
    assert [mesh.name for mesh in (folder / "meshes").glob("*.ply")] == ["ball.ply"]
    assert (folder / "report.html").stat().st_size > 10_000
    assert "$ " in (folder / "log.txt").read_text()


def test_what_is_current_is_skipped(server, done):
    folder, words = done
    before = {name: step["finished"] for name, step in steps(folder).items()}
    ran = forked(server, *words)
    assert ran.returncode == 0 and ran.stdout.count("current") == 2 * len(
        before
    )  # in the plan, and as it goes
    assert {name: step["finished"] for name, step in steps(folder).items()} == before


def test_what_changed_is_done_again_and_what_follows(done, tmp_path):
    folder, words = done
    image, label = Path(words[1]), Path(words[3])
    case = Case("ball", image, (label,), keep_every=2, device="cpu", steps={})
    states = dict(plan(case, folder))
    assert states["prepare"] == "current" and states["train"] == "run"  # other options of training
    moved, _ = write_case(tmp_path / "other", shift=1)
    states = dict(plan(Case("ball", moved, (label,), keep_every=2, device="cpu"), folder))
    assert set(states.values()) == {"run"}


def test_scores_and_volumes_come_back_as_objects(done):
    folder, _ = done
    result = medgs.CaseResult(folder)
    assert result.complete and not result.missing
    assert 0 < result.scores["img/heldout/model/psnr"] < 100
    assert result.scores["seg/heldout/sdf/dice"] > 0.5
    dense = result.volume("img")
    assert dense.shape[:2] == (16, 14) and np.allclose(dense.affine[:3, 3], AFFINE[:3, 3])


def test_arrays_go_in(tmp_path):
    image, label = ball()
    options = {"train": ["--iterations", "3", "--num_pts", "100"]}
    told: list[str] = []
    result = run_case(
        image,
        label.astype(bool),
        tmp_path / "case",
        affine=AFFINE,
        preset="published",
        device="cpu",
        options=options,
        say=told.append,
    )
    assert result.complete, result.record.failure
    again = run_case(
        image,
        label.astype(bool),
        tmp_path / "case",
        affine=AFFINE,
        preset="published",
        device="cpu",
        options=options,
        say=told.append,
    )
    assert again.complete and sum("current" in line for line in told) == 2 * 5  # in the plan, and as it goes
    with pytest.raises(UserError, match="no volume"):
        run_case(image[0], output=tmp_path / "flat", say=told.append)


@pytest.mark.parametrize(
    "words, named",
    [
        (["-i", "nothing.nii.gz"], "nothing.nii.gz does not exist"),
        (["-i", "IMAGE", "--train.iterations", "-5"], "--iterations"),
        (["-i", "IMAGE", "--train.nonsense", "1"], "nonsense"),
        (["-i", "IMAGE", "--prepare.bits", "7"], "--bits"),
        (["-i", "IMAGE", "--train.model_path", "x"], "medgs.py gives that option itself"),
        (["-i", "IMAGE", "--cases", "x.csv"], "either -i"),
        (["--cases", "x.csv"], "x.csv does not exist"),
    ],
)
def test_mistakes_are_named_before_anything_starts(server, tmp_path, words, named):
    image, _ = write_case(tmp_path / "in")
    words = [str(image) if word == "IMAGE" else word for word in words]
    ran = forked(server, *words, "-o", tmp_path / "out")
    assert ran.returncode == 2 and named in ran.stderr and "Traceback" not in ran.stderr, ran.stderr
    assert ran.stderr.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_step_that_fails_ends_the_case_with_its_line(server, tmp_path):
    (tmp_path / "broken.nii.gz").write_bytes(b"no volume")
    ran = forked(server, "-i", tmp_path / "broken.nii.gz", "-o", tmp_path / "out", *TINY)
    assert ran.returncode == 2 and "broken.nii.gz" in ran.stderr
    record = steps(tmp_path / "out")
    assert record["prepare"]["status"] == 2 and "broken.nii.gz" in record["prepare"]["reason"]
    assert "train" not in record


def test_a_stopped_case_goes_on_and_ends_as_if_it_had_not_been(server, tmp_path):
    image, _ = write_case(tmp_path / "in")
    words = ["-i", image, "--only", "prepare", "train", *TINY[:1], "400", *TINY[2:]]
    whole = forked(server, *words, "-o", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    stopped = start(server, *words, "-o", tmp_path / "cut")
    deadline = time.monotonic() + 100
    while not (tmp_path / "cut" / "model" / "cfg_args").exists():
        assert time.monotonic() < deadline, stopped.log.read_text()
        time.sleep(0.02)
    stopped.kill(signal.SIGTERM)
    assert stopped.wait() == 143
    assert steps(tmp_path / "cut")["train"]["status"] == 143
    again = forked(server, *words, "-o", tmp_path / "cut")
    assert again.returncode == 0 and "resume" in again.stdout, again.stderr
    assert steps(tmp_path / "cut")["train"]["attempts"] == 2
    first, second = (
        torch.load(tmp_path / name / "model" / "chkpnt400.pth", weights_only=True)[0]
        for name in ("whole", "cut")
    )
    for key in ("_xyz", "_opacity", "_w1", "m", "sigma"):
        assert torch.equal(first[key], second[key]), key


def fake_steps(monkeypatch, fail: tuple[str, ...] = ()) -> list[str]:
    """Every step writes its outputs and is done, or fails; the names of those that ran."""
    ran: list[str] = []

    def run(step: Step, record: Record, *_: object) -> StepRecord:
        ran.append(step.name)
        for path in () if step.name in fail else step.outputs:
            if path.suffix:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text('{"schema": 1}' if path.name != "evaluation.json" else "[]")
            else:
                path.mkdir(parents=True, exist_ok=True)
        status = 2 if step.name in fail else 0
        entry = record.steps[step.name] = StepRecord(step.key, [], status, "no" if status else "")
        record.save()
        return entry

    monkeypatch.setattr(Step, "run", run)
    monkeypatch.setattr("cases.case._has_affine", lambda _: False)
    return ran


def test_results_outlast_other_ways_to_say_the_same(tmp_path, monkeypatch):
    ran = fake_steps(monkeypatch)
    image, label = write_case(tmp_path / "in")
    monkeypatch.chdir(tmp_path)
    quiet = {name: ["--quiet"] for name in medgs.STEPS}
    assert run_case("in/image.nii.gz", "in/label.nii.gz", "out").complete and len(ran) == 5
    assert run_case(image, label, tmp_path / "out", options=quiet).complete and len(ran) == 5
    (tmp_path / "out").rename(tmp_path / "new")  # its report alone names the mesh after the case
    assert run_case(image, label, tmp_path / "new", name="out").complete and len(ran) == 5


@pytest.mark.parametrize("line", ["ElementDataFile = x.raw", "ElementDataFile = LIST\nx.raw"])
def test_voxels_beside_their_header_are_looked_at_too(tmp_path, monkeypatch, line):
    ran = fake_steps(monkeypatch)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x.mhd").write_text(f"ObjectType = Image\nNDims = 3\n{line}\n")
    for values, times in ((b"ab", 1), (b"ab", 1), (b"cd", 2)):
        (tmp_path / "in" / "x.raw").write_bytes(values)
        run_case(tmp_path / "in" / "x.mhd", output=tmp_path / "out")
        assert ran.count("prepare") == ran.count("report") == times


def test_a_single_step_is_never_done_on_what_is_not_current(tmp_path, monkeypatch):
    ran = fake_steps(monkeypatch)
    image, label = write_case(tmp_path / "in")
    assert run_case(image, label, tmp_path / "out").complete
    ran.clear()
    for only, missing in ((["train"], "prepare"), (["mesh"], "prepare"), (["report"], "prepare")):
        with pytest.raises(UserError, match=f"{missing} is not done"):
            run_case(image, label, tmp_path / "out", keep_every=2, only=only)
    with pytest.raises(UserError, match="train is not done"):
        run_case(image, label, tmp_path / "out", preset="best", only=["report"])
    with pytest.raises(UserError, match="nothing to do"):
        run_case(image, None, tmp_path / "none", only=["mesh"])
    assert not ran


def test_steps_of_a_former_input_are_not_done(tmp_path, monkeypatch):
    """Also where a failure among them is the former input's: Snakemake goes by the exit status of each step."""
    fake_steps(monkeypatch, fail=("train",))
    image, label = write_case(tmp_path / "in")
    assert run_case(image, label, tmp_path / "out").record.failure
    words = ["-i", str(image), "-l", str(label), "-o", str(tmp_path / "out"), "--device", "cpu"]
    assert medgs.main([*words, "--preset", "published", "--only", "prepare"]) == 0
    fake_steps(monkeypatch)
    assert run_case(image, label, tmp_path / "out").complete
    write_case(tmp_path / "in", 1)
    result = run_case(image, label, tmp_path / "out", only=["prepare"])
    assert result.missing == ["train", "render", "mesh", "report"]


def test_a_report_is_made_where_no_mesh_can_be(tmp_path, monkeypatch):
    ran = fake_steps(monkeypatch, fail=("mesh",))
    result = run_case(*write_case(tmp_path / "in"), tmp_path / "out")
    assert ran[-1] == "report" and result.missing == ["mesh"] and result.record.failure == "mesh: no"
    ran = fake_steps(monkeypatch, fail=("train",))
    run_case(*write_case(tmp_path / "in"), tmp_path / "other")
    assert ran == ["prepare", "train"]


def test_a_plan_tells_what_is_to_do_and_how_long_it_takes(tmp_path, monkeypatch, capsys):
    fake_steps(monkeypatch)
    image, label = write_case(tmp_path / "in")
    words = [
        "-i",
        str(image),
        "-l",
        str(label),
        "-o",
        str(tmp_path / "out"),
        "--time",
        "2",
        "--device",
        "cpu",
    ]
    assert medgs.main([*words, "--dry_run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split() == ["train", "run", "about", "2", "min"] and not (tmp_path / "out").exists()
    assert re.fullmatch(r"  about [23] min in all, by estimate; run.json will have the real times", lines[-1])
    assert run_case(image, label, tmp_path / "out", time=2, device="cpu").complete
    capsys.readouterr()
    assert medgs.main([*words, "--dry_run"]) == 0
    assert capsys.readouterr().out.count("current") == 5
    assert medgs.main([*words, "--time", "3", "--dry_run"]) == 0
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()[1:6]] == ["current"] + 4 * [
        "run"
    ]


@pytest.mark.parametrize(
    "wrong, named",
    [
        ({"preset": "bset"}, "--preset"),
        ({"time": -1}, "--time"),
        ({"keep_every": 0}, "--keep_every"),
        ({"only": ["trian"]}, "--only"),
        ({"options": {"trian": []}}, "no step trian"),
        ({"options": {"train": ["--iterations", "-5"]}}, "--iterations"),
        ({"label": "nothing.nii.gz"}, "nothing.nii.gz does not exist"),
    ],
)
def test_the_function_refuses_what_the_command_does(tmp_path, wrong, named):
    image, _ = write_case(tmp_path / "in")
    with pytest.raises(UserError, match=named):
        run_case(image, output=tmp_path / "out", **wrong)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["images", "masks", "model", "meshes"])
def test_folders_of_somebody_else_are_left(tmp_path, monkeypatch, name):
    ran = fake_steps(monkeypatch)
    image, label = write_case(tmp_path / "in")
    (tmp_path / "out" / name).mkdir(parents=True)
    (tmp_path / "out" / name / "mine").touch()
    with pytest.raises(UserError, match="give another -o"):
        run_case(image, label, tmp_path / "out")
    assert (tmp_path / "out" / name / "mine").exists() and not ran


def test_arrays_of_any_whole_numbers_are_stored(tmp_path, monkeypatch):
    fake_steps(monkeypatch)
    image, label = ball()
    result = run_case(image.astype(np.float16), label.astype(np.int64), tmp_path / "case")
    assert result.complete
    stored = nibabel.load(tmp_path / "case" / "input" / "label_0.nii")
    assert np.array_equal(np.asarray(stored.dataobj), label)
    with pytest.raises(UserError, match="32 bits"):
        run_case(image.astype(np.int64) << 40, output=tmp_path / "large")


def test_without_a_gpu_to_use_the_preset_is_quick(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    assert medgs.preset_for("auto") == "best" and medgs.preset_for("auto", "cpu") == "quick"
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)  # beside a GPU all the same
    assert medgs.preset_for("auto") == "quick"
    assert {"best", "quick"} <= set(medgs.PRESETS)


def test_a_signal_that_a_step_outlives_ends_the_case(tmp_path):
    (tmp_path / "step.py").write_text(
        "import pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\n"
        "pathlib.Path(sys.argv[1]).touch()\ntime.sleep(60)\n"
    )
    (tmp_path / "case.py").write_text(
        "import sys; from pathlib import Path; from cases.steps import Record, Step\n"
        "folder = Path(sys.argv[1])\n"
        "Step('x', str(folder / 'step.py'), [str(folder / 'up')], [], {}).run(Record(folder / 'run.json'))\n"
        "(folder / 'next').touch()\n"
    )
    line = [sys.executable, str(tmp_path / "case.py"), str(tmp_path)]
    process = subprocess.Popen(line, env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "up").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == -signal.SIGTERM
    finally:
        process.kill()
    assert not (tmp_path / "next").exists() and steps(tmp_path)["x"]["status"] == 0


# ---- many cases ------------------------------------------------------------------------------------------------------


def write_table(folder: Path) -> Path:
    """Three cases, of which b is a broken volume."""
    for name, shift in (("a", 0), ("b", 1), ("c", 2)):
        write_case(folder / name, shift)
    (folder / "b" / "image.nii.gz").write_bytes(b"no volume")
    table = folder / "cases.csv"
    lines = ["case,image,label,options", "a,a/image.nii.gz,a/label.nii.gz,", "b,b/image.nii.gz,,"]
    table.write_text("\n".join([*lines, "c,c/image.nii.gz,,--train.iterations 5"]) + "\n")
    return table


def check_cohort(server: Server, table: Path, out: Path, *words: object) -> None:
    """The broken case is named, the others are done; a second start repeats what failed alone."""
    ran = forked(server, "--cases", table, "-o", out, "--keep_every", 2, *TINY, *words)
    assert ran.returncode == 1, ran.stderr
    assert "2 of 3 cases done" in ran.stdout
    assert "b failed: prepare: " in ran.stderr and "b/image.nii.gz" in ran.stderr
    rows = {row["case"]: row for row in csv.DictReader((out / "summary.csv").open())}
    assert [rows[name]["state"] for name in "abc"] == ["done", "failed", "done"]
    mean = [float(rows[name]["img/heldout/model/psnr"]) for name in "ac"]
    assert float(rows["mean"]["img/heldout/model/psnr"]) == pytest.approx(np.mean(mean))
    assert "2 of 3 cases done" in (out / "summary.html").read_text()
    before = {name: steps(out / name)["train"]["finished"] for name in "ac"}
    write_case(table.parent / "b", 1)
    ran = forked(server, "--cases", table, "-o", out, "--keep_every", 2, *TINY, *words)
    assert ran.returncode == 0 and "3 of 3 cases done" in ran.stdout, ran.stderr
    assert {name: steps(out / name)["train"]["finished"] for name in "ac"} == before


def test_a_case_that_fails_leaves_the_others(server, tmp_path):
    check_cohort(server, write_table(tmp_path / "in"), tmp_path / "out")
    model = tmp_path / "out" / "c" / "model"
    assert (model / "chkpnt5.pth").exists()  # the row's own option


@pytest.mark.slow
def test_cases_side_by_side(server, tmp_path):
    if not (find_spec("snakemake") or shutil.which("snakemake")):
        pytest.skip("needs Snakemake: make cluster")
    table, out = write_table(tmp_path / "in put"), tmp_path / "out put"
    check_cohort(server, table, out, "--jobs", 2)
    words = ["--cases", table, "-o", out, "--keep_every", 2, *TINY, "--train.iterations", 8, "--jobs", 2]
    ran = forked(server, *words, "--case", "a")
    assert ran.returncode == 0, ran.stderr  # other options: trained again
    assert (out / "a" / "model" / "chkpnt8.pth").exists()


@pytest.mark.slow
def test_cases_side_by_side_save_when_they_are_stopped(tmp_path):
    if not (find_spec("snakemake") or shutil.which("snakemake")):
        pytest.skip("needs Snakemake: make cluster")
    write_case(tmp_path / "in" / "a")
    words = ["--cases", tmp_path / "in", "-o", tmp_path / "out", *TINY[:1], 4000, *TINY[2:], "--jobs", 2]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "medgs.py"), *map(str, words)], stdout=log, stderr=log
        )
    try:
        deadline = time.monotonic() + 100
        while not (tmp_path / "out" / "a" / "model" / "cfg_args").exists():
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.05)
        time.sleep(1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(100) == 143, (tmp_path / "log").read_text()
    finally:
        process.kill()
    assert steps(tmp_path / "out" / "a")["train"]["status"] == 143
    assert not list((tmp_path / "out" / ".snakemake" / "locks").glob("*"))


def test_a_part_is_done_alone(server, tmp_path):
    table = write_table(tmp_path / "in")
    ran = forked(server, "--cases", table, "-o", tmp_path / "out", "-num_parts", 3, "-part_id", 2, *TINY)
    assert ran.returncode == 0 and "1 of 1 cases done" in ran.stdout, ran.stderr
    assert not (tmp_path / "out" / "a").exists()


@given(st.integers(0, 30), st.integers(1, 8))
def test_parts_are_all_of_it_once(count, parts):
    rows = [Row(f"case{k}", Path("x")) for k in range(count)]
    split = [part(rows, parts, k) for k in range(parts)]
    assert sorted(row.name for one in split for row in one) == sorted(row.name for row in rows)
    assert max(map(len, split)) - min(map(len, split)) <= 1


@pytest.mark.parametrize(
    "text, named",
    [
        ("case,volume\na,b\n", "no column image"),
        ("case,image,lable\na,b,c\n", "column lable"),
        ("case,image\na,missing.nii.gz\n", "line 2"),
        ("case,image\na,here.nii.gz\na,here.nii.gz\n", "two cases are named a"),
        ("case,image\n../a,here.nii.gz\n", "names a folder"),
        ("case,image\n", "no cases"),
        ("case,image\na,here.nii.gz,more\n", "more values than columns"),
        ("image,options\nhere.nii.gz,--device 'cpu\n", "line 2: options"),
    ],
)
def test_tables_that_cannot_be_are_refused(tmp_path, text, named):
    (tmp_path / "here.nii.gz").touch()
    (tmp_path / "cases.csv").write_text(text)
    with pytest.raises(UserError, match=named):
        read_cases(tmp_path / "cases.csv")


def test_tables_are_read_with_tabs_and_marks(tmp_path):
    (tmp_path / "a b.nii.gz").touch()
    (tmp_path / "l.nii.gz").touch()
    (tmp_path / "cases.tsv").write_bytes(
        "\ufeffImage\tLabel\tcase\r\na b.nii.gz\tl.nii.gz;l.nii.gz\tone\r\n".encode()
    )
    assert read_cases(tmp_path / "cases.tsv") == [
        Row("one", tmp_path / "a b.nii.gz", (tmp_path / "l.nii.gz", tmp_path / "l.nii.gz"))
    ]


def test_folders_of_cases_are_found(tmp_path):
    def touch(*names: str) -> None:
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()

    touch("bids/sub-01/anat/sub-01_T1w.nii.gz", "bids/sub-02/ses-a/anat/sub-02_ses-a_T1w.nii.gz")
    touch("bids/derivatives/seg/sub-01/anat/sub-01_dseg.nii.gz", "bids/participants.tsv")
    first, second = read_cases(tmp_path / "bids")
    assert first.name == "sub-01_T1w" and first.labels[0].name == "sub-01_dseg.nii.gz"
    assert second.name == "sub-02_ses-a_T1w" and not second.labels

    touch("bids/derivatives/seg/sub-01/anat/sub-01_dseg.json")  # a sidecar is no label, nor is a template's
    touch("bids/derivatives/seg/sub-02/ses-a/anat/sub-02_ses-a_space-MNI152_dseg.nii.gz")
    touch("bids/sub-03/anat/sub-03_run-1_T1w.nii.gz")
    touch("bids/derivatives/seg/sub-03/anat/sub-03_run-10_dseg.nii.gz")
    first, second, third = read_cases(tmp_path / "bids")
    assert first.labels[0].name == "sub-01_dseg.nii.gz" and not second.labels and not third.labels
    touch("flat/sub-01_T1w.nii.gz")  # named as BIDS has it, not laid out so
    assert [row.name for row in read_cases(tmp_path / "flat")] == ["sub-01_T1w"]

    touch("nn/imagesTr/liver_1_0000.nii.gz", "nn/imagesTr/liver_1_0001.nii.gz", "nn/labelsTr/liver_1.nii.gz")
    (row,) = read_cases(tmp_path / "nn")
    assert row.name == "liver_1" and row.image.name == "liver_1_0000.nii.gz" and len(row.labels) == 1

    touch("loose/x.nii.gz", "loose/x_label.nii.gz", "loose/y.mha")
    assert [(row.name, len(row.labels)) for row in read_cases(tmp_path / "loose")] == [("x", 1), ("y", 0)]

    touch("each/p/image.nii.gz", "each/p/mask.nii.gz", "each/q/1.dcm")
    p, q = read_cases(tmp_path / "each")
    assert (
        p.image.name == "image.nii.gz"
        and p.labels[0].name == "mask.nii.gz"
        and q.image == tmp_path / "each" / "q"
    )


def test_folders_of_slices_are_no_cases(tmp_path):
    for kind in ("images", "TIFF files of one page", "DICOM slices"):
        (tmp_path / kind).mkdir()
    page = np.zeros((8, 8), np.uint8)
    for k in range(3):
        Image.fromarray(page).save(tmp_path / "images" / f"{k}.png")
        tifffile.imwrite(tmp_path / "TIFF files of one page" / f"{k}.tif", page)
        (tmp_path / "DICOM slices" / f"IM{k}").write_bytes(bytes(128) + b"DICM" + bytes(100))
    for kind in ("images", "TIFF files of one page", "DICOM slices"):
        with pytest.raises(UserError, match=f"holds {kind} of one volume"):
            read_cases(tmp_path / kind)
    (tmp_path / "volumes").mkdir()
    for k in range(2):
        tifffile.imwrite(tmp_path / "volumes" / f"a{k}.tif", np.stack([page] * 3), photometric="minisblack")
        tifffile.imwrite(tmp_path / "volumes" / f"b{k}.tif", np.stack([page] * 3), imagej=True)
        frames = b"\x28\0\x08\0IS\x02\x0030"
        (tmp_path / "volumes" / f"c{k}.dcm").write_bytes(bytes(128) + b"DICM" + frames + bytes(100))
    assert len(read_cases(tmp_path / "volumes")) == 6


def test_engines_see_what_changes_in_a_folder(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "1.dcm").write_bytes(b"ab")
    row = Row("x", tmp_path)
    before = fingerprint(row)
    assert fingerprint(row) == before
    (tmp_path / "deep" / "1.dcm").write_bytes(b"abc")
    assert fingerprint(row) != before


def test_every_training_has_a_gpu_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,GPU-3")
    with one_gpu(1, tmp_path) as first, one_gpu(1, tmp_path) as second:
        assert {first, second} == {"0", "GPU-3"}
    with one_gpu(2, tmp_path) as first, one_gpu(2, tmp_path) as second, one_gpu(2, tmp_path) as third:
        assert {first, second} == {"0", "GPU-3"} and third in ("0", "GPU-3")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with one_gpu(1, tmp_path) as none:
        assert none is None


def test_a_summary_says_where_classical_interpolation_is_better(tmp_path):
    model = tmp_path / "a" / "model"
    model.mkdir(parents=True)
    rows = [
        {"iteration": 5, "task": "img", "frames": "heldout", "method": method, "psnr": psnr, "ssim": 0.5}
        for method, psnr in (("model", 20.0), ("linear", 21.0), ("cubic", 19.0))
    ]
    (model / "evaluation.json").write_text(json.dumps(rows))
    (row,) = summarise(tmp_path, ["a"])
    assert row.state == "waiting" and row.warnings == ["img: linear is better on held-out slices"]
    assert os.path.exists(tmp_path / "summary.html")


def test_a_summary_bears_undefined_scores_and_broken_pictures(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name / "model").mkdir(parents=True)
    row = {"iteration": 5, "task": "seg", "frames": "heldout", "method": "model"}
    (tmp_path / "a" / "model" / "evaluation.json").write_text(json.dumps([{**row, "dice": None}]))
    (tmp_path / "b" / "model" / "evaluation.json").write_text(json.dumps([{**row, "dice": 0.5}]))
    (tmp_path / "a" / "images").mkdir()
    (tmp_path / "a" / "images" / "00000_0.png").write_bytes(b"cut short")
    a, b = summarise(tmp_path, ["a", "b"])
    assert a.scores == {} and b.scores == {"seg/heldout/model/dice": 0.5}
    assert "0.5000 ± 0.0000" in (tmp_path / "summary.html").read_text()


def test_a_killed_case_leaves_the_others_and_a_part_keeps_the_whole_summary(tmp_path, monkeypatch):
    table, tried = write_table(tmp_path / "in"), []

    def killed(row: Row, *_: object) -> int:
        tried.append(row.name)
        return 137  # as the system ends what takes all memory

    monkeypatch.setattr(medgs, "_attempt", killed)
    words = ["--cases", str(table), "-o", str(tmp_path), "-num_parts", "2"]
    assert medgs.main(words) == 1 and tried == ["a", "c"]
    rows = list(csv.DictReader((tmp_path / "summary.csv").open()))
    assert [row["case"] for row in rows[:3]] == ["a", "b", "c"]
    with pytest.raises(UserError, match="--only"):
        medgs.main([*words, "--jobs", "2", "--only", "train"])
