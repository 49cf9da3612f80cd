"""`pyrepl replicate`: replicate one database, or all of a configuration file, until stopped."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from replicator.cli.configured import CONFIG_FLAGS, CONFIG_OPTIONS, CONFIG_SWITCHES, load_config, log_warnings
from replicator.cli.output import EXIT_FAILED, log_to
from replicator.cli.parse import Command, UsageError, duration_flag
from replicator.errors import ConfigError

if TYPE_CHECKING:
    from replicator.config import Config
    from replicator.config import Daemon as Settings
    from replicator.daemon import Options, Wakeups
    from replicator.formats import Format
    from replicator.lease import LeaseTerms
    from replicator.leases import Leases
    from replicator.storage.measured import Operations
    from replicator.store import Member

__all__ = ["COMMAND", "lease_flags"]


def replicate(flags: dict[str, str], arguments: list[str]) -> int:
    if len(arguments) == 1:
        raise UsageError(f"must specify at least one replica URL for {arguments[0]}")
    if "exec" in flags and flags.get("once") == "true":
        raise UsageError("cannot specify -once flag with -exec")
    if flags.get("enforce-retention") == "true" and flags.get("once") != "true":
        raise UsageError("-enforce-retention requires -once")
    if arguments:
        if "config" in flags:
            raise UsageError("cannot specify a replica URL and the -config flag")
        log_to(sys.stdout, flags.get("log-level", "info"))
        return _run(flags, None, arguments)
    for name in ("sync-interval", "sync", "meta-path", "format", "lease", "lease-ttl"):
        if name in flags:
            raise UsageError(f"-{name} goes with a database and URLs; the configuration file has its own key for it")
    config = load_config(flags)
    _start_log(flags, config)
    log_warnings(config)
    if config.is_empty and not config.daemon.socket.enabled:
        raise ConfigError("no databases specified in configuration", hint="list them under dbs, each with path and replica")
    return _run(flags, config, [])


def _run(flags: dict[str, str], config: Config | None, arguments: list[str]) -> int:
    from replicator import daemon
    from replicator.config import Daemon as Settings
    from replicator.leases import Leases
    from replicator.words import split_words

    options = daemon.Options(
        once=flags.get("once") == "true",
        force_snapshot=flags.get("force-snapshot") == "true",
        enforce_history=flags.get("enforce-retention") == "true",
        restore_missing=flags.get("restore-if-db-not-exists") == "true",
        takeover=flags.get("takeover") == "true",
    )
    timeout_s = duration_flag(flags, "timeout")
    settings = config.daemon if config is not None else Settings()
    if "exec" in flags:
        settings = replace(settings, command=split_words(flags["exec"]))
    wakeups = daemon.Wakeups()
    with Leases(wakeups.hand_over) as leases:
        return _run_with(flags, config, arguments, options, settings, timeout_s, leases, wakeups)


def _run_with(
    flags: dict[str, str],
    config: Config | None,
    arguments: list[str],
    options: Options,
    settings: Settings,
    timeout_s: float | None,
    leases: Leases,
    wakeups: Wakeups,
) -> int:
    from replicator import daemon
    from replicator.config import Fleet
    from replicator.storage.measured import Operations

    operations = Operations()
    fleet = config.fleet if config is not None else Fleet(park_after_s=0)
    common = daemon.shared(fleet, operations, leases, parks=config is not None and not options.once)
    make = partial(daemon.member_for, options=options, shared=common, on_failure=wakeups.wake)
    if config is not None:
        databases = list(config.databases)
        if options.once:
            from replicator.fleet import databases_in

            databases += [item for directory in config.directories for item in databases_in(directory)]
        members = [make(item) for item in databases]
    else:
        members = [_from_arguments(flags, arguments[0], arguments[1:], options, operations, wakeups)]
    if options.once:
        wakeups.take_signals(daemon.STOPS, daemon.leave, at_once=True)
        limit_s = settings.shutdown_timeout_s if timeout_s is None else timeout_s
        daemon.run_once(members, options, timeout_s=limit_s, patient=timeout_s is None)
        errors = [member.error for member in members if member.error is not None]
        if errors:
            leases.keep()
        return _code(errors, arguments)

    def load() -> Config:
        new = load_config(flags)
        _start_log(flags, new)
        log_warnings(new)
        return replace(new, daemon=replace(new.daemon, command=settings.command)) if "exec" in flags else new

    running = daemon.Daemon(
        members,
        settings,
        wakeups,
        operations,
        retry=not arguments or bool(settings.command) or options.takeover,
        load=load if config is not None else None,
        make=make,
        directories=config.directories if config is not None else (),
        limits=common.limits,
        shutdown_timeout_s=timeout_s,
    )
    code = running.run()
    if not running.is_stored:
        leases.keep()
    return code if code != EXIT_FAILED else _code(running.errors(), arguments) or code


def _code(errors: Sequence[Exception], arguments: list[str]) -> int:
    if errors and arguments:
        raise errors[0]
    return EXIT_FAILED if errors else 0


def _start_log(flags: dict[str, str], config: Config) -> None:
    level = flags.get("log-level") or os.environ.get("LOG_LEVEL") or config.logging.level or "info"
    log_to(sys.stderr if config.logging.stderr else sys.stdout, level, kind=config.logging.kind, source=config.logging.source)


def _from_arguments(
    flags: dict[str, str], path: str, urls: Sequence[str], options: Options, operations: Operations, wakeups: Wakeups
) -> Member:
    from replicator.api import Replicator
    from replicator.levels import History
    from replicator.storage import open_client
    from replicator.storage.measured import measured
    from replicator.store import Member, Prepared

    interval, sync = duration_flag(flags, "sync-interval"), flags.get("sync", "interval")
    if sync not in ("interval", "commit"):
        raise UsageError(f"invalid value for -sync: {sync!r} (interval or commit)")
    if sync == "commit" and interval is not None:
        raise UsageError("cannot specify -sync-interval with -sync commit")
    lease = lease_flags(flags)
    if options.takeover and not lease:
        raise UsageError("-takeover goes with -lease")

    def prepare() -> Prepared:
        clients = [measured(open_client(url), operations) for url in urls]
        replicator = Replicator(
            path,
            *clients,
            meta_path=flags.get("meta-path"),
            sync_interval_s=interval,
            sync=cast('Literal["interval", "commit"]', sync),
            force_snapshot=options.force_snapshot,
            history=History() if options.keeps_history else None,
            format=cast("Format", flags.get("format", "ltx")),  # Replicator looks at it
            lease=lease,
            takeover=options.takeover,
            lease_timeout_s=0.0,
            on_failure=lambda error: wakeups.wake(),
            on_handover=lambda by: wakeups.hand_over(Path(path)),
        )
        return Prepared(replicator, clients)

    return Member(Path(path), prepare, restore_missing=options.restore_missing)


def lease_flags(flags: dict[str, str]) -> LeaseTerms | Literal[False]:
    """Return the terms that `-lease` and `-lease-ttl` ask for."""
    from replicator.lease import LeaseTerms

    ttl_s = duration_flag(flags, "lease-ttl")
    if flags.get("lease") != "true" and ttl_s is None:
        return False
    return LeaseTerms() if ttl_s is None else LeaseTerms(ttl_s)


COMMAND = Command(
    f"pyrepl replicate [-once [-force-snapshot] [-enforce-retention]] [-exec COMMAND] [-restore-if-db-not-exists] [-log-level L]\n"
    f"                        {CONFIG_FLAGS}\n"
    "       pyrepl replicate [...] [-sync-interval D | -sync commit] [-meta-path PATH] [-format v0.3]\n"
    "                        [-lease [-lease-ttl D] [-takeover]] DB URL...",
    "Replicate databases until stopped: those of the configuration file, or one.\n\n-once: store what is committed now, then exit.\n"
    "-force-snapshot: with -once, store a full image; begin anew where a replica has lost its files.\n"
    "-enforce-retention: with -once, merge, take images and delete what is due of it.\n"
    "-exec: run the application, too; when it ends everything is stored, and its exit code is ours.\n"
    "-restore-if-db-not-exists: restore a database that is missing before it is replicated.\n"
    "-sync commit: upload each commit at once, instead of once in an interval.\n"
    "-format: ltx, or v0.3 for fleets that still restore with Litestream 0.3.\n"
    "-lease: one writer at a time; -lease-ttl: after so long without a renewal another may take over (30s).\n"
    "-takeover: wait for the lease, and go on from the other owner's state.\n"
    "-config: the file, instead of $LITESTREAM_CONFIG or /etc/litestream.yml.  -no-expand-env: leave $NAME in it alone.\n"
    "-lenient: keys that nobody knows, and durations without a unit, are warnings.",
    ("once", "force-snapshot", "enforce-retention", "restore-if-db-not-exists", "lease", "takeover", *CONFIG_SWITCHES),
    ("exec", "sync-interval", "sync", "meta-path", "format", "lease-ttl", "log-level", "timeout", *CONFIG_OPTIONS),
    replicate,
)
