"""One recommendation, top to bottom: read, encode, retrieve, exclude, rank, respond.

    read      the user's history, from Redis or the log (or from the request): what they did, what they have seen
    encode    the newest known items -> one query vector
    retrieve  the best candidates for it among items that exist at `as_of` and are not excluded
    exclude   the final gate: every candidate once more against availability as it is now
    rank      by exact score, ties by item index; the first n
    respond   item indices become item ids with what a reader wants to know

A user about whom nothing is known gets what was popular at `as_of`, through the same gate. An item that was added since
the bundle has no vector and no counts: it comes behind all others among popular items and among `candidates` that the
caller names, and is not retrieved. Nothing here knows HTTP. `batch.py` and `similar.py` are made of the same parts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Final, Literal, NamedTuple, TypeAlias, TypeVar

import numpy as np

from service.bundles import Live, Serving
from service.coalesce import Coalescer
from service.errors import Fault, HistoryDown, Invalid
from service.history import HistoryStore, HistoryUnavailable, UserHistory
from service.telemetry import Stage, Trace, uuid7
from shared.bundle import Model
from shared.categories import Where, field_of
from shared.encoder import CHUNK, Vectors
from shared.events import HistoryPolicy, IntArray, ItemId, first_of_repeats, item_keys
from shared.retrieval import Candidates, Retrieval, Scope
from shared.times import UNDATED, now

AsOf: TypeAlias = int | Literal["last_event"] | None
Strategy = Literal["sequence", "popular", "degraded"]
Source = Literal["cache", "log", "request", "none"]
Reason = Literal["sequence", "similar", "popular", "new"]
T = TypeVar("T")

_NOBODY = UserHistory(np.zeros(0, np.uint64), np.zeros(0, np.int64), np.zeros(0, np.uint64), None, "log")
_BLOCK: Final = 1024  # items
LONG: Final = 96
"""Items. Longer sequences do not wait for company: their time is arithmetic, which nobody can share."""
LARGE: Final = 100_000
"""Items of a catalogue in which looking at each of them takes so many milliseconds that others should not wait."""


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
    where: Where | None = None  # the caller's filters
    candidates: Sequence[ItemId] | None = None  # rank these alone
    in_body: bool = False  # where faults are: in the query otherwise

    def fault(self, name: str, detail: str, *position: int) -> Fault:
        """A fault of the field `name`, at a position in it where it is a list in a body."""
        return {**at(self.in_body, name, *position), "detail": detail}


class Recommended(NamedTuple):
    """One place of the answer."""

    item_id: ItemId
    title: str | None
    available_from: str | None
    score: np.float32 | None  # None for popular and new items: counts are no model scores
    reason: Reason


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


@dataclass(frozen=True, slots=True)
class Case:
    """A question and its reading, in the numbering of one bundle."""

    question: Question
    reading: Reading
    sequence: IntArray  # (L,) item indices that a model knows, oldest first
    times: IntArray  # (L + 1,) when those events happened, epoch microseconds, and last the time that is asked about
    banned: IntArray  # item indices that must not be returned, of the items that there were
    new: int  # how many of those were new ones

    def told(self, trace: Trace) -> None:
        """Note for the metrics how much of the history the bundle knows."""
        trace.history_items += len(self.reading.history.items)
        trace.known_items += len(self.sequence)

    def scope(self, serving: Serving) -> Scope:
        """What may be returned, by items, availability and categories as they are at this moment."""
        where = self.question.where
        wanted = None if where is None else serving.wanted(where)
        # What was added meanwhile had no index to be excluded by.
        banned = self.banned if self.new == len(serving.new) else excluded(self.question, self.reading, serving)
        return Scope(serving.availability, self.reading.as_of, banned, wanted)


class Asked(NamedTuple):
    """A request on its way."""

    case: Case
    trace: Trace


class Found(NamedTuple):
    """What was retrieved for a case."""

    query: Vectors  # (D,)
    candidates: Candidates


class Recommender:
    """Answers questions from the live bundle and the histories."""

    def __init__(self, live: Live, histories: HistoryStore, *, candidates: int, default_model: str | None) -> None:
        self.live, self.histories = live, histories
        self.candidates, self.default_model = candidates, default_model
        self.together = Coalescer(self.answer, CHUNK)
        # One thread each: they may take a second core, never all of them. They start with their first work.
        self.bulk = ThreadPoolExecutor(1, thread_name_prefix="bulk")
        self.aside = ThreadPoolExecutor(1, thread_name_prefix="aside")

    def shutdown(self) -> None:
        """Wait for the threads' last work."""
        self.bulk.shutdown()
        self.aside.shutdown()

    async def recommend(self, question: Question, trace: Trace) -> Recommendation:
        """The answer. Raises ServiceError: no bundle, unknown model or filter, and what `read` says."""
        serving, model = self.prepare(question, trace)  # one bundle, hence one numbering, for the whole request
        self.together.coming += 1
        try:
            with trace.stage("read"):
                reading = await self.read(question, serving, model)
        finally:
            self.together.coming -= 1
        case = place(question, reading, serving)
        case.told(trace)
        if not len(case.sequence):
            await self.order_by_popularity(serving, reading.as_of)
            return settle(case, None, serving, model, trace)
        if len(case.sequence) > LONG:
            return self.answer((serving, model), [Asked(case, trace)])[0]
        return await self.together.join((serving, model), Asked(case, trace))

    async def beside(self, serving: Serving, work: Callable[[], T]) -> T:
        """What `work` returns, which looks at each item. In a LARGE catalogue other requests go on meanwhile."""
        if serving.known < LARGE:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self.aside, work)

    async def order_by_popularity(self, serving: Serving, as_of: int) -> None:
        """Have the order at hand in which `popular` looks at the items; that of an older day may be yet to make."""
        popularity = serving.bundle.popularity
        if not popularity.is_latest(as_of):
            await self.beside(serving, partial(popularity.fallback, as_of))

    def answer(self, by: tuple[Serving, Model], asked: Sequence[Asked]) -> list[Recommendation]:
        """The answers to several requests of one bundle, none of them with an empty sequence."""
        scopes = [case.scope(by[0]) for case, _ in asked]
        found = search([case for case, _ in asked], scopes, *by, self.candidates, [trace for _, trace in asked])
        return [settle(case, f, *by, trace) for (case, trace), f in zip(asked, found, strict=True)]

    def prepare(self, question: Question, trace: Trace) -> tuple[Serving, Model]:
        """What answers the question. Raises ServiceError: no bundle, unknown model or filter."""
        serving = self.live.now_serving()
        model = serving.model(question.model, self.default_model)
        trace.model_version = serving.bundle.version
        if question.where is not None:
            refuse_unknown_fields(question, serving)
        return serving, model

    async def read(self, question: Question, serving: Serving, model: Model) -> Reading:
        """The history that counts, and as of when; all of it where its newest part holds too few known items."""
        reading = await self.read_newest(question, serving.bundle.policy)
        if self.is_cut(reading):
            known = np.count_nonzero(serving.bundle.catalogue.indices_of_keys(reading.history.items))
            if known < model.info.encoder.max_length:
                return await self.read_whole(question, reading, serving.bundle.policy)
        return reading

    async def read_newest(self, question: Question, policy: HistoryPolicy) -> Reading:
        """The history as the cache holds it, which may be its newest part.

        `last_event` is the time of the newest event: without any it is a 422, and never a silent "now". A history
        that cannot be read is an empty one, unless the question cannot be answered without (503).
        """
        if question.brought is not None:
            return bring(question, question.brought, policy)
        assert question.user_id is not None  # noqa: S101
        asked = question.as_of
        try:
            # No cut for last_event: the newest event's time cuts nothing off.
            cut = asked if isinstance(asked, int) else None
            history = await self.histories.read(question.user_id, policy, cut)
        except HistoryUnavailable as error:
            if question.require_seen or asked == "last_event":
                raise HistoryDown() from error
            return Reading(_NOBODY, "none", moment(question, None), readable=False)
        return Reading(history, history.source, moment(question, history.newest))

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


def at(in_body: bool, name: str, *position: int) -> Fault:
    """Where the request has its field `name`."""
    return {"pointer": "/" + "/".join([name, *map(str, position)])} if in_body else {"parameter": name}


def moment(question: Question, newest: int | None) -> int:
    """The time that items are judged at, given the time of the newest event."""
    asked = question.as_of
    if asked != "last_event":
        return now() if asked is None else asked
    if newest is None or newest < UNDATED:
        fault = "There is no event with a time that last_event could mean"
        raise Invalid(f"as_of: {fault}", [question.fault("as_of", fault)])
    return newest


def refuse_unknown_fields(question: Question, serving: Serving) -> None:
    """Raise Invalid for filters over fields that no item has: most likely a mistake, and the answer would hide it."""
    assert question.where is not None  # noqa: S101
    fields = serving.categories.fields
    faults = [
        question.fault(name, f"There is no field {field_of(c)!r}; there are: {', '.join(fields) or 'none'}", position)
        for name, categories in (("filter", question.where.any_of), ("filter_out", question.where.none_of))
        for position, c in enumerate(categories)
        if field_of(c) not in fields
    ]
    if faults:
        raise Invalid(faults[0]["detail"], faults)


def bring(question: Question, brought: Brought, policy: HistoryPolicy) -> Reading:
    """A history from the request, read as one from the log would be: in time order, cut at `as_of`, all of it seen."""
    keys = item_keys(brought.item_ids)  # (L,)
    if brought.timestamps is None:  # nobody knows: for an encoder with a clock, all of it has just happened
        as_of = moment(question, None)
        times = np.full(len(keys), as_of, np.int64)
    else:
        times = np.array(brought.timestamps, np.int64)  # (L,)
        as_of = moment(question, int(times.max()) if len(times) else None)
        order = np.argsort(times, kind="stable")
        order = order if question.as_of is None else order[times[order] <= as_of]
        keys, times = keys[order], times[order]
    seen = np.unique(keys)
    if policy.collapse_repeats:
        kept = first_of_repeats(np.zeros(len(keys), np.int64), keys, np.ones(len(keys), bool))
        keys, times = keys[kept], times[kept]
    return Reading(UserHistory(keys, times, seen, None, "log"), "request", as_of)


def place(question: Question, reading: Reading, serving: Serving) -> Case:
    """Item ids become item indices here; unknown items are left out."""
    sequence = serving.bundle.catalogue.indices_of_keys(reading.history.items)
    known = sequence > 0
    times = np.append(reading.history.timestamps[known], reading.as_of)
    return Case(question, reading, sequence[known], times, excluded(question, reading, serving), len(serving.new))


def excluded(question: Question, reading: Reading, serving: Serving) -> IntArray:
    """Indices of the items that were seen, unless the caller wants those too, and of those that he names."""
    named = serving.indices_of(question.exclude)
    return np.concatenate((serving.indices_of_keys(reading.history.seen), named)) if question.exclude_seen else named


def search(
    cases: Sequence[Case],
    scopes: Sequence[Scope],
    serving: Serving,
    model: Model,
    candidates: int,
    traces: Sequence[Trace],
) -> list[Found]:
    """Query vector and candidates of each case, none of them with an empty sequence."""
    with Stage("encode", *traces):
        queries, remembered = serving.queries[model.name].encode([c.sequence for c in cases], [c.times for c in cases])
    traces[0].remembered += remembered
    traces[0].encoded += len(cases) - remembered
    with Stage("retrieve", *traces):
        return list(map(Found, queries, retrieve(cases, scopes, queries, serving, model, candidates)))


def retrieve(
    cases: Sequence[Case], scopes: Sequence[Scope], queries: Vectors, serving: Serving, model: Model, candidates: int
) -> list[Candidates]:
    """Candidates for each of `queries` (B, D): the best of all items, or all of those that the caller names."""
    free = [b for b, case in enumerate(cases) if case.question.candidates is None]
    counts = [max(candidates, cases[b].question.n) for b in free]
    best = iter(model.retriever.candidates_of(queries[free], counts, [scopes[b] for b in free]))
    return [
        next(best) if case.question.candidates is None else named(case.question.candidates, scope, serving)
        for case, scope in zip(cases, scopes, strict=True)
    ]


def named(item_ids: Sequence[ItemId], scope: Scope, serving: Serving) -> Candidates:
    """The items that the caller names, as far as `scope` permits them. All of them are ranked."""
    items = np.unique(serving.indices_of(item_ids))
    return Candidates(items[scope.permits(items)], "candidates")


def settle(case: Case, found: Found | None, serving: Serving, model: Model, trace: Trace) -> Recommendation:
    """The last steps: through the gate, ranked, with names. Popular items where nothing was to be found."""
    if found is None:
        with trace.stage("retrieve"):
            best = popular(case, serving)
        trace.paths[best.path] += 1
        return respond(case, serving, model, best)
    with trace.stage("exclude"):
        permitted = exclude(found.candidates.items, case.scope(serving))
    with trace.stage("rank"):
        best = rank(model, found.query, permitted, case.question.n, found.candidates.path, serving)
    trace.paths[best.path] += 1
    return respond(case, serving, model, best)


def exclude(items: IntArray, scope: Scope) -> IntArray:
    """The final gate. `scope` holds availability as it is at this moment, not as retrieval found it."""
    return items[scope.permits(items)]


def rank(model: Model, query: Vectors, items: IntArray, n: int, path: str, serving: Serving) -> Retrieval:
    """The first n by exact score; behind them new items, which have no vector (score nan)."""
    best = model.retriever.rank(query, items[items <= serving.known], n, path)
    if len(best.items) == min(n, len(items)):
        return best
    new = serving.newcomers[np.isin(serving.newcomers, items)][: n - len(best.items)]
    return Retrieval(np.concatenate((best.items, new)), np.concatenate((best.scores, unscored(new))), path)


def unscored(items: IntArray) -> Vectors:
    """nan for each item: there is no model in it."""
    return np.full(len(items), np.nan, np.float32)


def popular(case: Case, serving: Serving) -> Retrieval:
    """The first n popular items that the scope permits, new items last."""
    scope = case.scope(serving)
    order = by_popularity(serving, scope.as_of)
    if case.question.candidates is not None:
        order = order[np.isin(order, serving.indices_of(case.question.candidates))]
    return first(order, scope, case.question.n)


def by_popularity(serving: Serving, as_of: int) -> IntArray:
    """All item indices, most popular first; behind them new items, which nobody has counted yet."""
    order = serving.bundle.popularity.fallback(as_of)
    return np.concatenate((order, serving.newcomers)) if serving.new else order


def first(order: IntArray, scope: Scope, n: int) -> Retrieval:
    """The first n items of `order` that `scope` permits, without scores."""
    if scope.wanted is not None:
        order = order[scope.wanted[order]]
    found = np.concatenate([np.zeros(0, np.int64), *_permitted(order, scope, n)])[:n]
    return Retrieval(found, unscored(found), "popular")


def _permitted(order: IntArray, scope: Scope, n: int) -> Iterator[IntArray]:
    """Permitted items of `order` block by block, until there are n: most of a long order is never looked at."""
    for start in range(0, len(order), _BLOCK):
        if n <= 0:
            return
        block = exclude(order[start : start + _BLOCK], scope)
        n -= len(block)
        yield block


def respond(case: Case, serving: Serving, model: Model, best: Retrieval) -> Recommendation:
    """Item indices leave no further than here."""
    question, reading = case.question, case.reading
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
        items=list(described(best, "popular" if is_popular else "sequence", serving)),
    )


def described(best: Retrieval, reason: Reason, serving: Serving) -> Iterable[Recommended]:
    """The items of an answer as its reader wants to know them."""
    serving.answered.add(best.items)
    scored = best.path != "popular"
    for index, score in zip(best.items.tolist(), best.scores, strict=True):
        is_new = index > serving.known
        yield Recommended(
            *serving.describe(index), score=score if scored and not is_new else None, reason="new" if is_new else reason
        )
