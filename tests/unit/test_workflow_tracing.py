"""Spans: of what runs, and not of what is replayed. The SDK's exporter in memory is the judge."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from tests import sampleflows as sample
from tests.recordedflows import RECORDED
from workflow import Client, Retry, flow, receive, step
from workflow import journal as jr
from workflow.intake import Request, submit
from workflow.testing import recorded, run_to_crash, virtual_engine
from workflow.tracing import tracing_of

EXPORTER = InMemorySpanExporter()
PROVIDER = TracerProvider()
PROVIDER.add_span_processor(SimpleSpanProcessor(EXPORTER))
TRACER = PROVIDER.get_tracer("test")


@pytest.fixture(autouse=True)
def _empty() -> Iterator[None]:
    EXPORTER.clear()
    yield
    EXPORTER.clear()


def spans(name: str = "") -> list[ReadableSpan]:
    return [span for span in EXPORTER.get_finished_spans() if span.name.startswith(name)]


def facts(span: ReadableSpan) -> dict[str, object]:
    return {name.removeprefix("workflow."): value for name, value in (span.attributes or {}).items()}


@step(kind="llm", retry=Retry(attempts=3, first=5))
async def asks() -> str:
    step.usage(model="a-model", input_tokens=12, parts=["a"])
    if sample._fails_first(1):
        with TRACER.start_as_current_span("the user's own"):
            return "answer"
    return "?"


@step
def in_a_thread() -> str:
    with TRACER.start_as_current_span("in the thread"):
        return "done"


@flow
async def traced() -> str:
    await asks()
    await receive("go")
    return str(await in_a_thread())


@flow
async def grandparent() -> list[int]:
    return list(await sample.parent())


def test_each_stay_and_each_attempt_is_a_span_of_one_trace(tmp_path: Path) -> None:
    async def run() -> None:
        async with virtual_engine(tmp_path, tracer=TRACER) as engine:
            with TRACER.start_as_current_span("the request"):
                run = await engine.start(traced, id="it")
            while await run.status() != "waiting":
                await asyncio.sleep(0.002)
            await run.send("go")
            assert await run.result() == "done"

    asyncio.run(run())
    assert len({span.context.trace_id for span in spans()}) == 1
    (request,), (started,), stays = spans("the request"), spans("start"), spans("run")
    assert started.parent == request.context
    assert {facts(stay)["outcome"] for stay in stays[:-1]} == {"parked"}  # for the event, and maybe for the retry
    assert facts(stays[-1])["outcome"] == "done"
    assert {stay.parent.span_id for stay in stays if stay.parent} == {started.context.span_id}
    attempts = spans("step")
    assert [(span.name, facts(span)["step.attempt"], facts(span)["outcome"]) for span in attempts] == [
        ("step asks", 1, "error"),
        ("step asks", 2, "done"),
        ("step in_a_thread", 1, "done"),
    ]
    assert facts(attempts[1]) == {
        "run.id": "it", "step.key": "asks#1", "step.kind": "llm", "step.attempt": 2, "outcome": "done",
        "usage.model": "a-model", "usage.input_tokens": 12, "usage.parts": '["a"]',
    }  # fmt: skip
    above = [span.parent.span_id for span in attempts if span.parent]
    assert (above[0], above[2]) == (stays[0].context.span_id, stays[-1].context.span_id)
    assert above[1] in {stay.context.span_id for stay in stays}
    assert attempts[0].status.status_code is trace.StatusCode.ERROR
    assert attempts[0].events[0].name == "exception"
    for own, attempt in (("the user's own", attempts[1]), ("in the thread", attempts[2])):
        assert spans(own)[0].parent == attempt.context


@pytest.mark.parametrize("name", ["chain", "branches", "plain", "transacts", "group_fails"])
def test_what_is_replayed_after_a_crash_makes_no_span(name: str, tmp_path: Path) -> None:
    _, _, count = asyncio.run(run_to_crash(tmp_path / "whole", sample.SCENARIOS[name], None, {"tracer": TRACER}))
    EXPORTER.clear()
    sample.take_ran()
    asyncio.run(run_to_crash(tmp_path / "it", sample.SCENARIOS[name], count * 2 // 3, {"tracer": TRACER}))
    before = recorded(tmp_path / "it")["it"] - {"cancel#1"}
    assert before
    assert step_keys() == ran()
    EXPORTER.clear()
    asyncio.run(run_to_crash(tmp_path / "it", sample.SCENARIOS[name], None, {"tracer": TRACER}))
    assert step_keys() == ran()
    assert not before & set(step_keys())
    assert facts(spans("run")[-1])["outcome"] == "done"


def step_keys() -> Counter[str]:
    return Counter(str(facts(span)["step.key"]) for span in spans("step"))


def ran() -> Counter[str]:
    """What the bodies themselves say."""
    return Counter(key.partition("/")[2] for key in sample.take_ran())


def test_children_are_in_the_trace_of_their_parents(tmp_path: Path) -> None:
    async def run() -> None:
        async with virtual_engine(tmp_path, tracer=TRACER) as engine:
            assert await (await engine.start(grandparent, id="it")).result() == [101, 102, 103]

    asyncio.run(run())
    assert len({span.context.trace_id for span in spans()}) == 1
    assert len(spans("start")) == 1
    stays = {span.context.span_id: span for span in spans("run")}
    parents = [(span, stays.get(span.parent.span_id)) for span in stays.values() if span.parent]
    above = {facts(span)["run.id"]: facts(parent)["run.id"] for span, parent in parents if parent}
    assert above == {
        "it.parent-1": "it",
        "it.parent-1.child-1": "it.parent-1",
        "it.parent-1.child-2": "it.parent-1",
        "it.parent-1.child-3": "it.parent-1",
    }


def test_a_start_of_another_process_carries_its_trace(tmp_path: Path) -> None:
    async def run() -> None:
        async with virtual_engine(tmp_path, tracer=TRACER, poll_s=0.005) as engine:
            with TRACER.start_as_current_span("elsewhere") as there:
                asked = await Client(tmp_path).start(sample.one_step, id="it")
            assert await asked.result() == 3
            request = "start:bad:0"
            body = '{"flow": "one_step", "input": "{}", "priority": 0, "traceparent": "00-nonsense"}'
            submit(tmp_path / ".host" / "intake.db", Request(request, "bad", "start", body, None, "2026-01-01T00:00:00.000Z"))
            while await engine.indexed("bad") is None:
                await asyncio.sleep(0.002)
            assert await engine.run("bad").result() == 3
            where = there.get_span_context()
            assert (
                jr.read(tmp_path / "it.db").instance.traceparent == f"00-{where.trace_id:032x}-{where.span_id:016x}-{where.trace_flags:02x}"
            )
            assert "nonsense" not in (jr.read(tmp_path / "bad.db").instance.traceparent or "")

    asyncio.run(run())
    (elsewhere,) = spans("elsewhere")
    assert {span.parent.span_id for span in spans("run") if span.parent and facts(span)["run.id"] == "it"} == {elsewhere.context.span_id}


def test_false_is_the_switch_and_no_provider_means_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider)
    assert tracing_of(None) is None
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: PROVIDER)
    assert tracing_of(False) is None
    for tracer in (False, None):

        async def run(tracer: bool | None = tracer) -> None:
            async with virtual_engine(tmp_path / str(tracer), tracer=tracer) as engine:
                assert await (await engine.start(sample.one_step, id="it")).result() == 3

        asyncio.run(run())
        assert [span.name for span in spans()] == ([] if tracer is False else ["start one_step", "step add", "run one_step"])


def test_without_an_application_that_traces_nothing_is_imported(tmp_path: Path) -> None:
    program = f"""
import asyncio, sys
from workflow import Engine, flow, step

@step
async def one() -> int:
    return 1

@flow
async def runs() -> int:
    return await one()

async def main():
    async with Engine({str(tmp_path)!r}) as engine:
        assert await (await engine.start(runs)).result() == 1

asyncio.run(main())
print([name for name in sys.modules if name.startswith("opentelemetry")])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"


def test_a_file_of_the_version_before_is_read_as_it_is_and_brought_up_to_date_by_its_engine(tmp_path: Path) -> None:
    source = RECORDED / "3.11" / "chain.db"
    path = tmp_path / "it.db"
    path.write_bytes(source.read_bytes())
    assert jr.read(path).instance.traceparent is None
    assert path.read_bytes() == source.read_bytes()
    journal = jr.Journal(path)
    before = journal.load()
    journal.close()
    (tmp_path / "new.db").write_bytes(jr.template())
    assert jr.rows(path, "wf_instance")[0] == jr.rows(tmp_path / "new.db", "wf_instance")[0]
    assert before.records == jr.read(source).records
