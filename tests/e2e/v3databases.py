"""Small helpers for tests that write format 0.3."""

from __future__ import annotations

import os
from pathlib import Path

from replicator.checkpoint import CheckpointPolicy
from replicator.errors import StorageUnavailable
from replicator.storage.base import ReplicaClient
from replicator.storage.file import FileClient
from replicator.storage.v3 import v3_client
from replicator.v3engine import V3Engine
from replicator.v3replica import V3Replica


class Away(FileClient):
    """A directory that is out of reach while `down` is true."""

    down = False

    def _reach(self) -> None:
        if self.down:
            raise StorageUnavailable(f"{self.url} is out of reach")

    def list_folders(self, folder):
        self._reach()
        return super().list_folders(folder)

    def list_objects(self, folder):
        self._reach()
        return super().list_objects(folder)

    def open_object(self, name, **options):
        self._reach()
        return super().open_object(name, **options)

    def put_object(self, name, body, *, if_absent=False):
        self._reach()
        return super().put_object(name, body, if_absent=if_absent)

    def get_control(self, name):
        self._reach()
        return super().get_control(name)

    def put_control(self, name, data, **options):
        self._reach()
        return super().put_control(name, data, **options)


def exported(client: ReplicaClient, folder: Path) -> str:
    """Copy what a store holds, decrypted, to a directory for the released binaries; returns its URL."""
    v3 = v3_client(client)
    assert v3 is not None
    for generation in v3.list_generations():
        for info in [*v3.list_snapshots(generation), *v3.list_segments(generation)]:
            path = folder / info.name
            path.parent.mkdir(parents=True, exist_ok=True)
            with v3.open(info) as stream:
                path.write_bytes(stream.read())
            os.utime(path, ns=(info.created_ns, info.created_ns))
    return f"file://{folder}"


def v3_engine_for(database: Path, *clients: ReplicaClient, meta_path: Path | None = None, writer: int = 7, **options) -> V3Engine:
    """Return an engine without threads that never checkpoints by itself."""
    return V3Engine(
        database,
        [V3Replica(client, writer=writer, alone=len(clients) == 1) for client in clients],
        meta_path=meta_path or database.with_name(f".{database.name}-litestream"),
        policy=CheckpointPolicy(10**9, 0),
        busy_timeout_s=1,
        staging_limit_bytes=1 << 30,
        **options,
    )
