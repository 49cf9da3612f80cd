"""`pyrepl certify` on stores that are good, on one that ignores conditions, and on fakes that break one promise each."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from replicator.certchecks import Failed, Place, unknown_outcomes_are_resolved
from replicator.certify import MODES, Report, certify, digest
from replicator.errors import AccessDenied, ConditionUnsupported, ConfigError, StorageUnavailable
from replicator.format.ltx import TXID
from replicator.storage import open_client
from replicator.storage.memory import MemoryClient
from replicator.storage.probe import Conditions
from replicator.storage.scratch import Scratch, open_scratch
from tests.servers import SECRET, Server


def results(report: Report) -> dict[str, str]:
    return {item.name: item.result for item in report.findings}


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "replicator", "certify", *arguments], capture_output=True, text=True, timeout=120)


def test_a_directory_is_fit_for_everything_and_left_as_it_was(tmp_path: Path) -> None:
    client = open_client(f"file://{tmp_path}/replica")
    client.put(0, TXID(1), TXID(1), b"the replica's own", timestamp_ms=1)
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    done = command("-json", "-require", "fenced,retention", client.url)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["modes"] == dict.fromkeys(MODES, True)
    assert {item["result"] for item in report["checks"]} == {"pass", "not tried"}
    assert [item["name"] for item in report["checks"] if item["result"] == "not tried"] == ["clock", "parts", "faults"]
    assert report["url"] == client.url
    assert report["estimated_cost_usd"] == 0
    assert 1005 < report["requests"]["total"] < 2000
    assert "requests, 300 s at most" in done.stderr
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before
    # The sign-off, computed as the documentation says.
    signed = report.pop("sha256")
    text = json.dumps(report, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert signed == hashlib.sha256(text.encode()).hexdigest()
    report["modes"]["fenced"] = False
    assert digest(report) != signed


def certified(server: Server, keys: int) -> Report:
    report = certify(server.url(f"certify-{uuid.uuid4().hex}"), required=["fenced"], keys=keys, races=1)
    assert report.left_behind == ""
    left = open_client(f"{report.scratch}&region=us-east-1")
    assert not any(list(left.list(level)) for level in range(10))
    left.close()
    assert 0 < report.cost_usd < 0.02
    assert set(report.latency_s) == {"append", "read", "list"}
    assert all(0 < p50_s <= p99_s <= max_s for p50_s, p99_s, max_s in report.latency_s.values())
    assert SECRET not in json.dumps(report.document())
    assert "boto3" in report.versions
    return report


@pytest.mark.slow
def test_seaweedfs_fails_at_most_the_race_of_uploads_in_parts(seaweed) -> None:
    """It looks for an object before it puts parts together, and not while it does: on busy cores two writers may be told that they have won."""
    report = certified(seaweed, 1005)
    failed = {item.name for item in report.findings if item.result != "pass"}
    assert failed <= {"parts"}, [item.detail for item in report.findings if item.name in failed]
    assert report.modes == {mode: not failed or mode not in ("append-only", "fenced") for mode in MODES}
    assert report.supports_what_is_required == (not failed)


@pytest.mark.slow
def test_moto_fails_at_most_the_races_and_what_needs_them_is_not_supported(moto) -> None:
    """It looks for an object first and stores it later, without a lock: a race may have two winners, or not."""
    report = certified(moto, 20)
    failed = [item for item in report.findings if item.result != "pass"]
    assert {item.name for item in failed} <= {"parts", "create-race", "replace-race"}
    lacking = {mode for item in failed for mode in item.modes}
    assert lacking <= {"append-only", "fenced"}
    assert report.modes == {mode: mode not in lacking for mode in MODES}
    assert report.supports_what_is_required == ("fenced" not in lacking)


def test_a_store_that_ignores_conditions_is_refused_for_fenced_mode(rclone) -> None:
    url = rclone.url(f"certify-{uuid.uuid4().hex}")
    done = command("-keys", "0", "-require", "fenced", url)
    assert done.returncode == 1
    assert "fenced       not supported (required)" in done.stdout
    assert "append-only  not supported" in done.stdout
    assert "replication  supported" in done.stdout
    assert "not fit for fenced: s3://bucket/certify-" in done.stderr
    assert "conditional writes are accepted and ignored" in done.stdout


def test_wrong_use(tmp_path: Path) -> None:
    assert command().returncode == 2
    assert command("-require", "everything", str(tmp_path)).returncode == 2
    assert command("-keys", "many", str(tmp_path)).returncode == 2
    assert command("ftp://host/x").returncode == 1
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match="unknown mode"):
        certify(str(tmp_path), required=["everything"])  # type: ignore[list-item]


# -- fakes -----------------------------------------------------------------------------------------------------------------------


class Racy(MemoryClient):
    """Looks first and writes then, as a store without real conditions would: one after the other nobody notices."""

    def put(self, level, min_txid, max_txid, body, *, if_absent=False, **options):
        if if_absent and any(info.min_txid == min_txid for info in self.list(level)):
            return super().put(level, min_txid, max_txid, body, if_absent=True, **options)
        time.sleep(0.01)
        return super().put(level, min_txid, max_txid, body, **options)


class CreatesOnly(MemoryClient):
    """Like SFTP with hard links: a second create is refused, and there is no replacing on a condition."""

    def put_control(self, name, data, *, if_absent=False, if_match=None):
        if if_match is not None:
            raise ConditionUnsupported("replace")
        return super().put_control(name, data, if_absent=if_absent)


class RacyControl(MemoryClient):
    def put_control(self, name, data, *, if_match=None, if_absent=False):
        if if_match is not None and self._store.control.get(name) and self._store.control[name].etag == if_match:
            time.sleep(0.01)
            return super().put_control(name, data)
        return super().put_control(name, data, if_match=if_match, if_absent=if_absent)


class StaleEtags(MemoryClient):
    """Compares the etag with any that the object ever had."""

    def __init__(self) -> None:
        super().__init__()
        self.known: set[str] = set()

    def put_control(self, name, data, *, if_match=None, if_absent=False):
        etag = super().put_control(name, data, if_match=None if if_match in self.known else if_match, if_absent=if_absent)
        self.known.add(etag)
        return etag


class LateListing(MemoryClient):
    """A listing shows a file only some time after it was stored."""

    def list(self, level, **options):
        found = list(super().list(level, **options))
        return iter(found[:-1])


class ShortPages(MemoryClient):
    def list(self, level, **options):
        return iter(list(super().list(level, **options))[:15])


class FlippedBit(MemoryClient):
    def put(self, level, min_txid, max_txid, body, **options):
        data = bytearray(body)
        if len(data) > 50_000:
            data[40_000] ^= 1
        return super().put(level, min_txid, max_txid, bytes(data), **options)


class WrongRanges(MemoryClient):
    def open(self, info, *, offset=0, size=None):
        return super().open(info, offset=max(0, offset - 1) if size else offset, size=size)


class NoTimes(MemoryClient):
    def put(self, *args, timestamp_ms, **options):
        return super().put(*args, timestamp_ms=timestamp_ms // 1000 * 1000, **options)


class NoDelete(MemoryClient):
    def delete(self, files):
        if list(files):
            raise AccessDenied("memory://")


class WrongClock(MemoryClient):
    def list(self, level, *, accurate_times=False, **options):
        for info in super().list(level, **options):
            yield info if accurate_times else replace(info, created_at=datetime.now(UTC) + timedelta(hours=1))


@pytest.mark.parametrize(
    ("fake", "fails", "unsupported"),
    [
        (Racy, {"create-race"}, {"append-only", "fenced"}),
        (CreatesOnly, {"replace", "etags", "replace-race"}, {"fenced"}),
        (RacyControl, {"replace-race"}, {"fenced"}),
        (StaleEtags, {"etags", "replace-race"}, {"fenced"}),
        (LateListing, None, set(MODES)),
        (ShortPages, {"pages"}, set(MODES)),
        (FlippedBit, {"bytes", "large"}, set(MODES)),
        (WrongRanges, {"ranges"}, {"restore"}),
        (NoTimes, {"times"}, {"restore", "retention"}),
        (NoDelete, {"listing", "delete"}, None),
        (WrongClock, {"clock"}, {"retention"}),
    ],
)
def test_each_broken_promise_is_found(fake: Callable[[], MemoryClient], fails: set[str] | None, unsupported: set[str] | None) -> None:
    report = certify("memory://", keys=20, scratch=Scratch(fake()))
    failed = {name for name, result in results(report).items() if result == "fail"}
    assert failed == fails if fails is not None else "listing" in failed
    if unsupported is not None:
        assert {mode for mode, supported in report.modes.items() if not supported} == unsupported
    assert bool(report.left_behind) == (fake in (NoDelete, ShortPages))


def test_what_there_is_no_time_for_is_not_supported() -> None:
    report = certify("memory://", keys=5, timeout_s=-1, scratch=Scratch(MemoryClient()))
    assert set(results(report).values()) == {"fail"}
    assert not any(report.modes.values())
    assert "no time left" in report.findings[0].detail


def test_a_store_that_goes_away_fails_its_checks_and_names_what_is_left() -> None:
    class Away(MemoryClient):
        puts = 0

        def _count(self) -> None:
            self.puts += 1
            if self.puts > 30:
                raise StorageUnavailable("memory:// is out of reach")

        def put(self, *args, **options):
            self._count()
            return super().put(*args, **options)

        def list(self, level, **options):
            if self.puts > 30:
                raise StorageUnavailable("memory:// is out of reach")
            return super().list(level, **options)

    report = certify("memory://", keys=5, scratch=Scratch(Away()))
    assert "out of reach" in report.left_behind
    assert not report.modes["fenced"]


def test_a_store_that_takes_nothing_is_asked_for_little() -> None:
    class Denied(MemoryClient):
        asked = 0

        def put(self, *args, **options):
            self.asked += 1
            raise AccessDenied("memory://")

    store = Denied()
    report = certify("memory://", scratch=Scratch(store))
    assert store.asked == 1
    assert not any(report.modes.values())
    assert "access denied" in report.findings[0].detail
    assert {item.detail for item in report.findings[1:]} == {"not tried, because nothing can be stored there"}
    assert report.requests["total"] < 10


# -- the fault drill finds clients that trust a lost reply --------------------------------------------------------------------------


def test_the_drill_finds_a_client_that_takes_a_lost_reply_for_success(seaweed) -> None:
    scratch = open_scratch(seaweed.url(f"certify-{uuid.uuid4().hex}"), "x")
    assert scratch.through is not None

    def trusting(endpoint: str):
        inner = scratch.through(endpoint)  # type: ignore[misc]
        put = inner.put

        def hopeful(*args, **options):
            try:
                return put(*args, **options)
            except StorageUnavailable:
                return None  # it will have arrived

        inner.put = hopeful  # type: ignore[method-assign]
        return inner

    for through, verdict in ((scratch.through, "9 requests or replies"), (trusting, "a file of another writer was taken for ours")):
        place = Place(replace(scratch, through=through), scratch.client, 0, conditions=Conditions(create=True, replace=True))
        try:
            found = unknown_outcomes_are_resolved(place)
        except Failed as reason:
            found = str(reason)
        scratch.client.delete(list(scratch.client.list(0)))
        scratch.client.delete_control("pyrepl/lineage.json")
        assert found.startswith(verdict)
    scratch.close()


def test_a_lost_reply_is_a_lost_reply(seaweed) -> None:
    """The proxy does what it says: before, the server has nothing; after, it has everything, and the client knows neither."""
    from replicator.storage.faultproxy import FaultProxy
    from replicator.storage.s3 import S3Client
    from replicator.storage.url import parse_s3_url

    direct = open_client(seaweed.url(f"certify-{uuid.uuid4().hex}"))
    assert isinstance(direct, S3Client)
    with FaultProxy(seaweed.endpoint) as proxy:
        url = f"{direct.url.partition('?')[0]}?endpoint={proxy.endpoint}&region=us-east-1&forcePathStyle=true"
        client = S3Client(parse_s3_url(url), max_attempts=1)
        for txid, fault, arrived in ((1, "before", False), (2, "after", True)):
            proxy.lose(fault)  # type: ignore[arg-type]
            with pytest.raises(StorageUnavailable):
                client.put(0, TXID(txid), TXID(txid), b"x", timestamp_ms=1)
            assert (txid in [info.min_txid for info in direct.list(0)]) == arrived
        assert client.put(0, TXID(3), TXID(3), b"x", timestamp_ms=1).size == 1
        assert proxy.lost == 2
        client.close()
    direct.close()
    assert not any(thread.name == "pyrepl fault proxy" for thread in threading.enumerate())
