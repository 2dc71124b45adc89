"""One recommendation, top to bottom: read, encode, retrieve, exclude, rank, respond.

    read      the user's history, from Redis or the log (or from the request): what they did, what they have seen
    encode    the newest known items -> one query vector
    retrieve  the best candidates for it among items that exist at `as_of` and are not excluded
    exclude   the final gate: every candidate once more against availability as it is now
    rank      by exact score, ties by item index; the first n
    respond   item indices become item ids with what a reader wants to know

A user about whom nothing is known gets what was popular at `as_of`, through the same gate. Nothing here knows HTTP.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

import numpy as np

from service.bundles import Live, Serving
from service.errors import Fault, HistoryDown, Invalid
from service.history import HistoryStore, HistoryUnavailable, UserHistory
from service.telemetry import Trace, uuid7
from shared.bundle import Model
from shared.encoder import Vectors
from shared.events import HistoryPolicy, IntArray, ItemId, first_of_repeats, item_keys
from shared.retrieval import Retrieval, Scope
from shared.times import UNDATED, now

AsOf: TypeAlias = int | Literal["last_event"] | None
Strategy = Literal["sequence", "popular", "degraded"]
Source = Literal["cache", "log", "request", "none"]

_NOBODY = UserHistory(np.zeros(0, np.uint64), np.zeros(0, np.int64), np.zeros(0, np.uint64), None, "log")
_IN_QUERY: Final[Fault] = {"parameter": "as_of"}
_IN_BODY: Final[Fault] = {"pointer": "/as_of"}
_BLOCK: Final = 1024  # items


@dataclass(frozen=True, slots=True)
class Brought:
    """A history that comes with the request, oldest first."""

    item_ids: Sequence[ItemId]
    timestamps: Sequence[int] | None  # epoch microseconds, one an item


@dataclass(frozen=True, slots=True)
class Question:
    """What a caller asks for. Either `user_id` or `brought` says whose history counts."""

    user_id: str | None = None
    brought: Brought | None = None
    model: str | None = None
    n: int = 10
    as_of: AsOf = None
    exclude_seen: bool = True
    require_seen: bool = False
    exclude: Sequence[ItemId] = ()
    candidates: Sequence[ItemId] | None = None  # rank these alone


@dataclass(frozen=True, slots=True)
class Recommended:
    """One place of the answer."""

    item_id: ItemId
    title: str | None
    available_from: str | None
    score: np.float32 | None  # None for popular items: counts are no model scores
    reason: Literal["sequence", "popular"]


@dataclass(frozen=True, slots=True)
class Recommendation:
    """The answer, best first."""

    recommendation_id: str
    user_id: str | None
    model: str
    version: str
    as_of: int
    strategy: Strategy
    history_source: Source
    seen_excluded: bool
    requested: int
    items: list[Recommended]


@dataclass(frozen=True, slots=True)
class Reading:
    """What was found out about the user, and the time that the question is about."""

    history: UserHistory
    source: Source
    as_of: int
    readable: bool = True


class Recommender:
    """Answers questions from the live bundle and the histories."""

    def __init__(self, live: Live, histories: HistoryStore, *, candidates: int, default_model: str | None) -> None:
        self.live, self.histories = live, histories
        self.candidates, self.default_model = candidates, default_model

    async def recommend(self, question: Question, trace: Trace) -> Recommendation:
        """The answer. Raises ServiceError: no bundle, unknown model, and what `read` says."""
        serving = self.live.now_serving()  # one bundle, hence one numbering, for the whole request
        model = serving.model(question.model, self.default_model)
        trace.model_version = serving.bundle.version
        with trace.stage("read"):
            reading = await self.read(question, serving.bundle.policy)
        sequence, banned = places(question, reading, serving)
        if len(sequence) < model.info.encoder.max_length and self.is_cut(reading):
            # The cached window is full of items this bundle does not know; those it knows lie further back.
            with trace.stage("read"):
                reading = await self.read_whole(question, reading, serving.bundle.policy)
            sequence, banned = places(question, reading, serving)
        scope = Scope(serving.availability, reading.as_of, banned)
        if not len(sequence):
            return respond(question, reading, serving, model, popular(question, scope, serving))
        with trace.stage("encode"):
            query = encode(model, sequence)
        with trace.stage("retrieve"):
            found = retrieve(question, model, query, scope, max(self.candidates, question.n), serving)
        with trace.stage("exclude"):
            permitted = exclude(found.items, Scope(serving.availability, reading.as_of, banned))
        with trace.stage("rank"):
            best = model.retriever.rank(query, permitted, question.n, found.path)
        trace.path = best.path
        return respond(question, reading, serving, model, best)

    async def read(self, question: Question, policy: HistoryPolicy) -> Reading:
        """The history that counts, and as of when.

        `last_event` is the time of the newest event: without any it is a 422, and never a silent "now". A history
        that cannot be read is an empty one, unless the question cannot be answered without (503).
        """
        if question.brought is not None:
            return bring(question.brought, question.as_of, policy)
        assert question.user_id is not None  # noqa: S101
        asked = question.as_of
        try:
            # No cut for last_event: the newest event's time cuts nothing off.
            cut = asked if isinstance(asked, int) else None
            history = await self.histories.read(question.user_id, policy, cut)
        except HistoryUnavailable as error:
            if question.require_seen or asked == "last_event":
                raise HistoryDown() from error
            return Reading(_NOBODY, "none", moment(asked, None, _IN_QUERY), readable=False)
        return Reading(history, history.source, moment(asked, history.newest, _IN_QUERY))

    def is_cut(self, reading: Reading) -> bool:
        """Whether the history read is only the newest part of a longer one."""
        return reading.source in ("cache", "log") and len(reading.history.items) >= self.histories.window

    async def read_whole(self, question: Question, reading: Reading, policy: HistoryPolicy) -> Reading:
        """The same history from its first event on; as it was where the log cannot be read."""
        assert question.user_id is not None  # noqa: S101
        cut = question.as_of if isinstance(question.as_of, int) else None
        with suppress(HistoryUnavailable):
            whole = await self.histories.read_whole(question.user_id, policy, cut)
            return Reading(whole, whole.source, reading.as_of)
        return reading


def moment(asked: AsOf, newest: int | None, place: Fault) -> int:
    """The time that items are judged at; `place` is where the request has its `as_of`."""
    if asked != "last_event":
        return now() if asked is None else asked
    if newest is None or newest < UNDATED:
        fault = "There is no event with a time that last_event could mean"
        raise Invalid(f"as_of: {fault}", [place | {"detail": fault}])
    return newest


def bring(brought: Brought, asked: AsOf, policy: HistoryPolicy) -> Reading:
    """A history from the request, read as one from the log would be: in time order, cut at `as_of`, all of it seen."""
    keys = item_keys(brought.item_ids)  # (L,)
    if brought.timestamps is None:
        as_of, times = moment(asked, None, _IN_BODY), np.zeros(len(keys), np.int64)
    else:
        times = np.array(brought.timestamps, np.int64)  # (L,)
        as_of = moment(asked, int(times.max()) if len(times) else None, _IN_BODY)
        order = np.argsort(times, kind="stable")
        order = order if asked is None else order[times[order] <= as_of]
        keys, times = keys[order], times[order]
    seen = np.unique(keys)
    if policy.collapse_repeats:
        kept = first_of_repeats(np.zeros(len(keys), np.int64), keys, np.ones(len(keys), bool))
        keys, times = keys[kept], times[kept]
    return Reading(UserHistory(keys, times, seen, None, "log"), "request", as_of)


def places(question: Question, reading: Reading, serving: Serving) -> tuple[IntArray, IntArray]:
    """Item indices of the sequence, oldest first, and of what must not be returned; unknown items are left out."""
    catalogue = serving.bundle.catalogue
    sequence = catalogue.indices_of_keys(reading.history.items)
    banned = catalogue.indices_of(question.exclude)
    if question.exclude_seen:
        seen = catalogue.indices_of_keys(reading.history.seen)
        banned = np.concatenate((seen[seen > 0], banned))
    return sequence[sequence > 0], banned


def encode(model: Model, sequence: IntArray) -> Vectors:
    """The query vector (D,).

    On the event loop: one history takes 0.1 to 0.6 ms, a hand-over to a thread and back costs about as much and the
    GIL with it. This is the place where waiting requests would be coalesced into one call.
    """
    queries = model.encoder.encode([sequence])  # (1, D)
    return queries.reshape(-1)


def retrieve(question: Question, model: Model, query: Vectors, scope: Scope, count: int, serving: Serving) -> Retrieval:
    """Candidates for `query` that `scope` permits: the best of all items, or all of those the caller names."""
    if question.candidates is None:
        return model.retriever.retrieve(query, count, scope)
    named = np.unique(serving.bundle.catalogue.indices_of(question.candidates))
    named = named[scope.permits(named)]
    return model.retriever.rank(query, named, len(named), "candidates")


def exclude(items: IntArray, scope: Scope) -> IntArray:
    """The final gate. `scope` holds availability as it is at this moment, not as retrieval found it."""
    return items[scope.permits(items)]


def popular(question: Question, scope: Scope, serving: Serving) -> Retrieval:
    """The first n popular items that `scope` permits. Scores are nan: there is no model in it."""
    order = serving.bundle.popularity.fallback(scope.as_of)
    if question.candidates is not None:
        order = order[np.isin(order, serving.bundle.catalogue.indices_of(question.candidates))]
    found = np.concatenate([np.zeros(0, np.int64), *_permitted(order, scope, question.n)])[: question.n]
    return Retrieval(found, np.full(len(found), np.nan, np.float32), "popular")


def _permitted(order: IntArray, scope: Scope, n: int) -> Iterator[IntArray]:
    """Permitted items of `order` block by block, until there are n: most of a long order is never looked at."""
    for start in range(0, len(order), _BLOCK):
        if n <= 0:
            return
        block = exclude(order[start : start + _BLOCK], scope)
        n -= len(block)
        yield block


def respond(question: Question, reading: Reading, serving: Serving, model: Model, best: Retrieval) -> Recommendation:
    """Item indices leave no further than here."""
    is_popular = best.path == "popular"
    return Recommendation(
        recommendation_id=uuid7(),
        user_id=question.user_id,
        model=model.name,
        version=serving.bundle.version,
        as_of=reading.as_of,
        strategy="degraded" if not reading.readable else "popular" if is_popular else "sequence",
        history_source=reading.source,
        seen_excluded=question.exclude_seen and reading.readable,
        requested=question.n,
        items=[
            Recommended(
                *serving.describe(int(index)),
                score=None if is_popular else score,
                reason="popular" if is_popular else "sequence",
            )
            for index, score in zip(best.items, best.scores, strict=True)
        ],
    )
