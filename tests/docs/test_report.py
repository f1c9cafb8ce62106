"""The page about reports: what it shows was run, and its text and picture were reported."""

import re
import shutil
import subprocess
import sys

import pytest
from bench.publish import report as publishing
from document_support import ROOT, blocks

PAGE = ROOT / "docs/report.md"


def test_text_and_picture_are_made_from_what_the_program_reported(tmp_path):
    for name in ("report.md", "report.json"):
        shutil.copy(ROOT / "docs" / name, tmp_path)
    publishing.main(["--publish", "--docs", str(tmp_path)])
    for name in ("report.md", "report.svg"):
        made = (tmp_path / name).read_text()
        assert made == (ROOT / "docs" / name).read_text(), (
            f"{name}: run bench.publish.report --publish"
        )


def test_the_programs_of_the_page_run_as_written_one_after_the_other(tmp_path):
    examples = blocks("report.md", "python")
    assert len(examples) == 3
    done = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-c", "\n".join(examples)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    shown = blocks("report.md", "text")[0]
    lines, shown_lines = done.stdout.splitlines(), shown.splitlines()
    assert [line[:20] for line in lines[1:]] == [line[:20] for line in shown_lines[1:]]
    for name in ("report.svg", "again.png", "trace.json", "report.json"):
        assert (tmp_path / name).stat().st_size > 1000
    logged = (tmp_path / "log.csv").read_text().splitlines()
    assert len(logged) == 3
    names = {name for name in logged[0].split(",") if name.startswith("stepsave_")}
    documented = set(re.findall(r"`(stepsave_\w+)`", PAGE.read_text()))
    assert names == documented - {"stepsave_remote_age_s"}  # of a bucket


@pytest.mark.slow
def test_what_is_published_anew_is_what_the_first_program_reports():
    facts = publishing.run(PAGE.read_text())
    assert facts["stats"]["committed"] == 20
    assert facts["steps"]["count"] == 200
