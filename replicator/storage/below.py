"""Which replicas lie below a place? A directory of databases (`dir:`) has one for each of them, at its relative path.

A replica is recognised by its level folders with a file in one of them, or by the generations of the 0.3 format. Names from a store are hostile until they are
checked: one that could lead out of the folder that it is restored into is left out, and said.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator

from replicator.errors import StorageError
from replicator.storage.base import ReplicaClient

__all__ = ["is_safe", "replicas_below"]

# What stands behind a replica's path, on each backend: see `base.Layout` and the backends' own docstrings.
_LEVEL = re.compile(r"[0-9]")
_KEY = re.compile(r"(?P<path>.*?)/?(?:(?:age/)?[0-9a-f]{4}/[0-9a-f]{16}-[0-9a-f]{16}\.ltx(?:\.age)?|generations/[0-9a-f]{16}/.+)")

log = logging.getLogger(__name__)


def replicas_below(client: ReplicaClient) -> list[str]:
    """Return the paths of the replicas at and below a client's, relative to it, in order; an empty one for itself.

    Raises:
        StorageError: it cannot be listed.
    """
    found: dict[str, None] = {}
    unsafe = 0
    for path in _paths(client):
        if not is_safe(path):
            unsafe += 1
        else:
            found[path] = None
    if unsafe:
        log.warning("names that are no paths of databases are left out url=%s count=%d", client.url, unsafe)
    return sorted(found)


def is_safe(path: str) -> bool:
    """Say whether a relative path stays below the folder that it is joined to."""
    return path == "" or all(part not in ("", ".", "..") and "\0" not in part for part in path.split("/"))


def _paths(client: ReplicaClient) -> Iterator[str]:
    from replicator.storage.age import AgeClient
    from replicator.storage.file import FileClient

    inner = client.inner if isinstance(client, AgeClient) else client
    if isinstance(inner, FileClient):
        for folder, folders, _ in os.walk(inner.root):
            relative = os.path.relpath(folder, inner.root)
            here = "" if relative == "." else relative
            if any(map(_LEVEL.fullmatch, _names(folder, "ltx") + _names(folder, "age"))) or _names(folder, "generations"):
                yield here
            folders[:] = [name for name in folders if name not in ("ltx", "age", "generations")]
        return
    from replicator.storage.s3 import S3Client

    if not isinstance(inner, S3Client):
        raise StorageError(f"replicas below {client.url} cannot be listed")
    for key in inner.keys_below():
        if found := _KEY.fullmatch(key):
            yield found["path"]


def _names(folder: str, name: str) -> list[str]:
    try:
        return os.listdir(os.path.join(folder, name))
    except OSError:
        return []
