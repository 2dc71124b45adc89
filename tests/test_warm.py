"""Warm start: the weights of a published model, item by item id, and no memory of held-out events."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from shared.bundle import Bundle, BundleError, point_current
from tests.trained import ITEMS, START, Row, config, cyclic_events, dataset, unchanged, world
from trainer import pipeline
from trainer.config import ConfigError, RunConfig
from trainer.dataset import leave_one_out
from trainer.errors import TrainingError
from trainer.export import export
from trainer.transformer import Encoder
from trainer.warm import Published, WarmStartError


def published(fit: str = "split") -> Published:
    """The model of the circle, as if its figures had been measured by leave-one-out."""
    found = Published.load(world("sasrec").bundle.path, "sasrec")
    info = found.manifest.models["sasrec"]
    measured = info.model_copy(update={"fit": fit, "metrics": {"protocol": "leave-one-out, full ranking"}})
    return replace(found, manifest=found.manifest.model_copy(update={"models": {"sasrec": measured}}))


def test_every_weight_comes_back() -> None:
    found = world("sasrec")
    fresh = Encoder(found.config.model, ITEMS)
    said = published().give(fresh, found.dataset.catalogue)
    assert said.startswith("started from sasrec of ")
    assert said.endswith("30 of 30 items known")
    for name, weight in found.fitted.encoder.named_parameters():
        assert torch.equal(dict(fresh.named_parameters())[name], weight), name


def test_items_are_matched_by_id_and_new_ones_keep_their_random_vectors() -> None:
    found = world("sasrec")
    # The new catalogue lacks items 1 to 5, has two others, and numbers all of them anew.
    rows: list[Row] = [("u", str(i), START + (100 - i) * 1_000_000) for i in range(6, ITEMS + 1)]
    data = dataset([*rows, ("u", "new-a", START), ("u", "new-b", START + 1)])
    torch.manual_seed(3)
    fresh = Encoder(found.config.model, len(data.catalogue))
    before = fresh.items.ids.weight.detach().clone()
    assert published().give(fresh, data.catalogue).endswith("25 of 27 items known")
    old, new = found.fitted.encoder.items.ids.weight, fresh.items.ids.weight
    for index, item in enumerate(data.catalogue.items, start=1):
        known = found.dataset.catalogue.index_by_id.get(item.item_id)
        assert torch.equal(new[index], before[index] if known is None else old[known])
    assert torch.equal(new[0], old[0])
    assert torch.equal(new[-1], old[-1])  # MASK


def test_another_form_of_network_is_refused() -> None:
    other = Encoder(config("sasrec", model={"hidden_units": 16}).model, ITEMS)
    with pytest.raises(WarmStartError, match=r"has \(16, 32\) for positions\.weight, here \(16, 16\)"):
        published().give(other, world("sasrec").dataset.catalogue)
    deeper = Encoder(config("sasrec", model={"blocks": 2}).model, ITEMS)
    with pytest.raises(WarmStartError, match=r"has nothing for blocks\.1"):
        published().give(deeper, world("sasrec").dataset.catalogue)


@pytest.mark.parametrize(
    "other",
    [{"block": "original"}, {"heads": 4}, {"time_bias": "query"}, {"position_bias": True}, {"positions": "none"},
     {"max_length": 8}],
    ids=str,
)  # fmt: skip
def test_weights_of_another_network_are_refused_even_where_their_shapes_are_the_same(other: dict[str, object]) -> None:
    published().check(config("sasrec", model={"dropout": 0.5}).model)
    ((part, value),) = other.items()
    had = world("sasrec").config.model_dump(mode="json")["model"][part]
    with pytest.raises(WarmStartError, match=rf"trained with model\.{part}={had} \(now {value}\): a warm start"):
        published().check(config("sasrec", model=other).model)
    with pytest.raises(WarmStartError, match=r"model\.kind=sasrec \(now bert4rec\)"):
        published().check(config("bert4rec").model)


def test_a_warm_start_that_cannot_be_replaces_no_run(tmp_path: Path) -> None:
    found, run = world("sasrec"), pipeline.Run.of(tmp_path, "sasrec", "split")
    pipeline.train(config("sasrec", training={"epochs": 1}), found.dataset, "split", tmp_path)
    other = config("sasrec", model={"heads": 2}, training={"init_from": str(found.bundle.path)})
    with unchanged(run.folder), pytest.raises(WarmStartError):
        pipeline.train(other, found.dataset, "split", tmp_path)


@pytest.mark.slow
def test_a_refit_starts_as_its_split_did_whatever_is_live_by_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, shelf, runs, said = world("sasrec"), tmp_path / "bundles", tmp_path / "runs", list[str]()
    version = found.bundle.version
    shutil.copytree(found.bundle.path, shelf / version)
    point_current(shelf, version)
    warm = settings(shelf)
    monkeypatch.setattr(Published, "saw", lambda *_: False)
    pipeline.train(warm, found.dataset, "split", runs)
    monkeypatch.setattr(Published, "saw", lambda *_: True)  # by now another bundle is live, which knows all answers
    shutil.copytree(found.bundle.path, shelf / "another")
    point_current(shelf, "another")
    pipeline.run([warm], found.dataset, runs, tmp_path / "out", said.append, force=True, resume=True)
    refit = pipeline.Run.of(runs, "sasrec", "all")
    assert refit.first() == version
    fitted = pipeline.restore(runs, "sasrec", "all")[1]
    assert float((fitted.encoder.vectors - found.fitted.encoder.vectors).abs().max().detach()) < 1e-3
    assert not [line for line in said if "trained from the start" in line]
    # Where no split of these data started from it, a fit on everything starts from the live one.
    pipeline.train(warm, dataset([*cyclic_events(), ("x", "1", START)]), "all", runs, epochs=1)
    assert refit.first() == version  # as the other one's manifest says, too: its folder was copied
    shutil.rmtree(shelf / version)
    pipeline.train(warm, dataset([*cyclic_events(), ("y", "1", START)]), "all", runs, epochs=1)
    with unchanged(runs), pytest.raises(TrainingError, match=f"{version}, from which .* started, is no longer in"):
        pipeline.train(warm, found.dataset, "all", runs, epochs=1)


@pytest.mark.slow
def test_a_run_of_an_older_version_does_not_say_how_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = world("sasrec")
    warm = settings(found.bundle.path)
    monkeypatch.setattr(Published, "saw", lambda *_: False)
    pipeline.train(warm, found.dataset, "split", tmp_path)
    file = tmp_path / "sasrec" / "split" / "started.json"
    file.write_text(json.dumps({name: v for name, v in json.loads(file.read_text()).items() if name != "first"}))
    pipeline.run([warm], found.dataset, tmp_path, tmp_path / "out", print, force=True, resume=True)
    assert pipeline.Run.of(tmp_path, "sasrec", "all").first() == found.bundle.version


def test_a_bundle_from_before_a_setting_has_its_default() -> None:
    found = published()
    info = found.manifest.models["sasrec"]
    older = {part: value for part, value in info.config["model"].items() if part != "time_bias"}
    models = {"sasrec": info.model_copy(update={"config": {"model": older}})}
    bare = replace(found, manifest=found.manifest.model_copy(update={"models": models}))
    bare.check(config("sasrec").model)
    with pytest.raises(WarmStartError, match=r"time_bias=none \(now query\)"):
        bare.check(config("sasrec", model={"time_bias": "query"}).model)


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(WarmStartError, match="no weights of a model 'other'"):
        Published.load(world("sasrec").bundle.path, "other")
    point_current(tmp_path, "gone")
    with pytest.raises(BundleError):
        Published.load(tmp_path, "sasrec")


def test_who_saw_held_out_events() -> None:
    found, everything = world("sasrec"), published("all")
    assert not published().saw(found.dataset, found.split)  # a split fit on this very data
    assert published().saw(found.dataset, replace(found.split, protocol="another"))
    assert everything.saw(found.dataset, found.split)
    later = leave_one_out(dataset([(u, i, t + 10**16) for u, i, t in cyclic_events(users=20)]))
    assert not everything.saw(later.test.dataset, later)  # all that is held out came after it
    without = leave_one_out(dataset(cyclic_events(users=20), has_times=False))
    assert everything.saw(without.test.dataset, without)


def settings(bundle: Path, **training: object) -> RunConfig:
    return config("sasrec", training={"epochs": 1, "lr": 1e-6, "init_from": str(bundle), **training})


@pytest.mark.slow
def test_a_training_on_everything_goes_on_where_the_bundle_was(tmp_path: Path) -> None:
    found, said = world("sasrec"), list[str]()
    warm = settings(found.bundle.path)
    fitted = pipeline.train(warm, found.dataset, "all", tmp_path, epochs=1, say=said.append)
    gap = (fitted.encoder.vectors - found.fitted.encoder.vectors).abs().max()
    assert float(gap.detach()) < 1e-3
    assert said[0].endswith("30 of 30 items known")


@pytest.mark.slow
def test_a_split_starts_cold_where_the_bundle_knows_its_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, said = world("sasrec"), list[str]()
    monkeypatch.setattr(Published, "saw", lambda *_: True)
    fitted = pipeline.train(settings(found.bundle.path), found.dataset, "split", tmp_path, say=said.append)
    assert said == [f"sasrec: {found.bundle.version} knows held-out events; the split is trained from the start"]
    assert fitted.best is not None
    assert fitted.best < 0.5
    monkeypatch.setattr(Published, "saw", lambda *_: False)
    warm = pipeline.train(settings(found.bundle.path), found.dataset, "split", tmp_path, say=said.append)
    assert warm.best is not None
    assert warm.best > 0.9


@pytest.mark.slow
def test_what_is_published_began_as_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`run` from a bundle that knows the held-out events: cold on the split, so cold on all events too."""
    found, said = world("sasrec"), list[str]()
    monkeypatch.setattr(Published, "saw", lambda *_: True)
    pipeline.run([settings(found.bundle.path)], found.dataset, tmp_path, tmp_path / "bundles", said.append, force=True)
    assert not any("items known" in line for line in said)


def test_a_refit_that_cannot_be_resumed_is_said_before_the_split_is_trained(tmp_path: Path) -> None:
    found, run = world("sasrec"), pipeline.Run.of(tmp_path, "sasrec", "all")
    run.start(config("sasrec", training={"epochs": 7}), found.dataset, 3)
    (run.folder / "last.ckpt").touch()
    with pytest.raises(ConfigError, match=r"training\.epochs=7 \(now 2\)"):
        pipeline.run(
            [config("sasrec", training={"epochs": 2})], found.dataset, tmp_path, tmp_path / "b", print, resume=True
        )
    assert (run.folder / "last.ckpt").exists()
    assert not (tmp_path / "sasrec" / "split").exists()


def test_a_second_model_that_cannot_be_resumed_is_said_before_the_first_is_trained(tmp_path: Path) -> None:
    found, run = world("sasrec"), pipeline.Run.of(tmp_path, "bert4rec", "split")
    run.start(config("bert4rec", training={"epochs": 7}), found.dataset, None)
    (run.folder / "last.ckpt").touch()
    both = [config("sasrec", training={"epochs": 1}), config("bert4rec", training={"epochs": 1})]
    with pytest.raises(ConfigError, match=r"bert4rec.*training\.epochs=7 \(now 1\)"):
        pipeline.run(both, found.dataset, tmp_path, tmp_path / "b", print, resume=True)
    assert not (tmp_path / "sasrec").exists()


@pytest.mark.slow
def test_a_refit_follows_from_its_split(tmp_path: Path) -> None:
    """Trained with one setting, tuned on the split alone, and then the rest of it: no split is trained twice."""
    found, said = world("sasrec"), list[str]()

    def run(*, resume: bool, lr: float) -> None:
        one = config("sasrec", training={"epochs": 1, "lr": lr})
        pipeline.run([one], found.dataset, tmp_path, tmp_path / "b", said.append, force=True, resume=resume)

    run(resume=False, lr=0.01)
    pipeline.train(config("sasrec", training={"epochs": 1, "lr": 0.02}), found.dataset, "split", tmp_path)
    said.clear()
    run(resume=True, lr=0.02)
    assert f"sasrec: {tmp_path / 'sasrec' / 'split'} is trained already" in said
    assert pipeline.Run.of(tmp_path, "sasrec", "all").config().training.lr == 0.02


@pytest.mark.slow
def test_a_training_that_goes_on_is_published_without_figures(tmp_path: Path) -> None:
    found, bundles = world("sasrec"), tmp_path / "bundles"
    fitted = pipeline.train(settings(found.bundle.path), found.dataset, "all", tmp_path, epochs=1)
    pipeline.Run.of(tmp_path, "sasrec", "all").save_export(export(fitted.encoder, settings(found.bundle.path)))

    def publish(*, force: bool) -> Path:
        return pipeline.publish_runs(tmp_path, ["sasrec"], found.dataset, bundles, "all", print, force=force)

    with pytest.raises(ConfigError, match=r"metrics\.json is missing"):
        publish(force=False)
    assert Bundle.load(publish(force=True)).models["sasrec"].info.metrics == {}
    metrics = pipeline.Run.of(tmp_path, "sasrec", "split").folder / "metrics.json"
    metrics.parent.mkdir()
    metrics.write_text('{"run": "another", "protocol": "another", "bundle": {}}')
    with pytest.raises(TrainingError, match="other settings or data"):
        publish(force=False)
    assert Bundle.load(publish(force=True)).models["sasrec"].info.metrics == {}


def test_a_bundle_that_is_not_there_is_said_before_anything_is_trained(tmp_path: Path) -> None:
    with pytest.raises((TrainingError, BundleError)):
        pipeline.train(settings(tmp_path / "no"), world("sasrec").dataset, "all", tmp_path / "runs", epochs=1)
    assert not (tmp_path / "runs").exists()


def test_weights_are_plain_arrays() -> None:
    file = world("sasrec").bundle.path / "models" / "sasrec" / "weights.npz"
    with np.load(file, allow_pickle=False) as kept:
        assert kept["items.ids.weight"].shape == (ITEMS + 2, 32)
