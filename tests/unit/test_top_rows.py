"""`pyrepl top` as values: rates, orders, searches, sums, and what a screen of any size looks like."""

from __future__ import annotations

import io
import json
import time
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from rich.console import Console

from replicator.cli import main
from replicator.cli.toprows import ORDERS, Row, Sample, amount, chosen, first_of, rows_of, short_path, span, totals_of
from replicator.cli.topscreen import Frame, View, print_json, print_lines, rendered
from replicator.errors import ReplicatorError

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


def sample(at_s: float | None = 0.0, *, identity: str = "1", puts: int = 0, **databases: dict[str, object]) -> Sample:
    named = {f"/srv/{name}.db": {"state": "replicating", **fields} for name, fields in databases.items()}
    return Sample("pyrepl", "9.9", identity, at_s, at_s or 0.0, 50 << 20, named, {"PUT": {"requests": puts, "bytes": 0, "errors": 0}})


def by_path(rows: list[Row]) -> dict[str, Row]:
    return {row.path.removeprefix("/srv/").removesuffix(".db"): row for row in rows}


# -- rates -----------------------------------------------------------------------------------------------------------------------


def test_rates_are_differences_by_the_daemons_own_clock() -> None:
    before = sample(10.0, a={"sent_bytes": 1000, "requests": 4, "syncs": 2})
    after = sample(12.5, a={"sent_bytes": 6000, "requests": 14, "syncs": 2}, b={"requests": 5})
    found = by_path(rows_of(before, after))
    assert (found["a"].bytes_rate, found["a"].requests_rate, found["a"].syncs_rate) == (2000.0, 4.0, 0.0)
    assert found["b"].requests_rate is None  # it was not there before


def test_a_counter_that_began_anew_gives_no_negative_rate() -> None:
    (row,) = rows_of(sample(1.0, a={"sent_bytes": 5000}), sample(2.0, a={"sent_bytes": 300}))
    assert row.bytes_rate == 300.0


@pytest.mark.parametrize(
    "before", [None, sample(1.0, identity="2", a={"syncs": 1}), sample(None, a={"syncs": 1}), sample(5.0, a={"syncs": 1})]
)
def test_no_rate_without_two_answers_of_one_process(before: Sample | None) -> None:
    after = sample(5.0, a={"syncs": 3})
    (row,) = rows = rows_of(before, after)
    assert row.syncs_rate is None
    totals = totals_of(rows, before, after)
    assert (totals.syncs_rate, totals.requests_rate, totals.kinds) == (None, None, {})


def test_totals_are_of_all_databases() -> None:
    before = sample(0.0, puts=10, a={"syncs": 1}, b={})
    after = sample(
        2.0,
        puts=30,
        a={"syncs": 5, "lag_s": 0.5, "wal_bytes": 100, "pending": 1, "pending_bytes": 7, "errors": 2, "loss_p99_s": 0.25},
        b={"lag_s": 3.0, "wal_bytes": 50, "errors": 1},
        c={"state": "failed"},
    )
    totals = totals_of(rows_of(before, after), before, after)
    assert (totals.databases, dict(totals.states)) == (3, {"failed": 1, "replicating": 2})
    assert (totals.lag_s, totals.loss_p99_s, totals.wal_bytes, totals.pending, totals.pending_bytes, totals.errors) == (
        3.0,
        0.25,
        150,
        1,
        7,
        3,
    )
    assert (totals.syncs_rate, totals.requests_rate, totals.kinds) == (2.0, 10.0, {"PUT": 10.0})


# -- order and search ------------------------------------------------------------------------------------------------------------


def test_the_worst_come_first() -> None:
    rows = rows_of(
        None,
        sample(
            0.0,
            idle={},
            stopped={"state": "stopped"},
            busy={"pending_bytes": 5},
            late={"lag_s": 9.0},
            waiting={"state": "waiting"},
            missing={"state": "waiting", "error": "no such database"},
            degraded={"state": "degraded", "lag_s": 1.0},
            failed={"state": "failed"},
        ),
    )
    names = [row.path[5:-3] for row in first_of(rows, "worst", None)]
    assert names == ["failed", "degraded", "missing", "waiting", "late", "busy", "idle", "stopped"]
    assert [row.path[5:-3] for row in first_of(rows, "worst", 3)] == names[:3]


@pytest.mark.parametrize("order", sorted(set(ORDERS) - {"name", "worst"}))
def test_each_order_puts_the_largest_first(order: str) -> None:
    fields = {
        "lag": {"lag_s": 1.0},
        "loss": {"loss_p99_s": 1.0},
        "bytes": {"sent_bytes": 1},
        "requests": {"requests": 1},
        "syncs": {"syncs": 1},
        "wal": {"wal_bytes": 1},
        "pending": {"pending": 1},
        "errors": {"errors": 1},
    }
    others: dict[str, dict[str, object]] = {f"other_{name}": dict.fromkeys(item, 5) for name, item in fields.items() if name != order}
    after = sample(1.0, zz=dict(fields[order]), **others)
    before = sample(0.0, zz={}, **{name: {} for name in others})
    assert first_of(rows_of(before, after), order, 1)[0].path == "/srv/zz.db"


def test_a_search_looks_for_every_word_in_path_state_and_error() -> None:
    rows = rows_of(None, sample(0.0, red={"error": "Access denied"}, blue={"state": "failed"}, redblue={}))
    assert sorted(row.path[5:-3] for row in chosen(rows, "RED")) == ["red", "redblue"]
    assert [row.path[5:-3] for row in chosen(rows, "red denied")] == ["red"]
    assert [row.path[5:-3] for row in chosen(rows, "failed")] == ["blue"]
    assert sorted(row.path[5:-3] for row in chosen(rows, "", only_problems=True)) == ["blue", "red"]


# -- texts -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"), (0, "0"), (0.0, "0"), (0.25, "0.25"), (0.999, "1.00"), (9.94, "9.9"), (99.94, "99.9"), (99.96, "100"), (123.4, "123"),
        (999, "999"), (999.6, "1k"), (1000, "1k"), (1234, "1.2k"), (99_940, "99.9k"), (99_960, "100k"), (999_600, "1M"), (3.4e6, "3.4M"),
        (2.5e9, "2.5G"), (7e12, "7T"), (7e15, "7000T"),
    ],
)  # fmt: skip
def test_amounts(value: float | None, text: str) -> None:
    assert amount(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "-"), (1e-9, "1 ms"), (0.0125, "12 ms"), (0.9994, "999 ms"), (0.9996, "1.0 s"), (99.94, "99.9 s"), (99.96, "1m40s"),
        (306, "5m06s"), (7385, "2h03m"), (363_900, "4d05h"),
    ],
)  # fmt: skip
def test_spans(seconds: float, text: str) -> None:
    assert span(seconds) == text


def test_paths_are_cut_in_front_and_cannot_command_the_terminal() -> None:
    assert short_path("/srv/tenants/5/app.db", 10) == "…/5/app.db"
    assert short_path("/a\x1b]0;x\x07\n\udcff.db", 99) == "/a?]0;x???.db"


# -- keys ------------------------------------------------------------------------------------------------------------------------


def pressed(view: View, keys: str) -> View:
    for key in keys:
        found = view.after_key(key)
        assert found is not None
        view = found
    return view


def test_keys() -> None:
    assert [View().after_key(key) for key in "qQ\x03"] == [None] * 3
    assert pressed(View(), "s").order == list(ORDERS)[1]
    assert pressed(View(), "S").order == list(ORDERS)[-1]
    assert pressed(View(), "s" * len(ORDERS)) == View()
    assert pressed(View(), "rep") == View(turned=True, only_problems=True, paused=True)
    assert pressed(View(), "rrxX\x00") == View()


def test_entering_a_search() -> None:
    assert pressed(View(), "/aq\x7fb\n") == View(words="ab")
    assert pressed(View(words="old"), "/new\x1b") == View(words="old")
    assert pressed(View(words="old", only_problems=True), "\x1b") == View()
    assert len(pressed(View(), "/" + "x" * 300).typing or "") == 200
    frame = Frame(NOON, sample(0.0, ab={}, cd={}))
    assert [row.path for row in pressed(View(), "/ab").select(frame, None)[0]] == ["/srv/ab.db"]  # while it is typed


def test_turned_shows_the_last_first() -> None:
    frame = Frame(NOON, sample(0.0, a={}, b={}, c={}))
    shown, count, _ = View("name", turned=True).select(frame, 2)
    assert ([row.path for row in shown], count) == (["/srv/c.db", "/srv/b.db"], 3)


# -- screens ---------------------------------------------------------------------------------------------------------------------


def screen(frame: Frame, view: View, width: int, height: int) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=width, height=height).print(rendered(frame, view, width, height))
    return out.getvalue().splitlines()


def fleet(number: int = 10_000) -> Frame:
    databases: dict[str, dict[str, object]] = {f"t{at:05d}": {"txid": at, "lag_s": at / 1e5} for at in range(number)}
    databases["broken"] = {"state": "failed", "error": "another writer owns the replica"}
    return Frame(NOON, sample(2.0, puts=5, **databases), sample(0.0, puts=1, **databases), None, NOON)


@pytest.mark.parametrize(("width", "height"), [(80, 24), (120, 40), (250, 70)])
def test_ten_thousand_databases_fill_one_screen_the_worst_first(width: int, height: int) -> None:
    frame = fleet()
    began = time.process_time()
    lines = screen(frame, View(), width, height)
    assert time.process_time() - began < 3.0
    assert len(lines) == height
    assert max(map(len, lines)) <= width
    assert "databases 10001: 1 failed, 10000 replicating" in lines[0] or width < 120
    assert "broken.db" in lines[3]
    assert "failed" in lines[3]
    assert "09999.db" in lines[4]
    assert any("another writer owns the replica" in line for line in lines)
    assert f"{height - 7} of 10001, by worst" in lines[-1]


@pytest.mark.parametrize(("width", "height"), [(40, 8), (20, 4), (1, 1)])
def test_a_tiny_terminal_is_no_error(width: int, height: int) -> None:
    assert screen(fleet(3), View(typing="x"), width, height)


def test_a_daemon_that_is_away_is_named_and_what_was_known_stays() -> None:
    lines = screen(Frame(NOON, sample(0.0, a={}), None, ReplicatorError("connection refused"), NOON), View(), 120, 24)
    assert "does not answer, last heard of at" in lines[2]
    assert "connection refused" in lines[2]
    assert "/srv/a.db" in lines[4]
    assert len(lines) == 24
    assert "connection refused" in "".join(screen(Frame(NOON, error=ReplicatorError("connection refused")), View(), 80, 24))


def test_a_hostile_name_or_error_reaches_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    hostile = "\x1b]0;owned\x07\x9b2J"
    frame = Frame(NOON, sample(0.0, **{f"a{hostile}": {"error": f"no{hostile}"}}), None, ReplicatorError(f"gone{hostile}"), NOON)
    text = "\n".join(screen(frame, View(words=""), 120, 24))
    print_lines(replace(frame, error=None), View(), None)
    text += capsys.readouterr().out
    assert "owned" in text
    assert not {"\x1b", "\x07", "\x9b"} & set(text)


def test_lines_and_json_for_scripts(capsys: pytest.CaptureFixture[str]) -> None:
    frame = Frame(NOON, sample(2.0, puts=4, a={"syncs": 4, "lag_s": 0.5}, b={}), sample(0.0, a={}, b={}), None, NOON)
    print_json(frame, View(), 1)
    found = json.loads(capsys.readouterr().out)
    assert found["time"] == "2026-01-01T12:00:00.000Z"
    assert found["daemon"] == {"name": "pyrepl", "version": "9.9", "pid": 1, "uptime_seconds": 2}
    assert [(item["path"], item["lag_seconds"], item["syncs_per_second"]) for item in found["databases"]] == [("/srv/a.db", 0.5, 2.0)]
    assert (found["totals"]["databases"], found["totals"]["requests_per_second_by_kind"]) == (2, {"PUT": 2.0})
    print_lines(frame, View(), 1)
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split()[:2] == ["database", "state"]
    assert lines[3].split() == ["/srv/a.db", "replicating", "500", "ms", "-", "0", "0", "0", "2", "0", "-", "0"]
    assert lines[4] == "... and 1 more"
    away = Frame(NOON, error=ReplicatorError("gone"))
    print_json(away, View(), None)
    assert json.loads(capsys.readouterr().out) == {"time": "2026-01-01T12:00:00.000Z", "error": "gone"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-sort", "size"], "-sort: 'size' (worst, lag"),
        (["-interval", "1ms"], "at least 0.1s"),
        (["-interval", "soon"], "invalid value for -interval"),
        (["-n", "0"], "invalid value for -n"),
        (["-n", "1", "-once"], "give one of them"),
        (["-rows", "-1"], "invalid value for -rows"),
        (["a.db"], "too many arguments"),
    ],
)
def test_wrong_usage(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_a_daemon_that_never_answered_is_an_error(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", "-once", "-socket", str(tmp_path / "none.sock")]) == 1
    assert "failed to connect to control socket" in capsys.readouterr().err
