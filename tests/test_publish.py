"""The gate before CURRENT: what is worse stays out, and a refusal changes nothing."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared.bundle import TABLES, Bundle, BundleError, current_version, read_manifest
from shared.retrieval import links
from tests.trained import ITEMS, World, unchanged, world
from trainer import publish as module
from trainer.config import IndexConfig
from trainer.export import apart
from trainer.pipeline import rivals
from trainer.publish import Candidate, PublishRefusedError, check_gate, index_of, publish, self_recall

POPULAR = {"popular": {"ndcg@10": 0.3}, "popular_30d": {"ndcg@10": 0.4}}


@pytest.fixture(autouse=True)
def versions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every bundle its own name, even within one second."""
    numbers = count(1)
    monkeypatch.setattr(module, "new_version", lambda: f"v{next(numbers)}")


@pytest.fixture
def circle() -> World:
    return world("sasrec")


def put(bundles: Path, found: World, score: float, *, force: bool = False, **settings: Any) -> Path:
    """Publish the model of the circle as if it had measured `score`."""
    candidates = {"sasrec": found.candidate(score, **settings)}
    return publish(bundles, found.dataset, found.split.popularity, candidates, POPULAR, found.split.test, force=force)


def test_what_is_published_is_live_and_loads(tmp_path: Path, circle: World) -> None:
    target = put(tmp_path, circle, 0.9)
    assert current_version(tmp_path) == target.name
    assert sorted(f.name for f in tmp_path.iterdir()) == ["CURRENT", target.name]
    bundle = Bundle.load(target)
    np.testing.assert_array_equal(bundle.models["sasrec"].retriever.vectors, circle.exported.vectors)
    assert bundle.catalogue.items == circle.dataset.catalogue.items


def test_tables_that_lie_outside_of_the_network_are_part_of_the_bundle(
    tmp_path: Path, circle: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Bundle.load(put(tmp_path, circle, 0.9)).models["sasrec"].encoder
    monkeypatch.setattr(module, "apart", partial(apart, large=1000))
    target = put(tmp_path, circle, 0.9)
    histories = [np.arange(1, 6)]
    parted = Bundle.load(target).models["sasrec"].encoder
    np.testing.assert_array_equal(parted.encode(histories), whole.encode(histories))
    with (target / "models/sasrec" / TABLES).open("r+b") as tables:
        tables.write(b"x")
    with pytest.raises(BundleError, match=TABLES):
        Bundle.load(target)


def test_the_manifest_says_where_everything_comes_from(tmp_path: Path, circle: World) -> None:
    manifest = read_manifest(put(tmp_path, circle, 0.9, max_loss=0.2))
    assert manifest.data == circle.dataset.info
    assert manifest.history_policy == circle.dataset.policy
    assert manifest.availability == circle.dataset.availability
    assert manifest.default_model == "sasrec"
    assert manifest.baselines == POPULAR
    info = manifest.models["sasrec"]
    assert (info.kind, info.fit, info.encoder) == ("encoder", "split", circle.exported.spec)
    assert info.parity == circle.exported.parity
    assert info.metrics["bundle"]["ndcg@10"] == 0.9
    assert info.config["publish"]["max_loss"] == 0.2
    assert info.config["training"]["lr"] == circle.config.training.lr
    assert (info.index.recall_at_10, info.index.recall_at_100) == (1.0, 1.0)
    assert (info.index.m, info.index.ef) == (links(len(circle.exported.vectors)), circle.config.index.ef)


def test_a_model_that_popularity_beats_is_refused(tmp_path: Path, circle: World) -> None:
    put(tmp_path, circle, 0.4)  # as good as the better of both is good enough
    with unchanged(tmp_path), pytest.raises(PublishRefusedError, match=r"0\.3900, popularity 0\.4000.*--force"):
        put(tmp_path, circle, 0.39)


@pytest.mark.parametrize(("max_loss", "score"), [(0.05, 0.7599), (0.0, 0.7999), (0.5, 0.40 - 1e-4)])
def test_a_model_worse_than_the_live_one_on_the_same_data_is_refused(
    tmp_path: Path, circle: World, max_loss: float, score: float
) -> None:
    put(tmp_path, circle, 0.8)
    with unchanged(tmp_path), pytest.raises(PublishRefusedError):
        put(tmp_path, circle, score, max_loss=max_loss)
    assert put(tmp_path, circle, score + 2e-4, max_loss=max_loss).name == current_version(tmp_path)


def test_force_publishes_anyway(tmp_path: Path, circle: World) -> None:
    put(tmp_path, circle, 0.8)
    assert put(tmp_path, circle, 0.1, force=True).name == current_version(tmp_path) == "v2"


def test_other_data_is_not_compared(tmp_path: Path, circle: World) -> None:
    put(tmp_path, circle, 0.9)
    other = replace(circle, dataset=replace(circle.dataset, timestamp=circle.dataset.timestamp + 1))
    assert put(tmp_path, other, 0.5).name == current_version(tmp_path)


def test_figures_of_another_split_are_not_compared(tmp_path: Path, circle: World) -> None:
    def measured(protocol: str, score: float) -> dict[str, Candidate]:
        found = circle.candidate(score)
        return {"sasrec": replace(found, metrics={**found.metrics, "protocol": protocol})}

    data, split = circle.dataset, circle.split
    publish(tmp_path, data, split.popularity, measured("leave-one-out", 0.9), POPULAR, split.test)
    assert "no live model was measured" in check_gate(tmp_path, data, measured("temporal", 0.5), POPULAR)
    assert "not below the live sasrec" in check_gate(tmp_path, data, measured("leave-one-out", 0.9), POPULAR)
    with pytest.raises(PublishRefusedError, match="the live sasrec"):
        check_gate(tmp_path, data, measured("leave-one-out", 0.5), POPULAR)


def test_only_popularity_is_a_bar_not_every_baseline(tmp_path: Path, circle: World) -> None:
    check_gate(tmp_path, circle.dataset, {"sasrec": circle.candidate(0.5)}, {**POPULAR, "ease": {"ndcg@10": 0.9}})


def test_a_newcomer_beside_the_live_model_is_not_compared(tmp_path: Path, circle: World) -> None:
    put(tmp_path, circle, 0.9)
    candidates = {"sasrec": circle.candidate(0.9), "newcomer": circle.candidate(0.5)}
    assert check_gate(tmp_path, circle.dataset, candidates, POPULAR).endswith("not below the live sasrec")


def test_another_name_is_no_way_around_the_live_default_model(tmp_path: Path, circle: World) -> None:
    """Whoever names no model would get the newcomer's answers from now on."""
    put(tmp_path, circle, 0.9)
    with pytest.raises(PublishRefusedError, match=r"^newcomer reaches ndcg@10 0\.5000, the live sasrec 0\.9000"):
        check_gate(tmp_path, circle.dataset, {"newcomer": circle.candidate(0.5)}, POPULAR)
    said = check_gate(tmp_path, circle.dataset, {"newcomer": circle.candidate(0.95)}, POPULAR)
    assert said.endswith("not below the live sasrec")


def test_a_damaged_live_bundle_keeps_no_good_one_out(tmp_path: Path, circle: World) -> None:
    (put(tmp_path, circle, 0.9) / "manifest.json").write_text("{")
    assert put(tmp_path, circle, 0.5).name == current_version(tmp_path)


def test_one_bad_model_keeps_all_out(tmp_path: Path, circle: World) -> None:
    candidates = {"good": circle.candidate(0.9), "bad": circle.candidate(0.2)}
    with pytest.raises(PublishRefusedError, match=r"^bad "):
        publish(tmp_path, circle.dataset, circle.split.popularity, candidates, POPULAR, circle.split.test)
    assert list(tmp_path.iterdir()) == []


def test_without_measured_cases_there_is_nothing_to_compare(tmp_path: Path, circle: World) -> None:
    check_gate(tmp_path, circle.dataset, {"sasrec": replace(circle.candidate(), metrics={})}, {})


def test_a_bundle_that_does_not_load_is_never_made_live(
    tmp_path: Path, circle: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, circle, 0.9)
    broken = replace(circle, exported=replace(circle.exported, vectors=circle.exported.vectors[:-1]))
    with unchanged(tmp_path), pytest.raises(BundleError):
        put(tmp_path, broken, 0.9)


def test_the_real_model_passes_the_real_gate(tmp_path: Path, circle: World) -> None:
    candidates, popular = {"sasrec": circle.candidate()}, rivals(circle.split, circle.config.evaluation).metrics
    assert max(p["ndcg@10"] for name, p in popular.items() if name != "ease") < 0.8
    target = publish(tmp_path, circle.dataset, circle.split.popularity, candidates, popular, circle.split.test)
    assert current_version(tmp_path) == target.name


def test_an_index_finds_the_vectors_it_was_made_of(circle: World) -> None:
    index = index_of(circle.exported, IndexConfig())
    assert index.get_current_count() == ITEMS
    assert self_recall(circle.exported, index) == 1.0
