"""The pipeline: train on the split, measure through a bundle, refit on everything, publish.

Each step leaves its result in the run's folder, so that the commands of the CLI can also be called one by one:

    runs/sasrec/split/   config.yaml  started.json  last.ckpt  sasrec-epoch=31-....ckpt  tensorboard/  epochs.csv
                         fit.json  metrics.json  baselines.json  ranks.npz  validation.npz  report.json  report.html
    runs/sasrec/all/     config.yaml  started.json  last.ckpt  tensorboard/  epochs.csv  fit.json
                         export/{encoder.onnx,vectors.npy,weights.npz,export.json,index.hnsw,tower.onnx,tower.json}
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from omegaconf import OmegaConf

from shared.bundle import MANIFEST, WEIGHTS, Parity, sha256
from shared.encoder import EncoderSpec
from shared.events import IntArray
from shared.popularity import Popularity
from shared.retrieval import load_index
from trainer.baselines import rival_ranks
from trainer.compare import RANKS, CaseRanks
from trainer.config import ConfigError, EvaluationConfig, Fit, RunConfig, flat, one_data, validate
from trainer.dataset import Cases, Dataset, Sequences, Split, everything
from trainer.errors import TrainingError
from trainer.evaluate import TOP, served_metrics
from trainer.export import Exported, Tower, export
from trainer.items import digest, features_of
from trainer.metrics import intervals, metrics
from trainer.publish import Candidate, check_gate, measure, publish
from trainer.report import write_report
from trainer.shelf import retire
from trainer.sources.config import SqlSource
from trainer.splits import split_of
from trainer.train import (
    LAST,
    Fitted,
    Share,
    check_device,
    evaluate_torch,
    load_encoder,
    prepare,
    torch_ranks,
)
from trainer.warm import Published

Say = Callable[[str], None]
Left = Literal["nothing", "unfinished", "finished"]
"""What a folder holds of the training that is wanted."""
LONGER: Final = {"training.epochs", "training.patience"}
"""Settings that, grown, make a longer training with the same beginning, at a constant learning rate."""
MACHINE: Final = {"accelerator", "threads"}
"""Settings of training that decide no more than rounding."""


@dataclass(frozen=True)
class Run:
    """One model's folder, for one fit."""

    folder: Path

    @classmethod
    def of(cls, runs: Path, name: str, which: Fit) -> Run:
        """`runs/<name>/<which>`."""
        return cls(runs / name / which)

    def left(self, config: RunConfig, dataset: Dataset, epochs: int | None, *, derived: bool = False) -> Left:
        """What an earlier training left for one that is to go on with it.

        Raises ConfigError where a training that had something else than `config` would be lost. An unfinished one
        counts always. A finished one does where it is of the same data: one of new data takes its place every night,
        as weights belong to the item indices of their data. It does not where it is `derived`, as a refit is: that
        follows from its split.
        """
        started, last = self._started(), (self.folder / LAST).is_file()
        if started is not None and started["identity"] == identity(config, dataset) and started["epochs"] == epochs:
            return "finished" if self.is_fitted() else "unfinished" if last else "nothing"
        if not self.is_fitted():
            if not last:
                return "nothing"
            raise ConfigError(
                f"{self.folder} holds an unfinished training, with {self._otherwise(config)}. Resume it with what it "
                "had, take another folder (--runs), or delete this one"
            )
        if not self._same_data(dataset):
            return "nothing"
        if last and self._goes_on_to(config, epochs):
            return "unfinished"
        if derived:
            return "nothing"
        raise ConfigError(
            f"{self.folder} holds a finished training, with {self._otherwise(config)}. Leave out --resume to train "
            "anew in its place, take another folder (--runs), or delete this one"
        )

    def _goes_on_to(self, config: RunConfig, epochs: int | None) -> bool:
        """Whether the finished training would have been the first part of this one, which is for more epochs."""
        if _of_weights(self._changed(config)) - LONGER:
            return False
        had, now = self.config().training, config.training
        more = (epochs or now.epochs) >= ((self._started() or {})["epochs"] or had.epochs)
        return more and now.patience >= had.patience and now.schedule == "constant"

    def start(
        self, config: RunConfig, dataset: Dataset, epochs: int | None, first: str | None = None, *, keep: bool = False
    ) -> None:
        """Make the folder ready for a training whose first weights the bundle `first` gave; None: random ones.

        What an earlier training left in it goes, unless that is to go on: `keep`.
        """
        if keep:
            first = self.first()
            (self.folder / "fit.json").unlink(missing_ok=True)
        elif self.folder.exists():
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._save_config(config)
        self.write("started.json", {"identity": identity(config, dataset), "epochs": epochs, "first": first})

    def first(self, unknown: str | None = None) -> str | None:
        """The bundle that gave the training its first weights; None where these were random.

        A folder that an older version made does not say: `unknown`.
        """
        found: str | None = (self._started() or {}).get("first", unknown)
        return found

    def papers(self) -> dict[str, bytes]:
        """What the folder says of its training."""
        files = (self.folder / name for name in ("config.yaml", "started.json", "fit.json"))
        return {file.name: file.read_bytes() for file in files if file.is_file()}

    def put_back(self, papers: Mapping[str, bytes]) -> None:
        """Let the folder say again what `papers` found."""
        for name, content in papers.items():
            (self.folder / name).write_bytes(content)

    def resumes(self, config: RunConfig, dataset: Dataset) -> bool:
        """Whether what an earlier training left had the same settings and data."""
        return (self._started() or {}).get("identity") == identity(config, dataset)

    def _same_data(self, dataset: Dataset) -> bool:
        """Whether the folder's training is of this data, and of the fields that it reads."""
        try:
            had = identity(self.config(), dataset)
        except ConfigError:
            return False
        return (self._started() or {}).get("identity") == had

    def _otherwise(self, config: RunConfig) -> str:
        """How the training in the folder differs from `config`, in words."""
        try:
            other = [f"{name}={had} (now {now})" for name, (had, now) in self._changed(config).items()]
        except ConfigError:
            return "other settings"
        return ", ".join(other) or "other data or epochs"

    def _changed(self, config: RunConfig) -> dict[str, tuple[Any, Any]]:
        """What decides the weights -> what the folder's training had, and what is set now. Raises ConfigError."""
        had, now = (flat({**decisive(c), "evaluation": c.evaluation.held_out}) for c in (self.config(), config))
        names = [name for name in (had | now) if had.get(name) != now.get(name)]
        return {name: (had.get(name), now.get(name)) for name in names}

    def had_settings(self, config: RunConfig) -> bool:
        """Whether the training in the folder had these settings, whatever the data."""
        try:
            return not _of_weights(self._changed(config))
        except ConfigError:
            return False

    def _started(self) -> dict[str, Any] | None:
        try:
            found: dict[str, Any] = json.loads((self.folder / "started.json").read_text())
        except (OSError, ValueError):
            return None
        return found

    def _save_config(self, config: RunConfig) -> None:
        values = config.model_dump(mode="json")
        if isinstance(config.data.source, SqlSource):  # the next step needs the URL whole, with its password
            values["data"]["source"]["url"] = config.data.source.url.get_secret_value()
        file = self.folder / "config.yaml"
        file.touch(mode=0o600)
        OmegaConf.save(OmegaConf.create(values), file)

    def config(self) -> RunConfig:
        """The settings that the folder was made with. Raises ConfigError."""
        file = self.folder / "config.yaml"
        if not file.is_file():
            raise ConfigError(f"{self.folder} holds no run; train one first: python -m trainer train <preset>")
        return validate(RunConfig, OmegaConf.to_container(OmegaConf.load(file)), str(file))

    def write(self, name: str, values: Mapping[str, Any]) -> None:
        """Keep a step's result as JSON."""
        (self.folder / name).write_text(json.dumps(values, indent=2) + "\n")

    def read(self, name: str, made_by: str) -> dict[str, Any]:
        """A step's result. Raises ConfigError that names the command which makes it."""
        try:
            found: dict[str, Any] = json.loads((self.folder / name).read_text())
        except FileNotFoundError:
            raise ConfigError(f"{self.folder / name} is missing; make it with: python -m trainer {made_by}") from None
        return found

    def save_fit(self, fitted: Fitted, fingerprint: str) -> None:
        """Remember which checkpoint counts, and on which data it was trained."""
        self.write(
            "fit.json",
            {
                "epochs": fitted.epochs,
                "best_validation_ndcg@10": fitted.best,
                "checkpoint": fitted.checkpoint.name,
                "data": fingerprint,
            },
        )

    def is_fitted(self) -> bool:
        """Whether a training here came to its end."""
        return (self.folder / "fit.json").is_file()

    def check_data(self, dataset: Dataset) -> None:
        """Raise TrainingError unless the run was trained on these very events and fields of items."""
        trained_on, found = self.read("fit.json", "train")["data"], dataset.info.fingerprint
        if trained_on != found:
            raise TrainingError(
                f"{self.folder} was trained on data {trained_on}, the source now gives {found}: "
                "item indices would not fit; train again"
            )
        if self.read("started.json", "train")["identity"] != identity(self.config(), dataset):
            raise TrainingError(
                f"{self.folder} was trained with other settings or on other fields of the items; train again"
            )

    def checkpoint(self) -> Path:
        """The checkpoint that counts."""
        return self.folder / str(self.read("fit.json", "train")["checkpoint"])

    def save_export(self, exported: Exported) -> None:
        """Keep an export beside its checkpoint; an index that was built for an older one goes."""
        target = self.folder / "export"
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        (target / "encoder.onnx").write_bytes(exported.onnx)
        np.save(target / "vectors.npy", exported.vectors)
        np.savez(target / WEIGHTS, **exported.weights)  # type: ignore[arg-type]
        if exported.tower is not None:
            exported.tower.save(target)
        self.write(
            "export/export.json",
            {
                "spec": exported.spec.model_dump(mode="json"),
                "parity": exported.parity.model_dump(mode="json"),
                "checkpoint": sha256(self.checkpoint()),
            },
        )

    def exported(self) -> Exported:
        """What `save_export` kept. Raises TrainingError when the run was trained again since."""
        found = self.read("export/export.json", "export onnx")
        if found["checkpoint"] != sha256(self.checkpoint()):
            raise TrainingError(f"{self.folder / 'export'} is older than the checkpoint; export again")
        target = self.folder / "export"
        with np.load(target / WEIGHTS, allow_pickle=False) as kept:
            weights = {name: kept[name] for name in kept.files}
        return Exported(
            (target / "encoder.onnx").read_bytes(),
            np.load(target / "vectors.npy"),
            EncoderSpec.model_validate(found["spec"]),
            Parity.model_validate(found["parity"]),
            weights,
            Tower.load(target),
        )

    @property
    def index_file(self) -> Path:
        """Where `index` puts the index of the export, and `publish` looks for it."""
        return self.folder / "export" / "index.hnsw"


def _of_weights(changed: Iterable[str]) -> set[str]:
    """The settings that decide weights; not where the data lie: whether they are the same is seen by themselves."""
    return {name for name in changed if not name.startswith("data.source.")}


def decisive(config: RunConfig) -> dict[str, Any]:
    """The settings that decide the weights, but for rounding."""
    return config.model_dump(mode="json", include={"data", "model", "training"}, exclude={"training": MACHINE})


def identity(config: RunConfig, dataset: Dataset) -> str:
    """Hash of what decides the weights: events, metadata that the network reads, held-out events, network, training.

    Name, index and publishing do not, nor the machine.
    """
    settings = decisive(config)
    known = digest(dataset, config.model.metadata.fields)
    text = json.dumps([settings, config.evaluation.held_out, dataset.info.fingerprint, known], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def train(
    config: RunConfig,
    dataset: Dataset,
    which: Fit,
    runs: Path,
    *,
    epochs: int | None = None,
    resume: bool = False,
    cold: bool = False,
    derived: bool = False,
    say: Say = print,
) -> Fitted:
    """Train one model on the split (early stopping) or on all events (`epochs` to the end).

    A `cold` start takes no weights of a bundle, whatever the settings say. `derived`: `epochs` follow from another
    training. Of several processes the first keeps the run's folder. With `resume` a training that is over is not
    trained on, unless for more epochs.
    """
    check_device(config.training.accelerator)
    run, mine = Run.of(runs, config.name, which), Share.mine()
    sequences, validation = _part(config, dataset, which)
    if epochs is None:
        epochs = _chosen_epochs(config, which, runs, say)
        derived = derived or epochs is not None
    left = mine.by_first(lambda: run.left(config, dataset, epochs, derived=derived) if resume else "nothing")
    if left == "finished":
        say(f"{config.name}: {run.folder} is trained already")
        return restore(runs, config.name, which)[1]
    features = features_of(dataset, sequences, config.model.metadata, config.model.hidden_units)
    published = None if cold or left == "unfinished" else _warm(config, dataset, which, runs, say)
    first = None if published is None else lambda encoder: say(published.give(encoder, dataset.catalogue))
    # Before `start`: what cannot begin replaces no run.
    ready = prepare(config, len(dataset.catalogue), sequences, validation, features=features, first=first)
    origin, keep = None if published is None else published.manifest.version, left == "unfinished"
    before, written = (run.papers(), _written(run)) if keep else ({}, None)
    mine.by_first(lambda: run.start(config, dataset, epochs, origin, keep=keep))
    try:
        fitted = ready.fit(run.folder, epochs=epochs, resume=keep)
    except BaseException:
        if before and not mine.rank and _written(run) == written:  # what was there is what it was
            run.put_back(before)
        raise
    mine.by_first(lambda: run.save_fit(fitted, dataset.info.fingerprint))
    return fitted


def _written(run: Run) -> int | None:
    """When the newest state of a training was written; None without one."""
    last = run.folder / LAST
    return last.stat().st_mtime_ns if last.is_file() else None


def _warm(config: RunConfig, dataset: Dataset, which: Fit, runs: Path, say: Say) -> Published | None:
    """The published model that gives the network its first weights; None where these are random.

    A published model has most likely seen the events that a split holds out: its validation would be a memory. A fit
    on everything starts from the bundle from which the split of the same settings and data did, if that was one.
    """
    if config.training.init_from is None:
        return None
    split, place = Run.of(runs, config.name, "split"), Path(config.training.init_from)
    version = split.first() if which == "all" and split.resumes(config, dataset) else None
    if version is not None and not any((folder / MANIFEST).is_file() for folder in (place, place / version)):
        raise TrainingError(
            f"{version}, from which {split.folder} started, is no longer in {place}: train the split again, without "
            "--resume"
        )
    published = Published.load(place, config.name, version)
    published.check(config.model)
    if which == "split" and published.saw(dataset, split_of(dataset, config.evaluation)):
        say(f"{config.name}: {published.manifest.version} knows held-out events; the split is trained from the start")
        return None
    return published


def _chosen_epochs(config: RunConfig, which: Fit, runs: Path, say: Say) -> int | None:
    """For a fit on everything, the epochs that validation chose in a split fit of the same settings."""
    split = Run.of(runs, config.name, "split")
    if which != "all" or not split.is_fitted():
        return None
    if not split.had_settings(config):
        say(f"{config.name}: {split.folder} had other settings; training {config.training.epochs} epochs, as is set")
        return None
    chosen = int(split.read("fit.json", "train")["epochs"])
    say(f"{config.name}: training {chosen} epochs, as validation chose in {split.folder}")
    return chosen


def _part(config: RunConfig, dataset: Dataset, which: Fit) -> tuple[Sequences, Cases | None]:
    if which == "all":
        return everything(dataset)[0], None
    split = split_of(dataset, config.evaluation)
    return split.sequences, split.validation if len(split.validation) else None


@dataclass(frozen=True)
class Rivals:
    """What baselines reach on the test cases."""

    ranks: Mapping[str, IntArray]  # (C,) each
    metrics: dict[str, dict[str, Any]]
    notes: list[str]


def rivals(split: Split, config: EvaluationConfig) -> Rivals:
    """Popularity before each target, and EASE; nothing without cases."""
    ranks, notes = rival_ranks(split, config)
    names = [f"{kind}@{k}" for kind in ("hr", "ndcg") for k in config.cutoffs]
    users = split.test.user
    found = {
        name: {**metrics(r, config.cutoffs, users), "intervals": intervals(r, users, names)}
        for name, r in ranks.items()
    }
    return Rivals(ranks, found, notes)


def evaluate(
    fitted: Mapping[str, tuple[RunConfig, Fitted]], dataset: Dataset, split: Split, runs: Path, against: Rivals
) -> dict[str, Candidate]:
    """Split fits with their test metrics, through a bundle and by torch.

    Each run's folder gets `metrics.json`, `baselines.json`, `ranks.npz` and `validation.npz` (for `compare`), and the
    report.
    """
    bare = {
        name: Candidate(config, export(model.encoder, config), "split", model.epochs, {})
        for name, (config, model) in fitted.items()
    }
    top = max(TOP, *(k for config, _ in fitted.values() for k in config.evaluation.cutoffs))
    served = measure(dataset, split, bare, runs, top) if len(split.test) else {}
    seen = "seen filtered" if dataset.policy.seen_types else "nothing filtered"
    found = {}
    for name, (config, model) in fitted.items():
        values: dict[str, Any] = {
            "protocol": f"{split.protocol}, full ranking, {seen}, split fit",
            "run": identity(config, dataset),
            "epochs": model.epochs,
            "validation_ndcg@10": model.best,
            "gates": model.encoder.items.gate_summary(),
            "bundle": {},
            "torch": {},
        }
        run = Run.of(runs, name, "split")
        if name in served:
            cutoffs = config.evaluation.cutoffs
            values["bundle"] = served_metrics(split.test, served[name], split.rule, split.popularity, cutoffs)
            values["torch"] = evaluate_torch(model.encoder, config, split.test)
            ranks = CaseRanks.of(split.test, served[name].free.ranks, values["protocol"])
            ranks.save(run.folder / RANKS["test"])
            known, cases = torch_ranks(model.encoder, config, split.validation)
            chosen_by = CaseRanks.of(cases, known, f"{split.protocol} validation, full ranking, {seen}, torch")
            chosen_by.save(run.folder / RANKS["validation"])
            write_report(run.folder, config, split, ranks.rank, values, against.metrics)
        run.write("metrics.json", values)
        run.write("baselines.json", against.metrics)
        found[name] = replace(bare[name], metrics=values)
    return found


def restore(runs: Path, name: str, which: Fit) -> tuple[RunConfig, Fitted]:
    """A trained model from its run folder."""
    run = Run.of(runs, name, which)
    config, saved = run.config(), run.read("fit.json", "train")
    encoder, _ = load_encoder(run.checkpoint())
    return config, Fitted(encoder, saved["epochs"], saved["best_validation_ndcg@10"], run.checkpoint())


def run(
    configs: Sequence[RunConfig],
    dataset: Dataset,
    runs: Path,
    bundles: Path,
    say: Say,
    *,
    force: bool = False,
    resume: bool = False,
) -> Path:
    """Everything, from data to a live bundle; its path."""
    one_data(configs)
    if Share.mine().size > 1:
        raise ConfigError("torchrun is for `train`; evaluate, export and publish what it trained with one process")
    for config in configs if resume else ():  # now, not after other models, or the split, were trained
        parts: list[Fit] = ["split", "all"] if config.publish.refit else ["split"]
        for part in parts:
            one = Run.of(runs, config.name, part)
            if not one.resumes(config, dataset):
                one.left(config, dataset, None, derived=part == "all")
    split = split_of(dataset, configs[0].evaluation)
    if not len(split.test):
        say("no user has enough events: nothing can be held out, the models are published without metrics")
    fitted = {}
    for config in configs:
        say(f"{config.name}: training on the split, at most {config.training.epochs} epochs")
        fitted[config.name] = (config, train(config, dataset, "split", runs, resume=resume, say=say))
    say("measuring through a bundle: ONNX, retrieval, final gate")
    against = rivals(split, configs[0].evaluation)
    candidates = evaluate(fitted, dataset, split, runs, against)
    tell(candidates, against, runs, say)
    if not force:
        say(check_gate(bundles, dataset, candidates, against.metrics))
    popularity = split.popularity
    if configs[0].publish.refit:
        candidates, popularity = _refit(fitted, dataset, runs, candidates, say, resume=resume)
    for name, candidate in candidates.items():
        Run.of(runs, name, candidate.fit).save_export(candidate.exported)
    target = publish(bundles, dataset, popularity, candidates, against.metrics, split.test, force=force)
    clear_out(bundles, candidates, say)
    return target


def clear_out(bundles: Path, published: Mapping[str, Candidate], say: Say) -> None:
    """Remove the bundles that `publish.keep` leaves no room for."""
    for version in retire(bundles, max(candidate.config.publish.keep for candidate in published.values())):
        say(f"removed {version}: publish.keep")


def _refit(
    fitted: Mapping[str, tuple[RunConfig, Fitted]],
    dataset: Dataset,
    runs: Path,
    measured: Mapping[str, Candidate],
    say: Say,
    *,
    resume: bool,
) -> tuple[dict[str, Candidate], Popularity]:
    """Train again on all events for the epochs that validation chose, and from a cold start where it had one."""
    candidates = {}
    for name, (config, model) in fitted.items():
        say(f"{name}: training on all events, {model.epochs} epochs")
        first = Run.of(runs, name, "split").first(unknown="")
        cold = first is None or (not first and _warm(config, dataset, "split", runs, lambda _: None) is None)
        again = train(
            config, dataset, "all", runs, epochs=model.epochs, resume=resume, cold=cold, derived=True, say=say
        )  # fmt: skip
        exported = export(again.encoder, config)
        candidates[name] = replace(measured[name], exported=exported, fit="all", epochs=again.epochs)
    return candidates, everything(dataset)[1]


def publish_runs(
    runs: Path, names: Sequence[str], dataset: Dataset, bundles: Path, which: Fit, say: Say, *, force: bool = False
) -> Path:
    """Publish from run folders: exports of `which` fit with the metrics of the split fit."""
    candidates = {}
    for name in names:
        run = Run.of(runs, name, which)
        run.check_data(dataset)
        metrics = _metrics_of(runs, name, identity(run.config(), dataset), force=force)
        epochs = int(run.read("fit.json", "train")["epochs"])
        exported, file = run.exported(), run.index_file
        index = load_index(str(file), exported.spec.width, run.config().index.ef) if file.is_file() else None
        candidates[name] = Candidate(run.config(), exported, which, epochs, metrics, index)
    _one_protocol(candidates)
    split = split_of(dataset, candidates[names[0]].config.evaluation)
    popularity = everything(dataset)[1] if which == "all" else split.popularity
    measured = next((name for name in names if candidates[name].metrics), None)
    baseline = Run.of(runs, measured, "split").read("baselines.json", f"evaluate {measured}") if measured else {}
    target = publish(bundles, dataset, popularity, candidates, baseline, split.test, force=force)
    clear_out(bundles, candidates, say)
    return target


def _metrics_of(runs: Path, name: str, wanted: str, *, force: bool) -> dict[str, Any]:
    """The figures of the split fit of this identity; with `force` nothing where there are none. Raises TrainerError."""
    run = Run.of(runs, name, "split")
    if force and not (run.folder / "metrics.json").is_file():
        return {}
    metrics = run.read("metrics.json", f"evaluate {name}")
    if metrics["run"] == wanted:
        return metrics
    if force:
        return {}
    raise TrainingError(
        f"the metrics of {name} are those of other settings or data than it was trained with: train and evaluate the "
        "split with the same ones, or publish without figures by --force"
    )


def _one_protocol(candidates: Mapping[str, Candidate]) -> None:
    protocols = {str(c.metrics["protocol"]): name for name, c in candidates.items() if c.metrics}
    if len(protocols) > 1:
        said = "; ".join(f"{name}: {protocol}" for protocol, name in protocols.items())
        raise TrainingError(f"these models were measured differently, evaluate them together: {said}")


def tell(candidates: Mapping[str, Candidate], against: Rivals, runs: Path, say: Say) -> None:
    """The test metrics and where more of them are."""
    for candidate in list(candidates.values())[:1]:
        say(str(candidate.metrics["protocol"]))
    say(metrics_table(candidates, against.metrics))
    for note in against.notes:
        say(f"note: {note}")
    reports = [Run.of(runs, name, "split").folder / "report.html" for name in candidates]
    for report in filter(Path.is_file, reports):
        say(f"report: {report}")


COLUMNS = ("hr@5", "ndcg@5", "hr@10", "ndcg@10", "hr@20", "ndcg@20", "mrr")


def metrics_table(measured: Mapping[str, Candidate], popular: Mapping[str, Mapping[str, Any]]) -> str:
    """The test metrics as text; `mrr` of a bundle counts its top 20, torch's and the baselines' all ranks."""
    rows = [(f"{name} (bundle)", found.metrics["bundle"]) for name, found in measured.items()]
    rows += [(f"{name} (torch)", found.metrics["torch"]) for name, found in measured.items()]
    rows += list(popular.items())
    columns = [c for c in COLUMNS if any(c in row for _, row in rows)] or list(COLUMNS)
    wide = max((len(name) for name, _ in rows), default=0)
    lines = [" " * wide + "".join(f"{c:>9}" for c in columns)]
    lines += [f"{name:<{wide}}" + "".join(f"{row.get(c, float('nan')):9.4f}" for c in columns) for name, row in rows]
    return "\n".join(lines)
