"""The loop: PyTorch Lightning around one encoder and one objective."""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from math import ceil, cos, pi
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

import numpy as np
import pytorch_lightning as pl
import torch
import torch.distributed as dist
import torch.nn.functional as F
from pytorch_lightning.callbacks import Callback, EarlyStopping, ModelCheckpoint, TQDMProgressBar
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from shared.events import IntArray
from shared.sequences import LARGEST_BUCKET, pack, pack_slices, time_buckets
from shared.tower import TowerSpec
from trainer.config import RunConfig, TrainingConfig, flat
from trainer.curves import EpochLog
from trainer.dataset import Cases, Sequences, batches
from trainer.errors import InterruptedTrainingError, TrainingError
from trainer.evaluate import full_ranks, vector_scores
from trainer.interruption import Interruption
from trainer.items import Features
from trainer.metrics import metrics
from trainer.objectives import loss_of, mask_items, shift
from trainer.transformer import Encoder

T = TypeVar("T")
MONITOR: Final = "val_ndcg@10"
LAST: Final = "last.ckpt"
EVALUATION_BATCH: Final = 64
NOTHING: Final = (0.0, 0)


class Rows(NamedTuple):
    """Packed training rows."""

    items: Tensor  # (B, T + 1) for SASRec, (B, T) for BERT4Rec
    users: Tensor  # (B,)
    ages: Tensor | None  # (B, T, T) for a model with a clock


@dataclass(frozen=True)
class Share:
    """Which of several training processes this is: `torchrun` says so in the environment."""

    rank: int = 0
    size: int = 1

    @classmethod
    def mine(cls) -> Share:
        """This process's."""
        return cls(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))

    def by_first(self, work: Callable[[], T]) -> T:
        """What `work` gives, done by the first process alone; the others wait for it and get the same."""
        if self.size == 1:
            return work()
        if not dist.is_initialized():
            dist.init_process_group()
        found = [work() if self.rank == 0 else None]
        dist.broadcast_object_list(found, device=torch.device("cpu"))
        return found[0]  # type: ignore[return-value]


class Batches(IterableDataset[Rows]):
    """The training sequences as packed rows; new batches each epoch.

    Of several processes each takes its share of every batch, so that together they make the steps that one would make.
    """

    def __init__(self, sequences: Sequences, config: RunConfig, share: Share = Share()) -> None:
        self.sequences, self.config, self.mine = sequences, config, share
        self.epoch, self.begin = 0, 0  # and the first of its batches that is left to do
        causal = config.model.kind == "sasrec"
        self.longest = config.model.max_length + (1 if causal else 0)
        least = 2 if causal else 1  # a single event has no next one to learn
        self.usable = np.flatnonzero(sequences.lengths >= least)
        self.lengths = np.minimum(sequences.lengths[self.usable], self.longest)
        if not len(self.usable):
            raise TrainingError("no user has the two events in the training part that a model needs to learn from")
        self.largest_time = self._largest_time()

    def __len__(self) -> int:
        return ceil(len(self.usable) / self.config.training.batch_size)

    def __iter__(self) -> Iterator[Rows]:
        settings = self.config.training
        rng = np.random.default_rng((settings.seed, self.epoch))
        planned = batches(self.lengths, settings.batch_size, rng, settings.length_window)
        for positions in islice(planned, self.begin, None):
            rows = self.usable[positions][self.mine.rank :: self.mine.size]
            yield self._rows(rows) if len(rows) else self._nobody()

    def _rows(self, rows: IntArray) -> Rows:
        items = torch.from_numpy(self._pack(self.sequences.item, rows))
        return Rows(items, torch.from_numpy(rows), self._ages(rows))

    def _nobody(self) -> Rows:
        """A row without anything to guess: all processes must make the step, even if a last batch is too small."""
        row = torch.zeros(1, 2, dtype=torch.int64)
        T = 2 if self.config.model.kind == "bert4rec" else 1
        clock = self.config.model.time_bias != "none"
        return Rows(row, torch.zeros(1, dtype=torch.int64), torch.zeros(1, T, T, dtype=torch.int32) if clock else None)

    def _pack(self, values: IntArray, rows: IntArray) -> IntArray:
        return pack_slices(values, self.sequences.starts[rows], self.sequences.stops[rows], self.longest)[0]

    def _ages(self, rows: IntArray) -> Tensor | None:
        clock, masked = self.config.model.time_bias, self.config.model.kind == "bert4rec"
        if clock == "none" or self.sequences.time is None:
            return None
        times = self._pack(self.sequences.time, rows)  # (B, T + 1), or (B, T) with masks
        return torch.from_numpy(time_buckets(times, clock, self.largest_time, masked=masked))

    def _largest_time(self) -> int:
        """The largest bucket of time in any row: what lies beyond was never learnt, and counts as this."""
        if self.config.model.time_bias == "none":
            return 0
        if self.sequences.time is None:
            raise TrainingError("model.time_bias needs times, and the data has none; set model.time_bias=none")
        stops = self.sequences.stops[self.usable]
        ends = np.stack((self.sequences.time[stops - self.lengths], self.sequences.time[stops - 1]), axis=1)  # (S, 2)
        return int(time_buckets(ends, "query", LARGEST_BUCKET, masked=True).max())

    def tokens_per_batch(self) -> float:
        """Mean number of positions to guess in a batch, before masking."""
        causal = self.config.model.kind == "sasrec"
        guessed = (self.lengths - 1).sum() if causal else self.lengths.sum() * self.config.training.mask_probability
        return float(guessed) / len(self)

    def known(self, item_count: int) -> Tensor:
        """Which items have training events, (N,)."""
        return torch.from_numpy(np.bincount(self.sequences.item, minlength=item_count + 1)[1:] > 0)

    def asked(self, item_count: int) -> Tensor:
        """Share of each item among the targets of an epoch, (N,): what is older than the rows is none.

        SASRec asks for all but a row's first; BERT4Rec for what `mask_items` hides, for the last item most often.
        """
        settings, causal = self.config.training, self.config.model.kind == "sasrec"
        counts = self.lengths - 1 if causal else self.lengths  # (S,) targets, or what may be one
        item, stops = self.sequences.item, self.sequences.stops[self.usable]
        bounds = np.zeros(len(item) + 1, np.int8)  # marks, not rows of events: a byte for each of 50 million, not eight
        bounds[stops - counts] += 1
        bounds[stops] -= 1
        found = np.bincount(item[bounds[:-1].cumsum(dtype=np.int8).view(bool)], minlength=item_count + 1).astype(float)
        if not causal:
            chance, last = settings.mask_probability, settings.last_item_probability
            alone = last + (1 - last) * (1 - chance) ** counts  # (S,) asked alone, or since nothing else was
            found *= (1 - last) * chance
            found += np.bincount(item[stops - 1], alone, item_count + 1)
        return torch.from_numpy(found[1:] / found.sum()).float()


class SequenceModel(pl.LightningModule):
    """An encoder with its objective, and its validation by full ranking."""

    known: Tensor  # (N,) whether an item has training events
    share: Tensor  # (N,) of each item among the targets
    lost: tuple[Tensor | float, int] = NOTHING  # in this epoch: the rows' losses, summed, and how many rows
    carried: tuple[float, int] = NOTHING  # of that, what an earlier process had, until it is told

    def __init__(
        self,
        config: RunConfig,
        item_count: int,
        data: Batches,
        validation: Cases | None,
        features: Features | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("known", data.known(item_count), persistent=False)
        self.register_buffer("share", data.asked(item_count), persistent=False)
        self.config, self.validation = config, validation
        self.tokens_per_batch, self.steps_per_epoch = data.tokens_per_batch(), len(data)
        self.encoder = Encoder(config.model, item_count, features)
        self.mine = Share.mine()
        self.save_hyperparameters({"config": config.model_dump(mode="json"), "item_count": item_count}, logger=False)

    def configure_optimizers(self) -> Any:
        """Adam, as the papers have it, with the learning rate that the settings plan for each step.

        The plan is for `training.epochs`, as long as no more are asked for: a refit of the epochs that validation chose
        goes the way of the run that was measured, and ends where that one was at its best.
        """
        settings = self.config.training
        adam = torch.optim.AdamW(self.encoder.parameters(), settings.lr, weight_decay=settings.weight_decay)
        steps = self.steps_per_epoch * max(settings.epochs, self.trainer.max_epochs or 0)
        plan = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: lr_share(step, steps, settings))
        return {"optimizer": adam, "lr_scheduler": {"scheduler": plan, "interval": "step"}}

    def on_train_epoch_start(self) -> None:
        """New dropout each epoch, the same after a resume."""
        self.lost = self.carried = NOTHING
        torch.manual_seed(hash((self.config.training.seed, self.current_epoch, self.mine.rank)) & 0x7FFF_FFFF)

    def training_step(self, batch: Rows, _batch_index: int) -> Tensor:
        """The loss of packed rows (B, T).

        Divided by the mean number of guesses a batch, not by this batch's: with batches by length, a batch
        of short users would otherwise weigh as much as one of long users.
        """
        inputs, targets = self._pose(batch)
        table = self.encoder.items()  # (N + 2, D), once for inputs and scores
        hidden, vectors = self.encoder(inputs, batch.ages, table), self.encoder.vectors_of(table)
        targets, vectors, share = self._candidates(targets, vectors)
        total = loss_of(hidden, targets, vectors, self.config.training, share)
        # Several processes take the mean of their gradients, and the batch is the sum of their shares.
        loss = total / self.tokens_per_batch * self.mine.size
        if not torch.isfinite(loss):
            raise TrainingError(
                f"the loss is {loss.item()} in epoch {self.current_epoch}: try a smaller training.lr "
                f"(now {self.config.training.lr}); {self._good_weights()}"
            )
        # Taken together here, in every step: a progress bar asks for it in the first process alone.
        mean = self.trainer.strategy.reduce(loss.detach(), reduce_op="mean")
        self._tell_loss(mean, len(inputs))
        return loss

    def _good_weights(self) -> str:
        last = Path(self.trainer.default_root_dir, LAST)
        return f"the last good weights are in {last.parent}" if last.is_file() else "no epoch was over"

    def _tell_loss(self, mean: Tensor, rows: int) -> None:
        """A step's loss for the mean of the epoch; with the first one what an earlier part of the epoch had."""
        (before, rows_before), self.carried = self.carried, NOTHING
        total, size = mean * rows + before, rows + rows_before
        self.lost = self.lost[0] + mean * rows, self.lost[1] + rows
        self.log("train_loss", total / size, on_step=False, on_epoch=True, prog_bar=True, batch_size=size)

    def _candidates(self, targets: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Targets, and the vectors and shares of the items that the loss sets against each other.

        A vector made of metadata is shared: an item without events, which can only be wrong, would teach that its genre
        is. So only items with events take part, numbered anew, where there is metadata.
        """
        if self.encoder.items.spec is None:
            return targets, vectors, self.share
        number = F.pad(self.known.cumsum(0) * self.known, (1, 0))  # (N + 1,): 1..n for items with events
        return number[targets], vectors[self.known], self.share[self.known]

    def _pose(self, rows: Rows) -> tuple[Tensor, Tensor]:
        if self.config.model.kind == "sasrec":
            return shift(rows.items)
        settings, count = self.config.training, self.encoder.item_count
        chances = settings.mask_probability, settings.last_item_probability
        return mask_items(rows.items, rows.users, *chances, count, (settings.seed, self.current_epoch))

    def validation_step(self, _batch: Any, _batch_index: int) -> None:
        """Full ranking of all validation cases; Lightning asks once an epoch with a dummy batch."""
        if self.validation is None:
            return
        found = evaluate_torch(self.encoder, self.config, self.validation)
        for name in ("ndcg@10", "hr@10", "mrr"):
            self.log(f"val_{name}", found.get(name, 0.0), prog_bar=name == "ndcg@10", batch_size=1)
        for part, weights in self.encoder.items.gates().items():
            self.log(f"val_gate/{part}", weights.mean(), batch_size=1)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The loss of this epoch so far; and what the item table reads, which is part of the network's shape."""
        checkpoint["lost"] = float(self.lost[0]), self.lost[1]
        if self.encoder.items.spec is not None:
            checkpoint["metadata"] = self.encoder.items.spec.model_dump()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """For a resume within an epoch; a new epoch forgets it."""
        self.lost = self.carried = checkpoint.get("lost", NOTHING)


def lr_share(step: int, steps: int, settings: TrainingConfig) -> float:
    """The learning rate of a step, 0 to `steps` - 1, as a share of the one that is set."""
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    if settings.schedule == "constant":
        return 1.0
    done = (step - settings.warmup) / max(1, steps - settings.warmup)
    return (1 + cos(pi * min(done, 1.0))) / 2


@torch.no_grad()
def encode_torch(encoder: Encoder, config: RunConfig, cases: Cases) -> tuple[IntArray, Tensor]:
    """Query vectors of the cases that have a history: their positions (C',) and vectors (C', D)."""
    histories = cases.histories()
    times = [] if encoder.clock == "none" else cases.times()
    was_training = encoder.training
    encoder.eval()
    table = encoder.items()
    asked = np.array([c for c, h in enumerate(histories) if len(h)], np.int64)
    asked = asked[np.argsort([len(histories[c]) for c in asked], kind="stable")]
    spec = encoder.spec()
    parts = []
    for start in range(0, len(asked), EVALUATION_BATCH):
        chunk = asked[start : start + EVALUATION_BATCH]
        items, lengths = pack([histories[c] for c in chunk], spec.max_length, mask=spec.mask)
        rows, ends = (torch.from_numpy(part).to(table.device) for part in (items, lengths))
        ages = torch.from_numpy(spec.ages([times[c] for c in chunk])).to(table.device) if times else None
        parts.append(encoder.query(rows, ends, ages, table).cpu())
    encoder.train(was_training)
    return asked, torch.cat(parts) if parts else torch.zeros(0, config.model.hidden_units)


def torch_ranks(encoder: Encoder, config: RunConfig, cases: Cases) -> tuple[IntArray, Cases]:
    """Full ranks by the network itself, and the cases they belong to: those that have a history."""
    asked, queries = encode_torch(encoder, config, cases)
    part = Cases(cases.dataset, cases.user[asked], cases.row[asked])
    vectors = encoder.vectors.detach().cpu().numpy()
    return full_ranks(part, vector_scores(queries.numpy(), vectors)), part


def evaluate_torch(encoder: Encoder, config: RunConfig, cases: Cases) -> dict[str, float]:
    """Metrics of the network itself, full ranks."""
    ranks, part = torch_ranks(encoder, config, cases)
    return metrics(ranks, config.evaluation.cutoffs, part.user)


def check_device(accelerator: str) -> None:
    """Raise TrainingError where the settings ask for a device that torch does not find."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    there["gpu"] = any(there.values())
    if not there.get(accelerator, True):
        raise TrainingError(f"training.accelerator={accelerator}: torch finds none here; take auto or cpu")


@dataclass(frozen=True)
class Fitted:
    """A trained encoder, and how it came about."""

    encoder: Encoder
    epochs: int  # that the weights were trained for
    best: float | None  # validation NDCG@10; None without validation
    checkpoint: Path


@dataclass(frozen=True)
class Prepared:
    """A training with all that it needs. Nothing was written yet: what cannot begin replaces no other."""

    config: RunConfig
    data: Batches
    model: SequenceModel

    def fit(self, folder: Path, *, epochs: int | None = None, resume: bool = False) -> Fitted:
        """Train; with validation keep the best epoch and stop early, without it train `epochs` and keep the one with
        the lowest training loss.

        `folder` gets checkpoints, TensorBoard files and `epochs.csv`. `resume` goes on from `last.ckpt` there. Several
        processes that `torchrun` has started train one model together; the first of them writes, and returns the
        weights that count.
        """
        config, validation, mine = self.config, self.model.validation, self.model.mine
        # Lightning's own `save_last` writes only when the best epoch changes; the newest state is to be kept always.
        newest = _Checkpoint(folder, filename="last", save_on_train_epoch_end=True, enable_version_counter=False)
        best = _best_checkpoint(config, folder, "train_loss" if validation is None else MONITOR)
        board = TensorBoardLogger(folder, name="", version="tensorboard", default_hp_metric=False)
        board.log_hyperparams(_hparams(config), {f"best_{best.monitor}": 0.0})
        last, here = folder / LAST, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        trainer = pl.Trainer(
            default_root_dir=folder,
            max_epochs=config.training.epochs if epochs is None else epochs,
            accelerator=config.training.accelerator,
            devices=here,
            num_nodes=mine.size // here,
            strategy="ddp" if mine.size > 1 else "auto",
            use_distributed_sampler=False,  # the batches are divided already
            logger=board,
            callbacks=[
                _EpochBatches(self.data),
                TQDMProgressBar(refresh_rate=10),
                EpochLog(folder / "epochs.csv"),
                Interruption(last),
                *([] if validation is None else [_stopping(config)]),
                best,
                newest,  # last, so that it holds what the others know of this epoch
            ],
            num_sanity_val_steps=0,
            log_every_n_steps=10,
            check_val_every_n_epoch=config.training.validate_every,
            enable_model_summary=False,
            gradient_clip_val=config.training.gradient_clip or None,
        )
        checkpoint = str(last) if resume and last.is_file() else None
        ask = DataLoader([0], batch_size=1) if validation is not None else None  # type: ignore[arg-type,var-annotated]
        # Its own generator: opening a loader must not move the one that dropout draws from.
        rows = DataLoader(self.data, batch_size=None, generator=torch.Generator())
        try:
            trainer.fit(self.model, rows, ask, ckpt_path=checkpoint, weights_only=False)
        except SystemExit:  # Lightning's answer to Ctrl+C and to SIGTERM
            kept = f"the last whole epoch is in {last}" if last.is_file() else "its first epoch was not over"
            raise InterruptedTrainingError(kept) from None
        found = _best(self.model, trainer, best, last)
        board.log_metrics({f"best_{best.monitor}": float(best.best_model_score or 0.0)}, trainer.global_step)
        board.finalize("success")
        return found


def prepare(
    config: RunConfig,
    item_count: int,
    sequences: Sequences,
    validation: Cases | None,
    *,
    features: Features | None = None,
    first: Callable[[Encoder], None] | None = None,
) -> Prepared:
    """Batches, and a network with its first weights, to which `first` may give others. Raises TrainingError."""
    _quiet()
    pl.seed_everything(config.training.seed, workers=True, verbose=False)
    torch.set_num_threads(config.training.threads)
    data = Batches(sequences, config, Share.mine())
    model = SequenceModel(config, item_count, data, validation, features)
    model.encoder.largest_time.fill_(data.largest_time)
    if first is not None:
        first(model.encoder)
    return Prepared(config, data, model)


def fit(
    config: RunConfig,
    item_count: int,
    sequences: Sequences,
    validation: Cases | None,
    folder: Path,
    *,
    features: Features | None = None,
    epochs: int | None = None,
    resume: bool = False,
) -> Fitted:
    """`prepare`, and train."""
    ready = prepare(config, item_count, sequences, validation, features=features)
    return ready.fit(folder, epochs=epochs, resume=resume)


def _best(model: SequenceModel, trainer: pl.Trainer, saver: ModelCheckpoint, last: Path) -> Fitted:
    """The weights of the best epoch, or the last ones where a validation never came."""
    if model.mine.rank or not saver.best_model_path:
        return Fitted(model.encoder.cpu().eval(), trainer.current_epoch, None, last)
    best = Path(saver.best_model_path)
    saved = torch.load(best, map_location="cpu", weights_only=False)  # our own file, written minutes ago
    model.load_state_dict(saved["state_dict"])
    score = None if model.validation is None or saver.best_model_score is None else float(saver.best_model_score)
    return Fitted(model.encoder.cpu().eval(), int(saved["epoch"]) + 1, score, best)


def _hparams(config: RunConfig) -> dict[str, str | float | bool]:
    """Every setting under its dotted name, in the forms that TensorBoard's HPARAMS page takes."""
    settings = flat(config.model_dump(mode="json"))
    return {name: v if isinstance(v, str | float | int) else json.dumps(v) for name, v in settings.items()}


def load_encoder(checkpoint: Path) -> tuple[Encoder, RunConfig]:
    """The encoder of a checkpoint that `fit` wrote, with its settings."""
    saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
    config = RunConfig.model_validate(saved["hyper_parameters"]["config"])
    item_count = int(saved["hyper_parameters"]["item_count"])
    spec = saved.get("metadata")
    features = None if spec is None else Features.blank(TowerSpec.model_validate(spec), item_count)
    encoder = Encoder(config.model, item_count, features)
    prefix = "encoder."
    state = {k.removeprefix(prefix): v for k, v in saved["state_dict"].items() if k.startswith(prefix)}
    encoder.load_state_dict(state)
    return encoder.eval(), config


class _EpochBatches(Callback):
    """Tells the batches which epoch it is, and how many of it are done, after a resume too."""

    def __init__(self, data: Batches) -> None:
        self.data = data

    def on_train_epoch_start(self, trainer: pl.Trainer, _module: pl.LightningModule) -> None:
        loops = trainer.fit_loop
        self.data.epoch = trainer.current_epoch
        self.data.begin = loops.epoch_loop.batch_progress.current.ready if loops.restarted_mid_epoch else 0


class _Checkpoint(ModelCheckpoint):
    """Knows its best epoch again when the folder was moved: Lightning keeps whole paths, and forgets it otherwise."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What an earlier training kept, with its files where they lie now.

        A best epoch's file may be gone: a better one took its place, and a kill came before that was written down here.
        That epoch is trained again, and is the best then, whatever the rounding.
        """

        def here(path: str) -> str:
            file = Path(str(self.dirpath), Path(path).name)
            return str(file) if path and file.is_file() else ""

        paths = {name: here(state_dict[name]) for name in ("best_model_path", "kth_best_model_path", "last_model_path")}
        best = {here(path): score for path, score in state_dict["best_k_models"].items() if here(path)}
        score = state_dict["best_model_score"] if best else None
        found = {**paths, "best_k_models": best, "best_model_score": score, "dirpath": self.dirpath}
        super().load_state_dict({**state_dict, **found})


def _best_checkpoint(config: RunConfig, folder: Path, monitor: str) -> ModelCheckpoint:
    by_loss = monitor == "train_loss"
    return _Checkpoint(
        folder,
        filename=f"{config.model.kind}-{{epoch}}-{{{monitor}:.4f}}",
        monitor=monitor,
        mode="min" if by_loss else "max",
        enable_version_counter=False,
        save_on_train_epoch_end=by_loss or None,
    )


class _Patience(EarlyStopping):
    """After a resume it is what is set now, and where none is left the training is over, as it would have been."""

    @property
    def state_key(self) -> str:
        """Of the class that older checkpoints name."""
        return super().state_key.replace(type(self).__qualname__, EarlyStopping.__qualname__, 1)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """How long there was nothing better."""
        super().load_state_dict({**state_dict, "patience": self.patience})

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lightning does not keep that a training was to stop."""
        del pl_module
        trainer.should_stop = trainer.should_stop or self.wait_count >= self.patience


def _stopping(config: RunConfig) -> EarlyStopping:
    checks = max(1, config.training.patience // config.training.validate_every)
    return _Patience(MONITOR, mode="max", patience=checks, min_delta=1e-5)


def _quiet() -> None:
    """Leave the progress bar and our own lines; Lightning's hints on workers and devices are noise here."""
    for name in ("pytorch_lightning", "lightning.pytorch", "pytorch_lightning.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"pytorch_lightning.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
