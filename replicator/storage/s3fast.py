"""The many small requests of an S3 replica through obstore, which costs a tenth of boto3's CPU for each. Needs the extra `fast`.

Only storing and reading a small LTX file comes here. All else, and every replica with settings that obstore cannot say in the same way, stays
with `s3.py`; so does whatever obstore could not do: the request is made again there, and its answer counts. Hence one translation of errors.

* obstore never tries again by itself: a conditional write that was sent twice may have lost against itself. One that failed without a clear
  answer is sent once more by boto3; when that finds the name taken, the outcome is unknown.
* obstore normalises keys, so that only paths are taken which that leaves alone.
* Its time limit is for a whole request, not for silence: large bodies would run into it.

Checked with obstore 0.12 against SeaweedFS, moto and rclone: create if absent, metadata, ranges. It has no conditional delete.
"""

from __future__ import annotations

import importlib.util
import re
import threading
from collections.abc import Mapping
from datetime import timedelta
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any

from replicator.errors import PreconditionFailed, StorageUnavailable
from replicator.format.ltx import FileInfo
from replicator.storage.base import LITESTREAM, Body, Layout, ReadStream, body_size
from replicator.storage.s3 import S3Client
from replicator.storage.url import S3Settings

__all__ = ["FastS3Client", "open_s3"]

SMALL_BYTES = 1 << 20
TIMEOUT_S = 60
SWITCH = "PYREPL_S3"
_PLAIN_PATH = re.compile(r"(?!\.\.?(?:/|$))[A-Za-z0-9_.-]+(?:/(?!\.\.?(?:/|$))[A-Za-z0-9_.-]+)*")
# Boto3 looks at these, and obstore does not or in another way.
_BOTO3_ONLY = (
    *("AWS_PROFILE", "AWS_DEFAULT_PROFILE", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"),
    *("AWS_USE_FIPS_ENDPOINT", "AWS_USE_DUALSTACK_ENDPOINT", "AWS_S3_DISABLE_EXPRESS_SESSION_AUTH"),
)
_HARMLESS = re.compile(r"\s*(?:[#;\[].*|(?:region|output|cli_\w+)\s*=.*)?")  # lines of the AWS configuration file
_AUTHORITIES = ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE")
_PROXIES = ("http_proxy", "https_proxy", "all_proxy")


def open_s3(settings: S3Settings, environ: Mapping[str, str], *, layout: Layout = LITESTREAM) -> S3Client:
    """Return the client for a replica: the fast one where obstore is installed and can do it. `PYREPL_S3=boto3` in the environment forbids that."""
    if environ.get(SWITCH) == "boto3" or importlib.util.find_spec("obstore") is None:
        return S3Client(settings, layout=layout)
    options = _options(settings, environ)
    return S3Client(settings, layout=layout) if options is None else FastS3Client(settings, options, layout=layout)


def _options(settings: S3Settings, environ: Mapping[str, str]) -> dict[str, Any] | None:
    """Return what obstore needs to know; None where only boto3 can do what the settings and the environment say."""
    key, secret, token = settings.access_key_id, settings.secret_access_key, None
    if not key and not secret:
        key, secret, token = (environ.get(f"AWS_{name}") for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "SESSION_TOKEN"))
    region = settings.region_name or environ.get("AWS_REGION") or environ.get("AWS_DEFAULT_REGION")
    encrypted = not (settings.endpoint or "").startswith("http://")
    odd = (
        _has_odd_lines(environ)
        or settings.skip_verify
        or not settings.sign_payload
        or settings.is_tigris
        or settings.storage_class
        or settings.sse_customer_key
        or settings.sse_kms_key_id
        or any(environ.get(name) for name in _BOTO3_ONLY)
        or any(environ.get(name) or environ.get(name.upper()) for name in _PROXIES)
        or (encrypted and any(environ.get(name) for name in _AUTHORITIES))
    )
    plain = _PLAIN_PATH.fullmatch(settings.path) and re.fullmatch(r"[a-z0-9-]+", settings.bucket)
    if odd or not plain or not key or not secret or not region:
        return None
    return {
        "bucket": settings.bucket,
        "region": region,
        "access_key_id": key,
        "secret_access_key": secret,
        "virtual_hosted_style_request": not settings.path_style,
        "client_options": {"allow_http": True, "timeout": timedelta(seconds=TIMEOUT_S)},
        "retry_config": {"max_retries": 0},
        **({"session_token": token} if token else {}),
        **({"endpoint": settings.endpoint} if settings.endpoint else {}),
    }


def _has_odd_lines(environ: Mapping[str, str]) -> bool:
    """Whether the AWS configuration file says more than a region: only boto3 understands that."""
    try:
        text = Path(environ.get("AWS_CONFIG_FILE") or "~/.aws/config").expanduser().read_text()
    except FileNotFoundError:
        return False
    except (OSError, RuntimeError, ValueError):
        return True
    return any(_HARMLESS.fullmatch(line) is None for line in text.splitlines())


_stores: dict[bytes, Any] = {}
_stores_lock = threading.Lock()


def _shared(make: Any, options: Mapping[str, Any]) -> Any:
    """Return the store, with its pool of connections, that all replicas in a bucket share. Their number is that of the buckets in the configuration."""
    key = sha256(repr(sorted(options.items())).encode()).digest()  # not the keys themselves
    with _stores_lock:
        if key not in _stores:
            _stores[key] = make(**options)
        return _stores[key]


class FastS3Client(S3Client):
    """As `S3Client`, and it promises the same."""

    def __init__(self, settings: S3Settings, options: Mapping[str, Any], **more: Any) -> None:
        """`options`: of obstore's `S3Store`; the rest as for `S3Client`."""
        super().__init__(settings, **more)
        import obstore
        import obstore.exceptions
        import obstore.store

        self._obstore = obstore
        self._store = _shared(obstore.store.S3Store, options)
        self._failures = (obstore.exceptions.BaseError, OSError)

    def open(self, info: FileInfo, *, offset: int = 0, size: int | None = None) -> ReadStream:
        wanted = info.size - offset if size is None else size
        if 0 < wanted <= SMALL_BYTES:
            try:
                return BytesIO(self._read(self._key(info), offset, size))
            except self._failures:
                pass  # boto3 finds out why
        return super().open(info, offset=offset, size=size)

    def _read(self, key: str, offset: int, size: int | None) -> bytes:
        wanted = {} if not offset and size is None else {"range": {"offset": offset} if size is None else (offset, offset + size)}
        found = self._obstore.get(self._store, key, options=wanted)
        first, end = found.range
        if end - first > SMALL_BYTES or first != offset:
            raise OSError("not what was asked for")
        return bytes(found.bytes())

    def _put_body(self, key: str, body: Body, *, if_absent: bool, **more: Any) -> int:
        size = body_size(body)
        if size > SMALL_BYTES:
            return super()._put_body(key, body, if_absent=if_absent, **more)
        data = body.read_bytes() if isinstance(body, Path) else bytes(body)
        attributes = {"Content-Type": "application/octet-stream", **more.get("Metadata", {})}
        mode = "create" if if_absent else "overwrite"
        try:
            self._obstore.put(self._store, key, data, mode=mode, attributes=attributes, use_multipart=False)
        except self._obstore.exceptions.AlreadyExistsError as error:
            raise PreconditionFailed(self._name(key)) from error
        except self._failures:
            return self._put_again(key, data, if_absent=if_absent, **more)
        return len(data)

    def _put_again(self, key: str, data: bytes, *, if_absent: bool, **more: Any) -> int:
        try:
            return super()._put_body(key, data, if_absent=if_absent, **more)
        except PreconditionFailed as error:
            raise StorageUnavailable(f"conditional write was sent twice and its outcome is unknown: {self._name(key)}") from error
