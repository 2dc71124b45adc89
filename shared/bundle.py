"""The bundle: an immutable directory with everything that answers need, written by the trainer, read by the service.

    bundles/
      CURRENT                         the name of the live version
      PREVIOUS                        the name of the version that was live before it
      2026-11-21T10-00-00Z-3f9c/
        manifest.json                 what this is, with size and sha256 of every other file
        items.jsonl                   the catalogue, one item a line, in index order
        popularity.npz                daily counts: day, item, count
        models/sasrec/encoder.onnx    packed histories -> query vectors
        models/sasrec/encoder.data    its large tables, if it has any: mapped, so that all workers share them
        models/sasrec/vectors.npy     (N, D) float32, row r = item index r + 1
        models/sasrec/index.hnsw      the same vectors, label = row
      models/sasrec/weights.npz     what was trained, by name, for the trainer's warm start
        models/sasrec/tower.*         only of a model that reads metadata, see shared/tower.py

A bundle is written aside and renamed into place, so a reader never sees half of one; the reader checks
every file against the manifest before it uses any. Formats are plain: nothing in a bundle can run code.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any, Final, Literal

import hnswlib
import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from shared.catalogue import Catalogue, CatalogueError, Item
from shared.encoder import Encoder, EncoderSpec, Vectors
from shared.events import HistoryPolicy
from shared.files import move_durably, sync
from shared.popularity import Popularity
from shared.retrieval import Mode, Retriever, load_index
from shared.times import BEGINNING, END, parse, render_bound

SCHEMA_VERSION: Final = 2
READABLE_VERSIONS: Final = (1, 2)
VERSION_PATTERN: Final = re.compile(r"[0-9A-Za-z][0-9A-Za-z._-]{0,99}")
HOW_TO_PUBLISH: Final = "train and publish one: python -m trainer run <preset or file.yaml>"
CURRENT: Final = "CURRENT"
PREVIOUS: Final = "PREVIOUS"
MANIFEST: Final = "manifest.json"
WEIGHTS: Final = "weights.npz"
TABLES: Final = "encoder.data"
"""What an encoder.onnx names where a table of it lies outside."""
MODEL_PATTERN: Final = r"^[a-z0-9][a-z0-9_-]{0,62}$"


class BundleError(Exception):
    """A bundle that must not be served: missing, damaged, or of a format this release cannot read."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")  # a later release may add fields


class FileEntry(_Part):
    """Size and checksum of one file."""

    size: int = Field(ge=0, description="Bytes.")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class DataInfo(_Part):
    """Where the numbers come from."""

    source: str
    fingerprint: str = Field(description="Hash over all events that were used, in order.")
    events: int
    users: int
    items: int
    first_event: str | None = Field(description="RFC 3339; null when the data has no times.")
    last_event: str | None
    has_times: bool


class AvailabilityInfo(_Part):
    """How `available_from` came about, and what was odd about it. Counts are items unless said otherwise."""

    policy: Literal["first_event", "always"]
    declared: int
    from_first_event: int = Field(description="Nothing declared: the first training event counts.")
    always: int = Field(description="Nothing declared, and no rule or time to go by: exists since ever.")
    from_data_end: int = Field(0, description="Nothing declared and no event: exists from the newest event on.")
    contradicted: int = Field(description="Declared later than the first event: the event counts.")
    never: int = Field(
        0, description="Ends before it begins: an `available_until`, no date, and events after it alone."
    )
    events_before_declared: int = Field(description="Events that lie before the declared date of their item.")


class IndexInfo(_Part):
    """The HNSW index of a model, and how well it finds what exact search finds."""

    space: Literal["ip"] = "ip"
    m: int
    ef_construction: int
    ef: int
    recall_at_10: float | None = Field(description="Share of the exact top 10 that HNSW alone finds.")
    recall_at_100: float | None = Field(description="Null where no held-out history could be asked.")


class Parity(_Part):
    """Largest differences between torch and ONNX that the export saw."""

    lengths: tuple[int, ...]
    max_vector_difference: float
    max_score_difference: float
    top10_changes: int = Field(description="Places in top-10 lists that changed beyond swaps of near-equal scores.")
    max_tower_difference: float | None = Field(None, description="The same of the item tower's vectors, if it has one.")


class ModelInfo(_Part):
    """One model of a bundle."""

    kind: Literal["encoder"]
    encoder: EncoderSpec
    fit: Literal["split", "all"] = Field(description="Whether the weights saw the held-out events.")
    epochs: int | None = Field(None, description="That these weights were trained for.")
    parity: Parity
    index: IndexInfo
    metrics: dict[str, Any] = Field(description="Figures of the split run: through the bundle, and torch's.")
    config: dict[str, Any] = Field(description="Every setting of the training.")


class Manifest(_Part):
    """`manifest.json`."""

    schema_version: int
    version: str
    created: str
    data: DataInfo
    history_policy: HistoryPolicy
    availability: AvailabilityInfo
    default_model: str
    models: dict[str, ModelInfo]
    baselines: dict[str, Any]
    files: dict[str, FileEntry]


@dataclass(frozen=True, eq=False)
class Model:
    """A model ready to answer."""

    name: str
    info: ModelInfo
    encoder: Encoder
    retriever: Retriever


@dataclass(frozen=True)
class Bundle:
    """A verified bundle in memory. Immutable; a swap replaces the whole object."""

    path: Path
    manifest: Manifest
    catalogue: Catalogue
    popularity: Popularity
    models: Mapping[str, Model]

    @property
    def version(self) -> str:
        """The bundle's name."""
        return self.manifest.version

    @property
    def policy(self) -> HistoryPolicy:
        """The history policy that its models were trained with."""
        return self.manifest.history_policy

    @classmethod
    def load(cls, path: Path, mode: Mode = Mode.AUTO) -> Bundle:
        """Verify and load. Raises BundleError with the reason, whatever is wrong with the files."""
        manifest = verify(path)
        try:
            catalogue = Catalogue.in_order(_read_items(path / "items.jsonl"))
            popularity = _load_popularity(path, len(catalogue))
            models = {name: _load_model(path, name, info, catalogue, mode) for name, info in manifest.models.items()}
        except BundleError:
            raise
        except Exception as error:  # a file with the right checksum that still cannot be read: say which bundle
            raise BundleError(f"{path}: cannot be loaded: {error}") from error
        return cls(path, manifest, catalogue, popularity, models)


def _load_popularity(path: Path, item_count: int) -> Popularity:
    # Opened here: np.load leaves a file open that is no archive.
    with (path / "popularity.npz").open("rb") as file, np.load(file, allow_pickle=False) as counts:
        day, item, count = (counts[name].astype(np.int64) for name in ("day", "item", "count"))
    if not len(day) == len(item) == len(count) or np.any((item < 1) | (item > item_count)):
        raise BundleError(f"{path}: the popularity counts are not the catalogue's")
    return Popularity(day, item, count, item_count)


def _load_model(path: Path, name: str, info: ModelInfo, catalogue: Catalogue, mode: Mode) -> Model:
    folder, spec = path / "models" / name, info.encoder
    # Mapped, not read: all workers on a machine share one copy of the pages.
    vectors = np.load(folder / "vectors.npy", mmap_mode="r", allow_pickle=False).view(np.ndarray)
    if vectors.shape != (len(catalogue), spec.width) or vectors.dtype != np.float32:
        raise BundleError(f"{path}: vectors of {name} are {vectors.dtype} {vectors.shape}, not the catalogue's")
    if spec.item_count != len(catalogue):
        raise BundleError(f"{path}: {name} was made for {spec.item_count} items, the catalogue has {len(catalogue)}")
    index = load_index(str(folder / "index.hnsw"), spec.width, info.index.ef)
    if index.get_current_count() != len(catalogue):
        raise BundleError(f"{path}: the index of {name} holds {index.get_current_count()} items, not the catalogue's")
    return Model(name, info, Encoder(folder / "encoder.onnx", spec), Retriever(vectors, index, mode))


def verify(path: Path) -> Manifest:
    """Read the manifest and check every file it names. Raises BundleError."""
    manifest = read_manifest(path)
    for name, entry in manifest.files.items():
        file = path / _inside(name)
        try:
            if file.resolve(strict=True) != path.resolve() / _inside(name) or not file.is_file():
                raise BundleError(f"{path}: {name} is a link or no plain file; a bundle holds its files itself")
            size = file.stat().st_size
            if size != entry.size:
                raise BundleError(f"{path}: {name} has {size} bytes, the manifest says {entry.size}")
            if sha256(file) != entry.sha256:
                raise BundleError(f"{path}: {name} does not have the checksum in the manifest")
        except OSError as error:
            raise BundleError(f"{path}: {name} cannot be read: {error.strerror}") from error
    needed = {"items.jsonl", "popularity.npz"} | {
        f"models/{model}/{file}" for model in manifest.models for file in ("encoder.onnx", "vectors.npy", "index.hnsw")
    }
    # Tables that are there are read, listed or not.
    needed |= {name for m in manifest.models if (path / (name := f"models/{m}/{TABLES}")).exists()}
    if missing := sorted(needed - manifest.files.keys()):
        raise BundleError(f"{path}: the manifest does not list {', '.join(missing)}")
    if manifest.default_model not in manifest.models:
        raise BundleError(f"{path}: the default model {manifest.default_model!r} is not in the bundle")
    return manifest


def read_manifest(path: Path) -> Manifest:
    """The manifest alone, without a look at the other files. Raises BundleError."""
    try:
        text = (path / MANIFEST).read_text()
        found = json.loads(text)
        version = found.get("schema_version") if isinstance(found, dict) else None
        if version not in READABLE_VERSIONS:
            raise BundleError(f"{path}: format version {version!r}; this release reads {READABLE_VERSIONS}")
        manifest = Manifest.model_validate_json(text)
    except OSError as error:
        raise BundleError(f"{path}: no readable {MANIFEST}: {error.strerror}") from error
    except (ValidationError, ValueError) as error:
        raise BundleError(f"{path}: {MANIFEST} is not valid: {error}") from error
    for name in manifest.models:
        if not re.fullmatch(MODEL_PATTERN, name):
            raise BundleError(f"{path}: {name!r} cannot be a model's name")
    return manifest


def _inside(name: str) -> PurePosixPath:
    """`name` as a relative path that stays inside the bundle. Raises BundleError."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts or "\\" in name or "\0" in name:
        raise BundleError(f"the manifest names {name!r}, which is outside the bundle")
    return path


def sha256(file: Path) -> str:
    """Hex digest of a file's bytes."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


# --- the live version ---------------------------------------------------------------------------------


def current_version(bundles: Path) -> str | None:
    """What CURRENT names; None when nothing was published yet. Raises BundleError for an unusable CURRENT."""
    return _named(bundles / CURRENT)


def previous_version(bundles: Path) -> str | None:
    """What was live before; None when nothing was. Raises BundleError for an unusable PREVIOUS."""
    return _named(bundles / PREVIOUS)


def _named(file: Path) -> str | None:
    try:
        name = file.read_text().strip()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"{file} cannot be read: {error}") from error
    if not VERSION_PATTERN.fullmatch(name):
        raise BundleError(f"{file} holds {name[:100]!r}, which is no bundle version")
    return name


def point_current(bundles: Path, version: str) -> None:
    """Make `version` the live one, at once and durably: a crash leaves the old name or the new, never half a line.

    The one that it replaces is noted in PREVIOUS.
    """
    try:
        before = current_version(bundles)
    except BundleError:
        before = None  # what cannot be read is nothing to go back to
    if before is not None and before != version:
        _name(bundles / PREVIOUS, before)
    _name(bundles / CURRENT, version)


def _name(file: Path, version: str) -> None:
    aside = file.with_name(f".{file.name}-{secrets.token_hex(4)}")
    with aside.open("w") as opened:
        opened.write(version + "\n")
        opened.flush()
        os.fsync(opened.fileno())
    aside.replace(file)
    sync(file.parent)


# --- writing ------------------------------------------------------------------------------------------


def new_version() -> str:
    """A name that sorts by time and is never given twice: 2026-11-21T10-00-00Z-3f9c."""
    return f"{datetime.now(UTC):%Y-%m-%dT%H-%M-%SZ}-{secrets.token_hex(2)}"


@contextmanager
def staged(bundles: Path) -> Iterator[Path]:
    """A folder to write a bundle in; removed at the end unless `seal` has moved it into place."""
    bundles.mkdir(parents=True, exist_ok=True)
    folder = bundles / f".staging-{secrets.token_hex(4)}"
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_data(folder: Path, catalogue: Catalogue, popularity: Popularity) -> None:
    """The catalogue and the popularity of a bundle."""
    with (folder / "items.jsonl").open("w", encoding="utf-8") as file:
        for item in catalogue.items:
            row = {
                "item_id": item.item_id,
                "title": item.title,
                "categories": item.categories,
                "available_from": render_bound(item.available_from),
                "available_until": render_bound(item.available_until),
                "withdrawn": item.withdrawn,
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    np.savez(folder / "popularity.npz", day=popularity.day, item=popularity.item, count=popularity.count)


def _read_items(file: Path) -> Iterator[Item]:
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            yield Item(
                item_id=str(row["item_id"]),
                title=row["title"],
                categories=tuple(row["categories"]),
                available_from=BEGINNING if row["available_from"] is None else parse(row["available_from"]),
                available_until=END if row["available_until"] is None else parse(row["available_until"]),
                withdrawn=bool(row["withdrawn"]),
            )


def write_model(
    folder: Path,
    name: str,
    onnx: bytes,
    vectors: Vectors,
    index: hnswlib.Index,
    weights: Mapping[str, Vectors] | None = None,
    tables: bytes = b"",
) -> None:
    """The files of one model; `index` holds the rows of `vectors` under their numbers, `weights` are by name.

    `tables` is what the network has outside of `onnx`.
    """
    target = folder / "models" / name
    target.mkdir(parents=True)
    (target / "encoder.onnx").write_bytes(onnx)
    if tables:
        (target / TABLES).write_bytes(tables)
    np.save(target / "vectors.npy", np.ascontiguousarray(vectors, np.float32))
    index.save_index(str(target / "index.hnsw"))
    if weights is not None:
        np.savez(target / WEIGHTS, **weights)  # type: ignore[arg-type]


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Write `manifest.json` with size and checksum of all files now in `folder`; what was written."""
    files = {
        file.relative_to(folder).as_posix(): FileEntry(size=file.stat().st_size, sha256=sha256(file))
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != MANIFEST
    }
    manifest = manifest.model_copy(update={"files": files})
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n")
    return manifest


def seal(folder: Path, bundles: Path, version: str) -> Path:
    """Move a finished folder into place as `bundles/<version>`, durably. It is not live until CURRENT names it."""
    target = bundles / version
    if target.exists():
        raise BundleError(f"{target} exists already; bundles are immutable, publish under a new version")
    move_durably(folder, target)
    return target


__all__ = [
    "CURRENT", "AvailabilityInfo", "Bundle", "BundleError", "CatalogueError", "DataInfo", "FileEntry", "IndexInfo",
    "Manifest", "Model", "ModelInfo", "Parity", "current_version", "new_version", "point_current", "previous_version",
    "read_manifest", "seal", "sha256", "staged", "verify", "write_data", "write_manifest", "write_model",
]  # fmt: skip
