"""`pyrepl verify`: do a database and its replica agree, and does the replica come back healthy?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from replicator.cli.configured import CONFIG_FLAGS, CONFIG_OPTIONS, CONFIG_SWITCHES
from replicator.cli.output import EXIT_FAILED, Bar, fail
from replicator.cli.parse import Command, UsageError, duration_flag

if TYPE_CHECKING:
    from replicator.storage.base import ReplicaClient

__all__ = ["COMMAND"]


def verify(flags: dict[str, str], arguments: list[str]) -> int:
    if len(arguments) not in (1, 2):
        raise UsageError("give a database and a replica URL, or a database of the configuration")
    if len(arguments) == 2 and "config" in flags:
        raise UsageError("cannot specify a replica URL and the -config flag")
    check = flags.get("integrity-check", "full")
    if check not in ("quick", "full"):
        raise UsageError(f"invalid value for -integrity-check: {check!r} (quick or full)")
    timeout_s = duration_flag(flags, "timeout", 30.0) or 0.0
    from replicator.v3verify import verify_any

    path, meta_path, clients = _what(flags, arguments)
    documents, code = [], 0
    for client in clients:
        with Bar() as bar:
            verdict = verify_any(path, client, meta_path=meta_path, quick=check == "quick", timeout_s=timeout_s, progress=bar.show)
        documents.append(
            {
                "db_path": str(path),
                "replica": client.url,
                "finding": verdict.finding,
                **({"format": "0.3", "position": verdict.position} if verdict.position else {"txid": f"{verdict.txid:016x}"}),
                "pages": verdict.pages,
                "pages_differing": verdict.differing,
                "pages_in_wal": verdict.in_wal,
                "integrity_check": check,
                "duration_ms": round(verdict.duration_s * 1000),
                "reason": verdict.reason,
            }
        )
        if flags.get("json") != "true" and verdict.is_ok:
            waiting = f", {verdict.in_wal} newer pages are in the WAL" if verdict.in_wal else ""
            print(
                f"{client.url}: agrees at {verdict.position or f'TXID {verdict.txid:016x}'} ({verdict.pages} pages, integrity ok{waiting})"
            )
        if not verdict.is_ok:
            code = EXIT_FAILED
            fail(f"{client.url}: {verdict.finding}: {verdict.reason}", _hint(verdict.finding))
    if flags.get("json") == "true":
        print(json.dumps(documents, indent=2))
    return code


def _hint(finding: str) -> str:
    if finding == "behind":
        return "start `pyrepl replicate`, or wait, and verify again"
    return "`pyrepl replicate -once -force-snapshot` stores a full image of the database as it is; older moments: `pyrepl history URL`"


def _what(flags: dict[str, str], arguments: list[str]) -> tuple[Path, Path | None, list[ReplicaClient]]:
    """Return path, metadata folder (or None) and clients."""
    from replicator.storage import open_client

    meta_path = Path(flags["meta-path"]) if "meta-path" in flags else None
    if len(arguments) == 2:
        return Path(arguments[0]), meta_path, [open_client(arguments[1])]
    from replicator.cli.configured import configured_database
    from replicator.storage import open_replica

    settings = configured_database(flags, arguments[0])
    return settings.path, meta_path or settings.meta_path, [open_replica(item) for item in settings.replicas]


COMMAND = Command(
    f"pyrepl verify [-json] [-integrity-check quick|full] [-timeout D] [-meta-path PATH] DB URL\n       pyrepl verify [...] {CONFIG_FLAGS} DB",
    "Compare a database with its replica, page by page, and check what is restored.\n\n"
    "Exit code 0: they agree. A replicator may be running; pages on their way are no difference.",
    ("json", *CONFIG_SWITCHES),
    ("integrity-check", "timeout", "meta-path", *CONFIG_OPTIONS),
    verify,
)
