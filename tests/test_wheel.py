"""The wheel of the whole: `pip install .`."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a copy: setuptools builds beside the sources
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True
    )
    if listed.returncode:
        pytest.skip("needs a git checkout")
    for name in listed.stdout.decode().split("\0"):
        if name and not name.startswith(("docs/", "tests/", "benchmarks/")) and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(folder),
    ]
    built = subprocess.run([*command, str(source)], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (path,) = folder.glob("medgs-*.whl")
    return path


def test_no_package_of_a_common_name_is_installed(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"medgs", "medgs-operators.pth"}
    for path in ("programs/train.py", "programs/scene/frames.py", "programs/workflow/Snakefile"):
        assert f"medgs/{path}" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not any(name.endswith((".so", ".pyc")) for name in names)


def test_its_commands_run(wheel, tmp_path):
    """In its own environment, with access to this one's packages."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "env")], check=True)
    python = tmp_path / "env" / "bin" / "python"
    (site,) = (tmp_path / "env").glob("lib/python*/site-packages")
    (site / "base.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    command = [sys.executable, "-m", "pip", f"--python={python}", "install", "-q", "--no-deps", str(wheel)]
    installed = subprocess.run(command, capture_output=True, text=True)
    assert installed.returncode == 0, installed.stderr
    ran = subprocess.run(
        [tmp_path / "env" / "bin" / "medgs-train"], capture_output=True, text=True, cwd=tmp_path
    )
    assert ran.returncode == 2 and ran.stderr.startswith("train.py: error: ")
    code = "import medgs, sys; before = 'scene' in sys.modules; print(medgs.run_case.__module__, before)"
    ran = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert ran.stdout.split() == ["medgs.program", "False"], ran.stderr
