"""What may be replaced while it is read: read again then, and only then."""

import itertools

import pytest

from stepsave.engine.attempts import ATTEMPTS, ReplacedError, read_lasting


def test_what_was_damaged_is_read_again_only_if_something_else_is_there():
    tried = []

    def read(seen, attempt):
        tried.append((seen, attempt))
        return seen, "damage"

    there = iter("abcc")  # looked at before and after each attempt
    assert read_lasting(lambda: next(there), read) == "c"
    assert tried == [("a", 0), ("c", 1)]


def test_what_was_whole_is_not_looked_at_again():
    there = iter("ab")
    assert read_lasting(lambda: next(there), lambda seen, _: (seen, "")) == "a"
    assert next(there) == "b"


def test_an_error_is_raised_if_the_same_is_still_there_and_forgotten_if_not():
    def read(seen, attempt):
        if attempt == 0 or seen == "b":
            raise OSError(seen)
        return seen, ""

    there = iter("abc")
    assert read_lasting(lambda: next(there), read) == "c"
    with pytest.raises(OSError, match=r"^b$"):
        read_lasting(lambda: "b", read)


@pytest.mark.parametrize("raises", [True, False])
def test_after_some_attempts_it_is_given_up_with_what_the_last_one_met(raises):
    there, tried = itertools.count(), []

    def read(seen, attempt):
        tried.append(attempt)
        if raises:
            raise OSError(f"no {seen}")
        return seen, f"no {seen}"

    with pytest.raises(ReplacedError, match=f"^no {2 * ATTEMPTS - 2}$") as e:
        read_lasting(lambda: next(there), read)
    assert tried == [*range(ATTEMPTS)]
    assert isinstance(e.value.__cause__, OSError) == raises
