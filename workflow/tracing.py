"""OpenTelemetry spans, for engines whose application traces: of each start, of each stay of a run in memory, of each attempt of a step that is really run.

What is taken from the record makes no span: nothing happens then. All spans of a run are one trace, whichever machines it ran on: the span of its start stands as a W3C
`traceparent` in its file (`wf_instance.traceparent`), and a child's is that of the parent's stay that started it.

    start research                    who called engine.start()
      run research                    a stay in memory: until the end, or until there is nothing to do but wait
        step make_plan                an attempt; the current span while the body runs, also in threads
      run research                    the next stay, after an event, a timer or a crash
        step publish

Nothing of OpenTelemetry is imported here before an engine has something to trace with (see `tracing_of`).
"""

from __future__ import annotations

import contextlib
import contextvars
import json
import re
import sys
from collections.abc import Awaitable, Iterator
from typing import TYPE_CHECKING, Any, Literal

from workflow.context import Attempt, Failure
from workflow.errors import Parked
from workflow.journal import Instance
from workflow.state import Record

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import Span, Tracer

__all__ = ["Stay", "Tracing", "caller", "checked", "tracing_of"]

_TRACEPARENT = re.compile(r"00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")


def tracing_of(tracer: Tracer | Literal[False] | None) -> Tracing | None:
    """Return what an engine traces with.

    Args:
        tracer: None: a tracer of the provider that the application has set; nothing, and no import, when it has set none. False: nothing.
    """
    if tracer is False:
        return None
    if tracer is not None:
        return Tracing(tracer)
    api: Any = sys.modules.get("opentelemetry.trace")  # who has set a provider has imported this
    if api is None:
        return None
    provider = api.get_tracer_provider()
    if isinstance(provider, (api.ProxyTracerProvider, api.NoOpTracerProvider)):
        return None
    return Tracing(provider.get_tracer("workflow"))


def caller() -> str | None:
    """Return the `traceparent` of the span that the caller is in; None without one."""
    if "opentelemetry.trace" not in sys.modules:
        return None
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier)
    return carrier.get("traceparent")


def checked(traceparent: object) -> str | None:
    """Return what came with a request, if it is a `traceparent`. Source: W3C Trace Context, section 3.2."""
    return traceparent if isinstance(traceparent, str) and _TRACEPARENT.fullmatch(traceparent) else None


class Tracing:
    """A tracer, and the names of our spans."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer

    def start(self, flow: str, id: str) -> str:
        """Make the span of a start, below the span that the caller is in; returns its `traceparent`."""
        from opentelemetry import trace

        facts = {"workflow.run.id": id, "workflow.flow": flow}
        span = self._tracer.start_span(f"start {flow}", kind=trace.SpanKind.PRODUCER, attributes=facts)
        span.end()
        return _text(trace.set_span_in_context(span))

    @contextlib.contextmanager
    def stay(self, instance: Instance) -> Iterator[Stay]:
        """Make the span of a run that is in memory."""
        from opentelemetry import trace

        facts = {"workflow.run.id": instance.id, "workflow.flow": instance.flow}
        span = self._tracer.start_span(f"run {instance.flow}", _context(instance.traceparent), trace.SpanKind.CONSUMER, facts)
        try:
            yield Stay(self._tracer, span, instance.id)
        finally:
            span.end()


class Stay:
    """A run that is in memory, and traced."""

    def __init__(self, tracer: Tracer, span: Span, id: str) -> None:
        from opentelemetry import trace

        self._tracer, self._span, self._id = tracer, span, id
        self._context = trace.set_span_in_context(span)
        self.traceparent = _text(self._context)

    def enter(self, context: contextvars.Context) -> None:
        """Make it the current span of the flow's code."""
        from opentelemetry.context import attach

        context.run(attach, self._context)

    def ends(self, outcome: str, error: str | None) -> None:
        """Say how it ended: a state of the run (`done`, `failed`, ...), `parked`, `paused`, `stopped` or `broken`."""
        self._span.set_attribute("workflow.outcome", outcome)
        if outcome in ("failed", "diverged", "broken"):
            self._error(self._span, error or outcome)

    async def attempt(self, work: Awaitable[Failure | None], record: Record, info: Attempt) -> Failure | None:
        """Run an attempt of a step in a span of its own. `outcome`: done, error, timeout, cancelled, or discarded when nobody recorded it."""
        facts: dict[str, str | int] = {
            "workflow.run.id": self._id,
            "workflow.step.key": record.key,
            "workflow.step.kind": record.kind,
            "workflow.step.attempt": record.attempts,
        }
        with self._tracer.start_as_current_span(
            f"step {record.name}", self._context, attributes=facts, record_exception=False, set_status_on_exception=False
        ) as span:
            outcome = "cancelled"
            try:
                failure = await work
                outcome = "done" if failure is None else failure[0]
                if failure is not None:
                    span.record_exception(failure[1])
                    self._error(span, f"{type(failure[1]).__name__}: {failure[1]}")
            except Parked:
                outcome = "discarded"
                raise
            finally:
                span.set_attribute("workflow.outcome", outcome)
                for name, value in info.usage.items():
                    plain = value if isinstance(value, (str, bool, int, float)) else json.dumps(value)
                    span.set_attribute(f"workflow.usage.{name}", plain)
        return failure

    @staticmethod
    def _error(span: Span, text: str) -> None:
        from opentelemetry.trace import Status, StatusCode

        span.set_status(Status(StatusCode.ERROR, text[:1000]))


def _text(context: Context) -> str:
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier, context)
    return carrier.get("traceparent", "")


def _context(traceparent: str | None) -> Context:
    """Return a context with nothing of the engine's surroundings in it but, where there is one, the remote parent."""
    from opentelemetry.context import Context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator().extract({"traceparent": traceparent} if traceparent else {}, Context())
