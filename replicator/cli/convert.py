"""`pyrepl convert`: turn a replica of Litestream 0.3 into one of LTX files, old moments included."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

from replicator.cli.configured import CONFIG_FLAGS, CONFIG_OPTIONS, CONFIG_SWITCHES, chosen, find_source
from replicator.cli.output import Bar, log_to, time_text
from replicator.cli.parse import Command, UsageError
from replicator.errors import ConfigError

if TYPE_CHECKING:
    from replicator.storage.base import ReplicaClient

__all__ = ["COMMAND"]


def convert(flags: dict[str, str], arguments: list[str]) -> int:
    if len(arguments) != 2:
        raise UsageError("give the URL of the 0.3 replica (or a database of the configuration), and the URL of an empty destination")
    parallelism = flags.get("parallelism", "8")
    if not parallelism.isdigit() or not 1 <= int(parallelism) <= 256:
        raise UsageError(f"invalid value for -parallelism: {parallelism!r} (1 to 256)")
    log_to(sys.stderr, flags.get("log-level", "info"))
    from replicator.convert import convert as run
    from replicator.format.v3 import is_generation

    generation = flags.get("generation")
    if generation is not None and not is_generation(generation):
        raise UsageError(f"invalid value for -generation: {generation!r} (16 hex digits)")
    source, target = _open(flags, *arguments)
    try:
        with Bar("converting") as bar:
            made = run(source, target, generation=generation, parallelism=int(parallelism), progress=bar.show)
    finally:
        source.close()
        target.close()
    if flags.get("json") == "true":
        document = {
            "source": source.url,
            "destination": target.url,
            "txid": f"{made.txid:016x}",
            "snapshots": made.snapshots,
            "files": made.files,
            "bytes": made.bytes_written,
            "oldest": time_text(made.oldest),
            "newest": time_text(made.newest),
            "duration_ms": round(made.duration_s * 1000),
        }
        print(json.dumps(document, indent=2))
        return 0
    print(
        f"{target.url}: {made.files} files up to TXID {made.txid:016x}, {made.snapshots} of them full images, {made.bytes_written} bytes; "
        f"moments from {time_text(made.oldest)} to {time_text(made.newest)}"
    )
    return 0


def _open(flags: dict[str, str], what: str, url: str) -> tuple[ReplicaClient, ReplicaClient]:
    """Return source and destination. What is encrypted stays so, unless `-plaintext` says otherwise."""
    from replicator.storage import open_client

    found = find_source(flags, what)
    number, *others = chosen(found, flags.get("replica"))
    if others:
        raise ConfigError(f"database has several replicas: {found.database}", hint=f"choose with -replica: {', '.join(found.names)}")
    source = found.clients[number]
    recipients, identities = (found.settings[number].age_recipients, found.settings[number].age_identities) if found.settings else ((), ())
    if flags.get("plaintext") == "true" or not (recipients or identities):
        return source, open_client(url)
    if not recipients:
        hint = "add age.recipients to the replica, or store in plain text with -plaintext"
        raise ConfigError(f"there are no keys to encrypt the destination to: {found.database}", hint=hint)
    return source, open_client(url, age_recipients=recipients, age_identities=identities)


COMMAND = Command(
    "pyrepl convert [-generation NAME] [-parallelism N] [-json] SRC_URL DST_URL\n"
    f"       pyrepl convert [...] [-replica NAME] [-plaintext] {CONFIG_FLAGS} DB DST_URL",
    "Turn a Litestream 0.3 replica into an LTX replica.\n\n"
    "Every moment that could be restored can be restored from the destination, which must be empty. A run that was stopped is taken up again.\n"
    "An encrypted replica is read with the keys of the configuration. What is made is encrypted to its recipients; with -plaintext it is not.",
    ("json", "plaintext", *CONFIG_SWITCHES),
    ("generation", "parallelism", "log-level", "replica", *CONFIG_OPTIONS),
    convert,
)
