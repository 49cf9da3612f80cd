"""A process that dies at any system call, and a disk that loses what was not synced.

`Dying` stands in for the `os` module of the code under test. It counts the calls that change files. At the chosen one it writes only half
and raises `Death`; from then on nothing has any effect, so that clean-up code runs as little as it would after `kill -9`.

It also keeps a log of the calls, from which `after_power_cut` builds what a disk may hold: all that was synced, and of the rest any part, in
sectors of 512 bytes.
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHANGES = ("pwrite", "write", "ftruncate", "fsync", "unlink", "rename", "replace", "link", "fchmod", "open", "mkdir")
SECTOR = 512


class Death(BaseException):
    """The process was killed."""


@dataclass
class Call:
    """One call: `file` is an inode number; `data` and `at` of a write or truncation; `names` of a file's names."""

    kind: str
    file: int = 0
    data: bytes = b""
    at: int = 0
    names: tuple[str, ...] = ()


class Dying:
    """The `os` module, until the call number `death`."""

    def __init__(self, death: int | None = None) -> None:
        self.death = death
        self.calls = 0
        self.log: list[Call] = []

    @property
    def dead(self) -> bool:
        return self.death is not None and self.calls > self.death

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in CHANGES:
            return real

        def call(*arguments: Any, **keywords: Any) -> Any:
            if name == "open" and not (len(arguments) > 1 and arguments[1] & os.O_CREAT):
                return real(*arguments, **keywords)
            if self.dead:
                raise Death
            self.calls += 1
            if self.dead:
                if name in ("pwrite", "write"):
                    real(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2], *arguments[2:])
                raise Death
            result = real(*arguments, **keywords)
            self._note(name, arguments, result)
            return result

        return call

    def _note(self, name: str, arguments: tuple[Any, ...], result: Any) -> None:
        match name:
            case "open":
                self.log.append(Call("create", os.fstat(result).st_ino, names=(Path(arguments[0]).name,)))
            case "pwrite":
                self.log.append(Call("write", os.fstat(arguments[0]).st_ino, bytes(arguments[1]), arguments[2]))
            case "ftruncate":
                self.log.append(Call("truncate", os.fstat(arguments[0]).st_ino, at=arguments[1]))
            case "fsync":
                self.log.append(Call("sync", os.fstat(arguments[0]).st_ino))
            case "unlink":
                self.log.append(Call("unlink", names=(Path(arguments[0]).name,)))


def after_power_cut(log: list[Call], files: dict[str, tuple[int, bytes]], folder: int, source: random.Random) -> dict[str, bytes]:
    """Return names and contents that a disk may hold after the calls in `log`.

    Args:
        files: names, inode numbers and contents before.
        folder: the inode number of the folder.
    """
    names = {name: inode for name, (inode, _) in files.items()}
    contents = dict(files.values())
    synced = {call.file: at for at, call in enumerate(log) if call.kind == "sync"}
    unsynced_names = [at for at, call in enumerate(log) if call.kind in ("create", "unlink") and at > synced.get(folder, -1)]
    lost_from = source.choice([*unsynced_names, len(log)])
    for at, call in enumerate(log):
        if call.kind in ("create", "unlink"):
            if call.kind == "create":
                contents.setdefault(call.file, b"")
            if at < lost_from:
                if call.kind == "create":
                    names[call.names[0]] = call.file
                else:
                    names.pop(call.names[0], None)
            continue
        if call.kind == "sync":
            continue
        durable = at < synced.get(call.file, -1)
        old = contents.setdefault(call.file, b"")
        if call.kind == "truncate":
            if durable or source.random() < 0.5:
                contents[call.file] = old[: call.at].ljust(call.at, b"\0")
            continue
        new = bytearray(old.ljust(call.at + len(call.data), b"\0")) if durable or source.random() < 0.5 else bytearray(old)
        for start in range(0, len(call.data), SECTOR):
            piece = call.data[start : start + SECTOR]
            if (durable or source.random() < 0.5) and call.at + start <= len(new):
                new[call.at + start : call.at + start + len(piece)] = piece
        contents[call.file] = bytes(new)
    return {name: contents[inode] for name, inode in names.items()}
