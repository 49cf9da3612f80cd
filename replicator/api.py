"""`Replicator`, which runs the engine in threads of the application's own process.

One thread drives the engine (`loop.py`), one for each replica stores its files (`uploader.py`), so that a slow replica holds nobody up; what is due of
the history is done by a few threads for the whole process (`upkeep.py`). What they share is in `board.py`.
"""

from __future__ import annotations

import logging
import math
import os
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, Self

from replicator import livefile
from replicator.board import Board, Counts, State
from replicator.budget import MemoryBudget
from replicator.checkpoint import CheckpointPolicy
from replicator.drills import DrillResult, DrillThread
from replicator.engine import NotSynced
from replicator.errors import (
    ConfigError,
    DatabaseStateError,
    LeaseHeld,
    ReplicatorError,
    StorageError,
    StorageUnavailable,
    WaitTimeout,
)
from replicator.format.lock import writer_number
from replicator.format.ltx import TXID
from replicator.format.wal import WAL_HEADER_SIZE
from replicator.formats import Format, writing
from replicator.gate import gate
from replicator.images import Images
from replicator.keeper import HistoryCounts, Keeper
from replicator.lease import Lease, LeaseStatus, LeaseTerms
from replicator.levels import History
from replicator.loop import EngineThread
from replicator.losses import LossWindow
from replicator.outbox import OutFile
from replicator.parked import look
from replicator.parking import Sight, is_settled
from replicator.recent import RecentFiles
from replicator.replica import Replica
from replicator.restores import planned
from replicator.storage import open_client
from replicator.storage.base import ReplicaClient
from replicator.tail import WALPosition
from replicator.takeover import Tenant, seed_table
from replicator.upkeep import Keeping, upkeep
from replicator.uploader import start_thread, waiting_snapshot
from replicator.waiters import Waiter

__all__ = ["Disturbed", "ReplicaStatus", "Replicator", "Rest", "Status"]

log = logging.getLogger(__name__)

LOCAL_INTERVAL_S = 0.1
REMOTE_INTERVAL_S = 1.0
IMAGE_TIMEOUT_S = 60.0
LEASE_POLL_S = 1.0
IMAGE_TRIES = 50
REST_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class ReplicaStatus:
    """One replica: newest TXID stored, seconds since the oldest commit that it lacks was made, at most, and its last error.

    `retries`: tries to store something that failed and came again, without those that a store's own client makes within one of ours.
    `history`: what was done of compaction, snapshots and retention; `problems` are its own, and do not stop replication. `verified`: the last drill.
    `position`: in format v0.3, where what is stored ends (`<generation>/<index>:<offset>`); TXIDs only count within this process there.
    """

    url: str
    kind: str
    txid: TXID
    last_stored_at: datetime | None
    lag_s: float
    error: str | None
    files_sent: int
    bytes_sent: int
    problems: tuple[str, ...] = ()
    verified: DrillResult | None = None
    position: str = ""
    online: bool = False
    loss_window: LossWindow = LossWindow()  # noqa: RUF009  frozen
    retries: int = 0
    history: HistoryCounts = HistoryCounts()  # noqa: RUF009  frozen


@dataclass(frozen=True, slots=True)
class Status:
    """A database and its replicas.

    Attributes:
        txid: newest TXID that was read.
        wal_size_bytes: logical size of the WAL.
        max_lock_s: longest time that writers had to wait for a checkpoint of ours.
        position: as in `ReplicaStatus`.
        synced_at: all that was committed before is on every replica.
        pinned_s: age of the oldest frame in the WAL that no checkpoint of ours has finished.
        waiting: TXIDs that some replica lacks and that are kept for it, their bytes in memory, and on the disk.
        lease: who has it, as far as this process knows; None where there is none.
    """

    path: Path
    state: State
    txid: TXID
    wal_size_bytes: int
    checkpoints: int
    max_lock_s: float
    error: str | None
    replicas: tuple[ReplicaStatus, ...]
    position: str = ""
    synced_at: datetime | None = None
    waiting: tuple[int, int, int] = (0, 0, 0)
    counts: Counts = field(default_factory=Counts)
    pinned_s: float = 0.0
    lease: LeaseStatus | None = None


class Disturbed(DatabaseStateError):
    """A database that was being put to rest has changed."""


@dataclass(frozen=True, slots=True)
class Rest:
    """What was true when a database was put to rest (see `parking.Parked`).

    Attributes:
        before: its files before the last look at them, if they had been left alone for long enough.
        after: its files once everything was closed.
        remembered: what each replica holds, for `Replicator.recall`.
    """

    txid: TXID
    position: WALPosition
    page_size: int
    before: Sight | None
    after: Sight
    remembered: tuple[bytes | None, ...]
    history_due: float | None
    problems: tuple[str, ...]


class Replicator:
    """Replicate a live database to one or more replicas until closed. A context manager, to be used once.

    The application goes on using its own `sqlite3` connections, in this process and in others.

        with Replicator("app.db", "s3://bucket/app") as replicator:
            connection.execute("INSERT ..."); connection.commit()
            replicator.wait()        # now the row is in the bucket
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *replicas: str | ReplicaClient,
        meta_path: str | os.PathLike[str] | None = None,
        sync_interval_s: float | None = None,
        checkpoint_interval_s: float = 60.0,
        min_checkpoint_pages: int = 1000,
        busy_timeout_s: float = 1.0,
        poll_interval_s: float = 1.0,
        staging_limit_bytes: int = 1 << 30,
        force_snapshot: bool = False,
        history: History | Sequence[History] | None = History(),  # noqa: B008  frozen
        verify_interval_s: float | None = None,
        format: Format = "ltx",
        lease: bool | Lease | LeaseTerms = False,
        takeover: bool = False,
        lease_timeout_s: float | None = None,
        recent_limit_bytes: int = 16 << 20,
        memory: MemoryBudget | None = None,
        on_failure: Callable[[ReplicatorError], None] | None = None,
        on_handover: Callable[[str], None] | None = None,
        sync: Literal["interval", "commit"] = "interval",
        names: Sequence[str] = (),
    ) -> None:
        """Prepare; `start` begins.

        Args:
            path: of the database. It is switched to WAL mode. Symbolic links are followed.
            replicas: URLs, or clients.
            meta_path: folder for local state; `.<name>-litestream` beside the database when not given.
            sync_interval_s: least time between two uploads that nobody waits for; 0.1 for directories, 1 for S3 when not given.
            checkpoint_interval_s: age of WAL frames that makes a checkpoint due; 0 for never.
            min_checkpoint_pages: size of the WAL in pages that makes one due.
            busy_timeout_s: how long to wait for SQLite's locks when opening.
            poll_interval_s: how often to look for changes where there are no file events.
            staging_limit_bytes: bound for files that wait on the local disk while no replica can be reached.
            force_snapshot: begin a new history where a replica has lost its files, instead of an error.
            history: how much of the past is kept: for all replicas, or one for each in order; None keeps raw files only, for ever.
            verify_interval_s: time between two drills, in which each replica is restored and compared with the page table; none when not given.
            format: "ltx", that of Litestream 0.5, or "v0.3", that of 0.3: generations with snapshots and WAL segments.
            lease: one writer at a time. True, or its terms, for a lease of this database alone, in the first replica; or a `Lease` that is shared with
                other databases, and closed by its owner. Then the first replica decides who owns the database: the others only get what it has.
            takeover: wait for the lease, and go on from the other owner's state: what only this machine had is kept in a file, not merged.
            lease_timeout_s: how long `start` waits for it, with takeover; as long as it takes when not given.
            recent_limit_bytes: bound for files that were sent lately and are kept in memory, so that merging need not fetch them.
            memory: shared with other databases of the process, for files that are being made or wait; what it has no room for goes through the disk.
            on_failure: called once, by a thread of the replicator's, when replication has ended for good with an error.
            on_handover: called by another thread, with its name, when somebody asks for the lease (see `Lease.on_request`): stop writing, and `close`.
            sync: "interval", or "commit": commits are uploaded at once, and those made during an upload together with the next one.
            names: of the replicas, in order, for `wait(replicas=...)`; their kinds ("file", "s3") when not given.

        Raises:
            ConfigError: no replica, a malformed URL, not as many histories or names as replicas, drills or a lease in format v0.3, takeover
                without a lease, or an interval with `sync="commit"`.
        """
        if not replicas:
            raise ConfigError(f"must specify at least one replica URL for {path}")
        # SQLite follows links and puts the WAL beside the real file; so must everything here.
        self._path = Path(os.path.realpath(path))
        self._clients = [open_client(item) if isinstance(item, str) else item for item in replicas]
        if takeover and not lease:
            raise ConfigError(f"takeover goes with a lease: {path}")
        histories = [history] * len(replicas) if isinstance(history, History) or history is None else list(history)
        if len(histories) != len(replicas):
            raise ConfigError(f"{len(replicas)} replicas, but {len(histories)} histories for {path}")
        self._lease, self._owns_lease = _lease_of(lease, self._clients[0])
        self._forget_lease: list[Callable[[], None]] = []
        self._on_handover = on_handover
        self._takeover, self._lease_timeout_s = takeover, lease_timeout_s
        self._writing = writing(
            format,
            self._clients,
            writer=writer_number(0, secrets.randbits(40)),
            lease=self._lease,
            l0_retention_s=min((item.l0_retention_s for item in histories if item is not None and item.l0_retention_s), default=0.0),
        )
        self._replicas = self._writing.replicas
        if verify_interval_s is not None and format != "ltx":
            raise ConfigError(f"format {format} has no drills: verify_interval_s goes with ltx")
        if len({replica.url for replica in self._replicas}) < len(self._replicas) and all(isinstance(item, str) for item in replicas):
            raise ConfigError(f"a replica URL is given twice for {path}")
        self._names = list(names) or [client.kind for client in self._clients]
        if len(self._names) != len(replicas):
            raise ConfigError(f"{len(replicas)} replicas, but {len(self._names)} names for {path}")
        if sync not in ("interval", "commit"):
            raise ConfigError(f"sync must be interval or commit, not {sync!r}")
        if sync == "commit" and sync_interval_s is not None:
            raise ConfigError(f"sync_interval_s goes with sync='interval': {path}")
        remote = any(map(_is_remote, self._clients))
        interval = sync_interval_s if sync_interval_s is not None else (REMOTE_INTERVAL_S if remote else LOCAL_INTERVAL_S)
        if sync == "commit":
            interval = 0.0
        self._tenant = Tenant(self._lease, takeover=takeover, is_shared=not self._owns_lease) if self._lease is not None else None
        self._engine = self._writing.engine(
            self._path,
            self._replicas,
            meta_path=Path(meta_path) if meta_path is not None else self._path.with_name(f".{self._path.name}-litestream"),
            policy=CheckpointPolicy(min_checkpoint_pages, checkpoint_interval_s),
            busy_timeout_s=busy_timeout_s,
            staging_limit_bytes=staging_limit_bytes,
            force_snapshot=force_snapshot,
            tenant=self._tenant,
            memory=memory,
        )
        self._board = Board(self._path, self._replicas, staging_limit_bytes=staging_limit_bytes, on_failure=on_failure)
        self._loop = EngineThread(
            self._engine, self._board, self._path, interval_s=interval, poll_s=poll_interval_s, at_once=sync == "commit"
        )
        self._recent = RecentFiles(recent_limit_bytes)
        self._images = Images(self._make_image)
        self._histories = histories
        self._drills = (
            DrillThread(self._engine, self._replicas, self._board, interval_s=verify_interval_s) if verify_interval_s is not None else None
        )
        self._keepers: dict[Replica, Keeper] = {}
        self._keepings: dict[Replica, Keeping] = {}
        self._threads: list[threading.Thread | Keeping] = []
        self._closed = False
        self._pid = 0

    # -- life --------------------------------------------------------------------------------------------------------------------

    def start(self) -> Self:
        """Attach to the database and the replicas, and begin. With a lease: the database is claimed then.

        Raises:
            LeaseError: somebody else has the lease or has owned the replica since, or the store cannot do this.
            DatabaseStateError, ReplicaStateError, RestoreError, StorageError: it cannot begin. A store that is only unavailable is no
                error: it is tried again in the background, and `status` says so.
        """
        if self._threads or self._closed:
            raise RuntimeError("a Replicator can be started once; create another")
        board = self._board
        self._pid = os.getpid()
        board.state = "starting"
        try:
            self._open()
        except StorageUnavailable as error:
            board.report(error)
        except BaseException:
            board.state = "stopped"
            self._give_lease_back(is_stored=True)
            raise
        if self._lease is not None:
            self._forget_lease.append(self._lease.on_loss(board.fail))
            if self._on_handover is not None:
                self._forget_lease.append(self._lease.on_request(self._on_handover))
        try:
            self._start_threads()
        except BaseException:
            board.end()
            for thread in self._threads:
                thread.join(REST_TIMEOUT_S)
            self._threads, self._closed = [], True
            self._engine.close()
            self._give_lease_back(is_stored=True)
            board.state = "stopped"
            raise
        return self

    def _start_threads(self) -> None:
        name = self._path.name
        self._threads.append(start_thread(f"pyrepl {name}", self._loop.run))
        for replica, history in zip(self._replicas, self._histories, strict=True):
            uploader = self._writing.uploader(replica, self._engine, self._board, self._recent, self._images)
            self._threads.append(start_thread(f"pyrepl {name} {replica.client.kind}", uploader.run))
            if history is not None:
                self._threads.append(self._keep(replica, history))
        if self._drills is not None:
            self._threads.append(start_thread(f"pyrepl {name} drills", self._drills.run))

    def adopt(self, txid: int) -> None:
        """Take note, before `start`, that the database is exactly the first replica's state of a TXID: it was restored to it, or followed it, and
        nobody has written since. So it needs no restore when it takes over, and no download for a page table. Nothing to do without a lease.

        Raises:
            StorageError: the replica cannot be read.
        """
        if self._lease is not None and txid:
            seed_table(self._clients[0], self._path, self._engine.folder, TXID(txid))

    def assume_empty(self) -> None:
        """Take note, before `start`, that nobody has ever stored anything at the replicas: nothing is listed then. When that is wrong, the first create
        finds out, and `start` or `wait` raises what it would have raised.
        """
        for replica in self._writing.replicas:
            if isinstance(replica, Replica):
                replica.assume_empty()
        if self._tenant is not None:
            self._tenant.is_new = True

    def _open(self) -> None:
        end = None if self._lease_timeout_s is None else time.monotonic() + self._lease_timeout_s
        told = False
        while True:
            try:
                self._board.begin(self._engine.open(), self._engine.txid)
                return
            except LeaseHeld as error:
                if not self._takeover or (end is not None and time.monotonic() >= end):
                    raise
                if not told:
                    log.info("waiting for the lease db=%s url=%s owner=%s", self._path, error.url, error.owner)
                    told = True
                left = math.inf if end is None else max(0.0, end - time.monotonic())
                time.sleep(min(left, max(error.wait_s, 0.05), LEASE_POLL_S))

    def _keep(self, replica: Replica, history: History) -> Keeping:
        def make() -> Keeper:
            keeper = self._keepers[replica] = self._writing.keeper(
                replica,
                history,
                scratch=self._engine.scratch,
                recent=self._recent,
                take_snapshot=waiting_snapshot(self._images, replica, self._board),
                in_use=planned,
                stopping=lambda: self._board.ends,
            )
            return keeper

        keeping = self._keepings[replica] = Keeping(make, replica, history, self._board, upkeep(remote=_is_remote(replica.client)))
        keeping.start()
        return keeping

    def close(self, timeout_s: float = 30.0, *, retry_interval_s: float = 0.5) -> None:
        """Sync once more, wait until all is stored, and stop. Closing twice does nothing.

        Args:
            timeout_s: how long to wait. Stopping itself takes a second more at most, unless a request hangs.
            retry_interval_s: uploads that fail meanwhile are tried again so often, at least.

        Raises:
            WaitTimeout: something was not stored in time. It is staged or in the database; the next start stores it.
            ReplicatorError: replication had failed before.
        """
        if not self._threads:
            return
        if os.getpid() != self._pid:  # a forked child: the threads are the parent's, and so are the descriptors
            self._threads = []
            return
        board = self._board
        failure: ReplicatorError | None = None
        end = time.monotonic() + timeout_s
        with board.changed:
            board.retry_s = retry_interval_s
            board.changed.notify_all()
        try:
            if board.fatal is None:
                self.wait(timeout_s=timeout_s)
        except ReplicatorError as error:
            failure = error
        finally:
            board.end()
            self._engine.abandon_snapshots("replication stops")
            end = max(end, time.monotonic() + 1.0)
            for thread in self._threads:
                # A request that hangs ends when its client is closed below; nothing is lost with it.
                thread.join(max(0.0, end - time.monotonic()))
            self._threads = []
            self._closed = True
            self._engine.close()
            self._give_lease_back(is_stored=failure is None and board.fatal is None)
            for client in self._clients:
                client.close()
            board.state = "failed" if board.fatal else "stopped"
        if failure is not None or board.fatal is not None:
            raise failure or board.fatal  # type: ignore[misc]

    def _give_lease_back(self, *, is_stored: bool) -> None:
        """Where something was not stored the lease runs out by itself, so that the next start here may still be the first."""
        for forget in self._forget_lease:
            forget()
        if self._lease is not None and self._owns_lease:
            self._lease.close(release=is_stored)

    def rest(self, *, quiet_s: float) -> Rest | None:
        """Close, if nothing has happened for a while and nothing is left to do; None when that is not so, and all goes on.

        Only for a process that has no connections to the database but those of replicators: its descriptor is closed, too.

        Raises:
            Disturbed: something happened at this moment. Everything is closed, and nothing is lost; begin again.
        """
        if not self.is_at_rest(quiet_s):
            return None
        board, engine = self._board, self._engine
        before, looked_ns = look(self._path), time.time_ns()
        if not is_settled(before, looked_ns) and engine.wal_size() < WAL_HEADER_SIZE:
            return None  # neither the WAL nor the times could prove later that nothing has changed
        with board.changed:
            board.stop = True
            board.changed.notify_all()
        end = time.monotonic() + REST_TIMEOUT_S
        disturbed = ""
        try:
            for thread in self._threads:
                thread.join(max(0.0, end - time.monotonic()))
            if any(thread.is_alive() for thread in self._threads):
                raise Disturbed("its threads do not end")
            with gate():
                if board.fatal is not None or engine.advance() is not None or not engine.at_end:
                    raise Disturbed("it was written to")
                if engine.pinned_s:
                    engine.checkpoint()
            dues = [due for keeper in self._keepers.values() if (due := keeper.due()) is not None]
            position, page_size, identity = engine.place_of_rest()
        except (ReplicatorError, OSError, sqlite3.Error) as error:
            disturbed = str(error)
        finally:
            self._threads, self._closed = [], True
            engine.close()
            self._give_lease_back(is_stored=True)
            for client in self._clients:
                client.close()
            board.state = "stopped"
        if disturbed:
            raise Disturbed(disturbed)
        livefile.close_unused(identity)
        return Rest(
            txid=engine.txid,
            position=position,
            page_size=page_size,
            before=before if is_settled(before, looked_ns) else None,
            after=look(self._path),
            remembered=tuple(replica.remember() for replica in self._replicas),
            history_due=min(dues, default=None),
            problems=tuple(f"{item.url}: {text}" for item, keeper in self._keepers.items() for text in keeper.problems.values()),
        )

    def is_at_rest(self, quiet_s: float) -> bool:
        """Say whether `rest` would close it now."""
        board, now = self._board, time.time()
        with board.changed:
            if not self._threads or self._drills is not None or board.state != "replicating" or board.ends or board.error or board.is_asked:
                return False
            if time.monotonic() - self._loop.news_at < quiet_s or not board.given_out or board.waiting()[0]:
                return False
            for replica, history in zip(self._replicas, self._histories, strict=True):
                if not replica.online or replica.error or replica.needs_image or replica.txid != board.given_out:
                    return False
                keeping = self._keepings.get(replica)
                if history is not None and (keeping is None or (keeping.rests_until or 0.0) < now + quiet_s):
                    return False
            return True

    def idle_s(self) -> float:
        """Return how long nothing has happened to the database."""
        return time.monotonic() - self._loop.news_at

    def size_bytes(self) -> int:
        """Return the size of the database at the newest TXID."""
        return self._engine.database_bytes()

    def recall(self, remembered: Sequence[bytes | None]) -> None:
        """Begin, at `start`, with what `rest` returned, instead of listing the replicas. With a lease they are listed: it may have been another's."""
        if self._lease is not None:
            return
        for replica, known in zip(self._replicas, remembered, strict=True):
            if known is not None:
                replica.recall(known)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except ReplicatorError as error:
            if kind is None:
                raise
            log.error("close failed db=%s error=%r", self._path, str(error))  # what is being raised already counts more

    # -- asking ------------------------------------------------------------------------------------------------------------------

    def sync(self) -> TXID:
        """Upload now what is committed, and return when every replica has it. The same as `wait()` without a limit."""
        return self.wait()

    def wait(
        self, txid: int | None = None, *, replicas: Literal["all", "any"] | Collection[str] = "all", timeout_s: float | None = None
    ) -> TXID:
        """Return when everything that was committed before the call is stored.

        Args:
            txid: wait for this TXID instead.
            replicas: "all", "any", or which of them must have it: their URLs, or names as in the configuration ("s3" for the only one in S3).
            timeout_s: give up after so many seconds.

        Returns:
            The TXID that is stored; 0 for a database that is still empty.

        Raises:
            WaitTimeout: not stored in time; it may be stored later.
            ReplicatorError: replication has failed, for the reason that it names.
        """
        waiter = self._waiter(txid, replicas)
        try:
            return waiter.future.result(timeout_s)
        except TimeoutError:
            if waiter.future.done():  # at this very moment
                return waiter.future.result()
            raise WaitTimeout(self._board.missing(waiter)) from None
        finally:
            self._board.forget(waiter)

    async def wait_async(
        self, txid: int | None = None, *, replicas: Literal["all", "any"] | Collection[str] = "all", timeout_s: float | None = None
    ) -> TXID:
        """Do what `wait` does without blocking the event loop: no thread waits meanwhile, however many tasks do.

        A task that is cancelled stops waiting; what it waited for is stored all the same.
        """
        import asyncio

        waiter = self._waiter(txid, replicas)
        try:
            async with asyncio.timeout(timeout_s) as limit:
                return await asyncio.wrap_future(waiter.future)
        except TimeoutError:
            if not limit.expired():
                raise
            raise WaitTimeout(self._board.missing(waiter)) from None
        finally:
            self._board.forget(waiter)

    def _waiter(self, txid: int | None, replicas: Literal["all", "any"] | Collection[str]) -> Waiter:
        self._check_process()
        asked = self._replicas if replicas in ("all", "any") else self._named({replicas} if isinstance(replicas, str) else replicas)
        return self._board.wait_for(asked, any_of_them=replicas == "any", txid=None if txid is None else TXID(txid))

    def _named(self, wanted: Collection[str]) -> list[Replica]:
        """Return the replicas with these URLs, or names. Raises `ConfigError` when there is none, or more than one, of a name."""
        found: dict[Replica, None] = {}
        for name in wanted:
            fitting = [replica for replica in self._replicas if replica.url == name]
            fitting = fitting or [item for item, given in zip(self._replicas, self._names, strict=True) if given == name]
            if len(fitting) != 1:
                there = ", ".join(f"{given} ({item.url})" for item, given in zip(self._replicas, self._names, strict=True))
                raise ConfigError(f"{'several replicas are named' if fitting else 'no such replica:'} {name!r}; there are {there}")
            found[fitting[0]] = None
        if not found:
            raise ConfigError("wait for no replica at all", hint="name one, or give replicas='all'")
        return list(found)

    def capture(self, *, timeout_s: float | None = None) -> TXID:
        """Read everything that was committed before the call; on return it is on one replica, or staged on the local disk.

        Returns the newest TXID. Raises what `wait` raises.
        """
        self._check_process()
        end = None if timeout_s is None else time.monotonic() + timeout_s
        return self._board.ask(end, lambda: self._board.error or "the engine is busy")

    def enforce_history(self, *, timeout_s: float | None = None) -> None:
        """Return when all that is due of compaction, full images and retention is done, on every replica.

        Raises:
            WaitTimeout: it takes longer.
            StorageError: something could not be done; it names the first.
        """
        self._check_process()
        end = None if timeout_s is None else time.monotonic() + timeout_s
        wanted = [replica for replica, history in zip(self._replicas, self._histories, strict=True) if history is not None]

        def is_done() -> bool:
            return all((thread := self._keepings.get(replica)) is not None and thread.is_up_to_date for replica in wanted)

        with self._board.changed:
            self._board.history_is_asked = True
            self._board.changed.notify_all()
        self._board.until(is_done, end, lambda: "the history is still being worked on")
        for replica in wanted:
            for task, problem in list(self._keepers[replica].problems.items()):
                raise StorageError(f"history is not kept: {replica.url}: {task}: {problem}")

    def snapshot(self, *, timeout_s: float | None = None) -> TXID:
        """Store a full image (level 9) of the newest state on every replica while replication goes on; returns its TXID.

        Raises:
            DatabaseStateError: the database is empty, or changed by other means than its WAL meanwhile; try again.
            StorageError: a replica could not take it.
        """
        at_least = self.wait(timeout_s=timeout_s)
        if not at_least:
            raise DatabaseStateError(f"no snapshot of an empty database: {self._path}", hint="create a table first")
        with self._images.take(at_least) as image:
            self.wait(image.max_txid, timeout_s=timeout_s)  # not before the raw files: another writer's would be hidden
            for replica in self._replicas:
                replica.add(image)
            return image.max_txid

    def _make_image(self) -> OutFile:
        # First without asking, then without waiting for the answer: the engine may be waiting for the very replica that waits for this image.
        for left in reversed(range(IMAGE_TRIES)):
            try:
                return self._engine.snapshot()
            except NotSynced:
                if not left:
                    raise
            self._board.ask(
                time.monotonic() + IMAGE_TIMEOUT_S,
                lambda: self._board.error or "the engine is busy",
                enough=lambda: self._engine.can_snapshot,
            )
        raise AssertionError("unreachable")

    def status(self) -> Status:
        """Return what is going on, without waiting for anything."""
        board, engine = self._board, self._engine
        with board.changed:
            replicas = tuple(self._replica_status(replica) for replica in self._replicas)
            state = board.state
            if state == "replicating" and (board.error or any(map(_has_problem, replicas))):
                state = "degraded"
            return Status(
                self._path,
                state,
                engine.txid,
                engine.wal_size(),
                engine.checkpoints,
                engine.max_locked_s,
                board.error,
                replicas,
                engine.place,
                board.synced_at,
                board.waiting(),
                replace(board.counts),
                engine.pinned_s,
                self._lease.status() if self._lease is not None else None,
            )

    def reached(self) -> tuple[TXID, TXID]:
        """Return the newest TXID that was read, and the newest that every replica has: two of the things in `status`, at next to no cost."""
        return self._engine.txid, min((replica.txid for replica in self._replicas), default=TXID(0))

    def raw_files(self) -> dict[str, int]:
        """Count the first replica's raw files, as far as this process knows: "eligible" for deletion, "not_compacted", "too_recent"."""
        history, found = self._histories[0], {"eligible": 0, "not_compacted": 0, "too_recent": 0}
        files, now = self._replicas[0].listing(), datetime.now(UTC)
        merged = max((info.max_txid for info in files.get(1, ())), default=0)
        keep_s = history.l0_retention_s if history is not None else 0.0
        for info in files.get(0, ()):
            young = not keep_s or (now - info.created_at).total_seconds() < keep_s
            found["not_compacted" if info.max_txid > merged else "too_recent" if young else "eligible"] += 1
        return found

    def _replica_status(self, replica: Replica) -> ReplicaStatus:
        keeper = self._keepers.get(replica)
        return ReplicaStatus(
            replica.url,
            replica.client.kind,
            replica.txid,
            replica.last_stored_at,
            self._board.lag_s(replica),
            replica.error,
            replica.files_sent,
            replica.bytes_sent,
            tuple(f"{task}: {problem}" for task, problem in list(keeper.problems.items())) if keeper else (),
            self._drills.results.get(replica) if self._drills else None,
            replica.position,
            replica.online,
            self._board.loss_window(replica),
            replica.retries,
            keeper.counts if keeper is not None else HistoryCounts(),
        )

    def _check_process(self) -> None:
        if not self._threads:
            raise DatabaseStateError(f"replication of {self._path} is not running", hint="call start(), or use it as a context manager")
        if os.getpid() != self._pid:
            raise DatabaseStateError(
                "this process was forked from the one that replicates", hint="create the Replicator after fork(), in one process"
            )


def _lease_of(lease: bool | Lease | LeaseTerms, home: ReplicaClient) -> tuple[Lease | None, bool]:
    """Return the lease, and whether it is the replicator's own."""
    if isinstance(lease, Lease):
        return lease, False
    if not lease:
        return None, False
    terms = lease if isinstance(lease, LeaseTerms) else LeaseTerms()
    return Lease(home, owner=terms.owner or None, ttl_s=terms.ttl_s), True


def _is_remote(client: ReplicaClient) -> bool:
    return client.kind not in ("file", "memory")


def _has_problem(item: ReplicaStatus) -> bool:
    return bool(item.error or item.problems or (item.verified and item.verified.error))
