"""The contract between the engine and a place that stores LTX files.

A replica holds two kinds of objects:

* **LTX files**, addressed by (level, min TXID, max TXID). Their names and folders are Litestream's and differ by backend
  (specification 2.1), which is why a client takes the address and not a name.
* **Control objects**, small and addressed by a relative name such as `pyrepl/lineage.json` or `lock.json`.

Rules that every client keeps, and that the conformance suite checks on each of them:

* A file is visible under its final name with all its bytes, or not at all. When `put` returns, it is stored durably.
* `put(..., if_absent=True)` creates or raises `PreconditionFailed`; it never overwrites. (A store that ignores conditions is found by
  a probe, not by the client.)
* `list` yields in ascending (min TXID, max TXID) order and ignores every name that is not exactly `<16 hex>-<16 hex>.ltx`. A level that was
  never written is empty, not an error.
* `delete` of a missing file is not an error.
* Errors are those of `replicator.errors`; `StorageUnavailable` means "try again later", and for a write "outcome unknown".
* A client may be used from several threads at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self, runtime_checkable

from replicator.format.ltx import TXID, FileInfo, parse_name

__all__ = [
    "AGE",
    "FROM_START",
    "LITESTREAM",
    "Body",
    "Comparing",
    "ControlObject",
    "Layout",
    "ObjectStore",
    "ReadStream",
    "ReplicaClient",
    "StoredObject",
    "body_size",
    "check_control_name",
    "check_metadata",
    "check_object_name",
    "created_at",
    "format_time",
    "parse_time",
]

FROM_START = TXID(0)
"""`seek` of a listing that begins at the first file."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

_CONTROL_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}(/[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}){0,3}")
_LTX_FOLDER = re.compile(r"(ltx|age|generations|[0-9a-f]{4})(/.*)?")
_OBJECT_NAME = re.compile(r"generations(/[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}){0,3}")
_METADATA_KEY = re.compile(r"pyrepl-[a-z0-9-]{1,64}")
_METADATA_VALUE = re.compile(r"[!-~]([ -~]{0,510}[!-~])?")


Body = bytes | bytearray | memoryview | Path
"""What `put` stores: bytes, or the path of a complete local file that the client reads (and may hard-link, never changes)."""


def body_size(body: Body) -> int:
    """Return a body's size in bytes. A body that is missing is the caller's error, not the replica's: `FileNotFoundError`."""
    return body.stat().st_size if isinstance(body, Path) else memoryview(body).nbytes


@dataclass(frozen=True, slots=True)
class ControlObject:
    """A small object with its version. `etag` is opaque, and changes whenever the content does."""

    data: bytes
    etag: str


@dataclass(frozen=True, slots=True)
class Layout:
    """Where LTX files are under a replica's path. `folder` holds the levels, empty for the backend's own; `suffix` ends the names."""

    folder: str
    suffix: str

    def name(self, info: FileInfo) -> str:
        """Return the name that a file is stored under, without folder."""
        return info.name + self.suffix

    def parse(self, name: str) -> tuple[TXID, TXID] | None:
        """Return the range that a stored name stands for; None for every other name."""
        return parse_name(name.removesuffix(self.suffix)) if name.endswith(self.suffix) else None


LITESTREAM = Layout(folder="", suffix="")
"""Litestream's own folders and names."""

AGE = Layout(folder="age", suffix=".age")
"""Encrypted files: in a folder that Litestream does not look into, so that it finds an empty replica and cannot append to ours."""


class ReadStream(Protocol):
    """A stored file being read. A context manager."""

    def read(self, size: int = -1, /) -> bytes:
        """Return up to `size` bytes, all that remain for -1, and `b""` only at the end of what was asked for."""

    def close(self) -> None:
        """Release the connection. Closing twice does nothing."""

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None, /) -> None: ...


@runtime_checkable
class ReplicaClient(Protocol):
    """One replica path in one store."""

    @property
    def kind(self) -> str:
        """Backend name as Litestream prints it: `file`, `s3`, `memory`."""

    @property
    def url(self) -> str:
        """Where this is, for people and logs. Never contains a secret."""

    @property
    def can_read(self) -> bool:
        """Whether `open` works. False for a client that encrypts and has no key to decrypt; whoever must read then takes a snapshot instead."""

    def list(self, level: int, *, seek: TXID = FROM_START, accurate_times: bool = False) -> Iterator[FileInfo]:
        """Yield the files of a level whose min TXID is at least `seek`, in ascending order.

        `created_at` is the cheap time of the listing; with `accurate_times` it is the time of the LTX header that `put` was given.
        """

    def open(self, info: FileInfo, *, offset: int = 0, size: int | None = None) -> ReadStream:
        """Open a file, or the range of `size` bytes (at least 1) from `offset`. A range past the end is cut at the end.

        Raises:
            ObjectNotFound: now, not at the first read.
        """

    def put(
        self,
        level: int,
        min_txid: TXID,
        max_txid: TXID,
        body: Body,
        *,
        timestamp_ms: int,
        if_absent: bool = False,
        metadata: dict[str, str] | None = None,
    ) -> FileInfo:
        """Store a file. `timestamp_ms` is the header's time, kept as `created_at`.

        `metadata`: lower-case keys starting with `pyrepl-`, stored where the backend has a place for it (S3), else dropped.

        Raises:
            PreconditionFailed: `if_absent` and the file exists.
            StorageUnavailable: the outcome is unknown; read back before trying again.
        """

    def metadata(self, info: FileInfo) -> dict[str, str]:
        """Return the metadata that `put` stored with lower-case keys (reading is case-insensitive); empty where the backend keeps none."""

    def delete(self, files: Iterable[FileInfo]) -> None:
        """Delete files, in batches where the backend can. Missing ones are no error."""

    def get_control(self, name: str) -> ControlObject:
        """Read a control object. Raises `ObjectNotFound`."""

    def put_control(self, name: str, data: bytes, *, if_match: str | None = None, if_absent: bool = False) -> str:
        """Write a control object and return its etag.

        Raises:
            PreconditionFailed: `if_absent` and it exists, or `if_match` is not its etag.
            ConditionUnsupported: `if_match`, and the store cannot check and write in one step. Nothing was written.
        """

    def delete_control(self, name: str, *, if_match: str | None = None) -> None:
        """Delete a control object; missing is no error unless `if_match` is given (see `put_control`)."""

    def close(self) -> None:
        """Release connections. The client is not used afterwards."""


@runtime_checkable
class Comparing(Protocol):
    """A client that answers for itself whether a file holds a body, because what it stores is not the body."""

    def holds(self, info: FileInfo, body: Body) -> bool:
        """Say whether the stored file is this body, as far as can be known: False means other bytes, or that nobody can tell.

        Raises:
            ObjectNotFound: there is no such file.
        """


@dataclass(frozen=True, slots=True)
class StoredObject:
    """An object of `ObjectStore`. `name` as asked: below the folder in a listing. `created_ns`: when the store got it, since 1970."""

    name: str
    size: int
    created_ns: int


@runtime_checkable
class ObjectStore(Protocol):
    """Objects by their names below `generations` in the replica's path: what the 0.3 format is read from and written to (see `v3.V3Client`).

    The rules of `ReplicaClient` hold: an object is there with all its bytes or not at all, is stored durably when `put_object` returns,
    and errors are those of `replicator.errors`. A folder that is missing is empty. Listings are in no particular order.
    """

    @property
    def kind(self) -> str:
        """Backend name as Litestream prints it."""

    @property
    def url(self) -> str:
        """Where this is, for people and logs. Never contains a secret."""

    @property
    def can_read(self) -> bool:
        """Whether `open_object` works (see `ReplicaClient.can_read`)."""

    def list_folders(self, folder: str) -> Sequence[str]:
        """Return the names of the folders in a folder."""

    def list_objects(self, folder: str) -> Sequence[StoredObject]:
        """Return the objects in a folder, not those in its folders. Sizes are those that are stored."""

    def open_object(self, name: str, *, offset: int = 0) -> ReadStream:
        """Open an object, or what follows `offset`. Raises `ObjectNotFound` now, not at the first read."""

    def put_object(self, name: str, body: Body, *, if_absent: bool = False) -> StoredObject:
        """Store an object, in place of one of that name.

        Raises:
            PreconditionFailed: `if_absent` and the object exists.
            StorageUnavailable: the outcome is unknown.
        """

    def delete_objects(self, names: Iterable[str]) -> None:
        """Delete objects, in batches where the backend can. Missing ones are no error."""

    def delete_folder(self, folder: str) -> None:
        """Delete a folder with all that is in it. A missing one is no error."""

    def close(self) -> None:
        """Release connections. The client is not used afterwards."""


def check_object_name(name: str) -> None:
    """Refuse names and folders that are not below `generations`, on any backend. Raises `ValueError`."""
    if not _OBJECT_NAME.fullmatch(name):
        raise ValueError(f"not a name of a stored object: {name!r}")


def check_control_name(name: str) -> None:
    """Refuse names that could leave the replica's path, or meet an LTX file or a client's own files, on any backend.

    Raises:
        ValueError: the name is not one to four plain components (letters, digits, `.`, `_`, `-`, no leading dot), or its first one is a
            folder of LTX files.
    """
    if not _CONTROL_NAME.fullmatch(name) or _LTX_FOLDER.fullmatch(name):
        raise ValueError(f"not a name for a control object: {name!r}")


def check_metadata(metadata: dict[str, str] | None) -> dict[str, str]:
    """Return a copy of the metadata for `put`, which must survive as HTTP headers.

    Raises:
        ValueError: a key is not lower-case and `pyrepl-*`, or a value is empty, long, or not printable ASCII.
    """
    for key, value in (metadata or {}).items():
        if not _METADATA_KEY.fullmatch(key) or not _METADATA_VALUE.fullmatch(value):
            raise ValueError(f"not a metadata entry: {key!r}")
    return dict(metadata or {})


def created_at(timestamp_ms: int) -> datetime:
    """Return a header's or a file's time as a time point. What lies outside the calendar (hostile or damaged) becomes its nearest end."""
    try:
        return _EPOCH + timedelta(milliseconds=timestamp_ms)
    except OverflowError:
        return (datetime.max if timestamp_ms > 0 else datetime.min).replace(tzinfo=UTC)


def format_time(when: datetime) -> str:
    """RFC 3339 in UTC, milliseconds, without trailing zeros: `2026-11-23T14:31:44.39Z`."""
    text = when.strftime("%Y-%m-%dT%H:%M:%S")
    fraction = f"{when.microsecond // 1000:03d}".rstrip("0")
    return f"{text}.{fraction}Z" if fraction else f"{text}Z"


def parse_time(text: object) -> datetime | None:
    """Return the time of a text with any number of digits in the fraction; None when there is none that can be read."""
    if not isinstance(text, str) or not re.fullmatch(r"[0-9T:.Z+-]{10,48}", text):
        return None
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        return None
    return when.replace(tzinfo=UTC) if when.tzinfo is None else when.astimezone(UTC)
