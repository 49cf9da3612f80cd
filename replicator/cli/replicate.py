"""`pyrepl replicate`: replicate a database until stopped."""

from __future__ import annotations

import logging
import signal
import sys
import threading

from replicator.cli.output import log_to
from replicator.cli.parse import Command, UsageError, duration_flag

__all__ = ["COMMAND"]


def replicate(flags: dict[str, str], arguments: list[str]) -> int:
    if len(arguments) < 2:
        raise UsageError("give a database and at least one replica URL")
    log_to(sys.stdout, flags.get("log-level", "info"))
    from replicator.api import Replicator

    log = logging.getLogger("replicator.cli")
    path, urls = arguments[0], arguments[1:]
    interval = duration_flag(flags, "sync-interval")
    engine = Replicator(
        path, *urls, meta_path=flags.get("meta-path"), sync_interval_s=interval, force_snapshot=flags.get("force-snapshot") == "true"
    )
    stopped = threading.Event()
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stopped.set())
    engine.start()
    log.info("initialized db path=%s", path)
    for replica in engine.status().replicas:
        log.info("replicating to type=%s url=%s txid=%016x", replica.kind, replica.url, replica.txid)
    try:
        if flags.get("once") == "true":
            engine.wait(timeout_s=duration_flag(flags, "timeout", 30.0))
            if flags.get("force-snapshot") == "true":
                engine.snapshot()
        else:
            while not stopped.wait(0.5):
                if engine.status().state == "failed":
                    break
    finally:
        engine.close()
    status = engine.status()
    log.info("replication stopped txid=%016x", status.txid)
    return 0


COMMAND = Command(
    "pyrepl replicate [-once] [-force-snapshot] [-sync-interval D] [-meta-path PATH] [-log-level L] DB URL...",
    "Replicate a database until stopped.\n\n-once: store what is committed now, then exit.\n"
    "-force-snapshot: with -once, store a full image; begin anew where a replica has lost its files.",
    ("once", "force-snapshot"),
    ("sync-interval", "meta-path", "log-level", "timeout"),
    replicate,
)
