"""Fuzz replica URLs: python fuzz/fuzz_url.py [corpus folder] (needs atheris).

Invariant: any text gives settings or a `ConfigError`; a `file://` URL gives an absolute path without `..`; an endpoint is http or https, without credentials, and
without a word of the user's only where the host is a private one; and neither settings, errors nor `redact` show a password or an unknown parameter.
"""

from __future__ import annotations

import sys
from urllib.parse import urlsplit

from replicator.errors import ConfigError
from replicator.storage.url import S3Settings, file_path, parse_s3_url, redact, scheme

SECRET = "s3cr3tOfNobodyElse"


def check(data: bytes) -> None:
    """Raise `AssertionError`, or what the parser must not raise, when the invariant does not hold."""
    text = data.decode("utf-8", errors="replace")
    first, _, second = text.partition("\0")
    read(text)
    for url in (
        f"s3://user:{SECRET}@{first}",
        f"s3://bucket/{first}?{second}&secret-access-key={SECRET}",
        f"s3://bucket/x?x-{second}={SECRET}",
    ):
        if "#" in first + second or "\\" in first + second:
            continue  # where a URL ends there is a matter of taste
        if "&" in second and url.endswith(f"x-{second}={SECRET}"):
            continue  # the value of another parameter, maybe of a public one
        outcome = read(url)
        assert SECRET not in f"{outcome!r} {getattr(outcome, 'url', '')} {outcome} {getattr(outcome, 'hint', '')}", url
        assert SECRET not in redact(url), url


def read(url: str) -> S3Settings | ConfigError | str:
    try:
        if scheme(url) != "s3":
            path = file_path(url)
            if scheme(url) == "file":
                assert path.startswith("/"), path
                assert ".." not in path.split("/"), path
            return ""
        settings = parse_s3_url(url, environ={})
    except ConfigError as error:
        return error
    assert settings.bucket
    assert not settings.path.startswith("/")
    if settings.endpoint is not None:
        parts = urlsplit(settings.endpoint)
        assert parts.scheme in ("http", "https")
        assert parts.hostname
        assert "@" not in parts.netloc
        assert not parts.query
    return settings


def main() -> None:
    import atheris  # type: ignore[import-not-found]

    atheris.instrument_all()
    atheris.Setup(sys.argv, check)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
