"""What `replicator.testing` promises to others: each fault happens when it is asked for and only then; checks notice what they check."""

from __future__ import annotations

import sqlite3
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import replicator.testing
from replicator.errors import ObjectNotFound, PreconditionFailed, StorageUnavailable
from replicator.format.ltx import TXID, FileInfo
from replicator.format.wal import decode_wal_header, scan_frames
from replicator.storage.base import ReplicaClient
from replicator.storage.file import FileClient
from replicator.storage.memory import MemoryClient
from replicator.testing import (
    CHECKS,
    Fault,
    FaultyClient,
    ManualClock,
    Nonconforming,
    check_replica_client,
    schemas,
    transactions,
    wal_files,
)
from replicator.testing.conformance import CONDITIONAL

BODY = bytes(range(200))


def put(client: ReplicaClient, txid: int = 1, body: bytes = BODY, **options: bool) -> FileInfo:
    return client.put(0, TXID(txid), TXID(txid), body, timestamp_ms=1, **options)


def stored(client: ReplicaClient) -> list[int]:
    return [info.max_txid for info in client.list(0)]


def test_every_public_name_is_there() -> None:
    for name in replicator.testing.__all__:
        assert getattr(replicator.testing, name) is not None
    assert set(replicator.testing.__all__) == set(replicator.testing._HOMES)


# -- check_replica_client ----------------------------------------------------------------------------------------------------------


def test_the_suite_accepts_the_clients_that_are_right(tmp_path_factory: pytest.TempPathFactory) -> None:
    check_replica_client(MemoryClient)
    check_replica_client(lambda: FileClient(tmp_path_factory.mktemp("replica")))


class Unordered(MemoryClient):
    def list(self, level, **options):
        yield from reversed(list(super().list(level, **options)))


class Careless(MemoryClient):
    def put(self, *args, if_absent=False, **options):
        return super().put(*args, **options)

    def put_control(self, name, data, **conditions):
        return super().put_control(name, data)


class Lazy(MemoryClient):
    def open(self, info, **where):
        try:
            return super().open(info, **where)
        except ObjectNotFound:
            import io

            return io.BytesIO(b"")


class Imprecise(MemoryClient):
    def open(self, info, *, offset=0, size=None):
        return super().open(info, offset=offset, size=None if size is None else size + 1)


class Strict(MemoryClient):
    def delete(self, files):
        for info in files:
            self._get(info)
            super().delete([info])


class Trusting(MemoryClient):
    def put_control(self, name, data, **conditions):
        self._store.control[name] = replicator.storage.base.ControlObject(data, str(hash(data)))
        return str(hash(data))


class Timeless(MemoryClient):
    def list(self, level, **options):
        for info in super().list(level, **options):
            yield FileInfo(info.level, info.min_txid, info.max_txid, info.size, datetime.now(UTC))


@pytest.mark.parametrize(
    ("kind", "check"),
    [
        (Unordered, "listing_is_in_order"),
        (Careless, "create_has_one_winner"),
        (Careless, "conditions_are_kept"),
        (Lazy, "missing_is_not_found"),
        (Imprecise, "ranges_are_exact"),
        (Strict, "delete_forgives"),
        (Trusting, "hostile_control_names_are_refused"),
        (Timeless, "times_survive"),
    ],
)
def test_a_client_that_breaks_a_rule_is_named_with_it(kind: type[MemoryClient], check: str) -> None:
    with pytest.raises(Nonconforming, match="expected"):
        CHECKS[check](kind())
    with pytest.raises(Nonconforming):
        check_replica_client(kind)


def test_checks_can_be_left_out() -> None:
    check_replica_client(Careless, without=CONDITIONAL)


# -- FaultyClient ------------------------------------------------------------------------------------------------------------------


def test_without_faults_it_is_the_client_that_it_wraps() -> None:
    check_replica_client(lambda: FaultyClient(MemoryClient()))


def test_an_error_happens_before_and_a_lost_reply_after_the_act() -> None:
    client = FaultyClient(MemoryClient())
    client.fail_next(Fault.ERROR, "put")
    with pytest.raises(StorageUnavailable):
        put(client, 1)
    client.fail_next(Fault.LOST_REPLY, "put")
    with pytest.raises(StorageUnavailable, match="lost"):
        put(client, 2, if_absent=True)
    assert stored(client) == [2]
    with pytest.raises(PreconditionFailed):
        put(client, 2, if_absent=True)
    assert client.happened == {Fault.ERROR: 1, Fault.LOST_REPLY: 1}


def test_a_stale_listing_is_an_earlier_one() -> None:
    client = FaultyClient(MemoryClient())
    put(client, 1)
    assert stored(client) == [1]
    put(client, 2)
    client.fail_next(Fault.STALE_LIST)
    assert stored(client) == [1]
    assert stored(client) == [1, 2]


@pytest.mark.parametrize("seed", range(5))
def test_damaged_reads_are_as_the_table_says(seed: int) -> None:
    client = FaultyClient(MemoryClient(), seed=seed)
    info = put(client)
    client.fail_next(Fault.CUT)
    with client.open(info) as stream, pytest.raises(StorageUnavailable, match=info.name):
        list(iter(lambda: stream.read(7), b""))
    client.fail_next(Fault.TRUNCATE)
    with client.open(info) as stream:
        assert BODY.startswith(data := stream.read())
        assert len(data) < len(BODY)
    client.fail_next(Fault.CORRUPT)
    with client.open(info) as stream:
        data = stream.read()
    assert sum(bin(a ^ b).count("1") for a, b in zip(data, BODY, strict=True)) == 1


def test_a_repeat_does_not_touch_conditions() -> None:
    client = FaultyClient(MemoryClient(), faults={Fault.DUPLICATE: 1.0})
    put(client, 1, if_absent=True)
    put(client, 2)
    assert client.happened[Fault.DUPLICATE] == 1


def test_the_same_seed_makes_the_same_faults() -> None:
    def run(seed: int) -> list[bool]:
        client, seen = FaultyClient(MemoryClient(), seed=seed, faults={Fault.ERROR: 0.5}), []
        for txid in range(1, 30):
            try:
                put(client, txid)
                seen.append(True)
            except StorageUnavailable:
                seen.append(False)
        return seen

    assert run(1) == run(1) != run(2)
    assert {True, False} == set(run(1))


def test_calm_and_disconnected() -> None:
    client = FaultyClient(MemoryClient(), faults={Fault.ERROR: 1.0})
    with client.calm():
        put(client, 1)
    client.disconnect()
    for call in (lambda: put(client, 2), lambda: stored(client), lambda: client.get_control("x")):
        with pytest.raises(StorageUnavailable):
            call()
    assert [info.max_txid for info in client.inner.list(0)] == [1]


def test_a_delay_is_a_sleep() -> None:
    slept: list[float] = []
    client = FaultyClient(MemoryClient(), faults={Fault.DELAY: 1.0}, max_delay_s=2.0, sleep=slept.append)
    put(client)
    assert len(slept) == 1
    assert 0 < slept[0] <= 2


def test_a_fault_that_cannot_happen_is_refused() -> None:
    with pytest.raises(ValueError, match="does not happen"):
        FaultyClient(MemoryClient()).fail_next(Fault.CUT, "put")


# -- clock and strategies ----------------------------------------------------------------------------------------------------------


def test_a_manual_clock_moves_when_told_to() -> None:
    clock = ManualClock(datetime(2026, 5, 1, tzinfo=UTC))
    before = clock()
    clock.advance(90)
    clock.jump(-3600)
    assert (clock() - before, clock.monotonic()) == (90 - 3600, 90)
    assert clock.now() == datetime(2026, 4, 30, 23, 1, 30, tzinfo=UTC)
    assert clock.time_ns() == int(clock() * 1e9)
    with pytest.raises(ValueError, match="backwards"):
        clock.advance(-1)


@settings(max_examples=40)
@given(st.data())
def test_generated_transactions_run_on_generated_schemas(data: Any) -> None:
    schema = data.draw(schemas())
    connection = sqlite3.connect(":memory:", isolation_level=None)
    for statement in schema.statements:
        connection.execute(statement)
    for _ in range(3):
        connection.execute("BEGIN")
        for sql, values in data.draw(transactions(schema)):
            connection.execute(sql, values)
        connection.execute("COMMIT")
    assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")} == {
        table.name for table in schema.tables
    }
    connection.close()


@given(wal_files())
def test_generated_wal_files_are_valid(wal: Any) -> None:
    header = decode_wal_header(wal.data[:32])
    assert (header.page_size, (header.salt1, header.salt2), header.big_endian) == (wal.page_size, wal.salts, wal.big_endian)
    found = scan_frames(
        wal.data[32:],
        page_size=wal.page_size,
        salts=wal.salts,
        checksum=(header.checksum1, header.checksum2),
        big_endian=wal.big_endian,
    )
    assert found.pgnos.tolist() == [pgno for pgno, _, _ in wal.frames]
    assert found.committed() == wal.committed
