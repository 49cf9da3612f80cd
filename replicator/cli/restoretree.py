"""`pyrepl restore` of what `dir:` replicates: all databases below a place, into a folder, each at its relative path."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from replicator.cli.configured import home, load_config, log_warnings
from replicator.cli.output import EXIT_FAILED, log_to, table
from replicator.cli.parse import UsageError
from replicator.errors import ConfigError, NoBackups, ReplicatorError

if TYPE_CHECKING:
    from replicator.directories import DirectorySettings

__all__ = ["configured_directory", "restore_tree"]

AT_ONCE = 4
SINGLE = ("txid", "generation", "index", "f", "follow-interval")

log = logging.getLogger("replicator.cli")


def configured_directory(flags: Mapping[str, str], argument: str) -> tuple[DirectorySettings, ...]:
    """Return the entries of the configuration whose `dir` that is; none for anything else."""
    from replicator.storage.url import is_url

    if is_url(argument):
        return ()
    from replicator.config import DEFAULT_PATH, database_path  # not for a URL: half of what the start of a small restore would take

    if "config" not in flags and not os.path.exists(os.environ.get("LITESTREAM_CONFIG") or DEFAULT_PATH):
        return ()
    path = database_path(argument, home=home(), folder=Path.cwd())
    config = load_config(dict(flags))
    found = tuple(item for item in config.directories if item.path == path)
    if found:
        log_warnings(config)
    return found


def restore_tree(flags: dict[str, str], argument: str, directories: Sequence[DirectorySettings]) -> int:
    """Restore everything, one failure or not; 1 when there was one.

    Args:
        directories: what the configuration says about the argument; when empty it is a URL, or the folder of a replica.
    """
    for flag in SINGLE:
        if flag in flags:
            raise UsageError(f"-{flag} goes with one database")
    as_json = flags.get("json") == "true"
    log_to(sys.stderr if as_json else sys.stdout, flags.get("log-level", "info"))
    output = Path(flags["o"]) if "o" in flags else directories[0].path if directories else None
    if output is None:
        raise UsageError("output folder required: -o FOLDER")
    names: dict[str, DirectorySettings] = {}
    for item in directories or (_from_url(argument),):
        for name in _names(item):
            names.setdefault(name, item)
    if not names:
        if flags.get("if-replica-exists") == "true":
            log.info("no matching backups found url=%s", argument)
            return 0
        raise NoBackups(argument)
    if flags.get("dry-run") == "true":
        rows = [[os.fspath(output / name), item.database(item.path / name).replicas[0].url] for name, item in names.items()]
        if as_json:
            print(json.dumps([{"db_path": path, "replica": url} for path, url in rows], indent=2))
        else:
            table(["path", "replica"], rows)
        return 0
    with ThreadPoolExecutor(AT_ONCE) as pool:
        results = list(pool.map(lambda name: _restore(flags, names[name], name, output), names))
    if as_json:
        print(json.dumps(results, indent=2))
    failed = sum("error" in result for result in results)
    skipped = sum(result.get("skipped") is True for result in results)
    log.info("restored databases=%d skipped=%d failed=%d folder=%s", len(results) - failed - skipped, skipped, failed, output)
    return EXIT_FAILED if failed else 0


def _from_url(argument: str) -> DirectorySettings:
    """Return a URL, or the folder of a replica, in the form of a directory that is replicated there."""
    from replicator.directories import DirectorySettings
    from replicator.settings import DatabaseSettings, ReplicaSettings
    from replicator.storage.locations import SCHEMES, parse_store_url
    from replicator.storage.url import file_path, is_url, parse_s3_url, scheme

    kind = scheme(argument) if is_url(argument) else "file"
    if kind == "s3":
        s3 = parse_s3_url(argument, environ=os.environ)
        replica = ReplicaSettings(kind="s3", url=s3.url, s3=s3)
    elif kind == "file":
        directory = Path(file_path(argument)) if is_url(argument) else Path(os.path.abspath(argument))
        replica = ReplicaSettings(kind="file", url=f"file://{directory}", directory=directory)
    elif kind in SCHEMES and kind != "nats":
        store = parse_store_url(argument, environ=os.environ)
        replica = ReplicaSettings(kind=store.kind, url=store.url, store=store)
    else:
        raise ConfigError(
            f"-recursive does not support {kind} URLs", hint="give the URL of a store that holds several replicas, or a folder"
        )
    template = DatabaseSettings(path=Path("/"), replicas=(replica,))
    return DirectorySettings(
        path=Path("/"), pattern="*", recursive=True, watch=False, meta_dir=None, template=template, by_url=(is_url(argument),)
    )


def _names(item: DirectorySettings) -> list[str]:
    """Return the relative paths of the databases on the first replica that can be listed."""
    from replicator.storage import open_replica
    from replicator.storage.below import is_safe, replicas_below

    failure: ReplicatorError | None = None
    for settings, by_url in zip(item.template.replicas, item.by_url, strict=True):
        client = open_replica(settings)
        try:
            found = replicas_below(client)
        except ReplicatorError as error:
            failure = failure or error
            continue
        finally:
            client.close()
        names = [unquote(name, errors="surrogateescape") if by_url and settings.kind == "file" else name for name in found]
        return [name for name in names if name and is_safe(name) and item.may_hold(item.path / name)]
    assert failure is not None
    raise failure


def _restore(flags: dict[str, str], item: DirectorySettings, name: str, folder: Path) -> dict[str, object]:
    from replicator.recover import restore
    from replicator.storage import open_replica

    output = folder / name
    result: dict[str, object] = {"db_path": os.fspath(output)}
    if flags.get("if-db-not-exists") == "true" and output.exists():
        return result | {"skipped": True}
    clients = [open_replica(replica) for replica in item.database(item.path / name).replicas]
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        done = restore(
            clients,
            output,
            timestamp=flags.get("timestamp"),
            force=flags.get("force") == "true",
            integrity_check=flags.get("integrity-check", "none"),  # type: ignore[arg-type]
            parallelism=2,
        )
    except (ReplicatorError, OSError) as error:
        log.error("not restored path=%s error=%r", output, str(error))
        return result | {"error": str(error)}
    finally:
        for client in clients:
            client.close()
    log.info("restored db path=%s txid=%016x", output, done.txid)
    return result | {"txid": f"{done.txid:016x}", "replica": clients[0].kind, "duration_ms": round(done.duration_s * 1000)}
