"""Writers in processes of their own that want one replica, and are stopped, woken and killed."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest

from bench.takeover import Node, check, create, run

TTL_S = 2.0


def test_a_standby_takes_over_from_a_killed_primary_and_by_hand_over(tmp_path):
    times = run(f"file://{tmp_path}/replica", tmp_path, kills=1, handovers=1, requests=1, ttl_s=1.0, tell=False)
    assert [len(seconds) for seconds in times.values()] == [1, 1, 1]


@pytest.mark.scheduled
@pytest.mark.timeout(3600)
def test_a_pair_whose_primary_is_killed_a_hundred_times_loses_nothing_acknowledged(tmp_path):
    times = run(f"file://{tmp_path}/replica", tmp_path, kills=100, handovers=10, requests=10, ttl_s=1.0, tell=False)
    assert [len(seconds) for seconds in times.values()] == [100, 10, 10]


class Writers:
    """Three nodes, and what they have acknowledged."""

    def __init__(self, url: str, folder: Path) -> None:
        self._url = url
        self.nodes = [Node(url, folder / f"{number}.db", TTL_S) for number in range(3)]
        self.acknowledged: set[str] = set()
        self.owners = 0

    def hear(self) -> int | None:
        """Take note of what was said, and return who has acknowledged something; a node that has ended begins again."""
        heard = None
        for number, node in enumerate(self.nodes):
            while not node.lines.empty():
                said = node.next()[1]
                if said[0] == "present":
                    self.owners += 1
                    lost = self.acknowledged - set(said[1:])
                    assert not lost, f"{len(lost)} of {len(self.acknowledged)} rows are lost"
                elif said[0] == "row":
                    self.acknowledged.add(said[1])
                    heard = number
                elif said[0] == "end":
                    node.process.wait(10)
                    self.nodes[number] = Node(self._url, node.path, TTL_S)
                    break
        return heard

    def owner(self, *, other_than: int | None = None) -> int:
        """Wait until somebody has acknowledged something, and return who."""
        until = time.monotonic() + 60
        while (heard := self.hear()) in (None, other_than):
            assert time.monotonic() < until, "nobody takes over"
            time.sleep(0.02)
        assert heard is not None
        return heard

    def end(self) -> None:
        for node in self.nodes:
            node.process.kill()
            node.process.wait(10)
            while (said := node.next()[1]) != ["end"]:
                if said[0] == "row":
                    self.acknowledged.add(said[1])


@pytest.mark.fault("F4")
@pytest.mark.slow
@pytest.mark.parametrize("store", ["seaweed", "moto"])
def test_nothing_acknowledged_is_lost_when_writers_are_stopped_woken_and_killed(store, request, tmp_path):
    url = request.getfixturevalue(store).url(f"chaos-{store}")
    chance = random.Random(store)
    create(tmp_path / "0.db")
    writers = Writers(url, tmp_path)
    rounds = ["kill", "sleep through", "stop", "sleep through", "stop a standby"]
    chance.shuffle(rounds)
    try:
        for what in rounds:
            owner = writers.owner()
            standby = writers.nodes[(owner + chance.choice((1, 2))) % 3]
            process = (standby if what == "stop a standby" else writers.nodes[owner]).process
            if what == "kill":
                process.kill()
                process.wait(10)
                continue
            process.send_signal(signal.SIGSTOP)
            try:
                if what == "sleep through":  # it wakes when another one has written
                    writers.owner(other_than=owner)
                else:
                    time.sleep(chance.uniform(0.1, TTL_S / 4))
            finally:
                process.send_signal(signal.SIGCONT)
        writers.owner()
        assert writers.owners > 3  # the first, and one for each that was killed or slept
    finally:
        writers.end()
    check(url, tmp_path / "restored.db", writers.acknowledged)
