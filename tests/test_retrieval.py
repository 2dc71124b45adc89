"""Retrieval: on every path the same answer, and never an item that may not be returned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import hnswlib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared import retrieval
from shared.catalogue import Availability, Catalogue, Item, ItemChange
from shared.encoder import Vectors
from shared.events import IntArray
from shared.retrieval import Mode, Retriever, Scope, Span, build_index, load_index, top
from tests.worlds import BrokenIndex
from trainer.evaluate import index_recall

N, WIDTH = 120, 8
NOW = 60
MODES = list(Mode)


def vectors_of(seed: int, count: int = N) -> Vectors:
    return np.random.default_rng(seed).normal(size=(count, WIDTH)).astype(np.float32)


def indexed(vectors: Vectors) -> hnswlib.Index:
    index = build_index(vectors)
    index.set_ef(200)
    return index


def world(seed: int) -> Availability:
    """Items born at 1..N, of which at NOW some are over, withdrawn, or moved in time since."""
    rng = np.random.default_rng(seed)
    items = [
        Item(
            f"{n:03}", None, (), n, n + int(rng.integers(5, 200)) if rng.random() < 0.2 else 10_000, rng.random() < 0.1
        )
        for n in range(1, N + 1)
    ]
    catalogue = Catalogue.number(items)
    moved = rng.choice(N, 20, replace=False) + 1
    changes = [ItemChange(f"{n:03}", None, None, int(rng.integers(1, N)), None, False, 1) for n in moved]
    return Availability.of(catalogue).changed(catalogue, changes)


def permitted(scope: Scope) -> IntArray:
    every = np.arange(1, len(scope.availability.numbering) + 1)
    exists = scope.availability.allowed(every, scope.as_of)
    fits = (i for i in every[exists] if scope.wanted is None or scope.wanted[i])
    return np.array([i for i in fits if i not in set(scope.banned.tolist())], np.int64)


def brute_force(query: Vectors, vectors: Vectors, scope: Scope, count: int) -> list[int]:
    scores = vectors @ query
    return sorted(permitted(scope).tolist(), key=lambda i: (-scores[i - 1], i))[:count]


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Mode:
    """Each mode in turn; with a threshold that `auto` goes beyond in these small worlds."""
    monkeypatch.setattr(retrieval, "EXACT_ITEMS", 20)
    found: Mode = request.param
    return found


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("count", [1, 10, 50, 500])
@pytest.mark.parametrize("as_of", [0, 3, NOW, 10 * N])
def test_the_best_permitted_items_and_no_others(mode: Mode, seed: int, count: int, as_of: int) -> None:
    rng = np.random.default_rng(seed)
    vectors, query = vectors_of(seed), rng.normal(size=WIDTH).astype(np.float32)
    scope = Scope(world(seed), as_of, rng.choice(N, 25, replace=False).astype(np.int64) + 1)
    found = Retriever(vectors, indexed(vectors), mode).retrieve(query, count, scope)

    assert len(found.items) == min(count, len(permitted(scope)))
    assert len(set(found.items.tolist())) == len(found.items)
    assert set(found.items.tolist()) <= set(permitted(scope).tolist())
    assert found.items.tolist() == brute_force(query, vectors, scope, count)
    np.testing.assert_allclose(found.scores, (vectors @ query)[found.items - 1], atol=1e-4)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("count", [1, 10, 500])
@pytest.mark.parametrize("share", [0.0, 0.03, 0.3, 0.9])
def test_filtered_search_is_complete(mode: Mode, seed: int, count: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    vectors, query = vectors_of(seed), rng.normal(size=WIDTH).astype(np.float32)
    banned = rng.choice(N, 25, replace=False).astype(np.int64) + 1
    scope = Scope(world(seed), NOW, banned, rng.random(N + 1) < share)
    found = Retriever(vectors, indexed(vectors), mode).retrieve(query, count, scope)
    assert found.items.tolist() == brute_force(query, vectors, scope, count)


@pytest.mark.parametrize("questions", [1, 2, 3, 12])
def test_several_at_once_find_what_each_finds_alone(mode: Mode, questions: int) -> None:
    """Of one matrix product all take what is theirs: their prefix, their bans, their filter."""
    rng, vectors = np.random.default_rng(questions), vectors_of(1)
    retriever = Retriever(vectors, indexed(vectors), mode)
    queries = rng.normal(size=(questions, WIDTH)).astype(np.float32)
    counts = rng.integers(1, 60, questions).tolist()
    scopes = [
        Scope(
            world(1), as_of, rng.choice(N, 25, replace=False).astype(np.int64) + 1,
            None if share is None else rng.random(N + 1) < share,
        )
        for as_of, share in zip((NOW, 3, 10 * N) * 4, (None, 0.5, 0.05, None) * 3, strict=True)
    ][:questions]  # fmt: skip
    together = retriever.candidates_of(queries, counts, scopes)
    assert len(together) == questions
    for query, count, scope, found in zip(queries, counts, scopes, together, strict=True):
        assert found.path == retriever.candidates(query, count, scope).path
        assert set(found.items.tolist()) <= set(permitted(scope).tolist())
        assert retriever.rank(query, found.items, count).items.tolist() == brute_force(query, vectors, scope, count)


@pytest.mark.parametrize(("few", "path"), [(6, "gather"), (7, "exact")])
def test_few_items_are_gathered_and_many_masked(few: int, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "GATHER_SHARE", 0.1)
    wanted = np.zeros(N + 1, bool)
    wanted[1 : few + 1] = True
    catalogue = Catalogue.number([Item(f"{n:03}", available_from=n) for n in range(1, N + 1)])
    scope = Scope(Availability.of(catalogue), 60, np.zeros(0, np.int64), wanted)
    vectors = vectors_of(5)
    found = Retriever(vectors, None).retrieve(vectors[0], 3, scope)
    assert found.path == path
    assert found.items.tolist() == brute_force(vectors[0], vectors, scope, 3)


@pytest.mark.parametrize("share", [None, 0.05, 0.5])
@pytest.mark.parametrize("count", [1, 10, 500])
def test_similar_is_by_cosine_and_exact_in_every_mode(mode: Mode, count: int, share: float | None) -> None:
    rng = np.random.default_rng(7)
    vectors = vectors_of(7) * rng.uniform(0.1, 10, (N, 1)).astype(np.float32)
    vectors[3] = 0
    wanted = None if share is None else rng.random(N + 1) < share
    for item in (1, 4, 50):
        scope = Scope(world(7), NOW, np.array([item], np.int64), wanted)
        found = Retriever(vectors, indexed(vectors), mode).similar(item, count, scope)
        lengths = np.linalg.norm(vectors, axis=1) * np.linalg.norm(vectors[item - 1])
        cosines = np.divide(vectors @ vectors[item - 1], lengths, out=np.zeros(N, np.float32), where=lengths > 0)
        allowed = permitted(scope)
        assert set(found.items.tolist()) <= set(allowed.tolist())
        best = np.sort(cosines[allowed - 1])[::-1][:count]
        assert len(set(found.items.tolist())) == len(best)
        np.testing.assert_allclose(found.scores, best, atol=1e-5)
        np.testing.assert_allclose(cosines[found.items - 1], best, atol=1e-5)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("piece", [1, 7, N])
def test_gathering_in_pieces_chooses_among_what_is_permitted(
    seed: int, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retrieval, "GATHER_SHARE", 1.0)
    monkeypatch.setattr(retrieval, "GATHERED", piece)
    rng = np.random.default_rng(seed)
    vectors = vectors_of(seed) * rng.uniform(0.1, 10, (N, 1)).astype(np.float32)
    wanted = rng.random(N + 1) < 0.6
    wanted[0] = True  # PAD is no item, whatever a filter says of it
    nothing = Scope(world(seed), NOW, np.zeros(0, np.int64), wanted)
    blocked = Span.of(nothing).blocked
    blocked = blocked[wanted[blocked]]
    assert len(blocked) > 1
    query = vectors[blocked - 1].sum(axis=0)  # what does not exist scores well, and so does what is banned
    scope = replace(nothing, banned=np.array(brute_force(query, vectors, nothing, 20)[::2]))
    found = Retriever(vectors, None).retrieve(query, 3, scope)
    assert found.path == "gather"
    assert found.items.tolist() == brute_force(query, vectors, scope, 3)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    for item in blocked.tolist():
        near = Retriever(vectors, None).similar(item, 3, scope)
        assert near.path == "gather"
        assert near.items.tolist() == brute_force(vectors[item - 1], vectors / lengths, scope, 3)


def test_equal_scores_come_by_index(mode: Mode) -> None:
    vectors = np.repeat(np.eye(2, WIDTH, dtype=np.float32), 20, axis=0)  # items 1..20 alike, then 21..40
    scope = Scope(Availability.open(40), NOW, np.array([2, 21], np.int64))
    query = np.array([1, 2, *[0] * (WIDTH - 2)], np.float32)
    found = Retriever(vectors, indexed(vectors), mode).retrieve(query, 22, scope)
    assert found.items.tolist() == [*range(22, 41), 1, 3, 4]


@pytest.mark.parametrize("count", range(2, 40))
def test_items_with_one_vector_have_one_score_beside_whatever_others(count: int) -> None:
    """Where sums are rounded, as of any real vectors, they must be rounded in the same way."""
    rng = np.random.default_rng(count)
    for _ in range(20):
        vectors = rng.normal(size=(40, 64)).astype(np.float32)
        items = np.sort(rng.choice(40, count, replace=False)) + 1
        vectors[items - 1] = vectors[0]
        query = rng.normal(size=64).astype(np.float32)
        ranked = Retriever(vectors, None).rank(query, rng.permutation(items), count)
        assert ranked.items.tolist() == items.tolist()
        assert len(set(ranked.scores.tolist())) == 1


def test_all_items_banned_is_an_empty_answer(mode: Mode) -> None:
    vectors = vectors_of(0)
    scope = Scope(Availability.open(N), NOW, np.arange(1, N + 1))
    assert len(Retriever(vectors, indexed(vectors), mode).retrieve(vectors[0], 10, scope).items) == 0


@pytest.mark.parametrize(
    ("mode", "born", "path"),
    [
        (Mode.EXACT, N, "exact"),
        (Mode.HNSW, N, "hnsw"),
        (Mode.HNSW, 4, "hnsw_exact"),  # too few of what HNSW finds exist: exact search completes the answer
        (Mode.AUTO, N, "hnsw"),
        (Mode.AUTO, 50, "exact"),  # few items
        (Mode.AUTO, 61, "hnsw"),
    ],
)
def test_the_planner_takes_the_path(monkeypatch: pytest.MonkeyPatch, mode: Mode, born: int, path: str) -> None:
    monkeypatch.setattr(retrieval, "EXACT_ITEMS", 60)
    vectors = vectors_of(1)
    catalogue = Catalogue.number([Item(f"{n:03}", available_from=n) for n in range(1, N + 1)])
    scope = Scope(Availability.of(catalogue), born, np.zeros(0, np.int64))
    assert Retriever(vectors, indexed(vectors), mode).retrieve(vectors[0], 10, scope).path == path


def test_a_small_share_of_existing_items_is_searched_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "EXACT_ITEMS", 2)
    monkeypatch.setattr(retrieval, "EXACT_SHARE", 0.1)
    vectors = vectors_of(1)
    catalogue = Catalogue.number([Item(f"{n:03}", available_from=n) for n in range(1, N + 1)])
    retriever = Retriever(vectors, indexed(vectors), Mode.AUTO)
    paths = [
        retriever.retrieve(vectors[0], 1, Scope(Availability.of(catalogue), born, np.zeros(0, np.int64))).path
        for born in (N // 10, N // 10 + 1)
    ]
    assert paths[0] == "exact"
    assert paths[1].startswith("hnsw")


def test_a_failing_index_is_left_for_exact_search_and_stays_left() -> None:
    broken, vectors = BrokenIndex(), vectors_of(2)
    retriever = Retriever(vectors, broken, Mode.HNSW)
    scope = Scope(world(2), NOW, np.array([5], np.int64))
    first, second = (retriever.retrieve(vectors[0], 10, scope) for _ in range(2))
    assert (first.path, second.path) == ("hnsw_exact", "exact")
    assert first.items.tolist() == second.items.tolist() == brute_force(vectors[0], vectors, scope, 10)
    assert broken.calls == 1
    assert retriever.failed


def test_without_an_index_every_mode_is_exact(mode: Mode) -> None:
    vectors = vectors_of(3)
    found = Retriever(vectors, None, mode).retrieve(
        vectors[0], 5, Scope(Availability.open(N), 0, np.zeros(0, np.int64))
    )
    assert found.path == "exact"


def test_rank_orders_what_it_is_given() -> None:
    vectors = np.array([[1], [3], [3], [2]], np.float32)
    found = Retriever(vectors, None).rank(np.array([1], np.float32), np.array([4, 3, 1, 2]), 3)
    assert found.items.tolist() == [2, 3, 4]
    assert found.scores.tolist() == [3, 3, 2]


@given(st.lists(st.sampled_from([-np.inf, -1.0, 0.0, 1.0, 2.0]), max_size=20), st.integers(1, 25))
def test_top_is_what_sorting_gives(scores: Sequence[float], count: int) -> None:
    finite = [at for at in range(len(scores)) if scores[at] > -np.inf]
    wanted = sorted(finite, key=lambda at: (-scores[at], at))[:count]
    found = top(np.array(scores, np.float32), count).tolist()
    assert sorted(found) == sorted(wanted)


def test_the_index_is_the_same_each_time_and_finds_as_much_when_threads_build_it(tmp_path: Path) -> None:
    vectors = vectors_of(5, 2_000)
    files = [tmp_path / name for name in ("one", "another")]
    for file in files:
        build_index(vectors).save_index(str(file))
    assert files[0].read_bytes() == files[1].read_bytes()
    index = build_index(vectors, threads=2)
    index.set_ef(200)
    assert index_recall(vectors_of(6, 50), Retriever(vectors, index), 10) > 0.99


def test_an_index_comes_back_from_its_file_with_labels_and_ef(tmp_path: Path) -> None:
    vectors = vectors_of(4)
    file = f"{tmp_path}/index.hnsw"
    build_index(vectors).save_index(file)
    index = load_index(file, WIDTH, ef=77)
    assert index.ef == 77
    assert index.get_current_count() == N
    np.testing.assert_array_equal(index.get_items(list(range(N)), return_type="numpy"), vectors)
