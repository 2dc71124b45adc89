"""The service as it is run for users, with histories in its log, for a benchmark to load from outside."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import httpx
import numpy as np
from sqlalchemy import insert

from shared.database import create_engine, events, migrate
from shared.events import IntArray
from shared.times import SECOND
from tests.benchmarks.bundles import SINCE
from tests.servers import free_port

USERS: Final = 1000
ROOT: Final = Path(__file__).parents[2]


def prefix(length: int) -> str:
    """What the ids of users with a history of this length begin with: "h50-" and a number below USERS."""
    return f"h{length}-"


def histories(items: int, length: int) -> IntArray:
    """(USERS, length) item numbers, the same on every call; popular items oftener."""
    rng = np.random.default_rng(length)
    spread = rng.zipf(1.2, (USERS, length)) - 1 + rng.integers(0, items, (USERS, length)) // 3
    return np.asarray(np.minimum(spread, items - 1) + 1, np.int64)


def fill(url: str, items: int, lengths: tuple[int, ...]) -> None:
    """An event log with USERS users for each length."""
    asyncio.run(_fill(url, items, lengths))


async def _fill(url: str, items: int, lengths: tuple[int, ...]) -> None:
    engine = create_engine(url)
    await migrate(engine)
    async with engine.begin() as connection:
        for length in lengths:
            rows = [
                {
                    "event_id": f"{length}-{user}-{place}", "user_id": f"{prefix(length)}{user}", "item_id": str(item),
                    "event_type": "view", "timestamp": SINCE + (user * 300 + place) * SECOND, "digest": "0" * 32,
                }
                for user, row in enumerate(histories(items, length).tolist())
                for place, item in enumerate(row)
            ]  # fmt: skip
            await connection.execute(insert(events), rows)
    await engine.dispose()


@contextmanager
def process(
    command: list[str], environment: dict[str, str], ready: str, log: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """A server in a session of its own, ready when `ready` answers; all of its processes are gone afterwards."""
    with log.open("ab") as out:
        running = subprocess.Popen(
            command, env={**os.environ, **environment}, cwd=ROOT, stdout=out, stderr=out, start_new_session=True
        )
        try:
            deadline = time.monotonic() + 120
            while not _answers(ready):
                if running.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"{' '.join(command)} did not start; see {log}")
                time.sleep(0.1)
            yield running
        finally:
            running.send_signal(signal.SIGTERM)
            try:
                running.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(running.pid, signal.SIGKILL)
                running.wait()


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


@contextmanager
def service(folder: Path, bundles: Path, *, workers: int = 2, **settings: str) -> Iterator[tuple[str, int]]:
    """`python -m service` with its own Redis and a SQLite log in `folder`; its URL and process id."""
    port = free_port()
    environment = {
        "UPNEXT_PORT": str(port),
        "UPNEXT_WORKERS": str(workers),
        "UPNEXT_BUNDLES": str(bundles),
        "UPNEXT_DATABASE_URL": f"sqlite:///{folder / 'log.db'}",
        **{f"UPNEXT_{name.upper()}": value for name, value in settings.items()},
    }
    url = f"http://127.0.0.1:{port}"
    with process([sys.executable, "-m", "service"], environment, f"{url}/readyz", folder / "service.log") as running:
        yield url, running.pid
