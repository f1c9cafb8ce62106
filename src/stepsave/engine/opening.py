"""What a checkpointer opens: a directory, a bucket, both, or one of them to be read only."""

from __future__ import annotations

import dataclasses
import os

from stepsave.engine.directory import BackupDirectory
from stepsave.engine.follower import FollowerDirectory
from stepsave.engine.joint_tiers import JointTiers
from stepsave.engine.peers import Board, Peers, find_peers
from stepsave.engine.read_only import ReadOnlyDirectory
from stepsave.engine.saves import SaveLog
from stepsave.engine.tiers import TieredDirectory
from stepsave.engine.uploading import UploadPace
from stepsave.errors import BackupDirectoryError
from stepsave.snapshot.selection import Team
from stepsave.store.bucket import BucketStore
from stepsave.store.local import LocalStore
from stepsave.store.places import Store, Target, open_store
from stepsave.threads import Crew

__all__ = ("Directory", "Place")

Directory = BackupDirectory | ReadOnlyDirectory | TieredDirectory | JointTiers | FollowerDirectory


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """Where backups lie, as the caller named it.

    Attributes:
        store: The directory or the bucket.
        local: A directory before the bucket, if there is one.
        pace: How often what is in that is uploaded.
        read_only: Whether nothing is to be saved there.
        peers: The processes that share it; None if this is the only one.
    """

    store: Store
    local: LocalStore | None
    pace: UploadPace
    read_only: bool
    peers: Peers | None

    @classmethod
    def of(
        cls,
        target: Target,
        local_dir: str | os.PathLike[str] | None,
        upload_every: int | str,
        *,
        read_only: bool,
    ) -> Place:
        """Checks what was named; touches nothing.

        Raises:
            ValueError: If the arguments do not go together.
            BackupDirectoryError: If one of them cannot be used, or not by several processes.
        """
        store, pace, peers = open_store(target), UploadPace.of(upload_every), find_peers()
        if peers is not None and not read_only:
            _check_shared(store, peers)
        if local_dir is None:
            return cls(store, None, pace, read_only, peers)
        local = open_store(local_dir)
        if not isinstance(store, BucketStore) or not isinstance(local, LocalStore) or read_only:
            how = " to be read only" if read_only else ""
            raise ValueError(
                f"Invalid value for argument `local_dir`. Received: local_dir={local_dir!r} with "
                f"{store.root}{how}. Expected a directory of this machine, and a bucket to upload "
                "to from there (s3://… or gs://…)."
            )
        return cls(store, local, pace, read_only, peers)

    @property
    def lanes(self) -> int:
        """How many threads write one save, if nobody says otherwise."""
        return (self.local or self.store).lanes

    @property
    def team(self) -> Team | None:
        """The processes that save together; None if this one saves all of it, or nothing."""
        peers, keep_all = self.peers, self.local is not None
        if peers is None or self.read_only or not (peers.share_saves or keep_all):
            return None
        return Team(peers.rank, peers.count, keep_all)

    def make_directory(self, log: SaveLog, helpers: Crew) -> Directory:
        """Returns what keeps backups there; touches nothing."""
        if self.read_only:
            return ReadOnlyDirectory(self.store, helpers)
        if self.local is not None and self.peers is not None:
            assert isinstance(self.store, BucketStore)
            return JointTiers(self.store, self.local, self.pace, log, helpers, self.peers)
        board = None if self.peers is None else Board(self.peers, str(self.store.root))
        if board is not None and not board.peers.is_leader:
            return FollowerDirectory(self.store, log, helpers, board)
        if self.local is not None:
            assert isinstance(self.store, BucketStore)
            return TieredDirectory(self.store, self.local, self.pace, log, helpers)
        return BackupDirectory(self.store, log, helpers, board)


def _check_shared(store: Store, peers: Peers) -> None:
    if store.keeps_data:
        raise BackupDirectoryError(
            f"{store.root}: {peers.count} processes ({peers.framework}) train this model, and "
            "what lies in the memory of one the others do not see. Use a directory "
            "that all see, or a bucket."
        )
