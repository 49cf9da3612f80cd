"""Hot standby: follow a replica into a copy, and become its owner when the lease is free.

| what stands at the path | then |
|---|---|
| nothing, or a copy that was followed before | follow, and ask for the lease each `poll_s` |
| a database of our own, and the lease is free | that is the owner's start: see `takeover.py` |
| a database of our own, and another owner went on without us | keep what only it has in a file, then follow over it |

When the lease is ours, the rest of the replica is applied to the copy, which then is a database like any other: its files that say how far it has followed go,
a page table is made of it, and the caller starts a `Replicator` with the lease and `takeover`. Its claim is what makes it the owner.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from pathlib import Path

from replicator.atomic import sync_directory
from replicator.db import Database
from replicator.errors import LeaseHeld, NoBackups, NonContiguous, ReplicatorError, StorageUnavailable
from replicator.follow import Follower, follow, lineage_path, read_txid, txid_path
from replicator.format.ltx import TXID
from replicator.inplace import InPlace
from replicator.lease import Lease
from replicator.storage.base import ReplicaClient
from replicator.takeover import Tenant, newest_raw, salvage, seed_table

__all__ = ["wait_until_owner"]

JOIN_S = 30.0
GAPS = 10

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
) -> bool:
    """Follow a replica until the lease is ours, and make the copy ready for its owner; False when it was stopped before.

    Args:
        path: of the copy, without symbolic links. This process must not open it through `sqlite3` before this returns.
        folder: of local state, which the replicator will use: `<meta path>/pyrepl`.
        lease: not acquired yet. It is ours, and renewed, when True is returned.
        poll_s: how often to look at the lease: a hand-over takes about so long.
        interval_s: how often to look for new files.

    Raises:
        LeaseError: the lease cannot be understood, or its store ignores conditions.
        ReplicatorError, OSError: the replica cannot be followed, see `follow`.
    """
    if _is_database(path) and read_txid(path) is None and not _leave(client, path, folder, lease, stop, poll_s):
        return not stop.is_set()
    while not stop.is_set():
        following = _Following(client, path, interval_s)
        try:
            if not _acquire(lease, following, stop, poll_s):
                return False
        finally:
            following.end()
        _catch_up(client, path, stop)
        txid = read_txid(path)
        if stop.is_set() or txid is None:
            lease.release()
            return False
        _promote(client, path, folder, txid)
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
                for suffix in ("", "-wal", "-shm"):
                    path.with_name(path.name + suffix).unlink(missing_ok=True)
                (folder / "pages").unlink(missing_ok=True)
                sync_directory(path.parent)
                return True
        stop.wait(poll_s)
    return False


class _Following:
    """The thread that follows."""

    def __init__(self, client: ReplicaClient, path: Path, interval_s: float) -> None:
        self.error: BaseException | None = None
        self.is_ready = False
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
                    follow(client, path, stop=self._stop, interval_s=interval_s, applied=self._applied)
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


def _acquire(lease: Lease, following: _Following, stop: threading.Event, poll_s: float) -> bool:
    while not stop.wait(poll_s):
        if following.error is not None:
            raise following.error
        if not following.is_ready:
            continue
        with contextlib.suppress(StorageUnavailable, LeaseHeld):
            lease.acquire()
            return True
    return False


def _catch_up(client: ReplicaClient, path: Path, stop: threading.Event) -> None:
    """Apply what the replica has and the copy lacks. The lease is ours: its old owner appends nothing more that counts."""
    txid = read_txid(path)
    assert txid is not None
    with InPlace(path) as copy:
        follower = Follower(client, copy, txid)
        while not stop.is_set():
            before = follower.txid
            try:
                follower.tick(stop)
            except StorageUnavailable as error:
                log.warning("replica is unavailable, trying again error=%r", str(error))
                stop.wait(0.2)
                continue
            newest = newest_raw(client)
            if follower.txid == before and (newest is None or newest[0].max_txid <= follower.txid):
                return


def _promote(client: ReplicaClient, path: Path, folder: Path, txid: TXID) -> None:
    """Make a database of the copy. What says that it is one goes first: from here on it must not be followed into any more."""
    seed_table(client, path, folder, txid)
    for name in (txid_path(path), lineage_path(path)):
        name.unlink(missing_ok=True)
    sync_directory(path.parent)
    log.info("standby becomes the owner db=%s txid=%016x", path, txid)
