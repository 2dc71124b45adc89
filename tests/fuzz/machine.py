"""Two workers against a model in plain dicts: any order of events, reads, catalogue changes, swaps, erasures, restarts.

Every answer must be exactly what the model says, from whichever worker, cache or log it comes.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from service.history import create_redis
from service.settings import Settings
from shared.events import HistoryPolicy
from shared.times import parse, render
from tests.servers import RedisServer
from tests.serving import Running, fresh_database, running, until
from tests.worlds import World, after, cyclic, write_bundle

Result = TypeVar("Result")
POLICY = HistoryPolicy(sequence_types=("view",), seen_types=("view", "skip"))
SMALL, LARGE = 6, 9  # items of the two worlds; "7" to "9" are unknown in the small one
NEW = "new"  # an item that no bundle knows
T = parse("2026-01-01T00:00:00Z")

users = st.sampled_from(["a", "b"])
item_ids = st.sampled_from([str(i) for i in range(1, LARGE + 1)] + [NEW])
event_fields = st.fixed_dictionaries(
    {
        "user_id": users,
        "item_id": item_ids,
        "event_type": st.sampled_from(["view", "view", "skip", "other"]),
        "event_id": st.sampled_from([None, None, "1", "2", "3", "4"]),
        "timestamp": st.sampled_from([None, None, *(render(T + second * 1_000_000) for second in range(3))]),
    }
)


@dataclass(frozen=True)
class Known:
    """An event of the log, as the model has it."""

    sent: tuple[tuple[str, Any], ...]
    moment: int  # epoch microseconds; of events sent without a time, far above all others and in the order they came
    timed: bool

    def __getitem__(self, name: str) -> Any:
        return dict(self.sent)[name]


@dataclass
class Model:
    """What must be true."""

    items: int = SMALL
    log: dict[str, list[Known]] = field(default_factory=dict)
    erased: set[str] = field(default_factory=set)
    gone: set[tuple[str, str]] = field(default_factory=set)  # ids of erased events that were sent without a time
    withdrawn: set[str] = field(default_factory=set)
    changed: dict[str, int] = field(default_factory=dict)  # items that the live catalogue has -> order of their dates
    arrivals: int = 0

    def history(self, user: str) -> list[Known]:
        """In the order of time, then arrival."""
        return sorted(self.log.get(user, []), key=lambda event: event.moment)

    def find(self, user: str, event_id: str | None) -> Known | None:
        """The event of that id."""
        same = (e for e in self.log.get(user, []) if event_id is not None and e["event_id"] == event_id)
        return next(same, None)

    def judged(self, batch: list[dict[str, Any]]) -> tuple[str, list[int]]:
        """What becomes of a batch: "erased" or "conflict" with the positions at fault, or "taken" with those new."""
        firsts = {(one["user_id"], one["event_id"] or at): one for at, one in reversed(list(enumerate(batch)))}
        late = [at for at, one in enumerate(batch) if self.from_before(firsts[one["user_id"], one["event_id"] or at])]
        if late:
            return "erased", late
        first: dict[tuple[str, str], tuple[tuple[str, Any], ...]] = {}
        wrong, fresh = [], []
        for at, one in enumerate(batch):
            if one["event_id"] is None:
                fresh.append(at)
                continue
            there = self.find(one["user_id"], one["event_id"])
            identity = (one["user_id"], one["event_id"])
            if there is None and identity not in first:
                fresh.append(at)
            if _sent(one) != first.setdefault(identity, there.sent if there else _sent(one)):
                wrong.append(at)
        return ("conflict", wrong) if wrong else ("taken", fresh)

    def from_before(self, one: dict[str, Any]) -> bool:
        """Whether an event is refused for an erasure. Times in these tests are before all erasures."""
        by_time = one["user_id"] in self.erased and one["timestamp"] is not None
        return by_time or (one["user_id"], one["event_id"]) in self.gone

    def take(self, one: dict[str, Any]) -> None:
        """Store an event."""
        self.arrivals += 1
        timed = one["timestamp"] is not None
        moment = parse(one["timestamp"]) if timed else 2**60 + self.arrivals
        self.log.setdefault(one["user_id"], []).append(Known(_sent(one), moment, timed))

    def erase(self, user: str) -> int:
        """Erase a user; how many events that takes."""
        taken = self.log.pop(user, [])
        self.gone |= {(user, event["event_id"]) for event in taken if not event.timed and event["event_id"]}
        self.erased.add(user)
        return len(taken)

    def in_bundle(self, item: str) -> bool:
        """Whether the live bundle has it."""
        return item != NEW and int(item) <= self.items

    def change(self, item: str) -> None:
        """The live catalogue has the item from now on: with its bundle's date, else that of its first change."""
        if item not in self.changed:
            self.arrivals += 1
            self.changed[item] = int(item) - LARGE if self.in_bundle(item) else self.arrivals

    def recommended(self, user: str) -> tuple[str, list[str]]:
        """Strategy and items, all there are."""
        history = self.history(user)
        seen = {event["item_id"] for event in history if POLICY.marks_seen(event["event_type"])}
        fed = [event["item_id"] for event in history if POLICY.feeds(event["event_type"], None)]
        read = [int(item) for item in fed if self.in_bundle(item)]
        ranked = after(read[-1], self.items) if read else [str(i) for i in range(1, self.items + 1)]
        if not read:
            unknown = [item for item in self.changed if not self.in_bundle(item)]
            ranked += sorted(unknown, key=lambda item: (self.changed[item], item))
        return "sequence" if read else "popular", [i for i in ranked if i not in seen | self.withdrawn]


def _sent(one: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted((name, value) for name, value in one.items() if value is not None or name == "event_id"))


def world(count: int) -> World:
    """Items 1 to `count`, under this test's policy."""
    return replace(cyclic(count), policy=POLICY)


class Upnext(RuleBasedStateMachine):
    """The rules. Each run has a folder and a Redis of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Model()
        self.runner = asyncio.Runner()
        self.folder = Path(tempfile.mkdtemp(prefix="upnext-machine-"))
        self.redis = RedisServer()
        self.workers: list[Running] = []
        self.stack = AsyncExitStack()
        self.versions = 0

    def run(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        """On the loop of this machine."""
        return self.runner.run(coroutine)

    @initialize()
    def begin(self) -> None:
        """Start Redis and two workers on an empty log and the small world."""
        self.redis.start()
        write_bundle(self.folder / "bundles", world(SMALL), version="v0")
        self.run(fresh_database(self.folder / "log.db"))
        self.run(self.start())

    async def start(self) -> None:
        """Start both workers."""
        settings = Settings(
            redis_url=self.redis.url,
            database_url=f"sqlite:///{self.folder / 'log.db'}",
            bundles=self.folder / "bundles",
            bundle_poll_seconds=0.01,
            catalogue_poll_seconds=0.01,
        )
        # A Redis that is only slow, on a busy machine, must not count as down: the other worker may then answer from an
        # old entry for a moment, as the README says, and the model knows no moments.
        with patch("service.main.create_redis", partial(create_redis, timeout=10)):
            self.workers = [await self.stack.enter_async_context(running(settings)) for _ in range(2)]

    async def stop(self) -> None:
        """Stop both."""
        await self.stack.aclose()
        self.stack, self.workers = AsyncExitStack(), []

    @rule(batch=st.lists(event_fields, min_size=1, max_size=4), worker=st.integers(0, 1), alone=st.booleans())
    def tell(self, batch: list[dict[str, Any]], worker: int, alone: bool) -> None:
        """Events, one or several, some of them retries, some contradicting what was sent."""
        batch = batch[:1] if alone else batch
        verdict, positions = self.model.judged(batch)
        sent = [{name: value for name, value in one.items() if value is not None} for one in batch]
        body = sent[0] if alone else {"events": sent}
        response = self.run(self.workers[worker].http.post("/events", json=body))
        answer = response.json()
        if verdict == "taken":
            assert response.status_code == 200, answer
            statuses = ["accepted" if at in positions else "duplicate" for at in range(len(batch))]
            assert [one["status"] for one in answer["events"]] == statuses
            for at in positions:
                self.model.take(batch[at])
        else:
            assert (response.status_code, answer["type"]) == (409, f"urn:upnext:problem:{verdict}"), answer
            places = [""] if alone else [f"/events/{at}" for at in positions]
            assert [fault["pointer"] for fault in answer["errors"]] == places

    @rule(user=users, worker=st.integers(0, 1))
    def erase(self, user: str, worker: int) -> None:
        """Once or again."""
        answer = self.run(self.workers[worker].http.delete(f"/users/{user}")).json()
        assert answer["events"] == self.model.erase(user)

    @rule(item=item_ids, withdrawn=st.booleans(), worker=st.integers(0, 1))
    def change(self, item: str, withdrawn: bool, worker: int) -> None:
        """PUT an item, or take it off the shelf."""
        if withdrawn:
            response = self.run(self.workers[worker].http.delete(f"/items/{item}"))
            known = self.model.in_bundle(item) or item in self.model.changed
            assert response.status_code == (200 if known else 404), response.text
            if not known:
                return
            self.model.withdrawn.add(item)
            revision = response.json()["revision"]
        else:
            revision = self.run(self.workers[worker].put(item, withdrawn=False))["revision"]
            self.model.withdrawn.discard(item)
        self.model.change(item)
        self.run(until(lambda: all(one.services.live.revision >= revision for one in self.workers)))

    @rule()
    def swap(self) -> None:
        """Publish the other world; both workers go over to it."""
        self.versions += 1
        self.model.items = LARGE if self.model.items == SMALL else SMALL
        version = f"v{self.versions}"
        write_bundle(self.folder / "bundles", world(self.model.items), version=version)

        def live() -> bool:
            return all(one.services.live.now_serving().bundle.version == version for one in self.workers)

        self.run(until(live))

    @rule()
    def restart_service(self) -> None:
        """Both workers end and come back."""
        self.run(self.stop())
        self.run(self.start())

    @rule()
    def restart_redis(self) -> None:
        """Killed, and back without its memory."""
        self.redis.restart()

    @rule()
    def forget(self) -> None:
        """All entries are evicted."""
        self.redis.cli("FLUSHALL")

    @rule(user=users, worker=st.integers(0, 1))
    def recommend(self, user: str, worker: int) -> None:
        """Exactly the model's items, in order."""
        answer = self.run(self.workers[worker].ask(user, n=100))
        strategy, expected = self.model.recommended(user)
        assert (answer["strategy"], [item["item_id"] for item in answer["items"]]) == (strategy, expected)

    @rule(user=users, worker=st.integers(0, 1))
    def history(self, user: str, worker: int) -> None:
        """Exactly the model's events, in order."""
        events = self.run(self.workers[worker].http.get(f"/users/{user}/history?limit=1000")).json()["events"]
        names = ("item_id", "event_type")
        assert [[e[n] for n in names] for e in events] == [[e[n] for n in names] for e in self.model.history(user)]

    def teardown(self) -> None:
        """Nothing is left behind."""
        self.run(self.stop())
        self.redis.__exit__(None, None, None)
        self.runner.close()
        shutil.rmtree(self.folder, ignore_errors=True)
