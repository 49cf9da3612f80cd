"""Places that store LTX files, behind one protocol (`base.ReplicaClient`).

`open_client` is the only code that knows every backend. A backend is imported when a URL asks for it: boto3 alone costs half a second.
"""

from __future__ import annotations

from replicator.errors import ConfigError
from replicator.storage.base import ReplicaClient
from replicator.storage.url import file_path, is_url, redact, scheme

__all__ = ["open_client", "redact"]


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
