"""S3 servers for tests, on loopback and on free ports: SeaweedFS, moto, and rclone (which ignores conditions)."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ACCESS, SECRET = "testaccess", "testsecret0123456789"
BUCKET = "bucket"


@dataclass(frozen=True)
class Server:
    """A running server. `url(path)` is a replica URL in its bucket."""

    name: str
    endpoint: str

    def url(self, path: str) -> str:
        return f"s3://{BUCKET}/{path}?endpoint={self.endpoint}&region=us-east-1&forcePathStyle=true"


def tool(name: str) -> str:
    """Find a program beside the interpreter or on PATH. Missing: an error in CI, a visible skip elsewhere."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if os.access(beside, os.X_OK) else shutil.which(name)
    if found is None:
        if os.environ.get("CI"):
            raise RuntimeError(f"{name} is not installed; it is part of the test extra")
        pytest.skip(f"{name} is not installed")
    return found


def free_port() -> int:
    """A port below 55000 whose +10000 neighbour (SeaweedFS's gRPC) is valid, too."""
    for _ in range(1000):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        if port < 55000:
            return port
    raise RuntimeError("no free port")


def _command(name: str, port: int, folder: Path) -> list[str]:
    if name == "moto":
        return [tool("moto_server"), "-H", "127.0.0.1", "-p", str(port)]
    if name == "rclone":
        (folder / "data" / BUCKET).mkdir(parents=True)
        args = ["serve", "s3", "--config", str(folder / "none.conf"), "--addr", f"127.0.0.1:{port}", "--auth-key", f"{ACCESS},{SECRET}"]
        return [tool("rclone"), *args, "--vfs-cache-mode", "full", "--cache-dir", str(folder / "cache"), str(folder / "data")]
    (folder / "data").mkdir()
    master, volume, filer, admin = (free_port() for _ in range(4))
    return [
        tool("weed"), "mini", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={folder / 'data'}", f"-bucket={BUCKET}",
        "-master.telemetry=false", "-webdav=false", "-admin.ui=false", f"-master.port={master}", f"-volume.port={volume}",
        f"-filer.port={filer}", f"-admin.port={admin}", f"-s3.port={port}", "-s3.port.iceberg=0", "-s3.port.lance=0",
    ]  # fmt: skip


@contextlib.contextmanager
def serve(name: str, folder: Path) -> Iterator[Server]:
    """Start a server, wait until it takes a write, stop it at the end."""
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    port = free_port()
    environment = {**os.environ, "AWS_ACCESS_KEY_ID": ACCESS, "AWS_SECRET_ACCESS_KEY": SECRET}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(_command(name, port, folder), stdout=log, stderr=log, cwd=folder, env=environment)
    try:
        endpoint = f"http://127.0.0.1:{port}"
        config = Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 1}, connect_timeout=1, read_timeout=5)
        client = boto3.client(
            "s3", endpoint_url=endpoint, aws_access_key_id=ACCESS, aws_secret_access_key=SECRET, region_name="us-east-1", config=config
        )
        end = time.monotonic() + 60
        while True:
            try:
                with contextlib.suppress(ClientError):
                    client.create_bucket(Bucket=BUCKET)
                client.put_object(Bucket=BUCKET, Key="up", Body=b"1")
                break
            except (BotoCoreError, ClientError):
                if process.poll() is not None or time.monotonic() > end:
                    raise RuntimeError(f"{name} did not start: {(folder / 'log').read_text(errors='replace')[-2000:]}") from None
                time.sleep(0.05)
        client.close()
        yield Server(name, endpoint)
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)


def _fixture(name: str):
    @pytest.fixture(scope="session", name=name)
    def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
        with serve(name, tmp_path_factory.mktemp(name)) as running:
            yield running

    return server


seaweed, moto, rclone = _fixture("seaweed"), _fixture("moto"), _fixture("rclone")
