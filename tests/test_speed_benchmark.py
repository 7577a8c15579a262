"""The speed benchmark as a person runs it: sizes are tiny, so only its running and its output are checked."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def benchmark(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.run", "--device", "cpu", *arguments]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT)


@pytest.mark.slow
def test_sections_are_measured_or_say_why_not(tmp_path):
    out = tmp_path / "speed.json"
    ran = benchmark("--quick", "--out", out)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    sections = json.loads(out.read_text())["sections"]
    assert out.with_suffix(".png").exists()
    skipped = {name for name, section in sections.items() if "skipped" in section}
    assert skipped == {"gsplat", "floors", "training"}  # they need a GPU
    pairs = sections["throughput"]["pairs"]
    assert 0 < pairs["useful"] <= pairs["backward"] <= pairs["forward"] <= 16 * pairs["listed"]
    small, large = sections["large"]["runs"]
    assert (small["width"], small["gaussians"]) == (16, 100) and large["width"] == 32
    assert sections["large"]["growth"][-1]["work"] == pytest.approx((32**2 + 400) / (16**2 + 100), rel=0.1)


@pytest.mark.slow
def test_frames_of_a_case_are_resampled(tmp_path):
    from utils.images import write_image

    for k in range(3):
        write_image(tmp_path / "case" / "original" / f"{k}.png", [[0.2 * k] * 8] * 6)
    out = tmp_path / "speed.json"
    ran = benchmark("--quick", "--only", "large", "--case", tmp_path / "case", "--out", out)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert [run["frames"] for run in json.loads(out.read_text())["sections"]["large"]["runs"]] == [4, 4]


@pytest.mark.slow
def test_a_section_that_fails_leaves_the_others(tmp_path):
    out = tmp_path / "speed.json"
    program = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from benchmarks import run
def broken(bench):
    "Fails."
    return 1 / 0
run.SECTIONS["large"] = broken
sys.argv[1:] = ["--device", "cpu", "--quick", "--only", "large", "--only", "oracle", "--out", {str(out)!r}]
sys.exit(run.main())
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ran.returncode == 1 and "ZeroDivisionError" in ran.stderr
    sections = json.loads(out.read_text())["sections"]
    assert "division" in sections["large"]["skipped"] and sections["oracle"]["ratio"] > 0


@pytest.mark.slow
def test_times_on_a_device_stand_beside_those_on_the_clock(tmp_path):
    """A tenth and a hundredth of a second, in place of the times of a GPU's kernels."""
    out = tmp_path / "speed.json"
    program = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from benchmarks import run, scenes
def on_device(device, functions, repeats, warmup):
    return {{name: 0.01 if name == "folded" else 0.1 * 4**i for i, name in enumerate(functions)}}
scenes.measure_on_device = on_device
only = ["--only", "operators", "--only", "growth"]
sys.argv[1:] = ["--device", "cpu", "--quick", *only, "--out", {str(out)!r}]
sys.exit(run.main())
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ran.returncode == 0 and "ms on the device" in ran.stdout, ran.stderr
    sections = json.loads(out.read_text())["sections"]
    operators, growth = sections["operators"], sections["growth"]
    assert operators["device_ratio"] == pytest.approx(40)
    assert operators["ratio"] == pytest.approx(
        operators["seconds"]["general"] / operators["seconds"]["folded"]
    )
    assert growth["Gaussians"]["exponent"] == pytest.approx(2)  # 4 times the time at twice the size
    assert len(growth["views"]["seconds"]) == len(growth["views"]["device_seconds"]) == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments, named", [(("--out", "speed.txt"), ".json"), (("--case", "none"), "none")]
)
def test_mistakes_are_named(tmp_path, arguments, named):
    ran = benchmark("--quick", "--only", "large", "--out", tmp_path / "speed.json", *arguments)
    assert ran.returncode == 2 and named in ran.stderr and "Traceback" not in ran.stderr
