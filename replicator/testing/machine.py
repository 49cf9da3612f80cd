"""`CrashRecoveryMachine`: your application, and everything that can go wrong around it.

    class Shop(CrashRecoveryMachine):
        def create(self, connection):
            connection.execute("CREATE TABLE orders(id INTEGER PRIMARY KEY, amount INT)")

        @rule(amount=st.integers(1, 100))
        def order(self, amount):
            with self.transaction() as connection:
                connection.execute("INSERT INTO orders(amount) VALUES(?)", (amount,))

        def check(self, connection):
            assert connection.execute("SELECT count(*) FROM orders WHERE amount <= 0").fetchone() == (0,)

    TestShop = Shop.TestCase

It is a Hypothesis state machine: your rules and those below run in any order, and a failing order is shrunk to a short one. The rules that are here already:

| rule | what happens |
|---|---|
| `store_misbehaves` | errors, lost replies, repeats, delays, stale listings and cut connections by chance, from now on or no more |
| `acknowledge` | `wait()`; the newest state is promised from now on; a restore must yield exactly it |
| `restart` | the replicator is closed and started again |
| `crash` | the process is killed at some step, or the power is cut there; application and replicator start again on what the disk holds then |
| `lose_machine` | the database and all local state are gone; the database comes back from the replica |

`check` is asked about the live database after each rule. After each crash and each loss the replica is restored, and the copy must pass SQLite's `integrity_check` and your `check`, must be a state that a
transaction of yours has committed, and must not be older than the last one that was acknowledged. The live database must be in its last committed
state after a crash, and in the restored one after a loss. The machine works with the real engine, its threads included; the store is in memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from replicator.api import Replicator
from replicator.errors import NoBackups, ReplicatorError, WaitTimeout
from replicator.recover import restore
from replicator.storage.memory import MemoryClient
from replicator.testing.faults import Fault, FaultyClient
from replicator.testing.powercut import PowerCut, PowerLost

__all__ = ["CrashRecoveryMachine"]

TIMEOUT_S = 60.0
"""For everything that must come to an end. A run that needs so long has found a defect."""
STEP_S = 0.05
MISBEHAVIOUR = {Fault.ERROR: 0.1, Fault.LOST_REPLY: 0.1, Fault.DUPLICATE: 0.1, Fault.DELAY: 0.2, Fault.STALE_LIST: 0.1, Fault.CUT: 0.1}


class CrashRecoveryMachine(RuleBasedStateMachine):
    """A state machine to be subclassed: see the module's docstring.

    Attributes:
        database: path of the application's database. It changes at each crash; ask for it when you need it.
        replicator: the running replicator.
        store: the replica's client, whose faults can be chosen.
        options: keyword arguments of `Replicator`, for subclasses to change.
    """

    options: ClassVar[dict[str, Any]] = {"sync_interval_s": 0.01, "min_checkpoint_pages": 8}

    database: Path
    replicator: Replicator
    store: FaultyClient

    # -- for subclasses ----------------------------------------------------------------------------------------------------------

    def create(self, connection: sqlite3.Connection) -> None:
        """Make the schema in a new, empty database. The connection is in autocommit mode."""
        raise NotImplementedError

    def check(self, connection: sqlite3.Connection) -> None:
        """Raise `AssertionError` when something of the application's does not hold in a database: the live one, or a restored copy."""

    def started(self) -> None:
        """Called when application and replicator have been started, at the beginning and after each crash."""

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Run the block in a transaction of the application's, which is rolled back when the block raises."""
        self.connection.execute("BEGIN IMMEDIATE")
        try:
            yield self.connection
        except BaseException:
            self.connection.execute("ROLLBACK")
            raise
        self.connection.execute("COMMIT")
        self.committed()

    def committed(self) -> None:
        """Note that a transaction was committed. Applications that commit through connections of their own call it after each one."""
        self._history.append(_fingerprint(self.connection))

    # -- rules -------------------------------------------------------------------------------------------------------------------

    @invariant()
    def live_database_holds(self) -> None:
        # After each rule, so that an application's own mistake shows where it is made, whatever the threads of the replicator do.
        self.check(self.connection)

    @initialize(seed=st.integers(0, 2**32 - 1))
    def begin(self, seed: int) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="pyrepl-machine-"))
        self._lives = 0
        self._seed = seed
        self._remote = MemoryClient()
        self._faults: dict[Fault, float] = {}
        self._acknowledged = 0
        self._disk = self._folder / "disk-0"
        self._disk.mkdir()
        self.database = self._disk / "application.db"
        connection = _connect(self.database)
        self.create(connection)
        self._history = [_fingerprint(connection)]
        connection.close()
        self._start()

    @rule(faults=st.sampled_from([{}, MISBEHAVIOUR]))
    def store_misbehaves(self, faults: dict[Fault, float]) -> None:
        self._faults = self.store.faults = dict(faults)

    @rule()
    def acknowledge(self) -> None:
        self._wait()
        copy = self._restored()
        assert _state(copy) == self._history[-1], "what was acknowledged is not what is restored"

    @rule()
    def restart(self) -> None:
        with self.store.calm():
            self.replicator.close(TIMEOUT_S)
        self._acknowledged = len(self._history) - 1
        self._power.__exit__(None, None, None)
        self.connection.close()
        self._start()

    @rule(how=st.sampled_from(["kill", "power cut"]), after=st.integers(0, 40), seed=st.integers(0, 2**32 - 1))
    def crash(self, how: str, after: int, seed: int) -> None:
        self._power.cut_after(after)
        with contextlib.suppress(PowerLost, WaitTimeout):
            self._wait(give_up=lambda: self._power.is_lost)
        disk = self._folder / f"disk-{self._lives}"
        with self._ended():
            if how == "power cut":
                self._power.disk(disk, seed=seed)
            else:
                PowerCut.copy_after_kill(self._disk, disk)
        self._disk, self.database = disk, disk / "application.db"
        newest = self._history[-1]
        live = _connect(self.database)
        try:
            assert _fingerprint(live) == newest, "the database lost a transaction: SQLite, or what somebody did to its files"
            self.check(live)
        finally:
            live.close()
        self._check_restored()
        self._start()

    @rule()
    def lose_machine(self) -> None:
        disk = self._folder / f"disk-{self._lives}"
        self._power.cut()
        with self._ended():
            disk.mkdir()
        self._disk, self.database = disk, disk / "application.db"
        at = self._check_restored()
        if at is None:  # nothing was ever stored, nothing was acknowledged
            connection = _connect(self.database)
            self.create(connection)
            connection.close()
            at = 0
            self._history = [_state(self.database)]
        else:
            restore(self._remote, self.database)
            del self._history[at + 1 :]
        self._acknowledged = min(self._acknowledged, len(self._history) - 1)
        self._start()

    def teardown(self) -> None:
        if not hasattr(self, "_power"):
            return
        try:
            if self._runs:  # else what went wrong is being raised
                self.store.faults = {}
                self.acknowledge()
        finally:
            with contextlib.suppress(ReplicatorError):
                self.replicator.close(TIMEOUT_S)
            self._power.__exit__(None, None, None)
            self.connection.close()
            shutil.rmtree(self._folder, ignore_errors=True)

    # -- machinery ---------------------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        self._lives += 1
        self._runs = False
        self.connection = _connect(self.database)
        self.store = FaultyClient(self._remote, seed=self._seed + self._lives, faults=self._faults, max_delay_s=0.005)
        self._power = PowerCut(self._disk)
        self._power.__enter__()
        try:
            with self.store.calm():
                self.replicator = Replicator(self.database, self.store, **self.options).start()
        except BaseException:
            self._power.__exit__(None, None, None)
            raise
        self._runs = True
        self.started()

    def _wait(self, give_up: Any = lambda: False) -> None:
        """Wait until everything is stored; then the newest state counts as acknowledged."""
        newest = len(self._history) - 1
        end = time.monotonic() + TIMEOUT_S
        while not give_up():
            try:
                self.replicator.wait(timeout_s=STEP_S)
            except WaitTimeout:
                if time.monotonic() > end:
                    raise
                continue
            self._acknowledged = max(self._acknowledged, newest)
            return

    @contextlib.contextmanager
    def _ended(self) -> Iterator[None]:
        """End application and replicator at once; during the block their files are as they left them."""
        self._runs = False
        self._power.cut()
        self.store.disconnect()
        _halt(self.replicator)
        try:
            yield
        finally:
            self._power.__exit__(None, None, None)
            self.replicator._engine.close()
            self.connection.close()

    def _restored(self) -> Path:
        copy = self._folder / "restored.db"
        copy.unlink(missing_ok=True)
        restore(self._remote, copy, integrity_check="full")
        connection = _connect(copy)
        try:
            self.check(connection)
        finally:
            connection.close()
        return copy

    def _check_restored(self) -> int | None:
        """Restore, and return which committed state it is; None when nothing is stored and nothing had to be."""
        try:
            copy = self._restored()
        except NoBackups:
            assert not self._acknowledged, "acknowledged transactions are gone"
            return None
        state = _state(copy)
        assert state in self._history, "the restored database is in a state that was never committed"
        newest = len(self._history) - 1 - self._history[::-1].index(state)
        assert newest >= self._acknowledged, "acknowledged transactions are gone"
        return newest


def _halt(replicator: Replicator) -> None:
    """End the threads of a replicator between any two steps, without a last sync."""
    board = replicator._board
    with board.changed:
        board.stop = True
        board.changed.notify_all()
    for thread in replicator._threads:
        thread.join(TIMEOUT_S)
        assert not thread.is_alive(), f"{thread.name} does not end"


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None, timeout=30, check_same_thread=False)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA wal_autocheckpoint=50")
    return connection


def _state(path: Path) -> str:
    connection = sqlite3.connect(path)
    try:
        return _fingerprint(connection)
    finally:
        connection.close()


def _fingerprint(connection: sqlite3.Connection) -> str:
    """Return a digest of everything that SQL can see in a database."""
    digest = hashlib.sha256()
    for line in connection.iterdump():
        digest.update(line.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
