"""A year of a replica in virtual time: one write a minute, and a burst of 20 writes in a second once a day.

    python -m bench.year [DAYS]

Prints a Markdown table of what was requested and what is stored, and checks that each hour of the window restores to what it was.
"""

from __future__ import annotations

import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from replicator.chain import list_files
from replicator.levels import History
from tests.simulated import CountingClient, Simulation

HOUR_S, DAY_S = 3600.0, 86400.0


def check_window(simulation: Simulation, output: Path, hours: int) -> None:
    """Restore each hour of the window."""
    for hour in range(hours):
        when = simulation.states[-1][0] - hour * HOUR_S
        content, _ = simulation.restored(output, timestamp=datetime.fromtimestamp(when, UTC))
        if content != simulation.state_before(when):
            raise SystemExit(f"{hour} hours before {when}: {content}, expected {simulation.state_before(when)}")


def run(days: int, *, minute_s: float = 60.0, history: History | None = None, show: bool = True) -> Simulation:
    """Let the days pass; every thirtieth day the window is checked hour by hour."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="bench-year-") as name:
        folder = Path(name)
        client = CountingClient()
        simulation = Simulation(folder, history, client=client)
        if show:
            print(
                "| day | PUT | GET | LIST | DELETE | objects | bytes | level 0 | 1 | 2 | 3 | 9 |\n|---|---|---|---|---|---|---|---|---|---|---|---|"
            )
        most = 0
        for day in range(1, days + 1):
            for minute in range(int(DAY_S / minute_s)):
                simulation.write()
                if minute == 600:
                    for _ in range(20):
                        simulation.write()
                        simulation.advance(0.05)
                    simulation.advance(minute_s - 1)
                else:
                    simulation.advance(minute_s)
            counts = dict(client.requests)
            files = list_files(client)
            most = max(most, sum(map(len, files.values())))
            if day % 30 == 0 or day == days:
                check_window(simulation, folder / "r.db", 24)
            client.requests.clear()
            client.requests.update(counts)  # looking does not count
            if show and (day in (1, 2, 3, 7) or day % 30 == 0 or day == days):
                levels = " | ".join(str(len(files[level])) for level in (0, 1, 2, 3, 9))
                stored = sum(info.size for infos in files.values() for info in infos)
                requests = " | ".join(f"{client.requests[kind]:,}" for kind in ("PUT", "GET", "LIST", "DELETE"))
                print(f"| {day} | {requests} | {sum(map(len, files.values())):,} | {stored:,} | {levels} |", flush=True)
        if simulation.keeper.problems:
            raise SystemExit(f"problems: {simulation.keeper.problems}")
        if show:
            print(f"\nMost objects at the end of a day: {most:,}. Computed in {time.monotonic() - started:.0f} s.")
    return simulation


if __name__ == "__main__":
    run(int(sys.argv[1]) if len(sys.argv) > 1 else 365)
