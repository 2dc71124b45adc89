"""Redis is killed while recommendations are asked for: what callers notice.

    python -m tests.benchmarks.redis_gone [--rate 1000] [--seconds 10] [--database sqlite|postgresql] [--workers 2]
                                          [--cluster]

wrk asks at a steady rate for users with 50 events each. Redis is killed and stays away for a while, then it is started
again, empty. Reported are the 5xx and the times to answer before, while it is down, and after; and how long after the
start the first histories come from the cache again. All the while somebody views items, and looks whether the next
answer knows.

With --cluster there are three masters with a replica each, and one master is killed: its replica takes its place while
it is away, and it comes back as a replica.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Final

import httpx

from tests.benchmarks.stack import Stack, machine, stack
from tests.servers import RedisNodes

USERS: Final = 1_000
EVENTS: Final = 50
ITEMS: Final = 500
VIEWERS: Final = 50
CONNECTIONS: Final = 32
SCRIPT: Final = """
local n = 0
function delay() return %(delay)f end
function request()
  n = n + 1
  return wrk.format("GET", "/recommend/u" .. (n * 7919) %% %(users)d)
end
function done(summary, latency, requests)
  local e = summary.errors
  io.stderr:write(string.format('{"requests":%%d,"seconds":%%f,"p50":%%f,"p99":%%f,"max":%%f,"failed":%%d,"broken":%%d}',
    summary.requests, summary.duration / 1e6, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
    latency.max / 1e3, e.status, e.connect + e.read + e.write + e.timeout))
end
"""


def fill(running: Stack) -> None:
    """Give each user a history, and an entry in the cache."""
    users = [f"u{n}" for n in range(USERS)]
    with httpx.Client(base_url=running.url, timeout=60) as client:
        batch = [
            {"user_id": user, "item_id": str((n * 31 + e * 7) % (ITEMS - 1) + 1), "event_type": "view"}
            for n, user in enumerate(users)
            for e in range(EVENTS)
        ]
        for start in range(0, len(batch), 500):
            client.post("/events", json={"events": batch[start : start + 500]}).raise_for_status()
        for start in range(0, USERS, 200):
            client.post("/recommend/batch", json={"users": users[start : start + 200]}).raise_for_status()


def ask(running: Stack, rate: int, seconds: int) -> subprocess.Popen[str]:
    """Ask at this rate; wrk waits between the answer and the next request, so it can fall short but not run ahead."""
    script = running.folder / "ask.lua"
    script.write_text(SCRIPT % {"delay": 1000 * CONNECTIONS / rate, "users": USERS})
    command = ["wrk", "-t1", f"-c{CONNECTIONS}", f"-d{seconds}s", "--timeout", "10s", "-s", str(script), running.url]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def result(asking: subprocess.Popen[str]) -> dict[str, Any]:
    """What wrk saw."""
    said = asking.communicate()[1]
    found: dict[str, Any] = json.loads(said[said.index("{") :])
    return found


def until_cached(running: Stack) -> float:
    """Seconds until a probe's history comes from the cache."""
    started = time.monotonic()
    with httpx.Client(base_url=running.url, timeout=10) as client:
        while client.get("/recommend/u0").json()["history_source"] != "cache":
            time.sleep(0.02)
    return time.monotonic() - started


@dataclass
class Viewer:
    """Views items one after the other as VIEWERS users, and asks what is next after each: the item after it."""

    url: str
    views: int = 0
    stale: int = 0  # answers that did not know
    failed: int = 0

    def run(self, over: threading.Event) -> None:
        """Until it is over."""
        with httpx.Client(base_url=self.url, timeout=10) as client:
            while not over.wait(0.005):
                user, item = f"viewer-{self.views % VIEWERS}", self.views // VIEWERS % (ITEMS - 1) + 1
                event = {"user_id": user, "item_id": str(item), "event_type": "view"}
                if client.post("/events", json=event).status_code != 200:
                    self.failed += 1
                    continue
                self.views += 1
                # The live item after an item is the next number, in the world that the service answers from.
                answer = client.get(f"/recommend/{user}", params={"n": 1})
                self.failed += answer.status_code != 200
                if answer.status_code == 200 and answer.json()["items"][0]["item_id"] != str(item + 1):
                    self.stale += 1


@contextmanager
def viewing(url: str) -> Iterator[Viewer]:
    """Somebody who views items while the block runs."""
    viewer, over = Viewer(url), threading.Event()
    with ThreadPoolExecutor(1) as aside:
        running = aside.submit(viewer.run, over)
        try:
            yield viewer
        finally:
            over.set()
        running.result()


def main() -> int:
    """Measure, print a table and one JSON line; 0 if there was no 5xx."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=int, default=1_000, help="recommendations a second")
    parser.add_argument("--seconds", type=int, default=10, help="of each of the three phases")
    parser.add_argument("--database", choices=["postgresql", "sqlite"], default="sqlite")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--cluster", action="store_true", help="three masters with a replica each")
    chosen = parser.parse_args()
    if shutil.which("wrk") is None:
        print("wrk is not installed: apt install wrk", file=sys.stderr)
        return 1
    phases: dict[str, dict[str, Any]] = {}
    with ExitStack() as closing:
        nodes = closing.enter_context(RedisNodes(replicas=1)) if chosen.cluster else None
        settings: dict[str, Any] = {"redis_url": nodes.url} if nodes is not None else {}
        running = closing.enter_context(stack(chosen.database, workers=chosen.workers, **settings))
        fill(running)
        viewer = closing.enter_context(viewing(running.url))
        gone = running.redis if nodes is None else nodes.master_of("{u0}")
        result(ask(running, chosen.rate, 2))
        phases["before"] = result(ask(running, chosen.rate, chosen.seconds))
        asking = ask(running, chosen.rate, chosen.seconds)
        time.sleep(0.2)
        gone.kill()
        phases["down"] = result(asking)
        asking = ask(running, chosen.rate, chosen.seconds)
        time.sleep(0.2)
        took_over = None if nodes is None else nodes.master_of("{u0}") is not gone
        gone.start()
        recovered = until_cached(running)
        phases["after"] = result(asking)
    print(f"{machine()}; {chosen.database}, {chosen.workers} workers, {chosen.rate} recommendations/s asked for")
    print(f"{'Redis':<8}{'answers/s':>10}{'5xx':>6}{'broken':>8}{'p50 ms':>9}{'p99 ms':>9}{'max ms':>9}")
    for name, seen in phases.items():
        print(
            f"{name:<8}{seen['requests'] / seen['seconds']:>10,.0f}{seen['failed']:>6}{seen['broken']:>8}"
            f"{seen['p50']:>9.1f}{seen['p99']:>9.1f}{seen['max']:>9.1f}"
        )
    if took_over is None:
        print(f"histories come from the cache again {recovered:.2f} s after Redis answers")
    else:
        print(f"the replica took over: {took_over}")
    print(f"{viewer.views} views; {viewer.stale} answers did not know of one; {viewer.failed} failed")
    print(json.dumps({"benchmark": "redis_gone", "machine": machine(), "cluster": chosen.cluster, "views": viewer.views,
                      "stale": viewer.stale, "failed": viewer.failed, "recovered_seconds": recovered,
                      **phases}))  # fmt: skip
    bad = any(seen["failed"] or seen["broken"] for seen in phases.values()) or viewer.stale or viewer.failed
    return 1 if bad or took_over is False else 0


if __name__ == "__main__":
    sys.exit(main())
