"""Histories that wait at the same time are encoded together, and each gets its own answer."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np
import pytest

from service.coalesce import LONGEST, Coalescer
from shared.encoder import CHUNK, Encoder, EncoderSpec, Vectors
from shared.events import IntArray
from tests import worlds

N = 30
NO_TIMES = np.zeros(0, np.int64)


@pytest.fixture
def encoder() -> Encoder:
    """Of the hand-made world: it answers with the vector of the item behind the last one."""
    return Encoder(worlds.encoder_bytes(worlds.circle(N), asks_with_mask=False), EncoderSpec(
        architecture="sasrec", item_count=N, width=N, max_length=200, asks_with_mask=False
    ))  # fmt: skip


def calls_of(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many histories each call of `encode` was given, from here on."""
    calls: list[int] = []
    encode = encoder.encode

    def watched(histories: Sequence[IntArray], times: Sequence[IntArray] | None = None) -> Vectors:
        calls.append(len(histories))
        return encode(histories, times)

    monkeypatch.setattr(encoder, "encode", watched)
    return calls


async def ask(coalescer: Coalescer, encoder: Encoder, *items: int) -> int:
    """The row of the circle that the answer is: that behind the last item's, which has the item's number."""
    query = await coalescer.encode(encoder, np.array(items, np.int64), NO_TIMES)
    return int(np.flatnonzero((worlds.circle(N) == query).all(axis=1))[0])


async def test_who_waits_at_the_same_time_goes_together(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    coalescer, calls = Coalescer(), calls_of(encoder, monkeypatch)
    coalescer.coming = 1
    asked = [1 + i * 7 % (N - 1) for i in range(2 * CHUNK + 3)]
    assert await asyncio.gather(*(ask(coalescer, encoder, 5, item) for item in asked)) == asked
    assert calls == [CHUNK, CHUNK, 3]


async def test_who_is_alone_or_long_does_not_wait(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    coalescer, calls = Coalescer(), calls_of(encoder, monkeypatch)
    coroutine = coalescer.encode(encoder, np.array([3]), NO_TIMES)
    with pytest.raises(StopIteration):  # it ends without giving way to the loop
        coroutine.send(None)
    coalescer.coming = 1
    coroutine = coalescer.encode(encoder, np.full(LONGEST + 1, 3), NO_TIMES)
    with pytest.raises(StopIteration):
        coroutine.send(None)
    assert calls == [1, 1]


async def test_each_encoder_has_its_own_company(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    other = Encoder(worlds.encoder_bytes(worlds.circle(N), asks_with_mask=False), encoder.spec)
    coalescer = Coalescer()
    coalescer.coming = 1
    mine, others = calls_of(encoder, monkeypatch), calls_of(other, monkeypatch)
    found = await asyncio.gather(*(ask(coalescer, e, i) for e, i in ((encoder, 1), (other, 2), (encoder, 3))))
    assert found == [1, 2, 3]
    assert (mine, others) == ([2], [1])


async def test_a_failure_is_told_to_each_and_nobody_waits_for_ever(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    coalescer = Coalescer()
    coalescer.coming = 1
    with monkeypatch.context() as broken:
        broken.setattr(encoder, "session", None)
        found = await asyncio.gather(*(ask(coalescer, encoder, i) for i in (1, 2)), return_exceptions=True)
    assert [type(error) for error in found] == [AttributeError, AttributeError]
    assert await ask(coalescer, encoder, 4) == 4


async def test_who_hangs_up_leaves_the_others_alone(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    coalescer, calls = Coalescer(), calls_of(encoder, monkeypatch)
    coalescer.coming = 1
    tasks = [asyncio.create_task(ask(coalescer, encoder, i)) for i in (1, 2, 3)]
    await asyncio.sleep(0)
    tasks[1].cancel()
    found = await asyncio.gather(*tasks, return_exceptions=True)
    assert found[0] == 1
    assert isinstance(found[1], asyncio.CancelledError)
    assert found[2] == 3
    assert calls == [2]
