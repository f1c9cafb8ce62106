"""What is kept of saves: in order, summed up exactly, and bounded."""

import sys
import time

import numpy as np
import pytest
from engine_support import assert_same_bits, restore_once

import stepsave
from stepsave.engine import timeline as timeline_module
from stepsave.engine.timeline import RECENT_SAVES, Course, Timeline
from stepsave.store.local import LocalStore


def pass_through(timeline, number, *, committed=True, state_bytes=100, written_bytes=70):
    """A save of a second, begun at second `number`; durable after half of it."""
    course = Course(number, timeline.opened_s + number)
    course.state_bytes = state_bytes
    timeline.begin(course)
    timeline.stall(course, 0.125)
    course.write_began_s = course.began_s + 0.125
    course.write_ended_s = course.began_s + 0.375
    course.changed_bytes = course.written_bytes = written_bytes
    timeline.end(course, course.began_s + 0.5, committed=committed)
    return course


def test_a_save_is_kept_with_its_times_in_order(tmp_path):
    state = {"w": np.arange(300_000.0)}
    with stepsave.Checkpointer(tmp_path) as saver:
        handles = [saver.save(step, state) for step in (1, 2, 5)]
        saver.wait()
        records = saver.report().saves
    assert [record.step for record in records] == [1, 2, 5]
    for record, handle in zip(records, handles, strict=True):
        assert record.outcome == "committed"
        assert 0 < record.began_s <= record.write_began_s <= record.write_ended_s <= record.ended_s
        assert record.durable_s == pytest.approx(handle.durable_s)
        assert record.stall_s == handle.stall_s
        facts = handle.bytes, handle.changed_bytes, handle.written_bytes
        assert (record.state_bytes, record.changed_bytes, record.written_bytes) == facts
    assert records[0].began_s < records[1].began_s < records[2].began_s
    assert_same_bits(restore_once(tmp_path).state, state)


def test_a_save_in_flight_has_no_end_and_one_that_failed_no_write(tmp_path, monkeypatch):
    saver = stepsave.Checkpointer(tmp_path)
    state = {"w": np.arange(30_000.0)}
    saver.save(1, state).wait()

    def refuse(*_, **__):
        raise OSError(28, "no space left")

    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "write_direct", refuse)
        patch.setattr(LocalStore, "write", refuse)
        handle = saver.save(2, state)
        assert handle.wait_ended(30)
        with pytest.raises(stepsave.SaveFailedError):
            handle.raise_error()
    saver.save(3, state).wait()
    first, failed, last = saver.report().saves
    assert (first.outcome, failed.outcome, last.outcome) == ("committed", "failed", "committed")
    assert failed.write_ended_s is None
    assert failed.durable_s is None
    assert failed.ended_s >= failed.began_s
    saver.close()
    flying = Course(4, 10.0).record(8.0)
    assert (flying.outcome, flying.began_s, flying.ended_s, flying.durable_s) == (
        "in flight",
        2.0,
        None,
        None,
    )
    assert restore_once(tmp_path).step == 3


def test_skipped_saves_are_kept_apart_and_told_in_their_place():
    timeline = Timeline()
    pass_through(timeline, 0)
    for number in range(1, 3000):
        timeline.skip(Course(number, timeline.opened_s + number))
    pass_through(timeline, 3000)
    records = timeline.records()
    outcomes = [record.outcome for record in records]
    assert (outcomes[0], outcomes[-1]) == ("committed", "committed")
    assert outcomes[1:-1] == ["skipped"] * RECENT_SAVES
    assert timeline.skipped == 2999
    assert records == sorted(records, key=lambda record: record.began_s)


def test_sums_are_exact_and_memory_is_bounded_over_a_hundred_thousand_saves():
    timeline = Timeline()
    count = 100_000
    for number in range(2 * RECENT_SAVES):
        pass_through(timeline, number, committed=number % 10 != 9)
    held = sys.getallocatedblocks()
    for number in range(2 * RECENT_SAVES, count):
        pass_through(timeline, number, committed=number % 10 != 9)
    assert sys.getallocatedblocks() - held < 100  # what is kept does not grow with their number
    assert (timeline.started, timeline.committed, timeline.failed) == (count, 90_000, 10_000)
    assert timeline.state_bytes == 100 * count
    assert timeline.changed_bytes == timeline.written_bytes == 70 * count
    assert timeline.unwritten_bytes == 30 * 90_000  # of those that count
    assert timeline.stall_total_s == pytest.approx(0.125 * count)
    assert timeline.write_total_s == pytest.approx(0.25 * count)
    assert timeline.durable_max_s == pytest.approx(0.5)
    records = timeline.records()
    assert [record.step for record in records] == [*range(count - RECENT_SAVES, count)]
    assert len(timeline.stalls_s()) == RECENT_SAVES
    assert len(timeline.durables_s()) == RECENT_SAVES


def test_the_age_of_the_newest_backup_is_that_of_its_state():
    timeline = Timeline()
    opened_s = timeline.opened_s
    assert timeline.age_s(opened_s + 3) == pytest.approx(3)  # none yet: since the beginning
    pass_through(timeline, 10)  # durable at 10.5
    assert timeline.age_s(opened_s + 12) == pytest.approx(2)
    assert timeline.worst_age_s(opened_s + 12) == pytest.approx(10.5)
    pass_through(timeline, 30, committed=False)
    pass_through(timeline, 40)  # the one before it was that of 10 until 40.5
    assert timeline.worst_age_s(opened_s + 41) == pytest.approx(30.5)
    assert timeline.worst_age_s(opened_s + 90) == pytest.approx(50)


def test_a_save_that_another_process_skips_is_no_save_and_no_failure():
    timeline = Timeline()
    course = Course(7, timeline.opened_s)
    timeline.begin(course)
    timeline.stall(course, 0.5)
    timeline.skip_late(course)
    assert (timeline.skipped, timeline.committed, timeline.failed) == (1, 0, 0)
    (record,) = timeline.records()
    assert (record.outcome, record.durable_s) == ("skipped", None)
    assert timeline.durables_s() == []


def test_keeping_a_save_reads_the_clock_a_fixed_number_of_times(tmp_path, monkeypatch):
    with stepsave.Checkpointer(tmp_path) as saver:
        state = {"w": np.arange(1000.0)}
        saver.save(0, state).wait()
        read = []

        def count():
            read.append(1)
            return time.monotonic()

        monkeypatch.setattr(timeline_module.time, "perf_counter", count, raising=True)
        counts = []
        for step in range(1, 6):
            before = len(read)
            saver.save(step, state).wait()
            counts.append(len(read) - before)
    # When it was called, and when it returned; its write from and to; its end.
    assert counts == [5] * 5
