"""Find out whether a store honours conditional writes. Some accept the headers and ignore them; then nothing fences a second writer."""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from replicator.errors import AccessDenied, ConditionUnsupported, ObjectNotFound, PreconditionFailed, StorageError, StorageUnavailable
from replicator.storage.base import ReplicaClient

__all__ = ["Conditions", "honours_conditions", "probe_conditional_writes"]

# Turns an etag into another one of the same shape: a store may refuse what does not look like one of its own.
_OTHER_DIGITS = str.maketrans("0123456789abcdefABCDEF", "1032547698badcfeBADCFE")

_honouring: set[tuple[str, ...]] = set()
_guard = threading.Lock()


def honours_conditions(client: ReplicaClient) -> bool:
    """Say whether the store refuses a second create. A bucket, or a file system, that was found to do so is asked once in the life of a process.

    Raises:
        StorageError: the store cannot be written at all, or does not answer.
    """
    store = _store_of(client)
    with _guard:
        if store in _honouring:
            return True
    return probe_conditional_writes(client).create


def _store_of(client: ReplicaClient) -> tuple[str, ...] | None:
    """Name what all replicas in it share: endpoint and bucket, or the file system. None where that cannot be told."""
    url = urlsplit(client.url.removeprefix("age+"))
    if url.scheme == "s3":
        return ("s3", url.netloc, url.query)
    if url.scheme != "file":
        return None
    folder = Path(url.path)
    for place in (folder, *folder.parents):
        with contextlib.suppress(OSError):
            return ("file", str(os.stat(place).st_dev))
    return None


@dataclass(frozen=True, slots=True)
class Conditions:
    """What a store refuses. `create`: a second create, on which appending rests; `replace`: a replacement of what is no longer there, which
    leases need, too. A store with neither ignores conditions.
    """

    create: bool
    replace: bool


def probe_conditional_writes(client: ReplicaClient) -> Conditions:
    """Find out which conditions the store keeps, whatever is known of it already.

    Four small requests on a control object of its own, `pyrepl/probe-<random>`, which is deleted at the end; a crash leaves it behind, a few
    bytes that nobody reads.

    Raises:
        StorageError: the store cannot be written at all, or does not answer.
    """
    found = _probe(client, f"pyrepl/probe-{secrets.token_hex(8)}")
    store = _store_of(client)
    if found.create and store is not None:
        with _guard:
            _honouring.add(store)
    return found


def _probe(client: ReplicaClient, name: str) -> Conditions:
    try:
        etag = client.put_control(name, b"1", if_absent=True)
    except (AccessDenied, ObjectNotFound, StorageUnavailable):
        raise
    except StorageError:
        # Some stores refuse the header itself ("not implemented"). Then a plain write works; if not, its error is the one to report.
        client.put_control(name, b"1")
        _clean_up(client, name)
        return Conditions(create=False, replace=False)
    try:
        try:
            client.put_control(name, b"2", if_absent=True)
        except PreconditionFailed:
            pass
        else:
            return Conditions(create=False, replace=False)
        try:
            client.put_control(name, b"3", if_match=etag.translate(_OTHER_DIGITS))
        except PreconditionFailed:
            return Conditions(create=True, replace=True)
        except ConditionUnsupported:
            pass
        return Conditions(create=True, replace=False)
    finally:
        _clean_up(client, name)


def _clean_up(client: ReplicaClient, name: str) -> None:
    with contextlib.suppress(StorageError):
        client.delete_control(name)
