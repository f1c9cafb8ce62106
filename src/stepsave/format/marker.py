"""Commit markers: small files that say which backup is valid, and prove it.

A marker is one line, which proves the JSON after it by length and CRC-32C:

    stepsave-commit 1 0a1b2c3d 4711
    {"format":1,"step":120,…}

It is trusted by content only, never by existence: after a power cut ext4 can show a file
that was renamed into place, but empty.

Of the backups before the newest one marker names all: one as itself, those before it as `older`.

In a bucket, where nothing can be renamed and only one object be replaced conditionally, one marker
says everything: who may save, the newest backup and those before it. That is version 2.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable
from typing import Any, cast

from stepsave.errors import CorruptBackupError, FormatVersionError, InvalidStateError
from stepsave.format.checksum import crc32c
from stepsave.format.records import BackupRecord, Claim, FileRecord, Owner, read_json

__all__ = (
    "FILE_LIMIT_BYTES",
    "MARKER_LIMIT_BYTES",
    "RUN_NAME",
    "decode_marker",
    "encode_claim",
    "encode_marker",
)

MARKER_LIMIT_BYTES = 64 << 20
"""Far beyond any real marker; bounds what a hostile one can make a reader allocate."""

RUN_NAME = r"2\d{7}T\d{6}Z-[0-9a-f]{16}"
"""Of folders in a bucket, as a regular expression: when, in UTC, and a random number."""

FILE_LIMIT_BYTES = 1 << 30
"""Of a file that is read as a whole; likewise: a file full of holes costs its writer nothing."""

_CRC_LIMIT = 2**32 - 1

_MAGIC = "stepsave-commit"
_OF_DIRECTORY, _OF_BUCKET = 1, 2


def encode_marker(record: BackupRecord, *older: BackupRecord) -> bytes:
    """Encodes a marker of a directory: a line that proves the JSON after it."""
    document = _document_of(record)
    if older:
        document["older"] = [_document_of(one) for one in older]
    return _prove(_OF_DIRECTORY, document)


def encode_claim(claim: Claim) -> bytes:
    """Encodes the marker of a bucket."""
    owner, backups = claim.owner, [_document_of(record) for record in claim.backups]
    person = {"run": owner.run, "host": owner.host, "pid": owner.pid}
    return _prove(_OF_BUCKET, {"owner": person, "backups": backups})


def decode_marker(encoded: bytes, source: str) -> tuple[BackupRecord, ...] | Claim:
    """Decodes a marker, trusting nothing but what its checksum proves.

    Returns:
        The backups that it names, newest first; of a bucket's marker a claim.

    Raises:
        FormatVersionError: If a newer stepsave wrote it.
        CorruptBackupError: If it does not prove itself.
    """
    line, _, body = encoded.partition(b"\n")
    words = line.decode("ascii", errors="replace").split()
    if len(words) != 4 or words[0] != _MAGIC:
        found = f"{len(encoded)} bytes that start with {encoded[:20]!r}"
        raise CorruptBackupError(f"{source}: expected a commit marker, found {found}.")
    if words[1] not in (str(_OF_DIRECTORY), str(_OF_BUCKET)):
        raise FormatVersionError(
            f"{source}: written in format {words[1]}, but this stepsave reads markers up to format "
            f"{_OF_BUCKET}. Install a newer stepsave to restore this backup."
        )
    if words[3] != str(len(body)):
        raise CorruptBackupError(
            f"{source}: expected {words[3]} bytes after the first line, found {len(body)}."
        )
    if words[2] != f"{crc32c(body):08x}":
        raise CorruptBackupError(
            f"{source}: expected CRC-32C {words[2]}, found {crc32c(body):08x}."
        )
    try:
        document = read_json(body)
        if words[1] == str(_OF_BUCKET):
            return _claim_of(document)
        newest = _record_of(document, r"\d+")  # so it is a dict
        older = (_record_of(one, r"\d+") for one in document.get("older", ()))
        return _newest_first((newest, *older))
    except (ValueError, KeyError, TypeError) as e:
        raise CorruptBackupError(f"{source}: malformed commit marker: {e!r}.") from e


def _prove(version: int, document: dict[str, Any]) -> bytes:
    body = json.dumps({"format": version, **document}, separators=(",", ":")).encode()
    return f"{_MAGIC} {version} {crc32c(body):08x} {len(body)}\n".encode() + body


def _document_of(record: BackupRecord) -> dict[str, Any]:
    for file in record.files:
        if file.size_bytes > FILE_LIMIT_BYTES:  # or the backup could never be read
            raise InvalidStateError(
                f"{record.directory}/{file.path}: expected at most {FILE_LIMIT_BYTES} bytes beside "
                f"the arrays, found {file.size_bytes}. Put less into the metadata, or into fewer "
                "arrays with shorter names."
            )
    document = {
        "step": record.step,
        "directory": record.directory,
        "nonce": record.nonce,
        "files": [[file.path, file.size_bytes, file.crc32c] for file in record.files],
        "shard_bytes": record.shard_bytes,
        "shard_digests": list(record.shard_digests),
    }
    if record.ended:
        document["ended"] = True
    return document


def _claim_of(document: dict[str, Any]) -> Claim:
    owner = document["owner"]
    of_run = Owner(str(owner["run"]), str(owner["host"]), int(owner["pid"]))
    backups = (_record_of(one, rf"{RUN_NAME}/\d+") for one in document["backups"])
    return Claim(of_run, _newest_first(backups))


def _newest_first(records: Iterable[BackupRecord]) -> tuple[BackupRecord, ...]:
    """Returns them all, if each is older than the one before it."""
    found = tuple(records)
    for newer, older in itertools.pairwise(found):
        if newer.step <= older.step:
            raise ValueError(f"step {older.step} is named as older than step {newer.step}")
    return found


def _record_of(document: dict[str, Any], directory_form: str) -> BackupRecord:
    files = cast("list[tuple[str, int, int]]", document["files"])
    record = BackupRecord(
        step=_whole(document["step"]),
        directory=str(document["directory"]),
        nonce=str(document["nonce"]),
        files=tuple(
            FileRecord(str(path), _whole(size, FILE_LIMIT_BYTES), _whole(crc, _CRC_LIMIT))
            for path, size, crc in files
        ),
        shard_bytes=_whole(document["shard_bytes"]),
        shard_digests=tuple(_whole(digest, _CRC_LIMIT) for digest in document["shard_digests"]),
        ended=document.get("ended", False) is True,
    )
    is_of_step = record.directory.rpartition("/")[2] == str(record.step)
    if not is_of_step or not re.fullmatch(directory_form, record.directory, re.ASCII):
        raise ValueError(f"directory {record.directory!r} is not that of step {record.step}")
    for file in record.files:
        parts = file.path.split("/")
        if not all(parts) or ".." in parts or "\0" in file.path or "\\" in file.path:
            raise ValueError(f"path {file.path!r} leads outside the backup")
        file.path.encode()  # no lone surrogates, which a file system may take for other bytes
    return record


def _whole(value: object, limit: int = 2**63 - 1) -> int:
    if type(value) is not int or not 0 <= value <= limit:
        raise ValueError(f"{value!r:.40} is no number from 0 to {limit}")
    return value
