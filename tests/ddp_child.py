"""One of the processes of tests/test_ddp.py: trains one epoch of one batch, and the first one saves the gradient."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from tests.trained import ITEMS, Kind, config, cyclic_events, dataset
from trainer.dataset import leave_one_out
from trainer.train import SequenceModel, fit

USERS = 61  # an odd number: the shares of two processes differ


def gradients(kind: Kind, folder: Path, batch_size: int) -> dict[str, torch.Tensor]:
    """The gradient of each step, as the optimiser gets it, by the number of the step and the weight's name."""
    split = leave_one_out(dataset(cyclic_events(users=USERS)))
    settings = config(kind, training={"epochs": 1, "batch_size": batch_size, "gradient_clip": 0, "lr": 1e-9})
    found: dict[str, torch.Tensor] = {}

    def keep(model: SequenceModel, _optimizer: object) -> None:
        for name, weight in model.encoder.named_parameters():
            assert weight.grad is not None
            found[f"{model.global_step} {name}"] = weight.grad.clone()

    SequenceModel.on_before_optimizer_step = keep  # type: ignore[assignment,method-assign]
    fit(settings, ITEMS, split.sequences, split.validation, folder)
    return found


if __name__ == "__main__":
    kind, place, size = sys.argv[1:]
    made = gradients("sasrec" if kind == "sasrec" else "bert4rec", Path(place), int(size))
    if Path(place, "last.ckpt").is_file() and torch.distributed.get_rank() == 0:
        torch.save(made, Path(place) / "gradients.pt")
