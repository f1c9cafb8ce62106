"""Children that save and restore until they are killed, forked by a process that has all imported.

So most of the time of a campaign goes into what children do. The nursery is a process of its own,
as forks want one without threads; who kills and looks is not among its children.
"""

import json
import os
import select
import signal
import subprocess
import sys
import traceback
from pathlib import Path

from stepsave.format import planning

TESTS = Path(__file__).parents[1]
LIMIT_S = 60


def use_small_shards():
    """Has several shards of several chunks in a backup of a few hundred kilobytes."""
    planning.SHARD_TARGET_BYTES = 64 << 10
    planning.CHUNK_LIMIT_BYTES = 16 << 10


def tidy_up_when_terminated():
    """Has SIGTERM end a campaign as Ctrl-C does: servers and directories go with it."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


class Lines:
    """The lines of a pipe, with a limit."""

    def __init__(self, pipe):
        self.pipe, self.rest = pipe, b""

    def next(self, limit_s):
        """The next one; None if it does not come in time."""
        while b"\n" not in self.rest:
            if not select.select([self.pipe], [], [], limit_s)[0]:
                return None
            data = os.read(self.pipe.fileno(), 1 << 16)
            assert data, "the nursery ended by itself"
            self.rest += data
        line, _, self.rest = self.rest.partition(b"\n")
        return line.decode()


class Nursery:
    """The process; a context manager.

    Attributes:
        lines: What it and its children say.
        child: The number of the child that there is, if it is known.
    """

    def __init__(self, noise, environment=None):
        """Names what is to be.

        Args:
            noise: A file for what anybody says on standard error.
            environment: What is to be added to that of the process.
        """
        self._noise = Path(noise)
        self._environment = environment or {}
        self._heard_bytes = 0
        self.child = None

    def __enter__(self):
        paths = [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
        # One thread: a library that starts more when imported would have forks warned of.
        own = {"PYTHONPATH": os.pathsep.join(paths), "OPENBLAS_NUM_THREADS": "1"}
        command = [sys.executable, "-W", "error", "-m", "proof.nursery"]
        with open(self._noise, "wb") as noise:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=noise,
                env={**os.environ, **own, **self._environment},
            )
        self.lines = Lines(self.process.stdout)
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.kill()
        self.process.wait(LIMIT_S)
        self.process.stdout.close()

    def order(self, **what):
        """Asks for a child."""
        self.process.stdin.write(json.dumps(what).encode() + b"\n")
        self.process.stdin.flush()

    def ask(self, **what):
        """Asks for a child, and returns what is told of it at its end."""
        self.order(**what)
        while (line := self.lines.next(LIMIT_S)) is not None:
            if line.startswith("child "):
                self.child = int(line.split()[1])
                continue
            self.child = None
            return json.loads(line)
        raise AssertionError(f"no end of {what}")

    def noise(self):
        """What was said on standard error since it was asked last."""
        with open(self._noise, "rb") as file:
            file.seek(self._heard_bytes)
            heard = file.read()
        self._heard_bytes += len(heard)
        return heard.decode(errors="replace")


def say(line):
    os.write(1, line.encode() + b"\n")  # one write: nobody ever sees half a line


def main():
    # All that a child would import: most of its time goes into what it does, and all are alike.
    import stepsave.engine.checkpointer
    import stepsave.engine.restoring  # noqa: F401
    from proof import lives, scenes

    use_small_shards()
    assert len(os.listdir("/proc/self/task")) == 1, "a fork would take only one of these threads"
    for line in sys.stdin:
        order = json.loads(line)
        kind = order.pop("kind")
        play = {"scene": scenes.play, "life": lives.live}[kind]
        if play(**order):
            return  # a child that has done its part, and ends as every script does


if __name__ == "__main__":
    try:
        main()
    except BaseException:
        traceback.print_exc()
        raise
