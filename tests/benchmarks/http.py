"""Recommendations a second over real HTTP: the service as users run it, all defaults on, its Redis and wrk beside it.

    python -m tests.benchmarks.http --items 3700 --workers 2

One line for each length of history and number of connections, then the same as one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path

from tests.benchmarks import load, running
from tests.benchmarks.bundles import random_bundle
from tests.benchmarks.stack import stack

LENGTHS = (10, 50, 200)
CONNECTIONS = (1, 8, 32, 128)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=3700)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--rounds", type=int, default=3, help="the median of so many runs counts")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="upnext-bench-") as name:
        folder = Path(name)
        random_bundle(folder / "bundles", asked.items)
        with stack("sqlite", workers=asked.workers, bundles=folder / "bundles") as service:
            running.fill(service.database_url, asked.items, LENGTHS)
            found = measure(service.url, asked.seconds, asked.rounds)
    cores = os.cpu_count()
    print(json.dumps({"items": asked.items, "workers": asked.workers, "cores": cores, "results": found}))


def measure(url: str, seconds: float, rounds: int) -> list[dict[str, float]]:
    """Closed loops, after one that fills the cache; a round goes through all cases, so that noise meets all alike."""
    for length in LENGTHS:
        load.closed(url, running.prefix(length), running.USERS, connections=8, seconds=2)
    cases: dict[tuple[int, int], list[load.Result]] = {(t, c): [] for t in LENGTHS for c in CONNECTIONS}
    for _ in range(rounds):
        for (length, connections), results in cases.items():
            users = running.prefix(length)
            results.append(load.closed(url, users, running.USERS, connections=connections, seconds=seconds))
    print("history  connections  per second   p50 ms   p99 ms  failed")
    found = []
    for (length, connections), results in cases.items():
        one = load.median(results)
        print(f"{length:7} {connections:12} {one.per_second:11.0f} {one.p50:8.2f} {one.p99:8.2f} {one.bad:7}")
        found.append({"history": length, "connections": connections, **asdict(one)})
    return found


if __name__ == "__main__":
    main()
