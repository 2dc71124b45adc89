"""A new bundle goes live under full load: what callers notice, and what it takes of memory.

    python -m tests.benchmarks.swap [--items 20000] [--swaps 4] [--workers 2]

So many callers ask without a pause (h2load) while `CURRENT` is pointed at another bundle of the same size, and back.
A swap lasts from that moment until half a second after the last worker has written that the bundle is live; the rest
is quiet. Memory is the proportional set size of all workers: pages that they share count once.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np

from shared.bundle import current_version, point_current
from shared.times import SECOND, parse
from tests.benchmarks import load, running
from tests.benchmarks.bundles import random_bundle
from tests.benchmarks.stack import Stack, machine, memory_mb, stack

LENGTH: Final = 50
CALLERS: Final = (8, 32)
APART: Final = 6
"""Seconds between two swaps: a worker looks every 2 s, and takes a second or two to load."""
AFTER: Final = 0.5


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=20_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--swaps", type=int, default=4, help="for each number of callers")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="upnext-bench-") as name:
        bundles = Path(name) / "bundles"
        paths = [
            random_bundle(bundles, asked.items, version=f"2024-06-0{n}T00-00-00Z-bench", seed=n) for n in range(1, 3)
        ]
        files = sum(file.stat().st_size for file in paths[0].rglob("*") if file.is_file()) / 2**20
        with stack("sqlite", workers=asked.workers, bundles=bundles) as service:
            running.fill(service.database_url, asked.items, (LENGTH,))
            load.closed(service.url, running.prefix(LENGTH), running.USERS, connections=8, seconds=3)
            rows = [
                measure(service, bundles, [path.name for path in paths], callers, asked.swaps) for callers in CALLERS
            ]
    report(rows, files, asked.workers)
    print(json.dumps({"benchmark": "swap", "machine": machine(), "items": asked.items, "workers": asked.workers,
                      "files_mb": files, "rows": rows}))  # fmt: skip


def measure(service: Stack, bundles: Path, versions: list[str], callers: int, swaps: int) -> dict[str, Any]:
    """One load with so many swaps."""
    seconds = APART * (swaps + 1)
    with ThreadPoolExecutor(1) as aside, watching(service) as memory:
        asking = aside.submit(
            load.looped, service.url, running.prefix(LENGTH), running.USERS, connections=callers, seconds=seconds
        )
        pointed = []
        for _ in range(swaps):
            time.sleep(APART)
            (other,) = {*versions} - {current_version(bundles)}
            pointed.append(time.time())
            point_current(bundles, other)
        answers = asking.result()
        time.sleep(1)
    live = went_live(service)
    spans = []
    for start in pointed:
        ends = [moment for moment in live if start < moment < start + APART]
        if len(ends) != len(service.workers()):
            raise SystemExit(f"{len(ends)} of {len(service.workers())} workers swapped in {APART} s")
        spans.append((start, max(ends) + AFTER))
    during = np.any([(answers.sent >= start) & (answers.sent < stop) for start, stop in spans], axis=0)
    quiet, swapping = answers.took[~during], answers.took[during]
    settled = [  # just before each swap, and at the end
        [mb for moment, mb in memory if moment < until][-1] for until in (*pointed, time.time())
    ]
    return {
        "callers": callers, "swaps": swaps, "requests": len(answers.sent),
        "failed": int(np.count_nonzero(answers.status != 200)),
        "seconds_to_swap": float(np.mean([stop - start for start, stop in spans])) - AFTER,
        "quiet_per_second": len(quiet) / (answers.sent[-1] - answers.sent[0] - sum(b - a for a, b in spans)),
        "swap_per_second": len(swapping) / sum(b - a for a, b in spans),
        "quiet_p50": float(np.percentile(quiet, 50)), "swap_p50": float(np.percentile(swapping, 50)),
        "quiet_p99": float(np.percentile(quiet, 99)), "swap_p99": float(np.percentile(swapping, 99)),
        "quiet_max": float(quiet.max()), "swap_max": float(swapping.max()),
        "mb_settled": settled, "mb_peak": max(mb for _, mb in memory),
    }  # fmt: skip


def went_live(service: Stack) -> list[float]:
    """When workers wrote that a bundle is live, seconds since the epoch."""
    lines = (service.folder / "service.log").read_text().splitlines()
    return [parse(json.loads(line)["time"]) / SECOND for line in lines if '"bundle is live"' in line]


@contextmanager
def watching(service: Stack) -> Iterator[list[tuple[float, float]]]:
    """Megabytes of all workers together, with the time, a few times a second."""
    seen: list[tuple[float, float]] = []
    over = threading.Event()

    def watch() -> None:
        workers = service.workers()
        while not over.wait(0.2):
            seen.append((time.time(), sum(memory_mb(pid)["Pss"] for pid in workers)))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


def report(rows: list[dict[str, Any]], files: float, workers: int) -> None:
    """The table."""
    print(f"{machine()}; files of a bundle {files:.0f} MB; {workers} workers")
    print(f"{'callers':>8}{'failed':>8}{'':10}{'requests/s':>11}{'p50 ms':>8}{'p99 ms':>8}{'max ms':>8}{'p99 is':>8}")
    for row in rows:
        head = f"{row['callers']:8}{row['failed']:8}"
        for when in ("quiet", "swap"):
            print(
                f"{head}{when:>10}{row[f'{when}_per_second']:11.0f}{row[f'{when}_p50']:8.2f}{row[f'{when}_p99']:8.2f}"
                f"{row[f'{when}_max']:8.1f}{row[f'{when}_p99'] / row['quiet_p99']:7.1f}x"
            )
            head = " " * 16
    for row in rows:
        print(
            f"{row['callers']} callers: live everywhere after {row['seconds_to_swap']:.1f} s; memory of all workers "
            f"{row['mb_peak']:.0f} MB at most; before the first swap and some seconds after each "
            + ", ".join(f"{mb:.0f}" for mb in row["mb_settled"])
        )


if __name__ == "__main__":
    main()
