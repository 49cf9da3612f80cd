"""Log lines in the three shapes of Litestream: `text`, `json`, `pretty`; with and without the place in the source."""

from __future__ import annotations

import io
import json
import logging
import re

import pytest

from replicator.cli.output import log_to
from replicator.cli.parse import UsageError

log = logging.getLogger("replicator.test")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def said(kind: str, stream: io.StringIO, **options: bool) -> str:
    log_to(stream, "info", kind=kind, **options)  # type: ignore[arg-type]
    log.debug("not said")
    log.warning("cannot replicate db=%s error=%r", "/srv/a b.db", "no 'luck' today")
    return stream.getvalue()


def test_text_lines() -> None:
    assert re.fullmatch(
        r'time=\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z level=WARN msg="cannot replicate" db=/srv/a b\.db error="no \'luck\' today"\n',
        said("text", io.StringIO()),
    )
    assert re.search(r'Z level=WARN source=test_log_lines\.py:\d+ msg="cannot', said("text", io.StringIO(), source=True))


def test_json_lines() -> None:
    plain, placed = (json.loads(said("json", io.StringIO(), source=source)) for source in (False, True))
    assert {key: plain[key] for key in plain if key != "time"} == {
        "level": "WARN",
        "msg": "cannot replicate",
        "db": "/srv/a b.db",
        "error": "no 'luck' today",
    }
    assert list(placed)[:3] == ["time", "level", "source"]
    assert (placed["source"]["file"], placed["source"]["function"]) == ("test_log_lines.py", "said")
    assert placed["source"]["line"] > 1


def test_pretty_lines_are_coloured_on_a_terminal_only() -> None:
    pattern = r"\d\d:\d\d:\d\d WRN cannot replicate db=/srv/a b\.db error=\"no 'luck' today\"\n"
    assert re.fullmatch(pattern, said("pretty", io.StringIO()))
    coloured = said("pretty", Terminal())
    assert "\x1b[93mWRN\x1b[0m" in coloured
    assert re.fullmatch(pattern, re.sub(r"\x1b\[\d+m", "", coloured))
    assert re.search(r" WRN test_log_lines\.py:\d+ cannot replicate ", said("pretty", io.StringIO(), source=True))


@pytest.mark.parametrize("kind", ["text", "json", "pretty"])
def test_a_traceback_is_there_and_the_line_of_json_stays_one(kind: str) -> None:
    stream = io.StringIO()
    log_to(stream, "error", kind=kind)  # type: ignore[arg-type]
    try:
        raise ZeroDivisionError("by nothing")
    except ZeroDivisionError as error:
        log.error("a defect db=%s", "a.db", exc_info=error)
    assert "ZeroDivisionError: by nothing" in stream.getvalue()
    if kind == "json":
        assert stream.getvalue().count("\n") == 1


def test_levels_are_those_of_litestream() -> None:
    for name, number in {"TRACE": 10, "debug": 10, "info": 20, "WARN": 30, "warning": 30, "error": 40}.items():
        log_to(io.StringIO(), name)
        assert logging.getLogger("replicator").level == number
    with pytest.raises(UsageError, match="invalid value for -log-level: 'loud'"):
        log_to(io.StringIO(), "loud")
