"""How long it takes until all workers obey a change of an item that one of them has taken.

python -m tests.benchmarks.follow
python -m tests.benchmarks.follow --database postgresql --changes 100

An item is withdrawn and brought back over HTTP, with all settings at their defaults. From the moment that the change is
acknowledged, connections that both workers serve ask in turns until none of them gets the old answer any more.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from contextlib import ExitStack
from typing import Final

import httpx

from tests.benchmarks.stack import machine, stack
from tests.worlds import cyclic

CONNECTIONS: Final = 8  # workers share them evenly


def main() -> None:
    """Make the changes, print a line of figures and one of JSON."""
    parser = argparse.ArgumentParser(description="How soon workers follow changes of the catalogue.")
    parser.add_argument("--database", choices=["sqlite", "postgresql"], default="sqlite")
    parser.add_argument("--changes", type=int, default=100)
    given = parser.parse_args()
    with stack(given.database, world=cyclic()) as service, ExitStack() as closing:
        clients = [closing.enter_context(httpx.Client(base_url=service.url)) for _ in range(CONNECTIONS)]
        for client in clients:
            client.get("/readyz").raise_for_status()
        lags = [lag(clients, withdrawn=number % 2 == 0) for number in range(given.changes)]
    figures = {"median_ms": statistics.median(lags) * 1e3, "max_ms": max(lags) * 1e3}
    print(f"{machine()}; {given.database}, {given.changes} changes")
    print(f"all workers obey after {figures['median_ms']:.0f} ms (median), {figures['max_ms']:.0f} ms at most")
    print(json.dumps({"benchmark": "follow", "machine": machine(), "database": given.database,
                      "changes": given.changes, **figures}))  # fmt: skip


def lag(clients: list[httpx.Client], *, withdrawn: bool) -> float:
    """Seconds from the answer to a change until the last of `clients` sees it."""
    time.sleep(random.uniform(0, 0.5))  # anywhere between two looks of a worker
    clients[0].put("/items/4", json={"withdrawn": withdrawn}).raise_for_status()
    began, wanted = time.perf_counter(), "5" if withdrawn else "4"
    for client in clients:
        while answer(client) != wanted:
            time.sleep(0.002)
    return time.perf_counter() - began


def answer(client: httpx.Client) -> str:
    """What comes after item 3."""
    response = client.post("/recommend", json={"history": ["3"], "n": 1}).raise_for_status()
    return str(response.json()["items"][0]["item_id"])


if __name__ == "__main__":
    main()
