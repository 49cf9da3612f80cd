"""A replica in an object store bucket of NATS JetStream, on nats-py: object `ltx/<level>/<name>`, the header's time in the header
`Litestream-Timestamp`, which listings carry.

The bucket is the stream `OBJ_<bucket>`. An object's bytes are messages on the subject `$O.<bucket>.C.<random id>`, then one message on
`$O.<bucket>.M.<name in base64>` says in JSON what it is; that message makes it visible, and replaces the one before.

nats-py's own object store is not used for this, because it cannot create on a condition, and what it writes for a deleted object makes
Litestream's listing fail (an empty time, which Go does not read).

Decisions, and what they protect:

* **Conditions are sequence numbers** of the naming message (`Nats-Expected-Last-Subject-Sequence`); an etag here is such a number. A deleted
  object has one, too: its tombstone's.
* **Pieces are asked for side by side** when reading: "the first message of this subject at or after n", for several n at once, since the pieces
  of one object usually follow one another. Whatever comes between them, duplicates are dropped and nothing is missed.
* **The digest** of an object that is read whole is checked at its end.
* **With `tls: true` nothing is sent to a server that does not speak TLS**; the library alone would go on in the clear.

Source: specification 2.1, 4.3, 8.5; NATS architecture decision record 20 (object store).
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import ssl
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any, TypeVar

import nats.errors
import nats.js.api
import nats.js.errors

from replicator.errors import (
    AccessDenied,
    ObjectNotFound,
    PreconditionFailed,
    ReplicatorError,
    StorageError,
    StorageUnavailable,
)
from replicator.storage.background import Background
from replicator.storage.base import Body, ReadStream, format_time, parse_time
from replicator.storage.locations import NATSSettings
from replicator.storage.natsconnection import Connection, NoTLS, denied
from replicator.storage.tree import Entry, Pieces, Write, opened, stored_time
from replicator.storage.tree import whole as read_whole

__all__ = ["NATSObjects"]

T = TypeVar("T")

_TIMESTAMP = "Litestream-Timestamp"
_OWN_METADATA = "pyrepl-"
_CHUNK = 128 << 10
_WINDOW = 16
_WRONG_SEQUENCE = (10071, 10164)
_HINT = "check user and password, token, creds, or jwt and seed, and the rights of the account"


@dataclass(frozen=True, slots=True)
class _Found:
    """What a naming message says. `sequence` is its own."""

    sequence: int
    name: str
    nuid: str
    size: int
    digest: str
    deleted: bool
    stored: datetime | None
    headers: dict[str, str]


class NATSObjects:
    """The store that is one bucket. Connects at the first operation, and again by itself."""

    kind = "nats"

    def __init__(self, settings: NATSSettings) -> None:
        self.settings = settings
        self.url = settings.url
        self._stream = f"OBJ_{settings.bucket}"
        self._background = Background()
        self._connection = Connection(settings, self._stream)

    def __repr__(self) -> str:
        return f"NATSObjects({self.url!r})"

    # -- reading -----------------------------------------------------------------------------------------------------------------

    def entries(self, folder: str) -> Iterable[Entry]:
        prefix = f"{folder}/" if folder else ""
        for found in self._listed():
            name = found.name.removeprefix(prefix)
            if found.name.startswith(prefix) and name and "/" not in name:
                yield Entry(name, found.size, stored_time(found.stored), parse_time(found.headers.get(_TIMESTAMP)))

    def folders(self, folder: str) -> Iterable[str]:
        prefix = f"{folder}/" if folder else ""
        below = [found.name[len(prefix) :] for found in self._listed() if found.name.startswith(prefix)]
        return {name.partition("/")[0] for name in below if "/" in name}

    def open(self, name: str, offset: int, size: int | None) -> ReadStream:
        found = self._run(name, self._visible(name))
        rest = max(0, found.size - offset)
        length = rest if size is None else min(rest, size)
        return Pieces(self._pieces(name, found, offset, length), length, self._named(name))

    def get(self, name: str) -> tuple[bytes, str]:
        found = self._run(name, self._visible(name))
        stream = Pieces(self._pieces(name, found, 0, found.size), found.size, self._named(name))
        return read_whole(stream, self._named(name)), str(found.sequence)

    def details(self, name: str) -> tuple[datetime | None, dict[str, str]]:
        headers = self._run(name, self._visible(name)).headers
        return parse_time(headers.get(_TIMESTAMP)), {key: value for key, value in headers.items() if key.startswith(_OWN_METADATA)}

    # -- writing -----------------------------------------------------------------------------------------------------------------

    def write(self, name: str, body: Body, how: Write) -> str:
        headers = dict(how.metadata or {})
        if how.when is not None:
            headers[_TIMESTAMP] = format_time(how.when)
        before = self._run(name, self._last(name))
        self._check(name, before, how)
        nuid = base64.urlsafe_b64encode(sha256(ssl.RAND_bytes(32)).digest())[:22].decode().replace("-", "0").replace("_", "1")
        try:
            size, chunks, digest = self._send(name, nuid, body)
        except BaseException:
            self._drop_chunks(name, nuid)
            raise
        about = self._about(name, nuid, size=size, chunks=chunks, digest=digest, headers=headers)
        expected = None if not how.conditional else before.sequence if before else 0
        try:
            sequence = self._run(name, self._name(name, about, expected))
        except StorageUnavailable:
            raise  # the naming message may have arrived, so its pieces must stay
        except StorageError:
            self._drop_chunks(name, nuid)
            raise
        if before is not None and not before.deleted:
            self._drop_chunks(name, before.nuid)
        return str(sequence)

    def delete(self, names: Sequence[str]) -> None:
        for name in names:
            found = self._run(name, self._last(name))
            if found is not None and not found.deleted:
                self._bury(name, found, None)

    def delete_if(self, name: str, etag: str) -> None:
        found = self._run(name, self._last(name))
        self._check(name, found, Write(if_match=etag))
        assert found is not None
        self._bury(name, found, found.sequence)

    def delete_folder(self, folder: str) -> None:
        self.delete([found.name for found in self._listed() if found.name.startswith(f"{folder}/")])

    def close(self) -> None:
        if self._background.closed:
            return
        with contextlib.suppress(TimeoutError):
            self._background.run(self._connection.close(), timeout_s=5)
        self._background.close()

    # -- steps of writing --------------------------------------------------------------------------------------------------------

    def _check(self, name: str, found: _Found | None, how: Write) -> None:
        """Refuse what cannot succeed before anything is sent; the server checks again."""
        exists = found is not None and not found.deleted
        if (how.if_absent and exists) or (
            how.if_match is not None and (not exists or found is None or str(found.sequence) != how.if_match)
        ):
            raise PreconditionFailed(self._named(name))

    def _send(self, name: str, nuid: str, body: Body) -> tuple[int, int, str]:
        """Send the pieces; return how many bytes and pieces they are, and their digest."""
        digest, size, chunks = sha256(), 0, 0
        with opened(body) as source:
            while window := [piece for _ in range(_WINDOW) if (piece := source.read(_CHUNK))]:
                for piece in window:
                    digest.update(piece)
                self._run(name, self._publish_all(f"$O.{self.settings.bucket}.C.{nuid}", window))
                size, chunks = size + sum(map(len, window)), chunks + len(window)
        return size, chunks, "SHA-256=" + base64.urlsafe_b64encode(digest.digest()).decode()

    async def _publish_all(self, subject: str, pieces: Sequence[bytes]) -> None:
        js = await self._connection.js()
        acknowledged = [await js.publish_async(subject, piece, wait_stall=self.settings.timeout_s, stream=self._stream) for piece in pieces]
        for done in acknowledged:
            await done

    async def _name(self, name: str, about: bytes, expected: int | None) -> int:
        """Publish what makes an object what it is; return the sequence number."""
        headers = {nats.js.api.Header.ROLLUP.value: "sub"}
        if expected is not None:
            headers[nats.js.api.Header.EXPECTED_LAST_SUBJECT_SEQUENCE.value] = str(expected)
        js = await self._connection.js()
        return int((await js.publish(self._subject(name), about, stream=self._stream, headers=headers)).seq)

    def _bury(self, name: str, found: _Found, expected: int | None) -> None:
        self._run(name, self._name(name, self._about(name, found.nuid, deleted=True), expected))
        self._drop_chunks(name, found.nuid)

    def _drop_chunks(self, name: str, nuid: str) -> None:
        async def purge() -> None:
            js = await self._connection.js()
            await js.purge_stream(self._stream, subject=f"$O.{self.settings.bucket}.C.{nuid}")

        with contextlib.suppress(StorageError):  # bytes that nothing names; the object is what it should be
            self._run(name, purge())

    def _about(
        self,
        name: str,
        nuid: str,
        *,
        size: int = 0,
        chunks: int = 0,
        digest: str = "",
        headers: dict[str, str] | None = None,
        deleted: bool = False,
    ) -> bytes:
        about: dict[str, Any] = {
            "name": name,
            "options": {"max_chunk_size": _CHUNK},
            "bucket": self.settings.bucket,
            "nuid": nuid,
            "size": size,
            "mtime": datetime.now(UTC).isoformat().replace("+00:00", "Z"),
            "chunks": chunks,
        }
        if digest:
            about["digest"] = digest
        if headers:
            about["headers"] = {key: [value] for key, value in headers.items()}
        if deleted:
            about["deleted"] = True
        return json.dumps(about).encode()

    # -- steps of reading --------------------------------------------------------------------------------------------------------

    def _listed(self) -> list[_Found]:
        """Return all objects of the bucket; there is no listing by prefix."""

        async def collect() -> list[_Found]:
            return [found async for found in self._named_objects() if not found.deleted]

        return self._run("", collect(), timeout_s=10 * self.settings.timeout_s)

    async def _named_objects(self) -> AsyncIterator[_Found]:
        js, subject = await self._connection.js(), f"$O.{self.settings.bucket}.M.>"
        try:
            await js.get_last_msg(self._stream, subject)
        except nats.js.errors.NotFoundError:
            return
        policy = nats.js.api.DeliverPolicy.LAST_PER_SUBJECT
        consumer = await js.subscribe(subject, stream=self._stream, ordered_consumer=True, deliver_policy=policy)
        try:
            while True:
                message = await consumer.next_msg(timeout=self.settings.timeout_s)
                about = message.metadata
                found = _decode(message.data, about.sequence.stream, about.timestamp)
                if found is not None:
                    yield found
                if not about.num_pending:
                    return
        finally:
            with contextlib.suppress(nats.errors.Error):
                await consumer.unsubscribe()

    async def _last(self, name: str) -> _Found | None:
        """Return what an object's name stands for, deleted or not; None when it was never used."""
        js = await self._connection.js()
        try:
            message = await js.get_last_msg(self._stream, self._subject(name), direct=self._connection.direct)
        except nats.js.errors.NotFoundError:
            return None
        found = _decode(message.data or b"", int(message.seq), message.time)
        if found is None:
            raise StorageError(f"bucket says nothing usable about an object: {self._named(name)}")
        return found

    async def _visible(self, name: str) -> _Found:
        found = await self._last(name)
        if found is None or found.deleted:
            raise ObjectNotFound(self._named(name))
        return found

    def _pieces(self, name: str, found: _Found, offset: int, length: int) -> Iterator[bytes]:
        subject = f"$O.{self.settings.bucket}.C.{found.nuid}"
        digest, at, following = sha256(), 0, 1
        whole = offset == 0 and length == found.size
        while at < offset + length:
            width = min(_WINDOW, -(-(found.size - at) // _CHUNK))
            messages = self._run(name, self._chunks(subject, following, width))
            if not messages:
                raise StorageUnavailable(f"object was replaced or deleted while it was read: {self._named(name)}")
            for sequence, data in messages:
                following, begin, at = sequence + 1, at, at + len(data)
                digest.update(data)
                if whole and at >= length and found.digest.partition("=")[2] != base64.urlsafe_b64encode(digest.digest()).decode():
                    raise StorageError(f"digest does not match: {self._named(name)}")
                if piece := data[max(0, offset - begin) : max(0, offset + length - begin)]:
                    yield piece

    async def _chunks(self, subject: str, first: int, width: int) -> list[tuple[int, bytes]]:
        """Return the next pieces at or after a sequence number, at least one if there is any, without gaps."""
        js = await self._connection.js()

        async def one(sequence: int) -> tuple[int, bytes] | None:
            try:
                message = await js.get_msg(self._stream, seq=sequence, subject=subject, next=True, direct=self._connection.direct)
            except nats.js.errors.NotFoundError:
                return None
            return int(message.seq), message.data or b""

        # The first piece may be anywhere; those after it probably follow.
        head = await one(first)
        if head is None:
            return []
        rest = await asyncio.gather(*(one(head[0] + step) for step in range(1, width)))
        return sorted({head[0]: head, **{item[0]: item for item in rest if item is not None}}.values())

    def _subject(self, name: str) -> str:
        return f"$O.{self.settings.bucket}.M.{base64.urlsafe_b64encode(name.encode()).decode()}"

    def _named(self, name: str) -> str:
        return f"{self.url}/{name}"

    # -- the border --------------------------------------------------------------------------------------------------------------

    def _run(self, name: str, work: Coroutine[Any, Any, T], *, timeout_s: float | None = None) -> T:
        try:
            return self._background.run(work, timeout_s=timeout_s or 2 * self.settings.timeout_s)
        except ReplicatorError:
            raise
        except (nats.errors.Error, TimeoutError, OSError) as exc:
            raise self._error(name, exc) from exc

    def _error(self, name: str, exc: Exception) -> StorageError:
        where = self._named(name) if name else self.url
        code = int(getattr(exc, "err_code", 0) or 0)
        if code in _WRONG_SEQUENCE:
            return PreconditionFailed(where)
        if isinstance(exc, nats.errors.NoServersError):
            return StorageUnavailable(f"server cannot be reached: {where}", hint="check host, port and the network")
        if code == 10059 or isinstance(exc, nats.js.errors.NotFoundError):
            hint = f"create it: nats object add {self.settings.bucket}"
            return StorageError(f"bucket does not exist: {self.settings.bucket} at {self.settings.server}", hint=hint)
        if isinstance(exc, NoTLS):
            return StorageError(
                f"server does not speak TLS: {self.settings.server}", hint="remove tls, root-cas and client-cert, or set the server up"
            )
        if isinstance(exc, ssl.SSLCertVerificationError):
            return StorageError(f"certificate of the server is not trusted: {self.settings.server}", hint="give root-cas")
        if trouble := denied(exc) or self._connection.trouble:
            return AccessDenied(where, trouble, hint=_HINT)
        kind = type(exc).__name__
        if isinstance(exc, nats.js.errors.NoStreamResponseError | nats.js.errors.ServiceUnavailableError | nats.errors.NoRespondersError):
            return StorageUnavailable(f"JetStream does not answer ({kind}): {where}", hint="is it enabled (nats-server -js)?")
        if isinstance(exc, nats.js.errors.APIError) and (exc.code or 0) < 500:
            return StorageError(f"server refused ({code or exc.code}): {where}")
        return StorageUnavailable(
            f"server cannot be reached, or asks to try later ({kind}): {where}", hint="check host, port and the network"
        )


def _decode(data: bytes, sequence: int, stored: datetime | None) -> _Found | None:
    """Return what a naming message says; None for one that says nothing usable, which is not ours."""
    try:
        about = json.loads(data)
        headers = {str(key): str(values[0]) for key, values in (about.get("headers") or {}).items() if values}
        return _Found(
            sequence=sequence,
            name=str(about["name"]),
            nuid=str(about["nuid"]),
            size=max(0, int(about.get("size") or 0)),
            digest=str(about.get("digest") or ""),
            deleted=bool(about.get("deleted")),
            stored=stored,
            headers=headers,
        )
    except (ValueError, TypeError, KeyError, AttributeError, IndexError):
        return None
