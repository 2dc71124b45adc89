"""An item that may not be returned never is, on any path; and all that may be are, when there is room for them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.bundles import Live, Serving
from service.catalogue import LiveCatalogue
from service.history import WINDOW, HistoryStore, UserHistory
from service.recommend import Brought, Question, Recommendation, Recommender
from service.settings import Settings
from service.telemetry import Metrics, Trace
from shared.catalogue import Item, ItemChange
from shared.database import create_engine
from shared.events import HistoryPolicy, item_keys
from shared.retrieval import Mode, Retrieval
from shared.times import BEGINNING, DAY, END
from tests.worlds import BORN, World, cyclic, in_memory

WIDTH = 3
DAYS = st.integers(0, 6).map(lambda day: BORN + day * DAY)
ONE_MODEL = ("sasrec",)


class Remembered(HistoryStore):
    """Histories from a list of (item id, time)."""

    def __init__(self, events: Sequence[tuple[str, int]]) -> None:
        self.events, self.window = sorted(events, key=lambda e: e[1]), WINDOW

    async def read(self, user_id: str, policy: HistoryPolicy, as_of: int | None = None) -> UserHistory:
        events = [e for e in self.events if as_of is None or e[1] <= as_of]
        keys, times = item_keys([i for i, _ in events]), np.array([t for _, t in events], np.int64)
        return UserHistory(keys, times, np.unique(keys), int(times.max()) if events else None, "log")


@dataclass(frozen=True)
class Case:
    world: World
    changes: list[ItemChange]
    events: list[tuple[str, int]]
    question: Question
    candidates: int


@st.composite
def cases(draw: st.DrawFn, *, known_history: bool, brought: bool, named: bool, changed: bool) -> Case:
    count = draw(st.integers(1, 25))
    ids = [f"i{r}" for r in range(count)]
    anywhere = st.sampled_from([*ids, "unheard-of"])
    items = tuple(
        Item(
            i,
            None,
            (),
            draw(st.one_of(st.just(BEGINNING), DAYS)),
            draw(st.one_of(st.just(END), DAYS)),
            draw(st.booleans()),
        )
        for i in ids
    )
    number = st.integers(-2, 2).map(float)
    rows = st.lists(number, min_size=WIDTH, max_size=WIDTH)
    vectors = np.array(draw(st.lists(rows, min_size=count, max_size=count)), np.float32)
    table = np.array(draw(st.lists(rows, min_size=count + 2, max_size=count + 2)), np.float32)
    views = tuple(draw(st.lists(st.tuples(st.sampled_from(ids), DAYS), max_size=10)))
    events = draw(st.lists(st.tuples(anywhere if known_history else st.just("unheard-of"), DAYS), max_size=8))
    changes = [
        ItemChange(i, None, None, draw(st.none() | DAYS), draw(st.none() | DAYS), draw(st.booleans()), revision)
        for revision, i in enumerate(draw(st.lists(anywhere, max_size=6)) if changed else [], start=1)
    ]
    timed = draw(st.booleans())
    question = Question(
        user_id=None if brought else "u",
        brought=Brought([i for i, _ in events], [t for _, t in events] if timed and events else None)
        if brought
        else None,
        n=draw(st.integers(1, 30)),
        as_of=draw(st.none() | DAYS),
        exclude_seen=draw(st.booleans()),
        exclude=draw(st.lists(anywhere, max_size=4)),
        candidates=draw(st.lists(anywhere, max_size=15)) if named else None,
    )
    world = World(items, views, ONE_MODEL, tables={"sasrec": table}, vectors=vectors)
    return Case(world, changes, events, question, draw(st.sampled_from([1, 5, 200])))


def answer(case: Case, mode: Mode) -> tuple[Recommendation, Serving]:
    bundle = in_memory(case.world, mode)
    live = Live(Settings(), LiveCatalogue(create_engine("sqlite://")), Metrics())
    live.serving, live.catalogue_read = Serving(bundle, []), True
    live.apply(case.changes)
    recommender = Recommender(live, Remembered(case.events), candidates=case.candidates, default_model=None)
    return asyncio.run(recommender.recommend(case.question, Trace("test"))), live.serving


def permitted(case: Case, found: Recommendation) -> list[str]:
    """By the rules alone, item by item, without any of the code under test."""
    newest = {change.item_id: change for change in case.changes}
    question = case.question
    cut = question.as_of if question.brought is None or question.brought.timestamps else None
    seen = {i for i, t in case.events if cut is None or (isinstance(cut, int) and t <= cut)}
    allowed = []
    for item in case.world.catalogue.items:
        change = newest.get(item.item_id)
        start, end, withdrawn = item.available_from, item.available_until, item.withdrawn
        if change:
            start = start if change.available_from is None else change.available_from
            end = end if change.available_until is None else change.available_until
            withdrawn = change.withdrawn
        named = question.candidates is None or item.item_id in question.candidates
        left_out = item.item_id in question.exclude or (question.exclude_seen and item.item_id in seen)
        if start <= found.as_of < end and not withdrawn and named and not left_out:
            allowed.append(item.item_id)
    return allowed


def best_first(case: Case, found: Recommendation, serving: Serving) -> list[str]:
    """Permitted items in the order that the answer must have."""
    catalogue, allowed = serving.bundle.catalogue, permitted(case, found)
    index = catalogue.index_by_id
    if found.strategy == "popular":
        order = {int(i): r for r, i in enumerate(serving.bundle.popularity.fallback(found.as_of))}
        return sorted(allowed, key=lambda i: order[index[i]])
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
    return sorted(allowed, key=lambda i: (-scores[index[i] - 1], index[i]))


@pytest.mark.parametrize("changed", [False, True], ids=["as published", "with live changes"])
@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize(
    "path",
    [
        {"known_history": True, "brought": False, "named": False},
        {"known_history": False, "brought": False, "named": False},
        {"known_history": True, "brought": True, "named": False},
        {"known_history": True, "brought": True, "named": True},
        {"known_history": False, "brought": True, "named": True},
    ],
    ids=["user", "unknown user", "brought history", "candidates", "popular candidates"],
)
def test_returns_exactly_what_may_be_returned(path: dict[str, bool], mode: Mode, changed: bool) -> None:
    @settings(max_examples=15, deadline=None, derandomize=True)
    @given(cases(**path, changed=changed))
    def check(case: Case) -> None:
        found, serving = answer(case, mode)
        returned = [item.item_id for item in found.items]
        expected = best_first(case, found, serving)
        assert len(set(returned)) == len(returned) == min(case.question.n, len(expected))
        assert set(returned) <= set(expected)
        if mode is not Mode.HNSW:  # which of several equal items HNSW finds is its own affair
            assert returned == expected[: case.question.n]

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

    def withdrawn_meanwhile(*arguments: Any) -> Retrieval:
        found = search(*arguments)
        live.apply([ItemChange("2", None, None, None, None, True, 1)])
        return found

    monkeypatch.setattr(recommend, "retrieve", withdrawn_meanwhile)
    recommender = Recommender(live, Remembered([("1", BORN)]), candidates=200, default_model=None)
    found = asyncio.run(recommender.recommend(Question(user_id="u", n=2, candidates=candidates), Trace("test")))
    assert [item.item_id for item in found.items] == ["3", "4"]
