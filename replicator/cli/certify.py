"""`pyrepl certify`: what can a store do, and which modes of replication is it fit for?"""

from __future__ import annotations

import json
import sys
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

from replicator.cli.output import fail
from replicator.cli.parse import Command, UsageError, duration_flag

if TYPE_CHECKING:
    from replicator.certchecks import Mode
    from replicator.certify import Estimate, Report

__all__ = ["COMMAND"]

MAX_KEYS = 100_000


def certify(flags: dict[str, str], arguments: list[str]) -> int:
    if len(arguments) != 1:
        raise UsageError("give the URL of a replica")
    from replicator.certify import DEFAULT_KEYS, MODES
    from replicator.certify import certify as run

    required = [mode.strip() for mode in flags.get("require", "replication,restore").split(",") if mode.strip()]
    if unknown := [mode for mode in required if mode not in MODES]:
        raise UsageError(f"invalid value for -require: {unknown[0]!r} ({', '.join(MODES)})")
    keys = flags.get("keys", str(DEFAULT_KEYS))
    if not keys.isascii() or not keys.isdigit() or int(keys) > MAX_KEYS:
        raise UsageError(f"invalid value for -keys: {keys!r} (0 to {MAX_KEYS})")
    with _Steps() as steps:
        report = run(
            arguments[0],
            required=cast("list[Mode]", required),
            keys=int(keys),
            timeout_s=duration_flag(flags, "timeout", 300.0) or 0.0,
            on_start=_announce,
            progress=steps.show,
        )
    if flags.get("json") == "true":
        print(json.dumps(report.document(), indent=2))
    else:
        _print(report)
    if report.supports_what_is_required:
        return 0
    missing = [mode for mode in report.required if not report.modes[mode]]
    broken = [item.name for item in report.findings if item.result == "fail" and set(item.modes) & set(missing)]
    return fail(f"not fit for {', '.join(missing)}: {report.url} (failed: {', '.join(broken)})", "see the failed checks of the report")


def _announce(scratch: str, needed: Estimate) -> None:
    cost = f", about USD {needed.cost_usd:.3f} at S3's list prices" if needed.cost_usd else ""
    print(f"{scratch}: about {needed.requests} requests, {needed.timeout_s:.0f} s at most{cost}", file=sys.stderr)


class _Steps:
    """The check that runs now, on a terminal."""

    def __init__(self) -> None:
        self._bar: Any = None

    def __enter__(self) -> _Steps:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

            columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}")
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._bar.add_task("")
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, done: int, total: int, title: str) -> None:
        if self._bar is not None:
            self._bar.update(0, completed=done, total=total, description=title)


def _print(report: Report) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    document = report.document()
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    console.print(
        f"Report on {escape(report.url)}, {document['date']}, {', '.join(f'{key} {value}' for key, value in report.versions.items())}\n"
    )
    table = Table("check", "result", "what was seen", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    styles = {"pass": "green", "fail": "bold red", "not tried": "yellow"}
    for item in report.findings:
        table.add_row(item.title, f"[{styles[item.result]}]{item.result}[/]", escape(item.detail))
    console.print(table)
    for warning in report.warnings:
        console.print(f"[yellow]note[/] {escape(warning)}")
    console.print()
    for mode, supported in report.modes.items():
        asked = " (required)" if mode in report.required else ""
        console.print(f"{mode:<12} {'[green]supported[/]' if supported else '[bold red]not supported[/]'}{asked}")
    console.print()
    for kind, (p50_s, p99_s, max_s) in report.latency_s.items():
        console.print(f"{kind:<12} p50 {p50_s * 1000:.1f} ms  p99 {p99_s * 1000:.1f} ms  max {max_s * 1000:.1f} ms")
    cost = f", about USD {report.cost_usd:.4f} at S3's list prices" if report.cost_usd else ""
    console.print(f"{report.requests['total']} requests in {report.duration_s:.1f} s{cost}")
    if report.left_behind:
        console.print(f"[yellow]not removed[/] {escape(report.scratch)}: {escape(report.left_behind)}")
    console.print(f"sha256 {document['sha256']}")


COMMAND = Command(
    "pyrepl certify [-require MODE,...] [-keys N] [-timeout D] [-json] URL",
    "Try a store out, and report what it can do.\n\n"
    "It works in a folder of its own below the URL, and removes it. Exit code 0: all required modes are supported.\n"
    "-require: of replication, restore, append-only, fenced, retention; replication,restore when not given.\n"
    "-keys: how many files a long listing has (1005; 0 for none).  -timeout: checks that would begin later fail (5m).",
    ("json",),
    ("require", "keys", "timeout"),
    certify,
)
