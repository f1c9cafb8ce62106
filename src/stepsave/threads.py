"""Threads of ours, and how the thread of a caller hands work to them.

Python runs signal handlers in the main thread, between any two of its instructions. What a
handler raises, Ctrl-C's `KeyboardInterrupt` above all, may come anywhere in what that thread
runs, a cleanup included. Hence two rules, from which everything else follows:

1. What must not be left half done (files, locks, the commit protocol) is done by threads of this
   module. No signal interrupts them.
2. The thread of a caller takes no lock, and changes what others see only in single steps of the
   interpreter: a thing is put into a `SimpleQueue`, an attribute is stored.

So a caller uses no `threading.Event`, `Condition` or executor: an exception in the midst of one
leaves its inner lock taken for ever. `Latch` and `Crew` are what it uses instead.
"""

from __future__ import annotations

import _thread
import contextlib
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from queue import Empty, SimpleQueue
from types import CodeType, FrameType
from typing import Any, Generic, TypeVar, cast

__all__ = ("Call", "Clock", "Crew", "Fate", "Latch", "is_running")

T = TypeVar("T")

Task = Callable[[], object]
"""What a thread of a crew calls. It raises nothing: its errors are somebody's to keep."""


def is_running(frame: FrameType | None, code: CodeType, name: str, value: object) -> bool:
    """Whether a function is among a frame and its callers, with a local of that name and value."""
    while frame is not None:
        if frame.f_code is code and frame.f_locals.get(name) is value:
            return True
        frame = frame.f_back
    return False


class Latch:
    """Closed until it is opened, once and for all. A wait for it may be interrupted anywhere."""

    __slots__ = ("_is_open", "_waiters")

    def __init__(self) -> None:
        self._is_open = False
        self._waiters: list[SimpleQueue[None]] = []

    @property
    def is_open(self) -> bool:
        return self._is_open

    def open(self) -> None:
        """Lets all pass who wait, and who will."""
        self._is_open = True
        for waiter in list(self._waiters):
            waiter.put(None)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Waits until it is open, at most so many seconds; tells whether it is."""
        if not self._is_open:
            waiter: SimpleQueue[None] = SimpleQueue()
            self._waiters.append(waiter)
            if not self._is_open:  # else it was opened by one who had not seen the waiter yet
                try:
                    waiter.get(timeout=timeout_s)
                except Empty:
                    self._waiters.remove(waiter)
        return self._is_open


class Fate:
    """Whether something was begun with or given up. Both sides ask in one step; one gets it."""

    __slots__ = ("_is",)

    def __init__(self) -> None:
        self._is: dict[None, str] = {}

    def accept(self) -> bool:
        """For the one who would do it: whether it is his to do."""
        return self._is.setdefault(None, "accepted") == "accepted"

    def drop(self) -> bool:
        """For the one who would rather not have it done: whether nobody will do it."""
        return self._is.setdefault(None, "dropped") == "dropped"


class Clock:
    """How much CPU time the threads of a crew have taken, those that have ended included.

    Of each, until the end of its last task: a thread cannot be asked by another one without
    knowing that it is still there.
    """

    __slots__ = ("_each_s",)

    def __init__(self) -> None:
        self._each_s: dict[object, float] = {}

    def note(self, thread: object) -> None:
        """For a thread of the crew, by any object of its own."""
        self._each_s[thread] = time.thread_time()

    @property
    def cpu_s(self) -> float:
        return sum(list(self._each_s.values()))


class Crew:
    """Threads that take tasks from one queue, in order.

    They end when the crew is collected or told to, or when the main thread has ended; what was
    put before is done first. Afterwards who puts a task does it himself.
    """

    def __init__(self, count: int, name: str) -> None:
        """Starts the threads.

        Args:
            count: How many.
            name: Of the threads, for those who look at a process.

        Raises:
            RuntimeError: If so many threads cannot be started.
        """
        self._post = post = _Post(count)
        start = _Start(post, count, name)
        # `Thread.start` waits for the new thread under a lock of Python's, so it is not for the
        # caller either. If he is interrupted here the threads come, and find that they may go.
        _thread.start_new_thread(start.run, ())
        start.done.wait()
        if start.error is not None:
            raise start.error
        self._threads = start.threads

    @property
    def clock(self) -> Clock:
        """Of its threads; outlives it."""
        return self._post.clock

    def put(self, task: Task) -> None:
        """Has a thread of the crew do a task. A single step: it is done, or was never put."""
        post = self._post
        post.queue.put(task)
        if post.has_ended:
            post.do_rest()

    def call(self, function: Callable[[], T]) -> T:
        """Has a thread of the crew call a function; returns what it returned, or raises.

        If the caller is interrupted meanwhile, the function is called to its end all the same.
        """
        return self.begin(function).take()

    def begin(self, function: Callable[[], T]) -> Call[T]:
        """Has a thread of the crew call a function, and goes on meanwhile."""
        call = Call(function)
        self.put(call.make)
        return call

    def share(self, items: Iterable[T], work: Callable[[T], object], helpers: int) -> None:
        """Does something with each item, with the help of threads of the crew that are free.

        Not for the thread of a caller: it takes locks.

        Args:
            items: The items, begun with in this order.
            work: What to do with each.
            helpers: How many threads may help.

        Raises:
            BaseException: The first that `work` raised. No item is begun with after it.
        """
        lot = _Lot(iter(items), work)
        for _ in range(helpers):
            self.put(lot.join)
        lot.join()
        lot.wait()

    def end(self) -> None:
        """Has the threads end when all that was put is done."""
        self._post.queue.put(None)

    def join(self) -> None:
        """Returns when the threads have ended."""
        for thread in self._threads:
            thread.join()

    def __del__(self) -> None:
        post = getattr(self, "_post", None)
        if post is not None:
            post.queue.put(None)


class _Post:
    """Where tasks are put. What threads hold of their crew, so that it can be collected."""

    def __init__(self, count: int) -> None:
        self.queue: SimpleQueue[Task | None] = SimpleQueue()
        self.clock = Clock()
        self.has_ended = False
        self._left = count
        self._guard = threading.Lock()
        self._turn = threading.RLock()

    def serve(self) -> None:
        """Does tasks until the end, in a thread of the crew."""
        me = object()
        while True:
            task = self.queue.get()
            if task is None:
                break
            task()
            del task  # what it was about must not live on until the next one comes
            self.clock.note(me)
        self.leave(1)

    def leave(self, count: int) -> None:
        """Takes note of threads that end, or never began."""
        with self._guard:
            self._left -= count
            is_last = self._left == 0
        if not is_last:
            self.queue.put(None)  # for the next one
            return
        self.has_ended = True
        self.do_rest()

    def do_rest(self) -> None:
        """Does, here and now, what was put behind the end."""
        with self._turn, contextlib.suppress(Empty):
            while True:
                task = self.queue.get_nowait()
                if task is not None:
                    task()


class _Start:
    """Starts threads, in a thread that no signal interrupts."""

    def __init__(self, post: _Post, count: int, name: str) -> None:
        self._post = post
        self._count = count
        self._name = name
        self.threads: list[threading.Thread] = []
        self.error: RuntimeError | None = None
        self.done = Latch()

    def run(self) -> None:
        try:
            for number in range(self._count):
                # Said, or it would be asked of this thread, which `threading` does not know.
                thread = threading.Thread(
                    target=self._post.serve, name=f"{self._name}-{number}", daemon=False
                )
                thread.start()
                self.threads.append(thread)
            _end_with_main_thread(self._post)
        except RuntimeError as e:  # a limit on threads
            self.error = e
            self._post.leave(self._count - len(self.threads))
        finally:
            self.done.open()


class Call(Generic[T]):
    """A call by a thread of a crew, and what comes of it."""

    def __init__(self, function: Callable[[], T]) -> None:
        self._function = function
        self._results: list[T] = []
        self._error: BaseException | None = None
        self.done = Latch()

    def make(self) -> None:
        try:
            self._results.append(self._function())
        except BaseException as e:  # noqa: BLE001  raised where the result is taken
            self._error = e
        finally:
            self.done.open()

    def take(self) -> T:
        """Waits for the end; returns what was returned, or raises what was raised. Once."""
        self.done.wait()
        if self._error is None:
            return self._results.pop()
        try:
            raise self._error
        finally:
            self._error = None  # or the traceback would keep itself alive


class _Lot(Generic[T]):
    """Items that several threads of crews work on."""

    def __init__(self, items: Iterator[T], work: Callable[[T], object]) -> None:
        self._items = items
        self._work = work
        self._changed = threading.Condition()
        self._at_work = 0
        self._is_over = False
        self._error: BaseException | None = None

    def join(self) -> None:
        """Works until no item is left; one who comes late finds none."""
        with self._changed:
            self._at_work += 1
        try:
            for item in self._take():
                self._work(item)
        except BaseException as e:  # noqa: BLE001  raised by `wait`
            self._error = self._error or e
        with self._changed:
            self._is_over = True
            self._at_work -= 1
            self._changed.notify_all()

    def _take(self) -> Iterator[T]:
        nothing = object()
        while True:
            with self._changed:
                item = nothing if self._is_over else next(self._items, nothing)
            if item is nothing:
                return
            yield cast("T", item)

    def wait(self) -> None:
        """Returns when nobody works any more, or raises what somebody raised."""
        with self._changed:
            while self._at_work:
                self._changed.wait()
        if self._error is not None:
            raise self._error


_watch_guard = threading.Lock()
_watched: weakref.WeakSet[_Post] = weakref.WeakSet()
_watcher: threading.Thread | None = None


def _end_with_main_thread(post: _Post) -> None:
    """Has the threads of a crew end after the main thread, or the interpreter would wait for them.

    It waits for all threads but daemons, which it kills in the middle of a write.
    """
    global _watcher  # noqa: PLW0603  one for all crews of the process
    with _watch_guard:
        _watched.add(post)
        if _watcher is None or not _watcher.is_alive():  # in a forked child it is not
            _watcher = threading.Thread(target=_watch, name="stepsave-watch-exit", daemon=False)
            _watcher.start()


def _watch() -> None:
    main: Any = threading.main_thread()
    main.join()
    with _watch_guard:
        for post in list(_watched):
            post.queue.put(None)
