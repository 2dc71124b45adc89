"""Options of the network: each learns the circle, each is the same in ONNX, and a clock tells what nothing else can."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared.encoder import Encoder as OnnxEncoder
from shared.times import SECOND
from tests.trained import ENOUGH, ITEMS, START, Kind, Row, config, cyclic_events, dataset
from trainer.dataset import Dataset, Split, leave_one_out
from trainer.errors import TrainingError
from trainer.evaluate import encode_cases, full_ranks, vector_scores
from trainer.export import TOLERANCE, export
from trainer.train import Fitted, fit
from trainer.transformer import Encoder

OPTIONS: list[dict[str, Any]] = [
    {"positions": "none", "position_bias": True, "dropout": 0.1},
    {"time_bias": "events", "position_bias": True, "block": "original", "heads": 2},
    {"time_bias": "query", "blocks": 2},
]


def trained(
    kind: Kind, data: Dataset, folder: Path, training: dict[str, Any] | None = None, **model: Any
) -> tuple[Split, Fitted, Any]:
    split, settings = leave_one_out(data), config(kind, model=model, training={**ENOUGH[kind], **(training or {})})
    return split, fit(settings, len(data.catalogue), split.sequences, split.validation, folder), settings


def hit_rate(split: Split, fitted: Fitted, settings: Any) -> float:
    """Share of test cases that have the target first, through ONNX."""
    exported = export(fitted.encoder, settings)
    assert exported.parity.max_score_difference <= TOLERANCE
    _, queries = encode_cases(OnnxEncoder(exported.onnx, exported.spec), split.test)
    return float(np.mean(full_ranks(split.test, vector_scores(queries, exported.vectors)) == 1))


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_learns_the_circle_and_exports(tmp_path: Path, options: dict[str, Any]) -> None:
    assert hit_rate(*trained("sasrec", dataset(cyclic_events()), tmp_path, **options)) >= 0.95


@pytest.mark.slow
def test_every_way_of_training_learns_the_circle(tmp_path: Path) -> None:
    training = {"weight_decay": 0.01, "gradient_clip": 1.0, "warmup": 20, "schedule": "cosine", "length_window": 1}
    found = trained("sasrec", dataset(cyclic_events()), tmp_path, training, feedforward=4, heads=2)
    assert hit_rate(*found) >= 0.95


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"block": "original"}, {"time_bias": "query"}], ids=str)
def test_the_options_are_bert4rec_s_too(tmp_path: Path, options: dict[str, Any]) -> None:
    found = trained("bert4rec", dataset(cyclic_events()), tmp_path, position_bias=True, **options)
    assert hit_rate(*found) >= 0.9


@pytest.mark.parametrize("wider", [1, 3])
def test_the_feed_forward_layer_is_as_wide_as_the_settings_say(wider: int) -> None:
    encoder = Encoder(config(model={"feedforward": wider, "hidden_units": 8}).model, ITEMS)
    shapes = {name: tuple(weight.shape) for name, weight in encoder.named_parameters()}
    assert shapes["blocks.0.up.weight"] == (8 * wider, 8)
    assert shapes["blocks.0.down.weight"] == (8, 8 * wider)


def waiting_events(users: int = 300, seed: int = 0) -> list[Row]:
    """Who comes back within the hour goes on to i + 1; who comes back after a week goes to i + 2."""
    rng = np.random.default_rng(seed)
    rows = []
    for user in range(users):
        at, time = int(rng.integers(ITEMS)), START
        for _ in range(int(rng.integers(6, 14))):
            rows.append((f"u{user}", str(at % ITEMS + 1), time))
            waits = bool(rng.integers(2))
            at, time = at + 1 + waits, time + (7 * 86_400 if waits else 600) * SECOND
    return rows


@pytest.mark.slow
def test_a_clock_tells_what_nothing_else_can(tmp_path: Path) -> None:
    data = dataset(waiting_events())
    assert hit_rate(*trained("sasrec", data, tmp_path / "told", time_bias="query")) >= 0.9
    # Both sides of a MASK learn slower; a guess between i + 1 and i + 2 is right half the time.
    assert hit_rate(*trained("bert4rec", data, tmp_path / "masked", time_bias="query")) >= 0.7
    assert hit_rate(*trained("sasrec", data, tmp_path / "events", time_bias="events")) <= 0.65


def test_a_clock_needs_times(tmp_path: Path) -> None:
    data = dataset(cyclic_events(users=5), has_times=False)
    with pytest.raises(TrainingError, match="time_bias needs times"):
        trained("sasrec", data, tmp_path, time_bias="query")


def test_the_largest_time_is_that_of_the_rows_read(tmp_path: Path) -> None:
    """A user's first event lies a year before the others, and outside the newest T + 1 that are read."""
    rows = [("u", "9", START - 365 * 86_400 * SECOND)]
    rows += [("u", str(i % ITEMS + 1), START + i * 60 * SECOND) for i in range(19)]
    _, fitted, settings = trained("sasrec", dataset(rows), tmp_path, time_bias="events")
    # Two of the 19 are held out: T + 1 = 17 are read, a minute apart.
    assert fitted.encoder.spec().largest_time == int(np.log(16 * 60) / 0.301)
    assert export(fitted.encoder, settings).spec.largest_time == fitted.encoder.spec().largest_time
