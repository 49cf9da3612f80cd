"""What hostile or unlucky files and sockets do to the command: one line that names the object, exit code 1, and soon."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import threading
import time
from pathlib import Path

import pytest

from replicator.cli import main
from replicator.errors import ConfigError
from replicator.server import Listener, Response, listen_tcp, listen_unix

LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30))


@pytest.mark.parametrize("lenient", [[], ["-lenient"]], ids=["strict", "lenient"])
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 10_000_000, "too large"),
        ("{a: " * 250_000, ""),
        ("- " * 500_000, "nested more than 32 levels deep"),
        (LAUGHS, "more than 100000 values, aliases included"),
        ("dbs: !!python/object/apply:os.system ['touch /tmp/x']", "tags are not supported"),
        ("dbs: &d [*d]", "alias without an anchor"),
        ("dbs: []\ndbs: []", "key given twice: dbs (first in line 1)"),
        ("dbs: []\n---\ndbs: []", "a second document"),
        ("dbs: 5", "dbs: must be a list"),
        ("dbs: [{path: {a: b}, replica: {path: r}}]", "dbs[0].path: must be text"),
        ("addr: [1]", "addr: must be text"),
        ("socket: {enabled: 1}", "socket.enabled: must be true or false"),
        ("\x00", ""),
    ],
    ids=lambda value: (value if len(value) < 40 else "")[:20] if isinstance(value, str) else None,
)
def test_configurations_that_are_refused(
    text: str, words: str, lenient: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "c.yml"
    path.write_text(text)
    began = time.process_time()
    assert main(["config", "check", "-config", str(path), *lenient]) == 1
    assert time.process_time() - began < 20
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith(f"Error: {path}:")
    assert words in said[0]
    assert len(said) <= 2
    assert max(map(len, said)) < 400


@pytest.mark.parametrize(
    ("text", "warning"),
    [
        ("nonsense: 1", "unknown key"),
        ("l0-retention: 300000000000", "300000000000 without a unit is 5m as Litestream reads it"),
        (
            "snapshot: {interval: 1h}\ndbs: [{path: a, snapshot: {interval: 2h}, replica: {path: r}}]",
            "snapshot.interval at the top level holds for all databases",
        ),
    ],
)
def test_lenient_makes_warnings_of_what_litestream_would_do_silently(
    text: str, warning: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "c.yml"
    path.write_text(text if "dbs" in text else f"{text}\ndbs: [{{path: a, replica: {{path: r}}}}]")
    assert main(["config", "check", "-config", str(path)]) == 1
    assert "-lenient makes this a warning" in capsys.readouterr().err
    assert main(["config", "check", "-config", str(path), "-lenient"]) == 0
    said = capsys.readouterr().out
    assert warning in said
    assert "ok: 1 databases, 1 warnings" in said


@pytest.mark.parametrize("what", ["file", "folder", "link", "fifo"])
def test_a_socket_path_where_something_else_is(tmp_path: Path, what: str) -> None:
    path = tmp_path / "s.sock"
    if what == "file":
        path.write_text("precious")
    elif what == "folder":
        path.mkdir()
    elif what == "link":
        path.symlink_to("elsewhere")
    else:
        os.mkfifo(path)
    with pytest.raises(ConfigError, match="exists but is not a socket") as caught:
        listen_unix(path, 0o600)
    assert caught.value.hint
    assert os.path.lexists(path)


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET])
def test_a_socket_that_somebody_serves_is_left_alone_and_a_stale_one_is_replaced(tmp_path: Path, kind: int) -> None:
    path = tmp_path / "s.sock"
    with socket.socket(socket.AF_UNIX, kind) as other:
        other.bind(str(path))
        if kind != socket.SOCK_DGRAM:
            other.listen(1)
        inode = path.stat().st_ino
        with pytest.raises(ConfigError, match="another process serves the control socket") as caught:
            listen_unix(path, 0o600)
        assert caught.value.hint
        assert path.stat().st_ino == inode
    made = listen_unix(path, 0o600)  # the other one has ended, and its file is still there
    made.close()


def test_a_socket_whose_server_accepts_nothing_is_served_all_the_same(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    waiting = []
    with socket.socket(socket.AF_UNIX) as busy:
        busy.bind(str(path))
        busy.listen(0)
        for _ in range(3):  # until nobody else fits in
            asking = socket.socket(socket.AF_UNIX)
            asking.setblocking(False)
            waiting.append(asking)
            try:
                asking.connect(str(path))
            except BlockingIOError:
                break
        began = time.monotonic()
        with pytest.raises(ConfigError, match="another process serves"):
            listen_unix(path, 0o600)
        assert time.monotonic() - began < 10
    for asking in waiting:
        asking.close()


class Exhausted(socket.socket):
    """A listening socket of a process that is out of descriptors for a while."""

    tries = 0

    def accept(self):  # type: ignore[no-untyped-def]
        type(self).tries += 1
        if type(self).tries <= 3:
            raise OSError(errno.EMFILE, "Too many open files")
        return super().accept()


def test_a_listener_without_descriptors_waits_and_serves_then() -> None:
    plain = listen_tcp("127.0.0.1", 0)
    listening = Exhausted(fileno=plain.detach())
    listener = Listener(listening, lambda request: Response(200, b"here"), "test")
    began = time.monotonic()
    listener.start()
    with socket.create_connection(listener.address, timeout=10) as asking:
        asking.sendall(b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n")
        assert b"here" in b"".join(iter(lambda: asking.recv(65536), b""))
    assert time.monotonic() - began >= 0.3  # it does not spin: a tenth of a second after each failure
    listener.close()
    assert Exhausted.tries < 10


def test_of_two_that_begin_at_once_at_a_stale_socket_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    for _ in range(100):
        with socket.socket(socket.AF_UNIX) as stale:
            path.unlink(missing_ok=True)
            stale.bind(str(path))
        ready, made, refused = threading.Barrier(3), list[socket.socket](), list[ConfigError]()

        def begin(ready: threading.Barrier = ready, made: list[socket.socket] = made, refused: list[ConfigError] = refused) -> None:
            ready.wait()
            try:
                made.append(listen_unix(path, 0o600))
            except ConfigError as error:
                refused.append(error)

        threads = [threading.Thread(target=begin) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(made), len(refused)) == (1, 2), refused
        with socket.socket(socket.AF_UNIX) as asking:
            asking.connect(str(path))
            made[0].accept()[0].close()
        made[0].close()


def test_whoever_holds_the_folders_lock_delays_the_socket_and_does_not_prevent_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("replicator.server.FOLDER_LOCK_S", 0.1)
    descriptor = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    began = time.monotonic()
    listen_unix(tmp_path / "s.sock", 0o600).close()
    assert time.monotonic() - began >= 0.1
    os.close(descriptor)
