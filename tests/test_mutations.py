"""The records of mutations fit the product as it is, and some of them are tried."""

import ast
import collections
import dataclasses
import functools
import random

import pytest
from proof import mutations
from proof.mutations import DoesNotApplyError, Mutation, Verdict, Workshop, read_mutations

MUTATIONS = read_mutations()
SOURCE = mutations.ROOT / "src/stepsave"
QUICK_AREAS = ("checksums", "hostile", "locks", "order", "syncs")
QUICK_FILES = ("tests/format/", "tests/store/", "tests/engine/test_commit.py", "tests/test_threads")

WRONG = Mutation(
    "of tests",
    "the checksum of nothing",
    "format/checksum.py",
    'crc32c = cast("Callable[..., int]", checksums.crc32c)',
    'crc32c = cast("Callable[..., int]", checksums.crc32)',
    ("tests/format/test_checksum.py::test_the_checksum_is_crc_32c",),
)


TEST = WRONG.tests[0]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    return Workshop(tmp_path_factory.mktemp("workshop"), seed=1)


def test_each_mutation_applies_at_one_place_and_leaves_a_module():
    problems = []
    for mutation in MUTATIONS:
        try:
            ast.parse(mutation.applied((SOURCE / mutation.file).read_text()), mutation.what)
        except (DoesNotApplyError, SyntaxError) as e:
            problems.append(str(e))
    assert problems == []


def test_each_mutation_is_told_from_the_others_by_its_sentence():
    assert len(MUTATIONS) > 100
    counts = collections.Counter(mutation.what for mutation in MUTATIONS)
    assert [what for what, count in counts.items() if count > 1] == []


def test_each_mutation_names_tests_that_there_are():
    for mutation in MUTATIONS:
        assert mutation.tests, mutation.what
        for test in mutation.tests:
            file, *names = mutations.without_parameters(test).split("::")
            known = defined_in(file)
            if names[1:]:  # what a class may have inherited
                known = known.union(*map(defined_in, CONTRACTS))
            assert known.issuperset(names), test


CONTRACTS = [str(path) for path in sorted((SOURCE / "testing").glob("*contract.py"))]


@functools.cache
def defined_in(file):
    tree = ast.parse((mutations.ROOT / file).read_text())
    kinds = ast.FunctionDef, ast.ClassDef
    return {node.name for node in ast.walk(tree) if isinstance(node, kinds)}


@pytest.mark.parametrize("text", ["", "once, and once more: once"])
def test_a_mutation_that_does_not_apply_is_an_error(text):
    mutation = dataclasses.replace(WRONG, old="once", new="twice")
    with pytest.raises(DoesNotApplyError, match=r"the checksum of nothing: [03] times in format"):
        mutation.applied(text)
    assert mutation.applied("all at once") == "all at twice"
    with pytest.raises(DoesNotApplyError):
        dataclasses.replace(mutation, new="once").applied("all at once")


def test_what_is_wrong_is_caught_and_the_copy_is_as_it_was(workshop):
    path = workshop.source / "stepsave" / WRONG.file
    before = path.read_text()
    verdict = workshop.try_mutation(WRONG)
    assert verdict.is_caught, verdict
    assert "assert" in verdict.how
    assert path.read_text() == before


def test_what_is_not_wrong_is_not_caught(workshop):
    more = "tests/format/test_blueprint.py"
    same = dataclasses.replace(WRONG, new=f"{WRONG.old}  # the same", tests=(*WRONG.tests, more))
    verdict = workshop.try_mutation(same)
    assert verdict == Verdict(is_caught=False, how=f"nobody noticed: {TEST}, {more}")


@pytest.mark.parametrize("new", ["crc32c = cast(", WRONG.old.replace("checksums.", "checksum.")])
def test_what_cannot_be_imported_is_not_caught(workshop, new):
    verdict = workshop.try_mutation(dataclasses.replace(WRONG, new=new))
    assert not verdict.is_caught
    assert verdict.how.startswith("broken, not wrong"), verdict


def test_a_hang_is_caught_by_the_limit_of_the_test_that_it_is_in(workshop):
    hangs = "def crc32c(*_):\n    while True:\n        pass"
    verdict = workshop.try_mutation(dataclasses.replace(WRONG, new=hangs, limit_s=3))
    assert verdict == Verdict(is_caught=True, how=f"{TEST}: the time limit of the test")


@pytest.mark.parametrize(
    ("status", "passed", "failed", "broken", "verdict"),
    [
        (None, (), {}, (), (False, True)),  # it hangs, and no limit of a test has ended it
        (1, (), {TEST: "assert 1 == 2"}, (), (True, True)),
        (1, (), {TEST: "NameError: name 'x' is not defined"}, (), (False, True)),
        (1, (), {TEST: mutations.LIMIT}, (), (False, True)),  # a hang that is not expected
        (1, (), {f"{TEST}_else": "assert 1 == 2"}, (), (False, True)),
        (2, (), {}, (f"{TEST}, collection: SyntaxError",), (False, True)),
        (1, (), {}, (f"{TEST}, setup: OSError",), (False, True)),
        (0, (TEST,), {}, (), (False, True)),
        (0, (), {}, (), (False, False)),  # skipped
        (3, (), {TEST: "assert 1 == 2"}, (), (False, True)),
        (-11, (), {}, (), (False, True)),
    ],
)
def test_a_verdict_is_by_what_has_failed_and_why(status, passed, failed, broken, verdict):
    outcome = mutations.Outcome(status, "the end of it", set(passed), failed, list(broken), set())
    found = mutations.judge(WRONG, outcome)
    assert (found.is_caught, found.is_tried) == verdict


def test_some_mutations_are_caught(workshop):
    quick = [
        mutation
        for mutation in MUTATIONS
        if mutation.area in QUICK_AREAS and all(t.startswith(QUICK_FILES) for t in mutation.tests)
    ]
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")  # noqa: T201  shown if the test fails
    for mutation in random.Random(seed).sample(quick, 3):
        verdict = workshop.try_mutation(mutation)
        assert verdict.is_caught or not verdict.is_tried, f"{mutation.what}: {verdict.how}"
