"""What `/pyrepl/overview` says of databases, and what it costs for ten thousand of them."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

from replicator.api import ReplicaStatus, Status
from replicator.board import Counts
from replicator.errors import StorageUnavailable
from replicator.format.ltx import TXID
from replicator.losses import LossWindow
from replicator.overview import Overview, row
from replicator.storage.measured import Operations, measured
from replicator.storage.memory import MemoryClient
from replicator.store import Member, Prepared, Store

REPLICA = ReplicaStatus("file:///r", "file", TXID(7), None, 0.0, None, 0, 0)


class Fake:
    """Stands for a `Replicator` that says the same all the time."""

    def __init__(self, status: Status, *failures: Exception) -> None:
        self._status, self._failures = status, list(failures)

    def start(self) -> None:
        if self._failures:
            raise self._failures.pop()

    def status(self) -> Status:
        return self._status


def status(path: Path, *replicas: ReplicaStatus, **fields: object) -> Status:
    return replace(Status(path, "replicating", TXID(7), 0, 0, 0.0, None, replicas), **fields)  # type: ignore[arg-type]


def member(path: Path, found: Status, *failures: Exception, clients: tuple[object, ...] = ()) -> Member:
    made = Member(path, lambda: Prepared(Fake(found, *failures), clients))  # type: ignore[arg-type]
    made.start()
    return made


def test_a_database_at_rest_is_its_path_its_state_and_its_txid() -> None:
    path = Path("/srv/a.db")
    assert row(member(path, status(path, REPLICA))) == {"path": "/srv/a.db", "state": "replicating", "txid": 7}


def test_of_several_replicas_the_worst_time_and_the_sum_of_counts() -> None:
    path, operations = Path("/srv/a.db"), Operations()
    clients = tuple(measured(MemoryClient(), operations) for _ in range(2))
    replicas = (
        replace(REPLICA, lag_s=0.5, loss_window=LossWindow(0.1, 0.2, 0.3, 1, 1, 0.2), bytes_sent=100, retries=1),
        replace(
            REPLICA, url="file:///q", lag_s=2.5, loss_window=LossWindow(0.2, 0.1, 0.4, 1, 1, 0.2), bytes_sent=10, retries=2, error="away"
        ),
    )
    found = status(
        path, *replicas, state="degraded", wal_size_bytes=4096, waiting=(3, 50, 60), counts=Counts(syncs=9, sync_errors=1), pinned_s=1.25
    )
    made = member(path, found, clients=clients)
    list(clients[0].list(0))
    list(clients[1].list(0))
    list(clients[1].list(9))
    assert row(made) == {
        "path": "/srv/a.db",
        "state": "degraded",
        "txid": 7,
        "lag_s": 2.5,
        "loss_p50_s": 0.2,
        "loss_p99_s": 0.2,
        "loss_max_s": 0.4,
        "wal_bytes": 4096,
        "pinned_s": 1.25,
        "pending": 3,
        "pending_bytes": 110,
        "syncs": 9,
        "requests": 3,
        "sent_bytes": 110,
        "errors": 4,
        "error": "file:///q: away",
    }


def test_databases_that_do_not_replicate_say_why() -> None:
    path = Path("/srv/a.db")
    made = member(path, status(path, REPLICA), StorageUnavailable("the store is away"))
    assert row(made) == {"path": "/srv/a.db", "state": "waiting", "error": "the store is away"}
    problem = replace(REPLICA, problems=("retention: not allowed",))
    assert row(member(path, status(path, problem)))["error"] == "file:///r: retention: not allowed"


def test_ten_thousand_databases_are_one_quick_and_small_answer() -> None:
    operations = Operations()
    paths = [Path(f"/srv/tenants/{number:05d}/app.db") for number in range(10_000)]
    store = Store([member(path, status(path, REPLICA)) for path in paths])
    list(measured(MemoryClient(), operations).list(0))
    overview = Overview(store, operations)
    began = time.process_time()
    answer = overview.answer()
    text = json.dumps(answer)
    assert time.process_time() - began < 2.0
    assert len(answer["databases"]) == 10_000
    assert len(text) < 1_000_000
    assert answer["operations"] == {"LIST": {"requests": 1, "bytes": 0, "errors": 0}}
    assert answer["resident_bytes"] > 1_000_000
    assert 0 <= answer["uptime_seconds"] < 300
