"""The network: who may look at what, and where the query is read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from shared.sequences import LARGEST_BUCKET
from tests.trained import KINDS, Kind, config
from trainer.transformer import INIT_STD, Encoder, View

N, T = 20, 10
MASK = N + 1


def network(kind: Kind, **model: Any) -> Encoder:
    """An untrained network with weights large enough that every difference shows."""
    torch.manual_seed(0)
    settings = config(kind, model={"max_length": T, "heads": 2, "blocks": 2, "dropout": 0.5, **model})
    encoder = Encoder(settings.model, N).eval()
    with torch.no_grad():
        for name, weight in encoder.named_parameters():
            if "norm" not in name:
                weight.copy_(torch.randn(weight.shape) * 0.3)
        encoder.items.ids.weight[0] = 0
    return encoder


def states(encoder: Encoder, *rows: list[int]) -> Tensor:
    """With a clock, events i and j are bucket |i - j| apart, whatever else is in the row."""
    at = torch.arange(len(rows[0]))
    ages = None if encoder.clock == "none" else (at[:, None] - at).abs().expand(len(rows), -1, -1)
    with torch.no_grad():
        found: Tensor = encoder(torch.tensor(rows), ages)
    return found


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def test_causal_states_do_not_see_later_items() -> None:
    encoder = network("sasrec")
    one, other = states(encoder, [1, 2, 3, 4, 5], [1, 2, 3, 9, 8])
    assert apart(one[:3], other[:3]) < 1e-6
    assert apart(one[3], other[3]) > 1e-2


def test_causal_states_see_all_earlier_items() -> None:
    one, other = states(network("sasrec"), [1, 2, 3, 4], [9, 2, 3, 4])
    assert all(apart(one[t], other[t]) > 1e-3 for t in range(4))


def test_both_sided_states_see_later_items() -> None:
    one, other = states(network("bert4rec"), [1, MASK, 3, 4], [1, MASK, 3, 9])
    assert apart(one[1], other[1]) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_padding_does_not_change_real_states(kind: Kind) -> None:
    encoder = network(kind)
    bare = states(encoder, [1, 2, 3])
    padded = states(encoder, [1, 2, 3, 0, 0, 0], [4, 5, 6, 7, 8, 9])
    assert apart(bare[0], padded[0, :3]) < 1e-5


def test_without_the_key_mask_padding_would_be_seen() -> None:
    """The test above can fail: the same network that is not told of its padding answers otherwise."""
    encoder = network("bert4rec")
    x = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(1))
    keys = torch.tensor([[[[True, True, True, False, False]]]])
    with torch.no_grad():
        block: Any = encoder.blocks[0]
        everybody = View(None, None, None)
        assert apart(block(x, View(None, keys, None))[:, :3], block(x[:, :3], everybody)) < 1e-5
        assert apart(block(x, everybody)[:, :3], block(x[:, :3], everybody)) > 1e-2


@pytest.mark.parametrize("options", [{}, {"blocks": 1}, {"position_bias": True, "time_bias": "query"}])
@pytest.mark.parametrize("block", ["pre_norm", "original"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_query_is_the_state_at_the_last_real_position(kind: Kind, block: str, options: dict[str, Any]) -> None:
    """`query` lets only that position ask in the last block; `forward` lets all of them."""
    encoder = network(kind, block=block, **options)
    items, lengths = torch.tensor([[1, 2, 3, 0], [4, 0, 0, 0], [5, 6, 7, 8]]), torch.tensor([3, 1, 4])
    ages = torch.randint(0, 40, (3, 4, 4), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        hidden, queries = encoder(items, ages), encoder.query(items, lengths, ages)
    assert apart(queries, torch.stack([hidden[0, 2], hidden[1, 0], hidden[2, 3]])) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_item_vectors_leave_out_pad_and_mask(kind: Kind) -> None:
    encoder = network(kind)
    assert encoder.vectors.shape == (N, 32)
    assert torch.equal(encoder.vectors, encoder.items.ids.weight[1:-1])
    assert not Encoder(config(kind).model, N).items.ids.weight[0].any()


def test_order_matters() -> None:
    one, other = states(network("sasrec"), [1, 2, 3], [2, 1, 3])
    assert apart(one[2], other[2]) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_pad_gets_no_gradient(kind: Kind) -> None:
    encoder = network(kind, dropout=0.0).train()
    states = encoder(torch.tensor([[1, 2, 0]]))  # (1, 3, D), normalised: their plain sum is the same for all weights
    (states * torch.arange(states.shape[-1])).sum().backward()
    gradient = encoder.items.ids.weight.grad
    assert gradient is not None
    assert not gradient[0].any()
    assert gradient[1].any()


def test_dropout_is_off_in_evaluation_and_on_in_training() -> None:
    encoder = network("sasrec")
    assert torch.equal(states(encoder, [1, 2]), states(encoder, [1, 2]))
    encoder.train()
    assert not torch.equal(states(encoder, [1, 2]), states(encoder, [1, 2]))


# --- options --------------------------------------------------------------------------------------------------

OPTIONS: list[dict[str, Any]] = [
    {"block": "original"},
    {"position_bias": True, "positions": "none"},
    {"time_bias": "query"},
    {"time_bias": "query", "position_bias": True, "block": "original"},
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_with_every_option_nobody_looks_ahead_and_padding_is_not_seen(kind: Kind, options: dict[str, Any]) -> None:
    encoder = network(kind, **options)
    bare = states(encoder, [1, 2, 3])
    padded = states(encoder, [1, 2, 3, 0, 0], [1, 2, 3, 8, 9])
    assert apart(bare[0], padded[0, :3]) < 1e-4
    ahead = apart(bare[0, :3], padded[1, :3])
    assert ahead < 1e-4 if kind == "sasrec" else ahead > 1e-2


def test_the_original_block_is_that_of_sasrec() -> None:
    """Against the published code, line by line: torch's own attention, a boolean mask for what comes later."""
    encoder = network("sasrec", block="original", blocks=1)
    block: Any = encoder.blocks[0]
    theirs = torch.nn.MultiheadAttention(32, 2, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(block.attention.qkv.weight)
        theirs.in_proj_bias.copy_(block.attention.qkv.bias)
        theirs.out_proj.load_state_dict(block.attention.out.state_dict())
        x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))
        later = ~torch.tril(torch.ones(5, 5, dtype=torch.bool))
        query = block.attention_norm(x)
        y = query + theirs(query, x, x, attn_mask=later, need_weights=False)[0]
        y = block.forward_norm(y)
        y = y + block.down(torch.relu(block.up(y)))
        assert apart(y, block(x, View(None, None, None))) < 1e-4


@pytest.mark.parametrize("block", ["pre_norm", "original"])
def test_how_attention_starts(block: str) -> None:
    torch.manual_seed(0)
    attention: Any = Encoder(config("sasrec", model={"block": block, "hidden_units": 64}).model, N).blocks[0].attention
    theirs = float(torch.nn.MultiheadAttention(64, 1).in_proj_weight.detach().std())
    assert float(attention.qkv.weight.detach().std()) == pytest.approx(
        theirs if block == "original" else INIT_STD, rel=0.05
    )
    assert float(attention.out.weight.detach().std()) == pytest.approx(INIT_STD, rel=0.05)


def test_ages_and_places_count() -> None:
    encoder = network("sasrec", time_bias="query")
    items, lengths, near = torch.tensor([[1, 2, 3]]), torch.tensor([3]), torch.zeros(1, 3, 3, dtype=torch.int64)
    far = near.clone()
    far[0, 2, 0] = 40
    with torch.no_grad():
        assert apart(encoder.query(items, lengths, near), encoder.query(items, lengths, far)) > 1e-3
    assert encoder.spec().largest_time == LARGEST_BUCKET
    # One block: with more, each event's state tells what was before it.
    by_place = network("sasrec", positions="none", position_bias=True, blocks=1)
    one, other = states(by_place, [1, 2, 3], [2, 1, 3])
    assert apart(one[2], other[2]) > 1e-3
    without = network("sasrec", positions="none", blocks=1)
    one, other = states(without, [1, 2, 3], [2, 1, 3])
    assert apart(one[2], other[2]) < 1e-5  # nothing tells the order of the earlier ones


def test_a_bias_of_nothing_changes_nothing() -> None:
    plain, told = network("sasrec"), network("sasrec", time_bias="events", position_bias=True)
    told.load_state_dict(plain.state_dict(), strict=False)
    with torch.no_grad():
        for name, weight in told.named_parameters():
            if "bias.times" in name or "bias.places" in name:
                weight.zero_()
    assert apart(states(plain, [1, 2, 3, 4]), states(told, [1, 2, 3, 4])) < 1e-5
