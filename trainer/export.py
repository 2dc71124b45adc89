"""torch to ONNX, with proof that both answer the same.

The exported graph is the whole query: items (B, T) and lengths (B,) in, query (B, D) out, both axes free. A model that
reads metadata has a second one, the item tower: what is known of items in, vectors (B, D) out.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx.external_data_helper import set_external_data
from torch import Tensor, nn

from shared.bundle import TABLES, Parity
from shared.encoder import Encoder as OnnxEncoder
from shared.encoder import EncoderSpec, Vectors
from shared.sequences import mask_index, pack
from shared.times import SECOND
from shared.tower import TOWER, TOWER_SPEC, ItemTower, TowerSpec
from trainer.config import RunConfig
from trainer.errors import TrainerError
from trainer.items import ItemTable
from trainer.transformer import Encoder

TOLERANCE: Final = 1e-4
PROBES: Final = 8  # random histories for each length
TOWER_PROBES: Final = 2_000  # items


OPSET: Final = 23
"""The first with attention as one operator: a dozen small ones less for each block, and a tenth of the time or more."""

Weights = Mapping[str, NDArray[np.float32]]


class ExportError(TrainerError):
    """The exported network does not say what the trained one says; it must not be published."""


@dataclass(frozen=True)
class Tower:
    """An item tower in the form a bundle takes."""

    onnx: bytes
    spec: TowerSpec

    def save(self, folder: Path) -> None:
        """Write the files that `ItemTower.load` reads."""
        (folder / TOWER).write_bytes(self.onnx)
        (folder / TOWER_SPEC).write_text(self.spec.model_dump_json() + "\n")

    @classmethod
    def load(cls, folder: Path) -> Tower | None:
        """What `save` wrote; None where there is nothing."""
        if not (folder / TOWER).is_file():
            return None
        return cls((folder / TOWER).read_bytes(), TowerSpec.model_validate_json((folder / TOWER_SPEC).read_text()))


@dataclass(frozen=True)
class Exported:
    """One model in the form a bundle takes."""

    onnx: bytes
    vectors: Vectors  # (N, D)
    spec: EncoderSpec
    parity: Parity
    weights: Weights  # by name, for a later warm start
    tower: Tower | None = None  # where the model reads metadata


class _Query(nn.Module):
    """What is exported: `Encoder.query` under the name `forward`, with the item table as a finished constant."""

    table: Tensor  # (N + 2, D)

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.register_buffer("table", encoder.items().detach().clone())

    def forward(self, items: Tensor, lengths: Tensor, ages: Tensor | None = None) -> Tensor:
        return self.encoder.query(items, lengths, ages, self.table)


def export(encoder: Encoder, config: RunConfig) -> Exported:
    """Export and prove. Raises ExportError when ONNX and torch differ."""
    model = to_onnx(encoder)
    vectors = np.ascontiguousarray(encoder.vectors.detach().cpu().numpy(), np.float32)
    spec = encoder.spec()
    parity = prove(encoder, OnnxEncoder(model, spec), vectors)
    tower = export_tower(encoder.items)
    if tower is not None:
        parity = parity.model_copy(update={"max_tower_difference": prove_tower(encoder.items, tower)})
    return Exported(model, vectors, spec, parity, weights_of(encoder), tower)


def weights_of(encoder: Encoder) -> Weights:
    """Every trained number, by the name it has in the network."""
    return {name: weight.detach().cpu().numpy().copy() for name, weight in encoder.named_parameters()}


def to_onnx(encoder: Encoder) -> bytes:
    """The query network as one ONNX file with its weights inside."""
    # The exporter cannot trace attention whose mask depends on parameters that still want gradients.
    encoder = encoder.cpu().eval().requires_grad_(requires_grad=False)
    T = min(8, encoder.longest)
    # Batch and length of at least 2: an axis of size 1 would be taken for a constant.
    example = {"items": torch.ones(2, T, dtype=torch.int64), "lengths": torch.full((2,), T, dtype=torch.int64)}
    batch, time = torch.export.Dim("batch"), torch.export.Dim("time", max=encoder.longest)
    shapes = {"items": {0: batch, 1: time}, "lengths": {0: batch}}
    if encoder.clock != "none":
        example["ages"] = torch.ones(2, T, T, dtype=torch.int32)
        shapes["ages"] = {0: batch, 1: time, 2: time}
    return _onnx_of(_Query(encoder), list(example), "query", shapes, kwargs=example)


def _onnx_of(network: nn.Module, names: list[str], output: str, shapes: Any, **example: Any) -> bytes:
    """One ONNX file of a network; `example` inputs are `args` or `kwargs`."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside the exporter itself
        program = torch.onnx.export(
            network.eval(),
            **example,
            input_names=names,
            output_names=[output],
            dynamic_shapes=shapes,
            dynamo=True,
            opset_version=OPSET,
            external_data=False,
            verbose=False,
        )
    if program is None:
        raise ExportError("torch.onnx.export gave no program")
    model: onnx.ModelProto = program.model_proto
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


LARGE: Final = 1 << 20
"""Bytes from which a table of numbers lies outside of the network's file."""
PAGE: Final = 4096


def apart(model: bytes, large: int = LARGE) -> tuple[bytes, bytes]:
    """The network without its large tables, for a folder with `TABLES`, and these, each from a page of its own on.

    onnxruntime copies what is inside, in every worker anew, and maps what is outside.
    """
    network = onnx.load_from_string(model)
    tables = bytearray()
    for table in network.graph.initializer:
        if len(table.raw_data) < large:
            continue
        tables.extend(bytes(-len(tables) % PAGE))
        numbers = table.raw_data
        set_external_data(table, TABLES, offset=len(tables), length=len(numbers))
        table.ClearField("raw_data")
        tables.extend(numbers)
    return bytes(network.SerializeToString()), bytes(tables)


def prove(encoder: Encoder, exported: OnnxEncoder, vectors: Vectors, seed: int = 0) -> Parity:
    """Compare both on random histories of 1, T-1, T and T+5 events. Raises ExportError beyond `TOLERANCE`."""
    T, spec, rng = exported.spec.max_length, exported.spec, np.random.default_rng(seed)
    lengths = tuple(sorted({1, max(T - 1, 1), T, T + 5}))
    mask = None if encoder.causal else mask_index(encoder.item_count)
    vector_gap = score_gap = 0.0
    changes = 0
    for length in lengths:
        histories = [rng.integers(1, encoder.item_count + 1, length) for _ in range(PROBES)]
        # Gaps from seconds to years and far beyond what any data holds.
        gaps = np.exp(rng.uniform(0, 30, (PROBES, length + 1)))
        times = list((gaps.cumsum(1) * SECOND).clip(max=2**61).astype(np.int64))  # (L + 1,) each
        items, real = pack(histories, T, mask=mask)
        ages = None if spec.clock == "none" else torch.from_numpy(spec.ages(times))
        with torch.no_grad():
            wanted = encoder.query(torch.from_numpy(items), torch.from_numpy(real), ages).numpy()  # (PROBES, D)
        found = exported.encode(histories, times)
        vector_gap = _larger(vector_gap, wanted - found)
        for a, b in zip(wanted @ vectors.T, found @ vectors.T, strict=True):  # (N,) each
            score_gap = _larger(score_gap, a - b)
            changes += top_changes(a, b)
    parity = Parity(
        lengths=lengths, max_vector_difference=vector_gap, max_score_difference=score_gap, top10_changes=changes
    )
    if not (vector_gap <= TOLERANCE and score_gap <= TOLERANCE and changes == 0):  # `not`: nan must fail too
        raise ExportError(f"torch and ONNX differ by more than {TOLERANCE}: {parity}")
    return parity


# --- the item tower -----------------------------------------------------------------------------------


class _Tower(nn.Module):
    """What is exported: `ItemTable.of_features` under the name `forward`."""

    def __init__(self, items: ItemTable) -> None:
        super().__init__()
        self.items = items

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.items.of_features(inputs)


def export_tower(items: ItemTable) -> Tower | None:
    """The tower of a table that reads metadata; None of one that does not."""
    if items.spec is None:
        return None
    inputs = tuple(rows[1:3] for rows in items.rows())
    inputs = tuple(rows if len(rows) == 2 else rows.repeat(2, 1) for rows in inputs)
    batch = torch.export.Dim("batch")
    shapes = (tuple({0: batch} for _ in inputs),)  # one *args
    return Tower(_onnx_of(_Tower(items), list(items.spec.fields), "vector", shapes, args=inputs), items.spec)


def prove_tower(items: ItemTable, tower: Tower) -> float:
    """Largest difference between ONNX and torch over the items of the catalogue. Raises ExportError beyond `TOLERANCE`.

    The last row is an item of which nothing is known.
    """
    inputs = [rows[1 : TOWER_PROBES + 1] for rows in items.rows()]
    inputs = [torch.cat((rows, torch.zeros_like(rows[:1]))) for rows in inputs]
    with torch.no_grad():
        wanted = items.of_features(inputs).numpy()  # (B, D)
    fed = {field: rows.numpy() for field, rows in zip(tower.spec.fields, inputs, strict=True)}
    difference = _larger(0.0, wanted - ItemTower(tower.onnx, tower.spec).run(fed))
    if not difference <= TOLERANCE:
        raise ExportError(f"torch and ONNX of the item tower differ by {difference}, more than {TOLERANCE}")
    return difference


def _larger(gap: float, difference: NDArray[np.float32]) -> float:
    """The larger of `gap` and the largest difference; nan wins, which it does not with `max`."""
    return float(np.maximum(gap, np.abs(difference).max()))


def top_changes(wanted: NDArray[np.float32], found: NDArray[np.float32], k: int = 10) -> int:
    """Places of the top k (N,) that hold another item in `found` whose wanted score is not nearly the same."""
    first, second = (np.argsort(-scores, kind="stable")[:k] for scores in (wanted, found))
    return int(np.count_nonzero(np.abs(wanted[first] - wanted[second]) > TOLERANCE))
