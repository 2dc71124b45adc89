"""Bundles: what was written comes back; whatever is damaged is a BundleError, never another one."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx.external_data_helper import set_external_data

from shared import bundle as module
from shared.bundle import (
    CURRENT,
    MANIFEST,
    PREVIOUS,
    TABLES,
    Bundle,
    BundleError,
    current_version,
    new_version,
    point_current,
    previous_version,
    read_manifest,
    seal,
    staged,
    verify,
)
from shared.catalogue import Item
from shared.retrieval import Mode, build_index
from shared.times import DAY
from tests import worlds

VERSION = "2000-03-01T00-00-00Z-test"
Damage = Callable[[Path], object]


@pytest.fixture
def written(tmp_path: Path) -> Path:
    return worlds.write_bundle(tmp_path / "bundles", worlds.cyclic(), version=VERSION)


def rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest in place."""
    manifest = json.loads((path / MANIFEST).read_text())
    change(manifest)
    (path / MANIFEST).write_text(json.dumps(manifest))


def replace_file(path: Path, name: str, write: Callable[[Path], object]) -> None:
    """Put other content in place of a file, with its right checksum in the manifest: a writer's mistake, no damage."""
    write(path / name)
    entry = {"size": (path / name).stat().st_size, "sha256": module.sha256(path / name)}
    rewrite(path, lambda m: m["files"].update({name: entry}))


# --- what comes back ----------------------------------------------------------------------------------


def test_what_was_written_comes_back(written: Path) -> None:
    world = worlds.cyclic()
    bundle = Bundle.load(written, Mode.HNSW)
    assert bundle.catalogue.items == world.catalogue.items
    assert bundle.version == VERSION
    assert bundle.policy == world.policy
    wanted = worlds.popularity(world, world.catalogue)
    for as_of in (worlds.BORN, worlds.BORN + 60 * DAY, worlds.BORN + 500 * DAY):
        assert bundle.popularity.popular(as_of).tolist() == wanted.popular(as_of).tolist()
    assert list(bundle.models) == ["sasrec", "bert4rec"]
    model = bundle.models["sasrec"]
    np.testing.assert_array_equal(model.retriever.vectors, np.eye(12, dtype=np.float32))
    assert model.retriever.mode is Mode.HNSW
    assert model.encoder.encode([np.array([3])]).tolist() == [worlds.circle(12)[3].tolist()]


def test_bounds_titles_and_categories_survive(tmp_path: Path) -> None:
    odd = Item("é|1", 'say "ü"\n', ("genre:Sci-Fi", "tag:a:b"), -5, 1_000_001, withdrawn=True)
    world = worlds.World((Item("plain"), odd), (("plain", 0),))
    found = Bundle.load(worlds.write_bundle(tmp_path, world)).catalogue.items
    assert found == (Item("plain"), odd)


def test_tables_may_lie_in_a_file_of_their_own(written: Path) -> None:
    def asked() -> Any:
        return Bundle.load(written).models["sasrec"].encoder.encode([np.array([3, 4]), np.array([12])])

    whole = asked()
    part(written)
    np.testing.assert_array_equal(asked(), whole)


def test_the_manifest_lists_every_file_but_itself(written: Path) -> None:
    files = {f.relative_to(written).as_posix() for f in written.rglob("*") if f.is_file()}
    assert set(read_manifest(written).files) == files - {MANIFEST}


def test_a_later_release_may_add_fields(written: Path) -> None:
    rewrite(written, lambda m: m.update(invented_later={"x": 1}))
    rewrite(written, lambda m: m["models"]["sasrec"].update(invented_later=1))
    assert Bundle.load(written).version == VERSION


# --- what is refused ----------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    file = path / "models/sasrec/index.hnsw"
    file.write_bytes(file.read_bytes()[:-1])


def change_byte(path: Path) -> None:
    file = path / "models/sasrec/vectors.npy"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))


def other_names(path: Path) -> None:
    (path / "models/sasrec").rename(path / "models/other")
    rewrite(path, lambda m: m["models"].update({"../sasrec": m["models"].pop("sasrec")}))


def list_file(name: str) -> Damage:
    entry = {"size": 1, "sha256": "0" * 64}
    return lambda path: rewrite(path, lambda m: m["files"].update({name: entry}))


def save_vectors(vectors: np.ndarray[Any, Any]) -> Damage:
    return lambda path: replace_file(path, "models/sasrec/vectors.npy", lambda file: np.save(file, vectors))


def save_index(rows: int, width: int) -> Damage:
    index = build_index(np.eye(rows, width, dtype=np.float32))
    return lambda path: replace_file(path, "models/sasrec/index.hnsw", lambda file: index.save_index(str(file)))


def save_counts(**columns: list[int]) -> Damage:
    arrays: dict[str, Any] = {name: np.array(values, np.int64) for name, values in columns.items()}
    return lambda path: replace_file(path, "popularity.npz", lambda file: np.savez(file, **arrays))


def make_folder(path: Path) -> None:
    (path / "items.jsonl").unlink()
    (path / "items.jsonl").mkdir()


def link_out(name: str) -> Damage:
    """The same bytes, but from elsewhere: size and checksum are right."""

    def damage(path: Path) -> None:
        elsewhere = path.parent / "elsewhere"
        (path / name).rename(elsewhere)
        (path / name).symlink_to(elsewhere)

    return damage


def read_elsewhere(path: Path) -> None:
    """A network whose weights lie in a file that is not the bundle's."""
    (path.parent / "secret").write_bytes(b"\0" * 14 * 12 * 4)

    def write(file: Path) -> None:
        model = onnx.load_model_from_string(worlds.encoder_bytes(worlds.circle(12), asks_with_mask=False))
        table = next(tensor for tensor in model.graph.initializer if tensor.name == "table")
        set_external_data(table, "../../../secret")
        table.ClearField("raw_data")
        file.write_bytes(model.SerializeToString())

    replace_file(path, "models/sasrec/encoder.onnx", write)


def part(path: Path) -> None:
    """Put the table of a network into a file of its own."""
    model = onnx.load_model(path / "models/sasrec/encoder.onnx")
    table = next(tensor for tensor in model.graph.initializer if tensor.name == "table")
    numbers = table.raw_data
    set_external_data(table, TABLES)
    table.ClearField("raw_data")
    replace_file(path, f"models/sasrec/{TABLES}", lambda file: file.write_bytes(numbers))
    replace_file(path, "models/sasrec/encoder.onnx", lambda file: file.write_bytes(model.SerializeToString()))


def part_unlisted(path: Path) -> None:
    part(path)
    rewrite(path, lambda m: m["files"].pop(f"models/sasrec/{TABLES}"))


def part_and_lose(path: Path) -> None:
    part_unlisted(path)
    (path / f"models/sasrec/{TABLES}").unlink()


def make_pipe(path: Path) -> None:
    (path / "items.jsonl").unlink()
    os.mkfifo(path / "items.jsonl")


def drop_line(path: Path) -> None:
    lines = (path / "items.jsonl").read_text().splitlines(keepends=True)
    replace_file(path, "items.jsonl", lambda file: file.write_text("".join(lines[:-1])))


DAMAGES: dict[str, tuple[Damage, str]] = {
    "folder missing": (lambda p: p.rename(p.parent / "away"), "no readable manifest"),
    "manifest missing": (lambda p: (p / MANIFEST).unlink(), "no readable manifest"),
    "manifest truncated": (lambda p: (p / MANIFEST).write_text((p / MANIFEST).read_text()[:-9]), "not valid"),
    "manifest not JSON": (lambda p: (p / MANIFEST).write_text("hello"), "not valid"),
    "manifest not UTF-8": (lambda p: (p / MANIFEST).write_bytes(b"\xff\xfe"), "not valid"),
    "manifest a list": (lambda p: (p / MANIFEST).write_text("[1]"), "format version"),
    "field missing": (lambda p: rewrite(p, lambda m: m.pop("data")), "not valid"),
    "future format": (lambda p: rewrite(p, lambda m: m.update(schema_version=99)), "format version 99"),
    "no format": (lambda p: rewrite(p, lambda m: m.pop("schema_version")), "format version None"),
    "unknown kind of model": (lambda p: rewrite(p, lambda m: m["models"]["sasrec"].update(kind="oracle")), "not valid"),
    "file truncated": (truncate, "bytes, the manifest says"),
    "byte changed": (change_byte, "checksum"),
    "file missing": (lambda p: (p / "items.jsonl").unlink(), "cannot be read"),
    "file a folder": (make_folder, "items.jsonl"),
    "file not listed": (lambda p: rewrite(p, lambda m: m["files"].pop("models/sasrec/vectors.npy")), "does not list"),
    "path above": (list_file("../x"), "outside the bundle"),
    "path above, deeper": (list_file("models/../../x"), "outside the bundle"),
    "path absolute": (list_file("/etc/hostname"), "outside the bundle"),
    "path empty": (list_file(""), "outside the bundle"),
    "path with nul": (list_file("a\0b"), "outside the bundle"),
    "file a link": (link_out("items.jsonl"), "is a link"),
    "folder a link": (link_out("models/sasrec"), "is a link"),
    "file that never ends": (make_pipe, "no plain file"),
    "weights elsewhere": (read_elsewhere, "cannot be loaded"),
    "tables not listed": (part_unlisted, "does not list models/sasrec/encoder.data"),
    "tables not there": (part_and_lose, "cannot be loaded"),
    "model name a path": (other_names, "cannot be a model's name"),
    "default model absent": (lambda p: rewrite(p, lambda m: m.update(default_model="nobody")), "default model"),
    "vectors of fewer items": (save_vectors(np.eye(11, 12, dtype=np.float32)), "not the catalogue's"),
    "vectors of another width": (save_vectors(np.eye(12, 11, dtype=np.float32)), "not the catalogue's"),
    "vectors of another type": (save_vectors(np.eye(12, dtype=np.float64)), "not the catalogue's"),
    "vectors that hold code": (save_vectors(np.array([{}])), "cannot be loaded"),
    "index of fewer items": (save_index(11, 12), "index"),
    "index of another width": (save_index(12, 11), "cannot be loaded"),
    "index of garbage": (
        lambda p: replace_file(p, "models/sasrec/index.hnsw", lambda f: f.write_bytes(b"x")), "cannot be loaded",
    ),
    "network of garbage": (
        lambda p: replace_file(p, "models/sasrec/encoder.onnx", lambda f: f.write_bytes(b"x")), "cannot be loaded",
    ),
    "catalogue with a line less": (drop_line, "not the catalogue's"),
    "catalogue of garbage": (lambda p: replace_file(p, "items.jsonl", lambda f: f.write_text("{")), "cannot be loaded"),
    "counts without a column": (save_counts(day=[1], item=[1]), "cannot be loaded"),
    "counts of unequal length": (save_counts(day=[1, 2], item=[1], count=[1]), "popularity"),
    "counts of unknown items": (save_counts(day=[1], item=[13], count=[1]), "popularity"),
    "another item count": (
        lambda p: rewrite(p, lambda m: m["models"]["sasrec"]["encoder"].update(item_count=11)), "was made for 11 items",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_bundle_is_refused_with_the_reason(written: Path, name: str) -> None:
    damage, reason = DAMAGES[name]
    damage(written)
    with pytest.raises(BundleError, match=reason):
        Bundle.load(written)


def test_a_file_that_holds_code_is_never_run(written: Path, tmp_path: Path) -> None:
    class Code:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    replace_file(written, "models/sasrec/vectors.npy", lambda file: np.save(file, np.array([Code()])))
    with pytest.raises(BundleError):
        Bundle.load(written)
    assert not (tmp_path / "ran").exists()


PARTS = ("encoder.onnx", "vectors.npy", "index.hnsw")
FILES = ["items.jsonl", "popularity.npz", *(f"models/{m}/{part}" for m in ("sasrec", "bert4rec") for part in PARTS)]


@pytest.mark.parametrize("name", FILES)
def test_verify_checks_every_file(written: Path, name: str) -> None:
    content = (written / name).read_bytes()
    (written / name).write_bytes(bytes([content[0] ^ 1]) + content[1:])
    with pytest.raises(BundleError, match=name):
        verify(written)


# --- CURRENT ------------------------------------------------------------------------------------------


def test_nothing_published_is_none(tmp_path: Path) -> None:
    assert current_version(tmp_path) is None
    assert current_version(tmp_path / "missing") is None


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"../..", b"a/b", b"/etc", b".hidden", b"\xff\xfe", b"a b", b"x" * 101]
)
def test_garbage_in_current_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / CURRENT).write_bytes(content)
    with pytest.raises(BundleError, match=CURRENT):
        current_version(tmp_path)


def test_current_names_the_version_pointed_at_last(tmp_path: Path) -> None:
    for version in ("2026-01-01T00-00-00Z-aaaa", "2025-01-01T00-00-00Z-bbbb"):
        point_current(tmp_path, version)
        assert current_version(tmp_path) == version
    assert previous_version(tmp_path) == "2026-01-01T00-00-00Z-aaaa"
    assert {f.name for f in tmp_path.iterdir()} == {CURRENT, PREVIOUS}
    point_current(tmp_path, version)  # no change, so nothing else was live before
    assert previous_version(tmp_path) == "2026-01-01T00-00-00Z-aaaa"


@pytest.mark.parametrize("step", ["os.fsync", "pathlib.Path.replace"])
def test_a_crash_while_pointing_leaves_the_old_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    point_current(tmp_path, "old")

    def crash(*_: object) -> None:
        raise OSError("power is gone")

    monkeypatch.setattr(step, crash)
    with pytest.raises(OSError, match="power"):
        point_current(tmp_path, "new")
    assert current_version(tmp_path) == "old"


def test_version_names_sort_by_time_and_fit_the_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.bundle.secrets.token_hex", lambda _: "3f9c")
    version = new_version()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d-\d\d-\d\dZ-3f9c", version)
    point_current(tmp_path, version)
    assert current_version(tmp_path) == version


# --- writing ------------------------------------------------------------------------------------------


def test_staging_leaves_nothing_behind(tmp_path: Path) -> None:
    def write_half() -> None:
        with staged(tmp_path) as folder:
            (folder / "half").write_text("x")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_half()
    with staged(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_reader_sees_no_bundle_before_it_is_sealed(tmp_path: Path) -> None:
    with staged(tmp_path) as folder:
        (folder / "file").write_text("x")
        assert not (tmp_path / "v1").exists()
        target = seal(folder, tmp_path, "v1")
    assert [f.relative_to(tmp_path).as_posix() for f in tmp_path.rglob("*")] == ["v1", "v1/file"]
    assert target == tmp_path / "v1"


def test_a_version_is_never_written_twice(written: Path) -> None:
    before = (written / MANIFEST).read_bytes()
    with pytest.raises(BundleError, match="immutable"):
        worlds.write_bundle(written.parent, worlds.cyclic(5), version=VERSION)
    assert (written / MANIFEST).read_bytes() == before
    assert sorted(f.name for f in written.parent.iterdir()) == [VERSION, CURRENT]
