"""Small worlds with known answers, made without torch: real bundles with a hand-made ONNX encoder.

In a cyclic world of N items, i is followed by i + 1 and N by 1. Item vectors are unit vectors, and the "network" is
a table: the query of a history that ends with item i points at i + 1, less at i + 2, and so on around the circle.

    score of item j after item i   N - ((j - i - 1) mod N)      so: i + 1 has N, i itself has 1

Scores are whole numbers, so they are exact on every path.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from shared import bundle as bundles
from shared.bundle import AvailabilityInfo, Bundle, DataInfo, IndexInfo, Manifest, Model, ModelInfo, Parity
from shared.catalogue import Catalogue, Item
from shared.encoder import Encoder, EncoderSpec, Vectors
from shared.events import HistoryPolicy, IntArray
from shared.popularity import Popularity
from shared.retrieval import Mode, Retriever, build_index
from shared.sequences import BUCKET_WIDTH, LARGEST_BUCKET, Clock
from shared.times import DAY, of_year, render

MAX_LENGTH: Final = 32
BUCKETS: Final = (16, 32)
CREATED: Final = "2000-03-01T00:00:00Z"
BORN: Final = of_year(2000)


@dataclass(frozen=True)
class World:
    """What a bundle is made of. `views` are (item id, time) pairs that popularity is counted from."""

    items: tuple[Item, ...]
    views: tuple[tuple[str, int], ...] = ()
    models: tuple[str, ...] = ("sasrec", "bert4rec")
    policy: HistoryPolicy = field(default_factory=HistoryPolicy)
    tables: Mapping[str, Vectors] | None = None  # queries by item index, (N + 2, D); cyclic by default
    vectors: Vectors | None = None  # (N, D); unit vectors by default
    clock: Clock = "none"  # with one, users walk on alone: one item further when their newest event is over an hour old

    @property
    def catalogue(self) -> Catalogue:
        """The items, numbered."""
        return Catalogue.number(self.items)


def cyclic(count: int = 12, **fields: object) -> World:
    """Items "1".."count", one born each day of January 2000 and after, so index = number; "1" is most popular."""
    items = tuple(
        Item(str(i), f"Item {i}", (f"parity:{'even' if i % 2 == 0 else 'odd'}",), BORN + i * DAY)
        for i in range(1, count + 1)
    )
    views = tuple((str(i), BORN + (40 + count + v) * DAY) for i in range(1, count + 1) for v in range(count - i + 1))
    return replace(World(items, views), **fields)  # type: ignore[arg-type]


def circle(count: int) -> Vectors:
    """Queries by item index (N + 2, N) with the scores that the module's docstring draws."""
    table = np.zeros((count + 2, count), np.float32)
    for i in range(1, count + 1):
        table[i] = [count - ((j - i - 1) % count) for j in range(1, count + 1)]
    return table


def exists(item: Item, as_of: int) -> bool:
    """The rule of availability for one item, apart from the code under test."""
    return item.available_from <= as_of < item.available_until and not item.withdrawn


def encoder_bytes(table: Vectors, *, asks_with_mask: bool, clock: Clock = "none") -> bytes:
    """query = table[items[b, lengths[b] - 1]]; one place further left where MASK stands behind the history.

    With a clock, the row of the table is further down by one where the newest event is older than an hour.
    """
    back = 2 if asks_with_mask else 1
    nodes = [
        helper.make_node("Sub", ["lengths", "back"], ["last"]),  # (B,)
        helper.make_node("Unsqueeze", ["last", "one"], ["place"]),  # (B, 1)
        helper.make_node("GatherElements", ["items", "place"], ["found"], axis=1),  # (B, 1)
        helper.make_node("Squeeze", ["found", "one"], ["newest"]),  # (B,)
        *(_AGE if clock != "none" else [helper.make_node("Identity", ["newest"], ["item"])]),
        helper.make_node("Gather", ["table", "item"], ["query"], axis=0),  # (B, D)
    ]
    graph = helper.make_graph(
        nodes,
        "last_item",
        [
            helper.make_tensor_value_info("items", TensorProto.INT64, ["B", "T"]),
            helper.make_tensor_value_info("lengths", TensorProto.INT64, ["B"]),
            *([helper.make_tensor_value_info("ages", TensorProto.INT32, ["B", "T", "T"])] if clock != "none" else []),
        ],
        [helper.make_tensor_value_info("query", TensorProto.FLOAT, ["B", table.shape[1]])],
        [
            numpy_helper.from_array(np.asarray(table, np.float32), "table"),
            numpy_helper.from_array(np.array(back, np.int64), "back"),
            numpy_helper.from_array(np.array([1], np.int64), "one"),
            numpy_helper.from_array(np.array([0, -1], np.int64), "rows"),
            numpy_helper.from_array(np.array(_HOUR, np.int32), "hour"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    data: bytes = model.SerializeToString()
    return data


_HOUR: Final = int(np.log(3600) / BUCKET_WIDTH)
_AGE: Final = [  # age of the newest event at the question: ages[b, lengths - 1, lengths - back]
    helper.make_node("Shape", ["items"], ["wide"], start=1, end=2),  # (1,) T
    helper.make_node("Sub", ["lengths", "one"], ["at"]),  # (B,)
    helper.make_node("Mul", ["at", "wide"], ["row"]),  # (B,)
    helper.make_node("Add", ["row", "last"], ["cell"]),  # (B,)
    helper.make_node("Unsqueeze", ["cell", "one"], ["cells"]),  # (B, 1)
    helper.make_node("Reshape", ["ages", "rows"], ["flat"]),  # (B, T * T)
    helper.make_node("GatherElements", ["flat", "cells"], ["ages_found"], axis=1),  # (B, 1)
    helper.make_node("Squeeze", ["ages_found", "one"], ["age"]),  # (B,)
    helper.make_node("Greater", ["age", "hour"], ["old"]),  # (B,)
    helper.make_node("Cast", ["old"], ["step"], to=TensorProto.INT64),  # (B,)
    helper.make_node("Add", ["newest", "step"], ["item"]),  # (B,)
]


class BrokenIndex:
    """An index whose search fails as hnswlib's does when it finds too few."""

    def __init__(self) -> None:
        self.calls = 0

    def knn_query(self, *_: object, **__: object) -> tuple[IntArray, Vectors]:
        self.calls += 1
        raise RuntimeError("Cannot return the results in a contiguous 2D array. Probably ef or M is too small")


def write_bundle(
    folder: Path, world: World, *, version: str = "2000-03-01T00-00-00Z-test", current: bool = True
) -> Path:
    """A real bundle of `world` in `folder`, made live unless told otherwise; its path."""
    catalogue = world.catalogue
    count = len(catalogue)
    vectors = np.eye(count, dtype=np.float32) if world.vectors is None else world.vectors
    with bundles.staged(folder) as staging:
        bundles.write_data(staging, catalogue, popularity(world, catalogue))
        for name in world.models:
            table = circle(count) if world.tables is None else world.tables[name]
            onnx_bytes = encoder_bytes(table, asks_with_mask=name == "bert4rec", clock=world.clock)
            bundles.write_model(staging, name, onnx_bytes, vectors, build_index(vectors, m=8, ef_construction=50))
        bundles.write_manifest(staging, manifest(world, version, vectors.shape[1]))
        path = bundles.seal(staging, folder, version)
    if current:
        bundles.point_current(folder, version)
    return path


def in_memory(world: World, mode: Mode = Mode.AUTO) -> Bundle:
    """The bundle of `world` as loading would give it, without a file."""
    catalogue = world.catalogue
    count = len(catalogue)
    vectors = np.eye(count, dtype=np.float32) if world.vectors is None else world.vectors
    described = manifest(world, "2000-03-01T00-00-00Z-test", vectors.shape[1])
    models = {}
    for name, info in described.models.items():
        table = circle(count) if world.tables is None else world.tables[name]
        network = encoder_bytes(table, asks_with_mask=name == "bert4rec", clock=world.clock)
        index = build_index(vectors, m=8, ef_construction=50)
        index.set_ef(info.index.ef)
        models[name] = Model(name, info, Encoder(network, info.encoder), Retriever(vectors, index, mode))
    return Bundle(Path(), described, catalogue, popularity(world, catalogue), models)


def popularity(world: World, catalogue: Catalogue) -> Popularity:
    """Daily counts of the world's views."""
    item: IntArray = np.array([catalogue.index_by_id[i] for i, _ in world.views], np.int64)
    times: IntArray = np.array([t for _, t in world.views], np.int64)
    return Popularity.of_events(item, times, len(catalogue))


def manifest(world: World, version: str, width: int) -> Manifest:
    """A manifest with fixed times and plausible figures."""
    times = [t for _, t in world.views]
    return Manifest(
        schema_version=bundles.SCHEMA_VERSION,
        version=version,
        created=CREATED,
        data=DataInfo(
            source="tests/worlds.py",
            fingerprint="test",
            events=len(times),
            users=1,
            items=len(world.items),
            first_event=render(min(times)) if times else None,
            last_event=render(max(times)) if times else None,
            has_times=True,
        ),
        history_policy=world.policy,
        availability=AvailabilityInfo(
            policy="first_event",
            declared=len(world.items),
            from_first_event=0,
            always=0,
            contradicted=0,
            events_before_declared=0,
        ),
        default_model=world.models[0],
        models={name: model_info(name, len(world.items), width, world.clock) for name in world.models},
        baselines={},
        files={},
    )


def model_info(name: str, count: int, width: int, clock: Clock = "none") -> ModelInfo:
    """What the manifest says of one model."""
    return ModelInfo(
        kind="encoder",
        encoder=EncoderSpec(
            architecture=name,
            item_count=count,
            width=width,
            max_length=MAX_LENGTH,
            asks_with_mask=name == "bert4rec",
            buckets=BUCKETS,
            clock=clock,
            largest_time=LARGEST_BUCKET if clock != "none" else 0,
        ),
        fit="all",
        parity=Parity(lengths=(1, 16), max_vector_difference=0.0, max_score_difference=0.0, top10_changes=0),
        index=IndexInfo(m=8, ef_construction=50, ef=100, recall_at_10=1.0, recall_at_100=1.0),
        metrics={"bundle": {"hr@10": 1.0}},
        config={},
    )


def after(item: int, count: int, without: Sequence[int] = ()) -> list[str]:
    """The right answer in a cyclic world: what follows `item`, in order, around the circle."""
    circle_of = [(item + step) % count + 1 for step in range(count)]
    return [str(i) for i in circle_of if i not in without]
