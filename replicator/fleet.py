"""Directories of databases: find them, and take note of those that come and go.

What a directory holds is found by one walk at the start. With `watch: true` each of its folders is watched before it is read, and what happens in
them from then on is looked at a quarter of a second later, many events at once. An event only says where to look: what stands there by then decides.

| what stands at a path | what happens |
|---|---|
| a database that is not known | it is replicated, as one of the start |
| a known one, by another file or none of a database's | nothing here: its engine finds out, and says what is wrong |
| nothing, where a known one was | it is not replicated any more; its replica stays |
| a folder (`recursive`) | it is walked, and watched |
| anything else | it is skipped, and counted |

Links to folders are not followed, as with the peer; links to files are, and a database that is known by another name is skipped. A folder that cannot be read
is skipped, and looked at again when something happens to it, or when its parent is looked at. Where there are no events to be had the
directory is walked again and again, at most a twentieth of the time.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

from replicator import livefile
from replicator.directories import DirectorySettings
from replicator.errors import ConfigError, ReplicatorError
from replicator.format.sqlite import SQLITE_MAGIC
from replicator.inotify import APPEARED, FOLDER, GONE, OVERFLOW
from replicator.pool import Pool
from replicator.settings import DatabaseSettings
from replicator.store import Member, Store
from replicator.watch import EVERYTHING, Subscription, watcher

__all__ = ["Directories", "Found", "databases_in", "find"]

SETTLE_S = 0.25
RESCAN_S = 5.0
RESCAN_SHARE = 20
REMOVE_TIMEOUT_S = 30.0

log = logging.getLogger(__name__)

Reason = str


class Make(Protocol):
    """Makes the member of a database, not started; `found_in`: the directory that it was found in, whose settings are known to be right."""

    def __call__(self, settings: DatabaseSettings, *, found_in: DirectorySettings | None = None) -> Member: ...


@dataclass(slots=True)
class Found:
    """What a walk has found. `skipped`: paths that match the pattern and are none, and folders that cannot be read, by reason."""

    databases: list[Path] = field(default_factory=list)
    skipped: dict[str, Reason] = field(default_factory=dict)


def find(
    settings: DirectorySettings,
    start: Path | None = None,
    *,
    known: Callable[[Path], bool] = lambda path: False,
    entering: Callable[[Path], None] = lambda folder: None,
) -> Found:
    """Walk a directory, or a folder in it.

    Args:
        known: says of a path that it is a database already; it is not read then.
        entering: called with each folder before it is read.

    Raises:
        OSError: the folder where it starts cannot be read.
    """
    found, seen = Found(), set[tuple[int, int]]()
    queue = [start or settings.path]
    while queue:
        folder = queue.pop()
        try:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            entering(folder)
            with os.scandir(folder) as entries:
                ordered = sorted(entries, key=lambda entry: (entry.is_symlink(), entry.name))  # links last: the real name counts
        except OSError as error:
            if folder == (start or settings.path):
                raise
            found.skipped[os.fspath(folder)] = f"folder cannot be read: {(error.strerror or 'error').lower()}"
            continue
        for entry in ordered:
            if entry.is_dir(follow_symlinks=False):
                if settings.recursive and settings.enters(path := folder / entry.name):
                    queue.append(path)
            elif settings.means(entry.name):
                path = folder / entry.name
                why = "" if known(path) else why_no_database(path)
                if why:
                    found.skipped[os.fspath(path)] = why
                else:
                    found.databases.append(path)
    return found


def why_no_database(path: Path) -> Reason:
    """Return why a file is not a database; an empty string when it is one."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return "not a file"
        return "" if livefile.peek(path, len(SQLITE_MAGIC)) == SQLITE_MAGIC else "not a database"
    except FileNotFoundError:
        return "not a file"
    except OSError as error:
        return f"cannot be read: {(error.strerror or 'error').lower()}"


def databases_in(settings: DirectorySettings) -> list[DatabaseSettings]:
    """Return the settings of the databases that are in a directory now.

    Raises:
        ConfigError: it cannot be read, or has none and is not watched.
    """
    try:
        found = find(settings)
    except OSError as error:
        raise _unreadable(settings, error) from error
    if not found.databases and not settings.watch:
        raise ConfigError(
            f"no SQLite databases found in directory {settings.path} with pattern {settings.pattern}", hint="watch: true waits for them"
        )
    return [settings.database(path) for path in sorted(found.databases)]


def _check(settings: DirectorySettings) -> None:
    """Raise what `databases_in` would; of one that may be empty only the folder itself is read."""
    if not settings.watch:
        databases_in(settings)
        return
    try:
        os.scandir(settings.path).close()
    except OSError as error:
        raise _unreadable(settings, error) from error


def _unreadable(settings: DirectorySettings, error: OSError) -> ConfigError:
    why = (error.strerror or str(error)).lower()
    return ConfigError(f"failed to scan directory {settings.path}: {why}", hint="create it, or correct dir")


class _Directory:
    """One directory that is being replicated.

    Attributes:
        folders: those that events tell of.
        polled: those where there are none to be had.
    """

    def __init__(self, settings: DirectorySettings) -> None:
        self.settings = settings
        self.databases: set[Path] = set()
        self.skipped: dict[str, Reason] = {}
        self.folders: dict[str, Subscription] = {}
        self.polled: set[str] = set()
        self.rescan_at = float("inf")
        self.error = ""


class _Seen:
    """Takes a folder's events down."""

    __slots__ = ("_directory", "_folder", "_note")

    def __init__(self, note: Callable[[_Directory, str, bytes, int], None], directory: _Directory, folder: str) -> None:
        self._note, self._directory, self._folder = note, directory, folder

    def __call__(self, name: bytes, mask: int) -> None:
        self._note(self._directory, self._folder, name, mask)


class Directories:
    """All directories of a store. `apply` at the start and when the configuration has changed, `close` at the end."""

    def __init__(self, store: Store, make: Make) -> None:
        self._store, self._make = store, make
        self._changed = threading.Condition()
        self._directories: list[_Directory] = []
        self._dirty: dict[tuple[_Directory, str, bytes], None] = {}
        self._due = float("inf")
        self._note = self._seen  # one for all
        self._work = threading.Lock()  # one at a time changes what is known
        self._pool = Pool("pyrepl directories", at_once=8)
        self._thread: threading.Thread | None = None
        self._closing = False

    # -- asking ------------------------------------------------------------------------------------------------------------------

    def summary(self) -> list[tuple[Path, int, int, Mapping[str, int]]]:
        """Return of each directory: its path, how many databases and folders it has, and how many paths are skipped for which reason."""
        with self._changed:
            directories = list(self._directories)
        return [
            (
                item.settings.path,
                len(item.databases),
                len(item.folders) + len(item.polled),
                Counter(list(item.skipped.values()) + ([item.error] if item.error else [])),
            )
            for item in directories
        ]

    def databases(self) -> set[Path]:
        """Return the paths of all databases."""
        with self._work:
            return {path for directory in self._directories for path in directory.databases}

    # -- changing what there is --------------------------------------------------------------------------------------------------

    def apply(self, wanted: Sequence[DirectorySettings], *, timeout_s: float = REMOVE_TIMEOUT_S) -> None:
        """Replicate these directories from now on, and no others.

        Raises:
            ConfigError: one cannot be read, has no databases and is not watched, or has wrong settings; nothing is changed then.
        """
        with self._work:
            same = [item for item in self._directories if item.settings in wanted]
            fresh = [_Directory(settings) for settings in wanted if not any(item.settings == settings for item in same)]
            for directory in fresh:
                _check(directory.settings)
                self._make(directory.settings.template).stop(1.0)  # are the settings right?
            for directory in [item for item in self._directories if item not in same]:
                self._forget(directory, timeout_s)
            with self._changed:
                self._directories = same + fresh
            for directory in fresh:
                self._walk(directory)
            if self._thread is None and any(item.settings.watch for item in self._directories):
                self._thread = threading.Thread(target=self._run, name="pyrepl directories", daemon=True)
                self._thread.start()

    def close(self) -> None:
        """Take no note of changes any more. The members belong to the store."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        with self._work:
            for directory in self._directories:
                for subscription in directory.folders.values():
                    subscription.close()

    def _forget(self, directory: _Directory, timeout_s: float) -> None:
        for subscription in directory.folders.values():
            subscription.close()
        directory.folders.clear()
        directory.polled.clear()
        members = [member for path in directory.databases if (member := self._store.get(path)) is not None]
        self._store.exchange(members, [], timeout_s)

    def _walk(self, directory: _Directory, start: Path | None = None) -> None:
        """Find what is in a directory, or in a folder of it, and take what is new. Folders are watched before they are read."""
        settings, began = directory.settings, time.monotonic()
        below = start or settings.path
        was_known = os.fspath(below) in directory.folders
        watch = partial(self._watch, directory) if settings.watch else lambda folder: None
        try:
            found = find(settings, start, known=directory.databases.__contains__, entering=watch)
        except OSError as error:
            self._unreadable(directory, below, error)
            return
        directory.error = ""
        directory.polled.difference_update(found.skipped)  # nobody is told there, and nothing can be seen: its parent's events tell of it
        self._forget_skipped(directory, None if start is None else start, was_known=was_known)
        directory.skipped.update(found.skipped)
        new = [path for path in found.databases if path not in directory.databases]
        self._take(directory, new)
        gone = set()
        if start is None:
            gone = {path for path in directory.databases.difference(found.databases) if _is_missing(path)}
            self._remove(directory, gone)
        took_s = time.monotonic() - began
        directory.rescan_at = time.monotonic() + max(RESCAN_S, took_s * RESCAN_SHARE) if directory.polled else float("inf")
        if new or gone or found.skipped:
            log.log(
                logging.INFO if new or gone or start is None else logging.DEBUG,
                "directory scanned path=%s new=%d gone=%d databases=%d skipped=%d folders=%d",
                below, len(new), len(gone), len(directory.databases), len(directory.skipped), len(directory.folders) + len(directory.polled),
            )  # fmt: skip

    def _forget_skipped(self, directory: _Directory, start: Path | None, *, was_known: bool) -> None:
        """Forget what was skipped where the walk has looked. A folder that is new has nothing; going through all for each would not end."""
        if start is None:
            directory.skipped.clear()
            return
        directory.skipped.pop(os.fspath(start), None)
        if was_known:
            inside = f"{start}/"
            for path in [path for path in directory.skipped if path.startswith(inside)]:
                del directory.skipped[path]

    def _unreadable(self, directory: _Directory, folder: Path, error: OSError) -> None:
        why = f"folder cannot be read: {(error.strerror or 'error').lower()}"
        if folder == directory.settings.path:
            if directory.error != why:
                log.error("directory cannot be read, its databases are kept path=%s error=%r", folder, why)
            directory.error = why
            directory.rescan_at = time.monotonic() + RESCAN_S
        else:
            directory.skipped[os.fspath(folder)] = why
            directory.polled.discard(os.fspath(folder))

    def _take(self, directory: _Directory, paths: Iterable[Path]) -> None:
        members: dict[Path, Member] = {}
        for path in paths:
            try:
                members[path] = self._make(directory.settings.database(path), found_in=directory.settings)
            except ReplicatorError as error:
                directory.skipped[os.fspath(path)] = str(error)
                log.error("cannot replicate db=%s error=%r", path, str(error))
        taken = set(self._store.add_all(members.values()))
        for path, member in members.items():
            if member in taken:
                directory.databases.add(path)
                directory.skipped.pop(os.fspath(path), None)
            elif not self._store.is_closing:
                directory.skipped[os.fspath(path)] = "replicated under another name"
                log.warning("skipped, it is replicated under another name already path=%s", path)

    def _remove(self, directory: _Directory, paths: Iterable[Path]) -> None:
        for path in list(paths):
            directory.databases.discard(path)
            log.info("database is gone, its replica stays path=%s", path)
            member = self._store.forget(path)  # now, because another may come at this path while this one is stopped
            if member is not None:
                self._pool.submit(partial(self._stop, member))

    def _stop(self, member: Member) -> None:
        with contextlib.suppress(ReplicatorError, OSError):  # it is in the log
            member.stop(REMOVE_TIMEOUT_S, gone=True)

    # -- events ------------------------------------------------------------------------------------------------------------------

    def _watch(self, directory: _Directory, folder: Path) -> None:
        name = os.fspath(folder)
        if name in directory.folders:
            return
        found = watcher().subscribe(Path(os.path.realpath(folder)), (EVERYTHING,), _Seen(self._note, directory, name))
        if found is None:
            directory.polled.add(name)
        else:
            directory.polled.discard(name)
            directory.folders[name] = found

    def _unwatch(self, directory: _Directory, folder: str) -> None:
        directory.polled.discard(folder)
        subscription = directory.folders.pop(folder, None)
        if subscription is not None:
            subscription.close()

    def _seen(self, directory: _Directory, folder: str, name: bytes, mask: int) -> None:
        """Called by the watcher's thread."""
        if name.endswith((b"-wal", b"-shm", b"-journal", b".tmp")):
            return
        if not mask & (APPEARED | GONE | OVERFLOW | FOLDER) and not directory.settings.means(os.fsdecode(name)):
            return
        with self._changed:
            if not self._dirty:
                self._due = time.monotonic() + SETTLE_S
                self._changed.notify_all()
            self._dirty[directory, folder, name] = None

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._closing:
                    due = min([self._due if self._dirty else float("inf"), *(item.rescan_at for item in self._directories)])
                    if due <= time.monotonic():
                        break
                    self._changed.wait(None if due == float("inf") else due - time.monotonic())
                if self._closing:
                    return
                dirty, self._dirty = list(self._dirty), {}
                directories = list(self._directories)
            with self._work:
                if self._closing:
                    return
                try:
                    self._look(directories, dirty)
                except Exception as error:
                    log.error("directories cannot be looked at, by a defect", exc_info=error)

    def _look(self, directories: Sequence[_Directory], dirty: Sequence[tuple[_Directory, str, bytes]]) -> None:
        now = time.monotonic()
        whole = {directory for directory, folder, name in dirty if name == EVERYTHING and folder == os.fspath(directory.settings.path)}
        whole |= {directory for directory in directories if directory.rescan_at <= now}
        for directory in whole:
            if directory in self._directories:
                self._unwatch(directory, os.fspath(directory.settings.path))  # another folder may stand there by now
                self._walk(directory)
        new: dict[_Directory, list[Path]] = {}
        for directory, folder, name in dirty:
            if directory not in whole and directory in self._directories:
                new.setdefault(directory, []).extend(self._look_at(directory, folder, name))
        for directory, paths in new.items():
            self._take(directory, paths)

    def _look_at(self, directory: _Directory, folder: str, name: bytes) -> Iterator[Path]:
        """Look at one path; yields it when a new database stands there."""
        settings, path = directory.settings, Path(folder, os.fsdecode(name))
        try:
            mode = os.lstat(path).st_mode
        except FileNotFoundError:
            directory.skipped.pop(os.fspath(path), None)
            self._gone(directory, path)
            return
        except OSError as error:
            directory.skipped[os.fspath(path)] = f"cannot be read: {(error.strerror or 'error').lower()}"
            return
        if stat.S_ISDIR(mode):
            if settings.recursive and settings.enters(path):
                if not name:
                    self._unwatch(directory, folder)
                self._walk(directory, path)
        elif path in directory.databases:
            self._store.look_at(path)
        elif settings.means(path.name):
            if why := why_no_database(path):
                directory.skipped[os.fspath(path)] = why
            else:
                yield path

    def _gone(self, directory: _Directory, path: Path) -> None:
        if path in directory.databases:
            self._remove(directory, [path])
        elif (name := os.fspath(path)) in directory.folders or name in directory.polled:
            inside = f"{name}/"
            for folder in [folder for folder in (*directory.folders, *directory.polled) if folder == name or folder.startswith(inside)]:
                self._unwatch(directory, folder)
            for file in [file for file in directory.skipped if file.startswith(inside)]:
                del directory.skipped[file]
            self._remove(directory, [item for item in directory.databases if item.is_relative_to(path)])


def _is_missing(path: Path) -> bool:
    """Say whether nothing stands at a path; not where that cannot be told."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        pass
    return False
