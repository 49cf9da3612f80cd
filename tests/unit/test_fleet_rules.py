"""Who gets which run, who watches whom, what hosts say of themselves."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workflow.errors import BadId
from workflow.handing import Inheritance
from workflow.intake import Indexed, Request
from workflow.membership import GONE, PART_BYTES, HostRecord, Members, Part, Takeover, parts
from workflow.placement import ANY, Candidate, divide, first, rooms, watchers

NAMES = st.lists(st.text("abcdefgh", min_size=1, max_size=4), min_size=1, max_size=8, unique=True)
FLOWS = ("one", "two", "three")


@st.composite
def hosts(draw: st.DrawFn) -> list[Candidate]:
    def flows() -> frozenset[str]:
        return draw(st.frozensets(st.sampled_from(FLOWS)))

    return [Candidate(name, draw(st.integers(1, 200)), draw(st.integers(0, 500)), flows()) for name in draw(NAMES)]


RUNS = st.lists(
    st.tuples(st.text("xyz0123456789", min_size=1, max_size=6), st.sampled_from(FLOWS)), max_size=60, unique_by=lambda run: run[0]
)


def equal(*names: str) -> list[Candidate]:
    return [Candidate(name, 10, 0, frozenset(FLOWS)) for name in names]


@settings(max_examples=30)
@given(runs=RUNS, candidates=hosts())
def test_each_run_is_given_to_one_host_that_can_run_it_or_to_none_if_there_is_none(
    runs: list[tuple[str, str]], candidates: list[Candidate]
) -> None:
    given_to = divide(runs, candidates)
    assert sorted(id for ids in given_to.values() for id in ids) == sorted(id for id, _ in runs)
    by_name = {host.name: host for host in candidates}
    flows = dict(runs)
    for name, ids in given_to.items():
        for id in ids:
            able = [host for host in candidates if host.takes(flows[id])]
            assert (by_name[name] in able) if name is not None else not able


@settings(max_examples=30)
@given(runs=RUNS, candidates=hosts(), seed=st.randoms())
def test_the_order_in_which_things_are_known_changes_nothing(runs: list[tuple[str, str]], candidates: list[Candidate], seed) -> None:  # type: ignore[no-untyped-def]
    before = divide(runs, candidates)
    seed.shuffle(runs)
    seed.shuffle(candidates)
    assert {name: sorted(ids) for name, ids in divide(runs, candidates).items()} == {name: sorted(ids) for name, ids in before.items()}


@settings(max_examples=30)
@given(count=st.integers(0, 2000), candidates=hosts())
def test_all_are_filled_to_one_level(count: int, candidates: list[Candidate]) -> None:
    room = rooms(count, candidates)
    assert count <= sum(room.values()) <= count + len(candidates)
    levels = [(host.load + room[host.name]) / host.places for host in candidates if room[host.name]]
    for host in candidates:
        slack = 1 / host.places
        assert all((host.load + room[host.name]) / host.places >= level - slack - 1 for level in levels)
        if not room[host.name]:  # it had more than the others get
            assert all(host.load / host.places >= level - 1 / min(other.places for other in candidates) for level in levels)


def test_equal_hosts_get_equal_shares_and_an_idle_one_more() -> None:
    runs = [(f"it-{number}", "one") for number in range(300)]
    shares = {name: len(ids) for name, ids in divide(runs, equal("a", "b", "c")).items()}
    assert set(shares.values()) == {100}
    busy = [replace(equal("a")[0], load=100), *equal("b", "c")]
    shares = {name: len(ids) for name, ids in divide(runs, busy).items()}
    assert shares["b"] > 130 > 40 > shares["a"]
    assert shares["a"] + shares["b"] + shares["c"] == 300


def test_when_a_host_goes_only_what_was_its_begins_elsewhere() -> None:
    ids = [f"it-{number}" for number in range(500)]
    before = {id: first(id, "one", equal("a", "b", "c")) for id in ids}
    after = {id: first(id, "one", equal("a", "b")) for id in ids}
    assert all(after[id] == before[id] for id in ids if before[id] != "c")
    assert {after[id] for id in ids if before[id] == "c"} == {"a", "b"}
    assert first("x", "unknown", equal("a")) is None
    assert first("x", ANY, equal("a")) == "a"


def test_a_host_with_more_places_begins_more() -> None:
    candidates = [Candidate("small", 10, 0, frozenset()), Candidate("large", 30, 0, frozenset())]
    chosen = [first(f"it-{number}", ANY, candidates) for number in range(2000)]
    assert 0.70 < chosen.count("large") / 2000 < 0.80


@given(names=NAMES, count=st.integers(1, 4))
def test_a_host_is_watched_by_so_many_others_and_never_by_itself(names: list[str], count: int) -> None:
    for name in names:
        found = watchers(name, names, count)
        assert len(set(found)) == min(count, len(names) - 1)
        assert name not in found


@given(names=NAMES)
def test_when_a_watcher_goes_the_others_stay(names: list[str]) -> None:
    host, *others = names
    before = watchers(host, others, 3)
    for gone in before:
        assert [name for name in before if name != gone] == watchers(host, [name for name in others if name != gone], 3)[: len(before) - 1]


RECORD = HostRecord(
    "a", machine="vm:1", at="2026-11-30T15:00:00+00:00", generation=3, ttl_s=10.0, places=5, active=2, flows=("one",), resources={"gpu": 1.0},
    counts={"running": 2, "waiting": 3}, shards={"07": (3, "2026-12-01T00:00:00+00:00"), "08": (1, None)},
    takeovers=(Takeover("b", "2026-11-30T14:00:00+00:00", 7, 0.5),), taken_over=1,
)  # fmt: skip


def test_a_record_comes_back_as_it_was() -> None:
    assert HostRecord.decode("a", RECORD.encode()) == RECORD
    assert RECORD.unfinished == 5
    assert RECORD.candidate() == Candidate("a", 5, 5, frozenset({"one"}))
    later = json.dumps(json.loads(RECORD.encode()) | {"of_a_newer_version": 1}).encode()
    assert HostRecord.decode("a", later) == RECORD


@given(name=st.sampled_from(sorted(HostRecord.__dataclass_fields__)), value=st.sampled_from([None, "x", [], {}, [1], {"a": []}, 1e400, -1]))
def test_a_damaged_record_is_none_or_a_sound_one(name: str, value: object) -> None:
    fields = json.loads(RECORD.encode()) | {name: value}
    found = HostRecord.decode("a", json.dumps(fields).encode())
    assert found is None or HostRecord.decode("a", found.encode()) == found


@pytest.mark.parametrize("data", [b"", b"no json", b"[" * 100_000, b"null", b'{"host": "b", "at": "x"}', b'{"host": "a"}', b"\xff"])
def test_what_is_no_record_of_that_host_is_none(data: bytes) -> None:
    assert HostRecord.decode("a", data) is None


def test_a_host_lives_while_its_record_is_rewritten() -> None:
    members = Members()
    record = replace(RECORD, host="b")
    for now, versions in ((0.0, {"a": 1, "b": 1}), (5.0, {"a": 2, "b": 1}), (7.9, {"a": 2, "b": 1})):
        for name in members.changed(versions, now):
            members.records[name] = RECORD if name == "a" else record
    assert [found.host for found in members.living(7.9)] == ["a", "b"]
    assert [found.host for found in members.living(8.1)] == ["a"]  # 0.8 of the 10 seconds of its lease
    assert members.changed({"b": 1}, 9.0) == []
    assert [*members.records] == ["b"]
    members.records["b"] = replace(record, state=GONE)
    assert members.living(0.1) == []


def row(id: str, status: str = "running", flow: str = "one") -> Indexed:
    return Indexed(id, flow, status, None, 0, 1, "0" * 64, None, None, "2026-11-30T15:00:00Z", None)


def request(id: str, run: str, kind: str = "event", body: str = "{}") -> Request:
    return Request(id, run, kind, body, None, "2026-11-30T15:00:00Z")


def test_what_a_host_leaves_is_given_whole_and_once() -> None:
    rows = [row("run"), row("done", "done"), row("queued", "queued"), row("unknown", flow="nobody's")]
    requests = [
        request("s", "queued", "start", '{"flow": "one", "chosen": false}'), request("e", "run"), request("out", "elsewhere"), request("u", "unknown"),
    ]  # fmt: skip
    leaves = Inheritance(rows, requests, {"run": {"z"}})
    heir_of, left = leaves.divided(equal("a", "b"), {})
    shares = list(leaves.parts("dead", heir_of))
    again, _ = leaves.divided(equal("c", "a", "b"), heir_of)
    assert again == heir_of  # who has something already keeps it
    moved, _ = leaves.divided(equal("b"), heir_of)
    assert moved == dict.fromkeys(heir_of, "b")  # but who is gone
    assert left == {"unknown"}
    assert sorted(found.id for _, part in shares for found in part.rows) == ["done", "queued", "run"]
    given_requests = {item.id: item for _, part in shares for item in part.requests}
    assert set(given_requests) == {"s", "e", "out"}
    assert json.loads(given_requests["s"].body) == {"flow": "one", "chosen": True}  # another heir may have begun it
    for _, part in shares:
        assert Part.decode(part.encode()) == part
        for found in part.rows:
            assert part.owners_of(found.id) == (("dead", "z") if found.id == "run" else ("dead",))
            assert {item.id for item in part.requests if item.instance == found.id} == {
                item.id for item in requests if item.instance == found.id
            }
    assert leaves.divided([], {}) == ({}, {"run", "done", "queued", "unknown", "elsewhere"})
    assert leaves.unfinished == 3


@settings(max_examples=30)
@given(sizes=st.lists(st.integers(0, 300_000), max_size=30))
def test_parts_are_about_a_mebibyte_and_hold_everything_once(sizes: list[int]) -> None:
    rows = [row(f"it-{number}") for number in range(len(sizes))]
    requests = {
        f"it-{number}": [request(f"r-{number}", f"it-{number}", body=json.dumps("x" * size))] for number, size in enumerate(sizes) if size
    }
    found = parts("dead", rows, requests, {})
    assert [item.id for part in found for item in part.rows] == [item.id for item in rows]
    assert [item.id for part in found for item in part.requests] == [items[0].id for items in requests.values()]
    assert all(len(part.encode()) <= PART_BYTES + 310_000 for part in found)


@pytest.mark.parametrize(
    "data",
    [b"", b"{}", b"null", b"[" * 100_000, b'{"host": "../x", "rows": [], "requests": [], "owners": {}}', b'{"host": "a", "rows": [1]}'],
)
def test_what_is_no_part_is_refused(data: bytes) -> None:
    with pytest.raises((ValueError, BadId)):
        Part.decode(data)


def test_each_host_is_watched_by_three_as_each_of_them_sees_it_and_by_others_when_those_are_gone() -> None:
    names = [f"host-{number}" for number in range(8)]

    def seen_by(me: str, gone: set[str]) -> list[str]:
        members = Members()
        for now in (0.0, 5.0):
            members.changed({name: now if name not in gone else 0.0 for name in names}, now)
        members.records |= {name: replace(RECORD, host=name, ttl_s=6.0) for name in names}
        return members.watched(me, 5.0)

    for gone in (set[str](), {"host-0"}, {"host-0", "host-1", "host-2", "host-3"}):
        counts = {name: [me for me in names if me not in gone and name in seen_by(me, gone)] for name in names}
        assert all(len(found) == 3 and name not in found for name, found in counts.items())
