"""The ONNX encoder: a batch gives what single calls give, whatever the lengths."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.encoder import CHUNK, Encoder, EncoderSpec, Vectors, merged
from shared.events import IntArray
from shared.times import SECOND
from tests import worlds

N = 12
ENCODERS = {
    name: Encoder(worlds.encoder_bytes(worlds.circle(N), asks_with_mask=info.asks_with_mask), info)
    for name, info in ((n, worlds.model_info(n, N, N).encoder) for n in ("sasrec", "bert4rec"))
}


def history(*items: int) -> IntArray:
    return np.array(items, np.int64)


def watched(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the rectangles that `encoder` will read from now on."""
    shapes: list[tuple[int, ...]] = []
    run = encoder.run

    def noted(items: IntArray, lengths: IntArray) -> Vectors:
        shapes.append(items.shape)
        return run(items, lengths)

    monkeypatch.setattr(encoder, "run", noted)
    return shapes


@pytest.mark.parametrize("name", ENCODERS)
def test_the_query_is_asked_behind_the_last_item(name: str) -> None:
    long = [(i % N) + 1 for i in range(worlds.MAX_LENGTH + 5)]
    for items in ([3], [5, 3], [*long, 3]):
        (query,) = ENCODERS[name].encode([history(*items)])
        assert query.tolist() == worlds.circle(N)[3].tolist()


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(1, N), min_size=1, max_size=40), min_size=1, max_size=2 * CHUNK + 3))
def test_a_batch_gives_what_single_calls_give(histories: list[list[int]]) -> None:
    for encoder in ENCODERS.values():
        single = np.concatenate([encoder.encode([history(*h)]) for h in histories])
        assert encoder.encode([history(*h) for h in histories]).tolist() == single.tolist()


def test_rectangles_come_in_buckets_and_never_in_more_than_a_chunk_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, shapes = ENCODERS["sasrec"], watched(ENCODERS["sasrec"], monkeypatch)
    encoder.encode([history(*[1] * length) for length in [1, 16, 17, 40] + [2] * CHUNK])
    assert sorted(shapes) == [(2, 16), (2, 32), (CHUNK, 16)]


def test_a_mask_takes_a_place_in_the_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, shapes = ENCODERS["bert4rec"], watched(ENCODERS["bert4rec"], monkeypatch)
    for length in (15, 16):
        encoder.encode([history(*[1] * length)])
    assert shapes == [(1, 16), (1, 32)]


def test_few_rows_go_along_with_those_of_a_larger_bucket() -> None:
    assert list(merged({16: [0], 24: [1, 2], 200: [3]})) == [(200, [3]), (24, [1, 2, 0])]
    assert list(merged({8: [0, 1, 2, 3], 16: [4], 64: [5]})) == [(64, [5, 4]), (8, [0, 1, 2, 3])]
    assert list(merged({})) == []


def test_only_a_model_that_asks_with_mask_has_one() -> None:
    spec = {"architecture": "x", "item_count": N, "width": 4, "max_length": 8}
    assert EncoderSpec.model_validate({**spec, "asks_with_mask": True}).mask == N + 1
    assert EncoderSpec.model_validate({**spec, "asks_with_mask": False}).mask is None


THREADS = """if True:
    from pathlib import Path
    import numpy as np
    from tests import worlds
    from shared.encoder import Encoder
    before = len(list(Path("/proc/self/task").iterdir()))
    spec = worlds.model_info("sasrec", 12, 12).encoder
    encoder = Encoder(worlds.encoder_bytes(worlds.circle(12), asks_with_mask=False), spec)
    encoder.encode([np.arange(1, 13)] * 64)
    print(len(list(Path("/proc/self/task").iterdir())) - before)
"""


def test_an_encoder_works_in_the_thread_that_calls_it() -> None:
    for encoder in ENCODERS.values():
        options = encoder.session.get_session_options()
        assert (options.intra_op_num_threads, options.inter_op_num_threads) == (1, 1)
        assert not options.enable_mem_pattern
        assert encoder.session.get_providers() == ["CPUExecutionProvider"]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks into /proc")
def test_an_encoder_starts_no_thread() -> None:
    done = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0"


def test_no_histories_give_no_queries() -> None:
    assert ENCODERS["sasrec"].encode([]).shape == (0, N)


def test_an_encoder_with_a_clock_is_told_the_times_of_each_history() -> None:
    """In the hand-made world who has been away for more than an hour has moved on by one."""
    for name in ("sasrec", "bert4rec"):
        spec = worlds.model_info(name, N, N, "query").encoder
        encoder = Encoder(
            worlds.encoder_bytes(worlds.circle(N), asks_with_mask=spec.asks_with_mask, clock="query"), spec
        )
        histories = [history(5, 3), history(3), history(*[1] * 40, 3)]
        recent = [np.arange(len(h) + 1) * SECOND for h in histories]
        away = [np.append(t[:-1], t[-2] + 2 * 3600 * SECOND) for t in recent]
        assert encoder.encode(histories, recent).tolist() == [worlds.circle(N)[3].tolist()] * 3
        assert encoder.encode(histories, away).tolist() == [worlds.circle(N)[4].tolist()] * 3
        mixed = encoder.encode(histories, [recent[0], away[1], recent[2]])
        assert mixed.tolist() == [worlds.circle(N)[i].tolist() for i in (3, 4, 3)]
        with pytest.raises(ValueError, match="must be told the times"):
            encoder.encode(histories)
