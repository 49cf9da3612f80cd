"""Tables and plots of what was measured, and the block of `docs/performance.md` that they live in."""

from __future__ import annotations

import html
import platform
import statistics
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from bench.row import Aim, Row

__all__ = ["Results", "blocks", "figure_of", "machine", "put_block", "row_table", "summary", "svg"]

Results = Mapping[str, Sequence[Mapping[str, float]]]
"""For each engine, the figures of each round."""
BEGIN, END = "<!-- begin: python -m bench -->", "<!-- end: python -m bench -->"
BAR, GAP, LEFT, WIDTH = 16, 14, 150, 660
COLOURS = {"ours": "#2a6fbb", "ours without obstore": "#7aa7d8", "0.5.17": "#c8742c", "0.3.13": "#9c8a5a"}


def machine() -> str:
    """One line about when and where."""
    model, count = platform.machine(), 0
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model, count = line.partition(":")[2].strip(), count + 1
    when = datetime.now(UTC)
    return f"{when:%Y-%m-%d}, {count} cores of {model}, Linux {platform.release()}, Python {platform.python_version()}"


def _median(results: Results, engine: str, figure: str) -> float | None:
    values = [round_[figure] for round_ in results.get(engine, ()) if figure in round_]
    return statistics.median(values) if values else None


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def row_table(results: Results) -> str:
    """Medians with (smallest-largest) for each engine."""
    figures = list(dict.fromkeys(name for rounds in results.values() for round_ in rounds for name in round_))
    lines = ["| | " + " | ".join(figures) + " |", "|---|" + "---|" * len(figures)]
    for engine, rounds in results.items():
        cells = []
        for figure in figures:
            values = [round_[figure] for round_ in rounds if figure in round_]
            if not values:
                cells.append("")
                continue
            spread = f" ({_number(min(values))}-{_number(max(values))})" if len(values) > 1 else ""
            cells.append(_number(statistics.median(values)) + spread)
        lines.append(f"| {engine} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _verdict(aim: Aim, results: Results) -> tuple[str, str, str] | None:
    ours = _median(results, "ours", aim.figure)
    other = _median(results, aim.against, aim.figure) if aim.against else 1.0
    if ours is None or other is None:
        return None
    value = ours / other if aim.against else ours
    met = value >= aim.limit if aim.at_least else value <= aim.limit
    sign, unit = ("at least" if aim.at_least else "at most"), ("x " + aim.against if aim.against else "")
    return f"{aim.figure}", f"{_number(value)}{unit}", f"{sign} {_number(aim.limit)}{unit}: {'reached' if met else '**missed**'}"


def summary(measured: Sequence[tuple[type[Row], Results]]) -> str:
    """One line for each aim."""
    lines = ["| figure | | ours | aim |", "|---|---|---|---|"]
    for row, results in measured:
        for aim in row.aims:
            verdict = _verdict(aim, results)
            if verdict is not None:
                lines.append(f"| {row.title} | " + " | ".join(verdict) + " |")
    return "\n".join(lines)


def svg(title: str, figure: str, results: Results) -> str:
    """A bar for each engine, with the spread as a thin line."""
    bars = [(engine, value) for engine in results if (value := _median(results, engine, figure)) is not None]
    height = 40 + len(bars) * (BAR + GAP)
    most = max(max(round_[figure] for round_ in results[engine]) for engine, _ in bars) or 1.0
    scale = (WIDTH - LEFT - 90) / most
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="8" y="20" fill="#222">{html.escape(title)}: {html.escape(figure)}</text>',
    ]
    for number, (engine, value) in enumerate(bars):
        top = 34 + number * (BAR + GAP)
        values = [round_[figure] for round_ in results[engine]]
        colour = COLOURS.get(engine, "#888888")
        middle = top + BAR / 2
        parts += [
            f'<text x="8" y="{top + 13}" fill="#222">{html.escape(engine)}</text>',
            f'<rect x="{LEFT}" y="{top}" width="{max(1.0, value * scale):.1f}" height="{BAR}" fill="{colour}"/>',
            f'<line x1="{LEFT + min(values) * scale:.1f}" x2="{LEFT + max(values) * scale:.1f}" y1="{middle}" y2="{middle}" stroke="#222"/>',
            f'<text x="{LEFT + max(values) * scale + 6:.1f}" y="{top + 13}" fill="#222">{_number(value)}</text>',
        ]
    return "\n".join([*parts, "</svg>"]) + "\n"


def put_block(document: Path, text: str) -> None:
    """Replace what stands between the markers; everything else in the document is left alone."""
    old = document.read_text() if document.exists() else ""
    if BEGIN not in old:
        old = f"{old.rstrip()}\n\n{BEGIN}\n{END}\n".lstrip()
    before, _, rest = old.partition(BEGIN)
    document.write_text(f"{before}{BEGIN}\n\n{text.strip()}\n\n{END}{rest.partition(END)[2]}")


def figure_of(results: Results) -> str:
    """The first figure of a row, which its plot shows."""
    return next(iter(next(iter(results.values()))[0]))


def blocks(measured: Sequence[tuple[type[Row], Results, str]]) -> Iterator[str]:
    """Yield the parts of the document's block; each row comes with its date and machine."""
    yield summary([(row, results) for row, results, _ in measured])
    for row, results, when in measured:
        about = " ".join((row.__doc__ or "").split())
        plot = f"![{row.title}](performance/{row.name}.svg)"
        yield "\n\n".join(part for part in (f"### {row.title}", about, row_table(results), plot, f"{when}.") if part)
