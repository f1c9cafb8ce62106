"""What docs/cli.md shows is what the commands print."""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def test_the_command_line_prints_what_the_document_shows(tmp_path):
    shown = ROOT / "docs" / "cli.md"
    shutil.copy(shown, tmp_path / "cli.md")
    command = [sys.executable, "-m", "bench.publish.captures", "--document", tmp_path / "cli.md"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    again = (tmp_path / "cli.md").read_text()
    assert again == shown.read_text(), "run `python -m bench.publish.captures`"
