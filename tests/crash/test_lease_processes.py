"""Writers in processes of their own that want one replica, and are stopped, woken and killed."""

from __future__ import annotations

import random
import signal
import time

import pytest

from bench.takeover import Node, check, create, run

TTL_S = 2.0


def test_a_standby_takes_over_from_a_killed_primary_and_by_hand_over(tmp_path):
    killed, handed_over = run(f"file://{tmp_path}/replica", tmp_path, kills=1, handovers=1, ttl_s=1.0, tell=False)
    assert (len(killed), len(handed_over)) == (1, 1)


@pytest.mark.slow
@pytest.mark.parametrize("store", ["seaweed", "moto"])
def test_nothing_acknowledged_is_lost_when_writers_are_stopped_woken_and_killed(store, request, tmp_path):
    url = request.getfixturevalue(store).url(f"chaos-{store}")
    chance = random.Random(store)
    create(tmp_path / "0.db")
    nodes = [Node(url, tmp_path / f"{number}.db", TTL_S) for number in range(3)]
    acknowledged: set[str] = set()
    counts = {"owners": 0, "killed": 0, "stopped": 0}

    def hear(number: int) -> None:
        """Take note of what a node has said; a node that has ended begins again."""
        while not nodes[number].lines.empty():
            said = nodes[number].next()[1]
            if said[0] == "present":
                counts["owners"] += 1
                lost = acknowledged - set(said[1:])
                assert not lost, f"{len(lost)} of {len(acknowledged)} rows are lost"
            elif said[0] == "row":
                acknowledged.add(said[1])
            elif said[0] == "end":
                nodes[number].process.wait(10)
                nodes[number] = Node(url, nodes[number].path, TTL_S)

    try:
        until = time.monotonic() + 18
        while time.monotonic() < until:
            number = chance.randrange(len(nodes))
            node = nodes[number]
            if chance.random() < 0.4:
                node.process.send_signal(signal.SIGKILL)
                counts["killed"] += 1
            else:
                node.process.send_signal(signal.SIGSTOP)
                counts["stopped"] += 1
                time.sleep(chance.choice((0.3, TTL_S / 2, TTL_S * 1.5)))
                node.process.send_signal(signal.SIGCONT)
            time.sleep(chance.uniform(0.2, 1.5))
            for each in range(len(nodes)):
                hear(each)
        # Left alone, somebody stores something soon.
        before, until = len(acknowledged), time.monotonic() + 60
        while len(acknowledged) == before:
            assert time.monotonic() < until, "nobody takes over"
            time.sleep(0.05)
            for each in range(len(nodes)):
                hear(each)
        assert counts["killed"] > 1
        assert counts["stopped"] > 1
        assert counts["owners"] > 1
    finally:
        for node in nodes:
            node.process.kill()
            node.process.wait(10)
            while (said := node.next()[1]) != ["end"]:
                if said[0] == "row":
                    acknowledged.add(said[1])
    check(url, tmp_path / "restored.db", acknowledged)
    assert len(acknowledged) > 20
