"""Which moments can a replica restore, at what cost, and where is its history broken? A pure decision, no I/O.

A *moment* is a TXID that `plan_restore(files, txid=...)` can reach: always the end of a stored file, seldom the end of every stored file.
One plan for each would cost (files x moments). All of them together cost one sort, because a plan for TXID t looks only at files that
end at or before t, and of those takes the one that reaches furthest. So take the files in the order of their ends, and keep one path:

* `path` is the plan for the largest end seen so far: the base, then each file with the state it leads to. States ascend.
* A file that ends at the next TXID reaches further than all before it. The plan therefore follows the old path up to the first state
  from which the new file can be applied (`min - 1` or later), and then takes it: everything after that state goes. When the
  path's last state is too early, the new file lies behind a gap, the path stays, and the TXID is no moment.
* Of several files with one end the plan takes the smallest min TXID, then the highest level: the others never matter.
* A snapshot that becomes the base at its own TXID is a new path of one step; nothing that ended earlier is used after it.

Each file enters the path once and leaves it once. That this equals `plan_restore` at every TXID is a property test
(tests/property/test_history_property.py).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from statistics import median
from typing import NamedTuple

from replicator.errors import NonContiguous
from replicator.format.ltx import SNAPSHOT_LEVEL, TXID, FileInfo
from replicator.plan import Files, plan_restore

__all__ = ["Age", "Gap", "LevelTotal", "Moment", "Problem", "Timeline", "ages", "describe", "restorable_moments"]

AGE_BOUNDS_S = (300.0, 3600.0, 86400.0, 7 * 86400.0, 30 * 86400.0)
"""The first is how long raw files are kept by default, the others are what people ask for."""

FUTURE_GRACE = timedelta(seconds=1)
"""Clocks of two hosts differ by milliseconds; that is no finding."""


@dataclass(frozen=True, slots=True)
class Moment:
    """A TXID that can be restored. `files` and `bytes` are what that reads; `time` and `level` are those of the last of them."""

    txid: TXID
    time: datetime
    files: int
    bytes: int
    level: int


@dataclass(frozen=True, slots=True)
class Gap:
    """Stored files that no plan reaches, because what leads to them is missing.

    Attributes:
        after: the newest moment before them; 0 when there is none.
        before: where the first of them begins.
        resumes: the first moment after them, from a snapshot or a longer file; None when the history ends in the gap.
        files: how many lie in it.
    """

    after: TXID
    before: TXID
    resumes: TXID | None
    files: int


@dataclass(frozen=True, slots=True)
class Problem:
    """Something a healthy writer does not leave behind, once for each kind and level.

    Attributes:
        kind: `overlap`, `hole` (between files of one level), `start` (a level begins where nothing leads to), `not-full` (a snapshot that
            does not begin at TXID 1), `future`, `clock` (times run backwards while TXIDs ascend).
        count: how often it was found on the level.
        first: the first file it was found at.
    """

    kind: str
    level: int
    count: int
    first: FileInfo

    @property
    def text(self) -> str:
        """One line for people."""
        times = "" if self.count == 1 else f" (and {self.count - 1} more)"
        return f"level {self.level}: {_TEXTS[self.kind]}: {self.first.name}{times}"


_TEXTS = {
    "overlap": "a file overlaps the one before it",
    "hole": "TXIDs are missing before a file",
    "start": "nothing leads to the first file",
    "not-full": "a snapshot that is not a full image cannot be restored",
    "future": "a file's time lies in the future",
    "clock": "the clock ran backwards before a file, so that -timestamp may end there; -txid does not",
}


@dataclass(frozen=True, slots=True)
class LevelTotal:
    """What is stored on one level. `stranded` files end at no moment."""

    level: int
    files: int
    bytes: int
    min_txid: TXID
    max_txid: TXID
    oldest: datetime
    newest: datetime
    stranded: int


@dataclass(frozen=True, slots=True)
class Timeline:
    """All that a listing says about a replica's past. Moments and gaps ascend. `broken` says why the newest state cannot be restored."""

    moments: tuple[Moment, ...]
    gaps: tuple[Gap, ...]
    problems: tuple[Problem, ...]
    levels: tuple[LevelTotal, ...]
    broken: NonContiguous | None


@dataclass(frozen=True, slots=True)
class Age:
    """The moments whose age, counted back from the newest one, lies in a range. `to_s` is None in the oldest.

    Attributes:
        every_s: median time between one moment and the next; None for a single one.
        skipped: TXIDs between them that cannot be restored by themselves (compacted away, or lost).
    """

    from_s: float
    to_s: float | None
    moments: int
    every_s: float | None
    skipped: int
    min_files: int
    max_files: int
    min_bytes: int
    max_bytes: int


def describe(files: Files, *, now: datetime) -> Timeline:
    """Return the timeline of what is stored; each level in ascending order, at least one file."""
    moments, gaps = restorable_moments(files)
    try:
        plan_restore(files)
        broken = None
    except NonContiguous as error:
        broken = error
    reachable = {moment.txid for moment in moments}
    levels = tuple(_total(level, infos, reachable) for level, infos in sorted(files.items()) if infos)
    return Timeline(tuple(moments), tuple(gaps), tuple(_problems(files, gaps, now)), levels, broken)


class _Step(NamedTuple):
    """The path up to one of its files, which leads to the state `reach`."""

    reach: TXID
    files: int
    bytes: int


def restorable_moments(files: Files) -> tuple[list[Moment], list[Gap]]:
    """Return every TXID that `plan_restore(files, txid=...)` reaches, with that plan's cost, and what lies behind gaps. Both ascend."""
    ends: dict[TXID, list[FileInfo]] = {}
    for infos in files.values():
        for info in infos:
            ends.setdefault(info.max_txid, []).append(info)
    moments: list[Moment] = []
    gaps: list[Gap] = []
    base: FileInfo | None = None
    path = [_Step(TXID(0), 0, 0)]
    for txid in sorted(ends):
        last: FileInfo | None = None
        steps = [info for info in ends[txid] if info.level != SNAPSHOT_LEVEL]
        if steps:
            best = min(steps, key=lambda info: (info.min_txid, -info.level))
            if best.min_txid <= path[-1].reach + 1:
                while len(path) > 1 and best.min_txid <= path[-2].reach + 1:
                    path.pop()
                path.append(_Step(txid, path[-1].files + 1, path[-1].bytes + best.size))
                last = best
        # Of the snapshots the last listed one is the base, and a listing is in the order of (min, max).
        for info in sorted(info for info in ends[txid] if info.level == SNAPSHOT_LEVEL):
            if base is None or info > base:
                base = last = info
                path = [_Step(txid, 1, info.size)]
        if last is not None:
            moments.append(Moment(txid, last.created_at, path[-1].files, path[-1].bytes, last.level))
            if gaps and gaps[-1].resumes is None:
                gaps[-1] = Gap(gaps[-1].after, gaps[-1].before, txid, gaps[-1].files)
        elif steps:
            before, count = best.min_txid, len(steps)
            if gaps and gaps[-1].resumes is None:
                before, count = min(before, gaps[-1].before), count + gaps.pop().files
            gaps.append(Gap(path[-1].reach, before, None, count))
    return moments, gaps


def ages(moments: Sequence[Moment]) -> list[Age]:
    """Return how finely the past is kept, newest first; ages without a moment are left out."""
    found = []
    bounds = [0.0, *AGE_BOUNDS_S, float("inf")]
    groups: list[list[int]] = [[] for _ in bounds[1:]]
    for index, moment in enumerate(moments):
        age_s = (moments[-1].time - moment.time).total_seconds()
        groups[bisect_left(AGE_BOUNDS_S, age_s)].append(index)
    for low, high, group in zip(bounds, bounds[1:], groups, strict=False):
        if not group:
            continue
        pairs = [(moments[index - 1], moments[index]) for index in group if index]
        steps_s = [max(0.0, (right.time - left.time).total_seconds()) for left, right in pairs]
        costs = [(moments[index].files, moments[index].bytes) for index in group]
        found.append(
            Age(
                from_s=low,
                to_s=None if high == float("inf") else high,
                moments=len(group),
                every_s=median(steps_s) if steps_s else None,
                skipped=sum(right.txid - left.txid - 1 for left, right in pairs),
                min_files=min(files for files, _ in costs),
                max_files=max(files for files, _ in costs),
                min_bytes=min(size for _, size in costs),
                max_bytes=max(size for _, size in costs),
            )
        )
    return found


def _total(level: int, infos: Sequence[FileInfo], reachable: set[TXID]) -> LevelTotal:
    return LevelTotal(
        level=level,
        files=len(infos),
        bytes=sum(info.size for info in infos),
        min_txid=min(info.min_txid for info in infos),
        max_txid=max(info.max_txid for info in infos),
        oldest=min(info.created_at for info in infos),
        newest=max(info.created_at for info in infos),
        stranded=sum(info.max_txid not in reachable for info in infos),
    )


def _problems(files: Files, gaps: Sequence[Gap], now: datetime) -> list[Problem]:
    # Files of a gap that something bridges are what retention leaves: it cuts level 0 without asking where level 1 has its seams.
    dead_end = gaps[-1] if gaps and gaps[-1].resumes is None else None
    found = []
    for level, infos in sorted(files.items()):
        hits: dict[str, list[FileInfo]] = {kind: [] for kind in _TEXTS}
        reach = TXID(0)
        for before, info in zip([None, *infos], infos, strict=False):
            if level == SNAPSHOT_LEVEL:
                if info.min_txid != 1:
                    hits["not-full"].append(info)
            elif before is None:
                if dead_end and info.min_txid > dead_end.after + 1:
                    hits["start"].append(info)
            elif info.min_txid <= reach:
                hits["overlap"].append(info)
            elif info.min_txid > reach + 1:
                hits["hole"].append(info)
            if before is not None and info.created_at < before.created_at:
                hits["clock"].append(info)
            if info.created_at > now + FUTURE_GRACE:
                hits["future"].append(info)
            reach = max(reach, info.max_txid)
        found += [Problem(kind, level, len(at), at[0]) for kind, at in hits.items() if at]
    return found
