"""Which replicas lie below a place? A directory of databases (`dir:`) has one for each of them, at its relative path.

A replica is recognised by its level folders with a file in one of them, or by the generations of the 0.3 format. Directories and S3 are asked for all there
is; elsewhere one folder is listed after the other. Names from a store are hostile until they are
checked: one that could lead out of the folder that it is restored into is left out, and said.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from replicator.errors import StorageError
from replicator.format.ltx import parse_name
from replicator.storage.base import ReplicaClient

if TYPE_CHECKING:
    from replicator.storage.tree import Objects

__all__ = ["is_safe", "replicas_below"]

# What stands behind a replica's path, on each backend: see `base.Layout` and the backends' own docstrings.
_LEVEL = re.compile(r"[0-9]")
_HEX_LEVEL = re.compile(r"[0-9a-f]{4}")
_KEY = re.compile(r"(?P<path>.*?)/?(?:(?:age/)?[0-9a-f]{4}/[0-9a-f]{16}-[0-9a-f]{16}\.ltx(?:\.age)?|generations/[0-9a-f]{16}/.+)")

MAX_DEPTH = 64
"""Of folders in folders: a server may follow links in a circle."""

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
    from replicator.storage.tree import TreeClient

    if isinstance(inner, TreeClient):
        yield from _in_folders(inner.objects)
        return
    if not isinstance(inner, S3Client):
        raise StorageError(f"replicas below {client.url} cannot be listed")
    for key in inner.keys_below():
        if found := _KEY.fullmatch(key):
            yield found["path"]


def _in_folders(objects: Objects) -> Iterator[str]:
    queue = [""]
    while queue:
        path = queue.pop()
        names = set(objects.folders(path))
        own = {"ltx", "age", "generations"} & names
        levels = [_joined(path, name) for name in names if _HEX_LEVEL.fullmatch(name)]
        for name in own - {"generations"}:
            inside = set(objects.folders(_joined(path, name)))
            levels += [_joined(path, name, level) for level in inside if _LEVEL.fullmatch(level) or _HEX_LEVEL.fullmatch(level)]
        levels = [level for level in levels if any(parse_name(item.name.removesuffix(".age")) for item in objects.entries(level))]
        if levels or ("generations" in own and any(objects.folders(_joined(path, "generations")))):
            yield path
        for name in names - own:
            inside_path = _joined(path, name)
            if inside_path in levels:
                continue
            if not name or "/" in name or not is_safe(name) or inside_path.count("/") >= MAX_DEPTH:
                yield ".."  # is counted, and not entered
            else:
                queue.append(inside_path)


def _joined(*names: str) -> str:
    return "/".join(name for name in names if name)


def _names(folder: str, name: str) -> list[str]:
    try:
        return os.listdir(os.path.join(folder, name))
    except OSError:
        return []
