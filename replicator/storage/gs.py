"""A replica in Google Cloud Storage, on Google's own library: `<path>/ltx/<level>/<name>`, the header's time in the metadata entry
`litestream-timestamp`, which listings carry.

Decisions, and what they protect:

* **Conditions are generations**: 0 for "does not exist", else that of the object. An etag here is a generation.
* **A conditional write is sent once.** Sent again after a lost reply, it would lose against itself.
* **A read is pinned to the generation** that was found when it began, so that its pieces belong together.

Credentials are the application default ones; `STORAGE_EMULATOR_HOST` leads to an emulator, as for every client of that library.

Source: specification 2.1, 4.3, 8.5.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Any

import google.api_core.exceptions
import google.auth.exceptions
import google.cloud.exceptions
import requests.exceptions
from google.cloud import storage
from google.cloud.storage.retry import DEFAULT_RETRY

from replicator.errors import (
    AccessDenied,
    ConfigError,
    ObjectNotFound,
    PreconditionFailed,
    ReplicatorError,
    StorageError,
    StorageUnavailable,
)
from replicator.storage.base import Body, ReadStream, body_size, format_time, parse_time
from replicator.storage.locations import GSSettings
from replicator.storage.tree import Entry, Pieces, Write, opened, stored_time, whole

__all__ = ["GSObjects"]

_TIMESTAMP = "litestream-timestamp"
_OWN_METADATA = "pyrepl-"
_TIMEOUT_S = (10, 60)
_RETRIES_S = 30.0
_PIECE = 8 << 20
_THREADS = 16
_FIELDS = "items(name,size,generation,timeCreated,metadata),prefixes,nextPageToken"
_HINT = "check the application default credentials (GOOGLE_APPLICATION_CREDENTIALS) and the bucket's policy"


class GSObjects:
    """The store at one path of one bucket."""

    kind = "gs"

    def __init__(self, settings: GSSettings, *, retries_s: float = _RETRIES_S) -> None:
        self.settings = settings
        self.url = settings.url
        self._prefix = "" if settings.path in ("", ".") else f"{settings.path}/"
        self._retry = DEFAULT_RETRY.with_timeout(retries_s)
        self._lock = threading.Lock()
        self._client: Any = None

    def __repr__(self) -> str:
        return f"GSObjects({self.url!r})"

    # -- reading -----------------------------------------------------------------------------------------------------------------

    def entries(self, folder: str) -> Iterable[Entry]:
        prefix = self._below(folder)
        for blob in self._listed(folder, delimiter="/"):
            name = str(blob.name)[len(prefix) :]
            if name and "/" not in name and str(blob.name).startswith(prefix):
                when = parse_time((blob.metadata or {}).get(_TIMESTAMP))
                yield Entry(name, int(blob.size or 0), stored_time(blob.time_created), when)

    def folders(self, folder: str) -> Iterable[str]:
        prefix = self._below(folder)
        with self._translated(folder, of_bucket=True):
            listing = self._bucket.list_blobs(prefix=prefix, delimiter="/", fields=_FIELDS, timeout=_TIMEOUT_S, retry=self._retry)
            for _ in listing:
                pass  # prefixes are complete when the pages are
            return [str(name)[len(prefix) :].rstrip("/") for name in listing.prefixes]

    def open(self, name: str, offset: int, size: int | None) -> ReadStream:
        blob = self._found(name)
        rest = max(0, int(blob.size) - offset)
        length = rest if size is None else min(rest, size)
        return Pieces(self._pieces(name, blob, offset, length), length, self._named(name))

    def get(self, name: str) -> tuple[bytes, str]:
        blob = self._found(name)
        pieces = Pieces(self._pieces(name, blob, 0, int(blob.size)), int(blob.size), self._named(name))
        return whole(pieces, self._named(name)), str(blob.generation)

    def details(self, name: str) -> tuple[datetime | None, dict[str, str]]:
        found = {str(key).lower(): str(value) for key, value in (self._found(name).metadata or {}).items()}
        return parse_time(found.get(_TIMESTAMP)), {key: value for key, value in found.items() if key.startswith(_OWN_METADATA)}

    # -- writing -----------------------------------------------------------------------------------------------------------------

    def write(self, name: str, body: Body, how: Write) -> str:
        blob = self._bucket.blob(self._prefix + name)
        blob.chunk_size = _PIECE  # what a resumable upload keeps in memory
        metadata = dict(how.metadata or {})
        if how.when is not None:
            metadata[_TIMESTAMP] = format_time(how.when)
        if metadata:
            blob.metadata = metadata
        size = body_size(body)
        if how.if_absent and size > _PIECE:
            # The store checks the condition itself; this saves sending a large file for nothing.
            with contextlib.suppress(ObjectNotFound):
                self._found(name)
                raise PreconditionFailed(self._named(name))
        generation = 0 if how.if_absent else None if how.if_match is None else _generation(how.if_match)
        with opened(body) as source, self._translated(name, conditional=how.conditional, of_bucket=True):
            blob.upload_from_file(
                source,
                size=size,
                content_type="application/octet-stream",
                if_generation_match=generation,
                timeout=_TIMEOUT_S,
                retry=None if how.conditional else self._retry,
            )
        return str(blob.generation)

    def delete(self, names: Sequence[str]) -> None:
        if not names:
            return
        with ThreadPoolExecutor(min(_THREADS, len(names)), "gs-delete") as pool:
            for _ in pool.map(self._delete, names):
                pass

    def delete_if(self, name: str, etag: str) -> None:
        with self._translated(name, conditional=True):
            self._bucket.blob(self._prefix + name).delete(if_generation_match=_generation(etag), timeout=_TIMEOUT_S, retry=None)

    def delete_folder(self, folder: str) -> None:
        prefix = self._below(folder)
        self.delete([str(blob.name)[len(self._prefix) :] for blob in self._listed(folder) if str(blob.name).startswith(prefix)])

    def close(self) -> None:
        with self._lock:
            client, self._client = self._client, None
        if client is not None:
            client.close()

    # -- requests ----------------------------------------------------------------------------------------------------------------

    @property
    def _bucket(self) -> Any:
        """The bucket. Made late: looking for credentials may already use the network."""
        with self._lock:
            if self._client is None:
                with self._translated(""):
                    self._client = storage.Client()
            return self._client.bucket(self.settings.bucket)

    def _named(self, name: str) -> str:
        return f"gs://{self.settings.bucket}/{self._prefix}{name}"

    def _below(self, folder: str) -> str:
        return f"{self._prefix}{folder}/" if folder else self._prefix

    def _found(self, name: str) -> Any:
        """Return an object with its size, generation and metadata."""
        blob = self._bucket.blob(self._prefix + name)
        with self._translated(name):
            blob.reload(timeout=_TIMEOUT_S, retry=self._retry)
        return blob

    def _listed(self, folder: str, **more: str) -> Iterator[Any]:
        with self._translated(folder, of_bucket=True):
            yield from self._bucket.list_blobs(prefix=self._below(folder), fields=_FIELDS, timeout=_TIMEOUT_S, retry=self._retry, **more)

    def _pieces(self, name: str, blob: Any, offset: int, length: int) -> Iterator[bytes]:
        end = offset + length
        while offset < end:
            last = min(end, offset + _PIECE) - 1
            with self._translated(name):
                piece: bytes = blob.download_as_bytes(
                    start=offset, end=last, raw_download=True, timeout=_TIMEOUT_S, retry=self._retry, checksum=None
                )
            if len(piece) != last - offset + 1:
                raise StorageUnavailable(f"connection ended before the object did: {self._named(name)}")
            offset += len(piece)
            yield piece

    def _delete(self, name: str) -> None:
        with contextlib.suppress(ObjectNotFound), self._translated(name):
            self._bucket.blob(self._prefix + name).delete(timeout=_TIMEOUT_S, retry=self._retry)

    @contextlib.contextmanager
    def _translated(self, name: str, *, conditional: bool = False, of_bucket: bool = False) -> Iterator[None]:
        """Turn the library's errors into ours at the border. Of the server's text nothing is shown. `of_bucket`: only the bucket can be missing."""
        try:
            yield
        except ReplicatorError:
            raise
        except (
            google.cloud.exceptions.GoogleCloudError,
            google.auth.exceptions.GoogleAuthError,
            requests.exceptions.RequestException,
        ) as exc:
            raise self._error(name, exc, conditional, of_bucket) from exc
        except (google.api_core.exceptions.GoogleAPIError, OSError) as exc:
            raise self._error(name, exc, conditional, of_bucket) from exc

    def _error(self, name: str, exc: Exception, conditional: bool, of_bucket: bool) -> StorageError | ConfigError:
        where, errors = self._named(name), google.api_core.exceptions
        match exc:
            case errors.NotFound():
                if of_bucket:
                    return StorageError(f"bucket does not exist: {self.settings.bucket}", hint="create it, or check its name")
                return PreconditionFailed(where) if conditional else ObjectNotFound(where)
            case errors.PreconditionFailed():
                return PreconditionFailed(where)
            case errors.Forbidden() | errors.Unauthorized():
                return AccessDenied(where, f"access denied ({exc.code})", hint=_HINT)
            case google.auth.exceptions.TransportError():
                return StorageUnavailable(f"store cannot be reached ({type(exc).__name__}): {where}", hint="check the network")
            case google.auth.exceptions.GoogleAuthError():
                return AccessDenied(where, "no usable credentials", hint=_HINT)
            case errors.GoogleAPICallError() if isinstance(exc.code, int) and exc.code < 500 and exc.code not in (408, 409, 429):
                return StorageError(f"store refused ({exc.code}): {where}")
        code = f"{type(exc).__name__}"
        return StorageUnavailable(f"store cannot be reached, or asks to try later ({code}): {where}", hint="check the network")


def _generation(etag: str) -> int:
    """Return the generation that an etag is; one that no object has for what is none."""
    return int(etag) if etag.isdecimal() and len(etag) < 19 else 1
