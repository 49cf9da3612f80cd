"""The figures of the loss window, in constant memory."""

from __future__ import annotations

import pytest

from replicator.losses import BOUNDS_S, RECENT, LossWindow, Windows


def test_quantiles_are_of_the_last_ones_and_the_histogram_has_all() -> None:
    windows = Windows()
    assert windows.value() == LossWindow()
    for number in range(10_000):
        windows.add(number / 1000)
    found = windows.value()
    assert (found.count, found.total, len(windows._recent)) == (RECENT, 10_000, RECENT)
    assert found.max_s == 9.999
    assert found.p50_s == pytest.approx(9.999 - 0.512, abs=0.001)
    assert found.p99_s == pytest.approx(9.999 - 0.010, abs=0.001)
    assert found.total_s == pytest.approx(9999 * 10_000 / 2 / 1000)
    assert sum(found.slots) == 10_000
    assert len(found.slots) == len(BOUNDS_S) + 1
    assert found.slots[0] == 2  # 0 and 1 ms: bounds are inclusive
    windows.add(1e9)
    assert windows.value().slots[-1] == 1
