"""What the small files of a backup say, if the marker vouches for them and they are wrong."""

import numpy as np
import pytest
from engine_support import change_json, read_marker, save_once, write_marker

from stepsave.engine.examining import READ_THREADS, examine
from stepsave.engine.markers import Markers
from stepsave.store.local import LocalStore
from stepsave.threads import Crew


@pytest.fixture
def backup(tmp_path):
    save_once(tmp_path, {"a": [np.arange(3), np.arange(4)]}, metadata={"epoch": 2})
    return tmp_path


def examined(directory):
    store = LocalStore(directory)
    markers = Markers(store)
    markers.read_markers()
    crew = Crew(READ_THREADS, "reader")
    try:
        return examine(store, markers.committed, crew)
    finally:
        crew.end()


def damage_of(directory):
    """The file that is damaged, and what is said of it."""
    (damage,) = examined(directory).damages
    return damage.path, damage.text


def test_a_whole_one_is_not_damaged(backup):
    found = examined(backup)
    assert found.damages == ()
    assert found.metadata == {"epoch": 2}
    assert [leaf.path for leaf in found.plan.leaves] == [("a", "0"), ("a", "1")]


def test_a_layout_of_other_shards_than_the_marker_names_is_damage(backup):
    marker = read_marker(backup)
    (digest,), size_bytes = marker["shard_digests"], marker["shard_bytes"]
    write_marker(backup, {**marker, "shard_digests": [digest, digest]})
    said = f"expected 2 shards of {size_bytes} bytes, as the marker says; found 1 of {size_bytes}."
    assert damage_of(backup) == ("1/layout.json", said)
    assert examined(backup).plan is None


@pytest.mark.parametrize("path", ["layout.json", "training.json", "_CHECKPOINT_METADATA"])
def test_a_file_that_the_marker_does_not_name_is_damage(backup, path):
    marker = read_marker(backup)
    files = [file for file in marker["files"] if file[0] != path]
    write_marker(backup, {**marker, "files": files})
    assert damage_of(backup) == (f"1/{path}", "expected it to be in the marker, where it is not.")


@pytest.mark.parametrize(
    ("path", "change", "said"),
    [
        ("training.json", lambda d: d.pop("metadata"), "expected metadata, and a structure"),
        ("training.json", lambda d: d["structure"].pop("notes"), "expected metadata, and a struct"),
        ("_CHECKPOINT_METADATA", lambda d: d.clear(), "expected a time, found no `commit_time"),
    ],
)
def test_what_says_something_else_than_it_should_is_damage(backup, path, change, said):
    change_json(backup, path, lambda document: change(document) and None)
    where, text = damage_of(backup)
    assert where == f"1/{path}"
    assert text.startswith(said)
