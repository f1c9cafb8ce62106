"""Copies of shards: what a transfer may still read is nobody's buffer again."""

import numpy as np
import pytest

from stepsave.engine.copying import copy_shards
from stepsave.threads import Crew


class OneAfterTheOther:
    """A crew whose threads have each taken an item before one of them fails."""

    def share(self, items, work, helpers):
        assert helpers == 2
        errors = []
        for item in items:
            try:
                work(item)
            except OSError as e:
                errors.append(e)
        if errors:
            raise errors[0]


def test_the_buffer_of_a_transfer_that_failed_is_not_used_again():
    buffers = []

    def read(number, buffer):
        buffer[:] = number

    def write(number, buffer):
        buffers.append(buffer)
        if number == 0:
            raise OSError("given up, and still under way")

    with pytest.raises(OSError, match="still under way"):
        copy_shards(3, 4096, read, write, OneAfterTheOther())
    assert [int(buffer[0]) for buffer in buffers] == [0, 2, 2]
    assert (buffers[0] == 0).all()
    assert buffers[1] is buffers[2]  # that of one that went well is


@pytest.mark.parametrize("count", [0, 1, 9])
def test_each_shard_is_copied_once_in_the_memory_of_few(count):
    copied, buffers = {}, set()

    def read(number, buffer):
        buffers.add(id(buffer))
        buffer[:] = number

    def write(number, buffer):
        copied[number] = np.array(buffer)

    crew = Crew(3, "test")
    copy_shards(count, 4096, read, write, crew)
    crew.end()
    crew.join()
    assert sorted(copied) == list(range(count))
    assert all((data == number).all() and len(data) == 4096 for number, data in copied.items())
    assert len(buffers) <= 4
