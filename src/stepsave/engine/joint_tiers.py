"""Two tiers for several processes: each has a disk of its own, all have one bucket.

Each keeps all that its devices have, as a backup of its own, and saves wait for no other process.
What all of them hold they can restore; else they restore what they have brought to the bucket.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
from pathlib import Path

from stepsave.engine.agreed_reading import FollowedReading, LedReading
from stepsave.engine.agreement import Following, Leading
from stepsave.engine.bucket_commit import BucketCommit
from stepsave.engine.commit import CommitProtocol
from stepsave.engine.directory import BackupDirectory
from stepsave.engine.extents import Needs
from stepsave.engine.follower import FollowerDirectory
from stepsave.engine.holdings import read_held, read_holding
from stepsave.engine.joint_uploading import FollowedUpload, LedUpload
from stepsave.engine.newest import restore_newest
from stepsave.engine.peers import LIMIT_S, Board, Peers
from stepsave.engine.reader import StoredBackup, read_backup
from stepsave.engine.retention import Retention
from stepsave.engine.saves import SaveLog
from stepsave.engine.tiers import Tiers, step_of
from stepsave.engine.uploading import UploadPace
from stepsave.engine.writer import WriterKind
from stepsave.errors import (
    CorruptBackupError,
    PeerError,
    StepsaveError,
)
from stepsave.format.holding import Holding
from stepsave.format.records import BackupRecord
from stepsave.store.bucket import BucketStore
from stepsave.store.local import LocalStore
from stepsave.threads import Crew

__all__ = ("JointTiers",)

Held = dict[str, tuple[BackupRecord, Holding]]
"""What this process has on its disk and can use, by nonce; the newest first."""


class JointTiers(Tiers):
    """Those of several processes: a disk of each, and a bucket of all."""

    def __init__(
        self,
        bucket: BucketStore,
        local: LocalStore,
        pace: UploadPace,
        log: SaveLog,
        helpers: Crew,
        peers: Peers,
    ) -> None:
        """Touches nothing yet; in `local` it takes a directory by the number of the process."""
        self._peers = peers
        self._disk = LocalStore(Path(local.root) / f"process-{peers.rank}")
        self._pace = pace
        self._restores = itertools.count()
        place = str(bucket.root)
        board = Board(peers, place)
        self._board = Board(peers, f"{place} with local disks")
        there: BackupDirectory | FollowerDirectory
        if peers.is_leader:
            there = BackupDirectory(bucket, SaveLog(), helpers, board)
        else:
            there = FollowerDirectory(bucket, SaveLog(), helpers, board)
        super().__init__(bucket, BackupDirectory(self._disk, log, helpers), there, log, helpers)

    def open(self, writer: WriterKind, lanes: int, retention: Retention) -> int:
        """Opens both; see `BackupDirectory.open`.

        On the disk two backups are kept in any case: when the processes end, one of them may be
        ahead of another by a save, and what counts is what all have.
        """
        step = self._remote.open("auto", lanes, retention)
        self._run = self._agree_on_run()
        step = max(step, self._local.open(writer, lanes, Retention(1)))
        disk = self._local.protocol
        assert isinstance(disk, CommitProtocol)
        self._protocol = disk
        self._name_saves()
        self._begin_uploads(self._make_upload(), self._pace, disk)
        return step

    def _agree_on_run(self) -> str:
        if self._peers.is_leader:
            run = os.urandom(16).hex()
            self._board.say("run", name=run)
            return run
        return self._board.hear("run")["name"]

    def _make_upload(self) -> LedUpload | FollowedUpload:
        remote, board = self._remote, self._board
        if isinstance(remote, FollowerDirectory):
            # What process 0 has asked for, and not how often: it decides.
            self._pace = UploadPace(1, 0.0)
            self._following = Following(board)
            self._followed = FollowedReading(board)
            return FollowedUpload(
                self._disk, self._bucket, self._protocol, self._following, self._peers.rank
            )
        assert isinstance(remote.protocol, BucketCommit)
        self._leading, self._led = Leading(board), LedReading(board)
        return LedUpload(self._disk, self._bucket, self._protocol, remote.protocol, self._leading)

    def _name_saves(self) -> None:
        """Has a save of a step be called the same on all disks, and no other like it."""
        prefix = f"{self._run} {next(self._restores)}"

        def name(step: int) -> str:
            return hashlib.sha256(f"{prefix} {step}".encode()).hexdigest()[:32]

        self._protocol.make_nonce = name

    @property
    def committed(self) -> BackupRecord | None:
        """The newest backup here, as a part or a whole, wherever it is."""
        here, there = self._local.committed, self._remote.committed
        return here if step_of(here) >= step_of(there) else there

    @property
    def kept(self) -> tuple[BackupRecord, ...]:
        """Those before it on the disk."""
        return self._local.kept

    def restore(
        self, needs: Needs | None = None, step: int | None = None
    ) -> tuple[StoredBackup | None, str]:
        """Reads the newest backup that all processes can read; what is lost by that is told.

        One of a certain step is read from the bucket, where those are that are kept.

        Raises:
            CorruptBackupError: If there is one, but none that can be read.
            BucketError: If the newest is in the bucket, and that is out of reach.
            PeerError: If a process says nothing.
        """
        assert self._uploader is not None
        self._uploader.wait()
        self._local.protocol.read_markers()
        number = next(self._restores)
        held, lost = self._find_held() if step is None else ({}, "")
        if self._peers.is_leader:
            found, more = self._lead_restore(held, number, needs, step)
        else:
            self._board.say(f"has {number}/{self._peers.rank}", nonces=[*held])
            found, more = self._followed.read(lambda nonce: self._read(held, nonce, needs)), ""
        if step is None:
            self._settle(found)
        self._name_saves()
        return found, " ".join(filter(None, (lost, more)))

    def _find_held(self) -> tuple[Held, str]:
        """Returns what this process could restore, and what it could not have looked at."""
        held: Held = {}
        problems = [str(problem) for problem in self._protocol.problems.values()]
        for record in self._protocol.records:
            try:
                holding = read_holding(self._disk, record, self._helpers)
            except (StepsaveError, OSError) as e:
                problems.append(str(e))
                continue
            mine = (self._peers.rank, self._peers.count)
            if holding is not None and (holding.process, holding.processes) == mine:
                held[record.nonce] = record, holding
        text = f"stepsave: {' '.join(problems)} It is not restored from." if problems else ""
        return held, text

    def _lead_restore(
        self, held: Held, number: int, needs: Needs | None, step: int | None
    ) -> tuple[StoredBackup | None, str]:
        try:
            others = [
                set(self._board.hear(f"has {number}/{rank}", LIMIT_S, who=rank)["nonces"])
                for rank in range(1, self._peers.count)
            ]
            common = [n for n in held if all(n in nonces for nonces in others)]
            found, lost = self._restore_agreed(held, common, needs, step)
        except BaseException as e:
            with contextlib.suppress(PeerError):  # then they find out by themselves
                self._led.end(None, str(e))
            raise
        self._led.end(found)
        return found, lost

    def _restore_agreed(
        self, held: Held, common: list[str], needs: Needs | None, step: int | None
    ) -> tuple[StoredBackup | None, str]:
        remote = self._remote
        assert isinstance(remote, BackupDirectory)
        remote.protocol.read_markers()
        there = step_of(remote.committed)
        texts: list[str] = []
        problem: Exception | None = None
        for nonce in sorted(common, key=lambda nonce: -held[nonce][0].step):
            record = held[nonce][0]
            if record.step < there:
                break
            try:
                found = self._led.read(record, lambda nonce=nonce: self._read(held, nonce, needs))
            except PeerError:
                raise
            except Exception as e:  # noqa: BLE001  whatever it is, there may be another one
                problem = e
                texts.append(f"The backups of step {record.step} on the disks cannot be read: {e}")
                continue
            return found, self._tell(found, texts)

        def read_all(record: BackupRecord) -> StoredBackup:
            return self._led.read(record, lambda: self._read_remote(record, needs))

        found, lost = restore_newest(remote.place, remote.protocol, read_all, step)
        if found is None and problem is not None:
            raise CorruptBackupError(
                f"{self._disk.root}: {' '.join(texts)} There is none in {remote.place}."
            ) from problem
        newest = max((record.step for record, _ in held.values()), default=-1)
        if found is not None and newest > found.step and not texts:
            texts.append(f"Not all processes have step {newest} on their disks.")
        return found, " ".join(filter(None, (self._tell(found, texts), lost)))

    def _tell(self, found: StoredBackup | None, texts: list[str]) -> str:
        if not texts or found is None:
            return ""
        return f"stepsave: {' '.join(texts)} Restored step {found.step} instead."

    def _read_remote(self, record: BackupRecord, needs: Needs | None) -> StoredBackup:
        return read_backup(self._bucket, record, self._helpers, needs)

    def _read(self, held: Held, nonce: str, needs: Needs | None) -> StoredBackup:
        if nonce in held:
            record, holding = held[nonce]
            return read_held(self._disk, record, self._helpers, holding, needs)
        assert isinstance(self._remote, FollowerDirectory)
        return self._remote.read(nonce, needs)

    def _settle(self, found: StoredBackup | None) -> None:
        """Gives up, on the disk, what is newer than what was restored, or cannot be read.

        It would be in the way of the saves to come.
        """
        disk = self._protocol
        step = -1 if found is None else found.step
        if disk.previous is not None and disk.previous.step == step < step_of(disk.committed):
            disk.fall_back(disk.previous)
        elif disk.problems or step_of(disk.committed) > step:
            disk.forget()

    def _leave(self) -> None:
        with contextlib.suppress(PeerError):  # nobody is there any more to be told
            (self._leading.close if self._peers.is_leader else self._following.leave)()

    def release(self, *, remove: bool = False) -> None:
        """Lets go of both, and of the directory of all disks that are on this machine."""
        super().release(remove=remove)
        if remove:
            with contextlib.suppress(OSError):  # other processes of this machine are still there
                Path(self._disk.root).parent.rmdir()
