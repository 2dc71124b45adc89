"""What a sweep trains."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from tests.trained import config, cyclic_events, dataset, unchanged, world
from trainer.config import ConfigError
from trainer.errors import InterruptedTrainingError
from trainer.sweep import Trial, plan, sweep, sweep_table
from trainer.train import SequenceModel


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
    text = sweep_table([Trial(2, ("a=1",), "f2", 0.5, 7), Trial(1, ("a=2",), "f1", note="the loss is nan")])
    assert [line.split() for line in text.splitlines()[1:]] == [
        ["2", "0.5000", "7", "f2", "a=1"],
        ["1", "-", "0", "f1", "a=2", "the", "loss", "is", "nan"],
    ]


def small(folder: Path) -> str:
    """A preset that trains in a second."""
    file = folder / "small.yaml"
    values = config(training={"epochs": 1}).model_dump(mode="json", exclude_unset=True)
    file.write_text(json.dumps(values))  # which is YAML
    return str(file)


def test_a_combination_that_cannot_be_trained_ends_no_sweep(tmp_path: Path) -> None:
    found = world("sasrec")
    words = [f"training.init_from={found.bundle.path}", "model.hidden_units=16,32"]
    good, bad = sweep(small(tmp_path), words, dataset(cyclic_events(users=20)), tmp_path / "runs", None, print)
    assert (good.overrides, bad.overrides) == (("model.hidden_units=32",), ("model.hidden_units=16",))
    assert good.score is not None
    assert "model.hidden_units=32 (now 16)" in bad.note
    words = [f"training.init_from={tmp_path / 'gone'},{found.bundle.path}", "model.hidden_units=32"]
    good, bad = sweep(small(tmp_path), words, dataset(cyclic_events(users=20)), tmp_path / "other", None, print)
    assert good.score is not None
    assert "gone" in bad.note


def test_a_wider_sweep_takes_over_what_was_trained_and_loses_nothing(tmp_path: Path) -> None:
    data, preset, said = dataset(cyclic_events(users=20)), small(tmp_path), list[str]()
    first = sweep(preset, ["training.lr=0.01,0.02"], data, tmp_path / "runs", None, print)
    with unchanged(tmp_path / "runs" / first[0].folder), unchanged(tmp_path / "runs" / first[1].folder):
        wider = sweep(preset, ["training.lr=0.005,0.01,0.02"], data, tmp_path / "runs", None, said.append)
    assert {t.folder for t in first} < {t.folder for t in wider}
    assert len([line for line in said if "trained already" in line]) == 2


def test_an_interrupted_sweep_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(SequenceModel, "on_train_epoch_start", stop)
    with pytest.raises(InterruptedTrainingError, match=r"^interrupted; give the same command again, which goes on \("):
        sweep(small(tmp_path), ["training.lr=0.01,0.02"], dataset(cyclic_events(users=60)), tmp_path / "r", None, print)
