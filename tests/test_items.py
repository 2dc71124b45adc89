"""Item vectors made of metadata, in a world where the category carries the signal.

Items of category c are followed by items of category c + 1, whichever they are. So an item that nobody has used can be
found by its category, and by nothing else.
"""

from __future__ import annotations

import atexit
import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import pytest
import torch

from shared.bundle import Bundle
from shared.catalogue import Item
from shared.encoder import Encoder as OnnxEncoder
from shared.encoder import Vectors
from shared.events import IntArray
from shared.times import DAY, SECOND
from shared.tower import ItemTower
from tests.trained import START, Kind, Row, config, dataset
from trainer import export as module
from trainer.cold import hold_out, measure_cold
from trainer.config import Fusion, MetadataConfig, RunConfig
from trainer.curves import read_epochs
from trainer.dataset import Dataset, Split, everything, leave_one_out
from trainer.export import Exported, ExportError, Tower, export, export_tower, prove_tower
from trainer.items import Features, ItemTable, digest, features_of
from trainer.pipeline import identity, rivals
from trainer.publish import Candidate, write_bundle
from trainer.train import Batches, Fitted, SequenceModel, fit, load_encoder
from trainer.transformer import Encoder
from trainer.warm import Published

FUSIONS: Final[tuple[Fusion, ...]] = ("add", "concat", "gate")
CIRCLE: Final = 6  # categories
EACH: Final = 5  # items a category


def shelf_items() -> list[dict[str, Any]]:
    """Items "c-n" with their shelf, which is the signal, and a colour, which is noise."""
    return [
        {"item_id": f"{c}-{n}", "categories": [f"shelf:s{c}", f"colour:{'red' if n % 2 else 'blue'}"]}
        for c in range(CIRCLE)
        for n in range(EACH)
    ]


@cache
def shelves(used: tuple[int, ...] = tuple(range(EACH))) -> Dataset:
    """Users who walk from shelf to shelf and take any of the `used` items of each."""
    rng, rows = np.random.default_rng(0), list[Row]()
    for user in range(240):
        first, length = int(rng.integers(CIRCLE)), int(rng.integers(5, 13))
        for step in range(length):
            item = f"{(first + step) % CIRCLE}-{rng.choice(used)}"
            rows.append((f"u{user}", item, START + (user % 60) * DAY + step * SECOND))
    return dataset(rows, shelf_items())


def shelf_of(data: Dataset) -> IntArray:
    """(N,) the category of each item."""
    return np.array([int(item.item_id.partition("-")[0]) for item in data.catalogue.items])


def settings(fusion: Fusion = "add", fields: Sequence[str] = ("shelf", "colour"), **metadata: Any) -> RunConfig:
    return config(
        model={"metadata": {"fields": fields, "fusion": fusion, **metadata}},
        training={"epochs": 10, "patience": 10},
    )


def features(data: Dataset, **metadata: Any) -> Features:
    found = features_of(data, everything(data)[0], MetadataConfig(**metadata), 8)
    assert found is not None
    return found


def table(data: Dataset, fusion: Fusion, *, known: Sequence[int] | None = None, **metadata: Any) -> ItemTable:
    """An untrained table with weights large enough that every difference shows; only the items `known` have events."""
    metadata = {"fields": ("shelf", "colour"), **metadata}
    read = features(data, **metadata)
    if known is not None:
        mask = torch.zeros_like(read.known)
        mask[[*known, -1]] = True
        read = replace(read, known=mask)
    torch.manual_seed(0)
    found = ItemTable(len(data.catalogue), 8, MetadataConfig(fusion=fusion, **metadata), read).eval()
    for weight in found.parameters():
        torch.nn.init.normal_(weight)
    found.start()
    return found.requires_grad_(requires_grad=False)


def small(*items: Mapping[str, Any]) -> Dataset:
    """Two users who viewed all of these items."""
    rows = [(u, i["item_id"], START + n * SECOND) for u in ("a", "b") for n, i in enumerate(items)]
    return dataset(rows, items)


# --- what is read of the items ------------------------------------------------------------------------


def test_values_that_few_trained_items_carry_are_not_read() -> None:
    data = small(
        {"item_id": "1", "categories": ["genre:Crime", "genre:Drama", "maker:x"]},
        {"item_id": "2", "categories": ["genre:Drama", "maker:y"]},
        {"item_id": "3", "categories": ["genre:Rare"]},
    )
    found = features(data, fields=("genre",), min_items=2)
    assert found.spec.categories["genre"].values == ("Drama",)
    assert found.rows["genre"].tolist() == [[0], [1], [1], [0], [0]]  # PAD, the items, MASK
    found = features(data, fields=("genre", "maker"), min_items=1)
    assert found.spec.categories["genre"].values == ("Crime", "Drama", "Rare")
    assert found.rows["genre"].tolist() == [[0, 0], [1, 2], [2, 0], [3, 0], [0, 0]]


def test_values_of_items_without_events_teach_nothing() -> None:
    rows = [("a", "1", START), ("a", "2", START + 1)]
    items = [{"item_id": i, "categories": [f"genre:{g}"]} for i, g in (("1", "A"), ("2", "A"), ("3", "B"), ("4", "B"))]
    found = features(dataset(rows, items), fields=("genre",))
    assert found.spec.categories["genre"].values == ("A",)
    assert sorted(found.known.tolist()) == [False] * 3 + [True] * 3  # PAD and two items; two items and MASK


def test_only_the_first_values_of_an_item_are_read() -> None:
    data = small(*({"item_id": i, "categories": [f"genre:{g}" for g in "abcd"]} for i in "12"))
    assert features(data, fields=("genre",), max_values=3).rows["genre"][1].tolist() == [1, 2, 3]


def test_a_field_that_the_data_lacks_is_switched_off_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    data = small({"item_id": "1", "categories": ["genre:A"]}, {"item_id": "2", "categories": ["genre:A"]})
    found = features(data, fields=("director", "genre"))
    assert found.spec.fields == ("genre",)
    assert [r.levelno for r in caplog.records if "director" in r.message] == [logging.WARNING]
    assert features_of(data, everything(data)[0], MetadataConfig(fields=("director",)), 8) is None
    strangers = replace(data, vectors={"title": np.zeros((2, 3), np.float32)})  # a file about other items
    assert features_of(strangers, everything(data)[0], MetadataConfig(fields=("title",)), 8) is None


def test_a_field_is_not_mistaken_for_one_that_begins_like_it() -> None:
    data = small(*({"item_id": i, "categories": ["genre2:B", "genre:A", "plain"]} for i in "12"))
    assert features(data, fields=("genre",)).spec.categories["genre"].values == ("A",)
    assert features(data, fields=("genre2",)).rows["genre2"][1].tolist() == [1]


def test_the_digest_of_metadata_follows_the_fields_that_are_read() -> None:
    def data(genre: str, maker: str) -> Dataset:
        return small({"item_id": "1", "categories": [f"genre:{genre}", f"maker:{maker}"]})

    assert digest(data("A", "x"), ["genre"]) == digest(data("A", "y"), ["genre"])
    assert digest(data("A", "x"), ["genre"]) != digest(data("B", "x"), ["genre"])
    assert identity(settings(fields=("genre",)), data("A", "x")) != identity(
        settings(fields=("genre",)), data("B", "x")
    )
    assert identity(settings(fields=()), data("A", "x")) == identity(settings(fields=()), data("B", "x"))
    one = small({"item_id": "1"})
    with_vectors = [replace(one, vectors={"title": np.full((1, 2), x, np.float32)}) for x in (1, 2)]
    assert digest(with_vectors[0], ["title"]) != digest(with_vectors[1], ["title"])


# --- the table ----------------------------------------------------------------------------------------


def test_a_part_is_the_mean_of_an_item_s_values() -> None:
    data = small(
        {"item_id": "1", "categories": ["genre:A", "genre:B"]},
        {"item_id": "2", "categories": ["genre:A", "genre:B", "genre:C"]},
        {"item_id": "3", "categories": ["genre:C"]},
        {"item_id": "4", "categories": []},
    )
    found = table(data, "add", fields=("genre",), known=[])
    a, b, c = found.parts[0].get_parameter("values.weight")[1:]
    vectors = found()
    torch.testing.assert_close(vectors[1:4], torch.stack([(a + b) / 2, (a + b + c) / 3, c]))


@pytest.mark.parametrize("scale", [0.1, 30.0])
def test_of_a_given_vector_the_direction_counts(scale: float) -> None:
    data = small({"item_id": "1"}, {"item_id": "2"}, {"item_id": "3"})
    given = np.array([[3, 4], [3 * scale, 4 * scale], [0, 0]], np.float32)
    found = table(replace(data, vectors={"title": given}), "add", fields=("title",), known=[])
    vectors, weight = found(), found.parts[0].get_parameter("project.weight")
    torch.testing.assert_close(vectors[1], weight @ torch.tensor([0.6, 0.8]))
    torch.testing.assert_close(vectors[2], vectors[1])
    assert torch.equal(vectors[3], found.ids.weight[3])  # nothing is known of it but its id


@pytest.mark.parametrize("fusion", FUSIONS)
def test_pad_is_nothing_and_mask_is_its_id_alone(fusion: Fusion) -> None:
    found = table(shelves(), fusion)
    vectors = found()
    assert not vectors[0].any()
    assert torch.equal(vectors[-1], found.ids.weight[-1])
    assert vectors.shape == (CIRCLE * EACH + 2, 8)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_without_training_events_the_id_says_nothing(fusion: Fusion) -> None:
    data = shelves()
    found = table(data, fusion, known=[1, 2, 3])
    before = found()
    found.ids.weight[1:-1] += 1
    after = found()
    assert torch.equal(after[4:-1], before[4:-1])
    assert not torch.isclose(after[1:4], before[1:4]).any()
    found.ids.weight[1:-1] -= 1
    alike = np.flatnonzero([i.categories == data.catalogue[4].categories for i in data.catalogue.items]) + 1
    assert len(alike) > 1
    assert all(torch.equal(before[i], before[4]) for i in alike if i > 3)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_fields_tell_items_apart(fusion: Fusion) -> None:
    data = shelves()
    vectors = table(data, fusion, known=[])()[1:-1]
    groups = {item.categories for item in data.catalogue.items}
    assert len(torch.unique(vectors, dim=0)) == len(groups) == CIRCLE * 2


def test_parts_are_left_out_in_training_as_often_as_told() -> None:
    data = shelves()
    found = table(data, "add", id_dropout=0.75, dropout=0.25)
    parts, there = found._all_parts()
    assert there[1:-1].all()
    wanted = {
        (with_id, with_shelf): parts[1, 0] * with_id + parts[1, 1] * with_shelf + parts[1, 2]
        for with_id in (0, 1)
        for with_shelf in (0, 1)
    }
    found.train()
    torch.manual_seed(0)
    drawn = torch.stack([found() for _ in range(2_000)])  # (S, N + 2, D)
    shares = {
        key: float((drawn[:, 1] - vector).abs().amax(1).lt(1e-6).float().mean()) for key, vector in wanted.items()
    }
    assert shares[1, 1] == pytest.approx(0.25 * 0.75 * 0.75, abs=0.03)
    assert shares[0, 1] == pytest.approx(0.75 * 0.75 * 0.75, abs=0.03)
    assert shares[0, 0] == pytest.approx(0.75 * 0.25 * 0.75, abs=0.03)
    assert torch.equal(drawn[:, -1], found.ids.weight[-1].expand(2_000, 8))  # MASK has nothing but its id
    assert torch.equal(found.eval()(), found())


def test_an_item_without_metadata_keeps_its_id() -> None:
    data = small(
        {"item_id": "1", "categories": ["genre:A"]}, {"item_id": "2"}, {"item_id": "3", "categories": ["genre:A"]}
    )
    found = table(data, "add", fields=("genre",), known=[], id_dropout=0.99).train()
    assert torch.equal(found()[2], found.ids.weight[2])


def test_gates_are_shares_of_what_is_there() -> None:
    data = small(
        {"item_id": "1", "categories": ["genre:A", "maker:x"]},
        {"item_id": "2", "categories": ["genre:A"]},
        {"item_id": "3", "categories": ["genre:A", "maker:x"]},
    )
    found = table(data, "gate", fields=("genre", "maker"), known=[1, 2])
    gates = found.gates()
    assert list(gates) == ["id", "genre", "maker"]
    weights = torch.stack(list(gates.values()))  # (P, n): items 1 and 2 have events
    assert weights.shape == (3, 2)
    torch.testing.assert_close(weights.sum(0), torch.ones(2))
    assert gates["maker"][1] == 0 < gates["maker"][0]
    parts, _ = found._all_parts()
    torch.testing.assert_close(found()[1], (weights[:, 0, None] * parts[1]).sum(0))
    summary = found.gate_summary()["genre"]
    assert summary["low"] <= summary["mean"] <= summary["high"]
    assert table(data, "add", fields=("genre",)).gates() == {}


def test_concat_begins_as_a_sum() -> None:
    data = shelves()
    one, other = table(data, "concat"), table(data, "add")
    other.load_state_dict(one.state_dict(), strict=False)
    torch.testing.assert_close(one(), other())


# --- the objective ------------------------------------------------------------------------------------


class _AskedError(Exception):
    """Ends a training step where the loss is asked."""


def test_items_without_events_are_no_wrong_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss sets the items with events against each other, and nothing pushes the others away."""
    data = shelves()
    held = hold_out(data, 0.2, seed=0)
    sequences = leave_one_out(held.rest).sequences
    run = settings(id_dropout=0, dropout=0)
    read = features_of(held.rest, sequences, run.model.metadata, run.model.hidden_units)
    rows, asked = Batches(sequences, run), list[Any]()
    model = SequenceModel(run, len(data.catalogue), rows, None, read)

    def ask(*words: Any) -> None:
        asked.extend(words)
        raise _AskedError

    monkeypatch.setattr("trainer.train.loss_of", ask)
    batch = next(iter(rows))
    with pytest.raises(_AskedError):
        model.training_step(batch, 0)
    _, targets, vectors, _, share = asked
    warm = np.setdiff1d(np.arange(1, len(data.catalogue) + 1), held.items)
    assert torch.equal(vectors, model.encoder.vectors[warm - 1])
    assert share.sum() == pytest.approx(1)
    assert (share > 0).all()
    wanted = batch.items[:, 1:]
    assert torch.equal(targets == 0, wanted == 0)
    assert np.array_equal(warm[targets[targets > 0] - 1], wanted[wanted > 0])


# --- trained ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cold:
    """A model of a world in which each shelf has two items that nobody has used."""

    data: Dataset
    split: Split
    unused: IntArray  # (M,) item indices
    run: RunConfig
    fitted: Fitted
    exported: Exported
    folder: Path

    def queries(self, histories: Sequence[IntArray]) -> Vectors:
        return OnnxEncoder(self.exported.onnx, self.exported.spec).encode(histories)


@cache
def cold(fusion: Fusion, kind: Kind = "sasrec", fields: tuple[str, ...] = ("shelf", "colour")) -> Cold:
    data = shelves(used=(1, 3, 4))
    run = settings(fusion, fields)
    if kind == "bert4rec":
        slower = {"epochs": 30, "patience": 30, "last_item_probability": 0.5, "mask_probability": 0.3}
        run = config(kind, model={"metadata": run.model.metadata.model_dump()}, training=slower)
    split = leave_one_out(data)
    read = features_of(data, split.sequences, run.model.metadata, run.model.hidden_units)
    folder = Path(_scratch().name) / f"{fusion}-{kind}-{'-'.join(fields)}"
    fitted = fit(run, len(data.catalogue), split.sequences, split.validation, folder, features=read)
    unused = np.setdiff1d(np.arange(1, len(data.catalogue) + 1), data.item)
    return Cold(data, split, unused, run, fitted, export(fitted.encoder, run), folder)


@cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    folder = tempfile.TemporaryDirectory(prefix="upnext-tests-")
    atexit.register(folder.cleanup)
    return folder


def right_shelf_first(found: Cold) -> float:
    """How often the best of the unused items is one of the shelf that comes next."""
    queries, shelf = found.queries(found.split.test.histories()), shelf_of(found.data)
    best = found.unused[(queries @ found.exported.vectors[found.unused - 1].T).argmax(1)]
    return float((shelf[best - 1] == shelf[found.split.test.target - 1]).mean())


@pytest.mark.slow
@pytest.mark.parametrize("fusion", FUSIONS)
def test_an_unused_item_is_found_through_its_category(fusion: Fusion) -> None:
    assert right_shelf_first(cold(fusion)) > 0.85


@pytest.mark.slow
def test_without_metadata_an_unused_item_is_not_found() -> None:
    assert right_shelf_first(cold("add", fields=())) < 0.5


@pytest.mark.slow
def test_a_field_that_says_nothing_finds_nothing() -> None:
    assert right_shelf_first(cold("add", fields=("colour",))) < 0.5


@pytest.mark.slow
def test_bert4rec_finds_unused_items_too() -> None:
    assert right_shelf_first(cold("gate", "bert4rec")) > 0.75  # .84 to .95 by the seed


@pytest.mark.slow
def test_the_gate_prefers_the_field_that_says_something() -> None:
    gates = cold("gate").fitted.encoder.items.gate_summary()
    assert gates["shelf"]["mean"] > gates["colour"]["mean"]


@pytest.mark.slow
def test_gates_are_in_tensorboard_and_in_the_curves() -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = cold("gate")
    rows = read_epochs(found.folder / "epochs.csv")
    names = {"val_gate/id", "val_gate/shelf", "val_gate/colour"}
    assert all(names <= set(row) for row in rows)
    assert sum(rows[-1][name] for name in names) == pytest.approx(1, abs=1e-4)
    board = EventAccumulator(str(found.folder / "tensorboard"))
    board.Reload()
    assert names <= set(board.Tags()["scalars"])
    assert not any("gate" in name for name in read_epochs(cold("add").folder / "epochs.csv")[0])


@pytest.mark.slow
@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_checkpoint_holds_all_that_a_table_is_made_of(fusion: Fusion) -> None:
    found = cold(fusion)
    encoder, restored = load_encoder(found.fitted.checkpoint)
    assert restored == found.run
    assert encoder.items.spec == found.fitted.encoder.items.spec
    assert torch.equal(encoder.vectors, found.fitted.encoder.vectors)


# --- exported -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("fusion", FUSIONS)
def test_the_exported_vectors_are_the_fused_ones_and_the_encoder_reads_them(fusion: Fusion) -> None:
    found = cold(fusion)
    encoder, exported = found.fitted.encoder, found.exported
    np.testing.assert_array_equal(exported.vectors, encoder.vectors.numpy())
    weights = {tuple(w.dims): 0 for w in onnx.load_from_string(exported.onnx).graph.initializer}
    assert (len(exported.vectors) + 2, 32) in weights  # the finished table, and not what it was made of
    assert not {tuple(p.shape) for p in encoder.items.parts.parameters()} & weights.keys()
    assert len(exported.onnx) < 150_000
    # The encoder reads an unused item by what is known of it: two of one kind are the same to it.
    blue = [int(i) for i in found.unused if found.data.catalogue[int(i)].categories == ("shelf:s0", "colour:blue")]
    assert len(blue) == 2
    one, other = found.queries([np.array([i]) for i in blue])
    np.testing.assert_array_equal(one, other)
    assert exported.vectors[blue[0] - 1].any()


@pytest.mark.slow
@pytest.mark.parametrize("fusion", FUSIONS)
def test_the_tower_gives_a_new_item_the_vector_that_training_would_have_given_it(fusion: Fusion) -> None:
    found = cold(fusion)
    assert found.exported.tower is not None
    tower = ItemTower(found.exported.tower.onnx, found.exported.tower.spec)
    items = [found.data.catalogue[int(i)] for i in found.unused]
    new = [Item(f"new-{i}", None, item.categories) for i, item in enumerate(items)]
    np.testing.assert_allclose(tower.vectors(new), found.exported.vectors[found.unused - 1], atol=1e-5)
    assert found.exported.parity.max_tower_difference is not None
    assert found.exported.parity.max_tower_difference <= module.TOLERANCE
    strange = [Item("x", None, ("shelf:s1", "shelf:none", "other:s2", "s3")), Item("y", None, ("shelf:s1",)), Item("z")]
    one, same, nothing = tower.vectors(strange)
    np.testing.assert_array_equal(one, same)
    assert one.any()
    assert not nothing.any()
    assert tower.vectors(new[:1]).shape == (1, 32)


def test_a_tower_reads_categories_and_vectors_in_the_order_of_its_fields(tmp_path: Path) -> None:
    data = shelves()
    given = np.random.default_rng(0).normal(size=(len(data.catalogue), 5)).astype(np.float32)
    items = table(replace(data, vectors={"title": given}), "gate", fields=("title", "shelf"), known=[])
    tower = export_tower(items)
    assert tower is not None
    assert tower.spec.fields == ("shelf", "title")
    tower.save(tmp_path)
    loaded = ItemTower.load(tmp_path)
    assert loaded is not None
    found = loaded.vectors(data.catalogue.items, {"title": given})
    np.testing.assert_allclose(found, items()[1:-1].numpy(), atol=1e-5)
    assert np.abs(loaded.vectors(data.catalogue.items) - found).max() > 0.1
    assert Tower.load(tmp_path) == tower
    assert ItemTower.load(tmp_path / "elsewhere") is None
    assert Tower.load(tmp_path / "elsewhere") is None


def test_a_tower_that_says_something_else_is_refused() -> None:
    items = table(shelves(), "add")
    tower = export_tower(items)
    assert tower is not None
    assert prove_tower(items, tower) <= module.TOLERANCE
    items.parts[0].get_parameter("values.weight")[1] += 0.01
    with pytest.raises(ExportError, match="tower"):
        prove_tower(items, tower)
    items.parts[0].get_parameter("values.weight")[1] = torch.nan
    with pytest.raises(ExportError, match="nan"):
        prove_tower(items, tower)


@pytest.mark.slow
def test_a_bundle_holds_the_tower_and_serves_as_before(tmp_path: Path) -> None:
    found = cold("gate")
    baselines = rivals(found.split, found.run.evaluation).metrics
    candidates = {
        "gated": Candidate(found.run, found.exported, "split", 1, {}),
        "plain": Candidate(found.run, replace(found.exported, tower=None), "split", 1, {}),
    }
    write_bundle(tmp_path, found.data, found.split.popularity, candidates, baselines, found.split.test)
    bundle = Bundle.load(tmp_path)
    assert {f"models/gated/{name}" for name in ("tower.onnx", "tower.json")} <= bundle.manifest.files.keys()
    np.testing.assert_array_equal(bundle.models["gated"].retriever.vectors, found.exported.vectors)
    tower = ItemTower.load(tmp_path / "models" / "gated")
    assert tower is not None
    items = [bundle.catalogue[int(i)] for i in found.unused]
    np.testing.assert_allclose(tower.vectors(items), found.exported.vectors[found.unused - 1], atol=1e-5)
    assert ItemTower.load(tmp_path / "models" / "plain") is None


@pytest.mark.slow
@pytest.mark.parametrize("fusion", ["gate", "concat"])
def test_a_warm_start_matches_categories_by_value(tmp_path: Path, fusion: Fusion) -> None:
    found = cold(fusion)
    candidates = {"sasrec": Candidate(found.run, found.exported, "split", 1, {})}
    write_bundle(tmp_path, found.data, found.split.popularity, candidates, {}, found.split.test)
    published = Published.load(tmp_path, "sasrec")

    def started(fields: Sequence[str], without: str = "") -> Encoder:
        """A new network of data in which a shelf is gone, so that values have other numbers."""
        items = [i for i in shelf_items() if not i["item_id"].startswith(f"{without}-")]
        kept = {i["item_id"] for i in items}
        events = [("u", i, START + n) for n, i in enumerate(sorted(kept))]
        data = dataset(events, items)
        run = settings(fusion, fields)
        read = features_of(data, everything(data)[0], run.model.metadata, run.model.hidden_units)
        encoder = Encoder(run.model, len(data.catalogue), read)
        published.give(encoder, data.catalogue)
        return encoder.eval()

    same, fewer, swapped = started(("shelf", "colour")), started(("shelf", "colour"), "2"), started(("colour", "shelf"))
    shelf = found.fitted.encoder.items.parts[0].get_parameter("values.weight")
    assert torch.equal(same.items.parts[0].get_parameter("values.weight"), shelf)
    assert torch.equal(fewer.items.parts[0].get_parameter("values.weight"), shelf[[0, 1, 2, 4, 5, 6]])
    assert torch.equal(swapped.items.parts[1].get_parameter("values.weight"), shelf)
    mixing = "ask" if fusion == "gate" else "mix.weight"
    trained = found.fitted.encoder.items.get_parameter(mixing)
    assert torch.equal(same.items.get_parameter(mixing), trained)
    assert not torch.equal(swapped.items.get_parameter(mixing), trained)  # it weighs the fields in another order


# --- held-out items -----------------------------------------------------------------------------------


def test_what_is_held_out_is_in_nothing_that_is_trained_on() -> None:
    data = shelves()
    held = hold_out(data, 0.2, seed=0)
    assert len(held.items) == 6
    split = leave_one_out(held.rest)
    trained = everything(held.rest)[0].item
    assert not np.isin(trained, held.items).any()
    assert len(trained) + np.isin(data.item, held.items).sum() == len(data.item)
    assert not np.isin(split.validation.target, held.items).any()
    assert np.isin(held.asked.target, held.items).all()
    np.testing.assert_array_equal(hold_out(data, 0.2, seed=0).items, held.items)
    assert not np.array_equal(hold_out(data, 0.2, seed=1).items, held.items)


def test_the_history_of_a_held_out_event_is_what_came_before_it() -> None:
    rows = [("u", i, START + n) for n, i in enumerate(["a", "x", "b", "c", "x"])]
    data = dataset([*rows, ("v", "x", START), ("v", "a", START)])
    x = data.catalogue.index_by_id["x"]
    seed = next(s for s in range(100) if hold_out(data, 0.25, s).items.tolist() == [x])
    held = hold_out(data, 0.25, seed)
    ids = [[data.catalogue[int(i)].item_id for i in h] for h in held.asked.histories()]
    assert ids == [["a"], ["a", "b", "c"]]  # v had done nothing before
    assert held.asked.target.tolist() == [x, x]


@pytest.mark.slow
def test_the_figures_of_held_out_items_stand_beside_chance_and_popularity(tmp_path: Path) -> None:
    held = hold_out(shelves(), 0.2, seed=1)
    found = measure_cold(settings("add"), held, tmp_path, seed=0)
    among, everywhere = found["among_held_out"], found["among_all"]
    assert among["sasrec"]["ndcg@10"] > among["random"]["ndcg@10"] + 0.1
    assert among["random"]["hr@10"] > 0.9  # of six items; below 1 where the user had it before
    assert everywhere["popular"]["hr@10"] == 0  # no events, so last, ties included
    assert everywhere["random"]["hr@10"] == pytest.approx(10 / 30, abs=0.1)
    assert found["items"] == 6
    assert found["fields"] == ["shelf", "colour"]
