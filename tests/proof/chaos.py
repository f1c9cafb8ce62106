"""Trainings under a public tester that is not ours: `ckpt-chaos`, as it comes from PyPI.

It runs a training once and records what it does to files below a directory: by Python's audit
events, and around `open`, `torch.save`, safetensors and `h5py.File`. Then it kills the training
anew at one of these events at a time, starts it again, and judges what comes of that: PASS,
HARD_FAIL (the second start raised), SILENT_DIVERGENCE (it came to other weights), LOST_WORK (it
went on from before the newest backup that had been acknowledged). All systems train the same loop,
or the same `fit`; how each is set up is in `SYSTEMS`. Verdicts are the tester's. What one should
know of its release 0.1.8:

- **before** kills (`os._exit`) before the event. **torn** cuts a file in half as it is closed, and
  kills; it knows such files only where Python's `open`, h5py, `torch.save` or safetensors write
  them. stepsave writes by `os.open`, Orbax in C++: what it cannot tear, the table calls "not
  driven", which is no merit. **term** sends SIGTERM at the event.
- The "newest complete checkpoint" it takes from names and sizes of files in the undisturbed run.
  That fits no system that takes turns, overwrites, or names files at random; so it is given files
  for acknowledged steps instead, beside the directory that it watches (`chaos_trainings.Said`).
- `--crash-rank 1` alone kills nobody: `run` never sets the variable that its injector reads,
  `CKPT_CHAOS_CRASH_RANK`. It is set here, from outside. And who was not killed gets a PASS too;
  such are not counted here.
- Of several ranks it reads the step of rank 0 only, and `ranks_agree` stays true. So what all
  ranks came to is compared here, by `--result-cmd`.
- What `tensorstore.open` returns for files, it replaces by something that can neither be awaited
  nor indexed: programs that use tensorstore from Python end under it by a TypeError. So do Keras's
  `OrbaxCheckpoint`, as the table tells, and stepsave with `writer="tensorstore"`; that is driven
  where it writes by `O_DIRECT`.
- Its mode **unsynced** takes back only what `open` wrote, and would spare all others: not driven.
"""

import collections
import dataclasses
import importlib.metadata
import json
import os
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.publish.collected import markdown_table

from proof.record import RESULTS, ROOT, Campaign, Row, parser

MODES = ("before", "torn", "term")
VERDICTS = ("PASS", "HARD_FAIL", "SILENT_DIVERGENCE", "LOST_WORK", "CONTROL_FAIL")
LIMIT_S = 600
PACKAGES = ("ckpt-chaos", "keras", "jax", "torch", "orbax-checkpoint", "numpy", "h5py")
NOTHING_TO_TEAR = "not driven"


class NotDrivenError(Exception):
    """Raised where a training does not run under the tester, though nothing kills it."""


@dataclasses.dataclass(frozen=True, slots=True)
class System:
    """One that is driven.

    Attributes:
        label: Its name in the table.
        settings: How it is set up, and how it finds what to go on from.
        ranks: With how many processes; others are not driven.
    """

    label: str
    settings: str
    ranks: tuple[int, ...] = (1,)

    @property
    def is_ours(self):
        return self.label.startswith("stepsave")


_ONE_PROCESS = "one process only: its documentation knows of no several"
SYSTEMS = {
    "loop_stepsave": System(
        "stepsave, `Checkpointer`", "`stepsave.Checkpointer(dir)`, `restore()`", (1, 2)
    ),
    "fit_stepsave": System(
        "stepsave, `BackupAndRestore`",
        "`stepsave.BackupAndRestore(dir, save_before_preemption=True)`",
    ),
    "fit_stepsave_within": System(
        "stepsave, `BackupAndRestore`, within epochs", "the same with `save_freq=2`"
    ),
    "fit_keras": System("Keras `BackupAndRestore`", f"`BackupAndRestore(dir)`; {_ONE_PROCESS}"),
    "fit_keras_double": System(
        "Keras `BackupAndRestore`, double",
        f"`BackupAndRestore(dir, double_checkpoint=True)`; {_ONE_PROCESS}",
    ),
    "fit_model_checkpoint": System(
        "Keras `ModelCheckpoint`",
        "`ModelCheckpoint('checkpoint.weights.h5', save_weights_only=True)`, `load_weights` before "
        f"`fit`; {_ONE_PROCESS}",
    ),
    "fit_orbax": System(
        "Keras `OrbaxCheckpoint`",
        "`OrbaxCheckpoint(dir)`, `load_weights(dir)` before `fit` if it has a latest step",
    ),
    "loop_orbax": System(
        "Orbax `CheckpointManager`",
        "`CheckpointManager(dir, max_to_keep=1)`, asynchronous, `StandardSave`; `latest_step()`",
        (1, 2),
    ),
    "loop_dcp": System(
        "PyTorch DCP, newest folder",
        "`dcp.save(checkpoint_id=dir/step)`; the folder with the highest number",
        (1, 2),
    ),
    "loop_dcp_proved": System(
        "PyTorch DCP, newest with `.metadata`", "the same, of folders that have `.metadata`", (1, 2)
    ),
    "loop_torch_save": System(
        "`torch.save`", "one file, overwritten; with two processes, by the first", (1, 2)
    ),
    "loop_torch_save_renamed": System(
        "`torch.save`, renamed", "written beside it, then `os.replace`", (1, 2)
    ),
}


def main(arguments=None):
    made = parser("chaos", "Lets the public tester `ckpt-chaos` kill trainings, ours and others.")
    made.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    made.add_argument("--ranks", nargs="+", type=int, default=[1, 2])
    made.add_argument("--rounds", type=int, default=2, help="each with another seed")
    made.add_argument("--points", type=int, default=4, help="kills per mode and round")
    made.add_argument("--jobs", type=int, default=1, help="trainings at a time")
    options = made.parse_args(arguments)
    if options.quick:
        options.rounds, options.points = 1, 2
    with tempfile.TemporaryDirectory(prefix="stepsave-chaos-") as temporary:
        campaign = Campaign("chaos", options, Path(temporary))
        return _run(campaign, options, Path(temporary))


def _run(campaign, options, temporary):
    rng, table = random.Random(options.seed), []
    seeds = [rng.randrange(1 << 31) for _ in range(options.rounds)]
    for name in options.systems:
        for ranks in sorted({*SYSTEMS[name].ranks} & {*options.ranks}):
            found = Verdicts(name, ranks)
            for number, seed in enumerate(seeds):
                # The process that is killed, in turn.
                work = temporary / f"{name}-{ranks}-{number}"
                try:
                    found.add(
                        drive(
                            name,
                            work,
                            seed,
                            ranks=ranks,
                            crash_rank=number % ranks,
                            points=options.points,
                            jobs=options.jobs,
                        )
                    )
                except NotDrivenError as e:
                    if SYSTEMS[name].is_ours:
                        raise
                    found.not_driven = str(e).splitlines()[-1]
                    break
            table.append(found.as_json())
            campaign.keep(
                systems={key: dataclasses.asdict(each) for key, each in SYSTEMS.items()},
                versions=versions(), rounds=options.rounds, points=options.points, table=table,
            )  # fmt: skip
            print(json.dumps(table[-1], indent=1), flush=True)  # noqa: T201
            if SYSTEMS[name].is_ours:
                campaign.add(found.row())
    return 1 if campaign.bad else 0


def drive(name, work, seed, *, points, ranks=1, crash_rank=0, jobs=1, modes=MODES):
    """Has the tester kill a training at so many points per mode.

    Returns:
        Of each training: its mode, None for the one that was let run; the tester's verdict;
        where it was killed; and how the second start ended.
    """
    tester = [sys.executable, "-m", "ckpt_chaos", "run", "--work", str(work)]
    tester += ["--modes", ",".join(modes), "--max-points", str(points * len(modes))]
    tester += ["--ranks", str(ranks), "--crash-rank", str(crash_rank), "--jobs", str(jobs)]
    tester += ["--timeout", str(LIMIT_S), "--step-regex", r"resumed from step (\d+)"]
    tester += ["--checkpoint-glob", "{out}/../said/*"]
    results = " ".join(f"{{out}}/../result-{rank}" for rank in range(ranks))
    tester += ["--result-cmd", f"cat {results}"]
    training = [sys.executable, "-m", "proof.chaos_trainings", name, "{out}", "--seed", str(seed)]
    done = subprocess.run(
        [*tester, "--", *training],
        cwd=ROOT,
        env=_environment(crash_rank),
        capture_output=True,
        text=True,
        check=False,
    )
    kept = sorted(work.glob("pt_*/result.json"))
    if not kept:
        told = f"{done.stdout}{done.stderr}".strip()
        raise NotDrivenError(f"{name}: the tester did not come to kill anything.\n{told}")
    return _judged(work, done.stdout)


def _environment(crash_rank):
    paths = [ROOT / "src", ROOT / "tests", ROOT]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*map(str, paths), os.environ.get("PYTHONPATH", "")]),
        "KERAS_BACKEND": "jax",
        "JAX_PLATFORMS": "cpu",
        "OMP_NUM_THREADS": "1",
        "CKPT_CHAOS_CRASH_RANK": str(crash_rank),
    }


def _judged(work, said):
    from ckpt_chaos.runner import rejudge

    records = [json.loads(path.read_text()) for path in work.glob("pt_*/result.json")]
    records.sort(key=lambda record: record["order"])
    judged = []
    for record, row in zip(records, rejudge(work), strict=True):
        assert record["label"] == row.label
        assert row.verdict in said
        mode = record["point"][1] if "point" in record else None
        lines = record.get("resume_tail", "").replace(str(work), "{work}").strip().splitlines()
        judged.append(
            {
                "mode": mode,
                "verdict": row.verdict,
                "at": row.label,
                "killed": row.crashed,
                "elsewhere": row.drift,
                "resumed_from": row.outcome.resumed_from_step,
                "acknowledged": row.outcome.newest_complete_step,
                "ended": re.sub(r"(/[\w.@+-]+){3,}/", ".../", lines[-1])[:300] if lines else "",
            }
        )
    return judged


class Verdicts:
    """Of one system with so many processes, by mode."""

    def __init__(self, name, ranks):
        self.name, self.ranks = name, ranks
        self.modes = {mode: collections.Counter() for mode in MODES}
        self.controls = collections.Counter()
        self.failures, self.not_killed, self.elsewhere = [], 0, 0
        self.not_driven = ""  # how it ended under the tester, undisturbed

    def add(self, judged):
        for one in judged:
            if one["mode"] is not None and not one["killed"]:
                self.not_killed += 1  # whatever the tester says of it, it says nothing
                continue
            counts = self.controls if one["mode"] is None else self.modes[one["mode"]]
            counts[one["verdict"]] += 1
            if one["verdict"] != "PASS":
                self.failures.append(one)
            self.elsewhere += one["elsewhere"]

    def as_json(self):
        return {
            "system": self.name,
            "ranks": self.ranks,
            "controls": dict(self.controls),
            "modes": {mode: dict(counts) for mode, counts in self.modes.items()},
            "not_killed": self.not_killed,
            "elsewhere": self.elsewhere,
            "not_driven": self.not_driven,
            "failures": self.failures,
        }

    def row(self):
        cases = [*self.modes.values(), self.controls]
        return Row(
            f"{SYSTEMS[self.name].label} under ckpt-chaos, {self.ranks} "
            f"process{'es' if self.ranks > 1 else ''}",
            sum(counts.total() for counts in cases),
            sum(counts.total() - counts["PASS"] for counts in cases),
            "a public tester; its verdicts",
        )


def versions():
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {name: version.partition("+")[0] for name, version in found.items()}


def chaos_table(results=RESULTS, *, is_brief=False):
    """What it found, as Markdown.

    Args:
        results: The folder with `chaos.json`.
        is_brief: Whether to leave out how each system was set up.
    """
    document = json.loads((results / "chaos.json").read_text())
    systems, found = document["systems"], document["table"]
    names = {"before": "killed before it touched a file", "torn": "a file torn in half, killed",
             "term": "SIGTERM"}  # fmt: skip
    rows = [
        [
            systems[row["system"]]["label"],
            str(row["ranks"]),
            *(_cell(row["modes"][mode]) for mode in names),
        ]
        for row in found
    ]
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    machine = document["machine"]
    caption = (
        "Verdicts of the public tester `ckpt-chaos`, which runs a training, kills it, and starts "
        f"it again; rounds: {document['rounds']}, of at most {document['points']} kills per mode. "
        f"{versions}; Linux {machine['kernel']}, {machine['file_system']}. A kill of a process is "
        "no power cut: nothing here tells who syncs."
    )
    not_driven = (
        f"*{NOTHING_TO_TEAR.capitalize()}*: the tester can tear only what Python's `open`, h5py or "
        "`torch.save` writes, and found nothing of that."
    )
    ended = [
        f"{systems[row['system']]['label']} ended under the tester by itself: {row['not_driven']}"
        for row in found
        if row["not_driven"]
    ]
    table = markdown_table(["", "processes", *names.values()], rows)
    if is_brief:
        return [caption, "", *table]
    return [
        caption,
        "",
        *table,
        "",
        "Each saves every three steps of twelve; a `fit`, as epochs end. How each was set up:",
        "",
        *(
            f"- {systems[name]['label']}: {systems[name]['settings']}"
            for name in dict.fromkeys(row["system"] for row in found)
        ),
        "",
        " ".join([not_driven, *ended]),
    ]


def _cell(counts):
    if not counts:
        return NOTHING_TO_TEAR
    return ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS if verdict in counts)


if __name__ == "__main__":
    sys.exit(main())
