"""A replica ages in virtual time: it stays small, every moment of the window comes back, and an idle one costs nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from replicator import compactor
from replicator.chain import list_files
from replicator.compactor import compact
from replicator.errors import AccessDenied, StorageUnavailable
from replicator.format.ltx import TXID, decode_file
from replicator.levels import History
from replicator.outbox import OutFile
from tests.simulated import CountingClient, Simulation

DAY, HOUR = 86400.0, 3600.0


def check_window(simulation: Simulation, folder: Path, hours: int) -> None:
    """Restore the state at each hour of the window."""
    for hour in range(hours):
        when = simulation.states[-1][0] - hour * HOUR
        content, _ = simulation.restored(folder / "r.db", timestamp=datetime.fromtimestamp(when, UTC))
        assert content == simulation.state_before(when), f"{hour} hours ago"


def test_three_days_of_a_write_a_minute(tmp_path: Path) -> None:
    simulation = Simulation(tmp_path)
    for minute in range(3 * 1440 + 60):
        simulation.write()
        simulation.advance(60)
        if minute % 720 == 719 and minute > 1440:
            check_window(simulation, tmp_path, 24)
    files = list_files(simulation.client)
    assert len(files[0]) <= 6  # five minutes
    assert len(files[9]) <= 3
    assert len(files[1]) == 2 * 1440 + 61  # one image more than the window needs
    assert simulation.keeper.problems == {}
    requests = simulation.client.requests
    assert requests["PUT level 0"] == 3 * 1440 + 60
    assert requests["PUT level 3"] == 3 * 24 + 1
    counts = simulation.keeper.counts
    assert counts.compactions == sum(requests[f"PUT level {level}"] for level in (1, 2, 3))
    assert counts.snapshots == requests["PUT level 9"]
    assert counts.deleted == sum(requests[f"PUT level {level}"] for level in (0, 1, 2, 3, 9)) - sum(map(len, files.values()))
    assert (counts.failures, counts.unsound) == (0, 0)


def test_levels_and_window_with_short_intervals_and_bursts(tmp_path: Path) -> None:
    """Each TXID that is still a boundary restores to what it was, at many moments of its life."""
    history = History((7, 31, 100), snapshot_interval_s=300, snapshot_retention_s=600, l0_retention_s=20, l0_retention_check_interval_s=5)
    simulation = Simulation(tmp_path, history)
    for step in range(750):
        for _ in range(simulation.random.choice([0, 1, 1, 2, 9])):
            simulation.write()
            simulation.advance(simulation.random.uniform(0, 0.5))
        simulation.advance(simulation.random.uniform(0, 5))
        if step % 250 == 249:
            assert simulation.check_every_restorable_txid(tmp_path / "r.db") > 10
            for age in range(0, 600, 50):
                when = simulation.states[-1][0] - age - 1
                content, _ = simulation.restored(tmp_path / "r.db", timestamp=datetime.fromtimestamp(when, UTC))
                # Merged files are coarser than single writes: the state is one of the last merge interval.
                assert content in [state for _, state in simulation.states]
    files = list_files(simulation.client)
    assert sum(map(len, files.values())) < 400
    assert simulation.keeper.problems == {}


@pytest.mark.fault("F43")
def test_a_database_without_writes_makes_no_request_and_has_nothing_due(tmp_path: Path) -> None:
    simulation = Simulation(tmp_path)
    simulation.write()
    simulation.write()
    simulation.advance(3 * DAY)
    assert simulation.keeper.due() is None
    before = dict(simulation.client.requests)
    simulation.advance(400 * DAY)
    assert dict(simulation.client.requests) == before


def test_what_was_just_sent_is_not_fetched_again(tmp_path: Path) -> None:
    simulation = Simulation(tmp_path)
    before = simulation.client.requests["GET"]
    for _ in range(300):
        simulation.write()
        simulation.advance(10)
    assert simulation.keeper.compactions > 100
    assert simulation.client.requests["GET"] == before


def test_after_a_restart_the_keeper_goes_on_where_it_was(tmp_path: Path) -> None:
    simulation = Simulation(tmp_path)
    for _ in range(200):
        simulation.write()
        simulation.advance(20)
    again = Simulation(tmp_path / "again", client=simulation.client)
    again.now, again.states, again.pages = simulation.now, simulation.states, simulation.pages
    again.advance(DAY)
    assert again.keeper.due() is None
    files = list_files(again.client)
    assert [len(files[level]) for level in (0, 9)] == [1, 1]
    assert files[3][-1].max_txid == files[0][-1].max_txid == files[9][-1].max_txid == 200
    assert again.check_every_restorable_txid(tmp_path / "r.db") > 20


class Forbidding(CountingClient):
    """Credentials that may not do everything."""

    def __init__(self, *forbidden: str) -> None:
        super().__init__()
        self.forbidden = set(forbidden)

    def delete(self, files):
        if "DELETE" in self.forbidden:
            raise AccessDenied("bucket")
        return super().delete(files)

    def list(self, level, **options):
        if "LIST" in self.forbidden:
            raise AccessDenied("bucket")
        return super().list(level, **options)


@pytest.mark.fault("F39", "F40")
def test_without_the_right_to_delete_the_replica_grows_and_everything_else_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    simulation = Simulation(tmp_path, client=Forbidding("DELETE"))
    for _ in range(24 * 60):
        simulation.write()
        simulation.advance(60)
    assert "access denied" in simulation.keeper.problems["retention"]
    assert len([record for record in caplog.records if "retention" in record.getMessage()]) == 1
    assert len(list_files(simulation.client)[0]) == 24 * 60
    assert len(list_files(simulation.client)[3]) >= 23
    assert simulation.client.requests["DELETE"] == 1  # that of the probe
    simulation.client.forbidden.clear()
    simulation.write()
    simulation.advance(2 * HOUR)
    assert simulation.keeper.problems == {}
    assert len(list_files(simulation.client)[0]) == 1


@pytest.mark.fault("F39")
def test_the_right_to_list_is_not_needed_after_the_start(tmp_path: Path) -> None:
    simulation = Simulation(tmp_path, client=Forbidding())
    simulation.client.forbidden.add("LIST")
    for _ in range(3000):
        simulation.write()
        simulation.advance(60)
    assert simulation.keeper.problems == {}
    simulation.client.forbidden.clear()
    assert len(list_files(simulation.client)[0]) <= 6


@pytest.mark.fault("F27")
def test_a_clock_that_was_set_back_stops_deletion_and_nothing_else(tmp_path: Path) -> None:
    simulation = Simulation(tmp_path)
    for _ in range(60):
        simulation.write()
        simulation.advance(60)
    simulation.now -= 10 * HOUR
    deleted = simulation.keeper.deleted
    for minute in range(60):
        simulation.write()
        simulation.advance(60)
        if minute < 10:
            assert "in the future" in simulation.keeper.problems["age"]
    assert simulation.keeper.deleted == deleted
    assert simulation.restored(tmp_path / "r.db")[1] == simulation.txid
    simulation.advance(20 * HOUR)
    simulation.write()
    simulation.advance(HOUR)
    assert simulation.keeper.deleted > deleted
    assert simulation.keeper.problems == {}


@pytest.mark.fault("F27")
def test_a_clock_that_jumps_forward_delays_deletion(tmp_path: Path) -> None:
    simulation = Simulation(tmp_path, steady=True)
    for _ in range(2 * 1440):
        simulation.write()
        simulation.advance(60)
    images = list_files(simulation.client)[9]
    simulation.jump(365 * DAY)
    deleted = simulation.keeper.deleted
    simulation.write()
    simulation.advance(300)
    assert simulation.keeper.deleted == deleted
    assert "clock jumped by +3153" in simulation.keeper.problems["retention"]
    assert list_files(simulation.client)[9][: len(images)] == images
    simulation.advance(3600)
    assert simulation.keeper.deleted > deleted


def test_a_damaged_file_is_left_out_and_a_full_image_follows_at_once(tmp_path: Path) -> None:
    simulation = Simulation(tmp_path)
    for _ in range(10):
        simulation.write()
    simulation.recent._bodies.clear()
    victim = simulation.replica.listing()[0][4]
    with simulation.client.open(victim) as stream:
        data = bytearray(stream.read())
    data[len(data) // 2] ^= 1
    simulation.client.put(0, victim.min_txid, victim.max_txid, bytes(data), timestamp_ms=int(simulation.now * 1000))
    simulation.advance(HOUR)
    assert simulation.keeper.snapshots == 1
    assert simulation.keeper.counts.unsound == 1
    assert simulation.restored(tmp_path / "r.db")[1] == 10
    for _ in range(10):
        simulation.write()
        simulation.advance(60)
    simulation.advance(2 * DAY)
    assert simulation.restored(tmp_path / "r.db") == (simulation.states[20][1], 20)
    assert len(list_files(simulation.client)[0]) == 1


@pytest.mark.fault("F34")
def test_files_that_somebody_else_deletes_do_not_stop_the_keeper(tmp_path: Path) -> None:
    simulation = Simulation(tmp_path)
    for _ in range(100):
        simulation.write()
        simulation.advance(20)
    simulation.recent._bodies.clear()
    files = list_files(simulation.client)
    simulation.client.delete(files[1][-3:])
    simulation.advance(HOUR)
    for _ in range(100):
        simulation.write()
        simulation.advance(20)
    simulation.advance(2 * DAY)
    assert simulation.restored(tmp_path / "r.db") == (simulation.states[200][1], 200)
    assert simulation.keeper.problems == {}
    assert simulation.keeper.counts.unsound == 1


@pytest.mark.fault("F28")
def test_an_outage_delays_the_keeper_and_nothing_is_lost(tmp_path: Path) -> None:
    class Away(CountingClient):
        away = False

        def put(self, level, *args, **options):
            if self.away and level:
                raise StorageUnavailable("away")
            return super().put(level, *args, **options)

    simulation = Simulation(tmp_path, client=Away())
    for step in range(600):
        simulation.client.away = 100 < step < 400
        simulation.write()
        simulation.advance(20)
        if step == 300:
            assert "away" in simulation.keeper.problems["compaction into level 1"]
            assert simulation.keeper.counts.failures > 0
    assert simulation.keeper.problems == {}
    assert simulation.keeper.counts.unsound == 0
    simulation.advance(HOUR)
    assert len(list_files(simulation.client)[0]) == 1
    assert simulation.check_every_restorable_txid(tmp_path / "r.db") > 50


@pytest.mark.fault("F30")
def test_what_compaction_stores_is_the_same_again_after_a_crash(tmp_path: Path) -> None:
    """The keeper dies between storing a merged file and noting it: the next one finds the same name with the same bytes."""
    simulation = Simulation(tmp_path)
    for _ in range(5):
        simulation.write()
    inputs = simulation.replica.listing()[0]
    done = compact(inputs, 1, simulation.keeper._read, simulation.keeper._scratch)
    assert isinstance(done.out.body, bytes)
    assert compact(inputs, 1, simulation.keeper._read, simulation.keeper._scratch).out == done.out
    simulation.client.put(1, TXID(1), TXID(5), done.out.body, timestamp_ms=done.out.timestamp_ms)
    simulation.advance(60)
    assert simulation.keeper.problems == {}
    [stored] = simulation.client.list(1)
    with simulation.client.open(stored) as stream:
        assert hashlib.sha256(stream.read()).digest() == hashlib.sha256(done.out.body).digest()


def test_images_in_use_survive_retention(tmp_path: Path) -> None:
    history = History(snapshot_interval_s=HOUR, snapshot_retention_s=HOUR)
    simulation = Simulation(tmp_path, history)
    simulation.write()
    simulation.advance(HOUR)
    simulation.write()
    simulation.advance(HOUR)
    simulation.in_use.add((9, 1, 2))
    for _ in range(10):
        simulation.write()
        simulation.advance(HOUR)
    assert TXID(2) in [info.max_txid for info in list_files(simulation.client)[9]]
    simulation.in_use.clear()
    simulation.write()
    simulation.advance(2 * HOUR)
    assert TXID(2) not in [info.max_txid for info in list_files(simulation.client)[9]]


def drained(simulation: Simulation, limit: int = 100) -> int:
    """Let the keeper do all that is due now and later; a keeper that spins does not end."""
    steps = 0
    while (due := simulation.keeper.due()) is not None:
        simulation.now = max(simulation.now, due)
        simulation.keeper.step()
        steps += 1
        assert steps < limit, "the keeper does the same again and again"
    return steps


def damage(simulation: Simulation, level: int, index: int, *, cut: bool = False) -> None:
    """Change a stored file, of which this process has no copy."""
    victim = simulation.replica.listing()[level][index]
    with simulation.client.open(victim) as stream:
        data = bytearray(stream.read())
    data[len(data) // 2] ^= 1
    body = bytes(data[:-40] if cut else data)
    simulation.client.put(level, victim.min_txid, victim.max_txid, body, timestamp_ms=int(victim.created_at.timestamp() * 1000))
    simulation.recent._bodies.clear()


@pytest.mark.parametrize("level", [1, 2])
def test_a_damaged_merged_file_is_made_again_in_its_place(tmp_path: Path, level: int) -> None:
    simulation = Simulation(tmp_path)
    for _ in range(12):
        simulation.write()
        simulation.advance(20)
    simulation.advance(400 if level == 2 else 40)
    damage(simulation, level, -1)
    before = simulation.client.requests["PUT"]
    drained(simulation)
    assert simulation.client.requests["PUT"] - before < 10
    assert simulation.keeper.problems == {}
    assert simulation.restored(tmp_path / "r.db") == (simulation.states[12][1], 12)
    assert simulation.check_every_restorable_txid(tmp_path / "r.db") >= 2


def test_a_raw_file_that_vanishes_before_it_was_merged_leads_to_a_full_image_at_once(tmp_path: Path) -> None:
    simulation = Simulation(tmp_path)
    for _ in range(10):
        simulation.write()
    simulation.recent._bodies.clear()
    simulation.client.delete([simulation.replica.listing()[0][4]])
    simulation.advance(60)
    assert simulation.keeper.snapshots == 1
    assert simulation.keeper.counts.unsound == 1
    assert simulation.keeper.problems == {}
    assert simulation.restored(tmp_path / "r.db") == (simulation.states[10][1], 10)


@pytest.mark.fault("F31")
def test_a_raw_file_that_was_cut_short_is_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("replicator.chain.RETRY_DELAYS_S", ())
    simulation = Simulation(tmp_path)
    for _ in range(10):
        simulation.write()
    damage(simulation, 0, 4, cut=True)
    simulation.advance(60)
    assert simulation.keeper.snapshots == 1
    assert simulation.restored(tmp_path / "r.db") == (simulation.states[10][1], 10)


def test_a_damaged_full_image_is_replaced(tmp_path: Path) -> None:
    simulation = Simulation(tmp_path)
    for _ in range(3):
        simulation.write()
    simulation.advance(2 * DAY)
    assert simulation.keeper.snapshots == 1
    damage(simulation, 9, 0)
    with simulation.take_snapshot(TXID(0)) as out:
        simulation.replica.add(out)
    [info] = simulation.client.list(9)
    with simulation.client.open(info) as stream:
        decode_file(stream.read())


def test_a_file_that_is_stored_while_the_store_is_listed_is_not_forgotten(tmp_path: Path) -> None:
    class Slow(CountingClient):
        meanwhile = None

        def list(self, level, **options):
            found = list(super().list(level, **options))
            if level == 0 and self.meanwhile is not None:
                self.meanwhile, do = None, self.meanwhile
                do()
            return iter(found)

    simulation = Simulation(tmp_path, client=Slow())
    simulation.write()
    simulation.client.meanwhile = simulation.write
    simulation.replica.relist()
    assert [info.max_txid for info in simulation.replica.listing()[0]] == [1, 2]


def test_results_that_are_files_and_no_more_there_afterwards_are_no_failures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class WithFiles(Simulation):
        @contextlib.contextmanager
        def take_snapshot(self, newer_than: TXID) -> Iterator[OutFile]:
            with super().take_snapshot(newer_than) as image:
                path = tmp_path / "image"
                path.write_bytes(image.body)
                yield dataclasses.replace(image, body=path)
                path.unlink()

    monkeypatch.setattr(compactor, "RESULT_BYTES", 0)
    simulation = WithFiles(tmp_path)
    for _ in range(20):
        simulation.write()
        simulation.advance(60)
    simulation.advance(DAY)
    assert simulation.keeper.problems == {}
    assert (simulation.keeper.counts.failures, simulation.keeper.snapshots) == (0, 1)
    assert simulation.keeper.compactions > 10
    assert list((tmp_path / "scratch").iterdir()) == []
