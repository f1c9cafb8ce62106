"""The tables of how long processes take to begin: by the import, to the first batch."""

from __future__ import annotations

from collections.abc import Iterator

from bench.fits.subjects import SUBJECTS
from bench.publish.collected import (
    BACKEND_NAMES,
    Collected,
    Result,
    duration,
    markdown_table,
    ms,
    number,
    times,
)
from bench.publish.figures import Figure, at_most

OURS = "stepsave"
RESUMES = {"resume warm": "warm", "resume cold": "cold"}
COLD_ENOUGH = 0.01  # part of the pages that may be left in the page cache


def sections(collected: Collected) -> list[tuple[str, list[str]]]:
    """Title and lines; none where nothing was measured."""
    results = _results(collected)
    found: list[tuple[str, list[str]]] = []
    if results:
        lines = [_caption(results[0]), ""]
        for result in results:
            lines += [f"#### {_label(result)}", "", *_table(result), ""]
        found.append(("From `fit` to the first batch", lines))
    if imported := collected.summary("imports"):
        found.append(("Import", _imports(imported)))
    return found


def _results(collected: Collected) -> list[Result]:
    """All runs, by backend, size of the matrices and size."""
    found = [each for each in collected.results.values() if each.get("benchmark") == "starts"]
    backends = list(BACKEND_NAMES)

    def order(result: Result) -> tuple[int, int, float]:
        settings = result["settings"]
        backend = backends.index(settings["backend"])
        return backend, settings["matrix_bytes"], settings["megabytes"]

    return sorted(found, key=order)


def _label(result: Result) -> str:
    settings = result["settings"]
    label = f"{BACKEND_NAMES[settings['backend']]}, {settings['state_bytes'] / 1e6:.0f} MB"
    large = settings["matrices"] != "small"
    return f"{label} in matrices of {settings['matrix_bytes'] / 2**20:.0f} MiB" if large else label


def _caption(result: Result) -> str:
    every, saves = result["settings"]["every"], result["settings"]["saves"]
    how = "; ".join(f"{SUBJECTS[key].label}: {text}" for key, text in result["subjects"].items())
    return (
        "Each figure is of processes that ran by themselves. *start* finds no backup, saves "
        f"{saves['start']} times, every {every} batches, and is killed; a *resume* goes on from "
        f"what the process before it left, saves {saves['resume']} times and is killed. Each "
        "resumed process had, before its first step, the variables of the last save, by a "
        "checksum; stepsave's the metrics too, and the next batch. *Peak* is that of the whole "
        f"process, with Python and the frameworks in it, until it is killed{_whole(result)}; "
        "*made in* what "
        f"making the callback takes before `fit`, its imports included. {how}."
    )


def _whole(result: Result) -> str:
    """Results of before do not have it: there a start that was killed early looks smaller."""
    if not any("absent_bytes" in sample for sample in result["samples"]):
        return ", with as much of stepsave's buffers as was touched by then"
    return ", with stepsave's buffers counted whole: their last pages come in the background"


def _table(result: Result) -> list[str]:
    settings, summary = result["settings"], result["summary"]
    lines = [f"Layers: {settings['layers']}; rounds: {settings['repeats']}.", ""]
    left = result["cold"]["in_page_cache_at_most"]
    if left is not None and left > COLD_ENOUGH:
        lines[0] += f" **Not cold**: {left:.0%} of a backup was left in the page cache."
    head = ["", "first batch after", "over no callback", "against Keras's", "made in"]
    head += ["peak memory", "against its training", "against no callback"]
    rows = [
        [f"{SUBJECTS[key].label}, {kind}", *_cells(found, bold=key == OURS)]
        for key, kinds in summary.items()
        for kind, found in kinds.items()
        if kind != "saves"
    ]
    lines += markdown_table(head, rows)
    head = ["first save", "held up `fit`", "later ones", "first to later"]
    head += ["buffers touched after the first batch", "before the first save"]
    saves = {key: kinds["saves"] for key, kinds in summary.items() if "saves" in kinds}
    rows = [
        [
            SUBJECTS[key].label,
            ms(found["first_s"]),
            ms(found["later_s"]),
            times(found["first_over_later"], bold=key == OURS),
            *_touched(found),
        ]
        for key, found in saves.items()
    ]
    lines += ["", *markdown_table(head, rows)]
    failed = [f"- {SUBJECTS[key].label}: failed: {text}" for key, text in result["failed"].items()]
    return [*lines, *(["", *failed] if failed else [])]


def _cells(found: Result, *, bold: bool) -> list[str]:
    def of(key: str) -> str:
        return times(found[key], bold=bold) if key in found else ""

    return [
        duration(found["first_s"]),
        duration(found["over_none_s"], bold=bold) if "over_none_s" in found else "",
        of("over_keras"),
        duration(found["make_s"]),
        f"{found['peak_bytes']['median'] / 1e9:.2f} GB",
        of("peak_over_training"),
        of("peak_over_none"),
    ]


def _touched(found: Result) -> list[str]:
    if "touched_after_first_batch" not in found:
        return ["", ""]
    after, before = (
        f"{found[f'touched_{when}']['median']:.0%}"
        for when in ("after_first_batch", "before_first_save")
    )
    return ["all" if found["compiling_gave_the_time"] else after, before]


def _imports(summary: Result) -> list[str]:
    rows = [
        [f"`import {name}`", ms(found["import_s"], bold=name == OURS), str(found["modules"])]
        for name, found in summary.items()
        if "import_s" in found
    ]
    for name, what in (("help", "`stepsave --help`, the process"), ("nothing", "no import at all")):
        if name in summary:
            rows.append([what, ms(summary[name]["process_s"], bold=name == "help"), ""])
    return markdown_table(["in a fresh process", "time", "modules"], rows)


def over_none(collected: Collected) -> Iterator[Figure]:
    """For the table of targets: how much later the first batch ends, where nothing is restored."""
    for result in _results(collected):
        if found := _ours(result, "start", "over_none_s"):
            yield at_most(_label(result), found["median"], 0.3, " s")


def limit_of_start(collected: Collected) -> str:
    """How much starts without a callback differ among themselves, from their median."""
    texts: list[str] = []
    for result in _results(collected):
        if none := result["summary"].get("none", {}).get("start"):
            first = none["first_s"]
            low_s, high_s = (first[end] - first["median"] for end in ("p10", "p90"))
            texts.append(f"{_label(result)} {low_s:+.2f} to {high_s:+.2f} s")
    return f"starts without a callback differ by: {', '.join(texts)}" if texts else ""


def resume_over_keras(collected: Collected) -> Iterator[Figure]:
    """The time of a resume as a ratio to Keras's."""
    yield from _of_resumes(collected, "over_keras", 1)


def limit_of_resume(collected: Collected) -> str:
    """A start without a callback, and before it all of the state read into new memory."""
    raw = collected.summary("restore").get("raw read fresh")
    texts: list[str] = []
    for result in _results(collected):
        none = result["summary"].get("none", {}).get("start")
        keras = result["summary"].get("keras", {})
        if raw and none and all(kind in keras for kind in RESUMES):
            read_s = result["settings"]["state_bytes"] / raw["bytes_per_s"]
            least_s = none["first_s"]["median"] + read_s
            ratios = (
                f"{number(least_s / keras[kind]['first_s']['median'])} x {name}"
                for kind, name in RESUMES.items()
            )
            texts.append(f"{_label(result)} {' and '.join(ratios)}")
    return f"no callback, after a raw read into new memory: {', '.join(texts)}" if texts else ""


def first_save(collected: Collected) -> Iterator[Figure]:
    """The first save of a started `fit` against its later ones."""
    for result in _results(collected):
        found = result["summary"].get(OURS, {}).get("saves")
        if found and "touched_after_first_batch" in found:
            ratio = found["first_over_later"]["median"]
            text = f"{number(ratio)} x"
            if not found["compiling_gave_the_time"]:
                touched = found["touched_after_first_batch"]["median"]
                text += f" (compiling gave the time for {touched:.0%} of the buffers)"
            yield Figure(_label(result), ratio, text, ratio <= 1.5)


def limit_of_first_save(collected: Collected) -> str:
    """Not faster than the system gives memory; see `first_save`."""
    for result in _results(collected):
        found = result["summary"].get(OURS, {}).get("saves")
        if found and "touched_before_first_save" in found:
            # Of two buffers; that of the first save is touched first.
            absent = 1 - 2 * found["touched_before_first_save"]["median"]
            absent_bytes = result["settings"]["state_bytes"] * absent
            more_s = found["first_s"]["median"] - found["later_s"]["median"]
            if min(absent_bytes, more_s) > 0:
                return f"memory came at {number(absent_bytes / more_s / 1e9)} GB/s"
    return ""


def resume_peak(collected: Collected) -> Iterator[Figure]:
    """Peak memory of a resumed process as a ratio to one that was started anew."""
    yield from _of_resumes(collected, "peak_over_training", 1.05)


def limit_of_peak(collected: Collected) -> str:
    """The same ratio of Keras's callback, which has no buffers, and how much it varies."""
    texts: list[str] = []
    for result in _results(collected):
        keras = result["summary"].get("keras", {})
        found = [keras.get(kind, {}).get("peak_over_training") for kind in RESUMES]
        if all(found):
            low, high = min(entry["p10"] for entry in found), max(entry["p90"] for entry in found)
            texts.append(f"{_label(result)} {number(low)} to {number(high)} x")
    return f"Keras `BackupAndRestore`, each time: {', '.join(texts)}" if texts else ""


def _of_resumes(collected: Collected, what: str, limit: float) -> Iterator[Figure]:
    for result in _results(collected):
        found = {name: _ours(result, kind, what) for kind, name in RESUMES.items()}
        medians = {name: entry["median"] for name, entry in found.items() if entry}
        if medians:
            text = " and ".join(f"{number(value)} x {name}" for name, value in medians.items())
            worst = max(medians.values())
            yield Figure(_label(result), worst, text, worst <= limit)


def _ours(result: Result, kind: str, what: str) -> Result | None:
    return result["summary"].get(OURS, {}).get(kind, {}).get(what)


def imported(collected: Collected) -> Iterator[Figure]:
    """What `import stepsave` takes."""
    if found := collected.summary("imports").get(OURS):
        yield at_most("", found["import_s"]["median"], 0.2, " s")


def helped(collected: Collected) -> Iterator[Figure]:
    """What `stepsave --help` takes."""
    if found := collected.summary("imports").get("help"):
        yield at_most("", found["process_s"]["median"], 0.3, " s")


def limit_of_help(collected: Collected) -> str:
    """A process of Python that does nothing."""
    found = collected.summary("imports").get("nothing")
    return f"`python -c pass`: {number(found['process_s']['median'])} s" if found else ""


def limit_of_import(collected: Collected) -> str:
    """NumPy, which it needs."""
    found = collected.summary("imports").get("numpy")
    return f"`import numpy`: {number(found['import_s']['median'])} s" if found else ""
