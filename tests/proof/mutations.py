"""The suite tests itself: breaks the product in one place at a time, and looks who notices.

A mutation is a record in `tests/mutations/AREA.toml`: a sentence that says what is broken, the
file, the exact text, what takes its place, and the tests that must go red, each of them. It is
applied to a copy of `src`, never to the sources, and its tests run in a process of their own.
Caught is one of which each test has failed, by an assertion, or by its time limit where a hang is
what the record expects (`limit_s`): not one that cannot be imported.

Those of the area `old_bugs` were in the product once.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import dataclasses
import json
import os
import queue
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

from proof.outcomes import RECORD, SOURCE
from proof.record import ROOT, Campaign, Row, parser

DIRECTORY = ROOT / "tests/mutations"

TEST_LIMIT_S = 120
"""Of one test, unless it says another one. Those of mutations take seconds."""

PROCESS_LIMIT_S = 240
"""Of all tests of a mutation: a test that hangs beyond its own limit has caught nothing."""

QUICK = 6

# Others take longer to import than most tests.
PLUGINS = ("-p", "pytest_timeout", "-p", "_hypothesis_pytestplugin")

# Why a test has failed that was ended.
LIMIT = "the time limit of the test"

# What broken code raises, rather than wrong code.
NO_FINDING = ("NameError", "UnboundLocalError", "ImportError", "ModuleNotFoundError", "SyntaxError")


class DoesNotApplyError(Exception):
    """Raised for a mutation whose text is not there, or not once."""


@dataclasses.dataclass(frozen=True, slots=True)
class Mutation:
    """One thing that is broken.

    Attributes:
        area: What it is about: the file that it stands in.
        what: What is broken, as a sentence.
        file: Below `src/stepsave`.
        old: The text that is replaced; it occurs once.
        new: What takes its place.
        tests: Node ids, also with parameters, or files; each must go red.
        limit_s: Of tests that it has hang, which take a moment without it; None if it has none.
    """

    area: str
    what: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    limit_s: float | None = None

    def applied(self, text):
        """Returns the file with it.

        Raises:
            DoesNotApplyError: If what is replaced is not there exactly once.
        """
        count = text.count(self.old)
        if count != 1 or self.old == self.new:
            raise DoesNotApplyError(f"{self.area}: {self.what}: {count} times in {self.file}")
        return text.replace(self.old, self.new)


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """What came of a mutation.

    Attributes:
        is_caught: Whether each of its tests has gone red.
        how: In few words.
        is_tried: Whether any of its tests could run here.
    """

    is_caught: bool
    how: str
    is_tried: bool = True


@dataclasses.dataclass(slots=True)
class Outcome:
    """What a process has told of its tests, by node id without parameters."""

    status: int | None
    output: str
    passed: set[str]
    failed: dict[str, str]  # and why
    broken: list[str]  # outside of a test's own code
    skipped: set[str]


def read_mutations(directory=DIRECTORY):
    """Returns all mutations, by area and in the order of the files."""
    return [
        Mutation(path.stem, **{**one, "tests": tuple(one["tests"])})
        for path in sorted(directory.glob("*.toml"))
        for one in tomllib.loads(path.read_text())["mutation"]
    ]


class Workshop:
    """A copy of the sources, in which one mutation is tried after the other."""

    def __init__(self, directory, seed):
        """Copies the sources.

        Args:
            directory: An empty one, for all that is written.
            seed: For tests that draw.
        """
        self._directory = Path(directory)
        self._seed = seed
        self.source = self._directory / "src"
        shutil.copytree(ROOT / "src", self.source, ignore=shutil.ignore_patterns("__pycache__"))
        # By time and size a changed file may look like the one before it; by its hash it does not.
        command = [sys.executable, "-m", "compileall", "-q", "--invalidation-mode", "checked-hash"]
        subprocess.run([*command, str(self.source)], check=True)

    def try_mutation(self, mutation):
        """Returns the verdict on a mutation, and leaves the copy as it was."""
        path = self.source / "stepsave" / mutation.file
        before = path.read_text()
        path.write_text(mutation.applied(before))
        try:
            outcome = self.run(mutation.tests, test_limit_s=mutation.limit_s)
        finally:
            path.write_text(before)
        return judge(mutation, outcome)

    def run(self, tests, limit_s=None, test_limit_s=None):
        """Runs tests on the copy as it is, in a process of their own.

        Args:
            tests: Their node ids.
            limit_s: How long the process may take; None for as long as for a mutation.
            test_limit_s: How long one of them may; None for as long as usual.
        """
        limit_s = PROCESS_LIMIT_S if limit_s is None else limit_s
        test_limit_s = test_limit_s or TEST_LIMIT_S
        record, log = self._directory / "outcomes", self._directory / "log"
        record.write_text("")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        command += [*PLUGINS, "-p", "proof.outcomes", "-o", f"timeout={test_limit_s}"]
        command += [f"--basetemp={self._directory / 'tests'}", f"--hypothesis-seed={self._seed}"]
        with log.open("w") as output:
            process = subprocess.Popen(
                [*command, *tests],
                cwd=ROOT,
                env=self._environment(record),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            status = None
            try:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    status = process.wait(limit_s)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # with what its tests have started
                process.wait()
        return _read_outcome(status, log.read_text(errors="replace"), record)

    def _environment(self, record):
        # What the process that this one may itself be a test of was told is not for that one.
        own = ("PYTEST_", "COVERAGE_", "COV_")
        environment = {k: v for k, v in os.environ.items() if not k.startswith(own)}
        paths = [str(self.source), str(ROOT / "tests"), str(ROOT)]
        temporary = self._directory / "temporary"
        temporary.mkdir(exist_ok=True)
        return environment | {
            "PYTHONPATH": os.pathsep.join(paths),
            "TMPDIR": str(temporary),
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            RECORD: str(record),
            SOURCE: str(self.source),
        }


def _read_outcome(status, output, record):
    outcome = Outcome(status, output, set(), {}, [], set())
    running = None
    for facts in map(json.loads, record.read_text().splitlines()):
        if "began" in facts:
            running = facts["began"]
            continue
        test, running = without_parameters(facts["test"]), None
        if facts["outcome"] == "skipped":
            outcome.skipped.add(test)
        elif facts["outcome"] == "passed":
            outcome.passed.add(test)
        elif facts["when"] == "call":
            outcome.failed.setdefault(test, facts["error"])
        else:
            outcome.broken.append(f"{test}, {facts['when']}: {facts['error']}")
    if running is not None and status == 1 and "Timeout" in output:
        outcome.failed[without_parameters(running)] = LIMIT
    return outcome


def without_parameters(test):
    return test.partition("[")[0]


def judge(mutation, outcome):
    """Says whether a mutation was caught, for the right reason."""
    if outcome.status is None:
        return Verdict(
            is_caught=False, how=f"hung: no limit of a test has ended it in {PROCESS_LIMIT_S} s"
        )
    reached = {*outcome.passed, *outcome.failed}
    if not outcome.broken and outcome.status in (0, 5) and not reached:
        return Verdict(is_caught=False, how="its tests are skipped here", is_tried=False)
    no_finding = NO_FINDING if mutation.limit_s else (*NO_FINDING, LIMIT)  # it may be the machine
    red = {test: why for test, why in outcome.failed.items() if not why.startswith(no_finding)}
    green = [test for test in mutation.tests if not any(_is_of(one, test) for one in red)]
    if outcome.status == 1 and not green:
        how = "; ".join(f"{test}: {why}" for test, why in red.items())
        return Verdict(is_caught=True, how=how)
    if outcome.broken or len(red) < len(outcome.failed) or outcome.status not in (0, 1, 5):
        told = [*outcome.broken, *outcome.failed.values()] or outcome.output.splitlines()[-5:]
        return Verdict(is_caught=False, how=f"broken, not wrong: {' | '.join(told)}")
    return Verdict(is_caught=False, how=f"nobody noticed: {', '.join(green)}")


def _is_of(test, named):
    """Whether a test, without parameters, is what was named: itself, some of it, or its file."""
    named = without_parameters(named)
    return test == named or test.startswith(f"{named}::")


def try_all(mutations, jobs, seed):
    """Yields each mutation with its verdict, as they come.

    Raises:
        SystemExit: If a test of theirs does not pass without any mutation.
    """
    with tempfile.TemporaryDirectory(prefix="stepsave-mutations-") as directory:
        workshops = queue.SimpleQueue()
        for number in range(jobs):
            place = Path(directory, str(number))
            place.mkdir()
            workshops.put(Workshop(place, seed))

        def try_one(mutation):
            workshop = workshops.get()
            try:
                return workshop.try_mutation(mutation)
            finally:
                workshops.put(workshop)

        workshop = workshops.get()
        tests = sorted({test for mutation in mutations for test in mutation.tests})
        outcome = workshop.run(tests, limit_s=PROCESS_LIMIT_S * len(tests))
        if outcome.status not in (0, 5):
            raise SystemExit(f"without a mutation they must pass, and do not:\n{outcome.output}")
        workshops.put(workshop)
        with concurrent.futures.ThreadPoolExecutor(jobs) as executor:
            trials = {executor.submit(try_one, mutation): mutation for mutation in mutations}
            for trial in concurrent.futures.as_completed(trials):
                yield trials[trial], trial.result()


def choose(mutations, options):
    """Returns those that are asked for."""
    if options.only:
        words = options.only.casefold()
        mutations = [one for one in mutations if words in f"{one.area}: {one.what}".casefold()]
    if options.quick:
        mutations = random.Random(options.seed).sample(mutations, min(QUICK, len(mutations)))
    return mutations


def rows(verdicts):
    """Returns a row for each area."""
    by_area = collections.defaultdict(list)
    for mutation, verdict in verdicts:
        by_area[mutation.area].append((mutation, verdict))
    for area, found in sorted(by_area.items()):
        tried = [(mutation, verdict) for mutation, verdict in found if verdict.is_tried]
        missed = [mutation.what for mutation, verdict in tried if not verdict.is_caught]
        notes: list[str] = []
        if len(found) > len(tried):
            notes.append(f"{len(found) - len(tried)} cannot be tried on this machine")
        notes += [f"missed: {what}" for what in missed]
        yield Row(area.replace("_", " "), len(tried), len(missed), "; ".join(notes))


def main(arguments=None):
    made = parser("mutations", __doc__)
    made.formatter_class = argparse.RawDescriptionHelpFormatter
    made.add_argument("--only", metavar="TEXT", help="those whose area or sentence has this")
    made.add_argument("--jobs", type=int, default=1, help="how many at once")
    made.add_argument("--list", action="store_true", help="tell them and their tests, try none")
    options = made.parse_args(arguments)
    mutations = choose(read_mutations(), options)
    if options.list:
        for one in mutations:
            print(f"{one.area}: {one.what}\n    {one.file}: {' '.join(one.tests)}")  # noqa: T201
        return
    print(f"seed {options.seed}, {len(mutations)} mutations", flush=True)  # noqa: T201
    campaign = Campaign("mutations", options, tempfile.gettempdir())
    verdicts = []
    began_s = time.monotonic()
    for mutation, verdict in try_all(mutations, options.jobs, options.seed):
        verdicts.append((mutation, verdict))
        word = "caught" if verdict.is_caught else "MISSED" if verdict.is_tried else "not tried"
        at_s = time.monotonic() - began_s
        print(f"{at_s:5.0f} s  {word}  {mutation.area}: {mutation.what}", flush=True)  # noqa: T201
        print(f"         {verdict.how[:300]}", flush=True)  # noqa: T201
    for row in rows(verdicts):
        campaign.add(row)
    if campaign.bad:
        sys.exit(1)


if __name__ == "__main__":
    main()
