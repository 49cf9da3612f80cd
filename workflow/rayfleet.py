"""Hosts of a fleet as actors of a Ray cluster: one for each node, started again elsewhere when the node is lost; a scheduler that knows where runs are warm.

Ray places and wakes. Who may run what stays with leases and appends: an actor is an `Engine(fleet=True)` in a folder of its node, and what Ray believes about it is never asked. When a
node is lost two things happen, whichever is first: the other hosts find its lease over and divide its runs, or Ray has started the actor elsewhere and that takes its own
host over. The loser of the two begins as a host without runs.

    fleet = RayFleet("s3://bucket/agents", ["my_flows"])
    await fleet.begin()
    await fleet.start("research", id="otters-1", topic="otters")
    await fleet.send("otters-1", "approval", True)
    await fleet.drain(node_id)

Needs the extra `ray`. All of a cluster's processes must find the modules of the flows (`runtime_env` of `ray.init`, or an image).
"""

from __future__ import annotations

import argparse
import asyncio
import concurrent.futures
import contextlib
import importlib
import logging
import secrets
import tempfile
import threading
from collections.abc import Coroutine, Mapping, Sequence
from hashlib import sha256
from typing import Any, TypeVar

from workflow.client import Client
from workflow.engine import Engine
from workflow.errors import HostInUse, NotOwner, WorkflowError
from workflow.membership import HostRecord
from workflow.placement import first

__all__ = ["HostActor", "RayFleet", "Scheduler", "resources_of"]

log = logging.getLogger(__name__)
T = TypeVar("T")

NAMESPACE = "pyrepl-workflow"
LOOK_S = 2.0
ANSWER_S = 10.0
A_LITTLE = 0.01
"""CPUs that a host asks of Ray: for actors that ask for none it takes no notice of a node that is only preferred."""
GIB = 1 << 30


def resources_of(total: Mapping[str, float]) -> dict[str, float]:
    """Return what a node of Ray has, in the names of `@flow(needs=)`: cpu, gpu, memory_gib, and its custom resources as they are named."""
    known = {"CPU": ("cpu", 1.0), "GPU": ("gpu", 1.0), "memory": ("memory_gib", 1.0 / GIB)}
    found = {}
    for name, amount in total.items():
        if name != "object_store_memory" and not name.startswith("node:"):
            new, factor = known.get(name, (name, 1.0))
            found[new] = amount * factor
    return found


class HostActor:
    """A host: an engine in a thread with an event loop of its own, so that Ray's tasks and those of flows do not meet."""

    def __init__(self, url: str, host: str, modules: Sequence[str], settings: Mapping[str, Any]) -> None:
        """Begin; `resources` of the engine are those of the node on which this is."""
        import ray

        for module in modules:
            importlib.import_module(module)
        self.node = ray.get_runtime_context().get_node_id()
        total: Mapping[str, float] = next((node["Resources"] for node in ray.nodes() if node["NodeID"] == self.node), {})
        self._url, self._host = url, host
        self._settings = {"resources": resources_of(total)} | dict(settings)
        self._loop = asyncio.new_event_loop()
        self._engine: Engine | None = None
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="workflow host", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self._loop.run_until_complete(self._live())

    async def _live(self) -> None:
        """Be a host; when others have taken it over, be one again, without runs."""
        while not self._stop.is_set():
            try:
                with tempfile.TemporaryDirectory(prefix="pyrepl-wf-ray-") as folder:
                    async with Engine(folder, replica=self._url, host=self._host, fleet=True, **self._settings) as engine:
                        self._engine = engine
                        lost, stop = (asyncio.ensure_future(item) for item in (engine.until_lost(), self._stop.wait()))
                        done, _ = await asyncio.wait({lost, stop}, return_when=asyncio.FIRST_COMPLETED)
                        lost.cancel()
                        stop.cancel()
                        for item in done:
                            item.result()
            except (HostInUse, NotOwner) as error:
                log.warning("host begins again host=%s reason=%r", self._host, str(error))
                await asyncio.sleep(1.0)
            finally:
                self._engine = None

    async def _do(self, work: Coroutine[Any, Any, T]) -> T:
        future: concurrent.futures.Future[T] = asyncio.run_coroutine_threadsafe(work, self._loop)
        return await asyncio.wrap_future(future)

    async def advance(self, id: str) -> bool:
        """Look for what waits for a run; False when it is not this host's, or this host has not begun."""
        return self._engine is not None and await self._do(self._engine.advance(id))

    async def stand(self) -> tuple[str, HostRecord | None]:
        """Return the node, and how this host stands; None when it has not begun."""
        engine = self._engine
        return self.node, await asyncio.to_thread(engine.record) if engine is not None else None

    async def look(self) -> None:
        """Look at the other hosts, and for requests, now."""
        if self._engine is not None:
            with contextlib.suppress(WorkflowError):
                await self._do(self._engine.look_at_fleet())
                await self._do(self._engine.look_into_inbox())

    async def drain(self) -> None:
        """End in order: bodies end, all is stored, the lease is released. Others take over at their next look."""
        self._loop.call_soon_threadsafe(self._stop.set)
        await asyncio.to_thread(self._thread.join)


class Scheduler:
    """Starts a host for each node, and tells hosts what to look at. Remembers nothing that it could not ask for again."""

    def __init__(self, url: str, modules: Sequence[str], settings: Mapping[str, Any]) -> None:
        self._url, self._modules, self._settings = url, tuple(modules), dict(settings)
        self._actors: dict[str, Any] = {}
        self._nodes: dict[str, str] = {}
        self._drained: set[str] = set()
        self._warm: dict[str, str] = {}
        self._client = Client(url)
        self._looking: asyncio.Task[None] | None = None

    async def begin(self) -> None:
        """Start a host on each node; those of nodes that come later follow."""
        if self._looking is None:
            self._place()
            self._looking = asyncio.get_running_loop().create_task(self._keep_placing())

    async def _keep_placing(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            self._place()

    def _place(self) -> None:
        """Give each node that has no host one, and find hosts that were started before this scheduler was."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        for node in ray.nodes():
            id = node["NodeID"]
            if not node["Alive"] or id in self._nodes or id in self._drained or not node["Resources"].get("CPU"):
                continue
            host = self._nodes[id] = f"ray-{id[:16]}"
            place = NodeAffinitySchedulingStrategy(id, soft=True)  # elsewhere when it is lost
            self._actors[host] = (
                ray.remote(HostActor)
                .options(
                    name=f"{_name(self._url)}-{host}", namespace=NAMESPACE, lifetime="detached", get_if_exists=True, num_cpus=A_LITTLE,
                    max_restarts=-1, max_task_retries=0, scheduling_strategy=place,
                )
                .remote(self._url, host, self._modules, self._settings)
            )  # fmt: skip
        prefix = f"{_name(self._url)}-"
        for item in ray.util.list_named_actors(all_namespaces=True):
            host = item["name"].removeprefix(prefix)
            if item["namespace"] == NAMESPACE and item["name"].startswith(prefix) and host not in self._actors:
                with contextlib.suppress(ValueError):  # it has ended at this moment
                    self._actors[host] = ray.get_actor(item["name"], namespace=NAMESPACE)

    async def _ask(self, host: str, method: str, *args: Any) -> Any:
        """Ask an actor; None when it does not answer, which says nothing about its runs."""
        import ray

        try:
            return await asyncio.wait_for(getattr(self._actors[host], method).remote(*args), ANSWER_S)
        except (ray.exceptions.RayError, TimeoutError) as error:
            log.warning("host does not answer host=%s error=%r", host, str(error)[:200])
            return None

    async def hosts(self) -> list[HostRecord]:
        """Return the hosts that answer (see `Distribution`)."""
        return [record for _, record in await self._standing()]

    async def _standing(self) -> list[tuple[str, HostRecord]]:
        await self.begin()  # after a restart of its own
        answers = await asyncio.gather(*(self._ask(host, "stand") for host in self._actors))
        return [(node, record) for node, record in filter(None, answers) if record is not None]

    async def where(self) -> dict[str, str]:
        """Return the node of each host that answers."""
        return {record.host: node for node, record in await self._standing()}

    async def advance(self, id: str) -> str | None:
        """Tell the host where a run is warm, else all of them (see `Distribution`)."""
        await self.begin()
        first_host = self._warm.get(id)
        if first_host in self._actors and await self._ask(str(first_host), "advance", id):
            return first_host
        others = [host for host in self._actors if host != first_host]
        answers = await asyncio.gather(*(self._ask(host, "advance", id) for host in others))
        found = next((host for host, has_it in zip(others, answers, strict=True) if has_it), None)
        if found is not None:
            self._warm[id] = found
        return found

    async def start(self, flow: str, id: str, arguments: Mapping[str, Any]) -> str | None:
        """Ask for a run, durably, and let the host look that has what the flow needs; returns that."""
        await self._client.start(flow, id=id, **arguments)
        host = first(id, flow, [record.candidate() for record in await self.hosts()])
        if host is not None:
            self._warm[id] = host
            await self._ask(host, "look")
        return host

    async def send(self, id: str, type: str, payload: Any, event: str) -> str | None:
        """Send an event, durably, and wake its run."""
        await self._client.run(id).send(type, payload, id=event)
        return await self.advance(id)

    async def drain(self, node: str) -> None:
        """Empty a node: its host ends in order, and the others take over at once."""
        import ray

        self._drained.add(node)
        for host in [host for host, on in (await self.where()).items() if on == node]:
            actor = self._actors.pop(host)
            with contextlib.suppress(ray.exceptions.RayError):
                await actor.drain.remote()
            ray.kill(actor, no_restart=True)
        await asyncio.gather(*(self._ask(host, "look") for host in self._actors))

    async def end(self) -> None:
        """End all hosts in order."""
        import ray

        if self._looking is not None:
            self._looking.cancel()
        actors, self._actors = list(self._actors.values()), {}
        with contextlib.suppress(ray.exceptions.RayError):
            await asyncio.gather(*(actor.drain.remote() for actor in actors))
        for actor in actors:
            ray.kill(actor, no_restart=True)


class RayFleet:
    """A fleet on a Ray cluster, from any process that is connected to it (`ray.init`). A `Distribution`."""

    def __init__(self, url: str, modules: Sequence[str], **settings: Any) -> None:
        """Nothing is started yet.

        Args:
            url: the root of all runs, which every node reaches.
            modules: that have the flows.
            settings: of each `Engine`, such as `lease_ttl_s=`.
        """
        self._url, self._modules, self._settings = url, tuple(modules), settings
        self._scheduler: Any = None

    async def begin(self) -> None:
        """Start the scheduler and the hosts, or find those that are there."""
        import ray

        options = {
            "name": _name(self._url),
            "namespace": NAMESPACE,
            "lifetime": "detached",
            "get_if_exists": True,
            "num_cpus": 0,
            "max_restarts": -1,
            "max_task_retries": -1,  # all that it is asked for may be done twice
        }
        self._scheduler = ray.remote(Scheduler).options(**options).remote(self._url, self._modules, self._settings)
        await self._scheduler.begin.remote()

    async def hosts(self) -> list[HostRecord]:
        """Return the hosts that answer."""
        return list(await self._scheduler.hosts.remote())

    async def where(self) -> dict[str, str]:
        """Return the node of each host that answers."""
        return dict(await self._scheduler.where.remote())

    async def advance(self, id: str) -> str | None:
        """Tell the host of a run that there may be something to do; returns its name."""
        return _text(await self._scheduler.advance.remote(id))

    async def start(self, flow: str, *, id: str, **arguments: Any) -> str | None:
        """Start a run; returns the host that begins it at once, None when none can now: it is begun by the first that can."""
        return _text(await self._scheduler.start.remote(flow, id, arguments))

    async def send(self, id: str, type: str, payload: Any = None) -> str | None:
        """Send an event to a run, and wake it."""
        return _text(await self._scheduler.send.remote(id, type, payload, secrets.token_hex(16)))

    async def drain(self, node: str) -> None:
        """Empty a node, by its id in Ray: before it is taken away."""
        await self._scheduler.drain.remote(node)

    async def end(self) -> None:
        """End all hosts in order; runs go on when a fleet begins again."""
        import ray

        await self._scheduler.end.remote()
        ray.kill(self._scheduler, no_restart=True)


def parser() -> argparse.ArgumentParser:
    """Return the command line of `python -m workflow.rayfleet`."""
    made = argparse.ArgumentParser(description="Start a fleet on the Ray cluster of this machine, or empty a node of it.")
    made.add_argument("url", help="the root of all runs")
    made.add_argument("modules", nargs="+", help="that have the flows")
    made.add_argument("--lease-ttl", type=float, default=30.0, help="seconds without a sign of life after which others take over")
    made.add_argument("--poll", type=float, default=5.0, help="seconds between two looks at the others")
    made.add_argument("--drain", metavar="NODE_ID", help="let the host on this node end in order")
    return made


def main() -> int:
    """Run the command line; the fleet stays when this ends."""
    import ray

    options = parser().parse_args()
    ray.init(address="auto", ignore_reinit_error=True)

    async def run() -> None:
        fleet = RayFleet(options.url, options.modules, lease_ttl_s=options.lease_ttl, fleet_poll_s=options.poll)
        await fleet.begin()
        if options.drain:
            await fleet.drain(options.drain)

    asyncio.run(run())
    return 0


def _text(answer: Any) -> str | None:
    return None if answer is None else str(answer)


def _name(url: str) -> str:
    return f"fleet-{sha256(url.encode()).hexdigest()[:12]}"


if __name__ == "__main__":
    raise SystemExit(main())
