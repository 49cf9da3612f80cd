"""Fixtures for all tests, and the Hypothesis profiles: `default`, `ci` (derandomised), `deep` (HYPOTHESIS_PROFILE=deep)."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.otherservers import OTHER_STORES, Place, other_store
from tests.servers import ACCESS, SECRET, Server, moto, rclone, seaweed

__all__ = ["moto", "other_store", "rclone", "seaweed"]

pytest_plugins = ["replicator.testing.plugin", "tests.canaries"]

_slow = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile("default", deadline=None, suppress_health_check=_slow)
settings.register_profile("ci", parent=settings.get_profile("default"), derandomize=True)
settings.register_profile("deep", parent=settings.get_profile("default"), max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "default"))


@pytest.fixture
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of an empty replica in the store that the test's parameter names."""
    if request.param == "file":
        return f"file://{tmp_path}/replica"
    if request.param in OTHER_STORES:
        place: Place = request.getfixturevalue("other_store")(request.param)
        return place.url(f"{request.node.name.partition('[')[0]}-{uuid.uuid4().hex}")
    server: Server = request.getfixturevalue(request.param)
    return server.url(f"{request.node.name.partition('[')[0]}-{uuid.uuid4().hex}")


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The test servers' keys, and nothing of this machine's own settings."""
    for name in list(os.environ):
        if name.startswith(("AWS_", "LITESTREAM_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path_factory.getbasetemp()))


@pytest.fixture(autouse=True)
def same_logging_afterwards() -> Iterator[None]:
    """Commands that run in this process set the level and the stream of our logger."""
    logger = logging.getLogger("replicator")
    handlers, level = list(logger.handlers), logger.level
    yield
    logger.handlers[:] = handlers
    logger.setLevel(level)
