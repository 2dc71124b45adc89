"""From trained models to a live bundle: measured through the code that serves, gated, sealed, made current."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal

from shared.bundle import (
    Bundle,
    BundleError,
    IndexInfo,
    Manifest,
    Model,
    ModelInfo,
    current_version,
    new_version,
    point_current,
    read_manifest,
    seal,
    staged,
    write_data,
    write_manifest,
    write_model,
)
from shared.popularity import Popularity
from shared.retrieval import Retriever, build_index
from trainer.config import IndexConfig, RunConfig
from trainer.dataset import Cases, Dataset, Split
from trainer.evaluate import TOP, Served, encode_cases, index_recall, served_lists
from trainer.export import Exported

GATE_METRIC: Final = "ndcg@10"
RECALL_QUERIES: Final = 2_000
Fit = Literal["split", "all"]
"""Whether the weights saw the held-out events."""


class PublishRefusedError(Exception):
    """A model that is worse than what it would replace; nothing was changed."""


@dataclass(frozen=True)
class Candidate:
    """A model on its way into a bundle."""

    config: RunConfig
    exported: Exported
    fit: Fit
    metrics: dict[str, Any]


def write_bundle(
    folder: Path,
    dataset: Dataset,
    popularity: Popularity,
    candidates: Mapping[str, Candidate],
    baseline: Mapping[str, Any],
    probes: Cases,
) -> Manifest:
    """Write a complete bundle into `folder`; `probes` are the histories on which index recall is measured."""
    info = dataset.info()
    write_data(folder, dataset.catalogue, popularity)
    for name, candidate in candidates.items():
        settings = candidate.config.index
        write_model(
            folder, name, candidate.exported.onnx, candidate.exported.vectors,
            m=settings.m, ef_construction=settings.ef_construction,
        )  # fmt: skip
    manifest = Manifest(
        schema_version=1,
        version=new_version(),
        created=f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
        data=info,
        history_policy=dataset.policy,
        availability=dataset.availability,
        default_model=next(iter(candidates)),
        models={name: _model_info(candidate, recall=None) for name, candidate in candidates.items()},
        baselines=dict(baseline),
        files={},
    )
    write_manifest(folder, manifest)
    # The recall of an index can only be measured on the files as the service will load them.
    loaded = Bundle.load(folder)
    measured = {
        name: _model_info(candidate, recall=_recall(loaded.models[name], probes))
        for name, candidate in candidates.items()
    }
    return write_manifest(folder, manifest.model_copy(update={"models": measured}))


def _recall(model: Model, probes: Cases) -> tuple[float, float]:
    sample = probes.sample(RECALL_QUERIES, seed=0)
    _, queries = encode_cases(model.encoder, sample.histories())
    return index_recall(queries, model.retriever, 10), index_recall(queries, model.retriever, 100)


def _model_info(candidate: Candidate, recall: tuple[float, float] | None) -> ModelInfo:
    settings = candidate.config.index
    at_10, at_100 = recall or (0.0, 0.0)
    return ModelInfo.model_validate(
        {
            "kind": "encoder",
            "encoder": candidate.exported.spec,
            "fit": candidate.fit,
            "parity": candidate.exported.parity,
            "index": IndexInfo(
                m=settings.m, ef_construction=settings.ef_construction, ef=settings.ef,
                recall_at_10=at_10, recall_at_100=at_100,
            ),
            "metrics": candidate.metrics,
            "config": candidate.config.model_dump(mode="json"),
        }
    )  # fmt: skip


def write_index(exported: Exported, settings: IndexConfig, file: Path) -> float:
    """Build the HNSW index of an export; its recall@10 with item vectors as queries."""
    vectors = exported.vectors
    index = build_index(vectors, m=settings.m, ef_construction=settings.ef_construction)
    index.set_ef(settings.ef)
    index.save_index(str(file))
    return index_recall(vectors[:RECALL_QUERIES], Retriever(vectors, index), 10)


def measure(
    dataset: Dataset, split: Split, candidates: Mapping[str, Candidate], scratch: Path, top: int = TOP
) -> dict[str, Served]:
    """Write the split's models as a bundle aside, load it, and ask it. Model name -> lists for the test cases."""
    with staged(scratch) as folder:
        write_bundle(folder, dataset, split.popularity, candidates, {}, split.test)
        bundle = Bundle.load(folder)
        return {
            name: served_lists(split.test, model.encoder, model.retriever, split.rule, top)
            for name, model in bundle.models.items()
        }


def check_gate(
    bundles: Path, dataset: Dataset, candidates: Mapping[str, Candidate], baseline: Mapping[str, Any]
) -> None:
    """Raise PublishRefusedError for a model that popularity beats, or the live bundle on the same data."""
    popular = [b for name, b in baseline.items() if name.startswith("popular") and b]
    best_popular = max((b[GATE_METRIC] for b in popular), default=0.0)
    live = _live_metrics(bundles, dataset)
    for name, candidate in candidates.items():
        score = candidate.metrics.get("bundle", {}).get(GATE_METRIC)
        if score is None:
            continue  # nobody has the three events that a held-out case takes: nothing to compare
        if score < best_popular:
            raise PublishRefusedError(
                f"{name} reaches {GATE_METRIC} {score:.4f}, popularity {best_popular:.4f}: train longer, look at the "
                f"data, or publish anyway with --force"
            )
        allowed = live.get(name, 0.0) * (1 - candidate.config.publish.max_loss)
        if score < allowed:
            raise PublishRefusedError(
                f"{name} reaches {GATE_METRIC} {score:.4f}, the live bundle {live[name]:.4f} on the same data; more "
                f"than publish.max_loss={candidate.config.publish.max_loss} worse. Publish anyway with --force"
            )


def _live_metrics(bundles: Path, dataset: Dataset) -> dict[str, float]:
    """The gate's metric of each live model, when the live bundle was measured on the very same data."""
    try:
        version = current_version(bundles)
        manifest = None if version is None else read_manifest(bundles / version)
    except BundleError:
        return {}  # an unreadable live bundle is no reason to keep a good one out
    if manifest is None or manifest.data.fingerprint != dataset.info().fingerprint:
        return {}
    found = {name: info.metrics.get("bundle", {}).get(GATE_METRIC) for name, info in manifest.models.items()}
    return {name: score for name, score in found.items() if score is not None}


def publish(
    bundles: Path,
    dataset: Dataset,
    popularity: Popularity,
    candidates: Mapping[str, Candidate],
    baseline: Mapping[str, Any],
    probes: Cases,
    *,
    force: bool = False,
) -> Path:
    """Write, verify, seal and make current. Raises PublishRefusedError, BundleError."""
    if not force:
        check_gate(bundles, dataset, candidates, baseline)
    with staged(bundles) as folder:
        manifest = write_bundle(folder, dataset, popularity, candidates, baseline, probes)
        Bundle.load(folder)
        target = seal(folder, bundles, manifest.version)
    point_current(bundles, manifest.version)
    return target
