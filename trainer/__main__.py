"""The command line: `python -m trainer --help`."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NoReturn

# Before torch and numpy start their pools: two libraries with a pool each fight for the same cores.
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "2")
# Waiting threads sleep instead of spinning: on a machine with other work, spinning costs more than it saves.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import typer
from rich.console import Console

from shared.bundle import Bundle, BundleError, current_version
from shared.catalogue import CatalogueError
from shared.database import SchemaError
from shared.retrieval import Mode
from trainer import shelf
from trainer.backup import backup, restore
from trainer.compare import Asked, compare, comparison_table, load_ranks
from trainer.config import (
    ConfigError,
    Fit,
    RunConfig,
    Setting,
    load_config,
    one_data,
    preset_names,
    settings,
    source_settings,
)
from trainer.dataset import Dataset, load_dataset
from trainer.embeddings import check_vectors_file, item_vectors, user_vectors, write_vectors
from trainer.errors import TrainerError
from trainer.predict import check_table, write_table
from trainer.predict import predict as predict_lists
from trainer.replay import Options, ReplayError, replay, replay_table, service_at
from trainer.seed import seed_log
from trainer.sources import SOURCES, RawData, describe
from trainer.sources.config import MinInteractions
from trainer.sources.vectors import save_vectors
from trainer.splits import split_of
from trainer.titles import TFIDF, fields_with_text, text_vectors

# Commands that train import pipeline, train, export and the like by themselves: torch and Lightning take seconds, for
# which nobody should wait who looks at data, asks for help or mistypes a preset.

KNOWN_ERRORS = (TrainerError, BundleError, CatalogueError, SchemaError)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="""Train sequence models on an event log and publish them as a bundle that the service loads.

    Most people need one command:

        python -m trainer run sasrec-quick bert4rec-quick

    It trains on the split, measures through the exported bundle, trains again on everything and publishes to
    `bundles/`. The other commands are its steps, for when you want to look between them. Settings follow the
    preset as `key=value`: model.hidden_units=128 training.lr=0.001 data.source.kind=sql data.source.url=...""",
)
data_app = typer.Typer(no_args_is_help=True, help="Look at data, or load it into the service's log.")
app.add_typer(data_app, name="data")
export_app = typer.Typer(no_args_is_help=True, help="Networks as ONNX, or vectors for use elsewhere.")
app.add_typer(export_app, name="export")
console = Console(highlight=False, soft_wrap=True)

Presets = Annotated[
    list[str],
    typer.Argument(
        metavar="PRESET... [KEY=VALUE]...",
        help=f"Presets ({', '.join(preset_names())}) or YAML files, then settings that apply to all of them.",
    ),
]
Models = Annotated[list[str], typer.Argument(metavar="NAME...", help="Names of trained models, folders in --runs.")]
Runs = Annotated[Path, typer.Option(help="Folder of training runs.")]
Bundles = Annotated[
    Path, typer.Option(envvar="UPNEXT_BUNDLES", help="Folder of bundles; CURRENT in it names the live one.")
]
Force = Annotated[
    bool,
    typer.Option("--force", help="Publish even if popularity or the live bundle is better, or nothing was measured."),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint of an interrupted training.")]
BundleModel = Annotated[str | None, typer.Option("--model", help="Model in the bundle; its default one otherwise.")]
LOG = "sqlite:///var/upnext.db"
Database = Annotated[
    str, typer.Option("--database-url", envvar="UPNEXT_DATABASE_URL", help="SQLAlchemy URL of the service's log.")
]
Which = Annotated[Fit, typer.Option("--fit", help="split: held-out events stay unseen. all: every event.")]


def say(text: str) -> None:
    """Print for a person."""
    console.print(text, markup=False)


def fail(error: Exception) -> NoReturn:
    """Print an error that has a remedy, without a traceback, and stop with status 1."""
    complain(error)
    raise typer.Exit(1)


def complain(error: Exception) -> None:
    """Print an error that has a remedy."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"[bold red]error:[/] {_escaped(str(error))}")


def _escaped(text: str) -> str:
    return text.replace("[", "\\[")


def configs_of(words: list[str]) -> list[RunConfig]:
    """Split `sasrec-quick training.lr=0.01` in presets and settings, and load them."""
    presets, overrides = [w for w in words if "=" not in w], [w for w in words if "=" in w]
    if not presets:
        raise ConfigError(f"name a preset: {', '.join(preset_names())}, or a YAML file")
    configs = [load_config(preset, overrides) for preset in presets]
    one_data(configs)
    return configs


def dataset_of(config: RunConfig) -> Dataset:
    """Read the data of a config, saying what was found."""
    dataset, raw = load_dataset(config.data)
    show(raw)
    for note in dataset.notes:
        say(f"note: {note}")
    return dataset


def live_model(bundles: Path, model: str | None, mode: Mode = Mode.AUTO) -> tuple[Bundle, str]:
    """The live bundle, and the name of the model meant in it."""
    version = current_version(bundles)
    if version is None:
        raise BundleError(f"nothing is published in {bundles}; run: python -m trainer run <preset>")
    bundle = Bundle.load(bundles / version, mode)
    name = model or bundle.manifest.default_model
    if name not in bundle.models:
        raise BundleError(f"no model {name!r} in {version}; it has {', '.join(bundle.models)}")
    return bundle, name


def dataset_for(bundle: Bundle, config: RunConfig) -> Dataset:
    """A preset's data with histories as the bundle's models were trained to read them, whatever the preset says.

    All of it: who or what is too rare to train on is asked about all the same.
    """
    source = config.data.source.model_copy(update={"min_interactions": MinInteractions()})
    data = config.data.model_copy(update={"history": bundle.policy, "source": source})
    return dataset_of(config.model_copy(update={"data": data}))


def show(raw: RawData) -> None:
    """Terms of use first, then the figures."""
    if raw.report.terms:
        say(f"Terms of use: {raw.report.terms}")
    say(describe(raw))


@app.command()
def run(
    presets: Presets,
    runs: Runs = Path("runs"),
    bundles: Bundles = Path("bundles"),
    *,
    force: Force = False,
    resume: Resume = False,
) -> None:
    """Train, evaluate, refit on everything and publish: from data to a live bundle."""
    configs = configs_of(presets)
    from trainer import pipeline

    target = pipeline.run(configs, dataset_of(configs[0]), runs, bundles, say, force=force, resume=resume)
    say(f"published {target} and made it current")


@app.command()
def train(
    presets: Presets,
    runs: Runs = Path("runs"),
    fit: Which = "split",
    epochs: Annotated[int | None, typer.Option(help="Train exactly so many epochs (with --fit all).")] = None,
    *,
    resume: Resume = False,
) -> None:
    """Train only; checkpoints and TensorBoard files go to `runs/<name>/<fit>`."""
    configs = configs_of(presets)
    from trainer import pipeline
    from trainer.train import Share

    dataset = dataset_of(configs[0])
    for config in configs:
        fitted = pipeline.train(config, dataset, fit, runs, epochs=epochs, resume=resume, say=say)
        if Share.mine().rank:
            continue
        best = "" if fitted.best is None else f", validation NDCG@10 {fitted.best:.4f}"
        say(f"{config.name}: {fitted.epochs} epochs{best}; {fitted.checkpoint}")


@app.command()
def evaluate(names: Models, runs: Runs = Path("runs")) -> None:
    """Test metrics of split fits: through a bundle (ONNX and retrieval), by torch, and popularity beside them."""
    from trainer import pipeline

    fitted = {name: pipeline.restore(runs, name, "split") for name in names}
    configs = [config for config, _ in fitted.values()]
    one_data(configs)
    dataset = dataset_of(configs[0])
    for name in names:
        pipeline.Run.of(runs, name, "split").check_data(dataset)
    evaluation = configs[0].evaluation
    split = split_of(dataset, evaluation)
    against = pipeline.rivals(split, evaluation)
    pipeline.tell(pipeline.evaluate(fitted, dataset, split, runs, against), against, runs, say)


@app.command("compare")
def compare_command(
    run_a: Annotated[str, typer.Argument(help="Name of an evaluated run, or the path of its folder.")],
    run_b: Annotated[str, typer.Argument(help="The run that may be better.")],
    runs: Runs = Path("runs"),
    on: Annotated[Asked, typer.Option(help="validation: to choose by. test: to report, once.")] = "test",
) -> None:
    """Is one run better than another? Differences user by user, with bootstrap intervals and permutation tests."""
    say(comparison_table(compare(*(load_ranks(runs, name, on) for name in (run_a, run_b)))))


@export_app.command("onnx")
def export_onnx(names: Models, runs: Runs = Path("runs"), fit: Which = "all") -> None:
    """torch to ONNX, refused when both do not answer the same."""
    from trainer import pipeline
    from trainer.export import export

    for name in names:
        config, model = pipeline.restore(runs, name, fit)
        exported = export(model.encoder, config)
        one = pipeline.Run.of(runs, name, fit)
        one.save_export(exported)
        say(f"{name}: {one.folder / 'export'}; {exported.parity}")


@export_app.command("embeddings")
def export_embeddings(
    presets: Annotated[
        list[str] | None, typer.Argument(metavar="[PRESET] [KEY=VALUE]...", help="Whose users to encode; none: items.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder to write items and users to.")] = Path("embeddings"),
    bundles: Bundles = Path("bundles"),
    model: BundleModel = None,
    form: Annotated[str, typer.Option("--format", help="parquet, or tsv: id, tab, numbers.")] = "parquet",
) -> None:
    """Item vectors of the live bundle, and with a preset the vectors of its users: a score is their dot product."""
    check_vectors_file(out / f"items.{form}")
    bundle, name = live_model(bundles, model)
    tables = {"items": item_vectors(bundle, name)}
    if presets:
        tables["users"] = user_vectors(bundle, dataset_for(bundle, configs_of(presets)[0]), name)
    for kind, table in tables.items():
        write_vectors(table, out / f"{kind}.{form}")
        say(f"{out / f'{kind}.{form}'}: {table.height:,} vectors of {name} of {bundle.version}")


@app.command("sweep")
def sweep_command(
    preset: Annotated[str, typer.Argument(help="Preset or YAML file.")],
    settings: Annotated[list[str], typer.Argument(metavar="KEY=A,B,C...", help="Every combination is trained.")],
    runs: Runs = Path("runs/sweep"),
    trials: Annotated[int | None, typer.Option(min=1, help="Only so many combinations, drawn at random.")] = None,
) -> None:
    """Train a preset with each combination of settings, and rank them by validation NDCG@10; the test stays unseen."""
    from trainer.sweep import fixed, sweep, sweep_table

    dataset = dataset_of(load_config(preset, fixed(settings)))
    say(sweep_table(sweep(preset, settings, dataset, runs, trials, say)))


@app.command()
def index(names: Models, runs: Runs = Path("runs"), fit: Which = "all") -> None:
    """Build the HNSW index of an export beside its vectors, and say how well it finds them; `publish` takes it."""
    from trainer.pipeline import Run
    from trainer.publish import index_of, self_recall

    for name in names:
        one = Run.of(runs, name, fit)
        exported = one.exported()
        built = index_of(exported, one.config().index)
        built.save_index(str(one.index_file))
        say(f"{name}: {one.index_file}; recall@10 {self_recall(exported, built):.4f} on its own vectors")


@app.command()
def publish(
    names: Models,
    runs: Runs = Path("runs"),
    bundles: Bundles = Path("bundles"),
    fit: Which = "all",
    *,
    force: Force = False,
) -> None:
    """Make a bundle of exports and point CURRENT at it."""
    from trainer import pipeline

    configs = [pipeline.Run.of(runs, name, fit).config() for name in names]
    one_data(configs)
    target = pipeline.publish_runs(runs, names, dataset_of(configs[0]), bundles, fit, say, force=force)
    say(f"published {target} and made it current")


@app.command("bundles")
def list_bundles(bundles: Bundles = Path("bundles")) -> None:
    """List the bundles: which is live and which was before, when they were made, and how they measured."""
    say(shelf.listing(bundles))


@app.command()
def rollback(
    version: Annotated[
        str | None, typer.Argument(metavar="[VERSION]", help="The one to go back to; none: the one live before.")
    ] = None,
    bundles: Bundles = Path("bundles"),
) -> None:
    """Make an older bundle live again; running services follow by themselves."""
    say(f"{shelf.roll_back(bundles, version)} is live again")


@app.command()
def predict(
    presets: Presets,
    out: Annotated[Path, typer.Option(help="File to write, .csv or .parquet.")],
    bundles: Bundles = Path("bundles"),
    model: BundleModel = None,
    k: Annotated[int, typer.Option("--k", min=1, max=1000, help="Items a user.")] = 10,
) -> None:
    """Top-K lists for all users of a preset's data, with the availability rule at each user's last event."""
    check_table(out)
    bundle, name = live_model(bundles, model)
    table, excluded = predict_lists(bundle, dataset_for(bundle, configs_of(presets)[0]), name, k)
    write_table(table, out)
    say(f"{out}: {table.height:,} rows for {excluded.users:,} users by {name} of {bundle.version}")
    say(
        f"availability rule at each user's last event: {excluded.unavailable:,} (user, item) pairs excluded, "
        f"{excluded.users_touched:,} users touched, {excluded.future_in_lists:,} items kept out of the top {k}; "
        f"{excluded.without_history:,} users answered by popularity"
    )


@app.command("replay")
def replay_command(
    presets: Presets,
    url: Annotated[str, typer.Option(envvar="UPNEXT_URL", help="Where the service is.")] = "http://127.0.0.1:8000",
    api_key: Annotated[
        str | None, typer.Option(envvar="UPNEXT_API_KEY", show_envvar=True, help="If the service wants one.")
    ] = None,
    bundles: Bundles = Path("bundles"),
    model: BundleModel = None,
    users: Annotated[int, typer.Option(min=1, help="How many users to ask for, drawn at random.")] = 200,
    seed: Annotated[int, typer.Option(help="Decides which.")] = 0,
    k: Annotated[int, typer.Option("--k", min=1, max=100, help="Items a user.")] = 10,
    allow: Annotated[float, typer.Option(min=0, max=1, help="Share of answers that may differ.")] = 0.0,
    retrieval: Annotated[Mode, typer.Option(envvar="UPNEXT_RETRIEVAL", help="As the service has it.")] = Mode.AUTO,
    candidates: Annotated[int, typer.Option(envvar="UPNEXT_CANDIDATES", min=1, help="As the service has it.")] = 200,
) -> None:
    """Skew alarm: compare a running service with its bundle offline. Exit status 1: they differ; 2: nobody can tell."""
    try:
        bundle, name = live_model(bundles, model, retrieval)
        with service_at(url, api_key, bundle.version) as service:
            service.check_version()
            dataset = dataset_for(bundle, configs_of(presets)[0])
            found = replay(bundle, dataset, service, Options(name, k, users, seed, candidates))
    except (ReplayError, *KNOWN_ERRORS) as error:
        complain(error)
        raise typer.Exit(2) from None
    say(f"{url} and {name} of {bundle.version}:")
    say(replay_table(found))
    if any(compared.share > allow for compared in found.values()):
        raise typer.Exit(1)


@app.command()
def vectors(
    presets: Presets,
    out: Annotated[Path, typer.Option(help="File to write; `data.vectors.title=FILE` reads it.")],
    model: Annotated[str, typer.Option(help="tfidf, or a sentence-transformers model: folder or name.")] = TFIDF,
    text: Annotated[str, typer.Option(help="title and fields of categories, with commas between.")] = "title,genre",
    width: Annotated[int, typer.Option(min=2, help="Numbers a vector, with tfidf.")] = 64,
) -> None:
    """Vectors of what is written about the items, for `model.metadata.fields=[title]`."""
    fields, dataset = [field.strip() for field in text.split(",")], dataset_of(configs_of(presets)[0])
    found, used = text_vectors(dataset, fields, model, width), fields_with_text(dataset, fields)
    for field in sorted(set(fields) - set(used)):
        say(f"note: no item has a text in {field}")
    save_vectors(out, found)
    say(f"{out}: {len(found.item_ids):,} vectors of width {found.values.shape[1]} by {model} from {', '.join(used)}")


@app.command()
def cold(
    presets: Presets,
    share: Annotated[float, typer.Option(min=0.01, max=0.5, help="Share of the items to hold out.")] = 0.1,
    seed: Annotated[int, typer.Option(help="Decides which items.")] = 0,
    runs: Runs = Path("runs"),
) -> None:
    """Hold items out of training and find them by their metadata alone."""
    from trainer.cold import cold_table, hold_out, measure_cold
    from trainer.train import check_device

    for config in configs_of(presets):
        check_device(config.training.accelerator)
        folder = runs / config.name / "cold"
        shutil.rmtree(folder, ignore_errors=True)
        held = hold_out(dataset_of(config), share, seed)
        say(f"{config.name}: {len(held.items):,} items held out, asked {len(held.asked):,} times")
        found = measure_cold(config, held, folder, seed)
        (folder / "cold.json").write_text(json.dumps(found, indent=2) + "\n")
        say(f"vectors made of {', '.join(['id', *found['fields']])}; {found['epochs']} epochs; {folder / 'cold.json'}")
        say(cold_table(found))


@app.command("settings")
def show_settings() -> None:
    """Every setting that a preset or `key=value` can set, with its default and meaning."""
    _list_settings(settings(), 33)
    for kind, rows in source_settings().items():
        say(f"\ndata.source.kind={kind}")
        _list_settings(rows, 40)


def _list_settings(rows: Sequence[Setting], width: int) -> None:
    for key, default, meaning in rows:
        line = f"{key:<{width}} {default:<12}"
        if len(default) > len("first_event"):  # a line of its own, so that the meanings stand below each other
            say(line)
            line = " " * (width + 13)
        say(f"{line} {meaning}")


@data_app.command("list")
def data_list() -> None:
    """The kinds of source that `data.source.kind` can name, and the presets."""
    say("sources: " + ", ".join(SOURCES))
    say("presets: " + ", ".join(preset_names()))


@data_app.command("describe")
def data_describe(presets: Presets) -> None:
    """Read a preset's data and say what is in it, bad rows included."""
    dataset_of(configs_of(presets)[0])


@data_app.command("load")
def data_load(
    presets: Presets,
    database: Database = LOG,
) -> None:
    """Load a preset's events and items into the service's log and catalogue; a second load stores nothing twice."""
    config = configs_of(presets)[0]
    _, raw = load_dataset(config.data)
    show(raw)
    loaded = asyncio.run(seed_log(raw, database, say))
    say(f"{loaded:,} events are new in the log, {raw.events.height - loaded:,} were there already")


@data_app.command("backup")
def data_backup(
    folder: Annotated[Path, typer.Argument(help="Folder to write; it must not exist yet.")], database: Database = LOG
) -> None:
    """Write the service's log and catalogue to a folder of Parquet files, as of one moment."""
    asyncio.run(backup(database, folder, say))


@data_app.command("restore")
def data_restore(
    folder: Annotated[Path, typer.Argument(help="Folder that `data backup` wrote.")],
    database: Database = LOG,
    tombstones: Annotated[
        Path | None, typer.Option(help="File that `python -m service tombstones` wrote after the backup.")
    ] = None,
) -> None:
    """Put a backup into an empty database, without what was erased since; stop the service before."""
    asyncio.run(restore(database, folder, say, tombstones=tombstones))


def main() -> None:
    """Entry of `python -m trainer`."""
    try:
        app(standalone_mode=True)
    except KNOWN_ERRORS as error:
        try:
            fail(error)
        except typer.Exit as stop:
            raise SystemExit(stop.exit_code) from None


if __name__ == "__main__":
    main()
