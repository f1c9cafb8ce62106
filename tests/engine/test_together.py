"""Processes, forks, threads and interrupts, in small; `proof.together` does it at length."""

import os

import pytest
from engine_support import assert_is_state_of, check_python, restore_once, state_of, tree_bytes
from proof import racing, together

import stepsave

PATIENCE_S = 60


def test_of_processes_that_open_a_directory_at_once_one_gets_it(tmp_path):
    found = together.races(tmp_path, 4, 1)
    assert found == {"counts": dict.fromkeys(racing.ENDINGS, 1), "bad": {}}


def test_a_training_that_forks_while_it_saves_goes_on(tmp_path):
    assert together.forks(tmp_path / "backup", 5, 2) > 0
    assert sorted(os.listdir(tmp_path)) == ["backup"]


def test_threads_that_use_a_checkpointer_at_once_take_turns(tmp_path):
    assert together.threads_at_once(tmp_path, 10, 3) > 0


@pytest.mark.parametrize("use", ["wait", "close"])
def test_a_use_is_interrupted_twice_anywhere_and_nothing_is_lost(tmp_path, use, no_sync):
    del no_sync
    assert together.interrupts(tmp_path, use, again=3) > 10


@pytest.mark.parametrize("use", ["wait"])
def test_a_handler_may_raise_what_it_likes(tmp_path, use, no_sync):
    del no_sync
    assert together.interrupts(tmp_path, use, error=together.HandlerError) > 10


OTHER = """
import sys
from engine_support import save_once, state_of
for step in (6, 7):  # so that there is a spare directory
    save_once(sys.argv[1], state_of(step), step)
"""

SPOILT = {
    "lock removed": lambda path: (path / "LOCK").unlink(),
    "directory moved": lambda path: path.rename(path.with_name("elsewhere")),
}


USES = {
    "save": lambda saver: saver.save(2, state_of(2)).wait(PATIENCE_S),
    "end": lambda saver: saver.close(ended=True),
    "delete": lambda saver: saver.close(delete_backup=True),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("how", SPOILT)
def test_one_whose_lock_is_gone_changes_nothing_more(tmp_path, how, use):
    """Somebody else may have come in, and have saved what is newer."""
    directory = tmp_path / "backup"
    saver = stepsave.Checkpointer(directory)
    saver.save(1, state_of(1)).wait(PATIENCE_S)
    SPOILT[how](directory)
    check_python(OTHER, directory)
    before = tree_bytes(directory)
    expected = stepsave.SaveFailedError if use == "save" else stepsave.DirectoryBusyError
    with pytest.raises(expected, match="was removed or replaced"):
        USES[use](saver)
    saver.close()
    assert saver.closed
    assert tree_bytes(directory) == before
    backup = restore_once(directory)
    assert backup.step == 7
    assert_is_state_of(backup)
