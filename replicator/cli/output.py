"""What commands print: tables, times, errors, a progress bar, and log lines of Litestream's shape."""

from __future__ import annotations

import ast
import json
import logging
import re
import sys
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal, TextIO

from replicator.cli.parse import UsageError

if TYPE_CHECKING:
    from replicator.chain import Progress

__all__ = ["EXIT_FAILED", "EXIT_USAGE", "Bar", "fail", "log_to", "redacted", "table", "time_text"]

EXIT_FAILED, EXIT_USAGE = 1, 2


def fail(text: str, hint: str) -> int:
    """Print an error in one line, and the next step."""
    print("Error: " + " ".join(text.split()), file=sys.stderr)
    if hint:
        print(f"Try: {hint}", file=sys.stderr)
    return EXIT_FAILED


class Bar:
    """A progress bar on a terminal, for what takes longer than a second."""

    def __init__(self, what: str = "restoring") -> None:
        self._what = what
        self._started = time.monotonic()
        self._bar: object | None = None
        self._wanted = sys.stderr.isatty()

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar off the terminal."""
        if self._bar is not None:
            self._bar.stop()  # type: ignore[attr-defined]

    def show(self, progress: Progress) -> None:
        if not self._wanted or (self._bar is None and time.monotonic() - self._started < 1):
            return
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
            from rich.progress import Progress as RichBar

            columns = TextColumn(self._what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
            bar = RichBar(*columns, console=Console(stderr=True), transient=True)
            bar.add_task(self._what, total=progress.bytes_total)
            bar.start()
            self._bar = bar
        self._bar.update(0, completed=progress.bytes_done)  # type: ignore[attr-defined]


def table(header: list[str], rows: list[list[str]]) -> None:
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    for row in [header, *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def time_text(when: datetime) -> str:
    return when.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def redacted(url: str) -> str:
    from replicator.storage.url import redact

    return redact(url)


class Lines(logging.Formatter):
    """`time=... level=INFO msg="..." key=value`, as Litestream logs. `source`: the file and line that logs, too."""

    def __init__(self, *, source: bool = False) -> None:
        super().__init__()
        self._source = source

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created, UTC)
        message, facts = _split(record)
        source = f" source={record.filename}:{record.lineno}" if self._source else ""
        text = f'time={when:%Y-%m-%dT%H:%M:%S}.{when.microsecond // 1000:03d}Z level={_level(record)}{source} msg="{message}"{facts and " "}{facts}'
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


class PrettyLines(logging.Formatter):
    """`15:04:05 INF message key=value`, for people: the time is local, and coloured on a terminal."""

    def __init__(self, *, source: bool = False, color: bool = False) -> None:
        super().__init__()
        self._source, self._color = source, color

    def format(self, record: logging.LogRecord) -> str:
        message, facts = _split(record)
        level, color = _SHORT.get(_level(record), (_level(record), "0"))
        words = [
            self._painted("2", time.strftime("%H:%M:%S", time.localtime(record.created))),
            self._painted(color, level),
            *([self._painted("2", f"{record.filename}:{record.lineno}")] if self._source else []),
            message,
            _FACT.sub(lambda found: f"{self._painted('2', found[1] + '=')}{found[2]}", facts),
        ]
        text = " ".join(word for word in words if word)
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text

    def _painted(self, code: str, text: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self._color else text


class JSONLines(logging.Formatter):
    """One JSON object on each line, with the keys of Litestream: time, level, msg, and the facts. Values of facts are texts."""

    def __init__(self, *, source: bool = False) -> None:
        super().__init__()
        self._source = source

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created, UTC)
        message, facts = _split(record)
        fields: dict[str, object] = {
            "time": when.isoformat(timespec="microseconds").replace("+00:00", "Z"),
            "level": _level(record),
            **({"source": {"function": record.funcName, "file": record.filename, "line": record.lineno}} if self._source else {}),
            "msg": message,
        }
        for key, value in _FACT.findall(facts):
            try:
                text = ast.literal_eval(value) if value[:1] in "'\"" else value
            except (ValueError, SyntaxError):
                text = value
            fields.setdefault(key, text)
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields)


_LEVELS = {"WARNING": "WARN", "CRITICAL": "ERROR"}
_SHORT = {"DEBUG": ("DBG", "2"), "INFO": ("INF", "92"), "WARN": ("WRN", "93"), "ERROR": ("ERR", "91")}
_FACT = re.compile(r"""([\w.-]+)=('(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|.*?)(?=;|(?:\s+[\w.-]+=)|\s*$)""", re.DOTALL)


def _level(record: logging.LogRecord) -> str:
    return _LEVELS.get(record.levelname, record.levelname)


def _split(record: logging.LogRecord) -> tuple[str, str]:
    """Return what was said, and the facts after it."""
    text = record.getMessage()
    found = re.search(r"(?:^|(?<= ))[\w.-]+=", text)
    at = found.start() if found else len(text)
    return text[:at].rstrip(), text[at:]


def log_to(stream: TextIO, level: str, *, kind: Literal["text", "json", "pretty"] = "text", source: bool = False) -> None:
    """Log to a stream from now on. Raises `UsageError` for a level that nobody knows."""
    levels = {"trace": 10, "debug": 10, "info": 20, "warn": 30, "warning": 30, "error": 40}
    if level.lower() not in levels:
        raise UsageError(f"invalid value for -log-level: {level!r} ({', '.join(name for name in levels if name != 'warning')})")
    handler = logging.StreamHandler(stream)
    if kind == "pretty":
        handler.setFormatter(PrettyLines(source=source, color=stream.isatty()))
    else:
        handler.setFormatter((JSONLines if kind == "json" else Lines)(source=source))
    root = logging.getLogger("replicator")
    root.handlers[:] = [handler]
    root.setLevel(levels[level.lower()])
