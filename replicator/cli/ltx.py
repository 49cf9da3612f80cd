"""`pyrepl ltx`: list the stored files."""

from __future__ import annotations

import json
import re
import sys
from typing import TYPE_CHECKING

from replicator.cli.configured import CONFIG_FLAGS, CONFIG_OPTIONS, CONFIG_SWITCHES, find_source
from replicator.cli.output import log_to, table, time_text
from replicator.cli.parse import Command, UsageError

if TYPE_CHECKING:
    from replicator.format.ltx import FileInfo

__all__ = ["COMMAND"]


def ltx(flags: dict[str, str], arguments: list[str]) -> int:
    if len(arguments) != 1:
        raise UsageError("give one replica URL, or the path of a database in the configuration")
    level = flags.get("level", "0")
    if level != "all" and not re.fullmatch(r"[0-9]", level):
        raise UsageError(f"invalid value for -level: {level!r} (0 to 9, or all)")
    log_to(sys.stderr, "warn")
    levels = range(10) if level == "all" else [int(level)]
    clients = find_source(flags, arguments[0]).clients
    from replicator.restorer import first_answer

    files: list[FileInfo] = first_answer(clients, lambda client: [info for number in levels for info in client.list(number)])
    if flags.get("json") == "true":
        document = [
            {
                "level": info.level,
                "min_txid": f"{info.min_txid:016x}",
                "max_txid": f"{info.max_txid:016x}",
                "size": info.size,
                "timestamp": time_text(info.created_at),
            }
            for info in files
        ]
        print(json.dumps(document, indent=2))
        return 0
    rows = [
        [str(info.level), f"{info.min_txid:016x}", f"{info.max_txid:016x}", str(info.size), time_text(info.created_at)] for info in files
    ]
    table(["level", "min_txid", "max_txid", "size", "created"], rows)
    return 0


COMMAND = Command(
    f"pyrepl ltx [-level 0..9|all] [-json] {CONFIG_FLAGS} DB|URL",
    "List the stored files.",
    ("json", *CONFIG_SWITCHES),
    ("level", *CONFIG_OPTIONS),
    ltx,
)
