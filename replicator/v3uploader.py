"""The thread that keeps one replica of format 0.3 up to date. What it lacks is copied from another replica, or a generation begins."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from replicator.errors import CorruptReplica, FormatError, ReplicatorError
from replicator.filling import SourceFailed
from replicator.format.ltx import SNAPSHOT_LEVEL
from replicator.format.v3 import SegmentInfo, SnapshotInfo, V3Info
from replicator.outbox import Entry, Staging
from replicator.replica import Replica
from replicator.uploader import Uploader
from replicator.v3chain import content_of
from replicator.v3engine import V3Engine
from replicator.v3outbox import V3File, encode_v3
from replicator.v3replica import V3Replica

__all__ = ["V3Uploader", "copy_generation"]

ASK_TIMEOUT_S = 60.0

log = logging.getLogger(__name__)


class V3Uploader(Uploader):
    """As `Uploader`, for a `V3Replica` and a `V3Engine`."""

    _asked_at = -1

    def _work(self) -> Callable[[], None] | None:
        board, replica = self._board, self._replica
        if board.state == "starting":
            return None
        if not replica.online:
            return lambda: self._engine.join_later(replica)
        if (entry := board.next_for(replica)) is not None:
            return lambda: self._store(entry)
        if (source := board.ahead_of(replica)) is not None and not self._source_failed:
            return lambda: self._copy(source)
        if board.given_out > replica.txid and self._asked_at != board.given_out:
            return self._ask_for_generation
        return None

    def _store(self, entry: Entry) -> None:
        self._replica.store(entry.files, entry.txid)
        self._source_failed = False

    def _copy(self, source: Replica) -> None:
        assert isinstance(source, V3Replica)
        assert isinstance(self._replica, V3Replica)
        try:
            copy_generation(source, self._replica, self._engine.scratch)
        except SourceFailed:
            self._source_failed = True
            raise

    def _ask_for_generation(self) -> None:
        """Nobody has what this replica lacks: what begins a generation needs nothing before it."""
        assert isinstance(self._engine, V3Engine)
        self._engine.begin_generation(f"{self._replica.url} lacks files")
        self._asked_at = self._board.given_out
        # The engine goes on when somebody has its first entry, which may be this thread, where nothing more can be staged.
        self._board.ask(
            time.monotonic() + ASK_TIMEOUT_S,
            lambda: self._board.error or "the engine is busy",
            enough=lambda: self._board.next_for(self._replica) is not None,
        )


def copy_generation(source: V3Replica, target: V3Replica, scratch: Staging) -> None:
    """Bring a replica to where another one is: its newest snapshot, and all segments from that index on. What is there already is left.

    The segments of the snapshot's own index come before it: without them it would be taken for more than it is.

    Raises:
        SourceFailed: the source cannot be read, or what it holds is damaged.
        StorageError, Fenced: the target cannot take a file.
    """
    txid, end, infos = source.state()
    if end is None:
        raise SourceFailed(f"nothing is stored yet: {source.url}")
    snapshots = sorted((info for info in infos if isinstance(info, SnapshotInfo)), key=lambda info: info.index)
    if not snapshots:
        raise SourceFailed(f"no snapshot of generation {end.generation}: {source.url}")
    base = snapshots[-1]
    segments = sorted(
        (info for info in infos if isinstance(info, SegmentInfo) and info.index >= base.index), key=lambda info: info.position
    )
    segments = [info for info in segments if info.position < end]
    own = [info for info in segments if info.index == base.index]
    ordered: Sequence[V3Info] = [*own, base, *segments[len(own) :]]
    theirs = {info.name: info.size for info in target.stored().get(end.generation, ())}
    _check_agreement(source, target, segments, theirs, base)
    for info in ordered:
        if info.name not in theirs:
            _copy_object(source, target, info, scratch, txid)
    target.follow(end, txid)


def _check_agreement(
    source: V3Replica, target: V3Replica, segments: Sequence[SegmentInfo], theirs: dict[str, int], base: SnapshotInfo
) -> None:
    """Make sure that what the target has of this is the same, cut at the same places. (The size tells: a frame more is not smaller.)"""
    ours: dict[str, int] = {base.name: base.size, **{info.name: info.size for info in segments}}
    for info in target.stored().get(base.generation, ()):
        is_later = info.index >= base.index and (isinstance(info, SegmentInfo) or info.name == base.name)
        if is_later and ours.get(info.name) != theirs[info.name]:
            raise SourceFailed(f"{target.url} has another {info.name} than {source.url}")


def _copy_object(source: V3Replica, target: V3Replica, info: V3Info, scratch: Staging, txid: int) -> None:
    is_snapshot = isinstance(info, SnapshotInfo)
    offset = 0 if isinstance(info, SnapshotInfo) else info.offset
    blank = V3File(SNAPSHOT_LEVEL if is_snapshot else 0, source.txid, source.txid, 0, b"", info.generation, info.index, offset, 0)
    try:
        with source.v3.open(info) as stream:
            out = encode_v3(scratch, blank, content_of(stream), unique=True)
    except FormatError as error:
        raise SourceFailed(str(CorruptReplica(f"{source.url} {info.name}", str(error)))) from error
    except ReplicatorError as error:
        raise SourceFailed(f"cannot copy from {source.url}: {error}") from error
    try:
        target.put_copy(out)
    finally:
        out.discard()
