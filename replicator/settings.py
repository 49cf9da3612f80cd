"""What a configuration says about one database and its replicas: frozen values, made by `config.py`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from replicator.formats import Format
from replicator.levels import History
from replicator.storage.locations import StoreSettings
from replicator.storage.url import S3Settings

__all__ = ["DatabaseSettings", "LeaseSettings", "ReplicaSettings"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaSettings:
    """One replica. `url` says where it is, without secrets; `storage.open_replica` makes the client.

    Attributes:
        directory: the root, for kind "file".
        s3: bucket, path and how to talk to the store, for kind "s3".
        store: the same for all other kinds.
        sse_customer_key_path: a file whose text becomes `s3.sse_customer_key` when the client is made.
        sync_interval_s: least time between two uploads that nobody waits for; None for the engine's default.
        history: levels, snapshots and retention, the replica's own settings included.
        given_name: the key `name`; see the property.
        age_identities, age_recipients: not empty: what is stored there must be encrypted, or nothing may be stored.
    """

    kind: Literal["file", "s3", "gs", "abs", "oss", "sftp", "webdav", "nats"]
    url: str
    directory: Path | None = None
    s3: S3Settings | None = None
    store: StoreSettings | None = None
    sse_customer_key_path: Path | None = None
    sync_interval_s: float | None = None
    history: History = field(default_factory=History)
    age_identities: tuple[str, ...] = field(default=(), repr=False)
    age_recipients: tuple[str, ...] = field(default=(), repr=False)
    given_name: str = ""

    @property
    def name(self) -> str:
        """What `-replica` calls it."""
        return self.given_name or self.kind


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseSettings:
    """A lease: of one database, in its first replica, or one for all that stands in a place of its own, `home`.

    `takeover`: wait for it, and go on from another owner's state.
    """

    home: ReplicaSettings | None = None
    ttl_s: float = 30.0
    owner: str = ""
    takeover: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class DatabaseSettings:
    """One database. `None` stands for the engine's default; a `checkpoint_interval_s` of 0 switches checkpoints by age off.

    `format`: in which all its replicas are written. `sync`: "commit" uploads commits at once, whatever `sync_interval_s` of a replica says.
    `lease`: None for none.
    """

    path: Path
    replicas: tuple[ReplicaSettings, ...]
    meta_path: Path | None = None
    monitor_interval_s: float | None = None
    checkpoint_interval_s: float | None = None
    busy_timeout_s: float | None = None
    min_checkpoint_pages: int | None = None
    verify_interval_s: float | None = None
    restore_if_db_not_exists: bool = False
    format: Format = "ltx"
    sync: Literal["interval", "commit"] = "interval"
    lease: LeaseSettings | None = None
