"""torch to ONNX: both say the same, or nothing is published."""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from shared.bundle import TABLES
from shared.encoder import Encoder as OnnxEncoder
from shared.sequences import mask_index, pack
from tests.trained import ITEMS, KINDS, Kind, World, config, world
from trainer import export as module
from trainer.config import load_config
from trainer.export import TOLERANCE, ExportError, apart, export, prove, to_onnx, top_changes
from trainer.transformer import Encoder

T = 16


@cache
def served(kind: Kind) -> OnnxEncoder:
    found = world(kind).exported
    return OnnxEncoder(found.onnx, found.spec)


def by_torch(found: World, histories: list[np.ndarray]) -> np.ndarray:
    encoder = found.fitted.encoder
    items, lengths = pack(histories, T, mask=None if encoder.causal else mask_index(ITEMS))
    with torch.no_grad():
        queries: np.ndarray = encoder.query(torch.from_numpy(items), torch.from_numpy(lengths)).numpy()
    return queries


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, T - 1, T, T + 5])
def test_torch_and_onnx_answer_the_same(kind: Kind, length: int) -> None:
    histories = [np.random.default_rng(seed).integers(1, ITEMS + 1, length) for seed in range(6)]
    wanted, found = by_torch(world(kind), histories), served(kind).encode(histories)
    vectors = world(kind).exported.vectors
    assert float(np.abs(wanted - found).max()) <= 1e-4
    assert float(np.abs(wanted @ vectors.T - found @ vectors.T).max()) <= 1e-4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("batch", "width"), [(1, 1), (1, T), (7, 3), (33, 2), (2, T)])
def test_batch_and_length_are_free(kind: Kind, batch: int, width: int) -> None:
    rng = np.random.default_rng(0)
    items, lengths = rng.integers(1, ITEMS + 1, (batch, width)), rng.integers(1, width + 1, batch)
    items[np.arange(width) >= lengths[:, None]] = 0
    with torch.no_grad():
        wanted = world(kind).fitted.encoder.query(torch.from_numpy(items), torch.from_numpy(lengths)).numpy()
    np.testing.assert_allclose(served(kind).run(items, lengths), wanted, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_export_says_what_it_is(kind: Kind) -> None:
    found = world(kind).exported
    assert found.spec.architecture == kind
    assert found.spec.asks_with_mask == (kind == "bert4rec")
    assert (found.spec.item_count, found.spec.width, found.spec.max_length) == (ITEMS, 32, T)
    assert found.vectors.shape == (ITEMS, 32)
    assert found.parity.lengths == (1, T - 1, T, T + 5)
    assert max(found.parity.max_vector_difference, found.parity.max_score_difference) <= TOLERANCE
    assert found.parity.top10_changes == 0


def perturbed(model: bytes, amount: np.float32) -> bytes:
    """The same network with one weight matrix changed a little."""
    loaded = onnx.load_from_string(model)
    weight = next(w for w in loaded.graph.initializer if w.data_type == onnx.TensorProto.FLOAT and len(w.dims) == 2)
    noise = np.random.default_rng(0).normal(0, 1, tuple(weight.dims)).astype(np.float32)
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) + amount * noise, weight.name))
    return bytes(loaded.SerializeToString())


@pytest.mark.parametrize("amount", [np.float32(0.05), np.float32(np.nan)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_sabotaged_network_is_refused(monkeypatch: pytest.MonkeyPatch, kind: Kind, amount: np.float32) -> None:
    found = world(kind)
    monkeypatch.setattr(module, "to_onnx", lambda _: perturbed(found.exported.onnx, amount))
    with pytest.raises(ExportError, match="differ"):
        export(found.fitted.encoder, found.config)


def test_scores_too_large_to_agree_are_refused() -> None:
    found = world("sasrec")
    vectors = found.exported.vectors.copy()
    vectors[0] = np.inf
    with np.errstate(invalid="ignore"), pytest.raises(ExportError):
        prove(found.fitted.encoder, served("sasrec"), vectors)


def test_a_network_of_nan_is_refused() -> None:
    """nan equals nan in no comparison: the proof must not take that for agreement."""
    broken = deepcopy(world("sasrec").fitted.encoder)
    with torch.no_grad():
        broken.norm.weight.fill_(torch.nan)
    with pytest.raises(ExportError, match="nan"):
        export(broken, world("sasrec").config)


def test_the_shortest_model_exports() -> None:
    settings = config("bert4rec", model={"max_length": 2, "hidden_units": 8})
    torch.manual_seed(0)
    assert export(Encoder(settings.model, 5).eval(), settings).parity.lengths == (1, 2, 7)


def test_weights_lie_inside_the_file() -> None:
    model = onnx.load_from_string(to_onnx(world("sasrec").fitted.encoder))
    assert all(w.data_location != onnx.TensorProto.EXTERNAL for w in model.graph.initializer)


def test_large_tables_lie_apart_and_are_mapped(tmp_path: Path) -> None:
    found = world("sasrec").exported
    network, tables = apart(found.onnx, large=1000)
    assert len(network) < len(found.onnx) - 1000
    outside = [w for w in onnx.load_from_string(network).graph.initializer if w.data_location == w.EXTERNAL]
    assert len(outside) > 1
    (tmp_path / "encoder.onnx").write_bytes(network)
    (tmp_path / TABLES).write_bytes(tables)
    mapped = OnnxEncoder(tmp_path / "encoder.onnx", found.spec)
    assert str(tmp_path / TABLES) in Path("/proc/self/maps").read_text()
    histories = [np.arange(1, length + 1) for length in (1, 5, T + 3)]
    np.testing.assert_array_equal(mapped.encode(histories), served("sasrec").encode(histories))


def test_a_network_without_large_tables_is_one_file() -> None:
    found = world("sasrec").exported
    network, tables = apart(found.onnx)
    assert tables == b""
    assert onnx.load_from_string(network) == onnx.load_from_string(found.onnx)


def test_top_changes_counts_places_beyond_swaps_of_equal_scores() -> None:
    wanted = np.array([5, 4, 3, 2, 1], np.float32)
    assert top_changes(wanted, wanted, k=3) == 0
    assert top_changes(wanted, np.array([5, 3, 4, 2, 1], np.float32), k=3) == 2
    near = np.array([5, 4, 4 - 1e-5, 2, 1], np.float32)
    assert top_changes(near, np.array([5, 4 - 1e-5, 4, 2, 1], np.float32), k=3) == 0


@pytest.mark.parametrize("preset", ["sasrec-quick", "bert4rec-quick"])
def test_the_presets_of_the_demo_export(preset: str) -> None:
    """At their sizes: what a runtime makes of a mask depends on heads and widths too."""
    chosen = load_config(preset)
    torch.manual_seed(0)
    found = export(Encoder(chosen.model, 100).eval(), chosen)
    assert found.parity.max_score_difference < TOLERANCE
