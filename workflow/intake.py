"""The host's own file, `<folder>/.host/intake.db`: requests that were accepted, and an index of all runs. All its statements are here.

A request is durable when its transaction is; many callers share one (group commit). It leaves the file only when the instance has it, and in the
transaction that does so the index says that the run is awake. Hence after a crash: a run that is `running` here is opened and looked at, one that is
`waiting` has nothing to do before its wake time or the next request.

`Intake` owns a thread and a connection. Other processes insert requests with `submit` over connections of their own.
"""

from __future__ import annotations

import asyncio
import os
import queue
import sqlite3
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

from workflow.errors import Refused, Unreadable
from workflow.lanes import settle
from workflow.schema import INTAKE, VERSION

__all__ = ["Indexed", "Intake", "Request", "indexed", "submit"]

T = TypeVar("T")
BATCH = 1000
LATER_S = 0.05
"""So long may wait what nobody waits for, to share the transaction, and the fsync, of what somebody does."""


@dataclass(frozen=True, slots=True)
class Request:
    """Something that somebody wants of a run. `kind`: start, event, cancel, pause, resume, fork. `body`: JSON."""

    id: str
    instance: str
    kind: str
    body: str
    sender: str | None
    sent_at: str


@dataclass(frozen=True, slots=True)
class Indexed:
    """A run as the index has it."""

    id: str
    flow: str
    status: str
    wake_at: str | None
    priority: int
    arrival: int
    input_sha256: str
    parent_id: str | None
    error: str | None
    created_at: str
    finished_at: str | None
    gone_at: str | None = None


Work = tuple[Callable[[sqlite3.Connection], Any], "asyncio.Future[Any] | None"]

_FIELDS = tuple(Indexed.__dataclass_fields__)
_COLUMNS = ", ".join(_FIELDS)
_REQUEST = "id, instance, kind, body, sender, sent_at"


def connect(path: Path, *, synchronous: str = "FULL") -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=30.0)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute(f"PRAGMA synchronous = {synchronous}")
        if connection.execute("PRAGMA user_version").fetchone()[0] > VERSION:
            raise Unreadable(str(path), "it is of a newer version")
        connection.executescript(INTAKE)
    except sqlite3.DatabaseError as error:
        connection.close()
        raise Unreadable(str(path), str(error)) from error
    except Unreadable:
        connection.close()
        raise
    return connection


# -- one transaction's parts; each takes the connection ----------------------------------------------------------------------------


def add_request(db: sqlite3.Connection, request: Request, *, fresh: bool = False) -> None:
    """Accept a request. The same id again changes nothing, so that callers may try again. `fresh`: the engine has not seen it."""
    refused = db.execute("SELECT reason FROM wf_refused WHERE id = ?", (request.id,)).fetchone()
    if refused is None:
        db.execute(
            f"INSERT OR IGNORE INTO wf_requests({_REQUEST}, fresh) VALUES(?, ?, ?, ?, ?, ?, ?)",
            (request.id, request.instance, request.kind, request.body, request.sender, request.sent_at, fresh),
        )


def add_start(db: sqlite3.Connection, run: Indexed, request: Request) -> Indexed:
    """Accept a start; returns the run that has the id, which is an older one where there is one."""
    found = one(db, run.id)
    if found is not None:
        return found
    add_run(db, run)
    add_request(db, request)
    return run


def add_run(db: sqlite3.Connection, run: Indexed) -> None:
    """Put a run into the index; one that is there stays as it is."""
    db.execute(
        f"INSERT OR IGNORE INTO wf_index({_COLUMNS}) VALUES({', '.join('?' * len(_FIELDS))})", tuple(getattr(run, name) for name in _FIELDS)
    )


def one(db: sqlite3.Connection, id: str) -> Indexed | None:
    """Return a run."""
    row = db.execute(f"SELECT {_COLUMNS} FROM wf_index WHERE id = ?", (id,)).fetchone()
    return Indexed(*row) if row else None


def claim(db: sqlite3.Connection, flow: str, limit: int) -> list[Indexed]:
    """Take up to `limit` queued runs of a flow, by priority and arrival; they are `running` from now on."""
    found = [
        Indexed(*row)
        for row in db.execute(
            f"SELECT {_COLUMNS} FROM wf_index WHERE status = 'queued' AND flow = ? ORDER BY priority DESC, arrival LIMIT ?", (flow, limit)
        )
    ]
    db.executemany("UPDATE wf_index SET status = 'running' WHERE id = ?", [(run.id,) for run in found])
    return found


def set_status(
    db: sqlite3.Connection, id: str, status: str, *, wake_at: str | None = None, error: str | None = None, finished_at: str | None = None
) -> None:
    """Say how a run stands. Its start request is not needed any more: the instance exists."""
    db.execute(
        "UPDATE wf_index SET status = ?, wake_at = ?, error = ?, finished_at = ? WHERE id = ?", (status, wake_at, error, finished_at, id)
    )
    db.execute("DELETE FROM wf_requests WHERE instance = ? AND kind = 'start'", (id,))


def set_waiting(db: sqlite3.Connection, id: str, wake_at: str | None, since: str) -> None:
    """Say that a run has nothing to do before a time, or a request. `since`: now, by the clock that `wake_at` is a time of."""
    set_status(db, id, "waiting", wake_at=wake_at)
    db.execute("UPDATE wf_index SET since = ? WHERE id = ?", (since, id))


def taken(db: sqlite3.Connection, id: str, requests: Collection[str]) -> None:
    """Requests are in the instance file now: forget them, and know the run as awake."""
    db.executemany("DELETE FROM wf_requests WHERE id = ?", [(item,) for item in requests])
    db.execute("UPDATE wf_index SET status = 'running', wake_at = NULL WHERE id = ? AND status IN ('waiting', 'paused', 'queued')", (id,))


def refuse(db: sqlite3.Connection, request: Request, reason: str, at: str) -> None:
    """Record that a request cannot be carried out."""
    db.execute(
        "INSERT OR IGNORE INTO wf_refused(id, instance, kind, body, sender, reason, at) VALUES(?, ?, ?, ?, ?, ?, ?)",
        (request.id, request.instance, request.kind, request.body, request.sender, reason, at),
    )
    db.execute("DELETE FROM wf_requests WHERE id = ?", (request.id,))


def done(db: sqlite3.Connection, request: str) -> None:
    db.execute("DELETE FROM wf_requests WHERE id = ?", (request,))


def drop(db: sqlite3.Connection, id: str, owner: str) -> bool:
    """Forget a run that is another host's, with its start; what else waits for it stays. False when it was inherited from that host meanwhile, and may be claimed."""
    if db.execute("SELECT 1 FROM wf_inherited WHERE id = ? AND host = ?", (id, owner)).fetchone() is not None:
        return False
    db.execute("DELETE FROM wf_index WHERE id = ?", (id,))
    db.execute("DELETE FROM wf_inherited WHERE id = ?", (id,))
    db.execute("DELETE FROM wf_requests WHERE instance = ? AND kind = 'start'", (id,))
    return True


def waiting(db: sqlite3.Connection, requests: Collection[str]) -> tuple[set[str], dict[str, str]]:
    """Return which of some requests are still here, and the reasons of those that were refused."""
    left: set[str] = set()
    refused: dict[str, str] = {}
    for request in requests:
        left.update(id for (id,) in db.execute("SELECT id FROM wf_requests WHERE id = ?", (request,)))
        refused.update(db.execute("SELECT id, reason FROM wf_refused WHERE id = ?", (request,)))
    return left, refused


def requests_of(db: sqlite3.Connection, id: str) -> list[Request]:
    """Return what waits for a run, oldest first."""
    return [Request(*row) for row in db.execute(f"SELECT {_REQUEST} FROM wf_requests WHERE instance = ? ORDER BY id", (id,))]


def is_to_begin(db: sqlite3.Connection, id: str) -> bool:
    """Return whether a run's start waits still, as it does until the run's file is there."""
    return db.execute("SELECT 1 FROM wf_requests WHERE instance = ? AND kind = 'start' LIMIT 1", (id,)).fetchone() is not None


def fresh_requests(db: sqlite3.Connection) -> list[Request]:
    """Return what other processes asked for and the engine has not seen; it has from now on."""
    found = [Request(*row) for row in db.execute(f"SELECT {_REQUEST} FROM wf_requests WHERE fresh = 1 ORDER BY id")]
    if found:
        db.execute("UPDATE wf_requests SET fresh = 0 WHERE fresh = 1")
    return found


def open_requests(db: sqlite3.Connection) -> list[Request]:
    """Return what waits for runs, but their starts, at the start of an engine."""
    return [Request(*row) for row in db.execute(f"SELECT {_REQUEST} FROM wf_requests WHERE kind <> 'start' AND fresh = 0 ORDER BY id")]


def live(db: sqlite3.Connection) -> list[tuple[str, str, str | None, str | None, str]]:
    """Return (id, status, wake_at, since, flow) of all runs that are running, waiting or paused."""
    return db.execute("SELECT id, status, wake_at, since, flow FROM wf_index WHERE status IN ('running', 'waiting', 'paused')").fetchall()


def flows_queued(db: sqlite3.Connection) -> list[str]:
    """Return the flows that have runs in the queue: one look into the index for each, however many runs there are."""
    found: list[str] = []
    while True:
        row = db.execute(
            "SELECT flow FROM wf_index WHERE status = 'queued' AND flow > ? ORDER BY flow LIMIT 1", (found[-1] if found else "",)
        ).fetchone()
        if row is None:
            return found
        found.append(row[0])


def inherit(
    db: sqlite3.Connection, rows: Sequence[Indexed], requests: Sequence[Request], owners: Callable[[str], Collection[str]]
) -> tuple[list[Indexed], list[Request]]:
    """Take in what a dead host has left; returns what was new, of rows and requests. Again changes nothing.

    A run that is here already, because both hosts had accepted its start, may be that host's as well as this one's, and may be claimed, too.

    Args:
        owners: whose a run's file may say that it is.
    """
    found = {row.id: one(db, row.id) for row in rows}
    new = [row for row in rows if found[row.id] is None]
    for row in new:
        add_run(db, row)
    for row in rows:
        here = found[row.id] or row
        if here.finished_at is None:
            db.executemany("INSERT OR IGNORE INTO wf_inherited(id, host) VALUES(?, ?)", [(row.id, host) for host in owners(row.id)])
    ids = {row.id for row in new}
    wanted = [request for request in requests if request.kind != "start" or request.instance in ids]
    for request in wanted:
        add_request(db, request)
    return new, wanted


def inherited(db: sqlite3.Connection) -> dict[str, set[str]]:
    """Return the hosts from which inherited runs may be claimed, by run."""
    found: dict[str, set[str]] = {}
    for id, host in db.execute("SELECT id, host FROM wf_inherited"):
        found.setdefault(id, set()).add(host)
    return found


def claimed(db: sqlite3.Connection, id: str) -> None:
    """An inherited run is this host's: its file says so, on the replica."""
    db.execute("DELETE FROM wf_inherited WHERE id = ?", (id,))


def all_requests(db: sqlite3.Connection) -> list[Request]:
    """Return everything that was accepted and is not where it belongs."""
    return [Request(*row) for row in db.execute(f"SELECT {_REQUEST} FROM wf_requests ORDER BY id")]


def shares(db: sqlite3.Connection) -> dict[str, str]:
    """Return the heirs that were chosen for runs, and may have them already."""
    return dict(db.execute("SELECT id, heir FROM wf_shares"))


def set_shares(db: sqlite3.Connection, chosen: Mapping[str, str]) -> None:
    """Note the heirs that are chosen for runs."""
    db.executemany("INSERT OR REPLACE INTO wf_shares(id, heir) VALUES(?, ?)", chosen.items())


def keep_only(db: sqlite3.Connection, ids: Collection[str]) -> None:
    """Forget all runs but some: others have them, and what waits for them."""
    db.execute("CREATE TEMP TABLE IF NOT EXISTS kept (id TEXT PRIMARY KEY)")
    db.execute("DELETE FROM temp.kept")
    db.executemany("INSERT INTO temp.kept VALUES(?)", [(id,) for id in ids])
    db.execute("DELETE FROM wf_shares")
    for table, column in (("wf_index", "id"), ("wf_requests", "instance"), ("wf_inherited", "id")):
        db.execute(f"DELETE FROM {table} WHERE {column} NOT IN (SELECT id FROM temp.kept)")


def counts(db: sqlite3.Connection) -> tuple[dict[str, int], list[tuple[str, str | None]]]:
    """Return how many unfinished runs there are of each status, and (id, wake time) of those that wait."""
    found = dict(
        db.execute("SELECT status, count(*) FROM wf_index WHERE status IN ('running', 'waiting', 'paused') GROUP BY status").fetchall()
    )
    queued = db.execute("SELECT count(*) FROM wf_index WHERE status = 'queued'").fetchone()[0]
    return found | {"queued": queued}, db.execute("SELECT id, wake_at FROM wf_index WHERE status = 'waiting'").fetchall()


def ended_before(db: sqlite3.Connection, at: str, limit: int) -> list[str]:
    """Return runs that ended before a time and whose files are there; not those in quarantine, which somebody should look at."""
    found = db.execute(
        "SELECT id FROM wf_index WHERE finished_at < ? AND gone_at IS NULL AND finished_at IS NOT NULL AND status <> 'quarantined' LIMIT ?",
        (at, limit),
    )
    return [id for (id,) in found]


def set_gone(db: sqlite3.Connection, ids: Collection[str], at: str) -> None:
    """Say that the files of runs are deleted; their ids stay taken."""
    db.executemany("UPDATE wf_index SET gone_at = ? WHERE id = ?", [(at, id) for id in ids])


def sql_read(path: Path, read: Callable[[sqlite3.Connection], T]) -> T:
    """Read from the file over a connection of its own, in any process. Raises `Unreadable`."""
    if not path.exists():
        raise Unreadable(str(path), "there is no such file: no engine ever ran there")
    connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, isolation_level=None, timeout=30.0)
    try:
        return read(connection)
    except sqlite3.DatabaseError as error:
        raise Unreadable(str(path), str(error)) from error
    finally:
        connection.close()


def indexed(db: sqlite3.Connection) -> list[Indexed]:
    """Return all runs, oldest first."""
    return [Indexed(*row) for row in db.execute(f"SELECT {_COLUMNS} FROM wf_index ORDER BY created_at, id")]


def refusal(db: sqlite3.Connection, request: str) -> str | None:
    """Return why a request was refused; None when it was not."""
    row = db.execute("SELECT reason FROM wf_refused WHERE id = ?", (request,)).fetchone()
    return row[0] if row else None


def submit(path: Path, request: Request) -> None:
    """Add a request from any process; durable on return.

    Raises:
        Refused: it was refused before.
        Unreadable: there is no such file.
    """
    if not path.exists():
        raise Unreadable(str(path), "there is no such file: no engine ever ran there")
    connection = connect(path)
    try:
        connection.execute("BEGIN IMMEDIATE")
        add_request(connection, request, fresh=True)
        reason = refusal(connection, request.id)
        connection.execute("COMMIT")
    finally:
        connection.close()
    if reason is not None:
        raise Refused(request.instance, reason)


class Intake:
    """The engine's side: a thread that runs functions of the connection, many in one transaction."""

    @classmethod
    async def open(cls, path: Path, *, synchronous: str = "FULL", faults: Callable[[str, str], None] | None = None) -> Self:
        """Open the file, or make it. Raises `Unreadable`."""
        return cls(path, await asyncio.to_thread(connect, path, synchronous=synchronous), faults)

    def __init__(self, path: Path, db: sqlite3.Connection, faults: Callable[[str, str], None] | None) -> None:
        self.path = path
        self._faults = faults
        self._db = db
        self._queue: queue.SimpleQueue[list[Work] | None] = queue.SimpleQueue()
        self._later: list[Work] = []
        self._alarm: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="workflow intake", daemon=True)
        self._thread.start()

    def do(self, work: Callable[[sqlite3.Connection], T]) -> asyncio.Future[T]:
        """Run a function in the next transaction; the future is done when that is on the disk. Call from the loop's thread."""
        future: asyncio.Future[T] = self._loop.create_future()
        if self._closed:
            future.set_exception(RuntimeError("the engine is closed"))
        else:
            self._give((work, future))
        return future

    def later(self, work: Callable[[sqlite3.Connection], object]) -> None:
        """Run a function before what is asked for next, or soon; nobody waits, a failure is found again after a restart."""
        if self._closed:
            return
        self._later.append((work, None))
        if self._alarm is None:
            self._alarm = self._loop.call_later(LATER_S, self._give)

    def _give(self, *work: Work) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        self._queue.put([*self._later, *work])
        self._later = []

    def _run(self) -> None:
        while True:
            item = self._queue.get()
            batch: list[Work] = []
            while item is not None:
                batch += item
                if len(batch) >= BATCH:
                    break
                try:
                    item = self._queue.get_nowait()
                except queue.Empty:
                    break
            if batch:
                self._transaction(batch)
            if item is None:
                self._db.close()  # here, because SQLite checkpoints
                return

    def _transaction(self, batch: Sequence[Work]) -> None:
        answers: list[tuple[asyncio.Future[Any], Any, BaseException | None]] = []
        try:
            self._db.execute("BEGIN IMMEDIATE")
            for work, future in batch:
                value, error = None, None
                self._db.execute("SAVEPOINT one")
                try:
                    value = work(self._db)
                except Exception as failure:  # it is the caller's, who gets it; the others' work stands
                    error = failure
                    self._db.execute("ROLLBACK TO one")
                self._db.execute("RELEASE one")
                if future is not None:
                    answers.append((future, value, error))
            if self._faults is not None:
                self._faults("", "before")
            self._db.execute("COMMIT")
            if self._faults is not None:
                self._faults("", "after")
        except BaseException as failure:  # whatever it is, those who wait must hear of it
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            answers = [(future, None, failure) for _, future in batch if future is not None]
        if answers and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_answer, answers)

    async def close(self) -> None:
        """Run what waits, and stop."""
        self._closed = True
        self._give()
        self._queue.put(None)
        while self._thread.is_alive():
            await asyncio.sleep(0.001)

    def stat(self) -> tuple[int, int]:
        """Return what changes when another process writes a request."""
        try:
            found = os.stat(f"{self.path}-wal")
        except FileNotFoundError:
            return 0, 0
        return found.st_mtime_ns, found.st_size


def _answer(answers: list[tuple[asyncio.Future[Any], Any, BaseException | None]]) -> None:
    for future, value, error in answers:
        settle(future, value, error)
