"""Appending to a replica: what counts as stored after a pause, with a lease and without."""

from __future__ import annotations

import pytest

from replicator.clock import Moment
from replicator.errors import ConditionsIgnored, Fenced, LeaseLost, StorageUnavailable
from replicator.format.ltx import TXID, FileInfo, Header, encode_file
from replicator.lease import Lease
from replicator.outbox import OutFile
from replicator.replica import Replica
from replicator.storage.base import created_at
from replicator.storage.memory import MemoryClient

LINEAGE = bytes(range(16))


class Time:
    def __init__(self) -> None:
        self.steady, self.wall = 0.0, 1_790_000_000.0

    def now(self) -> Moment:
        return Moment(self.steady, self.wall)

    def pass_s(self, seconds: float, *, frozen: bool = False) -> None:
        self.wall += seconds
        self.steady += 0.0 if frozen else seconds


class Listing(MemoryClient):
    """Counts listings, and calls `during` inside a put."""

    def __init__(self) -> None:
        super().__init__()
        self.lists = 0
        self.during = lambda: None

    def list(self, level, **options):
        self.lists += 1
        return super().list(level, **options)

    def put(self, *arguments, **options):
        info = super().put(*arguments, **options)
        self.during()
        return info


def file(txid: int, writer: int) -> OutFile:
    page = writer.to_bytes(8, "big") * 64
    return OutFile(0, TXID(txid), TXID(txid), 0, encode_file(Header(512, 1, TXID(txid), TXID(txid), 0, node_id=writer), [(1, page)]))


def opened(client: MemoryClient, clock: Time, writer: int, lease: Lease | None = None) -> Replica:
    replica = Replica(client, writer=writer, clock=clock, lease=lease, reread_s=150.0)
    replica.join(LINEAGE, replica.open(), known_txid=0)
    return replica


def append(replica: Replica) -> None:
    replica.store([file(replica.txid + 1, replica.writer)], TXID(replica.txid + 1))


def merge_and_delete(client: MemoryClient, last: int) -> None:
    """What compaction and retention make of raw files up to a TXID."""
    client.put(1, TXID(1), TXID(last), b"merged", timestamp_ms=0)
    client.delete([FileInfo(0, TXID(txid), TXID(txid), 0, created_at(0)) for txid in range(1, last + 1)])


@pytest.mark.parametrize("frozen", [False, True], ids=["stopped", "frozen"])
def test_a_slot_that_is_free_again_does_not_count_after_a_pause(frozen):
    client, clock = Listing(), Time()
    sleeper = opened(client, clock, 1)
    append(sleeper)
    other = opened(client, clock, 2)
    for _ in range(3):
        append(other)
    merge_and_delete(client, 3)
    clock.pass_s(200, frozen=frozen)
    with pytest.raises(Fenced, match="while this one slept"):
        append(sleeper)
    assert sleeper.txid == 1
    assert [info.max_txid for info in client.list(0)] == [4]  # nothing of it was written there


def test_a_request_that_takes_too_long_does_not_count_either():
    client, clock = Listing(), Time()
    sleeper = opened(client, clock, 1)
    append(sleeper)
    other = opened(client, clock, 2)
    for _ in range(3):
        append(other)
    merge_and_delete(client, 3)
    client.during = lambda: clock.pass_s(200)
    with pytest.raises(Fenced, match="while this one slept"):
        append(sleeper)
    assert sleeper.txid == 1


def test_what_was_stored_without_a_reply_is_ours_however_late_it_is_tried_again():
    client, clock = Listing(), Time()
    replica = opened(client, clock, 1)
    append(replica)

    def lose_the_reply() -> None:
        raise StorageUnavailable("reply lost")

    client.during = lose_the_reply
    with pytest.raises(StorageUnavailable):
        append(replica)
    client.during = lambda: None
    clock.pass_s(500)
    append(replica)
    assert replica.txid == 2
    # What goes on behind it, as a full image does, finds it there, too.
    client.during = lose_the_reply
    with pytest.raises(StorageUnavailable):
        append(replica)
    client.during = lambda: None
    clock.pass_s(500)
    replica.store([file(7, 1)], TXID(7))
    assert replica.txid == 7


def test_a_busy_writer_lists_nothing_and_an_idle_one_once():
    client, clock = Listing(), Time()
    replica = opened(client, clock, 1)
    client.lists = 0
    for _ in range(20):
        append(replica)
        clock.pass_s(100)
    assert client.lists == 0
    clock.pass_s(100_000)
    append(replica)
    append(replica)
    assert (client.lists, replica.txid) == (1, 22)


def test_with_a_lease_nothing_counts_once_another_has_it():
    client, clock = Listing(), Time()
    lease = Lease(client, ttl_s=10, clock=clock, owner="here:1", background=False)
    lease.acquire()
    replica = opened(client, clock, 1, lease)
    append(replica)
    another = Lease(client, ttl_s=10, clock=clock, owner="there:2", background=False)
    with pytest.raises(Exception, match="held by here:1"):
        another.acquire()
    clock.pass_s(11)
    another.acquire()
    with pytest.raises(LeaseLost, match="there:2"):
        append(replica)
    assert [info.max_txid for info in client.list(0)] == [1]


def test_an_owner_that_slept_past_its_lease_lists_the_replica_before_anything_counts():
    client, clock = Listing(), Time()
    lease = Lease(client, ttl_s=10, clock=clock, owner="here:1", background=False)
    lease.acquire()
    replica = opened(client, clock, 1, lease)
    append(replica)
    client.lists = 0
    clock.pass_s(9)  # over for this owner, and nobody has it
    append(replica)
    append(replica)
    assert (client.lists, replica.txid) == (1, 3)


def test_a_lease_that_is_lost_during_the_request_makes_it_count_for_nothing():
    client, clock = Listing(), Time()
    lease = Lease(client, ttl_s=10, clock=clock, owner="here:1", background=False)
    lease.acquire()
    replica = opened(client, clock, 1, lease)
    another = Lease(client, ttl_s=10, clock=clock, owner="there:2", background=False)
    with pytest.raises(Exception, match="held by here:1"):
        another.acquire()

    def sleep() -> None:
        clock.pass_s(11)
        another.acquire()

    client.during = sleep
    with pytest.raises(LeaseLost):
        append(replica)
    assert replica.txid == 0


def test_a_store_that_ignores_conditions_is_no_place_for_a_lease():
    class Ignores(MemoryClient):
        def put_control(self, name, data, **conditions):
            return super().put_control(name, data)

    clock = Time()
    lease = Lease(MemoryClient(), clock=clock, background=False)  # elsewhere, where conditions hold
    lease.acquire()
    with pytest.raises(ConditionsIgnored):
        opened(Ignores(), clock, 1, lease)


def test_files_tell_owner_and_generation_where_the_store_has_a_place_for_it():
    client, clock = Listing(), Time()
    lease = Lease(client, ttl_s=10, clock=clock, owner="h\u00f6st:1", background=False)
    number = (lease.acquire() << 40) | 5
    append(opened(client, clock, number, lease))
    stored = client.metadata(next(client.list(0)))
    assert (stored["pyrepl-owner"], stored["pyrepl-generation"], stored["pyrepl-writer"]) == ("h_st:1", "1", f"{number:016x}")
