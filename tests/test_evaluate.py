"""Metrics against fractions a reader can check, and ranks as a user of the service sees them."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.catalogue import Availability
from shared.encoder import Encoder, Vectors
from shared.events import IntArray
from shared.retrieval import Mode, Retrieval, Retriever, build_index
from shared.times import DAY
from tests import worlds
from tests.trained import ITEMS, KINDS, START, Kind, dataset, evaluate_served, served_ranks, world
from trainer.dataset import Cases, Dataset, leave_one_out
from trainer.evaluate import TOP, encode_cases, full_ranks, index_recall, place_of, served_lists, vector_scores
from trainer.metrics import MISSED
from trainer.train import encode_torch, evaluate_torch

# --- full ranks ---------------------------------------------------------------------------------------


def asked(*items: str) -> Cases:
    """One case: the last of `items` is to be guessed, in a world of items 1..6."""
    data = dataset([("u", i, START + n) for n, i in enumerate(items)], [{"item_id": str(i)} for i in range(1, 7)],
                   availability="always")  # fmt: skip
    assert [i.item_id for i in data.catalogue.items] == ["1", "2", "3", "4", "5", "6"]
    return leave_one_out(data).test


def rank(cases: Cases, *scores: float) -> int:
    return int(full_ranks(cases, lambda part: np.array([scores] * len(part)))[0])


def test_the_rank_counts_better_items() -> None:
    assert rank(asked("1", "2", "6"), 0, 0, 9, 8, 1, 5) == 3
    assert rank(asked("1", "2", "6"), 0, 0, 1, 2, 3, 5) == 1


def test_ties_count_against_the_target() -> None:
    assert rank(asked("1", "2", "6"), 0, 0, 5, 5, 1, 5) == 3
    assert rank(asked("1", "2", "6"), 7, 7, 7, 7, 7, 7) == 4  # of the four that the user has not seen


def test_what_the_user_saw_before_is_left_out() -> None:
    assert rank(asked("1", "2", "6"), 9, 9, 0, 0, 0, 5) == 1


def test_a_target_that_was_seen_before_is_missed() -> None:
    assert rank(asked("6", "2", "6"), 0, 0, 0, 0, 0, 9) == MISSED


def test_scores_that_are_no_numbers_never_help() -> None:
    nan = math.nan
    assert rank(asked("1", "2", "6"), nan, nan, nan, nan, nan, nan) == 6
    assert rank(asked("1", "2", "6"), 0, 0, nan, 0, 0, 5) == 2


@given(st.lists(st.sampled_from([0.0, 1.0, 2.0, 3.0]), min_size=6, max_size=6))
def test_ranks_are_what_sorting_gives(scores: list[float]) -> None:
    cases = asked("1", "2", "5", "6")
    rivals = [scores[i - 1] for i in (3, 4)]
    assert rank(cases, *scores) == 1 + sum(s >= scores[5] for s in rivals)


def test_chunks_change_nothing() -> None:
    found = world("sasrec")
    cases = found.split.test
    table = np.random.default_rng(0).normal(size=(len(cases), ITEMS))
    assert (
        full_ranks(cases, lambda part: table[part], chunk=7).tolist()
        == full_ranks(cases, lambda part: table[part]).tolist()
    )


# --- through the bundle -------------------------------------------------------------------------------


@pytest.mark.slow  # the first test of a kind trains its model
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", list(Mode))
def test_served_ranks_are_the_full_ranks_of_the_first_20(
    kind: Kind, mode: Mode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shared.retrieval.EXACT_ITEMS", 10)
    found = world(kind)
    model, cases = found.bundle.models[kind], found.split.test
    retriever = Retriever(model.retriever.vectors, model.retriever.index, mode)
    served = served_ranks(cases, model.encoder, retriever, Availability.open(ITEMS))
    order, queries = encode_torch(found.fitted.encoder, found.config, cases)
    table = np.empty(queries.shape, np.float32)
    table[order] = queries.numpy()
    full = full_ranks(cases, vector_scores(table, model.retriever.vectors))
    assert served.tolist() == np.where(full <= TOP, full, MISSED).tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_the_circle_knows_what_comes_next(kind: Kind) -> None:
    found = world(kind)
    assert float(np.mean(found.served() == 1)) >= 0.95
    assert found.fitted.best is not None
    assert found.fitted.best > 0.95


@pytest.mark.parametrize("kind", KINDS)
def test_torch_and_bundle_have_the_same_metrics(kind: Kind) -> None:
    found = world(kind)
    by_torch = evaluate_torch(found.fitted.encoder, found.config, found.split.test)
    model = found.bundle.models[kind]
    served = evaluate_served(found.split, model.encoder, model.retriever)
    for name in ("hr@5", "hr@20", "ndcg@10"):
        assert served[name] == pytest.approx(by_torch[name], abs=1e-9)


def test_what_was_seen_before_the_events_that_are_read_is_left_out_too() -> None:
    """Of 40 items 32 events are read; 3 and 9 were seen before those, and would be among the first after 2."""
    history = [3, 9, *range(10, 41), 2, 5]
    data = dataset([("u", f"{i:02}", START + n * DAY) for n, i in enumerate(history)],
                   [{"item_id": f"{i:02}"} for i in range(1, 41)], availability="always")  # fmt: skip
    cases = leave_one_out(data).test
    encoder, retriever = circle_model(40)
    read = cases.histories()[0][-encoder.spec.max_length :]
    assert not {3, 9} & set(read.tolist())
    _, queries = encode_cases(encoder, cases)
    assert full_ranks(cases, vector_scores(queries, retriever.vectors)).tolist() == [2]
    lists = served_lists(cases, encoder, retriever, Availability.open(40))
    for found in (lists.free, lists.ruled):
        assert found.items[0, :7].tolist() == [4, 5, 6, 7, 8, 1, 0]  # all that is left
        assert found.ranks.tolist() == [2]


def test_places_in_lists_count_equal_scores_against_the_target() -> None:
    found = Retrieval(np.array([4, 2, 7, 9]), np.array([0.9, 0.5, 0.5, 0.1], np.float32), "exact")
    assert [place_of(found, item) for item in (4, 2, 7, 9, 5)] == [1, 3, 3, 4, MISSED]


@pytest.mark.parametrize("top", [5, 20, 29])
def test_a_model_that_knows_nothing_is_worth_nothing_through_the_bundle_too(top: int) -> None:
    """All scores are the same: every target is behind all items that its user has not seen."""
    circle = world("sasrec")
    model = circle.bundle.models["sasrec"]
    blind, cases = Retriever(np.ones_like(model.retriever.vectors), None), circle.split.test
    wanted = full_ranks(cases, lambda part: np.ones((len(part), ITEMS), np.float32))
    lists = served_lists(cases, model.encoder, blind, Availability.open(ITEMS), top)
    assert (lists.free.items[:, 0] > 0).all()
    for found in (lists.free, lists.ruled):
        assert found.ranks.tolist() == np.where(wanted <= top, wanted, MISSED).tolist()


def test_index_recall_is_the_share_of_the_exact_top() -> None:
    vectors = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32)
    index = build_index(vectors)
    index.set_ef(50)
    assert index_recall(vectors[:9], Retriever(vectors, index), 10) == 1.0
    assert index_recall(vectors[:9], Retriever(vectors, index), 100) == 1.0  # no more than there are
    wrong = build_index(np.ascontiguousarray(-vectors))
    wrong.set_ef(50)
    assert index_recall(vectors[:9], Retriever(vectors, wrong), 10) < 0.3
    assert math.isnan(index_recall(vectors[:9], Retriever(vectors, None), 10))


# --- availability: items born and withdrawn over time -------------------------------------------------


def changing(*, has_times: bool = True) -> Dataset:
    """Items 1..6 born on day 1..6; 2 ends on day 5, 4 is withdrawn. Three users ask on days 3, 5 and 9."""
    items = [
        {"item_id": str(n), "available_from": START + n * DAY, "available_until": START + 5 * DAY if n == 2 else None,
         "withdrawn": n == 4}
        for n in range(1, 7)
    ]  # fmt: skip
    asked_on = {"u": (3, ["1", "2", "3"]), "v": (5, ["3", "1", "2"]), "w": (9, ["1", "3", "6"])}
    events = [(user, i, START + day * DAY) for user, (day, history) in asked_on.items() for i in history]
    return dataset(events, items, has_times=has_times)


def circle_model(items: int = 6) -> tuple[Encoder, Retriever]:
    """i is followed by i + 1, and the last by 1."""
    network = worlds.encoder_bytes(worlds.circle(items), asks_with_mask=False)
    encoder = Encoder(network, worlds.model_info("sasrec", items, items).encoder)
    return encoder, Retriever(np.eye(items, dtype=np.float32), None)


class Watched(Retriever):
    """A retriever that keeps what it returned and for when."""

    def __init__(self, vectors: Vectors) -> None:
        super().__init__(vectors, None)
        self.answers: list[tuple[int, IntArray]] = []

    def retrieve(self, query, count, scope):  # type: ignore[no-untyped-def]
        found = super().retrieve(query, count, scope)
        self.answers.append((scope.as_of, found.items))
        return found


def test_answers_at_a_time_hold_no_item_that_does_not_exist_then() -> None:
    data = changing()
    watched = Watched(np.eye(6, dtype=np.float32))
    served_ranks(leave_one_out(data).test, circle_model()[0], watched, Availability.of(data.catalogue))
    answers = {(at - START) // DAY: {int(i) for i in items} for at, items in watched.answers}
    assert answers == {3: {3}, 5: {5}, 9: {5, 6}}  # what exists, less the two that the user has seen


def test_what_the_availability_rule_touches_is_counted() -> None:
    found = evaluate_served(leave_one_out(changing()), *circle_model())
    assert found["cases"] == 3
    rule = found["availability_rule"]
    # Day 3: 4, 5, 6 are not there; day 5: 2 is over, 4 withdrawn, 6 not yet born; day 9: 2 over, 4 withdrawn.
    assert rule["users_touched"] == 3
    assert rule["items_hidden_mean"] == pytest.approx((3 + 3 + 2) / 3)
    assert rule["targets_hidden"] == 1  # v's target, 2, ended before it was asked for
    # Open: u 3 after 2 -> first; v 2 after 1 -> first; w 6 after 3 -> behind 4 and 5.
    assert found["mrr"] == pytest.approx((1 + 1 + 1 / 3) / 3)
    # By the rule: u first; v missed; w behind 5 alone, as 4 is withdrawn.
    assert rule["ndcg@10"] == pytest.approx((1 + 0 + 1 / math.log2(3)) / 3)


def test_without_times_the_rule_is_off() -> None:
    found = evaluate_served(leave_one_out(changing(has_times=False)), *circle_model())
    rule = found["availability_rule"]
    assert (rule["targets_hidden"], rule["users_touched"], rule["items_hidden_mean"]) == (0, 0, 0.0)
    assert rule["ndcg@10"] == found["ndcg@10"]


def test_an_empty_history_is_missed_and_no_error() -> None:
    cases = leave_one_out(changing()).test
    bare = replace(cases, row=cases.dataset.offsets[:-1])  # ask for each user's first event
    assert served_ranks(bare, *circle_model(), Availability.open(6)).tolist() == [MISSED] * 3
