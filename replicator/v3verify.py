"""Do a database and its 0.3 replica agree? As `verify`, without a page table, because the position of what is stored needs none.

The replica's newest state is restored into a temporary file, which checks every byte on the way, and SQLite checks the file. The restore ends
with a position: salts, offset and running checksum of the last committed frame. Found in the live WAL, they prove that everything before
it is the same history. Then what the database was at that very position is known page by page, under a read transaction: the newest frame of
the page up to the position, else the page in the file. It is compared with the restored one, a mebibyte at a time.

Pages in frames past the position are on their way, and are not compared: somebody may have copied the newer image to the file. (Where the old one
is in the WAL, the checksums have shown that it is the replica's.)

| the position | pages that cannot be explained | finding |
|---|---|---|
| is in the live WAL | none | agrees; behind, when frames past it are not sent in time |
| is in the live WAL | some | differs |
| is not: the WAL was restarted or removed since | none | as above, with all frames of the WAL past it |
| is not | some | behind: they were written since, or damaged; nobody can tell |

While a replicator runs, all but the clear cases change by themselves, since it sends what the WAL holds: the replica is read again when it has news,
until the time is over. Where the WAL is restarted faster than the replica can be restored, the database is pinned before the later restores: then the
WAL is restarted once at most, and nothing newer than the pin gets into the file.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from replicator.chain import Progress, list_files
from replicator.db import Database, Image
from replicator.errors import AccessDenied, RestoreError
from replicator.format.ltx import TXID
from replicator.format.sqlite import lock_pgno
from replicator.format.v3 import Position
from replicator.publish import restore_into
from replicator.replay import Replayed
from replicator.restores import Announcement
from replicator.storage.base import ReplicaClient
from replicator.storage.v3 import V3Client, v3_client
from replicator.tail import Continue, WALPosition
from replicator.v3plan import Generation, V3Plan, choose_format, plan_beside_ltx, plan_v3
from replicator.v3restore import list_generations, write_v3
from replicator.verify import Finding, Verdict, is_running, metadata_folder, refuse_unusable, room, verify

__all__ = ["verify_any"]

POLL_S = 0.5
UNPINNED_TRIES = 2

Plan = Callable[[str, Sequence[Generation]], V3Plan]


def verify_any(
    path: Path,
    client: ReplicaClient,
    *,
    meta_path: Path | None = None,
    quick: bool = False,
    timeout_s: float = 30.0,
    progress: Callable[[Progress], None] | None = None,
) -> Verdict:
    """Compare a database with the data that a restore of the newest state takes, LTX or 0.3. Otherwise as `verify.verify`."""
    v3 = v3_client(client)
    plan = _planner(v3, client) if v3 is not None else None
    if v3 is None or plan is None:
        return verify(path, client, meta_path=meta_path, quick=quick, timeout_s=timeout_s, progress=progress)
    path = Path(os.path.realpath(path))
    refuse_unusable(path)
    return _Comparing(path, v3, plan, metadata_folder(path, meta_path), quick, progress).verdict(timeout_s)


def _planner(v3: V3Client, client: ReplicaClient) -> Plan | None:
    """Return by which rules the newest 0.3 state is restored; None when the LTX files are newer."""
    try:
        generations = list_generations(v3)
    except AccessDenied:
        return None
    files = list_files(client)
    if not generations or choose_format(generations, files) != "0.3":
        return None
    return plan_beside_ltx if any(files.values()) else plan_v3


@dataclass(frozen=True, slots=True)
class _Found:
    """What one look found. `past`: pages in the WAL past the position; `unexplained`: others that differ."""

    plan: V3Plan
    state: Replayed
    in_place: bool
    past: int
    unexplained: int

    @property
    def position(self) -> str:
        return str(Position(self.plan.generation, self.state.index, self.state.wal.offset))


def _judge(found: _Found, *, running: bool, wanted: WALPosition) -> tuple[Finding, str]:
    """Return what was found, and why. `wanted`: the end of the WAL when the question was asked."""
    if found.unexplained and found.in_place:
        return "differs", f"{found.unexplained} pages of the database are not what the replica holds for {found.position}"
    if found.unexplained:
        return "behind", f"{found.unexplained} pages were changed since {found.position}, and are not replicated, or are damaged"
    at = found.state.wal
    reached = found.in_place and (at.salts != wanted.salts or at.offset >= wanted.offset)
    if not found.past or (running and reached):
        return "agrees", ""
    why = "the replica does not get on" if running else "no replicator is running"
    return "behind", f"{found.past} pages were changed since {found.position}, and {why}"


class _Comparing:
    """One call of `verify_any`."""

    def __init__(
        self, path: Path, v3: V3Client, plan: Plan, folder: Path, quick: bool, progress: Callable[[Progress], None] | None
    ) -> None:
        self._path, self._v3, self._plan, self._folder, self._quick, self._progress = path, v3, plan, folder, quick, progress

    def verdict(self, timeout_s: float) -> Verdict:
        started = time.monotonic()
        try:
            return self._settle(started, started + timeout_s)
        except RestoreError as error:
            return Verdict("damaged", TXID(0), 0, 0, 0, time.monotonic() - started, str(error))

    def _settle(self, started: float, end: float) -> Verdict:
        wanted, tries = self._live_end(), 0
        while True:
            tries += 1
            found = self._look(pinned=tries > UNPINNED_TRIES)
            running = is_running(self._folder)
            finding, reason = _judge(found, running=running, wanted=wanted)
            settled = finding == "agrees" or not running or (found.in_place and not found.past)
            if settled or not self._has_news(found.plan, end):
                pages, differing = found.state.commit, found.unexplained + found.past
                return Verdict(finding, TXID(0), pages, differing, found.past, time.monotonic() - started, reason, found.position)

    def _live_end(self) -> WALPosition:
        database = Database(self._path)
        try:
            database.open()
            return database.image().position
        finally:
            database.close()

    def _has_news(self, plan: V3Plan, end: float) -> bool:
        """Wait until the replica's newest state is another one. False: that does not come in time."""
        while time.monotonic() < end:
            if self._plan(self._v3.url, list_generations(self._v3)).files[-1].name != plan.files[-1].name:
                return True
            time.sleep(POLL_S)
        return False

    def _look(self, *, pinned: bool) -> _Found:
        place = self._folder if self._folder.is_dir() else self._path.parent
        database = Database(self._path)
        try:
            if pinned:
                database.open()
            with room(place, self._path.stat().st_size) as output:
                plan, state = self._restore(output)
                if not pinned:
                    database.open()
                with output.open("rb") as file:
                    in_place, past, unexplained = _differences(database, file.fileno(), state)
            return _Found(plan, state, in_place, past, unexplained)
        finally:
            database.close()

    def _restore(self, output: Path) -> tuple[V3Plan, Replayed]:
        def fill(file: int, announcement: Announcement) -> tuple[V3Plan, Replayed]:
            plan = self._plan(self._v3.url, list_generations(self._v3))
            announcement.plan_generation(self._v3.url, plan.generation, plan.snapshot.index)
            return plan, write_v3(self._v3, plan, file, folder=output.parent, progress=self._progress)

        return restore_into(output, fill, integrity_check="quick" if self._quick else "full")


def _differences(database: Database, restored: int, state: Replayed) -> tuple[bool, int, int]:
    """Compare the restored file with what the database was at its position.

    Returns whether that position is in the live WAL, how many pages are in frames past it, and how many others differ.
    """
    image = database.image()
    if image.page_size != state.page_size:
        return False, 0, image.commit
    with database.wal() as wal:
        decision = database.observe(state.wal, wal) if wal is not None else None
    in_place = isinstance(decision, Continue) and state.wal.has_wal
    known = database.overlay(state.wal) if in_place else {}
    past = {pgno for pgno, offset in image.overlay.items() if not in_place or offset >= state.wal.offset}
    size, skip = image.page_size, lock_pgno(image.page_size)
    unexplained = 0 if past else abs(image.commit - state.commit)
    then = Image(state.wal, size, min(state.commit, image.commit), known)
    for first, data in database.chunks(then):
        theirs = os.pread(restored, len(data), (first - 1) * size)
        if theirs == data:
            continue
        for at in range(0, len(data), size):
            pgno = first + at // size
            if theirs[at : at + size] != data[at : at + size] and pgno != skip and pgno not in past:
                unexplained += 1
    return in_place, len(past), unexplained
