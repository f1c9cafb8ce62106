import numpy as np

from stepsave import Checkpointer
from stepsave.format import orbax


def test_the_constant_files_are_made_by_the_first_save_and_once(tmp_path, monkeypatch):
    """Not by `prepare`, which training waits for."""
    made = []

    def constant_files(*args, made_by=orbax.constant_files):
        made.append(args)
        return made_by(*args)

    monkeypatch.setattr(orbax, "constant_files", constant_files)
    state = {"w": np.arange(5.0)}
    with Checkpointer(tmp_path / "backup") as saver:
        saver.prepare(state)
        assert not made
        for step in (1, 2, 3):
            state["w"] += 1
            saver.save(step, state).wait()
        assert len(made) == 1
        np.testing.assert_array_equal(saver.restore().state["w"], state["w"])
