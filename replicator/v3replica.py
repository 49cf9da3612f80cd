"""One database's copy in one store, in the format of Litestream 0.3: generations with snapshots and WAL segments.

Every object is created, never overwritten. But two writers of this format need not meet at a name, since each has its own generation. So a
writer says in `pyrepl/v3.json` that the path is its own from now on, then reads what is stored; and it looks there after each object that it
has stored, before anybody is told that it is: *what is acknowledged was stored while the path was ours*. An object that stands in the
way is another writer's who has lost the path: a generation begins. (0.3.13 knows nothing of this, and two of them delete each other's
backups.)

**Order.** A restore takes the generation with the newest file, in it the newest snapshot, and all segments that follow. So at every moment
a new generation begins with its snapshot, nothing is added to an old one after that, and a later snapshot is stored when the segments
up to its state are.
"""

from __future__ import annotations

import json
import logging
import secrets
import shutil
import threading
import time
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NoReturn

from replicator.errors import (
    AccessDenied,
    ConfigError,
    DatabaseStateError,
    Fenced,
    FormatError,
    LineageMismatch,
    ObjectNotFound,
    PreconditionFailed,
    StorageError,
    StorageUnavailable,
)
from replicator.format.ltx import TXID
from replicator.format.v3 import Position, SegmentInfo, SnapshotInfo, V3Info
from replicator.outbox import OutFile
from replicator.replica import Replica, same_bytes
from replicator.storage.base import ReplicaClient
from replicator.storage.probe import honours_conditions
from replicator.storage.v3 import v3_client
from replicator.v3chain import Stored, Tip, newest_generation, read_tip
from replicator.v3outbox import V3File

__all__ = ["V3Replica"]

OWNER = "pyrepl/v3.json"
OWNER_FRESH_S = 1.0
WHOLE_SECONDS_NS = 1_100_000_000
"""Stores tell times in whole seconds: files of two generations must not get the same one."""

log = logging.getLogger(__name__)


class V3Replica(Replica):
    """A replica that this process appends to. `txid` is the engine's count of entries, and means nothing outside this process."""

    def __init__(self, client: ReplicaClient, *, writer: int, alone: bool = True) -> None:
        """`alone`: no other replica stores the same local files, so that they may be moved there by a hard link, times and all."""
        super().__init__(client, writer=writer)
        found = v3_client(client)
        if found is None:
            raise ConfigError(f"this store has no place for format v0.3: {client.url}")
        self.v3 = found
        self.end: Position | None = None
        self._alone = alone
        self._stored: dict[str, dict[str, V3Info]] = {}
        self._owned = b""
        self._looked_at = 0.0
        self._readable = True
        self._ordered = threading.Lock()  # held while a generation begins, and while a snapshot is added to one

    @property
    def position(self) -> str:
        return str(self.end) if self.end else ""

    # -- opening -----------------------------------------------------------------------------------------------------------------

    def attach(self) -> bytes | None:
        """Return the lineage that is recorded, or None. Raises `StorageError`."""
        self.online = self.listed = False
        try:
            data = json.loads(self.client.get_control(OWNER).data)
            return bytes.fromhex(data["lineage"])
        except ObjectNotFound:
            return None
        except AccessDenied as error:
            log.warning("a second writer cannot be found replica=%s error=%r", self.url, str(error))
            self._readable = False
            return None
        except (ValueError, KeyError, TypeError):
            raise StorageError(f"unreadable: {self.url}/{OWNER}", hint="restore the object, or replicate to a new path") from None

    def claim(self, lineage: bytes, recorded: bytes | None) -> None:
        """Make the path this writer's own from now on, and then find out what is stored: nothing is acknowledged after that which is not seen.

        Raises:
            LineageMismatch: the path is another database's.
            StorageError: see there.
        """
        if recorded is not None and recorded != lineage:
            raise LineageMismatch(self.url, expected=lineage.hex(), got=recorded.hex())
        self.conditional = honours_conditions(self.client)
        if not self.conditional:
            log.warning("store ignores conditional writes replica=%s", self.url)
        self._owned = json.dumps({"lineage": lineage.hex(), "writer": f"{self.writer:016x}"}).encode() + b"\n"
        self.client.put_control(OWNER, self._owned)
        self._looked_at = time.monotonic()
        try:
            self.relist()
        except AccessDenied as error:
            log.warning("replica cannot be listed: a generation begins, and nothing is deleted replica=%s error=%r", self.url, str(error))
        self.online = True

    def tip(self, generation: str) -> Tip:
        """Return the end of a generation, read and verified. Raises `FormatError` when it is not to be continued, `StorageError`."""
        stored = self.stored()
        if not self.listed or not self.client.can_read:
            raise FormatError("what is stored cannot be read")
        newest = newest_generation(stored)
        if newest != generation:
            raise FormatError(f"the newest generation is {newest}, not {generation}" if newest else "nothing is stored")
        return read_tip(self.v3, generation, stored[generation])

    # -- what is stored ----------------------------------------------------------------------------------------------------------

    def stored(self) -> Stored:
        """Return what is there, as this process knows it. No request."""
        with self._guard:
            return {generation: list(infos.values()) for generation, infos in self._stored.items()}

    def relist(self) -> None:
        found: dict[str, dict[str, V3Info]] = {}
        for generation in self.v3.list_generations():
            infos: list[V3Info] = [*self.v3.list_snapshots(generation), *self.v3.list_segments(generation)]
            found[generation] = {info.name: info for info in infos}
        with self._guard:
            self._stored = found
        self.listed = True

    def note(self, info: V3Info) -> None:
        """Take note of an object that is stored now."""
        with self._guard:
            self._stored.setdefault(info.generation, {})[info.name] = info

    def delete(self, infos: Iterable[V3Info]) -> None:
        """Delete objects in the given order, as far as the store keeps one."""
        doomed = list(infos)
        self.v3.delete(doomed)
        with self._guard:
            for info in doomed:
                self._stored.get(info.generation, {}).pop(info.name, None)

    def delete_generation(self, generation: str) -> None:
        """Delete a generation with all that is in it."""
        self.v3.delete_generation(generation)
        with self._guard:
            self._stored.pop(generation, None)

    # -- appending ---------------------------------------------------------------------------------------------------------------

    def store(self, files: Sequence[OutFile], txid: TXID) -> None:
        """Append the files of the next entry. Returns when all are stored durably, and the path was ours all the while.

        Raises:
            Fenced: another writer has taken the path, or stored other bytes.
            StorageError: not stored, or unknown; call again with the same files.
        """
        if time.monotonic() > self._looked_at + OWNER_FRESH_S:
            self._check_owner(txid)
        begins = any(isinstance(file, V3File) and file.is_snapshot for file in files)
        if begins:
            with self._ordered:
                self._wait_for_the_next_second(files)
                self._put_all(files, txid)
        else:
            self._put_all(files, txid)
        self.txid = max(self.txid, txid)
        self.last_stored_at = datetime.now(UTC)

    def add(self, file: OutFile) -> None:
        """Store a snapshot beside the segments. One of the same index that is there already is as good: the same WAL leads on from it.

        Raises:
            DatabaseStateError: another generation has begun meanwhile; take a new one.
        """
        assert isinstance(file, V3File)
        with self._ordered:
            if self.end is None or file.generation != self.end.generation:
                raise DatabaseStateError(f"another generation has begun while the snapshot was taken: {self.url}", hint="take it again")
            with self._guard:
                name = SnapshotInfo(file.generation, file.index, 0, 0).name
                if name in self._stored.get(file.generation, ()):
                    return
            self._put(file, file.max_txid)
            self._check_owner(file.max_txid)

    def state(self) -> tuple[TXID, Position | None, list[V3Info]]:
        """Return where this replica is, and what its generation holds: no snapshot in it is of a later state."""
        with self._ordered:
            txid, end = self.txid, self.end
            return txid, end, list(self.stored().get(end.generation, ())) if end else []

    def put_copy(self, file: V3File) -> None:
        """Store a file that another replica holds."""
        self._put(file, file.max_txid)

    def follow(self, end: Position | None, txid: TXID) -> None:
        """Take note that everything up to a position is stored. Raises `Fenced`, `StorageError`."""
        self._check_owner(txid)
        self.end, self.txid = end, txid

    def _put_all(self, files: Sequence[OutFile], txid: TXID) -> None:
        for file in files:
            assert isinstance(file, V3File)
            self._put(file, txid)
        self._check_owner(txid)
        last = files[-1]
        assert isinstance(last, V3File)
        self.end = Position(last.generation, last.index, 0) if last.is_snapshot else last.end_position

    def _put(self, file: V3File, txid: TXID) -> None:
        if not self.conditional and self._has(file, txid):
            return
        try:
            info = self._create(file)
        except PreconditionFailed:
            if not self._has(file, txid):
                raise StorageError(f"store refuses to create, but has no such object: {self.url} {_info(file).name}") from None
            return
        self.files_sent += 1
        self.bytes_sent += info.size
        self.note(info)

    def _create(self, file: V3File) -> V3Info:
        body = file.body
        if isinstance(body, Path) and not self._alone:
            body = body.with_name(f"{secrets.token_hex(8)}.tmp")  # of its own, since a file has one time for all its names
            shutil.copyfile(file.body, body)
        try:
            if file.is_snapshot:
                return self.v3.put_snapshot(file.generation, file.index, body, if_absent=self.conditional)
            return self.v3.put_segment(file.generation, file.index, file.offset, body, if_absent=self.conditional)
        finally:
            if isinstance(body, Path) and body != file.body:
                body.unlink(missing_ok=True)

    def _has(self, file: V3File, txid: TXID) -> bool:
        """True when the object is there with our bytes, False when it is not there. Raises `Fenced` when it has other bytes."""
        info = _info(file)
        if self.client.can_read:
            try:
                with self.v3.open(info) as theirs:
                    same = same_bytes(theirs.read, file.body)
            except ObjectNotFound:
                return False
            if not same:
                self._check_owner(txid)
                if not self._readable:
                    raise Fenced(self.url, txid, why=f"{info.name} holds other bytes")
                # What a writer stored that has lost the path, and told nobody of.
                self._begin_anew(f"{info.name} holds other bytes")
        self.note(info)
        return True

    def _check_owner(self, txid: TXID) -> None:
        if not self._readable:
            return
        try:
            owner = self.client.get_control(OWNER).data
        except ObjectNotFound:
            # Somebody emptied the path: nothing that goes on from what was there can be restored.
            self.client.put_control(OWNER, self._owned)
            self._begin_anew("it was emptied")
        if owner != self._owned:
            raise Fenced(self.url, txid, why="it has been started since")
        self._looked_at = time.monotonic()

    def _begin_anew(self, why: str) -> NoReturn:
        """Nothing can go on from what is stored: wait for what needs nothing before it (`V3Uploader`)."""
        self.txid, self.end = TXID(0), None
        self.relist()
        raise StorageUnavailable(f"a generation must begin: {self.url} ({why})")

    def _wait_for_the_next_second(self, files: Sequence[OutFile]) -> None:
        if self.client.kind in ("file", "memory"):
            return
        own = {file.generation for file in files if isinstance(file, V3File)}
        times = [info.created_ns for generation, infos in self.stored().items() if generation not in own for info in infos]
        rest_ns = max(times, default=0) + WHOLE_SECONDS_NS - time.time_ns()
        if 0 < rest_ns <= WHOLE_SECONDS_NS:
            time.sleep(rest_ns / 1e9)


def _info(file: V3File) -> V3Info:
    if file.is_snapshot:
        return SnapshotInfo(file.generation, file.index, file.size, time.time_ns())
    return SegmentInfo(file.generation, file.index, file.offset, file.size, time.time_ns())
