"""Values as JSON and back, keys, ids, and the pure decisions."""

from __future__ import annotations

import enum
import hashlib
import json
import sqlite3
import time
import uuid
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime, timedelta, timezone
from pathlib import Path
from random import Random
from typing import Any, Literal, NamedTuple, TypedDict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workflow import Fatal, Retry
from workflow import journal as jr
from workflow.clock import Clock
from workflow.errors import NotJSON
from workflow.schema import INSTANCE
from workflow.state import Record, after_failure, check_id, child_id, remaining_wait_s, replay, step_key, ulid
from workflow.values import Artifact, Signature, decode, digest, encode, is_same, iso

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(json_values)
def test_plain_json_comes_back_as_it_was(value: Any) -> None:
    assert decode(Any, encode(value, "value")[0], "value") == value


@given(json_values)
def test_texts_are_those_of_the_json_module(value: Any) -> None:
    assert encode(value, "value")[0] == json.dumps(value, ensure_ascii=False, separators=(",", ":"))


@given(json_values, st.sampled_from([Any, None, type(None), bool, int, float, str, list, dict]))
def test_what_is_said_to_come_back_as_the_same_does(value: Any, kind: Any) -> None:
    if is_same(kind, value):
        found = decode(kind, encode(value, "value")[0], "value")
        assert (found, type(found)) == (value, type(value))


class Count(int):
    pass


@pytest.mark.parametrize(
    ("kind", "value"), [(float, 1), (int, True), (str, 1), (Any, Count(1)), (Any, [1]), (int | None, 1), (Any, 1.5), (date, "2030-01-01")]
)
def test_what_may_come_back_as_something_else_is_decoded(kind: Any, value: Any) -> None:
    assert not is_same(kind, value)


def test_arguments_are_the_same_only_where_each_is_and_stands_at_its_place() -> None:
    def function(a: int, b: Any = 1, *, c: int = 2) -> None: ...

    def ordinary(a: int, b: float = 1.0) -> None: ...

    assert not Signature(function, "f").is_same((1,), {})  # not all can be given by position
    signature = Signature(ordinary, "f")
    assert signature.is_same((1,), {})
    assert not signature.is_same((1, 2), {})  # comes back as 2.0
    assert not signature.is_same((1,), {"b": 2.0})
    assert signature.decode(signature.encode((1, 2), {})[0], None) == ((1, 2.0), {})


@given(st.lists(json_values, max_size=3))
def test_arguments_have_the_text_of_the_json_module(values: list[Any]) -> None:
    def function(a: Any = None, ü: Any = None, c: Any = None) -> None: ...

    wanted = dict(zip(["a", "ü", "c"], values, strict=False))
    assert Signature(function, "f").encode(tuple(values), {})[0] == json.dumps(wanted, ensure_ascii=False, separators=(",", ":"))


def test_an_integer_that_python_does_not_write_is_no_json() -> None:
    def function(a: int) -> None: ...

    for encoded in (
        lambda: encode(10**5000, "it"),
        lambda: encode([10**5000], "it"),
        lambda: Signature(function, "f").encode((10**5000,), {}),
    ):
        with pytest.raises(NotJSON):
            encoded()


def test_times_are_recorded_in_utc() -> None:
    for zone in (UTC, timezone.utc, timezone(timedelta(hours=2))):  # noqa: UP017
        assert iso(datetime(2030, 1, 1, 12, 0, 0, 1999, tzinfo=UTC).astimezone(zone)) == "2030-01-01T12:00:00.001Z"


class Size(enum.Enum):
    SMALL = 1
    LARGE = 2


class Point(NamedTuple):
    x: int
    y: float


class Options(TypedDict, total=False):
    deep: bool
    when: datetime


@dataclass(frozen=True)
class Box:
    size: Size
    at: Point
    tags: tuple[str, ...] = ()
    inner: Box | None = None
    made: datetime = datetime(2030, 1, 1, tzinfo=UTC)
    notes: dict[int, list[str]] = field(default_factory=dict)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (Box, Box(Size.LARGE, Point(1, 2.5), inner=Box(Size.SMALL, Point(0, 0.0)), notes={3: ["a"]})),
        (list[Size], [Size.SMALL, Size.LARGE]),
        (tuple[int, str], (1, "a")),
        (tuple[int, ...], (1, 2, 3)),
        (Options, {"deep": True, "when": datetime(2030, 1, 1, tzinfo=UTC)}),
        (date | None, date(2030, 1, 1)),
        (date | None, None),
        (timedelta, timedelta(days=3)),
        (uuid.UUID, uuid.UUID(int=5)),
        (Path, Path("a/b")),
        (Literal["a", 1], 1),
        (int | str, "text"),
    ],
)
def test_annotated_values_come_back_in_their_type(kind: Any, value: Any) -> None:
    found = decode(kind, encode(value, "value")[0], "value")
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (int, '"1"'),
        (int, "true"),
        (str, "1"),
        (Box, '{"size": 3, "at": [1, 2]}'),
        (Box, '{"size": 1, "at": [1, 2], "evil": 1}'),
        (Box, '{"size": 1}'),
        (Literal["a"], '"b"'),
        (list[int], '{"a": 1}'),
        (date, '"tomorrow"'),
        (int | None, '"x"'),
        (Artifact, '{"$artifact": "../../etc/passwd", "size": 1, "media_type": "x", "home": "y"}'),
    ],
)
def test_what_does_not_fit_its_annotation_is_an_error(kind: Any, text: str) -> None:
    with pytest.raises(NotJSON, match="value"):
        decode(kind, text, "value")


def test_no_class_is_made_by_a_name_in_the_data() -> None:
    text = json.dumps({"__class__": "os.system", "py/object": "subprocess.Popen", "$artifact": "0" * 64})
    assert decode(Any, text, "value") == json.loads(text)


def test_arguments_are_recorded_by_name_and_come_back() -> None:
    def function(first: int, *rest: Size, last: str = "z", **more: Point) -> None: ...

    signature = Signature(function, "function")
    text, _ = signature.encode((1, Size.SMALL, Size.LARGE), {"last": "x", "at": Point(1, 2.0)})
    assert json.loads(text) == {"first": 1, "rest": [1, 2], "last": "x", "more": {"at": [1, 2.0]}}
    assert signature.decode(text, None) == ((1, Size.SMALL, Size.LARGE), {"last": "x", "at": Point(1, 2.0)})
    with pytest.raises(TypeError):
        signature.encode((), {})


@given(st.integers(1, 50), st.floats(0, 100), st.floats(1, 10), st.floats(0, 1000))
def test_a_delay_is_never_longer_than_its_bounds(attempt: int, first: float, factor: float, cap: float) -> None:
    retry = Retry(attempts=100, first=first, factor=factor, cap=cap)
    assert 0 <= retry.delay_s(attempt, Random(attempt)) <= min(cap, first * factor ** (attempt - 1)) * (1 + 1e-9)


def test_retries_end_with_their_number_with_fatal_and_by_the_predicate() -> None:
    retry = Retry(attempts=3, first=2.0, factor=3.0, cap=100.0, jitter=False, on=(ConnectionError, Fatal))
    assert [after_failure(retry, attempt, ConnectionError(), Random(0)) for attempt in (1, 2, 3)] == [2.0, 6.0, None]
    assert after_failure(retry, 1, Fatal(), Random(0)) is None
    assert after_failure(retry, 1, ValueError(), Random(0)) is None
    assert after_failure(Retry(on=lambda error: "again" in str(error)), 1, ValueError("again"), Random(0)) is not None


def test_what_a_record_means_on_replay() -> None:
    def record(status: Any, repeat: bool = True) -> Record:
        return Record("a#1", 1, "a", "step", status, input_sha256="x", repeat=repeat)

    assert replay(None, "x") == "run"
    assert replay(record("done"), "y") == "diverged"
    assert [replay(record(status), "x") for status in ("done", "failed", "unknown", "cancelled")] == ["deliver"] * 4
    assert [replay(record(status), "x") for status in ("started", "retrying", "waiting")] == ["run"] * 3
    assert replay(record("started", repeat=False), "x") == "unknown"
    assert replay(record("done", repeat=False), "x") == "deliver"


@given(st.lists(st.integers(0, 4_102_444_800_000_000_000), min_size=1, max_size=5))
def test_the_clock_stamps_what_it_shows(times_ns: list[int]) -> None:
    clock = Clock()
    with pytest.MonkeyPatch.context() as patch:
        for now_ns in times_ns:
            patch.setattr(time, "time_ns", lambda now_ns=now_ns: now_ns)
            assert clock.stamp() == iso(datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=now_ns // 1000))


@given(st.text(max_size=2) | st.integers(200, 300).map(lambda size: "\u00f6" * size))
def test_a_digest_is_that_of_sha_256(text: str) -> None:
    assert digest(text) == hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize(
    "unusual", [{}, {"durability": "replicated"}, {"repeat": False}, {"error": "{}"}, {"wake_at": "2030"}, {"output_sha256": "ab"}], ids=str
)
def test_a_step_is_written_whole_whatever_stood_in_its_row(unusual: dict[str, Any]) -> None:
    usual = Record("2/a#1", 3, "a", "step", "done", "{}", "ff", "7", number=4, after=2, attempts=2, started_at="2026", finished_at="2027")
    with sqlite3.connect(":memory:") as db:
        db.executescript(INSTANCE)
        for record in (usual, replace(usual, status="retrying", number=None, **unusual), usual, replace(usual, **unusual), usual):
            db.execute(*jr.put_step(record))
            columns = (
                "seq key name kind status number after durability repeat input input_sha256 output output_sha256 error attempts wake_at"
            )
            row = db.execute(f"SELECT {columns.replace(' ', ', ')}, started_at, finished_at FROM wf_steps").fetchone()
            assert row == tuple(getattr(record, name) for name in [*columns.split(), "started_at", "finished_at"])
    db.close()


def test_a_wait_is_never_longer_than_it_was() -> None:
    assert [remaining_wait_s(by_clock, 60) for by_clock in (-5, 0, 30, 60, 1e9)] == [0, 0, 30, 60, 60]


@given(
    st.lists(st.tuples(st.lists(st.integers(1, 30), max_size=3), st.sampled_from(["a", "a.b", "c_1"]), st.integers(1, 30)), unique_by=str)
)
def test_ids_of_children_are_usable_and_never_the_same(calls: list[tuple[list[int], str, int]]) -> None:
    keys = [step_key("/".join(map(str, path)), name, ordinal) for path, name, ordinal in calls]
    ids = [check_id(child_id("parent", key), longest=200) for key in keys]
    assert len(set(ids)) == len(set(keys))
    assert len(check_id(child_id("p" * 190, "2/summ#1"), longest=200)) <= 200


def test_ulids_sort_by_time() -> None:
    assert len(ulid(0)) == 26
    assert ulid(1, 2**80 - 1) < ulid(2, 0)
    assert ulid(0, 1).endswith("01")
