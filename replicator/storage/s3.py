"""A replica in S3, or in a store that speaks S3, on boto3.

Keys are `<path>/<level as 4 hex digits>/<name>`; control objects are `<path>/<name>`. The header's time is the metadata entry
`litestream-timestamp`, the cheap time is LastModified.

Decisions, and what they protect:

* **Checksums only where required, payload signed.** Many stores refuse the checksum trailers that SDKs send by default. The payload hash in
  the signature already makes the store compare what it got.
* **Conditions and retries.** A conditional write that boto3 had to send twice may have lost against itself: the first copy arrived and only
  its reply was lost. So a failed condition after a retry is `StorageUnavailable` (outcome unknown, read back), never `PreconditionFailed`.
* **Ranges are checked.** Some servers answer a range with status 200, or ignore it. Content-Range and Content-Length decide what arrived.
* **A short body is an error.** A stream ends only after the announced number of bytes.
* **Errors are built from facts.** Of a server's reply only code and status are used: its text may hold anything, credentials included.

boto3 never follows a redirect to another host, so a request's signature stays with the endpoint that was configured.

Source: specification 2.1 (keys, metadata), 8.1 to 8.3 (requests, behaviour, providers).
"""

from __future__ import annotations

import base64
import contextlib
import gc
import hashlib
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from io import BytesIO
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import boto3
import botocore.exceptions
import urllib3.exceptions
from botocore.config import Config

from replicator import __version__
from replicator.errors import (
    AccessDenied,
    ConfigError,
    ObjectNotFound,
    PreconditionFailed,
    ReplicatorError,
    StorageError,
    StorageUnavailable,
)
from replicator.format.ltx import TXID, FileInfo, format_name, format_txid
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
    format_time,
    parse_time,
)
from replicator.storage.url import S3Settings

__all__ = ["S3Client"]

_TIMESTAMP = "litestream-timestamp"
_OWN_METADATA = "pyrepl-"
_ATTEMPTS = 4
_CONNECT_TIMEOUT_S = 10
_READ_TIMEOUT_S = 60
_SINGLE_PUT_BYTES = 64 << 20
_POOL = 32
_HEAD_THREADS = 16
_DELETE_BATCH = 1000
_MAX_PARTS = 10_000
_MAX_CONTROL_SIZE = 1 << 20
_CHUNK = 1 << 20
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)

_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,19})-([0-9]{1,19})/(?:[0-9]{1,19}|\*)")
_ERROR_CODE = re.compile(r"[A-Za-z][A-Za-z0-9.]{0,63}|[0-9]{3}")

_DENIED = frozenset(
    {
        "AccessDenied",
        "AccountProblem",
        "AllAccessDisabled",
        "AuthorizationHeaderMalformed",
        "ExpiredToken",
        "Forbidden",
        "InvalidAccessKeyId",
        "InvalidSecurity",
        "InvalidToken",
        "MissingSecurityHeader",
        "NotSignedUp",
        "SignatureDoesNotMatch",
        "TokenRefreshRequired",
        "UnauthorizedAccess",
    }
)
_BUSY = frozenset(
    {
        "ConditionalRequestConflict",
        "InternalError",
        "OperationAborted",
        "RequestCanceled",
        "RequestLimitExceeded",
        "RequestTimeout",
        "ServiceUnavailable",
        "SlowDown",
        "Throttling",
        "ThrottlingException",
        "TooManyRequests",
    }
)
_CREDENTIALS_HINT = "check the credentials (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile), the region and the bucket's policy"


class S3Client:
    """The replica under one path of one bucket.

    Args:
        settings: where it is, and how to talk to the store.
        layout: where under the path the LTX files are.
        page_size: how many names a page of a listing holds.
        single_put_bytes: larger files are sent in parts; one request is cheaper, and files are streamed, so memory is no reason.
        max_attempts: tries of one request, the first included.
    """

    kind = "s3"
    can_read = True

    def __init__(
        self,
        settings: S3Settings,
        *,
        layout: Layout = LITESTREAM,
        page_size: int = 1000,
        single_put_bytes: int = _SINGLE_PUT_BYTES,
        max_attempts: int = _ATTEMPTS,
    ) -> None:
        self.settings = settings
        self.layout = layout
        self.url = settings.url
        self._page_size = page_size
        self._single_put_bytes = single_put_bytes
        self._max_attempts = max_attempts
        self._api: tuple[Any, _Key] | None = None
        self._api_lock = threading.Lock()
        self._path_is_doubtful = settings.path in ("", ".")
        self._key_arguments = _customer_key(settings)
        self._write_arguments = dict(self._key_arguments)
        if settings.storage_class:
            self._write_arguments["StorageClass"] = settings.storage_class
        if settings.sse_kms_key_id:
            self._write_arguments |= {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": settings.sse_kms_key_id}

    def __repr__(self) -> str:
        return f"S3Client({self.url!r})"

    # -- LTX files ---------------------------------------------------------------------------------------------------------------

    def list(self, level: int, *, seek: TXID = FROM_START, accurate_times: bool = False) -> Iterator[FileInfo]:
        # Gathered and sorted, not streamed: stores exist that list out of order or repeat a name at the edge of a page.
        found: dict[str, FileInfo] = {}
        prefix = self._level_prefix(level)
        for entry in self._list_objects(prefix, start_after=prefix + format_txid(seek) if seek else ""):
            name = str(entry["Key"])[len(prefix) :]
            txids = self.layout.parse(name)
            if txids is not None and txids[0] >= seek and str(entry["Key"]).startswith(prefix):
                found[name] = FileInfo(
                    level=level,
                    min_txid=txids[0],
                    max_txid=txids[1],
                    size=int(entry["Size"]),
                    created_at=entry["LastModified"].astimezone(UTC),
                )
        files = sorted(found.values(), key=lambda info: (info.min_txid, info.max_txid))
        if accurate_times and files:
            with ThreadPoolExecutor(min(_HEAD_THREADS, len(files)), "s3-head") as pool:
                files = list(pool.map(self._with_accurate_time, files))
        yield from files

    def open(self, info: FileInfo, *, offset: int = 0, size: int | None = None) -> ReadStream:
        return self._get(self._key(info), offset, size)[0]

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
        key = self._level_prefix(level) + format_name(min_txid, max_txid) + self.layout.suffix
        when = created_at(timestamp_ms)
        size = self._put_body(key, body, if_absent=if_absent, Metadata={_TIMESTAMP: format_time(when), **check_metadata(metadata)})
        if self._path_is_doubtful:
            self._check_path(key)
        return FileInfo(level=level, min_txid=min_txid, max_txid=max_txid, size=size, created_at=when)

    def metadata(self, info: FileInfo) -> dict[str, str]:
        return {name: value for name, value in self._head(self._key(info)).items() if name.startswith(_OWN_METADATA)}

    def delete(self, files: Iterable[FileInfo]) -> None:
        self._delete_keys([self._key(info) for info in files])

    # -- objects of the 0.3 format -----------------------------------------------------------------------------------------------

    def list_folders(self, folder: str) -> Sequence[str]:
        prefix = self._object_key(folder) + "/"
        found = {
            str(entry["Prefix"])[len(prefix) :].rstrip("/")
            for page in self._list_pages(prefix, Delimiter="/")
            for entry in page.get("CommonPrefixes", ())
            if str(entry["Prefix"]).startswith(prefix)
        }
        return sorted(found)

    def list_objects(self, folder: str) -> Sequence[StoredObject]:
        prefix = self._object_key(folder) + "/"
        found = {
            str(entry["Key"])[len(prefix) :]: entry
            for page in self._list_pages(prefix, Delimiter="/")
            for entry in page.get("Contents", ())
            if str(entry["Key"]).startswith(prefix)
        }
        return [
            StoredObject(name, int(entry["Size"]), (entry["LastModified"] - _EPOCH) // _MICROSECOND * 1000)
            for name, entry in found.items()
            if name and "/" not in name
        ]

    def open_object(self, name: str, *, offset: int = 0) -> ReadStream:
        return self._get(self._object_key(name), offset, None)[0]

    def put_object(self, name: str, body: Body, *, if_absent: bool = False) -> StoredObject:
        return StoredObject(name, self._put_body(self._object_key(name), body, if_absent=if_absent), time.time_ns())

    def delete_objects(self, names: Iterable[str]) -> None:
        self._delete_keys([self._object_key(name) for name in names])

    def delete_folder(self, folder: str) -> None:
        prefix = self._object_key(folder) + "/"
        self._delete_keys(
            [str(entry["Key"]) for entry in self._list_objects(prefix, start_after="") if str(entry["Key"]).startswith(prefix)]
        )

    def _object_key(self, name: str) -> str:
        # With an empty path without the slash that LTX keys begin with: the two generations of Litestream differ there.
        check_object_name(name)
        return f"{self.settings.path}/{name}" if self.settings.path else name

    # -- control objects ---------------------------------------------------------------------------------------------------------

    def get_control(self, name: str) -> ControlObject:
        key = self._control_key(name)
        stream, etag = self._get(key, 0, None)
        with stream:
            data = stream.read(_MAX_CONTROL_SIZE + 1)
        if len(data) > _MAX_CONTROL_SIZE:
            raise StorageError(f"control object is too large: {self._name(key)}")
        return ControlObject(data, etag)

    def put_control(self, name: str, data: bytes, *, if_match: str | None = None, if_absent: bool = False) -> str:
        key = self._control_key(name)
        conditions = _conditions(if_match=if_match, if_absent=if_absent)
        with self._translated(key, conditional=bool(conditions)):
            reply = self._s3.put_object(
                Bucket=self.settings.bucket,
                Key=key,
                Body=bytes(data),
                ContentType="application/json",
                **conditions,
                **self._write_arguments,
            )
        return str(reply.get("ETag", ""))

    def delete_control(self, name: str, *, if_match: str | None = None) -> None:
        key = self._control_key(name)
        try:
            with self._translated(key, conditional=if_match is not None):
                self._s3.delete_object(Bucket=self.settings.bucket, Key=key, **_conditions(if_match=if_match))
        except ObjectNotFound:
            pass

    def close(self) -> None:
        with self._api_lock:
            taken, self._api = self._api, None
        if taken is not None:
            _give_back(taken[1])

    # -- requests ----------------------------------------------------------------------------------------------------------------

    @property
    def _s3(self) -> Any:
        """The boto3 client. Made late: looking for credentials may already use the network."""
        with self._api_lock:
            if self._api is None:
                self._api = _take_api(self.settings, self._max_attempts)
            return self._api[0]

    def _level_prefix(self, level: int) -> str:
        # With an empty path the key begins with a slash, as Litestream's do.
        folder = f"{self.layout.folder}/" if self.layout.folder else ""
        return f"{self.settings.path}/{folder}{level:04x}/"

    def _key(self, info: FileInfo) -> str:
        return self._level_prefix(info.level) + self.layout.name(info)

    def _control_key(self, name: str) -> str:
        check_control_name(name)
        return f"{self.settings.path}/{name}" if self.settings.path else name

    def _name(self, key: str) -> str:
        return f"s3://{self.settings.bucket}/{key}"

    def _check_path(self, key: str) -> None:
        """Find out once whether a store keeps a key that begins with `/` or `./` as it is. Some store it under another name, and then list
        nothing: the replica would look empty.
        """
        if not any(entry["Key"] == key for entry in self._list_objects(key, start_after="")):
            raise StorageError(f"store does not list what was stored: {self._name(key)}", hint="give the replica a path: s3://bucket/path")
        self._path_is_doubtful = False

    def _translated(self, key: str, *, conditional: bool = False) -> contextlib.AbstractContextManager[None]:
        return _translated(self.settings, self._name(key), conditional=conditional)

    def _list_objects(self, prefix: str, *, start_after: str) -> Iterator[Mapping[str, Any]]:
        for page in self._list_pages(prefix, **({"StartAfter": start_after} if start_after else {})):
            yield from page.get("Contents", ())

    def keys_below(self) -> Iterator[str]:
        """Yield all keys below the replica's path, relative to it."""
        prefix = "" if self.settings.path in ("", ".") else f"{self.settings.path}/"
        for page in self._list_pages(prefix):
            for entry in page.get("Contents", ()):
                key = str(entry["Key"])
                if key.startswith(prefix):
                    yield key[len(prefix) :]

    def _list_pages(self, prefix: str, **more: str) -> Iterator[Mapping[str, Any]]:
        arguments: dict[str, Any] = {"Bucket": self.settings.bucket, "Prefix": prefix, "MaxKeys": self._page_size, **more}
        seen: set[str] = set()
        while True:
            with self._translated(prefix):
                page = self._s3.list_objects_v2(**arguments)
            yield page
            if not page.get("IsTruncated"):
                return
            token = str(page.get("NextContinuationToken", ""))
            if not token or token in seen:
                raise StorageError(f"store does not finish its listing: {self._name(prefix)}")
            seen.add(token)
            arguments["ContinuationToken"] = token

    def _head(self, key: str) -> dict[str, str]:
        with self._translated(key):
            reply = self._s3.head_object(Bucket=self.settings.bucket, Key=key, **self._key_arguments)
        # Some stores give the names back in Title-Case.
        return {name.lower(): value for name, value in reply.get("Metadata", {}).items()}

    def _with_accurate_time(self, info: FileInfo) -> FileInfo:
        """Return the file with its header's time. LastModified stays where the store has no such entry or has lost the file meanwhile."""
        try:
            text = self._head(self._key(info)).get(_TIMESTAMP, "")
        except ObjectNotFound:
            return info
        when = parse_time(text)
        if when is None:
            return info
        return FileInfo(level=info.level, min_txid=info.min_txid, max_txid=info.max_txid, size=info.size, created_at=when)

    def _get(self, key: str, offset: int, size: int | None) -> tuple[ReadStream, str]:
        """Open an object, or a range of it; return the stream and the etag."""
        arguments = dict(self._key_arguments)
        if offset or size is not None:
            arguments["Range"] = f"bytes={offset}-" if size is None else f"bytes={offset}-{offset + size - 1}"
        try:
            with self._translated(key):
                reply = self._s3.get_object(Bucket=self.settings.bucket, Key=key, **arguments)
        except _RangeOutside:
            return BytesIO(b""), ""
        try:
            skip, length = self._locate(key, reply, offset, size)
            stream = _S3Stream(reply["Body"], self._name(key), lambda: self._translated(key), length)
            stream.skip(skip)
            return stream, str(reply.get("ETag", ""))
        except BaseException:
            reply["Body"].close()
            raise

    def _locate(self, key: str, reply: Mapping[str, Any], offset: int, size: int | None) -> tuple[int, int]:
        """Return where in the body of a reply the asked bytes begin, and how many they are."""
        length = reply.get("ContentLength")
        if length is None:
            raise StorageError(f"store does not say how long the object is: {self._name(key)}")
        if found := _CONTENT_RANGE.fullmatch(str(reply.get("ContentRange", ""))):
            first, last = int(found[1]), int(found[2])
            if first != offset or last - first + 1 != length:
                raise StorageError(f"store answered with another range than asked: {self._name(key)}")
            return 0, length if size is None else min(length, size)
        if reply["ResponseMetadata"]["HTTPStatusCode"] == 200 and offset:
            # Either the whole object (the range was ignored) or the right bytes under the wrong status; only the object's size tells.
            with self._translated(key):
                total = self._s3.head_object(Bucket=self.settings.bucket, Key=key, **self._key_arguments)["ContentLength"]
            rest = max(0, total - offset)
            wanted = rest if size is None else min(rest, size)
            if length == total:
                return min(offset, total), wanted
            if length != wanted:
                raise StorageError(f"store answered with another range than asked: {self._name(key)}")
        return 0, length if size is None else min(length, size)

    def _put_body(self, key: str, body: Body, *, if_absent: bool, **more: Any) -> int:
        """Store an object in one request or in parts; return its size in bytes."""
        arguments = {"ContentType": "application/octet-stream", **more, **self._write_arguments}
        size = body_size(body)
        if size > self._single_put_bytes:
            self._put_parts(key, body, size, arguments, if_absent=if_absent)
        else:
            with body.open("rb") if isinstance(body, Path) else BytesIO(body) as data, self._translated(key, conditional=if_absent):
                self._s3.put_object(Bucket=self.settings.bucket, Key=key, Body=data, **_conditions(if_absent=if_absent), **arguments)
        return size

    def _put_parts(self, key: str, body: Body, size: int, arguments: dict[str, Any], *, if_absent: bool) -> None:
        """Store a large body in parts, which become visible together at the end. Leaves no parts behind when it fails."""
        bucket = self.settings.bucket
        if if_absent:
            # The condition is checked at the end by the store; this saves sending a large file for nothing.
            with contextlib.suppress(ObjectNotFound):
                self._head(key)
                raise PreconditionFailed(self._name(key))
        part_size = max(self.settings.part_size, -(-size // _MAX_PARTS))
        with self._translated(key):
            upload = self._s3.create_multipart_upload(Bucket=bucket, Key=key, **arguments)["UploadId"]
        try:
            with ThreadPoolExecutor(self.settings.upload_concurrency, "s3-part") as pool:
                # One for each thread, used again: botocore copies bytes once for the hash and once for the socket, and a bytearray not at all.
                buffers: SimpleQueue[bytearray] = SimpleQueue()
                for _ in range(self.settings.upload_concurrency):
                    buffers.put(bytearray())

                def send(number: int) -> dict[str, object]:
                    at, buffer = (number - 1) * part_size, buffers.get()
                    try:
                        if len(buffer) != (wanted := min(part_size, size - at)):
                            buffer = bytearray(wanted)
                        _fill(buffer, body, at)
                        with self._translated(key):
                            reply = self._s3.upload_part(
                                Bucket=bucket, Key=key, UploadId=upload, PartNumber=number, Body=buffer, **self._key_arguments
                            )
                    finally:
                        buffers.put(buffer)
                    return {"PartNumber": number, "ETag": reply["ETag"]}

                sent = list(pool.map(send, range(1, -(-size // part_size) + 1)))
            with self._translated(key, conditional=if_absent):
                self._s3.complete_multipart_upload(
                    Bucket=bucket, Key=key, UploadId=upload, MultipartUpload={"Parts": sent}, **_conditions(if_absent=if_absent)
                )
        except BaseException:
            # What remains would be invisible, and paid for. Best effort: a bucket's lifecycle rule is the second net.
            with contextlib.suppress(ReplicatorError), self._translated(key):
                self._s3.abort_multipart_upload(Bucket=bucket, Key=key, UploadId=upload)
            raise

    def _delete_keys(self, keys: Sequence[str]) -> None:
        for first in range(0, len(keys), _DELETE_BATCH):
            self._delete_batch(keys[first : first + _DELETE_BATCH])

    def _delete_batch(self, keys: Sequence[str]) -> None:
        with self._translated(keys[0]):
            reply = self._s3.delete_objects(Bucket=self.settings.bucket, Delete={"Objects": [{"Key": key} for key in keys], "Quiet": True})
        for error in reply.get("Errors", ()):
            code = _code(error.get("Code"))
            if code not in ("NoSuchKey", "404"):
                raise _from_code(self.settings, self._name(str(error.get("Key", keys[0]))), code, status=0)


class _S3Stream:
    """The body of a reply, which must have the announced length."""

    def __init__(self, body: Any, name: str, translated: Callable[[], contextlib.AbstractContextManager[None]], size: int) -> None:
        self._body, self._name, self._translated, self._rest = body, name, translated, size

    def skip(self, size: int) -> None:
        """Throw away what a server sent before the asked bytes."""
        while size:
            size -= len(self._piece(min(size, _CHUNK)))

    def read(self, size: int = -1, /) -> bytes:
        wanted = self._rest if size < 0 else min(size, self._rest)
        pieces: list[bytes] = []
        while wanted:
            piece = self._piece(min(wanted, _CHUNK))
            pieces.append(piece)
            self._rest -= len(piece)
            wanted -= len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _piece(self, size: int) -> bytes:
        with self._translated():
            piece: bytes = self._body.read(size)
        if not piece:
            raise StorageUnavailable(f"connection ended before the object did: {self._name}")
        return piece

    def close(self) -> None:
        self._body.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None, /) -> None:
        self.close()


class _RangeOutside(StorageError):
    """The asked range begins behind the end of the object."""


_Key = tuple[S3Settings, int, bytes]
_apis: dict[_Key, tuple[Any, int]] = {}
_apis_lock = threading.Lock()


def _take_api(settings: S3Settings, max_attempts: int) -> tuple[Any, _Key]:
    """Return the boto3 client that all replicas in a bucket share, and its key: making one takes 20 ms, and half a megabyte. Give the key back.

    What boto3 reads of the environment is part of the key: a client goes on with the credentials that it was made with.
    """
    environment = sorted(item for item in os.environb.items() if item[0].startswith(b"AWS_"))
    key = replace(settings, path="."), max_attempts, hashlib.sha256(repr(environment).encode()).digest()  # has secrets in it
    with _apis_lock:
        api, users = _apis.get(key) or (_make_api(settings, max_attempts=max_attempts), 0)
        _apis[key] = api, users + 1
        return api, key


def _give_back(key: _Key) -> None:
    """The last one who gives it back closes it, and with it what hangs."""
    with _apis_lock:
        api, users = _apis.pop(key)
        if users > 1:
            _apis[key] = api, users - 1
            return
    api.close()


def _make_api(settings: S3Settings, *, max_attempts: int) -> Any:
    s3: Any = {"payload_signing_enabled": settings.sign_payload}
    if settings.endpoint or settings.force_path_style is not None:
        s3["addressing_style"] = "path" if settings.path_style else "virtual"
    config = Config(
        user_agent=f"pyrepl/{__version__} boto3/{boto3.__version__}",
        connect_timeout=_CONNECT_TIMEOUT_S,
        read_timeout=_READ_TIMEOUT_S,
        max_pool_connections=_POOL,
        tcp_keepalive=True,
        parameter_validation=False,
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        retries={"mode": "standard", "total_max_attempts": max_attempts},
        s3=s3,
    )
    try:
        # A session of its own: boto3's default one is not made for several threads.
        with _no_collector():
            api = boto3.session.Session().client(
                "s3",
                region_name=settings.region_name,
                endpoint_url=settings.endpoint,
                verify=False if settings.skip_verify else None,
                aws_access_key_id=settings.access_key_id,
                aws_secret_access_key=settings.secret_access_key,
                config=config,
            )
    except (botocore.exceptions.BotoCoreError, ValueError) as exc:
        raise ConfigError(f"cannot set up S3 for {settings.url}: {type(exc).__name__}", hint=_CREDENTIALS_HINT) from exc
    api.meta.events.register("before-call.s3.HeadBucket", _do_not_follow)
    if settings.content_md5:
        api.meta.events.register("before-call.s3.DeleteObjects", _add_content_md5)
    if settings.is_tigris:
        api.meta.events.register("before-call.s3", _add_tigris_consistency)
    return api


@contextlib.contextmanager
def _no_collector() -> Iterator[None]:
    """No looks for cycles in the block, which builds a model of a hundred thousand objects that all stay: they would be a third of its time."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def _do_not_follow(context: dict[str, Any], **_: object) -> None:
    # Only botocore sends HeadBucket, to find the region after a redirect. When that is redirected, too, it would ask again without end.
    context.setdefault("s3_redirect", {})["redirected"] = True


def _add_content_md5(params: dict[str, Any], **_: object) -> None:
    digest = hashlib.md5(params["body"], usedforsecurity=False).digest()
    params["headers"]["Content-MD5"] = base64.b64encode(digest).decode()


def _add_tigris_consistency(params: dict[str, Any], **_: object) -> None:
    params["headers"]["X-Tigris-Consistent"] = "true"


def _customer_key(settings: S3Settings) -> dict[str, Any]:
    """Return what every request for an object needs when it is encrypted with the customer's key; boto3 adds the key's MD5."""
    if settings.sse_customer_key is None:
        return {}
    return {"SSECustomerAlgorithm": "AES256", "SSECustomerKey": base64.b64decode(settings.sse_customer_key)}


def _conditions(*, if_match: str | None = None, if_absent: bool = False) -> dict[str, str]:
    conditions = {"IfNoneMatch": "*"} if if_absent else {}
    return conditions if if_match is None else {**conditions, "IfMatch": if_match}


def _fill(buffer: bytearray, body: Body, offset: int) -> None:
    """Fill a buffer with a piece of a body; may be called from several threads."""
    if not isinstance(body, Path):
        buffer[:] = memoryview(body).cast("B")[offset : offset + len(buffer)]
        return
    rest = memoryview(buffer)
    with body.open("rb", buffering=0) as file:
        file.seek(offset)
        while rest and (done := file.readinto(rest)):
            rest = rest[done:]
    if rest:
        raise StorageError(f"file became shorter while it was uploaded: {body}")


@contextlib.contextmanager
def _translated(settings: S3Settings, name: str, *, conditional: bool) -> Iterator[None]:
    """Turn boto3's errors into ours at the border."""
    try:
        yield
    except botocore.exceptions.ClientError as exc:
        raise _from_reply(settings, name, exc.response, conditional=conditional) from exc
    except (botocore.exceptions.BotoCoreError, urllib3.exceptions.HTTPError, OSError) as exc:
        raise _from_failure(settings, name, exc) from exc


def _from_reply(settings: S3Settings, name: str, reply: Mapping[str, Any], *, conditional: bool) -> StorageError:
    about = reply.get("ResponseMetadata", {})
    status, headers = int(about.get("HTTPStatusCode", 0)), about.get("HTTPHeaders", {})
    code = _code(reply.get("Error", {}).get("Code"))
    if conditional and (code in ("PreconditionFailed", "412") or status == 412 or (status == 404 and code in ("NoSuchKey", "404"))):
        if about.get("RetryAttempts", 0):
            return StorageUnavailable(f"conditional write was sent twice and its outcome is unknown: {name}")
        return PreconditionFailed(name)
    if code == "RequestTimeTooSkewed":
        theirs = re.sub(r"[^A-Za-z0-9:, -]", "", str(headers.get("date", "")))[:40]
        here = f"{datetime.now(UTC):%a, %d %b %Y %H:%M:%S} GMT"
        clocks = f"store: {theirs or 'unknown'}, here: {here}"
        return StorageError(f"clock of this machine differs too much from the store's ({clocks}): {name}", hint="set the clock (NTP)")
    if code == "NoSuchUpload":
        # Ours is gone: finished by a request whose reply was lost, or aborted by a rule of the bucket.
        return StorageUnavailable(f"upload is no longer known to the store and its outcome is unknown: {name}")
    return _from_code(settings, name, code, status)


def _from_code(settings: S3Settings, name: str, code: str, status: int) -> StorageError:
    if code == "NoSuchBucket":
        where = f" at {settings.endpoint}" if settings.endpoint else ""
        hint = f"create the bucket {settings.bucket}, or check its name, the region and the endpoint"
        return StorageError(f"bucket does not exist: {settings.bucket}{where}", hint=hint)
    if code in ("NoSuchKey", "404") or (status == 404 and not code):
        return ObjectNotFound(name)
    if code == "InvalidRange" or status == 416:
        return _RangeOutside(f"range lies outside the object: {name}")
    if code in _DENIED or status in (401, 403):
        return AccessDenied(name, f"access denied ({code or status})", hint=_CREDENTIALS_HINT)
    if code in _BUSY or status in (408, 409, 425, 429) or (status >= 500 and status != 501):
        return StorageUnavailable(f"store asks to try later ({code or status}): {name}")
    return StorageError(f"store refused ({code or status}): {name}")


def _from_failure(settings: S3Settings, name: str, exc: Exception) -> StorageError:
    """Translate a request that got no whole reply."""
    errors = botocore.exceptions
    if isinstance(
        exc, errors.NoCredentialsError | errors.PartialCredentialsError | errors.CredentialRetrievalError | errors.TokenRetrievalError
    ):
        return AccessDenied(name, "no usable credentials", hint=_CREDENTIALS_HINT)
    if isinstance(exc, errors.SSLError) and "CERTIFICATE_VERIFY_FAILED" in str(exc):
        hint = "set AWS_CA_BUNDLE to the authority's certificate, or skip-verify for a test"
        return StorageError(f"certificate of the store is not trusted: {settings.host or name}", hint=hint)
    if isinstance(
        exc, errors.ConnectionError | errors.HTTPClientError | errors.IncompleteReadError | urllib3.exceptions.HTTPError | OSError
    ):
        where = urlsplit(settings.endpoint).netloc if settings.endpoint else "AWS"
        return StorageUnavailable(
            f"store cannot be reached: {name} ({where}, {type(exc).__name__})", hint="check the endpoint and the network"
        )
    return StorageError(f"request cannot be made ({type(exc).__name__}): {name}", hint="check the settings of the replica")


def _code(value: object) -> str:
    """Return an error code of the store, or an empty string for what is none: it comes from outside and goes into messages."""
    text = str(value or "")
    return text if _ERROR_CODE.fullmatch(text) else ""
