"""Tell when files change, at no cost while they do not: one watcher with one thread for the whole process.

Whoever is interested subscribes to names in a folder, or to everything in it. A folder is watched as long as somebody is subscribed to it.
Subscribers are called by the watcher's thread, and must be quick.

A busy writer causes one or two events for each commit, far more than are of use. So a `Watch` on one database is disarmed by its owner while that
finds something again and again, or is told again and again before its next look: it polls at its own pace then, and arms the watch again when the database has
become quiet. Where the folder stays watched for the
sake of others, the thread reads at most once in `PAUSE_S`, and in `BUSY_PAUSE_S` while there are events of several folders; meanwhile the system makes one
event of equal ones. A commit is several writes: before each reading there is time for all of them, so that it is told once.

**What can be missed.** When the system's queue overflows nobody knows what was in it: every subscriber is called then, once. Where there are no
events to be had (no inotify, no watches left), `subscribe` says so, once in the log, and its caller polls.

Linux has inotify. Elsewhere events come from watchdog, one of its observers for each folder.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

__all__ = ["EVERYTHING", "Subscription", "Watch", "Watcher", "watcher"]

EVERYTHING = b""
"""A subscription to this name is called for all that happens in the folder, and to the folder itself."""

SETTLE_S = 0.001
PAUSE_S, BUSY_PAUSE_S = 0.002, 0.008
LIMITS = (errno.EAGAIN, errno.ENOSPC, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSYS)

log = logging.getLogger(__name__)

Seen = Callable[[bytes, int], None]
"""Called with the name in the folder, and the event's mask (see `inotify`); with `OVERFLOW` when anything may have happened."""


class Subscription:
    """Somebody's interest in names of a folder. `close` ends it."""

    __slots__ = ("_watcher", "folder", "names", "seen")

    def __init__(self, watcher: Watcher, folder: bytes, names: tuple[bytes, ...], seen: Seen) -> None:
        self._watcher, self.folder, self.names, self.seen = watcher, folder, names, seen

    def close(self) -> None:
        """End it. It may be called once more, by what happened at this moment."""
        self._watcher.unsubscribe(self)


class _Source(Protocol):
    """Where events come from. `add` and `remove` are called with the watcher's lock held."""

    def add(self, folder: bytes) -> int: ...

    def remove(self, watch: int) -> None: ...

    def run(self, seen: Callable[[int, int, bytes], None]) -> None: ...

    def stop(self) -> None: ...


class Watcher:
    """All subscriptions of a process, and the thread that calls them. May be used from any thread."""

    def __init__(self, make: Callable[[], _Source] | None = None) -> None:
        """`make`: where events come from; what the system has when not given."""
        self._make = make or (_Inotify if sys.platform.startswith("linux") else _Watchdog)
        self._lock = threading.RLock()
        self._source: _Source | None = None
        self._watches: dict[bytes, int] = {}
        self._folders: dict[int, bytes] = {}
        self._subscribed: dict[bytes, dict[bytes, tuple[Subscription, ...]]] = {}
        self._failed: set[int] = set()
        self.overflows = 0

    @property
    def folders(self) -> int:
        """How many folders are watched."""
        return len(self._watches)

    def subscribe(self, folder: Path, names: tuple[bytes, ...], seen: Seen) -> Subscription | None:
        """Begin to watch names in a folder; None where there are no events to be had: then only polling helps."""
        where = os.fsencode(folder)
        with self._lock:
            number = self._watches.get(where)
            if number is None:
                try:
                    self._watch(where)
                except OSError as error:
                    self._cannot(where, error)
                    return None
            else:
                where = self._folders[number]  # one text for all: of ten thousand folders each is watched for two
            found = Subscription(self, where, names, seen)
            subscribed, alone = self._subscribed.setdefault(where, {}), (found,)
            for name in names:
                subscribed[name] = (*held, found) if (held := subscribed.get(name)) else alone
        return found

    def unsubscribe(self, subscription: Subscription) -> None:
        """End a subscription; ending it twice does nothing."""
        with self._lock:
            names = self._subscribed.get(subscription.folder, {})
            for name in subscription.names:
                if left := tuple(item for item in names.get(name, ()) if item is not subscription):
                    names[name] = left
                else:
                    names.pop(name, None)
            if not names and subscription.folder in self._subscribed:
                del self._subscribed[subscription.folder]
                self._unwatch(subscription.folder)

    def _watch(self, folder: bytes) -> None:
        if self._source is None:
            source = self._make()
            try:
                threading.Thread(target=self._run, args=(source,), name="pyrepl events", daemon=True).start()
            except RuntimeError as error:
                source.stop()
                source.run(lambda watch, mask, name: None)  # ends at once, and lets go of everything
                raise OSError(errno.EAGAIN, str(error)) from error
            self._source = source
        number = self._source.add(folder)
        other = self._folders.get(number)
        if other is not None:  # the same folder under another name: events carry the first one
            raise OSError(errno.EEXIST, f"the same folder as {os.fsdecode(other)}", os.fsdecode(folder))
        self._watches[folder] = number
        self._folders[number] = folder

    def _unwatch(self, folder: bytes) -> None:
        number = self._watches.pop(folder, None)
        if number is not None and self._source is not None:
            self._folders.pop(number, None)
            self._source.remove(number)
        if not self._watches and self._source is not None:
            source, self._source = self._source, None
            source.stop()

    def _cannot(self, folder: bytes, error: OSError) -> None:
        if not self._watches and self._source is not None:
            source, self._source = self._source, None
            source.stop()
        number = error.errno or 0
        if number not in LIMITS:
            log.debug("folder cannot be watched, polling instead folder=%s error=%s", os.fsdecode(folder), error)
        elif number not in self._failed:  # ten thousand lines would say no more
            self._failed.add(number)
            log.warning(
                "no file events for this folder and others, polling instead folder=%s error=%s watched=%d",
                os.fsdecode(folder), error.strerror, len(self._watches),
            )  # fmt: skip

    # -- the thread --------------------------------------------------------------------------------------------------------------

    def _run(self, source: _Source) -> None:
        try:
            source.run(lambda number, mask, name: self._seen(source, number, mask, name))
        except Exception as error:
            log.error("file events end, by a defect; what is watched is polled", exc_info=error)
            with self._lock:
                if self._source is source:
                    self._source = None
                    self._make = _nothing
                    self._watches.clear()
                    self._folders.clear()
            self._all_of(source, everything=True)

    def _seen(self, source: _Source, number: int, mask: int, name: bytes) -> None:
        from replicator.inotify import OVERFLOW, UNWATCHED

        if mask & OVERFLOW:
            self.overflows += 1
            log.warning("file events were lost, everything is looked at once count=%d", self.overflows)
            self._all_of(source)
            return
        with self._lock:
            if source is not self._source:
                return
            folder = self._folders.get(number)
            if folder is None:
                return
            if mask & UNWATCHED:  # the folder is gone; who subscribes again watches what stands there then
                del self._folders[number]
                self._watches.pop(folder, None)
            subscribed = self._subscribed.get(folder, {})
            called = [*subscribed.get(name, ()), *(subscribed.get(EVERYTHING, ()) if name else ())]
            if not name:
                called = list({id(item): item for held in subscribed.values() for item in held}.values())
        for item in called:
            item.seen(name, mask)

    def _all_of(self, source: _Source, *, everything: bool = False) -> None:
        from replicator.inotify import OVERFLOW

        with self._lock:
            if source is not self._source and not everything:
                return
            items = {id(item): item for names in self._subscribed.values() for held in names.values() for item in held}
        for item in items.values():
            item.seen(EVERYTHING, OVERFLOW)


class _Inotify:
    """One inotify instance for all folders."""

    def __init__(self) -> None:
        from replicator.inotify import Inotify

        self._inotify = Inotify()
        try:
            self._ends, self._end = os.pipe()
        except OSError:
            self._inotify.close()
            raise

    def add(self, folder: bytes) -> int:
        return self._inotify.add(folder)

    def remove(self, watch: int) -> None:
        self._inotify.remove(watch)

    def run(self, seen: Callable[[int, int, bytes], None]) -> None:
        poll = select.poll()
        for file in (self._inotify.file, self._ends):
            poll.register(file, select.POLLIN)
        before = frozenset[int]()
        try:
            while not any(file == self._ends for file, _ in poll.poll()):
                time.sleep(SETTLE_S)
                events = list(self._inotify.read())
                for event in events:
                    seen(event.watch, event.mask, event.name)
                folders = frozenset(event.watch for event in events)
                time.sleep(BUSY_PAUSE_S if len(folders | before) > 1 else PAUSE_S)
                before = folders
        finally:
            self._inotify.close()
            os.close(self._ends)

    def stop(self) -> None:
        os.close(self._end)  # the other end becomes readable


class _Watchdog:
    """An observer for each folder."""

    def __init__(self) -> None:
        self._observers: dict[int, Any] = {}
        self._next = 0
        self._ended = threading.Event()
        self._report: Callable[[int, int, bytes], None] = lambda number, mask, name: None

    def add(self, folder: bytes) -> int:
        from watchdog.events import FileSystemEventHandler
        from watchdog.observers import Observer

        number = self._next
        handler = FileSystemEventHandler()
        handler.on_any_event = lambda event: self._on_event(number, folder, event)
        try:
            observer = Observer()
            observer.schedule(handler, os.fsdecode(folder))
            observer.start()
        except RuntimeError as error:
            raise OSError(errno.EMFILE, str(error)) from error
        self._next += 1
        self._observers[number] = observer
        return number

    def _on_event(self, number: int, folder: bytes, event: Any) -> None:
        from replicator.inotify import APPEARED, CHANGED, FOLDER, GONE

        if event.event_type in ("opened", "closed_no_write", "closed"):
            return
        kind = FOLDER if event.is_directory else 0
        gone, here = {"created": (0, APPEARED), "deleted": (GONE, 0), "moved": (GONE, APPEARED)}.get(event.event_type, (CHANGED, 0))
        for path, mask in ((event.src_path, gone or here), (getattr(event, "dest_path", ""), here)):
            folder_of, _, name = os.fsencode(path).rpartition(b"/")
            if path and folder_of == folder and mask:
                self._report(number, mask | kind, name)

    def remove(self, watch: int) -> None:
        observer = self._observers.pop(watch, None)
        if observer is not None:
            with contextlib.suppress(RuntimeError):
                observer.stop()

    def run(self, seen: Callable[[int, int, bytes], None]) -> None:
        self._report = seen
        self._ended.wait()

    def stop(self) -> None:
        for watch in list(self._observers):
            self.remove(watch)
        self._ended.set()


def _nothing() -> _Source:
    raise OSError(errno.ENOSYS, "file events have ended")


_shared: Watcher | None = None
_shared_lock = threading.Lock()


def watcher() -> Watcher:
    """Return the watcher of this process."""
    global _shared
    with _shared_lock:
        if _shared is None:
            _shared = Watcher()
        return _shared


def _in_child() -> None:
    # Its thread is the parent's, and reading its descriptor would take the parent's events.
    global _shared, _shared_lock
    _shared, _shared_lock = None, threading.Lock()


os.register_at_fork(after_in_child=_in_child)


class Watch:
    """A watch on one database's `-wal` file, and on the database file itself."""

    def __init__(self, path: Path, wake: Callable[[], None]) -> None:
        """`wake` is called from another thread, for each event while the watch is armed."""
        name = os.fsencode(path.name)
        self._names = (name, name + b"-wal")
        self._folder = path.parent
        self._wake = wake
        self._subscription: Subscription | None = None
        self.works = True

    @property
    def armed(self) -> bool:
        return self._subscription is not None

    def arm(self) -> bool:
        """Begin to watch. False where events are not to be had (no inotify, limits reached): then only polling helps."""
        if self._subscription is None and self.works:
            self._subscription = watcher().subscribe(self._folder, self._names, self._seen)
            self.works = self._subscription is not None
        return self.armed

    def disarm(self) -> None:
        """Stop watching."""
        subscription, self._subscription = self._subscription, None
        if subscription is not None:
            subscription.close()

    def _seen(self, name: bytes, mask: int) -> None:
        if self._subscription is not None:
            self._wake()
