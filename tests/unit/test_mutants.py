"""The seeded bugs fit the source as it is, and the tests find them."""

from __future__ import annotations

import pytest

from tests import mutants


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_fits_the_source(mutant: mutants.Mutant) -> None:
    assert (mutants.ROOT / "replicator" / mutant.file).read_text().count(mutant.old) == 1
    assert mutant.old != mutant.new
    for path in mutant.tests.split():
        assert (mutants.ROOT / path).is_file()


@pytest.mark.fault("F65")
@pytest.mark.scheduled
@pytest.mark.timeout(3600)
def test_every_mutant_is_killed() -> None:
    assert len(mutants.MUTANTS) >= 20
    assert mutants.survivors() == []
