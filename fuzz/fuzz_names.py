"""Fuzz the names of objects: python fuzz/fuzz_names.py [corpus folder] (needs atheris).

Invariant: a name that is taken for an LTX file's is the one that is written for its TXIDs; a name that is accepted for a control object or for an object of the
0.3 format stays inside the replica's folder, out of the LTX files, and is one that every file system and store can hold; nothing raises another error.
"""

from __future__ import annotations

import os
import sys

from replicator.format.ltx import FileInfo, format_name, parse_name
from replicator.storage.base import AGE, LITESTREAM, check_control_name, check_object_name, created_at

ROOT = "/replica"


def check(data: bytes) -> None:
    """Raise `AssertionError`, or what must not be raised, when the invariant does not hold."""
    text = data.decode("utf-8", errors="surrogateescape")
    txids = parse_name(text)
    assert txids is None or (format_name(*txids) == text and 1 <= txids[0] <= txids[1])
    for layout in (LITESTREAM, AGE):
        txids = layout.parse(text)
        if txids is not None:
            assert layout.name(FileInfo(0, *txids, 0, created_at(0))) == text
    for accepts, folder in ((check_control_name, ROOT), (check_object_name, f"{ROOT}/generations")):
        try:
            accepts(text)
        except ValueError:
            continue
        path = os.path.normpath(f"{ROOT}/{text}")
        assert path == f"{ROOT}/{text}", text
        assert path == folder or path.startswith(f"{folder}/"), text
        assert text.isascii()
        assert text.isprintable()
        assert all(len(part) <= 128 and not part.startswith(".") for part in text.split("/"))
        if folder == ROOT:
            assert text.split("/")[0] not in ("ltx", "age", "generations", "0000", "0009")


def main() -> None:
    import atheris  # type: ignore[import-not-found]

    atheris.instrument_all()
    atheris.Setup(sys.argv, check)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
