"""How a state gets into an arena: who copies what, and how far all of it has come.

How far is known per shard, so that the first bytes can be written while the last are still on
their way from a device.
"""

from __future__ import annotations

import bisect
import itertools
import queue
import threading
from collections.abc import Iterator, Sequence

from stepsave.format.records import LayoutPlan
from stepsave.snapshot.contents import Attention, Contents, Held
from stepsave.snapshot.runs import Pack, Run, Slab, Source

__all__ = ("Filling",)

PIECE_BYTES = 8 << 20
"""How much is written at least, while the rest is still on its way: enough for the disk."""

_BRIDGE_BYTES = 64 << 10
"""What has not changed is written too between two changes that are nearer: one write is cheaper."""


class Filling:
    """One state on its way into an arena, shared by those who copy and those who write.

    Either the caller copies (`work`), helped by threads of a crew (`help`), and nobody else looks
    before he is done; or threads of the crew do all of it (`lead`, `help`), with writers close
    behind (`final`). The caller takes no lock, see `stepsave.threads`: what he does can be
    interrupted anywhere, and is then ended by `give_up`.
    """

    def __init__(
        self,
        runs: Sequence[Run],
        plan: LayoutPlan,
        source: Source,
        held: Held,
        attention: Attention,
        *,
        is_led: bool = False,
    ) -> None:
        """Begins nothing yet.

        Args:
            runs: The pieces to fill.
            plan: Where they lie.
            source: The state.
            held: What they hold, kept current.
            attention: Which of them to ask about.
            is_led: Whether threads of the crew do all of it.
        """
        self._runs = runs
        self._held = held
        self._attention = attention
        self._source: Source | None = source
        self._shard_bytes = plan.shard_bytes
        # Shared by those who fill. Taking the next is one call into C: none is taken twice.
        self._packs = iter([i for i, run in enumerate(runs) if isinstance(run, Pack)])
        self._slabs = iter([i for i, run in enumerate(runs) if isinstance(run, Slab)])
        self._is_done = bytearray(len(runs))
        self._error: BaseException | None = None
        self._is_given_up = False
        # Of the crew's threads. Each changes the number under the lock, then looks whether it is
        # still wanted; `give_up` says that it is not, then looks at the number. So one of the two
        # sees the other.
        self._changed = threading.Condition()
        self._at_work = 0
        self._gone: queue.SimpleQueue[None] = queue.SimpleQueue()  # one for each that has gone
        self._progress = _Progress(runs, plan) if is_led else None

    @property
    def held(self) -> Held:
        """What the arena holds, when the whole state is in it."""
        return self._held

    @property
    def is_complete(self) -> bool:
        """Whether the whole state is in the arena."""
        return 0 not in self._is_done

    def work(self) -> None:
        """Fills runs until none is left; returns when the whole state is in the arena.

        Raises:
            BaseException: What went wrong, here or in a helper; nobody then goes on.
        """
        try:
            source = self._source
            self._check()  # a helper may have failed already
            if source is not None:  # or helpers have filled all of it before this thread came to it
                for number in itertools.chain(self._packs, self._slabs):
                    self._fill(number, source)
                    self._is_done[number] = 1
                    self._check()
            while not self.is_complete:
                self._check()
                self._gone.get()  # what is open, a helper has taken
        except BaseException:
            # Not the error itself: its traceback would keep alive whatever the caller had.
            self._error = self._error or InterruptedError("the caller gave the save up")
            raise
        finally:
            self._source = None  # while views of a JAX array live, donating it is a copy

    def help(self) -> None:
        """Fills runs, in a thread of a crew, while another thread is at it.

        Only large chunks: copying small ones is mostly Python, and two threads that take
        turns at the interpreter's lock for each of them are slower than one.
        """
        self._join(self._slabs)

    def lead(self) -> None:
        """Fills runs until none is left, in a thread of a crew; the caller goes on meanwhile."""
        self._join(itertools.chain(self._packs, self._slabs))

    def _join(self, numbers: Iterator[int]) -> None:
        with self._changed:
            self._at_work += 1
        source = None
        try:
            source = self._source
            # What is led ends whole: transfers into the arena may be under way.
            if source is not None and not self._is_given_up:
                for number in numbers:
                    self._fill(number, source)
                    self._note(number)
                    if self._error is not None:
                        break
        except BaseException as e:  # noqa: BLE001  raised by all who wait for the state
            self._error = self._error or e
        finally:
            source = None
            with self._changed:
                self._at_work -= 1
                if self._error is not None or self.is_complete:
                    self._source = None
                self._changed.notify_all()
            self._gone.put(None)

    def _fill(self, number: int, source: Source) -> None:
        held = self._held.now[number]
        asks = self._attention.asks(number)
        self._runs[number].fill(source, held, asks=asks)
        if asks:
            self._attention.note(number, held)

    def _note(self, number: int) -> None:
        if self._progress is None:
            self._is_done[number] = 1
            return
        with self._changed:
            self._is_done[number] = 1
            if self._progress.advance(self._is_done):
                self._changed.notify_all()

    def give_up(self) -> None:
        """Has those end who still copy. On return the arena is nobody's.

        For the caller, who has not handed the state over.
        """
        self._is_given_up = True
        if self._progress is None:
            self._error = self._error or InterruptedError("the save was given up")
            self._source = None
        self.wait_quiet()

    def wait_quiet(self) -> None:
        """Returns when nobody copies any more: all is in the arena, or given up. For the caller."""
        while self._is_busy:
            self._gone.get()

    @property
    def _is_busy(self) -> bool:
        is_over = self.is_complete or self._is_given_up or self._error is not None
        return bool(self._at_work) or not is_over

    def wait_left(self) -> None:
        """The same for threads of a crew."""
        with self._changed:
            while self._is_busy:
                self._changed.wait()

    def final(self, shard: int) -> Iterator[int]:
        """Yields how many bytes of a shard are final, each time more, in the end all.

        For threads of a crew.

        Raises:
            BaseException: What went wrong when the state was copied.
        """
        progress = self._progress
        if progress is None:
            self._check()
            assert self.is_complete, "nobody writes before the caller has copied"
            yield self._shard_bytes
            return
        seen_bytes = 0
        while seen_bytes < self._shard_bytes:
            with self._changed:
                while progress.final_bytes[shard] == seen_bytes:
                    self._check()
                    self._changed.wait()
                seen_bytes = progress.final_bytes[shard]
            yield seen_bytes

    def ranges(self, shard: int, written: Contents | None = None) -> Iterator[tuple[int, int]]:
        """Yields what of a shard is to be written next, from and to; in the end all of it.

        Args:
            shard: Its number.
            written: What is there already, whatever else it is; None if that is not known.

        Raises:
            BaseException: As `final`.
        """
        begin_bytes = 0
        for end_bytes in self.final(shard):
            if written is None:
                yield begin_bytes, end_bytes
            else:
                yield from _bridge(self._stale(shard, written, begin_bytes, end_bytes))
            begin_bytes = end_bytes

    def _stale(
        self, shard: int, written: Contents, begin_bytes: int, end_bytes: int
    ) -> Iterator[tuple[int, int]]:
        first = bisect.bisect_left(self._runs, shard, key=lambda run: run.shard)
        for number in range(first, len(self._runs)):
            run = self._runs[number]
            if run.shard != shard:
                break
            if begin_bytes < run.end_bytes <= end_bytes:
                yield from run.stale(self._held.now[number], written[number])

    def _check(self) -> None:
        if self._error is not None:
            raise self._error


def _bridge(ranges: Iterator[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Joins ranges that are near each other."""
    joined: tuple[int, int] | None = None
    for begin, end in ranges:
        if joined is not None and begin - joined[1] > _BRIDGE_BYTES:
            yield joined
            joined = None
        joined = (begin if joined is None else joined[0]), end
    if joined is not None:
        yield joined


class _Progress:
    """How much of each shard is final, counted as its runs are done."""

    def __init__(self, runs: Sequence[Run], plan: LayoutPlan) -> None:
        self._runs = runs
        self._shard_bytes = plan.shard_bytes
        self._first_open = 0  # all runs before it are done
        self.final_bytes = [plan.shard_bytes] * plan.shard_count  # without chunks: all of it
        for run in runs:
            self.final_bytes[run.shard] = 0

    def advance(self, is_done: bytearray) -> bool:
        """Takes note of runs that are done; tells whether writers should look again."""
        begin = self._first_open
        end = is_done.find(0, begin)
        self._first_open = end = len(self._runs) if end < 0 else end
        is_news = end == len(self._runs)
        for run in self._runs[begin:end]:
            told_bytes = self.final_bytes[run.shard]
            if run.end_bytes == self._shard_bytes or run.end_bytes - told_bytes >= PIECE_BYTES:
                self.final_bytes[run.shard] = run.end_bytes
                is_news = True
        return is_news
