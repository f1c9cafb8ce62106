"""Sizes and times as people write and read them."""

import pytest

from stepsave.cli.amounts import age_text, parse_size, size_text, time_text


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("1GB", 10**9),
        ("300 mb", 300 * 10**6),
        ("2GiB", 2 << 30),
        ("1.5kB", 1500),
        ("17", 17),
        ("1TB", 10**12),
    ],
)
def test_sizes_are_read(text, size_bytes):
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1 Gb/s", "1e9", "one"])
def test_what_is_no_size_is_refused_by_name(text):
    with pytest.raises(ValueError, match="such as 300MB") as error:
        parse_size(text)
    assert repr(text) in str(error.value)


@pytest.mark.parametrize(
    ("time_s", "text"),
    [
        (0.0004, "0.4 ms"),
        (0.0123, "12 ms"),
        (0.182, "182 ms"),
        (1.26, "1.3 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 0 s"),
        (300, "5 min 0 s"),
        (7300, "2 h 1 min"),
    ],
)
def test_times_are_shown_with_a_unit(time_s, text):
    assert time_text(time_s) == text


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (9995, "10.0 kB"), (99_949, "99.9 kB"),
        (99_950, "100 kB"), (999_499, "999 kB"), (999_500, "1.00 MB"), (812_345_678, "812 MB"),
        (1.5e18, "1500 PB"),
    ],
)  # fmt: skip
def test_sizes_have_three_digits_and_a_unit(size_bytes, text):
    assert size_text(size_bytes) == text


@pytest.mark.parametrize(
    ("age_s", "text"),
    [
        (-3, "0 s"), (0.4, "0 s"), (119, "119 s"), (120, "2 min"), (7199, "119 min"),
        (7200, "2 h"), (172_799, "47 h"), (172_800, "2 days"),
    ],
)  # fmt: skip
def test_ages_have_one_unit(age_s, text):
    assert age_text(age_s) == text
