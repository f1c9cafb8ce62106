"""Code out of the documents, run as real processes that are told to end, or killed."""

import fcntl
import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
LIMIT_S = 240  # for all that a script does; importing a framework takes its time

# The models are so small that more threads only wait for each other.
ENVIRONMENT = {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}


_BLOCK = re.compile(
    r"(?:<!-- (file|needs|not run|[\w ]+(?=: begin))[^:\n]*: ([^>]+) -->\n)?^```(\w+)\n(.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


def marked_blocks(text):
    """The blocks of a page: mark before it and what that says, language, and the block itself."""
    return _BLOCK.findall(text)


def blocks(page, language):
    """The code blocks of one language in a page, as a reader would copy them."""
    text = (ROOT / "docs" / page).read_text()
    return [block for *_, kind, block in marked_blocks(text) if kind == language]


class Script:
    """A command at work in a folder, which writes no line before the last one was read.

    So it can be stopped at a line of its output, though its steps take less than a millisecond.
    """

    def __init__(self, *command, cwd, environment=None):
        self.lines = []
        self._text, self._end_s = b"", time.monotonic() + LIMIT_S
        self._errors = Path(cwd) / "stderr.txt"
        # Each write is a packet with a page of its own, and there is one page.
        self._pipe, theirs = os.pipe2(os.O_DIRECT | os.O_CLOEXEC)
        fcntl.fcntl(self._pipe, fcntl.F_SETPIPE_SZ, 4096)
        with self._errors.open("a") as errors:
            self._process = subprocess.Popen(
                command,
                cwd=cwd,
                env={**os.environ, **ENVIRONMENT, **(environment or {})},
                stdout=theirs,
                stderr=errors,
            )
        os.close(theirs)

    @classmethod
    def python(cls, path):
        return cls(sys.executable, "-W", "error::ResourceWarning", path.name, cwd=path.parent)

    def read_to(self, line_start):
        """Lets the script go on to a line that begins so."""
        while True:
            line = self._read_line()
            if line is None:
                raise AssertionError(f"ended before {line_start!r}: {self.told()}")
            if line.startswith(line_start):
                return

    def _read_line(self):
        while b"\n" not in self._text:
            ready, _, _ = select.select([self._pipe], [], [], self._end_s - time.monotonic())
            if not ready:
                self._process.kill()
                raise AssertionError(f"took more than {LIMIT_S} s: {self.told()}")
            packet = os.read(self._pipe, 65536)
            if not packet:
                return None
            self._text += packet
        line, _, self._text = self._text.partition(b"\n")
        self.lines.append(line.decode())
        return self.lines[-1]

    def send(self, signum):
        self._process.send_signal(signum)

    def children(self):
        """Numbers of the processes that it has started."""
        pid = self._process.pid
        return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def end(self):
        """Lets the script go on to its end, and returns its exit status."""
        while self._read_line() is not None:
            pass
        os.close(self._pipe)
        return self._process.wait(LIMIT_S)

    def kill(self):
        self.send(signal.SIGKILL)
        assert self.end() == -signal.SIGKILL, self.told()

    def told(self):
        return "\n".join([*self.lines, self._errors.read_text()])
