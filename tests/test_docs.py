"""README.md and the documentation: short, true to what is recorded, and without dead links."""

import importlib.util
import re
from pathlib import Path

import pytest
from test_layers import FLOORS

from benchmarks import report

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    page
    for pattern in ("*.md", "docs/**/*.md", "benchmarks/*.md", "submodules/*/README.md", ".github/**/*.md")
    for page in ROOT.glob(pattern)
)


@pytest.fixture(scope="module")
def generate():
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as forges and Sphinx make them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {
        re.sub(r"[^\w\- ]", "", heading.replace("`", "")).strip().lower().replace(" ", "-")
        for heading in headings
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        generated = target.name == "options.md"  # its headings are made when it is built
        if anchor and target.suffix == ".md" and not generated:
            assert anchor in anchors(target), link


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


def test_the_readme_has_the_tables_that_are_recorded():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert report.with_tables(text) == text, "run python -m benchmarks.report"


def test_every_program_and_option_is_in_the_reference(generate):
    text = generate.expand((ROOT / "docs" / "reference" / "options.md").read_text(encoding="utf-8"))
    scripts = {path.name for path in ROOT.glob("*.py")} - {"setup.py"}
    assert scripts == set(re.findall(r"^## (\w+\.py)$", text, re.M))
    for option in ("--densify_grad_threshold", "--ct_window", "--held_out", "--smoothing", "--interp"):
        assert f"`{option}`" in text
    row = next(line for line in text.splitlines() if line.startswith("| `--lambda_dssim`"))
    assert row.split("|")[2].strip() == "0.25, release"


def test_the_architecture_page_has_the_order_that_imports_keep():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert tuple(re.findall(r"^\| `(\w+)/` \|", text, re.M)) == FLOORS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_takes_from_the_code_can_be_made(page, generate):
    assert "<!-- generated:" not in generate.expand(page.read_text(encoding="utf-8"))
