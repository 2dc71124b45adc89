"""Many recommendations at once, without holding up single ones.

    read      all histories concurrently; what they ask of Redis goes together
    encode    CHUNK sequences a call, in the one thread for bulk work; retrieve there too
    exclude, rank, respond   on the event loop, one chunk at a time, so that the gate sees the items of that moment

One bundle answers the whole batch, even if another goes live meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

from service.bundles import Serving
from service.errors import Fault, Invalid
from service.recommend import (
    Case,
    Question,
    Reading,
    Recommendation,
    Recommender,
    exclude,
    place,
    popular,
    rank,
    respond,
    retrieve,
)
from service.telemetry import Trace
from shared.bundle import Model
from shared.encoder import CHUNK, Vectors
from shared.retrieval import Candidates, Scope

Found = tuple[Vectors, Candidates]


async def recommend_all(
    recommender: Recommender, users: Sequence[str], question: Question, trace: Trace
) -> AsyncIterator[Recommendation]:
    """The answers to `question` for each of `users`, in order. Raises ServiceError before the first one, or not at all.

    One user who cannot be answered fails the batch, as one bad event fails all events of a request.
    """
    serving, model = recommender.prepare(question, trace)
    questions = [replace(question, user_id=user) for user in users]
    with trace.stage("read"):
        readings = await read_all(recommender, questions, serving, model)
    for start in range(0, len(users), CHUNK):
        here = slice(start, start + CHUNK)
        cases = [place(q, r, serving) for q, r in zip(questions[here], readings[here], strict=True)]
        for case, found in zip(cases, await search(recommender, cases, model, serving, trace), strict=True):
            case.told(trace)
            yield settle(case, found, model, serving)
            await asyncio.sleep(0)  # single requests go first


async def read_all(
    recommender: Recommender, questions: Sequence[Question], serving: Serving, model: Model
) -> list[Reading]:
    """All readings, in order; CHUNK at a time, which leaves connections to the database for others."""
    turn = asyncio.Semaphore(CHUNK)

    async def read(question: Question) -> Reading:
        async with turn:
            return await recommender.read(question, serving, model)

    found = await asyncio.gather(*map(read, questions), return_exceptions=True)
    faults: list[Fault] = []
    readings: list[Reading] = []
    for position, reading in enumerate(found):
        if isinstance(reading, Invalid):
            faults.append({"pointer": f"/users/{position}", "detail": str(reading)})
        elif isinstance(reading, BaseException):
            raise reading
        else:
            readings.append(reading)
    if faults:
        raise Invalid(f"{faults[0]['pointer']}: {faults[0]['detail']}", faults)
    return readings


async def search(
    recommender: Recommender, cases: Sequence[Case], model: Model, serving: Serving, trace: Trace
) -> list[Found | None]:
    """Query vector and candidates of each case, made in the bulk thread; None for cases that get popular items."""
    known = [case for case in cases if len(case.sequence)]
    scopes = [case.scope(serving) for case in known]

    def work() -> list[Found]:
        if not known:
            return []
        with trace.stage("encode"):
            queries = model.encoder.encode([c.sequence for c in known], [c.times for c in known])  # (B, D)
        with trace.stage("retrieve"):
            return [(q, candidates(c, q, s)) for c, q, s in zip(known, queries, scopes, strict=True)]

    def candidates(case: Case, query: Vectors, scope: Scope) -> Candidates:
        return retrieve(case, model, query, scope, recommender.count(case.question), serving)

    found = iter(await asyncio.get_running_loop().run_in_executor(recommender.bulk, work))
    return [next(found) if len(case.sequence) else None for case in cases]


def settle(case: Case, found: Found | None, model: Model, serving: Serving) -> Recommendation:
    """The last steps for one user: through the gate, ranked, with names."""
    if found is None:
        return respond(case, serving, model, popular(case, serving))
    query, retrieved = found
    permitted = exclude(retrieved.items, case.scope(serving))
    best = rank(model, query, permitted, case.question.n, retrieved.path, serving)
    return respond(case, serving, model, best)
