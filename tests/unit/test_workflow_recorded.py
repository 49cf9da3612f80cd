"""Runs that other versions of Python recorded are replayed by the one that runs the tests (see `tests/recordedflows.py`)."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests import sampleflows as sample
from tests.recordedflows import FLOWS, RECORDED, WHOLE_ONLY
from workflow import journal as jr
from workflow.testing import replay_recorded, run_to_crash
from workflow.values import loads

FILES = sorted(str(path.relative_to(RECORDED)) for path in RECORDED.glob("3.*/*.db"))


def test_there_are_recordings_of_two_versions() -> None:
    assert {Path(name).parts[0] for name in FILES} == {"3.11", "3.13"}
    assert len(FILES) == 2 * (2 * len(FLOWS) - len(WHOLE_ONLY))


@pytest.mark.parametrize("name", FILES)
def test_what_another_python_recorded_is_replayed_and_goes_on(name: str, tmp_path: Path) -> None:
    scenario = Path(name).stem.removesuffix("-half")
    recorded = jr.read(RECORDED / name)
    finished = {record.key for record in recorded.records if record.is_final}
    was_over = recorded.instance.status in ("done", "failed", "cancelled")
    assert was_over is not name.endswith("-half.db")

    sample.take_ran()
    status, error = replay_recorded(RECORDED / name, FLOWS[scenario], tmp_path / "replay")
    repeated = [key for key in sample.take_ran() if key.startswith("it@") and key.partition("/")[2] in finished]
    again = jr.read(tmp_path / "replay" / "it.db").instance

    _, expected, _ = asyncio.run(run_to_crash(tmp_path / "here", sample.SCENARIOS[scenario], None, {}))
    here = jr.read(tmp_path / "here" / "it.db").instance
    assert (status, again.output, loads(error or "{}")) == (here.status, here.output, loads(here.error or "{}")), expected
    assert repeated == []
