"""The sample flows on DBOS 3.4, as they stand (see `tests/dbosflows.py`): the same results as here, and again after a kill in the middle on both sides."""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.dbosflows import NO_COUNTERPART, ONLY_UNINTERRUPTED
from tests.sampleflows import SCENARIOS
from workflow import journal as jr
from workflow.testing import run_to_crash

WITH_COUNTERPART = sorted(set(SCENARIOS) - set(NO_COUNTERPART))


def dbos(folder: Path, broken: dict[str, int] | None = None) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "tests.dbosflows", str(folder)]
    if broken is not None:
        (folder / "broken.json").write_text(json.dumps(broken))
        command.append(str(folder / "broken.json"))
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def answers(process: subprocess.Popen[str]) -> dict[str, Any]:
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors[-2000:]
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    return found


def bodies(folder: Path) -> int:
    """Return how many attempts the runs of a folder made."""
    return sum(record.attempts for path in folder.glob("*.db") for record in jr.read(path).records)


async def ours(folder: Path, *, crash: bool) -> dict[str, Any]:
    results = {}
    for name in WITH_COUNTERPART:
        whole, answer, count = await run_to_crash(folder / name, SCENARIOS[name], None, {})
        if crash:
            whole, _, _ = await run_to_crash(folder / f"{name}-crash", SCENARIOS[name], count // 2, {})
            assert not whole
            _, answer, _ = await run_to_crash(folder / f"{name}-crash", SCENARIOS[name], None, {})
        results[name] = json.loads(re.sub(r"step (\d+/)+", "step ", json.dumps(answer)))  # DBOS has no paths of tasks
    return results


def test_what_has_no_counterpart_is_a_minority_that_is_named() -> None:
    assert set(NO_COUNTERPART) < set(SCENARIOS)
    assert len(WITH_COUNTERPART) >= 19


@pytest.mark.slow
def test_dbos_and_this_agree_also_after_a_kill_in_the_middle(tmp_path: Path) -> None:
    assert importlib.metadata.version("dbos").startswith("3.4.")
    here = asyncio.run(ours(tmp_path / "whole", crash=False))
    assert asyncio.run(ours(tmp_path / "crashed", crash=True)) == here

    whole = dbos(tmp_path / "dbos")
    half = {name: (bodies(tmp_path / "whole" / name) + 1) // 2 for name in WITH_COUNTERPART}
    killed = dbos(tmp_path / "dbos-crashed", half)
    there = answers(whole)
    assert there["results"] == here
    _, errors = killed.communicate(timeout=120)
    assert killed.returncode == 9, errors[-2000:]
    again = answers(dbos(tmp_path / "dbos-crashed"))
    assert again["results"].keys() == here.keys()
    assert _sure(again["results"]) == _sure(here)
    assert sum(again["bodies"].values()) < sum(there["bodies"].values())  # it went on, and did not begin anew


def _sure(results: dict[str, Any]) -> dict[str, Any]:
    return {name: answer for name, answer in results.items() if name not in ONLY_UNINTERRUPTED}
