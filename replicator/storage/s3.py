"""A replica in a bucket of S3 or a compatible store, on boto3: `<path>/<level as 4 hex digits>/<name>`, without the `ltx/` of other backends.

* Appending is `PutObject` with `If-None-Match: *`. Large files go up in parts, and the condition is on completing them.
* boto3 retries requests, within bounds. It may therefore find its own first try stored: that is a `PreconditionFailed` like any other, and the
  caller compares the bytes.
* Reading returns exactly the range that was asked for, also from servers that ignore ranges; a connection that ends early is an error
  and never a short file.
* With an endpoint the SDK's own checksums are sent only where S3 requires them, since many stores know no trailers.

Source: specification, sections 2.1 and 8.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from replicator.errors import AccessDenied, ObjectNotFound, PreconditionFailed, StorageError, StorageUnavailable
from replicator.format.ltx import TXID, FileInfo, parse_name
from replicator.storage.base import Body, ControlObject, ReadStream, check_control_name, check_metadata, created_at
from replicator.storage.url import S3Settings

__all__ = ["S3Client"]

TIMESTAMP = "litestream-timestamp"
DELETE_BATCH = 1000
HEADS_AT_ONCE = 16
SINGLE_PUT_BYTES = 64 << 20
MULTIPART_BYTES = 16 << 20

_DENIED = {
    "AccessDenied",
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "InvalidToken",
    "ExpiredToken",
    "AuthorizationHeaderMalformed",
    "403",
    "401",
}
_AGAIN = {
    "SlowDown",
    "InternalError",
    "ServiceUnavailable",
    "RequestTimeout",
    "ConditionalRequestConflict",
    "OperationAborted",
    "RequestCanceled",
}


class S3Client:
    """One path in one bucket. The connection is made when it is first needed."""

    kind = "s3"

    def __init__(
        self, settings: S3Settings, *, page_size: int = 1000, single_put_bytes: int = SINGLE_PUT_BYTES, max_attempts: int = 5
    ) -> None:
        """
        Args:
            page_size: keys in a page of a listing.
            single_put_bytes: larger files are sent in parts.
            max_attempts: tries of one request, the first included.
        """
        self.settings = settings
        self._page_size = page_size
        self._single = single_put_bytes
        self._attempts = max_attempts
        self._client: Any = None
        self._guard = threading.Lock()

    @property
    def url(self) -> str:
        return self.settings.url

    def __repr__(self) -> str:
        return f"S3Client({self.url!r})"

    @property
    def _s3(self) -> Any:
        with self._guard:
            if self._client is None:
                self._client = self._connect()
            return self._client

    def _connect(self) -> Any:
        import boto3
        from botocore import UNSIGNED  # noqa: F401  (fails early when botocore is broken)
        from botocore.config import Config

        settings = self.settings
        for theirs, aws in (("LITESTREAM_ACCESS_KEY_ID", "AWS_ACCESS_KEY_ID"), ("LITESTREAM_SECRET_ACCESS_KEY", "AWS_SECRET_ACCESS_KEY")):
            if os.environ.get(theirs):
                os.environ.setdefault(aws, os.environ[theirs])
        s3: dict[str, Any] = {"payload_signing_enabled": settings.sign_payload}
        if settings.force_path_style is not None:
            s3["addressing_style"] = "path" if settings.force_path_style else "virtual"
        config = Config(
            user_agent="pyrepl",
            connect_timeout=10,
            read_timeout=60,
            tcp_keepalive=True,
            max_pool_connections=32,
            parameter_validation=False,
            retries={"mode": "standard", "total_max_attempts": self._attempts},
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            s3=s3,
        )
        with _translated(self._name("")):
            return boto3.session.Session().client(
                "s3",
                region_name=settings.region or ("us-east-1" if settings.endpoint else None),
                endpoint_url=settings.endpoint,
                verify=False if settings.skip_verify else None,
                config=config,
            )

    def _key(self, name: str) -> str:
        return f"{self.settings.path}/{name}" if self.settings.path else f"/{name}"

    def _name(self, name: str) -> str:
        """For people."""
        return f"s3://{self.settings.bucket}/{self.settings.path}/{name}".rstrip("/")

    @staticmethod
    def _file(info: FileInfo) -> str:
        return f"{info.level:04x}/{info.name}"

    def _at(self, name: str) -> dict[str, Any]:
        return {"Bucket": self.settings.bucket, "Key": self._key(name)}

    def _customer_key(self) -> dict[str, Any]:
        settings = self.settings
        if not settings.sse_customer_key:
            return {}
        return {"SSECustomerAlgorithm": settings.sse_customer_algorithm or "AES256", "SSECustomerKey": settings.sse_customer_key}

    def list(self, level: int, *, seek: TXID = TXID(0), accurate_times: bool = False) -> Iterator[FileInfo]:
        prefix = self._key(f"{level:04x}/")
        found: list[FileInfo] = []
        token: dict[str, str] = {}
        while True:
            with _translated(self._name(f"{level:04x}/")):
                page = self._s3.list_objects_v2(Bucket=self.settings.bucket, Prefix=prefix, MaxKeys=self._page_size, **token)
            for item in page.get("Contents", ()):
                txids = parse_name(item["Key"].removeprefix(prefix))
                if txids is not None and txids[0] >= seek:
                    found.append(FileInfo(level, *txids, item["Size"], item["LastModified"].astimezone(UTC)))
            if not page.get("IsTruncated") or not page.get("NextContinuationToken"):
                break
            token = {"ContinuationToken": page["NextContinuationToken"]}
        found = sorted(set(found))
        if accurate_times and found:
            with ThreadPoolExecutor(min(HEADS_AT_ONCE, len(found))) as pool:
                found = [info for info in pool.map(self._accurate, found) if info is not None]
        yield from found

    def _accurate(self, info: FileInfo) -> FileInfo | None:
        try:
            stamp = self._head(info).get(TIMESTAMP)
        except ObjectNotFound:
            return None
        when = _parse_time(stamp) if stamp else None
        return FileInfo(info.level, info.min_txid, info.max_txid, info.size, when or info.created_at)

    def _head(self, info: FileInfo) -> dict[str, str]:
        with _translated(self._name(self._file(info))):
            found = self._s3.head_object(**self._at(self._file(info)), **self._customer_key())
        return {key.lower(): value for key, value in found.get("Metadata", {}).items()}

    def metadata(self, info: FileInfo) -> dict[str, str]:
        return {key: value for key, value in self._head(info).items() if key.startswith("pyrepl-")}

    def open(self, info: FileInfo, *, offset: int = 0, size: int | None = None) -> ReadStream:
        name = self._name(self._file(info))
        last = "" if size is None else str(offset + size - 1)
        try:
            with _translated(name):
                found = self._s3.get_object(**self._at(self._file(info)), Range=f"bytes={offset}-{last}", **self._customer_key())
        except _RangeNotSatisfiable:
            return _Empty()
        body, length = found["Body"], found["ContentLength"]
        whole = "ContentRange" not in found  # the server ignored the range
        if whole:
            rest = max(0, length - offset)
            stream = _Stream(body, name, rest if size is None else min(rest, size), ends=size is None or size >= rest)
            stream.skip(offset)
            return stream
        return _Stream(body, name, length, ends=True)

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
        size = body.stat().st_size if isinstance(body, Path) else memoryview(body).nbytes
        info = FileInfo(level, min_txid, max_txid, size, created_at(timestamp_ms))
        settings = self.settings
        what: dict[str, Any] = {
            "Metadata": {TIMESTAMP: _format_time(timestamp_ms), **check_metadata(metadata)},
            "ContentType": "application/octet-stream",
            **self._customer_key(),
        }
        if settings.storage_class:
            what["StorageClass"] = settings.storage_class
        if settings.sse_kms_key_id:
            what |= {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": settings.sse_kms_key_id}
        condition = {"IfNoneMatch": "*"} if if_absent else {}
        with _translated(self._name(self._file(info))):
            if size > self._single:
                self._put_parts(info, body, what, condition)
            elif isinstance(body, Path):
                with body.open("rb") as file:
                    self._s3.put_object(**self._at(self._file(info)), Body=file, **what, **condition)
            else:
                self._s3.put_object(**self._at(self._file(info)), Body=bytes(body), **what, **condition)
        return info

    def _put_parts(self, info: FileInfo, body: Body, what: dict[str, Any], condition: dict[str, str]) -> None:
        at = self._at(self._file(info))
        upload = {**at, "UploadId": self._s3.create_multipart_upload(**at, **what)["UploadId"]}
        size = max(self.settings.part_size, MULTIPART_BYTES, -(-info.size // 10_000))

        def send(number: int) -> dict[str, Any]:
            part = _part(body, (number - 1) * size, size)
            return {
                "PartNumber": number,
                "ETag": self._s3.upload_part(**upload, PartNumber=number, Body=part, **self._customer_key())["ETag"],
            }

        try:
            with ThreadPoolExecutor(self.settings.concurrency) as pool:
                parts = list(pool.map(send, range(1, -(-info.size // size) + 1)))
            self._s3.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts}, **condition)
        except BaseException:
            try:
                self._s3.abort_multipart_upload(**upload)
            except Exception:  # noqa: S110, BLE001  the first error is the one that counts
                pass
            raise

    def delete(self, files: Iterable[FileInfo]) -> None:
        keys = [{"Key": self._key(self._file(info))} for info in files]
        for start in range(0, len(keys), DELETE_BATCH):
            with _translated(self._name("")):
                done = self._s3.delete_objects(
                    Bucket=self.settings.bucket, Delete={"Objects": keys[start : start + DELETE_BATCH], "Quiet": True}
                )
            for error in done.get("Errors", ()):
                if error.get("Code") != "NoSuchKey":
                    raise StorageError(f"cannot delete {error.get('Key')}: {error.get('Code')} {error.get('Message')}")

    def get_control(self, name: str) -> ControlObject:
        check_control_name(name)
        with _translated(self._name(name)):
            found = self._s3.get_object(**self._at(name), **self._customer_key())
            return ControlObject(found["Body"].read(), found["ETag"])

    def put_control(self, name: str, data: bytes, *, if_match: str | None = None, if_absent: bool = False) -> str:
        check_control_name(name)
        condition = {"IfNoneMatch": "*"} if if_absent else {"IfMatch": if_match} if if_match is not None else {}
        with _translated(self._name(name), missing_is_precondition=if_match is not None):
            stored = self._s3.put_object(
                **self._at(name), Body=bytes(data), ContentType="application/json", **self._customer_key(), **condition
            )
        return str(stored["ETag"])

    def delete_control(self, name: str, *, if_match: str | None = None) -> None:
        check_control_name(name)
        condition = {"IfMatch": if_match} if if_match is not None else {}
        try:
            with _translated(self._name(name), missing_is_precondition=if_match is not None):
                self._s3.delete_object(**self._at(name), **condition)
        except ObjectNotFound:
            return

    def close(self) -> None:
        with self._guard:
            client, self._client = self._client, None
        if client is not None:
            client.close()


class _RangeNotSatisfiable(StorageError):
    """The range begins at or after the end of the object."""


class _Empty:
    """A range past the end."""

    def read(self, size: int = -1, /) -> bytes:
        return b""

    def close(self) -> None:
        return

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None, /) -> None:
        return


class _Stream:
    """The body of a response, cut to what was asked for. A body that ends early is `StorageUnavailable`."""

    def __init__(self, body: Any, name: str, size: int, *, ends: bool) -> None:
        self._body, self._name, self._rest, self._ends = body, name, size, ends

    def skip(self, size: int) -> None:
        while size > 0:
            size -= len(self._raw(min(size, 1 << 20)))

    def read(self, size: int = -1, /) -> bytes:
        want = self._rest if size < 0 else min(size, self._rest)
        if not want:
            return b""
        data = self._raw(want)
        self._rest -= len(data)
        return data

    def _raw(self, size: int) -> bytes:
        with _translated(self._name):
            data = bytes(self._body.read(size))
        if not data:
            raise StorageUnavailable(f"the connection ended early: {self._name}")
        return data

    def close(self) -> None:
        self._body.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None, /) -> None:
        self.close()


def _part(body: Body, offset: int, size: int) -> bytes:
    if isinstance(body, Path):
        file: IO[bytes]
        with body.open("rb") as file:
            file.seek(offset)
            return file.read(size)
    return bytes(memoryview(body)[offset : offset + size])


def _format_time(timestamp_ms: int) -> str:
    """RFC 3339 in UTC without trailing zeros of the fraction, as Litestream writes it."""
    when = created_at(timestamp_ms)
    fraction = f".{when.microsecond // 1000:03d}".rstrip("0").rstrip(".")
    return f"{when:%Y-%m-%dT%H:%M:%S}{fraction}Z"


def _parse_time(text: str) -> datetime | None:
    try:
        return datetime.fromisoformat(text).astimezone(UTC)
    except ValueError:
        return None


@contextmanager
def _translated(name: str, *, missing_is_precondition: bool = False) -> Iterator[None]:
    """Turn botocore's errors into ours."""
    import botocore.exceptions as boto
    import urllib3.exceptions

    try:
        yield
    except boto.ClientError as error:
        raise _error(error.response, name, missing_is_precondition) from error
    except (boto.NoCredentialsError, boto.PartialCredentialsError, boto.TokenRetrievalError) as error:
        raise AccessDenied(name, "no credentials", hint="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile") from error
    except boto.NoRegionError as error:
        raise StorageError(f"no region known for {name}", hint="add ?region=... to the URL or set AWS_REGION") from error
    except (boto.ParamValidationError, boto.InvalidRegionError, boto.UnknownEndpointError) as error:
        raise StorageError(f"{name}: {' '.join(str(error).split())}") from error
    except (boto.BotoCoreError, urllib3.exceptions.HTTPError, ConnectionError, TimeoutError) as error:
        raise StorageUnavailable(
            f"store cannot be reached: {name} ({type(error).__name__})", hint="check the endpoint and the network"
        ) from error


def _error(response: Any, name: str, missing_is_precondition: bool) -> StorageError:
    code = str(response.get("Error", {}).get("Code", ""))
    message = " ".join(str(response.get("Error", {}).get("Message", "")).split())
    status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    if code == "NoSuchBucket":
        bucket = name.removeprefix("s3://").partition("/")[0]
        return StorageError(f"bucket does not exist: {bucket}", hint=f"create the bucket {bucket}, or check its name and region")
    if code in ("NoSuchKey", "404", "NotFound") or status == 404:
        return PreconditionFailed(name) if missing_is_precondition else ObjectNotFound(name)
    if code in ("PreconditionFailed", "412") or status == 412:
        return PreconditionFailed(name)
    if code == "InvalidRange" or status == 416:
        return _RangeNotSatisfiable(f"range past the end: {name}")
    if code == "RequestTimeTooSkewed":
        return StorageError(f"the store refuses the time of this machine: {name}", hint="set the clock (NTP)")
    if code in _DENIED or status in (401, 403):
        return AccessDenied(name, f"access denied ({code})")
    if code in _AGAIN or status >= 500 or status in (408, 409, 429):
        return StorageUnavailable(f"store asks to try again ({code or status}): {name}")
    return StorageError(f"{name}: {code or status} {message}".rstrip())
