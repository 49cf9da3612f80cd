"""The seeded bugs fit the source as it is, and the tests find them."""

from __future__ import annotations

import pytest

from tests import faults, mutants
from tests.seeded import BEYOND_OUR_CODE, MUTANTS, Mutant


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_fits_the_source(mutant: Mutant) -> None:
    for file, old, new in mutant.edits:
        assert (mutants.ROOT / "replicator" / file).read_text().count(old) == 1
        assert old != new
    for test in mutant.tests.split():
        assert (mutants.ROOT / test.partition("::")[0]).is_file()


def test_a_defence_that_is_taken_away_is_missed_by_tests_that_carry_the_mark_of_the_fault() -> None:
    marked = faults.covered()
    for mutant in MUTANTS:
        for number in mutant.faults:
            assert {test.removeprefix("tests/") for test in mutant.tests.split()} <= set(marked[number]), mutant.name


def test_the_defence_against_each_fault_is_taken_away_or_is_elsewhere() -> None:
    assert {number for mutant in MUTANTS for number in mutant.faults} == set(faults.FAULTS) - set(BEYOND_OUR_CODE)


@pytest.mark.fault("F65")
@pytest.mark.scheduled
@pytest.mark.timeout(7200)
def test_every_mutant_is_killed() -> None:
    assert len(MUTANTS) >= 20
    assert mutants.survivors(MUTANTS) == []
