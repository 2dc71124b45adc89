"""Figures against fractions a reader can check by hand, and what holds for all of them."""

from __future__ import annotations

import math
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.metrics import (
    CUTOFFS,
    MISSED,
    case_values,
    intervals,
    list_metrics,
    metrics,
    paired,
    percentiles,
    user_means,
)

# --- metrics of ranks ---------------------------------------------------------------------------------


def test_metrics_by_hand() -> None:
    found = metrics(np.array([1, 4, 7, MISSED]))
    assert found["hr@5"] == found["recall@5"] == 2 / 4
    assert found["hr@10"] == found["hr@20"] == 3 / 4
    assert found["ndcg@5"] == pytest.approx((1 + 1 / math.log2(5)) / 4)
    assert found["ndcg@10"] == pytest.approx((1 + 1 / math.log2(5) + 1 / 3) / 4)
    assert found["mrr@5"] == pytest.approx((1 + 1 / 4) / 4)
    assert found["mrr"] == pytest.approx((1 + 1 / 4 + 1 / 7) / 4)


def test_any_cutoff_can_be_asked_for() -> None:
    found = metrics(np.array([1, 3, 100]), (1, 3, 100))
    assert [found[f"hr@{k}"] for k in (1, 3, 100)] == [pytest.approx(n / 3) for n in (1, 2, 3)]
    assert found["ndcg@3"] == pytest.approx((1 + 1 / 2) / 3)
    assert "hr@10" not in found


def test_recall_weighs_users_alike_and_hit_rate_cases() -> None:
    """User 7 has three targets, two of them found; user 9 has one, missed."""
    found = metrics(np.array([1, 2, MISSED, MISSED]), (5,), np.array([7, 7, 7, 9]))
    assert found["hr@5"] == 2 / 4
    assert found["recall@5"] == pytest.approx((2 / 3 + 0) / 2)


@pytest.mark.parametrize(("rank", "hit"), [(5, 1.0), (6, 0.0)])
def test_a_cutoff_counts_its_own_place(rank: int, hit: float) -> None:
    assert metrics(np.array([rank]))["hr@5"] == hit


def test_no_cases_have_no_metrics() -> None:
    assert metrics(np.zeros(0, np.int64)) == {}
    assert intervals(np.zeros(0, np.int64), np.zeros(0, np.int64), ["hr@5"]) == {}


@given(st.lists(st.one_of(st.integers(1, 50), st.just(MISSED)), min_size=1, max_size=30))
def test_metrics_lie_in_0_1_and_grow_with_the_cutoff(ranks: list[int]) -> None:
    found = metrics(np.array(ranks))
    assert all(0 <= value <= 1 for value in found.values())
    for name in ("hr", "ndcg", "mrr", "recall"):
        assert all(found[f"{name}@{a}"] <= found[f"{name}@{b}"] for a, b in pairwise(CUTOFFS))
    assert all(found[f"mrr@{k}"] <= found[f"ndcg@{k}"] <= found[f"hr@{k}"] for k in CUTOFFS)


def test_user_means_are_means_of_each_users_cases() -> None:
    assert user_means(np.array([1.0, 2.0, 6.0]), np.array([4, 1, 4])).tolist() == [2.0, 3.5]


# --- metrics of lists ---------------------------------------------------------------------------------

COUNTS = np.array([0, 3, 1, 0, 0])  # items 1..4: three events, one, none, none
LISTS = np.array([[1, 2], [1, 3], [1, 0]])  # the third list is short


def test_percentiles_by_hand() -> None:
    assert percentiles(np.array([5, 1, 1, 9])).tolist() == [0.625, 0.25, 0.25, 0.875]


def test_coverage_and_novelty_by_hand() -> None:
    found = list_metrics(LISTS, np.array([2, 2, 2]), COUNTS, 2)
    assert found["coverage@2"] == 3 / 4  # items 1, 2 and 3
    # Each item once more than it occurred: shares 4/8, 2/8, 1/8, 1/8, so 1, 2, 3 and 3 bits.
    assert found["novelty@2"] == pytest.approx((1 + 2 + 1 + 3 + 1) / 5)
    assert list_metrics(LISTS, np.array([2, 2, 2]), COUNTS, 1)["novelty@1"] == pytest.approx(1)


def test_popularity_bias_by_hand() -> None:
    """Percentiles are 7/8 for item 1, 5/8 for item 2, and 2/8 for both others."""
    found = list_metrics(LISTS, np.array([2, 2, 3]), COUNTS, 2)
    recommended, chosen = (7 + 5 + 7 + 2 + 7) / 8 / 5, (5 + 5 + 2) / 8 / 3
    assert found["popularity_percentile@2"] == pytest.approx(recommended)
    assert found["popularity_percentile_of_targets"] == pytest.approx(chosen)
    assert found["popularity_bias@2"] == pytest.approx(recommended - chosen)


def test_recommending_what_people_choose_has_no_popularity_bias() -> None:
    targets = np.array([1, 2, 4])
    assert list_metrics(targets[:, None], targets, COUNTS, 1)["popularity_bias@1"] == 0


def test_empty_lists_have_no_metrics() -> None:
    assert list_metrics(np.zeros((2, 3), np.int64), np.array([1, 2]), COUNTS) == {}


# --- intervals ----------------------------------------------------------------------------------------


def test_an_interval_is_as_wide_as_theory_has_it() -> None:
    """A hit rate of 1/2 over n users has a standard error of sqrt(1/4 / n)."""
    n = 2_000
    low, high = intervals(np.array([1, MISSED] * (n // 2)), np.arange(n), ["hr@10"])["hr@10"]
    error = math.sqrt(0.25 / n)
    assert low == pytest.approx(0.5 - 1.96 * error, abs=0.003)
    assert high == pytest.approx(0.5 + 1.96 * error, abs=0.003)


def test_users_are_drawn_with_all_of_their_cases() -> None:
    """Ten cases a user that all say the same are worth no more than one."""
    ranks, users = np.repeat([1, MISSED], 50), np.arange(100)
    once = intervals(ranks, users, ["hr@10"])
    assert intervals(np.repeat(ranks, 10), np.repeat(users, 10), ["hr@10"]) == once


def test_the_seed_decides_the_interval() -> None:
    ranks, users = np.random.default_rng(0).integers(1, 40, 300), np.arange(300)
    first, again, other = (intervals(ranks, users, ["ndcg@10"], seed=s) for s in (1, 1, 2))
    assert first == again != other


def test_an_interval_holds_the_metric_and_is_a_point_where_all_users_agree() -> None:
    ranks, users = np.random.default_rng(0).integers(1, 40, 300), np.arange(300)
    low, high = intervals(ranks, users, ["ndcg@10"])["ndcg@10"]
    assert low < metrics(ranks)["ndcg@10"] < high
    assert intervals(np.ones(9, np.int64), np.arange(9), ["hr@5"])["hr@5"] == (1.0, 1.0)


# --- one run against another --------------------------------------------------------------------------


def test_the_p_value_is_the_share_of_sign_flips() -> None:
    """Of the 2^4 ways to give the differences signs, count those with a sum at least as far from 0."""
    gap = np.array([0.5, 0.3, 0.1, -0.2])
    exact = np.mean([abs(np.dot(signs, gap)) >= gap.sum() - 1e-9 for signs in product((-1, 1), repeat=4)])
    found = paired(np.zeros(4), gap, permutations=40_000)
    assert found.p == pytest.approx(exact, abs=0.01)
    assert found.difference == pytest.approx(0.7 / 4)


def test_equal_runs_do_not_differ() -> None:
    values = np.random.default_rng(0).random(50)
    found = paired(values, values)
    assert (found.difference, found.low, found.high, found.p) == (0, 0, 0, 1)


def test_a_clear_difference_is_found_and_swapping_the_runs_turns_its_sign() -> None:
    rng = np.random.default_rng(0)
    a = rng.random(500)
    b = a + rng.normal(0.02, 0.05, 500)
    there, back = paired(a, b), paired(b, a)
    assert there.p < 0.001
    assert 0 < there.low < there.difference < there.high
    assert back.difference == pytest.approx(-there.difference)
    assert back.p == pytest.approx(there.p, abs=1e-3)


def test_p_values_of_runs_that_differ_by_chance_alone_are_spread_evenly() -> None:
    rng = np.random.default_rng(0)
    found = [paired(np.zeros(30), rng.normal(size=30), permutations=200, resamples=10).p for _ in range(300)]
    assert np.mean(np.array(found) < 0.2) == pytest.approx(0.2, abs=0.07)


def test_pairing_finds_what_two_intervals_hide() -> None:
    """Users differ much from each other, the runs by little, but for every user."""
    a = np.random.default_rng(0).random(200)
    found = paired(a, a + 0.01)
    assert found.p < 0.001
    assert found.difference < 2 * a.std() / math.sqrt(200)  # far inside the error of one run alone


def test_values_of_cases_are_those_that_metrics_average() -> None:
    ranks = np.array([1, 4, MISSED])
    for name, value in metrics(ranks).items():
        if not name.startswith("recall"):
            assert np.mean(case_values(ranks, name)) == pytest.approx(value)
