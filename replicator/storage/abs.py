"""A replica in Azure Blob Storage, on Microsoft's own library: `<path>/ltx/<level>/<name>`, the header's time in the metadata entry
`litestreamtimestamp`, which listings carry.

Decisions, and what they protect:

* **Conditions are etags**: `If-None-Match: *` and `If-Match`, for large files at the request that makes them visible.
* **A conditional write is sent once.** Sent again after a lost reply, it would lose against itself.
* **Metadata names have no hyphens** (they must be identifiers): `pyrepl-writer` is stored as `pyrepl_writer`.

A SAS token wins over an account key; without both the library's default chain is asked (environment, managed identity, Azure CLI).

Source: specification 2.1, 4.3, 8.5; Blob service REST API.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Any
from urllib.parse import urlsplit

import azure.core.exceptions
from azure.core import MatchConditions
from azure.core.credentials import AzureNamedKeyCredential, AzureSasCredential
from azure.storage.blob import BlobPrefix, ContainerClient, ContentSettings

from replicator import __version__
from replicator.errors import AccessDenied, ConfigError, ObjectNotFound, PreconditionFailed, StorageError, StorageUnavailable
from replicator.storage.base import Body, ReadStream, body_size, format_time, parse_time
from replicator.storage.locations import ABSSettings
from replicator.storage.tree import Entry, Pieces, Write, opened, stored_time, whole

__all__ = ["ABSObjects"]

_TIMESTAMP = "litestreamtimestamp"
_OWN_METADATA = "pyrepl_"
_CONNECT_TIMEOUT_S = 10
_READ_TIMEOUT_S = 60
_RETRIES = 3
_PIECE = 8 << 20
_THREADS = 16
_UPLOADS = 4
_HINT = "check account-key or sas-token (LITESTREAM_AZURE_ACCOUNT_KEY, LITESTREAM_AZURE_SAS_TOKEN), or `az login`, and the account's rules"


class ABSObjects:
    """The store at one path of one container."""

    kind = "abs"

    def __init__(self, settings: ABSSettings, *, retries: int = _RETRIES) -> None:
        self.settings = settings
        self.url = settings.url
        self._prefix = "" if settings.path in ("", ".") else f"{settings.path}/"
        self._retries = retries
        self._lock = threading.Lock()
        self._client: Any = None

    def __repr__(self) -> str:
        return f"ABSObjects({self.url!r})"

    # -- reading -----------------------------------------------------------------------------------------------------------------

    def entries(self, folder: str) -> Iterable[Entry]:
        prefix = self._below(folder)
        for item in self._walk(folder):
            name = str(item.name)[len(prefix) :]
            if not isinstance(item, BlobPrefix) and name and "/" not in name and str(item.name).startswith(prefix):
                when = parse_time(_lower(item.metadata).get(_TIMESTAMP))
                yield Entry(name, int(item.size or 0), stored_time(item.creation_time or item.last_modified), when)

    def folders(self, folder: str) -> Iterable[str]:
        prefix = self._below(folder)
        return [str(item.name)[len(prefix) :].rstrip("/") for item in self._walk(folder) if isinstance(item, BlobPrefix)]

    def open(self, name: str, offset: int, size: int | None) -> ReadStream:
        return self._open(name, offset, size)[0]

    def get(self, name: str) -> tuple[bytes, str]:
        stream, etag = self._open(name, 0, None)
        return whole(stream, self._named(name)), etag

    def details(self, name: str) -> tuple[datetime | None, dict[str, str]]:
        with self._translated(name):
            found = _lower(self._blob(name).get_blob_properties().metadata)
        own = {key.replace("_", "-"): value for key, value in found.items() if key.startswith(_OWN_METADATA)}
        return parse_time(found.get(_TIMESTAMP)), own

    # -- writing -----------------------------------------------------------------------------------------------------------------

    def write(self, name: str, body: Body, how: Write) -> str:
        metadata = {key.replace("-", "_"): value for key, value in (how.metadata or {}).items()}
        if how.when is not None:
            metadata[_TIMESTAMP] = format_time(how.when)
        more: dict[str, Any] = {}
        if how.if_match is not None:
            more = {"etag": how.if_match, "match_condition": MatchConditions.IfNotModified}
        if how.conditional:
            more |= {"retry_total": 0}
        with opened(body) as source, self._translated(name, conditional=how.conditional):
            reply = self._blob(name).upload_blob(
                source,
                length=body_size(body),
                overwrite=not how.if_absent,
                metadata=metadata,
                content_settings=ContentSettings(content_type="application/octet-stream"),
                max_concurrency=_UPLOADS,
                **more,
            )
        return str(reply["etag"])

    def delete(self, names: Sequence[str]) -> None:
        if not names:
            return
        with ThreadPoolExecutor(min(_THREADS, len(names)), "abs-delete") as pool:
            for _ in pool.map(self._delete, names):
                pass

    def delete_if(self, name: str, etag: str) -> None:
        with self._translated(name, conditional=True):
            self._blob(name).delete_blob(etag=etag, match_condition=MatchConditions.IfNotModified, retry_total=0)

    def delete_folder(self, folder: str) -> None:
        with self._translated(folder):
            names = [str(item) for item in self._container.list_blob_names(name_starts_with=self._below(folder))]
        self.delete([name[len(self._prefix) :] for name in names])

    def close(self) -> None:
        with self._lock:
            client, self._client = self._client, None
        if client is not None:
            client.close()

    # -- requests ----------------------------------------------------------------------------------------------------------------

    @property
    def _container(self) -> Any:
        """The container. Made late: looking for credentials may already use the network."""
        with self._lock:
            if self._client is None:
                try:
                    self._client = ContainerClient(
                        self.settings.service,
                        self.settings.bucket,
                        credential=_credential(self.settings),
                        connection_timeout=_CONNECT_TIMEOUT_S,
                        read_timeout=_READ_TIMEOUT_S,
                        retry_total=self._retries,
                        initial_backoff=1,  # the library's own 15 seconds would hide an outage for minutes
                        increment_base=2,
                        random_jitter_range=1,
                        max_single_put_size=_PIECE,
                        max_block_size=_PIECE,
                        max_single_get_size=_PIECE,
                        max_chunk_get_size=_PIECE,
                        user_agent=f"pyrepl/{__version__}",
                        permit_redirects=False,
                    )
                except (ValueError, TypeError) as exc:
                    raise ConfigError(f"cannot set up the client for {self.url}: {type(exc).__name__}", hint=_HINT) from exc
            return self._client

    def _blob(self, name: str) -> Any:
        return self._container.get_blob_client(self._prefix + name)

    def _named(self, name: str) -> str:
        return f"abs://{self.settings.bucket}/{self._prefix}{name}"

    def _below(self, folder: str) -> str:
        return f"{self._prefix}{folder}/" if folder else self._prefix

    def _walk(self, folder: str) -> Iterator[Any]:
        with self._translated(folder):
            yield from self._container.walk_blobs(name_starts_with=self._below(folder), include=["metadata"], delimiter="/")

    def _open(self, name: str, offset: int, size: int | None) -> tuple[ReadStream, str]:
        try:
            with self._translated(name):
                # An offset of 0 must not be given: of an empty blob no range can be had.
                where = {"offset": offset, "length": size} if offset or size is not None else {}
                reply = self._blob(name).download_blob(**where)
        except _RangeOutside:
            return Pieces((), 0, self._named(name)), ""
        return Pieces(self._pieces(name, reply), int(reply.size), self._named(name)), str(reply.properties.etag)

    def _pieces(self, name: str, reply: Any) -> Iterator[bytes]:
        chunks = reply.chunks()
        while True:
            with self._translated(name):
                piece = next(chunks, b"")
            if not piece:
                return
            yield bytes(piece)

    def _delete(self, name: str) -> None:
        with contextlib.suppress(ObjectNotFound), self._translated(name):
            self._blob(name).delete_blob()

    @contextlib.contextmanager
    def _translated(self, name: str, *, conditional: bool = False) -> Iterator[None]:
        """Turn the library's errors into ours at the border. Of the server's text nothing is shown."""
        try:
            yield
        except azure.core.exceptions.AzureError as exc:
            raise self._error(name, exc, conditional) from exc

    def _error(self, name: str, exc: Any, conditional: bool) -> StorageError:
        where, errors = self._named(name), azure.core.exceptions
        code = getattr(exc, "error_code", None)
        status = int(getattr(exc, "status_code", None) or 0)
        code = str(getattr(code, "value", code) or status or type(exc).__name__)
        if code == "ContainerNotFound":
            return StorageError(f"container does not exist: {self.settings.bucket}", hint="create it, or check its name and the account")
        if isinstance(exc, errors.ClientAuthenticationError) or status in (401, 403):
            return AccessDenied(where, f"access denied ({code})", hint=_HINT)
        if status == 412 or (conditional and code in ("BlobAlreadyExists", "BlobNotFound")):
            return PreconditionFailed(where)
        if status == 404:
            return ObjectNotFound(where)
        if status == 416:
            return _RangeOutside(f"range lies outside the object: {where}")
        if isinstance(exc, errors.ServiceRequestError) and "CERTIFICATE_VERIFY_FAILED" in str(exc):
            host = urlsplit(self.settings.service).hostname
            return StorageError(
                f"certificate of the store is not trusted: {host}", hint="set REQUESTS_CA_BUNDLE to the authority's certificate"
            )
        if isinstance(exc, errors.HttpResponseError) and 0 < status < 500 and status not in (408, 409, 429):
            return StorageError(f"store refused ({code}): {where}")
        return StorageUnavailable(
            f"store cannot be reached, or asks to try later ({code}): {where}", hint="check the endpoint and the network"
        )


class _RangeOutside(StorageError):
    """The asked range begins behind the end of the object."""


def _credential(settings: ABSSettings) -> Any:
    if settings.sas_token:
        return AzureSasCredential(settings.sas_token.removeprefix("?"))
    if settings.account_key and settings.account_name:
        return AzureNamedKeyCredential(settings.account_name, settings.account_key)
    from azure.identity import DefaultAzureCredential

    return DefaultAzureCredential()


def _lower(metadata: Any) -> dict[str, str]:
    return {str(key).lower(): str(value) for key, value in (metadata or {}).items()}
