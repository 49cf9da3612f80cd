"""`pyrepl databases`: list what the configuration file names."""

from __future__ import annotations

import json
import os
import sys

from replicator.cli.configured import CONFIG_FLAGS, CONFIG_OPTIONS, CONFIG_SWITCHES, load_config, log_warnings
from replicator.cli.output import log_to, table
from replicator.cli.parse import Command, UsageError

__all__ = ["COMMAND"]


def databases(flags: dict[str, str], arguments: list[str]) -> int:
    if arguments:
        raise UsageError("too many arguments")
    log_to(sys.stderr, "warn")
    from replicator.fleet import databases_in

    config = load_config(flags)
    log_warnings(config)
    found = [*config.databases, *(item for directory in config.directories for item in databases_in(directory))]
    rows = [(os.fspath(item.path), ",".join(replica.kind for replica in item.replicas)) for item in found]
    if flags.get("json") == "true":
        print(json.dumps([{"path": path, "replica": replica} for path, replica in rows], indent=2))
    else:
        table(["path", "replica"], [list(row) for row in rows])
    return 0


COMMAND = Command(
    f"pyrepl databases {CONFIG_FLAGS} [-json]",
    "List the databases of the configuration file.",
    ("json", *CONFIG_SWITCHES),
    CONFIG_OPTIONS,
    databases,
)
