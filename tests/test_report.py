"""The report: groups by hand, values of every epoch, and a page that needs nothing from elsewhere."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from shared.times import DAY
from tests.trained import START, config, cyclic_events, dataset, evaluate_served, world
from trainer.curves import read_epochs, write_epochs
from trainer.dataset import leave_one_out
from trainer.metrics import MISSED
from trainer.page import page, ticks
from trainer.pipeline import rivals
from trainer.report import groups, report
from trainer.train import fit


def of_the_circle(name: str = "sasrec") -> dict[str, Any]:
    """The report of the trained world, as it would stand in report.json."""
    found = world("sasrec")
    model = found.bundle.models["sasrec"]
    measured = {
        "protocol": "leave-one-out, full ranking",
        "epochs": found.fitted.epochs,
        "validation_ndcg@10": found.fitted.best,
        "bundle": evaluate_served(found.split, model.encoder, model.retriever),
        "torch": {"ndcg@10": 0.5},
    }
    settings = found.config.model_copy(update={"name": name})
    baselines = rivals(found.split, settings.evaluation).metrics
    epochs = read_epochs(found.fitted.checkpoint.parent / "epochs.csv")
    values = report(settings, found.split, found.served(), measured, baselines, epochs)
    plain: dict[str, Any] = json.loads(json.dumps(values))
    return plain


# --- numbers ------------------------------------------------------------------------------------------


def test_groups_by_hand() -> None:
    cases = leave_one_out(dataset(cyclic_events(users=4))).test
    found = groups(cases, np.array([1, MISSED, 3, 2]), np.array([0, 1, 9, 10]), (0, 1, 10, 100))
    assert [(g["from"], g["to"], g["cases"], g["hr@10"]) for g in found] == [
        (0, 0, 1, 1),
        (1, 9, 2, 0.5),
        (10, 99, 1, 1),
    ]
    assert found[1]["ndcg@10"] == pytest.approx(1 / math.log2(4) / 2)
    assert found[1]["intervals"]["hr@10"] == (0, 1)


def test_values_below_the_first_edge_are_in_no_group() -> None:
    cases = leave_one_out(dataset(cyclic_events(users=4))).test
    found = groups(cases, np.array([1, 1, 1, 1]), np.array([-1, 5, 5, 500]), (0, 10, 100))
    assert [(g["from"], g["to"], g["cases"]) for g in found] == [(0, 9, 2), (100, None, 1)]


def test_the_groups_of_the_circle_hold_all_of_its_cases() -> None:
    found = of_the_circle()
    assert found["data"]["test_cases"] == 200
    for name in ("history_length", "item_popularity"):
        assert sum(g["cases"] for g in found["groups"][name]) == 200
    assert sum(g["cases"] for g in found["groups"]["item_age_days"]) <= 200  # not those of items that were not there


def test_age_counts_from_when_the_item_was_there() -> None:
    rows = [("w", "goal", START), *[("u", i, START + 40 * DAY + n) for n, i in enumerate(["a", "b", "goal"])]]
    split = leave_one_out(dataset(rows))
    measured = {"protocol": "", "epochs": 1, "validation_ndcg@10": None, "bundle": {}, "torch": {}}
    found = report(config(), split, np.array([1]), measured, {}, [])
    assert [(g["from"], g["to"]) for g in found["groups"]["item_age_days"]] == [(30, 89)]
    untimed = leave_one_out(dataset(rows, has_times=False))
    assert report(config(), untimed, np.array([1]), measured, {}, [])["groups"]["item_age_days"] == []


def test_settings_are_as_one_would_write_them_and_hide_a_password() -> None:
    url = "postgresql://me:s3cret@host/name"
    settings = config(data={"source": {"kind": "sql", "url": url}})
    split = leave_one_out(dataset(cyclic_events(users=4)))
    measured = {"protocol": "", "epochs": 1, "validation_ndcg@10": None, "bundle": {}, "torch": {}}
    found = report(settings, split, np.ones(4, np.int64), measured, {}, [])
    assert found["settings"]["model.hidden_units"] == 32
    assert found["settings"]["evaluation.split"] == "leave_one_out"
    assert "s3cret" not in json.dumps(found)


# --- epochs -------------------------------------------------------------------------------------------


def test_every_epoch_leaves_a_row_and_a_resume_goes_on(tmp_path: Path) -> None:
    data = dataset(cyclic_events(users=40))
    split = leave_one_out(data)
    options = (len(data.catalogue), split.sequences, split.validation, tmp_path)
    fit(config(training={"epochs": 2}), *options)
    fit(config(training={"epochs": 3}), *options, resume=True)
    rows = read_epochs(tmp_path / "epochs.csv")
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert {"epoch", "seconds", "train_loss", "val_ndcg@10", "val_hr@10", "val_mrr"} <= set(rows[0])
    assert rows[2]["train_loss"] < rows[0]["train_loss"]


def test_epochs_that_were_not_validated_have_empty_cells(tmp_path: Path) -> None:
    rows = [{"epoch": 1.0, "train_loss": 2.0}, {"epoch": 2.0, "train_loss": 1.0, "val_mrr": 0.5}]
    write_epochs(tmp_path / "epochs.csv", rows)
    assert read_epochs(tmp_path / "epochs.csv") == rows
    assert (tmp_path / "epochs.csv").read_text().splitlines() == ["epoch,train_loss,val_mrr", "1,2.0,", "2,1.0,0.5"]
    assert read_epochs(tmp_path / "missing.csv") == []
    split = leave_one_out(dataset(cyclic_events(users=20)))
    settings = config(training={"epochs": 4, "validate_every": 2})
    fit(settings, len(split.test.dataset.catalogue), split.sequences, split.validation, tmp_path / "run")
    trained = read_epochs(tmp_path / "run" / "epochs.csv")
    assert [row["epoch"] for row in trained if "val_ndcg@10" in row] == [2, 4]
    assert [row["epoch"] for row in trained if "train_loss" in row] == [1, 2, 3, 4]


# --- page ---------------------------------------------------------------------------------------------


class Reader(HTMLParser):
    """Checks that tags are closed in order, and keeps attributes and text."""

    VOID = frozenset({"meta"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, _tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    assert reader.open == []
    return reader


def test_the_page_shows_the_numbers_of_the_report_and_loads_nothing() -> None:
    values = of_the_circle()
    html = page(values)
    found = read(html)
    assert f"{values['metrics']['ndcg@10']:.4f}" in found.text
    assert all(f"{row['ndcg@10']:.4f}" in found.text for row in values["baselines"].values())
    assert values["data"]["fingerprint"] in found.text
    for heading in ("Against baselines", "Training", "Where it is good", "Availability rule", "Data", "Settings"):
        assert heading in found.text
    assert {name for name, _ in found.attributes}.isdisjoint({"src", "href", "onload", "onclick"})
    assert "url(" not in html
    assert "<script" not in html


def test_charts_are_valid_and_stay_inside_their_frame() -> None:
    html = page(of_the_circle())
    charts = [part.split("</svg>")[0] for part in html.split("<svg")[1:]]
    assert len(charts) >= 6
    for chart in charts:
        root = ElementTree.fromstring(f"<svg{chart}</svg>")
        _, _, width, height = map(float, root.attrib["viewBox"].split())
        for mark in root.iter():
            assert all(0 <= float(mark.attrib.get(name, 0)) <= width for name in ("x", "x1", "x2", "cx"))
            assert all(0 <= float(mark.attrib.get(name, 0)) <= height for name in ("y", "y1", "y2", "cy"))


def test_names_are_shown_as_text() -> None:
    values = of_the_circle()
    values["data"]["source"] = "<script>alert(1)</script>"
    assert "<script" not in page(values)
    assert "<script>alert(1)</script>" in read(page(values)).text


def test_gates_are_drawn_where_a_model_has_them() -> None:
    values = of_the_circle()
    values["epochs"] = [{**row, "val_gate/genre": 0.3} for row in values["epochs"]]
    assert "What item vectors are made of" not in read(page(values)).text
    values["gates"] = {"id": {"mean": 0.7, "low": 0.5, "high": 0.9}, "genre": {"mean": 0.3, "low": 0.1, "high": 0.5}}
    found = read(page(values)).text
    assert all(words in found for words in ("val_gate/genre", "Gates", "What item vectors are made of", "0.7000"))


def test_a_run_without_epochs_or_rivals_still_has_a_page() -> None:
    values = {**of_the_circle(), "epochs": [], "baselines": {}, "validation_ndcg@10": None}
    assert "without validation" in read(page(values)).text


@pytest.mark.parametrize(
    ("high", "low", "wanted"),
    [(0.184, 0.0, [0, 0.05, 0.1, 0.15, 0.2]), (7.3, 6.04, [6, 6.5, 7, 7.5]), (0.0, 0.0, [0, 0.2, 0.4, 0.6, 0.8, 1])],
)
def test_ticks_are_round_and_enclose(high: float, low: float, wanted: list[float]) -> None:
    assert ticks(high, low) == wanted
