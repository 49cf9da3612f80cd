"""A replica in any store of named objects: what all of them have in common, once.

A store (`Objects`) keeps bytes under names with slashes, and says how they are listed, read, written and deleted, and which conditions it can
check. `TreeClient` makes a replica of it: Litestream's folders and names, control objects, objects of the 0.3 format, times.

Times. Some listings carry the header's time; for the others `accurate_times` reads it from where the store has it, or from the file's own
first bytes, which for an encrypted file say nothing: then the store's time stays.

Source: specification 2.1 (paths).
"""

from __future__ import annotations

import contextlib
import os
import posixpath
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Protocol, Self

from replicator.errors import FormatError, ObjectNotFound, StorageError, StorageUnavailable
from replicator.format.ltx import LTX_HEADER_SIZE, TXID, FileInfo, decode_header, format_name
from replicator.storage.base import (
    FROM_START,
    LITESTREAM,
    Body,
    ControlObject,
    Layout,
    ReadStream,
    StoredObject,
    body_size,
    check_control_name,
    check_metadata,
    check_object_name,
    created_at,
)

__all__ = [
    "CHUNK",
    "Entry",
    "Objects",
    "Pieces",
    "TreeClient",
    "Write",
    "etag_of",
    "is_stale",
    "opened",
    "stored_time",
    "temporary_name",
    "whole",
]

CHUNK = 1 << 20
"""Bytes that are moved at once."""

_MAX_CONTROL_SIZE = 1 << 20
_TIME_THREADS = 16


@dataclass(frozen=True, slots=True)
class Entry:
    """An object of a listing. `name` is below the folder; `when` the header's time if the listing has it; `stored_ns` since 1970."""

    name: str
    size: int
    stored_ns: int
    when: datetime | None = None


@dataclass(frozen=True, slots=True)
class Write:
    """How an object is written. `when` is kept as its time where there is a place for it, `metadata` likewise."""

    when: datetime | None = None
    metadata: Mapping[str, str] | None = None
    if_absent: bool = False
    if_match: str | None = None

    @property
    def conditional(self) -> bool:
        return self.if_absent or self.if_match is not None


class Objects(Protocol):
    """A store. Names are relative to the replica's path, without a leading slash; the rules of `ReplicaClient` hold for all of it."""

    kind: str

    @property
    def url(self) -> str:
        """Where this is, without a secret."""

    def entries(self, folder: str) -> Iterable[Entry]:
        """Yield the objects in a folder, not those in its folders, in any order. A missing folder is empty; "" is the replica's path."""

    def folders(self, folder: str) -> Iterable[str]:
        """Yield the names of the folders in a folder, likewise."""

    def open(self, name: str, offset: int, size: int | None) -> ReadStream:
        """Open a range; one past the end is cut. Raises `ObjectNotFound` now."""

    def get(self, name: str) -> tuple[bytes, str]:
        """Return a small object whole, and its etag."""

    def write(self, name: str, body: Body, how: Write) -> str:
        """Write an object whole or not at all; return its etag.

        Raises:
            PreconditionFailed, ConditionUnsupported.
        """

    def details(self, name: str) -> tuple[datetime | None, dict[str, str]]:
        """Return the time and the metadata that were written with an object, as far as the store keeps them."""

    def delete(self, names: Sequence[str]) -> None:
        """Delete objects. Missing ones are no error."""

    def delete_if(self, name: str, etag: str) -> None:
        """Delete an object if it has this etag. Raises `PreconditionFailed`, `ConditionUnsupported`."""

    def delete_folder(self, folder: str) -> None:
        """Delete a folder with all that is in it."""

    def close(self) -> None:
        """Release connections."""


class TreeClient:
    """The replica in a store.

    Args:
        objects: the store, which is closed with the client.
        layout: where the LTX files are.
        folder: format of a level's folder.
    """

    can_read = True

    def __init__(self, objects: Objects, *, layout: Layout = LITESTREAM, folder: str = "ltx/{level}") -> None:
        self.objects = objects
        self.layout = layout
        self._folder = folder if not layout.folder else posixpath.join(layout.folder, posixpath.basename(folder))

    @property
    def kind(self) -> str:
        return self.objects.kind

    @property
    def url(self) -> str:
        return self.objects.url

    def __repr__(self) -> str:
        return f"TreeClient({self.url!r})"

    # -- LTX files ---------------------------------------------------------------------------------------------------------------

    def level_folder(self, level: int) -> str:
        """Return the folder of a level, below the replica's path."""
        return self._folder.format(level=level)

    def list(self, level: int, *, seek: TXID = FROM_START, accurate_times: bool = False) -> Iterator[FileInfo]:
        found: dict[str, tuple[FileInfo, bool]] = {}
        for entry in self.objects.entries(self.level_folder(level)):
            txids = self.layout.parse(entry.name)
            if txids is not None and txids[0] >= seek:
                when = entry.when or created_at(entry.stored_ns // 1_000_000)
                found[entry.name] = FileInfo(level, *txids, size=entry.size, created_at=when), entry.when is not None
        files = sorted(found.values(), key=lambda item: (item[0].min_txid, item[0].max_txid))
        inexact = [info for info, exact in files if not exact]
        if not accurate_times or not inexact:
            yield from (info for info, _ in files)
            return
        with ThreadPoolExecutor(min(_TIME_THREADS, len(inexact)), f"{self.kind}-time") as pool:
            times = iter([*pool.map(self._accurate, inexact)])
        yield from (info if exact else next(times) for info, exact in files)

    def open(self, info: FileInfo, *, offset: int = 0, size: int | None = None) -> ReadStream:
        return self.objects.open(self._name(info), offset, size)

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
        name = f"{self.level_folder(level)}/{format_name(min_txid, max_txid)}{self.layout.suffix}"
        when = created_at(timestamp_ms)
        size = body_size(body)
        self.objects.write(name, body, Write(when=when, metadata=check_metadata(metadata), if_absent=if_absent))
        return FileInfo(level=level, min_txid=min_txid, max_txid=max_txid, size=size, created_at=when)

    def metadata(self, info: FileInfo) -> dict[str, str]:
        return self.objects.details(self._name(info))[1]

    def delete(self, files: Iterable[FileInfo]) -> None:
        self.objects.delete([self._name(info) for info in files])

    def _name(self, info: FileInfo) -> str:
        return f"{self.level_folder(info.level)}/{self.layout.name(info)}"

    def _accurate(self, info: FileInfo) -> FileInfo:
        """Return the file with its header's time. The store's stays where there is none, or the file was deleted meanwhile."""
        try:
            when = self.objects.details(self._name(info))[0]
            if when is None and self.layout == LITESTREAM:
                with self.open(info, size=LTX_HEADER_SIZE) as stream, contextlib.suppress(FormatError):
                    when = created_at(decode_header(stream.read()).timestamp_ms)
        except ObjectNotFound:
            return info
        return info if when is None else replace(info, created_at=when)

    # -- control objects ---------------------------------------------------------------------------------------------------------

    def get_control(self, name: str) -> ControlObject:
        check_control_name(name)
        return ControlObject(*self.objects.get(name))

    def put_control(self, name: str, data: bytes, *, if_match: str | None = None, if_absent: bool = False) -> str:
        check_control_name(name)
        return self.objects.write(name, bytes(data), Write(if_match=if_match, if_absent=if_absent))

    def delete_control(self, name: str, *, if_match: str | None = None) -> None:
        check_control_name(name)
        if if_match is None:
            self.objects.delete([name])
        else:
            self.objects.delete_if(name, if_match)

    # -- objects of the 0.3 format -----------------------------------------------------------------------------------------------

    def list_folders(self, folder: str) -> Sequence[str]:
        check_object_name(folder)
        return sorted(set(self.objects.folders(folder)))

    def list_objects(self, folder: str) -> Sequence[StoredObject]:
        check_object_name(folder)
        found = {entry.name: entry for entry in self.objects.entries(folder)}
        return [StoredObject(name, entry.size, entry.stored_ns) for name, entry in found.items()]

    def open_object(self, name: str, *, offset: int = 0) -> ReadStream:
        check_object_name(name)
        return self.objects.open(name, offset, None)

    def put_object(self, name: str, body: Body, *, if_absent: bool = False) -> StoredObject:
        check_object_name(name)
        size = body_size(body)
        self.objects.write(name, body, Write(if_absent=if_absent))
        return StoredObject(name, size, time.time_ns())

    def delete_objects(self, names: Iterable[str]) -> None:
        gone = [*names]
        for name in gone:
            check_object_name(name)
        self.objects.delete(gone)

    def delete_folder(self, folder: str) -> None:
        check_object_name(folder)
        self.objects.delete_folder(folder)

    def close(self) -> None:
        self.objects.close()


# -- what stores are made of -----------------------------------------------------------------------------------------------------


class Pieces:
    """A stream over pieces that arrive one after the other, which must have the announced length together.

    Args:
        pieces: non-empty pieces. Its errors are already ours.
        size: of what was asked for, in bytes.
        name: for messages.
        release: called once, at the end or earlier.
    """

    def __init__(self, pieces: Iterable[bytes], size: int, name: str, release: Callable[[], None] = lambda: None) -> None:
        self._pieces, self._rest, self._name, self._release = iter(pieces), size, name, release
        self._have: bytes | memoryview = b""
        self._closed = False

    def read(self, size: int = -1, /) -> bytes:
        wanted = self._rest if size < 0 else min(size, self._rest)
        found: list[bytes | memoryview] = []
        while wanted:
            if not len(self._have):
                self._have = memoryview(next(self._pieces, b""))
            if not len(self._have):
                raise StorageUnavailable(f"connection ended before the object did: {self._name}")
            found.append(self._have[:wanted])
            wanted -= len(found[-1])
            self._rest -= len(found[-1])
            self._have = self._have[len(found[-1]) :]
        return b"".join(found)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._have = b""
            self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None, /) -> None:
        self.close()


def opened(body: Body) -> BinaryIO:
    """Open a body for reading."""
    return body.open("rb") if isinstance(body, Path) else BytesIO(body)


def whole(stream: ReadStream, name: str) -> bytes:
    """Read a control object. Raises `StorageError` when it is larger than any of ours."""
    with stream:
        data = stream.read(_MAX_CONTROL_SIZE + 1)
    if len(data) > _MAX_CONTROL_SIZE:
        raise StorageError(f"control object is too large: {name}")
    return data


def stored_time(when: datetime | None) -> int:
    """Return a store's time in nanoseconds since 1970; 0 when it says none."""
    return 0 if when is None else int(when.timestamp() * 1_000_000) * 1000


# -- stores with folders: temporary names ----------------------------------------------------------------------------------------

_TEMPORARY = re.compile(r".+\.[0-9]{1,10}\.([0-9]{1,20})\.tmp")
_STALE_NS = 24 * 3600 * 10**9


def temporary_name(name: str) -> str:
    """Return a name to write an object under before it gets its own, beside it. Listings pass it over, Litestream's, too."""
    return f"{name}.{os.getpid()}.{time.time_ns()}.tmp"


def is_stale(name: str) -> bool:
    """Say whether a name is that of a write which its writer did not finish for a day, by the writer's clock: nobody works on it."""
    found = _TEMPORARY.fullmatch(name)
    return found is not None and int(found[1]) < time.time_ns() - _STALE_NS


def etag_of(data: bytes) -> str:
    """Return an etag for stores that have none, or none that can be relied on."""
    return sha256(data).hexdigest()
