"""Settings of a run: YAML presets, `key=value` overrides, validated by frozen models.

    python -m trainer run sasrec-quick model.hidden_units=128 training.lr=0.0005

A preset is one short YAML file that names what differs from the defaults below; the merged
settings are saved beside the weights and in the manifest.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, Self, get_args

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from shared.bundle import MODEL_PATTERN
from shared.events import HistoryPolicy
from shared.sequences import Clock
from trainer.errors import TrainerError
from trainer.sources import SOURCES, SourceConfig

PRESETS = Path(__file__).parent / "configs"
AvailabilityPolicy = Literal["first_event", "always"]
BlockKind = Literal["pre_norm", "original"]
Fusion = Literal["add", "concat", "gate"]
Fit = Literal["split", "all"]
"""Whether the weights saw the held-out events."""
Loss = Literal["cross_entropy", "sampled_softmax", "gbce", "bce"]
LOSS_SETTINGS: Final = {
    "negatives": ("sampled_softmax", "gbce", "bce"),
    "in_batch_negatives": ("sampled_softmax",),
    "calibration": ("gbce",),
}
"""Setting of training -> the losses that read it."""


class ConfigError(TrainerError):
    """Settings that cannot be used; the message says which and what to write instead."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class DataConfig(_Section):
    """What to train on."""

    source: SourceConfig
    history: HistoryPolicy = HistoryPolicy()
    availability: AvailabilityPolicy = Field(
        "first_event", description="Items without a declared date exist from their first event, or always."
    )
    vectors: dict[str, Path] = Field(
        {}, description="{field: file} of item vectors, as `python -m trainer vectors` writes them."
    )


class MetadataConfig(_Section):
    """What item vectors are made of beside the item's id."""

    fields: tuple[str, ...] = Field(
        (), description="Fields of item categories (genre, director, ...) and of vectors (title); none: ids alone."
    )
    fusion: Fusion = Field("add", description="How id and fields become one vector: add, concat or gate.")
    dropout: float = Field(0.1, ge=0, lt=1, description="How often an item goes without a field in a training step.")
    id_dropout: float = Field(
        0.1, ge=0, lt=1, description="How often without its id, so that items without events get useful vectors."
    )
    min_items: int = Field(2, ge=1, description="Items in training that must carry a value for it to be read.")
    max_values: int = Field(16, ge=1, description="Values of a field that are read of an item at most.")

    @field_validator("fields")
    @classmethod
    def _once(cls, fields: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(fields))


class ModelConfig(_Section):
    """The network."""

    kind: Literal["sasrec", "bert4rec"] = Field(description="sasrec (causal) or bert4rec (both sides, masked).")
    block: BlockKind = Field("pre_norm", description="pre_norm; original: SASRec's own, with ReLU.")
    positions: Literal["learned", "none"] = Field("learned", description="Position vectors added to item vectors.")
    position_bias: bool = Field(
        default=False, description="Attention is told how many places apart two events are: a learned number each."
    )
    time_bias: Clock = Field(
        "none",
        description="Attention is told how long before the newest event read (events), or before the event to guess "
        "(query: as_of in service), each event was.",
    )
    hidden_units: int = Field(64, ge=4, description="D: width of item vectors and of everything between.")
    blocks: int = Field(2, ge=1, description="Transformer blocks.")
    heads: int = Field(1, ge=1, description="Must divide hidden_units.")
    feedforward: int = Field(1, ge=1, description="Width of the feed-forward layer, in multiples of hidden_units.")
    dropout: float = Field(0.2, ge=0, lt=1, description="Of embeddings, attention and layers.")
    max_length: int = Field(200, ge=2, le=200, description="T: newest events that the model reads.")
    metadata: MetadataConfig = MetadataConfig()

    @model_validator(mode="after")
    def _a_mask_has_a_time(self) -> Self:
        if self.kind == "bert4rec" and self.time_bias == "events":
            raise ValueError("time_bias events is for sasrec: a MASK stands at the time of what it hides; take query")
        return self


class TrainingConfig(_Section):
    """The loop."""

    epochs: int = Field(100, ge=1, description="At most; early stopping may end before.")
    patience: int = Field(10, ge=1, description="Epochs without a better validation NDCG@10 before stopping.")
    batch_size: int = Field(128, ge=1, description="Users a step.")
    length_window: int = Field(
        20, ge=1, description="Users are sorted by length in shuffled windows of so many batches; 1: random batches."
    )
    gradient_clip: float = Field(5.0, ge=0, description="Largest norm of a step's gradient; 0 for any.")
    lr: float = Field(1e-3, gt=0, description="Learning rate of Adam.")
    warmup: int = Field(0, ge=0, description="Steps in which the learning rate rises to lr.")
    schedule: Literal["constant", "cosine"] = Field(
        "constant",
        description="After that: lr to the end, or along a cosine down to nothing at the end of `epochs`; a refit of "
        "fewer epochs stops before.",
    )
    init_from: str | None = Field(
        None, description="Bundle, or folder of bundles, whose model of this name gives the first weights."
    )
    weight_decay: float = Field(0.0, ge=0, description="Decoupled, as in AdamW.")
    loss: Loss = Field(
        "cross_entropy",
        description="cross_entropy over all items up to about 50,000 of them, above that sampled_softmax.",
    )
    negatives: int | None = Field(
        None,
        ge=1,
        description="Drawn from all items: for each position with bce (1), for every 64 neighbours otherwise (256).",
    )
    in_batch_negatives: int = Field(0, ge=0, description="sampled_softmax: drawn from the batch's targets besides.")
    calibration: float = Field(0.75, ge=0, le=1, description="gbce: t; 0 is bce, 1 the most calibrated.")
    mask_probability: float = Field(0.2, gt=0, lt=1, description="BERT4Rec: share of positions to guess.")
    last_item_probability: float = Field(
        0.05,
        ge=0,
        le=1,
        description="BERT4Rec: share of sequences where only the last item is to guess.",
    )
    seed: int = Field(0, ge=0, lt=2**32, description="Decides initial weights, batches, masks and dropout.")
    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps"] = Field(
        "auto", description="What to train on; auto: a GPU where there is one."
    )
    threads: int = Field(2, ge=1, description="CPU threads of torch.")
    validate_every: int = Field(1, ge=1, description="Epochs between validations.")

    @property
    def negative_count(self) -> int:
        """K that the loss draws from all items."""
        return self.negatives or (1 if self.loss == "bce" else 256)

    @model_validator(mode="after")
    def _only_what_the_loss_reads(self) -> Self:
        for name, losses in LOSS_SETTINGS.items():
            if getattr(self, name) != type(self).model_fields[name].default and self.loss not in losses:
                raise ValueError(f"{name} is for loss {' or '.join(losses)}, and loss is {self.loss}")
        return self


class EvaluationConfig(_Section):
    """What is held out, and what is measured on it."""

    split: Literal["leave_one_out", "temporal"] = Field(
        "leave_one_out", description="Each user's last event, or all that happened after one moment, for all users."
    )
    quantile: float = Field(0.9, gt=0, lt=1, description="Temporal: share of the events up to the cut.")
    targets: Literal["last", "successive"] = Field(
        "last", description="Temporal: guess each user's last event after the cut, or every one of them."
    )
    cutoffs: tuple[int, ...] = Field((5, 10, 20), description="The k of hr@k and so on; 10 is among them.")
    ease: bool = Field(default=True, description="Measure EASE beside the models: strong, and no training loop.")
    ease_l2: float = Field(300.0, gt=0, description="EASE: weight of the penalty.")

    @property
    def held_out(self) -> dict[str, Any]:
        """What of this section decides which events are not trained on."""
        return self.model_dump(include={"split"} if self.split == "leave_one_out" else {"split", "quantile"})

    @field_validator("cutoffs")
    @classmethod
    def _ascending(cls, cutoffs: tuple[int, ...]) -> tuple[int, ...]:
        if 10 not in cutoffs or min(cutoffs) < 1 or max(cutoffs) > 1000:
            raise ValueError("name numbers from 1 to 1000, 10 among them: early stopping and the gate look at NDCG@10")
        return tuple(sorted(set(cutoffs)))


class IndexConfig(_Section):
    """The HNSW index."""

    m: int | None = Field(None, ge=2, description="Links of a node. Absent: 16, and 32 above 100,000 items.")
    ef_construction: int = Field(200, ge=8, description="Candidates looked at while building.")
    ef: int = Field(200, ge=10, description="Candidates looked at by a query.")
    threads: int = Field(
        1, ge=1, description="Threads that build it. Only with one is it the same each time; a million items want more."
    )


class PublishConfig(_Section):
    """What goes live."""

    refit: bool = Field(True, description="Train again on all events, for the epochs chosen, and publish that.")
    max_loss: float = Field(
        0.05, ge=0, le=1, description="Refuse a model whose NDCG@10 is below the live one's by a larger share."
    )
    keep: int = Field(
        3, ge=2, description="Bundles to keep: the live one, the one before it, the newest others. Older ones go."
    )


class RunConfig(_Section):
    """One model of a run."""

    name: str = Field(pattern=MODEL_PATTERN, description="The model's name in the bundle and in `?model=`.")
    data: DataConfig
    model: ModelConfig
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    index: IndexConfig = IndexConfig()
    publish: PublishConfig = PublishConfig()

    def model_post_init(self, _context: Any) -> None:
        """Checks across fields."""
        if self.model.hidden_units % self.model.heads:
            raise ValueError(f"model.heads {self.model.heads} does not divide hidden_units {self.model.hidden_units}")


def preset_names() -> list[str]:
    """The presets that come with Upnext."""
    return sorted(p.stem for p in PRESETS.glob("*.yaml"))


def load_config(preset: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Merge a preset (a name, or the path of a YAML file) with `key=value` overrides. Raises ConfigError."""
    path = Path(preset) if preset.endswith((".yaml", ".yml")) else PRESETS / f"{preset}.yaml"
    if not path.is_file():
        near = difflib.get_close_matches(preset, preset_names(), 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(f"no preset {preset!r}: {hint}There are {', '.join(preset_names())}, or name a YAML file.")
    try:
        base, given = OmegaConf.load(path), OmegaConf.from_dotlist(list(overrides))
        kind = OmegaConf.select(given, "data.source.kind")
        if kind is not None and kind != OmegaConf.select(base, "data.source.kind"):
            OmegaConf.update(base, "data.source", {}, merge=False)  # another source: nothing of the old one applies
        merged = OmegaConf.merge(base, given)
        values = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path.name} with {' '.join(overrides)}: {error}") from error
    except Exception as error:  # the YAML reader's own errors carry line and column
        raise ConfigError(f"{path}: not readable as YAML: {error}") from error
    return validate(RunConfig, values, str(path))


def one_data(configs: Sequence[RunConfig]) -> None:
    """Models of one bundle share one catalogue, so they must be trained on the same data. Raises ConfigError."""
    if any(c.data != configs[0].data for c in configs):
        raise ConfigError("these presets differ in `data`; models of one bundle must be trained on the same data")
    if len({c.publish.refit for c in configs}) > 1:
        raise ConfigError("these presets differ in publish.refit; models of one bundle are fitted alike")
    if any(c.evaluation != configs[0].evaluation for c in configs):
        raise ConfigError("these presets differ in `evaluation`; figures of one bundle must mean the same")
    names = [c.name for c in configs]
    if len(set(names)) < len(names):
        raise ConfigError(f"two presets have the same name ({', '.join(names)}); set name=... in one of them")


def flat(values: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """{"model": {"blocks": 2}} -> {"model.blocks": 2}, as a person would write it on the command line."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{path}{name}.")
        else:
            found[f"{path}{name}"] = value
    return found


Setting = tuple[str, str, str]
"""Key, default and meaning."""


def settings() -> list[Setting]:
    """Every setting but those of the sources, which depend on their kind."""
    return _settings(RunConfig, "")


def source_settings() -> dict[str, list[Setting]]:
    """Those of each kind of source."""
    kinds = _models_in(DataConfig.model_fields["source"].annotation)
    rows = {get_args(kind.model_fields["kind"].annotation)[0]: _settings(kind, "data.source.") for kind in kinds}
    return {kind: [row for row in of_kind if row[0] != "data.source.kind"] for kind, of_kind in rows.items()}


def _settings(section: type[BaseModel], prefix: str) -> list[Setting]:
    rows = []
    for name, field in section.model_fields.items():
        nested = _models_in(field.annotation)
        if len(nested) == 1:
            rows += _settings(nested[0], f"{prefix}{name}.")
        elif nested:
            rows.append((f"{prefix}{name}", "required", "Where the data comes from, by its `kind`."))
        else:
            default = "required" if field.is_required() else _typed(field.default)
            rows.append((f"{prefix}{name}", default, field.description or ""))
    return rows


def _typed(default: Any) -> str:
    """A default as one would type it behind `key=`."""
    if isinstance(default, str) and OmegaConf.from_dotlist([f"key={default}"]).key == default:
        return default
    text = json.dumps(default, separators=(",", ":"), default=str)
    return text if isinstance(default, str) else text.replace('"', "")


def validate(kind: type[RunConfig], values: Any, where: str) -> RunConfig:
    """A validated config. Raises ConfigError that names each wrong key and the nearest right one."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        lines = [f"  {_explain(e, kind)}" for e in error.errors()]
        raise ConfigError("\n".join([f"{where}: settings that cannot be used:", *lines])) from None


def _explain(error: Any, kind: type[BaseModel]) -> str:
    # pydantic puts the tag of a union into the path; a user never wrote it there.
    path = [str(part) for part in error["loc"] if part not in SOURCES]
    if error["type"] != "extra_forbidden":
        return f"{'.'.join(path)}: {error['msg']}"
    known = _fields_at(kind, path[:-1])
    near = difflib.get_close_matches(path[-1], known, 1, cutoff=0.4)
    hint = f"did you mean {'.'.join([*path[:-1], near[0]])}?" if near else f"there are {', '.join(known)}"
    return f"{'.'.join(path)}: unknown key; {hint}"


def _fields_at(kind: type[BaseModel], path: Sequence[str]) -> list[str]:
    """Names of the fields of the section at `path`; unions (the source) are searched in all their forms."""
    found: list[type[BaseModel]] = [kind]
    for part in path:
        nested = [m for k in found if part in k.model_fields for m in _models_in(k.model_fields[part].annotation)]
        found = nested or found
    return sorted({name for k in found for name in k.model_fields})


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for part in getattr(annotation, "__args__", ()) for m in _models_in(part)]
