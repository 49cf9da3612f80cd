"""What `pyrepl top` shows, as values: two answers of a daemon make rows with rates; rows are chosen, ordered and summed up. No terminal, no socket."""

from __future__ import annotations

import heapq
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["ORDERS", "Row", "Sample", "Totals", "amount", "chosen", "first_of", "rows_of", "short_path", "span", "totals_of"]

_SEVERITY = {"failed": 0, "degraded": 1, "waiting": 2, "stopped": 4}
_HEALTHY = 3


@dataclass(frozen=True, slots=True)
class Sample:
    """One answer of a daemon.

    Attributes:
        name: of the program, "pyrepl" or "Litestream".
        identity: differs between two processes of it.
        at_s: seconds on a clock of that process, for rates; None where it has none.
        databases: by path, as `replicator.overview` describes them.
        operations: counts by kind of request.
    """

    name: str
    version: str
    identity: str
    at_s: float | None
    uptime_s: float
    resident_bytes: int
    databases: Mapping[str, Mapping[str, Any]]
    operations: Mapping[str, Mapping[str, int]]


@dataclass(frozen=True, slots=True)
class Row:
    """One database. Rates are by second, and None while only one answer is known."""

    path: str
    state: str
    txid: int
    lag_s: float
    loss_p99_s: float
    wal_bytes: int
    pending: int
    pending_bytes: int
    errors: int
    error: str
    bytes_rate: float | None
    requests_rate: float | None
    syncs_rate: float | None

    @property
    def has_problem(self) -> bool:
        return bool(self.error) or self.state in ("failed", "degraded")

    def as_json(self) -> dict[str, object]:
        """Return the row under the names that scripts see."""
        return {
            "path": self.path,
            "state": self.state,
            "txid": self.txid,
            "lag_seconds": self.lag_s,
            "loss_p99_seconds": self.loss_p99_s,
            "wal_bytes": self.wal_bytes,
            "pending": self.pending,
            "pending_bytes": self.pending_bytes,
            "errors": self.errors,
            "bytes_per_second": self.bytes_rate,
            "requests_per_second": self.requests_rate,
            "syncs_per_second": self.syncs_rate,
            **({"error": self.error} if self.error else {}),
        }


@dataclass(frozen=True, slots=True)
class Totals:
    """Of all databases, chosen or not: counts by state, the worst lag, sums, and rates by kind of request."""

    states: Mapping[str, int]
    lag_s: float
    loss_p99_s: float
    wal_bytes: int
    pending: int
    pending_bytes: int
    errors: int
    bytes_rate: float | None
    requests_rate: float | None
    syncs_rate: float | None
    kinds: Mapping[str, float]

    @property
    def databases(self) -> int:
        return sum(self.states.values())

    def as_json(self) -> dict[str, object]:
        """Return them under the names that scripts see."""
        return {
            "databases": self.databases,
            "states": dict(self.states),
            "lag_seconds": self.lag_s,
            "loss_p99_seconds": self.loss_p99_s,
            "wal_bytes": self.wal_bytes,
            "pending": self.pending,
            "pending_bytes": self.pending_bytes,
            "errors": self.errors,
            "bytes_per_second": self.bytes_rate,
            "requests_per_second": self.requests_rate,
            "syncs_per_second": self.syncs_rate,
            "requests_per_second_by_kind": dict(self.kinds),
        }


def rows_of(before: Sample | None, after: Sample) -> list[Row]:
    """Return the rows of an answer, with rates where the answer before it came from the same process."""
    elapsed = _elapsed_s(before, after)
    earlier: Mapping[str, Mapping[str, Any]] = before.databases if before is not None and elapsed else {}
    return [_row(path, item, earlier.get(path), elapsed) for path, item in after.databases.items()]


def _row(path: str, item: Mapping[str, Any], earlier: Mapping[str, Any] | None, elapsed: float) -> Row:
    def rate(key: str) -> float | None:
        return _rate(earlier.get(key, 0), item.get(key, 0), elapsed) if earlier is not None else None

    return Row(
        path,
        str(item.get("state", "")),
        item.get("txid", 0),
        item.get("lag_s", 0.0),
        item.get("loss_p99_s", 0.0),
        item.get("wal_bytes", 0),
        item.get("pending", 0),
        item.get("pending_bytes", 0),
        item.get("errors", 0),
        str(item.get("error") or ""),
        rate("sent_bytes"),
        rate("requests"),
        rate("syncs"),
    )


def _elapsed_s(before: Sample | None, after: Sample) -> float:
    if before is None or before.identity != after.identity or before.at_s is None or after.at_s is None:
        return 0.0
    return max(0.0, after.at_s - before.at_s)


def _rate(before: float, after: float, elapsed: float) -> float:
    # A counter that is lower than before has begun anew.
    return (after - before if after >= before else after) / elapsed


def totals_of(rows: Sequence[Row], before: Sample | None, after: Sample) -> Totals:
    """Sum up rows that `rows_of` made of the same two answers."""
    states: dict[str, int] = {}
    for row in rows:
        states[row.state] = states.get(row.state, 0) + 1
    elapsed = _elapsed_s(before, after)
    kinds: dict[str, float] = {}
    if before is not None and elapsed:
        for kind, item in after.operations.items():
            kinds[kind] = _rate(before.operations.get(kind, {}).get("requests", 0), item["requests"], elapsed)

    def sum_of(value: Callable[[Row], float | None]) -> float | None:
        return sum(value(row) or 0.0 for row in rows) if elapsed else None

    return Totals(
        dict(sorted(states.items(), key=lambda item: (_SEVERITY.get(item[0], _HEALTHY), item[0]))),
        max((row.lag_s for row in rows), default=0.0),
        max((row.loss_p99_s for row in rows), default=0.0),
        sum(row.wal_bytes for row in rows),
        sum(row.pending for row in rows),
        sum(row.pending_bytes for row in rows),
        sum(row.errors for row in rows),
        sum_of(lambda row: row.bytes_rate),
        sum(kinds.values()) if kinds else sum_of(lambda row: row.requests_rate),
        sum_of(lambda row: row.syncs_rate),
        kinds,
    )


# -- choosing and ordering -------------------------------------------------------------------------------------------------------


def _worst(row: Row) -> tuple[object, ...]:
    severity = _SEVERITY.get(row.state, _HEALTHY)
    return (min(severity, 1) if row.error and row.state != "failed" else severity, -row.lag_s, *_hottest(row))


def _hottest(row: Row) -> tuple[object, ...]:
    return -(row.bytes_rate or 0.0), -(row.requests_rate or 0.0), -row.pending_bytes, -row.wal_bytes, row.path


def _by(value: Callable[[Row], float]) -> Callable[[Row], tuple[object, ...]]:
    return lambda row: (-value(row), *_worst(row))


ORDERS: dict[str, Callable[[Row], tuple[object, ...]]] = {
    "worst": _worst,
    "lag": _by(lambda row: row.lag_s),
    "loss": _by(lambda row: row.loss_p99_s),
    "bytes": _by(lambda row: row.bytes_rate or 0.0),
    "requests": _by(lambda row: row.requests_rate or 0.0),
    "syncs": _by(lambda row: row.syncs_rate or 0.0),
    "wal": _by(lambda row: row.wal_bytes),
    "pending": _by(lambda row: row.pending_bytes or row.pending),
    "errors": _by(lambda row: row.errors),
    "name": lambda row: (row.path,),
}
"""Keys to sort by, the first in the order first: `worst` puts what a person has to look at before what lags before what is busy."""


def first_of(rows: Iterable[Row], order: str, count: int | None) -> list[Row]:
    """Return the first rows in an order; all of them where no count is given."""
    key = ORDERS[order]
    return sorted(rows, key=key) if count is None else heapq.nsmallest(count, rows, key=key)


def chosen(rows: Iterable[Row], words: str, *, only_problems: bool = False) -> list[Row]:
    """Return the rows whose path, state or error has every one of the words, whatever the case."""
    wanted = words.lower().split()
    return [
        row
        for row in rows
        if (not only_problems or row.has_problem) and all(word in f"{row.path}\n{row.state}\n{row.error}".lower() for word in wanted)
    ]


# -- texts -----------------------------------------------------------------------------------------------------------------------


def amount(value: float | None) -> str:
    """Return a count or a rate in at most five characters: `0`, `0.25`, `9.9`, `123`, `12k`, `3.4M`; `-` for an unknown one."""
    if value is None:
        return "-"
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size * 0.9995:
            return f"{value / size:.1f}".removesuffix(".0") + unit if value < size * 99.95 else f"{value / size:.0f}{unit}"
    if value == int(value) or value >= 99.95:
        return f"{value:.0f}"
    return f"{value:.2f}" if value < 1 else f"{value:.1f}"


def span(seconds: float) -> str:
    """Return a time in at most six characters: `-`, `12 ms`, `3.4 s`, `5m06s`, `2h03m`, `4d05h`."""
    if seconds <= 0:
        return "-"
    if seconds < 0.9995:
        return f"{max(seconds * 1000, 1):.0f} ms"
    if seconds < 99.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for size, part, unit, small in ((86400, 3600, "d", "h"), (3600, 60, "h", "m"), (60, 1, "m", "s")):
        if whole >= size:
            return f"{whole // size}{unit}{whole % size // part:02d}{small}"
    return f"{whole} s"


def short_path(path: str, width: int) -> str:
    """Cut a path in front, where databases differ least. What a terminal would obey is replaced."""
    path = re.sub(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", "?", path)
    return path if len(path) <= width else "…" + path[len(path) - max(width - 1, 0) :]
