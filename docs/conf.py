"""Settings of the documentation: `make docs` builds it with Sphinx, from Markdown, and every warning is an error."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
import generate  # noqa: E402

from utils.version import VERSION  # noqa: E402

project = "MedGS"
html_title = "MedGS"
release = VERSION
author = "the MedGS contributors"
copyright = author

extensions = ["myst_parser", "sphinx_copybutton"]
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4  # links to headings are checked too
exclude_patterns = ["README.md"]
nitpicky = True

html_theme = "furo"
html_show_sphinx = False
html_copy_source = False


def setup(app):
    app.connect("source-read", lambda _, __, source: source.__setitem__(0, generate.expand(source[0])))
