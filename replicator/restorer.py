"""Carry out a restore plan into a new file, verify it, then publish it in one step. (`replicator.restore` is the function.)

The temporary file lies beside the output, so that publishing is a rename. A database is three names: a `-wal` left over beside the
output would be replayed into the restored file, so it is moved aside *before* the rename and deleted after it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal, TypeVar
from urllib.parse import quote

from replicator.chain import Progress, list_files, read_chain
from replicator.errors import (
    IntegrityCheckFailed,
    NoBackups,
    NonContiguous,
    ObjectNotFound,
    OutputExists,
    ReplicatorError,
    RestoreError,
    StorageError,
    TimestampNotAvailable,
    TXIDNotAvailable,
)
from replicator.format.ltx import SNAPSHOT_LEVEL, TXID, FileInfo, Header
from replicator.inplace import to_rollback_mode
from replicator.plan import plan_restore
from replicator.restores import Announcement, announce
from replicator.storage.base import ReplicaClient

__all__ = ["IntegrityCheck", "RestoreResult", "find_plan", "first_answer", "newest_first", "restore_database", "temporary_paths"]

log = logging.getLogger(__name__)

T = TypeVar("T")

IntegrityCheck = Literal["none", "quick", "full"]
SIDE_FILES = ("-wal", "-shm", "-journal")
REPLANS = 2


@dataclass(frozen=True, slots=True)
class RestoreResult:
    """What was restored. Sizes in bytes, `commit` in pages, `timestamp` the time of the newest file, `url` the replica."""

    output: Path
    txid: TXID
    timestamp: datetime
    page_size: int
    commit: int
    files: int
    bytes_read: int
    duration_s: float
    url: str


def find_plan(client: ReplicaClient, *, txid: TXID | None = None, timestamp: datetime | None = None) -> list[FileInfo]:
    """List the replica and plan.

    Raises:
        NoBackups: nothing is stored.
        TXIDNotAvailable, TimestampNotAvailable, NonContiguous: there is no way to the asked state.
    """
    files = list_files(client, accurate_times=timestamp is not None)
    if not any(files.values()):
        raise NoBackups(client.url)
    if timestamp is not None:
        times = [info.created_at for level in files.values() for info in level]
        if not min(times) <= timestamp <= max(times):
            raise TimestampNotAvailable(timestamp, oldest=min(times), newest=max(times))
        try:
            return plan_restore(files, timestamp=timestamp)
        except TXIDNotAvailable:
            # In the range of the files, as the peer's bounds are, but no chain begins before it.
            begins = [info.created_at for level in files.values() for info in level if info.level == SNAPSHOT_LEVEL or info.min_txid == 1]
            newest = max(times) if begins else None
            raise TimestampNotAvailable(timestamp, oldest=min(begins, default=None), newest=newest) from None
    return plan_restore(files, txid=txid)


def restore_database(
    client: ReplicaClient,
    output: Path,
    *,
    txid: TXID | None = None,
    timestamp: datetime | None = None,
    force: bool = False,
    integrity_check: IntegrityCheck = "none",
    parallelism: int = 8,
    progress: Callable[[Progress], None] | None = None,
    rollback_mode: bool = False,
    published: Callable[[TXID], None] | None = None,
    restores_folder: Path | None = None,
) -> RestoreResult:
    """Restore a database into `output`. Either all of it stands there afterwards, or nothing has changed.

    Args:
        force: replace what stands at the output; its mode and owner are kept (0600 otherwise).
        integrity_check: let SQLite check the file before it is published.
        parallelism: files that are read at once.
        rollback_mode: let page 1 say rollback journal instead of WAL: for a copy that is changed in place while others read it.
        published: called when the output has its name, while it still has its temporary name too (see `temporary_paths`).
        restores_folder: where running restores are noted for retention; the user's own when None.

    Raises:
        OutputExists: a non-empty file, or a left-over `-wal` or `-journal`, stands there.
        RestoreError, StorageError: see there.
    """
    started = time.monotonic()
    _refuse_existing(output, force)
    output.parent.mkdir(parents=True, exist_ok=True)
    _sweep(output)
    with announce(restores_folder) as announcement:
        for attempt in range(REPLANS + 1):
            try:
                return _restore(
                    client, output, started, announcement, txid=txid, timestamp=timestamp, force=force, integrity_check=integrity_check,
                    parallelism=parallelism, progress=progress, rollback_mode=rollback_mode, published=published,
                )  # fmt: skip
            except (ObjectNotFound, NonContiguous):
                if attempt == REPLANS:
                    raise
                # Files are merged and deleted meanwhile: there is another way to the same state.
    raise AssertionError("unreachable")


def newest_first(
    clients: Sequence[ReplicaClient], *, timestamp: datetime | None = None, all_must_answer: bool = False
) -> list[ReplicaClient]:
    """Order the replicas of one database by how far they lead: one may lack what another one acknowledged.

    Args:
        timestamp: by how close they come to it; else by their newest TXID.
        all_must_answer: one that cannot be asked is an error, because it may be ahead; else it comes last.

    Raises:
        StorageError: see `all_must_answer`.
    """
    if len(clients) < 2:
        return list(clients)
    reach: dict[int, float] = {}
    for number, client in enumerate(clients):
        try:
            last = find_plan(client, timestamp=timestamp)[-1]
            reach[number] = last.created_at.timestamp() if timestamp is not None else last.max_txid
        except RestoreError as error:
            log.warning("replica passed over, the next one is tried replica=%s error=%s", client.url, json.dumps(str(error)))
            reach[number] = -1
        except StorageError as error:
            if all_must_answer:
                raise
            log.warning(
                "replica passed over, although it may be ahead of the others replica=%s error=%s", client.url, json.dumps(str(error))
            )
            reach[number] = -2
    return [clients[number] for number in sorted(reach, key=lambda number: -reach[number])]


def first_answer(clients: Sequence[ReplicaClient], ask: Callable[[ReplicaClient], T]) -> T:
    """Ask the replicas in turn; one that is unreachable, empty, damaged, or lacks the state is logged, and the next one is asked.

    Raises:
        RestoreError, StorageError: the first error that is not `NoBackups`: a replica that cannot be asked may have what others have not.
        NoBackups: nothing is stored anywhere.
    """
    failure: ReplicatorError | None = None
    for number, client in enumerate(clients, start=1):
        try:
            return ask(client)
        except OutputExists:
            raise
        except (RestoreError, StorageError) as error:
            if failure is None or (isinstance(failure, NoBackups) and not isinstance(error, NoBackups)):
                failure = error
            if number < len(clients):
                log.warning("replica passed over, the next one is tried replica=%s error=%s", client.url, json.dumps(str(error)))
    if failure is None:
        raise ValueError("no replicas")
    raise failure


@contextlib.contextmanager
def _temporary_file(output: Path) -> Iterator[tuple[Path, int]]:
    """Yield path and descriptor of the file to restore into. It loses this name at the end."""
    path, file = _create_temporary(output)
    try:
        yield path, file
    finally:
        try:
            for suffix in ("", *SIDE_FILES):
                path.with_name(path.name + suffix).unlink(missing_ok=True)
        finally:
            os.close(file)


def _create_temporary(output: Path) -> tuple[Path, int]:
    """Create the file to restore into, with a lock that tells `_sweep` that this restore lives."""
    while True:
        path = output.with_name(f".{output.name}.{secrets.token_hex(6)}.restore")
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)  # a sweeper has it in its hands and will delete it
            continue
        except OSError:
            pass  # no locks on this file system: sweepers cannot lock either, and leave it alone
        if os.fstat(file).st_nlink:
            return path, file
        os.close(file)


def _sweep(output: Path) -> None:
    """Delete what killed restores into `output` left. Live ones hold a lock on theirs."""
    for path in temporary_paths(output):
        with contextlib.suppress(OSError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for suffix in ("", *SIDE_FILES):
                path.with_name(path.name + suffix).unlink(missing_ok=True)


def temporary_paths(output: Path) -> list[Path]:
    """Return the temporary files that restores into `output` have, or left behind when they were killed."""
    start = f".{output.name}."
    return [path for path in output.parent.iterdir() if path.name.startswith(start) and path.name.endswith(".restore")]


def _restore(
    client: ReplicaClient,
    output: Path,
    started: float,
    announcement: Announcement,
    *,
    txid: TXID | None,
    timestamp: datetime | None,
    force: bool,
    integrity_check: IntegrityCheck,
    parallelism: int,
    progress: Callable[[Progress], None] | None,
    rollback_mode: bool,
    published: Callable[[TXID], None] | None,
) -> RestoreResult:
    plan = find_plan(client, txid=txid, timestamp=timestamp)
    announcement.plan(client.url, plan)
    newest = plan[-1]
    with _temporary_file(output) as (temporary, file):
        header = _write(client, plan, file, parallelism, progress)
        if rollback_mode:
            to_rollback_mode(file)
        os.fsync(file)
        if integrity_check != "none":
            _check(temporary, integrity_check)
        _publish(temporary, output, force)
        if published is not None:
            published(newest.max_txid)
    size = sum(info.size for info in plan)
    duration = time.monotonic() - started
    return RestoreResult(output, newest.max_txid, header.created_at, header.page_size, header.commit, len(plan), size, duration, client.url)


def _write(
    client: ReplicaClient, plan: Sequence[FileInfo], file: int, parallelism: int, progress: Callable[[Progress], None] | None
) -> Header:
    page_size = 0

    def write(first: int, pages: bytes) -> None:
        view, at = memoryview(pages), (first - 1) * page_size
        while view:
            done = os.pwrite(file, view, at)
            view, at = view[done:], at + done

    with client.open(plan[0], size=100) as stream:
        page_size = int.from_bytes(stream.read(100)[8:12], "big")
    header = read_chain(client, plan, write, parallelism=parallelism, progress=progress)
    os.ftruncate(file, header.commit * header.page_size)
    return header


def _refuse_existing(output: Path, force: bool) -> None:
    if output.is_dir():
        raise OutputExists(output)
    if force:
        return
    for suffix in ("", "-wal", "-journal"):
        path = output.with_name(output.name + suffix)
        with contextlib.suppress(FileNotFoundError):
            if path.lstat().st_size:
                raise OutputExists(path)


def _check(path: Path, kind: IntegrityCheck) -> None:
    """Let SQLite check a file that is not trusted."""
    connection = sqlite3.connect(f"file:{quote(str(path.absolute()))}?mode=rw", uri=True, isolation_level=None)
    try:
        connection.execute("PRAGMA trusted_schema=OFF")
        connection.execute("PRAGMA cell_size_check=ON")
        connection.execute("PRAGMA mmap_size=0")
        pragma = "quick_check" if kind == "quick" else "integrity_check"
        message = str(connection.execute(f"PRAGMA {pragma}(1)").fetchone()[0])
    except sqlite3.DatabaseError as error:
        message = str(error)
    finally:
        connection.close()
    if message != "ok":
        raise IntegrityCheckFailed(path, message)


def _publish(temporary: Path, output: Path, force: bool) -> None:
    aside: list[Path] = []
    try:
        found = output.stat()
    except FileNotFoundError:
        found = None
    if found is not None:
        os.chmod(temporary, found.st_mode & 0o7777)
        if (found.st_uid, found.st_gid) != (os.geteuid(), os.getegid()):
            with contextlib.suppress(PermissionError):
                os.chown(temporary, found.st_uid, found.st_gid)
    for suffix in SIDE_FILES:
        side = output.with_name(output.name + suffix)
        moved = temporary.with_name(temporary.name + suffix)
        with contextlib.suppress(FileNotFoundError):
            if not force and suffix != "-shm" and side.lstat().st_size:
                raise OutputExists(side)
            side.rename(moved)
            aside.append(moved)
    if force or (found is not None and found.st_size == 0):
        os.replace(temporary, output)
    else:
        try:
            os.link(temporary, output)
        except FileExistsError:
            raise OutputExists(output) from None
    folder = os.open(output.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    for moved in aside:
        moved.unlink(missing_ok=True)
