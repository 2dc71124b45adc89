"""Requests that wait at the same time are encoded together.

Redis answers many reads in one exchange, so several histories arrive in one turn of the event loop. One call of the
network for all of them costs less than one each, and what comes after it finds its code and data in the processor's
caches. Nobody waits for company: a history is encoded at the end of the turn in which it arrived.
"""

from __future__ import annotations

import asyncio
from typing import Final, NamedTuple

from shared.encoder import CHUNK, Encoder, Vectors
from shared.events import IntArray

LONGEST: Final = 96
"""Up to so many items gain from company; with longer ones the network's time is arithmetic, which nobody can share."""


class _Waiting(NamedTuple):
    sequence: IntArray
    times: IntArray
    query: asyncio.Future[Vectors]


class Coalescer:
    """Encodes for the requests of one event loop."""

    def __init__(self) -> None:
        self.coming = 0  # requests that read a history at this moment: whoever counts them tells us
        self._waiting: dict[Encoder, list[_Waiting]] = {}

    async def encode(self, encoder: Encoder, sequence: IntArray, times: IntArray) -> Vectors:
        """The query vector (D,) of one history, see `Encoder.encode`."""
        alone = not self.coming and not self._waiting
        if alone or min(len(sequence), encoder.spec.max_length) > LONGEST:
            query: Vectors = encoder.encode([sequence], [times])[0]
            return query
        loop = asyncio.get_running_loop()
        waiting = self._waiting.get(encoder)
        if waiting is None:
            waiting = self._waiting[encoder] = []
            loop.call_soon(self._serve, encoder)
        mine = _Waiting(sequence, times, loop.create_future())
        waiting.append(mine)
        return await mine.query

    def _serve(self, encoder: Encoder) -> None:
        waiting = self._waiting.pop(encoder)
        if rest := waiting[CHUNK:]:  # the loop has its turn between two calls
            self._waiting[encoder] = rest
            asyncio.get_running_loop().call_soon(self._serve, encoder)
        served = [w for w in waiting[:CHUNK] if not w.query.done()]  # whoever hung up meanwhile does not count
        if not served:
            return
        try:
            queries = encoder.encode([w.sequence for w in served], [w.times for w in served])
        except Exception as error:  # each of them has to know
            for one in served:
                one.query.set_exception(error)
            return
        for one, query in zip(served, queries, strict=True):
            one.query.set_result(query)
