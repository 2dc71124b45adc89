"""What a sweep trains."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.trained import cyclic_events, dataset
from trainer.config import ConfigError
from trainer.sweep import Trial, plan, sweep, sweep_table


def test_every_combination() -> None:
    assert plan(["training.lr=1e-3,3e-4", "model.blocks=2, 3"], None) == [
        ("training.lr=1e-3", "model.blocks=2"),
        ("training.lr=1e-3", "model.blocks=3"),
        ("training.lr=3e-4", "model.blocks=2"),
        ("training.lr=3e-4", "model.blocks=3"),
    ]
    assert plan([], None) == [()]


def test_some_of_them_by_a_seed() -> None:
    words = ["training.seed=1,2,3,4,5,6,7,8", "model.blocks=1,2"]
    assert plan(words, 5) == plan(words, 5)
    assert len(set(plan(words, 5))) == 5
    assert set(plan(words, 5)) < set(plan(words, None))
    assert plan(words, 5, seed=1) != plan(words, 5)
    assert plan(words, 99) == plan(words, None)


def test_commas_inside_of_lists_divide_nothing() -> None:
    assert plan(["training.x=[1,2],[3,4]"], None) == [("training.x=[1,2]",), ("training.x=[3,4]",)]


def test_the_data_stays_the_same() -> None:
    with pytest.raises(ConfigError, match="over settings of model and training"):
        plan(["evaluation.split=temporal,leave_one_out"], None)


def test_a_combination_that_cannot_be_is_said_before_the_first_training(tmp_path: Path) -> None:
    words = ["model.heads=1,2,3", "model.hidden_units=32"]
    with pytest.raises(ConfigError, match="heads"):
        sweep("sasrec-quick", words, dataset(cyclic_events(users=5)), tmp_path / "runs", None, print)
    assert not (tmp_path / "runs").exists()


def test_a_trial_that_failed_says_why() -> None:
    text = sweep_table([Trial(2, ("a=1",), 0.5, 7, ""), Trial(1, ("a=2",), None, 0, "the loss is nan")])
    assert [line.split() for line in text.splitlines()[1:]] == [
        ["2", "0.5000", "7", "a=1"],
        ["1", "-", "0", "a=2", "the", "loss", "is", "nan"],
    ]
