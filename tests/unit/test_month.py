"""A week, and thirty days, of the year that `bench/year.py` lets pass (its table is in docs/cost.md)."""

from __future__ import annotations

import pytest

from bench.year import run
from replicator.chain import list_files


@pytest.mark.parametrize(
    "days", [pytest.param(7, marks=pytest.mark.slow), pytest.param(30, marks=[pytest.mark.scheduled, pytest.mark.timeout(900)])]
)
def test_weeks_with_bursts_stay_small_and_every_hour_of_the_window_comes_back(days: int) -> None:
    simulation = run(days, show=False)
    assert simulation.keeper.problems == {}
    requests = simulation.client.requests
    assert requests["PUT level 0"] == days * (1440 + 20)
    assert requests["PUT level 9"] == days - 1
    assert sum(map(len, list_files(simulation.client).values())) < 5500
    assert requests["GET"] < 50
