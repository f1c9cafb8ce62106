"""A public tester, not ours, kills a training at file operations and judges how it goes on."""

import collections
import dataclasses
import json

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


def test_the_table_has_what_the_tester_said_of_those_that_were_killed(tmp_path):
    found = chaos.Verdicts("loop_stepsave", 2)
    found.add(
        [
            {"mode": None, "verdict": "PASS", "killed": False, "elsewhere": False},
            {"mode": "before", "verdict": "PASS", "killed": True, "elsewhere": False},
            {"mode": "before", "verdict": "LOST_WORK", "killed": True, "elsewhere": True},
            {"mode": "term", "verdict": "PASS", "killed": True, "elsewhere": False},
            {"mode": "term", "verdict": "PASS", "killed": False, "elsewhere": True},
        ]
    )
    assert (found.row().cases, found.row().bad) == (4, 1)
    document = {
        "systems": {key: dataclasses.asdict(each) for key, each in chaos.SYSTEMS.items()},
        "versions": {"ckpt-chaos": "0.1.8"},
        "rounds": 1,
        "points": 2,
        "machine": {"kernel": "6.1", "file_system": "ext4"},
        "table": [found.as_json()],
    }
    (tmp_path / "chaos.json").write_text(json.dumps(document))
    table = chaos.chaos_table(tmp_path)
    row = "| stepsave, `Checkpointer` | 2 | 1 PASS, 1 LOST_WORK | not driven | 1 PASS |"
    assert row in table
    assert [line for line in table if "set up" in line or line.startswith("- ")][1:] == [
        "- stepsave, `Checkpointer`: `stepsave.Checkpointer(dir)`, `restore()`"
    ]
