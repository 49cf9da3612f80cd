"""`pyrepl lease`: show who has a lease, or take it from an owner that is gone."""

from __future__ import annotations

import json

from replicator.cli.configured import CONFIG_FLAGS, CONFIG_OPTIONS, CONFIG_SWITCHES, find_source
from replicator.cli.output import time_text
from replicator.cli.parse import Command, UsageError

__all__ = ["COMMAND"]


def lease(flags: dict[str, str], arguments: list[str]) -> int:
    if len(arguments) != 2 or arguments[0] not in ("show", "release"):
        raise UsageError("give show or release, and the URL of the place of the lease, or the path of a database in the configuration")
    from replicator.lease import LOCK_NAME, read_lock, release_lock

    source = find_source(flags, arguments[1])
    client = source.clients[0]
    try:
        if arguments[0] == "release":
            before = release_lock(client, force=flags.get("force") == "true")
            record = before
        else:
            found = read_lock(client)
            record = found[1] if found is not None else None
    finally:
        for item in source.clients:
            item.close()
    url = f"{client.url.rstrip('/')}/{LOCK_NAME}"
    if record is None:
        fields: dict[str, object] = {"url": url, "state": "none"}
    else:
        state = "released" if record.released or arguments[0] == "release" else "held"
        fields = {
            "url": url,
            "state": state,
            "owner": record.owner,
            "generation": record.generation,
            "expires_at": time_text(record.expires),
            "ttl_seconds": record.ttl_s,
            **({"wanted_by": record.wanted_by} if record.wanted_by else {}),
        }
    if flags.get("json") == "true":
        print(json.dumps(fields, indent=2))
    else:
        for key, value in fields.items():
            print(f"{key}: {value}")
    return 0


COMMAND = Command(
    f"pyrepl lease show [-json] {CONFIG_FLAGS} DB|URL\n       pyrepl lease release [-force] [-json] {CONFIG_FLAGS} DB|URL",
    "Show who has a lease, or release it for an owner that is gone.\n\n"
    "DB: a database of the configuration, for the lease in its first replica.  URL: the place of the lease.\n"
    "release: for the next one who asks. An owner that lives finds its lease lost, and stops.\n"
    "-force: also before its time is over, and what cannot be understood.",
    ("force", "json", *CONFIG_SWITCHES),
    CONFIG_OPTIONS,
    lease,
)
