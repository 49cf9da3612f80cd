"""The heartbeat: sent while all databases are in order, and its URL is shown to nobody."""

from __future__ import annotations

import http.server
import logging
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from replicator import config
from replicator.api import ReplicaStatus, Status
from replicator.daemon import Daemon, Wakeups
from replicator.errors import LineageMismatch, StorageUnavailable
from replicator.format.ltx import TXID
from replicator.heartbeat import Heartbeat
from replicator.storage.measured import Operations
from replicator.store import Member, Prepared, Store

PATH = Path("/srv/a.db")
REPLICA = ReplicaStatus("file:///r", "file", TXID(7), None, 0.0, None, 0, 0)
GOOD = Status(PATH, "replicating", TXID(7), 0, 0, 0.0, None, (REPLICA, REPLICA))
URL = "https://alarm.example.com/ping/SECRET"


class Fake:
    """Stands for a `Replicator`."""

    def __init__(self, status: Status, *failures: Exception) -> None:
        self.now, self._failures = status, list(failures)

    def start(self) -> None:
        if self._failures:
            raise self._failures.pop()

    def status(self) -> Status:
        return self.now

    def close(self, timeout_s: float, *, retry_interval_s: float) -> None:
        pass


def store_of(*fakes: Fake) -> Store:
    members = [Member(PATH.with_name(f"{at}.db"), lambda fake=fake: Prepared(fake, [])) for at, fake in enumerate(fakes)]  # type: ignore[misc]
    for member in members:
        member.start()
    return Store(members)


def heartbeat(store: Store, answers: list[int | Exception], interval_s: float = 60.0) -> tuple[Heartbeat, list[str]]:
    asked: list[str] = []

    def get(url: str) -> int:
        asked.append(url)
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    return Heartbeat(store, URL, interval_s, get=get), asked


@pytest.mark.parametrize(
    "status",
    [
        replace(GOOD, error="disk I/O error"),
        replace(GOOD, state="failed"),
        replace(GOOD, replicas=(REPLICA, replace(REPLICA, lag_s=61.0))),
    ],
    ids=["error", "failed", "lag"],
)
def test_one_database_that_is_not_in_order_silences_it_until_it_is(status: Status, caplog: pytest.LogCaptureFixture) -> None:
    fakes = [Fake(GOOD), Fake(status)]
    found, asked = heartbeat(store_of(*fakes), [200])
    with caplog.at_level(logging.INFO):
        assert not found.look()
        assert not found.look()
        assert asked == []
        assert [record.levelname for record in caplog.records if "no heartbeat" in record.message] == ["WARNING"]
        assert "db=/srv/1.db" in caplog.text
        fakes[1].now = replace(GOOD, replicas=(REPLICA, replace(REPLICA, lag_s=59.0)))
        assert found.look()
        assert asked == [URL]
        assert "heartbeat is sent again" in caplog.text
    assert "SECRET" not in caplog.text


@pytest.mark.parametrize("error", [StorageUnavailable("away"), LineageMismatch("file:///r", expected="a", got="b")])
def test_one_that_cannot_begin_silences_it_and_one_that_was_stopped_does_not(error: Exception) -> None:
    store = store_of(Fake(GOOD), Fake(GOOD, error))
    found, _ = heartbeat(store, [204])
    assert not found.look()
    store.members()[1].stop(1)
    assert found.look()


def test_only_an_answer_of_success_counts_and_then_the_interval_is_kept(caplog: pytest.LogCaptureFixture) -> None:
    found, asked = heartbeat(store_of(Fake(GOOD)), [500, OSError(f"cannot reach {URL}"), 302, 200])
    assert [found.look() for _ in range(6)] == [False, False, False, True, False, False]
    assert len(asked) == 4
    assert "status=500" in caplog.text
    assert "error=OSError" in caplog.text
    assert "SECRET" not in caplog.text
    short, asked = heartbeat(store_of(Fake(GOOD)), [200, 200], interval_s=0.0)
    assert [short.look() for _ in range(2)] == [True, True]


@pytest.fixture
def alarm() -> Iterator[tuple[str, list[str], threading.Event]]:
    """A server that answers 200, but 404 to /gone and nonsense to /noise."""
    paths: list[str] = []
    asked = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            paths.append(f"{self.path} {self.headers['User-Agent'].partition('/')[0]}")
            asked.set()
            if self.path == "/noise":
                self.wfile.write(b"noise\r\n")
            else:
                self.send_response(404 if self.path == "/gone" else 200)
                self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}", paths, asked
        server.shutdown()
        thread.join()


def test_real_requests(alarm: tuple[str, list[str], threading.Event]) -> None:
    url, paths, _ = alarm
    results = [Heartbeat(store_of(Fake(GOOD)), url + path, 60.0).look() for path in ("/ping?a=b", "/gone", "/noise")]
    assert results == [True, False, False]
    assert paths == ["/ping?a=b pyrepl", "/gone pyrepl", "/noise pyrepl"]
    assert not Heartbeat(store_of(Fake(GOOD)), "http://127.0.0.1:1/", 60.0).look()


def test_the_thread_looks_by_itself_and_ends(alarm: tuple[str, list[str], threading.Event]) -> None:
    url, _, asked = alarm
    found = Heartbeat(store_of(Fake(GOOD)), f"{url}/ping", 60.0, look_s=0.01)
    found.start()
    assert asked.wait(20)
    found.close(20)
    assert not found._thread.is_alive()
    Heartbeat(Store(), f"{url}/ping", 60.0).close()  # never started


def test_the_daemon_runs_it_where_a_url_is_configured() -> None:
    def names(settings: config.Daemon) -> set[str]:
        with Daemon([], settings, Wakeups(), Operations())._listeners():
            return {thread.name for thread in threading.enumerate()}

    assert "pyrepl heartbeat" in names(config.Daemon(heartbeat_url=URL))
    assert "pyrepl heartbeat" not in names(config.Daemon())  # the other one has ended
