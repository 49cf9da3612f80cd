"""What a timeline says about files, by hand. That its moments are those of the plans is a property test."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from replicator.format.ltx import TXID, FileInfo
from replicator.history import Age, Gap, Timeline, ages, describe

START = datetime(2026, 1, 1, tzinfo=UTC)
NOW = START + timedelta(days=1)


def timeline(*specs: tuple[int, int, int] | tuple[int, int, int, float]) -> Timeline:
    """(level, min, max[, second]) to a timeline; each file has 100 bytes."""
    found: dict[int, list[FileInfo]] = {level: [] for level in range(10)}
    for level, low, high, *second in specs:
        when = START + timedelta(seconds=second[0] if second else high)
        found[level].append(FileInfo(level, TXID(low), TXID(high), 100, when))
    return describe({level: sorted(infos) for level, infos in found.items()}, now=NOW)


def moments(of: Timeline) -> list[tuple[int, int, int]]:
    """Each moment's TXID, files and level."""
    return [(moment.txid, moment.files, moment.level) for moment in of.moments]


def problems(of: Timeline) -> list[tuple[str, int, int, str]]:
    return [(problem.kind, problem.level, problem.count, problem.first.name[13:16]) for problem in of.problems]


L0 = [(0, n, n) for n in range(1, 7)]


def test_each_raw_file_is_a_moment_and_costs_one_file_more() -> None:
    found = timeline(*L0)
    assert moments(found) == [(n, n, 0) for n in range(1, 7)]
    assert [moment.bytes for moment in found.moments] == [100, 200, 300, 400, 500, 600]
    assert (found.gaps, found.problems, found.broken) == ((), (), None)


def test_a_merged_file_makes_what_follows_cheaper_but_not_what_it_holds() -> None:
    assert moments(timeline(*L0, (1, 1, 4))) == [(1, 1, 0), (2, 2, 0), (3, 3, 0), (4, 1, 1), (5, 2, 0), (6, 3, 0)]


def test_what_compaction_merged_away_is_neither_a_moment_nor_a_gap() -> None:
    found = timeline((1, 1, 3), (1, 4, 5), (0, 6, 6))
    assert moments(found) == [(3, 1, 1), (5, 2, 1), (6, 3, 0)]
    assert found.gaps == ()


def test_a_snapshot_is_the_base_of_what_follows() -> None:
    assert moments(timeline(*L0, (9, 1, 4))) == [(1, 1, 0), (2, 2, 0), (3, 3, 0), (4, 1, 9), (5, 2, 0), (6, 3, 0)]


def test_a_longer_file_drops_more_than_one_step() -> None:
    found = timeline((0, 1, 1), (0, 2, 2), (1, 3, 4), (2, 2, 5), (3, 1, 6))
    assert moments(found) == [(1, 1, 0), (2, 2, 0), (4, 3, 1), (5, 2, 2), (6, 1, 3)]


def test_a_gap_at_the_end_breaks_the_newest_state() -> None:
    found = timeline((0, 1, 1), (0, 2, 2), (0, 5, 5), (0, 6, 6), (1, 4, 5))
    assert found.gaps == (Gap(TXID(2), TXID(4), None, 3),)
    assert found.broken is not None
    assert (found.broken.have, found.broken.next_txid) == (2, 4)
    assert problems(found) == [("hole", 0, 1, "005"), ("start", 1, 1, "004")]
    assert [(total.level, total.stranded) for total in found.levels] == [(0, 2), (1, 1)]


def test_a_gap_that_a_snapshot_bridges_does_not_break_the_newest_state() -> None:
    found = timeline((0, 1, 1), (0, 4, 4), (0, 5, 5), (0, 6, 6), (0, 7, 7), (9, 1, 6))
    assert found.gaps == (Gap(TXID(1), TXID(4), TXID(6), 2),)
    assert moments(found) == [(1, 1, 0), (6, 1, 9), (7, 2, 0)]
    assert found.broken is None


def test_raw_files_cut_inside_a_merged_file_are_a_gap_but_no_problem() -> None:
    found = timeline((1, 1, 3), (1, 4, 6), (0, 5, 5), (0, 6, 6), (0, 7, 7))
    assert found.gaps == (Gap(TXID(3), TXID(5), TXID(6), 1),)
    assert found.problems == ()


def test_a_history_without_a_beginning_has_no_moment() -> None:
    found = timeline((0, 3, 3), (0, 4, 4))
    assert found.moments == ()
    assert found.gaps == (Gap(TXID(0), TXID(3), None, 2),)
    assert problems(found) == [("start", 0, 1, "003")]


def test_overlaps_are_found_on_one_level_only_and_counted() -> None:
    found = timeline((1, 1, 4), (1, 3, 6), (1, 5, 5, 7), (2, 1, 4), (9, 1, 2), (9, 1, 4))
    assert problems(found) == [("overlap", 1, 2, "003")]
    assert found.problems[0].text == "level 1: a file overlaps the one before it: 0000000000000003-0000000000000006.ltx (and 1 more)"


def test_a_file_inside_an_earlier_one_is_an_overlap_even_when_a_short_one_stands_between() -> None:
    assert problems(timeline((1, 1, 9), (1, 2, 3, 10), (1, 4, 5, 11))) == [("overlap", 1, 2, "002")]


def test_wrong_clocks_are_found() -> None:
    day = 86400.0
    found = timeline((0, 1, 1, 10), (0, 2, 2, 9), (0, 3, 3, day + 0.9), (0, 4, 4, day + 1.1), (0, 5, 5, 11), (0, 6, 6, 11))
    assert problems(found) == [("future", 0, 1, "004"), ("clock", 0, 2, "002")]


def test_a_snapshot_that_is_not_a_full_image_is_named() -> None:
    assert problems(timeline((0, 1, 1), (9, 2, 4))) == [("not-full", 9, 1, "002")]


def test_levels_are_summed_up() -> None:
    [total] = timeline((3, 1, 4), (3, 5, 9)).levels
    assert (total.level, total.files, total.bytes, total.min_txid, total.max_txid) == (3, 2, 200, 1, 9)
    assert (total.oldest, total.newest) == (START + timedelta(seconds=4), START + timedelta(seconds=9))


def test_ages_count_back_from_the_newest_moment() -> None:
    found = timeline((9, 1, 3, 0), (1, 4, 8, 3000), (0, 9, 9, 3599), (0, 10, 10, 3600), (0, 11, 11, 3610))
    young, old = ages(found.moments)[:2]
    assert young == Age(0.0, 300.0, 3, 10.0, 0, 3, 5, 300, 500)
    assert old == Age(300.0, 3600.0, 1, 3000.0, 4, 2, 2, 200, 200)
    assert [(age.from_s, age.moments, age.every_s) for age in ages(found.moments)] == [
        (0.0, 3, 10.0),
        (300.0, 1, 3000.0),
        (3600.0, 1, None),
    ]


def test_an_age_includes_its_upper_bound() -> None:
    found = timeline((0, 1, 1, 0), (0, 2, 2, 1), (0, 3, 3, 301))
    assert [(age.to_s, age.moments) for age in ages(found.moments)] == [(300.0, 2), (3600.0, 1)]


@pytest.mark.parametrize("jump_s", [-5000.0, 5000.0])
def test_ages_survive_a_jump_of_the_clock(jump_s: float) -> None:
    found = timeline((0, 1, 1, 0), (0, 2, 2, jump_s), (0, 3, 3, 1))
    assert sum(age.moments for age in ages(found.moments)) == 3
    assert all(age.every_s is None or age.every_s >= 0 for age in ages(found.moments))


def test_no_moments_have_no_ages() -> None:
    assert ages([]) == []
