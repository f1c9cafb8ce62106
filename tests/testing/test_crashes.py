import os

from stepsave.testing.crashes import LOOK, Sampling, crash_states, distinct, materialise
from stepsave.testing.recording import files_below, record


def recorded(tmp_path, act):
    root = tmp_path / "root"
    root.mkdir()
    with record(root) as recorder:
        act(root, recorder)
    return recorder.log


def make(root, names, data=b"data"):
    for name in names:
        fd = os.open(root / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.write(fd, data)
        os.close(fd)


def contents(state):
    return {path: None if blob is None else blob.data for path, blob in state.files.items()}


def test_every_combination_is_there_where_few_operations_are_pending(tmp_path):
    log = recorded(tmp_path, lambda root, _: make(root, "abcd", b""))
    found = {frozenset(state.files) for state in distinct(crash_states(log, Sampling()))}
    assert len(found) == 1 << 4


def test_of_many_a_sample_and_all_that_was_done_at_each_point(tmp_path):
    log = recorded(tmp_path, lambda root, _: make(root, [f"f{n}" for n in range(40)]))
    sampling = Sampling(limit=50, samples=10)
    states = distinct(crash_states(log, sampling))
    assert 80 < len(states) < 40 * 2 * 20
    assert states != distinct(crash_states(log, Sampling(seed=1, limit=50, samples=10)))
    for count in range(41):
        done = {f"f{n}": b"data" for n in range(count)}
        assert any(contents(state) == done for state in states)


def test_what_is_done_with_markers_and_renames_is_combined_in_every_way(tmp_path):
    def act(root, _):
        make(root, [f"f{n}" for n in range(20)])
        make(root, ["COMMIT.tmp"])
        os.rename(root / "COMMIT.tmp", root / "COMMIT")
        os.rename(root / "f0", root / "g")

    log = recorded(tmp_path, act)
    last = [s for s in crash_states(log, Sampling(limit=1, samples=0)) if s.number == 44]
    markers = {(contents(s).get("COMMIT"), "COMMIT.tmp" in s.files) for s in last}
    assert {(b"", False), (b"data", False), (bytes(4), False), (None, True), (b"", True)} <= markers
    assert {("g" in s.files, "f0" in s.files) for s in last} >= {(True, False), (False, True)}


def test_a_state_must_keep_the_most_that_was_acknowledged_before_a_crash_that_leaves_it(tmp_path):
    def act(root, recorder):
        recorder.mark("acknowledged", 1)
        recorder.mark(LOOK)
        make(root, "a", b"")
        recorder.mark("acknowledged", 2)

    states = distinct(crash_states(recorded(tmp_path, act), Sampling()))
    assert {frozenset(s.files): s.acknowledged for s in states} == {
        frozenset(): 2,
        frozenset("a"): 2,
    }
    assert "create a: lost" in states[0].describe()


def test_a_state_is_made_as_files(tmp_path):
    def act(root, _):
        os.mkdir(root / "d")
        make(root, ["d/a", "b"])

    states = crash_states(recorded(tmp_path, act), Sampling())
    expected = {"d": None, "d/a": b"data", "b": b"data"}
    (tmp_path / "made").mkdir()
    materialise(next(s for s in states if contents(s) == expected), tmp_path / "made")
    assert files_below(tmp_path / "made") == expected
