"""Item vectors: one table that the whole model shares, made of ids and of what is known of the items.

The encoder reads its inputs from this table, the loss scores against it, and the bundle's `vectors` are its rows.

    item 42   id            -> embedding           \\
              genre         -> mean of embeddings    >  fusion  ->  vector
              title vector  -> projection          /

Without metadata a vector is the id's embedding. With it an item has parts, some of which may be missing: an item
without director has none of that field, and an item without training events has no id, since nothing was learnt for it.
In training, parts are left out at random (`dropout`, `id_dropout`), so that the others learn to do without them. What
an item without id gets is what the exported tower computes for items that come later.

Shapes: N items, R rows of the table, P parts (the id first), L values of an item, D width.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.categories import field_of
from shared.events import BoolArray
from shared.sequences import PAD
from shared.tower import CategorySpec, TowerSpec
from trainer.config import MetadataConfig
from trainer.dataset import Dataset, Sequences

log = logging.getLogger(__name__)

NEVER = -1e9  # a score that softmax makes 0, also where no other is left


# --- what is known of the items -----------------------------------------------------------------------


@dataclass(frozen=True)
class Features:
    """What is known of the items of a catalogue beside their ids; row i belongs to item index i, PAD and MASK too."""

    spec: TowerSpec
    rows: Mapping[str, Tensor]  # field -> (N + 2, L) numbers of values, or (N + 2, d) of vectors; 0 is nothing
    known: Tensor  # (N + 2,) bool: whether the id was trained on

    @classmethod
    def blank(cls, spec: TowerSpec, item_count: int) -> Features:
        """The right shapes, to be filled from a checkpoint."""
        R = item_count + 2
        numbers = {f: torch.zeros(R, one.length, dtype=torch.int64) for f, one in spec.categories.items()}
        vectors = {f: torch.zeros(R, width) for f, width in spec.vectors.items()}
        return cls(spec, {**numbers, **vectors}, torch.ones(R, dtype=torch.bool))


def features_of(dataset: Dataset, sequences: Sequences, config: MetadataConfig, width: int) -> Features | None:
    """The fields that the settings name, as far as the data has them; None when none is left.

    A value counts when `min_items` of the items that are trained on carry it: of others nothing could be learnt. A
    field without any is switched off, with a warning.
    """
    trained = np.zeros(len(dataset.catalogue) + 2, bool)
    trained[sequences.item] = True
    categories, vectors = {}, {}
    for field in config.fields:
        if field in dataset.vectors and dataset.vectors[field][trained[1:-1]].any():
            vectors[field] = dataset.vectors[field].shape[1]
        elif spec := _category_spec(dataset, field, trained, config):
            categories[field] = spec
        elif field == "title" and any(item.title for item in dataset.catalogue.items):
            log.warning("metadata: titles are words here; `python -m trainer vectors` makes vectors of them, for "
                        "data.vectors.title; the field is switched off")  # fmt: skip
        else:
            log.warning("metadata: no item that is trained on has %s worth reading; the field is switched off", field)
    if not categories and not vectors:
        return None
    items, rows = dataset.catalogue.items, {}
    for field, spec in categories.items():
        rows[field] = _framed(spec.numbers(field, items))
    for field in vectors:
        rows[field] = _framed(dataset.vectors[field])
    trained[-1] = True  # MASK
    return Features(TowerSpec(width=width, categories=categories, vectors=vectors), rows, torch.from_numpy(trained))


def _category_spec(dataset: Dataset, field: str, trained: BoolArray, config: MetadataConfig) -> CategorySpec | None:
    counts: dict[str, int] = {}
    carried = [
        [c.partition(":")[2] for c in item.categories if ":" in c and field_of(c) == field]
        for item in dataset.catalogue.items
    ]
    for values, used in zip(carried, trained[1:], strict=False):
        for value in values if used else ():
            counts[value] = counts.get(value, 0) + 1
    kept = sorted(value for value, count in counts.items() if count >= config.min_items)
    if not kept:
        return None
    learnt = set(kept)
    longest = max(sum(value in learnt for value in values) for values in carried)
    return CategorySpec(values=tuple(kept), length=min(longest, config.max_values))


def _framed(rows: np.ndarray) -> Tensor:
    """(N, x) -> (N + 2, x): nothing is known of PAD and MASK."""
    return F.pad(torch.from_numpy(np.ascontiguousarray(rows)), (0, 0, 1, 1))


def digest(dataset: Dataset, fields: Sequence[str]) -> str:
    """Hash of what the data says of these fields: weights belong to it as they belong to the events."""
    found = hashlib.sha256()
    for field in fields:
        if field in dataset.vectors:
            found.update(np.ascontiguousarray(dataset.vectors[field]).tobytes())
        for item in dataset.catalogue.items:
            found.update("\t".join([item.item_id, *(c for c in item.categories if field_of(c) == field)]).encode())
    return found.hexdigest()[:16]


# --- the table ----------------------------------------------------------------------------------------


class Categories(nn.Module):
    """The mean of the embeddings of an item's values."""

    rows: Tensor  # (N + 2, L)

    def __init__(self, rows: Tensor, count: int, width: int) -> None:
        super().__init__()
        self.register_buffer("rows", rows)
        self.values = nn.Embedding(count + 1, width, padding_idx=0)

    def forward(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers of values (R, L), 0 behind the last, to parts (R, D) and whether there is one (R,)."""
        # A padded gather, since ONNX would make a loop of EmbeddingBag; column by column, since (R, L, D) at once takes
        # L times the memory and eight times as long. The embedding of 0 is zero and stays so.
        first, *others = numbers.unbind(1)
        total = self.values(first)  # (R, D)
        for column in others:
            total = total + self.values(column)
        real = numbers != 0  # (R, L)
        return total / real.sum(1, keepdim=True).clamp(min=1), real[:, 0]


class Projection(nn.Module):
    """A vector of any width, such as that of a title: its direction counts, its length does not."""

    rows: Tensor  # (N + 2, d)

    def __init__(self, rows: Tensor, width: int) -> None:
        super().__init__()
        self.register_buffer("rows", rows)
        self.project = nn.Linear(rows.shape[1], width, bias=False)

    def forward(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors (R, d), zeros for none, to parts (R, D) and whether there is one (R,)."""
        there = vectors.abs().sum(1) > 0  # (R,)
        return self.project(F.normalize(vectors, dim=1)), there


class ItemTable(nn.Module):
    """The vector of each item index: PAD, 1..N, MASK."""

    known: Tensor  # (N + 2,) whether the id was trained on
    drop: Tensor  # (P,) how often each part is left out in training

    def __init__(self, item_count: int, width: int, config: MetadataConfig, features: Features | None = None) -> None:
        super().__init__()
        self.item_count, self.fusion = item_count, config.fusion
        self.spec = None if features is None else features.spec
        self.ids = nn.Embedding(item_count + 2, width, padding_idx=PAD)
        self.parts = nn.ModuleList()
        if features is None:
            return
        spec, rows = features.spec, features.rows
        self.parts.extend(Categories(rows[f], len(one.values), width) for f, one in spec.categories.items())
        self.parts.extend(Projection(rows[f], width) for f in spec.vectors)
        P = 1 + len(self.parts)
        self.register_buffer("known", features.known)
        self.register_buffer("drop", torch.tensor([config.id_dropout] + [config.dropout] * (P - 1)), persistent=False)
        if self.fusion == "concat":
            self.mix = nn.Linear(P * width, width, bias=False)
        if self.fusion == "gate":
            self.ask, self.bias = nn.Parameter(torch.zeros(P, width)), nn.Parameter(torch.zeros(P))

    @torch.no_grad()
    def start(self) -> None:
        """Set what must not begin at random: padding is nothing, and `concat` begins as a sum of the parts."""
        for embedding in (self.ids, *(part.values for part in self.parts if isinstance(part, Categories))):
            embedding.weight[PAD].zero_()
        if hasattr(self, "mix"):
            D, width = self.mix.weight.shape
            self.mix.weight.copy_(torch.eye(D).repeat(1, width // D))

    def forward(self) -> Tensor:
        """The table (N + 2, D), PAD's row zero. Made once a step: inputs and scores must see the same vectors."""
        if not self.parts:
            return self.ids.weight
        parts, there = self._all_parts()
        if self.training:
            kept = torch.rand(there.shape, device=there.device) >= self.drop  # (R, P)
            kept[:, 0] |= ~there[:, 1:].any(1)  # an item without metadata has nothing but its id
            there = there & kept
        return self._fuse(parts, there)

    def rows(self) -> list[Tensor]:
        """What each field says of every row, in the order of `spec.fields`; (N + 2, L) or (N + 2, d) each."""
        return [part.get_buffer("rows") for part in self.parts]

    def of_features(self, inputs: Sequence[Tensor]) -> Tensor:
        """Vectors (B, D) of items without id; `inputs` in the order of `spec.fields`, (B, L) or (B, d) each."""
        parts, there = self._read(inputs)
        nothing = torch.zeros_like(parts[:, :1])  # (B, 1, D)
        no_id = torch.zeros_like(there[:, :1])  # (B, 1)
        return self._fuse(torch.cat((nothing, parts), 1), torch.cat((no_id, there), 1))

    @torch.no_grad()
    def gates(self) -> dict[str, Tensor]:
        """How much of its vector each item that was trained on takes from its id and from each field, (n,) each.

        Nothing unless the fusion is `gate`.
        """
        if self.spec is None or self.fusion != "gate":
            return {}
        weights = self._gate(*self._all_parts())[1 : self.item_count + 1]  # (N, P)
        weights = weights[self.known[1 : self.item_count + 1]]
        return dict(zip(("id", *self.spec.fields), weights.T, strict=True))

    def gate_summary(self) -> dict[str, dict[str, float]]:
        """Mean, 10th and 90th percentile over items of each of the `gates`."""
        return {
            name: {"mean": float(w.mean()), "low": float(w.quantile(0.1)), "high": float(w.quantile(0.9))}
            for name, w in self.gates().items()
        }

    def _all_parts(self) -> tuple[Tensor, Tensor]:
        """Parts (R, P, D) of every row of the table, and which are there (R, P)."""
        parts, there = self._read(self.rows())
        with_id = self.known | ~there.any(1)  # an id that was never trained on is better than nothing at all
        return torch.cat((self.ids.weight.unsqueeze(1), parts), 1), torch.cat((with_id.unsqueeze(1), there), 1)

    def _read(self, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        found = [part(rows) for part, rows in zip(self.parts, inputs, strict=True)]
        return torch.stack([p for p, _ in found], 1), torch.stack([t for _, t in found], 1)  # (R, P - 1, D), (R, P - 1)

    def _fuse(self, parts: Tensor, there: Tensor) -> Tensor:
        """(R, P, D) and (R, P) to (R, D)."""
        present = parts * there.unsqueeze(2)  # (R, P, D)
        if self.fusion == "add":
            return present.sum(1)
        if self.fusion == "concat":
            mixed: Tensor = self.mix(present.flatten(1))  # (R, P * D) -> (R, D)
            return mixed
        return (present * self._gate(parts, there).unsqueeze(2)).sum(1)

    def _gate(self, parts: Tensor, there: Tensor) -> Tensor:
        """Weights (R, P) of the parts that are there, which sum to 1."""
        scores = (parts * self.ask).sum(2) + self.bias  # (R, P)
        return torch.softmax(scores.masked_fill(~there, NEVER), 1)
