"""Files that say what cannot be true: what a reader of backups must refuse, each for its reason.

They are kept in `tests/hostile`, with an index of what each must be refused with, so that a reader
in another language can be tried on them too. Made anew, when the format changes, by

    python -m proof.hostile

which leaves `found` alone: what the fuzzer has found there (`python -m proof.fuzz`).
"""

import copy
import dataclasses
import json
import shutil
from pathlib import Path

from crc32c import crc32c

from stepsave.format.blueprint import Blueprint
from stepsave.format.holding import Holding, encode_holding
from stepsave.format.layout import encode_layout
from stepsave.format.planning import compile_layout
from stepsave.format.records import FileRecord, LeafSpec
from stepsave.format.tree import encode_structure

DIRECTORY = Path(__file__).parents[1] / "hostile"
USUAL = "CorruptBackupError"

LEAVES = (
    LeafSpec(("a",), (40, 20), "float32"),
    LeafSpec(("b", "0"), (7,), "int8"),
    LeafSpec(("b", "1"), (), "float64"),
    LeafSpec(("empty",), (0, 3), "bfloat16"),
)
NOTES = [(("b",), "list", 2), (("none",), "none", None), ((), "dict", ["a", "b", "empty", "none"])]
RUN = "20261129T213246Z-6a6cea1f9883d018"
DEEP = 1_500  # where Python's own limit is 1,000
HUGE = 1 << 62


def good():
    """A document of each kind that is as it should be, by kind: what the others are made of."""
    plan = compile_layout(LEAVES)
    files = [FileRecord.of(path, data) for path, data in sorted(Blueprint(plan, {}).files.items())]
    backup = {
        "step": 5,
        "directory": "5",
        "nonce": "0123456789abcdef0123456789abcdef",
        "files": [[file.path, file.size_bytes, file.crc32c] for file in files],
        "shard_bytes": plan.shard_bytes,
        "shard_digests": [1] * plan.shard_count,
    }
    owner = {"run": RUN, "host": "node-3", "pid": 4711}
    older = {**backup, "step": 3, "directory": "3"}
    structure = json.loads(encode_structure(NOTES))
    values = {"float": ["float", "inf"], "bytes": ["bytes", "AAEC"], "tuple": ["tuple", [1, 2]],
              "dict": ["dict", [[1, 2]]], "array": ["array", "int16", [2], "AQACAA=="],
              "scalar": ["scalar", "uint8", [], "Bw=="], "beside": ["array beside", 0]}  # fmt: skip
    return {
        "marker": {"format": 1, **backup, "older": [older]},
        "claim": {
            "format": 2,
            "owner": owner,
            "backups": [{**one, "directory": f"{RUN}/{one['step']}"} for one in (backup, older)],
        },
        "layout": json.loads(encode_layout(plan)),
        "training": {"format": 1, "step": 5, "metadata": {"epoch": 1}, "structure": structure},
        "holding": json.loads(encode_holding(Holding(0, 2, 0, 1, None, plan))),
        "values": {name: {"__stepsave__": value} for name, value in values.items()},
        "time": {"commit_timestamp_nsecs": 1_796_000_000_000_000_000},
    }


def prove(body, version=1):
    """A marker around a text, which proves itself."""
    return f"stepsave-commit {version} {crc32c(body):08x} {len(body)}\n".encode() + body


def dump(document):
    return json.dumps(document, separators=(",", ":")).encode()


def at(*way, to):
    """A change of what lies at a place in a document."""

    def change(document):
        *parents, last = way
        for key in parents:
            document = document[key]
        document[last] = to

    return change


def without(*way):
    def change(document):
        *parents, last = way
        for key in parents:
            document = document[key]
        del document[last]

    return change


@dataclasses.dataclass(frozen=True)
class Text:
    """A change of the document as a text."""

    old: bytes
    new: bytes

    def __call__(self, encoded):
        assert self.old in encoded
        return encoded.replace(self.old, self.new, 1)


def shape(leaf, *sizes):
    """A change of an array of one chunk."""
    chunk_shape = [size or 1 for size in sizes]
    return lambda d: d["leaves"][leaf].update(shape=list(sizes), chunk_shape=chunk_shape)


def nested_tuples(document):
    value = 1
    for _ in range(280):
        value = {"__stepsave__": ["tuple", [value]]}
    document["tuple"] = value


FILE, OLDER, BACKUP = ("files", 0), ("older", 0), ("backups", 0)
LEAF = ("leaves", 0)
NOTE = ("structure", "notes")

# By name: a change of the text. It makes a document of any kind impossible.
OF_ALL = {
    "nothing at all": lambda _: b"",
    "null": lambda _: b"null",
    "a list": lambda _: b"[]",
    "a number": lambda _: b"7",
    "not closed": lambda encoded: encoded[:-1],
    "something after it": lambda encoded: encoded + b"{}",
    "bad UTF-8": Text(b'"', b'"\xff'),
    "UTF-16": lambda encoded: encoded.decode().encode("utf-16"),
    "a byte order mark": lambda encoded: b"\xef\xbb\xbf" + encoded,
    "nested deeply": lambda _: b"[" * DEEP + b"]" * DEEP,
    "objects nested deeply": lambda _: b'{"format":' * DEEP + b"1" + b"}" * DEEP,
    "a key twice": Text(b"{", b'{"x":1,"x":2,'),
    "a number of many digits": lambda _: b"1" * 5_000,  # as Python takes no more than 4,300
    "a pickle": lambda _: b"cos\nsystem\n(S'touch pwned'\ntR.",
}
# By kind and name: a change of the document; and the error, if that is not the usual one.
CHANGES = {
    "marker": {
        "directory above": at("directory", to=".."),
        "absolute directory": at("directory", to="/"),
        "directory of another step": at("directory", to="3"),
        "directory in digits of another script": at("directory", to="\u0665"),
        "path above": at(*FILE, 0, to="../../secret"),
        "path above in its midst": at(*FILE, 0, to="pytree/../../../secret"),
        "absolute path": at(*FILE, 0, to="/etc/hostname"),
        "path with a null": at(*FILE, 0, to="layout\0.json"),
        "path with a backslash": at(*FILE, 0, to="..\\secret"),
        "path with a lone surrogate": at(*FILE, 0, to="layout\ud800.json"),
        "no path": at(*FILE, 0, to=""),
        "file of two": at(*FILE, to=["layout.json", 3]),
        "negative size of a file": at(*FILE, 1, to=-1),
        "huge size of a file": at(*FILE, 1, to=1 << 40),
        "size of a file beyond 64 bits": at(*FILE, 1, to=1 << 70),
        "size of a file as text": at(*FILE, 1, to="3"),
        "checksum beyond 32 bits": at(*FILE, 2, to=1 << 32),
        "step is text": at("step", to="5"),
        "step is a fraction": at("step", to=5.5),
        "step is true": at("step", to=True),
        "step is NaN": Text(b'"step":5', b'"step":NaN'),
        "step is infinite": Text(b'"step":5', b'"step":Infinity'),
        "step is 1e999": Text(b'"step":5', b'"step":1e999'),
        "step below zero": lambda d: d.update(step=-5, directory="-5"),
        "step beyond 64 bits": lambda d: d.update(step=1 << 63, directory=str(1 << 63)),
        "no files": without("files"),
        "files are a number": at("files", to=7),
        "digests are null": at("shard_digests", to=None),
        "negative digest": at("shard_digests", to=[-1]),
        "negative size of shards": at("shard_bytes", to=-4096),
        "older is as new": lambda d: d["older"][0].update(step=5, directory="5"),
        "older is newer": lambda d: d["older"][0].update(step=9, directory="9"),
        "older is itself": lambda d: d.update(older=[copy.deepcopy(d)]),
        "older is a number": at("older", to=[7]),
        "older leads above": at(*OLDER, "directory", to="../3"),
    },
    "claim": {
        "run above": at(*BACKUP, "directory", to=f"../{RUN}/5"),
        "directory without a run": at(*BACKUP, "directory", to="5"),
        "run with a slash": at(*BACKUP, "directory", to=f"{RUN}/x/5"),
        "path above": at(*BACKUP, *FILE, 0, to="../../secret"),
        "path with a lone surrogate": at(*BACKUP, *FILE, 0, to="\udcff"),
        "no owner": without("owner"),
        "owner is text": at("owner", to="me"),
        "process is infinite": Text(b'"pid":4711', b'"pid":Infinity'),
        "process is text": at("owner", "pid", to="one"),
        "no backups": without("backups"),
        "two of one step": lambda d: d["backups"].append(copy.deepcopy(d["backups"][1])),
        "negative size": at(*BACKUP, *FILE, 1, to=-1),
    },
    "layout": {
        "future format": (at("format", to=3), "FormatVersionError"),
        "format is text": (at("format", to="1"), "FormatVersionError"),
        "unknown dtype": at(*LEAF, "dtype", to="object"),
        "code for a dtype": at(*LEAF, "dtype", to="O,i4"),
        "dtype is a list": at(*LEAF, "dtype", to=[]),
        "overlapping chunks": at("leaves", 1, "offsets", to=[0]),
        "chunk outside": at("leaves", 1, "offsets", to=[HUGE]),
        "chunk that overflows": at("leaves", 1, "offsets", to=[(1 << 63) - 1]),
        "offset beyond 64 bits": at("leaves", 1, "offsets", to=[1 << 63]),
        "negative offset": at("leaves", 1, "offsets", to=[-64]),
        "offset is a fraction": at("leaves", 1, "offsets", to=[64.0]),
        "offset is true": at("leaves", 1, "offsets", to=[True]),
        "chunk across shards": at("leaves", 1, "offsets", to=[4096 - 8]),
        "one offset too many": at(*LEAF, "offsets", to=[0, 64]),
        "offsets are text": at(*LEAF, "offsets", to="0"),
        "huge shape": shape(0, HUGE, 1),
        "shape that overflows": shape(0, 1 << 32, 1 << 32),
        "larger than its place": shape(0, 400, 20),
        "negative shape": lambda d: d["leaves"][0].update(shape=[-40, -20], chunk_shape=[40, 20]),
        "empty but huge": shape(3, 0, HUGE, HUGE),
        "many axes": shape(2, *[1] * 65),
        "chunks of nothing": at(*LEAF, "chunk_shape", to=[0, 20]),
        "chunks that are no runs": lambda d: d["leaves"][0].update(
            chunk_shape=[40, 10], offsets=[0, 1664]
        ),
        "chunks of other axes": at(*LEAF, "chunk_shape", to=[40]),
        "many chunks": lambda d: d["leaves"][0].update(
            shape=[10_000_001, 1], chunk_shape=[1, 1], offsets=[0]
        ),
        "no path": at(*LEAF, "path", to=[]),
        "path of numbers": at(*LEAF, "path", to=[1]),
        "path of nothing": at(*LEAF, "path", to=[""]),
        "path with a lone surrogate": at(*LEAF, "path", to=["\ud800"]),
        "long path": at(*LEAF, "path", to=["x" * 5000]),
        "two of one name": at("leaves", 1, "path", to=["a"]),
        "two of one joined name": at(*LEAF, "path", to=["b.0"]),
        "leaf below a leaf": at("leaves", 1, "path", to=["a", "0"]),
        "leaf above a leaf": at("leaves", 3, "path", to=["b"]),
        "leaves are a number": at("leaves", to=7),
        "leaves are text": at("leaves", to="abc"),
        "no leaves": without("leaves"),
        "shards that are no pages": at("shard_bytes", to=5000),
        "shards of nothing": at("shard_bytes", to=0),
        "negative shards": at("shard_bytes", to=-4096),
        "no shards": at("shard_count", to=0),
        "many shards": at("shard_count", to=1 << 40),
        "shards are NaN": Text(b'"shard_bytes":4096', b'"shard_bytes":NaN'),
    },
    "training": {
        "future format": (at("format", to=2), "FormatVersionError"),
        "format is text": at("format", to="1"),
        "no format": without("format"),
        "no metadata": without("metadata"),
        "metadata is a list": at("metadata", to=[]),
        "metadata has NaN": Text(b'"epoch":1', b'"epoch":NaN'),
        "metadata is infinite": Text(b'"epoch":1', b'"epoch":-Infinity'),
        "metadata is 1e999": Text(b'"epoch":1', b'"epoch":1e999'),
        "future structure": (at("structure", "version", to=2), "FormatVersionError"),
        "structure is a number": at("structure", to=7),
        "notes are a number": at(*NOTE, to=7),
        "note of nothing": at(*NOTE, 0, to=[]),
        "unknown note": at(*NOTE, 0, 1, to="set"),
        "note of a list": at(*NOTE, 0, 1, to=[]),
        "note with much to say": at(*NOTE, 0, to=[["b"], "list", 2, 3]),
        "list of another length": at(*NOTE, 0, 2, to=3),
        "huge list": at(*NOTE, 0, 2, to=HUGE),
        "list of what is no child": at(*NOTE, 0, to=[["b", "0"], "list", 0]),
        "note below an array": at(*NOTE, 1, 0, to=["a", "x"]),
        "note below nothing": lambda d: d["structure"]["notes"].insert(
            2, [["none", "x"], "none"]
        ),
        "two notes of one place": lambda d: d["structure"]["notes"].insert(
            1, d["structure"]["notes"][0]
        ),
        "none where an array is": at(*NOTE, 1, 0, to=["a"]),
        "number of many elements": at(*NOTE, 1, to=[["a"], "int"]),
        "key that is not there": at(*NOTE, 2, 2, to=["a", "b", "empty", "x"]),
        "key twice": at(*NOTE, 2, 2, to=["a", "a", "b", "empty"]),
        "key is a list": at(*NOTE, 2, 2, to=[["a"], "b", "empty", "none"]),
        "keys are a number": at(*NOTE, 2, 2, to=4),
        "note far below": at(*NOTE, 1, 0, to=["x"] * DEEP),
        "parent before its children": lambda d: d["structure"]["notes"].reverse(),
    },
    "holding": {
        "future format": (at("format", to=2), "FormatVersionError"),
        "process beyond all": at("process", to=2),
        "negative process": at("process", to=-1),
        "process is true": at("process", to=True),
        "shards beyond all": at("shard_count", to=2),
        "shards before all": at("first_shard", to=-1),
        "negative shards": at("shard_count", to=-1),
        "device is a number": at("device", to=7),
        "no layout": without("layout"),
        "layout is text": at("layout", to="{}"),
        "layout of the future": (at("layout", "format", to=3), "FormatVersionError"),
        "layout with an overlap": at("layout", "leaves", 1, "offsets", to=[0]),
    },
    "values": {
        "unknown kind": at("float", "__stepsave__", 0, to="object"),
        "no kind": at("float", "__stepsave__", to=[]),
        "kind is null": at("float", "__stepsave__", to=None),
        "kind is a list": at("float", "__stepsave__", 0, to=[]),
        "float of a word": at("float", "__stepsave__", 1, to="much"),
        "float of many digits": at("float", "__stepsave__", 1, to=10**400),
        "bytes that are none": at("bytes", "__stepsave__", 1, to="!"),
        "bytes are a number": at("bytes", "__stepsave__", 1, to=7),
        "tuple of a number": at("tuple", "__stepsave__", 1, to=7),
        "key that is a list": at("dict", "__stepsave__", 1, to=[[[], 1]]),
        "dict of three": at("dict", "__stepsave__", 1, to=[[1, 2, 3]]),
        "objects": at("array", "__stepsave__", 1, to="O"),
        "fields of objects": at("array", "__stepsave__", 1, to="O,i2"),
        "dtype of a word": at("array", "__stepsave__", 1, to="__import__('os')"),
        "dtype not closed": at("array", "__stepsave__", 1, to="(2"),
        "dtype in an object": at("array", "__stepsave__", 1, to={"names": ["a"], "formats": ["O"]}),
        "another shape": at("array", "__stepsave__", 2, to=[3]),
        "huge shape": at("array", "__stepsave__", 2, to=[HUGE]),
        "shape of a word": at("array", "__stepsave__", 2, to="ab"),
        "array that is not beside": at("beside", "__stepsave__", 1, to=len(LEAVES)),
        "array before the first": at("beside", "__stepsave__", 1, to=-1),
        "array beside of a word": at("beside", "__stepsave__", 1, to="0"),
        "tuples in tuples": nested_tuples,
    },
    "time": {
        "no time": lambda d: d.clear(),
        "time is text": at("commit_timestamp_nsecs", to="1"),
        "time is null": at("commit_timestamp_nsecs", to=None),
        "time is true": at("commit_timestamp_nsecs", to=True),
        "time before all": at("commit_timestamp_nsecs", to=-1),
        "time of many digits": at("commit_timestamp_nsecs", to=10**400),
        "time is NaN": Text(b"1796000000000000000", b"NaN"),
        "time is infinite": Text(b"1796000000000000000", b"1e999"),
    },
}  # fmt: skip

# Of markers that do not prove themselves, or not as what they are.
LINES = {
    "future format": (lambda body: prove(body, 3), "FormatVersionError"),
    "format of a word": (lambda body: prove(body, "one"), "FormatVersionError"),
    "wrong checksum": lambda body: b"stepsave-commit 1 00000000 %d\n" % len(body) + body,
    "wrong length": lambda body: b"stepsave-commit 1 %08x 7\n" % crc32c(body) + body,
    "another word": lambda body: prove(body).replace(b"stepsave", b"steptake", 1),
    "no line": lambda body: body,
    "a line of many words": lambda body: b"stepsave-commit 1 " * 1000 + b"\n" + body,
    "of the other kind": lambda body: prove(body, 2),
}


def files():
    """All hostile files: content and error, by path."""
    made = {}
    for kind, document in good().items():
        for name, change in CHANGES[kind].items():
            how, error = change if isinstance(change, tuple) else (change, USUAL)
            made[f"{kind}/{_slug(name)}"] = of_kind(kind, _changed(document, how)), error
        for name, change in OF_ALL.items() if kind != "values" else ():  # of which any is one
            made[f"{kind}/{_slug(name)}"] = of_kind(kind, change(dump(document))), USUAL
    body = dump(good()["marker"])
    for name, change in LINES.items():
        how, error = change if isinstance(change, tuple) else (change, USUAL)
        made[f"marker/line-{_slug(name)}"] = how(body), error
    return made


def of_kind(kind, body):
    """A body as it is stored: of a marker with the line that proves it."""
    versions = {"marker": 1, "claim": 2}
    return prove(body, versions[kind]) if kind in versions else body


def _changed(document, change):
    if isinstance(change, Text):
        return change(dump(document))
    document = copy.deepcopy(document)
    change(document)
    return dump(document)


def _slug(name):
    return name.lower().replace(" ", "-")


def write(directory):
    """Writes all files, and their index; what has been found stays."""
    made = files()
    for kind in good():
        shutil.rmtree(directory / kind, ignore_errors=True)
        (directory / kind).mkdir(parents=True)
    for path, (data, _) in made.items():
        (directory / path).write_bytes(data)
    index = {path: error for path, (_, error) in sorted(made.items())}
    (directory / "index.json").write_text(json.dumps(index, indent=1) + "\n")


if __name__ == "__main__":
    write(DIRECTORY)
