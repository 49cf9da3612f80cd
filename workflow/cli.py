"""`pyrepl wf`: look at the runs of a folder, or of a bucket, and ask their engine for something.

Looking opens files for reading, from a bucket copies in a temporary folder, and needs no engine; asking writes a request that the engine takes up, now or when it
comes back. `gc`, `run` and `host` are engines themselves, and need the folder, or the host in the bucket, to be free. The command line belongs to `pyrepl`, which finds
this module by name.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import logging
import select
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

from replicator.durations import parse_duration
from replicator.signalpipe import SignalPipe
from workflow import journal
from workflow.client import Client, FolderDesk
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
        raise Usage(f"say one of {', '.join(SUBCOMMANDS)}, and the folder of the runs, or the URL of their replica")
    names, command = SUBCOMMANDS[arguments[0]]
    given = list(arguments[2:])
    least = sum(not name.startswith("[") for name in names)
    if not least <= len(given) <= len(names):
        raise Usage(f"{arguments[0]} takes a folder or URL{''.join(f' {name}' for name in names)}")
    with contextlib.closing(Place(arguments[1], flags.get("sender"))) as place:
        return command(place, flags, given)


class Place:
    """Where the runs are."""

    def __init__(self, name: str, sender: str | None) -> None:
        """Raises `Unreadable`: there are none."""
        self.client = Client(name, sender=sender)
        self.desk = self.client.desk
        self.url = name if not isinstance(self.desk, FolderDesk) else None
        if isinstance(self.desk, FolderDesk) and not (self.desk.folder / ".host" / "intake.db").exists():
            raise Unreadable(name, "no engine ever ran there")
        self._name = name

    def path(self, id: str) -> Path:
        """Return a run's file, or a copy of it. Raises `Unreadable`: there is none."""
        check_id(id, longest=200)
        if not isinstance(self.desk, FolderDesk):
            return self.desk.path(id)
        path = self.desk.folder / f"{id}.db"
        if not path.exists():
            raise Unreadable(str(path), "there is no such run in this folder, or it has not begun")
        return path

    def ids(self) -> list[str]:
        """Return the runs that have a file."""
        if isinstance(self.desk, FolderDesk):
            return sorted(path.stem for path in self.desk.folder.glob("*.db") if not path.name.startswith("."))
        runs = asyncio.run(self.client.runs())
        return sorted(run.id for run in runs if run.gone_at is None and run.status != "queued")

    @contextlib.contextmanager
    def engine_folder(self) -> Iterator[Path]:
        """Give the folder for an engine of one's own; for a bucket one that is empty and goes afterwards."""
        if isinstance(self.desk, FolderDesk):
            yield self.desk.folder
            return
        with tempfile.TemporaryDirectory(prefix="pyrepl-wf-") as name:
            yield Path(name)

    def host_of(self, id: str) -> str:
        """Return the host whose run it is; "main" when nobody has it yet."""
        with contextlib.suppress(Unreadable):
            return journal.read_instance(self.path(id)).owner or "main"
        return "main"

    def close(self) -> None:
        """Release connections and copies."""
        self.client.close()


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


def _list(place: Place, flags: dict[str, str], _: list[str]) -> int:
    runs = asyncio.run(place.client.runs())
    wanted = flags.get("status")
    shown = [run for run in runs if wanted is None or run.status == wanted]
    columns = ["id", "flow", "status", "wake_at", "created_at", "finished_at", "error"]
    return _print(flags, columns, [[getattr(run, name) for name in columns] for run in shown])


def _show(place: Place, flags: dict[str, str], given: list[str]) -> int:
    loaded = journal.read(place.path(given[0]))
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


def _view(view: str) -> Callable[[Place, dict[str, str], list[str]], int]:
    def command(place: Place, flags: dict[str, str], given: list[str]) -> int:
        return _print(flags, *journal.rows(place.path(given[0]), view))

    return command


def _ask(kind: str) -> Callable[[Place, dict[str, str], list[str]], int]:
    def command(place: Place, flags: dict[str, str], given: list[str]) -> int:
        run = place.client.run(given[0])
        request = asyncio.run(getattr(run, kind)())
        return _print(flags, ["request", "run", "kind"], [[request, run.id, kind]])

    return command


def _send(place: Place, flags: dict[str, str], given: list[str]) -> int:
    try:
        payload = loads(given[2]) if len(given) > 2 else None
    except ValueError as error:
        raise Usage(f"the payload is not JSON ({error}): texts want quotes, as in '\"yes\"'") from None
    run = place.client.run(given[0])
    request = asyncio.run(run.send(given[1], payload, id=flags.get("id")))
    return _print(flags, ["request", "run", "event"], [[request, run.id, given[1]]])


def _fork(place: Place, flags: dict[str, str], given: list[str]) -> int:
    run = place.client.run(given[0])
    fork = asyncio.run(run.fork(step=given[1], id=given[2] if len(given) > 2 else None))
    return _print(flags, ["run", "forked_from", "step"], [[fork.id, run.id, given[1]]])


def _verify(place: Place, flags: dict[str, str], given: list[str]) -> int:
    found = [(id, journal.check(place.path(id))) for id in (given or place.ids())]
    _print(flags, ["id", "verdict"], [[id, "; ".join(problems) or "ok"] for id, problems in found])
    return int(any(problems for _, problems in found))


def _gc(place: Place, flags: dict[str, str], _: list[str]) -> int:
    try:
        keep = timedelta(days=float(flags.get("keep-days", "30")))
    except ValueError:
        raise Usage(f"invalid value for -keep-days: {flags['keep-days']!r}") from None

    async def sweep() -> list[str]:
        with place.engine_folder() as folder:
            async with Engine(folder, replica=place.url, host=flags.get("host", "main"), keep=None, concurrency=0) as engine:
                return await engine.sweep(keep)

    return _print(flags, ["deleted"], [[id] for id in asyncio.run(sweep())])


def _run(place: Place, flags: dict[str, str], given: list[str]) -> int:
    if "flows" not in flags:
        raise Usage("say where the code is: -flows MODULE")
    sys.path.insert(0, str(Path.cwd()))
    importlib.import_module(flags["flows"])

    async def run() -> str:
        with place.engine_folder() as folder:
            host = flags.get("host") or place.host_of(given[0])
            async with Engine(folder, replica=place.url, host=host, only=given[0], park_after_s=0.1) as engine:
                await engine.look_into_inbox()
                status = await engine.until_rest(given[0])
                await engine.look_into_inbox()  # what was taken in leaves it
                return status

    status = asyncio.run(run())
    _print(flags, ["run", "status"], [[given[0], status]])
    return int(status not in ("done", "waiting", "paused"))


def _seconds(flags: dict[str, str], name: str, default: float) -> float:
    try:
        return parse_duration(flags[name]) if name in flags else default
    except ValueError as error:
        raise Usage(f"invalid value for -{name}: {error}") from None


def _url(place: Place) -> str:
    if place.url is None:
        raise Usage("hosts share a bucket: give the URL of the replica")
    return place.url


def _fleet(place: Place, flags: dict[str, str], _: list[str]) -> int:
    from rich.console import Console
    from rich.live import Live

    from workflow.report import look, table

    url = _url(place)
    if flags.get("json") == "true":
        print(json.dumps(look(url).facts(), indent=2, ensure_ascii=False))
        return 0
    console = Console(width=None if sys.stdout.isatty() else 1000, markup=False, highlight=False)
    if flags.get("live") != "true":
        console.print(table(look(url)))
        return 0
    poll_s = max(0.05, _seconds(flags, "poll", 2.0))
    signals = SignalPipe()
    signals.take((signal.SIGINT, signal.SIGTERM))
    # Where nothing can be drawn over, one table follows the other.
    screen = Live(console=console, screen=True, auto_refresh=False) if console.is_terminal else None
    with screen or contextlib.nullcontext():
        while True:
            shown = table(look(url))
            if screen is not None:
                screen.update(shown, refresh=True)
            else:
                console.print(shown)
            if select.select([signals], [], [], poll_s)[0]:
                return 128 + signal.SIGTERM if signal.SIGTERM in signals.wait() else 0


def _host(place: Place, flags: dict[str, str], _: list[str]) -> int:
    """A process that does nothing but run flows: ends with 0 after SIGTERM, and with an error when the host is another engine's."""
    url = _url(place)
    if "flows" not in flags:
        raise Usage("say where the code is: -flows MODULE")
    sys.path.insert(0, str(Path.cwd()))
    importlib.import_module(flags["flows"])
    logging.basicConfig(level="INFO", stream=sys.stderr, format="time=%(asctime)s level=%(levelname)s msg=%(message)s")
    try:
        resources = {
            name: float(value) for name, _, value in (item.partition("=") for item in flags.get("resources", "").split(",") if item)
        }
        concurrency = int(flags.get("concurrency", "100"))
    except ValueError:
        raise Usage("-resources wants numbers, as in gpu=1,memory_gib=16; -concurrency a whole one") from None
    name = flags.get("host") or socket.gethostname()

    async def run() -> None:
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        with contextlib.ExitStack() as stack:
            folder = flags.get("folder") or stack.enter_context(tempfile.TemporaryDirectory(prefix="pyrepl-wf-host-"))
            engine = Engine(
                folder, replica=url, host=name, fleet=True, resources=resources, concurrency=concurrency,
                lease_ttl_s=_seconds(flags, "lease-ttl", 30.0), fleet_poll_s=_seconds(flags, "poll", 5.0),
                inbox_poll_s=_seconds(flags, "inbox-poll", 5.0), stop_timeout_s=_seconds(flags, "stop-timeout", 10.0),
            )  # fmt: skip
            async with engine:
                print(f"host {name} is up", flush=True)
                waits = [asyncio.create_task(stop.wait()), asyncio.create_task(engine.until_lost())]
                done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                for task in waits:
                    task.cancel()
                for task in done:
                    task.result()

    asyncio.run(run())
    return 0


SUBCOMMANDS: dict[str, tuple[tuple[str, ...], Callable[[Place, dict[str, str], list[str]], int]]] = {
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
    "fleet": ((), _fleet),
    "host": ((), _host),
}
