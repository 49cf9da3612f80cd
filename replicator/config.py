"""`litestream.yml`: text to frozen values. The environment, the home and the working directory are arguments; no file is opened.

Litestream ignores a key that it does not know, and reads a bare `10` as ten nanoseconds. A setting that silently does nothing is how backups
are found missing, so here both are errors with line and column, which `lenient` turns into warnings. What Litestream knows and this engine
does not do yet is a warning, too. All other rules are the peer's, down to the expansion of `$NAME` in the raw text.

Three stages, each in a module of its own: `expand` replaces variables in the text, `yamltree` makes a tree of it, and `configtable` hands out the
values of the keys that are asked for here.

Source: specification 0.5 section 4, specification 0.3 section 13 (older keys), both tried with the released binaries.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, cast
from urllib.parse import urlsplit

from replicator.configtable import Reader, Table, absolute_path, is_nothing, shown
from replicator.directories import DirectorySettings, is_pattern
from replicator.errors import ConfigError
from replicator.expand import expand_environment
from replicator.format.lock import MAX_TTL_S
from replicator.formats import Format
from replicator.levels import History
from replicator.settings import DatabaseSettings, LeaseSettings, ReplicaSettings
from replicator.storage.locations import ABSSettings, StoreSettings, check_path, make_settings, parse_store_url
from replicator.storage.url import MIN_PART_SIZE, S3Settings, endpoint_url, file_path, is_url, parse_s3_url, redact, scheme
from replicator.words import split_words
from replicator.yamltree import MAX_TEXT, Note, ScalarNode, YAMLProblem, parse_yaml

__all__ = [
    "DATABASE_KEYS",
    "DEFAULT_PATH",
    "DEFAULT_SOCKET",
    "MAX_TEXT",
    "REPLICA_KEYS",
    "TOP_KEYS",
    "Config",
    "Daemon",
    "DatabaseSettings",
    "DirectorySettings",
    "Fleet",
    "LeaseSettings",
    "Logging",
    "Note",
    "ReplicaSettings",
    "Socket",
    "absolute_path",
    "database_path",
    "load",
]

DEFAULT_PATH = "/etc/litestream.yml"
DEFAULT_SOCKET = "/var/run/litestream.sock"
MIN_HEARTBEAT_S = 60.0

_SQLITE_URL = re.compile(r"^sqlite3?://")


@dataclass(frozen=True, slots=True)
class Logging:
    """`logging`. `level` is one of trace, debug, info, warn and error, or None when nothing was said; `source`: name file and line."""

    level: str | None = None
    stderr: bool = False
    kind: Literal["text", "json", "pretty"] = "text"
    source: bool = False


@dataclass(frozen=True, slots=True)
class Socket:
    """`socket`: where control requests are taken, and who may send them."""

    enabled: bool = False
    path: Path = Path(DEFAULT_SOCKET)
    permissions: int = 0o600


@dataclass(frozen=True, slots=True, kw_only=True)
class Daemon:
    """What is said about the process itself.

    Attributes:
        address: host (empty for all) and port where metrics are served; None for nowhere.
        command: the application to run, in words; empty for none.
        shutdown_timeout_s, shutdown_interval_s: how long the last sync may take, and the longest time between two of its tries.
        heartbeat_url, heartbeat_interval_s: what is asked for so often while all databases are in order; None for nothing.
    """

    address: tuple[str, int] | None = None
    command: tuple[str, ...] = ()
    socket: Socket = Socket()
    shutdown_timeout_s: float = 30.0
    shutdown_interval_s: float = 0.5
    heartbeat_url: str | None = field(default=None, repr=False)
    heartbeat_interval_s: float = 300.0


@dataclass(frozen=True, slots=True)
class Fleet:
    """`pyrepl`, which Litestream ignores: bounds for all databases of the process together. None stands for what the machine allows.

    Attributes:
        park_after_s: databases that rest for so long are closed; 0 for never.
        park_max_bytes: larger ones are not.
        hot: databases that are open at once.
        recent_bytes: memory for files that were sent lately, of all databases together.
        queued_bytes: memory for files that are being made or wait for a replica, of all databases together.
        uploads_per_s: 0 for no bound.
    """

    park_after_s: float = 30.0
    park_max_bytes: int = 64 << 20
    hot: int | None = None
    recent_bytes: int = 256 << 20
    queued_bytes: int = 256 << 20
    uploads_per_s: int = 0


@dataclass(frozen=True, slots=True)
class Config:
    """A whole file. `databases` are those with a `path`; those of `directories` are found when they are looked for."""

    databases: tuple[DatabaseSettings, ...]
    logging: Logging
    warnings: tuple[Note, ...]
    daemon: Daemon = Daemon()
    directories: tuple[DirectorySettings, ...] = ()
    fleet: Fleet = Fleet()

    @property
    def is_empty(self) -> bool:
        """Whether it names neither a database nor a directory."""
        return not self.databases and not self.directories

    def database(self, path: Path) -> DatabaseSettings | None:
        """Return the settings of the database at an absolute path, whether there is one or not."""
        named = (item for item in self.databases if item.path == path)
        in_directory = (item.database(path) for item in self.directories if item.may_hold(path))
        return next(named, None) or next(in_directory, None)


def load(
    text: str,
    *,
    environ: Mapping[str, str],
    source: str = "litestream.yml",
    expand_env: bool = True,
    lenient: bool = False,
    home: Path | None = None,
    folder: Path | None = None,
    pid: int | None = None,
) -> Config:
    """Read a configuration.

    Args:
        environ: for `$NAME` in the text, and for Litestream's credential variables.
        source: name of the file, for messages.
        expand_env: False takes the text as it is (`-no-expand-env`).
        lenient: unknown keys and bare numbers for durations are warnings, and mean what Litestream makes of them.
        home: what `~/` stands for; `$HOME` when not given.
        folder: what relative paths are relative to; the working directory when not given.
        pid: what `$PID` stands for; this process when not given.

    Raises:
        ConfigError: with the file's name, line and column.
    """
    home = home if home is not None else Path(environ["HOME"]) if environ.get("HOME") else None
    reader = Reader(source, lenient, home, folder if folder is not None else Path.cwd(), inherited=_INHERITED, homes=_HOMES)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{source}: not valid UTF-8") from None
    if len(text) > MAX_TEXT:
        raise ConfigError(f"{source}: too large: {len(text)} characters, {MAX_TEXT} at most")
    if expand_env:
        text, notes = expand_environment(text, environ, pid=os.getpid() if pid is None else pid)
        reader.notes += notes
    try:
        root = parse_yaml(text)
    except YAMLProblem as problem:
        raise ConfigError(f"{source}:{problem.line}:{problem.column}: {problem.what}") from None
    return _read_top(Table(reader, root, ""), environ)


def database_path(text: str, *, home: Path | None, folder: Path) -> Path:
    """Return the absolute path of a database; `sqlite://` and `sqlite3://` before it are dropped. Raises `ConfigError`."""
    return absolute_path(_SQLITE_URL.sub("", text), home=home, folder=folder)


# -- keys ----------------------------------------------------------------------------------------------------------------------

_S3_KEYS = frozenset(
    [
        "access-key-id", "secret-access-key", "region", "bucket", "endpoint", "force-path-style", "sign-payload", "require-content-md5",
        "sign-accept-encoding", "skip-verify", "storage-class", "part-size", "concurrency", "sse-customer-algorithm", "sse-customer-key",
        "sse-customer-key-path", "sse-kms-key-id",
    ]
)  # fmt: skip
_STORE_KEYS: dict[str, frozenset[str]] = {
    "gs": frozenset(["bucket"]),
    "abs": frozenset(["bucket", "account-name", "account-key", "sas-token", "endpoint"]),
    "oss": frozenset(["bucket", "region", "endpoint", "access-key-id", "secret-access-key", "part-size", "concurrency"]),
    "sftp": frozenset(["host", "user", "password", "key-path", "host-key", "concurrent-writes"]),
    "webdav": frozenset(["webdav-url", "webdav-username", "webdav-password"]),
    "nats": frozenset(
        [
            "bucket", "jwt", "seed", "creds", "nkey", "username", "password", "token", "tls", "root-cas", "client-cert", "client-key",
            "max-reconnects", "reconnect-wait", "timeout",
        ]
    ),
}  # fmt: skip
_OTHER_BACKENDS = frozenset().union(*_STORE_KEYS.values()) - _S3_KEYS
_KINDS = {"gcs": "gs", "webdavs": "webdav"}
"""Other names of a kind: 0.3's, and that of a scheme."""

# Keys that have no effect here, and why.
_REPLICA_ELSEWHERE = {
    "max-sync-ltx-files": "uploads are bounded by their bytes: it has no effect",
    "auto-recover": "what can be continued safely is continued without it: it has no effect",
    "validation-interval": "stored files are checked when they are merged and before anything is deleted: it has no effect; "
    "verify-interval of the database compares it with its replicas",
}
_NOT_INHERITED = frozenset(
    ["type", "path", "url", "name", "part-size", "concurrency", "host-key", "webdav-url", "webdav-username", "webdav-password"]
)
_REPLICA_COMMON = frozenset(["type", "path", "url", "name", "sync-interval", "age", *_REPLICA_ELSEWHERE])
_REPLICA_ONLY = frozenset(["retention", "retention-check-interval", "snapshot-interval", "format"])  # of 0.3; never global
_GLOBAL_REPLICA = _REPLICA_COMMON | _S3_KEYS | _OTHER_BACKENDS
_INHERITED = _GLOBAL_REPLICA - _NOT_INHERITED

_TOP_ELSEWHERE = {
    "mcp-addr": "there is no MCP server here: it has no effect",
    "verify-compaction": "every file is verified while it is merged: it has no effect",
    "validation": "stored files are checked when they are merged and before anything is deleted: it has no effect; "
    "verify-interval of a database restores and compares",
}
_TOP_OWN = frozenset(
    [
        "dbs", "levels", "snapshot", "l0-retention", "l0-retention-check-interval", "retention", "logging", "addr", "exec", "socket",
        "shutdown-sync-timeout", "shutdown-sync-interval", "heartbeat-url", "heartbeat-interval", "lease", "pyrepl",
    ]
)  # fmt: skip
_LEASE = frozenset(["ttl", "owner", "takeover"])
_DIRECTORY = ("dir", "pattern", "recursive", "watch", "meta-dir")
_DATABASE_ELSEWHERE = {
    "truncate-page-n": "no checkpoint of this engine truncates the WAL: it has no effect",
    "max-sync-wal-bytes": "a sync reads 64 MiB of the WAL at most: it has no effect",
    "max-checkpoint-page-count": "no checkpoint of this engine makes writers wait for readers: it has no effect",
}
_DATABASE_OWN = frozenset(
    [
        "path", "meta-path", "monitor-interval", "checkpoint-interval", "busy-timeout", "min-checkpoint-page-count", "verify-interval",
        "restore-if-db-not-exists", "snapshot", "format", "sync", "replica", "replicas", "lease", *_DIRECTORY,
    ]
)  # fmt: skip

TOP_KEYS = _TOP_OWN | _TOP_ELSEWHERE.keys()
DATABASE_KEYS = _DATABASE_OWN | _DATABASE_ELSEWHERE.keys()
REPLICA_KEYS = _GLOBAL_REPLICA | _REPLICA_ONLY
"""All keys that are known; those of replicas may stand at the top level, too, for all of them. `docs/keys.md` has what becomes of each."""

# Where a key belongs, for the hint when it stands elsewhere.
_HOMES = (
    (DATABASE_KEYS, "a database's entry in dbs"),
    (REPLICA_KEYS, "replica"),
    (TOP_KEYS, "the top level of the file"),
)

# -- sections ------------------------------------------------------------------------------------------------------------------


def _read_top(top: Table, environ: Mapping[str, str]) -> Config:
    top.check_keys(TOP_KEYS | _GLOBAL_REPLICA)
    top.no_effect_of({**_TOP_ELSEWHERE, **_REPLICA_ELSEWHERE})
    top.no_effect(_NOT_INHERITED, "replicas do not inherit this key: it has no effect here")
    entries = [Table(top.reader, node, where) for node, where in top.items("dbs")]
    history, lease = _read_history(top, entries), _read_lease(top, environ)
    found = [_read_entry(entry, top, history, lease, environ) for entry in entries]
    _check_unique(top.reader, entries, found)
    log, daemon, fleet = _read_logging(top.table("logging")), _read_daemon(top), _read_fleet(top.table("pyrepl"))
    return Config(
        tuple(item for item in found if isinstance(item, DatabaseSettings)),
        log,
        tuple(sorted(top.reader.notes, key=lambda note: (note.line, note.column))),
        daemon,
        tuple(item for item in found if isinstance(item, DirectorySettings)),
        fleet,
    )


def _read_fleet(table: Table) -> Fleet:
    table.check_keys(["park-after", "park-max-size", "max-hot", "max-recent", "max-queued", "max-uploads-per-second"])
    hot = table.number("max-hot")
    if hot == 0:
        table.fail("max-hot", "must be greater than 0", "leave it out for what the machine allows")
    said = {
        "park_after_s": table.duration("park-after"),
        "park_max_bytes": table.size("park-max-size"),
        "hot": hot,
        "recent_bytes": table.size("max-recent"),
        "queued_bytes": table.size("max-queued"),
        "uploads_per_s": table.number("max-uploads-per-second"),
    }
    return replace(Fleet(), **{key: value for key, value in said.items() if value is not None})  # type: ignore[arg-type]


def _read_entry(
    entry: Table, top: Table, history: History, leases: LeaseSettings, environ: Mapping[str, str]
) -> DatabaseSettings | DirectorySettings:
    """Read an entry of `dbs`: a database, or a directory of them."""
    if entry.own("dir") is None:
        if entry.own("path") is None:
            entry.reader.fail(entry.place, f"{entry.where}: path is missing")
        return _read_database(entry, top, history, leases, environ)
    if entry.own("path") is not None:
        entry.fail("dir", "cannot specify both 'path' and 'dir'")
    pattern = entry.text("pattern")
    if pattern is None:
        entry.fail("dir", "'pattern' is required when using 'dir'", "such as pattern: '*.db'")
    if not is_pattern(pattern):
        entry.fail("pattern", "syntax error in pattern", "* ? [a-z] [^a-z], and a backslash before one of them")
    if "/" in pattern:
        entry.warn("pattern", "is compared with the name of the file alone: one with a slash finds nothing")
    if entry.boolean("restore-if-db-not-exists"):
        entry.fail("restore-if-db-not-exists", "not for directories", "restore them with `pyrepl restore -config ... DIR` first")
    meta_dir = entry.path("meta-dir")
    if meta_dir is not None and entry.own("meta-path") is not None:
        entry.fail("meta-dir", "cannot specify both 'meta-path' and 'meta-dir'")
    template = _read_database(entry, top, history, leases, environ)
    tables = (
        [entry.table("replica")] if entry.own("replica") is not None else [Table(entry.reader, *item) for item in entry.items("replicas")]
    )
    return DirectorySettings(
        path=template.path,
        pattern=pattern,
        recursive=bool(entry.boolean("recursive")),
        watch=bool(entry.boolean("watch")),
        meta_dir=meta_dir,
        template=template,
        by_url=tuple(table.own("url") is not None for table in tables),
    )


def _read_daemon(top: Table) -> Daemon:
    said = {
        "address": _read_address(top),
        "command": _read_command(top),
        "shutdown_timeout_s": top.duration("shutdown-sync-timeout"),
        "shutdown_interval_s": top.duration("shutdown-sync-interval", zero=False),
        "heartbeat_url": _read_heartbeat_url(top),
        "heartbeat_interval_s": _read_heartbeat_interval(top),
    }
    return replace(Daemon(socket=_read_socket(top.table("socket"))), **{key: value for key, value in said.items() if value is not None})  # type: ignore[arg-type]


def _read_heartbeat_url(top: Table) -> str | None:
    text = top.text("heartbeat-url")
    try:
        parts = urlsplit(text or "http://h")
        is_right = parts.scheme in ("http", "https") and bool(parts.hostname) and not re.search(r"[^!-~]", text or "") and parts.port != 0
    except ValueError:
        is_right = False
    if not is_right:
        top.fail("heartbeat-url", "must be a URL that begins with http:// or https://")
    return text


def _read_heartbeat_interval(top: Table) -> float | None:
    interval = top.duration("heartbeat-interval")
    if interval is not None and interval < MIN_HEARTBEAT_S:
        top.fail("heartbeat-interval", "must be at least 1m")
    return interval


def _read_address(top: Table) -> tuple[str, int] | None:
    text = top.text("addr")
    if text is None:
        return None
    found = re.fullmatch(r"(?:\[([0-9A-Fa-f:.%\w]+)\]|([^\[\]:/\s]*)):([0-9]{1,5})", text)
    if found is None or int(found[3]) > 65535:
        top.fail("addr", "must specify port for bind address, as in :9090 or 127.0.0.1:9090")
    return found[1] or found[2] or "", int(found[3])


def _read_command(top: Table) -> tuple[str, ...] | None:
    text = top.text("exec")
    try:
        return None if text is None else split_words(text)
    except ConfigError as error:
        top.fail("exec", str(error), error.hint)


def _read_socket(table: Table) -> Socket:
    table.check_keys(["enabled", "path", "permissions"])
    return Socket(bool(table.boolean("enabled")), table.path("path") or Path(DEFAULT_SOCKET), _read_permissions(table))


def _read_permissions(table: Table) -> int:
    text = table.text("permissions")
    if text is None:
        return Socket().permissions
    found = re.fullmatch(r"0o?([0-7]{3})", text)
    if found is None:
        # In YAML 600 is a decimal number: mode 1130, which nobody means.
        table.fail("permissions", "must be an octal number such as 0600, with the leading zero")
    return int(found[1], 8)


def _read_logging(table: Table) -> Logging:
    table.check_keys(["level", "type", "stderr", "source"])
    kind = table.text("type") or "text"
    if kind not in ("text", "json", "pretty"):
        table.fail("type", "must be text, json or pretty")
    level = (table.text("level") or "").lower()
    level = {"warning": "warn"}.get(level, level)
    if level not in ("", "trace", "debug", "info", "warn", "error"):
        table.fail("level", "must be trace, debug, info, warn or error")
    return Logging(
        level or None, bool(table.boolean("stderr")), cast('Literal["text", "json", "pretty"]', kind), bool(table.boolean("source"))
    )


def _read_history(top: Table, entries: Sequence[Table]) -> History:
    retention = top.node("retention")
    if isinstance(retention, ScalarNode):
        top.fail(
            "retention", "must be a mapping with the key enabled", "a time goes to snapshot.retention, or to retention under a replica"
        )
    table = top.table("retention")
    table.check_keys(["enabled"])
    enabled = table.boolean("enabled")
    levels = []
    for node, where in top.items("levels"):
        level = Table(top.reader, node, where)
        level.check_keys(["interval"])
        if (interval := level.duration("interval", zero=False)) is None:
            top.reader.fail(node, f"{where}: interval is missing")
        levels.append(interval)
    if top.own("levels") is not None and not 1 <= len(levels) <= 8:
        top.fail("levels", f"must have 1 to 8 entries, not {len(levels)}")
    values = {
        "snapshot_interval_s": _hoisted(top, entries, "interval"),
        "snapshot_retention_s": _hoisted(top, entries, "retention"),
        "l0_retention_s": top.duration("l0-retention"),
        "l0_retention_check_interval_s": top.duration("l0-retention-check-interval", zero=False),
    }
    history = replace(History(), **{name: value for name, value in values.items() if value is not None})  # type: ignore[arg-type]
    return replace(history, level_intervals_s=tuple(levels) or history.level_intervals_s, retention_enabled=enabled is not False)


def _hoisted(top: Table, entries: Sequence[Table], key: str) -> float | None:
    """Return `snapshot.<key>`: the file's own, else that of the databases, who must agree."""
    own = top.table("snapshot")
    own.check_keys(["interval", "retention"])
    chosen = own.duration(key, zero=False)
    first: Table | None = None
    saying = 0
    for entry in entries:
        table = entry.table("snapshot")
        table.check_keys(["interval", "retention"])
        value = table.duration(key, zero=False)
        if value is None:
            continue
        saying += 1
        if chosen is None:
            chosen, first = value, table
        elif value != chosen and first is not None:
            table.fail(
                key, f"conflicts with {first.named(key)}: one value holds for all databases", "give it once, as snapshot at the top level"
            )
        elif value != chosen:
            node = table.node(key) or table.place
            top.reader.object(node, f"{table.named(key)}: snapshot.{key} at the top level holds for all databases, in Litestream, too")
    if first is not None and saying < len(entries):
        first.warn(key, "holds for all databases, as in Litestream")
    return chosen


def _read_lease(top: Table, environ: Mapping[str, str]) -> LeaseSettings:
    """Return what `lease` at the top says: terms for all databases, and with a URL one lease for all of them."""
    table = top.table("lease", fallback=top)
    table.check_keys(_LEASE | {"url"} | _S3_KEYS)
    return replace(_lease_terms(table, LeaseSettings()), home=_lease_home(table, top, environ))


def _lease_home(table: Table, top: Table, environ: Mapping[str, str]) -> ReplicaSettings | None:
    url = table.text("url")
    if url is None:
        table.no_effect(_S3_KEYS, "goes with url only: it has no effect")
        return None
    kind = scheme(url) if is_url(url) else None
    if kind == "file":
        table.no_effect(_S3_KEYS, "of no use for a place of type file: it has no effect")
        directory = _directory(table, url, None)
        return ReplicaSettings(kind="file", url=f"file://{directory}", directory=directory)
    if kind != "s3":
        table.fail("url", "must be a URL of type file or s3", "give file:///path or s3://bucket/path")
    s3, key_path = _read_s3(table, top, url, None)
    return ReplicaSettings(kind="s3", url=s3.url, s3=s3.with_environment(environ), sse_customer_key_path=key_path)


def _lease_terms(table: Table, general: LeaseSettings) -> LeaseSettings:
    ttl_s = table.duration("ttl")
    if ttl_s is not None and not 1 <= ttl_s <= MAX_TTL_S:
        table.fail("ttl", f"must be 1s to {MAX_TTL_S / 3600:g}h")
    said = {"ttl_s": ttl_s, "owner": table.text("owner"), "takeover": table.boolean("takeover")}
    return replace(general, **{name: value for name, value in said.items() if value is not None})  # type: ignore[arg-type]


def _database_lease(entry: Table, general: LeaseSettings) -> LeaseSettings | None:
    """Return a database's lease: that of all, if there is one, unless it says otherwise."""
    node = entry.own("lease")
    if node is None:
        return general if general.home is not None else None
    if isinstance(node, ScalarNode):
        return general if entry.boolean("lease") else None
    table = entry.table("lease")
    table.check_keys(_LEASE)
    terms = _lease_terms(table, general)
    if general.home is not None and replace(terms, takeover=general.takeover) != general:
        entry.fail("lease", "ttl and owner are those of the one lease for all databases", "remove them here, or url from lease at the top")
    return terms


def _read_database(entry: Table, top: Table, history: History, leases: LeaseSettings, environ: Mapping[str, str]) -> DatabaseSettings:
    entry.check_keys(DATABASE_KEYS)
    if entry.own("dir") is None:
        entry.no_effect(_DIRECTORY, "goes with dir only: it has no effect")
    entry.no_effect_of(_DATABASE_ELSEWHERE)
    path = entry.path("path", strip=_SQLITE_URL) or entry.path("dir")
    assert path is not None
    pages = entry.number("min-checkpoint-page-count")
    if pages == 0:
        entry.fail("min-checkpoint-page-count", "must be greater than 0")
    monitor = entry.duration("monitor-interval")
    if monitor == 0:
        entry.warn("monitor-interval", "0 would switch replication off: it has no effect")
    if entry.own("replica") is not None and entry.own("replicas") is not None:
        entry.fail("replicas", "cannot specify 'replica' and 'replicas' on a database")
    tables = [Table(entry.reader, node, where, fallback=top) for node, where in entry.items("replicas")]
    if entry.own("replica") is not None:
        tables = [entry.table("replica", fallback=top)]
    if not tables:
        entry.reader.fail(entry.place, f"{entry.where}: must specify replica for database")
    replicas = tuple(_read_replica(table, top, history, environ) for table in tables)
    form = _read_format(entry, tables)
    verify_interval = entry.duration("verify-interval", zero=False)
    if verify_interval is not None and form != "ltx":
        entry.fail("verify-interval", f"format {form} has no drills", "remove the key")
    lease = _database_lease(entry, leases)
    if lease is not None and form != "ltx":
        entry.fail("lease" if entry.own("lease") is not None else "format", f"format {form} has no leases", "lease: false")
    intervals = {item.sync_interval_s for item in replicas}
    if len(intervals) > 1:
        entry.reader.warn(tables[0].place, f"{entry.where}: the shortest sync-interval holds for all replicas of a database")
    sync = entry.text("sync")
    if sync not in (None, "interval", "commit"):
        entry.fail("sync", "must be interval or commit")
    return DatabaseSettings(
        path=path,
        replicas=replicas,
        meta_path=entry.path("meta-path"),
        monitor_interval_s=monitor or None,
        checkpoint_interval_s=entry.duration("checkpoint-interval"),
        busy_timeout_s=entry.duration("busy-timeout"),
        min_checkpoint_pages=pages,
        verify_interval_s=verify_interval,
        restore_if_db_not_exists=bool(entry.boolean("restore-if-db-not-exists")),
        format=form,
        sync="commit" if sync == "commit" else "interval",
        lease=lease,
    )


def _read_format(entry: Table, replicas: Sequence[Table]) -> Format:
    """Return the one format of a database: its own, or that which all of its replicas name."""
    said = [(table, _format(table)) for table in (entry, *replicas)]
    own = said[0][1]
    first = own or next((found for _, found in said if found), None)
    for table, found in said[1:]:
        if (found or own or "ltx") != (first or "ltx"):
            hint = "all replicas of a database have one format: give it once, as format of the database"
            table.reader.fail(table.node("format") or table.place, f"{table.named('format')}: is not that of the others ({first})", hint)
    return first or "ltx"


def _format(table: Table) -> Format | None:
    text = table.text("format")
    if text not in (None, "ltx", "v0.3"):
        table.fail("format", "must be ltx or v0.3")
    return "ltx" if text == "ltx" else "v0.3" if text else None


def _check_unique(reader: Reader, entries: Sequence[Table], found: Sequence[DatabaseSettings | DirectorySettings]) -> None:
    """Refuse two entries for one database, directory or metadata folder, and two databases (or two entries of one) in one replica."""
    seen: dict[tuple[str, str], int] = {}
    for number, (entry, item) in enumerate(zip(entries, found, strict=True)):
        for kind, place in _places(item):
            other = seen.setdefault((kind, place), number)
            if other != number and not _share_directory(item, found[other]):
                reader.fail(entry.place, f"{entry.where}: duplicate {kind} {place} (already used by dbs[{other}])")
        for kind, place in (twice for at, twice in enumerate(_places(item)) if twice in _places(item)[:at]):
            reader.fail(entry.place, f"{entry.where}: duplicate {kind} {place} (used twice)")


def _places(item: DatabaseSettings | DirectorySettings) -> list[tuple[str, str]]:
    """Return what no other entry may have."""
    if isinstance(item, DirectorySettings):
        return [("dir and pattern", f"{item.path} {item.pattern}"), *(("replica", replica.url) for replica in item.template.replicas)]
    meta = item.meta_path or item.path.with_name(f".{item.path.name}-litestream")
    return [("path", str(item.path)), ("metadata path", str(meta)), *(("replica", replica.url) for replica in item.replicas)]


def _share_directory(one: DatabaseSettings | DirectorySettings, other: DatabaseSettings | DirectorySettings) -> bool:
    """Say whether two entries take different files of one directory, which may lie side by side in one replica."""
    if not (isinstance(one, DirectorySettings) and isinstance(other, DirectorySettings)):
        return False
    return one.path == other.path and one.pattern != other.pattern


def _read_replica(table: Table, top: Table, history: History, environ: Mapping[str, str]) -> ReplicaSettings:
    table.check_keys(REPLICA_KEYS)
    table.no_effect_of(_REPLICA_ELSEWHERE)
    table.no_effect(["retention-check-interval"], "retention is applied after each snapshot: it has no effect")
    url, path = table.text("url"), table.text("path")
    if path is not None and is_url(path):
        table.fail("path", f"replica path cannot be a url, please use the 'url' field instead: {redact(path)}")
    if url is not None and not is_url(url):
        table.fail("url", "not a URL", "give file:///path or s3://bucket/path, or use path")
    kind = (scheme(url) if url is not None else table.text("type")) or "file"
    kind = _KINDS.get(kind, kind)
    if kind not in ("file", "s3", *_STORE_KEYS):
        hint = f"supported are file, s3, {', '.join(_STORE_KEYS)}"
        table.fail("url" if url is not None else "type", f"unknown replica type in config: {shown(kind)}", hint)
    if url is not None and path is not None:
        table.fail("path", f"cannot specify url & path for {kind} replica")
    own = _S3_KEYS if kind == "s3" else _STORE_KEYS.get(kind, frozenset())
    table.no_effect((_OTHER_BACKENDS | _S3_KEYS) - own, f"of no use for a replica of type {kind}: it has no effect")
    identities, recipients = _read_age(table, top)
    settings = ReplicaSettings(
        kind="file",
        url="",
        sync_interval_s=table.duration("sync-interval", zero=False),
        history=_own_history(table, history),
        age_identities=identities,
        age_recipients=recipients,
        given_name=table.text("name") or "",
    )
    if kind == "s3":
        s3, key_path = _read_s3(table, top, url, path)
        return replace(settings, kind="s3", url=s3.url, s3=s3.with_environment(environ), sse_customer_key_path=key_path)
    if kind != "file":
        store = _read_store(table, kind, url, path, environ)
        return replace(settings, kind=store.kind, url=store.url, store=store)
    return replace(settings, directory=(directory := _directory(table, url, table.path("path"))), url=f"file://{directory}")


def _directory(table: Table, url: str | None, path: Path | None) -> Path:
    if url is None:
        if path is None:
            table.reader.fail(table.place, f"{table.where}: file replica path required")
        return path
    try:
        return Path(file_path(url))
    except ConfigError as error:
        table.fail("url", str(error), error.hint)


def _own_history(table: Table, history: History) -> History:
    """Return the history with what 0.3 lets a replica say about its own."""
    retention = table.duration("retention", zero=False)
    interval = table.duration("snapshot-interval")
    if retention is not None:
        history = replace(history, snapshot_retention_s=retention)
    if interval is not None:
        history = replace(history, snapshot_interval_s=interval)
    return history


def _read_age(table: Table, top: Table) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return identities and recipients. `age` that says nothing is an error: an unset variable must not mean plaintext."""
    if not table.has("age"):
        return (), ()
    own, general = table.table("age"), top.table("age")
    for age in (own, general):
        age.check_keys(["identities", "recipients"])
    identities, recipients = (
        _texts(own, key) if own.node(key) is not None else _texts(general, key) for key in ("identities", "recipients")
    )
    if not identities and not recipients:
        hint = "remove the key age if the replica is not to be encrypted; a variable that is not set is empty"
        table.reader.fail(own.place, f"{own.where}: neither recipients nor identities", hint)
    if any(text.upper().startswith("AGE-SECRET-KEY-") for text in recipients):
        table.reader.fail(own.place, f"{own.where}.recipients: a secret key is not a recipient", "put it under identities")
    return identities, recipients


def _texts(table: Table, key: str) -> tuple[str, ...]:
    found = []
    for node, where in table.items(key):
        if not isinstance(node, ScalarNode) or is_nothing(node):
            table.reader.fail(node, f"{where}: must be text, and not empty")
        found.append(node.text)
    return tuple(found)


def _read_s3(table: Table, top: Table, url: str | None, path: str | None) -> tuple[S3Settings, Path | None]:
    reader = table.reader
    if url is not None and table.own("bucket") is not None:
        table.fail("bucket", "cannot specify url & bucket for s3 replica")
    if (table.text("access-key-id") is None) != (table.text("secret-access-key") is None):
        reader.fail(table.place, f"{table.where}: access-key-id and secret-access-key go together")
    if table.text("sse-customer-algorithm") not in (None, "AES256"):
        table.fail("sse-customer-algorithm", "must be AES256")
    key_path = table.text("sse-customer-key-path")
    if table.node("sse-customer-algorithm") is not None and key_path is None and table.node("sse-customer-key") is None:
        table.fail("sse-customer-algorithm", "given without sse-customer-key")
    if key_path is not None and table.node("sse-customer-key") is not None:
        table.fail("sse-customer-key-path", "cannot specify sse-customer-key & sse-customer-key-path")
    said: dict[str, object] = {
        "region": table.text("region"),
        "endpoint": _endpoint(table),
        "force_path_style": table.boolean("force-path-style"),
        "sign_payload": table.boolean("sign-payload"),
        "require_content_md5": table.boolean("require-content-md5"),
        "sign_accept_encoding": table.boolean("sign-accept-encoding"),
        "skip_verify": bool(table.boolean("skip-verify") or top.boolean("skip-verify")),
        "storage_class": table.text("storage-class"),
        "part_size": _part_size(table),
        "concurrency": table.number("concurrency") or None,
        "access_key_id": table.text("access-key-id"),
        "secret_access_key": table.text("secret-access-key"),
        "sse_customer_key": table.text("sse-customer-key"),
        "sse_kms_key_id": table.text("sse-kms-key-id"),
    }
    values = {name: value for name, value in said.items() if value is not None}
    if url is None:
        values |= {"bucket": _bucket(table), "path": _literal_path(table, path or "")}
    elif "endpoint" in values:
        values.setdefault("force_path_style", True)
    try:
        s3 = S3Settings(**values) if url is None else replace(parse_s3_url(url), **values)  # type: ignore[arg-type]
    except ConfigError as error:
        reader.fail(table.node("url") or table.place, f"{table.where}: {error}", error.hint)
    return s3, table.path("sse-customer-key-path")


# What a URL says and another key may not say again.
_SAID_BY_URL = {"gs": "bucket", "abs": "bucket", "oss": "bucket", "sftp": "host", "webdav": "webdav-url"}
_PATH_KEYS = frozenset(["key-path", "creds", "client-cert", "client-key"])
_SETTING_NAMES = {
    "webdav-url": "server",
    "webdav-username": "username",
    "webdav-password": "password",
    "reconnect-wait": "reconnect_wait_s",
    "timeout": "timeout_s",
}
_NEEDED = {
    "gs": ("bucket",),
    "abs": ("bucket",),
    "oss": ("bucket",),
    "sftp": ("host", "user"),
    "webdav": ("webdav-url",),
    "nats": ("bucket",),
}


def _read_store(table: Table, kind: str, url: str | None, path: str | None, environ: Mapping[str, str]) -> StoreSettings:
    twice = _SAID_BY_URL.get(kind)
    if url is not None and twice is not None and table.own(twice) is not None:
        table.fail(twice, f"cannot specify url & {twice} for {kind} replica")
    if kind == "nats" and path is not None:
        table.fail("path", "a NATS bucket holds one replica and has no path", "give bucket, or nats://host/bucket")
    values = {_SETTING_NAMES.get(key, key.replace("-", "_")): _store_value(table, key) for key in sorted(_STORE_KEYS[kind])}
    values = {name: value for name, value in values.items() if value is not None}
    if url is not None:
        values.pop("bucket", None)  # inherited, for replicas without a URL
    try:
        if url is not None:
            store = parse_store_url(url, environ=environ, **values)
        else:
            for key in _NEEDED[kind]:
                if table.text(key) is None:
                    table.reader.fail(table.place, f"{table.where}: {key} required for {kind} replica")
            store = make_settings(kind, {**values, **({} if kind == "nats" else {"path": check_path(path or "")})}, environ=environ)
    except ConfigError as error:
        if error.args and str(error).startswith(table.reader.source):
            raise
        table.reader.fail(table.node("url") or table.place, f"{table.where}: {error}", error.hint)
    if isinstance(store, ABSSettings) and store.account_key and store.sas_token:
        table.reader.warn(table.place, f"{table.where}: both account-key and sas-token: the token is used")
    return store


def _store_value(table: Table, key: str) -> object:
    """Return a setting as its type; None where nothing was said."""
    match key:
        case "concurrent-writes" | "tls":
            return table.boolean(key)
        case "concurrency":
            return table.number(key) or None
        case "max-reconnects":
            return _reconnects(table)
        case "part-size":
            return table.size(key) or None
        case "reconnect-wait" | "timeout":
            return table.duration(key, zero=key != "timeout")
        case "root-cas":
            return (
                tuple(str(absolute_path(text, home=table.reader.home, folder=table.reader.folder)) for text in _texts(table, key)) or None
            )
        case "endpoint":
            return _endpoint(table)
        case _ if key in _PATH_KEYS:
            found = table.path(key)
            return None if found is None else str(found)
    return table.text(key)


def _reconnects(table: Table) -> int | None:
    text = table.text("max-reconnects")
    if text is not None and not re.fullmatch(r"-1|[0-9]{1,6}", text):
        table.fail("max-reconnects", "must be a whole number, or -1 for no limit")
    return None if text is None else int(text)


def _bucket(table: Table) -> str:
    bucket = table.text("bucket")
    if bucket is None:
        table.reader.fail(table.place, f"{table.where}: bucket required for s3 replica")
    return bucket


def _literal_path(table: Table, path: str) -> str:
    """Return the beginning of the keys. Unlike a URL's path it is taken as it is written, in Litestream, too."""
    if any(ord(character) < 32 or ord(character) == 127 for character in path):
        table.fail("path", "has control characters")
    if path != posixpath.normpath(f"/{path}").lstrip("/"):
        table.warn("path", "is used as it is written, extra slashes and dots included, as in Litestream; a URL cannot name this place")
    return path


def _endpoint(table: Table) -> str | None:
    text = table.text("endpoint")
    try:
        return None if text is None else endpoint_url(text, private_http=False)
    except ConfigError as error:
        table.fail("endpoint", str(error), error.hint)


def _part_size(table: Table) -> int | None:
    size = table.size("part-size")
    if size and size < MIN_PART_SIZE:
        table.fail("part-size", f"must be at least 5MiB (got {table.text('part-size')})")
    return size or None
