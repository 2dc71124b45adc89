"""Whatever stands in a file, reading it gives data or the declared error: bundles, and the trainer's sources."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared import bundle as module
from shared.bundle import MANIFEST, Bundle, BundleError
from shared.retrieval import build_index, load_index
from tests import worlds
from tests.serving import fresh_database
from trainer.sources import RawData, SourceError, load_source, parse_source

FILES = ("items.jsonl", "popularity.npz", "models/sasrec/encoder.onnx", "models/sasrec/vectors.npy",
         "models/sasrec/index.hnsw", MANIFEST)  # fmt: skip
ITEM_FIELDS = ("item_id", "title", "categories", "available_from", "available_until", "withdrawn")
TABLES = {
    "train_ratings.csv": "user,item,time",
    "ratings.csv": "userId,movieId,rating,timestamp",
    "movies.csv": "movieId,title,genres",
    "titles.tsv": "item\ttitle",
    "years.tsv": "item\tyear",
    "genres.tsv": "item\tgenre",
}
fuzzed = settings(max_examples=40, suppress_health_check=list(HealthCheck))

scalars = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("2026-01-01T00:00:00Z")
)
values = st.recursive(scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=3), v, max_size=3))


@st.composite
def damages(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """A change to the bytes of a file: some replaced, a piece cut out or doubled, or cut off."""
    places = draw(st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=4))
    start, length = draw(st.floats(0, 1)), draw(st.integers(0, 40))
    how = draw(st.sampled_from(["keep", "keep", "cut", "double", "end"]))

    def change(data: bytes) -> bytes:
        found = bytearray(data)
        for place, value in places:
            if found:
                found[int(place * len(found))] = value
        at = int(start * len(found))
        pieces = {
            "cut": found[:at] + found[at + length :],
            "double": found[: at + length] + found[at:],
            "end": found[:at],
        }
        return bytes(pieces.get(how, found))

    return change


# --- bundles ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return worlds.write_bundle(tmp_path_factory.mktemp("bundles"), worlds.cyclic())


@pytest.fixture
def copy(original: Path, tmp_path: Path) -> Path:
    shutil.copytree(original, tmp_path / original.name)
    return tmp_path / original.name


def put(bundle: Path, original: Path, name: str, data: bytes) -> None:
    """Replace one file, and restore all others; with its right checksum: a mistake of a writer, or of an enemy."""
    manifest = json.loads((original / MANIFEST).read_text())
    for other in FILES:
        (bundle / other).write_bytes((original / other).read_bytes())
    (bundle / name).write_bytes(data)
    if name != MANIFEST:
        manifest["files"][name] = {"size": len(data), "sha256": module.sha256(bundle / name)}
        (bundle / MANIFEST).write_text(json.dumps(manifest))


def load(bundle: Path) -> Bundle | None:
    with suppress(BundleError):
        return Bundle.load(bundle)
    return None


@fuzzed
@given(name=st.sampled_from(FILES), damage=damages())
def test_damaged_files_of_a_bundle(copy: Path, original: Path, name: str, damage: Callable[[bytes], bytes]) -> None:
    put(copy, original, name, damage((original / name).read_bytes()))
    if (found := load(copy)) is not None:
        for model in found.models.values():
            assert model.retriever.index is not None
            model.retriever.index.knn_query(np.ones((3, 12), np.float32), k=5)  # crashes where a link leads nowhere


@fuzzed
@given(data=st.data())
def test_other_values_in_a_manifest(copy: Path, original: Path, data: st.DataObject) -> None:
    found = json.loads((original / MANIFEST).read_text())
    inside: Any = found
    while True:
        key = data.draw(st.sampled_from(sorted(inside)))
        if not isinstance(inside[key], dict) or not inside[key] or data.draw(st.booleans()):
            break
        inside = inside[key]
    if data.draw(st.booleans()):
        inside[key] = data.draw(values)
    else:
        inside[data.draw(st.text(max_size=300))] = inside.pop(key)
    put(copy, original, MANIFEST, json.dumps(found).encode())
    load(copy)


@fuzzed
@given(row=st.integers(0, 11), key=st.sampled_from(ITEM_FIELDS), value=values)
def test_other_values_in_a_catalogue(copy: Path, original: Path, row: int, key: str, value: object) -> None:
    lines = (original / "items.jsonl").read_text().splitlines()
    lines[row] = json.dumps({**json.loads(lines[row]), key: value})
    put(copy, original, "items.jsonl", "\n".join(lines).encode())
    load(copy)


@fuzzed
@given(st.integers(2, 60), damages())
def test_an_index_that_loads_can_be_searched(tmp_path: Path, count: int, damage: Callable[[bytes], bytes]) -> None:
    """hnswlib itself follows any number in the file, and dies of it."""
    vectors = np.random.default_rng(count).normal(size=(count, 4)).astype(np.float32)
    file = tmp_path / "index"
    build_index(vectors, m=4, ef_construction=20).save_index(str(file))
    file.write_bytes(damage(file.read_bytes()))
    with suppress(ValueError, RuntimeError):
        index = load_index(str(file), 4, 10)
        labels, _ = index.knn_query(vectors[:5], k=1)
        assert labels.max() < count


# --- sources ------------------------------------------------------------------------------------------


def read(**entries: object) -> RawData | None:
    with suppress(SourceError):
        return load_source(parse_source(entries))
    return None


COLUMNS = {"user": "u", "item": "i", "time": "t", "event_type": "e", "value": "v"}
cells = st.sampled_from(
    ["", "1", "a", "2026-01-01T00:00:00Z", "1e400", "-0", "nan", '"', '""', "\x00", "ü", "9" * 400, " "]
)
csv_lines = st.lists(cells | st.text(max_size=4), min_size=3, max_size=6).map(",".join)
csv_text = st.lists(csv_lines, max_size=6).map("\n".join)


@fuzzed
@given(
    body=st.one_of(csv_text.map(str.encode), st.binary(max_size=60)),
    header=st.booleans(),
    kind=st.sampled_from(["csv", "tsv"]),
)
def test_any_text_as_a_table_of_events(tmp_path: Path, body: bytes, header: bool, kind: str) -> None:
    separator = b"," if kind == "csv" else b"\t"
    head = separator.join(c.encode() for c in COLUMNS.values()) + b"\n" if header else b""
    file = tmp_path / f"events.{kind}"
    file.write_bytes(head + (body if kind == "csv" else body.replace(b",", b"\t")))
    found = read(
        kind="files", events=file, columns={r: c for r, c in COLUMNS.items() if r != "event_type"}, max_bad_rows=1.0
    )
    if found is not None:
        assert found.events["user_id"].null_count() == 0


@fuzzed
@given(damage=damages())
def test_damaged_parquet(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    file = tmp_path / "events.parquet"
    pl.DataFrame({"u": ["a", "b"], "i": ["1", "2"], "t": [1_700_000_000, 1_700_000_001]}).write_parquet(file)
    file.write_bytes(damage(file.read_bytes()))
    read(kind="files", events=file, columns={"user": "u", "item": "i", "time": "t"}, max_bad_rows=1.0)


columns_of_any_type = st.sampled_from(
    [[1, 2], [1.5, float("nan")], ["a", None], [True, False], [[1], []], [{"x": 1}, None], [b"\xff", b""], [None, None]]
)


@fuzzed
@given(user=columns_of_any_type, item=columns_of_any_type, time=columns_of_any_type, value=columns_of_any_type)
def test_columns_of_any_type(tmp_path: Path, user: Any, item: Any, time: Any, value: Any) -> None:
    file = tmp_path / "events.parquet"
    pl.DataFrame({"u": user, "i": item, "t": time, "v": value}).write_parquet(file)
    read(kind="files", events=file, columns={"user": "u", "item": "i", "time": "t", "value": "v"}, max_bad_rows=1.0)


@fuzzed
@given(tables=st.dictionaries(st.sampled_from(list(TABLES)), csv_text), kind=st.sampled_from(["folder", "movielens"]))
def test_any_text_in_a_folder(tmp_path: Path, tables: dict[str, str], kind: str) -> None:
    for file in tmp_path.iterdir():
        file.unlink()
    for name, text in tables.items():
        (tmp_path / name).write_text(f"{TABLES[name]}\n{text}", newline="")
    read(kind=kind, path=tmp_path, max_bad_rows=1.0)


async def test_a_damaged_database(tmp_path: Path) -> None:
    await fresh_database(tmp_path / "log.db")
    whole = (tmp_path / "log.db").read_bytes()
    for place in range(0, len(whole), 997):
        (tmp_path / "log.db").write_bytes(whole[:place] + b"\xff" * 16 + whole[place + 16 :])
        await _read_in_thread(tmp_path / "log.db")
        (tmp_path / "log.db").write_bytes(whole[:place])
        await _read_in_thread(tmp_path / "log.db")


async def _read_in_thread(file: Path) -> None:
    await asyncio.to_thread(read, kind="sql", url=f"sqlite:///{file}")


@fuzzed
@given(st.dictionaries(st.sampled_from(["kind", "path", "events", "columns", "url", "items", "item_columns", "format",
                                        "tombstones", "min_interactions", "max_bad_rows", "x"]),
                       values | st.sampled_from(["files", "sql", "folder", "csv"])))  # fmt: skip
def test_any_settings_of_a_source(entries: dict[str, Any]) -> None:
    with suppress(SourceError):
        parse_source(entries)
