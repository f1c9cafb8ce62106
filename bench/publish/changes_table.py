"""The tables of saves of which only a part has changed."""

from __future__ import annotations

from collections.abc import Iterator

from bench.publish.collected import (
    BACKEND_NAMES,
    FRAMEWORK_NAMES,
    Collected,
    Result,
    markdown_table,
    ms,
    number,
    percent_over,
    subject,
    times,
)
from bench.publish.figures import Figure, at_most

TRAINED = {
    "everything": "Dense layers with Adam: everything changes",
    "adapters": "LoRA on Dense layers, 95 % frozen",
    "embeddings": "embedding table with Adagrad, ids by Zipf",
}
THIS, OTHER = "this", "other"


def sections(collected: Collected) -> list[tuple[str, list[str]]]:
    """Title and lines; none where nothing was measured."""
    found: list[tuple[str, list[str]]] = []
    if (result := collected.get("changes")) is not None:
        found.append(("States of which a part changes", _engine(result)))
    if rows := _fit_rows(collected):
        head = ["", "loop over no callback", "true stall", "against memcpy", "copy only"]
        head += ["held up p50 / p99", "written", "changed"]
        caption = (
            "*Written* and *changed* are parts of all that was saved in whole fits, of which the "
            "first two saves write everything; the loop comes after them. *Copy only* is the true "
            "stall of a snapshot of the whole state in the same rounds."
        )
        found.append(("Fits in which a part changes", [caption, "", *markdown_table(head, rows)]))
    return found


def _engine(result: Result) -> list[str]:
    settings, cases = result["settings"], result["cases"]
    caption = (
        f"{settings['state_bytes'] / 1e6:.0f} MB in {settings['arrays']} arrays, or in one table "
        f"with rows of {settings['row_bytes']} bytes; {settings['processes']} processes of each "
        f"kind, {settings['saves']} saves in each, of which the first {settings['unsteady']} are "
        "not summed up. *Written* is what the kernel counts, *changed* what the save says, both "
        "as parts of the state."
    )
    head = ["", "stall", "its mean", "against everything changing", "durable after", "written"]
    head += ["against everything changing", "changed"]
    rows = [
        [f"{FRAMEWORK_NAMES[framework]}, {cases[case]}", *_cells(codes[THIS])]
        for framework, by_case in result["summary"].items()
        for case, codes in by_case.items()
    ]
    return [caption, "", *markdown_table(head, rows), *_against(result)]


def _cells(found: Result) -> list[str]:
    over = found.get("over_all")
    return [
        ms(found["stall_s"]),
        f"{number(found['stall_mean_s']['median'] * 1e3)} ms",
        times(over["stall_s"], bold=True) if over else "",
        ms(found["durable_s"]),
        times(found["disk_bytes"]),
        times(over["disk_bytes"], bold=True) if over else "",
        number(found["changed_bytes"]["median"]) if "changed_bytes" in found else "",
    ]


def _against(result: Result) -> list[str]:
    """What the saves of a training in which everything changes cost, against another version's."""
    rows = [
        [FRAMEWORK_NAMES[framework], *(times(over[name], bold=True) for name in over)]
        for framework, by_case in result["summary"].items()
        for codes in by_case.values()
        if (over := codes[THIS].get("over_other"))
    ]
    if not rows:
        return []
    head = ["everything changes, against the version before", "stall", "mean stall"]
    head += ["durable after", "written"]
    return ["", *markdown_table(head, rows)]


def _fit_rows(collected: Collected) -> list[list[str]]:
    rows: list[list[str]] = []
    for backend, name in BACKEND_NAMES.items():
        results = {
            result["settings"]["trains"]: result
            for result in collected.fits(backend, "changes in fits")
        }
        for trains, label in TRAINED.items():
            result = results.get(trains)
            found = subject(result, "stepsave")
            if result is None or found is None:
                continue
            size = f"{result['settings']['state_bytes'] / 1e6:.0f} MB"
            rows.append([f"{name}, {size}, {label}", *_fit_cells(result, found)])
    return rows


def _fit_cells(result: Result, found: Result) -> list[str]:
    copy = subject(result, "copy")
    ratio, changed = found["stall_over_memcpy"], found.get("changed_share")
    held = " / ".join(number(found["blocked_s"][p] * 1e3) for p in ("p50", "p99"))
    return [
        percent_over(found["loop_over_none"]),
        ms(found["stall_over_none_s"], bold=True),
        times(ratio) if ratio else "",
        ms(copy["stall_over_none_s"]) if copy else "",
        f"{held} ms",
        times(found["disk_write_share"]),
        times(changed) if changed else "",
    ]


def frozen(collected: Collected, what: str, limit: float) -> Iterator[Figure]:
    """For the table of targets: a state that is mostly frozen against one that all changes."""
    for framework, by_case in collected.summary("changes").items():
        found = by_case.get("frozen", {}).get(THIS, {}).get("over_all")
        if found:
            yield at_most(FRAMEWORK_NAMES[framework], found[what]["median"], limit, " x")


def limit_of_bytes(collected: Collected) -> str:
    """What is not frozen must be written."""
    return "what changes: 0.05 x" if collected.get("changes") else ""
