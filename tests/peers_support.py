"""Several processes that train one model, on the loopback."""

import contextlib
import itertools
import os
import random
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from stepsave.engine.peers import Peers

TESTS = Path(__file__).parent

LIMIT_S = 240


_PORTS, _PORTS_PER_WORKER = 20_000, 2_000
"""Below those that systems give to outgoing connections, which may take one at any moment; and of
the workers of one run each has its own."""

_taken = itertools.count(random.SystemRandom().randrange(_PORTS_PER_WORKER))


def free_ports(count):
    """The first of so many ports in a row that nobody uses."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 6
    while True:
        place = next(_taken) * 8 % _PORTS_PER_WORKER
        first = _PORTS + worker * _PORTS_PER_WORKER + place
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for number in range(count):
                probe = stack.enter_context(socket.socket())
                probe.bind(("127.0.0.1", first + number))
            return first


class Service:
    """Keys and values, as frameworks have them: for processes played by threads of this one."""

    def __init__(self, delay_s=0.0):
        self.values = {}
        self.changed = threading.Condition()
        self.delay_s = delay_s

    def peers(self, rank, count):
        peek, forget = self.values.get, self.values.pop
        return Peers(rank, count, "nobody", self.say, self.hear, peek, forget=forget)

    def say(self, key, value):
        time.sleep(self.delay_s)
        with self.changed:
            assert key not in self.values, f"{key} was said already"
            self.values[key] = value
            self.changed.notify_all()

    def hear(self, key, limit_s):
        with self.changed:
            if not self.changed.wait_for(lambda: key in self.values, limit_s):
                raise TimeoutError(key)
        return self.values[key]


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
        # One that dies early has the others of some frameworks wait for ever.
        self._limit = threading.Timer(LIMIT_S, self.kill)
        self._limit.start()
        return self

    def __exit__(self, *_):
        self._limit.cancel()
        for child in self.children:
            child.kill()
            child.communicate()

    def wait_for(self, line, rank=0):
        """Reads what a process prints, up to a line."""
        for found in self.children[rank].stdout:
            if found.strip() == line:
                return
        self.kill()
        ends = [child.communicate()[1][-2000:] for child in self.children]
        raise AssertionError(f"process {rank} ended before {line!r}. All say: {ends}")

    def kill(self):
        for child in self.children:
            child.kill()

    def results(self):
        """Waits for the end; the last lines that they printed, all ended well."""
        ends = [child.communicate() for child in self.children]
        for rank, (child, (_, err)) in enumerate(zip(self.children, ends, strict=True)):
            others = [one[1][-1000:] for one in ends]
            assert child.returncode == 0, f"process {rank}: {err[-3000:]}; all: {others}"
        return [out.strip().splitlines() for out, _ in ends]
