"""Item vectors: one table that the whole model shares.

The encoder reads its inputs from this table, the loss scores against it, and the bundle's `vectors` are its rows.

Shapes: N items, D width.
"""

from __future__ import annotations

from torch import Tensor, nn

from shared.sequences import PAD


class ItemTable(nn.Module):
    """The vector of each item index: PAD, 1..N, MASK."""

    def __init__(self, item_count: int, width: int) -> None:
        super().__init__()
        self.item_count = item_count
        self.ids = nn.Embedding(item_count + 2, width, padding_idx=PAD)

    def forward(self) -> Tensor:
        """The table (N + 2, D), PAD's row zero. Made once a step: inputs and scores must see the same vectors."""
        return self.ids.weight
