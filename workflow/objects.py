"""Bytes outside the instance files: values and artifacts above a mebibyte, by run and SHA-256.

With a replica they are beside it (`durability.py`); without one they are files in a folder of the engine's.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from pathlib import Path
from typing import Protocol

from workflow.errors import MissingObject
from workflow.journal import read_object

__all__ = ["INLINE_BYTES", "ROW_BYTES", "LocalObjects", "Objects", "Reader", "checked"]

ROW_BYTES = 64 << 10
"""Texts up to this size stand in their row."""

INLINE_BYTES = 1 << 20
"""Objects up to this size stand in the instance file."""


class Objects(Protocol):
    """Where large objects are."""

    def put(self, home: str, sha256: str, data: bytes) -> None:
        """Store bytes durably. The same ones again are no error."""

    def get(self, home: str, sha256: str) -> bytes:
        """Return bytes. Raises `MissingObject`."""

    def copy(self, source: str, target: str, sha256: str) -> None:
        """Give another run an object of its own. Raises `MissingObject`."""

    def delete(self, home: str) -> None:
        """Delete all objects of a run."""


class LocalObjects:
    """Files below a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def put(self, home: str, sha256: str, data: bytes) -> None:
        path = self._path(home, sha256)
        if path.exists():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{sha256}.{secrets.token_hex(4)}.tmp")
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(path)
        finally:
            temporary.unlink(missing_ok=True)
        for folder in (path.parent, path.parent.parent):
            opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(opened)
            finally:
                os.close(opened)

    def get(self, home: str, sha256: str) -> bytes:
        path = self._path(home, sha256)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise MissingObject(sha256, f"{path}: {error.strerror}") from error
        return checked(data, sha256, path)

    def copy(self, source: str, target: str, sha256: str) -> None:
        self.put(target, sha256, self.get(source, sha256))

    def delete(self, home: str) -> None:
        shutil.rmtree(self._folder / home, ignore_errors=True)

    def _path(self, home: str, sha256: str) -> Path:
        return self._folder / home / sha256


def checked(data: bytes, sha256: str, where: object) -> bytes:
    """Return the bytes if they are those of an object, else raise `MissingObject`."""
    if hashlib.sha256(data).hexdigest() != sha256:
        raise MissingObject(sha256, f"{where}: other bytes")
    return data


class Reader:
    """Read objects of any run of a folder, from its instance file or from where large ones are."""

    def __init__(self, folder: Path, objects: Objects) -> None:
        self._folder = folder
        self._objects = objects

    def read(self, home: str, sha256: str) -> bytes:
        """Return the bytes. Raises `MissingObject`."""
        from workflow.state import check_id

        path = self._folder / f"{check_id(home, longest=200)}.db"
        if path.exists():
            data = read_object(path, sha256)
            if data is not None:
                return data
        return self._objects.get(home, sha256)
