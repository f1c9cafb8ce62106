"""Stores that fail on purpose, over a directory or a bucket."""

from __future__ import annotations

import dataclasses
import errno
import fnmatch
import functools
import math
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Literal, NamedTuple

from stepsave.errors import BucketError
from stepsave.store.bucket import BucketStore
from stepsave.store.local import TEMPORARY_SUFFIX, LocalStore
from stepsave.store.places import Target, open_store

__all__ = ("CHANGES", "READS", "Call", "Died", "FaultStore", "When")

When = Literal["before", "middle", "after"]
_Work = Callable[..., Any]

CHANGES = (
    "make_directory",
    "remove",
    "remove_below",
    "remove_empty_directory",
    "rename",
    "replace",
    "sync_directory",
    "sync_tree",
    "write",
    "write_all",
    "write_array",
    "write_direct",
    "write_if",
)
"""The operations of stores that change something; a directory has some, a bucket others."""

READS = (
    "check_at_most",
    "check_directory",
    "check_sizes",
    "exists",
    "is_directory",
    "list",
    "read",
    "read_into",
    "read_versioned",
    "size_bytes",
    "used_bytes",
    "walk",
)
"""Those that only look."""


class Died(BaseException):
    """The process is to be thought of as dead. Not an `Exception`, as the end of one is none."""


class Call(NamedTuple):
    """One call of an operation.

    Attributes:
        kind: The operation.
        path: Where; the first of several; empty for the directory itself.
    """

    kind: str
    path: str


@dataclasses.dataclass(slots=True)
class _Fault:
    """What is to go wrong; `wait` calls before it are to go well."""

    kinds: Collection[str]
    path: str
    wait: int
    times: float
    when: When
    error: BaseException

    def is_due(self, call: Call) -> bool:
        if call.kind not in self.kinds or not fnmatch.fnmatchcase(call.path, self.path):
            return False
        self.wait -= 1
        return -self.times <= self.wait < 0


class FaultStore:
    """A store whose operations fail, or after which the process is as good as dead.

    It is what it is made over in every other respect, and may be passed wherever a backup directory
    is named:

        ```python
        store = FaultStore("my_backup")
        store.fail("replace", nth=2, error=OSError(errno.ENOSPC, "disk full"))
        model.fit(x, y, callbacks=[stepsave.BackupAndRestore(store)])
        ```

    An operation that another one is made of counts as well: a `replace` is a `write` too.

    Attributes:
        calls: What was called, in order, whether it went well or not.
        is_dead: Whether the process is to be thought of as dead: each call raises `Died`.
    """

    calls: list[Call]
    is_dead: bool
    _faults: list[_Fault]
    _guard: threading.Lock

    def __new__(cls, target: Target) -> FaultyDirectory | FaultyBucket:
        """Makes one over a place.

        Args:
            target: Its path or its URL; or a store, such as one of a class of your own.

        Raises:
            ValueError: If it is one of these already.
            BackupDirectoryError: If it cannot be used.
        """
        store = open_store(target)
        if isinstance(store, FaultStore):
            raise ValueError(  # noqa: TRY004  that it is a store is right
                f"Invalid value for argument `target`. Received: a FaultStore of {store.root}. "
                "Expected what is below it."
            )
        faulty = FaultyDirectory if isinstance(store, LocalStore) else FaultyBucket
        of = type(store)
        kind = faulty if issubclass(faulty, of) else type(f"Faulty{of.__name__}", (faulty, of), {})
        made = object.__new__(kind)
        made.__dict__.update(vars(store))
        made.calls, made.is_dead = [], False
        made._faults, made._guard = [], threading.Lock()
        return made

    def __init__(self, target: Target) -> None:
        """Has nothing left to do."""

    def __init_subclass__(cls) -> None:
        if FaultStore in cls.__bases__:
            for kind in (*CHANGES, *READS):
                real = getattr(cls, kind, None)
                if real is not None:
                    setattr(cls, kind, cls._make_faulty(kind, real))

    @classmethod
    def _make_faulty(cls, kind: str, real: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(real)
        def operation(self: FaultStore, *args: Any, **options: Any) -> Any:
            def work(kind: str, *args: Any, **options: Any) -> Any:
                return getattr(super(cls, self), kind)(*args, **options)

            fault = self._note(Call(kind, _path_of(args)))
            if fault is None:
                return work(kind, *args, **options)
            if fault.when == "after":
                work(kind, *args, **options)
            elif fault.when == "middle" and kind in _HALVES:
                _HALVES[kind](work, *args, **options)
            self.is_dead = self.is_dead or isinstance(fault.error, Died)
            raise fault.error

        return operation

    def fail(
        self,
        *kinds: str,
        path: str = "*",
        nth: int = 1,
        when: When = "before",
        error: BaseException | None = None,
        times: int | None = 1,
    ) -> None:
        """Has calls fail.

        Args:
            kinds: Which operations, of `CHANGES` and `READS`; all `CHANGES` if none is named.
            path: Those there only, with wildcards as in file names; `*` stands for slashes too.
            nth: How many such calls from now is the one that fails: 1 for the next.
            when: Whether it has done nothing by then, or half of its work, or all. What is done at
                one stroke has no half, and has done nothing.
            error: What is raised; an input/output error of a disk, or no answer of a bucket, if it
                is None.
            times: So many calls in a row; None for all until `mend`.

        Raises:
            ValueError: If this store has no such operation.
        """
        default = BucketError("no answer, on purpose") if isinstance(self, BucketStore) else None
        self._plan(
            kinds, path, nth, when, times, error or default or OSError(errno.EIO, "on purpose")
        )

    def die(self, *kinds: str, path: str = "*", nth: int = 1, when: When = "before") -> None:
        """Has a call be the last one: it raises `Died`, and so does each call after it.

        What the store has in its place is then what the end of the process would have left there.
        Open the place anew to see what the next process finds.

        Args:
            kinds: Which operations, as in `fail`.
            path: Those there only.
            nth: How many such calls from now is the last.
            when: How much of its work it has done by then.

        Raises:
            ValueError: If this store has no such operation.
        """
        self._plan(kinds, path, nth, when, 1, Died("on purpose"))

    def mend(self) -> None:
        """Has nothing fail any more. The dead stay dead."""
        with self._guard:
            self._faults.clear()

    def _plan(
        self,
        kinds: Collection[str],
        path: str,
        nth: int,
        when: When,
        times: int | None,
        error: BaseException,
    ) -> None:
        has = [kind for kind in (*CHANGES, *READS) if hasattr(self, kind)]
        unknown = set(kinds) - set(has)
        if unknown or nth < 1 or when not in ("before", "middle", "after"):
            raise ValueError(
                f"Invalid value for argument `kinds`, `nth` or `when`. Received: kinds={kinds}, "
                f"nth={nth}, when={when!r}. Expected some of {', '.join(has)}; 1 or more; "
                '"before", "middle" or "after".'
            )
        in_a_row = math.inf if times is None else times
        fault = _Fault(kinds or CHANGES, path, nth - 1, in_a_row, when, error)
        with self._guard:
            self._faults.append(fault)

    def _note(self, call: Call) -> _Fault | None:
        """Notes a call; returns how it is to fail, if it is to."""
        with self._guard:
            if self.is_dead:
                raise Died("on purpose, before")
            self.calls.append(call)
            # Each is asked, as each counts.
            due = [fault for fault in self._faults if fault.is_due(call)]
            return due[0] if due else None


class FaultyDirectory(FaultStore, LocalStore):
    """What `FaultStore` makes over a directory."""


class FaultyBucket(FaultStore, BucketStore):
    """What `FaultStore` makes over a bucket."""


def _path_of(args: tuple[Any, ...]) -> str:
    first = args[0] if args else ""
    return first if isinstance(first, str) else next(iter(first), "")


def _half_of_files(work: _Work, files: Mapping[str, bytes]) -> None:
    work("write_all", dict(list(files.items())[: len(files) // 2]))


def _half_of_bytes(work: _Work, path: str, data: bytes) -> None:
    work("write", path, data[: len(data) // 2])


def _half_of_range(
    work: _Work, path: str, data: memoryview, ranges: Iterable[tuple[int, int]] | None = None
) -> None:
    begin, end = next(iter(ranges or ((0, len(data)),)))
    work("write_direct", path, data, ((begin, (begin + end) // 2),))


def _half_of_pieces(
    work: _Work, path: str, size_bytes: int, pieces: Iterable[Any], *told: Any
) -> None:
    pieces = list(pieces)
    work("read_into", path, size_bytes, pieces[: len(pieces) // 2], *told)


def _written_but_not_renamed(work: _Work, path: str, data: bytes) -> None:
    work("write", path + TEMPORARY_SUFFIX, data)


def _parents(work: _Work, path: str) -> None:
    parent = path.rpartition("/")[0]
    if parent:
        work("make_directory", parent)


def _every_second(work: _Work, prefix: str) -> None:
    for path in work("list", prefix)[::2]:
        work("remove", path)


_HALVES: dict[str, Callable[..., None]] = {
    "make_directory": _parents,
    "read_into": _half_of_pieces,
    "remove_below": _every_second,
    "replace": _written_but_not_renamed,
    "write": _half_of_bytes,
    "write_all": _half_of_files,
    "write_direct": _half_of_range,
}
"""Does half of the work, where an operation is not done at one stroke."""
