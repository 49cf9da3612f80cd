"""The leases of one process: a database's own, or one that many share."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self, TypedDict

from replicator.lease import Lease, LeaseTerms
from replicator.settings import LeaseSettings
from replicator.storage import open_replica
from replicator.storage.base import ReplicaClient

__all__ = ["Leased", "Leases"]


class Leased(TypedDict):
    """Arguments for `Replicator`."""

    lease: bool | Lease | LeaseTerms
    takeover: bool
    lease_timeout_s: float
    """0: a daemon tries again by itself, and waits for nothing."""
    on_handover: Callable[[str], None] | None


class Leases:
    """Makes each shared lease once, and closes them at the end. A context manager; may be used from any thread."""

    def __init__(self, on_request: Callable[[Path | None], None] = lambda path: None) -> None:
        """`on_request`: called by other threads when somebody asks for the lease of a database, or for one that is shared (None)."""
        self._on_request = on_request
        self._lock = threading.Lock()
        self._releases = True
        self._shared: dict[LeaseSettings, tuple[Lease, ReplicaClient]] = {}

    def arguments(self, settings: LeaseSettings | None, path: Path, *, takeover: bool = False) -> Leased:
        """Return what the replicator of a database with these settings is made with. `takeover`: whatever they say about it. Raises `ConfigError`."""
        if settings is None:
            return Leased(lease=False, takeover=False, lease_timeout_s=0.0, on_handover=None)
        takeover = takeover or settings.takeover
        if settings.home is None:
            terms = LeaseTerms(settings.ttl_s, settings.owner)
            return Leased(lease=terms, takeover=takeover, lease_timeout_s=0.0, on_handover=lambda by: self._on_request(path))
        key = replace(settings, takeover=False)
        with self._lock:
            if key not in self._shared:
                client = open_replica(settings.home)
                lease = Lease(client, owner=settings.owner or None, ttl_s=settings.ttl_s)
                lease.on_request(lambda by: self._on_request(None))
                self._shared[key] = lease, client
            return Leased(lease=self._shared[key][0], takeover=takeover, lease_timeout_s=0.0, on_handover=None)

    def keep(self) -> None:
        """Not everything was stored: let leases run out by themselves, so that the next start here may still be the first."""
        self._releases = False

    def close(self) -> None:
        """Release them. Their databases are stopped by then."""
        with self._lock:
            leases, self._shared = list(self._shared.values()), {}
        for lease, client in leases:
            lease.close(release=self._releases)
            client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None, /) -> None:
        self.close()
