"""The lease object, the decisions about it, and the engine around them: clocks, conditions, and replies that are lost."""

from __future__ import annotations

import json
import math
import os
import threading
import time
from dataclasses import replace

import pytest

from replicator.clock import Moment
from replicator.errors import (
    ConditionsIgnored,
    ConfigError,
    FormatError,
    LeaseError,
    LeaseHeld,
    LeaseLost,
    PreconditionFailed,
    StorageUnavailable,
)
from replicator.format.lock import LockRecord, decode_lock, token_of, writer_number
from replicator.lease import Lease, LeaseTerms, read_lock, release_lock
from replicator.storage.memory import MemoryClient
from replicator.tenure import Sighting, Term, is_in_force, renewal_due_in_s, sighted, successor, wait_s

START = 1_790_000_000.0


class Time:
    """A clock that is set by hand. `frozen`: seconds for which the steady one stood still."""

    def __init__(self, wall: float = START) -> None:
        self.steady, self.wall = 0.0, wall

    def now(self) -> Moment:
        return Moment(self.steady, self.wall)

    def pass_s(self, seconds: float) -> None:
        self.steady += seconds
        self.wall += seconds


class Unreliable(MemoryClient):
    """Fails the next writes of the lease: before they arrive, or after."""

    def __init__(self) -> None:
        super().__init__()
        self.fails: list[str] = []
        self.puts = 0

    def put_control(self, name, data, **conditions):
        self.puts += name == "lock.json"
        how = self.fails.pop(0) if self.fails and name == "lock.json" else ""
        if how == "before":
            raise StorageUnavailable("lost on the way")
        etag = super().put_control(name, data, **conditions)
        if how == "after":
            raise StorageUnavailable("reply lost")
        if how == "twice":  # the store got it twice, and answered the second one
            raise PreconditionFailed(name)
        return etag


def lease_of(client, clock=None, **options) -> Lease:
    return Lease(client, clock=clock or Time(), background=False, **{"ttl_s": 10.0, "owner": "here:1", **options})


# -- the object ------------------------------------------------------------------------------------------------------------------


def test_the_object_is_litestreams_with_a_mapping_of_ours():
    record = LockRecord(7, START + 0.25, "host:1", "0123456789abcdef", 3, 30.0)
    fields = json.loads(record.encode())
    assert (fields["generation"], fields["owner"], fields["expires_at"]) == (7, "host:1", "2026-09-21T14:13:20.250000Z")
    assert set(fields) == {"generation", "owner", "expires_at", "pyrepl"}
    assert decode_lock(record.encode()) == record


def test_litestreams_own_object_is_read_with_its_ttl():
    record = decode_lock(b'{"generation":1,"expires_at":"2026-11-24T10:00:30.123456789+01:00","owner":"host:9"}')
    assert (record.generation, record.owner, record.ttl_s, record.instance, record.released) == (1, "host:9", 30.0, "", False)
    assert record.expires.isoformat() == "2026-11-24T09:00:30.123457+00:00"


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "null", "7", '{"generation":1}', '{"generation":true,"expires_at":"2026-01-01T00:00:00Z","owner":"x"}',
        '{"generation":-1,"expires_at":"2026-01-01T00:00:00Z","owner":"x"}', '{"generation":1,"expires_at":"soon","owner":"x"}',
        '{"generation":1,"expires_at":5,"owner":"x"}', '{"generation":1,"expires_at":"2026-01-01T00:00:00Z","owner":null}',
        '{"generation":1,"expires_at":"2026-01-01T00:00:00Z","owner":"x","pyrepl":[]}',
        '{"generation":1,"expires_at":"2026-01-01T00:00:00Z","owner":"x","pyrepl":{"ttl_ms":"1"}}',
        '{"generation":1,"expires_at":"2026-01-01T00:00:00Z","owner":"x","pyrepl":{"ttl_ms":NaN}}',
        '{"generation":1,"expires_at":"2026-01-01T00:00:00Z","owner":"x","pyrepl":{"released":1}}',
        '{"generation":1,"expires_at":"2026-13-01T00:00:00Z","owner":"x"}', "[" * 100_000,
    ],
)  # fmt: skip
def test_what_is_no_lease_object_is_refused(text):
    with pytest.raises(FormatError, match="not a lease object"):
        decode_lock(text.encode())


def test_a_hostile_object_cannot_ask_for_more_than_an_hour_or_write_to_the_terminal():
    text = '{"generation":1,"expires_at":"2026-01-01T00:00:00Z","owner":"a\\u001b[2Jb\\n","pyrepl":{"ttl_ms":9e11}}'
    assert (decode_lock(text.encode()).ttl_s, decode_lock(text.encode()).owner) == (3600.0, "a[2Jb")


def test_a_writers_number_carries_the_token_and_is_never_zero():
    assert token_of(writer_number(5, 123)) == 5
    assert token_of(writer_number(0, 0)) == 0
    assert writer_number(0, 0) == 1
    assert token_of(writer_number(1 << 23, 9)) == 1  # never "no lease"
    assert writer_number((1 << 23) - 1, (1 << 40) - 1) < 1 << 63


# -- decisions -------------------------------------------------------------------------------------------------------------------


def test_an_observer_counts_on_its_own_steady_clock_from_when_it_saw_the_object():
    record = LockRecord(1, START - 1000, "other:1", "f" * 16, 1, 10.0)  # its deadline is long over, by our wall clock
    seen = sighted(None, "e1", record, Moment(50.0, START))
    assert wait_s(seen, Moment(50.0, START)) == 10.0
    assert wait_s(seen, Moment(59.0, START + 90_000)) == 1.0
    assert wait_s(seen, Moment(60.0, START - 90_000)) == 0.0
    assert sighted(seen, "e1", record, Moment(55.0, START)) is seen
    renewed = replace(record, serial=2)
    assert sighted(seen, "e2", renewed, Moment(55.0, START)) == Sighting("e2", renewed, Moment(55.0, START))
    # Whoever asks for it is not its owner, and may not keep others waiting. But what it wrote is what must be replaced.
    marked = replace(record, wanted_by="me:3")
    assert sighted(seen, "e3", marked, Moment(55.0, START)) == Sighting("e3", marked, Moment(50.0, START))
    litestreams = LockRecord(1, START, "other:1")
    again = sighted(Sighting("e1", litestreams, Moment(50.0, START)), "e2", litestreams, Moment(55.0, START))
    assert again.since == Moment(55.0, START)


def test_what_is_released_or_of_a_dead_predecessor_is_free_at_once():
    record = LockRecord(1, START, "other:1", "f" * 16, 1, 10.0)
    now = Moment(0.0, START)
    assert wait_s(sighted(None, "e", record, now), now, ["f" * 16]) == 0.0
    assert wait_s(sighted(None, "e", LockRecord(1, START, "o", "f" * 16, 1, 10.0, True), now), now) == 0.0
    litestream = LockRecord(1, START, "other:1")
    assert wait_s(sighted(None, "e", litestream, now), now, [""]) == 30.0


@pytest.mark.fault("F46")
def test_an_owner_counts_by_the_longer_of_its_clocks_and_stops_before_an_observer_begins():
    term = Term("e", LockRecord(1, START + 10, "here:1", "a" * 16, 1, 10.0), Moment(0.0, START))
    assert is_in_force(term, Moment(7.9, START + 7.9))
    assert not is_in_force(term, Moment(8.0, START + 8.0))
    assert not is_in_force(term, Moment(0.1, START + 60))  # frozen: only the wall clock tells
    assert not is_in_force(term, Moment(60, START - 60))
    assert renewal_due_in_s(term, Moment(1.0, START + 1)) == pytest.approx(10 / 3 - 1)
    assert renewal_due_in_s(term, Moment(9.0, START)) == 0.0


def test_a_successor_has_a_higher_generation_than_anyone_before():
    now = Moment(0.0, START)
    before = LockRecord(4, 0.0, "other:1")
    assert successor(before, floor=9, owner="me", instance="a" * 16, ttl_s=5.0, now=now).generation == 10
    assert successor(before, floor=0, owner="me", instance="a" * 16, ttl_s=5.0, now=now).generation == 5
    assert successor(None, floor=0, owner="me", instance="a" * 16, ttl_s=5.0, now=now) == LockRecord(1, START + 5, "me", "a" * 16, 1, 5.0)


# -- the engine ------------------------------------------------------------------------------------------------------------------


def test_one_of_two_gets_it_and_the_other_after_a_ttl_without_renewal():
    store, clock = MemoryClient(), Time()
    mine, theirs = lease_of(store, clock), lease_of(store, clock, owner="there:2")
    assert mine.acquire() == 1
    with pytest.raises(LeaseHeld) as held:
        theirs.acquire()
    assert (held.value.owner, held.value.generation, held.value.wait_s) == ("here:1", 1, 10.0)
    clock.pass_s(6.0)
    mine.renew()
    clock.pass_s(6.0)
    with pytest.raises(LeaseHeld) as held:
        theirs.acquire()
    assert held.value.wait_s == 10.0  # it has changed since
    clock.pass_s(10.0)
    assert theirs.acquire() == 2
    with pytest.raises(LeaseLost) as lost:
        mine.confirm()
    assert (lost.value.owner, lost.value.generation) == ("there:2", 2)
    assert (mine.status().state, mine.status().owner, theirs.status().state) == ("lost", "there:2", "held")


@pytest.mark.fault("F4")
def test_an_owner_whose_time_is_over_asks_before_it_acts_and_goes_on_when_nobody_took_it():
    clock = Time()
    lease = lease_of(MemoryClient(), clock)
    lease.acquire()
    clock.pass_s(500)
    assert lease.status().state == "expired"
    assert lease.confirm() == 1
    assert (lease.status().state, lease.lapses) == ("held", 1)


def test_an_owner_that_cannot_ask_does_not_act():
    client, clock = Unreliable(), Time()
    lease = lease_of(client, clock)
    lease.acquire()
    clock.pass_s(7.0)
    client.fails = ["before"] * 4
    assert lease.confirm() == 1  # still in force
    clock.pass_s(2.0)
    with pytest.raises(StorageUnavailable):
        lease.confirm()
    client.fails = []
    assert lease.confirm() == 1


@pytest.mark.parametrize("how", ["after", "twice"])
def test_a_reply_that_is_lost_is_resolved_by_reading_back(how):
    client, clock = Unreliable(), Time()
    lease = lease_of(client, clock)
    client.fails = [how]
    assert lease.acquire() == 1
    clock.pass_s(4.0)
    client.fails = [how]
    lease.renew()
    assert (client.puts, lease.status().state, lease.lapses) == (2, "held", 0)
    client.fails = [how]
    lease.release()
    assert client.puts == 3
    found = read_lock(client)
    assert found is not None
    assert found[1].released
    assert lease_of(client, clock, owner="there:2").acquire() == 2


def test_a_request_that_is_lost_changes_nothing_and_is_tried_again_by_the_caller():
    client = Unreliable()
    lease = lease_of(client)
    client.fails = ["before"]
    with pytest.raises(StorageUnavailable):
        lease.acquire()
    assert read_lock(client) is None
    assert lease.acquire() == 1


def test_the_time_counts_from_before_the_request_that_is_in_force_was_sent():
    clock = Time()

    class Slow(MemoryClient):
        def put_control(self, name, data, **conditions):
            etag = super().put_control(name, data, **conditions)
            if name == "lock.json":
                clock.pass_s(7.5)
            return etag

    lease = lease_of(Slow(), clock)
    lease.acquire()
    clock.pass_s(0.4)
    assert lease.status().state == "held"
    clock.pass_s(0.2)
    assert lease.status().state == "expired"


def test_a_listener_is_told_once_and_others_take_over_only_what_they_saw():
    store, clock, told = MemoryClient(), Time(), []
    lease = lease_of(store, clock)
    forget = lease.on_loss(lambda error: told.append(("first", type(error))))
    lease.on_loss(lambda error: told.append(("second", type(error))))
    lease.acquire()
    forget()
    release_lock(store, force=True, clock=clock)
    with pytest.raises(LeaseLost):
        lease.renew()
    with pytest.raises(LeaseLost):
        lease.renew()
    assert told == [("second", LeaseLost)]


def test_a_listener_that_fails_does_not_keep_the_others_from_knowing():
    store, told = MemoryClient(), []

    def fails(error):
        raise ValueError("a defect of the application")

    lease = lease_of(store)
    lease.on_loss(fails)
    lease.on_loss(told.append)
    lease.acquire()
    release_lock(store, force=True)
    with pytest.raises(LeaseLost, match="it was released from outside"):
        lease.renew()
    assert len(told) == 1


def test_a_released_lease_keeps_its_generation_and_a_removed_object_begins_anew_above_what_was_seen():
    store, clock = MemoryClient(), Time()
    first = lease_of(store, clock)
    first.acquire()
    first.release()
    second = lease_of(store, clock, owner="there:2")
    assert second.acquire() == 2
    store.delete_control("lock.json")  # as Litestream releases
    with pytest.raises(LeaseLost, match="the object was removed"):
        second.renew()
    assert second.acquire() == 3


@pytest.mark.fault("F37")
def test_a_store_that_ignores_conditions_is_refused():
    class Ignores(MemoryClient):
        def put_control(self, name, data, **conditions):
            return super().put_control(name, data)

    client = Ignores()
    with pytest.raises(ConditionsIgnored, match="ignores conditional writes"):
        lease_of(client).acquire()
    assert read_lock(client) is None


def test_an_unreadable_object_is_an_error_with_a_way_out():
    store = MemoryClient()
    store.put_control("lock.json", b"\x00garbage")
    with pytest.raises(LeaseError, match="unreadable lease"):
        lease_of(store).acquire()
    with pytest.raises(LeaseError, match="unreadable lease"):
        release_lock(store, force=False)
    release_lock(store, force=True)
    assert lease_of(store).acquire() == 1


def test_release_from_outside_waits_for_the_deadline_unless_forced():
    store, clock = MemoryClient(), Time()
    lease_of(store, clock).acquire()
    with pytest.raises(LeaseHeld):
        release_lock(store, force=False, clock=clock)
    clock.pass_s(10.0)
    before = release_lock(store, force=False, clock=clock)
    assert before is not None
    assert before.owner == "here:1"
    assert lease_of(store, clock, owner="there:2").acquire() == 2
    assert release_lock(MemoryClient(), force=False) is None


def test_a_dead_predecessors_lease_is_free_and_another_instance_of_the_same_owner_is_not():
    store, clock = MemoryClient(), Time()
    dead = lease_of(store, clock, instance="d" * 16)
    dead.acquire()
    again = lease_of(store, clock)
    with pytest.raises(LeaseHeld):
        again.acquire()
    assert again.acquire(predecessors=["d" * 16]) == 2


def test_it_renews_itself_in_the_background_and_stops_when_closed():
    client = Unreliable()
    lease = Lease(client, ttl_s=1.0)
    lease.acquire()
    thread = lease._thread
    assert thread is not None
    seen, end = client.get_control("lock.json").etag, time.monotonic() + 20
    while client.get_control("lock.json").etag == seen:
        assert time.monotonic() < end
        thread.join(0.01)
    assert thread.is_alive()
    lease.close()
    assert not thread.is_alive()
    assert lease.status().state == "released"


def test_a_forked_child_does_not_release_its_parents_lease(monkeypatch):
    store = MemoryClient()
    lease = lease_of(store)
    lease.acquire()
    with monkeypatch.context() as patched:
        patched.setattr(os, "getpid", lambda: 1)
        lease.close()
    found = read_lock(store)
    assert found is not None
    assert not found[1].released


def test_one_that_was_lost_and_acquired_again_by_a_listener_is_renewed_as_before():
    client = Unreliable()
    lease = Lease(client, ttl_s=1.0)
    again = threading.Event()

    def acquire(error):
        lease.acquire()
        again.set()

    lease.on_loss(acquire)  # called by the very thread that renews
    lease.acquire()
    release_lock(client, force=True)
    assert again.wait(20)
    puts, end = client.puts, time.monotonic() + 20
    while client.puts < puts + 2:
        assert time.monotonic() < end
        time.sleep(0.01)
    lease.close()


# -- handing over ----------------------------------------------------------------------------------------------------------------


def test_who_asks_for_it_is_named_to_the_owner_at_its_next_renewal():
    store, clock, told = MemoryClient(), Time(), []
    mine, theirs = lease_of(store, clock), lease_of(store, clock, owner="there:2")
    assert not theirs.request()  # nobody has it
    mine.acquire()
    mine.on_request(told.append)
    assert theirs.request()
    assert theirs.request()  # once is enough
    assert theirs.status().wanted_by == "there:2"
    assert not told
    mine.renew()
    mine.renew()
    assert told == ["there:2"]
    assert (mine.status().state, mine.status().wanted_by, mine.lapses) == ("held", "there:2", 0)
    later: list[str] = []
    mine.on_request(later.append)
    assert later == ["there:2"]
    mine.release()
    assert theirs.acquire() == 2
    assert theirs.status().wanted_by == ""


def test_asking_gives_no_right_and_does_not_keep_others_waiting():
    store, clock = MemoryClient(), Time()
    mine, theirs, third = lease_of(store, clock), lease_of(store, clock, owner="there:2"), lease_of(store, clock, owner="there:3")
    mine.acquire()
    with pytest.raises(LeaseHeld):
        third.acquire()
    clock.pass_s(6.0)
    assert theirs.request()
    with pytest.raises(LeaseHeld) as held:
        theirs.acquire()
    assert held.value.wait_s == 10.0
    with pytest.raises(LeaseHeld) as held:
        third.acquire()
    assert held.value.wait_s == 4.0
    theirs.withdraw()
    third.withdraw()  # of what it did not ask
    clock.pass_s(4.0)
    assert third.acquire() == 2
    with pytest.raises(LeaseLost, match="there:3"):
        mine.confirm()


def test_an_owner_that_releases_at_the_moment_in_which_somebody_asks_has_released():
    store, clock = MemoryClient(), Time()
    mine, theirs = lease_of(store, clock), lease_of(store, clock, owner="there:2")
    mine.acquire()
    theirs.request()  # the owner's etag is an old one now
    mine.release()
    assert theirs.acquire() == 2


def test_what_litestream_holds_cannot_be_asked_for():
    store = MemoryClient()
    held = b'{"generation":1,"expires_at":"2026-11-24T10:00:30Z","owner":"host:9"}'
    store.put_control("lock.json", held)
    with pytest.raises(LeaseError, match=r"Litestream's \(host:9\)"):
        lease_of(store).request()
    assert store.get_control("lock.json").data == held


@pytest.mark.parametrize("arrives", [False, True])
def test_after_a_release_without_a_reply_nothing_is_acknowledged(arrives):
    client, clock = Unreliable(), Time()
    lease = lease_of(client, clock)
    lease.acquire()
    late: list[tuple[bytes, dict[str, object]]] = []

    original = client.put_control

    def lose(name, data, **conditions):
        late.append((data, conditions))
        if arrives:
            original(name, data, **conditions)
        raise StorageUnavailable("reply lost")

    client.put_control = lose  # type: ignore[method-assign]
    client.get_control = lambda name: (_ for _ in ()).throw(StorageUnavailable("no reply"))  # type: ignore[method-assign]
    with pytest.raises(StorageUnavailable):
        lease.release()
    del client.put_control, client.get_control
    assert lease.status().state == "released"
    with pytest.raises(LeaseLost):
        lease.confirm()
    # It wants it again. A release that is still under way must not end the new term unnoticed.
    assert lease.acquire() == (2 if arrives else 1)
    data, conditions = late[0]
    with pytest.raises(PreconditionFailed):
        client.put_control("lock.json", data, **conditions)
    assert lease.confirm() == lease.generation


@pytest.mark.parametrize("ttl_s", [0.5, 3601, -1, math.nan])
def test_a_ttl_out_of_range_is_a_bad_setting(ttl_s):
    with pytest.raises(ConfigError, match="ttl of a lease must be"):
        LeaseTerms(ttl_s)
    with pytest.raises(ConfigError):
        Lease(MemoryClient(), ttl_s=ttl_s)
