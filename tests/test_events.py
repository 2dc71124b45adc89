"""`history_of`: the same history from the same events, whoever asks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from shared import events as module
from shared.events import Events, HistoryPolicy, by_user_and_time, history_of, is_id, item_key, item_keys

KINDS = ("view", "rating", "scroll")
NAN = float("nan")
GOLDEN_KEYS = {
    "1": 8_518_482_412_311_870_710,
    "318": 5_825_075_211_958_604_784,
    "sku:42": 5_927_533_975_546_270_186,
    "a" * 256: 10_061_707_918_790_537_336,
}


@dataclass(frozen=True)
class Row:
    user: int
    item: int
    kind: str = "view"
    value: float = NAN
    timestamp: int = 0


def events_of(rows: Sequence[Row]) -> Events:
    return Events(
        user=np.array([r.user for r in rows], np.int64),
        item=np.array([r.item for r in rows], np.int64),
        kind=np.array([KINDS.index(r.kind) for r in rows], np.int64),
        kinds=KINDS,
        value=np.array([r.value for r in rows], np.float64),
        timestamp=np.array([r.timestamp for r in rows], np.int64),
    )


def sequences(rows: Sequence[Row], policy: HistoryPolicy | None = None) -> dict[int, list[int]]:
    """The sequence of each user that has one."""
    found = history_of(events_of(rows), policy or HistoryPolicy())
    users = sorted({r.user for r in rows})
    every = {u: found.item[(found.user == u) & found.feeds].tolist() for u in users}
    return {u: sequence for u, sequence in every.items() if sequence}


def seen(rows: Sequence[Row], policy: HistoryPolicy | None = None) -> set[tuple[int, int]]:
    found = history_of(events_of(rows), policy or HistoryPolicy())
    return set(zip(found.user[found.seen].tolist(), found.item[found.seen].tolist(), strict=True))


def test_order_is_time_then_arrival() -> None:
    rows = [Row(1, 9, timestamp=5), Row(1, 3, timestamp=2), Row(1, 8, timestamp=5), Row(1, 7, timestamp=5)]
    assert sequences(rows) == {1: [3, 9, 8, 7]}


def test_users_are_kept_apart_and_rows_point_back_to_the_events() -> None:
    rows = [Row(2, 5, timestamp=1), Row(1, 6, timestamp=9), Row(2, 4, timestamp=0)]
    found = history_of(events_of(rows), HistoryPolicy())
    assert found.user.tolist() == [1, 2, 2]
    assert found.order.tolist() == [1, 2, 0]
    assert found.timestamp.tolist() == [9, 0, 1]


def test_a_type_that_the_policy_does_not_name_touches_nothing() -> None:
    rows = [Row(1, 7), Row(1, 8, "scroll"), Row(1, 9)]
    assert sequences(rows) == {1: [7, 9]}
    assert seen(rows) == {(1, 7), (1, 9)}


def test_types_may_feed_without_marking_seen_and_the_other_way_round() -> None:
    policy = HistoryPolicy(sequence_types=("view",), seen_types=("rating",))
    rows = [Row(1, 7, "view"), Row(1, 8, "rating"), Row(1, 9, "scroll")]
    assert sequences(rows, policy) == {1: [7]}
    assert seen(rows, policy) == {(1, 8)}


def test_minimum_value_lets_events_without_a_value_pass_and_leaves_seen_alone() -> None:
    policy = HistoryPolicy(minimum_value=4)
    rows = [Row(1, 5, value=3.9), Row(1, 6, value=4), Row(1, 7, value=NAN), Row(1, 8, value=5)]
    assert sequences(rows, policy) == {1: [6, 7, 8]}
    assert seen(rows, policy) == {(1, 5), (1, 6), (1, 7), (1, 8)}


def test_repeats_collapse_across_types_that_feed_and_not_across_users() -> None:
    policy = HistoryPolicy(collapse_repeats=True)
    rows = [Row(1, 7, "view"), Row(1, 7, "rating"), Row(1, 8), Row(1, 7), Row(2, 7)]
    assert sequences(rows, policy) == {1: [7, 8, 7], 2: [7]}


def test_events_that_do_not_feed_do_not_part_a_repeat() -> None:
    policy = HistoryPolicy(collapse_repeats=True, minimum_value=4)
    rows = [Row(1, 7), Row(1, 8, "scroll"), Row(1, 9, value=1), Row(1, 7)]
    assert sequences(rows, policy) == {1: [7]}


def test_the_example_of_the_docstring() -> None:
    rows = [Row(1, 7), Row(1, 8), Row(1, 8), Row(1, 9, "scroll")]
    found = history_of(events_of(rows), HistoryPolicy(collapse_repeats=True))
    assert found.feeds.tolist() == [True, True, False, False]
    assert found.seen.tolist() == [True, True, True, False]


def test_no_events_make_no_history() -> None:
    found = history_of(events_of([]), HistoryPolicy(minimum_value=1, collapse_repeats=True))
    assert len(found.order) == len(found.feeds) == len(found.seen) == 0


def oracle(rows: Sequence[Row], policy: HistoryPolicy) -> dict[int, list[int]]:
    """`history_of` in plain Python, event by event."""
    found: dict[int, list[int]] = {}
    for row in sorted(rows, key=lambda r: r.timestamp):  # stable
        if not policy.feeds(row.kind, None if np.isnan(row.value) else row.value):
            continue
        sequence = found.setdefault(row.user, [])
        if not (policy.collapse_repeats and sequence and sequence[-1] == row.item):
            sequence.append(row.item)
    return found


some_kinds = st.lists(st.sampled_from(KINDS), unique=True).map(tuple)
some_rows = st.builds(
    Row,
    user=st.integers(1, 3),
    item=st.integers(1, 4),
    kind=st.sampled_from(KINDS),
    value=st.sampled_from([NAN, 1.0, 3.0, 5.0]),
    timestamp=st.integers(-2, 2),
)
some_policies = st.builds(
    HistoryPolicy,
    sequence_types=some_kinds,
    seen_types=some_kinds,
    minimum_value=st.sampled_from([None, 0.0, 3.0, 9.0]),
    collapse_repeats=st.booleans(),
)


@given(st.lists(some_rows, max_size=30), some_policies)
def test_equals_plain_python(rows: list[Row], policy: HistoryPolicy) -> None:
    assert sequences(rows, policy) == oracle(rows, policy)
    assert seen(rows, policy) == {(r.user, r.item) for r in rows if policy.marks_seen(r.kind)}


def test_policies_with_other_rules_have_other_fingerprints() -> None:
    policies = [HistoryPolicy(), HistoryPolicy(minimum_value=4), HistoryPolicy(seen_types=()),
                HistoryPolicy(collapse_repeats=True)]  # fmt: skip
    assert len({p.fingerprint() for p in policies}) == len(policies)
    assert HistoryPolicy().fingerprint() == HistoryPolicy().fingerprint()


@pytest.mark.parametrize(
    "wrong", [{"minimum_value": NAN}, {"minimum_value": float("inf")}, {"sequence_type": ["view"]}]
)
def test_a_policy_that_cannot_be_meant_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        HistoryPolicy.model_validate(wrong)


def test_item_keys_are_a_storage_format() -> None:
    """Caches and running services hold these numbers: a change loses every cached history."""
    assert {item_id: item_key(item_id) for item_id in GOLDEN_KEYS} == GOLDEN_KEYS
    assert item_keys(list(GOLDEN_KEYS)).tolist() == list(GOLDEN_KEYS.values())


@pytest.mark.parametrize("text", ["1", "a.b", "user@example.org", "a:b|c~d=e+f-g_h", "x" * 256, "..."])
def test_ids_that_can_stand_in_a_url(text: str) -> None:
    assert is_id(text)


@pytest.mark.parametrize("text", ["", ".", "..", "a b", "a/b", "a\n", "é", "x" * 257, "a%20"])
def test_texts_that_are_no_ids(text: str) -> None:
    assert not is_id(text)


@given(
    st.lists(st.tuples(st.integers(-3, 5), st.integers(-3, 3)), min_size=1, max_size=60),
    st.sampled_from([1, 1_000_000, 1_500_000, 2**40]),
    st.sampled_from([0, 2**60]),
)
def test_many_events_are_sorted_as_few_are(pairs: list[tuple[int, int]], unit: int, since: int) -> None:
    """Ties keep the order of arrival, whether user and time fit into one number or not."""
    user = np.array([u for u, _ in pairs], np.int64) * (1 if since == 0 else 2**40)
    time = np.array([t for _, t in pairs], np.int64) * unit + since
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MANY", 0)
        found = by_user_and_time(user, time)
    assert found.tolist() == sorted(range(len(pairs)), key=lambda i: (user[i], time[i]))
