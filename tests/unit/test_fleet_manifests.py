"""The manifests with which fleets of hosts are deployed: their commands and flags exist, and their times fit together."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from replicator.cli import COMMANDS
from replicator.cli.parse import parse
from replicator.durations import parse_duration
from workflow import rayfleet
from workflow.cli import SUBCOMMANDS

DOCS = Path(__file__).parents[2] / "docs"
HOSTS = {item["kind"]: item for item in yaml.safe_load_all((DOCS / "kubernetes-hosts.yaml").read_text())}
RAY = {item["kind"]: item for item in yaml.safe_load_all((DOCS / "kubernetes-ray.yaml").read_text())}
POD = HOSTS["Deployment"]["spec"]["template"]["spec"]
[HOST] = POD["containers"]


def command_lines() -> list[list[str]]:
    """Every command line of `pyrepl` in the manifests and on the page beside them."""
    found = [[*HOST["command"], *HOST["args"]]]
    for name in ("kubernetes-hosts.yaml", "kubernetes-ray.yaml"):
        found += [shlex.split(line) for line in re.findall(r"^#.*-- (pyrepl .*)$", (DOCS / name).read_text(), re.MULTILINE)]
    found += [
        shlex.split(line) for line in re.findall(r"^    (pyrepl wf [^#\n]*)", (DOCS / "fleets-of-hosts.md").read_text(), re.MULTILINE)
    ]
    return found


@pytest.mark.parametrize("line", command_lines(), ids=" ".join)
def test_every_command_and_flag_exists(line: list[str]) -> None:
    program, command, *rest = line
    assert (program, command) == ("pyrepl", "wf")
    _, arguments = parse(rest, COMMANDS["wf"])
    names, _ = SUBCOMMANDS[arguments[0]]
    assert sum(not name.startswith("[") for name in names) <= len(arguments) - 2 <= len(names)


def test_there_are_command_lines_of_both_kinds() -> None:
    assert {line[2] for line in command_lines()} >= {"host", "fleet"}


def ray_lines() -> list[str]:
    text = (DOCS / "kubernetes-ray.yaml").read_text()
    return [RAY["RayJob"]["spec"]["entrypoint"], *re.findall(r"^#.*-- (python -m .*)$", text, re.MULTILINE)]


@pytest.mark.parametrize("line", ray_lines())
def test_every_line_for_ray_is_understood(line: str) -> None:
    program, dash, module, *rest = shlex.split(line)
    assert (program, dash, module) == ("python", "-m", rayfleet.__name__)
    options = rayfleet.parser().parse_args(rest)
    assert (options.url, options.modules) == ("s3://bucket/agents", ["my_flows"])


def test_hosts_have_time_to_end_in_order_and_no_volumes() -> None:
    flags, _ = parse(HOST["args"][1:], COMMANDS["wf"])
    assert POD["terminationGracePeriodSeconds"] >= parse_duration(flags["stop-timeout"]) + 60  # `durability.WAIT_S` for the last uploads
    assert parse_duration(flags["poll"]) <= parse_duration(flags["lease-ttl"]) / 3  # a renewal is seen before the next
    assert "volumes" not in POD
    assert "volumeMounts" not in HOST
    assert "folder" not in flags
    assert "host" not in flags  # pods have names of their own


def test_labels_and_groups_fit_together() -> None:
    spec = HOSTS["Deployment"]["spec"]
    labels = spec["template"]["metadata"]["labels"]
    assert labels == spec["selector"]["matchLabels"] == HOSTS["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"]
    assert RAY["RayJob"]["spec"]["clusterSelector"] == {"ray.io/cluster": RAY["RayCluster"]["metadata"]["name"]}
    groups: list[dict[str, Any]] = RAY["RayCluster"]["spec"]["workerGroupSpecs"]
    assert all(group["minReplicas"] <= group["replicas"] <= group["maxReplicas"] for group in groups)
    assert RAY["RayCluster"]["spec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"  # so that `Scheduler` leaves it alone
