"""The command line as a person uses it: from a CSV to a live bundle, and clear words when something is wrong."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import polars as pl
import pytest
import yaml

from shared.bundle import Bundle, current_version
from shared.events import item_keys
from shared.times import DAY, render
from shared.tower import ItemTower
from tests.trained import START, Row, contents, cyclic_events, unchanged
from trainer.__main__ import main

ITEMS = 12
MODEL = {"kind": "sasrec", "hidden_units": 16, "blocks": 1, "dropout": 0.0, "max_length": 8}
TRAINING = {"epochs": 12, "batch_size": 16, "lr": 0.02, "threads": 1, "accelerator": "cpu"}
ONE_FIT = "publish.refit=false"  # half the training, where a second fit on everything would show nothing


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


def call(*words: str | Path) -> Done:
    """`python -m trainer ...` in this process."""
    out, err = io.StringIO(), io.StringIO()
    argv = ["trainer", *map(str, words)]
    with patch.object(sys, "argv", argv), redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as end:
        main()
    return Done(int(end.value.code or 0), out.getvalue(), err.getvalue())


def trainer(*words: str | Path) -> str:
    """A call that must succeed; what it said."""
    done = call(*words)
    assert done.code == 0, done.err
    return done.out


def events_file(file: Path, events: Sequence[Row], *, times: bool = True) -> Path:
    with file.open("w", newline="") as opened:
        rows = csv.writer(opened)
        rows.writerow(["who", "what", "when"][: 2 + times])
        rows.writerows([user, item, render(at)][: 2 + times] for user, item, at in events)
    return file


def preset(folder: Path, events: Path, *, times: bool = True, **sections: Any) -> Path:
    columns = {"user": "who", "item": "what", **({"time": "when"} if times else {})}
    data = {"source": {"kind": "files", "events": str(events), "columns": columns}}
    values = {"name": "circle", "data": data, "model": MODEL, "training": TRAINING, **sections}
    file = folder / "circle.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


def circle() -> list[Row]:
    """A cyclic world, and one user who stopped when only three of its items had been seen."""
    first = [("pioneer", str(i), START - 9 * DAY + i) for i in (1, 2)]
    return [*first, *cyclic_events(ITEMS, users=60, longest=9)]


@dataclass(frozen=True)
class Place:
    """A folder with a preset, its runs and its bundles."""

    folder: Path
    preset: Path

    @property
    def runs(self) -> tuple[str, str]:
        return "--runs", str(self.folder / "runs")

    @property
    def bundles(self) -> tuple[str, str]:
        return "--bundles", str(self.folder / "bundles")

    def live(self) -> Bundle:
        version = current_version(self.folder / "bundles")
        assert version is not None
        return Bundle.load(self.folder / "bundles" / version)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Place, str]:
    """One `run` from CSV to bundle that the tests of this file share, and what it said."""
    folder = tmp_path_factory.mktemp("cli")
    place = Place(folder, preset(folder, events_file(folder / "events.csv", circle())))
    return place, trainer("run", place.preset, *place.runs, *place.bundles)


@pytest.fixture
def place(ran: tuple[Place, str]) -> Place:
    return ran[0]


# --- run, predict -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_run_leads_from_a_csv_to_a_live_bundle(ran: tuple[Place, str]) -> None:
    place, said = ran
    bundle = place.live()
    assert f"published {bundle.path} and made it current" in said
    assert "circle (bundle)" in said
    assert "popular_30d" in said
    info = bundle.manifest.models["circle"]
    assert info.fit == "all"
    assert info.metrics["bundle"]["hr@5"] > 0.9
    assert info.metrics["bundle"]["cases"] == 60
    assert info.metrics["protocol"].endswith("split fit")
    assert set(bundle.manifest.baselines) == {"popular", "popular_7d", "popular_30d", "ease"}
    assert bundle.manifest.data.events == len(circle())
    assert json.loads((place.folder / "runs/circle/all/fit.json").read_text())["epochs"] == info.metrics["epochs"]


@pytest.mark.slow
def test_predict_writes_csv_and_parquet_and_counts_what_the_rule_kept_out(place: Place, tmp_path: Path) -> None:
    said = trainer("predict", place.preset, "--out", tmp_path / "lists.csv", *place.bundles, "--k", "3")
    trainer("predict", place.preset, "--out", tmp_path / "lists.parquet", *place.bundles, "--k", "3")
    table = pl.read_parquet(tmp_path / "lists.parquet")
    assert pl.read_csv(tmp_path / "lists.csv", schema=table.schema).equals(table)

    bundle, users = place.live(), {user for user, _, _ in circle()}
    newest = {u: max(at for user, _, at in circle() if user == u) for u in users}
    hidden = {u: sum(i.available_from > newest[u] for i in bundle.catalogue.items) for u in users}
    found = re.search(r"([\d,]+) \(user, item\) pairs excluded, ([\d,]+) users touched, ([\d,]+) items kept out", said)
    assert found is not None
    pairs, touched, kept_out = (int(number.replace(",", "")) for number in found.groups())
    assert (pairs, touched) == (sum(hidden.values()), sum(map(bool, hidden.values())))
    assert hidden["pioneer"] == ITEMS - 2
    assert kept_out >= 3  # all that the pioneer would have got
    assert set(table["user_id"]) == users - {"pioneer"}  # who has seen all that there was
    starts = {i.item_id: render(i.available_from) for i in bundle.catalogue.items}
    assert all(starts[row["item_id"]] <= row["as_of"] for row in table.iter_rows(named=True))


@pytest.mark.slow
def test_predict_refuses_what_it_cannot_do_before_it_starts(place: Place, tmp_path: Path) -> None:
    assert "no model 'other'" in refused("predict", place.preset, "--out", "x.csv", *place.bundles, "--model", "other")
    assert ".csv or .parquet" in refused("predict", place.preset, "--out", tmp_path / "x.json", *place.bundles)
    assert "nothing is published" in refused("predict", place.preset, "--out", "x.csv", "--bundles", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_embeddings_are_the_vectors_that_score(place: Place, tmp_path: Path) -> None:
    said = trainer("export", "embeddings", place.preset, "--out", tmp_path / "e", *place.bundles)
    bundle = place.live()
    items, users = (pl.read_parquet(tmp_path / f"e/{kind}.parquet") for kind in ("items", "users"))
    assert f"{ITEMS} vectors of circle of {bundle.version}" in said
    assert items["item_id"].to_list() == [item.item_id for item in bundle.catalogue.items]
    vectors = bundle.models["circle"].retriever.vectors
    np.testing.assert_array_equal(np.array(items["vector"].to_list(), np.float32), vectors)
    events = circle()
    assert users["user_id"].to_list() == sorted({user for user, _, _ in events})
    history = [bundle.catalogue.index_by_id[item] for user, item, _ in events if user == "u3"]
    (query,) = bundle.models["circle"].encoder.encode([np.array(history)])
    found = users.filter(pl.col("user_id") == "u3")["vector"].to_list()[0]
    np.testing.assert_allclose(found, query, atol=1e-5)
    trainer("export", "embeddings", "--out", tmp_path / "t", "--format", "tsv", *place.bundles)
    assert [f.name for f in (tmp_path / "t").iterdir()] == ["items.tsv"]
    name, numbers = (tmp_path / "t/items.tsv").read_text().splitlines()[0].split("\t")
    assert name == bundle.catalogue.items[0].item_id
    np.testing.assert_array_equal(np.array(numbers.split(" "), np.float32), vectors[0])
    assert ".parquet or .tsv" in refused("export", "embeddings", "--format", "json", *place.bundles)


@pytest.mark.slow
def test_a_sweep_ranks_by_validation_and_goes_on_where_it_was(place: Place, tmp_path: Path) -> None:
    words = ["training.lr=0.02,1e-5", "model.blocks=1", "training.epochs=6", "training.length_window=1,20"]
    said = trainer("sweep", place.preset, *words, "--runs", tmp_path / "s")
    table = [line.split() for line in said.splitlines() if re.match(r" +\d", line)]
    assert sorted(row[0] for row in table) == ["1", "2", "3", "4"]
    assert {row[4] for row in table[:2]} == {"training.lr=0.02"}
    assert float(table[0][1]) >= float(table[1][1]) > float(table[2][1])
    with (tmp_path / "s/sweep.csv").open() as opened:
        rows = list(csv.DictReader(opened))
    assert [row["trial"] for row in rows] == [row[0] for row in table]
    assert [row["folder"] for row in rows] == [row[3] for row in table]
    checkpoints = contents(tmp_path / "s" / table[0][3])
    some = trainer("sweep", place.preset, *words, "--runs", tmp_path / "s", "--trials", "4")
    assert some.splitlines()[-4:] == said.splitlines()[-4:]
    same = {name: digest for name, digest in contents(tmp_path / "s" / table[0][3]).items() if name.endswith(".ckpt")}
    assert same == {name: digest for name, digest in checkpoints.items() if name.endswith(".ckpt")}
    assert "the data stays the same" in refused("sweep", place.preset, "data.source.kind=sql,files")


# --- the steps one by one -----------------------------------------------------------------------------


@pytest.mark.slow
def test_the_steps_one_by_one_lead_to_a_bundle_too(place: Place, tmp_path: Path) -> None:
    here = Place(tmp_path, place.preset)
    assert "validation NDCG@10" in trainer("train", here.preset, *here.runs)
    assert "circle (torch)" in trainer("evaluate", "circle", *here.runs)
    assert "3 epochs" in trainer("train", here.preset, *here.runs, "--fit", "all", "--epochs", "3")
    assert "top10_changes=0" in trainer("export", "onnx", "circle", *here.runs)
    assert "recall@10 1.0000" in trainer("index", "circle", *here.runs)
    assert "made it current" in trainer("publish", "circle", *here.runs, *here.bundles)
    bundle = here.live()
    assert bundle.manifest.models["circle"].fit == "all"
    assert bundle.manifest.data.fingerprint == place.live().manifest.data.fingerprint
    measured = json.loads((tmp_path / "runs/circle/split/metrics.json").read_text())
    assert bundle.manifest.models["circle"].metrics == measured
    trainer("publish", "circle", *here.runs, *here.bundles)
    assert "removed" not in trainer("publish", "circle", *here.runs, *here.bundles)
    assert trainer("publish", "circle", *here.runs, *here.bundles).count("removed") == 1
    listed = trainer("bundles", *here.bundles)
    assert (listed.count("circle 1.0"), listed.count("live"), listed.count("before")) == (3, 1, 1)
    assert here.live().version in listed


@pytest.mark.slow
def test_a_step_whose_input_is_missing_names_the_step_before(place: Place, tmp_path: Path) -> None:
    here = Place(tmp_path, place.preset)
    assert "python -m trainer train" in refused("export", "onnx", "circle", *here.runs)
    trainer("train", here.preset, *here.runs, "training.epochs=1")
    assert "python -m trainer evaluate circle" in refused(
        "publish", "circle", *here.runs, *here.bundles, "--fit", "split"
    )
    assert "python -m trainer export onnx" in refused("index", "circle", *here.runs, "--fit", "split")
    assert not (tmp_path / "bundles").exists()


@pytest.mark.slow
def test_data_that_changed_since_the_training_is_refused(place: Place, tmp_path: Path) -> None:
    file = events_file(tmp_path / "events.csv", circle())
    here = Place(tmp_path, preset(tmp_path, file))
    trainer("train", here.preset, *here.runs, "training.epochs=1")
    events_file(file, [*circle(), ("u0", "1", START + 300 * DAY)])
    assert "train again" in refused("evaluate", "circle", *here.runs)


@pytest.mark.slow
def test_a_model_that_popularity_beats_is_refused_and_changes_nothing(place: Place, tmp_path: Path) -> None:
    """Everybody ends with the same item, which the model, hardly trained, does not know."""
    bundles = place.folder / "bundles"
    events = [row for n in range(30) for row in ending_alike(n)]
    here = Place(tmp_path, preset(tmp_path, events_file(tmp_path / "events.csv", events)))
    slow = ("training.epochs=1", "training.lr=1e-9", "training.batch_size=128")
    with unchanged(bundles):
        assert "popularity" in refused("run", here.preset, *slow, *here.runs, *place.bundles)
    forced = trainer("run", here.preset, *slow, ONE_FIT, *here.runs, *here.bundles, "--force")
    assert "made it current" in forced


def ending_alike(user: int) -> list[Row]:
    """Three items of the user's own, then "hit"; a day between users, so that earlier ones make it popular."""
    at = START + user * 2 * DAY
    own = [(f"u{user}", f"own-{user}-{n}", at + n) for n in range(3)]
    return [*own, (f"u{user}", "hit", at + 3), (f"w{user}", "hit", at)]


# --- evaluation ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_temporal_split_goes_through_to_the_manifest(place: Place, tmp_path: Path) -> None:
    here = Place(tmp_path, place.preset)
    settings = ("evaluation.split=temporal", "evaluation.quantile=0.8", "evaluation.cutoffs=[1,10,50]", ONE_FIT)
    said = trainer("run", here.preset, *settings, *here.runs, *here.bundles)
    protocol = here.live().manifest.models["circle"].metrics["protocol"]
    assert protocol.startswith("temporal split after 2020-")
    assert protocol.endswith("(quantile 0.8 of events), last targets, full ranking, seen filtered, split fit")
    assert protocol in said
    figures = here.live().manifest.models["circle"].metrics["bundle"]
    assert 0 < figures["cases"] < 60
    assert {"hr@1", "ndcg@50", "recall@10"} <= set(figures)
    assert trainer("evaluate", "circle", *here.runs).count(protocol) == 1  # the run's own settings hold


@pytest.mark.slow
def test_a_temporal_split_of_data_without_times_is_refused(tmp_path: Path) -> None:
    file = events_file(tmp_path / "events.csv", circle(), times=False)
    here = Place(tmp_path, preset(tmp_path, file, times=False))
    said = refused("run", here.preset, "evaluation.split=temporal", *here.runs, *here.bundles)
    assert "needs times" in said
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_two_runs_are_compared_user_by_user(place: Place, tmp_path: Path) -> None:
    slow = ("training.epochs=1", "training.lr=1e-9", ONE_FIT)
    trainer("run", place.preset, *slow, "--runs", tmp_path, "--bundles", tmp_path / "bundles", "--force")
    chosen_by = trainer("compare", tmp_path / "circle", "circle", *place.runs, "--on", "validation")
    fit = json.loads((place.folder / "runs/circle/split/fit.json").read_text())
    assert f"{fit['best_validation_ndcg@10']:.4f}" in re.search(r"ndcg@10 .*", chosen_by)[0]  # type: ignore[index]
    said = trainer("compare", tmp_path / "circle", "circle", *place.runs)
    line = next(line.split() for line in said.splitlines() if line.startswith("ndcg@10"))
    assert float(line[3]) > 0.3
    assert float(line[-1]) < 0.001
    assert "60 users" in said
    assert "trainer evaluate" in refused("compare", "circle", "nobody", *place.runs)


@pytest.mark.slow
def test_a_run_leaves_a_report(ran: tuple[Place, str]) -> None:
    place, said = ran
    folder = place.folder / "runs/circle/split"
    assert f"report: {folder / 'report.html'}" in said
    found = json.loads((folder / "report.json").read_text())
    metrics = json.loads((folder / "metrics.json").read_text())
    assert found["metrics"] == metrics["bundle"]
    assert len(found["epochs"]) >= metrics["epochs"]


# --- the log ------------------------------------------------------------------------------------------


def parity(folder: Path) -> Path:
    """The preset of a circle whose items have a title and a parity."""
    rows = "".join(f"{i},Item {i} {'even' if i % 2 == 0 else 'odd'},{i % 2}\n" for i in range(1, ITEMS + 1))
    (folder / "items.csv").write_text("id,title,parity\n" + rows)
    source = {
        "kind": "files",
        "events": str(events_file(folder / "events.csv", circle())),
        "columns": {"user": "who", "item": "what", "time": "when"},
        "items": str(folder / "items.csv"),
        "item_columns": {"id": "id", "title": "title", "categories": {"parity": "parity"}},
    }
    return preset(folder, folder / "events.csv", data={"source": source})


@pytest.mark.slow
def test_metadata_goes_from_an_items_file_to_the_bundle(tmp_path: Path) -> None:
    place = Place(tmp_path, parity(tmp_path))
    said = trainer("vectors", place.preset, "--out", tmp_path / "titles.tsv", "--text", "title,parity", "--width", "4")
    assert "12 vectors of width" in said
    settings = (
        f"data.vectors.title={tmp_path / 'titles.tsv'}",
        "model.metadata.fields=[parity,title,maker]",
        "model.metadata.fusion=gate",
        "training.epochs=3",
        ONE_FIT,
    )
    trainer("run", place.preset, *settings, *place.runs, *place.bundles, "--force")
    report = json.loads((tmp_path / "runs" / "circle" / "split" / "report.json").read_text())
    assert sum(gate["mean"] for gate in report["gates"].values()) == pytest.approx(1, abs=1e-4)
    assert list(report["gates"]) == ["id", "parity", "title"]  # nothing has a maker
    assert "What item vectors are made of" in (tmp_path / "runs" / "circle" / "split" / "report.html").read_text()
    bundle = place.live()
    parity_of = bundle.manifest.models["circle"].parity
    assert parity_of.max_tower_difference is not None
    tower = ItemTower.load(bundle.path / "models" / "circle")
    assert tower is not None
    assert tower.vectors(bundle.catalogue.items).any()
    # The steps one by one keep the tower too.
    trainer("export", "onnx", "circle", *place.runs, "--fit", "split")
    trainer("publish", "circle", *place.runs, *place.bundles, "--fit", "split", "--force")
    assert ItemTower.load(place.live().path / "models" / "circle") is not None


@pytest.mark.slow
def test_items_are_held_out_and_found(tmp_path: Path) -> None:
    place = Place(tmp_path, parity(tmp_path))
    words = ("model.metadata.fields=[parity]", "training.epochs=2", *place.runs, "--share", "0.25")
    said = trainer("cold", place.preset, *words)
    assert "3 items held out" in said
    assert "vectors made of id, parity" in said
    assert all(name in said for name in ("random", "popular", "popular, told", "among all items"))
    found = json.loads((tmp_path / "runs" / "circle" / "cold" / "cold.json").read_text())
    assert found["cases"] == int(re.search(r"asked (\d+) times", said)[1])  # type: ignore[index]
    assert "leaves nothing" in refused("cold", place.preset, *place.runs, "--share", "0.01")


def test_events_can_be_loaded_into_the_log_and_trained_on_from_there(place: Place, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'upnext.db'}"
    assert f"{len(circle()):,} events are new" in trainer("data", "load", place.preset, "--database-url", url)
    assert "0 events are new" in trainer("data", "load", place.preset, "--database-url", url)

    values = {"name": "log", "data": {"source": {"kind": "sql", "url": url}}, "model": MODEL, "training": TRAINING}
    (tmp_path / "log.yaml").write_text(yaml.safe_dump(values))
    here = Place(tmp_path, tmp_path / "log.yaml")
    trainer("run", here.preset, *here.runs, *here.bundles)
    bundle, wanted = here.live(), place.live()
    assert [i.item_id for i in bundle.catalogue.items] == [i.item_id for i in wanted.catalogue.items]
    assert bundle.manifest.data.fingerprint == wanted.manifest.data.fingerprint
    assert bundle.manifest.models["log"].metrics["bundle"] == wanted.manifest.models["circle"].metrics["bundle"]
    assert "made it current" in trainer("publish", "log", *here.runs, "--bundles", tmp_path / "again")


def test_the_url_of_the_log_may_stand_in_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = preset(tmp_path, events_file(tmp_path / "events.csv", circle()[:5]))
    monkeypatch.setenv("UPNEXT_DATABASE_URL", f"sqlite:///{tmp_path / 'env.db'}")
    assert "5 events are new" in trainer("data", "load", file)
    assert (tmp_path / "env.db").is_file()


# --- data without times -------------------------------------------------------------------------------


@pytest.mark.slow
def test_data_without_times_trains_with_the_rule_off_and_says_so(tmp_path: Path) -> None:
    file = events_file(tmp_path / "events.csv", cyclic_events(ITEMS, users=40, longest=9), times=False)
    here = Place(tmp_path, preset(tmp_path, file, times=False))
    said = trainer("run", here.preset, ONE_FIT, *here.runs, *here.bundles)
    assert "note: no times: the order of the file counts, time rules are off" in said
    bundle = here.live()
    assert not bundle.manifest.data.has_times
    assert {i.available_from for i in bundle.catalogue.items} == {-(2**62)}
    assert bundle.manifest.models["circle"].metrics["bundle"]["availability_rule"]["users_touched"] == 0
    said = trainer("predict", here.preset, "--out", tmp_path / "lists.csv", *here.bundles)
    assert "0 (user, item) pairs excluded, 0 users touched" in said


# --- data list, data describe -------------------------------------------------------------------------


@pytest.mark.slow
def test_without_held_out_events_it_publishes_without_metrics(tmp_path: Path) -> None:
    events = [(f"u{n}", str((n + s) % 5 + 1), START + n * DAY + s) for n in range(30) for s in range(2)]
    here = Place(tmp_path, preset(tmp_path, events_file(tmp_path / "events.csv", events)))
    assert "nothing can be held out" in trainer("run", here.preset, *here.runs, *here.bundles)
    found = here.live().manifest.models["circle"]
    assert found.index.recall_at_10 is None
    assert found.metrics["bundle"] == {}


@pytest.mark.slow
def test_resume_on_other_data_starts_anew(tmp_path: Path) -> None:
    events = cyclic_events(ITEMS, users=60, longest=9)
    here = Place(tmp_path, preset(tmp_path, events_file(tmp_path / "events.csv", events)))
    trainer("run", here.preset, *here.runs, *here.bundles)
    events_file(tmp_path / "events.csv", [(user, str(ITEMS + 1 - int(item)), at) for user, item, at in events])
    trainer("train", here.preset, *here.runs)  # as if stopped after the split
    trainer("run", here.preset, *here.runs, *here.bundles, "--resume")
    bundle = here.live()
    model = bundle.models["circle"]
    (query,) = model.encoder.encode([bundle.catalogue.indices_of_keys(item_keys(["8", "7"]))])
    scores = model.retriever.vectors @ query
    assert bundle.catalogue[int(scores.argmax()) + 1].item_id == "6", "the new data run the other way"


@pytest.mark.slow
def test_a_fit_on_everything_with_other_settings_than_the_measured_one_is_refused(place: Place, tmp_path: Path) -> None:
    here = Place(tmp_path, place.preset)
    trainer("train", here.preset, *here.runs, "training.epochs=1")
    trainer("evaluate", "circle", *here.runs)
    trainer("train", here.preset, "--fit", "all", "model.hidden_units=4", *here.runs)
    trainer("export", "onnx", "circle", *here.runs)
    assert "other settings or data" in refused("publish", "circle", *here.runs, *here.bundles)
    assert not (tmp_path / "bundles" / "CURRENT").exists()


@pytest.mark.slow
def test_models_that_were_measured_differently_do_not_share_a_bundle(place: Place, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    for name in ("circle", "other"):
        shutil.copytree(place.folder / "runs" / "circle", runs / name)
    for file in runs.glob("other/*/config.yaml"):
        file.write_text(file.read_text().replace("name: circle", "name: other"))
    measured = runs / "other" / "split" / "metrics.json"
    measured.write_text(measured.read_text().replace("leave-one-out", "temporal"))
    words = ("publish", "circle", "other", "--runs", runs, "--bundles", tmp_path / "bundles")
    assert "measured differently" in refused(*words)
    assert not (tmp_path / "bundles").exists()


def test_data_list_names_sources_and_presets() -> None:
    said = trainer("data", "list")
    assert all(word in said for word in ("files", "sql", "ml-100k", "sasrec-quick", "bert4rec-quick"))


def test_data_describe_shows_figures_and_bad_rows(tmp_path: Path) -> None:
    file = events_file(tmp_path / "events.csv", circle())
    file.write_text(file.read_text() + "somebody,1,yesterday\n")
    data = {
        "source": {"kind": "files", "events": str(file), "columns": {"user": "who", "item": "what", "time": "when"}}
    }
    said = trainer("data", "describe", preset(tmp_path, file, data=data), "data.source.max_bad_rows=0.1")
    assert re.search(rf"events +{len(circle())}\n", said)
    assert re.search(r"users +61\n", said)
    assert "yesterday" in said


# --- errors -------------------------------------------------------------------------------------------


def refused(*words: str | Path) -> str:
    """A call that must fail with status 1 and one clear message; the message."""
    done = call(*words)
    assert done.code == 1
    assert done.err.startswith("error: ")
    assert "Traceback" not in done.out + done.err
    return done.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run", "sasrec-quik"], "did you mean sasrec-quick?"),
        (["run", "training.lr=1"], "name a preset"),
        (["run", "sasrec-quick", "training.lrr=1"], "did you mean training.lr?"),
        (["run", "sasrec-quick", "sasrec-quick"], "same name"),
        (["train", "sasrec-quick", "model.heads=7"], "does not divide"),
        (["train", "sasrec-quick", "evaluation.cutoffs=[5]"], "10 among them"),
        (["compare", "one", "two"], "trainer evaluate"),
        (["evaluate", "nobody"], "holds no run"),
        (["publish", "nobody"], "holds no run"),
        (["data", "describe", "missing.yaml"], "no preset"),
    ],
)
def test_a_mistake_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert said in refused(*words)
    assert contents(tmp_path) == {}


def test_brackets_in_a_message_are_shown_as_they_are(tmp_path: Path) -> None:
    assert "[bold]x[/bold].csv" in refused("data", "describe", preset(tmp_path, tmp_path / "[bold]x[/bold].csv"))


@pytest.mark.parametrize("url", ["nonsense", "mysql://x/y", "postgresql://me:s3cret@127.0.0.1:1/x"])
def test_a_log_that_cannot_be_reached_is_one_clear_line(tmp_path: Path, url: str) -> None:
    file = preset(tmp_path, events_file(tmp_path / "events.csv", circle()[:5]))
    assert "s3cret" not in refused("data", "load", file, "--database-url", url)


def test_a_wrong_option_is_a_usage_error() -> None:
    assert call("run", "--nonsense").code == 2
    assert call("predict", "sasrec-quick").code == 2  # --out is missing
