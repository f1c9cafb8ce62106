"""The loop of a running `fit`, cut between two batches.

A *cut* is the moment after all callbacks were told of a batch and before the data of the next
one is read. State that is taken at a cut is complete, and state that is put back at the same
cut of a later `fit` makes that one go on exactly. Keras asks its epoch iterator for the next
batch at this moment, so that is where stepsave listens; and there a resumed epoch passes over
what was trained before, with no callback and no model noticing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any, Protocol

import keras

from stepsave import rng
from stepsave.fit import keras_internals, pretended_steps
from stepsave.fit.data_position import Batching, Resume, Stream
from stepsave.fit.keras_data import EpochData
from stepsave.fit.keras_internals import RunningFit
from stepsave.fit.passing_over import pass_over, warn_of_data
from stepsave.fit.sources import Source, source_for
from stepsave.rng import RngState

__all__ = ("FitLoop", "Listener", "forget_interrupted")


class Listener(Protocol):
    """Who is told how a `fit` goes on, each time after all other callbacks."""

    def after_train_begin(self) -> None:
        """Training begins; callbacks have reset themselves."""

    def at_cut(self, batches_done: int) -> None:
        """So many batches of the epoch are done."""

    def while_passing_over(self) -> None:
        """A batch was read that was trained before; this may go on for long."""

    def after_epoch_end(self, epoch: int) -> None:
        """An epoch has ended, validation included."""


class _Last(keras.callbacks.Callback):
    """The last of the callbacks of a `fit`."""

    async_safe = True

    def __init__(self, listeners: Callable[[], list[Listener]]) -> None:
        super().__init__()
        self._listeners = listeners

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        for listener in self._listeners():
            listener.after_train_begin()

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        for listener in self._listeners():
            listener.after_epoch_end(epoch)


class FitLoop:
    """Follows a running `fit` from cut to cut.

    One for all who listen. Holds no strong reference to the data or the callbacks of `fit`, so
    that they are freed when it has ended, however it ended.
    """

    @classmethod
    def of(cls, fit: RunningFit, model: Any, listener: Listener) -> FitLoop:
        """Joins those who follow a `fit`; to be called in `on_train_begin` of a callback.

        Args:
            fit: The `fit` that is running.
            model: Its model.
            listener: Who is told of cuts, after those who joined before.
        """
        loop = fit.shared(cls, lambda: cls(fit, model))
        loop._listeners.append(weakref.ref(listener))  # noqa: SLF001  of this class
        return loop

    def __init__(self, fit: RunningFit, model: Any) -> None:
        """Begins to follow; see `of`."""
        self._iterator = weakref.ref(fit.epoch_iterator)
        self._callbacks = weakref.ref(fit.callbacks)
        self._model = weakref.ref(model)
        self._listeners: list[weakref.ref[Listener]] = []
        self._stream = Stream()
        self._created = 0
        self._used = 0
        self._before: dict[str, Any] | None = None
        self._resume: Resume | None = None
        self._between_epochs: RngState | None = None
        self._to_read = 0
        self._drawn_ahead: frozenset[str] = frozenset()
        data = self._data()
        data.companion = source_for(data)  # it holds the data
        data.watch(self._enumerate, self._get_iterator)
        # Called after all others in each hook, in this one too.
        callbacks = fit.callbacks.callbacks
        callbacks[:] = [other for other in callbacks if not isinstance(other, _Last)]
        callbacks.append(_Last(self._listening))

    @property
    def source(self) -> Source:
        """What positions the data."""
        return self._data().companion

    @property
    def callbacks(self) -> Any:
        """The `CallbackList`; None after `fit`."""
        return self._callbacks()

    def callbacks_but(self, one: Any) -> list[Any]:
        """The callbacks of `fit`, Keras's own included, but `one`."""
        callbacks = self.callbacks
        others = [] if callbacks is None else callbacks.callbacks
        return [other for other in others if other is not one]

    def stream(self, *, between_epochs: bool) -> Stream:
        """The stream as it is at this cut; between epochs the one that comes next."""
        if between_epochs and not self._data().streams_last:
            self._end_stream()
            return Stream(self._created, self._used, start=self.source.state())
        stream, data = self._stream, self._data()
        at_end = stream.batches == data.steps and not data.streams_last
        return dataclasses.replace(
            stream,
            end=self.source.state() if at_end else None,
            place=self.source.place(stream.batches),
        )

    @property
    def batching(self) -> Batching:
        """How the data is cut into batches."""
        data = self._data()
        return Batching(data.batch_size, data.steps, data.steps_per_execution)

    def resume(self, resume: Resume | None) -> None:
        """Has the next epoch begin as `resume` says; None: as any other."""
        self._resume = resume
        if resume is not None and resume.stream is not None:
            self._created, self._used = resume.stream.created, resume.stream.used
            self.source.compare(resume.stream.start)

    def warn_of_doubts(self) -> None:
        """Warns if a resumed run may see other data, and says why."""
        doubt = self.source.doubt()
        if doubt is not None:
            warn_of_data(self.source, doubt)

    def stop(self) -> None:
        """Lets go of `fit`."""
        if self._iterator() is not None:
            self._data().unwatch()

    def _listening(self) -> list[Listener]:
        found = [reference() for reference in self._listeners]
        return [listener for listener in found if listener is not None]

    def _tell_of_cut(self, batches_done: int) -> None:
        for reference in self._listeners:  # after each step: no list is made
            if (listener := reference()) is not None:
                listener.at_cut(batches_done)

    def _data(self) -> EpochData:
        iterator = self._iterator()
        assert iterator is not None
        return EpochData(iterator)

    def _end_stream(self) -> None:
        if self._stream.batches:
            self.source.count(self._stream.batches)
        self._stream = Stream()

    def _get_iterator(self) -> Any:
        """Called by Keras for what it makes a stream of."""
        resume = self._resume
        before = self._before or _capture()
        self._before = None
        self._end_stream()
        if resume is None:
            self._stream = Stream(
                self._created, self._used, start=self.source.state(), before=before
            )
            self._created += 1
            return self.source.open()
        stream = resume.stream or Stream(batches=resume.batch)
        self._stream = dataclasses.replace(stream, before=stream.before or before, place=None)
        self._created += 1
        self.source.set_state(stream.start)
        if self._nothing_is_left(resume):
            self.source.repeat_streams(stream.created, stream.used + 1)
            self._to_read = 0
            return self.source.open()
        self.source.repeat_streams(stream.created, stream.used)
        iterable, self._to_read = self.source.open_at(stream.batches, stream.place)
        return iterable

    def _nothing_is_left(self, resume: Resume) -> bool:
        """Whether all of an epoch was trained, and what it read need not be read again."""
        data = self._data()
        return data.steps is not None and resume.batch >= data.steps and not data.streams_last

    def _enumerate(self) -> Generator[tuple[int, int, Any], None, None]:
        """An epoch: first and last step of each execution, and the stream to read from."""
        data, source = self._data(), self.source
        resume = self._resume
        if resume is not None:
            # A stream that is older than this epoch is made again now, with what it drew then.
            older = resume.batch == 0 and resume.stream is not None and resume.stream.before
            self._between_epochs = rng.capture(keras=False) if older else None
            self._prepare(resume)
        self._before = _capture()
        with contextlib.closing(data.enumerate()) as executions:
            try:
                if resume is not None:
                    yield from self._resumed(data, executions, resume)
                for begin, end, iterator in executions:
                    yield from self._execute(begin, end, iterator)
            finally:
                source.close_epoch()

    def _execute(self, begin: int, end: int, iterator: Any) -> Iterator[tuple[int, int, Any]]:
        stream = self._stream
        if stream.batches == 0:
            stream.first = _capture()
            self._used += 1
        yield begin, end, iterator
        stream.batches += end + 1 - begin
        self._tell_of_cut(end + 1)

    def _prepare(self, resume: Resume) -> None:
        stream = resume.stream or Stream(batches=resume.batch)
        if stream.before is not None:
            rng.restore(RngState.from_json(stream.before))
        self.source.set_state(stream.start)
        self.source.prepare(stream.batches)

    def _resumed(  # noqa: C901  the cases of a resume, in the order of the loop
        self, data: EpochData, executions: Iterator[Any], resume: Resume
    ) -> Iterator[tuple[int, int, Any]]:
        """The executions of a resumed epoch, up to and with the first that is trained."""
        each = data.steps_per_execution
        # Executions; in an epoch that has become shorter all of them.
        done = math.ceil(min(resume.batch, data.steps or resume.batch) / each)
        for at, (begin, end, iterator) in enumerate(executions):
            if at == 0:
                # Keras counts what it hands out; the stream may be longer in use than this epoch.
                self._pass_over(iterator)
                if self._between_epochs is not None:
                    rng.restore(self._between_epochs)  # the way here may have drawn from them
                if data.streams_last:
                    data.count_as_seen(max(0, self._stream.batches - done * each))
                self._resume = None
            if at < done - 1:
                continue
            if at == done - 1:
                self._restore_at_cut(resume, iterator)
                at_end = data.steps is not None and resume.batch >= data.steps
                if at_end or resume.ended:
                    yield from self._pretend(begin, end)
                    if not at_end:
                        yield from self._end_epoch(executions)
                    return
                continue
            if done == 0:
                self._restore_at_cut(resume, iterator)
            first = (begin, end, iterator)
            if done == 0 or data.steps is not None:
                yield from self._execute(*first)
            else:
                yield from self._execute_or_end(data, *first, executions)
            return

    def _restore_at_cut(self, resume: Resume, iterator: Any) -> None:
        if self._nothing_is_left(resume) and self._stream.end is not None:
            self.source.set_state(self._stream.end)
        resume.at_cut(iterator, self._drawn_ahead)

    def _pass_over(self, iterator: Any) -> None:
        self._used += self._stream.batches > 0

        def on_read() -> None:
            for listener in self._listening():
                listener.while_passing_over()

        self._drawn_ahead = pass_over(
            iterator, self._stream, self._to_read, self._data(), self.source, on_read=on_read
        )

    def _execute_or_end(
        self, data: EpochData, begin: int, end: int, iterator: Any, executions: Iterator[Any]
    ) -> Iterator[tuple[int, int, Any]]:
        """The first execution after those passed over, if there is one.

        The length of the data is not known: it may have ended where it was interrupted. `fit`
        needs the logs of at least one execution, so it is then given those of the last one.
        """
        if keras.backend.backend() == "torch":  # whose epoch iterator reads the data itself
            first = next(iterator, iterator)
            if first is not iterator:
                iterator = itertools.chain([first], iterator)
                yield from self._execute(begin, end, iterator)
                for begin, end, _ in executions:  # noqa: PLR1704  they go on from there
                    yield from self._execute(begin, end, iterator)
                return
            ended = True
            yield from self._pretend(begin, end)
        else:
            with pretended_steps.or_end(self._model(), self.callbacks) as ended_of:
                yield begin, end, iterator
            ended = ended_of()
        if ended:
            data.count_as_seen(-data.steps_per_execution)
            yield from self._end_epoch(executions)
        else:
            self._stream.batches += end + 1 - begin
            self._tell_of_cut(end + 1)

    def _end_epoch(self, executions: Iterator[Any]) -> Iterator[tuple[int, int, Any]]:
        """Has `fit` find the end of data whose length it does not know."""
        with keras_internals.silent(self.callbacks), pretended_steps.no_batch(self._model()):
            for begin, end, _ in executions:
                yield begin, end, iter(())

    def _pretend(self, begin: int, end: int) -> Iterator[tuple[int, int, Any]]:
        """Has `fit` go through a batch that was trained before the interruption.

        It cannot run validation without the logs of a batch.
        """
        with pretended_steps.no_training(self._model()), keras_internals.silent(self.callbacks):
            yield begin, end, itertools.repeat(None)


def forget_interrupted(model: Any, fit: RunningFit | None, callback: Any) -> None:
    """Clears from a model what a `fit` that was interrupted may have left there."""
    pretended_steps.put_back(model)
    others = [] if fit is None else fit.callbacks.callbacks
    keras_internals.forget_initial_epoch(model, [c for c in others if c is not callback])


def _capture() -> dict[str, Any]:
    return rng.capture(keras=False).to_json()
