"""The service as it runs in earnest, for benchmarks and harnesses: `python -m service` with real workers over HTTP.

Everything lies in one folder that goes away with the block. Nothing here is faster than in production: SQLite with
`synchronous=FULL`, PostgreSQL with fsync on.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx

from tests.servers import PostgresServer, RedisServer, free_port
from tests.worlds import World, cyclic, write_bundle

ROOT: Final = Path(__file__).resolve().parents[2]


@dataclass
class Stack:
    """A running service and what it stands on."""

    folder: Path
    port: int
    database: str  # sqlite or postgresql
    environment: dict[str, str]
    redis: RedisServer
    postgres: PostgresServer | None
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def database_url(self) -> str:
        """Of the event log."""
        return self.environment["UPNEXT_DATABASE_URL"]

    def start(self) -> None:
        """Start the launcher, and wait until a worker is ready."""
        command = [sys.executable, "-m", "service"]
        with (self.folder / "service.log").open("ab") as log:
            self.process = subprocess.Popen(command, cwd=self.folder, env=self.environment, stderr=log)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if httpx.get(f"{self.url}/readyz").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.05)
        raise RuntimeError(f"the service is not ready; its last words:\n{self.said()}")

    def said(self) -> str:
        """The end of what the service wrote."""
        return (self.folder / "service.log").read_text()[-2_000:]

    def workers(self) -> list[int]:
        """The process ids of the workers; of the service itself where it has no others."""
        assert self.process is not None
        below = descendants(self.process.pid)
        return [pid for pid in below if b"spawn_main" in _command(pid)] or [self.process.pid]

    def stop(self) -> None:
        """Stop as an operator does."""
        if self.process is None:
            return
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process = None


@contextmanager
def stack(
    database: str, *, workers: int = 2, world: World | None = None, bundles: Path | None = None, **settings: Any
) -> Iterator[Stack]:
    """A service on `bundles`, or on a bundle of `world`, with a Redis and a database of its own, ready to be asked."""
    with ExitStack() as closing:
        folder = Path(tempfile.mkdtemp(prefix="upnext-bench-", dir=os.environ.get("UPNEXT_BENCH_DIR")))
        closing.callback(shutil.rmtree, folder, ignore_errors=True)
        if bundles is None:
            write_bundle(folder / "bundles", world or cyclic(500))
        redis = closing.enter_context(RedisServer())
        postgres = closing.enter_context(PostgresServer(durable=True)) if database == "postgresql" else None
        url = asyncio.run(postgres.new_database()) if postgres else f"sqlite:///{folder / 'log.db'}"
        port = free_port()
        chosen = {
            "PORT": port, "WORKERS": workers, "BUNDLES": bundles or folder / "bundles", "DATABASE_URL": url,
            "REDIS_URL": redis.url, **{name.upper(): value for name, value in settings.items()},
        }  # fmt: skip
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("UPNEXT_", "PROMETHEUS_"))}
        environment = kept | {f"UPNEXT_{k}": str(v) for k, v in chosen.items()} | {"PYTHONPATH": str(ROOT)}
        found = Stack(folder, port, database, environment, redis, postgres)
        closing.callback(found.stop)
        found.start()
        yield found


def descendants(pid: int) -> list[int]:
    """All processes below `pid`, from /proc."""
    try:
        children = [int(p) for f in Path(f"/proc/{pid}/task").glob("*/children") for p in f.read_text().split()]
    except OSError:
        return []
    return [pid for child in children for pid in (child, *descendants(child))]


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def memory_mb(pid: int) -> dict[str, float]:
    """Megabytes of a process by kind: "Pss" (its own pages, and its part of those that it shares), "Anonymous", ..."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    return {name.rstrip(":"): int(value) / 1024 for name, value in (line.split()[:2] for line in lines)}


def machine() -> str:
    """The processor, for the head of a table."""
    names = [li.split(":")[1].strip() for li in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in li]
    return f"{len(names)} x {names[0]}" if names else "unknown"
