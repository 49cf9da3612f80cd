"""How long commits were on this machine alone: the loss window of a replica, in constant memory.

One measure is taken for each TXID that a replica takes, when it holds it. It begins at the earliest moment at which the first commit in that
TXID can have been made, so that it is an upper bound and never flatters:

* while the WAL is looked at again and again: the begin of the last look that had read everything;
* after a rest, which a file event ended: the time of that event, or that of the WAL's last write when that is earlier.

What was committed before this process began counts from its start. Quantiles are those of the last measures; the histogram holds all.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import deque
from dataclasses import dataclass

__all__ = ["BOUNDS_S", "LossWindow", "Windows"]

BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 3600.0)
"""Upper bounds of the histogram."""

RECENT = 1024


@dataclass(frozen=True, slots=True)
class LossWindow:
    """Seconds from the commit, at the earliest, until the replica holds it.

    Attributes:
        p50_s, p99_s, max_s: of the last `count` TXIDs (1024 at most).
        total, total_s: of all since the start, how many and their sum.
        slots: of all, by the bound in `BOUNDS_S` that they do not exceed; the last one has no bound. Empty when there are none.
    """

    p50_s: float = 0.0
    p99_s: float = 0.0
    max_s: float = 0.0
    count: int = 0
    total: int = 0
    total_s: float = 0.0
    slots: tuple[int, ...] = ()


class Windows:
    """The measures of one replica. Used by one thread at a time."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=RECENT)
        self._slots = [0] * (len(BOUNDS_S) + 1)
        self._total, self._total_s = 0, 0.0

    def add(self, seconds: float) -> None:
        self._recent.append(seconds)
        self._slots[bisect_left(BOUNDS_S, seconds)] += 1
        self._total += 1
        self._total_s += seconds

    def value(self) -> LossWindow:
        """Return what was measured so far."""
        if not self._recent:
            return LossWindow()
        ordered = sorted(self._recent)
        last = len(ordered) - 1
        p50_s, p99_s = ordered[last // 2], ordered[math.ceil(last * 0.99)]
        return LossWindow(p50_s, p99_s, ordered[-1], len(ordered), self._total, self._total_s, tuple(self._slots))
