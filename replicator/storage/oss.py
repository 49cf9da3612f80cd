"""A replica in Alibaba Cloud OSS, on its own library: `<path>/<level as 4 hex digits>/<name>`, the header's time in the metadata entry
`litestream-timestamp`, the cheap time is LastModified.

Why not the S3 client on the S3-compatible endpoint of OSS: there `If-None-Match` is not honoured, and a second writer would overwrite. OSS has
a header of its own for create-if-absent, `x-oss-forbid-overwrite`. Replacing on a condition does not exist in OSS: `ConditionUnsupported`.

A conditional write is sent once: sent again after a lost reply, it would lose against itself.

Source: specification 2.1, 4.3; OSS API reference (PutObject, CompleteMultipartUpload, GetObject).
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

import alibabacloud_oss_v2 as oss
import requests
from alibabacloud_oss_v2.transport import RequestsHttpClient

from replicator import __version__
from replicator.errors import (
    AccessDenied,
    ConditionUnsupported,
    ObjectNotFound,
    PreconditionFailed,
    ReplicatorError,
    StorageError,
    StorageUnavailable,
)
from replicator.storage.base import Body, ReadStream, body_size, format_time, parse_time
from replicator.storage.locations import OSSSettings
from replicator.storage.tree import CHUNK, Entry, Pieces, Write, opened, stored_time, whole

__all__ = ["OSSObjects"]

_TIMESTAMP = "litestream-timestamp"
_OWN_METADATA = "pyrepl-"
_CONNECT_TIMEOUT_S = 10
_READ_TIMEOUT_S = 60
_ATTEMPTS = 4
_SINGLE_PUT_BYTES = 64 << 20
_PART_BYTES = 8 << 20
_MAX_PARTS = 10_000
_UPLOADS = 3
_DELETE_BATCH = 1000
_CODE = re.compile(r"[A-Za-z][A-Za-z0-9]{0,63}")
_HINT = "check access-key-id and secret-access-key (or OSS_ACCESS_KEY_ID and OSS_ACCESS_KEY_SECRET), the region and the bucket's policy"


_LOST = (oss.exceptions.RequestError, oss.exceptions.ResponseError, oss.exceptions.InconsistentError, oss.exceptions.StreamClosedError)


class OSSObjects:
    """The store at one path of one bucket."""

    kind = "oss"

    def __init__(self, settings: OSSSettings, *, attempts: int = _ATTEMPTS, single_put_bytes: int = _SINGLE_PUT_BYTES) -> None:
        self.settings = settings
        self.url = settings.url
        self._attempts = attempts
        self._single_put_bytes = single_put_bytes
        self._lock = threading.Lock()
        self._client: Any = None
        self._session = requests.Session()  # the library closes none

    def __repr__(self) -> str:
        return f"OSSObjects({self.url!r})"

    # -- reading -----------------------------------------------------------------------------------------------------------------

    def entries(self, folder: str) -> Iterable[Entry]:
        prefix = self._below(folder)
        for page in self._pages(folder, delimiter="/"):
            for item in page.contents or ():
                name = str(item.key)[len(prefix) :]
                if name and "/" not in name and str(item.key).startswith(prefix):
                    yield Entry(name, int(item.size or 0), stored_time(item.last_modified))

    def folders(self, folder: str) -> Iterable[str]:
        prefix = self._below(folder)
        return [
            str(item.prefix)[len(prefix) :].rstrip("/")
            for page in self._pages(folder, delimiter="/")
            for item in page.common_prefixes or ()
        ]

    def open(self, name: str, offset: int, size: int | None) -> ReadStream:
        return self._open(name, offset, size)[0]

    def get(self, name: str) -> tuple[bytes, str]:
        stream, etag = self._open(name, 0, None)
        return whole(stream, self._named(name)), etag

    def details(self, name: str) -> tuple[datetime | None, dict[str, str]]:
        with self._translated(name):
            reply = self._oss.head_object(oss.HeadObjectRequest(bucket=self.settings.bucket, key=self._key(name)))
        found = {str(key).lower(): str(value) for key, value in (reply.metadata or {}).items()}
        return parse_time(found.get(_TIMESTAMP)), {key: value for key, value in found.items() if key.startswith(_OWN_METADATA)}

    # -- writing -----------------------------------------------------------------------------------------------------------------

    def write(self, name: str, body: Body, how: Write) -> str:
        if how.if_match is not None:
            raise ConditionUnsupported(self._named(name))
        about: dict[str, Any] = {"bucket": self.settings.bucket, "key": self._key(name)}
        metadata = dict(how.metadata or {})
        if how.when is not None:
            metadata[_TIMESTAMP] = format_time(how.when)
        size = body_size(body)
        if size > self._single_put_bytes:
            return self._write_parts(name, body, size, about, metadata, how)
        with opened(body) as source, self._translated(name, conditional=how.if_absent):
            reply = self._oss.put_object(
                oss.PutObjectRequest(
                    **about, **_forbid(how), body=source, content_length=size, content_type="application/octet-stream", metadata=metadata
                ),
                **self._tries(how),
            )
        return str(reply.etag or "")

    def delete(self, names: Sequence[str]) -> None:
        for first in range(0, len(names), _DELETE_BATCH):
            batch = names[first : first + _DELETE_BATCH]
            objects = [oss.DeleteObject(key=self._key(name)) for name in batch]
            with self._translated(batch[0]):
                self._oss.delete_multiple_objects(
                    oss.DeleteMultipleObjectsRequest(bucket=self.settings.bucket, objects=objects, quiet=True, encoding_type="url")
                )

    def delete_if(self, name: str, etag: str) -> None:
        raise ConditionUnsupported(self._named(name))

    def delete_folder(self, folder: str) -> None:
        prefix = self._key("")
        self.delete([str(item.key)[len(prefix) :] for page in self._pages(folder) for item in page.contents or ()])

    def close(self) -> None:
        with self._lock:
            self._client = None
            self._session.close()

    # -- requests ----------------------------------------------------------------------------------------------------------------

    @property
    def _oss(self) -> Any:
        with self._lock:
            if self._client is None:
                settings = self.settings
                config = oss.config.load_default()
                config.region, config.endpoint = settings.region_name, settings.endpoint
                if settings.access_key_id and settings.secret_access_key:
                    config.credentials_provider = oss.credentials.StaticCredentialsProvider(
                        settings.access_key_id, settings.secret_access_key
                    )
                else:
                    config.credentials_provider = oss.credentials.EnvironmentVariableCredentialsProvider()
                config.http_client = RequestsHttpClient(
                    session=self._session, connect_timeout=_CONNECT_TIMEOUT_S, readwrite_timeout=_READ_TIMEOUT_S
                )
                config.retry_max_attempts = self._attempts
                config.user_agent = f"pyrepl/{__version__}"
                self._client = oss.Client(config)
            return self._client

    def _key(self, name: str) -> str:
        # With an empty path LTX keys begin with a slash, as Litestream's do; other names do not.
        path = self.settings.path
        if path:
            return f"{path}/{name}"
        return f"/{name}" if re.match(r"(age/)?[0-9a-f]{4}(/|$)", name) else name

    def _below(self, folder: str) -> str:
        return f"{self._key(folder)}/" if folder else f"{self.settings.path}/".lstrip("/")

    def _named(self, name: str) -> str:
        return f"oss://{self.settings.bucket}/{self._key(name).lstrip('/')}"

    def _tries(self, how: Write) -> dict[str, int]:
        return {"retry_max_attempts": 1} if how.conditional else {}

    def _pages(self, folder: str, **more: str) -> Iterator[Any]:
        token, seen = None, set()
        while True:
            request = oss.ListObjectsV2Request(
                bucket=self.settings.bucket, prefix=self._below(folder), continuation_token=token, encoding_type="url", **more
            )
            with self._translated(folder):
                page = self._oss.list_objects_v2(request)
            yield page
            if not page.is_truncated:
                return
            token = page.next_continuation_token
            if not token or token in seen:
                raise StorageError(f"store does not finish its listing: {self._named(folder)}")
            seen.add(token)

    def _open(self, name: str, offset: int, size: int | None) -> tuple[ReadStream, str]:
        more = {}
        if offset or size is not None:
            last = "" if size is None else offset + size - 1
            # "standard": a range past the end is an error, and not the whole object.
            more = {"range_header": f"bytes={offset}-{last}", "range_behavior": "standard"}
        try:
            with self._translated(name):
                reply = self._oss.get_object(oss.GetObjectRequest(bucket=self.settings.bucket, key=self._key(name), **more))
        except _RangeOutside:
            return Pieces((), 0, self._named(name)), ""
        length = int(reply.content_length)
        if more and not str(reply.content_range or "").startswith(f"bytes {offset}-"):
            reply.body.close()
            raise StorageError(f"store answered with another range than asked: {self._named(name)}")
        return Pieces(self._pieces(name, reply.body), length, self._named(name), reply.body.close), str(reply.etag or "")

    def _pieces(self, name: str, body: Any) -> Iterator[bytes]:
        pieces = body.iter_bytes(block_size=CHUNK)
        while True:
            with self._translated(name):
                piece = next(pieces, b"")
            if not piece:
                return
            yield piece

    def _write_parts(self, name: str, body: Body, size: int, about: dict[str, Any], metadata: dict[str, str], how: Write) -> str:
        """Store a large body in parts, which become visible together at the end. Leaves no parts behind when it fails."""
        part_size = max(self.settings.part_size or _PART_BYTES, -(-size // _MAX_PARTS))
        with self._translated(name, conditional=how.if_absent):
            begun = oss.InitiateMultipartUploadRequest(**about, **_forbid(how), metadata=metadata, content_type="application/octet-stream")
            upload = self._oss.initiate_multipart_upload(begun).upload_id
        try:

            def send(number: int) -> Any:
                data = _piece_of(body, (number - 1) * part_size, min(part_size, size - (number - 1) * part_size))
                with self._translated(name):
                    reply = self._oss.upload_part(oss.UploadPartRequest(**about, upload_id=upload, part_number=number, body=data))
                return oss.UploadPart(part_number=number, etag=reply.etag)

            with ThreadPoolExecutor(self.settings.concurrency or _UPLOADS, "oss-part") as pool:
                sent = list(pool.map(send, range(1, -(-size // part_size) + 1)))
            with self._translated(name, conditional=how.if_absent):
                done = oss.CompleteMultipartUploadRequest(
                    **about, **_forbid(how), upload_id=upload, complete_multipart_upload=oss.CompleteMultipartUpload(parts=sent)
                )
                return str(self._oss.complete_multipart_upload(done, **self._tries(how)).etag or "")
        except BaseException:
            with contextlib.suppress(ReplicatorError), self._translated(name):
                self._oss.abort_multipart_upload(oss.AbortMultipartUploadRequest(**about, upload_id=upload))
            raise

    @contextlib.contextmanager
    def _translated(self, name: str, *, conditional: bool = False) -> Iterator[None]:
        """Turn the library's errors into ours at the border. Of the server's text nothing is shown."""
        try:
            yield
        except (oss.exceptions.BaseError, requests.exceptions.RequestException, OSError) as exc:
            raise self._error(name, exc, conditional) from exc

    def _error(self, name: str, exc: Any, conditional: bool) -> StorageError:
        where = self._named(name)
        cause = exc.unwrap() if isinstance(exc, oss.exceptions.OperationError) else exc
        if isinstance(cause, oss.exceptions.CredentialsBaseError):
            return AccessDenied(where, "no usable credentials", hint=_HINT)
        if not isinstance(cause, oss.exceptions.ServiceError):
            if isinstance(cause, oss.exceptions.BaseError) and not isinstance(cause, _LOST):
                return StorageError(f"request cannot be made ({type(cause).__name__}): {where}", hint="check the settings of the replica")
            return StorageUnavailable(
                f"store cannot be reached ({type(cause).__name__}): {where}", hint="check the endpoint and the network"
            )
        status = int(cause.status_code or 0)
        code = str(cause.code) if _CODE.fullmatch(str(cause.code or "")) else str(status)
        if code == "NoSuchBucket":
            return StorageError(
                f"bucket does not exist: {self.settings.bucket}", hint="create it, or check its name, the region and the endpoint"
            )
        if code == "FileAlreadyExists" or (conditional and status == 412):
            return PreconditionFailed(where)
        if code == "NoSuchUpload":
            return StorageUnavailable(f"upload is no longer known to the store and its outcome is unknown: {where}")
        if status == 416:
            return _RangeOutside(f"range lies outside the object: {where}")
        if status == 404:
            return ObjectNotFound(where)
        if status in (401, 403):
            return AccessDenied(where, f"access denied ({code})", hint=_HINT)
        if status in (408, 409, 429) or status >= 500:
            return StorageUnavailable(f"store asks to try later ({code}): {where}")
        return StorageError(f"store refused ({code}): {where}")


class _RangeOutside(StorageError):
    """The asked range begins behind the end of the object."""


def _forbid(how: Write) -> dict[str, bool]:
    return {"forbid_overwrite": True} if how.if_absent else {}


def _piece_of(body: Body, offset: int, size: int) -> bytes:
    """Return a piece of a body; may be called from several threads."""
    if not isinstance(body, Path):
        return bytes(memoryview(body).cast("B")[offset : offset + size])
    with body.open("rb") as file:
        file.seek(offset)
        data = file.read(size)
    if len(data) != size:
        raise StorageError(f"file became shorter while it was uploaded: {body}")
    return data
