"""The engines that are measured side by side: ours and the released binaries, started with the same configuration."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.compat import litestream03
from tests.servers import tool

__all__ = ["BOTO3", "ENVIRONMENT", "OURS", "PEER", "PEER03", "Engine", "compile_ours"]

# With AWS_CA_BUNDLE set the released Litestream cannot start; without compiled modules ours starts as no installed program does.
_LEFT_OUT = ("AWS_CA_BUNDLE", "PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX")
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if name not in _LEFT_OUT and not name.startswith("LITESTREAM_")},
    "AWS_EC2_METADATA_DISABLED": "true",
}

_IMPORT_ALL = """
import contextlib, importlib, pkgutil, replicator, rich.progress, watchdog.observers
for module in pkgutil.walk_packages(replicator.__path__, "replicator."):
    with contextlib.suppress(ImportError):  # of an extra
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
"""


def compile_ours(folder: Path) -> None:
    """Compile our modules and all that they import into a folder, as installing does."""
    ENVIRONMENT["PYTHONPYCACHEPREFIX"] = os.fspath(folder)
    subprocess.run([sys.executable, "-c", _IMPORT_ALL], env=ENVIRONMENT, check=True)


@dataclass(frozen=True)
class Engine:
    """One program. `v3`: it writes format 0.3, has no `-once`, and no control socket. `prefix`: goes before the command."""

    name: str
    v3: bool = False
    prefix: tuple[str, ...] = ()

    @property
    def command(self) -> list[str]:
        if self.name.startswith("ours"):
            return [*self.prefix, sys.executable, "-m", "replicator"]
        return [litestream03.program()] if self.v3 else [tool("litestream")]

    def configure(self, folder: Path, database: Path, replica: dict[str, Any], *, merge_every: str = "24h") -> Path:
        """Write `folder/c.yml`. Files are merged so rarely that a run never sees it, unless `merge_every` says otherwise."""
        entry: dict[str, Any] = {"path": str(database)}
        document: dict[str, Any] = {"dbs": [entry]}
        if self.v3:
            entry["replicas"] = [replica]
        else:
            entry["replica"] = replica
            document["levels"] = [{"interval": merge_every}]
            document["socket"] = {"enabled": True, "path": str(folder / "s.sock")}
        path = folder / "c.yml"
        path.write_text(json.dumps(document))
        return path

    def once(self, config: Path) -> list[str]:
        return [*self.command, "replicate", "-config", str(config), "-once"]

    def restore(self, config: Path, database: Path, output: Path) -> list[str]:
        return [*self.command, "restore", "-config", str(config), "-o", str(output), str(database)]

    def start(self, config: Path) -> subprocess.Popen[bytes]:
        """Start `replicate`; its log lies beside the configuration."""
        with config.with_name("log").open("ab") as log:
            return subprocess.Popen([*self.command, "replicate", "-config", str(config)], stdout=log, stderr=log, env=ENVIRONMENT)


OURS, PEER, PEER03 = Engine("ours"), Engine("0.5.17"), Engine("0.3.13", v3=True)
BOTO3 = Engine("ours without obstore", prefix=("env", "PYREPL_S3=boto3"))
