"""A service under mixed load for an hour: whether its memory grows.

    python -m tests.benchmarks.soak [--minutes 60] [--warm 20] [--rate 300] [--database sqlite|postgresql] [--workers 2]

wrk sends a steady mix of everything that the interface has: histories from the cache, users that nobody knows,
events, batches, brought histories, filters, similar items, catalogue changes, erasures, and requests that are
refused. Every SWAP seconds another bundle goes live, and every CYCLE seconds Redis is killed and comes back empty.
Memory is that of all workers, by its mean over each cycle, so that swaps and the load's own waves fall out: the
proportional set size, and the part of it that is anonymous, which is all that a process can leak. (The rest are pages
of files. Their share falls when other programs read the same libraries, and rises when those end.) Before the minutes
that count there are some in which every path is taken and allocators and caches fill up to what they keep; twenty
swaps do that. The catalogue changes go to CHANGED items: workers keep the newest change of each item, which is data
and no leak, and so it must have come to its full size by then. Reported: the slope of a line through the means of
each, with the upper end of its 95 % interval (t), what the memory was made of at both ends, and answers that were
none.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from scipy.stats import t as student

from shared.bundle import current_version, point_current
from tests.benchmarks import running
from tests.benchmarks.bundles import random_bundle
from tests.benchmarks.stack import Stack, machine, memory_mb, stack

ITEMS: Final = 3_700
LENGTHS: Final = (10, 50, 200)
CONNECTIONS: Final = 16
CHANGED: Final = 300
ACTIVE: Final = 20_000
SWAP: Final = 60
CYCLE: Final = 4 * SWAP
"""Seconds; an even number of swaps, since the two bundles need not be of the same size."""
SAMPLE: Final = 1
"""Seconds; what a worker takes more while it loads a bundle is there for one or two."""
# Of a hundred requests. An unknown user is a new one each time, and so is each user of some of the events. Most others
# are of some ACTIVE users: few enough that nearly all have events after the minutes before those that count, and many
# enough that their histories stay short, for both take memory.
SCRIPT: Final = """
local n, post = 0, {["Content-Type"] = "application/json"}
local lengths, seen = {10, 50, 200}, {}
local function user() return "h" .. lengths[n %% 3 + 1] .. "-" .. math.random(0, %(users)d - 1) end
local function active() return "active-" .. math.random(1, %(active)d) end
local function item() return math.random(1, %(items)d) end
local function event(id)
  return string.format('{"user_id":"%%s","item_id":"%%d","event_type":"view"}', id, item())
end
function delay() return %(delay)f end
function request()
  n = n + 1
  local kind = math.random(1, 100)
  if kind <= 36 then return wrk.format("GET", "/recommend/" .. user()) end
  if kind <= 48 then return wrk.format("GET", "/recommend/" .. active()) end
  if kind <= 53 then return wrk.format("GET", "/recommend/nobody-" .. n) end
  if kind <= 58 then return wrk.format("GET", "/recommend/" .. user() .. "?filter=tenth:" .. n %% 10 .. "&n=100") end
  if kind <= 60 then return wrk.format("POST", "/events", post, event(user())) end
  if kind <= 70 then return wrk.format("POST", "/events", post, event(active())) end
  if kind <= 73 then return wrk.format("POST", "/events", post, event("new-" .. n)) end
  if kind <= 76 then
    return wrk.format("POST", "/events", post, '{"events":[' .. event(active()) .. "," .. event(active()) .. "]}")
  end
  if kind <= 80 then
    return wrk.format("POST", "/recommend/batch", post,
      string.format('{"users":["%%s","%%s","%%s","%%s"]}', user(), user(), user(), user()))
  end
  if kind <= 85 then
    return wrk.format("POST", "/recommend", post, string.format('{"history":["%%d","%%d"]}', item(), item()))
  end
  if kind <= 88 then return wrk.format("GET", "/items/" .. item() .. "/similar") end
  if kind <= 90 then return wrk.format("GET", "/users/" .. user() .. "/history") end
  if kind <= 91 then return wrk.format("GET", "/items?limit=50") end
  if kind <= 92 then
    return wrk.format("PUT", "/items/" .. math.random(1, %(changed)d), post, string.format('{"title":"Title %%d"}', n))
  end
  if kind <= 93 then return wrk.format("DELETE", "/users/new-" .. math.max(n - 100, 0)) end
  if kind <= 95 then return wrk.format("GET", "/recommend/" .. user() .. "?n=0") end
  if kind <= 97 then return wrk.format("POST", "/events", post, '{"user_id":') end
  if kind <= 98 then return wrk.format("GET", "/no-such-route/" .. n) end
  if kind <= 99 then return wrk.format("GET", "/metrics") end
  return wrk.format("GET", "/readyz")
end
function response(status)
  if status >= 500 then failed = (failed or 0) + 1 end
end
function setup(thread) worker = thread end
function done(summary, latency)
  local e = summary.errors
  local broken = e.connect + e.read + e.write + e.timeout
  io.write(string.format('JSON {"requests":%%d,"seconds":%%f,"refused":%%d,"failed":%%d,"broken":%%d,',
    summary.requests, summary.duration / 1e6, e.status, worker:get("failed") or 0, broken))
  io.write(string.format('"p50":%%f,"p99":%%f}\\n', latency:percentile(50) / 1e3, latency:percentile(99) / 1e3))
end
"""


@dataclass(frozen=True)
class Line:
    """A straight line through means of memory. Megabytes a day."""

    slope: float
    upper: float


def line(hours: Sequence[float], megabytes: Sequence[float]) -> Line:
    """Least squares, and the upper end of the two-sided 95 % interval of the slope; at least 3 points."""
    x, y = np.asarray(hours) / 24, np.asarray(megabytes)
    slope, offset = np.polyfit(x, y, 1)
    left = len(x) - 2
    error = math.sqrt(float(np.sum((y - slope * x - offset) ** 2)) / left / float(np.sum((x - x.mean()) ** 2)))
    return Line(float(slope), float(slope + student.ppf(0.975, left) * error))


def made_of(pid: int) -> dict[str, float]:
    """Megabytes of a worker by what they hold, its threads and its open files."""
    sizes = memory_mb(pid)
    count = {name: float(len(list(Path(f"/proc/{pid}/{name}").iterdir()))) for name in ("task", "fd")}
    return {"pss": sizes["Pss"], "anonymous": sizes["Anonymous"], "threads": count["task"], "files": count["fd"]}


def soak(service: Stack, bundles: Path, minutes: float, warm: float, rate: int) -> dict[str, Any]:
    """Load, disturb and watch; `warm` minutes and then `minutes` that count."""
    script = service.folder / "soak.lua"
    script.write_text(
        SCRIPT
        % {
            "delay": 1000 * CONNECTIONS / rate,
            "users": running.USERS,
            "items": ITEMS,
            "changed": CHANGED,
            "active": ACTIVE,
        }
    )
    command = ["wrk", "-t1", f"-c{CONNECTIONS}", f"-d{round((warm + minutes) * 60)}s", "--timeout", "10s"]
    asking = subprocess.Popen([*command, "-s", str(script), service.url], stdout=subprocess.PIPE, text=True)
    workers, started = service.workers(), time.monotonic()
    cycles: list[list[tuple[float, float]]] = [[]]
    first: list[dict[str, float]] = []
    done: Counter[str] = Counter()
    try:
        while asking.poll() is None:
            time.sleep(SAMPLE)
            passed = time.monotonic() - started
            if asking.poll() is not None:
                break
            sizes = [memory_mb(pid) for pid in workers]
            cycles[-1].append((sum(size["Pss"] for size in sizes), sum(size["Anonymous"] for size in sizes)))
            if not first and passed >= warm * 60:
                first = [made_of(pid) for pid in workers]
            if passed >= SWAP * (done["swaps"] + 1):
                done["swaps"] += 1
                (other,) = {path.name for path in bundles.glob("*-bench")} - {current_version(bundles)}
                point_current(bundles, other)
            if passed >= CYCLE * len(cycles):
                pss, anonymous = np.mean(cycles[-1], axis=0)
                said_now = f"{passed / 60:5.1f} min {pss:7.1f} MB, {anonymous:.1f} of them anonymous"
                print(said_now, file=sys.stderr, flush=True)
                cycles.append([])
                service.redis.kill()
                time.sleep(1)
                service.redis.start()
                done["kills of Redis"] += 1
        last = [made_of(pid) for pid in workers]
    finally:
        asking.terminate()
        said = asking.communicate()[0]
    whole = [np.mean(seen, axis=0) for seen in cycles[:-1]]
    hours = [CYCLE * (n + 0.5) / 3600 for n in range(len(whole))]
    counts = [n for n in range(len(whole)) if CYCLE * n >= warm * 60]
    found: dict[str, Any] = {}
    for kind, of_all in zip(("pss", "anonymous"), np.transpose(whole) if whole else ((), ()), strict=True):
        grown = line([hours[n] for n in counts], [of_all[n] for n in counts]) if len(counts) > 2 else None
        found[f"{kind}_mb"] = [round(float(mb), 1) for mb in of_all]
        found[f"{kind}_slope_mb_a_day"] = grown and grown.slope
        found[f"{kind}_upper_mb_a_day"] = grown and grown.upper
    return {
        **json.loads(next(row[5:] for row in said.splitlines() if row.startswith("JSON "))),
        **done, "same_workers": service.workers() == workers, "warm": first, "end": last, **found,
    }  # fmt: skip


def main() -> int:
    """Measure, print a table and one JSON line; 0 if nothing failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--warm", type=float, default=20, help="minutes before those")
    parser.add_argument("--rate", type=int, default=300, help="requests a second")
    parser.add_argument("--database", choices=["postgresql", "sqlite"], default="sqlite")
    parser.add_argument("--workers", type=int, default=2)
    chosen = parser.parse_args()
    if shutil.which("wrk") is None:
        print("wrk is not installed: apt install wrk", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="upnext-bench-") as name:
        bundles = Path(name) / "bundles"
        for number in (1, 2):
            random_bundle(bundles, ITEMS, version=f"2024-06-0{number}T00-00-00Z-bench", seed=number)
        with stack(chosen.database, workers=chosen.workers, bundles=bundles) as service:
            running.fill(service.database_url, ITEMS, LENGTHS)
            found = soak(service, bundles, chosen.minutes, chosen.warm, chosen.rate)
    per_second = found["requests"] / found["seconds"]
    print(f"{machine()}; {chosen.database}, {chosen.workers} workers, {per_second:.0f} requests/s")
    for field, value in found.items():
        print(f"{field:<26}{value}")
    print(json.dumps({"benchmark": "soak", "machine": machine(), "database": chosen.database} | found))
    return 1 if found["failed"] or found["broken"] or not found["same_workers"] else 0


if __name__ == "__main__":
    sys.exit(main())
