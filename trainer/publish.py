"""From trained models to a live bundle: measured through the code that serves, gated, sealed, made current."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import hnswlib

from shared.bundle import (
    SCHEMA_VERSION,
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
from shared.retrieval import Retriever, build_index, links
from trainer.config import Fit, IndexConfig, RunConfig
from trainer.dataset import Cases, Dataset, Split
from trainer.errors import TrainerError
from trainer.evaluate import TOP, Served, encode_cases, index_recall, served_lists
from trainer.export import Exported, apart

GATE_METRIC: Final = "ndcg@10"
RECALL_QUERIES: Final = 2_000


class PublishRefusedError(TrainerError):
    """A model that is worse than what it would replace; nothing was changed."""


@dataclass(frozen=True)
class Candidate:
    """A model on its way into a bundle."""

    config: RunConfig
    exported: Exported
    fit: Fit
    epochs: int
    metrics: dict[str, Any]
    index: hnswlib.Index | None = None  # built already


def write_bundle(
    folder: Path,
    dataset: Dataset,
    popularity: Popularity,
    candidates: Mapping[str, Candidate],
    baseline: Mapping[str, Any],
    probes: Cases,
) -> Manifest:
    """Write a complete bundle into `folder`; `probes` are the histories on which index recall is measured."""
    info = dataset.info
    write_data(folder, dataset.catalogue, popularity)
    for name, candidate in candidates.items():
        index = candidate.index or index_of(candidate.exported, candidate.config.index)
        exported = candidate.exported
        network, tables = apart(exported.onnx)
        write_model(folder, name, network, exported.vectors, index, exported.weights, tables)
        if exported.tower is not None:
            exported.tower.save(folder / "models" / name)
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
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


def _recall(model: Model, probes: Cases) -> tuple[float, float] | None:
    sample = probes.sample(RECALL_QUERIES, seed=0)
    asked, queries = encode_cases(model.encoder, sample)
    if not len(asked):
        return None
    return index_recall(queries, model.retriever, 10), index_recall(queries, model.retriever, 100)


def _model_info(candidate: Candidate, recall: tuple[float, float] | None) -> ModelInfo:
    settings = candidate.config.index
    at_10, at_100 = recall or (None, None)
    return ModelInfo.model_validate(
        {
            "kind": "encoder",
            "encoder": candidate.exported.spec,
            "fit": candidate.fit,
            "epochs": candidate.epochs,
            "parity": candidate.exported.parity,
            "index": IndexInfo(
                m=settings.m or links(len(candidate.exported.vectors)), ef_construction=settings.ef_construction,
                ef=settings.ef,
                recall_at_10=at_10, recall_at_100=at_100,
            ),
            "metrics": candidate.metrics,
            "config": candidate.config.model_dump(mode="json"),
        }
    )  # fmt: skip


def index_of(exported: Exported, settings: IndexConfig) -> hnswlib.Index:
    """The HNSW index of an export's vectors."""
    index = build_index(
        exported.vectors, m=settings.m, ef_construction=settings.ef_construction, threads=settings.threads
    )
    index.set_ef(settings.ef)
    return index


def self_recall(exported: Exported, index: hnswlib.Index) -> float | None:
    """Recall@10 of an index with item vectors as queries: a first look, before there are histories."""
    return index_recall(exported.vectors[:RECALL_QUERIES], Retriever(exported.vectors, index), 10)


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
) -> str:
    """What the models were compared with. Raises PublishRefusedError where that is better.

    Of the baselines only popularity counts. The live bundle counts only where it was measured on the very same data
    by the same protocol: figures of other data, or of other held-out events, say nothing.
    """
    popular = [b for name, b in baseline.items() if name.startswith("popular") and b]
    best_popular = max((b[GATE_METRIC] for b in popular), default=0.0)
    rivals = _live_rivals(bundles, dataset, candidates)
    for name, candidate in candidates.items():
        score = candidate.metrics.get("bundle", {}).get(GATE_METRIC)
        if score is None:
            continue  # nobody has the three events that a held-out case takes: nothing to compare
        if score < best_popular:
            raise PublishRefusedError(
                f"{name} reaches {GATE_METRIC} {score:.4f}, popularity {best_popular:.4f}: train longer, look at the "
                f"data, or publish anyway with --force"
            )
        rival, reached = rivals.get(name, ("", 0.0))
        if score < reached * (1 - candidate.config.publish.max_loss):
            raise PublishRefusedError(
                f"{name} reaches {GATE_METRIC} {score:.4f}, the live {rival} {reached:.4f} on the same data; more "
                f"than publish.max_loss={candidate.config.publish.max_loss} worse. Publish anyway with --force"
            )
    named = sorted({rival for rival, _ in rivals.values()})
    return "gate passed: not below popularity; " + (
        f"not below the live {', '.join(named)}" if named else "no live model was measured on this data with this split"
    )


def _live_rivals(bundles: Path, dataset: Dataset, candidates: Mapping[str, Candidate]) -> dict[str, tuple[str, float]]:
    """Candidate -> the live model whose place it takes, and the gate's metric of that.

    That is its namesake; but the first candidate, which answers where no model is named, takes the place of the live
    bundle's default model where that falls out. Only figures of the same data and protocol count.
    """
    try:
        version = current_version(bundles)
        manifest = None if version is None else read_manifest(bundles / version)
    except BundleError:
        return {}  # an unreadable live bundle is no reason to keep a good one out
    if manifest is None or manifest.data.fingerprint != dataset.info.fingerprint:
        return {}
    found = {}
    for place, (name, candidate) in enumerate(candidates.items()):
        falls_out = not place and manifest.default_model not in candidates
        rival = manifest.default_model if falls_out else name
        measured = manifest.models[rival].metrics if rival in manifest.models else {}
        score = measured.get("bundle", {}).get(GATE_METRIC)
        if score is not None and measured.get("protocol") == candidate.metrics.get("protocol"):
            found[name] = (rival, float(score))
    return found


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
