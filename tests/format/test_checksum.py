import crc32c as other_implementation
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from stepsave.format.checksum import crc32c


def test_the_checksum_is_crc_32c():
    """RFC 3720, appendix B.4, and the check value of the CRC catalogue."""
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E


@given(st.integers(0, 70_000), st.integers(0, 70_000), st.integers(0, 63))
def test_it_goes_on_from_the_bytes_before(first, second, offset):
    data = np.random.default_rng(first).integers(0, 256, offset + first + second, np.uint8)[offset:]
    whole = crc32c(data.data)
    assert crc32c(data[first:].data, crc32c(data[:first].data)) == whole
    assert whole == other_implementation.crc32c(data.data)


def test_no_bytes_change_nothing():
    assert crc32c(b"") == 0
    assert crc32c(memoryview(b""), 7) == 7
