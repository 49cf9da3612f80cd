"""The scaling model against the simulated fleet, and the tables of docs/scaling.md against both."""

from __future__ import annotations

import re
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bench.scaling import HEAD, Fleet, dollars, lag_s, lags, requests_per_s, row, simulate, sized, takeover_s

TABLE = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text()


@pytest.mark.parametrize("fleet", [Fleet(), Fleet(hosts=12, instances=240), Fleet(hosts=5, ttl_s=10.0, poll_s=1.0)])
def test_requests_and_takeovers_are_as_the_formulas_say(fleet: Fleet) -> None:
    seen = simulate(fleet, seconds=1500.0, deaths=6, seed=3)
    model = requests_per_s(fleet)
    assert (seen.lost, seen.twice) == (0, 0)
    assert seen.rate("host PUT") == pytest.approx(model["host PUT"], rel=0.08)  # records are rewritten at looks, not in between
    assert seen.rate("host LIST") == pytest.approx(model["host LIST"] - fleet.hosts / fleet.inbox_s, rel=0.05)
    assert seen.rate("host GET") == pytest.approx(model["host GET"], rel=0.15)
    typical, bound = takeover_s(fleet)
    assert len(seen.takeovers_s) == 6
    assert max(seen.takeovers_s) <= bound
    assert statistics.mean(seen.takeovers_s) == pytest.approx(typical, rel=0.15)
    assert seen.spread < 1.6


def test_what_hosts_ask_for_does_not_depend_on_how_many_runs_there_are() -> None:
    few, many = (simulate(Fleet(instances=count), seconds=300.0, deaths=0) for count in (10, 10_000))
    assert few.requests == many.requests
    model = requests_per_s(Fleet(hosts=10)), requests_per_s(Fleet(hosts=100))
    assert all(
        model[1][name] == pytest.approx(10 * model[0][name]) for name in model[0] if name.startswith("host")
    )  # and grows with the hosts, not their square


@pytest.mark.parametrize("busy", [0.2, 0.6, 0.9])
def test_lag_is_that_of_a_queue(busy: float) -> None:
    fleet = Fleet(instances=3000, hosts=3, wake_s=0.05, rate=busy / 0.05 / 1000)
    assert float(np.mean(lags(replace(fleet), 1000, 5))) == pytest.approx(lag_s(fleet), rel=0.2)
    assert lag_s(replace(fleet, rate=1.01 / 0.05 / 1000)) == float("inf")


def test_costs_are_those_of_the_price_list() -> None:
    hosts, steps = dollars(Fleet(hosts=1, instances=1, rate=1.0, replicated=0.0, ttl_s=30.0, poll_s=5.0, inbox_s=30.0))
    assert steps == pytest.approx(2 * 30 * 86400 * 0.005 / 1000)  # a LIST and a PUT each second
    assert hosts == pytest.approx((0.2 + 0.4 + 1 / 30) * 30 * 86400 * 0.005 / 1000)


def documented(instances: int) -> list[str]:
    found = re.search(rf"^\| ({instances:,}) \| (.*) \|$", TABLE, re.MULTILINE)
    assert found, f"no row for {instances:,}"
    return [found[1], *found[2].split(" | ")]


@pytest.mark.parametrize("instances", [1000, 10_000])
def test_the_rows_of_the_page_are_what_the_simulation_gives(instances: int) -> None:
    assert documented(instances) == row(instances)


@pytest.mark.parametrize("instances", [100_000, 1_000_000])
def test_the_other_rows_are_what_the_formulas_give(instances: int) -> None:
    shown = dict(zip(HEAD, documented(instances), strict=True))
    fleet = sized(instances)
    typical, bound = takeover_s(fleet)
    model = requests_per_s(fleet)
    assert shown["takeover typical"] == f"{typical:.1f} s"
    assert shown["bound"] == f"{bound:.1f} s"
    assert shown["host requests/s"] == f"{model['host PUT'] + model['host LIST'] + model['host GET']:.2f}"
    assert shown["lag"] == f"{lag_s(fleet) * 1000:.1f} ms"
