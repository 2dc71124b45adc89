"""More requests than the service can answer: how many it answers all the same, and what it says to the rest.

    python -m tests.benchmarks.overload [--workers 2] [--times 0.5 1 2 3]

Capacity is the most that went through a closed loop. Then requests come at multiples of it, evenly, over a thousand
connections (h2load), whatever becomes of those before. Goodput counts answers with 200 within a second of being sent.
A caller on the side notes whether each 503 says when to come back.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import httpx
import numpy as np

from tests.benchmarks import load, running
from tests.benchmarks.bundles import random_bundle
from tests.benchmarks.http import peak_of
from tests.benchmarks.stack import machine, stack

LENGTH: Final = 50
CONNECTIONS: Final = 1024
SOON: Final = 1000.0  # ms


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=3700)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--times", type=float, nargs="+", default=[0.5, 0.9, 1, 2, 3])
    parser.add_argument("--seconds", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="upnext-bench-") as name:
        bundles = Path(name) / "bundles"
        random_bundle(bundles, asked.items)
        with stack("sqlite", workers=asked.workers, bundles=bundles) as service:
            running.fill(service.database_url, asked.items, (LENGTH,))
            load.closed(service.url, running.prefix(LENGTH), running.USERS, connections=8, seconds=3)
            capacity = peak_of(service.url, LENGTH, asked.seconds)
            seen: dict[float, list[dict[str, Any]]] = {times: [] for times in asked.times}
            for _ in range(asked.rounds):
                for times, results in seen.items():
                    results.append(flooded(service.url, times * capacity, asked.seconds))
    rows = [{"times": times} | middle(results) for times, results in seen.items()]
    report(rows, capacity)
    print(json.dumps({"benchmark": "overload", "machine": machine(), "items": asked.items, "workers": asked.workers,
                      "capacity": capacity, "rows": rows}))  # fmt: skip


def flooded(url: str, rate: float, seconds: int) -> dict[str, Any]:
    """What became of requests at this rate."""
    with aside(url) as refusals:
        answers = load.steady(
            url, running.prefix(LENGTH), running.USERS, rate=rate, seconds=seconds, connections=CONNECTIONS
        )
    good, refused = answers.status == 200, answers.status == 503
    span = float(answers.sent[-1] - answers.sent[0])
    return {
        "asked": rate, "sent": answers.rate, "goodput": np.count_nonzero(good & (answers.took <= SOON)) / span,
        "refused": np.count_nonzero(refused) / span, "broken": np.count_nonzero(~good & ~refused) / span,
        "p50": float(np.percentile(answers.took[good], 50)), "p99": float(np.percentile(answers.took[good], 99)),
        "refused_p99": float(np.percentile(answers.took[refused], 99)) if refused.any() else 0.0,
        "refusals_seen": len(refusals), "with_retry_after": sum(refusals),
    }  # fmt: skip


@contextmanager
def aside(url: str) -> Iterator[list[bool]]:
    """One caller more; of each 503 that it got, whether there was a Retry-After."""
    refusals: list[bool] = []
    over = threading.Event()

    def ask() -> None:
        with httpx.Client(base_url=url, timeout=10) as client:
            while not over.wait(0.02):
                response = client.get(f"/recommend/{running.prefix(LENGTH)}0")
                if response.status_code == 503:
                    refusals.append("retry-after" in response.headers)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield refusals
    finally:
        over.set()
        thread.join()


def middle(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The median of each figure; counts add up."""
    counts = ("refusals_seen", "with_retry_after")
    return {name: (sum if name in counts else np.median)([result[name] for result in results]) for name in results[0]}


def report(rows: list[dict[str, Any]], capacity: float) -> None:
    """The table."""
    peak = max(row["goodput"] for row in rows)
    print(f"{machine()}; capacity {capacity:.0f}/s; {CONNECTIONS} connections; times in ms, of answers with 200")
    print(
        f"{'asked':>6}{'sent/s':>9}{'goodput/s':>11}{'of peak':>9}{'503/s':>8}{'broken/s':>10}{'p50':>8}{'p99':>8}"
        f"{'p99 of 503':>12}{'Retry-After':>13}"
    )
    for row in rows:
        print(
            f"{row['times']:5g}x{row['sent']:9.0f}{row['goodput']:11.0f}{row['goodput'] / peak:9.0%}"
            f"{row['refused']:8.0f}{row['broken']:10.0f}{row['p50']:8.1f}{row['p99']:8.1f}{row['refused_p99']:12.1f}"
            f"{row['with_retry_after']:>7} of {row['refusals_seen']}"
        )


if __name__ == "__main__":
    main()
