"""Settings: presets, overrides, and messages that name what to write instead."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from tests.trained import config, cyclic_events, dataset
from trainer.config import (
    PRESETS,
    ConfigError,
    EvaluationConfig,
    MetadataConfig,
    RunConfig,
    load_config,
    one_data,
    preset_names,
    settings,
    source_settings,
)
from trainer.pipeline import Run, identity
from trainer.sources import SOURCES

MINE = """
name: mine
data:
  source: {kind: files, events: e.csv, columns: {user: u, item: i}}
model: {kind: sasrec}
"""


@pytest.fixture
def mine(tmp_path: Path) -> str:
    file = tmp_path / "mine.yaml"
    file.write_text(MINE)
    return str(file)


def refusal(preset: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(preset, overrides)
    return str(caught.value)


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_loads(name: str) -> None:
    found = load_config(name)
    assert RunConfig.model_validate(found.model_dump(mode="json")) == found


def test_there_are_presets() -> None:
    assert preset_names()
    assert {f.stem for f in PRESETS.iterdir() if f.suffix == ".yaml"} == set(preset_names())


def test_overrides_are_typed(mine: str) -> None:
    found = load_config(
        mine,
        ["training.lr=3e-4", "model.blocks=3", "publish.refit=false", "data.history.minimum_value=4",
         "data.history.sequence_types=[view,like]", "name=other"],
    )  # fmt: skip
    assert (found.training.lr, found.model.blocks, found.publish.refit, found.name) == (3e-4, 3, False, "other")
    assert found.data.history.minimum_value == 4.0
    assert found.data.history.sequence_types == ("view", "like")


def test_an_override_leaves_its_neighbours_as_the_file_has_them(mine: str) -> None:
    before, after = load_config(mine), load_config(mine, ["model.heads=2"])
    assert after.model.model_dump() == {**before.model.model_dump(), "heads": 2}
    assert after.data == before.data


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.hiden_units=64", "model.hiden_units: unknown key; did you mean model.hidden_units?"),
        ("trainning.lr=0.1", "trainning: unknown key; did you mean training?"),
        ("data.source.evnts=x", "data.source.evnts: unknown key; did you mean data.source.events?"),
        ("data.history.minimum=4", "data.history.minimum: unknown key; did you mean data.history.minimum_value?"),
        ("index.zzz=1", "index.zzz: unknown key; there are ef, ef_construction, m, threads"),
        ("training.lr=fast", "training.lr: Input should be a valid number"),
        ("training.epochs=2.5", "training.epochs: "),
        ("model.dropout=1", "model.dropout: Input should be less than 1"),
        ("model.max_length=500", "model.max_length: "),
        ("model.kind=gru", "model.kind: "),
        ("model.heads=3", "model.heads 3 does not divide hidden_units 64"),
        ("name=My Model", "name: "),
        ("data.source.kind=nosuch", "data.source: "),
    ],
)
def test_a_wrong_setting_is_named_with_the_nearest_right_one(mine: str, override: str, said: str) -> None:
    assert said in refusal(mine, override)


def test_all_wrong_settings_are_named_at_once(mine: str) -> None:
    said = refusal(mine, "model.blocks=0", "training.patience=0")
    assert "model.blocks: " in said
    assert "training.patience: " in said


@pytest.mark.parametrize("text", ["name: [", "a: b: c", "{", "\t- x"])
def test_bad_yaml_names_the_file(tmp_path: Path, text: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    said = refusal(str(file))
    assert "bad.yaml" in said
    assert "not readable as YAML" in said


@pytest.mark.parametrize("text", ["", "- name: x", "just words"])
def test_yaml_of_another_shape_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "odd.yaml"
    file.write_text(text)
    assert "odd.yaml" in refusal(str(file))


def test_an_unknown_preset_names_the_nearest_and_all_others() -> None:
    said = refusal("sasrec-quik")
    assert "did you mean sasrec-quick?" in said
    assert all(name in said for name in preset_names())
    assert "no preset 'missing.yaml'" in refusal("missing.yaml")


def test_models_that_differ_in_data_cannot_share_a_bundle() -> None:
    other = config("bert4rec", data={"history": {"minimum_value": 4}})
    with pytest.raises(ConfigError, match="differ in `data`"):
        one_data([config("sasrec"), other])


def test_models_of_one_name_cannot_share_a_bundle() -> None:
    with pytest.raises(ConfigError, match="same name"):
        one_data([config("sasrec", name="x"), config("bert4rec", name="x")])
    one_data([config("sasrec"), config("bert4rec")])


@pytest.mark.parametrize("source", [None, {"kind": "sql", "url": "postgresql://me:s3cret@db/upnext"}])
def test_a_run_reads_back_the_settings_it_was_made_with(tmp_path: Path, source: dict[str, str] | None) -> None:
    made = config("bert4rec", data={"source": source} if source else {}, training={"lr": 0.5})
    run = Run.of(tmp_path, made.name, "split")
    run.start(made, dataset(cyclic_events()), None)
    assert run.config() == made
    assert (run.folder / "config.yaml").stat().st_mode & 0o077 == 0  # it may hold a password


@pytest.mark.parametrize("wrong", [{"seed": -1}, {"seed": 2**32}, {"accelerator": "fast"}])
def test_settings_that_would_end_a_training_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        config(training=wrong)


def test_every_setting_is_listed_with_default_and_meaning() -> None:
    listed = {key: (default, meaning) for key, default, meaning in settings()}
    assert listed["model.hidden_units"][0] == "64"
    assert listed["data.history.minimum_value"][0] == "null"
    assert listed["data.history.seen_types"][0] == "[view,click,play,read,like,rating,cart,purchase]"
    assert listed["data.source"][0] == "required"
    assert [key for key, (_, meaning) in listed.items() if not meaning] == []
    assert set(source_settings()) == set(SOURCES)
    assert [row for rows in source_settings().values() for row in rows if not row[2]] == []
    assert ("data.source.item_columns.id", "required", "Id of the item, as in the events.") in source_settings()[
        "files"
    ]


def test_every_default_that_is_listed_can_be_typed_as_it_stands(mine: str) -> None:
    typed = [f"{key}={default}" for key, default, _ in settings() if default != "required"]
    files = [row for row in source_settings()["files"] if row[1] != "required" and ".item_columns." not in row[0]]
    typed += [f"{key}={default}" for key, default, _ in files]
    assert load_config(mine, typed) == load_config(mine)


def test_what_decides_the_training_part_is_in_a_run_s_identity_and_nothing_else_of_evaluation() -> None:
    data = dataset(cyclic_events(users=4))

    def of(**evaluation: object) -> str:
        return identity(config(evaluation=evaluation), data)

    temporal = of(split="temporal")
    assert of() != temporal != of(split="temporal", quantile=0.8)
    assert of() == of(quantile=0.8, targets="successive", cutoffs=(1, 10), ease=False)
    assert temporal == of(split="temporal", targets="successive", ease_l2=1.0)


def test_figures_of_one_bundle_mean_the_same() -> None:
    with pytest.raises(ConfigError, match="differ in `evaluation`"):
        one_data([config(name="a"), config(name="b", evaluation={"split": "temporal"})])


def test_the_readme_tells_the_settings_of_evaluation() -> None:
    """Names and defaults; the words are the README's own."""
    text = (Path(__file__).parent.parent / "README.md").read_text().split("### Evaluation")[1].split("\n## ")[0]
    told = dict(re.findall(r"^\| `(\w+)` \| `(.*?)` \|", text, re.M))
    known = EvaluationConfig().model_dump(mode="json")
    assert told == {name: str(v).lower() if isinstance(v, bool) else str(v) for name, v in known.items()}


def test_the_readme_tells_the_settings_of_metadata() -> None:
    text = (Path(__file__).parent.parent / "README.md").read_text().split("### Item metadata")[1].split("\n### ")[0]
    told = dict(re.findall(r"^\| `(\w+)` \| `(.*?)` \|", text, re.M))
    assert told == {name: str(value) for name, value in MetadataConfig().model_dump(mode="json").items()}


@pytest.mark.parametrize("override", ["fusion=mean", "dropout=1", "id_dropout=-0.1", "min_items=0", "max_values=0"])
def test_wrong_settings_of_metadata_are_named(mine: str, override: str) -> None:
    assert f"model.metadata.{override.partition('=')[0]}: " in refusal(mine, f"model.metadata.{override}")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["training.loss=hinge"], "training.loss"),
        (["training.negatives=64"], "negatives is for loss sampled_softmax or gbce or bce, and loss is cross_entropy"),
        (["training.loss=gbce", "training.in_batch_negatives=9"], "in_batch_negatives is for loss sampled_softmax"),
        (["training.loss=bce", "training.calibration=0.5"], "calibration is for loss gbce"),
    ],
)
def test_settings_that_the_loss_does_not_read_are_refused(mine: str, overrides: list[str], said: str) -> None:
    assert said in refusal(mine, *overrides)


def test_every_loss_has_its_number_of_negatives(mine: str) -> None:
    counts = {loss: load_config(mine, [f"training.loss={loss}"]).training.negative_count for loss in ("gbce", "bce")}
    assert counts == {"gbce": 256, "bce": 1}
    assert load_config(mine, ["training.loss=bce", "training.negatives=3"]).training.negative_count == 3


def test_saved_settings_of_any_loss_can_be_read_again(mine: str) -> None:
    saved = load_config(mine, ["training.loss=sampled_softmax", "training.in_batch_negatives=64"])
    assert RunConfig.model_validate(saved.model_dump()) == saved
    assert RunConfig.model_validate(config().model_dump()) == config()
