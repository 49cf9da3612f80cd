"""The files in docs/ with which people deploy: their flags and paths exist, their parts fit together, and their command lines do what they are for."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml

from replicator import config
from replicator.cli import COMMANDS
from replicator.cli.parse import parse
from replicator.server import Observed, Request
from replicator.store import Store
from tests.e2e.databases import connect, insert, rows, until

DOCS = Path(__file__).parents[2] / "docs"
DOCUMENTS = {item["kind"]: item for item in yaml.safe_load_all((DOCS / "kubernetes.yaml").read_text())}
POD = DOCUMENTS["StatefulSet"]["spec"]["template"]["spec"]
CONFIG = DOCUMENTS["ConfigMap"]["data"]["litestream.yml"]
CONTAINERS: dict[str, dict[str, Any]] = {item["name"]: item for item in [*POD["initContainers"], *POD["containers"]]}


def instructions() -> dict[str, list[str]]:
    """The instructions of the Containerfile's last stage."""
    text = re.sub(r"^#.*\n", "", (DOCS / "Containerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    found: dict[str, list[str]] = {}
    for line in text.split("\nFROM ")[-1].splitlines()[1:]:
        name, _, rest = line.partition(" ")
        if name:
            found.setdefault(name, []).append(rest)
    return found


def command_lines() -> list[tuple[str, list[str]]]:
    """Every command line of `pyrepl` in these files, and in the comments and pages beside them."""
    unit = re.search(r"^ExecStart=/usr/bin/env pyrepl (.*)$", (DOCS / "pyrepl.service").read_text(), re.MULTILINE)
    assert unit
    image = instructions()
    assert json.loads(image["ENTRYPOINT"][0]) == ["pyrepl"]
    found = [("pyrepl.service", shlex.split(unit[1])), ("Containerfile", json.loads(image["CMD"][0]))]
    found += [(f"kubernetes.yaml {name}", item["args"]) for name, item in CONTAINERS.items() if item["image"] == "pyrepl"]
    for name in ("Containerfile", "kubernetes.yaml"):
        text = (DOCS / name).read_text()
        found += [(f"{name} comment", json.loads(line)) for line in re.findall(r"^#.*(?:CMD) (\[.*\])$", text, re.MULTILINE)]
        found += [(f"{name} comment", shlex.split(line)) for line in re.findall(r"^#.*-- pyrepl (.*)$", text, re.MULTILINE)]
    page = (DOCS / "daemon.md").read_text()
    found += [("daemon.md", shlex.split(line)) for line in re.findall(r"^    pyrepl (\w[^#\n]*)", page, re.MULTILINE)]
    found += [("daemon.md", json.loads(line)[1:]) for line in re.findall(r"^    ENTRYPOINT (\[.*\])$", page, re.MULTILINE)]
    return found


@pytest.mark.parametrize(("where", "line"), command_lines(), ids=[f"{where}-{line[0]}" for where, line in command_lines()])
def test_every_command_and_flag_exists(where: str, line: list[str]) -> None:
    parse(line[1:], COMMANDS[line[0]])


def test_there_are_command_lines_in_all_of_them() -> None:
    assert {where.partition(" ")[0] for where, _ in command_lines()} == {"pyrepl.service", "Containerfile", "kubernetes.yaml", "daemon.md"}


def settings() -> config.Config:
    return config.load(CONFIG, environ={"ACCESS_KEY_ID": "AK", "SECRET_ACCESS_KEY": "SK"})


def test_the_configuration_of_the_manifest_is_right_and_its_paths_are_mounted() -> None:
    found = settings()
    assert found.warnings == ()
    [database] = found.databases
    [replica] = database.replicas
    assert replica.s3 is not None
    assert (replica.s3.access_key_id, replica.s3.secret_access_key) == ("AK", "SK")
    for name in ("restore", "pyrepl"):
        container = CONTAINERS[name]
        mounted = {item["mountPath"] for item in container["volumeMounts"]}
        flags, arguments = parse(container["args"][1:], COMMANDS[container["args"][0]])
        assert {"/data", str(Path(flags["config"]).parent)} <= mounted
        assert Path(flags["config"]).name in DOCUMENTS["ConfigMap"]["data"]
        assert arguments in ([], [str(database.path)])
        given = {item["name"] for item in container["env"]}
        assert given == set(re.findall(r"\$\{(\w+)\}", CONFIG))
    assert str(found.daemon.socket.path.parent) in {item["mountPath"] for item in CONTAINERS["pyrepl"]["volumeMounts"]}
    assert str(database.path.parent) in {item["mountPath"] for item in CONTAINERS["app"]["volumeMounts"]}


def test_the_parts_of_the_manifest_fit_together() -> None:
    spec = DOCUMENTS["StatefulSet"]["spec"]
    assert spec["replicas"] == 1  # one writer
    volumes = {item["name"] for item in POD["volumes"]} | {item["metadata"]["name"] for item in spec["volumeClaimTemplates"]}
    for container in CONTAINERS.values():
        assert {item["name"] for item in container["volumeMounts"]} <= volumes
    configured = [item["configMap"]["name"] for item in POD["volumes"] if "configMap" in item]
    assert configured == [DOCUMENTS["ConfigMap"]["metadata"]["name"]]
    labels = spec["template"]["metadata"]["labels"]
    assert labels == spec["selector"]["matchLabels"] == DOCUMENTS["Service"]["spec"]["selector"]
    names = [item["name"] for item in POD["initContainers"]]
    assert names == ["restore", "pyrepl"]  # in this order
    assert CONTAINERS["pyrepl"]["restartPolicy"] == "Always"
    assert "restartPolicy" not in CONTAINERS["restore"]


def test_probes_ask_what_is_served_where_it_is_served() -> None:
    store = Store()
    observed = Observed(store, lambda: b"")
    assert observed.respond(Request("GET", "/readyz", {})).status == 503
    store.start()
    try:
        check_probes(observed)
    finally:
        store.close(20)


def check_probes(observed: Observed) -> None:
    address = settings().daemon.address
    assert address is not None
    container = CONTAINERS["pyrepl"]
    ports = {item["name"]: item["containerPort"] for item in container["ports"]}
    probes = {name: container[name]["httpGet"] for name in ("startupProbe", "livenessProbe", "readinessProbe")}
    for probe in probes.values():
        assert observed.respond(Request("GET", probe["path"], {})).status == 200
        assert ports[probe["port"]] == address[1]
    assert (probes["livenessProbe"]["path"], probes["readinessProbe"]["path"]) == ("/healthz", "/readyz")
    assert int(DOCUMENTS["StatefulSet"]["spec"]["template"]["metadata"]["annotations"]["prometheus.io/port"]) == address[1]
    image = instructions()
    (url,) = re.findall(r"http://127\.0\.0\.1:(\d+)(/\w+)", image["HEALTHCHECK"][0])
    assert (url[0], observed.respond(Request("GET", url[1], {})).status) == (image["EXPOSE"][0], 200)


def test_everybody_waits_longer_than_the_last_sync_may_take() -> None:
    timeout_s = settings().daemon.shutdown_timeout_s
    assert POD["terminationGracePeriodSeconds"] > timeout_s + 10
    unit = re.search(r"^TimeoutStopSec=(\d+)s$", (DOCS / "pyrepl.service").read_text(), re.MULTILINE)
    assert unit
    assert int(unit[1]) > config.Daemon().shutdown_timeout_s + 10
    run = re.search(r"--stop-timeout (\d+)", (DOCS / "Containerfile").read_text())
    assert run
    assert int(run[1]) > config.Daemon().shutdown_timeout_s + 10


def test_the_pod_restores_replicates_and_stops_as_it_is_meant_to(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    places = {"/data": f"{tmp_path}/data", "/run/pyrepl": f"{tmp_path}/run", "/etc/pyrepl": f"{tmp_path}/etc", ":9090": f"127.0.0.1:{port}"}
    for name in ("data", "run", "etc"):
        (tmp_path / name).mkdir()

    def here(text: str) -> str:
        for place, own in places.items():
            text = text.replace(place, own)
        return text.replace("s3://bucket/app", f"file://{tmp_path}/bucket")

    (tmp_path / "etc/litestream.yml").write_text(re.sub(r".*access-key.*\n", "", here(CONFIG)))
    database = tmp_path / "data/app.db"

    def command(name: str) -> list[str]:
        return [sys.executable, "-m", "replicator", *map(here, CONTAINERS[name]["args"])]

    subprocess.run(command("restore"), check=True, timeout=60, stdout=subprocess.DEVNULL)
    assert not database.exists()  # nothing is stored yet
    sidecar = subprocess.Popen(command("pyrepl"), stdout=subprocess.DEVNULL)
    try:
        until(lambda: answers(port, CONTAINERS["pyrepl"]["startupProbe"]["httpGet"]["path"]))
        application = connect(database)
        insert(application, 5)
        until(lambda: answers(port, CONTAINERS["pyrepl"]["readinessProbe"]["httpGet"]["path"]))
        insert(application, 5)
        expected = rows(application)
        application.close()
        sidecar.send_signal(signal.SIGTERM)
        assert sidecar.wait(60) == 0
    finally:
        sidecar.kill()
        sidecar.wait()
    shutil.rmtree(tmp_path / "data")
    (tmp_path / "data").mkdir()
    subprocess.run(command("restore"), check=True, timeout=60, stdout=subprocess.DEVNULL)
    assert rows(database) == expected


def answers(port: int, path: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False
