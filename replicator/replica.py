"""One database's copy in one store: its position, its lineage, and appending to it.

A replica is an append-only log whose next slot has a known name, so appending is creating a file that must not exist. Three outcomes
exist. *Stored*: the create succeeded, or the file is there with our bytes (a lost reply, or our own earlier try). *Fenced*: it is
there with other bytes. *Unknown*: anything else; the same bytes are tried again later, and nothing else may be written in between.
"""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from replicator.chain import list_files
from replicator.errors import Fenced, LineageMismatch, ObjectNotFound, PreconditionFailed, ReplicaEmptied, StorageError
from replicator.format.ltx import TXID, FileInfo
from replicator.outbox import OutFile
from replicator.plan import chain_end, plan_restore
from replicator.storage.base import ReplicaClient
from replicator.storage.probe import probe_conditional_writes

__all__ = ["Replica", "new_lineage", "read_lineage"]

LINEAGE = "pyrepl/lineage.json"
COMPARE_BYTES = 1 << 20

log = logging.getLogger(__name__)


def read_lineage(client: ReplicaClient) -> bytes | None:
    """Return the lineage that a replica records, or None. Raises `StorageError`."""
    try:
        stored = client.get_control(LINEAGE)
    except ObjectNotFound:
        return None
    try:
        lineage = bytes.fromhex(json.loads(stored.data)["lineage"])
    except (ValueError, KeyError, TypeError):
        lineage = b""
    if len(lineage) != 16:
        raise StorageError(f"unreadable lineage file: {client.url}/{LINEAGE}", hint="restore the object, or replicate to a new path")
    return lineage


def new_lineage() -> bytes:
    """Return 16 random bytes that name a history."""
    return secrets.token_bytes(16)


@dataclass(frozen=True, slots=True)
class _Metadata:
    lineage: bytes
    writer: int

    def as_dict(self) -> dict[str, str]:
        return {"pyrepl-lineage": self.lineage.hex(), "pyrepl-writer": f"{self.writer:016x}"}


class Replica:
    """A replica that this process appends to. `open` first; used by one thread at a time."""

    def __init__(self, client: ReplicaClient, *, writer: int) -> None:
        """`writer`: random non-zero number of this process, stored in each file's header (node id)."""
        self.client = client
        self.txid = TXID(0)
        self.writer = writer
        self.conditional = True
        self.last_stored_at: datetime | None = None
        self.error: str | None = None
        self.files_sent = 0
        self.bytes_sent = 0
        self._lineage = b""
        self._files: Mapping[int, Sequence[FileInfo]] = {}

    @property
    def url(self) -> str:
        return self.client.url

    def open(self) -> bytes | None:
        """Find out what is stored: sets `txid`; returns the lineage, or None when none is recorded.

        Raises:
            NonContiguous: the stored chain has a gap; nothing can be appended to it.
            StorageError: it cannot be read.
        """
        self._files = list_files(self.client)
        self.txid = chain_end(self._files)
        return read_lineage(self.client)

    def join(self, lineage: bytes, recorded: bytes | None, *, known_txid: int) -> None:
        """Bind the replica to a lineage, writing it where none is recorded.

        Args:
            recorded: what `open` returned.
            known_txid: what this replica is known to have held before.

        Raises:
            LineageMismatch: it belongs to another history.
            ReplicaEmptied: it has lost files.
        """
        if recorded is not None and recorded != lineage:
            raise LineageMismatch(self.url, expected=lineage.hex(), got=recorded.hex())
        if self.txid < known_txid:
            raise ReplicaEmptied(self.url, expected=known_txid, got=self.txid)
        if recorded is None:
            try:
                self.client.put_control(LINEAGE, json.dumps({"lineage": lineage.hex()}).encode() + b"\n", if_absent=True)
            except PreconditionFailed:
                now = self.open()
                if now != lineage:
                    raise LineageMismatch(self.url, expected=lineage.hex(), got=(now or b"").hex()) from None
        self._lineage = lineage
        self.conditional = probe_conditional_writes(self.client)
        if not self.conditional:
            log.warning("store ignores conditional writes, a second writer is found late replica=%s", self.url)

    def plan(self) -> list[FileInfo]:
        """Return the files that restore the newest state found by `open`; empty when nothing is stored."""
        return plan_restore(self._files) if self.txid else []

    def files_after(self, txid: TXID) -> list[FileInfo] | None:
        """Return the files that lead from `txid` to the newest state found by `open`; None when the chain does not pass there."""
        found: list[FileInfo] = []
        while txid < self.txid:
            candidates = [
                info for files in self._files.values() for info in files if info.min_txid == txid + 1 and info.max_txid <= self.txid
            ]
            if not candidates:
                return None
            best = max(candidates, key=lambda info: info.max_txid)
            found.append(best)
            txid = best.max_txid
        return found

    def store(self, files: Sequence[OutFile], txid: TXID) -> None:
        """Append the files of the next TXID. Returns when all are stored durably.

        Raises:
            Fenced: a file is there with other bytes.
            StorageError: not stored, or unknown; call again with the same files.
        """
        for file in files:
            self._store(file)
            self.files_sent += 1
            self.bytes_sent += file.size
        self.txid = txid
        self.last_stored_at = datetime.now(UTC)

    def store_snapshot(self, file: OutFile) -> None:
        """Store a full image beside the chain. Storing it again does nothing."""
        try:
            self._store(file)
        except Fenced:
            return  # a full image of this TXID is there already; its bytes differ by its time only

    def _store(self, file: OutFile) -> None:
        metadata = _Metadata(self._lineage, self.writer).as_dict()
        if not self.conditional and self._holds(file):
            return
        try:
            self.client.put(
                file.level,
                file.min_txid,
                file.max_txid,
                file.body,
                timestamp_ms=file.timestamp_ms,
                if_absent=self.conditional,
                metadata=metadata,
            )
        except PreconditionFailed:
            if not self._holds(file):
                raise StorageError(f"store refuses to create, but has no such file: {self.url} level {file.level}") from None

    def _holds(self, file: OutFile) -> bool:
        """True when the file is there with our bytes, False when it is not there. Raises `Fenced` when it has other bytes."""
        info = FileInfo(file.level, file.min_txid, file.max_txid, file.size, datetime.fromtimestamp(file.timestamp_ms / 1000, UTC))
        try:
            with self.client.open(info) as theirs:
                same = _same(theirs.read, file.body)
        except ObjectNotFound:
            return False
        if not same:
            raise Fenced(self.url, file.max_txid)
        return True


def _same(read: object, body: bytes | Path) -> bool:
    assert callable(read)
    if isinstance(body, bytes):
        at = 0
        while data := read(COMPARE_BYTES):
            if body[at : at + len(data)] != data:
                return False
            at += len(data)
        return at == len(body)
    with body.open("rb") as ours:
        while data := read(COMPARE_BYTES):
            if ours.read(len(data)) != data:
                return False
        return not ours.read(1)
