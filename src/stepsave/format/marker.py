"""Commit markers: small files that say which backup is valid, and prove it.

A marker is one line, which proves the JSON after it by length and CRC-32C:

    stepsave-commit 1 0a1b2c3d 4711
    {"format":1,"step":120,…}

It is trusted by content only, never by existence: after a power cut ext4 can show a file
that was renamed into place, but empty.
"""

from __future__ import annotations

import json
from typing import Any, cast

from stepsave.errors import CorruptBackupError, FormatVersionError
from stepsave.format.checksum import crc32c
from stepsave.format.records import FORMAT_VERSION, BackupRecord, FileRecord

__all__ = ("MARKER_LIMIT_BYTES", "decode_marker", "encode_marker")

MARKER_LIMIT_BYTES = 64 << 20
"""Far beyond any real marker; bounds what a hostile one can make a reader allocate."""

_MAGIC = "stepsave-commit"


def encode_marker(record: BackupRecord) -> bytes:
    """Encodes a marker: a line that proves the JSON after it."""
    document = {
        "format": FORMAT_VERSION,
        "step": record.step,
        "directory": record.directory,
        "nonce": record.nonce,
        "files": [[file.path, file.size_bytes, file.crc32c] for file in record.files],
        "shard_bytes": record.shard_bytes,
        "shard_digests": list(record.shard_digests),
    }
    if record.ended:
        document["ended"] = True
    body = json.dumps(document, separators=(",", ":")).encode()
    return f"{_MAGIC} {FORMAT_VERSION} {crc32c(body):08x} {len(body)}\n".encode() + body


def decode_marker(encoded: bytes, source: str) -> BackupRecord:
    """Decodes a marker, trusting nothing but what its checksum proves.

    Raises:
        FormatVersionError: If a newer stepsave wrote it.
        CorruptBackupError: If it does not prove itself.
    """
    advice = (
        "Nothing was deleted. Restore the file from a copy, or move the backup directory away "
        "to start afresh."
    )
    line, _, body = encoded.partition(b"\n")
    words = line.decode("ascii", errors="replace").split()
    if len(words) != 4 or words[0] != _MAGIC:
        found = f"{len(encoded)} bytes that start with {encoded[:20]!r}"
        raise CorruptBackupError(f"{source}: expected a commit marker, found {found}. {advice}")
    if words[1] != str(FORMAT_VERSION):
        raise FormatVersionError(
            f"{source}: written in format {words[1]}, but this stepsave reads format "
            f"{FORMAT_VERSION}. Install a newer stepsave to restore this backup."
        )
    if words[3] != str(len(body)):
        raise CorruptBackupError(
            f"{source}: expected {words[3]} bytes after the first line, found {len(body)}. {advice}"
        )
    if words[2] != f"{crc32c(body):08x}":
        raise CorruptBackupError(
            f"{source}: expected CRC-32C {words[2]}, found {crc32c(body):08x}. {advice}"
        )
    try:
        return _record_of(json.loads(body))
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as e:
        raise CorruptBackupError(f"{source}: malformed commit marker: {e!r}. {advice}") from e


def _record_of(document: dict[str, Any]) -> BackupRecord:
    files = cast("list[tuple[str, int, int]]", document["files"])
    record = BackupRecord(
        step=int(document["step"]),
        directory=str(document["directory"]),
        nonce=str(document["nonce"]),
        files=tuple(FileRecord(str(path), int(size), int(crc)) for path, size, crc in files),
        shard_bytes=int(document["shard_bytes"]),
        shard_digests=tuple(int(digest) for digest in document["shard_digests"]),
        ended=document.get("ended", False) is True,
    )
    if not record.directory.isdecimal() or record.directory != str(record.step):
        raise ValueError(f"directory {record.directory!r} is not that of step {record.step}")
    for file in record.files:
        parts = file.path.split("/")
        if not all(parts) or ".." in parts or "\0" in file.path or "\\" in file.path:
            raise ValueError(f"path {file.path!r} leads outside the backup")
    return record
