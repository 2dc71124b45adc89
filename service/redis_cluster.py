"""Commands to the masters of a Redis Cluster, each by the line of the master that serves its user's slot.

`redis+cluster://host:port,host:port` (`rediss+cluster://` over TLS) names some nodes of it; the rest is asked for. The
map of slots is asked for again when a master fails or says that a slot has moved: after that the commands go out once
more. A master that is gone costs its own users the cache until a replica takes its place, nobody else.

The epoch of a key holds the node's configuration epoch too. A node that takes over a slot gets one that is greater than
all others, so a slot that leaves a node and comes back finds none of the entries that it left there; a process that
did not notice looks once a second.
"""

from __future__ import annotations

import asyncio
import logging
import random
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final
from urllib.parse import urlsplit

from redis.asyncio import Redis
from redis.asyncio.connection import AbstractConnection
from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot
from redis.exceptions import MovedError, RedisError

from service.redis_line import PAUSE, Command, Failed, Greeting, RedisDown, RedisLine, create_redis, key_of

log = logging.getLogger(__name__)

SCHEMES: Final = {"redis+cluster": "redis", "rediss+cluster": "rediss"}
PORT: Final = 6379

Node = tuple[str, int]  # host and port
Slots = tuple[Node | None, ...]  # the master of each slot


def is_cluster(url: str) -> bool:
    """Whether the URL names a cluster."""
    return _split(url)[0] in SCHEMES


def nodes_of(url: str) -> list[Node]:
    """The nodes that the URL names. Raises ValueError when it names none, or not as host:port."""
    _, _, hosts, _ = _split(url)
    parts = [urlsplit(f"//{host}") for host in hosts.split(",")]
    if not all(part.hostname for part in parts):
        raise ValueError(
            f"{url.rsplit('@', maxsplit=1)[-1]!r} does not name nodes of a cluster: redis+cluster://host:port,host:port"
        )
    return [(part.hostname or "", part.port or PORT) for part in parts]


def url_of(url: str, node: Node) -> str:
    """The URL of one node, with the name, password and options of the cluster's."""
    scheme, login, _, rest = _split(url)
    host = f"[{node[0]}]" if ":" in node[0] else node[0]
    return f"{SCHEMES[scheme]}://{login}{host}:{node[1]}{rest}"


def _split(url: str) -> tuple[str, str, str, str]:
    """Scheme, login with its @, hosts, and what follows. urlsplit takes one host, and refuses a bracket further on."""
    scheme, _, after = url.partition("://")
    netloc = re.split("[/?#]", after, maxsplit=1)[0]
    login, at, hosts = netloc.rpartition("@")
    return scheme.lower(), login + at, hosts, after[len(netloc) :]


class RedisCluster:
    """Clients for the masters, made when they are needed. `timeout` as for `create_redis`; ValueError for a bad URL."""

    def __init__(self, url: str, scripts: Sequence[str], *, timeout: float) -> None:
        self.url, self.timeout = url, timeout
        alone = Greeting(tuple(scripts))
        self.greeting = replace(alone, who=(*alone.who, ("CLUSTER", "INFO")), life=(*alone.life, b"cluster_my_epoch"))
        self.seeds = nodes_of(url)
        self.clients: dict[Node, Redis] = {}

    def client(self, node: Node) -> Redis:
        """The client for one node, always the same one."""
        if node not in self.clients:
            self.clients[node] = create_redis(url_of(self.url, node), self.greeting, timeout=self.timeout)
        return self.clients[node]

    async def keep(self, nodes: set[Node]) -> None:
        """Forget the clients of all others."""
        for node in self.clients.keys() - nodes:
            await self.clients.pop(node).aclose()

    async def slots(self, node: Node) -> Slots:
        """Who serves each slot, as this node has it. Raises RedisError or OSError."""
        pool = self.client(node).connection_pool
        # Not from the pool: a replica may answer this, but nothing else.
        connection: AbstractConnection = pool.connection_class(
            **pool.connection_kwargs | {"redis_connect_func": None, "client_name": "upnext-slots"}
        )
        try:
            await connection.connect()  # type: ignore[no-untyped-call]
            await connection.send_command("CLUSTER", "SLOTS")
            return slots_of(await connection.read_response(), node[0])
        finally:
            await connection.disconnect()

    async def aclose(self) -> None:
        """Close all connections."""
        await self.keep(set())


def slots_of(reply: Sequence[Any], asked: str) -> Slots:
    """The map in a reply to CLUSTER SLOTS. A node without an address is the one that was asked."""
    slots: list[Node | None] = [None] * REDIS_CLUSTER_HASH_SLOTS
    for first, last, (host, port, *_), *_ in reply:
        name = host.decode() if host and host != b"?" else asked
        slots[first : last + 1] = [(name, port)] * (last + 1 - first)
    return tuple(slots)


class ClusterLines:
    """`RedisLine` for a cluster: one line for each master."""

    def __init__(self, cluster: RedisCluster, failed: Failed) -> None:
        self.cluster = cluster
        self.tell = failed
        self.slots: Slots = ()
        self.lines: dict[Node, RedisLine] = {}
        self.learning: asyncio.Task[bool] | None = None
        self.paused_until = 0.0

    async def ask(self, commands: Sequence[Command]) -> list[Any]:
        """The replies, in order. Raises RedisDown when a master did not take all of its commands."""
        slots = self.slots
        if not slots and not await self._learn():
            raise RedisDown("no node of the cluster tells its slots")
        try:
            return await self._ask(commands)
        except RedisDown as error:
            moved = isinstance(error.__cause__, MovedError)
            if self.slots is slots:
                learning = self._learn()
                # A master that does not answer shall not cost its users the time that others take to say who does.
                if not moved or not await learning:
                    raise
            elif not moved and any(command.once for command in commands):
                raise
        return await self._ask(commands)  # all of them: each of these may run twice

    async def ping(self) -> None:
        """Raises RedisDown unless every master is usable right now."""
        await self.ask([])
        for line in self._masters():
            await line.ping()

    async def drop_all(self) -> None:
        """Delete all keys of all users on all masters. Raises RedisDown."""
        await self.ask([])
        for line in self._masters():
            await line.drop_all()

    async def _ask(self, commands: Sequence[Command]) -> list[Any]:
        places: dict[RedisLine, list[int]] = {}
        for place, command in enumerate(commands):
            places.setdefault(self._line(command), []).append(place)
        found = await asyncio.gather(
            *(line.ask([commands[place] for place in mine]) for line, mine in places.items()), return_exceptions=True
        )
        replies: list[Any] = [None] * len(commands)
        for answered, mine in zip(found, places.values(), strict=True):
            if isinstance(answered, BaseException):
                raise answered
            for place, reply in zip(mine, answered, strict=True):
                replies[place] = reply
        return replies

    def _line(self, command: Command) -> RedisLine:
        node = self.slots[key_slot(key_of("", command.user_id).encode())]
        if node is None:
            raise RedisDown("no master serves the slot")
        return self._line_to(node)

    def _line_to(self, node: Node) -> RedisLine:
        if node not in self.lines:
            self.lines[node] = RedisLine(self.cluster.client(node), self.tell)
        return self.lines[node]

    def _masters(self) -> list[RedisLine]:
        return [self._line_to(node) for node in dict.fromkeys(self.slots) if node is not None]

    def _learn(self) -> asyncio.Future[bool]:
        """Ask for the map of slots again, at most each PAUSE, once for all that wait; whether it changed."""
        loop = asyncio.get_running_loop()
        if self.learning is None:
            if loop.time() < self.paused_until:
                unchanged: asyncio.Future[bool] = loop.create_future()
                unchanged.set_result(False)
                return unchanged
            self.learning = asyncio.create_task(self._read_slots())
        return asyncio.shield(self.learning)

    async def _read_slots(self) -> bool:
        try:
            nodes = list(dict.fromkeys([*(node for node in self.slots if node is not None), *self.cluster.seeds]))
            # Any of them may be cut off from the others and not know it.
            for node in random.sample(nodes, len(nodes)):
                try:
                    found = await self.cluster.slots(node)
                except (RedisError, OSError) as error:
                    log.warning("a node of the Redis Cluster does not tell its slots: %r", error)
                    continue
                if changed := found != self.slots:
                    masters = {node for node in found if node is not None}
                    self.slots, self.lines = found, {n: line for n, line in self.lines.items() if n in masters}
                    for line in self.lines.values():
                        line.doubted = asyncio.get_running_loop().time()
                    await self.cluster.keep(masters | {*self.cluster.seeds})
                return changed
            self.tell("redis")
            return False
        finally:
            self.learning = None
            self.paused_until = asyncio.get_running_loop().time() + PAUSE
