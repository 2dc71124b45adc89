"""What is minimised: pure functions from a batch to (positions to guess, right answers), and the loss over them."""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from shared.sequences import PAD
from trainer.config import TrainingConfig

IGNORE = PAD  # a target that is no target
LOGITS: Final = 1 << 24  # numbers in a chunk of logits
LOGITS_ON_CPU: Final = 1 << 19
TOGETHER: Final = 64
"""Neighbouring positions that have their negatives in common. More would be faster and learn worse: on MovieLens 100K
validation NDCG@10 of gBCE was .108 after 8 epochs, and .075 when a whole batch shared 256 of the 1,682 items; that of
sampled softmax after 16 .103, and .089."""


def shift(rows: Tensor) -> tuple[Tensor, Tensor]:
    """SASRec: at every position guess the next item.

    shift([[7, 8, 9, 0]]) -> inputs [[7, 8, 9]], targets [[8, 9, 0]]   # (B, T + 1) -> 2 x (B, T)
    """
    inputs, targets = rows[:, :-1], rows[:, 1:]
    # The last real item of a shorter row has no successor: its target is PAD, which counts as none.
    return inputs, targets


def mask_items(
    rows: Tensor, users: Tensor, probability: float, last_probability: float, item_count: int, seed: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """BERT4Rec: guess hidden items from both sides.

    mask_items([[7, 8, 9, 0]]) -> inputs [[7, MASK, 9, 0]], targets [[0, 8, 0, 0]]   # (B, T) -> 2 x (B, T)

    Of the chosen positions 80 % become MASK, 10 % a random item, 10 % stay (Devlin et al. 2019). With
    `last_probability` a row hides its last item and no other: what service asks. Every row hides one at least.
    What a user hides depends on `seed` (seed and epoch) and on `users` (B,) alone, in whatever batch the row is, and
    however long the others in it are.
    """
    _, T = rows.shape
    thrown = dice(users, 1 + 3 * T, seed)  # (B, 1 + 3 T): numbered by position, so that the padding moves nothing
    choice, fate, noise = thrown[:, 1:].reshape(-1, T, 3).unbind(2)  # (B, T) each
    only_last = thrown[:, 0] < last_probability  # (B,)
    real = rows != PAD  # (B, T)
    last = real.sum(1) - 1  # (B,)
    at_last = torch.arange(T, device=rows.device) == last[:, None]  # (B, T)
    chosen = (choice < probability) & real
    chosen = torch.where((only_last | ~chosen.any(1))[:, None], at_last, chosen)
    # A last item that is asked for as in service is always hidden.
    to_mask = chosen & ((fate < 0.8) | only_last[:, None])
    to_noise = chosen & ~to_mask & (fate < 0.9)
    others = 1 + (noise * item_count).long()
    inputs = torch.where(to_mask, item_count + 1, torch.where(to_noise, others, rows))
    return inputs, torch.where(chosen, rows, IGNORE)


def dice(users: Tensor, count: int, seed: tuple[int, int]) -> Tensor:
    """Uniform numbers in [0, 1), (B, count): the same for a user (B,) and a seed, wherever and whenever it is asked.

    A counter put through the finaliser of SplitMix64 (Steele et al. 2014): no state, and no loop over rows.
    """
    key = np.random.default_rng(seed).integers(0, 2**63, dtype=np.uint64)
    place = users.cpu().numpy().astype(np.uint64)[:, None] << np.uint64(20) | np.arange(count, dtype=np.uint64)
    mixed = key ^ place * np.uint64(0x9E3779B97F4A7C15)
    for shift_by, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ mixed >> np.uint64(shift_by)) * np.uint64(factor)
    mixed ^= mixed >> np.uint64(31)
    return torch.from_numpy((mixed >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)).to(users.device)


# --- losses: hidden states at positions with a target (P, D), their items (P,) 1..N, item vectors (N, D) -------


def loss_of(hidden: Tensor, targets: Tensor, vectors: Tensor, settings: TrainingConfig, share: Tensor) -> Tensor:
    """The loss that the settings name, summed over the positions that have a target.

    hidden (B, T, D), targets (B, T) item indices or PAD, vectors (N, D); share (N,) of each item among the
    targets of an epoch. Negatives are drawn from torch's own generator, which the loop seeds for each epoch.
    """
    wanted = targets != IGNORE  # (B, T)
    hidden, targets = hidden[wanted], targets[wanted]  # (P, D), (P,)
    N, K = len(vectors), settings.negative_count
    if settings.loss == "cross_entropy":
        return full_cross_entropy(hidden, targets, vectors)
    if settings.loss == "sampled_softmax":
        drawn, expected = draw(targets, share, K, settings.in_batch_negatives)
        return sampled_softmax(hidden, targets, vectors, drawn, expected)
    if settings.loss == "gbce":
        drawn = torch.randint(1, N + 1, (_groups(targets), K), device=targets.device)
        power = positive_power(K, N, settings.calibration)
        return binary(hidden, targets, vectors, drawn, power, neutral_level(K, power))
    drawn = torch.randint(1, N + 1, (len(targets), K), device=targets.device)
    return binary(hidden, targets, vectors, drawn, 1.0)


def full_cross_entropy(hidden: Tensor, targets: Tensor, vectors: Tensor, chunk: int | None = None) -> Tensor:
    """Summed cross-entropy over all N items, PAD and MASK not among them.

    `chunk` positions at a time: logits of a chunk turn into gradients at once and are forgotten, so memory grows with
    P * D + N * D and never with P * N. By default so many that a CPU's cache holds their logits (2 MB), which on one
    core is 2.5 times as fast as 64 MB of them; other devices get the 64 MB.
    """
    room = LOGITS_ON_CPU if hidden.device.type == "cpu" else LOGITS
    size = max(1, room // len(vectors), min(64, LOGITS // len(vectors))) if chunk is None else chunk
    found: Tensor = _ChunkedCrossEntropy.apply(hidden, targets, vectors, size)  # type: ignore[no-untyped-call]
    return found


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The gradient of the sum is known as soon as the logits are: softmax less one at the target.

    The softmax is never made: its numerators are multiplied, and the results divided, which are narrower.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, vectors: Tensor, chunk: int) -> Tensor:
        right = vectors[targets - 1]  # (P, D)
        total, to_hidden, to_vectors = -(hidden * right).sum(), torch.empty_like(hidden), torch.zeros_like(vectors)
        learns = any(ctx.needs_input_grad)
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            logits = hidden[part] @ vectors.T  # (c, D) @ (D, N) -> (c, N)
            top = logits.amax(1, keepdim=True)  # (c, 1)
            powers = logits.sub_(top).exp_()  # (c, N)
            whole = powers.sum(1, keepdim=True)  # (c, 1)
            total += (whole.log() + top).sum()
            if learns:
                torch.mm(powers, vectors, out=to_hidden[part]).div_(whole)  # (c, D)
                to_vectors.addmm_(powers.T, hidden[part] / whole)  # (N, D)
        if learns:
            to_hidden -= right
            to_vectors.index_add_(0, targets - 1, hidden, alpha=-1)
        ctx.save_for_backward(to_hidden, to_vectors)
        return total

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, None, Tensor, None]:
        to_hidden, to_vectors = ctx.saved_tensors
        return to_hidden * scale, None, to_vectors * scale, None


def draw(targets: Tensor, share: Tensor, uniform: int, in_batch: int) -> tuple[Tensor, Tensor]:
    """Negatives (G, K) that neighbouring positions share, and how often each was to be expected among its K, (G, K).

    `uniform` of them from all items, `in_batch` from the batch's own targets. Those are as frequent as their share (N,)
    of all targets, which is not that of all events: what is older than the rows is never a target.
    """
    groups = _groups(targets)  # none where a process has no user of a last, small batch
    drawn = torch.randint(1, len(share) + 1, (groups, uniform), device=targets.device)
    picked = targets[torch.randint(max(len(targets), 1), (groups, in_batch), device=targets.device)]
    negatives = torch.cat((drawn, picked), dim=1)
    return negatives, uniform / len(share) + in_batch * share[negatives - 1]


def sampled_softmax(hidden: Tensor, targets: Tensor, vectors: Tensor, negatives: Tensor, expected: Tensor) -> Tensor:
    """Summed cross-entropy against negatives (G, K) that neighbours share, instead of all items.

    Each negative's score is lowered by the log of how often it was to be expected, so that the sum over negatives
    estimates the sum over all items without bias (Bengio & Senecal 2008; Yi et al. 2019). The target's own score stays
    as it is: it is always there. A negative that is the target counts for nothing.
    """
    right = _positive_scores(hidden, targets, vectors)  # (P,)
    wrong = _negative_scores(hidden, targets, vectors, negatives) - _spread(expected.log(), len(hidden))  # (P, K)
    return (torch.logsumexp(torch.cat((right[:, None], wrong), dim=1), dim=1) - right).sum()


def binary(
    hidden: Tensor, targets: Tensor, vectors: Tensor, negatives: Tensor, power: float, level: float = 0.0
) -> Tensor:
    """Summed binary cross-entropy of targets and negatives (G, K) that neighbours share; `power` weighs positives.

    `level` is added to all scores, which changes no order of items. power 1 with one negative a position is SASRec's
    own loss; `positive_power` and `neutral_level` make it gBCE.
    """
    right = _positive_scores(hidden, targets, vectors) + level  # (P,)
    wrong = _negative_scores(hidden, targets, vectors, negatives) + level  # (P, K)
    return -(power * F.logsigmoid(right).sum() + F.logsigmoid(-wrong).sum())


def positive_power(negatives: int, item_count: int, calibration: float) -> float:
    """beta of gBCE (Petrov & Macdonald 2023, "gSASRec", section 5): 1 at calibration 0, the sampling rate at 1."""
    rate = min(1.0, negatives / max(item_count - 1, 1))
    return rate * (calibration * (1 - 1 / rate) + 1 / rate)


def neutral_level(negatives: int, power: float) -> float:
    """The score that all items have in the optimum of gBCE while nothing is known of any: 0 with one negative.

    Many negatives want all scores far below 0. Item vectors that are read as well as scored (gSASRec's own have a table
    for each) could only get there by a large part that they all have in common, beside which nothing else was learned:
    on MovieLens 100K validation NDCG@10 stayed at .03, popularity's.
    """
    return math.log(power / negatives)


def _positive_scores(hidden: Tensor, targets: Tensor, vectors: Tensor) -> Tensor:
    return (hidden * vectors[targets - 1]).sum(-1)  # (P, D) -> (P,)


def _negative_scores(hidden: Tensor, targets: Tensor, vectors: Tensor, negatives: Tensor) -> Tensor:
    """(P, K); -inf where a negative is the position's own target."""
    G, P = len(negatives), len(hidden)
    size = _size(G, P)
    grouped = F.pad(hidden, (0, 0, 0, G * size - P)).view(G, size, hidden.shape[1])
    scores = torch.bmm(grouped, vectors[negatives - 1].transpose(1, 2)).flatten(0, 1)[:P]
    return scores.masked_fill(_spread(negatives, P) == targets[:, None], -torch.inf)


def _spread(rows: Tensor, positions: int) -> Tensor:
    """(P, K) of what neighbouring positions share, (G, K): G groups of one size, the last of fewer."""
    return rows.repeat_interleave(_size(len(rows), positions), 0)[:positions]


def _size(groups: int, positions: int) -> int:
    return math.ceil(positions / max(groups, 1))


def _groups(targets: Tensor) -> int:
    return math.ceil(len(targets) / TOGETHER)
