"""Which engine may run a host's runs: one lease for all its files, and which folder has the newest of them.

    <root>/_hosts/<host>/lock.json   the lease: who may run now, and until when
    <root>/_hosts/<host>/owner.json  the folder that last held it

**The lease** (`replicator.Lease`, one object and one renewal for a host, whatever the number of its runs) keeps two engines from running at once. It is asked of
the monotonic clock before each body, without a request. An engine that finds it held waits no longer than it takes to see whether the other one lives: a lease
that is renewed meanwhile is refused with its owner's name, one that stays as it is for its whole time is that of a dead engine.

**The folder.** Each has a random name of its own, in `.host/name`. If the last owner was another folder, that machine has gone on since: what is here is moved
aside, and everything comes from the replica. If it was this one, what is here is the newest there is, and nothing is restored but what is missing.
"""

from __future__ import annotations

import json
import logging
import secrets
import socket
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from replicator import open_client
from replicator.atomic import write_file
from replicator.errors import LeaseError, LeaseHeld, ObjectNotFound, PreconditionFailed
from replicator.lease import Lease, default_owner
from workflow.errors import HostInUse, NotOwner
from workflow.values import iso

__all__ = ["Ownership", "below"]

log = logging.getLogger(__name__)

LOOK_S = 0.5
KEPT_INSTANCES = 64


def below(url: str, name: str) -> str:
    """Return the URL of something under a root; parameters stay at the end."""
    path, mark, parameters = url.partition("?")
    return f"{path.rstrip('/')}/{name}{mark}{parameters}"


class Ownership:
    """A host's right to run its runs. Used from any thread but by one engine; methods that ask the store block."""

    def __init__(self, folder: Path, url: str, host: str, *, ttl_s: float) -> None:
        """Nothing is contacted yet.

        Args:
            url: the root of all hosts.
            host: the name under which this folder's runs are known there.
            ttl_s: after so long without a sign of life another engine may take over.

        Raises:
            ConfigError: a malformed URL or time.
        """
        self._folder = folder / ".host"
        self._runs = folder
        self.host = host
        self._client = open_client(below(url, f"_hosts/{host}"))
        self.url = url
        self.lease = Lease(self._client, owner=default_owner(), ttl_s=ttl_s)

    def take(self, ends: Callable[[], bool] = lambda: False) -> bool:
        """Become the owner; returns whether another folder was it before, whose files must come from the replica.

        Args:
            ends: asked while waiting; gives up when it says so.

        Raises:
            HostInUse: an engine elsewhere is, and lives.
            ReplicatorError: the replica cannot be reached, or cannot keep two writers apart.
        """
        self._acquire(ends)
        name = self._name()
        try:
            found = self._client.get_control("owner.json")
        except ObjectNotFound:
            owner, etag = None, None
        else:
            owner, etag = _folder_of(found.data), found.etag
        if owner == name:
            return False
        if owner is not None:
            self._move_aside()
        data = json.dumps({"folder": name, "machine": socket.gethostname(), "since": iso(datetime.now(UTC))}).encode()
        try:
            self._client.put_control("owner.json", data, if_match=etag, if_absent=etag is None)
        except PreconditionFailed as error:
            raise self._in_use() from error
        log.info("runs taken over root=%s host=%s generation=%d before=%s", self.url, self.host, self.lease.generation, owner)
        return owner is not None

    def _acquire(self, ends: Callable[[], bool]) -> None:
        # The folder is locked by this process, so that whoever held the lease from here before is dead.
        instances = self._instances()
        write_file(self._folder / "instances.json", json.dumps([*instances, self.lease.instance][-KEPT_INSTANCES:]).encode())
        first: object = None
        told = False
        while True:
            try:
                self.lease.acquire(predecessors=instances)
                return
            except LeaseHeld as error:
                seen = self.lease.status().expires_at
                first = first or seen
                if seen != first or ends():  # it was renewed: its owner lives
                    raise self._in_use() from error
                if not told:
                    told = True
                    log.info("waiting to see whether the owner of the host lives host=%s owner=%s", self.host, error.owner)
                time.sleep(min(max(error.wait_s, 0.01), LOOK_S))

    def _in_use(self) -> HostInUse:
        status = self.lease.status()
        return HostInUse(self.host, self.url, status.owner, iso(status.expires_at) if status.expires_at is not None else "unknown")

    def check(self) -> None:
        """Return if bodies may run now. No request.

        Raises:
            NotOwner: the lease's time is over, or somebody else has it.
        """
        status = self.lease.status()
        if status.state == "held":
            return
        if status.state == "expired":
            raise NotOwner(f"host {self.host}", f"its lease could not be renewed in time{f': {status.error}' if status.error else ''}")
        raise NotOwner(f"host {self.host}", f"{status.owner or 'nobody'} has its lease now")

    def on_loss(self, listener: Callable[[LeaseError], None]) -> None:
        """Let `listener` be called, by any thread, when somebody else has taken the lease."""
        self.lease.on_loss(listener)

    def close(self, *, release: bool) -> None:
        """Stop renewing; `release`: and let others take over at once, which is right only when everything is stored."""
        self.lease.close(release=release)
        self._client.close()

    def _name(self) -> str:
        path = self._folder / "name"
        if not path.exists():
            write_file(path, secrets.token_hex(8).encode())
        return path.read_text()

    def _instances(self) -> list[str]:
        try:
            return [str(item) for item in json.loads((self._folder / "instances.json").read_bytes())]
        except (FileNotFoundError, ValueError, TypeError):
            return []

    def _move_aside(self) -> None:
        """What is here was overtaken by another folder: keep it, but out of the way."""
        host = self._folder
        stale = list(self._runs.glob("*.db*")) + [path for path in (*host.glob("intake.db*"), host / "meta") if path.exists()]
        if stale:
            aside = host / f"overtaken-{datetime.now(UTC):%Y%m%dT%H%M%S%fZ}"
            aside.mkdir()
            for path in stale:
                path.rename(aside / path.name)
            log.warning("local runs were overtaken and moved aside files=%d to=%s", len(stale), aside)


def _folder_of(data: bytes) -> str:
    """Read an owner's folder; what cannot be read is nobody's, so that files here are not taken for the newest."""
    try:
        return str(json.loads(data)["folder"])
    except (ValueError, KeyError, TypeError):
        return "?"
