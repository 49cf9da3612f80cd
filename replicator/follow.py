"""Keep a read-only copy of a replicated database up to date.

The copy is restored once; then new files are looked for at each tick, verified to their ends, and applied in place (`inplace.py`), several
small ones as one change. `<output>-txid` says how far the copy is: 16 hex digits and a newline, as Litestream writes it. It is written
after the change, so that it may be too old after a crash, never too new; applying a file twice leads to the same state.

| at a tick level 0 has, after our TXID | then |
|---|---|
| the next file | apply the files that follow each other |
| nothing | done; the other levels are looked at now and then |
| a later file, or a hundred of the next | look at all levels: `plan_follow` bridges the gap or shortens the way |

What cannot be bridged, or a replica that ends before the copy, is an error after three ticks; a file that fails its checks, a replica of
another database and a copy that somebody wrote to are errors at once. Storage that does not answer is asked again until it does.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Protocol

from replicator.atomic import sweep, sync_directory, write_file
from replicator.chain import Progress, list_files, read_file
from replicator.errors import (
    CannotResume,
    CorruptReplica,
    FormatError,
    LineageMismatch,
    NonContiguous,
    ObjectNotFound,
    ReplicaEmptied,
    StorageUnavailable,
)
from replicator.format.ltx import TXID, Decoder, FileInfo, Header, format_txid
from replicator.format.sqlite import lock_pgno
from replicator.inplace import Change, InPlace
from replicator.plan import plan_follow
from replicator.publish import IntegrityCheck, temporary_paths
from replicator.replica import read_lineage
from replicator.restorer import restore_database
from replicator.restores import announce
from replicator.storage.base import ReplicaClient

__all__ = ["Follower", "follow", "lineage_path", "read_txid", "txid_path"]

GAP_TICKS = 3
LOOK_TICKS = 60
LINEAGE_TICKS = 10
MANY_FILES = 100
MEMORY_BYTES = 1 << 20
MERGE_BYTES = 8 << 20
FEED_BYTES = 1 << 16
LONGEST_RETRY_S = 60.0
HURRY_S = 0.1

log = logging.getLogger(__name__)


def follow(
    client: ReplicaClient,
    output: Path,
    *,
    stop: threading.Event,
    interval_s: float = 1.0,
    force: bool = False,
    integrity_check: IntegrityCheck = "none",
    parallelism: int = 8,
    progress: Callable[[Progress], None] | None = None,
    applied: Callable[[TXID], None] | None = None,
    restores_folder: Path | None = None,
    hurry: threading.Event | None = None,
) -> TXID | None:
    """Keep `output` up to date until `stop` is set, and return its TXID; None when it was stopped before the copy was there.

    A copy that was followed before is continued. This process must not open the output through `sqlite3` meanwhile, and nobody may write
    to it.

    Args:
        force: replace a database that cannot be continued.
        integrity_check, parallelism, progress: of the first restore, see `restore_database`.
        applied: called with the TXID after the first restore and after each change.
        restores_folder: see `restore_database`.
        hurry: while it is set, look for new files each `HURRY_S`.

    Raises:
        CannotResume: a database stands at the output, and no file says its TXID.
        CopyChanged, CopyInUse: somebody else writes to the copy.
        NonContiguous, ReplicaEmptied, LineageMismatch: the replica does not lead on from the copy's TXID.
        CorruptReplica, OutputExists, NoBackups, StorageError, OSError: see there.
    """
    output = Path(os.path.realpath(output))

    def watch(state: Progress) -> None:
        if stop.is_set():
            raise _Stopped
        if progress is not None:
            progress(state)

    try:
        txid = _find_txid(output, force)
        if txid is None:
            txid = _begin(client, output, force, integrity_check, parallelism, watch, restores_folder)
            if applied is not None:
                applied(txid)
        else:
            log.info("resuming follow mode replica=%s txid=%s output=%s", client.kind, format_txid(txid), output)
    except _Stopped:
        return None
    with InPlace(output) as copy:
        follower = Follower(client, copy, txid, applied=applied, restores_folder=restores_folder)
        log.info(
            "entering follow mode replica=%s output=%s txid=%s interval=%gs", client.kind, output, format_txid(follower.txid), interval_s
        )
        follower.run(stop, interval_s, hurry)
        log.info("follow mode stopped replica=%s txid=%s", client.kind, format_txid(follower.txid))
        return follower.txid


def txid_path(output: Path) -> Path:
    """Return the path of the file that says which TXID a copy is at."""
    return output.with_name(f"{output.name}-txid")


def read_txid(output: Path) -> TXID | None:
    """Return the TXID of a copy; None when there is no file that says it. Raises `CannotResume`."""
    try:
        with txid_path(output).open("rb") as file:
            text = file.read(100)
    except FileNotFoundError:
        return None
    if not re.fullmatch(rb"[0-9a-f]{16}\n?", text) or not int(text, 16):
        raise CannotResume(output, "the -txid file is not readable")
    return TXID(int(text, 16))


def lineage_path(output: Path) -> Path:
    """Return the path of the file that says of which history a copy is: TXIDs of another one mean something else."""
    return output.with_name(f"{output.name}-lineage")


def _read_lineage(output: Path) -> bytes | None:
    """None for a copy that Litestream began, which knows no lineages: the first one that is seen is taken."""
    try:
        text = lineage_path(output).read_text(errors="replace").strip()
    except FileNotFoundError:
        return None
    if not re.fullmatch(r"[0-9a-f]{32}", text):
        raise CannotResume(output, "the -lineage file is not readable")
    return bytes.fromhex(text)


def _write_lineage(output: Path, lineage: bytes) -> None:
    write_file(lineage_path(output), f"{lineage.hex()}\n".encode(), mode=output.stat().st_mode & 0o666)


def _find_txid(output: Path, force: bool) -> TXID | None:
    """Return where to go on, None to begin. Sweeps what killed processes left."""
    if output.parent.is_dir():
        sweep(output.parent)
    try:
        found = output.stat()
    except FileNotFoundError:
        return None
    if found.st_size == 0:
        return None
    try:
        txid = read_txid(output)
    except CannotResume:
        if not force:
            raise
        return None
    taken_back = False
    for name in _second_names(output):
        if txid is None:
            # Killed after the restore published it and before its TXID was written down: take it back.
            output.unlink(missing_ok=True)
            taken_back = True
        name.unlink(missing_ok=True)
    if txid is not None or taken_back:
        return txid
    if not force:
        raise CannotResume(output, "database exists but no -txid file found")
    return None


def _second_names(output: Path) -> list[Path]:
    """Return the names that a restore, killed while it published the output, left to it."""
    names = []
    for path in temporary_paths(output):
        with contextlib.suppress(FileNotFoundError):
            if path.samefile(output):
                names.append(path)
    return names


def _begin(
    client: ReplicaClient,
    output: Path,
    force: bool,
    integrity_check: IntegrityCheck,
    parallelism: int,
    progress: Callable[[Progress], None],
    restores_folder: Path | None,
) -> TXID:
    with contextlib.suppress(FileNotFoundError):
        # Left from an earlier copy. It must never stand beside the new one.
        lineage_path(output).unlink()
    with contextlib.suppress(FileNotFoundError):
        txid_path(output).unlink()
        sync_directory(output.parent)

    def published(txid: TXID) -> None:
        try:
            _write_txid(output, txid)
        except OSError:
            output.unlink(missing_ok=True)
            raise

    result = restore_database(
        client,
        output,
        force=force,
        integrity_check=integrity_check,
        parallelism=parallelism,
        progress=progress,
        rollback_mode=True,
        published=published,
        restores_folder=restores_folder,
    )
    return result.txid


def _write_txid(output: Path, txid: TXID) -> None:
    write_file(txid_path(output), f"{format_txid(txid)}\n".encode(), mode=output.stat().st_mode & 0o666)


class _Stopped(Exception):
    pass


class Follower:
    """A copy and the replica that it follows. `txid` is the state that the copy is in."""

    def __init__(
        self,
        client: ReplicaClient,
        copy: InPlace,
        txid: TXID,
        *,
        applied: Callable[[TXID], None] | None = None,
        restores_folder: Path | None = None,
    ) -> None:
        self.txid = txid
        self._client, self._copy, self._applied, self._restores_folder = client, copy, applied, restores_folder
        self._lineage = _read_lineage(copy.path)
        self._ticks = 0
        self._failed = 0
        self._outages = 0

    def run(self, stop: threading.Event, interval_s: float, hurry: threading.Event | None = None) -> None:
        """Tick until stopped."""
        if not self._copy.leave_wal_mode(stop):
            return
        delay_s = 0.0
        while not stop.wait(delay_s):
            self.try_tick(stop)
            at_most_s = HURRY_S if hurry is not None and hurry.is_set() else interval_s
            delay_s = min(min(interval_s, at_most_s) * 2 ** min(self._outages, 20), max(interval_s, LONGEST_RETRY_S))

    def try_tick(self, stop: threading.Event) -> None:
        """Tick; of what may pass by itself, raise only what does not."""
        before = self.txid
        try:
            self.tick(stop)
        except StorageUnavailable as error:
            if not self._outages:
                log.warning("follow: replica is unavailable, trying again replica=%s error=%r", self._client.kind, str(error))
            self._outages += 1
            return
        except (NonContiguous, ObjectNotFound, ReplicaEmptied) as error:
            self._failed = 1 if self.txid > before else self._failed + 1
            if self._failed >= GAP_TICKS:
                raise
            log.warning("follow: no way onward, looking again replica=%s error=%r", self._client.kind, str(error))
            return
        except _Stopped:
            return
        if self._outages:
            log.info("follow: replica is available again replica=%s txid=%s", self._client.kind, format_txid(self.txid))
        self._outages = self._failed = 0

    def tick(self, stop: threading.Event) -> None:
        """Apply what is new."""
        plan = self._plan()
        if not plan:
            return
        with contextlib.closing(self._changes(plan, stop)) as changes:
            for change in changes:
                if not self._copy.apply(change, stop):
                    return
                before, self.txid = self.txid, change.txid
                _write_txid(self._copy.path, self.txid)
                log.info(
                    "follow: applied updates replica=%s from_txid=%s to_txid=%s",
                    self._client.kind, format_txid(before), format_txid(self.txid),
                )  # fmt: skip
                if self._applied is not None:
                    self._applied(self.txid)

    def _plan(self) -> Sequence[FileInfo]:
        self._ticks += 1
        new = list(self._client.list(0, seek=TXID(self.txid + 1)))
        chain: list[FileInfo] = []
        end, leaves_gap = self.txid, False
        for info in new:
            if info.min_txid > end + 1:
                leaves_gap = True
                break
            if info.max_txid > end:
                chain.append(info)
                end = info.max_txid
        if self._ticks % LINEAGE_TICKS == 1 and (chain or self._ticks == 1):
            self._check_lineage()
        # Raw files go from the oldest on: a gap behind one that follows our state says that it may be a late write of a former owner, to a name that was
        # free again. What was merged tells.
        if chain and len(chain) < MANY_FILES and not self._failed and not leaves_gap:
            return chain
        if not new and not self._failed and self._ticks % LOOK_TICKS != 1:
            return ()
        files = list_files(self._client)
        newest = max((info.max_txid for level in files.values() for info in level), default=TXID(0))
        if newest < self.txid:
            raise ReplicaEmptied(self._client.url, expected=self.txid, got=newest)
        self._check_lineage()
        return plan_follow(files, self.txid)

    def _check_lineage(self) -> None:
        lineage = read_lineage(self._client)
        if self._lineage is not None and lineage is not None and lineage != self._lineage:
            raise LineageMismatch(self._client.url, expected=self._lineage.hex(), got=lineage.hex())
        if lineage is not None and self._lineage is None:
            _write_lineage(self._copy.path, lineage)
            self._lineage = lineage

    def _changes(self, plan: Sequence[FileInfo], stop: threading.Event) -> Generator[_Change, None, None]:
        """Fetch and verify the planned files, and yield what to apply. Small files become one change, up to a bound."""
        page_size, commit, txid = self._copy.page_size, self._copy.page_count, self.txid
        merged: _Merged | None = None
        with announce(self._restores_folder) as announcement:
            announcement.plan(self._client.url, plan)
            queue = deque(plan)
            while queue:
                info = queue.popleft()
                try:
                    file = _fetch(self._client, info, page_size, commit, self._copy.path.parent, stop)
                except Exception:
                    if merged is not None:
                        yield merged  # what leads up to the bad file is good
                    raise
                with contextlib.closing(file):
                    if file.page_size != page_size and not file.is_whole:
                        if merged is not None:
                            yield merged
                            merged = None
                        plan = plan_follow(list_files(self._client), txid, image_of=info.max_txid)
                        announcement.plan(self._client.url, plan)
                        queue = deque(plan)
                        continue
                    if merged is not None and not merged.has_room_for(file):
                        yield merged
                        merged = None
                    if file.decoded_bytes > MERGE_BYTES:
                        yield file
                    else:
                        merged = merged or _Merged()
                        merged.add(file)
                    page_size, commit, txid = file.page_size, file.commit, file.txid
            if merged is not None:
                yield merged


class _Change(Change, Protocol):
    """A change, and the TXID that it leads to."""

    @property
    def txid(self) -> TXID: ...


@dataclass(slots=True)
class _File:
    """A verified file: in memory when small, else in a temporary file without a name."""

    header: Header
    stored: IO[bytes]
    page_count: int

    @property
    def txid(self) -> TXID:
        return self.header.max_txid

    @property
    def page_size(self) -> int:
        return self.header.page_size

    @property
    def commit(self) -> int:
        return self.header.commit

    @property
    def is_whole(self) -> bool:
        """True when every page is in the file, whatever its name says."""
        return self.page_count == self.commit - (lock_pgno(self.page_size) <= self.commit)

    @property
    def decoded_bytes(self) -> int:
        return self.page_count * self.page_size

    def pages(self) -> Iterator[tuple[int, bytes]]:
        decoder = Decoder()
        self.stored.seek(0)
        while data := self.stored.read(FEED_BYTES):
            for pgno, page, _ in decoder.feed(data):
                yield pgno, page

    def close(self) -> None:
        self.stored.close()


@dataclass(slots=True)
class _Merged:
    """Several files as one change: of each page the newest."""

    txid: TXID = field(default=TXID(0))
    page_size: int = 0
    commit: int = 0
    table: dict[int, bytes] = field(default_factory=dict)

    def has_room_for(self, file: _File) -> bool:
        return file.page_size == self.page_size and len(self.table) * self.page_size + file.decoded_bytes <= MERGE_BYTES

    def add(self, file: _File) -> None:
        if file.commit < self.commit:
            self.table = {pgno: page for pgno, page in self.table.items() if pgno <= file.commit}
        self.table.update(file.pages())
        self.txid, self.page_size, self.commit = file.txid, file.page_size, file.commit

    def pages(self) -> Iterator[tuple[int, bytes]]:
        return ((pgno, self.table[pgno]) for pgno in sorted(self.table))


def _fetch(client: ReplicaClient, info: FileInfo, page_size: int, commit: int, folder: Path, stop: threading.Event) -> _File:
    """Read one file to its end and check all that can be checked, before anything of it is used.

    Args:
        page_size, commit: of the database that it will be applied to.
        folder: of the temporary file, if it needs one.
    """
    stored = tempfile.SpooledTemporaryFile(max_size=MEMORY_BYTES, dir=str(folder))  # noqa: SIM115 - it lives as long as the value
    try:
        header, count, grown = _verify(client, info, stored, commit, stop)
        if (header.min_txid, header.max_txid) != (info.min_txid, info.max_txid):
            raise FormatError("the header's TXIDs are not those of the name")
        if header.commit == 0:
            raise FormatError("it leaves no page")
        expected = header.commit - commit - (commit < lock_pgno(page_size) <= header.commit)
        if header.page_size == page_size and header.commit > commit and grown != expected:
            raise FormatError(f"the database grows by {expected} pages, and {grown} of them are in the file")
        return _File(header, stored, count)
    except FormatError as error:
        stored.close()
        raise CorruptReplica(f"{client.url} level {info.level} {info.name}", str(error)) from error
    except BaseException:
        stored.close()
        raise


def _verify(client: ReplicaClient, info: FileInfo, stored: IO[bytes], commit: int, stop: threading.Event) -> tuple[Header, int, int]:
    """Copy a file while it is decoded; return its header, its number of pages, and how many of them lie beyond `commit`."""
    decoder = Decoder()
    count = grown = 0

    def pause(seconds: float) -> None:
        stop.wait(seconds)

    for data in read_file(client, info, sleep=pause):
        stored.write(data)
        for at in range(0, len(data), FEED_BYTES):
            if stop.is_set():
                raise _Stopped
            pages = decoder.feed(data[at : at + FEED_BYTES])
            count += len(pages)
            if pages and pages[-1][0] > commit:
                grown += sum(1 for pgno, _, _ in pages if pgno > commit)
    decoder.close()
    assert decoder.header is not None
    return decoder.header, count, grown
