"""How processes save together: each writes its shards, process 0 begins, seals and publishes.

    process 0                     the others
    save k: step, directory  ──▶  hear it, each in its keeper's thread
    writes its shards             write theirs
    hears all               ◀──   wrote k/rank: digests of the shards
    seals, publishes
    done k: the backup       ──▶  know that it is durable

Whoever fails, or has skipped the save, says so in place of its digests: then the save is nobody's,
and the backup before it stays valid. Training waits for nothing of this.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from stepsave.engine.peers import LIMIT_S, Board
from stepsave.errors import PeerError
from stepsave.format.records import FileRecord

__all__ = ("Following", "Leading", "Order", "Report", "SkippedError", "patience_s")

_SLOWEST_BYTES_PER_S = 10e6
"""No storage that many processes share is meant to be slower; what is, has its save fail."""

_LOOK_S = 0.02
_EARLY_S = 0.5  # the service may count a little faster


class SkippedError(Exception):
    """Raised where a save is given up because a process had no free buffer for it."""


@dataclasses.dataclass(frozen=True, slots=True)
class Order:
    """What process 0 says of a save.

    Attributes:
        step: Its step.
        directory: Where shards go.
        held: Nonce of the backup whose shards lie there already; empty if none can be trusted.
        training: CRC-32C of process 0's `training.json`.
    """

    step: int
    directory: str
    held: str
    training: int


@dataclasses.dataclass(frozen=True, slots=True)
class Report:
    """What a process says that has written its part.

    Attributes:
        layout: CRC-32C of the layout by which it did.
        digests: Of its shards, as in `BackupRecord.shard_digests`.
        files: Other files that it has written.
    """

    layout: int
    digests: tuple[int, ...]
    files: tuple[FileRecord, ...]


def patience_s(size_bytes: int) -> float:
    """How long to wait for another process that writes about as much as this one."""
    return LIMIT_S + size_bytes / _SLOWEST_BYTES_PER_S


class Leading:
    """What process 0 says and hears. For the keeper's thread."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._number = 0
        self._begun: int | None = None  # the step that the others are writing
        self._forgotten = 0

    def begin(self, order: Order) -> None:
        """Has the others write their parts."""
        self._board.say(f"save {self._number}", **dataclasses.asdict(order))
        self._begun = order.step

    def ask(self, limit_s: float, is_off: Callable[[], bool]) -> int:
        """Returns the newest step that another process holds; from then on all hold theirs.

        Raises:
            SkippedError: If it is called off meanwhile.
            PeerError: If one does not answer in time, or has nothing more to do with it.
        """
        board, number = self._board, self._number
        board.say(f"ask {number}")
        end_s = time.monotonic() + limit_s
        while True:
            said = board.hear_all(f"holds {number}")
            missing = {*range(1, board.peers.count)} - said.keys()
            if not missing:
                return max(facts["step"] for facts in said.values())
            if gone := missing & board.hear_all("gone").keys():
                raise PeerError(
                    board.text(f"is to upload, and process {min(gone)} has left. Look why it ended")
                )
            if is_off():
                raise SkippedError
            if time.monotonic() > end_s:
                late = ", ".join(map(str, sorted(missing)))
                what = f"has waited {limit_s:.0f} s for process(es) {late} to upload with it"
                what = f"{what}. Look what they do"
                raise PeerError(board.text(what))
            time.sleep(_LOOK_S)

    def gather(self, mine: Report, size_bytes: int) -> Report:
        """Returns what all have written: all shards in order, and all files.

        Raises:
            PeerError: Naming processes that have failed, or have not answered in time.
            SkippedError: If one has skipped the save.
        """
        said = self._hear_all(patience_s(size_bytes))
        failed = [f"process {rank}: {said[rank]['error']}" for rank in said if said[rank]["error"]]
        if failed:
            raise PeerError(
                self._board.text(
                    f"saves with others, and a part failed. Mend what it names: {'; '.join(failed)}"
                )
            )
        if any(facts["skipped"] for facts in said.values()):
            raise SkippedError
        other = [rank for rank, facts in said.items() if facts["layout"] != mine.layout]
        if other:
            raise PeerError(
                self._board.text(
                    f"saves with others, but the state of process {other[0]} has another "
                    "structure. All must save a state of the same names, shapes and dtypes"
                )
            )
        digests, files = list(mine.digests), list(mine.files)
        for rank in sorted(said):
            digests += said[rank]["digests"]
            files += [FileRecord(*file) for file in said[rank]["files"]]
        return Report(mine.layout, tuple(digests), tuple(files))

    def _hear_all(self, limit_s: float) -> Mapping[int, Mapping[str, Any]]:
        end_s = time.monotonic() + limit_s
        others = range(1, self._board.peers.count)
        while True:
            said = self._board.hear_all(f"wrote {self._number}")
            missing = [rank for rank in others if rank not in said]
            if not missing:
                return said
            try:
                left_s = max(0.0, end_s - time.monotonic())
                self._board.hear(f"wrote {self._number}/{missing[0]}", left_s, who=missing[0])
            except PeerError as e:
                if time.monotonic() < end_s - _EARLY_S:
                    raise
                late = ", ".join(map(str, missing))
                what = f"has waited {limit_s:.0f} s for the part of process(es) {late} of a save"
                advice = "Each must open the same place and save the same steps, not one for all"
                raise PeerError(self._board.text(f"{what}. {advice}")) from e

    def _forget(self, end: int) -> None:
        """Removes what was said of the saves before one that all have answered."""
        for number in range(self._forgotten, end):
            for what in ("ask", "holds", "save", "wrote", "done"):
                self._board.forget(f"{what} {number}")
        self._forgotten = end

    def end(self, nonce: str) -> None:
        """Says that a save is durable, as the backup that has this nonce."""
        number = self._number
        self._say_end(nonce=nonce)
        self._forget(number)

    def drop(self, step: int, error: BaseException) -> None:
        """Says that a save is given up."""
        if self._begun is None:
            self._board.say(f"save {self._number}", step=step, error=_reason(error))
            self._number += 1
        else:
            self._say_end(error=_reason(error))

    def close(self) -> None:
        """Says that there is no further save, and no upload."""
        self._board.say(f"save {self._number}", step=None)
        self._board.say(f"ask {self._number}")

    def _say_end(self, *, nonce: str = "", error: str = "") -> None:
        number, self._begun = self._number, None
        self._number += 1
        self._board.say(f"done {number}", nonce=nonce, error=error)


class Following:
    """What another process says and hears. For the keeper's thread."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._number = 0

    def hear_order(self, step: int, size_bytes: int) -> Order:
        """Returns what process 0 says of a save, when it begins with it.

        Raises:
            SkippedError: If it has skipped it.
            PeerError: If it has given it up, knows nothing of it, or says nothing.
        """
        while True:
            told = self._board.hear(f"save {self._number}", 2 * patience_s(size_bytes))
            if told["step"] is None or told["step"] > step:
                raise PeerError(
                    self._board.text(
                        f"saves step {step}, and process 0 does not. All must save the same steps"
                    )
                )
            if told["step"] == step:
                break
            self.report(error=f"does not save step {told['step']}")
        if "error" in told:
            self._number += 1
            self._raise(told["error"])
        try:
            self.check_wanted()
        except (PeerError, SkippedError):
            self._number += 1
            raise
        return Order(**told)

    def await_ask(self, limit_s: float, is_off: Callable[[], bool]) -> bool:
        """Returns when process 0 wants to upload; False if it does not in time, or never will.

        Args:
            limit_s: How long to wait.
            is_off: Whether to wait no longer.
        """
        end_s = time.monotonic() + limit_s
        while True:
            left_s = max(0.0, end_s - time.monotonic())
            if self._board.watch(f"ask {self._number}", left_s, is_off) is None:
                return False
            told = self._board.peek(f"save {self._number}")
            if told is None or told["step"] is None:
                return told is None
            self._number += 1  # given up: it has not waited for this process

    def answer(self, step: int) -> None:
        """Says which step this process holds."""
        self._board.say(f"holds {self._number}/{self._board.peers.rank}", step=step)

    def hear_upload(self, limit_s: float) -> Order:
        """Returns what process 0 says of the upload that it has asked for.

        Raises:
            PeerError: If it has given it up, or says nothing.
        """
        told = self._board.watch(f"save {self._number}", limit_s)
        if told is None or "error" in told:
            self._number += 1
            self._raise("it says nothing" if told is None else told["error"])
        return Order(**told)

    def leave(self) -> None:
        """Says that this process uploads nothing any more."""
        self._board.say(f"gone/{self._board.peers.rank}")

    def check_wanted(self) -> None:
        """Raises if process 0 has given up the save that it ordered: it waits for nobody any more.

        Raises:
            SkippedError, PeerError: As `hear_end`.
        """
        ended = self._board.peek(f"done {self._number}")
        if ended is not None and ended["error"]:
            self._raise(ended["error"])

    def report(self, report: Report | None = None, *, error: str = "") -> None:
        """Says what this process has written, that it has skipped the save, or why it failed."""
        number, rank = self._number, self._board.peers.rank
        self._number += 1
        facts: dict[str, Any] = {"error": error, "skipped": report is None}
        if report is not None:
            files = [dataclasses.astuple(file) for file in report.files]
            facts |= {"layout": report.layout, "digests": report.digests, "files": files}
        self._board.say(f"wrote {number}/{rank}", **facts)

    def hear_end(self, size_bytes: int) -> str:
        """Returns the nonce of the backup, when what was reported last is durable.

        Raises:
            SkippedError: If a process has skipped the save.
            PeerError: If it was given up, or process 0 says nothing.
        """
        told = self._board.hear(f"done {self._number - 1}", 2 * patience_s(size_bytes))
        if told["error"]:
            self._raise(told["error"])
        return told["nonce"]

    def _raise(self, reason: str) -> NoReturn:
        if reason == _SKIPPED:
            raise SkippedError
        raise PeerError(
            self._board.text(
                "saves with others, and process 0 has given it up. Mend what it names", reason
            )
        )


_SKIPPED = "skipped"


def _reason(error: BaseException) -> str:
    return _SKIPPED if isinstance(error, SkippedError) else f"{type(error).__name__}: {error}"
