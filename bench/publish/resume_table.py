"""The table of what it takes to resume in the midst of an epoch, by source of the data."""

from __future__ import annotations

from bench.publish.collected import BACKEND_NAMES, Collected, Result, duration, markdown_table

DATA_PACKAGES = ("grain", "torchdata")


def sections(collected: Collected) -> list[tuple[str, list[str]]]:
    """Title and lines, for each batch that was resumed at; none where nothing was measured."""
    found: dict[int, dict[str, Result]] = {}
    for backend in BACKEND_NAMES:
        result = collected.get(f"resume-{backend}")
        if result is not None:
            found.setdefault(result["settings"]["batch"], {})[backend] = result
    return [
        (f"Time to resume at batch {batch:,}", [*_caption(results), "", *_table(results)])
        for batch, results in sorted(found.items())
    ]


def _caption(results: dict[str, Result]) -> list[str]:
    first = next(iter(results.values()))
    settings, packages = first["settings"], first["machine"]["packages"]
    versions = [f"{name} {packages[name]}" for name in DATA_PACKAGES if packages.get(name)]
    rounds = " and ".join(dict.fromkeys(str(r["settings"]["repeats"]) for r in results.values()))
    text = (
        f"How much longer a resumed `fit` takes from the begin of the epoch until it has trained "
        f"a batch, if it goes on after {settings['batch']:,} of {settings['batches']:,} batches "
        f"instead of after {settings['near_batch']}; and, measured in the same rounds, how long "
        f"reading the batches between takes. Batches of {settings['batch_size']} images of "
        f"{settings['values']} bytes, which all but arrays turn into float32 as they load them; "
        "loading them costs next to nothing, so what is read and passed over takes longer with "
        f"real data. {rounds} rounds; each resumed batch was the one that was due. "
    )
    return [f"{text}{', '.join(versions)}."]


def _table(results: dict[str, Result]) -> list[str]:
    head = [""]
    for backend in results:
        head += [BACKEND_NAMES[backend], f"{BACKEND_NAMES[backend]}, reading"]
    sources = dict.fromkeys(
        source for result in results.values() for source in (*result["summary"], *result["failed"])
    )
    rows = [
        [source, *(cell for result in results.values() for cell in _cells(result, source))]
        for source in sources
    ]
    return markdown_table(head, rows)


def _cells(result: Result, source: str) -> list[str]:
    if source in result["failed"]:
        return [f"failed: {result['failed'][source]}", ""]
    found = result["summary"].get(source)
    if found is None:
        return ["", ""]
    return [duration(found["longer_s"], bold=True), duration(found["read_s"])]
