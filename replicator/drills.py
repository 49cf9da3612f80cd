"""Drill restores on a schedule, inside a running `Replicator`."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from replicator.board import Board
from replicator.engine import Engine
from replicator.errors import ReplicatorError, RestoreError, TXIDNotAvailable
from replicator.format.ltx import TXID
from replicator.replica import Replica
from replicator.verify import drill

__all__ = ["DrillResult", "DrillThread"]

CATCH_UP_TIMEOUT_S = 60.0
TRIES = 5

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DrillResult:
    """The last drill of one replica. `error` is None when the state came back, healthy, and was what had been replicated."""

    at: datetime
    txid: TXID
    duration_s: float
    error: str | None


class DrillThread:
    """Run a drill of each replica every `interval_s` seconds; not for a database that has not changed since its last good one."""

    def __init__(self, engine: Engine, replicas: Sequence[Replica], board: Board, *, interval_s: float) -> None:
        self.results: dict[Replica, DrillResult] = {}
        self._engine, self._replicas, self._board, self._interval = engine, replicas, board, interval_s

    def run(self) -> None:
        """Body of the thread."""
        from replicator import metrics

        board = self._board
        while True:
            with board.changed:
                if board.changed.wait_for(lambda: board.ends, self._interval):
                    return
                # A database that rests is not read again and again.
                board.changed.wait_for(lambda: board.ends or self._has_news())
                if board.ends:
                    return
            for replica in self._replicas:
                if not self._needs(replica):
                    continue
                result = self._drill(replica)
                if board.ends:
                    return
                with board.changed:
                    self.results[replica] = result
                    board.changed.notify_all()
                labels = str(board.path), replica.url
                metrics.DRILLS.labels(*labels, "error" if result.error else "ok").inc()
                metrics.DRILL_OK.labels(*labels).set(0 if result.error else 1)
                metrics.DRILL_TIME.labels(*labels).set(result.at.timestamp())
                metrics.DRILL_SECONDS.labels(*labels).set(result.duration_s)
                if result.error:
                    log.error(
                        "verification failed db=%s replica=%s txid=%016x error=%r", board.path, replica.url, result.txid, result.error
                    )
                else:
                    log.info("verified db=%s replica=%s txid=%016x", board.path, replica.url, result.txid)

    def _has_news(self) -> bool:
        return self._board.state != "starting" and any(map(self._needs, self._replicas))

    def _needs(self, replica: Replica) -> bool:
        last = self.results.get(replica)
        return bool(replica.txid) and replica.client.can_read and (last is None or last.error is not None or last.txid != replica.txid)

    def _drill(self, replica: Replica) -> DrillResult:
        started, txid = time.monotonic(), TXID(0)
        try:
            for last in (*[False] * (TRIES - 1), True):
                txid, xor = self._engine.state()
                with self._board.changed:
                    self._board.changed.wait_for(self._reached(replica, txid), CATCH_UP_TIMEOUT_S)
                try:
                    found = drill(replica.client, self._engine.scratch.folder, txid=txid, needs_bytes=self._engine.database_bytes())
                except TXIDNotAvailable:
                    if last:
                        raise
                    continue  # merged away between the two lines above
                if found.xor != xor:
                    raise RestoreError(f"TXID {txid:016x} of the replica is not what was replicated under it")
                break
            error = None
        except (ReplicatorError, OSError) as failure:
            error = str(failure)
        return DrillResult(datetime.now(UTC), txid, time.monotonic() - started, error)

    def _reached(self, replica: Replica, txid: int) -> Callable[[], bool]:
        return lambda: self._board.ends or replica.txid >= txid
