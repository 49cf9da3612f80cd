"""The soak command runs, and notices what it is there to notice."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from replicator.testing import soak as module
from replicator.testing.soak import Figures, SoakFailure, soak


@pytest.mark.fault("F1", "F67")
def test_a_cycle_ends_with_figures(tmp_path: Path) -> None:
    figures = soak(0, seed=4, folder=tmp_path)
    assert figures.cycles == 1
    assert figures.acknowledged > 0
    assert figures.bytes_compared > 0
    assert figures.happened["kills"] == 1
    assert "seed=4 cycles=1" in str(figures)


@pytest.mark.fault("F67")
def test_a_row_that_is_lost_or_wrong_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = module._Soak(tmp_path, random.Random(1), Figures(1))
    run._finish()
    with module._connect(tmp_path / "source.db") as connection:
        number = module._insert(connection, random.Random(1))
    run._finish()
    run._check_restored(number)
    with pytest.raises(SoakFailure, match="was acknowledged"):
        run._check_restored(number + 1)
    monkeypatch.setattr(module, "_value", lambda number, size: b"something else")
    with pytest.raises(SoakFailure, match="not what was written"):
        run._check_restored(number)


@pytest.mark.fault("F67")
def test_bytes_that_differ_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = module._Soak(tmp_path, random.Random(1), Figures(1))

    def restore(url: str, copy: Path, **options: object) -> None:
        copy.write_bytes(b"another database")

    monkeypatch.setattr(module, "restore", restore)
    with pytest.raises(SoakFailure, match="not those of the source"):
        run._finish()
