"""When is a checkpoint due? A pure decision, no I/O.

The WAL is worth restarting when it holds enough pages that readers and the disk feel it, or when its frames have been lying there for a
while. A WAL without frames is never checkpointed, whatever the time: an idle database costs nothing.
After a failure (a long reader, another process checkpointing) the wait doubles, up to `MAX_BACKOFF_S`.
"""

from __future__ import annotations

from dataclasses import dataclass

from replicator.format.wal import WAL_HEADER_SIZE, frame_size

__all__ = ["MAX_BACKOFF_S", "CheckpointPolicy", "backoff_s", "is_due"]

MAX_BACKOFF_S = 30.0
FIRST_BACKOFF_S = 0.05


@dataclass(frozen=True, slots=True)
class CheckpointPolicy:
    """Thresholds.

    Attributes:
        min_pages: frames in the WAL that make a checkpoint due (the peer's `min-checkpoint-page-count`).
        interval_s: age of the oldest frame not yet checkpointed that makes one due; 0 switches this off.
    """

    min_pages: int = 1000
    interval_s: float = 60.0


def is_due(
    policy: CheckpointPolicy, *, wal_end: int, page_size: int, frames_since: float | None, failures: int, last_attempt: float, now: float
) -> bool:
    """Say whether to checkpoint now.

    Args:
        wal_end: logical end of the synced WAL in bytes.
        page_size: bytes.
        frames_since: time at which the WAL got its first frame since the last checkpoint; None when it has none.
        failures: attempts in a row that could not copy everything.
        last_attempt, now: seconds on the same monotonic clock.
    """
    if frames_since is None or wal_end <= WAL_HEADER_SIZE:
        return False
    if failures and now - last_attempt < backoff_s(failures):
        return False
    if wal_end - WAL_HEADER_SIZE >= policy.min_pages * frame_size(page_size):
        return True
    return policy.interval_s > 0 and now - frames_since >= policy.interval_s


def backoff_s(failures: int) -> float:
    """Seconds to wait after `failures` attempts in a row."""
    return float(min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2.0 ** min(failures - 1, 20))) if failures else 0.0
