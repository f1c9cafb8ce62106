"""Writes what the campaigns found into the documents: from kept JSON, never by hand."""

import argparse
import json
from pathlib import Path

from bench.publish.collected import markdown_table
from bench.publish.documents import replace

from proof.chaos import chaos_table
from proof.record import RESULTS, ROOT

DOCUMENT = ROOT / "docs/durability.md"
README = ROOT / "README.md"


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m proof.publish", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    parser.add_argument(
        "--chaos",
        type=Path,
        nargs="*",
        default=[DOCUMENT, README],
        help="which documents get the table of the public tester, if it was run",
    )
    options = parser.parse_args(arguments)
    replace(options.document, "proof", "\n".join(table(options.results)))
    if (options.results / "mutations.json").exists():
        replace(options.document, "mutations", "\n".join(mutations_table(options.results)))
    if (options.results / "chaos.json").exists():
        for document in options.chaos:
            lines = chaos_table(options.results, is_brief=document.name == README.name)
            replace(document, "chaos", "\n".join(lines))


def table(results):
    """What was tried on backups, and what came of it: of chaos and mutations there are others."""
    documents = [json.loads(path.read_text()) for path in sorted(results.glob("*.json"))]
    documents = [one for one in documents if one["campaign"] not in ("chaos", "mutations")]
    cases, bad = (sum(r[key] for d in documents for r in d["rows"]) for key in ("cases", "bad"))
    machines = {_machine(document) for document in documents}
    small = ", ".join(document["campaign"] for document in documents if document["quick"])
    return [
        f"{cases:,} cases, {bad:,} bad; taken on {'; '.join(sorted(machines))}.",
        *([f"A sample only of: {small}."] if small else []),
        "",
        *markdown_table(["what was done", "cases", "bad", ""], _rows(documents)),
    ]


def mutations_table(results):
    """How the product was broken, and how often nobody noticed."""
    document = json.loads((results / "mutations.json").read_text())
    count, missed = (sum(row[key] for row in document["rows"]) for key in ("cases", "bad"))
    return [
        f"{count:,} mutations, {missed:,} not noticed; taken on {_machine(document)}.",
        *(["A sample only."] if document["quick"] else []),
        "",
        *markdown_table(["what was broken", "mutations", "not noticed", ""], _rows([document])),
    ]


def _rows(documents):
    return [
        [row["what"], f"{row['cases']:,}", f"{row['bad']:,}", row["notes"]]
        for document in documents
        for row in document["rows"]
    ]


def _machine(document):
    facts = document["machine"]
    return (
        f"{facts['cpus']} cores of {facts['cpu']}, Linux {facts['kernel']}, "
        f"{facts['file_system']}, Python {facts['python']}"
    )


if __name__ == "__main__":
    main()
