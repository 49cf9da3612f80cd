"""A place below a replica's URL for trying a store out, away from what the replica holds."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from replicator.errors import ObjectNotFound
from replicator.storage import open_client
from replicator.storage.base import ReplicaClient
from replicator.storage.url import is_url

__all__ = ["Scratch", "open_scratch"]


@dataclass(frozen=True, slots=True)
class Scratch:
    """The place, and what can be done with its backend.

    Attributes:
        parts: a client that sends files of more than `part_bytes` in parts, and leaves conditions to the store alone; None where the backend
            has no parts.
        endpoint: where the backend listens in plain HTTP, so that somebody can stand in between; None elsewhere.
        through: returns the client that goes to another endpoint.
        folder: on this machine, which remains when all files are deleted; None elsewhere.
        prices: US dollars for one request, by kind; empty where requests cost nothing.
        tools: name and version of what the backend is reached with.
    """

    client: ReplicaClient
    parts: ReplicaClient | None = None
    part_bytes: int = 0
    endpoint: str | None = None
    through: Callable[[str], ReplicaClient] | None = None
    folder: Path | None = None
    prices: tuple[tuple[str, float], ...] = ()
    tools: tuple[tuple[str, str], ...] = ()

    def close(self) -> None:
        """Remove the folder, if there is one, and close the clients."""
        if self.folder is not None:
            with contextlib.suppress(OSError):
                shutil.rmtree(self.folder)
        for client in (self.client, self.parts):
            if client is not None:
                client.close()


# S3 Standard in us-east-1. Deletes are free.
_S3_PRICES = (("PUT", 5e-6), ("LIST", 5e-6), ("GET", 4e-7))


def open_scratch(url: str, name: str) -> Scratch:
    """Return the place of that name below a replica URL, or a path. Nothing is contacted or created yet. Raises `ConfigError`."""
    open_client(url).close()  # the URL as it is must be right
    place, mark, query = url.partition("?") if is_url(url) else (url, "", "")
    client = open_client(f"{place.rstrip('/')}/{name}{mark}{query}")
    if client.kind == "file":
        from replicator.storage.file import FileClient

        assert isinstance(client, FileClient)
        return Scratch(client, folder=client.root)
    if client.kind != "s3":
        return Scratch(client)
    import boto3

    from replicator.storage.s3 import S3Client
    from replicator.storage.url import MIN_PART_SIZE

    class Unaware(S3Client):
        """Does not look whether the object is there before it sends parts."""

        def _head(self, key: str) -> dict[str, str]:
            raise ObjectNotFound(key)

    assert isinstance(client, S3Client)
    settings = client.settings
    plain = settings.endpoint if settings.endpoint and settings.endpoint.startswith("http://") and settings.path_style else None
    return Scratch(
        client,
        parts=Unaware(settings, single_put_bytes=MIN_PART_SIZE),
        part_bytes=MIN_PART_SIZE,
        endpoint=plain,
        through=(lambda endpoint: S3Client(replace(settings, endpoint=endpoint, force_path_style=True))) if plain else None,
        prices=_S3_PRICES,
        tools=(("boto3", boto3.__version__),),
    )
