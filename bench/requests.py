"""How many requests does one database cost? Ours and the released Litestream side by side, counted by a proxy before one S3 server.

    python -m bench.requests [SECONDS]

Three databases for each: one that nobody writes to, one write a minute, one write a second. Both run with their defaults. The counts of the
first minutes (start-up, and the first merges of a new replica) are shown apart; the rest is scaled to a month of 30 days. Full images are daily and hence
not in it: one PUT a day for each database that was written to.

Prices are those of S3 Standard in us-east-1: 0.005 USD for a thousand PUT and LIST requests, 0.0004 for GET and HEAD. Deletes are free, and come in
batches whose keys are in the body, so that they are not told apart here.
"""

from __future__ import annotations

import http.client
import os
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

from tests.servers import ACCESS, BUCKET, SECRET, serve, tool

WARM_UP_S = 330
MONTH_S = 30 * 86400
RATES = {"idle": None, "a write a minute": 60.0, "a write a second": 1.0}
PRICES = {"PUT": 5e-6, "LIST": 5e-6, "GET": 4e-7, "HEAD": 4e-7, "DELETE": 0.0}


class Counting:
    """A proxy that counts by first path component and kind."""

    def __init__(self, target: str) -> None:
        self.counts: dict[str, Counter[str]] = {}
        self._lock = threading.Lock()
        host = urlsplit(target).netloc
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def forward(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                outer.count(self.command, self.path)
                connection = http.client.HTTPConnection(host, timeout=60)
                connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                for name, value in self.headers.items():
                    connection.putheader(name, value)
                connection.endheaders(body)
                reply = connection.getresponse()
                data = reply.read()
                self.send_response(reply.status)
                for name, value in reply.getheaders():
                    if name.lower() not in ("transfer-encoding", "connection"):
                        self.send_header(name, value)
                if self.command != "HEAD" and reply.getheader("Content-Length") is None:
                    self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
                connection.close()

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = forward

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"

    def count(self, method: str, path: str) -> None:
        parts = urlsplit(path)
        text = parts.path + "?" + parts.query
        name = next((key for key in self.counts if key in text), "other")
        kind = method
        if method == "GET" and "list-type=2" in parts.query:
            kind = "LIST"
        elif method == "POST":
            kind = "DELETE" if "delete" in parts.query else "PUT"
        with self._lock:
            self.counts.setdefault(name, Counter())[kind] += 1


def write(path: Path, every_s: float | None, stop: threading.Event) -> None:
    connection = sqlite3.connect(path, isolation_level=None, timeout=30)
    while not stop.wait(every_s):
        connection.execute("INSERT INTO t(v) VALUES(randomblob(200))")
    connection.close()


def main(seconds: float) -> int:
    folder = Path(tempfile.mkdtemp(prefix="bench-requests-"))
    (folder / "weed").mkdir()
    # With AWS_CA_BUNDLE set the released Litestream cannot start.
    inherited = {name: value for name, value in os.environ.items() if name != "AWS_CA_BUNDLE"}
    environment = {**inherited, "AWS_ACCESS_KEY_ID": ACCESS, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_EC2_METADATA_DISABLED": "true"}
    stop = threading.Event()
    with serve("seaweed", folder / "weed") as server:
        proxy = Counting(server.endpoint)
        processes, threads = [], []
        for engine in ("ours", "peer"):
            for number, every_s in enumerate(RATES.values()):
                name = f"{engine}-{number}"
                proxy.counts[name] = Counter()
                database = folder / f"{name}.db"
                connection = sqlite3.connect(database)
                connection.execute("PRAGMA journal_mode=WAL")
                connection.execute("CREATE TABLE t(id INTEGER PRIMARY KEY, v BLOB)")
                connection.execute("INSERT INTO t(v) VALUES(randomblob(200))")
                connection.commit()
                connection.close()
                url = f"s3://{BUCKET}/{name}?endpoint={proxy.endpoint}&region=us-east-1&forcePathStyle=true"
                command = [sys.executable, "-m", "replicator"] if engine == "ours" else [tool("litestream")]
                log = (folder / f"{name}.log").open("wb")
                processes.append(subprocess.Popen([*command, "replicate", str(database), url], stdout=log, stderr=log, env=environment))
                threads.append(threading.Thread(target=write, args=(database, every_s, stop)))
        for thread in threads:
            thread.start()
        time.sleep(WARM_UP_S)
        first = {name: Counter(counts) for name, counts in proxy.counts.items()}
        time.sleep(seconds)
        last = {name: Counter(counts) for name, counts in proxy.counts.items()}
        stop.set()
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(60)
        for thread in threads:
            thread.join()
        proxy.server.shutdown()
    print(f"Measured for {seconds:.0f} s after {WARM_UP_S} s of start-up, scaled to 30 days.\n")
    print("| database | engine | start-up | PUT | LIST | GET | USD a month |")
    print("|---|---|---|---|---|---|---|")
    for number, title in enumerate(RATES):
        for engine, shown in (("ours", "pyrepl"), ("peer", "Litestream 0.5.17")):
            name = f"{engine}-{number}"
            month = {kind: (last[name][kind] - first[name][kind]) * MONTH_S / seconds for kind in PRICES}
            cost = sum(month[kind] * price for kind, price in PRICES.items())
            gets = month["GET"] + month["HEAD"]
            print(
                f"| {title} | {shown} | {sum(first[name].values())} | {month['PUT']:,.0f} | {month['LIST']:,.0f} | {gets:,.0f} | {cost:.2f} |"
            )
    print(f"\nOther requests (start of the server, probes): {sum(last.get('other', Counter()).values())}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]) if len(sys.argv) > 1 else 900.0))
