"""What stands in a bucket beside the replicas: large objects, requests, marks.

    <root>/_objects/generations/<run>/<sha256>   values and artifacts above a mebibyte
    <root>/_done, _refused, _hosts               marks (see `Marks`)
    <root>/_inbox                                requests (see `inbox.py`)

`generations` is the part of a path in which the clients of `replicator` take objects of any name and size.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from typing import Any

from replicator import open_client
from replicator.errors import ObjectNotFound, PreconditionFailed
from replicator.storage.base import ObjectStore
from workflow.errors import MissingObject
from workflow.objects import checked
from workflow.ownership import below
from workflow.placement import shard_of

__all__ = ["Marks", "ReplicaObjects", "object_name", "open_objects"]

MARK_BYTES = 64 << 10
_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def open_objects(url: str, name: str) -> ObjectStore:
    """Return the client for objects in a place of their own below a root. Raises `ConfigError`."""
    client = open_client(below(url, name))
    assert isinstance(client, ObjectStore)
    return client


class ReplicaObjects:
    """Large objects beside the replica."""

    def __init__(self, url: str) -> None:
        self._store = open_objects(url, "_objects")

    def put(self, home: str, sha256: str, data: bytes) -> None:
        """Store bytes. The same ones again are no error."""
        with contextlib.suppress(PreconditionFailed):  # the name is the content
            self._store.put_object(_name(home, sha256), data, if_absent=True)

    def get(self, home: str, sha256: str) -> bytes:
        """Return bytes. Raises `MissingObject`."""
        try:
            with self._store.open_object(_name(home, sha256)) as stream:
                data = stream.read()
        except ObjectNotFound as error:
            raise MissingObject(sha256, str(error)) from error
        return checked(data, sha256, f"{self._store.url}/{_name(home, sha256)}")

    def copy(self, source: str, target: str, sha256: str) -> None:
        """Give another run an object of its own."""
        self.put(target, sha256, self.get(source, sha256))

    def delete(self, home: str) -> None:
        """Delete all objects of a run."""
        self._store.delete_folder(_home(home))

    def close(self) -> None:
        """Release connections."""
        self._store.close()


def _home(home: str) -> str:
    return f"generations/{home if len(home) <= 128 else hashlib.sha256(home.encode()).hexdigest()}"


def _name(home: str, sha256: str) -> str:
    return f"{_home(home)}/{sha256}"


class Marks:
    """Small objects that say one thing each, by run or request, in 64 folders so that they can be listed in parts.

    <root>/_done/generations/<shard>/<run>          how a run ended: its replica has its end
    <root>/_refused/generations/<shard>/<request>   why a request was refused
    <root>/_hosts/generations/all/<host>            a host that has runs here
    """

    def __init__(self, url: str, kind: str, *, shard: str = "") -> None:
        """`shard`: one for all, where there are few."""
        self._store = open_objects(url, kind)
        self._shard = shard

    def put(self, name: str, facts: dict[str, Any]) -> None:
        """Store a mark. One that is there stays."""
        with contextlib.suppress(PreconditionFailed):
            self._store.put_object(self._name(name), json.dumps(facts).encode(), if_absent=True)

    def get(self, name: str) -> dict[str, Any] | None:
        """Return what a mark says; None when there is none, or nothing of ours."""
        try:
            with self._store.open_object(self._name(name)) as stream:
                found = json.loads(stream.read(MARK_BYTES))
        except (ObjectNotFound, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def names(self, shard: str) -> list[str]:
        """Return the names of a shard's marks. One paged request."""
        return sorted(item.name for item in self._store.list_objects(f"generations/{shard}"))

    def shards(self) -> list[str]:
        """Return the shards that have marks. One paged request."""
        return list(self._store.list_folders("generations"))

    def delete(self, name: str) -> None:
        """Delete a mark, if there is one."""
        self._store.delete_objects([self._name(name)])

    def delete_before(self, ns: int) -> int:
        """Delete marks that were made before a time, in nanoseconds since 1970; returns how many."""
        old = [
            f"generations/{shard}/{item.name}"
            for shard in self.shards()
            for item in self._store.list_objects(f"generations/{shard}")
            if item.created_ns < ns
        ]
        self._store.delete_objects(old)
        return len(old)

    def close(self) -> None:
        """Release connections."""
        self._store.close()

    def _name(self, name: str) -> str:
        return f"generations/{self._shard or shard_of(name)}/{object_name(name)}"


def object_name(name: str) -> str:
    """Return a name that every store takes: the name itself where it is one, else its digest."""
    return name if _PLAIN.fullmatch(name) else f"x{hashlib.sha256(name.encode()).hexdigest()}"
