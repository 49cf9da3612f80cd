"""Members and their store, with a replicator that does nothing but fail or hang as it is told."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from replicator.api import Disturbed, ReplicaStatus, Status
from replicator.errors import DatabaseStateError, LineageMismatch, ReplicatorError, StorageUnavailable, WaitTimeout
from replicator.format.ltx import TXID
from replicator.store import Limits, Member, Prepared, Store, stop_all


class Fake:
    """Stands for a `Replicator`."""

    def __init__(self, path: Path, *failures: Exception) -> None:
        self.path, self.failures = path, list(failures)
        self.state = "stopped"
        self.hangs: threading.Event | None = None
        self.started = threading.Event()
        self.close_error: ReplicatorError | None = None

    def start(self) -> None:
        self.started.set()
        if self.hangs is not None:
            self.hangs.wait(20)
        if self.failures:
            raise self.failures.pop(0)
        self.state = "replicating"

    def status(self) -> Status:
        return Status(self.path, self.state, TXID(7), 0, 0, 0.0, None, ())  # type: ignore[arg-type]

    def close(self, timeout_s: float, *, retry_interval_s: float = 0.5) -> None:
        self.state = "stopped"
        if self.close_error is not None:
            raise self.close_error


def member(name: str, *failures: Exception) -> tuple[Member, list[Fake]]:
    made: list[Fake] = []

    def prepare() -> Prepared:
        made.append(Fake(Path("/d") / name, *(failures if not made else ())))
        return Prepared(made[-1], [])  # type: ignore[arg-type]

    return Member(Path("/d") / name, prepare), made


def until(store: Store, member: Member, state: str) -> None:
    end = time.monotonic() + 10
    while member.state != state:
        assert time.monotonic() < end, member.state
        store.wait_until_tried(0.01)
        time.sleep(0.001)


def mismatch() -> LineageMismatch:
    return LineageMismatch("file:///r", expected="a", got="b")


def test_one_that_hangs_or_fails_holds_up_nobody() -> None:
    hanging, (stuck,) = member("hanging")
    stuck.hangs = threading.Event()
    failing, _ = member("failing", DatabaseStateError("not ready"))
    good, _ = member("good")
    store = Store([hanging, failing, good])
    store.start()
    until(store, good, "replicating")
    assert not store.wait_until_tried(0)
    stuck.hangs.set()
    until(store, hanging, "replicating")
    assert store.wait_until_tried(10)
    assert (failing.state, str(failing.error)) == ("waiting", "not ready")
    assert store.close(1) == {}
    assert {good.state, hanging.state, failing.state} == {"stopped"}


def test_what_fails_for_now_is_tried_again_and_what_fails_for_good_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("replicator.member.RETRY_S", 0.01)
    later, _ = member("later", StorageUnavailable("away"), StorageUnavailable("away"))
    never, made = member("never", mismatch())
    store = Store([later, never])
    store.start()
    until(store, later, "replicating")
    until(store, never, "failed")
    assert not store.is_over
    store.remove(later.path, 1)
    assert store.is_over
    assert never.start(again=True)
    assert (never.state, never.error, len(made)) == ("replicating", None, 1)
    store.close(1)


def test_without_retry_one_try_is_all() -> None:
    once, _ = member("once", StorageUnavailable("away"))
    tried = threading.Event()
    store = Store([once], retry=False, on_change=tried.set)
    store.start()
    assert tried.wait(10)
    assert store.is_over
    store.close(1)


def test_start_and_stop_say_what_they_did() -> None:
    found, made = member("a")
    assert (found.start(), found.start(), found.state, found.txid) == (True, False, "replicating", 7)
    assert (found.stop(1), found.stop(1), found.state, found.txid) == (True, False, "stopped", 7)
    assert not found.start()  # nobody wants it
    assert found.start(again=True)
    assert len(made) == 2  # a replicator is used once
    found.stop(1)


def test_one_that_ended_for_good_can_be_started_anew() -> None:
    found, made = member("a")
    found.start()
    made[0].state, made[0].close_error = "failed", mismatch()
    assert found.state == "failed"
    assert found.start(again=True)
    assert (found.state, len(made)) == ("replicating", 2)
    found.stop(1)


def test_what_was_not_stored_is_returned_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    good, _ = member("good")
    bad, (fake,) = member("bad")
    fake.close_error = WaitTimeout("file:///r has TXID 1")
    good.start()
    bad.start()
    with caplog.at_level(logging.ERROR):
        errors = stop_all([good, bad], 1)
    assert {path.name: str(error) for path, error in errors.items()} == {"bad": str(fake.close_error)}
    assert "not everything was stored db=/d/bad" in caplog.text
    assert bad.state == "stopped"


def test_stopping_is_bounded_when_a_start_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("replicator.store.GRACE_S", 2.0)
    hanging, (stuck,) = member("hanging")
    stuck.hangs = threading.Event()
    store = Store([hanging])
    store.start()
    assert stuck.started.wait(10)
    began = time.monotonic()
    errors = store.close(0.1)
    assert time.monotonic() - began < 5
    assert "is being started or stopped" in str(errors[hanging.path])
    stuck.hangs.set()


def test_registering_twice_and_after_the_end(tmp_path: Path) -> None:
    store = Store()
    first, _ = member("a")
    assert store.add(first)
    assert not store.add(member("a")[0])
    assert store.get(Path("/d/x/../a")) is first
    assert store.remove(Path("/d/a"), 1) is first
    assert store.remove(Path("/d/a"), 1) is None
    store.close(1)
    with pytest.raises(DatabaseStateError, match="stopping"):
        store.add(member("b")[0])


def test_exchange_stops_before_it_starts() -> None:
    old, _ = member("a")
    new, _ = member("a")
    store = Store([old])
    store.start()
    until(store, old, "replicating")
    store.exchange([old], [new], 1)
    assert old.state == "stopped"
    until(store, new, "replicating")
    assert store.members() == [new]
    store.close(1)


class Quiet(Fake):
    """One that nobody writes to. It leaves when it is asked, and comes again at once; or cannot leave, because its replica does not answer."""

    def __init__(self, path: Path, *, idle_s: float, can_leave: bool) -> None:
        super().__init__(path)
        self._idle_s, self._can_leave = idle_s, can_leave

    def idle_s(self) -> float:
        return self._idle_s

    def size_bytes(self) -> int:
        return 0

    def is_at_rest(self, quiet_s: float) -> bool:
        return self._can_leave

    def rest(self, *, quiet_s: float) -> None:
        if self._can_leave:
            raise Disturbed("somebody came")


def test_those_that_cannot_leave_do_not_keep_the_others_from_taking_turns(tmp_path: Path) -> None:
    """Six of eight places are held by databases that are the first choice each time, and stay."""
    begun: Counter[int] = Counter()

    def quiet(number: int) -> Member:
        path, stays = tmp_path / f"{number}.db", number < 6

        def prepare() -> Prepared:
            begun[number] += 1
            return Prepared(Quiet(path, idle_s=1000 if stays else 10, can_leave=not stays), [])  # type: ignore[arg-type]

        return Member(path, prepare, folder=tmp_path / f".{number}", checked=True)

    store = Store([quiet(number) for number in range(12)], limits=Limits(park_after_s=1000, hot=8))
    store.start()
    end = time.monotonic() + 20
    while not all(begun[number] >= (1 if number < 6 else 2) for number in range(12)):
        assert time.monotonic() < end, begun
        assert sum(member.is_hot for member in store.members()) <= 8
        store.wait_until_tried(0.01)
        time.sleep(0.001)
    assert all(begun[number] == 1 for number in range(6))
    store.close(1)


class Storing(Fake):
    """One that has stored everything at the `tries`-th wait."""

    def __init__(self, path: Path, tries: int, *errors: str | None) -> None:
        super().__init__(path)
        self.tries, self.errors, self.waits = tries, list(errors), list[float]()

    def wait(self, *, timeout_s: float) -> TXID:
        self.waits.append(timeout_s)
        if len(self.waits) < self.tries:
            raise WaitTimeout("the last commits are not read yet")
        return TXID(7)

    def status(self) -> Status:
        replica = ReplicaStatus("file:///r", "file", TXID(0), None, 0.0, self.errors[len(self.waits) - 1], 0, 0)
        return Status(self.path, "replicating", TXID(7), 0, 0, 0.0, None, (replica,))


def storing(tmp_path: Path, fake: Storing, *, patient: bool) -> Member:
    path = tmp_path / "a.db"
    path.write_bytes(bytes(100 << 10))
    found = Member(path, lambda: Prepared(fake, []))  # type: ignore[arg-type]
    found.start()
    found.store(10, patient=patient)
    return found


def test_what_is_large_and_fails_nowhere_is_waited_for_beyond_the_limit(tmp_path: Path) -> None:
    fake = Storing(tmp_path, 4, None, None, None)
    assert storing(tmp_path, fake, patient=True).error is None
    assert fake.waits[:1] == [10]
    assert len(fake.waits) == 4


def test_who_is_not_patient_waits_for_the_limit_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("replicator.member.time", SimpleNamespace(monotonic=itertools.count(0, 5).__next__))
    fake = Storing(tmp_path, 100, *[None] * 100)
    assert isinstance(storing(tmp_path, fake, patient=False).error, WaitTimeout)
    assert len(fake.waits) < 4


def test_patience_ends_with_an_error_and_with_the_size_of_the_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Storing(tmp_path, 100, None, "unreachable")
    assert isinstance(storing(tmp_path, fake, patient=True).error, WaitTimeout)
    assert len(fake.waits) == 2
    monkeypatch.setattr("replicator.member.SLOWEST_BYTES_S", 1 << 10)  # so that 100 KiB are worth 100 s
    monkeypatch.setattr("replicator.member.time", SimpleNamespace(monotonic=itertools.count(0, 5).__next__))
    fake = Storing(tmp_path, 100, *[None] * 100)
    assert isinstance(storing(tmp_path, fake, patient=True).error, WaitTimeout)
    assert 8 < len(fake.waits) < 24
