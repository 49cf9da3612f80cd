"""Where a replica in a store other than S3 and a directory is: URLs and settings as values. No environment, no network, no file is looked at.

    gs://bucket/path
    abs://[account@]container/path[?endpoint=https://host]
    oss://bucket[.oss-<region>[-internal].aliyuncs.com]/path[?endpoint=...&region=...]
    sftp://user[:password]@host[:port]/path
    webdav://[user:password@]host[:port]/path   (http; webdavs: https)
    nats://[user:password@]host[:port]/bucket

The parameters are ours; Litestream gives those settings in its configuration file alone. Anything else behind a `?` is an error, because a
setting that silently does nothing is found out too late.

Secrets are left out of representations, and no `url` holds one. Every `url`, parsed again, is the same place.

Source: specification 4.3 and 4.4 (keys, grammar), 2.1 (paths).
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, Self
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlsplit

from replicator.errors import ConfigError
from replicator.storage.url import endpoint_url, redact

__all__ = [
    "SCHEMES",
    "ABSSettings",
    "GSSettings",
    "NATSSettings",
    "OSSSettings",
    "SFTPSettings",
    "StoreSettings",
    "WebDAVSettings",
    "check_path",
    "make_settings",
    "parse_store_url",
]

_PLAIN_IN_PATH = "".join(chr(code) for code in range(33, 127) if chr(code) not in "%?#")
_OSS_HOST = re.compile(r"(?P<bucket>[^.]+)\.oss-(?P<region>[a-z0-9-]+?)(?:-internal)?\.aliyuncs\.com")
_BUCKET = re.compile(r"[A-Za-z0-9$][A-Za-z0-9._-]{0,254}")
_NATS_BUCKET = re.compile(r"[A-Za-z0-9_-]{1,200}")
_HOST = re.compile(r"(?:\[[0-9A-Fa-f:.%]+\]|[^\s/@\[\]:?#]+)(?::[0-9]{1,5})?")
_DEFAULT_REGION = "cn-hangzhou"
_MIN_PART_SIZE = 100 << 10


@dataclass(frozen=True, slots=True, kw_only=True)
class GSSettings:
    """A path in a bucket of Google Cloud Storage. Credentials are the application default ones."""

    kind: ClassVar[Literal["gs"]] = "gs"
    bucket: str
    path: str = ""

    def __post_init__(self) -> None:
        _check_bucket(self.bucket)

    @property
    def url(self) -> str:
        return f"gs://{self.bucket}{_shown_path(self.path)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ABSSettings:
    """A path in a container (`bucket`) of Azure Blob Storage. A SAS token wins over an account key; without both the default chain is used."""

    kind: ClassVar[Literal["abs"]] = "abs"
    bucket: str
    path: str = ""
    account_name: str | None = None
    account_key: str | None = field(default=None, repr=False)
    sas_token: str | None = field(default=None, repr=False)
    endpoint: str | None = None

    def __post_init__(self) -> None:
        _check_bucket(self.bucket)
        if self.account_name is None and self.endpoint is None:
            raise ConfigError("abs needs an account name, or an endpoint", hint="give account-name, or abs://account@container/path")

    def with_environment(self, environ: Mapping[str, str]) -> Self:
        """Return the settings with the secrets of Litestream's variables where they have none."""
        return replace(
            self,
            account_key=self.account_key or environ.get("LITESTREAM_AZURE_ACCOUNT_KEY") or None,
            sas_token=self.sas_token or environ.get("LITESTREAM_AZURE_SAS_TOKEN") or None,
        )

    @property
    def service(self) -> str:
        """URL of the blob service."""
        return self.endpoint or f"https://{self.account_name}.blob.core.windows.net"

    @property
    def url(self) -> str:
        account = f"{self.account_name}@" if self.account_name else ""
        return f"abs://{account}{self.bucket}{_shown_path(self.path)}{_shown_parameters(endpoint=self.endpoint)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class OSSSettings:
    """A path in a bucket of Alibaba Cloud OSS. Without keys `OSS_ACCESS_KEY_ID` and `OSS_ACCESS_KEY_SECRET` of the environment are used."""

    kind: ClassVar[Literal["oss"]] = "oss"
    bucket: str
    path: str = ""
    region: str | None = None
    endpoint: str | None = None
    part_size: int | None = None
    concurrency: int | None = None
    access_key_id: str | None = field(default=None, repr=False)
    secret_access_key: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        _check_bucket(self.bucket)
        if self.part_size is not None and self.part_size < _MIN_PART_SIZE:
            raise ConfigError(f"part size is too small: {self.part_size} bytes", hint="OSS takes parts of 100 KiB (102400) and more")

    @property
    def region_name(self) -> str:
        return self.region or _DEFAULT_REGION

    @property
    def url(self) -> str:
        host = f"{self.bucket}.oss-{self.region}.aliyuncs.com" if self.region and not self.endpoint else self.bucket
        region = self.region if self.endpoint else None
        path = "" if self.path == "." else f"/{quote(self.path, safe=_PLAIN_IN_PATH)}"
        return f"oss://{host}{path}{_shown_parameters(endpoint=self.endpoint, region=region)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SFTPSettings:
    """A path on an SSH server. A relative one begins at the folder of the login.

    Attributes:
        host: with a port, if it is not 22.
        host_key: a line of `authorized_keys`; no other key of the server is accepted then. Absent: `~/.ssh/known_hosts` decides about hosts
            that it lists, and all others are accepted with a warning, as by Litestream.
        concurrent_writes: whether the pieces of a file may be on their way at the same time.
    """

    kind: ClassVar[Literal["sftp"]] = "sftp"
    host: str
    user: str
    path: str = ""
    password: str | None = field(default=None, repr=False)
    key_path: str | None = None
    host_key: str | None = None
    concurrent_writes: bool = True

    def __post_init__(self) -> None:
        _check_host(self.host)
        if not self.user:
            raise ConfigError("sftp needs a user", hint="give sftp://user@host/path")

    @property
    def url(self) -> str:
        path = self.path if self.path.startswith("/") else f"/./{self.path}" if self.path else ""
        return f"sftp://{quote(self.user)}@{self.host}{quote(path, safe=_PLAIN_IN_PATH)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class WebDAVSettings:
    """A path below the URL of a WebDAV server, which is http or https, without credentials in it."""

    kind: ClassVar[Literal["webdav"]] = "webdav"
    server: str
    path: str = ""
    username: str | None = None
    password: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "server", endpoint_url(self.server, private_http=False))
        _check_host(urlsplit(self.server).netloc)

    @property
    def url(self) -> str:
        scheme, _, place = self.server.partition("://")
        return f"webdav{'s' if scheme == 'https' else ''}://{place}{_shown_path(self.path)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class NATSSettings:
    """An object store bucket of a NATS server with JetStream, which must exist. One bucket holds one replica.

    Attributes:
        server: host with a port, if it is not 4222.
        max_reconnects: tries of a connection that was lost; -1: without end.
        timeout_s: of a connection, and of one request.
    """

    kind: ClassVar[Literal["nats"]] = "nats"
    server: str
    bucket: str
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    token: str | None = field(default=None, repr=False)
    jwt: str | None = field(default=None, repr=False)
    seed: str | None = field(default=None, repr=False)
    creds: str | None = None
    nkey: str | None = field(default=None, repr=False)
    tls: bool = False
    root_cas: tuple[str, ...] = ()
    client_cert: str | None = None
    client_key: str | None = None
    max_reconnects: int = -1
    reconnect_wait_s: float = 2.0
    timeout_s: float = 10.0

    def __post_init__(self) -> None:
        _check_host(self.server)
        if not _NATS_BUCKET.fullmatch(self.bucket):
            raise ConfigError(f"not a NATS bucket: {redact(self.bucket)!r}", hint="one bucket holds one replica: nats://host/bucket")
        if (self.jwt is None) != (self.seed is None):
            raise ConfigError("jwt and seed go together")
        if (self.client_cert is None) != (self.client_key is None):
            raise ConfigError("client-cert and client-key go together")
        if self.username is not None and self.password is None:
            raise ConfigError("username without password")

    @property
    def url(self) -> str:
        return f"nats://{self.server}/{self.bucket}"


StoreSettings = GSSettings | ABSSettings | OSSSettings | SFTPSettings | WebDAVSettings | NATSSettings


def parse_store_url(url: str, *, environ: Mapping[str, str] | None = None, **more: object) -> StoreSettings:
    """Parse the URL of one of `SCHEMES`.

    Args:
        environ: where Litestream's variables are looked up, if anywhere.
        more: settings that a URL cannot give, or that win over it.

    Raises:
        ConfigError: malformed, an unknown parameter, or values that cannot work.
    """
    rest = url.partition("#")[0]
    try:
        parts = urlsplit(rest)
        _ = parts.port
    except ValueError:
        raise ConfigError(f"replica URL is malformed: {redact(url)}") from None
    if re.search(r"%(?![0-9A-Fa-f]{2})", rest):
        raise ConfigError(f"replica URL has an invalid percent escape: {redact(url)}")
    scheme = rest.partition("://")[0].lower()
    values = {name: value for name, value in _PARSERS[scheme](parts, url).items() if value not in (None, "")}
    known = _PARAMETERS.get(scheme, ())
    for name, value in parse_qsl(parts.query, keep_blank_values=True):
        if name not in known:
            raise ConfigError(f"replica URL has an unknown parameter: {name!r} in {redact(url)}")
        values[name] = endpoint_url(value, private_http=True) if name == "endpoint" else value
    values |= {name: value for name, value in more.items() if value is not None}
    missing = [name for name in _REQUIRED[scheme] if name not in values]
    if missing:
        raise ConfigError(f"replica URL has no {missing[0]}: {redact(url)}", hint=f"give {_FORMS[scheme]}")
    return make_settings(scheme, values, environ=environ)


def make_settings(kind: str, values: Mapping[str, object], *, environ: Mapping[str, str] | None = None) -> StoreSettings:
    """Return the settings of a kind, or of a scheme, from its fields by name. A NATS server that is not named is the local one.

    Raises:
        ConfigError: values that cannot work.
    """
    if kind == "nats":
        values = {"server": "127.0.0.1", **values}
    settings = _SETTINGS[kind](**values)  # type: ignore[arg-type]
    return settings.with_environment(environ) if isinstance(settings, ABSSettings) and environ is not None else settings


def check_path(path: str) -> str:
    """Return a path without what could break a line of a log. Raises `ConfigError`."""
    if any(ord(character) < 32 or ord(character) == 127 for character in path):
        raise ConfigError("path has control characters")
    return path


# -- one function for each scheme ----------------------------------------------------------------------------------------------


def _parse_bucket(parts: SplitResult, url: str) -> dict[str, object]:
    if "@" in parts.netloc:
        raise ConfigError(f"credentials do not belong into a replica URL: {redact(url)}")
    return {"bucket": parts.netloc, "path": _clean(parts.path)}


def _parse_abs(parts: SplitResult, url: str) -> dict[str, object]:
    account, _, container = parts.netloc.rpartition("@")
    if ":" in account:
        hint = "use LITESTREAM_AZURE_ACCOUNT_KEY or LITESTREAM_AZURE_SAS_TOKEN"
        raise ConfigError(f"secrets do not belong into a replica URL: {redact(url)}", hint=hint)
    return {"bucket": container, "path": _clean(parts.path), "account_name": unquote(account)}


def _parse_oss(parts: SplitResult, url: str) -> dict[str, object]:
    values = _parse_bucket(parts, url)
    if found := _OSS_HOST.fullmatch(parts.netloc):
        internal = f"https://oss-{found['region']}-internal.aliyuncs.com" if "-internal." in parts.netloc else None
        values |= {"bucket": found["bucket"], "region": found["region"], "endpoint": internal}
    # Without any path Litestream's keys begin with "./", with the path "/" they begin with "/".
    return {**values, "path": values["path"] if parts.path else "."}


def _parse_sftp(parts: SplitResult, url: str) -> dict[str, object]:
    path = check_path(unquote(parts.path))
    # Not in Litestream's grammar: a path that begins at the folder of the login.
    path = path.removeprefix("/./") if path.startswith("/./") else path
    return {"host": parts.netloc.rpartition("@")[2], "path": path, **_login(parts, "user")}


def _parse_webdav(parts: SplitResult, url: str) -> dict[str, object]:
    host = parts.netloc.rpartition("@")[2]
    server = f"{'https' if parts.scheme == 'webdavs' else 'http'}://{host}" if host else None
    return {"server": server, "path": check_path(unquote(parts.path)), **_login(parts, "username")}


def _parse_nats(parts: SplitResult, url: str) -> dict[str, object]:
    values = _login(parts, "username")
    if "password" not in values and "username" in values:
        values = {"token": values["username"]}  # a user alone is a token, for NATS itself
    return {"server": parts.netloc.rpartition("@")[2] or "127.0.0.1", "bucket": unquote(parts.path).strip("/"), **values}


def _login(parts: SplitResult, user: str) -> dict[str, object]:
    login = parts.netloc.rpartition("@")[0]
    name, colon, password = login.partition(":")
    return {**({user: unquote(name)} if name else {}), **({"password": unquote(password)} if colon else {})}


def _clean(path: str) -> str:
    return check_path(posixpath.normpath("/" + unquote(path)).lstrip("/"))


def _check_bucket(bucket: str) -> None:
    if not _BUCKET.fullmatch(bucket):
        raise ConfigError(f"not a bucket name: {redact(bucket)!r}")


def _check_host(host: str) -> None:
    if not _HOST.fullmatch(host):
        raise ConfigError(f"not a host: {redact(host)!r}", hint="give a name or an address, and a port if it is another: host:2222")


def _shown_path(path: str) -> str:
    return "" if path in ("", ".") else f"/{quote(path.lstrip('/'), safe=_PLAIN_IN_PATH)}"


def _shown_parameters(**values: str | None) -> str:
    text = "&".join(f"{name}={value}" for name, value in values.items() if value)
    return f"?{text}" if text else ""


_PARSERS: dict[str, Callable[[SplitResult, str], dict[str, object]]] = {
    "gs": _parse_bucket,
    "abs": _parse_abs,
    "oss": _parse_oss,
    "sftp": _parse_sftp,
    "webdav": _parse_webdav,
    "webdavs": _parse_webdav,
    "nats": _parse_nats,
}
_SETTINGS: dict[str, type[StoreSettings]] = {
    "gs": GSSettings,
    "abs": ABSSettings,
    "oss": OSSSettings,
    "sftp": SFTPSettings,
    "webdav": WebDAVSettings,
    "webdavs": WebDAVSettings,
    "nats": NATSSettings,
}
_PARAMETERS = {"abs": ("endpoint",), "oss": ("endpoint", "region")}
_REQUIRED: dict[str, tuple[str, ...]] = {
    "gs": ("bucket",),
    "abs": ("bucket",),
    "oss": ("bucket",),
    "sftp": ("host", "user"),
    "webdav": ("server",),
    "webdavs": ("server",),
    "nats": ("bucket",),
}
_FORMS = {
    "gs": "gs://bucket/path",
    "abs": "abs://account@container/path",
    "oss": "oss://bucket/path",
    "sftp": "sftp://user@host/path",
    "webdav": "webdav://host/path",
    "webdavs": "webdavs://host/path",
    "nats": "nats://host/bucket",
}
SCHEMES = frozenset(_PARSERS)
"""The schemes that `parse_store_url` takes."""
