"""Where the time of one recommendation goes, in microseconds: each stage alone, and inside real requests.

    python -m tests.benchmarks.stages [--items 3700] [--seconds 0.5]

Alone: the service's own parts in this process, on a real Redis, each called in a tight loop with a hundred users in
turn. Inside requests: what `Server-Timing` says over HTTP, of one caller at a time, and of one among eight; colder, and
in company. "total" there is from the first byte read to the first written, so without the network and the HTTP server.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import re
import statistics
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

import httpx
import numpy as np

from service.bundles import Serving
from service.main import services_for
from service.metrics import Metrics
from service.recommend import Case, Question, Reading, exclude, moment, place, rank, respond
from service.routes.dependencies import dumped
from service.routes.recommend import rendered
from service.settings import Settings
from service.telemetry import JsonLines, uuid7
from shared.bundle import Model
from shared.encoder import CHUNK
from shared.events import IntArray
from shared.retrieval import Mode, Retrieval, Retriever
from tests.benchmarks import load, running
from tests.benchmarks.bundles import random_bundle
from tests.benchmarks.stack import machine, stack
from tests.benchmarks.timing import median_us, median_us_of

LENGTHS: Final = (10, 50, 200)
USUAL: Final = 50
USERS: Final = 100
CANDIDATES: Final = 200
STAGE: Final = re.compile(r"(\w+);dur=([\d.]+)")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=3700)
    parser.add_argument("--seconds", type=float, default=0.5, help="for each stage alone")
    parser.add_argument("--requests", type=int, default=500, help="over HTTP")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="upnext-bench-") as name:
        folder = Path(name)
        random_bundle(folder / "bundles", asked.items)
        with stack("sqlite", workers=1, bundles=folder / "bundles") as service:
            running.fill(service.database_url, asked.items, LENGTHS)
            within = {
                "alone": in_requests(service.url, asked.requests),
                "among 8": in_company(service.url, asked.requests),
            }
            settings = Settings(
                bundles=folder / "bundles", database_url=service.database_url, redis_url=service.redis.url
            )
            hot = asyncio.run(stages(settings, asked.seconds))
    print(f"{machine()}; {asked.items:,} items; medians in us\n\nstage alone, in a tight loop")
    for stage, took in hot.items():
        print(f"  {stage:44}{took:10.1f}")
    names = list(within["alone"])
    print(f"\n{'inside requests, history 50':30}" + "".join(f"{name:>10}" for name in names))
    for when, seen in within.items():
        print(f"  {when:28}" + "".join(f"{seen.get(name, float('nan')):10.1f}" for name in names))
    result = {
        "benchmark": "stages",
        "machine": machine(),
        "items": asked.items,
        "hot_us": hot,
        "in_requests_us": within,
    }
    print(json.dumps(result))


async def stages(settings: Settings, seconds: float) -> dict[str, float]:
    """Each stage by itself."""
    took: dict[str, float] = {}
    async with services_for(settings, Metrics()) as services:
        serving = services.live.now_serving()
        model, policy = serving.model(None, None), serving.bundle.policy
        cases: dict[int, list[Case]] = {}
        for length in LENGTHS:
            users = [(f"{running.prefix(length)}{n}", policy) for n in range(USERS)]
            took[f"read: history {length}"] = await median_us_of(services.histories.read, users, seconds)
            placed = []
            for user in users:
                question, history = Question(user_id=user[0]), await services.histories.read(*user)
                placed.append((question, Reading(history, "cache", moment(question, None)), serving))
            took[f"ids to indices: history {length}"] = median_us(place, placed, seconds)
            cases[length] = [place(*one) for one in placed]

        async def read_8(*users: str) -> None:
            await asyncio.gather(*(services.histories.read(user, policy) for user in users))

        eights = [tuple(f"{running.prefix(USUAL)}{n + at}" for n in range(8)) for at in range(0, USERS, 8)]
        took[f"read: history {USUAL}, 8 at once, each"] = await median_us_of(read_8, eights, seconds) / 8
        for length in LENGTHS:
            took |= encoding(model, cases[length], length, seconds)
        took |= searching(model, cases[USUAL], serving, seconds)
    took["log line"] = log_line(seconds)
    return took


def encoding(model: Model, cases: list[Case], length: int, seconds: float) -> dict[str, float]:
    """The network, for one history and for several at once."""
    took = {}
    for size in (1, 4, CHUNK):
        chunks = [cases[at : at + size] for at in range(0, len(cases) - size + 1, size)]
        given = [([c.sequence for c in chunk], [c.times for c in chunk]) for chunk in chunks]
        took[f"encode: history {length}, batch {size}, each"] = median_us(model.encoder.encode, given, seconds) / size
    return took


def searching(model: Model, cases: list[Case], serving: Serving, seconds: float) -> dict[str, float]:
    """All that follows the network."""
    took = {}
    queries = model.encoder.encode([c.sequence for c in cases], [c.times for c in cases])  # (B, D)
    scopes = [case.scope(serving) for case in cases]
    wanted = np.arange(serving.known + 1) % 20 == 10
    few = [replace(scope, wanted=wanted) for scope in scopes]
    for path, mode, chosen in (
        ("exact", Mode.EXACT, scopes), ("gather, a twentieth", Mode.EXACT, few), ("hnsw", Mode.HNSW, scopes)
    ):  # fmt: skip
        retriever = Retriever(model.retriever.vectors, model.retriever.index, mode)
        given = [(query, CANDIDATES, scope) for query, scope in zip(queries, chosen, strict=True)]
        took[f"retrieve {CANDIDATES}: {path}"] = median_us(retriever.candidates, given, seconds)
    found = [model.retriever.candidates(q, CANDIDATES, s).items for q, s in zip(queries, scopes, strict=True)]

    def gate(case: Case, items: IntArray) -> None:
        exclude(items, case.scope(serving))

    def answer(case: Case, best: Retrieval) -> None:
        dumped(rendered(respond(case, serving, model, best)))

    took["exclude: the final gate"] = median_us(gate, list(zip(cases, found, strict=True)), seconds)
    ranked = [(model, query, items, 10, "exact", serving) for query, items in zip(queries, found, strict=True)]
    took["rank: the first 10"] = median_us(rank, ranked, seconds)
    answers = [(case, rank(*given)) for case, given in zip(cases, ranked, strict=True)]
    took["respond: ids, titles, JSON"] = median_us(answer, answers, seconds)
    return took


def log_line(seconds: float) -> float:
    """One line of a request through `logging`, to nowhere."""
    log = logging.getLogger("tests.benchmarks.stages")
    with Path("/dev/null").open("w") as nowhere:
        handler = logging.StreamHandler(nowhere)
        handler.setFormatter(JsonLines())
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        log.propagate = False
        fields = {
            "request_id": uuid7(), "method": "GET", "route": "/recommend/{user_id}", "status": 200, "ms": 0.7,
            "stages": dict.fromkeys(("read", "encode", "retrieve", "exclude", "rank"), 0.1), "retrieval": "exact",
        }  # fmt: skip
        return median_us(partial(log.info, extra={"fields": fields}), [("request",)], seconds)


def in_requests(url: str, requests: int) -> dict[str, float]:
    """Medians of `Server-Timing` over requests one after another."""
    seen: dict[str, list[float]] = {}
    with httpx.Client(base_url=url) as client:
        for number in range(requests + USERS):
            answer = client.get(f"/recommend/{running.prefix(USUAL)}{number % USERS}").raise_for_status()
            if number >= USERS:
                for name, took in STAGE.findall(answer.headers["server-timing"]):
                    seen.setdefault(name, []).append(float(took) * 1000)
    return {name: statistics.median(took) for name, took in seen.items()}


def in_company(url: str, requests: int) -> dict[str, float]:
    """The same while seven others ask without a pause."""
    with ThreadPoolExecutor(1) as aside:
        others = aside.submit(
            load.closed, url, running.prefix(USUAL), running.USERS, connections=7, seconds=2 + requests // 50
        )
        found = in_requests(url, requests)
        if others.done():
            raise SystemExit("the others were done before us; ask for fewer requests")
        return found


if __name__ == "__main__":
    main()
