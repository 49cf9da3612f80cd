"""The two formats in which a database can be replicated, and which classes write them. The classes are loaded when they are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from replicator.errors import ConfigError

if TYPE_CHECKING:
    from replicator.engine import Engine
    from replicator.keeper import Keeper
    from replicator.lease import Lease
    from replicator.replica import Replica
    from replicator.storage.base import ReplicaClient
    from replicator.uploader import Uploader

__all__ = ["Format", "Writing", "writing"]

Format = Literal["ltx", "v0.3"]


@dataclass(frozen=True, slots=True)
class Writing:
    """What writes a format."""

    engine: type[Engine]
    uploader: type[Uploader]
    keeper: type[Keeper]
    replicas: Sequence[Replica]


def writing(
    format: str, clients: Sequence[ReplicaClient], *, writer: int, lease: Lease | None = None, l0_retention_s: float = 0.0
) -> Writing:
    """Return what writes a format to these stores. Raises `ConfigError` for one that nobody knows, that knows no leases, or that a store has no
    place for. `l0_retention_s`: for how long raw files are kept; 0 for ever."""
    if format == "ltx":
        from replicator.engine import Engine
        from replicator.keeper import Keeper
        from replicator.replica import REREAD_S, Replica
        from replicator.uploader import Uploader

        reread_s = min(REREAD_S, l0_retention_s / 2 or REREAD_S)
        return Writing(Engine, Uploader, Keeper, [Replica(client, writer=writer, lease=lease, reread_s=reread_s) for client in clients])
    if lease is not None:
        raise ConfigError(f"format {format} has no place for the claim of a new owner: a lease goes with ltx")
    if format != "v0.3":
        raise ConfigError(f"unknown format: {format!r}", hint=f"the formats are {' and '.join(get_args(Format))}")
    from replicator.v3engine import V3Engine
    from replicator.v3keeper import V3Keeper
    from replicator.v3replica import V3Replica
    from replicator.v3uploader import V3Uploader

    replicas = [V3Replica(client, writer=writer, alone=len(clients) == 1) for client in clients]
    return Writing(V3Engine, V3Uploader, V3Keeper, replicas)
