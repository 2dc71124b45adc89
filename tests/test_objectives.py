"""What is minimised: which positions are asked, what is hidden, and over which items softmax runs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trainer import objectives
from trainer.config import TrainingConfig
from trainer.objectives import (
    TOGETHER,
    binary,
    dice,
    draw,
    full_cross_entropy,
    loss_of,
    mask_items,
    neutral_level,
    positive_power,
    sampled_softmax,
    shift,
)

N = 20
MASK = N + 1


def cross_entropy(hidden: Tensor, targets: Tensor, vectors: Tensor) -> Tensor:
    return loss_of(hidden, targets, vectors, TrainingConfig(), torch.full((len(vectors),), 1 / len(vectors)))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rectangle(histories: list[list[int]]) -> Tensor:
    T = max(map(len, histories))
    return torch.tensor([h + [0] * (T - len(h)) for h in histories])


def masked(rows: Tensor, probability: float = 0.2, last: float = 0.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    return mask_items(rows, torch.arange(len(rows)), probability, last, N, (0, seed))


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


def test_what_a_user_hides_depends_on_nobody_else() -> None:
    rows = torch.randint(1, N + 1, (20, 10), generator=generator(1))
    users = torch.arange(100, 120)
    inputs, targets = mask_items(rows, users, 0.3, 0.2, N, (3, 7))
    order = torch.randperm(20, generator=generator(2))[:8]
    some = mask_items(rows[order], users[order], 0.3, 0.2, N, (3, 7))
    assert torch.equal(some[0], inputs[order])
    assert torch.equal(some[1], targets[order])
    for seed in ((3, 8), (4, 7)):  # another epoch, another seed
        assert not torch.equal(mask_items(rows, users, 0.3, 0.2, N, seed)[1], targets)
    assert not torch.equal(mask_items(rows, users + 1, 0.3, 0.2, N, (3, 7))[1], targets)
    padded = mask_items(torch.nn.functional.pad(rows, (0, 3)), users, 0.3, 0.2, N, (3, 7))
    assert torch.equal(padded[0][:, :10], inputs), "a longer row in the batch moves nothing"
    assert torch.equal(padded[1][:, :10], targets)


def test_dice_are_uniform_and_independent() -> None:
    thrown = dice(torch.arange(2_000), 50, (0, 0))
    assert float(thrown.min()) >= 0
    assert float(thrown.max()) < 1
    shares = torch.histc(thrown, 10, 0, 1) / thrown.numel()
    assert float((shares - 0.1).abs().max()) < 0.005
    for other in (thrown.roll(1, 0), thrown.roll(1, 1), dice(torch.arange(2_000), 50, (0, 1))):
        assert abs(float(torch.corrcoef(torch.stack((thrown.flatten(), other.flatten())))[0, 1])) < 0.02


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


# --- full cross-entropy in chunks ---------------------------------------------------------------------

P, D = 13, 5


def problem(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states (P, D), targets (P,), item vectors (N, D), in double precision, with gradients wanted."""
    dice = generator(seed)
    hidden = torch.randn(P, D, generator=dice, dtype=torch.float64, requires_grad=True)
    vectors = torch.randn(N, D, generator=dice, dtype=torch.float64, requires_grad=True)
    return hidden, torch.randint(1, N + 1, (P,), generator=dice), vectors


def gradients(loss: Tensor, *of: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, of)


@pytest.mark.parametrize("chunk", [1, 4, P, 100, None])
def test_chunks_change_neither_loss_nor_gradients(chunk: int | None) -> None:
    hidden, targets, vectors = problem()
    plain = torch.nn.functional.cross_entropy(hidden @ vectors.T, targets - 1, reduction="sum")
    found = full_cross_entropy(hidden, targets, vectors, chunk)
    torch.testing.assert_close(found, plain)
    wanted, got = (gradients(3 * loss, hidden, vectors) for loss in (plain, found))
    for a, b in zip(wanted, got, strict=True):
        torch.testing.assert_close(a, b)


def test_the_gradient_is_the_slope() -> None:
    hidden, targets, vectors = problem()
    assert torch.autograd.gradcheck(lambda h, v: full_cross_entropy(h, targets, v, 4), (hidden, vectors))


def test_no_table_of_all_positions_and_items_is_made() -> None:
    """The largest tensor that any operation makes, of 400 positions and 500 items in chunks of 10."""
    hidden, vectors = torch.randn(400, 4, requires_grad=True), torch.randn(500, 4, requires_grad=True)
    targets = torch.randint(1, 501, (400,))
    with Largest() as made:
        gradients(full_cross_entropy(hidden, targets, vectors, 10), hidden, vectors)
    assert made.elements == 10 * 500
    with Largest() as made:
        gradients(torch.nn.functional.cross_entropy(hidden @ vectors.T, targets - 1), hidden, vectors)
    assert made.elements == 400 * 500


class Largest(torch.utils._python_dispatch.TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Watches the size of what every operation returns."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, tuple | list) else [found]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return found


# --- sampled losses against their formulas, term by term ----------------------------------------------


@pytest.mark.parametrize("groups", [1, 2, P])
def test_sampled_softmax_is_its_formula(groups: int) -> None:
    hidden, targets, vectors = problem()
    negatives = torch.randint(1, N + 1, (groups, 4), generator=generator(1))
    expected = torch.rand((groups, 4), generator=generator(2), dtype=torch.float64) * 2
    wanted = 0.0
    for at, (h, t) in enumerate(zip(hidden.tolist(), targets.tolist(), strict=True)):
        score = [sum(a * b for a, b in zip(h, v, strict=True)) for v in vectors.tolist()]
        drawn = zip(*(rows[at // math.ceil(P / groups)].tolist() for rows in (negatives, expected)), strict=True)
        rivals = [score[n - 1] - math.log(e) for n, e in drawn if n != t]
        wanted += math.log(sum(map(math.exp, [score[t - 1], *rivals]))) - score[t - 1]
    assert sampled_softmax(hidden, targets, vectors, negatives, expected).item() == pytest.approx(wanted)


@pytest.mark.parametrize(("uniform", "in_batch"), [(40_000, 0), (10_000, 30_000)])
def test_with_many_negatives_sampled_softmax_is_the_full_one(uniform: int, in_batch: int) -> None:
    """The correction makes the sample stand for all items, however uneven the batch's items are."""
    torch.manual_seed(0)
    share = torch.softmax(torch.randn(N), 0)
    targets = torch.multinomial(share, 5_000, replacement=True) + 1
    hidden, vectors = torch.randn(5_000, D), torch.randn(N, D)
    negatives, expected = draw(targets, share, uniform, in_batch)
    assert negatives.shape == expected.shape == (math.ceil(5_000 / TOGETHER), uniform + in_batch)
    few = slice(0, 200)
    sampled = float(sampled_softmax(hidden[few], targets[few], vectors, negatives[:3], expected[:3]))
    assert sampled == pytest.approx(float(full_cross_entropy(hidden[few], targets[few], vectors)), rel=0.02)


def test_expected_counts_are_those_of_the_draw() -> None:
    torch.manual_seed(0)
    share = torch.softmax(torch.randn(N), 0)
    targets = torch.multinomial(share, 50_000, replacement=True) + 1
    negatives, expected = (found.flatten() for found in draw(targets, share, 50, 50))
    counts = torch.bincount(negatives, minlength=N + 1)[1:].float()
    by_item = torch.zeros(N).scatter_(0, negatives - 1, expected)  # of each group
    torch.testing.assert_close(counts, by_item * math.ceil(50_000 / TOGETHER), rtol=0.1, atol=0)


def test_what_is_never_a_target_is_expected_from_the_catalogue_alone() -> None:
    share = torch.tensor([0.75, 0.25, 0.0, 0.0])
    ((negatives,), (expected,)) = draw(torch.tensor([1, 1, 1, 2]), share, 8, 6)
    wanted = {1: 8 / 4 + 6 * 0.75, 2: 8 / 4 + 6 * 0.25, 3: 8 / 4, 4: 8 / 4}
    assert expected.tolist() == pytest.approx([wanted[n] for n in negatives.tolist()])
    assert set(negatives[8:].tolist()) <= {1, 2}
    assert torch.isfinite(expected.log()).all()


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("groups", [1, 3, P - 1, P])
@pytest.mark.parametrize("power", [1.0, 0.3])
@pytest.mark.parametrize("added", [0.0, -2.0])
def test_binary_losses_are_their_formula(groups: int, power: float, added: float) -> None:
    hidden, targets, vectors = problem()
    negatives = torch.randint(1, N + 1, (groups, 4), generator=generator(1))
    rows = [negatives[at // math.ceil(P / groups)].tolist() for at in range(P)]
    wanted = 0.0
    for h, t, row in zip(hidden.tolist(), targets.tolist(), rows, strict=True):
        score = [added + sum(a * b for a, b in zip(h, v, strict=True)) for v in vectors.tolist()]
        wanted -= math.log(sigmoid(score[t - 1]) ** power)
        wanted -= sum(math.log(1 - sigmoid(score[n - 1])) for n in row if n != t)
    assert binary(hidden, targets, vectors, negatives, power, added).item() == pytest.approx(wanted)


def test_the_power_of_gbce_by_hand() -> None:
    """Sampling rate 1/4: beta is rate * (t * (1 - 4) + 4)."""
    assert positive_power(5, 21, 0.0) == pytest.approx(1)
    assert positive_power(5, 21, 1.0) == pytest.approx(1 / 4)
    assert positive_power(5, 21, 0.5) == pytest.approx((0.5 * -3 + 4) / 4)
    assert positive_power(100, 21, 0.75) == 1  # all items: nothing to calibrate


@pytest.mark.parametrize(("negatives", "calibration"), [(1, 0.0), (8, 0.0), (8, 0.75), (200, 1.0)])
def test_at_the_level_of_gbce_equal_scores_are_pushed_nowhere(negatives: int, calibration: float) -> None:
    """In expectation: an item is the target one time in N, and one of the negatives K times in N - 1 otherwise."""
    power = positive_power(negatives, 1_000, calibration)
    share = sigmoid(neutral_level(negatives, power))
    up, down = power * (1 - share) / 1_000, negatives / 999 * share * (1 - 1 / 1_000)
    assert up == pytest.approx(down)


@pytest.mark.parametrize("calibration", [0.0, 0.4, 1.0])
def test_gbce_weighs_the_positive_as_the_settings_say(calibration: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objectives, "TOGETHER", 5)
    hidden, targets, vectors = problem()
    settings = TrainingConfig(loss="gbce", negatives=8, calibration=calibration)
    torch.manual_seed(3)
    found = loss_of(hidden[None], targets[None], vectors, settings, torch.full((N,), 1 / N))
    torch.manual_seed(3)
    drawn = torch.randint(1, N + 1, (3, 8))
    power, other = positive_power(8, N, calibration), positive_power(8, N, 0.75)
    torch.testing.assert_close(found, binary(hidden, targets, vectors, drawn, power, neutral_level(8, power)))
    assert not torch.isclose(found, binary(hidden, targets, vectors, drawn, other, neutral_level(8, other)))


def test_a_drawn_target_moves_nothing() -> None:
    """Its gradient is that of the loss without it, and no nan."""
    hidden, targets, vectors = problem()
    targets = torch.full_like(targets, 4)
    with_it, without = torch.tensor([[4, 9]]), torch.tensor([[9]])
    one = torch.ones((1, 2), dtype=torch.float64)
    pairs = [
        (binary(hidden, targets, vectors, with_it, 1.0), binary(hidden, targets, vectors, without, 1.0)),
        (
            sampled_softmax(hidden, targets, vectors, with_it, one),
            sampled_softmax(hidden, targets, vectors, without, one[:, :1]),
        ),
    ]
    for a, b in pairs:
        for x, y in zip(gradients(a, hidden, vectors), gradients(b, hidden, vectors), strict=True):
            torch.testing.assert_close(x, y)


LOSSES: list[dict[str, Any]] = [
    {"loss": "cross_entropy"},
    {"loss": "sampled_softmax", "negatives": 8},
    {"loss": "sampled_softmax", "negatives": 4, "in_batch_negatives": 6},
    {"loss": "gbce", "negatives": 8},
    {"loss": "bce"},
]


@pytest.mark.parametrize("settings", LOSSES, ids=str)
def test_every_loss_reads_positions_with_a_target_alone(settings: dict[str, Any]) -> None:
    hidden, targets, vectors = problem()
    rows, share = hidden.view(1, P, D), torch.full((N,), 1 / N, dtype=torch.float64)
    asked = targets.clone()
    asked[3:] = 0
    torch.manual_seed(0)
    loss = loss_of(rows, asked.view(1, P), vectors, TrainingConfig(**settings), share)
    (found,) = gradients(loss, hidden)
    assert loss.item() > 0
    assert found[:3].all()
    assert not found[3:].any()
