"""Nothing on a page of docs/ that was not run, unless the page's source says why not.

Each block of Python or of commands is run, in its order, in one directory for each page. A comment
before a block says otherwise:

    <!-- file: train.py -->       it is written into this file, for commands that follow
    <!-- needs: bucket -->        s3://my-bucket is there
    <!-- not run: the reason -->  it is not run
    <!-- inspect: begin -->       it is a capture, which `test_captures` takes again

A block of text behind commands is what they print; `…` stands for what is left out or differs, and
on a line of its own for any lines.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from bucket_support import put, s3, s3_environment, s3_target
from document_support import ROOT, marked_blocks

import stepsave
import stepsave.testing

__all__ = ("s3", "s3_target")

DOCS = ROOT / "docs"
PAGES = {path.relative_to(DOCS).as_posix(): path.read_text() for path in DOCS.rglob("*.md")}
SHELLS = {"bash", "console", "sh"}
LANGUAGES = {"python", *SHELLS}
# Those that have tests of their own, which run all of it, and stop or look at what runs.
OWN_TESTS = ("operations/", "recipes/", "frequency.md", "report.md")
RUN = {
    page
    for page, text in PAGES.items()
    if not page.startswith(OWN_TESTS)
    and any(kind in LANGUAGES and mark != "not run" for mark, _, kind, _ in marked_blocks(text))
}
# What is only shown: layouts of files, outputs, the input of other programs.
SHOWN = {"", "json", "text", "{toctree}", "{eval-rst}", "yaml", "ini"}
PYTHON = (sys.executable, "-W", "error::ResourceWarning", "-c")
SHELL = ("bash", "-euo", "pipefail", "-c")
LIMIT_S = 250


def run(command, directory, environment):
    done = subprocess.run(
        command,
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, f"{command[-1]}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted(RUN))
def test_what_a_page_shows_runs_as_written(page, tmp_path, request):
    environment = {**os.environ, "KERAS_BACKEND": "jax"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    if "<!-- needs: bucket -->" in PAGES[page]:
        store = request.getfixturevalue("s3")
        put(f"{store.url}/my-bucket", b"")
        environment |= s3_environment(store.url)
    script, printed = "", None
    for mark, told, language, block in [*marked_blocks(PAGES[page]), ("", "", "console", "")]:
        if mark == "file":
            (tmp_path / told.strip()).write_text(block)
        elif language == "python" and mark != "not run":  # goes on where the one before it ended
            script += block
        elif language in SHELLS and mark != "not run" and told != "begin":
            if script:
                run([*PYTHON, script], tmp_path, environment)
            script = ""
            printed = run([*SHELL, block], tmp_path, environment)
            continue
        elif language == "text" and printed is not None:
            expected = re.sub(r"(?m)^…\\\n", "(.*\n)?", re.escape(block)).replace("…", ".*")
            assert re.fullmatch(expected, printed, re.DOTALL), printed
        printed = None


@pytest.mark.parametrize("page", sorted(PAGES))
def test_each_block_of_a_page_is_of_a_known_kind(page):
    fences = re.findall(r"^ *```(\S*)", PAGES[page], re.MULTILINE)
    assert set(fences) <= LANGUAGES | SHOWN
    found = [language for *_, language, _ in marked_blocks(PAGES[page])]
    for language in LANGUAGES:
        assert found.count(language) == fences.count(language), "a block that the test overlooks"


@pytest.mark.parametrize("page", sorted(PAGES))
def test_what_is_not_run_says_why(page):
    for mark, reason, _, _ in marked_blocks(PAGES[page]):
        if mark == "not run":
            assert len(reason.split()) >= 4


def test_each_public_name_is_in_the_reference_or_among_the_errors():
    told = PAGES["reference.md"] + PAGES["errors.md"]
    names = (*stepsave.__all__, *stepsave.testing.__all__)
    assert [name for name in names if not re.search(rf"\b{name}\b", told)] == []


def test_each_link_of_a_page_leads_to_a_heading_that_there_is():
    for page, text in PAGES.items():
        for target, anchor in re.findall(r"\]\(([^)#\s]*)#([^)\s]+)\)", text):
            if "://" not in target:
                to = os.path.normpath((DOCS / page).parent / target) if target else DOCS / page
                heads = re.findall(r"^#+ (.+)$", Path(to).read_text(), re.MULTILINE)
                assert anchor in {slug(head) for head in heads}, f"{page}: {target}#{anchor}"


def slug(heading):
    """The anchor of a heading, as repository browsers and the site make it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
