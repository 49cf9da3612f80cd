"""Places that store LTX files, behind one protocol (`base.ReplicaClient`).

`open_client` and `open_replica` are the only code that knows every backend. A backend is imported when a URL asks for it: boto3 alone costs half a second.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from replicator.errors import ConfigError
from replicator.storage.base import ReplicaClient
from replicator.storage.url import file_path, is_url, redact, scheme

if TYPE_CHECKING:
    from replicator.config import ReplicaSettings

__all__ = ["open_client", "open_replica", "redact"]


def open_client(url: str) -> ReplicaClient:
    """Return the client for a replica URL, or for a plain path of a directory. Nothing is contacted or created yet.

    Raises:
        ConfigError: the URL is malformed, or its scheme is not supported.
    """
    if not url:
        raise ConfigError("replica URL is empty", hint="give file:///path, s3://bucket/path, or the path of a directory")
    match scheme(url) if is_url(url) else "file":
        case "file":
            from replicator.storage.file import FileClient

            return FileClient(file_path(url))
        case "s3":
            import os

            from replicator.storage.s3 import S3Client
            from replicator.storage.url import parse_s3_url

            return S3Client(parse_s3_url(url, environ=os.environ))
        case "memory":
            from replicator.storage.memory import MemoryClient

            return MemoryClient.named(url.partition("://")[2])
        case other:
            raise ConfigError(f"replica URL has an unsupported scheme: {other}", hint="supported are file, s3 and memory, and plain paths")


def open_replica(settings: ReplicaSettings) -> ReplicaClient:
    """Return the client for a replica of a configuration file. Nothing is contacted or created yet; a key file is read.

    Raises:
        ConfigError: the replica is to be encrypted, which this release cannot do; or the key file is of no use.
    """
    if settings.age_identities or settings.age_recipients:
        # Never fall back to plaintext: whoever configured encryption relies on it.
        raise ConfigError(
            f"client-side encryption needs a release that supports age, this one does not: {settings.url}",
            hint="remove age from this replica's configuration only if its contents may be stored unencrypted",
        )
    if settings.s3 is None:
        from replicator.storage.file import FileClient

        if settings.directory is None:
            raise AssertionError(f"a replica of type {settings.kind} without a directory")
        return FileClient(settings.directory)
    from replicator.storage.s3 import S3Client

    s3 = settings.s3
    if settings.sse_customer_key_path is not None:
        s3 = replace(s3, sse_customer_key=_read_key(settings))
    return S3Client(s3)


def _read_key(settings: ReplicaSettings) -> str:
    path = settings.sse_customer_key_path
    assert path is not None
    try:
        with path.open("rb") as file:
            return file.read(4096).decode("ascii").strip()
    except OSError as error:
        raise ConfigError(f"cannot read sse-customer-key-path {path}: {(error.strerror or 'error').lower()}") from error
    except UnicodeDecodeError:
        raise ConfigError(f"sse-customer-key-path {path} does not hold 32 bytes in base64") from None
