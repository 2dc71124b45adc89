"""The network: one pre-norm transformer encoder over item sequences, with a causal switch.

SASRec (Kang & McAuley 2018) is the causal one, asked at the last item. BERT4Rec (Sun et al. 2019) sees
both sides and is asked at a MASK put behind the history. Everything else is the same: tied item
embeddings, forward learned positions, LayerNorm before each part (Xiong et al. 2020) and once at the end.

Shapes: B batch, T time, D width, H heads, N items.
"""

from __future__ import annotations

import math
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.sequences import PAD
from trainer.config import ModelConfig
from trainer.items import ItemTable

INIT_STD: Final = 0.02


class Block(nn.Module):
    """Self-attention and a feed-forward layer, each normalised before and added after."""

    def __init__(self, config: ModelConfig, causal: bool) -> None:
        super().__init__()
        D, inner = config.hidden_units, config.hidden_units * config.feedforward
        self.causal, self.heads, self.dropout = causal, config.heads, config.dropout
        self.attention_norm = nn.LayerNorm(D, eps=1e-8)
        self.qkv = nn.Linear(D, 3 * D)
        self.out = nn.Linear(D, D)
        self.forward_norm = nn.LayerNorm(D, eps=1e-8)
        self.up = nn.Linear(D, inner)
        self.down = nn.Linear(inner, D)

    def forward(self, x: Tensor, keys: Tensor | None) -> Tensor:
        """x (B, T, D); keys (B, 1, 1, T), False where attention must not look, or None when causal."""
        x = x + self.attend(self.attention_norm(x), keys)
        hidden = self.drop(F.gelu(self.up(self.forward_norm(x))))  # (B, T, D * feedforward)
        return x + self.drop(self.down(hidden))

    def attend(self, x: Tensor, keys: Tensor | None) -> Tensor:
        """Multi-head attention, (B, T, D) to (B, T, D)."""
        B, T, D = x.shape
        q, k, v = (t.view(B, T, self.heads, -1).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))  # (B, H, T, D/H)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=keys, dropout_p=dropout, is_causal=self.causal)
        y = y.transpose(1, 2).reshape(B, T, D)  # (B, T, D)
        return self.drop(self.out(y))

    def drop(self, x: Tensor) -> Tensor:
        """Dropout with the block's probability."""
        return F.dropout(x, self.dropout, self.training)


class Encoder(nn.Module):
    """Item indices (B, T) to hidden states (B, T, D); `query` picks the state that answers "what next?"."""

    def __init__(self, config: ModelConfig, item_count: int) -> None:
        super().__init__()
        self.item_count, self.dropout = item_count, config.dropout
        self.causal = config.kind == "sasrec"
        D = config.hidden_units
        self.items = ItemTable(item_count, D)
        self.positions = nn.Embedding(config.max_length, D)
        self.blocks = nn.ModuleList(Block(config, self.causal) for _ in range(config.blocks))
        self.norm = nn.LayerNorm(D, eps=1e-8)
        self.apply(self._initialise)
        with torch.no_grad():
            self.items.ids.weight[PAD].zero_()

    @staticmethod
    def _initialise(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=INIT_STD)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    def forward(self, items: Tensor, table: Tensor | None = None) -> Tensor:
        """Hidden states (B, T, D) of right-padded item indices (B, T).

        `table` (N + 2, D) is what `self.items()` gave: who needs it more than once makes it once.
        """
        _, T = items.shape
        table = self.items() if table is None else table
        x = F.embedding(items, table, padding_idx=PAD) * math.sqrt(table.shape[1])  # (B, T, D)
        x = x + self.positions(torch.arange(T, device=items.device))  # (B, T, D)
        x = F.dropout(x, self.dropout, self.training)
        # Behind a causal mask right padding is never looked at by real positions; both-sided attention must be told.
        keys = None if self.causal else (items != PAD)[:, None, None, :]  # (B, 1, 1, T)
        for block in self.blocks:
            x = block(x, keys)
        states: Tensor = self.norm(x)
        return states

    def query(self, items: Tensor, lengths: Tensor, table: Tensor | None = None) -> Tensor:
        """Query vectors (B, D): the state at the last real position of each row, MASK counting as real."""
        hidden: Tensor = self(items, table)  # (B, T, D)
        at = (lengths - 1)[:, None, None].expand(-1, 1, hidden.shape[-1])  # (B, 1, D)
        return hidden.gather(1, at).squeeze(1)  # (B, D)

    @property
    def vectors(self) -> Tensor:
        """Item vectors (N, D): row r belongs to item index r + 1. A score is `vectors[r] · query`."""
        return self.vectors_of(self.items())

    def vectors_of(self, table: Tensor) -> Tensor:
        """The same (N, D) of a table (N + 2, D) that was made already."""
        return table[1 : self.item_count + 1]
