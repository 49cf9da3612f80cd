"""Instance files and the intake on a replica: the only module that imports `replicator`.

    <root>/<id>/...                 an instance file, as LTX
    <root>/_hosts/<host>/...        the intake, as LTX
    <root>/_hosts/<host>/owner.json who owns the host's runs: the folder that last took them over
    <root>/_objects/generations/<id>/<sha256>  objects above a mebibyte

**Ownership.** Each folder has a random name of its own, in `.host/name`. An engine that starts reads the owner: if that is its folder, what is
there is the newest there is, and only missing files are restored. If it is another, that other machine has gone on since: local files are moved aside
and everything comes from the replica. The object is exchanged under a condition, so that of two engines that start at once one is refused. A writer that
was taken over while it ran is stopped at its next append to a file that the new owner has touched, by the replica (`Fenced`).

A run has a `Replicator` of its own while it is in memory. Closing it stores the rest, so that a parked run is replicated.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import json
import logging
import secrets
import socket
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import ParamSpec, TypeVar

from replicator import Replicator, ReplicatorError, open_client, restore
from replicator.errors import NoBackups, ObjectNotFound, PreconditionFailed
from replicator.levels import History
from replicator.storage.base import ObjectStore
from workflow.errors import FolderInUse, MissingObject
from workflow.values import iso

__all__ = ["ReplicaObjects", "Replication"]

log = logging.getLogger(__name__)
P = ParamSpec("P")
T = TypeVar("T")

WAIT_S = 60.0
"""So long may a barrier take; then the run leaves memory and is tried again later."""


def below(url: str, name: str) -> str:
    """Return the URL of something under a root; parameters stay at the end."""
    path, mark, parameters = url.partition("?")
    return f"{path.rstrip('/')}/{name}{mark}{parameters}"


class ReplicaObjects:
    """Large objects beside the replica, in a place of their own."""

    def __init__(self, url: str) -> None:
        client = open_client(below(url, "_objects"))
        assert isinstance(client, ObjectStore)
        self._store: ObjectStore = client

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
        if hashlib.sha256(data).hexdigest() != sha256:
            raise MissingObject(sha256, f"{self._store.url}/{_name(home, sha256)}: other bytes")
        return data

    def copy(self, source: str, target: str, sha256: str) -> None:
        """Give another run an object of its own."""
        self.put(target, sha256, self.get(source, sha256))

    def delete(self, home: str, objects: Iterable[str]) -> None:
        """Delete objects of a run."""
        self._store.delete_objects([_name(home, sha256) for sha256 in objects])

    def close(self) -> None:
        """Release connections."""
        self._store.close()


def _name(home: str, sha256: str) -> str:
    # `generations` is the part of a path in which every client takes objects of any size.
    return f"generations/{home if len(home) <= 128 else hashlib.sha256(home.encode()).hexdigest()}/{sha256}"


class Replication:
    """A folder's replica. Blocking work is done in threads of its own."""

    def __init__(self, folder: Path, url: str, *, host: str = "main", sync_interval_s: float | None = None) -> None:
        """Nothing is contacted yet.

        Args:
            url: the root, for all files of the folder.
            host: the name under which the intake is stored; another machine takes over by using the same.
            sync_interval_s: as in `Replicator`: least time between uploads that nobody waits for.

        Raises:
            ConfigError: a malformed URL.
        """
        self._folder = folder
        self._url = url
        self._host = host
        self._interval_s = sync_interval_s
        self._client = open_client(url)
        self._threads = ThreadPoolExecutor(16, thread_name_prefix="workflow replica")
        self._replicators: dict[str, Replicator] = {}
        self._intake: Replicator | None = None
        self.objects = ReplicaObjects(url)

    # -- the host ----------------------------------------------------------------------------------------------------------------

    async def take_over(self) -> None:
        """Become the owner, and get the intake if another folder was the owner or it is missing here.

        Raises:
            FolderInUse: another engine becomes the owner at this moment.
            ReplicatorError: the replica cannot be reached or read.
        """
        await self._run(self._take_over)

    def _take_over(self) -> None:
        host = self._folder / ".host"
        name_file = host / "name"
        if not name_file.exists():
            name_file.write_text(secrets.token_hex(8))
        name = name_file.read_text()
        object_name = f"_hosts/{self._host}/owner.json"
        try:
            found = self._client.get_control(object_name)
        except ObjectNotFound:
            owner, etag = None, None
        else:
            owner, etag = json.loads(found.data).get("folder"), found.etag
        if owner != name:
            if owner is not None:
                self._move_aside()
                (host / "successor").touch()
            data = json.dumps({"folder": name, "machine": socket.gethostname(), "since": iso(datetime.now(UTC))}).encode()
            try:
                self._client.put_control(object_name, data, if_match=etag, if_absent=etag is None)
            except PreconditionFailed as error:
                raise FolderInUse(self._client.url) from error
            log.info("runs taken over root=%s before=%s", self._client.url, owner)
        if not (host / "intake.db").exists():
            self._restore(f"_hosts/{self._host}", host / "intake.db")

    @property
    def is_successor(self) -> bool:
        """Whether runs may be on the replica that the intake does not know: starts that another owner had not stored when it was lost."""
        return (self._folder / ".host" / "successor").exists()

    def _move_aside(self) -> None:
        """What is here was overtaken by another folder: keep it, but out of the way."""
        host = self._folder / ".host"
        stale = list(self._folder.glob("*.db*")) + [path for path in (*host.glob("intake.db*"), host / "meta") if path.exists()]
        if stale:
            aside = host / f"overtaken-{datetime.now(UTC):%Y%m%dT%H%M%S%fZ}"
            aside.mkdir()
            for path in stale:
                path.rename(aside / path.name)
            log.warning("local runs were overtaken and moved aside files=%d to=%s", len(stale), aside)

    async def attach_intake(self) -> None:
        """Begin to replicate the intake. Raises `ReplicatorError`."""
        path = self._folder / ".host" / "intake.db"
        self._intake = await self._run(self._replicator, path, f"_hosts/{self._host}")

    async def intake_barrier(self) -> None:
        """Return when the replica has the intake as it is now."""
        assert self._intake is not None
        await self._run(self._intake.wait, None)

    # -- runs --------------------------------------------------------------------------------------------------------------------

    def restore_missing(self, id: str) -> bool:
        """Get a run's file if the replica has it; blocks. Raises `ReplicatorError`: it has it, and it cannot be read."""
        return self._restore(id, self._folder / f"{id}.db")

    def _restore(self, name: str, path: Path) -> bool:
        try:
            restore(below(self._url, name), path)
        except NoBackups:
            return False
        return True

    async def attach(self, id: str) -> None:
        """Begin to replicate a run's file. Raises `ReplicatorError`."""
        self._replicators[id] = await self._run(self._replicator, self._folder / f"{id}.db", id)

    def _replicator(self, path: Path, name: str) -> Replicator:
        meta = self._folder / ".host" / "meta" / name.replace("/", "-")
        meta.mkdir(parents=True, exist_ok=True)
        history = History() if name.startswith("_") else None  # a run's file is small, and ends
        url = below(self._url, name)
        return Replicator(path, url, meta_path=meta, sync_interval_s=self._interval_s, history=history).start()

    async def barrier(self, id: str) -> None:
        """Return when the replica has all that a run has committed; waiters share one upload. Raises `ReplicatorError`."""
        replicator = self._replicators[id]
        await self._run(lambda: replicator.wait(timeout_s=WAIT_S))

    async def detach(self, id: str) -> None:
        """Store the rest and stop. What cannot be stored in time stays on this machine, and is stored at the next start."""
        replicator = self._replicators.pop(id, None)
        if replicator is None:
            return
        try:
            await self._run(lambda: replicator.close(timeout_s=WAIT_S))
        except ReplicatorError as error:
            log.warning("not all is replicated id=%s error=%r", id, str(error))

    def forget(self, id: str, objects: Iterable[str]) -> None:
        """Delete a run's replica and its objects; blocks."""
        client = open_client(below(self._url, id))
        try:
            for level in range(10):
                client.delete(client.list(level))
            client.delete_control("pyrepl/lineage.json")
        finally:
            client.close()
        self.objects.delete(id, objects)

    async def close(self) -> None:
        """Store the rest of the intake and stop."""
        if self._intake is not None:
            try:
                await self._run(self._intake.close)
            except ReplicatorError as error:
                log.warning("the intake is not all replicated error=%r", str(error))
        self._threads.shutdown(wait=False)
        self._client.close()
        self.objects.close()

    async def _run(self, work: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, functools.partial(work, *args, **kwargs))
