"""What a flow and its steps see: the decorators, and the functions that mean "here" (`sleep`, `receive`, `state`, ...).

"Here" is a context variable. In a flow it holds the `Scope` of the running task, in the body of a step an `Attempt`, elsewhere nothing: outside
a run steps and flows are the plain functions that they decorate. A call in a scope takes its key and encodes its arguments at once, and
becomes a `Call`, which the scope's run performs (`worker.py`).
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
import sqlite3
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, TypeVar, cast, overload

from workflow.errors import NotJSON
from workflow.state import Durability, Kind, Retry, check_id, check_name, step_key
from workflow.values import ObjectReader, Signature, decode, digest, encode

__all__ = [
    "Attempt",
    "Call",
    "Failure",
    "Flow",
    "Runner",
    "Scope",
    "Step",
    "barrier",
    "flow",
    "flows",
    "here",
    "patched",
    "receive",
    "send",
    "sleep",
    "state",
    "step",
]

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
ONCE = Retry(attempts=1)


class Runner(Protocol):
    """What performs the calls of one run."""

    id: str
    reader: ObjectReader

    def perform(self, call: Call) -> Coroutine[Any, Any, Any]:
        """Do it, or take it from the record."""

    def patched(self, scope: Scope, key: str) -> bool:
        """Answer `patched`."""

    def value(self, name: str) -> str | None:
        """Return a value of `state`, as the flow has it now."""

    def names(self) -> list[str]:
        """Return the names in `state`."""

    def is_own_thread(self) -> bool:
        """Say whether this is the event loop's thread."""

    def wait_for(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Let the event loop run something for a flow that has a thread."""


class Scope:
    """A task of a flow: the path that its steps have in their keys, and what it has called so far."""

    __slots__ = ("children", "is_over", "ordinals", "path", "runner")

    def __init__(self, runner: Runner, path: str) -> None:
        self.runner = runner
        self.path = path
        self.children = 0
        self.ordinals: dict[str, int] = {}
        self.is_over: Callable[[], bool] = bool

    def child(self) -> Scope:
        """Return the scope of the next task that this one creates."""
        self.children += 1
        return Scope(self.runner, f"{self.path}/{self.children}" if self.path else str(self.children))

    def next_key(self, name: str) -> str:
        ordinal = self.ordinals[name] = self.ordinals.get(name, 0) + 1
        return step_key(self.path, name, ordinal)


@dataclass(slots=True)
class Attempt:
    """A body that runs: what `step.key()`, `step.usage()` and `state` act on."""

    key: str
    runner: Runner
    usage: dict[str, Any] = field(default_factory=dict)
    state: dict[str, str | None] = field(default_factory=dict)


Failure = tuple[str, Exception, str, dict[str, Any]]
"""Of an attempt: (outcome, error, started_at, usage)."""

here: contextvars.ContextVar[Scope | Attempt | None] = contextvars.ContextVar("workflow", default=None)


@dataclass(slots=True)
class Call:
    """One call of a step (or of a flow, as a child) by a flow."""

    scope: Scope
    key: str
    name: str
    kind: Kind
    input: str
    step: Step[..., Any] | None = None
    flow: Flow[..., Any] | None = None
    result: Any = Any
    target: str = ""
    event: str = ""
    event_id: str = ""
    timeout_s: float | None = None
    given: tuple[Any, ...] | None = None
    """The arguments, where those of `input` are the same."""
    input_sha256: str = ""

    def __post_init__(self) -> None:
        self.input_sha256 = digest(self.input)


def _perform(call: Call) -> Any:
    """Return what the flow awaits; in a flow that has a thread, the result."""
    runner = call.scope.runner
    work = runner.perform(call)
    return work if runner.is_own_thread() else runner.wait_for(work)


# -- steps -----------------------------------------------------------------------------------------------------------------------


class Step(Generic[P, R]):
    """A function whose result is recorded. Called in an async flow it is awaited, in a sync flow it returns; elsewhere it is the function."""

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        name: str | None,
        kind: Kind,
        retry: Retry | None,
        timeout: float | timedelta | None,
        durability: Durability,
        repeat: bool,
        overlap: bool,
        tx: bool,
    ) -> None:
        self.function = function
        self.name = check_name(name or function.__name__)
        self.kind: Kind = "tx" if tx else kind
        self.is_async = inspect.iscoroutinefunction(function)
        self.retry = retry or ONCE
        self.timeout_s = _seconds(timeout)
        self.durability: Durability = durability
        self.repeat = repeat
        self.overlap = overlap
        self.tx = tx
        if kind not in ("step", "llm", "tool", "http"):
            raise ValueError(f"kind is step, llm, tool or http, not {kind!r}")
        if tx and self.is_async:
            raise ValueError(f"{self.name}: a transaction step is a plain function")
        if not repeat and self.retry.attempts > 1:
            raise ValueError(f"{self.name}: repeat=False allows one attempt; it cannot be retried")
        if tx and not repeat:
            raise ValueError(f"{self.name}: a transaction happens exactly once anyway; leave repeat out")
        self.signature = Signature(function, self.name, skip=1 if tx else 0)
        functools.update_wrapper(self, function)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Any:
        scope = here.get()
        if not isinstance(scope, Scope):
            return self.function(*args, **kwargs)
        text, _ = self.signature.encode(args, kwargs)
        call = Call(scope, scope.next_key(self.name), self.name, self.kind, text, self, result=self.signature.result)
        if self.signature.is_same(args, kwargs):
            call.given = args
        return _perform(call)


class _Decorator(Protocol):
    """What `@step(...)` makes of a function. What a plain function returns depends on the flow: an async one awaits it."""

    @overload
    def __call__(self, function: Callable[P, Awaitable[R]], /) -> Callable[P, Awaitable[R]]: ...
    @overload
    def __call__(self, function: Callable[P, R], /) -> Callable[P, Any]: ...


class _StepApi:
    """`@step`, and what acts on the attempt that runs: `step.key()`, `step.usage()`, and `step.call()` for functions of others."""

    @overload
    def __call__(self, function: Callable[P, Awaitable[R]], /) -> Callable[P, Awaitable[R]]: ...
    @overload
    def __call__(self, function: Callable[P, R], /) -> Callable[P, Any]: ...
    @overload
    def __call__(
        self,
        /,
        *,
        tx: bool,
        name: str | None = None,
        retry: Retry | None = None,
        timeout: float | timedelta | None = None,
        durability: Durability = "local",
    ) -> Callable[[Callable[Concatenate[sqlite3.Connection, P], R]], Callable[P, Any]]: ...
    @overload
    def __call__(
        self,
        /,
        *,
        name: str | None = None,
        kind: Kind = "step",
        retry: Retry | None = None,
        timeout: float | timedelta | None = None,
        durability: Durability = "local",
        repeat: bool = True,
        overlap: bool = False,
    ) -> _Decorator: ...

    def __call__(
        self,
        function: Callable[..., Any] | None = None,
        /,
        *,
        name: str | None = None,
        kind: Kind = "step",
        retry: Retry | None = None,
        timeout: float | timedelta | None = None,
        durability: Durability = "local",
        repeat: bool = True,
        overlap: bool = False,
        tx: bool = False,
    ) -> Any:
        """Make a function a step.

        Args:
            name: the name in the record; the function's when not given. Renaming a step is a change of the flow.
            kind: step, llm, tool or http; the last three appear in `wf_api_calls`.
            retry: when a failed attempt is tried again; not at all when not given.
            timeout: seconds for one attempt.
            durability: "replicated": the replica has the intent before the body starts, and the result before the flow goes on.
            repeat: False: at most once. It is never tried again; a timeout, a cancellation or a crash makes it `OutcomeUnknown` for good.
            overlap: a timed-out plain function may still run when the next attempt starts.
            tx: the body gets the run's own database as its first argument; what it writes is committed together with its record.
        """

        def make(function: Callable[..., Any]) -> Step[..., Any]:
            return Step(
                function,
                name=name,
                kind=kind,
                retry=retry,
                timeout=timeout,
                durability=durability,
                repeat=repeat,
                overlap=overlap,
                tx=tx,
            )

        return make if function is None else make(function)

    def key(self) -> str:
        """Return the idempotency key: the same for all attempts of a step, on all machines. Outside a run it is random."""
        attempt = here.get()
        return attempt.key if isinstance(attempt, Attempt) else uuid.uuid4().hex

    def usage(self, **facts: Any) -> None:
        """Note facts about this attempt, such as `model`, `input_tokens`, `output_tokens`, `cost`. Outside a run it does nothing."""
        attempt = here.get()
        if isinstance(attempt, Attempt):
            encode(facts, "usage")
            attempt.usage |= facts

    def call(self, name: str, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Run any function as a step of that name, once: the seam for frameworks. Its arguments and result are plain JSON unless annotated."""
        return cast(Any, self(name=name))(function)(*args, **kwargs)


step = _StepApi()


# -- flows -----------------------------------------------------------------------------------------------------------------------

flows: dict[str, Flow[..., Any]] = {}
"""All flows by name, so that an engine can go on with what an earlier process began. The newest definition of a name counts."""


@dataclass(frozen=True, slots=True)
class Rate:
    """So many starts in so many seconds."""

    count: int
    per_s: float


class Flow(Generic[P, R]):
    """A function that an engine runs to its end, whatever happens to the process. Called in another flow it is a child run."""

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        name: str | None,
        concurrency: int | None,
        rate: tuple[int, float] | None,
        priority: int,
        durability: Durability,
        grace: float,
        needs: Mapping[str, float],
    ) -> None:
        self.function = function
        self.name = check_name(name or function.__name__)
        self.is_async = inspect.iscoroutinefunction(function)
        self.needs = dict(needs)
        self.concurrency = concurrency
        self.rate = Rate(*rate) if rate else None
        self.priority = priority
        self.durability: Durability = durability
        self.grace_s = grace
        self.signature = Signature(function, self.name)
        functools.update_wrapper(self, function)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Any:
        scope = here.get()
        if not isinstance(scope, Scope):
            return self.function(*args, **kwargs)
        text, _ = self.signature.encode(args, kwargs)
        return _perform(Call(scope, scope.next_key(self.name), self.name, "child", text, flow=self, result=self.signature.result))

    def replicated_steps(self) -> list[str]:
        """Return the steps with durability="replicated" that the flow's code names, so that a missing replica is an error at the start."""
        code, names = self.function.__code__, self.function.__globals__
        found = [names.get(name) for name in code.co_names]
        return [item.name for item in found if isinstance(item, Step) and item.durability == "replicated"]


@overload
def flow(function: Callable[P, Awaitable[R]], /) -> Callable[P, Awaitable[R]]: ...
@overload
def flow(function: Callable[P, R], /) -> Callable[P, R]: ...
@overload
def flow(
    *,
    name: str | None = None,
    concurrency: int | None = None,
    rate: tuple[int, float] | None = None,
    priority: int = 0,
    durability: Durability = "local",
    grace: float = 30.0,
    needs: Mapping[str, float] | None = None,
) -> Callable[[Callable[P, R]], Callable[P, R]]: ...


def flow(
    function: Callable[..., Any] | None = None,
    /,
    *,
    name: str | None = None,
    concurrency: int | None = None,
    rate: tuple[int, float] | None = None,
    priority: int = 0,
    durability: Durability = "local",
    grace: float = 30.0,
    needs: Mapping[str, float] | None = None,
) -> Any:
    """Make a function a flow. What it does between steps must depend on its arguments and on results of steps alone.

    Args:
        name: the name in the record; the function's when not given.
        concurrency: so many of this flow at once, on one host; parked ones do not count.
        rate: (count, seconds): so many starts in so many seconds, on one host.
        priority: higher ones of this flow are taken from the queue first; `Engine.start` can say otherwise.
        durability: that of all its steps.
        grace: after a cancellation, seconds for the steps in `finally`.
        needs: what a host of a fleet must have to be given it, as in {"gpu": 1, "memory_gib": 16}; see `Engine(resources=)`.
    """

    def make(function: Callable[..., Any]) -> Flow[..., Any]:
        made: Flow[..., Any] = Flow(
            function,
            name=name,
            concurrency=concurrency,
            rate=rate,
            priority=priority,
            durability=durability,
            grace=grace,
            needs=needs or {},
        )
        flows[made.name] = made
        return made

    return make if function is None else make(function)


# -- in a flow -------------------------------------------------------------------------------------------------------------------


def _scope(what: str) -> Scope:
    scope = here.get()
    if isinstance(scope, Attempt):
        raise RuntimeError(f"{what} belongs into the flow, not into the body of a step")
    if scope is None:
        raise RuntimeError(f"{what} works in a flow that an engine runs")
    return scope


def _seconds(duration: float | timedelta | None) -> float | None:
    return duration.total_seconds() if isinstance(duration, timedelta) else duration


def sleep(duration: float | timedelta) -> Any:
    """Wait, also across restarts: seconds, or a timedelta. Await it in an async flow."""
    scope, seconds = _scope("sleep()"), max(0.0, _seconds(duration) or 0.0)
    return _perform(Call(scope, scope.next_key("sleep"), "sleep", "sleep", encode(seconds, "duration")[0], timeout_s=seconds))


@overload
def receive(type: str, result: type[T], *, timeout: None = None) -> Awaitable[T]: ...
@overload
def receive(type: str, result: type[T], *, timeout: float | timedelta) -> Awaitable[T | None]: ...
@overload
def receive(type: str, result: Any = Any, *, timeout: float | timedelta | None = None) -> Awaitable[Any]: ...


def receive(type: str, result: Any = Any, *, timeout: float | timedelta | None = None) -> Any:
    """Wait for an event that was sent to this run, also before the wait; None when the time is over.

    Args:
        type: as `send` names it.
        result: the type that its payload must have. An event with another payload is refused, which is recorded, and the wait goes on.
        timeout: seconds, or a timedelta.
    """
    scope, seconds = _scope("receive()"), _seconds(timeout)
    text, _ = encode({"type": type, "timeout": seconds}, "receive")
    name = "receive"
    return _perform(Call(scope, scope.next_key(name), name, "receive", text, result=result, event=type, timeout_s=seconds))


def send(run: str, type: str, payload: Any = None, *, id: str | None = None) -> Any:
    """Send an event to another run, exactly once. Await it in an async flow.

    Args:
        id: of the event. Not needed: the step's own key makes a repeated delivery harmless.
    """
    scope = _scope("send()")
    check_event(run, type)
    text, _ = encode({"run": run, "type": type, "payload": payload, "id": id}, "event", scope.runner.id)
    return _perform(Call(scope, scope.next_key("send"), "send", "send", text, target=run, event=type, event_id=id or ""))


def check_event(run: str, type: str) -> None:
    """Refuse an event that could not be delivered. Raises `BadId`, `ValueError`."""
    check_id(run, longest=200)
    if not type or len(type) > 200 or type.startswith("child:"):
        raise ValueError(f"not a type of an event: {type[:200]!r}")


def barrier() -> Any:
    """Return when the replica has all that this run has done so far. Await it in an async flow."""
    scope = _scope("barrier()")
    return _perform(Call(scope, scope.next_key("barrier"), "barrier", "barrier", "null"))


def patched(name: str) -> bool:
    """Say whether this run takes the changed way at a place: true for runs that reach it from now on, false for those that passed it before."""
    scope = _scope("patched()")
    return scope.runner.patched(scope, scope.next_key(f"patch.{check_name(name)}"))


class _State(MutableMapping[str, Any]):
    """Values of the run. Written in steps, committed with the step's record; read anywhere in the run."""

    def __getitem__(self, name: str) -> Any:
        current = here.get()
        if isinstance(current, Attempt) and name in current.state:
            text = current.state[name]
        else:
            text = _runner().value(name)
        if text is None:
            raise KeyError(name)
        return decode(Any, text, name)

    def __setitem__(self, name: str, value: Any) -> None:
        if not isinstance(name, str):
            raise NotJSON("state", f"names are texts, not {name!r}")
        self._write(name, encode(value, f"state {name!r}")[0])

    def __delitem__(self, name: str) -> None:
        self[name]
        self._write(name, None)

    def __iter__(self) -> Iterator[str]:
        current = here.get()
        own = current.state if isinstance(current, Attempt) else {}
        names = dict.fromkeys([*_runner().names(), *own])
        return iter([name for name in names if own.get(name, "") is not None])

    def __len__(self) -> int:
        return len(list(iter(self)))

    def _write(self, name: str, text: str | None) -> None:
        current = here.get()
        if not isinstance(current, Attempt):
            raise RuntimeError("state is written in steps, so that it is recorded with their results")
        current.state[name] = text


def _runner() -> Runner:
    current = here.get()
    if current is None:
        raise RuntimeError("state works in a run")
    return current.runner


state = _State()


# -- tasks -----------------------------------------------------------------------------------------------------------------------


def number_tasks(
    loop: asyncio.AbstractEventLoop, make: Callable[[Coroutine[Any, Any, Any], Scope, contextvars.Context], asyncio.Task[Any]]
) -> Callable[[], None]:
    """Let the event loop give each task that a flow creates a scope of its own; returns what undoes it."""
    before = loop.get_task_factory()

    def factory(loop: asyncio.AbstractEventLoop, coro: Any, **kwargs: Any) -> Any:
        scope = here.get()
        if not isinstance(scope, Scope):
            return before(loop, coro, **kwargs) if before is not None else asyncio.Task(coro, loop=loop, **kwargs)
        given = kwargs.get("context")
        context = given.copy() if given is not None else contextvars.copy_context()
        child = scope.child()
        context.run(here.set, child)
        return make(coro, child, context)

    loop.set_task_factory(factory)

    def undo() -> None:
        if loop.get_task_factory() is factory:
            loop.set_task_factory(before)

    return undo
