"""Remembered query vectors: the same as made ones, for as many sequences as there is room for."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import pytest

from service.queries import QueryVectors
from shared.encoder import Encoder, Vectors
from shared.events import IntArray
from shared.sequences import Clock
from tests import worlds

N = 40


def new_encoder(clock: Clock = "none") -> Encoder:
    """An encoder of the world's own, whose vector is the row of the newest item."""
    spec = worlds.model_info("sasrec", N, N, clock).encoder
    return Encoder(worlds.encoder_bytes(worlds.circle(N), asks_with_mask=False, clock=clock), spec)


def counting(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the calls of the encoder from here on."""
    encode, calls = encoder.encode, list[int]()

    def counted(histories: Sequence[IntArray], times: Sequence[IntArray] | None = None) -> Vectors:
        calls.append(len(histories))
        return encode(histories, times)

    monkeypatch.setattr(encoder, "encode", counted)
    return calls


def asked(*sequences: Sequence[int]) -> tuple[list[IntArray], list[IntArray]]:
    return [np.array(s, np.int64) for s in sequences], [np.zeros(len(s) + 1, np.int64) for s in sequences]


def test_who_asks_again_is_not_encoded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = new_encoder()
    made = encoder.encode(*asked([1, 2], [3], [4, 5, 6]))
    calls = counting(encoder, monkeypatch)
    remembering = QueryVectors(encoder, 10)
    assert remembering.encode(*asked([1, 2], [3])).remembered == 0
    found = remembering.encode(*asked([3], [4, 5, 6], [1, 2]))
    assert found.remembered == 2
    assert calls == [2, 1]
    assert found.queries.tolist() == made[[1, 2, 0]].tolist()


def test_only_what_the_network_reads_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = new_encoder()
    longest = encoder.spec.max_length
    calls = counting(encoder, monkeypatch)
    remembering = QueryVectors(encoder, 10)
    newest = [n % N + 1 for n in range(longest)]
    remembering.encode(*asked(newest))
    assert remembering.encode(*asked([7, 9, *newest])).remembered == 1
    assert remembering.encode(*asked(newest[1:])).remembered == 0
    assert calls == [1, 1]


def test_the_longest_unasked_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = new_encoder()
    made = encoder.encode(*asked(*([n] for n in range(1, 6))))
    remembering = QueryVectors(encoder, 3)
    for n in (1, 2, 3, 1, 4):  # 2 has not been asked for the longest time
        remembering.encode(*asked([n]))
    found = remembering.encode(*asked([1], [3], [4], [2]))
    assert found.remembered == 3
    assert found.queries.tolist() == made[[0, 2, 3, 1]].tolist()


def test_one_call_may_ask_for_more_than_there_is_room_and_twice_for_the_same() -> None:
    encoder = new_encoder()
    sequences = [[n % 7 + 1] for n in range(30)]
    remembering = QueryVectors(encoder, 3)
    for _ in range(3):
        assert remembering.encode(*asked(*sequences)).queries.tolist() == encoder.encode(*asked(*sequences)).tolist()


def test_an_encoder_with_a_clock_and_no_room_remember_nothing() -> None:
    for encoder, most in ((new_encoder("query"), 10), (new_encoder(), 0)):
        remembering = QueryVectors(encoder, most)
        assert [remembering.encode(*asked([1, 2])).remembered for _ in range(3)] == [0, 0, 0]


def test_threads_get_their_own_vectors() -> None:
    encoder = new_encoder()
    made = encoder.encode(*asked(*([n] for n in range(1, N + 1))))
    remembering = QueryVectors(encoder, 5)
    wrong: list[int] = []

    def ask(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(300):
            items = rng.integers(1, N + 1, 4)
            if remembering.encode(*asked(*([int(i)] for i in items))).queries.tolist() != made[items - 1].tolist():
                wrong.append(seed)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
