"""What is minimised: pure functions from a batch to (positions to guess, right answers), and the loss over them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.sequences import PAD

IGNORE = PAD  # a target that is no target


def shift(rows: Tensor) -> tuple[Tensor, Tensor]:
    """SASRec: at every position guess the next item.

    shift([[7, 8, 9, 0]]) -> inputs [[7, 8, 9]], targets [[8, 9, 0]]   # (B, T + 1) -> 2 x (B, T)
    """
    inputs, targets = rows[:, :-1], rows[:, 1:]
    # The last real item of a shorter row has no successor: its target is PAD, which counts as none.
    return inputs, targets


def mask_items(
    rows: Tensor, probability: float, last_probability: float, item_count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """BERT4Rec: guess hidden items from both sides.

    mask_items([[7, 8, 9, 0]]) -> inputs [[7, MASK, 9, 0]], targets [[0, 8, 0, 0]]   # (B, T) -> 2 x (B, T)

    Of the chosen positions 80 % become MASK, 10 % a random item, 10 % stay (Devlin et al. 2019). With
    `last_probability` a row hides its last item and no other: what service asks. Every row hides one at least.
    """
    B, T = rows.shape
    real = rows != PAD  # (B, T)
    last = real.sum(1) - 1  # (B,)
    at_last = torch.arange(T) == last[:, None]  # (B, T)
    chosen = (torch.rand(B, T, generator=generator) < probability) & real
    only_last = torch.rand(B, generator=generator) < last_probability  # (B,)
    chosen = torch.where((only_last | ~chosen.any(1))[:, None], at_last, chosen)
    dice = torch.rand(B, T, generator=generator)
    noise = torch.randint(1, item_count + 1, (B, T), generator=generator)
    # A last item that is asked for as in service is always hidden.
    to_mask = chosen & ((dice < 0.8) | only_last[:, None])
    to_noise = chosen & ~to_mask & (dice < 0.9)
    inputs = torch.where(to_mask, item_count + 1, torch.where(to_noise, noise, rows))
    return inputs, torch.where(chosen, rows, IGNORE)


def cross_entropy(hidden: Tensor, targets: Tensor, vectors: Tensor) -> Tensor:
    """Summed cross-entropy over all N items at the positions that have a target.

    hidden (B, T, D), targets (B, T) item indices or PAD, vectors (N, D): softmax runs over 1..N alone.
    """
    wanted = targets != IGNORE  # (B, T)
    logits = hidden[wanted] @ vectors.T  # (P, D) @ (D, N) -> (P, N)
    return F.cross_entropy(logits, targets[wanted] - 1, reduction="sum")
