"""Which snapshot and which WAL segments of a 0.3 replica restore a state, and is it 0.3 or LTX data that does? Pure decisions, no I/O.

There are two sets of rules, each that of the release whose data the replica is:

**A replica with 0.3 data only** is restored as 0.3.13 does it. Of the generations (all, or the one that was named) whose first and last file
enclose the time, the one with the newest file; without a time, the one with the newest file of all. In it the snapshot that was created last, at
or before the time; by index, the highest that is not above it. Then segments in order of index and offset, up to the first that is newer than
the time or has a higher index: they are not skipped one by one, because times can be out of order. The snapshot's own index is always replayed
from its beginning; lower ones are of no use.

At two kinds of times 0.3.13 finds nothing, and 0.5.17 the end of the generation before, the newest state that is not later; so do we. One is
between two generations. The other is in a generation, before its first snapshot: 0.3.13 replaces a snapshot by a later one of the same index,
and what was stored before that one stays.

**Beside LTX data** it is restored as 0.5.17 does it: the newest snapshot of all generations, and the segments of its generation.

A time includes the files of exactly that time (LTX files must be strictly older). Times count in nanoseconds.

Elsewhere two things differ from the releases: what is missing is named instead of skipped, and segments below the snapshot's index are not
looked at.

Source: specification of 0.3, sections 11 and 17; of 0.5, sections 2.5 and 2.7.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, takewhile
from typing import Literal

from replicator.errors import GenerationNotAvailable, MissingSegment, NoBackups, SnapshotNotAvailable, TimestampNotAvailable
from replicator.format.ltx import SNAPSHOT_LEVEL, FileInfo
from replicator.format.v3 import SegmentInfo, SnapshotInfo, V3Info, time_of

__all__ = ["Generation", "Step", "V3Plan", "choose_format", "plan_beside_ltx", "plan_generation", "plan_v3", "timeline"]


@dataclass(frozen=True, slots=True)
class Generation:
    """What is stored of a generation, at least one file. Snapshots by index, segments by index and offset."""

    name: str
    snapshots: tuple[SnapshotInfo, ...]
    segments: tuple[SegmentInfo, ...]

    @property
    def files(self) -> tuple[V3Info, ...]:
        return (*self.snapshots, *self.segments)

    @property
    def oldest_ns(self) -> int:
        return min(info.created_ns for info in self.files)

    @property
    def newest_ns(self) -> int:
        return max(info.created_ns for info in self.files)


@dataclass(frozen=True, slots=True)
class V3Plan:
    """A snapshot, and the segments to apply to it in order."""

    snapshot: SnapshotInfo
    segments: tuple[SegmentInfo, ...]

    @property
    def generation(self) -> str:
        return self.snapshot.generation

    @property
    def index(self) -> int:
        """The last WAL file that is applied; the snapshot's when there is none."""
        return self.segments[-1].index if self.segments else self.snapshot.index

    @property
    def files(self) -> tuple[V3Info, ...]:
        return (self.snapshot, *self.segments)

    @property
    def newest_ns(self) -> int:
        return max(info.created_ns for info in self.files)


def plan_v3(
    url: str,
    generations: Sequence[Generation],
    *,
    generation: str | None = None,
    index: int | None = None,
    timestamp_ns: int | None = None,
) -> V3Plan:
    """Plan by the rules of 0.3.13.

    Args:
        url: of the replica, for messages.
        generation: look at this one only.
        index: apply WAL files up to this one. One that is higher than all means all.
        timestamp_ns: restore the newest state that was stored at or before this time, which must not lie outside what is stored.

    Raises:
        NoBackups: nothing is stored.
        GenerationNotAvailable, TimestampNotAvailable, SnapshotNotAvailable: there is no such state.
        MissingSegment: part of a WAL file is not there.
    """
    if index is not None and timestamp_ns is not None:
        raise ValueError("index and timestamp exclude each other")
    if generation is not None:
        generations = [item for item in generations if item.name == generation]
    if not generations:
        raise NoBackups(url) if generation is None else GenerationNotAvailable(url, generation)
    return plan_generation(_generation_at(generations, timestamp_ns), index=index, timestamp_ns=timestamp_ns)


def _generation_at(generations: Sequence[Generation], timestamp_ns: int | None) -> Generation:
    if timestamp_ns is None:
        return max(generations, key=_newest_ns)
    around = [item for item in generations if item.oldest_ns <= timestamp_ns <= item.newest_ns]
    first, last = min(item.oldest_ns for item in generations), max(map(_newest_ns, generations))
    if not first <= timestamp_ns <= last:
        raise TimestampNotAvailable(time_of(timestamp_ns), oldest=time_of(first), newest=time_of(last))
    begun = [item for item in around if any(info.created_ns <= timestamp_ns for info in item.snapshots)]
    ended = [item for item in generations if item.newest_ns < timestamp_ns]
    # The last two have nothing to begin with, and are told so.
    return max(begun or [item for item in ended if item.snapshots] or around or ended, key=_newest_ns)


def _newest_ns(generation: Generation) -> int:
    return generation.newest_ns


def plan_generation(generation: Generation, *, index: int | None = None, timestamp_ns: int | None = None) -> V3Plan:
    """Plan inside one generation. Arguments and errors as those of `plan_v3`."""
    snapshots: Iterable[SnapshotInfo] = generation.snapshots
    if index is not None:
        fitting = [info for info in snapshots if info.index <= index]
        if not fitting:
            raise SnapshotNotAvailable(generation.name, f"none at or below index {index:08x}")
        snapshot = max(fitting, key=lambda info: info.index)
    else:
        fitting = [info for info in snapshots if timestamp_ns is None or info.created_ns <= timestamp_ns]
        if not fitting:
            when = "" if timestamp_ns is None else f" at or before {time_of(timestamp_ns).isoformat()}"
            raise SnapshotNotAvailable(generation.name, f"none is stored{when}")
        snapshot = max(fitting, key=lambda info: (info.created_ns, info.index))
    visible = takewhile(
        lambda info: (timestamp_ns is None or info.created_ns <= timestamp_ns) and (index is None or info.index <= index),
        generation.segments,
    )
    return V3Plan(snapshot, _joined(snapshot, visible))


def plan_beside_ltx(url: str, generations: Sequence[Generation], *, timestamp_ns: int | None = None) -> V3Plan:
    """Plan by the rules of 0.5.17: the newest snapshot decides. Raises as `plan_v3`."""
    snapshot = _newest_snapshot(generations, timestamp_ns)
    if snapshot is None:
        if timestamp_ns is None or not generations:
            raise NoBackups(url)
        raise SnapshotNotAvailable(generations[0].name, f"none is stored at or before {time_of(timestamp_ns).isoformat()}")
    segments = next(item.segments for item in generations if item.name == snapshot.generation)
    visible = takewhile(
        lambda info: timestamp_ns is None or info.created_ns <= timestamp_ns, (info for info in segments if info.index >= snapshot.index)
    )
    return V3Plan(snapshot, _joined(snapshot, visible))


def choose_format(
    generations: Sequence[Generation], files: Mapping[int, Sequence[FileInfo]], *, timestamp_ns: int | None = None
) -> Literal["0.3", "ltx"]:
    """Say which data of a replica restore the newest state, or that of a time.

    Without a time the newer file wins, LTX when they are equal. With one, the newer of the two snapshots that a plan would begin with: a file of
    level 9 strictly before it, and a 0.3 snapshot at or before it.
    """
    ltx = [info.created_at for level in files.values() for info in level]
    if not generations or not ltx:
        return "0.3" if generations else "ltx"
    if timestamp_ns is None:
        return "0.3" if time_of(max(item.newest_ns for item in generations)) > max(ltx) else "ltx"
    snapshot = _newest_snapshot(generations, timestamp_ns)
    before = [info.created_at for info in files.get(SNAPSHOT_LEVEL, ()) if info.created_at < time_of(timestamp_ns + 999)]
    return "0.3" if snapshot is not None and (not before or snapshot.created_at > before[-1]) else "ltx"


@dataclass(frozen=True, slots=True)
class Step:
    """How what is restored changes at a time: it begins anew with a snapshot, or goes on with segments."""

    time_ns: int
    snapshot: SnapshotInfo | None
    segments: tuple[SegmentInfo, ...]

    @property
    def files(self) -> tuple[V3Info, ...]:
        return self.segments if self.snapshot is None else (self.snapshot, *self.segments)


def timeline(generations: Sequence[Generation]) -> list[Step]:
    """Return the steps through all states that `plan_v3` restores by time, oldest first.

    Carried out up to the last one whose time is not after T, they give what the plan for T gives, for every T that it restores.

    Raises:
        MissingSegment: part of a WAL file is not there.
    """
    tracks = [_Track(item) for item in generations if item.snapshots]
    steps: list[Step] = []
    ends: dict[SnapshotInfo, tuple[tuple[SegmentInfo, ...], int]] = {}
    before: tuple[_Track, SnapshotInfo, int] | None = None
    for time_ns in sorted({info.created_ns for track in tracks for info in track.generation.files}):
        begun = [track for track in tracks if track.begun_ns <= time_ns <= track.newest_ns]
        if not begun:
            continue
        track = max(begun, key=lambda item: item.newest_ns)
        snapshot, visible = track.at(time_ns)
        if (track, snapshot, visible) == before:
            continue
        segments = track.generation.segments
        if before is not None and before[:2] == (track, snapshot):
            more = tuple(info for info in segments[before[2] : visible] if info.index >= snapshot.index)
            steps += [Step(time_ns, None, more)] if more else []
        else:
            steps.append(Step(time_ns, snapshot, tuple(info for info in segments[:visible] if info.index >= snapshot.index)))
        before = track, snapshot, visible
        ends[snapshot] = segments, visible
    for snapshot, (segments, visible) in ends.items():
        _joined(snapshot, segments[:visible])
    return steps


class _Track:
    """A generation with a snapshot, as time goes on. A segment counts once all before it are there: plans stop at the first that is too new."""

    def __init__(self, generation: Generation) -> None:
        self.generation = generation
        self.newest_ns = generation.newest_ns
        self._visible_ns = [*accumulate((info.created_ns for info in generation.segments), max)]
        self._snapshots = sorted(generation.snapshots, key=lambda info: (info.created_ns, info.index))
        self._snapshots_ns = [info.created_ns for info in self._snapshots]
        self.begun_ns = self._snapshots_ns[0]

    def at(self, time_ns: int) -> tuple[SnapshotInfo, int]:
        """Return the snapshot that a plan begins with, and how many segments it sees. Not before `begun_ns`."""
        return self._snapshots[bisect_right(self._snapshots_ns, time_ns) - 1], bisect_right(self._visible_ns, time_ns)


def _newest_snapshot(generations: Sequence[Generation], timestamp_ns: int | None) -> SnapshotInfo | None:
    snapshots = (info for item in generations for info in item.snapshots if timestamp_ns is None or info.created_ns <= timestamp_ns)
    return max(snapshots, key=lambda info: (info.created_ns, info.index), default=None)


def _joined(snapshot: SnapshotInfo, visible: Iterable[SegmentInfo]) -> tuple[SegmentInfo, ...]:
    """Return the segments from the snapshot's index on; each index must be there, and begin at its beginning."""
    segments = tuple(info for info in visible if info.index >= snapshot.index)
    expected = snapshot.index
    for at, info in enumerate(segments):
        if at and info.index == segments[at - 1].index:
            continue
        if info.index > expected:
            raise MissingSegment(SegmentInfo(info.generation, expected, 0, 0, 0).name, f"WAL files up to index {info.index:08x} are stored")
        if info.offset:
            raise MissingSegment(SegmentInfo(info.generation, expected, 0, 0, 0).name, "the beginning of the WAL file")
        expected = info.index + 1
    return segments
