"""What a distributed engine does for a fleet: it says where hosts are, and wakes things up. Who may run what is decided by the bucket alone.

The message is `advance(id)`: "there may be something to do for this run". It is idempotent, may be lost, repeated, or sent to the wrong host: then the run's own host finds out by
itself when it looks the next time. So an adapter has nothing to remember, and a wrong one costs time, not correctness. `rayfleet.py` is one; `Polling` needs nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Protocol

from workflow.handing import HostRecords
from workflow.membership import UP, HostRecord

__all__ = ["Distribution", "Polling"]


class Distribution(Protocol):
    """An engine that distributes."""

    async def advance(self, id: str) -> str | None:
        """Tell the host of a run that there may be something to do; returns its name, None when nobody can be told now."""

    async def hosts(self) -> list[HostRecord]:
        """Return the hosts that are up, and how they stand."""


class Polling:
    """Hosts that look by themselves: nobody need be told."""

    def __init__(self, url: str) -> None:
        self._url = url

    async def advance(self, id: str) -> str | None:
        """Leave it to the next look."""
        return None

    async def hosts(self) -> list[HostRecord]:
        """Return what the records in the bucket say. One LIST, and a GET for each."""
        return await asyncio.to_thread(self._read)

    def _read(self) -> list[HostRecord]:
        with contextlib.closing(HostRecords(self._url)) as records:
            found = [records.read(name) for name in sorted(records.versions())]
        return [record for record in found if record is not None and record.state == UP]
