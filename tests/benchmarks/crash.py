"""Kill what there is, at random, and look afterwards whether an acknowledged event is missing.

    python -m tests.benchmarks.crash [--kills 200] [--database postgresql|sqlite] [--workers 2] [--seed 0]

Clients post numbered events, one request after the other, and send a request again (the same ids) until it is
acknowledged; events without an id are sent once. Viewers ask after each of their events what comes next: the answer
must know of it, wherever the history came from. Meanwhile workers, Redis and PostgreSQL are killed with -9 in random
order. In the end every acknowledged event must be in the log exactly once, as it was sent, and all histories must show
them in their places: by time, and by arrival where times are equal.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final

import httpx
from sqlalchemy import select

from service.history import WINDOW, HistoryStore, create_redis
from service.ingest import OVERDUE, SWEEP_SECONDS
from shared.database import create_engine, events
from shared.events import HistoryPolicy, item_keys
from shared.times import SECOND, parse, render
from tests.benchmarks.stack import Stack, machine, stack
from tests.serving import value_of

CLIENTS: Final = 6
VIEWERS: Final = 2
VIEWS: Final = 480  # of a viewer's user, fewer than the items there are
USERS: Final = 4  # of each client
START: Final = parse("2026-01-01T00:00:00Z")
BETWEEN: Final = 15  # acknowledged requests between two kills, so that there is something to lose
GIVE_UP: Final = 60.0  # seconds
STALE: Final = OVERDUE / SECOND + SWEEP_SECONDS + 1
"""Seconds for which other workers may answer from an old entry, where the worker that took an event could not reach
Redis and died before it could drop the entry."""


@dataclass
class Client:
    """Posts events of its own users, and remembers what was acknowledged."""

    number: int
    url: str
    dice: random.Random
    acknowledged: dict[str, dict[str, Any]] = field(default_factory=dict)  # by session_id, in the order sent
    once: set[str] = field(default_factory=set)  # sent without an id, acknowledged or not
    sent: int = 0
    requests: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    longest: float = 0.0  # seconds from the first try to the answer

    def new(self) -> dict[str, Any]:
        """An event that names itself in `session_id`. Many times are equal, some are late."""
        self.sent += 1
        name = f"{self.number}-{self.sent}"
        moment = START + (self.sent // 5 - self.dice.choice((0, 0, 0, 3))) * SECOND
        return {
            "user_id": f"u{self.number}-{self.dice.randrange(USERS)}",
            "item_id": f"i{name}",
            "event_type": "view",
            "timestamp": render(moment),
            "session_id": name,
        }

    async def run(self, stop: asyncio.Event) -> None:
        """Post until told to stop, and until the last request is acknowledged."""
        async with httpx.AsyncClient(base_url=self.url, timeout=15) as http:
            while not stop.is_set():
                batch = [self.new() for _ in range(self.dice.choice((1, 1, 1, 1, 7, 30)))]
                if self.dice.random() < 0.25:
                    self.once |= {event["session_id"] for event in batch}
                    if await self.post(http, batch):
                        self.keep(batch)
                    continue
                await self.insist(http, batch)
                await asyncio.sleep(self.dice.random() / 50)

    async def insist(self, http: httpx.AsyncClient, batch: list[dict[str, Any]]) -> None:
        """Post until it is acknowledged."""
        named = [event | {"event_id": event["session_id"]} for event in batch]
        started = time.monotonic()
        while not await self.post(http, named):
            if time.monotonic() - started > GIVE_UP:
                raise RuntimeError(f"no acknowledgement for {GIVE_UP:.0f} s: {self.refused}")
            await asyncio.sleep(0.05)
        self.longest = max(self.longest, time.monotonic() - started)
        self.keep(batch)

    async def post(self, http: httpx.AsyncClient, batch: list[dict[str, Any]]) -> bool:
        """One try; whether it was acknowledged. What must not happen at all raises."""
        try:
            answer = await http.post("/events", json={"events": batch} if len(batch) > 1 else batch[0])
        except httpx.TransportError as error:
            self.refused[type(error).__name__] += 1
            return False
        if answer.status_code == 200:
            return True
        if answer.status_code != 503 or "retry-after" not in answer.headers:
            raise RuntimeError(f"{answer.status_code}: {answer.text}")
        self.refused[answer.json()["type"]] += 1
        return False

    def keep(self, batch: list[dict[str, Any]]) -> None:
        """The batch was acknowledged."""
        self.requests += 1
        self.acknowledged |= {event["session_id"]: event for event in batch}


@dataclass
class Viewer(Client):
    """Views item after item, and looks each time whether the answer is the one that comes next."""

    answers: Counter[str] = field(default_factory=Counter)  # by where the history came from
    late: int = 0  # events that did not count at once, but within STALE
    stale: list[str] = field(default_factory=list)

    def new(self) -> dict[str, Any]:
        """The next event, at the time at which the service gets it."""
        user, view = divmod(self.sent, VIEWS)
        self.sent += 1
        name = f"v{self.number}-{user}"
        return {
            "user_id": name, "item_id": str(view + 1), "event_type": "view", "session_id": f"{name}-{view + 1}",
        }  # fmt: skip

    async def run(self, stop: asyncio.Event) -> None:
        """View and ask until told to stop, over a new connection each time: to any worker."""
        limits = httpx.Limits(max_keepalive_connections=0)
        async with httpx.AsyncClient(base_url=self.url, timeout=15, limits=limits) as http:
            while not stop.is_set():
                event = self.new()
                await self.insist(http, [event])
                deadline = time.monotonic() + STALE
                if not await self.knows(http, event):
                    self.late += 1
                    while not await self.knows(http, event):
                        if time.monotonic() > deadline:
                            self.stale.append(event["session_id"])
                            break
                        await asyncio.sleep(0.05)
                await asyncio.sleep(self.dice.random() / 50)

    async def knows(self, http: httpx.AsyncClient, event: dict[str, Any]) -> bool:
        """Whether the next answer is what comes after `event`, or nobody can say: neither Redis nor SQL answers."""
        try:
            answer = await http.get(f"/recommend/{event['user_id']}", params={"n": 1})
        except httpx.TransportError as error:
            self.refused[type(error).__name__] += 1
            return True
        if answer.status_code == 503:
            self.refused[answer.json()["type"]] += 1
            return True
        found = answer.raise_for_status().json()
        self.answers[found["history_source"]] += 1
        is_next: bool = found["items"][0]["item_id"] == str(int(event["item_id"]) + 1)
        return is_next or found["history_source"] == "none"


@dataclass
class Killer:
    """Kills at random what the stack has."""

    stack: Stack
    dice: random.Random
    killed: Counter[str] = field(default_factory=Counter)

    async def run(self, kills: int, progress: Callable[[], int]) -> None:
        """Kill so many times, each after some more requests were acknowledged."""
        ways: dict[str, Callable[[], Awaitable[None]]] = {"worker": self.worker, "redis": self.redis}
        if self.stack.postgres is not None:
            ways["postgresql"] = self.postgresql
        for number in range(kills):
            reached, deadline = progress() + BETWEEN, time.monotonic() + GIVE_UP
            while progress() < reached and time.monotonic() < deadline:  # noqa: ASYNC110 - nobody would set an event
                await asyncio.sleep(0.01)
            await asyncio.sleep(self.dice.random() / 5)
            names = list(ways)
            # Each of them at least once, however few the kills.
            name = names[number] if number < len(names) else self.dice.choice(names)
            await ways[name]()
            self.killed[name] += 1

    async def worker(self) -> None:
        """One worker; the launcher starts another."""
        with suppress(ProcessLookupError):
            os.kill(self.dice.choice(self.stack.workers()), signal.SIGKILL)

    async def redis(self) -> None:
        """Redis, which comes back empty after a moment."""
        self.stack.redis.kill()
        await asyncio.sleep(self.dice.random() / 2)
        await asyncio.to_thread(self.stack.redis.start)

    async def postgresql(self) -> None:
        """All of PostgreSQL, which recovers after a moment."""
        assert self.stack.postgres is not None
        await asyncio.to_thread(self.stack.postgres.kill)
        await asyncio.sleep(self.dice.random() / 2)
        await asyncio.to_thread(self.stack.postgres.start)


@dataclass
class Verdict:
    """What was found afterwards; each list holds names of events, or of users."""

    lost: list[str]
    doubled: list[str]
    changed: list[str]
    out_of_place: list[str]
    invented: list[str]
    stale: list[str]

    def good(self) -> bool:
        """Whether every promise was kept."""
        return not any(vars(self).values())


async def examine(running: Stack, clients: list[Client]) -> Verdict:
    """Compare the log, the cache and the API with what was acknowledged."""
    engine, redis = create_engine(running.database_url), create_redis(running.redis.url, timeout=5)
    columns = [events.c[n] for n in ("session_id", "user_id", "item_id", "event_type", "timestamp", "seq")]
    async with engine.connect() as connection:
        rows = (await connection.execute(select(*columns).order_by(events.c.seq))).all()
    count = Counter(row.session_id for row in rows)
    found = {row.session_id: row for row in rows}
    acknowledged = {name: event for client in clients for name, event in client.acknowledged.items()}
    sendable = acknowledged.keys() | {name for client in clients for name in client.once}
    changed = [
        name
        for name, event in acknowledged.items()
        if (row := found.get(name))
        and (row.user_id, row.item_id, render(row.timestamp))
        != (event["user_id"], event["item_id"], event.get("timestamp", render(row.timestamp)))
    ]
    out_of_place = []
    for client in clients:  # a client sends after an acknowledgement: later sent is later arrived
        arrivals = [found[name].seq for name in client.acknowledged if name in found]
        if arrivals != sorted(arrivals):
            out_of_place.append(f"client {client.number}")
    histories = HistoryStore(redis, engine)
    async with httpx.AsyncClient(base_url=running.url, timeout=30) as http:
        for user in sorted({row.user_id for row in rows}):
            wanted = sorted((r for r in rows if r.user_id == user), key=lambda row: (row.timestamp, row.seq))
            items = [row.item_id for row in wanted]
            for _ in range(2):  # as it stands in the cache, or as the log has it, and then as it was put there
                history = await histories.read(user, HistoryPolicy())
                if [int(key) for key in history.items] != [int(key) for key in item_keys(items)][-WINDOW:]:
                    out_of_place.append(f"{user} ({history.source})")
            shown = (await http.get(f"/users/{user}/history", params={"limit": 100})).json()["events"]
            if [event["item_id"] for event in shown] != items[-100:]:
                out_of_place.append(f"{user} (api)")
    await redis.aclose()
    await engine.dispose()
    return Verdict(
        lost=[name for name in acknowledged if name not in found],
        doubled=[name for name, times in count.items() if times > 1],
        changed=changed,
        out_of_place=out_of_place,
        invented=[name for name in found if name not in sendable],
        stale=[name for client in clients if isinstance(client, Viewer) for name in client.stale],
    )


def crash(database: str, kills: int, workers: int = 2, seed: int = 0) -> tuple[Verdict, dict[str, Any]]:
    """The whole run: the verdict, and figures about it."""
    with stack(database, workers=workers) as running:
        viewers = [Viewer(n, running.url, random.Random(f"{seed} v{n}")) for n in range(VIEWERS)]
        clients = [*viewers, *(Client(n, running.url, random.Random(f"{seed} {n}")) for n in range(CLIENTS))]
        killer = Killer(running, random.Random(seed))
        started = time.monotonic()
        asyncio.run(rage(clients, killer, kills))
        seconds = time.monotonic() - started
        time.sleep(STALE)
        verdict = asyncio.run(examine(running, clients))
        starts = worker_starts(running.url, workers + killer.killed["worker"])
    figures = {
        "benchmark": "crash", "machine": machine(), "database": database, "workers": workers, "seed": seed,
        "kills": dict(killer.killed), "worker_starts": starts, "seconds": round(seconds, 1),
        "acknowledged": sum(len(client.acknowledged) for client in clients),
        "answers": dict(sum((viewer.answers for viewer in viewers), Counter())),
        "late": sum(viewer.late for viewer in viewers),
        "refused_tries": dict(sum((client.refused for client in clients), Counter())),
        "longest_wait_seconds": round(max(client.longest for client in clients), 2),
        **{name: len(found) for name, found in vars(verdict).items()},
    }  # fmt: skip
    return verdict, figures


def worker_starts(url: str, wanted: int) -> int:
    """How many starts of workers the service has counted; the last of `wanted` may still be on its way."""
    deadline = time.monotonic() + GIVE_UP
    while True:
        counted = int(value_of(httpx.get(f"{url}/metrics", timeout=30).text, "upnext_worker_starts_total"))
        if counted >= wanted or time.monotonic() > deadline:
            return counted
        time.sleep(0.2)


async def rage(clients: list[Client], killer: Killer, kills: int) -> None:
    """Let the clients post until the killer is done."""
    stop = asyncio.Event()
    posting = [asyncio.create_task(client.run(stop)) for client in clients]
    killing = asyncio.create_task(killer.run(kills, lambda: sum(client.requests for client in clients)))
    done, _ = await asyncio.wait([killing, *posting], return_when=asyncio.FIRST_COMPLETED)
    stop.set()
    await asyncio.gather(*done, *posting, killing)


def main() -> int:
    """Run, print a table and one JSON line; 0 if every promise was kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--database", choices=["postgresql", "sqlite"], default="postgresql")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    verdict, figures = crash(chosen.database, chosen.kills, chosen.workers, chosen.seed)
    for name, value in figures.items():
        print(f"{name:<22}{value}")
    for name, found in vars(verdict).items():
        if found:
            print(f"{name}: {', '.join(found[:10])}")
    print(json.dumps(figures))
    return 0 if verdict.good() else 1


if __name__ == "__main__":
    sys.exit(main())
