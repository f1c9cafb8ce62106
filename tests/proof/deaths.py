"""Kills a process before each system call that it makes about its backup, and looks what is left.

A dry run lists the calls of a scene; then each of them has a run of its own, in which the process
is killed on its threshold. After each: the newest backup that was acknowledged, or a newer one, is
restored whole by another process; the next save works; and nothing else is left lying there.
"""

import collections
import contextlib
import dataclasses
import itertools
import os
import shutil
import signal
import sys
import tempfile
import traceback
from pathlib import Path

from bucket_support import BUCKET, Proxy, s3_environment, s3_server

from proof import aftermath, tracing
from proof.nursery import Nursery, tidy_up_when_terminated, use_small_shards
from proof.record import Campaign, Row, parser
from proof.scenes import SCENES

WRITERS = ("auto", "tensorstore")  # the first is the direct one, where the disk takes it
TRIES = 3  # of a run in which threads took turns in another order than in the dry run

_places = itertools.count()


@dataclasses.dataclass(frozen=True, slots=True)
class Death:
    """Where a process is to die.

    Attributes:
        scene: Of `SCENES`.
        writer: Of the checkpointer.
        aim: The call; None to let it live.
    """

    scene: str
    writer: str
    aim: tuple[str, str, int] | None = None


class Theatre:
    """Where scenes are played: a nursery, a directory for each, and a bucket if there is one."""

    def __init__(self, nursery, root, proxy=None):
        self.nursery = nursery
        self.proxy = proxy
        self._root = Path(root)

    def play(self, death, reaper=None):
        """Has a process die, and checks what it leaves; returns what was seen of it.

        Args:
            death: Where.
            reaper: Who may kill it before.

        Raises:
            AssertionError: If what it leaves is not as it must be.
        """
        scene = SCENES[death.scene]
        number = next(_places)
        directory = self._root / str(number)
        place = f"s3://{BUCKET}/{os.getpid()}-{number}" if scene.uploads else None
        told = aftermath.Told()
        if scene.after is not None:
            earlier = Death(scene.after[0], death.writer, scene.after[1])
            assert self._run(earlier, directory, place, told)["killed"]
        watched = self._run(death, directory, place, told, reaper)
        options = {**scene.options, "writer": death.writer}
        aftermath.check(directory, told, options, place)
        shutil.rmtree(directory, ignore_errors=True)
        return watched

    def _run(self, death, directory, place, told, reaper=None):
        watched = self.nursery.ask(
            kind="scene",
            scene=death.scene,
            directory=str(directory),
            writer=death.writer,
            place=place,
            aim=death.aim,
        )
        noise = self.nursery.noise()
        killed = watched["killed"] or (reaper is not None and reaper.came)
        assert watched["status"] == (-signal.SIGKILL if killed else 0), noise
        assert not noise, noise
        for line in watched["said"]:
            told.hear(line)
        return watched

    def calls(self, scene, writer):
        """The calls of a scene and how many there are of each, from a run that nobody ends."""
        calls = self.play(Death(scene, writer))["calls"]
        return collections.Counter(tuple(call) for call in calls)


def main(arguments=None):
    options = parser("deaths", __doc__)
    options.add_argument("--scene", choices=SCENES, action="append", help="only such")
    options = options.parse_args(arguments)
    reason = tracing.reason_against()
    if reason is not None:
        sys.exit(reason)
    use_small_shards()
    tidy_up_when_terminated()
    with contextlib.ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        proxy = stack.enter_context(Proxy.before(stack.enter_context(s3_server())))
        environment = s3_environment(proxy.url)
        os.environ.update(environment)
        nursery = stack.enter_context(Nursery(root / "noise", environment))
        theatre = Theatre(nursery, root, proxy)
        campaign = Campaign("deaths", options, root)
        for scene in options.scene or SCENES:
            campaign.add(kill_at_each_call(theatre, scene, quick=options.quick))
        if not options.scene or "upload" in options.scene:
            campaign.add(kill_at_each_request(theatre, quick=options.quick))
    sys.exit(1 if campaign.bad else 0)


def kill_at_each_call(theatre, scene, *, quick):
    """Plays a scene as often as it has calls; returns what became of it."""
    cases = bad = missed = 0
    kinds = set()
    # The saves of uploads are those of other scenes.
    uploads = SCENES[scene].uploads
    for writer in WRITERS[:1] if uploads else WRITERS:
        for (name, role), count in theatre.calls(scene, writer).items():
            kinds.add((name, role))
            for number in range(1 if quick or uploads else count):
                death = Death(scene, writer, (name, role, number))
                died, failed = _die(theatre, death)
                cases += died
                bad += failed
                missed += not died
                # Threads race for the last of several; one of each kind must be hit.
                assert died or number, f"never met: {death}"
    notes = f"{len(kinds)} kinds of call and path"
    if missed:
        notes += f"; {missed} calls not met again"
    return Row(f"Killed before each system call: {SCENES[scene].title}", cases, bad, notes)


def _die(theatre, death, reaper=None):
    """Whether the process died where it was to, and whether what it left was wrong."""
    for _ in range(TRIES if reaper is None else 1):
        try:
            if theatre.play(death, reaper)["killed"]:
                return True, False
        except Exception:  # noqa: BLE001  counted, and shown
            print(f"bad: {death}", flush=True)  # noqa: T201
            traceback.print_exc()
            return True, True
    return False, False


def kill_at_each_request(theatre, *, quick):
    """Has a process die when the n-th request that changes a bucket arrives, for all n."""
    bad = 0
    for cases in range(10 if quick else sys.maxsize):
        reaper = Reaper(theatre.nursery, cases)
        theatre.proxy.fault = reaper
        _, failed = _die(theatre, Death("upload", "auto"), reaper)
        theatre.proxy.fault = None
        bad += failed
        if not reaper.came and not failed:
            break
    return Row("Killed at each request that changes the bucket: uploads", cases, bad)


class Reaper:
    """Kills who sends the n-th request that changes a bucket: it, and what comes after, is lost."""

    def __init__(self, nursery, number):
        self.came = False
        self._nursery = nursery
        self._left = number

    def __call__(self, method, _):
        if self._nursery.child is None:
            return None  # somebody else's
        if method in ("PUT", "POST", "DELETE") and not self.came:
            self._left -= 1
            self.came = self._left < 0
            if self.came:
                os.kill(self._nursery.child, signal.SIGKILL)
        return "cut" if self.came else None


if __name__ == "__main__":
    main()
