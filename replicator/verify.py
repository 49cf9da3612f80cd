"""Do a database and its replica agree, and does what is stored come back healthy?

A *drill* restores a state into a temporary file (which checks every stored byte on the way), lets SQLite check it, and computes the checksum of
each page. That is compared twice:

* with the **page table**: is what the replica holds at TXID n what was replicated as TXID n? One number, the XOR of all page checksums.
* with the **database itself**, page by page, under a read transaction. Pages that the WAL holds past the point up to which the table has come
  may differ: they are on their way. Every other difference is a finding.

`verify` does both for a database that may be in use, by a replicator in another process, too. Inside a `Replicator` the engine keeps the table
in step with the database, and a drill on a schedule is compared with the table alone.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from replicator import livefile
from replicator.chain import Progress
from replicator.db import Database, Image
from replicator.errors import (
    DatabaseNotFound,
    DatabaseStateError,
    IntegrityCheckFailed,
    NotADatabase,
    NotWALMode,
    RestoreError,
    TXIDNotAvailable,
)
from replicator.format.checksum import page_checksum
from replicator.format.ltx import TXID
from replicator.format.sqlite import SQLITE_MAGIC, lock_pgno
from replicator.pagetable import PageTable, TableState
from replicator.restorer import restore_database
from replicator.storage.base import ReplicaClient

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Drill", "Finding", "Verdict", "drill", "is_running", "metadata_folder", "refuse_unusable", "room", "verify"]

READ_BYTES = 1 << 20
ATTEMPTS = 3
POLL_S = 0.2
PREFIX = ".pyrepl-drill-"
DISK_RESERVE_BYTES = 64 << 20

Finding = Literal["agrees", "behind", "differs", "damaged"]


@dataclass(frozen=True, slots=True)
class Drill:
    """A state that was restored and checked. `checksums`: of page 1, 2, ...; 0 for the lock page. `xor`: of all of them."""

    txid: TXID
    page_size: int
    commit: int
    checksums: NDArray[np.uint64]
    bytes_read: int

    @property
    def xor(self) -> int:
        import numpy as np

        return int(np.bitwise_xor.reduce(self.checksums))


@dataclass(frozen=True, slots=True)
class Verdict:
    """What `verify` found.

    Attributes:
        finding: "agrees"; "behind": the replica is right, but lacks what was committed since; "differs": it does not hold what was
            replicated, or the database has pages that nobody replicated; "damaged": it cannot be restored, or not healthily.
        txid: the state that was restored; 0 when none could be, and for the 0.3 format, where `position` says it (see `v3verify`).
        pages: of that state.
        differing: pages of the database that are not those of the replica, `in_wal` those of them that are in the WAL and on their way.
        reason: for people; empty when all is well.
    """

    finding: Finding
    txid: TXID
    pages: int
    differing: int
    in_wal: int
    duration_s: float
    reason: str = ""
    position: str = ""

    @property
    def is_ok(self) -> bool:
        return self.finding == "agrees"


def drill(
    client: ReplicaClient,
    folder: Path,
    *,
    txid: TXID | None = None,
    quick: bool = False,
    needs_bytes: int = 0,
    progress: Callable[[Progress], None] | None = None,
) -> Drill:
    """Restore into a temporary file in `folder`, check, and remove it again.

    Args:
        needs_bytes: size of the database; a disk that has no room for it is an error, because the last of it belongs to the application.

    Raises:
        OSError: no room.
        RestoreError, StorageError: it does not come back; `IntegrityCheckFailed` when SQLite finds fault with it.
    """
    with room(folder, needs_bytes) as path:
        result = restore_database(client, path, txid=txid, integrity_check="quick" if quick else "full", progress=progress)
        with path.open("rb") as file:
            sums = _checksums(_chunks(file.fileno(), result.page_size), result.page_size, result.commit)
        return Drill(result.txid, result.page_size, result.commit, sums, result.bytes_read)


def verify(
    path: Path,
    client: ReplicaClient,
    *,
    meta_path: Path | None = None,
    quick: bool = False,
    timeout_s: float = 30.0,
    progress: Callable[[Progress], None] | None = None,
) -> Verdict:
    """Compare a database with one of its replicas. Nothing is changed; a replicator may be running.

    Args:
        path: of the database, which must be in WAL mode.
        meta_path: folder of the local state; `.<name>-litestream` beside the database when not given.
        quick: SQLite's quick_check in the place of integrity_check.
        timeout_s: how long to wait for a replica that lags.

    Raises:
        DatabaseStateError: the database cannot be read.
        StorageError: the replica cannot be read.
    """
    started = time.monotonic()
    path = Path(os.path.realpath(path))
    refuse_unusable(path)
    folder = metadata_folder(path, meta_path)
    verdict = None
    for attempt in range(ATTEMPTS):
        verdict = _compare(path, client, folder, quick, started + timeout_s, progress, started)
        # What is committed between two looks can make a difference that is none; damage and agreement stay.
        if verdict.finding in ("agrees", "damaged") or attempt == ATTEMPTS - 1:
            break
    assert verdict is not None
    return verdict


def _compare(
    path: Path,
    client: ReplicaClient,
    folder: Path,
    quick: bool,
    end: float,
    progress: Callable[[Progress], None] | None,
    started: float,
) -> Verdict:
    def verdict(finding: Finding, reason: str, found: Drill | None = None, differing: int = 0, in_wal: int = 0) -> Verdict:
        txid, pages = (found.txid, found.commit) if found else (TXID(0), 0)
        return Verdict(finding, txid, pages, differing, in_wal, time.monotonic() - started, reason)

    while True:
        state = PageTable.read_state(folder / "pages")
        wanted = state.txid if state is not None and state.txid else None
        try:
            place = folder if folder.is_dir() else path.parent
            found = drill(client, place, txid=wanted, quick=quick, needs_bytes=path.stat().st_size, progress=progress)
        except TXIDNotAvailable as error:
            if time.monotonic() < end:
                time.sleep(POLL_S)  # the replica lags, or the state was merged away meanwhile
                continue
            return verdict("behind", f"the replica does not hold TXID {wanted or 0:016x}, which was replicated or staged: {error}")
        except IntegrityCheckFailed as error:
            return verdict("damaged", str(error))
        except RestoreError as error:
            return verdict("damaged", str(error))
        break
    if state is not None and wanted and (state.xor, state.commit) != (found.xor, found.commit):
        return verdict("differs", f"TXID {found.txid:016x} of the replica is not what was replicated under it", found)
    differing, in_wal, unexplained, restarted = _differences(path, found, state)
    if not differing:
        return verdict("agrees", "", found)
    if unexplained and state is not None and not restarted:
        text = f"{unexplained} pages of the database are neither what was replicated as TXID {found.txid:016x} nor in the WAL since"
        return verdict("differs", text, found, differing, in_wal)
    if unexplained:
        return verdict(
            "behind", f"{unexplained} pages were changed since TXID {found.txid:016x}, and are not replicated", found, differing, in_wal
        )
    if not is_running(folder):
        text = f"{in_wal} pages were changed since TXID {found.txid:016x}, and no replicator is running"
        return verdict("behind", text, found, differing, in_wal)
    return verdict("agrees", "", found, differing, in_wal)


def metadata_folder(path: Path, meta_path: Path | None) -> Path:
    """Return where the engine's local state of a database is, or would be."""
    return (meta_path if meta_path is not None else path.with_name(f".{path.name}-litestream")) / "pyrepl"


def is_running(folder: Path) -> bool:
    """Say whether an engine works with the local state in `folder`, in whatever process."""
    try:
        file = os.open(folder / "lock", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(file)
    return False


def _differences(path: Path, found: Drill, state: TableState | None) -> tuple[int, int, int, bool]:
    """Return how many pages of the database differ, how many of those are in the WAL past the table's position, how many are not, and
    whether the WAL was restarted since.
    """
    import numpy as np

    database = Database(path)
    database.open()
    try:
        image = database.image()
        new, restarted = _pages_since(database, image, state)
        size = image.page_size
        if size != found.page_size:
            return image.commit, 0, image.commit, True
        sums = _checksums((bytes(data) for _, data in database.chunks(image)), size, image.commit)
    finally:
        database.close()
    common = min(len(sums), len(found.checksums))
    differing = set((np.nonzero(sums[:common] != found.checksums[:common])[0] + 1).tolist())
    differing |= set(range(common + 1, max(len(sums), len(found.checksums)) + 1))
    explained = {pgno for pgno in differing if pgno in new or pgno > image.commit}
    if len(sums) != len(found.checksums) and not new:
        explained = set()
    return len(differing), len(explained), len(differing - explained), restarted


def _pages_since(database: Database, image: Image, state: TableState | None) -> tuple[set[int], bool]:
    """Return the pages in the WAL past the table's position, and whether the WAL is another one than the table knew."""
    if state is None or not image.position.has_wal:
        return set(), state is not None and state.position.has_wal
    if image.position.salts != state.position.salts:
        return set(image.overlay), True
    start = state.position.offset
    return {pgno for pgno, offset in image.overlay.items() if offset >= start}, False


def refuse_unusable(path: Path) -> None:
    """Refuse a database that opening would change, or that cannot be read. Raises `DatabaseStateError`."""
    try:
        if path.is_dir():
            raise NotADatabase(path, "a directory")
        head = os.pread(livefile.descriptor(path), 100, 0)
    except FileNotFoundError:
        raise DatabaseNotFound(path) from None
    except OSError as error:
        raise DatabaseStateError(f"cannot read the database: {path}: {(error.strerror or str(error)).lower()}") from error
    if head[:16] != SQLITE_MAGIC:
        raise NotADatabase(path)
    if head[18:20] != b"\x02\x02":
        raise NotWALMode(path, "delete")


def _checksums(chunks: Iterator[bytes], page_size: int, commit: int) -> NDArray[np.uint64]:
    import numpy as np

    sums = np.zeros(commit, dtype=np.uint64)
    skip, pgno = lock_pgno(page_size), 0
    for data in chunks:
        view = memoryview(data)
        for at in range(0, len(data), page_size):
            pgno += 1
            if pgno != skip and pgno <= commit:
                sums[pgno - 1] = page_checksum(pgno, view[at : at + page_size])
    return sums


def _chunks(file: int, page_size: int) -> Iterator[bytes]:
    size, at = max(1, READ_BYTES // page_size) * page_size, 0
    while data := os.pread(file, size, at):
        at += len(data)
        yield data


@contextlib.contextmanager
def room(folder: Path, needs_bytes: int) -> Iterator[Path]:
    """Yield a path to restore to, inside `folder`. What is there at the end is removed. Raises `OSError` when there is no room."""
    if needs_bytes and shutil.disk_usage(folder).free < needs_bytes + DISK_RESERVE_BYTES:
        raise OSError(errno.ENOSPC, "no room for a drill restore", str(folder))
    with _temporary_folder(folder) as inside:
        yield inside / "drill.db"


@contextlib.contextmanager
def _temporary_folder(folder: Path) -> Iterator[Path]:
    """Yield a new folder, and remove it at the end; those of processes that died are removed before."""
    for left in folder.glob(f"{PREFIX}*"):
        _remove_if_dead(left)
    while True:
        inside = Path(tempfile.mkdtemp(prefix=PREFIX, dir=folder))
        lock = os.open(inside, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            if inside.exists():
                break
        os.close(lock)  # somebody took it for a dead one's
    try:
        yield inside
    finally:
        with contextlib.suppress(OSError):
            shutil.rmtree(inside)
        os.close(lock)


def _remove_if_dead(folder: Path) -> None:
    try:
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    except BlockingIOError:
        pass
    finally:
        os.close(lock)
