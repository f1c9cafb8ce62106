"""Writes the published figures: from committed JSON into the README, never by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.engine import RESULTS

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
NAMES = {"numpy": "NumPy", "jax": "JAX", "torch": "PyTorch"}


def main() -> None:
    """Replaces the part of the README between the two marks."""
    before, _, rest = README.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    tables = [table(json.loads(path.read_text())) for path in sorted(RESULTS.glob("*/engine.json"))]
    README.write_text(f"{before}{BEGIN}\n{''.join(tables)}{END}{after}")


def table(result: dict[str, Any]) -> str:
    """One machine's figures as Markdown."""
    facts, settings = result["machine"], result["settings"]
    summary = result["summary"]
    megabytes = settings["state_bytes"] / 1e6
    caption = (
        f"{facts['cpus']} cores of {facts['cpu']}, Linux {facts['kernel']}, "
        f"{facts['file_system']}; {megabytes:.0f} MB of state, "
        f"{settings['rounds']} interleaved rounds; median (10th to 90th percentile)."
    )
    lines = [
        caption,
        "",
        "| | time | ratio to the floor |",
        "|---|---|---|",
        f"| floor: warm copy by two threads | {_ms(summary['memcpy'])} | |",
        *_rows(summary, "stall", "stall of a save"),
        f"| floor: `O_DIRECT` write and sync | {_ms(summary['raw write'])} | |",
        *_rows(summary, "background", "from the snapshot to the commit"),
        *_rows(summary, "durable", "time until durable, stall included"),
    ]
    return "\n".join(lines) + "\n"


def _rows(summary: dict[str, Any], kind: str, what: str) -> list[str]:
    return [
        f"| {what}, {NAMES[name]} arrays | {_ms(summary[f'{name} {kind}'])} "
        f"| {_ratio(summary[f'{name} {kind}'])} |"
        for name in NAMES
        if f"{name} {kind}" in summary
    ]


def _ms(entry: dict[str, Any]) -> str:
    median, low, high = (entry[key] * 1e3 for key in ("median", "p10", "p90"))
    return f"{median:.1f} ms ({low:.1f} to {high:.1f})"


def _ratio(entry: dict[str, Any]) -> str:
    ratio = entry["ratio"]
    return f"**{ratio['median']:.2f}** ({ratio['p10']:.2f} to {ratio['p90']:.2f})"


if __name__ == "__main__":
    main()
