"""The `pyrepl` command: parse, call the library, print. The only reader of `argv` and the environment.

Exit codes: 0 done, 1 failed, 2 wrong usage. Errors are one line, with the next step on a second one. Each command has a module with a
`COMMAND` in it, which is imported when it is asked for; what that needs beyond the standard library is imported when it runs.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence

from replicator import __version__
from replicator.cli.output import EXIT_FAILED, EXIT_USAGE, fail
from replicator.cli.parse import Command, UsageError, duration_flag, parse
from replicator.errors import ReplicatorError

__all__ = ["COMMANDS", "main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    items = list(sys.argv[1:] if arguments is None else arguments)
    if not items:
        print(usage(), file=sys.stderr)
        return EXIT_USAGE
    name = items.pop(0)
    if name.lstrip("-") in ("h", "help"):
        print(usage())
        return 0
    command = COMMANDS.get(name)
    if command is None:
        print(f"Error: pyrepl {name}: unknown command\nTry: pyrepl help", file=sys.stderr)
        return EXIT_USAGE
    try:
        flags, positional = parse(items, command)
        return command.run(flags, positional)
    except UsageError as error:
        text = f"usage: {command.usage}\n\n{command.about}"
        if not str(error):
            print(text)
            return 0
        print(f"Error: {error}\n{text}", file=sys.stderr)
        return EXIT_USAGE
    except ReplicatorError as error:
        return fail(str(error), error.hint)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return EXIT_FAILED
    except OSError as error:
        return fail(f"{(error.strerror or str(error)).lower()}: {error.filename}" if error.filename else str(error), "")


def usage() -> str:
    lines = ["pyrepl replicates SQLite databases, in Litestream's format.", "", "usage: pyrepl COMMAND [flags] [arguments]", ""]
    lines += [f"  {name:<12} {command.about.splitlines()[0]}" for name, command in COMMANDS.items()]
    return "\n".join([*lines, "", "pyrepl COMMAND -h describes a command."])


def version(flags: dict[str, str], arguments: list[str]) -> int:
    print(__version__)
    if flags.get("verbose") == "true":
        import platform
        import sqlite3

        print(f"python {platform.python_version()}\nsqlite {sqlite3.sqlite_version}")
    return 0


def demo(flags: dict[str, str], arguments: list[str]) -> int:
    if arguments[:1] == ["workflow"]:
        return int(importlib.import_module("workflow.demo").run(arguments[1:], keep=flags.get("keep") == "true"))
    if len(arguments) > 1:
        raise UsageError("give one replica URL at most")
    seconds = duration_flag(flags, "duration", 5.0) or 0.0
    from replicator.demo import run

    return run(arguments[0] if arguments else None, seconds=seconds, keep=flags.get("keep") == "true")


_VERSION = Command("pyrepl version [-verbose]", "Print the version.", ("verbose",), (), version)
_DEMO = Command(
    "pyrepl demo [-duration D] [-keep] [workflow] [URL]",
    "Write, replicate, kill, delete, restore, compare; about ten seconds.\n\n"
    "demo workflow: an agent on one machine is killed, and goes on on another.",
    ("keep",),
    ("duration",),
    demo,
)
# Where each command is: a name in a module of this package, or a table of commands.
_HOMES: Mapping[str, str | Command] = {
    "replicate": "replicate.COMMAND",
    "restore": "restore.COMMAND",
    "ltx": "ltx.COMMAND",
    "history": "history.COMMAND",
    "verify": "verify.COMMAND",
    "generations": "generations.GENERATIONS",
    "snapshots": "generations.SNAPSHOTS",
    "wal": "generations.WAL",
    "convert": "convert.COMMAND",
    "certify": "certify.COMMAND",
    "lease": "lease.COMMAND",
    "standby": "standby.COMMAND",
    "databases": "databases.COMMAND",
    **dict.fromkeys(("status", "reset", "config"), "local.COMMANDS"),
    **dict.fromkeys(("list", "info", "sync", "register", "unregister", "start", "stop"), "control.COMMANDS"),
    "top": "top.COMMAND",
    "wf": "workflow.COMMAND",
    "version": _VERSION,
    "demo": _DEMO,
}


class _Commands(Mapping[str, Command]):
    """All commands by their names."""

    def __getitem__(self, name: str) -> Command:
        home = _HOMES[name]
        if isinstance(home, Command):
            return home
        module, _, attribute = home.partition(".")
        found: Command | Mapping[str, Command] = getattr(importlib.import_module(f"replicator.cli.{module}"), attribute)
        return found if isinstance(found, Command) else found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(_HOMES)

    def __len__(self) -> int:
        return len(_HOMES)


COMMANDS = _Commands()
