"""What looks at this machine's own state and asks nobody: `status`, `reset`, `config`."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from replicator.cli.configured import CONFIG_FLAGS, CONFIG_OPTIONS, CONFIG_SWITCHES, home, load_config, log_warnings
from replicator.cli.output import log_to, table
from replicator.cli.parse import Command, UsageError
from replicator.errors import ConfigError, EngineRunning, ReplicatorError

if TYPE_CHECKING:
    from replicator.config import Config

__all__ = ["COMMANDS"]

KEPT = frozenset(["lock", "replicas.json"])
SECRETS = frozenset(["access_key_id", "secret_access_key", "sse_customer_key", "age_identities", "session_token", "heartbeat_url"])
HIDDEN = "(hidden)"


# -- status ----------------------------------------------------------------------------------------------------------------------


def status(flags: dict[str, str], arguments: list[str]) -> int:
    if len(arguments) > 1:
        raise UsageError("too many arguments")
    log_to(sys.stderr, "warn")
    config = load_config(flags)
    log_warnings(config)
    wanted = _path(arguments[0]) if arguments else None
    rows = []
    known = _known_to_daemon(config)
    losses = {path: item["loss_window"] for path, item in known.items() if "loss_window" in item}
    leases = {path: item["lease"] for path, item in known.items() if "lease" in item}
    errors = {path: item["error"] for path, item in known.items() if "error" in item}
    from replicator.fleet import databases_in

    for item in [*config.databases, *(item for directory in config.directories for item in databases_in(directory))]:
        if wanted in (None, item.path):
            state, txid = _state(item.path, _meta_path(config, item.path))
            wal = item.path.with_name(item.path.name + "-wal")
            rows.append([os.fspath(item.path), state, txid, "-" if state == "no database" else _size_text(_size(wal))])
    if flags.get("json") == "true":
        keys = ("database", "status", "local_txid", "wal_size")
        found = [dict[str, object](zip(keys, row, strict=True)) for row in rows]
        for row in found:
            for key, more in (("loss_window", losses), ("lease", leases), ("error", errors)):
                if row["database"] in more:
                    row[key] = more[row["database"]]
        print(json.dumps(found, indent=2))
    else:
        table(["database", "status", "local txid", "wal size"], rows)
        windows = [_window_row(database, url, window) for database, *_ in rows for url, window in losses.get(database, {}).items()]
        if windows:
            print("\nOn this machine alone, of the last transactions, at most:")
            table(["database", "replica", "p50", "p99", "max", "txids"], windows)
        owned = [[database, *_lease_row(leases[database])] for database, *_ in rows if database in leases]
        if owned:
            print("\nLeases:")
            table(["database", "state", "owner", "generation", "expires at"], owned)
        wrong = [f"{database}: {errors[database]}" for database, *_ in rows if database in errors]
        if wrong:
            print("\nThe daemon reports:", *wrong, sep="\n")
    return 0


def _known_to_daemon(config: Config) -> Mapping[object, Mapping[str, Any]]:
    """Ask the daemon, where one of ours serves the configuration's socket, for what only it knows of each database."""
    from replicator.cli.control import ask_daemon

    if not config.daemon.socket.enabled:
        return {}
    try:
        answer, _ = ask_daemon(config.daemon.socket.path, "/debug/sync-status", timeout_s=2.0)
        return {item["path"]: item for item in answer["databases"]}
    except (ReplicatorError, KeyError, TypeError):  # nobody is there
        return {}


def _window_row(database: str, url: str, window: Mapping[str, float]) -> list[str]:
    times = [f"{window[f'{name}_seconds']:.3f} s" for name in ("p50", "p99", "max")]
    return [database, url, *times, str(window["txids"])]


def _lease_row(lease: Mapping[str, Any]) -> list[str]:
    return [str(lease.get(key, "-")) for key in ("state", "owner", "generation", "expires_at")]


def _state(path: Path, meta_path: Path) -> tuple[str, str]:
    """Return what `status` says, and the newest local TXID. The page table is only read: an engine may be at work."""
    from replicator.format.ltx import parse_name
    from replicator.pagetable import PageTable

    try:
        if not path.exists():
            return "no database", "-"
        state = PageTable.read_state(meta_path / "pyrepl" / "pages")
        if state is not None:
            return "ok", f"{state.txid:016x}"
        names = [parse_name(name) for name in os.listdir(meta_path / "ltx" / "0")]  # Litestream's
        newest = max((span[1] for span in names if span is not None), default=0)
    except FileNotFoundError:
        newest = 0
    except OSError:
        return "error", "-"
    return ("ok", f"{newest:016x}") if newest else ("not initialized", "-")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _size_text(size: int) -> str:
    """Return bytes as Litestream prints them: `338 kB`, `4.1 kB`, `0 B`."""
    if size < 10:
        return f"{size} B"
    power = min(int(math.log(size, 1000) + 1e-9), 5)
    value = math.floor(size / 1000**power * 10 + 0.5) / 10
    return f"{value:.{int(value < 10)}f} {('B', 'kB', 'MB', 'GB', 'TB', 'PB')[power]}"


# -- reset -----------------------------------------------------------------------------------------------------------------------


def reset(flags: dict[str, str], arguments: list[str]) -> int:
    """Move what this machine believes about a database aside; the replica tells it anew at the next start.

    Moved, not deleted: staged files may hold states that no replica has. What each replica is known to have held stays in its place, because it is
    what tells an emptied replica from a new one.
    """
    if not arguments:
        raise UsageError("database path required")
    if len(arguments) > 1:
        raise UsageError("too many arguments")
    log_to(sys.stdout, "info")
    path = _path(arguments[0])
    config = load_config(flags) if "config" in flags else None
    if not path.exists():
        raise ReplicatorError(f"database does not exist: {path}")
    meta_path = _meta_path(config, path)
    with _alone(path, meta_path / "pyrepl"):
        moved = [*_parts(meta_path)]
        dry = flags.get("dry-run") == "true"
        if dry:
            print(f"Dry run: local state would be reset for: {path}")
            for item in moved:
                print(f"Would move aside: {item}")
            print("No files were moved.")
            return 0
        print(f"Resetting local state for: {path}")
        if moved:
            aside = meta_path / "pyrepl" / f"reset-{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}"
            aside.mkdir(parents=True, mode=0o700)
            for item in moved:
                item.rename(aside / item.name)
            print(f"Moved aside: {aside}")
        print("Reset complete. The next start reads the position from the replica, and stores the pages that differ.")
    return 0


def _parts(meta_path: Path) -> Iterator[Path]:
    """Yield what is moved: our state, and Litestream's local files."""
    folder = meta_path / "pyrepl"
    if folder.is_dir():
        yield from (
            item for item in sorted(folder.iterdir()) if item.name not in KEPT and not item.name.startswith(("reset-", "salvaged-"))
        )
    if (meta_path / "ltx").is_dir():
        yield meta_path / "ltx"


@contextmanager
def _alone(path: Path, folder: Path) -> Iterator[None]:
    """Keep engines out meanwhile. Raises `EngineRunning`."""
    try:
        file = os.open(folder / "lock", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        yield  # no engine of ours was ever here
        return
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise EngineRunning(path) from None
        yield
    finally:
        os.close(file)


# -- config ----------------------------------------------------------------------------------------------------------------------


def config(flags: dict[str, str], arguments: list[str]) -> int:
    if arguments not in (["check"], ["show"]):
        raise UsageError("say check or show")
    log_to(sys.stderr, "warn")
    found = load_config(flags)
    if arguments == ["show"]:
        log_warnings(found)
        shown = _shown(found)
        if flags.get("json") == "true":
            print(json.dumps(shown, indent=2))
        else:
            import yaml

            print(yaml.safe_dump(shown, sort_keys=False, allow_unicode=True), end="")
        return 0
    from replicator.storage import open_replica

    for database in [*found.databases, *(item.template for item in found.directories)]:
        for replica in database.replicas:
            open_replica(replica).close()  # finds keys that are none; nothing is contacted
    for note in found.warnings:
        print(f"warning: line {note.line}, column {note.column}: {note.text}")
    if found.is_empty and not found.daemon.socket.enabled:
        raise ConfigError("no databases specified in configuration", hint="list them under dbs, each with path and replica")
    directories = f", {len(found.directories)} directories" if found.directories else ""
    print(f"ok: {len(found.databases)} databases{directories}, {len(found.warnings)} warnings")
    return 0


def _shown(found: Config) -> dict[str, Any]:
    """Return the effective settings, without secrets."""
    return {
        "logging": _plain(found.logging),
        "daemon": {
            **_plain(found.daemon),
            "socket": {**_plain(found.daemon.socket), "permissions": f"{found.daemon.socket.permissions:04o}"},
        },
        "pyrepl": _plain(found.fleet),
        "databases": [_plain(item) for item in found.databases],
        **({"directories": [_plain(item) for item in found.directories]} if found.directories else {}),
    }


def _plain(value: Any, name: str = "") -> Any:
    if name in SECRETS and value:
        return HIDDEN
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name), field.name) for field in dataclasses.fields(value)}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return os.fspath(value)
    return value


def _path(text: str) -> Path:
    from replicator.config import database_path

    return database_path(text, home=home(), folder=Path.cwd())


def _meta_path(found: Config | None, path: Path) -> Path:
    settings = found.database(path) if found is not None else None
    if settings is not None and settings.meta_path is not None:
        return settings.meta_path
    real = Path(os.path.realpath(path))
    return real.with_name(f".{real.name}-litestream")


COMMANDS = {
    "status": Command(
        f"pyrepl status {CONFIG_FLAGS} [-json] [DB]",
        "Show the local state of the databases of the configuration file.",
        ("json", *CONFIG_SWITCHES),
        CONFIG_OPTIONS,
        status,
    ),
    "reset": Command(
        f"pyrepl reset [-dry-run] {CONFIG_FLAGS} DB",
        "Move the local state of a database aside; it is read from the replica again.\n\n"
        "The database and its replicas are not touched. Not while it is being replicated.",
        ("dry-run", *CONFIG_SWITCHES),
        CONFIG_OPTIONS,
        reset,
    ),
    "config": Command(
        f"pyrepl config check|show {CONFIG_FLAGS} [-json]",
        "Check the configuration file, or show its effective settings without secrets.",
        ("json", *CONFIG_SWITCHES),
        CONFIG_OPTIONS,
        config,
    ),
}
