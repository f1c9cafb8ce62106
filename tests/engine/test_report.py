"""A report says of saves what happened, in each of its forms."""

import json
import math
import os
import threading
import time

import numpy as np
import pytest
from engine_support import assert_same_bits, restore_once, run_python
from report_support import FACTS

import stepsave
from stepsave.engine.step_times import StepTimes
from stepsave.store.local import LocalStore

STATE = {"w": np.arange(200_000.0), "frozen": np.ones(600_000)}


def run(directory, steps=12, every=3, **options):
    """A training that changes a part of its state; what it reports when it is closed."""
    times = StepTimes()
    times.begin(at_once=True)
    state = {name: array.copy() for name, array in STATE.items()}
    with stepsave.Checkpointer(directory, **options) as saver:
        for step in range(steps):
            state["w"] += 1.0
            times.note()
            if step % every == 0:
                saver.save(step, state).wait()
    report = saver.report(steps=times.summary())
    found = restore_once(directory)
    assert found.step == (steps - 1) // every * every
    assert_same_bits(found.state["w"], STATE["w"] + found.step + 1)
    return report


def test_a_report_has_the_sums_that_stats_has(tmp_path):
    report = run(tmp_path / "backup")
    saves, stats = report.saves, report.stats
    assert stats.started == stats.committed == len(saves) == 4
    assert stats.state_bytes == sum(save.state_bytes for save in saves)
    assert stats.changed_bytes == sum(save.changed_bytes for save in saves)
    assert stats.written_bytes == sum(save.written_bytes for save in saves)
    assert stats.stall_total_s == pytest.approx(sum(save.stall_s for save in saves))
    assert stats.stall_max_s == report.stall_p99_s == max(save.stall_s for save in saves)
    assert report.durable_max_s == report.durable_p99_s == max(save.durable_s for save in saves)
    writes_s = [save.write_ended_s - save.write_began_s for save in saves]
    assert report.write_total_s == pytest.approx(sum(writes_s))
    assert report.write_bytes_per_s == stats.written_bytes / report.write_total_s
    assert report.stall_share == stats.stall_total_s / report.elapsed_s
    unwritten = sum(max(0, save.state_bytes - save.written_bytes) for save in saves)
    assert report.unwritten_bytes == unwritten > 600_000  # what is frozen, twice at least
    assert saves[-1].ended_s <= report.elapsed_s < 300
    assert 0 < report.age_s <= report.worst_age_s <= report.elapsed_s
    assert report.steps.count == 12


def test_a_report_goes_through_json_and_comes_back_the_same(tmp_path):
    report = run(tmp_path / "backup")
    text = json.dumps(report.to_dict(), allow_nan=False)
    assert stepsave.SaveReport.from_dict(json.loads(text)) == report
    with stepsave.Checkpointer(tmp_path / "other") as saver:
        empty = saver.report()
    again = stepsave.SaveReport.from_dict(json.loads(json.dumps(empty.to_dict(), allow_nan=False)))
    assert math.isnan(again.stall_p99_s)
    assert math.isnan(again.stats.stall_median_s)
    assert repr(again) == repr(empty)


def test_names_of_the_figures_say_their_units(tmp_path):
    facts = run(tmp_path / "backup").to_dict()
    assert set(facts) == {
        *("stats", "saves", "steps", "opened_at_s", "elapsed_s", "stall_p99_s"),
        *("durable_p99_s", "durable_max_s", "write_total_s", "unwritten_bytes", "cpu_s", "age_s"),
        *("worst_age_s", "stall_share", "write_bytes_per_s"),
    }
    assert set(facts["saves"][0]) == {
        *("step", "outcome", "began_s", "stall_s", "write_began_s", "write_ended_s", "ended_s"),
        *("state_bytes", "changed_bytes", "written_bytes"),
    }
    assert set(facts["steps"]) == {
        *("count", "total_s", "p50_s", "p99_s", "max_s", "ended_s", "took_s"),
    }


TEXT = """\
Backups: 22 saved, 3 skipped, 1 failed, 1 in flight in 45.1 s; 300 MB each
  training held up   p50 22.1 ms   p99 31.0 ms   max  270 ms   1.20 % of the time
  durable after      p50  310 ms   p99  490 ms   max  520 ms   1.12 GB/s
  steps took         p50 12.1 ms   p99 34.1 ms   max  1.20 s   300 timed
  newest backup      at most 6.10 s old
  in the bucket      step 120, 31.0 s old
  not written        1.21 GB of 7.20 GB, as it had not changed
  background         2.31 s of CPU time in stepsave's threads"""


def test_the_text_says_it_in_a_few_aligned_lines():
    assert str(stepsave.SaveReport.from_dict(FACTS)) == TEXT


def test_the_text_of_a_training_without_saves_is_one_line(tmp_path):
    with stepsave.Checkpointer(tmp_path) as saver:
        text = str(saver.report())
    assert text.startswith("Backups: none in ")
    assert "\n" not in text


def test_skipped_saves_are_told_and_cost_no_stall(tmp_path, monkeypatch):
    opened = threading.Event()
    real = LocalStore.make_directory

    def make_directory(self, path):
        assert opened.wait(30)
        real(self, path)

    monkeypatch.setattr(LocalStore, "make_directory", make_directory)
    with stepsave.Checkpointer(tmp_path, when_busy="skip") as saver:
        handles = [saver.save(step, STATE) for step in range(5)]
        during = saver.report()
        opened.set()
    assert [handle.skipped for handle in handles] == [False, False, True, True, True]
    outcomes = ["in flight"] * 2 + ["skipped"] * 3
    assert [save.outcome for save in during.saves] == outcomes
    assert "0 saved, 3 skipped, 0 failed, 2 in flight" in str(during)
    report = saver.report()
    assert (report.stats.committed, report.stats.skipped) == (2, 3)
    assert report.stats.stall_total_s == pytest.approx(sum(h.stall_s for h in handles[:2]))
    assert "2 saved, 3 skipped, 0 failed in" in str(report)
    assert restore_once(tmp_path).step == 1


def test_a_report_after_the_end_does_not_go_on(tmp_path):
    saver = stepsave.Checkpointer(tmp_path)
    saver.save(1, STATE).wait()
    saver.close()
    first = saver.report()
    time.sleep(0.05)
    assert saver.report() == first


def test_the_cpu_time_is_that_of_its_own_threads(tmp_path):
    with stepsave.Checkpointer(tmp_path, writer="tensorstore") as saver:
        before_s = saver.report().cpu_s
        saver._keeper.call(lambda: spin(0.2))
        spin(0.2)  # the caller's is not counted
        spent_s = saver.report().cpu_s - before_s
    assert 0.2 <= spent_s < 0.4


def spin(cpu_s):
    begun_s = time.thread_time()
    while time.thread_time() < begun_s + cpu_s:
        pass


def test_picture_and_trace_replace_files_whole_or_not_at_all(tmp_path, monkeypatch):
    report = run(tmp_path / "backup")
    out = tmp_path / "out"
    out.mkdir()
    report.plot(out / "a.png")
    report.plot(str(out / "a.svg"))
    report.save_trace(out / "trace.json")
    assert (out / "a.png").read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in (out / "a.svg").read_bytes()[:1000]
    events = json.loads((out / "trace.json").read_text())["traceEvents"]
    assert sum(event["name"] == "step" for event in events) == 12
    assert sum(event.get("cat") == "commit" for event in events) == 4
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert set(before) == {"a.png", "a.svg", "trace.json"}

    def refuse(*_):
        raise OSError(28, "no space left")

    monkeypatch.setattr(os, "fsync", refuse)
    for write in (report.plot, report.save_trace):
        with pytest.raises(OSError, match="no space left"):
            write(out / "trace.json" if write == report.save_trace else out / "a.png")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


DRAW = """
import json, sys, stepsave
stepsave.SaveReport.from_dict(json.loads(sys.argv[1])).plot("picture.svg")
"""


def test_a_picture_goes_where_the_caller_is_and_into_no_folder_that_is_not_there(tmp_path):
    report = stepsave.SaveReport.from_dict(FACTS)
    with pytest.raises(FileNotFoundError, match="missing"):
        report.save_trace(tmp_path / "missing" / "trace.json")
    done = run_python(DRAW, json.dumps(FACTS), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "picture.svg").exists()


def test_a_report_imports_neither_matplotlib_nor_keras(tmp_path):
    done = run_python(
        "import sys, numpy, stepsave\n"
        "with stepsave.Checkpointer(sys.argv[1]) as saver:\n"
        "    saver.save(1, {'w': numpy.ones(10)})\n"
        "    str(saver.report()); saver.report().to_dict()\n"
        "print({'matplotlib', 'keras'} & set(sys.modules))",
        tmp_path / "backup",
    )
    assert done.stdout == "set()\n", done.stderr
