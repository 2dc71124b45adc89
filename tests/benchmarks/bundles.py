"""Bundles of any size to measure on: a real network with random weights over items that lie in clusters.

Speed does not depend on what a network has learnt, and recall of an approximate index depends on how vectors lie:
those that a trained model makes lie in clusters, and so do these. Every item has categories by which a filter can leave
a half, a tenth, a hundredth or a thousandth of the catalogue.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
import torch

from shared import bundle as bundles
from shared.bundle import AvailabilityInfo, DataInfo, IndexInfo, Manifest, ModelInfo
from shared.catalogue import Catalogue, Item
from shared.encoder import Vectors
from shared.events import HistoryPolicy, IntArray
from shared.popularity import Popularity
from shared.retrieval import build_index, links
from shared.times import DAY, of_year, render
from trainer.config import load_config
from trainer.export import apart, export
from trainer.transformer import Encoder

SHARES: Final = {"half": 2, "tenth": 10, "hundredth": 100, "thousandth": 1000}
"""Categories `half:0`, `tenth:0`, ...: every item of which one in so many carries them."""
BORN: Final = of_year(2000)
SINCE: Final = of_year(2024)


def clustered(count: int, width: int, seed: int = 0) -> Vectors:
    """(N, D) vectors of a typical trained scale in clusters of about fifty, no two alike."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(max(count // 50, 1), width))
    lengths = rng.lognormal(0, 0.2, (count, 1))  # trained vectors differ in length: popular items have long ones
    spread = centres[rng.integers(len(centres), size=count)] + 0.6 * rng.normal(size=(count, width))
    return np.asarray(0.15 * lengths * spread, np.float32)


def random_bundle(
    folder: Path,
    items: int,
    *,
    width: int = 64,
    blocks: int = 2,
    max_length: int = 200,
    version: str = "2024-06-01T00-00-00Z-bench",
    seed: int = 0,
    vectors: Vectors | None = None,
) -> Path:
    """A bundle with one model "sasrec" and `items` items "1".."items", made live in `folder`; its path."""
    size = (f"model.hidden_units={width}", f"model.blocks={blocks}", f"model.max_length={max_length}")
    config = load_config("sasrec-full", size)
    torch.manual_seed(seed)
    network = Encoder(config.model, items)
    chosen = clustered(items, width, seed) if vectors is None else vectors
    with torch.no_grad():
        network.items.ids.weight[1 : items + 1] = torch.from_numpy(chosen)
    exported = export(network, config)
    catalogue = Catalogue.number(
        Item(
            str(i),
            f"Item number {i}",
            tuple(f"{name}:{i % share}" for name, share in SHARES.items()),
            BORN + i * 60_000_000,
        )
        for i in range(1, items + 1)
    )
    rng = np.random.default_rng(seed)
    counted: IntArray = np.minimum(rng.zipf(1.2, 20 * items), items).astype(np.int64)
    popularity = Popularity.of_events(counted, SINCE + rng.integers(0, 100, len(counted)) * DAY, items)
    with bundles.staged(folder) as staging:
        bundles.write_data(staging, catalogue, popularity)
        onnx, tables = apart(exported.onnx)
        index = build_index(exported.vectors)
        bundles.write_model(staging, "sasrec", onnx, exported.vectors, index, tables=tables)
        manifest = Manifest(
            schema_version=bundles.SCHEMA_VERSION,
            version=version,
            created=render(SINCE + 101 * DAY),
            data=DataInfo(
                source="tests/benchmarks/bundles.py",
                fingerprint=f"random {items} {seed}",
                events=len(counted),
                users=1,
                items=items,
                first_event=render(SINCE),
                last_event=render(SINCE + 100 * DAY),
                has_times=True,
            ),
            history_policy=HistoryPolicy(),
            availability=AvailabilityInfo(
                policy="first_event",
                declared=items,
                from_first_event=0,
                always=0,
                contradicted=0,
                events_before_declared=0,
            ),
            default_model="sasrec",
            models={
                "sasrec": ModelInfo(
                    kind="encoder",
                    encoder=exported.spec,
                    fit="all",
                    parity=exported.parity,
                    index=IndexInfo(m=links(items), ef_construction=200, ef=200, recall_at_10=None, recall_at_100=None),
                    metrics={},
                    config={},
                )
            },
            baselines={},
            files={},
        )
        bundles.write_manifest(staging, manifest)
        path = bundles.seal(staging, folder, version)
    bundles.point_current(folder, version)
    return path
