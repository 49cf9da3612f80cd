"""`Run`, a handle on one run, and `Client`, which talks to engines from any process on their machine, or through their bucket from any other.

A request is a row in the engine's intake, or an object in the bucket's inbox (`remote.py`), durable before the call returns; nobody but the engine opens an
instance file for writing. Status comes from the index, results and steps from the instance file, opened for reading.
"""

from __future__ import annotations

import asyncio
import functools
import getpass
import os
import socket
import sqlite3
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from workflow import intake, journal
from workflow.context import Flow, check_event, flows
from workflow.errors import Conflict, Refused, RunFailed
from workflow.intake import Indexed, Request
from workflow.objects import LocalObjects, Objects, Reader
from workflow.state import ENDED, Record, RunStatus, check_id, ulid
from workflow.tracing import caller
from workflow.values import decode, digest, encode, iso, loads

if TYPE_CHECKING:
    from workflow.remote import BucketDesk

__all__ = ["Client", "Desk", "FolderDesk", "Run", "desk_of", "ending_of", "who"]

T = TypeVar("T")
POLL_S = 0.05


class Desk(Protocol):
    """Where requests go and answers come from: an engine, the files of one, or a replica."""

    sender: str
    poll_s: float
    """How often it may be asked for what is not there yet."""

    async def submit(self, request: Request) -> None:
        """Accept a request durably. Raises `Refused`."""

    async def indexed(self, id: str) -> Indexed | None:
        """Return a run."""

    async def ending(self, id: str) -> tuple[str, str | None, str | None]:
        """Wait for a run's end; returns (status, output, error). Raises `Refused` for an unknown run."""

    async def records(self, id: str) -> list[Record]:
        """Return the steps of a run; none of one that has not begun."""

    async def refusal(self, request: str) -> str | None:
        """Return why a request was refused."""

    def winner(self, id: str) -> tuple[str, str] | None:
        """Return (flow, input digest) of the run that has an id, where it is not the one that was started with it here."""

    @property
    def reader(self) -> Reader:
        """Where artifacts are read from."""


class Run:
    """One run, wherever it is. Nothing is read before it is asked for."""

    def __init__(
        self,
        desk: Desk,
        id: str,
        *,
        flow: Flow[..., Any] | None = None,
        is_conflict: bool = False,
        wanted: tuple[str, str] | None = None,
    ) -> None:
        """`wanted`: flow and input digest of what was started."""
        self.id = id
        self._desk = desk
        self._flow = flow
        self._is_conflict = is_conflict
        self._wanted = wanted

    def __repr__(self) -> str:
        return f"Run({self.id!r})"

    async def status(self) -> str:
        """Return the state: queued, running, waiting, paused, done, failed, cancelled, diverged or quarantined.

        Raises:
            Refused: there is no such run.
        """
        return (await self._indexed()).status

    async def _indexed(self) -> Indexed:
        found = await self._desk.indexed(self.id)
        if found is None:
            raise Refused(self.id, "there is no such run")
        return found

    async def result(self) -> Any:
        """Wait for the end and return what the flow returned, in the type of its annotation when the flow is known here.

        Raises:
            RunFailed: it ended otherwise.
            Conflict: the id was taken by a run with other input.
            Refused: there is no such run.
        """
        if self._is_conflict:
            raise Conflict(self.id)
        status, output, error = await self._desk.ending(self.id)
        winner = self._desk.winner(self.id)
        if self._wanted is not None and winner is not None and winner != self._wanted:
            raise Conflict(self.id)
        if status != "done":
            facts = loads(error) if error and error.startswith("{") else {"type": "", "message": error or ""}
            raise RunFailed(self.id, status, facts["type"] or status.capitalize(), facts["message"])
        flow = self._flow or flows.get((await self._indexed()).flow)
        return decode(flow.signature.result if flow else Any, output or "null", f"result of run {self.id}", self._desk.reader)

    async def send(self, type: str, payload: Any = None, *, id: str | None = None) -> str:
        """Send an event; durable on return, delivered once. Returns its id.

        Args:
            id: the caller's own id of the event: sending it again changes nothing.
        """
        check_event(self.id, type)
        text, _ = encode(payload, f"event {type}")
        return await self._ask("event", {"type": type, "payload": text}, id)

    async def cancel(self) -> str:
        """Let `Cancelled` be raised in the run at its next step's end or wait. A run that has ended ignores it. Returns the request's id."""
        return await self._ask("cancel", {})

    async def pause(self) -> str:
        """Let the run leave memory after the steps that it is in, and not come back before `resume`."""
        return await self._ask("pause", {})

    async def resume(self) -> str:
        """Let a paused run go on; what became due meanwhile is due at once."""
        return await self._ask("resume", {})

    async def fork(self, *, step: str, id: str | None = None) -> Run:
        """Start another run from a copy of this one, which has finished what this one had when it first called `step`.

        Args:
            step: a step's key, or its name for its first call. It and what came later is run again, with new idempotency keys.
            id: of the new run.

        Returns:
            The new run. Whether the fork was refused is seen from `status` and `result` (`Refused`).
        """
        new = check_id(id or f"{self.id[:80]}-{ulid(_now_ms())[-12:].lower()}")
        request = await self._ask("fork", {"step": step, "id": new}, f"fork:{new}")
        return _Fork(self._desk, new, request)

    async def steps(self) -> list[Record]:
        """Return the steps in the order of their first calls."""
        return await self._desk.records(self.id)

    async def _ask(self, kind: str, body: dict[str, Any], id: str | None = None) -> str:
        check_id(self.id, longest=200)
        request = Request(id or ulid(_now_ms()), self.id, kind, encode(body, kind)[0], self._desk.sender, iso(datetime.now(UTC)))
        await self._desk.submit(request)
        return request.id


class _Fork(Run):
    """A run that may yet be refused."""

    def __init__(self, desk: Desk, id: str, request: str) -> None:
        super().__init__(desk, id)
        self._request = request

    async def _indexed(self) -> Indexed:
        return await _appears(self._desk, self.id, self._request)

    async def result(self) -> Any:
        await self._indexed()
        return await super().result()


def _now_ms() -> int:
    return int(datetime.now(UTC).timestamp() * 1000)


def who() -> str:
    """Return what requests say about where they come from."""
    try:
        return f"{getpass.getuser()}@{socket.gethostname()}:{os.getpid()}"
    except (KeyError, OSError):  # no name for this user id
        return f"{os.getuid()}@{socket.gethostname()}:{os.getpid()}"


def ending_of(path: Path, objects: Objects) -> tuple[RunStatus, str | None, str | None]:
    """Return (status, output, error) of a run's file. Raises `Unreadable`, `MissingObject`."""
    found = journal.read_instance(path)
    output = found.output
    if output is None and found.output_sha256 is not None:
        data = journal.read_object(path, found.output_sha256)
        output = (data if data is not None else objects.get(found.id, found.output_sha256)).decode()
    return found.status, output, found.error


class FolderDesk:
    """The files of an engine's folder (see `Desk`)."""

    poll_s = POLL_S

    def __init__(self, folder: Path, sender: str) -> None:
        self.folder = folder
        self.sender = sender
        self._intake = folder / ".host" / "intake.db"
        self._objects = LocalObjects(folder / ".objects")

    async def runs(self) -> list[Indexed]:
        """Return all runs of the folder, oldest first."""
        return await self._read(intake.indexed)

    async def submit(self, request: Request) -> None:
        """Write a request into the intake."""
        await asyncio.to_thread(intake.submit, self._intake, request)

    async def indexed(self, id: str) -> Indexed | None:
        """Return a run, None when no engine has heard of it."""
        return await self._read(functools.partial(intake.one, id=id))

    async def ending(self, id: str) -> tuple[str, str | None, str | None]:
        """Wait for a run's end."""
        while (found := await self.indexed(id)) is None or found.status not in ENDED:
            if found is None:
                raise Refused(id, "there is no such run")
            await asyncio.sleep(POLL_S)
        if found.gone_at is not None:
            raise Refused(id, f"the run ended {found.status}, and its file was deleted at {found.gone_at}")
        if found.status == "quarantined":
            return found.status, None, found.error
        return await asyncio.to_thread(ending_of, self._path(id), self._objects)

    async def records(self, id: str) -> list[Record]:
        """Return the steps of a run; none of one that has not begun."""
        path = self._path(id)
        if not path.exists() and await self._read(functools.partial(intake.is_to_begin, id=id)):
            return []
        return (await asyncio.to_thread(journal.read, path)).records

    async def refusal(self, request: str) -> str | None:
        """Return why a request was refused."""
        return await self._read(functools.partial(intake.refusal, request=request))

    def winner(self, id: str) -> tuple[str, str] | None:
        """No run is started here (see `Desk`)."""
        return None

    @property
    def reader(self) -> Reader:
        """Where artifacts are read from."""
        return Reader(self.folder, self._objects)

    def _path(self, id: str) -> Path:
        return self.folder / f"{check_id(id, longest=200)}.db"

    async def _read(self, read: Callable[[sqlite3.Connection], T]) -> T:
        return await asyncio.to_thread(intake.sql_read, self._intake, read)

    def close(self) -> None:
        """Nothing is open between calls."""


class Client:
    """Talk to the engine of a folder from another process, or to those of a bucket from another machine: start, send, ask. They need not be running meanwhile.

    await Client("agents/").run("otters-1").send("approval", True)
    await Client("s3://bucket/agents").run("otters-1").send("approval", True)
    """

    def __init__(self, place: str | os.PathLike[str], *, sender: str | None = None) -> None:
        """Nothing is opened or contacted yet.

        Args:
            place: the engine's folder, or the URL of its replica. On a bucket a request is taken up when the owner looks, every few seconds; answers are
                as new as the replica.
            sender: what the record says about who asked; user, host and process when not given.

        Raises:
            ConfigError: a malformed URL.
        """
        self.sender = sender or who()
        self.desk = desk_of(place, self.sender)

    def run(self, id: str) -> Run:
        """Return the handle of a run."""
        return Run(self.desk, check_id(id, longest=200))

    async def start(
        self, flow: Callable[..., Any] | str, *args: Any, id: str | None = None, priority: int | None = None, **kwargs: Any
    ) -> Run:
        """Ask for a run; durable on return. The same id with the same input is the same run.

        Args:
            flow: the flow, or its name with the arguments as keywords where its code is not at hand.
        """
        id = check_id(id if id is not None else ulid(_now_ms()).lower())
        if isinstance(flow, str):
            if args:
                raise TypeError("a flow that is given by name takes keyword arguments")
            name, text, found = flow, encode(kwargs, f"arguments of {flow}")[0], flows.get(flow)
        else:
            if not isinstance(flow, Flow):
                raise TypeError(f"not a flow: {flow!r}")
            name, text, found = flow.name, flow.signature.encode(args, kwargs)[0], flow
        body = {"flow": name, "input": text, "priority": priority if priority is not None else (found.priority if found else 0)}
        traceparent = caller()
        if traceparent:
            body["traceparent"] = traceparent
        request = Request(
            f"start:{id}:{digest(name + text)[:16]}", id, "start", encode(body, "start")[0], self.sender, iso(datetime.now(UTC))
        )
        await self.desk.submit(request)
        return _Started(self.desk, id, request=request.id, flow=found, wanted=(name, digest(text)))

    async def runs(self) -> list[Indexed]:
        """Return all runs, oldest first."""
        return await self.desk.runs()

    def close(self) -> None:
        """Release connections and temporary files. Not needed for a folder."""
        self.desk.close()


def desk_of(place: str | os.PathLike[str], sender: str) -> FolderDesk | BucketDesk:
    """Return where to ask about the runs of a folder, or of a replica by its URL. Raises `ConfigError`."""
    if isinstance(place, str) and "://" in place:
        from workflow.remote import BucketDesk

        return BucketDesk(place, sender)
    return FolderDesk(Path(place), sender)


class _Started(Run):
    """A run that no engine may have taken up yet."""

    def __init__(self, desk: Desk, id: str, *, request: str, flow: Flow[..., Any] | None, wanted: tuple[str, str]) -> None:
        super().__init__(desk, id, flow=flow, wanted=wanted)
        self._request = request

    async def status(self) -> str:
        found = await self._desk.indexed(self.id)
        return found.status if found is not None else "queued"

    async def result(self) -> Any:
        found = await _appears(self._desk, self.id, self._request)
        self._is_conflict = (found.flow, found.input_sha256) != self._wanted
        return await super().result()


async def _appears(desk: Desk, id: str, request: str) -> Indexed:
    """Wait until a run is known that was asked for. Raises `Refused`."""
    delay = desk.poll_s
    while (found := await desk.indexed(id)) is None:
        reason = await desk.refusal(request)
        if reason is not None:
            raise Refused(id, reason)
        await asyncio.sleep(delay)
        delay = min(delay * 1.5, desk.poll_s * 10)
    return found
