"""Fuzz the configuration: python fuzz/fuzz_config.py [corpus folder] (needs atheris).

Invariant: any text gives a `Config` or a `ConfigError` that begins with the file's name, in bounded time; `lenient` accepts whatever the strict
reader accepts, with the same settings; settings and errors show nothing of a secret that stands where secrets belong; and a replica that
mentions age is never opened.
"""

from __future__ import annotations

import sys
from pathlib import Path

from replicator.config import Config, load
from replicator.errors import ConfigError
from replicator.storage import open_replica

SECRET = "s3cr3tOfNobodyElse"


def check(data: bytes) -> None:
    """Raise `AssertionError`, or what the reader must not raise, when the invariant does not hold."""
    text = data.decode("utf-8", errors="replace")
    elsewhere = text.replace(" access-key-id: $ACCESS,", "").replace(" secret-access-key: '${SECRET}'", "")
    strict, lenient = read(text, lenient=False), read(text, lenient=True)
    for outcome in (strict, lenient):
        if isinstance(outcome, ConfigError):
            assert str(outcome).startswith("fuzz.yml:"), outcome
        if not any(word in elsewhere for word in ("ACCESS", "SECRET", SECRET)):
            assert SECRET not in f"{outcome!r} {getattr(outcome, 'hint', '')}"
    if isinstance(strict, Config):
        assert isinstance(lenient, Config)
        assert (strict.databases, strict.logging) == (lenient.databases, lenient.logging)
    if isinstance(lenient, Config):
        for database in lenient.databases:
            assert database.path.is_absolute()
            assert database.replicas
            for replica in database.replicas:
                if replica.age_identities or replica.age_recipients:
                    try:
                        open_replica(replica)
                    except ConfigError:
                        continue
                    raise AssertionError("a replica with age was opened")


def read(text: str, *, lenient: bool) -> Config | ConfigError:
    environ = {"HOME": "/home", "ACCESS": SECRET, "SECRET": SECRET}
    try:
        return load(text, environ=environ, source="fuzz.yml", lenient=lenient, folder=Path("/work"), pid=1)
    except ConfigError as error:
        return error


def main() -> None:
    import atheris  # type: ignore[import-not-found]

    atheris.instrument_all()
    atheris.Setup(sys.argv, check)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
