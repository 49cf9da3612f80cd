"""The metrics: what they say, that the documentation lists exactly those, and that the dashboard asks for nothing else."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from replicator import metrics
from replicator.api import ReplicaStatus, Status
from replicator.board import Counts
from replicator.errors import StorageUnavailable
from replicator.format.ltx import TXID
from replicator.keeper import HistoryCounts
from replicator.lease import LeaseStatus
from replicator.losses import LossWindow
from replicator.storage.measured import Operations, measured
from replicator.storage.memory import MemoryClient
from replicator.store import Member, Prepared, Store

DOCS = Path(__file__).parents[2] / "docs"
DASHBOARD = json.loads((DOCS / "grafana.json").read_text())
FROM_OUTSIDE = {"job", "instance"}
"""Labels that Prometheus adds to everything."""

REPLICA = ReplicaStatus(
    "s3://bucket/a",
    "s3",
    TXID(6),
    None,
    lag_s=2.5,
    error="away",
    files_sent=4,
    bytes_sent=4096,
    problems=("retention: not allowed",),
    loss_window=LossWindow(0.1, 0.2, 0.3, 10, 12, 1.5, (0,) * 6 + (2, 10) + (0,) * 10),
    retries=3,
    history=HistoryCounts(5, 6, 7, 8, 9),
)
STATUS = Status(
    Path("/srv/a.db"),
    "degraded",
    TXID(7),
    wal_size_bytes=8192,
    checkpoints=2,
    max_lock_s=0.25,
    error="the staging folder is full",
    replicas=(REPLICA, replace(REPLICA, url="file:///r", history=HistoryCounts(unsound=1))),
    synced_at=datetime(2026, 1, 1, tzinfo=UTC),
    waiting=(3, 100, 200),
    counts=Counts(11, 1, 0.5, 9000, 3, 1, 0.125),
    pinned_s=1.5,
    lease=LeaseStatus("file:///r/lock.json", "held", "here:1", 4, None),
)


class Fake:
    """Stands for a `Replicator`."""

    def start(self) -> None:
        pass

    def status(self) -> Status:
        return STATUS

    def raw_files(self) -> dict[str, int]:
        return {"eligible": 1, "not_compacted": 2, "too_recent": 3}


class Away(MemoryClient):
    def delete(self, files: object) -> None:
        raise StorageUnavailable("away")


@pytest.fixture(scope="module")
def text() -> str:
    """Everything that can be measured, once."""
    operations = Operations()
    client = measured(Away(), operations)
    list(client.list(0))
    with pytest.raises(StorageUnavailable):
        client.delete([])
    member = Member(Path("/srv/a.db"), lambda: Prepared(Fake(), []))  # type: ignore[arg-type]
    member.start()
    for family in (metrics.DRILL_OK, metrics.DRILL_TIME, metrics.DRILL_SECONDS):
        family.labels("/srv/a.db", "file:///r").set(1)
    metrics.DRILLS.labels("/srv/a.db", "file:///r", "ok").inc()
    directories = [(Path("/srv/d"), 5, 2, {"not a database": 3})]
    return metrics.renderer(Store([member]), operations, lambda: directories)().decode()


@pytest.fixture(scope="module")
def samples(text: str) -> dict[str, set[str]]:
    """The labels that occur with each name that can be asked for."""
    found: dict[str, set[str]] = {}
    for name, labels in re.findall(r"^(\w+)(?:\{(.*)\})? ", text, re.MULTILINE):
        found.setdefault(name, set()).update(re.findall(r'(\w+)="', labels))
    return found


def test_values_are_those_of_the_status(text: str) -> None:
    db, s3 = 'db="/srv/a.db"', 'db="/srv/a.db",replica="s3://bucket/a"'
    for line in (
        f"litestream_compaction_verify_error_count{{{db}}} 10.0",  # of both replicas
        f"litestream_sync_error_count{{{db}}} 1.0",
        'pyrepl_directory_databases{dir="/srv/d"} 5.0',
        'pyrepl_directory_skipped{dir="/srv/d",reason="not a database"} 3.0',
        f"litestream_wal_size{{{db}}} 8192.0",
        f'litestream_checkpoint_error_count{{{db},mode="PASSIVE"}} 1.0',
        'litestream_l0_retention_files_total{db="a.db",status="too_recent"} 3.0',
        f"pyrepl_wal_age_seconds{{{db}}} 1.5",
        f"pyrepl_queue_entries{{{db}}} 3.0",
        f'pyrepl_queue_bytes{{{db},place="disk"}} 200.0',
        f"pyrepl_replica_lag_seconds{{{s3}}} 2.5",
        f"pyrepl_loss_window_seconds_count{{{s3}}} 12.0",
        f'pyrepl_loss_window_recent_seconds{{{db},quantile="0.99",replica="s3://bucket/a"}} 0.2',
        f"pyrepl_replica_retries_total{{{s3}}} 3.0",
        f"pyrepl_history_compactions_total{{{s3}}} 5.0",
        f"pyrepl_history_snapshots_total{{{s3}}} 6.0",
        f"pyrepl_history_deleted_files_total{{{s3}}} 7.0",
        f"pyrepl_history_failures_total{{{s3}}} 8.0",
        f"pyrepl_history_problems{{{s3}}} 1.0",
        f'pyrepl_database_state{{{db},state="degraded"}} 1.0',
        'litestream_replica_operation_total{operation="LIST",replica_type="memory"} 1.0',
        'litestream_replica_operation_errors_total{code="StorageUnavailable",operation="DELETE",replica_type="memory"} 1.0',
    ):
        assert line in text.splitlines(), line


def test_names_and_labels_of_the_peer(samples: dict[str, set[str]]) -> None:
    """Specification 0.5, section 6."""
    peers = {
        "db": "db_size wal_size txid disk_full total_wal_bytes sync_count sync_error_count sync_seconds compaction_verify_error_count",
        "db mode": "checkpoint_count checkpoint_error_count checkpoint_seconds",
        "db status": "l0_retention_files_total",
        "replica_type operation": "replica_operation_total replica_operation_bytes",
        "replica_type operation le": "replica_operation_duration_seconds_bucket",
        "replica_type operation code": "replica_operation_errors_total",
    }
    for labels, names in peers.items():
        for name in names.split():
            assert samples[f"litestream_{name}"] == set(labels.split()), name


def test_the_documentation_lists_each_metric_with_its_type_and_labels(text: str, samples: dict[str, set[str]]) -> None:
    documented = {}
    for name, kind, labels in re.findall(r"^\| `(\w+)` \| (\w+) \| ([^|]*) \|", (DOCS / "metrics.md").read_text(), re.MULTILINE):
        assert name not in documented
        documented[name] = kind, set(re.findall(r"`(\w+)`", labels))
    found = {}
    for name, kind in re.findall(r"^# TYPE (\w+) (\w+)$", text, re.MULTILINE):
        if name.startswith(("litestream_", "pyrepl_")) and not name.endswith("_created"):
            parts = {"histogram": ("_bucket",), "summary": ("", "_sum")}.get(kind, ("",))
            found[name] = kind, set().union(*(samples[name + part] for part in parts)) - {"le"}
    assert documented == found


# -- the dashboard ---------------------------------------------------------------------------------------------------------------


def panels() -> list[dict[str, Any]]:
    """All panels that ask something."""
    found = []
    for panel in DASHBOARD["panels"]:
        found += [panel, *panel.get("panels", [])]
    return [panel for panel in found if panel["type"] != "row"]


def expressions() -> list[tuple[str, dict[str, Any]]]:
    return [(panel["title"], target) for panel in panels() for target in panel["targets"]]


def used_labels(expression: str) -> set[str]:
    """The labels that an expression groups by."""
    return {label for group in re.findall(r"\b(?:by|without|on|ignoring)\s*\(([^)]*)\)", expression) for label in re.findall(r"\w+", group)}


def asked_for(expression: str) -> dict[str, set[str]]:
    """The metrics in an expression, each with the labels that it is chosen by."""
    found: dict[str, set[str]] = {}
    for name, matchers in re.findall(r"\b((?:litestream|pyrepl|process|python)_\w+)\s*(?:\{([^}]*)\})?", expression):
        found.setdefault(name, set()).update(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers))
    return found


@pytest.mark.parametrize(("title", "target"), expressions(), ids=[f"{title}-{target['refId']}" for title, target in expressions()])
def test_every_metric_and_label_of_the_dashboard_exists(samples: dict[str, set[str]], title: str, target: dict[str, Any]) -> None:
    expression = target["expr"]
    metrics_asked = asked_for(expression)
    assert metrics_asked
    there: set[str] = set()
    for name, labels in metrics_asked.items():
        assert name in samples, name
        assert labels <= samples[name] | FROM_OUTSIDE, name
        there |= samples[name] | FROM_OUTSIDE
    assert used_labels(expression) <= there
    assert set(re.findall(r"\{\{\s*(\w+)\s*\}\}", target.get("legendFormat", ""))) <= there
    assert expression.count("(") == expression.count(")")


def test_the_dashboard_has_what_an_operator_asks_for() -> None:
    asked = {name for _, target in expressions() for name in asked_for(target["expr"])}
    assert asked >= {
        "pyrepl_replica_lag_seconds",
        "pyrepl_loss_window_recent_seconds",
        "litestream_wal_size",
        "pyrepl_wal_age_seconds",
        "pyrepl_queue_entries",
        "pyrepl_queue_bytes",
        "litestream_replica_operation_total",
        "litestream_replica_operation_bytes",
        "litestream_replica_operation_errors_total",
        "pyrepl_replica_retries_total",
        "litestream_sync_error_count",
        "litestream_checkpoint_count",
        "pyrepl_history_compactions_total",
        "pyrepl_history_snapshots_total",
        "pyrepl_history_deleted_files_total",
        "pyrepl_history_problems",
        "litestream_compaction_verify_error_count",
        "process_resident_memory_bytes",
    }


def test_the_dashboard_can_be_imported() -> None:
    """What Grafana wants: a data source that is chosen by whoever imports it, ids that are unique, and panels that do not overlap."""
    variables = {item["name"]: item for item in DASHBOARD["templating"]["list"]}
    assert variables["datasource"] == {**variables["datasource"], "type": "datasource", "query": "prometheus"}
    assert DASHBOARD["id"] is None
    assert DASHBOARD["uid"]
    assert DASHBOARD["schemaVersion"] >= 36
    source = {"type": "prometheus", "uid": "${datasource}"}
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    for panel in panels():
        assert panel["datasource"] == source
        assert all(target["datasource"] == source for target in panel["targets"])
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
        assert panel["description"]
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(DASHBOARD))) - {"__rate_interval", "__all"}  # Grafana's own
    assert used <= set(variables)
    for name in ("db", "replica"):
        metric, label = re.fullmatch(r"label_values\((\w+)\{.*\}, (\w+)\)", variables[name]["query"]["query"]).groups()  # type: ignore[union-attr]
        assert (metric, label) in {("pyrepl_database_state", "db"), ("pyrepl_replica_lag_seconds", "replica")}
