"""The network: one transformer encoder over item sequences, with a causal switch.

SASRec (Kang & McAuley 2018) is the causal one, asked at the last item. BERT4Rec (Sun et al. 2019) sees
both sides and is asked at a MASK put behind the history. Everything else is the same: tied item
embeddings, forward positions, LayerNorm in each block and once at the end. How long ago events happened
may be told to attention: as a number added to its scores, for each bucket of time.

Shapes: B batch, T time, D width, H heads, N items.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.encoder import EncoderSpec
from shared.sequences import LARGEST_BUCKET, PAD
from trainer.config import BlockKind, ModelConfig
from trainer.items import Features, ItemTable

INIT_STD: Final = 0.02
HIDDEN: Final = -1e9  # added to a score that must not count; not -inf, which makes nan of a row of them


class View(NamedTuple):
    """Who asks in attention, and what they may look at. Q = T where every position asks."""

    at: Tensor | None  # (B, Q) positions that ask; None for all T of them
    hidden: Tensor | None  # what must not be seen: False, or `HIDDEN` where a bias is added; None is plainly causal
    ages: Tensor | None  # (B, Q, T) buckets of time, with a clock

    def of(self, x: Tensor) -> Tensor:
        """The rows of x (B, T, D) that ask, (B, Q, D)."""
        return x if self.at is None else x.gather(1, self.at[:, :, None].expand(-1, -1, x.shape[-1]))


class Attention(nn.Module):
    """Multi-head attention, (B, T, D) to (B, T, D); dropout falls on its weights, not on what comes out."""

    def __init__(self, config: ModelConfig, causal: bool) -> None:
        super().__init__()
        D = config.hidden_units
        self.causal, self.heads, self.dropout = causal, config.heads, config.dropout
        self.qkv = nn.Linear(D, 3 * D)
        self.out = nn.Linear(D, D)
        self.bias = RelativeBias(config) if config.position_bias or config.time_bias != "none" else None

    def forward(self, asking: Tensor, seen: Tensor, view: View) -> Tensor:
        """What `asking` (B, Q, D) finds in `seen` (B, T, D): (B, Q, D)."""
        B, T, D = seen.shape
        if asking is seen:
            q, k, v = self.qkv(seen).chunk(3, dim=-1)  # (B, T, D) each
        else:
            q = F.linear(asking, self.qkv.weight[:D], self.qkv.bias[:D])  # (B, Q, D)
            k, v = F.linear(seen, self.qkv.weight[D:], self.qkv.bias[D:]).chunk(2, dim=-1)  # (B, T, D) each
        q, k, v = (t.view(B, -1, self.heads, D // self.heads).transpose(1, 2) for t in (q, k, v))  # (B, H, Q or T, D/H)
        hidden = view.hidden
        if self.bias is not None:
            hidden = self.bias(T, view) + hidden  # (B or 1, H, Q, T)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, hidden, dropout_p=dropout, is_causal=self.causal and hidden is None)
        found: Tensor = self.out(y.transpose(1, 2).reshape(B, -1, D))  # (B, Q, D)
        return found


class RelativeBias(nn.Module):
    """What is added to attention scores: a learned number for each distance in places and in time, a head.

    As in HSTU (Zhai et al. 2024, "Actions speak louder than words", section 3.2), here on softmax attention.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.longest, heads = config.max_length, config.heads
        self.places = nn.Parameter(torch.zeros(heads, 2 * self.longest - 1)) if config.position_bias else None
        self.times = nn.Parameter(torch.zeros(heads, LARGEST_BUCKET + 1)) if config.time_bias != "none" else None

    def forward(self, T: int, view: View) -> Tensor:
        """(B or 1, H, Q, T); the view's ages are needed where time counts."""
        parts = []
        if self.places is not None:
            at = torch.arange(T, device=self.places.device)
            asked = at[None] if view.at is None else view.at  # (B or 1, Q)
            parts.append(self.places[:, asked[:, :, None] - at + self.longest - 1].transpose(0, 1))  # (B or 1, H, Q, T)
        if self.times is not None:
            assert view.ages is not None  # noqa: S101
            # Not nn.Embedding: its gradient takes ten times as long for a small table that is read so often.
            parts.append(self.times[:, view.ages].transpose(0, 1))  # (B, H, Q, T)
        return sum(parts[1:], parts[0])


class PreNormBlock(nn.Module):
    """Attention and a feed-forward layer, each normalised before and added after (Xiong et al. 2020)."""

    def __init__(self, config: ModelConfig, causal: bool) -> None:
        super().__init__()
        D, inner = config.hidden_units, config.hidden_units * config.feedforward
        self.dropout = config.dropout
        self.attention_norm, self.forward_norm = nn.LayerNorm(D, eps=1e-8), nn.LayerNorm(D, eps=1e-8)
        self.attention = Attention(config, causal)
        self.up, self.down = nn.Linear(D, inner), nn.Linear(inner, D)

    def forward(self, x: Tensor, view: View) -> Tensor:
        """x (B, T, D) to (B, Q, D)."""
        y = self.attention_norm(x)
        x = view.of(x) + self.drop(self.attention(view.of(y), y, view))
        inner = self.drop(F.gelu(self.up(self.forward_norm(x))))  # (B, Q, D * feedforward)
        return x + self.drop(self.down(inner))

    def drop(self, x: Tensor) -> Tensor:
        """Dropout with the block's probability."""
        return F.dropout(x, self.dropout, self.training)


class OriginalBlock(PreNormBlock):
    """SASRec's own (Kang & McAuley 2018, and their code): only the query is normalised, what is added is added to the
    normalised, and the feed-forward layer has ReLU.
    """

    def initialise(self) -> None:
        """Queries, keys and values start as torch's own attention lets them, and with it the published codes.

        For a width of 64 that is a standard deviation of .088, so that attention is sharper at first.
        """
        nn.init.xavier_uniform_(self.attention.qkv.weight)

    def forward(self, x: Tensor, view: View) -> Tensor:
        """x (B, T, D) to (B, Q, D)."""
        query = self.attention_norm(view.of(x))
        x = self.forward_norm(query + self.attention(query, x, view))
        inner = F.relu(self.drop(self.up(x)))  # (B, Q, D * feedforward)
        return x + self.drop(self.down(inner))


BLOCKS: Final[dict[BlockKind, type[PreNormBlock]]] = {"pre_norm": PreNormBlock, "original": OriginalBlock}


class Encoder(nn.Module):
    """Item indices (B, T) to hidden states (B, T, D); `query` picks the state that answers "what next?"."""

    largest_time: Tensor  # () largest bucket of time that training saw

    def __init__(self, config: ModelConfig, item_count: int, features: Features | None = None) -> None:
        super().__init__()
        self.item_count, self.dropout = item_count, config.dropout
        self.causal = config.kind == "sasrec"
        D = config.hidden_units
        self.items = ItemTable(item_count, D, config.metadata, features)
        self.longest = config.max_length
        self.positions = nn.Embedding(config.max_length, D) if config.positions == "learned" else None
        self.clock, self.biased = config.time_bias, config.position_bias or config.time_bias != "none"
        self.register_buffer("largest_time", torch.tensor(LARGEST_BUCKET if self.clock != "none" else 0))
        self.blocks = nn.ModuleList(BLOCKS[config.block](config, self.causal) for _ in range(config.blocks))
        self.norm = nn.LayerNorm(D, eps=1e-8)
        self.apply(self._initialise)
        self.items.start()

    @staticmethod
    def _initialise(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=INIT_STD)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, OriginalBlock):  # behind its layers: `apply` comes to them first
            module.initialise()

    def forward(self, items: Tensor, ages: Tensor | None = None, table: Tensor | None = None) -> Tensor:
        """Hidden states (B, T, D) of right-padded item indices (B, T); with a clock, ages (B, T, T) are needed.

        `table` (N + 2, D) is what `self.items()` gave: who needs it more than once makes it once.
        """
        x, view = self.read(items, ages, table)
        for block in self.blocks:
            x = block(x, view)
        states: Tensor = self.norm(x)
        return states

    def read(self, items: Tensor, ages: Tensor | None, table: Tensor | None) -> tuple[Tensor, View]:
        """What the first block gets: (B, T, D), and all positions asking."""
        _, T = items.shape
        table = self.items() if table is None else table
        x = F.embedding(items, table, padding_idx=PAD) * math.sqrt(table.shape[1])  # (B, T, D)
        if self.positions is not None:
            x = x + self.positions(torch.arange(T, device=items.device))  # (B, T, D)
        x = F.dropout(x, self.dropout, self.training)
        return x, View(None, self.hidden(items), None if ages is None else ages.long())

    def hidden(self, items: Tensor) -> Tensor | None:
        """What attention must not look at: False, or `HIDDEN` where a bias is added; None for plain causal attention.

        Behind a causal mask right padding is never looked at by real positions; both-sided attention must be told.
        """
        if not self.causal:
            T = items.shape[1]
            real = (items != PAD)[:, None, None, :].expand(-1, -1, T, -1)  # (B, 1, T, T): ONNX spreads no mask over Q
            return torch.where(real, 0.0, HIDDEN) if self.biased else real
        if not self.biased:
            return None
        at = torch.arange(items.shape[1], device=items.device)
        return torch.where(at[:, None] >= at, 0.0, HIDDEN)  # (T, T)

    def query(self, items: Tensor, lengths: Tensor, ages: Tensor | None = None, table: Tensor | None = None) -> Tensor:
        """Query vectors (B, D): the state at the last real position of each row, MASK counting as real.

        In the last block nobody else needs to ask, which saves nearly half of a network of two.
        """
        x, view = self.read(items, ages, table)
        for block in self.blocks[:-1]:
            x = block(x, view)
        x = self.blocks[-1](x, self.last(view, items.shape[1], lengths))  # (B, 1, D)
        query: Tensor = self.norm(x.squeeze(1))
        return query

    def last(self, view: View, T: int, lengths: Tensor) -> View:
        """The view of each row's last real position alone: it sees all that are real."""
        at = lengths[:, None] - 1  # (B, 1)
        real = (torch.arange(T, device=lengths.device) <= at)[:, None, None, :]  # (B, 1, 1, T)
        ages = None if view.ages is None else view.ages.gather(1, at[:, :, None].expand(-1, -1, T))  # (B, 1, T)
        return View(at, torch.where(real, 0.0, HIDDEN) if self.biased else real, ages)

    def spec(self) -> EncoderSpec:
        """What must be known to feed it."""
        return EncoderSpec(
            architecture="sasrec" if self.causal else "bert4rec",
            item_count=self.item_count,
            width=self.norm.normalized_shape[0],
            max_length=self.longest,
            asks_with_mask=not self.causal,
            clock=self.clock,
            largest_time=int(self.largest_time),
        )

    @property
    def vectors(self) -> Tensor:
        """Item vectors (N, D): row r belongs to item index r + 1. A score is `vectors[r] · query`."""
        return self.vectors_of(self.items())

    def vectors_of(self, table: Tensor) -> Tensor:
        """The same (N, D) of a table (N + 2, D) that was made already."""
        return table[1 : self.item_count + 1]
