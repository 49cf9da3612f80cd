"""`dir:` of a configuration: which files it means, and the settings of each of them. No file is opened here.

A database's replica is that of the entry with the path of the database, relative to the directory, at its end: `<root>/sub/b.db/ltx/0/...`. All rules
are the peer's, the escaping of a URL's path included.

Source: specification 0.5, section 4.2; tried with 0.5.17.
"""

from __future__ import annotations

import posixpath
import re
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from urllib.parse import quote, unquote

from replicator.errors import ConfigError
from replicator.settings import DatabaseSettings, ReplicaSettings
from replicator.storage.locations import NATSSettings

__all__ = ["SIDE_FILES", "DirectorySettings", "is_metadata", "is_pattern", "matches"]

SIDE_FILES = ("-wal", "-shm", "-journal", ".tmp")
"""Ends of names that are never databases of their own."""

_SAFE_IN_PATH = "$&+,/:;=@"


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectorySettings:
    """One directory.

    Attributes:
        path: of the directory.
        pattern: for the names of the files.
        recursive: look into folders in it, too.
        watch: databases may come and go while it is being replicated.
        meta_dir: folder for the local state of all of them, laid out by `<relative path>-litestream`.
        template: the settings that all of them share; its `path` is the directory's, its `meta_path` that of the entry, and so are its replicas.
        by_url: of each replica, whether it was given by a URL.
    """

    path: Path
    pattern: str
    recursive: bool
    watch: bool
    meta_dir: Path | None
    template: DatabaseSettings
    by_url: tuple[bool, ...]

    def may_hold(self, path: Path) -> bool:
        """Say whether a file there would be meant, by its name."""
        try:
            relative = path.relative_to(self.path)
        except ValueError:
            return False
        folders = relative.parents[:-1]
        entered = not folders or (self.recursive and all(self.enters(self.path / folder) for folder in folders))
        return bool(relative.parts) and entered and self.means(path.name)

    def enters(self, folder: Path) -> bool:
        """Say whether a folder in it may hold databases: not the local state of an engine, nor a replica."""
        own = (self.meta_dir, self.template.meta_path, *(replica.directory for replica in self.template.replicas))
        return not is_metadata(folder.name) and folder not in own

    def means(self, name: str) -> bool:
        """Say whether the name of a file is one of a database."""
        return not name.endswith(SIDE_FILES) and matches(self.pattern, name)

    def database(self, path: Path) -> DatabaseSettings:
        """Return the settings of the database at a path in it."""
        relative = path.relative_to(self.path)
        replicas = tuple(
            _below(replica, relative.as_posix(), by_url=by_url) for replica, by_url in zip(self.template.replicas, self.by_url, strict=True)
        )
        return replace(self.template, path=path, replicas=replicas, meta_path=self._meta_path(relative))

    def _meta_path(self, relative: Path) -> Path | None:
        if self.meta_dir is not None:
            return self.meta_dir / relative.with_name(f"{relative.name}-litestream")
        if self.template.meta_path is not None:
            return self.template.meta_path / relative.with_name(f".{relative.name}-litestream")
        return None


def _below(replica: ReplicaSettings, relative: str, *, by_url: bool) -> ReplicaSettings:
    """Return the replica of a database: that of the directory, with its relative path."""
    if replica.s3 is not None:
        base = "" if replica.s3.path == "." else replica.s3.path
        s3 = replace(replica.s3, path=posixpath.normpath(posixpath.join(base, relative)))
        return replace(replica, s3=s3, url=s3.url)
    if replica.store is not None:
        if isinstance(replica.store, NATSSettings):
            raise ConfigError(f"one bucket holds one replica, not those of a directory: {replica.url}")
        store = replace(replica.store, path=posixpath.normpath(posixpath.join(replica.store.path, relative)))
        return replace(replica, store=store, url=store.url)
    assert replica.directory is not None
    directory = replica.directory / relative
    if by_url:
        # The peer joins the decoded path and encodes the whole; the path of a file URL is then taken as it is written, escapes included.
        text = posixpath.join(unquote(str(replica.directory), errors="surrogateescape"), relative)
        directory = Path(quote(text, safe=_SAFE_IN_PATH, errors="surrogateescape"))
    return replace(replica, directory=directory, url=f"file://{directory}")


def is_metadata(name: str) -> bool:
    """Say whether a folder holds an engine's local state, ours or Litestream's."""
    return name.startswith(".") and name.endswith("-litestream")


def is_pattern(pattern: str) -> bool:
    """Say whether a pattern is well-formed."""
    return _compiled(pattern) is not None


def matches(pattern: str, name: str) -> bool:
    """Compare the name of a file with a pattern: `*`, `?`, `[a-z]`, `[^a-z]`, and a backslash that takes the next character literally.

    Source: Go, path/filepath, Match.
    """
    compiled = _compiled(pattern)
    return compiled is not None and compiled.fullmatch(name) is not None


@cache
def _compiled(pattern: str) -> re.Pattern[str] | None:
    found, at = "", 0
    while at < len(pattern):
        character = pattern[at]
        at += 1
        if character == "*":
            found += "[^/]*"
        elif character == "?":
            found += "[^/]"
        elif character == "[":
            group = _group(pattern, at)
            if group is None:
                return None
            text, at = group
            found += text
        elif character == "\\":
            if at == len(pattern):
                return None
            found += re.escape(pattern[at])
            at += 1
        else:
            found += re.escape(character)
    return re.compile(found, re.DOTALL)


def _group(pattern: str, at: int) -> tuple[str, int] | None:
    """Read a class of characters behind its bracket; returns a regular expression and where it ends. None for a malformed one."""
    negated = pattern[at : at + 1] == "^"
    at += negated
    ranges = ""
    while ranges == "" or pattern[at : at + 1] != "]":
        low = _literal(pattern, at)
        if low is None:
            return None
        first, at = low
        last = first
        if pattern[at : at + 1] == "-":
            high = _literal(pattern, at + 1)
            if high is None:
                return None
            last, at = high
        if first <= last:  # another order is no error, and matches nothing
            ranges += f"{re.escape(first)}-{re.escape(last)}"
        elif not ranges:
            ranges = r"\U0010ffff-\U0010ffff"
    return f"[{'^' if negated else ''}{ranges}]", at + 1


def _literal(pattern: str, at: int) -> tuple[str, int] | None:
    character = pattern[at : at + 1]
    if character in ("", "-", "]"):
        return None
    if character == "\\":
        character, at = pattern[at + 1 : at + 2], at + 1
        if not character:
            return None
    return (character, at + 1) if at + 1 < len(pattern) else None
