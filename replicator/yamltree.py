"""YAML text to a tree whose nodes know their line and column. Nothing is converted: what `on`, `010` or `10` means, the reader of a key decides.

PyYAML's parser yields events; the tree is built from them here, without recursion and within limits, because the text is not trusted:

* the text, the nesting and the number of nodes are bounded; an alias counts as all the nodes it stands for ("billion laughs");
* an alias inside its own anchor is refused, and so are a key given twice, keys that are not text, tags, control characters, and a second document.

Merge keys (`<<`) are resolved; a mapping's own keys win. Messages never quote the text, which may hold secrets; only keys are named.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

__all__ = ["MAX_NOTES", "MAX_TEXT", "MappingNode", "Node", "Note", "ScalarNode", "SequenceNode", "YAMLProblem", "parse_yaml"]

MAX_TEXT = 1 << 20
MAX_DEPTH = 32
MAX_NODES = 100_000
MAX_NOTES = 200

_UNWANTED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")
_NAMES_TEXT = re.compile(r"(?<=tag handle) .*", re.DOTALL)  # the only message of PyYAML that quotes more than one character
_TAGS = frozenset({"!", *(f"tag:yaml.org,2002:{name}" for name in ("str", "seq", "map"))})


class YAMLProblem(Exception):
    """The text is not YAML, or not YAML of the plain kind that is read here. Line and column count from 1."""

    def __init__(self, line: int, column: int, what: str) -> None:
        self.line, self.column, self.what = line, column, what
        super().__init__(f"line {line}, column {column}: {what}")


@dataclass(frozen=True, slots=True)
class Note:
    """A warning about a place: something there has no effect, or perhaps not the one that was meant. At most `MAX_NOTES` are kept."""

    line: int
    column: int
    text: str

    def __str__(self) -> str:
        return f"line {self.line}, column {self.column}: {self.text}"


@dataclass(frozen=True, slots=True)
class ScalarNode:
    """A word or a text. `plain`: written without quotes, so that it can mean a number, a truth value or nothing."""

    line: int
    column: int
    text: str = field(repr=False)
    plain: bool


@dataclass(frozen=True, slots=True)
class SequenceNode:
    line: int
    column: int
    items: tuple[Node, ...] = field(repr=False)


@dataclass(frozen=True, slots=True)
class MappingNode:
    """`entries` by key, in the order of the text, each with the key's own node."""

    line: int
    column: int
    entries: Mapping[str, tuple[ScalarNode, Node]] = field(repr=False)


Node = ScalarNode | SequenceNode | MappingNode


@dataclass(slots=True)
class _Open:
    """A sequence or a mapping whose end has not been seen."""

    line: int
    column: int
    anchor: str | None
    children: list[Node] = field(default_factory=list)
    weight: int = 1


def parse_yaml(text: str) -> Node | None:
    """Return the root of the one document; None when there is none.

    Raises:
        YAMLProblem: for everything else.
    """
    if len(text) > MAX_TEXT:
        raise YAMLProblem(1, 1, f"the text is too large ({len(text)} characters, {MAX_TEXT} at most)")
    builder = _Builder()
    # libyaml, where PyYAML has it, is ten times as fast; both yield the same events.
    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        for event in yaml.parse(text, Loader=loader):
            builder.feed(event)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line, column = (mark.line + 1, mark.column + 1) if mark else (builder.line, 1)
        raise YAMLProblem(line, column, f"not valid YAML: {_NAMES_TEXT.sub('', error.problem or 'unreadable')}") from None
    except (yaml.YAMLError, ValueError, OverflowError):  # unprintable characters; in the parser written in Python, huge numbers, too
        raise YAMLProblem(builder.line, 1, "not valid YAML: a character that cannot stand there") from None
    return builder.root


class _Builder:
    def __init__(self) -> None:
        self.root: Node | None = None
        self.line = 1
        self._documents = 0
        self._stack: list[_Open] = []
        self._anchors: dict[str, tuple[Node, int]] = {}

    def feed(self, event: Any) -> None:
        self.line = event.start_mark.line + 1 if event.start_mark else self.line
        match event:
            case yaml.DocumentStartEvent():
                self._documents += 1
                if self._documents > 1:
                    raise YAMLProblem(*_place(event), "a second document; everything must be in the first one")
            case yaml.AliasEvent():
                if event.anchor not in self._anchors:
                    raise YAMLProblem(*_place(event), "an alias without an anchor before it (quote the text if it begins with *)")
                self._add(*self._anchors[event.anchor], None)
            case yaml.ScalarEvent():
                _check_tag(event)
                if _UNWANTED.search(event.value):
                    raise YAMLProblem(*_place(event), "control characters in a text")
                plain = not event.style and event.tag is None
                self._add(ScalarNode(*_place(event), event.value, plain), 1, event.anchor)
            case yaml.SequenceStartEvent() | yaml.MappingStartEvent():
                _check_tag(event)
                if len(self._stack) == MAX_DEPTH:
                    raise YAMLProblem(*_place(event), f"nested more than {MAX_DEPTH} levels deep")
                self._stack.append(_Open(*_place(event), event.anchor))
            case yaml.SequenceEndEvent():
                top = self._stack.pop()
                self._add(SequenceNode(top.line, top.column, tuple(top.children)), top.weight, top.anchor)
            case yaml.MappingEndEvent():
                top = self._stack.pop()
                self._add(MappingNode(top.line, top.column, _entries(top.children)), top.weight, top.anchor)

    def _add(self, node: Node, weight: int, anchor: str | None) -> None:
        if anchor is not None:
            self._anchors[anchor] = (node, weight)
        if not self._stack:
            self.root = node
            return
        top = self._stack[-1]
        top.children.append(node)
        top.weight += weight
        if top.weight > MAX_NODES:
            raise YAMLProblem(node.line, node.column, f"more than {MAX_NODES} values, aliases included")


def _entries(children: list[Node]) -> dict[str, tuple[ScalarNode, Node]]:
    own: dict[str, tuple[ScalarNode, Node]] = {}
    merged: dict[str, tuple[ScalarNode, Node]] = {}
    for key, value in zip(children[::2], children[1::2], strict=True):
        if not isinstance(key, ScalarNode):
            raise YAMLProblem(key.line, key.column, "a key must be text")
        if key.plain and key.text == "<<":
            for source in value.items if isinstance(value, SequenceNode) else (value,):
                if not isinstance(source, MappingNode):
                    raise YAMLProblem(value.line, value.column, "<< takes a mapping, or a list of mappings")
                for name, entry in source.entries.items():
                    merged.setdefault(name, entry)
            continue
        if key.text in own:
            raise YAMLProblem(key.line, key.column, f"key given twice: {key.text[:60]} (first in line {own[key.text][0].line})")
        own[key.text] = key, value
    return {**merged, **own}


def _check_tag(event: Any) -> None:
    if event.tag is not None and event.tag not in _TAGS:
        raise YAMLProblem(*_place(event), "tags are not supported (quote the text if it begins with !)")


def _place(event: Any) -> tuple[int, int]:
    return event.start_mark.line + 1, event.start_mark.column + 1
