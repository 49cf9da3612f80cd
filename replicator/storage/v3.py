"""The 0.3 replica at a path: generations, snapshots and WAL segments, on any client that stores plain objects.

What is stored is one LZ4 frame each (`format.v3`); this module neither compresses nor decompresses. An encrypted replica is the same with an
`AgeClient` as the store: LZ4 inside, age outside, and no name says so.

Names that are not exactly those of the format are passed over, as 0.3.13 does. Listings are in ascending order.

Source: specification of 0.3, sections 2, 12 and 16.
"""

from __future__ import annotations

from collections.abc import Iterable

from replicator.format.v3 import (
    GENERATIONS,
    SegmentInfo,
    SnapshotInfo,
    V3Info,
    generation_folder,
    is_generation,
    parse_segment_name,
    parse_snapshot_name,
    segments_folder,
    snapshots_folder,
)
from replicator.storage.base import Body, ObjectStore, ReadStream, ReplicaClient

__all__ = ["V3Client", "v3_client"]


class V3Client:
    """The 0.3 side of a replica. It owns nothing: closing the store is for whoever opened it."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    @property
    def kind(self) -> str:
        return self._store.kind

    @property
    def url(self) -> str:
        return self._store.url

    @property
    def can_read(self) -> bool:
        return self._store.can_read

    def __repr__(self) -> str:
        return f"V3Client({self._store!r})"

    def list_generations(self) -> list[str]:
        """Return the generations, by name: the order says nothing, names are random.

        Some may be empty: what is left of a deleted one, which some stores list for a while.
        """
        return sorted(name for name in self._store.list_folders(GENERATIONS) if is_generation(name))

    def list_snapshots(self, generation: str) -> list[SnapshotInfo]:
        """Return a generation's snapshots by index. A generation that is not there has none."""
        found = [
            SnapshotInfo(generation, index, stored.size, stored.created_ns)
            for stored in self._store.list_objects(snapshots_folder(generation))
            if (index := parse_snapshot_name(stored.name)) is not None
        ]
        return sorted(found, key=lambda info: info.index)

    def list_segments(self, generation: str) -> list[SegmentInfo]:
        """Return a generation's WAL segments by index and offset. A generation that is not there has none."""
        found = [
            SegmentInfo(generation, *place, stored.size, stored.created_ns)
            for stored in self._store.list_objects(segments_folder(generation))
            if (place := parse_segment_name(stored.name)) is not None
        ]
        return sorted(found, key=lambda info: (info.index, info.offset))

    def open(self, info: V3Info, *, offset: int = 0) -> ReadStream:
        """Open a snapshot or a segment: one LZ4 frame, decrypted, or what follows `offset` in it.

        Raises:
            ObjectNotFound: now, not at the first read.
        """
        return self._store.open_object(info.name, offset=offset)

    def put_snapshot(self, generation: str, index: int, body: Body, *, if_absent: bool = False) -> SnapshotInfo:
        """Store a snapshot: `body` is one LZ4 frame. One of the same index is replaced, as 0.3.13 does.

        Raises:
            PreconditionFailed: `if_absent` and it exists.
            StorageUnavailable: the outcome is unknown.
        """
        stored = self._store.put_object(SnapshotInfo(generation, index, 0, 0).name, body, if_absent=if_absent)
        return SnapshotInfo(generation, index, stored.size, stored.created_ns)

    def put_segment(self, generation: str, index: int, offset: int, body: Body, *, if_absent: bool = False) -> SegmentInfo:
        """Store the LZ4 frame of a WAL's bytes from `offset` on. Otherwise as `put_snapshot`."""
        stored = self._store.put_object(SegmentInfo(generation, index, offset, 0, 0).name, body, if_absent=if_absent)
        return SegmentInfo(generation, index, offset, stored.size, stored.created_ns)

    def delete(self, infos: Iterable[V3Info]) -> None:
        """Delete snapshots and segments. Missing ones are no error."""
        self._store.delete_objects([info.name for info in infos])

    def delete_generation(self, generation: str) -> None:
        """Delete a generation with all that is in it. A missing one is no error."""
        self._store.delete_folder(generation_folder(generation))


def v3_client(client: ReplicaClient) -> V3Client | None:
    """Return the 0.3 side of a client; None when its backend has none."""
    return V3Client(client) if isinstance(client, ObjectStore) else None
