"""A sweep: the same preset with other settings, trained one after another and compared by validation alone."""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np

from shared.bundle import BundleError
from trainer.config import ConfigError, RunConfig, load_config
from trainer.dataset import Dataset
from trainer.errors import InterruptedTrainingError, TrainerError
from trainer.pipeline import Say, decisive, train

COMMA: Final = re.compile(r",(?![^\[{]*[\]}])")  # not inside a list or a mapping


@dataclass(frozen=True)
class Trial:
    """One training of a sweep."""

    number: int
    overrides: tuple[str, ...]  # those that differ between trials
    folder: str
    score: float | None = None  # validation NDCG@10; None where the training failed
    epochs: int = 0
    note: str = ""


def plan(words: Sequence[str], most: int | None, seed: int = 0) -> list[tuple[str, ...]]:
    """All combinations of `key=a,b,c`; at most `most` of them, drawn at random.

    plan(["training.lr=1e-3,3e-4", "model.blocks=2,3"]) -> [("training.lr=1e-3", "model.blocks=2"), ...]
    """
    choices = [[f"{key}={value.strip()}" for value in COMMA.split(values)] for key, values in map(_split, words)]
    found = list(itertools.product(*choices))
    if most is not None and most < len(found):
        picked = np.sort(np.random.default_rng(seed).choice(len(found), most, replace=False))
        found = [found[i] for i in picked]
    return found


def _split(word: str) -> tuple[str, str]:
    key, _, values = word.partition("=")
    if not key.startswith(("model.", "training.")):
        raise ConfigError(f"{word}: a sweep is over settings of model and training; the data stays the same")
    return key, values


def fixed(words: Sequence[str]) -> list[str]:
    """The settings that are the same in all trials."""
    return [w for w in words if not COMMA.search(w)]


def sweep(preset: str, words: Sequence[str], dataset: Dataset, runs: Path, most: int | None, say: Say) -> list[Trial]:
    """Train every combination on the split, in `runs/<its hash>`; the trials, best first, also as `runs/sweep.csv`.

    A sweep that was stopped goes on where it was, and a larger one takes over what was trained for a smaller: a
    combination that is finished is not trained again.
    """
    trials, planned = [], plan([w for w in words if COMMA.search(w)], most)
    # All of them now: a combination that cannot be is better known before the night than after it.
    configs = [load_config(preset, [*fixed(words), *overrides]) for overrides in planned]
    for number, (overrides, config) in enumerate(zip(planned, configs, strict=True), start=1):
        say(f"trial {number} of {len(planned)}: {' '.join(overrides) or 'the preset'}")
        trials.append(_try(Trial(number, overrides, folder_of(config)), config, dataset, runs, say))
        trials.sort(key=lambda t: -1.0 if t.score is None else t.score, reverse=True)
        _write(runs / "sweep.csv", trials)
    return trials


def folder_of(config: RunConfig) -> str:
    """The name of a combination's folder: the same for the same settings, in whatever sweep."""
    settings = [decisive(config), config.evaluation.held_out]
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def _try(trial: Trial, config: RunConfig, dataset: Dataset, runs: Path, say: Say) -> Trial:
    try:
        fitted = train(config, dataset, "split", runs / trial.folder, resume=True, say=say)
    except InterruptedTrainingError as error:
        raise InterruptedTrainingError(error.kept, "give the same command again, which goes on") from None
    except (TrainerError, BundleError) as error:  # such as a warm start that this combination cannot have
        return replace(trial, note=str(error))
    return replace(trial, score=fitted.best, epochs=fitted.epochs)


def _write(file: Path, trials: Sequence[Trial]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as opened:
        rows = csv.writer(opened)
        rows.writerow(["trial", "settings", "val_ndcg@10", "epochs", "folder", "note"])
        rows.writerows([t.number, " ".join(t.overrides), t.score, t.epochs, t.folder, t.note] for t in trials)


def sweep_table(trials: Sequence[Trial]) -> str:
    """The trials as text, best first."""
    lines = [f"{'trial':>5}{'val NDCG@10':>13}{'epochs':>8}  folder    settings"]
    for t in trials:
        score = "-" if t.score is None else f"{t.score:.4f}"
        lines.append(f"{t.number:>5}{score:>13}{t.epochs:>8}  {t.folder:<8}  {' '.join(t.overrides)} {t.note}".rstrip())
    return "\n".join(lines)
