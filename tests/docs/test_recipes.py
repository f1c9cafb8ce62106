"""The recipes run as they are written; a training that is killed ends as one that is not."""

import signal
import time

import numpy as np
import pytest
from document_support import ROOT, Script, blocks

import stepsave

STEPS, EPOCH, SAVED_EVERY = 80, 20, 5
QUICK = ("torch", "flax-nnx")
RECIPES = (*QUICK, "equinox", "lightning", "transformers")
PREEMPTED = [name for name in RECIPES if name != "equinox"]  # whose page refers to another one


def write(name, folder):
    """Writes the script of a recipe into a folder of its own."""
    (code,) = blocks(f"recipes/{name}.md", "python")
    folder.mkdir()
    path = folder / "train.py"
    path.write_text(code)
    return path


def run(path):
    return finish(Script.python(path))


def finish(script):
    assert script.end() == 0, script.told()
    return script.lines


def losses(lines):
    """By step, what was printed of it."""
    return dict(line.split(": loss ") for line in lines if line.startswith("step "))


def bits_of(folder):
    backup = stepsave.restore(folder / "backup")
    leaves = {}

    def visit(node, path):
        if isinstance(node, dict | list | tuple):
            items = node.items() if isinstance(node, dict) else enumerate(node)
            for key, child in items:
                visit(child, (*path, key))
        else:
            array = np.asarray(node)
            leaves[path] = (array.dtype, array.shape, array.tobytes())

    visit(backup.state, ())
    for unused in ("python", "numpy"):  # generators that no script seeds, or draws from
        backup.metadata.get("rng", {}).pop(unused, None)
    trainer = backup.metadata.get("trainer", {})
    if trainer:  # it keeps to itself what losses and floating point operations add up to
        del trainer["total_flos"]
        trainer["log_history"] = [entry["step"] for entry in trainer["log_history"]]
    return backup.step, leaves, backup.metadata


def steps_of(lines):
    return [int(step.removeprefix("step ")) for step in losses(lines)]


def wait_for_backup(folder, step):
    for _ in range(1200):
        if (folder / "backup" / "COMMIT").exists():
            backup = stepsave.restore(folder / "backup")
            if backup is not None and backup.step >= step:
                return
        time.sleep(0.05)
    raise AssertionError(f"step {step} was not saved in {folder}")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in RECIPES],
)
def test_a_training_that_is_killed_and_told_to_end_ends_as_one_that_is_not(name, tmp_path):
    stopped = write(name, tmp_path / "stopped")
    whole = Script.python(write(name, tmp_path / "whole"))

    killed = Script.python(stopped)
    killed.read_to(f"step {EPOCH + 2}:")
    wait_for_backup(stopped.parent, EPOCH)  # it stands still, but for the threads that save
    killed.kill()
    told = Script.python(stopped)
    told.read_to("step 47:")
    if name in PREEMPTED:
        told.send(signal.SIGTERM)
        assert told.end() == stepsave.Preempted.EXIT_CODE, told.told()
        assert stepsave.restore(stopped.parent / "backup").step == steps_of(told.lines)[-1]
    else:
        told.kill()
    last = run(stopped)

    begun = [steps_of(lines)[0] for lines in (killed.lines, told.lines, last)]
    assert begun[:2] == [1, EPOCH + 1]
    if name in PREEMPTED:
        assert begun[2] == steps_of(told.lines)[-1] + 1
    else:
        assert begun[2] in range(EPOCH + 1, 52, SAVED_EVERY)
    expected = losses(finish(whole))
    assert len(expected) == STEPS
    for lines in (killed.lines, told.lines, last):
        assert losses(lines).items() <= expected.items()
    assert bits_of(stopped.parent) == bits_of(tmp_path / "whole")
    assert steps_of(run(stopped)) == []  # nothing is left to do
    assert bits_of(stopped.parent) == bits_of(tmp_path / "whole")


def test_each_recipe_is_tested_and_listed():
    pages = {page.stem for page in (ROOT / "docs/recipes").glob("*.md")} - {"README"}
    assert pages == set(RECIPES)
    listed = (ROOT / "docs/recipes/README.md").read_text()
    assert all(f"({name}.md)" in listed for name in RECIPES)
