"""Traces are what chrome://tracing and Perfetto read.

By https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU, "Trace Event
Format", which has no schema: the rules that bear on the events that we write are checked here.
"""

import json
import os

from report_support import COMMITTED, FAILED, FLYING, SKIPPED, STEPS

from stepsave.engine.trace import encode_trace


def read(saves, steps=None):
    """The events of a trace, checked by the rules of the format."""
    document = json.loads(encode_trace(saves, steps))
    assert document["displayTimeUnit"] in ("ms", "ns")
    events = document["traceEvents"]
    named = {event["tid"] for event in events if event["name"] == "thread_name"}
    for event in events:
        assert event["ph"] in ("X", "i", "M")
        assert event["pid"] == os.getpid()
        assert isinstance(event["tid"], int)
        assert isinstance(event["name"], str)
        assert isinstance(event["args"], dict)
        assert isinstance(event["ts"], (int, float))
        if event["ph"] == "M":
            assert event["name"] in ("process_name", "thread_name")
            assert isinstance(event["args"]["name"], str)
            continue
        assert event["tid"] in named
        assert isinstance(event["cat"], str)
        if event["ph"] == "X":
            assert event["dur"] >= 0
        else:
            assert event["s"] in ("g", "p", "t")
    return events


def slices(events, thread):
    tid = next(e["tid"] for e in events if e["ph"] == "M" and e["args"]["name"] == thread)
    return [
        (e["name"], e["ts"], e.get("dur")) for e in events if e["ph"] != "M" and e["tid"] == tid
    ]


def test_a_save_is_a_stall_a_write_and_a_commit_in_microseconds():
    events = read([COMMITTED])
    assert slices(events, "training") == [("stall, step 10", 1_000_000, 250_000)]
    assert slices(events, "writer") == [
        ("write, step 10", 1_500_000, 500_000),
        ("commit, step 10", 2_000_000, 125_000),
    ]
    write = next(event for event in events if event.get("cat") == "write")
    assert write["args"] == {
        "step": 10,
        "outcome": "committed",
        "state_bytes": 8,
        "written_bytes": 0,
    }


def test_what_failed_was_skipped_or_is_in_flight_is_shown_as_far_as_it_came():
    events = read([FAILED, SKIPPED, FLYING])
    assert slices(events, "writer") == [
        ("write, step 20", 3_500_000, 250_000),
        ("failed, step 20", 3_750_000, None),
    ]
    assert slices(events, "training") == [
        ("stall, step 20", 3_000_000, 125_000),
        ("skipped, step 30", 4_125_000, None),
        ("stall, step 40", 5_000_000, 125_000),
    ]


def test_steps_are_slices_that_saves_lie_within():
    found = slices(read([COMMITTED], STEPS), "training")
    steps = [(at, at + duration) for name, at, duration in found if name == "step"]
    assert steps == [(0, 1_000_000), (1_000_000, 2_500_000), (2_500_000, 3_500_000)]
    (stall,) = [(at, at + duration) for name, at, duration in found if name != "step"]
    assert steps[1][0] <= stall[0] <= stall[1] <= steps[1][1]


def test_a_trace_of_nothing_is_one_too():
    assert len(read([])) == 3  # the names
