"""docs/faults.md is what the tests say."""

from __future__ import annotations

from tests import faults


def test_the_table_of_faults_is_up_to_date() -> None:
    assert faults.DOCUMENT.read_text() == faults.document(), "run python -m tests.faults"


def test_every_fault_is_in_one_group() -> None:
    assert sorted(number for numbers in faults.GROUPS.values() for number in numbers) == sorted(faults.FAULTS) == list(range(1, 72))


def test_a_fault_without_a_test_is_shown_as_a_hole(monkeypatch) -> None:
    monkeypatch.setattr(faults, "covered", lambda: {number: [] if number == 3 else ["a.py::test_b"] for number in faults.FAULTS})
    text = faults.document()
    assert "Holes: F3." in text
    assert "| **hole** |" in next(line for line in text.splitlines() if line.startswith("| F3 "))
    assert text.count("**hole**") == 1
