"""Replicate one database: turn what happens in its WAL into the next LTX file, and keep the page table in step with the replicas.

The engine has no thread and never waits; `api.py` drives it:

    open -> [advance -> entry -> (stored or staged) -> settled(entry)] ... -> checkpoint when due -> ... -> close

* `advance` returns the next `Entry`, or None when nothing is new. One entry is outstanding at a time; the WAL is the queue.
* `settled` is called once the entry is stored on a replica, or staged: only then do the page table and the durable position move.
* `checkpoint` may take the end of the WAL with it; that becomes the next entry.

**Crash safety.** Nothing but the stored files counts. After a crash the page table is rolled forward to the end of the replica's chain
and the next sync either continues in the WAL at a proven position, or uploads the pages that differ. A checkpoint while
an entry is outstanding loses nothing either: the pages are in the database file, and differ from the table.
"""

from __future__ import annotations

import fcntl
import itertools
import logging
import os
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from replicator.atomic import sweep
from replicator.budget import MemoryBudget
from replicator.checkpoint import CheckpointPolicy, is_due
from replicator.db import Checkpoint, Database, Image, has_wal_reset_bug
from replicator.errors import DatabaseNotFound, DatabaseStateError, EngineRunning, Fenced, ReplicaBroken, StorageUnavailable
from replicator.filling import copy
from replicator.format.ltx import SNAPSHOT_LEVEL, TXID, Header
from replicator.format.sqlite import lock_pgno
from replicator.format.wal import WAL_HEADER_SIZE, frame_size
from replicator.joining import Known, join, join_later
from replicator.outbox import EncodedPages, Entry, OutFile, Staging, encode
from replicator.pagetable import PageTable, TableState
from replicator.replica import Replica
from replicator.scan import all_pages, differing_pages
from replicator.snapshot import Snapshot
from replicator.tail import NO_WAL, Continue, Resynchronise, WALPosition
from replicator.takeover import Overtaken, Tenant, has_pages, newest_raw, reassure, restore_newest, salvage, until_claimed
from replicator.walreader import Changes, WALFile

if TYPE_CHECKING:
    pass

__all__ = ["Engine", "NotSynced"]

MAX_SYNC_BYTES = 64 << 20
READ_BYTES = 1 << 20
CLOCK_BACK_MS = 60_000
KNOWN_EVERY_S = 30.0
MAX_PASSES = 3

log = logging.getLogger(__name__)


class NotSynced(DatabaseStateError):
    """Something was read and not encoded yet."""


_engines: weakref.WeakSet[Engine] = weakref.WeakSet()


def _in_child() -> None:
    # The lock lives as long as any descriptor of it: a child must not keep it when its parent dies.
    for engine in _engines:
        engine._forget_lock()


os.register_at_fork(after_in_child=_in_child)


class Engine:
    """One database and its replicas. All methods but `snapshot` are called by one thread."""

    _keeps_frames = False

    def __init__(
        self,
        path: Path,
        replicas: Sequence[Replica],
        *,
        meta_path: Path,
        policy: CheckpointPolicy,
        busy_timeout_s: float,
        staging_limit_bytes: int,
        force_snapshot: bool = False,
        tenant: Tenant | None = None,
        memory: MemoryBudget | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """
        Args:
            tenant: of a lease. Then the first replica decides who owns the database, and the others only get what it has.
            memory: shared with other databases, for files that are being made or wait.
        """
        self.path = path
        self.replicas = replicas
        self.lock = threading.RLock()
        self.txid = TXID(0)  # newest TXID that was encoded
        self.checkpoints = 0
        self.max_locked_s = 0.0
        self._folder = meta_path / "pyrepl"
        self._meta_path = meta_path
        self._policy = policy
        self._busy_timeout_s = busy_timeout_s
        self._staging_limit = staging_limit_bytes
        self._force_snapshot = force_snapshot
        self._tenant = tenant
        self._memory = memory
        self._clock = clock
        self._database = Database(path, busy_timeout_s=busy_timeout_s, keeps_frames=self._keeps_frames)
        self._table: PageTable | None = None
        self._staging: Staging | None = None
        self._scratch: Staging | None = None
        self._known: Known | None = None
        self._known_at = 0.0
        self._lineage = b""
        self._lock_file = -1
        self.at_end = True  # the last `advance` read the WAL to its end
        self.is_behind = False  # it left more than it could take at once
        self._xor = 0  # checksum of the whole database at `txid`
        self._position: WALPosition = NO_WAL  # end of what was read for encoding
        self._commit = 0
        self._timestamp_ms = 0
        self._resync_reason: str | None = None
        self._damaged = False  # the WAL has frames that cannot be read
        self._tails: list[Changes] = []
        self._snapshots: list[Snapshot] = []
        self._frames_since: float | None = None
        self._failures = 0
        self._contended = self._warned = False
        self._passes = 0  # attempts in a row that did not end, and let the next one get further
        self._last_attempt = 0.0
        _engines.add(self)

    # -- opening -----------------------------------------------------------------------------------------------------------------

    def open(self) -> list[Entry]:
        """Lock, connect, find the position; returns entries that an earlier run staged and did not store.

        With a lease, the database is claimed when this returns: the claim is among the entries, and on the first replica.

        Raises:
            EngineRunning: another engine holds the metadata directory.
            LeaseError: somebody else has the lease, or owned the replica since.
            DatabaseStateError, ReplicaStateError, RestoreError, StorageError: see there. Everything is released again.
        """
        try:
            return until_claimed(self._open, self.close)
        except BaseException:
            self.close()
            raise

    def _open(self) -> list[Entry]:
        if self._tenant is not None:
            self._move_in(self._tenant)
        if not self.path.exists():
            raise DatabaseNotFound(self.path)
        self._database.open()
        if self._lock_file < 0:
            self._take_lock()
        self._scratch = Staging(self._folder / "scratch", limit_bytes=self._staging_limit, memory=self._memory)
        self._scratch.clear()
        entries = self._join()
        return entries if self._tenant is None else self._claim(self._tenant, entries)

    def _move_in(self, tenant: Tenant) -> None:
        """Take the lease, and make sure that the database is not behind the replica. Nothing is connected yet."""
        home = self.replicas[0]
        self._take_lock()
        number = tenant.acquire(self._folder)
        for replica in self.replicas:
            replica.writer = number
        foreign = tenant.foreign(home.client, self._folder)
        if not self.path.exists():
            if tenant.takeover and newest_raw(home.client) is not None:
                tenant.looked_at = restore_newest(home.client, self.path, self._folder)
            return
        if foreign is None:
            return
        self._database.open()
        try:
            if foreign.is_doubtful and has_pages(self._database, home.client, foreign.info):
                return
            tenant.salvaged = salvage(self._database, self._folder)
        finally:
            self._database.close()
        if not tenant.takeover:
            kept = f"; what only this machine had is in {tenant.salvaged}" if tenant.salvaged is not None else ""
            why = f"{foreign.who} stored TXID {foreign.info.max_txid:016x} since{kept}"
            raise Fenced(home.url, foreign.info.max_txid, why=why, hint="start with takeover to restore that state and go on from there")
        tenant.looked_at = restore_newest(home.client, self.path, self._folder)

    def _claim(self, tenant: Tenant, staged: list[Entry]) -> list[Entry]:
        """Append the next TXID to the first replica. Where that holds nothing yet, its first file will be the claim."""
        home = self.replicas[0]
        if not home.online:
            raise StorageUnavailable(f"the replica that decides who owns the database does not answer: {home.url}: {home.error}")
        if not self.txid:
            return staged
        try:
            self._bring_home(home, staged)
            if tenant.has_claimed:
                return staged
            if tenant.follows_another:
                reassure(tenant.lease)
            entry = self.advance() or self._first_page()
            home.store(entry.files, entry.txid)
        except Fenced as error:
            raise Overtaken(error) from error
        self.settled(entry)
        log.info("claimed db=%s replica=%s txid=%016x", self.path, home.url, entry.txid)
        return [*staged, entry]

    def _check_look(self) -> None:
        """Make sure that nothing has come since the look at the first replica: it is not in the database, and must not get into the page table as if it
        were. Going on from there would undo it."""
        home = self.replicas[0]
        if self._tenant is not None and home.listed:
            newest = max((info.max_txid for info in home.listing().get(0, ())), default=TXID(0))
            if newest != self._tenant.looked_at:
                raise Overtaken(Fenced(home.url, newest, why=f"TXID {newest:016x} was stored by another writer at this moment"))

    def _bring_home(self, home: Replica, staged: Sequence[Entry]) -> None:
        """Store on the first replica what comes before the claim: staged entries of ours, or what another replica has."""
        for entry in staged:
            if entry.txid > home.txid:
                home.store(entry.files, entry.txid)
        head = max((replica for replica in self.replicas if replica.online), key=lambda replica: replica.txid)
        if head.txid > home.txid and not home.needs_image:
            copy(head, home, self.scratch)
        if home.needs_image or home.txid != self.txid:
            raise ReplicaBroken(home.url, home.txid, self.txid + 1)

    def _first_page(self) -> Entry:
        """Encode page 1 as it is: a TXID that changes nothing."""
        assert self._staging is not None
        txid, position = TXID(self.txid + 1), self._position
        header = self._header(txid, txid, self._commit, position)
        page = bytes(self._database.pages(1, 1, self._database.overlay(position), position.salts))
        out, encoded = encode(self._staging, 0, header, [(1, page)])
        self._xor = self._xor_after(encoded, self._commit)
        self.txid = txid
        return Entry(txid, (out,), encoded, self._database.page_size, self._commit, header.timestamp_ms, position)

    def _join(self) -> list[Entry]:
        """Find out where the replicas are, and go on there. (This and what is encoded differ in `v3engine.py`.)"""
        self._staging = Staging(self._folder / "staged", limit_bytes=self._staging_limit, memory=self._memory)
        self._known = Known(self._folder / "replicas.json")
        joined = join(
            self.replicas,
            folder=self._folder,
            staging=self._staging,
            known=self._known,
            page_size=self._database.page_size,
            force_snapshot=self._force_snapshot,
            listed=self._check_look,
        )
        self._table, self._lineage = joined.table, joined.lineage
        self._salvage_litestream()
        state = self._table.state
        self.txid, self._commit, self._timestamp_ms, self._xor = state.txid, state.commit, state.timestamp_ms, state.xor
        self._position = state.position
        self._resync_reason = "first sync" if not state.txid else None
        return joined.staged

    def join_later(self, replica: Replica) -> None:
        """Open a replica that did not answer at the start. Called by the replica's own thread. Errors are those of `open`."""
        assert self._known is not None
        others = [other for other in self.replicas if other is not replica and other.online]
        head = max(others, key=lambda other: other.txid, default=None)
        join_later(replica, lineage=self._lineage, known=self._known, newest=self.txid, head=head)

    @property
    def folder(self) -> Path:
        """Where local state is."""
        return self._folder

    @property
    def place(self) -> str:
        """Where the newest encoded bytes end, in the words of the format; empty where the TXID says it all."""
        return ""

    @property
    def scratch(self) -> Staging:
        """Folder for temporary results that are too large for memory; emptied at each start."""
        assert self._scratch is not None
        return self._scratch

    def _take_lock(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock_file = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        for last in (False, False, False, False, True):
            try:
                fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                sweep(self._folder)
                return
            except BlockingIOError:
                if last:
                    break
                time.sleep(0.02)  # `verify` looks at it for a moment
        os.close(self._lock_file)
        self._lock_file = -1
        raise EngineRunning(self.path)

    def _salvage_litestream(self) -> None:
        """Move Litestream's own local files aside: when it comes back it would append stale pages after ours."""
        theirs = self._meta_path / "ltx"
        if theirs.is_dir():
            aside = self._folder / f"salvaged-ltx-{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}"
            theirs.rename(aside)
            log.warning("moved Litestream's local files aside db=%s to=%s", self.path, aside)

    def close(self) -> None:
        """Release everything; the WAL and the staged files stay. Closing twice does nothing."""
        self.abandon_snapshots("the engine was closed")
        with self.lock:
            self._database.close()
            if self._table is not None:
                self._table.close()
                self._table = None
                if self._known is not None:
                    self._known.note(self.replicas)
            if self._lock_file >= 0:
                fcntl.flock(self._lock_file, fcntl.LOCK_UN)  # a forked child may share it
                self._forget_lock()

    def abandon_snapshots(self, reason: str) -> None:
        """Let all `snapshot` calls that are under way fail soon. May be called from any thread."""
        with self.lock:
            for snapshot in self._snapshots:
                snapshot.cancel(reason)

    def _forget_lock(self) -> None:
        if self._lock_file >= 0:
            os.close(self._lock_file)
            self._lock_file = -1

    # -- syncing -----------------------------------------------------------------------------------------------------------------

    def wal_size(self) -> int:
        """Logical size in bytes of the WAL that is read."""
        return self._position.offset

    def advance(self) -> Entry | None:
        """Read what was committed and encode it as the next TXID; None when nothing is new.

        Raises:
            DatabaseStateError: the database cannot be read now.
            OSError: the staging folder cannot take a large file.
        """
        with self.lock:
            if self._database.replaced():
                self._reopen()
            self.is_behind = False
            if self._tails:
                self.at_end = False
                entry = self._encode(self._tails[0], None)
                self._tails.pop(0)
                return entry
            self.at_end = True
            if self._resync_reason is None:
                with self._database.wal() as wal:
                    decision = self._database.observe(self._position, wal)
                    if isinstance(decision, Continue) and wal is not None:
                        found = self._read(decision.position, wal)
                        if not isinstance(found, Resynchronise):
                            return found
                        decision = found
                    elif not isinstance(decision, Resynchronise):
                        if self._database.is_attached:
                            return None
                        decision = Resynchronise("there is no WAL to continue in")
                self._resync_reason = decision.reason
            return self._resynchronise(self._resync_reason)

    def _read(self, position: WALPosition, wal: WALFile) -> Entry | Resynchronise | None:
        changes = self._database.changes(position, wal, limit=MAX_SYNC_BYTES)
        first = not self._database.is_attached
        # The pin may sit in slot 0, where the WAL can be restarted once. If that has happened since `observe`, frames that are only in the
        # database file by now were not seen. If it happens later, everything before it has been read.
        if first and not self._database.salts_are(position.salts):
            return Resynchronise("the WAL was restarted while it was read for the first time")
        if changes is None and self._database.is_end_doubtful:
            known = self._frames_in_index()
            changes = self._database.changes(position, wal, limit=MAX_SYNC_BYTES)
            if changes is None and known > (readable := self._frames_up_to(position)):
                self._damaged = True
                return Resynchronise(f"the WAL is damaged: SQLite counts {known} frames in it, of which {readable} can be read")
        if changes is None:
            self.at_end = True
            if first:
                self._database.attached(position)
            self._position = position
            return None
        self.is_behind = changes.more
        self.at_end = not changes.more and not self._database.is_end_doubtful  # an open transaction may be writing there
        self._preserve(changes)
        entry = self._encode(changes, wal)
        if first and not changes.more:  # not before: what could not be encoded is read again, from the old position
            self._database.attached(changes.end)
        return entry

    def _note_frames(self) -> None:
        """The WAL has frames that no checkpoint of ours has copied."""
        if self._frames_since is None:
            self._frames_since = time.monotonic()

    def _frames_in_index(self) -> int:
        """Return how many frames SQLite knows in the WAL. Raises `DatabaseStateError` while that cannot be told."""
        known = self._database.frames_in_index()
        if known < 0:
            raise DatabaseStateError(f"cannot tell yet where the WAL ends, because somebody else is checkpointing: {self.path}")
        return known

    def _frames_up_to(self, position: WALPosition) -> int:
        return (position.offset - WAL_HEADER_SIZE) // frame_size(self._database.page_size)

    def _preserve(self, changes: Changes) -> None:
        for snapshot in self._snapshots:
            snapshot.preserve(changes)

    def _encode(self, changes: Changes, wal: WALFile | None) -> Entry:
        assert self._staging is not None
        txid = TXID(self.txid + 1)
        header = self._header(txid, txid, changes.commit, changes.end)
        images = changes.pages(wal) if wal is not None else changes.kept_pages()
        out, encoded = encode(self._staging, 0, header, self._with_growth(images, changes))
        if wal is not None and changes.data is None and not self._database.salts_are(changes.end.salts):
            out.discard()
            raise DatabaseStateError(f"the WAL was restarted while it was read: {self.path}")  # read again at the next call
        if self._database.replaced():
            out.discard()
            raise DatabaseStateError(f"the database was replaced while it was read: {self.path}")
        self._xor = self._xor_after(encoded, changes.commit)
        self.txid, self._commit, self._position = txid, changes.commit, changes.end
        if wal is not None:
            self._note_frames()
        return Entry(txid, (out,), encoded, changes.page_size, changes.commit, header.timestamp_ms, changes.end)

    def _xor_after(self, encoded: EncodedPages, commit: int) -> int:
        """Return the checksum of the whole database after an entry that follows the table's state."""
        assert self._table is not None
        return self._table.xor_after(encoded.pgnos, encoded.checksums, commit=commit)

    def _with_growth(self, images: Iterator[tuple[int, bytes]], changes: Changes) -> Iterator[tuple[int, bytes | memoryview]]:
        """Add the pages by which the database grew without a frame, and drop the lock page."""
        lock = lock_pgno(changes.page_size)
        grown = range(self._commit + 1, changes.commit + 1)
        if not len(grown) or len(grown) == int((changes.pgnos > self._commit).sum()):
            for pgno, image in images:
                if pgno != lock:
                    yield pgno, image
            return
        overlay = self._database.overlay(changes.start)
        expected = self._commit + 1
        for pgno, image in images:
            for missing in range(expected, pgno):
                if missing != lock:
                    yield missing, bytes(self._database.pages(missing, 1, overlay, changes.start.salts))
            if pgno > self._commit:
                expected = pgno + 1
            if pgno != lock:
                yield pgno, image
        for missing in range(expected, changes.commit + 1):
            if missing != lock:
                yield missing, bytes(self._database.pages(missing, 1, overlay, changes.start.salts))

    def _header(self, min_txid: TXID, max_txid: TXID, commit: int, position: WALPosition) -> Header:
        """WAL fields are (32, 0, current salts): whoever takes over reads this WAL from its start, and misses nothing of it."""
        return Header(
            page_size=self._database.page_size,
            commit=commit,
            min_txid=min_txid,
            max_txid=max_txid,
            timestamp_ms=self._next_timestamp_ms(),
            wal_offset=32,
            wal_size=0,
            wal_salt1=position.salts[0],
            wal_salt2=position.salts[1],
            node_id=self.replicas[0].writer,
        )

    def _next_timestamp_ms(self) -> int:
        now = int(self._clock() * 1000)
        if self._timestamp_ms > now + CLOCK_BACK_MS:
            log.warning(
                "the clock was set back, and so are the times of files db=%s seconds=%d", self.path, (self._timestamp_ms - now) // 1000
            )
            self._timestamp_ms = now
        self._timestamp_ms = max(self._timestamp_ms, now)
        return self._timestamp_ms

    def settled(self, entry: Entry) -> None:
        """Move the table to an entry that is stored on a replica, or staged. When it fails, call it again before anything else."""
        with self.lock:
            assert self._table is not None
            if entry.txid == self._table.state.txid:
                return
            assert entry.txid == self._table.state.txid + 1, "an entry is missing"
            self._note_known()
            if entry.page_size != self._table.state.page_size:
                lineage = self._table.state.lineage
                self._table.close()
                self._table = PageTable.create(self._folder / "pages", lineage=lineage, page_size=entry.page_size)
            self._table.apply(
                entry.txid,
                entry.encoded.pgnos,
                entry.encoded.checksums,
                commit=entry.commit,
                timestamp_ms=entry.timestamp_ms,
                position=entry.position,
            )

    def _note_known(self) -> None:
        """Write down now and then how far the replicas are; the first time before the table says that something is stored."""
        assert self._known is not None
        now = time.monotonic()
        unreadable = any(not item.client.can_read for item in self.replicas)  # where nothing can be looked up later
        if (
            unreadable
            or now >= self._known_at + KNOWN_EVERY_S
            or any((item.online and item.url not in self._known) or (item.txid and not self._known.get(item.url)) for item in self.replicas)
        ):
            self._known.note(self.replicas)
            self._known_at = now

    def place_of_rest(self) -> tuple[WALPosition, int, tuple[int, int]]:
        """Return where the synced part of the WAL ends, the page size, and device and inode of the database file.

        Raises:
            DatabaseStateError: what was read last is not encoded yet, or it is not certain where the WAL ends.
        """
        if self._tails or self._resync_reason is not None or not self._database.is_attached:
            raise DatabaseStateError(f"not at rest: {self.path}")
        return self._position, self._database.page_size, self._database.identity

    def database_bytes(self) -> int:
        """Size of the database at the newest TXID."""
        return self._commit * self._database.page_size

    def rest(self) -> None:
        """The database has become quiet: write down what is known, so that a kill from now on costs the next start nothing."""
        if self._known is not None:
            self._known.note(self.replicas)

    @property
    def pinned_s(self) -> float:
        """Seconds since the oldest frame was read that no checkpoint of ours has finished; 0 when there is none."""
        since = self._frames_since
        return 0.0 if since is None else time.monotonic() - since

    def staging_is_full(self) -> bool:
        """True when the staging folder has reached its bound, or the disk is nearly full."""
        return self._staging is not None and self._staging.is_full()

    def state(self) -> tuple[TXID, int]:
        """Return the newest TXID that was encoded, and the checksum of the whole database there."""
        with self.lock:
            return self.txid, self._xor

    def stage(self, entry: Entry) -> Entry | None:
        """Make an entry survive this process; None when the staging folder is full."""
        assert self._staging is not None
        return None if self._staging.is_full() else self._staging.stage(entry)

    def forget(self, entry: Entry) -> None:
        """Remove the staged files of an entry that every replica holds."""
        if self._staging is None or not any(isinstance(file.body, Path) for file in entry.files):
            return
        if self._known is not None:
            self._known.note(self.replicas)  # the staged file was the proof that the stored one is ours
        self._staging.remove(entry)

    # -- resynchronising ---------------------------------------------------------------------------------------------------------

    def _reopen(self) -> None:
        """Another file stands at the path, or none."""
        for snapshot in self._snapshots:
            snapshot.cancel("the database was replaced")
        if not self.path.exists():
            raise DatabaseNotFound(self.path)
        self._database.close()
        self._database.open()
        self._tails.clear()
        self._resync_reason = "the database file or its WAL was replaced"

    def _resynchronise(self, reason: str) -> Entry | None:
        """Upload exactly the pages that differ from the replicated state."""
        assert self._table is not None
        assert self._staging is not None
        for snapshot in self._snapshots:
            snapshot.cancel(reason)
        self._tails.clear()
        image = self._image()
        state = self._table.state
        self.txid, self._xor = state.txid, state.xor
        self._frames_since = time.monotonic() if image.overlay else None
        if image.commit == 0:
            self._position, self._resync_reason = image.position, None
            return None
        if state.txid and state.page_size != image.page_size:
            entry: Entry | None = self._page_size_changed(image, state)
        else:
            entry = self._difference(image, state)
        log.info(
            "resynchronised db=%s reason=%r txid=%016x pages=%d of=%d",
            self.path, reason, self.txid, len(entry.encoded.pgnos) if entry else 0, image.commit,
        )  # fmt: skip
        self._position, self._commit, self._resync_reason = image.position, image.commit, None
        if entry is None:
            self._table.move(image.position)
        return entry

    def _image(self) -> Image:
        """Pin the newest state and return it.

        Raises:
            DatabaseStateError: what is behind the end of the WAL cannot be told now, or not be copied.
        """
        for _ in range(4):
            if self._damaged:
                self._database.restart_damaged_wal()
                self._damaged = False
            self._database.pin()
            self._database.refresh()
            image = self._database.image()
            self._database.attached(image.position)
            if not self._database.is_end_doubtful:
                return image
            known = self._frames_in_index()
            again = self._database.image()
            if known <= self._frames_up_to(again.position):
                self._database.attached(again.position)
                return again
            log.error("the WAL is damaged; it is copied and emptied, and pages are compared db=%s frames=%d", self.path, known)
            self._damaged = True
        raise DatabaseStateError(f"cannot tell yet where the WAL ends, because others are busy: {self.path}")

    def _difference(self, image: Image, state: TableState) -> Entry | None:
        assert self._staging is not None
        assert self._table is not None
        pages = differing_pages(self._database, self._table, image)
        first = next(pages, None)
        if first is None and image.commit == state.commit:
            return None
        txid = TXID(state.txid + 1)
        header = self._header(txid, txid, image.commit, image.position)
        out, encoded = encode(self._staging, 0, header, itertools.chain([first] if first is not None else [], pages))
        self._xor = self._xor_after(encoded, image.commit)
        self.txid = txid
        return Entry(txid, (out,), encoded, image.page_size, image.commit, header.timestamp_ms, image.position)

    def _page_size_changed(self, image: Image, state: TableState) -> Entry:
        """A chain may not mix page sizes: a snapshot that ends at the new TXID comes first."""
        assert self._staging is not None
        txid = TXID(state.txid + 1)
        header = self._header(TXID(1), txid, image.commit, image.position)
        snapshot, encoded = encode(self._staging, SNAPSHOT_LEVEL, header, all_pages(self._database, image))
        header = self._header(txid, txid, image.commit, image.position)
        raw, _ = encode(self._staging, 0, header, all_pages(self._database, image))
        self._xor = encoded.xor()
        self.txid = txid
        return Entry(txid, (snapshot, raw), encoded, image.page_size, image.commit, header.timestamp_ms, image.position)

    # -- checkpoints and snapshots -----------------------------------------------------------------------------------------------

    @property
    def is_pin_low(self) -> bool:
        """True when `settle_pin` will have something to do, once the WAL was restarted."""
        return self._database.is_pin_low

    @property
    def is_checkpointing(self) -> bool:
        """True when the last attempt did not end, and the next one gets further."""
        return self._passes > 0

    def settle_pin(self) -> None:
        """Let others copy again after a restart of the WAL; cheap when there is nothing to do."""
        with self.lock:
            if self._resync_reason is None and not self._tails and self._database.is_attached:
                self._take(self._database.settle(self._position, self._preserve))

    def checkpoint_due(self) -> bool:
        return self._resync_reason is None and is_due(
            self._policy,
            wal_end=self._position.offset,
            page_size=self._database.page_size,
            frames_since=self._frames_since,
            failures=self._failures,
            last_attempt=self._last_attempt,
            now=time.monotonic(),
        )

    def checkpoint(self) -> bool:
        """Try to copy the whole WAL into the database file. True when the next writer restarts it. Never blocks for long."""
        with self.lock:
            if self._tails or self._resync_reason is not None or not self._database.is_attached:
                return False
            self._last_attempt = time.monotonic()
            result = self._database.checkpoint(self._position, self._preserve, copy_first=not self._contended and self._passes < MAX_PASSES)
            self._take(result)
            self._contended = result.contended
            self._passes = self._passes + 1 if result.goes_on and not result.contended else 0
            if result.contended and result.moved:
                self._warn_about_checkpoints_of_others()
            if result.lost:
                return False
            if result.complete:
                self._failures = 0
                self._frames_since = None
                self.checkpoints += 1
            elif result.contended or not result.goes_on:
                self._failures += 1
            return result.complete

    def _warn_about_checkpoints_of_others(self) -> None:
        if self._warned or not has_wal_reset_bug(sqlite3.sqlite_version_info):
            return
        self._warned = True
        log.warning(
            "others checkpoint this database, too, and SQLite before 3.51.3 can damage a database then (WAL-reset bug); "
            "use a later one, or PRAGMA wal_autocheckpoint=0 in the application db=%s sqlite=%s",
            self.path, sqlite3.sqlite_version,
        )  # fmt: skip

    def _take(self, result: Checkpoint) -> None:
        if result.lost:
            log.error("the WAL is damaged; the pages that differ are uploaded db=%s reason=%r", self.path, result.lost)
            self._resync_reason = result.lost
            self._damaged = True
            return
        if result.pinned:
            self._database.attached(result.position)
        if result.tail is not None:
            self._tails.append(result.tail)
            self._note_frames()
        self._position = result.position
        self.max_locked_s = max(self.max_locked_s, result.locked_s)

    @property
    def has_tail(self) -> bool:
        """True when `advance` has something to encode that a checkpoint read."""
        return bool(self._tails)

    @property
    def can_snapshot(self) -> bool:
        """True when there is one state that `snapshot` can take, and not one that `advance` must hand out first. Without the lock it is a hint."""
        looked = self._database.is_attached and self._resync_reason is None and not self._tails
        return looked and self.txid > 0 and self._commit > 0

    def snapshot(self) -> OutFile:
        """Encode a level-9 file of the newest TXID while commits, syncs and checkpoints go on. May run in any thread.

        The caller removes the file, when it is one. It may store it only where the raw files have reached that TXID.

        Raises:
            NotSynced: there is nothing to take it of yet; sync and call again.
            DatabaseStateError: continuity was lost meanwhile.
        """
        with self.lock:
            if not self.can_snapshot:
                raise NotSynced(f"no synced state to take a snapshot of: {self.path}", hint="call sync() first")
            snapshot = Snapshot(self._database, txid=self.txid, commit=self._commit, position=self._position, folder=self._folder)
            header, xor = self._header(TXID(1), self.txid, self._commit, self._position), self._xor
            self._snapshots.append(snapshot)
        try:
            with snapshot:
                out, encoded = encode(self.scratch, SNAPSHOT_LEVEL, header, snapshot.pages(lambda: self.lock), unique=True)
            if encoded.xor() != xor:
                # Somebody changed the file itself: what was read is no state that ever was.
                out.discard()
                raise DatabaseStateError(f"snapshot of TXID {header.max_txid:016x} is not the state that was synced: {self.path}")
            return out
        finally:
            with self.lock:
                self._snapshots.remove(snapshot)
