"""Held-out events: nothing after the cut is trained on, whoever did it, and histories are cut by position."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.times import DAY, END
from tests.trained import START, config, dataset
from trainer.config import ConfigError, EvaluationConfig, RunConfig, validate
from trainer.dataset import Cases, Dataset, DatasetError, leave_one_out
from trainer.splits import Targets, cut_time, split_of, temporal


def on_days(user: str, **items: int) -> list[tuple[str, str, int]]:
    """Events of one user: item=day."""
    return [(user, item, START + day * DAY) for item, day in items.items()]


def three_users() -> Dataset:
    """The example in the module's docstring; 8 of 12 events lie on days 1 to 8."""
    return dataset(
        on_days("a", a1=1, a2=3, a3=5, a4=8, a5=9, a6=12)
        + on_days("b", b1=2, b2=4, b3=6)
        + on_days("c", c1=10, c2=11, c3=12)
    )


QUANTILE = 7 / 11  # of twelve events: the seventh, on day 8, is the last in training


def guesses(cases: Cases) -> list[tuple[str, list[str], str]]:
    """(user, history, target) by ids."""
    names = ["", *(i.item_id for i in cases.dataset.catalogue.items)]
    rows = zip(cases.user, cases.histories(), cases.target, strict=True)
    return [(cases.dataset.users[u], [names[i] for i in h], names[t]) for u, h, t in rows]


def trained(data: Dataset, split: Any) -> list[list[str]]:
    names = ["", *(i.item_id for i in data.catalogue.items)]
    s = split.sequences
    return [[names[i] for i in s.item[a:b]] for a, b in zip(s.starts, s.stops, strict=True)]


def test_the_cut_is_the_time_up_to_which_the_share_lies() -> None:
    assert cut_time(three_users(), 0.5) == START + 6 * DAY
    assert cut_time(three_users(), QUANTILE) in (START + 8 * DAY, START + 9 * DAY)


def test_the_example_of_the_docstring() -> None:
    data = three_users()
    split = temporal(data, 0.6, "last")
    assert cut_time(data, 0.6) == START + 8 * DAY
    assert trained(data, split) == [["a1", "a2", "a3"], ["b1", "b2"]]
    assert guesses(split.validation) == [("a", ["a1", "a2", "a3"], "a4"), ("b", ["b1", "b2"], "b3")]
    assert guesses(split.test) == [("a", ["a1", "a2", "a3", "a4", "a5"], "a6"), ("c", ["c1", "c2"], "c3")]
    assert split.protocol == "temporal split after 2020-01-09T00:00:00Z (quantile 0.6 of events), last targets"


def test_successive_targets_are_all_that_have_a_history() -> None:
    test = temporal(three_users(), 0.6, "successive").test
    assert [(user, target) for user, _, target in guesses(test)] == [
        ("a", "a5"), ("a", "a6"), ("c", "c2"), ("c", "c3"),
    ]  # fmt: skip
    assert guesses(test)[1][1] == ["a1", "a2", "a3", "a4", "a5"]


Rows = list[tuple[int, int, int]]


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 8), st.integers(0, 30)), min_size=4, max_size=60),
    st.floats(0.1, 0.9),
    st.sampled_from(["last", "successive"]),
)
def test_nothing_after_the_cut_is_trained_on(rows: Rows, quantile: float, targets: Targets) -> None:
    data = dataset([(f"u{u}", f"i{i}", START + t * DAY) for u, i, t in rows])
    try:
        split = temporal(data, quantile, targets)
    except DatasetError as error:
        assert "lower evaluation.quantile" in str(error)  # noqa: PT017
        return
    cut = cut_time(data, quantile)
    late = data.timestamp > cut
    assert (split.test.timestamp > cut).all()
    assert (split.validation.timestamp <= cut).all()
    assert len(split.sequences.item) + len(split.validation) == int((~late).sum())
    assert int(split.popularity.popular(END).sum()) == len(split.sequences.item)
    known = set(split.sequences.item.tolist())
    begun = split.rule.available_from[1:]
    assert {int(i) + 1 for i in np.flatnonzero(begun <= END - 1)} == known
    assert (begun[begun < END] <= cut).all()
    for cases in (split.validation, split.test):
        for user, row, history in zip(cases.user, cases.row, cases.histories(), strict=True):
            assert len(history) == row - data.offsets[user] >= 1
    if targets == "last":
        assert (np.diff(split.test.user) > 0).all()
        assert all(row == data.offsets[u + 1] - 1 for u, row in zip(split.test.user, split.test.row, strict=True))


def test_events_of_one_second_stay_on_one_side_of_the_cut() -> None:
    data = dataset([*on_days("u", a=1, b=2, c=2, d=2, e=2), *on_days("v", a=1, b=2, f=3)])
    split = temporal(data, 0.5, "last")
    assert guesses(split.test) == [("v", ["a", "b"], "f")]


def test_events_that_do_not_feed_are_cut_at_the_same_time() -> None:
    """A low rating marks its item as seen and no more; one after the target is no part of anything."""
    values = [("a", 1, 5.0), ("x", 2, 1.0), ("b", 3, 5.0), ("c", 8, 5.0), ("y", 9, 1.0)]
    rows = [("u", i, START + d * DAY, "rating", v) for i, d, v in values]
    rows += [("v", i, START + d * DAY, "rating", 5.0) for i, d in (("a", 1), ("b", 2), ("a", 3))]
    split = temporal(dataset(rows, history={"minimum_value": 4}), 0.7, "last")
    assert guesses(split.test) == [("u", ["a", "b"], "c")]
    assert len(split.test.seen()[0]) == 3


# --- what exists, by what the split knows -------------------------------------------------------------


def existing(split: Any, data: Dataset, day: int) -> set[str]:
    at = START + day * DAY
    return {i.item_id for n, i in enumerate(data.catalogue.items, 1) if split.rule.allowed(np.array([n]), at)[0]}


def test_a_target_does_not_vouch_for_its_own_item() -> None:
    data = three_users()
    split = temporal(data, 0.6, "last")
    assert existing(split, data, 30) == {"a1", "a2", "a3", "b1", "b2"}


def test_declared_dates_hold_where_no_training_event_is_earlier() -> None:
    events = on_days("u", a=1, b=4, c=5) + on_days("v", a=1, b=2, c=3, late=9)
    items = [{"item_id": "late", "available_from": START + 7 * DAY}, {"item_id": "c", "available_from": START + DAY},
             {"item_id": "b", "available_from": START + 6 * DAY}]  # fmt: skip
    data = dataset(events, items)
    split = temporal(data, 0.7, "last")
    assert [existing(split, data, day) for day in (0, 1, 2, 6, 7)] == [
        set(), {"a", "c"}, {"a", "b", "c"}, {"a", "b", "c"}, {"a", "b", "c", "late"},
    ]  # fmt: skip


def test_leave_one_out_knows_first_training_events_only() -> None:
    data = dataset(on_days("u", a=1, b=2, x=3, y=4) + on_days("v", a=1, b=2, c=5, x=6, z=7, w=8))
    split = leave_one_out(data)
    assert existing(split, data, 5) == {"a", "b", "c"}
    assert existing(split, data, 6) == {"a", "b", "c", "x"}  # u's own event with x was held out
    assert existing(split, data, 30) == {"a", "b", "c", "x"}


def test_with_the_policy_always_undeclared_items_exist_before_their_events() -> None:
    data = dataset(on_days("u", a=1, b=2, c=3), availability="always")
    assert existing(leave_one_out(data), data, 0) == {"a", "b", "c"}


def test_withdrawn_and_ended_items_stay_so() -> None:
    items = [{"item_id": "a", "withdrawn": True}, {"item_id": "b", "available_until": START + 5 * DAY}]
    data = dataset(on_days("u", a=1, b=2, c=3, d=4), items)
    split = leave_one_out(data)
    assert [existing(split, data, day) for day in (4, 5)] == [{"b"}, set()]


# --- settings -----------------------------------------------------------------------------------------


def settings(**evaluation: Any) -> RunConfig:
    return validate(RunConfig, {**config().model_dump(), "evaluation": evaluation}, "a test")


def test_the_settings_choose_the_split() -> None:
    data = three_users()
    assert split_of(data, EvaluationConfig()).protocol == "leave-one-out"
    chosen = settings(split="temporal", quantile=0.6, targets="successive").evaluation
    assert guesses(split_of(data, chosen).test) == guesses(temporal(data, 0.6, "successive").test)


def test_data_without_times_has_no_temporal_split() -> None:
    data = dataset(on_days("u", a=1, b=2, c=3), has_times=False)
    with pytest.raises(DatasetError, match=r"needs times.*data\.source\.columns\.time.*leave_one_out"):
        split_of(data, settings(split="temporal").evaluation)


def test_a_cut_with_nothing_behind_it_is_refused() -> None:
    data = dataset([("u", i, START) for i in "abcd"])
    with pytest.raises(DatasetError, match=r"no event lies after 2020-01-01.*lower evaluation\.quantile"):
        temporal(data, 0.9, "last")


def test_a_cut_among_events_without_a_clock_is_refused() -> None:
    """A log into which a file without times was loaded, and some events with times came after."""
    data = dataset([*(("u", i, n) for n, i in enumerate("abcdef")), *(("u", i, START + n) for n, i in enumerate("gh"))])
    with pytest.raises(DatasetError, match=r"no time: raise evaluation\.quantile"):
        temporal(data, 0.5, "last")
    assert guesses(temporal(data, 0.9, "last").test) == [("u", list("abcdefg"), "h")]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"split": "random"}, "evaluation.split"),
        ({"quantile": 1.0}, "evaluation.quantile"),
        ({"targets": "first"}, "evaluation.targets"),
        ({"cutoffs": (5, 20)}, "10 among them"),
        ({"cutoffs": (0, 10)}, "from 1 to 1000"),
        ({"splitt": "temporal"}, "did you mean evaluation.split?"),
    ],
)
def test_wrong_settings_are_named(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        settings(**wrong)
    assert said in str(caught.value)


def test_cutoffs_are_put_in_order() -> None:
    assert settings(cutoffs=(50, 10, 10, 1)).evaluation.cutoffs == (1, 10, 50)
