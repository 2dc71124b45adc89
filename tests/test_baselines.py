"""Popularity knows nothing of a target's day, and EASE is its closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest

from shared.times import DAY
from tests.trained import START, cyclic_events, dataset
from trainer import baselines as module
from trainer.baselines import TooManyItemsError, ease, ease_scores, popularity_ranks, popularity_scores, rival_ranks
from trainer.config import EvaluationConfig
from trainer.dataset import leave_one_out
from trainer.evaluate import full_ranks
from trainer.metrics import metrics
from trainer.splits import temporal

# --- popularity ---------------------------------------------------------------------------------------


def test_popularity_at_a_target_knows_nothing_of_its_day() -> None:
    data = dataset(
        [("early", "a", START), ("late", "b", START + 40 * DAY)]
        + [("u", i, START + 40 * DAY + n) for n, i in enumerate(["x", "y", "z"])]
    )
    split = leave_one_out(data)
    index = data.catalogue.index_by_id
    counts = popularity_scores(split.test, split.popularity, None)(np.array([0]))[0]
    assert {i for i in index if counts[index[i] - 1]} == {"a"}
    recent = popularity_scores(split.test, split.popularity, 30)(np.array([0]))[0]
    assert not recent.any()


def test_windows_of_popularity_by_hand() -> None:
    """Two users on day 50: "old" has five events on day 0, "month" three on day 30, "week" two on day 45."""
    past = {"old": (5, 0), "month": (3, 30), "week": (2, 45)}
    before = [(f"{i}{n}", i, START + day * DAY) for i, (count, day) in past.items() for n in range(count)]
    later = [(u, i, START + 50 * DAY + n) for u, goal in (("u", "month"), ("v", "week"))
             for n, i in enumerate(["p", "q", goal])]  # fmt: skip
    split = leave_one_out(dataset(before + later))
    found = {name: r.tolist() for name, r in popularity_ranks(split.test, split.popularity, timed=True).items()}
    # Items without an event in the window tie with each other, and ties count against the target.
    assert found["popular"] == [2, 3]
    assert found["popular_30d"] == [1, 2]
    assert found["popular_7d"] == [3, 1]


def test_after_the_cut_of_a_temporal_split_the_last_days_of_training_count() -> None:
    rows = [(f"w{n}", "hit", START + 9 * DAY) for n in range(8)] + [("u", "a", START), ("u", "hit", START + 99 * DAY)]
    split = temporal(dataset(rows), 0.8, "last")
    assert popularity_ranks(split.test, split.popularity, timed=True)["popular_7d"].tolist() == [1]


def test_without_times_every_training_event_counts() -> None:
    rows = [(f"w{n}", item, 0) for n, item in enumerate(["hit", "hit", "other"])]
    split = leave_one_out(dataset([*rows, *[("u", i, 0) for i in ("p", "q", "hit")]], has_times=False))
    found = popularity_ranks(split.test, split.popularity, timed=False)
    assert {name: r.tolist() for name, r in found.items()} == {"popular": [1]}


# --- EASE ---------------------------------------------------------------------------------------------


def test_ease_is_its_closed_form() -> None:
    """Items that each user has once or more, against the equation written out with the users by items table."""
    rows = [("u", i, START + n) for n, i in enumerate("aabcd")] + [("v", i, START + n) for n, i in enumerate("bcad")]
    data = dataset(rows)
    sequences = leave_one_out(data).sequences
    X = np.zeros((2, len(data.catalogue)))
    for user, (a, b) in enumerate(zip(sequences.starts, sequences.stops, strict=True)):
        X[user, sequences.item[a:b] - 1] = 1
    P = np.linalg.inv(X.T @ X + 2.0 * np.eye(len(data.catalogue)))
    wanted = np.eye(len(P)) - P / np.diag(P)
    np.testing.assert_allclose(ease(sequences, data, 2.0), wanted, atol=1e-6)
    assert not np.diag(ease(sequences, data, 2.0)).any()


def test_ease_finds_what_goes_together() -> None:
    """Of ten items in two halves, users stay in one half."""
    rng = np.random.default_rng(0)
    rows = [
        (f"u{u}", f"{half}{i}", START + n)
        for u in range(60)
        for half in ["ab"[u % 2]]
        for n, i in enumerate(rng.permutation(5)[:4])
    ]
    split = leave_one_out(dataset(rows))
    ranks = full_ranks(split.test, ease_scores(split.test, ease(split.sequences, split.test.dataset, 1.0)))
    assert ranks.max() <= 3  # three of the five are left in a user's half


def test_ease_refuses_a_catalogue_too_large_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EASE_ITEMS", 29)
    split = leave_one_out(dataset(cyclic_events(users=40)))
    with pytest.raises(TooManyItemsError, match="30 x 30 items, and 29 items are its limit"):
        ease(split.sequences, split.test.dataset, 1.0)
    found, notes = rival_ranks(split, EvaluationConfig())
    assert set(found) == {"popular", "popular_7d", "popular_30d"}
    assert notes == ["EASE is left out: it needs a table of 30 x 30 items, and 29 items are its limit"]


def test_rivals_are_asked_all_cases_and_ease_can_be_switched_off() -> None:
    split = leave_one_out(dataset(cyclic_events(users=40)))
    found, notes = rival_ranks(split, EvaluationConfig())
    assert set(found) == {"popular", "popular_7d", "popular_30d", "ease"}
    assert {len(r) for r in found.values()} == {len(split.test)}
    assert notes == []
    assert metrics(found["ease"])["hr@10"] > 0.9  # neighbours on the circle
    assert "ease" not in rival_ranks(split, EvaluationConfig(ease=False))[0]


def test_without_cases_there_are_no_rivals() -> None:
    split = leave_one_out(dataset([("u", "a", START), ("v", "b", START)]))
    assert rival_ranks(split, EvaluationConfig()) == ({}, [])
    assert not math.isnan(split.popularity.popular(START).sum())
