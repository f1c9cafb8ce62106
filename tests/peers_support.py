"""Several processes that train one model, on the loopback."""

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent


def free_ports(count):
    """The first of so many ports in a row that nobody uses."""
    while True:
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError, OverflowError):
            first = 0
            for number in range(count):
                probe = stack.enter_context(socket.socket())
                probe.bind(("127.0.0.1", first + number if number else 0))
                first = first or probe.getsockname()[1]
            return first


class Processes:
    """So many processes of one script, which gets its rank, their number and a port first."""

    def __init__(self, code, *arguments, count=2, environment=None, fit=False):
        port = free_ports(count)
        paths = [str(TESTS), *([str(TESTS / "fit")] if fit else [])]
        paths += filter(None, [os.environ.get("PYTHONPATH")])
        self.children = [
            subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    code,
                    str(rank),
                    str(count),
                    str(port),
                    *map(str, arguments),
                ],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(paths),
                    "TF_CPP_MIN_LOG_LEVEL": "3",
                    **(environment(rank, count, port) if environment else {}),
                },
            )
            for rank in range(count)
        ]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for child in self.children:
            child.kill()
            child.communicate()

    def wait_for(self, line, rank=0):
        """Reads what a process prints, up to a line."""
        for found in self.children[rank].stdout:
            if found.strip() == line:
                return
        raise AssertionError(f"process {rank} ended: {self.children[rank].stderr.read()[-3000:]}")

    def kill(self):
        for child in self.children:
            child.kill()

    def results(self):
        """Waits for the end; the last lines that they printed, all ended well."""
        ends = [child.communicate(timeout=240) for child in self.children]
        for rank, (child, (_, err)) in enumerate(zip(self.children, ends, strict=True)):
            assert child.returncode == 0, f"process {rank}: {err[-3000:]}"
        return [out.strip().splitlines() for out, _ in ends]
