"""What `bench.gpu` has measured, as tables."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bench.publish.collected import Collected, Result, markdown_table, ms, number, percent_over
from bench.publish.targets import FRAMEWORK_NAMES

NONE_YET = (
    'Not measured yet. `snapshot="device"` and transfers to pinned memory are tested bit for bit, '
    "but only on the CPU: what they cost on a GPU is unproved. `python -m bench.gpu` measures it."
)
HBM_FACTOR, EXTRA_S, HOST_FACTOR, OF_PINNED, EVERY_10 = 1.25, 1e-3, 1.1, 0.9, 1.01


def results(collected: Collected) -> list[Result]:
    """The runs on one machine, by framework."""
    return [each for each in collected.results.values() if each.get("benchmark") == "gpu"]


def overview(machines: list[Collected]) -> list[str]:
    """For the README: what was aimed at and reached on each machine."""
    lines = ["### On a GPU", ""]
    measured = [collected for collected in machines if results(collected)]
    if not measured:
        return [*lines, NONE_YET, ""]
    for collected in measured:
        for result in results(collected):
            lines += [_headline(result), "", *_targets(result), ""]
    return lines


def details(collected: Collected) -> list[str]:
    """For `bench/README.md`: everything."""
    lines: list[str] = []
    for result in results(collected):
        lines += [f"## {_headline(result)}", "", *_not_measured(result)]
        lines += ["### Floors", "", *_floors(result), ""]
        for size in _measured(result).values():
            lines += [f"### {_size(size)}, steps of {number(size['step_s'] * 1e3)} ms", ""]
            lines += [f"{size['model']}.", "", *_stalls(size), "", *_steps(size), ""]
        lines += ["### Targets", "", *_targets(result), "", *_settings(result), ""]
    return lines


def _headline(result: Result) -> str:
    named = [size for size in result["sizes"].values() if "device" in size]
    device = named[0]["device"] if named else "no device"
    packages = [
        f"{name} {v}" for name, v in (named or [{"packages": {}}])[0]["packages"].items() if v
    ]
    return f"{FRAMEWORK_NAMES[result['framework']]} on {device} ({', '.join(packages)})"


def _measured(result: Result) -> dict[str, Result]:
    return {name: size for name, size in result["sizes"].items() if "subjects" in size}


def _not_measured(result: Result) -> list[str]:
    lines = [
        f"- {name} GB: {size.get('skipped') or size.get('failed')}"
        for name, size in result["sizes"].items()
        if "subjects" not in size
    ]
    for size in _measured(result).values():
        for found in size["subjects"].values():
            if why := found.get("failed"):
                lines.append(f"- {_size(size)}, {found['label']}: failed, {why}")
            elif why := found.get("stopped"):
                lines.append(
                    f"- {_size(size)}, {found['label']}: fewer loops than asked for: {why}"
                )
    return [*lines, ""] if lines else []


def _size(size: Result) -> str:
    megabytes = size["state_bytes"] / 1e6
    shown = f"{number(megabytes / 1e3)} GB" if megabytes >= 1e3 else f"{number(megabytes)} MB"
    return f"{shown} in {size['arrays']} arrays"


def _floors(result: Result) -> list[str]:
    names = {
        "pageable": "device to host, pageable memory",
        "pinned": "device to host, pinned memory",
        "ours": "device to host, our arena",
        "device copy": "copy on the device, bytes read and written",
    }
    sizes = list(_measured(result).values())
    rows = [
        [text, *(_rate(size["floors"].get(name)) for size in sizes)] for name, text in names.items()
    ]
    return markdown_table(["GB/s", *map(_size, sizes)], rows)


def _rate(entry: Result | None) -> str:
    if entry is None:
        return ""
    median, low, high = (number(entry[key] / 1e9) for key in ("median", "p10", "p90"))
    return f"{median} ({low} to {high})"


def _stalls(size: Result) -> list[str]:
    head = ["", "true stall, one save", "every 10", "every 5", "every 1", "loop, every 10"]
    head += ["held up, p50 / max", "rounds", "restored equal"]
    rows: list[list[str]] = []
    for found in size["subjects"].values():
        cases = found.get("cases", {})
        if not cases:
            continue
        row = [found["label"]]
        for name in ("single", "every 10", "every 5", "every 1"):
            entry = cases.get(name, {})
            row.append(ms(entry["true_stall_s"]) if "true_stall_s" in entry else "")
        tenth, single = cases.get("every 10", {}), cases.get("single", {})
        row.append(percent_over(tenth["loop_over_none"]) if "loop_over_none" in tenth else "")
        held = single.get("blocked_s")
        row.append(f"{number(held['p50'] * 1e3)} / {number(held['max'] * 1e3)} ms" if held else "")
        row.append(str(single["true_stall_s"]["samples"]) if "true_stall_s" in single else "")
        restored = found.get("restored_equal")
        row.append(f"{restored} arrays" if restored else "")
        rows.append(row)
    return markdown_table(head, rows)


def _steps(size: Result) -> list[str]:
    """How much longer than the median step without a save each step around one takes."""
    rows: list[list[str]] = []
    for found in size["subjects"].values():
        traced = found.get("steps_s", {"with": [], "without": []})
        if not traced["with"]:
            continue
        without = _median([each for loop in traced["without"] for each in loop])
        added = [_median(list(step)) - without for step in zip(*traced["with"], strict=True)]
        rows.append([found["label"], *(number(each * 1e3) for each in added)])
    if not rows:
        return []
    head = ["ms longer, step", *(f"{i:+d}" if i else "0" for i in range(-2, len(rows[0]) - 3))]
    return markdown_table(head, rows)


def _median(values: list[float]) -> float:
    ordered = sorted(values)
    return ordered[len(ordered) // 2]


def _settings(result: Result) -> list[str]:
    labels = {
        found["label"]: found.get("settings", "")
        for size in _measured(result).values()
        for found in size["subjects"].values()
    }
    return [f"- {label}: {settings}" for label, settings in labels.items() if settings]


def _targets(result: Result) -> list[str]:
    rows = [
        [_size(size), *row] for size in _measured(result).values() for row in _target_rows(size)
    ]
    if not rows:
        return ["Nothing was measured: see bench/README.md."]
    return markdown_table(["", "", "target", "reached", ""], rows)


def _target_rows(size: Result) -> Iterator[list[str]]:
    floors, subjects = size["floors"], size["subjects"]
    if "pinned" in floors:
        share = floors["ours"]["median"] / floors["pinned"]["median"]
        yield _row(
            "device to host, of pinned", f"at least {OF_PINNED}", number(share), share >= OF_PINNED
        )
    ours = subjects.get("stepsave", {})
    if ours.get("facts", {}).get("snapshot") == "device":
        limit_s = HBM_FACTOR * 2 * size["state_bytes"] / floors["device copy"]["median"] + EXTRA_S
        yield from _stall_row("true stall of one save, copied on the device", ours, limit_s)
    if "pinned" in floors:
        limit_s = HOST_FACTOR * size["state_bytes"] / floors["pinned"]["median"]
        yield from _stall_row(
            "true stall of one save, to the host", subjects.get("stepsave host", {}), limit_s
        )
    tenth = ours.get("cases", {}).get("every 10", {})
    if "loop_over_none" in tenth:
        ratio = tenth["loop_over_none"]["median"]
        yield _row(
            "the loop, a save every 10 steps",
            "at most +1 %",
            percent_over(tenth["loop_over_none"]),
            ratio <= EVERY_10,
        )


def _stall_row(what: str, found: Result, limit_s: float) -> Iterator[list[str]]:
    entry = found.get("cases", {}).get("single", {}).get("true_stall_s")
    if entry:
        yield _row(
            what, f"at most {number(limit_s * 1e3)} ms", ms(entry), entry["median"] <= limit_s
        )


def _row(what: str, target: str, reached: str, met: Any) -> list[str]:
    return [what, target, reached, "met" if met else "**missed**"]
