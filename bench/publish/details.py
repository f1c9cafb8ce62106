"""All tables of one machine, for `bench/README.md`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bench.fits.subjects import SUBJECTS
from bench.publish import changes_table, resume_table, starts_table
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


def machine_line(collected: Collected) -> str:
    """The machine in one line."""
    facts = collected.facts
    if facts is None:
        return collected.directory.name
    memory = facts.get("memory_bytes")
    return ", ".join(
        [
            f"{facts['cpus']} cores of {facts['cpu']}",
            *([f"{memory / 2**30:.0f} GiB"] if memory else []),
            f"Linux {facts['kernel']}",
            facts["file_system"],
        ]
    )


def of_machine(collected: Collected) -> str:
    """Every table, and what is missing of them."""
    # None of these where nothing was measured.
    started, changed, resumed = (
        table.sections(collected) for table in (starts_table, changes_table, resume_table)
    )
    sections: list[tuple[str, Callable[[Collected], list[str]]]] = [
        ("One save against its floors", _engine),
        ("First save", _first),
        ("Many variables", _variables),
        ("Writer threads", _writers),
        ("Restore from a cold disk", _restore),
        ("Into a bucket and back", _buckets),
        *((title, lambda _, lines=lines: lines) for title, lines in (*changed, *resumed, *started)),
        ("Whole fits", _all_fits),
        ("How often", lambda c: _sweep(c, "every", "a save every {} steps")),
        ("How big", lambda c: _sweep(c, "megabytes", "{:.0f} MB")),
        ("How many variables", lambda c: _sweep(c, "variables", "{} variables")),
        ("Idle", _idle),
        ("Resources", _resources),
        ("Parts of a save, 100 MB", _parts),
        ("How the systems were set up", _settings),
    ]
    lines = [f"## {machine_line(collected)}", "", *_packages(collected)]
    missing: list[str] = []
    for title, make in sections:
        if found := make(collected):
            lines += [f"### {title}", "", *found, ""]
        else:
            missing.append(title)
    if missing:
        lines += [f"Not measured on this machine: {'; '.join(missing)}.", ""]
    return "\n".join(lines)


def _packages(collected: Collected) -> list[str]:
    packages = (collected.facts or {}).get("packages", {})
    named = [f"{name} {version}" for name, version in packages.items() if version]
    return [", ".join(named) + ".", ""] if named else []


def _engine(collected: Collected) -> list[str]:
    summary = collected.summary("engine")
    if not summary:
        return []
    rows = [["floor: warm copy by two threads", ms(summary["memcpy"]), ""]]
    checked = summary["checked copy"]
    ratio = times(checked["ratio"], bold=True)
    rows.append(["floor: that copy with checksums", ms(checked), ratio])
    rows += _kind_rows(summary, "stall", "stall of a save")
    rows.append(["floor: `O_DIRECT` write and `fsync`", ms(summary["raw write"]), ""])
    rows += _kind_rows(summary, "background", "from the snapshot to the commit")
    rows += _kind_rows(summary, "durable", "time until durable, stall included")
    settings = (collected.get("engine") or {})["settings"]
    caption = f"{settings['state_bytes'] / 1e6:.0f} MB, {settings['rounds']} rounds."
    return [caption, "", *markdown_table(["", "time", "against the floor"], rows)]


def _kind_rows(summary: Result, kind: str, what: str) -> list[list[str]]:
    return [
        [
            f"{what}, {name} arrays",
            ms(summary[f"{framework} {kind}"]),
            times(summary[f"{framework} {kind}"]["ratio"], bold=True),
        ]
        for framework, name in FRAMEWORK_NAMES.items()
        if f"{framework} {kind}" in summary
    ]


def _first(collected: Collected) -> list[str]:
    whens = {"later": "when all memory was there", "at once": "at once"}
    rows = [
        [
            f"{FRAMEWORK_NAMES[framework]}, {label}",
            ms(entry["prepare_s"]),
            ms(entry["there_s"]),
            ms(entry["first_stall_s"]),
            ms(entry["later_stall_s"]),
            times(entry["first_over_later"], bold=True),
        ]
        for framework, by_when in collected.summary("first").items()
        for when, label in whens.items()
        for entry in [by_when[when]]
    ]
    head = ["", "`prepare`", "first save begun after", "its stall", "of later ones"]
    head += ["first to later"]
    return markdown_table(head, rows) if rows else []


def _variables(collected: Collected) -> list[str]:
    summary = collected.summary("variables")
    rows = [
        [
            f"{FRAMEWORK_NAMES[framework]}, {count} variables",
            ms(entry["stall_s"]),
            number(entry["over_memcpy_us_per_variable"]["median"]),
            ms(entry["durable_s"]),
        ]
        for framework in FRAMEWORK_NAMES
        for count, entry in summary.get(framework, {}).items()
        if count.isdigit()
    ]
    if not rows:
        return []
    settings = (collected.get("variables") or {})["settings"]
    caption = (
        f"{settings['state_bytes'] / 1e6:.0f} MB; memcpy of them takes {ms(summary['memcpy_s'])}."
    )
    head = ["", "stall", "over memcpy, µs per variable", "durable after"]
    return [caption, "", *markdown_table(head, rows)]


def _writers(collected: Collected) -> list[str]:
    kinds = ("stall", "background", "durable")
    summary = collected.summary("writers")
    names = dict.fromkeys(
        key.rpartition(" ")[0] for key in summary if key.rpartition(" ")[2] in kinds
    )
    rows = [[name, *(ms(summary[f"{name} {kind}"]) for kind in kinds)] for name in names]
    head = ["", "stall", "in the background", "durable after"]
    return markdown_table(head, rows) if rows else []


def _buckets(collected: Collected) -> list[str]:
    result = collected.get("buckets")
    if result is None:
        return []
    caption = (
        f"{result['settings']['state_bytes'] / 1e6:.0f} MB in {result['settings']['shards']} "
        "shards; the server is moto, on the same machine. A save is durable then, a restore "
        "verified; times against times, so less is faster."
    )
    return [caption, "", *_timed(result["summary"])]


def _restore(collected: Collected) -> list[str]:
    result = collected.get("restore")
    if result is None:
        return []
    cold = "cold" if result["cold"]["is_cold"] else "**not cold**"
    caption = (
        f"{result['settings']['state_bytes'] / 1e6:.0f} MB, files {cold} before each read; "
        "times against times, so less is faster."
    )
    return [caption, "", *_timed(result["summary"])]


def _timed(summary: dict[str, Any]) -> list[str]:
    rows = [
        [
            name,
            ms(entry),
            f"{entry['bytes_per_s'] / 1e9:.2f} GB/s" if "bytes_per_s" in entry else "",
            "; ".join(f"{times(r)} of {other}" for other, r in entry.get("ratios", {}).items()),
        ]
        for name, entry in summary.items()
    ]
    return markdown_table(["", "time", "speed", "takes"], rows)


def _all_fits(collected: Collected) -> list[str]:
    lines: list[str] = []
    for backend, name in BACKEND_NAMES.items():
        if result := collected.main_fits(backend):
            lines += [f"#### {name}", "", *_fits(result), ""]
    return lines


def _fits(result: Result) -> list[str]:
    settings = result["settings"]
    caption = (
        f"{settings['state_bytes'] / 1e6:.0f} MB in {settings['variables']} arrays, batch size "
        f"{settings['batch_size']}, a save every {settings['every']} of {settings['steps']} steps, "
        f"the last {settings['loop_steps']} of which are the loop; {settings['repeats']} rounds. "
        f"Memcpy: {ms(result['summary']['memcpy_s'])}."
    )
    head = ["", "loop", "over no callback", "true stall", "over the empty callback"]
    head += ["against memcpy", "against ours", "held up p50 / p99 / max", "the first two"]
    head += ["CPU s per GB", "before", "after", "MB on disk", "read back equal"]
    rows = [_fit_row(result, key) for key in result["summary"]["subjects"]]
    failed = [f"- {SUBJECTS[key].label}: failed: {text}" for key, text in result["failed"].items()]
    return [caption, "", *markdown_table(head, rows), *(["", *failed] if failed else [])]


def _fit_row(result: Result, key: str) -> list[str]:
    found = result["summary"]["subjects"][key]
    row = [SUBJECTS[key].label, ms(found["loop_s"]), percent_over(found["loop_over_none"])]
    around = [ms(found[f"{end}_over_none_s"]) for end in ("start", "end")]
    if "stall_over_none_s" not in found:
        return [*row, *[""] * 7, *around, "", ""]
    blocked = found.get("blocked_s", {})
    held = " / ".join(number(blocked[p] * 1e3) for p in ("p50", "p99", "max") if p in blocked)
    verified = result["verified"].get(key, {}).get("equal_variables", {})
    equal = ", ".join(f"{k.removesuffix('_variables')} {v}" for k, v in verified.items())
    over_sync, ratio = found.get("stall_over_sync_s"), found.get("stall_over_stepsave")
    return [
        *row,
        ms(found["stall_over_none_s"], bold=True),
        ms(over_sync) if over_sync else "",
        times(found["stall_over_memcpy"]),
        times(ratio) if ratio else "ours is within noise",
        f"{held} ms" if held else "",
        ms(found["warming_stall_s"]),
        times(found["cpu_s_per_gb"]),
        *around,
        f"{found['disk_bytes'] / 1e6:.0f}",
        equal,
    ]


def _sweep(collected: Collected, varied: str, what: str) -> list[str]:
    """True stalls where one setting is varied, and all others stay."""
    runs = collected.sweep(varied)
    if len({run["settings"][varied] for run in runs}) < 2:
        return []
    keys = [key for key in SUBJECTS if SUBJECTS[key].loader and any(subject(r, key) for r in runs)]
    rows: list[list[str]] = []
    for run in runs:
        row = [what.format(run["settings"][varied]), ms(run["summary"]["memcpy_s"])]
        row += [_stall(run, key) for key in keys]
        rows.append(row)
    head = ["true stall on JAX", "memcpy", *(SUBJECTS[key].label for key in keys)]
    return markdown_table(head, rows)


def _stall(run: Result, key: str) -> str:
    if key in run["failed"]:
        return "failed"
    found = subject(run, key)
    if found is None:
        return ""
    loop = percent_over(found["loop_over_none"])
    return f"{number(found['stall_over_none_s']['median'] * 1e3)} ms, loop {loop}"


def _idle(collected: Collected) -> list[str]:
    rows: list[list[str]] = []
    for backend, name in BACKEND_NAMES.items():
        result = collected.get(f"idle-{backend}")
        for key in ("none", "bare", "sync", "idle") if result else ():
            found = subject(result, key)
            if result is None or found is None:
                continue
            step_us = found["loop_s"]["median"] / result["settings"]["loop_steps"] * 1e6
            rows.append(
                [
                    f"{name}, {SUBJECTS[key].label}",
                    f"{number(step_us)} µs",
                    times(found["loop_over_none"], bold=key == "idle"),
                    "yes" if found["async_dispatch"] else "no",
                ]
            )
    return (
        markdown_table(["", "step", "loop, against none", "asynchronous dispatch"], rows)
        if rows
        else []
    )


def _resources(collected: Collected) -> list[str]:
    result = collected.get("resources")
    if result is None:
        return []
    rows: list[list[str]] = []
    for name, found in result["summary"].items():
        cells = [""] * 6
        if cpu := found.get("cpu"):
            cells[0] = times(cpu["cpu_s_per_gb"])
        if memory := found.get("memory"):
            cells[1] = f"{number(memory['peak_over_state'])} x the state"
        if growth := found.get("growth"):
            slope, error = growth["slope_bytes_per_save"], growth["slope_error_bytes_per_save"]
            cells[2] = f"{slope:.0f} ± {error:.0f} B"
        if calls := found.get("syscalls"):
            cells[3], cells[4] = number(calls["syncs"]), number(calls["all"])
        if operations := found.get("operations"):
            cells[5] = ", ".join(
                f"{number(side['calls_per_variable'])} {where}"
                for where, side in operations.items()
            )
        rows.append([name, *cells])
    head = ["", "CPU s per GB", "peak memory", "memory growth per save", "syncs per save"]
    head += ["syscalls per save", "calls per variable"]
    failed = [f"- {name}: failed: {text}" for name, text in result["failed"].items()]
    reason = result["syscalls_null_because"]
    notes = [*failed, *([f"- no syscalls: {reason}"] if reason else [])]
    return [*markdown_table(head, rows), *(["", *notes] if notes else [])]


def _parts(collected: Collected) -> list[str]:
    result = collected.get("parts")
    if result is None:
        return []
    rows = [
        [each["group"], each["name"].removeprefix("test_").replace("_", " "), _short(median_s)]
        for each in result["benchmarks"]
        for median_s in [each["stats"]["median"]]
    ]
    return markdown_table(["", "", "median"], rows)


def _short(taken_s: float) -> str:
    return f"{number(taken_s * 1e3)} ms" if taken_s >= 1e-4 else f"{number(taken_s * 1e6)} µs"


def _settings(collected: Collected) -> list[str]:
    found: dict[str, Result] = {}
    for backend in BACKEND_NAMES:
        found |= (collected.main_fits(backend) or {}).get("subjects", {})
    rows = [[each["label"], each["settings"], each["syncs"]] for each in found.values()]
    return markdown_table(["", "settings", "syncs before it says done"], rows) if rows else []
