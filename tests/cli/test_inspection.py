"""`stepsave inspect`: what is there, as text and as JSON."""

import datetime as dt
import json
import os
import signal
import subprocess
import sys
import time

import golden_state
import numpy as np
import pytest
from bucket_support import s3, s3_target
from cli_support import (
    GOLDEN,
    arrays_of_all_dtypes,
    ask,
    ask_json,
    check_imports,
    plan_of,
    position,
    refusal,
    save_two,
    spoil,
)
from engine_support import check_python, flip_bit, in_own_mounts, save_once, state_of, tree_bytes

import stepsave
from stepsave.cli import inspection
from stepsave.format.records import DTYPES

__all__ = ("s3", "s3_target")


@pytest.fixture
def backup(tmp_path):
    facts = {"backend": "jax", "keras_version": "3.99.0", "note": "x"}
    save_two(tmp_path / "backup", [state_of(150), state_of(160)], **facts)
    return tmp_path / "backup"


def test_it_says_which_backups_there_are_and_what_is_in_them(backup):
    document = ask_json("inspect", backup)
    newest, previous = document["backups"]
    assert (document["format"], document["place"]) == (1, str(backup))
    assert not document["is_damaged"]
    assert (newest["step"], previous["step"]) == (160, 150)
    assert (newest["is_newest"], previous["is_newest"]) == (True, False)
    assert newest["position"] == position(160)
    assert (newest["backend"], newest["keras_version"]) == ("jax", "3.99.0")
    assert newest["metadata"]["note"] == "x"
    files = [path for path in (backup / "160").rglob("*") if path.is_file()]
    assert newest["bytes"] == sum(path.stat().st_size for path in files)
    saved_at = dt.datetime.fromisoformat(newest["saved_at"])
    assert 0 <= newest["age_s"] < 600
    assert abs(saved_at.timestamp() + newest["age_s"] - time.time()) < 60
    state = state_of(160)
    assert [one["path"] for one in newest["variables"]] == [
        *(["weights", name] for name in state["weights"]),
        ["optimizer", "step"], ["optimizer", "slow"], ["frozen"], ["rows"],
    ]  # fmt: skip
    assert newest["variables"][0] | {"path": None} == {
        "path": None, "shape": [40, 50], "dtype": "float32", "bytes": 8000,
    }  # fmt: skip
    assert newest["state_bytes"] == sum(one["bytes"] for one in newest["variables"])


def test_for_people_it_is_aligned_and_has_units(backup):
    text = ask("inspect", backup)
    assert "\x1b" not in text, "no colors in a pipe"
    lines = text.splitlines()
    assert lines[0] == str(backup)
    assert "step 160" in lines
    assert "step 150, kept" in lines
    assert "  position    epoch 2, after batch 60 of 100" in lines
    assert "  made by     Keras 3.99.0 on jax" in lines
    assert "  metadata    note" in lines
    table = lines[lines.index("also there") + 3 :]
    assert table[0].split() == ["variable", "shape", "dtype", "size"]
    assert len({len(line) for line in table}) == 1
    assert table[1].split(maxsplit=1) == ["weights/w0", "(40, 50)  float32  8.00 kB"]


@pytest.mark.parametrize("version", [path.name for path in GOLDEN.iterdir()])
def test_backups_of_all_formats_are_inspected_with_all_their_dtypes(version):
    before = tree_bytes(GOLDEN / version)
    document = ask_json("inspect", GOLDEN / version, "--stats")
    newest, *kept = document["backups"]
    assert [one["step"] for one in kept] == ([1000, 800, 600] if version == "v1-kept" else [])
    assert newest["step"] == golden_state.STEP
    assert newest["metadata"] == golden_state.METADATA
    variables = {tuple(one["path"]): one for one in newest["variables"]}
    assert {one["dtype"] for one in variables.values()} == set(DTYPES)
    for name in DTYPES:
        found = variables["dtypes", name]["statistics"]
        zero = 1 if name == "float8_e8m0fnu" else 0  # which has no zero
        mean = [0.5, 0] if name.startswith("complex") else (1 if zero else 0.5)
        assert found == {
            "min": zero, "max": 1, "mean": mean, "nan": 6 if zero else 0, "infinite": 0,
        }  # fmt: skip
    counting = variables["nested", "a/b", "ü"]["statistics"]
    assert counting["mean"] == pytest.approx(999 / 14)
    assert variables["nested", "empty"]["statistics"]["min"] is None
    assert tree_bytes(GOLDEN / version) == before


def test_statistics_are_those_of_the_newest_and_json_has_no_nan(tmp_path):
    state = {"a": np.array([1.0, np.nan, -np.inf, 3.0]), "nothing": np.full(3, np.nan, "f4")}
    save_two(tmp_path, [{"a": np.zeros(4), "nothing": state["nothing"]}, state])
    newest, previous = ask_json("inspect", tmp_path, "--stats")["backups"]
    assert newest["variables"][0]["statistics"] == {
        "min": 1.0, "max": 3.0, "mean": 2.0, "nan": 1, "infinite": 1,
    }  # fmt: skip
    assert newest["variables"][1]["statistics"]["mean"] is None
    assert "statistics" not in previous["variables"][0]
    lines = ask("inspect", tmp_path, "--stats").splitlines()
    assert lines[-3].split()[-5:] == ["min", "max", "mean", "NaN", "inf"]
    assert lines[-2].split()[-5:] == ["1", "3", "2", "1", "1"]
    assert lines[-1].split()[-5:] == ["-", "-", "-", "3", "0"]


def test_without_statistics_no_shard_is_opened(backup):
    script = """
import builtins, os, sys
real = os.open
def watch(path, *arguments, **options):
    assert "/d/c/" not in str(path), path
    return real(path, *arguments, **options)
os.open = watch
from stepsave.cli import inspection
assert inspection.run(sys.argv[1], as_json=False, with_statistics=False) == 0
"""
    check_python(script, backup)


def test_a_damaged_backup_is_shown_as_far_as_it_can_be(backup):
    flip_bit(backup / "160" / "training.json", 20)
    os.truncate(backup / "160" / "pytree" / "d" / "c" / "0", 100)
    document = ask_json("inspect", backup, status=1)
    newest, previous = document["backups"]
    assert document["is_damaged"]
    paths = [damage["path"] for damage in newest["damages"]]
    assert paths == ["160/training.json", "160/pytree/d/c/0"]
    assert newest["position"] is None
    assert len(newest["variables"]) == 16
    assert len(newest["damages"][1]["variables"]) == 16
    assert previous["damages"] == []
    text = ask("inspect", backup, status=1)
    assert "  damaged     160/training.json: expected CRC-32C" in text
    assert "rows" in text


def test_of_a_backup_without_layout_the_variables_of_the_other_are_shown(backup):
    flip_bit(backup / "160" / "layout.json", 20)
    newest, previous = ask_json("inspect", backup, "--stats", status=1)["backups"]
    assert newest["variables"] is None
    assert newest["position"] == position(160)
    assert len(previous["variables"]) == 16
    assert "rows" in ask("inspect", backup, status=1)


def test_flipped_bits_are_found_by_statistics_alone(backup):
    spoil(backup, 160, "rows", "frozen")
    assert not ask_json("inspect", backup)["is_damaged"]
    damages = ask_json("inspect", backup, "--stats", status=1)["backups"][0]["damages"]
    assert sorted(variable for one in damages for variable in one["variables"]) == [
        ["frozen"], ["rows"]
    ]  # fmt: skip


def test_a_truncated_shard_is_told_once_with_statistics(backup):
    shard = backup / "160" / "pytree" / "d" / "c" / "0"
    os.truncate(shard, shard.stat().st_size - 1)
    (damage,) = ask_json("inspect", backup, "--stats", status=1)["backups"][0]["damages"]
    assert damage["path"] == "160/pytree/d/c/0"


def test_a_spoilt_marker_is_named(backup):
    flip_bit(backup / "COMMIT", 50)
    document = ask_json("inspect", backup, status=1)
    assert [backup["step"] for backup in document["backups"]] == [150]
    (damage,) = document["damages"]
    assert damage["path"] == "COMMIT"
    kinds = {one["name"]: one["kind"] for one in document["others"]}
    assert kinds == {"160": "debris", "COMMIT": "marker", "LOCK": "lock"}


def test_it_says_what_else_lies_there_and_why(backup):
    (backup / "spare").mkdir()
    (backup / "spare" / "layout.json").write_text("{}" * 500)
    (backup / "7").mkdir()
    (backup / "COMMIT.tmp").write_text("")
    (backup / ".DS_Store").write_text("")
    (backup / "notes.txt").write_text("notes")
    (backup / "home").mkdir()
    (backup / "home" / "large").write_text("x" * 100)
    document = ask_json("inspect", backup)
    assert {one["name"]: (one["kind"], one["bytes"]) for one in document["others"]} == {
        "spare": ("spare", 1000),
        "7": ("debris", 0),
        "COMMIT.tmp": ("temporary", 0),
        ".DS_Store": ("junk", 0),
        "notes.txt": ("foreign", 5),
        "home": ("foreign", None),  # nobody knows how much there is to be walked through
        "LOCK": ("lock", (backup / "LOCK").stat().st_size),
    }
    text = ask("inspect", backup)
    assert "  spare       1.00 kB  not valid: the next save replaces it" in text
    assert "nobody holds it" in text


def test_of_a_spare_that_a_training_takes_meanwhile_what_is_there_counts(
    backup, monkeypatch, capsys
):
    (backup / "spare" / "pytree").mkdir(parents=True)
    (backup / "spare" / "layout.json").write_text("{}")
    (backup / "spare" / "pytree" / "0").write_text("shard")
    (backup / "spare" / "pytree" / "1").write_text("another")
    walk, lstat = os.walk, os.lstat

    def walk_and_take(path):
        for directory, *names in walk(path):
            (backup / "spare" / "pytree" / "0").unlink(missing_ok=True)
            yield directory, *names

    def look_and_take(path, **options):
        found = lstat(path, **options)
        if str(path).endswith("spare/pytree/1"):
            os.unlink(path)  # who looks before he asks for the size finds it gone
        return found

    monkeypatch.setattr(os, "walk", walk_and_take)
    monkeypatch.setattr(os, "lstat", look_and_take)
    assert inspection.run(str(backup), as_json=True, with_statistics=False) == 0
    others = json.loads(capsys.readouterr().out)["others"]
    assert [one["bytes"] for one in others if one["name"] == "spare"] == [len("{}another")]


TRAINING = """
import os, sys, stepsave
from engine_support import state_of
with stepsave.Checkpointer(sys.argv[1], double_checkpoint=True) as saver:
    print(os.getpid(), flush=True)
    step = 0
    while True:
        step += 1
        saver.save(step, state_of(step)).wait()
"""


def test_while_a_training_saves_there_it_is_seen_and_not_disturbed(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", TRAINING, str(tmp_path)],
        stdout=subprocess.PIPE, text=True, env=environment,
    ) as training:  # fmt: skip
        try:
            pid = int(training.stdout.readline())
            end = time.monotonic() + 60
            steps = []
            while len(steps) < 4 and time.monotonic() < end:
                document = ask_json("inspect", tmp_path)
                assert document["in_use_by"]["pid"] == pid
                steps += [backup["step"] for backup in document["backups"][:1]]
            assert f"  in use by process {pid}" in ask("inspect", tmp_path)
            assert training.poll() is None
        finally:
            training.send_signal(signal.SIGKILL)
    assert len(steps) == 4
    assert steps == sorted(steps)
    assert steps[0] < steps[-1]
    assert ask_json("inspect", tmp_path)["in_use_by"] is None


def test_the_process_that_trains_may_look_itself_and_keeps_its_lock(tmp_path):
    script = """
import os, sys, stepsave
from stepsave.cli import inspection
with stepsave.Checkpointer(sys.argv[1]) as saver:
    saver.save(1, {"a": 1}).wait()
    assert inspection.run(sys.argv[1], as_json=False, with_statistics=True) == 0
    import subprocess
    code = "import sys, stepsave; stepsave.Checkpointer(sys.argv[1])"
    other = subprocess.run([sys.executable, "-c", code, sys.argv[1]], capture_output=True)
    assert b"DirectoryBusyError" in other.stderr, other.stderr
"""
    check_python(script, tmp_path)


def test_no_permission_to_write_is_needed(backup):
    mount = f"mount --bind {backup} {backup} && mount -o remount,ro,bind {backup}"
    assert "step 160" in ask("inspect", backup, prefix=in_own_mounts(mount))


def test_where_nothing_is_it_cannot_be_asked_and_where_no_backup_is_it_says_so(tmp_path):
    assert "No such file or directory" in refusal("inspect", tmp_path / "typo")
    assert "no valid backup" in ask("inspect", tmp_path)
    (tmp_path / "photos").mkdir()
    text = ask("inspect", tmp_path)
    assert "photos" in text
    assert "not stepsave's" in text
    assert ask_json("inspect", tmp_path)["backups"] == []


def test_a_backup_of_a_training_that_has_ended_says_so(tmp_path):
    with stepsave.Checkpointer(tmp_path) as saver:
        saver.save(3, {"a": np.arange(4)}).wait()
        saver.close(ended=True)
    assert ask_json("inspect", tmp_path)["backups"][0]["has_ended"]
    assert "  training    has come to its end" in ask("inspect", tmp_path)


def test_what_processes_keep_on_disks_of_their_own_is_shown_disk_by_disk(tmp_path):
    for rank in (0, 1, 10):
        save_once(tmp_path / f"process-{rank}", {"a": np.arange(4)}, step=7 + rank)
    document = ask_json("inspect", tmp_path)
    assert (document["backups"], document["others"]) == ([], [])
    assert [disk["backups"][0]["step"] for disk in document["disks"]] == [7, 8, 17]
    assert f"{tmp_path}/process-10" in ask("inspect", tmp_path)
    flip_bit(tmp_path / "process-1" / "8" / "layout.json", 9)
    assert ask_json("inspect", tmp_path, status=1)["is_damaged"]


@pytest.mark.xdist_group("buckets")
def test_a_bucket_is_inspected(s3):
    save_two(s3.place, [arrays_of_all_dtypes((5, 4)), arrays_of_all_dtypes((5, 4), seed=1)])
    from stepsave.store.places import open_store

    store = open_store(s3.place)
    store.write_all({"notes.txt": b"", "20251129T213246Z-6a6cea1f9883d018/30/layout.json": b"{}"})
    document = ask_json("inspect", s3.place, "--stats")
    assert [backup["step"] for backup in document["backups"]] == [160, 150]
    assert document["in_use_by"]["pid"] == os.getpid()
    assert not document["in_use_by"]["is_certain"]
    assert {one["name"]: one["kind"] for one in document["others"]} == {
        "notes.txt": "foreign",
        "20251129T213246Z-6a6cea1f9883d018/30": "debris",
    }
    assert "statistics" in document["backups"][0]["variables"][0]
    assert "last saved to by process" in ask("inspect", s3.place)


@pytest.mark.parametrize(
    "arguments",
    [["inspect"], ["inspect", "--stats", "--json"], ["verify"], ["diff"]],
    ids=" ".join,
)
def test_no_command_that_looks_imports_keras_a_backend_or_tensorstore(tmp_path, arguments):
    save_two(tmp_path, [{"a": np.arange(4, dtype=dtype)} for dtype in ("f4", "f4")])
    b = [str(tmp_path)] if arguments == ["diff"] else []
    check_imports(*arguments, tmp_path, *b, more=["tensorstore"])


@pytest.mark.once
def test_a_backup_of_a_real_fit_is_shown_with_its_place_in_the_training(tmp_path):
    script = """
import os, sys
os.environ["KERAS_BACKEND"] = "jax"
import keras, stepsave
model = keras.Sequential([keras.layers.Input((3,)), keras.layers.Dense(2, name="head")])
model.compile("adam", "mse")
x = keras.random.normal((28, 3)); y = keras.random.normal((28, 2))
backup = stepsave.BackupAndRestore(sys.argv[1], 5, delete_checkpoint=False)
model.fit(x, y, epochs=2, batch_size=4, verbose=0, callbacks=[backup])
print(keras.__version__)
"""
    keras_version = check_python(script, tmp_path).strip()
    (newest,) = ask_json("inspect", tmp_path, "--stats")["backups"]
    assert newest["backend"] == "jax"
    assert newest["keras_version"] == keras_version
    assert newest["position"] == {"global_step": 10, "epoch": 1, "batch": 3, "steps_per_epoch": 7}
    names = ["/".join(one["path"]) for one in newest["variables"]]
    assert any(name.endswith("head/kernel") for name in names)
    text = ask("inspect", tmp_path)
    assert "  position    epoch 2, after batch 3 of 7" in text
    assert ask("verify", tmp_path).startswith("valid: step 10; ")
    assert plan_of(tmp_path, 10).leaves
