"""A connection to a NATS server with JetStream, as a replica's settings say it: login, TLS, and coming back.

The first connection is made or refused at once, with its reason; one that was lost comes back by the library, at the pace of the settings. All of it
runs in the loop of `Background`.
"""

from __future__ import annotations

import asyncio
import ssl
from typing import Any

import nats.errors
from nats.aio.client import Client, RawCredentials

from replicator.errors import ConfigError
from replicator.storage.locations import NATSSettings

__all__ = ["Connection", "NoTLS", "denied"]

_CLOSE_TIMEOUT_S = 1.0
_FIRST_WAIT_S = 0.1
_DENIED = ("authorization violation", "authentication", "permissions violation", "user authentication expired", "account authentication")


class _Client(Client):  # type: ignore[misc]
    """nats-py's client, which refuses to go on without TLS where it must be."""

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
        if "tls" in self.options and not info.get("tls_required"):
            raise NoTLS
        await super()._process_info(info, initial_connection)


class NoTLS(nats.errors.Error):  # type: ignore[misc]
    """The server does not speak TLS."""


class Connection:
    """Connects when it is first asked for JetStream, and again when it was closed.

    Attributes:
        direct: whether the stream answers reads without its leader.
        trouble: what the server had against the login, lately; empty when nothing.
    """

    def __init__(self, settings: NATSSettings, stream: str) -> None:
        self.settings = settings
        self.direct = False
        self.trouble = ""
        self._stream = stream
        self._lock = asyncio.Lock()
        self._client: Any = None
        self._js: Any = None

    async def js(self) -> Any:
        async with self._lock:
            if self._client is None or self._client.is_closed:
                self.trouble = ""
                client = _Client()
                try:
                    async with asyncio.timeout(self.settings.timeout_s):
                        await client.connect(**self._options())
                    # Only now: before, it would hide why it cannot connect, and try without end.
                    again = {"allow_reconnect": True, "max_reconnect_attempts": self.settings.max_reconnects}
                    client.options |= {**again, "reconnect_time_wait": self.settings.reconnect_wait_s}
                    js = client.jetstream(timeout=self.settings.timeout_s)
                    config = (await js.stream_info(self._stream)).config
                except BaseException:
                    await _close(client)
                    raise
                self._client, self._js, self.direct = client, js, bool(config.allow_direct)
            return self._js

    async def close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            await _close(client)

    def _options(self) -> dict[str, Any]:
        settings = self.settings
        options: dict[str, Any] = {
            "servers": [f"nats://{settings.server}"],
            "connect_timeout": settings.timeout_s,
            "allow_reconnect": False,
            "max_reconnect_attempts": 1,
            "reconnect_time_wait": _FIRST_WAIT_S,
            "error_cb": self._noted,
            "name": "pyrepl",
            "pending_size": 8 << 20,
        }
        match settings:
            case NATSSettings(jwt=str(jwt), seed=str(seed)):
                options["user_credentials"] = RawCredentials(_credentials_file(jwt, seed))
            case NATSSettings(creds=str(path)):
                options["user_credentials"] = path
            case NATSSettings(nkey=str(seed)):
                options["nkeys_seed_str"] = seed
            case NATSSettings(username=str(user)):
                options |= {"user": user, "password": settings.password}
            case NATSSettings(token=str(token)):
                options["token"] = token
        if settings.tls or settings.root_cas or settings.client_cert:
            options["tls"] = self._tls()
        return options

    def _tls(self) -> ssl.SSLContext:
        settings = self.settings
        try:
            context = ssl.create_default_context()
            for path in settings.root_cas:
                context.load_verify_locations(path)
            if settings.client_cert is not None:
                context.load_cert_chain(settings.client_cert, settings.client_key)
        except OSError as exc:
            what = "root-cas, client-cert and client-key must be certificates and keys in PEM form"
            raise ConfigError(f"cannot use the TLS files for {settings.server}: {type(exc).__name__}", hint=what) from exc
        return context

    async def _noted(self, error: Exception) -> None:
        self.trouble = denied(error) or self.trouble


async def _close(client: Any) -> None:
    """Close a connection in a bounded time: after a failed handshake the library waits for an end that does not come."""
    task = asyncio.ensure_future(client.close())
    await asyncio.wait({task}, timeout=_CLOSE_TIMEOUT_S)  # it may end in an error, or cancelled by its own tasks
    if not task.done():
        task.cancel()
    elif not task.cancelled():
        task.exception()


def denied(exc: Exception) -> str:
    """Return what the server has against the login; empty when it is something else."""
    text = str(exc).lower()
    return next((f"access denied ({word})" for word in _DENIED if word in text), "")


def _credentials_file(jwt: str, seed: str) -> str:
    return (
        f"-----BEGIN NATS USER JWT-----\n{jwt}\n------END NATS USER JWT------\n\n"
        f"-----BEGIN USER NKEY SEED-----\n{seed}\n------END USER NKEY SEED------\n"
    )
