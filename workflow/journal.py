"""One instance file: the connection, the transactions, and every statement that is run on it. (`intake.py` has those of the host's file.)

A transaction is a list of `Write`s, made by the functions below; `Journal.commit` runs it at `synchronous=FULL`, so that what returned is on the
disk. Nothing here knows when to write what. A journal is used by one thread at a time, and only by the engine that owns the folder.

`faults`, when given, is called with "before" and "after" around each commit: the seam for tests that stop the process at every one.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from workflow.errors import MissingObject, Unreadable
from workflow.schema import APPLICATION_ID, INSTANCE, MIGRATIONS, VERSION
from workflow.state import Record, RunStatus

__all__ = [
    "Event",
    "Faults",
    "Instance",
    "Journal",
    "Loaded",
    "Write",
    "add_events",
    "copy",
    "create",
    "cut",
    "put_attempt",
    "put_control",
    "put_event",
    "put_object",
    "put_state",
    "put_step",
    "read",
    "read_instance",
    "read_object",
    "rows",
    "set_owner",
    "stands_at",
    "template",
]

Write = tuple[str, tuple[Any, ...]]
Faults = Callable[[str], None]


@dataclass(slots=True)
class Instance:
    """The one row of `wf_instance`."""

    id: str
    incarnation: str
    flow: str
    status: RunStatus
    input: str
    input_sha256: str
    created_at: str
    updated_at: str
    output: str | None = None
    output_sha256: str | None = None
    error: str | None = None
    parent_id: str | None = None
    parent_key: str | None = None
    forked_from: str | None = None
    durability: str = "local"
    priority: int = 0
    resumes: int = 0
    finished_at: str | None = None
    owner: str | None = None
    traceparent: str | None = None


@dataclass(slots=True)
class Event:
    """A row of `wf_inbox` that waits to be consumed."""

    id: str
    type: str
    payload: str
    sender: str | None
    sent_at: str


@dataclass(frozen=True, slots=True)
class Loaded:
    """All that a run needs to go on."""

    instance: Instance
    records: list[Record]
    events: list[Event]
    seen: set[str]
    """Ids of all events and control requests that are in the file, also consumed ones."""
    state: dict[int, list[tuple[str, str | None]]]
    """Entries of the state journal by the number of the step that wrote them."""
    paused: bool


# -- writes ----------------------------------------------------------------------------------------------------------------------

_INSTANCE = tuple(Instance.__dataclass_fields__)
_STEP = (
    "seq", "key", "name", "kind", "status", "number", "after", "durability", "repeat", "input", "input_sha256", "output", "output_sha256",
    "error", "attempts", "wake_at", "started_at", "finished_at",
)  # fmt: skip
_PUT_STEP = f"INSERT INTO wf_steps({', '.join(_STEP)}) VALUES({', '.join('?' * len(_STEP))}) ON CONFLICT(seq) DO UPDATE SET " + ", ".join(
    f"{name} = excluded.{name}" for name in _STEP if name not in ("seq", "key", "name", "kind", "input", "input_sha256", "after")
)


_step_values: Callable[[Record], tuple[Any, ...]] = attrgetter(*_STEP)

_USUAL = {"durability": "'local'", "repeat": "1", "output_sha256": "NULL", "error": "NULL", "wake_at": "NULL"}
_GIVEN = (
    "seq", "key", "name", "kind", "status", "number", "after", "input", "input_sha256", "output", "attempts", "started_at", "finished_at",
)  # fmt: skip
_PUT_USUAL_STEP = (
    f"INSERT INTO wf_steps({', '.join((*_GIVEN, *_USUAL))}) VALUES({', '.join('?' * len(_GIVEN))}, {', '.join(_USUAL.values())})"
    + _PUT_STEP[_PUT_STEP.index(" ON CONFLICT") :]
)
"""The same row: what most steps have alike stands in the statement. `sqlite3` asks the adapters for each NULL and each bool that it is given."""


def put_step(record: Record) -> Write:
    """Write a step's row, or bring it up to date."""
    if record.durability == "local" and record.repeat and record.output_sha256 is record.error is record.wake_at is None:
        return _PUT_USUAL_STEP, (
            record.seq, record.key, record.name, record.kind, record.status, record.number, record.after,
            record.input, record.input_sha256, record.output, record.attempts, record.started_at, record.finished_at,
        )  # fmt: skip
    return _PUT_STEP, _step_values(record)


def put_attempt(
    seq: int,
    attempt: int,
    *,
    machine: str,
    started_at: str,
    finished_at: str,
    outcome: str,
    error: str | None = None,
    next_try_at: str | None = None,
    usage: str | None = None,
) -> Write:
    """Write how an attempt ended."""
    return (
        "INSERT OR REPLACE INTO wf_attempts(step_seq, attempt, machine, started_at, finished_at, outcome, error, next_try_at, usage)"
        " VALUES(?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (seq, attempt, machine, started_at, finished_at, outcome, error, next_try_at, usage),
    )


def put_late(seq: int, attempt: int, text: str) -> Write:
    """Note how a body ended after its time was over."""
    return "UPDATE wf_attempts SET late = ? WHERE step_seq = ? AND attempt = ?", (text, seq, attempt)


def put_event(id: str, type: str, payload: str, sender: str | None, sent_at: str) -> Write:
    """Write an event. One that is there already, consumed or not, stays as it is."""
    return "INSERT OR IGNORE INTO wf_inbox(id, type, payload, sender, sent_at) VALUES(?, ?, ?, ?, ?)", (id, type, payload, sender, sent_at)


def consume(id: str, seq: int, at: str) -> Write:
    return "UPDATE wf_inbox SET consumed_by = ?, consumed_at = ? WHERE id = ?", (seq, at, id)


def refuse(id: str, reason: str) -> Write:
    return "UPDATE wf_inbox SET refused = ? WHERE id = ?", (reason, id)


def put_control(id: str, kind: str, sender: str | None, sent_at: str, applied_at: str) -> Write:
    return "INSERT OR IGNORE INTO wf_control(id, kind, sender, sent_at, applied_at) VALUES(?, ?, ?, ?, ?)", (
        id, kind, sender, sent_at, applied_at,
    )  # fmt: skip


def put_state(seq: int, name: str, value: str | None) -> Write:
    """Write an entry of the state journal; None deletes."""
    return "INSERT OR REPLACE INTO wf_state(step_seq, name, value) VALUES(?, ?, ?)", (seq, name, value)


def put_object(sha256: str, size: int, media_type: str, body: bytes | None, at: str) -> Write:
    """Write an object, or that it is in the bucket (`body` None)."""
    return (
        "INSERT OR IGNORE INTO wf_objects(sha256, bytes, media_type, location, body, created_at) VALUES(?, ?, ?, ?, ?, ?)",
        (sha256, size, media_type, "inline" if body is not None else "bucket", body, at),
    )


def put_reference(seq: int, sha256: str) -> Write:
    return "INSERT OR IGNORE INTO wf_step_objects(step_seq, sha256) VALUES(?, ?)", (seq, sha256)


def put_status(status: str, at: str) -> Write:
    return "UPDATE wf_instance SET status = ?, updated_at = ?", (status, at)


def put_end(status: str, output: str | None, output_sha256: str | None, error: str | None, at: str) -> Write:
    return (
        "UPDATE wf_instance SET status = ?, output = ?, output_sha256 = ?, error = ?, updated_at = ?, finished_at = ?, resumes = 0",
        (status, output, output_sha256, error, at, at),
    )


def put_resumes(count: int) -> Write:
    return "UPDATE wf_instance SET resumes = ?", (count,)


# -- files -----------------------------------------------------------------------------------------------------------------------


def template() -> bytes:
    """Return the bytes of an instance file without its row."""
    connection = sqlite3.connect(":memory:")
    try:
        connection.executescript(INSTANCE)
        return connection.serialize()
    finally:
        connection.close()


def create(path: Path, empty: bytes, instance: Instance) -> bool:
    """Make an instance file with its row in it, complete and on the disk, or nothing. Returns False when one is there already.

    The row is written in memory and the file appears by a link, so that it costs one fsync, and no file without a row ever exists. Its name is
    durable with the first commit: SQLite syncs the folder when it makes the WAL.
    """
    memory = sqlite3.connect(":memory:", isolation_level=None)
    try:
        memory.deserialize(empty)
        _insert(memory, instance)
        data = bytearray(memory.serialize())
    finally:
        memory.close()
    data[18:20] = b"\x02\x02"  # read and write version: WAL mode
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)
    return True


def publish(temporary: Path, path: Path) -> bool:
    """Give a complete file its name, unless that is taken; returns whether it was not."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return True


def _insert(connection: sqlite3.Connection, instance: Instance) -> None:
    connection.execute(
        f"INSERT INTO wf_instance(one, {', '.join(_INSTANCE)}) VALUES(1, {', '.join('?' * len(_INSTANCE))})",
        tuple(getattr(instance, name) for name in _INSTANCE),
    )


def _open(path: Path, *, readonly: bool) -> sqlite3.Connection:
    try:
        uri = f"{path.absolute().as_uri()}?mode={'ro' if readonly else 'rw'}"
        connection = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False, timeout=5.0)
    except sqlite3.Error as error:
        raise Unreadable(str(path), str(error)) from error
    try:
        found = connection.execute("PRAGMA application_id").fetchone()[0]
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if found != APPLICATION_ID:
            raise Unreadable(str(path), "it is not an instance file")
        if version > VERSION:
            raise Unreadable(str(path), f"it is of version {version}, this code knows {VERSION}: use a newer release")
        if version < VERSION and not readonly:
            _migrate(connection, version)
    except sqlite3.Error as error:
        connection.close()
        raise Unreadable(str(path), str(error)) from error
    except Unreadable:
        connection.close()
        raise
    return connection


def _migrate(connection: sqlite3.Connection, version: int) -> None:
    """Bring a file of an older version up to date, in one transaction. What only reads takes it as it is."""
    steps = "".join(MIGRATIONS[number] for number in range(version + 1, VERSION + 1))
    connection.executescript(f"BEGIN IMMEDIATE; {steps} PRAGMA user_version = {VERSION}; COMMIT")


class Journal:
    """An open instance file."""

    def __init__(self, path: Path, *, synchronous: str = "FULL", faults: Faults | None = None) -> None:
        """Open an existing file. Raises `Unreadable`."""
        self.path = path
        self._faults = faults
        self._db = _open(path, readonly=False)
        self._db.execute(f"PRAGMA synchronous = {synchronous}")

    def load(self) -> Loaded:
        """Read everything. Raises `Unreadable`: the file is damaged."""
        return _load(self._db, self.path)

    def commit(self, writes: Sequence[Write]) -> None:
        """Run one transaction."""
        if len(writes) == 1 and self._faults is None:  # a statement is one by itself; two statements less
            self._db.execute(*writes[0])
            return
        with self._transaction():
            for sql, values in writes:
                self._db.execute(sql, values)

    def transact(self, body: Callable[[sqlite3.Connection], Sequence[Write]]) -> None:
        """Run a user's body and what it returns in one transaction. The body has the connection to itself, within limits (see `_guard`)."""
        with self._transaction():
            self._db.set_authorizer(_guard)
            try:
                writes = body(self._db)
            finally:
                self._db.set_authorizer(None)
            for sql, values in writes:
                self._db.execute(sql, values)

    def interrupt(self) -> None:
        """End the statement that another thread runs."""
        self._db.interrupt()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            if self._faults is not None:
                self._faults("before")
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise
        if self._faults is not None:
            self._faults("after")

    def copy_to(self, path: Path) -> None:
        """Write a consistent copy that is a plain file of its own."""
        self._db.execute("VACUUM INTO ?", (str(path),))

    def close(self) -> None:
        """Close; SQLite checkpoints, so that one file remains."""
        self._db.close()


_DENIED = {
    sqlite3.SQLITE_TRANSACTION,
    sqlite3.SQLITE_SAVEPOINT,
    sqlite3.SQLITE_ATTACH,
    sqlite3.SQLITE_DETACH,
}
_BY_FIRST = {  # the table, index, trigger or view that is written or made
    sqlite3.SQLITE_INSERT,
    sqlite3.SQLITE_UPDATE,
    sqlite3.SQLITE_DELETE,
    sqlite3.SQLITE_CREATE_TABLE,
    sqlite3.SQLITE_CREATE_VIEW,
    sqlite3.SQLITE_DROP_TABLE,
    sqlite3.SQLITE_DROP_VIEW,
}
_BY_SECOND = {  # the table that it belongs to
    sqlite3.SQLITE_CREATE_INDEX,
    sqlite3.SQLITE_CREATE_TRIGGER,
    sqlite3.SQLITE_DROP_INDEX,
    sqlite3.SQLITE_DROP_TRIGGER,
    sqlite3.SQLITE_ALTER_TABLE,
}
_READING_PRAGMAS = {"table_info", "table_xinfo", "table_list", "index_list", "index_info", "foreign_key_list", "database_list"}


def _guard(action: int, first: str | None, second: str | None, *_: str | None) -> int:
    """Say what a transaction step may do: everything but ending the transaction, other files, settings, and our tables."""
    ours = (action in _BY_FIRST and _is_ours(first)) or (action in _BY_SECOND and _is_ours(second))
    setting = action == sqlite3.SQLITE_PRAGMA and (first or "").lower() not in _READING_PRAGMAS
    return sqlite3.SQLITE_DENY if ours or setting or action in _DENIED else sqlite3.SQLITE_OK


def _is_ours(name: str | None) -> bool:
    return (name or "").lower().startswith("wf_")


def copy(path: Path, target: Path) -> None:
    """Write a consistent copy of a file, which stays as it is. Raises `Unreadable`."""
    connection = _open(path, readonly=True)
    try:
        connection.execute("VACUUM INTO ?", (str(target),))
    except sqlite3.DatabaseError as error:
        raise Unreadable(str(path), str(error)) from error
    finally:
        connection.close()


def read(path: Path) -> Loaded:
    """Read a file without writing to it, also while its engine runs. Raises `Unreadable`."""
    connection = _open(path, readonly=True)
    try:
        return _load(connection, path)
    finally:
        connection.close()


def read_instance(path: Path) -> Instance:
    """Read a run's row, and not its steps. Raises `Unreadable`."""
    connection = _open(path, readonly=True)
    try:
        return _instance(connection, path)
    except sqlite3.DatabaseError as error:
        raise Unreadable(str(path), str(error)) from error
    finally:
        connection.close()


def read_object(path: Path, sha256: str) -> bytes | None:
    """Return an object's bytes; None when the file says that they are in the bucket. Raises `MissingObject`, `Unreadable`."""
    connection = _open(path, readonly=True)
    try:
        row = connection.execute("SELECT location, body FROM wf_objects WHERE sha256 = ?", (sha256,)).fetchone()
    except sqlite3.DatabaseError as error:
        raise Unreadable(str(path), str(error)) from error
    finally:
        connection.close()
    if row is None:
        raise MissingObject(sha256, f"no row in {path}")
    return row[1] if row[0] == "inline" else None


def rows(path: Path, view: str) -> tuple[list[str], list[tuple[Any, ...]]]:
    """Return the columns and the rows of one of our tables or views. Raises `Unreadable`."""
    if not view.startswith("wf_") or not view.isidentifier():
        raise ValueError(f"not a view of ours: {view!r}")
    connection = _open(path, readonly=True)
    try:
        cursor = connection.execute(f"SELECT * FROM {view}")
        return [column[0] for column in cursor.description], cursor.fetchall()
    except sqlite3.DatabaseError as error:
        raise Unreadable(str(path), str(error)) from error
    finally:
        connection.close()


def check(path: Path) -> list[str]:
    """Return what SQLite finds wrong with a file, and what is wrong with the rows; empty when all is well."""
    try:
        loaded = read(path)
        connection = _open(path, readonly=True)
    except Unreadable as error:
        return [error.reason]
    try:
        found = [text for (text,) in connection.execute("PRAGMA integrity_check(10)") if text != "ok"]
        found += [f"row of {row[0]} refers to nothing in {row[2]}" for row in connection.execute("PRAGMA foreign_key_check")]
    except sqlite3.DatabaseError as error:
        return [str(error)]
    finally:
        connection.close()
    numbers = [record.number for record in loaded.records if record.is_final]
    if len(set(numbers)) != len(numbers) or None in numbers:
        found.append("the order of finishing is not one")
    return found


def _load(db: sqlite3.Connection, path: Path) -> Loaded:
    try:
        db.execute("BEGIN")
        try:
            instance = _instance(db, path)
            records = [
                Record(**dict(zip(_STEP, row, strict=True))) for row in db.execute(f"SELECT {', '.join(_STEP)} FROM wf_steps ORDER BY seq")
            ]
            for record in records:
                record.repeat = bool(record.repeat)
            events = [
                Event(*row)
                for row in db.execute(
                    "SELECT id, type, payload, sender, sent_at FROM wf_inbox WHERE consumed_by IS NULL AND refused IS NULL ORDER BY sent_at, id"
                )
            ]
            seen = {id for (id,) in db.execute("SELECT id FROM wf_inbox UNION ALL SELECT id FROM wf_control")}
            state: dict[int, list[tuple[str, str | None]]] = {}
            for number, name, value in db.execute(
                "SELECT s.number, j.name, j.value FROM wf_state j JOIN wf_steps s ON s.seq = j.step_seq WHERE s.number IS NOT NULL"
            ):
                state.setdefault(number, []).append((name, value))
            asked = db.execute("SELECT kind FROM wf_control ORDER BY applied_at DESC, id DESC LIMIT 1")
            paused = [kind for (kind,) in asked] == ["pause"]
        finally:
            db.execute("ROLLBACK")
    except sqlite3.DatabaseError as error:
        raise Unreadable(str(path), str(error)) from error
    return Loaded(instance, records, events, seen, state, paused)


def _instance(db: sqlite3.Connection, path: Path) -> Instance:
    found = db.execute("SELECT * FROM wf_instance")  # a file of an older version has fewer columns
    names = [column[0] for column in found.description]
    instance = [Instance(**{name: value for name, value in zip(names, row, strict=True) if name in _INSTANCE}) for row in found]
    if len(instance) != 1:
        raise Unreadable(str(path), "it has no row in wf_instance")
    return instance[0]


# -- forks -----------------------------------------------------------------------------------------------------------------------


def cut(path: Path, instance: Instance, number: int) -> None:
    """Make a copied file that of a new run, which has finished what had a number up to `number`, and nothing else.

    What was consumed later is released, entries of `state` and attempts go with their steps. `instance` is the new row.
    """
    connection = _open(path, readonly=False)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("BEGIN IMMEDIATE")
        gone = "(SELECT seq FROM wf_steps WHERE number IS NULL OR number > ?)"
        connection.execute(f"UPDATE wf_inbox SET consumed_by = NULL, consumed_at = NULL WHERE consumed_by IN {gone}", (number,))
        for table in ("wf_attempts", "wf_state", "wf_step_objects"):
            connection.execute(f"DELETE FROM {table} WHERE step_seq IN {gone}", (number,))
        connection.execute("DELETE FROM wf_steps WHERE number IS NULL OR number > ?", (number,))
        connection.execute("DELETE FROM wf_control")
        connection.execute("DELETE FROM wf_instance")
        _insert(connection, instance)
        kept = "SELECT sha256 FROM wf_step_objects UNION SELECT output_sha256 FROM wf_steps WHERE output_sha256 IS NOT NULL"
        connection.execute(f"DELETE FROM wf_objects WHERE sha256 NOT IN ({kept})")
        connection.execute("COMMIT")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    finally:
        connection.close()


def stands_at(path: Path, number: int, count: int) -> int:
    """Say where a file of a run stands beside a place in its order of finishing: -1 before it has all `count` records up to `number`, 1 after a later
    transaction step, 0 right there. Raises `Unreadable`.
    """
    final = [(record.number or 0, record.kind) for record in read(path).records if record.is_final]
    if any(kind == "tx" and found > number for found, kind in final):
        return 1
    return -1 if sum(found <= number for found, _ in final) < count else 0


def add_events(path: Path, newer: Path) -> None:
    """Give a file the events that a newer one of the same run has, as not consumed. Raises `Unreadable`."""
    names = "id, type, payload, sender, sent_at"
    source, connection = _open(newer, readonly=True), _open(path, readonly=False)
    try:
        rows = source.execute(f"SELECT {names} FROM wf_inbox WHERE refused IS NULL").fetchall()
        connection.executemany(f"INSERT OR IGNORE INTO wf_inbox({names}) VALUES(?, ?, ?, ?, ?)", rows)
    finally:
        source.close()
        connection.close()


def set_owner(path: Path, owner: str) -> None:
    """Write into a file that nobody has open whose run it is. Raises `Unreadable`."""
    connection = _open(path, readonly=False)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("UPDATE wf_instance SET owner = ?", (owner,))
    finally:
        connection.close()


def reopen(path: Path, flow: str) -> None:
    """Make a copied file one whose run has not ended, so that other code can go over its records."""
    connection = _open(path, readonly=False)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute(
            "UPDATE wf_instance SET status = 'waiting', output = NULL, output_sha256 = NULL, error = NULL, finished_at = NULL, flow = ?",
            (flow,),
        )
    finally:
        connection.close()


def objects_of(path: Path) -> Iterable[str]:
    """Return which objects of a file are in the bucket."""
    connection = _open(path, readonly=True)
    try:
        return [sha256 for (sha256,) in connection.execute("SELECT sha256 FROM wf_objects WHERE location = 'bucket'")]
    finally:
        connection.close()
