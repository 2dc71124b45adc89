"""Ending a training in order within an epoch, and going on there: an epoch of much data may take hours.

SIGTERM and Ctrl-C let the step under way finish. What the rest of the epoch needs is in `last.ckpt` then, so that a
resume comes to the weights of a training that nobody stopped.
"""

from __future__ import annotations

import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from trainer.errors import InterruptedTrainingError


class Interruption(Callback):
    """Stops where a signal asks for it, and goes on where a stop was.

    For one process. Of several, each has dropout and a moment of its own; Lightning lets those agree to stop, and a
    resume goes on from the last whole epoch.
    """

    def __init__(self, last: Path) -> None:
        self.last, self.asked, self.random = last, False, dict[str, Any]()

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Listen to signals, instead of Lightning, which puts all handlers back in the end."""
        if trainer.world_size == 1 and threading.current_thread() is threading.main_thread():
            self.before = signal.getsignal(signal.SIGINT)
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, self._ask)
        if trainer.fit_loop.restarted_mid_epoch:  # in several processes too, where one had stopped
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                callback.on_train_epoch_start(trainer, module)  # which Lightning leaves out within an epoch
            torch.set_rng_state(self.random["cpu"])
            if self.random["cuda"]:
                torch.cuda.set_rng_state_all(self.random["cuda"])

    def on_train_epoch_start(self, trainer: pl.Trainer, _module: pl.LightningModule) -> None:
        """Stop where a signal came too late for the epoch before, which is kept as a whole."""
        if self.asked:
            raise InterruptedTrainingError(f"the end of epoch {trainer.current_epoch - 1} is in {self.last}")

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """The same behind the last epoch: what comes after a training was not to begin."""
        self.on_train_epoch_start(trainer, module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, _module: pl.LightningModule, _outputs: Any, _batch: Any, step: int
    ) -> None:
        """Stop after the step in which a signal came, but for the last one: then the epoch is finished first."""
        if self.asked and not trainer.is_last_batch:
            trainer.save_checkpoint(self.last)
            raise InterruptedTrainingError(
                f"step {step + 1} of {trainer.num_training_batches} in epoch {trainer.current_epoch} is in {self.last}"
            )

    def state_dict(self) -> dict[str, Any]:
        """Where the random numbers are."""
        return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """For `on_train_start`, which comes later."""
        self.random = state_dict

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        if not self.asked and number == signal.SIGINT:
            print("\nstopping after this step; Ctrl-C again stops at once", file=sys.stderr)
            # A shell lets what it starts in the background ignore Ctrl-C; who sends it all the same means it.
            signal.signal(signal.SIGINT, self.before if callable(self.before) else signal.default_int_handler)
        self.asked = True
