"""Hot standby: follow a replica into a copy, and become its owner when the lease is free.

| what stands at the path | then |
|---|---|
| nothing, or a copy that was followed before | follow, and ask for the lease each `poll_s` |
| a database of our own, and the lease is free | that is the owner's start: see `takeover.py` |
| a database of our own, and another owner went on without us | keep what only it has in a file, then follow over it |

**A hand-over on request.** Nobody knows that a standby is there, so it is the standby that asks: where `ask` is set, and the copy is near the newest state, it
marks the lease as wanted, and looks at it and for files more often until it has it. The owner finds the mark when it renews the next time (each third of its TTL), ends
in good order, and releases. One that does not is left alone after a while: the mark is taken back.

When the lease is ours, the rest of the replica is applied to the copy, which then is a database like any other: its files that say how far it has followed go,
a page table is made of it, and the caller starts a `Replicator` with the lease and `takeover`. Its claim is what makes it the owner.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from pathlib import Path

from replicator.atomic import sync_directory
from replicator.db import Database
from replicator.errors import (
    LeaseError,
    LeaseHeld,
    NoBackups,
    NonContiguous,
    ObjectNotFound,
    ReplicaEmptied,
    ReplicatorError,
    StorageError,
    StorageUnavailable,
)
from replicator.follow import Follower, follow, lineage_path, read_txid, txid_path
from replicator.format.ltx import TXID, FileInfo, Header
from replicator.inplace import InPlace
from replicator.lease import Lease
from replicator.storage.base import ReplicaClient
from replicator.takeover import Tenant, newest_raw, salvage, seed_table

__all__ = ["wait_until_owner"]

JOIN_S = 30.0
GAPS = 10
CATCH_UP_RETRY_S = 0.2
HURRY_S = 0.05
HAND_OVER_S = 30.0
NEAR_FILES = 100

log = logging.getLogger(__name__)


def wait_until_owner(
    client: ReplicaClient,
    path: Path,
    folder: Path,
    lease: Lease,
    *,
    stop: threading.Event,
    poll_s: float = 0.25,
    interval_s: float = 1.0,
    ask: threading.Event | None = None,
) -> bool:
    """Follow a replica until the lease is ours, and make the copy ready for its owner; False when it was stopped before.

    Args:
        path: of the copy, without symbolic links. This process must not open it through `sqlite3` before this returns.
        folder: of local state, which the replicator will use: `<meta path>/pyrepl`.
        lease: not acquired yet. It is ours, and renewed, when True is returned.
        poll_s: how often to look at the lease: a hand-over takes about so long.
        interval_s: how often to look for new files.
        ask: ask the owner to hand over, once this is set and the copy is near the newest state; it is cleared then.

    Raises:
        LeaseError: the lease cannot be understood, or its store ignores conditions.
        ReplicatorError, OSError: the replica cannot be followed, see `follow`.
    """
    _finish_leaving(path)
    if _is_database(path) and read_txid(path) is None and not _leave(client, path, folder, lease, stop, poll_s):
        return not stop.is_set()
    while not stop.is_set():
        following = _Following(client, path, interval_s)
        try:
            if not _Candidate(client, path, lease, following, ask).acquire(stop, poll_s):
                return False
        finally:
            following.end()
        newest = _catch_up(client, path, stop)
        txid = read_txid(path)
        if stop.is_set() or txid is None:
            lease.release()
            return False
        _promote(client, path, folder, txid, newest)
        return True
    return False


def _is_database(path: Path) -> bool:
    try:
        return path.stat().st_size > 0
    except FileNotFoundError:
        return False


def _leave(client: ReplicaClient, path: Path, folder: Path, lease: Lease, stop: threading.Event, poll_s: float) -> bool:
    """Find out what to do with a database of our own: False when the lease is ours, or it was stopped; True when another owner went on, and
    what only we have is kept."""
    tenant = Tenant(lease, takeover=True)
    told = False
    while not stop.is_set():
        with contextlib.suppress(StorageUnavailable):
            try:
                lease.acquire()
                return False
            except LeaseHeld as error:
                if not told:
                    log.info("the lease is another's, waiting db=%s owner=%s generation=%d", path, error.owner, error.generation)
                    told = True
            tenant.remember(folder)
            if tenant.foreign(client, folder) is not None:
                database = Database(path)
                database.open()
                try:
                    salvage(database, folder)
                finally:
                    database.close()
                (folder / "pages").unlink(missing_ok=True)
                path.rename(_left(path))
                sync_directory(path.parent)
                _finish_leaving(path)
                return True
        stop.wait(poll_s)
    return False


def _left(path: Path) -> Path:
    """Where a database is that shall go. As long as it is there its WAL, which would be taken for that of a copy, may be, too."""
    return path.with_name(f".{path.name}.left")


def _finish_leaving(path: Path) -> None:
    left = _left(path)
    if left.exists():
        for name in (f"{path.name}-wal", f"{path.name}-shm", left.name):
            path.with_name(name).unlink(missing_ok=True)
        sync_directory(path.parent)


class _Following:
    """The thread that follows."""

    def __init__(self, client: ReplicaClient, path: Path, interval_s: float) -> None:
        self.error: BaseException | None = None
        self.is_ready = False
        self.hurry = threading.Event()
        self._stop = threading.Event()
        self._arguments = client, path, interval_s
        self._thread = threading.Thread(target=self._run, name="pyrepl standby", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        client, path, interval_s = self._arguments
        told, gaps = False, 0
        self.is_ready = read_txid(path) is not None if _is_database(path) else False
        try:
            while not self._stop.is_set():
                try:
                    follow(client, path, stop=self._stop, interval_s=interval_s, applied=self._applied, hurry=self.hurry)
                except (NonContiguous, NoBackups, StorageUnavailable) as error:
                    # A directory is no snapshot: files that are stored while it is read may seem to have a gap.
                    gaps += isinstance(error, NonContiguous)
                    if gaps > GAPS:
                        raise
                    if not told:
                        log.info("waiting for a replica to follow error=%r", str(error))
                        told = True
                    self._stop.wait(interval_s)
        except (ReplicatorError, OSError) as error:
            self.error = error

    def _applied(self, txid: TXID) -> None:
        self.is_ready = True

    def end(self) -> None:
        """Let the copy go."""
        self._stop.set()
        self._thread.join(JOIN_S)
        if self._thread.is_alive():
            raise StorageUnavailable("following does not end, a request hangs")


class _Candidate:
    """Waits for the lease, and asks for it when it shall."""

    def __init__(self, client: ReplicaClient, path: Path, lease: Lease, following: _Following, ask: threading.Event | None) -> None:
        self._client, self._path, self._lease, self._following = client, path, lease, following
        self._ask = ask if ask is not None else threading.Event()
        self._asked_until = 0.0

    def acquire(self, stop: threading.Event, poll_s: float) -> bool:
        """Return True when the lease is ours, False when it was stopped before."""
        lease, following = self._lease, self._following
        while not stop.wait(min(poll_s, HURRY_S) if self._asked_until else poll_s):
            if following.error is not None:
                raise following.error
            if not following.is_ready:
                continue
            with contextlib.suppress(StorageUnavailable):
                try:
                    lease.acquire()
                    return True
                except LeaseHeld as error:
                    self._request(error)
        with contextlib.suppress(LeaseError, StorageError):
            self._end_request()
        return False

    def _request(self, held: LeaseHeld) -> None:
        """Ask the owner, and stop asking one that does not hand over."""
        if self._asked_until and time.monotonic() > self._asked_until:
            log.warning("the owner does not hand over, going on as standby url=%s owner=%s", self._lease.url, held.owner)
            self._end_request()
        elif not self._asked_until and self._ask.is_set() and self._is_near():
            self._ask.clear()
            try:
                if not self._lease.request():
                    return
            except StorageUnavailable:
                self._ask.set()
                raise
            # It is found within a third of the TTL, and the owner has some time to store what it has.
            self._asked_until = time.monotonic() + held.wait_s + HAND_OVER_S
            self._following.hurry.set()
            log.info("asking for a hand-over url=%s owner=%s generation=%d", self._lease.url, held.owner, held.generation)

    def _end_request(self) -> None:
        if self._asked_until:
            self._asked_until = 0.0
            self._following.hurry.clear()
            self._lease.withdraw()

    def _is_near(self) -> bool:
        """Say whether what is left to apply when the lease is ours is little."""
        txid = read_txid(self._path)
        return txid is not None and sum(1 for _ in self._client.list(0, seek=TXID(txid + 1))) <= NEAR_FILES


def _catch_up(client: ReplicaClient, path: Path, stop: threading.Event) -> tuple[FileInfo, Header] | None:
    """Apply what the replica has and the copy lacks, and return the newest raw file. The lease is ours: its old owner appends nothing more that counts,
    but it may still merge and delete.
    """
    txid, gaps = read_txid(path), 0
    assert txid is not None
    with InPlace(path) as copy:
        follower = Follower(client, copy, txid)
        while not stop.is_set():
            try:
                follower.tick(stop)
                newest = newest_raw(client)
            except (StorageUnavailable, NonContiguous, ObjectNotFound, ReplicaEmptied) as error:
                gaps += not isinstance(error, StorageUnavailable)
                if gaps > GAPS:
                    raise
                log.warning("cannot catch up yet, trying again db=%s error=%r", path, str(error))
                stop.wait(CATCH_UP_RETRY_S)
                continue
            if newest is None or newest[0].max_txid <= follower.txid:
                return newest
    return None


def _promote(client: ReplicaClient, path: Path, folder: Path, txid: TXID, newest: tuple[FileInfo, Header] | None) -> None:
    """Make a database of the copy. What says that it is one goes first: from here on it must not be followed into any more."""
    seed_table(client, path, folder, txid, newest=newest)
    for name in (txid_path(path), lineage_path(path)):
        name.unlink(missing_ok=True)
    sync_directory(path.parent)
    log.info("standby becomes the owner db=%s txid=%016x", path, txid)
