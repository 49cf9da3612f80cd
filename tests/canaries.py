"""A pytest plugin: no secret of the test servers shows in anything that a test prints. A test in which one shows fails.

All tests have these secrets in their environment, their URLs and their settings. What is looked at, for each test: what it and its child processes print, what
it logs, what child processes that it listens to print, messages of errors, replies over HTTP - metrics and the control socket among them - and `repr` in all of
these. Whatever a secret is put into on purpose carries the mark `shows_secrets`.
"""

from __future__ import annotations

import http.client
import logging
import subprocess
from collections.abc import Generator, Iterator
from typing import Any

import pytest

from replicator.errors import ReplicatorError
from tests.otherservers import AZURE_KEY, PASSWORD
from tests.servers import SECRET

CANARIES = {"the secret key of S3": SECRET, "the password": PASSWORD, "the key of the Azure account": AZURE_KEY}
MAX_BODY = 1 << 20

_seen = pytest.StashKey[list[str]]()


def shown(text: str | bytes) -> list[str]:
    """Return the names of the secrets in a text."""
    if isinstance(text, bytes):
        return [name for name, secret in CANARIES.items() if secret.encode() in text]
    return [name for name, secret in CANARIES.items() if secret in text]


class _Listener(logging.Handler):
    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self._seen = seen

    def emit(self, record: logging.LogRecord) -> None:
        self._seen += [f"{name} in a log line" for name in shown(self.format(record))]


@pytest.fixture(autouse=True)
def canaries(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Listen to what only the test sees."""
    seen = request.node.stash.setdefault(_seen, [])
    communicate, read, error = subprocess.Popen.communicate, http.client.HTTPResponse.read, ReplicatorError.__init__

    def communicating(self: Any, *arguments: Any, **keywords: Any) -> Any:
        found = communicate(self, *arguments, **keywords)
        seen.extend(f"{name} in what a child process prints" for text in found if text for name in shown(text))
        return found

    def reading(self: Any, *arguments: Any, **keywords: Any) -> Any:
        found = read(self, *arguments, **keywords)
        if len(found) <= MAX_BODY:
            seen.extend(f"{name} in a reply over HTTP" for name in shown(found))
        return found

    def failing(self: Any, *arguments: Any, **keywords: Any) -> None:
        error(self, *arguments, **keywords)
        seen.extend(f"{name} in the message of an error" for name in shown(f"{self} {self!r}"))

    monkeypatch.setattr(subprocess.Popen, "communicate", communicating)
    monkeypatch.setattr(http.client.HTTPResponse, "read", reading)
    monkeypatch.setattr(ReplicatorError, "__init__", failing)
    listener = _Listener(seen)
    logging.getLogger("replicator").addHandler(listener)
    yield
    logging.getLogger("replicator").removeHandler(listener)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    seen = [f"{name} in {section}" for section, text in report.sections for name in shown(text)] + item.stash.get(_seen, [])
    if seen and not report.failed and item.get_closest_marker("shows_secrets") is None:
        report.outcome = "failed"
        report.longrepr = "secrets are shown: " + "; ".join(sorted(set(seen)))
    return report
