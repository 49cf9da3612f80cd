"""`$NAME` in a configuration: what the released binary makes of each form (tried, see specification 0.5 section 4)."""

from __future__ import annotations

import time

import pytest

from replicator.expand import expand_environment

ENVIRON = {"HOME": "/h", "A_1": "one", "EMPTY": "", "X:-d": "never asked for"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a", "a"),
        ("$HOME/x", "/h/x"),
        ("${HOME}x", "/hx"),
        ("$HOMEx", ""),
        ("$A_1-$A_1.", "one-one."),
        ("${NO}", ""),
        ("${NO:-d}", ""),
        ("$$$HOME", "/h"),  # $$ goes as a pair
        ("$$HOME", "HOME"),
        ("pa$1word", "paword"),
        ("$12", "2"),
        ("${1}2", "2"),
        ("$@$!$?$-$*$#|", "|"),
        ("${}x", "x"),
        ("${x", "x"),
        ("a$ b$.c$", "a$ b$.c$"),
        ("${A\nB}c", "c"),
        ("$EMPTY.", "."),
        ("# $HOME", "# /h"),
        ("$é", "$é"),
    ],
)
def test_expansion(text: str, expected: str) -> None:
    assert expand_environment(text, ENVIRON, pid=1)[0] == expected


def test_pid() -> None:
    assert expand_environment("$PID ${PID}", {"PID": "no"}, pid=42) == ("42 42", [])


def test_what_is_replaced_by_nothing_is_noted_with_its_place() -> None:
    notes = expand_environment("# $COMMENT\na: 1\n  b: ${GONE} $EMPTY\nc: ${X\n}\nd: ${N:-x} $é", {"EMPTY": ""}, pid=1)[1]
    assert [(note.line, note.column) for note in notes] == [(3, 6), (4, 4), (6, 4)]
    assert "GONE is not set" in notes[0].text
    assert "${N...}" in notes[2].text
    assert "default values are not supported" in notes[2].text


def test_the_rest_of_a_password_is_not_quoted() -> None:
    for text in ("pa$ecret", "pa$1ecret", "p${ecret-x}", "p$$ecret"):
        (note,) = expand_environment(text, {}, pid=1)[1]
        assert "ecret" not in str(note)
        assert "-no-expand-env" in note.text


@pytest.mark.parametrize("text", ["${" * 200_000, "$$" * 200_000, "$a" * 200_000, "$" * 400_001, "${a}" * 100_000, "}" + "${" * 200_000])
def test_the_time_is_linear(text: str) -> None:
    started = time.process_time()
    _, notes = expand_environment(text, {}, pid=1)
    assert time.process_time() - started < 5
    assert len(notes) <= 200
