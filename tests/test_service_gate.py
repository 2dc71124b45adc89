"""An item that may not be returned never is, on any path; and all that may be are, when there is room for them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from service.batch import recommend_all
from service.bundles import Live, Serving
from service.catalogue import LiveCatalogue
from service.errors import Invalid
from service.history import WINDOW, HistoryStore, UserHistory
from service.metrics import Metrics
from service.recommend import Brought, Question, Recommendation, Recommender
from service.settings import Settings
from service.similar import similar
from service.telemetry import Trace
from shared.catalogue import Item, ItemChange
from shared.categories import Where
from shared.database import create_engine
from shared.events import HistoryPolicy, item_keys
from shared.retrieval import Candidates, Mode
from shared.times import BEGINNING, DAY, END, parse
from tests.worlds import BORN, CREATED, World, cyclic, exists, in_memory

WIDTH = 3
DAYS = st.integers(0, 6).map(lambda day: BORN + day * DAY)
SELDOM = st.sampled_from([False, False, False, True])  # most items exist, so that filters have something to choose
ENDS = st.sampled_from([END, END, END]) | DAYS
CATEGORIES = ("g:x", "g:y", "g:z", "h:x", "h:y")
ONE_MODEL = ("sasrec",)


class Remembered(HistoryStore):
    """Histories from a list of (item id, time); everybody's but "nobody"'s."""

    def __init__(self, events: Sequence[tuple[str, int]]) -> None:
        self.events, self.window = sorted(events, key=lambda e: e[1]), WINDOW

    async def read(self, user_id: str, policy: HistoryPolicy, as_of: int | None = None) -> UserHistory:
        events = [e for e in self.events if user_id != "nobody" and (as_of is None or e[1] <= as_of)]
        keys, times = item_keys([i for i, _ in events]), np.array([t for _, t in events], np.int64)
        return UserHistory(keys, times, np.unique(keys), int(times.max()) if events else None, "log")


@dataclass(frozen=True)
class Case:
    world: World
    changes: list[ItemChange]
    events: list[tuple[str, int]]
    question: Question
    candidates: int


def some(elements: Sequence[str], most: int) -> st.SearchStrategy[tuple[str, ...]]:
    """Up to `most` of `elements`, every number as often as any other. One choice: hundreds of small ones take long."""
    found = [list(combinations(elements, length)) for length in range(most + 1)]
    longest = max(map(len, found))
    return st.sampled_from([chosen for alike in found for chosen in alike * (longest // len(alike))])


FILTERS = st.builds(
    Where,
    some((*CATEGORIES, "g:none"), 3),
    some((*CATEGORIES, "h:none"), 2),
    st.none() | st.none() | DAYS,
    st.none() | st.none() | DAYS,
)
ITEMS = st.tuples(some(CATEGORIES, 3), st.just(BEGINNING) | DAYS, ENDS, SELDOM)
CHANGED = st.tuples(st.none() | some(CATEGORIES, 3), st.none() | DAYS, st.none() | ENDS, SELDOM)


@st.composite
def cases(
    draw: st.DrawFn, *, known_history: bool, brought: bool, named: bool, changed: bool, filtered: bool = False
) -> Case:
    count = draw(st.integers(1, 25))
    ids = [f"i{r}" for r in range(count)]
    anywhere = st.sampled_from([*ids, "new-a", "new-b", "new-c", "unheard-of"])
    items = tuple(Item(i, None, *draw(ITEMS)) for i in ids)
    numbers = np.random.default_rng(draw(st.integers(0, 2**16)))
    vectors, table = (numbers.integers(-2, 3, (rows, WIDTH)).astype(np.float32) for rows in (count, count + 2))
    views = tuple(draw(st.lists(st.tuples(st.sampled_from(ids), DAYS), max_size=10)))
    heard = anywhere if known_history else st.sampled_from(["unheard-of", "new-a", "new-b"])
    events = draw(st.lists(st.tuples(heard, DAYS), max_size=8))
    changes = [
        ItemChange(i, None, *draw(CHANGED), revision)
        for revision, i in enumerate(draw(st.lists(anywhere, max_size=9)) if changed else [], start=1)
    ]
    timed = draw(st.booleans())
    question = Question(
        user_id=None if brought else "u",
        brought=Brought([i for i, _ in events], [t for _, t in events] if timed and events else None)
        if brought
        else None,
        n=draw(st.integers(1, 4) | st.integers(1, 30)),
        as_of=draw(st.none() | DAYS),
        exclude_seen=draw(st.booleans()),
        exclude=draw(st.lists(anywhere, max_size=4)),
        where=draw(FILTERS) if filtered else None,
        candidates=draw(st.lists(anywhere, max_size=15)) if named else None,
    )
    world = World(items, views, ONE_MODEL, tables={"sasrec": table}, vectors=vectors)
    return Case(world, changes, events, question, draw(st.sampled_from([1, 5, 200])))


def recommender_of(case: Case, mode: Mode) -> tuple[Recommender, Serving]:
    live = Live(Settings(), LiveCatalogue(create_engine("sqlite://")), Metrics())
    live.serving, live.catalogue_read = Serving(in_memory(case.world, mode), []), True
    for change in case.changes[:3]:  # as they come, one by one,
        live.apply([change])
    live.apply(case.changes[3:])  # and many at once
    recommender = Recommender(live, Remembered(case.events), candidates=case.candidates, default_model=None)
    return recommender, live.serving


def answer(case: Case, mode: Mode) -> tuple[Recommendation, Serving]:
    recommender, serving = recommender_of(case, mode)
    return asyncio.run(recommender.recommend(case.question, Trace("test"))), serving


# --- the rules, item by item, without any of the code under test


def known_items(case: Case) -> dict[str, Item]:
    """Every item of the bundle and of the live catalogue as it is now."""
    newest = {change.item_id: change for change in case.changes}
    published = {item.item_id: item for item in case.world.catalogue.items}
    found = {}
    for item_id in [*published, *(i for i in newest if i not in published)]:
        # What the bundle does not know and nobody dated was not there when the bundle was made.
        unknown = Item(item_id, available_from=parse(CREATED))
        item, change = published.get(item_id, unknown), newest.get(item_id)
        if change:
            item = Item(
                item_id,
                None,
                item.categories if change.categories is None else change.categories,
                item.available_from if change.available_from is None else change.available_from,
                item.available_until if change.available_until is None else change.available_until,
                change.withdrawn,
            )
        found[item_id] = item
    return found


def fits(item: Item, where: Where | None) -> bool:
    if where is None:
        return True
    for field in {category.split(":")[0] for category in where.any_of}:
        if not any(c in item.categories for c in where.any_of if c.startswith(f"{field}:")):
            return False
    if any(c in item.categories for c in where.none_of):
        return False
    late_enough = where.after is None or item.available_from >= where.after
    return late_enough and (where.before is None or item.available_from <= where.before)


def names_unknown_fields(case: Case) -> bool:
    """Whether a filter must be refused. A field that only overwritten changes named may be known or not."""
    published = [c for item in case.world.items for c in item.categories]
    ever = published + [c for change in case.changes for c in change.categories or ()]
    now = published + [c for item in known_items(case).values() for c in item.categories]
    fields, sure = ({category.split(":")[0] for category in listed} for listed in (ever, now))
    where = case.question.where or Where()
    asked = {category.split(":")[0] for category in (*where.any_of, *where.none_of)}
    assume(not asked & (fields - sure))
    return bool(asked - fields)


def permitted(case: Case, found: Recommendation) -> list[str]:
    question = case.question
    cut = question.as_of if question.brought is None or question.brought.timestamps else None
    seen = {i for i, t in case.events if cut is None or (isinstance(cut, int) and t <= cut)}
    allowed = []
    for item in known_items(case).values():
        named = question.candidates is None or item.item_id in question.candidates
        left_out = item.item_id in question.exclude or (question.exclude_seen and item.item_id in seen)
        if exists(item, found.as_of) and fits(item, question.where) and named and not left_out:
            allowed.append(item.item_id)
    return allowed


def new_ones(case: Case, among: Sequence[str]) -> list[str]:
    """Those that the bundle does not know, in the order in which the next bundle will have them."""
    index = case.world.catalogue.index_by_id
    known = known_items(case)
    return sorted((i for i in among if i not in index), key=lambda i: (known[i].available_from, i))


def best_first(case: Case, found: Recommendation, serving: Serving) -> list[str]:
    """Permitted items in the order that the answer must have."""
    catalogue, allowed = serving.bundle.catalogue, permitted(case, found)
    index = catalogue.index_by_id
    new, old = new_ones(case, allowed), [i for i in allowed if i in index]
    if found.strategy == "popular":
        order = {int(i): r for r, i in enumerate(serving.bundle.popularity.fallback(found.as_of))}
        return sorted(old, key=lambda i: order[index[i]]) + new
    question = case.question
    cut = question.as_of if question.brought is None or question.brought.timestamps else None
    # A brought history without times is in order; all others are in order of time.
    timed = question.brought is None or question.brought.timestamps
    events = sorted(case.events, key=lambda e: e[1]) if timed else case.events
    known = [i for i, t in events if i in index and (not isinstance(cut, int) or t <= cut)]
    assert case.world.tables is not None
    assert case.world.vectors is not None
    query = case.world.tables["sasrec"][index[known[-1]]]
    scores = case.world.vectors @ query
    ranked = sorted(old, key=lambda i: (-scores[index[i] - 1], index[i]))
    return ranked + new if question.candidates is not None else ranked


PATHS = {
    "user": {"known_history": True, "brought": False, "named": False},
    "unknown user": {"known_history": False, "brought": False, "named": False},
    "brought history": {"known_history": True, "brought": True, "named": False},
    "candidates": {"known_history": True, "brought": True, "named": True},
    "popular candidates": {"known_history": False, "brought": True, "named": True},
}


@pytest.mark.parametrize("filtered", [False, True], ids=["all items", "filtered"])
@pytest.mark.parametrize("changed", [False, True], ids=["as published", "with live changes"])
@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_returns_exactly_what_may_be_returned(path: dict[str, bool], mode: Mode, changed: bool, filtered: bool) -> None:
    @settings(max_examples=40 if filtered else 15, deadline=None, derandomize=True)
    @given(cases(**path, changed=changed, filtered=filtered))
    def check(case: Case) -> None:
        if names_unknown_fields(case):
            with pytest.raises(Invalid, match="There is no field"):
                answer(case, mode)
            return
        found, serving = answer(case, mode)
        returned = [item.item_id for item in found.items]
        expected = best_first(case, found, serving)
        assert len(set(returned)) == len(returned) == min(case.question.n, len(expected))
        assert set(returned) <= set(expected)
        if mode is not Mode.HNSW:  # which of several equal items HNSW finds is its own affair
            assert returned == expected[: case.question.n]
        assert [i.item_id for i in found.items if i.reason == "new"] == new_ones(case, returned)

    check()


@pytest.mark.parametrize("mode", list(Mode))
def test_a_batch_gives_what_single_requests_give(mode: Mode) -> None:
    @settings(max_examples=15, deadline=None, derandomize=True)
    @given(cases(known_history=True, brought=False, named=False, changed=True, filtered=True), st.integers(1, 40))
    def check(case: Case, count: int) -> None:
        users = ["u" if r % 3 else "nobody" for r in range(count)]
        recommender, _ = recommender_of(case, mode)

        async def ask() -> tuple[list[Recommendation], dict[str, Recommendation]]:
            together = [found async for found in recommend_all(recommender, users, case.question, Trace("test"))]
            singly = {
                user: await recommender.recommend(replace(case.question, user_id=user), Trace("test"))
                for user in ("u", "nobody")
            }
            return together, singly

        if names_unknown_fields(case):
            with pytest.raises(Invalid, match="There is no field"):
                asyncio.run(ask())
            return
        together, singly = asyncio.run(ask())
        recommender.shutdown()
        assert [found.user_id for found in together] == users
        for user, found in zip(users, together, strict=True):
            single = singly[user]
            assert (found.items, found.strategy, found.version) == (single.items, single.strategy, single.version)

    check()


@pytest.mark.parametrize("mode", list(Mode))
def test_similar_items(mode: Mode) -> None:
    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(cases(known_history=False, brought=False, named=False, changed=True), st.data())
    def check(case: Case, data: st.DataObject) -> None:
        recommender, serving = recommender_of(case, mode)
        known, index = known_items(case), case.world.catalogue.index_by_id
        asked = data.draw(st.sampled_from(sorted(known)))
        as_of = case.question.as_of if isinstance(case.question.as_of, int) else None
        model = serving.model(None, None)
        found = asyncio.run(similar(recommender, serving, model, asked, case.question.n, as_of, Trace("test")))
        returned = [item.item_id for item in found.items]
        others = [i for i in known if i != asked and exists(known[i], found.as_of)]
        if asked not in index:
            order = {int(i): r for r, i in enumerate(serving.bundle.popularity.fallback(found.as_of))}
            shared = {i: len(set(known[asked].categories) & set(known[i].categories)) for i in others}
            akin = sorted((i for i in others if i in index and shared[i]), key=lambda i: order[index[i]])
            akin += new_ones(case, [i for i in others if shared[i]])
            assert returned == sorted(akin, key=lambda i: -shared[i])[: case.question.n]
            return
        assert case.world.vectors is not None
        mine = case.world.vectors[index[asked] - 1]
        cosines = {}
        for i in others:
            if i in index:
                its = case.world.vectors[index[i] - 1]
                lengths = float(np.linalg.norm(mine) * np.linalg.norm(its))
                cosines[i] = float(mine @ its) / lengths if lengths else 0.0
        assert len(set(returned)) == len(returned) == min(case.question.n, len(cosines))
        assert set(returned) <= set(cosines)
        best = sorted(cosines.values(), reverse=True)[: len(returned)]
        assert [i.score for i in found.items] == pytest.approx(best, abs=1e-5)
        assert [cosines[i] for i in returned] == pytest.approx(best, abs=1e-5)

    check()


@pytest.mark.parametrize("candidates", [None, ["2", "3", "4"]])
def test_the_last_gate_sees_what_retrieval_could_not(
    candidates: list[str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An item that is withdrawn between search and answer is not returned."""
    from service import recommend

    live = Live(Settings(), LiveCatalogue(create_engine("sqlite://")), Metrics())
    live.serving, live.catalogue_read = Serving(in_memory(cyclic(5)), []), True
    search = recommend.retrieve

    def withdrawn_meanwhile(*arguments: Any) -> list[Candidates]:
        found = search(*arguments)
        live.apply([ItemChange("2", None, None, None, None, True, 1)])
        return found

    monkeypatch.setattr(recommend, "retrieve", withdrawn_meanwhile)
    recommender = Recommender(live, Remembered([("1", BORN)]), candidates=200, default_model=None)
    found = asyncio.run(recommender.recommend(Question(user_id="u", n=2, candidates=candidates), Trace("test")))
    assert [item.item_id for item in found.items] == ["3", "4"]
