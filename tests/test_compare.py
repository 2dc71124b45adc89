"""Saved ranks, and what two runs must have in common to be compared."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from shared.events import IntArray
from tests.trained import cyclic_events, dataset
from trainer.compare import CaseRanks, CompareError, compare, comparison_table, load_ranks
from trainer.dataset import leave_one_out
from trainer.metrics import MISSED
from trainer.splits import temporal

CASES = leave_one_out(dataset(cyclic_events(users=60))).test


def ranks(rank: IntArray | int, protocol: str = "leave-one-out") -> CaseRanks:
    return CaseRanks.of(CASES, np.broadcast_to(np.asarray(rank, np.int64), (len(CASES),)), protocol)


def test_ranks_survive_the_file(tmp_path: Path) -> None:
    saved = ranks(np.arange(1, len(CASES) + 1))
    (tmp_path / "runs/a/split").mkdir(parents=True)
    saved.save(tmp_path / "runs/a/split/ranks.npz")
    for found in (load_ranks(tmp_path / "runs", "a"), load_ranks(Path("elsewhere"), str(tmp_path / "runs/a"))):
        assert found.rank.tolist() == saved.rank.tolist()
        assert found.user.tolist() == [CASES.dataset.users[u] for u in CASES.user]
        assert found.item.tolist() == [CASES.dataset.catalogue[int(t)].item_id for t in CASES.target]
        assert found.place.tolist() == [len(h) for h in CASES.histories()]
        assert found.protocol == saved.protocol


def test_a_run_without_ranks_names_the_command_that_makes_them(tmp_path: Path) -> None:
    with pytest.raises(CompareError, match="python -m trainer evaluate"):
        load_ranks(tmp_path, "nobody")
    (tmp_path / "bad/split").mkdir(parents=True)
    (tmp_path / "bad/split/ranks.npz").write_bytes(b"no archive")
    with pytest.raises(CompareError, match="cannot be read"):
        load_ranks(tmp_path, "bad")


def test_a_comparison_by_hand() -> None:
    """Run A misses every target, run B has it in second place."""
    found = compare(ranks(MISSED), ranks(2))
    assert found["hr@10"].difference == 1.0
    assert found["ndcg@10"].a == 0
    assert found["ndcg@10"].b == pytest.approx(1 / np.log2(3))
    assert found["hr@10"].users == 60
    assert found["hr@10"].p < 0.001


def test_cases_are_paired_by_user_and_place_not_by_order() -> None:
    a = ranks(np.random.default_rng(0).integers(1, 30, len(CASES)))
    order = np.random.default_rng(1).permutation(len(CASES))
    b = CaseRanks(a.user[order], a.item[order], a.place[order], a.rank[order], a.protocol)
    found = compare(a, b)
    assert all((p.difference, p.low, p.high, p.p) == (0, 0, 0, 1) for p in found.values())


def test_users_with_many_targets_count_once() -> None:
    cases = temporal(dataset(cyclic_events(users=60)), 0.5, "successive").test
    assert len(cases) > len(np.unique(cases.user))
    one = CaseRanks.of(cases, np.ones(len(cases), np.int64), "x")
    assert compare(one, one)["hr@5"].users == len(np.unique(cases.user))


def test_runs_that_ranked_other_items_are_not_compared(tmp_path: Path) -> None:
    """The same users and targets, of a data set with and without a list of items that nobody has used yet."""
    rows = cyclic_events(users=60)
    for other, said in (
        (dataset(rows, [{"item_id": "new"}]), r"ranked 30 items \(\w+\) and 31 items"),
        (dataset(rows, history={"seen_types": []}), "left out as seen: events of .*view.* and none"),
    ):
        cases = leave_one_out(other).test
        with pytest.raises(CompareError, match=said):
            compare(ranks(1), CaseRanks.of(cases, np.ones(len(cases), np.int64), "leave-one-out"))
    (tmp_path / "a/split").mkdir(parents=True)
    old = ranks(1)
    np.savez(tmp_path / "a/split/ranks.npz", user=old.user, item=old.item, place=old.place, rank=old.rank,
             protocol=np.array(old.protocol))  # fmt: skip
    assert compare(load_ranks(tmp_path, "a"), old)["hr@10"].difference == 0  # it does not say, so it is believed


def test_runs_that_were_asked_something_else_are_not_compared() -> None:
    a = ranks(1)
    with pytest.raises(CompareError, match="measured differently: 'leave-one-out' and 'temporal'"):
        compare(a, ranks(1, "temporal"))
    fewer = CaseRanks(a.user[1:], a.item[1:], a.place[1:], a.rank[1:], a.protocol)
    other = replace(a, item=np.roll(a.item, 1))
    for b in (fewer, other):
        with pytest.raises(CompareError, match="different targets"):
            compare(a, b)


def test_the_table_shows_difference_interval_and_p() -> None:
    lines = comparison_table(compare(ranks(MISSED), ranks(2))).splitlines()
    assert lines[0].split() == ["A", "B", "B", "-", "A", "95", "%", "interval", "p"]
    assert lines[2].split() == ["hr@10", "0.0000", "1.0000", "+1.0000", "[+1.0000,", "+1.0000]", "0.0001"]
    assert lines[-1].startswith("60 users")
