"""Whatever is asked, on whatever path, while events, items and bundles change: the rules hold, and nothing is missing.

`test_service_gate.py` compares single answers with an oracle; here everything happens at once, over the interface, so
that requests meet in one worker and are served together, some by the old bundle and some by the new one.
"""

from __future__ import annotations

import asyncio
import itertools
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from shared import retrieval
from shared.bundle import point_current
from shared.catalogue import Item
from shared.retrieval import Mode
from shared.times import DAY, END, now, of_year, parse, render
from tests.servers import RedisServer
from tests.serving import Running, ids_of, json_of, serving
from tests.worlds import BORN, CREATED, World, exists, write_bundle

COUNT = 48
WIDTH = 6
PAST = BORN + 400 * DAY
FUTURE, LATER = of_year(2100), of_year(2200)
CATEGORIES = ("g:x", "g:y", "h:x", "h:y")
IDS = [f"i{n}" for n in range(COUNT + 6)]  # the last ones are in no bundle
STRANGERS = ("unheard-of",)
fresh = itertools.count()


def world(seed: int) -> World:
    """Items of all kinds: gone, still to come, withdrawn, with and without categories. Two seeds share most ids."""
    rng = np.random.default_rng(seed)
    items = []
    for item_id in sorted(rng.choice(IDS[:COUNT], COUNT - 6, replace=False).tolist()):
        born = BORN + int(rng.integers(0, 300)) * DAY if rng.random() < 0.85 else FUTURE
        until = born + int(rng.integers(1, 200)) * DAY if rng.random() < 0.15 else END
        carried = tuple(c for c in CATEGORIES if rng.random() < 0.4)
        items.append(Item(item_id, None, carried, born, until, bool(rng.random() < 0.1)))
    count = len(items)
    views = tuple((item.item_id, PAST + v * DAY) for item in items for v in range(int(rng.integers(0, 4))))
    vectors = rng.normal(size=(count, WIDTH)).astype(np.float32)
    table = rng.normal(size=(count + 2, WIDTH)).astype(np.float32)
    return World(tuple(items), views, ("sasrec",), tables={"sasrec": table}, vectors=vectors)


WORLDS = {"a": world(1), "b": world(2)}


@dataclass
class Truth:
    """What was told to the service, as it must follow."""

    put: dict[str, Item] = field(default_factory=dict)
    withdrawn: set[str] = field(default_factory=set)
    seen: dict[str, list[tuple[str, int]]] = field(default_factory=dict)

    def items(self, version: str) -> dict[str, Item]:
        """Every item as it is beside this bundle."""
        found = {item.item_id: item for item in WORLDS[version].items}
        found |= {i: Item(i, available_from=parse(CREATED)) for i in self.withdrawn if i not in found} | self.put
        return {i: replace(item, withdrawn=True) if i in self.withdrawn else item for i, item in found.items()}

    def apply(self, change: Mapping[str, Any]) -> None:
        """A PUT with all fields, or a DELETE."""
        item_id = change["item"]
        if change["withdraw"]:
            self.withdrawn.add(item_id)
            return
        self.withdrawn.discard(item_id)
        self.put[item_id] = Item(item_id, None, tuple(change["categories"]), change["from"], change["until"])


def fits(item: Item, question: Mapping[str, Any]) -> bool:
    wanted, unwanted = question.get("filter", ()), question.get("filter_out", ())
    fields = {c.split(":")[0] for c in wanted}
    named = {c.split(":")[0] for c in item.categories if c in wanted}
    return named == fields and not set(unwanted) & set(item.categories)


# --- what is asked

items = st.sampled_from([*IDS, *STRANGERS])
days = st.sampled_from([BORN + day * DAY for day in (-1, 50, 150, 299, 500)])
wishes = st.fixed_dictionaries(
    {"n": st.sampled_from([1, 5, 100])},
    optional={
        "as_of": days.map(render),
        "exclude_seen": st.booleans(),
        "exclude": st.lists(items, max_size=5),
        "filter": st.lists(st.sampled_from(CATEGORIES), min_size=1, max_size=3, unique=True),
        "filter_out": st.lists(st.sampled_from(CATEGORIES), min_size=1, max_size=2, unique=True),
    },
)
USERS = ("often", "once", "never")
questions = st.one_of(
    st.tuples(st.just("user"), st.sampled_from(USERS), wishes),
    st.tuples(st.just("batch"), st.lists(st.sampled_from(USERS), min_size=1, max_size=20), wishes),
    st.tuples(st.just("brought"), st.lists(items, max_size=6), wishes),
    st.tuples(st.just("candidates"), st.tuples(st.lists(items, max_size=3), st.lists(items, max_size=20)), wishes),
    st.tuples(st.just("similar"), st.sampled_from(IDS[:COUNT]), wishes),
)
changes = st.fixed_dictionaries(
    {
        "item": st.sampled_from(IDS),
        "withdraw": st.booleans(),
        "categories": st.lists(st.sampled_from(CATEGORIES), max_size=2, unique=True),
        "from": st.sampled_from([BORN, PAST, FUTURE]),
        "until": st.sampled_from([LATER, LATER, PAST + DAY]),
    }
)
views = st.tuples(st.sampled_from(USERS[:2]), items, days)
phases = st.fixed_dictionaries(
    {
        "views": st.lists(views, max_size=8),
        "changes": st.lists(changes, max_size=6),
        "questions": st.lists(questions, min_size=1, max_size=12),
        "swap": st.booleans(),
    }
)


class Driver:
    """One service, and what must be true of it."""

    def __init__(self, upnext: Running, name: str) -> None:
        self.upnext, self.name, self.truth, self.version = upnext, name, Truth(), "a"

    async def tell(self, phase: Mapping[str, Any]) -> None:
        """Events and changes of a phase, one after the other."""
        for user, item, time in phase["views"]:
            await self.upnext.view(f"{self.name}-{user}", item, at=render(time))
            self.truth.seen.setdefault(user, []).append((item, time))
        for change in phase["changes"]:
            if change["withdraw"]:
                known = change["item"] in self.truth.items(self.version)
                response = await self.upnext.http.delete(f"/items/{change['item']}")
                assert response.status_code == (200 if known else 404)
                if not known:
                    continue
            else:
                if change["from"] >= change["until"]:
                    continue
                dates = {"available_from": render(change["from"]), "available_until": render(change["until"])}
                fields = {"title": "t", "categories": change["categories"], "withdrawn": False}
                await self.upnext.put(change["item"], **fields, **dates)
            self.truth.apply(change)

    async def ask(self, path: str, about: Any, wishes: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
        """Ask one question; for each answer the user that it is for, and the answer."""
        http = self.upnext.http
        match path:
            case "user":
                response = await http.get(f"/recommend/{self.name}-{about}", params=dict(wishes))
                return [(about, json_of(response))]
            case "batch":
                body = {"users": [f"{self.name}-{user}" for user in about], **wishes}
                results = json_of(await http.post("/recommend/batch", json=body))["results"]
                return list(zip(about, results, strict=True))
            case "brought":
                return [("", json_of(await http.post("/recommend", json={"history": about, **wishes})))]
            case "candidates":
                body = {"history": about[0], "candidates": about[1], **wishes}
                return [("", json_of(await http.post("/recommend", json=body)))]
            case _:
                chosen = {name: value for name, value in wishes.items() if name in ("n", "as_of")}
                response = await http.get(f"/items/{about}/similar", params=chosen)
                if response.status_code == 404:
                    return []
                return [("", json_of(response))]

    def check(self, path: str, about: Any, wishes: Mapping[str, Any], user: str, answer: dict[str, Any]) -> None:
        """All rules on one answer, and that no more is left out than they say."""
        found, as_of = ids_of(answer), parse(answer["as_of"])
        version = answer["model"]["version"]
        known, in_bundle = self.truth.items(version), WORLDS[version].catalogue.index_by_id
        permitted = {i for i, item in known.items() if exists(item, as_of)}
        if path == "similar":
            permitted -= {about}
        else:
            cut = as_of if "as_of" in wishes else END
            seen = {i for i, time in self.truth.seen.get(user, []) if time <= cut}
            seen |= set(about if path == "brought" else about[0] if path == "candidates" else ())
            permitted -= seen if wishes.get("exclude_seen", True) else set()
            permitted -= set(wishes.get("exclude", ()))
            permitted = {i for i in permitted if fits(known[i], wishes)}
            if path == "candidates":
                permitted &= set(about[1])
        assert len(set(found)) == len(found)
        assert set(found) <= permitted
        if path == "similar" and about not in in_bundle:
            return  # by categories: items that share none with it are not like it
        if answer["strategy"] in ("sequence", "similar") and path != "candidates":
            permitted &= set(in_bundle)  # no model has a vector for the others
        assert len(found) == min(wishes["n"], len(permitted))

    async def run(self, phase: Mapping[str, Any]) -> None:
        """One phase: tell, then ask everything at once and twice; again and again while the other bundle goes live."""
        await self.tell(phase)
        before, asked = self.version, phase["questions"]
        await self.round(asked, {before})
        if not phase["swap"]:
            return
        self.version = "b" if before == "a" else "a"
        point_current(self.upnext.settings.bundles, self.version)
        while self.upnext.services.live.now_serving().bundle.version != self.version:
            await self.round(asked, {before, self.version})
            await asyncio.sleep(0.05)
        await self.round(asked, {self.version})

    async def round(self, asked: Sequence[tuple[str, Any, Mapping[str, Any]]], versions: set[str]) -> None:
        """Every question twice, all at once; the answers must come from these bundles, and keep the rules."""
        began = now()
        answers = await asyncio.gather(*(self.ask(*question) for question in (*asked, *asked)))
        ended = now()
        for (path, about, wishes), answered in zip((*asked, *asked), answers, strict=True):
            for user, answer in answered:
                assert answer["model"]["version"] in versions
                as_of = parse(answer["as_of"])
                assert as_of == parse(wishes["as_of"]) if "as_of" in wishes else began <= as_of <= ended
                self.check(path, about, wishes, user, answer)
        for first, second in zip(answers[: len(asked)], answers[len(asked) :], strict=True):
            for (_, one), (_, other) in zip(first, second, strict=False):
                if one["model"]["version"] == other["model"]["version"]:
                    assert ids_of(one) == ids_of(other)


@pytest.mark.parametrize("mode", list(Mode))
def test_the_rules_hold_whatever_happens(
    mode: Mode, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retrieval, "EXACT_ITEMS", 20)  # so that `auto` goes all ways in these small worlds

    @settings(
        max_examples=12,
        deadline=None,
        derandomize=True,
        phases=[Phase.generate],  # shrinking takes minutes
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(phases, min_size=1, max_size=3))
    def check(story: list[Mapping[str, Any]]) -> None:
        async def play() -> None:
            with tempfile.TemporaryDirectory(prefix="upnext-paths-") as name:
                folder = Path(name)
                write_bundle(folder / "bundles", WORLDS["b"], version="b", current=False)
                write_bundle(folder / "bundles", WORLDS["a"], version="a")
                async with serving(
                    folder, redis_server, None, retrieval=mode, candidates=5,
                    bundle_poll_seconds=0.01, catalogue_poll_seconds=0.01,
                ) as upnext:  # fmt: skip
                    driver = Driver(upnext, f"story{next(fresh)}")
                    for phase in story:
                        await driver.run(phase)

        asyncio.run(play())

    check()
