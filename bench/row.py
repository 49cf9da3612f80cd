"""What a row of the table is."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from bench.engines import OURS, PEER, Engine

__all__ = ["Aim", "Figures", "Options", "Row"]

Figures = dict[str, float]


@dataclass(frozen=True, slots=True)
class Options:
    """Sizes in MB, times in seconds."""

    megabytes: float = 500
    resync_megabytes: float = 1000
    files: int = 200
    compact_files: int = 1000
    lag_s: float = 30
    write_s: float = 8


@dataclass(frozen=True, slots=True)
class Aim:
    """`figure` is to be at most (or at least) `limit`: of the other engine's figure in the same run, or as it is."""

    figure: str
    limit: float
    against: str = ""
    at_least: bool = False


class Row:
    """One measurement."""

    name: ClassVar[str]
    title: ClassVar[str]
    engines: ClassVar[Sequence[Engine]] = (OURS, PEER)
    aims: ClassVar[Sequence[Aim]] = ()

    def __init__(self, folder: Path, options: Options) -> None:
        self.folder, self.options = folder, options
        folder.mkdir(parents=True, exist_ok=True)

    def prepare(self) -> None:
        """Make what all rounds need."""

    def measure(self, engine: Engine) -> Figures:
        raise NotImplementedError

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
