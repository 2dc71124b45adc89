"""Numbering a source, splits by position, and batches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.events import IntArray
from shared.times import BEGINNING, DAY, END, SECOND
from tests.trained import START, Row, cyclic_events, dataset
from trainer.dataset import Cases, Dataset, DatasetError, Sequences, batches, everything, leave_one_out


def views(user: str, *items: str, at: int = START, step: int = SECOND) -> list[Row]:
    return [(user, item, at + place * step) for place, item in enumerate(items)]


def ids(data: Dataset, indices: IntArray) -> list[str]:
    return [data.catalogue[int(i)].item_id for i in indices]


def by_user(data: Dataset, sequences: Sequences) -> list[list[str]]:
    return [ids(data, sequences.item[a:b]) for a, b in zip(sequences.starts, sequences.stops, strict=True)]


def guesses(cases: Cases) -> dict[str, tuple[list[str], str]]:
    """User -> history and target, as ids."""
    data = cases.dataset
    rows = zip(cases.user, cases.histories(), ids(data, cases.target), strict=True)
    return {data.users[u]: (ids(data, history), target) for u, history, target in rows}


# --- numbering ----------------------------------------------------------------------------------------


def test_histories_are_in_the_order_of_time_then_arrival() -> None:
    data = dataset([("u", "late", 9), ("u", "b", 5), ("v", "x", 1), ("u", "a", 5), ("u", "first", 1)])
    assert data.users == ("u", "v")
    assert ids(data, data.item) == ["first", "b", "a", "late", "x"]
    assert data.offsets.tolist() == [0, 4, 5]
    assert data.user.tolist() == [0, 0, 0, 0, 1]


def test_events_outside_the_policy_are_left_out_and_noted() -> None:
    data = dataset([("u", "a", 1), ("u", "b", 2, "scroll", None), ("w", "c", 3, "scroll", None)])
    assert ids(data, data.item) == ["a"]
    assert data.notes == ("event types outside the policy, left out: scroll",)
    assert {i.item_id for i in data.catalogue.items} == {"a", "b", "c"}


def test_events_may_mark_as_seen_without_feeding() -> None:
    data = dataset([("u", "a", 1, "rating", 5.0), ("u", "b", 2, "rating", 2.0)], history={"minimum_value": 4})
    assert data.feeds.tolist() == [True, False]
    assert data.seen.tolist() == [True, True]


def test_no_event_that_feeds_is_an_error_with_both_lists_of_types() -> None:
    with pytest.raises(DatasetError, match=r"has the types scroll.*names view"):
        dataset([("u", "a", 1, "scroll", None)])
    with pytest.raises(DatasetError, match="no event"):
        dataset([])


def test_an_item_exists_from_its_date_or_its_first_event_whichever_is_earlier() -> None:
    events = [
        ("u", "declared", START + 50),
        ("u", "early", START + 40),
        ("v", "early", START + 60),
        ("u", "undeclared", START + 30),
        ("v", "undeclared", START + 20),
        ("v", "over", START + 55),
    ]
    items: list[dict[str, Any]] = [
        {"item_id": "over", "available_until": START + 15},
        {"item_id": "declared", "available_from": START + 10},
        {"item_id": "early", "available_from": START + 45},
        {"item_id": "unused"},
        {"item_id": "coming", "available_from": START + 99, "available_until": START + 200, "withdrawn": True},
    ]
    data = dataset(events, items)
    starts = {i.item_id: i.available_from - START for i in data.catalogue.items}
    # Nobody knows when an item without date and event began: the end of the data is in nobody's future.
    assert starts == {"declared": 10, "early": 40, "undeclared": 20, "over": 55, "unused": 60, "coming": 99}
    coming = data.catalogue.items[-1]
    assert (coming.available_until, coming.withdrawn) == (START + 200, True)
    info = data.availability
    assert (info.declared, info.from_first_event, info.from_data_end, info.always) == (3, 2, 1, 0)
    assert (info.contradicted, info.never, info.events_before_declared) == (1, 1, 1)


def test_events_without_a_clock_date_no_item() -> None:
    """Loaded from a file without times, they hold their place in it; newer events have times."""
    events = [("u", "a", 0), ("u", "b", 1), ("u", "c", 2), ("u", "c", START)]
    data = dataset(events, [{"item_id": "b", "available_from": START + 9}])
    starts = {i.item_id: i.available_from for i in data.catalogue.items}
    assert starts == {"a": BEGINNING, "b": START + 9, "c": START}


def test_the_rule_of_the_split_knows_no_held_out_event() -> None:
    events = [*(("u", i, START + n) for n, i in enumerate("abcd")), ("v", "c", START + 50)]
    rule = leave_one_out(data := dataset(events, [{"item_id": "d", "available_from": START + 99}])).rule
    there = {i.item_id: bool(rule.allowed(np.array([n]), START + 60)[0]) for n, i in enumerate(data.catalogue.items, 1)}
    assert there == {"a": True, "b": True, "c": True, "d": False}
    at = {i.item_id: int(rule.available_from[n]) - START for n, i in enumerate(data.catalogue.items, 1)}
    assert (at["c"], at["d"]) == (50, 99), "u's events on c and d are held out"


def test_in_the_rule_of_the_split_a_training_event_without_a_clock_dates_no_item() -> None:
    """As in the catalogue: who was used before there was a clock has always been there."""
    events = [*(("u", i, n) for n, i in enumerate("abc")), *(("u", i, START + n) for n, i in enumerate("cde"))]
    data = dataset(events, [{"item_id": "b", "available_from": START + 9}])
    rule = leave_one_out(data).rule
    starts = {i.item_id: int(rule.available_from[n]) for n, i in enumerate(data.catalogue.items, 1)}
    assert starts == {"a": BEGINNING, "b": START + 9, "c": START, "d": END, "e": END}


def test_with_the_policy_always_events_do_not_date_items() -> None:
    data = dataset([("u", "a", 5), ("u", "b", 1)], [{"item_id": "b", "available_from": 9}], availability="always")
    assert {i.item_id: i.available_from for i in data.catalogue.items} == {"a": BEGINNING, "b": 9}
    assert (data.availability.always, data.availability.contradicted) == (1, 0)


def test_without_times_the_place_in_the_file_is_the_order_and_availability_is_off() -> None:
    data = dataset([("u", "b", 0), ("v", "x", 0), ("u", "a", 0)], has_times=False)
    assert ids(data, data.item) == ["b", "a", "x"]
    assert data.timestamp.tolist() == [0, 2, 1]
    assert {i.available_from for i in data.catalogue.items} == {BEGINNING}
    assert (data.info.has_times, data.info.first_event, data.info.last_event) == (False, None, None)


def test_the_fingerprint_changes_with_anything_a_model_sees() -> None:
    events = [*views("u", "a", "b"), *views("v", "b", "a")]
    same, *others = [
        dataset(events),
        dataset([*events, ("v", "c", START)]),
        dataset(views("u", "b", "a") + events[2:]),
        dataset([(u, {"a": "z"}.get(i, i), t) for u, i, t in events]),
        dataset([(u, i, t + 1) for u, i, t in events]),
        dataset([(u, i, t, "rating", float(t > START)) for u, i, t in events], history={"minimum_value": 1}),
    ]
    assert same.info.fingerprint == dataset(events).info.fingerprint
    assert len({d.info.fingerprint for d in (same, *others)}) == len(others) + 1


def test_the_manifest_tells_the_data() -> None:
    info = dataset(views("u", "a", "b") + views("v", "a", at=START + DAY)).info
    assert (info.events, info.users, info.items) == (3, 2, 2)
    assert (info.first_event, info.last_event) == ("2020-01-01T00:00:00Z", "2020-01-02T00:00:00Z")


# --- splits -------------------------------------------------------------------------------------------


def test_the_last_event_is_the_test_and_the_one_before_the_validation() -> None:
    data = dataset([*views("u", "a", "b", "c", "d"), *views("v", "b", "c", "a")])
    split = leave_one_out(data)
    assert guesses(split.test) == {"u": (["a", "b", "c"], "d"), "v": (["b", "c"], "a")}
    assert guesses(split.validation) == {"u": (["a", "b"], "c"), "v": (["b"], "c")}
    assert by_user(data, split.sequences) == [["a", "b"], ["b"]]


def test_users_with_fewer_than_three_events_are_trained_on_and_not_asked() -> None:
    data = dataset([*views("one", "a"), *views("three", "a", "b", "c"), *views("two", "b", "c")])
    split = leave_one_out(data)
    assert set(guesses(split.test)) == set(guesses(split.validation)) == {"three"}
    assert by_user(data, split.sequences) == [["a"], ["a"], ["b", "c"]]


def test_histories_are_cut_by_position_where_a_cut_by_time_would_tell_the_answer() -> None:
    """Everything in one second: the order of arrival alone says what came before the target."""
    data = dataset([("u", item, START) for item in "abcd"])
    test = leave_one_out(data).test
    assert guesses(test) == {"u": (["a", "b", "c"], "d")}
    row, target = int(test.row[0]), int(test.target[0])
    assert target not in test.seen()[0]
    by_time = data.item[data.timestamp <= data.timestamp[row]]
    assert target in by_time  # what a replay of the log up to the target's time would show the model


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 8), st.integers(0, 2)), min_size=1, max_size=40))
def test_no_case_sees_its_target_row_and_nothing_is_lost(rows: list[tuple[int, int, int]]) -> None:
    data = dataset([(f"u{u}", f"i{i}", START + t) for u, i, t in rows])
    split = leave_one_out(data)
    for cases in (split.validation, split.test):
        for user, row, history in zip(cases.user, cases.row, cases.histories(), strict=True):
            assert len(history) == row - data.offsets[user]
    assert len(split.sequences.item) + len(split.validation) + len(split.test) == len(data.item)


def test_a_case_that_is_seen_but_does_not_feed_stays_out_of_the_history() -> None:
    events = [
        ("u", i, START + n, "rating", v) for n, (i, v) in enumerate([("a", 5.0), ("x", 1.0), ("b", 5.0), ("c", 5.0)])
    ]
    test = leave_one_out(dataset(events, history={"minimum_value": 4})).test
    assert guesses(test) == {"u": (["a", "b"], "c")}
    assert ids(test.dataset, test.seen()[0]) == ["a", "x", "b"]


def test_popularity_of_the_split_leaves_held_out_events_out() -> None:
    data = dataset([*views("u", "a", "b", "held", "last"), *views("v", "a", "b")])
    index = data.catalogue.index_by_id
    split, every = leave_one_out(data).popularity.popular(END), everything(data)[1].popular(END)
    assert {i: int(split[index[i]]) for i in index} == {"a": 2, "b": 2, "held": 0, "last": 0}
    assert {i: int(every[index[i]]) for i in index} == {"a": 2, "b": 2, "held": 1, "last": 1}


def test_the_refit_sees_everything() -> None:
    data = dataset(cyclic_events(users=20))
    sequences, popularity = everything(data)
    assert sequences.item.tolist() == data.item.tolist()
    assert int(popularity.popular(END).sum()) == len(data.item)


def test_a_sample_of_cases_keeps_their_order() -> None:
    test = leave_one_out(dataset(cyclic_events(users=20))).test
    some = test.sample(5, seed=1)
    assert len(some) == 5
    assert (np.diff(some.user) > 0).all()
    assert test.sample(100, seed=1) is test
    assert guesses(some).items() <= guesses(test).items()


# --- batches ------------------------------------------------------------------------------------------


def lengths_of(seed: int, count: int) -> IntArray:
    return np.random.default_rng(seed).integers(1, 200, count)


@given(st.integers(0, 300), st.integers(1, 17), st.integers(1, 5), st.integers(0, 99))
def test_every_sequence_comes_once(count: int, size: int, window: int, seed: int) -> None:
    found = list(batches(lengths_of(seed, count), size, np.random.default_rng(seed), window))
    assert sorted(int(i) for batch in found for i in batch) == list(range(count))
    assert len(found) == -(-count // size)
    assert all(1 <= len(batch) <= size for batch in found)


def test_lengths_in_a_batch_are_similar() -> None:
    lengths = lengths_of(0, 2_000)
    spread = [int(np.ptp(lengths[b])) for b in batches(lengths, 50, np.random.default_rng(0))]
    assert float(np.mean(spread)) < 30  # random batches of 50 would span nearly all of 1..199


def test_the_seed_decides_the_batches() -> None:
    lengths = lengths_of(0, 500)
    first, again, other = ([b.tolist() for b in batches(lengths, 16, np.random.default_rng(s))] for s in (1, 1, 2))
    assert first == again
    assert first != other


def test_batches_do_not_come_from_short_to_long() -> None:
    lengths = lengths_of(0, 2_000)
    means = [float(lengths[b].mean()) for b in batches(lengths, 50, np.random.default_rng(0))]
    assert means != sorted(means)
