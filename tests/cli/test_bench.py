"""`stepsave bench`: measures with the engine, recommends by what it measured, leaves nothing."""

import json
import os
import signal
import sys

import pytest
from cli_support import call, check_imports, start, wait_until
from engine_support import save_once

import stepsave


def measured(capsys, *arguments):
    call("bench", *arguments, "--quick", "--json")
    return json.loads(capsys.readouterr().out)


def test_it_measures_whole_saves_and_leaves_nothing(tmp_path, capsys, monkeypatch):
    saved = []
    save = stepsave.Checkpointer.save

    def note(self, step, state, metadata=None):
        handle = save(self, step, state, metadata)
        saved.append((os.path.dirname(self.directory), handle))
        return handle

    monkeypatch.setattr(stepsave.Checkpointer, "save", note)
    found = measured(capsys, tmp_path, "--size", "9MB", "--step-time", 0.01)
    assert os.listdir(tmp_path) == []
    assert found["place"] == str(tmp_path)
    assert found["state_bytes"] == pytest.approx(9e6, rel=1e-3)
    assert found["saves"] == len(saved) - 2
    for place, handle in saved:
        assert place == str(tmp_path)
        assert handle.changed_bytes >= found["state_bytes"], "it was not the whole state"
    assert 0 < found["stall_s"] < found["durable_s"]
    assert found["to_host_s"] is None
    assert found["writer"] in ("direct", "tensorstore")
    chosen = {one["save_freq"]: one for one in found["choices"]}[found["save_freq"]]
    assert chosen["overhead"] <= 0.01


def test_it_is_shown_to_people_in_80_columns(tmp_path, capsys):
    call("bench", tmp_path, "--quick", "--size", "4MB", "--max-overhead", 0.5)
    out = capsys.readouterr().out
    assert "Recommended: save_freq=" in out
    assert "no promise" in out
    lines = out.splitlines()[1:]  # the first one names the place
    assert max(map(len, lines)) <= 80


def test_arrays_of_a_backend_are_saved_if_asked(tmp_path, capsys):
    pytest.importorskip("torch")
    found = measured(capsys, tmp_path, "--size", "5MB", "--backend", "torch")
    assert found["backend"] == "torch"
    assert found["device"] == "cpu" or found["to_host_s"] > 0


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--size", "much"], "such as 300MB"),
        (["--size", "0"], "more than nothing"),
        (["--step-time", "0"], "more than nothing"),
        (["--max-overhead", "5"], "a share"),
        (["--size", "900TB"], "a smaller --size"),
    ],
)
def test_what_cannot_be_measured_is_refused(tmp_path, capsys, arguments, text):
    call("bench", tmp_path, *arguments, status=2)
    assert text in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


def test_a_backend_that_is_not_installed_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    call("bench", tmp_path, "--backend", "torch", status=2)
    assert "torch not found. Run: pip install 'stepsave[torch]'" in capsys.readouterr().err


def test_a_backup_directory_is_left_alone(tmp_path, capsys):
    save_once(tmp_path / "backup", {"a": 1})
    call("bench", tmp_path / "backup", "--quick", status=2)
    assert "found a backup directory, which holds nothing else" in capsys.readouterr().err
    call("bench", tmp_path / "none", "--quick", status=2)
    assert "expected a directory to measure in, found none" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path / "backup")) == ["1", "COMMIT", "LOCK"]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_told_to_stop_it_leaves_nothing(tmp_path, signum):
    process = start("bench", tmp_path, "--size", "40MB")
    wait_until(lambda: any(tmp_path.glob("stepsave-bench-*/COMMIT")))
    process.send_signal(signum)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signum, err
    assert os.listdir(tmp_path) == []


def test_neither_keras_nor_a_backend_is_imported_unless_asked(tmp_path):
    check_imports("bench", tmp_path, "--quick", "--size", "1MB")
