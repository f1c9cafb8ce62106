"""`stepsave diff`: what differs, and by how much; by bits, and whatever the layout."""

import shutil

import ml_dtypes
import numpy as np
import pytest
from bucket_support import s3, s3_target
from cli_support import (
    GOLDEN,
    arrays_of_all_dtypes,
    ask,
    ask_json,
    position,
    refusal,
    run,
    save_two,
    spoil,
)
from engine_support import flip_bit, random_array, save_once
from hypothesis import given, settings
from hypothesis import strategies as st

from stepsave.cli import comparison, jobs
from stepsave.cli.differences import compare
from stepsave.format import planning
from stepsave.format.records import DTYPES

__all__ = ("s3", "s3_target")

pytestmark = pytest.mark.usefixtures("small_shards")


@pytest.fixture
def places(tmp_path):
    return tmp_path / "a", tmp_path / "b"


def found_of(a, b, dtype):
    views = (np.ascontiguousarray(one).reshape(-1).view(np.uint8) for one in (a, b))
    return compare(*views, dtype, DTYPES[dtype].itemsize)


def test_equal_backups_are_equal_to_the_last_bit(places):
    for place in places:
        save_once(place, arrays_of_all_dtypes(), 5, {"x": [1, {"y": None}]})
    assert ask_json("diff", *places)["are_equal"]
    assert ask("diff", *places).endswith("equal: 25 variables, bit by bit, and their metadata\n")


@pytest.mark.parametrize("dtype", DTYPES)
@given(seed=st.integers(0, 1000), changed=st.integers(0, 40))
def test_differing_elements_are_counted_by_bits(dtype, seed, changed):
    a = random_array((40,), dtype, seed)
    b = a.copy()
    b[:changed] = random_array((40,), dtype, seed + 1)[:changed]
    bits = [one.view(np.uint8).reshape(40, -1) for one in (a, b)]
    assert found_of(a, b, dtype).differing == (bits[0] != bits[1]).any(axis=1).sum()


@pytest.mark.parametrize(
    ("dtype", "a", "b", "expected"),
    [
        ("float32", [1, 2, np.nan], [1, 2.5, np.nan], (1, 0, 0, 0.5)),
        ("float32", [1, np.nan, np.inf], [np.nan, 1, -np.inf], (3, 0, 2, None)),
        ("float32", [0.0, 1], [-0.0, 1], (1, 1, 0, 0.0)),
        ("float64", [1e308], [-1e308], (1, 0, 0, float(np.finfo("f8").max))),
        ("int64", [-(2**63), 5], [2**63 - 1, 5], (1, 0, 0, 2**64 - 1)),
        ("uint64", [2**64 - 1], [2**64 - 3], (1, 0, 0, 2)),
        ("uint8", [250, 3], [3, 250], (2, 0, 0, 247)),
        ("bool", [True, False], [True, True], (1, 0, 0, 1)),
        ("complex64", [1 + 1j], [1 + 4j], (1, 0, 0, 3.0)),
        ("bfloat16", [1, 3], [1, 2], (1, 0, 0, 1.0)),
        ("int4", [-8, 1], [7, 1], (1, 0, 0, 15)),
        ("float8_e4m3fn", [1, 448], [1, 0], (1, 0, 0, 448.0)),
    ],
)
def test_by_how_much_is_exact(dtype, a, b, expected):
    found = found_of(np.array(a, DTYPES[dtype]), np.array(b, DTYPES[dtype]), dtype)
    assert (found.differing, found.same_value, found.nan_in_one, found.largest) == expected


def test_nan_of_other_bits_is_of_the_same_value():
    a = np.array([0x7FC0], np.uint16).view(ml_dtypes.bfloat16)
    b = np.array([0x7FC1], np.uint16).view(ml_dtypes.bfloat16)
    found = found_of(a, b, "bfloat16")
    assert (found.differing, found.same_value, found.largest) == (1, 1, None)


def test_it_names_what_differs_and_by_how_much(places):
    rows = np.zeros((130, 130), np.float32)  # of several chunks, in several shards
    states = [{"w": rows, "n": 3, "same": np.arange(20_000.0)} for _ in range(2)]
    states[1]["w"] = rows.copy()
    states[1]["w"][[5, 129], [7, 129]] = 0.25, -2
    states[1]["w"][60, 60] = np.nan
    for place, state, step in zip(places, states, (150, 161), strict=True):
        save_once(place, state, step, {"position": position(step), "seed": 7})
    document = ask_json("diff", *places, status=1)
    assert document["variables"] == [
        {"path": ["w"], "elements": 16900, "differing": 3, "max_abs_difference": 2.0,
         "nan_in_one": 1, "same_value": 0}
    ]  # fmt: skip
    assert (document["compared"], document["are_equal"]) == (3, False)
    assert [(one["path"], one["a"], one["b"]) for one in document["metadata"]] == [
        (["step"], 150, 161),
        (["metadata", "position", "global_step"], 150, 161),
        (["metadata", "position", "batch"], 50, 61),
    ]
    lines = ask("diff", *places, status=1).splitlines()
    assert lines[0] == f"A  {places[0]}, step 150, epoch 2, after batch 50 of 100"
    assert "1 of 3 variables differ" in lines
    assert any(line.split() == ["w", "3", "16,900", "2", "1"] for line in lines)
    assert any(line.split() == ["position/batch", "50", "61"] for line in lines)


def test_missing_ones_and_other_forms_are_named(places):
    save_once(places[0], {"a": np.zeros(3), "gone": np.zeros(2), "n": np.zeros((2, 2))})
    save_once(places[1], {"a": np.zeros(3, "f4"), "new": [np.zeros(2)], "n": np.zeros((4,))})
    document = ask_json("diff", *places, status=1)
    assert (document["only_in_a"], document["only_in_b"]) == ([["gone"]], [["new", "0"]])
    assert document["forms"] == [
        {"path": ["a"], "a": {"shape": [3], "dtype": "float64"},
         "b": {"shape": [3], "dtype": "float32"}},
        {"path": ["n"], "a": {"shape": [2, 2], "dtype": "float64"},
         "b": {"shape": [4], "dtype": "float64"}},
    ]  # fmt: skip
    text = ask("diff", *places, status=1)
    assert "only in B\n  new/0\n" in text
    assert "float64 (2, 2)  float64 (4,)" in text


def test_metadata_alone_makes_a_difference(places):
    for number, place in enumerate(places):
        save_once(place, {"a": np.arange(3)}, 1, {"seed": number, "l": [1, 2], "m": None})
    (difference,) = ask_json("diff", *places, status=1)["metadata"]
    assert difference == {"path": ["metadata", "seed"], "a": 0, "b": 1}


def test_the_two_backups_of_one_directory_are_compared(tmp_path):
    save_two(tmp_path, [{"a": np.zeros(4)}, {"a": np.ones(4)}])
    alone = ask_json("diff", tmp_path, status=1)
    assert (alone["a"]["step"], alone["b"]["step"]) == (150, 160)
    named = ask_json("diff", f"{tmp_path}@150", f"{tmp_path}@160", status=1)
    assert named == alone
    assert ask_json("diff", f"{tmp_path}@150", f"{tmp_path}@150")["are_equal"]
    told = refusal("diff", f"{tmp_path}@151", tmp_path)
    assert f"{tmp_path}: expected a backup of step 151, found step 160, step 150." in told
    assert "`stepsave inspect`" in told


def test_a_directory_with_such_a_name_is_taken_by_it(tmp_path):
    save_two(tmp_path / "run@3", [{"a": np.zeros(4)}, {"a": np.ones(4)}])
    assert ask_json("diff", tmp_path / "run@3", status=1)["b"]["step"] == 160


def test_what_cannot_be_compared_is_refused(tmp_path):
    save_once(tmp_path / "one", {"a": np.zeros(4)})
    told = refusal("diff", tmp_path / "one")
    assert "expected two backups to compare, found step 1 alone" in told
    (tmp_path / "empty").mkdir()
    assert "expected a backup" in refusal("diff", tmp_path / "one", tmp_path / "empty")
    assert "No such file" in refusal("diff", tmp_path / "one", tmp_path / "typo")


def test_of_a_spoilt_marker_no_backup_is_compared_and_those_of_the_other_are(tmp_path):
    save_two(tmp_path / "two", [{"a": np.zeros(4)}, {"a": np.ones(4)}])
    save_once(tmp_path / "one", {"a": np.ones(4)}, 160, {"position": position(160)})
    flip_bit(tmp_path / "two/PREVIOUS", 60)
    for arguments in ([tmp_path / "two"], [f"{tmp_path}/two@150", tmp_path / "one"]):
        ended = run("diff", *arguments, status=1)
        assert (ended.returncode, ended.stdout) == (1, "")
        assert f"{tmp_path}/two/PREVIOUS: expected CRC-32C" in ended.stderr
    assert ask_json("diff", tmp_path / "two", tmp_path / "one")["are_equal"]


@pytest.mark.parametrize("what", ["a flipped bit", "another save", "in what only one has"])
def test_damage_is_not_taken_for_a_difference(places, what):
    state = {"a": np.arange(9000.0), "b": np.arange(9000.0)}
    save_two(places[0], [state | {"more": np.zeros(9)}, state | {"more": np.ones(9)}])
    save_once(places[1], state, 160)
    if what == "a flipped bit":
        spoil(places[0], 160, "b")
    elif what == "another save":
        for path in (places[0] / "150").glob("pytree/d/c/*"):
            shutil.copy(path, places[0] / "160" / path.relative_to(places[0] / "150"))
    else:
        spoil(places[0], 160, "more")
    ended = run("diff", *places, status=1)
    assert ended.stdout == ""
    assert str(places[0] / "160") in ended.stderr
    assert "`stepsave verify` looks for more" in ended.stderr


def test_the_layout_makes_no_difference(places):
    """A backup of two processes in blocks, and one of the same state in runs."""
    shutil.copytree(GOLDEN / "v1", places[0])
    shutil.copytree(GOLDEN / "v1-processes", places[1])
    document = ask_json("diff", *places)
    assert document["are_equal"]
    assert document["compared"] == 28


@settings(max_examples=40)
@given(data=st.data())
def test_arrays_that_are_cut_otherwise_are_compared_element_by_element(data):
    import tempfile

    shape = tuple(data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=3)))
    a = random_array(shape, "float32", 1)
    b = a.copy()
    at = tuple(data.draw(st.integers(0, size - 1)) for size in shape)
    b.view(np.uint32)[at] ^= 1
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        for name, array, limit in (("a", a, 512), ("b", b, data.draw(st.integers(64, 4096)))):
            patch.setattr(planning, "CHUNK_LIMIT_BYTES", limit)
            patch.setattr(planning, "_SMALLEST_LIMIT_BYTES", 64)
            save_once(f"{directory}/{name}", {"w": array})
        sides = f"{directory}/a", f"{directory}/b"
        document = jobs.do(lambda job, crew: comparison._compare_targets(*sides, job, crew), 3)
    (found,) = document["variables"]
    assert (found["differing"], found["elements"]) == (1, a.size)


@pytest.mark.xdist_group("buckets")
def test_a_bucket_is_compared_with_a_directory(s3, tmp_path):
    states = [arrays_of_all_dtypes(), arrays_of_all_dtypes(seed=1)]
    save_two(s3.place, states)
    save_two(tmp_path, states)
    assert ask_json("diff", s3.place, tmp_path)["are_equal"]
    changed = ask_json("diff", f"{s3.place}@150", tmp_path, status=1)["variables"]
    assert {one["path"][0] for one in changed} <= set(states[0])
    assert len(changed) == 25
