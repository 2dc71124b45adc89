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
from functools import partial

from service.bundles import Serving
from service.errors import Fault, Invalid
from service.recommend import (
    Question,
    Reading,
    Recommendation,
    Recommender,
    place,
    search,
    settle,
)
from service.telemetry import Trace
from shared.bundle import Model
from shared.encoder import CHUNK


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
        known = [case for case in cases if len(case.sequence)]
        scopes = [case.scope(serving) for case in known]
        work = partial(search, known, scopes, serving, model, recommender.candidates, [trace])
        found = iter(await asyncio.get_running_loop().run_in_executor(recommender.bulk, work) if known else ())
        for case in cases:
            case.told(trace)
            if not len(case.sequence):
                await recommender.order_by_popularity(serving, case.reading.as_of)
            yield settle(case, next(found) if len(case.sequence) else None, serving, model, trace)
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
