"""`restore`: a database from any of several replicas, of either format.

Apart from `api.py`, so that a restore does not load the engine: half of the time that a small one takes is imports.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from replicator.chain import Progress
from replicator.errors import ConfigError
from replicator.format.ltx import TXID, parse_txid
from replicator.format.v3 import parse_index
from replicator.publish import IntegrityCheck
from replicator.restorer import RestoreResult, first_answer
from replicator.storage import open_client
from replicator.storage.base import ReplicaClient
from replicator.v3restore import newest_first, restore_any

__all__ = ["parse_timestamp", "restore"]


def restore(
    url: str | ReplicaClient | Sequence[str | ReplicaClient],
    output: str | os.PathLike[str],
    *,
    txid: int | str | None = None,
    timestamp: datetime | str | None = None,
    generation: str | None = None,
    index: int | str | None = None,
    force: bool = False,
    integrity_check: IntegrityCheck = "none",
    parallelism: int = 8,
    progress: Callable[[Progress], None] | None = None,
) -> RestoreResult:
    """Restore a database from a replica, of Litestream's LTX format or of 0.3's.

    Args:
        url: of the replica, or a client; or several, of which the one is used that leads furthest (or has the TXID), the others where it fails.
        output: path of the database to write.
        txid: restore this state (a number, or 16 hex digits).
        timestamp: restore the last state before this time (aware, or RFC 3339). 0.3 data: at this time.
        generation: restore from this generation of the 0.3 format.
        index: restore the 0.3 format's WAL files up to this one (a number, or hex digits).
        force: replace an existing output.
        integrity_check: "quick" or "full": let SQLite check the file before it is published.
        parallelism: files that are read at once.
        progress: called now and then.

    Raises:
        RestoreError, StorageError, ConfigError: nothing is left at the output then. Of several replicas it is the first error that is not "nothing is stored".
    """
    if txid is not None and timestamp is not None:
        raise ConfigError("cannot specify txid and timestamp to restore")
    if index is not None and timestamp is not None:
        raise ConfigError("cannot specify index and timestamp to restore")
    if txid is not None and (index is not None or generation is not None):
        raise ConfigError("cannot specify txid together with a generation or an index")
    if isinstance(txid, str):
        txid = parse_txid(txid)
    if isinstance(index, str):
        index = parse_index(index)
    if isinstance(timestamp, datetime) and timestamp.tzinfo is None:
        raise ConfigError("timestamp has no time zone", hint="give an aware datetime, or RFC 3339 text with Z or an offset")
    timestamp_ns = None
    if timestamp is not None:
        timestamp_ns = parse_timestamp(timestamp) if isinstance(timestamp, str) else _nanoseconds(timestamp)
    replicas = [url] if isinstance(url, str) or not isinstance(url, Sequence) else list(url)
    with contextlib.ExitStack() as stack:
        clients: list[ReplicaClient] = []
        for replica in replicas:
            if isinstance(replica, str):
                replica = open_client(replica)
                stack.callback(replica.close)
            clients.append(replica)

        def from_one(client: ReplicaClient) -> RestoreResult:
            return restore_any(
                client,
                Path(os.path.abspath(output)),
                txid=None if txid is None else TXID(txid),
                timestamp_ns=timestamp_ns,
                generation=generation,
                index=index,
                force=force,
                integrity_check=integrity_check,
                parallelism=parallelism,
                progress=progress,
            )

        chosen = txid is not None or generation is not None or index is not None
        return first_answer(clients if chosen else newest_first(clients, timestamp_ns=timestamp_ns), from_one)


def parse_timestamp(text: str) -> int:
    """Read RFC 3339, and return nanoseconds since 1970. Raises `ConfigError`."""
    found = re.fullmatch(r"(.*:\d\d)\.(\d+)(.*)", text, re.DOTALL)  # more digits than datetime has
    try:
        when = datetime.fromisoformat(found[1] + found[3] if found else text)
    except ValueError:
        when = None
    if when is None or when.tzinfo is None:
        raise ConfigError("invalid -timestamp, must specify in ISO 8601 format (e.g. 2000-01-01T00:00:00Z)")
    return _nanoseconds(when) + (int(found[2][:9].ljust(9, "0")) if found else 0)


def _nanoseconds(when: datetime) -> int:
    return (when - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1) * 1000
