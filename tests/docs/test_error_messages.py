"""Each message that users may meet is in docs/errors.md, and some test provokes it."""

import ast
import collections
import re
from pathlib import Path

import pytest
from messages_support import GAP, Message, messages

TESTS = Path(__file__).parent.parent
PAGE = TESTS.parent / "docs/errors.md"
MESSAGES = messages()
ENTRY = re.compile(r"^- (`+) ?(.+?) ?\1: \S", re.MULTILINE)
SHARED = 10  # characters in a row by which a text in a test is taken for that of a message
ALIKE = 4  # messages that may have them in common


def entries() -> list[tuple[str, str]]:
    """Kind of error, and the part of its text, that each entry is about."""
    sections = re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)[1:]
    return [
        (section.split("\n")[0].strip(), pattern)
        for section in sections
        for _, pattern in ENTRY.findall(section)
    ]


def is_about(pattern: str, message: Message) -> bool:
    parts = map(re.escape, pattern.split(GAP))
    return re.search(".*?".join(parts), message.text) is not None


def test_each_message_has_an_entry_that_says_why_it_comes_and_what_to_do():
    known = entries()
    missing = [
        message
        for message in MESSAGES
        if not any(
            message.kind in ("", kind) and is_about(pattern, message) for kind, pattern in known
        )
    ]
    assert not missing, "\n".join(f"{m.place}: {m.kind}: {m.text}" for m in missing)


@pytest.mark.parametrize(("kind", "pattern"), entries())
def test_an_entry_is_about_a_message_that_there_is(kind, pattern):
    assert len(re.findall(r"\w", pattern)) >= 8, "says too little to be found by"
    assert any(message.kind in ("", kind) and is_about(pattern, message) for message in MESSAGES)


def texts_of_tests() -> set[str]:
    """Texts in test modules, but those that say what a function does or what must not be."""
    found = set()
    for path in TESTS.rglob("test_*.py"):
        if path == Path(__file__):
            continue
        tree = ast.parse(path.read_text())
        passed_over = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                passed_over.add(node.value)
            if isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.NotIn):
                passed_over.add(node.left)
        found |= {
            node.value.replace("\\", "")
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and node not in passed_over
        }
    return found


def runs_of(text: str) -> set[str]:
    """All runs of so many characters in a row between two gaps."""
    return {
        part[i : i + SHARED]
        for part in text.split(GAP)
        for i in range(max(1, len(part) - SHARED + 1))
        if len(part) >= min(SHARED, max(map(len, text.split(GAP))))
    }


def test_each_message_is_provoked_by_a_test():
    alike = collections.defaultdict(set)
    for message in MESSAGES:
        for run in runs_of(message.text):
            alike[run].add(message.place)
    tested = texts_of_tests()
    untested = []
    for message in MESSAGES:
        runs = runs_of(message.text)
        # Some messages have nothing of their own, such as those about sizes of files.
        own = {run for run in runs if len(alike[run]) <= ALIKE} or runs
        if not any(run in text for text in tested for run in own):
            untested.append(message)
    assert not untested, "\n".join(f"{m.place}: {m.kind}: {m.text}" for m in untested)
