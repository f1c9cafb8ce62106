import pytest

from stepsave.testing.posix_model import (
    ROOT,
    Disk,
    DropEntry,
    Mark,
    Operation,
    Rename,
    SetEntry,
    Sync,
    Tree,
    Write,
    outcomes_of,
)


def create(node, name, directory=ROOT, kind="create"):
    return Operation(kind, name, (SetEntry(directory, name, node),))


def write(node, data, offset=0):
    return Operation("write", str(node), (Write(node, offset, data),))


def rename(node, old, new):
    return Operation("rename", new, (Rename(ROOT, new, node, ROOT, old),))


def sync(node, covers=100, *, failed=False):
    return Sync(str(node), node, covers, failed)


def left_by(*operations, files=()):
    """All trees that may be left, as dicts."""
    disk = Disk(Tree.of(dict(files))[0])
    for operation in operations:
        disk.do(operation)
    trees = [[]]
    for pending in disk.pending:
        trees = [[*some, *outcome] for some in trees for outcome in outcomes_of(pending)]
    found = []
    for chosen in trees:
        tree = {p: None if b is None else b.data for p, b in disk.tree(chosen).walk()}
        if tree not in found:
            found.append(tree)
    return found


def test_a_file_renamed_before_it_is_synced_may_be_empty_under_its_final_name():
    states = left_by(create(1, "a.tmp"), write(1, b"data"), rename(1, "a.tmp", "a"), sync(ROOT))
    assert {"a": b""} in states
    assert {"a": bytes(4)} in states  # its length, and nothing of its data
    assert {"a": b"data"} in states
    assert len(states) == 3


def test_a_rename_without_a_sync_leaves_the_old_the_new_or_both_names_and_never_none():
    states = left_by(rename(1, "a", "b"), files={"a": b"1"})
    assert sorted(map(sorted, states)) == [["a"], ["a", "b"], ["b"]]


def test_a_replaced_file_is_the_old_or_the_new_one():
    operations = create(3, "a.tmp"), write(3, b"new"), sync(3), rename(3, "a.tmp", "a")
    states = left_by(*operations, files={"a": b"old"})
    assert {state["a"] for state in states} == {b"old", b"new"}
    assert left_by(*operations, sync(ROOT), files={"a": b"old"}) == [{"a": b"new"}]


def test_to_sync_a_file_makes_its_data_durable_and_not_its_entry():
    assert left_by(create(1, "a"), write(1, b"data"), sync(1)) == [{}, {"a": b"data"}]


def test_to_sync_a_directory_makes_its_entries_durable_and_not_its_own():
    operations = create(1, "d", kind="mkdir"), create(2, "a", 1), sync(1)
    assert left_by(*operations) == [{}, {"d": None, "d/a": b""}]
    assert left_by(*operations, sync(ROOT)) == [{"d": None, "d/a": b""}]


def test_what_is_pending_becomes_durable_in_any_order():
    removed = [Operation("unlink", n, (DropEntry(ROOT, n, i),)) for i, n in enumerate("ab", 1)]
    states = left_by(*removed, files={"a": b"", "b": b""})
    assert sorted(map(sorted, states)) == [[], ["a"], ["a", "b"], ["b"]]


def test_a_write_may_be_torn_at_sectors_and_pages():
    states = left_by(write(1, b"n" * 8192), files={"a": b"o" * 8192})
    found = {state["a"] for state in states}
    assert {b"n" * 512 + b"o" * 7680, b"o" * 4096 + b"n" * 4096, b"n" * 8192} <= found
    assert all(data.count(b"n") % 512 == 0 for data in found)


def test_what_a_failed_sync_left_in_doubt_no_later_one_makes_durable():
    failed = write(1, b"new"), sync(1, failed=True), sync(1)
    assert {state["a"] for state in left_by(*failed, files={"a": b"old"})} == {b"old", b"new"}
    again = left_by(*failed, write(1, b"NEW"), sync(1), files={"a": b"old"})
    assert again == [{"a": b"NEW"}]


@pytest.mark.parametrize("covers", [0, 1])
def test_a_sync_covers_what_was_done_before_it_began(covers):
    states = left_by(write(1, b"new"), sync(1, covers), files={"a": b"old"})
    assert {state["a"] for state in states} == ({b"new"} if covers else {b"old", b"new"})


def test_marks_change_nothing():
    assert left_by(Mark("acknowledged", 3), files={"a": b"old"}) == [{"a": b"old"}]
