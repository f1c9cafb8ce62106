"""Each file in `tests/hostile` is refused by name, before anything large is allocated."""

import json
import os

import ml_dtypes
import numpy as np
import pytest
from engine_support import (
    assert_same_bits,
    check_python,
    random_array,
    replace_proved,
    save_once,
    tree_bytes,
)
from proof import decoding, fuzz, hostile
from proof.record import ROOT

import stepsave
from stepsave.store.places import open_store

INDEX = json.loads((hostile.DIRECTORY / "index.json").read_text())
FILES = {"layout": "layout.json", "training": "training.json", "time": "_CHECKPOINT_METADATA"}
STATE = {
    "a": random_array((40, 20), "float32"),
    "b": [random_array((7,), "int8"), np.array(2.5)],
    "empty": np.zeros((0, 3), ml_dtypes.bfloat16),
    "none": None,
}


@pytest.fixture(scope="module")
def backup(tmp_path_factory):
    """A directory with a backup whose files are put back after each test."""
    path = tmp_path_factory.mktemp("hostile")
    save_once(path, STATE, step=5, metadata={"epoch": 1})
    return path


def of_kinds(*kinds):
    return [path for path in INDEX if path.partition("/")[0] in kinds]


def test_the_files_are_those_that_their_generator_makes(tmp_path):
    hostile.write(tmp_path)
    found = {path: data for path, data in tree_bytes(hostile.DIRECTORY).items() if data}
    committed = {path: data for path, data in found.items() if not path.startswith("found/")}
    assert {path: data for path, data in tree_bytes(tmp_path).items() if data} == committed


@pytest.mark.parametrize("kind", hostile.good())
def test_what_hostile_files_are_made_of_is_accepted(kind):
    """Or they would be refused for another reason than that in their names."""
    data = hostile.of_kind(kind, hostile.dump(hostile.good()[kind]))
    assert decoding.fault_of(kind, data) == ""
    decoding.DECODERS[kind](data)


@pytest.mark.parametrize("path", INDEX)
def test_a_hostile_file_is_refused_by_its_decoder(path):
    kind, data = path.partition("/")[0], (hostile.DIRECTORY / path).read_bytes()
    with pytest.raises(stepsave.CorruptBackupError) as caught:
        decoding.DECODERS[kind](data)
    assert type(caught.value).__name__ == INDEX[path]
    assert decoding.SOURCE in str(caught.value) or kind == "values"
    assert len(str(caught.value)) < 12_000


def test_what_the_fuzzer_has_found_is_mended():
    found = fuzz.FOUND.iterdir() if fuzz.FOUND.is_dir() else ()
    for path in found:
        assert decoding.fault_of(path.name.partition("-")[0], path.read_bytes()) == "", path.name


def put(backup, path):
    """Puts a hostile file into a backup whose marker vouches for it; says where."""
    kind, data = path.partition("/")[0], (hostile.DIRECTORY / path).read_bytes()
    if kind == "marker":
        (backup / "COMMIT").write_bytes(data)
        return "COMMIT"
    replace_proved(backup, FILES[kind], data)
    return f"5/{FILES[kind]}"


@pytest.mark.parametrize("path", of_kinds("marker", "layout", "training"))
def test_a_backup_with_a_hostile_file_is_refused_by_name(backup, path):
    before = tree_bytes(backup)
    blamed = put(backup, path)
    spoiled = tree_bytes(backup)
    for step in (None, 5):
        with pytest.raises(stepsave.CorruptBackupError) as caught:
            stepsave.restore(backup, step=step)
        assert str(backup / blamed) in str(caught.value)
    assert tree_bytes(backup) == spoiled
    for changed in (name for name in before if before[name] != spoiled[name]):
        (backup / changed).write_bytes(before[changed])
    assert_same_bits(stepsave.restore(backup).state, STATE)


@pytest.mark.parametrize("path", of_kinds("claim"))
def test_a_bucket_with_a_hostile_marker_is_refused_by_name(path):
    place = f"memory://hostile/{path.replace(' ', '-')}"
    store = open_store(place)
    store.write_all({"COMMIT": (hostile.DIRECTORY / path).read_bytes()})
    with pytest.raises(stepsave.CorruptBackupError) as caught:
        stepsave.restore(place)
    assert store.path("COMMIT") in str(caught.value)
    assert store.list("") == ["COMMIT"]


BOUNDED = """
import os, resource, sys
from pathlib import Path
import pytest
from proof import decoding, fuzz, hostile
import stepsave, test_hostile_files as tests

backup = Path(sys.argv[1])
stepsave.restore(backup)  # all that is imported on first use
fuzz.bound_memory(256 << 20)  # threads have stacks too
for path in sys.argv[2:]:
    before = {name: (backup / name).read_bytes() for name in ("COMMIT", *
              (f"5/{file}" for file in tests.FILES.values()))}
    blamed = tests.put(backup, path)
    try:
        stepsave.restore(backup)
    except stepsave.CorruptBackupError as e:
        assert not isinstance(e.__cause__, MemoryError), (path, e)
        assert str(backup / blamed) in str(e), (path, e)
    else:
        raise AssertionError(path)
    for name, data in before.items():
        (backup / name).write_bytes(data)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(peak)
"""


def test_what_a_hostile_file_claims_is_not_allocated(tmp_path):
    save_once(tmp_path, STATE, step=5, metadata={"epoch": 1})
    claims = ("huge", "large", "many", "deep", "far", "beyond", "overflow", "long")
    paths = [p for p in of_kinds("marker", "layout", "training") if any(c in p for c in claims)]
    assert len(paths) > 20
    script = f"import sys; sys.path[:0] = {[os.path.dirname(__file__), str(ROOT)]!r}\n{BOUNDED}"
    assert int(check_python(script, tmp_path, *paths)) > 0


def test_files_full_of_holes_are_not_read(tmp_path):
    """A file is as long as it likes to be, and costs who made it nothing."""
    save_once(tmp_path, STATE, step=5)
    for path in ("COMMIT", "5/layout.json", "5/pytree/d/c/0"):
        data = (tmp_path / path).read_bytes()
        with open(tmp_path / path, "r+b") as file:
            file.truncate(1 << 42)
        with pytest.raises(stepsave.CorruptBackupError, match=str(tmp_path / path)):
            stepsave.restore(tmp_path)
        (tmp_path / path).write_bytes(data)
    assert_same_bits(stepsave.restore(tmp_path).state, STATE)


def test_a_little_fuzzing_finds_nothing(tmp_path):
    """In small what `python -m proof.fuzz` does for as long as it is asked to."""
    arguments = ["--engine", "chance", "--executions", "3000", "--seconds", "60"]
    arguments += ["--found", str(tmp_path / "found"), "--results", str(tmp_path)]
    status = fuzz.main(arguments)
    document = json.loads((tmp_path / "fuzz.json").read_text())
    assert status == 0, document
    assert document["rows"][0]["cases"] >= 256


def test_a_fault_of_a_decoder_is_found_and_kept(tmp_path, monkeypatch):
    findings = fuzz.Findings(tmp_path)
    with monkeypatch.context() as patch:
        patch.setitem(decoding.DECODERS, "layout", lambda _: {}["missing"])
        for data in (b"1", b"2"):
            findings.check("layout", data)
    (name,) = findings.known.values()
    assert (tmp_path / name).read_bytes() == b"1"
    assert [fault for _, fault in findings.known] == ["KeyError in <lambda>"]
