"""From settings to a running store with its listeners, and back: signals, the application as a child, reloading, the orderly stop.

The main thread sleeps on a pipe. Signals, the end of the child and changes in the store arrive there as bytes; a signal handler does nothing
else, because one that sets an event deadlocks when it interrupts that event's own wait.

| event | what happens |
|---|---|
| first SIGINT or SIGTERM | is passed on to the child, whose end is waited for; then everything is stored within `shutdown-sync-timeout` |
| second one | the child is killed, and we leave at once |
| SIGHUP | the configuration is read again (not without one); what is wrong with it leaves everything as it is |
| somebody asks for the lease | as the first SIGTERM; where others are replicated, too, and the lease is one database's, that one is stored and stopped |
| SIGUSR1, SIGUSR2, SIGQUIT, SIGWINCH | are passed on to the child, if there is one |
| the child ends | everything is stored within the time, and its exit code is ours |
| every database has failed for good | the end, with an error; not with a child or a control socket, which may mend it |
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from replicator import config
from replicator.api import Replicator
from replicator.budget import MemoryBudget
from replicator.directories import DirectorySettings
from replicator.errors import ConfigError, ReplicatorError
from replicator.fleet import Directories, Make
from replicator.leases import Leases
from replicator.memory import few_heaps
from replicator.process import environment_of_others
from replicator.signalpipe import SignalPipe
from replicator.storage import open_client, open_replica, redact
from replicator.storage.measured import Operations, measured
from replicator.storage.paced import Pace, paced
from replicator.storage.url import is_url, scheme
from replicator.store import FAILURES, Limits, Member, Prepared, Store

__all__ = ["Daemon", "Options", "Shared", "Wakeups", "leave", "member_for", "registered_member", "run_once", "shared"]

STOPS = (signal.SIGINT, signal.SIGTERM)
FOR_CHILD = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT, signal.SIGWINCH)
EXIT_FAILED = 1
FILES_FOR_EACH = 16  # four connections with three files each, the table, the lock, and some in passing
FILES_FOR_OTHERS = 200
MAX_FILES = 1 << 20
MOST_HOT = 1000  # each has some threads, and half a megabyte in SQLite
MIN_RECENT_BYTES = 64 << 10

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the command line says about all databases."""

    once: bool = False
    force_snapshot: bool = False
    enforce_history: bool = False
    restore_missing: bool = False
    takeover: bool = False

    @property
    def keeps_history(self) -> bool:
        return not self.once or self.enforce_history


@dataclass(frozen=True, slots=True)
class Shared:
    """What all databases of a configuration share: counters, the pace of uploads, bounds, and leases."""

    operations: Operations
    leases: Leases
    limits: Limits = Limits()  # noqa: RUF009  frozen
    recent_bytes: int = 16 << 20
    memory: MemoryBudget | None = None
    pace: Pace | None = None


def shared(fleet: config.Fleet, operations: Operations, leases: Leases, *, parks: bool) -> Shared:
    """Return what databases share, within what the machine allows. `parks`: the process stays, and has no other connections."""
    if parks and fleet.park_after_s:
        few_heaps()
    by_files = (_open_files() - FILES_FOR_OTHERS) // FILES_FOR_EACH
    hot = fleet.hot if fleet.hot is not None else max(16, min(by_files, MOST_HOT))
    return Shared(
        operations,
        leases,
        Limits(park_after_s=fleet.park_after_s if parks and fleet.park_after_s else None, park_max_bytes=fleet.park_max_bytes, hot=hot),
        max(MIN_RECENT_BYTES, min(16 << 20, fleet.recent_bytes // hot)),
        MemoryBudget(fleet.queued_bytes),
        Pace(fleet.uploads_per_s) if fleet.uploads_per_s else None,
    )


def _open_files() -> int:
    """Return how many files this process may have open, after asking for all that it can have."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY:
        hard = max(soft, MAX_FILES)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    return min(soft, MAX_FILES)


def member_for(
    settings: config.DatabaseSettings,
    options: Options,
    shared: Shared,
    on_failure: Callable[[], None],
    *,
    found_in: DirectorySettings | None = None,
) -> Member:
    """Return the member of a database in the configuration.

    Args:
        found_in: the directory that it was found in. Its own settings are made again when they are needed: ten thousand of them take memory.

    Raises:
        ConfigError: the settings are wrong; not for one that was found in a directory.
    """
    prepare = (
        partial(_prepare, settings, options, shared, on_failure)
        if found_in is None
        else _Found(found_in, settings.path, options, shared, on_failure)
    )
    has_own_lease = settings.lease is not None and settings.lease.home is None  # it must be renewed, so it can't sleep
    can_park = settings.format == "ltx" and settings.verify_interval_s is None and not has_own_lease
    parks = shared.limits.park_after_s is not None and can_park
    real = Path(os.path.realpath(settings.path))
    folder = (settings.meta_path or real.with_name(f".{real.name}-litestream")) / "pyrepl"
    wanted = settings.restore_if_db_not_exists or options.restore_missing
    return Member(
        settings.path,
        prepare,
        restore_missing=wanted,
        settings=settings if found_in is None else found_in,
        urls=[item.url for item in settings.replicas],
        folder=folder if parks else None,
        checked=found_in is not None,
    )


@dataclass(frozen=True, slots=True)
class _Found:
    """Prepares a database of a directory."""

    directory: DirectorySettings
    path: Path
    options: Options
    shared: Shared
    on_failure: Callable[[], None]

    def __call__(self) -> Prepared:
        return _prepare(self.directory.database(self.path), self.options, self.shared, self.on_failure)


def _prepare(settings: config.DatabaseSettings, options: Options, shared: Shared, on_failure: Callable[[], None]) -> Prepared:
    said = {
        "poll_interval_s": settings.monitor_interval_s,
        "checkpoint_interval_s": settings.checkpoint_interval_s,
        "busy_timeout_s": settings.busy_timeout_s,
        "min_checkpoint_pages": settings.min_checkpoint_pages,
    }
    intervals = [item.sync_interval_s for item in settings.replicas if item.sync_interval_s is not None]

    clients = [paced(open_replica(item), shared.operations, shared.pace) for item in settings.replicas]
    replicator = Replicator(
        settings.path,
        *clients,
        meta_path=settings.meta_path,
        sync_interval_s=min(intervals, default=None) if settings.sync == "interval" else None,
        sync=settings.sync,
        names=[item.name for item in settings.replicas],
        force_snapshot=options.force_snapshot,
        history=[item.history for item in settings.replicas] if options.keeps_history else None,
        verify_interval_s=settings.verify_interval_s,
        format=settings.format,
        recent_limit_bytes=shared.recent_bytes,
        memory=shared.memory,
        on_failure=lambda error: on_failure(),
        **shared.leases.arguments(settings.lease, settings.path, takeover=options.takeover),
        **{name: value for name, value in said.items() if value is not None},  # type: ignore[arg-type]
    )
    return Prepared(replicator, clients)


def registered_member(path: Path, url: str, operations: Operations, on_failure: Callable[[], None]) -> Member:
    """Return the member of a database that is registered while the process runs, with defaults for all but the URL. Raises `ConfigError`."""
    if not is_url(url):
        raise ConfigError(f"replica url scheme required: {redact(url)}")
    if scheme(url) == "memory":
        raise ConfigError("unsupported replica URL scheme: memory")  # it would be gone with this process

    def prepare() -> Prepared:
        client = measured(open_client(url), operations)
        return Prepared(Replicator(path, client, on_failure=lambda error: on_failure()), [client])

    client = open_client(url)
    client.close()
    return Member(path, prepare, urls=[client.url])


# -- events ----------------------------------------------------------------------------------------------------------------------


def leave(number: int) -> None:
    """End at once because of a signal. Nothing is lost: what is not stored is in the database, or staged."""
    os._exit(128 + number)


class Wakeups(SignalPipe):
    """What the daemon waits for. A second signal that stops is for those who do not want to wait."""

    def __init__(self) -> None:
        super().__init__()
        self._stops = 0
        self._asked: deque[Path | None] = deque()
        self._leave: Callable[[int], None] = leave

    def take_signals(self, numbers: Sequence[int], leave: Callable[[int], None], *, at_once: bool = False) -> None:
        """Let signals arrive here; `leave` is called, in the handler, at the second one that stops.

        Args:
            at_once: at the first one already.
        """
        self._leave, self._stops = leave, int(at_once)
        self.take(numbers, self._note)

    def hand_over(self, path: Path | None) -> None:
        """Somebody asks for the lease of a database; None: for one that is shared."""
        self._asked.append(path)
        self.wake()

    def asked(self) -> list[Path | None]:
        """Return what was told to `hand_over` since the last call."""
        return [self._asked.popleft() for _ in range(len(self._asked))]

    def _note(self, number: int, _: object) -> None:
        if number in STOPS:
            self._stops += 1
            if self._stops > 1:
                self._leave(number)


class Child:
    """The application. A thread waits for its end."""

    def __init__(self, command: Sequence[str], on_end: Callable[[], None]) -> None:
        try:
            self._process = subprocess.Popen(command, env=environment_of_others())
        except (OSError, ValueError) as error:
            reason = (error.strerror or str(error)).lower() if isinstance(error, OSError) else str(error)
            raise ConfigError(f"cannot start exec command: {command[0]}: {reason}") from error
        self.code: int | None = None
        self._on_end = on_end
        log.info("application started pid=%d", self._process.pid)
        threading.Thread(target=self._wait, name="pyrepl exec", daemon=True).start()

    def _wait(self) -> None:
        code = self._process.wait()
        self.code = code if code >= 0 else 128 - code
        self._on_end()

    def send(self, number: int) -> None:
        """Pass a signal on."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)


# -- the process -----------------------------------------------------------------------------------------------------------------


class Daemon:
    """One process that replicates until it is stopped. `run` once, in the main thread."""

    def __init__(
        self,
        members: Sequence[Member],
        settings: config.Daemon,
        wakeups: Wakeups,
        operations: Operations,
        *,
        retry: bool = True,
        load: Callable[[], config.Config] | None = None,
        make: Make | None = None,
        directories: Sequence[DirectorySettings] = (),
        limits: Limits = Limits(),  # noqa: B008  frozen
        shutdown_timeout_s: float | None = None,
    ) -> None:
        """
        Args:
            retry: False: a database that cannot begin is an error at once.
            load, make: read the configuration again, and make the member of one of its databases; for SIGHUP.
            directories: whose databases are replicated, too.
            limits: for all databases together.
            shutdown_timeout_s: instead of the one in the settings.
        """
        self._settings, self._wakeups, self._operations = settings, wakeups, operations
        self._store = Store(members, retry=retry, on_change=wakeups.wake, limits=limits)
        self._load, self._make = load, make
        self._wanted = directories
        self._directories = Directories(self._store, make) if make is not None else None
        self._timeout_s = shutdown_timeout_s
        self.is_stored = True
        """Whether everything was stored at the end."""
        self._child: Child | None = None
        self._reloading: threading.Thread | None = None
        self._reload_again = False
        self._reload_runs = False

    def run(self) -> int:
        """Replicate; returns the exit code.

        Raises:
            ConfigError: an address or the socket is not to be had, or the application cannot be started.
        """
        signals = [*STOPS, *([signal.SIGHUP] if self._load else []), *(FOR_CHILD if self._settings.command else [])]
        self._wakeups.take_signals(signals, self._leave)
        with self._listeners():
            if self._directories is not None:
                self._directories.apply(self._wanted)
            self._store.start()
            try:
                self._until_over()
            finally:
                errors = self._close()
                self.is_stored = not errors
        if self._child is not None and self._child.code:
            return self._child.code
        return EXIT_FAILED if errors or self.errors() else 0

    def errors(self) -> list[Exception]:
        """Return what is wrong with databases, one error for each."""
        return [member.error for member in self._store.members() if member.error is not None]

    def _leave(self, number: int) -> None:
        if self._child is not None:
            self._child.send(signal.SIGKILL)
        leave(number)

    @contextlib.contextmanager
    def _listeners(self) -> Iterator[None]:
        """Everything that can be refused is asked for before a database is touched."""
        from replicator.server import Control, Listener, Observed, listen_tcp, listen_unix

        with contextlib.ExitStack() as stack:
            if self._settings.address is not None:
                from replicator.metrics import renderer

                made = listen_tcp(*self._settings.address)
                render = renderer(self._store, self._operations, self._directories.summary if self._directories else tuple)
                listener = Listener(made, Observed(self._store, render).respond, "metrics")
                stack.callback(listener.close)
                listener.start()
                host, port = listener.address[:2]
                log.info("serving metrics on url=http://%s/metrics", f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
            if self._settings.socket.enabled:
                path = self._settings.socket.path
                made = listen_unix(path, self._settings.socket.permissions)
                control = Control(self._store, self._register, started_at=datetime.now(UTC), operations=self._operations)
                listener = Listener(made, control.respond, "control")
                stack.callback(listener.close)
                listener.start()
                log.info("control socket listening path=%s", path)
            if self._settings.heartbeat_url is not None:
                from replicator.heartbeat import Heartbeat

                heartbeat = Heartbeat(self._store, self._settings.heartbeat_url, self._settings.heartbeat_interval_s)
                stack.callback(heartbeat.close)
                heartbeat.start()
            yield

    def _register(self, path: Path, url: str) -> Member:
        return registered_member(path, url, self._operations, self._wakeups.wake)

    # -- running -----------------------------------------------------------------------------------------------------------------

    def _until_over(self) -> None:
        stopping = False
        while not self._is_over(stopping):
            for number in self._wakeups.wait():
                if number in STOPS:
                    stopping = True
                    log.info("signal received, shutting down signal=%s", signal.Signals(number).name)
                if number == signal.SIGHUP:
                    self._reload_again = True
                elif number and self._child is not None:
                    self._child.send(number)
            for path in self._wakeups.asked():
                if path is not None and (len(self._store.members()) > 1 or self._wanted):
                    threading.Thread(target=self._hand_over, args=(path,), name="pyrepl hand-over", daemon=True).start()
                elif not stopping:
                    stopping = True
                    log.info("a hand-over is asked for, shutting down")
                    if self._child is not None:
                        self._child.send(signal.SIGTERM)
            if self._reload_again and not self._reload_runs:
                self._reload_again, self._reload_runs = False, True
                self._reloading = threading.Thread(target=self._reload, name="pyrepl reload", daemon=True)
                self._reloading.start()

    def _hand_over(self, path: Path) -> None:
        """Store one database, and stop it: its lease is released then."""
        member = self._store.get(path)
        if member is not None:
            log.info("a hand-over is asked for, stopping db=%s", path)
            with contextlib.suppress(*FAILURES):  # the log has it, and the lease is not released
                member.stop(self._shutdown_timeout_s)
            self._wakeups.wake()

    def _is_over(self, stopping: bool) -> bool:
        if self._child is not None:
            return self._child.code is not None
        if stopping:
            return True
        if self._settings.command:
            if self._store.wait_until_tried(0):
                self._check_restored()
                self._child = Child(self._settings.command, self._wakeups.wake)
            return False
        return self._store.is_over and not self._settings.socket.enabled and not any(item.watch for item in self._wanted)

    def _check_restored(self) -> None:
        """The application would make an empty database of one that could not be restored."""
        for member in self._store.members():
            if member.is_missing_restore and not member.path.exists():
                raise member.error if isinstance(member.error, ReplicatorError) else ConfigError(f"cannot restore {member.path}")

    def _close(self) -> dict[Path, Exception]:
        end = time.monotonic() + self._shutdown_timeout_s
        if self._directories is not None:
            self._directories.close()
        if self._child is not None:  # it may have made a database a moment ago, on a disk that ends with us
            self._store.try_waiting(self._shutdown_timeout_s)
        errors = self._store.close(max(1.0, end - time.monotonic()), retry_interval_s=self._settings.shutdown_interval_s)
        if self._reloading is not None:
            self._reloading.join(max(1.0, end - time.monotonic()))
        return errors

    @property
    def _shutdown_timeout_s(self) -> float:
        """At least a second: a sync that may take no time at all would always fail."""
        return max(1.0, self._settings.shutdown_timeout_s if self._timeout_s is None else self._timeout_s)

    # -- reloading ---------------------------------------------------------------------------------------------------------------

    def _reload(self) -> None:
        try:
            self._apply()
        except (ReplicatorError, OSError) as error:
            log.error("configuration not reloaded, the old one stays error=%r", str(error))
        except Exception as error:
            log.error("configuration not reloaded, by a defect; the old one stays", exc_info=error)
        # Before waking: whoever asked again meanwhile is looked at now. (A thread that has woken others may still count as alive.)
        self._reload_runs = False
        self._wakeups.wake()

    def _apply(self) -> None:
        assert self._load is not None
        assert self._make is not None
        assert self._directories is not None
        new = self._load()
        if new.is_empty and not self._settings.socket.enabled:
            raise ConfigError("no databases specified in configuration")
        wanted = {os.path.realpath(item.path): item for item in new.databases}
        same, gone = [], []
        in_directories = self._directories.databases()
        for member in self._store.members():
            found = wanted.get(os.path.realpath(member.path))
            if member.path in in_directories and found is None:
                continue
            if member.settings is not None and found == member.settings:
                same.append(os.path.realpath(member.path))
            elif member.settings is not None or found is not None:  # what was registered stays, unless the file has it now
                gone.append(member)
        fresh = [self._make(item) for path, item in wanted.items() if path not in same]  # all of them, or none
        old, self._settings = self._settings, new.daemon
        kept = replace(old, shutdown_timeout_s=new.daemon.shutdown_timeout_s, shutdown_interval_s=new.daemon.shutdown_interval_s)
        if kept != new.daemon:
            log.warning("addr, exec, socket and heartbeat are those of the start; restart to change them")
            self._settings = kept
        self._store.exchange(gone, fresh, self._shutdown_timeout_s)
        self._directories.apply(new.directories, timeout_s=self._shutdown_timeout_s)
        self._wanted = new.directories
        log.info("configuration reloaded unchanged=%d stopped=%d started=%d", len(same), len(gone), len(fresh))


def run_once(members: Sequence[Member], options: Options, *, timeout_s: float, patient: bool) -> None:
    """Store what is committed now, and stop. Errors are in the members, and logged. `patient`: as for `Member.store`."""
    from replicator.store import at_once, stop_all

    def store(member: Member) -> None:
        member.start()
        member.store(timeout_s, patient=patient, snapshot=options.force_snapshot, enforce_history=options.enforce_history)

    at_once(store, members)
    stop_all(members, timeout_s)
