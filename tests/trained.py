"""Training worlds with known answers, and one tiny trained model of each kind, made once a process.

In the cyclic world of N items, i is followed by i + 1 and N by 1, so who has learnt anything knows every next item.
"""

from __future__ import annotations

import atexit
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import polars as pl

from shared import bundle as bundles
from shared.bundle import Bundle
from shared.catalogue import Availability
from shared.encoder import Encoder
from shared.events import IntArray
from shared.retrieval import Retriever
from shared.times import DAY, SECOND, of_year
from trainer.config import RunConfig
from trainer.dataset import Cases, Dataset, Split, build_dataset, leave_one_out
from trainer.evaluate import served_lists, served_metrics
from trainer.export import Exported, export
from trainer.metrics import metrics
from trainer.pipeline import rivals
from trainer.publish import Candidate, write_bundle
from trainer.sources import RawData, SourceReport, TableReport
from trainer.sources.report import EVENTS_SCHEMA, ITEMS_SCHEMA
from trainer.train import Fitted, fit

Kind = Literal["sasrec", "bert4rec"]
Row = tuple[str, str, int]
"""user, item, time in epoch microseconds; a view."""
TypedRow = tuple[str, str, int, str, float | None]
"""A `Row` of another type, with its value."""

KINDS: Final[tuple[Kind, ...]] = ("sasrec", "bert4rec")
START: Final = of_year(2020)
ITEMS: Final = 30


def raw(
    events: Sequence[Row | TypedRow],
    items: Sequence[Mapping[str, Any]] = (),
    *,
    has_times: bool = True,
) -> RawData:
    """Tables as a source hands them over. An event is a `Row`, or a `Row` with its type and value."""
    rows = [_event(*event, has_times=has_times) for event in events]
    unset: dict[str, Any] = {
        "title": None,
        "categories": [],
        "available_from": None,
        "available_until": None,
        "withdrawn": False,
    }
    return RawData(
        name="a test",
        events=pl.DataFrame(rows, schema=EVENTS_SCHEMA, orient="row"),
        items=pl.DataFrame([{**unset, **item} for item in items], schema=ITEMS_SCHEMA),
        report=SourceReport(TableReport("events", len(rows), len(rows))),
        has_times=has_times,
    )


def _event(
    user: str, item: str, time: int, kind: str = "view", value: float | None = None, *, has_times: bool
) -> tuple[str, str, str, float | None, int | None]:
    return user, item, kind, value, time if has_times else None


def dataset(
    events: Sequence[Row | TypedRow],
    items: Sequence[Mapping[str, Any]] = (),
    *,
    has_times: bool = True,
    **data: Any,
) -> Dataset:
    """`raw`, numbered. Further words are settings of `data`."""
    return build_dataset(raw(events, items, has_times=has_times), config(data=data).data)


def config(
    kind: Kind = "sasrec",
    *,
    name: str | None = None,
    model: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    **sections: Any,
) -> RunConfig:
    """Settings for a model that trains in a second or two."""
    data = {"source": {"kind": "files", "events": "events.csv", "columns": {"user": "u", "item": "i"}}}
    data |= sections.pop("data", {})
    small = {"hidden_units": 32, "blocks": 1, "dropout": 0.0, "max_length": 16}
    quick: dict[str, Any] = {"epochs": 4, "batch_size": 32, "lr": 0.01, "threads": 1, "accelerator": "cpu"}
    return RunConfig.model_validate(
        {
            "name": name or kind,
            "data": data,
            "model": {"kind": kind, **small, **(model or {})},
            "training": {**quick, **(training or {})},
            **sections,
        }
    )


def cyclic_events(items: int = ITEMS, users: int = 200, *, longest: int = 24, seed: int = 0) -> list[Row]:
    """Users who start anywhere on the circle and view 4 to `longest` items in a row, one an hour."""
    rng = np.random.default_rng(seed)
    rows = []
    for user in range(users):
        first, length = int(rng.integers(items)), int(rng.integers(4, longest + 1))
        begin = START + int(rng.integers(60)) * DAY
        rows += [(f"u{user}", str((first + s) % items + 1), begin + s * 3600 * SECOND) for s in range(length)]
    return rows


@dataclass(frozen=True)
class World:
    """A model trained on the split of a cyclic world, and the bundle made of it."""

    dataset: Dataset
    split: Split
    config: RunConfig
    fitted: Fitted
    exported: Exported
    bundle: Bundle

    def candidate(self, score: float | None = None, **publish: Any) -> Candidate:
        """The model as `publish` takes it, its served NDCG@10 as measured or as told."""
        measured = metrics(self.served())
        figures = measured if score is None else {**measured, "ndcg@10": score}
        settings = RunConfig.model_validate({**self.config.model_dump(), "publish": publish})
        return Candidate(settings, self.exported, "split", self.fitted.epochs, {"bundle": figures})

    def served(self) -> IntArray:
        """Ranks of the test cases through the bundle, (C,)."""
        model, rule = self.bundle.models[self.config.name], Availability.of(self.bundle.catalogue)
        return served_ranks(self.split.test, model.encoder, model.retriever, rule)


ENOUGH: Final[Mapping[Kind, Mapping[str, Any]]] = {
    "sasrec": {"epochs": 12, "patience": 12},
    "bert4rec": {"epochs": 50, "patience": 50, "last_item_probability": 0.5, "mask_probability": 0.3},
}


@cache
def world(kind: Kind) -> World:
    """One model of `kind` that has learnt the circle. Its files live as long as the process."""
    folder = Path(_scratch().name) / kind
    data = dataset(cyclic_events())
    split, settings = leave_one_out(data), config(kind, training=ENOUGH[kind])
    fitted = fit(settings, len(data.catalogue), split.sequences, split.validation, folder / "run")
    exported = export(fitted.encoder, settings)
    target = folder / "bundle"
    target.mkdir()
    candidate = Candidate(settings, exported, "split", fitted.epochs, {})
    baselines = rivals(split, settings.evaluation).metrics
    write_bundle(target, data, split.popularity, {kind: candidate}, baselines, split.test)
    return World(data, split, settings, fitted, exported, Bundle.load(target))


@cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    folder = tempfile.TemporaryDirectory(prefix="upnext-tests-")
    atexit.register(folder.cleanup)
    return folder


@contextmanager
def unchanged(folder: Path) -> Iterator[None]:
    """Assert that nothing under `folder` is other afterwards than before."""
    before = contents(folder)
    yield
    assert contents(folder) == before


def contents(folder: Path) -> dict[str, str]:
    """Relative path -> checksum of every file under `folder`."""
    files = (f for f in folder.rglob("*") if f.is_file())
    return {f.relative_to(folder).as_posix(): bundles.sha256(f) for f in files}


def served_ranks(cases: Cases, encoder: Encoder, retriever: Retriever, availability: Availability) -> IntArray:
    """Ranks as a user of the service sees them: the place in the top-20 list by `availability`, (C,)."""
    return served_lists(cases, encoder, retriever, availability).ruled.ranks


def evaluate_served(split: Split, encoder: Encoder, retriever: Retriever) -> dict[str, Any]:
    """Metrics of the split's test cases through an encoder and a retriever, by the split's rule."""
    served = served_lists(split.test, encoder, retriever, split.rule)
    return served_metrics(split.test, served, split.rule, split.popularity)
