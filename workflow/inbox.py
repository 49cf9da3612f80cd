"""Requests from other machines: objects in the bucket, created if absent, which the owner of a run copies and then deletes.

    <root>/_inbox/generations/<shard>/<request>.<run>.json    64 shards, by run

`<request>` is the request's id (a ULID, so that they sort by time), or the digest of one that a caller has chosen, so that its repetition finds the name
taken; `<run>` is there for people. What counts is in the object, and hostile until checked.

**Requests.** Looking costs one LIST of the folders, which names only shards with something in them, and one LIST for each of those: not 64, and none for each
run. The owner looks every few seconds, less often when nothing comes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
from collections.abc import Iterable

from replicator.errors import ObjectNotFound, PreconditionFailed
from workflow.bucket import open_objects
from workflow.errors import WorkflowError
from workflow.intake import Request
from workflow.placement import shard_of
from workflow.state import check_id

__all__ = ["Inbox", "decode_request"]

log = logging.getLogger(__name__)

MAX_BYTES = 2 << 20
"""A payload of a mebibyte and what is around it; larger objects are not read."""
MOST = 1000
"""So many are read at a time; the rest waits for the next look."""
_SHARD = re.compile(r"\d\d")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_ULID = re.compile(r"[0-9A-HJKMNP-TV-Z]{26}")
_KINDS = ("start", "event", "cancel", "pause", "resume", "fork")
_LONGEST_TEXT = 500


class Inbox:
    """The requests of a root. Methods block; used by one thread at a time."""

    def __init__(self, url: str) -> None:
        """Raises `ConfigError` for a malformed URL."""
        self._store = open_objects(url, "_inbox")
        self.skipped = 0
        """How many objects were there that are no requests."""
        self._hostile: set[str] = set()

    def submit(self, request: Request) -> None:
        """Store a request durably. The same one again changes nothing. Raises `StorageError`."""
        with contextlib.suppress(PreconditionFailed):  # an earlier try of the same
            self._store.put_object(_name(request), encode_request(request), if_absent=True)

    def waits(self, request: Request) -> bool:
        """Say whether a request has not been taken yet."""
        try:
            self._store.open_object(_name(request)).close()
        except ObjectNotFound:
            return False
        return True

    def look(self, known: Iterable[str] = ()) -> dict[str, Request]:
        """Return the requests that are there, by name of their object, oldest first in each shard, `MOST` of them; those in `known` are not read again."""
        known = set(known)
        found: dict[str, Request] = {}
        for shard in self._store.list_folders("generations"):
            if not _SHARD.fullmatch(shard):
                self._skip(f"generations/{shard}", "no shard")
                continue
            for item in sorted(self._store.list_objects(f"generations/{shard}"), key=lambda item: item.name):
                name = f"generations/{shard}/{item.name}"
                if name in known or name in self._hostile:
                    continue
                if len(found) >= MOST:
                    return found
                if not _NAME.fullmatch(item.name):
                    self._skip(name, "not a name of a request")
                elif item.size > MAX_BYTES:
                    self._skip(name, f"{item.size} bytes")
                else:
                    self._read(name, found)
        return found

    def _read(self, name: str, found: dict[str, Request]) -> None:
        try:
            with self._store.open_object(name) as stream:
                data = stream.read(MAX_BYTES + 1)
            request = decode_request(data)
            if _name(request) != name:
                raise ValueError("its name is that of another request")
            found[name] = request
        except ObjectNotFound:  # another host has taken it
            return
        except (ValueError, WorkflowError) as error:
            self._skip(name, str(error))

    def _skip(self, name: str, why: str) -> None:
        if name not in self._hostile:
            self._hostile.add(name)
            self.skipped += 1
            log.warning(
                "object in the inbox is no request and is left alone name=%r reason=%r skipped=%d", name[:200], why[:200], self.skipped
            )

    def delete(self, names: Iterable[str]) -> None:
        """Delete requests that the owner has, on its replica."""
        self._store.delete_objects(list(names))

    def close(self) -> None:
        """Release connections."""
        self._store.close()


def _name(request: Request) -> str:
    first = request.id if _ULID.fullmatch(request.id) else f"x{hashlib.sha256(request.id.encode()).hexdigest()[:32]}"
    return f"generations/{shard_of(request.instance)}/{first}.{request.instance[:80]}.json"


def encode_request(request: Request) -> bytes:
    """Return a request's object."""
    return json.dumps({name: getattr(request, name) for name in Request.__dataclass_fields__}, ensure_ascii=False).encode()


def decode_request(data: bytes) -> Request:
    """Read a request's object, which anybody may have written who may write to the bucket.

    Raises:
        ValueError: it is none.
        BadId: it is for something that cannot be a run.
    """
    try:
        fields = json.loads(data)
    except (RecursionError, UnicodeDecodeError) as error:
        raise ValueError(f"not JSON: {type(error).__name__}") from error
    if not isinstance(fields, dict) or set(fields) != set(Request.__dataclass_fields__):
        raise ValueError("not the fields of a request")
    request = Request(**fields)
    if not all(isinstance(value, str) for name, value in fields.items() if name != "sender"):
        raise ValueError("a field is not a text")
    if not (request.sender is None or isinstance(request.sender, str)) or request.kind not in _KINDS:
        raise ValueError("sender or kind")
    if not 0 < len(request.id) <= _LONGEST_TEXT or len(request.sender or "") > _LONGEST_TEXT or len(request.sent_at) > 40:
        raise ValueError("a field is too long")
    for value in fields.values():
        (value or "").encode()  # a lone surrogate would be refused by SQLite later
    check_id(request.instance, longest=200)
    try:
        body = json.loads(request.body)
    except RecursionError as error:
        raise ValueError("its body is nested too deep") from error
    if not isinstance(body, dict):
        raise ValueError("its body is no object")
    return request
