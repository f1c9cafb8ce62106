"""What was aimed at, what was reached, and whether that is enough: all from the results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from bench.fits.subjects import SUBJECTS
from bench.publish import changes_table, starts_table
from bench.publish.collected import BACKEND_NAMES, FRAMEWORK_NAMES, Collected, number, subject
from bench.publish.figures import Figure, Target, at_least, at_most

FLOORS = ("copy", "copy_write")
GROWTH_BYTES = 1 << 20  # over all saves: less is noise of the allocator


def table(machines: Sequence[Collected]) -> list[str]:
    """The targets as a table in Markdown; a figure that the first machine lacks, from another."""
    rows = [target.row(machines) for target in TARGETS]
    head = ["| | target | reached | | what the machine allows |", "|---|---|---|---|---|"]
    return [*head, *rows]


def _engine(kind: str, limit: float) -> Callable[[Collected], Iterator[Figure]]:
    def figures(collected: Collected) -> Iterator[Figure]:
        summary = collected.summary("engine")
        for framework, name in FRAMEWORK_NAMES.items():
            if entry := summary.get(f"{framework} {kind}"):
                yield at_most(name, entry["ratio"]["median"], limit, " x")

    return figures


def _fit(
    key: str, what: str, limit: float, *, least: bool = False
) -> Callable[[Collected], Iterator[Figure]]:
    def figures(collected: Collected) -> Iterator[Figure]:
        entry = (subject(collected.main_fits("jax"), key) or {}).get(what)
        if entry is not None:
            make = at_least if least else at_most
            yield make("", entry["median"], limit, " x")

    return figures


def _cpu(collected: Collected) -> Iterator[Figure]:
    for framework, name in FRAMEWORK_NAMES.items():
        found = collected.summary("resources").get(f"stepsave {framework}", {}).get("cpu")
        if found:
            yield at_most(name, found["cpu_s_per_gb"]["median"], 0.25, " s")


def _idle(collected: Collected) -> Iterator[Figure]:
    for backend, name in BACKEND_NAMES.items():
        result = collected.get(f"idle-{backend}")
        found = subject(result, "idle")
        if result is None or found is None:
            continue
        interval = found["loop_over_none_interval"]
        added, low, high = ((interval[key] - 1) * 100 for key in ("median", "low", "high"))
        steps = result["settings"]["loop_steps"]
        step_us = result["summary"]["subjects"]["none"]["loop_s"]["median"] / steps * 1e6
        text = f"{added:+.1f} % ({low:+.1f} to {high:+.1f} %, steps of {number(step_us)} µs)"
        yield Figure(name, added, text, added <= 1)


def _variables(collected: Collected) -> Iterator[Figure]:
    summary = collected.summary("variables")
    for framework in ("jax", "torch"):
        counts = {int(key) for key in summary.get(framework, {}) if key.isdigit()}
        if counts:
            entry = summary[framework][str(max(counts))]["over_memcpy_us_per_variable"]
            yield at_most(FRAMEWORK_NAMES[framework], entry["median"], 6, " µs")


def _first(collected: Collected) -> Iterator[Figure]:
    for framework, by_when in collected.summary("first").items():
        ratio = by_when["later"]["first_over_later"]["median"]
        yield at_most(FRAMEWORK_NAMES[framework], ratio, 1.5, " x")


def _first_at_once(collected: Collected) -> str:
    """What it is where nothing gave the time."""
    found = {
        FRAMEWORK_NAMES[framework]: by_when["at once"]["first_over_later"]["median"]
        for framework, by_when in collected.summary("first").items()
    }
    texts = [f"{name} {number(ratio)} x" for name, ratio in found.items()]
    return f"right after `prepare`: {', '.join(texts)}" if texts else ""


def _memory(collected: Collected) -> Iterator[Figure]:
    for framework, name in FRAMEWORK_NAMES.items():
        found = collected.summary("resources").get(f"stepsave {framework}", {}).get("memory")
        if found and "limit_bytes" in found:
            over_bytes = found["peak_bytes"] - 2 * found["arena_bytes"]
            text = f"+{number(over_bytes / 2**20)} MiB"
            yield Figure(name, over_bytes, text, bool(found["within_limit"]))


def _growth(collected: Collected) -> Iterator[Figure]:
    for framework, name in FRAMEWORK_NAMES.items():
        found = collected.summary("resources").get(f"stepsave {framework}", {}).get("growth")
        if not found:
            continue
        early, late = found["early"], found["late"]
        grown = found["grown_bytes"]
        same = all(late[key] <= early[key] for key in ("threads", "open_files"))
        text = f"{number(grown / 1024)} KiB in {late['saves'] - early['saves']} saves"
        yield Figure(name, grown, text, same and grown <= GROWTH_BYTES)


def _restore_raw(collected: Collected) -> Iterator[Figure]:
    ratios = collected.summary("restore").get("stepsave restore", {}).get("ratios", {})
    labels = {"raw read warm": "into warm memory", "raw read fresh": "into fresh memory"}
    # Warm memory is the target's; any restore needs fresh memory, so that is shown beside it.
    strict = ratios.get("raw read warm")
    for key, label in labels.items():
        if strict and key in ratios:
            share = 1 / ratios[key]["median"]
            met = 1 / strict["median"] >= 0.7
            yield Figure(label, share, f"{number(share)} x", met)


def _restore_keras(collected: Collected) -> Iterator[Figure]:
    """Of what a raw read into fresh memory allows; see `_limit_of_load`."""
    summary = collected.summary("restore")
    ratios = summary.get("stepsave model", {}).get("ratios", {})
    if "keras load_weights" in ratios and "raw read fresh" in ratios:
        share = 1 / ratios["raw read fresh"]["median"]
        faster = number(1 / ratios["keras load_weights"]["median"])
        text = f"{number(share)} x: {faster} x as fast as Keras `load_weights` from HDF5"
        yield Figure("", share, text, share >= 0.8)


def _syncs(collected: Collected) -> Iterator[Figure]:
    for framework, name in FRAMEWORK_NAMES.items():
        found = collected.summary("resources").get(f"stepsave {framework}", {}).get("syscalls")
        if found:
            shards, syncs = found["shards"], found["syncs"]
            text = f"{number(syncs)} with {shards} shards"
            yield Figure(name, syncs, text, syncs <= 8 + shards)


def _limit_of_stall(collected: Collected) -> str:
    entry = collected.summary("engine").get("checked copy")
    return f"the copy with checksums: {number(entry['ratio']['median'])} x" if entry else ""


def _limit_of_fit(what: str, unit: str = " x") -> Callable[[Collected], str]:
    def limit(collected: Collected) -> str:
        result = collected.main_fits("jax")
        found = ((key, (subject(result, key) or {}).get(what)) for key in FLOORS)
        return ", ".join(
            f"{SUBJECTS[key].label}: {number(entry['median'])}{unit}"
            for key, entry in found
            if entry
        )

    return limit


def _limit_of_peer(key: str) -> Callable[[Collected], str]:
    """How much less than a peer's the least stall is that a save can have."""

    def limit(collected: Collected) -> str:
        result = collected.main_fits("jax")

        def stall_s(which: str) -> float:
            return (subject(result, which) or {}).get("stall_over_none_s", {}).get("median", 0)

        return ", ".join(
            f"{SUBJECTS[floor].label}: {number(stall_s(key) / stall_s(floor))} x"
            for floor in FLOORS
            if min(stall_s(key), stall_s(floor)) > 0
        )

    return limit


def _limit_of_durable(collected: Collected) -> str:
    """What it takes to copy first and to write then; the first is needed, the overlap is not."""
    summary = collected.summary("engine")
    if not summary:
        return ""
    copy_s, write_s = summary["memcpy"]["median"], summary["raw write"]["median"]
    return f"the copy, then the raw write: {number((copy_s + write_s) / write_s)} x"


def _limit_of_idle(collected: Collected) -> str:
    """What a callback that does nothing adds to the loop, and what two equal fits differ by."""
    texts: list[str] = []
    for backend, name in BACKEND_NAMES.items():
        result = collected.get(f"idle-{backend}")
        if result is not None and (found := subject(result, "bare")) is not None:
            bare = (found["loop_over_none_interval"]["median"] - 1) * 100
            noise = (result["summary"]["none_second_to_first"]["median"] - 1) * 100
            texts.append(f"{name} {bare:+.1f} % and {noise:+.1f} %")
    what = "a callback without hooks; no callback, a second time"
    return f"{what}: {', '.join(texts)}" if texts else ""


def _limit_of_cpu(collected: Collected) -> str:
    found = collected.summary("resources").get("floor numpy", {}).get("cpu")
    if not found:
        return ""
    return f"one thread, same work: {number(found['cpu_s_per_gb']['median'])} s"


def _limit_of_load(collected: Collected) -> str:
    ratios = collected.summary("restore").get("keras load_weights", {}).get("ratios", {})
    if "raw read fresh" not in ratios:
        return ""
    return f"that read: {number(ratios['raw read fresh']['median'])} x as fast as Keras"


def _is_stall(what: str) -> str:
    return f"true stall of {what}, against ours"


TARGETS = (
    Target(
        "stall of a save, 300 MB, against a two-thread memcpy",
        "at most 1.25 x",
        _engine("stall", 1.25),
        _limit_of_stall,
    ),
    Target(
        "true stall in `fit` on JAX, 300 MB every 10 steps, against a two-thread memcpy",
        "at most 1.5 x",
        _fit("stepsave", "stall_over_memcpy", 1.5),
        _limit_of_fit("stall_over_memcpy"),
    ),
    Target(
        "the loop of that `fit`, from its third save on, against no callback",
        "at most 1.12 x",
        _fit("stepsave", "loop_over_none", 1.12),
        _limit_of_fit("loop_over_none"),
    ),
    Target(
        _is_stall("Keras `BackupAndRestore`"),
        "at least 10 x",
        _fit("keras", "stall_over_stepsave", 10, least=True),
        _limit_of_peer("keras"),
    ),
    Target(
        _is_stall("Keras `OrbaxCheckpoint`, as it comes"),
        "at least 25 x",
        _fit("orbax_keras", "stall_over_stepsave", 25, least=True),
        _limit_of_peer("orbax_keras"),
    ),
    Target(
        _is_stall("Keras `OrbaxCheckpoint`, tuned"),
        "at least 10 x",
        _fit("orbax_keras_tuned", "stall_over_stepsave", 10, least=True),
        _limit_of_peer("orbax_keras_tuned"),
    ),
    Target(
        "time until durable, against a raw `O_DIRECT` write and its `fsync`",
        "at most 1.15 x",
        _engine("durable", 1.15),
        _limit_of_durable,
    ),
    Target("CPU time per GB", "at most 0.25 s", _cpu, _limit_of_cpu),
    Target("idle, steps of 200 µs", "at most 1 %", _idle, _limit_of_idle),
    Target(
        "10,000 variables, 40 MB: stall over memcpy, per variable",
        "at most 6 µs",
        _variables,
    ),
    Target(
        "first save against later ones, where compiling gave the time for its memory to come",
        "at most 1.5 x",
        _first,
        _first_at_once,
    ),
    Target("peak memory over the two arenas", "at most +64 MiB", _memory),
    Target("growth of memory, threads, open files", "none", _growth),
    Target(
        "restore from a cold disk, 1 GB: speed against a raw `O_DIRECT` read",
        "at least 0.7 x",
        _restore_raw,
    ),
    Target(
        "restore into a model: speed against a raw `O_DIRECT` read into fresh memory",
        "at least 0.8 x",
        _restore_keras,
        _limit_of_load,
    ),
    Target("syncs per save", "at most 8 and the shards", _syncs),
    Target(
        "from `fit` to the end of its first batch, over no callback",
        "at most 0.3 s",
        starts_table.over_none,
        starts_table.limit_of_start,
    ),
    Target(
        "the same of a resume, files warm or cold, against Keras `BackupAndRestore`",
        "at most 1 x",
        starts_table.resume_over_keras,
        starts_table.limit_of_resume,
    ),
    Target(
        "the first save of that `fit`, against later ones",
        "at most 1.5 x",
        starts_table.first_save,
        starts_table.limit_of_first_save,
    ),
    Target(
        "peak memory of a resumed training, against an uninterrupted one",
        "at most 1.05 x",
        starts_table.resume_peak,
        starts_table.limit_of_peak,
    ),
    Target(
        "`import stepsave`", "at most 0.2 s", starts_table.imported, starts_table.limit_of_import
    ),
    Target("`stepsave --help`", "at most 0.3 s", starts_table.helped, starts_table.limit_of_help),
    Target(
        "95 % of a state frozen, 300 MB: bytes written, against all changing",
        "at most 0.12 x",
        lambda collected: changes_table.frozen(collected, "disk_bytes", 0.12),
        changes_table.limit_of_bytes,
    ),
    Target(
        "stall of such a save, against all changing",
        "at most 1 x",
        lambda collected: changes_table.frozen(collected, "stall_s", 1),
    ),
)
