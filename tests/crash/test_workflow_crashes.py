"""A crash before and after every commit of the sample flows: the result is that of an uninterrupted run, and nothing recorded runs again."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.sampleflows import SCENARIOS, once_or_unknown, replicates, take_ran
from workflow import journal as jr
from workflow.testing import crash_everywhere, recorded, run_to_crash, start


def _some(count: int) -> list[int]:
    """A few points of each flow, others for each length, so that all kinds come up without trying all."""
    return sorted({1 + (count * share) // 7 + count % 3 for share in range(6)} & set(range(1, count + 1)))


@pytest.mark.parametrize("name", sorted(SCENARIOS))
def test_a_crash_at_some_commits_changes_nothing(name: str, tmp_path: Path) -> None:
    report = crash_everywhere(tmp_path, SCENARIOS[name], bodies=take_ran, points=_some)
    assert report.tried >= 4


def test_a_branch_that_a_recorded_failure_cancels_does_not_run_again(tmp_path: Path) -> None:
    """Its last step has no record: only the order of things says that it must not begin."""
    tried = 0
    _, _, count = asyncio.run(run_to_crash(tmp_path / "whole", SCENARIOS["group_fails"], None, {}))
    for at in range(1, count + 1):
        place = tmp_path / f"at-{at}"
        asyncio.run(run_to_crash(place, SCENARIOS["group_fails"], at, {}))
        if "1/boom#1" in recorded(place).get("it", ()):
            take_ran()
            asyncio.run(run_to_crash(place, SCENARIOS["group_fails"], None, {}))
            assert not [key for key in take_ran() if "slow" in key]
            tried += 1
    assert tried >= 4


@pytest.mark.slow
def test_a_crash_at_some_barriers_changes_nothing(tmp_path: Path) -> None:
    """With a replica each wait for it is a point, too; the same folder goes on."""
    report = crash_everywhere(tmp_path, start(replicates), bodies=take_ran, points=_some, replica=f"file://{tmp_path}/root")
    assert report.expected == ("returned", ["A", "B", "C", "D"])
    assert report.tried >= 4


@pytest.mark.scheduled
@pytest.mark.timeout(3600)
def test_a_crash_at_every_barrier_changes_nothing(tmp_path: Path) -> None:
    report = crash_everywhere(tmp_path, start(replicates), bodies=take_ran, replica=f"file://{tmp_path}/root")
    assert report.tried == report.points


def test_an_outcome_is_unknown_exactly_where_a_crash_left_an_intent_without_a_result(tmp_path: Path) -> None:
    """A step with repeat=False at every commit: its body runs once or never again, and only what began and was not recorded is unknown."""
    scenario, answers = start(once_or_unknown), Counter[str]()
    _, _, count = asyncio.run(run_to_crash(tmp_path / "whole", scenario, None, {}))

    def statuses(folder: Path) -> dict[str, str]:
        return {record.key: record.status for path in folder.glob("it.db") for record in jr.read(path).records}

    def has_begun(id: str, where: str) -> bool:
        return (id, where) == ("it", "after") and statuses(tmp_path / "at-begun").get("at_most_once#1") == "started"

    for name, at in [*((str(number), number) for number in range(1, count + 1)), ("begun", has_begun)]:
        place = tmp_path / f"at-{name}"
        take_ran()
        asyncio.run(run_to_crash(place, scenario, at, {}))
        left = statuses(place)
        _, answer, _ = asyncio.run(run_to_crash(place, scenario, None, {}))
        assert answer == ("returned", "unknown" if left.get("at_most_once#1") == "started" else "once")
        answers[answer[1]] += 1
        assert sum("at_most_once" in key for key in take_ran()) <= 1
        _, again, _ = asyncio.run(run_to_crash(place, scenario, None, {}))
        assert again == answer
    assert answers["unknown"] >= 1
    assert answers["once"] >= 4


def _many(count: int) -> list[int]:
    """All of a flow with up to 60 points. Days of sleep have more, nearly all of them renewals of one claim: there the first, the last, some between."""
    return [at for at in range(1, count + 1) if count <= 60 or at <= 20 or at > count - 20 or at % 11 == 0]


@pytest.mark.parametrize(
    "points", [pytest.param(_many, id="many", marks=pytest.mark.slow), pytest.param(None, id="every", marks=pytest.mark.scheduled)]
)
@pytest.mark.parametrize("name", sorted(SCENARIOS))
def test_a_crash_at_every_commit_changes_nothing(name: str, points: Callable[[int], list[int]] | None, tmp_path: Path) -> None:
    report = crash_everywhere(tmp_path, SCENARIOS[name], bodies=take_ran, points=points)
    assert report.tried == len(points(report.points) if points else range(report.points))
    assert report.tried >= 16
