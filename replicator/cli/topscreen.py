"""How `pyrepl top` looks: what is known at a moment, how somebody wants to see it, and the two as a screen, as lines, or as JSON."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

from replicator.cli.output import table
from replicator.cli.toprows import ORDERS, Row, Sample, Totals, amount, chosen, first_of, rows_of, short_path, span, totals_of
from replicator.errors import ReplicatorError

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["KEYS", "Frame", "View", "print_json", "print_lines", "rendered"]

SHOWN_PROBLEMS = 3
KEYS = "q quit  s order  r turn  e problems only  / search  p pause"


@dataclass(frozen=True, slots=True)
class Frame:
    """What is known at a moment: the two newest answers, or why there is none; `since` is when the daemon was last heard of."""

    at: datetime
    after: Sample | None = None
    before: Sample | None = None
    error: ReplicatorError | None = None
    since: datetime | None = None


@dataclass(frozen=True, slots=True)
class View:
    """How somebody wants to see it. `typing`: the text of a search that is being entered."""

    order: str = "worst"
    words: str = ""
    turned: bool = False
    only_problems: bool = False
    paused: bool = False
    typing: str | None = None

    def select(self, frame: Frame, count: int | None) -> tuple[list[Row], int, Totals | None]:
        """Return the rows to show, how many there are, and the totals."""
        if frame.after is None:
            return [], 0, None
        rows = rows_of(frame.before, frame.after)
        found = chosen(rows, self.words if self.typing is None else self.typing, only_problems=self.only_problems)
        if self.turned:
            shown = first_of(found, self.order, None)[::-1][:count]
        else:
            shown = first_of(found, self.order, count)
        return shown, len(found), totals_of(rows, frame.before, frame.after)

    def after_key(self, key: str) -> View | None:
        """Return the view after a key; None when it ends."""
        if self.typing is not None:
            if key in "\r\n":
                return replace(self, words=self.typing, typing=None)
            if key == "\x1b":
                return replace(self, typing=None)
            if key in "\x7f\b":
                return replace(self, typing=self.typing[:-1])
            return replace(self, typing=self.typing + key) if key.isprintable() and len(self.typing) < 200 else self
        names = list(ORDERS)
        if key in "qQ\x03":
            return None
        if key in "sS":
            return replace(self, order=names[(names.index(self.order) + (1 if key == "s" else -1)) % len(names)])
        changes: dict[str, dict[str, Any]] = {
            "r": {"turned": not self.turned},
            "e": {"only_problems": not self.only_problems},
            "p": {"paused": not self.paused},
            "/": {"typing": ""},
            "\x1b": {"words": "", "only_problems": False},
        }
        return replace(self, **changes.get(key, {}))


HEADER = ["database", "state", "lag", "loss p99", "txid", "bytes/s", "req/s", "sync/s", "wal", "pending", "errors"]


WIDTHS = [0, 11, 6, 8, 6, 7, 6, 6, 5, 9, 6]
"""Least widths, so that columns do not jump about."""
LESS = ["loss p99", "sync/s", "txid", "req/s", "wal", "errors", "pending", "bytes/s", "lag", "state"]
"""What a narrow terminal does without, in this order."""
PATH_WIDTH = 24
GAP = 2


def cells(row: Row) -> list[str]:
    """Return the texts of a row, in the order of `HEADER`."""
    pending = f"{amount(row.pending)}/{amount(row.pending_bytes)}" if row.pending else "-"
    rates = [amount(value) for value in (row.bytes_rate, row.requests_rate, row.syncs_rate)]
    rest = [amount(row.wal_bytes), pending, amount(row.errors)]
    return [row.path, row.state, span(row.lag_s), span(row.loss_p99_s), str(row.txid), *rates, *rest]


def headings(frame: Frame, totals: Totals | None) -> list[str]:
    """Return the lines above the table."""
    sample = frame.after
    if sample is None or totals is None:
        return ["waiting for the daemon", ""]
    states = ", ".join(f"{count} {state}" for state, count in totals.states.items()) or "none"
    kinds = ", ".join(f"{kind} {amount(rate)}" for kind, rate in sorted(totals.kinds.items()))
    memory = f"  memory {amount(sample.resident_bytes)}" if sample.resident_bytes else ""
    up = span(sample.uptime_s)
    return [
        f"{sample.name} {sample.version}  pid {sample.identity}  up {up}{memory}  databases {totals.databases}: {states}",
        f"lag {span(totals.lag_s)}  loss p99 {span(totals.loss_p99_s)}  bytes/s {amount(totals.bytes_rate)}  "
        f"req/s {amount(totals.requests_rate)}{kinds and f' ({kinds})'}  sync/s {amount(totals.syncs_rate)}  "
        f"wal {amount(totals.wal_bytes)}  pending {amount(totals.pending)}/{amount(totals.pending_bytes)}  errors {amount(totals.errors)}",
    ]


def away(frame: Frame) -> str:
    """Return what is said about a daemon that does not answer; empty when it does."""
    if frame.error is None:
        return ""
    known = f", last heard of at {frame.since.astimezone():%H:%M:%S}" if frame.since is not None else ""
    return f"the daemon does not answer{known}; trying again: {frame.error}"


def rendered(frame: Frame, view: View, width: int, height: int) -> RenderableType:
    """Draw one screen."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    colors = {"failed": "bold red", "degraded": "yellow", "waiting": "cyan", "stopped": "dim"}
    said = away(frame)
    room = max(
        1, height - 2 - bool(said) - 1 - SHOWN_PROBLEMS - 1
    )  # headings, a daemon that is away, the table's own heading, problems, footer
    shown, count, totals = view.select(frame, room)
    head = [Text(short_line(line, width), no_wrap=True) for line in headings(frame, totals)]
    if said:
        head.append(Text(short_line(said, width), style="bold red", no_wrap=True))
    grid = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0), header_style="reverse", expand=True, width=width)
    texts = [cells(row) for row in shown]
    columns, least = _columns(texts, width)
    grid.add_column(HEADER[0], width=least, no_wrap=True)
    for at, column_width in columns.items():
        grid.add_column(HEADER[at], width=column_width, no_wrap=True, justify="left" if HEADER[at] == "state" else "right")
    for row, line in zip(shown, texts, strict=True):
        style = "dim" if frame.error is not None else ""
        color = {"state": style or colors.get(row.state, "")}
        grid.add_row(Text(short_path(line[0], least)), *(Text(line[at], style=color.get(HEADER[at], "")) for at in columns), style=style)
    problems = [row for row in shown if row.error][:SHOWN_PROBLEMS]
    notes = [Text(short_line(f"{row.path}: {row.error}", width), style="red", no_wrap=True) for row in problems]
    pad = [Text("") for _ in range(room - len(shown) + SHOWN_PROBLEMS - len(notes))]
    return Group(*head, grid, *pad, *notes, Text(short_line(_footer(frame, view, len(shown), count), width), style="dim", no_wrap=True))


def _columns(texts: list[list[str]], width: int) -> tuple[dict[int, int], int]:
    """Return the widths of the columns after the path that there is room for, and the path's own."""
    columns = {at: max(WIDTHS[at], *(len(line[at]) for line in [HEADER, *texts])) for at in range(1, len(HEADER))}
    for name in LESS:
        left = width - sum(columns.values()) - GAP * (len(columns) + 1)
        if left >= PATH_WIDTH:
            break
        del columns[HEADER.index(name)]
    return columns, max(1, width - sum(columns.values()) - GAP * (len(columns) + 1))


def _footer(frame: Frame, view: View, shown: int, count: int) -> str:
    if view.typing is not None:
        return f"search: {view.typing}_  ({count} found; Enter keeps it, Esc leaves it)"
    chosen = f" with {view.words!r}" if view.words else ""
    problems = ", problems only" if view.only_problems else ""
    what = f"{shown} of {count}{chosen}{problems}, by {view.order}{' turned' if view.turned else ''}{', paused' if view.paused else ''}"
    return f"{frame.at.astimezone():%H:%M:%S}  {what}   {KEYS}"


def short_line(text: str, width: int) -> str:
    """Cut a line behind."""
    line = short_path(text, len(text))
    return line if len(line) <= width else line[: max(width - 1, 0)] + "…"


# -- scripts ---------------------------------------------------------------------------------------------------------------------


def print_json(frame: Frame, view: View, count: int | None) -> None:
    """Print one object in one line."""
    shown, _, totals = view.select(frame, count)
    sample, fields = frame.after, {"time": frame.at.isoformat(timespec="milliseconds").replace("+00:00", "Z")}
    if frame.error is not None or sample is None or totals is None:
        print(json.dumps({**fields, "error": str(frame.error)}), flush=True)
        return
    daemon = {"name": sample.name, "version": sample.version, "pid": int(sample.identity), "uptime_seconds": int(sample.uptime_s)}
    rows = [row.as_json() for row in shown]
    print(json.dumps({**fields, "daemon": daemon, "totals": totals.as_json(), "databases": rows}), flush=True)


def print_lines(frame: Frame, view: View, count: int | None) -> None:
    """Print a table, and the errors below it."""
    if frame.error is not None:
        print(away(frame), flush=True)
        return
    shown, found, totals = view.select(frame, count)
    for line in headings(frame, totals):
        print(line)
    table(HEADER, [[short_path(text, len(text)) for text in cells(row)] for row in shown])
    if found > len(shown):
        print(f"... and {found - len(shown)} more")
    for row in shown:
        if row.error:
            print(short_path(f"{row.path}: {row.error}", len(row.path) + len(row.error) + 2))
    sys.stdout.flush()
