"""The documentation site. Everything on it can be read as Markdown in the repository too."""

from __future__ import annotations

import os
import re
from importlib import metadata
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

# Reading the docstrings of the callback imports Keras.
os.environ.setdefault("KERAS_BACKEND", "jax")

ROOT = Path(__file__).parent.parent
# Documents that lie elsewhere, and the pages that show them.
SHOWN = {"CHANGELOG.md": "changelog", "bench/README.md": "benchmarks"}
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")
GLOB = re.compile(r"^([\w/-]+\*)\n", re.MULTILINE)

project = "stepsave"
author = "The stepsave maintainers"
release = version = metadata.version("stepsave")
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
source_suffix = {".md": "markdown"}

default_role = "code"  # what single backticks are in docstrings
suppress_warnings = ["misc.highlighting_failure"]  # JSON with `…` in it

html_theme = "furo"
html_title = f"stepsave {release}"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_show_sphinx = False
html_show_copyright = False

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4  # the same anchors as repository browsers make

autoclass_content = "both"  # arguments are in the docstring of `__init__`
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 80
napoleon_use_rtype = False
# Names of other libraries, and of modules that are not public, lead nowhere.
nitpick_ignore_regex = [(r"py:.*", r".*")]
copybutton_exclude = ".linenos, .gp, .go"


def show(_: Sphinx, page: str, source: list[str]) -> None:
    """Puts a document from elsewhere onto its page, and has links lead to pages."""
    (shown,) = [path for path, name in SHOWN.items() if name == page] or [None]
    place = ROOT / (shown or f"docs/{page}.md")
    text = source[0] if shown is None else place.read_text()
    below = Path(page).parent

    def lead(link: re.Match[str]) -> str:
        mark, text, target, anchor = link.groups(default="")
        if "://" in target:
            return link[0]
        path = Path(os.path.normpath(place.parent / target)).relative_to(ROOT)
        if not (ROOT / path).exists():
            raise FileNotFoundError(f"{place}: {target}")
        if path.as_posix() in SHOWN:
            path = Path("docs", f"{SHOWN[path.as_posix()]}.md")
        if path.suffix != ".md" and not mark:
            return text  # the source, which is not on the site
        if path == Path("README.md"):
            path = Path("docs/index.md")
        return f"{mark}[{text}]({os.path.relpath(path, Path('docs') / below)}{anchor})"

    def keep(pattern: re.Match[str]) -> str:  # of a table of contents, unless it finds nothing
        return pattern[0] if any((ROOT / "docs").glob(f"{pattern[1]}.md")) else ""

    source[0] = GLOB.sub(keep, LINK.sub(lead, text))


def fence(*arguments: Any) -> None:
    """Makes code of what docstrings, like Keras's, have between fences."""
    lines: list[str] = arguments[-1]
    inside = ""
    found: list[str] = []
    for line in lines:
        if line.strip().startswith("```"):
            indent = line[: len(line) - len(line.lstrip())]
            found += [f"{indent}.. code-block:: python", ""] if not inside else [""]
            inside = "" if inside else "   "
        else:
            found.append(inside + line)
    lines[:] = found


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("source-read", show)
    # Before napoleon, which takes the sections apart.
    app.connect("autodoc-process-docstring", fence, priority=400)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
