"""Whatever is asked, on whatever path, while events, items and bundles change: the rules hold, and nothing is missing.

`test_service_gate.py` compares single answers with an oracle; here everything happens at once, over the interface, so
that requests meet in one worker and are served together, some by the old bundle and some by the new one, some before an
item changes and some after it. An answer must be right for one of the states that it may have met.
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

from service.bundles import Serving
from service.recommend import Brought, Question, bring, place, settle
from service.telemetry import Trace
from shared import retrieval
from shared.bundle import point_current
from shared.catalogue import Item, ItemChange
from shared.retrieval import Mode
from shared.times import BEGINNING, DAY, END, now, of_year, parse, render
from tests.servers import RedisServer
from tests.serving import Running, ids_of, json_of, serving
from tests.worlds import BORN, CREATED, World, cyclic, exists, in_memory, write_bundle

COUNT = 48
WIDTH = 6
PAST = BORN + 400 * DAY
FUTURE, LATER = of_year(2100), of_year(2200)
CATEGORIES = ("g:x", "g:y", "h:x", "h:y")
IDS = [f"i{n}" for n in range(COUNT + 6)]  # the last ones are in no bundle
STRANGERS = ("unheard-of",)
MODELS = ("sasrec", "bert4rec")
BOUNDS = (("available_after", BEGINNING), ("available_before", END))
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
    tables = {name: rng.normal(size=(count + 2, WIDTH)).astype(np.float32) for name in MODELS}
    return World(tuple(items), views, MODELS, tables=tables, vectors=vectors)


WORLDS = {"a": world(1), "b": world(2)}


@dataclass
class Truth:
    """What was told to the service, as it must follow."""

    put: dict[str, Item] = field(default_factory=dict)
    withdrawn: set[str] = field(default_factory=set)
    seen: dict[str, list[tuple[str, int]]] = field(default_factory=dict)

    def copy(self) -> Truth:
        """As it is now."""
        return Truth(dict(self.put), set(self.withdrawn), {user: list(seen) for user, seen in self.seen.items()})

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
    early, late = (parse(question[name]) if name in question else bound for name, bound in BOUNDS)
    return named == fields and not set(unwanted) & set(item.categories) and early <= item.available_from <= late


# --- what is asked

items = st.sampled_from([*IDS, *STRANGERS])
days = st.sampled_from([BORN + day * DAY for day in (-1, 50, 150, 299, 500)])
wishes = st.fixed_dictionaries(
    {"n": st.sampled_from([1, 5, 100])},
    optional={
        "model": st.sampled_from(MODELS),
        "as_of": st.one_of(days.map(render), st.just("last_event")),
        "exclude_seen": st.booleans(),
        "exclude": st.lists(items, max_size=5),
        "filter": st.lists(st.sampled_from(CATEGORIES), min_size=1, max_size=3, unique=True),
        "filter_out": st.lists(st.sampled_from(CATEGORIES), min_size=1, max_size=2, unique=True),
        **{name: days.map(render) for name, _ in BOUNDS},
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
telling = changes.map(lambda change: {**change, "from": BORN, "until": LATER})  # which most answers show
views = st.tuples(st.sampled_from(USERS[:2]), items, days)
phases = st.fixed_dictionaries(
    {
        "views": st.lists(views, max_size=8),
        "changes": st.lists(changes, max_size=6),
        "meanwhile": st.lists(telling, max_size=3),
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
            await self.change(change)

    async def change(self, change: Mapping[str, Any]) -> None:
        """Withdraw an item, or put it with all its fields."""
        if change["withdraw"]:
            known = change["item"] in self.truth.items(self.version)
            response = await self.upnext.http.delete(f"/items/{change['item']}")
            assert response.status_code == (200 if known else 404)
            if not known:
                return
        else:
            if change["from"] >= change["until"]:
                return
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
            case "batch":
                body = {"users": [f"{self.name}-{user}" for user in about], **wishes}
                response = await http.post("/recommend/batch", json=body)
            case "brought":
                response = await http.post("/recommend", json={"history": entries(about, wishes), **wishes})
            case "candidates":
                body = {"history": entries(about[0], wishes), "candidates": about[1], **wishes}
                response = await http.post("/recommend", json=body)
            case _:
                chosen = {name: value for name, value in wishes.items() if name in ("n", "model", "as_of")}
                if chosen.get("as_of") == "last_event":
                    del chosen["as_of"]
                response = await http.get(f"/items/{about}/similar", params=chosen)
                if response.status_code == 404:
                    return []
        if wishes.get("as_of") == "last_event" and not self.has_event(path, about):
            assert response.status_code == 422
            return []
        answer = json_of(response)
        if path == "batch":
            return list(zip(about, answer["results"], strict=True))
        return [(about if path == "user" else "", answer)]

    def has_event(self, path: str, about: Any) -> bool:
        """Whether there is an event that `last_event` could mean, for everybody who is asked about."""
        match path:
            case "user" | "batch":
                return all(self.truth.seen.get(user) for user in ([about] if path == "user" else about))
            case "brought" | "candidates":
                return bool(about if path == "brought" else about[0])
            case _:
                return True

    def right(
        self, truth: Truth, path: str, about: Any, wishes: Mapping[str, Any], user: str, answer: dict[str, Any]
    ) -> bool:
        """Whether one answer keeps all rules beside this truth, and leaves out no more than they say."""
        found, as_of = ids_of(answer), parse(answer["as_of"])
        version = answer["model"]["version"]
        known, in_bundle = truth.items(version), WORLDS[version].catalogue.index_by_id
        permitted = {i for i, item in known.items() if exists(item, as_of)}
        if path == "similar":
            permitted -= {about}
        else:
            seen = {i for i, _ in self.history(path, about, wishes, user, as_of)}
            permitted -= seen if wishes.get("exclude_seen", True) else set()
            permitted -= set(wishes.get("exclude", ()))
            permitted = {i for i in permitted if fits(known[i], wishes)}
            if path == "candidates":
                permitted &= set(about[1])
        if len(set(found)) < len(found) or not set(found) <= permitted:
            return False
        if path == "similar" and about not in in_bundle:
            return True  # by categories: items that share none with it are not like it
        if answer["strategy"] in ("sequence", "similar") and path != "candidates":
            permitted &= set(in_bundle)  # no model has a vector for the others
        wanted: int = min(wishes["n"], len(permitted))
        return len(found) == wanted

    def history(self, path: str, about: Any, wishes: Mapping[str, Any], user: str, as_of: int) -> list[tuple[str, int]]:
        """Items and times of the history that counts, oldest first."""
        if path in ("brought", "candidates"):
            return [(item, 0) for item in (about if path == "brought" else about[0])]
        cut = as_of if "as_of" in wishes else END
        return sorted((s for s in self.truth.seen.get(user, []) if s[1] <= cut), key=lambda event: event[1])

    def check_scores(self, path: str, about: Any, wishes: Mapping[str, Any], user: str, answer: dict[str, Any]) -> None:
        """The model that was asked for has answered: scores are its own, for the newest item that it knows."""
        name, version = answer["model"]["name"], answer["model"]["version"]
        assert name == wishes.get("model", MODELS[0])
        if answer["strategy"] != "sequence":
            return
        world, indices = WORLDS[version], WORLDS[version].catalogue.index_by_id
        history = self.history(path, about, wishes, user, parse(answer["as_of"]))
        newest = [indices[item] for item, _ in history if item in indices][-1]
        assert world.tables is not None
        assert world.vectors is not None
        for item in answer["items"]:
            if item["score"] is not None:
                wanted = world.vectors[indices[item["item_id"]] - 1] @ world.tables[name][newest]
                assert item["score"] == pytest.approx(float(wanted), abs=1e-4)

    async def run(self, phase: Mapping[str, Any]) -> None:
        """One phase: tell, then ask everything at once and twice; again and again while the other bundle goes live."""
        await self.tell(phase)
        before, asked = self.version, phase["questions"]
        everything = [(path, about, {**wishes, "n": 100}) for path, about, wishes in asked]
        await self.round(everything if phase["meanwhile"] else asked, {before}, phase["meanwhile"])
        if not phase["swap"]:
            return
        self.version = "b" if before == "a" else "a"
        point_current(self.upnext.settings.bundles, self.version)
        while self.upnext.services.live.now_serving().bundle.version != self.version:
            await self.round(asked, {before, self.version})
            await asyncio.sleep(0.05)
        await self.round(asked, {self.version})

    async def round(
        self,
        asked: Sequence[tuple[str, Any, Mapping[str, Any]]],
        versions: set[str],
        meanwhile: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Every question twice, all at once; the answers must come from these bundles, and keep the rules.

        Items change meanwhile, one after another: first while every question is asked for the first time, then while it
        is asked again. An answer must be right beside the items as they were before, after or between.
        """
        truths = [self.truth.copy()]
        every, changed = [*asked, *asked], asyncio.Event()

        async def ask(number: int) -> list[tuple[str, dict[str, Any]]]:
            if meanwhile and number >= len(asked):
                await changed.wait()
            return await self.ask(*every[number])

        async def change() -> list[Any]:
            for one in meanwhile:
                await self.change(one)
                truths.append(self.truth.copy())
                changed.set()
            return []

        began = now()
        answers = await asyncio.gather(*map(ask, range(len(every))), change())
        ended = now()
        for (path, about, wishes), answered in zip(every, answers[:-1], strict=True):
            for user, answer in answered:
                assert answer["model"]["version"] in versions
                as_of, wanted = parse(answer["as_of"]), wishes.get("as_of")
                if wanted is None or (wanted == "last_event" and path == "similar"):
                    assert began <= as_of <= ended
                elif wanted == "last_event":
                    assert as_of == max(self.times(path, about, user))
                else:
                    assert as_of == parse(wanted)
                assert any(self.right(truth, path, about, wishes, user, answer) for truth in truths), (about, answer)
                self.check_scores(path, about, wishes, user, answer)
        if meanwhile:
            return
        for first, second in zip(answers[: len(asked)], answers[len(asked) :], strict=False):
            for (_, one), (_, other) in zip(first, second, strict=False):
                if one["model"]["version"] == other["model"]["version"]:
                    assert ids_of(one) == ids_of(other)

    def times(self, path: str, about: Any, user: str) -> list[int]:
        """When the events happened of the user, or of the history that is brought."""
        if path in ("user", "batch"):
            return [time for _, time in self.truth.seen[user]]
        return [moment(place) for place in range(len(about if path == "brought" else about[0]))]


def moment(place: int) -> int:
    """When the event at this place of a history that is brought has happened."""
    return BORN + (place + 1) * 50 * DAY


def entries(history: Sequence[str], wishes: Mapping[str, Any]) -> list[Any]:
    """A history to bring: with times where the newest one is asked for."""
    if wishes.get("as_of") != "last_event":
        return list(history)
    return [{"item_id": item, "timestamp": render(moment(place))} for place, item in enumerate(history)]


@pytest.mark.parametrize("mode", list(Mode))
def test_the_rules_hold_whatever_happens(
    mode: Mode, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So that `auto` goes all ways in these small worlds, and gathering has to choose.
    monkeypatch.setattr(retrieval, "EXACT_ITEMS", 20)
    monkeypatch.setattr(retrieval, "GATHER_SHARE", 0.5)

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


@pytest.mark.parametrize("candidates", [None, ["fresh", "3"]])
def test_an_item_that_is_added_on_the_way_of_a_request_whose_user_has_seen_it(candidates: list[str] | None) -> None:
    """Between the reading of a history and the answer there is time for a change: the item had no index to exclude."""
    serving = Serving(in_memory(cyclic(5)), ())
    question = Question(brought=Brought(["fresh"], None), candidates=candidates, n=100)
    assert question.brought is not None
    case = place(question, bring(question, question.brought, serving.bundle.policy), serving)
    serving.apply([ItemChange(i, None, (), BORN, None, False, 1) for i in ("fresh", "newer")])
    answer = settle(case, None, serving, serving.model(None, None), Trace("id"))
    assert [item.item_id for item in answer.items] == (
        ["1", "2", "3", "4", "5", "newer"] if candidates is None else ["3"]
    )


@given(
    st.lists(st.lists(st.tuples(st.sampled_from([*"123", *"abcdefgh"]), st.integers(-5, 5)), max_size=4), max_size=6)
)
def test_new_items_stand_in_the_order_of_their_dates_whatever_changes(story: list[list[tuple[str, int]]]) -> None:
    serving = Serving(in_memory(cyclic(3)), ())
    starts: dict[str, int] = {}
    for changes in story:
        serving.apply([ItemChange(i, None, None, BORN + day * DAY, None, False, 1) for i, day in changes])
        starts |= {i: day for i, day in changes if i.isalpha()}
        wanted = sorted(starts, key=lambda i: (starts[i], i))
        assert [serving.new[index] for index in serving.newcomers.tolist()] == wanted
