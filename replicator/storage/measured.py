"""A client that counts what goes through it: operations by kind, their bytes, how long they take, and how they fail.

Kinds are the peer's: PUT, GET, DELETE and LIST. One operation may be several requests of a store (a large file in parts, a long listing).
The bytes of a GET are those that were asked for.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from replicator.errors import ObjectNotFound, PreconditionFailed
from replicator.format.ltx import TXID, FileInfo
from replicator.storage.base import FROM_START, Body, Comparing, ControlObject, ObjectStore, ReadStream, ReplicaClient, StoredObject

__all__ = ["BUCKETS_S", "Measured", "MeasuredComparing", "Operations", "measured"]

BUCKETS_S = (0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0)
"""Upper bounds of the histogram of durations, as the peer has them."""


@dataclass(slots=True)
class Kind:
    """What was counted for one kind of operation. `slots`: durations, by the bucket that they fall into; the last one has no bound."""

    count: int = 0
    size_bytes: int = 0
    seconds: float = 0.0
    slots: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS_S) + 1))
    errors: dict[str, int] = field(default_factory=dict)


class Operations:
    """Counts by backend and kind. May be used from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kinds: dict[tuple[str, str], Kind] = {}

    def note(self, client: Measured, kind: str, seconds: float, size_bytes: int, error: str | None) -> None:
        """Count an operation of a client that has ended."""
        with self._lock:
            client.requests += 1
            counted = self._kinds.setdefault((client.kind, kind), Kind())
            counted.count += 1
            counted.seconds += seconds
            counted.slots[bisect_left(BUCKETS_S, seconds)] += 1
            if error is None:
                counted.size_bytes += size_bytes
            else:
                counted.errors[error] = counted.errors.get(error, 0) + 1

    def kinds(self) -> dict[tuple[str, str], Kind]:
        """Return a copy."""
        with self._lock:
            return {
                key: Kind(item.count, item.size_bytes, item.seconds, list(item.slots), dict(item.errors))
                for key, item in self._kinds.items()
            }


def measured(client: ReplicaClient, operations: Operations) -> ReplicaClient:
    """Return a client that does the same, and counts."""
    return MeasuredComparing(client, operations) if isinstance(client, Comparing) else Measured(client, operations)


class Measured:
    """What `measured` returns. `requests`: operations of this client, failed ones included."""

    def __init__(self, inner: ReplicaClient, operations: Operations) -> None:
        self.requests = 0
        self._inner, self._operations = inner, operations

    def __repr__(self) -> str:
        return repr(self._inner)

    @property
    def kind(self) -> str:
        return self._inner.kind

    @property
    def url(self) -> str:
        return self._inner.url

    @property
    def can_read(self) -> bool:
        return self._inner.can_read

    def list(self, level: int, *, seek: TXID = FROM_START, accurate_times: bool = False) -> Iterator[FileInfo]:
        with self._timed("LIST"):
            return iter([*self._inner.list(level, seek=seek, accurate_times=accurate_times)])

    def open(self, info: FileInfo, *, offset: int = 0, size: int | None = None) -> ReadStream:
        with self._timed("GET", max(0, info.size - offset) if size is None else size):
            return self._inner.open(info, offset=offset, size=size)

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
        with self._timed("PUT") as timed:
            info = self._inner.put(level, min_txid, max_txid, body, timestamp_ms=timestamp_ms, if_absent=if_absent, metadata=metadata)
            timed.size_bytes = info.size
            return info

    def metadata(self, info: FileInfo) -> dict[str, str]:
        with self._timed("GET"):
            return self._inner.metadata(info)

    def delete(self, files: Iterable[FileInfo]) -> None:
        with self._timed("DELETE"):
            self._inner.delete(files)

    def get_control(self, name: str) -> ControlObject:
        with self._timed("GET") as timed:
            stored = self._inner.get_control(name)
            timed.size_bytes = len(stored.data)
            return stored

    def put_control(self, name: str, data: bytes, *, if_match: str | None = None, if_absent: bool = False) -> str:
        with self._timed("PUT", len(data)):
            return self._inner.put_control(name, data, if_match=if_match, if_absent=if_absent)

    def delete_control(self, name: str, *, if_match: str | None = None) -> None:
        with self._timed("DELETE"):
            self._inner.delete_control(name, if_match=if_match)

    def close(self) -> None:
        self._inner.close()

    # -- objects of the 0.3 format -----------------------------------------------------------------------------------------------

    @property
    def _objects(self) -> ObjectStore:
        assert isinstance(self._inner, ObjectStore)  # every backend is one
        return self._inner

    def list_folders(self, folder: str) -> Sequence[str]:
        with self._timed("LIST"):
            return self._objects.list_folders(folder)

    def list_objects(self, folder: str) -> Sequence[StoredObject]:
        with self._timed("LIST"):
            return self._objects.list_objects(folder)

    def open_object(self, name: str, *, offset: int = 0) -> ReadStream:
        with self._timed("GET"):
            return self._objects.open_object(name, offset=offset)

    def put_object(self, name: str, body: Body, *, if_absent: bool = False) -> StoredObject:
        with self._timed("PUT") as timed:
            stored = self._objects.put_object(name, body, if_absent=if_absent)
            timed.size_bytes = stored.size
            return stored

    def delete_objects(self, names: Iterable[str]) -> None:
        with self._timed("DELETE"):
            self._objects.delete_objects(names)

    def delete_folder(self, folder: str) -> None:
        with self._timed("DELETE"):
            self._objects.delete_folder(folder)

    def _timed(self, kind: str, size_bytes: int = 0) -> _Timed:
        return _Timed(self._operations, self, kind, size_bytes)


class MeasuredComparing(Measured):
    """The same, of a client that compares files itself."""

    def holds(self, info: FileInfo, body: Body) -> bool:
        assert isinstance(self._inner, Comparing)
        with self._timed("GET", info.size):
            return self._inner.holds(info, body)


class _Timed:
    """One operation. That an object is missing, or there already, is an answer and not an error."""

    def __init__(self, operations: Operations, client: Measured, kind: str, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self._operations, self._client, self._kind = operations, client, kind

    def __enter__(self) -> _Timed:
        self._began = time.monotonic()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        failed = error is not None and not isinstance(error, (ObjectNotFound, PreconditionFailed))
        name = type(error).__name__ if failed else None
        self._operations.note(self._client, self._kind, time.monotonic() - self._began, 0 if error else self.size_bytes, name)
