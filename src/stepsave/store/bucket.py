"""A place in a bucket, through tensorstore's drivers for S3, Google Cloud Storage and memory.

Objects are replaced as wholes and are durable when that is acknowledged; nothing is renamed. What
happens in which order belongs to `stepsave.engine.bucket_commit`.

Every wait here has a limit. The drivers try a request that fails for a passing reason again, with
growing pauses, for about a minute; a transfer that has stopped to flow is cut after 20 s and tried
again; and whatever has no answer within two minutes, and four seconds per MiB, is given up.
"""

from __future__ import annotations

import errno
import functools
import importlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from stepsave.errors import BucketError, CorruptBackupError
from stepsave.store.addresses import Address
from stepsave.store.direct import Piece
from stepsave.store.lock import ProcessHold

__all__ = ("NO_OBJECT", "BucketStore")

NO_OBJECT = b"\x02"
"""The generation that tensorstore gives to what is not there."""

_PATIENCE_S = 120.0
_PATIENCE_S_PER_BYTE = 4 / (1 << 20)
_RETRIES = {"max_retries": 10, "initial_delay": "500ms", "max_delay": "8s"}
_RETRIES_OF = {"s3": "s3_request_retries", "gcs": "gcs_request_retries"}
# Read by the drivers once per process. Without them a connection on which nothing moves any more
# is waited for as long as it stays open.
_CUT_WHEN_SLOW = {
    "TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS": "20",
    "TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES": "1024",
}
_PROBE = "stepsave-probe-"
_READ_BYTES = 16 << 20  # in one request: enough to be fast, and little memory beside the arena
_SHOWN_CHARACTERS = 300  # of an answer: the rest is XML


class BucketStore:
    """Objects below one prefix. Paths are relative to it and use `/`.

    Attributes:
        root: Its URL.
        is_remote: True: each call takes a round trip, so many should be under way at once.
        lanes: How many transfers use a usual network well.
        keeps_data: Whether what it holds is the very memory that was written from.
    """

    is_remote = True
    lanes = 16

    def __init__(self, address: Address) -> None:
        """Asks nobody yet."""
        self.root = address.url
        self._spec = dict(address.spec)
        self.keeps_data = self._spec["driver"] == "memory"
        name = _RETRIES_OF.get(self._spec["driver"])
        if name is not None:
            self._spec.setdefault(name, _RETRIES)

    def path(self, path: str) -> str:
        """The URL of an object."""
        return f"{self.root}/{path}"

    def make_hold(self) -> ProcessHold:
        """Returns what keeps others in this process away. Other processes, the marker does."""
        return ProcessHold(self.root)

    def create(self) -> None:
        """Makes sure that objects can be listed and written here, by writing one.

        Raises:
            BucketError: If not, with the reason.
        """
        left = [path for path in self.list(_PROBE) if re.fullmatch(_PROBE + "[0-9a-f]{16}", path)]
        probe = f"{_PROBE}{os.urandom(8).hex()}"
        self.write_all({probe: b"stepsave looks whether it may write here\n"})
        for path in (probe, *left):
            self.remove(path)

    def check_directory(self) -> None:
        """Makes sure that objects can be listed here.

        Raises:
            BucketError: If not, with the reason.
        """
        # A bucket that is not there looks as if it had no objects, unless they are listed.
        self.list(_PROBE)

    def list(self, prefix: str) -> list[str]:
        """Paths of all objects that begin so."""
        keys = self._kv.list(_range_of(prefix))
        found = self.wait(keys, f"list {prefix}*")
        return [bytes(key).decode(errors="surrogateescape") for key in found]

    def read(self, path: str, limit_bytes: int) -> bytes:
        """Reads an object, refusing anything larger than the limit.

        Raises:
            FileNotFoundError: If there is none.
            CorruptBackupError: If it is too large.
            BucketError: If it cannot be read.
        """
        self.check_at_most(path, limit_bytes)
        data, _ = self.read_versioned(path)
        if data is None:
            raise FileNotFoundError(errno.ENOENT, "no such object", self.path(path))
        return data

    def check_at_most(self, path: str, limit_bytes: int) -> None:
        """Makes sure that an object, if it is there, can be read without much memory.

        Raises:
            CorruptBackupError: If it is larger.
            BucketError: If it cannot be asked for.
        """
        beyond = self._kv.read(path, byte_range=slice(limit_bytes, limit_bytes + 1))
        try:
            found = self.wait(beyond, f"read {path}", 1)
        except BucketError as e:
            if "OUT_OF_RANGE" in str(e.__cause__):
                return
            raise
        if found.state == "value":
            raise CorruptBackupError(
                f"{self.path(path)}: expected at most {limit_bytes} bytes, found more."
            )

    def read_versioned(self, path: str) -> tuple[bytes | None, bytes]:
        """Reads an object, or None, and which generation of it that is."""
        found = self.wait(self._kv.read(path), f"read {path}")
        data = bytes(found.value) if found.state == "value" else None
        return data, bytes(found.stamp.generation)

    def read_into(
        self,
        path: str,
        size_bytes: int,
        pieces: Iterable[Piece],
        on_read: Callable[[int], object] | None = None,
    ) -> None:
        """Reads pieces of an object, all at once.

        Args:
            path: The object.
            size_bytes: How large it is at least.
            pieces: Where in it to begin, and where to.
            on_read: Told the size of each request that was answered.

        Raises:
            FileNotFoundError: If there is none.
            CorruptBackupError: If it is smaller.
            BucketError: If it cannot be read.
        """
        del size_bytes  # each answer is proved by its own
        parts = [
            (first, some, self._kv.read(path, byte_range=slice(first, first + len(some))))
            for begin, buffer in pieces
            for first, some in _cut(begin, buffer)
        ]
        for first, some, part in parts:
            some[:] = self._part(part, path, first + len(some), len(some))
            if on_read is not None:
                on_read(len(some))

    def check_sizes(self, sizes: Mapping[str, int]) -> None:
        """Makes sure that objects are there and not smaller than they should be.

        Raises:
            CorruptBackupError: Naming one that is not.
            BucketError: If they cannot be asked for.
        """
        ends = {
            path: self._kv.read(path, byte_range=slice(size - 1, size))
            for path, size in sizes.items()
            if size
        }
        for path, end in ends.items():
            try:
                self._part(end, path, sizes[path], 1)
            except FileNotFoundError as e:
                raise CorruptBackupError(
                    f"{self.path(path)}: expected {sizes[path]} bytes, found no such object."
                ) from e

    def _part(self, future: Any, path: str, end: int, size_bytes: int) -> bytes:
        try:
            found = self.wait(future, f"read {path}", size_bytes)
        except BucketError as e:
            if "OUT_OF_RANGE" in str(e.__cause__):
                raise CorruptBackupError(
                    f"{self.path(path)}: expected at least {end} bytes, found fewer."
                ) from e
            raise
        if found.state != "value":
            raise FileNotFoundError(errno.ENOENT, "no such object", self.path(path))
        data = bytes(found.value)
        if len(data) != size_bytes:
            raise CorruptBackupError(f"{self.path(path)}: expected at least {end} bytes.")
        return data

    def write_all(self, objects: Mapping[str, bytes]) -> None:
        """Writes objects, all at once; on return they are durable."""
        written = [(path, len(data), self._kv.write(path, data)) for path, data in objects.items()]
        for path, size_bytes, future in written:
            self.wait(future, f"write {path}", size_bytes)

    def write_if(self, path: str, data: bytes | None, generation: bytes) -> bytes | None:
        """Replaces an object, or removes it, if it still is of the generation that is known.

        Returns:
            The generation that it has then; None if it was another one. That may be what this
            very call wrote, if the answer to its first attempt was lost.
        """
        stamp = self.wait(self._kv.write(path, data, if_equal=generation), f"write {path}")
        return bytes(stamp.generation) or None

    def remove_below(self, prefix: str) -> None:
        """Removes all objects that begin so."""
        self.wait(self._kv.delete_range(_range_of(prefix)), f"remove {prefix}*")

    def remove(self, path: str) -> None:
        """Removes an object if it is there."""
        self.wait(self._kv.write(path, None), f"remove {path}")

    def remove_empty_root(self) -> bool:
        """Nothing to do: a prefix without objects is none."""
        return True

    def kvstore(self, directory: str) -> dict[str, Any]:
        """Returns the spec of a key-value store below a directory."""
        return {**self._spec, "path": f"{self._spec['path']}{directory}/"}

    @property
    def context(self) -> Any:
        """What all of a process share: connections, limits, and what `memory://` holds."""
        return _make_context()

    def write_array(self, path: str, array: Any, data: Any) -> None:
        """Writes an object as a part of an array of tensorstore; on return it is durable.

        Args:
            path: The object.
            array: The part of the array that is there.
            data: Its bytes. Must not change meanwhile.
        """
        may_refer = not self.keeps_data
        written = array.write(data, can_reference_source_data_indefinitely=may_refer).commit
        self.wait(written, f"write {path}", len(data))

    def wait(self, future: Any, what: str, size_bytes: int = 0) -> Any:
        """Returns what a future of tensorstore comes to.

        Args:
            future: The future.
            what: What was begun by it, for error texts.
            size_bytes: How much is transferred; more is waited for longer.

        Raises:
            BucketError: If it failed, or has no answer in time.
        """
        limit_s = _PATIENCE_S + size_bytes * _PATIENCE_S_PER_BYTE
        try:
            return future.result(timeout=limit_s)
        except TimeoutError as e:
            future.cancel()
            raise BucketError(
                f"{self.root}: could not {what}: no answer within {limit_s:.0f} s. Check the "
                "network, and whether the store is up."
            ) from e
        except Exception as e:
            raise self._explain(e, what) from e

    def _explain(self, error: Exception, what: str) -> BucketError:
        answer = re.sub(r"\s+", " ", str(error)).partition(" [http_response_body")[0]
        if "NoSuchBucket" in answer or answer.startswith("NOT_FOUND"):
            advice = "There is no such bucket. Make it, or mend its name."
        elif answer.startswith(("PERMISSION_DENIED", "UNAUTHENTICATED")):
            advice = (
                "Access was denied. Check the credentials, and whether they may list, read, "
                "write and delete objects there."
            )
        elif answer.startswith("INVALID_ARGUMENT"):
            advice = "Check the names of bucket and prefix, and the spec if there is one."
        else:
            advice = "Check the network, the endpoint, and whether the store is up."
        return BucketError(
            f"{self.root}: could not {what}. {advice} The answer: {answer[:_SHOWN_CHARACTERS]}"
        )

    @functools.cached_property
    def _kv(self) -> Any:
        try:
            opened = _load_tensorstore().KvStore.open(self._spec, context=self.context)
        except ValueError as e:  # a spec that it does not understand
            raise self._explain(e, "open it") from e
        return self.wait(opened, "open it")


def _cut(begin: int, buffer: memoryview) -> Iterator[Piece]:
    for at in range(0, len(buffer), _READ_BYTES):
        yield begin + at, buffer[at : at + _READ_BYTES]


def _range_of(prefix: str) -> Any:
    """All keys that begin so."""
    after = prefix[:-1] + chr(ord(prefix[-1]) + 1) if prefix else ""
    return _load_tensorstore().KvStore.KeyRange(prefix, after)


def _load_tensorstore() -> Any:
    # On first use: it starts threads, and older releases aborted in children forked after that
    # (google/tensorstore#217).
    for name, value in _CUT_WHEN_SLOW.items():
        os.environ.setdefault(name, value)
    return importlib.import_module("tensorstore")


@functools.cache
def _make_context() -> Any:
    return _load_tensorstore().Context()
