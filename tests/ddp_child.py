"""One of the processes of tests/test_ddp.py: two epochs of each model; the first process saves the gradients."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from tests.trained import Kind, config, cyclic_events, dataset
from trainer import pipeline
from trainer.train import SequenceModel

USERS = 61  # an odd number: the shares of two processes differ
EPOCHS = 2
SIZES: dict[Kind, int] = {"sasrec": 64, "bert4rec": 60}
"""Users a batch. With 60 the second step has one user: the second process has nobody, and makes the step too."""


def gradients(kind: Kind, folder: Path, batch_size: int) -> dict[str, torch.Tensor]:
    """The gradient of each step, as the optimiser gets it, by the number of the step and the weight's name."""
    settings = config(kind, training={"epochs": EPOCHS, "batch_size": batch_size, "gradient_clip": 0, "lr": 1e-9})
    found: dict[str, torch.Tensor] = {}

    def keep(model: SequenceModel, _optimizer: object) -> None:
        for name, weight in model.encoder.named_parameters():
            assert weight.grad is not None
            found[f"{model.global_step} {name}"] = weight.grad.clone()

    SequenceModel.on_before_optimizer_step = keep  # type: ignore[assignment,method-assign]
    pipeline.train(settings, dataset(cyclic_events(users=USERS)), "split", folder)
    return found


if __name__ == "__main__":
    place = Path(sys.argv[1])
    for kind, size in SIZES.items():
        made = gradients(kind, place, size)
        if torch.distributed.get_rank() == 0:
            torch.save(made, place / f"{kind}.pt")
