"""Replica URLs: text to values, and nothing else. No environment, no network, no file is looked at.

`S3Settings` is also what a configuration file's replica entry becomes: a field is `None` where nothing was said, and the properties give
what holds then, by provider.

Source: specification 4.3 and 4.4 (grammar), 8.2 and 8.3 (provider defaults).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import ipaddress
import posixpath
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Self
from urllib.parse import quote, unquote, unquote_plus, urlsplit

from replicator.errors import ConfigError

__all__ = ["MIN_PART_SIZE", "S3Settings", "endpoint_url", "file_path", "is_url", "parse_s3_url", "redact", "scheme"]

MIN_PART_SIZE = 5 << 20
_DEFAULT_REGION = "us-east-1"

_URL = re.compile(r"(\w+)://")
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}")
_ACCESS_POINT = re.compile(r"(arn:aws[a-z-]*:s3:([a-z0-9-]+):[0-9]+:accesspoint/[^/]+)(?:/(.*))?", re.DOTALL)

# Host pattern, endpoint, path style. The first group is the bucket, `region` the region.
_HOSTS: tuple[tuple[re.Pattern[str], str | None], ...] = (
    (re.compile(r"(.+)\.s3(?:[.-](?P<region>[a-z0-9-]+))?\.amazonaws\.com"), None),
    (re.compile(r"(.+)\.(?P<region>[^.]+)\.digitaloceanspaces\.com"), "https://{region}.digitaloceanspaces.com"),
    (re.compile(r"(.+)\.s3\.(?P<region>[^.]+)\.backblazeb2\.com"), "https://s3.{region}.backblazeb2.com"),
    (re.compile(r"(.+)\.(?P<region>s3)\.filebase\.com"), "https://s3.filebase.com"),
    (re.compile(r"(.+)\.s3\.(?P<region>[^.]+)\.scw\.cloud"), "https://s3.{region}.scw.cloud"),
)
_VIRTUAL_HOST_STYLE = re.compile(r"(digitaloceanspaces\.com|scw\.cloud)$")

# What `S3Settings.url` leaves readable: everything but what would change the meaning, `%`, `?` and `#`, and what would break a line of a log.
_PLAIN_IN_PATH = "".join(chr(code) for code in range(32, 127) if chr(code) not in "%?#")

# Query parameters that say nothing secret, by their name without case and hyphens. All others are hidden by `redact`.
_PUBLIC_PARAMETERS = frozenset(
    [
        "endpoint",
        "region",
        "forcepathstyle",
        "skipverify",
        "signpayload",
        "requirecontentmd5",
        "signacceptencoding",
        "storageclass",
        "partsize",
        "concurrency",
        "ssecustomeralgorithm",
        "ssekmskeyid",
    ]
)


def is_url(text: str) -> bool:
    """Say whether the text is a URL and not a path."""
    return _URL.match(text) is not None


def scheme(url: str) -> str:
    """Return the scheme of a URL, in lower case; empty for a path."""
    found = _URL.match(url)
    return found[1].lower() if found else ""


def file_path(url: str) -> str:
    """Return the directory of a `file://` URL; a plain path is returned as it is.

    A host becomes the first path component. Percent escapes stay as they are written, and what may not stand in a URL is escaped:
    `file:///a b` is the directory `/a%20b`. That is strange, but it is where Litestream looks.
    """
    if not is_url(url):
        return url
    raw, hash_sign, fragment = url.partition("://")[2].partition("#")
    raw = raw.partition("?")[0]
    if re.search(r"%(?![0-9A-Fa-f]{2})", raw):
        raise ConfigError(f"replica URL has an invalid percent escape: {url}")
    if not re.fullmatch(r"[A-Za-z0-9._~!$&'()*+,;=:@\[\]/%-]*", raw):
        raw = quote(unquote(raw, errors="surrogateescape"), safe="$&+,/:;=@", errors="surrogateescape")
    path = posixpath.normpath("/" + raw.lstrip("/") + hash_sign + fragment)
    if path == "/":
        raise ConfigError(f"replica URL has no path: {url}", hint="give file:///path/to/replica")
    return path


@dataclass(frozen=True, slots=True, kw_only=True)
class S3Settings:
    """Where an S3 replica is and how to talk to the store. `None` means: not said, the provider's default holds.

    Secrets are left out of the representation. `endpoint` has a scheme (see `endpoint_url`). `sign_accept_encoding` is accepted and without
    effect: boto3 never signs that header.

    Raises:
        ConfigError: by the constructor, for values that cannot work, so that it happens at the start and not at the first upload.
    """

    bucket: str
    path: str = ""
    endpoint: str | None = None
    region: str | None = None
    force_path_style: bool | None = None
    skip_verify: bool = False
    sign_payload: bool = True
    require_content_md5: bool | None = None
    sign_accept_encoding: bool | None = None
    storage_class: str | None = None
    part_size: int = MIN_PART_SIZE
    concurrency: int | None = None
    access_key_id: str | None = field(default=None, repr=False)
    secret_access_key: str | None = field(default=None, repr=False)
    sse_customer_algorithm: str | None = None
    sse_customer_key: str | None = field(default=None, repr=False)
    sse_customer_key_md5: str | None = field(default=None, repr=False)
    sse_kms_key_id: str | None = None

    def __post_init__(self) -> None:
        if not _BUCKET.fullmatch(self.bucket) and not _ACCESS_POINT.fullmatch(self.bucket):
            hint = "a host and port go into a parameter: s3://bucket/path?endpoint=http://localhost:9000"
            raise ConfigError(f"not a bucket name: {redact(self.bucket)!r}", hint=hint)
        if self.part_size < MIN_PART_SIZE:
            raise ConfigError(f"part size is too small: {self.part_size} bytes", hint="S3 takes parts of 5 MiB (5242880) and more")
        if self.concurrency is not None and self.concurrency < 1:
            raise ConfigError(f"concurrency must be positive: {self.concurrency}")
        self._check_encryption()

    def _check_encryption(self) -> None:
        if self.sse_customer_key is None:
            if self.sse_customer_algorithm or self.sse_customer_key_md5:
                raise ConfigError("sse-customer-algorithm without sse-customer-key")
            return
        if self.sse_kms_key_id:
            raise ConfigError("sse-customer-key and sse-kms-key-id exclude each other")
        if self.sse_customer_algorithm not in (None, "AES256"):
            raise ConfigError(f"sse-customer-algorithm must be AES256, not {self.sse_customer_algorithm!r}")
        try:
            key = base64.b64decode(self.sse_customer_key, validate=True)
        except (binascii.Error, ValueError):
            key = b""
        if len(key) != 32:
            raise ConfigError("sse-customer-key must be 32 bytes in base64")
        md5 = base64.b64encode(hashlib.md5(key, usedforsecurity=False).digest()).decode()
        if self.sse_customer_key_md5 not in (None, md5):
            raise ConfigError("sse-customer-key-md5 is not the MD5 of sse-customer-key")
        if self.endpoint and self.endpoint.startswith("http://") and not _is_private(urlsplit(self.endpoint).hostname or ""):
            raise ConfigError("sse-customer-key needs an https endpoint", hint="the key itself travels with every request")

    def with_environment(self, environ: Mapping[str, str]) -> Self:
        """Return the settings with what boto3 does not read itself: AWS_REGION, and Litestream's own credential variables where the settings
        and AWS's variables have none.
        """
        if not self.region and not self.endpoint and environ.get("AWS_REGION"):
            return replace(self, region=environ["AWS_REGION"]).with_environment(environ)
        if self.access_key_id or self.secret_access_key:
            return self
        if not any(environ.get(f"LITESTREAM_{name}") and not environ.get(f"AWS_{name}") for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY")):
            return self  # the AWS default chain, with session tokens, profiles and roles
        return replace(
            self,
            access_key_id=environ.get("AWS_ACCESS_KEY_ID") or environ.get("LITESTREAM_ACCESS_KEY_ID"),
            secret_access_key=environ.get("AWS_SECRET_ACCESS_KEY") or environ.get("LITESTREAM_SECRET_ACCESS_KEY"),
        )

    @property
    def host(self) -> str:
        """Host name of the endpoint, in lower case; empty for AWS itself."""
        return (urlsplit(self.endpoint).hostname or "") if self.endpoint else ""

    @property
    def path_style(self) -> bool:
        """Whether the bucket stands in the path of a request and not in its host name."""
        return self.endpoint is not None if self.force_path_style is None else self.force_path_style

    @property
    def region_name(self) -> str | None:
        """The region to sign for; `None` leaves it to the AWS environment."""
        return self.region or (_DEFAULT_REGION if self.endpoint else None)

    @property
    def content_md5(self) -> bool:
        """Whether a batch delete carries Content-MD5."""
        return not self.is_tigris if self.require_content_md5 is None else self.require_content_md5

    @property
    def upload_concurrency(self) -> int:
        """How many parts of one upload travel at once."""
        return self.concurrency or (2 if self.host.endswith(".r2.cloudflarestorage.com") else 5)

    @property
    def is_tigris(self) -> bool:
        """Whether the store is Tigris, which needs a header for consistent reads and refuses Content-MD5."""
        return self.host in ("fly.storage.tigris.dev", "t3.storage.dev")

    @property
    def url(self) -> str:
        """The replica for people and logs, without secrets. Parsed again it is the same place."""
        url = f"s3://{self.bucket}" if self.path == "." else f"s3://{self.bucket}/{quote(self.path, safe=_PLAIN_IN_PATH)}"
        return f"{url}?endpoint={self.endpoint}" if self.endpoint else url


def parse_s3_url(url: str, *, environ: Mapping[str, str] | None = None) -> S3Settings:
    """Parse an `s3://` URL.

    Args:
        environ: where Litestream's credential variables are looked up, if anywhere.

    Raises:
        ConfigError: malformed, an unknown parameter (a misspelt encryption setting must not be ignored), or values that cannot work.
    """
    rest, _, query = url.partition("://")[2].partition("#")[0].partition("?")
    values = _parse_query(query, url)
    if point := _ACCESS_POINT.fullmatch(unquote(rest)):
        values = {"region": point[2], **values}
        bucket, path = point[1], point[3] or ""
    else:
        host, slash, path = rest.partition("/")
        # Without any path Litestream's keys begin with "./", with the path "/" they begin with "/".
        path = unquote(path) if slash else "."
        if "@" in host:
            hint = "use AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile"
            raise ConfigError(f"credentials do not belong into a replica URL: {redact(url)}", hint=hint)
        bucket, from_host = _parse_host(host)
        if "endpoint" in values:
            from_host.pop("force_path_style", None)
        values = {**from_host, **values}
    if not bucket:
        raise ConfigError(f"replica URL has no bucket: {redact(url)}", hint="give s3://bucket/path")
    path = path if path == "." else posixpath.normpath("/" + path).lstrip("/")
    if any(ord(character) < 32 or ord(character) == 127 for character in path):
        raise ConfigError(f"replica URL has control characters in its path: {redact(url)!r}")
    settings = S3Settings(bucket=bucket, path=path, **values)  # type: ignore[arg-type]
    return settings.with_environment(environ) if environ is not None else settings


def endpoint_url(text: str, *, private_http: bool) -> str:
    """Return an endpoint with a scheme, checked.

    Args:
        private_http: without a scheme, take http for hosts of this machine and of private networks (URL parameters do, configuration
            files do not: there it is always https).

    Raises:
        ConfigError: no host, another scheme, or parts that an endpoint cannot have.
    """
    if not is_url(text):
        host = text.partition("/")[0].rpartition(":")[0] if ":" in text.partition("/")[0] else text.partition("/")[0]
        text = f"{'http' if private_http and _is_private(host) else 'https'}://{text}"
    try:
        parts = urlsplit(text)
        port_is_valid = parts.port is None or parts.port > 0
    except ValueError:
        raise ConfigError(f"not an endpoint: {redact(text)}", hint="give https://host or https://host:port") from None
    if (
        parts.scheme not in ("http", "https")
        or not parts.hostname
        or not port_is_valid
        or "@" in parts.netloc
        or parts.query
        or parts.fragment
    ):
        raise ConfigError(f"not an endpoint: {redact(text)}", hint="give https://host or https://host:port, without credentials")
    return text.rstrip("/")


def redact(url: str) -> str:
    """Return the URL without what could be a secret: the password, and the value of every parameter not known to be harmless."""
    found = _URL.match(url)
    if not found:
        return url
    place, mark, query = url[found.end() :].partition("?")
    authority, slash, path = place.partition("/")
    if "@" not in authority and "@" in path and re.search(r":(?![0-9]+$)", authority) and not authority.startswith("arn:"):
        # A secret with a slash in it, as AWS makes them, written without escaping.
        authority, slash, path = place.rpartition("@")[0] + "@", "", place.rpartition("@")[2]
    if "@" in authority:
        user, _, host = authority.rpartition("@")
        authority = f"{user.partition(':')[0]}:***@{host}" if ":" in user else authority
    return f"{found[0]}{authority}{slash}{path}{mark}{'&'.join(map(_redact_parameter, query.split('&')))}"


def _redact_parameter(parameter: str) -> str:
    name, equals, value = parameter.partition("=")
    if not equals:
        return name if _canonical(name) in _PUBLIC_PARAMETERS or not name else "***"
    if _canonical(name) not in _PUBLIC_PARAMETERS:
        return f"{name}=***"
    plain = unquote_plus(value)
    return f"{name}={redact(plain)}" if "@" in plain else parameter


def _canonical(name: str) -> str:
    return unquote_plus(name).replace("-", "").lower()


def _parse_host(host: str) -> tuple[str, dict[str, object]]:
    """Return the bucket, and the settings that the provider's host name implies."""
    for pattern, endpoint in _HOSTS:
        if found := pattern.fullmatch(host):
            region = found["region"]
            if endpoint is None:
                return found[1], {"region": region} if region else {}
            style: dict[str, object] = {"force_path_style": False} if _VIRTUAL_HOST_STYLE.search(host) else {}
            return found[1], {"endpoint": endpoint.format(region=region), "region": region if region != "s3" else _DEFAULT_REGION, **style}
    bucket, dot, rest = host.partition(".")
    if dot and re.search(r":[0-9]+$", rest) and ".com" not in rest:
        return bucket, {"endpoint": endpoint_url(f"http://{rest}", private_http=True), "region": _DEFAULT_REGION, "force_path_style": True}
    return host, {}


def _parse_query(query: str, url: str) -> dict[str, object]:
    values: dict[str, object] = {}
    for parameter in filter(None, query.split("&")):
        name, _, text = parameter.partition("=")
        text = unquote_plus(text)
        if not text and _canonical(name) in _PUBLIC_PARAMETERS:
            continue  # as if it were not there
        match _canonical(name):
            case "endpoint":
                values["endpoint"] = endpoint_url(text, private_http=True)
            case "region":
                values["region"] = text
            case "forcepathstyle":
                values["force_path_style"] = _boolean(name, text)
            case "skipverify":
                values["skip_verify"] = _boolean(name, text)
            case "signpayload":
                values["sign_payload"] = _boolean(name, text)
            case "requirecontentmd5":
                values["require_content_md5"] = _boolean(name, text)
            case "signacceptencoding":
                values["sign_accept_encoding"] = _boolean(name, text)
            case "storageclass":
                values["storage_class"] = text
            case "partsize":
                values["part_size"] = _positive(name, text)
            case "concurrency":
                values["concurrency"] = _positive(name, text)
            case "ssecustomeralgorithm":
                values["sse_customer_algorithm"] = text
            case "ssecustomerkey":
                values["sse_customer_key"] = text
            case "ssecustomerkeymd5":
                values["sse_customer_key_md5"] = text
            case "ssekmskeyid":
                values["sse_kms_key_id"] = text
            case _:
                raise ConfigError(f"replica URL has an unknown parameter: {unquote_plus(name)!r} in {redact(url)}")
    return values


def _boolean(name: str, text: str) -> bool:
    match text.lower():
        case "true" | "1" | "t" | "yes":
            return True
        case "false" | "0" | "f" | "no":
            return False
    raise ConfigError(f"URL parameter {name} must be true or false, not {text!r}")


def _positive(name: str, text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,12}", text) or int(text) == 0:
        raise ConfigError(f"URL parameter {name} must be a positive number, not {text!r}")
    return int(text)


def _is_private(host: str) -> bool:
    """Say whether a host is this machine or in a private network, by its name alone."""
    name = host.strip("[]").lower()
    if name == "localhost" or name.endswith((".localhost", ".local")):
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    return address.is_loopback or (isinstance(address, ipaddress.IPv4Address) and any(address in network for network in _PRIVATE_NETWORKS))


_PRIVATE_NETWORKS = tuple(ipaddress.ip_network(text) for text in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16"))
