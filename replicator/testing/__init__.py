"""Tools for testing the engine, and programs that rely on it. Nothing of the engine imports them.

| for | use |
|---|---|
| a storage client of your own | `check_replica_client` |
| an application that uses `Replicator` | `CrashRecoveryMachine` |
| what happens when the store misbehaves | `FaultyClient`, and on the wire `HostileS3` |
| what a power cut leaves on the disk | `PowerCut` |
| each step fails in turn: files, SQLite, network, threads, processes, clock | `each_failure`, `FailNth` |
| time | `ManualClock` |
| data | `schemas`, `transactions`, `ltx_files`, `wal_files` |

`docs/testing.md` is the tutorial. Under pytest, `pytest_plugins = ["replicator.testing.plugin"]` in the top `conftest.py` gives `--replicator-seed` and
`--replicator-steps`. What is imported is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from replicator.testing.clocks import ManualClock
    from replicator.testing.conformance import CHECKS, Nonconforming, check_replica_client
    from replicator.testing.failing import FailNth, How, Kind, each_failure
    from replicator.testing.faults import Fault, FaultyClient
    from replicator.testing.hostile import HostileS3, Trouble
    from replicator.testing.machine import CrashRecoveryMachine
    from replicator.testing.powercut import PowerCut, PowerLost
    from replicator.testing.strategies import ltx_files, schemas, transactions, wal_files

__all__ = [
    "CHECKS",
    "CrashRecoveryMachine",
    "FailNth",
    "Fault",
    "FaultyClient",
    "HostileS3",
    "How",
    "Kind",
    "ManualClock",
    "Nonconforming",
    "PowerCut",
    "PowerLost",
    "Trouble",
    "check_replica_client",
    "each_failure",
    "ltx_files",
    "schemas",
    "transactions",
    "wal_files",
]

_HOMES = {
    "CHECKS": "conformance",
    "CrashRecoveryMachine": "machine",
    "FailNth": "failing",
    "Fault": "faults",
    "FaultyClient": "faults",
    "HostileS3": "hostile",
    "How": "failing",
    "Kind": "failing",
    "ManualClock": "clocks",
    "Nonconforming": "conformance",
    "PowerCut": "powercut",
    "PowerLost": "powercut",
    "Trouble": "hostile",
    "check_replica_client": "conformance",
    "each_failure": "failing",
    "ltx_files": "strategies",
    "schemas": "strategies",
    "transactions": "strategies",
    "wal_files": "strategies",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
