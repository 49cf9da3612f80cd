"""A replica in memory: the contract in its shortest executable form, and the store for tests.

What another backend does differently from this one is a bug there, or a deviation that the conformance suite names.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import ClassVar, Self

from replicator.errors import ObjectNotFound, PreconditionFailed
from replicator.format.ltx import TXID, FileInfo
from replicator.storage.base import (
    FROM_START,
    LITESTREAM,
    Body,
    ControlObject,
    Layout,
    ReadStream,
    StoredObject,
    check_control_name,
    check_metadata,
    check_object_name,
    created_at,
)

__all__ = ["MemoryClient"]


@dataclass(frozen=True, slots=True)
class _Stored:
    info: FileInfo
    data: bytes
    metadata: dict[str, str]


@dataclass(slots=True)
class _Store:
    """What the clients of one name share. `lock` guards the dictionaries; the values in them never change."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    files: dict[tuple[Layout, int, TXID, TXID], _Stored] = field(default_factory=dict)
    control: dict[str, ControlObject] = field(default_factory=dict)
    objects: dict[str, tuple[bytes, int]] = field(default_factory=dict)


class MemoryClient:
    """A client of an unnamed store of its own, or of one that it shares (see `named`). `clock_ns` gives the times of `put_object`."""

    kind = "memory"
    can_read = True

    _named: ClassVar[dict[str, _Store]] = {}
    _named_lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, *, layout: Layout = LITESTREAM, clock_ns: Callable[[], int] = time.time_ns) -> None:
        self.url = "memory://"
        self.layout = layout
        self._clock_ns = clock_ns
        self._store = _Store()

    @classmethod
    def named(cls, name: str, *, layout: Layout = LITESTREAM) -> Self:
        """Return a client of the store of that name; all of them in this process share it. It lives as long as the process."""
        client = cls(layout=layout)
        client.url = f"memory://{name}"
        with cls._named_lock:
            client._store = cls._named.setdefault(name, client._store)
        return client

    def __repr__(self) -> str:
        return f"MemoryClient({self.url!r})"

    def list(self, level: int, *, seek: TXID = FROM_START, accurate_times: bool = False) -> Iterator[FileInfo]:
        with self._store.lock:
            found = [
                stored.info
                for (layout, *_), stored in self._store.files.items()
                if layout == self.layout and stored.info.level == level and stored.info.min_txid >= seek
            ]
        yield from sorted(found, key=lambda info: (info.min_txid, info.max_txid))

    def open(self, info: FileInfo, *, offset: int = 0, size: int | None = None) -> ReadStream:
        stored = self._get(info)
        return BytesIO(stored.data[offset : None if size is None else offset + size])

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
        data = body.read_bytes() if isinstance(body, Path) else bytes(body)
        info = FileInfo(level=level, min_txid=min_txid, max_txid=max_txid, size=len(data), created_at=created_at(timestamp_ms))
        stored = _Stored(info, data, check_metadata(metadata))
        with self._store.lock:
            if if_absent and self._key(info) in self._store.files:
                raise PreconditionFailed(info.name)
            self._store.files[self._key(info)] = stored
        return info

    def metadata(self, info: FileInfo) -> dict[str, str]:
        return dict(self._get(info).metadata)

    def delete(self, files: Iterable[FileInfo]) -> None:
        for info in files:
            with self._store.lock:
                self._store.files.pop(self._key(info), None)

    def get_control(self, name: str) -> ControlObject:
        check_control_name(name)
        with self._store.lock:
            if name not in self._store.control:
                raise ObjectNotFound(name)
            return self._store.control[name]

    def put_control(self, name: str, data: bytes, *, if_match: str | None = None, if_absent: bool = False) -> str:
        check_control_name(name)
        new = ControlObject(bytes(data), sha256(data).hexdigest())
        with self._store.lock:
            old = self._store.control.get(name)
            if (if_absent and old is not None) or (if_match is not None and (old is None or old.etag != if_match)):
                raise PreconditionFailed(name)
            self._store.control[name] = new
        return new.etag

    def delete_control(self, name: str, *, if_match: str | None = None) -> None:
        check_control_name(name)
        with self._store.lock:
            old = self._store.control.get(name)
            if if_match is not None and (old is None or old.etag != if_match):
                raise PreconditionFailed(name)
            self._store.control.pop(name, None)

    def list_folders(self, folder: str) -> Sequence[str]:
        check_object_name(folder)
        with self._store.lock:
            below = [name[len(folder) + 1 :] for name in self._store.objects if name.startswith(f"{folder}/")]
        return sorted({name.partition("/")[0] for name in below if "/" in name})

    def list_objects(self, folder: str) -> Sequence[StoredObject]:
        check_object_name(folder)
        with self._store.lock:
            found = [(name[len(folder) + 1 :], *kept) for name, kept in self._store.objects.items() if name.startswith(f"{folder}/")]
        return [StoredObject(name, len(data), created_ns) for name, data, created_ns in found if "/" not in name]

    def open_object(self, name: str, *, offset: int = 0) -> ReadStream:
        check_object_name(name)
        with self._store.lock:
            if name not in self._store.objects:
                raise ObjectNotFound(name)
            return BytesIO(self._store.objects[name][0][offset:])

    def put_object(self, name: str, body: Body, *, if_absent: bool = False) -> StoredObject:
        check_object_name(name)
        data = body.read_bytes() if isinstance(body, Path) else bytes(body)
        stored = StoredObject(name, len(data), self._clock_ns())
        with self._store.lock:
            if if_absent and name in self._store.objects:
                raise PreconditionFailed(name)
            self._store.objects[name] = (data, stored.created_ns)
        return stored

    def delete_objects(self, names: Iterable[str]) -> None:
        for name in names:
            check_object_name(name)
            with self._store.lock:
                self._store.objects.pop(name, None)

    def delete_folder(self, folder: str) -> None:
        check_object_name(folder)
        with self._store.lock:
            for name in [name for name in self._store.objects if name.startswith(f"{folder}/")]:
                del self._store.objects[name]

    def close(self) -> None:
        pass

    def _get(self, info: FileInfo) -> _Stored:
        with self._store.lock:
            stored = self._store.files.get(self._key(info))
        if stored is None:
            raise ObjectNotFound(f"{info.level}/{self.layout.name(info)}")
        return stored

    def _key(self, info: FileInfo) -> tuple[Layout, int, TXID, TXID]:
        return self.layout, info.level, info.min_txid, info.max_txid
