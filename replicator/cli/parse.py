"""Flags as Litestream has them: one dash or two, `-name value` or `-name=value`, switches also as `-name=false`, anywhere on the line."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from replicator.durations import parse_duration

__all__ = ["Command", "UsageError", "duration_flag", "parse"]


class UsageError(Exception):
    """The command line is wrong."""


@dataclass(frozen=True, slots=True)
class Command:
    """One subcommand. `switches` take no value, `options` take one."""

    usage: str
    about: str
    switches: tuple[str, ...]
    options: tuple[str, ...]
    run: Callable[[dict[str, str], list[str]], int]


def parse(arguments: Sequence[str], command: Command) -> tuple[dict[str, str], list[str]]:
    """Split arguments into flags and positional ones. A switch that is on has the value "true". Raises `UsageError`."""
    flags: dict[str, str] = {}
    positional: list[str] = []
    items = list(arguments)
    while items:
        item = items.pop(0)
        if item == "--":
            positional += items
            break
        match = re.fullmatch(r"--?([A-Za-z][\w-]*)(?:=(.*))?", item, re.DOTALL)
        if not match:
            positional.append(item)
            continue
        name, value = match[1], match[2]
        if name in ("h", "help"):
            raise UsageError("")
        if name in command.switches:
            if value not in (None, "true", "false"):
                raise UsageError(f"invalid value for -{name}: {value!r} (true or false)")
            flags[name] = value or "true"
        elif name in command.options:
            if value is None:
                if not items:
                    raise UsageError(f"flag needs an argument: -{name}")
                value = items.pop(0)
            flags[name] = value
        else:
            raise UsageError(f"flag provided but not defined: -{name}")
    return flags, positional


def duration_flag(flags: dict[str, str], name: str, default: float | None = None) -> float | None:
    """Return the value of a flag in seconds, or the default. Raises `UsageError`."""
    if name not in flags:
        return default
    try:
        return parse_duration(flags[name])
    except ValueError as error:
        raise UsageError(f"invalid value for -{name}: {error}") from None
