"""A process is killed before the calls that it makes about its backup; nothing is lost.

A sample of `python -m proof.deaths`, which kills at each call of each scene.
"""

import random

import pytest
from proof import tracing
from proof.deaths import WRITERS, Death, Theatre
from proof.nursery import Nursery

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("small_shards", "no_sync")]


@pytest.fixture(scope="module")
def may_trace():
    reason = tracing.reason_against()
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture
def theatre(may_trace, tmp_path):
    del may_trace
    with Nursery(tmp_path / "noise") as nursery:
        yield Theatre(nursery, tmp_path)


@pytest.mark.parametrize("writer", WRITERS)
def test_killed_before_any_call_of_its_second_save_a_process_loses_nothing(theatre, writer):
    calls = theatre.calls("second", writer)
    assert {name for name, _ in calls} >= {"mkdir", "openat", "write", "fsync", "rename"}
    assert ("rename", "COMMIT.tmp > COMMIT") in calls
    for (name, role), count in calls.items():
        death = Death("second", writer, (name, role, random.randrange(count)))
        print(death)  # noqa: T201  shown if the test fails
        watched = theatre.play(death)
        assert watched["killed"] or count > 1  # threads race for the last of several


def test_a_deletion_cut_short_leaves_the_newest_backup_or_none(theatre):
    calls = theatre.calls("delete kept", "auto")
    markers = [("unlink", "COMMIT"), ("unlink", "PREVIOUS")]
    assert set(calls) >= set(markers)
    for name, role in [*markers, *random.sample(list(calls), 4)]:
        death = Death("delete kept", "auto", (name, role, 0))
        assert theatre.play(death)["killed"]


def test_killed_while_it_restores_a_process_changes_nothing_of_the_backup(theatre):
    calls = theatre.calls("restore", "tensorstore")
    assert any(role == "COMMIT" for _, role in calls)
    for name, role in random.sample(list(calls), 5):
        assert theatre.play(Death("restore", "tensorstore", (name, role, 0)))["killed"]


def test_the_watch_sees_what_it_kills_at(may_trace, tmp_path):
    del may_trace
    order = {"kind": "scene", "scene": "first", "writer": "tensorstore"}
    aim = ("rename", "spare > STEP", 0)
    with Nursery(tmp_path / "noise") as nursery:
        whole = nursery.ask(**order, directory=str(tmp_path / "b"))
        watched = nursery.ask(**order, directory=str(tmp_path / "c"), aim=aim)
    assert watched["killed"]
    assert watched["calls"][-1] == list(aim[:2])
    assert len(watched["calls"]) == whole["calls"].index(list(aim[:2])) + 1
    assert (tmp_path / "c/spare").is_dir(), "the call was made"
    assert not (tmp_path / "c/1").exists()
