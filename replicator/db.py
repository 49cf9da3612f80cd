"""One live database: connections, the read transaction that pins the WAL, reading changes, and the gap-free checkpoint.

Four connections, all with `wal_autocheckpoint=0`, `synchronous=NORMAL` and `trusted_schema=OFF`:

* `R` holds a read transaction (the *pin*) at all times; `R2` takes over when the pin moves. Both are opened read-only, so that closing
  the last of them neither checkpoints nor deletes the WAL.
* `W` takes the write lock, never writes.  `C` runs `wal_checkpoint(PASSIVE)`.

`R2` and `C` are opened when they are needed first: of many databases that are opened, most are closed again before that.

**What the pin gives.** A reader that begins while the WAL holds frames not yet copied sits in a slot > 0: nobody can restart the WAL.
One that begins when all is copied sits in slot 0: nobody can copy anything, and the next writer may restart the WAL once, after
which it cannot be restarted again, because that needs copying. So under one unbroken pin that began at or before the synced position, a
change of the WAL's salts is one restart that skipped nothing. Hence `restart_proven`.

**The invariant** that everything else rests on: *the database file never holds an image newer than the position*, the end of the WAL
that `changes` or `checkpoint` returned last. Nobody may copy frames past the oldest reader, and the pin only ever moves while this
engine holds the write lock, with everything up to the WAL's end already read. The state at the position is then: the newest frame
of a page in the current WAL up to the position, else the page in the file.

**Checkpoint.** Under the write lock: read the WAL to its very end; let the pin go (a restart needs the write lock, which we hold);
PASSIVE; pin again, in slot 0; release. The next writer restarts the WAL. Nothing is written to the database.

Writers wait for little, because most is done before, while they go on: both files are flushed, the WAL is read as far as it goes, and where many
pages are to be copied, they are copied in a pass of its own. An application that checkpoints by itself does so after its commits, beside the
write lock: while we hold that, its checkpoint is its last one, and ends soon, so that ours waits for it.

Source: `docs/design.md`; SQLite's wal.c for slots, restart and checkpoint rules.
"""

from __future__ import annotations

import contextlib
import math
import os
import sqlite3
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from replicator import livefile
from replicator.atomic import sync_data
from replicator.errors import DatabaseLocked, DatabaseNotFound, DatabaseStateError, FormatError, NotADatabase, NotWALMode
from replicator.format.sqlite import SQLITE_MAGIC, lock_pgno
from replicator.format.wal import WAL_HEADER_SIZE, WALHeader, frame_size
from replicator.tail import NO_WAL, Continue, Decision, WALPosition, decide, start_of
from replicator.walreader import Changes, WALFile, joined

if TYPE_CHECKING:
    from replicator.format.wal import FrameHeader

__all__ = ["Checkpoint", "Database", "Image"]

LOCK_RETRY_S = 0.00005
LOCK_BUDGET_S = 0.25
COPY_PASS_PAGES = 1000
AHEAD_ROUNDS, FEW_FRAMES = 20, 256
FLUSH_BYTES, FLUSH_GAIN = 2 << 20, 0.8
OTHERS_RETRY_S, OTHERS_BUDGET_S = 0.0002, 0.03
IMAGE_CHUNK_BYTES = 1 << 20
LOCKED_READ_BYTES = 8 << 20
AHEAD_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What one attempt did.

    Attributes:
        complete: every frame is in the database file; the next writer restarts the WAL.
        moved: the pin moved to `position`, so that everybody may copy up to there.
        contended: another process was checkpointing, or the write lock was not to be had.
        tail: what was read under the write lock, past the position that the caller gave; the caller owns it now.
        position: the new position, also when the attempt failed.
        locked_s: how long writers had to wait.
        pinned: the pin began anew where `position` is; call `attached` once `position` and `tail` are taken over.
        lost: why frames were copied, or will be, that cannot be read; empty when there are none.
        goes_on: the next attempt gets further: much was copied, or must be read first.
    """

    complete: bool
    moved: bool
    contended: bool
    tail: Changes | None
    position: WALPosition
    locked_s: float
    pinned: bool = False
    lost: str = ""
    goes_on: bool = False


@dataclass(frozen=True, slots=True)
class Image:
    """The whole database at one committed state.

    Attributes:
        position: end of the WAL frames that it includes.
        commit: size in pages.
        overlay: byte offset in the WAL of each page whose newest image is there.
    """

    position: WALPosition
    page_size: int
    commit: int
    overlay: dict[int, int]


class Database:
    """One live database. The caller serialises all calls."""

    def __init__(self, path: Path, *, busy_timeout_s: float = 1.0, keeps_frames: bool = False) -> None:
        """
        Args:
            path: without symbolic links. SQLite follows them and puts the WAL beside the real file.
            keeps_frames: the caller wants all frames of what a checkpoint reads, and not just the newest image of each page.
        """
        self.path = path
        self._keeps_frames = keeps_frames
        self.page_size = 0
        self._wal_path = path.with_name(path.name + "-wal")
        self._names = os.fspath(path), os.fspath(self._wal_path)
        self._busy_timeout_s = busy_timeout_s
        self._file = -1
        self._acquired: livefile.Identity | None = None
        self._connections: list[sqlite3.Connection] = []
        self._copier: sqlite3.Connection | None = None  # this and `_spare` are opened when they are needed first
        self._spare: sqlite3.Connection | None = None
        self._pinned = False
        self._attached = False  # everything that the pin can see is synced
        self._slot0 = False  # the pin may sit in slot 0
        self._restart_allowed = False  # the WAL may be restarted (once) under the pin
        self._pin_offset = 0  # where the pin began, at the latest
        self._pages_past_pin = 0  # how many were read since then; pages that were read twice count twice
        self._doubtful = False
        self._identity = (0, 0)
        self._wal: WALFile | None = None
        self._wal_identity: tuple[int, int] | None = None

    # -- opening and closing -----------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Connect, make sure of WAL mode, and pin.

        Raises:
            DatabaseNotFound, NotADatabase, NotWALMode, DatabaseLocked: the source is untouched then.
        """
        self.close()
        try:
            found = os.stat(self.path)
        except FileNotFoundError:
            raise DatabaseNotFound(self.path) from None
        if found.st_nlink > 1 and stat.S_ISREG(found.st_mode):
            # SQLite would keep one WAL for each name, and nobody would see what the others write.
            hint = "keep one name; use a symbolic link for the others"
            raise DatabaseStateError(f"database has {found.st_nlink} names (hard links): {self.path}", hint=hint)
        if not stat.S_ISREG(found.st_mode):
            raise NotADatabase(self.path, "a directory" if stat.S_ISDIR(found.st_mode) else "not a regular file")
        livefile.warn_about_second_library()
        self._file, self._acquired = livefile.acquire(self.path)
        self._identity = (found.st_dev, found.st_ino)
        head = os.pread(self._file, 16, 0)
        if head and head != SQLITE_MAGIC:
            self.close()
            raise NotADatabase(self.path)
        try:
            for mode in ("rw", "ro"):
                self._connections.append(self._connect(mode))
            self._writer, self._pin = self._connections
            self._ensure_wal_mode()
            self.page_size = int(self._writer.execute("PRAGMA page_size").fetchone()[0])
            self.pin()
        except sqlite3.Error as error:
            self.close()
            raise self._translate(error) from error
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let the pin go and close the connections; the WAL file stays. Closing twice does nothing."""
        for connection in self._connections:
            with contextlib.suppress(sqlite3.Error):
                connection.close()
        self._connections = []
        self._copier = self._spare = None
        acquired, self._acquired = self._acquired, None
        if acquired is not None:
            livefile.release(acquired)
        self._pinned = self._attached = self._restart_allowed = False
        self._doubtful, self._wal_identity = False, None
        if self._wal is not None:
            self._wal.close()
            self._wal = None

    @property
    def identity(self) -> livefile.Identity:
        """Device and inode of the file that was opened last."""
        return self._identity

    @property
    def is_attached(self) -> bool:
        """True when the pin has been held without a break since everything that it sees was synced."""
        return self._attached

    @property
    def is_pin_low(self) -> bool:
        """True when the pin may sit in slot 0, where it keeps others from copying."""
        return self._slot0

    @property
    def is_end_doubtful(self) -> bool:
        """True when the last scan ended at a frame of this very WAL whose checksum is wrong: what an open transaction is writing, a remnant of
        one that was rolled back, or damage."""
        return self._doubtful

    def frames_in_index(self) -> int:
        """Return how many committed frames SQLite knows in the WAL; -1 while somebody else is checkpointing.

        Asked by a PASSIVE checkpoint: it waits for nobody, and copies nothing past the pin. Every frame that it counts is in the file already,
        so that a scan that begins later finds them all, unless they are damaged.
        """
        _, total, _ = self._checkpointer.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
        return int(total)

    def refresh(self) -> None:
        """Read the page size anew, from the pinned state."""
        self.page_size = int(self._pin.execute("PRAGMA page_size").fetchone()[0])

    def replaced(self) -> bool:
        """True when another file, or none, stands at the path now, or at that of its WAL. (SQLite deletes a WAL only when nobody has it
        open, and we have.)
        """
        if _identity(self._names[0]) != self._identity:
            return True
        return self._wal_identity is not None and _identity(self._names[1]) != self._wal_identity

    def _connect(self, mode: str) -> sqlite3.Connection:
        uri = f"file:{quote(str(self.path.absolute()))}?mode={mode}"
        connection = sqlite3.connect(uri, uri=True, isolation_level=None, timeout=self._busy_timeout_s, check_same_thread=False)
        try:
            connection.execute("PRAGMA trusted_schema=OFF")  # it may be a restored one
            connection.execute("PRAGMA wal_autocheckpoint=0")
            connection.execute("PRAGMA synchronous=NORMAL")
        except BaseException:
            connection.close()
            raise
        return connection

    @property
    def _checkpointer(self) -> sqlite3.Connection:
        if self._copier is None:
            self._copier = self._connect("rw")
            self._connections.insert(0, self._copier)  # those that only read are closed last
        return self._copier

    def _ensure_spare(self) -> None:
        if self._spare is None:
            self._spare = self._connect("ro")
            self._connections.append(self._spare)

    def _ensure_wal_mode(self) -> None:
        self._writer.execute("SELECT count(*) FROM sqlite_master").fetchone()
        mode = str(self._writer.execute("PRAGMA journal_mode").fetchone()[0])
        if mode == "wal":
            return
        try:
            mode = str(self._writer.execute("PRAGMA journal_mode=WAL").fetchone()[0])
        except sqlite3.OperationalError as error:
            raise NotWALMode(self.path, mode) from error
        if mode != "wal":
            raise NotWALMode(self.path, mode)

    def _translate(self, error: sqlite3.Error) -> Exception:
        text = str(error)
        if "locked" in text or "busy" in text:
            return DatabaseLocked(self.path)
        if "not a database" in text or "malformed" in text:
            return NotADatabase(self.path, text)
        return DatabaseStateError(f"cannot read the database: {self.path}: {text}")

    # -- the pin -----------------------------------------------------------------------------------------------------------------

    def pin(self) -> None:
        """Begin the read transaction anew, where the WAL is now. What was synced before proves nothing any more."""
        self._unpin()
        _begin_read(self._pin)
        self._pinned = self._slot0 = self._restart_allowed = True
        self._attached = False
        self._pages_past_pin = 0

    def attached(self, position: WALPosition) -> None:
        """Take note that everything which the pin can see is read, up to `position`.

        Call it only for a position that a scan reached *under this pin*, in a WAL whose salts were the same after the scan.
        """
        self._attached = True
        self._pin_offset = position.offset

    def _unpin(self) -> None:
        self._attached = self._restart_allowed = False
        if self._pinned:
            self._pinned = False
            self._pin.execute("ROLLBACK")

    def _move_pin(self, position: WALPosition) -> None:
        """Move the pin to `position`, which is the WAL's end: call only with the write lock held."""
        assert self._spare is not None
        _begin_read(self._spare)
        self._pin.execute("ROLLBACK")
        self._pin, self._spare = self._spare, self._pin
        self._pin_offset = position.offset
        self._pages_past_pin = 0
        self._slot0 = self._restart_allowed = False

    def _progress(self, found: Changes) -> None:
        """Frames past the pin: from now on the WAL cannot be restarted under it, wherever it sits."""
        self._pages_past_pin += len(found.pgnos)
        if self._attached:
            self._restart_allowed = False
            if found.start.offset == WAL_HEADER_SIZE:
                self._pin_offset = WAL_HEADER_SIZE

    def _release_writers(self) -> None:
        try:
            self._writer.execute("ROLLBACK")
        except sqlite3.Error:
            # The application must not wait for us for ever: a closed connection holds no lock.
            self._connections.remove(self._writer)
            self._writer.close()
            self._writer = self._connect("rw")
            self._connections.insert(0, self._writer)

    def _lock_writers(self) -> bool:
        """Take the write lock. SQLite's own back-off sleeps up to 100 ms and starves against a busy writer; this one does not."""
        self._writer.execute("PRAGMA busy_timeout=0")
        end = time.monotonic() + LOCK_BUDGET_S
        while True:
            try:
                self._writer.execute("BEGIN IMMEDIATE")
                return True
            except sqlite3.OperationalError:
                if self._writer.in_transaction:  # begun, and reported as failed
                    self._release_writers()
                    return False
                if time.monotonic() > end:
                    return False
                time.sleep(LOCK_RETRY_S)

    # -- reading -----------------------------------------------------------------------------------------------------------------

    def wal_size(self) -> int:
        """Return the length of the `-wal` file in bytes: an upper bound of what it holds."""
        try:
            return os.stat(self._wal_path).st_size
        except FileNotFoundError:
            return 0

    @contextlib.contextmanager
    def wal(self) -> Iterator[WALFile | None]:
        """Give the WAL for reading; None when there is none. It stays open, as in SQLite's own connections; `replaced` says when another stands there."""
        if self._wal is None:
            try:
                self._wal = WALFile(self._wal_path)
            except FileNotFoundError:
                yield None
                return
            self._wal_identity = self._wal.identity
        yield self._wal

    def observe(self, position: WALPosition, wal: WALFile | None) -> Decision:
        """Compare the WAL with the position of the last sync."""
        last: FrameHeader | None = None
        if wal is not None and position.offset > frame_size(self.page_size):
            last = wal.frame_header(position.offset - frame_size(self.page_size))
        # After the frame: a restart writes the header before it overwrites frames. So while the header is the old one, the frame was, too.
        header = wal.header() if wal else None
        proven = self._attached and self._restart_allowed
        return decide(position, header, last, page_size=self.page_size, restart_proven=proven)

    def changes(self, position: WALPosition, wal: WALFile, *, limit: int | None = None) -> Changes | None:
        """Read what was committed after `position`, which `observe` found to lie in the current WAL."""
        header = wal.header()
        if header is None or (header.salt1, header.salt2) != position.salts:
            return None
        found = wal.changes(position, page_size=self.page_size, big_endian=header.big_endian, limit=limit)
        if found is not None:
            self._progress(found)
        self._doubtful = wal.wrong_frame
        return found

    def image(self) -> Image:
        """Return the state at the end of the WAL. Valid while the pin is held and until the next checkpoint of ours.

        Raises:
            DatabaseStateError: the WAL was restarted again and again meanwhile, which a held pin forbids.
        """
        for _ in range(4):
            with self.wal() as wal:
                header = wal.header() if wal else None
                if wal is None or header is None:
                    commit = int(self._pin.execute("PRAGMA page_count").fetchone()[0])
                    if self.wal_header() == header:
                        self._doubtful = False
                        return Image(NO_WAL, self.page_size, commit, {})
                    continue
                start = start_of(header)
                found = wal.changes(start, page_size=self.page_size, big_endian=header.big_endian, keep=False)
                if found is None:
                    commit = int(self._pin.execute("PRAGMA page_count").fetchone()[0])
                    image = Image(start, self.page_size, commit, {})
                else:
                    overlay = dict(zip(found.pgnos.tolist(), found.offsets.tolist(), strict=True))
                    image = Image(found.end, self.page_size, found.commit, overlay)
                if self.wal_header() == header:
                    self._doubtful = wal.wrong_frame
                    return image
        raise DatabaseStateError(f"the WAL of {self.path} keeps changing under a held read transaction; are SQLite's locks intact?")

    def overlay(self, position: WALPosition) -> dict[int, int]:
        """Return the byte offsets of the newest images in the current WAL up to `position`."""
        if not position.has_wal:
            return {}
        with self.wal() as wal:
            header = wal.header() if wal else None
            if wal is None or header is None or (header.salt1, header.salt2) != position.salts:
                return {}  # restarted: all of it is in the file
            found = wal.changes(
                start_of(header), page_size=self.page_size, big_endian=header.big_endian, stop_at=position.offset, keep=False
            )
            return dict(zip(found.pgnos.tolist(), found.offsets.tolist(), strict=True)) if found else {}

    def pages(self, first: int, count: int, overlay: dict[int, int], salts: tuple[int, int]) -> bytes | bytearray:
        """Return `count` pages from `first` on, of the state that `overlay` belongs to; the lock page reads as zeros.

        A WAL that was restarted meanwhile had been copied completely, so that the file has what the overlay had.
        """
        size, lock = self.page_size, lock_pgno(self.page_size)
        stored = os.pread(self._file, count * size, (first - 1) * size)
        inside = [pgno for pgno in range(first, first + count) if pgno in overlay] if overlay else []
        if not inside and len(stored) == count * size and not first <= lock < first + count:
            return stored
        data = bytearray(stored)
        data.extend(bytes(count * size - len(data)))
        if inside:
            images: list[tuple[int, bytes]] = []
            with self.wal() as wal, contextlib.suppress(FormatError):
                if wal is not None:
                    images = [(pgno, wal.page(overlay[pgno], size)) for pgno in inside]
                    header = wal.header()
                    if header is None or (header.salt1, header.salt2) != salts:
                        images = []
            if not images:
                return self.pages(first, count, {}, salts)
            for pgno, image in images:
                at = (pgno - first) * size
                data[at : at + size] = image
        if first <= lock < first + count:
            at = (lock - first) * size
            data[at : at + size] = bytes(size)
        return data

    def chunks(self, image: Image) -> Iterator[tuple[int, bytes | bytearray]]:
        """Yield (first page number, bytes) of all pages of an image, in order, about a mebibyte at a time."""
        step = max(1, IMAGE_CHUNK_BYTES // self.page_size)
        for first in range(1, image.commit + 1, step):
            yield first, self.pages(first, min(step, image.commit - first + 1), image.overlay, image.position.salts)

    def salts_are(self, salts: tuple[int, int]) -> bool:
        """True while the WAL has these salts, so that nothing that was read from it before can have been overwritten."""
        header = self.wal_header()
        return header is not None and (header.salt1, header.salt2) == salts

    def _is_in_wal_of(self, position: WALPosition) -> bool:
        """True while a position's WAL is the current one, or there was none and is none."""
        return self.salts_are(position.salts) if position.has_wal else self.wal_header() is None

    def wal_header(self) -> WALHeader | None:
        """Return the header of the WAL as it is now; None when there is no valid one."""
        with self.wal() as wal:
            return wal.header() if wal else None

    # -- checkpoint --------------------------------------------------------------------------------------------------------------

    def restart_damaged_wal(self) -> None:
        """Copy all frames and empty the WAL: only SQLite knows them all. What was synced before proves nothing any more.

        Raises:
            DatabaseStateError: others are reading or writing; call again.
        """
        self._unpin()
        self._checkpointer.execute(f"PRAGMA busy_timeout={int(LOCK_BUDGET_S * 1000)}")  # writers wait while it waits for readers
        busy, _, _ = self._checkpointer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        if busy:
            raise DatabaseStateError(f"the WAL is damaged, and cannot be emptied while others read or write: {self.path}")

    def settle(self, position: WALPosition, before_move: Callable[[Changes], None]) -> Checkpoint:
        """Move a pin that may sit in slot 0 to a slot > 0, so that others may copy again. Does nothing when that is not needed."""
        # Until the WAL was restarted, or begun, there is nothing to copy that others could miss.
        if not self._slot0 or (self._restart_allowed and self._is_in_wal_of(position)):
            return Checkpoint(False, False, False, None, position, 0.0)
        return self._under_lock(position, before_move, move_only=True)

    def checkpoint(self, position: WALPosition, before_move: Callable[[Changes], None], *, copy_first: bool) -> Checkpoint:
        """Copy the whole WAL into the database file, so that the next writer restarts it. See the module's docstring.

        Args:
            position: everything up to here is synced.
            before_move: called with what was read past it, before anybody may copy it.
            copy_first: when many pages are to be copied, copy them while writers go on, and leave the rest to the next call. Not when
                others checkpoint as well: they collide.
        """
        is_pass = copy_first and self._pages_past_pin > COPY_PASS_PAGES
        result = self._under_lock(position, before_move, move_only=is_pass, flush=True)
        if not is_pass or not result.moved:
            return result
        busy, _, _ = self._checkpointer.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
        return replace(result, contended=busy != 0, goes_on=True)

    def _read_ahead(self, position: WALPosition, *, flush: bool) -> list[Changes]:
        """Read what is behind the position while writers go on, until little is left, or it is too much to keep.

        `flush`: both files, so that little is left of that, too; again as long as that makes it less. (A writer may be faster than the disk.)
        """
        ahead: list[Changes] = []
        end, kept, flushed_to, unflushed = position, 0, 0, math.inf
        if flush:
            sync_data(self._file)  # what copying passes wrote, ours and others'
        for _ in range(AHEAD_ROUNDS):
            with self.wal() as wal:
                decision = self.observe(end, wal)
                if wal is None or not isinstance(decision, Continue) or (ahead and decision.position != end):
                    break
                since = decision.position.offset - flushed_to
                if flush and FLUSH_BYTES < since < unflushed * FLUSH_GAIN:
                    flushed_to, unflushed = decision.position.offset, since
                    wal.flush()
                elif ahead and ahead[-1].frames < FEW_FRAMES:
                    break
                found = self.changes(decision.position, wal, limit=LOCKED_READ_BYTES)
            if found is None or found.data is None:
                break
            ahead.append(found if self._keeps_frames else found.packed())
            end, kept = found.end, kept + len(ahead[-1].data or b"")
            if kept > AHEAD_BYTES:
                break
        return ahead

    def _under_lock(
        self, position: WALPosition, before_move: Callable[[Changes], None], *, move_only: bool, flush: bool = False
    ) -> Checkpoint:
        if move_only:
            self._ensure_spare()  # here, where nobody waits for it yet
        else:
            _ = self._checkpointer
        ahead = self._read_ahead(position, flush=flush)
        if sum(len(part.data or b"") for part in ahead) > AHEAD_BYTES:  # the ordinary sync takes it
            return Checkpoint(False, False, False, None, position, 0.0, goes_on=True)
        for part in ahead:
            before_move(part)  # what is saved twice is saved once
        if not self._lock_writers():
            return Checkpoint(False, False, True, None, position, 0.0)
        locked = time.monotonic()
        try:
            result = self._move(ahead[-1].end if ahead else position, before_move, move_only=move_only)
        finally:
            self._release_writers()
        locked_s = time.monotonic() - locked
        if result is None:  # what was read is read again
            return Checkpoint(False, False, False, None, position, locked_s, goes_on=True)
        tails = [*ahead, result.tail] if result.tail is not None else ahead
        tail = joined(tails, pack=any(part.places is not None for part in tails)) if tails else None
        return replace(result, tail=tail, locked_s=locked_s)

    def _move(self, position: WALPosition, before_move: Callable[[Changes], None], *, move_only: bool) -> Checkpoint | None:
        """Do what needs the write lock; None, with nothing done, where the WAL cannot be read to its end now."""
        with self.wal() as wal:
            decision = self.observe(position, wal)
            if wal is None or not isinstance(decision, Continue):
                return None
            tail = self.changes(decision.position, wal, limit=LOCKED_READ_BYTES)
        if tail is not None and (tail.more or tail.data is None):  # too much to hold back writers for
            return None
        position = tail.end if tail is not None else decision.position
        if tail is not None:
            before_move(tail)
        if move_only:
            # Past its beginning the pin is certain to get a slot > 0: nobody can have copied further than the old pin.
            moved = position.offset > max(self._pin_offset, WAL_HEADER_SIZE)
            if moved:
                self._move_pin(position)
            return Checkpoint(False, moved, False, tail, position, 0.0)
        self._unpin()
        try:
            busy, total, copied = self._copy_all()
        finally:
            self.pin()
        frames = (position.offset - WAL_HEADER_SIZE) // frame_size(self.page_size)
        # Fewer are possible: somebody has restarted the WAL in the shared index, and no writer has written its header yet.
        if total > frames:
            reason = f"SQLite counts {total} frames in the WAL, of which {frames} can be read"
            return Checkpoint(False, True, False, None, position, 0.0, lost=reason)
        return Checkpoint(busy == 0 and total == copied, True, busy != 0, tail, position, 0.0, pinned=True)

    def _copy_all(self) -> tuple[int, int, int]:
        """Copy the WAL, under the write lock: (busy, frames, frames copied). An application's own checkpoint, which it began before, comes to its end first."""
        end = time.monotonic() + OTHERS_BUDGET_S
        while True:
            busy, total, copied = self._checkpointer.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
            if not busy or time.monotonic() > end:
                return busy, total, copied
            time.sleep(OTHERS_RETRY_S)


def has_wal_reset_bug(version: tuple[int, ...]) -> bool:
    """True for versions of SQLite in which checkpoints of several connections, one right after the other, can damage a database.

    A checkpoint of ours alone cannot: nobody writes meanwhile. Source: sqlite.org, "Write-Ahead Logging", the WAL-reset bug.
    """
    return (3, 7, 0) <= version < (3, 51, 3)


def _identity(name: str) -> tuple[int, int] | None:
    try:
        found = os.stat(name)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def _begin_read(connection: sqlite3.Connection) -> None:
    if connection.in_transaction:  # left over from an attempt that failed half-way
        connection.execute("ROLLBACK")
    connection.execute("BEGIN")
    connection.execute("PRAGMA user_version").fetchone()
