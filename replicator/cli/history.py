"""`pyrepl history`: the moments that a replica can restore, as a picture over time, a table of ages, or JSON."""

from __future__ import annotations

import json
import re
import shutil
import sys
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from replicator.cli.output import fail
from replicator.cli.parse import Command, UsageError
from replicator.errors import NoBackups

if TYPE_CHECKING:
    from replicator.format.ltx import FileInfo
    from replicator.history import Age, Gap, LevelTotal, Moment, Timeline

__all__ = ["COMMAND"]

MIN_WIDTH, MAX_WIDTH = 40, 400
LABEL_WIDTH = 9
GAPS_SHOWN = 5

Files = dict[int, list["FileInfo"]]
Line = tuple[str, str]
"""A text without line end, and its style on a terminal (rich's words)."""


@dataclass(frozen=True, slots=True)
class Glyphs:
    """What the picture is made of: a file, a file that no plan reaches, a snapshot, a hole, and how many moments a column has."""

    file: str
    stranded: str
    snapshot: str
    hole: str
    density: str


UNICODE = Glyphs("█", "░", "S", "!", "▁▂▃▄▅▆▇█")
ASCII = Glyphs("#", "-", "S", "!", ".:+*#")


def history(flags: dict[str, str], arguments: list[str]) -> int:
    if len(arguments) != 1:
        raise UsageError("give one replica URL")
    width = _width(flags)
    from replicator.chain import list_files
    from replicator.history import describe
    from replicator.storage import open_client

    client = open_client(arguments[0])
    files = list_files(client)
    if not any(files.values()):
        raise NoBackups(client.url)
    now = datetime.now(UTC)
    timeline = describe(files, now=now)
    if flags.get("json") == "true":
        print(json.dumps(document(client.url, client.kind, timeline), indent=2))
    else:
        encoding = (sys.stdout.encoding or "ascii").lower().replace("-", "")
        glyphs = UNICODE if encoding.startswith("utf") else ASCII
        _print([(client.url, "bold"), *summary(timeline, now), *picture(files, timeline, now, width, glyphs), *tables(timeline)])
    if timeline.broken is not None:
        return fail(f"the newest state cannot be restored: {timeline.broken}", timeline.broken.hint if timeline.moments else "")
    return 0


def _width(flags: dict[str, str]) -> int:
    if "width" not in flags:
        return min(MAX_WIDTH, max(MIN_WIDTH, shutil.get_terminal_size((80, 24)).columns))
    text = flags["width"]
    if not re.fullmatch(r"[1-9][0-9]{1,2}", text) or not MIN_WIDTH <= int(text) <= MAX_WIDTH:
        raise UsageError(f"invalid value for -width: {text!r} ({MIN_WIDTH} to {MAX_WIDTH})")
    return int(text)


def document(url: str, kind: str, timeline: Timeline) -> dict[str, object]:
    """Return what `-json` prints; docs/history.md describes it."""
    from replicator.history import ages

    moments = timeline.moments
    return {
        "source": url,
        "replica": kind,
        "restorable": timeline.broken is None,
        "reason": "" if timeline.broken is None else str(timeline.broken),
        "oldest": _moment(moments[0]) if moments else None,
        "newest": _moment(moments[-1]) if moments else None,
        "cheapest": _moment(_cheapest(moments)) if moments else None,
        "dearest": _moment(_dearest(moments)) if moments else None,
        "files": sum(total.files for total in timeline.levels),
        "bytes": sum(total.bytes for total in timeline.levels),
        "levels": [_level(total) for total in timeline.levels],
        "gaps": [_gap(gap) for gap in timeline.gaps],
        "problems": [
            {
                "kind": problem.kind,
                "level": problem.level,
                "count": problem.count,
                "first": problem.first.name,
                "timestamp": stamp(problem.first.created_at),
                "text": problem.text,
            }
            for problem in timeline.problems
        ],
        "ages": [_age(age) for age in ages(moments)],
        "moments": [_moment(moment) for moment in moments],
    }


def _moment(moment: Moment) -> dict[str, object]:
    return {
        "txid": f"{moment.txid:016x}",
        "timestamp": stamp(moment.time),
        "level": moment.level,
        "files": moment.files,
        "bytes": moment.bytes,
    }


def _level(total: LevelTotal) -> dict[str, object]:
    return {
        "level": total.level,
        "files": total.files,
        "bytes": total.bytes,
        "min_txid": f"{total.min_txid:016x}",
        "max_txid": f"{total.max_txid:016x}",
        "oldest": stamp(total.oldest),
        "newest": stamp(total.newest),
        "stranded": total.stranded,
    }


def _gap(gap: Gap) -> dict[str, object]:
    return {
        "after": f"{gap.after:016x}",
        "before": f"{gap.before:016x}",
        "resumes": None if gap.resumes is None else f"{gap.resumes:016x}",
        "files": gap.files,
    }


def _age(age: Age) -> dict[str, object]:
    return {
        "from_s": age.from_s,
        "to_s": age.to_s,
        "moments": age.moments,
        "every_ms": None if age.every_s is None else round(age.every_s * 1000),
        "skipped": age.skipped,
        "min_files": age.min_files,
        "max_files": age.max_files,
        "min_bytes": age.min_bytes,
        "max_bytes": age.max_bytes,
    }


def summary(timeline: Timeline, now: datetime) -> list[Line]:
    """Return the oldest and the newest moment, and the cheapest and the dearest restore."""
    moments = timeline.moments
    if not moments:
        return [("nothing can be restored", "bold red")]
    lines = []
    for name, moment in (
        ("newest", moments[-1]),
        ("oldest", moments[0]),
        ("cheapest", _cheapest(moments)),
        ("dearest", _dearest(moments)),
    ):
        age_s = (now - moment.time).total_seconds()
        ago = f"{span_text(age_s)} ago" if age_s >= 0 else f"{span_text(-age_s)} in the future"
        cost = f"{plural(moment.files, 'file')}, {bytes_text(moment.bytes)}"
        lines.append((f"{name:<{LABEL_WIDTH}}{moment.txid:016x}  {stamp(moment.time)}  {cost}, {ago}", ""))
    return lines


def picture(files: Files, timeline: Timeline, now: datetime, width: int, glyphs: Glyphs) -> list[Line]:
    """Return one bar for each level over a common time axis, and one that shows how many moments each column has.

    A file's bar runs from the state it is applied to, to its own state: where no bar is, nothing is stored of that level. Times in the
    future stand in the last column.
    """
    times = [info.created_at for infos in files.values() for info in infos]
    past = [when for when in times if when <= now] or times
    axis = _Axis(min(past), max(past), width - LABEL_WIDTH)
    moments = timeline.moments
    txids = [moment.txid for moment in moments]
    reachable = set(txids)
    lines = [("", "")]
    for total in reversed(timeline.levels):
        level, bar = total.level, [" "] * axis.columns
        before: FileInfo | None = None
        for info in files[level]:
            end = axis.column(info.created_at)
            if level == 9:
                bar[end] = glyphs.snapshot
                continue
            if before is not None and info.min_txid <= before.max_txid + 1:
                start = min(end, axis.column(before.created_at))
            else:
                at = bisect_right(txids, info.min_txid - 1)
                start = min(end, axis.column(moments[at - 1].time)) if at else end
            drawn = glyphs.file if info.max_txid in reachable else glyphs.stranded
            for column in range(start + (start < end), end + 1):
                if bar[column] != glyphs.file:
                    bar[column] = drawn
            if before is not None and info.min_txid > before.max_txid + 1:
                axis.mark(bar, before.created_at, info.created_at, glyphs.hole)
            before = info
        lines.append((f"{f'level {level}':<{LABEL_WIDTH}}{''.join(bar)}".rstrip(), "cyan" if level == 9 else "green"))
    counts = [0] * axis.columns
    for moment in moments:
        counts[axis.column(moment.time)] += 1
    most = max(counts)
    row = [" " if not count else glyphs.density[_rank(count, most, len(glyphs.density))] for count in counts]
    by_txid = {moment.txid: moment.time for moment in moments}
    for gap in timeline.gaps:
        left = by_txid.get(gap.after, axis.start)
        axis.mark(row, left, axis.end if gap.resumes is None else by_txid[gap.resumes], glyphs.hole)
    lines.append((f"{'moments':<{LABEL_WIDTH}}{''.join(row)}".rstrip(), "yellow" if timeline.gaps else "bold"))
    left_text, right_text = f"{axis.start:%Y-%m-%dT%H:%M:%SZ}", f"{axis.end:%Y-%m-%dT%H:%M:%SZ}"
    if len(left_text) + len(right_text) >= axis.columns:
        right_text = f"{axis.end:%H:%M:%SZ}"
    lines.append((f"{'':<{LABEL_WIDTH}}{left_text}{right_text:>{axis.columns - len(left_text)}}", "dim"))
    legend = [f"{glyphs.snapshot} snapshot", f"{glyphs.file} file"]
    legend += [f"{glyphs.stranded} file that leads nowhere"] if any(total.stranded for total in timeline.levels) else []
    legend += [f"{glyphs.hole} gap"] if any(glyphs.hole in text for text, _ in lines[1:-1]) else []
    lines.append((f"{'':<{LABEL_WIDTH}}{', '.join(legend)}", "dim"))
    return lines


class _Axis:
    """Time to column."""

    def __init__(self, start: datetime, end: datetime, columns: int) -> None:
        self.start, self.end, self.columns = start, end, columns
        self._span_s = (end - start).total_seconds() or 1.0

    def column(self, when: datetime) -> int:
        return min(self.columns - 1, max(0, int((when - self.start).total_seconds() / self._span_s * self.columns)))

    def mark(self, bar: list[str], after: datetime, before: datetime, glyph: str) -> None:
        """Fill the columns between two times; when they are neighbours, the later one, so that nothing is hidden by the scale."""
        left, right = self.column(after), self.column(before)
        for column in range(left + 1, right) if left + 1 < right else [right]:
            bar[column] = glyph


def _rank(count: int, most: int, ranks: int) -> int:
    """Return the height for a count, on a logarithmic scale from 1 to the largest one."""
    if most == 1:
        return ranks - 1
    return round((count.bit_length() - 1) / max(1, most.bit_length() - 1) * (ranks - 1))


def tables(timeline: Timeline) -> list[Line]:
    """Return the ages, the levels, and what is wrong."""
    from replicator.history import ages

    lines = _table(
        ["age", "moments", "every", "skipped", "files", "bytes"],
        [
            [
                f"up to {span_text(age.to_s)}" if age.to_s is not None else f"over {span_text(age.from_s)}",
                str(age.moments),
                "-" if age.every_s is None else span_text(age.every_s),
                str(age.skipped),
                _range(str(age.min_files), str(age.max_files)),
                _range(bytes_text(age.min_bytes), bytes_text(age.max_bytes)),
            ]
            for age in ages(timeline.moments)
        ],
    )
    lines += _table(
        ["level", "objects", "bytes", "min_txid", "max_txid", "oldest", "newest"],
        [
            [
                str(total.level),
                str(total.files),
                bytes_text(total.bytes),
                f"{total.min_txid:016x}",
                f"{total.max_txid:016x}",
                stamp(total.oldest, "seconds"),
                stamp(total.newest, "seconds"),
            ]
            for total in timeline.levels
        ]
        + [
            [
                "all",
                str(sum(total.files for total in timeline.levels)),
                bytes_text(sum(total.bytes for total in timeline.levels)),
                *[""] * 4,
            ]
        ],
    )
    lines += [("", "")] if timeline.gaps or timeline.problems else []
    lines += [_gap_line(gap) for gap in timeline.gaps[-GAPS_SHOWN:]]
    if len(timeline.gaps) > GAPS_SHOWN:
        lines.append((f"gap: {len(timeline.gaps) - GAPS_SHOWN} older ones (-json lists all)", "yellow"))
    lines += [(f"{problem.kind}: {problem.text}", "yellow") for problem in timeline.problems]
    return lines


def _gap_line(gap: Gap) -> Line:
    what = f"gap: after {gap.after:016x} the next file starts at {gap.before:016x}; {plural(gap.files, 'file')} of no use"
    if gap.resumes is None:
        return f"{what}, nothing bridges it", "bold red"
    return f"{what}, moments go on at {gap.resumes:016x}", "yellow"


def _table(header: list[str], rows: list[list[str]]) -> list[Line]:
    if not rows:
        return []
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    texts = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in [header, *rows]]
    return [("", ""), (texts[0], "bold"), *((text, "") for text in texts[1:])]


def _print(lines: Sequence[Line]) -> None:
    if not sys.stdout.isatty():
        print("\n".join(text for text, _ in lines))
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    for text, style in lines:
        console.print(Text(text, style=style), no_wrap=True, overflow="ignore", crop=False)


def _cheapest(moments: Sequence[Moment]) -> Moment:
    """Return the moment that reads the fewest bytes; the newest of those."""
    return min(reversed(moments), key=lambda moment: (moment.bytes, moment.files))


def _dearest(moments: Sequence[Moment]) -> Moment:
    return max(reversed(moments), key=lambda moment: (moment.bytes, moment.files))


def _range(low: str, high: str) -> str:
    return low if low == high else f"{low} - {high}"


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def stamp(when: datetime, precision: str = "milliseconds") -> str:
    return when.astimezone(UTC).isoformat(timespec=precision).replace("+00:00", "Z")


def bytes_text(count: int) -> str:
    """Return three digits and a decimal unit, as Litestream prints sizes."""
    size, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB", "PB"):
        if size < 999.5:
            break
        size, unit = size / 1000, larger
    return f"{count} B" if unit == "B" else f"{size:.1f} {unit}" if size < 9.95 else f"{size:.0f} {unit}"


def span_text(seconds: float) -> str:
    """Return a duration in one unit, or two where that says more: `50ms`, `3.2s`, `5m`, `1h30m`, `12d`."""
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f}ms"
    if seconds < 59.95:
        return f"{seconds:.1f}".removesuffix(".0") + "s"
    for size, unit, below, part in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if seconds >= size:
            whole, rest = divmod(round(seconds / below) * below, size)
            return f"{whole}{unit}" + (f"{rest // below}{part}" if rest and whole < 10 else "")
    return "1m"


COMMAND = Command(
    f"pyrepl history [-json] [-width {MIN_WIDTH}..{MAX_WIDTH}] URL",
    "Show the moments that a replica can restore, and what each costs.",
    ("json",),
    ("width",),
    history,
)
