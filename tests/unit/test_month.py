"""Thirty days of the year that `bench/year.py` lets pass (its table is in docs/cost.md)."""

from __future__ import annotations

import pytest

from bench.year import run
from replicator.chain import list_files


@pytest.mark.slow
def test_a_month_with_bursts_stays_small_and_every_hour_of_the_window_comes_back() -> None:
    simulation = run(30, show=False)
    assert simulation.keeper.problems == {}
    requests = simulation.client.requests
    assert requests["PUT level 0"] == 30 * (1440 + 20)
    assert requests["PUT level 9"] == 29
    assert sum(map(len, list_files(simulation.client).values())) < 5500
    assert requests["GET"] < 50
