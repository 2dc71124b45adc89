"""How many events a second are acknowledged, over real HTTP, each after a commit that a power cut cannot take back.

    python -m tests.benchmarks.ingest [--seconds 10] [--workers 2] [--databases sqlite postgresql]

wrk posts single events over 32 connections, then batches of 500 over 8. Beside them stands how many fsyncs a second
that disk takes. Each event has an id of its own, is of one of 10,000 users (1,000 of them have a cached history, which
every event reaches before its answer), and the log is counted afterwards: what was acknowledged must be in it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import httpx
from sqlalchemy import func, select

from shared.database import create_engine, events
from tests.benchmarks.stack import Stack, machine, stack

USERS: Final = 10_000
CACHED: Final = 1_000
SINGLE_CONNECTIONS: Final = 32
BATCH: Final = 500
BATCH_CONNECTIONS: Final = 8

SCRIPT: Final = """
local threads = 0
function setup(thread) thread:set("id", threads) threads = threads + 1 end
local n, batch, run = 0, %(batch)d, "%(run)s"
local headers = {["Content-Type"] = "application/json"}
local function event()
  n = n + 1
  return string.format('{"event_id":"%%s-%%d-%%d","user_id":"u%%d","item_id":"%%d","event_type":"view","value":4.5,' ..
    '"timestamp":"2026-01-%%02dT%%02d:%%02d:00Z"}', run, id, n, (n * 7919 + id * 13) %% %(users)d, n %% 499 + 1,
    n %% 28 + 1, n %% 24, n %% 60)
end
function request()
  if batch == 1 then return wrk.format("POST", "/events", headers, event()) end
  local all = {}
  for i = 1, batch do all[i] = event() end
  return wrk.format("POST", "/events", headers, '{"events":[' .. table.concat(all, ",") .. ']}')
end
function done(summary, latency, requests)
  local e = summary.errors
  io.stderr:write(string.format('{"requests":%%d,"seconds":%%f,"p50":%%f,"p99":%%f,"refused":%%d,"broken":%%d}',
    summary.requests, summary.duration / 1e6, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3, e.status,
    e.connect + e.read + e.write + e.timeout))
end
"""


def fsyncs_a_second(folder: Path, seconds: float = 2) -> float:
    """Writes of 4 KiB with an fsync each: what one writer without group commit could reach at best."""
    file = folder / "fsync"
    with file.open("wb", buffering=0) as out:
        start, count = time.perf_counter(), 0
        while (spent := time.perf_counter() - start) < seconds:
            os.pwrite(out.fileno(), bytes(4096), count % 256 * 4096)
            os.fsync(out.fileno())
            count += 1
    file.unlink()
    return count / spent


def post(running: Stack, run: str, batch: int, connections: int, seconds: int) -> dict[str, Any]:
    """Let wrk post for a while; what it saw."""
    script = running.folder / "post.lua"
    script.write_text(SCRIPT % {"batch": batch, "run": run, "users": USERS})
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "10s", "-s", str(script), running.url]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stderr)
    return found


async def logged(url: str) -> int:
    """How many events the log holds."""
    engine = create_engine(url)
    async with engine.connect() as connection:
        found: int = (await connection.execute(select(func.count()).select_from(events))).scalar_one()
    await engine.dispose()
    return found


def cache_users(running: Stack) -> None:
    """Give CACHED users an entry: an event each, and a read."""
    users = [f"u{n}" for n in range(CACHED)]
    with httpx.Client(base_url=running.url, timeout=30) as client:
        for start in range(0, CACHED, BATCH):
            batch = [{"user_id": u, "item_id": "1", "event_type": "view"} for u in users[start : start + BATCH]]
            client.post("/events", json={"events": batch}).raise_for_status()
        for start in range(0, CACHED, 200):
            client.post("/recommend/batch", json={"users": users[start : start + 200]}).raise_for_status()


def measure(database: str, workers: int, seconds: int) -> dict[str, Any]:
    """Both figures of one database."""
    with stack(database, workers=workers) as running:
        cache_users(running)
        before = asyncio.run(logged(running.database_url))
        post(running, "warm", 1, SINGLE_CONNECTIONS, 2)
        warmed = asyncio.run(logged(running.database_url)) - before
        single = post(running, "one", 1, SINGLE_CONNECTIONS, seconds)
        between = asyncio.run(logged(running.database_url))
        many = post(running, "many", BATCH, BATCH_CONNECTIONS, seconds)
        after = asyncio.run(logged(running.database_url))
    assert warmed > 0
    good = single["requests"] - single["refused"], BATCH * (many["requests"] - many["refused"])
    # wrk stops in the middle of requests: those are in the log, and were not acknowledged to it.
    assert between - before - warmed >= good[0], "acknowledged single events are not in the log"
    assert after - between >= good[1], "acknowledged batches are not in the log"
    return {
        "database": database,
        "workers": workers,
        "single_posts_a_second": good[0] / single["seconds"],
        "single": single,
        "batch_events_a_second": good[1] / many["seconds"],
        "batch": many,
    }


def main() -> int:
    """Measure, print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=10, help="of each measurement")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--databases", nargs="+", default=["sqlite", "postgresql"])
    chosen = parser.parse_args()
    if shutil.which("wrk") is None:
        print("wrk is not installed: apt install wrk", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(dir=os.environ.get("UPNEXT_BENCH_DIR")) as folder:
        fsyncs = fsyncs_a_second(Path(folder))
    rows = [measure(database, chosen.workers, chosen.seconds) for database in chosen.databases]
    print(f"{machine()}; {chosen.workers} workers; {fsyncs:,.0f} fsync/s of 4 KiB")
    head = ("single POST/s", 14), ("p50 ms", 9), ("p99 ms", 9), ("batches: events/s", 19), ("p99 ms", 9), ("failed", 8)
    print(f"{'database':<12}" + "".join(f"{name:>{width}}" for name, width in head))
    for row in rows:
        one, many = row["single"], row["batch"]
        failed = one["refused"] + one["broken"] + many["refused"] + many["broken"]
        print(
            f"{row['database']:<12}{row['single_posts_a_second']:>14,.0f}{one['p50']:>9.1f}{one['p99']:>9.1f}"
            f"{row['batch_events_a_second']:>19,.0f}{many['p99']:>9.1f}{failed:>8}"
        )
    print(json.dumps({"benchmark": "ingest", "machine": machine(), "fsyncs_a_second": fsyncs, "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
