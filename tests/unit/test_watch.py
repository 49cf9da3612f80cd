"""The process's one watcher: who is called, and what happens where events are lost, or not to be had."""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from replicator.inotify import APPEARED, CHANGED, GONE, OVERFLOW, Event, parse_events
from replicator.watch import EVERYTHING, Watch, Watcher, _Watchdog
from tests.e2e.databases import until


class Seen:
    """Collects calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[bytes, int]] = []
        self.threads: set[int] = set()

    def __call__(self, name: bytes, mask: int) -> None:
        self.calls.append((name, mask))
        self.threads.add(threading.get_ident())

    def of(self, mask: int) -> set[bytes]:
        return {name for name, found in self.calls if found & mask}


class Scripted:
    """A source of events that says what it is told."""

    def __init__(self, failure: int = 0) -> None:
        self.failure = failure
        self.report: Callable[[int, int, bytes], None] = lambda number, mask, name: None
        self.running, self.ended = threading.Event(), threading.Event()
        self.folders: list[bytes] = []

    def add(self, folder: bytes) -> int:
        if self.failure:
            raise OSError(self.failure, os.strerror(self.failure), os.fsdecode(folder))
        self.folders.append(folder)
        return len(self.folders)

    def remove(self, watch: int) -> None:
        pass

    def run(self, seen: Callable[[int, int, bytes], None]) -> None:
        self.report = seen
        self.running.set()
        self.ended.wait(20)

    def stop(self) -> None:
        self.ended.set()


def test_events_are_read_as_the_system_lays_them_out() -> None:
    data = (
        (7).to_bytes(4, "little") + (0x100).to_bytes(4, "little") + bytes(4) + (16).to_bytes(4, "little") + b"a.db-wal".ljust(16, b"\0")
        + (-1).to_bytes(4, "little", signed=True) + OVERFLOW.to_bytes(4, "little") + bytes(8)
    )  # fmt: skip
    assert list(parse_events(data)) == [Event(7, 0x100, b"a.db-wal"), Event(-1, OVERFLOW, b"")]


@pytest.mark.parametrize("make", [None, _Watchdog], ids=["inotify", "watchdog"])
def test_each_is_called_for_what_is_his(tmp_path: Path, make: Callable[[], _Watchdog] | None) -> None:
    watcher, one, whole = Watcher(make), Seen(), Seen()
    first, second = watcher.subscribe(tmp_path, (b"a.db", b"a.db-wal"), one), watcher.subscribe(tmp_path, (EVERYTHING,), whole)
    assert first is not None
    assert second is not None
    for name in ("a.db-wal", "b.db", "end"):
        (tmp_path / name).write_bytes(b"x")
    os.unlink(tmp_path / "a.db-wal")
    until(lambda: b"end" in whole.of(APPEARED | CHANGED) and b"a.db-wal" in whole.of(GONE))
    assert {name for name, _ in one.calls} == {b"a.db-wal"}
    assert {name for name, _ in whole.calls} >= {b"a.db-wal", b"b.db", b"end"}
    count = len(one.calls)
    first.close()
    first.close()
    (tmp_path / "a.db-wal").write_bytes(b"y")
    (tmp_path / "end2").write_bytes(b"")
    until(lambda: b"end2" in whole.of(APPEARED | CHANGED))
    assert len(one.calls) == count
    second.close()
    assert watcher.folders == 0


def test_many_folders_have_one_thread(tmp_path: Path) -> None:
    before, watcher, seen = set(threading.enumerate()), Watcher(), Seen()
    subscriptions = []
    for number in range(300):  # more than a user may have inotify instances
        (tmp_path / str(number)).mkdir()
        subscriptions.append(watcher.subscribe(tmp_path / str(number), (b"a",), seen))
    assert all(subscriptions)
    assert len(set(threading.enumerate()) - before) == 1
    for number in range(300):
        (tmp_path / str(number) / "a").touch()
    until(lambda: len(seen.calls) >= 300)
    assert len(seen.threads) == 1
    for subscription in subscriptions:
        assert subscription is not None
        subscription.close()
    until(lambda: set(threading.enumerate()) <= before)


def test_a_folder_that_goes_and_comes_again_is_watched_again(tmp_path: Path) -> None:
    watcher, seen, folder = Watcher(), Seen(), tmp_path / "f"
    folder.mkdir()
    subscription = watcher.subscribe(folder, (b"a",), seen)
    folder.rmdir()
    until(lambda: b"" in seen.of(GONE))
    until(lambda: watcher.folders == 0)
    folder.mkdir()
    assert subscription is not None
    subscription.close()
    subscription = watcher.subscribe(folder, (b"a",), seen)
    (folder / "a").touch()
    until(lambda: b"a" in seen.of(APPEARED))
    assert subscription is not None
    subscription.close()


def test_after_an_overflow_everybody_is_called_once(caplog: pytest.LogCaptureFixture) -> None:
    source = Scripted()
    watcher, seen = Watcher(lambda: source), [Seen() for _ in range(3)]
    subscriptions = [watcher.subscribe(Path(f"/f{number}"), (b"a", b"b"), one) for number, one in enumerate(seen)]
    assert source.running.wait(10)
    source.report(-1, OVERFLOW, b"")
    assert [one.calls for one in seen] == [[(EVERYTHING, OVERFLOW)]] * 3
    assert "file events were lost" in caplog.text
    for subscription in subscriptions:
        assert subscription is not None
        subscription.close()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EMFILE])
def test_where_watches_run_out_that_is_said_once(number: int, caplog: pytest.LogCaptureFixture) -> None:
    watcher = Watcher(lambda: Scripted(number))
    with caplog.at_level(logging.WARNING):
        assert [watcher.subscribe(Path(f"/f{at}"), (b"a",), Seen()) for at in range(5)] == [None] * 5
    assert caplog.text.count("polling instead") == 1


def test_a_defect_of_the_source_ends_events_and_everybody_is_told(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Scripted):
        def run(self, seen: Callable[[int, int, bytes], None]) -> None:
            raise RuntimeError("broken")

    watcher, seen = Watcher(Broken), Seen()
    watcher.subscribe(Path("/f"), (b"a",), seen)
    until(lambda: seen.calls)
    assert seen.calls == [(EVERYTHING, OVERFLOW)]
    assert watcher.subscribe(Path("/g"), (b"a",), seen) is None


def test_a_watch_that_cannot_be_had_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("replicator.watch._shared", Watcher(lambda: Scripted(errno.ENOSPC)))
    watch = Watch(tmp_path / "a.db", lambda: None)
    assert not watch.arm()
    assert not watch.works
