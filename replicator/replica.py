"""One database's copy in one store: its position, its lineage, and appending to it.

A replica is an append-only log whose next slot has a known name, so appending is creating a file that must not exist. Three outcomes
exist. *Stored*: the create succeeded, or the file is there with our bytes (a lost reply, or our own earlier try). *Fenced*: it is
there with other bytes. *Unknown*: anything else; the same bytes are tried again later, and nothing else may be written in between.

**A writer that slept.** The next slot is only taken as long as nobody has merged and deleted the file in it. So an append counts if not more than
`REREAD_S` have passed, as far as the clocks can tell, since it was last certain that nobody else had appended: since the append before it
was *sent*, or the listing at the start. After a longer time raw files are listed from the next slot on, where the newest one always stays: any
that is not ours is another writer's. With a lease nothing counts while its time is over; where it was over, raw files are listed, too.
"""

from __future__ import annotations

import json
import logging
import secrets
import struct
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from replicator.chain import list_files, read_file
from replicator.clock import SYSTEM, Clock, Moment, longest_s
from replicator.errors import (
    ConditionsIgnored,
    ConditionUnsupported,
    CorruptReplica,
    Fenced,
    FormatError,
    LineageMismatch,
    NonContiguous,
    ObjectNotFound,
    PreconditionFailed,
    ReplicaBroken,
    ReplicaEmptied,
    RestoreError,
    StorageError,
)
from replicator.format.lock import token_of
from replicator.format.ltx import LTX_HEADER_SIZE, TRAILER_SIZE, TXID, Decoder, FileInfo, decode_header
from replicator.lease import Lease
from replicator.outbox import OutFile
from replicator.plan import chain_end, plan_restore
from replicator.storage.base import Comparing, ReplicaClient, created_at
from replicator.storage.probe import honours_conditions

__all__ = ["Replica", "new_lineage", "read_lineage", "same_bytes"]

LINEAGE = "pyrepl/lineage.json"
LINEAGE_VERSION = 1
"""Counted up by a change after which an older version must leave the replica alone."""
COMPARE_BYTES = 1 << 20
REREAD_S = 150.0
"""Half of the time for which raw files are kept, by default here and in Litestream."""
READ_SLICE_BYTES = 64 << 10
LINEAGE_SIZE = 16
MAX_REMEMBERED = 1000
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_ROW = struct.Struct("<BQQQq")
_PROOF = struct.Struct("<dd")

log = logging.getLogger(__name__)


def read_lineage(client: ReplicaClient) -> bytes | None:
    """Return the lineage that a replica records, or None. Raises `StorageError`."""
    try:
        stored = client.get_control(LINEAGE)
    except ObjectNotFound:
        return None
    try:
        document = json.loads(stored.data)
        version, lineage = int(document.get("version", 1)), bytes.fromhex(document["lineage"])
    except (ValueError, KeyError, TypeError, AttributeError):
        version, lineage = 1, b""
    if version > LINEAGE_VERSION:
        hint = "use that version here, too: one that does not know what it changed could take it apart"
        raise StorageError(f"replica was written by a newer version of pyrepl: {client.url}/{LINEAGE} has version {version}", hint=hint)
    if len(lineage) != 16:
        raise StorageError(f"unreadable lineage file: {client.url}/{LINEAGE}", hint="restore the object, or replicate to a new path")
    return lineage


def _lineage_document(lineage: bytes) -> bytes:
    return json.dumps({"version": LINEAGE_VERSION, "lineage": lineage.hex()}).encode() + b"\n"


def new_lineage() -> bytes:
    """Return 16 random bytes that name a history."""
    return secrets.token_bytes(16)


@dataclass(frozen=True, slots=True)
class _Metadata:
    lineage: bytes
    writer: int
    lease: Lease | None

    def as_dict(self) -> dict[str, str]:
        found = {"pyrepl-lineage": self.lineage.hex(), "pyrepl-writer": f"{self.writer:016x}"}
        if self.lease is not None and token_of(self.writer):
            owner = "".join(character if " " < character <= "~" else "_" for character in self.lease.owner)[:256]
            found |= {"pyrepl-generation": str(self.lease.generation), "pyrepl-owner": owner or "_"}
        return found


class Replica:
    """A replica that this process appends to. `open` first; used by one thread at a time."""

    def __init__(
        self, client: ReplicaClient, *, writer: int, lease: Lease | None = None, clock: Clock = SYSTEM, reread_s: float = REREAD_S
    ) -> None:
        """
        Args:
            writer: random non-zero number of this process, stored in each file's header (node id).
            lease: without which nothing counts as stored.
            reread_s: for how long it stays certain that nobody else has appended.
        """
        self.client = client
        self.lease = lease
        self._clock, self._reread_s = clock, reread_s
        self._lapses = 0
        self._alone_since: Moment | None = None  # sent then: what proved last that nobody else had appended
        self.txid = TXID(0)
        self.writer = writer
        self.conditional = True
        self.online = False
        self.listed = False
        self.needs_image = False
        """True when nothing can be appended before a full image of the newest state was stored."""
        self.last_stored_at: datetime | None = None
        self.error: str | None = None
        self.files_sent = 0
        self.bytes_sent = 0
        self.retries = 0
        """Tries that failed and come again."""
        self._lineage = b""
        self._guard = threading.Lock()
        self._files: dict[int, list[FileInfo]] = {}
        self._meanwhile: list[Callable[[], None]] | None = None
        self._recalled: bytes | None = None
        self._is_new = False

    @property
    def url(self) -> str:
        return self.client.url

    @property
    def position(self) -> str:
        """Where the newest stored bytes end, in the words of the format; empty where the TXID says it all."""
        return ""

    def open(self, *, allow_gap: bool = False) -> bytes | None:
        """Find out what is stored: sets `txid`; returns the lineage, or None when none is recorded.

        Args:
            allow_gap: take a chain with a gap, too. It goes on behind its last file, with a full image first.

        Raises:
            ReplicaBroken: the stored chain has a gap.
            StorageError: it cannot be read.
        """
        began = self._clock.now()
        if self._is_new:
            self._is_new = False
            self.listed, self._alone_since = True, began
            return None
        recalled = self._take_recalled()
        if recalled is None:
            self.relist()
            try:
                chain_end(self.listing())
            except RestoreError:
                self.relist()  # a directory is no snapshot: what another writer stores meanwhile may seem to leave a gap
            self._alone_since = began
        files = self.listing()
        try:
            self.txid = chain_end(files)
        except RestoreError as error:
            newest = max(info.max_txid for infos in files.values() for info in infos)
            if not allow_gap:
                have, following = (error.have, error.next_txid) if isinstance(error, NonContiguous) else (0, newest)
                raise ReplicaBroken(self.url, have, following) from error
            self.txid, self.needs_image = newest, True
        return recalled or read_lineage(self.client)

    def renew(self, lineage: bytes) -> None:
        """Give an empty replica that records another lineage this one: its TXIDs begin anew, and whoever followed the old ones must notice.

        Raises:
            LineageMismatch: somebody else has done so at this moment.
        """
        try:
            stored = self.client.get_control(LINEAGE)
            try:
                self.client.put_control(LINEAGE, _lineage_document(lineage), if_match=stored.etag)
            except ConditionUnsupported:
                # Whoever else begins anew at this moment is then found by the lineage at the next start, or by the first append.
                self.client.put_control(LINEAGE, _lineage_document(lineage))
        except (ObjectNotFound, PreconditionFailed):
            raise LineageMismatch(self.url, expected=lineage.hex(), got=(read_lineage(self.client) or b"").hex()) from None

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
                self.client.put_control(LINEAGE, _lineage_document(lineage), if_absent=True)
            except PreconditionFailed:
                now = self.open()
                if now != lineage:
                    raise LineageMismatch(self.url, expected=lineage.hex(), got=(now or b"").hex()) from None
        self._lineage = lineage
        self.conditional = honours_conditions(self.client)
        if not self.conditional and self.lease is not None:
            raise ConditionsIgnored(self.url)
        if not self.conditional:
            log.warning("store ignores conditional writes, a second writer is found late replica=%s", self.url)

    # -- what is stored: one listing at the start, then kept up to date ------------------------------------------------------------

    def listing(self) -> dict[int, list[FileInfo]]:
        """Return the files of each level, as this process knows them. No request."""
        with self._guard:
            return {level: list(infos) for level, infos in self._files.items()}

    def relist(self) -> None:
        """Ask the store what is there."""
        with self._guard:
            self._meanwhile = []
        found = list_files(self.client)
        with self._guard:
            changes, self._meanwhile = self._meanwhile, None
            self._files = found
        self.listed = True
        for change in changes or ():  # stored or deleted by other threads while the store was listing
            change()

    def remember(self) -> bytes | None:
        """Return what is known to be stored, for `recall`; None when it was never listed, or is too much to be kept."""
        files = [info for infos in self.listing().values() for info in infos]
        proof = self._alone_since
        if not self.listed or proof is None or len(files) > MAX_REMEMBERED:
            return None
        rows = [_ROW.pack(item.level, item.min_txid, item.max_txid, item.size, _microseconds(item.created_at)) for item in files]
        return b"".join([self._lineage, _PROOF.pack(proof.steady, proof.wall), *rows])

    def recall(self, remembered: bytes) -> None:
        """Let `open` take what `remember` returned for the store's answer: nobody else appends here, or else the next append finds out, or, when
        it was remembered for too long, the listing before that (see `_reread_s`).
        """
        self._recalled = remembered

    def assume_empty(self) -> None:
        """Let the first `open` take the replica for one that nobody has ever stored anything in. Creating the lineage, or the first file, finds out when that is wrong."""
        self._is_new = True

    def _take_recalled(self) -> bytes | None:
        remembered, self._recalled = self._recalled, None
        if remembered is None:
            return None
        files: dict[int, list[FileInfo]] = {}
        self._alone_since = Moment(*_PROOF.unpack_from(remembered, LINEAGE_SIZE))
        for level, low, high, size, created in _ROW.iter_unpack(remembered[LINEAGE_SIZE + _PROOF.size :]):
            files.setdefault(level, []).append(FileInfo(level, TXID(low), TXID(high), size, EPOCH + timedelta(microseconds=created)))
        with self._guard:
            self._files = files
        self.listed = True
        return remembered[:LINEAGE_SIZE]

    def assume(self, txid: TXID) -> None:
        """Take a position on trust, of a store that may be written and not listed."""
        self.txid, self.online, self.listed = txid, True, False

    def record(self, info: FileInfo) -> None:
        """Take note of a file that is stored now."""
        with self._guard:
            if self._meanwhile is not None:
                self._meanwhile.append(lambda: self.record(info))
            level = self._files.setdefault(info.level, [])
            at = bisect_left(level, info)
            if at < len(level) and level[at] == info:
                level[at] = info
            else:
                level.insert(at, info)

    def forget(self, files: Iterable[FileInfo]) -> None:
        """Take note of files that are deleted."""
        files = list(files)
        gone = {(info.level, info.min_txid, info.max_txid) for info in files}
        with self._guard:
            if self._meanwhile is not None:
                self._meanwhile.append(lambda: self.forget(files))
            for level, infos in self._files.items():
                self._files[level] = [info for info in infos if (level, info.min_txid, info.max_txid) not in gone]

    def plan(self) -> list[FileInfo]:
        """Return the files that restore the newest state; empty when nothing is stored."""
        return plan_restore(self.listing()) if self.txid else []

    def files_after(self, txid: TXID) -> list[FileInfo] | None:
        """Return the files that lead from `txid` to the newest state; None when the chain does not pass there."""
        files = sorted(info for infos in self.listing().values() for info in infos if info.max_txid > txid)
        # Full images lead there, too, but are read only where nothing smaller does.
        return _cover([info for info in files if info.min_txid > 1], txid, self.txid) or _cover(files, txid, self.txid)

    def shares_newest_file_with(self, other: Replica) -> bool | None:
        """Compare the newest raw file with the other's of the same TXID; None when one of them has none. Two small requests."""
        mine = [info for info in self.listing().get(0, ()) if info.max_txid == self.txid]
        theirs = [info for info in other.listing().get(0, ()) if info.max_txid == self.txid]
        if not mine or not theirs:
            return None
        return mine[0].size == theirs[0].size and _trailer(self.client, mine[0]) == _trailer(other.client, theirs[0])

    def store(self, files: Sequence[OutFile], txid: TXID) -> None:
        """Append the files of the next TXID. Returns when all are stored durably, and nobody else can have appended: they may be acknowledged.

        Raises:
            Fenced: a file is there with other bytes, or another writer has appended while this one slept.
            LeaseLost: somebody else has the lease.
            StorageError: not stored, or unknown; call again with the same files.
        """
        self._make_sure(files)
        sent = self._clock.now()
        for file in files:
            self._store(file)
        self._make_sure(files)
        for file in files:
            self._sent(file)
        self._alone_since = sent
        self.txid = max(self.txid, txid)
        self.last_stored_at = datetime.now(UTC)

    def _make_sure(self, own: Sequence[OutFile]) -> None:
        """Return when the lease is in force, if there is one, and nobody else has appended. `own`: what is being stored."""
        if self.lease is not None:
            self.lease.confirm()
            if self.lease.lapses != self._lapses:
                # Its time was over for a while. Nobody has taken it, but not everybody may have asked for it.
                self._lapses, self._alone_since = self.lease.lapses, None
        now = self._clock.now()
        if self._alone_since is not None and longest_s(self._alone_since, now) < self._reread_s:
            return
        if not self.listed:  # a key that may only write: creating never overwrites
            log.debug("replica cannot be listed, other writers are found by the next file only replica=%s", self.url)
            return
        mine = {(file.min_txid, file.max_txid) for file in own if file.level == 0}
        for info in self.client.list(0, seek=TXID(self.txid + 1)):
            if (info.min_txid, info.max_txid) not in mine and not self._wrote(info):
                raise Fenced(self.url, info.max_txid, why=f"TXID {info.max_txid:016x} was stored by another writer while this one slept")
        self._alone_since = now

    def add(self, file: OutFile) -> None:
        """Store a merged file or a full image beside the chain. A sound one that stands there already is as good: it holds the same states."""
        try:
            self._store(file)
        except Fenced:
            stored = [info for info in self.client.list(file.level, seek=file.min_txid) if _key(info) == _key(_info(file))]
            if stored and self._is_sound(stored[0]):
                self.record(stored[0])
                return
            self.client.delete(stored)  # damaged: this one takes its place
            self._store(file)
        self._sent(file)

    def _is_sound(self, info: FileInfo) -> bool:
        """Read a stored file to its end; True also where nothing can be read back."""
        if not self.client.can_read:
            return True
        decoder = Decoder()
        try:
            for data in read_file(self.client, info):
                for at in range(0, len(data), READ_SLICE_BYTES):
                    decoder.feed(data[at : at + READ_SLICE_BYTES])
            decoder.close()
        except (FormatError, CorruptReplica):
            return False
        return True

    def holds_own(self, file: OutFile) -> bool:
        """True when this process itself has stored a file of that level and range, be it with other bytes; takes note of it then."""
        for info in self.client.list(file.level, seek=file.min_txid):
            if (info.min_txid, info.max_txid) == (file.min_txid, file.max_txid) and self._wrote(info):
                self.record(info)
                return True
        return False

    def _wrote(self, info: FileInfo) -> bool:
        """True when a stored file is this process's own. Where nothing can be read back nobody can tell."""
        if not self.client.can_read:
            return False
        with self.client.open(info, size=LTX_HEADER_SIZE) as stream:
            return decode_header(stream.read()).node_id == self.writer

    def _sent(self, file: OutFile) -> None:
        self.files_sent += 1
        self.bytes_sent += file.size
        self.record(_info(file))

    def _store(self, file: OutFile) -> None:
        metadata = _Metadata(self._lineage, self.writer, self.lease).as_dict()
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
        try:
            if isinstance(self.client, Comparing):
                same = self.client.holds(_info(file), file.body)
            else:
                with self.client.open(_info(file)) as theirs:
                    same = same_bytes(theirs.read, file.body)
        except ObjectNotFound:
            return False
        if not same:
            raise Fenced(self.url, file.max_txid)
        return True


def _cover(files: Sequence[FileInfo], txid: TXID, target: TXID) -> list[FileInfo] | None:
    """Return the fewest of `files`, which are in order, that lead from `txid` to `target`; None when there is a gap."""
    found: list[FileInfo] = []
    at = 0
    while txid < target:
        best: FileInfo | None = None
        while at < len(files) and files[at].min_txid <= txid + 1:
            if best is None or files[at].max_txid > best.max_txid:
                best = files[at]
            at += 1
        if best is None or best.max_txid <= txid:
            return None
        found.append(best)
        txid = best.max_txid
    return found


def _key(info: FileInfo) -> tuple[int, int, int]:
    return info.level, info.min_txid, info.max_txid


def _microseconds(when: datetime) -> int:
    return (when - EPOCH) // timedelta(microseconds=1)


def _trailer(client: ReplicaClient, info: FileInfo) -> bytes:
    """Return the last bytes of a file, with the checksum of all before."""
    with client.open(info, offset=max(0, info.size - TRAILER_SIZE), size=TRAILER_SIZE) as stream:
        return stream.read()


def _info(file: OutFile) -> FileInfo:
    return FileInfo(file.level, file.min_txid, file.max_txid, file.size, created_at(file.timestamp_ms))


def same_bytes(read: Callable[[int], bytes], body: bytes | Path) -> bool:
    """True when reading gives exactly the body."""
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
