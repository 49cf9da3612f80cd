"""`pyrepl standby`: follow a replica, and go on as its owner when the lease is free."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from replicator.cli.output import EXIT_FAILED, log_to
from replicator.cli.parse import Command, UsageError, duration_flag

if TYPE_CHECKING:
    from replicator.daemon import Wakeups
    from replicator.lease import Lease
    from replicator.storage.base import ReplicaClient
    from replicator.storage.measured import Operations
    from replicator.store import Member

__all__ = ["COMMAND"]


def standby(flags: dict[str, str], arguments: list[str]) -> int:
    if len(arguments) != 2:
        raise UsageError("give the URL of the replica, and the path of the database")
    poll_s, interval_s = duration_flag(flags, "poll", 0.25) or 0.0, duration_flag(flags, "follow-interval", 1.0) or 0.0
    if poll_s <= 0 or interval_s <= 0:
        raise UsageError("invalid value for -poll or -follow-interval: it must be above zero")
    log_to(sys.stdout, flags.get("log-level", "info"))
    from replicator import daemon
    from replicator.config import Daemon as Settings
    from replicator.config import Socket
    from replicator.lease import Lease, LeaseTerms
    from replicator.storage import open_client
    from replicator.storage.measured import Operations
    from replicator.words import split_words

    url, path = arguments[0], Path(os.path.realpath(arguments[1]))
    meta_path = Path(flags["meta-path"]) if "meta-path" in flags else path.with_name(f".{path.name}-litestream")
    terms = LeaseTerms(duration_flag(flags, "lease-ttl", 30.0) or 0.0)
    settings = Settings(
        command=split_words(flags["exec"]) if "exec" in flags else (),
        socket=Socket(True, Path(flags["socket"])) if "socket" in flags else Socket(),
    )
    client = open_client(url)
    lease = Lease(open_client(flags["lease"]) if "lease" in flags else client, ttl_s=terms.ttl_s)
    wakeups, operations = daemon.Wakeups(), Operations()
    failed = True
    try:
        ask = threading.Event()
        if flags.get("handover") == "true":
            ask.set()
        if not _wait(client, path, meta_path / "pyrepl", lease, wakeups, poll_s, interval_s, ask):
            failed = False
            return 0
        lease.on_request(lambda by: wakeups.hand_over(None))
        member = _member(path, url, meta_path, lease, operations, wakeups)
        running = daemon.Daemon([member], settings, wakeups, operations, retry=bool(settings.command))
        code = running.run()
        failed = bool(running.errors())
        if failed and code == EXIT_FAILED:
            raise running.errors()[0]
        return code
    finally:
        lease.close(release=not failed)  # what was not stored may still be, by the next start here
        client.close()


def _wait(
    client: ReplicaClient, path: Path, folder: Path, lease: Lease, wakeups: Wakeups, poll_s: float, interval_s: float, ask: threading.Event
) -> bool:
    """Follow, in a thread: a handler that sets an event deadlocks when it interrupts that event's own wait."""
    from replicator import daemon
    from replicator.standby import wait_until_owner

    stop = threading.Event()
    found: list[bool] = []
    errors: list[Exception] = []

    def work() -> None:
        try:
            found.append(wait_until_owner(client, path, folder, lease, stop=stop, poll_s=poll_s, interval_s=interval_s, ask=ask))
        except Exception as error:
            errors.append(error)
        wakeups.wake()

    wakeups.take_signals([*daemon.STOPS, signal.SIGUSR1], daemon.leave)
    thread = threading.Thread(target=work, name="pyrepl standby wait", daemon=True)
    thread.start()
    while not found and not errors:
        numbers = wakeups.wait()
        if any(number in daemon.STOPS for number in numbers):
            stop.set()
        if signal.SIGUSR1 in numbers:
            ask.set()
    thread.join()
    if errors:
        raise errors[0]
    return found[0]


def _member(path: Path, url: str, meta_path: Path, lease: Lease, operations: Operations, wakeups: Wakeups) -> Member:
    from replicator.api import Replicator
    from replicator.storage import open_client
    from replicator.storage.measured import measured
    from replicator.store import Member, Prepared

    def prepare() -> Prepared:
        client = measured(open_client(url), operations)
        replicator = Replicator(
            path, client, meta_path=meta_path, lease=lease, takeover=True, lease_timeout_s=0.0, on_failure=lambda error: wakeups.wake()
        )
        return Prepared(replicator, [client])

    return Member(path, prepare, urls=[url])


COMMAND = Command(
    "pyrepl standby [-handover] [-lease URL] [-lease-ttl D] [-poll D] [-follow-interval D] [-exec COMMAND] [-socket PATH] [-meta-path PATH] [-log-level L] URL DB",
    "Follow a replica, and go on as its owner when the lease is free.\n\n"
    "The copy may be read meanwhile, and not be written. When the owner is gone, or hands over by ending in good order, this process restores the rest,\n"
    "claims the replica and replicates the database.\n"
    "-handover: ask the owner for it as soon as the copy is near the newest state; so does SIGUSR1. It is answered when the owner renews the next\n"
    "time, a third of its TTL at most; then it ends in good order, and this process goes on in its place.\n"
    "-lease: the place of the lease, if not the replica's own.  -lease-ttl: its time, once it is ours (30s).\n"
    "-poll: how often to look at it (250ms).  -follow-interval: how often to look for new files (1s).\n"
    "-exec: the application, which is started then; when it ends everything is stored and the lease released, and its exit code is ours.\n"
    "-socket: take control requests there, once it is the owner.",
    ("handover",),
    ("lease", "lease-ttl", "poll", "follow-interval", "exec", "socket", "meta-path", "log-level"),
    standby,
)
