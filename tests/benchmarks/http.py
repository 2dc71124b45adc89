"""Recommendations over real HTTP: the service as users run it, all defaults on, its Redis and the load beside it.

    python -m tests.benchmarks.http [--items 3700] [--workers 2] [--seconds 4] [--rounds 3] [--query-vectors 0]

closed   so many callers who each ask again as soon as they have their answer (wrk): how much goes through
open     requests at a constant rate, a share of the most that went through a closed loop with the same histories
         (h2load): how long callers wait when the service is not saturated
+ bulk   the same while one caller sends batches of 256 users back to back

Users ask again and do nothing in between, so their query vectors are remembered; with `--query-vectors 0` each request
is encoded, as for users who do something every time.

A round goes through all cases of its kind, so that noise meets all alike; the median over rounds counts. One line for
each case, then the same as one JSON line.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from tests.benchmarks import load, running
from tests.benchmarks.bundles import random_bundle
from tests.benchmarks.stack import machine, stack

LENGTHS: Final = (10, 50, 200)
CONNECTIONS: Final = (1, 8, 32, 128)
SHARES: Final = (0.25, 0.5, 0.75, 0.9)
USUAL: Final = 50  # events of the histories of all other cases


@dataclass(frozen=True)
class Case:
    """A load to measure under."""

    history: int
    connections: int | None = None  # of a closed loop
    share: float | None = None  # of the peak, for an open loop
    bulk: bool = False

    def __str__(self) -> str:
        kind = f"closed, {self.connections} callers" if self.share is None else f"open, {self.share:.0%} of the peak"
        return f"history {self.history}, {kind}{' + bulk' if self.bulk else ''}"


CLOSED: Final = [Case(length, c) for length in LENGTHS for c in CONNECTIONS]
OPEN: Final = [
    *(Case(length, share=share) for length in LENGTHS for share in SHARES),
    Case(USUAL, share=0.25, bulk=True),
    Case(USUAL, share=0.5, bulk=True),
    Case(USUAL, 8),
    Case(USUAL, 8, bulk=True),
]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=3700)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3, help="the median of so many runs counts")
    parser.add_argument("--only", choices=["closed", "open"], help="leave out the rest")
    parser.add_argument("--query-vectors", type=int, help="that a worker remembers; as users have it if not given")
    asked = parser.parse_args()
    chosen = {} if asked.query_vectors is None else {"query_vectors": asked.query_vectors}
    with tempfile.TemporaryDirectory(prefix="upnext-bench-") as name:
        folder = Path(name)
        random_bundle(folder / "bundles", asked.items)
        with stack("sqlite", workers=asked.workers, bundles=folder / "bundles", **chosen) as service:
            running.fill(service.database_url, asked.items, LENGTHS)
            found = measure(service.url, asked.seconds, asked.rounds, asked.only)
    print(
        json.dumps({"benchmark": "http", "machine": machine(), "items": asked.items, "workers": asked.workers} | found)
    )


def measure(url: str, seconds: int, rounds: int, only: str | None) -> dict[str, Any]:
    """Warm up, find the peak, measure all cases."""
    for length in LENGTHS:
        load.closed(url, running.prefix(length), running.USERS, connections=8, seconds=2)
    print(f"{machine()}\n{'':44}{'answers/s':>10}{'p50 ms':>9}{'p99 ms':>9}{'failed':>8}{'in bulk/s':>11}")
    rows = [] if only == "open" else cases(CLOSED, url, {}, seconds, rounds)
    peaks = {
        length: max((row["per_second"] for row in rows if row["history"] == length), default=0)
        or peak_of(url, length, seconds)
        for length in LENGTHS
    }
    return {"peaks": peaks, "results": rows if only == "closed" else rows + cases(OPEN, url, peaks, seconds, rounds)}


def peak_of(url: str, length: int, seconds: int) -> float:
    """The most that goes through a closed loop."""
    users = running.prefix(length)
    return max(
        load.closed(url, users, running.USERS, connections=c, seconds=seconds).per_second for c in CONNECTIONS[1:]
    )


def cases(chosen: list[Case], url: str, peaks: dict[int, float], seconds: int, rounds: int) -> list[dict[str, Any]]:
    """A printed row for each case."""
    results: dict[Case, list[load.Result]] = {case: [] for case in chosen}
    batches: dict[Case, list[load.Result]] = {case: [] for case in chosen}
    for _ in range(rounds):
        for case in chosen:
            one, bulk = loaded(case, url, peaks, seconds)
            results[case].append(one)
            batches[case].extend([bulk] if bulk else [])
    rows = []
    for case in chosen:
        one = load.median(results[case])
        bulk_users = load.median(batches[case]).per_second * load.BATCH if batches[case] else 0
        in_bulk = f"{bulk_users:11.0f}" if case.bulk else ""
        print(f"{case!s:44}{one.per_second:10.0f}{one.p50:9.2f}{one.p99:9.2f}{one.bad:8}{in_bulk}")
        rows.append(asdict(case) | asdict(one) | {"bulk_users_per_second": bulk_users})
    return rows


def loaded(case: Case, url: str, peaks: dict[int, float], seconds: int) -> tuple[load.Result, load.Result | None]:
    """What single callers saw under this load, and what the bulk caller did."""
    ask = partial(load.closed, url, running.prefix(case.history), running.USERS)
    with ThreadPoolExecutor(1) as aside:
        bulk: Future[load.Result] | None = None
        if case.bulk:
            bulk = aside.submit(ask, connections=1, seconds=seconds + 1, request=load.BULK)
            time.sleep(0.5)
        if case.share is None:
            assert case.connections is not None
            one = ask(connections=case.connections, seconds=seconds)
        else:
            rate = case.share * peaks[case.history]
            one = load.steady(url, running.prefix(case.history), running.USERS, rate=rate, seconds=seconds).result()
        return one, bulk.result() if bulk else None


if __name__ == "__main__":
    main()
