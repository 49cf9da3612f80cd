"""Every error that `replicator` raises on purpose.

    ReplicatorError
      FormatError            bytes do not follow the format
        Truncated            the input ended before the structure did
        ChecksumMismatch     (expected, got, offset)
      DatabaseStateError     the live database is not in a state that can be replicated
        DatabaseNotFound     (path)
        NotADatabase         (path)
        NotWALMode           (path, mode)
        DatabaseLocked       (path)
        EngineRunning        (path) a second engine holds the metadata directory
        ContinuityLost       (reason)
      StorageError           a backend said no
        ObjectNotFound       (name)
        AccessDenied         (name)
        PreconditionFailed   (name) a conditional write lost
        ConditionUnsupported (name) the store cannot check that condition
        WrongKey             (name) the file is encrypted to other keys
        StorageUnavailable   try again later; the outcome of a write is unknown
      RestoreError           there is no way to the asked state
        NoBackups            (url) nothing is stored there
        GenerationNotAvailable (url, generation) nothing of that generation, of the 0.3 format
        TXIDNotAvailable     (txid, available)
        TimestampNotAvailable (timestamp, oldest, newest)
      SnapshotNotAvailable (generation, reason) of the 0.3 format
      MissingSegment       (name, reason) WAL of the 0.3 format is not stored
        NonContiguous        (have, next) a gap in the chain
        CorruptReplica       (name, reason) a stored file fails its checks
        OutputExists         (path)
        IntegrityCheckFailed (path, message)
        CannotResume         (path, reason) a followed copy without a usable TXID
        CopyChanged          (path, reason) somebody else wrote to a followed copy
        CopyInUse            (path) another process follows into it
      ReplicaStateError      the replica does not belong to this database
        LineageMismatch      (url, expected, got)
        ReplicaEmptied       (url, txid)
        ReplicaBroken        (url, have, next) its chain has a gap
        Diverged             (url, other, txid) two replicas hold different files of one TXID
      LeaseError             this process is not the writer
        Fenced               (txid) another writer appended at our TXID
        LeaseHeld            (owner, generation, wait_s) somebody else has the lease
        LeaseLost            (owner, generation) it was ours, and somebody else has it now
        ConditionsIgnored    (url) the store cannot keep two writers apart
      ConfigError            a bad setting: URL, option, path
      RequestRefused         (status) a running daemon refuses what it was asked
      WaitTimeout            (pending) not stored in the time given; outcome unknown

Facts are attributes, the message is built from them, and `hint` (when there is one) says what to do next. Decoders raise
`FormatError` or nothing. The command turns these into one line and an exit code; everything else is a bug and keeps its traceback.
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

__all__ = [
    "AccessDenied",
    "CannotResume",
    "ChecksumMismatch",
    "ConditionUnsupported",
    "ConditionsIgnored",
    "ConfigError",
    "ContinuityLost",
    "CopyChanged",
    "CopyInUse",
    "CorruptReplica",
    "DatabaseLocked",
    "DatabaseNotFound",
    "DatabaseStateError",
    "Diverged",
    "EngineRunning",
    "Fenced",
    "FormatError",
    "GenerationNotAvailable",
    "IntegrityCheckFailed",
    "LeaseError",
    "LeaseHeld",
    "LeaseLost",
    "LineageMismatch",
    "MissingSegment",
    "NoBackups",
    "NonContiguous",
    "NotADatabase",
    "NotWALMode",
    "ObjectNotFound",
    "OutputExists",
    "PreconditionFailed",
    "ReplicaBroken",
    "ReplicaEmptied",
    "ReplicaStateError",
    "ReplicatorError",
    "RequestRefused",
    "RestoreError",
    "SnapshotNotAvailable",
    "StorageError",
    "StorageUnavailable",
    "TXIDNotAvailable",
    "TimestampNotAvailable",
    "Truncated",
    "WaitTimeout",
    "WrongKey",
]


class ReplicatorError(Exception):
    """Root of the tree. `hint` is the next step for a person, or an empty string."""

    hint: str = ""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        if hint:
            self.hint = hint


class FormatError(ReplicatorError):
    """Bytes that do not follow the format."""


class Truncated(FormatError):
    """The input ended before the structure did."""


class ChecksumMismatch(FormatError):
    """A stored checksum is not the one of the bytes."""

    def __init__(self, what: str, *, expected: int, got: int, offset: int | None = None) -> None:
        self.expected, self.got, self.offset = expected, got, offset
        where = "" if offset is None else f" at offset {offset}"
        super().__init__(f"{what} checksum mismatch{where}: stored {expected:016x}, computed {got:016x}")


class DatabaseStateError(ReplicatorError):
    """The live database is not in a state that can be replicated."""


class DatabaseNotFound(DatabaseStateError):
    """There is no file at the database's path."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        super().__init__(f"database does not exist: {path}", hint="check the path; start the application first or restore a replica to it")


class NotADatabase(DatabaseStateError):
    """The file at the path is not a plain SQLite database."""

    def __init__(self, path: str | Path, why: str = "the header is not SQLite's") -> None:
        self.path = Path(path)
        super().__init__(
            f"not an SQLite database: {path} ({why})",
            hint="encrypted databases (SQLCipher, SEE) cannot be replicated; check the path",
        )


class NotWALMode(DatabaseStateError):
    """The database is not in WAL mode and cannot be switched now."""

    def __init__(self, path: str | Path, mode: str) -> None:
        self.path, self.mode = Path(path), mode
        super().__init__(
            f"database is in journal mode {mode} and cannot be switched to WAL: {path}",
            hint="close other connections and run PRAGMA journal_mode=WAL once",
        )


class DatabaseLocked(DatabaseStateError):
    """Nothing can be read, because somebody keeps an exclusive lock."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        super().__init__(
            f"database is locked: {path}",
            hint="an application that uses locking_mode=EXCLUSIVE cannot be replicated; set locking_mode=NORMAL",
        )


class EngineRunning(DatabaseStateError):
    """Another engine works on this database on this machine."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        super().__init__(f"another replicator already runs for this database: {path}", hint="stop the other process, or wait until it ends")


class ContinuityLost(DatabaseStateError):
    """The WAL does not continue where the last sync ended."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(f"continuity lost: {reason}")


class StorageError(ReplicatorError):
    """A backend refused, for a reason that another try does not mend."""


class ObjectNotFound(StorageError):
    """There is no object of that name."""

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(f"object not found: {name}")


class AccessDenied(StorageError):
    """The credentials are wrong, missing, or do not allow the operation."""

    def __init__(self, name: str, why: str = "access denied", *, hint: str = "check the credentials and the bucket's policy") -> None:
        self.name = name
        super().__init__(f"{why}: {name}", hint=hint)


class PreconditionFailed(StorageError):
    """A conditional write lost: the object exists, or it is not the expected one."""

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(f"precondition failed: {name}")


class ConditionUnsupported(StorageError):
    """The store has no way to check that condition and write in one step. Nothing was written."""

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(
            f"store cannot replace on a condition: {name}", hint="leases need a store with conditional writes, see docs/stores.md"
        )


class WrongKey(StorageError):
    """A file is encrypted, and none of the keys fits. That is not damage: with the right key it can be read."""

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(
            f"no key fits the encrypted file: {name}",
            hint="give the age identity of one of the recipients at the time it was written; a damaged list of recipients looks the same",
        )


class StorageUnavailable(StorageError):
    """The backend did not answer, or asked to try later. The outcome of a write is unknown."""


class RestoreError(ReplicatorError):
    """There is no way to the asked state."""


class NoBackups(RestoreError):
    """Nothing that can be restored is stored at the URL."""

    def __init__(self, url: str) -> None:
        self.url = url
        super().__init__(
            f"no matching backup files available: {url}",
            hint="check the URL; `pyrepl ltx URL` lists what is stored, `pyrepl generations URL` the same of Litestream 0.3",
        )


class GenerationNotAvailable(NoBackups):
    """Nothing is stored of the generation that was asked for."""

    def __init__(self, url: str, generation: str) -> None:
        super().__init__(url)
        self.generation = generation
        self.args = (f"no such generation: {generation} ({url})",)
        self.hint = "`pyrepl generations URL` lists them"


class TXIDNotAvailable(RestoreError):
    """The asked TXID is not the boundary of a file that is stored."""

    def __init__(self, txid: int, *, available: str = "") -> None:
        self.txid = txid
        more = f"; stored: {available}" if available else ""
        super().__init__(
            f"no matching backup files available for TXID {txid:016x}{more}", hint="`pyrepl ltx -level all URL` lists the TXIDs"
        )


class TimestampNotAvailable(RestoreError):
    """The asked time lies outside the stored range. None for `oldest` and `newest`: no time can be restored."""

    def __init__(self, timestamp: datetime, *, oldest: datetime | None, newest: datetime | None) -> None:
        self.timestamp, self.oldest, self.newest = timestamp, oldest, newest
        if oldest and newest:
            held = f"stored: {oldest.isoformat()} to {newest.isoformat()}"
            hint = "choose a time later than the oldest, and not later than the newest: it restores the last state before it"
        else:
            held, hint = "no chain of stored files begins", "`pyrepl history URL` shows what can be restored"
        super().__init__(f"timestamp does not exist: {timestamp.isoformat()}; {held}", hint=hint)


class SnapshotNotAvailable(RestoreError):
    """A generation has no snapshot that the asked state could begin with."""

    def __init__(self, generation: str, reason: str) -> None:
        self.generation, self.reason = generation, reason
        super().__init__(f"no snapshots available in generation {generation}: {reason}", hint="`pyrepl snapshots URL` lists them")


class MissingSegment(RestoreError):
    """A WAL segment of the 0.3 format that must be there is not. `name`: what it would be called."""

    def __init__(self, name: str, reason: str) -> None:
        self.name, self.reason = name, reason
        super().__init__(
            f"missing wal segment {name}: {reason}", hint="restore an earlier moment with -timestamp or -index, or another generation"
        )


class NonContiguous(RestoreError):
    """The chain of files has a gap."""

    def __init__(self, have: int, next_txid: int) -> None:
        self.have, self.next_txid = have, next_txid
        super().__init__(
            f"non-contiguous ltx files: have up to {have:016x} but next file starts at {next_txid:016x}",
            hint=f"-txid {have:016x} restores the state before the gap" if have else "`pyrepl history URL` shows what is stored",
        )


class CorruptReplica(RestoreError):
    """A stored file fails its checks."""

    def __init__(self, name: str, reason: str) -> None:
        self.name, self.reason = name, reason
        super().__init__(f"corrupt file {name}: {reason}", hint="restore an earlier moment with -txid or -timestamp, or another replica")


class OutputExists(RestoreError):
    """Something stands at the output path."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        super().__init__(
            f"cannot restore, output path already exists and is not empty: {path}. Use -force to overwrite",
            hint="choose another output, or -force",
        )


class IntegrityCheckFailed(RestoreError):
    """The restored database fails SQLite's own check."""

    def __init__(self, path: str | Path, message: str) -> None:
        self.path, self.message = Path(path), message
        super().__init__(
            f"integrity check failed: {path}: {message}", hint="restore an earlier moment with -txid or -timestamp, or another replica"
        )


class CannotResume(RestoreError):
    """There is a database at the output, and nothing says which TXID it is at."""

    def __init__(self, path: str | Path, reason: str) -> None:
        self.path, self.reason = Path(path), reason
        super().__init__(
            f"cannot resume follow mode: {reason}; delete the database to re-restore: {path}", hint="delete the database, or -force"
        )


class CopyChanged(RestoreError):
    """A followed copy is not as this process left it: it is for reading only."""

    def __init__(self, path: str | Path, reason: str) -> None:
        self.path, self.reason = Path(path), reason
        super().__init__(
            f"followed copy was changed: {path} ({reason})", hint="a followed copy is read-only; delete it and its -txid file, then restart"
        )


class CopyInUse(RestoreError):
    """Somebody else keeps the copy up to date."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        super().__init__(f"another process follows into this file: {path}", hint="stop the other process, or choose another output")


class ReplicaStateError(ReplicatorError):
    """The replica does not belong to this database; continuing would mix two histories."""


class LineageMismatch(ReplicaStateError):
    """The replica carries another lineage than the local page table."""

    def __init__(self, url: str, *, expected: str, got: str) -> None:
        self.url, self.expected, self.got = url, expected, got
        super().__init__(
            f"replica belongs to another database: {url} (lineage {got}, expected {expected})", hint="replicate to a new, empty path"
        )


class ReplicaEmptied(ReplicaStateError):
    """The replica lost files that it had stored."""

    def __init__(self, url: str, *, expected: int, got: int) -> None:
        self.url, self.expected, self.got = url, expected, got
        super().__init__(
            f"replica lost files: {url} (had TXID {expected:016x}, now {got:016x})",
            hint="check the path and its lifecycle rules; a new path or -force-snapshot starts afresh",
        )


class ReplicaBroken(ReplicaStateError):
    """The replica's chain has a gap: what is appended now could not be restored."""

    def __init__(self, url: str, have: int, next_txid: int) -> None:
        self.url, self.have, self.next_txid = url, have, next_txid
        super().__init__(
            f"replica has a gap: {url} (files lead up to TXID {have:016x}, and go on at {next_txid:016x})",
            hint="-force-snapshot goes on with a full image after the gap; a new path starts afresh",
        )


class Diverged(ReplicaStateError):
    """A replica holds another history than the one that it is compared with."""

    def __init__(self, url: str, other: str, txid: int) -> None:
        self.url, self.other, self.txid = url, other, txid
        super().__init__(
            f"replica tells another history: {url} (TXID {txid:016x} is not that of {other})",
            hint="leave one of the two out, or give it a new, empty path; `pyrepl restore` shows what each holds",
        )


class LeaseError(ReplicatorError):
    """This process is not, or is no longer, the writer."""


class Fenced(LeaseError):
    """Another writer appended at the TXID that this process was about to write."""

    def __init__(self, url: str, txid: int, *, why: str = "", hint: str = "") -> None:
        self.url, self.txid = url, txid
        super().__init__(
            f"another writer owns the replica: {url} ({why or f'TXID {txid:016x} holds other bytes'})",
            hint=hint or "only one process may write a replica; stop one of them, then restart",
        )


class LeaseHeld(LeaseError):
    """Somebody else has the lease. `wait_s`: seconds after which it may be free, if its owner does not renew it."""

    def __init__(self, url: str, *, owner: str, generation: int, wait_s: float) -> None:
        self.url, self.owner, self.generation, self.wait_s = url, owner, generation, wait_s
        super().__init__(
            f"lease is held by {owner or 'somebody'}: {url} (generation {generation})",
            hint=f"it is free {wait_s:.0f} s after its owner last renewed it; takeover waits for that, `pyrepl lease show` shows it",
        )


class LeaseLost(LeaseError):
    """The lease was this process's, and is not any more. `released`: nobody has taken it, it was released from outside."""

    def __init__(self, url: str, *, owner: str, generation: int, released: bool = False) -> None:
        self.url, self.owner, self.generation = url, owner, generation
        to = "nobody, it was released from outside" if released else owner or "nobody, the object was removed"
        super().__init__(
            f"lease is lost to {to}: {url} (generation {generation})",
            hint="nothing more is acknowledged; start again with takeover to follow the new owner's state",
        )


class ConditionsIgnored(LeaseError):
    """A store that ignores the conditions of writes was asked to keep two writers apart."""

    def __init__(self, url: str) -> None:
        self.url = url
        super().__init__(
            f"store ignores conditional writes, so that a lease would protect nothing: {url}",
            hint="use a store that honours If-None-Match and If-Match, or replicate without a lease",
        )


class ConfigError(ReplicatorError):
    """A bad setting: a URL, an option or a path."""


class RequestRefused(ReplicatorError):
    """A running daemon refuses a control request, with this HTTP status."""

    def __init__(self, request: str, status: int, why: str) -> None:
        self.request, self.status, self.why = request, status, why
        super().__init__(f"{request} failed: {why}")


class WaitTimeout(ReplicatorError):
    """The transaction was not stored on every asked replica in the time given; it may be stored later."""

    def __init__(self, pending: str) -> None:
        self.pending = pending
        super().__init__(f"not stored in the time given: {pending}", hint="see status() for the replica's last error")
