"""`FaultyClient`: a storage client that misbehaves as told, by a seed or by a script.

    store = FaultyClient(MemoryClient(), seed=7, faults={Fault.ERROR: 0.1, Fault.LOST_REPLY: 0.1})
    with Replicator("app.db", store): ...
    store.happened                                 # which faults there were, and how often

    store = FaultyClient(MemoryClient())           # none by chance
    store.fail_next(Fault.LOST_REPLY, "put")       # the next put acts, and its reply is lost

| fault | operations | what happens |
|---|---|---|
| `ERROR` | all | nothing is done; `StorageUnavailable` |
| `LOST_REPLY` | put, delete, put_control, delete_control | it is done; `StorageUnavailable` |
| `DUPLICATE` | put, put_control, without conditions; delete | it is done twice |
| `DELAY` | all | it is done after a pause |
| `STALE_LIST` | list | an earlier state of the level, or the newest file is missing |
| `CUT` | open | the connection ends at some byte: `StorageUnavailable` from `read` |
| `TRUNCATE` | open | the file ends early, as if no more had been stored |
| `CORRUPT` | open | one bit of what is read is flipped |

`ERROR` to `CUT` are what an honest store and its network do: the engine must come through all of them. `TRUNCATE` and `CORRUPT` are damage: the engine must
refuse it with an error that names the file, and never pass it on.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from enum import StrEnum
from types import TracebackType
from typing import Self, TypeVar

from replicator.errors import StorageUnavailable
from replicator.format.ltx import TXID, FileInfo
from replicator.storage.base import FROM_START, Body, Comparing, ControlObject, ReadStream, ReplicaClient

__all__ = ["Fault", "FaultyClient"]


class Fault(StrEnum):
    """What can go wrong. See the table in the module's docstring."""

    ERROR = "error"
    LOST_REPLY = "lost reply"
    DUPLICATE = "duplicate"
    DELAY = "delay"
    STALE_LIST = "stale list"
    CUT = "cut"
    TRUNCATE = "truncate"
    CORRUPT = "corrupt"


T = TypeVar("T")

_CHANGES = frozenset({"put", "delete", "put_control", "delete_control"})
_APPLIES: Mapping[Fault, frozenset[str]] = {
    Fault.ERROR: _CHANGES | {"list", "open", "metadata", "get_control"},
    Fault.LOST_REPLY: _CHANGES,
    Fault.DUPLICATE: frozenset({"put", "delete", "put_control"}),
    Fault.DELAY: _CHANGES | {"list", "open", "metadata", "get_control"},
    Fault.STALE_LIST: frozenset({"list"}),
    Fault.CUT: frozenset({"open"}),
    Fault.TRUNCATE: frozenset({"open"}),
    Fault.CORRUPT: frozenset({"open"}),
}


class FaultyClient:
    """A client in front of another one.

    With the same seed and the same calls in the same order the faults are the same; threads that share a client may call in another order.
    """

    def __init__(
        self,
        client: ReplicaClient,
        *,
        seed: int = 0,
        faults: Mapping[Fault, float] | None = None,
        max_delay_s: float = 0.01,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Wrap a client.

        Args:
            client: what does the work. For encrypted replicas wrap the store inside: `AgeClient(FaultyClient(...))`.
            faults: probability of each fault for each call that it can happen to; none by chance when not given.
            max_delay_s: of `Fault.DELAY`, in seconds.
        """
        if isinstance(client, Comparing):
            raise TypeError("wrap the store inside the encrypting client, not the encrypting client")
        self.inner = client
        self.faults: dict[Fault, float] = dict(faults or {})
        self.happened: Counter[Fault] = Counter()
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._script: deque[tuple[Fault, str | None]] = deque()
        self._listed: dict[int, list[FileInfo]] = {}
        self._calm = 0
        self._connected = True
        self._max_delay_s, self._sleep = max_delay_s, sleep

    def __repr__(self) -> str:
        return f"FaultyClient({self.inner!r})"

    # -- control -----------------------------------------------------------------------------------------------------------------

    def fail_next(self, fault: Fault, operation: str | None = None, *, times: int = 1) -> None:
        """Let the fault happen to the next calls that it can happen to (of that method, when given), in the order in which this is called."""
        if operation is not None and operation not in _APPLIES[fault]:
            raise ValueError(f"{fault} does not happen to {operation}")
        with self._lock:
            self._script.extend([(fault, operation)] * times)

    @contextlib.contextmanager
    def calm(self) -> Iterator[None]:
        """No faults while the block runs."""
        with self._lock:
            self._calm += 1
        try:
            yield
        finally:
            with self._lock:
                self._calm -= 1

    def disconnect(self) -> None:
        """From now on every call fails, without acting: the machine that used this client is gone."""
        with self._lock:
            self._connected = False

    # -- ReplicaClient -----------------------------------------------------------------------------------------------------------

    @property
    def kind(self) -> str:
        return self.inner.kind

    @property
    def url(self) -> str:
        return self.inner.url

    @property
    def can_read(self) -> bool:
        return self.inner.can_read

    def list(self, level: int, *, seek: TXID = FROM_START, accurate_times: bool = False) -> Iterator[FileInfo]:
        fault = self._begin("list", f"listing of level {level}")
        now = list(self.inner.list(level, accurate_times=accurate_times))
        with self._lock:
            before = self._listed.get(level)
            if fault is Fault.STALE_LIST:
                now = before if before is not None else now[:-1]
            else:
                self._listed[level] = now
        yield from (info for info in now if info.min_txid >= seek)

    def open(self, info: FileInfo, *, offset: int = 0, size: int | None = None) -> ReadStream:
        fault = self._begin("open", info.name)
        stream = self.inner.open(info, offset=offset, size=size)
        if fault not in (Fault.CUT, Fault.TRUNCATE, Fault.CORRUPT):
            return stream
        with stream:
            data = stream.read()
        with self._lock:
            at = self._random.randrange(len(data)) if data else 0
            bit = 1 << self._random.randrange(8)
        if fault is Fault.CORRUPT and data:
            data = data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :]
            return _Stream(data, None)
        return _Stream(data[:at], f"connection ended at byte {at}: {info.name}" if fault is Fault.CUT else None)

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
        def act() -> FileInfo:
            return self.inner.put(
                level, min_txid, max_txid, body, timestamp_ms=timestamp_ms, if_absent=if_absent, metadata=metadata
            )  # fmt: skip

        return self._change("put", f"level {level}, TXID {max_txid:016x}", act, conditional=if_absent)

    def metadata(self, info: FileInfo) -> dict[str, str]:
        self._begin("metadata", info.name)
        return self.inner.metadata(info)

    def delete(self, files: Iterable[FileInfo]) -> None:
        files = list(files)
        self._change("delete", f"{len(files)} files", lambda: self.inner.delete(files), conditional=False)

    def get_control(self, name: str) -> ControlObject:
        self._begin("get_control", name)
        return self.inner.get_control(name)

    def put_control(self, name: str, data: bytes, *, if_match: str | None = None, if_absent: bool = False) -> str:
        conditional = if_absent or if_match is not None
        return self._change(
            "put_control", name, lambda: self.inner.put_control(name, data, if_match=if_match, if_absent=if_absent), conditional=conditional
        )

    def delete_control(self, name: str, *, if_match: str | None = None) -> None:
        self._change("delete_control", name, lambda: self.inner.delete_control(name, if_match=if_match), conditional=if_match is not None)

    def close(self) -> None:
        self.inner.close()

    # -- faults ------------------------------------------------------------------------------------------------------------------

    def _change(self, operation: str, what: str, act: Callable[[], T], *, conditional: bool) -> T:
        fault = self._begin(operation, what, conditional=conditional)
        result = act()
        if fault is Fault.DUPLICATE:
            result = act()
        elif fault is Fault.LOST_REPLY:
            raise StorageUnavailable(f"reply to {operation} was lost: {what} ({self.url})")
        return result

    def _begin(self, operation: str, what: str, *, conditional: bool = False) -> Fault | None:
        """Choose what happens to a call. Raises for those that do not act; waits for those that act late."""
        with self._lock:
            if not self._connected:
                raise StorageUnavailable(f"disconnected: {self.url}")
            fault = self._choose(operation, conditional)
            if fault is not None:
                self.happened[fault] += 1
            delay_s = self._random.random() * self._max_delay_s if fault is Fault.DELAY else 0.0
        if fault is Fault.ERROR:
            raise StorageUnavailable(f"{operation} failed: {what} ({self.url})")
        if delay_s:
            self._sleep(delay_s)
        return fault

    def _choose(self, operation: str, conditional: bool) -> Fault | None:
        if self._calm:
            return None
        for index, (fault, wanted) in enumerate(self._script):
            if wanted in (None, operation) and _happens(fault, operation, conditional):
                del self._script[index]
                return fault
        for fault, probability in self.faults.items():
            if _happens(fault, operation, conditional) and self._random.random() < probability:
                return fault
        return None


def _happens(fault: Fault, operation: str, conditional: bool) -> bool:
    # A condition that is sent twice may lose against itself. The client that sends must know that, so it is not done behind its back.
    return operation in _APPLIES[fault] and not (fault is Fault.DUPLICATE and conditional)


class _Stream:
    """Bytes, and what happens after them: the end, or an error."""

    def __init__(self, data: bytes, error: str | None) -> None:
        self._data, self._error, self._at = data, error, 0

    def read(self, size: int = -1, /) -> bytes:
        end = len(self._data) if size < 0 else self._at + size
        piece = self._data[self._at : end]
        if self._error is not None and (size < 0 or (not piece and size)):
            raise StorageUnavailable(self._error)
        self._at += len(piece)
        return piece

    def close(self) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None, /) -> None:
        self.close()
