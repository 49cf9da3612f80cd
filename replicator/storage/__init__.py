"""Places that store LTX files, behind one protocol (`base.ReplicaClient`).

`open_client` is the only code that knows every backend. A backend is imported when a URL asks for it: boto3 alone costs half a second.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from replicator.errors import ConfigError
from replicator.storage.base import AGE, LITESTREAM, Layout, ReplicaClient
from replicator.storage.url import file_path, is_url, redact, scheme

if TYPE_CHECKING:
    from replicator.storage.file import FileClient
    from replicator.storage.memory import MemoryClient
    from replicator.storage.s3 import S3Client

__all__ = ["open_client", "redact"]

_ENCRYPTED = "age+"


def open_client(url: str, *, age_recipients: Sequence[str] = (), age_identities: Sequence[str] = ()) -> ReplicaClient:
    """Return the client for a replica URL, or for a plain path of a directory. Nothing is contacted or created yet.

    Args:
        url: as an encrypting client shows it (`age+file:///...`), or without the mark.
        age_recipients: encrypt what is written to these keys (see `age.AgeClient`).
        age_identities: decrypt what is read with these keys. With either of the two the replica is an encrypted one.

    Raises:
        ConfigError: the URL is malformed, its scheme is not supported, or a key is none.
    """
    encrypted = bool(age_recipients or age_identities)
    if url.startswith(_ENCRYPTED) and is_url(url.removeprefix(_ENCRYPTED)):
        if not encrypted:
            raise ConfigError(f"an encrypted replica needs keys: {redact(url)}", hint="give age recipients to write, identities to read")
        url = url.removeprefix(_ENCRYPTED)
    if not encrypted:
        return _open(url, LITESTREAM)
    from replicator.storage.age import AgeClient

    return AgeClient(_open(url, AGE), recipients=age_recipients, identities=age_identities)


def _open(url: str, layout: Layout) -> FileClient | S3Client | MemoryClient:
    if not url:
        raise ConfigError("replica URL is empty", hint="give file:///path, s3://bucket/path, or the path of a directory")
    match scheme(url) if is_url(url) else "file":
        case "file":
            from replicator.storage.file import FileClient

            return FileClient(file_path(url), layout=layout)
        case "s3":
            import os

            from replicator.storage.s3 import S3Client
            from replicator.storage.url import parse_s3_url

            return S3Client(parse_s3_url(url, environ=os.environ), layout=layout)
        case "memory":
            from replicator.storage.memory import MemoryClient

            return MemoryClient.named(url.partition("://")[2], layout=layout)
        case other:
            raise ConfigError(f"replica URL has an unsupported scheme: {other}", hint="supported are file, s3 and memory, and plain paths")
