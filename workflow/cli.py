"""`pyrepl wf`: look at the runs of a folder, and ask their engine for something.

Looking opens files for reading and needs no engine; asking writes a request that the engine takes up, now or when it comes back. `gc` and `run` are
engines themselves, and need the folder to be free. The command line belongs to `pyrepl`, which finds this module by name.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

from workflow import journal
from workflow.client import Client
from workflow.engine import Engine
from workflow.errors import Unreadable
from workflow.state import check_id
from workflow.values import loads

__all__ = ["SUBCOMMANDS", "Usage", "main"]


class Usage(Exception):
    """The command line is wrong."""


def main(flags: dict[str, str], arguments: Sequence[str]) -> int:
    """Run one subcommand; returns the exit code.

    Raises:
        Usage: the arguments are wrong.
        WorkflowError: it could not be done.
    """
    if len(arguments) < 2 or arguments[0] not in SUBCOMMANDS:
        raise Usage(f"say one of {', '.join(SUBCOMMANDS)}, and the folder of the runs")
    names, command = SUBCOMMANDS[arguments[0]]
    given = list(arguments[2:])
    least = sum(not name.startswith("[") for name in names)
    if not least <= len(given) <= len(names):
        raise Usage(f"{arguments[0]} takes a folder{''.join(f' {name}' for name in names)}")
    folder = Path(arguments[1])
    if not (folder / ".host" / "intake.db").exists():
        raise Unreadable(str(folder), "no engine ever ran there")
    return command(folder, flags, given)


def _print(flags: dict[str, str], columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> int:
    """Print rows as a table, with long texts cut; whole and as objects with -json."""
    if flags.get("json") == "true":
        print(json.dumps([dict(zip(columns, row, strict=True)) for row in rows], indent=2, ensure_ascii=False))
        return 0
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="ellipsis", no_wrap=True, max_width=60)
    for row in rows:
        table.add_row(*("" if value is None else str(value) for value in row))
    Console(width=None if sys.stdout.isatty() else 1000, markup=False, highlight=False).print(table)
    return 0


def _path(folder: Path, id: str) -> Path:
    path = folder / f"{check_id(id, longest=200)}.db"
    if not path.exists():
        raise Unreadable(str(path), "there is no such run in this folder, or it has not begun")
    return path


def _list(folder: Path, flags: dict[str, str], _: list[str]) -> int:
    runs = asyncio.run(Client(folder).runs())
    wanted = flags.get("status")
    shown = [run for run in runs if wanted is None or run.status == wanted]
    columns = ["id", "flow", "status", "wake_at", "created_at", "finished_at", "error"]
    return _print(flags, columns, [[getattr(run, name) for name in columns] for run in shown])


def _show(folder: Path, flags: dict[str, str], given: list[str]) -> int:
    loaded = journal.read(_path(folder, given[0]))
    facts = asdict(loaded.instance)
    waits = [
        f"{record.key} ({record.kind}{f', until {record.wake_at}' if record.wake_at else ''})"
        for record in loaded.records
        if record.status in ("waiting", "retrying")
    ]
    facts |= {"steps": len(loaded.records), "waits_for": waits, "events_waiting": [event.type for event in loaded.events]}
    if flags.get("json") == "true":
        print(json.dumps(facts, indent=2, ensure_ascii=False))
        return 0
    return _print(
        flags,
        ["", ""],
        [[name, value if not isinstance(value, list) else ", ".join(value)] for name, value in facts.items() if value not in (None, [])],
    )


def _view(view: str) -> Callable[[Path, dict[str, str], list[str]], int]:
    def command(folder: Path, flags: dict[str, str], given: list[str]) -> int:
        return _print(flags, *journal.rows(_path(folder, given[0]), view))

    return command


def _ask(kind: str) -> Callable[[Path, dict[str, str], list[str]], int]:
    def command(folder: Path, flags: dict[str, str], given: list[str]) -> int:
        run = Client(folder).run(given[0])
        request = asyncio.run(getattr(run, kind)())
        return _print(flags, ["request", "run", "kind"], [[request, run.id, kind]])

    return command


def _send(folder: Path, flags: dict[str, str], given: list[str]) -> int:
    try:
        payload = loads(given[2]) if len(given) > 2 else None
    except ValueError as error:
        raise Usage(f"the payload is not JSON ({error}): texts want quotes, as in '\"yes\"'") from None
    run = Client(folder, sender=flags.get("sender")).run(given[0])
    request = asyncio.run(run.send(given[1], payload, id=flags.get("id")))
    return _print(flags, ["request", "run", "event"], [[request, run.id, given[1]]])


def _fork(folder: Path, flags: dict[str, str], given: list[str]) -> int:
    run = Client(folder).run(given[0])
    fork = asyncio.run(run.fork(step=given[1], id=given[2] if len(given) > 2 else None))
    return _print(flags, ["run", "forked_from", "step"], [[fork.id, run.id, given[1]]])


def _verify(folder: Path, flags: dict[str, str], given: list[str]) -> int:
    paths = [_path(folder, given[0])] if given else sorted(path for path in folder.glob("*.db") if not path.name.startswith("."))
    found = [(path.stem, journal.check(path)) for path in paths]
    _print(flags, ["id", "verdict"], [[id, "; ".join(problems) or "ok"] for id, problems in found])
    return int(any(problems for _, problems in found))


def _gc(folder: Path, flags: dict[str, str], _: list[str]) -> int:
    try:
        keep = timedelta(days=float(flags.get("keep-days", "30")))
    except ValueError:
        raise Usage(f"invalid value for -keep-days: {flags['keep-days']!r}") from None

    async def sweep() -> list[str]:
        async with Engine(folder, keep=None, concurrency=0) as engine:
            return await engine.sweep(keep)

    return _print(flags, ["deleted"], [[id] for id in asyncio.run(sweep())])


def _run(folder: Path, flags: dict[str, str], given: list[str]) -> int:
    if "flows" not in flags:
        raise Usage("say where the code is: -flows MODULE")
    sys.path.insert(0, str(Path.cwd()))
    importlib.import_module(flags["flows"])

    async def run() -> str:
        async with Engine(folder, only=given[0], park_after_s=0.1) as engine:
            return await engine.until_rest(given[0])

    status = asyncio.run(run())
    _print(flags, ["run", "status"], [[given[0], status]])
    return int(status not in ("done", "waiting", "paused"))


SUBCOMMANDS: dict[str, tuple[tuple[str, ...], Callable[[Path, dict[str, str], list[str]], int]]] = {
    "list": ((), _list),
    "show": (("ID",), _show),
    "timeline": (("ID",), _view("wf_timeline")),
    "calls": (("ID",), _view("wf_api_calls")),
    "decisions": (("ID",), _view("wf_decisions")),
    "send": (("ID", "TYPE", "[JSON]"), _send),
    "cancel": (("ID",), _ask("cancel")),
    "pause": (("ID",), _ask("pause")),
    "resume": (("ID",), _ask("resume")),
    "fork": (("ID", "STEP", "[NEW-ID]"), _fork),
    "verify": (("[ID]",), _verify),
    "gc": ((), _gc),
    "run": (("ID",), _run),
}
