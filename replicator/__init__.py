"""Replicate live SQLite databases to a directory or to S3, in Litestream's format, and restore them.

    from replicator import Replicator, restore

    with Replicator("app.db", "s3://bucket/app") as replicator:
        ...
        replicator.wait()

    restore("s3://bucket/app", "copy.db")

What is imported is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from replicator.api import ReplicaStatus, Replicator, Status
    from replicator.errors import ReplicatorError
    from replicator.format.ltx import TXID
    from replicator.lease import Lease, LeaseStatus, LeaseTerms
    from replicator.recover import restore
    from replicator.restorer import RestoreResult
    from replicator.storage import open_client

__all__ = [
    "TXID",
    "Lease",
    "LeaseStatus",
    "LeaseTerms",
    "ReplicaStatus",
    "Replicator",
    "ReplicatorError",
    "RestoreResult",
    "Status",
    "__version__",
    "open_client",
    "restore",
]

_HOMES = {
    "TXID": "replicator.format.ltx",
    "Lease": "replicator.lease",
    "LeaseStatus": "replicator.lease",
    "LeaseTerms": "replicator.lease",
    "ReplicaStatus": "replicator.api",
    "Replicator": "replicator.api",
    "ReplicatorError": "replicator.errors",
    "RestoreResult": "replicator.restorer",
    "Status": "replicator.api",
    "open_client": "replicator.storage",
    "restore": "replicator.recover",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
