import contextlib
import copy
import json

import pytest
from engine_support import check_python
from hypothesis import given, settings
from hypothesis import strategies as st
from layout_support import chunk_limit, leaf_lists, limits

from stepsave.errors import CorruptBackupError, FormatVersionError
from stepsave.format.layout import decode_layout, encode_layout
from stepsave.format.planning import compile_layout
from stepsave.format.records import LeafSpec


@given(leaf_lists, limits)
def test_a_plan_survives_encoding_and_is_the_same_every_time(leaves, limit_bytes):
    with chunk_limit(limit_bytes):
        plan = compile_layout(leaves)
        assert compile_layout(list(leaves)) == plan
    encoded = encode_layout(plan)
    assert decode_layout(encoded, "here") == plan
    assert encode_layout(decode_layout(encoded, "here")) == encoded


def test_a_layout_is_this_very_json():
    plan = compile_layout([LeafSpec(("a", "b"), (2, 3), "bfloat16"), LeafSpec(("c",), (), "bool")])
    assert encode_layout(plan) == (
        b'{"format":1,"shard_bytes":4096,"shard_count":1,"leaves":['
        b'{"path":["a","b"],"shape":[2,3],"dtype":"bfloat16","chunk_shape":[2,3],"offsets":[0]},'
        b'{"path":["c"],"shape":[],"dtype":"bool","chunk_shape":[],"offsets":[64]}]}'
    )


def good_document():
    with chunk_limit(1 << 10):
        plan = compile_layout(
            [
                LeafSpec(("a",), (30, 20), "float32"),
                LeafSpec(("b",), (7,), "int8"),
                LeafSpec(("c",), (0, 3), "int8"),
            ]
        )
    return json.loads(encode_layout(plan))


SPOILS = {
    "format from the future": (lambda d: d.update(format=3), "Install a newer stepsave"),
    "no format": (lambda d: d.pop("format"), "expected a layout"),
    "no leaves": (lambda d: d.pop("leaves"), "malformed"),
    "leaves are a number": (lambda d: d.update(leaves=3), "malformed"),
    "leaf is a list": (lambda d: d["leaves"].append([]), "malformed"),
    "shard not whole pages": (lambda d: d.update(shard_bytes=d["shard_bytes"] + 1), "multiple"),
    "shard of nothing": (lambda d: d.update(shard_bytes=0), "shard_bytes"),
    "shard size is true": (lambda d: d.update(shard_bytes=True), "shard_bytes"),
    "shard size is a float": (lambda d: d.update(shard_bytes=4096.0), "shard_bytes"),
    "shard size is huge": (lambda d: d.update(shard_bytes=1 << 80), "shard_bytes"),
    "no shards": (lambda d: d.update(shard_count=0), "shard_count"),
    "negative shards": (lambda d: d.update(shard_count=-1), "shard_count"),
    "unknown dtype": (lambda d: d["leaves"][0].update(dtype="object"), "unknown dtype"),
    "dtype is a list": (lambda d: d["leaves"][0].update(dtype=["int8"]), "malformed"),
    "empty path": (lambda d: d["leaves"][0].update(path=[]), "path"),
    "path of numbers": (lambda d: d["leaves"][0].update(path=[1]), "path"),
    "same path twice": (lambda d: d["leaves"][0].update(path=["b"]), "both"),
    "negative shape": (lambda d: d["leaves"][1].update(shape=[-7]), "shape"),
    "huge shape": (lambda d: d["leaves"][1].update(shape=[1 << 63]), "shape"),
    "shape that overflows": (lambda d: d["leaves"][1].update(shape=[1 << 40, 1 << 40]), "large"),
    "more dimensions than NumPy": (
        lambda d: d["leaves"][1].update(shape=[1] * 65, chunk_shape=[1] * 65),
        "large",
    ),
    "shape is text": (lambda d: d["leaves"][1].update(shape="7"), "shape"),
    "chunks of nothing": (lambda d: d["leaves"][1].update(chunk_shape=[0]), "chunk"),
    "chunk of another rank": (lambda d: d["leaves"][1].update(chunk_shape=[7, 1]), "contiguous"),
    "chunk larger than leaf": (lambda d: d["leaves"][1].update(chunk_shape=[8]), "contiguous"),
    "chunk across rows": (lambda d: d["leaves"][0].update(chunk_shape=[2, 10]), "contiguous"),
    "blocks that do not end where the leaf does": (
        lambda d: (d.update(format=2), d["leaves"][0].update(chunk_shape=[30, 7])),
        "even blocks",
    ),
    "more chunks than offsets": (lambda d: d["leaves"][1].update(chunk_shape=[1]), "offsets"),
    "no offset": (lambda d: d["leaves"][1].update(offsets=[]), "offsets"),
    "too many offsets": (lambda d: d["leaves"][1].update(offsets=[0, 64]), "offsets"),
    "offset of an empty leaf": (lambda d: d["leaves"][2].update(offsets=[0]), "offsets"),
    "negative offset": (lambda d: d["leaves"][1].update(offsets=[-64]), "offset"),
    "offset is null": (lambda d: d["leaves"][1].update(offsets=[None]), "offset"),
    "chunks overlap": (lambda d: d["leaves"][0]["offsets"].__setitem__(1, 8), "overlap"),
    "chunk crosses a shard": (
        lambda d: d["leaves"][1].update(offsets=[d["shard_bytes"] - 10]),
        "crosses",
    ),
    "checksum crosses a shard": (
        lambda d: d["leaves"][1].update(offsets=[d["shard_bytes"] - 8]),
        "crosses",
    ),
    "chunk beyond the arena": (
        lambda d: d["leaves"][1].update(offsets=[d["shard_bytes"] * d["shard_count"]]),
        "beyond",
    ),
}


@pytest.mark.parametrize("name", SPOILS)
def test_an_impossible_layout_is_refused_with_its_path(name):
    spoil, message = SPOILS[name]
    document = good_document()
    decode_layout(json.dumps(document).encode(), "here")  # fine as it is
    spoil(document)
    expected = FormatVersionError if "future" in name else CorruptBackupError
    with pytest.raises(expected, match=message) as caught:
        decode_layout(json.dumps(document).encode(), "the/path")
    assert "the/path" in str(caught.value)


@pytest.mark.parametrize(
    "encoded",
    [b"", b"null", b"[]", b"3", b"{", b"\xff\xfe", b"[" * 100_000, b'{"format":' + b"9" * 5000],
)
def test_what_is_no_layout_is_refused_with_its_path(encoded):
    with pytest.raises(CorruptBackupError, match="the/path"):
        decode_layout(encoded, "the/path")


@settings(max_examples=300)
@given(st.data())
def test_a_spoiled_value_anywhere_never_escapes_as_another_error(data):
    document = good_document()
    places = []

    def walk(node):
        for key in node if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], (dict, list)):
                walk(node[key])

    walk(document)
    node, key = data.draw(st.sampled_from(places))
    scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
    node[key] = data.draw(scalars | st.lists(scalars, max_size=2) | st.just({}))
    # A count of billions is its own test below: it must not be run in this process.
    shard_count = document.get("shard_count") if isinstance(document, dict) else None
    if isinstance(shard_count, int) and shard_count > 10_000:
        return
    with contextlib.suppress(CorruptBackupError):
        decode_layout(json.dumps(copy.deepcopy(document)).encode(), "here")


def test_a_claim_of_billions_of_shards_costs_neither_time_nor_memory():
    printed = check_python(
        """
import resource
from stepsave.errors import CorruptBackupError
from stepsave.format.layout import decode_layout
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
text = b'{"format":1,"shard_bytes":4096,"shard_count":2000000000000000,"leaves":[]}'
try:
    decode_layout(text, "the/path")
except CorruptBackupError as e:
    print(e)
""",
        timeout=60,
    )
    assert "the/path" in printed
