"""Find a plan of LTX files and carry it out. (`replicator.restore` is the function; `publish` gives the file its name.)"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TypeVar

from replicator.atomic import begin_flush
from replicator.chain import Progress, list_files, read_chain
from replicator.errors import (
    NoBackups,
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
from replicator.publish import IntegrityCheck, restore_into
from replicator.restores import Announcement
from replicator.storage.base import ReplicaClient

__all__ = ["RestoreResult", "find_plan", "first_answer", "plan_files", "restore_database", "write_plan"]

log = logging.getLogger(__name__)

T = TypeVar("T")
FLUSH_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class RestoreResult:
    """What was restored. Sizes in bytes, `commit` in pages, `timestamp` the time of the newest file, `url` the replica.

    From 0.3 data: `generation` and the last `index`, and no TXID (0). From LTX files both say nothing.
    """

    output: Path
    txid: TXID
    timestamp: datetime
    page_size: int
    commit: int
    files: int
    bytes_read: int
    duration_s: float
    url: str
    generation: str = ""
    index: int = 0


def find_plan(client: ReplicaClient, *, txid: TXID | None = None, timestamp: datetime | None = None) -> list[FileInfo]:
    """List the replica and plan.

    Raises:
        NoBackups: nothing is stored.
        TXIDNotAvailable, TimestampNotAvailable, NonContiguous: there is no way to the asked state.
    """
    return plan_files(client.url, list_files(client, accurate_times=timestamp is not None), txid=txid, timestamp=timestamp)


def plan_files(
    url: str,
    files: Mapping[int, Sequence[FileInfo]],
    *,
    txid: TXID | None = None,
    timestamp: datetime | None = None,
    check_bounds: bool = True,
) -> list[FileInfo]:
    """Plan with what was listed. `check_bounds`: refuse a time outside that of the files. Raises as `find_plan`."""
    if not any(files.values()):
        raise NoBackups(url)
    if timestamp is not None:
        times = [info.created_at for level in files.values() for info in level]
        if check_bounds and not min(times) <= timestamp <= max(times):
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

    def fill(file: int, announcement: Announcement) -> RestoreResult:
        plan = find_plan(client, txid=txid, timestamp=timestamp)
        announcement.plan(client.url, plan)
        result = write_plan(client, plan, file, output, started=started, parallelism=parallelism, progress=progress)
        if rollback_mode:
            to_rollback_mode(file)
        return result

    return restore_into(
        output,
        fill,
        force=force,
        integrity_check=integrity_check,
        published=None if published is None else lambda result: published(result.txid),
        restores_folder=restores_folder,
    )


def write_plan(
    client: ReplicaClient,
    plan: Sequence[FileInfo],
    file: int,
    output: Path,
    *,
    started: float,
    parallelism: int,
    progress: Callable[[Progress], None] | None,
) -> RestoreResult:
    """Write the state that a plan leads to into an empty file, given by its descriptor. `started`: on the monotonic clock."""
    header = _write(client, plan, file, parallelism, progress)
    newest, size = plan[-1], sum(info.size for info in plan)
    duration = time.monotonic() - started
    return RestoreResult(output, newest.max_txid, header.created_at, header.page_size, header.commit, len(plan), size, duration, client.url)


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


def _write(
    client: ReplicaClient, plan: Sequence[FileInfo], file: int, parallelism: int, progress: Callable[[Progress], None] | None
) -> Header:
    page_size = 0

    def write(first: int, pages: Sequence[bytes]) -> None:
        # Not joined first: for large runs that costs as much as writing them.
        at, size = (first - 1) * page_size, len(pages) * page_size
        done = os.pwritev(file, pages, at)
        if done < size:
            _write_all(file, memoryview(b"".join(pages))[done:], at + done)
        if at // FLUSH_BYTES != (at + size) // FLUSH_BYTES:
            begin_flush(file, at // FLUSH_BYTES * FLUSH_BYTES, FLUSH_BYTES)

    with client.open(plan[0], size=100) as stream:
        page_size = int.from_bytes(stream.read(100)[8:12], "big")
    # Each page up to the newest size is written exactly once, so that the file ends where the database does.
    return read_chain(client, plan, write, parallelism=parallelism, progress=progress)


def _write_all(file: int, rest: memoryview, at: int) -> None:
    while rest:
        done = os.pwrite(file, rest, at)
        rest, at = rest[done:], at + done
