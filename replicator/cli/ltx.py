"""`pyrepl ltx`: list the stored files."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

from replicator.cli.output import table, time_text
from replicator.cli.parse import Command, UsageError

if TYPE_CHECKING:
    from replicator.format.ltx import FileInfo

__all__ = ["COMMAND"]


def ltx(flags: dict[str, str], arguments: list[str]) -> int:
    if len(arguments) != 1:
        raise UsageError("give one replica URL")
    level = flags.get("level", "0")
    if level != "all" and not re.fullmatch(r"[0-9]", level):
        raise UsageError(f"invalid value for -level: {level!r} (0 to 9, or all)")
    from replicator.storage import open_client

    client = open_client(arguments[0])
    files: list[FileInfo] = []
    for number in range(10) if level == "all" else [int(level)]:
        files += client.list(number)
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


COMMAND = Command("pyrepl ltx [-level 0..9|all] [-json] URL", "List the stored files.", ("json",), ("level",), ltx)
