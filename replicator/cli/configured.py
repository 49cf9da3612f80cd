"""What commands take from the configuration file: settings, replicas of a database, and the replica to read from."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from replicator.errors import ConfigError

if TYPE_CHECKING:
    from replicator.config import Config, DatabaseSettings, ReplicaSettings
    from replicator.storage.base import ReplicaClient

__all__ = [
    "CONFIG_FLAGS",
    "CONFIG_OPTIONS",
    "CONFIG_SWITCHES",
    "Source",
    "chosen",
    "configured_database",
    "find_source",
    "home",
    "load_config",
    "log_warnings",
]

CONFIG_SWITCHES = ("no-expand-env", "lenient")
CONFIG_OPTIONS = ("config",)
CONFIG_FLAGS = "[-config PATH] [-no-expand-env] [-lenient]"

log = logging.getLogger("replicator.cli")


@dataclass(frozen=True, slots=True)
class Source:
    """Where a command reads: replicas, the preferred one first, their names, and the database and settings when it was named by its path."""

    clients: tuple[ReplicaClient, ...]
    names: tuple[str, ...]
    database: Path | None
    settings: tuple[ReplicaSettings, ...] = ()


def load_config(flags: dict[str, str]) -> Config:
    """Read the file of `-config`, of `$LITESTREAM_CONFIG`, or `/etc/litestream.yml`. Raises `ConfigError`."""
    from replicator.config import DEFAULT_PATH, MAX_TEXT, load

    path = _absolute(flags.get("config") or os.environ.get("LITESTREAM_CONFIG") or DEFAULT_PATH)
    try:
        with path.open("rb") as file:
            data = file.read(4 * MAX_TEXT + 1)  # more is too large, whatever it says
    except FileNotFoundError:
        raise ConfigError(f"config file not found: {path}", hint="name it with -config or LITESTREAM_CONFIG") from None
    except OSError as error:
        raise ConfigError(f"cannot read config file: {path}: {(error.strerror or str(error)).lower()}") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: not valid UTF-8") from None
    return load(
        text,
        environ=os.environ,
        source=str(path),
        expand_env=flags.get("no-expand-env") != "true",
        lenient=flags.get("lenient") == "true",
    )


def log_warnings(config: Config) -> None:
    """Log what the file says without effect."""
    for note in config.warnings:
        log.warning("config warning line=%d column=%d text=%r", note.line, note.column, note.text)


def find_source(flags: dict[str, str], argument: str) -> Source:
    """Return the replica of a URL or of an existing directory, or those of the database with that path in the configuration.

    Raises:
        ConfigError: a URL together with `-config`, no configuration, or the database is not in it.
    """
    from replicator.storage import open_client, open_replica
    from replicator.storage.url import is_url, scheme

    if is_url(argument) and scheme(argument) not in ("sqlite", "sqlite3"):
        if "config" in flags:
            raise ConfigError("cannot specify a replica URL and the -config flag")
        return _one(open_client(argument))
    if "config" not in flags and os.path.isdir(argument):  # no database, hence a replica
        return _one(open_client(argument))
    settings = configured_database(flags, argument)
    replicas = tuple(settings.replicas)
    return Source(tuple(open_replica(item) for item in replicas), tuple(item.name for item in replicas), settings.path, replicas)


def chosen(source: Source, name: str | None) -> Sequence[int]:
    """Return which of the replicas of a configured database are meant: that of this name, or all. Raises `ConfigError`."""
    if name is None or source.database is None:
        return range(len(source.clients))
    if name not in source.names:
        raise ConfigError(f"replica {name!r} not found for database {source.database}", hint=f"there are: {', '.join(source.names)}")
    return [source.names.index(name)]


def _one(client: ReplicaClient) -> Source:
    return Source((client,), (client.kind,), None)


def configured_database(flags: dict[str, str], argument: str) -> DatabaseSettings:
    """Return the settings of the database with that path. Raises `ConfigError`."""
    from replicator.config import database_path

    config = load_config(flags)
    log_warnings(config)
    path = database_path(argument, home=home(), folder=Path.cwd())
    settings = config.database(path)
    if settings is None:
        raise ConfigError(f"database not found in config: {path}", hint="`pyrepl databases` lists them; a replica is named by its URL")
    return settings


def _absolute(text: str) -> Path:
    from replicator.config import absolute_path

    return absolute_path(text, home=home(), folder=Path.cwd())


def home() -> Path | None:
    """What `~/` stands for."""
    return Path(os.environ["HOME"]) if os.environ.get("HOME") else None
