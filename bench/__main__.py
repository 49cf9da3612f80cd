"""Measure ours and the released Litestream side by side.

    python -m bench                       all rows; half an hour
    python -m bench first-upload restore  some rows
    python -m bench --megabytes 5000 first-upload
    python -m bench --write               put tables and plots into docs/performance.md as well

The engines take turns (A B C, C B A, ...), so that what else the machine does meets all of them. Trust CPU seconds and ratios within
a run more than wall seconds across runs.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import fields
from pathlib import Path

from bench.engines import compile_ours
from bench.report import Results, blocks, figure_of, machine, put_block, row_table, summary, svg
from bench.row import Options, Row
from bench.rows import ROWS

DOCUMENT = Path("docs/performance.md")
DATA = Path("docs/performance/measured.json")


def measure(row: Row, rounds: int) -> Results:
    """Run all rounds of a row."""
    figures: dict[str, list[dict[str, float]]] = {engine.name: [] for engine in row.engines}
    for number in range(rounds):
        for engine in row.engines if number % 2 == 0 else tuple(reversed(row.engines)):
            found = row.measure(engine)
            figures[engine.name].append(found)
            print(f"  {row.name} {engine.name}: " + ", ".join(f"{name} {value:.3g}" for name, value in found.items()), file=sys.stderr)
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Rows: " + ", ".join(ROWS))
    parser.add_argument("rows", nargs="*", help="names of rows; all when none is given")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="where databases and replicas are made; a temporary folder when not given")
    parser.add_argument("--write", action="store_true", help=f"write {DOCUMENT}; rows that are not measured now keep their figures")
    for option in fields(Options):
        parser.add_argument(f"--{option.name.replace('_', '-')}", type=type(option.default), default=option.default)
    given = parser.parse_args()
    unknown = [name for name in given.rows if name not in ROWS]
    if unknown:
        parser.error(f"no such row: {', '.join(unknown)} (there are: {', '.join(ROWS)})")
    options = Options(**{option.name: getattr(given, option.name) for option in fields(Options)})
    measured: dict[str, Results] = {}
    print(machine())
    with tempfile.TemporaryDirectory(prefix="bench-", dir=given.folder) as folder:
        compile_ours(Path(folder) / "compiled")
        for name in given.rows or list(ROWS):
            kind = ROWS[name]
            row = kind(Path(folder) / name, options)
            try:
                row.prepare()
                measured[name] = measure(row, given.rounds)
            finally:
                row.close()
            print(f"\n{kind.title}\n\n{row_table(measured[name])}", flush=True)
    print(f"\n{summary([(ROWS[name], results) for name, results in measured.items()])}")
    if given.write:
        write(measured)
    return 0


def write(measured: dict[str, Results]) -> None:
    """Put the figures into the document, together with those of earlier runs."""
    DATA.parent.mkdir(exist_ok=True)
    known = json.loads(DATA.read_text()) if DATA.exists() else {}
    known |= {name: {"machine": machine(), "figures": results} for name, results in measured.items()}
    DATA.write_text(json.dumps({name: known[name] for name in ROWS if name in known}, indent=1) + "\n")
    rows = [(ROWS[name], known[name]["figures"], known[name]["machine"]) for name in ROWS if name in known]
    for row, figures, _ in rows:
        (DATA.parent / f"{row.name}.svg").write_text(svg(row.title, figure_of(figures), figures))
    put_block(DOCUMENT, "\n\n".join(blocks(rows)))


if __name__ == "__main__":
    sys.exit(main())
