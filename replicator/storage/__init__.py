"""Places that store LTX files, behind one protocol (`base.ReplicaClient`).

`open_client` and `open_replica` are the only code that knows every backend. A backend is imported when a URL asks for it: boto3 alone costs a quarter of a second of CPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from replicator.errors import ConfigError
from replicator.storage.base import AGE, LITESTREAM, Layout, ReplicaClient
from replicator.storage.url import file_path, is_url, redact, scheme

if TYPE_CHECKING:
    from replicator.config import ReplicaSettings
    from replicator.storage.file import FileClient
    from replicator.storage.locations import StoreSettings
    from replicator.storage.memory import MemoryClient
    from replicator.storage.s3 import S3Client
    from replicator.storage.tree import TreeClient

__all__ = ["open_client", "open_replica", "open_store", "redact"]

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


def _open(url: str, layout: Layout) -> FileClient | S3Client | MemoryClient | TreeClient:
    if not url:
        raise ConfigError("replica URL is empty", hint="give file:///path, s3://bucket/path, or the path of a directory")
    match scheme(url) if is_url(url) else "file":
        case "file":
            from replicator.storage.file import FileClient

            return FileClient(file_path(url), layout=layout)
        case "s3":
            import os

            from replicator.storage.s3fast import open_s3
            from replicator.storage.url import parse_s3_url

            return open_s3(parse_s3_url(url, environ=os.environ), os.environ, layout=layout)
        case "memory":
            from replicator.storage.memory import MemoryClient

            return MemoryClient.named(url.partition("://")[2], layout=layout)
        case other:
            import os

            from replicator.storage.locations import SCHEMES, parse_store_url

            if other not in SCHEMES:
                hint = f"supported are file, s3, memory, {', '.join(sorted(SCHEMES))}, and plain paths"
                raise ConfigError(f"replica URL has an unsupported scheme: {other}", hint=hint)
            return open_store(parse_store_url(url, environ=os.environ), layout=layout)


def open_store(settings: StoreSettings, *, layout: Layout = LITESTREAM) -> TreeClient:
    """Return the client of a store other than S3 and a directory. Nothing is contacted yet.

    Raises:
        ConfigError: the library for it is not installed.
    """
    from replicator.storage.locations import ABSSettings, GSSettings, NATSSettings, OSSSettings, SFTPSettings
    from replicator.storage.tree import TreeClient

    with _extra(settings.kind):
        match settings:
            case GSSettings():
                from replicator.storage.gs import GSObjects

                return TreeClient(GSObjects(settings), layout=layout)
            case ABSSettings():
                from replicator.storage.abs import ABSObjects

                return TreeClient(ABSObjects(settings), layout=layout)
            case OSSSettings():
                from replicator.storage.oss import OSSObjects

                return TreeClient(OSSObjects(settings), layout=layout, folder="{level:04x}")
            case SFTPSettings():
                from replicator.storage.sftp import SFTPObjects

                return TreeClient(SFTPObjects(settings), layout=layout)
            case NATSSettings():
                from replicator.storage.nats import NATSObjects

                return TreeClient(NATSObjects(settings), layout=layout)
        from replicator.storage.webdav import WebDAVObjects

        return TreeClient(WebDAVObjects(settings), layout=layout)


@contextlib.contextmanager
def _extra(kind: str) -> Iterator[None]:
    """Say what to install when the library of a backend is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "replicator").partition(".")[0] == "replicator":
            raise
        hint = f"pip install 'pyrepl-sqlite[{kind}]'"
        raise ConfigError(f"replicas of type {kind} need a library that is not installed: {error.name}", hint=hint) from error


def open_replica(settings: ReplicaSettings) -> ReplicaClient:
    """Return the client for a replica of a configuration file. Nothing is contacted or created yet; a key file is read.

    Raises:
        ConfigError: an age key is none, or the key file is of no use.
    """
    encrypted = bool(settings.age_identities or settings.age_recipients)
    client = _open_configured(settings, AGE if encrypted else LITESTREAM)
    if not encrypted:
        return client
    from replicator.storage.age import AgeClient

    return AgeClient(client, recipients=settings.age_recipients, identities=settings.age_identities)


def _open_configured(settings: ReplicaSettings, layout: Layout) -> FileClient | S3Client | TreeClient:
    if settings.store is not None:
        return open_store(settings.store, layout=layout)
    if settings.s3 is None:
        from replicator.storage.file import FileClient

        if settings.directory is None:
            raise AssertionError(f"a replica of type {settings.kind} without a directory")
        return FileClient(settings.directory, layout=layout)
    import os

    from replicator.storage.s3fast import open_s3

    s3 = settings.s3
    if settings.sse_customer_key_path is not None:
        s3 = replace(s3, sse_customer_key=_read_key(settings))
    return open_s3(s3, os.environ, layout=layout)


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
