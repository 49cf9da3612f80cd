"""Durations are read as Go reads them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicator.durations import format_duration, parse_duration


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("300ms", 0.3), ("1m30s", 90), ("24h", 86400), ("1.5h", 5400), (".5s", 0.5), ("1.s", 1), ("0", 0), ("10us", 1e-5), ("10µs", 1e-5)],
)
def test_durations_of_go_are_read(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "5", "1d", "s", "1h 2m", "-1s", "1e3s", "1m30", "٣s"])
def test_all_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="invalid duration"):
        parse_duration(text)


@given(st.integers(0, 10**10))
def test_what_is_printed_is_read_back(milliseconds: int) -> None:
    assert parse_duration(format_duration(milliseconds / 1000)) == pytest.approx(milliseconds / 1000)
