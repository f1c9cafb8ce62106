"""Page-locked memory, with a driver that remembers as CUDA's does, and pages that are real."""

import gc
import logging
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import stepsave
from stepsave.snapshot import page_locks
from stepsave.snapshot import torch as torch_module
from stepsave.snapshot.page_locks import PageLocks
from stepsave.snapshot.pages import allocate_pages

SIZE_BYTES = 2 << 20
NO_MEMORY = 2  # cudaErrorMemoryAllocation


def is_mapped(address):
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(part, 16) for part in line.split()[0].split("-"))
        if begin <= address < end:
            return True
    return False


class Driver:
    """Registrations of the process, and the last error of each thread."""

    def __init__(self):
        self.registered = {}
        self.failing = 0  # code of the next registration
        self.unregister_code = 0
        self.calls = 0
        self.unmapped = []  # what was no longer there when it was unregistered
        self._errors = threading.local()

    def register(self, address, size_bytes):
        self.calls += 1
        code, self.failing = self.failing, 0
        for begin, length in self.registered.items():
            if begin < address + size_bytes and address < begin + length:
                code = 712
        if code:
            self._errors.last = code
        else:
            self.registered[address] = size_bytes
        return code

    def unregister(self, address):
        if not is_mapped(address):
            self.unmapped.append(address)
        if self.unregister_code == 0:
            del self.registered[address]
        return self.unregister_code

    def launch_kernel(self):
        """As torch does: whatever the last error of this thread is, the launch raises it."""
        code, self._errors.last = getattr(self._errors, "last", 0), 0
        if code:
            raise RuntimeError(f"CUDA error {code}")


@pytest.fixture
def driver():
    made = Driver()
    yield made
    assert not made.unmapped


def test_memory_is_registered_once_and_until_it_is_unpinned(driver):
    memories = [allocate_pages(SIZE_BYTES) for _ in range(2)]
    locks = PageLocks(driver)
    for memory in (*memories, memories[0]):
        locks.pin(memory)
    assert driver.registered == {memory.ctypes.data: SIZE_BYTES for memory in memories}
    assert driver.calls == 2
    locks.unpin()
    assert not driver.registered
    locks.pin(memories[0])
    assert list(driver.registered) == [memories[0].ctypes.data]


def test_a_pin_that_fails_leaves_no_error_for_the_next_kernel_of_who_asked(driver, caplog):
    locks = PageLocks(driver)
    refused, taken = (allocate_pages(SIZE_BYTES) for _ in range(2))
    driver.failing = NO_MEMORY
    with caplog.at_level(logging.WARNING):
        locks.pin(refused)
    driver.launch_kernel()
    assert "CUDA error 2" in caplog.text
    assert "ulimit -l" in caplog.text
    locks.pin(taken)
    locks.unpin()
    driver.launch_kernel()
    assert not driver.registered


def test_any_thread_may_pin(driver):
    locks = PageLocks(driver)
    memory = allocate_pages(SIZE_BYTES)
    thread = threading.Thread(target=locks.pin, args=(memory,))
    thread.start()
    thread.join()
    assert driver.registered
    locks.unpin()
    assert not driver.registered


def test_memory_that_everybody_drops_stays_mapped_until_it_is_unregistered(driver):
    locks = PageLocks(driver)
    memory = allocate_pages(SIZE_BYTES)
    locks.pin(memory)
    address = memory.ctypes.data
    del memory
    gc.collect()
    assert is_mapped(address)
    crew = locks._crew
    del locks
    gc.collect()
    crew.call(lambda: None)  # behind the unlocking
    assert not driver.registered


def test_memory_that_the_driver_does_not_let_go_of_stays_mapped(driver, caplog, monkeypatch):
    monkeypatch.setattr(page_locks, "_stuck", [])
    locks = PageLocks(driver)
    memory = allocate_pages(SIZE_BYTES)
    locks.pin(memory)
    address = memory.ctypes.data
    driver.unregister_code = 1
    with caplog.at_level(logging.WARNING):
        locks.unpin()
    assert "cannot unlock" in caplog.text
    del memory
    gc.collect()
    assert is_mapped(address)


def test_memory_registered_by_somebody_else_is_refused(driver):
    memory = allocate_pages(SIZE_BYTES)
    driver.registered[memory.ctypes.data - 4096] = 8192
    with pytest.raises(stepsave.ArenaMemoryError, match=r"CUDA error 712.*restart the process"):
        PageLocks(driver).pin(memory)


@pytest.fixture
def pinning(driver, monkeypatch):
    """Has states of torch on the CPU pin their arenas with a driver."""
    monkeypatch.setattr(torch_module, "make_pins", lambda _: PageLocks(driver))
    return driver


def save(saver, step):
    saver.save(step, {"w": torch.full((50, 50), float(step))})


def assert_is_of(backup, step):
    assert backup.step == step
    assert (backup.state["w"] == np.float32(step)).all()


def test_a_new_checkpointer_pins_what_one_that_was_deleted_had_pinned(tmp_path, pinning):
    saver = stepsave.Checkpointer(tmp_path / "a", snapshot="device")
    save(saver, 1)
    saver.wait()
    assert len(pinning.registered) == 2
    held = [saver]
    del saver
    with pytest.warns(ResourceWarning, match="not closed"):
        held.clear()
    assert not pinning.registered
    with stepsave.Checkpointer(tmp_path / "b", snapshot="device") as saver:
        save(saver, 1)
        saver.wait()
        assert len(pinning.registered) == 2
        assert_is_of(saver.restore(), 1)
    assert not pinning.registered


def test_a_close_that_fails_unregisters_too(tmp_path, pinning, monkeypatch):
    saver = stepsave.Checkpointer(tmp_path, snapshot="device")
    save(saver, 1)
    saver.wait()

    def fail():
        raise OSError(5, "the disk is gone")

    monkeypatch.setattr(saver._directory, "mark_ended", fail)
    with pytest.raises(OSError, match="disk is gone"):
        saver.close(ended=True)
    crew = saver._capture._stager._pins._crew
    monkeypatch.undo()
    del saver
    gc.collect()
    crew.call(lambda: None)
    assert not pinning.registered


def test_memory_of_arenas_that_are_too_small_now_is_unregistered(tmp_path, pinning):
    with stepsave.Checkpointer(tmp_path, snapshot="device") as saver:
        for step, size in ((1, 50), (2, 3000)):
            saver.save(step, {"w": torch.full((size, size), float(step))})
            assert np.array_equal(saver.restore().state["w"], np.full((size, size), step))
            assert len(pinning.registered) == 2
            assert min(pinning.registered.values()) > size * size
    assert not pinning.registered


def test_a_state_is_saved_through_memory_that_could_not_be_pinned(tmp_path, pinning):
    with stepsave.Checkpointer(tmp_path, snapshot="device") as saver:
        for step in range(1, 4):
            pinning.failing = NO_MEMORY
            save(saver, step)
            pinning.launch_kernel()
            assert_is_of(saver.restore(), step)


def test_leaves_of_other_types_are_sent_to_the_same_page_locked_memory(tmp_path, pinning):
    """As when a callback first keeps its best weights."""
    state = {"w": torch.full((50, 50), 1.0)}
    with stepsave.Checkpointer(tmp_path, snapshot="device") as saver:
        saver.save(1, state)
        saver.save(2, {**state, "best": np.ones(20)})
        assert np.array_equal(saver.restore().state["best"], np.ones(20))
        assert pinning.calls == len(pinning.registered) == 2
        saver.save(3, {"w": np.ones(3), "v": np.ones(3)} | {"t": state["w"]})
        saver.wait()
        assert pinning.calls == len(pinning.registered) == 2
        with pytest.raises(stepsave.InvalidStateError, match="found numpy"):
            saver.save(4, {"w": np.ones(3)})
        assert not pinning.registered
        saver.save(4, state)
        assert np.array_equal(saver.restore().state["w"], np.ones((50, 50)))
        assert len(pinning.registered) == 2
    assert not pinning.registered
