"""The mappings of a configuration while they are read: typed values by key, inheritance, warnings, and errors with line and column.

A `Table` hands out the values of the keys that its caller asks for. What `yes`, `010` or `10` means depends on what the key takes, as in
Litestream: for a text it is just that text. Messages name keys; the value of a key that takes a text is never quoted, because it may be secret.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from replicator.durations import format_duration, parse_duration
from replicator.errors import ConfigError
from replicator.yamltree import MAX_NOTES, MappingNode, Node, Note, ScalarNode, SequenceNode

__all__ = ["Reader", "Table", "absolute_path", "is_nothing", "shown"]

_TRUE = frozenset(["y", "Y", *(form(word) for word in ("yes", "true", "on") for form in (str.lower, str.title, str.upper))])
_FALSE = frozenset(["n", "N", *(form(word) for word in ("no", "false", "off") for form in (str.lower, str.title, str.upper))])
_NOTHING = frozenset(["", "~", "null", "Null", "NULL"])
_NUMBER = re.compile(r"[+-]?[0-9.][0-9_.]*(?:[eE][+-]?[0-9]+)?")
_WHOLE = re.compile(r"0|[1-9][0-9]{0,17}")
_SIZE = re.compile(r"([0-9]{1,15})(?:\.([0-9]{1,6}))?\s*([kmgt]?)(i?)b?", re.IGNORECASE)
_HARMLESS = re.compile(r"[a-zµ0-9. +-]{0,24}|[A-Za-z][a-z]{0,9}[0-9]{0,2}")
_KEY = re.compile(r"(?=.{1,40}$)(?:[a-z]+[0-9]{0,2}|[A-Z]{1,12}|[A-Z][a-z]+)(?:[-_](?:[a-z]+[0-9]{0,2}|[A-Z]{1,12}|[A-Z][a-z]+))*")
_MAX_DURATION_S = 2**63 / 1e9


@dataclass(slots=True)
class Reader:
    """What all of a file's tables share. `inherited`: keys that a fallback gives; `homes`: where keys belong, for hints."""

    source: str
    lenient: bool
    home: Path | None
    folder: Path
    inherited: Collection[str]
    homes: Sequence[tuple[Collection[str], str]]
    notes: list[Note] = field(default_factory=list)

    def fail(self, node: Node, what: str, hint: str = "") -> NoReturn:
        raise ConfigError(f"{self.source}:{node.line}:{node.column}: {what}", hint=hint) from None

    def warn(self, node: Node, what: str) -> None:
        if len(self.notes) < MAX_NOTES:
            self.notes.append(Note(node.line, node.column, what))

    def object(self, node: Node, what: str) -> None:
        """Fail, or warn when lenient."""
        if not self.lenient:
            self.fail(node, what, "-lenient makes this a warning")
        self.warn(node, what)


class Table:
    """A mapping while it is read. `fallback` gives the values of inherited keys that are not set here; `empty`: the node is only a place."""

    def __init__(self, reader: Reader, node: Node | None, where: str, *, fallback: Table | None = None, empty: bool = False) -> None:
        if node is None or empty or is_nothing(node):
            node = MappingNode(node.line if node else 1, node.column if node else 1, {})
        if not isinstance(node, MappingNode):
            reader.fail(node, f"{where or 'the file'} must be a mapping of keys to values")
        self.reader, self.place, self.where = reader, node, where
        self._entries = node.entries
        self._fallback = fallback

    def named(self, key: str) -> str:
        return f"{self.where}.{key}" if self.where else key

    def own(self, key: str) -> Node | None:
        """Return a key's value; None when it is missing, or empty as in `key:` and `key: ""`."""
        entry = self._entries.get(key)
        return None if entry is None or is_nothing(entry[1]) else entry[1]

    def node(self, key: str) -> Node | None:
        own = self.own(key)
        return self._fallback.own(key) if own is None and self._fallback is not None and key in self.reader.inherited else own

    def has(self, key: str) -> bool:
        """Say whether the key is written here or inherited, even without a value."""
        return key in self._entries or (self._fallback is not None and key in self.reader.inherited and self._fallback.has(key))

    def fail(self, key: str, what: str, hint: str = "") -> NoReturn:
        self.reader.fail(self.node(key) or self.place, f"{self.named(key)}: {what}", hint)

    def warn(self, key: str, what: str) -> None:
        entry = self._entries.get(key)
        self.reader.warn(entry[0] if entry else self.place, f"{self.named(key)}: {what}")

    def check_keys(self, known: Collection[str]) -> None:
        """Object to keys that nobody knows."""
        for key, (node, _) in self._entries.items():
            if key not in known and not (key.startswith("x-") and not self.where):
                # Looking for what was meant takes time, and a lenient reader may meet many keys.
                hint = "" if self.reader.lenient else _hint(key, known, self.reader.homes)
                self.reader.object(node, f"unknown key, it has no effect: {self.named(_shown_key(key))}{hint}")

    def no_effect(self, keys: Collection[str], why: str) -> None:
        for key in self._entries:
            if key in keys and self.own(key) is not None:
                self.warn(key, why)

    def no_effect_of(self, reasons: Mapping[str, str]) -> None:
        """Warn of each of these keys that says something, with its reason."""
        for key, why in reasons.items():
            self.no_effect([key], why)

    # -- values ------------------------------------------------------------------------------------------------------------------

    def text(self, key: str) -> str | None:
        """Return a text as it is written: `010` and `yes` are texts, too."""
        node = self.node(key)
        if node is None:
            return None
        if not isinstance(node, ScalarNode):
            self.fail(key, "must be text")
        return node.text

    def path(self, key: str, *, strip: re.Pattern[str] | None = None) -> Path | None:
        """Return an absolute path, without what `strip` finds in the text."""
        text = self.text(key)
        if text is None:
            return None
        try:
            return absolute_path(strip.sub("", text) if strip else text, home=self.reader.home, folder=self.reader.folder)
        except ConfigError as error:
            self.fail(key, str(error))

    def boolean(self, key: str) -> bool | None:
        node = self.node(key)
        if node is None:
            return None
        if not isinstance(node, ScalarNode) or not node.plain or node.text not in _TRUE | _FALSE:
            self.fail(key, "must be true or false, without quotes")
        return node.text in _TRUE

    def number(self, key: str) -> int | None:
        node = self.node(key)
        if node is None:
            return None
        if not isinstance(node, ScalarNode) or not node.plain or not _WHOLE.fullmatch(node.text):
            self.fail(key, "must be a whole number, without quotes")
        return int(node.text)

    def size(self, key: str) -> int | None:
        """Return bytes: `5242880`, `10MB` (millions), `5MiB`."""
        text = self.text(key)
        if text is None:
            return None
        found = _SIZE.fullmatch(text)
        if found is None or (found[4] and not found[3]):
            self.fail(key, "must be a size such as 10MB or 5MiB")
        unit = (1024 if found[4] else 1000) ** " kmgt".index(found[3].lower() or " ")
        return int(float(f"{found[1]}.{found[2] or 0}") * unit)

    def duration(self, key: str, *, zero: bool = True) -> float | None:
        """Return seconds."""
        node = self.node(key)
        if node is None:
            return None
        if not isinstance(node, ScalarNode) or len(node.text) > 60:
            self.fail(key, "must be a duration such as 500ms, 1s, 5m, 24h")
        if node.plain and node.text != "0" and _NUMBER.fullmatch(node.text):
            seconds = self._bare(key, node)
        else:
            try:
                seconds = parse_duration(node.text)
            except ValueError:
                self.fail(key, f"invalid duration: {shown(node.text)} (such as 500ms, 1s, 5m, 24h)")
        if seconds > _MAX_DURATION_S:
            self.fail(key, "longer than 292 years")
        if seconds == 0 and not zero:
            self.fail(key, f"must be longer than 0 (got {node.text})")
        return seconds

    def _bare(self, key: str, node: ScalarNode) -> float:
        try:
            nanoseconds = int(float(node.text.replace("_", "")))
        except (ValueError, OverflowError):
            nanoseconds = -1
        if nanoseconds < 0 or nanoseconds >= 2**63:
            self.fail(key, f"{node.text} is not a duration")
        meant = f"write {node.text}s if seconds are meant"
        self.reader.object(
            node, f"{self.named(key)}: {node.text} without a unit is {_go_text(nanoseconds)} as Litestream reads it; {meant}"
        )
        return nanoseconds / 1e9

    def table(self, key: str, *, fallback: Table | None = None) -> Table:
        entry = self._entries.get(key)
        return Table(self.reader, entry[1] if entry else self.place, self.named(key), fallback=fallback, empty=entry is None)

    def items(self, key: str) -> Iterator[tuple[Node, str]]:
        """Yield the items of a list, each with its name."""
        node = self.node(key)
        if node is None:
            return
        if not isinstance(node, SequenceNode):
            self.fail(key, "must be a list")
        for number, item in enumerate(node.items):
            yield item, f"{self.named(key)}[{number}]"


def is_nothing(node: Node) -> bool:
    return isinstance(node, ScalarNode) and (node.text in _NOTHING if node.plain else node.text == "")


def absolute_path(text: str, *, home: Path | None, folder: Path) -> Path:
    """Return a path without `~` (alone or before a slash), `.` and `..`. Raises `ConfigError` when there is no home, or no path."""
    if not text or any(ord(character) < 32 for character in text):
        raise ConfigError("path is empty, or has control characters")
    if text == "~" or text.startswith("~/"):
        if home is None:
            raise ConfigError("~ without a home: HOME is not set")
        text = f"{home}/{text[2:]}"
    return Path(os.path.normpath(folder / text))


def shown(text: str) -> str:
    """Return a text for a message, quoted; what could be a misplaced secret is left out."""
    return repr(text) if _HARMLESS.fullmatch(text) else "(not shown)"


def _shown_key(key: str) -> str:
    """Return a key for a message. Where a colon was forgotten, the key ends in its value, which may be a secret."""
    head = key.split(maxsplit=1)[0] if key.strip() else ""
    return head + ("..." if head != key else "") if _KEY.fullmatch(head) else "(not shown)"


def _hint(key: str, known: Collection[str], homes: Sequence[tuple[Collection[str], str]]) -> str:
    plain = key[:60].lower().replace("_", "-")
    if plain not in known:
        for keys, home in homes:
            if plain in keys:
                return f" (it belongs under {home})"
    close = difflib.get_close_matches(plain, sorted(known), 1, 0.75)
    return f" (did you mean {close[0]}?)" if close else ""


def _go_text(nanoseconds: int) -> str:
    """Return a duration as Go prints it."""
    for size, unit in ((10**9, "s"), (10**6, "ms"), (1000, "µs")):
        if nanoseconds >= size:
            return f"{nanoseconds / size:g}{unit}" if unit != "s" else format_duration(nanoseconds / size)
    return f"{nanoseconds}ns"
