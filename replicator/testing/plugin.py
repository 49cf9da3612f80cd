"""The pytest plugin: `pytest_plugins = ["replicator.testing.plugin"]` in the top `conftest.py`, or `-p replicator.testing.plugin`.

    --replicator-seed N     other runs than those of every day: N seeds the fixture `replicator_seed` and every `CrashRecoveryMachine`
    --replicator-steps N    longer runs: N rules in each run of a `CrashRecoveryMachine`; also the fixture `replicator_steps`

Both are shown in the header of the run, so that a failure in CI can be repeated. Without `--replicator-seed` Hypothesis chooses as it always does.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import seed, settings

from replicator.testing.machine import CrashRecoveryMachine

__all__ = ["replicator_seed", "replicator_steps"]

DEFAULT_SEED, DEFAULT_STEPS = 1, 50


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("replicator", "crash and recovery tests with replicator.testing")
    group.addoption("--replicator-seed", type=int, default=None, help="seed of crash and recovery tests")
    group.addoption("--replicator-steps", type=int, default=None, help="steps in each run of a CrashRecoveryMachine")


def pytest_report_header(config: pytest.Config) -> str | None:
    given = [(name, config.getoption(f"replicator_{name}")) for name in ("seed", "steps")]
    text = " ".join(f"--replicator-{name}={value}" for name, value in given if value is not None)
    return f"replicator: {text}" if text else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted_seed, steps = config.getoption("replicator_seed"), config.getoption("replicator_steps")
    collected = {getattr(item, "cls", None) for item in items}
    for machine in _machines(CrashRecoveryMachine):
        case: Any = machine.TestCase
        if case not in collected:
            continue
        if steps is not None:
            case.settings = settings(case.settings, stateful_step_count=steps)
        if wanted_seed is not None:
            seed(wanted_seed)(machine)


@pytest.fixture
def replicator_seed(request: pytest.FixtureRequest) -> int:
    """The seed of this run, for `FaultyClient`, `HostileS3`, `PowerCut.disk` and `random.Random`."""
    given = request.config.getoption("replicator_seed")
    return DEFAULT_SEED if given is None else int(given)


@pytest.fixture
def replicator_steps(request: pytest.FixtureRequest) -> int:
    """How long a run should be."""
    given = request.config.getoption("replicator_steps")
    return DEFAULT_STEPS if given is None else int(given)


def _machines(root: type[CrashRecoveryMachine]) -> list[type[CrashRecoveryMachine]]:
    return [found for child in root.__subclasses__() for found in (child, *_machines(child))]
