"""A public tester, not ours, kills a training at file operations and judges how it goes on."""

import collections

import pytest
from proof import chaos

pytestmark = [pytest.mark.once, pytest.mark.timeout(600)]

POINTS = 12


def test_the_public_tester_passes_what_comes_back_from_each_kill(tmp_path):
    judged = chaos.drive("loop_stepsave", tmp_path / "work", seed=7, points=POINTS, jobs=2)
    assert [(one["at"], one["verdict"]) for one in judged if one["verdict"] != "PASS"] == []
    # Of our files it knows none that it could tear: they are not written by Python's `open`.
    modes = collections.Counter(one["mode"] for one in judged)
    assert modes == {None: 1, "before": POINTS, "term": POINTS}
    kills = [one for one in judged if one["mode"] is not None]
    assert all(one["killed"] for one in kills)
    assert any(one["resumed_from"] for one in kills), "none was killed after a backup"
    assert any(one["acknowledged"] for one in kills), "the tester saw no acknowledged backup"


def test_the_public_tester_finds_out_who_overwrites_his_only_backup(tmp_path):
    judged = chaos.drive(
        "loop_overwriting", tmp_path / "work", seed=7, points=4, jobs=2, modes=("torn",)
    )
    torn = [one for one in judged if one["mode"] == "torn"]
    assert len(torn) == 4
    assert {one["verdict"] for one in torn} == {"HARD_FAIL"}
    assert [one["verdict"] for one in judged if one["mode"] is None] == ["PASS"]
