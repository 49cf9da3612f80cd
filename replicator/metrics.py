"""Metrics, on prometheus_client. Imported only where something is measured: the package costs a tenth of a second."""

from __future__ import annotations

from prometheus_client import Counter, Gauge

__all__ = ["DRILLS", "DRILL_OK", "DRILL_SECONDS", "DRILL_TIME"]

DRILLS = Counter("pyrepl_verify", "Drill restores, by result.", ["db", "replica", "result"])
DRILL_OK = Gauge("pyrepl_verify_ok", "1 when the last drill restore was healthy and was what had been replicated.", ["db", "replica"])
DRILL_TIME = Gauge("pyrepl_verify_timestamp_seconds", "When the last drill ended, since 1970.", ["db", "replica"])
DRILL_SECONDS = Gauge("pyrepl_verify_duration_seconds", "How long the last drill took.", ["db", "replica"])
