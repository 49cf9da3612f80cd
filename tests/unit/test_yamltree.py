"""The tree of a YAML text: places, limits, and what is refused."""

from __future__ import annotations

import time
from typing import Any

import pytest
import yaml

from replicator.yamltree import MappingNode, Node, ScalarNode, SequenceNode, YAMLProblem, parse_yaml


@pytest.fixture(params=["libyaml", "python"], autouse=True)
def parser(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both parsers of PyYAML must give the same."""
    if request.param == "python":
        monkeypatch.setattr(yaml, "CSafeLoader", yaml.SafeLoader)
    elif yaml.__with_libyaml__ is False:
        pytest.skip("PyYAML without libyaml")
    return str(request.param)


def plain(node: Node | None) -> Any:
    """The tree as Python values."""
    match node:
        case ScalarNode():
            return node.text
        case SequenceNode():
            return [plain(item) for item in node.items]
        case MappingNode():
            return {key: plain(value) for key, (_, value) in node.entries.items()}
    return None


def refused(text: str) -> YAMLProblem:
    with pytest.raises(YAMLProblem) as caught:
        parse_yaml(text)
    return caught.value


def test_values_stay_as_they_are_written() -> None:
    text = "a: 010\nb: 'on'\nc: [1.50, yes, ~, ]\nd: {e: 2026-01-01}\n"
    assert plain(parse_yaml(text)) == {"a": "010", "b": "on", "c": ["1.50", "yes", "~"], "d": {"e": "2026-01-01"}}


def test_nothing_is_none() -> None:
    for text in ("", "# only a comment\n", "\n\n"):
        assert parse_yaml(text) is None
    assert plain(parse_yaml("---\n")) == ""


def test_plain_and_quoted_are_told_apart() -> None:
    node = parse_yaml("[a, 'a', \"a\", !!str a]")
    assert isinstance(node, SequenceNode)
    assert [item.plain for item in node.items if isinstance(item, ScalarNode)] == [True, False, False, False]


def test_nodes_know_their_place() -> None:
    node = parse_yaml("a: 1\nbb:\n  - {c: x}\n")
    assert isinstance(node, MappingNode)
    key, value = node.entries["bb"]
    assert (key.line, key.column, value.line, value.column) == (2, 1, 3, 3)


def test_aliases_and_merge_keys() -> None:
    text = "x: &x {a: 1, b: 2}\ny: *x\nz: {<<: *x, b: 3}\nw: {b: 0, <<: [{c: 4, b: 5}, *x]}\nq: {'<<': 1}"
    assert plain(parse_yaml(text)) == {
        "x": {"a": "1", "b": "2"},
        "y": {"a": "1", "b": "2"},
        "z": {"a": "1", "b": "3"},
        "w": {"c": "4", "b": "0", "a": "1"},
        "q": {"<<": "1"},
    }


@pytest.mark.parametrize(
    ("text", "place", "words"),
    [
        ("a: 1\n a: 2", (2, 3), "not valid YAML"),
        ("a: 1\nb: [", (3, 1), "not valid YAML"),
        ("a: 1\na: 2", (2, 1), "key given twice: a (first in line 1)"),
        ("b: {a: 1, 'a': 2}", (1, 11), "key given twice"),
        ("a: *b", (1, 4), "an alias without an anchor"),
        ("a: &a [*a]", (1, 8), "an alias without an anchor"),
        ("a: !!python/object:os.system x", (1, 4), "tags are not supported"),
        ("a: !x 1", (1, 4), "tags are not supported"),
        ("a: !!binary aGk=", (1, 4), "tags are not supported"),
        ("a: 1\n---\nb: 2", (2, 1), "a second document"),
        ("[a]: 1", (1, 1), "a key must be text"),
        ('a: "x\\0y"', (1, 4), "control characters"),
        ("<<: 1", (1, 5), "<< takes a mapping"),
    ],
)
def test_refusals_name_the_place(text: str, place: tuple[int, int], words: str, parser: str) -> None:
    problem = refused(text)
    assert words in problem.what
    if "[" not in text or parser == "libyaml" or not words.startswith("not valid"):
        assert (problem.line, problem.column) == place


@pytest.mark.parametrize(
    "text", ["a: \x00", "\ud800", "a: \x1b", '"\\ud800"', '"\\U00110000"', '"\\UFFFFFFFF"', "%YAML 1." + "1" * 5000 + "\n---\na"]
)
def test_characters_that_cannot_stand_there(text: str) -> None:
    refused(text)


@pytest.mark.parametrize(
    "text", ["a: 'secretsecret", "a: !secretsecret!b x", "a: *secretsecret", "a: @secretsecret", "a: %secretsecret", "- b: c: secretsecret"]
)
def test_refusals_do_not_quote_the_text(text: str) -> None:
    assert "secret" not in str(refused(text))


def test_nodes_do_not_show_their_text() -> None:
    assert "secret" not in repr(parse_yaml("a: {b: [secret], secret: x}"))


def laughs(depth: int) -> str:
    return "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, depth))


@pytest.mark.fault("F57")
@pytest.mark.parametrize(
    "text",
    [
        laughs(30),
        "a0: &a0 {" + ", ".join(f"k{n}: 1" for n in range(500)) + "}\nb: [" + ", ".join(["{<<: *a0}"] * 500) + "]",
        "[" * 100_000,
        "{a: " * 100_000,
        "- " * 100_000,
        "[x,\n" * 50_000,
        "a" * (1 << 20) + "a",
        "[" + "a," * 200_000 + "]",
        "? " * 100_000,
        "&a " * 100_000,
    ],
)
def test_what_would_take_much_is_refused_soon(text: str) -> None:
    started = time.process_time()
    refused(text)
    assert time.process_time() - started < 30
