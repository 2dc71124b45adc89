"""The loop: the same seed gives the same weights, an interruption costs nothing, the best epoch is kept."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from tests.trained import ITEMS, KINDS, Kind, config, cyclic_events, dataset, unchanged
from trainer import pipeline
from trainer import train as module
from trainer.config import ConfigError, RunConfig
from trainer.config import settings as every_setting
from trainer.curves import read_epochs
from trainer.dataset import Sequences, Split, everything, leave_one_out
from trainer.errors import InterruptedTrainingError, TrainingError
from trainer.objectives import mask_items
from trainer.train import Batches, Fitted, Rows, SequenceModel, fit, load_encoder, lr_share
from trainer.transformer import Encoder

SPLIT = leave_one_out(dataset(cyclic_events(users=60)))
Scores = Callable[..., dict[str, float]]
LOG = SequenceModel.log


def train(settings: RunConfig, folder: Path, *, validated: bool = True, split: Split = SPLIT, **options: Any) -> Fitted:
    return fit(settings, ITEMS, split.sequences, split.validation if validated else None, folder, **options)


def weights(encoder: Encoder) -> dict[str, list[float]]:
    return {name: value.flatten().tolist() for name, value in encoder.state_dict().items()}


def scripted(*scores: float) -> Scores:
    """Validation scores as told, one an epoch, instead of measured ones."""
    left = iter(scores)
    return lambda *_: {"ndcg@10": next(left), "hr@10": 0.0, "mrr": 0.0}


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_decides_the_weights(tmp_path: Path, kind: Kind) -> None:
    first, again, other = (
        train(config(kind, model={"dropout": 0.2}, training={"epochs": 2, "seed": seed}), tmp_path / name)
        for name, seed in (("first", 1), ("again", 1), ("other", 2))
    )
    assert weights(first.encoder) == weights(again.encoder)
    assert weights(first.encoder) != weights(other.encoder)


@pytest.mark.parametrize("validated", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_training_goes_on_to_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Kind, validated: bool
) -> None:
    settings = config(kind, model={"dropout": 0.2}, training={"epochs": 4})
    whole = train(settings, tmp_path / "whole", validated=validated)

    start = SequenceModel.on_train_epoch_start

    def interrupt(model: SequenceModel) -> None:
        if model.current_epoch == 2:
            raise KeyboardInterrupt
        start(model)

    with monkeypatch.context() as patch:
        patch.setattr(SequenceModel, "on_train_epoch_start", interrupt)
        with pytest.raises(TrainingError, match="--resume"):
            train(settings, tmp_path / "parts", validated=validated)
    seen: list[int] = []

    def note(model: SequenceModel) -> None:
        seen.append(model.current_epoch)
        start(model)

    monkeypatch.setattr(SequenceModel, "on_train_epoch_start", note)
    resumed = train(settings, tmp_path / "parts", validated=validated, resume=True)

    assert seen == [2, 3]
    assert resumed.epochs == whole.epochs
    assert weights(resumed.encoder) == weights(whole.encoder)
    last, wanted = (torch.load(tmp_path / n / "last.ckpt", weights_only=False) for n in ("parts", "whole"))
    assert last["epoch"] == wanted["epoch"] == 3
    assert all(torch.equal(last["state_dict"][k], v) for k, v in wanted["state_dict"].items())


@pytest.mark.parametrize(
    ("kind", "number", "validated"), [("sasrec", signal.SIGTERM, True), ("bert4rec", signal.SIGINT, False)]
)
@pytest.mark.parametrize(("epoch", "step"), [(1, 0), (1, 6), (1, 14), (2, 14)])  # of 3, and of 15, which ends an epoch
def test_a_training_that_a_signal_stops_within_an_epoch_goes_on_to_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Kind, number: int, epoch: int, step: int, validated: bool
) -> None:
    settings = config(kind, model={"dropout": 0.2}, training={"epochs": 3, "batch_size": 4, "length_window": 1})
    whole = train(settings, tmp_path / "whole", validated=validated)
    made, seen = SequenceModel.training_step, list[tuple[int, int]]()

    def stopped(model: SequenceModel, batch: Rows, index: int) -> torch.Tensor:
        if (model.current_epoch, index) == (epoch, step):
            signal.raise_signal(number)
        return noted(model, batch, index)

    def noted(model: SequenceModel, batch: Rows, index: int) -> torch.Tensor:
        seen.append((model.current_epoch, index))
        return made(model, batch, index)

    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(SequenceModel, "training_step", stopped)
    kept = f"the end of epoch {epoch} is in" if step == 14 else f"step {step + 1} of 15 in epoch {epoch} is in"
    with pytest.raises(InterruptedTrainingError, match=rf"--resume \({kept} .*last\.ckpt\)"):
        train(settings, tmp_path / "parts", validated=validated)
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    monkeypatch.setattr(SequenceModel, "training_step", noted)
    resumed = train(settings, tmp_path / "parts", validated=validated, resume=True)

    assert seen == [(e, index) for e in range(3) for index in range(15)]
    assert (resumed.epochs, resumed.best) == (whole.epochs, whole.best)
    assert weights(resumed.encoder) == weights(whole.encoder)
    rows, wanted = (read_epochs(tmp_path / name / "epochs.csv") for name in ("parts", "whole"))
    for row, right in zip(rows, wanted, strict=True):
        assert {**row, "seconds": 0} == pytest.approx({**right, "seconds": 0})


@pytest.mark.parametrize("before", [signal.default_int_handler, signal.SIG_IGN], ids=["terminal", "background"])
def test_a_second_ctrl_c_stops_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: Any) -> None:
    def impatient(model: SequenceModel, _batch: Rows, _index: int) -> torch.Tensor:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("the step went on")

    monkeypatch.setattr(SequenceModel, "training_step", impatient)
    handler = signal.signal(signal.SIGINT, before)
    try:
        with pytest.raises(InterruptedTrainingError, match="its first epoch was not over"):
            train(config(), tmp_path)
    finally:
        signal.signal(signal.SIGINT, handler)


def test_resuming_a_finished_training_trains_no_more(tmp_path: Path) -> None:
    settings = config(training={"epochs": 2})
    first = train(settings, tmp_path)
    again = train(settings, tmp_path, resume=True)
    assert (again.epochs, again.best) == (first.epochs, first.best)
    assert weights(again.encoder) == weights(first.encoder)


def test_resuming_what_patience_ended_trains_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "evaluate_torch", scripted(0.1, 0.5, 0.4, 0.4))
    settings, data, said = config(training={"epochs": 9, "patience": 2}), dataset(cyclic_events(users=60)), list[str]()
    first = pipeline.train(settings, data, "split", tmp_path)
    last = (tmp_path / "sasrec" / "split" / "last.ckpt").stat().st_mtime_ns
    again = pipeline.train(settings, data, "split", tmp_path, resume=True, say=said.append)
    assert (again.epochs, again.best) == (first.epochs, first.best)
    assert first.epochs == 2
    assert weights(again.encoder) == weights(first.encoder)
    assert (tmp_path / "sasrec" / "split" / "last.ckpt").stat().st_mtime_ns == last
    assert said == [f"sasrec: {tmp_path / 'sasrec' / 'split'} is trained already"]


def test_the_best_epoch_is_known_after_the_folder_was_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "evaluate_torch", scripted(0.1, 0.5, 0.2, 0.3))
    first = train(config(training={"epochs": 2}), tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "there")
    moved = train(config(training={"epochs": 4}), tmp_path / "there", resume=True)
    assert moved.epochs == 2
    assert moved.best == pytest.approx(0.5)
    assert moved.checkpoint == tmp_path / "there" / first.checkpoint.name
    assert weights(moved.encoder) == weights(first.encoder)


def test_an_unfinished_training_is_not_thrown_away_by_a_resume_with_other_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(model: SequenceModel) -> None:
        if model.current_epoch == 1:
            raise KeyboardInterrupt

    data, settings = dataset(cyclic_events(users=20)), config(training={"epochs": 2})
    with monkeypatch.context() as patch:
        patch.setattr(SequenceModel, "on_train_epoch_start", interrupt)
        with pytest.raises(TrainingError, match="the last whole epoch is in"):
            pipeline.train(settings, data, "split", tmp_path)
    other = config(training={"epochs": 3, "threads": 2})
    with pytest.raises(ConfigError, match=r"an unfinished training, with training\.epochs=2 \(now 3\)\. Resume"):
        pipeline.train(other, data, "split", tmp_path, resume=True)
    with pytest.raises(ConfigError, match="other data"):
        pipeline.train(settings, dataset(cyclic_events(users=21)), "split", tmp_path, resume=True)
    threads = config(training={"epochs": 2, "threads": 2})  # the machine is no part of it
    assert pipeline.train(threads, data, "split", tmp_path, resume=True).epochs == 2


@pytest.mark.parametrize(
    "other",
    [{"epochs": 3, "lr": 0.02}, {"epochs": 1}, {"epochs": 3, "schedule": "cosine"}, {"epochs": 3, "patience": 1}],
    ids=str,
)
def test_a_finished_training_is_not_thrown_away_by_a_resume_with_other_settings(
    tmp_path: Path, other: dict[str, Any]
) -> None:
    data, folder = dataset(cyclic_events(users=20)), tmp_path / "sasrec" / "split"
    pipeline.train(config(training={"epochs": 2}), data, "split", tmp_path)
    said = r"a finished training, with .* Leave out --resume"
    with unchanged(folder), pytest.raises(ConfigError, match=said):
        pipeline.train(config(training=other), data, "split", tmp_path, resume=True)
    with unchanged(folder), pytest.raises(ConfigError, match=said):
        pipeline.train(config(training={"epochs": 2}), data, "split", tmp_path, epochs=1, resume=True)
    # Of other data it gives way, every night; and without --resume.
    newer = dataset(cyclic_events(users=21))
    assert pipeline.train(config(training={**other, "epochs": 1}), newer, "split", tmp_path, resume=True).epochs == 1
    assert pipeline.train(config(training=other), data, "split", tmp_path).epochs <= 3


@pytest.mark.parametrize("which", ["split", "all"])
def test_a_finished_training_goes_on_for_more_epochs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: Literal["split", "all"]
) -> None:
    data = dataset(cyclic_events(users=20))
    whole = pipeline.train(config(training={"epochs": 4}), data, which, tmp_path / "whole")
    seen: list[int] = []
    start = SequenceModel.on_train_epoch_start

    def note(model: SequenceModel) -> None:
        seen.append(model.current_epoch)
        start(model)

    monkeypatch.setattr(SequenceModel, "on_train_epoch_start", note)
    pipeline.train(config(training={"epochs": 2}), data, which, tmp_path / "parts")
    longer = config(training={"epochs": 4, "patience": 20})
    resumed = pipeline.train(longer, data, which, tmp_path / "parts", resume=True)
    assert seen == [0, 1, 2, 3]
    assert (resumed.epochs, resumed.best) == (whole.epochs, whole.best)
    assert weights(resumed.encoder) == weights(whole.encoder)


def test_a_longer_training_that_fails_at_once_leaves_the_finished_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, settings = dataset(cyclic_events(users=20)), config(training={"epochs": 1})
    pipeline.train(settings, data, "split", tmp_path)

    def fail(*_: object) -> None:
        raise MemoryError

    longer = config(training={"epochs": 2})
    with monkeypatch.context() as patch:
        patch.setattr(SequenceModel, "training_step", fail)
        with pytest.raises(MemoryError):
            pipeline.train(longer, data, "split", tmp_path, resume=True)
    assert pipeline.restore(tmp_path, "sasrec", "split")[1].epochs == 1
    assert pipeline.train(longer, data, "split", tmp_path, resume=True).checkpoint.is_file()


def test_another_file_of_the_same_data_is_no_other_training(tmp_path: Path) -> None:
    """Some name it by its date; and on some days nothing happens."""
    data, said = dataset(cyclic_events(users=20)), list[str]()
    pipeline.train(config(training={"epochs": 1}), data, "split", tmp_path)
    source = {"kind": "files", "events": "events-2.csv", "columns": {"user": "u", "item": "i"}}
    today = config(training={"epochs": 1}, data={"source": source})
    last = (tmp_path / "sasrec/split/last.ckpt").stat().st_mtime_ns
    pipeline.train(today, data, "split", tmp_path, resume=True)
    assert (tmp_path / "sasrec/split/last.ckpt").stat().st_mtime_ns == last
    pipeline.train(today, data, "all", tmp_path, say=said.append)
    assert said[0].startswith("sasrec: training 1 epochs, as validation chose in ")


def test_the_patience_of_a_training_is_known_to_whatever_version_goes_on_with_it() -> None:
    assert module._stopping(config()).state_key == EarlyStopping(module.MONITOR, mode="max").state_key


def test_what_patience_ended_goes_on_with_more_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "evaluate_torch", scripted(0.1, 0.5, 0.4, 0.4, 0.4, 0.6, 0.1, 0.1))
    data = dataset(cyclic_events(users=20))
    first = pipeline.train(config(training={"epochs": 8, "patience": 2}), data, "split", tmp_path)
    assert [first.epochs, first.best] == pytest.approx([2, 0.5])
    again = pipeline.train(config(training={"epochs": 8, "patience": 4}), data, "split", tmp_path, resume=True)
    assert [again.epochs, again.best] == pytest.approx([6, 0.6])


def test_a_signal_as_patience_ends_the_training_ends_it_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = scripted(0.1, 0.5, 0.4, 0.4, 0.9)
    asked: list[int] = []

    def stopped(*inputs: Any) -> dict[str, float]:
        asked.append(len(asked))
        if len(asked) == 4:
            signal.raise_signal(signal.SIGTERM)
        return scores(*inputs)

    monkeypatch.setattr(module, "evaluate_torch", stopped)
    settings = config(training={"epochs": 9, "patience": 2})
    with pytest.raises(InterruptedTrainingError, match="the end of epoch 3"):
        train(settings, tmp_path)
    found = train(settings, tmp_path, resume=True)
    assert [found.epochs, found.best] == pytest.approx([2, 0.5])
    assert len(asked) == 4


def test_a_kill_between_a_better_epoch_and_its_note_costs_no_more_than_that_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best file of before is gone then, and the newest state names it."""
    save = ModelCheckpoint._save_checkpoint

    def killed(saver: ModelCheckpoint, trainer: pl.Trainer, path: str) -> None:
        if path.endswith("last.ckpt") and trainer.current_epoch == 1:
            raise MemoryError
        save(saver, trainer, path)

    settings = config(training={"epochs": 3})
    with monkeypatch.context() as patch:
        patch.setattr(module, "evaluate_torch", scripted(0.3, 0.5))
        patch.setattr(ModelCheckpoint, "_save_checkpoint", killed)
        with pytest.raises(MemoryError):
            train(settings, tmp_path)
    monkeypatch.setattr(module, "evaluate_torch", scripted(0.29, 0.28))  # of another machine's rounding
    found = train(settings, tmp_path, resume=True)
    assert [found.epochs, found.best] == pytest.approx([2, 0.29])
    assert found.checkpoint.is_file()


def test_epochs_that_validation_chose_are_taken_from_the_same_settings_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, said = dataset(cyclic_events(users=20)), list[str]()
    with monkeypatch.context() as patch:
        patch.setattr(module, "evaluate_torch", scripted(0.5, 0.4, 0.3))
        pipeline.train(config(training={"epochs": 3}), data, "split", tmp_path)
    newer = dataset(cyclic_events(users=21))
    assert pipeline.train(config(training={"epochs": 3}), newer, "all", tmp_path, say=said.append).epochs == 1
    assert said.pop().startswith("sasrec: training 1 epochs, as validation chose in ")
    other = config(training={"epochs": 2, "lr": 0.02})
    pipeline.train(other, data, "all", tmp_path, say=said.append)
    assert torch.load(tmp_path / "sasrec" / "all" / "last.ckpt", weights_only=False)["epoch"] == 1
    assert said[0].endswith("had other settings; training 2 epochs, as is set")


def test_a_training_that_cannot_begin_replaces_no_run(tmp_path: Path) -> None:
    data = dataset(cyclic_events(users=20), has_times=False)
    pipeline.train(config(training={"epochs": 1}), data, "split", tmp_path)
    with unchanged(tmp_path), pytest.raises(TrainingError, match="time_bias needs times"):
        pipeline.train(config(model={"time_bias": "query"}), data, "split", tmp_path)


def test_a_device_that_is_not_there_is_said_before_anything_is_deleted(tmp_path: Path) -> None:
    (tmp_path / "sasrec" / "split").mkdir(parents=True)
    kept = tmp_path / "sasrec" / "split" / "last.ckpt"
    kept.touch()
    device = "mps" if torch.cuda.is_available() else "gpu"
    with pytest.raises(TrainingError, match=f"training.accelerator={device}: torch finds none"):
        pipeline.train(config(training={"accelerator": device}), dataset(cyclic_events()), "split", tmp_path)
    assert kept.exists()


def test_resume_without_a_checkpoint_starts_from_the_beginning(tmp_path: Path) -> None:
    assert train(config(training={"epochs": 1}), tmp_path, resume=True).epochs == 1


def test_the_best_epoch_is_kept_and_patience_ends_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "evaluate_torch", scripted(0.1, 0.5, 0.4, 0.5, 0.3, 0.9))
    found = train(config(training={"epochs": 20, "patience": 3}), tmp_path)
    assert found.epochs == 2
    assert found.best == pytest.approx(0.5)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["epoch"] == 4  # three epochs without a better one, then the end
    monkeypatch.undo()
    alone = train(config(training={"epochs": 2}), tmp_path / "alone", validated=False)
    assert weights(found.encoder) == weights(alone.encoder)


def test_without_validation_the_epoch_with_the_lowest_loss_counts(tmp_path: Path) -> None:
    """On all events: exactly so many epochs, whatever the settings say of them, and no validation."""
    found = train(config(training={"epochs": 3}), tmp_path, validated=False, epochs=2)
    assert (found.epochs, found.best) == (2, None)
    assert found.checkpoint.name.startswith("sasrec-epoch=1-train_loss=")
    assert weights(load_encoder(found.checkpoint)[0]) == weights(found.encoder)
    rows = read_epochs(tmp_path / "epochs.csv")
    assert len(rows) == 2
    assert found.checkpoint.name == f"sasrec-epoch=1-train_loss={rows[1]['train_loss']:.4f}.ckpt"


def test_a_worse_last_epoch_does_not_count_on_all_events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        SequenceModel,
        "log",
        lambda model, name, value, **options: LOG(model, name, value * 10**model.current_epoch, **options),
    )
    found = train(config(), tmp_path, validated=False, epochs=3)
    assert found.epochs == 1
    assert found.checkpoint.name.startswith("sasrec-epoch=0-train_loss=")


def test_sigterm_leaves_a_training_that_goes_on(tmp_path: Path) -> None:
    """In a process of its own: it is ended in its second epoch, and what it had done is kept."""
    program = textwrap.dedent("""
        import sys, time
        from pathlib import Path
        from tests.test_train import SPLIT, train
        from tests.trained import config
        from trainer.errors import InterruptedTrainingError, TrainingError
        from trainer.train import SequenceModel
        step = SequenceModel.training_step
        def slow(model, *batch):
            if model.current_epoch == 1:
                Path(sys.argv[1], "there").touch()
                time.sleep(0.5)
            return step(model, *batch)
        SequenceModel.training_step = slow
        try:
            train(config(training={"epochs": 3, "batch_size": 4}), Path(sys.argv[1]))
        except TrainingError as error:
            print(error)
            sys.exit(7)
    """)
    child = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    while not (tmp_path / "there").exists():
        assert child.poll() is None
        time.sleep(0.05)
    child.terminate()
    said, _ = child.communicate(timeout=60)
    assert (child.returncode, "interrupted; go on with --resume" in said) == (7, True), said
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["epoch"] == 1
    settings = config(training={"epochs": 3, "batch_size": 4})
    resumed, whole = train(settings, tmp_path, resume=True), train(settings, tmp_path / "whole")
    assert weights(resumed.encoder) == weights(whole.encoder)


def test_tensorboard_has_every_setting_and_what_came_of_it(tmp_path: Path) -> None:
    settings = config(training={"epochs": 2, "warmup": 3})
    found = train(settings, tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    found_there = HParamsPluginData.FromString(content).session_start_info.hparams
    assert found_there["model.kind"].string_value == "sasrec"
    assert found_there["training.warmup"].number_value == 3
    assert {name for name, *_ in every_setting()} - {"data.source"} <= set(found_there)
    assert "data.source.columns.user" in found_there
    best = events.Scalars("best_val_ndcg@10")[-1].value
    assert best == pytest.approx(found.best)
    assert "train_loss" in events.Tags()["scalars"]


@pytest.mark.parametrize(
    ("step", "share"),
    [(0, 0.25), (1, 0.5), (3, 1.0), (4, 1.0), (9, (1 + math.cos(math.pi * 5 / 10)) / 2), (14, 0.0), (20, 0.0)],
)
def test_the_learning_rate_rises_and_falls(step: int, share: float) -> None:
    settings = config(training={"warmup": 4, "schedule": "cosine"}).training
    assert lr_share(step, 14, settings) == pytest.approx(share)
    flat = config(training={"warmup": 4}).training
    assert lr_share(step, 14, flat) == min(1.0, (step + 1) / 4)


def test_the_schedule_reaches_the_optimiser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    monkeypatch.setattr(
        SequenceModel,
        "on_before_optimizer_step",
        lambda _, optimizer: seen.append(optimizer.param_groups[0]["lr"]),
        raising=False,
    )
    settings = config(training={"epochs": 2, "batch_size": 20, "warmup": 2, "schedule": "cosine", "lr": 0.01})
    train(settings, tmp_path)
    assert len(seen) == 6  # 60 users, 20 a step, two epochs
    assert seen == pytest.approx([0.01 * lr_share(step, 6, settings.training) for step in range(6)])


def test_a_refit_goes_the_way_of_the_run_that_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The learning rate after each epoch, on the split, and on all events for fewer epochs, and for more."""
    rates: list[float] = []
    monkeypatch.setattr(
        SequenceModel,
        "on_train_epoch_end",
        lambda model: rates.append(model.trainer.optimizers[0].param_groups[0]["lr"]),
    )
    settings = config(training={"epochs": 4, "batch_size": 20, "schedule": "cosine", "lr": 0.01})

    def rates_of(split: Split, *, validated: bool, epochs: int | None = None) -> list[float]:
        rates.clear()
        train(settings, tmp_path, validated=validated, split=split, epochs=epochs)
        return [*rates]

    measured = rates_of(SPLIT, validated=True)
    assert measured == pytest.approx([0.01 * (1 + math.cos(math.pi * epoch / 4)) / 2 for epoch in (1, 2, 3, 4)])
    more = dataset(cyclic_events(users=90))  # and more steps an epoch
    refit = replace(SPLIT, sequences=everything(more)[0])
    assert rates_of(refit, validated=False, epochs=2) == pytest.approx(measured[:2])
    assert rates_of(refit, validated=False) == pytest.approx(measured)
    # More epochs than the settings plan: the curve is stretched, none is trained at a rate of nothing.
    longer = rates_of(refit, validated=False, epochs=5)
    assert longer == pytest.approx([0.01 * (1 + math.cos(math.pi * epoch / 5)) / 2 for epoch in (1, 2, 3, 4, 5)])


def unstarted(settings: RunConfig, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[pl.Trainer, SequenceModel]:
    """Lightning's trainer and the model as `fit` makes them, without a step."""
    made: list[tuple[pl.Trainer, SequenceModel]] = []
    monkeypatch.setattr(pl.Trainer, "fit", lambda trainer, model, *_, **__: made.append((trainer, model)))
    train(settings, folder)
    trainer, model = made[0]
    model.trainer = trainer
    return trainer, model


@pytest.mark.parametrize("decay", [0.0, 0.03])
def test_the_weight_decay_reaches_every_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decay: float) -> None:
    _, model = unstarted(config(training={"weight_decay": decay}), tmp_path, monkeypatch)
    (group,) = model.configure_optimizers()["optimizer"].param_groups
    assert group["weight_decay"] == decay
    assert {id(weight) for weight in group["params"]} == {id(weight) for weight in model.encoder.parameters()}


@pytest.mark.parametrize("clip", [0.5, 0.0])
def test_no_gradient_is_longer_than_the_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clip: float) -> None:
    """The gradient of the first step as Adam gets it, where each weight's would be 1; at 0 nothing is cut."""
    norms: list[float] = []

    class Watched(torch.optim.AdamW):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            closure()  # Lightning's: it takes the loss, its gradients, and clips them
            norms.append(float(torch.cat([w.grad.flatten() for w in self.param_groups[0]["params"]]).norm()))

    def ones(model: SequenceModel, *_: Any) -> torch.Tensor:
        return torch.stack([weight.sum() for weight in model.encoder.parameters()]).sum()

    monkeypatch.setattr(torch.optim, "AdamW", Watched)
    monkeypatch.setattr(SequenceModel, "training_step", ones)
    found = train(config(training={"epochs": 1, "batch_size": 60, "gradient_clip": clip}), tmp_path)
    count = sum(weight.numel() for weight in found.encoder.parameters())
    assert norms == pytest.approx([clip or math.sqrt(count)], rel=1e-4)


def test_a_validation_that_never_comes_leaves_the_last_epoch(tmp_path: Path) -> None:
    found = train(config(training={"epochs": 2, "validate_every": 5}), tmp_path)
    assert (found.epochs, found.best) == (2, None)
    assert weights(load_encoder(found.checkpoint)[0]) == weights(found.encoder)


def test_a_loss_that_is_no_number_stops_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "loss_of", lambda hidden, *_: hidden.sum() * math.nan)
    with pytest.raises(TrainingError, match=r"loss is nan in epoch 0: try a smaller training\.lr"):
        train(config(), tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_is_read_without_running_code_in_it(tmp_path: Path, kind: Kind) -> None:
    settings = config(kind, training={"epochs": 1})
    found = train(settings, tmp_path)
    torch.load(found.checkpoint, weights_only=True)
    encoder, restored = load_encoder(found.checkpoint)
    assert restored == settings
    assert weights(encoder) == weights(found.encoder)
    assert not encoder.training


def test_users_without_two_events_cannot_teach_what_comes_next() -> None:
    alone = Sequences(np.array([1, 2]), np.array([0, 1]), np.array([1, 2]))
    with pytest.raises(TrainingError, match="two events"):
        Batches(alone, config("sasrec"))
    assert len(Batches(alone, config("bert4rec"))) == 1


@pytest.mark.parametrize(("kind", "longest"), [("sasrec", 5), ("bert4rec", 4)])
def test_rows_are_the_newest_events_of_each_user(kind: Kind, longest: int) -> None:
    sequences = Sequences(np.arange(1, 11), np.array([0, 7]), np.array([7, 10]))
    rows = [r for batch in Batches(sequences, config(kind, model={"max_length": 4})) for r in batch[0].tolist()]
    assert sorted([x for x in row if x] for row in rows) == [list(range(8 - longest, 8)), [8, 9, 10]]


def test_each_epoch_has_its_own_batches() -> None:
    data = Batches(SPLIT.sequences, config())
    first, again = ([b[0].tolist() for b in data] for _ in range(2))
    data.epoch = 1
    assert first == again
    assert [b[0].tolist() for b in data] != first


def test_users_of_a_batch_are_the_more_alike_the_wider_the_window() -> None:
    lengths = np.random.default_rng(0).integers(2, 17, 200)
    stops = lengths.cumsum()
    sequences = Sequences(np.ones(stops[-1], np.int64), stops - lengths, stops)

    def spread(window: int) -> int:
        """How many events the longest rows have more than the shortest ones, over all batches."""
        data = Batches(sequences, config(training={"batch_size": 20, "length_window": window}))
        read = [(batch.items != 0).sum(1) for batch in data]
        return sum(int(rows.max() - rows.min()) for rows in read)

    assert spread(10) <= 16 - 2  # one window: batches lie side by side
    assert 3 * spread(10) < spread(2) < spread(1)  # two batches of a window share the range
    assert spread(1) > 10 * (16 - 2) * 0.8  # chance: most batches of 20 have nearly all lengths


class _AskedError(Exception):
    """Ends a training step where the loss is asked."""


@pytest.mark.parametrize("kind", KINDS)
def test_negatives_of_the_batch_are_expected_as_often_as_items_are_targets(
    kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the users have six events, of which the newest four or five are read, the others three."""
    users, asked = 3_000, list[torch.Tensor]()
    stops = np.arange(2 * users) // 2 * 9 + np.tile([6, 9], users)
    sequences = Sequences(np.tile(np.arange(1, 10), users), stops - np.tile([6, 3], users), stops)
    settings = config(
        kind,
        model={"max_length": 4},
        training={"batch_size": 2 * users, "mask_probability": 0.4, "last_item_probability": 0.3},
    )
    data = Batches(sequences, settings)

    def ask(*words: Any) -> None:
        asked.extend((words[1], words[4]))
        raise _AskedError

    monkeypatch.setattr(module, "loss_of", ask)
    with pytest.raises(_AskedError):
        SequenceModel(settings, 10, data, None).training_step(next(iter(data)), 0)
    targets, share = asked
    counts = torch.bincount(targets[targets > 0], minlength=11)[1:]
    assert share.tolist() == pytest.approx((counts / counts.sum()).tolist(), abs=0.0 if kind == "sasrec" else 0.01)
    never = {1, 2, 7, 10} if kind == "sasrec" else {1, 2, 10}  # older than the rows, nothing before it, without events
    assert {i for i, part in enumerate(share.tolist(), start=1) if part == 0} == never


@pytest.mark.parametrize(("chance", "last"), [(0.15, 0.0), (0.6, 0.0), (0.15, 0.9)])
def test_bert4rec_hides_as_often_as_the_settings_say(chance: float, last: float) -> None:
    settings = config("bert4rec", training={"seed": 7, "mask_probability": chance, "last_item_probability": last})
    data = Batches(SPLIT.sequences, settings)
    batch = next(iter(data))
    posed = SequenceModel(settings, ITEMS, data, None)._pose(batch)
    wanted = mask_items(batch.items, batch.users, chance, last, ITEMS, (7, 0))
    others = [mask_items(batch.items, batch.users, *other, ITEMS, (7, 0))[1] for other in ((0.3, last), (chance, 0.5))]
    assert all(torch.equal(a, b) for a, b in zip(posed, wanted, strict=True))
    assert not any(torch.equal(posed[1], other) for other in others)


def test_the_loss_is_divided_by_the_mean_number_of_guesses() -> None:
    sequences = Sequences(np.arange(1, 11), np.array([0, 7]), np.array([7, 10]))
    one = {"batch_size": 1, "mask_probability": 0.25}
    assert Batches(sequences, config("sasrec", training=one)).tokens_per_batch() == (6 + 2) / 2
    assert Batches(sequences, config("bert4rec", training=one)).tokens_per_batch() == 0.25 * (7 + 3) / 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "loss",
    [
        {"loss": "sampled_softmax", "negatives": 16},
        {"loss": "sampled_softmax", "negatives": 8, "in_batch_negatives": 16},
        {"loss": "gbce", "negatives": 16},
        {"loss": "bce", "negatives": 2},
    ],
    ids=str,
)
def test_every_loss_learns_the_circle(tmp_path: Path, loss: dict[str, Any]) -> None:
    # Binary losses first push all scores down, so they take longer to find the circle.
    found = train(config(training={"epochs": 60, "patience": 60, "batch_size": 16, **loss}), tmp_path)
    assert found.best is not None
    assert found.best > 0.9
