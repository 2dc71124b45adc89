"""What is minimised: which positions are asked, what is hidden, and over which items softmax runs."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trainer.objectives import cross_entropy, mask_items, shift

N = 20
MASK = N + 1


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rectangle(histories: list[list[int]]) -> Tensor:
    T = max(map(len, histories))
    return torch.tensor([h + [0] * (T - len(h)) for h in histories])


def masked(rows: Tensor, probability: float = 0.2, last: float = 0.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    return mask_items(rows, probability, last, N, generator(seed))


def test_shift_asks_for_the_next_item() -> None:
    inputs, targets = shift(torch.tensor([[7, 8, 9, 0], [1, 2, 0, 0]]))
    assert inputs.tolist() == [[7, 8, 9], [1, 2, 0]]
    assert targets.tolist() == [[8, 9, 0], [2, 0, 0]]  # the last real item has no successor


def test_hidden_items_are_80_percent_mask_10_noise_10_themselves() -> None:
    rows = torch.randint(1, N + 1, (2_000, 20), generator=generator(1))
    inputs, targets = masked(rows, 0.3)
    chosen = targets > 0
    total = int(chosen.sum())
    assert total / rows.numel() == pytest.approx(0.3, abs=0.01)
    assert int((inputs == MASK).sum()) / total == pytest.approx(0.8, abs=0.02)
    same = int(((inputs == rows) & chosen).sum()) / total
    other = int(((inputs != rows) & (inputs != MASK)).sum()) / total
    assert other == pytest.approx(0.1 * (1 - 1 / N), abs=0.01)  # noise hits the item itself once in N draws
    assert same == pytest.approx(0.1 * (1 + 1 / N), abs=0.01)


def test_noise_is_any_item() -> None:
    rows = torch.full((500, 40), 7)
    inputs, _ = masked(rows, 0.5)
    assert set(inputs.flatten().tolist()) == {*range(1, N + 1), MASK}


def test_with_last_probability_1_the_last_item_alone_is_asked_and_always_behind_a_mask() -> None:
    inputs, targets = masked(torch.tensor([[7, 8, 9, 0], [4, 0, 0, 0], [1, 2, 3, 4]] * 50), 0.9, last=1.0)
    assert inputs.tolist() == [[7, 8, MASK, 0], [MASK, 0, 0, 0], [1, 2, 3, MASK]] * 50
    assert targets.tolist() == [[0, 0, 9, 0], [4, 0, 0, 0], [0, 0, 0, 4]] * 50


def test_last_probability_is_a_share_of_rows() -> None:
    _, targets = masked(torch.full((4_000, 10), 3), 0.5, last=0.3)
    only_last = ((targets > 0).sum(1) == 1) & (targets[:, -1] > 0)
    assert float(only_last.float().mean()) == pytest.approx(0.3, abs=0.03)


@given(
    st.lists(st.lists(st.integers(1, N), min_size=1, max_size=8), min_size=1, max_size=8),
    st.floats(0.01, 0.99),
    st.floats(0, 1),
    st.integers(0, 1_000),
)
def test_whatever_is_hidden(histories: list[list[int]], probability: float, last: float, seed: int) -> None:
    rows = rectangle(histories)
    before = rows.clone()
    inputs, targets = masked(rows, probability, last, seed)
    assert torch.equal(rows, before)
    chosen = targets > 0
    assert chosen.any(1).all()  # every row hides one at least
    assert not (chosen & (rows == 0)).any()  # PAD is never asked
    assert torch.equal(inputs == 0, rows == 0)  # nor filled
    assert torch.equal(targets[chosen], rows[chosen])
    assert torch.equal(inputs[~chosen], rows[~chosen])
    assert int(targets.max()) <= N  # MASK is an input and never an answer
    assert int(inputs.max()) <= MASK


def test_the_same_seed_hides_the_same() -> None:
    rows = torch.randint(1, N + 1, (20, 10), generator=generator(1))
    first, second, third = (masked(rows, seed=s)[0] for s in (5, 5, 6))
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


def naive(hidden: Tensor, targets: Tensor, vectors: Tensor) -> float:
    """The definition, position by position over items 1..N."""
    loss = 0.0
    for state, target in zip(hidden.flatten(0, 1).tolist(), targets.flatten().tolist(), strict=True):
        if target:
            logits = [sum(a * b for a, b in zip(state, vector, strict=True)) for vector in vectors.tolist()]
            loss += math.log(sum(math.exp(x) for x in logits)) - logits[target - 1]
    return loss


def test_cross_entropy_is_the_sum_over_positions_with_a_target() -> None:
    hidden = torch.randn(3, 4, 5, generator=generator())
    vectors = torch.randn(N, 5, generator=generator(1))
    targets = torch.tensor([[1, 2, 0, 0], [N, 0, 0, 0], [3, 4, 5, 6]])
    assert float(cross_entropy(hidden, targets, vectors)) == pytest.approx(naive(hidden, targets, vectors), rel=1e-5)


def test_softmax_runs_over_all_items_and_nothing_else() -> None:
    """With all scores alike every one of N items has 1/N: neither PAD nor MASK takes a share."""
    loss = cross_entropy(torch.zeros(1, 1, 4), torch.tensor([[1]]), torch.zeros(N, 4))
    assert float(loss) == pytest.approx(math.log(N))


def test_no_target_costs_nothing() -> None:
    assert float(cross_entropy(torch.ones(1, 2, 4), torch.zeros(1, 2, dtype=torch.int64), torch.ones(N, 4))) == 0
