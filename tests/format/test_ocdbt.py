import pytest
import tensorstore as ts
from hypothesis import given
from hypothesis import strategies as st

from stepsave.format import ocdbt
from stepsave.format.ocdbt import Range, encode

DATA = bytes(range(256))

keys = st.binary(min_size=1, max_size=30)
values = st.binary(max_size=50) | st.builds(
    lambda start, size: Range("d/data", start, min(size, 256 - start)),
    st.integers(0, 255),
    st.integers(1, 256),
)


def open_stock(directory, files):
    """Stock tensorstore's view of an encoded database, with its data file beside it."""
    (directory / "d").mkdir(exist_ok=True)
    (directory / "manifest.ocdbt").write_bytes(files.manifest)
    (directory / "d" / "index").write_bytes(files.nodes)
    (directory / "d" / "data").write_bytes(DATA)
    return ts.KvStore.open({"driver": "ocdbt", "base": f"file://{directory}/"}).result()


def expected(value):
    if isinstance(value, Range):
        return DATA[value.offset_bytes : value.offset_bytes + value.length_bytes]
    return value


@given(st.dictionaries(keys, values, max_size=40))
def test_stock_tensorstore_reads_every_entry_back(tmp_path_factory, entries):
    directory = tmp_path_factory.mktemp("database")
    store = open_stock(directory, encode(entries.items(), "d/index"))
    assert sorted(store.list().result()) == sorted(entries)
    for key, value in entries.items():
        assert store.read(key).result().value == expected(value)


@pytest.mark.parametrize("count", [0, 1, 30, 40_000])
def test_a_tree_of_several_levels_is_read_too(tmp_path, monkeypatch, count):
    monkeypatch.setattr(ocdbt, "_NODE_TARGET_BYTES", 1000)  # 40,000 keys: three levels
    entries = {f"key {i:05}".encode(): Range("d/data", i % 250, 6) for i in range(count)}
    store = open_stock(tmp_path, encode(entries.items(), "d/index"))
    assert sorted(store.list().result()) == list(entries)
    for key in list(entries)[:: max(1, count // 50)]:
        assert store.read(key).result().value == expected(entries[key])
    assert store.read(b"no such key").result().state == "missing"


def test_keys_that_begin_alike_are_told_apart(tmp_path):
    entries = {key: key for key in (b"a", b"ab", b"abc", b"abd", b"b", "ä".encode(), b"\xff")}
    store = open_stock(tmp_path, encode(entries.items(), "d/index"))
    assert {key: store.read(key).result().value for key in entries} == entries


@given(st.dictionaries(keys, values, max_size=20))
def test_equal_entries_give_equal_bytes_in_any_order(entries):
    forward = encode(entries.items(), "d/index")
    assert encode(reversed(entries.items()), "d/index") == forward


@pytest.mark.parametrize("part", ["manifest", "nodes"])
def test_stock_tensorstore_refuses_every_flipped_byte(tmp_path, part):
    files = encode({b"a": b"value", b"b": Range("d/data", 3, 9)}.items(), "d/index")
    encoded = getattr(files, part)
    for i in range(len(encoded)):
        spoiled = bytearray(encoded)
        spoiled[i] ^= 0x10
        both = {"manifest": files.manifest, "nodes": files.nodes, part: bytes(spoiled)}
        store = open_stock(tmp_path, ocdbt.IndexFiles(**both))
        with pytest.raises(ValueError, match=r"CRC|magic|[Ll]ength|[Ff]ormat|decod|FAILED|DATA"):
            store.read(b"a").result()


def test_a_key_that_occurs_twice_is_refused():
    with pytest.raises(ValueError, match="b'a' occurs twice"):
        encode([(b"a", b"1"), (b"b", b"2"), (b"a", b"3")], "d/index")


def test_a_value_too_large_for_a_node_is_refused():
    with pytest.raises(ValueError, match="1048577 bytes"):
        encode([(b"a", bytes((1 << 20) + 1))], "d/index")
    encode([(b"a", bytes(1 << 20))], "d/index")


@pytest.mark.parametrize(
    ("value", "encoded"),
    [(0, "00"), (1, "01"), (127, "7f"), (128, "8001"), (300, "ac02"), (1 << 35, "808080808001")],
)
def test_numbers_are_encoded_as_in_protocol_buffers(value, encoded):
    assert ocdbt._varint(value).hex() == encoded
