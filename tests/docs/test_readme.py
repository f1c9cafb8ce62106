"""Nothing in the README that was not run."""

import os
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
from bucket_support import put, s3, s3_environment, s3_target
from document_support import ROOT, blocks
from peers_support import Processes

import stepsave

__all__ = ("s3", "s3_target")

README = (ROOT / "README.md").read_text()
FIT, PREEMPTION, LOOP, IN_BUCKET, TIERS, SEVERAL = blocks("../README.md", "python")
PREEMPTION = FIT + PREEMPTION  # it goes on with that model
IN_BUCKET, TIERS = FIT + IN_BUCKET, FIT + TIERS


def test_the_readme_has_an_example_for_fit_and_one_for_a_loop():
    assert ".fit(" in FIT
    assert "save_before_preemption" in PREEMPTION
    assert "Checkpointer(" in LOOP
    assert "s3://" in IN_BUCKET
    assert len(COMMANDS) == 7


@pytest.mark.xdist_group("buckets")
@pytest.mark.parametrize(("example", "prefix"), [(IN_BUCKET, "run-7"), (TIERS, "run-8")])
def test_an_example_of_a_bucket_runs_as_written_and_saves_there(s3, example, prefix, tmp_path):
    put(f"{s3.url}/my-bucket", b"")
    done = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-c", example],
        cwd=tmp_path,
        env={**os.environ, **s3_environment(s3.url)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "SaveFailedWarning" not in done.stderr
    marker = ("PUT", f"/my-bucket/{prefix}/COMMIT")
    assert s3.requests.count(marker) >= 2  # claimed, and committed


COMMANDS = re.findall(r"^\$ stepsave (.*?) +#", README, re.MULTILINE)


@pytest.mark.xdist_group("buckets")
@pytest.mark.parametrize(
    "command",
    [pytest.param(one, marks=[pytest.mark.slow] * one.startswith("bench")) for one in COMMANDS],
)
def test_a_command_of_the_readme_runs_as_written(s3, command, tmp_path):
    put(f"{s3.url}/my-bucket", b"")
    for name, step in (("my_backup", 5), ("other_backup", 6)):
        with stepsave.Checkpointer(tmp_path / name) as saver:
            saver.save(step, {"weights": np.full(1000, step, np.float32)}).wait()
    done = subprocess.run(
        [sys.executable, "-m", "stepsave.cli", *shlex.split(command)],
        cwd=tmp_path,
        env={**os.environ, **s3_environment(s3.url)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == command.startswith("diff"), done.stderr  # they do differ
    assert done.stdout
    if command.startswith("cp"):
        with pytest.MonkeyPatch.context() as patch:
            for name, value in s3_environment(s3.url).items():
                patch.setenv(name, value)
            assert (stepsave.restore(command.split()[-1]).state["weights"] == 5).all()


def test_the_example_of_several_machines_runs_as_written_in_two_processes(tmp_path):
    def environment(rank, count, port):
        return {
            "KERAS_BACKEND": "jax",
            "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
            "KERAS_DISTRIBUTION_JOB_ADDRESSES": f"127.0.0.1:{port}",
            "KERAS_DISTRIBUTION_NUM_PROCESSES": str(count),
            "KERAS_DISTRIBUTION_PROCESS_ID": str(rank),
        }

    told = "\nprint(backup.stats().committed, [w.sum() for w in model.get_weights()])\n"
    code = f"import os\nos.chdir({str(tmp_path)!r})\n{SEVERAL}{told}"
    with Processes(code, environment=environment) as processes:
        first, second = (lines[-1].partition(" ") for lines in processes.results())
    assert (first[0], second[0]) == ("32", "32")  # its part of every fifth of 160 steps
    assert first[2] == second[2]


@pytest.mark.parametrize("example", [FIT, PREEMPTION, LOOP], ids=["fit", "preemption", "loop"])
def test_an_example_of_the_readme_runs_as_written_and_again_after_it(example, tmp_path):
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-W", "error::ResourceWarning", "-c", example],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr


def test_the_loop_of_the_readme_goes_on_where_it_was(tmp_path):
    code = LOOP + "\nprint(step, weights[0])\n"
    killed = code.replace("weights += 1.0", "weights += 1.0\n        if step == 52: break")
    for source, expected in ((killed, "52 53.0"), (code, "99 100.0")):
        done = subprocess.run(
            [sys.executable, "-c", source], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        last = done.stdout.split("\n")[0]
        # Saved at step 50; the two steps after it are trained again.
        assert last == expected


def test_links_of_the_readme_and_docs_lead_somewhere():
    for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        for link in re.findall(r"\]\(([^)#]+)\)", prose):
            if not link.startswith("http"):
                assert (page.parent / link).exists(), f"{page.name}: {link}"
