"""The network: who may look at what, and where the query is read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.trained import KINDS, Kind, config
from trainer.transformer import Encoder

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
    with torch.no_grad():
        found: Tensor = encoder(torch.tensor(rows))
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
        assert apart(block(x, keys)[:, :3], block(x[:, :3], None)) < 1e-5
        assert apart(block(x, None)[:, :3], block(x[:, :3], None)) > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_the_query_is_the_state_at_the_last_real_position(kind: Kind) -> None:
    encoder = network(kind)
    items, lengths = torch.tensor([[1, 2, 3, 0], [4, 0, 0, 0], [5, 6, 7, 8]]), torch.tensor([3, 1, 4])
    with torch.no_grad():
        hidden, queries = encoder(items), encoder.query(items, lengths)
    assert torch.equal(queries, torch.stack([hidden[0, 2], hidden[1, 0], hidden[2, 3]]))


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
    encoder(torch.tensor([[1, 2, 0]])).sum().backward()
    gradient = encoder.items.ids.weight.grad
    assert gradient is not None
    assert not gradient[0].any()
    assert gradient[1].any()


def test_dropout_is_off_in_evaluation_and_on_in_training() -> None:
    encoder = network("sasrec")
    assert torch.equal(states(encoder, [1, 2]), states(encoder, [1, 2]))
    encoder.train()
    assert not torch.equal(states(encoder, [1, 2]), states(encoder, [1, 2]))
